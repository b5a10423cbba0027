"""Recording and editing attention patterns, in one place for all model families.

Within the context the model's attention runs through one function registered with transformers'
``AttentionInterface``. It calls the family's own eager implementation, so logits and patterns are
exactly eager's, and hands the pattern to whoever asked for it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.errors import PositionError, SiteError, UnknownFamilyError, WidthError
from lrqp_torch.stream.compiled import modules_of
from lrqp_torch.stream.passes import ForwardCall
from lrqp_torch.stream.sites import blocks_of, projection_of
from lrqp_torch.stream.watch import Watch

NAME = "lrqp_patterns"

Visit = Callable[[Tensor], Tensor | None]
"""Receives a pattern (B, heads, queries, keys); returns another to use instead, or None."""

_visits: dict[int, list[tuple[Watch, Visit]]] = {}


class _Shown(str):
    """The name under which patterns are shown; copies of a model have what was there before."""

    before: str | None

    def __deepcopy__(self, memo: object) -> str | None:
        return self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ()) if self.before is None else (str, (self.before,))


@contextmanager
def visit_patterns(
    model: nn.Module, visits: Mapping[int, Visit], watch: Watch | None = None
) -> Iterator[None]:
    """Show every forward pass's attention patterns to functions, which may replace them.

    Contexts may be nested; inner visits see what outer ones returned. The model's previous
    attention implementation is restored when the context closes.

    Args:
        model: a transformers model that dispatches its attention through ``AttentionInterface``.
        visits: layer to function.
        watch: what says which passes are those of the context.

    Raises:
        SiteError: a layer out of range.
        UnknownFamilyError: the model's attention cannot be dispatched.
    """
    watch = watch or Watch(model)
    modules = {layer: _attention_module(model, layer) for layer in visits}
    config = getattr(model, "config", None)
    previous = getattr(config, "_attn_implementation", None)
    for layer, visit in visits.items():
        _visits.setdefault(id(modules[layer]), []).append((watch, visit))
    try:
        if previous != NAME:
            _show(model, previous)
        with watch:
            yield
    finally:
        for module in modules.values():
            _visits[id(module)] = [item for item in _visits[id(module)] if item[0] is not watch]
            if not _visits[id(module)]:
                del _visits[id(module)]
        if previous != NAME:
            _switch(model, previous)


@contextmanager
def record_patterns(
    model: nn.Module, layers: Sequence[int], queries: Tensor
) -> Iterator[dict[int, Tensor]]:
    """Keep the attention of one query token an example: ``Ln.Hh.pattern``.

    Args:
        model: a transformers model.
        layers: blocks to read.
        queries: the query tokens, LongTensor (B,), columns of the padded input.

    Yields:
        Layer to probabilities over all keys, (B, heads, T), from the last forward pass.
    """
    recorded: dict[int, Tensor] = {}
    watch = Watch(model)

    def keeper(layer: int) -> Visit:
        def keep(pattern: Tensor) -> None:
            example, row = _query_rows(pattern, queries, watch.current())
            recorded[layer] = pattern[example, :, row].detach().clone()

        return keep

    with visit_patterns(model, {layer: keeper(layer) for layer in layers}, watch):
        yield recorded


@contextmanager
def set_patterns(
    model: nn.Module, patterns: Mapping[tuple[int, int], Tensor], queries: Tensor
) -> Iterator[None]:
    """Set the attention of chosen heads from one query token an example to given probabilities.

    Args:
        model: a transformers model.
        patterns: (layer, head) to probabilities over all keys, (B, T), such as were recorded.
        queries: the query tokens, LongTensor (B,), columns of the padded input.

    Raises:
        WidthError: in the forward pass, when a pattern is not (B, T).
    """
    by_layer: dict[int, dict[int, Tensor]] = {}
    for (layer, head), pattern in patterns.items():
        by_layer.setdefault(layer, {})[head] = pattern
    watch = Watch(model)

    def setter(layer: int, heads: dict[int, Tensor]) -> Visit:
        def replace(pattern: Tensor) -> Tensor:
            example, row = _query_rows(pattern, queries, watch.current())
            edited = pattern.clone()
            for head, wanted in heads.items():
                if not 0 <= head < pattern.shape[1]:
                    raise SiteError(f"L{layer} has {pattern.shape[1]} heads, no H{head}")
                if wanted.shape != (pattern.shape[0], pattern.shape[3]):
                    raise WidthError(
                        f"the pattern for L{layer}.H{head} is {tuple(wanted.shape)}, the model "
                        f"attends over {(pattern.shape[0], pattern.shape[3])}"
                    )
                edited[example, head, row] = wanted.to(pattern)
            return edited

        return replace

    visits = {layer: setter(layer, heads) for layer, heads in by_layer.items()}
    with visit_patterns(model, visits, watch):
        yield


def _query_rows(pattern: Tensor, queries: Tensor, call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Index of each example's query in a pattern whose first queries may be in a KV cache."""
    row = queries.to(pattern.device) - call.past
    if queries.shape != (call.batch,) or bool(((row < 0) | (row >= call.length)).any()):
        raise PositionError(
            f"queries must be ({call.batch},) tokens from {call.past} to {call.end - 1}, got "
            f"{tuple(queries.shape)} with values {int(queries.min())} to {int(queries.max())}"
        )
    return torch.arange(call.batch, device=pattern.device), row + call.front


def _attention_module(model: nn.Module, layer: int) -> nn.Module:
    """The module that calls the attention function: the one that owns W_O."""
    blocks = blocks_of(model)
    if not 0 <= layer < len(blocks):
        raise SiteError(f"layer {layer}: the model has {len(blocks)} blocks")
    projection = projection_of(model, layer)
    names = {module: name for name, module in blocks[layer].named_modules()}
    return blocks[layer].get_submodule(names[projection].rpartition(".")[0])


def _show(model: Any, previous: str | None) -> None:
    """Let a model's attention run through this file."""
    _register()
    _switch(model, NAME)
    shown = _Shown(NAME)
    shown.before = previous
    for module in modules_of(model):
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == NAME:
            config._attn_implementation_internal = shown


def _switch(model: Any, implementation: str | None) -> None:
    switch = getattr(model, "set_attn_implementation", None)
    if switch is not None:
        switch(implementation)
    if switch is None or model.config._attn_implementation != implementation:
        raise UnknownFamilyError(
            f"{type(model).__name__} does not dispatch its attention through transformers' "
            f"AttentionInterface, so its patterns cannot be read"
        )


@cache
def _register() -> None:
    # What dispatches attention is heavy to load, and needed only where a model is.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The family's eager attention, with the pattern shown to those who asked for it."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if attention_mask is not None and attention_mask.dtype == torch.float64:
        # Some families take the softmax in float32, where float64's lowest number is −∞, and a
        # padding token that may attend to nothing would become NaN.
        attention_mask = attention_mask.clamp_min(torch.finfo(torch.float32).min)
    output, pattern = eager(module, query, key, value, attention_mask, **options)
    edited = pattern
    for watch, visit in _visits.get(id(module), []):
        answer = visit(edited) if watch.acts() else None
        edited = edited if answer is None else answer
    if edited is not pattern:
        groups = edited.shape[1] // value.shape[1]
        spread = value.repeat_interleave(groups, dim=1)
        output = torch.matmul(edited, spread).transpose(1, 2).contiguous()
    return output, edited
