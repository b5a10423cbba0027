"""The illusion controls in the interactive report, with what they say in words."""

from typing import Any

from lrqp_torch.study.controls.chance import KINDS
from lrqp_torch.study.controls.figures import (
    PLACES,
    flips_by_kind,
    split_label,
    whiskers,
)
from lrqp_torch.study.controls.outcomes import (
    CARRIES,
    SEPARATED,
    ControlsResult,
    Outcome,
    Split,
)
from lrqp_torch.study.controls.readers import ENERGY
from lrqp_torch.study.drawing import (
    CONTROL,
    COUNTERFACTUAL,
    NOTE,
    PROBE,
    as_interval,
    as_percent,
    interactive,
    signed,
)
from lrqp_torch.study.panel import Panel, Table


def panels(result: ControlsResult) -> list[Panel]:
    """Splits, other sites, chance, and halves."""
    made = [
        Panel(
            name="controls-splits",
            title="Which part of the edit carries its effect?",
            text=" ".join(split_findings(result)),
            figures={"": _splits(result)} if result.counterfactual.effect is not None else {},
            table=_split_table(result),
        )
    ]
    if result.elsewhere:
        made.append(
            Panel(
                name="controls-sites",
                title="The same edit at other sites",
                text=" ".join(site_findings(result)),
                figures={"": _sites(result)},
                table=_site_table(result),
            )
        )
    made.append(
        Panel(
            name="controls-chance",
            title="Edits that know nothing of the order, and edits from half of the prompts",
            text=" ".join([*chance_findings(result), *half_findings(result)]),
            figures={"": _chance(result)} if flips_by_kind(result) else {},
            table=_chance_table(result),
        )
    )
    return made


def split_findings(result: ControlsResult) -> list[str]:
    """What the splits say, in sentences made from the numbers."""
    lines = [
        f"The counterfactual edit δ at {result.site}, of mean Mahalanobis length "
        f"{result.distance:.2f}, changes the mean logit difference IO − S from "
        f"{signed(result.clean.value)} to {signed(result.counterfactual.logit_difference.value)} "
        f"and flips {as_percent(result.counterfactual.flipped)} of the answers "
        f"(control edit: {as_percent(result.control.flipped)})."
    ]
    if result.whole is not None:
        lines.append(
            f"Along its own direction the classes lie {result.whole.separation:.1f} standard "
            f"deviations within a class apart; the edited activations lie "
            f"{result.whole.position:.1f} standard deviations from the mean, the farthest natural "
            f"one {result.whole.farthest:.1f}."
        )
    if result.unread:
        lines.append(f"It was not split by what later parts read: {result.unread}.")
    if result.counterfactual.effect is None:
        lines.append(
            "The 95 % interval of its mean effect includes 0, so there is none of which a part "
            "could carry a share."
        )
        return lines
    if any(split.reads for split in result.splits):
        lines.append(
            "Heads and MLP read the stream through weights that span nearly all of it; a space "
            f"here is that of their leading directions with {100 * ENERGY:.0f} % of the weights' "
            "squared Frobenius norm, norm folded in."
        )
    lines += [_carrier(split) for split in result.splits]
    longest = max(max(s.inside.mahalanobis, s.outside.mahalanobis) for s in result.splits)
    if longest > 1:
        lines.append(
            f"In the metric a part alone is up to {longest:.1f} times as long as the edit: cut in "
            "two, it leaves the paths along which natural activations vary, so its run tells what "
            "is read of the edit and not what the model would meet by itself."
        )
    readers = [split for split in result.splits if split.reads]
    suspect = [split.space for split in readers if split.illusory]
    if suspect:
        lines.append(
            "The illusion's signature is there: the part read carries the effect though the "
            f"classes hardly differ along it (less than {SEPARATED:g} standard deviation), and "
            f"they differ in the part that is not read. Space: {', '.join(suspect)}."
        )
    elif readers:
        lines.append(
            "The illusion's signature, a part that carries the effect though the classes hardly "
            f"differ along it (less than {SEPARATED:g} standard deviation) beside one that is not "
            "read though they do, is not there."
        )
    return lines


def site_findings(result: ControlsResult) -> list[str]:
    """What the other sites say."""
    accurate = [item for item in result.elsewhere if item.as_accurate]
    lines = [
        f"The displacement of {result.site} was added at S2 at other sites, and beside it the edit "
        f"that was fitted there. At {result.site} the probe is right in "
        f"{as_percent(result.probe_accuracy)} of the held-out prompts, and "
        f"{as_percent(result.counterfactual.flipped)} of the answers flip. A displacement added "
        "below that site is carried up to it by the stream, unless later layers change it."
    ]
    if not accurate:
        return [*lines, "At no other site is the probe as accurate."]
    still = [item for item in accurate if (item.fitted.flipped or 0.0) >= CARRIES]
    idle = [item.site for item in accurate if (item.fitted.flipped or 0.0) < CARRIES]
    lines.append(
        f"At {_listed([item.site for item in accurate])} the probe is as accurate, within a "
        "percentage point."
    )
    if idle:
        lines.append(
            f"Of these, the edit fitted at {_listed(idle)} flips less than half of the answers: as "
            "good a probe, and by the study's rule no use there of what it reads."
        )
    if still:
        sites = _listed([item.site for item in still])
        lines.append(f"The edit fitted at {sites} flips half or more as well.")
    return lines


