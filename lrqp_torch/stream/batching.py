"""Which examples run through the model together, and which columns of them: little padding.

Examples of one length make a batch without padding. So a padded set of n examples is cut into
batches of neighbours in length, and each batch loses the padding that none of its examples needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.errors import PositionError, WidthError
from lrqp_torch.stream.attention import NAME as PATTERNS_SHOWN
from lrqp_torch.stream.sites import family_of

BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Arguments of a model's forward that have one entry a token, (n, T) or (n, T, d)."""


@dataclass(frozen=True)
class Batch:
    """Examples that run together, all over the same number of columns.

    Attributes:
        examples: rows of the inputs in ascending order, LongTensor (b,).
        first: the column of the input at which each of them begins to run, LongTensor (b,).
        width: how many columns run, padding included.
    """

    examples: Tensor
    first: Tensor
    width: int


def count_tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Number of examples n and of columns T of the inputs.

    Raises:
        PositionError: neither ``input_ids`` nor ``inputs_embeds``, or no token in them.
        WidthError: they are not (n, T), or (n, T, d).
    """
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            shape, form = tuple(inputs[name].shape), "(n, T, d)" if "embeds" in name else "(n, T)"
            if len(shape) != form.count(",") + 1:
                raise WidthError(f"{name} must be {form}, got {shape}; for one text use [None]")
            n_examples, length = shape[:2]
            if n_examples == 0 or length == 0:
                lacking = "example" if n_examples == 0 else "token"
                raise PositionError(
                    f"{name} holds no {lacking}, its shape is {shape}: nothing would be captured"
                )
            return n_examples, length
    raise PositionError(f"inputs need input_ids or inputs_embeds, got {sorted(inputs)}")


def may_trim(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether examples may change places and lose padding without a change of what is computed.

    Not so without an attention mask (n, T) that says what padding is; when another tensor among the
    inputs has a shape of its own; when hooks on the model, such as open edits, or attention
    patterns that are shown to someone, count on rows and columns as they are; or when the rotary
    frequencies depend on how long the longest input is (``dynamic`` and ``longrope``).
    """
    n_examples, length = count_tokens(inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    mask = tensors.get("attention_mask")
    if mask is None or mask.shape != (n_examples, length):
        return False
    for name, value in tensors.items():
        rows = (1, n_examples) if name == "position_ids" else (n_examples,)
        if name not in BY_TOKEN or value.shape[0] not in rows or value.shape[1] != length:
            return False
    return not (is_watched(model) or _rotates_by_length(model))


def real_spans(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First real column of each example and the columns from there to its last, each (n,).

    An example without a real token counts as one column.
    """
    real = mask != 0
    length = real.shape[1]
    first = real.byte().argmax(1)
    last = length - 1 - real.flip(1).byte().argmax(1)
    return first, torch.where(real.any(1), last - first + 1, 1)


def in_order(
    length: int, examples: range, batch_size: int | None, batch_tokens: int | None
) -> list[Batch]:
    """Batches of the examples as they stand, over all columns."""
    size = len(examples) if batch_size is None else batch_size
    if batch_tokens is not None:
        size = min(size, max(batch_tokens // length, 1))
    rows = torch.arange(examples.start, examples.stop)
    return [Batch(part, torch.zeros_like(part), length) for part in rows.split(size)]


def by_length(
    mask: Tensor, examples: range, batch_size: int | None, batch_tokens: int | None
) -> list[Batch]:
    """Batches of neighbours in length, the longest first, without the padding that none needs.

    Longest first, so that a batch too large for the memory fails at once. An example that is
    longer than ``batch_tokens`` runs alone.

    Args:
        mask: attention mask of all examples, (n, T), padded on either side.
        examples: the rows to run.
        batch_size: the most examples a batch; None for no limit.
        batch_tokens: the most tokens a batch, padding included; None for no limit.
    """
    first, spans = (part.cpu() for part in real_spans(mask[examples.start : examples.stop]))
    order = spans.argsort(descending=True, stable=True)
    widths = spans[order].tolist()
    batches, start = [], 0
    while start < len(order):
        size = len(order) if batch_size is None else batch_size
        if batch_tokens is not None:
            size = min(size, max(batch_tokens // widths[start], 1))
        rows = order[start : start + size].sort().values
        # A row that is too short for its first real token to lead ends with the input instead.
        begin = first[rows].clamp_max(mask.shape[1] - widths[start])
        batches.append(Batch(rows + examples.start, begin, widths[start]))
        start += size
    return batches


def take(inputs: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """A batch's rows of the inputs as they stand, for ``model(**part)``."""
    n_examples, _ = count_tokens(inputs)
    rows = slice(int(batch.examples[0]), int(batch.examples[-1]) + 1)
    return {
        name: value[rows]
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == n_examples
        else value
        for name, value in inputs.items()
    }


def cut(model: nn.Module, inputs: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """A batch's rows and columns of inputs that :func:`may_trim` allows, for ``model(**part)``.

    A model that counts columns where it is given no ``position_ids`` (learned positions) is told
    the columns of the whole input, so that it computes what it would have computed there.
    """
    n_examples, _ = count_tokens(inputs)
    columns = batch.first[:, None] + torch.arange(batch.width)

    def pick(value: Tensor) -> Tensor:
        every = value.expand(n_examples, *value.shape[1:])
        return every[batch.examples.to(value.device)[:, None], columns.to(value.device)]

    part = {
        name: pick(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    moved = bool((batch.first > 0).any())
    if moved and family_of(model).absolute_positions and inputs.get("position_ids") is None:
        part["position_ids"] = columns
    return part


def wasted_share(mask: Tensor, batches: list[Batch]) -> float:
    """The share of all tokens that run in the batches which are padding."""
    run = sum(len(batch.examples) * batch.width for batch in batches)
    real = sum(int((mask[batch.examples.to(mask.device)] != 0).sum()) for batch in batches)
    return 1 - real / run


def is_watched(model: nn.Module) -> bool:
    """Whether hooks, or visitors of attention patterns, see the model's forward passes.

    Not so the hooks of transformers' own, which ``output_hidden_states=True`` leaves on the blocks
    for good, and which only read.
    """
    shown = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return shown == PATTERNS_SHOWN or any(
        not _is_transformers_own(hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _is_transformers_own(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _rotates_by_length(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
