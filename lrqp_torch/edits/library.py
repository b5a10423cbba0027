"""Several edits in one folder, loaded in one call."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import torch

from lrqp_torch.edits.hub import Shared
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.saving import (
    INDEX_FILE,
    JSON_FILE,
    read_content,
    require_one_kind,
    write_content,
)
from lrqp_torch.errors import SavedEditError, quoted
from lrqp_torch.files import require_inside, sole_writer

FORMAT = "lrqp_torch.library"
# A name is a folder's name: nothing in it may lead elsewhere.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class EditLibrary(Mapping[str, LRQP], Shared):
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
            OutputError: the folder cannot be written, holds an edit of its own, or another process
                writes there.
        """
        folder = Path(path)
        require_one_kind(folder, several=True)
        with sole_writer(folder):
            for name, edit in self.items():
                edit.save(folder / name)
            write_content(folder / INDEX_FILE, FORMAT, {"edits": list(self)})
        return folder

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read what :meth:`save` wrote. Nothing is executed, and nothing outside the folder read.

        Raises:
            SavedEditError: missing, damaged, foreign, or of a newer format.
        """
        folder = Path(path)
        file = folder / INDEX_FILE
        names = read_content(file, "library", FORMAT, {"edits": list})["edits"]
        _check_names(names, str(file))
        for name in names:
            require_inside(folder, folder / name, SavedEditError)
        return cls({name: LRQP.load(folder / name, device) for name in names})


def _check_names(names: Iterable[object], where: str) -> None:
    taken: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
            raise SavedEditError(
                f"{quoted(name)} in {where} cannot be the name of an edit: use letters, digits, "
                f"dots, hyphens and underscores"
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
