"""Editing the residual stream within a context: any function, at any sites and positions."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator, suppress
from dataclasses import dataclass, replace
from itertools import count
from threading import get_ident
from typing import Any, Generic, Protocol, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lrqp_torch.errors import (
    FEW,
    EditNeverFiredError,
    EditOverwrittenError,
    EditOverwrittenWarning,
    LRQPError,
    NonFiniteError,
    PositionError,
    SiteError,
    WidthError,
    capturing,
    concrete,
    in_transforms,
    outside_transforms,
    readable,
    unwrapped,
    warn,
)
from lrqp_torch.stream import repeats
from lrqp_torch.stream.compiled import Census, compiled_apart, inner_model, modules_of
from lrqp_torch.stream.discovery import added
from lrqp_torch.stream.following import FEW_NUMBERS, KINDS, Follower, Rows
from lrqp_torch.stream.hooks import (
    Residual,
    attach,
    warn_of_checkpointing,
    warn_of_dropout,
)
from lrqp_torch.stream.passes import ForwardCall, puts_tokens_in_front
from lrqp_torch.stream.positions import Positions, Where
from lrqp_torch.stream.sites import Known, Located, Site, known_of, locate
from lrqp_torch.stream.traced import may_trace, refuse_within_compilation
from lrqp_torch.stream.watch import Watch, opened

Record = TypeVar("Record")

MANY = 64
"""So many numbers that nobody has waited for are kept, before they are put together."""
_IN_NO_GRADIENT = repeats.Guards()


@dataclass(frozen=True, eq=False)
class Placement:
    """How edited activations are put in place, and what the stream holds of them then.

    At ``mid`` the stream is block input + scale · attention output, of which the latter is written;
    elsewhere it is scale · what is written, and the scale is 1 but where the model has another.
    """

    base: Tensor | None  # the block input at `mid`, (N, d); else None
    scale: float  # what the written tensor is multiplied by
    dtype: torch.dtype  # of the stream
    beside: Tensor | None = None  # what is added to scale · what is written before that

    def place(self, values: Tensor) -> Tensor:
        """What to write so that the stream holds ``values``, as nearly as its dtype can."""
        if self.scale == 1 and self.beside is None:
            if self.base is None:
                return values.to(self.dtype)
            if values.dtype == self.base.dtype == self.dtype:
                # Rounded once, as what float64 gives is when it is rounded to these dtypes.
                return values - self.base
        wide = values.double()
        if self.base is not None:
            wide = wide - self.base.double()
        if self.beside is not None:
            wide = wide - self.beside.double()
        if self.scale != 1:
            # By a number a GPU multiplies with its reciprocal, which is not what a kernel does.
            wide = wide / torch.full((), self.scale, dtype=wide.dtype, device=wide.device)
        return wide.to(self.dtype)

    def __call__(self, values: Tensor) -> Tensor:
        """What the stream holds, in float64, when float64 activations are put in place."""
        placed = self.place(values.to(self.dtype))  # edits return the stream's dtype
        held = added(placed, self.scale, self.beside)
        return (held if self.base is None else self.base + held).double()


@dataclass(frozen=True)
class EditContext:
    """Where the activations that an edit receives come from.

    Attributes:
        index: which of the intervention's (example, token) pairs these rows are, (N,). In a scope
            pairs are numbered in the order in which the model first reads them.
        example: row of the batch of each, (N,).
        token: column of each, (N,).
        realise: maps float64 activations (N, d) to the values that the stream will really hold
            when they are put in place, in float64: a :class:`Placement`, in a model.
        request: in a scope, the request that each row belongs to, (N,); else None.
        shown: which rows count, (N,) bool, where the attention mask is on a GPU, which is not
            waited for; what an edit does to the others is neither kept nor recorded. None: all.
        forward_pass: the number of the pass in the context, from 0; −1 where it is computed once
            more for its derivatives, as checkpointing does, of which nothing is recorded.
    """

    index: Tensor
    example: Tensor
    token: Tensor
    realise: Callable[[Tensor], Tensor]
    request: Tensor | None = None
    shown: Tensor | None = None
    forward_pass: int = 0


class _Here(EditContext):
    """Where some rows of a pass come from; made into tensors where somebody asks."""

    def __init__(self, at: Rows, number: int, *put: Any) -> None:
        own = vars(self)
        own["_at"], own["_put"], own["forward_pass"] = at, put, number
        own["request"], own["shown"] = at.request, at.shown

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        if name == "realise":
            own[name] = Placement(*own["_put"])
        elif name in ("index", "example", "token"):
            own[name] = getattr(own["_at"], name)
        else:
            raise AttributeError(name)
        return own[name]


class Edit(Protocol):
    """Anything that maps activations (N, d) at some positions to edited activations (N, d)."""

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Return the edited activations; rows that equal x are left untouched, bit for bit."""


