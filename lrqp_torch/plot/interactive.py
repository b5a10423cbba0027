"""Charts for the screen: described to plotly, as the JSON that plotly.js draws.

Nothing of plotly is needed to describe them. Every text is escaped, for plotly reads some tags of
HTML; backgrounds are transparent, and a page gives the text its colour.
"""

import math
import re
from html import escape
from textwrap import wrap
from typing import Any

from lrqp_torch.plot.chart import BLACK, COUNTERFACTUAL, INK, NOTE, Chart, Heat, Marks, Pane, Rule
from lrqp_torch.plot.layout import (
    DIVERGING,
    RISING,
    Cell,
    Spots,
    cells,
    common_title,
    distances,
    extent,
    legend,
    written,
)

CLEAR = "rgba(0,0,0,0)"
GRID = "rgba(128,128,128,0.25)"
ZERO = "rgba(128,128,128,0.6)"

_WIDTH = 820
"""Pixels that a figure is taken to be wide where its legend is laid out."""

_NARROW = 440
"""Pixels of the narrowest page on which names of points and lines are to keep clear of the rest."""

_SYMBOLS = {
    "triangle": "triangle-up", "cross": "x", "down": "triangle-down", "plus": "cross",
    "tick": "line-ew-open", "none": "circle",
}  # fmt: skip
"""Markers that plotly calls by another name."""


def to_plotly(chart: Chart, *, alone: bool = True) -> dict[str, Any]:
    """The chart as plotly's figure: plain lists and dictionaries of ``data`` and ``layout``.

    If ``alone`` it carries its title, and colours that can be seen on any background, as a notebook
    needs; the report's page has both itself.
    """
    placed = cells(chart)
    named = legend(placed, beside=False)
    layout: dict[str, Any] = {
        "template": "none", "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "hovermode": "closest",
        "barmode": "overlay", "shapes": [], "annotations": [], "showlegend": bool(named),
    }  # fmt: skip
    _place(layout, chart, placed, alone)
    data: list[dict[str, Any]] = []
    wide = max(260.0, _NARROW / (1 + max(cell.column for cell in placed)))
    for cell in placed:
        spots = Spots(cell, wide / 6, _height(cell, placed[-1].row + 1) / 15)
        axes = {"xaxis": f"x{_end(cell)}", "yaxis": f"y{_end(cell)}"}
        if cell.pane.heat is not None:
            data.append(_map(cell.pane.heat, layout, cell) | axes)
        else:
            data += [
                _trace(cell, marks, index, spots)
                | axes
                | {"showlegend": (cell.number, index) in named}
                for index, marks in enumerate(cell.pane.marks)
            ]
        _rules_and_bands(layout, cell, spots)
    figure = {"data": data, "layout": layout}
    return _on_any_page(figure) if alone else figure


# ---- what is drawn -------------------------------------------------------------------------------


def _trace(cell: Cell, marks: Marks, index: int, spots: Spots) -> dict[str, Any]:
    pane, bar = cell.pane, cell.bars().get(index)
    x, y = cell.at(marks), list(marks.y)
    if bar is not None:
        x = [place + bar[0] for place in x]
    name = _text(marks.name)
    trace: dict[str, Any] = {"name": name, "legendgroup": name}
    places, values = ("y", "x") if pane.horizontal else ("x", "y")
    for axis, numbers, lower, upper in (
        (places, x, marks.x_lower, marks.x_upper),
        (values, y, marks.lower, marks.upper),
    ):
        trace[axis] = numbers
        away = distances(numbers, lower, upper)
        if away is not None:
            look = {"thickness": 1, "width": 3} | ({"color": NOTE} if bar else {})
            ends = {"type": "data", "symmetric": False, "arrayminus": away[0], "array": away[1]}
            trace[f"error_{axis}"] = ends | look
    if bar is not None:
        trace |= {
            "type": "bar",
            "orientation": "h" if pane.horizontal else "v",
            "width": bar[1],
            "marker": {"color": marks.colour, "opacity": 0.85 * marks.opacity},
        }
    else:
        trace |= _line_and_markers(marks, pane.horizontal)
    if marks.labels:
        beside: Any = "outside" if bar else "middle right"
        if not bar and not pane.horizontal:
            texts = zip(marks.labels, x, y, strict=True)
            beside = [
                spots.beside(t, a, b) if t and b is not None else "top right" for t, a, b in texts
            ]
        trace |= {"text": [_text(label) for label in marks.labels], "textposition": beside}
        trace["textfont"] = {"color": NOTE, "size": 11}
    return trace | ({"hoverinfo": "skip"} if marks.kind == "steps" else _hover(cell, marks))


