"""Scopes: which tokens an edit means while the model is still writing the text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.errors import PositionError, TargetError
from lrqp_torch.stream.positions import ForwardCall, Positions, wrong_batch
from lrqp_torch.stream.rows import Rows

REGIONS = ("prompt", "generated", "all")


@dataclass(frozen=True)
class Scope:
    """A part of each text to edit in ``model.generate``, known by where its tokens come from.

        with edit.at(model, "L6.mid", positions=lrqp.Scope("generated", repeats=4), target=1):
            model.generate(**inputs, num_beams=4)

    ``"prompt"`` are the real tokens of the prompt, without its padding. ``"generated"`` are the new
    tokens that the model reads back as input; the last one of a generation is never read.
    ``"all"`` is both. With a KV cache each token is edited once, in the call that reads it; without
    one, every call computes it anew from the same values, and edits it anew.

    A text begins with a call that has no past, and its prompt is as long as that call. Without a
    cache, a call one token longer that begins with the tokens of the last one continues the text.
    A prompt that is read in several calls (``prefill_chunk_size``, a cache that the caller has
    filled) and assisted decoding need ``prompt_length``: calls that cannot be told apart without it
    are refused. (Not seen to be such: a prompt that ends one token after its first chunk.)

    Tokens that the attention mask hides are left alone. ``generate`` shows the padding that it puts
    behind a sequence that has ended, so that is edited and recorded like text, without effect on
    any text. With beam search rows of one example change places, and records name the row of the
    batch that a token was in when it was edited.

    Args:
        region: ``"prompt"``, ``"generated"`` or ``"all"``.
        repeats: rows of the batch for each request, as ``num_beams`` and ``num_return_sequences``
            make them: request i owns rows i·repeats to i·repeats + repeats − 1.
        prompt_length: columns of the prompt with its padding; default that of each first call.

    Raises:
        PositionError: another region, or a number below 1.
    """

    region: str
    repeats: int = 1
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        if self.region not in REGIONS:
            raise PositionError(
                f"scope must be one of {', '.join(map(repr, REGIONS))}, got {self.region!r}; "
                f"positions by number are a tensor"
            )
        for name in ("repeats", "prompt_length"):
            value = getattr(self, name)
            if name == "prompt_length" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PositionError(f"{name} of a scope must be an integer from 1, got {value!r}")


Where = Tensor | Scope | str
"""Fixed positions, or a scope; a string is a scope's region."""


def parse(positions: Where) -> Positions | Scope:
    """Fixed positions as pairs, or the scope that is meant.

    Raises:
        PositionError: a string that is no region, or positions that do not parse.
    """
    if isinstance(positions, str):
        return Scope(positions)
    return positions if isinstance(positions, Scope) else Positions.parse(positions)


class ScopePairs:
    """The (example, token) pairs of a scope that have been edited so far, in order.

    Attributes:
        example: row of the batch of each, (N,).
        token: column of each, (N,).
        generation: which of the context's texts each is part of, from 0, (N,).
        requests: B, if targets were given one a request; None if one target is for all.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.requests: int | None = None
        self.example = self.token = self.generation = torch.zeros(0, dtype=torch.long)

    @property
    def request(self) -> Tensor:
        """The request that each belongs to, (N,)."""
        return self.example // self.scope.repeats

    def take(self, pairs: "ScopePairs") -> None:
        """Hold the same pairs as another."""
        self.example, self.token = pairs.example, pairs.token
        self.generation = pairs.generation

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,)."""
        return (len(self.token),)

    def per_request(self, classes: Tensor, name: str) -> Tensor:
        """Integer classes one a request, (B,), or (1,) for all.

        Raises:
            TargetError: another shape, or another number of requests than before.
        """
        if classes.ndim == 0:
            return classes.reshape(1)
        if classes.ndim != 1 or self.requests not in (None, len(classes)):
            known = "(B,)" if self.requests is None else f"({self.requests},)"
            raise TargetError(
                f"{name} has shape {tuple(classes.shape)}; in the scope {self.scope.region!r} give "
                f"one number, or {known} for one class a request"
            )
        self.requests = len(classes)
        return classes


