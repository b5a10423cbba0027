"""Token positions: every way to say them, parsed once, and which of them a forward pass reaches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, Union, cast

import torch
from torch import Tensor

from lrqp_torch.errors import (
    FEW,
    PositionError,
    TargetError,
    as_classes,
    concrete,
    in_transforms,
    outside_transforms,
    quoted,
)
from lrqp_torch.stream.passes import ForwardCall
from lrqp_torch.stream.text import TextInputs

REGIONS = ("prompt", "generated", "all")
Region: TypeAlias = str | int | slice | Callable[[Mapping[str, Tensor]], Any]


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
    (``input_ids`` or ``inputs_embeds``, and ``attention_mask``) and returns its positions, as
    :class:`~lrqp_torch.Span` does of a word.

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
                f"or a function, got {quoted(self.region)}; positions of one's own are a "
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
        example: row of the batch of each pair, (N,).
        token: column of each, (N,).
        batch: B, or None where a scope finds the pairs.
        scope: what finds them.
        grid: shape of the positions as they were said: (B,), (B, n), or (B, T) for a mask.
        is_mask: whether they were said by a mask.
    """

    batch: int | None = None
    scope: Scope | None = None
    grid: tuple[int, ...] = ()
    is_mask = False
    requests: int | None = None
    # Of one position an example, where they are few: tensors are made of them if somebody asks.
    each: list[int] | None = None
    _span: tuple[int, int] | None = None
    _example: Tensor | None = None
    _token: Tensor | None = None
    # What a scope has found: how many pairs, of which texts, those that are not in the columns yet,
    # and which of all the attention mask shows, where that is not known before it is read.
    _count = 0
    _text = torch.zeros(0, dtype=torch.long)
    _found: list[tuple[Tensor, Tensor | int, int, Tensor | None]] = cast(Any, ())
    _shown: Tensor | None = None
    _shown_again: list[tuple[Tensor, Tensor]] = cast(Any, ())

    def __init__(
        self,
        example: Tensor,
        token: Tensor,
        batch: int | None = None,
        scope: Scope | None = None,
        grid: tuple[int, ...] = (),
        is_mask: bool = False,
    ) -> None:
        self._example, self._token, self.batch, self.scope = example, token, batch, scope
        self.grid, self.is_mask = grid, is_mask
        if scope is not None:
            self._found, self._shown_again, self._count = [], [], len(example)
            self._text = torch.zeros_like(example)

    @classmethod
    def parse(cls, positions: Where) -> "Positions":
        """Read positions, in whatever way they are said.

        Raises:
            PositionError: another kind, dtype or shape, a negative position in a tensor, none at
                all, or one token twice in an example.
        """
        if isinstance(positions, cls):
            return positions
        # They are kept as a copy, which does not change with the tensor that was given.
        if type(positions) is Tensor and positions.ndim == 1 and positions.dtype == torch.long:
            count = positions.shape[0]
            if 0 < count <= FEW:
                return cls._of_each(positions.tolist())
        if isinstance(positions, Scope):
            return cls(_NONE, _NONE, scope=positions)
        if getattr(positions, "ndim", None) == 0 and "int" in str(getattr(positions, "dtype", "")):
            positions = int(cast(Any, positions))  # one number of numpy's or torch's
        if isinstance(positions, str | int | slice) or callable(positions):
            return cls.parse(Scope(positions))
        if not isinstance(positions, Tensor):
            try:
                positions = torch.as_tensor(positions)
            except (TypeError, ValueError, RuntimeError) as error:
                raise PositionError(
                    f"positions must be numbers (batch,) or (batch, n), a mask (batch, seq) or a "
                    f"scope, got {type(positions).__name__}: {quoted(positions)}"
                    + (
                        "; for lists of different lengths, a mask"
                        if isinstance(positions, list)
                        else ""
                    )
                ) from error
        # Positions are looked at on the host; of a GPU that is the one wait for them.
        positions = positions.cpu()
        is_mask, grid = positions.dtype == torch.bool, tuple(positions.shape)
        if positions.dtype.is_floating_point or len(grid) not in ((2,) if is_mask else (1, 2)):
            raise PositionError(
                f"positions must be LongTensor (batch,), LongTensor (batch, n) or BoolTensor "
                f"(batch, seq), got {positions.dtype} {grid}"
            )
        if is_mask:
            example, token = positions.nonzero(as_tuple=True)
        elif len(grid) == 1:
            example, token = torch.arange(len(positions)), positions
        else:
            _check_distinct(positions)
            example = torch.arange(len(positions))
            example, token = example.repeat_interleave(grid[1]), positions.flatten()
        token = token.clone() if token.dtype == torch.long else token.long()
        return cls(example, token, len(positions), grid=grid, is_mask=is_mask)._checked()

    @classmethod
    def _of_each(cls, numbers: list[int]) -> "Positions":
        """One position an example."""
        found = object.__new__(cls)
        found.each, found.batch, found.grid = numbers, len(numbers), (len(numbers),)
        found._span = min(numbers), max(numbers)
        return found if found._span[0] >= 0 else found._checked()

    def _checked(self) -> "Positions":
        if not len(self):
            raise PositionError("no positions: nothing would be edited or captured")
        if self.span[0] < 0:
            raise PositionError(
                f"position {self.span[0]} is negative: count from 0 at the start of the padded "
                f"input"
            )
        return self

    def __len__(self) -> int:
        return len(self.each or self.example)

    def are(self, other: "Positions") -> bool:
        """Whether they are those of another, and none is what a scope finds."""
        if self.each is not None or other.each is not None:
            return self.each == other.each
        return (
            (self.scope, other.scope) == (None, None)
            and (self.grid, self.is_mask) == (other.grid, other.is_mask)
            and torch.equal(self.example, other.example)
            and torch.equal(self.token, other.token)
        )

    @property
    def span(self) -> tuple[int, int]:
        """Of known positions, the smallest column and the largest."""
        if self._span is None:
            numbers, token = self.each, self._token
            if numbers is None:
                assert token is not None
                numbers = token.tolist() if len(token) <= FEW else [*map(int, token.aminmax())]
            self._span = min(numbers), max(numbers)
        return self._span

    @property
    def example(self) -> Tensor:
        """Row of the batch of each pair, (N,)."""
        if self._example is None:
            assert self.each is not None
            self._example = whole_numbers(range(len(self.each)))
        return self._example if self.scope is None else self._pairs("_example")

    @property
    def token(self) -> Tensor:
        """Column of each, (N,)."""
        if self._token is None:
            assert self.each is not None
            self._token = whole_numbers(self.each)
        return self._token if self.scope is None else self._pairs("_token")

    @property
    def generation(self) -> Tensor:
        """In a scope, which of the context's texts each is part of, from 0, (N,)."""
        return torch.zeros_like(self.example) if self.scope is None else self._pairs("_text")

    @property
    def request(self) -> Tensor:
        """The request that each belongs to, (N,); without a scope, the example."""
        return self.example if self.scope is None else self.example // self.scope.repeats

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of results that have one entry a pair: (B,), (B, n), or (N,)."""
        return self.grid if self.grid and not self.is_mask else (len(self),)

    def to(self, device: torch.device | str) -> "Positions":
        """The same positions on another device."""
        example, token = self.example.to(device), self.token.to(device)
        return Positions(example, token, self.batch, self.scope, self.grid, self.is_mask)

    def clear(self) -> None:
        """Forget what a scope has found; called when a context opens."""
        if self.scope is not None:
            self._example, self._token, self._text = _NONE, _NONE, _NONE
            self._count, self._found, self._shown, self._shown_again = 0, [], None, []

    def add(
        self, example: Tensor, token: Tensor | int, text: int, shown: Tensor | None = None
    ) -> range:
        """Add pairs that a scope has found, on the CPU; their numbers. Constant time a pair.

        Args:
            example: row of each, (n,).
            token: column of each, (n,), or of all.
            text: which of the context's texts they are part of.
            shown: which of them count, (n,) bool, where that is on a device that is not waited
                for; the others keep their numbers, and are no positions.
        """
        begin, self._count = self._count, self._count + example.shape[0]
        self._found.append((example, token, text, shown))
        return range(begin, self._count)

    def show(self, index: Tensor, shown: Tensor) -> None:
        """Let pairs that were added before count too where they are shown now."""
        self._shown_again.append((index, shown))

    def numbered(self, index: Tensor) -> Tensor:
        """What pairs are numbered as, once those that do not count are left out: −1 for these."""
        self._settle()
        if self._shown is None:
            return index
        numbers = torch.where(self._shown, self._shown.cumsum(0) - 1, -1)
        return numbers.to(index.device)[index]

    def _pairs(self, name: str) -> Tensor:
        """A column of the pairs that count."""
        self._settle()
        column: Tensor = getattr(self, name)
        return column if self._shown is None else column[self._shown]

    def _settle(self) -> None:
        """Put what was found into the columns."""
        if not self._found and not self._shown_again:
            return
        found, self._found = self._found, []
        texts = [torch.full_like(example, text) for example, _, text, _ in found]
        if self._shown is not None or any(shown is not None for *_, shown in found):
            parts = [
                torch.ones_like(example, dtype=torch.bool) if shown is None else shown.cpu()
                for example, _, _, shown in found
            ]
            known = torch.ones_like(self._text, dtype=torch.bool)
            self._shown = torch.cat([known if self._shown is None else self._shown, *parts])
        assert self._example is not None
        assert self._token is not None
        self._example = torch.cat([self._example, *(part[0] for part in found)])
        tokens = [
            torch.full_like(part[0], part[1]) if isinstance(part[1], int) else part[1]
            for part in found
        ]
        self._token = torch.cat([self._token, *tokens])
        self._text = torch.cat([self._text, *texts])
        for index, shown in self._shown_again:
            if self._shown is not None:
                self._shown[index] |= shown.cpu()
        self._shown_again.clear()

    def classes(self, given: Any, name: str) -> Tensor:
        """A class for each pair, (N,), on the CPU; in a scope for each request, (B,), or (1,).

        They are a copy, which does not change with what was given.

        Args:
            given: integers: one for all, (B,) one an example or request, or one a position.
            name: what they are, for messages.

        Raises:
            TargetError: another shape or dtype, or another number of requests than before.
        """
        classes = given if type(given) is Tensor else as_classes(given, name)
        if classes.dtype != torch.long:
            if classes.dtype.is_floating_point or classes.dtype.is_complex:
                raise TargetError(
                    f"{name} must hold integer classes, got {classes.dtype}; use .long()"
                )
            classes = classes.long()  # compiled code reads them where they lie
        classes = classes if classes.is_cpu else classes.cpu()
        if self.scope is not None:
            if classes.ndim > 1 or (classes.ndim and self.requests not in (None, len(classes))):
                known = "(B,)" if self.requests is None else f"({self.requests},)"
                raise TargetError(
                    f"{name} has shape {tuple(classes.shape)}; in the scope {self.scope.region!r} "
                    f"give one number, or {known} for one class a request"
                )
            self.requests = len(classes) if classes.ndim else self.requests
            return classes.reshape(-1).clone()
        if classes.ndim == 0:
            return classes.expand(len(self)).clone()
        if len(self.grid) == 1 and classes.shape == self.grid:
            # Said so only where it must be: that takes longer than the copy.
            return classes.clone() if classes.is_contiguous() else classes.contiguous()
        example, token = self.example.cpu(), self.token.cpu()
        if classes.shape == (self.batch,):
            return classes[example]
        if classes.shape == self.grid:
            return classes[example, token] if self.is_mask else classes.flatten().clone()
        raise TargetError(
            f"{name} has shape {tuple(classes.shape)}; give one number, ({self.batch},) for one "
            f"class an example, or {self.grid} for one a position"
        )

    def means(self) -> list[Any]:
        """What of two positions is equal where they mean the same: pairs, or a scope."""
        if self.scope is not None:
            return [repr(self.scope)]
        return [*zip(self.example.tolist(), self.token.tolist(), strict=True)]

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


_NONE = torch.zeros(0, dtype=torch.long)


def whole_numbers(numbers: Sequence[int]) -> Tensor:
    """Numbers as a tensor on the CPU that may be used anywhere, wherever it is made."""
    if not (torch.is_inference_mode_enabled() or in_transforms()):
        return torch.tensor(numbers, device="cpu")
    with outside_transforms(), torch.inference_mode(False):
        made = torch.tensor(numbers, device="cpu")
    return made


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
    there = given()
    if not isinstance(there, TextInputs):
        there = {**there, "attention_mask": shown.long()}
    found = Positions.parse(region(there))
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


def check_fit(positions: Positions, call: ForwardCall) -> tuple[Tensor, Tensor, Tensor] | None:
    """Raise :class:`PositionError` unless known positions fit a call; see :meth:`Follower.see`.

    Returns:
        Where the mask is on a device that is not waited for: examples and tokens that the call
        reads, and which of them it shows, for :func:`raise_on_padding`.
    """
    if positions.batch != call.batch:
        raise PositionError(wrong_batch("positions", cast(int, positions.batch), 1, call.batch))
    if not call.continues and positions.span[1] >= call.end:
        worst = int((positions.token >= call.end).nonzero()[0])
        raise PositionError(
            f"position {int(positions.token[worst])} of example {int(positions.example[worst])} is "
            f"out of range: the input has {call.end} tokens"
        )
    if call.mask is None or not concrete(call.mask):
        return None
    _, example, token = reached(positions, call)
    if not len(token):
        return None
    if call.mask.shape[1] < call.end:
        example, token = (part[token < call.mask.shape[1]] for part in (example, token))
    device = call.mask.device
    if device.type != "cpu":
        places = (part.to(device, non_blocking=True) for part in (example, token))
        return example, token, call.mask[tuple(places)] != 0
    raise_on_padding(example, token, call.mask[example, token])
    return None


def raise_on_padding(example: Tensor, token: Tensor, shown: Tensor) -> None:
    """Raise :class:`PositionError` where the attention mask does not show all positions."""
    if bool(shown.all()):
        return
    where = (shown == 0).nonzero().flatten()
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
