"""Knowable is not used: how often "used here" is right, on models of which the truth is known.

On each model, with each draw of prompts, every edit is made at every site, towards the true order
(control) and towards the other one (counterfactual). A site is said to be used by an edit where

    flipped(counterfactual) − flipped(control) ≥ ½,

the study's own rule, and by the probe's accuracy alone where that is 90 % or more on held-out
prompts. The truth is in the file beside the model's weights, ``ground_truth.json``: it was found by
exchanging whole activations between two prompts of a minimal pair, on prompts of its own. A full
patch does the same, so its row checks the truth more than it competes. Its control writes another
prompt of the same order, and with it other names, which by itself may break answers.

Sites of one model and draws of its prompts are not independent, so the intervals over both together
are narrower than those over new models would be.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lrqp_torch import models
from lrqp_torch.baselines import BASELINES
from lrqp_torch.edits.provenance import package_versions
from lrqp_torch.errors import LRQPError, ModelError
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.models.organisms import ORGANISMS
from lrqp_torch.study.clock import Clock
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.drawing import require_matplotlib
from lrqp_torch.study.preparing import choose_device, choose_sites, make_prompts, name_task
from lrqp_torch.study.progress import progress_bars
from lrqp_torch.study.truth import KnownSites, read_truth
from lrqp_torch.study.verdicts_counting import (
    PROBE,
    SiteScores,
    VerdictsResult,
    count_all,
)
from lrqp_torch.study.verdicts_figures import draw
from lrqp_torch.study.verdicts_scoring import score_sites
from lrqp_torch.study.verdicts_settings import VerdictSettings

JSON_FILE, TABLE_FILE = "verdicts.json", "verdicts.csv"


def judge(settings: VerdictSettings, *, progress: bool = False) -> VerdictsResult:
    """Give every rule's verdict on every site, compare with the truth, and write the results.

    Writes ``verdicts.json``, ``verdicts.csv`` and the figure ``verdicts`` as PNG and SVG.

    Args:
        settings: what is asked for.
        progress: whether to show a progress bar on standard error.

    Raises:
        ModelError: a model cannot be loaded, or nothing is known of where it uses the order.
        LRQPError: any other bad input.
    """
    if settings.figures:
        require_matplotlib()
    prepare_folder(settings.out)
    names = settings.model_names()
    truths = {name: _truth(name) for name in names}
    clock = Clock()
    scores: list[SiteScores] = []
    problems: dict[str, str] = {}
    with progress_bars(enabled=progress) as bars:
        for name in names:
            with clock.stage(Path(name).name):
                found, missing = _scores(settings, name, truths[name], bars)
            scores += found
            problems |= missing
    result = VerdictsResult(
        settings={k: v for k, v in asdict(settings).items() if k not in ("out", "figures")},
        command=settings.command(),
        models={Path(name).name: ORGANISMS.get(name, "") for name in names},
        titles={PROBE: "probe accuracy alone"}
        | {method: BASELINES[method].title for method in settings.method_names()},
        problems=problems,
        scores=scores,
        counts=count_all(scores),
        versions=package_versions(),
        elapsed=clock.seconds(),
    )
    _write(result, settings.out)
    if settings.figures:
        draw(result, settings.out)
    return result


def _scores(
    settings: VerdictSettings, name: str, truth: KnownSites, bars: Progress
) -> tuple[list[SiteScores], dict[str, str]]:
    device = choose_device(settings.device)
    model, tokenizer = models.load(name, device=device)
    bar = bars.add_task(f"judging {Path(name).name}", total=settings.seeds)
    scores: list[SiteScores] = []
    problems: dict[str, str] = {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        study = settings.study(name, seed)
        context = StudyContext(
            model=model,
            task=Task(name_task(study), *make_prompts(tokenizer, study)),
            other_task=None,
            sites=choose_sites(model, settings.sites),
            batch_size=settings.batch_size,
            seed=seed,
            device=device,
        )
        found, missing = score_sites(context, truth, settings.method_names(), Path(name).name)
        scores += found
        problems |= missing
        bars.advance(bar, 1)
    return scores, problems


def _truth(name: str) -> KnownSites:
    truth = read_truth(name)
    if truth is None:
        raise ModelError(
            f"nothing is known of where {name!r} uses the order: give bundled organisms "
            f"({', '.join(ORGANISMS)}), or folders with a ground_truth.json"
        )
    return truth


def _write(result: VerdictsResult, folder: Path) -> None:
    try:
        text = json.dumps(asdict(result), allow_nan=False, ensure_ascii=False, indent=1)
    except ValueError as error:
        raise LRQPError(f"a number of the verdicts is NaN or infinite: {error}") from error
    with written_whole(folder / JSON_FILE) as path:
        path.write_text(text + "\n", encoding="utf-8")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(_table(result))
    with written_whole(folder / TABLE_FILE) as path:
        path.write_text(buffer.getvalue(), encoding="utf-8")


def _table(result: VerdictsResult) -> Iterator[list[Any]]:
    """A line for each rule and model, with the heading first."""
    rates = ("right", "false_positive_rate", "false_negative_rate")
    numbers = ("true_positives", "false_positives", "true_negatives", "false_negatives", "unclear")
    ends = [f"{rate}_{end}" for rate in rates for end in ("share", "lower", "upper")]
    yield ["rule", "model", *numbers, *ends]
    for count in result.counts:
        shares = [getattr(count, rate) for rate in rates]
        values = [v for share in shares for v in (share.value, *share.interval)]
        yield [count.rule, count.model, *(getattr(count, name) for name in numbers), *values]
