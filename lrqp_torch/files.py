"""Files written whole or not at all, and the digests by which models and tensors are told apart."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.errors import OutputError


def prepare_folder(folder: Path) -> None:
    """Create ``folder`` if needed and prove that a file can be written there.

    Raises:
        OutputError: it cannot be created, is not a folder, or refuses a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}. "
            "Choose another folder (on the command line with --out), or make this one writable."
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without error.

    Raises:
        OutputError: the file cannot be written.
    """
    # The suffix is kept, since matplotlib reads the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


_DIGESTED = 65_536
"""Elements of each parameter that the digest reads: enough to tell models apart, in no time."""


def digest_model(model: nn.Module) -> str:
    """A short digest of the model's weights: the beginning of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        # A tensor-parallel model holds a part of it on each rank.
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        digest.update(_bytes(whole.detach().flatten()[:_DIGESTED]))
    return digest.hexdigest()[:16]


def digest_values(values: Mapping[str, Any]) -> str:
    """A short digest of named values; of tensors it reads every element, shape and dtype."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(_bytes(value.detach()))
        else:
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> Any:
    return tensor.flatten().cpu().contiguous().view(torch.uint8).numpy()
