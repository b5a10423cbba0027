"""What an object shows of itself in a notebook: a few numbers, and a small histogram of many."""

from collections.abc import Mapping, Sequence
from html import escape

from lrqp_torch.plot.chart import counted, edges

BINS, WIDE, HIGH = 24, 168, 36
"""Bars of the histogram, and its size in pixels."""

_CELL = "text-align:left;padding:0.1em 1em 0.1em 0;border:0;background:none"


def card(
    title: str, facts: Mapping[str, object], lengths: Sequence[float] = (), name: str = "lengths"
) -> str:
    """HTML of an object: its name, its facts but for those that are None, and a histogram of
    numbers.

    Colours are those of the page, so that it can be read on a dark one; nothing is fetched, no
    script runs, and every text is escaped. ``name`` is what the numbers, ``lengths``, are called.
    """
    shown = {key: escape(str(value)) for key, value in facts.items() if value is not None}
    if lengths:
        shown[name] = _histogram(lengths, name)
    rows = (
        f'<tr style="background:none"><th style="{_CELL};font-weight:normal;opacity:0.7">'
        f'{escape(key)}</th><td style="{_CELL}">{value}</td></tr>'
        for key, value in shown.items()
    )
    return (
        f'<div class="lrqp"><strong>{escape(title)}</strong>'
        f'<table style="border:0;margin:0.2em 0">{"".join(rows)}</table></div>'
    )


def _histogram(values: Sequence[float], name: str) -> str:
    limits = edges(values, BINS)
    bars = [count or 0.0 for count in counted("", values, limits).y]
    tallest, step = max(bars), WIDE / BINS
    drawn = "".join(
        f'<rect x="{index * step:.1f}" y="{HIGH * (1 - bar / tallest):.1f}" '
        f'width="{step - 1:.1f}" height="{HIGH * bar / tallest:.1f}"/>'
        for index, bar in enumerate(bars)
        if bar
    )
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    said = escape(f"{name} of {len(values)}, from {low} to {high}", quote=True)
    return (
        f'{low} <svg role="img" aria-label="{said}" width="{WIDE}" height="{HIGH}" '
        f'fill="currentColor" opacity="0.6" style="vertical-align:bottom">{drawn}</svg> {high}'
    )
