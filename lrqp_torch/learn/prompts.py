"""What a learned edit is trained on: prompts, where to edit them, and the answer that is wanted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lrqp_torch.errors import LearningError, PositionError, WidthError, as_classes
from lrqp_torch.stream.positions import Positions
from lrqp_torch.stream.text import Rows


@dataclass(frozen=True, eq=False)
class EditPrompts(Rows):
    """n prompts padded to T tokens, and what an edit of them should do.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask``, LongTensors (n, T), and ``position_ids`` where
            the prompts are padded.
        positions: columns to edit, LongTensor (n,) or (n, k).
        target: class to write, LongTensor (n,); one number stands for all.
        read: column where the answer is read, LongTensor (n,).
        source: class that holds now, (n,) or one for all: for the ``mirror`` rule, and for control
            edits, which write it. None: the probe's own reading, and no control edits.
        wins: token that should become the answer, LongTensor (n,). None for own objectives.
        loses: token that should cease to be, LongTensor (n,). None for own objectives.
        elsewhere: columns whose next-token distribution should stay, BoolTensor (n, T). None:
            every token from the first edited one on, except ``read``.

    Raises:
        LearningError: no prompts.
        WidthError: a tensor of another shape.
        PositionError: positions or ``read`` of another shape or dtype, columns that do not exist,
            or ``read`` on padding.
        TargetError: classes or tokens that are not numbers.
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor
    target: Tensor
    read: Tensor
    source: Tensor | None = None
    wins: Tensor | None = None
    loses: Tensor | None = None
    elsewhere: Tensor | None = None

    def __post_init__(self) -> None:
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise PositionError(f"inputs need input_ids (n, T), got {sorted(self.inputs)}")
        if len(ids) == 0:
            raise LearningError("no prompts were given: there is nothing to learn from")
        rows = {f"inputs[{name!r}]": tensor for name, tensor in self.inputs.items()}
        for name, tensor in {**rows, "positions": self.positions}.items():
            if len(tensor) != len(ids):
                raise WidthError(f"{name} has {len(tensor)} rows, input_ids {len(ids)}")
        for name in ("target", "read", "source", "wins", "loses"):
            if getattr(self, name) is None:
                continue
            given, classes = getattr(self, name), name in ("target", "source")
            value = as_classes(given, name) if classes else torch.as_tensor(given)
            if classes and value.ndim == 0:
                value = value.expand(len(ids))
            if value.shape != (len(ids),):
                raise WidthError(f"{name} must be ({len(ids)},), got {tuple(value.shape)}")
            if value.dtype.is_floating_point or value.dtype == torch.bool:
                error = PositionError if name == "read" else LearningError
                raise error(f"{name} must hold integers, got {value.dtype}; use .long()")
            object.__setattr__(self, name, value)
        if self.elsewhere is not None and (
            self.elsewhere.shape != ids.shape or self.elsewhere.dtype != torch.bool
        ):
            raise WidthError(
                f"elsewhere must be a BoolTensor {tuple(ids.shape)}, got {self.elsewhere.dtype} "
                f"{tuple(self.elsewhere.shape)}"
            )
        if self.positions.dtype == torch.bool:
            raise PositionError("positions must be LongTensor (n,) or (n, k) here, not a mask")
        last = max(int(self.read.max()), int(Positions.parse(self.positions).token.max()))
        if last >= ids.shape[1] or int(self.read.min()) < 0:
            raise PositionError(f"column {last} is outside the {ids.shape[1]} tokens of the input")
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            padded = (mask.gather(1, self.read.long().to(mask.device)[:, None]) == 0).flatten()
            if bool(padded.any()):
                raise PositionError(
                    f"read lies on padding in rows {padded.nonzero().flatten()[:5].tolist()}; "
                    f"count columns on the padded input"
                )

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.inputs["input_ids"])

    def control(self) -> Self:
        """The same prompts with the class that holds already as the target."""
        if self.source is None:
            raise LearningError("control edits write the class that holds now: give source")
        return replace(self, target=self.source)

    @property
    def first_position(self) -> int:
        """The smallest column that is edited."""
        return int(self.positions.min())

    @property
    def kept(self) -> Tensor:
        """Columns whose next-token distribution should stay, BoolTensor (n, T)."""
        columns = torch.arange(self.inputs["input_ids"].shape[1], device=self.read.device)
        first = self.positions.reshape(len(self), -1).amin(-1, keepdim=True)
        # Before the first edited token nothing can change, and layers there do not run again.
        reachable = (columns >= first) & (columns != self.read[:, None])
        if self.elsewhere is not None:
            return self.elsewhere & reachable
        mask = self.inputs.get("attention_mask")
        return reachable if mask is None else reachable & mask.bool()

    def texts(self) -> list[tuple[int, ...]]:
        """The tokens of each prompt without padding: the same however it was padded."""
        ids = self.inputs["input_ids"].cpu()
        mask = self.inputs.get("attention_mask", torch.ones_like(ids)).cpu().bool()
        return [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
