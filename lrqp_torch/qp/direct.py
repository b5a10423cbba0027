"""Edits of a probe's activations in one call of :mod:`~.native`, one example after another.

On the CPU, where nothing is differentiated: the same algorithm, floors, statuses and certificate as
:mod:`~.problem` and :mod:`~.reach`.
"""

import ctypes
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lrqp_torch.errors import check_classes, check_values, in_transforms, readable
from lrqp_torch.probes.covariance import Snapshot
from lrqp_torch.qp import fused, native
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.implicit import Derivative, Ended
from lrqp_torch.qp.reach import MAX_ROUNDS, Realise, advance
from lrqp_torch.qp.solution import Solution, Status
from lrqp_torch.qp.solvers import ActiveSet
from lrqp_torch.qp.stacked import JointSolution, StackedGeometry, StackedRule
from lrqp_torch.qp.total_odds import TotalOdds

# What a pass asks of tensors again and again, without a frame of Python each.
_address, _version = Tensor.data_ptr, operator.attrgetter("_version")
_nbytes, _asks = operator.attrgetter("nbytes"), operator.attrgetter("requires_grad")
_whole = Tensor.is_contiguous
_transforms = torch._C._functorch.peek_interpreter_stack
_TRUTHS, _CLASSES = torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.int64)
_NUMBERS = torch.empty(0, dtype=torch.float64)
# So few numbers of a stream are copied in the call; of more torch copies several at once.
FEW_NUMBERS = 32_768


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
    if forward_ad._current_level >= 0 or not readable(geometry.steering):
        return False
    given = floor.log_odds if isinstance(floor, OddsRule | StackedRule) else floor
    return all(map(readable, (given,) if isinstance(given, Tensor) else given or ()))


def _places(realise: Realise, x: Tensor) -> bool:
    """Whether it says how it puts activations in place, in their own dtype."""
    if not fused.places(realise) or realise.dtype != x.dtype:
        return False
    base = realise.base
    return base is None or (base.dtype == x.dtype and readable(base))


def _shared(geometry: ProbeGeometry | StackedGeometry, total: bool | int) -> native.Shared:
    """What calls about pairwise or total odds share."""
    if total and isinstance(geometry, ProbeGeometry):
        return geometry.shared_total
    return geometry.shared


def _begun(
    geometry: ProbeGeometry | StackedGeometry, dtype: torch.dtype, total: bool = False
) -> native.Task:
    """A call about activations of a dtype: what is the same in all that are about this probe."""
    tasks = _shared(geometry, total).tasks
    known = tasks.get(dtype)
    if known is None:
        epsilon, width = torch.finfo(dtype).eps, geometry.width
        known = tasks[dtype] = native.Task(
            max_pivots=20 * geometry.n_constraints + 50,
            kind=native.KINDS[dtype],
            stride=width,
            base_stride=width,
            epsilon=epsilon,
            advance=advance(epsilon, width),
            tolerance=(TotalOdds if total else ActiveSet).tolerance,
            total=total,
            rounds=MAX_ROUNDS,
        )
    return native.Task.from_buffer_copy(known)


