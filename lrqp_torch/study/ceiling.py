"""What the effect of an edit is held against: its ceiling, its null, and the verdict of both.

The *ceiling* is the interchange: the activation of a prompt's twin, which differs in the variable
alone, put in the place of the prompt's own. It carries all that the place knows of the variable, so
the share of its effect that an edit recovers says how much of that the edit writes,

    recovered = mean(clean − edit) / mean(clean − interchange)

of the preference for the answer that holds. By the natural way no edit does more; one that does is
*beyond its own patch* (Makelov et al. 2023, arXiv 2311.17030).

The *null* is an edit of the same length, prompt by prompt, by a probe of shuffled labels. A site is
*used* where the counterfactual edit flips more answers than the null does, by an exact paired test
(Holm-corrected over the sites), and lowers the preference more than any one of the shuffled probes
does on the prompts that met it. The second condition is for sites at which the probe reads nothing:
its own direction is then one more by chance, and may be a strong one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.study.estimates import Estimate, Sample, holm, prompts_to_tell, sign_test

K = TypeVar("K")
Columns = Mapping[str, Tensor]
"""What is known of each prompt, (n,) by name: the preference, leads, distance, ..."""

LEVEL = 0.05
"""P values below this count."""
ROUNDING = 1e-3
"""What an edit may be longer than its patch, as a share: the patch itself, put in place by another
way, is as long but for rounding."""
PROBES = 20
"""Probes of shuffled labels behind the null: the least number of which none doing as much as the
edit has a chance below :data:`LEVEL`, 1 / 21."""
FEWEST_PROMPTS = 20
"""Held-out prompts that each of them meets, if they are so many in all."""


# ---- the ceiling ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interchange:
    """The activation of each prompt's twin, put in the place of its own."""

    prompts: int  # held-out prompts that have a twin; all numbers are of these
    # Of those answered with the class that holds, the share then answered with the twin's; None for
    # a task without answers.
    flipped: Estimate | None
    logit_difference: Estimate | None  # mean preference for the class that holds; None likewise
    divergence: Estimate  # mean KL(clean ‖ interchange) of the next token, in nats
    # Mean Mahalanobis distance of the twin's activation; None where no prompt has a twin, or where
    # a twin is out of the range of a singular metric.
    distance: float | None


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How an edit compares with the interchange of the same prompts, of those that have a twin."""

    # Share of the interchange's effect; None where the 95 % interval of that effect includes 0, or
    # there are no answers.
    recovered: Estimate | None = None
    # Share of prompts to which both give the same answer: that of the class that holds, of the
    # other one, or of a third.
    agreement: Estimate | None = None
    # Mean KL(interchange ‖ edit) of the next token at the end, in nats.
    kl_to_interchange: Estimate | None = None
    beyond: str | None = None  # why the edit is beyond its own patch; None where it is not


def interchange_of(clean: Columns, patch: Columns, own: Sample) -> Interchange:
    """Summarise an interchange of the prompts that have a twin, ``own``.

    Of the clean run logit_difference and own_lead are known, nothing without answers; of the patch
    these, other_lead, divergence, and distance.
    """
    answered, lengths = bool(clean), own.of(patch["distance"])
    distance = float(lengths.mean())
    return Interchange(
        prompts=len(lengths),
        flipped=own.flipped(clean, patch) if answered else None,
        logit_difference=own.mean(patch["logit_difference"]) if answered else None,
        divergence=own.mean(patch["divergence"]),
        distance=distance if math.isfinite(distance) else None,
    )


def likenesses(
    clean: Columns, pairs: Mapping[K, tuple[Columns, Columns]], own: Sample
) -> dict[K, dict[str, Any]]:
    """The fields of :class:`Likeness` of edits that are shown together.

    ``pairs`` holds each edit, with kl_to_interchange and distance, and its interchange; the rest
    as of :func:`interchange_of`.
    """
    answered = bool(clean)

    def of(edit: Columns, patch: Columns) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "kl_to_interchange" in edit:
            found["kl_to_interchange"] = own.mean(edit["kl_to_interchange"])
        if not answered:
            return found
        most = clean["logit_difference"] - patch["logit_difference"]
        if own.mean(most).certain:
            found["recovered"] = own.ratio(
                clean["logit_difference"] - edit["logit_difference"], most
            )
        same = [(edit[lead] > 0) == (patch[lead] > 0) for lead in ("own_lead", "other_lead")]
        return found | {"agreement": own.share(torch.stack(same).all(0))}

    p_values = holm({k: excess(clean, *pair, own) for k, pair in pairs.items() if answered})

    def why(key: K, edit: Columns, patch: Columns) -> str | None:
        reasons = []
        if p_values.get(key, 1.0) < LEVEL:
            more, most = (100 * (own.flipped(clean, one).value or 0.0) for one in (edit, patch))
            reasons.append(f"flips {more:.0f} %, its own patch {most:.0f} %")
        length, longest = (float(own.of(one["distance"]).mean()) for one in (edit, patch))
        if length > longest * (1 + ROUNDING):
            reasons.append(f"is {length:.1f} sd long, its own patch {longest:.1f}")
        return " and ".join(reasons) or None

    return {key: of(*pair) | {"beyond": why(key, *pair)} for key, pair in pairs.items()}


def held_against(
    clean: Columns, edits: Mapping[K, Columns], patch: Columns, own: Sample
) -> tuple[Interchange, dict[K, dict[str, Any]]]:
    """An interchange, and how edits compare with it; see both functions above."""
    pairs = {key: (edit, patch) for key, edit in edits.items()}
    return interchange_of(clean, patch, own), likenesses(clean, pairs, own)


def excess(clean: Columns, edit: Columns, other: Columns, own: Sample) -> float:
    """P of so many more flips by an edit than by its interchange, or a null, if as likely."""
    answered = own.among(clean["own_lead"] > 0)
    return sign_test(*(answered.of(one["other_lead"] > 0) for one in (edit, other)))


# ---- the null ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Null:
    """Edits of probes of shuffled labels, each as long as the study's own of the same prompt."""

    probes: int  # how many of them
    flipped: Estimate  # share of the answers that they flip, over all prompts that each met
    logit_difference: Estimate  # mean preference for the class that holds, over the same
    # Of the probes, how many lower the preference at least as much as the study's edit does on the
    # same prompts.
    as_strong: int


