"""Results of a study as plain keys: of an object, of ``results.json``, or of a run's folder.

Charts need to know no class of the study: what it writes as ``results.json`` has the same names as
its objects, and a number's interval stands beside it, as ``KEY_interval``, or within it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from lrqp_torch.errors import OutputError, SettingError
from lrqp_torch.files import read_json
from lrqp_torch.plot.chart import ends

_FILES = "results.json", "prompts.safetensors"


def results_of(values: Any) -> Any:
    """The results that were given, as an object or a folder; None for plain numbers."""
    if isinstance(values, str | Path):
        folder = Path(values)
        try:
            raw = read_json(folder / _FILES[0], OutputError)
            return raw | {"prompts": load_file(folder / _FILES[1])}
        except (OSError, TypeError, SafetensorError) as error:
            raise OutputError(
                f"cannot read the results of a study in {str(folder)!r}: {error}. Give the folder "
                "that `lrqp reproduce` or `lrqp study` wrote."
            ) from error
    known = isinstance(values, Mapping) and {"sites", "settings"} <= values.keys()
    return values if known or hasattr(values, "used_sites") else None


def get(record: Any, path: str, *default: Any) -> Any:
    """What a record holds under names joined by dots, as an object or as JSON has it."""
    for key in path.split("."):
        if isinstance(record, list):
            record = record[int(key)]
        elif isinstance(record, Mapping):
            record = record.get(key, *default) if default else record[key]
        else:
            record = getattr(record, key, *default)
    return record


def read(record: Any, *paths: str) -> tuple[float | None, float | None, float | None]:
    """The first number of these names that a record has, with the ends of its interval."""
    for path in paths:
        value = get(record, path, None)
        if isinstance(value, Mapping):
            sides = value.get("interval") or (value.get("lower"), value.get("upper"))
            return value["value"], *sides
        if isinstance(value, int | float):
            return value, *(get(record, f"{path}_interval", None) or (None, None))
        if value is not None:
            return ends(value)
    return None, None, None


def part_of(results: Any, name: str) -> Any:
    """The result of a part that ran. Raises SettingError: it did not."""
    parts = get(results, "parts", {})
    if name not in parts:
        raise SettingError(f"these results do not hold the part {name}: run it with --parts {name}")
    return parts[name]


def answers_of(results: Any, key: str) -> list[float]:
    """The answer of every held-out prompt, without an edit (``"clean"``) or under one.

    Raises:
        SettingError: the results do not hold them.
    """
    found = get(results, "prompts", {}).get(f"{key}.logit_difference")
    if found is None:
        raise SettingError(
            f"these results hold no answers of single prompts for {key!r}; give the folder of a "
            "study whose prompts have answers"
        )
    return listed(found)


def best_site(results: Any) -> str:
    """The site whose edit flips most. Raises SettingError: no site was swept."""
    site = get(results, "best_site", None)
    if site is None:
        raise SettingError("these results hold no sweep over sites; run the part flipping")
    return str(site)


def word(results: Any, key: str) -> str:
    """What the things of a task are called."""
    return str(get(results, f"words.{key}"))


def task_in_words(name: str) -> str:
    """Which version of the task, as figures and sentences say it; nothing where there is one."""
    return {"plain": "without a prefix", "prefixed": "with a prefix"}.get(name, "")


def effect_in_words(results: Any, mean: str = "") -> str:
    """What the answers are measured by, with its unit."""
    some = next(iter(get(results, "sites").values()))
    if read(some, "control.logit_difference")[0] is None:
        return f"{mean}change of the next token, KL (nats)"
    unit = word(results, "unit")
    kind = "logit difference" if unit == "logits" else "preference,"
    return f"{mean}{kind} {word(results, 'preference')} ({unit})"


def model_name(results: Any) -> str:
    """The model's name."""
    return str(get(results, "model.name"))


def listed(values: Any) -> list[Any]:
    """Numbers of a tensor, an array or a sequence, as a list."""
    if values is None:
        raise SettingError("numbers are missing: give a tensor or a list")
    return values.tolist() if hasattr(values, "tolist") else list(values)
