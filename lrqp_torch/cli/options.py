"""The options that several commands have, described once, and how they are read."""

import inspect
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from lrqp_torch.cli.app import Voice
from lrqp_torch.study.settings import Settings, listed

if TYPE_CHECKING:
    from lrqp_torch.probes.covariance import Shrinkage

OWN = "Edits of your own"
"""Heading of the commands for prompts of one's own."""


def _shown(name: str, kind: type[Any] = Settings, **changed: Any) -> Any:
    """The option of a setting."""
    looks = {**_field(kind, name).metadata, **changed}
    looks.pop("kind", None)
    return typer.Option(*looks.pop("flags"), **looks)


def options_of(
    names: Iterable[str], kind: type[Any] = Settings, **changed: Any
) -> list[inspect.Parameter]:
    """Options of a command for settings of these names, and ``--dry-run``.

    ``changed`` are defaults that differ from those of the settings; ``...`` for an option that must
    be given.
    """
    found = []
    for name in names:
        known = _field(kind, name)
        own = known.metadata.get("kind", known.type)
        default = changed.get(name, None if own == bool | None else known.default)
        shown = _shown(name, kind)
        if default in (..., MISSING):
            default, shown = inspect.Parameter.empty, _shown(name, kind, show_default=True)
            own = get_args(own)[0] if get_args(own) else own  # without None
        found.append(_keyword(name, default, Annotated[own, shown]))
    return [*found, _keyword("dry_run", False, DryRun)]


def _field(kind: type[Any], name: str) -> Field[Any]:
    return next(each for each in fields(kind) if each.name == name)


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


Out = Annotated[Path, _shown("out")]
Model = Annotated[str, _shown("model")]
Position = Annotated[str, _shown("position")]
Bos = Annotated[str, _shown("bos")]
Prefixes = Annotated[str, _shown("prefixes")]
Seed = Annotated[int, _shown("seed")]
BatchSize = Annotated[int, _shown("batch_size")]
Device = Annotated[str, _shown("device")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would run, and about how long it would take; write nothing."
    ),
]


def parse_shrinkage(text: str) -> "Shrinkage":
    """The shrinkage that an option names."""
    from lrqp_torch.errors import SettingError

    named: dict[str, Shrinkage] = {"ledoit_wolf": "ledoit_wolf", "oas": "oas"}
    if text in named:
        return named[text]
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise SettingError(
            f"shrinkage is {text!r}: it must be ledoit_wolf, oas, or a number from 0 to 1."
        )
    return share


def load_model(model: str, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    from lrqp_torch.models import load
    from lrqp_torch.study.preparing import choose_device

    return load(model, device=choose_device(device))


def able(wanted: bool | None, what: str, package: str, extra: str, voice: Voice) -> bool:
    """Whether to make figures or report; where their library is missing, says how to get it.

    ``wanted`` is what the user asked for, None for wherever it is possible; ``what`` is left out,
    in words, without the ``package``, which comes with an ``extra`` of this one.
    """
    if wanted is not None or find_spec(package) is not None:
        return wanted is not False
    if os.environ.get("RANK", "0") == "0":
        voice.say(
            f"{what} left out: {package} is not installed. Get it with pip install "
            f"'lrqp_torch[{extra}]', then run the same command with --resume.",
            aside=True,
        )
    return False


def split_names(text: str, what: str) -> Sequence[str]:
    """Names separated by commas. Raises PromptError: there is none."""
    from lrqp_torch.errors import PromptError

    names = listed(text)
    if not names:
        raise PromptError(f"no {what} given; name one, or several with commas")
    return names