class Recorded(Edit, Protocol):
    """An edit that is told of more than activations, as far as it has these methods.

    One that is ``certified`` gives finite activations of the right shape, or raises; leaves what it
    is given alone, and what it does not edit bit for bit.
    """

    certified: bool

    def edit_stream(
        self, stream: Tensor, residual: Tensor | None, scale: float, at: Rows, forward_pass: int
    ) -> Tensor | None:
        """The stream with rows edited, or what is written of it, as one operation on a device.

        None: the edit is to be called with the rows' activations instead.
        """

    def begin(self, model: nn.Module, site: str | Site) -> None:
        """A context opens, for a model and a site of it."""

    def raise_late(self) -> None:
        """Raise for what went wrong in forward passes so far, where the edit has not waited to
        know; called when the context closes.
        """


@dataclass(frozen=True)
class Intervention:
    """One edit at one site: ``edit`` receives the activations at ``positions``.

    Attributes:
        site: such as ``"L6.mid"``; see :class:`~lrqp_torch.stream.sites.Site`.
        positions: LongTensor (B,), LongTensor (B, n) or BoolTensor (B, T), or lists of these; a
            column of each text, a slice of them, ``"last"``, or a function of the model's inputs;
            or a :class:`~lrqp_torch.Scope` of ``model.generate``, such as ``"generated"``.
        edit: for example ``lambda x, context: x + direction``.
    """

    site: str | Site
    positions: Where
    edit: Edit


def intervene(
    model: nn.Module, interventions: Intervention | Sequence[Intervention]
) -> "Editing[list[Edit]]":
    """Apply edits to every forward pass of ``model`` within the context.

    Edits at one site run in the order given, each on what the one before it wrote. The model itself
    is not changed: when the context closes, also by an exception, all hooks are gone. With a KV
    cache, positions are absolute, and an edit runs in the call whose tokens it names. A
    :class:`~lrqp_torch.Scope` means positions by where they come from: the prompt of
    ``model.generate``, or what it writes.

    To read the edited stream, use :func:`capture` within the context: transformers' own
    ``output_hidden_states`` may record a block's output before an edit of it. Hooks of your own
    that are set on a site's module before the context opens run before the edit; later ones read
    what it has put in place. What a hook on another module makes of it, such as a pre-hook on the
    block behind ``Ln.post``, is behind the site.

    Args:
        model: a transformers model; at the sites of :meth:`~lrqp_torch.Site.module`, any module.
        interventions: one, or a list of at least one.

    Yields:
        The edits, in the order given, as a convenience for reading what they recorded.

    Raises:
        SiteError, UnknownFamilyError, PositionError: on entering, before anything runs.
        PositionError: in the forward pass, when positions do not fit the batch or are padding, or
            a scope cannot tell prompt from new tokens.
        NonFiniteError, WidthError: in the forward pass, when an edit returns NaN, infinity or
            another shape. On a GPU, where that would make every forward pass wait for the device,
            NaN and infinity are raised when the context closes, and so is what the edit itself
            has to say.
        EditNeverFiredError: on closing, when positions never ran through the model, or a scope
            had no token; or a site's module has been replaced.
        PositionError: on closing, when a site's module ran besides in a pass, as by a hook.
        EditOverwrittenError: in the forward pass, when a later hook on a site's module changes
            activations whose odds an edit certifies; on a GPU, on closing.

    Warns:
        EditOverwrittenWarning: an edit that promises odds is followed by another one of the same
            tokens at the same site, in this context or in one within it.
    """
    return Editing(model, interventions, list)


