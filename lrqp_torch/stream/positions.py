"""Token positions: every way to say them, parsed once, and which of them a forward pass reaches."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, Union, cast

import torch
from torch import Tensor

from lrqp_torch.errors import PositionError, TargetError, as_classes, concrete
from lrqp_torch.stream.passes import ForwardCall

REGIONS = ("prompt", "generated", "all")
Region: TypeAlias = str | int | slice | Callable[[dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Scope:
    """Tokens of each text that are known by where they come from, also in ``model.generate``.

        with edit.at(model, "L6.mid", positions=lrqp.Scope("generated", repeats=4), target=1):
            model.generate(**inputs, num_beams=4)

    ``"prompt"`` are the real tokens of the prompt, without its padding. ``"generated"`` are the new
    tokens that the model reads back as input; the last one of a generation is never read.
    ``"all"`` is both. With a KV cache each token is edited once, in the call that reads it; without
    one, every call computes it anew from the same values, and edits it anew.

    ``"last"`` is the last real token of the prompt; an integer one of its columns, from its end if
    negative, and a slice several, none of them on padding; a function is given the prompt
    (``input_ids`` or ``inputs_embeds``, and ``attention_mask``) and returns its positions.

    A text begins with a call that has no past, and its prompt is as long as that call; a text is
    known by its cache, so that texts may take turns, as those of guidance do. Without a cache, a
    call of ``generate`` one token longer that begins with the tokens of the last one continues it.
    A prompt that is read in several calls (``prefill_chunk_size``, a cache that the caller has
    filled), assisted decoding, and decoding without a cache in a loop of one's own need
    ``prompt_length``: calls that cannot be told apart without it are refused. (Not seen to be such:
    a prompt that ends one token after its first chunk.)

    Tokens that the attention mask hides are left alone. ``generate`` shows the padding that it puts
    behind a sequence that has ended, so that is edited and recorded like text, without effect on
    any text. With beam search rows of one example change places, and records name the row of the
    batch that a token was in when it was edited.

    Args:
        region: ``"prompt"``, ``"generated"``, ``"all"`` or ``"last"``; an int, a slice or a
            function.
        repeats: rows of the batch for each request, as ``num_beams`` and ``num_return_sequences``
            make them: request i owns rows i·repeats to i·repeats + repeats − 1.
        prompt_length: columns of the prompt with its padding; default that of each first call.

    Raises:
        PositionError: another region, or a number below 1.
    """

    region: Region
    repeats: int = 1
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.region, int | slice) or callable(self.region)
        if isinstance(self.region, bool) or not (known or self.region in (*REGIONS, "last")):
            raise PositionError(
                f"scope must be one of {', '.join(map(repr, REGIONS))}, 'last', a number, a slice "
                f"or a function, got {str(self.region)[:200]!r}; positions of one's own are a "
                f"tensor"
            )
        for name in ("repeats", "prompt_length"):
            value = getattr(self, name)
            if name == "prompt_length" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PositionError(f"{name} of a scope must be an integer from 1, got {value!r}")

    @property
    def grows(self) -> bool:
        """Whether it has tokens in every call, and not only chosen ones of the prompt."""
        return self.region in REGIONS


Where: TypeAlias = Union[Tensor, Sequence[Any], Scope, Region, "Positions"]
"""LongTensor (B,) or (B, n), BoolTensor (B, T), or lists of these; a scope, or a scope's region."""


