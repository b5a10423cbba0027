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

_SYMBOLS = {
    "circle": "circle", "square": "square", "triangle": "triangle-up", "diamond": "diamond",
    "cross": "x", "star": "star", "pentagon": "pentagon", "down": "triangle-down",
    "plus": "cross", "tick": "line-ew-open", "none": "circle",
}  # fmt: skip


def to_plotly(chart: Chart, *, alone: bool = True) -> dict[str, Any]:
    """The chart as plotly's figure: plain lists and dictionaries of ``data`` and ``layout``.

    Args:
        chart: what is drawn.
        alone: whether it carries its title, and colours that can be seen on any background, as a
            notebook needs; the report's page has both itself.
    """
    placed = cells(chart)
    layout: dict[str, Any] = {
        "template": "none", "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "hovermode": "closest",
        "barmode": "overlay", "shapes": [], "annotations": [],
    }  # fmt: skip
    _place(layout, chart, placed, alone)
    data: list[dict[str, Any]] = []
    named = legend(placed, beside=False)
    for cell in placed:
        pane, bars = cell.pane, cell.bars()
        traces = [_trace(cell, marks, bars.get(i)) for i, marks in enumerate(pane.marks)]
        for index, trace in enumerate(traces):
            trace["showlegend"] = (cell.number, index) in named
        if pane.heat is not None:
            traces = [_map(pane.heat, layout, cell)]
        data += [trace | {"xaxis": f"x{_end(cell)}", "yaxis": f"y{_end(cell)}"} for trace in traces]
        _rules_and_bands(layout, cell)
    layout["showlegend"] = bool(named)
    figure = {"data": data, "layout": layout}
    return _on_any_page(figure) if alone else figure


# ---- what is drawn -------------------------------------------------------------------------------


def _trace(cell: Cell, marks: Marks, bar: tuple[float, float] | None) -> dict[str, Any]:
    pane = cell.pane
    x, y = cell.at(marks), list(marks.y)
    if bar is not None:
        x = [place + bar[0] for place in x]
    across, up = (y, x) if pane.horizontal else (x, y)
    trace: dict[str, Any] = {"x": across, "y": up, "name": _text(marks.name)}
    trace["legendgroup"] = trace["name"]
    value_errors = _errors(y, marks.lower, marks.upper, bar is not None)
    place_errors = _errors(x, marks.x_lower, marks.x_upper, bar is not None)
    if pane.horizontal:
        value_errors, place_errors = place_errors, value_errors
    trace |= {"error_y": value_errors} if value_errors else {}
    trace |= {"error_x": place_errors} if place_errors else {}
    if bar is not None:
        trace |= {
            "type": "bar",
            "orientation": "h" if pane.horizontal else "v",
            "width": bar[1],
            "marker": {"color": marks.colour, "opacity": 0.85 * marks.opacity},
        }
    else:
        few = len(x) == 1 and marks.kind == "line"
        line = marks.kind == "steps" or (marks.kind == "line" and marks.dash != "none" and not few)
        shape = (
            {"shape": "hv", "width": 0} if marks.kind == "steps" else {"width": 2 * marks.stroke}
        )
        modes = ["lines"] if line else []
        modes += ["markers"] if marks.kind != "steps" and marks.marker != "none" else []
        modes += ["text"] if marks.labels else []
        symbol = _SYMBOLS[marks.marker]
        if marks.marker == "tick" and pane.horizontal:
            symbol = "line-ns-open"
        open_ = "" if marks.filled or symbol.endswith("-open") else "-open"
        trace |= {
            "type": "scatter",
            "mode": "+".join(modes) or "none",
            "line": {"color": marks.colour, **shape},
            "marker": {
                "color": marks.colour,
                "symbol": symbol + open_,
                "size": 7 * marks.size,
                "opacity": marks.opacity,
            },
        }
        if line and marks.dash not in ("solid", "none"):
            trace["line"]["dash"] = marks.dash
        if marks.kind == "steps" or marks.fill:
            share = 0.12 if marks.fill else 1.0
            trace |= {"fill": "tozeroy", "fillcolor": _faint(marks.colour, share * marks.opacity)}
        if marks.kind == "steps":
            trace["hoverinfo"] = "skip"
    if marks.labels:
        trace |= {"text": [_text(label) for label in marks.labels], "textposition": "top right"}
        trace |= (
            {"textposition": "outside" if bar else "middle right"} if pane.horizontal or bar else {}
        )
        trace["textfont"] = {"color": NOTE, "size": 11}
    if marks.kind != "steps":
        trace |= _hover(cell, marks)
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
        notes = [
            "\n".join(filter(None, (_value(pane, marks, index), note)))
            for index, note in enumerate(notes)
        ]
    if any(notes):
        hover["customdata"] = [_text(note) for note in notes]
        if plain:
            lines.append("%{customdata}")
    name = _text(marks.name).replace("%{", "%&#123;")
    if marks.texts is not None and marks.name:
        lines.insert(2, f"<b>{name}</b>")
        name = ""
    return hover | {"hovertemplate": f"{'<br>'.join(lines)}<extra>{name}</extra>"}


