"""Several edits in one folder, loaded in one call."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from lrqp_torch.edits.edit_files import INDEX_FILE, require_one_kind
from lrqp_torch.edits.hub import fetched_folder, pushed
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.saving import JSON_FILE
from lrqp_torch.errors import SavedEditError
from lrqp_torch.files import prepare_folder, written_whole

FORMAT = "lrqp_torch.library"
VERSION = 1
MAX_INDEX_BYTES = 1_000_000
# A name is a folder's name: nothing in it may lead elsewhere.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class EditLibrary(Mapping[str, LRQP]):
    """Edits by name, such as one a site and a variable.

        library = EditLibrary({"order.L6.mid": order, "name.L6.mid": name})
        library.save("edits")
        EditLibrary.from_pretrained("edits")["order.L6.mid"].at(model, ...)

    Args:
        edits: name to edit, at least one; names of letters, digits, dots, hyphens and underscores,
            different beyond upper and lower case, which some file systems do not tell apart.

    Raises:
        SavedEditError: no edits, a name that cannot be a folder's, or something that is no edit.
    """

    def __init__(self, edits: Mapping[str, LRQP]) -> None:
        _check_names(edits, "an EditLibrary")
        for name, edit in edits.items():
            if not isinstance(edit, LRQP):
                raise SavedEditError(f"{name!r} is {type(edit).__name__}, not an LRQP edit")
        self._edits = dict(edits)

    def __getitem__(self, name: str) -> LRQP:
        if name not in self._edits:
            raise KeyError(f"no edit {name!r} in this library; it has {', '.join(self._edits)}")
        return self._edits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    def __repr__(self) -> str:
        return f"EditLibrary({', '.join(self._edits)})"

    def save(self, path: str | Path) -> Path:
        """Write each edit to a folder of its own within ``path``, and ``library.json`` last.

        Raises:
            OutputError: the folder cannot be written, or holds an edit of its own.
        """
        folder = Path(path)
        require_one_kind(folder, several=True)
        prepare_folder(folder)
        for name, edit in self.items():
            edit.save(folder / name)
        index = {"format": FORMAT, "version": VERSION, "edits": list(self)}
        with written_whole(folder / INDEX_FILE) as partial:
            partial.write_text(json.dumps(index, indent=2), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read what :meth:`save` wrote. Nothing is executed, and nothing outside the folder read.

        Raises:
            SavedEditError: missing, damaged, foreign, or of a newer format.
        """
        folder = Path(path)
        return cls({name: LRQP.load(folder / name, device) for name in _read_index(folder)})

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load from a folder or from the Hub.

        Raises:
            HubError: neither a folder nor to be had from the Hub.
            SavedEditError: it holds no library.
        """
        return cls.load(fetched_folder(name_or_path, revision=revision, token=token), device)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Send the library to the Hub; ``options`` are those of :func:`~.hub.pushed`."""
        return pushed(self.save, repo_id, **options)


def _read_index(folder: Path) -> list[str]:
    file = folder / INDEX_FILE
    if not file.is_file():
        raise SavedEditError(f"no library in {folder}: {INDEX_FILE} is missing")
    if file.stat().st_size > MAX_INDEX_BYTES:
        raise SavedEditError(f"{file} is larger than any library's; it is damaged or foreign")
    try:
        index = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SavedEditError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise SavedEditError(f"{file} does not describe a library of lrqp_torch edits")
    if index.get("version") != VERSION:
        raise SavedEditError(
            f"{file} has format version {index.get('version')!r}, this program reads {VERSION}; "
            f"update lrqp_torch"
        )
    names = index.get("edits")
    if not isinstance(names, list):
        raise SavedEditError(f"{file} is damaged: it lists no edits")
    _check_names(names, str(file))
    return names


def _check_names(names: Iterable[object], where: str) -> None:
    taken: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
            raise SavedEditError(
                f"{name!r} in {where} cannot be the name of an edit: use letters, digits, dots, "
                f"hyphens and underscores"
            )
        if name.casefold() in (INDEX_FILE, JSON_FILE):
            raise SavedEditError(
                f"{name!r} in {where} cannot be the name of an edit: it is that of a file"
            )
        if name.casefold() in taken:
            raise SavedEditError(
                f"{taken[name.casefold()]!r} and {name!r} in {where} are one folder where upper "
                f"and lower case are not told apart; rename one"
            )
        taken[name.casefold()] = name
    if not taken:
        raise SavedEditError(f"{where} needs at least one edit, and none was given")
