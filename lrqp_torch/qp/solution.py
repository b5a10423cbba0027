"""What a solve returns: the edited activations and the certificate that they are right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import partial
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
    INVALID = 4
    """NaN or infinity in the activation or its floor; unchanged. Raised at once on the CPU."""


@dataclass(frozen=True, repr=False)
class Solution:
    """Edited activations of a batch, and what the edit did to each.

    Attributes:
        x_new: edited activations in the dtype of the input, (B, d).
        multipliers: λ of the constraints z_t − z_ℓ ≥ log α, other classes ℓ ascending, (B, K−1).
        active: constraints that bind, (B, K−1) bool.
        distance: √((x'−x)ᵀ Σ⁻¹ (x'−x)), (B,).
        euclidean: ‖x' − x‖₂ in the units of the stream, (B,).
        floor: log α that was asked for, (B,), or (B, m) where each constraint has its own.
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

    def invalidate(self, invalid: Tensor, x: Tensor) -> Self:
        """The same with the examples in ``invalid``, (B,) bool, as in x and marked INVALID."""
        reverted = self.revert(invalid, x)
        return replace(reverted, status=torch.where(invalid, int(Status.INVALID), self.status))

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


class DeferredSolution(Solution):
    """A solution of which some attributes are worked out when they are first read."""

    __slots__ = ("_later",)
    _later: Mapping[str, Callable[[], Tensor]]

    def __init__(
        self, now: Mapping[str, Tensor], later: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self.__dict__.update(now)
        object.__setattr__(self, "_later", later)

    def __getattr__(self, name: str) -> Tensor:
        later = object.__getattribute__(self, "_later")
        if name not in later:
            raise AttributeError(name)
        value: Tensor = later[name]()
        self.__dict__[name] = value
        return value


def join(parts: Sequence[Solution]) -> Solution:
    """Solutions of consecutive parts of a batch as one; nothing is worked out before its time."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    names = [field.name for field in fields(Solution)]
    later = [name for name in names if any(name not in vars(part) for part in parts)]
    return DeferredSolution(
        now={name: joined(name) for name in names if name not in later},
        later={name: partial(joined, name) for name in later},
    )


def statuses(
    reachable: Tensor, edit: Tensor, accurate: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The :class:`Status` of each example, (B,) integer, from bool (B,)."""
    edited = torch.where(accurate, int(Status.SOLVED), int(Status.INACCURATE))
    status = torch.where(edit, edited, int(Status.SATISFIED))
    status = torch.where(reachable, status, int(Status.INFEASIBLE))
    return status if valid is None else torch.where(valid, status, int(Status.INVALID))
