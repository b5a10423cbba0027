"""What studies, fits and edits of your own say on the terminal, however narrow it is; key numbers
and command of a study, which its report has too.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table as Shown
from rich.text import Text

from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.plot.chart import Table
from lrqp_torch.study.editing import Applied, HeldOut
from lrqp_torch.study.parts.flipping import sites_table
from lrqp_torch.study.report.page import as_text
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.showing import between, percent, plural, said, signed

MOST_ROWS = 30


def print_study(
    results: StudyResults, says: Sequence[str], console: Console, *, whole: bool = False
) -> None:
    """Print the key figures and the sweep as two tables, then what was found; ``whole`` for all
    sites.
    """
    rows = [[what, own, note] for own, what, note in key_figures(results)]
    head = ["quantity", str(results.model["name"]), ""]
    console.print(as_rich(Table(head, rows), "On held-out prompts", wrapped=True))
    if results.sites:
        console.print()
        console.print(_sweep(results, console, len(results.sites) if whole else MOST_ROWS))
    for line in says:
        wrong = "DISAGREES" in line or "infeasible or inaccurate" in line
        console.print(Text(line, style="bold red" if wrong else ""))
    for line in results.notes:
        console.print(Text(f"Note: {line}", style="yellow"))


def key_figures(results: StudyResults) -> list[tuple[str, str, str]]:
    """The numbers of the clean run and of the strongest edit, as they are shown.

    Each is the number, what it is, and a note on it: the published one, or its interval.
    """
    clean, words, best = results.clean, results.words, results.strongest
    edited = None if best is None else best.counterfactual
    rows = [
        ("logit_difference", f"mean {words.preference}", clean.logit_difference, False),
        ("accuracy", f"prompts answered with {words.held}", clean.accuracy, True),
        ("io_probability", f"mean probability of {words.held}", clean.io_probability, True),
    ]
    if edited is not None and edited.logit_difference is None:
        name = f"nats of change, edited at {results.best_site}"
        rows.append(("", name, edited.divergence, False))
    elif edited is not None:
        name = f"mean {words.preference}, edited at {results.best_site}"
        rows.append(("position_inverted", name, edited.logit_difference, False))
    found = []
    for key, quantity, value, share in rows:
        if value is None:
            continue
        published = results.published.get(key)
        note = f"95 % interval {between(value, 1 if share else 2, 100 if share else 1)}"
        if published is not None:
            number = percent(published.value) if share else signed(published.value)
            note = f"GPT-2 small, published: {number}"
        shown = percent(value.value) if share else signed(value.known)
        found.append((shown, quantity, note))
    return found


def command(results: StudyResults, folder: Path) -> str:
    """The command that writes these results again, with what was not left at its default."""
    defaults = {field.name: field.default for field in fields(Settings)}
    words = ["lrqp", "study" if "data" in results.settings else "reproduce"]
    if words[1] == "study":
        defaults["parts"] = "flipping"
    for name, value in results.settings.items():
        if name != "model" and (value == defaults.get(name) or value is None):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, shlex.quote(str(value))]
    return " ".join([*words, "--out", shlex.quote(str(folder))])


def as_rich(
    table: Table,
    title: str,
    caption: str = "",
    bold: Sequence[str] = (),
    headings: Mapping[str, str] | None = None,
    wrapped: bool = False,
) -> Group:
    """A table for the terminal: its first column to the left, the others to the right.

    Rows whose first cell is among ``bold`` stand out; ``headings`` are shorter ones, which may have
    several lines, as cells may if ``wrapped``.
    """
    shown = Shown(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 0), pad_edge=False)
    columns = [as_text([row[i] for row in table.rows], h) for i, h in enumerate(table.columns)]
    for index, heading in enumerate(table.columns):
        justify: Any = "right" if index else "left"
        name = Text((headings or {}).get(heading, heading))
        shown.add_column(
            name, justify=justify, vertical="bottom", no_wrap=bool(index) and not wrapped
        )
    for cells in zip(*columns, strict=True):
        shown.add_row(*map(Text, cells), style="bold" if cells[0] in bold else "")
    # Not the table's own title and caption, whose lines would be as short as its rows.
    below = [Text(caption, style="italic dim")] if caption else []
    return Group(Text(title, style="italic"), shown, *below)


def fitting(console: Console, table: Table, title: str, caption: str = "", **looks: Any) -> Group:
    """The table, or as many of its first columns as are as wide as the console.

    ``looks`` are those of :func:`as_rich`.
    """
    for count in range(len(table.columns), 0, -1):
        left_out = len(table.columns) - count
        note = f"\n{plural(left_out, 'more column')} on a wider terminal" if left_out else ""
        kept = Table(table.columns[:count], [row[:count] for row in table.rows])
        shown = as_rich(kept, title, caption + note, **looks)
        # Measured in any width, or it would be what there is room for.
        wide = console.options.update(width=10_000)
        if console.measure(shown, options=wide).minimum <= console.width:
            break
    return shown


def _sweep(results: StudyResults, console: Console, most_rows: int) -> Group:
    """The main columns of the table of sites; of many sites those that flip or change most."""
    whole, words = sites_table(results), results.words
    preference, answered = f"{words.preference} ({words.unit})", results.answered is not None
    effect = preference if answered else "KL (nats)"
    chosen = {
        "site": "site",
        "probe accuracy (%)": "probe\naccuracy",
        "flipped, counterfactual (%)": "flipped,\ncounter-\nfactual",
        "flipped, interchange (%)": "flipped,\nceiling",
        "recovered (%)": "reco-\nvered",
        "flipped, control (%)": "flipped,\ncontrol",
        "P, used": "P,\nused",
        f"counterfactual: {effect}": "effect,\ncounter-\nfactual",
        "shuffled labels (%)": "shuffled\nlabels",
        "edit length, Mahalanobis": "edit\nlength",
        "worst log-odds margin": "worst\nmargin",
    }
    kept = {name: whole.columns.index(name) for name in chosen if name in whole.columns}
    rows = [[row[index] for index in kept.values()] for row in whole.rows]
    ceiling = "flipped, interchange (%)" in kept
    (caption,) = said("study", "sweep_caption", effect=effect, ceiling=ceiling)
    if len(rows) > most_rows:

        def change(name: str) -> float:
            edit = results.sites[name].counterfactual
            return (edit.flipped and edit.flipped.value) or edit.divergence.known / 1e3

        most = set(sorted(results.sites, key=change)[-most_rows:])
        caption += f"\n{len(rows) - most_rows} more sites, where less changes: --verbose shows them"
        rows = [row for row in rows if row[0] in most]
    title = f"Edits of the belief about {words.variable}, at {words.position}"
    bold = results.used_sites
    return fitting(console, Table(list(kept), rows), title, caption, bold=bold, headings=chosen)


def print_fit(
    label: str,
    classes: Sequence[str],
    fitted: int,
    majority: float,
    tried: Mapping[str, HeldOut],
    console: Console,
) -> None:
    """Say how well the probes of one label read prompts held out, and what edits of these reach."""
    columns = ("site", "probe\naccuracy", "95 %\ninterval", "odds\nreached", "worst\nmargin",
               "edit\nlength")  # fmt: skip
    rows = [
        (
            site,
            percent(found.accuracy.value),
            between(found.accuracy, 1, 100),
            f"{found.reached} of {found.prompts}",
            f"{found.worst_log_odds_margin:.0e}",
            f"{found.distance:.2f}",
        )
        for site, found in tried.items()
    ]
    held_out = next(iter(tried.values())).prompts
    known = {"classes": classes, "fitted": fitted, "held_out": held_out, "majority": majority}
    title, caption = said("study", "fit", label=label, **known)
    console.print(fitting(console, Table(columns, rows), title, caption))


def print_applied(
    found: Sequence[Applied], origin: Provenance, show: int, console: Console
) -> None:
    """Print what an edit did to the first prompts, and what it did to all."""
    for item in found[:show]:
        lines = [
            f"\n{item.prompt}",
            f"  belief in {item.target}: {_chance(item.belief_before)} → "
            f"{_chance(item.belief_after)} (log odds {signed(item.belief_before)} → "
            f"{signed(item.belief_after)}; edit of length {item.distance:.2f} at {origin.site})",
        ]
        if item.lead_before is not None and item.lead_after is not None:
            lines.append(
                f"  answers with {item.target} rather than another: "
                f"{signed(item.lead_before)} → {signed(item.lead_after)} nats"
            )
        lines.append(f"  next: {_tokens(item.next_before)}")
        lines.append(f"     →  {_tokens(item.next_after)}")
        if item.continued_before is not None:
            lines.append(f"  goes on: {item.continued_before!r}")
            lines.append(f"        →  {item.continued_after!r}")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    left_out = len(found) - min(show, len(found))
    if left_out:
        console.print(f"\n{left_out} more prompts: see --show and --out.", markup=False)
    (total,) = said("study", "applied", found=found)
    console.print(f"\n{total}", markup=False, soft_wrap=True)


def _chance(log_odds: float) -> str:
    """The probability of a class against its strongest rival."""
    return f"{100 / (1 + math.exp(-max(-700.0, log_odds))):.2f} %"


def _tokens(tokens: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{token!r} {100 * chance:.0f} %" for token, chance in tokens)
