"""Edits of a probe's activations in few operations: on the CPU, where nothing is differentiated.

The same algorithm, floors, statuses and certificate as :mod:`~.problem` and :mod:`~.reach`, one
example after another: in one call where they are compiled (:mod:`~.native`), else, of a few
examples, in numpy.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrqp_torch.errors import check_values, in_transforms, readable
from lrqp_torch.qp import fused, native
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.pivots import solve_alone
from lrqp_torch.qp.reach import FINE, MAX_ROUNDS, Realise, at
from lrqp_torch.qp.solution import Solution, Status

# So few examples are taken in numpy; and in float64 throughout, which takes fewer operations.
FEW = 64


def serves(
    x: Tensor, floor: Tensor | OddsRule, geometry: ProbeGeometry, realise: Realise | None
) -> bool:
    """Whether a batch can be solved here."""
    if not readable(x) or in_transforms():
        return False
    if native.library() is None:
        if x.shape[0] > FEW:
            return False
    elif x.dtype not in native.KINDS or not (realise is None or _places(realise, x)):
        return False
    given = floor.log_odds if isinstance(floor, OddsRule) else floor
    if torch.is_grad_enabled() and (
        x.requires_grad
        or given.requires_grad
        or geometry.steering.requires_grad
        or geometry.bias.requires_grad
    ):
        return False
    # In forward mode any of them may carry a derivative.
    forward = torch.autograd.forward_ad._current_level >= 0
    return given.device.type == geometry.steering.device.type == "cpu" and not forward


def _places(realise: Realise, x: Tensor) -> bool:
    """Whether it says how it puts activations in place, in their own dtype."""
    if not fused.places(realise) or realise.dtype != x.dtype:
        return False
    base = realise.base
    return base is None or (base.dtype == x.dtype and readable(base))


def solve(
    x: Tensor,
    target: Tensor,
    floor: Tensor | OddsRule,
    geometry: ProbeGeometry,
    realise: Realise | None,
    tolerance: float,
) -> Solution | None:
    """The least edits, read back; None where rounding leaves some short of it for many rounds.

    Args:
        x: activations, (B, d).
        target: t, (B,) int64.
        floor: log α, (B,) or (B, K−1) float64, or a rule.
        geometry: probe and metric.
        realise: what the model will hold; default x' in x's dtype.
        tolerance: on the residual of an accurate solve.

    Raises:
        TargetError: a target out of range.
        NonFiniteError: NaN or infinity in activations or floors.
    """
    if native.library() is not None:
        return _in_c(x, target, floor, geometry, realise, tolerance)
    geometry.check(target, x.shape[0])
    # Autocast would take products in half precision.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _in_numpy(x.detach(), target, floor, geometry, realise, tolerance)


def _in_c(
    x: Tensor,
    target: Tensor,
    floor: Tensor | OddsRule,
    geometry: ProbeGeometry,
    placing: Any,
    tolerance: float,
) -> Solution:
    """All of it in one call."""
    batch, m, like = x.shape[0], geometry.n_constraints, geometry.bias
    x, target = native.rows_of(x), target.contiguous()
    numbers, multipliers = like.new_empty(6, batch), like.new_empty(batch, m)
    result, status = x.new_empty(x.shape), target.new_empty(batch)
    columns = numbers.unbind(0)
    task = native.Task(batch, 1, target.data_ptr(), max_pivots=20 * m + 50, rounds=MAX_ROUNDS)
    if isinstance(floor, OddsRule):
        floors, source = columns[3], floor.source
        task.ruled, task.log_odds, task.mirror = 1, float(floor.log_odds), floor.mirror
        if source is not None:
            source = source.contiguous()
            task.source = source.data_ptr()
    elif floor.ndim == 1:
        floors = columns[3].copy_(floor)
    else:
        floors, task.each = floor.detach().contiguous(), m
    if placing is not None and placing.base is not None:
        base = native.rows_of(placing.base.detach())
        task.base, task.base_stride, task.scale = base.data_ptr(), base.stride(0), placing.scale
    task.floor, task.multipliers = floors.data_ptr(), multipliers.data_ptr()
    task.numbers, task.status = numbers.data_ptr(), status.data_ptr()
    task.x, task.result = x.data_ptr(), result.data_ptr()
    task.kind, task.stride = native.KINDS[x.dtype], x.stride(0)
    task.epsilon = epsilon = torch.finfo(x.dtype).eps
    task.advance, task.tolerance = 2 * epsilon if epsilon < FINE else 0.0, tolerance
    outcome = native.solve(geometry.shared, task)
    if outcome == -2:
        geometry.check(target, batch)
    if outcome:
        check_values(x, columns[4], floors)
    return _solution(result, multipliers, columns, floors, status)


def _solution(
    result: Tensor,
    multipliers: Tensor,
    columns: tuple[Tensor, ...],
    floors: Tensor,
    status: Tensor,
) -> Solution:
    residual, squared, moved, _, before, after = columns
    active = multipliers > 0
    lengths = squared, moved
    return Solution(result, multipliers, active, *lengths, floors, before, after, residual, status)


def _in_numpy(
    x: Tensor,
    target: Tensor,
    floor: Tensor | OddsRule,
    geometry: ProbeGeometry,
    realise: Realise | None,
    tolerance: float,
) -> Solution | None:
    """A few examples, in float64 throughout."""
    dtype, wide = x.dtype, x.double()
    epsilon = torch.finfo(dtype).eps
    work = _Work(geometry, geometry.read(wide), target, floor, epsilon, wide.norm(dim=-1))
    work.solve(None)
    edited = geometry.add(wide, work.coefficients)
    result = edited if edited.dtype == dtype else edited.to(dtype)
    part, rows, rounds = result, None, 0
    while True:
        held = part.double() if realise is None else at(realise(edited.double()), rows)
        fell, stay = work.judge(geometry.read(held), rows, tolerance, rounds + 1)
        if len(stay) and not rounds:
            result.index_copy_(0, stay, x[stay])
        if not len(fell):
            if rows is None:
                break
            # All together once more, since a product rounds by what it is computed with.
            part, rows = result, None
            continue
        rounds += 1
        if rounds > MAX_ROUNDS - 2:
            return None
        rows = fell
        work.solve(rows)
        part = geometry.add(wide[rows], work.coefficients[rows])
        if realise is not None:
            edited.index_copy_(0, rows, part)
        part = part.to(dtype)
        result.index_copy_(0, rows, part)
    columns = work.numbers.T.unbind(0)
    if bool((work.status == Status.INVALID).any()):
        check_values(x, columns[4], work.floors)
    return _solution(result, work.multipliers, columns, work.floors, work.status)


class _Work:
    """The numbers of a few examples while they are solved, one after another.

    Attributes:
        multipliers, numbers, status: as dual.c has them.
        coefficients: c of x' = x + c (WΣ), (B, R).
        raised: how far above the floors is aimed, (B, m).
    """

    def __init__(
        self,
        geometry: ProbeGeometry,
        readings: Tensor,
        target: Tensor,
        floor: Tensor | OddsRule,
        epsilon: float,
        size: Tensor,
    ) -> None:
        batch, m = len(readings), geometry.n_constraints
        self.geometry, self.readings, self.target = geometry, readings, target
        self.size, self.epsilon = size, epsilon
        self.floors = floor(self._margins(readings, None)) if isinstance(floor, OddsRule) else floor
        self.raised, self.multipliers = readings.new_zeros(batch, m), readings.new_empty(batch, m)
        self.coefficients, self.numbers = torch.empty_like(readings), readings.new_empty(batch, 6)
        self.status = target.new_empty(batch)
        self.squared, self.noise, self.length = (
            part.numpy() for part in (geometry.squared, geometry.noise, geometry.length)
        )
        self.gram = None if geometry.gram is None else geometry.gram[0].numpy()
        self.open = np.zeros(batch, dtype=bool)
        self.columns = self.floors.numpy().reshape(batch, 1 if self.floors.ndim == 1 else m)

    def _margins(self, readings: Tensor, rows: Tensor | None) -> Tensor:
        return self.geometry.differences(readings, at(self.target, rows))

    def solve(self, rows: Tensor | None) -> None:
        """Solve all; or again some, for what they are to be raised by."""
        margins = self._margins(self.readings, None).numpy()
        raised, multipliers = self.raised.numpy(), self.multipliers.numpy()
        coefficients, numbers = self.coefficients.numpy(), self.numbers.numpy()
        unit, status = float(self.geometry.stretch[1]), self.status.numpy()
        stretch = self.geometry.stretch[0].numpy()
        chosen = range(len(margins)) if rows is None else rows.tolist()
        for b, t in zip(chosen, at(self.target, rows).tolist(), strict=True):
            missing = self.columns[b] - margins[b]
            others = np.delete(np.arange(len(self.squared)), t)
            least = margins[b].min()
            if rows is None:
                numbers[b] = 0, 0, 0, self.columns[b, 0], least, least
                multipliers[b] = coefficients[b] = 0
                if self.epsilon < FINE:
                    advance = self.length[t, others] * float(self.size[b]) + missing.clip(0)
                    raised[b] = 2 * self.epsilon * advance
            valid = bool(np.isfinite(missing.sum()))
            status[b] = Status.SATISFIED if valid else Status.INVALID
            self.open[b] = False
            if not valid or missing.max() <= 0:
                continue
            gap = self.columns[b] + raised[b] - margins[b]
            own, noise = self.squared[t, others], self.noise[t, others]
            gram = None if self.gram is None else self.gram[t]
            found = solve_alone(self.squared, others, gram, own, noise, gap)
            if found is None:
                status[b] = Status.INFEASIBLE
                continue
            self.open[b] = True
            held, values, residual, grown = found
            classes = others[held]
            multipliers[b] = 0
            multipliers[b, held] = values
            if coefficients.shape[1] == 1:
                coefficients[b] = multipliers[b] * (1 - 2 * t)
            else:
                coefficients[b, others] = -multipliers[b]
                coefficients[b, t] = values.sum()
            one, far = values * unit, stretch[t, classes]
            pairs = far[:, None] + far - stretch[np.ix_(classes, classes)]
            numbers[b, :3] = residual, grown, one @ pairs @ one / 2

    def judge(
        self, after: Tensor, rows: Tensor | None, tolerance: float, number: int
    ) -> tuple[Tensor, Tensor]:
        """Judge edits by what is read of them: which fell short, and which stay as they are."""
        numbers, status, raised = (t.numpy() for t in (self.numbers, self.status, self.raised))
        chosen = np.arange(len(self.target)) if rows is None else rows.numpy()
        seen = self._margins(after, rows).numpy()
        opened, floors = self.open[chosen], self.columns[chosen]
        sound, short = np.isfinite(seen.sum(-1)), np.maximum(floors - seen, 0)
        reached = (seen >= floors).all(-1)
        accurate = sound & reached & (numbers[chosen, 0] <= tolerance)
        edited = chosen[opened]
        status[edited] = np.where(accurate, int(Status.SOLVED), int(Status.INACCURATE))[opened]
        numbers[edited, 5] = seen.min(-1)[opened]
        again = opened & sound & ~reached
        for b, missing in zip(chosen[again], short[again], strict=True):
            nudge = number * self.epsilon * float(self.size[b]) / self.geometry.width**0.5
            length = np.delete(self.length[self.target[b]], int(self.target[b]))
            raised[b] += np.where(missing > 0, 2 * missing + nudge * length, 0)
        return torch.from_numpy(chosen[again]), torch.from_numpy(chosen[~opened])