def _value(pane: Pane, marks: Marks, index: int) -> str:
    """Place and value of a mark, with its interval."""

    def of(value: Any, title: str, lower: Any, upper: Any) -> str:
        text = value if isinstance(value, str) else written(value, title)
        ends = [None if side is None else side[index] for side in (lower, upper)]
        known = " to ".join(written(end, title) for end in ends if end is not None)
        return f"{text} ({known})" if known else text

    x = of(marks.x[index], pane.x_title, marks.x_lower, marks.x_upper).replace("\n", " ")
    return f"{x}: {of(marks.y[index], pane.y_title, marks.lower, marks.upper)}"


def _errors(values: Any, lower: Any, upper: Any, on_bars: bool) -> dict[str, Any] | None:
    away = distances(values, lower, upper)
    if away is None:
        return None
    bars = {"type": "data", "symmetric": False, "arrayminus": away[0], "array": away[1]}
    return bars | {"thickness": 1, "width": 3} | ({"color": NOTE} if on_bars else {})


def _map(heat: Heat, layout: dict[str, Any], cell: Cell) -> dict[str, Any]:
    (low, high), end = heat.limits, _end(cell)
    for row, column in heat.framed:
        layout["shapes"].append({
            "type": "rect", "xref": f"x{end}", "yref": f"y{end}", "x0": column - 0.46,
            "x1": column + 0.46, "y0": row - 0.44, "y1": row + 0.44,
            "line": {"color": INK, "width": 1.5},
        })  # fmt: skip
    for row, column in heat.crossed:
        layout["annotations"].append({
            "xref": f"x{end}", "yref": f"y{end}", "x": column + 0.33, "y": row - 0.27,
            "text": "<b>×</b>", "showarrow": False, "font": {"color": COUNTERFACTUAL, "size": 15},
        })  # fmt: skip
    trace: dict[str, Any] = {
        "type": "heatmap",
        "name": _text(heat.name),
        "x": [_text(name) for name in heat.columns],
        "y": [_text(name) for name in heat.rows],
        "z": [list(row) for row in heat.values],
        "zmin": low,
        "zmax": high,
        "colorscale": [list(step) for step in (DIVERGING if heat.diverging else RISING)],
        "hovertemplate": f"%{{y}}, %{{x}}<br>{_text(heat.name)}: %{{z:.4~g}}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "showscale": heat.bar,
    }
    if heat.texts is not None:
        trace |= {"text": [[_text(t) for t in row] for row in heat.texts]}
        trace |= {"texttemplate": "%{text}"}
    if heat.bar:
        x, y = (layout[f"{axis}axis{end}"]["domain"] for axis in "xy")
        trace["colorbar"] = {
            "x": x[1], "xanchor": "left", "xpad": 6, "y": (y[0] + y[1]) / 2,
            "len": y[1] - y[0], "thickness": 12, "outlinewidth": 0,
        }  # fmt: skip
    return trace


def _rules_and_bands(layout: dict[str, Any], cell: Cell) -> None:
    pane, end = cell.pane, _end(cell)
    for band in pane.bands:
        layout["shapes"].append(
            _across(pane, "x", *cell.band(band.start, band.end), end)
            | {"type": "rect", "fillcolor": band.colour, "opacity": 0.11, "line": {"width": 0}}
            | {"layer": "below"}
        )
    for rule in pane.rules:
        line = {"color": rule.colour, "width": 1.4 if rule.dash == "dash" else 1, "dash": rule.dash}
        # Bars would cover it.
        layer = "above" if any(marks.kind == "bars" for marks in pane.marks) else "below"
        shape = {"type": "line", "layer": layer, "line": line}
        layout["shapes"].append(_rule(pane, rule, end) | shape)
        if rule.name:
            layout["annotations"].append(_rule_name(pane, rule, end))


def _rule(pane: Pane, rule: Rule, end: str) -> dict[str, Any]:
    if rule.axis != "diagonal":
        return _across(pane, rule.axis, rule.at, rule.at, end)
    # Plotly has no endless lines: from corner to corner of what is shown.
    low = max(extent(pane, "x")[0], extent(pane, "y")[0] - rule.at)
    high = min(extent(pane, "x")[1], extent(pane, "y")[1] - rule.at)
    ends = {"x0": low, "x1": high, "y0": low + rule.at, "y1": high + rule.at}
    return {"xref": f"x{end}", "yref": f"y{end}"} | ends


def _across(pane: Pane, axis: str, low: float, high: float, end: str) -> dict[str, Any]:
    """References of a shape between two values of an axis, along the whole of the other one."""
    own, other = ("x", "y") if (axis == "x") != pane.horizontal else ("y", "x")
    whole = {f"{other}ref": f"{other}{end} domain", f"{other}0": 0, f"{other}1": 1}
    return whole | {f"{own}ref": f"{own}{end}", f"{own}0": low, f"{own}1": high}


