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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from lrqp_torch import models
from lrqp_torch.activations import capture
from lrqp_torch.baselines import (
    BASELINES,
    DAS,
    Baseline,
    BaselineData,
    Behaviour,
    Paired,
    answer_loss,
    build,
)
from lrqp_torch.edit import LRQP
from lrqp_torch.errors import LRQPError, MissingExtraError, ModelError, SettingError
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.ioi import IOIDataset, swap_order
from lrqp_torch.models.organisms import ORGANISMS
from lrqp_torch.study.clock import Clock
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.controls.running import Trial, run_trials
from lrqp_torch.study.drawing import require_matplotlib
from lrqp_torch.study.flipping import fit_edits, flipped
from lrqp_torch.study.preparing import choose_device, choose_sites, make_prompts, name_task
from lrqp_torch.study.progress import progress_bars
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.truth import KnownSites, read_truth
from lrqp_torch.study.verdicts_counting import (
    NOT_USED,
    PROBE,
    UNCLEAR,
    USED,
    SiteScores,
    VerdictsResult,
    count_all,
)
from lrqp_torch.study.verdicts_figures import draw
from lrqp_torch.versions import package_versions

CONDITIONS = ("control", "counterfactual")
JSON_FILE, TABLE_FILE = "verdicts.json", "verdicts.csv"


@dataclass(frozen=True)
class VerdictSettings:
    """What is asked for.

    Attributes:
        out: folder for the results; made if needed.
        models: names of models, or folders, separated by commas; each needs its ground truth.
        methods: ``all`` (without DAS), or names of baselines separated by commas.
        das: whether DAS, which is trained through the model at every site, is among all.
        n: prompts of each draw, half to fit on and half held out.
        seeds: draws.
        seed: of the first; the others follow.
        prefixes: as of the study.
        sites: as of the study.
        batch_size: prompts a forward pass.
        device: ``auto``, or a torch device.
        figures: whether to draw.
    """

    out: Path
    models: str = ",".join(ORGANISMS)
    methods: str = "all"
    das: bool = False
    n: int = 200
    seeds: int = 3
    seed: int = 0
    prefixes: str = "none"
    sites: str = "all"
    batch_size: int = 64
    device: str = "auto"
    figures: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            SettingError: a number out of its range, a method that does not exist, or no model.
        """
        if self.seeds < 1:
            raise SettingError(f"seeds must be at least 1, not {self.seeds}.")
        if self.batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.n < 8:
            raise SettingError(f"n must be at least 8, not {self.n}: half of them are held out.")
        if not self.model_names():
            raise SettingError(f"no model given; name some, such as {', '.join(ORGANISMS)}.")
        unknown = [name for name in self._named() if name not in BASELINES]
        if unknown or not self.method_names():
            found = f"unknown method {unknown[0]!r}" if unknown else "no method given"
            raise SettingError(f"{found}; choose from {', '.join(BASELINES)}, or say all.")

    def model_names(self) -> list[str]:
        """The models asked for."""
        return [name.strip() for name in self.models.split(",") if name.strip()]

    def method_names(self) -> list[str]:
        """The methods asked for, in the order of the table."""
        named = self._named()
        every = [name for name in BASELINES if name != DAS.name or self.das]
        return every if "all" in self.methods.split(",") else [n for n in BASELINES if n in named]

    def command(self) -> str:
        """The command that gives these numbers, without the folder."""
        given = {
            "--models": self.models,
            "--methods": self.methods,
            "--n": self.n,
            "--seeds": self.seeds,
            "--seed": self.seed,
            "--prefixes": self.prefixes,
            "--sites": self.sites,
            "--batch-size": self.batch_size,
        }
        words = " ".join(f"{name} {value}" for name, value in given.items())
        return f"lrqp verdicts {words}{' --das' if self.das else ''} --out DIR"

    def study(self, model: str, seed: int) -> Settings:
        """The study's settings for one model and one draw."""
        return Settings(
            model=model,
            out=self.out,
            n=self.n,
            prefixes=self.prefixes,
            sites=self.sites,
            seed=seed,
            batch_size=self.batch_size,
            device=self.device,
        )

    def _named(self) -> list[str]:
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        return [name for name in names if name != "all"]


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


