"""What a compiled graph holds in place of the hooks of a context.

``torch.compile`` follows hooks that are there when it traces a model. Those of an edit lead it to
two operators, ``enter`` where the trunk is called and ``visit`` at a site, which it takes as they
are. When the graph runs, they look for the contexts that are open then, and do what the hooks do.
So a graph belongs to a set of sites and not to a context: another context at the same sites uses it
again, with edits, positions and targets of its own; outside of all contexts it edits nothing.

A graph that was made without these operators must not run within a context, nor one that was made
for other sites, in whatever thread. Guards of ``torch.compile`` keep it so: a graph is guarded by
the code of the ``forward`` of every module in it, and modules with hooks have one of their own,
by model and by hooks (:func:`marked`).
"""

import functools
import sys
import threading
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import CodeType, MethodType
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrqp_torch.errors import CompiledModelError, EditNeverFiredError, SiteError
from lrqp_torch.stream.discovery import first_tensor, with_first
from lrqp_torch.stream.passes import UNSAID, held_by


class Passes(Protocol):
    """What follows the passes of a model in a context."""

    def enter(self, given: dict[str, Any], held: "Tensor | int | None") -> None:
        """A pass begins, with these arguments, that goes on from ``held`` tokens in a cache."""

    def revisit(
        self,
        visit: "Visit",
        stream: Tensor,
        residual: Tensor | None,
        scale: float,
        ticket: Tensor | None,
        again: bool = False,
    ) -> Tensor:
        """The tensor at a site, edited; itself in passes of others."""


compiler, traces = torch.compiler, torch.compiler.is_dynamo_compiling
Visit = Callable[..., Tensor]
_KEYS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_NUMBERS = count()
_LOCK = threading.Lock()
_PASSES: dict[int, dict[int, Passes]] = {}
_VISITS: dict[str, tuple[Passes, Visit]] = {}
_TRACED: dict[str, "_Visit"] = {}
_ENDS: dict[tuple[int, int], tuple["Traced", "Traced"]] = {}

_INSTALLED: dict[int, str] = {}
"""Of each trunk the names of its sites with an edit: what a graph of it was traced for."""
_NAMES: dict[int, list[str]] = {}
"""The same one by one, in order."""
_MADE: dict[int, set[str]] = {}
"""Of each trunk, what graphs of it that have run were traced for."""
_PENDING: dict[str, Any] = {}
"""Filled and emptied within one trace: the ticket of a pass, and block inputs on their way."""


def may_trace(trunk: nn.Module, sites: Iterable[str]) -> bool:
    """Whether graphs may run in a context that opens in this thread, with edits at some sites.

    Not where it could not be told from graphs made outside of it, nor where graphs for so many
    other sites were made that torch would soon refuse to make another.
    """
    key = key_of(trunk)
    made = _MADE.get(key)
    if not made or "torch._dynamo" not in sys.modules:
        return True
    counts = Counter(sites)
    names = sorted(f"{key}/{site}#{n}" for site, times in counts.items() for n in range(times))
    return " ".join(names) in made or len(made) + 2 < torch._dynamo.config.recompile_limit