def _line_and_markers(marks: Marks, horizontal: bool) -> dict[str, Any]:
    steps, few = marks.kind == "steps", len(marks.x) == 1
    line = steps or (marks.kind == "line" and marks.dash != "none" and not few)
    modes = ["lines"] if line else []
    modes += ["markers"] if not steps and marks.marker != "none" else []
    modes += ["text"] if marks.labels else []
    symbol = _SYMBOLS.get(marks.marker, marks.marker)
    if marks.marker == "tick" and horizontal:
        symbol = "line-ns-open"
    open_ = "" if marks.filled or symbol.endswith("-open") else "-open"
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "+".join(modes) or "none",
        "line": {"color": marks.colour, "width": 0 if steps else 2 * marks.stroke},
        "marker": {
            "color": marks.colour, "symbol": symbol + open_, "size": 7 * marks.size,
            "opacity": marks.opacity,
        },
    }  # fmt: skip
    if steps:
        trace["line"]["shape"] = "hv"
    if line and marks.dash not in ("solid", "none"):
        trace["line"]["dash"] = marks.dash
    if steps or marks.fill:
        red, green, blue = (int(marks.colour[start : start + 2], 16) for start in (1, 3, 5))
        opacity = (0.12 if marks.fill else 1.0) * marks.opacity
        trace |= {"fill": "tozeroy", "fillcolor": f"rgba({red},{green},{blue},{opacity})"}
    return trace


def _hover(cell: Cell, marks: Marks) -> dict[str, Any]:
    """What is shown where the reader points: texts, the name, place and value, notes."""
    pane = cell.pane
    plain = not marks.named and marks.lower is None and marks.x_lower is None
    lines: list[str] = []
    hover: dict[str, Any] = {}
    if marks.texts is not None:
        hover["hovertext"] = [_text(text) for text in marks.texts]
        lines += ["%{hovertext}", ""]
    notes = list(marks.notes or [""] * len(marks.x))
    if plain:
        # Numbers alone: plotly writes them, so that the file need not.
        across, up = (
            f"%{{{axis}:.4~g}}{' %' if '(%' in title else ''}"
            for axis, title in (("x", pane.x_title), ("y", pane.y_title))
        )
        lines.append(f"{across} → {up}" if pane.square else f"{across}: {up}")
    else:
        lines.append("%{customdata}")
        values = (_value(pane, marks, index) for index in range(len(notes)))
        notes = ["\n".join(filter(None, both)) for both in zip(values, notes, strict=True)]
    if any(notes):
        hover["customdata"] = [_text(note) for note in notes]
        lines += ["%{customdata}"] if plain else []
    name = _text(marks.name).replace("%{", "%&#123;")
    if marks.texts is not None and marks.name:
        lines.insert(2, f"<b>{name}</b>")
        name = ""
    return hover | {"hovertemplate": f"{'<br>'.join(lines)}<extra>{name}</extra>"}


def _value(pane: Pane, marks: Marks, index: int) -> str:
    """Place and value of a mark, with its interval."""

    def of(value: Any, title: str, *sides: Any) -> str:
        text = value if isinstance(value, str) else written(value, title)
        ends = [side[index] for side in sides if side is not None and side[index] is not None]
        known = " to ".join(written(end, title) for end in ends)
        return f"{text} ({known})" if known else text

    x = of(marks.x[index], pane.x_title, marks.x_lower, marks.x_upper).replace("\n", " ")
    return f"{x}: {of(marks.y[index], pane.y_title, marks.lower, marks.upper)}"


