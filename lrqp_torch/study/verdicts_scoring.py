"""Every edit at every site of one model, on one draw of prompts: how many answers flip."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrqp_torch.baselines import (
    Baseline,
    BaselineData,
    Behaviour,
    Paired,
    answer_loss,
    build,
)
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import MissingExtraError
from lrqp_torch.stream.capture import capture
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.controls.running import Trial, run_trials
from lrqp_torch.study.flipping import fit_edits, flipped
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.truth import KnownSites
from lrqp_torch.study.verdicts_counting import (
    NOT_USED,
    UNCLEAR,
    USED,
    SiteScores,
)

CONDITIONS = ("control", "counterfactual")


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
    y = train.labels.to(context.device)
    labels = test.labels.to(context.device).long()
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


def _truth_at(truth: KnownSites, site: str) -> str:
    if site in truth.unclear_at:
        return UNCLEAR
    return USED if site in truth.used_at else NOT_USED


def _swapped(context: StudyContext, data: IOIPrompts) -> dict[str, Tensor]:
    """Activations at S2 of each prompt's minimal pair, by site, (n, d) each."""
    found = capture(
        context.model,
        data.twins().inputs,
        context.sites,
        data.positions["S2"],
        batch_size=context.batch_size,
    )
    return {site: values.float() for site, values in found.items()}


def _same_order(data: IOIPrompts, generator: torch.Generator) -> Tensor:
    """For each prompt the row of another one with the same order, (n,)."""
    labels = data.labels.cpu()
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
