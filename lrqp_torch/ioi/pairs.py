"""Minimal pairs: the same prompt with the two names of its first clause in the other order."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrqp_torch.errors import PromptError, TokenizerError
from lrqp_torch.ioi.dataset import IOIDataset
from lrqp_torch.stream.text import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def swap_order(data: IOIDataset, tokenizer: "PreTrainedTokenizerBase | None" = None) -> IOIDataset:
    """Each prompt's minimal pair: "Mary and John …, John …" becomes "John and Mary …, John …".

    The names of the first clause change places, and nothing else changes: names, their roles S and
    IO, template, prefix, length, padding, and the positions of S2 and END. So two prompts of a pair
    differ in the order alone, and swapping twice gives the data back.

    Every name is one token behind a space, so the swap is one of two token ids.

    Args:
        data: prompts.
        tokenizer: if given, the swapped texts are tokenised and compared with the swapped ids.

    Raises:
        PromptError: a prompt whose tokens or text do not hold the two names where they should be.
        TokenizerError: the tokenizer makes other tokens of a swapped text.
    """
    rows = torch.arange(len(data), device=data.io_tokens.device)
    first, second = data.positions["first"], data.positions["second"]
    ids = data.inputs["input_ids"].clone()
    io_first = data.labels["abb"] == 1
    names = torch.stack([data.io_tokens, data.s_tokens])
    held = torch.stack([ids[rows, first], ids[rows, second]])
    astray = (held != torch.where(io_first, names, names.flip(0))).any(0)
    if bool(astray.any()):
        row = int(astray.nonzero()[0])
        raise PromptError(
            f"prompt {row}, {data.prompts[row]!r}, does not hold its two names at the positions "
            f"'first' and 'second': the order can only be swapped in prompts of this task"
        )
    ids[rows, first], ids[rows, second] = held[1], held[0]
    s1 = data.positions["IO"]
    swapped = replace(
        data,
        inputs=data.inputs | {"input_ids": ids},
        positions=data.positions | {"IO": data.positions["S1"], "S1": s1, "S1+1": s1 + 1},
        labels=data.labels | {"abb": 1 - data.labels["abb"]},
        prompts=_swapped_texts(data),
    )
    if tokenizer is not None:
        _check_tokens(swapped, tokenizer)
    return swapped


def _swapped_texts(data: IOIDataset) -> tuple[str, ...]:
    texts = []
    for row, (text, prefix) in enumerate(zip(data.prompts, data.prefixes, strict=True)):
        names = (data.io_names[row], data.s_names[row])
        before, after = names if int(data.labels["abb"][row]) else names[::-1]
        clause = text[len(prefix) :]
        if clause.count(f"{before} and {after}") != 1:
            raise PromptError(
                f"prompt {row}, {text!r}, does not hold '{before} and {after}' once: the order can "
                f"only be swapped in prompts of this task"
            )
        texts.append(prefix + clause.replace(f"{before} and {after}", f"{after} and {before}"))
    return tuple(texts)


def _check_tokens(data: IOIDataset, tokenizer: "PreTrainedTokenizerBase") -> None:
    made: Sequence[Sequence[int]] = encode(tokenizer, data.prompts)["input_ids"]
    for row, tokens in enumerate(made):
        mask: Tensor = data.inputs["attention_mask"][row].bool()
        wanted = data.inputs["input_ids"][row][mask].tolist()
        # A special token behind the text is cut off in the data, too.
        if list(tokens[: len(wanted)]) != wanted:
            raise TokenizerError(
                f"this tokenizer makes other tokens of {data.prompts[row]!r} than of the same "
                f"prompt in the other order with two ids swapped, so the two are no minimal pair"
            )
