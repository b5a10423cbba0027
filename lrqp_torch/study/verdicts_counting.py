"""Rules that turn numbers into the verdict "used here", and how often they are right."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from lrqp_torch.study.estimates import wilson
from lrqp_torch.study.flipping import USED_THRESHOLD

ACCURATE = 0.9
"""Accuracy of a held-out probe from which on accuracy alone would say "used here"."""

PROBE = "probe_accuracy"
"""The rule that asks for the probe's accuracy and for nothing else."""

ALL = "all models"
"""Name of the counts over all models together."""

USED, NOT_USED, UNCLEAR = "used", "not used", "unclear"


@dataclass(frozen=True)
class SiteScores:
    """What was measured at one site of one model, with one draw of prompts.

    Attributes:
        model: name of the model.
        seed: of its prompts and of all else that is drawn.
        site: where.
        truth: ``used``, ``not used`` or ``unclear``, from the file beside the model's weights.
        probe_accuracy: on held-out prompts.
        control: method to the share of answers that its edit towards the true order flips; None
            where no prompt is answered IO to begin with.
        counterfactual: the same towards the other order.
    """

    model: str
    seed: int
    site: str
    truth: str
    probe_accuracy: float
    control: dict[str, float | None]
    counterfactual: dict[str, float | None]

    @property
    def rules(self) -> list[str]:
        """The rules that can be asked here, the probe's accuracy first."""
        return [PROBE, *self.counterfactual]

    def score(self, rule: str) -> float:
        """What a rule compares with its threshold: accuracy, or flips beyond the control's."""
        if rule == PROBE:
            return self.probe_accuracy
        return (self.counterfactual[rule] or 0.0) - (self.control[rule] or 0.0)

    def says_used(self, rule: str) -> bool:
        """The verdict of a rule."""
        return self.score(rule) >= (ACCURATE if rule == PROBE else USED_THRESHOLD)

    def right(self, rule: str) -> bool | None:
        """Whether the verdict is right; None where the truth is unclear."""
        return None if self.truth == UNCLEAR else self.says_used(rule) == (self.truth == USED)


@dataclass(frozen=True)
class Rate:
    """A share with Wilson's 95 % interval.

    Attributes:
        value: the share; None of nothing.
        interval: lower and upper end.
    """

    value: float | None
    interval: list[float]

    @classmethod
    def of(cls, successes: int, n: int) -> Self:
        """A share of n."""
        return cls(successes / n if n else None, list(wilson(successes, n)))


@dataclass(frozen=True)
class Count:
    """How often one rule is right, over sites and seeds.

    Attributes:
        rule: name of the rule or of the edit.
        model: which model, or :data:`ALL`.
        true_positives: said to be used, and used.
        false_positives: said to be used, and not used.
        true_negatives: said not to be used, and not used.
        false_negatives: said not to be used, and used.
        unclear: sites left out, of which the truth is unclear.
        right: share of right verdicts.
        false_positive_rate: of the sites that are not used, those said to be.
        false_negative_rate: of the sites that are used, those said not to be.
    """

    rule: str
    model: str
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    unclear: int
    right: Rate
    false_positive_rate: Rate
    false_negative_rate: Rate

    @classmethod
    def of(cls, rule: str, model: str, scores: Sequence[SiteScores]) -> Self:
        """Count the verdicts of a rule."""
        known = [item for item in scores if item.truth != UNCLEAR]

        def count(truth: str, said: bool) -> int:
            return sum(item.truth == truth and item.says_used(rule) == said for item in known)

        tp, fn = count(USED, True), count(USED, False)
        fp, tn = count(NOT_USED, True), count(NOT_USED, False)
        return cls(
            rule=rule,
            model=model,
            true_positives=tp,
            false_positives=fp,
            true_negatives=tn,
            false_negatives=fn,
            unclear=len(scores) - len(known),
            right=Rate.of(tp + tn, len(known)),
            false_positive_rate=Rate.of(fp, fp + tn),
            false_negative_rate=Rate.of(fn, fn + tp),
        )


@dataclass(frozen=True)
class VerdictsResult:
    """All verdicts.

    Attributes:
        settings: what was asked for, as plain JSON values.
        command: the command that gives the same numbers.
        models: names of the models to what the variable is there, such as ``present``.
        titles: rule to its name in tables.
        problems: methods that could not be built, with the reason.
        scores: by model, seed and site.
        counts: by rule, for each model and for :data:`ALL`.
        versions: of the packages that decide the numbers.
        elapsed: seconds by model, and in all.
    """

    settings: dict[str, Any]
    command: str
    models: dict[str, str]
    titles: dict[str, str]
    problems: dict[str, str]
    scores: list[SiteScores]
    counts: list[Count] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    elapsed: dict[str, float] = field(default_factory=dict)

    def count(self, rule: str, model: str = ALL) -> Count:
        """The counts of one rule."""
        return next(c for c in self.counts if (c.rule, c.model) == (rule, model))


def count_all(scores: Sequence[SiteScores]) -> list[Count]:
    """Counts of every rule, for each model and for all together."""
    rules = scores[0].rules if scores else []
    models = list(dict.fromkeys(item.model for item in scores))
    counts = []
    for rule in rules:
        for model in models:
            own = [item for item in scores if item.model == model]
            counts.append(Count.of(rule, model, own))
        counts.append(Count.of(rule, ALL, scores))
    return counts


def findings(result: VerdictsResult) -> list[str]:
    """What the counts say, in sentences made from the numbers."""
    if not result.counts:
        return []
    rules = list(dict.fromkeys(count.rule for count in result.counts))
    best = max((result.count(rule).right.value or 0.0) for rule in rules)
    leaders = [result.titles[r] for r in rules if (result.count(r).right.value or 0.0) == best]
    lines = [_in_words(result, rule) for rule in ("lrqp", PROBE) if rule in rules]
    lines.append(f"Most often right, in {100 * best:.1f} % of the sites: {', '.join(leaders)}.")
    silent = [
        result.titles[rule]
        for rule in rules
        if result.count(rule).true_positives + result.count(rule).false_positives == 0
    ]
    if silent:
        names = ", ".join(silent)
        lines.append(f"Never say that a site is used, and so are right where none is: {names}.")
    misled = [
        f"{result.titles[rule]} ({count.false_positives} of "
        f"{count.false_positives + count.true_negatives})"
        for rule in rules
        if (count := result.count(rule)).false_positives
    ]
    lines.append(
        f"Sites said to be used that are not: {', '.join(misled)}."
        if misled
        else "No rule says of a site that it is used when it is not."
    )
    return lines


def _in_words(result: VerdictsResult, rule: str) -> str:
    count = result.count(rule)
    right, n = count.right, count.true_positives + count.true_negatives
    total = n + count.false_positives + count.false_negatives
    share = "–" if right.value is None else f"{100 * right.value:.1f} %"
    return (
        f"{result.titles[rule]}: right in {n} of {total} verdicts ({share}, 95 % interval "
        f"{100 * right.interval[0]:.1f} to {100 * right.interval[1]:.1f}), "
        f"false positives: {count.false_positives}, false negatives: {count.false_negatives}."
    )
