"""Two tasks besides indirect object identification, written here, in the form that files have."""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from lrqp_torch.errors import PromptError
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.study.prompts import CLOSING, OPENING, Prompt

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
