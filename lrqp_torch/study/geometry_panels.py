"""Panels and sentences about the geometry of the clean activations."""

from typing import TYPE_CHECKING, Any

from lrqp_torch.study.by_site import TASK_COLOURS, TASK_SYMBOLS, in_ranges, task_in_words
from lrqp_torch.study.geometry_figures import CLASSES
from lrqp_torch.study.interactive import ZERO, add_line, add_points, new_figure
from lrqp_torch.study.panel import Panel, Table

if TYPE_CHECKING:
    from lrqp_torch.study.geometry import GeometryResult, TaskGeometry

APART = 0.9
"""Held-out accuracy of one threshold on direction 1 from which the classes count as apart."""


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


def panels(result: "GeometryResult") -> list[Panel]:
    """See :func:`lrqp_torch.study.geometry.panels`."""
    first = next(iter(result.tasks.values()))
    order = [result.best_site, *(site for site in first.sites if site != result.best_site)]
    seen = "\n\n".join(findings(result))
    return [
        Panel(
            name="geometry-directions",
            title=f"The two largest directions of variation at {result.position}",
            text=(
                f"Each point is a held-out prompt: its clean activation at {result.position}, "
                "centred and projected on the first two directions of a singular value "
                "decomposition of the training prompts' activations. No labels were used to find "
                "the directions; colour and shape show the order. Signs are arbitrary: ABB is "
                "drawn on the higher side. Above each plot: how much of direction 1's variance the "
                "order explains. The list starts with the site whose first direction "
                "the order explains most. Point at a prompt to read it."
            ),
            figures={site: _points_figure(result, site) for site in order},
            choice="site",
        ),
        Panel(
            name="geometry-by-site",
            title="How much of the largest direction is the order of the names",
            text=(
                f"{seen}\n\nEta squared is the variance between ABB and BAB over the total "
                "variance along a direction, on held-out prompts; a direction unrelated to the "
                f"order stays below {first.eta_chance:.3f} in 95 % of cases. Bars on the accuracy "
                "are Wilson 95 % intervals."
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
            # Two of these must fit side by side.
            f"{task_in_words(name)}: order explains {100 * item.eta_squared[0]:.0f} %"
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
