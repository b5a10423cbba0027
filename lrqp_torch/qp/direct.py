"""Edits of a probe's activations in one call of :mod:`~.native`, one example after another.

On the CPU, where nothing is differentiated: the same algorithm, floors, statuses and certificate as
:mod:`~.problem` and :mod:`~.reach`.
"""

from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import check_values, in_transforms, readable
from lrqp_torch.qp import fused, native
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.implicit import Ended
from lrqp_torch.qp.reach import MAX_ROUNDS, Realise, advance
from lrqp_torch.qp.solution import Solution
from lrqp_torch.qp.solvers import ActiveSet


def serves(
    x: Tensor, floor: Tensor | OddsRule | None, geometry: ProbeGeometry, realise: Realise | None
) -> bool:
    """Whether a batch can be solved here, for such floors or any."""
    if not readable(x) or in_transforms() or native.library() is None:
        return False
    if x.dtype not in native.KINDS or not (realise is None or _places(realise, x)):
        return False
    # In forward mode any of them may carry a derivative.
    if torch.autograd.forward_ad._current_level >= 0 or not readable(geometry.steering):
        return False
    given = floor.log_odds if isinstance(floor, OddsRule) else floor
    return given is None or readable(given)


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
    placing: Any,
    *,
    repeats: bool = False,
) -> tuple[Solution, Ended | None]:
    """The least edits, read back, and where the solves ended.

    Args:
        x: activations, (B, d).
        target: t, (B,) int64.
        floor: log α, (B,) or (B, K−1) float64, or a rule.
        geometry: probe and metric.
        placing: what the model will hold; default x' in x's dtype.
        repeats: whether where they ended is wanted, for a derivative.

    Raises:
        TargetError: a target out of range.
        NonFiniteError: NaN or infinity in activations or floors.
    """
    batch, m = x.shape[0], geometry.n_constraints
    x, target, like = native.rows_of(x.detach()), target.contiguous(), geometry.bias.detach()
    numbers, multipliers = like.new_empty(6, batch), like.new_empty(batch, m)
    result, status = x.new_empty(x.shape), target.new_empty(batch)
    columns = numbers.unbind(0)
    task = native.Task(batch, 1, target.data_ptr(), max_pivots=20 * m + 50, rounds=MAX_ROUNDS)
    if isinstance(floor, OddsRule):
        floors, source = columns[3], floor.source
        task.ruled, task.log_odds, task.mirror = 1, floor.log_odds.item(), floor.mirror
        if source is not None:
            source = source.contiguous()
            task.source = source.data_ptr()
    elif floor.ndim == 1:
        floors = columns[3].copy_(floor.detach())
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
    task.advance, task.tolerance = advance(epsilon, x.shape[1]), ActiveSet.tolerance
    aims, room, ended = multipliers, min(m, native.FIRST_SLOTS), None
    if repeats:
        aims = like.new_empty(batch, m)
        task.aims = aims.data_ptr()
    while True:
        if repeats:
            index, inverse = target.new_empty(batch, room), like.new_empty(batch, room, room)
            task.slots, task.index, task.inverse = room, index.data_ptr(), inverse.data_ptr()
        outcome = native.solve(geometry.shared, task)
        if not repeats or outcome // 2 <= room:
            break
        room = outcome // 2
    if repeats:
        ended = Ended(index, index < m, inverse, aims)
    if outcome == -2:
        geometry.check(target, batch)
    if outcome % 2:
        check_values(x, columns[4], floors)
    residual, squared, moved, _, before, after = columns
    parts = multipliers > 0, squared, moved, floors, before, after, residual, status
    return Solution(result, multipliers, *parts), ended
