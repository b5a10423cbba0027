"""The whole edit in one launch on a GPU: who may use it, and how :mod:`~.kernel` is called.

The kernel reads an activation where it lies, solves for it, rounds as the stream rounds, reads
back, raises floors that rounding missed, and writes activation and certificate, without a look at
any value by the host. It serves probes of up to :data:`MOST_CLASSES` classes.
The first launch for a number of classes and a dtype compiles it, for some 5 to 30 seconds, of total
odds up to three times that; Triton keeps what it compiled in a folder of the user's.
Elsewhere the same is done by the operations of :meth:`~.problem.MahalanobisQP.solve`.
"""

import functools
import importlib.util
import math
import operator
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lrqp_torch.errors import ModelError, in_transforms, warn
from lrqp_torch.qp.implicit import Ended
from lrqp_torch.qp.reach import Realise, advance
from lrqp_torch.qp.solution import Solution

if TYPE_CHECKING:
    from lrqp_torch.qp.geometry import ProbeGeometry
    from lrqp_torch.qp.native import Task
    from lrqp_torch.qp.stacked import Prepared, StackedGeometry

VariableRules = tuple[tuple[float, float, float], ...]
"""Of each variable: whether its floors mirror, what is added to them, and how far it may move."""

MOST_CLASSES = 64
"""A tableau of so many classes fits the registers of a program."""
BEFORE_CONSTANTS = 15
"""So many of the kernel's tensors come before those that belong to a geometry."""


class Placed(Protocol):
    """How edited activations are put in place: block input + scale · what is written, or that.

    See :class:`~lrqp_torch.stream.intervene.Placement`.
    """

    base: Tensor | None
    scale: float
    dtype: torch.dtype

    def __call__(self, values: Tensor) -> Tensor:
        """What the stream holds, in float64, when float64 activations are put in place."""


@dataclass(frozen=True, eq=False)
class OddsRule:
    """Log α of each activation by an odds rule; a floor for :meth:`~.MahalanobisQP.solve`.

    Attributes:
        mirror: whether it is max(z_v − z_t, log_odds), v the source; else it is log_odds.
        log_odds: the least log α, () float64.
        target: t, (B,).
        source: v, (B,), −1 where it is the probe's own reading; None: everywhere.
    """

    mirror: bool
    log_odds: Tensor
    target: Tensor
    source: Tensor | None = None

    def of(self, rows: slice) -> "OddsRule":
        """That of a slice of the batch."""
        source = None if self.source is None else self.source[rows]
        return replace(self, target=self.target[rows], source=source)

    def told(self, task: "Task") -> None:
        """Tell compiled code of the rule; of its target and source nothing."""
        task.each, task.ruled = 1, 1
        task.log_odds, task.mirror = self.log_odds.item(), self.mirror

    def __call__(self, margins: Tensor, rows: slice = slice(None)) -> Tensor:
        """Log α, (b,), from the margins z_t − z_ℓ of a slice of the batch, (b, K−1)."""
        floor = self.log_odds.to(margins.device).expand(len(margins))
        if not self.mirror:
            return floor
        belief = -margins.amin(-1).clamp_max(0.0)
        if self.source is not None:
            source, target = self.source[rows], self.target[rows]
            rival = (source - (source > target).long()).clamp(0, margins.shape[-1] - 1)
            given = -margins.gather(-1, rival.unsqueeze(-1)).squeeze(-1)
            given = torch.where(source == target, 0.0, given)
            belief = torch.where(source >= 0, given, belief)
        return torch.maximum(belief, floor)


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def kernels() -> ModuleType | None:
    """The module with the kernels; None where there is no Triton, or none that works.

    Warns with :class:`RuntimeWarning` of one that is there and does not: it needs a C compiler.
    """
    if importlib.util.find_spec("triton") is None or not (interpreted() or torch.version.cuda):
        return None
    try:
        from lrqp_torch.qp import kernel

        if not interpreted():
            kernel.trial_kernel[(1,)](torch.empty(1, device="cuda"))
    except Exception as error:
        warn(
            RuntimeWarning,
            f"Triton does not work here, so edits take more launches on the GPU: {error}",
        )
        return None
    return kernel