class Editing(ContextDecorator, Generic[Record]):
    """The context of :func:`intervene`: what it does when it opens, and when it closes.

    Args:
        model: the model.
        interventions: one, or a list of at least one.
        yields: ``list`` for the edits, or what the only one is, to be given as it is.
    """

    _trained = False

    def __init__(
        self,
        model: nn.Module,
        interventions: Intervention | Sequence[Intervention],
        yields: type[Record],
    ) -> None:
        self._given = model, interventions, yields
        self._watches: list[tuple[Watch, list[_Applied]]] = []
        self._plan: _Plan | None = None

    def _recreate_cm(self) -> "Editing[Record]":
        return Editing(*self._given)

    def __enter__(self) -> Record:
        refuse_within_compilation()
        model, interventions, yields = self._given
        if self._watches:
            raise LRQPError("this context is open already; open another one for the same edit")
        census = Census.of(model)
        if isinstance(interventions, Intervention):
            if self._resumed(model, interventions, census):
                edit = interventions.edit
                return cast(Record, [edit] if yields is list else edit)
            interventions = [interventions]
        applied = list[_Applied]()
        for item in interventions:
            if not isinstance(item, Intervention):
                raise SiteError(
                    f"intervene takes a list of Intervention, such as [edit.on(site, ...)], got "
                    f"{type(item).__name__}"
                )
            applied.append(_Applied(item, locate(model, item.site, census)))
        if not applied:
            raise PositionError("no interventions were given: nothing would be edited")
        if len(applied) > 1:
            _warn_of_overwriting(applied)
        trained, reruns = census.in_training(model), False
        self._trained = bool(trained)
        if trained:
            warn_of_dropout(trained)
            reruns = warn_of_checkpointing(trained)
        together: dict[object, list[_Applied]] = {}
        for each in applied:
            together.setdefault(each.located.passes, []).append(each)
        graphs = not (reruns or puts_tokens_in_front(model)) and all(
            [_fit_graphs(model, items) for items in together.values()]
        )
        try:
            for items in together.values():
                trunk, follows = items[0].located.trunk, [each.places for each in items]
                watch = Watch(model, follows, trunk=trunk, reruns=reruns, graphs=graphs)
                watch.__enter__()
                self._watches.append((watch, items))
                watch.edits = sorted(items, key=_site_of) if len(items) > 1 else items
                for each in watch.edits:
                    promised = None if each.record is None else each
                    watch.hook = attach(watch, each.located, each.apply, each.offer, promised)
                    each.hook = ref(watch.hook)
                    if each.record is not None:
                        each.record.begin(model, each.item.site)
                watch.look()
            if len(opened()) > 1 or len(applied) > 1:
                _hold_to_each_other(applied)
        except BaseException as error:
            self._leave(type(error), error, error.__traceback__)
            raise
        known, key = known_of(model), _key_of(applied[0].item)
        if (
            len(applied) == 1
            and known is not None
            and isinstance(known.passes.get(key), torch.Size)
        ):
            # The second time that the same is asked, it is known by the first pass.
            watch.alike, known.passes[key] = known.passes[key], _REST
        edits = [each.item.edit for each in applied]
        return cast(Record, edits if yields is list else edits[0])

    def _resumed(self, model: nn.Module, item: Intervention, census: Census) -> bool:
        """Whether the context is opened with what one before it knows of the passes: one of the
        same edit, or of another function, at the same site and positions of a model that is what it
        was.
        """
        known = known_of(model) if isinstance(item.site, str | Site) else None
        key = _key_of(item)
        plan = None if known is None else known.passes.get(key)
        if known is None or not isinstance(plan, _Plan) or not known.holds(model, census):
            return False
        watch, applied, located = plan.watch, plan.applied, known.places[item.site]
        if watch is None or not plan.serves(model, item, located, census):
            return False
        if any([opening.watch.edits for opening in opened()]):
            return False
        known.passes.pop(key, None)
        plan.watch, self._plan, self._trained = None, plan, False
        applied.take(item, located)
        try:
            there = watch.resume(model, located.trunk.module, (applied, watch.hook))
            self._watches.append((watch, [applied]))
            if there:
                watch.hook.located = located
            else:
                attach(watch, located, applied.apply, applied.offer, kept=watch.hook)
            if not applied.resume(model, plan.number):
                watch.hook.renew()
        except BaseException as error:
            self._leave(type(error), error, error.__traceback__)
            raise
        return True

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> None:
        watches, kept = [*self._watches], None
        if kind is None and len(watches) == 1 and len(watches[0][1]) == 1:
            ((watch, (applied,)),) = watches
            kept = _Plan.of(self._given[0], watch, applied, self._plan)
        self._leave(kind, *raised)
        # An error of the body says more than these would.
        for watch, items in watches if kind is None else ():
            for item in items:
                item.close(watch)
        model = self._given[0]
        if model.training and not self._trained and kind is None:
            warn_of_dropout(Census.of(model).in_training(model))
        self._plan = None
        if kept is not None:
            kept.keep()

    def __del__(self) -> None:
        # One that was opened and dropped, as by a bare ``__enter__()``, acts on no further pass.
        if getattr(self, "_watches", None):
            self._leave(GeneratorExit)

    def _leave(self, *raised: Any) -> None:
        """Close what is open, the last first, whatever one of them raises."""
        while self._watches:
            watch, _ = self._watches.pop()
            try:
                watch.__exit__(*raised)
            except BaseException as error:
                self._leave(type(error), error, error.__traceback__)
                raise


def _warn_of_overwriting(applied: Sequence["_Applied"]) -> None:
    """Warn where an edit that promises odds is followed by another of the same tokens there."""
    sites = [each.located.site for each in applied]
    promised: dict[Any, int] = {}
    for place, (site, each) in enumerate(zip(sites, applied, strict=True)):
        if sites.count(site) == 1:
            continue
        keys = [(site, key) for key in Positions.parse(each.item.positions).means()]
        first = next((promised[key] for key in keys if key in promised), None)
        if first is not None:
            warn(
                EditOverwrittenWarning,
                f"edits {first} and {place} write the same tokens at {site}: the odds in the "
                f"record of the first are those that it wrote, and the other changes them. "
                f"JointLRQP promises odds of several variables at once",
            )
            return
        promised.update(dict.fromkeys(keys, place) if each.certified else {})


