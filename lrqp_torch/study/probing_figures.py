"""Figures of what can be read from the clean activations."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lrqp_torch.study.by_site import (
    TASK_COLOURS,
    TASK_MARKERS,
    capitalised,
    label_sites,
    task_in_words,
)
from lrqp_torch.study.drawing import NOTE, write_figures
from lrqp_torch.study.variables import VARIABLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lrqp_torch.study.probing import ProbingResult, VariableScores


def draw(result: "ProbingResult", folder: Path) -> list[Path]:
    """See :func:`lrqp_torch.study.probing.draw`."""
    positions = dict.fromkeys(item.position for item in result.variables)
    figures = {f"probing_{name}": partial(_draw_position, result, name) for name in positions}
    return write_figures(figures, folder)


def _draw_position(result: "ProbingResult", position: str) -> "Figure":
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(item.task for item in result.variables))
    items = [item for item in result.variables if item.position == position]
    names = [name for name in VARIABLES if any(item.variable == name for item in items)]
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.6 * columns, 2.5 * rows + 1), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten())
    for axes, name in zip(grid, names, strict=False):
        for item in items:
            if item.variable == name:
                _curve(axes, result, item, tasks.index(item.task))
        axes.set_title(capitalised(name), fontsize=10)
        label_sites(axes, result.sites)
        axes.tick_params(labelbottom=True, labelsize=8)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    grid[0].set_ylim(-4, 104)
    for axes in grid[::columns]:
        axes.set_ylabel("Held-out accuracy (%)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
    figure.suptitle(
        f"What a linear probe reads at {position}; dotted: most frequent class, "
        "held out; crosses: shuffled labels",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def _curve(axes: "Axes", result: "ProbingResult", item: "VariableScores", index: int) -> None:
    x = [result.sites.index(score.site) for score in item.scores]
    y = [100 * score.accuracy for score in item.scores]
    bars = (
        [100 * (score.accuracy - score.lower) for score in item.scores],
        [100 * (score.upper - score.accuracy) for score in item.scores],
    )
    colour = TASK_COLOURS[index]
    axes.errorbar(
        x,
        y,
        bars,
        color=colour,
        marker=TASK_MARKERS[index],
        ms=4,
        lw=1.5,
        elinewidth=0.8,
        capsize=1.5,
        label=task_in_words(item.task),
    )
    axes.axhline(100 * item.baseline, color=colour, lw=0.8, ls=":")
    control = [(i, s.shuffled) for i, s in zip(x, item.scores, strict=True)]
    axes.plot(
        [i for i, share in control if share is not None],
        [100 * share for _, share in control if share is not None],
        color=colour,
        marker="x",
        ms=5,
        ls="none",
    )
    axes.grid(axis="y", color=NOTE, alpha=0.2, lw=0.5)
