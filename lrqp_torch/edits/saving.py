"""Saved edits: one folder with ``edit.safetensors`` (numbers) and ``edit.json`` (everything else).

Reading executes nothing and trusts nothing: the JSON is checked key by key, the tensors name by
name and shape by shape, and a checksum ties the two files together.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.errors import OutputError, ProvenanceError, SavedEditError
from lrqp_torch.files import prepare_folder, written_whole

FORMAT = "lrqp_torch.edit"
VERSION = 1
TENSORS_FILE = "edit.safetensors"
JSON_FILE = "edit.json"
# A JSON file of an edit is a few kilobytes; one beyond this is not an edit.
MAX_JSON_BYTES = 1_000_000
# The header of a safetensors file names its tensors; an edit has at most five.
MAX_HEADER_BYTES = 100_000
OPTIONS = {"rule": str, "odds": str, "on_infeasible": str, "solver": str, "solver_args": dict}


@dataclass(frozen=True)
class SavedEdit:
    """The checked content of a saved edit."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    facts: dict[str, Any]
    notes: dict[str, Any]
    provenance: Provenance | None


def save_edit(
    path: str | Path,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    notes: dict[str, Any],
    facts: dict[str, Any],
    provenance: Provenance | None = None,
) -> Path:
    """Write both files, each whole or not at all; the JSON last, so that a torn save is noticed.

    Raises:
        OutputError: the folder cannot be written, or the notes are not JSON.
    """
    folder = Path(path)
    blob = safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )
    content = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": hashlib.sha256(blob).hexdigest(),
        **facts,
        "options": options,
        "notes": notes,
    }
    if provenance is not None:
        content["provenance"] = provenance.to_json()
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OutputError(f"notes and solver_args must be plain JSON values: {error}") from error
    prepare_folder(folder)
    for name, data in ((TENSORS_FILE, blob), (JSON_FILE, text.encode())):
        with written_whole(folder / name) as partial:
            partial.write_bytes(data)
    return folder


def load_edit(path: str | Path) -> SavedEdit:
    """Read and check both files.

    Raises:
        SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
    """
    folder = Path(path)
    content = _read_json(folder)
    tensors = _read_tensors(folder, content)
    _check_tensors(folder, tensors, content)
    facts = {name: content[name] for name in ("n_classes", "width", "shrinkage", "n_samples")}
    return SavedEdit(
        tensors, content["options"], facts, content["notes"], _read_provenance(folder, content)
    )


def _read_provenance(folder: Path, content: dict[str, Any]) -> Provenance | None:
    if content.get("provenance") is None:
        return None
    try:
        return Provenance.from_json(content["provenance"])
    except ProvenanceError as error:
        raise SavedEditError(f"{folder / JSON_FILE} is damaged: {error}") from error


def _read_json(folder: Path) -> dict[str, Any]:
    file = folder / JSON_FILE
    if not file.is_file():
        raise SavedEditError(
            f"no edit in {folder}: {JSON_FILE} is missing; give the folder that edit.save wrote"
        )
    if file.stat().st_size > MAX_JSON_BYTES:
        raise SavedEditError(f"{file} is larger than any edit's; it is damaged or foreign")
    try:
        content = json.loads(file.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise SavedEditError(f"{file} is not valid JSON ({error}); save the edit again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SavedEditError(f"{file} does not describe an lrqp_torch edit")
    if content.get("version") != VERSION:
        raise SavedEditError(
            f"{file} has format version {content.get('version')!r}, this program reads {VERSION}; "
            f"update lrqp_torch"
        )
    expected = {
        "sha256": str,
        "n_classes": int,
        "width": int,
        "shrinkage": int | float,
        "n_samples": int | None,
        "options": dict,
        "notes": dict,
    }
    wrong = [name for name, kind in expected.items() if not isinstance(content.get(name), kind)]
    options = content["options"] if not wrong else {}
    wrong += [
        f"options.{name}"
        for name, kind in OPTIONS.items()
        if not wrong and not isinstance(options.get(name), kind)
    ]
    wrong += [f"options.{name}" for name in options if name not in OPTIONS]
    if wrong:
        raise SavedEditError(f"{file} is damaged: wrong or missing {', '.join(wrong)}")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _read_tensors(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    file = folder / TENSORS_FILE
    if not file.is_file():
        raise SavedEditError(f"{file} is missing; save the edit again")
    n_classes, width = content["n_classes"], content["width"]
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
        return safetensors.torch.load(blob)
    except SafetensorError as error:
        raise SavedEditError(f"{file} is not a safetensors file: {error}") from error


def _check_tensors(folder: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    n_classes, width = content["n_classes"], content["width"]
    shapes = {
        "probe.weight": (n_classes, width),
        "probe.bias": (n_classes,),
        "metric.covariance": (width, width),
        "log_odds": (),
    }
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise SavedEditError(f"{folder}: {name} should be {shape}, found {found}")
    kept = tensors.get("metric.kept")
    if kept is not None and (kept.ndim != 2 or kept.shape[1] != width):
        raise SavedEditError(
            f"{folder}: metric.kept should be (r, {width}), found {tuple(kept.shape)}"
        )
    unknown = set(tensors) - set(shapes) - {"metric.mean", "metric.kept"}
    if unknown:
        raise SavedEditError(f"{folder}: unknown tensors {sorted(unknown)}")
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or not bool(torch.isfinite(tensor).all()):
            raise SavedEditError(f"{folder}: {name} holds NaN, infinity or non-floating numbers")