def solve(
    x: Tensor,
    target: Tensor,
    floor: Tensor | OddsRule | StackedRule,
    geometry: ProbeGeometry | StackedGeometry,
    placing: Any,
    *,
    repeats: bool = False,
    total: bool = False,
) -> tuple[Solution, Ended | None]:
    """The least edits, read back, and where the solves ended.

    Args:
        x: activations, (B, d).
        target: t, (B,) int64; of several variables (B, V).
        floor: log α, (B,) or (B, K−1) float64, or a rule; of several variables theirs.
        geometry: probe and metric, or several probes and metric.
        placing: what the model will hold; default x' in x's dtype.
        repeats: whether where they ended is wanted, for a derivative.
        total: whether odds are total odds, for up to ``geometry.DIRECT`` classes of one probe.

    Raises:
        TargetError: a target out of range.
        NonFiniteError: NaN or infinity in activations or floors.
    """
    x, target = x.detach(), target.contiguous()
    task, floors, source = _begun(geometry, x.dtype, total), None, None
    task.target = target.data_ptr()
    if isinstance(floor, OddsRule | StackedRule):
        source = None if floor.source is None else floor.source.long().contiguous()
        task.source = native.address(source)
        floor.told(task)
    else:
        floors = floor.detach().contiguous()
        if floors.ndim == 1:
            task.each, task.ruled, task.asked = 1, 1, floors.data_ptr()
        else:
            task.each, task.floor = geometry.n_constraints, floors.data_ptr()
    solution, ended, outcome = _solved(task, x, geometry, placing, repeats)
    several = isinstance(geometry, StackedGeometry)
    if not several and not task.ruled:
        vars(solution)["floor"] = floors
    if outcome == -2:
        geometry.check(target, len(x))
        if isinstance(geometry, StackedGeometry) and source is not None:
            geometry.check(source, len(x), "source")
    if outcome % 8 == Status.INVALID:
        # Where nothing is written, no margin tells of an activation that is none.
        check_values(x, x if several else solution.log_odds_before, solution.floor)
    return solution, ended


