"""What a part of the study hands to the report: titled figures and tables with their words."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table that readers can sort.

    Attributes:
        columns: headings, with units where there are any.
        rows: one value a column; numbers stay numbers, None is shown as a dash.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


@dataclass(frozen=True)
class Panel:
    """One figure or table of the report, with what it shows in plain words.

    Attributes:
        name: short identifier, unique in the report, of letters, digits and hyphens.
        title: one line.
        text: what is seen and how to read it; plain sentences.
        figures: choice to plotly figure. One entry is simply shown; with several, the reader
            chooses by key (a site, a head).
        choice: what the keys of ``figures`` are, such as ``"site"``; empty for a single figure.
        table: shown below the figures.
    """

    name: str
    title: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    choice: str = ""
    table: Table | None = None
