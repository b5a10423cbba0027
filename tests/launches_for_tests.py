"""The GPU's path on a CPU: launches that are done again by addresses alone, as on a GPU."""

import ast
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lrqp_torch import Status
from lrqp_torch.qp import fused


class Elsewhere(Tensor):
    """A tensor that says that it is on another device than the CPU, where nobody looks at it."""

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Parts of it are such tensors too; what a model computes with it is none."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        parts = func.__name__ in ("select", "ne", "cat", "__getitem__")
        return result.as_subclass(cls) if parts else result


def parameters() -> list[str]:
    """The names of what the kernel takes, read from its source, which needs no Triton."""
    tree = ast.parse(Path(fused.__file__).with_name("kernel.py").read_text())
    functions = (item for item in tree.body if isinstance(item, ast.FunctionDef))
    kernel = next(item for item in functions if item.name == "edit_kernel")
    return [argument.arg for argument in kernel.args.args]


NAMES = parameters()
N_TENSORS = NAMES.index("stream_row")


def numbers_at(address: int, dtype: torch.dtype, count: int) -> Tensor:
    """Memory as a tensor, (count,)."""
    held = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(held, dtype=dtype)


class StandIn:
    """Reads what the kernel of one probe reads, and writes what it writes: no least edit, but an
    edit and a record that differ wherever the kernel is given something else.
    """

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self.launch, grid[0])

    def launch(self, count: int, *arguments: Any, **options: Any) -> None:
        given = SimpleNamespace(**dict(zip(NAMES, arguments, strict=True)))
        assert given.V == 0 and given.RECORD and given.AT
        for program in range(count):
            self.program(given, program)

    def program(self, given: SimpleNamespace, i: int) -> None:
        def at(name: str, place: int, n: int = 1) -> Tensor:
            one = getattr(given, name)
            return numbers_at(one.data_ptr() + place * one.element_size(), one.dtype, n)

        def number(name: str, place: int = 0) -> Any:
            return at(name, place).item()

        row, column, width = number("rows", i), number("columns", i), given.D
        own = at("stream", row * given.stream_row + column * given.stream_column, width)
        put = at("out", row * given.out_row + column * given.out_column, width)
        base = torch.zeros_like(own)
        if given.BASE:
            base = at("base", row * given.base_row + column * given.base_column, width)
        chosen = number("which", i) if given.WHICH else i
        target = number("target", chosen * given.class_step)
        source = number("source", chosen * given.source_step) if given.SOURCE else -1
        floor = number("floors", i if given.RULE == "given" else 0)
        shown = number("shown", i) if given.SHOWN else True
        weight, known = (at(name, 0, given.K * width) for name in ("live", "known"))
        bias, known_bias = (at(name, 0, given.K) for name in ("live_bias", "known_bias"))
        stale = not (torch.equal(weight, known) and torch.equal(bias, known_bias))
        weight = weight.reshape(given.K, width).double()
        x = base.double() + given.SCALE * own.double()
        step = weight[target] * (1 + floor + target + 0.1 * source) * (2 + (given.RULE == "fixed"))
        edited = (x + step * at("steering", 0, width).double().abs()).to(put.dtype)
        place = ((edited.double() - base.double()) / given.SCALE).to(put.dtype)
        done = shown and not stale
        if done or given.COPY:
            put.copy_(place if done else own)
        status = Status.SOLVED if done else Status.INVALID if shown else Status.SATISFIED
        numbered = number("index", i) if shown else -1
        odds = [float((weight @ v.double() + bias)[target]) for v in (x, edited)]
        found = *odds, floor, float(step.norm()), float((edited - x).norm()), 0.0
        into = given.certificate.data_ptr() + (given.first + i) * given.row_step * 8
        for n, value in enumerate((*found, int(status), numbered, given.forward_pass)):
            numbers_at(into + n * given.number_step * 8, torch.float64, 1).fill_(float(value))


@contextmanager
def launched_by_address(stands_in: bool = False) -> Iterator[list[int]]:
    """Let edits of a stream go the GPU's way, by a kernel that can run on a CPU.

    Args:
        stands_in: whether that is a :class:`StandIn`, without Triton and its interpreter.

    Yields:
        How many rows each launch had that was done again.
    """
    again: list[int] = []
    first = fused.Launcher._first

    def compiling(
        self: fused.Launcher, tensors: Any, numbers: Any, flags: Any, wide: bool, n: int
    ) -> None:
        """Launch as ever; and keep what does so once more, given addresses."""
        made: list[Any] = []

        class Spy:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                def launch(*arguments: Any, **options: Any) -> None:
                    made.extend(arguments)
                    by[grid](*arguments, **options)

                return launch

        by, self.kernel = self.kernel, Spy()
        try:
            first(self, tensors, numbers, flags, wide, n)
        finally:
            self.kernel = by
        kinds = [tensor.dtype for tensor in made[:N_TENSORS]]

        def run(count: int, *rest: Any) -> None:
            # Grid, stream, function, metadata and hooks come before what the kernel takes.
            given = rest[len(rest) - len(NAMES) :]
            tensors = map(numbers_at, given[:N_TENSORS], kinds, [1] * N_TENSORS)
            again.append(count)
            by[(count,)](*tensors, *given[N_TENSORS:])

        if wide:
            fixed = tuple(part.data_ptr() for part in self.constants)
            constants = tuple(made[N_TENSORS + len(numbers) :])
            self.compiled[flags] = run, None, None, fixed, constants

    with (
        mock.patch.object(fused.Launcher, "_first", compiling),
        mock.patch.object(torch._C, "_cuda_getDevice", lambda: -1, create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
    ):
        if not stands_in:
            yield again
            return
        types = SimpleNamespace(float64="", float32="", bfloat16="", float16="")
        module = SimpleNamespace(edit_kernel=StandIn(), tl=types)
        with (
            mock.patch.object(fused, "interpreted", lambda: True),
            mock.patch.object(fused, "kernels", lambda: module),
            # It edits streams alone; solves go by operations.
            mock.patch.object(fused, "places", lambda _: False),
        ):
            yield again
