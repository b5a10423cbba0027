"""Running all illusion controls of the edit at one site."""

from typing import NamedTuple

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import UnknownFamilyError
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.study.context import Advance, StudyContext, evenly, no_progress
from lrqp_torch.study.controls.chance import (
    Chance,
    Examples,
    by_chance,
    cosines,
    half_edits,
    whitened,
)
from lrqp_torch.study.controls.outcomes import (
    ControlsResult,
    Elsewhere,
    Halves,
    Measuring,
    Part,
    Split,
)
from lrqp_torch.study.controls.readers import (
    Space,
    class_mean_space,
    random_space,
    reader_spaces,
)
from lrqp_torch.study.controls.running import Trial, displacements, run_trials
from lrqp_torch.study.controls.splitting import along, direction_of, split
from lrqp_torch.study.flipping import fit_edits
from lrqp_torch.study.heads import HeadsResult

SEEDS = 5
"""Draws of everything that is drawn by chance."""

MOST_SITES = 12
"""At most so many other sites, evenly spaced."""

AS_ACCURATE = 0.01
"""A probe is as accurate as the best site's if it is right in no fewer prompts than this less."""


class _Site(NamedTuple):
    """Edit, examples and counterfactual displacements at one site."""

    edit: LRQP
    train: Examples
    test: Examples
    delta: Tensor


def work(context: StudyContext) -> int:
    """Units that :func:`compute` counts: every held-out prompt once."""
    return len(context.task.test)


@torch.no_grad()
def compute(
    context: StudyContext,
    site: str,
    edit: LRQP,
    heads: HeadsResult,
    *,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    seeds: int = SEEDS,
    advance: Advance = no_progress,
) -> ControlsResult:
    """Run the controls of the counterfactual edit at one site.

    Args:
        context: the model and its prompts.
        site: where the edit acts, at S2.
        edit: fitted to the training prompts at that site, as by :func:`~.flipping.fit_edits`.
        heads: the heads and their roles.
        l2: penalty of the probes that are fitted here.
        shrinkage: of the covariances that are estimated here.
        seeds: how often each kind of chance is drawn; at least 1.
        advance: called with the number of prompts after each batch.
    """
    others = [name for name in evenly(context.sites, MOST_SITES) if name != site]
    sites = _sites(context, site, edit, others, l2, shrinkage)
    here = sites[site]
    trials = {"counterfactual": Trial(site, here.delta)}
    back = displacements(edit, here.test.x, here.test.y, here.test.y)
    trials["control"] = Trial(site, back)

    spaces, unread = _spaces(context, site, heads, here.train)
    parts = {space.name: split(here.delta, space.rows) for space in spaces}
    for name, (inside, outside) in parts.items():
        trials[f"split {name} inside"] = Trial(site, inside)
        trials[f"split {name} outside"] = Trial(site, outside)
    for name in others:
        trials[f"moved {name}"] = Trial(name, here.delta)
        trials[f"fitted {name}"] = Trial(name, sites[name].delta)
    drawn = by_chance(
        edit,
        here.train,
        here.test,
        here.delta,
        seeds=[context.seed + index for index in range(seeds)],
        l2=l2,
    )
    for kind, draws in drawn.items():
        for index, chance in enumerate(draws):
            trials[f"chance {kind} {index}"] = Trial(site, chance.delta)
    halves = half_edits(edit, here.train, seed=context.seed, l2=l2, shrinkage=shrinkage)
    half_deltas = [
        displacements(half, here.test.x, 1 - here.test.y, here.test.y) for _, half in halves
    ]
    for index, delta in enumerate(half_deltas):
        trials[f"half {index}"] = Trial(site, delta)

    clean, runs = run_trials(context, list(trials.values()), advance)
    edited = dict(zip(trials, runs, strict=True))
    measuring = Measuring(clean, edited["counterfactual"], context.seed)
    own = direction_of(here.delta, here.delta)
    return ControlsResult(
        site=site,
        prompts=len(clean),
        answered=int((clean > 0).sum()),
        seed=context.seed,
        probe_accuracy=edit.probe.accuracy(here.test.x, here.test.y),
        clean=measuring.mean(clean),
        distance=float(edit.metric.distance(here.delta).mean()),
        euclidean=float(here.delta.norm(dim=-1).mean()),
        counterfactual=measuring.outcome(edited["counterfactual"]),
        control=measuring.outcome(edited["control"]),
        whole=None if own is None else along(own, here.test.x, here.delta, here.test.y),
        splits=[_split(space, parts[space.name], here, edited, measuring) for space in spaces],
        unread=unread,
        elsewhere=[_elsewhere(name, sites[name], here, edited, measuring) for name in others],
        chance=[
            measuring.by_chance(
                kind,
                [edited[f"chance {kind} {index}"] for index in range(seeds)],
                length=_relative_length(edit, torch.cat([c.delta for c in draws]), here.delta),
                accuracy=_mean_accuracy(draws),
            )
            for kind, draws in drawn.items()
        ],
        halves=_halves(halves, half_deltas, here, edited, measuring) if halves else None,
    )


