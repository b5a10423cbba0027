"""Files written whole or not at all, by one writer a folder; strict JSON; digests of models; C code
compiled for this machine.
"""

import ctypes
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.errors import LRQPError, NonFiniteError, OutputError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"
_LENT: ContextVar[frozenset[Path]] = ContextVar("lent", default=frozenset())


def prepare_folder(folder: Path) -> None:
    """Create ``folder`` if needed and prove that a file can be written there.

    Raises:
        OutputError: it cannot be created, is not a folder, or refuses a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}. "
            "Choose another folder (on the command line with --out), or make this one writable."
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without error.

    Raises:
        OutputError: the file cannot be written.
    """
    # The suffix is kept, since matplotlib reads the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_inside(folder: Path, part: Path, error: type[LRQPError]) -> None:
    """Raise an error if a folder within another, or a file in it, is a link that leads out.

    The Hub's cache, whose snapshots are links to its blobs, leads nowhere else.
    """
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in (part, *(part.iterdir() if part.is_dir() else ())):
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise error(f"{path} is a link that leads out of {folder}")


@contextmanager
def sole_writer(folder: Path, *, lends: bool = False) -> Iterator[None]:
    """Make a folder, and let nobody else write to it for the length of a block.

    The lock is held by the system on the file ``.lock`` in it, so it ends with this process however
    that ends; the file says who has it.

    Args:
        folder: to write to.
        lends: whether what saves to the folder within the block may do so under this lock.

    Raises:
        OutputError: another process, or another part of this one, writes there; or nobody can.
    """
    lent, whole = _LENT.get(), folder.resolve()
    if whole in lent and not lends:
        yield
        return
    prepare_folder(folder)
    path = folder / LOCK_FILE
    handle = _locked(path)
    if handle is None:
        owner = "another process"
        with suppress(OSError):  # it may just have ended
            owner = path.read_text(errors="replace")[:200] or owner
        raise OutputError(
            f"{owner} writes to {str(folder)!r}: wait for it to end, or "
            "choose another folder (on the command line with --out)."
        )
    if lends:
        _LENT.set(lent | {whole})
    try:
        yield
    finally:
        if lends:
            _LENT.set(lent)
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _locked(path: Path) -> int | None:
    """A file opened, locked until it is closed, and signed; None if another has locked it."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
        try:
            if sys.platform != "win32":
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before removes the file; a new one may be another's.
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except OSError:
            # Some network file systems know no locks; there nothing can be promised.
            return handle
        os.close(handle)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write plain values as JSON in UTF-8, whole or not at all.

    Raises:
        NonFiniteError: a NaN or an infinity, which JSON has not; the message says where.
        OutputError: what JSON cannot hold, or a file that cannot be written.
    """
    text = to_json(value, indent=indent)
    with written_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Plain values as JSON text; raises as :func:`write_json` does."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        if "Out of range" in str(error):
            place = _not_finite(value)
            raise NonFiniteError(f"{place} is NaN or infinite, which JSON cannot hold") from error
        raise OutputError(f"only plain JSON values can be written: {error}") from error


def _not_finite(value: Any, place: str = "the value") -> str | None:
    """Where the first NaN or infinity is."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return None
    prefix = "" if place == "the value" else f"{place}."
    return next(filter(None, (_not_finite(v, f"{prefix}{k}") for k, v in items)), None)


def read_json(path: Path, error: type[LRQPError], *, most: int | None = None) -> Any:
    """The values of a JSON file; finite numbers only.

    Args:
        path: to read.
        error: raised, with what is wrong, if it cannot be read as such.
        most: bytes beyond which it is refused unread.
    """
    try:
        if most is not None and path.stat().st_size > most:
            raise error(f"{path} is larger than any file of its kind; it is damaged or foreign")
        data = path.read_bytes()
    except OSError as caught:
        raise error(f"cannot read {str(path)!r}: {caught.strerror or caught}") from caught
    return from_json(data, str(path), error)


def from_json(text: str | bytes, what: str, error: type[LRQPError]) -> Any:
    """The values of a JSON text; raises as :func:`read_json` does."""

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"it holds {number[:200]}, which is no finite number")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("it names one value twice in an object")
        return found

    try:
        return json.loads(text, parse_constant=finite, parse_float=finite, object_pairs_hook=once)
    except (ValueError, RecursionError) as caught:
        raise error(f"{what} is not valid JSON ({caught})") from caught


def digest_model(model: nn.Module) -> str:
    """A short digest of all that a model computes with: weights, buffers and settings.

    The settings are those of its configuration, and the plain numbers and words that its modules
    hold; not its name, nor where it was loaded from. All bytes are read, about 1.5 GB a second and
    thread.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(repr(_settings(config.to_dict())).encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {_settings(vars(module))}".encode())
        forward = _own_forward(module)
        if forward is not None:
            digest.update(repr(_code(forward)).encode())
    # Tied weights are one; buffers that are not saved are computed with all the same.
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor() as pool:
        for name, tensor in tensors:
            # A tensor-parallel model holds a part of it on each rank.
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)};".encode())
            if whole.device.type != "meta":
                data = bytes_of(whole.detach())
                pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
                several = pool.map if len(pieces) > 1 else map
                for part in several(lambda piece: hashlib.sha256(piece).digest(), pieces):
                    digest.update(part)
    return digest.hexdigest()[:16]


