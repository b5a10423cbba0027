"""Finding one edit in a folder or on the Hub that may hold several."""

from lrqp_torch.edits.hub import fetched_folder
from lrqp_torch.edits.library import EditLibrary
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.saving import INDEX_FILE, JSON_FILE
from lrqp_torch.errors import SavedEditError


def load_one(name_or_path: str, name: str | None = None) -> LRQP:
    """The edit of a folder or a name on the Hub.

    Args:
        name_or_path: holds one edit, or a library of several.
        name: which of several.

    Raises:
        HubError: neither a folder nor to be had from the Hub.
        SavedEditError: it holds no edit, several and none is named, none of that name, or a library
            beside an edit of its own.
    """
    folder = fetched_folder(name_or_path)
    if not (folder / INDEX_FILE).is_file():
        if name is not None:
            raise SavedEditError(f"{name_or_path!r} holds one edit, and none called {name!r}")
        return LRQP.load(folder)
    if (folder / JSON_FILE).exists():
        raise SavedEditError(
            f"{name_or_path!r} holds a library ({INDEX_FILE}) beside an edit ({JSON_FILE}), so "
            f"which one is meant cannot be told; move one of the two to another folder"
        )
    library = EditLibrary.load(folder)
    if name is None or name not in library:
        asked = "say which one you mean" if name is None else f"it has none called {name!r}"
        raise SavedEditError(
            f"{name_or_path!r} holds the edits {', '.join(library)}; {asked} (on the command line "
            f"with --edit)"
        )
    return library[name]
