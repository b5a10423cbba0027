"""A small study, made up, and its report; some of its prompts try to break out of the page."""

from pathlib import Path

import torch
from torch import Tensor

from lrqp_torch.plot.chart import Chart, Marks, Pane, Panel, Table
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.indirect_objects import WORDS
from lrqp_torch.study.known import PUBLISHED
from lrqp_torch.study.parts import find_part
from lrqp_torch.study.report import about
from lrqp_torch.study.report.page import Chapter, write_page
from lrqp_torch.study.results import (
    CleanResult,
    ConditionResult,
    PromptTexts,
    SiteResult,
    StudyResults,
)

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
    return Estimate(value, value - 0.125, value + 0.125, N)


def study_results() -> StudyResults:
    def condition(flipped: float, difference: float) -> ConditionResult:
        return ConditionResult(
            logit_difference=number(difference),
            accuracy=number(1 - flipped),
            flipped=number(flipped),
            divergence=number(0.5),
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
        task="plain",
        words=WORDS,
        classes=["BAB", "ABB"],
        data={"train": N, "test": N},
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


def two_panes() -> Chart:
    panes = [
        Pane([Marks(name, [0.0, 1.0, 2.0], [0.0, 1.0, 4.0])], title=title, x_title="across")
        for name, title in (("first", "one"), ("second", "two"))
    ]
    return Chart(panes, columns=2)


def sweep_panels(results: StudyResults) -> list[Panel]:
    """What the sweep shows below the first screen."""
    flipping = find_part("flipping")
    return flipping.panels(flipping.found(results))


def chapters() -> list[Chapter]:
    many = ", ".join(f"L{layer}.H{head}" for layer in range(9) for head in range(4))
    table = Table(
        columns=("head <i>", "score", "note"),
        rows=(("L1.H2", 0.5, "b"), ("L10.H1", -3.25, many), ("L2.H0", None, "<u>c</u>")),
    )
    return [
        Chapter(
            "Flipping the answer",
            "First paragraph.\n\nSecond, with <em>.",
            ["It flips <q>.", "And more."],
            sweep_panels(study_results()),
        ),
        Chapter(
            "Heads",
            "",
            [],
            [
                Panel("heads-table", "Scores of heads", "A table.", table=table),
                Panel("heads-panes", "Two panes", "Side by side.", charts={"": two_panes()}),
            ],
        ),
    ]


def write(folder: Path, *others: Chapter, results: StudyResults | None = None) -> Path:
    """The report of the study, with the chapters above or others."""
    path, shown = folder / "report.html", results or study_results()
    write_page(path, list(others) or chapters(), **about(shown, folder))
    return path
