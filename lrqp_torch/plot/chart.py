"""The description of a chart: what is drawn, in no library's terms.

A :class:`Chart` is one or more panes; a pane holds marks (curves, points, bars with intervals) or
one heat map, with reference lines and shaded bands. The same description is drawn with plotly
(interactive), with matplotlib (PNG and SVG), and as a table of its numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# Okabe and Ito's palette, which colour-blind readers can tell apart.
GREEN, BLUE, VERMILION = "#009E73", "#0072B2", "#D55E00"
ORANGE, SKY, PURPLE, BLACK = "#E69F00", "#56B4E9", "#CC79A7", "#000000"
INK, NOTE, CLEAN = "#222222", "#767676", "#555555"
PROBE, CONTROL, COUNTERFACTUAL = GREEN, BLUE, VERMILION

Marker = Literal["circle", "square", "triangle", "diamond", "cross", "star", "pentagon", "down"]
Dash = Literal["solid", "dash", "dot", "none"]
Cell = str | float | int | None


@dataclass(frozen=True)
class Marks:
    """Values against places: a curve, points of the plane, or bars.

    Attributes:
        name: in the legend, in hover texts and as a table's heading.
        x: where each value stands: names of places in their order (sites, methods), or numbers.
        y: the values; None leaves a gap.
        lower: lower ends of their intervals, or None where none is known.
        upper: upper ends.
        kind: ``"line"`` joins the points, ``"points"`` does not, ``"bars"`` reach to zero.
        colour: as ``"#RRGGBB"``.
        marker: shape of the points, so that curves differ by more than colour.
        filled: whether markers are filled.
        dash: of the line.
        size: of the markers, against the usual ones.
        opacity: of the marks, from 0 to 1.
        texts: shown when the reader points at a mark; default the place and the value.
        labels: written beside the marks.
        legend: whether to name it in the legend.
        width: of bars at numbers, in units of x; None for the usual.
        fill: whether the area below a line is lightly shaded.
    """

    name: str
    x: Sequence[str] | Sequence[float]
    y: Sequence[float | None]
    lower: Sequence[float | None] | None = None
    upper: Sequence[float | None] | None = None
    kind: Literal["line", "points", "bars"] = "line"
    colour: str = INK
    marker: Marker = "circle"
    filled: bool = True
    dash: Dash = "solid"
    size: float = 1.0
    opacity: float = 1.0
    texts: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    legend: bool = True
    width: float | None = None
    fill: bool = False


@dataclass(frozen=True)
class Heat:
    """A map of values in rows and columns, such as layers and heads.

    Attributes:
        values: by row; None where there is none.
        rows: names of the rows, from above.
        columns: names of the columns.
        name: of the value, with units, for the colour bar and hover texts.
        diverging: whether colours go both ways from zero; else they rise from ``low``.
        low: value of the first colour; None for the data's own range.
        high: value of the last colour.
        texts: written in the cells, by row.
        framed: cells with an outline, each as (row, column), counted from 0.
    """

    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    name: str
    diverging: bool = False
    low: float | None = None
    high: float | None = None
    texts: Sequence[Sequence[str]] | None = None
    framed: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Rule:
    """A reference line across a pane.

    Attributes:
        at: where, in units of its axis; of the diagonal it is the offset y − x.
        axis: ``"y"`` for a horizontal line, ``"x"`` for a vertical one, ``"diagonal"`` for y = x.
        name: written at its end; may be empty.
        colour: as ``"#RRGGBB"``.
        dash: of the line.
    """

    at: float
    axis: Literal["x", "y", "diagonal"] = "y"
    name: str = ""
    colour: str = NOTE
    dash: Dash = "dot"


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis, from one place to another, both included."""

    start: str | float
    end: str | float
    colour: str = COUNTERFACTUAL


@dataclass(frozen=True)
class Pane:
    """One pair of axes.

    Attributes:
        marks: drawn in this order.
        heat: a map instead of marks.
        rules: reference lines.
        bands: shaded stretches.
        title: above the pane.
        x_title: with units.
        y_title: with units.
        x_range: limits; None for the data's own.
        y_range: limits.
        x_log: whether the x axis is logarithmic.
        y_log: whether the y axis is.
        square: whether a unit of x is as long as one of y, as where y = x is drawn.
        note: a short text in a corner of the pane.
        horizontal: whether places run down the side, the first one on top, and values to the right:
            for places with long names. ``x`` still means places and ``y`` values, in the titles,
            ranges, rules and bands too.
    """

    marks: Sequence[Marks] = ()
    heat: Heat | None = None
    rules: Sequence[Rule] = ()
    bands: Sequence[Band] = ()
    title: str = ""
    x_title: str = ""
    y_title: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_log: bool = False
    y_log: bool = False
    square: bool = False
    note: str = ""
    horizontal: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure of one or more panes.

    Attributes:
        panes: in reading order.
        title: what the figure shows, one line.
        subtitle: model, data and how to read it, one or two lines.
        columns: panes side by side before a new row begins.
        share_x: whether the panes of a column have one x axis.
        share_y: whether the panes of a row have one y axis.
        heights: of the rows, relative to each other; None for equal ones.
    """

    panes: Sequence[Pane]
    title: str = ""
    subtitle: str = ""
    columns: int = 1
    share_x: bool = False
    share_y: bool = False
    heights: Sequence[float] | None = None


@dataclass(frozen=True)
class Table:
    """A table that readers can sort.

    Attributes:
        columns: headings, with units where there are any.
        rows: one value a column; numbers stay numbers, None is shown as a dash.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Panel:
    """Charts and a table of a report, with what they show in plain words.

    Attributes:
        name: short identifier, unique in the report, of letters, digits and hyphens.
        title: one line.
        text: what is seen and how to read it; plain sentences, paragraphs apart by a blank line.
        charts: choice to chart. One entry is simply shown; with several, the reader chooses by key
            (a site, a head).
        choice: what the keys of ``charts`` are, such as ``"site"``; empty for a single chart.
        table: shown below the charts.
    """

    name: str
    title: str
    text: str
    charts: dict[str, Chart] = field(default_factory=dict)
    choice: str = ""
    table: Table | None = None