def _hold_to_each_other(new: Sequence["_Applied"]) -> None:
    """Let edits tell what they do to what others have promised, here or in contexts around."""
    every = [each for opening in opened() for each in opening.watch.edits]
    for place, first in enumerate(every):
        for number, other in enumerate(every) if first.certified else ():
            alike = first.located.module is other.located.module
            if other is first or not (first in new or other in new) or (alike and number < place):
                continue
            if other.located.may_hold_what(first.located) and _may_meet(first, other):
                first.note_left()
                other.tell_of(first)


def _may_meet(first: "_Applied", other: "_Applied") -> bool:
    """Whether two edits may be of the same tokens and features, and that was not said already."""
    parts, at = [first.located.features, other.located.features], [first.places, other.places]
    if None not in parts and parts[0] != parts[1]:
        return False
    means = [{*each.positions.means()} for each in at]
    if means[0].isdisjoint(means[1]):
        return any([each.counts for each in at])
    return first.located.site != other.located.site or first.hook().watch is not other.hook().watch


def _site_of(applied: "_Applied") -> Site:
    return applied.located.site


def _key_of(item: Intervention) -> tuple[object, ...]:
    """What contexts have in common that may follow each other: a site, and an edit or functions."""
    return item.site, id(_owner(item.edit))


def _owner(edit: Any) -> Any:
    """The edit of a run of it; of a function None."""
    return getattr(edit, "edit", None) if hasattr(edit, "raise_late") else None


_NUMBERS = count()
_REST = 16


class _Plan:
    """What a context knows of passes, kept with what is known of its model for the next one.

    It holds neither the model nor the edit, nor anything of the caller's or of a record: those of
    the next context are put in their places.

    Args:
        known: of the model.
        watch, applied: of a context with one edit, that is about to close.
    """

    def __init__(self, known: Known, watch: Watch, applied: "_Applied") -> None:
        edit = applied.item.edit
        self.known, self.watch, self.applied = ref(known), cast(Watch | None, watch), applied
        self.key, self.number, self.thread = _key_of(applied.item), next(_NUMBERS), get_ident()
        self.kind, self.positions = type(edit), applied.places.positions
        self.edit = None if applied.record is None else ref(_owner(edit))

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.watch is not None and not ends():
            self.watch.forget()

    @staticmethod
    def of(
        model: nn.Module, watch: Watch, applied: "_Applied", plan: "_Plan | None"
    ) -> "_Plan | None":
        """That of a context that is about to close; or None, where there is nothing to keep.

        ``plan``: what it went on with.
        """
        known, hook, item = known_of(model), watch.hook, applied.item
        if known is None or hook is None or hook.offer is None or getattr(item.edit, "given", None):
            return None
        if watch.resumed or watch.latest is None:  # there was no pass
            return None
        located = applied.located
        if known.places.get(item.site) is not located or applied.places.counts:
            return None
        if applied.streams is None and (located.residual is not None or located.scale != 1):
            return None
        if hook.repeat is None or not watch.may_stay(2 - (located.residual is None)):
            # Where two contexts in turn are given tokens of a shape, there may be a third; not so
            # soon after one for which this was of no use, as where derivatives are asked for.
            key, rest = _key_of(item), known.passes.get(_key_of(item))
            if isinstance(rest, int) and rest and watch.alike is None:
                known.passes[key] = rest - 1
            elif watch.followed is not None:
                known.note(key, watch.latest.tokens.shape)
            return None
        watch.stays = True
        if plan is None or plan.known() is not known or plan.key != _key_of(item):
            return _Plan(known, watch, applied)
        plan.watch = watch
        return plan

    def keep(self) -> None:
        """Keep it, once the context has closed."""
        watch, known, site = self.watch, self.known(), self.applied.site
        if watch is None or known is None or site is None:
            return
        if self.applied.keep(self.number) and watch.keep(site):
            watch.hook.keep()
            known.note(self.key, self)

    def serves(
        self, model: nn.Module, item: Intervention, located: Located, census: Census
    ) -> bool:
        """Whether a context may go on with it."""
        edit, inner = item.edit, inner_model(model)
        if self.edit is None:
            # A function may be another.
            if hasattr(edit, "raise_late") or hasattr(edit, "edit_stream"):
                return False
        elif type(edit) is not self.kind or self.edit() is not _owner(edit):
            return False
        if self.thread != get_ident() or census.in_training(model) or _is_learned(edit, model):
            return False
        # Its own forward may be a captured graph.
        if "forward" in vars(model) or "forward" in vars(inner):
            return False
        if not may_trace(located.trunk.module, [str(located.site)]) or _is_divided(located):
            return False
        return self.positions.are(Positions.parse(item.positions))


