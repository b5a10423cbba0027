"""Estimates, sites and tasks as sentences, charts and tables show them."""

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from lrqp_torch.plot.chart import SHARES, Cell, Marks, Pane, Panel, Table, ends, look, marks_of
from lrqp_torch.plot.reading import get
from lrqp_torch.plot.reading import task_in_words as task_in_words
from lrqp_torch.study.estimates import Estimate

if TYPE_CHECKING:
    from jinja2 import Environment

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

NO_BREAK = "\u00a0"
SITES = "site, in order of computation"
"""Title of an axis."""
UNKNOWN = Estimate(None, None, None, 0)
"""Keeps a column of estimates where none is known."""

Reading = str | Callable[[Any], Any]
"""How a quantity is read of a record: names of attributes joined by dots, or a function."""

HELD_AGAINST: dict[str, Reading] = {
    "recovered (%)": "recovered",
    "same answer as the interchange (%)": "agreement",
    "KL from the interchange (nats)": "kl_to_interchange",
    "beyond its own patch": "beyond",
}
"""Columns of a table: how edits compare with their interchange."""


UNTOLD = (
    " The share of its ceiling that an edit recovers is given where the variable is used; "
    "elsewhere the ceiling has hardly an effect to divide by."
)
"""What is said below a table with these columns."""


# ---- words ---------------------------------------------------------------------------------------


def said(part: str, what: str, **known: Any) -> list[str]:
    """What is said of a part's numbers, a paragraph each, by one of the macros of
    ``words/PART.jinja``.

    Paragraphs are apart by a blank line. ``known`` is what is spoken of; a name that is used there
    and not given is an error.
    """
    module = _environment().get_template(f"{part}.jinja").make_module(known)
    paragraphs = re.split(r"\n *\n", str(getattr(module, what)()))
    # Not str.split: a number and its sign of per cent are not to be broken apart.
    found = (re.sub(r"[ \n]+", " ", text).strip(" ") for text in paragraphs)
    return [text for text in found if text]


def panel(part: str, name: str, *, shown: Mapping[str, Any], **known: Any) -> Panel:
    """A panel whose title and text are said of a part under its name, the title first.

    A number behind the name, by which several panels of a kind are told apart, is left out there.

    ``shown`` are the other fields of the :class:`~lrqp_torch.plot.chart.Panel`; the other arguments
    are those of :func:`said`.
    """
    title, *text = said(part, re.sub(r"-\d+$", "", name).replace("-", "_"), **known)
    return Panel(name, title, "\n\n".join(text), **shown)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("lrqp_torch.study", "words"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What another macro says is part of the paragraph in which it is called.
        finalize=lambda value: value.strip("\n") if isinstance(value, str) else value,
    )
    made.filters |= {
        "between": between, "capitalised": capitalised, "headed": headed, "in_ranges": in_ranges,
        "listed": enumerated, "mean": mean_in_words, "percent": percent, "plural": plural,
        "share": share_in_words, "shares": shares, "signed": signed, "task": task_in_words,
        "written": format,
    }  # fmt: skip
    made.globals |= {"UNTOLD": UNTOLD}
    return made


# ---- tables and curves ---------------------------------------------------------------------------


def reads(record: Any, reading: Reading) -> Any:
    """A quantity of a record; None where any of the names on the way to it is None or missing."""
    return get(record, reading, None) if isinstance(reading, str) else reading(record)


def known(records: Sequence[Any], columns: Mapping[str, Reading]) -> dict[str, Reading]:
    """Those of the columns in which anything is known of the records."""
    return {
        title: reading
        for title, reading in columns.items()
        if any(reads(record, reading) not in (None, "") for record in records)
    }


