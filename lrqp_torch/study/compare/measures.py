"""The measures of the table as figures show them: name, axis title, and where to read them."""

from collections.abc import Callable
from dataclasses import dataclass

from lrqp_torch.study.compare.result import DIVERGENCE, REST, UNSELECTIVE, Effect, MethodResult
from lrqp_torch.study.dose import Mean


@dataclass(frozen=True)
class Measure:
    """One column.

    Attributes:
        title: with units.
        read: gives it for a method that was built.
    """

    title: str
    read: Callable[[MethodResult], Mean | None]


def _effect(
    read: Callable[[Effect], Mean | None], *, control: bool = False
) -> Callable[[MethodResult], Mean | None]:
    def of(row: MethodResult) -> Mean | None:
        effect = row.control if control else row.counterfactual
        return None if effect is None else read(effect)

    return of


MEASURES = {
    "flipped": Measure("answers flipped", _effect(lambda e: e.flipped)),
    "flipped, control": Measure(
        "answers flipped under control", _effect(lambda e: e.flipped, control=True)
    ),
    "logit difference": Measure("mean IO − S (logits)", _effect(lambda e: e.logit_difference)),
    "logit difference, control": Measure(
        "mean IO − S under control (logits)", _effect(lambda e: e.logit_difference, control=True)
    ),
    "Mahalanobis": Measure("Mahalanobis length", _effect(lambda e: e.distance)),
    "Euclidean": Measure("Euclidean length", _effect(lambda e: e.euclidean)),
    "log odds": Measure(
        "log odds of the target, independent probe (nats)", _effect(lambda e: e.log_odds)
    ),
    "KL": Measure("KL between S2 and END (nats)", _effect(lambda e: e.divergence)),
    "KL beside names": Measure(
        "KL between S2 and END beside the two names (nats)", _effect(lambda e: e.rest)
    ),
    "KL, control": Measure(
        "KL between S2 and END under control (nats)",
        _effect(lambda e: e.divergence, control=True),
    ),
    "KL, unrelated text": Measure("KL on unrelated text (nats)", lambda row: row.text_divergence),
    "attention": Measure(
        "change of attention, IO less S1, of the heads watched", _effect(lambda e: e.attention)
    ),
    "completeness": Measure("completeness", lambda row: row.scores.get("completeness")),
    "selectivity": Measure("selectivity", lambda row: row.scores.get("selectivity")),
    "reliability": Measure("reliability", lambda row: row.scores.get("reliability")),
    "KL at LRQP's effect": Measure(
        "KL at LRQP's effect, relative to LRQP", lambda row: row.relative.get(DIVERGENCE)
    ),
    "KL beside names at LRQP's effect": Measure(
        "KL beside the two names at LRQP's effect, relative to LRQP",
        lambda row: row.relative.get(REST),
    ),
    "lost selectivity at LRQP's effect": Measure(
        "1 − selectivity at LRQP's effect, relative to LRQP",
        lambda row: row.relative.get(UNSELECTIVE),
    ),
}
"""By short name, in the order of the table."""