class Around(Protocol):
    """What runs a module's ``forward``, and something before and after it."""

    traced: "tuple[Traced, Traced] | None"
    """What graphs hold before and after it."""

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what ``forward`` does of these arguments."""


def marked(
    module: nn.Module,
    held: Any,
    names: tuple[str, ...],
    around: Sequence[Around] = (),
    later: Sequence[Around] = (),
) -> Any:
    """A ``forward`` for a module that does the same, for as long as it has some hooks.

    Every graph is guarded by the code of the ``forward`` of each module in it. So one that was made
    with other hooks there, or none, is not taken in any thread.

    Args:
        module: one that has hooks.
        held: the ``forward`` that it had of its own, or None.
        names: of the hooks.
        around: what is to run it, the first around the others, for as long as it is there.
        later: what is to run it instead where others have put it back after that.
    """
    made = _FORWARDS.get(names) if held is None and not around else None
    if made is None:
        ends = tuple([each.traced for each in around if each.traced is not None])

        def passed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if traces() or compiler._is_compiling_flag:
                for begin, _ in ends:
                    begin(self, args, kwargs)
                forward = type(self).forward
                given = forward(self, *args, **kwargs) if held is None else held(*args, **kwargs)
                for _, end in ends:
                    end(self, args, kwargs, given)
                return given
            run = partial(type(self).forward, self) if held is None else held
            runs = around
            if not runs and getattr(vars(self).get("forward"), "runs", None) is runs:
                runs = later
            for each in reversed(runs):
                run = partial(each, run)
            return run(*args, **kwargs)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return type(self).forward(self, *args, **kwargs)

        def given(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return held(*args, **kwargs)

        made = passed if around else forward if held is None else given
        made.stands_for, made.runs = held, around  # type: ignore[attr-defined]
        made.__wrapped__ = type(module).forward  # type: ignore[attr-defined]
        key = (made.__name__, *names)
        code = _CODES.get(key)
        if code is None:
            code = _CODES.setdefault(key, made.__code__.replace(co_name=" ".join(key)))
        made.__code__ = code
        made.__name__ = "forward"  # by which methods that others have kept are pickled
        if held is None and not around:
            _FORWARDS[names] = made
    return MethodType(made, module)


_CODES: dict[tuple[str, ...], CodeType] = {}
_FORWARDS: dict[tuple[str, ...], Any] = {}


def refuse_within_compilation() -> None:
    """Raise :class:`CompiledModelError` inside a function that is being compiled."""
    if torch.compiler.is_dynamo_compiling() or _compiles():
        _refuse()()


def _compiles() -> bool:
    frames = sys.modules.get("torch._C._dynamo.eval_frame")
    return frames is not None and frames.get_eval_frame_callback() not in (None, False)


@functools.cache
def _refuse() -> Any:
    """What raises within compilation; not traced, so that torch says itself whether it compiles."""
    return torch.compiler.disable(_refuse_within_compilation, recursive=False)


def _refuse_within_compilation() -> None:
    if _compiles():
        raise CompiledModelError(
            "a model cannot be edited inside a function that torch.compile compiles: open the "
            "context around that function, or mark it with torch.compiler.disable"
        )


def next_number() -> int:
    """A number that no hook of torch has or will have."""
    number = RemovableHandle.next_id
    RemovableHandle.next_id = number + 1
    return number


class Traced:
    """What is traced in place of a hook; the same object for every context.

    Args:
        key: of the trunk.
        name: of the hook.

    Attributes:
        number: that of every hook in whose place it is traced: a graph is guarded by the numbers of
            the hooks that it was made with.
        mark: what a module with the hook is known by; empty where it has another hook besides.
    """

    def __init__(self, key: int, name: str) -> None:
        self.key, self.name, self.ticket = key, name, f"ticket {key}"
        self.number, self.mark = next_number(), name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
        """As a hook."""
        raise NotImplementedError


class _Enter(Traced):
    """Where a trunk is called: a pass begins."""

    def __init__(
        self, key: int, name: str, names: tuple[str, ...], caches: tuple[str, ...]
    ) -> None:
        super().__init__(key, name)
        self.names, self.caches = names, caches

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        # Read for its guard; without a site there would be no hook.
        if not _INSTALLED[self.key] or self.ticket in _PENDING:
            return
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        tokens = given.get("inputs_embeds") if ids is None else ids
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if not isinstance(mask, Tensor):
            mask = None
        cache = None
        for name in self.caches:
            cache = given.get(name) if cache is None else cache
        held = 0 if cache is None else held_by(cache, given)
        held = UNSAID if held is None else held
        there = held if isinstance(held, Tensor) else None
        _PENDING[self.ticket] = torch.ops.lrqp_torch.enter(
            tokens,
            mask,
            there,
            0 if there is not None else held,
            self.key,
            ids is None,
            given.get("position_ids") is not None,
            given.get("use_cache") is True or cache is not None,
            cache is not None,
            given.get("encoder_hidden_states") is not None,
        )


class _Leave(Traced):
    """Where a trunk returns: the pass is over."""

    def __init__(self, key: int, name: str) -> None:
        super().__init__(key, name)
        self.mark = ""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        _PENDING.pop(self.ticket, None)


class _Visit(Traced):
    """At a site: the tensor is edited."""

    def __init__(self, key: int, name: str, before: bool, added: bool, scale: float) -> None:
        super().__init__(key, name)
        self.before, self.added, self.scale = before, added, scale
        self.remember = _Remember(key, f"{name} given")

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
        residual = _PENDING.pop(self.remember.name) if self.added else None
        edited = self._edited(_stream_at(module, args, kwargs, output), residual)
        if self.before:
            return with_stream(args, kwargs, edited)
        return with_first(output[0], edited)

    def _edited(self, stream: Tensor, residual: Tensor | None) -> Tensor:
        ticket = _PENDING.get(self.ticket)
        found = torch.ops.lrqp_torch.visit(stream, residual, ticket, self.scale, self.name)
        return cast(Tensor, found)


class _Remember(Traced):
    """Before the first reader of a block: its input is kept for ``mid``. Before a hook that may
    change an edited tensor: that is kept as it is.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        stream = _stream_at(module, args, kwargs, output)
        _PENDING[self.name] = stream.clone() if KEPT_AT in self.name else stream


