"""The figure of a study of your own: what can be read, and what is used, by site."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrqp_torch.study.by_site import label_sites
from lrqp_torch.study.drawing import (
    CLEAN,
    CONTROL,
    COUNTERFACTUAL,
    NOTE,
    PROBE,
    name_ends,
    write_figures,
)
from lrqp_torch.study.flipping import CONDITIONS, USED_THRESHOLD
from lrqp_torch.tasks.results import Condition, Mean, Share, TaskResults
from lrqp_torch.tasks.words import effect_title, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE = "sites"
COLOURS = {"control": CONTROL, "counterfactual": COUNTERFACTUAL}
MARKERS = {"control": "^", "counterfactual": "s"}


def draw(results: TaskResults, folder: Path) -> list[Path]:
    """Write the figure as ``sites.png`` and ``sites.svg``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    return write_figures({FIGURE: lambda: draw_sites(results)}, folder)


def draw_sites(results: TaskResults) -> "Figure":
    """Probe accuracy and share of answers flipped above, the size of the effect below, by site.

    Bars are 95 % intervals.
    """
    from matplotlib.figure import Figure

    names, sites = list(results.sites), list(results.sites.values())
    width = min(12.5, max(7.5, 3.5 + 0.38 * len(names)))
    figure = Figure(figsize=(width, 7.2), layout="constrained")
    shares, effects = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for site in results.used_sites:
        for axes in (shares, effects):
            column = names.index(site)
            axes.axvspan(column - 0.5, column + 0.5, color=COUNTERFACTUAL, alpha=0.10, lw=0)

    shares.set_ylim(-4, 104)
    shares.axhline(100 * results.majority, color=NOTE, lw=0.8, ls=":")
    ends = {"majority class": (100 * results.majority, NOTE)}
    shuffled = _curve(shares, [site.shuffled for site in sites], NOTE, "x", bars=False)
    ends["probe fitted to\nshuffled labels"] = (shuffled, NOTE)
    ends["probe accuracy,\nheld-out prompts"] = (
        _curve(shares, [site.probe for site in sites], PROBE, "o"),
        PROBE,
    )
    for condition in CONDITIONS if results.answered is not None else ():
        flips = [_flips(getattr(site, condition)) for site in sites]
        last = _curve(shares, flips, COLOURS[condition], MARKERS[condition])
        ends[f"answers flipped by the\n{condition} edit"] = (last, COLOURS[condition])
    name_ends(shares, ends, gap=12.0)
    shares.set_ylabel("Held-out prompts (%)")
    shares.set_title(_title(results), pad=26)
    shares.text(0, 1.03, _subtitle(results), transform=shares.transAxes, color=NOTE, fontsize=9)

    ends = {}
    if results.preference is not None:
        effects.axhline(results.preference.value, color=CLEAN, lw=1.4, ls="--")
        ends["no edit"] = (results.preference.value, CLEAN)
    effects.axhline(0, color=NOTE, lw=0.8)
    for condition in CONDITIONS:
        means = [measured(getattr(site, condition)) for site in sites]
        last = _curve(effects, means, COLOURS[condition], MARKERS[condition])
        ends[f"{condition} edit"] = (last, COLOURS[condition])
    low, high = effects.get_ylim()
    name_ends(effects, ends, gap=0.14 * (high - low))
    effects.set_ylabel(effect_title(results).replace(", ", ",\n", 1))
    effects.set_xlabel("Site edited, in order of computation")
    label_sites(effects, names)
    return figure


def _curve(
    axes: "Axes", points: Sequence[Share | Mean], colour: str, marker: str, *, bars: bool = True
) -> float:
    """Draw points with their intervals, shares in per cent; returns the height of the last."""
    scale = 100.0 if isinstance(points[0], Share) else 1.0
    heights = [float("nan") if p.value is None else scale * p.value for p in points]
    spans = [
        [
            max(height - scale * p.interval[0], 0.0)
            for height, p in zip(heights, points, strict=True)
        ],
        [
            max(scale * p.interval[1] - height, 0.0)
            for height, p in zip(heights, points, strict=True)
        ],
    ]
    axes.errorbar(
        range(len(points)),
        heights,
        yerr=spans if bars else None,
        color=colour,
        marker=marker,
        ms=5 if bars else 4,
        lw=1.8 if bars else 0.8,
        elinewidth=1,
        capsize=2,
    )
    return heights[-1]


def _flips(condition: Condition) -> Share:
    assert condition.flipped is not None
    return condition.flipped


def _title(results: TaskResults) -> str:
    if results.answered is None:
        return "Where the class is knowable, and how much an edit changes"
    return "Where the class is knowable, and where it is used"


def _subtitle(results: TaskResults) -> str:
    classes = ", ".join(results.classes)
    shaded = (
        f" Shaded: {100 * USED_THRESHOLD:.0f} % flip beyond the control."
        if results.answered is not None
        else " No answers, so no flips to count."
    )
    return f"Model: {results.model['name']}. Classes: {classes}. One site edited at a time.{shaded}"
