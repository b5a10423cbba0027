"""How time and memory grow with prompts, activations, classes, width, sites and tokens.

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
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measure import Row, parse_arguments, report, seconds_of, synchronise
from lrqp_torch import LRQP, LinearProbe, Mahalanobis

STEEPER = 0.35
"""A slope that differs this much from the one before it is a knee."""

BUDGET = 0.8
"""Seconds to repeat a point for, where one run takes less."""


@dataclass(frozen=True)
class Size:
    """What is fitted, solved and generated.

    Attributes:
        prompts: n, to fit on.
        classes: K.
        width: d.
        sites: how many times.
        batch: B, activations that are edited at once.
        tokens: generated, each of them edited.
    """

    prompts: int = 2000
    classes: int = 2
    width: int = 256
    sites: int = 1
    batch: int = 2000
    tokens: int = 16


@dataclass(frozen=True)
class Sweep:
    """One axis, the values on it, what holds meanwhile, and the steps that are run."""

    axis: str
    base: Size
    values: tuple[int, ...]
    steps: tuple[str, ...]


FITS, SOLVES = ("fit probe", "fit covariance"), ("solve", "solve, with gradient")
FULL = (
    Sweep("prompts", Size(), (100, 300, 1000, 3000, 10_000, 30_000, 100_000), FITS),
    Sweep("batch", Size(classes=10, width=768), (1, 4, 16, 64, 256, 1024, 4096, 16384), SOLVES),
    Sweep("classes", Size(prompts=5000), (2, 5, 10, 20, 50, 100), FITS),
    Sweep(
        "classes",
        Size(width=768, batch=256),
        (2, 5, 10, 20, 50, 100, 200, 500, 1000),
        (*SOLVES, "set up"),
    ),
    Sweep(
        "width",
        Size(prompts=1000, batch=1000),
        (128, 256, 512, 1024, 2048, 4096, 8192),
        (*FITS, *SOLVES),
    ),
    Sweep("sites", Size(prompts=1000, batch=1000), (1, 4, 12, 24, 48, 96), (*FITS, *SOLVES)),
    Sweep("tokens", Size(), (8, 16, 32, 64, 128, 256, 512), ("generate",)),
)
SMALL = (
    Sweep("prompts", Size(width=64), (100, 1000, 10_000), FITS),
    Sweep("batch", Size(classes=10, width=64), (1, 32, 1024), SOLVES),
    Sweep("classes", Size(prompts=1000, width=64), (2, 5, 10), (*FITS, *SOLVES, "set up")),
    Sweep("width", Size(prompts=200, batch=200), (64, 256, 1024), (*FITS, *SOLVES)),
    Sweep("sites", Size(prompts=200, width=64, batch=200), (1, 4, 12), (*FITS, *SOLVES)),
    Sweep("tokens", Size(), (8, 32, 128), ("generate",)),
)
TINY = (
    Sweep("prompts", Size(width=16), (50, 200), FITS),
    Sweep("classes", Size(width=16, batch=4), (2, 3), (*SOLVES, "set up")),
    Sweep("tokens", Size(), (2, 4), ("generate",)),
)
REASONS = {
    "prompts": "before, calls of fixed cost take the time; from there n d of the products, or n d²",
    "batch": "before, calls of fixed cost take the time; from there B d of the products",
    "classes": "K² d once for the distances of classes, and B K for every pivot",
    "width": "d² and d³: products with Σ, and the Cholesky factor that checks it",
    "sites": "no count of operations says so: a busy machine, or data beyond the cache",
    "tokens": "attention to the tokens before: T² in all",
}
"""What the counts of operations say where time begins to grow faster."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    rows: list[Row] = []
    for sweep in TINY if arguments.tiny else SMALL if arguments.small else FULL:
        for step in sweep.steps:
            sizes = [replace(sweep.base, **{sweep.axis: value}) for value in sweep.values]
            points = [apart(partial(STEPS[step], size), arguments) for size in sizes]
            rows += _curve(sweep.axis, step, sweep.values, points)
    report("Growth of time and peak memory", rows, arguments)
    for line in knees(rows):
        print(line)
    if arguments.plot is not None:
        plot(rows, arguments.plot)


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG")
    parser.add_argument("--tiny", action="store_true", help="points of milliseconds, for tests")


