"""The steps of the dual active-set method, for a batch together and for single problems.

Problems are in units: constraints have length 1 (M_ii = 1), or none, and of the gaps that are
positive the largest is 1. Each has one column more than constraints, which stands for no
constraint: a slot of the active set that is empty holds that one.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from lrqp_torch.qp import fused
from lrqp_torch.qp.constraints import other_classes
from lrqp_torch.qp.implicit import matvec
from lrqp_torch.qp.solution import ROUNDING, unit_scale

# A Schur complement below this share of its diagonal entry means that the entering constraint
# depends linearly on the active ones. Well above the rounding of a pivot (1e-16), well below
# the 1e-10 at which distinct but nearly parallel constraints still solve accurately.
DEPENDENT = 1e-13
# Below this one, and once one below it has entered, what earlier exchanges left of rounding in the
# inverse is taken out of it first.
SUSPECT = 1e-6
# A constraint counts as satisfied within this share of the largest gap and its own.
SATISFIED = 1e-13
# Rates below this share of 1 + the largest are rounding, and do not block.
NO_DIRECTION = 1e-13
# A ray u with M u = 0 proves that there is no solution where gᵀu is above this share of the terms
# that it is made of.
PROVEN = 1e-9
EPSILON = ROUNDING
# The rounding error of M's diagonal is a bound, of which so much is seen.
NOISE = 1 / 16
# Slots for active constraints at first; more are added where a problem needs them.
FIRST_SLOTS = 4
# Of so few problems each leaves as soon as it is done.
FEW = 24
# Blocks above some 16 MB are slower per example: the allocator returns such buffers each time.
CHUNK_NUMBERS = 2_000_000


class _Problems(ABC):
    """M of a batch of problems in units.

    Attributes:
        scale: 1/√M_ii of each column before it was given its length, (n, N + 1); 0: no constraint.
        error: scale times the rounding error of M_ii, (n, N + 1).
    """

    scale: Tensor
    error: Tensor

    @abstractmethod
    def widen(self, values: Tensor, fill: float) -> Tensor:
        """Values of constraints, (n, m), in the columns of the problems, (n, N + 1)."""

    @abstractmethod
    def take(self, rows: Tensor) -> Self:
        """Some of the problems."""

    @abstractmethod
    def block(self, left: Tensor, right: Tensor) -> Tensor:
        """M between columns, (n, a) and (n, b): (n, a, b)."""

    @abstractmethod
    def apply(self, columns: Tensor, weights: Tensor) -> Tensor:
        """M u for all columns, (n, N + 1), of u with some weights at some columns, (n, c)."""

    def rounding(self, columns: Tensor, rates: Tensor) -> Tensor:
        """What rounding of M may add to ‖Σ r_i a_i‖², (n, 1)."""
        parts = (part.gather(1, columns).T for part in (self.scale, self.error))
        return rounding(rates.abs().T, *parts).unsqueeze(1)


class _Dense(_Problems):
    """M of each problem as it is, (n, m, m)."""

    def __init__(self, unit: Tensor, scale: Tensor, error: Tensor) -> None:
        self.unit, self.scale, self.error = unit, scale, error

    @classmethod
    def of(cls, gram: Tensor, scale: Tensor, error: Tensor) -> Self:
        unit = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        pad = torch.nn.functional.pad
        return cls(pad(unit, (0, 1, 0, 1)), pad(scale, (0, 1)), pad(error, (0, 1)))

    def widen(self, values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, 1), value=fill)

    def take(self, rows: Tensor) -> Self:
        return type(self)(self.unit[rows], self.scale[rows], self.error[rows])

    def block(self, left: Tensor, right: Tensor) -> Tensor:
        rows = self.unit.gather(1, left.unsqueeze(2).expand(-1, -1, self.unit.shape[2]))
        return rows.gather(2, right.unsqueeze(1).expand(-1, left.shape[1], -1))

    def apply(self, columns: Tensor, weights: Tensor) -> Tensor:
        return matvec(self.unit, torch.zeros_like(self.scale).scatter_add_(1, columns, weights))


class _Classes(_Problems):
    """M in squared distances D of classes, (K, K); a column is a class, the target's is empty."""

    def __init__(
        self, squared: Tensor, target: Tensor, own: Tensor, scale: Tensor, error: Tensor
    ) -> None:
        self.squared, self.target, self.own = squared, target, own
        self.scale, self.error = scale, error

    @classmethod
    def of(cls, squared: Tensor, target: Tensor, scale: Tensor, error: Tensor) -> Self:
        squared = torch.nn.functional.pad(squared, (0, 1, 0, 1))
        problems = cls(squared, target.unsqueeze(1), squared[target], scale, error)
        problems.scale, problems.error = (problems.widen(part, 0.0) for part in (scale, error))
        return problems

    def widen(self, values: Tensor, fill: float) -> Tensor:
        n_classes = len(self.squared) - 1
        other = other_classes(self.target.squeeze(1), n_classes, values.device)
        return values.new_full((len(values), n_classes + 1), fill).scatter_(1, other, values)

    def take(self, rows: Tensor) -> Self:
        parts = (self.target, self.own, self.scale, self.error)
        return type(self)(self.squared, *(part[rows] for part in parts))

    def block(self, left: Tensor, right: Tensor) -> Tensor:
        places = left.unsqueeze(2) * len(self.squared) + right.unsqueeze(1)
        one, two = self.own.gather(1, left), self.own.gather(1, right)
        grown = one.unsqueeze(2) + two.unsqueeze(1) - self.squared.take(places)
        one, two = self.scale.gather(1, left), self.scale.gather(1, right)
        return grown * (one.unsqueeze(2) * (two.unsqueeze(1) / 2))

    def apply(self, columns: Tensor, weights: Tensor) -> Tensor:
        weights = weights * self.scale.gather(1, columns)
        every = torch.zeros_like(self.scale).scatter_add_(1, columns, weights)
        towards = every @ self.squared
        grown = torch.addcmul(
            towards.gather(1, self.target) - towards, self.own, every.sum(1, True)
        )
        return grown.mul_(self.scale).mul_(0.5)


