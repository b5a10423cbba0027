"""Edits of a probe's activations in one call of :mod:`~.native`, one example after another.

On the CPU, where nothing is differentiated: the same algorithm, floors, statuses and certificate as
:mod:`~.problem` and :mod:`~.reach`.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import check_values, in_transforms, readable
from lrqp_torch.qp import fused, native
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.geometry import ProbeGeometry, Trace
from lrqp_torch.qp.implicit import Ended
from lrqp_torch.qp.reach import MAX_ROUNDS, Realise, advance
from lrqp_torch.qp.solution import Solution
from lrqp_torch.qp.solvers import ActiveSet
from lrqp_torch.qp.stacked import JointSolution, StackedGeometry, StackedRule


def serves(
    x: Tensor,
    floor: Tensor | OddsRule | StackedRule | None,
    geometry: ProbeGeometry | StackedGeometry,
    realise: Realise | None,
) -> bool:
    """Whether a batch can be solved here, for such floors or any."""
    if not readable(x) or in_transforms() or native.library() is None:
        return False
    if x.dtype not in native.KINDS or not (realise is None or _places(realise, x)):
        return False
    # In forward mode any of them may carry a derivative.
    if torch.autograd.forward_ad._current_level >= 0 or not readable(geometry.steering):
        return False
    given = floor.log_odds if isinstance(floor, OddsRule | StackedRule) else floor
    return all(map(readable, (given,) if isinstance(given, Tensor) else given or ()))


def _places(realise: Realise, x: Tensor) -> bool:
    """Whether it says how it puts activations in place, in their own dtype."""
    if not fused.places(realise) or realise.dtype != x.dtype:
        return False
    base = realise.base
    return base is None or (base.dtype == x.dtype and readable(base))


def solve(
    x: Tensor,
    target: Tensor,
    floor: Tensor | OddsRule | StackedRule,
    geometry: ProbeGeometry | StackedGeometry,
    placing: Any,
    *,
    repeats: bool = False,
) -> tuple[Solution, Ended | None]:
    """The least edits, read back, and where the solves ended.

    Args:
        x: activations, (B, d).
        target: t, (B,) int64; of several variables (B, V).
        floor: log α, (B,) or (B, K−1) float64, or a rule; of several variables theirs.
        geometry: probe and metric, or several probes and metric.
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
    odds: Sequence[Tensor] = ()
    if isinstance(floor, OddsRule | StackedRule):
        floors, source = columns[3], floor.source
        floor.told(task)
        if isinstance(floor, StackedRule):
            floors, stacked = like.new_empty(batch, m), like.new_empty(batch, 4, target.shape[1])
            task.odds, odds = stacked.data_ptr(), stacked.unbind(1)
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
        if isinstance(geometry, StackedGeometry) and source is not None:
            geometry.check(source, batch, "source")
    if outcome % 2:
        # Where nothing is written, no margin tells of an activation that is none.
        check_values(x, x if odds else columns[4], floors)
    residual, squared, moved, _, before, after = columns
    if odds:
        before, after, floors, _ = odds
    parts = multipliers > 0, squared, moved, floors, before, after, residual, status
    if odds:
        return JointSolution(result, multipliers, *parts, odds[3]), ended
    return Solution(result, multipliers, *parts), ended


