"""Writing files whole or not at all, in folders that were checked before any work."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