def _map(heat: Heat, layout: dict[str, Any], cell: Cell) -> dict[str, Any]:
    (low, high), end = heat.limits, _end(cell)
    here = {"xref": f"x{end}", "yref": f"y{end}"}
    for row, column in heat.framed:
        box = {"x0": column - 0.46, "x1": column + 0.46, "y0": row - 0.44, "y1": row + 0.44}
        line = {"line": {"color": INK, "width": 1.5}}
        layout["shapes"].append({"type": "rect", **here, **box, **line})
    for row, column in heat.crossed:
        at = {**here, "x": column + 0.33, "y": row - 0.27}
        _annotate(layout, "<b>×</b>", at, COUNTERFACTUAL, 15)
    colours = DIVERGING if heat.diverging else RISING
    trace: dict[str, Any] = {
        "type": "heatmap", "name": _text(heat.name),
        "x": [*map(_text, heat.columns)], "y": [*map(_text, heat.rows)],
        "z": [list(row) for row in heat.values], "zmin": low, "zmax": high,
        "colorscale": [list(step) for step in colours],
        "hovertemplate": f"%{{y}}, %{{x}}<br>{_text(heat.name)}: %{{z:.4~g}}<extra></extra>",
        "hoverongaps": False, "xgap": 1, "ygap": 1, "showscale": heat.bar,
    }  # fmt: skip
    if heat.texts is not None:
        texts = [[*map(_text, row)] for row in heat.texts]
        trace |= {"text": texts, "texttemplate": "%{text}"}
    if heat.bar:
        x, y = (layout[f"{axis}axis{end}"]["domain"] for axis in "xy")
        trace["colorbar"] = {
            "x": x[1], "xanchor": "left", "xpad": 6, "y": (y[0] + y[1]) / 2,
            "len": y[1] - y[0], "thickness": 12, "outlinewidth": 0,
        }  # fmt: skip
    return trace


def _rules_and_bands(layout: dict[str, Any], cell: Cell, spots: Spots) -> None:
    pane, end = cell.pane, _end(cell)
    for band in pane.bands:
        look = {"type": "rect", "fillcolor": band.colour, "opacity": 0.11, "line": {"width": 0}}
        across = _across(pane, "x", *cell.band(band.start, band.end), end)
        layout["shapes"].append(across | look | {"layer": "below"})
    for rule in pane.rules:
        line = {"color": rule.colour, "width": 1.4 if rule.dash == "dash" else 1, "dash": rule.dash}
        # Bars would cover it.
        layer = "above" if any(marks.kind == "bars" for marks in pane.marks) else "below"
        shape, name = _rule(pane, rule, end, spots)
        layout["shapes"].append(shape | {"type": "line", "layer": layer, "line": line})
        _annotate(layout, _text(rule.name), name, rule.colour, 11)