def table_of(
    keys: Sequence[str], rows: Iterable[tuple[Sequence[Cell], Any]], columns: Mapping[str, Reading]
) -> Table:
    """A table of records: a row each, with what names it in front, under the headings ``keys``.

    ``columns`` are by heading how they are read. Estimates have their ends in two columns behind
    theirs; columns with ``(%)`` in their heading are given as shares and shown in per cent; truth
    is written as yes or no.
    """
    named = [(list(names), record) for names, record in rows]
    headings, shown = list(keys), [list(column) for column in zip(*(n for n, _ in named))]  # noqa: B905
    for heading, reading in columns.items():
        values = [reads(record, reading) for _, record in named]
        scale = 100 if "(%)" in heading else 1
        headings.append(heading)
        if any(isinstance(value, Estimate) for value in values):
            headings += (
                ("lower 95 %", "upper 95 %") if scale == 1 else ("lower end (%)", "upper end (%)")
            )
            each = [list(column) for column in zip(*map(ends, values), strict=True)]
        else:
            each = [[("no", "yes")[v] if isinstance(v, bool) else v for v in values]]
        shown += [[v if v is None or scale == 1 else scale * v for v in column] for column in each]
    return Table(headings, list(zip(*shown, strict=True)))


def by_site(marks: Sequence[Marks], title: str = "", **pane: Any) -> Pane:
    """Shares in per cent, or what ``pane`` says of its axis of values, site by site."""
    axes = {"x_title": SITES, "y_title": "Held-out prompts (%)", "y_range": SHARES}
    return Pane(marks, title=title, **axes | pane)


def curves(
    series: Mapping[str, Mapping[str, Any]], reading: Reading, *, scale: float = 100.0
) -> list[Marks]:
    """A curve for each of several tasks or variables, which have a record by site each."""
    return [
        marks_of(name, list(of), [reads(r, reading) for r in of.values()], scale=scale, **look(i))
        for i, (name, of) in enumerate(series.items())
    ]


# ---- numbers and names ---------------------------------------------------------------------------


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by a key of each, in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def joined(*words: str) -> str:
    """Those that are not empty, with commas between them."""
    return ", ".join(word for word in words if word)


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent, ``"95.4 %"``; a dash for none."""
    return "–" if share is None else f"{_minus(f'{100 * share:z.{digits}f}')}{NO_BREAK}%"


def shares(values: Iterable[float | None]) -> str:
    """Several shares: ``"95 % and 93 %"``."""
    return " and ".join(percent(value, 0) for value in values)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign: ``"+0.31"`` or ``"−0.20"``."""
    return _minus(f"{value:+z.{digits}f}")


def between(estimate: Estimate, digits: int = 2, scale: float = 1.0) -> str:
    """The interval of an estimate times ``scale``, ``"0.31 to 0.42"``; a dash for none."""
    if estimate.interval is None:
        return "–"
    lower, upper = (f"{scale * end:z.{digits}f}" for end in estimate.interval)
    return _minus(f"{lower} to {upper}")


def share_in_words(estimate: Estimate, digits: int = 1) -> str:
    """A share with its interval: ``"95.4 % (93.1 to 96.9)"``."""
    return f"{percent(estimate.value, digits)} ({between(estimate, digits, 100)})"


def mean_in_words(estimate: Estimate, digits: int = 2) -> str:
    """A mean with its interval: ``"+0.31 (0.22 to 0.42)"``."""
    return f"{signed(estimate.known, digits)} ({between(estimate, digits)})"


def in_ranges(chosen: Collection[str], order: Sequence[str]) -> str:
    """Some of all sites in words, neighbours joined: "L1.mid to L3.pre, L4.mid"; "no site" for
    none.
    """
    runs = [list(run) for inside, run in groupby(order, lambda site: site in chosen) if inside]
    named = (run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return ", ".join(named) or "no site"


def headed(name: str, words: str, mark: str = ": ") -> str:
    """Words about one version of the task, beginning with its name where it has one."""
    head = task_in_words(name)
    return capitalised(f"{head}{mark}{words}" if head else words)


def capitalised(words: str) -> str:
    """Words with a capital first letter; ``str.capitalize`` would turn S1 into s1."""
    return words[:1].upper() + words[1:]


def enumerated(names: Sequence[str]) -> str:
    """Names in a sentence: ``"L1.mid, L2.pre and L3.mid"``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``"1 head"``, ``"3 heads"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _minus(number: str) -> str:
    return number.replace("-", "−")
