"""The dual active set compiled for this machine, where it has a C compiler: optional, on the CPU.

``dual.c`` takes the steps of :mod:`~.pivots` a problem at a time, which costs a few microseconds
where a batch of torch operations costs a hundred. It is compiled by the system's compiler when it
is first needed, into the user's cache, and called on the tensors' own memory. Without a compiler,
or with ``LRQP_NATIVE=0`` in the environment, everything runs in torch.
"""

import ctypes
import functools
import itertools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.files import load_compiled
from lrqp_torch.qp import pivots, reach

SOURCE = Path(__file__).with_name("dual.c")
# So many numbers of M are worth a thread of their own.
THREAD_NUMBERS = 20_000
FEASIBLE, CONVERGED = 1, 2
FIRST_SLOTS = 16
CHANGED = -3
"""What a call comes back with where a part that it watches is not what it was."""

_number, _address = ctypes.c_int64, ctypes.c_void_p


class Shared(ctypes.Structure):
    """``Shared`` of dual.c: what problems share. It owns the tensors that it points at."""

    _fields_ = (
        *((name, _number) for name in ("classes", "m", "width", "rows")),
        *((name, _address) for name in ("matrix", "noise", "length", "stretch")),
        *((name, _address) for name in ("weight", "bias", "steering", "grams", "low")),
        ("unit", ctypes.c_double),
        *((name, _number) for name in ("variables", "pairs")),
        *((name, _address) for name in ("plus", "minus", "slots", "begins", "first", "tolerant")),
    )

    @classmethod
    def of(
        cls,
        matrix: Tensor | None,
        noise: Tensor | None,
        *others: Tensor | None,
        unit: float = 0.0,
        layout: Sequence[Tensor] = (),
    ) -> "Shared":
        """Of a probe or of problems of their own; tensors of float64.

        Args:
            matrix: squared distances of classes (K, K), or M of each problem (B, m, m).
            noise: rounding error of it (K, K), or of M's diagonal (B, m).
            others: of a probe: length and stretch (K, K), the rows weight (R, d), bias (R,) and
                steering (R, d), see :class:`~.geometry.ProbeGeometry`; and of few classes M for
                each target, (K, K, K), with an empty row and column for it; and what to add to
                steering where classes are nearly equal.
            unit: of stretch.
            layout: of several probes, of whose pairs of classes (P,) matrix, noise and length are:
                the two classes of each pair, (P,); where the constraints of each variable begin,
                (V + 1,), its classes, (V + 1,), and its pairs, (V,); and whether it is kept within
                a tolerance, (V,); all int64.
        """
        owned = [None if t is None else t.detach().contiguous() for t in (matrix, noise, *others)]
        m = classes = 0
        if layout:
            m = int(layout[2][-1])
        elif matrix is not None:
            classes = len(matrix) if matrix.ndim == 2 else 0
            m = matrix.shape[-1] - (classes > 0)
        owned += [None] * (9 - len(owned))
        weight = owned[4]
        shape = (0, 0) if weight is None else weight.shape
        shared = cls(classes, m, shape[1], shape[0], *map(address, owned), unit)
        shared.owned, shared.layout = owned, tuple(layout)
        # By the dtype of activations, what every call about them begins with: see direct.py.
        shared.tasks = {}
        if layout:
            shared.variables, shared.pairs = len(layout[4]), len(layout[0])
            shared.plus, shared.minus, shared.slots = map(address, layout[:3])
            shared.begins, shared.first, shared.tolerant = map(address, layout[3:])
        return shared

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies have addresses of their own.
        return partial(Shared.of, unit=self.unit, layout=self.layout), tuple(self.owned)


