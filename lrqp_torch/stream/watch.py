"""Contexts on a model: whose forward passes they act on, and hooks that no copy takes along.

A context acts on passes of the thread that opened it (more exactly, of its :mod:`contextvars`
context, which ``asyncio.to_thread`` takes along), on the model itself and not on copies of it, and
until it closes. Passes of other threads stay untouched, and are named where an edit was missed.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from threading import get_ident
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lrqp_torch.errors import (
    CompiledModelError,
    EditNeverFiredError,
    PositionError,
    concrete,
    in_transforms,
    outside_transforms,
    unwrapped,
    warn,
)
from lrqp_torch.stream.compiled import CompiledModelWarning, inner_model, run_eagerly
from lrqp_torch.stream.compiled import unwrapped as unwrapped_module
from lrqp_torch.stream.passes import (
    CACHES,
    ForwardCall,
    Texts,
    arguments_of,
    cache_among,
    positional,
    puts_tokens_in_front,
)
from lrqp_torch.stream.sites import Trunk
from lrqp_torch.stream.traced import Traced, follow, marked

RAN_TWICE = (
    "runs more than once in a pass of the model, so which of its runs is meant cannot be told: "
    "name a module that runs once"
)

KEPT = 64
"""So many calls are known when a backward pass runs them again."""

compiler, traces = torch.compiler, torch.compiler.is_dynamo_compiling
_is_tracing, _transforms = torch._C._is_tracing, torch._C._functorch.peek_interpreter_stack
_open: ContextVar[tuple["Watch", ...]] = ContextVar("open", default=())


class Follows(Protocol):
    """What is to see every call of a context, before it runs."""

    @property
    def counts(self) -> bool:
        """Whether it matters to it which texts there are."""

    def see(self, call: ForwardCall) -> None:
        """Take notice of a call, or refuse it."""

    def step(self, call: ForwardCall) -> None:
        """The same of one that is like the call before, or one token more of its text."""


class _Added:
    """A function that contexts have added to a module, as a hook or in place of a method.

    Copies of the module, made by ``deepcopy`` or ``pickle``, are without it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        before: Any = None,
        traced: Traced | None = None,
    ) -> None:
        self.function, self.before, self.users, self.traced = function, before, 0, traced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.traced is not None and (traces() or compiler._is_compiling_flag):
            return self.traced(*args)
        return self.function(*args, **kwargs)


class Hook(_Added):
    """A hook whose ``__call__`` is what it does: on a pass that is like the one before, the calls
    of functions are most of what it takes. What it does else is its ``function``.
    """


def replace_method(
    stack: ExitStack, owner: nn.Module, name: str, change: Callable[..., Callable[..., Any]]
) -> None:
    """Let ``change(owner, method)`` stand for a method of one object until the stack closes."""
    own = vars(owner)
    held = own.get(name)
    if not isinstance(held, _Added):
        held = own[name] = _Added(change(owner, getattr(owner, name)), held)
    held.users += 1

    def restore(added: _Added = held) -> None:
        added.users -= 1
        if not added.users:
            del own[name]
            if added.before is not None:
                own[name] = added.before

    stack.callback(restore)


def hook(
    stack: ExitStack,
    module: nn.Module,
    function: Callable[..., Any],
    *,
    first: bool = False,
    traced: Traced | None = None,
) -> None:
    """Call ``function(module, args, kwargs)`` before a module runs, until the stack closes.

    ``traced``: what ``torch.compile`` is to follow in its place; a :class:`Hook` has its own.
    """
    added = function if isinstance(function, Hook) else _Added(function, traced=traced)
    handle = module.register_forward_pre_hook(added, prepend=first, with_kwargs=True)
    tables = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    _keep(stack, module, handle, traced, tables)