@dataclass(frozen=True)
class Verdict:
    """Whether the model uses the variable at a site."""

    used: bool  # the adjusted P value is below `LEVEL`, and no shuffled probe is as strong
    # Of the counterfactual edit flipping no more answers than the null: exact, paired, one-sided.
    p_value: float
    p_adjusted: float  # for the number of sites, by Holm's method
    # To tell half of the ceiling from the ceiling, see `prompts_to_tell`; None where the
    # interchange does nothing.
    prompts_needed: int | None


def turns(n: int, generator: torch.Generator) -> list[Tensor]:
    """Which shuffled probe each of n prompts meets, (n,), in each of the null's runs.

    Each probe meets as many prompts as any other, within one, in each run; there are as many runs
    as it takes for :data:`FEWEST_PROMPTS` prompts a probe, two at most.
    """
    runs = min(max(1, -(-PROBES * FEWEST_PROMPTS // max(n, 1))), 2)
    first = torch.randperm(n, generator=generator) % PROBES
    return [(first + run * PROBES // runs) % PROBES for run in range(runs)]


def shuffled(labels: Tensor, generator: torch.Generator, probes: int = PROBES) -> list[Tensor]:
    """Labels in random order, (n,) each."""
    return [
        labels[torch.randperm(len(labels), generator=generator).to(labels.device)]
        for _ in range(probes)
    ]


def null_edits(
    probes: Iterable[nn.Module],
    metric: Mahalanobis,
    target: Tensor,
    source: Tensor,
    length: Tensor,
    turn: Tensor,
) -> Tensor:
    """Displacements Σ (w_t − w_v) of shuffled probes, as long as asked for, (n, d) in float64.

    For two classes that is the direction of the probe's own least edit, but for the rounding of its
    weights to bfloat16. Σ is that of the metric, which also measures the ``length``, (n,); t is the
    target and v the source of each prompt, (n,), and ``turn`` says which probe it meets, (n,).
    """
    # Rounded: the last bits of a fit differ with the number of ranks, and are not to decide.
    weights = torch.stack([cast(nn.Linear, probe).weight.bfloat16().double() for probe in probes])
    turn = turn.to(weights.device)
    rows = weights[turn, target.to(turn)] - weights[turn, source.to(turn)]
    return scaled(metric, rows @ metric.covariance.to(rows), length)


def scaled(metric: Mahalanobis, delta: Tensor, length: Tensor) -> Tensor:
    """Displacements with the Mahalanobis length asked for, (n, d); 0 where they have none."""
    own = metric.distance(delta)
    scale = torch.where(own > 0, length.to(own) / own.clamp_min(torch.finfo(own.dtype).tiny), 0.0)
    return delta * scale.unsqueeze(-1)


def null_of(
    clean: Columns, edit: Columns, runs: Sequence[Columns], seed: int, groups: Tensor | None = None
) -> Null:
    """Summarise the null: ``runs`` of it, each with ``probe``, what each prompt met."""
    own = Sample(seed, None if groups is None else groups.repeat(len(runs)))
    whole = {name: torch.cat([run[name] for run in runs]) for name in runs[0]}
    before = {name: values.repeat(len(runs)) for name, values in clean.items()}
    met = whole["probe"].long()
    # Positive where the edit lowers the preference more than the null does.
    lead = whole["logit_difference"] - edit["logit_difference"].repeat(len(runs))
    sums = torch.zeros(int(met.max()) + 1, dtype=lead.dtype).index_add_(0, met, lead)
    return Null(
        probes=len(met.unique()),
        flipped=own.flipped(before, whole),
        logit_difference=own.mean(whole["logit_difference"]),
        as_strong=int((sums[met.unique()] <= 0).sum()),
    )


def verdicts(
    p_values: Mapping[K, float], nulls: Mapping[K, Null], needed: Mapping[K, int | None]
) -> dict[K, Verdict]:
    """The verdict at each of several sites, corrected for their number."""
    return {
        key: Verdict(p < LEVEL and nulls[key].as_strong == 0, p_values[key], p, needed[key])
        for key, p in holm(p_values).items()
    }


def needed_for_half(clean: Columns, edit: Columns, patch: Columns, known: Tensor) -> int | None:
    """Prompts that it takes to tell half of the ceiling from the ceiling."""
    fall, most = (
        (clean["logit_difference"] - one["logit_difference"])[known] for one in (edit, patch)
    )
    return prompts_to_tell(fall, most)
