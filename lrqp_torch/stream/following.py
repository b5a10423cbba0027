"""Which tokens of each forward pass an intervention edits, and what was missed."""

import functools
import threading
from functools import cached_property
from operator import add
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lrqp_torch.errors import PositionError, capturing, outside_transforms, readable
from lrqp_torch.stream.passes import ForwardCall, SeenMask, Text
from lrqp_torch.stream.positions import (
    Positions,
    check_fit,
    chosen,
    raise_on_padding,
    reached,
    whole_numbers,
    wrong_batch,
)
from lrqp_torch.stream.repeats import library


class Rows:
    """The positions that a forward pass reaches, and where they are in it.

    What a pass knows as numbers is made into tensors where somebody asks for them.

    Args:
        index: which of all pairs these are, (N,), or a range.
        example: row of the batch of each, (N,).
        token: column of each, counted from the beginning of the text, (N,), or one for all.
        column: column of each in this call, (N,), or one for all.
        request: in a scope, the request that each row of the batch belongs to, (N,).
        shown: which of them count, (N,) bool, where the attention mask is on a device that is not
            waited for; else all do.
        whole: whether they are all tokens of the call, row by row.
        like: the same object for rows that are others at the same places of a stream, of the same
            requests, numbered one after another: one more token of each row.

    Attributes:
        every: whether they are all positions of the context, in their order.
    """

    every = False
    _flat: tuple[int, Tensor | None] = -1, None

    def __init__(
        self,
        index: Tensor | range,
        example: Tensor,
        token: Tensor | int,
        column: Tensor | int,
        request: Tensor | None = None,
        shown: Tensor | None = None,
        whole: bool = False,
        like: object = None,
    ) -> None:
        self._index, self.example, self._token, self._column = index, example, token, column
        self.request, self.shown, self.whole, self.like = request, shown, whole, like

    @cached_property
    def index(self) -> Tensor:
        """Which of all pairs these are, (N,)."""
        index = self._index
        if isinstance(index, Tensor):
            return index
        return consecutive(index.stop, self.example.device)[index.start : index.stop]

    @cached_property
    def token(self) -> Tensor:
        """Column of each in the text, (N,)."""
        return self._spread(self._token)

    @cached_property
    def column(self) -> Tensor:
        """Column of each in this call, (N,)."""
        return self._spread(self._column)

    def is_like(self, other: Any) -> bool:
        """Whether they are others, or others at the same places."""
        return self is other or (
            self.like is not None
            and self.like is other.like
            and (self.shown is None) == (other.shown is None)
        )

    def _spread(self, value: Tensor | int) -> Tensor:
        if isinstance(value, Tensor):
            return value
        with outside_transforms(), torch.inference_mode(False):
            return torch.full_like(self.example, value)

    def gather(self, stream: Tensor) -> Tensor:
        """Their activations, (N, d), in a stream (B, T, d); of all tokens a view."""
        rows = stream.view(-1, stream.shape[2]) if stream.is_contiguous() else stream.flatten(0, 1)
        return rows if self.whole else rows.index_select(0, self.flat(stream.shape[1]))

    def flat(self, columns: int) -> Tensor:
        """Which rows of (B · T, d) they are in streams of so many columns T, (N,)."""
        if self._flat[0] != columns:
            with outside_transforms(), torch.inference_mode(False):
                self._flat = columns, self.example * columns + self.column
        return cast(Tensor, self._flat[1])

    @property
    def numbers(self) -> Tensor | int:
        """:attr:`index`, or the first of consecutive ones."""
        return self._index if isinstance(self._index, Tensor) else self._index.start

    def scatter(self, stream: Tensor, values: Tensor) -> Tensor:
        """The stream in the dtype of the values, with these, (N, d), in their places."""
        if self.whole:
            return values.reshape(stream.shape)
        if stream.dtype != values.dtype:
            stream = stream.to(values.dtype)
        return stream.index_put((self.example, self.column), values)

    def put(self, stream: Tensor, values: Tensor, residual: Tensor | None = None) -> Tensor | None:
        """:meth:`scatter` in one compiled call on the CPU; the stream itself where no value is new.

        None: nothing is done, because that is not to be had, a derivative is asked for, or a value
        is not finite.

        Args:
            stream: what is written of it, (B, T, d).
            values: of the stream at these rows, (N, d).
            residual: what is added to what is written, (B, T, d), or None.
        """
        loaded, kind = library(), KINDS.get(values.dtype)
        if (
            loaded is None
            or kind is None
            or type(stream) is not Tensor
            or type(values) is not Tensor
        ):
            return None
        if stream.dtype is not values.dtype or not (stream.is_cpu and values.is_cpu):
            return None
        if not (stream.is_contiguous() and values.is_contiguous()):
            return None
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and (stream.requires_grad or values.requires_grad)
        ):
            return None
        base = None
        if residual is not None:
            alike = type(residual) is Tensor and residual.shape == stream.shape
            if not alike or residual.dtype is not stream.dtype or not residual.is_contiguous():
                return None
            if torch.is_grad_enabled() and residual.requires_grad:
                return None
            base = residual.data_ptr()
        numbers, (count, width) = stream.numel(), values.shape
        few = numbers <= FEW_NUMBERS
        if (self.whole and not few) or (base is not None and kind > 1):
            return None
        result = torch.empty_like(stream) if few else stream.clone()
        places = stream.data_ptr(), base, result.data_ptr(), values.data_ptr()
        at = None if self.whole else self.flat(stream.shape[1]).data_ptr()
        outcome = loaded.lrqp_put_rows(*places, at, count, numbers // width, width, kind, few)
        return None if outcome < 0 else result if outcome else stream


class _Each(Rows):
    """All positions of a context, of which there is one an example, in a pass on the CPU."""

    every = True

    def __init__(self, positions: Positions, call: ForwardCall) -> None:
        assert positions.each is not None
        self._positions, self._each = positions, positions.each
        self._index, self._shift = range(len(self._each)), call.front - call.past
        self.request = self.shown = self.like = None
        self.whole = call.front + call.length == 1

    @cached_property
    def example(self) -> Tensor:  # type: ignore[override]
        return self._positions.example

    @cached_property
    def token(self) -> Tensor:
        return self._positions.token

    @cached_property
    def column(self) -> Tensor:
        return whole_numbers([token + self._shift for token in self._each])

    def flat(self, columns: int) -> Tensor:
        if self._flat[0] != columns:
            places = range(self._shift, self._shift + len(self._each) * columns, columns)
            self._flat = columns, whole_numbers([*map(add, places, self._each)])
        return cast(Tensor, self._flat[1])


KINDS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""``Kind`` of rows.c."""
FEW_NUMBERS = 32_768
"""So few numbers of a stream are copied in a call; of more torch copies several at once."""


_Step = tuple[int, torch.device, Tensor, Tensor, Tensor, Tensor]
"""How many rows, on what device; example of each on the CPU; example, column and request there."""
_CPU = torch.device("cpu")
_NUMBERS: dict[torch.device, Tensor] = {}


def consecutive(stop: int, device: torch.device) -> Tensor:
    """0, 1, … up to a number at least: some that are there already."""
    held = _NUMBERS.get(device)
    if held is None or len(held) < stop:
        with outside_transforms(), torch.inference_mode(False):
            held = torch.arange(max(4096, 2 * stop), device=device)
        # What a CUDA graph is to make is not there before it runs.
        if not capturing(held):
            _NUMBERS[device] = held
    return held


class Follower:
    """Finds the tokens of some positions in the passes of a context, and what was missed."""

    counts = False
    """Whether it matters which texts there are."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self._ran: set[tuple[int, int]] = set()
        self._rows: tuple[tuple[int, int, int, torch.device], Rows | None] | None = None
        # What a pass needs of them, by device: on a GPU they are moved but once.
        self._there: dict[torch.device, list[Tensor]] = {}
        # The last call that they were held against: what it was, its mask, and whether that is as
        # it was then; and what masks on a GPU show, which is looked at when the context closes.
        self._fits: tuple[tuple[int, int, int, bool], SeenMask] | None = None
        self._hidden: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    @staticmethod
    def of(positions: Positions) -> "Follower":
        """What follows fixed positions, or a scope."""
        return Follower(positions) if positions.scope is None else ScopeFollower(positions)

    def forget(self) -> None:
        """Know of no call of this context, for another one with the same positions."""
        self._ran.clear()
        self._hidden.clear()

    def renew(self, positions: Positions) -> None:
        """As it was before any call."""
        self.__init__(positions)  # type: ignore[misc]

    def see(self, call: ForwardCall) -> None:
        """Raise unless the positions fit a call.

        Raises:
            PositionError: another batch size, a position on padding, or one beyond the input. A
                call that fills a KV cache may be followed by the tokens that are still missing;
                positions that never come are found when the context closes.
        """
        if call.meanwhile:
            self._check_turns(call.text.prompt, call.meanwhile[0].prompt)
        mask = call.mask
        key = call.batch, call.past, call.end, call.continues
        # Inputs that are run again and again are held against the positions once.
        known = self._fits
        if known is not None and known[0] == key and known[1].is_still(mask):
            return
        hidden = check_fit(self.positions, call)
        if hidden is not None:
            example, token, shown = hidden
            before = self._hidden.get(key[1:3])
            self._hidden[key[1:3]] = (
                hidden if before is None else (example, token, before[2] & shown)
            )
        self._fits = key, SeenMask(mask)

    def _check_turns(self, one: int, other: int) -> None:
        """Raise if a position is in one prompt, and past the other that takes turns with it."""
        if min(one, other) <= self.positions.span[1] < max(one, other):
            raise PositionError(
                f"another text, with a first call of {other} tokens, takes turns with one of {one},"
                f" as the second prompt of guidance (guidance_scale) does: position "
                f"{self.positions.span[1]} is in the prompt of one, and new in the other. Say it "
                f"for each: 'prompt', 'last', a column from the end (-1) or a function"
            )

    def step(self, call: ForwardCall) -> None:
        """:meth:`see` for a call that is like the one before, or one token more of its text."""
        if call.continues and call.past <= self.positions.span[1]:
            self.see(call)

    def rows(self, call: ForwardCall, device: torch.device) -> Rows | None:
        """The positions of a call on a device, or None; those of the last call are kept."""
        if call.past > self.positions.span[1]:
            return None
        key, known = (call.past, call.length, call.front, device), self._rows
        if known is None or known[0] != key:
            (first, last), each = self.positions.span, self.positions.each
            if each is not None and device.type == "cpu" and call.past <= first and last < call.end:
                known = key, _Each(self.positions, call)
            else:
                with outside_transforms(), torch.inference_mode(False):
                    known = key, self._find(call, device)
            self._rows = known
        return known[1]

    def _find(self, call: ForwardCall, device: torch.device) -> Rows | None:
        known = self.positions
        which, example, token = reached(known, call)
        if not len(token):
            return None
        whole = bool(
            len(token) == call.batch * (call.front + call.length)
            and torch.equal(example * call.length + token, torch.arange(len(token)))
        )
        shift = call.front - call.past
        if not isinstance(which, slice):
            found = [part.to(device, non_blocking=True) for part in (which, example, token)]
        else:
            if device not in self._there:
                everything = torch.arange(len(known)), known.example, known.token
                self._there[device] = [part.to(device, non_blocking=True) for part in everything]
            found = self._there[device]
        index, example, token = found
        return Rows(index, example, token, token + shift if shift else token, whole=whole)

    def mark(self, call: ForwardCall) -> None:
        """Note that an edit ran."""
        self._ran.add((call.past, call.past + call.length))

    def missed(self) -> str | None:
        """What to say of positions that never ran, if any.

        Raises:
            PositionError: some lie on padding, which was not known before.
        """
        at = self.positions
        for example, token, shown in self._hidden.values():
            raise_on_padding(example, token, shown.cpu())
        first, last = at.span
        if any(past <= first and last < end for past, end in self._ran):
            return None
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

    counts = True

    def __init__(self, positions: Positions) -> None:
        positions.clear()
        super().__init__(positions)
        self._finding = threading.RLock()  # of threads that share a context one at a time finds
        assert positions.scope is not None
        self.scope, self.any = positions.scope, False
        self._last: ForwardCall | None = None
        # Of each text, what it has been numbered as; and the chosen pairs.
        self._seen: dict[int, _Numbers] = {}
        self._grids: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._chosen: dict[int, Positions] = {}
        # Whether it has one more token of each row in calls of one; what these have in common.
        self._steps = self.scope.grows and self.scope.region != "prompt"
        self._step: _Step | None = None

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
            self._seen[number] = _Numbers(call.batch)
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
        real = None if isinstance(region, int | slice) else call.real()
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
        """The scope's tokens in a call, or None; in one that runs again, what they were."""
        with self._finding:
            if call.continues:
                return self._rows_of_step(call, device)
            key = id(self), device
            if not (call.again and key in call.found):
                call.found[key] = self._rows_in(call, device)
            return cast(Rows | None, call.found[key])

    def _rows_of_step(self, call: ForwardCall, device: torch.device) -> Rows | None:
        """:meth:`rows` of a call with a cache."""
        text, begin, mask, shown = call.text, call.past, call.mask, None
        # One new token a row behind the prompt, of a call like the one before: all of it is known.
        seen = self._seen[text.number] if call.like and self._steps else None
        if seen is None or begin < seen.end or begin < (self.scope.prompt_length or text.prompt):
            return self._rows_in(call, device)
        if mask is not None:
            if mask.shape[1] <= begin:
                return self._rows_in(call, device)
            shown = mask.select(1, begin)
            if not shown.is_cpu:
                # A copy: the mask may be written over before it is looked at.
                shown = shown.ne(0)
                shown = shown if shown.device == device else shown.to(device, non_blocking=True)
            elif 0 in shown.tolist():
                return self._rows_in(call, device)
            else:
                shown = None
        step = self._step
        if step is None or step[:2] != (call.batch, device):
            step = self._new_step(call.batch, device)
            self._step = None if capturing(step[3]) else step
        _, _, here, example, column, request = step
        numbers = self.positions.add(here, begin, text.number, shown)
        seen.end = begin + 1
        seen.noted.append((here, begin, numbers))
        return Rows(numbers, example, begin, column, request, shown, True, step)

    def _new_step(self, batch: int, device: torch.device) -> "_Step":
        (example, column), repeats = self._grid(batch, 1, device), self.scope.repeats
        request = example if repeats == 1 else example // repeats
        return batch, device, self._grid(batch, 1, _CPU)[0], example, column, request

    def _rows_in(self, call: ForwardCall, device: torch.device) -> Rows | None:
        """:meth:`rows` of any call."""
        with outside_transforms(), torch.inference_mode(False):
            number = self._text(call).number
            cpu, repeats = _CPU, self.scope.repeats
            if not self.scope.grows:
                found = reached(self._chosen[number], call)[1:]
                return self._rows_of(call, device, number, *found) if len(found[0]) else None
            begin, end = self._region(call)
            if begin >= end:
                return None
            shown = call.real(begin, end)
            if shown is not None and readable(shown):
                if not bool(shown.all()):
                    example, column = shown.nonzero(as_tuple=True)
                    if not len(example):
                        return None
                    return self._rows_of(call, device, number, example, column + begin)
                shown = None
            # All tokens of all rows: what there is of them is known without a look.
            whole = call.front == 0 and (begin, end) == (call.past, call.end)
            one, seen = end - begin == 1, self._seen[number]
            example, offset = self._grid(call.batch, end - begin, cpu)
            # A copy: the mask may be written over before it is looked at.
            if shown is not None:
                shown = shown.flatten() if call.square is None else shown.flatten().clone()
            if call.past < seen.end:
                return self._rows_of(call, device, number, example, offset + begin, shown, whole)
            token = begin if one else offset + begin
            numbers = self.positions.add(example, token, number, shown)
            seen.note(example, token, numbers, call.end)
            example, offset = self._grid(call.batch, end - begin, device)
            shift = begin - call.past + call.front
            like = None if shift or repeats > 1 else self._grid(call.batch, end - begin, device)
            return Rows(
                numbers,
                example,
                begin if one else offset + begin if begin else offset,
                shift if one and shift else offset + shift if shift else offset,
                example if repeats == 1 else example // repeats,
                None if shown is None else shown.to(device, non_blocking=True),
                whole,
                like,
            )

    def _rows_of(
        self,
        call: ForwardCall,
        device: torch.device,
        text: int,
        example: Tensor,
        token: Tensor,
        shown: Tensor | None = None,
        whole: bool = False,
    ) -> Rows:
        """Pairs of a call, on the CPU, as rows on a device; with ``shown``, (n,), on its own."""
        index = self._number(text, call, example, token, shown)
        column = token - call.past + call.front
        index, example, token, column = (
            part.to(device, non_blocking=True) for part in (index, example, token, column)
        )
        request = example if self.scope.repeats == 1 else example // self.scope.repeats
        shown = None if shown is None else shown.to(device, non_blocking=True)
        return Rows(index, example, token, column, request, shown, whole)

    def _grid(self, batch: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column of all tokens of a batch, (batch · count,) each."""
        key = batch, count, device
        if key not in self._grids:
            if len(self._grids) > 8:
                self._grids.clear()
            with torch.inference_mode(False):
                rows = torch.arange(batch, device=device)
                columns = torch.arange(count, device=device)
                made = (
                    rows.repeat_interleave(count) if count > 1 else rows,
                    columns.repeat(batch) if batch > 1 else columns,
                )
            if capturing(rows):
                return made
            self._grids[key] = made
        return self._grids[key]

    def _region(self, call: ForwardCall) -> tuple[int, int]:
        """First token of a call that is in a growing scope, and the one after the last."""
        begin, end, border = call.past, call.end, self._prompt_length(call)
        if self.scope.region == "prompt":
            end = min(end, border)
        elif self.scope.region == "generated":
            begin = max(begin, border)
        return begin, end

    def _number(
        self, text: int, call: ForwardCall, example: Tensor, token: Tensor, shown: Tensor | None
    ) -> Tensor:
        """Numbers of pairs in order of appearance, (n,); a token read again keeps its own."""
        seen = self._seen[text]
        if call.past >= seen.end:  # all of them are new
            numbers = self.positions.add(example, token, text, shown)
            index = torch.arange(numbers.start, numbers.stop)
        else:
            index = seen.find(example, token)
            new, known = (which.nonzero().squeeze(-1) for which in (index < 0, index >= 0))
            if shown is not None and len(known):
                there = known.to(shown.device, non_blocking=True)
                self.positions.show(index[known], shown[there])
            if len(new):
                some = None
                if shown is not None:
                    some = shown[new.to(shown.device, non_blocking=True)]
                numbers = self.positions.add(example[new], token[new], text, some)
                index[new] = torch.arange(numbers.start, numbers.stop)
        seen.note(example, token, index, call.end)
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


class _Numbers:
    """What the pairs of one text have been numbered as.

    Attributes:
        end: how far the text has been numbered.
        noted: pairs and their numbers that are not in the table yet.
    """

    def __init__(self, batch: int) -> None:
        self.end = 0
        self._table = torch.full((batch, 0), -1)
        self.noted: list[tuple[Tensor, Tensor | int, Tensor | range]] = []

    def note(self, example: Tensor, token: Tensor | int, index: Tensor | range, end: int) -> None:
        """Keep the numbers of some pairs, of a call that ends at a column."""
        self.end = max(self.end, end)
        self.noted.append((example, token, index))

    def find(self, example: Tensor, token: Tensor) -> Tensor:
        """The numbers of pairs; −1 of those that have none."""
        room = int(token.max()) + 1
        if max(room, self.end) > self._table.shape[1]:
            wider = torch.full((len(self._table), 2 * max(room, self.end)), -1)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        for rows, columns, numbers in self.noted:
            self._table[rows, columns] = torch.as_tensor(numbers)
        self.noted.clear()
        return self._table[example, token]