def serves(x: Tensor, n_classes: int) -> bool:
    """Whether the kernels take such activations: on a GPU or interpreted, K ≤ 64, as they are."""
    if not (x.is_cuda or interpreted()) or n_classes > MOST_CLASSES:
        return False
    if torch.compiler.is_compiling() or in_transforms() or forward_ad._current_level >= 0:
        return False
    return x.is_floating_point() and x.stride(-1) == 1 and kernels() is not None


def places(realise: Realise) -> TypeGuard[Placed]:
    """Whether it says how it puts activations in place, as the kernels can."""
    own: Any = realise
    if not all(hasattr(own, name) for name in ("base", "scale", "dtype")):
        return False
    if getattr(own, "beside", None) is not None:
        return False
    return bool(own.scale == 1) if own.base is None else own.base.stride(-1) == 1


@dataclass(frozen=True)
class Shape:
    """How a program is laid out."""

    columns: int  # of the activation, at a time; a power of 2
    warps: int  # of a program
    stages: int = 1  # so many steps along the activation are under way at once
    registers: int | None = None  # of a thread, at most; None: as many as there are
    # Whether weights are fetched as the probe has them, and made float64 there.
    narrow: bool = False


def shape_of(n_classes: int, width: int) -> Shape:
    """The layout for K classes and width d."""
    chosen = SHAPES.get(n_classes)
    if chosen is not None:
        return chosen
    # By the width alone: an edit is then the same bits in any batch. Of 16 rows of 4,096 numbers a
    # warp each took an H100 36 µs for 2 classes and 386 for 10, four warps 8 and 163.
    long = width >= 2048
    if n_classes == 2:
        return Shape(512, 4) if long else Shape(128, 1)
    if n_classes <= 16:
        return Shape(128, 4, narrow=True) if long else Shape(32, 1, narrow=True)
    return Shape(64, 4, narrow=True)


SHAPES: dict[int, Shape] = {}
"""Layouts that are tried instead, by K."""


def power_of_2(number: int) -> int:
    """The least power of 2 that is no less."""
    return 1 << max(0, number - 1).bit_length()


