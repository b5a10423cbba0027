"""The IOI data set: prompts as tokens, with positions, labels and answers; its minimal pairs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lrqp_torch.errors import PromptError, TokenizerError
from lrqp_torch.ioi.prefixes import load_prefixes
from lrqp_torch.ioi.prompts import draw, locate, single_token_names
from lrqp_torch.ioi.words import NAMES
from lrqp_torch.stream.text import Rows, encode, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class IOIDataset(Rows):
    """Prompts of the indirect-object-identification task, n of them, padded to T tokens.

    A prompt names two people, repeats one of them (the subject S) and ends just before the other
    (the indirect object IO): "When Mary and John met at the park, John handed a book to".
    Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593).

    Attributes:
        inputs: ``input_ids``, ``attention_mask``, ``position_ids``, LongTensors (n, T), ready for
            ``model(**inputs)``. Position ids count real tokens from 0, so that padding on the left
            gives the same logits as padding on the right. Nothing follows the last token of a
            prompt: a special token that the tokenizer puts there is cut off.
        positions: index of a token on the padded input, LongTensors (n,): ``IO``, ``S1``, ``S1+1``
            (the token after S1), ``S2``, ``END`` (the last token, where the answer is read),
            ``first`` and ``second`` (the names of the first clause in order).
        labels: ``abb``, LongTensor (n,): 1 where IO comes before S1 (ABBA), 0 where S1 does (BABA).
        io_tokens: token id of the answer, LongTensor (n,).
        s_tokens: token id of the subject, LongTensor (n,).
        templates: index into ``BABA_TEMPLATES`` (or ``ABBA_TEMPLATES``), LongTensor (n,).
        prompts: the texts, prefix included.
        prefixes: the prefix of each prompt; empty strings without one.
        io_names: the answers as text, without the space.
        s_names: the subjects as text, without the space.
    """

    _texts = ("prompts", "prefixes", "io_names", "s_names")

    inputs: dict[str, Tensor]
    positions: dict[str, Tensor]
    labels: dict[str, Tensor]
    io_tokens: Tensor
    s_tokens: Tensor
    templates: Tensor
    prompts: tuple[str, ...]
    prefixes: tuple[str, ...]
    io_names: tuple[str, ...]
    s_names: tuple[str, ...]

    @classmethod
    def generate(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        n: int,
        seed: int = 0,
        prefixes: str | Path | Sequence[str] | None = None,
        *,
        names: int | None = None,
        padding_side: Literal["right", "left"] = "right",
    ) -> "IOIDataset":
        """Draw ``n`` distinct prompts, half of them ABBA within one.

        The same arguments give the same data, whatever the global random state. Names that are not
        one token with a leading space are left out with a warning.

        Args:
            tokenizer: a fast transformers tokenizer; it is not changed. Its padding token is used
                if it has one, else its end-of-text token, else 0.
            n: number of prompts.
            seed: of this data set's own random generator.
            prefixes: a sentence to put in front of each prompt, drawn from ``"bundled"`` (a list in
                the package), ``"openwebtext"`` (streamed), the path of a text file with one
                sentence a line, or a sequence of sentences; None for no prefix. Sentences that
                break the rule of :mod:`lrqp_torch.ioi.prefixes` are not used.
            names: how many different names the prompts have, drawn with the seed; default all.
            padding_side: where shorter prompts are padded.

        Raises:
            PromptError: ``n``, ``seed`` or ``padding_side`` is out of range, or there are fewer
                than ``n`` distinct prompts.
            TokenizerError: the tokenizer gives no offsets, or fewer than ten names are one token.
            PrefixError: the source of prefixes is missing, empty, or holds no usable sentence.
            MissingExtraError: ``"openwebtext"`` without the package ``datasets``.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise PromptError(f"n is {n!r}: it must be a whole number of prompts, at least 1")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise PromptError(f"seed is {seed!r}: it must be a whole number")
        if padding_side not in ("right", "left"):
            raise PromptError(f"padding_side is {padding_side!r}: it must be 'right' or 'left'")

        ids = single_token_names(tokenizer, NAMES)
        if names is not None:
            if isinstance(names, bool) or not isinstance(names, int) or not 2 <= names <= len(ids):
                raise PromptError(
                    f"names is {names!r}: prompts need 2 names or more, and this tokenizer has "
                    f"{len(ids)}"
                )
            chosen = set(random.Random(seed).sample(sorted(ids), names))
            ids = {name: token for name, token in ids.items() if name in chosen}
        sentences = ("",) if prefixes is None else load_prefixes(prefixes, tokenizer, n)
        prompts = draw(n, tuple(ids), sentences, random.Random(seed))
        encoding = encode(tokenizer, [prompt.text for prompt in prompts])
        found = torch.tensor(
            [locate(encoding, row, prompt, ids) for row, prompt in enumerate(prompts)]
        )
        abb = torch.tensor([int(prompt.abb) for prompt in prompts])
        inputs = pad(
            [
                torch.tensor(row[: end + 1])
                for row, end in zip(encoding["input_ids"], found[:, 3].tolist(), strict=True)
            ],
            tokenizer,
            padding_side,
        )
        if padding_side == "left":
            found = found + (inputs["input_ids"].shape[1] - 1 - found[:, 3:])
        first, second, repeated, end = found.unbind(1)
        s1 = torch.where(abb == 1, second, first)
        return cls(
            inputs=inputs,
            positions={
                "IO": torch.where(abb == 1, first, second),
                "S1": s1,
                "S1+1": s1 + 1,
                "S2": repeated,
                "END": end,
                "first": first,
                "second": second,
            },
            labels={"abb": abb},
            io_tokens=torch.tensor([ids[prompt.io_name] for prompt in prompts]),
            s_tokens=torch.tensor([ids[prompt.s_name] for prompt in prompts]),
            templates=torch.tensor([prompt.template for prompt in prompts]),
            prompts=tuple(prompt.text for prompt in prompts),
            prefixes=tuple(prompt.prefix for prompt in prompts),
            io_names=tuple(prompt.io_name for prompt in prompts),
            s_names=tuple(prompt.s_name for prompt in prompts),
        )

    def __repr__(self) -> str:
        """Size, device and an example: the tensors would fill pages."""
        example = f", e.g. {self.prompts[0]!r}" if self.prompts else ""
        shape = tuple(self.inputs["input_ids"].shape)
        return f"IOIDataset(n={len(self)}, inputs={shape}, on {self.io_tokens.device}{example})"


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


def swap_identity(data: IOIDataset) -> IOIDataset:
    """Exchange the people: "Mary and John …, John …" becomes "John and Mary …, Mary …".

    Each of the three names becomes the other one, so the subject is another person and everything
    else stays: the order of IO and S, template, prefix, length, padding and all positions. With
    :func:`swap_order` after it the names of the first clause stand where they did, and S2 alone is
    another token.

    Raises:
        PromptError: as :func:`swap_order`.
    """
    swapped = swap_order(data)
    rows = torch.arange(len(data), device=data.io_tokens.device)
    ids = swapped.inputs["input_ids"].clone()
    ids[rows, data.positions["S2"]] = data.io_tokens
    texts = []
    for text, other, s, io in zip(
        data.prompts, swapped.prompts, data.s_names, data.io_names, strict=True
    ):
        at = text.rindex(s)  # both texts are of one length, and differ in the first clause alone
        texts.append(other[:at] + io + other[at + len(s) :])
    return replace(
        data,
        inputs=data.inputs | {"input_ids": ids},
        io_tokens=data.s_tokens,
        s_tokens=data.io_tokens,
        prompts=tuple(texts),
        io_names=data.s_names,
        s_names=data.io_names,
    )


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
