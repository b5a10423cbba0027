"""Prompts as text: which are drawn, and where in the text each name stands."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from lrqp_torch.errors import PromptError
from lrqp_torch.ioi.templates import ABBA_TEMPLATES, BABA_TEMPLATES, OBJECTS, PLACES

NAME_FIELDS = ("S", "IO")


@dataclass(frozen=True)
class Prompt:
    """One prompt, with the character at which each name begins.

    ``starts`` holds three numbers: the first and the second name of the first clause, and the
    name that the second clause repeats.
    """

    text: str
    prefix: str
    template: int
    abb: bool
    io_name: str
    s_name: str
    starts: tuple[int, int, int]


def parse(template: str) -> tuple[tuple[str, str | None], ...]:
    """Split a template into pairs of literal text and the field that follows it (or None)."""
    return tuple((literal, field) for literal, field, _, _ in Formatter().parse(template))


def render(
    pieces: Sequence[tuple[str, str | None]], values: dict[str, str], prefix: str
) -> tuple[str, tuple[int, int, int]]:
    """Fill in a parsed template behind a prefix, and note where its three names begin."""
    text = f"{prefix} " if prefix else ""
    starts = []
    for literal, field in pieces:
        text += literal
        if field in NAME_FIELDS:
            starts.append(len(text))
        if field is not None:
            text += values[field]
    first, second, repeated = starts
    return text, (first, second, repeated)


def draw(n: int, names: Sequence[str], prefixes: Sequence[str], rng: random.Random) -> list[Prompt]:
    """Draw ``n`` distinct prompts, half of them ABBA within one, in random order.

    Every combination of prefix, template, names, place and object has a number, and numbers are
    drawn without replacement: prompts are uniform, and distinct without trying again.

    Raises:
        PromptError: there are fewer than ``n`` distinct prompts.
    """
    pairs = len(names) * (len(names) - 1)
    sizes = (len(OBJECTS), len(PLACES), pairs, len(BABA_TEMPLATES), len(prefixes))
    capacity = 1
    for size in sizes:
        capacity *= size
    n_abba = n // 2 + (rng.randrange(2) if n % 2 else 0)
    if max(n_abba, n - n_abba) > capacity:
        raise PromptError(
            f"{n} distinct prompts were asked for, but {len(names)} names, {len(prefixes)} "
            f"prefixes and the templates make only {2 * capacity}: ask for fewer, or give more "
            f"prefixes"
        )
    parsed = {
        True: [parse(template) for template in ABBA_TEMPLATES],
        False: [parse(template) for template in BABA_TEMPLATES],
    }
    prompts = []
    for abb, count in ((True, n_abba), (False, n - n_abba)):
        for number in rng.sample(range(capacity), count):
            digits = []
            for size in sizes:
                number, digit = divmod(number, size)
                digits.append(digit)
            thing, place, pair, template, prefix = digits
            io, s = divmod(pair, len(names) - 1)
            s += s >= io
            values = {
                "IO": names[io],
                "S": names[s],
                "PLACE": PLACES[place],
                "OBJECT": OBJECTS[thing],
            }
            text, starts = render(parsed[abb][template], values, prefixes[prefix])
            prompts.append(
                Prompt(text, prefixes[prefix], template, abb, names[io], names[s], starts)
            )
    rng.shuffle(prompts)
    return prompts
