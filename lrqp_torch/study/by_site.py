"""What figures by site share: colours of the two tasks, the site axis, and sites in words."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lrqp_torch.study.figures import MOST_LABELLED_SITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASK_COLOURS = ("#0072B2", "#D55E00")
"""Of the study's task and of the other one; from Okabe and Ito's palette."""

TASK_MARKERS = ("o", "s")
"""The same for matplotlib's markers."""

TASK_SYMBOLS = ("circle", "square")
"""The same for plotly's markers."""


def label_sites(axes: "Axes", names: Sequence[str]) -> None:
    """Name the sites below an axis on which site i is at x = i; every few where there are many."""
    step = -(-len(names) // MOST_LABELLED_SITES)
    chosen = range(0, len(names), step)
    labels = [names[index] for index in chosen]
    axes.set_xticks(list(chosen), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)


def in_ranges(chosen: Collection[str], order: Sequence[str]) -> str:
    """Sites in words, neighbours joined: "L1.mid to L3.pre, L4.mid"; "no site" for none.

    Args:
        chosen: the sites to name.
        order: all sites, in order of computation.
    """
    runs: list[list[str]] = []
    broken = True
    for site in order:
        if site in chosen and broken:
            runs.append([site])
        elif site in chosen:
            runs[-1].append(site)
        broken = site not in chosen
    if not runs:
        return "no site"
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def task_in_words(name: str) -> str:
    """A task's name as figures and sentences show it."""
    return {"plain": "without a prefix", "prefixed": "with a prefix"}.get(name, name)


def capitalised(words: str) -> str:
    """Words with a capital first letter; ``str.capitalize`` would turn S1 into s1."""
    return words[0].upper() + words[1:]
