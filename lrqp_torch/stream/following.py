"""Which tokens of each forward pass an intervention edits, and what was missed."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.errors import PositionError, outside_transforms
from lrqp_torch.stream.passes import ForwardCall, Text
from lrqp_torch.stream.positions import Positions, check_fit, chosen, reached, wrong_batch


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
                index, example, token = reached(self._known, call)
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
                found = reached(self._chosen[number], call)[1:]
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
