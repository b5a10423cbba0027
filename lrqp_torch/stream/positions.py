"""Token positions: every way to say them, parsed once, and which of them a forward pass reaches."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, Union, cast

import torch
from torch import Tensor

from lrqp_torch.errors import PositionError, TargetError, as_classes, concrete, outside_transforms
from lrqp_torch.stream.passes import ForwardCall, Text

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
        table: example, token, slot and text of each pair, LongTensor (N, 4).
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
            return cls(torch.zeros(0, 4, dtype=torch.long), scope=positions)
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
        if positions.dtype == torch.bool and positions.ndim == 2:
            example, token = positions.nonzero(as_tuple=True)
            table = torch.stack([example, token, token, 0 * token], 1)
            grid = tuple(positions.shape)
            result = cls(table, len(positions), grid=grid, is_mask=True)
        elif positions.dtype == torch.bool or positions.dtype.is_floating_point:
            raise PositionError(
                f"positions must be LongTensor (batch,), LongTensor (batch, n) or BoolTensor "
                f"(batch, seq), got {positions.dtype} {tuple(positions.shape)}"
            )
        elif positions.ndim in (1, 2):
            result = cls._numbered(positions.long())
        else:
            raise PositionError(
                f"positions must have shape (batch,), (batch, n) or (batch, seq), got "
                f"{tuple(positions.shape)}"
            )
        if not len(result):
            raise PositionError("no positions: nothing would be edited or captured")
        if result.span[0] < 0:
            raise PositionError(
                f"position {result.span[0]} is negative: count from 0 at the start of the padded "
                f"input"
            )
        return result

    @classmethod
    def _numbered(cls, positions: Tensor) -> "Positions":
        table = positions if positions.ndim == 2 else positions.unsqueeze(-1)
        ordered = table.sort(-1).values if table.shape[1] > 1 else table
        if table.shape[1] > 1 and bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            row = int((ordered[:, 1:] == ordered[:, :-1]).any(-1).nonzero()[0])
            raise PositionError(
                f"example {row} names one token twice: {table[row].tolist()[:8]}; a mask of "
                f"positions must be boolean (.bool())"
            )
        example, slot = torch.ones_like(table).nonzero(as_tuple=True)
        token = table.flatten()
        pairs = torch.stack([example, token, slot, 0 * token], 1)
        return cls(pairs, len(table), grid=tuple(positions.shape))

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
    def slot(self) -> Tensor:
        """Which of an example's positions each is, (N,); for a mask, the column."""
        return self._table[: self._count, 2]

    @property
    def generation(self) -> Tensor:
        """In a scope, which of the context's texts each is part of, from 0, (N,)."""
        return self._table[: self._count, 3]

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
            room = self._table.new_zeros(max(2 * self._count, 64), 4)
            room[:begin] = self._table[:begin]
            self._table = room
        new = self._table[begin : self._count]
        new[:, 0], new[:, 1], new[:, 3] = example, token, text
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
        example, slot = self.example.cpu(), self.slot.cpu()
        if classes.ndim == 0:
            return classes.expand(len(example)).clone()
        if classes.shape == (self.batch,):
            return classes[example]
        if classes.shape == self.grid:
            return classes[example, slot]
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


@dataclass(eq=False)
class Rows:
    """The positions that a forward pass reaches, and where they are in it.

    Attributes:
        index: which of all pairs these are, (N,).
        example: row of the batch of each, (N,).
        token: column of each, counted from the beginning of the text, (N,).
        column: column of each in this call, (N,).
        request: in a scope, the request that each row of the batch belongs to, (N,).
    """

    index: Tensor
    example: Tensor
    token: Tensor
    column: Tensor
    request: Tensor | None = None