def activations(size: Size, count: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Activations of every site, (count, d) each in float32, and their labels.

    Classes whose means lie some standard deviations apart, with decaying variances.
    """
    generator = torch.Generator().manual_seed(0)
    labels, scale = torch.arange(count) % size.classes, _scale(size)
    found = []
    for _ in range(size.sites):
        means = torch.randn(size.classes, size.width, generator=generator)
        x = torch.randn(count, size.width, generator=generator)
        found.append(x.add_(means[labels]).mul_(scale).to(device))
    return found, labels.to(device)


def _scale(size: Size) -> Tensor:
    return torch.arange(1, size.width + 1).float().rsqrt()


def parts(size: Size, device: str) -> tuple[LinearProbe, Mahalanobis]:
    """A random probe, not fitted: what a solve costs depends on its shape; and a metric."""
    probe = LinearProbe(size.width, size.classes).requires_grad_(False)
    return probe.to(device), Mahalanobis(torch.diag(_scale(size).square().double()).to(device))


Run = Callable[[], object]
OPTIONS: dict[str, Any] = {"log_odds": 2.0, "on_infeasible": "skip"}


def _fit_probe(size: Size, device: str) -> Run:
    found, labels = activations(size, size.prompts, device)
    return lambda: LinearProbe.fit_many({site: (x, labels) for site, x in enumerate(found)})


def _fit_covariance(size: Size, device: str) -> Run:
    found, _ = activations(size, size.prompts, device)
    return lambda: [Mahalanobis.fit(x) for x in found]


def _set_up(size: Size, device: str) -> Run:
    found, labels = activations(size, 1, device)
    made = parts(size, device)
    return lambda: LRQP(*made, **OPTIONS)(found[0], (labels + 1) % size.classes)


def _solve(size: Size, device: str, *, gradient: bool = False) -> Run:
    found, labels = activations(size, size.batch, device)
    target = (labels + 1) % size.classes
    edits = [LRQP(*parts(size, device), **OPTIONS) for _ in found]

    def run() -> None:
        for edit, x in zip(edits, found, strict=True):
            edited = edit(x, target)
            if gradient:
                torch.autograd.grad(edited, x, x)

    if gradient:
        for x in found:
            x.requires_grad_()
    for edit, x in zip(edits, found, strict=True):
        edit(x[:1], target[:1])  # set up
    return run


def _generate(size: Size, device: str) -> Run:
    config = GPT2Config(
        vocab_size=99, n_layer=2, n_embd=32, n_head=2, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval().to(device)
    model.generation_config.pad_token_id = 0
    edit = LRQP(*parts(replace(size, width=32), device), **OPTIONS)
    ids = torch.arange(16, device=device).reshape(2, 8)
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}

    def run() -> object:
        with edit.at(model, "L1.pre", positions="generated", target=1) as edited:
            model.generate(ids, max_new_tokens=size.tokens, **options)
        return edited.distance

    return run


STEPS: dict[str, Callable[[Size, str], Run]] = {
    "fit probe": _fit_probe,
    "fit covariance": _fit_covariance,
    "set up": _set_up,
    "solve": _solve,
    "solve, with gradient": partial(_solve, gradient=True),
    "generate": _generate,
}


def apart(prepare: Callable[[str], Run], arguments: Namespace) -> tuple[float, float]:
    """Seconds and MiB of what is prepared; on the CPU in a process of its own."""
    if arguments.device != "cpu":
        return _point(prepare, arguments.device)
    # Nothing has run on threads before the fork, so the child's own pool of them is sound.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, prepare, arguments))
    child.start()
    sender.close()
    try:
        found: tuple[float, float] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{prepare} failed, or ran out of memory") from None
    finally:
        child.join()
    return found


def _send(sender: Any, prepare: Callable[[str], Run], arguments: Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    budget = 0.0 if getattr(arguments, "tiny", False) else BUDGET
    sender.send(_point(prepare, arguments.device, budget))


def _point(
    prepare: Callable[[str], Run], device: str, budget: float = BUDGET
) -> tuple[float, float]:
    run = prepare(device)
    gc.collect()
    synchronise(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    held = _memory(device)
    seconds = spent = seconds_of(run, device)
    peak = _memory(device) - held
    # The best of several where that is cheap; memory is that of the first time.
    while spent < budget:
        again = seconds_of(run, device)
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
            for number, step in enumerate(STEPS):
                curve = [row for row in rows if (row["axis"], row["step"]) == (axis, step)]
                if not curve:
                    continue
                panel.plot(
                    [row["value"] for row in curve],
                    # What is below the resolution of memory has no logarithm.
                    [max(row[quantity], 0.1 if line else 0.0) for row in curve],
                    marker="o",
                    label=step,
                    color=f"C{number}",
                )
            panel.set(xscale="log", yscale="log", xlabel=axis)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(quantity)
    drawn = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=len(drawn))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
