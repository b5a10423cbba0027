"""What a forward pass was given, and which text it goes on with, however it was called."""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from operator import is_
from threading import get_ident
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import PositionError, capturing, concrete, readable, trace, warn
from lrqp_torch.stream import repeats
from lrqp_torch.stream.compiled import inner_model, unwrapped

CACHES = ("cache", "past_key_values", "cache_params")
"""Names that transformers has given to a model's KV cache, the newest first."""

UNSAID = -1
"""How many tokens are in a cache that holds some and does not say how many, in a graph."""

_HIDDEN = -1e4
"""Additive attention masks hide with numbers below this."""


LEFT_PADDED = (
    "left-padded batch without position_ids: this model counts the padding as text. "
    "Pass position_ids=lrqp_torch.position_ids(attention_mask), or pad on the right"
)


class LeftPaddingWarning(UserWarning):
    """A left-padded batch without ``position_ids`` on a model with learned positions."""


def forward_of(module: nn.Module) -> inspect.Signature:
    """What a model's class takes, whatever its ``forward`` was wrapped in or replaced by."""
    return _signature(type(inner_model(module)).forward)


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def positional(module: nn.Module) -> tuple[str, ...]:
    """Names of what a model's class takes by position."""
    return _positional(type(inner_model(module)).forward)


@functools.cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a method takes by position, without ``self``."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    known = [p.name for p in _signature(forward).parameters.values() if p.kind in kinds]
    return tuple(known[1:])


def arguments_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """The arguments of a call of ``module`` by their names, however they were passed.

    ``names``: see :func:`positional`.

    Raises:
        PositionError: the call does not fit the signature of the class.
    """
    if not args:
        return dict(kwargs)
    names = positional(module) if names is None else names
    if len(args) <= len(names) and kwargs.keys().isdisjoint(names[: len(args)]):
        return dict(zip(names, args, strict=False)) | dict(kwargs)
    signature = forward_of(module)
    try:
        given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    except TypeError as error:
        raise PositionError(
            f"the call of {type(unwrapped(module)).__name__} cannot be understood ({error}); "
            f"pass its arguments by name"
        ) from error
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


_NO_CACHE = bool, Tensor
_PLAIN = frozenset((type(None), bool, int, str, Tensor))
_is_tensor = partial(is_, Tensor)


def _may_be_cache(kind: type) -> bool:
    return kind not in _PLAIN


def cache_among(given: Mapping[str, Any]) -> Any:
    """The cache among named arguments or results of a model, whatever its name; or None.

    Raises:
        PositionError: there are several.
    """
    found = {}
    for name, value in given.items():
        if value is None or isinstance(value, _NO_CACHE):
            continue
        if name in CACHES or is_cache(value):
            found[id(value)] = value
    if len(found) > 1:
        raise PositionError(
            f"the model has {len(found)} caches ({', '.join(map(_kind, found.values()))}), of "
            f"which one cannot say which holds the text"
        )
    return next(iter(found.values()), None)


def is_cache(value: object) -> bool:
    """Whether something looks like a cache of transformers."""
    return hasattr(value, "get_seq_length") or _kind(value).endswith("Cache")


def name_of_cache(model: nn.Module) -> str:
    """The name under which the model takes its KV cache."""
    known = forward_of(model).parameters
    return next((name for name in CACHES if name in known), CACHES[0])


def puts_tokens_in_front(model: nn.Module) -> bool:
    """Whether a model has an adapter that does so: prompt, prefix or p-tuning of peft."""
    plain = unwrapped(model)
    if not hasattr(type(plain), "active_peft_config"):
        return False
    return bool(getattr(cast(Any, plain).active_peft_config, "is_prompt_learning", False))


def _kind(value: object) -> str:
    return type(value).__name__


def length_of(cache: Any) -> Any:
    """How many tokens a cache says that it holds, a number or a tensor; None if it does not.

    ``torch.compile`` traces it too.
    """
    try:
        length = cache.get_seq_length()
    except (AttributeError, NotImplementedError, ValueError, TypeError):
        return None
    if type(length) is int and length == 0:
        # It speaks of its first layer, which may attend linearly and hold no keys.
        for layer in getattr(cache, "layers", ()):
            held = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
            if isinstance(held, Tensor) or held > 0:
                return held
    return length


