"""Is the effect of the edit carried by where the name movers look? The post's open question.

The counterfactual edit at S2 lowers the logit difference LD = IO − S. Two interventions on the
attention from END of a set of heads ask how much of that goes by way of their patterns:

* restored: with the edit, the patterns are set back to those of the clean run,
  (LD(edit + clean patterns) − LD(edit)) / (LD(clean) − LD(edit));
* induced: without the edit, they are set to those under the edit,
  (LD(clean) − LD(clean + edited patterns)) / (LD(clean) − LD(edit)).

Both are ratios of means over prompts: 1 if the patterns carry all of the effect, 0 if none. They
need not agree, nor add up over sets of heads: heads make up for each other, and what a head moves
depends on what is there to be moved. All heads above the site are the ceiling for attention from
END, random heads of equal number the floor.

Source: the question is from the post "Intervening in the Residual Stream" (2023); the two ratios
are the shares of the natural indirect effect from the edited and the clean side, as in Vig et al.
2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis".
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.stream.attention import record_patterns, set_patterns
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.conditions import editing, logit_differences, ordered_batches
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.estimates import bootstrap_mean, bootstrap_ratio, wilson
from lrqp_torch.study.head_groups import head_groups
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.mediation_figures import draw, panels
from lrqp_torch.study.roles import first_reader, parse_head

__all__ = [
    "GroupMediation",
    "MediationResult",
    "Ratio",
    "Share",
    "compute",
    "draw",
    "from_json",
    "panels",
    "work",
]


@dataclass(frozen=True)
class Ratio:
    """A ratio of means over prompts with its 95 % bootstrap interval.

    Attributes:
        value: the ratio.
        interval: lower and upper end.
    """

    value: float
    interval: list[float]


@dataclass(frozen=True)
class Share:
    """A share of prompts with its 95 % Wilson interval.

    Attributes:
        value: the share.
        interval: lower and upper end.
        prompts: of how many.
    """

    value: float
    interval: list[float]
    prompts: int


@dataclass(frozen=True)
class GroupMediation:
    """What the attention patterns of one set of heads carry.

    Attributes:
        group: name of the set.
        heads: its heads in layers that read the edited site or come later; only these can have
            changed, and only these are set.
        logit_difference_restored: mean IO − S with the edit and clean patterns, in logits.
        logit_difference_induced: mean IO − S without the edit and with the edited patterns.
        restored: share of the edit's effect undone; None where the edit has no effect to share,
            that is, where the interval of its mean effect includes 0 or that of the ratio is not
            finite.
        induced: share of the edit's effect brought about; None in the same case.
        answers_restored: of the prompts that the edit flipped from IO to S, those that answer IO
            again; None if it flipped none.
        answers_flipped: of the prompts answered IO in the clean run, those that the edited patterns
            alone flip to S; None if there are none.
    """

    group: str
    heads: list[str]
    logit_difference_restored: float
    logit_difference_induced: float
    restored: Ratio | None
    induced: Ratio | None
    answers_restored: Share | None
    answers_flipped: Share | None


@dataclass(frozen=True)
class MediationResult:
    """The counterfactual edit at one site, and what the patterns of sets of heads carry of it.

    Attributes:
        site: where the belief is edited, at S2.
        prompts: held-out prompts.
        published: whether the heads are the published ones, or found by the program.
        logit_difference_clean: mean IO − S without any intervention, in logits.
        logit_difference_edited: the same under the counterfactual edit.
        effect_interval: 95 % bootstrap interval of the mean of their difference.
        edit_flips: of the prompts answered IO in the clean run, those that the edit flips to S.
        groups: sets of heads.
    """

    site: str
    prompts: int
    published: bool
    logit_difference_clean: float
    logit_difference_edited: float
    effect_interval: list[float]
    edit_flips: Share | None
    groups: list[GroupMediation]


def work(context: StudyContext) -> int:
    """Units that :func:`compute` counts: every held-out prompt once."""
    return len(context.task.test)


@torch.no_grad()
def compute(
    context: StudyContext,
    site: str,
    edit: LRQP,
    heads: HeadsResult,
    advance: Advance = no_progress,
    groups: dict[str, list[str]] | None = None,
) -> MediationResult:
    """Edit the belief, set attention patterns from END, and measure the answer.

    Args:
        context: the model and its prompts.
        site: where to edit, at S2.
        edit: fitted to the training prompts at that site, as by :func:`~.flipping.fit_edits`.
        heads: the heads and their roles.
        advance: called with the number of prompts after each batch.
        groups: sets of heads by name; default :func:`~.head_groups.head_groups`.
    """
    chosen = head_groups(context, site, heads) if groups is None else groups
    lowest = first_reader(site)
    sets = {
        name: [head for head in members if parse_head(head)[0] >= lowest]
        for name, members in chosen.items()
    }
    n = len(context.task.test)
    runs = {name: torch.zeros(n, dtype=torch.float64) for name in ("clean", "edited")}
    restored = {name: torch.zeros(n, dtype=torch.float64) for name in sets}
    induced = {name: torch.zeros(n, dtype=torch.float64) for name in sets}
    for rows in ordered_batches(context):
        _run_batch(context, site, edit, sets, rows, runs, restored, induced)
        advance(len(rows))
    return _summarise(context, site, heads, sets, runs, restored, induced)


def from_json(raw: dict[str, Any]) -> MediationResult:
    """The result that ``dataclasses.asdict`` turned into ``raw``."""

    def read(kind: type, value: dict[str, Any] | None) -> Any:
        return None if value is None else kind(**value)

    groups = [
        GroupMediation(
            **(
                item
                | {name: read(Ratio, item[name]) for name in ("restored", "induced")}
                | {
                    name: read(Share, item[name])
                    for name in ("answers_restored", "answers_flipped")
                }
            )
        )
        for item in raw["groups"]
    ]
    return MediationResult(
        **(raw | {"groups": groups, "edit_flips": read(Share, raw["edit_flips"])})
    )


def _run_batch(
    context: StudyContext,
    site: str,
    edit: LRQP,
    sets: dict[str, list[str]],
    rows: Tensor,
    runs: dict[str, Tensor],
    restored: dict[str, Tensor],
    induced: dict[str, Tensor],
) -> None:
    """Fill in the logit differences of a batch."""
    model, batch = context.model, context.task.test[rows].to(context.device)
    end, first = batch.positions["END"], Site.parse(site).layer
    layers = sorted({parse_head(head)[0] for members in sets.values() for head in members})
    patterns: dict[str, dict[int, Tensor]] = {}
    # One implementation of attention throughout, so that only the interventions differ.
    with record_patterns(model, [], end):
        replay = Replay(model, batch.inputs, int(batch.positions["S2"].min()))
        for name, condition in (("clean", "clean"), ("edited", "counterfactual")):
            with (
                record_patterns(model, layers, end) as patterns[name],
                editing(context, site, edit, batch, condition),
            ):
                runs[name][rows] = logit_differences(replay.run(first), batch)

        def rerun(members: list[str], source: str, condition: str, first_layer: int) -> Tensor:
            rows_of = {
                (layer, head): patterns[source][layer][:, head]
                for layer, head in map(parse_head, members)
            }
            with ExitStack() as stack:
                stack.enter_context(set_patterns(model, rows_of, end))
                stack.enter_context(editing(context, site, edit, batch, condition))
                return logit_differences(replay.run(first_layer), batch)

        for name, members in sets.items():
            restored[name][rows] = rerun(members, "clean", "counterfactual", first)
            # Without the edit nothing changes below the lowest of the heads.
            lowest = min((parse_head(head)[0] for head in members), default=first)
            induced[name][rows] = rerun(members, "edited", "clean", lowest)


def _summarise(
    context: StudyContext,
    site: str,
    heads: HeadsResult,
    sets: dict[str, list[str]],
    runs: dict[str, Tensor],
    restored: dict[str, Tensor],
    induced: dict[str, Tensor],
) -> MediationResult:
    clean, edited = runs["clean"], runs["edited"]
    effect, generator = clean - edited, context.generator()
    low, high = bootstrap_mean(effect, generator)

    def ratio(change: Tensor) -> Ratio | None:
        if low <= 0 <= high:
            return None
        interval = list(bootstrap_ratio(change, effect, generator))
        if not all(map(math.isfinite, interval)):
            return None
        return Ratio(float(change.mean() / effect.mean()), interval)

    answered = clean > 0
    flipped = answered & (edited < 0)
    return MediationResult(
        site=site,
        prompts=len(clean),
        published=heads.published is not None,
        logit_difference_clean=float(clean.mean()),
        logit_difference_edited=float(edited.mean()),
        effect_interval=[low, high],
        edit_flips=_share(edited < 0, answered),
        groups=[
            GroupMediation(
                group=name,
                heads=members,
                logit_difference_restored=float(restored[name].mean()),
                logit_difference_induced=float(induced[name].mean()),
                restored=ratio(restored[name] - edited),
                induced=ratio(clean - induced[name]),
                answers_restored=_share(restored[name] > 0, flipped),
                answers_flipped=_share(induced[name] < 0, answered),
            )
            for name, members in sets.items()
        ],
    )


def _share(counted: Tensor, among: Tensor) -> Share | None:
    n, successes = int(among.sum()), int((counted & among).sum())
    if n == 0:
        return None
    return Share(successes / n, list(wilson(successes, n)), n)