def _solved(
    task: native.Task,
    x: Tensor,
    geometry: ProbeGeometry | StackedGeometry,
    placing: Any,
    repeats: bool = False,
) -> tuple[Solution, Ended | None, int]:
    """Do a task for activations: what comes of it, and what :func:`.native.solve` returns."""
    batch, m, shared = x.shape[0], geometry.n_constraints, _shared(geometry, task.total)
    kind: type[Solution] = Solution
    x = native.rows_of(x)
    numbers, multipliers = _NUMBERS.new_empty(6, batch), _NUMBERS.new_empty(batch, m)
    active, status = _TRUTHS.new_empty(batch, m), _CLASSES.new_empty(batch)
    result = x.new_empty(batch, x.shape[1])
    residual, squared, moved, floors, before, after = numbers.unbind()
    task.count, task.x, task.result = batch, x.data_ptr(), result.data_ptr()
    task.stride = x.stride(0)
    task.numbers, task.status = numbers.data_ptr(), status.data_ptr()
    task.multipliers, task.active = multipliers.data_ptr(), active.data_ptr()
    stored: dict[str, Tensor] = {}
    if shared.variables:
        odds, each = _NUMBERS.new_empty(batch, 4, shared.variables), multipliers.new_empty(batch, m)
        task.odds, task.floor, kind = odds.data_ptr(), each.data_ptr(), JointSolution
        before, after, floors, stored["moved"] = odds.unbind(1)
    elif task.ruled:
        task.floor = floors.data_ptr()
    if placing is not None and placing.base is not None:
        base = native.rows_of(placing.base.detach())
        task.base, task.base_stride, task.scale = base.data_ptr(), base.stride(0), placing.scale
    if repeats:
        aims, index = torch.empty_like(multipliers), _CLASSES.new_empty(batch, m)
        task.aims, task.slots, task.index = aims.data_ptr(), m, index.data_ptr()
    outcome, ended = native.solve(shared, task), None
    if repeats:
        # As many slots as the largest active set needs: all that a graph keeps of where it ended.
        index = index[:, : max(outcome // 8, 1)].contiguous()
        ended = Ended(index, index < m, None, aims)
    solution = object.__new__(kind)
    vars(solution).update(
        x_new=result,
        multipliers=multipliers,
        active=active,
        squared_distance=squared,
        squared_euclidean=moved,
        floor=floors,
        log_odds_before=before,
        log_odds_after=after,
        kkt_residual=residual,
        status=status,
        **stored,
    )
    return solution, ended, outcome


def derivative(
    ended: Ended,
    x: Tensor,
    target: Tensor,
    floor: Tensor | OddsRule,
    geometry: ProbeGeometry,
) -> Derivative:
    """The derivative of what :func:`solve` finds with respect to the activations, in one call.

    Args:
        ended: where the solves ended.
        x: activations, (B, d).
        target: t, (B,) int64.
        floor: log α, (B,) or (B, K−1) float64, or a rule.
        geometry: probe and metric.
    """
    assert ended.index is not None
    begun = native.Gradient(len(x), 1, ended.index.shape[1], kind=native.KINDS[x.dtype])
    held, source = (target.contiguous(), ended.index), None
    if isinstance(floor, OddsRule):
        begun.ruled, begun.mirror, begun.log_odds = 1, floor.mirror, floor.log_odds.item()
        source = None if floor.source is None else floor.source.expand(len(x)).long().contiguous()
    elif floor.ndim == 2:
        begun.each = floor.shape[1]

    def call(known: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        x, multipliers, floors = known
        x, edited = native.rows_of(x), gradients[0]
        others = [None if part is None else part.contiguous() for part in gradients[1:]]
        task, result = native.Gradient.from_buffer_copy(begun), x.new_empty(x.shape)
        task.target, task.index = map(native.address, held)
        task.source, task.result = native.address(source), result.data_ptr()
        task.x, task.stride = x.data_ptr(), x.stride(0)
        task.multipliers, task.floor = multipliers.data_ptr(), floors.data_ptr()
        if edited is not None:
            edited = native.rows_of(edited)
            task.gradient, task.gradient_stride = edited.data_ptr(), edited.stride(0)
        places = map(native.address, others)
        task.of_multipliers, task.of_squared, task.of_floor, task.of_before = places
        native.gradient(geometry.shared, task)
        return result

    return call


class Line:
    """Edits by a probe, a metric and an odds rule, one call each: of activations, or of rows of a
    stream within a model. What does not change from call to call is laid down once.

    Args:
        geometry: of the probe as it is now.
        probe: its weight and bias, or all of several probes; changes of their values are seen in
            the call.
        traced: what else the edit is made of; a change that leaves a trace is seen.
        metric: Σ as it was when the geometry was computed; what it looks at is seen in the call.
        own: and what it is compared with by itself.
        rule: where floors come from; of its target and source nothing is kept.
        total: whether odds are total odds.
    """

    def __init__(
        self,
        geometry: ProbeGeometry | StackedGeometry,
        probe: tuple[Tensor, ...],
        traced: tuple[Tensor, ...],
        metric: Snapshot | None,
        own: tuple[object, ...],
        rule: OddsRule | StackedRule,
        total: bool = False,
    ) -> None:
        self.geometry, self.own, self.width = geometry, own, geometry.width
        # They are held, so that no other tensor can be taken for one of them. One that was made in
        # inference mode counts no versions, and cannot be changed in place.
        self.probe, self.parts = probe, (*probe, *traced)
        self._counted = [part for part in traced if not part.is_inference()]
        self._ids, self._marks = [*map(id, self.parts)], self._now()
        odds = rule.log_odds if isinstance(rule, StackedRule) else (rule.log_odds,)
        # Their values are looked at in the call: what is written through .data leaves no trace.
        self._watched = (*probe, *odds, *(metric.places if metric is not None else ()))
        self._known = [part.detach().contiguous().clone() for part in self._watched]
        self._rule, self._total = rule, total
        self._tasks: dict[torch.dtype, native.Task] = {}
        self._variables = (len(rule.log_odds),) if isinstance(rule, StackedRule) else ()
        # Where a class stands by itself.
        self.n_classes = len(geometry.weight)
        self._classes = torch.arange(self.n_classes)
        # What sees in a compiled call that this holds, once somebody has asked for that; and by
        # number, that of calls which may be made again, and all of a `Laid` but this.
        self.guards: object = None
        self.kept: dict[int, tuple[object, tuple[Any, ...]]] = {}

    def _now(self) -> list[int]:
        """What tells that the memory of a part is another, or was written to."""
        probe = self.probe
        return [
            *map(_address, self.parts),
            *map(_nbytes, probe),
            *map(_whole, probe),
            *map(_version, self._counted),
        ]

    def holds(self, parts: tuple[Tensor | None, ...], own: tuple[object, ...]) -> bool:
        """Whether this is still what edits by these: the probe's parts and then what is traced."""
        # Parts are held, so that no other object has the number of one.
        return [*map(id, parts)] == self._ids and own == self.own and self._marks == self._now()

    def counts(self, part: Tensor) -> bool:
        """Whether a part must not have been written to; of the others all values are looked at."""
        return any(part is one for one in self._counted) and not any(
            part is one for one in self._watched
        )

    def forget(self) -> None:
        """Hold no longer: what a call watches has changed."""
        self._marks = []

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies have addresses of their own, and a record goes without.
        return type(None), ()

    def differentiates(self, *others: Tensor) -> bool:
        """Whether a derivative in anything may be asked for."""
        if forward_ad._current_level >= 0:
            return True
        return torch.is_grad_enabled() and any(map(_asks, (*others, *self.parts)))

    def task(
        self,
        dtype: torch.dtype,
        target: Tensor | int,
        source: Tensor | int | None,
        asked: Tensor | float | None = None,
    ) -> native.Task:
        """A call about activations of a dtype, of which it is told neither where nor how many.

        Args:
            dtype: one of :data:`.native.KINDS`.
            target: a class each, (N,) int64, or one for all.
            source: likewise, or None.
            asked: log α in place of the rule's, (N,) or () or one for all, or None.
        """
        held = self._tasks.get(dtype)
        if held is None:
            held = _begun(self.geometry, dtype, self._total)
            self._rule.told(held)
            held.watched = native.watch(held, self._watched, self._known)
            self._tasks[dtype] = held
        task = native.Task.from_buffer_copy(held)
        if isinstance(target, Tensor):
            target = target.long().contiguous()
            task.target = target.data_ptr()
        else:
            task.target, task.one_target = self._classes.data_ptr() + 8 * target, 1
        if isinstance(source, Tensor):
            source = source.long().contiguous()
            task.source = source.data_ptr()
        elif source is not None:
            task.source, task.one_source = self._classes.data_ptr() + 8 * source, 1
        if isinstance(asked, Tensor):
            asked = asked.double().contiguous()
            task.asked, task.one_asked = asked.data_ptr(), not asked.ndim
        elif asked is not None:
            task.log_odds, task.mirror = asked, 0
        task.owned = target, source, asked
        return task

    def solve(
        self,
        x: Tensor,
        target: Any,
        source: Any = None,
        asked: Any = None,
        realise: Realise | None = None,
    ) -> tuple[Solution, int] | None:
        """:func:`solve` by these, and the worst status; None where it is to be done, or refused, by
        :meth:`~.problem.MahalanobisQP.solve`.
        """
        if type(x) is not Tensor or _transforms() is not None or not x.is_cpu or x.is_sparse:
            return None
        shape, dtype = x.shape, x.dtype
        if len(shape) != 2 or shape[1] != self.width or dtype not in native.KINDS:
            return None
        batch, each = shape[0], (*shape[:1], *self._variables)
        if not batch or not self._is_choice(target, each) or self.differentiates(x):
            return None
        if source is not None:
            if not self._is_choice(source, each):
                return None
            if isinstance(source, Tensor) and not self._variables:
                check_classes(source, batch, self.n_classes, "source")
        if isinstance(asked, Tensor):
            if asked.ndim and asked.shape != each:
                return None
            if not readable(asked) or self.differentiates(asked):
                return None
        elif asked is not None and type(asked) not in (float, int):
            return None
        if realise is not None:
            if not _places(realise, x):
                return None
            base: Tensor | None = realise.base  # type: ignore[attr-defined]
            if base is not None and self.differentiates(base):
                return None
        task = self.task(dtype, target, source, asked)
        solution, _, outcome = _solved(task, x, self.geometry, realise)
        worst = outcome % 8
        if outcome == native.CHANGED:
            self.forget()
        return None if outcome < 0 or worst == Status.INVALID else (solution, worst)

    def _is_choice(self, classes: Any, each: tuple[int, ...]) -> bool:
        """Whether it is a class for all, or those of each as they are wanted."""
        if type(classes) is int and not self._variables:
            return 0 <= classes < self.n_classes
        return (
            type(classes) is Tensor
            and classes.dtype == torch.int64
            and classes.is_cpu
            and classes.shape == each
        )

    def takes(self, stream: Tensor, residual: Tensor | None) -> bool:
        """Whether such a stream can be edited here, and no derivative is asked for."""
        here = stream.dtype in native.KINDS and stream.shape[-1] == self.width
        return here and self.is_plain(stream, residual)

    def is_plain(self, stream: Tensor, residual: Tensor | None) -> bool:
        """Whether a call may read and write them where they lie: without derivatives."""
        if type(stream) is not Tensor or not stream.is_cpu or not stream.is_contiguous():
            return False
        if _transforms() is not None or forward_ad._current_level >= 0:
            return False
        if residual is None:
            return not (torch.is_grad_enabled() and self.differentiates(stream))
        return (
            type(residual) is Tensor
            and residual.is_cpu
            and residual.dtype == stream.dtype
            and residual.shape == stream.shape
            and residual.is_contiguous()
            and not (torch.is_grad_enabled() and self.differentiates(stream, residual))
        )

    def laid(self, at: object, task: native.Task, stream: Tensor, record: int) -> "Laid":
        """What edits rows of streams like one, (B, T, d).

        Args:
            at: what says which rows they are.
            task: from :meth:`task`, and what is told of rows: ``count``, ``place`` in (B · T, d) or
                None for each, and what they are numbered.
            stream: such a stream.
            record: how many numbers are written of each row, 9 or more.
        """
        task.within, task.all = 1, stream.numel() // self.width
        task.copies = task.place is not None and stream.numel() <= FEW_NUMBERS
        shared = _shared(self.geometry, task.total)
        return Laid(
            self,
            at,
            stream.dtype,
            stream.shape,
            bool(task.copies or not task.place),
            native.threads_for(shared, task.count),
            native.edit_stream(shared, task),
            task.count,
            numbers_of(task.count * record),
            (shared, task),
        )


@functools.lru_cache(64)
def numbers_of(count: int) -> type[Any]:
    """Memory for so many numbers: a class, which takes longer to make than what is made of it."""
    return ctypes.c_double * count


class Laid(NamedTuple):
    """What one compiled call is told of the same rows of like streams: see :meth:`Line.laid`."""

    line: Line
    at: object  # what says which rows
    dtype: torch.dtype  # of the streams
    shape: torch.Size
    copies: bool  # whether all that is written is written in the call
    threads: int  # at most
    call: Callable[..., int]
    n_rows: int
    table: Callable[[], Any]  # memory for what a pass records; a tensor would take longer
    owned: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # as a line

    def ask(self, target: Tensor, source: Tensor | None) -> bool:
        """Ask for other classes of the same rows, as they lie; False where it is not but these."""
        task = self.owned[1]
        (_, known, asked), place, numbers = task.owned
        if (source is None) != (known is None):
            return False
        task.target, task.source = target.data_ptr(), native.address(source)
        task.owned = (target, source, asked), place, numbers
        return True

    def edit(
        self,
        stream: Tensor,
        residual: Tensor | None,
        record: Any,
        forward_pass: int,
        first: int,
    ) -> Tensor | None:
        """The stream with rows edited; itself where none is moved.

        None: nothing is done or recorded, because a row is to raise or be skipped, or the probe has
        changed.

        Args:
            stream: what is written of it, (B, T, d); see :meth:`Line.is_plain`.
            residual: what is added to the task's scale · that, or None.
            record: memory for what is written of each row, as :attr:`table` makes it, or None.
            forward_pass: the number of the pass.
            first: what the first row is numbered, where the task does not say it of each.
        """
        threads = self.threads
        if threads > 1:
            threads = min(threads, torch.get_num_threads())
        result = torch.empty_like(stream) if self.copies else stream.clone()
        base = None if residual is None else residual.data_ptr()
        moved = self.call(
            threads, stream.data_ptr(), result.data_ptr(), base, record, forward_pass, first
        )
        if moved > 0:
            return result
        if moved == native.CHANGED:
            self.line.forget()
        elif moved == -1:
            raise MemoryError("no memory for the active sets of a batch")
        return None if moved else stream
