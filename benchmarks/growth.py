"""How time and memory of fitting and solving grow with prompts, classes, width and sites.

Activations are synthetic. Every point is measured in a process of its own, forked after the
imports, so that its peak resident memory (``ru_maxrss``, which also sees what numpy and LAPACK
allocate, as torch's profiler would not) is that of this point alone; what is reported is the peak
above what the process held with its data in place. On a GPU the peak is that of torch's allocator.
"""

import gc
import math
import multiprocessing
import resource
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, parse_arguments, report, synchronise
from lrqp_torch import LRQP, LinearProbe, Mahalanobis

STEEPER = 0.35
"""A slope that differs this much from the one before it is a knee."""

BUDGET = 0.3
"""Seconds to repeat a point for, where one run takes less."""


@dataclass(frozen=True)
class Size:
    """What is fitted and solved.

    Attributes:
        prompts: n.
        classes: K.
        width: d.
        sites: how many times.
    """

    prompts: int = 2000
    classes: int = 2
    width: int = 256
    sites: int = 1


AXES: dict[str, tuple[Size, tuple[int, ...]]] = {
    "prompts": (Size(), (100, 300, 1000, 3000, 10_000, 30_000, 100_000)),
    "classes": (Size(prompts=5000), (2, 5, 10, 20, 50, 100)),
    "width": (Size(prompts=1000), (128, 256, 512, 1024, 2048, 4096, 8192)),
    "sites": (Size(prompts=1000), (1, 4, 12, 24, 48, 96)),
}
SMALL: dict[str, tuple[Size, tuple[int, ...]]] = {
    "prompts": (Size(width=64), (100, 1000, 10_000)),
    "classes": (Size(prompts=1000, width=64), (2, 5, 10)),
    "width": (Size(prompts=200), (64, 256, 1024)),
    "sites": (Size(prompts=200, width=64), (1, 4, 12)),
}
TINY: dict[str, tuple[Size, tuple[int, ...]]] = {
    "prompts": (Size(prompts=50, width=16), (50, 200)),
    "sites": (Size(prompts=50, width=16), (1, 2)),
}
REASONS = {
    "prompts": "before, calls of fixed cost take the time; from there n d of the products, or n d²",
    "classes": "K² d once for the distances of classes, and B K for every pivot",
    "width": "d² and d³: products with Σ, and the Cholesky factor that checks it",
    "sites": "no count of operations says so: a busy machine, or data beyond the cache",
}
"""What the counts of operations say where time begins to grow faster."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    axes = TINY if arguments.tiny else SMALL if arguments.small else AXES
    rows: list[Row] = []
    for axis, (base, values) in axes.items():
        points = [replace(base, **{axis: value}) for value in values]
        measured = [_apart(point, arguments) for point in points]
        for step in STEPS:
            rows += _curve(axis, step, values, [point[step] for point in measured])
    report("Growth of time and peak memory", rows, arguments)
    for line in knees(rows):
        print(line)
    if arguments.plot is not None:
        plot(rows, arguments.plot)


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG")
    parser.add_argument("--tiny", action="store_true", help="points of milliseconds, for tests")


def _fit_probe(data: "Data") -> object:
    return LinearProbe.fit_many({site: (x, data.labels) for site, x in enumerate(data.activations)})


def _fit_covariance(data: "Data") -> object:
    return [Mahalanobis.fit(x) for x in data.activations]


def _solve(data: "Data") -> object:
    return [edit(x, data.target) for edit, x in zip(data.edits, data.activations, strict=True)]


@dataclass
class Data:
    """Activations of every site, (n, d) each in float32, with their labels."""

    activations: list[Tensor]
    labels: Tensor
    target: Tensor
    edits: list[LRQP]

    @classmethod
    def random(cls, size: Size, device: str, *, edited: bool) -> "Data":
        """Classes whose means lie some standard deviations apart, with decaying variances.

        The probes of the edits are not fitted but random: what a solve costs depends on their
        shape.
        """
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(size.prompts) % size.classes
        scale = torch.arange(1, size.width + 1).float().rsqrt()
        activations, edits = [], []
        for _ in range(size.sites):
            means = torch.randn(size.classes, size.width, generator=generator)
            x = torch.randn(size.prompts, size.width, generator=generator)
            x.add_(means[labels]).mul_(scale)
            activations.append(x.to(device))
            if edited:
                probe = LinearProbe(size.width, size.classes).requires_grad_(False)
                metric = Mahalanobis(torch.diag(scale.square().double()))
                edit = LRQP(probe, metric, log_odds=2.0, on_infeasible="skip")
                edits.append(edit.to(device))
        target = (labels + 1) % size.classes
        return cls(activations, labels.to(device), target.to(device), edits)


STEPS: dict[str, Callable[[Data], object]] = {
    "fit probe": _fit_probe,
    "fit covariance": _fit_covariance,
    "solve": _solve,
}


def _apart(size: Size, arguments: Namespace) -> dict[str, tuple[float, float]]:
    """Seconds and MiB of every step at one size; on the CPU each in a process of its own."""
    return {step: _measured(step, size, arguments) for step in STEPS}


def _measured(step: str, size: Size, arguments: Namespace) -> tuple[float, float]:
    if arguments.device != "cpu":
        return _point(step, size, arguments.device, arguments.threads)
    # Nothing has run on threads before the fork, so the child's own pool of them is sound.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_send, args=(sender, step, size, arguments.device, arguments.threads)
    )
    child.start()
    sender.close()
    try:
        found: tuple[float, float] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{step} at {size} failed, or ran out of memory") from None
    finally:
        child.join()
    return found


def _send(sender: Any, step: str, size: Size, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send(_point(step, size, device, threads))


@torch.no_grad()
def _point(step: str, size: Size, device: str, threads: int) -> tuple[float, float]:
    run = partial(STEPS[step], Data.random(size, device, edited=step == "solve"))
    gc.collect()
    synchronise(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    held = _memory(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    seconds = time.perf_counter() - start
    peak = _memory(device) - held
    # The best of several where that is cheap; memory is that of the first time.
    spent = seconds
    while spent < BUDGET:
        start = time.perf_counter()
        run()
        synchronise(device)
        again = time.perf_counter() - start
        seconds, spent = min(seconds, again), spent + again
    return seconds, peak


def _memory(device: str) -> float:
    """Peak memory so far, MiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _curve(
    axis: str, step: str, values: Sequence[int], points: Sequence[tuple[float, float]]
) -> list[Row]:
    """One line a point, with the log-log slope from the point before it."""
    rows: list[Row] = []
    for index, (value, (seconds, memory)) in enumerate(zip(values, points, strict=True)):
        slope = memory_slope = None
        if index:
            before, (earlier, smaller) = values[index - 1], points[index - 1]
            ratio = math.log(value / before)
            slope = math.log(seconds / earlier) / ratio
            if min(memory, smaller) >= 1:
                memory_slope = math.log(memory / smaller) / ratio
        rows.append(
            {
                "step": step,
                "axis": axis,
                "value": value,
                "milliseconds": seconds * 1e3,
                "slope of time": slope,
                "peak memory, MiB": memory,
                "slope of memory": memory_slope,
            }
        )
    return rows


