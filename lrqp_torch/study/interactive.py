"""Plotly figures of one style: transparent, without a template, in colour-blind-safe colours.

The report sets text and background for light and dark; nothing here does.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lrqp_torch.errors import MissingExtraError

CLEAR = "rgba(0,0,0,0)"
GRID = "rgba(128,128,128,0.25)"
ZERO = "rgba(128,128,128,0.6)"


def new_figure(
    *,
    x_title: str,
    y_title: str,
    panes: Sequence[str] = ("",),
    down: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Any:
    """An empty figure with one pane a title, side by side or one above the other.

    Args:
        x_title: of each pane, with units; only of the lowest when one is above the other.
        y_title: of the first pane, with units.
        panes: titles.
        down: one above the other, on a common x axis.
        y_range: limits of every y axis; default from the data.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingExtraError(
            "the interactive report needs plotly: install it with `pip install plotly`"
        )
    subplots: Any = import_module("plotly.subplots")
    rows, columns = (len(panes), 1) if down else (1, len(panes))
    figure = subplots.make_subplots(
        rows=rows, cols=columns, subplot_titles=list(panes), shared_xaxes=down
    )
    figure.update_layout(
        template="none",
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        margin={"l": 70, "r": 20, "t": 50, "b": 120},
        height=300 * rows + 160,
        hovermode="closest",
        # Below, where a legend of several lines covers neither titles nor the tool bar.
        legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=ZERO, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=ZERO, automargin=True)
    if y_range is not None:
        figure.update_yaxes(range=list(y_range))
    for column in range(1, columns + 1):
        figure.update_xaxes(title_text=x_title, row=rows, col=column)
    figure.update_yaxes(title_text=y_title, row=1, col=1)
    return figure


def add_line(
    figure: Any,
    name: str,
    x: Sequence[Any],
    y: Sequence[float | None],
    *,
    colour: str,
    symbol: str = "circle",
    dash: str = "solid",
    interval: tuple[Sequence[float | None], Sequence[float | None]] | None = None,
    pane: tuple[int, int] = (1, 1),
    legend: bool = True,
    hover: str = "%{x}: %{y:.3g}",
) -> None:
    """A line with markers, or one larger marker, with bars for the intervals where given.

    Args:
        figure: from :func:`new_figure`.
        name: in the legend and the hover text.
        x: site names or numbers.
        y: values; None leaves a gap.
        colour: of line and markers.
        symbol: of the markers, so that curves differ by more than colour.
        dash: of the line.
        interval: lower and upper ends, in the units of y.
        pane: row and column, from 1.
        legend: whether to name it in the legend.
        hover: plotly template of the hover text.
    """
    bars = None
    if interval is not None:
        ends = list(zip(y, *interval, strict=True))
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [None if v is None or u is None else max(u - v, 0.0) for v, _, u in ends],
            "arrayminus": [None if v is None or w is None else max(v - w, 0.0) for v, w, _ in ends],
            "thickness": 1,
            "width": 3,
        }
    figure.add_scatter(
        x=list(x),
        y=list(y),
        mode="lines+markers" if len(x) > 1 else "markers",
        name=name,
        legendgroup=name,
        showlegend=legend,
        line={"color": colour, "dash": dash},
        marker={"color": colour, "symbol": symbol, "size": 7 if len(x) > 1 else 12},
        error_y=bars,
        hovertemplate=f"{hover}<extra>{name}</extra>",
        row=pane[0],
        col=pane[1],
    )


def add_points(
    figure: Any,
    name: str,
    points: Sequence[Sequence[float]],
    texts: Sequence[str],
    *,
    colour: str,
    symbol: str,
    pane: tuple[int, int] = (1, 1),
    legend: bool = True,
) -> None:
    """Points of the plane, each with a text that is shown when the reader points at it."""
    figure.add_scatter(
        x=[point[0] for point in points],
        y=[point[1] for point in points],
        text=list(texts),
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=legend,
        marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.7},
        hovertemplate="%{text}<extra>" + name + "</extra>",
        row=pane[0],
        col=pane[1],
    )
