"""Token positions of a batch: one rule for all shapes, checked against what the model is given."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lrqp_torch.errors import PositionError
from lrqp_torch.stream.inputs import arguments_of, cache_among

_HIDDEN = -1e4
"""Additive attention masks hide with numbers below this."""


class LeftPaddingWarning(UserWarning):
    """A left-padded batch without ``position_ids`` on a model with learned positions."""


@dataclass(frozen=True)
class Positions:
    """Token positions of a batch as a flat list of (example, token) pairs.

    Positions count columns of the padded input as given, from 0; with a KV cache they count
    from the beginning of the cached text.

    Attributes:
        example: row of the batch of each pair, (N,).
        token: column of each pair, (N,).
        slot: which of an example's positions the pair is, (N,); for a mask, the column.
        shape: shape of results that have one entry a pair: (B,), (B, n), or (N,) for a mask.
        batch: B.
    """

    example: Tensor
    token: Tensor
    slot: Tensor
    shape: tuple[int, ...]
    batch: int

    @classmethod
    def parse(cls, positions: Tensor) -> "Positions":
        """Read ``LongTensor (B,)``, ``LongTensor (B, n)`` or ``BoolTensor (B, T)``.

        Raises:
            PositionError: another dtype or shape, a negative position, none at all, or one token
                twice in an example.
        """
        if not isinstance(positions, Tensor):
            raise PositionError(
                f"positions must be a tensor, got {type(positions).__name__}; scopes such as "
                f"'generated' are for edits without anything that is given by position"
            )
        if positions.dtype == torch.bool and positions.ndim == 2:
            example, token = positions.nonzero(as_tuple=True)
            result = cls(example, token, token, (len(example),), len(positions))
        elif positions.dtype == torch.bool or positions.dtype.is_floating_point:
            raise PositionError(
                f"positions must be LongTensor (batch,), LongTensor (batch, n) or BoolTensor "
                f"(batch, seq), got {positions.dtype} {tuple(positions.shape)}"
            )
        elif positions.ndim in (1, 2):
            table = (positions if positions.ndim == 2 else positions.unsqueeze(-1)).long()
            rows, slots = torch.meshgrid(
                torch.arange(table.shape[0], device=table.device),
                torch.arange(table.shape[1], device=table.device),
                indexing="ij",
            )
            result = cls(
                rows.flatten(), table.flatten(), slots.flatten(), tuple(positions.shape), len(table)
            )
            ordered = table.sort(-1).values
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                row = int((ordered[:, 1:] == ordered[:, :-1]).any(-1).nonzero()[0])
                raise PositionError(
                    f"example {row} names one token twice: {table[row].tolist()[:8]}; a mask of "
                    f"positions must be boolean (.bool())"
                )
        else:
            raise PositionError(
                f"positions must have shape (batch,), (batch, n) or (batch, seq), got "
                f"{tuple(positions.shape)}"
            )
        if len(result.token) == 0:
            raise PositionError("no positions: nothing would be edited or captured")
        if int(result.token.min()) < 0:
            raise PositionError(
                f"position {int(result.token.min())} is negative: count from 0 at the start of the "
                f"padded input"
            )
        return result

    def to(self, device: torch.device) -> "Positions":
        """The same positions on another device."""
        example, token, slot = (t.to(device) for t in (self.example, self.token, self.slot))
        return Positions(example, token, slot, self.shape, self.batch)


class Follows(Protocol):
    """Positions that depend on the calls themselves."""

    def see(self, call: "ForwardCall") -> None:
        """Take notice of a forward pass that is about to run, or refuse it."""


@dataclass(frozen=True)
class ForwardCall:
    """What a forward pass was given.

    Attributes:
        batch: B.
        length: tokens in this call.
        past: tokens that the KV cache holds already.
        mask: attention mask over past and present tokens, (B, past + length), or None.
        continues: whether the call fills a KV cache, so that later calls may bring further tokens.
        tokens: the tokens, (B, length), or their embeddings.
        square: a four-dimensional attention mask, as calls with a static cache have it, or None.
    """

    batch: int
    length: int
    past: int
    mask: Tensor | None
    continues: bool = False
    tokens: Tensor | None = None
    square: Tensor | None = None

    @classmethod
    def read(
        cls,
        trunk: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        absolute_positions: bool,
    ) -> "ForwardCall":
        """Read the arguments of a base model's forward, however they were passed."""
        given = arguments_of(trunk, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            raise PositionError("the model was called without input_ids or inputs_embeds")
        cache, mask = cache_among(given), given.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        # Models with several kinds of attention take a mask for each.
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        square = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
        # Four-dimensional masks may be the caller's own, and need say nothing of padding.
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        unaware = absolute_positions and given.get("position_ids") is None
        if mask is not None and unaware and bool((mask[:, 0] == 0).any()):
            warnings.warn(
                "left-padded batch without position_ids: this model counts the padding as text. "
                "Pass position_ids=lrqp_torch.position_ids(attention_mask), or pad on the right",
                LeftPaddingWarning,
                stacklevel=2,
            )
        continues = cache is not None or given.get("use_cache") is True
        return cls(tokens.shape[0], tokens.shape[1], past, mask, continues, tokens, square)

    def real(self) -> Tensor | None:
        """Which tokens of this call are text and not padding, (B, length) bool; None if all are.

        In a four-dimensional mask, padding is what does not see itself.

        Raises:
            PositionError: a mask that does not reach to the end of this call.
        """
        end = self.past + self.length
        given = self.mask if self.square is None else self.square
        if given is None:
            return None
        if given.shape[-1] < end:
            raise PositionError(
                f"the attention mask has {given.shape[-1]} columns, the text {end}, so it does not "
                f"say what is padding: give the mask of past and present tokens, and do not use a "
                f"static cache with a sliding window in a scope"
            )
        if self.square is None:
            return given[:, self.past : end].bool()
        own = given[:, 0, :, self.past : end].diagonal(dim1=-2, dim2=-1)
        return (own if own.dtype == torch.bool else own > _HIDDEN).expand(self.batch, -1)

    def check(self, positions: "Positions | Follows") -> None:
        """Raise unless the positions fit this call.

        Raises:
            PositionError: another batch size, a position on padding, or one beyond the input. A
                call that fills a KV cache may be followed by the tokens that are still missing;
                positions that never come are found when the context closes.
        """
        if not isinstance(positions, Positions):
            positions.see(self)
            return
        if positions.batch != self.batch:
            raise PositionError(wrong_batch("positions", positions.batch, 1, self.batch))
        end = self.past + self.length
        beyond = positions.token >= end
        if not self.continues and bool(beyond.any()):
            worst = int(beyond.nonzero()[0])
            raise PositionError(
                f"position {int(positions.token[worst])} of example "
                f"{int(positions.example[worst])} is out of range: the input has {end} tokens"
            )
        if self.mask is None:
            return
        mask = self.mask.to(positions.token.device)
        column = positions.token.clamp_max(mask.shape[1] - 1)
        padded = (mask[positions.example, column] == 0) & (positions.token == column)
        if bool(padded.any()):
            where = padded.nonzero().flatten()
            pairs = [(int(positions.example[i]), int(positions.token[i])) for i in where[:5]]
            raise PositionError(
                f"{len(where)} positions lie on padding, the first (example, token) are {pairs}; "
                f"count positions on the padded input"
            )


def wrong_batch(what: str, examples: int, repeats: int, given: int) -> str:
    """What to say when positions or targets are for another batch than the model was given."""
    each = f" with repeats={repeats}" if repeats > 1 else ""
    return (
        f"{what} are for {examples} examples{each}, the model was given {given}; beam search and "
        f"several returned sequences repeat each example, so repeat positions and targets likewise "
        f"(repeat_interleave), or give a scope repeats=k for k rows an example"
    )


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, (B, T), so that padding on either side is exact.

    position_ids = max(cumsum(mask) − 1, 0) along each row.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
