"""Figures and tables of what the edit does to S-inhibition heads and name movers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.study.drawing import (
    CONDITION_COLOURS,
    NOTE,
    as_interval,
    as_percent,
    interactive,
    signed,
    write_figures,
)
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.roles import S_INHIBITION, WRITER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lrqp_torch.study.circuit import AttentionReading, CircuitResult, ProbeReading

MOST_DRAWN = 8
"""Heads in the static figure; the interactive one has them all."""

NONE_FOUND = "No head with this role was found, so there is nothing to show."
NO_MOVERS = (
    " No name mover was found: no head with a large direct effect looks mainly at IO. These are "
    "the heads with the largest direct effect, wherever they look. Such a model may read the names "
    "from tokens to which they were copied, so that attention to IO and S1 themselves can "
    "move either way; what counts for these heads is how much moved at all."
)
EDITED = ("control", "counterfactual")


def draw(result: "CircuitResult", folder: Path) -> list[Path]:
    """Write ``circuit_probes`` and ``circuit_attention``, where there are heads to show."""
    makers = {}
    if result.probes:
        makers["circuit_probes"] = lambda: _draw_probes(result)
    if result.attention:
        makers["circuit_attention"] = lambda: _draw_attention(result)
    return write_figures(makers, folder)


def panels(result: "CircuitResult") -> list[Panel]:
    """What probes read from S-inhibition heads, and where name movers or answer writers look."""
    return [_probe_panel(result), _attention_panel(result)]


def _by_head(
    readings: "list[ProbeReading] | list[AttentionReading]",
) -> dict[str, dict[str, Any]]:
    """Head to condition to reading."""
    heads: dict[str, dict[str, Any]] = {}
    for reading in readings:
        heads.setdefault(reading.head, {})[reading.condition] = reading
    return heads


def _draw_probes(result: "CircuitResult") -> "Figure":
    from matplotlib.figure import Figure

    heads = dict(list(_by_head(result.probes).items())[-MOST_DRAWN:])
    columns = min(4, len(heads))
    rows = -(-len(heads) // columns)
    figure = Figure(figsize=(2.9 * columns + 1.2, 2.6 * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in grid[len(heads) :]:
        spare.set_axis_off()
    for axes, (head, readings) in zip(grid, heads.items(), strict=False):
        every = [value for reading in readings.values() for value in reading.log_odds.values]
        low, high = min(every), max(every)
        edges = [low + (high - low or 1.0) * step / 40 for step in range(41)]
        for number, (condition, reading) in enumerate(readings.items()):
            colour = CONDITION_COLOURS[condition]
            axes.hist(
                reading.log_odds.values,
                bins=edges,
                histtype="stepfilled",
                color=colour,
                alpha=0.35,
            )
            axes.hist(reading.log_odds.values, bins=edges, histtype="step", color=colour)
            axes.text(
                0.03,
                0.98 - 0.08 * number,
                f"{condition} {as_percent(reading.reports)}",
                transform=axes.transAxes,
                va="top",
                color=colour,
                fontsize=8,
                fontweight="bold",
            )
        axes.axvline(0, color=NOTE, lw=0.8)
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        axes.set_title(head, fontsize=10)
    figure.supxlabel("log odds of the true order, read from the head's output at END (nats)")
    figure.supylabel("held-out prompts")
    figure.suptitle(
        f"What S-inhibition heads report under edits at {result.site}, and how often as asked",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    return figure


def _draw_attention(result: "CircuitResult") -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    heads = dict(list(_by_head(result.attention).items())[:MOST_DRAWN])
    figure = Figure(figsize=(1.9 * len(heads) + 1.6, 5.0), layout="constrained")
    grid = figure.subplots(2, len(heads), squeeze=False, sharex=True, sharey=True)
    for row, key in zip(grid, ("to_io", "to_s1"), strict=True):
        for axes, (head, readings) in zip(row, heads.items(), strict=True):
            clean = getattr(readings["clean"], key)
            axes.axline((0, 0), slope=1, color=NOTE, lw=0.8, ls="--")
            for condition in EDITED:
                edited = getattr(readings[condition], key)
                axes.scatter(
                    clean.values,
                    edited.values,
                    s=7,
                    alpha=0.35,
                    lw=0,
                    c=CONDITION_COLOURS[condition],
                    rasterized=True,
                )
            axes.set_xlim(-0.04, 1.04)
            axes.set_ylim(-0.04, 1.04)
            axes.set_aspect("equal")
            if key == "to_io":
                axes.set_title(f"{head}\n{readings['clean'].role}", fontsize=9)
        row[0].set_ylabel(f"END → {'IO' if key == 'to_io' else 'S1'},\nedited")
    figure.supxlabel("attention in the clean run")
    figure.suptitle(
        f"Attention before and after the edit at {result.site}, a point a prompt",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    dots = [
        Line2D([], [], ls="", marker="o", ms=5, color=CONDITION_COLOURS[condition])
        for condition in EDITED
    ]
    names = [f"{condition} edit" for condition in EDITED]
    figure.legend(dots, names, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return figure


def _origin(result: "CircuitResult") -> str:
    return "the published ones" if result.published else "those that the program found"


def _probe_panel(result: "CircuitResult") -> Panel:
    name, title = "circuit-probes", "What S-inhibition heads report under the edit"
    if not result.probes:
        return Panel(name=name, title=title, text=f"{S_INHIBITION}: {NONE_FOUND}")
    figures = {}
    for head, readings in _by_head(result.probes).items():
        traces = [
            {
                "type": "histogram",
                "name": condition,
                "x": reading.log_odds.values,
                "nbinsx": 40,
                "opacity": 0.6,
                "marker": {"color": CONDITION_COLOURS[condition]},
                "hovertemplate": f"{condition}: log odds %{{x}}, %{{y}} prompts<extra></extra>",
            }
            for condition, reading in readings.items()
        ]
        figures[head] = interactive(
            traces,
            barmode="overlay",
            xaxis={"title": {"text": "log odds of the true order (nats); below 0: the other one"}},
            yaxis={"title": {"text": "held-out prompts"}},
        )
    joint = [reading for reading in result.probes if reading.head == result.probes[-1].head]
    summary = "; ".join(f"{r.condition}: {as_percent(r.reports)}" for r in joint)
    return Panel(
        name=name,
        title=title,
        text="A probe of the order is fitted to each S-inhibition head's output at END in clean "
        "runs of the training prompts, and asked what it reads on the held-out ones while the "
        f"belief at {result.site} is edited at S2. The heads are {_origin(result)}. Shares of "
        "prompts for which the probe of all heads together reads the order asked for (the true one "
        f"in the clean and control conditions, the other one in the counterfactual): {summary}. "
        "One half would be chance.",
        figures=figures,
        choice="head",
        table=Table(
            (
                "head",
                "condition",
                "reads the order asked for (%)",
                "95 % interval (%)",
                "mean log odds of the true order (nats)",
                "95 % interval",
            ),
            tuple(
                (
                    r.head,
                    r.condition,
                    round(100 * r.reports, 1),
                    as_interval([100 * end for end in r.reports_interval], 1),
                    round(r.log_odds.mean, 2),
                    as_interval(r.log_odds.interval),
                )
                for r in result.probes
            ),
        ),
    )


def _attention_panel(result: "CircuitResult") -> Panel:
    who = "answer writers" if WRITER in result.roles else "name movers"
    name, title = "circuit-attention", f"Where {who} look under the edit"
    if not result.attention:
        return Panel(name=name, title=title, text=NONE_FOUND)
    figures = {
        f"{head} ({readings['clean'].role})": _paired(readings)
        for head, readings in _by_head(result.attention).items()
    }
    changes = "; ".join(
        f"{role}s: {_role_change(result, role)}"
        for role in dict.fromkeys(reading.role for reading in result.attention)
    )
    return Panel(
        name=name,
        title=title,
        text="Each point is a held-out prompt: attention from END in the clean run against that "
        f"under the edit at {result.site}. On the dashed line nothing changed. The heads are "
        f"{_origin(result)}. Mean change under the counterfactual edit: {changes}. “Moved” in the "
        "table is all attention that lies elsewhere than in the clean run, on whatever token."
        + (NO_MOVERS if WRITER in result.roles else ""),
        figures=figures,
        choice="head",
        table=Table(
            (
                "head",
                "role",
                "condition",
                "END → IO",
                "95 % interval",
                "END → S1",
                "95 % interval ",
                "moved",
                "95 % interval  ",
            ),
            tuple(
                (
                    r.head,
                    r.role,
                    r.condition,
                    round(r.to_io.mean, 3),
                    as_interval(r.to_io.interval, 3),
                    round(r.to_s1.mean, 3),
                    as_interval(r.to_s1.interval, 3),
                    round(r.moved.mean, 3),
                    as_interval(r.moved.interval, 3),
                )
                for r in result.attention
            ),
        ),
    )


def _role_change(result: "CircuitResult", role: str) -> str:
    """Mean over a role's heads of the counterfactual edit's change of attention to IO and S1."""
    heads = [r for r in _by_head(result.attention).values() if r["clean"].role == role]

    def change(key: str) -> float:
        changes = [
            float(getattr(r["counterfactual"], key).mean - getattr(r["clean"], key).mean)
            for r in heads
        ]
        return sum(changes) / len(changes)

    return f"to IO {signed(change('to_io'))}, to S1 {signed(change('to_s1'))}"


def _paired(readings: "dict[str, AttentionReading]") -> Any:
    """Clean against edited attention, to IO on the left and to S1 on the right."""
    traces: list[dict[str, Any]] = []
    for number, (key, token) in enumerate((("to_io", "IO"), ("to_s1", "S1"))):
        suffix = "" if number == 0 else "2"
        axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        traces.append(
            axes
            | {
                "type": "scatter",
                "mode": "lines",
                "x": [0, 1],
                "y": [0, 1],
                "line": {"color": NOTE, "dash": "dash", "width": 1},
                "showlegend": False,
                "hoverinfo": "skip",
            }
        )
        for condition in EDITED:
            traces.append(
                axes
                | {
                    "type": "scatter",
                    "mode": "markers",
                    "name": condition,
                    "legendgroup": condition,
                    "showlegend": number == 0,
                    "x": getattr(readings["clean"], key).values,
                    "y": getattr(readings[condition], key).values,
                    "marker": {"size": 5, "opacity": 0.5, "color": CONDITION_COLOURS[condition]},
                    "hovertemplate": f"prompt %{{pointNumber}}<br>END → {token}: clean %{{x:.2f}}, "
                    f"{condition} %{{y:.2f}}<extra></extra>",
                }
            )
    span = [-0.03, 1.03]
    return interactive(
        traces,
        xaxis={"title": {"text": "END → IO, clean"}, "domain": [0, 0.46], "range": span},
        yaxis={"title": {"text": "END → IO, edited"}, "range": span},
        xaxis2={"title": {"text": "END → S1, clean"}, "domain": [0.56, 1], "range": span},
        yaxis2={"title": {"text": "END → S1, edited"}, "range": span, "anchor": "x2"},
    )
