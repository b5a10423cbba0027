"""Charts on paper: drawn with matplotlib, and written as PNG and SVG.

Matplotlib's object interface is used without pyplot, so that no display and no global state is
touched. The same chart gives the same file.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.errors import MissingExtraError
from lrqp_torch.files import written_whole
from lrqp_torch.plot.chart import COUNTERFACTUAL, INK, NOTE, Chart, Heat, Marks, Pane, Rule
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
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
RESOLUTION = 150
"""Dots per inch of PNG files."""

_MANY = 300
"""From this many points on, those of one kind are an image within an SVG, which stays small."""

_DARK = 0.6
"""From this share of the colours on, what is written in a cell of a map is white."""

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": NOTE,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    # A fixed salt makes the same chart give the same file.
    "svg.hashsalt": "lrqp_torch",
}
_LAID_OUT: dict[Any, Any] = {
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "savefig.bbox": None,
}
"""Settings under which a figure without a layout engine stays as it is."""
_MARKERS = {
    "circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "x", "star": "*",
    "pentagon": "p", "down": "v", "plus": "P", "tick": "|", "none": "",
}  # fmt: skip
_SIZES = {"star": 1.7, "tick": 1.8, "plus": 1.3}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "none": "none"}
_BEHIND = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}


def require_matplotlib() -> None:
    """Raise :class:`MissingExtraError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError(
            "figures need matplotlib: install it with `pip install 'lrqp_torch[plots]'`, "
            "or pass --no-figures."
        )


def write_charts(charts: Mapping[str, Chart], folder: Path) -> list[Path]:
    """Write each chart as PNG and SVG under its name into an existing folder; returns the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    written: list[Path] = []
    for name, chart in charts.items():
        written += (own := [folder / f"{name}.{suffix}" for suffix in FORMATS])
        write_chart(chart, *own)
    return written


def write_chart(chart: Chart, *paths: Path) -> None:
    """Write one chart to files whose endings matplotlib knows, such as ``.png`` and ``.svg``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    figure = to_matplotlib(chart)
    import matplotlib

    with matplotlib.rc_context(_STYLE | _LAID_OUT):
        # Once for all formats: a figure with a layout of its own is drawn twice for each file.
        figure.set_dpi(RESOLUTION)
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine(None)
        for path in paths:
            # The date and the version of matplotlib would make equal charts differ.
            metadata = {".svg": {"Date": None}, ".png": {"Software": None}}.get(path.suffix)
            with written_whole(path) as temporary:
                figure.savefig(temporary, dpi=RESOLUTION, metadata=metadata)


def to_matplotlib(chart: Chart) -> "Figure":
    """The chart as a figure of matplotlib.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        placed = cells(chart)
        rows, columns = placed[-1].row + 1, max(cell.column for cell in placed) + 1
        width, height = chart.size or _size(chart, placed)
        heading = [(line, 12, "black") for line in textwrap.wrap(chart.title, int(width * 9.2))]
        for part in chart.subtitle.splitlines():
            heading += [(line, 9, NOTE) for line in textwrap.wrap(part, int(width * 12.5))]
        header = sum(0.02 * size + 0.01 for _, size, _ in heading) + 0.1 * bool(heading)
        keys = legend(placed, beside=True)
        per_row = _legend_columns([*keys.values()], width)
        across, up = (
            common_title([cell.titles[axis] for cell in placed], own if shared else len(placed))
            for axis, (shared, own) in enumerate(((chart.share_x, columns), (chart.share_y, rows)))
        )
        footer = 0.19 * -(-len(keys) // per_row) + 0.06 * bool(keys) + 0.22 * bool(across)
        height += 0.0 if chart.size else header + footer
        figure = Figure(figsize=(width, height))
        inside = (0, footer / height, 1, 1 - (header + footer) / height)
        figure.set_layout_engine("constrained", rect=inside)
        grid = figure.subplots(
            rows, columns, squeeze=False, width_ratios=chart.widths,
            sharex="col" if chart.share_x else False, sharey="row" if chart.share_y else False,
            height_ratios=chart.heights
            or [max(_room(cell)[1] for cell in placed if cell.row == row) for row in range(rows)],
        )  # fmt: skip
        handles: dict[tuple[int, int], Any] = {}
        for cell in placed:
            axes, room = grid[cell.row, cell.column], (height - header - footer) / rows
            handles |= _draw(axes, cell, room)
            if not across and (cell.lowest or not chart.share_x):
                axes.set_xlabel(cell.titles[0])
            if not up and (cell.column == 0 or not chart.share_y):
                lines = textwrap.wrap(cell.titles[1], max(16, int(12 * (room - 0.4))))
                axes.set_ylabel("\n".join(lines))
            if chart.share_x and cell.lowest:
                axes.tick_params(labelbottom=True)
        for spare in grid.flatten()[len(placed) :]:
            spare.set_axis_off()
        if up:
            figure.supylabel(up, fontsize=10, color=INK)
        if across:
            figure.text(
                0.5, (footer - 0.03) / height, across, ha="center", va="top", color=INK,
                in_layout=False,
            )  # fmt: skip
        if keys:
            _add_legend(figure, [handles[key] for key in keys], [*keys.values()], per_row)
        top = height - 0.07
        for text, size, colour in heading:
            figure.text(
                0.08 / width, top / height, text, fontsize=size, color=colour, va="top",
                fontweight="bold" if size > 10 else "normal", in_layout=False,
            )  # fmt: skip
            top -= 0.02 * size + 0.01
    return figure


def _add_legend(figure: "Figure", handles: list[Any], names: list[str], columns: int) -> None:
    """Below the panes, in room of its own; marks that are small or faint there are not so here."""
    from matplotlib.lines import Line2D

    legend = figure.legend(
        handles, names, loc="lower left", ncols=columns, frameon=False, fontsize=9,
        bbox_to_anchor=(0, 0), borderaxespad=0.2, columnspacing=1.6,
    )  # fmt: skip
    legend.set_in_layout(False)
    for handle in legend.legend_handles:
        if isinstance(handle, Line2D):
            handle.set(markersize=max(handle.get_markersize(), 5), alpha=1)


# ---- one pane ------------------------------------------------------------------------------------


def _draw(axes: "Axes", cell: Cell, height: float) -> dict[tuple[int, int], Any]:
    """Draw a pane into its axes; returns what a legend shows, by number of pane and marks."""
    pane = cell.pane
    if pane.heat is not None:
        _draw_map(axes, pane.heat)
    _scale(axes, cell)
    for band in pane.bands:
        shade = axes.axhspan if pane.horizontal else axes.axvspan
        shade(*cell.band(band.start, band.end), color=band.colour, alpha=0.10, lw=0, zorder=0)
    width = axes.get_window_extent().width / axes.figure.dpi  # in inches
    spots, bars = Spots(cell, width / 0.08, height / 0.16), cell.bars()
    handles = {
        (cell.number, index): _draw_marks(axes, cell, marks, bars.get(index), spots)
        for index, marks in enumerate(pane.marks)
    }
    for rule in pane.rules:
        _draw_rule(axes, rule, pane, spots)
    # Whatever was drawn, limits are those of the marks, not those of rules that cross the pane.
    _limit(axes, cell)
    if pane.title:
        axes.set_title(pane.title)
    if pane.note:
        axes.text(
            0.02, 0.98, pane.note, transform=axes.transAxes, va="top", color=NOTE, fontsize=8.5,
            bbox=_BEHIND,
        )  # fmt: skip
    colours = {marks.name: marks.colour for marks in pane.marks if marks.name and marks.legend}
    if pane.names == "ends":
        _name_ends(axes, pane, colours, height)
    elif pane.names != "legend":
        x, top = (0.02, 0.98) if pane.names == "corner" else (1.02, 0.95)
        for name, colour in colours.items():
            axes.text(
                x, top, name, transform=axes.transAxes, va="top", color=colour, fontsize=9,
                fontweight="bold", bbox=_BEHIND if pane.names == "corner" else None,
            )  # fmt: skip
            top -= 0.17 * (name.count("\n") + 1.15) / max(height - 0.8, 0.8)
    return handles


def _scale(axes: "Axes", cell: Cell) -> None:
    """Axes, grid and ticks of a pane."""
    from matplotlib.ticker import LogLocator

    pane = cell.pane
    x_axis, y_axis = (axes.yaxis, axes.xaxis) if pane.horizontal else (axes.xaxis, axes.yaxis)
    for axis, log in ((x_axis, pane.x_log), (y_axis, pane.y_log)):
        if log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            low, high = extent(pane, "x" if axis is x_axis else "y")
            ratio = high / low if low > 0 else math.inf
            if ratio < 100:
                axis.set_major_formatter("{x:g}")
            # Within few powers of ten the small ticks are needed, or nothing would be named.
            axis.set_minor_locator(LogLocator(subs="auto" if ratio < 8 else (2, 5)))
            axis.set_minor_formatter("{x:g}" if ratio < 100 else "")
    if not pane.ticks:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    if pane.heat is None:
        if not pane.named or pane.horizontal:
            axes.xaxis.grid(color=NOTE, alpha=0.2, lw=0.5)
        if not (pane.named and pane.horizontal):
            axes.yaxis.grid(color=NOTE, alpha=0.2, lw=0.5)
    if cell.places:
        chosen = cell.labelled()
        labels = [cell.places[index] for index in chosen]
        slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        turned = slant if cell.slanted() and not pane.horizontal else {}
        x_axis.set_ticks(chosen, labels, **turned)
        if pane.horizontal:
            axes.tick_params(axis="y", labelsize=9)


def _limit(axes: "Axes", cell: Cell) -> None:
    pane = cell.pane
    if pane.heat is not None:
        return
    setters: list[Callable[..., Any]] = [axes.set_xlim, axes.set_ylim]
    set_places, set_values = reversed(setters) if pane.horizontal else setters
    if cell.places:
        ends = (-0.6, len(cell.places) - 0.4)
        set_places(*(ends[::-1] if pane.horizontal else ends))
    elif pane.x_range is not None:
        set_places(*pane.x_range)
    if pane.y_range is not None:
        set_values(*pane.y_range)
    elif pane.names == "corner" and any(marks.kind == "bars" for marks in pane.marks):
        set_values(0, 1.4 * max(y for marks in pane.marks for y in marks.y if y is not None))
    if pane.square:
        axes.set_aspect("equal", adjustable="box")


def _draw_marks(
    axes: "Axes", cell: Cell, marks: Marks, bar: tuple[float, float] | None, spots: Spots
) -> Any:
    """Draw one kind of marks; returns its handle in a legend."""
    pane = cell.pane
    x = cell.at(marks)
    y = [float("nan") if value is None else value for value in marks.y]
    style: dict[str, Any] = {"color": marks.colour, "alpha": marks.opacity}
    if bar is not None:
        x = [place + bar[0] for place in x]
        handle = _draw_bars(axes, marks, x, y, bar[1], pane.horizontal)
    elif marks.kind == "steps":
        floor = min(extent(pane, "y")[0], *y)
        handle = axes.fill_between(x, y, floor, step="post", lw=0, zorder=0, **style)
    else:
        marker = _MARKERS[marks.marker]
        if marker == "|" and not pane.horizontal:
            marker = "_"
        across, up = (y, x) if pane.horizontal else (x, y)
        line = marks.kind == "line" and marks.dash != "none"
        style |= {"marker": marker, "ms": 5 * marks.size * _SIZES.get(marks.marker, 1.0)}
        style |= {"ls": _DASHES[marks.dash] if line else "none", "lw": 1.7 * marks.stroke}
        edge = None if marks.marker in ("cross", "tick") or not marks.filled else 0
        style |= {"mfc": None if marks.filled else "none", "mew": edge}
        (handle,) = axes.plot(across, up, rasterized=not line and len(x) > _MANY, **style)
        if marks.fill:
            axes.fill_between(x, y, 0, color=marks.colour, alpha=0.12 * marks.opacity, lw=0)
    _draw_intervals(axes, marks, x, y, pane.horizontal)
    for place, value, upper, label in zip(
        x, y, marks.upper or [None] * len(x), marks.labels or (), strict=False
    ):
        at, away, level, side = (place, value), (5.0, 0.0), "center", "left"
        if pane.horizontal:
            at = (value if upper is None else max(value, upper), place)
        elif label and value == value:
            corner = spots.beside(label, place, value)
            level, side = _aligned(corner)
            away = (4 if side == "left" else -4), (4 if level == "bottom" else -4)
        axes.annotate(
            label, at, xytext=away, textcoords="offset points", va=level, ha=side, color=NOTE,
            fontsize=8.5,
        )  # fmt: skip
    return handle


def _draw_bars(
    axes: "Axes", marks: Marks, x: list[float], y: list[float], width: float, horizontal: bool
) -> Any:
    if marks.named or horizontal:
        draw: Callable[..., Any] = axes.barh if horizontal else axes.bar
        size = {"height" if horizontal else "width": width}
        return draw(x, y, color=marks.colour, alpha=0.85 * marks.opacity, **size)
    # A histogram: one area, with its outline where others shine through.
    edges = [x[0] - width / 2, *(place + width / 2 for place in x)]
    if marks.opacity < 1:
        axes.stairs(y, edges, color=marks.colour, lw=1)
    return axes.stairs(y, edges, color=marks.colour, alpha=0.85 * marks.opacity, fill=True)


def _draw_intervals(
    axes: "Axes", marks: Marks, x: list[float], y: list[float], horizontal: bool
) -> None:
    up = distances(y, marks.lower, marks.upper)
    across = distances(x, marks.x_lower, marks.x_upper)
    if horizontal:
        x, y, up, across = y, x, across, up
    if up is None and across is None:
        return
    bars = marks.kind == "bars"
    axes.errorbar(
        x, y, yerr=up, xerr=across, fmt="none", ecolor="#444444" if bars else marks.colour,
        elinewidth=1 if bars else 0.9, capsize=2, zorder=3 if bars else None,
    )  # fmt: skip


def _aligned(corner: str) -> tuple[str, str]:
    """How a text is aligned, up and across, so that it stands at that corner of its point."""
    level, side = corner.split()
    return ("bottom" if level == "top" else "top"), ("left" if side == "right" else "right")


def _draw_rule(axes: "Axes", rule: Rule, pane: Pane, spots: Spots) -> None:
    style: dict[str, Any] = {"color": rule.colour, "ls": _DASHES[rule.dash], "zorder": 1}
    style["lw"] = {"dot": 0.9, "dash": 1.2}.get(rule.dash, 0.9)
    if rule.axis == "diagonal":
        axes.axline((0, rule.at), slope=1, **style)
        if rule.name:
            high = extent(pane, "x")[1]
            end = min(high, extent(pane, "y")[1] - rule.at)
            axes.text(
                end, end + rule.at, f"{rule.name}  ", rotation=45, rotation_mode="anchor",
                transform_rotates_text=True, ha="right", va="top", color=rule.colour, fontsize=9,
            )  # fmt: skip
        return
    flat = (rule.axis == "y") != pane.horizontal
    (axes.axhline if flat else axes.axvline)(rule.at, **style)
    if rule.name and pane.names != "ends":
        transform = axes.get_yaxis_transform() if flat else axes.get_xaxis_transform()
        place, level, side = (rule.at, 0.98), "top", "left"
        if flat:
            where = "top right" if pane.horizontal else spots.along(rule)
            level, side = _aligned(where)[0], where.split()[1]
            place = (0.99 if side == "right" else 0.01), rule.at
        axes.text(
            *place, rule.name, transform=transform, ha=side, va=level, color=rule.colour,
            fontsize=8.5,
        )  # fmt: skip


def _draw_map(axes: "Axes", heat: Heat) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    low, high = heat.limits
    picture = axes.imshow(
        [[float("nan") if value is None else value for value in row] for row in heat.values],
        cmap=LinearSegmentedColormap.from_list("map", DIVERGING if heat.diverging else RISING),
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    for axis, names in ((axes.xaxis, heat.columns), (axes.yaxis, heat.rows)):
        step = -(-len(names) // 24)
        axis.set_ticks(range(0, len(names), step), list(names)[::step])
    if sum(map(len, heat.columns)) > 44:
        axes.tick_params(axis="x", rotation=60)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    for row, texts in enumerate(heat.texts or ()):
        for column, text in enumerate(texts):
            value = heat.values[row][column]
            share = 0.0 if value is None else (value - low) / (high - low)
            dark = abs(2 * share - 1) >= _DARK if heat.diverging else share >= _DARK
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8,
                color="white" if dark else INK,
            )  # fmt: skip
    for row, column in heat.framed:
        axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, ec=INK, lw=1))
    for row, column in heat.crossed:
        axes.plot(column + 0.33, row - 0.27, "x", color=COUNTERFACTUAL, ms=5, mew=2, clip_on=False)
    for row in heat.gaps:
        axes.axhline(row - 0.5, color="white", lw=4)
    if heat.bar:
        bar = axes.figure.colorbar(picture, ax=axes, shrink=0.8)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)


# ---- words and room ------------------------------------------------------------------------------


def _name_ends(axes: "Axes", pane: Pane, colours: Mapping[str, str], height: float) -> None:
    """Write the names of curves and rules right of the axes, level with their ends, kept apart."""
    low, high = axes.get_ylim()
    ends: list[tuple[float, str, str]] = []
    for marks in pane.marks:
        last = next((y for y in reversed(marks.y) if y is not None), None)
        if marks.name in colours and last is not None:
            ends.append(((last - low) / (high - low), marks.name, marks.colour))
    for rule in pane.rules:
        if rule.name and rule.axis == "y":
            ends.append(((rule.at - low) / (high - low), rule.name, rule.colour))
    # Half the height of each name, as a share of the axes.
    room = max(height - 0.9, 1.0)
    ranked = sorted((at, "\n".join(textwrap.wrap(name, 24)), colour) for at, name, colour in ends)
    halves = [(0.09 * (name.count("\n") + 1) + 0.02) / room for _, name, _ in ranked]
    heights = [at for at, _, _ in ranked]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + halves[i - 1] + halves[i])
    ceiling = 1.02
    for i in reversed(range(len(heights))):
        heights[i] = max(-0.02, min(heights[i], ceiling - halves[i]))
        ceiling = heights[i] - halves[i]
    for (_, name, colour), at in zip(ranked, heights, strict=True):
        axes.annotate(
            name, (1, at), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            color=colour, va="center", fontsize=9, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _legend_columns(names: Sequence[str], width: float) -> int:
    longest = max((len(line) for name in names for line in name.split("\n")), default=1)
    return max(1, min(len(names), int(width / (0.62 + 0.075 * longest))))


def _room(cell: Cell) -> tuple[float, float]:
    """Width and height of a pane that stands alone, in inches."""
    pane = cell.pane
    if pane.heat is not None:
        titled = max((len(line) for line in pane.title.split("\n")), default=0)
        width = (1.1 if pane.heat.bar else 0.4) + 0.42 * len(pane.heat.columns)
        return max(2.6, 0.6 + 0.095 * titled, width), 0.9 + 0.34 * len(pane.heat.rows)
    if pane.horizontal and cell.places:
        return 8.6, 0.8 + len(cell.places) * cell.thickness(0.28, 0.12, 0.32)
    if cell.places:
        return min(12.5, max(7.5, 3.5 + 0.38 * len(cell.places))), 4.2
    return (6.8, 6.2) if pane.square else (7.0, 4.4)


def _size(chart: Chart, placed: Sequence[Cell]) -> tuple[float, float]:
    """Width and height of the whole without its titles, in inches."""
    rows, columns = placed[-1].row + 1, max(cell.column for cell in placed) + 1
    widths, heights = zip(*map(_room, placed), strict=True)
    if chart.widths is None and any(cell.pane.heat for cell in placed):
        width = min(columns * max(widths), 16.0)
    elif columns > 1:
        share = {2: 0.78, 3: 0.66}.get(columns, 0.52)
        room = (12.5, 16.0)[columns > 4] / columns
        width = columns * min(max(widths) * share, room)
    else:
        width = max(widths)
    high = max(heights)
    if any(cell.pane.heat or cell.pane.horizontal for cell in placed):
        height = high * rows
    else:
        square = any(cell.pane.square or not cell.pane.ticks for cell in placed)
        low = {1: high, 2: 0.8 * high}.get(rows, 2.6 if columns > 1 else 1.8)
        height = rows * (width / columns if square else low)
    return width, height
