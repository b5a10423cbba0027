"""From text to tokens: which names are one token, and which token each name became."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrqp_torch.errors import TokenizerError, warn
from lrqp_torch.ioi.prompts import Prompt
from lrqp_torch.stream.text import encode, require_fast, token_at

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

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
    encoding: "BatchEncoding", row: int, prompt: Prompt, ids: dict[str, int]
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
