"""Figures and panels of the geometry of the clean activations."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.study.by_site import (
    TASK_COLOURS,
    TASK_MARKERS,
    TASK_SYMBOLS,
    in_ranges,
    label_sites,
    task_in_words,
)
from lrqp_torch.study.drawing import write_figures
from lrqp_torch.study.figures import CONTROL, COUNTERFACTUAL, NOTE
from lrqp_torch.study.interactive import ZERO, add_line, add_points, new_figure
from lrqp_torch.study.panel import Panel, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lrqp_torch.study.geometry import GeometryResult, TaskGeometry

APART = 0.9
"""Held-out accuracy of one threshold on direction 1 from which the classes count as apart."""

CLASSES = ((1, "ABB", COUNTERFACTUAL, "s", "square"), (0, "BAB", CONTROL, "o", "circle"))
_COLUMNS = 6


def findings(result: "GeometryResult") -> list[str]:
    """What was seen, a sentence or two a task."""
    sentences = []
    for name, task in result.tasks.items():
        apart = [site for site, item in task.sites.items() if item.accuracy >= APART]
        best, item = max(task.sites.items(), key=lambda pair: pair[1].eta_squared[0])
        chance = " (within chance)" if item.eta_squared[0] < task.eta_chance else ""
        sentences.append(
            f"{task_in_words(name).capitalize()}: a threshold on the first direction alone tells "
            f"at least {100 * APART:.0f} % of the {task.test} held-out prompts at "
            f"{in_ranges(apart, list(task.sites))}. The order explains that direction most at "
            f"{best}: {100 * item.eta_squared[0]:.1f} % of its variance{chance}, accuracy "
            f"{100 * item.accuracy:.1f} % ({100 * item.lower:.1f} to {100 * item.upper:.1f}), "
            f"the direction itself {100 * item.variance[0]:.1f} % of all variance."
            + _elsewhere(task)
        )
    return sentences


def _elsewhere(task: "TaskGeometry") -> str:
    """Where the order lies along a lower direction than the first, if anywhere clearly."""
    lower = {
        site: item
        for site, item in task.sites.items()
        if item.strongest > 1
        and item.strongest_eta_squared > max(0.5, item.eta_squared[0], task.eta_chance)
    }
    if not lower:
        return ""
    words = ", ".join(
        f"direction {item.strongest} at {site} ({100 * item.strongest_eta_squared:.0f} %)"
        for site, item in lower.items()
    )
    return f" Elsewhere it explains most of a lower direction: {words}."


def draw(result: "GeometryResult", folder: Path) -> list[Path]:
    """See :func:`lrqp_torch.study.geometry.draw`."""
    figures = {
        f"geometry_sites_{name}": partial(_draw_grid, result, name, task)
        for name, task in result.tasks.items()
    }
    rest = {
        "geometry_best": partial(_draw_best, result),
        "geometry_by_site": partial(_draw_by_site, result),
    }
    return write_figures(figures | rest, folder)


def panels(result: "GeometryResult") -> list[Panel]:
    """See :func:`lrqp_torch.study.geometry.panels`."""
    first = next(iter(result.tasks.values()))
    order = [result.best_site, *(site for site in first.sites if site != result.best_site)]
    seen = " ".join(findings(result))
    return [
        Panel(
            name="geometry-directions",
            title=f"The two largest directions of variation at {result.position}",
            text=(
                f"Each point is a held-out prompt: its clean activation at {result.position}, "
                "centred and projected on the first two directions of a singular value "
                "decomposition of the training prompts' activations. No labels were used to find "
                "the directions; colour and shape show the order. Signs are arbitrary: ABB is "
                "drawn on the higher side. The list starts with the site whose first direction "
                "the order explains most. Point at a prompt to read it."
            ),
            figures={site: _points_figure(result, site) for site in order},
            choice="site",
        ),
        Panel(
            name="geometry-by-site",
            title="How much of the largest direction is the order of the names",
            text=(
                f"{seen} Eta squared is the variance between ABB and BAB over the total variance "
                "along a direction, on held-out prompts; a direction unrelated to the order stays "
                f"below {first.eta_chance:.3f} in 95 % of cases. Bars on the accuracy are Wilson "
                "95 % intervals."
            ),
            figures={
                "eta squared, direction 1": _measure_figure(result, "eta_squared", 0),
                "eta squared, direction 2": _measure_figure(result, "eta_squared", 1),
                "accuracy of one threshold": _measure_figure(result, "accuracy", None),
                "area under the curve": _measure_figure(result, "auc", None),
                "share of variance, direction 1": _measure_figure(result, "variance", 0),
                "share of variance, direction 2": _measure_figure(result, "variance", 1),
            },
            choice="measure",
            table=_table(result),
        ),
    ]


def _points_figure(result: "GeometryResult", site: str) -> Any:
    panes = []
    for name, task in result.tasks.items():
        item = task.sites[site]
        panes.append(
            f"{task_in_words(name)}: order explains {100 * item.eta_squared[0]:.0f} % of direction "
            "1"
        )
    figure = new_figure(
        x_title="direction 1 (units of the stream)",
        y_title="direction 2 (units of the stream)",
        panes=panes,
    )
    for column, task in enumerate(result.tasks.values(), start=1):
        item = task.sites[site]
        for label, title, colour, _, symbol in CLASSES:
            rows = [row for row, value in enumerate(task.labels) if value == label]
            add_points(
                figure,
                title,
                [item.points[row] for row in rows],
                [task.prompts[row] for row in rows],
                colour=colour,
                symbol=symbol,
                pane=(1, column),
                legend=column == 1,
            )
        figure.add_vline(x=item.threshold, line={"color": ZERO, "dash": "dot"}, row=1, col=column)
    return figure


def _measure_figure(result: "GeometryResult", measure: str, direction: int | None) -> Any:
    titles = {
        "eta_squared": "share of the direction's variance",
        "accuracy": "held-out prompts on the right side",
        "auc": "area under the curve",
        "variance": "share of all variance",
    }
    figure = new_figure(
        x_title="site, in order of computation", y_title=titles[measure], y_range=(-0.03, 1.03)
    )
    for index, (name, task) in enumerate(result.tasks.items()):
        interval = None
        if measure == "accuracy":
            items = task.sites.values()
            interval = [item.lower for item in items], [item.upper for item in items]
        add_line(
            figure,
            task_in_words(name),
            list(task.sites),
            _values(task, measure, direction),
            colour=TASK_COLOURS[index],
            symbol=TASK_SYMBOLS[index],
            interval=interval,
        )
    return figure


def _values(task: "TaskGeometry", measure: str, direction: int | None) -> list[float]:
    columns = [getattr(item, measure) for item in task.sites.values()]
    return columns if direction is None else [column[direction] for column in columns]


def _table(result: "GeometryResult") -> Table:
    return Table(
        columns=(
            "task",
            "site",
            "eta squared, direction 1",
            "eta squared, direction 2",
            "strongest of the first ten",
            "its eta squared",
            "accuracy, direction 1",
            "lower 95 %",
            "upper 95 %",
            "area under the curve",
            "variance in direction 1",
            "variance in direction 2",
        ),
        rows=tuple(
            (
                task_in_words(name),
                site,
                *(round(value, 4) for value in item.eta_squared),
                item.strongest,
                round(item.strongest_eta_squared, 4),
                *(round(value, 4) for value in (item.accuracy, item.lower, item.upper, item.auc)),
                *(round(value, 4) for value in item.variance),
            )
            for name, task in result.tasks.items()
            for site, item in task.sites.items()
        ),
    )


def _scatter(axes: "Axes", task: "TaskGeometry", site: str, size: float) -> None:
    item = task.sites[site]
    axes.axvline(item.threshold, color=NOTE, lw=0.8, ls=":")
    for label, title, colour, marker, _ in CLASSES:
        points = [
            point for point, value in zip(item.points, task.labels, strict=True) if value == label
        ]
        # As an image, so that a grid of thousands of points stays a small file.
        axes.scatter(
            [point[0] for point in points],
            [point[1] for point in points],
            s=size,
            c=colour,
            marker=marker,
            alpha=0.6,
            lw=0,
            label=title,
            rasterized=True,
        )


def _draw_grid(result: "GeometryResult", name: str, task: "TaskGeometry") -> "Figure":
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(task.sites))
    rows = -(-len(task.sites) // columns)
    figure = Figure(figsize=(max(2.1 * columns, 6.3), 2.1 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (site, item) in zip(grid, task.sites.items(), strict=False):
        _scatter(axes, task, site, 5)
        axes.set_title(f"{site}   η² = {item.eta_squared[0]:.2f}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(task.sites) :]:
        axes.set_visible(False)
    _legend(figure, grid[0])
    figure.suptitle(
        f"Directions 1 and 2 of the activations at {result.position}, {task_in_words(name)}",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def _draw_best(result: "GeometryResult") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(result.tasks) + 1, 5.2), layout="constrained")
    every = list(figure.subplots(1, len(result.tasks), squeeze=False).flatten())
    for axes, (name, task) in zip(every, result.tasks.items(), strict=True):
        item = task.sites[result.best_site]
        _scatter(axes, task, result.best_site, 16)
        axes.set_title(
            f"{task_in_words(name).capitalize()}\norder explains {100 * item.eta_squared[0]:.1f} % "
            f"of direction 1; accuracy {100 * item.accuracy:.1f} %",
            fontsize=10,
        )
        axes.set_xlabel(f"direction 1 ({100 * item.variance[0]:.1f} % of all variance)")
        axes.set_ylabel(f"direction 2 ({100 * item.variance[1]:.1f} % of all variance)")
    _legend(figure, every[0])
    figure.suptitle(
        f"Held-out prompts at {result.best_site}, {result.position}; directions found without "
        "labels",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def _draw_by_site(result: "GeometryResult") -> "Figure":
    from matplotlib.figure import Figure

    sites = list(next(iter(result.tasks.values())).sites)
    figure = Figure(figsize=(min(12.5, max(7.0, 3.5 + 0.38 * len(sites))), 6), layout="constrained")
    explained, accuracy = figure.subplots(2, 1, sharex=True)
    for index, (name, task) in enumerate(result.tasks.items()):
        colour, marker = TASK_COLOURS[index], TASK_MARKERS[index]
        style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.8}
        label = task_in_words(name)
        items = task.sites.values()
        explained.plot([item.eta_squared[0] for item in items], label=label, **style)
        right = [100 * item.accuracy for item in items]
        bars = (
            [100 * (item.accuracy - item.lower) for item in items],
            [100 * (item.upper - item.accuracy) for item in items],
        )
        accuracy.errorbar(range(len(right)), right, bars, capsize=2, elinewidth=1, **style)
    explained.set_ylim(-0.03, 1.03)
    explained.set_ylabel("Share of direction 1's\nvariance (eta squared)")
    explained.set_title("How much of the largest direction is the order of the names")
    explained.legend(frameon=False)
    accuracy.axhline(50, color=NOTE, lw=0.8, ls=":")
    accuracy.set_ylim(min(38, accuracy.get_ylim()[0]), 102)
    accuracy.set_ylabel("Accuracy of a threshold\non direction 1 (%)")
    accuracy.set_xlabel("Site, in order of computation")
    label_sites(accuracy, sites)
    return figure


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower right", ncols=2, frameon=False, markerscale=1.8
    )
