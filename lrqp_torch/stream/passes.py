"""Whose forward pass it is: what a model was given, in which context, and in which text.

A context acts on passes of the thread that opened it (more exactly, of its :mod:`contextvars`
context, which ``asyncio.to_thread`` takes along), on the model itself and not on copies of it, and
until it closes. Passes of other threads stay untouched, and are named where an edit was missed.
"""

import contextvars
import functools
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import (
    EditNeverFiredError,
    PositionError,
    concrete,
    in_transforms,
    outside_transforms,
    unwrapped,
)
from lrqp_torch.stream.compiled import run_eagerly
from lrqp_torch.stream.compiled import unwrapped as uncompiled
from lrqp_torch.stream.sites import inner_model, layout_of, trunk_of

CACHES = ("cache", "past_key_values", "cache_params")
"""Names that transformers has given to a model's KV cache, the newest first."""

_HIDDEN = -1e4
"""Additive attention masks hide with numbers below this."""

_UNCACHED = 4
"""So many texts without a cache are remembered: guidance has two that take turns."""

_open: contextvars.ContextVar[tuple["Watch", ...]] = contextvars.ContextVar("open", default=())


class LeftPaddingWarning(UserWarning):
    """A left-padded batch without ``position_ids`` on a model with learned positions."""


def forward_of(module: nn.Module) -> inspect.Signature:
    """What a model's class takes, whatever its ``forward`` was wrapped in or replaced by."""
    plain = uncompiled(module)
    if hasattr(plain, "get_base_model"):
        plain = cast(Any, plain).get_base_model()
    return _signature(type(plain).forward)


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def arguments_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of ``module`` by their names, however they were passed.

    Raises:
        PositionError: the call does not fit the signature of the class.
    """
    if not args:
        return dict(kwargs)
    signature = forward_of(module)
    try:
        given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    except TypeError as error:
        raise PositionError(
            f"the call of {type(uncompiled(module)).__name__} cannot be understood ({error}); "
            f"pass its arguments by name"
        ) from error
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def cache_among(given: Mapping[str, Any]) -> Any:
    """The cache among named arguments or results of a model, whatever its name; or None.

    Raises:
        PositionError: there are several.
    """
    found = {}
    for name, value in given.items():
        if value is None or isinstance(value, bool | Tensor):
            continue
        if name in CACHES or hasattr(value, "get_seq_length") or _kind(value).endswith("Cache"):
            found[id(value)] = value
    if len(found) > 1:
        raise PositionError(
            f"the model has {len(found)} caches ({', '.join(map(_kind, found.values()))}), of "
            f"which one cannot say which holds the text"
        )
    return next(iter(found.values()), None)


def name_of_cache(model: nn.Module) -> str:
    """The name under which the model takes its KV cache."""
    known = forward_of(model).parameters
    return next((name for name in CACHES if name in known), CACHES[0])


def _kind(value: object) -> str:
    return type(value).__name__


def _held(cache: Any, given: Mapping[str, Any]) -> int | None:
    """How many tokens a cache holds; None where it does not say, and is not empty."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, NotImplementedError, ValueError):
        pass
    try:
        return None if cache.has_previous_state() else 0
    except (AttributeError, NotImplementedError, ValueError):
        at = given.get("cache_position")
        return 0 if isinstance(at, Tensor) and int(at.flatten()[0]) == 0 else None


@dataclass(eq=False)
class Text:
    """A text, or a batch of them, that one or more calls read from its beginning on.

    Attributes:
        number: of the context's texts, from 0.
        batch: rows.
        start: tokens that its cache held when it was first seen.
        prompt: tokens of the first call.
        front: columns that an adapter put in front of it (prompt and prefix tuning).
        cache: a weak reference to its cache, if it has one.
        end: how far it has been read.
        began: number of the first call, among those of the context.
        last: number of the latest.
        tokens: of the latest call, where there is no cache.
        after: without a cache, the text that has one token less, if it is a text of its own.
    """

    number: int
    batch: int
    start: int
    prompt: int
    front: int
    cache: Any
    end: int = 0
    began: int = -1
    last: int = -1
    tokens: Tensor | None = None
    after: "Text | None" = None

    def holds(self, cache: Any) -> bool:
        """Whether the text is in this cache."""
        return self.cache is not None and self.cache() is cache


