"""Hooks at the sites of an untouched model, each for the passes of its own context.

`Ln.mid` is no module's output in most models. It is read as block input + scale · attention output,
and written by changing the attention module's output, so that the skip path and the MLP both see
the edit. In blocks that normalise after adding, it is a module's own output.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import ModelError, PositionError, SiteError, warn
from lrqp_torch.stream import repeats
from lrqp_torch.stream.compiled import run_eagerly
from lrqp_torch.stream.discovery import beside_of, first_tensor, with_first
from lrqp_torch.stream.following import Follower
from lrqp_torch.stream.passes import ForwardCall
from lrqp_torch.stream.positions import Positions
from lrqp_torch.stream.sites import (
    Located,
    Site,
    blocks_of,
    head_count,
    layout_of,
    locate,
    projection_of,
    trunk_of,
)
from lrqp_torch.stream.traced import (
    KEPT_AT,
    Traced,
    compiler,
    stream_given,
    tensors_given,
    traces,
    with_stream,
)
from lrqp_torch.stream.watch import (
    GLOBAL,
    RAN_TWICE,
    Hook,
    Hooks,
    Watch,
    _Added,
    others_in,
)

Residual = Tensor | tuple[Tensor, Tensor] | None
"""What a tensor is added to: a stream; that and what is added to the tensor first; or None where it
is the stream itself."""

Visit = Callable[[Tensor, Residual, float, ForwardCall], Tensor]
"""Called with a module's tensor, what it is added to, what it is multiplied by before, and the call
that it is part of; gives the tensor to go on with."""


Offer = Callable[[repeats.Site, Tensor, Residual, float, ForwardCall], repeats.Function | None]
"""Called with a site of ``rows.c``, which knows of a pass and its stream, and with what a visit was
called with; gives what visits it in passes like that one, or None."""


class Promised(Protocol):
    """An edit that promises odds of what it leaves at a site."""

    def overwritten(self, left: Tensor, found: Tensor, call: ForwardCall) -> None:
        """What was left at the site, and what a hook that was set later has made of it."""

    def note_left(self) -> None:
        """Note in every pass what is left, for :meth:`changed_by`."""

    def changed_by(self, module: nn.Module, before: Tensor, after: Tensor) -> None:
        """What a module returned, and what hooks of others have made of it."""


def attach(
    watch: Watch,
    located: Located,
    visit: Visit,
    offer: Offer | None = None,
    promised: Promised | None = None,
    kept: "InputHook | None" = None,
) -> "InputHook":
    """Call ``visit(tensor, residual, scale, call)`` at a site in the passes of a context.

    The stream there is residual + scale · tensor, and scale · tensor where residual is None. The
    tensor is (B, T, d) in a language model, whatever shape the module gives it; of a head, (B, T,
    head width). ``offer`` may give what does the same in passes like the one before. What is left
    there is to stay if it was ``promised``, which is told of hooks that change it. The hook may be
    ``kept`` from an earlier context of this watch.
    """
    if located.site.part == "mid" and not (located.site.stack or located.trunk.crossed):
        watch.uncrossed = located.site
    kind = InputHook if located.side == "input" else OutputHook
    at = kept.again(located) if kept else kind(watch, located, visit, offer, promised)
    if located.side == "input":
        watch.before(located.module, at)
        return at
    assert isinstance(at, OutputHook)
    watch.after(located.module, at)
    if located.residual is None:
        return at
    # The reader is given the stream as it is after all edits of it, in whatever order contexts were
    # nested; a pre-hook on the block might still see it before. First, as what other hooks there
    # give the reader in its place is not what the skip path holds.
    watch.before(located.residual, at.remember, first=True, traced=at.remembered)
    for part, _ in located.beside:
        watch.after(part, at.note, last=True)
    return at


class InputHook(Hook):
    """Before the module whose input a site is.

    Args:
        watch: whose passes these are.
        located: the site.
        visit, offer, promised: see :func:`attach`.
    """

    def __init__(
        self,
        watch: Watch,
        located: Located,
        visit: Visit,
        offer: Offer | None = None,
        promised: Promised | None = None,
    ) -> None:
        self.watch, self.located, self.scale = watch, located, located.scale
        self.promised = promised
        # Hooks of others that are looked at, by their numbers; and modules whose hooks are.
        self.seen: set[int] = set()
        self.around: set[nn.Module] = set()
        self.visit, self.under_way = visit, watch.under_way
        # What graphs follow in place of this hook, and of that which keeps what is added to.
        self.traced: Traced | None = None
        self.remembered: Traced | None = None
        # A call that is known to have streams of a shape; and, by thread, the latest call.
        self.known: tuple[ForwardCall | None, torch.Size | None] = None, None
        self.latest: dict[int, ForwardCall] | None = None
        if located.site.path is not None:
            watch.texts.distinct, self.latest = True, {}
        plain = self.latest is None and located.features is None
        self.function = visit if plain else self.within
        # What is offered for passes that are like the one before, and given.
        self.offer = offer if plain and not located.beside and not watch.reruns else None
        self.repeat: repeats.Function | None = None
        self.residuals: dict[int, Tensor] = {}
        self.follow()

    def follow(self) -> None:
        """Have graphs follow what this does."""
        located, followed = self.located, self.watch.followed
        if followed is not None:
            self.traced, self.remembered = followed.install(
                str(located.site),
                located.side == "input",
                located.residual is not None,
                located.scale,
                self.within,
            )

    def keep(self) -> None:
        """Hold nothing of the model or of the calls of a context."""
        self.located, self.known = None, (None, None)  # type: ignore[assignment]
        self.residuals.clear()

    def again(self, located: Located) -> Self:
        """The hook for another context."""
        self.located = located
        self.follow()
        return self

    def renew(self) -> None:
        """As it was before any pass."""
        self.repeat = None
        self.known = None, None
        self.residuals.clear()

    @staticmethod
    def shaped(tensor: Tensor, call: ForwardCall) -> Tensor:
        """A tensor of a call, (B, T, …)."""
        # Some modules read and return all tokens in one row; others have one token an example.
        if tensor.ndim == 3:
            return tensor
        return tensor.reshape(call.batch, call.front + call.length, -1)

    def within(self, tensor: Tensor, residual: Residual, scale: float, call: ForwardCall) -> Tensor:
        """What stands in for a tensor of a call, in whatever shape."""
        if self.latest is not None and not call.again:
            # What was named by its path need not be a block, each of which runs once.
            if self.latest.get(get_ident()) is call:
                raise PositionError(f"{self.located.site} {RAN_TWICE}")
            self.latest[get_ident()] = call
        shaped, features = self.shaped(tensor, call), self.located.features
        part = shaped if features is None else shaped[..., features]
        kept = self.visit(part, residual, scale, call)
        if kept is part:
            return tensor
        if features is not None:
            before, behind = shaped[..., : features.start], shaped[..., features.stop :]
            kept = torch.cat([before, kept.to(tensor.dtype), behind], -1)
        return kept if tensor.ndim == 3 else kept.reshape(tensor.shape)

    def joined(
        self, module: nn.Module, table: OrderedDict[int, Any], own: int, other: int, front: bool
    ) -> None:
        """See :meth:`~.watch._Added.joined`: what a later hook makes of the stream is looked at."""
        if self.promised is None or front or other in self.seen:
            return
        self.seen.add(other)
        between = partial(table.move_to_end, other)
        self.look_at(module, self.located.side == "input", self.compare, between)

    def look(self, module: nn.Module, table: OrderedDict[int, Any], own: int) -> None:
        """See :meth:`~.watch._Added.look`."""
        later = list(table)
        for other in later[later.index(own) + 1 :] if self.promised else ():
            if not isinstance(table[other], _Added):
                self.joined(module, table, own, other, False)

    def look_at(
        self, module: nn.Module, given: bool, compare: Visit, between: Callable[[], Any]
    ) -> None:
        """Let ``compare`` be told what hooks make of the tensor that a module is ``given``, or
        returns; ``between``: puts those hooks behind the first of two that look.
        """
        left, watch = dict[int, Tensor](), self.watch
        traced = remembered = None
        if watch.followed is not None:
            name = f"{self.located.site}{KEPT_AT}"
            traced, remembered = watch.followed.install(name, given, True, 1.0, compare)

        def found(args: Any, kwargs: Any, output: tuple[Any, ...]) -> Tensor | None:
            if not watch.acts():
                return None
            return first_tensor(output[0]) if output else stream_given(module, args, kwargs)

        def before(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            tensor = found(args, kwargs, output)
            if tensor is not None:
                left[get_ident()] = tensor.detach().clone()

        def behind(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            held, tensor = left.pop(get_ident(), None), found(args, kwargs, output)
            calls = self.under_way.get(get_ident())
            call = calls[-1] if calls else watch.latest
            if held is not None and tensor is not None and call is not None:
                compare(tensor.detach(), held, 1.0, call)

        add = watch.before if given else watch.after
        add(module, before, traced=remembered)
        between()
        add(module, behind, traced=traced)

    def compare(self, tensor: Tensor, held: Residual, scale: float, call: ForwardCall) -> Tensor:
        """Tell of what was left at the site, ``held``, and of what is there now."""
        assert isinstance(held, Tensor)
        assert self.promised is not None
        features, pair = self.located.features, (held, tensor)
        if held.shape == tensor.shape:
            pair = self.shaped(held, call), self.shaped(tensor, call)
            if features is not None:
                pair = pair[0][..., features], pair[1][..., features]
        self.promised.overwritten(*pair, call)
        return tensor

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the module goes on with, or None where that is what it was given."""
        if self.traced is not None and (traces() or compiler._is_compiling_flag):
            return self.traced(module, args, kwargs)
        if self.repeat is not None:
            again = self.repeat(args, kwargs)
            if again is not None:
                return None if again is args else (again, kwargs)
        stream = stream_given(module, args, kwargs)
        calls, known = self.under_way.get(get_ident()), self.known
        call = calls[-1] if calls else None
        if call is not known[0] or call is None or stream.shape != known[1]:
            call = self.called(stream, stream)
            if call is None:
                return None
        run = self.function if stream.ndim == 3 else self.within
        kept = run(stream, None, self.scale, call)
        if self.offer is not None and call.same is not None:
            self.repeat = self.offered(self.offer, stream, None, call)
        return None if kept is stream else with_stream(args, kwargs, kept, stream)

    def offered(
        self, offer: Offer, stream: Tensor, residual: Residual, call: ForwardCall
    ) -> repeats.Function | None:
        """What does in passes like this one what was just done."""
        thread = get_ident()
        calls, same = self.under_way.get(thread), call.same
        if call.again or not calls or type(stream) is not Tensor or stream.ndim != 3:
            return None
        if not (stream.is_cpu and stream.is_contiguous()):
            return None
        site = repeats.Site(thread, id(calls), id(same))
        site.held = [calls, same]
        self.watch.sites.append(site)
        if residual is not None:
            site.residuals, site.key = id(self.residuals), id(thread)
            site.held += [self.residuals, thread]
        if not repeats.see(stream, site.stream):
            return None
        return offer(site, stream, residual, self.scale, call)

    def called(self, stream: Tensor, entered: Tensor) -> ForwardCall | None:
        """The call in which the module has a stream."""
        call = self.watch.call(stream, entered)
        # What runs once more in a backward pass is to be known then.
        self.known = None if self.watch.reruns else call, stream.shape
        return call


