"""The study's figures: the sweep over sites, and the answers at the best site.

Drawn with matplotlib's object interface, without pyplot, so that no display and no global state is
touched. Colours are from Okabe and Ito's palette, which colour-blind readers can tell apart, and
curves carry their names beside them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lrqp_torch.study.drawing import (
    CLEAN,
    CONTROL,
    COUNTERFACTUAL,
    INK,
    NOTE,
    PROBE,
    name_ends,
    write_figures,
)
from lrqp_torch.study.results import StudyResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELLED_SITES = 26

_BACKGROUND = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}


def draw(results: StudyResults, prompts: Mapping[str, torch.Tensor], folder: Path) -> list[Path]:
    """Write every figure of a study as PNG and SVG.

    Args:
        results: the study's figures.
        prompts: its per-prompt tensors, as in ``prompts.safetensors``.
        folder: an existing folder.

    Returns:
        The files written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    makers = {
        "sweep": lambda: draw_sweep(results),
        "histogram": lambda: draw_histogram(results, prompts),
        "scatter": lambda: draw_scatter(results, prompts),
    }
    return write_figures(makers, folder)


def draw_sweep(results: StudyResults) -> "Figure":
    """Probe accuracy, share of answers flipped and mean logit difference, by site."""
    from matplotlib.figure import Figure

    names = list(results.sites)
    sites = list(results.sites.values())
    x = range(len(names))
    width = min(12.5, max(7.5, 3.5 + 0.38 * len(names)))
    figure = Figure(figsize=(width, 7.2), layout="constrained")
    shares, logits = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    for name in results.used_sites:
        column = names.index(name)
        for axes in (shares, logits):
            axes.axvspan(column - 0.5, column + 0.5, color=COUNTERFACTUAL, alpha=0.10, lw=0)

    def percent(values: list[float | None]) -> list[float]:
        return [float("nan") if value is None else 100 * value for value in values]

    probe = percent([site.probe_accuracy for site in sites])
    flips = percent([site.counterfactual.flipped for site in sites])
    accidents = percent([site.control.flipped for site in sites])
    shares.axhline(50, color=NOTE, lw=0.8, ls=":")
    shares.set_ylim(-4, 104)
    shares.plot(x, probe, color=PROBE, marker="o", ms=5, lw=1.8)
    shares.plot(x, flips, color=COUNTERFACTUAL, marker="s", ms=5, lw=1.8)
    shares.plot(x, accidents, color=CONTROL, marker="^", ms=4, lw=1.2)
    name_ends(
        shares,
        {
            "probe accuracy,\nheld-out prompts": (probe[-1], PROBE),
            "answers flipped by the\ncounterfactual edit": (flips[-1], COUNTERFACTUAL),
            "flipped by the\ncontrol edit": (accidents[-1], CONTROL),
            "chance": (50.0, NOTE),
        },
        gap=12.0,
    )
    shares.set_ylabel("Held-out prompts (%)")
    shares.set_title("Where the order is knowable, and where it is used", pad=26)
    shares.text(
        0,
        1.03,
        f"Model: {_model_name(results)}. One site edited at a time, at S2. "
        "Shaded: half of the answers flip, beyond the control.",
        transform=shares.transAxes,
        color=NOTE,
        fontsize=9,
    )

    control = [site.control.logit_difference for site in sites]
    counterfactual = [site.counterfactual.logit_difference for site in sites]
    clean = results.clean.logit_difference
    logits.axhline(0, color=NOTE, lw=0.8)
    logits.axhline(clean, color=CLEAN, lw=1.4, ls="--")
    logits.plot(x, control, color=CONTROL, marker="^", ms=4, lw=1.2)
    logits.plot(x, counterfactual, color=COUNTERFACTUAL, marker="s", ms=5, lw=1.8)
    heights = (0.0, clean, *control, *counterfactual)
    span = max(heights) - min(heights) or 1.0
    logits.set_ylim(min(heights) - 0.08 * span, max(heights) + 0.08 * span)
    name_ends(
        logits,
        {
            "no edit": (clean, CLEAN),
            "control edit": (control[-1], CONTROL),
            "counterfactual edit": (counterfactual[-1], COUNTERFACTUAL),
        },
        gap=0.14 * span,
    )
    logits.set_ylabel("Mean logit difference\nIO − S (logits)")
    logits.set_xlabel("Site edited, in order of computation")
    logits.set_xlim(-0.6, len(names) - 0.4)
    _label_sites(logits, names)
    return figure