def _rule(pane: Pane, rule: Rule, end: str, spots: Spots) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a rule is, and where its name."""
    if rule.axis == "diagonal":
        # Plotly has no endless lines: from corner to corner of what is shown.
        sides = extent(pane, "x"), extent(pane, "y")
        low, high = (
            corner(sides[0][i], sides[1][i] - rule.at) for i, corner in enumerate((max, min))
        )
        here = {"xref": f"x{end}", "yref": f"y{end}"}
        ends = {"x0": low, "x1": high, "y0": low + rule.at, "y1": high + rule.at}
        at = {"x": high, "y": high + rule.at, "xanchor": "right", "yanchor": "top"}
        return here | ends, here | at
    # The axis of the page that the rule stands on, and the one along which it runs.
    on, along = ("y", "x") if (rule.axis == "y") != pane.horizontal else ("x", "y")
    level, side, far = "top", "left", 1
    if on == "y":
        where = spots.along(rule) if rule.name and not pane.horizontal else "top right"
        level, side = "bottom" if "top" in where else "top", where.split()[1]
        far = int(side == "right")
    at = {f"{along}ref": f"{along}{end} domain", along: far, f"{on}ref": f"{on}{end}", on: rule.at}
    return _across(pane, rule.axis, rule.at, rule.at, end), at | {"xanchor": side, "yanchor": level}


def _across(pane: Pane, axis: str, low: float, high: float, end: str) -> dict[str, Any]:
    """References of a shape between two values of an axis, along the whole of the other one."""
    own, other = ("x", "y") if (axis == "x") != pane.horizontal else ("y", "x")
    whole = {f"{other}ref": f"{other}{end} domain", f"{other}0": 0, f"{other}1": 1}
    return whole | {f"{own}ref": f"{own}{end}", f"{own}0": low, f"{own}1": high}


def _annotate(
    layout: dict[str, Any], text: str, at: dict[str, Any], colour: str = "", size: int = 12
) -> None:
    """Write a text, unless it is empty, somewhere in the figure."""
    font = {"size": size} | ({"color": colour} if colour else {})
    if text:
        layout["annotations"].append({"text": text, "showarrow": False, "font": font, **at})


# ---- where it is drawn ---------------------------------------------------------------------------


def _place(layout: dict[str, Any], chart: Chart, placed: list[Cell], alone: bool) -> None:
    """Axes of every pane, titles, and the height of the whole."""
    columns = max(cell.column for cell in placed) + 1
    by_row = [[cell for cell in placed if cell.row == row] for row in range(placed[-1].row + 1)]
    tall = [max(_height(cell, len(by_row)) for cell in row) for row in by_row]
    if chart.heights is not None:
        tall = [sum(tall) * share / sum(chart.heights) for share in chart.heights]
    titles = [max(_rows_of(_title(cell.pane)) for cell in row) * 19 for row in by_row]
    below = [max(_below(cell, chart.share_x and not cell.lowest) for cell in row) for row in by_row]
    names = sum(7 * len(name) + 58 for name in legend(placed, beside=False).values())
    foot = below[-1] + 26 * -(-names // _WIDTH) + 8
    head = 16 + titles[0]
    if alone and chart.title:
        head += 30 + 17 * len(chart.subtitle.splitlines())
        layout["title"] = {
            "text": _text(chart.title), "x": 0.01, "xanchor": "left",
            "subtitle": {"text": _text(chart.subtitle), "font": {"size": 12}},
        }  # fmt: skip
    inner = sum(tall) + sum(below[:-1]) + sum(titles[1:])
    layout["height"] = round(head + inner + foot)
    layout["margin"] = {"l": 64, "r": 20, "t": head, "b": round(foot)}
    # Below, where a legend of several lines covers neither titles nor the tool bar.
    at_foot = {"orientation": "h", "yref": "container", "y": 0.005, "yanchor": "bottom", "x": 0}
    layout["legend"] = at_foot
    widths = chart.widths or [1.0] * columns
    gap = 0.03 if chart.share_y else 0.09 if columns < 4 else 0.06
    gap += 0.05 * any(cell.pane.heat is not None and cell.pane.heat.bar for cell in placed)
    room = (1 - gap * (columns - 1)) / sum(widths)
    across = common_title([cell.pane.x_title for cell in placed], columns if columns > 2 else 0)
    top = 1.0
    for row, row_cells in enumerate(by_row):
        bottom = max(top - tall[row] / inner, 0.0)
        for cell in row_cells:
            left, end = sum(widths[: cell.column]) * room + gap * cell.column, _end(cell)
            right = left + widths[cell.column] * room
            x, y = _axes(cell, chart, placed, tall[row])
            if across and cell.column != columns // 2:
                x.pop("title", None)
            layout[f"xaxis{end}"] = x | {"domain": [left, right], "anchor": f"y{end}"}
            layout[f"yaxis{end}"] = y | {"domain": [bottom, top], "anchor": f"x{end}"}
            at = {"align": "left", "xanchor": "left", "x": left, "xref": "paper"}
            above = at | {"y": top, "yref": "paper", "yanchor": "bottom"}
            _annotate(layout, _title(cell.pane), above)
            corner = {"x": 0.01, "xref": f"x{end} domain", "y": 0.99, "yref": f"y{end} domain"}
            _annotate(layout, _text(cell.pane.note), at | corner | {"yanchor": "top"}, size=11)
        following = titles[row + 1] if row + 1 < len(by_row) else 0
        top = bottom - (below[row] + following) / inner


def _rows_of(text: str) -> int:
    return text.count("<br>") + 1 if text else 0


def _title(pane: Pane) -> str:
    """The title of a pane; names that stand beside it on paper stand above it here."""
    named = [m.name for m in pane.marks if m.name and m.legend and pane.names == "beside"]
    names = [_text(name.replace("\n", " · ")) for name in named]
    return "<br>".join([*([f"<b>{_text(pane.title)}</b>"] if pane.title else []), *names])


def _axes(
    cell: Cell, chart: Chart, placed: list[Cell], height: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Axes across and up the page."""
    pane = cell.pane
    x: dict[str, Any] = {"gridcolor": GRID, "zerolinecolor": ZERO, "automargin": True}
    y = dict(x)
    for axis, title, asked, log in (
        (x, pane.x_title, pane.x_range, pane.x_log),
        (y, pane.y_title, pane.y_range, pane.y_log),
    ):
        upright = (axis is y) != pane.horizontal
        lines = wrap(title, max(20, int(height / 7.5))) if upright else [title]
        axis["title"] = {"text": _text("\n".join(lines))}
        axis |= {"type": "log"} if log else {}
        if asked is not None:
            axis["range"] = [math.log10(value) for value in asked] if log else list(asked)
        if not pane.ticks:
            axis["showticklabels"] = False
        if pane.heat is not None:
            axis |= {"type": "category", "showgrid": False, "zeroline": False}
    if pane.heat is not None:
        y["autorange"] = "reversed"
    if cell.places:
        chosen, ends = cell.labelled(), [-0.6, len(cell.places) - 0.4]
        x |= {"tickvals": chosen, "ticktext": [_text(cell.places[index]) for index in chosen]}
        x |= {"range": ends, "zeroline": False}
        if pane.horizontal:
            x |= {"range": ends[::-1], "showgrid": False}
        elif cell.slanted():
            x["tickangle"] = -45
    if pane.horizontal:
        x, y = y, x
    if chart.share_x and cell.row:
        x["matches"] = f"x{_end(placed[cell.column])}"
    if chart.share_x and not cell.lowest:
        x["showticklabels"] = False
        x.pop("title")
    if chart.share_y and cell.column:
        y |= {"matches": f"y{_end(placed[cell.number - cell.column])}", "showticklabels": False}
        y.pop("title")
    if pane.square:
        x["constrain"] = y["constrain"] = "domain"
        y["scaleanchor"] = f"x{_end(cell)}"
    return x, y


