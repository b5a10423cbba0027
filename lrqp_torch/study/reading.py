"""Prompts of your own from a file: CSV, TSV, JSON, JSONL, or a data set of the Hugging Face Hub.

One prompt a row, with the columns

    text      the prompt, with the words to edit marked: ``The [[keys]] to the cabinet``
    label     the class that holds, such as ``plural``
    answers   optional; what the model may say if a class holds

and, where they are named, a column of the group (an entity, a template), of the pair (twins), and
of the class to write (by default the next one for which the row has answers).

Labels are names: spaces around them are dropped, and of numbers only whole ones are taken, so that
1 and 1.0, which a table with empty cells makes of it, are the one class ``1``. (CSV holds text
only; there ``1`` and ``1.0`` are two names.)

In JSON ``answers`` is an object, ``{"plural": " are", "singular": [" is", " was"]}``; in CSV it is
a column for each class, ``answers.plural`` and ``answers.singular``, several answers separated by
``|``. A row needs answers for its own class and one other, and they may differ from row to row.

Rows of published pairs are understood as they are: those of CausalGym (``base``, ``src``,
``base_type``, ``src_type``, ``base_label``, ``src_label``) and of BLiMP (``sentence_good``,
``sentence_bad``).
"""

import csv
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lrqp_torch.errors import MissingExtraError, PromptError, RowError, quoted
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.study.prompts import (
    CLOSING,
    OPENING,
    Prompt,
    first_marked,
    front_token,
    screened,
    unmark,
)
from lrqp_torch.study.published import is_published, unfolded
from lrqp_torch.study.settings import listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TABLES, LINES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
"""How the names of files end that hold a table, and JSON."""

ANSWERS = "answers"
SEPARATOR = "|"
AUTO, MARK, SPAN, LAST = "auto", "mark", "span", "last"
"""Positions that are no column; see :class:`Columns`."""

FRONTS = ("auto", "always", "never")
"""Whether the token that begins a text is put in front of each prompt; see :func:`front`."""

LEAST_OF_CLASS = 8
"""Prompts of a class, so that four are held out; classes with fewer are left out where two or more
have as many."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file say what."""

    label: str = "label"  # the class
    text: str = "text"  # the prompt
    # ``"mark"`` for the last token of the words between [[ and ]], which every prompt must then
    # have, of each where there are several; ``"span"`` for all of their tokens; ``"last"`` for the
    # last token of each prompt; ``"auto"`` for ``"mark"`` where any row has marks and ``"last"``
    # where none has; or the name of a column that holds words of the prompt, found once in it as
    # whole words.
    position: str = AUTO
    group: str | None = None  # the group, such as an entity or a template; None for none
    pair: str = "pair"  # if it is there: rows of one pair are each other's twins
    target: str = "target"  # the class to write, if it is there
    further: tuple[str, ...] = ()  # other variables than the class


@dataclass
class RowLog:
    """What became of the rows of a file."""

    strict: bool = False  # whether a row that cannot be used is an error
    # How many rows were left out, by reason.
    left_out: Counter[str] = field(default_factory=Counter)
    # Message about the first of them, by reason.
    first: dict[str, str] = field(default_factory=dict)
    # What else a reader of the results should know, a sentence each.
    notes: list[str] = field(default_factory=list)

    def refuse(self, error: RowError) -> None:
        """Count a row that cannot be used. Raises RowError: the same, where the log is strict."""
        if self.strict:
            raise error
        self.left_out[error.reason] += 1
        self.first.setdefault(error.reason, str(error))

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def says(self) -> list[str]:
        """A line for each reason, then the notes."""
        return [
            f"{count} {'row was' if count == 1 else 'rows were'} left out: {reason} "
            f"({self.first[reason]})."
            for reason, count in self.left_out.most_common()
        ] + self.notes

    def why_nothing(self, source: str) -> PromptError:
        """The error where no row is left."""
        lines = [f"{self.first[reason]} ({n} rows like it)" for reason, n in self.left_out.items()]
        return PromptError(f"{quoted(source)} holds no prompts" + "".join(f"; {x}" for x in lines))


