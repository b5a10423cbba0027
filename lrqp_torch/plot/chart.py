"""The description of a chart: what is drawn, in no library's terms.

A :class:`Chart` is one or more panes; a pane holds marks (curves, points, bars with intervals) or
one heat map, with reference lines and shaded bands. The same description is drawn with plotly
(interactive), with matplotlib (PNG and SVG), and as a table of its numbers. All text is plain: no
library's markup, a line break where lines end, and :func:`strong` for what stands out.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Okabe and Ito's palette, which colour-blind readers can tell apart.
GREEN, BLUE, VERMILION = "#009E73", "#0072B2", "#D55E00"
ORANGE, SKY, PURPLE, BLACK = "#E69F00", "#56B4E9", "#CC79A7", "#000000"
INK, NOTE, CLEAN = "#222222", "#767676", "#555555"
PROBE, CONTROL, COUNTERFACTUAL = GREEN, BLUE, VERMILION

CONDITION_COLOURS = {"clean": CLEAN, "control": CONTROL, "counterfactual": COUNTERFACTUAL}

Marker = Literal[
    "circle", "square", "triangle", "diamond", "cross", "star", "pentagon", "down", "plus", "tick",
    "none",
]  # fmt: skip
Dash = Literal["solid", "dash", "dot", "none"]
Cell = str | float | int | None

SHARES = (-4.0, 104.0)
"""Limits of an axis of shares in per cent."""

LOOKS: tuple[tuple[str, Marker], ...] = (
    (BLUE, "circle"), (VERMILION, "square"), (GREEN, "triangle"), (PURPLE, "diamond"),
    (ORANGE, "down"), (SKY, "pentagon"), (BLACK, "star"),
)  # fmt: skip
"""Colour and marker of the first, second, ... of several curves, tasks or classes."""


@dataclass(frozen=True)
class Marks:
    """Values against places: a curve, points of the plane, or bars."""

    name: str  # in the legend, in hover texts and as a table's heading
    # Where each value stands: names of places in their order (sites, methods), or numbers.
    x: Sequence[str] | Sequence[float]
    y: Sequence[float | None]  # the values; None leaves a gap
    # Lower ends of their intervals, or None where none is known.
    lower: Sequence[float | None] | None = None
    upper: Sequence[float | None] | None = None  # upper ends
    # Lower ends of intervals along x, where x are numbers.
    x_lower: Sequence[float | None] | None = None
    x_upper: Sequence[float | None] | None = None  # upper ends
    # ``"line"`` joins the points, ``"points"`` does not, ``"bars"`` reach to zero, and ``"steps"``
    # shades all below a staircase. Bars at the same places stand side by side; bars at numbers
    # overlap, as those of histograms do.
    kind: Literal["line", "points", "bars", "steps"] = "line"
    colour: str = INK  # as ``"#RRGGBB"``
    marker: Marker = "circle"  # shape of the points, so that curves differ by more than colour
    filled: bool = True  # whether markers are filled
    dash: Dash = "solid"  # of the line
    size: float = 1.0  # of the markers, against the usual ones
    stroke: float = 1.0  # thickness of the line, against the usual one
    opacity: float = 1.0  # of the marks, from 0 to 1
    # What each mark is, shown above its name and value when the reader points at it.
    texts: Sequence[str] | None = None
    notes: Sequence[str] | None = None  # shown below its value
    labels: Sequence[str] | None = None  # written beside the marks
    legend: bool = True  # whether to name it
    width: float | None = None  # of bars at numbers, in units of x; None for the usual
    fill: bool = False  # whether the area below a line is lightly shaded
    shift: float = 0.0  # how far to stand beside the named places, in units of their distance

    @property
    def named(self) -> bool:
        """Whether it stands at named places rather than at numbers."""
        return any(isinstance(place, str) for place in self.x)


@dataclass(frozen=True)
class Heat:
    """A map of values in rows and columns, such as layers and heads."""

    values: Sequence[Sequence[float | None]]  # by row; None where there is none
    rows: Sequence[str]  # names of the rows, from above
    columns: Sequence[str]  # names of the columns
    name: str  # of the value, with units, for the colour bar and hover texts
    diverging: bool = False  # whether colours go both ways from zero; else they rise from ``low``
    low: float | None = None  # value of the first colour; None for the data's own range
    high: float | None = None  # value of the last colour
    texts: Sequence[Sequence[str]] | None = None  # written in the cells, by row
    # Cells with an outline, each as (row, column), counted from 0.
    framed: Sequence[tuple[int, int]] = ()
    crossed: Sequence[tuple[int, int]] = ()  # cells with a cross in their corner
    gaps: Sequence[int] = ()  # rows before which a gap is left
    bar: bool = True  # whether a colour bar stands beside the map

    @property
    def limits(self) -> tuple[float, float]:
        """Values of the first and last colour; of a diverging map as far from zero."""
        known = [value for row in self.values for value in row if value is not None] or [0.0]
        if self.diverging:
            end = max(map(abs, known)) or 1.0
            low, high = -end, end
        else:
            low, high = min(known), max(known)
        low = low if self.low is None else self.low
        high = high if self.high is None else self.high
        return low, high if high > low else low + 1.0


@dataclass(frozen=True)
class Rule:
    """A reference line across a pane."""

    at: float  # where, in units of its axis; of the diagonal it is the offset y − x
    # ``"y"`` for a line at a value of y, ``"x"`` for one at x, ``"diagonal"`` for y = x.
    axis: Literal["x", "y", "diagonal"] = "y"
    name: str = ""  # written at its end; may be empty
    colour: str = NOTE  # as ``"#RRGGBB"``
    dash: Dash = "dot"  # of the line


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis, from one place to another, both included."""

    start: str | float
    end: str | float
    colour: str = COUNTERFACTUAL


