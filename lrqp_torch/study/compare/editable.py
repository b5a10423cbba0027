"""Texts to edit, what an edit of them is, and what it did."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline


@dataclass(frozen=True)
class Editable:
    """Texts padded to T tokens on the left, one token of each to be edited.

    Attributes:
        inputs: ``input_ids``, ``attention_mask``, ``position_ids``, (n, T).
        positions: the column to edit, (n,).
        source: class that holds now, (n,), or None for the reference probe's own reading.
        elsewhere: columns at which the next-token distribution should stay, BoolTensor (n, T), all
            of them behind the edited one.
        answers: tokens whose logits are subtracted in the last column, (n, 2), or None.
        keys: columns IO and S1, (n, 2), to which attention from the last column is read, or None.
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor
    source: Tensor | None
    elsewhere: Tensor
    answers: Tensor | None = None
    keys: Tensor | None = None

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.positions)

    def rows(self, chosen: Tensor, device: torch.device) -> "Editable":
        """Some of the texts, on a device."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[chosen.to(tensor.device)].to(device)

        positions, elsewhere = pick(self.positions), pick(self.elsewhere)
        assert positions is not None and elsewhere is not None
        return Editable(
            {name: tensor[chosen].to(device) for name, tensor in self.inputs.items()},
            positions,
            pick(self.source),
            elsewhere,
            pick(self.answers),
            pick(self.keys),
        )


@dataclass(frozen=True)
class Run:
    """One edit of some texts.

    Attributes:
        edit: at the strength wanted.
        target: class to write, (n,).
        partners: what a method that patches writes, (n, d).
    """

    edit: Baseline
    target: Tensor
    partners: Tensor


@dataclass(frozen=True)
class Effects:
    """What an edit did, one entry a text, on the CPU.

    Attributes:
        columns: (n,) float64 each. ``distance`` and ``euclidean`` of the edit; ``divergence``,
            KL(clean ‖ edited) of the next token elsewhere in nats, and ``rest``, the part of it
            that is not about the answers; ``logit_difference`` where there are answers;
            ``attention``, the change of END→IO less END→S1, where heads were watched. Of the clean
            run ``said_elsewhere`` too, the probability of the answers elsewhere.
        activations: at the edited token after the edit, (n, d) float32.
    """

    columns: dict[str, Tensor]
    activations: Tensor