def score_sites(
    context: StudyContext, truth: KnownSites, methods: Sequence[str], name: str
) -> tuple[list[SiteScores], dict[str, str]]:
    """Scores of one model on one draw of prompts.

    Args:
        context: the model, its prompts and sites.
        truth: where it uses the order.
        methods: names of baselines.
        name: of the model, for the scores.

    Returns:
        A score for each site in order, and the methods that could not be built with the reason.
    """
    train, test = context.task.train, context.task.test
    y = train.labels["abb"].to(context.device)
    labels = test.labels["abb"].to(context.device).long()
    x_train = context.activations(context.task, "train", "S2")
    x_test = context.activations(context.task, "test", "S2")
    paired_train, paired_test = (_swapped(context, data) for data in (train, test))
    other = _same_order(test, context.generator()).to(context.device)
    edits = fit_edits(x_train, y)
    trials: dict[tuple[str, str, str], Trial] = {}
    problems: dict[str, str] = {}
    for site in context.sites:
        data = BaselineData(
            x=x_train[site],
            y=y,
            reference=edits[site],
            paired=paired_train[site],
            behaviour=_behaviour(context, site),
            seed=context.seed,
        )
        x = x_test[site]
        partners = {"control": x[other], "counterfactual": paired_test[site]}
        for method in (method for method in methods if method not in problems):
            try:
                edit = build(method, data)
            except MissingExtraError as error:
                problems[method] = " ".join(str(error).split())
                continue
            for condition, target in zip(CONDITIONS, (labels, 1 - labels), strict=True):
                delta = _displace(edit, x, target, labels, partners[condition])
                trials[site, method, condition] = Trial(site, delta)
    clean, runs = _run(context, trials)
    built = [method for method in methods if method not in problems]
    return [
        SiteScores(
            model=name,
            seed=context.seed,
            site=site,
            truth=_truth_at(truth, site),
            probe_accuracy=_accuracy(edits[site], x_test[site], labels),
            control={m: flipped(clean, runs[site, m, "control"]) for m in built},
            counterfactual={m: flipped(clean, runs[site, m, "counterfactual"]) for m in built},
        )
        for site in context.sites
    ], problems


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


def _truth_at(truth: KnownSites, site: str) -> str:
    if site in truth.unclear_at:
        return UNCLEAR
    return USED if site in truth.used_at else NOT_USED


def _swapped(context: StudyContext, data: IOIDataset) -> dict[str, Tensor]:
    """Activations at S2 of each prompt's minimal pair, by site, (n, d) each."""
    found = capture(
        context.model,
        swap_order(data).inputs,
        context.sites,
        data.positions["S2"],
        batch_size=context.batch_size,
    )
    return {site: values.float() for site, values in found.items()}


def _same_order(data: IOIDataset, generator: torch.Generator) -> Tensor:
    """For each prompt the row of another one with the same order, (n,)."""
    labels = data.labels["abb"].cpu()
    other = torch.arange(len(labels))
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        other[rows] = rows.roll(1)
    return other


def _behaviour(context: StudyContext, site: str) -> Behaviour:
    train = context.task.train.to(context.device)
    return Behaviour(
        model=context.model,
        inputs=train.inputs,
        site=site,
        positions=train.positions["S2"],
        loss=answer_loss(train.positions["END"], train.s_tokens),
        batch_size=min(32, context.batch_size),
    )


@torch.no_grad()
def _displace(
    edit: Baseline, x: Tensor, target: Tensor, source: Tensor, partners: Tensor
) -> Tensor:
    """What an edit adds to activations (n, d), in float64."""
    bound = edit.paired(partners) if isinstance(edit, Paired) else edit
    moved: Tensor = bound(x, target, source).double()
    return moved - x.double()


def _run(
    context: StudyContext, trials: Mapping[tuple[str, str, str], Trial]
) -> tuple[Tensor, dict[tuple[str, str, str], Tensor]]:
    """Logit differences of the clean run and of each trial; equal trials run once.

    Edits that do nothing, and methods that do the same whatever the target, need no run of theirs.
    """
    chosen: list[Trial] = []
    same: dict[tuple[str, str, str], int | None] = {}
    for (site, method, condition), trial in trials.items():
        twin = trials[site, method, CONDITIONS[0]]
        if not bool(trial.delta.any()):
            same[site, method, condition] = None
        elif condition != CONDITIONS[0] and torch.equal(twin.delta, trial.delta):
            same[site, method, condition] = same[site, method, CONDITIONS[0]]
        else:
            same[site, method, condition] = len(chosen)
            chosen.append(trial)
    clean, runs = run_trials(context, chosen)
    return clean, {key: clean if at is None else runs[at] for key, at in same.items()}


def _accuracy(edit: LRQP, x: Tensor, labels: Tensor) -> float:
    return edit.probe.accuracy(x, labels)


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
