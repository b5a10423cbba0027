"""The short summary of a study on the terminal, from the report's tables and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text

from lrqp_torch.plot.chart import Table
from lrqp_torch.study.parts.flipping import sites_table
from lrqp_torch.study.report.page import as_text
from lrqp_torch.study.report.words import key_figures
from lrqp_torch.study.results import StudyResults

MOST_ROWS = 30


def print_study(results: StudyResults, says: Sequence[str], console: Console) -> None:
    """Print the key figures and the sweep as two tables, then what was found.

    Args:
        results: of a study.
        says: a sentence or two each.
        console: where to print.
    """
    rows = [[what, own, note] for own, what, note in key_figures(results)]
    head = ["quantity", str(results.model["name"]), ""]
    console.print(as_rich(Table(head, rows), "On held-out prompts"))
    if results.sites:
        console.print()
        console.print(_sweep(results))
    for line in says:
        wrong = "DISAGREES" in line or "infeasible or inaccurate" in line
        console.print(Text(line, style="bold red" if wrong else ""))
    for line in results.notes:
        console.print(Text(f"Note: {line}", style="yellow"))


def as_rich(
    table: Table,
    title: str,
    caption: str = "",
    bold: Sequence[str] = (),
    headings: Mapping[str, str] | None = None,
) -> Shown:
    """A table for the terminal: its first column to the left, the others to the right.

    Args:
        table: what is shown.
        title: above it.
        caption: below it.
        bold: rows that stand out, by their first cell.
        headings: shorter ones, which may have several lines.
    """
    shown = Shown(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 0),
        pad_edge=False, caption=caption or None, caption_justify="left",
    )  # fmt: skip
    columns = [as_text([row[i] for row in table.rows], h) for i, h in enumerate(table.columns)]
    for index, heading in enumerate(table.columns):
        justify: Any = "right" if index else "left"
        name = Text((headings or {}).get(heading, heading))
        shown.add_column(name, justify=justify, vertical="bottom", no_wrap=bool(index))
    for cells in zip(*columns, strict=True):
        shown.add_row(*map(Text, cells), style="bold" if cells[0] in bold else "")
    return shown


def _sweep(results: StudyResults) -> Shown:
    """The main columns of the table of sites; of many sites those that flip or change most."""
    whole, words = sites_table(results), results.words
    preference, answered = f"{words.preference} ({words.unit})", results.answered is not None
    effect = preference if answered else "KL (nats)"
    chosen = {
        "site": "site",
        "probe accuracy (%)": "probe\naccuracy",
        "shuffled labels (%)": "shuffled\nlabels",
        "flipped, control (%)": "flipped,\ncontrol",
        "flipped, counterfactual (%)": "flipped,\ncounter-\nfactual",
        f"control: {effect}": "effect,\ncontrol",
        f"counterfactual: {effect}": "effect,\ncounter-\nfactual",
        "edit length, Mahalanobis": "edit\nlength",
        "worst log-odds margin": "worst\nmargin",
    }
    kept = {name: whole.columns.index(name) for name in chosen if name in whole.columns}
    rows = [[row[index] for index in kept.values()] for row in whole.rows]
    caption = (
        f"shares in %; effect: mean {effect}; length: Mahalanobis, counterfactual;\n"
        "margin: log odds read after the edit minus those asked, worst prompt"
    )
    if len(rows) > MOST_ROWS:

        def change(name: str) -> float:
            edit = results.sites[name].counterfactual
            return (edit.flipped and edit.flipped.value) or edit.divergence.known / 1e3

        most = set(sorted(results.sites, key=change)[-MOST_ROWS:])
        caption += f"\n{len(rows) - MOST_ROWS} more sites, where less changes: results.json"
        rows = [row for row in rows if row[0] in most]
    title = f"Edits of the belief about {words.variable}, at {words.position}"
    return as_rich(Table(list(kept), rows), title, caption, results.used_sites, chosen)
