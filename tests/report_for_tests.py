"""A small study, made up, and its report; some of its prompts try to break out of the page."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.study.drawing import NOTE
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.html import Section, write_report
from lrqp_torch.study.indirect_objects import WORDS
from lrqp_torch.study.interactive import add_line, new_figure
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.parts.flipping import PART as FLIPPING
from lrqp_torch.study.prompt_texts import PromptTexts
from lrqp_torch.study.published import PUBLISHED
from lrqp_torch.study.results import CleanResult, ConditionResult, SiteResult, StudyResults
from lrqp_torch.study.run import _shown as shown

SITES = ("L0.pre", "L1.mid", "L2.pre")
HOSTILE = (
    '<script>window.broken = "script"</script>',
    '"><img src=x onerror="window.broken = 1">',
    "</script><!-- <b>bold</b> & more",
)
N = 40


def texts() -> PromptTexts:
    prompts = [f"Then Mary and John went out {row}, John gave a drink to" for row in range(N)]
    for row, hostile in enumerate(HOSTILE):
        prompts[row] = f"{hostile} {prompts[row]}"
    return PromptTexts(
        prompts=prompts,
        held=["Mary"] * N,
        other=["John"] * N,
        positions={"IO": [2] * N, "S1": [4] * N, "S2": [9] * N, "END": [13] * N},
    )


def prompt_tensors() -> dict[str, Tensor]:
    clean = torch.linspace(0.5, 4.5, N, dtype=torch.float64)
    tensors = {"clean.logit_difference": clean}
    for index, site in enumerate(SITES):
        tensors[f"{site}.control.logit_difference"] = clean
        tensors[f"{site}.counterfactual.logit_difference"] = clean * (1 - index)
    return tensors


def number(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, N)


def study_results() -> StudyResults:
    def condition(flipped: float, difference: float) -> ConditionResult:
        return ConditionResult(
            logit_difference=number(difference),
            accuracy=number(1 - flipped),
            flipped=number(flipped),
            divergence=number(0.25),
            distance=2.0,
            euclidean=3.0,
            worst_log_odds_margin=1e-6,
            skipped=0,
            solved=N,
            infeasible=0,
            inaccurate=0,
        )

    sites = {
        site: SiteResult(
            probe_accuracy=number((0.5, 0.99, 1.0)[index]),
            shuffled_accuracy=number(0.5),
            control=condition(0.0, 2.5),
            counterfactual=condition((0.0, 0.125, 1.0)[index], 2.5 * (1 - index)),
            worst_log_odds_margin=1e-6,
        )
        for index, site in enumerate(SITES)
    }
    return StudyResults(
        settings={"model": "organism", "n": 80, "prefixes": "<i>none</i>", "seed": 7, "l2": None},
        model={"name": "<b>tiny</b>", "class": "GPT2LMHeadModel", "parameters": 1_228_544},
        data={"train": N, "test": N},
        task="plain",
        words=WORDS,
        classes=["BAB", "ABB"],
        majority=0.5,
        answered=Estimate.count(N, N),
        clean=CleanResult(N, number(2.5), Estimate.count(N, N), number(0.8)),
        sites=sites,
        used_sites=["L2.pre"],
        best_site="L2.pre",
        ground_truth=None,
        published=PUBLISHED,
        versions={"python": "3.x", "torch": "2.x"},
        elapsed={"sweep": 1.5, "total": 2.5},
        parts={},
        prompts=prompt_tensors(),
        texts=texts(),
    )


def two_panes() -> Any:
    figure = new_figure(x_title="across", y_title="up", panes=("one", "two"))
    for column, name in ((1, "first"), (2, "second")):
        add_line(figure, name, [0, 1, 2], [0.0, 1.0, 4.0], colour=NOTE, pane=(1, column))
    return figure


def sections() -> list[Section]:
    table = Table(
        columns=("head <i>", "score", "note"),
        rows=(("L1.H2", 0.5, "b"), ("L10.H1", -3.25, "a"), ("L2.H0", None, "<u>c</u>")),
    )
    return [
        Section(
            "Flipping the answer",
            "First paragraph.\n\nSecond, with <em>.",
            [shown(panel) for panel in FLIPPING.panels(FLIPPING.found(study_results()))],
        ),
        Section(
            "Heads",
            "",
            [
                Panel("heads-table", "Scores of heads", "A table.", table=table),
                Panel("heads-panes", "Two panes", "Side by side.", figures={"": two_panes()}),
            ],
        ),
    ]


def write(folder: Path) -> Path:
    path = folder / "report.html"
    write_report(path, study_results(), sections())
    return path
