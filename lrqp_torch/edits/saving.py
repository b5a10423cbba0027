"""Saved edits: a folder with ``edit.safetensors`` (numbers) and ``edit.json`` (everything else).

Reading executes nothing and trusts nothing: the JSON is checked key by key, the tensors name by
name and shape by shape, and a checksum ties the two files together. An edit of several variables is
``joint.json`` beside a saved edit in a folder each.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lrqp_torch.edits.hub import CARD_FILE, model_card
from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.errors import (
    LRQPError,
    OutputError,
    ProvenanceError,
    SavedEditError,
    SolverError,
    all_finite,
)
from lrqp_torch.files import read_json, require_inside, sole_writer, to_json, written_whole
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp.solvers import SOLVERS

if TYPE_CHECKING:
    from lrqp_torch.edits.lrqp import LRQP

Made = TypeVar("Made", bound="LRQP")

FORMAT, JOINT_FORMAT = "lrqp_torch.edit", "lrqp_torch.joint"
VERSION = 1
TENSORS_FILE, JSON_FILE, JOINT_FILE = "edit.safetensors", "edit.json", "joint.json"
INDEX_FILE = "library.json"
"""Tells a folder of several edits from that of one, which has ``edit.json``."""
# These JSON files are a few kilobytes; one beyond this is of something else.
MAX_JSON_BYTES = 1_000_000
# The header of a safetensors file names its tensors; an edit has at most five.
MAX_HEADER_BYTES = 100_000

OPTIONAL_TENSORS = ("metric.mean", "metric.kept")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EDIT_KEYS = {
    "sha256": str,
    "n_classes": int,
    "width": int,
    "shrinkage": int | float,
    "n_samples": int | None,
    "options": dict,
    "notes": dict,
}
OPTION_KEYS = {"rule": str, "odds": str, "on_infeasible": str, "solver": str, "solver_args": dict}
JOINT_KEYS = {
    "names": list,
    "kept_by_default": list,
    "within": dict,
    "on_infeasible": str,
    "notes": dict,
}


def read_content(file: Path, what: str, kind: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file of ours, checked.

    Args:
        file: to read.
        what: it describes, for messages, such as ``"an lrqp_torch edit"``.
        kind: its ``format``.
        keys: the type of each key that it must have.

    Raises:
        SavedEditError: it is missing, too large, damaged, of something else, or of a newer version.
    """
    if not file.is_file():
        raise SavedEditError(
            f"no {what} in {file.parent}: {file.name} is missing; give the folder that save wrote"
        )
    content = read_json(file, SavedEditError, most=MAX_JSON_BYTES)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise SavedEditError(f"{file} does not describe an lrqp_torch {what}")
    if content.get("version") != VERSION:
        raise SavedEditError(
            f"{file} has format version {content.get('version')!r}, this program reads {VERSION}; "
            f"update lrqp_torch"
        )
    require(file, wrong_keys(content, keys))
    return content


def wrong_keys(content: Mapping[str, Any], keys: Mapping[str, Any]) -> list[str]:
    """The keys that are missing or of another type than said; True and False are no numbers."""
    return [
        name
        for name, of in keys.items()
        if name not in content
        or not isinstance(content[name], of)
        or isinstance(content[name], bool)
    ]


def write_content(file: Path, kind: str, content: dict[str, Any]) -> None:
    """Write a JSON file that :func:`read_content` reads, whole or not at all."""
    with written_whole(file) as partial:
        partial.write_bytes(encode(kind, content))


def encode(kind: str, content: dict[str, Any]) -> bytes:
    """A content of a kind as JSON.

    Raises:
        OutputError, NonFiniteError: its notes or solver_args hold what JSON cannot.
    """
    return to_json({"format": kind, "version": VERSION, **content}, indent=2).encode()


def require(file: Path, wrong: Sequence[str]) -> None:
    """Raise :class:`SavedEditError` if anything in a file is wrong."""
    if wrong:
        raise SavedEditError(f"{file} is damaged: wrong or missing {', '.join(wrong)}")


