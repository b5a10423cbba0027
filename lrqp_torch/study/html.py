"""The interactive report: one HTML file that opens without a network.

The file holds its style, its script, plotly.js and every figure. Text from prompts and settings is
escaped wherever it goes. Long arrays that several figures share, such as the prompts of a hover
text, are stored once.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from lrqp_torch.errors import MissingExtraError
from lrqp_torch.files import written_whole
from lrqp_torch.plot.chart import Chart
from lrqp_torch.plot.interactive import to_plotly
from lrqp_torch.study import summary
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.results import StudyResults

REPORT_FILE = "report.html"
SHARED_FROM = 32
"""Arrays of at least this length are stored once, however many figures hold them."""
DIGITS = 6
TALL_TABLE = 16
"""Tables of more rows scroll within the page."""
PROSE_FROM = 40
"""Cells of more characters are given room to wrap."""

Value = str | float | int | None


@dataclass(frozen=True)
class Section:
    """One chapter of the report, usually one part of the study.

    Attributes:
        title: one line.
        text: paragraphs separated by an empty line.
        panels: its figures and tables, in order.
    """

    title: str
    text: str
    panels: list[Panel]

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


def write_report(path: Path, results: StudyResults, sections: Sequence[Section]) -> None:
    """Write the report of a study as one self-contained HTML file.

    Args:
        path: the file, such as ``DIR/report.html``; written whole or not at all. The folder is
            named as given here in the command that the report shows.
        results: the study's figures, for the summary and the settings at the end.
        sections: the chapters in between.

    Raises:
        MissingExtraError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    write_page(
        path,
        title=summary.title(results),
        subtitle=summary.subtitle(results),
        opening=_summary(results),
        sections=sections,
        closing=_made(results, path.parent),
    )


def write_page(
    path: Path,
    *,
    title: str,
    subtitle: str,
    opening: str,
    sections: Sequence[Section],
    closing: str,
) -> None:
    """Write a page in the report's style as one self-contained HTML file.

    Args:
        path: the file; written whole or not at all.
        title: plain text, like ``subtitle``.
        subtitle: below the title.
        opening: HTML of a section with the id ``summary``; see :func:`summary_section`.
        sections: the chapters.
        closing: HTML of a section with the id ``made``; see :func:`made_section`.

    Raises:
        MissingExtraError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    require_plotly()
    from plotly.offline import get_plotlyjs

    assets = files("lrqp_torch.study") / "assets"
    panels = [panel for section in sections for panel in section.panels]
    body = [opening, *(_section(section) for section in sections), closing]
    page = Template((assets / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        css=(assets / "report.css").read_text(encoding="utf-8"),
        contents=_contents(sections),
        body="\n".join(body),
        data=_data(panels),
        plotly=get_plotlyjs(),
        script=(assets / "report.js").read_text(encoding="utf-8"),
    )
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


# ---- words ---------------------------------------------------------------------------------------


def _summary(results: StudyResults) -> str:
    tiles = [(figure.own, figure.quantity, figure.note) for figure in summary.key_figures(results)]
    return summary_section(summary.question(results), tiles, summary.findings(results))


def summary_section(
    question: str, tiles: Iterable[tuple[str, str, str]], findings: Iterable[str]
) -> str:
    """The opening of a page: what was asked, the key figures, what was found. All plain text.

    Args:
        question: paragraphs separated by an empty line.
        tiles: each figure, what it is, and a note on it.
        findings: a sentence or two each.
    """
    figures = "".join(
        f'<div><dd class="own">{escape(figure)}</dd><dt>{escape(quantity)}</dt>'
        f'<dd class="theirs">{escape(note)}</dd></div>'
        for figure, quantity, note in tiles
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in findings)
    return (
        f'<section id="summary"><h2>Summary</h2>{_paragraphs(question)}'
        f'<dl class="figures">{figures}</dl><ul class="findings">{items}</ul></section>'
    )


def _contents(sections: Sequence[Section]) -> str:
    def entry(name: str, title: str, below: str = "") -> str:
        return f'<li><a href="#{escape(name)}">{escape(title)}</a>{below}</li>'

    rows = [entry("summary", "Summary")]
    for section in sections:
        panels = "".join(entry(_anchor(panel), panel.title) for panel in section.panels)
        rows.append(entry(section.name, section.title, f"<ol>{panels}</ol>" if panels else ""))
    return f"<ol>{''.join(rows)}{entry('made', 'How this was made')}</ol>"


def _section(section: Section) -> str:
    panels = "\n".join(map(_panel, section.panels))
    return (
        f'<section id="{escape(section.name)}"><h2>{escape(section.title)}</h2>'
        f"{_paragraphs(section.text)}\n{panels}</section>"
    )


def _panel(panel: Panel) -> str:
    anchor, name, title = _anchor(panel), escape(panel.name), escape(panel.title)
    parts = [f'<figcaption><h3 id="{anchor}-title">{title}</h3>{_paragraphs(panel.text)}']
    if len(panel.figures) > 1:
        options = "".join(
            f'<option value="{index}">{escape(key)}</option>'
            for index, key in enumerate(panel.figures)
        )
        label = escape(panel.choice.capitalize() or "Choice")
        parts.append(
            f'<div class="choice"><label for="{anchor}-choice">{label}</label>'
            f'<select id="{anchor}-choice" data-panel="{name}">{options}</select></div>'
        )
    parts.append("</figcaption>")
    if panel.figures:
        parts.append(
            f'<div class="plot" role="img" data-panel="{name}" aria-label="{title}"></div>'
        )
    if panel.table is not None:
        parts.append(_table(panel.table, panel.title))
    return (
        f'<figure class="panel" id="{anchor}" aria-labelledby="{anchor}-title">'
        f"{''.join(parts)}</figure>"
    )


def _anchor(panel: Panel) -> str:
    return f"panel-{escape(panel.name)}"


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _table(table: Table, title: str) -> str:
    columns = [[row[index] for row in table.rows] for index in range(len(table.columns))]
    words = [any(isinstance(value, str) for value in column) for column in columns]
    shown = zip(*(_as_text(column) for column in columns), strict=True)
    head = "".join(
        f'<th scope="col"{_class(word)}><button type="button">{escape(column)}</button></th>'
        for column, word in zip(table.columns, words, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(map(_cell, row, texts, words))}</tr>"
        for row, texts in zip(table.rows, shown, strict=True)
    )
    tall = " tall" if len(table.rows) > TALL_TABLE else ""
    # A box that scrolls must take the keyboard's focus, or its end is out of reach without a mouse.
    return (
        f'<div class="scroll{tall}" tabindex="0" role="region" aria-label="{escape(title)}: table">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(value: Value, text: str, word: bool) -> str:
    key = "" if value is None else f' data-value="{escape(str(value))}"'
    return f"<td{_class(word, prose=len(text) > PROSE_FROM)}{key}>{escape(text)}</td>"


def _class(word: bool, prose: bool = False) -> str:
    return f' class="words{" prose" if prose else ""}"' if word else ""


def _as_text(column: Sequence[Value]) -> list[str]:
    """A column's values with as many decimals as its size asks for, the same in every row."""
    sizes = [abs(value) for value in column if isinstance(value, float)]
    largest = max(sizes, default=0.0)
    # The z writes what rounds to zero without a sign.
    style = "z.1f" if largest >= 20 else "z.2f" if largest > 1 else "z.3f"
    if 0 < largest < 0.01:
        style = ".1e"

    def text(value: Value) -> str:
        if value is None:
            return "–"
        return f"{value:{style}}".replace("-", "−") if isinstance(value, float) else str(value)

    return [text(value) for value in column]