@dataclass(eq=False)
class ForwardCall:
    """What a forward pass was given, in columns of the caller's own text.

    Attributes:
        batch: B; of inputs (B, choices, T), which models flatten, B · choices.
        length: tokens in this call.
        past: tokens before, which are in the KV cache.
        mask: attention mask over past and present tokens, (B, past + length), or None.
        square: a four-dimensional attention mask, as calls with a static cache have it, or None.
        continues: whether the call fills a KV cache, so that later calls may bring further tokens.
        tokens: the tokens, (B, length), or their embeddings.
        front: columns of this call that an adapter put in front of the text.
        text: which text it reads.
        meanwhile: texts that began since the text's call before.
    """

    batch: int
    length: int
    past: int
    mask: Tensor | None
    square: Tensor | None
    continues: bool
    tokens: Tensor
    front: int
    text: Text
    meanwhile: tuple[Text, ...] = ()

    @property
    def end(self) -> int:
        """Tokens of the text so far."""
        return self.past + self.length

    def real(self) -> Tensor | None:
        """Which tokens of this call are text and not padding, (B, length) bool; None if all are.

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
        if self.square is None:
            return given[:, self.past : self.end].bool()
        own = given[:, 0, :, self.past : self.end].diagonal(dim1=-2, dim2=-1)
        return (own if own.dtype == torch.bool else own > _HIDDEN).expand(self.batch, -1)

    def given(self, length: int) -> dict[str, Tensor]:
        """The first ``length`` tokens or embeddings of this call, as a model takes them.

        Raises:
            PositionError: under ``vmap``, which hides them.
        """
        if not concrete(self.tokens):
            raise PositionError("vmap hides the tokens: give positions by number, not by function")
        name = "input_ids" if self.tokens.ndim == 2 else "inputs_embeds"
        return {name: self.tokens[:, self.front : self.front + length]}


class Follows(Protocol):
    """What is to see every call of a context, before it runs."""

    def see(self, call: ForwardCall) -> None:
        """Take notice of a call, or refuse it."""


class Hook:
    """A function that a module calls while a context is open, and that no copy of it takes along.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.function(*args, **kwargs)


class _Instead:
    """A method of one object that is replaced for as long as any context needs it."""

    def __init__(self, before: Any, function: Callable[..., Any]) -> None:
        self.before, self.function, self.users = before, function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def replace_method(
    stack: ExitStack, owner: nn.Module, name: str, change: Callable[..., Callable[..., Any]]
) -> None:
    """Let ``change(owner, method)`` stand for a method of one object until the stack closes."""
    own = vars(owner)
    held = own.get(name)
    if not isinstance(held, _Instead):
        held = own[name] = _Instead(held, change(owner, getattr(owner, name)))
    held.users += 1

    def restore(instead: _Instead = held) -> None:
        instead.users -= 1
        if not instead.users:
            del own[name]
            if instead.before is not None:
                own[name] = instead.before

    stack.callback(restore)


def hook(
    stack: ExitStack,
    module: nn.Module,
    function: Callable[..., Any],
    *,
    before: bool,
    prepend: bool = False,
    always: bool = False,
) -> None:
    """Call a function before or after a module's forward until the stack closes.

    Copies of the module that are made meanwhile, by ``deepcopy`` or ``pickle``, have no hook.
    """
    replace_method(stack, module, "__reduce_ex__", _reduce_plainly)
    if before:
        handle = module.register_forward_pre_hook(Hook(function), prepend=prepend, with_kwargs=True)
    else:
        handle = module.register_forward_hook(
            Hook(function), prepend=prepend, with_kwargs=True, always_call=always
        )
    stack.callback(handle.remove)


def _reduce_plainly(module: nn.Module, reduce: Callable[[int], Any]) -> Callable[[int], Any]:
    """What copies a module, without what contexts have put in."""

    def plain(protocol: int) -> Any:
        made = reduce(protocol)
        if not (isinstance(made, tuple) and len(made) > 2 and isinstance(made[2], dict)):
            return made
        state = {name: value for name, value in made[2].items() if not isinstance(value, _Instead)}
        ours = set()
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            ours |= {key for key, value in state[name].items() if isinstance(value, Hook)}
        for name, value in state.items():
            if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                state[name] = type(value)((k, v) for k, v in value.items() if k not in ours)
        return (*made[:2], state, *made[3:])

    return plain