def require_one_kind(folder: Path, several: bool) -> None:
    """Refuse to write an edit into a library's folder, or a library into an edit's.

    Of a folder with both, a reader could find only one.

    Args:
        folder: to write to.
        several: whether a library is to be written.

    Raises:
        OutputError: the folder holds the other kind.
    """
    # Unlike Path.exists, this is no error where nobody may look; writing will name that.
    if os.path.exists(folder / (JSON_FILE if several else INDEX_FILE)):
        kinds = ("an edit", "a library of edits")
        raise OutputError(
            f"{str(folder)!r} holds {kinds[not several]}, beside which {kinds[several]} could not "
            f"be told apart; choose another folder (on the command line with --out)"
        )


def write_edit(edit: "LRQP", folder: Path, notes: dict[str, Any]) -> Path:
    """Write ``edit.safetensors``, ``edit.json`` and a model card; see :meth:`LRQP.save`.

    Each file is whole or not there; the JSON is last, so that a torn save is noticed.

    Raises:
        OutputError: the folder cannot be written, or the notes are not JSON.
    """
    require_one_kind(folder, several=False)
    metric, probe = edit.metric, edit.probe
    blob = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in edit.state_dict().items()}
    )
    options = {name: getattr(edit, name) for name in ("rule", "odds", "on_infeasible")}
    content: dict[str, Any] = {
        "sha256": hashlib.sha256(blob).hexdigest(),
        "n_classes": probe.n_classes,
        "width": probe.width,
        "shrinkage": metric.shrinkage,
        "n_samples": metric.n_samples,
        "options": options | {"solver": edit.qp.solver_name, "solver_args": edit.qp.solver_args},
        "notes": notes,
    }
    if probe.classes is not None:
        content["classes"] = list(probe.classes)
    if edit.provenance is not None:
        content["provenance"] = edit.provenance.to_json()
    text = encode(FORMAT, content)
    figures = {
        "classes_of_the_probe": probe.n_classes,
        "width": probe.width,
        "least_log_odds": float(edit.log_odds),
        "rule": edit.rule,
        "odds": edit.odds,
        "shrinkage": metric.shrinkage,
        "samples": metric.n_samples,
    }
    card = model_card(folder.name, figures, edit.provenance).encode()
    with sole_writer(folder):
        for name, data in ((TENSORS_FILE, blob), (JSON_FILE, text), (CARD_FILE, card)):
            with written_whole(folder / name) as partial:
                partial.write_bytes(data)
    return folder


