"""The colours and style of the study's figures, and how they are written."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqp_torch.errors import MissingExtraError
from lrqp_torch.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBE, CONTROL, COUNTERFACTUAL = "#009E73", "#0072B2", "#D55E00"
CLEAN, NOTE, INK = "#555555", "#767676", "#222222"
FORMATS = ("png", "svg")
CONDITION_COLOURS = {"clean": CLEAN, "control": CONTROL, "counterfactual": COUNTERFACTUAL}

DIVERGING: list[tuple[float, str]] = [(0.0, "#0072B2"), (0.5, "#F2F2F2"), (1.0, "#D55E00")]
"""Colours from below zero to above for plotly; blue and vermilion of Okabe and Ito."""

RISING: list[tuple[float, str]] = [(0.0, "#F2F2F2"), (1.0, "#0072B2")]
"""Colours from zero up for plotly."""


STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": NOTE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    # A fixed salt makes the same results give the same file.
    "svg.hashsalt": "lrqp_torch",
}


def require_matplotlib() -> None:
    """Raise :class:`MissingExtraError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError(
            "figures need matplotlib: install it with `pip install 'lrqp_torch[plots]'`, "
            "or pass --no-figures."
        )


def write_figures(makers: Mapping[str, Callable[[], "Figure"]], folder: Path) -> list[Path]:
    """Make matplotlib figures in the study's style and write each as PNG and SVG.

    Args:
        makers: file name without ending to a function that draws the figure.
        folder: an existing folder.

    Returns:
        The files written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    require_matplotlib()
    import matplotlib

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, make in makers.items():
            figure = make()
            for suffix in FORMATS:
                path = folder / f"{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                with written_whole(path) as temporary:
                    figure.savefig(temporary, dpi=150, metadata=metadata)
                paths.append(path)
    return paths


def name_ends(axes: "Axes", curves: dict[str, tuple[float, str]], *, gap: float) -> None:
    """Write each curve's name right of the axes, level with its last point.

    Names are kept ``gap`` apart, in the units of the axes, and between its limits.
    """
    ranked = sorted(curves.items(), key=lambda item: item[1][0])
    low, high = axes.get_ylim()
    heights: list[float] = []
    for _, (value, _) in ranked:
        heights.append(max([value, *(height + gap for height in heights[-1:])]))
    ceiling = high - 0.4 * gap
    for index in reversed(range(len(heights))):
        heights[index] = max(low, min(heights[index], ceiling))
        ceiling = heights[index] - gap
    for (name, (_, colour)), height in zip(ranked, heights, strict=True):
        axes.annotate(
            name,
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            fontweight="bold",
            annotation_clip=False,
        )


def interactive(traces: list[dict[str, Any]], **layout: Any) -> Any:
    """A plotly figure without a theme of its own: the report gives it one.

    Args:
        traces: plotly traces, each with its ``type``.
        layout: plotly layout.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        go = import_module("plotly.graph_objects")
    except ImportError as error:
        raise MissingExtraError(
            "the interactive report needs plotly: install it with `pip install plotly`"
        ) from error
    clear = "rgba(0,0,0,0)"
    return go.Figure(
        data=traces,
        layout={"template": "none", "paper_bgcolor": clear, "plot_bgcolor": clear} | layout,
    )


def as_percent(share: float | None) -> str:
    """A share for readers, or a dash."""
    return "–" if share is None else f"{100 * share:z.0f} %".replace("-", "−")


def as_interval(interval: list[float] | None, digits: int = 2) -> str:
    """An interval for readers, ``"0.31 to 0.42"``, or a dash."""
    if interval is None:
        return "–"
    return f"{interval[0]:z.{digits}f} to {interval[1]:z.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """A number for readers with its sign: ``"+0.31"`` or ``"−0.20"``."""
    return f"{value:+z.{digits}f}".replace("-", "−")
