"""Capture on many ranks: the batches of one capture, run in turn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.files import digest_model, digest_values
from lrqp_torch.stream.capture import Progressed, progress_shown
from lrqp_torch.stream.reading import Reading
from lrqp_torch.stream.sites import Site
from lrqp_torch.stream.store import ActivationStore
from lrqp_torch.stream.storing import Writing


def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
    positions: Tensor | None = None,
    *,
    ranks: Ranks,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    progress: Progressed = False,
) -> dict[str, Tensor]:
    """:func:`lrqp_torch.capture`, with each rank running some batches; the whole on each.

    The same bits as one process with the same ``batch_size`` or ``batch_tokens`` gives: each batch
    is run as there, by one of the ranks. Without either, every rank runs one batch.

    Args:
        model: the whole model, the same on every rank; otherwise as in
            :func:`lrqp_torch.capture`, like the arguments not named here.
        inputs: those of all ranks together, the same on every rank.
        sites: as there.
        positions: as there.
        ranks: this process among the others.
        batch_size: as there.
        batch_tokens: as there.
        device: as there.
        progress: as there; shown by rank 0 only.

    Raises:
        SiteError, UnknownFamilyError, PositionError: bad input, named, on the first rank.
        ToldError: an error on another rank, which raises it.
        RankError: models or inputs that are not the same, or a rank that has gone.
    """
    reading = _reading(ranks, model, inputs, sites, positions, batch_size, batch_tokens)
    with progress_shown(ranks.is_main and progress, reading.n_examples) as advance:
        return reading.gather(range(reading.n_examples), device, advance)


def capture_batches(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
    positions: Tensor | None = None,
    *,
    ranks: Ranks,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """This rank's batches of :func:`lrqp_torch.capture_batches`; nothing is exchanged meanwhile.

    Each batch comes on one rank. ``ranks.merge`` makes one covariance of those of all ranks, and
    :func:`fit_batches` one probe.

    Args:
        model: as for :func:`capture`, like the other arguments.
        inputs: as there.
        sites: as there.
        positions: as there.
        ranks: as there.
        batch_size: as there.
        batch_tokens: as there.
        device: as there.

    Yields:
        ``(rows, found)`` as there: ``rows`` are numbers in the whole result.

    Raises:
        SiteError, UnknownFamilyError, PositionError, ToldError, RankError: as there; at the call.
    """
    reading = _reading(ranks, model, inputs, sites, positions, batch_size, batch_tokens)
    runs = reading.run(range(reading.n_examples), device, ranks.turns)
    return ((rows, found) for _, rows, found in runs)


def capture_to(
    folder: str | Path,
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
    positions: Tensor | None = None,
    *,
    ranks: Ranks,
    shard_size: int = 4096,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    progress: Progressed = False,
) -> ActivationStore | None:
    """:func:`lrqp_torch.capture_to`, with the ranks sharing the batches of each shard.

    Rank 0 receives the activations and alone writes, so the folder need not be seen by the others,
    and its files are those of one process with the same ``batch_size``; a capture that some number
    of ranks began goes on with any other.

    Args:
        folder: where rank 0 writes.
        model: as for :func:`capture`, like the other arguments not named here.
        inputs: as there.
        sites: as there.
        positions: as there.
        ranks: as there.
        shard_size: as in :func:`lrqp_torch.capture_to`.
        batch_size: as there.
        batch_tokens: as there.
        progress: as there; shown by rank 0 only.

    Returns:
        The store on rank 0, None on the others.

    Raises:
        SiteError, UnknownFamilyError, PositionError, ActivationStoreError, OutputError: as in
            :func:`lrqp_torch.capture_to`, on the first rank.
        ToldError, RankError: as for :func:`capture`.
    """
    reading = _reading(ranks, model, inputs, sites, positions, batch_size, batch_tokens)
    writing: Writing | None = None
    with ranks.together():
        if ranks.is_main:
            writing = Writing(Path(folder), reading, positions, shard_size)
    pending = ranks.from_main(None if writing is None else writing.pending)
    with progress_shown(ranks.is_main and progress, reading.n_examples) as advance:
        if writing is not None:
            advance(writing.examples_done)
        for examples in pending or ():
            found = reading.gather(examples, "cpu", advance)
            with ranks.together():
                if writing is not None:
                    writing.add(found)
    return None if writing is None else ActivationStore(folder)


class SharedReading(Reading):
    """A reading of which each rank runs some batches."""

    ranks: Ranks

    def gather(
        self,
        examples: range,
        device: torch.device | str | None,
        advance: Callable[[int], object],
    ) -> dict[str, Tensor]:
        """The activations of consecutive examples, in their order, on every rank."""
        if self.ranks.size == 1:
            return super().gather(examples, device, advance)
        if self.batch_size is None and self.batch_tokens is None:
            self.batch_size = -(-len(examples) // self.ranks.size)
        begin, end = self.span(examples)
        rows, parts = [torch.empty(0, dtype=torch.long)], list[dict[str, Tensor]]()
        with self.ranks.counted(advance, len(examples)) as own, self.ranks.together():
            for batch, here, found in self.run(examples, device, self.ranks.turns):
                rows.append(here - begin)
                parts.append(found)
                own(len(batch.examples))
        names = self.sites if parts else []
        mine = {name: torch.cat([part[name] for part in parts]) for name in names}
        return self.ranks.gather_rows(torch.cat(rows), mine, end - begin)


def _reading(
    ranks: Ranks,
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
    positions: Tensor | None,
    batch_size: int | None,
    batch_tokens: int | None,
) -> SharedReading:
    with ranks.together():
        reading = SharedReading(model, inputs, sites, positions, batch_size, batch_tokens)
        reading.ranks = ranks
    if ranks.size > 1:
        ranks.agree(
            {
                "the models": digest_model(model),
                "the inputs": digest_values(inputs),
                "the positions": digest_values({"positions": positions}),
                "sites and batches": (reading.sites, batch_size, batch_tokens),
            }
        )
    return reading