def knees(rows: Sequence[Row]) -> list[str]:
    """Where time begins to grow faster, and what the counts say about it."""
    lines = []
    for axis, step in dict.fromkeys((row["axis"], row["step"]) for row in rows):
        curve = [row for row in rows if (row["axis"], row["step"]) == (axis, step)]
        slopes = [(row["value"], row["slope of time"]) for row in curve[1:]]
        found = [
            f"{earlier:.2f} to {later:.2f} at {value}"
            for (_, earlier), (value, later) in pairwise(slopes)
            if later - earlier > STEEPER
        ]
        overall = math.log(curve[-1]["milliseconds"] / curve[0]["milliseconds"]) / math.log(
            curve[-1]["value"] / curve[0]["value"]
        )
        text = f"{step} over {axis}: time grows as {axis}^{overall:.2f} in all"
        if found:
            reason = REASONS[axis]
            text += f"; steeper from {', from '.join(found)} ({reason})"
        lines.append(text)
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time and memory over every axis, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = pyplot.subplots(
        2, len(axes), figsize=(4 * len(axes), 6.5), squeeze=False, layout="constrained"
    )
    for column, axis in enumerate(axes):
        for line, quantity in enumerate(("milliseconds", "peak memory, MiB")):
            panel = panels[line][column]
            for step in STEPS:
                curve = [row for row in rows if (row["axis"], row["step"]) == (axis, step)]
                panel.plot(
                    [row["value"] for row in curve],
                    [max(row[quantity], 0.1) for row in curve],
                    marker="o",
                    label=step,
                )
            panel.set(xscale="log", yscale="log", xlabel=axis)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(quantity)
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