KEPT_AT = " kept"
"""In the name of what only sees that a tensor is as it was left."""


def _stream_at(module: nn.Module, args: Any, kwargs: Any, output: tuple[Any, ...]) -> Tensor:
    """What a module returns, or is given where it has not run yet."""
    stream = first_tensor(output[0]) if output else stream_given(module, args, kwargs)
    if stream is None:
        raise SiteError(f"{type(module).__name__} returns no tensor of activations")
    return stream


def key_of(trunk: nn.Module) -> int:
    """A number for a trunk, for as long as it lives."""
    key = _KEYS.get(trunk)
    if key is None:
        with _LOCK:
            key = _KEYS.setdefault(trunk, next(_NUMBERS))
    return key


class Followed:
    """What graphs of a trunk are told of one context, until it closes.

    Args:
        trunk: the module.
        passes: what is told of every pass of it.
        names: what the trunk takes by position.
        caches: names that caches have.

    Attributes:
        entered, left: what is to be traced in place of hooks before and after the trunk.
    """

    def __init__(
        self, trunk: nn.Module, passes: Passes, names: tuple[str, ...], caches: tuple[str, ...]
    ) -> None:
        self.passes, self._visits = passes, dict[str, tuple[Passes, Visit]]()
        key = self.key = key_of(trunk)
        with _LOCK:
            every = _PASSES.get(key)
            if every is None:
                every = _PASSES[key] = {}
                _NAMES[key], _INSTALLED[key] = [], ""
            order = 0
            while order in every:
                order += 1
            every[order] = passes
            self._order, known = order, _ENDS.get((key, order))
            if known is None:
                known = _ENDS[key, order] = (
                    _Enter(key, f"{key} enter#{order}", names, caches),
                    _Leave(key, f"{key} leave#{order}"),
                )
        self.entered, self.left = known

    def install(
        self, site: str, before: bool, added: bool, scale: float, visit: Visit
    ) -> tuple[Traced, Traced]:
        """Let ``visit`` run at a site in every graph of the trunk.

        Args:
            site: its name.
            before: whether the tensor is what a module is given, not what it returns.
            added: whether it is added to the input of a module that ran before.
            scale: what it is multiplied by.
            visit: called with tensor, what it is added to, scale and call; gives what stands for
                it.

        Returns:
            What is to be traced in place of the hook there, and of that which keeps the input.
        """
        with _LOCK:
            number, key = 0, self.key
            while (name := f"{key}/{site}#{number}") in _VISITS:
                number += 1
            _VISITS[name] = self._visits[name] = self.passes, visit
            insort(_NAMES[key], name)
            _INSTALLED[key] = " ".join(_NAMES[key])
            traced = _TRACED.get(name)
            if traced is None:
                traced = _TRACED[name] = _Visit(key, name, before, added, scale)
        return traced, traced.remember

    def again(self) -> bool:
        """Tell of the same once more; False where something else is told of the trunk."""
        key = self.key
        with _LOCK:
            if self._order or _PASSES[key] or _NAMES[key]:
                return False
            _PASSES[key][0], _NAMES[key] = self.passes, sorted(self._visits)
            _VISITS.update(self._visits)
            _INSTALLED[key] = " ".join(_NAMES[key])
        return True

    def close(self) -> None:
        """Tell no more."""
        key = self.key
        with _LOCK:
            for name in self._visits:
                del _VISITS[name]
                _NAMES[key].remove(name)
            _INSTALLED[key] = " ".join(_NAMES[key])
            del _PASSES[key][self._order]