def hook_after(
    stack: ExitStack,
    module: nn.Module,
    function: Callable[..., Any],
    *,
    always: bool = False,
    traced: Traced | None = None,
) -> None:
    """Call ``function(module, args, kwargs, output)`` after it has run, until the stack closes."""
    added = function if isinstance(function, Hook) else _Added(function, traced=traced)
    handle = module.register_forward_hook(added, with_kwargs=True, always_call=always)
    tables = (
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
    _keep(stack, module, handle, traced, tables)


_HOOKED: WeakKeyDictionary[nn.Module, tuple[list[str], Any]] = WeakKeyDictionary()
"""The names of the hooks that contexts have on a module, and the ``forward`` of its own if any."""
_LOCK = threading.Lock()


def _keep(
    stack: ExitStack, module: nn.Module, handle: Any, traced: Traced | None, tables: Any
) -> None:
    """Keep a hook until the stack closes, with what its module needs for as long: copies without
    it, and a ``forward`` by which graphs are told apart.
    """
    own, name = vars(module), "" if traced is None else traced.name
    remove = handle.remove if traced is None else _renumber(handle.id, traced, tables)

    def mark(names: list[str], held: Any) -> None:
        if kept := tuple(sorted(filter(None, names))):
            own["forward"] = marked(module, held, kept)
        elif held is not None:
            own["forward"] = held
        else:
            own.pop("forward", None)

    with _LOCK:
        known = _HOOKED.get(module)
        if known is None:
            known = _HOOKED[module] = [], own.get("forward")
            for method, change in _METHODS.items():
                own[method] = _Added(change(module, getattr(module, method)), own.get(method))
        known[0].append(name)
        if name:
            mark(*known)

    def restore() -> None:
        remove()
        with _LOCK:
            names, held = _HOOKED[module]
            names.remove(name)
            if name:
                mark(names, held)
            if not names:
                del _HOOKED[module]
                for method in _METHODS:
                    before = own.pop(method).before
                    if before is not None:
                        own[method] = before

    stack.callback(restore)


def _unmarked(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a copy of a module with the ``forward`` that it had without hooks."""
    own = {} if (held := _HOOKED[module][1]) is None else {"forward": held}
    return {name: value for name, value in state.items() if name != "forward"} | own


_HOOK_NUMBERS: dict[str, int] = {}


def _renumber(number: int, traced: Traced, tables: Sequence[dict[int, Any]]) -> Callable[[], None]:
    """Let a hook that was just registered have the number of what is traced in its place: a graph
    is guarded by the numbers of the hooks that it was made with. What removes it again.
    """
    known = _HOOK_NUMBERS.setdefault(traced.name, number)
    if known != number and known not in tables[0]:
        for table in tables:
            if number in table:
                table[known] = table.pop(number)
        number = known

    def remove() -> None:
        for table in tables:
            table.pop(number, None)

    return remove


def _reduce_plainly(module: nn.Module, reduce: Callable[[int], Any]) -> Callable[[int], Any]:
    """What copies a module, without what contexts have added."""

    def plain(protocol: int) -> Any:
        made = reduce(protocol)
        if not (isinstance(made, tuple) and len(made) > 2 and isinstance(made[2], dict)):
            return made
        state = {name: value for name, value in made[2].items() if not isinstance(value, _Added)}
        state = _unmarked(module, state)
        kept = {
            key
            for name in ("_forward_hooks", "_forward_pre_hooks")
            for key, value in state[name].items()
            if not isinstance(value, _Added)
        }
        for name, value in state.items():
            if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                state[name] = type(value)((k, v) for k, v in value.items() if k in kept)
        return (*made[:2], state, *made[3:])

    return plain


def _replicate_plainly(module: nn.Module, replicate: Callable[[], Any]) -> Callable[[], Any]:
    """What ``DataParallel`` runs elsewhere: with the hooks, and a ``forward`` of its own."""

    def replicated() -> Any:
        made = replicate()
        made.__dict__ = _unmarked(module, vars(made))
        return made

    return replicated


_METHODS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "__reduce_ex__": _reduce_plainly,
    "_replicate_for_data_parallel": _replicate_plainly,
}
"""What makes copies of a module, and what does so in its place while it has hooks."""


class Watch:
    """The forward passes of a model that belong to one context.

    Args:
        model: a transformers model.
        follows: what is to see, and may refuse, every call.
        trunk: whose calls say which tokens are read; by default, that of the model's one stack.
        reruns: whether blocks run again in the backward pass (gradient checkpointing).
        warns: whether to warn of padding that the model takes for text also without them.

    Attributes:
        texts: what is read in it.
        reruns: whether blocks run again in the backward pass.
        under_way: by thread, the calls under way, one within another.
        others: names of other threads that ran the model meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        follows: Sequence[Follows] = (),
        *,
        trunk: Trunk | None = None,
        reruns: bool = False,
        warns: bool = False,
    ) -> None:
        whose = trunk or Trunk.of(model)
        self.model, self.trunk, self._plain = model, whose.module, whose.plain
        self._stack = whose.stack
        absolute = (warns or bool(follows)) and whose.absolute
        self.texts = Texts(
            absolute,
            puts_tokens_in_front(model),
            compares=bool(follows),
            counts=any(item.counts for item in follows),
        )
        # What runs once more in a backward pass is to be known then.
        self.texts.distinct = reruns
        self._names = positional(self.trunk)
        self.others: set[str] = set()
        self._follows, self.reruns, self._closed = follows, reruns, False
        self._threads: set[int] = set()
        # By thread: whether a plain module's site ran in the calls under way; and what an adapter
        # is about to do.
        self.under_way: dict[int, list[ForwardCall]] = {}
        self._ran: dict[int, list[bool]] = {}
        self._prompts: dict[int, Any] = {}
        self._outer: dict[int, dict[str, Any]] = {}
        self._n_before: dict[int, int] = {}
        self._latest: ForwardCall | None = None
        # By where their tokens lie, calls that a backward pass may run again; and by what they were
        # given, their blocks.
        self._noted: dict[int | None, ForwardCall] = {}
        self._entered: dict[int, ForwardCall] = {}
        # By thread: the pass of a compiled graph.
        self._in_graph: dict[int, ForwardCall] = {}
        self.key: int | None = None

    @contextmanager
    def open(self, compiled: bool = False) -> Iterator[ExitStack]:
        """Watch until the block ends; hooks go on the stack that this yields.

        Args:
            compiled: whether graphs of ``torch.compile`` may run within it, with what they hold in
                place of the hooks; else all runs eagerly.

        Raises:
            EditNeverFiredError: on closing without an error, while another thread of this context
                is still running the model.
        """
        with ExitStack() as stack:
            entered, left = None, None
            if compiled:
                names = positional(self.trunk), CACHES
                self.key, entered, left = follow(stack, self.trunk, self, *names)
            else:
                stack.enter_context(run_eagerly(self.model))
            before, after = _Before(self, entered), _After(self, left)
            hook(stack, self.trunk, before, traced=entered)
            hook_after(stack, self.trunk, after, always=True, traced=left)
            kind = type(unwrapped_module(self.model))
            if hasattr(kind, "get_prompt"):
                replace_method(stack, self.model, "get_prompt", _note_prompts)
            if self.model is not self.trunk and hasattr(kind, "get_base_model"):
                hook(stack, self.model, self._before_adapter)
            if self._stack != "encoder":
                for outer in {self.model, inner_model(self.model)} - {self.trunk}:
                    # Its own forward may be a captured graph, which runs no module within.
                    if "forward" in vars(outer):
                        hook(stack, outer, self._before_whole)
                        hook_after(stack, outer, self._after_whole)
            _watch_cuda_graphs()
            _open.set((*_open.get(), self))
            try:
                yield stack
            finally:
                self._closed = True
                _open.set(tuple(watch for watch in _open.get() if watch is not self))
        self._check_ended()
        self.texts.finish()

    def acts(self) -> bool:
        """Whether what runs here and now belongs to this context."""
        # On a device a backward pass runs in threads of its own, which know of no context.
        return self in _open.get() or (
            in_backward() and isinstance(threading.current_thread(), threading._DummyThread)
        )

    def call(
        self, stream: Tensor, entered: Tensor, known: ForwardCall | None = None
    ) -> ForwardCall | None:
        """The call in which a block has this stream, (B, T, d); None for passes of others.

        Args:
            stream: what is about to be edited or read, (B, T, d), or with rows and tokens in one.
            entered: what the block was given, by which it is known when it runs once more.
            known: the call, where that is known already.

        Raises:
            PositionError: a stream that does not have the rows and columns of the call, or a block
                that runs outside of any call.
        """
        if self._plain:
            return self._own_call(stream)
        calls = self.under_way.get(get_ident()) if known is None else [known]
        if calls:
            call = calls[-1]
        elif not self.acts():
            return None
        else:
            again = self._entered.get(entered.data_ptr()) if self.reruns else None
            call = replace(again or self.current(), again=True)
        if calls and self.reruns and concrete(entered):
            self._entered[entered.data_ptr()] = call
        rows, columns, shape = call.batch, call.front + call.length, stream.shape
        if (len(shape) != 3 or shape[0] != rows or shape[1] != columns) and (
            len(shape) != 2 or shape[0] != rows * columns
        ):
            raise PositionError(
                f"the stream is {tuple(stream.shape)}, but the model was given {call.batch} rows "
                f"of {columns} tokens: it rearranges its inputs, so positions "
                f"cannot be told"
            )
        return call

    def _own_call(self, stream: Tensor) -> ForwardCall | None:
        """The call of a module whose own tensor says all: its rows, and tokens if it has any.

        Raises:
            PositionError: it has more axes, or ran already in this pass of the model.
        """
        if not self.acts():
            self.others.add(threading.current_thread().name)
            return None
        if stream.ndim not in (2, 3):
            raise PositionError(
                f"the module's tensor is {tuple(stream.shape)}; sites are (rows, features) or "
                f"(rows, tokens, features)"
            )
        ran = self._ran.get(get_ident()) or [False]
        if ran[-1] and not in_backward():
            raise PositionError(f"the module {RAN_TWICE}")
        whole = (stream[:, None] if stream.ndim == 2 else stream).detach()
        if not concrete(whole):  # of what vmap hides the shape is enough
            whole = torch.empty(whole.shape, device="meta")
        with outside_transforms():
            call = self._see({"inputs_embeds": _plain(whole)})
        ran[-1] = True
        return call

    def current(self) -> ForwardCall:
        """The call under way.

        Raises:
            PositionError: there is none.
        """
        calls = self.under_way.get(get_ident())
        if calls:
            return calls[-1]
        # What runs once more in a backward pass is known where there was only one.
        if self.texts.n_calls != 1 or self._latest is None or not in_backward():
            raise PositionError(
                f"a block ran outside of a forward pass of {type(self.trunk).__name__}, so one "
                f"cannot say which tokens it was given: run the model itself"
            )
        return self._latest

    def check_open(self) -> None:
        """Raise if the context has closed, as at work that was put off until after it."""
        if self._closed:
            raise EditNeverFiredError(
                "the context in which this was begun has closed, so its edits would be missing; "
                "finish within it"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = get_ident()
        if not self.acts():
            self.others.add(threading.current_thread().name)
            return
        if _is_tracing():
            raise CompiledModelError(
                "torch.jit.trace would keep what an edit did to the one example that it sees: "
                "trace the model outside of the context, or use torch.compile"
            )
        self._threads.add(thread)
        if self._plain:
            self._ran.setdefault(thread, []).append(False)
            return
        call, transformed = None, in_transforms()
        if not transformed and len(args) <= len(self._names) and not in_backward():
            given = dict(zip(self._names, args, strict=False))
            given.update(kwargs)
            call = self.texts.like(given, len(args))
        if call is None:
            call = self._read(module, args, kwargs, transformed)
        else:
            for item in self._follows:
                item.step(call)
            self.texts.note(call, call.tokens)
            self._latest = call
        self.under_way.setdefault(thread, []).append(call)

    def _read(self, module: nn.Module, args: Any, kwargs: Any, transformed: bool) -> ForwardCall:
        """A call that is unlike the one before."""
        thread, given = get_ident(), arguments_of(module, args, kwargs)
        prompt, outer = self._prompts.pop(thread, None), self._outer.pop(thread, None)
        if self._stack and isinstance(prompt, Tensor):  # the encoder's come first
            count = cast(Any, self.model).active_peft_config.num_virtual_tokens
            prompt = prompt[:, :count] if self._stack == "encoder" else prompt[:, count:]
        # Transforms of torch.func must not see what is noted here.
        if transformed:
            given = {name: _plain(value) for name, value in given.items()}
        with outside_transforms():
            if prompt is None and outer is not None:
                prompt = self._in_front(given, outer)
            return self._see(given, prompt)

    def _see(
        self, given: dict[str, Any], prompt: Any = None, held: Tensor | int | None = None
    ) -> ForwardCall:
        """Take notice of a call, unless it is refused: see :meth:`~.passes.Texts.read`.

        What a backward pass runs, to know what it has not kept, is a call that was noted before.
        """
        again, ids = in_backward(), given.get("input_ids")
        tokens = given.get("inputs_embeds") if ids is None else ids
        place = tokens.data_ptr() if isinstance(tokens, Tensor) and concrete(tokens) else None
        if again and isinstance(tokens, Tensor):
            known = self._latest if self._plain else self._noted.get(place)
            if known is not None and (known.batch, known.length) == tokens.shape[:2]:
                return replace(known, again=True)
        call = self.texts.read(given, prompt, held=held)
        for item in self._follows:
            item.see(call)
        self.texts.accept()
        self.texts.note(call, call.tokens)
        self._latest = call
        if again:
            return replace(call, again=True)
        if place is not None:
            # Without the tokens, whose embeddings may hold a graph.
            self._noted.pop(place, None)
            self._noted[place] = replace(call, tokens=call.tokens.new_empty(0))
            if len(self._noted) > KEPT:
                del self._noted[next(iter(self._noted))]
        return call

    def enter(self, given: dict[str, Any], held: Tensor | int | None) -> None:
        """A pass begins in a compiled graph, that goes on from ``held`` tokens in a cache."""
        if self.acts():
            self._threads.add(get_ident())
            call = self._see(given, held=held)
            self._in_graph[get_ident()] = call
        else:
            self.others.add(threading.current_thread().name)

    def revisit(
        self,
        visit: Callable[..., Tensor],
        stream: Tensor,
        residual: Tensor | None,
        scale: float,
        ticket: Tensor | None,
        again: bool = False,
    ) -> Tensor:
        """The tensor at a site in a compiled graph, edited; itself in passes of others.

        Args:
            visit: as :func:`~lrqp_torch.stream.hooks.attach` was given it.
            stream: the tensor.
            residual: what it is added to, or None.
            scale: what it is multiplied by before.
            ticket: what ``enter`` returned where the trunk is in the graph too.
            again: whether this is the same edit once more, for its derivative.
        """
        if not self.acts():
            return stream
        known = None
        if ticket is not None:
            known = self._in_graph.get(get_ident(), self._latest)
        call = self.call(stream, stream if residual is None else residual, known)
        if call is None:
            return stream
        return visit(stream, residual, scale, replace(call, again=True) if again else call)

    def _before_whole(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._n_before[get_ident()] = self.texts.n_calls

    def _after_whole(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = self._n_before.pop(get_ident(), None)
        if self.acts() and self.texts.n_calls == before and not in_backward():
            raise CompiledModelError(
                f"the forward of {type(module).__name__} was replaced by one that does not run its "
                f"{type(self.trunk).__name__}, such as a graph that was captured before "
                f"(make_graphed_callables), so it is not edited: replace it after the context"
            )

    def _before_adapter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.acts():
            self._outer[get_ident()] = arguments_of(module, args, kwargs)

    def _in_front(self, given: Mapping[str, Any], outer: Mapping[str, Any]) -> Any:
        """What a wrapper has put in front of the text that it was given itself."""
        cache, embeddings = cache_among(given), given.get("inputs_embeds")
        if cache is not None and cache_among(outer) is None:
            return cache
        ids = outer.get("input_ids")
        if not isinstance(embeddings, Tensor) or not isinstance(ids, Tensor):
            return None
        columns = embeddings.shape[1] - ids.shape[-1]
        embed = cast(Any, inner_model(self.model)).get_input_embeddings()
        if columns and not torch.equal(embed(ids), embeddings[:, columns:]):
            raise PositionError(
                f"{type(self.model).__name__} was given {ids.shape[-1]} tokens and gave its model "
                f"{embeddings.shape[1]}, not only in front of them, so positions cannot be told"
            )
        return embeddings[:, :columns]

    def _check_ended(self) -> None:
        """Raise if another thread of this context goes on with what it has begun."""
        frames = sys._current_frames()
        for thread in self._threads - {get_ident()}:
            frame = frames.get(thread)
            while frame is not None:
                if any(frame.f_locals.get("self") is part for part in (self.model, self.trunk)):
                    raise EditNeverFiredError(
                        "the context has closed while another thread was running the model: what "
                        "it does from now on is not edited. Wait for it within the context"
                    )
                frame = frame.f_back


class _Before(Hook):
    """A pass begins."""

    def __init__(self, watch: Watch, traced: Traced | None) -> None:
        super().__init__(watch._before, traced=traced)
        self.watch, self.under_way, self.follows = watch, watch.under_way, watch._follows
        self.again, self.note = watch.texts.again, watch.texts.note

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.traced is not None and (traces() or compiler._is_compiling_flag):
            return self.traced(module, args, kwargs)
        plain = not (_is_tracing() or in_backward()) and _transforms() is None
        if plain and self.watch in _open.get():
            calls = self.under_way.get(get_ident())
            if calls is not None and (call := self.again(args, kwargs)) is not None:
                for item in self.follows:
                    item.step(call)
                self.note(call, call.tokens)
                calls.append(call)
                return None
        return self.function(module, args, kwargs)


class _After(Hook):
    """A pass is over."""

    def __init__(self, watch: Watch, traced: Traced | None) -> None:
        super().__init__(watch.texts.note_result, traced=traced)
        self.watch, self.under_way = watch, watch.under_way

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.traced is not None and (traces() or compiler._is_compiling_flag):
            return self.traced(module, args, kwargs, output)
        calls = self.under_way.get(get_ident())
        if calls:
            call = calls.pop()
            if not call.like:
                self.function(call, output)
        elif self.watch._plain and (ran := self.watch._ran.get(get_ident())):
            ran.pop()
        return None


def _note_prompts(owner: nn.Module, get_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """The method of peft that makes virtual tokens, seen by all contexts on its model."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        prompt = get_prompt(*args, **kwargs)
        for watch in _open.get():
            if watch.model is owner:
                watch._prompts[get_ident()] = prompt
        return prompt

    return noted


_CAPTURED: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
"""Of CUDA graphs the contexts that were open when they were captured."""


@functools.cache
def _watch_cuda_graphs() -> None:
    """Warn of CUDA graphs that are replayed within contexts, and were captured elsewhere."""
    kind: Any = torch.cuda.CUDAGraph
    begin, replay = kind.capture_begin, kind.replay

    def here() -> tuple[int, ...]:
        return tuple(map(id, _open.get()))

    @functools.wraps(begin)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        _CAPTURED[self] = here()
        return begin(self, *args, **kwargs)

    @functools.wraps(replay)
    def replayed(self: Any) -> Any:
        # Those of torch.compile are guarded.
        if here() not in ((), _CAPTURED.get(self)) and not str(
            sys._getframe(1).f_globals.get("__name__")
        ).startswith("torch._inductor"):
            warn(
                CompiledModelWarning,
                "a CUDA graph that was captured before this context opened is replayed within it: "
                "it runs as it was captured. If it holds the model, capture it in the context",
            )
        return replay(self)

    kind.capture_begin, kind.replay = capture_begin, replayed


def opened() -> tuple[Watch, ...]:
    """What is open here and now."""
    return _open.get()


def _plain(value: Any) -> Any:
    """A value out of the transforms that it is wrapped in, if it has one."""
    return unwrapped(value) if isinstance(value, Tensor) and concrete(value) else value


def in_backward() -> bool:
    """Whether this is part of a backward pass, which runs checkpointed blocks again."""
    return bool(torch._C._current_graph_task_id() != -1)
