"""What a solve returns: the edited activations and the certificate that they are right."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Self

import torch
from torch import Tensor

# Mλ of constraints of unit length rounds by no more than this share of Σλ.
ROUNDING = 4 * torch.finfo(torch.float64).eps


class Status(IntEnum):
    """Outcome of one example's quadratic program."""

    SATISFIED = 0
    """The odds already reached α; the activation is unchanged, bit for bit."""
    SOLVED = 1
    """Edited; the odds read back reach α, and the KKT conditions hold with what was read back: by
    duality no edit is shorter by more than 0.1 % and what the stream's dtype rounds."""
    INFEASIBLE = 2
    """No activation reaches the floors asked for, but for rounding (say, two classes with equal
    weights); unchanged."""
    INACCURATE = 3
    """The KKT residual is large, or the odds read back fall short of α."""
    INVALID = 4
    """NaN or infinity in the activation or its floor; unchanged. Raised at once on the CPU."""


@dataclass(frozen=True, repr=False)
class Solution:
    """Edited activations of a batch, and what the edit did to each.

    What is stored are plain tensors, taken when it was solved; the lengths follow from them, so
    that nothing changes when x or ``x_new`` is written over.

    Attributes:
        x_new: edited activations in the dtype of the input, (B, d).
        multipliers: λ of the constraints z_t − z_ℓ ≥ log α, other classes ℓ ascending, (B, K−1).
        active: constraints that bind, (B, K−1) bool.
        squared_distance: λᵀMλ = (x'−x)ᵀ Σ⁻¹ (x'−x), 0 where nothing is edited, (B,).
        squared_euclidean: ‖ΣAᵀλ‖² = ‖x' − x‖² before x' is rounded, (B,).
        floor: log α that was asked for, (B,), or (B, m) where each constraint has its own.
        log_odds_before: min over ℓ of z_t − z_ℓ at x, (B,): the log odds of the target against
            its strongest rival.
        log_odds_after: the same, read back from the realised activation, (B,).
        kkt_residual: largest scaled violation of the optimality conditions, (B,); those of the last
            solve, and of what was read back beyond what SOLVED allows.
        status: :class:`Status` of each example, (B,) integer.
    """

    x_new: Tensor
    multipliers: Tensor
    active: Tensor
    squared_distance: Tensor
    squared_euclidean: Tensor
    floor: Tensor
    log_odds_before: Tensor
    log_odds_after: Tensor
    kkt_residual: Tensor
    status: Tensor

    @property
    def distance(self) -> Tensor:
        """√((x'−x)ᵀ Σ⁻¹ (x'−x)), (B,); where nothing is edited it is 0 with gradient 0."""
        return _root(self.squared_distance)

    @property
    def euclidean(self) -> Tensor:
        """‖x' − x‖₂ in the units of the stream, (B,)."""
        return _root(self.squared_euclidean)

    def __repr__(self) -> str:
        return f"Solution({len(self.status)} activations: {in_words(self.status) or 'none'})"

    def _repr_html_(self) -> str:
        from lrqp_torch.plot.cards import card

        known = self.floor.ndim == 1
        return card(
            "Solution",
            {"activations": len(self.status), "status": in_words(self.status)}
            | outcome(self.log_odds_before, self.log_odds_after, self.floor if known else None),
            self.distance.detach().cpu().double().tolist(),
        )

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
            squared_distance=zero(self.squared_distance),
            squared_euclidean=zero(self.squared_euclidean),
            log_odds_after=torch.where(
                failed.reshape(-1, *[1] * (self.log_odds_after.ndim - 1)),
                self.log_odds_before,
                self.log_odds_after,
            ),
        )


def in_words(status: Tensor) -> str:
    """How many activations have each status: ``"60 solved, 4 satisfied"``."""
    counts = {kind.name.lower(): int((status == kind).sum()) for kind in Status}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def outcome(before: Tensor, after: Tensor, floor: Tensor | None) -> dict[str, object]:
    """What edits did to the odds, as a notebook shows it: name to value, of log odds (B,)."""
    if not len(after):
        return {}
    margin = None if floor is None else (after - floor).detach().double()
    medians = [float(odds.detach().double().median()) for odds in (before, after)]
    return {
        "log odds of the target": f"{medians[0]:+.2f} before, {medians[1]:+.2f} after (medians)",
        "worst margin over the odds asked": None
        if margin is None or bool(margin.isnan().all())
        else f"{float(margin.nan_to_num(torch.inf).min()):.1e} nats",
    }


def _root(squared: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0 and below, where rounding may leave a square."""
    some = squared > 0
    return torch.where(some, torch.where(some, squared, 1.0).sqrt(), 0.0 * squared.detach())


def join(parts: Sequence[Solution]) -> Solution:
    """Solutions of consecutive parts of a batch as one."""
    names = [field.name for field in fields(Solution)]
    return Solution(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


def statuses(
    reachable: Tensor, edit: Tensor, accurate: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The :class:`Status` of each example, (B,) integer, from bool (B,)."""
    edited = torch.where(accurate, int(Status.SOLVED), int(Status.INACCURATE))
    status = torch.where(edit, edited, int(Status.SATISFIED))
    status = torch.where(reachable, status, int(Status.INFEASIBLE))
    return status if valid is None else torch.where(valid, status, int(Status.INVALID))


def kkt_residual(
    diagonal: Tensor, grown: Tensor, gap: Tensor, multipliers: Tensor, noise: Tensor
) -> Tensor:
    """Largest violation of the KKT conditions of min ½ λᵀMλ − gᵀλ over λ ≥ 0, per example.

    The conditions are λ ≥ 0, s = Mλ − g ≥ 0 and λᵀs = 0. Constraints are measured in units of their
    length √M_ii, and those without length, which do not depend on the activation, left out. s is
    relative to the largest gap and its own, λ to the largest multiplier, and λᵀs to λᵀMλ, the
    square of the distance: by duality that is the share of it that an edit could at most be
    shorter. So no scale of M or g, nor a constraint that holds by far, hides a violation. What Mλ
    rounds by, a share of Σλ, is none: where near-equal constraints bind their terms cancel.

    Args:
        diagonal: of M, (B, m).
        grown: M λ, (B, m).
        gap: g, (B, m).
        multipliers: λ, (B, m).
        noise: rounding error of M's diagonal, (B, m): a length at or below it is none.
    """
    scale = unit_scale(diagonal, noise)
    unit, slack = gap * scale, grown - gap
    tiny = torch.finfo(gap.dtype).tiny
    largest = unit.amax(-1, keepdim=True).clamp_min(tiny)
    scaled = multipliers * diagonal * scale
    rounding = ROUNDING * scaled.abs().sum(-1, keepdim=True)
    short = ((-slack * scale - rounding) / (largest + unit.abs())).amax(-1)
    negative = -scaled.amin(-1) / scaled.amax(-1).clamp_min(tiny)
    unbalanced = (multipliers * slack).sum(-1).abs() - rounding.squeeze(-1).square() / ROUNDING
    unbalanced = unbalanced / (multipliers * grown).sum(-1).abs().clamp_min(tiny)
    return torch.maximum(torch.maximum(short, negative), unbalanced).clamp_min(0.0)


def unit_scale(diagonal: Tensor, noise: Tensor) -> Tensor:
    """1/√M_ii, which gives a constraint unit length, and 0 for one without length, (..., m)."""
    root = diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).rsqrt()
    return torch.where(diagonal <= noise, 0.0, root)
