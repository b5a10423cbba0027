"""What a study runs on: its device, sites and prompts, and what identifies the model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lrqp_torch.errors import SettingError, SiteError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.stream.sites import Site, all_sites, locate
from lrqp_torch.study.context import Task
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.settings import Settings


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes a CUDA device where there is one.

    Raises:
        SettingError: the name is no device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"cannot use device {name!r}: {reason}. Use --device auto or --device cpu."
        ) from error
    return device


def choose_sites(model: Any, names: str) -> list[str]:
    """Sites to sweep, in order of computation.

    Args:
        model: the model that has them.
        names: site names separated by commas; ``all`` stands for every pre and mid.

    Raises:
        SiteError: a name that is no place in this model's stream, or no name at all.
    """
    chosen: set[Site] = set()
    for name in filter(None, (part.strip() for part in names.split(","))):
        named = all_sites(model) if name == "all" else [name]
        chosen.update(locate(model, site).site for site in named)
    if not chosen:
        raise SiteError("no site given; name some, such as L6.mid,L7.pre, or say `all`.")
    return [str(site) for site in sorted(chosen)]


def make_prompts(tokenizer: Any, settings: Settings) -> tuple[IOIPrompts, IOIPrompts]:
    """Prompts to fit on and prompts held out, without a prompt in common."""
    drawn = IOIDataset.generate(
        tokenizer,
        settings.n,
        seed=settings.seed,
        prefixes=None if settings.prefixes == "none" else settings.prefixes,
        padding_side="left",
    )
    data = IOIPrompts.of(drawn)
    return data[: settings.train_size], data[settings.train_size :]


def name_task(settings: Settings) -> str:
    """``"plain"`` without a prefix, ``"prefixed"`` with one."""
    return "plain" if settings.prefixes == "none" else "prefixed"


def describe_model(model: Any, name: str) -> dict[str, Any]:
    """What identifies the model: name (of a folder, its last part), class, revision and size."""
    folder = Path(name)
    parameter = next(model.parameters())
    return {
        "name": folder.resolve().name if folder.is_dir() else name,
        "class": type(model).__name__,
        "family": model.config.model_type,
        "revision": getattr(model.config, "_commit_hash", None),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }


def digest_prompts(tasks: Sequence[Task]) -> str:
    """A short digest of the prompts of all tasks, as tokens."""
    digest = hashlib.sha256()
    for task in tasks:
        for data in (task.train, task.test):
            digest.update("\n".join(data.prompts).encode())
            digest.update(data.inputs["input_ids"].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