def held_by(cache: Any, given: Mapping[str, Any]) -> Any:
    """:func:`length_of`; 0 where it does not say but is empty, None where it is not empty."""
    length = length_of(cache)
    if length is not None:
        return length
    try:
        return None if cache.has_previous_state() else 0
    except (AttributeError, NotImplementedError, ValueError):
        at = given.get("cache_position")
        return 0 if isinstance(at, Tensor) and int(at.flatten()[0]) == 0 else None


def _held(cache: Any, given: Mapping[str, Any]) -> int | None:
    """The same as a number."""
    held = held_by(cache, given)
    return None if held is None else int(held)


@dataclass(eq=False)
class Text:
    """A text, or a batch of them, that one or more calls read from its beginning on."""

    number: int  # of the context's texts, from 0
    batch: int  # rows
    prompt: int  # tokens of the first call
    front: int  # columns that an adapter put in front of it (prompt and prefix tuning)
    began: int  # number of the first call, among those of the context
    cache: Any = None  # a weak reference to its cache, if it has one
    # Without a cache, the text that has one token less, if it is a text of its own.
    after: "Text | None" = None
    end: int = 0  # how far it has been read
    last: int = -1  # number of the latest call; -1 before the first
    tokens: Tensor | None = None  # of the latest call, where there is no cache