class ScopeRows:
    """Follows the forward passes of a context, and finds a scope's tokens in each.

    Args:
        scope: what to find.
        requests: B, where it is known.
    """

    def __init__(self, scope: Scope, requests: int | None) -> None:
        self.scope, self.requests = scope, requests
        self.pairs = ScopePairs(scope)
        self.generation, self.prompt_length = -1, 0
        self.last: ForwardCall | None = None
        self.fired = False
        self._seen = torch.zeros(0, 0, dtype=torch.long)

    @property
    def watched(self) -> "ScopeRows":
        """What is to see every call."""
        return self

    def see(self, call: ForwardCall) -> None:
        """Take notice of a forward pass that is about to run.

        Raises:
            PositionError: another batch size, or a call of which one cannot say whether it reads
                prompt or new tokens.
        """
        repeats, last = self.scope.repeats, self.last
        if self.requests is not None and call.batch != self.requests * repeats:
            raise PositionError(wrong_batch("targets", self.requests, repeats, call.batch))
        if call.batch % repeats:
            raise PositionError(
                f"a batch of {call.batch} rows is no multiple of the scope's repeats, {repeats}: "
                f"repeats is the number of rows for each request (num_beams or "
                f"num_return_sequences of generate)"
            )
        if call.past:
            self._check_step(call)
        if last is None or not (call.past or _extends(last, call)):
            self.generation += 1
            self.prompt_length = self.scope.prompt_length or call.length
            self._seen = torch.full((call.batch, 0), -1)
        self.last = call

    def _check_step(self, call: ForwardCall) -> None:
        """Raise unless a call with a past goes on with the text that was seen so far."""
        last, length = self.last, self.scope.prompt_length
        if last is None:
            first = length if self.scope.region == "generated" and length is not None else 0
            if call.past > first:
                raise PositionError(
                    f"the first call in the context goes on from {call.past} tokens in the cache, "
                    f"which were not edited in the scope {self.scope.region!r}; open the context "
                    f"before the prompt is read, or use 'generated' with Scope(prompt_length=...)"
                )
            return
        if call.batch != last.batch:
            raise PositionError(
                f"a call with a cache has {call.batch} rows, the text before it had {last.batch}; "
                f"edit texts of other batches in a context of their own"
            )
        if length is None and (call.length > 1 or call.past != last.past + last.length):
            raise PositionError(
                f"a call reads {call.length} tokens after {call.past} in the cache, where "
                f"{last.past + last.length} had been read: a prompt in chunks, a further turn, or "
                f"assisted decoding. Say where the prompt ends: "
                f"Scope({self.scope.region!r}, prompt_length=inputs['input_ids'].shape[1])"
            )

    def rows(self, call: ForwardCall, device: torch.device) -> Rows | None:
        """The scope's tokens in a call, or None."""
        columns = torch.arange(call.past, call.past + call.length)
        if self.scope.region == "all":
            inside = torch.ones_like(columns, dtype=torch.bool)
        else:
            inside = (columns < self.prompt_length) == (self.scope.region == "prompt")
        if not bool(inside.any()):
            return None
        chosen = inside.expand(call.batch, -1)
        real = call.real()
        if real is not None:
            chosen = chosen & real.cpu()
        example, column = chosen.nonzero(as_tuple=True)
        if not len(example):
            return None
        token = column + call.past
        index = self._number(example, token, call.past + call.length)
        request = example // self.scope.repeats
        parts = (part.to(device) for part in (index, example, token, column, request))
        return Rows(index, *parts)

    def _number(self, example: Tensor, token: Tensor, end: int) -> Tensor:
        """Numbers of pairs in order of appearance, (n,); a token read again keeps its own."""
        if end > self._seen.shape[1]:
            room = torch.full((len(self._seen), end - self._seen.shape[1]), -1)
            self._seen = torch.cat([self._seen, room], 1)
        new = self._seen[example, token] < 0
        pairs, count = self.pairs, int(new.sum())
        if count:
            numbers = len(pairs.token) + torch.arange(count)
            self._seen[example[new], token[new]] = numbers
            pairs.example = torch.cat([pairs.example, example[new]])
            pairs.token = torch.cat([pairs.token, token[new]])
            text = torch.full((count,), self.generation)
            pairs.generation = torch.cat([pairs.generation, text])
        return self._seen[example, token]

    def mark(self, rows: Rows) -> None:
        """Note that an edit ran."""
        self.fired = True

    def missed(self) -> str | None:
        """What to say if no token was edited."""
        if self.fired:
            return None
        region = self.scope.region
        if self.last is None:
            return f"never ran in the scope {region!r}: run the model inside the context"
        if region == "generated":
            return (
                "never ran in the scope 'generated': the model read no new token after its prompt "
                f"of {self.prompt_length} columns. The last new token is never read back, so "
                "max_new_tokens must be at least 2; and a text given as a whole counts as prompt, "
                "unless Scope(prompt_length=...) says where it ends"
            )
        return (
            f"never ran in the scope {region!r}: no call reached the site with a token of the "
            f"scope that the attention mask shows"
        )


def _extends(last: ForwardCall, call: ForwardCall) -> bool:
    """Whether a call without cache reads the text of the last one and one token more."""
    before, now = last.tokens, call.tokens
    if last.past or last.continues or call.continues or call.length != last.length + 1:
        return False
    if before is None or now is None or last.batch != call.batch or before.ndim != now.ndim:
        return False
    if torch.equal(now[:, :-1], before):
        return True
    # Beams change places, so each row must go on with some row, not with its own.
    same = (now[:, None, :-1] == before[None]).flatten(2).all(-1)
    return bool(same.any(1).all())
