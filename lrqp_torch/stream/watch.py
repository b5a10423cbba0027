"""Contexts on a model: whose forward passes they act on, and hooks that no copy takes along.

A context acts on passes of the thread that opened it (more exactly, of its :mod:`contextvars`
context, which ``asyncio.to_thread`` takes along), on the model itself and not on copies of it, and
until it closes. Passes of other threads stay untouched, and are named where an edit was missed.
"""

import functools
import itertools
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from operator import contains, delitem, getitem, is_, setitem
from threading import get_ident
from types import MethodType
from typing import Any, Protocol, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from lrqp_torch.errors import (
    CompiledModelError,
    EditNeverFiredError,
    EditOverwrittenWarning,
    PositionError,
    SiteError,
    concrete,
    in_transforms,
    outside_transforms,
    unwrapped,
    warn,
)
from lrqp_torch.files import stood_for
from lrqp_torch.stream.compiled import (
    CompiledModelWarning,
    has,
    inner_model,
    own_forward,
    run_eagerly,
)
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
from lrqp_torch.stream.repeats import Function, Site
from lrqp_torch.stream.sites import Trunk
from lrqp_torch.stream.traced import (
    Around,
    Followed,
    Traced,
    compiler,
    marked,
    next_number,
    traces,
)

RAN_TWICE = (
    "runs more than once in a pass of the model, so which of its runs is meant cannot be told: "
    "name a module that runs once"
)

KEPT = 64
"""Of more calls than this, those are forgotten whose tokens are gone, so that no backward pass can
run them again."""

_is_tracing, _transforms = torch._C._is_tracing, torch._C._functorch.peek_interpreter_stack
_trace, _backward_pass = torch._C._get_tracing_state, torch._C._current_graph_task_id
_dispatch_mode, _MODES = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
_TRACERS = _MODES.PROXY, _MODES.FAKE
_open: ContextVar[tuple["Opening", ...]] = ContextVar("open", default=())


class Opening:
    """That a watch is open, from here on and in what inherits this; when it opens again, as for
    another context, it is another one.
    """

    def __init__(self, watch: "Watch") -> None:
        self.watch = watch

    @property
    def lasts(self) -> bool:
        """Whether it has not closed."""
        return self.watch.opening is self

    def check(self) -> None:
        """Raise if it has closed, as at work that was put off until after it."""
        if not self.lasts:
            raise EditNeverFiredError(
                "the context in which this was begun has closed, so its edits would be missing; "
                "finish within it"
            )


class Renewed(Protocol):
    """What belongs to a context, and can be as it was when that opened."""

    def renew(self) -> None:
        """Be so."""


_NO_MODULE = nn.Module()


class Follows(Protocol):
    """What is to see every call of a context, before it runs."""

    @property
    def counts(self) -> bool:
        """Whether it matters to it which texts there are."""

    def see(self, call: ForwardCall) -> None:
        """Take notice of a call, or refuse it."""

    def step(self, call: ForwardCall) -> None:
        """The same of one that is like the call before, or one token more of its text; of which
        one is not told to whom it matters which texts there are.
        """


class _Added:
    """A function that contexts have added to a module, as a hook or in place of a method.

    Copies of the module, made by ``deepcopy`` or ``pickle``, are without it.
    """

    before: Any = None
    users = 0
    last: bool | None = None
    """Of a hook that only reads, whether it runs after all others there; False: before them."""

    def __init__(
        self,
        function: Callable[..., Any],
        before: Any = None,
        traced: Traced | None = None,
    ) -> None:
        self.function, self.before, self.traced = function, before, traced

    def joined(
        self, module: nn.Module, table: "OrderedDict[int, Any]", own: int, other: int, front: bool
    ) -> None:
        """Take notice of a hook that somebody has set on the same module.

        Args:
            module: the module.
            table: of the hooks there.
            own: the number of this one in it.
            other: that of the other one.
            front: whether that runs before all others.
        """
        if self.last is not None:
            table.move_to_end(own, last=self.last)

    def look(self, module: nn.Module, table: "OrderedDict[int, Any]", own: int) -> None:
        """Take notice of hooks that were set by other ways than the module's own methods; see
        :meth:`joined`.
        """
        if self.last is not None:
            table.move_to_end(own, last=self.last)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.traced is not None and (traces() or compiler._is_compiling_flag):
            return self.traced(*args)
        return self.function(*args, **kwargs)