class Task(ctypes.Structure):
    """``Task`` of dual.c: one call. Fields that are not given are 0 or NULL."""

    _fields_ = (
        ("count", _number),
        ("each", _number),
        *((name, _address) for name in ("target", "margins", "floor")),
        ("ruled", _number),
        ("log_odds", ctypes.c_double),
        ("mirror", _number),
        ("source", _address),
        ("max_pivots", _number),
        *((name, _address) for name in ("multipliers", "numbers", "status", "aims")),
        ("slots", _number),
        *((name, _address) for name in ("index", "inverse", "x", "result", "base")),
        ("scale", ctypes.c_double),
        *((name, _number) for name in ("kind", "stride", "base_stride")),
        *((name, ctypes.c_double) for name in ("epsilon", "advance", "tolerance")),
        ("rounds", _number),
        *((name, _number) for name in ("within", "all")),
        *((name, _address) for name in ("place", "record", "numbered")),
        *((name, _number) for name in ("first", "forward_pass")),
        ("parts", _number),
        *((name, _address) for name in ("live", "known", "bytes", "rules", "asked", "odds")),
        *((name, _number) for name in ("one_target", "one_source", "one_asked")),
        ("active", _address),
        ("total", _number),
        ("copies", _number),
    )


def watch(task: Task, now: Sequence[Tensor], known: Sequence[Tensor]) -> tuple[object, ...]:
    """Let a task compare numbers with what they were; returns what has to be kept meanwhile.

    Args:
        task: the call.
        now: tensors.
        known: contiguous copies of what they were.
    """
    parts: list[tuple[int, int, int]] = []
    for part, copy in zip(now, known, strict=True):
        # In one piece, or as many pieces as there are rows, or numbers.
        one, shape = part.element_size(), list(part.shape)
        if part.is_contiguous():
            shape = []
        elif part.stride(-1) == 1:
            shape = shape[:-1]
        size, begin = copy.nbytes // math.prod(shape), copy.data_ptr()
        for count, index in enumerate(itertools.product(*map(range, shape))):
            ahead = sum(map(operator.mul, index, part.stride()))
            parts.append((part.data_ptr() + ahead * one, begin + count * size, size))
    count, places = len(parts), list(zip(*parts, strict=True))
    live, held = ((_address * count)(*column) for column in places[:2])
    sizes = (_number * count)(*places[2])
    task.parts = count
    task.live, task.known = ctypes.addressof(live), ctypes.addressof(held)
    task.bytes = ctypes.addressof(sizes)
    return live, held, sizes


class Gradient(ctypes.Structure):
    """``Gradient`` of dual.c: one call for a derivative. Fields not given are 0 or NULL."""

    _fields_ = (
        *((name, _number) for name in ("count", "each", "slots", "ruled", "mirror", "kind")),
        *((name, _number) for name in ("stride", "gradient_stride")),
        ("log_odds", ctypes.c_double),
        *((name, _address) for name in ("target", "source", "index", "multipliers")),
        *((name, _address) for name in ("floor", "gradient", "of_multipliers", "of_squared")),
        *((name, _address) for name in ("of_floor", "of_before", "x", "result")),
    )


KINDS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""``Kind`` of dual.c: the dtypes of activations that it takes."""


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a tensor begin."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled solver, or None where there is none to be had."""
    loaded = load_compiled(SOURCE, constants)
    if loaded is None:
        return None
    given = _address, _address, _number
    for function in (loaded.lrqp_solve, loaded.lrqp_gradient):
        function.restype, function.argtypes = _number, given
    stream = loaded.lrqp_edit_stream
    stream.restype, stream.argtypes = _number, (*given, *[_address] * 4, _number, _number)
    return loaded


def constants() -> dict[str, float]:
    """What dual.c has in common with the operations of torch."""
    names = "DEPENDENT", "SUSPECT", "SATISFIED", "NO_DIRECTION", "PROVEN", "EPSILON", "NOISE"
    known = {name: getattr(pivots, name) for name in names}
    known |= {"TINY": sys.float_info.min, "COMBINED": pivots.DEPENDENT}
    known |= {
        name: getattr(reach, name)
        for name in ("FINE", "NEAR", "MANY_TIMES", "SOME_TIMES", "LONGER", "ROOM")
    }
    # Which imports this module by way of the solvers.
    from lrqp_torch.qp import total_odds

    own = "GROWTH", "MET", "BALANCED", "SETTLED", "CANCELLED", "RIDGE", "MAX_STEPS", "FAR"
    more = "SHARE_ROUNDS", "MET_BY_SHARES", "MAX_HALVINGS", "LENT", "PROOFS"
    return known | {name: getattr(total_odds, name) for name in (*own, *more)}