def tensors_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The activations that a module is given, the stream first."""
    for item in (kwargs.get("hidden_states"), *args, *kwargs.values()):
        if isinstance(item, Tensor) and item.is_floating_point():
            yield item


def stream_given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The stream that a module is given."""
    stream = kwargs.get("hidden_states")
    if stream is None and args:
        stream = args[0]
    if not isinstance(stream, Tensor) or not stream.is_floating_point():
        stream = next(tensors_given(args, kwargs), None)
    if stream is None:
        raise SiteError(f"{type(module).__name__} was called without a tensor of activations")
    return stream


def with_stream(
    args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor, old: Tensor | None = None
) -> Any:
    """The arguments of a module with another stream; ``old``: the one that it was given."""
    old = next(tensors_given(args, kwargs)) if old is None else old
    for place, item in enumerate(args):
        if item is old:
            args = (*args[:place], stream, *args[place + 1 :])
    for name, item in kwargs.items():
        if item is old:
            kwargs = {**kwargs, name: stream}
    return args, kwargs


def _enter(
    tokens: Tensor,
    mask: Tensor | None,
    there: Tensor | None,
    held: int,
    key: int,
    embedded: bool,
    aware: bool,
    continues: bool,
    cached: bool,
    crossed: bool = False,
) -> Tensor:
    # Copies: a graph writes over what it was given, and over its own buffers, once it has no more
    # use for them itself.
    tokens, mask = tokens.clone(), None if mask is None else mask.clone()
    given: dict[str, Any] = {
        "inputs_embeds" if embedded else "input_ids": tokens,
        "attention_mask": mask,
        "use_cache": continues,
        "position_ids": tokens if aware else None,
        "encoder_hidden_states": tokens if crossed else None,
    }
    with _LOCK:
        every = [*_PASSES.get(key, {}).values()]
        _MADE.setdefault(key, set()).add(_INSTALLED.get(key, ""))
    for passes in every:
        passes.enter(given, (held if there is None else there) if cached else None)
    return torch.zeros((), dtype=torch.long, device=tokens.device)


def _visit(
    stream: Tensor, residual: Tensor | None, ticket: Tensor | None, scale: float, where: str
) -> Tensor:
    found = _VISITS.get(where)
    edited = stream
    if found is not None:
        passes, visit = found
        edited = passes.revisit(visit, stream, residual, scale, ticket)
    # An operator must not return what it was given, nor a view of it.
    edited = edited.to(_held_dtype(stream, residual)).contiguous()
    return edited.clone() if edited.data_ptr() == stream.data_ptr() else edited


def _held_dtype(stream: Tensor, residual: Tensor | None) -> torch.dtype:
    if residual is None:
        return stream.dtype
    return torch.promote_types(stream.dtype, residual.dtype)


