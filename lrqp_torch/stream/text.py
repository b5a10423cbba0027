"""Texts as a model sees them: padded tokens, the tokens that hold a character, rows of a set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrqp_torch.errors import (
    PositionError,
    SelectionError,
    TokenizerError,
    check_option,
    quoted,
)

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


class TextInputs(dict[str, Tensor]):
    """Texts as a model is given them, which still know where in a text each token comes from.

    Attributes:
        texts: as given.
        encoding: of the texts alone, without padding.
    """

    texts: Sequence[str]
    encoding: "BatchEncoding"

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase | None") -> Self:
        """The texts as a tokenizer reads them, padded on its side.

        Raises:
            TokenizerError: there is none, or it has no offsets.
        """
        if tokenizer is None:
            raise TokenizerError("texts need the model's tokenizer: pass tokenizer=...")
        require_fast(tokenizer)
        encoding = encode(tokenizer, texts)
        rows = [torch.tensor(ids, dtype=torch.long) for ids in encoding["input_ids"]]
        side: Any = tokenizer.padding_side
        inputs = cls(pad(rows, tokenizer, side))
        inputs.texts, inputs.encoding = list(texts), encoding
        return inputs

    def like(self, tensors: Mapping[str, Tensor]) -> Self:
        """Other tensors of the same texts."""
        made = type(self)(tensors)
        made.texts, made.encoding = self.texts, self.encoding
        return made

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self.like({name: tensor.to(device) for name, tensor in self.items()})


@dataclass(frozen=True)
class Span:
    """Positions that are a word's, found in each text: ``positions=lrqp.Span("Mary")``.

    In texts that are given as such it is looked for there. Of inputs that are tokens already, also
    in ``model.generate``, it is looked for in what the tokenizer makes of the tokens.

    Attributes:
        words: what to look for, or the characters (begin, end) that it covers: one for all texts,
            or a list of one a text.
        which: which of several occurrences: 0 the first, −1 the last.
        tokens: ``"last"`` or ``"first"``, one position a text, (B,); or ``"all"`` that hold a
            character of it, a mask (B, T).
        tokenizer: the model's own; not needed where texts are given.
    """

    words: str | tuple[int, int] | Sequence[str | tuple[int, int]]
    which: int = -1
    tokens: Literal["last", "first", "all"] = "last"
    tokenizer: "PreTrainedTokenizerBase | None" = None

    def __post_init__(self) -> None:
        check_option("tokens", self.tokens, ("last", "first", "all"))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The positions in what a model is given.

        Raises:
            PositionError: tokens without a tokenizer, a word that a text does not hold, or a number
                of words that is not that of the texts.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise PositionError("Span finds words among input_ids, and none were given")
        real = torch.ones_like(ids) if mask is None else mask
        found = torch.zeros(ids.shape, dtype=torch.bool)
        for row, shown in enumerate(real.bool().cpu()):
            columns = shown.nonzero().flatten()
            if isinstance(inputs, TextInputs):
                text = inputs.texts[row]
                offsets = inputs.encoding[row].offsets
            else:
                text, offsets = self._read_back(ids[row].cpu()[shown].tolist())
            begin, end = self._characters(row, len(ids), text)
            holds = torch.tensor([a < end and b > begin and a < b for a, b in offsets])
            if not bool(holds.any()):
                raise PositionError(
                    f"no token of text {row}, {quoted(text)}, holds its characters {begin} to {end}"
                )
            found[row, columns] = holds
        if self.tokens == "all":
            return found
        places = found.byte()
        return (
            places.argmax(1)
            if self.tokens == "first"
            else (ids.shape[1] - 1 - places.flip(1).argmax(1))
        )

    def _characters(self, row: int, n: int, text: str) -> tuple[int, int]:
        """Where in a text it begins and ends."""
        words: Any = self.words
        one = isinstance(words, str) or (
            isinstance(words, tuple) and len(words) == 2 and isinstance(words[0], int)
        )
        if not one and len(words) != n:
            raise PositionError(
                f"Span has {len(words)} words for {n} texts; give one, or one a text"
            )
        word = words if one else words[row]
        if not isinstance(word, str):
            return int(word[0]), int(word[1])
        begins = [i for i in range(len(text)) if word and text.startswith(word, i)]
        if not -len(begins) <= self.which < len(begins):
            found = f"contains {quoted(word)} only {len(begins)} times, not at which={self.which}"
            missing = f"does not contain {quoted(word)}"
            raise PositionError(f"text {row}, {quoted(text)}, {found if begins else missing}")
        return begins[self.which], begins[self.which] + len(word)

    def _read_back(self, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text of some tokens, and the characters of it that each stands for."""
        if self.tokenizer is None:
            raise PositionError(
                "Span finds a word in a text, and was given tokens: say which tokenizer reads "
                "them, Span(..., tokenizer=tokenizer), or give the texts and it"
            )
        read: Any = self.tokenizer
        ends = [0, *(len(read.decode(ids[: n + 1])) for n in range(len(ids)))]
        return read.decode(ids), list(pairwise(ends))


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


class Rows:
    """A dataclass of n rows: tensors, dictionaries of tensors, and texts, chosen together."""

    _texts: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold a text a row."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(getattr(self, self._texts[0]))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        """The chosen rows, with the same padding; see :func:`row_numbers`. One int gives one row.

        Raises:
            SelectionError: an index is out of range, or of a wrong shape or dtype.
        """
        rows = row_numbers(index, len(self))
        chosen = rows.tolist()
        texts = {name: tuple(getattr(self, name)[row] for row in chosen) for name in self._texts}
        return self._changed(lambda tensor: tensor[rows.to(tensor.device)], **texts)

    def __iter__(self) -> Iterator[Self]:
        """The rows one by one, each a set of length 1."""
        return (self[row] for row in range(len(self)))

    def to(self, device: torch.device | str) -> Self:
        """The same rows with their tensors on ``device``."""
        return self._changed(lambda tensor: tensor.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor], **others: Any) -> Self:
        def changed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: changed(item) for name, item in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        own = {item.name: changed(getattr(self, item.name)) for item in fields(self)}  # type: ignore[arg-type]
        return replace(self, **own | others)  # type: ignore[type-var]