class Follower:
    """Finds the tokens of some positions in the passes of a context, and what was missed."""

    def __init__(self, positions: Positions) -> None:
        # On the host, so that a forward pass need not ask the device which of them are its own.
        self.positions, self._known = positions, positions.to("cpu")
        self._ran: set[tuple[int, int]] = set()
        self._rows: tuple[tuple[int, int, int, torch.device], Rows | None] | None = None

    @staticmethod
    def of(positions: Positions) -> "Follower":
        """What follows fixed positions, or a scope."""
        return Follower(positions) if positions.scope is None else ScopeFollower(positions)

    def see(self, call: ForwardCall) -> None:
        """Raise unless the positions fit a call.

        Raises:
            PositionError: another batch size, a position on padding, or one beyond the input. A
                call that fills a KV cache may be followed by the tokens that are still missing;
                positions that never come are found when the context closes.
        """
        check_fit(self._known, call)

    def rows(self, call: ForwardCall, device: torch.device) -> Rows | None:
        """The positions of a call on a device, or None; those of the last call are kept."""
        key = (call.past, call.length, call.front, device)
        if self._rows is None or self._rows[0] != key:
            with outside_transforms():
                index, example, token = _inside(self._known, call)
                number = torch.arange(len(self._known))[index]
                parts = number, example, token, token - call.past + call.front
                rows = Rows(*(part.to(device) for part in parts)) if len(token) else None
            self._rows = (key, rows)
        return self._rows[1]

    def mark(self, call: ForwardCall) -> None:
        """Note that an edit ran."""
        self._ran.add((call.past, call.end))

    def missed(self) -> str | None:
        """What to say of positions that never ran, if any."""
        at = self._known
        missed = torch.ones(len(at), dtype=torch.bool)
        for past, end in self._ran:
            missed &= (at.token < past) | (at.token >= end)
        if not bool(missed.any()):
            return None
        pairs = [(int(at.example[i]), int(at.token[i])) for i in missed.nonzero().flatten()[:5]]
        return (
            f"never ran at {int(missed.sum())} of {len(at)} positions, the first (example, "
            f"token) are {pairs}. Run the model inside the context; with a KV cache, positions "
            f"before the cached part have passed already"
        )