_PIECE = 2**24
"""Bytes that are hashed at a time, by as many threads as there are processors."""

_NO_SETTINGS = {
    "architectures",
    "dtype",
    "name_or_path",
    "training",
    "transformers_version",
    "warnings_issued",
}
"""What does not change what an evaluated model computes, or is told by its tensors."""


def _settings(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The plain values among some, by name, and those within others; without private ones."""
    found: list[tuple[str, Any]] = []
    for name, value in sorted(values.items()):
        if name in _NO_SETTINGS or (name[0] == "_" and name not in _ADAPTERS):
            continue
        if isinstance(value, Mapping) and all(isinstance(key, str) and key for key in value):
            found.append((name, _settings(value)))
        elif all(isinstance(v, _PLAIN) for v in (value if isinstance(value, list) else [value])):
            found.append((name, value))
    return found


_PLACING = ("accelerate.", "transformers.distributed.", "transformers.integrations.")
"""Packages whose functions in place of a forward say where a module computes, and not what."""


def stood_for(forward: Any) -> Any:
    """What a ``forward`` that an open context has put in place stands for; any other itself."""
    function = getattr(forward, "__func__", None)
    # What somebody has wrapped around it by functools.wraps has its attributes, and not its home.
    if getattr(function, "__globals__", {}).get("__name__") == "lrqp_torch.stream.traced":
        return forward.stands_for
    return forward


def _own_forward(module: nn.Module) -> Any:
    """What a module computes by in place of its class's forward; None for the class's."""
    forward = stood_for(vars(module).get("forward"))
    while forward is not None:
        function = getattr(forward, "func", forward)
        function = getattr(function, "__func__", function)
        if function is type(module).forward:
            return None
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith(_PLACING):
            return forward
        held = inspect.getclosurevars(function).nonlocals if function.__closure__ else {}
        forward = held.get("original_forward", vars(module).get("_old_forward"))
    return None


def _code(function: Any) -> Any:
    """What a function does, as far as it can be told: its instructions, and the plain values that
    it holds.
    """
    if isinstance(function, partial):
        return _code(function.func), _code(function.args), _code(function.keywords)
    if isinstance(function, Mapping):
        return [(name, _code(value)) for name, value in function.items()]
    if isinstance(function, tuple):
        return [_code(item) for item in function]
    if isinstance(function, CodeType):
        return function.co_code, _code(function.co_consts), function.co_names
    function = getattr(function, "__func__", function)
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        held = *cells, *(function.__defaults__ or ()), function.__kwdefaults__ or {}
        return _code(function.__code__), [_code(item) for item in held if item is not function]
    if isinstance(function, Tensor):
        return digest_values({"": function})
    return function if isinstance(function, _PLAIN) else type(function).__qualname__


_PLAIN = (str, int, float, type(None))
_ADAPTERS = ("_active_adapter", "_disable_adapters")
"""By which adapters of a model are switched on and off."""


def digest_values(values: Mapping[str, Any]) -> str:
    """A short digest of named values; of tensors it reads every element, shape and dtype."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(bytes_of(value.detach()))
        else:
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()[:16]


def bytes_of(tensor: Tensor) -> Any:
    """Its numbers as an array of bytes; those of a contiguous tensor on the CPU themselves."""
    flat = tensor.flatten().cpu().contiguous()
    # One number of a larger tensor counts as contiguous, whatever its stride.
    flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()


SWITCH = "LRQP_NATIVE"
"""Set to 0 in the environment, this keeps to torch."""
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
    "-Werror=implicit-function-declaration",
)
if sys.platform == "darwin":  # where what the interpreter has is not found there by itself
    FLAGS += ("-undefined", "dynamic_lookup")


def load_compiled(
    source: Path, constants: Callable[[], Mapping[str, float]] = dict
) -> ctypes.CDLL | None:
    """C code compiled for this machine; None where that is not to be had or not wanted.

    Args:
        source: the file.
        constants: names of the source to numbers.
    """
    if os.environ.get(SWITCH, "1") == "0" or os.name != "posix":
        return None
    try:
        return ctypes.CDLL(str(compiled(source, constants())))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def compiled(source: Path, constants: Mapping[str, float]) -> Path:
    """The shared library in the user's cache, compiled now if it is not there.

    Raises:
        OSError, SubprocessError, ValueError: no compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise OSError("no C compiler")
    flags = [*FLAGS, *(f"-D{name}={value!r}" for name, value in constants.items())]
    parts = source.read_bytes(), _machine(*compiler), " ".join([*compiler, *flags]).encode()
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrqp_torch"
    built = cache / f"{source.stem}-{key}.so"
    if not built.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / built.name
            _run([*compiler, *flags, "-o", str(fresh), str(source), "-lm", "-lpthread"])
            # Others may be compiling it too: whoever is last leaves the same file.
            os.replace(fresh, built)
    return built


@functools.cache
def _machine(*compiler: str) -> bytes:
    """What -march=native means here: a home may be shared by machines of several kinds."""
    return _run([*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull])


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    return done.stdout
