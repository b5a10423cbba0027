"""Which attention heads do what: scores of all heads on clean held-out prompts, and their roles.

A head's direct effect on the answer is its direct logit attribution
(:mod:`lrqp_torch.study.attribution`); where it looks is its mean attention between the tokens of
the task. The rules that turn scores into roles are in :mod:`lrqp_torch.study.roles`.

S-inhibition heads are told by what the name movers do without them: the head's output at END is set
to its mean over prompts, and the name movers' attention to IO less that to S1 is measured again.
No edit of the order takes part in this choice, so that what the edit later does to these heads is
a finding and not how they were chosen.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lrqp_torch.stream.sites import Site
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.estimates import bootstrap_mean
from lrqp_torch.study.head_scores import score_clean
from lrqp_torch.study.heads_figures import draw, panels
from lrqp_torch.study.inhibition import MoverEffect, effects_on_movers
from lrqp_torch.study.roles import (
    EFFECT,
    MOVER,
    ROLES,
    S_INHIBITION,
    WRITER,
    WRITING_EFFECT,
    attend_roles,
    certain_part,
    first_reader,
    mover_roles,
    parse_head,
    published_heads,
)
from lrqp_torch.study.truth import read_truth

__all__ = [
    "HeadScore",
    "HeadsResult",
    "InhibitionTest",
    "TruthCheck",
    "compute",
    "draw",
    "from_json",
    "panels",
    "work",
]


@dataclass(frozen=True)
class InhibitionTest:
    """What the name movers above a head do with its output at END set to its mean over prompts.

    In a model without name movers, the answer writers above it.

    Attributes:
        attention: mean change of their attention END→IO less END→S1.
        attention_interval: its 95 % bootstrap interval.
        writing: mean change of their summed direct effect on IO − S, in logits.
        writing_interval: its 95 % bootstrap interval.
    """

    attention: float
    attention_interval: list[float]
    writing: float
    writing_interval: list[float]


@dataclass(frozen=True)
class HeadScore:
    """One head's scores: means over the held-out prompts.

    Attributes:
        head: such as ``"L9.H6"``.
        attribution: direct effect on the logit difference IO − S at END, in logits.
        attribution_interval: its 95 % bootstrap interval.
        attention: mean attention by the keys of :data:`~.head_scores.ATTENTIONS`.
        test: what the name movers do without the head; None for a head not tested: one with
            END→S2 below :data:`~.roles.ATTENTION`, with no name mover above it, or beyond the
            first :data:`~.inhibition.MOST_TESTED`.
    """

    head: str
    attribution: float
    attribution_interval: list[float]
    attention: dict[str, float]
    test: InhibitionTest | None


@dataclass(frozen=True)
class TruthCheck:
    """Whether the S-inhibition heads found can have read the order where it is known to be used.

    Attributes:
        first_layer: the lowest layer whose attention reads a site at which the order is used.
        last_layer: the lowest layer whose attention reads the last such site.
        agrees: every head found is in ``first_layer`` or above, and some in ``last_layer`` or
            above; None where no head was found.
    """

    first_layer: int
    last_layer: int
    agrees: bool | None


@dataclass(frozen=True)
class HeadsResult:
    """Scores of all heads, and which heads have which role.

    Attributes:
        prompts: held-out prompts.
        logit_difference: mean of IO − S at END, in logits.
        parts: mean shares of it: ``embedding``, ``heads`` with their output biases, ``MLPs`` and
            ``constant``; they add up to it.
        scores: every head, in order of computation.
        found: role to heads found by the program, the strongest first; empty lists for none.
        published: role to published heads, for GPT-2 small only.
        truth: set only for a model whose true sites are known.
    """

    prompts: int
    logit_difference: float
    parts: dict[str, float]
    scores: list[HeadScore]
    found: dict[str, list[str]]
    published: dict[str, list[str]] | None
    truth: TruthCheck | None

    def members(self, role: str) -> list[str]:
        """The heads that the rest of the study means by a role: published ones where there are."""
        known = self.published or {}
        return list(known[role] if role in known else self.found[role])


def work(context: StudyContext) -> int:
    """Units that :func:`compute` counts: every held-out prompt twice."""
    return 2 * len(context.task.test)


@torch.no_grad()
def compute(context: StudyContext, advance: Advance = no_progress) -> HeadsResult:
    """Score all heads on the clean held-out prompts, and give them their roles.

    Args:
        context: the model and its prompts.
        advance: called with the number of units done.

    Raises:
        UnknownFamilyError: the model's attention or final norm is of an unknown form.
    """
    clean = score_clean(context, advance)
    names = clean.names
    attention = {
        name: {key: float(values[:, i].mean()) for key, values in clean.attention.items()}
        for i, name in enumerate(names)
    }
    attribution = {name: float(clean.heads[:, i].mean()) for i, name in enumerate(names)}
    generator = context.generator()
    intervals = {n: list(bootstrap_mean(clean.heads[:, i], generator)) for i, n in enumerate(names)}
    found = attend_roles(attention) | mover_roles(
        {name: attention[name]["END→IO"] for name in names},
        {name: attention[name]["END→S1"] for name in names},
        {name: certain_part(intervals[name]) for name in names},
    )
    published = published_heads(context.model.config)
    movers = (published or found)[MOVER]
    watched = movers or found[WRITER]
    effects = effects_on_movers(context, clean, attention, watched, advance)
    tests = {name: _summarise(effect, generator) for name, effect in effects.items()}
    whole = sum(attribution[name] for name in watched)

    def inhibits(test: InhibitionTest) -> bool:
        if movers:
            return test.attention <= -EFFECT and test.attention_interval[1] < 0
        return test.writing <= -WRITING_EFFECT * whole and test.writing_interval[1] < 0

    inhibiting = [name for name, test in tests.items() if inhibits(test)]
    found[S_INHIBITION] = sorted(inhibiting, key=lambda name: tests[name].writing)
    return HeadsResult(
        prompts=len(context.task.test),
        logit_difference=float(clean.logit_difference.mean()),
        parts={name: float(values.mean()) for name, values in clean.parts.items()},
        scores=[
            HeadScore(
                head=name,
                attribution=attribution[name],
                attribution_interval=intervals[name],
                attention=attention[name],
                test=tests.get(name),
            )
            for name in names
        ],
        found={role: found[role] for role in ROLES},
        published=published,
        truth=_check_truth(context, found[S_INHIBITION]),
    )


def from_json(raw: dict[str, Any]) -> HeadsResult:
    """The result that ``dataclasses.asdict`` turned into ``raw``."""
    truth = raw["truth"]
    nested = {
        "scores": [_read_score(score) for score in raw["scores"]],
        "truth": None if truth is None else TruthCheck(**truth),
    }
    return HeadsResult(**(raw | nested))


def _read_score(raw: dict[str, Any]) -> HeadScore:
    test = raw["test"]
    return HeadScore(**(raw | {"test": None if test is None else InhibitionTest(**test)}))


def _summarise(effect: MoverEffect, generator: torch.Generator) -> InhibitionTest:
    return InhibitionTest(
        attention=float(effect.attention.mean()),
        attention_interval=list(bootstrap_mean(effect.attention, generator)),
        writing=float(effect.writing.mean()),
        writing_interval=list(bootstrap_mean(effect.writing, generator)),
    )


def _check_truth(context: StudyContext, inhibiting: list[str]) -> TruthCheck | None:
    known = read_truth(str(getattr(context.model.config, "_name_or_path", "")))
    if known is None or not known.used_at:
        return None
    readers = [first_reader(site) for site in sorted(map(Site.parse, known.used_at))]
    layers = [parse_head(name)[0] for name in inhibiting]
    return TruthCheck(
        first_layer=readers[0],
        last_layer=readers[-1],
        agrees=(min(layers) >= readers[0] and max(layers) >= readers[-1]) if layers else None,
    )
