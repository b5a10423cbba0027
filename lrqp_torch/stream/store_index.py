"""The files of stored activations: safetensors shards and a JSON index in one folder.

::

    index.json                    format, sites, shape, dtype, and for each shard rows and checksum
    shard-00000.safetensors       one tensor a site, (rows, ...): consecutive rows in input order
    shard-00001.safetensors

Shards are named by their number, so an index cannot point anywhere else. Opening a store reads the
index and the shards' headers; activations are read, memory-mapped, when they are asked for.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lrqp_torch.errors import ActivationStoreError, SiteError
from lrqp_torch.files import written_whole
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
    """The checked content of an index.

    Attributes:
        sites: names of the sites in every shard.
        shape: shape of one row, such as (d,).
        dtype: as in safetensors, such as ``"F32"``.
        n_shards: how many there are in all when the capture is complete.
        request: digests of what was captured, by name.
        shards: those that are written, in order.
    """

    sites: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    n_shards: int
    request: dict[str, str]
    shards: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        """Write the index, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with written_whole(folder / INDEX_FILE) as partial:
            partial.write_text(json.dumps(content, indent=1))

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
        if file.stat().st_size > MAX_INDEX_BYTES:
            raise ActivationStoreError(f"{file} is larger than any index; it is damaged or foreign")
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ActivationStoreError(f"{file} is not valid JSON ({error})") from error
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
            and index.dtype in DTYPES
            and isinstance(index.request, dict)
        ):
            raise ActivationStoreError(
                f"{file} is damaged: its sites, shapes or numbers contradict one another"
            )
        return index

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
