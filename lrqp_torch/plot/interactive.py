"""Charts for the screen: described to plotly, as the JSON that plotly.js draws.

Nothing of plotly is needed to describe them. Every text is escaped, for plotly reads some tags of
HTML; backgrounds are transparent, and a page gives the text its colour.
"""

import math
import re
from html import escape
from typing import Any

from lrqp_torch.plot.chart import BLACK, COUNTERFACTUAL, INK, NOTE, Chart, Heat, Marks, Pane, Rule
from lrqp_torch.plot.layout import DIVERGING, RISING, Cell, cells, common_title, extent, written

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
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "template": "none",
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "hovermode": "closest",
        "barmode": "overlay",
        "shapes": [],
        "annotations": [],
    }
    _place(layout, chart, placed, alone)
    named: set[str] = set()
    for number, cell in enumerate(placed, start=1):
        end = "" if number == 1 else str(number)
        axes = {"xaxis": f"x{end}", "yaxis": f"y{end}"}
        pane = cell.pane
        if pane.heat is not None:
            traces = [_map(pane.heat, layout, end)]
        else:
            bars = cell.bars()
            traces = []
            for index, marks in enumerate(pane.marks):
                trace = _trace(cell, marks, bars.get(index))
                trace["showlegend"] = (
                    bool(marks.legend and marks.name) and trace["name"] not in named
                )
                named |= {trace["name"]} if trace["showlegend"] else set()
                traces.append(trace)
        data += [trace | axes for trace in traces]
        _rules_and_bands(layout, cell, end)
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
        per_cent = {axis: " %" if "(%" in title else "" for axis, title in _axis_titles(pane)}
        across, up = (f"%{{{axis}:.4~g}}{per_cent[axis]}" for axis in "xy")
        lines.append(f"{across} {'→' if pane.square else ': '} {up}".replace(" :  ", ": "))
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
    if lower is None or upper is None:
        return None

    def away(end: float | None, value: float | None, sign: int) -> float | None:
        return None if end is None or value is None else max(sign * (end - value), 0.0)

    bars = {
        "type": "data",
        "symmetric": False,
        "array": [away(end, value, 1) for end, value in zip(upper, values, strict=True)],
        "arrayminus": [away(end, value, -1) for end, value in zip(lower, values, strict=True)],
        "thickness": 1,
        "width": 3,
    }
    return bars | ({"color": NOTE} if on_bars else {})


def _map(heat: Heat, layout: dict[str, Any], end: str) -> dict[str, Any]:
    low, high = heat.limits
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