@dataclass(eq=False)
class Watch:
    """The forward passes of a model that belong to one context.

    Args:
        model: a transformers model.
        follows: what is to see, and may refuse, every call.
        reruns: whether blocks run again in the backward pass (gradient checkpointing).
        warns: whether to warn of padding that the model takes for text.

    Attributes:
        others: names of other threads that ran the model meanwhile.
        closed: whether the context has closed.
    """

    model: nn.Module
    follows: Sequence[Follows] = ()
    reruns: bool = False
    warns: bool = True
    others: set[str] = field(default_factory=set, init=False)
    closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.trunk = trunk_of(self.model)
        self._absolute = layout_of(self.model).absolute_positions
        self._under_way: dict[int, ForwardCall] = {}
        self._latest: ForwardCall | None = None
        self._prompts: dict[int, Any] = {}
        self._outer: dict[int, dict[str, Any]] = {}
        self._entered: dict[int, ForwardCall] = {}
        self._threads: set[int] = set()
        self._texts: list[Text] = []
        self._n_texts = self._n_calls = 0

    @contextmanager
    def open(self, modules: Sequence[nn.Module] = ()) -> Iterator[ExitStack]:
        """Watch until the block ends; hooks go on the stack that this yields.

        Args:
            modules: those of the model, where they have been listed already.

        Raises:
            EditNeverFiredError: on closing without an error, while another thread of this context
                is still running the model.
        """
        with ExitStack() as stack:
            stack.enter_context(run_eagerly(self.model, modules))
            hook(stack, self.trunk, self._before, before=True)
            hook(stack, self.trunk, self._after, before=False, always=True)
            if hasattr(self.model, "get_prompt"):
                replace_method(stack, self.model, "get_prompt", _note_prompts)
            if self.model is not self.trunk and hasattr(self.model, "get_base_model"):
                hook(stack, self.model, self._before_adapter, before=True)
            _open.set((*_open.get(), self))
            try:
                yield stack
            finally:
                self.closed = True
                _open.set(tuple(watch for watch in _open.get() if watch is not self))
        self._check_ended()

    @property
    def front(self) -> int:
        """How many tokens an adapter has put in front of any text."""
        return max((text.front for text in self._texts), default=0)

    def acts(self) -> bool:
        """Whether what runs here and now belongs to this context."""
        # A backward pass that runs blocks again does so in threads of its own.
        return self in _open.get() or _in_backward()

    def call(self, stream: Tensor, entered: Tensor) -> ForwardCall | None:
        """The call in which a block has this stream, (B, T, d); None for passes of others.

        Args:
            stream: what is about to be edited or read.
            entered: what the block was given, by which it is known when it runs once more.

        Raises:
            PositionError: a stream that does not have the rows and columns of the call, or a block
                that runs outside of any call.
        """
        call = self._under_way.get(threading.get_ident())
        if call is None:
            if not self.acts():
                return None
            call = self._entered.get(entered.data_ptr()) if self.reruns else None
            call = call or self.current()
        elif self.reruns and concrete(entered):
            self._entered[entered.data_ptr()] = call
        if stream.ndim != 3 or stream.shape[:2] != (call.batch, call.front + call.length):
            raise PositionError(
                f"the stream is {tuple(stream.shape)}, but the model was given {call.batch} rows "
                f"of {call.front + call.length} tokens: it rearranges its inputs, so positions "
                f"cannot be told"
            )
        return call

    def current(self) -> ForwardCall:
        """The call under way.

        Raises:
            PositionError: there is none.
        """
        call = self._under_way.get(threading.get_ident())
        # What runs once more in a backward pass is known where there is only one.
        if call is None and self._latest is not None and self._n_calls == 1 and _in_backward():
            call = self._latest
        if call is None:
            raise PositionError(
                f"a block ran outside of a forward pass of {_kind(self.trunk)}, so one cannot say "
                f"which tokens it was given: run the model itself"
            )
        return call

    def check_open(self) -> None:
        """Raise if the context has closed, as at work that was put off until after it."""
        if self.closed:
            raise EditNeverFiredError(
                "the context in which this was begun has closed, so its edits would be missing; "
                "finish within it"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.acts():
            self.others.add(threading.current_thread().name)
            return
        thread = threading.get_ident()
        self._threads.add(thread)
        given = arguments_of(module, args, kwargs)
        prompt, outer = self._prompts.pop(thread, None), self._outer.pop(thread, None)
        # Transforms of torch.func must not see what is noted here.
        if in_transforms():
            given = {name: _plain(value) for name, value in given.items()}
        with outside_transforms():
            call = self.read(given, self._in_front(given, outer) if prompt is None else prompt)
            for item in self.follows:
                item.see(call)
            text, known = call.text, not call.continues and concrete(call.tokens)
            text.end, text.last = call.end, self._n_calls
            text.tokens = call.tokens.detach() if known else None
        self._n_calls += 1
        self._under_way[thread] = self._latest = call

    def _before_adapter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.acts():
            self._outer[threading.get_ident()] = arguments_of(module, args, kwargs)

    def _in_front(self, given: Mapping[str, Any], outer: Mapping[str, Any] | None) -> Any:
        """What an adapter of another kind has put in front of the text that it was given itself."""
        if outer is None:
            return None
        cache, embeddings = cache_among(given), given.get("inputs_embeds")
        if cache is not None and cache_among(outer) is None:
            return cache if _held(cache, given) else None
        ids = outer.get("input_ids")
        if given.get("input_ids") is not None or not isinstance(embeddings, Tensor):
            return None
        if not isinstance(ids, Tensor) or ids.shape[:2] == embeddings.shape[:2]:
            return None
        columns = embeddings.shape[1] - ids.shape[-1]
        embed = cast(Any, inner_model(self.model)).get_input_embeddings()
        if columns < 1 or not torch.equal(embed(ids), embeddings[:, columns:]):
            raise PositionError(
                f"{_kind(self.model)} was given {ids.shape[-1]} tokens and gave its model "
                f"{embeddings.shape[1]}, not only in front of them, so positions cannot be told"
            )
        return embeddings[:, :columns]

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._under_way.pop(threading.get_ident(), None)
        # A cache that the model has made itself is seen only in what it returns.
        if call is not None and call.text.cache is None and output is not None:
            parts = output if isinstance(output, Mapping) else {"": output}
            parts = dict(enumerate(output)) if isinstance(output, tuple) else parts
            cache = cache_among(parts)
            call.text.cache = None if cache is None else weakref.ref(cache)

    def read(self, given: Mapping[str, Any], prompt: Any = None) -> ForwardCall:
        """A call from its arguments, and what an adapter has just put in front of the text."""
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        found = embeddings if ids is None else ids
        if not isinstance(found, Tensor):
            raise PositionError("the model was called without input_ids or inputs_embeds")
        # Inputs (B, choices, T) are read as B · choices rows.
        lead = found.ndim - (3 if ids is None else 2)
        tokens = found.flatten(0, lead) if lead > 0 else found
        front = prompt.shape[1] if isinstance(prompt, Tensor) and ids is None else 0
        text, past, continues = self._text(tokens, front, prompt, given)
        mask = given.get("attention_mask")
        # Models with several kinds of attention take a mask for each.
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        square = None
        if isinstance(mask, Tensor):
            mask = mask.flatten(0, lead) if lead > 0 and mask.ndim == 2 + lead else mask
            # Masks of queries and keys may be the caller's own, and need say nothing of padding.
            square = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else None
            square = None if square is None else square[:, :, front:, text.front :]
            mask = mask[:, text.front :] if mask.ndim == 2 else None
        unaware = self.warns and self._absolute and given.get("position_ids") is None
        if mask is not None and unaware and concrete(mask) and bool((mask[:, 0] == 0).any()):
            warnings.warn(
                "left-padded batch without position_ids: this model counts the padding as text. "
                "Pass position_ids=lrqp_torch.position_ids(attention_mask), or pad on the right",
                LeftPaddingWarning,
                stacklevel=2,
            )
        meanwhile = tuple(other for other in self._texts if 0 <= text.last < other.began)
        rows, columns = tokens.shape[0], tokens.shape[1] - front
        return ForwardCall(
            rows, columns, past, mask, square, continues, tokens, front, text, meanwhile
        )

    def _text(
        self, tokens: Tensor, front: int, prompt: Any, given: Mapping[str, Any]
    ) -> tuple[Text, int, bool]:
        """Which text a call reads, how much of it has been read, and whether it may go on."""
        cache = cache_among(given)
        injected = cache is not None and cache is prompt
        continues = given.get("use_cache") is True or (cache is not None and not injected)
        after, start, hidden = None, 0, front
        if injected:
            hidden = _held(cache, given) or 0
        elif cache is not None:
            known = next((text for text in self._texts if text.holds(cache)), None)
            held = _held(cache, given)
            if known is not None and held != 0:
                return known, known.end if held is None else held - known.front, continues
            if held is None:
                raise PositionError(
                    f"the model was given a {_kind(cache)}, which does not say how many tokens it "
                    f"holds, so positions in the text cannot be told: open the context before the "
                    f"text is begun, or run the model without it (use_cache=False)"
                )
            if held and puts_tokens_in_front(self.model):
                raise PositionError(
                    "the cache was begun before the context, so one cannot say whether it holds "
                    "the adapter's virtual tokens: open the context before the text"
                )
            start = held
        if not continues and self.follows:
            after = self._extended(tokens)
            if after is not None and _generating():
                return after, 0, continues
        self._texts = [text for text in self._texts if text.cache is None or text.cache()]
        for text in [text for text in self._texts if text.cache is None][:-_UNCACHED]:
            self._texts.remove(text)
        columns = tokens.shape[1] - front
        text = Text(self._n_texts, tokens.shape[0], start, columns, hidden, None)
        text.after, text.began = after, self._n_calls
        text.cache = weakref.ref(cache) if cache is not None and continues else None
        self._n_texts += 1
        self._texts.append(text)
        return text, start, continues

    def _extended(self, tokens: Tensor) -> Text | None:
        """The text without cache that has one token less than these, if there is one."""
        if not concrete(tokens):
            return None
        for text in reversed(self._texts):
            before = text.tokens
            if before is None or before.ndim != tokens.ndim or before.dtype != tokens.dtype:
                continue
            if (len(before), before.shape[1] + 1) != tokens.shape[:2]:
                continue
            if torch.equal(tokens[:, :-1], before):
                return text
            # Beams change places, so each row must go on with some row, not with its own.
            same = (tokens[:, None, :-1] == before[None]).flatten(2).all(-1)
            if bool(same.any(1).all()):
                return text
        return None

    def _check_ended(self) -> None:
        """Raise if another thread of this context goes on with what it has begun."""
        here, frames = threading.get_ident(), sys._current_frames()
        for thread in self._threads - {here}:
            frame = frames.get(thread)
            while frame is not None:
                if any(frame.f_locals.get("self") is part for part in (self.model, self.trunk)):
                    raise EditNeverFiredError(
                        "the context has closed while another thread was running the model: what "
                        "it does from now on is not edited. Wait for it within the context"
                    )
                frame = frame.f_back


def _note_prompts(owner: nn.Module, get_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """The method of an adapter that makes virtual tokens, seen by all contexts on its model."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        prompt = get_prompt(*args, **kwargs)
        for watch in _open.get():
            if watch.model is owner:
                watch._prompts[threading.get_ident()] = prompt
        return prompt

    return noted


def puts_tokens_in_front(model: nn.Module) -> bool:
    """Whether a model has an adapter that does so: prompt, prefix or p-tuning of peft."""
    adapter = getattr(model, "active_peft_config", None)
    return bool(getattr(adapter, "is_prompt_learning", False))


def opened() -> tuple[Watch, ...]:
    """What is open here and now."""
    return _open.get()


def _plain(value: Any) -> Any:
    """A value out of the transforms that it is wrapped in, if it has one."""
    return unwrapped(value) if isinstance(value, Tensor) and concrete(value) else value


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _generating() -> bool:
    """Whether this is part of transformers' ``generate``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("transformers.generation"):
            return True
        frame = frame.f_back
    return False
