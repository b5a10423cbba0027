"""Figures of the geometry of the clean activations."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lrqp_torch.study.by_site import TASK_COLOURS, TASK_MARKERS, label_sites, task_in_words
from lrqp_torch.study.drawing import CONTROL, COUNTERFACTUAL, NOTE, write_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lrqp_torch.study.geometry import GeometryResult, TaskGeometry

CLASSES = ((1, "ABB", COUNTERFACTUAL, "s", "square"), (0, "BAB", CONTROL, "o", "circle"))
"""Label, name, colour, and marker in matplotlib and in plotly."""

_COLUMNS = 6


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
