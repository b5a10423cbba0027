"""Figures of the league table: curves of effect against side effect, and the table as dots."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lrqp_torch.study.compare.measures import MEASURES
from lrqp_torch.study.compare.methods import FITTED
from lrqp_torch.study.compare.result import (
    SIDE_EFFECTS,
    CompareResult,
    Curve,
    Point,
    SiteComparison,
)
from lrqp_torch.study.compare.styles import style_of
from lrqp_torch.study.drawing import CONTROL, COUNTERFACTUAL, INK, NOTE, write_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SHOWN = 1e-5
"""Side effects below this are drawn at this; the axis is logarithmic."""

DOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("answers flipped", ("flipped", "flipped, control")),
    ("KL, S2 to END\n(nats)", ("KL", "KL, control")),
    ("KL beside names\n(nats)", ("KL beside names",)),
    ("KL, unrelated\ntext (nats)", ("KL, unrelated text",)),
    ("Mahalanobis\nlength", ("Mahalanobis",)),
    ("log odds, indep.\nprobe (nats)", ("log odds",)),
    ("completeness", ("completeness",)),
    ("selectivity", ("selectivity",)),
    ("reliability", ("reliability",)),
)
"""Columns of the table as dots: heading, and the measures drawn in it."""


def draw(result: CompareResult, folder: Path) -> list[Path]:
    """Write the Pareto curves, the table as dots, and costs at equal effect, for every site."""
    makers: dict[str, Callable[[], Figure]] = {}
    for name, site in result.sites.items():
        suffix = f"_{name}" if len(result.sites) > 1 else ""
        makers[f"compare_pareto{suffix}"] = partial(_pareto, site)
        makers[f"compare_table{suffix}"] = partial(_dots, site)
        makers[f"compare_equal_effect{suffix}"] = partial(_relative, site)
    return write_figures(makers, folder)


def _pareto(site: SiteComparison) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    costs = list(site.curves[0].points[0].costs)
    figure = Figure(figsize=(5.2 * len(costs), 7.4), layout="constrained")
    grid = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(grid, costs, strict=True):
        for curve in site.curves:
            _curve(axes, curve, cost)
        axes.set_xscale("log")
        # A random direction has next to no effect, and would take most of a logarithmic axis.
        moving = [curve for curve in site.curves if curve.name != "random"] or site.curves
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0.7 * min(_x(point, cost) for c in moving for point in c.points))
        _front(axes, site, cost)
        axes.set_xlabel(f"side effect: {SIDE_EFFECTS[cost]}")
        axes.grid(color=NOTE, alpha=0.2, lw=0.5)
    most = max(point.effect.value for curve in site.curves for point in curve.points)
    grid[0].set_ylim(-0.03 * most, 1.05 * most)
    grid[0].set_ylabel("effect: mean fall of IO − S (logits)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"Effect against side effect at {site.site}, S2: each method at rising strength "
        "(large: strength 1); shaded: beaten by the Pareto front",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def _curve(axes: "Axes", curve: Curve, cost: str) -> None:
    style = style_of(curve.name)
    x = [_x(point, cost) for point in curve.points]
    y = [point.effect.value for point in curve.points]
    own = curve.name == FITTED
    axes.plot(
        x,
        y,
        color=style.colour,
        marker=style.marker,
        ls=style.dash,
        lw=2.4 if own else 1.3,
        ms=5,
        label=curve.title,
        zorder=4 if own else 3,
    )
    for point in curve.points:
        if point.dose == 1 and curve.dose == "strength":
            axes.plot(
                _x(point, cost),
                point.effect.value,
                color=style.colour,
                marker=style.marker,
                ms=16 if own else 10,
                mec="white",
                mew=0.8,
                zorder=5,
            )


def _front(axes: "Axes", site: SiteComparison, cost: str) -> None:
    """Shade what some point of a curve beats."""
    best = sorted(
        (_x(point, cost), point.effect.value)
        for curve in site.curves
        for point in curve.points
        if point.optimal[cost]
    )
    right = max(axes.get_xlim()[1], 1.3 * best[-1][0])
    x, y = zip(*best, (right, best[-1][1]), strict=True)
    bottom = min(0.0, *y) - max(map(abs, y))
    axes.fill_between(x, y, bottom, step="post", color=NOTE, alpha=0.10, lw=0, zorder=0)
    axes.set_xlim(right=right)


def _x(point: Point, cost: str) -> float:
    return max(point.costs[cost].value, LEAST_SHOWN)


def _relative(site: SiteComparison) -> "Figure":
    from matplotlib.figure import Figure

    costs = list(site.curves[0].points[0].costs)
    rows = [row for row in site.methods if row.relative and row.name != FITTED]
    figure = Figure(figsize=(2.6 + 3.2 * len(costs), 1.6 + 0.34 * len(rows)), layout="constrained")
    grid = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(grid, costs, strict=True):
        for index, row in enumerate(rows):
            mean = row.relative[cost]
            if mean is None:
                axes.text(1, index, "does not reach it", fontsize=8, color=NOTE, va="center")
                continue
            style = style_of(row.name)
            bars = ([max(mean.value - mean.lower, 0)], [max(mean.upper - mean.value, 0)])
            axes.errorbar(
                mean.value, index, xerr=bars, color=style.colour, marker="o", ms=6, ls="none"
            )
        axes.axvline(1, color=INK, lw=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        title = SIDE_EFFECTS[cost].removesuffix(" (nats)")
        axes.set_title(title, fontsize=9, fontweight="normal", loc="center")
        # Differences of a few per cent should look like that.
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.5), max(high, 2.0))
        axes.set_xlabel("times LRQP's", fontsize=9)
        axes.grid(color=NOTE, alpha=0.2, lw=0.5)
    grid[0].set_yticks(range(len(rows)), [row.title for row in rows])
    grid[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(
        f"Side effect at the same effect as LRQP, at {site.site}, S2 (left of 1: less than LRQP)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def _dots(site: SiteComparison) -> "Figure":
    from matplotlib.figure import Figure

    rows = [row for row in site.methods if row.counterfactual is not None]
    columns = [
        (heading, names)
        for heading, names in DOTS
        if any(MEASURES[name].read(row) is not None for name in names for row in rows)
    ]
    figure = Figure(figsize=(2.0 + 1.55 * len(columns), 1.6 + 0.34 * len(rows)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (heading, names) in zip(grid, columns, strict=True):
        for name in names:
            _dot_column(axes, site, name)
        axes.set_title(heading, fontsize=9, fontweight="normal", loc="center")
        axes.grid(color=NOTE, alpha=0.2, lw=0.5)
        axes.tick_params(labelsize=8)
    own = next(index for index, row in enumerate(rows) if row.name == FITTED)
    for axes in grid:
        axes.axhspan(own - 0.5, own + 0.5, color=NOTE, alpha=0.15, lw=0, zorder=0)
    grid[0].set_yticks(range(len(rows)), [row.title for row in rows])
    grid[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(
        f"The same flip by every method, at {site.site}, S2, on {site.prompts} held-out prompts",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    handles = [
        *grid[0].plot([], [], "o", color=COUNTERFACTUAL, label="counterfactual edit"),
        *grid[0].plot([], [], "o", mfc="none", color=CONTROL, label="control edit"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _dot_column(axes: "Axes", site: SiteComparison, name: str) -> None:
    rows = [row for row in site.methods if row.counterfactual is not None]
    control = name.endswith("control")
    for index, row in enumerate(rows):
        mean = MEASURES[name].read(row)
        if mean is None:
            continue
        bars = ([max(mean.value - mean.lower, 0)], [max(mean.upper - mean.value, 0)])
        axes.errorbar(
            mean.value,
            index + (0.18 if control else 0),
            xerr=bars,
            color=CONTROL if control else COUNTERFACTUAL,
            marker="o",
            mfc="none" if control else None,
            ms=5,
            elinewidth=1,
            ls="none",
        )
    axes.axvline(0, color=INK, lw=0.6)
