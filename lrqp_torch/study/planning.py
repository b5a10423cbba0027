"""What a study would do, and about how long it would take: found by a trial on a few prompts."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lrqp_torch.errors import LRQPError
from lrqp_torch.stream.progress import in_time, progress_bars
from lrqp_torch.study.context import StudyContext, Task, evenly
from lrqp_torch.study.part import Given
from lrqp_torch.study.parts import PARTS, find_part
from lrqp_torch.study.preparing import describe_model, prepare
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.results import PROMPTS_FILE, RESULTS_FILE
from lrqp_torch.study.run import choose, edits_of, run_parts
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.showing import plural
from lrqp_torch.study.store import PartStore

TRIED_SITES = 2
FEWEST = 16
"""Prompts of each half in the trial, at least; a whole batch where that takes not too long."""
PASSES, PATIENCE = 60, 20.0
"""About how often a prompt runs in the trial, and how many seconds that may take."""


@dataclass(frozen=True)
class Plan:
    """What a study would do."""

    model: dict[str, Any]  # as in its results
    data: dict[str, int]  # number of prompts to fit on (`train`) and held out (`test`)
    sites: list[str]  # which would be edited
    # Part to the seconds that it would take, about; None where the trial was too small for it to
    # run.
    parts: dict[str, float | None]
    files: list[str]  # what would be written, in `out`
    out: str  # the folder

    @property
    def seconds(self) -> float:
        """All parts of which the time is known, together."""
        return sum(filter(None, self.parts.values()))

    def in_words(self) -> Iterator[str]:
        """The plan as lines."""
        model, sites = self.model, self.sites
        yield (
            f"Would study {model['name']} ({model['class']}, {model['parameters']:,} parameters, "
            f"{model['device']}) on {self.data['train']} prompts to fit on and "
            f"{self.data['test']} held out, at {plural(len(sites), 'site')}"
            + (f": {sites[0]}." if len(sites) == 1 else f" from {sites[0]} to {sites[-1]}.")
        )
        for name, seconds in self.parts.items():
            yield f"  {name}: {'unknown' if seconds is None else f'about {in_time(seconds)}'}"
        unknown = " and what is unknown" if None in self.parts.values() else ""
        yield (
            f"In all about {in_time(self.seconds)}{unknown}, as scaled from a trial on a few "
            "prompts."
        )
        yield f"Would write {', '.join(self.files)} to {self.out}; nothing is written now."


def plan(settings: Settings, *, progress: bool = False) -> Plan:
    """Load the model and the prompts of a study, and try each of its parts on few of them.

    The time of a part is that of the trial times the work that it has on all prompts and sites, in
    the units of its progress bar.

    Raises:
        LRQPError: what :func:`~.run.run` would refuse before it began.
    """
    with progress_bars(enabled=progress) as start:
        context = prepare(settings, start)
        names = choose(settings.parts, context)
        count = _affordable(context)
        few = replace(
            context,
            task=_few(context.task, count),
            other_task=None if context.other_task is None else _few(context.other_task, count),
            sites=evenly(context.sites, TRIED_SITES),
        )
        advance = start("trying the parts", len(names))
        parts = dict.fromkeys(names) | _try(few, context, settings, names)
        advance(len(names))
    return Plan(
        model=describe_model(context.model, settings.model),
        data={"train": len(context.task.train), "test": len(context.task.test)},
        sites=context.sites,
        parts=parts,
        files=[RESULTS_FILE, PROMPTS_FILE]
        + ["figures as PNG and SVG"] * settings.figures
        + ["report.html"] * settings.report,
        out=str(settings.out),
    )


def _try(
    few: StudyContext, whole: StudyContext, settings: Settings, names: list[str]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    with TemporaryDirectory() as folder:
        store = PartStore(Path(folder), {})
        given = Given(few, settings, None, edits_of(few, settings))
        for part in (find_part(name) for name in PARTS if name in names):
            began = time.perf_counter()
            try:
                run_parts(given, [find_part(n) for n in (*found, part.name)], store)
            except LRQPError:
                continue
            took = time.perf_counter() - began
            found[part.name] = round(
                took * part.work(part.scope(whole)) / max(part.work(part.scope(few)), 1), 1
            )
    return found


@torch.no_grad()
def _affordable(context: StudyContext) -> int:
    """How many prompts of each half to try: those that batches of the study have, if there is time.

    A batch has costs of its own, so fewer would make every prompt look dearer.
    """
    inputs = context.task.test[:8].to(context.device).inputs
    context.model(**inputs)  # what happens once is not counted
    began = time.perf_counter()
    context.model(**inputs)
    each = (time.perf_counter() - began) / len(inputs["input_ids"])
    return max(FEWEST, min(context.batch_size, int(PATIENCE / PASSES / max(each, 1e-9))))


def _few(task: Task, count: int) -> Task:
    return Task(task.name, _some(task.train, count), _some(task.test, count))


def _some(prompts: PromptSet, count: int) -> PromptSet:
    """The first prompts of every class, ``count`` in all or two of each."""
    each = max(2, -(-count // len(prompts.classes)))
    rows = [(prompts.labels == label).nonzero()[:each, 0] for label in range(len(prompts.classes))]
    return prompts[torch.cat(rows).sort().values]
