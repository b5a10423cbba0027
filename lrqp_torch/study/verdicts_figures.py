"""The verdicts as heat maps: sites by rules, one for each model, with the truth on top."""

from pathlib import Path
from typing import TYPE_CHECKING

from lrqp_torch.study.drawing import COUNTERFACTUAL, INK, NOTE, RISING, write_figures
from lrqp_torch.study.verdicts_counting import PROBE, UNCLEAR, USED, SiteScores, VerdictsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK = 0.6
"""From this share on, cells are so dark that their numbers are written in white."""


def draw(result: VerdictsResult, folder: Path) -> list[Path]:
    """Write ``verdicts`` as PNG and SVG."""
    return write_figures({"verdicts": lambda: _draw(result)}, folder)


def _draw(result: VerdictsResult) -> "Figure":
    from matplotlib.figure import Figure

    models = list(result.models)
    rules = list(dict.fromkeys(count.rule for count in result.counts))
    sites = {m: list(dict.fromkeys(s.site for s in result.scores if s.model == m)) for m in models}
    widths = [max(len(sites[model]), 3) for model in models]
    figure = Figure(
        figsize=(3.2 + 0.45 * sum(widths), 2.0 + 0.34 * (len(rules) + 1)), layout="constrained"
    )
    panes = figure.subplots(1, len(models), width_ratios=widths, squeeze=False)[0]
    for index, (model, axes) in enumerate(zip(models, panes, strict=True)):
        own = [score for score in result.scores if score.model == model]
        _pane(axes, own, sites[model], rules)
        kind = result.models[model]
        axes.set_title(f"{model}\norder {kind}" if kind else model, fontsize=10)
        names = ["truth", *(result.titles[rule] for rule in rules)]
        axes.set_yticks(range(len(names)), names if index == 0 else [""] * len(names), fontsize=9)
    figure.suptitle("Where is the order used?", x=0.01, ha="left", fontsize=12, fontweight="bold")
    seeds = int(result.settings["seeds"])
    figure.supxlabel(
        "Answers flipped beyond the control edit, or probe accuracy (%)"
        + (f", mean of {seeds} seeds. " if seeds > 1 else ". ")
        + "Framed: says “used”. Orange cross: wrong in most seeds.",
        fontsize=9,
        color=NOTE,
        x=0.01,
        ha="left",
    )
    return figure


def _pane(axes: "Axes", scores: list[SiteScores], sites: list[str], rules: list[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("rising", RISING)
    shades: list[list[float]] = []
    for row, rule in enumerate([None, *rules]):
        shades.append([])
        for column, site in enumerate(sites):
            here = [score for score in scores if score.site == site]
            if rule is None:
                truth = here[0].truth
                value, text = float(truth == USED), {USED: "used", UNCLEAR: "?"}.get(truth, "–")
                framed = wrong = False
            else:
                mean = sum(score.score(rule) for score in here) / len(here)
                value, text = max(mean, 0.0), f"{100 * mean:z.0f}".replace("-", "−")
                framed = _most([score.says_used(rule) for score in here])
                wrong = _most([score.right(rule) is False for score in here])
            shades[-1].append(value)
            colour = "white" if value >= DARK else INK
            bold = "bold" if rule is None else "normal"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color=colour, weight=bold
            )
            if framed:
                frame = Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, ec=INK, lw=1)
                axes.add_patch(frame)
            if wrong:
                corner = (column + 0.33, row - 0.27)
                axes.plot(*corner, "x", color=COUNTERFACTUAL, ms=5, mew=2, clip_on=False)
    axes.imshow(shades, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.axhline(0.5, color="white", lw=4)
    if PROBE in rules:
        axes.axhline(rules.index(PROBE) + 1.5, color="white", lw=2)
    axes.set_xticks(range(len(sites)), sites, rotation=60, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _most(flags: list[bool]) -> bool:
    return 2 * sum(flags) > len(flags)
