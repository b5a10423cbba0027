"""Saved edits: a folder with ``edit.safetensors`` (what solves need: W, b, W̄Σ and its products G),
``covariance.safetensors`` (Σ) and ``edit.json`` (everything else).

Reading executes nothing and trusts nothing: the JSON is checked key by key, the tensors name by
name and shape by shape, and checksums tie the files together. A large Σ stays in its file until
somebody looks at it; until then what is known of it is held against itself, and then against Σ.
An edit of several variables is ``joint.json`` beside a saved edit in a folder each.
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Lock
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
from lrqp_torch.files import (
    bytes_of,
    from_json,
    read_json,
    require_inside,
    sole_writer,
    to_json,
    written_whole,
)
from lrqp_torch.probes.covariance import (
    Mahalanobis,
    Saved,
    StoredMahalanobis,
    check_covariance,
)
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp.constraints import MetricSizes, steered
from lrqp_torch.qp.solvers import SOLVERS

if TYPE_CHECKING:
    from lrqp_torch.edits.lrqp import LRQP

Made = TypeVar("Made", bound="LRQP")

FORMAT, JOINT_FORMAT = "lrqp_torch.edit", "lrqp_torch.joint"
VERSION = 1
EDIT_VERSIONS = (1, 2)
"""Of an edit; in the first, Σ was among the other numbers, and no W̄Σ."""
TENSORS_FILE, JSON_FILE, JOINT_FILE = "edit.safetensors", "edit.json", "joint.json"
COVARIANCE_FILE, COVARIANCE = "covariance.safetensors", "metric.covariance"
READ_AT_ONCE = 1024
"""Up to this width Σ is read with the rest: a few milliseconds, and no file is held open."""
AGREE = 1e-9
"""Share of their size by which numbers may differ that two machines computed in float64."""
INDEX_FILE = "library.json"
"""Tells a folder of several edits from that of one, which has ``edit.json``."""
# These JSON files are a few kilobytes; one beyond this is of something else.
MAX_JSON_BYTES = 1_000_000
# The header of a safetensors file names its tensors; an edit has at most eight.
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
"""Of the first version; those after it have ``covariance_sha256`` too."""
OPTION_KEYS = {"rule": str, "odds": str, "on_infeasible": str, "solver": str, "solver_args": dict}
JOINT_KEYS = {
    "names": list,
    "kept_by_default": list,
    "within": dict,
    "on_infeasible": str,
    "notes": dict,
}


def read_content(
    file: Path,
    what: str,
    kind: str,
    keys: Mapping[str, Any],
    versions: Sequence[int] = (VERSION,),
) -> dict[str, Any]:
    """A JSON file of ours, checked.

    Args:
        file: to read.
        what: it describes, for messages, such as ``"an lrqp_torch edit"``.
        kind: its ``format``.
        keys: the type of each key that it must have.
        versions: that are read.

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
    if content.get("version") not in versions:
        raise SavedEditError(
            f"{file} has format version {content.get('version')!r}, this program reads up to "
            f"{versions[-1]}; update lrqp_torch"
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


def encode(kind: str, content: dict[str, Any], version: int = VERSION) -> bytes:
    """A content of a kind as JSON.

    Raises:
        OutputError, NonFiniteError: its notes or solver_args hold what JSON cannot.
    """
    return to_json({"format": kind, "version": version, **content}, indent=2).encode()


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
    """Write the three files of an edit and a model card; see :meth:`LRQP.save`.

    Each file is whole or not there, and none is replaced before all are written; the JSON is last,
    so that a torn save is noticed.

    Raises:
        OutputError: the folder cannot be written, or the notes are not JSON.
        SavedEditError: Σ is still in a file, which is damaged.
    """
    require_one_kind(folder, several=False)
    metric, probe = edit.metric, edit.probe
    state = {name: tensor.detach() for name, tensor in edit.state_dict().items()}
    weight = state["probe.weight"].double()
    with torch.no_grad():
        (steering,), sizes = steered(metric, [weight])
    state |= {
        "metric.steering": steering,
        "metric.sizes": torch.stack([sizes.unit, sizes.spread]),
    }
    if _keeps_gram(*weight.shape):
        state["metric.gram"] = (weight - weight.mean(0)) @ steering.T
    numbers = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    covariance = numbers.pop(COVARIANCE)
    blob = safetensors.torch.save(numbers)
    options = {name: getattr(edit, name) for name in ("rule", "odds", "on_infeasible")}
    content: dict[str, Any] = {
        "sha256": hashlib.sha256(blob).hexdigest(),
        "covariance_sha256": hashlib.sha256(bytes_of(covariance)).hexdigest(),
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
    text = encode(FORMAT, content, EDIT_VERSIONS[-1])
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
    with sole_writer(folder), ExitStack() as files:
        # The first to be opened is the last to be put in place.
        for name, data in ((CARD_FILE, card), (JSON_FILE, text), (TENSORS_FILE, blob)):
            files.enter_context(written_whole(folder / name)).write_bytes(data)
        whole = files.enter_context(written_whole(folder / COVARIANCE_FILE))
        whole.write_bytes(safetensors.torch.save({COVARIANCE: covariance}))
    return folder


def _keeps_gram(n_classes: int, width: int) -> bool:
    """Whether G, (K, K), is kept: not where it would be larger than W̄Σ, (K, d)."""
    return n_classes <= width


def read_edit(cls: type[Made], folder: Path) -> Made:
    """Read and check what :func:`write_edit` wrote, as an edit of class ``cls``.

    Raises:
        SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
        SolverError: it was saved with a solver that is not installed here.
    """
    file = folder / JSON_FILE
    content = read_content(file, "edit", FORMAT, EDIT_KEYS, EDIT_VERSIONS)
    if content["version"] > 1:
        require(file, wrong_keys(content, {"covariance_sha256": str}))
    options = content["options"]
    wrong = wrong_keys(options, OPTION_KEYS) + [name for name in options if name not in OPTION_KEYS]
    require(file, [f"options.{name}" for name in wrong])
    tensors = _read_tensors(folder, content)
    origin = content.get("provenance")
    try:
        provenance = None if origin is None else Provenance.from_json(origin)
    except ProvenanceError as error:
        raise SavedEditError(f"{file} is damaged: {error}") from error
    weight = tensors["probe.weight"]
    probe = LinearProbe(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    probe.requires_grad_(False)
    probe.weight.copy_(weight)
    probe.bias.copy_(tensors["probe.bias"])
    names = content.get("classes")
    named = isinstance(names, list) and [type(name) for name in names] == [str] * len(weight)
    require(file, [] if named or names is None else ["classes"])
    probe.classes = None if names is None else tuple(names)
    try:
        metric = _metric(folder, content, tensors)
        edit = cls(probe, metric, log_odds=float(tensors["log_odds"]), **options)
    except SavedEditError:
        raise
    except LRQPError as error:
        if isinstance(error, SolverError) and options["solver"] in SOLVERS:
            raise
        raise SavedEditError(f"{folder} does not hold a valid edit: {error}") from error
    edit.notes, edit.provenance = content["notes"], provenance
    return edit


def _metric(folder: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> Mahalanobis:
    """The metric of an edit; a large Σ is left in its file."""
    record = {
        "mean": tensors.get("metric.mean"),
        "kept": tensors.get("metric.kept"),
        "shrinkage": content["shrinkage"],
        "n_samples": content["n_samples"],
    }
    if content["version"] == 1:
        return Mahalanobis(tensors[COVARIANCE], **record)
    weight, width = tensors["probe.weight"].double(), content["width"]
    saved = Saved(
        content["covariance_sha256"],
        tensors["metric.sizes"],
        [(weight, tensors["metric.steering"])],
    )
    _certify(folder / TENSORS_FILE, saved, tensors.get("metric.gram"))
    read = partial(_verified, CovarianceFile(folder / COVARIANCE_FILE, width, saved.sha256), saved)
    metric = StoredMahalanobis(read, width, saved, **record)
    return metric.whole() if width <= READ_AT_ONCE else metric


def _certify(file: Path, saved: Saved, gram: Tensor | None) -> None:
    """Refuse a W̄Σ that cannot be of this probe and any covariance of these sizes.

    G = W̄ΣW̄ᵀ is symmetric, and for a positive semidefinite Σ ‖Σw‖ ≤ ‖Σ‖ ‖w‖ and
    ‖Σw‖² ≤ ‖Σ‖ wᵀΣw.

    Raises:
        SavedEditError: they do not fit together.
    """
    weight, steering = saved.products[0]
    unit, spread = saved.sizes.unbind()
    if not bool((unit > 0) & (spread >= (1 - AGREE) * unit)):
        raise SavedEditError(f"{file} is damaged: metric.sizes are of no covariance")
    centred, along, spread = weight - weight.mean(0), steering / unit, spread / unit
    size, moved = (torch.linalg.vector_norm(part, dim=-1) for part in (centred, along))
    products = centred @ along.T
    near = AGREE * spread * size.unsqueeze(-1) * size
    own = products.diagonal()
    # Σ is positive semidefinite only to the rounding of the data that it was computed from.
    slack = 1e-5 * spread * size
    wrong = [
        (products - products.T).abs() > near,
        moved > (1 + AGREE) * spread * size,
        moved.square() > spread * own + slack * spread * size,
    ]
    if gram is not None:
        wrong.append((products - gram / unit).abs() > near)
    if any(bool(part.any()) for part in wrong):
        raise SavedEditError(
            f"{file} is damaged: metric.steering and metric.gram are not those of its probe and of "
            f"one covariance; save the edit again"
        )


def _verified(source: "CovarianceFile", saved: Saved) -> Tensor:
    """Σ from its file, held against what is known of it.

    Raises:
        SavedEditError: it is damaged, is no covariance, or that of another edit.
    """
    covariance = source.read()
    try:
        check_covariance(covariance, known=False)
    except LRQPError as error:
        raise SavedEditError(f"{source.file} does not hold a valid edit's Σ: {error}") from error
    sizes, (unit, spread) = MetricSizes.of(covariance), saved.sizes.unbind()
    same = bool(sizes.unit == unit) and bool((sizes.spread - spread).abs() <= AGREE * spread)
    for weight, steering in saved.products:
        centred = weight - weight.mean(0)
        apart = torch.linalg.vector_norm((centred @ covariance - steering) / unit, dim=-1)
        size = torch.linalg.vector_norm(centred, dim=-1)
        same &= bool((apart <= AGREE * (spread / unit) * size).all())
    if not same:
        raise SavedEditError(
            f"{source.file} is not the covariance from which {TENSORS_FILE} keeps metric.steering "
            f"and metric.sizes; save the edit again"
        )
    return covariance


class CovarianceFile:
    """Σ in a file of its own.

    It stays open, so that Σ can be read where another edit was saved in its place since, or its
    folder removed.

    Args:
        file: to read.
        width: d.
        sha256: of Σ's numbers.

    Raises:
        SavedEditError: it is missing, truncated, or of something else.
    """

    def __init__(self, file: Path, width: int, sha256: str) -> None:
        self.file, self._width, self._sha256 = file, width, sha256
        try:
            self._opened = file.open("rb", buffering=0)
        except OSError as error:
            why = (
                "is missing" if isinstance(error, FileNotFoundError) else f"is unreadable: {error}"
            )
            raise SavedEditError(f"{file} {why}; save the edit again") from error
        weakref.finalize(self, self._opened.close)
        self._turn = Lock()
        self._begin = self._header()

    def _header(self) -> int:
        """Where the numbers begin."""
        length = int.from_bytes(self._opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise SavedEditError(f"{self.file} announces a header of {length} bytes; it is damaged")
        header = from_json(self._opened.read(length), f"the header of {self.file}", SavedEditError)
        width, size = self._width, 8 * self._width**2
        holds = {"dtype": "F64", "shape": [width, width], "data_offsets": [0, size]}
        found = os.fstat(self._opened.fileno()).st_size - 8 - length
        if header != {COVARIANCE: holds} or found != size:
            raise SavedEditError(
                f"{self.file} should hold metric.covariance, ({width}, {width}) in float64, and "
                f"{size} bytes of it; it holds {found}, is damaged, or from another edit"
            )
        return 8 + length

    def read(self) -> Tensor:
        """Σ, (d, d), the numbers that were saved.

        Raises:
            SavedEditError: they have changed.
        """
        covariance = torch.empty(self._width, self._width, dtype=torch.float64)
        place = memoryview(bytes_of(covariance))
        with self._turn:
            try:
                self._opened.seek(self._begin)
                while len(place):
                    count = self._opened.readinto(place)
                    if not count:
                        break
                    place = place[count:]
            except OSError as error:
                raise SavedEditError(f"cannot read {self.file}: {error}") from error
        if len(place) or hashlib.sha256(bytes_of(covariance)).hexdigest() != self._sha256:
            raise SavedEditError(
                f"{self.file} does not match the checksum in {JSON_FILE}: it is damaged, or from "
                f"another edit; save the edit again"
            )
        return covariance

    def __deepcopy__(self, memo: dict[int, Any]) -> "CovarianceFile":
        return self


def _read_tensors(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an edit, of the shapes that its JSON says."""
    file, n_classes, width = folder / TENSORS_FILE, content["n_classes"], content["width"]
    if not file.is_file():
        raise SavedEditError(f"{file} is missing; save the edit again")
    most = 8 * (3 * width**2 + 2 * (n_classes + 1) * width + n_classes + 3) + MAX_HEADER_BYTES
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
    shapes: dict[str, tuple[int, ...]] = {
        "probe.weight": (n_classes, width),
        "probe.bias": (n_classes,),
        "log_odds": (),
        "metric.mean": (width,),
        "metric.kept": (len(kept) if kept is not None and kept.ndim else 0, width),
    }
    own: dict[str, tuple[int, ...]] = {COVARIANCE: (width, width)}
    if content["version"] > 1:
        own = {"metric.steering": (n_classes, width), "metric.sizes": (2,)}
        if _keeps_gram(n_classes, width):
            own["metric.gram"] = (n_classes, n_classes)
    shapes |= own
    for name, shape in shapes.items():
        if name not in tensors and name in OPTIONAL_TENSORS:
            continue
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        if found != shape:
            raise SavedEditError(f"{folder}: {name} should be {shape}, found {found}")
    unknown = set(tensors) - set(shapes)
    if unknown:
        raise SavedEditError(f"{folder}: unknown tensors {sorted(unknown)}")
    exact = DTYPES if content["version"] == 1 else (torch.float64,)
    for name, tensor in tensors.items():
        if tensor.dtype not in (exact if name in own else DTYPES) or not all_finite(tensor):
            raise SavedEditError(
                f"{folder}: {name} holds NaN, infinity, non-floating numbers or too few digits, "
                f"{tensor.dtype}"
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
    edits = [load(folder / str(place)) for place in range(len(names))]
    for place, edit in enumerate(edits):
        if not edit.metric.is_same(edits[0].metric):
            raise SavedEditError(
                f"{folder} is damaged: edits 0 and {place} have different covariances, and edits "
                f"of one problem share one; save the edit again"
            )
    return content, edits


def _numbered_beyond(folder: Path, count: int) -> list[Path]:
    """Folders of edits with a number that ``count`` edits do not have."""
    numbered = [item for item in folder.iterdir() if item.name.isdecimal() and item.is_dir()]
    return sorted(item for item in numbered if int(item.name) >= count)


def _remove_beyond(folder: Path, count: int) -> None:
    """Remove the edits of an earlier save of more; nothing that an edit's save does not write."""
    for stale in _numbered_beyond(folder, count):
        try:
            for name in (TENSORS_FILE, COVARIANCE_FILE, JSON_FILE, CARD_FILE):
                (stale / name).unlink(missing_ok=True)
            stale.rmdir()
        except OSError as error:
            raise OutputError(
                f"{stale} would be taken for one more edit, and cannot be removed ({error}); "
                f"remove it, or save into another folder"
            ) from error
