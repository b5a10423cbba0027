"""A study's output folder: one run at a time writes to it, keeps what it finished, and resumes.

``DIR/parts/NAME.json`` holds a finished part's result with the settings behind it. A part that
takes long may also keep its batches in ``DIR/parts/NAME.partial/`` until it is finished. Every file
is written whole or not at all, so a run may be stopped at any moment; resumed with the same
settings, it gives the numbers that it would have given without the stop.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrqp_torch.errors import LRQPError, NonFiniteError, OutputError, SettingError
from lrqp_torch.files import prepare_folder, read_json, sole_writer, write_json
from lrqp_torch.study.results import PROMPTS_FILE, RESULTS_FILE, TEXTS_FILE, write_tensors

PARTS_FOLDER = "parts"


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for a run, as its sole writer; remove it again if that is refused before it
    has written anything.

    Folders that were there before, and those that hold anything, are kept. Raises OutputError: it
    cannot be created, is not a folder, refuses a file, or another run writes to it.
    """
    # Unlike Path.exists, this is False and no error where nobody may look.
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        with sole_writer(folder, lends=True):
            yield
    except LRQPError:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def forget(folder: Path) -> None:
    """Remove the files of an earlier run, so that new files never stand beside old ones.

    These are its results, its prompts, and the files that its results name; its parts are in
    :class:`PartStore`. Raises OutputError: a file cannot be removed.
    """
    try:
        named = read_json(folder / RESULTS_FILE, OutputError)["files"]
    except (OutputError, KeyError, TypeError):
        named = []
    # A name that leads out of the folder is not one that a study has written.
    names = [name for name in named if isinstance(name, str) and Path(name).name == name != ".."]
    for name in (*names, RESULTS_FILE, PROMPTS_FILE, TEXTS_FILE):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove {str(folder / name)!r}: {error.strerror}.") from error


@dataclass(frozen=True)
class Finished:
    """A finished part."""

    raw: dict[str, Any]  # its result as plain JSON values
    seconds: float  # how long it took


class PartStore:
    """The finished parts of one output folder.

    ``fingerprint`` holds everything that decides the numbers, as plain JSON values: parts kept with
    another one are never used.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder / PARTS_FOLDER
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(dict(fingerprint)))

    def clear(self) -> None:
        """Remove every part, finished or not. Raises OutputError: a file cannot be removed."""
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
            kept = read_json(path, OutputError)
            finished, fingerprint = Finished(kept["result"], kept["seconds"]), kept["fingerprint"]
        except (OutputError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        self._check(fingerprint)
        return finished

    def save(self, name: str, finished: Finished) -> None:
        """Keep a part's result, and forget its batches.

        Raises:
            NonFiniteError: a number is NaN or infinite, which strict JSON cannot hold.
            OutputError: the file cannot be written.
        """
        prepare_folder(self.folder)
        kept = {"part": name, "fingerprint": self.fingerprint, "seconds": finished.seconds}
        try:
            write_json(self.folder / f"{name}.json", kept | {"result": finished.raw})
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the part {name!r} was not kept: {error}. The model's logits or an activation "
                "overflowed; try the model in float32."
            ) from error
        self.batches(name).clear()

    def in_words(self) -> str:
        """What a stopped run leaves behind, as a sentence for the terminal."""
        things = self.finished()
        for path in sorted(self.folder.glob("*.partial")):
            count = self.batches(path.stem).count()
            things += [f"{count} {'batch' if count == 1 else 'batches'} of {path.stem}"] * (
                count > 0
            )
        return f"Kept: {', '.join(things)}." if things else "Nothing was finished yet."

    def batches(self, name: str) -> "BatchStore":
        """Where a part keeps its batches until it is finished."""
        return BatchStore(self, self.folder / f"{name}.partial")

    def _check(self, other: Mapping[str, Any]) -> None:
        own, missing = self.fingerprint, object()
        changed = [
            f"{key} was {other.get(key)!r} and is now {own.get(key)!r}"
            for key in dict.fromkeys([*own, *other])
            if other.get(key, missing) != own.get(key, missing)
        ]
        if changed:
            raise SettingError(
                f"cannot resume in {str(self.folder.parent)!r}: {'; '.join(changed)}. Give the "
                "settings that the run was started with, or leave out --resume to start anew."
            )


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
        """Keep the tensors of batch ``index``. Raises OutputError: the file cannot be written."""
        prepare_folder(self.folder)
        metadata = {"fingerprint": json.dumps(self._parts.fingerprint)}
        write_tensors(self._path(index), tensors, metadata)

    def count(self) -> int:
        """Number of batches kept."""
        return len(list(self.folder.glob("[!.]*.safetensors")))

    def clear(self) -> None:
        """Forget all batches."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"


def _damaged(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"the file {str(path)!r} is damaged ({type(error).__name__}: {error}): remove it to "
        "compute it again, or leave out --resume to start anew."
    )
