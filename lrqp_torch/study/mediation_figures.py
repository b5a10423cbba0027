"""Figures and tables of what attention patterns carry of the edit's effect."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.study.drawing import (
    CONDITION_COLOURS,
    COUNTERFACTUAL,
    NOTE,
    PROBE,
    as_interval,
    as_percent,
    interactive,
    signed,
    write_figures,
)
from lrqp_torch.study.panel import Panel, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lrqp_torch.study.mediation import GroupMediation, MediationResult, Ratio

KINDS = {
    "restored": ("restored: edit, patterns set back", PROBE),
    "induced": ("induced: no edit, patterns of the edit", COUNTERFACTUAL),
}


def draw(result: "MediationResult", folder: Path) -> list[Path]:
    """Write ``mediation``, where the edit has an effect to share."""
    if not _shown(result):
        return []
    return write_figures({"mediation": lambda: _draw_bars(result)}, folder)


def panels(result: "MediationResult") -> list[Panel]:
    """Shares of the edit's effect that sets of attention patterns carry."""
    who = "answer writers" if _writers(result) else "name movers"
    name, title = "mediation", f"Is the effect carried by where the {who} look?"
    table = _table(result)
    if not _shown(result):
        return [Panel(name=name, title=title, text=_no_effect(result), table=table)]
    return [
        Panel(name=name, title=title, text=_text(result), figures={"": _bars(result)}, table=table)
    ]


def _writers(result: "MediationResult") -> bool:
    """Whether answer writers stand in for name movers, of which there are none."""
    return any(group.group == "answer writers" for group in result.groups)


def _shown(result: "MediationResult") -> "list[GroupMediation]":
    return [group for group in result.groups if group.restored and group.induced]


def _label(group: "GroupMediation") -> str:
    count = len(group.heads)
    if "other head" in group.group:
        return group.group
    return f"{group.group} ({count} head{'' if count == 1 else 's'})"


def _errors(ratios: "list[Ratio]") -> tuple[list[float], list[float]]:
    """Distances from each ratio down to and up to the ends of its interval."""
    below = [max(ratio.value - ratio.interval[0], 0.0) for ratio in ratios]
    return below, [max(ratio.interval[1] - ratio.value, 0.0) for ratio in ratios]


def _draw_bars(result: "MediationResult") -> "Figure":
    from matplotlib.figure import Figure

    groups = _shown(result)[::-1]
    figure = Figure(figsize=(8.6, 1.9 + 0.62 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for offset, (kind, (label, colour)) in zip((0.2, -0.2), KINDS.items(), strict=True):
        ratios = [getattr(group, kind) for group in groups]
        values = [100 * ratio.value for ratio in ratios]
        heights = [row + offset for row in range(len(groups))]
        errors = [[100 * error for error in side] for side in _errors(ratios)]
        axes.barh(heights, values, height=0.36, color=colour, label=label)
        axes.errorbar(values, heights, xerr=errors, fmt="none", ecolor=NOTE, capsize=2, lw=1)
    axes.axvline(0, color=NOTE, lw=0.8)
    axes.axvline(100, color=NOTE, lw=0.8, ls=":")
    axes.set_yticks(range(len(groups)), [_label(group) for group in groups])
    axes.set_xlabel("Share of the edit's effect on IO − S (%); whiskers: 95 % intervals")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    figure.suptitle(
        f"What attention from END carries of the edit at {result.site}",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    return figure


def _bars(result: "MediationResult") -> Any:
    groups = _shown(result)[::-1]
    traces: list[dict[str, Any]] = []
    for kind, (label, colour) in list(KINDS.items())[::-1]:
        ratios = [getattr(group, kind) for group in groups]
        below, above = _errors(ratios)
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label,
                "y": [_label(group) for group in groups],
                "x": [100 * ratio.value for ratio in ratios],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * error for error in above],
                    "arrayminus": [100 * error for error in below],
                    "color": NOTE,
                },
                "marker": {"color": colour},
                "text": [", ".join(group.heads[:16]) for group in groups],
                "textposition": "none",
                "hovertemplate": "%{y}<br>%{x:.1f} % of the effect<br>%{text}<extra></extra>",
            }
        )
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 100, "x1": 100}
    return interactive(
        traces,
        barmode="group",
        xaxis={"title": {"text": "share of the edit's effect on IO − S (%)"}},
        yaxis={"automargin": True},
        legend={"traceorder": "reversed"},
        shapes=[line | {"line": {"color": CONDITION_COLOURS["clean"], "dash": "dot", "width": 1}}],
        height=220 + 56 * len(groups),
    )


def _text(result: "MediationResult") -> str:
    first = _shown(result)[0]
    restored, induced = first.restored, first.induced
    assert restored is not None and induced is not None
    origin = "published" if result.published else "found by the program"
    flips = result.edit_flips
    lines = [
        f"The counterfactual edit at {result.site} changes the mean logit difference IO − S from "
        f"{signed(result.logit_difference_clean)} to {signed(result.logit_difference_edited)}"
        + ("." if flips is None else f" and flips {as_percent(flips.value)} of the answers."),
        "Setting only the attention from END of a set of heads back to the clean run's, with the "
        "edit in place, restores part of it; setting it to the edited run's, without the edit, "
        "brings part of it about.",
        f"{first.group.capitalize()} ({origin}): {as_percent(restored.value)} restored "
        f"(95 % interval {as_interval([100 * end for end in restored.interval], 0)}), "
        f"{as_percent(induced.value)} induced "
        f"({as_interval([100 * end for end in induced.interval], 0)}).",
        "All heads above the site are the most that attention from END can carry; sets of other "
        "heads, drawn at random, show what setting as many patterns does by itself. The shares of "
        "different sets need not add up.",
    ]
    return " ".join(lines)


def _no_effect(result: "MediationResult") -> str:
    return (
        f"The counterfactual edit at {result.site} changes the mean logit difference from "
        f"{signed(result.logit_difference_clean)} to {signed(result.logit_difference_edited)}; the "
        f"95 % interval of the change ({as_interval(result.effect_interval)}) includes 0, so there "
        "is no effect of which a share could be told."
    )


def _table(result: "MediationResult") -> Table:
    def percent(value: "Ratio | None") -> float | None:
        return None if value is None else round(100 * value.value, 1)

    def interval(value: "Ratio | None") -> str:
        return as_interval(None if value is None else [100 * end for end in value.interval], 1)

    return Table(
        (
            "attention from END of",
            "restored (%)",
            "95 % interval",
            "induced (%)",
            "95 % interval ",
            "answers restored (%)",
            "answers flipped (%)",
            "IO − S restored (logits)",
            "IO − S induced (logits)",
            "heads",
        ),
        tuple(
            (
                _label(group),
                percent(group.restored),
                interval(group.restored),
                percent(group.induced),
                interval(group.induced),
                None if (s := group.answers_restored) is None else round(100 * s.value, 1),
                None if (s := group.answers_flipped) is None else round(100 * s.value, 1),
                round(group.logit_difference_restored, 3),
                round(group.logit_difference_induced, 3),
                ", ".join(group.heads) if len(group.heads) <= 16 else f"{len(group.heads)} heads",
            )
            for group in result.groups
        ),
    )