def _fit_graphs(model: nn.Module, applied: Sequence["_Applied"]) -> bool:
    """Whether a graph can hold edits of one trunk: not one that is learned, nor of a module that is
    no language model's. (Nor can it hold blocks that run twice, or tokens put in front.)
    """
    trunk, sites = applied[0].located.trunk, [str(each.located.site) for each in applied]
    edits = [getattr(each.item.edit, "edit", each.item.edit) for each in applied]
    if trunk.plain or any([_is_learned(edit, model) for edit in edits]):
        return False
    if any([each.located.beside or _is_divided(each.located) for each in applied]):
        return False
    return may_trace(trunk.module, sites)


def _is_divided(located: Located) -> bool:
    """Whether what is added at ``mid`` is read in one graph, and the rest of it not."""
    reader, block = located.residual, located.block
    return (
        reader is not None
        and block is not None
        and compiled_apart(block[2], located.module, reader)
    )


def _is_learned(edit: Any, model: nn.Module) -> bool:
    """Whether some parameter of an edit asks for a gradient; of a function, what it refers to."""
    if isinstance(edit, nn.Module):
        for own in Census.of(edit).parameters:
            for part in own.values():
                if part is not None and part.requires_grad:
                    return True
        return False
    if hasattr(edit, "parameters"):
        return any(parameter.requires_grad for parameter in edit.parameters())
    return torch.is_grad_enabled() and any(
        part.requires_grad
        if isinstance(part, Tensor)
        else isinstance(part, nn.Module)
        and not any(part is own for own in modules_of(model))
        and _is_learned(part, model)
        for part in _referred_to(edit)
    )


def _referred_to(function: Any) -> list[Any]:
    """What a function, a method or an object that is called has at hand itself."""
    if isinstance(function, functools.partial):
        return [*_referred_to(function.func), *function.args, *function.keywords.values()]
    owner, code = getattr(function, "__self__", None), getattr(function, "__code__", None)
    if code is None:
        return [*getattr(function, "__dict__", {}).values()]
    known = [*map(function.__globals__.get, code.co_names)]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a name that has no value yet
            known.append(cell.cell_contents)
    return [*known, owner, *getattr(owner, "__dict__", {}).values()]


