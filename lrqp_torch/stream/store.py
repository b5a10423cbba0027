"""Activations on disk, for sets beyond memory: written as they are captured, read where indexed.

::

    index.json                    format, sites, shape, dtype, and for each shard rows and checksum
    shard-00000.safetensors       one tensor a site, (rows, ...): consecutive rows in input order
    shard-00001.safetensors

Shards are named by their number, so an index cannot point anywhere else. Opening a store reads the
index and the shards' headers; activations are read, memory-mapped, when they are asked for, and a
shard is held against its checksum when it is read for the first time, or has been written to.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.errors import (
    ActivationStoreError,
    OutputError,
    PositionError,
    SelectionError,
    SiteError,
    quoted,
)
from lrqp_torch.files import (
    digest_model,
    digest_values,
    read_json,
    sole_writer,
    write_json,
    written_whole,
)
from lrqp_torch.stream.capture import ALONE, Given, Progressed, Reading, progress_shown
from lrqp_torch.stream.compiled import Census, input_device
from lrqp_torch.stream.hooks import drops_out
from lrqp_torch.stream.inputs import is_watched
from lrqp_torch.stream.positions import Where
from lrqp_torch.stream.sites import Site

FORMAT = "lrqp_torch.activations"
VERSION = 1
INDEX_FILE = "index.json"
# A shard takes some hundred bytes of the index; one beyond this is no index.
MAX_INDEX_BYTES = 10_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of activations, by their names in safetensors."""


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard: its rows, its size in bytes, and its SHA-256."""

    rows: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The checked content of an index."""

    sites: tuple[str, ...]  # names of the sites in every shard
    shape: tuple[int, ...]  # shape of one row, such as (d,)
    dtype: str  # as in safetensors, such as `"F32"`
    n_shards: int  # how many there are in all when the capture is complete
    request: dict[str, str]  # digests of what was captured, by name
    shards: tuple[Shard, ...]  # those that are written, in order

    def write(self, folder: Path) -> None:
        """Write the index, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        write_json(folder / INDEX_FILE, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Read an index and check it, and the size and header of every shard that it names.

        Raises:
            ActivationStoreError: no index, or one that is damaged, foreign or of a newer format; a
                shard that is missing, damaged, or holds something else than the index says.
        """
        index = cls._parse(folder / INDEX_FILE)
        for number, shard in enumerate(index.shards):
            index._check(shard_path(folder, number), shard)
        return index

    @classmethod
    def _parse(cls, file: Path) -> "Index":
        if not file.is_file():
            raise ActivationStoreError(
                f"no activations in {str(file.parent)!r}: {INDEX_FILE} is missing; give the folder "
                f"that capture_to wrote"
            )
        content = read_json(file, ActivationStoreError, most=MAX_INDEX_BYTES)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ActivationStoreError(f"{file} is not an index of lrqp_torch activations")
        version = content.pop("version", None)
        if version != VERSION:
            raise ActivationStoreError(
                f"{file} has format version {version!r}, this program reads {VERSION}; update "
                f"lrqp_torch"
            )
        try:
            shards = [Shard(**shard) for shard in content.pop("shards")]
            index = cls(shards=tuple(shards), **content)
            index = cls(**{**vars(index), "sites": tuple(index.sites), "shape": tuple(index.shape)})
            named = [str(Site.parse(site)) for site in index.sites]
        except (TypeError, KeyError, SiteError) as error:
            raise ActivationStoreError(f"{file} is damaged: {error}") from error
        if not (
            named
            and len(set(named)) == len(named)
            and _all_counts([*index.shape, index.n_shards])
            and _all_counts([number for shard in shards for number in (shard.rows, shard.size)])
            and all(isinstance(shard.sha256, str) for shard in shards)
            and 0 < len(shards) <= index.n_shards
            and isinstance(index.dtype, str)
            and index.dtype in DTYPES
            and isinstance(index.request, dict)
        ):
            raise ActivationStoreError(
                f"{file} is damaged: its sites, shapes or numbers contradict one another"
            )
        return index

    def verify(self, folder: Path, number: int) -> None:
        """Compare the checksum of a shard.

        Raises:
            ActivationStoreError: it has changed since it was written.
        """
        path = shard_path(folder, number)
        if checksum(path) != self.shards[number].sha256:
            raise ActivationStoreError(
                f"{path} does not match its checksum; capture the activations again"
            )

    def _check(self, path: Path, shard: Shard) -> None:
        if not path.is_file():
            raise ActivationStoreError(f"{path} is missing; capture the activations again")
        if path.stat().st_size != shard.size:
            raise ActivationStoreError(
                f"{path} has {path.stat().st_size} bytes, the index says {shard.size}: it is "
                f"damaged or from another store; capture the activations again"
            )
        with open_shard(path) as file:
            if set(file.keys()) != set(self.sites):
                raise ActivationStoreError(
                    f"{path} holds {sorted(file.keys())[:5]}, the index says {sorted(self.sites)}"
                )
            for site in self.sites:
                part, expected = file.get_slice(site), [shard.rows, *self.shape]
                found = list(part.get_shape()), part.get_dtype()
                if found != (expected, self.dtype):
                    raise ActivationStoreError(
                        f"{path}: {site} is {found[0]} {found[1]}, the index says {expected} "
                        f"{self.dtype}; capture the activations again"
                    )