def _visit_back(
    grad: Tensor,
    stream: Tensor,
    residual: Tensor | None,
    ticket: Tensor | None,
    scale: float,
    where: str,
) -> tuple[Tensor, Tensor]:
    found = _VISITS.get(where)
    if found is None:
        raise EditNeverFiredError(
            "a backward pass through a compiled model ran after the context of its edit had "
            "closed: call backward within it"
        )
    passes, visit = found
    given = [stream] if residual is None else [stream, residual]
    with _with_gradients():
        own = [part.detach().requires_grad_() for part in given]
        base = None if residual is None else own[1]
        edited = passes.revisit(visit, own[0], base, scale, ticket, again=True)
        if any(all(leaf is not part for part in own) for leaf in _leaves(edited)):
            raise CompiledModelError(
                "an edit in a compiled model depends on tensors that are being learned, which a "
                "graph gives no gradients: run the model without compilation "
                '(torch.compiler.set_stance("force_eager"))'
            )
        slopes = torch.autograd.grad(edited, own, grad.to(edited.dtype), allow_unused=True)
    filled = [
        torch.zeros_like(part) if slope is None else slope.contiguous().clone()
        for part, slope in zip(given, slopes, strict=True)
    ]
    return filled[0], filled[1] if residual is not None else grad.new_zeros(0)


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaves that gradients of a tensor go to."""
    nodes, seen = [output.grad_fn], set[Any]()
    for node in nodes:
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


@contextmanager
def _with_gradients() -> Iterator[None]:
    """Derivatives as usual, within an operator, where torch has put them aside."""
    tls = torch._C._dispatch_tls_is_dispatch_key_excluded
    put = torch._C._dispatch_tls_set_dispatch_key_excluded
    keys = [
        getattr(torch._C.DispatchKey, name)
        for name in (
            "AutogradFunctionality",
            "AutogradOther",
            "AutogradCPU",
            "AutogradCUDA",
            "ADInplaceOrView",
        )
    ]
    before = [tls(key) for key in keys]
    for key in keys:
        put(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            put(key, excluded)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    stream, residual, ticket, ctx.scale, ctx.where = inputs
    ctx.has = residual is not None, ticket is not None
    ctx.save_for_backward(*(part for part in (stream, residual, ticket) if part is not None))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    stream, *rest = ctx.saved_tensors
    residual = rest.pop(0) if ctx.has[0] else None
    ticket = rest.pop(0) if ctx.has[1] else None
    own, other = torch.ops.lrqp_torch.visit_back(
        grad, stream, residual, ticket, ctx.scale, ctx.where
    )
    return own, other if ctx.has[0] else None, None, None, None


def _define() -> None:
    library = torch.library
    # They look for what is open when they run, which a replayed CUDA graph would not do again:
    # torch.compile runs them between its CUDA graphs.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    tags = () if unsafe is None else (unsafe,)
    library.define(
        "lrqp_torch::enter",
        "(Tensor tokens, Tensor? mask, Tensor? there, SymInt held, int key, bool embedded, "
        "bool aware, bool continues, bool cached, bool crossed=False) -> Tensor",
        tags=tags,
    )
    library.define(
        "lrqp_torch::visit",
        "(Tensor stream, Tensor? residual, Tensor? ticket, float scale, str where) -> Tensor",
        tags=tags,
    )
    library.define(
        "lrqp_torch::visit_back",
        "(Tensor grad, Tensor stream, Tensor? residual, Tensor? ticket, float scale, str where)"
        " -> (Tensor, Tensor)",
        tags=tags,
    )
    for name, function in (("enter", _enter), ("visit", _visit), ("visit_back", _visit_back)):
        library.impl(f"lrqp_torch::{name}", "CompositeExplicitAutograd")(function)

    def ticket(tokens: Tensor, *rest: Any) -> Tensor:
        return tokens.new_empty((), dtype=torch.long)

    def like(stream: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        return stream.new_empty(stream.shape, dtype=_held_dtype(stream, residual))

    def slopes(
        grad: Tensor, stream: Tensor, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        other = grad.new_empty(0) if residual is None else residual.new_empty(residual.shape)
        return stream.new_empty(stream.shape), other

    library.register_fake("lrqp_torch::enter")(ticket)
    library.register_fake("lrqp_torch::visit")(like)
    library.register_fake("lrqp_torch::visit_back")(slopes)
    library.register_autograd("lrqp_torch::visit", _backward, setup_context=_keep)


_define()
