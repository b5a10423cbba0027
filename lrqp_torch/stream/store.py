"""Activations on disk, for sets beyond memory: read where they are indexed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrqp_torch.errors import ActivationStoreError, SelectionError, SiteError
from lrqp_torch.stream.store_index import DTYPES, Index, checksum, open_shard, shard_path


class ActivationStore(Mapping[str, "StoredActivations"]):
    """The activations that :func:`capture_to` wrote into a folder, by site.

    Args:
        folder: that folder; opened for reading only.

    Raises:
        ActivationStoreError: there are none, they are damaged or foreign, or the capture was
            interrupted.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = Index.read(self.folder)
        missing = self.index.n_shards - len(self.index.shards)
        if missing:
            raise ActivationStoreError(
                f"the capture in {str(folder)!r} was interrupted: {missing} of "
                f"{self.index.n_shards} shards are missing; call capture_to again with the same "
                f"arguments to go on"
            )

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return self.index.sites

    def __getitem__(self, site: str) -> "StoredActivations":
        if site not in self.index.sites:
            raise SiteError(f"{site!r} is not stored in {str(self.folder)!r}, only {self.sites}")
        return StoredActivations(self.folder, self.index, site)

    def __contains__(self, site: object) -> bool:
        return site in self.index.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.sites)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self.index.sites)

    def verify(self) -> None:
        """Read every shard and compare its checksum; opening compares only sizes and headers.

        Raises:
            ActivationStoreError: a shard has changed since it was written.
        """
        for number, shard in enumerate(self.index.shards):
            path = shard_path(self.folder, number)
            if checksum(path) != shard.sha256:
                raise ActivationStoreError(
                    f"{path} does not match its checksum; capture the activations again"
                )


class StoredActivations:
    """Activations of one site on disk, (N, ...): like a tensor that is read where it is indexed.

    What is read lies on the CPU, and may be a view of the mapped file; writing to it changes
    nothing on disk.

    Attributes:
        site: its name.
        shape: as :func:`capture` would have returned.
        dtype: the stream's.
    """

    def __init__(self, folder: Path, index: Index, site: str) -> None:
        self._folder, self._index, self.site = folder, index, site
        rows = torch.tensor([shard.rows for shard in index.shards])
        self._ends = rows.cumsum(0)
        self._starts = self._ends - rows
        self.shape = torch.Size([int(self._ends[-1]), *index.shape])
        self.dtype = DTYPES[index.dtype]

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredActivations({self.site}, {tuple(self.shape)}, {self.dtype})"

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One row, a slice, or the rows of a LongTensor (m,) or BoolTensor (N,).

        Raises:
            SelectionError: out of range, or no such index.
        """
        if isinstance(rows, slice):
            span = range(*rows.indices(len(self)))
            if span.step == 1:
                return self._between(span.start, span.start + len(span))
            return self._chosen(span.start + span.step * torch.arange(len(span)))
        if isinstance(rows, int):
            return self._chosen(torch.tensor([rows]))[0]
        chosen = torch.as_tensor(rows).cpu()
        if chosen.dtype == torch.bool and chosen.shape == (len(self),):
            chosen = chosen.nonzero().squeeze(1)
        if chosen.ndim != 1 or chosen.dtype.is_floating_point or chosen.dtype == torch.bool:
            raise SelectionError(
                f"rows must be an int, a slice, a LongTensor (m,) or a BoolTensor ({len(self)},), "
                f"got {chosen.dtype} {tuple(chosen.shape)}"
            )
        return self._chosen(chosen.long())

    def batches(self, rows: int) -> Iterator[Tensor]:
        """All activations in order, at most ``rows`` at a time, as ``Tensor.split`` would."""
        if rows < 1:
            raise SelectionError(f"a batch needs at least 1 row, got {rows}")
        return (self[start : start + rows] for start in range(0, len(self), rows))

    def load(self) -> Tensor:
        """All of them, in memory."""
        return self[:].clone()

    def _between(self, begin: int, end: int) -> Tensor:
        parts = [
            self._part(number, max(begin - start, 0), min(end, stop) - start)
            for number, (start, stop) in enumerate(
                zip(self._starts.tolist(), self._ends.tolist(), strict=True)
            )
            if start < end and begin < stop
        ]
        if not parts:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chosen(self, rows: Tensor) -> Tensor:
        outside = (rows < -len(self)) | (rows >= len(self))
        if bool(outside.any()):
            raise SelectionError(f"row {int(rows[outside][0])} is out of range: {self} has no such")
        rows = torch.where(rows < 0, rows + len(self), rows)
        result = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        shards = torch.searchsorted(self._ends, rows, right=True)
        for number in shards.unique().tolist():
            here = (shards == number).nonzero().squeeze(1)
            local = rows[here] - self._starts[number]
            begin, end = int(local.min()), int(local.max()) + 1
            result[here] = self._part(number, begin, end)[local - begin]
        return result

    def _part(self, number: int, begin: int, end: int) -> Tensor:
        with open_shard(shard_path(self._folder, number)) as file:
            part: Tensor = file.get_slice(self.site)[begin:end]
            return part
