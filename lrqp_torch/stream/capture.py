"""Reading the residual stream: what was asked for, and no further than needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from lrqp_torch.stream.reading import Reading
from lrqp_torch.stream.sites import Site

Progressed = bool | Callable[[int], object]
"""Whether to show a progress bar, or what to call with the number of examples just run."""


def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
    positions: Tensor | None = None,
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    progress: Progressed = False,
) -> dict[str, Tensor]:
    """Activations at sites and positions; keeps nothing else, and runs no further than needed.

    With positions and an attention mask, examples of similar length run together and the padding
    that none of them needs does not run (:mod:`~.batching`); the result is in the order
    of the inputs all the same, and equal to what the inputs as given would yield, to rounding.
    Under open edits and other hooks the inputs run as given.

    Args:
        model: a transformers model with a row in :data:`lrqp_torch.stream.sites.FAMILIES`.
        inputs: arguments of the model's forward, tensors with one row an example; moved to the
            model's device batch by batch.
        sites: names such as ``["L6.mid", "L7.pre"]``, or one name.
        positions: LongTensor (n,) or (n, k), or BoolTensor (n, T), on the padded input as given;
            default all tokens, padding included.
        batch_size: the most examples a forward pass; default no limit.
        batch_tokens: the most tokens a forward pass, padding included; default no limit. A single
            example may exceed it.
        device: where to keep the activations; default the model's device.
        progress: whether to show a progress bar; or a function to call with the number of examples
            just run.

    Returns:
        For each name activations in the stream's dtype: (n, d) for positions (n,), (n, k, d) for
        (n, k), (N, d) for a mask with N true entries in row-major order, (n, T, d) without.

    Raises:
        SiteError, UnknownFamilyError, PositionError: bad input, named.
    """
    reading = Reading(model, inputs, sites, positions, batch_size, batch_tokens)
    with progress_shown(progress, reading.n_examples) as advance:
        return reading.gather(range(reading.n_examples), device, advance)


def capture_batches(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
    positions: Tensor | None = None,
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The activations of :func:`capture` batch by batch, in memory that does not grow with n.

    ::

        covariance = lrqp.Covariance(width)
        for rows, found in capture_batches(model, inputs, "L6.mid", at, batch_size=64):
            covariance.update(found["L6.mid"])        # labels[rows] would be their labels

    Batches come in order of length, not of the inputs.

    Args:
        model: as for :func:`capture`, like all other arguments.
        inputs: as there.
        sites: as there.
        positions: as there.
        batch_size: as there.
        batch_tokens: as there.
        device: as there.

    Yields:
        ``(rows, found)`` with ``capture(...)[site][rows]`` equal to ``found[site]``; rows is a
        LongTensor, ascending, on the CPU.

    Raises:
        SiteError, UnknownFamilyError, PositionError: bad input, named; at the call, not at the
            first batch.
    """
    reading = Reading(model, inputs, sites, positions, batch_size, batch_tokens)
    runs = reading.run(range(reading.n_examples), device)
    return ((rows, found) for _, rows, found in runs)


@contextmanager
def progress_shown(progress: Progressed, n_examples: int) -> Iterator[Callable[[int], object]]:
    """What to call after each batch."""
    if callable(progress):
        yield progress
    elif progress:
        with Progress() as bar:
            task = bar.add_task("capturing activations", total=n_examples)
            yield lambda done: bar.advance(task, done)
    else:
        yield lambda done: None