def read_prompts(
    source: str | Path,
    *,
    label: str = "label",
    text: str = "text",
    position: str = AUTO,
    group: str | None = None,
    pair: str = "pair",
    log: RowLog | None = None,
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: a file ending in ``.csv`` or ``.tsv`` (columns apart by what the first line has: a
            comma, a semicolon, a tab), ``.jsonl``, ``.ndjson`` or ``.json`` (a list, alone or in
            an object, or one object a line), or a data set of the Hub as ``name`` or
            ``name:split`` (extra ``datasets``).
        label: see :class:`Columns`, as for ``text``, ``position``, ``group`` and ``pair``; or
            several with commas, the class first and then what the prompts' ``further`` variables
            are.
        log: what rows that cannot be used are counted in. By default the first one is an error, and
            answers are taken as they stand. With a log that is not strict, a text that ends in a
            space hands it to its answers, an answer that begins with a letter behind a text that
            ends in one gets the space that a word needs, a row that stands there twice counts
            once, and classes with fewer than :data:`LEAST_OF_CLASS` prompts are left out where at
            least two have as many.

    Raises:
        PromptError: nothing there, a file that is not UTF-8, a column named twice or that no row
            has, or no row that can be used.
        RowError: a row that lacks a column or holds no text or no label in it, or a position that
            is not found once; see ``log``.
        MissingExtraError: a data set without the package ``datasets``.
    """
    label, *further = label_columns(label)
    columns = Columns(label, text, position, group, pair, further=tuple(further))
    log = RowLog(strict=True) if log is None else log
    return prompts_of(rows_of(str(source)), columns, log, str(source))


def prompts_of(
    given: Iterable[Mapping[str, Any] | RowError], columns: Columns, log: RowLog, source: str
) -> list[Prompt]:
    """The prompts of rows, or of why there is none; see :func:`read_prompts`.

    ``source`` is where the rows are from, for messages.
    """
    rows: dict[int, Mapping[str, Any]] = {}
    for row in given:
        try:
            if isinstance(row, RowError):
                raise row
            several = unfolded(len(rows), row) if is_published(row) else (row,)
            for own in several:
                rows[len(rows) + sum(log.left_out.values())] = own
        except RowError as error:
            log.refuse(error)
    if not rows:
        raise log.why_nothing(source)
    found = _columns_of(rows.values(), columns)
    if (columns.position, found.position) == (AUTO, LAST):
        log.note(
            f"The file marks no words with {OPENING} and {CLOSING}, so each prompt is edited at "
            f"its last token."
        )
    prompts, seen = [], set[str]()
    for number, row in rows.items():
        try:
            prompt = _prompt(number, row, found)
            if not log.strict and repr(prompt) in seen:
                raise RowError(
                    f"prompt {number}, {prompt.text!r}, says what an earlier one does",
                    "a row that stands there twice",
                )
            seen.add(repr(prompt))
            prompts.append(prompt)
        except RowError as error:
            log.refuse(error)
    if not log.strict:
        prompts = _spaced(prompts, log)
        prompts = _usable(prompts, log)
    if not prompts:
        raise log.why_nothing(source)
    return prompts


def screen(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], log: RowLog
) -> list[Prompt]:
    """The prompts that are tokens of the model as a study needs them, and enough of a class.

    Raises:
        RowError: one that is not, where the log is strict.
        PromptError: none is left.
    """
    kept, before = list(prompts), -1
    while len(kept) != before:
        before, names = len(kept), sorted({prompt.label for prompt in kept})
        # Answers for a class that no row has say nothing about any of them.
        kept = encodable(tokenizer, kept if log.strict else answering(kept, names), names, log)
        kept = kept if log.strict else _usable(kept, log)
        if not kept:
            raise log.why_nothing("the data")
    return kept


def answering(prompts: Iterable[Prompt], names: Collection[str]) -> list[Prompt]:
    """The same prompts without answers for other classes than these."""

    def known(prompt: Prompt) -> Mapping[str, tuple[str, ...]] | None:
        own = prompt.answers
        return None if own is None else {name: own[name] for name in own if name in names}

    return [replace(prompt, answers=known(prompt)) for prompt in prompts]


def encodable(
    tokenizer: "PreTrainedTokenizerBase", prompts: list[Prompt], names: Sequence[str], log: RowLog
) -> list[Prompt]:
    """Those that are tokens of the model with these classes; the others go into the log."""
    errors = list(screened(tokenizer, prompts, names))
    for error in filter(None, errors):
        log.refuse(error)
    return [prompt for prompt, error in zip(prompts, errors, strict=True) if error is None]


def front(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], bos: str, log: RowLog
) -> bool | None:
    """Whether the token that begins a text goes in front of all prompts; None leaves it as it is.

    ``auto`` puts it there where prompts are edited at their first token: models keep an attention
    sink there, of a norm a hundred times that of other tokens, which no edit of a belief moves.
    """
    if bos != "auto":
        return bos == "always"
    first = first_marked(tokenizer, prompts)
    if not first or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None):
        return None
    token = tokenizer.convert_ids_to_tokens(front_token(tokenizer))
    log.note(
        f"{first} of {len(prompts)} prompts are edited at their first token, where models keep an "
        f"attention sink, so {token} was put in front of all of them; --bos never leaves it out."
    )
    return True


def _usable(prompts: Sequence[Prompt], log: RowLog) -> list[Prompt]:
    """Prompts that do not contradict others, of classes that have enough of them."""
    counts = Counter(prompt.label for prompt in prompts)
    enough = [name for name, count in counts.items() if count >= LEAST_OF_CLASS]
    few = {name for name in counts if name not in enough} if len(enough) > 1 else set()
    answered = sum(prompt.answers is not None for prompt in prompts)
    labels: dict[str, str] = {}
    kept = []
    for row, prompt in enumerate(prompts):
        try:
            if prompt.label in few:
                raise RowError(
                    f"class {prompt.label!r} has {counts[prompt.label]} prompts",
                    f"a class with fewer than {LEAST_OF_CLASS} prompts",
                )
            if prompt.answers is None and answered > len(prompts) / 2:
                raise RowError(
                    f"prompt {row} has no answers, and others have",
                    "no answers, where most rows have them",
                )
            if labels.setdefault(prompt.text, prompt.label) != prompt.label:
                raise RowError(
                    f"prompt {row}, {prompt.text!r}, is {prompt.label!r} here and "
                    f"{labels[prompt.text]!r} elsewhere",
                    "a text under two labels",
                )
        except RowError as error:
            log.refuse(error)
        else:
            kept.append(prompt)
    if 0 < answered <= len(prompts) / 2:
        log.note(
            f"{answered} of {len(prompts)} rows have answers; without them in most rows, none are "
            f"used."
        )
        kept = [replace(prompt, answers=None) for prompt in kept]
    return kept


def _spaced(prompts: Sequence[Prompt], log: RowLog) -> list[Prompt]:
    """Prompts whose texts do not end in a space, with answers that begin as words do."""
    found, moved, added = [], 0, 0
    for prompt in prompts:
        bare = prompt.text.rstrip(" ")
        ended, said = bare != prompt.text, prompt.answers
        if said is not None:
            spoken = bare.replace(OPENING, "").replace(CLOSING, "")
            said = {
                name: tuple(" " * _needs_space(spoken, own, ended) + own for own in texts)
                for name, texts in said.items()
            }
        added += not ended and said != prompt.answers
        moved += ended
        found.append(replace(prompt, text=bare, answers=said))
    if moved:
        log.note(f"{moved} texts end in a space, which was left to their answers.")
    if added:
        log.note(
            f"The answers of {added} prompts got the space that a word needs behind another; "
            f"--strict takes them as they stand."
        )
    return found


def _needs_space(text: str, answer: str, ended: bool) -> bool:
    if not answer or not text or answer[0].isspace():
        return False
    # Scripts that set no spaces between words lie above these.
    letters = text[-1].isalpha() and answer[0].isalpha() and ord(answer[0]) < 0x0E00
    return ended or letters


def _columns_of(rows: Collection[Mapping[str, Any]], asked: Columns) -> Columns:
    """The same columns, with the position that the file's marks mean.

    Raises:
        PromptError: a column that no row has.
    """
    names = dict.fromkeys(str(name) for row in rows for name in row)
    for what in ("text", "label", "group", "position"):
        wanted = getattr(asked, what)
        kind = what == "position" and wanted in (AUTO, MARK, SPAN, LAST)
        if wanted is not None and not kind and wanted not in names:
            raise PromptError(
                f"prompt 0 has no {wanted!r}; its columns are {', '.join(names)}. No other row has "
                f"it either: name the column of the {what} with --{what}"
            )
    marked = any(OPENING in str(row.get(asked.text)) for row in rows)
    if asked.position == AUTO:
        return replace(asked, position=MARK if marked else LAST)
    return asked


def rows_of(source: str) -> Iterator[Mapping[str, Any] | RowError]:
    """The rows of a file or data set, and errors in place of those that cannot be read.

    Raises:
        PromptError: nothing there, or a file that is not UTF-8.
        MissingExtraError: a data set without the package ``datasets``, or a .parquet file without
            ``pyarrow``, which comes with it.
    """
    path = Path(source)
    if path.suffix.lower() in TABLES:
        return _csv_rows(path)
    if path.suffix.lower() in LINES:
        return _json_rows(path)
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    if path.exists():
        raise PromptError(
            f"{source!r}: the file must end in {', '.join((*TABLES, *LINES))} or .parquet"
        )
    return _dataset_rows(source)


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any] | RowError]:
    with _opened(path) as lines:
        head = lines.readline()
        lines.seek(0)
        # What spreadsheets write where the comma is for decimals, or copy to the clipboard.
        apart = next((mark for mark in (",", "\t", ";") if mark in head), ",")
        apart = "\t" if path.suffix.lower() == ".tsv" else apart
        reader = csv.DictReader(lines, strict=True, delimiter=apart)
        try:
            times = Counter(name for name in reader.fieldnames or () if name)
            twice = [name for name, count in times.items() if count > 1]
            if twice:
                raise PromptError(
                    f"{str(path)!r} has two columns named {twice[0]!r}; remove or rename one"
                )
            for row in reader:
                answers = {
                    name.removeprefix(f"{ANSWERS}."): value.split(SEPARATOR)
                    for name, value in row.items()
                    if name is not None and name.startswith(f"{ANSWERS}.") and value
                }
                if None in row or None in row.values():
                    yield RowError(
                        f"line {reader.line_num} of {str(path)!r} does not have the "
                        f"{len(reader.fieldnames or ())} columns of the first",
                        "a line with other columns than the first",
                    )
                    continue
                yield dict(row) | ({ANSWERS: answers} if answers else {})
        except csv.Error as error:
            raise PromptError(f"line {reader.line_num} of {str(path)!r}: {error}") from error


def _json_rows(path: Path) -> Iterator[Mapping[str, Any] | RowError]:
    def checked(row: Any, place: str) -> Mapping[str, Any] | RowError:
        if isinstance(row, dict):
            return row
        return RowError(
            f"{place} of {str(path)!r} is no JSON object", "a line that is no JSON object"
        )

    with _opened(path) as file:
        lines: Iterable[str] = file
        if path.suffix.lower() == ".json":
            lines = list(file)
            with suppress(ValueError, TypeError, RecursionError):
                whole = json.loads("".join(lines))
                if not isinstance(whole, list):  # an object that holds one list of rows
                    parts = [part for part in dict(whole).values() if isinstance(part, list)]
                    (whole,) = [part for part in parts if part and isinstance(part[0], dict)]
                yield from (checked(row, f"entry {i}") for i, row in enumerate(whole))
                return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield RowError(
                    f"line {number} of {str(path)!r} is not valid JSON ({error}); write one object "
                    f"a line",
                    "a line that is not valid JSON",
                )
            else:
                yield checked(row, f"line {number}")


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any] | RowError]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            f"{str(path)!r} is a parquet file, and reading it needs the package pyarrow, which "
            f"comes with datasets: pip install 'lrqp_torch[datasets]'"
        ) from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of both
        raise PromptError(f"{str(path)!r} cannot be read as parquet: {error}") from error


def _dataset_rows(source: str) -> Iterator[Mapping[str, Any] | RowError]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            f"{source!r} is no file, and data sets of the Hub need the package datasets: "
            f"pip install 'lrqp_torch[datasets]'"
        ) from error
    name, _, split = source.partition(":")
    try:
        yield from load_dataset(name, split=split or "train")
    except Exception as error:
        # datasets raises errors of many libraries, for a name, a network or a split that is not.
        raise PromptError(
            f"{source!r} is no file, and cannot be loaded as a data set: {error}"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise PromptError(f"{str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise PromptError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _prompt(number: int, row: Mapping[str, Any], columns: Columns) -> Prompt:
    position = columns.position
    named = [] if position in (MARK, SPAN, LAST) else [position]
    for name in (columns.text, columns.label, columns.group, *columns.further, *named):
        if name is not None and (row.get(name) is None or row[name] == ""):
            raise RowError(
                f"prompt {number} has no {name!r}; its columns are {', '.join(map(str, row))}",
                f"no {name}",
            )
    words = _words(number, columns.text, row[columns.text])
    if position in (MARK, SPAN) and OPENING not in words:
        raise RowError(
            f"prompt {number}, {words!r}, marks no words with {OPENING} and {CLOSING}; mark them, "
            f"or choose another position: 'last', or a column that holds the words",
            "no marked words",
        )
    if position == LAST:
        words, _ = unmark(number, words)
    elif named:
        words = _mark(number, words, _name(number, position, row[position]))
    group, pair, target = (
        None if name is None or row.get(name) in (None, "") else _name(number, name, row[name])
        for name in (columns.group, columns.pair, columns.target)
    )
    return Prompt(
        words,
        _name(number, columns.label, row[columns.label]),
        _answers(number, row.get(ANSWERS)),
        pair,
        group,
        target,
        position == SPAN,
        {name: _name(number, name, row[name]) for name in columns.further},
    )


def label_columns(labels: str) -> list[str]:
    """The columns that an option names, the class first. Raises PromptError: none, or one twice."""
    names = listed(labels)
    if not names or len(set(names)) < len(names):
        raise PromptError(f"label is {labels!r}: name a column of the class, or several, each once")
    return names


def _mark(number: int, words: str, wanted: str) -> str:
    # A letter or digit at an edge must not go on beyond it; looking ahead finds overlaps too.
    before, after = (r"\b" if re.match(r"\w", edge) else "" for edge in (wanted[0], wanted[-1]))
    found = [
        match.start() for match in re.finditer(f"{before}(?={re.escape(wanted)}{after})", words)
    ]
    if len(found) != 1:
        raise RowError(
            f"prompt {number}: {wanted!r} occurs {len(found)} times in {words!r} as whole words, "
            f"not once; mark the words with {OPENING} and {CLOSING} instead",
            "words that are not found once in the text",
        )
    start, end = found[0], found[0] + len(wanted)
    return f"{words[:start]}{OPENING}{wanted}{CLOSING}{words[end:]}"


def _words(number: int, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(
            f"prompt {number}: {column!r} must be text, got {value!r}",
            f"a {column} that is no text",
        )
    return value


def _name(number: int, column: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):  # as JSON spells it, also where it is the name of an answer
        value = str(value).lower()
    name = str(value).strip() if isinstance(value, str | int) else ""
    if not name:
        raise RowError(
            f"prompt {number}: {column!r} must be text or a whole number, got {value!r}",
            f"a {column} that is neither text nor a whole number",
        )
    return name


def _answers(number: int, raw: Any) -> dict[str, tuple[str, ...]] | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise RowError(
            f"prompt {number}: answers must be an object from class to text (JSON), or in a CSV "
            f"file a column for each class, such as answers.plural, got {quoted(raw)}",
            "answers that are no object from class to text",
        )
    given = {name: value for name, value in raw.items() if value is not None and value != []}
    names = Counter(str(name).strip() for name in given)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise RowError(
            f"prompt {number} has answers for {twice[0]!r} twice; give them once",
            "answers for a class twice",
        )
    return {str(name).strip(): _texts(number, value) for name, value in given.items()}


def _texts(number: int, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or not all(isinstance(item, str) for item in texts):
        raise RowError(
            f"prompt {number}: an answer must be text, got {value!r}", "an answer that is no text"
        )
    return tuple(texts)


# ---- example tasks -----------------------------------------------------------------------------

SUBJECTS = (
    ("key", "keys"), ("letter", "letters"), ("picture", "pictures"), ("door", "doors"),
    ("book", "books"), ("map", "maps"), ("lamp", "lamps"), ("bridge", "bridges"),
    ("window", "windows"), ("song", "songs"), ("road", "roads"), ("gift", "gifts"),
    ("ticket", "tickets"), ("report", "reports"), ("chair", "chairs"), ("garden", "gardens"),
)  # fmt: skip
ATTRACTORS = (
    ("cabinet", "cabinets"), ("teacher", "teachers"), ("house", "houses"), ("river", "rivers"),
    ("school", "schools"), ("mountain", "mountains"), ("visitor", "visitors"), ("town", "towns"),
    ("farmer", "farmers"), ("painter", "painters"), ("tower", "towers"), ("neighbor", "neighbors"),
)  # fmt: skip
PREPOSITIONS = ("near", "behind", "beside", "from", "for", "above")
OPENINGS = ("The", "Today the", "As we know, the", "They say that the")
EVENTS = ("war", "voyage", "siege", "trade", "project", "exhibition", "reign", "dispute", "famine",
          "journey", "festival", "treaty")  # fmt: skip
CENTURIES = ("14", "15", "16", "17", "18")


def agreement(n: int, seed: int = 0) -> list[Prompt]:
    """Subject–verb agreement: the number of the subject, at the word before the verb.

        The keys near the cabinet …        plural, although the nearest noun is singular

    The noun in between has the other number in half of the prompts. Source: Linzen, Dupoux and
    Goldberg 2016 (arXiv 1611.01368), with words of our own. Raises PromptError: n is not within
    what these words give.
    """
    answers = {"singular": (" is", " was", " has"), "plural": (" are", " were", " have")}
    choices = itertools.product(OPENINGS, SUBJECTS, PREPOSITIONS, ATTRACTORS, range(2), range(2))
    prompts = [
        Prompt(f"{opening} {subject[k]} {preposition} the [[{noun[j]}]]", [*answers][k], answers)
        for opening, subject, preposition, noun, k, j in choices
    ]
    return _drawn(prompts, n, seed)


def greater_than(n: int, seed: int = 0) -> list[Prompt]:
    """Greater-than: whether the first year is early or late in its century, at the second.

        The war lasted from the year 1732 to the year 17 …

    A model that knows order puts the next digit above the first year's: an early one goes with the
    digits just above it, a late one with the digits above the late one's. For tokenizers that split
    numbers into digits. Source: Hanna, Liu and Variengien 2023 (arXiv 2305.00586), with words of
    our own. Raises PromptError: n is not within what these words give.
    """
    years = [(tens, units) for tens in (1, 2, 3, 6, 7) for units in range(2, 9)]
    answers = {"early": ("2", "3", "4"), "late": ("7", "8", "9")}
    prompts = [
        Prompt(
            f"The {event} lasted from the year {start}{tens}{units} to the year [[{start}]]",
            "early" if tens < 5 else "late",
            answers,
        )
        for event, start, (tens, units) in itertools.product(EVENTS, CENTURIES, years)
    ]
    return _drawn(prompts, n, seed)


EXAMPLES: dict[str, Callable[[int, int], list[Prompt]]] = {
    "agreement": agreement,
    "greater-than": greater_than,
}


def write_prompts(prompts: Sequence[Prompt], file: Path) -> Path:
    """Write prompts as JSONL, one object a line, as :func:`~.reading.read_prompts` reads them.

    Raises:
        OutputError: the file cannot be written.
    """
    prepare_folder(file.parent)
    with written_whole(file) as partial:
        lines = (
            {"text": prompt.text, "label": prompt.label}
            | ({} if prompt.answers is None else {"answers": prompt.answers})
            for prompt in prompts
        )
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _drawn(prompts: list[Prompt], n: int, seed: int) -> list[Prompt]:
    """``n`` prompts, as many of each class within one, in random order."""
    if not 2 <= n <= len(prompts):
        raise PromptError(f"n is {n}: ask for 2 to {len(prompts)} prompts")
    draws = random.Random(seed)
    draws.shuffle(prompts)
    labels = sorted({prompt.label for prompt in prompts})
    by_class = [[prompt for prompt in prompts if prompt.label == label] for label in labels]
    alternating = [prompt for group in itertools.zip_longest(*by_class) for prompt in group]
    chosen = [prompt for prompt in alternating if prompt is not None][:n]
    draws.shuffle(chosen)
    return chosen
