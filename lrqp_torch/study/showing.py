"""Estimates, sites and tasks as sentences, charts and tables show them."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lrqp_torch.plot.chart import LOOKS, Cell, Marks, Table
from lrqp_torch.study.ceiling import Likeness
from lrqp_torch.study.estimates import Estimate

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

NO_BREAK = "\u00a0"
SITES = "site, in order of computation"
"""Title of an axis."""


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the index-th of several tasks or classes, as :class:`Marks` take."""
    colour, marker = LOOKS[index % len(LOOKS)]
    return {"colour": colour, "marker": marker}


def marks_of(
    name: str,
    x: Sequence[str] | Sequence[float],
    values: Sequence[Estimate | float | None],
    *,
    scale: float = 1.0,
    **looks: Any,
) -> Marks:
    """Estimates, or plain numbers, as marks with their intervals.

    Args:
        name: in the legend.
        x: where each stands.
        values: None leaves a gap.
        scale: what they are multiplied by, such as 100 for per cent.
        looks: any other fields of :class:`~lrqp_torch.plot.chart.Marks`.
    """
    ends = [cells(value) for value in values]
    y, lower, upper = (
        [None if end is None else scale * end for end in column]
        for column in zip(*ends, strict=True)
    )
    known = any(end is not None for end in (*lower, *upper))
    return Marks(
        name, x, y, lower=lower if known else None, upper=upper if known else None, **looks
    )


def cells(value: Estimate | float | None) -> tuple[float | None, float | None, float | None]:
    """Value, lower and upper end."""
    if not isinstance(value, Estimate):
        return value, None, None
    return (None, None, None) if value.value is None else (value.value, value.lower, value.upper)


def table_of(columns: Mapping[str, Sequence[Any]]) -> Table:
    """A table by columns of cells; estimates have their ends in two columns behind theirs.

    Columns with ``(%)`` in their heading are given as shares and shown in per cent.
    """
    headings: list[str] = []
    shown: list[Sequence[Cell]] = []
    for heading, values in columns.items():
        scale = 100 if "(%)" in heading else 1
        if any(isinstance(value, Estimate) for value in values):
            names = (
                ("lower 95 %", "upper 95 %") if scale == 1 else ("lower end (%)", "upper end (%)")
            )
            headings += [heading, *names]
            ends = list(zip(*map(cells, values), strict=True))
        else:
            headings.append(heading)
            ends = [tuple(values)]
        shown += [_times(scale, column) for column in ends]
    return Table(headings, list(zip(*shown, strict=True)))


def held_against(edits: Sequence[Likeness | None]) -> dict[str, list[Any]]:
    """Columns of a table: how edits compare with their interchange; none where none is known."""
    columns = {
        "recovered (%)": "recovered",
        "same answer as the interchange (%)": "agreement",
        "KL from the interchange (nats)": "kl_to_interchange",
        "beyond its own patch": "beyond",
    }
    found = {title: [getattr(e, name, None) for e in edits] for title, name in columns.items()}
    return {title: column for title, column in found.items() if any(column)}


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by a key of each, in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _times(scale: int, column: Sequence[Any]) -> Sequence[Any]:
    return column if scale == 1 else [v if v is None else scale * v for v in column]


def joined(*words: str) -> str:
    """Those that are not empty, with commas between them."""
    return ", ".join(word for word in words if word)


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent, ``"95.4 %"``; a dash for none."""
    return "–" if share is None else f"{_minus(f'{100 * share:z.{digits}f}')}{NO_BREAK}%"


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
    """Which version of the task, as figures and sentences say it; nothing where there is one."""
    return {"plain": "without a prefix", "prefixed": "with a prefix"}.get(name, "")


def headed(name: str, words: str, mark: str = ": ") -> str:
    """Words about one version of the task, beginning with its name where it has one."""
    head = task_in_words(name)
    return capitalised(f"{head}{mark}{words}" if head else words)


def capitalised(words: str) -> str:
    """Words with a capital first letter; ``str.capitalize`` would turn S1 into s1."""
    return words[:1].upper() + words[1:]


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``"1 head"``, ``"3 heads"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _minus(number: str) -> str:
    return number.replace("-", "−")
