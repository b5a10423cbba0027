"""What both renderers ask of a chart: where named places stand, how bars share them, and words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lrqp_torch.plot.chart import Chart, Marks, Pane, Rule

MOST_LABELLED = 26
"""Named places below an axis; of more, only the first of every few layers is labelled."""

DIVERGING = ((0.0, "#0072B2"), (0.5, "#F2F2F2"), (1.0, "#D55E00"))
"""Colours from below zero to above; blue and vermilion of Okabe and Ito."""

RISING = ((0.0, "#F2F2F2"), (1.0, "#0072B2"))
"""Colours from low values to high ones."""

_GROUP = 0.78
"""Share of the distance between two places that their bars fill."""


@dataclass(frozen=True)
class Cell:
    """A pane in its place."""

    pane: Pane  # what is drawn
    number: int  # from 0, in reading order
    row: int  # from above, from 0
    column: int  # from the left, from 0
    places: list[str]  # names of the places of x, in order; empty where x are numbers
    lowest: bool  # whether no pane is below it in its column

    def at(self, marks: Marks) -> list[float]:
        """Where marks stand along x: place i is at i."""
        if not marks.named:
            return [float(x) for x in marks.x]
        index = {name: float(i) for i, name in enumerate(self.places)}
        return [index[str(place)] + marks.shift for place in marks.x]

    @property
    def titles(self) -> tuple[str, str]:
        """Of the axes across and up the page."""
        titles = (self.pane.x_title, self.pane.y_title)
        return titles[::-1] if self.pane.horizontal else titles

    def band(self, start: str | float, end: str | float) -> tuple[float, float]:
        """Where a shaded stretch begins and ends along x; of places with their whole width."""
        if not self.places:
            return float(start), float(end)
        return self.places.index(str(start)) - 0.5, self.places.index(str(end)) + 0.5

    def labelled(self) -> list[int]:
        """Which places are named on the axis: all while they fit, else some layers' first."""
        if len(self.places) <= MOST_LABELLED or self.pane.horizontal:
            return list(range(len(self.places)))
        layers: dict[str, int] = {}
        for index, name in enumerate(self.places):
            layers.setdefault(name.split(".")[0], index)
        first = list(layers.values())
        return first[:: -(-len(first) // 16)]

    def bars(self) -> dict[int, tuple[float, float]]:
        """For each of the pane's bars, by number of its marks: shift along x, and width."""
        drawn = {i: marks for i, marks in enumerate(self.pane.marks) if marks.kind == "bars"}
        every = [place for marks in drawn.values() for place in set(marks.x)]
        beside = len(every) > len(set(every))
        width = _GROUP / len(drawn) if beside and drawn else _GROUP
        found = {}
        for number, (index, marks) in enumerate(drawn.items()):
            if not marks.named:
                found[index] = (0.0, marks.width or _nearest(self.at(marks)))
            else:
                shift = width * (number - (len(drawn) - 1) / 2) if beside else 0.0
                found[index] = (shift, marks.width or 0.94 * width)
        return found

    def thickness(self, least: float, line: float, bar: float) -> float:
        """Room of a place down the side: ``least`` and its lines, or its bars side by side."""
        lines = max(place.count("\n") + 1 for place in self.places)
        bars = self.bars().values()
        beside = any(shift for shift, _ in bars)
        return max(least + line * lines, bar * len(bars) * beside)

    def slanted(self) -> bool:
        """Whether the names of the places are too long to stand side by side."""
        labels = [self.places[index] for index in self.labelled()]
        return sum(len(label) + 2 for label in labels) > 44


CORNERS = ("top right", "bottom right", "top left", "bottom left")
"""Where a text may stand at its point, the usual place first."""


class Spots:
    """Where texts fit into a pane, ``wide`` letters wide and ``high`` lines high.

    Each takes the place at which it hides least.
    """

    def __init__(self, cell: Cell, wide: float, high: float) -> None:
        pane = cell.pane
        ends = (-0.6, len(cell.places) - 0.4) if cell.places else extent(pane, "x")
        self._axes = [(*ends, pane.x_log, wide), (*extent(pane, "y"), pane.y_log, high)]
        self._taken: list[tuple[float, float, float, float]] = []
        self._points: list[tuple[float, float]] = []
        for marks in pane.marks:
            if marks.kind == "bars":
                continue
            known = [(x, y) for x, y in zip(cell.at(marks), marks.y, strict=True) if y is not None]
            points = [self._at(x, y) for x, y in known if math.isfinite(x) and math.isfinite(y)]
            self._points += points
            if marks.kind != "points" and marks.dash != "none":
                for (a, b), (c, d) in pairwise(points):
                    steps = 1 + int(abs(c - a) + 2 * abs(d - b))
                    shares = [step / steps for step in range(1, steps)]
                    self._points += [(a + s * (c - a), b + s * (d - b)) for s in shares]

    def _at(self, *point: float) -> tuple[float, float]:
        """A point of the axes in letters from the left and lines from below."""
        found = []
        for value, (low, high, log, room) in zip(point, self._axes, strict=True):
            if log and min(value, low) > 0:
                value, low, high = (math.log10(number) for number in (value, low, high))
            found.append(room * (value - low) / ((high - low) or 1.0))
        return found[0], found[1]

    def beside(self, text: str, x: float, y: float) -> str:
        """The corner of a point, one of ``CORNERS``, at which its text stands best."""
        return self._best([(self._at(x, y), corner) for corner in CORNERS], text)[1]

    def along(self, rule: Rule) -> str:
        """Which end of a line across the pane its name stands best at, and on which side."""
        _, up = self._at(self._axes[0][0], rule.at)
        (left, right) = (0.5, up), (self._axes[0][3] - 0.5, up)
        ends = [(right, CORNERS[2]), (right, CORNERS[3]), (left, CORNERS[0]), (left, CORNERS[1])]
        (across, _), corner = self._best(ends, rule.name)
        return f"{corner.split()[0]} {'left' if across < 1 else 'right'}"

    def _best(
        self, places: Sequence[tuple[tuple[float, float], str]], text: str
    ) -> tuple[tuple[float, float], str]:
        (_, _, _, wide), (_, _, _, high) = self._axes
        found = []
        for (x, y), corner in places:
            left = x + 0.6 if "right" in corner else x - 0.6 - len(text)
            low = y + 0.15 if "top" in corner else y - 1.15
            box = left, left + len(text), low, low + 1
            hidden = sum(box[0] < a < box[1] and box[2] < b < box[3] for a, b in self._points)
            over = sum(
                box[0] < other[1] and other[0] < box[1] and box[2] < other[3] and other[2] < box[3]
                for other in self._taken
            )
            outside = max(0.0, -left, box[1] - wide) + 4 * max(0.0, -low, box[3] - high)
            found.append((hidden + 40 * over + 3 * outside, box))
        best = min(range(len(found)), key=lambda index: found[index][0])
        self._taken.append(found[best][1])
        return places[best]


def cells(chart: Chart) -> list[Cell]:
    """The panes in their places. Panes that share an axis have the same named places."""
    shared = chart.share_x or chart.share_y
    common = _places([pane for pane in chart.panes if pane.named]) if shared else []
    columns = max(1, min(chart.columns, len(chart.panes)))
    found = []
    for number, pane in enumerate(chart.panes):
        places = [] if not pane.named else common if shared else _places([pane])
        lowest = number + columns >= len(chart.panes)
        found.append(Cell(pane, number, *divmod(number, columns), places, lowest))
    return found


def legend(placed: Sequence[Cell], *, beside: bool) -> dict[tuple[int, int], str]:
    """Names in the legend, by number of pane and marks; what looks the same is named once.

    ``beside`` says whether names that are to stand at the ends of curves or in a corner go there.
    """
    found: dict[tuple[int, int], str] = {}
    looks: set[tuple[object, ...]] = set()
    for cell in placed:
        apart = cell.pane.names != "legend" if beside else cell.pane.names == "beside"
        before = set(looks)
        for index, marks in enumerate(cell.pane.marks):
            look = (marks.kind, marks.colour, marks.marker, marks.filled, marks.dash)
            if not marks.name or not marks.legend or apart or look in before:
                continue
            if marks.name not in found.values():
                found[cell.number, index] = marks.name
                looks.add(look)
    return found


def distances(
    values: Sequence[float | None],
    lower: Sequence[float | None] | None,
    upper: Sequence[float | None] | None,
) -> tuple[list[float], list[float]] | None:
    """From each value down to and up to the ends of its interval; 0 where that is not known."""
    if lower is None or upper is None:
        return None
    ends = list(zip(values, lower, upper, strict=True))
    return (
        [0.0 if v is None or end is None else max(v - end, 0.0) for v, end, _ in ends],
        [0.0 if v is None or end is None else max(end - v, 0.0) for v, _, end in ends],
    )


def extent(pane: Pane, axis: str) -> tuple[float, float]:
    """Limits of an axis: those asked for, or those of the values and intervals, with a margin."""
    asked = pane.x_range if axis == "x" else pane.y_range
    if asked is not None:
        return asked
    known: list[float] = []
    for marks in pane.marks:
        ends = (marks.lower, marks.upper) if axis == "y" else (marks.x_lower, marks.x_upper)
        for values in (marks.x if axis == "x" else marks.y, *ends):
            known += [value for value in values or () if isinstance(value, int | float)]
    known += [rule.at for rule in pane.rules if rule.axis == axis]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = 0.05 * (high - low or 1.0)
    return low - margin, high + margin


def common_title(titles: Sequence[str], repeated: int) -> str:
    """The title that all panes share, where several would repeat it; else empty."""
    return titles[0] if repeated > 2 and len(set(titles)) == 1 else ""


def written(value: float | None, title: str) -> str:
    """A value for readers, with the unit of its axis where that is per cent."""
    if value is None:
        return "–"
    text = f"{value:z.1f} %" if title.rstrip(")").endswith("(%") else f"{value:.4g}"
    return text.replace("-", "−")


def _places(panes: Sequence[Pane]) -> list[str]:
    ordered = [name for pane in panes for name in pane.places or ()]
    found = [str(x) for pane in panes for marks in pane.marks if marks.named for x in marks.x]
    return list(dict.fromkeys([*ordered, *found]))


def _nearest(x: Sequence[float]) -> float:
    """The least distance between two values, as the width of bars."""
    ordered = sorted(set(x))
    return min((b - a for a, b in pairwise(ordered)), default=1.0)
