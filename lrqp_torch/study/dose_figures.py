"""Figures and panels of the dose sweep."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.study.by_site import (
    TASK_COLOURS,
    TASK_MARKERS,
    TASK_SYMBOLS,
    capitalised,
    task_in_words,
)
from lrqp_torch.study.drawing import NOTE, signed, write_figures
from lrqp_torch.study.interactive import ZERO, add_line, new_figure
from lrqp_torch.study.panel import Panel, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lrqp_torch.study.dose import DoseResult, EditSummary, TaskDose

Point = tuple[float | None, float | None, float | None]
"""A value with the ends of its interval."""


def _flipped(edit: "EditSummary") -> Point:
    return (None, None, None) if edit.flipped is None else (edit.flipped, edit.lower, edit.upper)


def _mean(name: str) -> "Callable[[EditSummary], Point]":
    def read(edit: "EditSummary") -> Point:
        mean = getattr(edit, name)
        return mean.value, mean.lower, mean.upper

    return read


MEASURES: "dict[str, tuple[str, Callable[[EditSummary], Point]]]" = {
    "answers flipped": ("share of answers flipped", _flipped),
    "logit difference": ("mean IO − S at END (logits)", _mean("logit_difference")),
    "Mahalanobis size": ("mean Mahalanobis length of the edit", _mean("distance")),
    "Euclidean size": ("mean Euclidean length (units of the stream)", _mean("euclidean")),
}


def findings(result: "DoseResult") -> list[str]:
    """What was seen, some sentences a task."""
    return [_sentence(result, name, task) for name, task in result.tasks.items()]


def _sentence(result: "DoseResult", name: str, task: "TaskDose") -> str:
    start = f"{capitalised(task_in_words(name))}, at {result.site}: "
    if not task.answered:
        return start + "the model answers no held-out prompt with IO, so no answer can flip."
    half, last = task.half_dose(), task.doses[-1]
    reached = (
        f"half of the answers flip from log α = {half:g} on"
        if half is not None
        else "no dose of the sweep flips half of the answers"
    )
    mirror, control = task.counterfactual, task.control
    words = (
        f"{start}{reached}; at log α = {last.log_alpha:g}, {_share(last)} of {task.answered} do. "
        f"The mirror rule, which asks for log α = {mirror.log_alpha:z.1f} on average, flips "
        f"{_share(mirror)} towards the other order, with edits of mean Mahalanobis length "
        f"{mirror.distance.value:.2f} (mean logit difference {signed(task.clean.value)} before, "
        f"{signed(mirror.logit_difference.value)} after), and {_share(control)} towards the true "
        "one."
    )
    unreached = sum(edit.unreached for edit in (*task.doses, control, mirror))
    return words + (f" {unreached} edits could not be solved." if unreached else "")


def _share(edit: "EditSummary") -> str:
    return f"{100 * (edit.flipped or 0):.1f} % ({100 * edit.lower:.1f} to {100 * edit.upper:.1f})"


def draw(result: "DoseResult", folder: Path) -> list[Path]:
    """See :func:`lrqp_torch.study.dose.draw`."""
    return write_figures({"dose": partial(_draw, result)}, folder)


def panels(result: "DoseResult") -> list[Panel]:
    """See :func:`lrqp_torch.study.dose.panels`."""
    figures = {name: _figure(result, name) for name in MEASURES}
    figures["flips by size"] = _by_size(result)
    return [
        Panel(
            name="dose",
            title=f"How much belief it takes: odds against answers at {result.site}",
            text=(
                "\n\n".join(findings(result))
                + f"\n\nEach point of a curve is a counterfactual edit at {result.position} after "
                "which the probe's odds for the other order are at least α on every held-out "
                "prompt; prompts whose odds suffice already stay as they are. Stars are the "
                "mirror rule towards the other order, at its mean log α, and open triangles the "
                "same towards the true order. Shares are of the prompts answered IO without an "
                "edit, with Wilson 95 % intervals; means have bootstrap 95 % intervals."
            ),
            figures=figures,
            choice="measure",
            table=_table(result),
        )
    ]


def _figure(result: "DoseResult", measure: str) -> Any:
    title, read = MEASURES[measure]
    figure = new_figure(
        x_title="log α: least log odds of the other order (nats)",
        y_title=title,
        y_range=(-0.03, 1.03) if measure == "answers flipped" else None,
    )
    for index, (name, task) in enumerate(result.tasks.items()):
        _lines(figure, task_in_words(name), task, index, lambda edit: edit.log_alpha, read)
        if measure == "logit difference":
            line = {"color": TASK_COLOURS[index], "dash": "dot", "width": 1}
            figure.add_hline(y=task.clean.value, line=line)
    if measure == "logit difference":
        figure.add_hline(y=0, line={"color": ZERO, "width": 1})
    return figure


def _by_size(result: "DoseResult") -> Any:
    figure = new_figure(
        x_title="mean Mahalanobis length of the edit",
        y_title="share of answers flipped",
        y_range=(-0.03, 1.03),
    )
    for index, (name, task) in enumerate(result.tasks.items()):
        _lines(figure, task_in_words(name), task, index, lambda e: e.distance.value, _flipped)
    return figure


def _lines(
    figure: Any,
    label: str,
    task: "TaskDose",
    index: int,
    across: "Callable[[EditSummary], float]",
    read: "Callable[[EditSummary], Point]",
) -> None:
    curves = (
        (label, task.doses, TASK_SYMBOLS[index]),
        (f"mirror rule, {label}", [task.counterfactual], "star"),
        (f"mirror rule, control, {label}", [task.control], "triangle-up-open"),
    )
    for name, edits, symbol in curves:
        values, lower, upper = zip(*map(read, edits), strict=True)
        add_line(
            figure,
            name,
            [across(edit) for edit in edits],
            values,
            colour=TASK_COLOURS[index],
            symbol=symbol,
            interval=(lower, upper),
            hover="%{x:.3g}: %{y:.3g}",
        )


def _table(result: "DoseResult") -> Table:
    rows = []
    for name, task in result.tasks.items():
        edits = [("sweep", dose) for dose in task.doses]
        edits += [("mirror, control", task.control), ("mirror", task.counterfactual)]
        for rule, edit in edits:
            rows.append(
                (
                    task_in_words(name),
                    rule,
                    round(edit.log_alpha, 3),
                    *(None if value is None else round(value, 4) for value in _flipped(edit)),
                    round(edit.logit_difference.value, 4),
                    round(edit.distance.value, 4),
                    round(edit.euclidean.value, 4),
                    round(edit.edited, 4),
                )
            )
    return Table(
        columns=(
            "task",
            "rule",
            "log α (mean)",
            "flipped",
            "lower 95 %",
            "upper 95 %",
            "logit difference",
            "Mahalanobis length",
            "Euclidean length",
            "prompts changed",
        ),
        rows=tuple(rows),
    )


def _draw(result: "DoseResult") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 7.5), layout="constrained")
    grid = list(figure.subplots(2, 2, sharex=True).flatten())
    for axes, (measure, (title, read)) in zip(grid, MEASURES.items(), strict=True):
        for index, (name, task) in enumerate(result.tasks.items()):
            _curve(axes, task, index, read, task_in_words(name))
            if measure == "logit difference":
                axes.axhline(task.clean.value, color=TASK_COLOURS[index], lw=0.8, ls=":")
        if measure == "answers flipped":
            axes.set_ylim(-0.04, 1.04)
        else:
            axes.axhline(0, color=NOTE, lw=0.8)
        axes.set_ylabel(capitalised(title))
        axes.grid(axis="y", color=NOTE, alpha=0.2, lw=0.5)
    for axes in grid[2:]:
        axes.set_xlabel("log α: least log odds of the other order (nats)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"How much belief it takes to flip an answer: edits at {result.site}, {result.position}",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def _curve(
    axes: "Axes",
    task: "TaskDose",
    index: int,
    read: "Callable[[EditSummary], Point]",
    label: str,
) -> None:
    curves = (
        (task.doses, TASK_MARKERS[index], 5, label),
        ([task.counterfactual], "*", 13, f"mirror rule, {label}"),
        ([task.control], "^", 7, f"mirror rule, control, {label}"),
    )
    for edits, marker, size, name in curves:
        points = [(edit.log_alpha, *read(edit)) for edit in edits]
        known = [
            (x, value, max(value - lower, 0.0), max(upper - value, 0.0))
            for x, value, lower, upper in points
            if value is not None and lower is not None and upper is not None
        ]
        if not known:
            continue
        x, y, below, above = zip(*known, strict=True)
        axes.errorbar(
            x,
            y,
            (below, above),
            color=TASK_COLOURS[index],
            marker=marker,
            ms=size,
            mfc="none" if marker == "^" else None,
            lw=1.6,
            elinewidth=0.8,
            capsize=2,
            ls="-" if marker == TASK_MARKERS[index] else "none",
            label=name,
        )