def _rule_name(pane: Pane, rule: Rule, end: str) -> dict[str, Any]:
    name = {
        "text": _text(rule.name),
        "showarrow": False,
        "font": {"color": rule.colour, "size": 11},
    }
    if rule.axis == "diagonal":
        x = min(extent(pane, "x")[1], extent(pane, "y")[1] - rule.at)
        at = {"xref": f"x{end}", "yref": f"y{end}", "x": x, "y": x + rule.at}
        return name | at | {"xanchor": "right", "yanchor": "top"}
    if (rule.axis == "y") != pane.horizontal:
        at = {"xref": f"x{end} domain", "x": 1, "xanchor": "right", "yref": f"y{end}", "y": rule.at}
        return name | at | {"yanchor": "bottom"}
    at = {"yref": f"y{end} domain", "y": 1, "yanchor": "top", "xref": f"x{end}", "x": rule.at}
    return name | at | {"xanchor": "left"}


# ---- where it is drawn ---------------------------------------------------------------------------


def _place(layout: dict[str, Any], chart: Chart, placed: list[Cell], alone: bool) -> None:
    """Axes of every pane, titles, and the height of the whole."""
    columns = max(cell.column for cell in placed) + 1
    by_row = [[cell for cell in placed if cell.row == row] for row in range(placed[-1].row + 1)]
    tall = [max(_height(cell, len(by_row)) for cell in row) for row in by_row]
    if chart.heights is not None:
        tall = [sum(tall) * share / sum(chart.heights) for share in chart.heights]
    titles = [max(_rows_of(_title(cell.pane)) for cell in row) * 19 for row in by_row]
    below = [
        max(_below(cell.pane, cell, chart.share_x and not cell.lowest) for cell in row)
        for row in by_row
    ]
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
            left = sum(widths[: cell.column]) * room + gap * cell.column
            x, y = _axes(cell, chart, placed, tall[row])
            if across and cell.column != columns // 2:
                x.pop("title", None)
            right, end = left + widths[cell.column] * room, _end(cell)
            layout[f"xaxis{end}"] = x | {"domain": [left, right], "anchor": f"y{end}"}
            layout[f"yaxis{end}"] = y | {"domain": [bottom, top], "anchor": f"x{end}"}
            _write(layout, _title(cell.pane), left, top, "paper", "bottom", 12)
            _write(layout, _text(cell.pane.note), 0.01, 0.99, f"{end} domain", "top", 11)
        following = titles[row + 1] if row + 1 < len(by_row) else 0
        top = bottom - (below[row] + following) / inner


def _rows_of(text: str) -> int:
    return text.count("<br>") + 1 if text else 0


def _write(
    layout: dict[str, Any], text: str, x: float, y: float, where: str, anchor: str, size: int
) -> None:
    """Text at the left, of the page or of a pane's axes."""
    if not text:
        return
    references = ("paper", "paper") if where == "paper" else (f"x{where}", f"y{where}")
    layout["annotations"].append({
        "text": text, "showarrow": False, "align": "left", "x": x, "xref": references[0],
        "xanchor": "left", "y": y, "yref": references[1], "yanchor": anchor, "font": {"size": size},
    })  # fmt: skip


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
    if cell.places:
        chosen = cell.labelled()
        x |= {"tickvals": chosen, "ticktext": [_text(cell.places[index]) for index in chosen]}
        x |= {"range": [-0.6, len(cell.places) - 0.4], "zeroline": False}
        if pane.horizontal:
            x |= {"range": x["range"][::-1], "showgrid": False}
        elif cell.slanted():
            x["tickangle"] = -45
    if pane.heat is not None:
        for axis in (x, y):
            axis |= {"type": "category", "showgrid": False, "zeroline": False}
        y["autorange"] = "reversed"
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
        lines = max(place.count("\n") + 1 for place in cell.places)
        beside = any(shift for shift, _ in cell.bars().values())
        groups = sum(marks.kind == "bars" for marks in pane.marks)
        return 30 + len(cell.places) * max(14.0 + 15 * lines, 26.0 * groups * beside)
    if pane.square and rows == 1:
        return 420.0
    return {1: 310.0, 2: 235.0}.get(rows, 165.0)


def _below(pane: Pane, cell: Cell, hidden: bool) -> float:
    """Pixels below a pane for labels and the title of its axis."""
    title = pane.y_title if pane.horizontal else pane.x_title
    slanted = bool(cell.places) and not pane.horizontal and cell.slanted()
    return 18.0 if hidden else 26.0 + 26.0 * bool(title) + 34.0 * slanted


def _end(cell: Cell) -> str:
    """What plotly puts behind the x and y of a pane's axes."""
    return "" if cell.number == 0 else str(cell.number + 1)


# ---- words and colours ---------------------------------------------------------------------------


def _text(text: str) -> str:
    """Plain text as plotly reads it, which knows some tags and decodes no named quotes."""
    marked = escape(text, quote=False).replace("\n", "<br>")
    return re.sub("\x02(.*?)\x03", r"<b>\1</b>", marked)


def _faint(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


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
