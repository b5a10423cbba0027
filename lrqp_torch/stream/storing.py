"""Writing activations to disk as they are captured, shard by shard."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lrqp_torch.errors import ActivationStoreError, OutputError, PositionError
from lrqp_torch.files import digest_model, digest_values, prepare_folder, written_whole
from lrqp_torch.stream.batching import is_watched
from lrqp_torch.stream.capture import Progressed, progress_shown
from lrqp_torch.stream.reading import Reading
from lrqp_torch.stream.sites import Site
from lrqp_torch.stream.store import ActivationStore
from lrqp_torch.stream.store_index import DTYPES, INDEX_FILE, Index, Shard, checksum, shard_path

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def capture_to(
    folder: str | Path,
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: str | Sequence[str | Site],
    positions: Tensor | None = None,
    *,
    shard_size: int = 4096,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    progress: Progressed = False,
) -> ActivationStore:
    """The activations of :func:`capture`, written to a folder shard by shard.

    Memory holds one shard. Each shard is written whole or not at all. A capture that was
    interrupted goes on after its last shard when it is called again with the same model, inputs,
    sites, positions and shard size, and one that is complete returns at once.

    Args:
        folder: where to write; created if needed.
        model: as for :func:`capture`, like the other arguments not named here.
        inputs: as there.
        sites: as there.
        positions: as there.
        shard_size: examples a shard; padding is kept small within each.
        batch_size: as there; at most ``shard_size`` examples run together in any case.
        batch_tokens: as there.
        progress: as there.

    Raises:
        SiteError, UnknownFamilyError, PositionError: bad input, named.
        ActivationStoreError: the folder holds the capture of something else, or a damaged one; or
            hooks are open on the model, such as edits, of which a store could not tell later
            whether they were the same.
        OutputError: the folder cannot be written.
    """
    reading = Reading(model, inputs, sites, positions, batch_size, batch_tokens)
    writing = Writing(Path(folder), reading, positions, shard_size)
    with progress_shown(progress, reading.n_examples) as advance:
        advance(writing.examples_done)
        for examples in writing.pending:
            writing.add(reading.gather(examples, "cpu", advance))
    return ActivationStore(folder)


class Writing:
    """A store being written: what is there already, what is still to come, and adding to it.

    Args:
        folder: where to write; created if needed.
        reading: what is captured.
        positions: of the reading, as given.
        shard_size: examples a shard.

    Attributes:
        pending: the examples of each shard that is not written yet, in order.
        examples_done: how many are written.

    Raises:
        PositionError, ActivationStoreError, OutputError: as of :func:`capture_to`.
    """

    def __init__(
        self, folder: Path, reading: Reading, positions: Tensor | None, shard_size: int
    ) -> None:
        if shard_size < 1:
            raise PositionError(f"shard_size must be at least 1, got {shard_size}")
        if is_watched(reading.model):
            raise ActivationStoreError(
                "the model has hooks or open edits, which capture_to cannot check when it resumes; "
                "close them, or use capture or capture_batches"
            )
        self.folder, self._reading = folder, reading
        self._request = {
            "model": f"{type(reading.model).__name__} {digest_model(reading.model)}",
            "inputs": digest_values(reading.inputs),
            "positions": digest_values({"positions": positions}),
            "sites": ", ".join(reading.sites),
            "shard size": str(shard_size),
        }
        prepare_folder(folder)
        self._done = _resume(folder, self._request)
        n = reading.n_examples
        shards = [range(start, min(start + shard_size, n)) for start in range(0, n, shard_size)]
        written = 0 if self._done is None else len(self._done.shards)
        self.pending, self._n_shards = shards[written:], len(shards)
        self.examples_done = shards[written - 1].stop if written else 0

    def add(self, found: dict[str, Tensor]) -> None:
        """Write the next shard: the activations of the first pending examples not added yet."""
        if self._reading.places is None:  # then two sites may be one tensor: L0.post and L1.pre
            found = {site: part.clone() for site, part in found.items()}
        number = 0 if self._done is None else len(self._done.shards)
        shard = _write_shard(shard_path(self.folder, number), found)
        if self._done is None:
            first = found[self._reading.sites[0]]
            shape, dtype = tuple(first.shape[1:]), _NAMES[first.dtype]
            sites = tuple(self._reading.sites)
            self._done = Index(sites, shape, dtype, self._n_shards, self._request, ())
        self._done = replace(self._done, shards=(*self._done.shards, shard))
        self._done.write(self.folder)


def _resume(folder: Path, request: dict[str, str]) -> Index | None:
    """The index of what is written already, or None."""
    if not (folder / INDEX_FILE).exists():
        return None
    index = Index.read(folder)
    different = [name for name, value in request.items() if index.request.get(name) != value]
    if different:
        raise ActivationStoreError(
            f"{str(folder)!r} holds the capture of other {', '.join(different)}; choose another "
            f"folder, or delete this one"
        )
    return index


def _write_shard(path: Path, found: dict[str, Tensor]) -> Shard:
    with written_whole(path) as partial:
        try:
            safetensors.torch.save_file(found, partial)
        except SafetensorError as error:
            raise OutputError(f"cannot write {str(path)!r}: {error}") from error
        size, sha256 = partial.stat().st_size, checksum(partial)
    return Shard(len(next(iter(found.values()))), size, sha256)
