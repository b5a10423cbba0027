"""Prompts of your own from a file: CSV, JSONL, or a data set of the Hugging Face Hub.

One prompt a row, with the columns

    text      the prompt, with the words to edit marked: ``The [[keys]] to the cabinet``
    label     the class that holds, such as ``plural``
    answers   optional; what the model may say if a class holds

Labels are names: spaces around them are dropped, and of numbers only whole ones are taken, so that
1 and 1.0, which a table with empty cells makes of it, are the one class ``1``. (CSV holds text
only; there ``1`` and ``1.0`` are two names.)

In JSONL ``answers`` is an object, ``{"plural": " are", "singular": [" is", " was"]}``; in CSV it is
a column for each class, ``answers.plural`` and ``answers.singular``, several answers separated by
``|``.
"""

import csv
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrqp_torch.errors import MissingExtraError, PromptError
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.study.prompts import CLOSING, OPENING, Prompt, unmark

ANSWERS = "answers"
SEPARATOR = "|"


def read_prompts(
    source: str | Path, *, label: str = "label", text: str = "text", position: str = "mark"
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: a file ending in ``.csv``, ``.jsonl`` or ``.json`` (one object a line), or a data
            set of the Hub as ``name`` or ``name:split`` (extra ``datasets``).
        label: column of the class.
        text: column of the prompt.
        position: ``"mark"`` for the words between [[ and ]], which every prompt must then have;
            ``"last"`` for the last token of each prompt; or the name of a column that holds words
            of the prompt, found once in it as whole words.

    Raises:
        PromptError: nothing there, a file that is not UTF-8, a column named twice, a row that lacks
            a column or holds no text or no label in it, or a position that is not found once.
        MissingExtraError: a data set without the package ``datasets``.
    """
    rows = list(_rows(str(source)))
    if not rows:
        raise PromptError(f"{str(source)!r} holds no prompts")
    return [_prompt(number, row, label, text, position) for number, row in enumerate(rows)]


def _rows(source: str) -> Iterator[Mapping[str, Any]]:
    path = Path(source)
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path)
    elif path.suffix.lower() in (".jsonl", ".json"):
        yield from _json_rows(path)
    elif path.exists():
        raise PromptError(f"{source!r}: the file must end in .csv or .jsonl")
    else:
        yield from _dataset_rows(source)


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with _opened(path) as lines:
        reader = csv.DictReader(lines, strict=True)
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
                    raise PromptError(
                        f"line {reader.line_num} of {str(path)!r} does not have the "
                        f"{len(reader.fieldnames or ())} columns of the first"
                    )
                yield dict(row) | ({ANSWERS: answers} if answers else {})
        except csv.Error as error:
            raise PromptError(f"line {reader.line_num} of {str(path)!r}: {error}") from error


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PromptError(
                    f"line {number} of {str(path)!r} is not valid JSON ({error}); write one object "
                    f"a line"
                ) from error
            if not isinstance(row, dict):
                raise PromptError(f"line {number} of {str(path)!r} is no JSON object")
            yield row


def _dataset_rows(source: str) -> Iterator[Mapping[str, Any]]:
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
def _opened(path: Path) -> Iterator[Iterable[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise PromptError(f"{str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise PromptError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _prompt(number: int, row: Mapping[str, Any], label: str, text: str, position: str) -> Prompt:
    columns = [text, label] + ([position] if position not in ("mark", "last") else [])
    missing = [name for name in columns if row.get(name) is None or row[name] == ""]
    if missing:
        raise PromptError(
            f"prompt {number} has no {missing[0]!r}; its columns are {', '.join(map(str, row))}"
        )
    words = _words(number, text, row[text])
    if position == "mark" and OPENING not in words:
        raise PromptError(
            f"prompt {number}, {words!r}, marks no words with {OPENING} and {CLOSING}; mark them, "
            f"or choose another position: 'last', or a column that holds the words"
        )
    if position == "last":
        words, _ = unmark(number, words)
    elif position != "mark":
        words = _mark(number, words, _name(number, position, row[position]))
    return Prompt(words, _name(number, label, row[label]), _answers(number, row.get(ANSWERS)))


def _mark(number: int, words: str, wanted: str) -> str:
    # A letter or digit at an edge must not go on beyond it; looking ahead finds overlaps too.
    before, after = (r"\b" if re.match(r"\w", edge) else "" for edge in (wanted[0], wanted[-1]))
    found = [
        match.start() for match in re.finditer(f"{before}(?={re.escape(wanted)}{after})", words)
    ]
    if len(found) != 1:
        raise PromptError(
            f"prompt {number}: {wanted!r} occurs {len(found)} times in {words!r} as whole words, "
            f"not once; mark the words with {OPENING} and {CLOSING} instead"
        )
    start, end = found[0], found[0] + len(wanted)
    return f"{words[:start]}{OPENING}{wanted}{CLOSING}{words[end:]}"


def _words(number: int, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"prompt {number}: {column!r} must be text, got {value!r}")
    return value


def _name(number: int, column: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip() if isinstance(value, str | int) else ""
    if not name:
        raise PromptError(
            f"prompt {number}: {column!r} must be text or a whole number, got {value!r}"
        )
    return name


def _answers(number: int, raw: Any) -> dict[str, tuple[str, ...]] | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise PromptError(
            f"prompt {number}: answers must be an object from class to text, got {raw!r}"
        )
    names = Counter(str(name).strip() for name, value in raw.items() if value is not None)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise PromptError(f"prompt {number} has answers for {twice[0]!r} twice; give them once")
    return {
        str(name).strip(): _texts(number, value) for name, value in raw.items() if value is not None
    }


def _texts(number: int, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or not all(isinstance(item, str) for item in texts):
        raise PromptError(f"prompt {number}: an answer must be text, got {value!r}")
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
    Goldberg 2016 (arXiv 1611.01368), with words of our own.

    Raises:
        PromptError: n is not within what these words give.
    """
    answers = {"singular": (" is", " was", " has"), "plural": (" are", " were", " have")}
    choices = itertools.product(OPENINGS, SUBJECTS, PREPOSITIONS, ATTRACTORS, range(2), range(2))
    return _drawn(
        [
            Prompt(
                f"{opening} {subject[number]} {preposition} the "
                f"{OPENING}{attractor[other]}{CLOSING}",
                ("singular", "plural")[number],
                answers,
            )
            for opening, subject, preposition, attractor, number, other in choices
        ],
        n,
        seed,
    )


def greater_than(n: int, seed: int = 0) -> list[Prompt]:
    """Greater-than: whether the first year is early or late in its century, at the second.

        The war lasted from the year 1732 to the year 17 …

    A model that knows order puts the next digit above the first year's: an early one goes with the
    digits just above it, a late one with the digits above the late one's. For tokenizers that split
    numbers into digits. Source: Hanna, Liu and Variengien 2023 (arXiv 2305.00586), with words of
    our own.

    Raises:
        PromptError: n is not within what these words give.
    """
    years = [(tens, units) for tens in (1, 2, 3, 6, 7) for units in range(2, 9)]
    answers = {"early": ("2", "3", "4"), "late": ("7", "8", "9")}
    return _drawn(
        [
            Prompt(
                f"The {event} lasted from the year {century}{tens}{units} to the year "
                f"{OPENING}{century}{CLOSING}",
                "early" if tens < 5 else "late",
                answers,
            )
            for event, century, (tens, units) in itertools.product(EVENTS, CENTURIES, years)
        ],
        n,
        seed,
    )


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
