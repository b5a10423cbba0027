"""How high a solve must aim so that the odds are still reached once x' is rounded and stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Half an ulp in each coordinate is nothing in the finer dtypes and may be taken off in advance; in
# half precision it would be a large part of the edit, so there only what turns out to be missing is
# added, a few times over.
FINE = 1e-5
# Rounds of solving and reading back. Where values can be looked at, until nothing is missing: three
# or four are usual in half precision, and the bound only guards against a loop without end.
MAX_ROUNDS = 24
# Where they cannot (a CUDA graph, a transform), always so many; the last aims by the proven bound.
BLIND_ROUNDS_FINE, BLIND_ROUNDS_COARSE = 3, 5


@dataclass(frozen=True)
class Headroom:
    """What rounding to a dtype can take off the margins of some activations.

    Attributes:
        precision: ε of the dtype.
        length: ‖a‖ of each constraint, (B, m).
        size: ‖x‖, (B, 1).
        width: d.
    """

    precision: float
    length: Tensor
    size: Tensor
    width: int

    @property
    def fine(self) -> bool:
        """Whether the dtype is float32 or finer."""
        return self.precision < FINE

    @property
    def blind_rounds(self) -> int:
        """How many rounds to make where values cannot be looked at."""
        return BLIND_ROUNDS_FINE if self.fine else BLIND_ROUNDS_COARSE

    def in_advance(self, floor: Tensor) -> Tensor:
        """How much to aim above the floors, (B, 1) or (B, m), in the first round, (B, m).

        Half an ulp in each coordinate moves a margin by at most ½ ε ‖a‖ ‖x‖.
        """
        if not self.fine:
            return torch.zeros_like(self.length)
        return 2 * self.precision * (self.length * self.size + floor.abs())

    def after_missing(self, raised: Tensor, short: Tensor, attempt: int) -> Tensor:
        """How much to aim above them after a round that left margins ``short``, (B, m)."""
        # Less than about one coordinate's rounding error would leave the rounded x' as it was.
        nudge = self.precision * self.length * self.size / self.width**0.5
        return raised + torch.where(short > 0, 2 * short + (attempt + 1) * nudge, 0.0)

    def proven(self, raised: Tensor, short: Tensor, edited: Tensor, held: Tensor) -> Tensor:
        """The same by a bound on the rounding of x' itself, which the next round cannot miss.

        ‖a‖ ε ‖x'‖ is twice the bound for a rounding to nearest. Where the stream holds x' as a
        sum, what it rounds by is seen in ``held``, and four times that covers each half ulp. All
        constraints of an example aim higher, because raising one moves the others; and by some
        times what is missing from any, which may be rounding of the solve and not of x'.
        """
        size = torch.linalg.vector_norm(edited, dim=-1, keepdim=True)
        error = torch.linalg.vector_norm(held.double() - edited, dim=-1, keepdim=True)
        enough = self.length * torch.maximum(self.precision * size, 4 * error)
        worst = short.amax(-1, keepdim=True)
        return torch.where(worst > 0, torch.maximum(raised + 4 * worst, enough), raised)