def chance_findings(result: ControlsResult) -> list[str]:
    """What edits that know nothing of the order say."""
    known = [item for item in result.chance if item.mean_flipped is not None]
    if not known:
        return ["No held-out prompt is answered IO, so none can be flipped."]
    lines = [f"{kind[0].upper()}{kind[1:]}: {text}." for kind, text in KINDS.items()]
    top = max(known, key=lambda item: item.mean_flipped.value if item.mean_flipped else 0.0)
    assert top.mean_flipped is not None
    lines.append(
        f"Of these the {top.kind} flips most: {100 * top.mean_flipped.value:.1f} % of the answers "
        f"over {len(top.flipped)} seeds (95 % interval "
        f"{as_interval([100 * top.mean_flipped.lower, 100 * top.mean_flipped.upper], 1)}; single "
        f"seeds {100 * min(top.flipped):.1f} to {100 * max(top.flipped):.1f}), beside "
        f"{as_percent(result.counterfactual.flipped)} for the study's edit."
    )
    return lines


def half_findings(result: ControlsResult) -> list[str]:
    """What the edits from disjoint halves say of each other."""
    halves = result.halves
    if halves is None:
        return ["A half of the training prompts has too few of one order to fit an edit to."]
    return [
        f"Two edits fitted to disjoint halves ({halves.prompts[0]} and {halves.prompts[1]} "
        f"prompts; probes right in {as_percent(halves.accuracy[0])} and "
        f"{as_percent(halves.accuracy[1])}) have a cosine of {halves.cosine:.2f} "
        f"({halves.cosine_mahalanobis:.2f} in the metric), flip "
        f"{as_percent(halves.outcomes[0].flipped)} and {as_percent(halves.outcomes[1].flipped)} of "
        f"the answers and give the same answer to {as_percent(halves.same_answer)} of the prompts. "
        f"The other half's probe reads the order written after "
        f"{as_percent(halves.believed[0])} and {as_percent(halves.believed[1])} of them."
    ]


def _carrier(split: Split) -> str:
    inside, outside = split.inside, split.outside
    who = {
        "inside": "the part inside carries the effect",
        "outside": "the rest carries the effect",
        "both": "either part alone would do",
        "neither": "neither part alone carries the effect",
    }[split.carrier]
    return (
        f"{split.space[0].upper()}{split.space[1:]} ({split.dimensions} of {split.width} "
        f"dimensions, {as_percent(inside.share)} of ‖δ‖²): alone, the part inside brings about "
        f"{as_percent(inside.outcome.effect)} of the effect and the rest "
        f"{as_percent(outside.outcome.effect)}, so {who}."
    )


def _listed(sites: list[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{', '.join(sites[:-1])} and {sites[-1]}"


def _bars(rows: list[tuple[str, float, list[float] | None]], colour: Any, name: str) -> Any:
    ends = [(0.0, 0.0) if i is None else whiskers(v, i) for _, v, i in rows]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [label.replace("\n", "<br>") for label, _, _ in rows],
        "x": [100 * value for _, value, _ in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [high for _, high in ends],
            "arrayminus": [low for low, _ in ends],
            "color": NOTE,
        },
        "marker": {"color": colour},
        "hovertemplate": "%{y}<br>%{x:.1f} %<extra></extra>",
    }


def _splits(result: ControlsResult) -> Any:
    traces = []
    for place, (label, colour) in list(PLACES.items())[::-1]:
        outcomes = [getattr(split, place).outcome for split in result.splits[::-1]]
        labels = [split_label(split) for split in result.splits[::-1]]
        rows = [
            (text, outcome.effect or 0.0, outcome.effect_interval)
            for text, outcome in zip(labels, outcomes, strict=True)
        ]
        traces.append(_bars(rows, colour, f"{label}, alone"))
    return interactive(
        traces,
        barmode="group",
        xaxis={"title": {"text": "share of the edit's effect on IO − S (%)"}},
        yaxis={"automargin": True},
        legend={"traceorder": "reversed"},
        height=220 + 62 * len(result.splits),
    )


def _sites(result: ControlsResult) -> Any:
    names = [item.site for item in result.elsewhere]
    curves = (
        ("probe accuracy there", [item.probe_accuracy for item in result.elsewhere], PROBE),
        (
            f"flipped by the edit of {result.site}, moved",
            [item.moved.flipped for item in result.elsewhere],
            COUNTERFACTUAL,
        ),
        (
            "flipped by the edit fitted there",
            [item.fitted.flipped for item in result.elsewhere],
            CONTROL,
        ),
    )
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label,
            "x": names,
            "y": [None if value is None else 100 * value for value in values],
            "line": {"color": colour},
            "hovertemplate": "%{x}: %{y:.1f} %<extra></extra>",
        }
        for label, values, colour in curves
    ]
    return interactive(
        traces,
        yaxis={"title": {"text": "held-out prompts (%)"}, "range": [-4, 104]},
        xaxis={"title": {"text": "site, in order of computation"}, "type": "category"},
        height=380,
    )


def _chance(result: ControlsResult) -> Any:
    rows = flips_by_kind(result)[::-1]
    bars = _bars([(row[0], row[1], row[2]) for row in rows], [row[4] for row in rows], "")
    return interactive(
        [bars],
        showlegend=False,
        xaxis={"title": {"text": "answers flipped (%)"}, "range": [0, 105]},
        yaxis={"automargin": True},
        height=180 + 40 * len(rows),
    )


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


def _split_table(result: ControlsResult) -> Table:
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


def _site_table(result: ControlsResult) -> Table:
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


def _chance_table(result: ControlsResult) -> Table:
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
