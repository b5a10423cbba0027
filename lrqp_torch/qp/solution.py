"""What a solve returns: the edited activations and the certificate that they are right."""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Self

import torch
from torch import Tensor


class Status(IntEnum):
    """Outcome of one example's quadratic program."""

    SATISFIED = 0
    """The odds already reached α; the activation is unchanged, bit for bit."""
    SOLVED = 1
    """Edited; the KKT conditions hold and the odds read back reach α."""
    INFEASIBLE = 2
    """No activation reaches the target (say, two classes with equal weights); unchanged."""
    INACCURATE = 3
    """The KKT residual is large, or the odds read back fall short of α."""


@dataclass(frozen=True, repr=False)
class Solution:
    """Edited activations of a batch, and what the edit did to each.

    Attributes:
        x_new: edited activations in the dtype of the input, (B, d).
        multipliers: λ of the constraints z_t − z_ℓ ≥ log α, other classes ℓ ascending, (B, K−1).
        active: constraints that bind, (B, K−1) bool.
        distance: √((x'−x)ᵀ Σ⁻¹ (x'−x)), (B,).
        euclidean: ‖x' − x‖₂ in the units of the stream, (B,).
        floor: log α that was asked for, (B,).
        log_odds_before: min over ℓ of z_t − z_ℓ at x, (B,): the log odds of the target against
            its strongest rival.
        log_odds_after: the same, read back from the realised activation, (B,).
        kkt_residual: largest scaled violation of the optimality conditions, (B,).
        status: :class:`Status` of each example, (B,) integer.
    """

    x_new: Tensor
    multipliers: Tensor
    active: Tensor
    distance: Tensor
    euclidean: Tensor
    floor: Tensor
    log_odds_before: Tensor
    log_odds_after: Tensor
    kkt_residual: Tensor
    status: Tensor

    def __repr__(self) -> str:
        counts = {kind.name.lower(): int((self.status == kind).sum()) for kind in Status}
        kinds = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"Solution({len(self.status)} activations: {kinds or 'none'})"

    def revert(self, failed: Tensor, x: Tensor) -> Self:
        """The same solution with the examples in ``failed``, (B,) bool, left as they were in x."""

        def zero(values: Tensor) -> Tensor:
            return torch.where(failed if values.ndim == 1 else failed.unsqueeze(-1), 0, values)

        return replace(
            self,
            x_new=torch.where(failed.unsqueeze(-1), x, self.x_new),
            multipliers=zero(self.multipliers),
            active=self.active & ~failed.unsqueeze(-1),
            distance=zero(self.distance),
            euclidean=zero(self.euclidean),
            log_odds_after=torch.where(failed, self.log_odds_before, self.log_odds_after),
        )