def _height(cell: Cell, rows: int) -> float:
    """Pixels of a pane, without its titles."""
    pane = cell.pane
    if pane.heat is not None:
        return min(560.0, max(120.0, 26.0 * len(pane.heat.rows)))
    if pane.horizontal and cell.places:
        return 30 + len(cell.places) * cell.thickness(14.0, 15, 26.0)
    if pane.square and rows == 1:
        return 420.0
    return {1: 310.0, 2: 235.0}.get(rows, 165.0)


def _below(cell: Cell, hidden: bool) -> float:
    """Pixels below a pane for labels and the title of its axis."""
    slanted = bool(cell.places) and not cell.pane.horizontal and cell.slanted()
    return 18.0 if hidden else 26.0 + 26.0 * bool(cell.titles[0]) + 34.0 * slanted


def _end(cell: Cell) -> str:
    """What plotly puts behind the x and y of a pane's axes."""
    return "" if cell.number == 0 else str(cell.number + 1)


# ---- words and colours ---------------------------------------------------------------------------


def _text(text: str) -> str:
    """Plain text as plotly reads it, which knows some tags and decodes no named quotes."""
    marked = escape(text, quote=False).replace("\n", "<br>")
    return re.sub("\x02(.*?)\x03", r"<b>\1</b>", marked)


def _on_any_page(figure: dict[str, Any]) -> dict[str, Any]:
    """Text and black marks in a grey that light and dark pages both show."""
    grey = "#808080"

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [changed(item) for item in value]
        return grey if isinstance(value, str) and value in (BLACK, INK) else value

    known: dict[str, Any] = changed(figure)
    known["layout"]["font"] = {"color": grey}
    return known
