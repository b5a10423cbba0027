"""Saved edits of several variables: ``joint.json``, and a saved edit in a folder each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrqp_torch.edits import card, saving
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import OutputError, SavedEditError
from lrqp_torch.files import prepare_folder, written_whole
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe

FORMAT = "lrqp_torch.joint"
VERSION = 1
JSON_FILE = "joint.json"
# Names, tolerances and notes take a few kilobytes; a file beyond this is not a joint edit.
MAX_JSON_BYTES = 1_000_000


def save_joint(path: str | Path, edits: Sequence[LRQP], content: dict[str, Any]) -> Path:
    """Write the edits, each in a folder named by its place, and the JSON that joins them last.

    Raises:
        OutputError: the folder cannot be written, or the content is not JSON.
    """
    folder = Path(path)
    try:
        text = json.dumps(
            {"format": FORMAT, "version": VERSION, **content}, indent=2, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise OutputError(f"notes must be plain JSON values: {error}") from error
    prepare_folder(folder)
    _remove_beyond(folder, len(edits))
    for place, edit in enumerate(edits):
        edit.save(folder / str(place))
    with written_whole(folder / JSON_FILE) as partial:
        partial.write_text(text, encoding="utf-8")
    return folder


def load_joint(
    path: str | Path,
) -> tuple[dict[str, Any], dict[str, LRQP | LinearProbe], Mahalanobis]:
    """Read and check the JSON, the edits and probes by name, and their metric.

    Raises:
        SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
    """
    folder = Path(path)
    content = _read_json(folder)
    names, bare = content["names"], content["kept_by_default"]
    beyond = _numbered_beyond(folder, len(names))
    if beyond:
        raise SavedEditError(
            f"{folder} holds edits {[item.name for item in beyond]}, but {JSON_FILE} names "
            f"{len(names)}; it is damaged: save the edit again into an empty folder"
        )
    saved = [LRQP.load(folder / str(place)) for place in range(len(names))]
    edits: dict[str, LRQP | LinearProbe] = {
        name: edit.probe if name in bare else edit for name, edit in zip(names, saved, strict=True)
    }
    return content, edits, saved[0].metric


def _numbered_beyond(folder: Path, count: int) -> list[Path]:
    """Folders of edits with a number that ``count`` edits do not have."""
    numbered = [item for item in folder.iterdir() if item.name.isdecimal() and item.is_dir()]
    return sorted(item for item in numbered if int(item.name) >= count)


def _remove_beyond(folder: Path, count: int) -> None:
    """Remove the edits of an earlier save of more; nothing that an edit's save does not write."""
    for stale in _numbered_beyond(folder, count):
        try:
            for name in (saving.TENSORS_FILE, saving.JSON_FILE, card.CARD_FILE):
                (stale / name).unlink(missing_ok=True)
            stale.rmdir()
        except OSError as error:
            raise OutputError(
                f"{stale} would be taken for one more edit, and cannot be removed ({error}); "
                f"remove it, or save into another folder"
            ) from error


def _read_json(folder: Path) -> dict[str, Any]:
    file = folder / JSON_FILE
    if not file.is_file():
        raise SavedEditError(f"no joint edit in {folder}: {JSON_FILE} is missing")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise SavedEditError(f"{file} is larger than any edit's; it is damaged or foreign")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SavedEditError(f"{file} is not valid JSON ({error}); save the edit again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SavedEditError(f"{file} does not describe a joint edit of lrqp_torch")
    if content.get("version") != VERSION:
        raise SavedEditError(
            f"{file} has format version {content.get('version')!r}, this program reads {VERSION}"
        )
    kinds = {
        "names": list,
        "kept_by_default": list,
        "within": dict,
        "on_infeasible": str,
        "notes": dict,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if not wrong:
        names = content["names"]
        strings = all(isinstance(name, str) for name in names)
        if not names or not strings or len(set(names)) != len(names):
            wrong.append("names")
        if not all(name in names for name in content["kept_by_default"]):
            wrong.append("kept_by_default")
        if not all(type(value) in (int, float) for value in content["within"].values()):
            wrong.append("within")
    if wrong:
        raise SavedEditError(f"{file} is damaged: wrong or missing {', '.join(wrong)}")
    return content
