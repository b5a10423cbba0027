"""A learning run on disk, so that one that was stopped goes on as if it had not been."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lrqp_torch.errors import LearningError
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.learn.prompts import EditPrompts
from lrqp_torch.learn.result import Epoch

FILE = "learning.safetensors"
_DIGESTED = 4096
"""Elements of each tensor that a digest reads."""


@dataclass
class State:
    """Everything that the next epoch depends on.

    Attributes:
        now: free parameters.
        best: those of the best epoch.
        optimiser: moments of the optimiser, by flat names.
        history: epochs so far, 0 included.
        best_epoch: which is best.
    """

    now: dict[str, Tensor]
    best: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    history: list[Epoch]
    best_epoch: int


class Checkpoint:
    """One file in a folder, written whole after every epoch.

    Args:
        folder: made if it is missing.
        digest: of everything that a run depends on; a folder with another is refused.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, digest: str) -> None:
        self.path, self.digest = Path(folder) / FILE, digest
        prepare_folder(self.path.parent)

    def save(self, state: State) -> None:
        """Replace the file."""
        tensors = {
            f"{part}.{name}": tensor.detach().cpu().contiguous()
            for part in ("now", "best", "optimiser")
            for name, tensor in getattr(state, part).items()
        }
        facts = {
            "digest": self.digest,
            "best_epoch": str(state.best_epoch),
            "history": json.dumps([asdict(epoch) for epoch in state.history]),
        }
        with written_whole(self.path) as partial:
            partial.write_bytes(safetensors.torch.save(tensors, facts))

    def load(self, device: torch.device) -> State | None:
        """The state that was saved, or None if there is none.

        Raises:
            LearningError: the file is damaged, or of another run.
        """
        if not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, "pt", device=str(device)) as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            history = [Epoch(**epoch) for epoch in json.loads(facts["history"])]
            best_epoch = int(facts["best_epoch"])
            found = facts["digest"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise LearningError(
                f"{self.path} cannot be read ({error}); delete it, or give another folder"
            ) from error
        if found != self.digest:
            raise LearningError(
                f"{self.path} is of another run: model, edit, prompts or options differ. Delete "
                f"it, or give another folder"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(f"{prefix}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{prefix}.")
            }

        return State(part("now"), part("best"), part("optimiser"), history, best_epoch)


def digest_run(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prompts: Sequence[EditPrompts | None],
    settings: Mapping[str, Any],
) -> str:
    """A digest of what a learning run depends on: beginnings of weights, and all else whole."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())

    def add(name: str, tensor: Tensor) -> None:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )

    for name, parameter in model.named_parameters():
        add(name, parameter.flatten()[:_DIGESTED])
    for name, tensor in tensors.items():
        add(name, tensor)
    for item in prompts:
        for name, value in vars(item).items() if item is not None else ():
            parts = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, tensor in parts:
                if tensor is not None:
                    add(f"{name}.{key}", tensor)
    return digest.hexdigest()
