"""Reading and editing the residual stream of an untouched model; the only file with hooks.

`Ln.mid` is no module's output. It is read as block input + attention output, and written by
changing the attention module's output, so that the skip path and the MLP both see the edit.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from rich.progress import track
from torch import Tensor, nn

from lrqp_torch.errors import EditNeverFiredError, NonFiniteError, PositionError, WidthError
from lrqp_torch.positions import ForwardCall, Positions
from lrqp_torch.sites import PARTS, Located, Site, blocks_of, family_of, locate, trunk_of


@dataclass(frozen=True)
class EditContext:
    """Where the activations that an edit receives come from.

    Attributes:
        index: which of the intervention's (example, token) pairs these rows are, (N,).
        example: row of the batch of each, (N,).
        token: column of each, (N,).
        realise: maps float64 activations (N, d) to the values that the stream will really hold
            when they are put in place, in float64. At ``mid`` that is attention output + block
            input, rounded as the model rounds it.
    """

    index: Tensor
    example: Tensor
    token: Tensor
    realise: Callable[[Tensor], Tensor]


class Edit(Protocol):
    """Anything that maps activations (N, d) at some positions to edited activations (N, d)."""

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Return the edited activations; rows that equal x are left untouched, bit for bit."""


@dataclass(frozen=True)
class Intervention:
    """One edit at one site: ``edit`` receives the activations at ``positions``.

    Attributes:
        site: such as ``"L6.mid"``.
        positions: LongTensor (B,), LongTensor (B, n) or BoolTensor (B, T).
        edit: for example ``lambda x, context: x + direction``.
    """

    site: str
    positions: Tensor
    edit: Edit


@contextmanager
def intervene(model: nn.Module, interventions: Sequence[Intervention]) -> Iterator[list[Edit]]:
    """Apply edits to every forward pass of ``model`` within the context.

    Edits at one site run in the order given. The model itself is not changed: when the context
    closes, also by an exception, all hooks are gone. With a KV cache, positions are absolute, and
    an edit runs in the call whose tokens it names.

    To read the edited stream, use :func:`capture` within the context: transformers' own
    ``output_hidden_states`` may record a block's output before an edit of it.

    Args:
        model: a transformers model with a row in :data:`lrqp_torch.sites.FAMILIES`.
        interventions: at least one.

    Yields:
        The edits, in the order given, as a convenience for reading what they recorded.

    Raises:
        SiteError, UnknownFamilyError, PositionError: on entering, before anything runs.
        PositionError: in the forward pass, when positions do not fit the batch or are padding.
        NonFiniteError, WidthError: in the forward pass, when an edit returns NaN, infinity or
            another shape.
        EditNeverFiredError: on closing, when positions never ran through the model.
    """
    applied = [
        _Applied(item, Positions.parse(item.positions), locate(model, item.site))
        for item in interventions
    ]
    if not applied:
        raise PositionError("no interventions were given: nothing would be edited")
    _warn_of_dropout(model)
    with ExitStack() as stack:
        calls = _watch_calls(model, stack, [item.positions for item in applied])
        for item in sorted(applied, key=lambda item: item.located.site):
            item.attach(stack, calls)
        yield [item.edit for item in interventions]
    # Reached only when the body did not raise: its own error says more than this one would.
    for item in applied:
        item.raise_unless_fired()


class _Applied:
    """An intervention on a particular model, and which of its positions have run."""

    def __init__(self, item: Intervention, positions: Positions, located: Located) -> None:
        self.item, self.positions, self.located = item, positions, located
        self.fired = torch.zeros(len(positions.token), dtype=torch.bool)

    def attach(self, stack: ExitStack, calls: list[ForwardCall]) -> None:
        def edit(stream: Tensor, residual: Tensor | None) -> Tensor:
            return self.apply(stream, residual, calls[-1])

        _attach(stack, self.located, edit)

    def apply(self, stream: Tensor, residual: Tensor | None, call: ForwardCall) -> Tensor:
        """The module's tensor with the edited rows in place.

        ``residual`` is the block input at ``mid``, where ``stream`` is the attention output and
        the activation is their sum; elsewhere None.
        """
        positions = self.positions = self.positions.to(stream.device)
        present = (positions.token >= call.past) & (positions.token < call.past + call.length)
        index = present.nonzero().squeeze(-1)
        if len(index) == 0:
            return stream
        rows, columns = positions.example[index], positions.token[index] - call.past
        written = stream[rows, columns]
        base = None if residual is None else residual[rows, columns]
        x = written if base is None else written + base

        def place(values: Tensor) -> Tensor:
            """What to write so that the stream holds ``values``, as nearly as its dtype can."""
            wide = values.double()
            return (wide if base is None else wide - base.double()).to(stream.dtype)

        def realise(values: Tensor) -> Tensor:
            placed = place(values.to(stream.dtype))  # edits return the stream's dtype
            return (placed if base is None else placed + base).double()

        # A copy, so that an edit which works in place is seen to have changed something.
        edited = self.item.edit(x.clone(), EditContext(index, rows, columns + call.past, realise))
        self._check(x, edited, stream.dtype)
        changed = (edited != x).any(-1, keepdim=True)
        self.fired[index.cpu()] = True
        return stream.index_put((rows, columns), torch.where(changed, place(edited), written))

    def _check(self, x: Tensor, edited: Tensor, dtype: torch.dtype) -> None:
        site = self.located.site
        if not isinstance(edited, Tensor) or edited.shape != x.shape:
            shape = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise WidthError(
                f"the edit at {site} returned {shape} for activations {tuple(x.shape)}"
            )
        if not bool(torch.isfinite(edited.to(dtype)).all()):
            raise NonFiniteError(
                f"the edit at {site} returned NaN, infinity, or more than {dtype} can hold"
            )

    def raise_unless_fired(self) -> None:
        if bool(self.fired.all()):
            return
        missed = (~self.fired).nonzero().flatten()
        pairs = [(int(self.positions.example[i]), int(self.positions.token[i])) for i in missed[:5]]
        raise EditNeverFiredError(
            f"the edit at {self.located.site} never ran at {len(missed)} of {len(self.fired)} "
            f"positions, the first (example, token) are {pairs}. Run the model inside the context; "
            f"with a KV cache, positions before the cached part have passed already"
        )


