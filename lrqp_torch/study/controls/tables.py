"""The illusion controls as tables of numbers."""

from lrqp_torch.study.controls.figures import PLACES
from lrqp_torch.study.controls.outcomes import (
    ControlsResult,
    Outcome,
)
from lrqp_torch.study.drawing import as_interval
from lrqp_torch.study.panel import Table


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 1)


def _percents(interval: list[float] | None) -> str:
    return as_interval(None if interval is None else [100 * end for end in interval], 1)


def _outcome(outcome: Outcome) -> tuple[float | str | None, ...]:
    mean = outcome.logit_difference
    return (
        _percent(outcome.flipped),
        _percents(outcome.flipped_interval),
        round(mean.value, 3),
        as_interval([mean.lower, mean.upper]),
        _percent(outcome.effect),
        _percents(outcome.effect_interval),
    )


_OUTCOME = (
    "flipped (%)",
    "95 % interval",
    "IO − S (logits)",
    "95 % interval ",
    "share of effect (%)",
    "95 % interval  ",
)


def split_table(result: ControlsResult) -> Table:
    """A row for each part of each split."""
    rows: list[tuple[str | float | int | None, ...]] = []
    for split in result.splits:
        for place in PLACES:
            part = getattr(split, place)
            rows.append(
                (
                    split.space,
                    place,
                    *_outcome(part.outcome),
                    _percent(part.share),
                    round(part.mahalanobis, 2),
                    None if part.along is None else round(part.along.separation, 2),
                    None if part.along is None else round(part.along.shift, 2),
                    None if part.along is None else round(part.along.position, 2),
                    None if part.along is None else round(part.along.farthest, 2),
                    split.dimensions,
                    split.rank,
                    _percent(split.energy),
                )
            )
    columns = (
        "space",
        "part",
        *_OUTCOME,
        "share of ‖δ‖² (%)",
        "Mahalanobis length / edit's",
        "class means apart (SD within class)",
        "edit moves (SD)",
        "edited lie at (SD from mean)",
        "farthest natural (SD)",
        "dimensions",
        "rank of the weights",
        "weights' norm held (%)",
    )
    return Table(columns, tuple(rows))


def site_table(result: ControlsResult) -> Table:
    """A row for each other site."""
    rows = tuple(
        (
            item.site,
            _percent(item.probe_accuracy),
            "yes" if item.as_accurate else "no",
            round(item.cosine, 3),
            _percent(item.moved.flipped),
            _percents(item.moved.flipped_interval),
            round(item.moved.logit_difference.value, 3),
            _percent(item.fitted.flipped),
            _percents(item.fitted.flipped_interval),
            round(item.fitted.logit_difference.value, 3),
        )
        for item in result.elsewhere
    )
    columns = (
        "site",
        "probe accuracy (%)",
        f"as accurate as at {result.site}",
        "cosine of the two edits",
        "moved edit flips (%)",
        "95 % interval",
        "moved: IO − S (logits)",
        "edit fitted there flips (%)",
        "95 % interval ",
        "fitted: IO − S (logits)",
    )
    return Table(columns, rows)


def chance_table(result: ControlsResult) -> Table:
    """A row for each edit: the study's, those from halves, and those by chance."""

    def own(label: str, outcome: Outcome, accuracy: float | None) -> tuple[str | float | None, ...]:
        flips, interval, difference, *_ = _outcome(outcome)
        return label, flips, interval, None, difference, None, _percent(accuracy)

    rows = [own("the study's edit", result.counterfactual, result.probe_accuracy)]
    rows.append(own("control edit", result.control, result.probe_accuracy))
    halves = result.halves
    for number in range(2 if halves is not None else 0):
        assert halves is not None
        label = f"edit from one half of the prompts, {number + 1}"
        rows.append(own(label, halves.outcomes[number], halves.accuracy[number]))
    for item in result.chance:
        mean = item.mean_flipped
        rows.append(
            (
                item.kind,
                None if mean is None else _percent(mean.value),
                "–" if mean is None else _percents([mean.lower, mean.upper]),
                ", ".join(f"{100 * share:.1f}" for share in item.flipped),
                round(item.logit_difference.value, 3),
                round(item.length, 2),
                _percent(item.accuracy),
            )
        )
    columns = (
        "edit",
        "flipped (%)",
        "95 % interval",
        "by seed (%)",
        "IO − S (logits)",
        "Mahalanobis length / edit's",
        "accuracy of its probe on its own labels (%)",
    )
    return Table(columns, tuple(rows))