def shard_path(folder: Path, number: int) -> Path:
    """Where the shard of a number lies."""
    return folder / f"shard-{number:05d}.safetensors"


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(path: Path) -> Any:
    """A shard for reading, memory-mapped.

    Raises:
        ActivationStoreError: it is missing or no safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ActivationStoreError(f"{path} cannot be read as safetensors: {error}") from error


def _all_counts(numbers: Sequence[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


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
        # Of shards that were held against their checksums, when they were written.
        self._sound: dict[int, int] = {}
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

    def __getitem__(self, site: str | Site) -> "StoredActivations":
        site = site if site in self.index.sites else str(Site.parse(site))
        if site not in self.index.sites:
            raise SiteError(f"{site!r} is not stored in {str(self.folder)!r}, only {self.sites}")
        return StoredActivations(self.folder, self.index, site, self._sound)

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
        for number in range(len(self.index.shards)):
            self.index.verify(self.folder, number)


class StoredActivations:
    """Activations of one site on disk, (N, ...): like a tensor that is read where it is indexed.

    What is read lies on the CPU, and may be a view of the mapped file; writing to it changes
    nothing on disk.

    Attributes:
        site: its name.
        shape: as :func:`capture` would have returned.
        dtype: the stream's.
    """

    def __init__(self, folder: Path, index: Index, site: str, sound: dict[int, int]) -> None:
        self._folder, self._index, self.site, self._sound = folder, index, site, sound
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
        path = shard_path(self._folder, number)
        with open_shard(path) as file:
            written = path.stat().st_mtime_ns
            if self._sound.get(number) != written:
                self._index.verify(self._folder, number)
                self._sound[number] = written
            part: Tensor = file.get_slice(self.site)[begin:end]
            return part


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@overload
def capture_to(*given: Any, ranks: Ranks, **options: Any) -> "ActivationStore | None": ...


@overload
def capture_to(*given: Any, **options: Any) -> "ActivationStore": ...


def capture_to(  # type: ignore[misc]  # options are those named here
    folder: str | Path,
    model: nn.Module,
    inputs: Given,
    sites: str | Site | Sequence[str | Site],
    positions: Where | None = None,
    *,
    tokenizer: Any = None,
    shard_size: int = 4096,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    progress: Progressed = False,
    ranks: Ranks = ALONE,
) -> "ActivationStore | None":
    """The activations of :func:`capture`, written to a folder shard by shard.

    Memory holds one shard. Each shard is written whole or not at all. A capture that was
    interrupted goes on after its last shard when it is called again with the same model, inputs,
    sites, positions and shard size, and one that is complete returns at once.

    Args:
        folder: where to write; created if needed. Rank 0 alone writes, so the others need not see
            it, and a capture that some number of ranks began goes on with any other.
        model: as for :func:`capture`, like the other arguments not named here.
        inputs: as there.
        sites: as there.
        positions: as there.
        tokenizer: as there.
        shard_size: examples a shard; padding is kept small within each.
        batch_size: as there; at most ``shard_size`` examples run together in any case.
        batch_tokens: as there.
        progress: as there.
        ranks: as there; they share the batches of each shard, and the files are those of one
            process with the same ``batch_size``.

    Returns:
        The store; on ranks other than 0 None.

    Raises:
        SiteError, UnknownFamilyError, PositionError: bad input, named, on the first rank.
        ActivationStoreError: the folder holds the capture of something else, or a damaged one; or
            hooks are open on the model, such as edits, of which a store could not tell later
            whether they were the same.
        OutputError: the folder cannot be written, or another process writes there.
        ToldError, RankError: as there.
    """
    reading = Reading(model, inputs, sites, positions, batch_size, batch_tokens, ranks, tokenizer)
    writing: Writing | None = None
    with ExitStack() as open_until_the_end:
        with ranks.together():
            if ranks.is_main:
                open_until_the_end.enter_context(sole_writer(Path(folder)))
                writing = Writing(Path(folder), reading, shard_size)
        pending = ranks.from_main(None if writing is None else writing.pending)
        advance = open_until_the_end.enter_context(
            progress_shown(ranks.is_main and progress, reading.n_examples)
        )
        if writing is not None:
            advance(writing.examples_done)
        for examples in pending or ():
            found = reading.gather(examples, "cpu", advance)
            with ranks.together():
                if writing is not None:
                    writing.add(found)
    return None if writing is None else ActivationStore(folder)


class Writing:
    """A store being written: what is there already, what is still to come, and adding to it.

    Args:
        folder: where to write, which is there.
        reading: what is captured.
        shard_size: examples a shard.

    Attributes:
        pending: the examples of each shard that is not written yet, in order.
        examples_done: how many are written.

    Raises:
        PositionError, ActivationStoreError, OutputError: as of :func:`capture_to`.
    """

    def __init__(self, folder: Path, reading: Reading, shard_size: int) -> None:
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
            "mode": _mode(reading.model),
            "inputs": digest_values(reading.inputs),
            "positions": reading.digest_of_positions,
            "sites": ", ".join(reading.sites),
            "shard size": str(shard_size),
        }
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
        shapes = {site: tuple(part.shape) for site, part in found.items()}
        if len(set(shapes.values())) > 1:
            raise ActivationStoreError(
                f"sites of one store have one width, these are {quoted(shapes)}; write each kind "
                f"to a folder of its own"
            )
        number = 0 if self._done is None else len(self._done.shards)
        shard = _write_shard(shard_path(self.folder, number), found)
        if self._done is None:
            first = found[self._reading.sites[0]]
            shape, dtype = tuple(first.shape[1:]), _NAMES[first.dtype]
            sites = tuple(self._reading.sites)
            self._done = Index(sites, shape, dtype, self._n_shards, self._request, ())
        self._done = replace(self._done, shards=(*self._done.shards, shard))
        self._done.write(self.folder)


def _mode(model: nn.Module) -> str:
    """What activations depend on beside the model and its inputs: dropout, and autocast."""
    kind = input_device(model).type
    said = ["dropout"] if drops_out(Census.of(model).in_training(model)) else []
    if kind != "meta" and torch.is_autocast_enabled(kind):
        said.append(f"autocast to {torch.get_autocast_dtype(kind)}")
    return ", ".join(said)


def _resume(folder: Path, request: dict[str, str]) -> Index | None:
    """The index of what is written already, or None."""
    if not (folder / INDEX_FILE).exists():
        return None
    index = Index.read(folder)
    different = [name for name, value in request.items() if index.request.get(name, "") != value]
    if different:
        raise ActivationStoreError(
            f"{str(folder)!r} holds another capture, which differs in {', '.join(different)}; "
            f"choose another folder, or delete this one"
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
