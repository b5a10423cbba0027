"""Figures of the illusion controls as PNG and SVG."""

from pathlib import Path
from typing import TYPE_CHECKING

from lrqp_torch.study.controls.outcomes import ControlsResult, Outcome, Split
from lrqp_torch.study.drawing import (
    CLEAN,
    CONTROL,
    COUNTERFACTUAL,
    NOTE,
    PROBE,
    as_percent,
    write_figures,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACES = {"inside": ("part inside the space", COUNTERFACTUAL), "outside": ("the rest", CONTROL)}
OWN, BACK, HALF = "the study's edit", "control edit", "edit from one half of the prompts"


def draw(result: ControlsResult, folder: Path) -> list[Path]:
    """Write ``controls_splits``, ``controls_sites`` and ``controls_chance``.

    Left out are splits of an edit without an effect, and sites where there is one only.
    """
    makers = {"controls_chance": lambda: _draw_chance(result)}
    if result.counterfactual.effect is not None:
        makers["controls_splits"] = lambda: _draw_splits(result)
    if result.elsewhere:
        makers["controls_sites"] = lambda: _draw_sites(result)
    return write_figures(makers, folder)


def split_label(split: Split) -> str:
    """Name of a subspace with its dimensions and what it holds of the edit."""
    return (
        f"{split.space}\n{split.dimensions} of {split.width} dimensions, "
        f"{as_percent(split.inside.share)} of |δ|²"
    )


def flips_by_kind(result: ControlsResult) -> list[tuple[str, float, list[float], list[float], str]]:
    """Rows of the comparison with chance: label, share flipped, interval, by seed, colour."""

    def row(label: str, outcome: Outcome, colour: str) -> None:
        if outcome.flipped is not None:
            rows.append((label, outcome.flipped, outcome.flipped_interval, [], colour))

    rows: list[tuple[str, float, list[float], list[float], str]] = []
    row(OWN, result.counterfactual, COUNTERFACTUAL)
    for number, outcome in enumerate(result.halves.outcomes if result.halves else [], 1):
        row(f"{HALF}, {number}", outcome, COUNTERFACTUAL)
    row(BACK, result.control, CONTROL)
    for item in result.chance:
        if item.mean_flipped is not None:
            mean = item.mean_flipped
            rows.append((item.kind, mean.value, [mean.lower, mean.upper], item.flipped, NOTE))
    return rows


def whiskers(value: float, interval: list[float]) -> tuple[float, float]:
    """Distances in percent from a share down to and up to the ends of its interval."""
    return 100 * max(value - interval[0], 0.0), 100 * max(interval[1] - value, 0.0)


def _draw_splits(result: ControlsResult) -> "Figure":
    from matplotlib.figure import Figure

    splits = result.splits[::-1]
    figure = Figure(figsize=(8.6, 1.9 + 0.72 * len(splits)), layout="constrained")
    axes = figure.subplots()
    for offset, (place, (label, colour)) in zip((0.2, -0.2), PLACES.items(), strict=True):
        outcomes = [getattr(split, place).outcome for split in splits]
        heights = [row + offset for row in range(len(splits))]
        values = [100 * (outcome.effect or 0.0) for outcome in outcomes]
        axes.barh(heights, values, height=0.36, color=colour, label=f"{label}, alone")
        _whisk(axes, heights, [(o.effect or 0.0, o.effect_interval) for o in outcomes])
    axes.axvline(0, color=NOTE, lw=0.8)
    axes.axvline(100, color=NOTE, lw=0.8, ls=":")
    axes.set_yticks(range(len(splits)), [split_label(split) for split in splits], fontsize=9)
    axes.set_xlabel("Share of the edit's effect on IO − S (%); whiskers: 95 % intervals")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    _title(figure, f"Which part of the edit at {result.site} carries its effect")
    return figure


def _draw_sites(result: ControlsResult) -> "Figure":
    from matplotlib.figure import Figure

    names = [item.site for item in result.elsewhere]
    figure = Figure(figsize=(min(12.5, max(7.5, 4 + 0.5 * len(names))), 4.4), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, tuple[list[float | None], str, str]] = {
        "probe accuracy there": (
            [item.probe_accuracy for item in result.elsewhere],
            PROBE,
            "o",
        ),
        f"flipped by the edit of {result.site}, moved": (
            [item.moved.flipped for item in result.elsewhere],
            COUNTERFACTUAL,
            "s",
        ),
        "flipped by the edit fitted there": (
            [item.fitted.flipped for item in result.elsewhere],
            CONTROL,
            "^",
        ),
    }
    for label, (values, colour, marker) in curves.items():
        shares = [float("nan") if value is None else 100 * value for value in values]
        axes.plot(range(len(names)), shares, color=colour, marker=marker, lw=1.6, label=label)
    flipped = result.counterfactual.flipped
    if flipped is not None:
        axes.axhline(100 * flipped, color=CLEAN, ls="--", lw=1, label=f"flipped at {result.site}")
    axes.set_ylim(-4, 104)
    axes.set_ylabel("Held-out prompts (%)")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel("Site, in order of computation")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    _title(figure, f"The edit of {result.site} at other sites")
    return figure


def _draw_chance(result: ControlsResult) -> "Figure":
    from matplotlib.figure import Figure

    rows = flips_by_kind(result)[::-1]
    figure = Figure(figsize=(8.6, 1.5 + 0.42 * max(len(rows), 2)), layout="constrained")
    axes = figure.subplots()
    heights = list(range(len(rows)))
    axes.barh(
        heights,
        [100 * row[1] for row in rows],
        height=0.6,
        color=[row[4] for row in rows],
        alpha=0.8,
    )
    _whisk(axes, [float(height) for height in heights], [(row[1], row[2]) for row in rows])
    for height, (_, _, _, seeds, _) in zip(heights, rows, strict=True):
        axes.plot([100 * s for s in seeds], [height] * len(seeds), "|", color=CLEAN, ms=9, mew=1.2)
    for height, (_, value, interval, seeds, _) in zip(heights, rows, strict=True):
        end = 100 * max(value, interval[1], *seeds)
        axes.text(end + 1.5, height, as_percent(value), va="center", color=NOTE, fontsize=9)
    axes.set_xlim(0, 110)
    axes.set_yticks(heights, [row[0] for row in rows], fontsize=9)
    axes.set_xlabel(
        "Answers flipped (%); whiskers: 95 % intervals; ticks: seeds"
        if any(row[3] for row in rows)
        else "Answers flipped (%)"
    )
    _title(figure, f"Edits at {result.site} that know the order, and edits that do not")
    return figure


def _whisk(
    axes: "Axes", heights: list[float], values: list[tuple[float, list[float] | None]]
) -> None:
    known = [(h, v, i) for h, (v, i) in zip(heights, values, strict=True) if i is not None]
    if known:
        errors = [whiskers(value, interval) for _, value, interval in known]
        axes.errorbar(
            [100 * value for _, value, _ in known],
            [height for height, _, _ in known],
            xerr=[[low for low, _ in errors], [high for _, high in errors]],
            fmt="none",
            ecolor=CLEAN,
            capsize=2,
            lw=1,
        )


def _title(figure: "Figure", text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