def solve(shared: Shared, task: Task) -> int:
    """Do a task: how many slots the largest active set needs; of activations eight times as many,
    and the worst status; or below 0 where nothing was done, see dual.c.

    Raises:
        MemoryError: there is none for a problem's active set.
    """
    return _call("lrqp_solve", shared, task)


def edit_stream(shared: Shared, task: Task) -> Callable[..., int]:
    """What edits rows of streams: how many were moved, −1 without memory, or further below 0 where
    nothing was done; see dual.c. It keeps neither of its arguments.

    It is called with how many threads, and where are: the stream, what comes of it, what that is
    added to or None, and the record or None; with the number of the pass, and what the first
    row is numbered, where the task does not say it of each.
    """
    loaded, place = library(), ctypes.addressof
    assert loaded is not None
    return partial(loaded.lrqp_edit_stream, _address(place(shared)), _address(place(task)))


def edits_stream() -> int | None:
    """Where the function is that :func:`edit_stream` calls."""
    return ctypes.cast(library().lrqp_edit_stream, _address).value  # type: ignore[union-attr]


def threads_for(shared: Shared, count: int) -> int:
    """So many threads at most have work in so many problems."""
    if count < 2:
        return 1
    numbers = count * (shared.m * shared.m + shared.rows * shared.width)
    return numbers // THREAD_NUMBERS if numbers >= 2 * THREAD_NUMBERS else 1


def gradient(shared: Shared, task: Gradient) -> None:
    """The derivative of edits with respect to their activations.

    Raises:
        MemoryError: as :func:`solve`.
    """
    _call("lrqp_gradient", shared, task)


def _call(name: str, shared: Shared, task: Task | Gradient) -> int:
    loaded, threads = library(), threads_for(shared, task.count)
    assert loaded is not None
    if threads > 1:
        threads = min(torch.get_num_threads(), threads)
    place = ctypes.addressof
    outcome: int = getattr(loaded, name)(place(shared), place(task), threads)
    if outcome == -1:
        raise MemoryError("no memory for the active sets of a batch")
    return outcome


def read(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product x Wᵀ + b in float64, (B, K): bit for bit what an edit reads, in any company."""
    count, rows = len(x), len(weight)
    x = rows_of(x)
    logits = weight.new_empty(count, rows)
    shared = Shared.of(None, None, None, None, weight, bias)
    task = Task(count, x=x.data_ptr(), result=logits.data_ptr())
    task.kind, task.stride = KINDS[x.dtype], x.stride(0)
    solve(shared, task)
    return logits


def rows_of(x: Tensor) -> Tensor:
    """Activations of which each row is contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def find_active_sets(
    matrix: Tensor,
    noise: Tensor,
    target: Tensor,
    gap: Tensor,
    slots: int,
    max_pivots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`~.pivots.find_active_sets`."""
    batch, m = gap.shape
    shared, gap = Shared.of(matrix, noise), gap.contiguous()
    given = (target.contiguous() if matrix.ndim == 2 else None), torch.zeros_like(gap), gap
    verdict = target.new_empty(batch)
    room = slots or min(m, FIRST_SLOTS)
    while True:
        index, inverse = target.new_empty(batch, room), gap.new_empty(batch, room, room)
        outputs = torch.empty_like(gap), gap.new_empty(6, batch), verdict
        task = Task(batch, m, *map(address, given), max_pivots=max_pivots, slots=room)
        task.multipliers, task.numbers, task.status = map(address, outputs)
        task.index, task.inverse = address(index), address(inverse)
        needed = solve(shared, task)
        if needed <= room:
            break
        room = needed
    return index, inverse, (verdict & FEASIBLE) > 0, (verdict & CONVERGED) > 0
