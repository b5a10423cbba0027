"""The interactive report: one HTML file that opens without a network.

The file holds its style, its script, plotly.js and every chart, the last two compressed. Text from
prompts and settings is escaped wherever it goes, and a content security policy lets no other
script run and nothing be fetched. Long arrays that several charts share, such as the prompts of a
hover text, are stored once.
"""

import gzip
import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrqp_torch.errors import MissingExtraError
from lrqp_torch.files import written_whole
from lrqp_torch.plot.chart import Cell, Chart, Panel, Table
from lrqp_torch.plot.interactive import to_plotly

REPORT_FILE = "report.html"
SHARED_FROM = 32
"""Arrays of at least this length are stored once, however many charts hold them."""
DIGITS = 6
PROSE_FROM = 40
"""Cells of more characters are given room to wrap."""
LEAD = 240
"""Characters of a panel's text that are always shown."""
LISTED_FROM = 90
"""Lists in cells of more characters are folded to their first items."""


@dataclass(frozen=True)
class Chapter:
    """One part of the study in the report."""

    title: str  # one line
    question: str  # what it asks; paragraphs separated by an empty line
    says: Sequence[str]  # what was found, a sentence or two each
    # Its charts and tables; the first is shown, the others open when they are asked for.
    panels: Sequence[Panel]

    @property
    def name(self) -> str:
        """The title as an anchor."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def require_plotly() -> None:
    """Raise :class:`MissingExtraError` if plotly is not installed."""
    if find_spec("plotly") is None:
        raise MissingExtraError(
            "the report needs plotly: install it with `pip install 'lrqp_torch[report]'`, "
            "or pass --no-report."
        )


def write_page(path: Path, chapters: Sequence[Chapter], **about: Any) -> None:
    """Write the report as one self-contained HTML file, whole or not at all.

    ``about`` is what stands before and behind the chapters, by the names in ``report.html``.

    Raises:
        MissingExtraError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    require_plotly()
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    assets = files("lrqp_torch.study.report") / "assets"
    css, script, page = (
        (assets / f"report.{end}").read_text(encoding="utf-8") for end in ("css", "js", "html")
    )
    plotly = get_plotlyjs()
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "cells": cells_of, "lead": lead, "paragraphs": lambda text: text.split("\n\n"),
    }  # fmt: skip
    panels = [*about["panels"], *(panel for chapter in chapters for panel in chapter.panels)]
    text = environment.from_string(page).render(
        about,
        chapters=chapters,
        css=css,
        script=f"\n{script}",
        hashes=[_hash(f"\n{script}"), _hash(plotly)],
        plotly=_packed(plotly),
        data=_packed(_compact(chart_data(panels))),
    )
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def lead(text: str, most: int = LEAD) -> tuple[str, str]:
    """The first sentences of a long text, and the rest of it, which the page folds away."""
    text = re.sub(r"(?<=\d) %", "\u00a0%", text)  # a number and its sign stay in one line
    first, *others = text.strip().split("\n\n")
    if len(text) <= most:
        return text, ""
    sentences, shown = re.split(r"(?<=[.?!]) (?=[A-Z“])|(?<=;) (?![^()]*\))", first), ""
    while sentences and (not shown or len(shown) + len(sentences[0]) < most):
        shown = f"{shown} {sentences.pop(0)}".strip()
    rest = " ".join(sentences)
    if shown.endswith(";"):
        shown, rest = f"{shown[:-1]} …", rest[:1].upper() + rest[1:]
    return shown, "\n\n".join(filter(None, [rest, *others]))


# ---- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownTable:
    """A table as the page shows it: for each heading and cell its text, and what it sorts by."""

    head: list[tuple[str, str]]
    rows: list[list[dict[str, str | None]]]


def cells_of(table: Table) -> ShownTable:
    """Texts of a table's cells; numbers of a column have as many decimals as its size asks for."""
    head, shown = [], []
    for index, heading in enumerate(table.columns):
        column = [row[index] for row in table.rows]
        word = "words" if any(isinstance(value, str) for value in column) else ""
        texts = zip(column, as_text(column, heading), strict=True)
        head.append((heading, word))
        shown.append([_cell(value, text, word) for value, text in texts])
    return ShownTable(head, [list(row) for row in zip(*shown, strict=True)])


def _cell(value: Cell, text: str, word: str) -> dict[str, str | None]:
    items = text.split(", ")
    folded = len(text) > LISTED_FROM and len(items) > 5
    return {
        "text": text,
        "key": None if value is None else str(value),
        "class": f"{word} prose" if word and len(text) > PROSE_FROM else word,
        "brief": f"{', '.join(items[:3])} and {len(items) - 3} more" if folded else None,
    }


def as_text(column: Sequence[Cell], heading: str = "") -> list[str]:
    """A column's values with as many decimals as its size asks for, the same in every row."""
    largest = (
        100.0
        if "%)" in heading
        else max((abs(value) for value in column if isinstance(value, float)), default=0.0)
    )
    # The z writes what rounds to zero without a sign.
    style = "z.1f" if largest >= 20 else "z.2f" if largest > 1 else "z.3f"
    if 0 < largest < 0.01:
        style = ".1e"

    def text(value: Cell) -> str:
        if value is None:
            return "–"
        return f"{value:{style}}".replace("-", "−") if isinstance(value, float) else str(value)

    return [text(value) for value in column]


# ---- charts --------------------------------------------------------------------------------------


def chart_data(panels: Sequence[Panel]) -> dict[str, Any]:
    """Every chart, with its numbers as a table, by panel; long arrays stand in ``shared``."""
    shared: dict[str, int] = {}
    charts: dict[str, list[dict[str, Any]]] = {}
    for panel in panels:
        for key, chart in panel.charts.items():
            choice = f"; {panel.choice or 'choice'} {key}" if len(panel.charts) > 1 else ""
            own = {"label": panel.title + choice, **_share(_figure(chart), shared)}
            charts.setdefault(panel.name, []).append(own)
    return {"figures": charts, "shared": [json.loads(text) for text in shared]}


def _figure(chart: Chart) -> dict[str, Any]:
    figure = to_plotly(chart, alone=False)
    del figure["layout"]["template"]  # the page has its own
    table = chart.table()
    columns = [list(column) for column in zip(*table.rows, strict=True)]
    return figure | {"table": {"head": list(table.columns), "columns": columns}}


def _share(value: Any, shared: dict[str, int]) -> Any:
    """Replace long arrays by references into ``shared``, which maps their JSON to its index."""
    if isinstance(value, dict):
        return {key: _share(item, shared) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) < SHARED_FROM or any(isinstance(item, dict) for item in value):
            return [_share(item, shared) for item in value]
        return {"$shared": shared.setdefault(_compact(_rounded(value)), len(shared))}
    return _rounded(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if value == value else None
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _packed(text: str) -> str:
    """Text compressed, in letters that no markup can hide in; equal texts give equal letters."""
    return b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _hash(script: str) -> str:
    """What the content security policy knows a script by."""
    return f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