class Hook(_Added):
    """A hook whose ``__call__`` is what it does: on a pass that is like the one before, the calls
    of functions are most of what it takes. What it does else is its ``function``.
    """


class Hooks:
    """Hooks that one context has on modules, and what stands in place of methods, until it closes.

    They are put where torch keeps them, in the modules' own tables.
    """

    def __init__(self) -> None:
        self._hooks: list[tuple[_Kept, int, str, _Added, tuple[dict[int, Any], ...]]] = []
        self._around: list[tuple[_Kept, Around]] = []
        self._methods: list[tuple[dict[str, Any], str]] = []
        self._first: list[tuple[OrderedDict[int, Any], int]] = []
        # What of them is put into which places of tables, and in what tables of modules: columns.
        self._entries: tuple[Any, ...] | None = None

    def before(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        first: bool = False,
        traced: Traced | None = None,
    ) -> None:
        """Call ``function(module, args, kwargs)`` before a module runs.

        ``first``: before all other hooks there, also later ones. ``traced``: what ``torch.compile``
        is to follow in its place; a :class:`Hook` has its own.
        """
        table = module._forward_pre_hooks
        number = self._add(module, function, traced, table, module._forward_pre_hooks_with_kwargs)
        if first:
            cast(_Added, table[number]).last = False
            cast(OrderedDict[int, Any], table).move_to_end(number, last=False)
            self._first.append((cast(OrderedDict[int, Any], table), number))

    def before_all(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """The same, also before hooks of all modules; it is called before other modules too, there
        without ``kwargs``.
        """
        number = self._add(module, function, None, GLOBAL, module._forward_pre_hooks_with_kwargs)
        GLOBAL.move_to_end(number, last=False)

    def after(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        always: bool = False,
        last: bool = False,
        traced: Traced | None = None,
    ) -> None:
        """Call ``function(module, args, kwargs, output)`` after it has run.

        ``last``: after all other hooks there, also later ones.
        """
        table, flags = module._forward_hooks, module._forward_hooks_with_kwargs
        if always:
            self._add(module, function, traced, table, flags, module._forward_hooks_always_called)
        else:
            number = self._add(module, function, traced, table, flags)
            if last:
                cast(_Added, table[number]).last = True

    def _add(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        traced: Traced | None,
        hooks: dict[int, Any],
        *flags: dict[int, bool],
    ) -> int:
        added: _Added
        if isinstance(function, Hook):
            added, traced = function, function.traced
        else:
            added = _Added(function, traced=traced)
        with _LOCK:
            kept = _Kept.of(module)
            if traced is None:
                number, name = next_number(), ""
            else:
                number, name = traced.number, traced.mark
                if number in hooks:
                    number = next_number()
                if name:
                    kept.names.append(name)
                    kept.mark()
            self._hooks.append((kept, number, name, added, (hooks, *flags)))
            hooks[number] = added
            for flag in flags:
                flag[number] = True
        return number

    def around(self, module: nn.Module, run: Around) -> None:
        """Let the ``forward`` of a module be run by another, within those that do so already.

        It takes the place of two hooks, with which a module is called by torch's slower way.
        """
        with _LOCK:
            kept = _Kept.of(module)
            kept.around.append(run)
            if run.traced is not None:
                kept.names.append(run.traced[0].mark)
            kept.mark()
        self._around.append((kept, run))

    def replace(
        self, owner: nn.Module, name: str, change: Callable[..., Callable[..., Any]]
    ) -> None:
        """Let ``change(owner, method)`` stand for a method of one object."""
        own = vars(owner)
        held = own.get(name)
        if not isinstance(held, _Added):
            held = own[name] = _Added(change(owner, getattr(owner, name)), held)
        held.users += 1
        self._methods.append((own, name))

    def noted(self) -> bool:
        """Note what there is of these hooks in the tables of modules, so that it can be taken out
        and put back at once; whether there is nothing else of any context.
        """
        if self._entries is not None:
            return True
        own, places, tables = (list[tuple[Any, Any, Any]]() for _ in range(3))
        counts = Counter([each[0] for each in self._hooks])
        counts.update([kept for kept, _ in self._around])
        for kept, count in counts.items():
            if kept.count != count or not kept.alone:
                return False
            has = vars(kept.module)
            own += [(has, name, has[name]) for name in (*_METHODS, "forward")]
            mine = [table for each in self._hooks if each[0] is kept for table in each[4]]
            tables += [(has, n, t) for n, t in has.items() if any(t is table for table in mine)]
        for _, number, _, added, (table, *flags) in self._hooks:
            places += [(table, number, added), *((flag, number, True) for flag in flags)]
        parts = (own, places, own + places, tables)
        columns = (tuple(zip(*part, strict=True)) for part in parts)
        self._entries = self._hooks, self._around, counts, *columns
        return True

    def put_back(self) -> bool:
        """Put back what was noted, unless modules have anything in its places."""
        if self._entries is None:
            return False
        hooks, around, _, _, _, (held, keys, values), (owners, names, tables) = self._entries
        with _LOCK:
            there = all(map(is_, map(getitem, owners, names), tables))
            if not there or any(map(contains, held, keys)):
                self._entries, self._first = None, []
                return False
            any(map(setitem, held, keys, values))
            for table, number in self._first:
                table.move_to_end(number, last=False)
        self._hooks, self._around = hooks, around
        return True

    def _take_out(self) -> bool:
        """Take out what was noted, if it is all that contexts have there."""
        if self._entries is None or not self._hooks:
            return False
        counts, (owners, names, values), (tables, numbers, _), (held, keys, _) = self._entries[2:6]
        with _LOCK:
            alone = all([kept.count == count for kept, count in counts.items()])
            same = alone and all(map(is_, map(_get, owners, names), values))
            # In place of a hook there may be what others have put around it.
            if not (same and all(map(contains, tables, numbers))):
                return False
            any(map(delitem, held, keys))
        self._hooks, self._around = [], []
        return True

    def remove(self) -> bool:
        """Leave the modules as they were; whether the hooks had been there until now."""
        hooks, there = self._hooks, True
        if self._take_out():
            return True
        self._entries, self._first = None, []
        with _LOCK:
            while self._around:
                kept, run = self._around.pop()
                kept.around.remove(run)
                kept.count -= 1
                if run.traced is not None:
                    kept.names.remove(run.traced[0].mark)
                if kept.count:
                    kept.mark()
                else:
                    kept.leave()
            while hooks:
                kept, number, name, _, tables = hooks.pop()
                for each in tables:
                    if each.pop(number, None) is None:
                        there = False
                kept.count -= 1
                if not kept.count:
                    kept.leave()
                elif name:
                    kept.names.remove(name)
                    kept.mark()
        while self._methods:
            own, name = self._methods.pop()
            added = own[name]
            added.users -= 1
            if not added.users:
                _put(own, name, added.before)
        return there


GLOBAL = cast("OrderedDict[int, Any]", torch.nn.modules.module._global_forward_pre_hooks)
"""Hooks of torch's before all modules."""


def others_in(table: Mapping[int, Any]) -> bool:
    """Whether a table has hooks that no context has set."""
    return any([not isinstance(hook, _Added) for hook in table.values()])


_get = dict.get
_LOCK = threading.Lock()
_REDUCE, _REPLICATE = "__reduce_ex__", "_replicate_for_data_parallel"
"""The methods that make copies of a module: deepcopy and pickle, and ``DataParallel``."""
_AFTER, _BEFORE = "register_forward_hook", "register_forward_pre_hook"
_METHODS = _REDUCE, _REPLICATE, _AFTER, _BEFORE


def _put(own: dict[str, Any], name: str, value: Any) -> None:
    """Give an object an attribute of its own, or None."""
    if value is None:
        own.pop(name, None)
    else:
        own[name] = value


class _Kept:
    """What a module has of its own for as long as it has hooks of contexts, in place of what makes
    copies of it: those are without hooks; of what sets hooks on it, which are told of others that
    come later; and a ``forward`` by which graphs are told apart.

    Attributes:
        module: whose this is.
        names: of the hooks that graphs are told apart by.
        around: what runs its ``forward``.
        count: how many of all these there are.
    """

    count = 0
    _before: tuple[Any, ...] = None, None, None, None
    _forward: Any = None
    _marked: Any = None

    def __init__(self, module: nn.Module) -> None:
        own = vars(module)
        self.module, self.names, self.around = module, list[str](), list[Around]()
        self._within = list[Around]()
        if not own.keys().isdisjoint(_METHODS):
            self._before = tuple(map(own.get, _METHODS))
        own[_REDUCE], own[_REPLICATE] = self, self.replicate
        own[_AFTER], own[_BEFORE] = self.hook, self.pre_hook

    @property
    def alone(self) -> bool:
        """Whether nothing else is in place of the methods of the module's class."""
        own, plain = vars(self.module), not any(self._before) and self._forward is None
        return plain and own.get(_REDUCE) is self and own.get("forward", self) is self._marked

    @classmethod
    def of(cls, module: nn.Module) -> "_Kept":
        """That of a module, which has one more hook."""
        kept = vars(module).get(_REDUCE)
        if type(kept) is not cls or kept.module is not module:
            kept = cls(module)
        kept.count += 1
        return kept

    def mark(self) -> None:
        """Let the module have the ``forward`` that belongs to its hooks."""
        own, held, names = vars(self.module), vars(self.module).get("forward"), self.names
        if held is None or held is not self._marked:
            self._forward = held
        # The one before, which somebody may have wrapped meanwhile, runs nothing any more.
        self._within.clear()
        if names or self.around:
            self._within = [*self.around]
            known = tuple(names) if len(names) == 1 else tuple(sorted(names))
            made = marked(self.module, self._forward, known, self._within, self.around)
            own["forward"] = self._marked = made
        else:
            _put(own, "forward", self._forward)
            self._marked = None

    def leave(self) -> None:
        """Give the module back what it had."""
        own = vars(self.module)
        self.unmark(own)
        self.restore(own)
        self._within.clear()
        self._marked = None

    def restore(self, own: dict[str, Any]) -> None:
        """Let attributes have the methods that the module has without hooks."""
        for name, held in zip(_METHODS, self._before, strict=True):
            _put(own, name, held)

    def unmark(self, own: dict[str, Any]) -> None:
        """Let attributes have the ``forward`` that the module has without hooks."""
        if self._marked is None or own.get("forward") is not self._marked:
            return
        if self._forward is None:
            del own["forward"]
        else:
            own["forward"] = self._forward

    def __call__(self, protocol: int) -> Any:
        """What copies the module, without what contexts have added."""
        before = self._before[0]
        copied = type(self.module).__reduce_ex__
        made = copied(self.module, protocol) if before is None else before(protocol)
        if not (isinstance(made, tuple) and len(made) > 2 and isinstance(made[2], dict)):
            return made
        state = {name: value for name, value in made[2].items() if not isinstance(value, _Added)}
        self.unmark(state)
        self.restore(state)
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

    def replicate(self) -> Any:
        """What ``DataParallel`` runs elsewhere: with the hooks, and a ``forward`` of its own."""
        copied: Any = type(self.module)._replicate_for_data_parallel
        made = copied(self.module) if self._before[1] is None else self._before[1]()
        if self._within and vars(made).get("forward") is self._marked:
            made.forward = MethodType(self._marked.__func__, made)
        else:
            self.unmark(vars(made))
        return made

    def hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """``register_forward_hook`` of the module."""
        return self._joined(2, self.module._forward_hooks, args, kwargs)

    def pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """``register_forward_pre_hook`` of the module."""
        return self._joined(3, self.module._forward_pre_hooks, args, kwargs)

    def _joined(self, which: int, table: Any, args: Any, kwargs: Any) -> RemovableHandle:
        held, kind = self._before[which], type(self.module)
        register = held or getattr(kind, _METHODS[which]).__get__(self.module, kind)
        handle: RemovableHandle = register(*args, **kwargs)
        other = handle.id
        for own, hook in [*table.items()]:
            if isinstance(hook, _Added):
                hook.joined(self.module, table, own, other, bool(kwargs.get("prepend")))
        return handle


class Watch(Hooks):
    """The forward passes of a model that belong to one context.

    Args:
        model: a transformers model.
        follows: what is to see, and may refuse, every call.
        trunk: whose calls say which tokens are read; by default, that of the model's one stack.
        reruns: whether blocks run again in the backward pass (gradient checkpointing).
        warns: whether to warn of padding that the model takes for text also without them.
        graphs: whether graphs of ``torch.compile`` may run within it, with what they hold in place
            of the hooks; else all runs eagerly.

    Attributes:
        texts: what is read in it.
        reruns: whether blocks run again in the backward pass.
        plain: whether a site's own tensor says all of a call.
        opening: while it is open, what those that act in it know it by.
        under_way: by thread, the calls under way, one within another.
        others: names of other threads that ran the model meanwhile.
        passes: counts its passes.
        followed: what graphs are told of it, where they may run.
        alike: the shape of tokens whose first call is to be known by from then on.
        resumed: what has not seen a call yet since another context knew the last one; all of it
            begins anew if the first call is not like those of that context.
        hook: that of its site, where it has one alone.
        edits: what is edited in it, in the order in which edits of one module run.
        stays: whether what is known of calls is kept for another context when this one closes.

    Raises:
        EditNeverFiredError: on closing without an error, while another thread of this context is
            still running the model, or when others have removed its hooks.
    """

    followed: Followed | None = None
    _eagerly: run_eagerly | None = None
    latest: ForwardCall | None = None
    opening: Opening | None = None
    resumed: Sequence["Renewed"] = ()
    stays = False
    hook: Any = None
    edits: Sequence[Any] = ()
    _looked = -1

    def __init__(
        self,
        model: nn.Module,
        follows: Sequence[Follows] = (),
        *,
        trunk: Trunk | None = None,
        reruns: bool = False,
        warns: bool = False,
        graphs: bool = False,
    ) -> None:
        super().__init__()
        whose = trunk or Trunk.of(model)
        self.model, self.trunk, self.plain = model, whose.module, whose.plain
        self._inner = inner_model(model)
        self._stack = whose.stack
        compares, counts = bool(follows), any([item.counts for item in follows])
        absolute = (warns or compares) and whose.absolute
        self.texts = Texts(absolute, puts_tokens_in_front(model), compares, counts)
        # What runs once more in a backward pass is to be known then.
        self.texts.distinct = reruns
        self._names = positional(self.trunk)
        self.others: set[str] = set()
        self.passes = itertools.count()
        # Of threads that share the context one at a time has its call read.
        self._beginning = threading.RLock()
        self._follows, self.reruns = follows, reruns
        self.steps = [item.step for item in follows if not item.counts]
        self._threads: set[int] = set()
        # By thread: whether a plain module's site ran in the calls under way; and what an adapter
        # is about to do.
        self.under_way: dict[int, list[ForwardCall]] = {}
        self._ran: dict[int, list[bool]] = {}
        self._prompts: dict[int, Any] = {}
        self._outer: dict[int, dict[str, Any]] = {}
        self._n_before: dict[int, int] = {}
        # What notes a call that is like the one before; see Texts.repeated.
        self.repeat: Function | None = None
        # What compiled code is told of its sites, with what that refers to.
        self.sites: list[Site] = []
        # Calls that a backward pass may run again: by where their tokens lie, and by the shape of
        # these, how many there were and the latest; and by what they were given, their blocks.
        self._noted: dict[int, tuple[StorageWeakRef, ForwardCall]] = {}
        self._shapes: dict[torch.Size, tuple[int, ForwardCall]] = {}
        self._room = KEPT
        self._entered: dict[int, ForwardCall] = {}
        # By thread: the pass of a compiled graph.
        self._in_graph: dict[int, ForwardCall] = {}
        self._graphs = graphs
        # A site of these that was proven without another stack's stream to read behind it.
        self.uncrossed: object = None
        self.alike: torch.Size | None = None
        self._pass: _Pass | None = None

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def _open(self) -> None:
        model, trunk, ends = self.model, self.trunk, None
        if self._graphs:
            followed = self.followed = Followed(trunk, self, self._names, CACHES)
            ends = followed.entered, followed.left
        else:
            eagerly = run_eagerly(model)
            eagerly.__enter__()
            self._eagerly = eagerly
        if self._pass is None:
            self._pass = _Pass(self)
        self._pass.traced = ends
        self.around(trunk, self._pass)
        inner = self._inner
        kind = type(model if inner is model else unwrapped_module(model))
        if has(kind, "get_prompt"):
            self.replace(model, "get_prompt", _note_prompts)
        if inner is not model is not trunk and has(kind, "get_base_model"):
            self.before(model, self._before_adapter)
        if self._stack != "encoder":
            for outer in (model,) if inner is model else (model, inner):
                # Its own forward may be a captured graph, which runs no module within.
                if outer is not trunk and own_forward(outer) is not None:
                    self.before(outer, self._before_whole)
                    self.after(outer, self._after_whole)
        _watch_cuda_graphs()
        self._begin()

    def _begin(self) -> None:
        """Act on what runs here from now on."""
        self.opening = opening = Opening(self)
        self.texts.belong(opening)
        _open.set((*opened(), opening))

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> None:
        there = self._leave()
        if self._eagerly is not None:
            self._eagerly.__exit__(kind, *raised)
        if kind is None:
            if not there:
                raise EditNeverFiredError(
                    f"something has removed all hooks of {type(self.model).__name__} while this "
                    f"context was open, as a call of pyvene's IntervenableModel does, so what ran "
                    f"after that was not edited or read: give it a copy of the model"
                )
            self._check_ended()
            self.texts.finish()

    def _leave(self) -> bool:
        self.opening = None
        _open.set(opened())
        there = self.remove()
        if self.followed is not None:
            self.followed.close()
        if not self.stays:
            self.forget()
        return there

    def forget(self) -> None:
        """Leave nothing that refers to itself, so that all is freed at once."""
        self.repeat = self.followed = self._pass = self.hook = self._entries = None
        self.texts.forget()
        if self._threads <= {get_ident()} and not any(self.under_way.values()):
            for site in self.sites:
                site.held = []

    def may_stay(self, hooks: int) -> bool:
        """Whether it knows its calls by the last one, and has but so many hooks of sites."""
        known = self._graphs and self.repeat is not None and not self._methods
        here = self._threads == {get_ident()} and not any(self.under_way.values())
        return known and here and len(self._hooks) == hooks and self.noted()

    def keep(self, site: Site) -> bool:
        """Keep what is known of calls like the last ones, and of one site in them, for another
        context; with nothing of the model's or the caller's. Whether there is such a thing.
        """
        call = self.texts.keep()
        if call is None:
            return False
        self.latest, self.sites = call, [site]
        if self._noted or not self._shapes:
            alone = replace(call, like=False, same=None, found={})
            self._shapes = {torch.Size((call.batch, call.front + call.length)): (1, alone)}
        for noted in (self.others, self._noted, self._in_graph):
            noted.clear()
        self.model = self.trunk = self._inner = _NO_MODULE
        return True

    def resume(self, model: nn.Module, trunk: nn.Module, parts: "Sequence[Renewed]") -> bool:
        """Open once more, for another context on the same model; False where hooks at sites are to
        be set anew.
        """
        self.model, self.trunk, self._inner = model, trunk, inner_model(model)
        self.resumed, self.stays, self.passes = parts, False, itertools.count()
        if self.followed is not None and self.followed.again():
            if self.put_back():
                self._begin()
                return True
            self.followed.close()
        self.followed = None
        self.__enter__()
        return False

    def renew(self) -> None:
        """Forget the calls of an earlier context: the first one of this is not like them."""
        if any(self.under_way.values()):  # in another thread it is
            self.first()
            return
        parts, self.resumed = self.resumed, ()
        self.repeat = self.latest = None
        self.sites = []
        for noted in (self._threads, self.under_way, self._shapes):
            noted.clear()
        self.texts.renew()
        for part in parts:
            part.renew()

    def first(self) -> None:
        """The first call is like those of an earlier context, and was noted as under way."""
        self.resumed = ()
        self.texts.first()

    def look(self) -> None:
        """Take notice of hooks that others have set since this was last asked, in whatever way."""
        # Every hook of torch's, of whatever kind, has the next number.
        if RemovableHandle.next_id == self._looked:
            return
        for kept, number, _, added, (table, *_) in [*self._hooks]:
            added.look(kept.module, cast("OrderedDict[int, Any]", table), number)
        self._looked = RemovableHandle.next_id

    def acts(self) -> bool:
        """Whether what runs here and now belongs to this context."""
        # On a device a backward pass runs in threads of its own, which know of no context.
        return self.opening in _open.get() or (
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
        if self.plain:
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
        if self.texts.n_calls != 1 or self.latest is None or not in_backward():
            forward = vars(self.trunk).get("forward")
            ours = stood_for(forward) is not forward
            raise PositionError(
                f"a block ran outside of a forward pass of {type(self.trunk).__name__}, so one "
                f"cannot say which tokens it was given: run the model itself, and turn gradient "
                f"checkpointing on before the context opens"
                f"{'' if ours else ' (its forward was replaced: do that before the context opens)'}"
            )
        return self.latest

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """A pass of the trunk begins: what it is the last of until it is over; None of others'."""
        with self._beginning:
            return self._begin_pass(args, kwargs)

    def _begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        thread = get_ident()
        if not self.acts():
            self.others.add(threading.current_thread().name)
            return None
        if _is_tracing() or any(map(_dispatch_mode, _TRACERS)):
            raise CompiledModelError(
                "torch.jit.trace and make_fx would keep what an edit did to the one example that "
                "they see, and FakeTensorMode has no values that it could look at: trace the model "
                "outside of the context, or use torch.compile"
            )
        if self.resumed:
            self.renew()
        self._threads.add(thread)
        if self.plain:
            ran = self._ran.setdefault(thread, [])
            ran.append(False)
            return ran
        call, transformed = None, in_transforms()
        if self.texts.n_calls and not (
            transformed or len(args) > len(self._names) or in_backward()
        ):
            given = dict(zip(self._names, args, strict=False))
            given.update(kwargs)
            call = self.texts.like(given, len(args))
        self.repeat, calls = None, self.under_way.setdefault(thread, [])
        if call is None:
            call = self._read(args, kwargs, transformed)
            if self.alike is not None and self.texts.stand(call, self.alike):
                self.alike = None
        else:
            for step in self.steps:
                step(call)
            self.texts.note(call, call.tokens)
            self.latest = call
        if not (transformed or call.again):
            whose = {"open": _open, "opening": self.opening, "calls": calls}
            self.repeat = self.texts.repeated(call, args, kwargs, **whose)
        calls.append(call)
        return calls

    def _read(self, args: Any, kwargs: Any, transformed: bool) -> ForwardCall:
        """A call that is unlike the one before."""
        thread, given = get_ident(), arguments_of(self.trunk, args, kwargs, self._names)
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
        if again and isinstance(tokens, Tensor):
            known = self.latest if self.plain else self._known(tokens)
            if known is not None:
                return replace(known, again=True, tokens=tokens)
        self.repeat = None
        if self.uncrossed is not None and given.get("encoder_hidden_states") is not None:
            raise SiteError(
                f"{self.uncrossed} was found and proven with no encoder_hidden_states: what "
                f"cross-attention adds of them comes behind it, and no odds there decide what the "
                f"block returns. Use pre or post; or the encoder–decoder that the model is in, if "
                f"that reads tokens, and 'decoder.{self.uncrossed}'"
            )
        call = self.texts.read(given, prompt, held=held)
        for item in self._follows:
            item.see(call)
        self.texts.accept()
        self.texts.note(call, call.tokens)
        self.latest = call
        if again:
            return replace(call, again=True)
        if isinstance(tokens, Tensor) and concrete(tokens):
            # Without the tokens, which are large: as long as they are there, it may run again.
            known, noted = replace(call, tokens=tokens.new_empty(0)), self._noted
            noted[tokens.data_ptr()] = StorageWeakRef(tokens.untyped_storage()), known
            count, _ = self._shapes.get(tokens.shape[:2], (0, known))
            self._shapes[tokens.shape[:2]] = count + 1, known
            if len(noted) > self._room:
                self._noted = {n: one for n, one in noted.items() if not one[0].expired()}
                self._room = max(KEPT, 2 * len(self._noted))
        return call

    def _known(self, tokens: Tensor) -> ForwardCall | None:
        """The call that a backward pass runs again with these tokens, or None.

        Raises:
            PositionError: it is not known, and matters to a scope.
        """
        place = tokens.data_ptr() if concrete(tokens) else 0
        if place in self._noted:
            storage, known = self._noted[place]
            same = (known.batch, known.front + known.length) == tokens.shape[:2]
            if same and not storage.expired():
                return known
        # They may have been made anew, as embeddings are within what is checkpointed.
        count, only = self._shapes.get(tokens.shape[:2], (0, None))
        if count == 1:
            return only
        if any([item.counts for item in self._follows]):
            raise PositionError(
                f"a backward pass runs the model once more (activation checkpointing) on tokens "
                f"{tuple(tokens.shape[:2])} that were made anew, and {count} passes had such: "
                f"which of them it is, a scope cannot tell. Make the tokens or embeddings outside "
                f"of what is checkpointed, or give positions as a tensor"
            )
        return None

    def enter(self, given: dict[str, Any], held: Tensor | int | None) -> None:
        """A pass begins in a compiled graph, that goes on from ``held`` tokens in a cache."""
        if self.resumed:
            self.renew()
        if self.acts():
            before = len(self._hooks)
            self.look()
            if len(self._hooks) > before:
                warn(
                    EditOverwrittenWarning,
                    "hooks of others were found that this graph of torch.compile may hold: whether "
                    "they change what an edit puts in place is known from the next pass on",
                )
            next(self.passes)
            self._threads.add(get_ident())
            with self._beginning:
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
        if self.resumed:
            self.renew()
        known = None
        if ticket is not None:
            known = self._in_graph.get(get_ident(), self.latest)
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
        others = self._threads - {get_ident()}
        frames = sys._current_frames() if others else {}
        for thread in others:
            frame = frames.get(thread)
            while frame is not None:
                if any(frame.f_locals.get("self") is part for part in (self.model, self.trunk)):
                    raise EditNeverFiredError(
                        "the context has closed while another thread was running the model: what "
                        "it does from now on is not edited. Wait for it within the context"
                    )
                frame = frame.f_back
        frames.clear()  # this one is among them


class _Pass:
    """The passes of a trunk in a context, each around the trunk's ``forward``."""

    traced: tuple[Traced, Traced] | None = None

    def __init__(self, watch: Watch) -> None:
        self.watch, self.under_way, self.steps = watch, watch.under_way, watch.steps
        self.again, self.note = watch.texts.again, watch.texts.note

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watch, calls = self.watch, self.under_way.get(get_ident())
        if RemovableHandle.next_id != watch._looked:
            watch.look()
        repeat, resumed = watch.repeat, watch.resumed
        # Within transforms of others a context knows what it has done outside of them.
        known = repeat is not None and not (resumed and _transforms() is not None)
        if not known or repeat is None or repeat(args, kwargs) is None:
            calls = self.begin(calls, args, kwargs)
        elif resumed:
            watch.first()
        if calls is None:
            return forward(*args, **kwargs)
        next(watch.passes)
        try:
            output = forward(*args, **kwargs)
        except BaseException:
            # Stopped before a site, perhaps: no other run of it is to count in place of that.
            passes = next(watch.passes)
            for each in watch.edits:
                each.skip(passes)
            raise
        finally:
            call = calls.pop()
        if not (watch.plain or call.like):
            watch.texts.note_result(call, output)
            call.like = call.same is call
        return output

    def begin(self, calls: list[Any] | None, args: Any, kwargs: Any) -> list[Any] | None:
        """See :meth:`Watch.begin`; ``calls``: those under way."""
        # Of the two that tell of a trace, that which torch itself has just asked.
        plain = _trace() is None and _transforms() is None and _backward_pass() == -1
        if plain and calls is not None and self.watch.opening in _open.get():
            call = self.again(args, kwargs)
            if call is not None:
                for step in self.steps:
                    step(call)
                self.note(call, call.tokens)
                calls.append(call)
                return calls
        return self.watch.begin(args, kwargs)


def _note_prompts(owner: nn.Module, get_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """The method of peft that makes virtual tokens, seen by all contexts on its model."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        prompt = get_prompt(*args, **kwargs)
        for opening in _open.get():
            if opening.watch.model is owner:
                opening.watch._prompts[get_ident()] = prompt
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
        return tuple([id(opening.watch) for opening in opened()])

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


def opened() -> tuple[Opening, ...]:
    """What is open here and now, without what another thread has closed."""
    return tuple([opening for opening in _open.get() if opening.lasts])


def _plain(value: Any) -> Any:
    """A value out of the transforms that it is wrapped in, if it has one."""
    return unwrapped(value) if isinstance(value, Tensor) and concrete(value) else value


def in_backward() -> bool:
    """Whether this is part of a backward pass, which runs checkpointed blocks again."""
    return bool(_backward_pass() != -1)
