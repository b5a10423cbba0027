"""A small study, made up, and its report; some of its prompts try to break out of the page."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.study.drawing import NOTE
from lrqp_torch.study.flipping_view import answers_panel, sweep_panel
from lrqp_torch.study.html import Section, write_report
from lrqp_torch.study.interactive import add_line, new_figure
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.prompt_texts import PromptTexts
from lrqp_torch.study.published import PUBLISHED
from lrqp_torch.study.results import CleanResult, ConditionResult, SiteResult, StudyResults

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
        io_names=["Mary"] * N,
        s_names=["John"] * N,
        positions={"IO": [2] * N, "S1": [4] * N, "S2": [9] * N, "END": [13] * N},
    )


def prompt_tensors() -> dict[str, Tensor]:
    clean = torch.linspace(0.5, 4.5, N, dtype=torch.float64)
    tensors = {"clean.logit_difference": clean}
    for index, site in enumerate(SITES):
        tensors[f"{site}.control.logit_difference"] = clean
        tensors[f"{site}.counterfactual.logit_difference"] = clean * (1 - index)
    return tensors


def study_results() -> StudyResults:
    def condition(flipped: float, difference: float) -> ConditionResult:
        return ConditionResult(
            logit_difference=difference,
            accuracy=1 - flipped,
            flipped=flipped,
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
            probe_accuracy=(0.5, 0.99, 1.0)[index],
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
        clean=CleanResult(prompts=N, logit_difference=2.5, accuracy=1.0, io_probability=0.8),
        sites=sites,
        used_sites=["L2.pre"],
        best_site="L2.pre",
        ground_truth=None,
        published=PUBLISHED,
        versions={"python": "3.x", "torch": "2.x"},
        elapsed={"sweep": 1.5, "total": 2.5},
        parts={},
    )


def two_panes() -> Any:
    figure = new_figure(x_title="across", y_title="up", panes=("one", "two"))
    for column, name in ((1, "first"), (2, "second")):
        add_line(figure, name, [0, 1, 2], [0.0, 1.0, 4.0], colour=NOTE, pane=(1, column))
    return figure


def sections() -> list[Section]:
    results = study_results()
    table = Table(
        columns=("head <i>", "score", "note"),
        rows=(("L1.H2", 0.5, "b"), ("L10.H1", -3.25, "a"), ("L2.H0", None, "<u>c</u>")),
    )
    return [
        Section(
            "Flipping the answer",
            "First paragraph.\n\nSecond, with <em>.",
            [
                sweep_panel(results.clean, results.sites, results.used_sites),
                answers_panel(results.sites, "L2.pre", prompt_tensors(), texts()),
            ],
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