@dataclass(frozen=True)
class Pane:
    """One pair of axes."""

    marks: Sequence[Marks] = ()  # drawn in this order
    heat: Heat | None = None  # a map instead of marks
    rules: Sequence[Rule] = ()  # reference lines
    bands: Sequence[Band] = ()  # shaded stretches
    title: str = ""  # above the pane
    x_title: str = ""  # with units
    y_title: str = ""  # with units
    x_range: tuple[float, float] | None = None  # limits; None for the data's own
    y_range: tuple[float, float] | None = None  # limits
    x_log: bool = False  # whether the x axis is logarithmic
    y_log: bool = False  # whether the y axis is
    square: bool = False  # whether a unit of x is as long as one of y, as where y = x is drawn
    # Whether places run down the side, the first one on top, and values to the right: for places
    # with long names. ``x`` still means places and ``y`` values, in the titles, ranges, rules and
    # bands too.
    horizontal: bool = False
    # Names of the places of x in their order; default as the marks have them.
    places: Sequence[str] | None = None
    ticks: bool = True  # whether the axes are labelled with numbers
    # On paper, where the marks' names stand, each in its colour: in a ``"legend"`` below, at the
    # curves' ``"ends"``, in a ``"corner"`` of the pane, or ``"beside"`` it. The interactive figure
    # has a legend.
    names: Literal["legend", "ends", "corner", "beside"] = "legend"
    note: str = ""  # a short text in a corner of the pane

    @property
    def named(self) -> bool:
        """Whether x has named places."""
        return self.heat is None and any(marks.named for marks in self.marks)


@dataclass(frozen=True)
class Chart:
    """A figure of one or more panes."""

    panes: Sequence[Pane]  # in reading order
    title: str = ""  # what the figure shows, one line
    subtitle: str = ""  # model, data and how to read it, one or two lines
    columns: int = 1  # panes side by side before a new row begins
    share_x: bool = False  # whether the panes of a column have one axis across the page
    share_y: bool = False  # whether the panes of a row have one axis up the page
    # Of the rows, relative to each other; None for equal ones.
    heights: Sequence[float] | None = None
    widths: Sequence[float] | None = None  # of the columns, likewise
    # Width and height on paper, in inches; None for what suits the panes.
    size: tuple[float, float] | None = None

    def table(self) -> "Table":
        """The numbers of the chart: a row a place, or a row a mark where x are numbers.

        A heat map keeps its rows and columns. Where there are several panes, each is named by its
        title, or what it shows.
        """
        parts = [_tabulated(pane) for pane in self.panes]
        if len(parts) == 1:
            return parts[0]
        headings = list(dict.fromkeys(name for part in parts for name in part.columns))
        rows: list[list[Cell]] = []
        for number, (pane, part) in enumerate(zip(self.panes, parts, strict=True), start=1):
            title = pane.title or pane.y_title or str(number)
            for row in part.rows:
                cells = dict(zip(part.columns, row, strict=True))
                rows.append([title, *(cells.get(name) for name in headings)])
        return Table(["pane", *headings], rows)


@dataclass(frozen=True)
class Table:
    """A table that readers can sort."""

    columns: Sequence[str]  # headings, with units where there are any
    # One value a column; numbers stay numbers, None is shown as a dash.
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Panel:
    """Charts and a table of a report, with what they show in plain words."""

    name: str  # short identifier, unique in the report, of letters, digits and hyphens
    title: str  # one line
    text: str  # what is seen and how to read it; plain sentences, paragraphs apart by a blank line
    # Choice to chart. One entry is simply shown; with several, the reader chooses by key (a site, a
    # head).
    charts: dict[str, Chart] = field(default_factory=dict)
    # What the keys of ``charts`` are, such as ``"site"``; empty for a single chart.
    choice: str = ""
    table: Table | None = None  # shown below the charts