class Line:
    """Edits of rows of a stream within a model: gather, solve, read back, put in place and record
    in one call a pass. What does not change from pass to pass is laid down once.

    Args:
        geometry: of the probe as it is now.
        probe: its weight and bias, or all of several probes; changes of their values are seen in
            the call.
        traced: what else the edit is made of; a change that leaves a trace is seen.
        own: and what it is compared with by itself.
        rule: where floors come from; of its target and source nothing is kept.
    """

    def __init__(
        self,
        geometry: "ProbeGeometry | StackedGeometry",
        probe: tuple[Tensor, ...],
        traced: tuple[Tensor, ...],
        own: tuple[object, ...],
        rule: "OddsRule | StackedRule",
    ) -> None:
        self.probe, self.geometry, self.own = probe, geometry, own
        self.trace = Trace(probe[0].device, *traced)
        self._known = [part.detach().clone() for part in probe]
        self._size = [(part.data_ptr(), part.nbytes) for part in probe]
        self._task = native.Task(within=1, rounds=MAX_ROUNDS)
        rule.told(self._task)
        self._watched = native.watch(self._task, probe, self._known)
        self._task.max_pivots = 20 * geometry.n_constraints + 50
        self._task.tolerance = ActiveSet.tolerance
        self._kind: torch.dtype | None = None

    def holds(
        self,
        probe: tuple[Tensor, ...],
        traced: tuple[Tensor, ...],
        own: tuple[object, ...],
    ) -> bool:
        """Whether this is still what edits by these."""
        trace = self.trace
        return (
            len(probe) == len(self.probe)
            and all(map(operator.is_, probe, self.probe))
            and own == self.own
            and all(map(operator.is_, traced, trace.tensors))
            and trace.holds()
            and self._size == [(part.data_ptr(), part.nbytes) for part in probe]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies have addresses of their own, and a record goes without.
        return type(None), ()

    def takes(self, stream: Tensor, residual: Tensor | None) -> bool:
        """Whether such a stream can be edited here, and no derivative is asked for."""
        parts = (stream,) if residual is None else (stream, residual)
        if in_transforms() or torch.autograd.forward_ad._current_level >= 0:
            return False
        asked = torch.is_grad_enabled()
        if asked and any(part.requires_grad for part in (*self.probe, *self.trace.tensors)):
            return False
        return stream.shape[-1] == self.geometry.width and all(
            type(part) is Tensor
            and part.is_cpu
            and part.dtype == stream.dtype
            and part.dtype in native.KINDS
            and part.is_contiguous()
            and not (asked and part.requires_grad)
            for part in parts
        )

    def __call__(
        self,
        stream: Tensor,
        residual: Tensor | None,
        scale: float,
        place: Tensor | None,
        target: Tensor,
        source: Tensor | None,
        record: tuple[Tensor, Tensor | int, int] | None,
    ) -> Tensor | None:
        """The stream with rows edited; itself where none is moved.

        None: nothing is done or recorded, because a row is to raise or be skipped, or the probe has
        changed.

        Args:
            stream: what is written of it, (B, T, d).
            residual: what is added to scale · that, or None.
            scale: see there; 1 without a residual.
            place: which rows of (B · T, d) are edited, (N,), or None for all.
            target: a class each, (N,) int64.
            source: likewise, or None.
            record: rows of numbers to write, (N, 9); what the edited rows are numbered, (N,) or the
                first of them; and the number of the pass.
        """
        dtype, width = stream.dtype, stream.shape[-1]
        if dtype != self._kind:
            epsilon = torch.finfo(dtype).eps
            self._task.epsilon, self._task.advance = epsilon, advance(epsilon, width)
            self._task.kind, self._task.stride = native.KINDS[dtype], width
            self._task.base_stride, self._kind = width, dtype
        # Of its own, since threads may run the model at once.
        task = native.Task.from_buffer_copy(self._task)
        result = torch.empty_like(stream) if place is None else stream.clone()
        task.count, task.all = len(target), stream.numel() // width
        task.x, task.result = stream.data_ptr(), result.data_ptr()
        target = target.contiguous()
        task.target = target.data_ptr()
        if source is not None:
            source = source.contiguous()
            task.source = source.data_ptr()
        if place is not None:
            task.place = place.data_ptr()
        if residual is not None:
            task.base, task.scale = residual.data_ptr(), scale
        if record is not None:
            rows, numbered, task.forward_pass = record
            task.record = rows.data_ptr()
            if isinstance(numbered, Tensor):
                task.numbered = numbered.data_ptr()
            else:
                task.first = numbered
        moved = native.edit_stream(self.geometry.shared, task)
        return None if moved < 0 else result if moved else stream
