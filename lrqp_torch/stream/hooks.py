"""Hooks on an untouched model: the only file that registers them.

`Ln.mid` is no module's output in most models. It is read as block input + scale · attention output,
and written by changing the attention module's output, so that the skip path and the MLP both see
the edit. In blocks that normalise after adding, it is a module's own output.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.stream.compiled import run_eagerly
from lrqp_torch.stream.positions import Follows, ForwardCall, Positions
from lrqp_torch.stream.sites import (
    PARTS,
    Located,
    Site,
    blocks_of,
    head_count,
    layout_of,
    locate,
    projection_of,
    trunk_of,
)

Visit = Callable[[Tensor, Tensor | None, float], Tensor]
"""Called with a module's tensor, what it is added to (None where it is the stream itself), and what
it is multiplied by before; gives the tensor to go on with."""


def attach(stack: ExitStack, located: Located, visit: Visit) -> None:
    """Call ``visit(tensor, residual, scale)`` at a site, and go on with what it returns.

    The stream there is residual + scale · tensor, and the tensor itself where residual is None.
    """
    if located.site.part == "pre":

        def before_block(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (visit(args[0], None, 1.0), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": visit(kwargs["hidden_states"], None, 1.0)}

        stack.callback(
            located.block.register_forward_pre_hook(before_block, with_kwargs=True).remove
        )
        return

    residual: list[Tensor] = []
    scale = located.cut.scale if located.site.part == "mid" else None

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tensor = output if isinstance(output, Tensor) else output[0]
        if scale is None:
            visited = visit(tensor, None, 1.0)
        else:
            visited = visit(tensor, residual.pop(), scale)
        return visited if isinstance(output, Tensor) else (visited, *output[1:])

    written = located.block if located.site.part == "post" else located.attention_output
    stack.callback(written.register_forward_hook(after).remove)
    if scale is None:
        return

    # The first reader sees the block input as it is after all edits of it, in whatever order
    # contexts were nested; a pre-hook on the block might still see it before.
    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        residual[:] = [args[0] if args else kwargs["hidden_states"]]

    stack.callback(
        located.first_reader.register_forward_pre_hook(remember, with_kwargs=True).remove
    )


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Scale · tensor, rounded as the model rounds it; the tensor itself for a scale of 1."""
    return tensor if scale == 1 else tensor * scale


def watch_calls(
    model: nn.Module, stack: ExitStack, positions: Sequence[Positions | Follows]
) -> list[ForwardCall]:
    """A list whose last entry describes the forward pass under way; checks positions first."""
    stack.enter_context(run_eagerly(model))
    warn_of_checkpointing(model)
    calls: list[ForwardCall] = []
    absolute = layout_of(model).absolute_positions
    trunk = trunk_of(model)

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = ForwardCall.read(module, args, kwargs, absolute)
        for item in positions:
            call.check(item)
        calls[:] = [call]

    stack.callback(trunk.register_forward_pre_hook(before_forward, with_kwargs=True).remove)
    return calls


def warn_of_dropout(model: nn.Module) -> None:
    """Warn when the model is in training mode and drops out activations."""

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


def warn_of_checkpointing(model: nn.Module) -> None:
    """Warn when blocks run once more in the backward pass, and torch would not notice a change.

    Without ``use_reentrant`` torch itself raises where the second run differs from the first.
    """
    if not torch.is_grad_enabled():
        return
    for module in model.modules():
        if not (module.training and getattr(module, "gradient_checkpointing", False)):
            continue
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if options.get("use_reentrant") is not False:
            warnings.warn(
                "gradient checkpointing runs the blocks again in the backward pass: call backward "
                "before the context closes, or the gradient is that of the unedited model. With "
                "use_reentrant=False torch raises instead",
                stacklevel=4,
            )
            return


@contextmanager
def record_stream(model: nn.Module, first_position: int) -> Iterator[list[Tensor]]:
    """Keep the input of every block from a column on, (B, T − first_position, d) each.

    Yields:
        A list that holds one tensor a block, in order, once a forward pass has run.
    """
    recorded: list[Tensor] = []

    def keep(stream: Tensor, residual: Tensor | None, scale: float) -> Tensor:
        recorded.append(stream[:, first_position:].detach().clone())
        return stream

    with ExitStack() as stack:
        stack.enter_context(run_eagerly(model))
        for layer in range(len(blocks_of(model))):
            attach(stack, locate(model, Site(layer, PARTS.index("pre"))), keep)
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
    heads = head_count(model)
    recorded: dict[int, Tensor] = {}
    with ExitStack() as stack:
        calls = watch_calls(model, stack, [at])

        def keeper(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
                here = at.to(args[0].device)
                rows = args[0][here.example, here.token - calls[-1].past]
                recorded[layer] = rows.detach().unflatten(-1, (heads, -1))

            return keep

        for layer in layers:
            projection = projection_of(model, locate(model, f"L{layer}.pre").site.layer)
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
    path = layout_of(model).blocks
    parent, _, name = path.rpartition(".")
    owner, blocks = trunk_of(model).get_submodule(parent), blocks_of(model)

    def replace_stream(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (stream, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream}

    # Prepended: edits of this block's input must find the stream already in place.
    with run_eagerly(model):
        hook = blocks[layer].register_forward_pre_hook(
            replace_stream, prepend=True, with_kwargs=True
        )
        setattr(owner, name, blocks[layer:])
        try:
            yield
        finally:
            setattr(owner, name, blocks)
            hook.remove()
