"""Study contexts on the bundled organism, small enough for tests, and running parts on them."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from prompts_for_tests import names_task

from lrqp_torch import LRQP, models
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.plot.interactive import to_plotly
from lrqp_torch.plot.static import to_matplotlib
from lrqp_torch.study.context import Advance, StudyContext, Task, no_progress
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import Prompt, PromptSet
from lrqp_torch.study.records import to_json
from lrqp_torch.study.settings import Settings

TRAIN, TEST = 240, 120
SITES = ["L0.pre", "L1.mid", "L2.pre", "L3.mid", "L4.pre"]


@cache
def task(name: str) -> Task:
    tokenizer = models.load("organism")[1]
    data = IOIPrompts.of(
        IOIDataset.generate(
            tokenizer,
            TRAIN + TEST,
            3,
            "bundled" if name == "prefixed" else None,
            padding_side="left",
        )
    )
    return Task(name, data[:TRAIN], data[TRAIN:])


@cache
def organism() -> Any:
    return models.load("organism")[0]


def context(name: str = "prefixed", other: str | None = "plain") -> StudyContext:
    return StudyContext(
        model=organism(),
        task=task(name),
        other_task=None if other is None else task(other),
        sites=list(SITES),
        batch_size=50,
        seed=0,
        device=torch.device("cpu"),
    )


@cache
def own_task(n_classes: int = 2, answers: bool = True) -> Task:
    """A task of one's own: the order of two names at S2, or which of some names IO is, at the end.

    The latter have other classes' names as their other answers, and no mark.
    """
    tokenizer = models.load("organism")[1]
    if n_classes == 2:
        prompts = names_task(TRAIN + TEST, answers=answers)
    else:
        drawn = IOIDataset.generate(tokenizer, 4000, 5)
        names = sorted(set(drawn.io_names))[:n_classes]
        said = {name: (f" {name}",) for name in names} if answers else None
        prompts = [
            Prompt(text, io, said)
            for text, io, s in zip(drawn.prompts, drawn.io_names, drawn.s_names, strict=True)
            if io in names and s not in names
        ]
    encoded = PromptSet.encode(tokenizer, prompts)
    half = len(encoded) * TRAIN // (TRAIN + TEST)
    return Task("own", encoded[:half], encoded[half:])


def own_context(n_classes: int = 2, answers: bool = True) -> StudyContext:
    """A study of such a task."""
    own = own_task(n_classes, answers)
    return StudyContext(organism(), own, None, list(SITES), 50, 0, torch.device("cpu"))


def given(
    context: StudyContext,
    site: str | None = None,
    results: Mapping[str, Any] | None = None,
    **options: Any,
) -> Given:
    """What a part builds on; ``options`` are of the edits."""

    def edit_at(name: str) -> LRQP:
        x = context.activations(context.task, "train", "mark", [name])[name]
        return LRQP.fit(x, context.task.train.labels, **options)

    settings = Settings(model="organism", out=Path("unused"))
    return Given(context, settings, site, edit_at, dict(results or {}))


def computed(
    part: Part[Any], context: StudyContext, site: str | None = None, advance: Advance = no_progress
) -> Any:
    """The result of a part that needs no other."""
    return part.compute(given(context, site), advance)


def check(part: Part[Any], result: Any) -> None:
    """What every part promises: strict JSON and back, and charts that can be drawn, with words."""
    assert part.read(json.loads(json.dumps(to_json(result), allow_nan=False))) == result
    for name, chart in part.figures(result).items():
        assert name.startswith(part.name) and chart.title
        to_matplotlib(chart)
    shown = part.panels(result)
    assert len({panel.name for panel in shown}) == len(shown) > 0
    for panel in shown:
        assert panel.title and panel.text and (panel.charts or panel.table)
        assert panel.choice or len(panel.charts) <= 1
        for chart in panel.charts.values():
            assert to_plotly(chart)["data"]
        if panel.table is not None:
            assert panel.table.rows
            assert {len(row) for row in panel.table.rows} == {len(panel.table.columns)}
    assert all(line[-1] in ".:" for line in part.says(result))


class Count:
    """An ``advance`` that adds up."""

    def __init__(self) -> None:
        self.total, self.calls = 0, 0

    def __call__(self, done: int) -> None:
        assert done >= 0
        self.total += done
        self.calls += 1
