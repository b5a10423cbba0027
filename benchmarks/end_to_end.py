"""The whole study by its stages, against its own forward passes and those that no program avoids.

The floor, of ``--parts flipping`` alone, is measured in the same run, before and after the study,
with bare passes of its exact shapes: the prompts to fit on, those held out and the twins of these
once up to the last site, the held-out ones once to the end, and for each site and run (two edits,
the interchange and the null) their suffix through the blocks from the edited one on. A pass from
any block on is interpolated between those from the first and from the last block, since blocks are
alike. With one thread all times are those of the processor.
"""

import tempfile
import time
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.floor import BarePasses, only_blocks
from benchmarks.measure import Row, parse_arguments, report, seconds_of, synchronise
from lrqp_torch import models
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.probes.covariance import Covariance
from lrqp_torch.stream.sites import Site, blocks_of, trunk_of
from lrqp_torch.study import report as study_report
from lrqp_torch.study import run as study
from lrqp_torch.study.preparing import choose_sites, named_task
from lrqp_torch.study.running import in_batches
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.sweep import CONDITIONS, INTERCHANGE, NULL

ADDED = ("covariance", "figures", "report")
"""Stages that the study does not time itself."""
PASSES = "forward passes"
RUNS = len((*CONDITIONS, INTERCHANGE, NULL))
"""Of each prompt at each site."""
IMPORTS = time.process_time()
"""Seconds that this process took until here, for its imports."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            model=arguments.model,
            out=Path(folder) / "study",
            n=arguments.n or (64 if arguments.small else 1000),
            prefixes=arguments.prefixes,
            sites=arguments.sites,
            parts=arguments.parts,
            compare_task=arguments.compare_task,
            device=arguments.device,
        )
        bounded = settings.parts == "flipping" and not settings.compare_task
        before = floor(settings, arguments.device) if bounded else {}
        stages, passes, total = run(settings, arguments.device)
        after = floor(settings, arguments.device) if bounded else {}
    least = {name: (before[name] + after[name]) / 2 for name in before}
    bottom = sum(least.values()) if bounded else None

    def row(what: str, seconds: float, unavoidable: float | None = None) -> Row:
        return {
            "stage": what,
            "seconds": seconds,
            "share of the total, %": 100 * seconds / total,
            "unavoidable passes, seconds": unavoidable,
            "over unavoidable": None if unavoidable is None else seconds / unavoidable,
            "over its own passes": seconds / passes,
        }

    rows = [row(name, seconds, least.get(name)) for name, seconds in stages.items()]
    rows.append(row("everything else", total - sum(stages.values())))
    rows.append(row("total", total, bottom))
    rows.append(row("of it the model's forward passes", passes, bottom))
    report(
        f"lrqp reproduce --model {settings.model} --n {settings.n} --prefixes {settings.prefixes} "
        f"--parts {settings.parts} --sites {settings.sites}",
        rows,
        arguments,
        floor={"before": before, "after": after},
    )


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2-shape", help="as for lrqp reproduce")
    parser.add_argument("--n", type=int, help="prompts, default 1000, 64 with --small")
    parser.add_argument("--prefixes", default="none", help="as for lrqp reproduce")
    parser.add_argument("--sites", default="all", help="as for lrqp reproduce")
    parser.add_argument(
        "--parts", default="flipping", help="as for lrqp reproduce; the floor is flipping's"
    )
    parser.add_argument("--compare-task", action="store_true", help="as for lrqp reproduce")


def run(settings: Settings, device: str) -> tuple[dict[str, float], float, float]:
    """Seconds of each stage, of the model's forward passes within them, and in all with imports."""
    added: dict[str, float] = defaultdict(float)
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    with ExitStack() as stack:
        # What the study says of its own stages.
        stack.enter_context(patch.object(time, "perf_counter", clock))
        stack.enter_context(_passes_timed(added, device))
        for name, owner, function in (
            ("covariance", Covariance, "update"),
            ("covariance", Covariance, "finish"),
            ("figures", study, "write_charts"),
            ("report", study_report, "write_report"),
        ):
            stack.enter_context(_stopwatch(added, name, owner, function, device))
        start = clock()
        results = study.run(settings)
        total = clock() - start
    stages = {name: seconds for name, seconds in results.elapsed.items() if name != "total"}
    # Fitted inside the stage that the study calls "fit".
    stages["probe fits"] = stages.pop("fit") - added["covariance"]
    stages |= {name: added[name] for name in ADDED}
    return {"imports": IMPORTS} | stages, added[PASSES], IMPORTS + total


@contextmanager
def _passes_timed(times: dict[str, float], device: str) -> Iterator[None]:
    """Add up the seconds of the model's own forward passes, of which some end at a site."""
    called, depth = nn.Module.__call__, [0]

    def timed(model: nn.Module, *args: Any, **named: Any) -> Any:
        if depth[0]:  # the trunk within its model
            return called(model, *args, **named)
        found: list[Any] = []
        depth[0], start = 1, time.perf_counter()
        try:
            found.append(called(model, *args, **named))
            synchronise(device)
        finally:
            depth[0] = 0
            times[PASSES] += time.perf_counter() - start
        return found[0]

    with patch.object(PreTrainedModel, "__call__", timed):
        yield


@contextmanager
def _stopwatch(
    times: dict[str, float], name: str, owner: Any, function: str, device: str
) -> Iterator[None]:
    """Add up the seconds spent in a function."""
    original: Callable[..., Any] = getattr(owner, function)

    def timed(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        times[name] += seconds_of(lambda: found.append(original(*args, **kwargs)), device)
        return found[0]

    with patch.object(owner, function, timed):
        yield


@torch.no_grad()
def floor(settings: Settings, device: str) -> dict[str, float]:
    """Seconds of the passes that capture and sweep cannot avoid."""
    model, tokenizer = models.load(settings.model, device=device)
    task = named_task(tokenizer, settings)
    train, test = task.train, task.test
    layers = [Site.parse(site).layer for site in choose_sites(model, settings.sites)]
    times = {"capture": 0.0, "interchange": 0.0, "sweep": 0.0}
    trunk_of(model)(**train[:4].to(device).inputs)
    # Prompts to fit on, those held out, and the twins of these.
    for name, prompts in (("capture", train), ("capture", test), ("interchange", test)):
        for rows in in_batches(torch.arange(len(prompts)), settings.batch_size):
            inputs = prompts[rows].to(device).inputs
            with only_blocks(model, end=max(layers) + 1):
                times[name] += seconds_of(lambda inputs=inputs: trunk_of(model)(**inputs), device)
    # Making the bare passes of a batch has run it once, so they are warm.
    order = torch.argsort(test.positions["S2"], stable=True)
    for rows in in_batches(order, settings.batch_size):
        times["sweep"] += _sweep_floor(model, test[rows].to(device), layers, device)
    return times


def _sweep_floor(model: nn.Module, batch: IOIDataset, layers: list[int], device: str) -> float:
    bare = BarePasses(model, batch.inputs, int(batch.positions["S2"].min()))
    top = len(blocks_of(model)) - 1
    whole = seconds_of(lambda: bare.suffix(0), device)
    last = seconds_of(lambda: bare.suffix(top), device)
    passes = sum(last + (whole - last) * (top - layer) / max(1, top) for layer in layers)
    return seconds_of(bare.clean, device) + RUNS * passes


if __name__ == "__main__":
    main()