class Positions:
    """Positions as a flat list of (example, token) pairs: those given, or those found so far.

    Positions count columns of the padded input as given, from 0; with a KV cache they count
    from the beginning of the cached text. They do not count what an adapter puts in front.

    Args:
        table: example, token and text of each pair, LongTensor (N, 3).
        batch: B, or None where a scope finds the pairs.
        scope: what finds them.
        grid: shape of the positions as they were said: (B,), (B, n), or (B, T) for a mask.
        is_mask: whether they were said by a mask.
    """

    def __init__(
        self,
        table: Tensor,
        batch: int | None = None,
        scope: Scope | None = None,
        grid: tuple[int, ...] = (),
        is_mask: bool = False,
    ) -> None:
        self._table, self._count = table, len(table)
        self.batch, self.scope, self.grid, self.is_mask = batch, scope, grid, is_mask
        self.requests: int | None = None

    @classmethod
    def parse(cls, positions: Where) -> "Positions":
        """Read positions, in whatever way they are said.

        Raises:
            PositionError: another kind, dtype or shape, a negative position in a tensor, none at
                all, or one token twice in an example.
        """
        if isinstance(positions, cls):
            return positions
        if isinstance(positions, Scope):
            return cls(torch.zeros(0, 3, dtype=torch.long), scope=positions)
        if isinstance(positions, str | int | slice) or callable(positions):
            return cls.parse(Scope(positions))
        if not isinstance(positions, Tensor):
            try:
                positions = torch.as_tensor(positions)
            except (TypeError, ValueError, RuntimeError) as error:
                raise PositionError(
                    f"positions must be numbers (batch,) or (batch, n), a mask (batch, seq) or a "
                    f"scope, got {type(positions).__name__}: {str(positions)[:200]}"
                ) from error
        is_mask, grid = positions.dtype == torch.bool, tuple(positions.shape)
        if positions.dtype.is_floating_point or len(grid) not in ((2,) if is_mask else (1, 2)):
            raise PositionError(
                f"positions must be LongTensor (batch,), LongTensor (batch, n) or BoolTensor "
                f"(batch, seq), got {positions.dtype} {grid}"
            )
        if is_mask:
            example, token = positions.nonzero(as_tuple=True)
        else:
            table = positions.long().reshape(*grid, *[1] * (2 - len(grid)))
            _check_distinct(table)
            example, token = torch.ones_like(table).nonzero(as_tuple=True)[0], table.flatten()
        pairs = torch.stack([example, token, 0 * token], 1)
        result = cls(pairs, len(positions), grid=grid, is_mask=is_mask)
        if not len(result):
            raise PositionError("no positions: nothing would be edited or captured")
        if result.span[0] < 0:
            raise PositionError(
                f"position {result.span[0]} is negative: count from 0 at the start of the padded "
                f"input"
            )
        return result

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def span(self) -> tuple[int, int]:
        """Of known positions, the smallest column and the largest."""
        return int(self.token.min()), int(self.token.max())

    @property
    def example(self) -> Tensor:
        """Row of the batch of each pair, (N,)."""
        return self._table[: self._count, 0]

    @property
    def token(self) -> Tensor:
        """Column of each, (N,)."""
        return self._table[: self._count, 1]

    @property
    def generation(self) -> Tensor:
        """In a scope, which of the context's texts each is part of, from 0, (N,)."""
        return self._table[: self._count, 2]

    @property
    def request(self) -> Tensor:
        """The request that each belongs to, (N,); without a scope, the example."""
        return self.example if self.scope is None else self.example // self.scope.repeats

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of results that have one entry a pair: (B,), (B, n), or (N,)."""
        return self.grid if self.grid and not self.is_mask else (self._count,)

    def to(self, device: torch.device | str) -> "Positions":
        """The same positions on another device."""
        table = self._table[: self._count].to(device)
        return Positions(table, self.batch, self.scope, self.grid, self.is_mask)

    def clear(self) -> None:
        """Forget what a scope has found; called when a context opens."""
        if self.scope is not None:
            self._count = 0

    def add(self, example: Tensor, token: Tensor, text: int) -> Tensor:
        """Add pairs that a scope has found; their numbers. Takes constant time a pair."""
        begin, self._count = self._count, self._count + len(example)
        if self._count > len(self._table):
            room = self._table.new_zeros(max(2 * self._count, 64), 3)
            room[:begin] = self._table[:begin]
            self._table = room
        new = self._table[begin : self._count]
        new[:, 0], new[:, 1], new[:, 2] = example, token, text
        return torch.arange(begin, self._count)

    def classes(self, given: Any, name: str) -> Tensor:
        """A class for each pair, (N,), on the CPU; in a scope for each request, (B,), or (1,).

        Args:
            given: integers: one for all, (B,) one an example or request, or one a position.
            name: what they are, for messages.

        Raises:
            TargetError: another shape or dtype, or another number of requests than before.
        """
        classes: Tensor = as_classes(given, name).cpu()
        if classes.dtype.is_floating_point or classes.dtype == torch.bool:
            raise TargetError(f"{name} must hold integer classes, got {classes.dtype}; use .long()")
        if self.scope is not None:
            if classes.ndim > 1 or (classes.ndim and self.requests not in (None, len(classes))):
                known = "(B,)" if self.requests is None else f"({self.requests},)"
                raise TargetError(
                    f"{name} has shape {tuple(classes.shape)}; in the scope {self.scope.region!r} "
                    f"give one number, or {known} for one class a request"
                )
            self.requests = len(classes) if classes.ndim else self.requests
            return classes.reshape(-1)
        example, token = self.example.cpu(), self.token.cpu()
        if classes.ndim == 0:
            return classes.expand(len(example)).clone()
        if classes.shape == (self.batch,):
            return classes[example]
        if classes.shape == self.grid:
            return classes[example, token] if self.is_mask else classes.flatten()
        raise TargetError(
            f"{name} has shape {tuple(classes.shape)}; give one number, ({self.batch},) for one "
            f"class an example, or {self.grid} for one a position"
        )

    def among(self, batch: int, length: int, given: Mapping[str, Any]) -> "Positions":
        """These positions in inputs that are there as a whole, (batch, length).

        Raises:
            PositionError: they do not fit the inputs, or are new tokens.
        """
        if self.scope is None:
            return self
        mask = given.get("attention_mask")
        real = mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return chosen(self.scope.region, batch, length, real, lambda: given)


def _check_distinct(table: Tensor) -> None:
    """Raise :class:`PositionError` if a row of tokens, (B, n), names one twice."""
    if table.shape[1] < 2:
        return
    ordered = table.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if bool(twice.any()):
        row = int(twice.nonzero()[0])
        raise PositionError(
            f"example {row} names one token twice: {table[row].tolist()[:8]}; a mask of positions "
            f"must be boolean (.bool())"
        )


def chosen(
    region: Region,
    batch: int,
    length: int,
    real: Tensor | None,
    given: Callable[[], Mapping[str, Any]],
) -> Positions:
    """The positions of a region in prompts of ``length`` columns, of which ``real`` are text."""
    if isinstance(region, int):
        column = region + length if region < 0 else region
        if column < 0:
            raise PositionError(f"position {region} is out of range: the input has {length} tokens")
        return Positions.parse(torch.full((batch,), column))
    if isinstance(region, slice):
        return Positions.parse(torch.arange(length)[region].expand(batch, -1))
    shown = torch.ones(batch, length, dtype=torch.bool) if real is None else real.cpu()
    if region == "last":
        return Positions.parse(length - 1 - shown.flip(1).byte().argmax(1))
    if region == "generated":
        raise PositionError("'generated' is for model.generate: here nothing is generated")
    if isinstance(region, str):
        return Positions.parse(shown)
    found = Positions.parse(region({**given(), "attention_mask": shown.long()}))
    return found if found.scope is None else chosen(found.scope.region, batch, length, real, given)


def reached(positions: Positions, call: ForwardCall) -> tuple[Tensor | slice, Tensor, Tensor]:
    """Which of known pairs a call reads, and their examples and tokens."""
    (first, last), example, token = positions.span, positions.example, positions.token
    if call.past <= first and last < call.end:
        return slice(None), example, token
    if call.past > last or call.end <= first:
        return slice(0), example[:0], token[:0]
    index = ((token >= call.past) & (token < call.end)).nonzero().squeeze(-1)
    return index, example[index], token[index]


def check_fit(positions: Positions, call: ForwardCall) -> None:
    """Raise :class:`PositionError` unless known positions fit a call; see :meth:`Follower.see`."""
    if positions.batch != call.batch:
        raise PositionError(wrong_batch("positions", cast(int, positions.batch), 1, call.batch))
    if not call.continues and positions.span[1] >= call.end:
        worst = int((positions.token >= call.end).nonzero()[0])
        raise PositionError(
            f"position {int(positions.token[worst])} of example {int(positions.example[worst])} is "
            f"out of range: the input has {call.end} tokens"
        )
    _, example, token = reached(positions, call)
    if call.mask is None or not len(token) or not concrete(call.mask):
        return
    mask = call.mask.to(token.device)
    if mask.shape[1] < call.end:
        example, token = (part[token < mask.shape[1]] for part in (example, token))
    shown = mask[example, token] != 0
    if not bool(shown.all()):
        where = (~shown).nonzero().flatten()
        pairs = [(int(example[i]), int(token[i])) for i in where[:5]]
        raise PositionError(
            f"{len(where)} positions lie on padding, the first (example, token) are {pairs}; "
            f"count positions on the padded input"
        )


def wrong_batch(what: str, examples: int, repeats: int, given: int) -> str:
    """What to say when positions or targets are for another batch than the model was given."""
    each = f" with repeats={repeats}" if repeats > 1 else ""
    return (
        f"{what} are for {examples} examples{each}, the model was given {given}; beam search and "
        f"several returned sequences repeat each example, and choices of an example are rows of "
        f"their own, so repeat positions and targets likewise (repeat_interleave), or give a scope "
        f"repeats=k for k rows an example"
    )


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, (B, T), so that padding on either side is exact.

    position_ids = max(cumsum(mask) − 1, 0) along each row.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
