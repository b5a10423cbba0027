"""The parts of a study: running them, keeping each as soon as it is finished, and resuming.

``DIR/parts/NAME.json`` holds a finished part's result with the settings behind it. A part that
takes long may also keep its batches in ``DIR/parts/NAME.partial/`` until it is finished. Every file
is written whole or not at all, so a run may be stopped at any moment; resumed with the same
settings, it gives the numbers that it would have given without the stop.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, OutputError, SettingError
from lrqp_torch.files import written_whole
from lrqp_torch.study.records import to_json

PARTS_FOLDER = "parts"


@dataclass(frozen=True)
class Finished:
    """A finished part.

    Attributes:
        raw: its result as plain JSON values.
        seconds: how long it took.
    """

    raw: dict[str, Any]
    seconds: float


class PartStore:
    """The finished parts of one output folder.

    Args:
        folder: the study's output folder.
        fingerprint: everything that decides the numbers, as plain JSON values. Parts kept with
            another one are never used.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder / PARTS_FOLDER
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(dict(fingerprint)))

    def clear(self) -> None:
        """Remove every part, finished or not.

        Raises:
            OutputError: a file cannot be removed.
        """
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
        except OSError as error:
            raise OutputError(f"cannot remove {str(self.folder)!r}: {error.strerror}.") from error

    def finished(self) -> list[str]:
        """Names of the parts that are kept, in alphabetical order."""
        return sorted(path.stem for path in self.folder.glob("[!.]*.json"))

    def load(self, name: str) -> Finished | None:
        """A part kept before, or None.

        Raises:
            SettingError: it was made with other settings.
            OutputError: its file cannot be read.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            finished = Finished(kept["result"], kept["seconds"])
            fingerprint = kept["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        self._check(fingerprint)
        return finished

    def save(self, name: str, result: Any, seconds: float) -> Finished:
        """Keep a part's result, and forget its batches.

        Args:
            name: of the part.
            result: a dataclass that :func:`~.records.to_json` writes.
            seconds: how long it took.

        Returns:
            The result as it will be read back.

        Raises:
            NonFiniteError: a number is NaN or infinite, which strict JSON cannot hold.
            OutputError: the file cannot be written.
        """
        content = {
            "part": name,
            "fingerprint": self.fingerprint,
            "seconds": round(seconds, 3),
            "result": to_json(result),
        }
        try:
            text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1)
        except ValueError as error:
            raise NonFiniteError(
                f"a number of the part {name!r} is NaN or infinite, so it was not kept. The "
                "model's logits or an activation overflowed; try the model in float32."
            ) from error
        self._make_folder(self.folder)
        with written_whole(self.folder / f"{name}.json") as path:
            path.write_text(text + "\n", encoding="utf-8")
        self.batches(name).clear()
        kept = json.loads(text)
        return Finished(kept["result"], kept["seconds"])

    def batches(self, name: str) -> "BatchStore":
        """Where a part keeps its batches until it is finished."""
        return BatchStore(self, self.folder / f"{name}.partial")

    def _check(self, other: Mapping[str, Any]) -> None:
        keys = [*self.fingerprint, *(key for key in other if key not in self.fingerprint)]
        missing = object()
        changed = [
            f"{key} was {other.get(key)!r} and is now {self.fingerprint.get(key)!r}"
            for key in keys
            if other.get(key, missing) != self.fingerprint.get(key, missing)
        ]
        if changed:
            raise SettingError(
                f"cannot resume in {str(self.folder.parent)!r}: {'; '.join(changed)}. Give the "
                "settings that the run was started with, or leave out --resume to start anew."
            )

    @staticmethod
    def _make_folder(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {str(folder)!r}: {error.strerror}.") from error


class BatchStore:
    """Tensors of the batches that an unfinished part has done."""

    def __init__(self, parts: PartStore, folder: Path) -> None:
        self._parts = parts
        self.folder = folder

    def load(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of batch ``index``, or None if it was not reached.

        Raises:
            SettingError: it was made with other settings.
            OutputError: its file cannot be read.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                fingerprint = json.loads(file.metadata()["fingerprint"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(path, error) from error
        self._parts._check(fingerprint)
        return tensors

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of batch ``index``.

        Raises:
            OutputError: the file cannot be written.
        """
        self._parts._make_folder(self.folder)
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"fingerprint": json.dumps(self._parts.fingerprint)}
        with written_whole(self._path(index)) as path:
            path.write_bytes(serialise(content, metadata))

    def count(self) -> int:
        """Number of batches kept."""
        return len(list(self.folder.glob("[!.]*.safetensors")))

    def clear(self) -> None:
        """Forget all batches."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"


@dataclass(frozen=True)
class Kept:
    """What a stopped run leaves behind.

    Attributes:
        finished: names of the finished parts.
        batches: part to number of batches, for parts that were under way.
    """

    finished: list[str]
    batches: dict[str, int]

    @classmethod
    def of(cls, store: PartStore) -> Self:
        """Look into a store."""
        partial = sorted(store.folder.glob("*.partial"))
        counts = {path.stem: store.batches(path.stem).count() for path in partial}
        return cls(store.finished(), {name: count for name, count in counts.items() if count})

    def in_words(self) -> str:
        """One sentence for the terminal."""
        batches = [
            f"{count} {'batch' if count == 1 else 'batches'} of {name}"
            for name, count in self.batches.items()
        ]
        things = [*self.finished, *batches]
        return f"Kept: {', '.join(things)}." if things else "Nothing was finished yet."


def kept_or_computed(store: PartStore, name: str, compute: Callable[[], Any]) -> Finished:
    """A part from the store; computed, timed and kept where it is not there yet."""
    finished = store.load(name)
    if finished is None:
        began = time.perf_counter()
        finished = store.save(name, compute(), time.perf_counter() - began)
    return finished


def _damaged(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"the file {str(path)!r} is damaged ({type(error).__name__}: {error}): remove it to "
        "compute it again, or leave out --resume to start anew."
    )