def _made(results: StudyResults, folder: Path) -> str:
    return made_section(
        command=summary.command(results, folder),
        files="results.json, parts/ and prompts.safetensors",
        settings=results.settings,
        model=results.model,
        versions=results.versions,
        elapsed=results.elapsed,
    )


def made_section(
    *,
    command: str,
    files: str,
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    versions: Mapping[str, str],
    elapsed: Mapping[str, float],
) -> str:
    """The end of a page: the command that writes it again, and all that its numbers depend on.

    Args:
        command: plain text.
        files: the files beside the page that hold its numbers, in words.
        settings: None is shown as the default.
        model: what identifies it.
        versions: by package.
        elapsed: seconds by stage.
    """

    def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
        cells = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
            for key, value in rows
        )
        return f"<div><h3>{escape(title)}</h3><table><tbody>{cells}</tbody></table></div>"

    tables = (
        table("Settings", ((key, "default" if v is None else v) for key, v in settings.items())),
        table("Model", model.items()),
        table("Versions", versions.items()),
        table("Seconds", ((stage, f"{value:.1f}") for stage, value in elapsed.items())),
    )
    return (
        '<section id="made"><h2>How this was made</h2>'
        "<p>The same command with the same versions gives the same numbers; everything random "
        f"comes from the seed. The numbers behind every figure are in {escape(files)} beside this "
        f"file.</p><pre><code>{escape(command)}</code></pre>"
        f'<div class="made">{"".join(tables)}</div></section>'
    )


# ---- figures -------------------------------------------------------------------------------------


def _data(panels: Sequence[Panel]) -> str:
    """Every figure as JSON that may stand inside a script element."""
    shared: dict[str, int] = {}
    figures = {
        panel.name: [
            {
                "label": f"{panel.title}; {panel.choice or 'choice'} {key}"
                if len(panel.figures) > 1
                else panel.title,
                **_share(_plain(figure), shared),
            }
            for key, figure in panel.figures.items()
        ]
        for panel in panels
        if panel.figures
    }
    arrays = f"[{','.join(shared)}]"
    text = f'{{"figures":{_compact(figures)},"shared":{arrays}}}'
    # Inside a script element only "<" can end it or open a comment.
    return text.replace("<", "\\u003c")


def _plain(figure: Any) -> dict[str, Any]:
    """Data and layout of a plotly figure as plain JSON values; the page brings its own template."""
    from plotly.io import to_json

    raw: dict[str, Any]
    if isinstance(figure, Chart):
        raw = to_plotly(figure, alone=False)
    else:
        raw = json.loads(to_json(figure, validate=False))
    layout = {key: v for key, v in raw["layout"].items() if key not in ("template", "width")}
    return {"data": raw["data"], "layout": layout}


def _share(value: Any, shared: dict[str, int]) -> Any:
    """Replace long arrays by references into ``shared``, which maps their JSON to its index."""
    if isinstance(value, dict) and "bdata" not in value:
        return {key: _share(item, shared) for key, item in value.items()}
    if isinstance(value, list) and (len(value) < SHARED_FROM or _has_objects(value)):
        return [_share(item, shared) for item in value]
    if isinstance(value, (dict, list)):
        return {"$shared": shared.setdefault(_compact(_rounded(value)), len(shared))}
    return _rounded(value)


def _has_objects(array: list[Any]) -> bool:
    return any(isinstance(item, dict) for item in array)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
