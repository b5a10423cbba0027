"""Prompts of the task: which are drawn, and which token each name and the end became."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING

from lrqp_torch.errors import PromptError, TokenizerError, warn
from lrqp_torch.ioi.words import ABBA_TEMPLATES, BABA_TEMPLATES, OBJECTS, PLACES
from lrqp_torch.stream.text import encode, require_fast, token_at

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

NAME_FIELDS = ("S", "IO")


@dataclass(frozen=True)
class DrawnPrompt:
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


def draw(
    n: int, names: Sequence[str], prefixes: Sequence[str], rng: random.Random
) -> list[DrawnPrompt]:
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
                DrawnPrompt(text, prefixes[prefix], template, abb, names[io], names[s], starts)
            )
    rng.shuffle(prompts)
    return prompts


LEAST_NAMES = 10
CARRIER = "to"
"""The word every prompt ends with: the answer is the token that follows it."""


def single_token_names(
    tokenizer: "PreTrainedTokenizerBase", names: Sequence[str]
) -> dict[str, int]:
    """Token id of each name that is one token behind a space; the others are left out.

    A name is looked at in context (behind the word that ends every prompt), because tokenizers
    differ in what they do with a space at the beginning of a text. Left out are names that are
    split, unknown, or share their token with another name. One warning counts and lists them.

    Raises:
        TokenizerError: fewer than ten names remain, or the tokenizer gives no offsets.
    """
    require_fast(tokenizer)
    encoding = encode(tokenizer, [f"{CARRIER} {name}" for name in names])
    ids: dict[str, int] = {}
    for row, name in enumerate(names):
        first = token_at(encoding, row, len(CARRIER) + 1)
        last = token_at(encoding, row, len(CARRIER) + len(name))
        before = token_at(encoding, row, len(CARRIER) - 1)
        token_id = encoding["input_ids"][row][last]
        # A gap between the carrier and the name would be a token of its own for the space: the
        # model would then answer with that space, not with the name.
        if first == last == before + 1 and before >= 0 and token_id != tokenizer.unk_token_id:
            ids[name] = token_id
    counts = Counter(ids.values())
    ids = {name: token_id for name, token_id in ids.items() if counts[token_id] == 1}
    left_out = [name for name in names if name not in ids]
    if len(ids) < LEAST_NAMES:
        raise TokenizerError(
            f"only {len(ids)} of {len(names)} names are one token with a leading space under this "
            f"tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens), and the task needs "
            f"{LEAST_NAMES}: use a tokenizer with a larger vocabulary, or one trained on text with "
            f"these names"
        )
    if left_out:
        warn(
            UserWarning,
            f"{len(left_out)} of {len(names)} names are not one token with a leading space under "
            f"this tokenizer and are left out: {', '.join(left_out)}",
        )
    return ids


def locate(
    encoding: "BatchEncoding", row: int, prompt: DrawnPrompt, ids: dict[str, int]
) -> tuple[int, int, int, int]:
    """Tokens of a prompt's three names and of its last character, counted without padding.

    Returns:
        First name, second name, repeated name, end.

    Raises:
        TokenizerError: a name is not, in this prompt, the one token that it is on its own.
    """
    first_name, second_name = (
        (prompt.io_name, prompt.s_name) if prompt.abb else (prompt.s_name, prompt.io_name)
    )
    tokens = []
    for name, start in zip((first_name, second_name, prompt.s_name), prompt.starts, strict=True):
        token = token_at(encoding, row, start + len(name) - 1)
        if token < 0 or encoding["input_ids"][row][token] != ids[name]:
            raise TokenizerError(
                f"the name {name!r} at character {start} of {prompt.text!r} is not the token "
                f"{ids[name]} that it is behind {CARRIER!r}: this tokenizer splits names by their "
                f"context, and the task cannot be built with it"
            )
        tokens.append(token)
    end = token_at(encoding, row, len(prompt.text) - 1)
    if end <= tokens[2]:
        raise TokenizerError(
            f"no token of {prompt.text!r} holds its last character: this tokenizer's offsets are "
            f"not those of the text it was given, and positions cannot be found by them"
        )
    return tokens[0], tokens[1], tokens[2], end