class _Applied:
    """An intervention on a particular model, and what has come of it."""

    def __init__(self, item: Intervention, located: Located) -> None:
        self.take(item, located)
        self.places = Follower.of(Positions.parse(item.positions))
        # Gives each pass its number.
        self._passes = count()
        # What a function gave for a stream, which compiled code could not put in place.
        self.given: tuple[Tensor, Any] | None = None
        # What others have promised that this may break; and by thread what it has left in the
        # latest call: its number, the tensor's rows and columns, the rows edited, and what the
        # tensor, and the stream, holds there.
        self.behind: list[_Applied] = []
        self.left: dict[int, tuple[int, torch.Size, Rows, list[Tensor]]] | None = None
        self.overwrites: list[tuple[_Applied, Tensor]] = []
        # A call that is one object for all that are like it, and its rows on the CPU.
        self.known: tuple[ForwardCall, Rows] | None = None
        self.largest: list[Tensor] = []
        # Whether a hook has changed what was put in place, where that is not waited for.
        self.changed: list[Tensor] = []
        # What stands for the calls that compiled code edits, and what that is told.
        self.same: ForwardCall | None = None
        self.site: repeats.Site | None = None

    hook: Callable[[], Any]
    """A weak reference to the hook that it is applied by."""

    def take(self, item: Intervention, located: Located) -> None:
        """Be that of an intervention."""
        self.item, self.located = item, located
        edit = cast(Recorded, item.edit)
        self.record = edit if hasattr(edit, "raise_late") else None
        self.raises_late = hasattr(edit, "raise_late")
        self.certified = bool(getattr(edit, "certified", False))
        self.streams = getattr(edit, "edit_stream", None)

    def keep(self, number: int) -> bool:
        """Hold nothing of the model, the edit or the calls, to be taken by another context."""
        keep, site = getattr(self.item.edit, "keep", None), self.site
        if site is None:
            return False
        if self.record is not None and (keep is None or not keep(site, number)):
            return False
        self.item = self.located = self.record = self.streams = None  # type: ignore[assignment]
        self.known = self.given = None
        self._passes, site.done = count(), 0
        site.passes = id(self._passes)
        self.places.forget()
        return True

    def resume(self, model: nn.Module, number: int) -> bool:
        """Let compiled code edit the calls of this context; whether it can."""
        if self.record is None:
            return True
        self.record.begin(model, self.item.site)
        return bool(cast(Any, self.item.edit).resume(self.site, number))

    def renew(self) -> None:
        """As it was before any pass."""
        self.known = self.given = self.same = self.site = None
        self._passes = count()
        # Those that were there when the context opened, whatever the caller has written since.
        self.places.renew(self.places.positions)

    def apply(self, stream: Tensor, residual: Residual, scale: float, call: ForwardCall) -> Tensor:
        """The module's tensor with the edited rows in place.

        ``residual`` is the block input at ``mid``, where ``stream`` is the attention output and
        the activation is block input + scale · attention output; elsewhere None.
        """
        given, self.given = self.given, None
        # Drawn at once: another thread of the context may begin a pass meanwhile.
        number = -1 if call.again else next(self._passes)
        known = self.known
        marked = known is not None and known[0] is call and stream.is_cpu
        at = known[1] if known is not None and marked else self.places.rows(call, stream.device)
        if at is None:
            return stream
        beside = None
        if isinstance(residual, tuple):
            residual, beside = residual
        streams = None if call.again or beside is not None else self.streams
        if streams is not None and (residual is not None or scale == 1):
            whole: Tensor | None = streams(stream, residual, scale, at, number)
            if whole is not None:
                if not marked:
                    self._mark(call, at, stream)
                return whole
        itself = residual is None and scale == 1
        written = x = at.gather(stream)
        if itself:
            context = _Here(at, number, None, scale, x.dtype)
        else:
            base = None if residual is None else at.gather(residual)
            beside = None if beside is None else at.gather(beside)
            x = added(written, scale, beside)
            x = x if base is None else base + x
            context = _Here(at, number, base, scale, x.dtype, beside)
        if self.certified:
            edited = self._edited(x, context)
            seen = not in_transforms() and readable(x)
        else:
            # A copy, so that an edit which works in place is seen to have changed something; what
            # was gathered is one, and there to be gathered again.
            copy = itself and not at.whole
            if given is not None and given[0] is stream:
                edited = given[1]
            else:
                edited = self._edited(x if copy else x.clone(), context)
            plain = scale == 1 and beside is None and at.shown is None
            if plain and type(edited) is Tensor and edited.shape == x.shape:
                whole = None if in_transforms() else at.put(stream, edited, residual)
                if whole is not None:
                    if not marked:
                        self._mark(call, at, stream)
                    return whole
            # What can be looked at now is; all else is when the context closes.
            seen = not in_transforms() and readable(x)
            self._check(x, edited, seen)
        if not marked:
            self._mark(call, at, stream)
        # Also what leaves a row as it is may have a derivative: a learned vector that is still 0.
        learns = edited.requires_grad or forward_ad._current_level >= 0
        changed, seen = at.shown, seen and not learns
        if itself:
            # What is put in its own place need not be told, row by row, from what is not.
            if (
                seen
                and not self.certified
                and torch.equal(edited, x)
                and (at.whole or torch.equal(edited, at.gather(stream)))
            ):
                return stream
            kept = edited if edited.dtype == x.dtype else edited.to(x.dtype)
        else:
            differs = None
            if len(x) > 1 or not seen:
                differs = (edited != x).any(-1)
                rows = differs.tolist() if seen and len(x) <= FEW else ()
                if seen and not (any(rows) if rows else bool(differs.any())):
                    return stream.to(x.dtype)
                differs = None if rows and all(rows) else differs
            elif torch.equal(edited, x):
                return stream.to(x.dtype)
            kept = cast(Placement, context.realise).place(edited)
            if differs is not None and not self.certified and (learns or in_transforms()):
                same = written.to(x.dtype).detach() + (kept - kept.detach())
                kept = torch.where(differs.unsqueeze(-1), kept, same)
            elif differs is not None:
                changed = differs if changed is None else changed & differs
        if changed is not None:
            # Under autocast the attention output is narrower than the sum that the stream will
            # hold.
            kept = torch.where(changed.unsqueeze(-1), kept, written.to(x.dtype))
        elif itself and at.whole and not self.certified:
            kept = kept.clone()  # a tensor of the user's must not become the stream itself
        return at.scatter(stream, kept)

    def offer(
        self,
        site: repeats.Site,
        stream: Tensor,
        residual: Residual,
        scale: float,
        call: ForwardCall,
    ) -> repeats.Function | None:
        """What does this in passes like the one that is under way; see :func:`~.hooks.attach`."""
        if call.again or (torch.is_grad_enabled() and stream.requires_grad):
            return None
        at = self.places.rows(call, stream.device)
        if at is None or at.shown is not None or isinstance(residual, tuple):
            return None
        if self.same is not None and self.site is not None and self.site.done:
            self.places.mark(self.same)
        site.passes, self.same, self.site = id(self._passes), call.same, site
        site.held += [self, at]
        if self.streams is not None:
            offer = getattr(self.item.edit, "offer", None)
            return None if offer is None else offer(site, stream, residual, scale, at)
        kind = KINDS.get(stream.dtype)
        if residual is not None or scale != 1 or self.record is not None or kind is None:
            return None
        rows = stream.new_empty(len(at.index), stream.shape[2])
        place, parts = None if at.whole else at.flat(stream.shape[1]), ()
        site.held += [rows, place, parts]
        if not repeats.see(rows, site.row) or not _IN_NO_GRADIENT.told(site):
            return None
        site.rows, site.parts, site.count = id(rows), id(parts), len(rows)
        site.place = None if place is None else place.data_ptr()
        site.width, site.kind = stream.shape[2], kind
        site.all, site.copies = stream.numel() // stream.shape[2], stream.numel() <= FEW_NUMBERS
        gather, put = repeats.bound("gather", site), repeats.bound("put", site)
        context = _Here(at, 0, None, 1, rows.dtype)

        def repeat(given: Any, *named: Any) -> Any:
            x = gather(given, *named)
            if x is None:
                return None
            edited = self.item.edit(x, context)
            kept = put(given, edited)
            if kept is None:
                # The rest is for :meth:`apply`, which numbers the pass.
                self.given = given if isinstance(given, Tensor) else given[0], edited
            return kept

        return repeat

    def _edited(self, x: Tensor, context: EditContext) -> Tensor:
        """What the edit makes of activations; it does not know of itself where it is."""
        try:
            return self.item.edit(x, context)
        except (WidthError, NonFiniteError) as error:
            raise type(error)(f"the edit at {self.located.site}: {error}") from error

    def skip(self, passes: int) -> None:
        """Draw numbers up to that of a pass."""
        while next(self._passes) < passes:
            pass

    def _mark(self, call: ForwardCall, at: Rows, stream: Tensor) -> None:
        """Note that the edit has run."""
        self.places.mark(call)
        if call.like and not call.continues and stream.is_cpu:
            self.known = call, at

    def _check(self, x: Tensor, edited: Tensor, seen: bool) -> None:
        if not isinstance(edited, Tensor) or edited.shape != x.shape:
            shape = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise WidthError(
                f"the edit at {self.located.site} returned {shape} for activations {tuple(x.shape)}"
            )
        values = edited.detach() if edited.requires_grad else edited
        values = values if values.dtype == x.dtype else values.to(x.dtype)
        if seen or readable(values):
            # A finite sum has finite terms, and is there sooner.
            if not math.isfinite(values.sum().item()):
                self._raise_if_broken(values)
        elif concrete(values):
            # The largest of NaN or infinity is no finite number either; looked at in the end.
            self.largest.append(torch.linalg.vector_norm(unwrapped(values), torch.inf))
            if len(self.largest) == MANY and not capturing(values):
                self.largest = [torch.stack(self.largest).amax()]

    def _raise_if_broken(self, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"the edit at {self.located.site} returned NaN, infinity, or more than "
                f"{values.dtype} can hold"
            )

    def overwritten(self, left: Tensor, found: Tensor, call: ForwardCall) -> None:
        """Raise if a hook that came later has changed the edited rows; see :func:`~.hooks.attach`.

        Raises:
            EditOverwrittenError: it has; on a GPU that is raised when the context closes.
        """
        at = self.places.rows(replace(call, again=True), found.device)
        if at is None or not (concrete(left) and concrete(found)):
            return
        if left.shape == found.shape and left.dtype == found.dtype:
            with outside_transforms():
                rows = [at.gather(unwrapped(stream)) for stream in (left, found)]
                changed = rows[0].ne(rows[1]).any(-1)
                changed = (changed if at.shown is None else changed & at.shown).any()
            if not readable(changed):
                self.changed.append(changed)
                return
            if not bool(changed):
                return
        self._refuse_hook()

    def _refuse_hook(self, module: nn.Module | None = None) -> None:
        kind, at = type(module or self.located.module).__name__, self.located.site
        raise EditOverwrittenError(
            f"a hook on {kind} changes what the edit at {at} has put in place, so the odds are not "
            f"those that it promises: remove the hook, or edit behind it"
            if module
            else f"a hook that was set on {kind} while this context was "
            f"open changes what the edit at {at} has put in place, so the odds are "
            f"not those that it promises: set the hook before the context opens, and the edit "
            f"comes after it"
        )

    def note_left(self) -> None:
        """Note in every pass what is left at the site, for what runs behind it."""
        self.left = {} if self.left is None else self.left
        self._look_at_every_pass()

    def tell_of(self, first: "_Applied") -> None:
        """Tell in every pass whether this changes what another edit has left."""
        self.behind.append(first)
        self._look_at_every_pass()

    def _look_at_every_pass(self) -> None:
        hook = self.hook()
        if hook.function is hook.visit:
            hook.function = self.noted
        hook.visit, hook.repeat, hook.offer = self.noted, None, None

    def noted(self, stream: Tensor, residual: Residual, scale: float, call: ForwardCall) -> Tensor:
        """:meth:`apply`, and what comes of it for others."""
        result = self.apply(stream, residual, scale, call)
        if call.again or not (concrete(stream) and concrete(result)):
            return result
        for first in [*self.behind]:
            changed = first.changes(stream, result, self.located.features)
            if changed is None:
                continue
            if not readable(changed):
                self.overwrites.append((first, changed))
            elif bool(changed):
                self._say_overwritten(first)
        if self.left is not None:
            at = self.places.rows(replace(call, again=True), result.device)
            self.left.pop(get_ident(), None)
            if at is not None:
                self.left[get_ident()] = self._left(at, result, residual, scale)
        return result

    def _left(
        self, at: Rows, result: Tensor, residual: Residual, scale: float
    ) -> tuple[int, torch.Size, Rows, list[Tensor]]:
        base, beside = residual if isinstance(residual, tuple) else (residual, None)
        with outside_transforms(), torch.no_grad():
            written, base, beside = (
                None if part is None else at.gather(unwrapped(part))
                for part in (result, base, beside)
            )
            assert written is not None
            held = added(written, scale, beside)
            held = held if base is None else base + held
        return self.hook().watch.texts.n_calls, result.shape[:2], at, [written.clone(), held]

    def changes(
        self, before: Tensor, after: Tensor, features: slice | None = None
    ) -> Tensor | None:
        """Whether a tensor that held what was left in this call is another now; None: it did not.

        ``features``: which of those of the module's tensor they are.
        """
        number, shape, at, kinds = (self.left or {}).get(get_ident(), (-1, None, None, []))
        if at is None or number != self.hook().watch.texts.n_calls or before.shape[:2] != shape:
            return None
        own = self.located.features
        with outside_transforms(), torch.no_grad():
            x, y = (at.gather(unwrapped(part)) for part in (before, after))
            if features is None and own is not None:
                x, y = x[:, own], y[:, own]
            elif own is None and features is not None:
                kinds = [kind[:, features] for kind in kinds]
            same = [x.eq(kind).all(-1) for kind in kinds if kind.shape == x.shape]
            if not same:
                return None
            changed = torch.stack(same).any(0) & x.ne(y).any(-1)
            return (changed if at.shown is None else changed & at.shown).any()

    def changed_by(self, module: nn.Module, before: Tensor, after: Tensor) -> None:
        """Raise if hooks of others on a module change what it returns, and that was left here.

        Raises:
            EditOverwrittenError: they do; on a GPU that is raised when the context closes.
        """
        changed = self.changes(before, after)
        if changed is not None and not readable(changed):
            self.changed.append(changed)
        elif changed is not None and bool(changed):
            self._refuse_hook(module)

    def _say_overwritten(self, first: "_Applied") -> None:
        self.behind = [each for each in self.behind if each is not first]
        warn(
            EditOverwrittenWarning,
            f"the edit at {self.located.site} changes tokens of which that at "
            f"{first.located.site} has promised odds: its record tells of odds that the stream "
            f"does not hold any more. JointLRQP promises odds of several variables at once",
        )

    def close(self, watch: Watch) -> None:
        """Raise for what went wrong without being seen, and for positions that never ran."""
        if self.changed and bool(torch.stack(self.changed).any()):
            self._refuse_hook()
        if self.located.replaced:
            raise EditNeverFiredError(
                f"the {type(self.located.module).__name__} that {self.located.site} names was "
                f"replaced by another module, or a module around it was, while this context was "
                f"open, as adapters do, so what ran since was not edited: open the context after "
                f"that"
            )
        # Threads that share a context may count past each other.
        alone = len(watch._threads) <= 1 and not watch.plain
        if alone and next(self._passes) > next(watch.passes):
            raise PositionError(
                f"the {type(self.located.module).__name__} that {self.located.site} names ran more "
                f"often than the model did, as where a hook calls it, so what was edited may be "
                f"another run of it than the model's own"
            )
        for first, changed in self.overwrites:
            if first in self.behind and bool(changed):
                self._say_overwritten(first)
        if self.raises_late:
            cast(Recorded, self.item.edit).raise_late()
        if self.largest:
            self._raise_if_broken(torch.stack(self.largest))
        if self.same is not None and self.site is not None and self.site.done:
            self.places.mark(self.same)
        missed = self.places.missed()
        if missed is not None:
            others = ", ".join(sorted(watch.others))
            elsewhere = (
                f". Other threads ran the model ({others}), on which a context of this one does "
                f"not act: open it in the thread that runs the model (not in that of continuous "
                f"batching, generate_batch, which cannot be edited; use generate)"
                if others
                else ""
            )
            raise EditNeverFiredError(f"the edit at {self.located.site} {missed}{elsewhere}")
