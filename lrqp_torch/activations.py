"""Reading the residual stream: what was asked for, and no further than needed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn

from lrqp_torch.errors import EditNeverFiredError, PositionError, WidthError
from lrqp_torch.hooks import attach, warn_of_dropout, watch_calls
from lrqp_torch.positions import Positions
from lrqp_torch.sites import Located, Site, locate, trunk_of


class _StopForwardError(Exception):
    """Ends a forward pass after the last site that a capture needs; never leaves this file."""


@torch.no_grad()
def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
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
        sites: names such as ``["L6.mid", "L7.pre"]``, or one name.
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
    located = [locate(model, site) for site in ([sites] if isinstance(sites, str) else sites)]
    if not located:
        raise PositionError("no sites were given: nothing would be captured")
    if not isinstance(inputs, Mapping):
        raise WidthError(
            f"inputs must be a mapping with input_ids, such as tokenizer(texts, "
            f"return_tensors='pt', padding=True), got {type(inputs).__name__}"
        )
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
    warn_of_dropout(model)

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
        watch_calls(model, stack, [wanted] if wanted is not None else [])

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
            attach(stack, item, keep(item))
        with suppress(_StopForwardError):
            model(**batch)
    missing = [str(item.site) for item in located if str(item.site) not in captured]
    if missing:
        raise EditNeverFiredError(f"the forward pass never reached {', '.join(missing)}")
    return captured


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