class Launcher:
    """The kernel for one geometry: what does not change from call to call is prepared once.

    Args:
        geometry: a ``ProbeGeometry``, or a ``StackedGeometry`` of several probes.
        rule: where floors come from: "mirror" or "fixed", of ``log_odds``; "given", one an example,
            or "each", one a constraint. Of several probes, the rule of each.
        total: whether odds are total odds.
        skip: whether what fails is left as it was.
        live: weight and bias of the probe as they are now, which are held against the geometry's.
    """

    def __init__(
        self,
        geometry: Any,
        rule: "str | VariableRules",
        *,
        total: bool = False,
        skip: bool = False,
        live: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        module = kernels()
        assert module is not None
        self.kernel, self.language = module.edit_kernel, module.tl
        self.skip, self.live = skip, live is not None
        self.n_classes, self.width = geometry.weight.shape
        self.two = isinstance(rule, str) and self.n_classes == 2
        # Of two classes they are the pairwise ones.
        self.total = total and not self.two
        self.rule = rule if isinstance(rule, str) else "variables"
        rows = geometry.rows
        now = live or rows[:2]
        own = zip((geometry.weight, geometry.bias), now, strict=True)
        then = now if live is None else tuple(part.to(other.dtype) for part, other in own)
        low = rows[2] if geometry.low is None else geometry.low
        self.low = geometry.low is not None
        parts: tuple[Tensor, ...] = *rows[:2], *now, *then, rows[2], low
        if isinstance(rule, str):
            self.slots, self.variables = self.n_classes, 0
            grams = geometry.total_grams if self.total else None if self.two else geometry.grams
            self.grams = grams is not None
            of = geometry.distances
            squared = of.squared if grams is None else grams
            parts = *parts, squared, of.noise, of.length, *rows[:2]
        else:
            self.slots, self.variables = geometry.n_constraints, len(rule)
            self.grams, table = False, torch.tensor(rule, dtype=torch.float64)
            table = table.to(geometry.weight.device)
            parts = *parts, *rows, table, geometry.layout
        self.constants = tuple(part.detach().contiguous() for part in parts)
        self.compiled: dict[Any, Any] = {}
        self.prepares = True

    def __call__(
        self,
        stream: Tensor,
        out: Tensor,
        target: Tensor,
        *,
        count: int,
        floors: Tensor,
        source: Tensor | None = None,
        base: Tensor | None = None,
        scale: float = 1.0,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        which: Tensor | None = None,
        shown: Tensor | None = None,
        copy: bool = False,
        solution: tuple[Tensor, ...] | None = None,
        repeats: bool = False,
        record: tuple[Tensor, int, Tensor, int] | None = None,
        prepared: "Prepared | None" = None,
        asked: Tensor | None = None,
    ) -> "Laid":
        """Edit ``count`` rows of ``stream`` into ``out``.

        Args:
            stream: activations, (B, d); or, with ``rows`` and ``columns``, what is written of a
                stream (B, T, d), which is base + scale · that.
            out: where edited ones, or what is written of them, are put; in the stream's dtype.
            target: classes, int64: one for all, (1,), or one of each number that ``which`` has.
            count: N.
            source: likewise, or None.
            floors: log α, (N,) or (N, m), where the rule is "given" or "each"; else the least.
            base: block input at ``mid``, as ``stream``.
            scale: see ``stream``.
            rows, columns: where in a (B, T, d) stream, (N,).
            which: which of the classes is each one's, (N,); default its own number.
            shown: which are to be edited, (N,) bool; default all.
            copy: whether rows that stay as they are have to be put into ``out``.
            solution: to be filled: λ (N, m), active (N, m) bool, floors that were aimed at (N, m),
                inverse of the active block (N, m, m).
            repeats: whether the last two of these are wanted, to repeat the last solve.
            record: rows of numbers, (n, 9) float64, the first of them to write, what each is
                numbered, (N,), and the number of the pass. A row has log odds before and after,
                floor, distance, Euclidean length, KKT residual, status, its number and the pass;
                of V variables, (n, 4V + 6), the first three have V numbers each, and V that say how
                far each moved come before the status.
            prepared: of several variables, their constraints; ``target`` and ``source`` are its.
            asked: log α in place of the rules', (N, V), NaN where there is none.

        Returns:
            The launch, which has the certificate without a record: the first six of these, lengths
            squared, (6, N); and the status, (N,) int64.
        """
        if record is None:
            certificate, first, forward_pass = self.constants[0].new_empty(6, count), 0, 0
            steps, statuses, index_of = (1, count), target.new_empty(count), target
        else:
            certificate, first, index_of, forward_pass = record
            steps, statuses = (certificate.shape[1], 1), target
        # The kernel steps from one to the next, and a view such as a column of a mask does not.
        target, floors, index_of = target.contiguous(), floors.contiguous(), index_of.contiguous()
        source, rows, columns, which, shown = (
            part if part is None else part.contiguous()
            for part in (source, rows, columns, which, shown)
        )
        mine = stream if base is None else base
        at = rows is not None
        tensors = (
            stream,
            mine,
            out,
            target if rows is None else rows,
            target if columns is None else columns,
            target if which is None else which,
            target if shown is None else shown,
            index_of,
            target,
            target if source is None else source,
            floors,
            *((target,) * 3 if prepared is None else prepared.parts),
            floors if asked is None else asked,
            *((certificate,) * 4 if solution is None else solution),
            certificate,
            statuses,
        )
        numbers = (
            stream.stride(0),
            stream.stride(1) if at else 0,
            mine.stride(0),
            mine.stride(1) if at else 0,
            out.stride(0),
            out.stride(1) if at else 0,
            1 if target.shape[0] > 1 else 0,
            1 if source is not None and source.shape[0] > 1 else 0,
            *steps,
            first,
            forward_pass,
        )
        flags = (
            stream.dtype, mine.dtype, out.dtype, base is not None, scale, at, which is not None,
            source is not None, copy, shown is not None, solution is not None, repeats,
            record is not None, asked is not None,
        )  # fmt: skip
        laid = Laid(self, tensors, numbers, flags, count, certificate, statuses)
        if count:
            laid()
        return laid

    def _first(
        self, tensors: tuple[Tensor, ...], numbers: tuple[int, ...], flags: Any, wide: bool, n: int
    ) -> None:
        """Compile for such arguments, and launch."""
        out, base, scale, at, which, source, copy, shown, solution, repeats = flags[2:-2]
        n_classes, width, variables = self.n_classes, self.width, self.variables
        precision, shape = torch.finfo(out).eps, shape_of(self.n_classes, self.width)
        constants = {
            "K": n_classes,
            "KP": 1 if self.two else power_of_2(n_classes),
            "N": 1 if self.two else self.slots,
            "NP": 1 if self.two else power_of_2(self.slots),
            "V": variables,
            "TWO": self.two,
            "GRAMS": self.grams,
            "TOTAL": self.total,
            "ASKED": flags[-1],
            "LOW": self.low,
            "D": width,
            "BD": shape.columns,
            "STAGES": shape.stages,
            "DTYPE": getattr(self.language, str(out).removeprefix("torch.")),
            "EPS": precision,
            "NUDGE": precision / math.sqrt(width),
            "ADVANCE": advance(precision, width),
            "BASE": base,
            "SCALE": float(scale),
            "NARROW_SCALE": float(torch.tensor(scale, dtype=torch.float32)),
            "AT": at,
            "WHICH": which,
            "RULE": self.rule,
            "SOURCE": source and not variables,
            "LIVE": self.live,
            "NARROW": self.live and not self.two and shape.narrow,
            "SKIP": self.skip,
            "COPY": copy,
            "SHOWN": shown,
            "SOLUTION": solution,
            "REPEATS": repeats,
            "RECORD": flags[-2],
        }
        options: dict[str, Any] = {"num_warps": shape.warps, "num_stages": 1}
        if shape.registers is not None:
            options["maxnreg"] = shape.registers
        if scale != 1:
            # What the model rounds twice must not be fused into one operation; LLVM makes a
            # product and a sum in float64 that are rounded to float32 operations of float32.
            options["enable_fp_fusion"] = False
        device, own = tensors[0].device, BEFORE_CONSTANTS
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            compiled = self.kernel[(n,)](
                *tensors[:own], *self.constants, *tensors[own:], *numbers, *constants.values(),
                **options,
            )  # fmt: skip
        if compiled is not None and wide and self.prepares:
            fixed = tuple(part.data_ptr() for part in self.constants)
            self.compiled[flags] = (
                compiled.run, compiled.function, compiled.packed_metadata, fixed,
                tuple(constants.values()),
            )  # fmt: skip


class Laid:
    """A launch laid down: done, and done again where little else than the stream differs.

    Args:
        launcher: what compiles it.
        tensors, numbers, flags: as the kernel takes them; the tensors are held.
        count: N.
        certificate, statuses: what it writes, see :class:`Launcher`.
    """

    def __init__(
        self,
        launcher: Launcher,
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        flags: Any,
        count: int,
        certificate: Tensor,
        statuses: Tensor,
    ) -> None:
        self.launcher, self.tensors, self.numbers = launcher, tensors, numbers
        self.flags, self.count = flags, count
        self.certificate, self.statuses = certificate, statuses
        self.device = tensors[0].get_device()
        if any(tensor.get_device() != self.device for tensor in tensors):
            raise ModelError("an edit's tensors are not all on the device of the activations")
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        # What launches it once it is compiled, with numbers in place of tensors, which Triton would
        # ask the driver about one by one; and where among these the certificate is.
        self._ready: tuple[Any, Any, Any, list[Any], int] | None = None
        self.before: Callable[[], Any] | None = None
        """What has to be done before each further launch."""

    def __call__(self) -> None:
        """Launch."""
        ready = self._prepared()
        if ready is None or not self._launched(ready[3]):
            first, second, third, *_ = self._pointers
            wide = self._is_wide(first | second | third)
            self.launcher._first(self.tensors, self.numbers, self.flags, wide, self.count)
        # Streams are large, and others the next time.
        self.tensors = self.tensors[3:]

    def again(
        self,
        stream: Tensor,
        base: Tensor | None,
        index: int | None,
        shown: Tensor | None,
        record: tuple[Tensor, int, int],
    ) -> Tensor | None:
        """Launch for a stream of the same shape, dtype and strides, and rows at the same places.

        Args:
            stream, base, shown: as a :class:`Launcher` is told, of the same kind.
            index: the address of what each row is numbered, int64; None: where it was.
            record: rows of numbers, the first of them to write, and the number of the pass.

        Returns:
            Where edited rows are put; None where it was not launched.
        """
        ready = self._ready or self._prepared()
        if ready is None:
            return None
        # A copy, as another thread may launch it meanwhile.
        given, place = ready[3].copy(), ready[4]
        own, out = stream.data_ptr(), out_for(stream, self.flags[2], self.flags[8])
        given[:3] = own, own if base is None else base.data_ptr(), out.data_ptr()
        if shown is not None:
            given[_SHOWN] = shown.data_ptr()
        if index is not None:
            given[_INDEX] = index
        given[place], further = record[0].data_ptr(), place + len(self.numbers)
        given[further : further + 2] = record[1:]
        if self.before is not None:
            self.before()
        return out if self._launched(given) else None

    def _is_wide(self, places: int) -> bool:
        """Whether these have the addresses and strides that compiled code relies on."""
        steps = functools.reduce(operator.or_, self.numbers[:6], places)
        return not steps & 15 and max(self.numbers[:6]) < 2**31

    def _prepared(self) -> tuple[Any, Any, Any, list[Any], int] | None:
        """What launches it, where it is compiled."""
        held = self.launcher.compiled.get(self.flags)
        if held is None or not self._is_wide(0):
            return None
        (run, function, metadata, fixed, constants), own = held, BEFORE_CONSTANTS
        pointers = *self._pointers[:own], *fixed, *self._pointers[own:]
        given = [*pointers, *self.numbers, *constants]
        self._ready = run, function, metadata, given, len(pointers) - 2
        return self._ready

    def _launched(self, given: list[Any]) -> bool:
        """Launch what is compiled; False where it is for other arguments, or another device."""
        assert self._ready is not None
        run, function, metadata, *_ = self._ready
        device = self.device
        if (given[0] | given[1] | given[2]) & 15 or torch._C._cuda_getDevice() != device:
            return False
        place = torch._C._cuda_getCurrentRawStream(device)
        try:
            run(self.count, 1, 1, place, function, metadata, None, None, None, *given)
        except TypeError:  # another Triton, which launches in another way
            self.launcher.prepares, self._ready = False, None
            self.launcher.compiled.clear()
            return False
        return True


_SHOWN, _INDEX = 6, 7
"""Where some tensors come among those of a launch."""


def out_for(stream: Tensor, dtype: torch.dtype, whole: bool) -> Tensor:
    """A copy of a stream in a dtype; where its ``whole`` is written, only the room for it."""
    return torch.empty_like(stream, dtype=dtype) if whole else stream.to(dtype, copy=True)


class _Launchers(dict[Any, Launcher]):
    """Those of a geometry, beside it; no copy takes them along."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Launchers, ()


def launcher(
    geometry: "ProbeGeometry | StackedGeometry",
    rule: "str | VariableRules",
    skip: bool,
    live: tuple[Tensor, Tensor] | None,
    total: bool = False,
) -> Launcher:
    """That of a geometry, as long as the geometry lives."""
    kept: _Launchers | None = vars(geometry).get("launchers")
    if kept is None:
        kept = vars(geometry)["launchers"] = _Launchers()
    key = rule, skip, total, live and (live[0].data_ptr(), live[1].data_ptr())
    found = kept.get(key)
    if found is None:
        found = kept[key] = Launcher(geometry, rule, total=total, skip=skip, live=live)
    return found


def solve(
    x: Tensor,
    target: Tensor,
    floors: OddsRule | Tensor,
    geometry: "ProbeGeometry",
    realise: Realise | None = None,
    *,
    repeats: bool = False,
    total: bool = False,
    skip: bool = False,
    live: tuple[Tensor, Tensor] | None = None,
) -> tuple[Solution, Ended]:
    """What :meth:`~.MahalanobisQP.solve` returns, in one launch.

    Args:
        x: activations, (B, d).
        target: classes, (B,) int64; one out of range makes its example INVALID.
        floors: log α by a rule, (B,) or (B, m).
        geometry: of the probe.
        realise: how edited activations are put in place; see :func:`places`.
        repeats: whether where it ended is wanted, for a derivative.
        total: whether odds are total odds.
        skip: whether what fails is left as it was.
        live: weight and bias of the probe as they are now; where they are not the geometry's, all
            is INVALID.
    """
    batch, m = len(x), geometry.n_constraints
    rule, given, source = _told(floors, x.device)
    wide = geometry.weight
    multipliers = wide.new_empty(batch, m)
    active = torch.empty(batch, m, dtype=torch.bool, device=x.device)
    aims = inverse = multipliers
    if repeats:
        aims = torch.empty_like(multipliers)
        inverse = aims if total else wide.new_empty(batch, m, m)
    x_new = torch.empty_like(x)
    base, scale = None, 1.0
    if realise is not None and places(realise):
        base, scale = realise.base, realise.scale
    with torch.no_grad():
        done = launcher(geometry, rule, skip, live, total)(
            x.detach(),
            x_new,
            target,
            count=batch,
            source=source,
            floors=given.detach(),
            base=None if base is None else base.detach(),
            scale=scale,
            copy=True,
            solution=(multipliers, active, aims, inverse),
            repeats=repeats,
        )
    before, after, floor, distance, moved, residual = done.certificate.unbind()
    solution = Solution(
        x_new=x_new,
        multipliers=multipliers,
        active=active,
        squared_distance=distance,
        squared_euclidean=moved,
        floor=given if rule == "each" else floor,
        log_odds_before=before,
        log_odds_after=after,
        kkt_residual=residual,
        status=done.statuses,
    )
    return solution, Ended(None, active, inverse, aims)


def _told(floors: OddsRule | Tensor, device: torch.device) -> tuple[str, Tensor, Tensor | None]:
    """How the kernel is told of floors: the kind, the numbers, and the source classes."""
    if isinstance(floors, OddsRule):
        kind = "mirror" if floors.mirror else "fixed"
        return kind, floors.log_odds.to(device, torch.float64), floors.source
    return "each" if floors.ndim == 2 else "given", floors.to(device, torch.float64), None


@dataclass(frozen=True)
class StreamRows:
    """Rows of a stream that an edit is to change within a model, and where it is recorded.

    example, column: where in the stream each row is, (N,).
    index: which of all positions each is, (N,).
    request: in a scope, the request that each belongs to, (N,), else None.
    shown: which rows count, (N,) bool, or None.
    record: rows of numbers, the first of them to write, and the number of the pass; see
        :class:`Launcher`.
    whole: whether they are all rows of the stream.
    """

    stream: Tensor  # what is written of the stream, (B, T, d), which is residual + scale · that
    residual: Tensor | None  # the block input at `mid`, (B, T, d), else None
    scale: float  # see `stream`
    example: Tensor
    column: Tensor
    index: Tensor
    request: Tensor | None
    shown: Tensor | None
    record: tuple[Tensor, int, int]
    whole: bool = False

    def fits(self, *numbers: Tensor) -> bool:
        """Whether a kernel can read them, and no gradient is asked of them or of some numbers."""
        rest = () if self.residual is None else (self.residual,)
        if any(part.stride(-1) != 1 for part in rest):
            return False
        parts = self.stream, *rest, *numbers
        return not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))


def edit_stream(
    rows: StreamRows,
    target: Tensor,
    floors: OddsRule | Tensor,
    geometry: "ProbeGeometry | StackedGeometry",
    *,
    skip: bool,
    live: tuple[Tensor, Tensor],
    total: bool = False,
    variables: "tuple[VariableRules, Prepared, Tensor | None] | None" = None,
) -> tuple[Tensor, Laid]:
    """Edit rows of a stream within a model: gather, :func:`solve`, put in place, in one launch.

    Args:
        rows: which.
        target: classes, int64: (1,) for all, or (n,); of several variables a last axis of these.
        floors: log α by a rule, or (N,); of several variables the least of each, (V,).
        geometry: of the probe, or of several.
        skip, live, total: see :func:`solve`.
        variables: of several: the rules of each, their constraints, and log α (N, V) in place of
            the rules'.

    Returns:
        A copy of the stream with edited rows in place, and the launch, which may be done again.
    """
    stream, residual = rows.stream, rows.residual
    # Under autocast the attention output is narrower than the sum that the stream will hold.
    dtype = stream.dtype if residual is None else torch.result_type(stream, residual)
    whole = out_for(stream, dtype, rows.whole)
    rule: str | VariableRules
    more: dict[str, Any] = {}
    if variables is None:
        rule, given, source = _told(floors, stream.device)
    else:
        assert isinstance(floors, Tensor)
        rule, prepared, asked = variables
        given, source = floors, prepared.held
        more = {"prepared": prepared, "asked": None if asked is None else asked.contiguous()}
    held, first, forward_pass = rows.record
    # The kernel goes by addresses: numbers of one type, which the launcher lays in a row.
    laid = launcher(geometry, rule, skip, live, total)(
        stream,
        whole,
        target,
        count=rows.index.shape[0],
        source=source,
        floors=given,
        base=residual,
        scale=rows.scale,
        rows=rows.example.long(),
        columns=rows.column.long(),
        which=(rows.index if rows.request is None else rows.request).long(),
        shown=None if rows.shown is None else rows.shown.bool(),
        copy=rows.whole,
        record=(held, first, rows.index.long(), forward_pass),
        **more,
    )
    return whole, laid


@torch.no_grad()
def active_sets(
    gram: Tensor, scale: Tensor, error: Tensor, gap: Tensor, max_pivots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`~.pivots.find_active_sets` finds, in one launch, without a look at any value.

    Args:
        gram: M of each problem, (n, m, m).
        scale, error, gap, max_pivots: see there.

    Returns:
        Constraint i in slot i or m, (n, m); inverse (n, m, m); feasible and converged, (n,).
    """
    module = kernels()
    assert module is not None
    batch, m = gap.shape
    held = torch.empty(batch, m, dtype=torch.int8, device=gap.device)
    verdict = held.new_empty(batch, 2)
    inverse = gap.new_empty(batch, m, m)
    tensors = [part.contiguous() for part in (gram, scale, error, gap)]
    if batch:
        with torch.cuda.device(gap.device) if gap.is_cuda else nullcontext():
            module.dual_kernel[(batch,)](
                *tensors, held, inverse, verdict, m, max(2, power_of_2(m)), max_pivots,
                num_warps=1 if m <= 16 else 4,
            )  # fmt: skip
    every = torch.arange(m, device=gap.device)
    feasible, converged = verdict.view(torch.bool).unbind(1)
    return torch.where(held.view(torch.bool), every, m), inverse, feasible, converged