def draw_histogram(results: StudyResults, prompts: Mapping[str, torch.Tensor]) -> "Figure":
    """Logit differences of the held-out prompts: clean, control and counterfactual, a row each."""
    from matplotlib.figure import Figure

    site = str(results.best_site)
    rows = (
        ("no edit", CLEAN, "clean"),
        ("control edit", CONTROL, f"{site}.control"),
        ("counterfactual\nedit", COUNTERFACTUAL, f"{site}.counterfactual"),
    )
    every = torch.cat([prompts[f"{key}.logit_difference"] for _, _, key in rows])
    low, high = min(every.min().item(), 0.0), max(every.max().item(), 0.0)
    edges = torch.linspace(low, high if high > low else low + 1.0, 49).tolist()
    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True)
    for axes, (name, colour, key) in zip(panels, rows, strict=True):
        values = prompts[f"{key}.logit_difference"]
        axes.hist(values.tolist(), bins=edges, color=colour, alpha=0.85)
        axes.axvline(0, color=INK, lw=0.9)
        mean = values.mean().item()
        axes.axvline(mean, color=INK, lw=1.2, ls="--")
        share = (values > 0).double().mean().item()
        axes.text(
            1.01,
            0.92,
            f"{name}\nmean {_signed(mean)}\n{100 * share:.1f} % answer IO",
            transform=axes.transAxes,
            color=colour,
            va="top",
            fontweight="bold",
            fontsize=9,
        )
        axes.margins(y=0.08)
    panels[1].set_ylabel("Held-out prompts")
    panels[-1].set_xlabel("Logit difference IO − S at END (logits); dashed: mean")
    panels[0].set_title(f"Answers under edits of the belief at {site}", pad=24)
    panels[0].text(
        0,
        1.06,
        f"Model: {_model_name(results)}, {results.clean.prompts} held-out prompts. "
        "Left of 0 it answers S.",
        transform=panels[0].transAxes,
        color=NOTE,
        fontsize=9,
    )
    return figure


def draw_scatter(results: StudyResults, prompts: Mapping[str, torch.Tensor]) -> "Figure":
    """Logit difference of every held-out prompt under each edit against its clean one."""
    from matplotlib.figure import Figure

    site = str(results.best_site)
    clean = prompts["clean.logit_difference"]
    figure = Figure(figsize=(6.8, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=NOTE, lw=0.8)
    axes.axvline(0, color=NOTE, lw=0.8)
    axes.axline((0, 0), slope=1, color=NOTE, lw=1, ls="--", zorder=1)
    conditions = (("control", CONTROL, "o"), ("counterfactual", COUNTERFACTUAL, "s"))
    drawn = {}
    for condition, colour, marker in conditions:
        edited = prompts[f"{site}.{condition}.logit_difference"]
        drawn[condition] = edited
        axes.scatter(
            clean.tolist(), edited.tolist(), s=14, c=colour, marker=marker, alpha=0.55, lw=0
        )
    every = torch.cat([clean, *drawn.values()])
    low, high = min(every.min().item(), 0.0), max(every.max().item(), 0.0)
    margin = 0.06 * (high - low or 1.0)
    axes.set_xlim(min(clean.min().item(), 0.0) - margin, clean.max().item() + margin)
    axes.set_ylim(low - margin, high + margin)
    for (condition, colour, _), height in zip(conditions, (0.97, 0.91), strict=True):
        flips = getattr(results.sites[site], condition).flipped
        share = "no prompt answered IO" if flips is None else f"{100 * flips:.1f} % flipped"
        axes.text(
            0.02,
            height,
            f"{condition} edit: {share}",
            transform=axes.transAxes,
            color=colour,
            va="top",
            fontweight="bold",
            fontsize=9,
            bbox=_BACKGROUND,
        )
    end = min(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.text(
        end,
        end,
        "unchanged  ",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        ha="right",
        va="top",
        color=NOTE,
        fontsize=9,
    )
    axes.set_xlabel("Clean logit difference IO − S at END (logits)")
    axes.set_ylabel("Logit difference under the edit (logits)")
    axes.set_title(f"Every held-out prompt before and after the edit at {site}", pad=24)
    axes.text(
        0,
        1.02,
        f"Model: {_model_name(results)}. Below 0 the edited model answers S.",
        transform=axes.transAxes,
        color=NOTE,
        fontsize=9,
    )
    return figure


def _label_sites(axes: "Axes", names: list[str]) -> None:
    """Label every site while they fit, else the first of every few layers."""
    chosen = list(range(len(names)))
    if len(names) > MOST_LABELLED_SITES:
        layers: dict[str, int] = {}
        for index, name in enumerate(names):
            layers.setdefault(name.split(".")[0], index)
        chosen = list(layers.values())[:: -(-len(layers) // 16)]
    labels = [names[index] for index in chosen]
    axes.set_xticks(chosen, labels, rotation=45, ha="right", rotation_mode="anchor")


def _model_name(results: StudyResults) -> str:
    return str(results.model["name"])


def _signed(value: float) -> str:
    return f"{value:+z.2f}".replace("-", "−")