def _rules_and_bands(layout: dict[str, Any], cell: Cell, end: str) -> None:
    pane = cell.pane
    for band in pane.bands:
        places = [str(band.start), str(band.end)]
        ends = [cell.places.index(p) for p in places] if pane.named else [band.start, band.end]
        half = 0.5 if pane.named else 0.0
        layout["shapes"].append(
            _across(pane, "x", float(ends[0]) - half, float(ends[1]) + half, end)
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
    rows, columns = placed[-1].row + 1, max(cell.column for cell in placed) + 1
    by_row = [[cell for cell in placed if cell.row == row] for row in range(rows)]
    tall = [max(_height(cell, rows) for cell in row) for row in by_row]
    if chart.heights is not None:
        tall = [sum(tall) * share / sum(chart.heights) for share in chart.heights]
    titles = [max(_lines(cell.pane.title) for cell in row) * 19 for row in by_row]
    below = [
        max(_below(cell, hidden=chart.share_x and not cell.lowest) for cell in row)
        for row in by_row
    ]
    names = {m.name: None for c in placed for m in c.pane.marks if m.name and m.legend}
    legend = 26 * -(-sum(7 * len(name) + 58 for name in names) // _WIDTH) if names else 0
    head = 16 + titles[0]
    if alone and chart.title:
        head += 30 + 17 * _lines(chart.subtitle)
        subtitle = {"text": _text(chart.subtitle), "font": {"size": 12}}
        layout["title"] = {
            "text": _text(chart.title), "x": 0.01, "xanchor": "left", "subtitle": subtitle,
        }  # fmt: skip
    inner = sum(tall) + sum(below[:-1]) + sum(titles[1:])
    layout["height"] = round(head + inner + below[-1] + legend + 8)
    layout["margin"] = {"l": 64, "r": 20, "t": head, "b": round(below[-1] + legend + 8)}
    # Below, where a legend of several lines covers neither titles nor the tool bar.
    at_foot = {"orientation": "h", "yref": "container", "y": 0.005, "yanchor": "bottom", "x": 0}
    layout["legend"] = at_foot
    widths = chart.widths or [1.0] * columns
    gap = 0.03 if chart.share_y else 0.09 if columns < 4 else 0.06
    gap = gap + 0.05 if any(cell.pane.heat and cell.pane.heat.bar for cell in placed) else gap
    room = (1 - gap * (columns - 1)) / sum(widths)
    across = common_title([cell.pane.x_title for cell in placed], columns) if columns > 2 else ""
    top = 1.0
    for row, row_cells in enumerate(by_row):
        bottom = top - tall[row] / inner
        for cell in row_cells:
            number = placed.index(cell) + 1
            end = "" if number == 1 else str(number)
            left = (sum(widths[: cell.column]) * room) + gap * cell.column
            right = left + widths[cell.column] * room
            x, y = _axes(cell, chart, placed, end)
            layout[f"xaxis{end}"] = x | {"domain": [left, right], "anchor": f"y{end}"}
            layout[f"yaxis{end}"] = y | {
                "domain": [max(bottom, 0.0), top],
                "anchor": f"x{end}",
            }
            if across and cell.column != columns // 2:
                x.pop("title", None)
                layout[f"xaxis{end}"].pop("title", None)
            if cell.pane.title:
                layout["annotations"].append({
                    "text": f"<b>{_text(cell.pane.title)}</b>", "showarrow": False, "x": left,
                    "xref": "paper", "xanchor": "left", "y": top, "yref": "paper",
                    "yanchor": "bottom", "align": "left", "font": {"size": 13},
                })  # fmt: skip
            if cell.pane.note:
                layout["annotations"].append({
                    "text": _text(cell.pane.note), "showarrow": False, "align": "left",
                    "xref": f"x{end} domain", "x": 0.01, "xanchor": "left",
                    "yref": f"y{end} domain", "y": 0.99, "yanchor": "top",
                    "font": {"color": NOTE, "size": 11},
                })  # fmt: skip
        following = titles[row + 1] if row + 1 < rows else 0
        top = bottom - (below[row] + following) / inner


def _axes(
    cell: Cell, chart: Chart, placed: list[Cell], end: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Axes across and up the page."""
    pane, heat = cell.pane, cell.pane.heat
    x: dict[str, Any] = {"gridcolor": GRID, "zerolinecolor": ZERO, "automargin": True}
    y: dict[str, Any] = dict(x)
    for axis, name in ((x, "x"), (y, "y")):
        log = pane.x_log if name == "x" else pane.y_log
        asked = pane.x_range if name == "x" else pane.y_range
        if log:
            axis["type"] = "log"
        if asked is not None:
            axis["range"] = [math.log10(value) for value in asked] if log else list(asked)
        if not pane.ticks:
            axis["showticklabels"] = False
    if cell.places:
        chosen = cell.labelled()
        x |= {
            "tickvals": chosen,
            "ticktext": [_text(cell.places[index]) for index in chosen],
            "range": [-0.6, len(cell.places) - 0.4],
            "zeroline": False,
        }
        if pane.horizontal:
            x |= {"range": x["range"][::-1], "showgrid": False}
        elif cell.slanted():
            x["tickangle"] = -45
    if heat is not None:
        x |= {"type": "category", "showgrid": False, "zeroline": False}
        y |= {"type": "category", "showgrid": False, "zeroline": False, "autorange": "reversed"}
    x["title"], y["title"] = ({"text": _text(title)} for _, title in _axis_titles(pane))
    if pane.horizontal:
        x, y = y, x
    first = placed[cell.column] if chart.share_x else placed[cell.row * chart.columns]
    start = placed.index(first) + 1
    if chart.share_x and first is not cell:
        x["matches"] = f"x{'' if start == 1 else start}"
    if chart.share_x and not cell.lowest:
        x["showticklabels"] = False
        x.pop("title")
    if chart.share_y:
        left = placed.index(placed[cell.row * chart.columns]) + 1
        if cell.column:
            y |= {"matches": f"y{'' if left == 1 else left}", "showticklabels": False}
            y.pop("title")
    if pane.square:
        y |= {"scaleanchor": f"x{end}", "constrain": "domain"}
        x["constrain"] = "domain"
    return x, y


def _height(cell: Cell, rows: int) -> float:
    """Pixels of a pane, without its titles."""
    pane = cell.pane
    if pane.heat is not None:
        return min(560.0, max(120.0, 26.0 * len(pane.heat.rows)))
    if pane.horizontal and cell.places:
        lines = max(_lines(place) for place in cell.places)
        beside = any(shift for shift, _ in cell.bars().values())
        groups = sum(marks.kind == "bars" for marks in pane.marks)
        return 30 + len(cell.places) * max(14.0 + 15 * lines, 26.0 * groups * beside)
    if pane.square and rows == 1:
        return 470.0
    return {1: 360.0, 2: 250.0}.get(rows, 170.0)


def _below(cell: Cell, *, hidden: bool) -> float:
    """Pixels below a pane for labels and the title of its axis."""
    if hidden:
        return 18.0
    title = cell.pane.y_title if cell.pane.horizontal else cell.pane.x_title
    slanted = bool(cell.places) and not cell.pane.horizontal and cell.slanted()
    return 26.0 + (26.0 if title else 0.0) + (34.0 if slanted else 0.0)


def _axis_titles(pane: Pane) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("x", pane.x_title), ("y", pane.y_title)


def _lines(text: str) -> int:
    return len(text.splitlines())


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