def read_edit(cls: type[Made], folder: Path) -> Made:
    """Read and check what :func:`write_edit` wrote, as an edit of class ``cls``.

    Raises:
        SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
        SolverError: it was saved with a solver that is not installed here.
    """
    content = read_content(folder / JSON_FILE, "edit", FORMAT, EDIT_KEYS)
    options = content["options"]
    wrong = wrong_keys(options, OPTION_KEYS) + [name for name in options if name not in OPTION_KEYS]
    require(folder / JSON_FILE, [f"options.{name}" for name in wrong])
    tensors = _read_tensors(folder, content)
    origin = content.get("provenance")
    try:
        provenance = None if origin is None else Provenance.from_json(origin)
    except ProvenanceError as error:
        raise SavedEditError(f"{folder / JSON_FILE} is damaged: {error}") from error
    weight = tensors["probe.weight"]
    probe = LinearProbe(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    probe.requires_grad_(False)
    probe.weight.copy_(weight)
    probe.bias.copy_(tensors["probe.bias"])
    names = content.get("classes")
    named = isinstance(names, list) and [type(name) for name in names] == [str] * len(weight)
    require(folder / JSON_FILE, [] if named or names is None else ["classes"])
    probe.classes = None if names is None else tuple(names)
    try:
        metric = Mahalanobis(
            tensors["metric.covariance"],
            tensors.get("metric.mean"),
            shrinkage=content["shrinkage"],
            n_samples=content["n_samples"],
            kept=tensors.get("metric.kept"),
        )
        edit = cls(probe, metric, log_odds=float(tensors["log_odds"]), **options)
    except LRQPError as error:
        if isinstance(error, SolverError) and options["solver"] in SOLVERS:
            raise
        raise SavedEditError(f"{folder} does not hold a valid edit: {error}") from error
    edit.notes, edit.provenance = content["notes"], provenance
    return edit


def _read_tensors(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an edit, of the shapes that its JSON says."""
    file, n_classes, width = folder / TENSORS_FILE, content["n_classes"], content["width"]
    if not file.is_file():
        raise SavedEditError(f"{file} is missing; save the edit again")
    most = 8 * (2 * width**2 + (n_classes + 1) * width + n_classes + 1) + MAX_HEADER_BYTES
    if file.stat().st_size > most:
        raise SavedEditError(
            f"{file} is larger than an edit of {n_classes} classes and width {width} can be: "
            f"{file.stat().st_size} bytes, not {most}"
        )
    blob = file.read_bytes()
    header = int.from_bytes(blob[:8], "little")
    if header > MAX_HEADER_BYTES:
        raise SavedEditError(f"{file} announces a header of {header} bytes, larger than any edit's")
    if hashlib.sha256(blob).hexdigest() != content["sha256"]:
        raise SavedEditError(
            f"{file} does not match the checksum in {JSON_FILE}: one of the two is damaged or from "
            f"another edit; save the edit again"
        )
    try:
        tensors = safetensors.torch.load(blob)
    except SafetensorError as error:
        raise SavedEditError(f"{file} is not a safetensors file: {error}") from error
    kept = tensors.get("metric.kept")
    shapes = {
        "probe.weight": (n_classes, width),
        "probe.bias": (n_classes,),
        "metric.covariance": (width, width),
        "log_odds": (),
        "metric.mean": (width,),
        "metric.kept": (len(kept) if kept is not None and kept.ndim else 0, width),
    }
    for name, shape in shapes.items():
        if name not in tensors and name in OPTIONAL_TENSORS:
            continue
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        if found != shape:
            raise SavedEditError(f"{folder}: {name} should be {shape}, found {found}")
    unknown = set(tensors) - set(shapes)
    if unknown:
        raise SavedEditError(f"{folder}: unknown tensors {sorted(unknown)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not all_finite(tensor):
            raise SavedEditError(
                f"{folder}: {name} holds NaN, infinity or non-floating numbers, {tensor.dtype}"
            )
    return tensors


def write_joint(folder: Path, edits: "Sequence[LRQP]", content: dict[str, Any]) -> Path:
    """Write edits, each in a folder named by its place, and the JSON that joins them last.

    Raises:
        OutputError: the folder cannot be written, or the content is not JSON.
    """
    encode(JOINT_FORMAT, content)
    with sole_writer(folder):
        _remove_beyond(folder, len(edits))
        for place, edit in enumerate(edits):
            edit.save(folder / str(place))
        write_content(folder / JOINT_FILE, JOINT_FORMAT, content)
    return folder


def read_joint(folder: Path, load: "Callable[[Path], LRQP]") -> "tuple[dict[str, Any], list[LRQP]]":
    """Read and check the JSON of an edit of several variables, and the edit of each.

    Raises:
        SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
    """
    content = read_content(folder / JOINT_FILE, "joint edit", JOINT_FORMAT, JOINT_KEYS)
    names = content["names"]
    sound = {
        "names": bool(names)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names),
        "kept_by_default": all(name in names for name in content["kept_by_default"]),
        "within": all(type(value) in (int, float) for value in content["within"].values()),
    }
    require(folder / JOINT_FILE, [name for name, right in sound.items() if not right])
    beyond = _numbered_beyond(folder, len(names))
    if beyond:
        raise SavedEditError(
            f"{folder} holds edits {[item.name for item in beyond]}, but {JOINT_FILE} names "
            f"{len(names)}; it is damaged: save the edit again into an empty folder"
        )
    for place in range(len(names)):
        require_inside(folder, folder / str(place), SavedEditError)
    return content, [load(folder / str(place)) for place in range(len(names))]


def _numbered_beyond(folder: Path, count: int) -> list[Path]:
    """Folders of edits with a number that ``count`` edits do not have."""
    numbered = [item for item in folder.iterdir() if item.name.isdecimal() and item.is_dir()]
    return sorted(item for item in numbered if int(item.name) >= count)


def _remove_beyond(folder: Path, count: int) -> None:
    """Remove the edits of an earlier save of more; nothing that an edit's save does not write."""
    for stale in _numbered_beyond(folder, count):
        try:
            for name in (TENSORS_FILE, JSON_FILE, CARD_FILE):
                (stale / name).unlink(missing_ok=True)
            stale.rmdir()
        except OSError as error:
            raise OutputError(
                f"{stale} would be taken for one more edit, and cannot be removed ({error}); "
                f"remove it, or save into another folder"
            ) from error