def _sites(
    context: StudyContext,
    site: str,
    edit: LRQP,
    others: list[str],
    l2: float | None,
    shrinkage: Shrinkage,
) -> dict[str, _Site]:
    task, wanted = context.task, [site, *others]
    train, test = (context.activations(task, half, "S2", wanted) for half in ("train", "test"))
    y_train, y_test = (data.labels.to(context.device).long() for data in (task.train, task.test))
    edits = {site: edit}
    if others:
        edits |= fit_edits(
            {name: train[name] for name in others},
            y_train,
            l2=l2,
            shrinkage=shrinkage,
            log_odds=float(edit.log_odds),
        )
    return {
        name: _Site(
            edits[name],
            Examples(train[name], y_train),
            Examples(test[name], y_test),
            displacements(edits[name], test[name], 1 - y_test, y_test),
        )
        for name in wanted
    }


def _spaces(
    context: StudyContext, site: str, heads: HeadsResult, train: Examples
) -> tuple[list[Space], str]:
    """Subspaces to split by, and why those of readers are missing."""
    unread = ""
    try:
        spaces = reader_spaces(context.model, site, heads)
    except UnknownFamilyError as error:
        spaces, unread = [], str(error)
    if spaces:
        spaces.append(random_space(spaces[0], context.generator()))
    return [*spaces, class_mean_space(train.x, train.y)], unread


def _split(
    space: Space,
    parts: tuple[Tensor, Tensor],
    here: _Site,
    edited: dict[str, Tensor],
    measuring: Measuring,
) -> Split:
    def part(delta: Tensor, place: str) -> Part:
        direction = direction_of(delta, here.delta)
        return Part(
            share=_mean_ratio(delta.square().sum(-1), here.delta.square().sum(-1)),
            mahalanobis=_relative_length(here.edit, delta, here.delta),
            along=None if direction is None else along(direction, here.test.x, delta, here.test.y),
            outcome=measuring.outcome(edited[f"split {space.name} {place}"]),
        )

    return Split(
        space=space.name,
        reads=space.reads,
        dimensions=len(space.rows),
        width=space.rows.shape[1],
        rank=space.rank,
        energy=space.energy,
        inside=part(parts[0], "inside"),
        outside=part(parts[1], "outside"),
    )


def _elsewhere(
    name: str, there: _Site, here: _Site, edited: dict[str, Tensor], measuring: Measuring
) -> Elsewhere:
    accuracy = there.edit.probe.accuracy(there.test.x, there.test.y)
    best = here.edit.probe.accuracy(here.test.x, here.test.y)
    return Elsewhere(
        site=name,
        probe_accuracy=accuracy,
        as_accurate=accuracy >= best - AS_ACCURATE,
        cosine=float(cosines(here.delta, there.delta).mean()),
        moved=measuring.outcome(edited[f"moved {name}"]),
        fitted=measuring.outcome(edited[f"fitted {name}"]),
    )


def _halves(
    halves: list[tuple[int, LRQP]],
    deltas: list[Tensor],
    here: _Site,
    edited: dict[str, Tensor],
    measuring: Measuring,
) -> Halves:
    target = 1 - here.test.y
    crossed = [
        other.probe.log_odds(here.test.x.double() + delta, target)
        for (_, other), delta in zip(halves[::-1], deltas, strict=True)
    ]
    first, second = (edited[f"half {index}"] for index in range(2))
    return Halves(
        prompts=[count for count, _ in halves],
        accuracy=[half.probe.accuracy(here.test.x, here.test.y) for _, half in halves],
        cosine=float(cosines(*deltas).mean()),
        cosine_mahalanobis=float(cosines(*(whitened(here.edit, delta) for delta in deltas)).mean()),
        outcomes=[measuring.outcome(first), measuring.outcome(second)],
        same_answer=float(((first > 0) == (second > 0)).double().mean()),
        believed=[float((odds > 0).double().mean()) for odds in crossed],
        log_odds=[float(odds.double().mean()) for odds in crossed],
    )


def _mean_accuracy(draws: list[Chance]) -> float | None:
    known = [chance.accuracy for chance in draws if chance.accuracy is not None]
    return sum(known) / len(known) if known else None


def _relative_length(edit: LRQP, delta: Tensor, whole: Tensor) -> float:
    """Mean Mahalanobis length as a share of the whole's."""
    longest = edit.metric.distance(whole).mean()
    return float(edit.metric.distance(delta).mean() / longest) if longest > 0 else 0.0


def _mean_ratio(above: Tensor, below: Tensor) -> float:
    """Mean of ratios over the rows where the denominator is not 0; 0 where there are none."""
    some = below > 0
    return float((above[some] / below[some]).mean()) if bool(some.any()) else 0.0