@dataclass(eq=False)
class ForwardCall:
    """What a forward pass was given, in columns of the caller's own text."""

    batch: int  # B; of inputs (B, choices, T), which models flatten, B · choices
    length: int  # tokens in this call
    past: int  # tokens before, which are in the KV cache
    mask: Tensor | None  # attention mask over past and present tokens, (B, past + length), or None
    # A mask of queries and keys, as calls with a static cache have it, or None.
    square: Tensor | None
    # Whether the call fills a KV cache, so that later calls may bring further tokens.
    continues: bool
    tokens: Tensor  # the tokens, (B, front + length), or their embeddings
    front: int  # columns of this call that an adapter put in front of the text
    text: Text  # which text it reads
    meanwhile: list[Text]  # texts that began since the text's call before
    again: bool = False  # whether it only computes once more what has been noted already
    like: bool = False  # whether it is like the call before; what it returns is then like that, too
    same: "ForwardCall | None" = None  # what stands for all calls that are like this one
    # Of a call without a cache, by whose they are: what scopes found in it, should it run again.
    found: dict[object, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Tokens of the text so far."""
        return self.past + self.length

    def real(self, begin: int | None = None, end: int | None = None) -> Tensor | None:
        """Which tokens of this call are text and not padding, (B, length) bool; None if all are.

        ``begin`` and ``end``: of which columns of the text; by default all of this call.

        In a four-dimensional mask, padding is what does not see itself.

        Raises:
            PositionError: a mask that does not reach to the end of this call.
        """
        given = self.mask if self.square is None else self.square
        if given is None:
            return None
        if not concrete(given):
            raise PositionError(
                "vmap hides the attention mask, so what is padding is not known: give positions by "
                "number, or run the texts without a mask"
            )
        if given.shape[-1] < self.end:
            raise PositionError(
                f"the attention mask has {given.shape[-1]} columns, the text {self.end}, so it "
                f"does not say what is padding: give the mask of past and present tokens, and do "
                f"not use a static cache with a sliding window in a scope"
            )
        begin, end = self.past if begin is None else begin, self.end if end is None else end
        if self.square is None:
            return given[:, begin:end].ne(0)
        own = given[:, 0, :, self.past : self.end].diagonal(dim1=-2, dim2=-1)
        own = (own if own.dtype == torch.bool else own > _HIDDEN).expand(self.batch, -1)
        return own[:, begin - self.past : end - self.past]

    def given(self, length: int) -> dict[str, Tensor]:
        """The first ``length`` tokens or embeddings of this call, as a model takes them.

        Raises:
            PositionError: under ``vmap``, which hides them.
        """
        if not concrete(self.tokens):
            raise PositionError("vmap hides the tokens: give positions by number, not by function")
        name = "input_ids" if self.tokens.ndim == 2 else "inputs_embeds"
        return {name: self.tokens[:, self.front : self.front + length]}


@dataclass(eq=False)
class _Like:
    """What a call was given, for calls that are given the same but for other tokens."""

    # By name: what has to be the same object; `Tensor` where any tensor may stand.
    given: dict[str, Any]
    tokens: tuple[str, torch.Size]  # the name and shape of the tokens
    mask: "SeenMask"
    # The name of the cache and a weak reference to it, or None.
    cache: tuple[str, Callable[[], Any]] | None
    call: ForwardCall  # what the call was


class _Same(NamedTuple):
    """What a call was given that read one token more of a text, for calls that read one more again:
    told by the objects' numbers, so the objects are held.
    """

    names: list[str]  # of those that were given by name, which are behind the others
    numbers: list[int]  # of the objects; 0 in place of those that may be others
    held: list[Any]
    place: int  # of the tokens
    call: ForwardCall  # that of the latest token
    cache: Callable[[], Any]
    others: tuple[int, ...]  # where any tensor may stand
    mask: int | None  # where it is


class SeenMask:
    """An attention mask, or none, as it was: told by its values where these can be looked at, which
    sees what NumPy and ``.data`` write to it; else by how often it was written to.
    """

    def __init__(self, mask: Tensor | None) -> None:
        self.given: Callable[[], Tensor | None] = nothing if mask is None else weakref.ref(mask)
        self.copy = self.count = None
        if mask is not None and concrete(mask):
            self.count = trace(mask)[1]
            self.copy = mask.clone() if readable(mask) else None

    def is_still(self, mask: Tensor | None) -> bool:
        """Whether a mask is that one, and unchanged as far as one can know."""
        if mask is None or mask is not self.given():
            return mask is None and self.given is nothing
        if self.copy is not None:
            return torch.equal(self.copy, mask)
        return self.count is not None and trace(mask)[1] == self.count


def nothing() -> None:
    """In place of a reference to no mask."""


_NO_TOKENS = torch.empty(0)


class Texts:
    """The texts that the passes of one context read, told apart by their caches or their tokens.

    Args:
        absolute_positions: whether the model counts columns where it is given no ``position_ids``,
            and to warn of padding that it would count.
        has_adapter: whether an adapter puts tokens in front of every text.
        compares: whether texts without a cache must be told apart.
        counts: whether it matters how many there are.
    """

    def __init__(
        self, absolute_positions: bool, has_adapter: bool, compares: bool, counts: bool = True
    ) -> None:
        self._absolute, self._has_adapter = absolute_positions, has_adapter
        self._compares, self._counts = compares, counts
        self._like: _Like | None = None
        self._read: _Like | None = None
        self._same: _Same | None = None
        # A call that compiled code notes, how often it has, and the tokens of the latest.
        self._begun: tuple[ForwardCall, repeats.Begin, list[Any]] | None = None
        # Whether each call must be an object of its own, also one like the call before.
        self.distinct = False
        self._known: list[Text] = []
        self._n_calls = self._n_texts = 0
        # What would have been said, had the device been waited for; and whether it was.
        self._padded_left: Tensor | None = None
        self._elsewhere: Tensor | None = None
        self._warned = False

    @property
    def front(self) -> int:
        """How many tokens an adapter has put in front of any text."""
        return max((text.front for text in self._known), default=0)

    def read(
        self, given: Mapping[str, Any], prompt: Any = None, held: Tensor | int | None = None
    ) -> ForwardCall:
        """A call from its arguments by name.

        Args:
            given: the arguments of the trunk.
            prompt: what an adapter has just put in front: embeddings (B, front, d), or a cache.
            held: how many tokens the cache of a compiled graph holds, which is not given itself;
                or UNSAID.

        Raises:
            PositionError: one cannot say what the call reads.
        """
        self._settle()
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        found = embeddings if ids is None else ids
        if not isinstance(found, Tensor):
            raise PositionError("the model was called without input_ids or inputs_embeds")
        # Inputs (B, choices, T) are read as B · choices rows.
        lead = found.ndim - (3 if ids is None else 2)
        tokens = found.flatten(0, lead) if lead > 0 else found
        front = prompt.shape[1] if isinstance(prompt, Tensor) and ids is None else 0
        kinds, held_alike, others = [*map(type, given.values())], dict(given), dict[str, Any]()
        if not _PLAIN.issuperset(kinds):
            others = {n: held_alike.pop(n) for n in compress(given, map(_may_be_cache, kinds))}
        for name in compress(given, map(_is_tensor, kinds)):
            held_alike[name] = Tensor
        cache = cache_among(others) if others else None
        own = None if cache is prompt else cache
        continues = given.get("use_cache") is True or own is not None
        if held is None:
            text, past = self._text(tokens, front, cache, own, continues, given)
        else:
            text, past = self._text_holding(tokens, held)
        mask, square = given.get("attention_mask"), None
        # Models with several kinds of attention take a mask for each.
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if isinstance(mask, Tensor) and not concrete(mask):  # which transforms keep for themselves
            mask, square = (mask, None) if mask.ndim == 2 else (None, mask)
        elif isinstance(mask, Tensor):
            mask = mask.flatten(0, lead) if lead > 0 and mask.ndim == 2 + lead else mask
            # Masks of queries and keys may be the caller's own, and need say nothing of padding.
            square = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else None
            square = None if square is None else square[:, :, front:, text.front :]
            mask = None if mask.ndim != 2 else mask[:, text.front :] if text.front else mask
        unaware = self._absolute and given.get("position_ids") is None
        if mask is not None and unaware and text.last < 0 and concrete(mask):
            self._look_for_left_padding(mask)
        meanwhile = [other for other in self._known if 0 <= text.last < other.began]
        rows, columns = tokens.shape[0], tokens.shape[1] - front
        call = ForwardCall(
            rows, columns, past, mask, square, continues, tokens, front, text, meanwhile
        )
        self._remember(given, call, own, held_alike, others)
        return call

    def _remember(
        self,
        given: Mapping[str, Any],
        call: ForwardCall,
        own: Any,
        held: dict[str, Any],
        others: Mapping[str, Any],
    ) -> None:
        """Keep what a call was given, where a call like it can be known by that alone."""
        mask, cache = given.get("attention_mask"), None
        name = "inputs_embeds" if given.get("input_ids") is None else "input_ids"
        self._like = self._read = self._same = None
        flat = call.square is None and given[name].ndim == (2 if name == "input_ids" else 3)
        if not flat or self._has_adapter or call.front or (own is None) == call.continues:
            return
        for key, value in others.items():
            if own is not None and value is own:
                cache = key, weakref.ref(own)
            elif isinstance(value, Tensor):
                held[key] = Tensor
            elif isinstance(value, int | str):
                held[key] = value
            else:
                return
        self._read = _Like(held, (name, given[name].shape), SeenMask(mask), cache, call)

    def _same_as(self, call: ForwardCall) -> ForwardCall:
        """What stands for calls like this one."""
        same = object.__new__(ForwardCall)
        same.__dict__ = {**vars(call), "like": True, "same": None if self.distinct else same}
        return same

    def accept(self) -> None:
        """Let what was read last stand for calls like it: nobody has refused it."""
        self._like = self._read

    def like(self, given: Mapping[str, Any], by_place: int = 0) -> ForwardCall | None:
        """The call of these arguments, if all but the tokens is as in the call before, or if they
        are one token more of the same text; else, or where that is not certain, None.

        ``by_place``: how many of them were given by position, the first ones.
        """
        self._settle()
        like = self._like
        if like is None or len(given) != len(like.given) + (like.cache is not None):
            return None
        for name, value in given.items():
            old = like.given.get(name, like)
            if value is old or (old is Tensor and isinstance(value, Tensor)):
                continue
            if like.cache is None or name != like.cache[0] or like.cache[1]() is not value:
                return None
        tokens, mask, call = given[like.tokens[0]], given.get("attention_mask"), like.call
        if tokens.shape != like.tokens[1] or (mask is not None and mask.ndim != 2):
            return None
        if like.cache is None:
            if self._counts or not like.mask.is_still(mask):
                return None
            if call.same is None or self.distinct:
                call.same = self._same_as(call)
            call.same.tokens = tokens
            return call.same
        text = call.text
        if tokens.shape[1] != 1 or text.last != self._n_calls - 1:
            return None
        held = length_of(given[like.cache[0]])
        if isinstance(held, Tensor) or held != text.end:
            return None
        again = object.__new__(ForwardCall)
        new = {"past": held, "mask": mask, "tokens": tokens, "meanwhile": [], "like": True}
        again.__dict__ = vars(call) | new
        self._keep(given, by_place, like.tokens[0], like.cache, again)
        return again

    def _keep(
        self,
        given: Mapping[str, Any],
        by_place: int,
        tokens: str,
        cache: tuple[str, Callable[[], Any]],
        call: ForwardCall,
    ) -> None:
        """Keep what a call was given that read one token more, for :meth:`again`."""
        if self.distinct:
            return
        names, values = [*given], [*given.values()]
        # The cache is held as weakly as elsewhere, and other tensors come with each token.
        values[names.index(cache[0])] = None
        numbers = [*map(id, given.values())]
        others = tuple(n for n, value in enumerate(values) if isinstance(value, Tensor))
        for other in others:
            numbers[other], values[other] = 0, None
        mask = names.index("attention_mask") if given.get("attention_mask") is not None else None
        place = names.index(tokens)
        self._same = _Same(names[by_place:], numbers, values, place, call, cache[1], others, mask)

    def again(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardCall | None:
        """The call before with one token more of its text, where these arguments are the same
        objects otherwise and :meth:`like` has said that they may be; else None.
        """
        same = self._same
        values: list[Any] = [*args, *kwargs.values()]
        if same is None or len(values) != len(same.held) or [*kwargs] != same.names:
            return None
        place, call = same.place, same.call
        tokens, numbers = values[place], [*map(id, values)]
        for other in same.others:
            numbers[other] = 0
            if not isinstance(values[other], Tensor):
                return None
        if numbers != same.numbers or not isinstance(tokens, Tensor):
            return None
        if tokens.shape != call.tokens.shape:
            return None
        # An object of the same number is the same one as long as that one is there.
        cache, text = same.cache(), call.text
        mask = None if same.mask is None else values[same.mask]
        if self._begun is not None:
            self._settle()
        if cache is None or text.last != self._n_calls - 1 or (mask is not None and mask.ndim != 2):
            return None
        # It has said so for the call before.
        held = cache.get_seq_length()
        if type(held) is not int or held != text.end:
            return None
        call.past, call.mask, call.tokens = held, mask, tokens
        return call

    def repeated(
        self,
        call: ForwardCall,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        **whose: Any,
    ) -> repeats.Function | None:
        """A function that notes a call like this one once more, and that it is under way, where
        these arguments are the same objects but for other tokens; else None, or it gives None.

        Args:
            call: under way, and accepted.
            args: of the trunk.
            kwargs: of the trunk.
            whose: the objects that ``rows.c`` needs to know whose pass it is: ``open``,
                ``opening``, ``calls``.
        """
        self._settle()
        if self._begun is not None:
            self._begun[1].place, self._begun = -1, None
        like, same = self._like, call.same
        if like is None or same is None or not repeats.available():
            return None
        values, mask, copy = [*args, *kwargs.values()], call.mask, like.mask.copy
        places = [place for place, value in enumerate(values) if value is call.tokens]
        own = repeats.Begin(thread=get_ident(), version=-1, masked_at=-1)
        if len(places) != 1 or not repeats.see(call.tokens, own.tokens):
            return None
        if mask is not None:
            own.masked_at = next((i for i, value in enumerate(values) if value is mask), -1)
            if own.masked_at < 0 or (copy is None and like.mask.count is None):
                return None
            if copy is None:
                own.version, own.mask = like.mask.count, id(mask)
            elif mask.is_contiguous() and copy.is_contiguous() and repeats.see(mask, own.masked):
                own.copy, own.bytes, mask = copy.data_ptr(), copy.nbytes, None
            else:
                return None
        # In place of a tensor any other may stand, so none of the caller's is held.
        values = [Tensor if type(value) is Tensor else value for value in values]
        own.place, latest = places[0], [call.tokens, call.mask]
        if any(isinstance(value, Tensor) for value in values):
            return None
        held = whose | {"call": same, "names": (*kwargs,), "values": (*values,), "latest": latest}
        for name, value in held.items():
            setattr(own, name, id(value))
        self._begun = same, own, latest
        return repeats.bound("begin", own, held, like.mask, mask)

    def belong(self, opening: Any) -> None:
        """Let the function that notes calls act for another opening of their context."""
        if self._begun is not None:
            self._begun[1].opening = id(opening)

    def stand(self, call: ForwardCall, shape: torch.Size) -> bool:
        """Let calls that are like this one be known from now on, if its tokens have a shape."""
        like = self._like
        if like is None or like.call is not call or like.tokens[1] != shape:
            return False
        if like.cache is None and not (self._counts or self.distinct):
            call.same = self._same_as(call)
        return True

    def keep(self) -> ForwardCall | None:
        """What is known of calls like the last ones, with nothing of the caller's: what begins is
        then read by another context, as if its first call were one of these; or None.
        """
        self._settle()
        like, begun = self._like, self._begun
        if like is None or begun is None or begun[0] is not like.call.same:
            return None
        (call, own, latest), text = begun, like.call.text
        if own.place < 0 or own.mask or call.past or call.meanwhile or text.after or self._warned:
            return None
        for one in (like.call, call):
            one.tokens, one.mask = _NO_TOKENS, None
        text.number = text.began = text.end = 0
        text.last, text.cache, text.tokens = -1, None, None
        self._known, self._n_calls, self._n_texts = [text], 0, 1
        self._padded_left = self._elsewhere = None
        latest[:] = None, None
        return call

    def first(self) -> None:
        """The first call of a context is noted, which is like those of an earlier one."""
        assert self._begun is not None
        call, _, latest = self._begun
        call.tokens, call.mask = latest
        # What it returns is looked at, as that of any first call.
        call.like = False

    @property
    def n_calls(self) -> int:
        """How many calls there were."""
        self._settle()
        return self._n_calls

    def _settle(self) -> None:
        """Take notice of calls that were noted by compiled code."""
        if self._begun is not None and self._begun[1].count:
            call, begun, latest = self._begun
            self._n_calls += begun.count - 1
            begun.count = 0
            self.note(call, latest[0])

    def _look_for_left_padding(self, mask: Tensor) -> None:
        shown = mask[:, 0].all()
        if not shown.is_cpu:
            self._padded_left = ~shown if self._padded_left is None else self._padded_left | ~shown
        elif not bool(shown):
            self._warned = True
            warn(LeftPaddingWarning, LEFT_PADDED)

    def renew(self) -> None:
        """Know of nothing, as a context does when it opens."""
        self.forget()
        self.__init__(self._absolute, self._has_adapter, self._compares, self._counts)  # type: ignore[misc]

    def forget(self) -> None:
        """Know no call by the one before any more, as no further one is read."""
        same = None if self._like is None else self._like.call.same
        if same is not None:
            same.same = None
        self._like = self._read = self._same = self._begun = None

    def finish(self) -> None:
        """Say what was not waited for; called when a context has closed.

        Raises:
            PositionError: a cache on a GPU held other tokens than those read into it.
        """
        if self._padded_left is not None and bool(self._padded_left):
            warn(LeftPaddingWarning, LEFT_PADDED)
        if self._elsewhere is not None and bool(self._elsewhere):
            raise PositionError(
                "a static cache was emptied or cut between two calls of one token, which is not "
                "seen on a GPU while they run, so positions after it were wrong: begin a text with "
                "a call of more tokens, or in a context of its own"
            )

    def _text(
        self,
        tokens: Tensor,
        front: int,
        cache: Any,
        own: Any,
        continues: bool,
        given: Mapping[str, Any],
    ) -> tuple[Text, int]:
        """Which text a call reads, and how much of it has been read before."""
        past, after = 0, None
        if own is not None:
            known = self._in(own)
            if known is not None and known.end and tokens.shape[1] == 1:
                # What a static cache holds is on the device; where one token more is read, the text
                # goes on, and that is checked when the context closes.
                there = length_of(own)
                if isinstance(there, Tensor) and not there.is_cpu and concrete(there):
                    self._check_later(there, known)
                    return known, known.end
            held = _held(own, given)
            if known is not None and held != 0:
                return known, known.end if held is None else held - known.front
            if held is None:
                raise PositionError(
                    f"the model was given a {_kind(own)}, which does not say how many tokens it "
                    f"holds, so positions in the text cannot be told: open the context before the "
                    f"text is begun, or run the model without it (use_cache=False)"
                )
            if held and self._has_adapter:
                raise PositionError(
                    "the cache was begun before the context, so one cannot say whether it holds "
                    "the adapter's virtual tokens: open the context before the text"
                )
            past = held
        elif cache is not None:  # a prefix that an adapter has put into it
            front = _held(cache, given) or 0
        elif not continues and self._compares and self._known:
            after = next(self._extended_by(tokens), None)
            if after is not None and _generating():
                return after, 0
        columns = tokens.shape[1] - (0 if cache is not None and own is None else front)
        text = self._add(tokens, front, columns, after)
        text.cache = weakref.ref(cache) if cache is not None and continues else None
        return text, past

    def _check_later(self, held: Tensor, text: Text) -> None:
        """Keep whether a cache on a device holds other tokens than those of a text. (A CUDA graph,
        each replay of which reads a further token, cannot tell.)
        """
        if not capturing(held):
            wrong = held != text.end + text.front
            self._elsewhere = wrong if self._elsewhere is None else self._elsewhere | wrong

    def _add(
        self, tokens: Tensor, front: int, columns: int | None = None, after: Text | None = None
    ) -> Text:
        """A further text."""
        columns = tokens.shape[1] if columns is None else columns
        text = Text(self._n_texts, len(tokens), columns, front, self._n_calls, after=after)
        # Of texts without a cache two take turns in guidance; those whose cache is gone have ended.
        if self._known:
            alive = [text for text in self._known if text.cache is not None and text.cache()]
            alive += [text for text in self._known if text.cache is None][-3:]
            for gone in set(self._known).difference(alive):
                gone.tokens = None
            self._known = alive
        self._known.append(text)
        self._n_texts += 1
        return text

    def _text_holding(self, tokens: Tensor, held: Tensor | int) -> tuple[Text, int]:
        """The same in a compiled graph, which knows of a cache only how many tokens it holds."""
        begun = [text for text in reversed(self._known) if text.end and text.batch == len(tokens)]
        if isinstance(held, Tensor) and not held.is_cpu and begun and tokens.shape[1] == 1:
            self._check_later(held, begun[0])
            return begun[0], begun[0].end
        held = int(held)
        unsaid = held == UNSAID
        same = [text for text in begun if held and (unsaid or text.end + text.front == held)]
        if len(same) > 1 or (unsaid and not same):
            texts = f"{len(same)} texts{'' if unsaid else f' of {held} tokens'} take turns"
            raise PositionError(
                f"{texts if same else 'a text goes on that began before the context'} in a "
                f"compiled graph, which cannot tell their caches apart: run the model without "
                f"compilation"
            )
        if unsaid:
            return same[0], same[0].end
        return (same[0], held - same[0].front) if same else (self._add(tokens, 0), held)

    def _in(self, cache: Any) -> Text | None:
        """The text whose cache this is."""
        # The newest: a static cache is emptied and filled again.
        texts = (text for text in reversed(self._known) if text.cache is not None)
        return next((text for text in texts if text.cache() is cache), None)

    def note(self, call: ForwardCall, tokens: Tensor) -> None:
        """Take notice that a call is about to run, with these tokens."""
        text = call.text
        text.end, text.last = call.past + call.length, self._n_calls
        text.tokens = None
        if self._compares and not call.continues and (call.like or concrete(tokens)):
            text.tokens = tokens.detach() if tokens.requires_grad else tokens
        self._n_calls += 1

    def note_result(self, call: ForwardCall, output: Any) -> None:
        """Take notice of what a call returns: it may be a cache that the model has made itself."""
        if call.text.cache is not None:
            return
        if isinstance(output, dict | Mapping):
            parts: Iterable[tuple[Any, Any]] = output.items()
        elif isinstance(output, tuple):
            parts = enumerate(output)
        else:
            return
        others = {str(k): v for k, v in parts if v is not None and type(v) is not Tensor}
        cache = cache_among(others) if others else None
        call.text.cache = None if cache is None else weakref.ref(cache)

    def _extended_by(self, tokens: Tensor) -> Iterator[Text]:
        """Texts without a cache that have one token less than these."""
        rows, columns = tokens.shape[:2]
        for text in reversed(self._known):
            before = text.tokens
            if before is None or before.shape[:2] != (rows, columns - 1) or before.is_meta:
                continue
            if before.ndim != tokens.ndim or before.dtype != tokens.dtype or not concrete(tokens):
                continue
            # Beams change places, so each row must go on with some row, not with its own.
            if torch.equal(tokens[:, :-1], before) or bool(
                (tokens[:, None, :-1] == before[None]).flatten(2).all(-1).any(1).all()
            ):
                yield text


def _generating() -> bool:
    """Whether this is part of transformers' ``generate``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("transformers.generation"):
            return True
        frame = frame.f_back
    return False
