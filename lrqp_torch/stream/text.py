"""Texts as a model sees them: padded tokens, the tokens that hold a character, rows of a set."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrqp_torch.errors import SelectionError, TokenizerError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def require_fast(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot say which token a character belongs to.

    Raises:
        TokenizerError: ``tokenizer`` is not a fast transformers tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"{type(tokenizer).__name__} gives no character offsets, by which words are found "
            f"among the tokens: use a fast tokenizer (AutoTokenizer.from_pretrained(..., "
            f"use_fast=True)), or wrap a tokenizers.Tokenizer in PreTrainedTokenizerFast"
        )


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> "BatchEncoding":
    """Tokenise all texts at once, as the model would see them, without padding or truncation."""
    encoding: BatchEncoding = tokenizer(list(texts), padding=False, truncation=False, verbose=False)
    return encoding


def token_at(encoding: "BatchEncoding", row: int, character: int) -> int:
    """Index of the token that holds a character of text ``row``; -1 where no token does."""
    token = encoding.char_to_token(row, character)
    return -1 if token is None else token


def last_token_at(encoding: "BatchEncoding", row: int, character: int) -> int:
    """Index of the last token that holds a character, of which several may hold bytes; or -1."""
    token = token_at(encoding, row, character)
    while 0 <= token < len(encoding["input_ids"][row]) - 1:
        span = encoding.token_to_chars(row, token + 1)
        if span is None or not span.start <= character < span.end:
            break
        token += 1
    return token


def pad(
    rows: Sequence[Tensor], tokenizer: "PreTrainedTokenizerBase", side: Literal["right", "left"]
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``position_ids``, (n, T) each, of rows of token ids.

    The padding token is the tokenizer's if it has one, else its end-of-text token, else 0. Position
    ids count real tokens from 0, so that padding on the left gives the logits of padding on the
    right.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(token for token in candidates if token is not None)
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side=side)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def row_numbers(index: int | slice | Sequence[int] | Tensor, n: int) -> Tensor:
    """An index into ``n`` rows, as a LongTensor of row numbers from 0, on the CPU.

    Args:
        index: an int, a slice, a sequence of ints, an integer tensor () or (m,), or a BoolTensor
            (n,). Negative numbers count from the end.
        n: number of rows.

    Raises:
        SelectionError: an index is out of range, or of a wrong shape or dtype.
    """
    if isinstance(index, slice):
        return torch.tensor(range(n)[index], dtype=torch.long)
    if isinstance(index, Tensor):
        rows = index.detach().cpu()
    else:
        numbers = [index] if isinstance(index, int) else index
        if not isinstance(numbers, Sequence) or not all(
            isinstance(number, int) and not isinstance(number, bool) for number in numbers
        ):
            raise SelectionError(
                f"a data set cannot be indexed with {index!r}: use an int, a slice, a list of "
                f"ints, a LongTensor, or a BoolTensor (a list of bools is not a mask)"
            )
        rows = torch.tensor(list(numbers), dtype=torch.long)
    if rows.dtype == torch.bool:
        if rows.shape != (n,):
            raise SelectionError(
                f"a boolean mask of shape {tuple(rows.shape)} does not fit {n} prompts: it must "
                f"be of shape ({n},)"
            )
        return rows.nonzero().squeeze(1)
    if rows.is_floating_point() or rows.is_complex() or rows.dim() > 1:
        raise SelectionError(
            f"a data set cannot be indexed with a tensor of dtype {rows.dtype} and shape "
            f"{tuple(rows.shape)}: it must hold integers, or bools, in one dimension"
        )
    rows = rows.long().reshape(-1)
    outside = rows[(rows < -n) | (rows >= n)]
    if outside.numel():
        raise SelectionError(f"index {outside[0].item()} is out of range for {n} prompts")
    return rows.remainder(n) if n else rows