class _Results:
    """Active sets of finished problems, put together at the end.

    Attributes:
        feasible: False where a ray proved that there is no solution, (n,) bool.
        converged: False where the steps ran out, (n,) bool.
    """

    def __init__(self, problems: int, none: int, like: Tensor) -> None:
        self.none, self.like = none, like
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.feasible = torch.ones(problems, dtype=torch.bool, device=like.device)
        self.converged = torch.zeros_like(self.feasible)

    def put(self, at: Tensor, columns: Tensor, inverse: Tensor) -> None:
        """Columns (k, c) and inverse (k, c, c) of some problems."""
        self.parts.append((at, columns, inverse))

    def assembled(self, slots: int) -> tuple[Tensor, Tensor]:
        """Those of all, (n, c) and (n, c, c), with ``slots`` slots or as many as are needed."""
        slots = slots or max((part[1].shape[1] for part in self.parts), default=1)
        batch = len(self.feasible)
        columns = torch.full((batch, slots), self.none, device=self.like.device)
        inverse = self.like.new_zeros(batch, slots, slots)
        for at, own, block in self.parts:
            n = own.shape[1]
            columns[at, :n] = own
            inverse[at, :n, :n] = block
        return columns, inverse


def find_active_sets(
    matrix: Tensor, noise: Tensor, target: Tensor, gap: Tensor, slots: int, max_pivots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The constraints that bind in each problem, and what proves it.

    Args:
        matrix: M of each problem, (n, m, m); or squared distances of classes, (K, K).
        noise: rounding error of M's diagonal, (n, m); or of the distances, (K, K).
        target: (n,), where there are classes.
        gap: g, (n, m).
        slots: c, or 0 for as many as are needed.
        max_pivots: at most.

    Returns:
        The constraints (n, c), m where a slot is empty; M_AA⁻¹ of these, (n, c, c); feasible and
        converged, (n,).
    """
    m, classes = gap.shape[1], matrix.ndim == 2
    if classes:
        other = other_classes(target, m + 1, gap.device)
        diagonal = matrix.index_select(0, target).gather(1, other)
        noise = noise.index_select(0, target).gather(1, other)
    else:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = unit_scale(diagonal, noise)
    error = scale * noise
    unit, impossible = unit_gap(gap, scale)
    if fused.serves(gap, m + 1):
        if classes:
            among = matrix[other[:, :, None], other[:, None]]
            matrix = (diagonal.unsqueeze(2) + diagonal.unsqueeze(1) - among) / 2
        found = fused.active_sets(matrix, scale, error, unit, max_pivots)
    else:
        found = _in_batches(matrix, target, scale, error, unit, slots, max_pivots)
    columns, inverse, feasible, converged = found
    own = torch.nn.functional.pad(scale, (0, 1)).gather(-1, columns)
    inverse = inverse * own.unsqueeze(-1) * own.unsqueeze(-2)
    return columns, inverse, feasible & ~impossible, converged


def _in_batches(
    matrix: Tensor,
    target: Tensor,
    scale: Tensor,
    error: Tensor,
    unit: Tensor,
    slots: int,
    max_pivots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in torch, for gaps in units; the inverse is in units too."""
    batch, m = unit.shape
    classes, gap = matrix.ndim == 2, unit
    results = _Results(batch, m + classes, gap)
    chunk = max(1, CHUNK_NUMBERS // ((m + 1) * (1 if classes else m + 1)))
    for index in torch.arange(batch, device=gap.device).split(chunk):
        parts = scale[index], error[index]
        problems: _Problems
        if classes:
            problems = _Classes.of(matrix, target[index], *parts)
        else:
            problems = _Dense.of(matrix[index], *parts)
        wide = problems.widen(unit[index], -torch.inf)
        wide[:, -1] = 0.0
        _pivot(problems, index, wide, results, slots, max_pivots)
    columns, inverse = results.assembled(slots)
    if classes:
        columns = columns - (columns > target.unsqueeze(1)).long()
    return columns, inverse, results.feasible, results.converged


def unit_gap(gap: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gaps of constraints of unit length, (B, m), of which the largest is 1 if any is positive.

    A constraint without length does not depend on the activation: it holds already, or never will.
    It comes back as −∞; and so do all of an example that can never be solved, which are returned
    second, (B,).
    """
    empty = scale == 0
    impossible = (empty & (gap > 0)).any(-1)
    unit = torch.where(empty | impossible.unsqueeze(-1), -torch.inf, gap * scale)
    largest = unit.amax(-1, keepdim=True)
    return torch.where(largest > 0, unit / largest, unit), impossible


def _pivot(
    problems: _Problems,
    index: Tensor,
    gap: Tensor,
    results: _Results,
    slots: int,
    max_pivots: int,
) -> None:
    """The loop: each problem takes one step at a time, and leaves when it is done.

    Args:
        problems: M.
        index: which problems they are, (n,).
        gap: of each column, (n, N + 1); 0 for no constraint.
        results: where they are put.
        slots: at first, or 0.
        max_pivots: at most.
    """
    none, device = gap.shape[1] - 1, gap.device
    slack, tolerance = -gap, _tolerance(gap)
    held = torch.full((len(gap), min(slots or FIRST_SLOTS, none)), none, device=device)
    multipliers = gap.new_zeros(held.shape)
    inverse = gap.new_zeros(*held.shape, held.shape[1])
    entering = torch.zeros(len(gap), 1, dtype=torch.long, device=device)
    share = gap.new_zeros(len(gap), 1)
    blocked = torch.zeros(len(gap), 1, dtype=torch.bool, device=device)
    doubt = blocked
    state = (gap, slack, tolerance, held, multipliers, inverse, entering, share, blocked, doubt)

    for number in range(max_pivots + 1):
        # 1. The entering constraint: the most violated one, or the one whose step was blocked.
        gap, slack, tolerance, held, multipliers, inverse, entering, share, blocked, doubt = state
        worst, violated = (slack + tolerance).min(1, keepdim=True)
        entering = torch.where(blocked, entering, violated)
        done = ~blocked & (worst >= 0)

        # 2. Put finished problems away as soon as they are many, and go on with the rest.
        finished = int(done.sum())
        if 4 * finished >= len(index) or (finished and len(index) <= FEW):
            at = done.squeeze(1).nonzero().squeeze(1)
            results.put(index[at], held[at], inverse[at])
            results.converged[index[at]] = True
            keep = (~done).squeeze(1).nonzero().squeeze(1)
            problems, index = problems.take(keep), index[keep]
            state = (*state[:6], entering, share, blocked, doubt)
            state = tuple(part[keep] for part in state)  # type: ignore[assignment]
            if not len(index):
                break
            gap, slack, tolerance, held, multipliers, inverse, entering, share, blocked, doubt = (
                state
            )
            done = done[keep]
        if number >= held.shape[1] and bool(held.amax(1).min() < none):
            more = min(none, 2 * held.shape[1]) - held.shape[1]
            held = torch.nn.functional.pad(held, (0, more), value=none)
            multipliers = torch.nn.functional.pad(multipliers, (0, more))
            inverse = torch.nn.functional.pad(inverse, (0, more, 0, more))

        # 3. How far it can move: t_full satisfies it, t_block brings a multiplier to zero.
        column = problems.block(held, entering).squeeze(2)
        rate = matvec(inverse, column)
        curvature = 1 - (rate * column).sum(1, keepdim=True)
        suspect = ((curvature < SUSPECT) | doubt) & ~done
        if bool(suspect.any()):
            rows = suspect.squeeze(1).nonzero().squeeze(1)
            rate, curvature = _checked(
                problems.take(rows), rows, held, entering, inverse, column, rate, curvature
            )
        behind = slack.gather(1, entering)
        t_full = torch.where(curvature > DEPENDENT, -behind / curvature, torch.inf)
        least = NO_DIRECTION * (1 + rate.abs().amax(1, keepdim=True))
        blocks = torch.where(rate > least, multipliers / rate, torch.inf)
        t_block, leaving = blocks.min(1, keepdim=True)
        step = torch.where(done, 0.0, torch.minimum(t_full, t_block).clamp_min(0.0))
        endless = torch.isinf(step)
        if bool(endless.any()):
            # No end to the step: a ray of the dual, unless what it gains is rounding.
            sizes = (rate.abs() * tolerance.gather(1, held)).sum(1, keepdim=True)
            sizes = sizes + tolerance.gather(1, entering)
            proven = endless & (-behind > PROVEN / SATISFIED * sizes)
            results.feasible[index[proven.squeeze(1)]] = False
            # Else the constraint is left to whoever reads back, and the problem begins anew.
            gap = torch.where(endless, gap.scatter(1, entering, -torch.inf), gap)
            gap = torch.where(proven, -torch.inf, gap)
            slack, tolerance = torch.where(endless, -gap, slack), _tolerance(gap)
            held = torch.where(endless, none, held)
            multipliers = torch.where(endless, 0.0, multipliers)
            inverse = torch.where(endless.unsqueeze(2), 0.0, inverse)
            share, blocked = torch.where(endless, 0.0, share), blocked & ~endless
            doubt = doubt & ~endless
            done, step = done | endless, torch.where(endless, 0.0, step)

        # 4. Move: active multipliers fall along the column, inactive slacks rise along it.
        multipliers = torch.addcmul(multipliers, rate, step, value=-1).clamp_min_(0.0)
        share = share + step
        ray = torch.cat([-rate, torch.ones_like(step)], 1)
        along = problems.apply(torch.cat([held, entering], 1), ray)
        slack = torch.addcmul(slack, along, step)

        # 5. Exchange the constraint that joins the active set, or the one that leaves it.
        joins = (t_full <= t_block) & ~done
        blocked = ~joins & ~done
        free = (held == none).to(torch.uint8).argmax(1, keepdim=True)
        slot = torch.where(joins, free, leaving)
        own = inverse.gather(1, slot.unsqueeze(2).expand(-1, 1, held.shape[1])).squeeze(1)
        vector = torch.where(joins, rate.scatter(1, slot, -1.0), own)
        weight = torch.where(joins, 1 / curvature, -1 / own.gather(1, slot))
        weight = torch.where(done, 0.0, weight)
        inverse = torch.addcmul(inverse, vector.unsqueeze(2), (vector * weight).unsqueeze(1))
        if bool(blocked.any()):
            rows = blocked.squeeze(1).nonzero().squeeze(1)
            gone = slot.squeeze(1)[rows]
            inverse[rows, gone, :] = 0.0
            inverse[rows, :, gone] = 0.0
        was, mine = held.gather(1, slot), multipliers.gather(1, slot)
        held = held.scatter(1, slot, torch.where(done, was, torch.where(joins, entering, none)))
        mine = torch.where(done, mine, torch.where(joins, share, 0.0))
        multipliers = multipliers.scatter(1, slot, mine)
        slack = slack.scatter(1, held, 0.0)
        share = torch.where(blocked, share, 0.0)
        doubt = doubt | (joins & (curvature < SUSPECT))
        state = (gap, slack, tolerance, held, multipliers, inverse, entering, share, blocked, doubt)
    else:
        results.put(index, state[3], state[5])


def rounding(rates: Tensor, scale: Tensor, error: Tensor) -> Tensor:
    """What rounding of M may add to ‖Σ r_i a_i‖², from |r_i|, 1/√M_ii and the error of M_ii times
    that, each (c, ...): (...).
    """
    terms, errors = (rates * scale).sum(0), (rates * error).sum(0)
    return EPSILON * rates.sum(0).square() + NOISE * terms * errors


def _tolerance(gap: Tensor) -> Tensor:
    return SATISFIED * (1 + gap.abs())


def _checked(
    problems: _Problems,
    rows: Tensor,
    held: Tensor,
    entering: Tensor,
    inverse: Tensor,
    column: Tensor,
    rate: Tensor,
    curvature: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rates and curvatures, those of the problems in ``rows`` without the inverse's rounding."""
    own, right, slots = rate[rows], column[rows], held[rows]
    block = problems.block(slots, slots)
    own = own + matvec(inverse[rows], right - matvec(block, own))
    # ‖a_q − Σ r_i a_i‖² is exact to the second order in what is still wrong with r.
    exact = 1 + (own * (matvec(block, own) - 2 * right)).sum(1, keepdim=True)
    rates = torch.cat([torch.ones_like(exact), own], 1)
    rounding = problems.rounding(torch.cat([entering[rows], slots], 1), rates)
    exact = torch.where(exact > rounding, exact, 0.0)
    return rate.index_copy(0, rows, own), curvature.index_copy(0, rows, exact)
