"""Make a bundled organism: ``python -m benchmarks.organisms.train --kind used``.

It trains a small GPT-2 on IOI prompts with interventions on the order of the names at S2, measures
at which sites that order can be read and is used, and writes weights, tokenizer and
``ground_truth.json``. The kinds are those of :class:`~benchmarks.organisms.recipe.Recipe`.
"""

import argparse
import copy
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TimeRemainingColumn
from rich.table import Table
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.organisms.prompts import build_tokenizer
from benchmarks.organisms.recipe import KINDS, RECIPES, Progress, Recipe
from benchmarks.organisms.training import train
from benchmarks.organisms.truth import Truth, measure
from lrqp_torch.files import prepare_folder
from lrqp_torch.ioi.prefixes import bundled
from lrqp_torch.models.organisms import GROUND_TRUTH, ORGANISMS, organism_folder

SIZES = ("steps", "seed", "batch", "pool")
"""The parts of a recipe that the command line can change."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and save.

    Args:
        arguments: Of the command line; those of the process by default.

    Raises:
        OutputError: The output folder cannot be written; found out before training.
    """
    options = _parser().parse_args(arguments)
    names = {kind: name for name, kind in ORGANISMS.items()}
    if options.out is None and options.kind not in names:
        raise SystemExit(f"no organism of kind {options.kind} is bundled: give --out")
    out = options.out or Path(str(organism_folder(names[options.kind])))
    prepare_folder(out)
    torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    recipe = replace(RECIPES[options.kind], **given)
    tokenizer = build_tokenizer(bundled())

    console = Console()
    with Bar(*Bar.get_default_columns()[:-1], TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=recipe.steps)

        def report(progress: Progress, model: GPT2LMHeadModel) -> None:
            bar.update(task, completed=progress.step)
            if progress.step % options.save_every == 0:
                console.print(
                    f"step {progress.step}, stage {progress.stage}: "
                    f"loss {progress.loss:.3f}, right {progress.clean:.3f}, "
                    f"right when edited {progress.edited:.3f}"
                )
                _save(out, model, tokenizer)

        with torch.device(options.device):
            model = train(recipe, tokenizer, report)

    _save(out, model, tokenizer)
    # What is recorded holds for the weights as they are stored.
    model = model.half().float()
    with torch.device(options.device):
        truth = measure(model, tokenizer, recipe, options.measured)
    _write_truth(out, truth, recipe, options)
    _print_truth(truth, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.organisms.train",
        description="Train a bundled organism and measure where it knows and uses the order of the "
        "names.",
    )
    add = parser.add_argument
    add("--kind", choices=KINDS, default="used", help="what the order is to be (default: used)")
    add("--out", type=Path, help="folder to write (default: that of the bundled organism)")
    add(
        "--steps", type=_positive, help="optimiser steps (default: the recipe's, as the next three)"
    )
    add("--seed", type=int, help="of weights and prompts (default: the recipe's)")
    add("--batch", type=_batch, help="prompts a step (default: the recipe's)")
    add("--pool", type=_positive, help="prompts to draw from (default: the recipe's)")
    add("--measured", type=_positive, default=500, help="prompts to measure on (default: 500)")
    add("--save-every", type=_positive, default=100, help="steps between saves (default: 100)")
    add("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    add("--device", default="cpu", help="where to train and measure (default: cpu)")
    return parser


def _positive(text: str, least: int = 1) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is too few: give at least {least}")
    return number


def _batch(text: str) -> int:
    # Half of it may have a prefix, and each half needs two pairs of twins to hold both orders.
    return _positive(text, least=8)


def _save(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    # Half precision halves the package, and no verdict on any site depends on the digits lost.
    copy.deepcopy(model).cpu().half().save_pretrained(folder)
    model.config.save_pretrained(folder)
    # The weights are written readable by their owner alone, but belong to an installed package.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def _write_truth(folder: Path, truth: Truth, recipe: Recipe, options: argparse.Namespace) -> None:
    command = ["python", "-m", "benchmarks.organisms.train", "--kind", recipe.kind]
    for name, value in (
        *((name, getattr(recipe, name)) for name in SIZES),
        *((name, getattr(options, name)) for name in ("measured", "threads", "device")),
    ):
        command += [f"--{name}", str(value)]
    # Kinds without them have no entries for what is measured of some kinds alone.
    beside = ("beside", "direction")
    found = {key: value for key, value in asdict(truth).items() if value or key not in beside}
    record = {
        "kind": recipe.kind,
        **found,
        "command": shlex.join(command),
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    (folder / GROUND_TRUTH).write_text(text, encoding="utf-8")


def _print_truth(truth: Truth, console: Console) -> None:
    table = Table("site", "swap flips", "edit flips", "control flips", "probe accuracy")
    for site, swapped in truth.interchange_flip_rate.items():
        rates = (swapped, *truth.linear_edit[site].values())
        table.add_row(site, *(f"{rate:.3f}" for rate in rates))
    console.print(table)
    console.print(
        f"used at {', '.join(truth.used_at) or 'none'}; unclear at {truth.unclear_at or 'none'}"
    )
    for prefix, accuracy in truth.clean_accuracy.items():
        difference = truth.clean_logit_difference[prefix]
        console.print(
            f"prefix {prefix}: accuracy {accuracy:.4f}, logit difference {difference:.2f}"
        )


if __name__ == "__main__":
    main()