class OutputHook(InputHook):
    """After the module whose output a site is, or what is added to it."""

    def __init__(self, watch: Watch, located: Located, *visits: Any) -> None:
        super().__init__(watch, located, *visits)
        # What it is added to is kept by thread; by thread and module, what is added to it before.
        self.besides: dict[tuple[int, nn.Module], Tensor] = {}
        self.first = False

    def remember(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the module that reads what is added to."""
        if not self.first:
            self.residuals[get_ident()] = stream_given(module, args, kwargs)

    def look(self, module: nn.Module, table: OrderedDict[int, Any], own: int) -> None:
        """See :meth:`~.watch._Added.look`."""
        super().look(module, table, own)
        located, reader, promised = self.located, self.located.residual, self.promised
        if reader is not None and not self.first and others_in(GLOBAL):
            # Those of all modules run before those of one: what they make of its input is not what
            # the skip path holds either.
            def remember(module: nn.Module, args: Any, kwargs: Any = None) -> None:
                if module is reader:
                    self.residuals[get_ident()] = stream_given(module, args, kwargs)

            self.watch.before_all(reader, remember)
            self.first = True
        # What passes the tensor on, as dropout does, or holds the sum, as a layer of T5.
        for part in located.neighbours if promised else ():
            hooks = cast(OrderedDict[int, Any], part._forward_hooks)
            if promised and hooks and part not in self.around and others_in(hooks):
                self.around.add(part)
                promised.note_left()
                self.look_at_all(part, hooks)

    def look_at_all(self, part: nn.Module, hooks: OrderedDict[int, Any]) -> None:
        """Look at what hooks of others make of what another module returns."""

        def compare(tensor: Tensor, held: Residual, scale: float, call: ForwardCall) -> Tensor:
            assert isinstance(held, Tensor) and self.promised is not None
            if held.shape == tensor.shape and not call.again:
                held, tensor = self.shaped(held, call), self.shaped(tensor, call)
                self.promised.changed_by(part, held, tensor)
            return tensor

        self.look_at(part, False, compare, lambda: hooks.move_to_end(next(reversed(hooks)), False))

    def note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After a module whose output is added to the tensor first."""
        found = first_tensor(output)
        assert found is not None  # as it was in the trial
        self.besides[get_ident(), module] = found

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        """What is gone on with, or None where that is what the module gives."""
        if self.traced is not None and (traces() or compiler._is_compiling_flag):
            return self.traced(module, args, kwargs, output)
        if self.repeat is not None:
            again = self.repeat(output)
            if again is not None:
                return None if again is output else again
        stream, located, thread = first_tensor(output), self.located, get_ident()
        if stream is None or not stream.is_floating_point():
            raise SiteError(
                f"{located.site}: {type(module).__name__} returns {type(output).__name__}, of "
                f"which the first part is no tensor of activations"
            )
        # A pass of another thread may have begun before this was hooked.
        residual = self.residuals.pop(thread, None)
        if residual is None and located.residual is not None:
            if not self.watch.acts():
                return None
            raise PositionError(
                f"{located.site}: the {type(module).__name__} ran without the "
                f"{type(located.residual).__name__} that reads the stream before it, as where a "
                f"hook calls it by itself, so what it is added to is not known"
            )
        calls, known = self.under_way.get(thread), self.known
        call = calls[-1] if calls else None
        if call is not known[0] or call is None or stream.shape != known[1]:
            entered = residual
            if entered is None:
                entered = next(tensors_given(args, kwargs), stream)
            call = self.called(stream, entered)
            if call is None:
                return None
        whole: Residual = residual
        if residual is not None and located.beside:
            others = {part: self.besides.pop((thread, part)) for part, _ in located.beside}
            beside = beside_of(located.beside, others)
            assert beside is not None
            whole = residual, beside.reshape(residual.shape)
        run = self.function if stream.ndim == 3 else self.within
        kept = run(stream, whole, self.scale, call)
        if self.offer is not None and call.same is not None:
            self.repeat = self.offered(self.offer, stream, whole, call)
        return None if kept is stream else with_first(output, kept)


def drops_out(trained: Sequence[nn.Module]) -> bool:
    """Whether a model's modules that are in training mode drop out activations."""

    def rate(module: nn.Module) -> Any:
        # Attention functions draw their own masks at a rate that the attention module names.
        return (
            module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        )

    return any(isinstance(value, int | float) and value > 0 for value in map(rate, trained))


def warn_of_dropout(trained: Sequence[nn.Module]) -> None:
    """Warn when they do."""
    if drops_out(trained):
        warn(
            UserWarning,
            "the model is in training mode and drops out activations at random; call model.eval()",
        )


def warn_of_checkpointing(trained: Sequence[nn.Module]) -> bool:
    """Whether blocks run once more in the backward pass; warn if torch would not notice a change.

    Without ``use_reentrant`` torch itself raises where the second run differs from the first.

    Args:
        trained: a model's modules that are in training mode.
    """
    for module in trained if torch.is_grad_enabled() else ():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if options.get("use_reentrant") is not False:
            warn(
                UserWarning,
                "gradient checkpointing runs the blocks again in the backward pass: call backward "
                "before the context closes, or the gradient is that of the unedited model. With "
                "use_reentrant=False torch raises instead",
            )
        return True
    return False


@contextmanager
def record_stream(model: nn.Module, first_position: int) -> Iterator[tuple[list[Tensor], Watch]]:
    """Keep the input of every block from a column on, (B, T − first_position, d) each.

    Yields:
        A list that holds one tensor a block, in order, once a forward pass has run; and what
        watches that.
    """
    recorded: list[Tensor] = []

    def keep(stream: Tensor, residual: Residual, scale: float, call: ForwardCall) -> Tensor:
        recorded.append(stream[:, call.front + first_position :].detach().clone())
        return stream

    watch = Watch(model)
    with watch:
        for layer in range(len(blocks_of(model))):
            attach(watch, locate(model, Site("pre", layer)), keep)
        yield recorded, watch


@contextmanager
def record_heads(
    model: nn.Module, layers: Sequence[int], positions: Tensor
) -> Iterator[dict[int, Tensor]]:
    """Keep the outputs of attention heads before W_O at one token an example: ``Ln.Hh.z``.

    Args:
        model: a transformers model.
        layers: blocks to read.
        positions: LongTensor (B,), columns of the padded input.

    Yields:
        Layer to (B, heads, head width), from the last forward pass within the context.
    """
    at = Positions.parse(positions)
    heads = head_count(model)
    recorded: dict[int, Tensor] = {}
    follower = Follower(at)
    watch = Watch(model, [follower])

    def keeper(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            heads_out = stream_given(module, args, kwargs)
            call = watch.call(heads_out, heads_out)
            if call is not None:
                here = at.to(heads_out.device)
                columns = here.token - call.past + call.front
                rows = heads_out[here.example, columns]
                recorded[layer] = rows.detach().unflatten(-1, (heads, -1))

        return keep

    with watch:
        for layer in layers:
            projection = projection_of(model, locate(model, f"L{layer}.pre").site.layer)
            watch.before(projection, keeper(layer))
        yield recorded


@contextmanager
def resume_at(model: nn.Module, layer: int, stream: Tensor) -> Iterator[None]:
    """Let forward passes within the context start at a block, with a given stream as its input.

    The blocks below are taken out of the model for as long: they do not run, and an edit at one of
    them fails loudly because it never fires.

    Args:
        model: a transformers model; restored when the context closes.
        layer: the first block to run.
        stream: what that block reads, (B, T, d): the clean ``L{layer}.pre``.
    """
    path = layout_of(model).blocks
    parent, _, name = path.rpartition(".")
    owner = trunk_of(model).get_submodule(parent)
    blocks: Any = owner.get_submodule(name)

    thread = get_ident()

    def replace_stream(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if get_ident() != thread:
            raise ModelError(
                f"another thread is rerunning this model from block {layer} on, so it cannot be "
                f"run as a whole meanwhile; give each thread a model of its own, or a lock"
            )
        return with_stream(args, kwargs, stream)

    with run_eagerly(model):
        hooks = Hooks()
        # Prepended: edits of this block's input must find the stream already in place.
        hooks.before(blocks[layer], replace_stream, first=True)
        setattr(owner, name, blocks[layer:])
        try:
            yield
        finally:
            setattr(owner, name, blocks)
            hooks.remove()