# ---- helpers of those who describe charts --------------------------------------------------------


def strong(text: str) -> str:
    """Text that stands out within a text of marks, where the drawing library can show that."""
    return f"\x02{text}\x03"


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the index-th of several curves, tasks or classes, for :class:`Marks`."""
    colour, marker = LOOKS[index % len(LOOKS)]
    return {"colour": colour, "marker": marker}


def ends(value: Any) -> tuple[float | None, float | None, float | None]:
    """Value, lower and upper end of a number, of such three, or of what has them as attributes."""
    if value is None or isinstance(value, int | float):
        return value, None, None
    if not isinstance(value, Sequence):
        value = value.value, value.lower, value.upper
    number, lower, upper = value
    return (None, None, None) if number is None else (number, lower, upper)


def marks_of(
    name: str, x: Sequence[Any], values: Iterable[Any], *, scale: float = 1.0, **looks: Any
) -> Marks:
    """Numbers, with their intervals where they have any, as marks.

    ``x`` says where each stands; the values, as :func:`ends` takes them, are multiplied by
    ``scale``, such as 100 for per cent, and None leaves a gap. ``looks`` are other fields of
    :class:`Marks`.
    """
    y, lower, upper = (
        [None if end is None else scale * end for end in column]
        for column in zip(*map(ends, values), strict=True)
    )
    known = any(end is not None for end in (*lower, *upper))
    return Marks(name, x, y, lower if known else None, upper if known else None, **looks)


def edges(values: Sequence[float], bins: int = 40) -> list[float]:
    """Limits of equally wide bins that hold all values, one more than there are bins."""
    low, high = min(values), max(values)
    width = (high - low or 1.0) / bins
    return [low + width * step for step in range(bins + 1)]


def counted(name: str, values: Sequence[float], limits: Sequence[float], **style: Any) -> Marks:
    """The histogram of values as bars.

    Each is counted in one of the bins between ``limits``, as :func:`edges` gives them; a limit
    belongs to the bin above it, the last one to the last bin. ``style`` are further fields of
    :class:`Marks`.
    """
    counts = [0] * (len(limits) - 1)
    for value in values:
        counts[min(max(bisect_right(limits, value) - 1, 0), len(counts) - 1)] += 1
    width = limits[1] - limits[0]
    centres = [limit + width / 2 for limit in limits[:-1]]
    return Marks(name, centres, [*map(float, counts)], kind="bars", width=width, **style)


def _tabulated(pane: Pane) -> Table:
    heat = pane.heat
    if heat is not None:
        corner = " / ".join(title for title in (pane.y_title, pane.x_title) if title)
        rows = [[name, *row] for name, row in zip(heat.rows, heat.values, strict=True)]
        return Table([corner or heat.name, *heat.columns], rows)
    if pane.named:
        return _by_place(pane)
    x, y = pane.x_title or "x", pane.y_title or "y"
    known = any(marks.lower is not None for marks in pane.marks)
    return Table(
        ["curve", x, y, *(("lower 95 %", "upper 95 %") if known else ())],
        [
            [_line(marks.name), marks.x[i], marks.y[i], *(_interval(marks, i) if known else ())]
            for marks in pane.marks
            for i in range(len(marks.x))
        ],
    )


def _by_place(pane: Pane) -> Table:
    columns: list[str] = [pane.x_title or "place"]
    cells: dict[str, dict[str, Cell]] = {place: {} for place in pane.places or ()}
    for marks in pane.marks:
        name = _line(marks.name) or pane.y_title
        sides = (f"{name}, lower 95 %", f"{name}, upper 95 %") if marks.lower is not None else ()
        columns += [heading for heading in (name, *sides) if heading not in columns]
        for index, (place, value) in enumerate(zip(marks.x, marks.y, strict=True)):
            row = cells.setdefault(str(place), {})
            more = dict(zip(sides, _interval(marks, index), strict=False))
            for heading, cell in {name: value, **more}.items():
                row[heading] = f"{row[heading]}, {cell}" if heading in row else cell
    rows = [
        [_line(place), *(row.get(name) for name in columns[1:])] for place, row in cells.items()
    ]
    return Table(columns, rows)


def _interval(marks: Marks, index: int) -> tuple[float | None, float | None]:
    if marks.lower is None or marks.upper is None:
        return None, None
    return marks.lower[index], marks.upper[index]


def _line(name: str) -> str:
    return name.replace("\n", " ")