class ScopeFollower(Follower):
    """Finds a scope's tokens in each of the passes of a context."""

    def __init__(self, positions: Positions) -> None:
        positions.clear()
        super().__init__(positions)
        assert positions.scope is not None
        self.scope, self.any = positions.scope, False
        self._last: ForwardCall | None = None
        # Of each text, the numbers of its pairs by row and column, and how far they are given; and
        # the chosen ones.
        self._seen: dict[int, tuple[Tensor, int]] = {}
        self._chosen: dict[int, Positions] = {}

    def see(self, call: ForwardCall) -> None:
        """Take notice of a forward pass that is about to run.

        Raises:
            PositionError: another batch size, or a call of which one cannot say whether it reads
                prompt or new tokens.
        """
        repeats, requests, self._last = self.scope.repeats, self.positions.requests, call
        if requests is not None and call.batch != requests * repeats:
            raise PositionError(wrong_batch("targets", requests, repeats, call.batch))
        if call.batch % repeats:
            raise PositionError(
                f"a batch of {call.batch} rows is no multiple of the scope's repeats, {repeats}: "
                f"repeats is the number of rows for each request (num_beams or "
                f"num_return_sequences of generate)"
            )
        self._check_step(call)
        number = self._text(call).number
        if number not in self._seen:
            for old in [old for old in self._seen if old < number - 8]:
                del self._seen[old]
                self._chosen.pop(old, None)
            self._seen[number] = torch.full((call.batch, 0), -1), 0
        if not self.scope.grows and number not in self._chosen:
            self._choose(call, number)

    def _text(self, call: ForwardCall) -> Text:
        """The text that a call goes on with, or begins."""
        text = call.text
        # Without a cache, a call that adds a token is known to go on where the prompt's end is.
        while self.scope.prompt_length is not None and text.after is not None:
            text = text.after
        return text

    def _prompt_length(self, call: ForwardCall) -> int:
        return self.scope.prompt_length or self._text(call).prompt

    def _choose(self, call: ForwardCall, number: int) -> None:
        """Find the chosen tokens of a text, at its first call."""
        length, region = self._prompt_length(call), self.scope.region
        if call.end < length and not isinstance(region, int | slice):
            raise PositionError(
                f"the prompt of {length} tokens is read in several calls, so {region!r} cannot be "
                f"found in it: give positions by number, or read it in one call"
            )
        real = call.real()
        real = None if real is None else real[:, :length]
        given = functools.partial(call.given, length)
        found = chosen(region, call.batch, length, real, given).to("cpu")
        check_fit(found, call)
        self._chosen[number] = found

    def _check_step(self, call: ForwardCall) -> None:
        """Raise unless one can say where the call stands in its text."""
        text, length, region = call.text, self.scope.prompt_length, self.scope.region
        if text.last < 0:  # its first call
            first = length if region == "generated" and length is not None else 0
            if call.past > first:
                raise PositionError(
                    f"the first call in the context goes on from {call.past} tokens in the cache, "
                    f"which were not edited in the scope {region!r}; open the context before the "
                    f"prompt is read, or use 'generated' with Scope(prompt_length=...)"
                )
            if text.after is not None and length is None and region in ("prompt", "generated"):
                raise PositionError(
                    f"a call without a cache reads the last text and one token more: it may go on "
                    f"with that text, or be a text of its own. Say where the prompt ends: "
                    f"Scope({region!r}, prompt_length=...), or edit such texts in contexts of "
                    f"their own"
                )
            return
        if call.batch != text.batch:
            raise PositionError(
                f"a call with a cache has {call.batch} rows, the text before it had {text.batch}; "
                f"edit texts of other batches in a context of their own"
            )
        if length is not None and any(other.prompt != length for other in call.meanwhile):
            raise PositionError(
                f"another text, with a first call of {call.meanwhile[0].prompt} tokens, takes "
                f"turns with one whose prompt_length is {length}, as the second prompt of guidance "
                f"(guidance_scale) does; leave prompt_length out, and each has its own"
            )
        absolute = isinstance(region, int) and region >= 0
        if length is not None or absolute or not call.past:
            return
        if call.length > 1 or call.past != text.end:
            raise PositionError(
                f"a call reads {call.length} tokens after {call.past} in the cache, where "
                f"{text.end} had been read: a prompt in chunks, a further turn, or "
                f"assisted decoding. Say where the prompt ends: "
                f"Scope({region!r}, prompt_length=inputs['input_ids'].shape[1])"
            )

    def rows(self, call: ForwardCall, device: torch.device) -> Rows | None:
        """The scope's tokens in a call, or None."""
        with outside_transforms():
            number = self._text(call).number
            if self.scope.grows:
                found = self._in_region(call)
            else:
                found = _inside(self._chosen[number], call)[1:]
            if found is None or not len(found[0]):
                return None
            example, token = found
            index = self._number(number, call, example, token)
            request = example if self.scope.repeats == 1 else example // self.scope.repeats
            column = token - call.past + call.front
            return Rows(*(part.to(device) for part in (index, example, token, column, request)))

    def _in_region(self, call: ForwardCall) -> tuple[Tensor, Tensor] | None:
        """Examples and tokens of the prompt, of what is generated, or of both."""
        begin, end, border = call.past, call.end, self._prompt_length(call)
        if self.scope.region == "prompt":
            end = min(end, border)
        elif self.scope.region == "generated":
            begin = max(begin, border)
        if begin >= end:
            return None
        real = call.real()
        if real is None:
            real = torch.ones(call.batch, end - begin, dtype=torch.bool)
        else:
            real = real[:, begin - call.past : end - call.past].cpu()
        example, column = real.nonzero(as_tuple=True)
        return example, column + begin

    def _number(self, text: int, call: ForwardCall, example: Tensor, token: Tensor) -> Tensor:
        """Numbers of pairs in order of appearance, (n,); a token read again keeps its own."""
        seen, begun = self._seen[text]
        if call.end > seen.shape[1]:
            room = torch.full((call.batch, max(2 * call.end, 32)), -1)
            room[:, : seen.shape[1]] = seen
            seen = room
        self._seen[text] = seen, max(begun, call.end)
        if call.past >= begun:  # all of them are new
            index = self.positions.add(example, token, text)
        else:
            index = seen[example, token]
            new = index < 0
            index[new] = self.positions.add(example[new], token[new], text)
        seen[example, token] = index
        return index

    def mark(self, call: ForwardCall) -> None:
        """Note that an edit ran."""
        self.any = True

    def missed(self) -> str | None:
        """What to say if no token was edited."""
        if self.any:
            return None
        region = self.scope.region
        if self._last is None:
            return f"never ran in the scope {region!r}: run the model inside the context"
        if region == "generated":
            return (
                "never ran in the scope 'generated': the model read no new token after its prompt "
                f"of {self._prompt_length(self._last)} columns. The last new token is never read "
                "back, so max_new_tokens must be at least 2; and a text given as a whole counts as "
                "prompt, unless Scope(prompt_length=...) says where it ends"
            )
        return (
            f"never ran in the scope {region!r}: no call reached the site with a token of the "
            f"scope that the attention mask shows"
        )


def _inside(positions: Positions, call: ForwardCall) -> tuple[Tensor | slice, Tensor, Tensor]:
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
    _, example, token = _inside(positions, call)
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
