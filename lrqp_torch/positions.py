"""Token positions of a batch: one rule for all shapes, checked against what the model is given."""

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.errors import PositionError


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
            raise PositionError(f"positions must be a tensor, got {type(positions).__name__}")
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


@dataclass(frozen=True)
class ForwardCall:
    """What a forward pass was given.

    Attributes:
        batch: B.
        length: tokens in this call.
        past: tokens that the KV cache holds already.
        mask: attention mask over past and present tokens, (B, past + length), or None.
        continues: whether the call fills a KV cache, so that later calls may bring further tokens.
    """

    batch: int
    length: int
    past: int
    mask: Tensor | None
    continues: bool = False

    @classmethod
    def read(
        cls,
        trunk: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        absolute_positions: bool,
    ) -> "ForwardCall":
        """Read the arguments of a base model's forward, however they were passed."""
        given = inspect.signature(trunk.forward).bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            raise PositionError("the model was called without input_ids or inputs_embeds")
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        # Four-dimensional masks are the caller's own construction and say nothing of padding.
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
        return cls(tokens.shape[0], tokens.shape[1], past, mask, continues)

    def check(self, positions: Positions) -> None:
        """Raise unless the positions fit this call.

        Raises:
            PositionError: another batch size, a position on padding, or one beyond the input. A
                call that fills a KV cache may be followed by the tokens that are still missing;
                positions that never come are found when the context closes.
        """
        if positions.batch != self.batch:
            raise PositionError(
                f"positions are for {positions.batch} examples, the model was given {self.batch}; "
                f"beam search and several returned sequences repeat each example, so repeat "
                f"positions and targets likewise (repeat_interleave)"
            )
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


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, (B, T), so that padding on either side is exact.

    position_ids = max(cumsum(mask) − 1, 0) along each row.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
