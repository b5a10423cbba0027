"""The illusion controls as interactive figures."""

from typing import Any

from lrqp_torch.study.controls.figures import (
    PLACES,
    flips_by_kind,
    split_label,
    whiskers,
)
from lrqp_torch.study.controls.outcomes import ControlsResult
from lrqp_torch.study.drawing import (
    CONTROL,
    COUNTERFACTUAL,
    NOTE,
    PROBE,
    interactive,
)


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


def splits_figure(result: ControlsResult) -> Any:
    """The share of the effect that each part brings about alone."""
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


def sites_figure(result: ControlsResult) -> Any:
    """Probe accuracy and flips at other sites, in order of computation."""
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


def chance_figure(result: ControlsResult) -> Any:
    """Flips by edits that know nothing of the order, beside the study's own."""
    rows = flips_by_kind(result)[::-1]
    bars = _bars([(row[0], row[1], row[2]) for row in rows], [row[4] for row in rows], "")
    return interactive(
        [bars],
        showlegend=False,
        xaxis={"title": {"text": "answers flipped (%)"}, "range": [0, 105]},
        yaxis={"automargin": True},
        height=180 + 40 * len(rows),
    )