class _StopForwardError(Exception):
    """Ends a forward pass after the last site that a capture needs; never leaves this file."""


@torch.no_grad()
def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: Sequence[str | Site],
    positions: Tensor | None = None,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Activations at sites and positions; keeps nothing else, and runs no further than needed.

    Args:
        model: a transformers model with a row in :data:`lrqp_torch.sites.FAMILIES`.
        inputs: arguments of the model's forward, tensors with one row an example; moved to the
            model's device.
        sites: names such as ``["L6.mid", "L7.pre"]``.
        positions: LongTensor (n,) or (n, k), or BoolTensor (n, T), on the padded input as given;
            default all tokens, padding included.
        batch_size: examples a forward pass; default all at once.
        device: where to keep the activations; default the model's device.
        progress: show a progress bar.

    Returns:
        For each name activations in the stream's dtype: (n, d) for positions (n,), (n, k, d) for
        (n, k), (N, d) for a mask with N true entries in row-major order, (n, T, d) without.

    Raises:
        SiteError, UnknownFamilyError, PositionError: bad input, named.
    """
    located = [locate(model, site) for site in sites]
    if not located:
        raise PositionError("no sites were given: nothing would be captured")
    n_examples, length = _count_tokens(inputs)
    if inputs.get("past_key_values") is not None:
        raise PositionError(
            "capture stops the forward pass early, which would leave the KV cache in inputs half "
            "filled; give the whole text without past_key_values"
        )
    if positions is not None:
        parsed = Positions.parse(positions)
        if parsed.batch != n_examples:
            raise PositionError(
                f"positions are for {parsed.batch} examples, inputs have {n_examples}"
            )
        if positions.dtype == torch.bool and positions.shape[1] != length:
            raise PositionError(
                f"the mask of positions has {positions.shape[1]} columns, the inputs have {length}"
            )
    _warn_of_dropout(model)

    batch_size = n_examples if batch_size is None else batch_size
    if batch_size < 1:
        raise PositionError(f"batch_size must be at least 1, got {batch_size}")
    starts: Any = range(0, n_examples, batch_size)
    if progress:
        starts = track(starts, description="capturing activations")
    pieces: dict[str, list[Tensor]] = {str(item.site): [] for item in located}
    for start in starts:
        rows = slice(start, start + batch_size)
        batch = _slice_inputs(inputs, rows, n_examples, model)
        wanted = None if positions is None else positions[rows]
        for name, activations in _capture_batch(model, batch, located, wanted).items():
            pieces[name].append(activations.to(device) if device is not None else activations)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _capture_batch(
    model: nn.Module, batch: dict[str, Any], located: list[Located], positions: Tensor | None
) -> dict[str, Tensor]:
    """One forward pass, ended at the last site."""
    wanted = None
    if positions is not None and not (positions.dtype == torch.bool and not positions.any()):
        wanted = Positions.parse(positions)
    captured: dict[str, Tensor] = {}
    last = max(item.site for item in located)

    with ExitStack() as stack:
        _watch_calls(model, stack, [wanted] if wanted is not None else [])

        def keep(item: Located) -> Callable[[Tensor, Tensor | None], Tensor]:
            def read(stream: Tensor, residual: Tensor | None) -> Tensor:
                activations = stream if residual is None else stream + residual
                if wanted is not None:
                    at = wanted.to(stream.device)
                    activations = activations[at.example, at.token].reshape(*wanted.shape, -1)
                elif positions is not None:
                    activations = activations[positions.to(stream.device)]
                captured[str(item.site)] = activations.detach()
                if item.site == last:
                    raise _StopForwardError
                return stream

            return read

        for item in sorted(set(located), key=lambda item: item.site):
            _attach(stack, item, keep(item))
        with suppress(_StopForwardError):
            model(**batch)
    missing = [str(item.site) for item in located if str(item.site) not in captured]
    if missing:
        raise EditNeverFiredError(f"the forward pass never reached {', '.join(missing)}")
    return captured


@contextmanager
def record_stream(model: nn.Module, first_position: int) -> Iterator[list[Tensor]]:
    """Keep the input of every block from a column on, (B, T − first_position, d) each.

    Yields:
        A list that holds one tensor a block, in order, once a forward pass has run.
    """
    recorded: list[Tensor] = []

    def keep(stream: Tensor, residual: Tensor | None) -> Tensor:
        recorded.append(stream[:, first_position:].detach().clone())
        return stream

    with ExitStack() as stack:
        for layer in range(len(blocks_of(model))):
            _attach(stack, locate(model, Site(layer, PARTS.index("pre"))), keep)
        yield recorded


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
    family, heads = family_of(model), int(cast(Any, model).config.num_attention_heads)
    recorded: dict[int, Tensor] = {}
    with ExitStack() as stack:
        calls = _watch_calls(model, stack, [at])

        def keeper(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
                here = at.to(args[0].device)
                rows = args[0][here.example, here.token - calls[-1].past]
                recorded[layer] = rows.detach().unflatten(-1, (heads, -1))

            return keep

        for layer in layers:
            block = locate(model, Site(layer, PARTS.index("pre"))).block
            projection = block.get_submodule(family.output_projection)
            stack.callback(projection.register_forward_pre_hook(keeper(layer)).remove)
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
    path = family_of(model).blocks
    parent, _, name = path.rpartition(".")
    owner, blocks = trunk_of(model).get_submodule(parent), blocks_of(model)

    def replace_stream(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (stream, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream}

    # Prepended: edits of this block's input must find the stream already in place.
    hook = blocks[layer].register_forward_pre_hook(replace_stream, prepend=True, with_kwargs=True)
    setattr(owner, name, blocks[layer:])
    try:
        yield
    finally:
        setattr(owner, name, blocks)
        hook.remove()


def _attach(
    stack: ExitStack, located: Located, visit: Callable[[Tensor, Tensor | None], Tensor]
) -> None:
    """Call ``visit(tensor, residual)`` at a site, and go on with the tensor that it returns."""
    if located.site.part == "pre":

        def before_block(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (visit(args[0], None), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": visit(kwargs["hidden_states"], None)}

        stack.callback(
            located.block.register_forward_pre_hook(before_block, with_kwargs=True).remove
        )
        return

    residual: list[Tensor] = []

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tensor = output if isinstance(output, Tensor) else output[0]
        visited = visit(tensor, residual.pop() if located.site.part == "mid" else None)
        return visited if isinstance(output, Tensor) else (visited, *output[1:])

    if located.site.part == "post":
        stack.callback(located.block.register_forward_hook(after).remove)
        return

    # The first norm reads the block input as it is after all edits of it, in whatever order
    # contexts were nested; a pre-hook on the block might still see it before.
    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        residual[:] = [args[0]]

    stack.callback(located.first_norm.register_forward_pre_hook(remember).remove)
    stack.callback(located.attention_output.register_forward_hook(after).remove)


def _watch_calls(
    model: nn.Module, stack: ExitStack, positions: Sequence[Positions]
) -> list[ForwardCall]:
    """A list whose last entry describes the forward pass under way; checks positions first."""
    calls: list[ForwardCall] = []
    absolute = family_of(model).absolute_positions
    trunk = trunk_of(model)

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = ForwardCall.read(module, args, kwargs, absolute)
        for item in positions:
            call.check(item)
        calls[:] = [call]

    stack.callback(trunk.register_forward_pre_hook(before_forward, with_kwargs=True).remove)
    return calls


def _warn_of_dropout(model: nn.Module) -> None:
    def rate(module: nn.Module) -> Any:
        # Attention functions draw their own masks at a rate that the attention module names.
        return (
            module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        )

    rates = [rate(module) for module in model.modules() if module.training]
    if any(isinstance(value, int | float) and value > 0 for value in rates):
        warnings.warn(
            "the model is in training mode and drops out activations at random; call model.eval()",
            stacklevel=4,
        )


def _count_tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """B and T."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0], inputs[name].shape[1]
    raise PositionError(f"inputs need input_ids or inputs_embeds, got {sorted(inputs)}")


def _slice_inputs(
    inputs: Mapping[str, Any], rows: slice, n_examples: int, model: nn.Module
) -> dict[str, Any]:
    device = cast(Any, trunk_of(model)).device
    return {
        name: value[rows].to(device)
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == n_examples
        else value
        for name, value in inputs.items()
    }
