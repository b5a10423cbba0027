"""A learning run on disk, so that one that was stopped goes on as if it had not been."""

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
from lrqp_torch.files import (
    digest_model,
    digest_values,
    from_json,
    prepare_folder,
    to_json,
    written_whole,
)
from lrqp_torch.learn.prompts import EditPrompts
from lrqp_torch.learn.result import Epoch

FILE = "learning.safetensors"


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
            "history": to_json([asdict(epoch) for epoch in state.history]),
        }
        with written_whole(self.path) as partial:
            partial.write_bytes(safetensors.torch.save(tensors, facts))

    def load(self, like: Mapping[str, Tensor]) -> State | None:
        """The state that was saved, or None if there is none.

        Args:
            like: the free parameters, whose shapes, dtype and device it must have.

        Raises:
            LearningError: the file is damaged, or of another run.
        """
        if not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found, best_epoch = facts["digest"], int(facts["best_epoch"])
            epochs = from_json(facts["history"], "its history", LearningError)
            history = [Epoch(**epoch) for epoch in epochs]
            if [epoch.index for epoch in history] != list(range(len(history))):
                raise ValueError("its epochs are not in order")
            if best_epoch not in range(len(history)):
                raise ValueError(f"it has no epoch {best_epoch}")
            parts = _by_part(tensors, like)
        except (SafetensorError, LearningError, KeyError, TypeError, ValueError) as error:
            raise LearningError(
                f"{self.path} cannot be read ({error}); delete it, or give another folder"
            ) from error
        if found != self.digest:
            raise LearningError(
                f"{self.path} is of another run: model, edit, prompts or options differ. Delete "
                f"it, or give another folder"
            )
        return State(parts["now"], parts["best"], parts["optimiser"], history, best_epoch)


def _by_part(
    tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Parameters now and at best, and the optimiser's moments of them, each by name.

    Raises:
        KeyError: a parameter that is missing.
        ValueError: another shape or dtype, or numbers that are not finite.
    """
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimiser": {}}
    for key, tensor in tensors.items():
        part, name = key.split(".", 1)
        owner = like[name.rpartition(".")[0] if part == "optimiser" else name]
        right = name.endswith(".step") or (tensor.shape, tensor.dtype) == (owner.shape, owner.dtype)
        if not right or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, or not finite")
        parts[part][name] = tensor if name.endswith(".step") else tensor.to(owner)
    if not parts["now"].keys() == parts["best"].keys() == like.keys():
        raise KeyError(f"parameters {sorted(like)}")
    return parts


def digest_run(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prompts: Sequence[EditPrompts | None],
    settings: Mapping[str, Any],
) -> str:
    """A digest of what a learning run depends on."""
    values: dict[str, Any] = {**tensors, "model": digest_model(model)}
    values["settings"] = json.dumps(settings, sort_keys=True, default=str)
    for place, item in enumerate(prompts):
        for name, value in vars(item).items() if item is not None else ():
            parts = value.items() if isinstance(value, Mapping) else [("", value)]
            values |= {f"prompts.{place}.{name}.{key}": part for key, part in parts}
    return digest_values(values)
