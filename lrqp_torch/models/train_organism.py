"""Make the bundled organism: ``python -m lrqp_torch.models.train_organism``.

It trains a small GPT-2 on IOI prompts with interventions on the order of the names at S2, measures
at which sites that order is used, and writes weights, tokenizer and ``ground_truth.json``.
"""

import argparse
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TimeRemainingColumn
from rich.table import Table
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from lrqp_torch.files import prepare_folder
from lrqp_torch.ioi.prefixes import bundled
from lrqp_torch.models.training.loop import train
from lrqp_torch.models.training.recipe import Progress, Recipe
from lrqp_torch.models.training.truth import Truth, measure
from lrqp_torch.models.training.vocabulary import build_tokenizer

DEFAULT_OUT = Path(__file__).parent / "organism"
GROUND_TRUTH = "ground_truth.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and save.

    Args:
        arguments: Of the command line; those of the process by default.

    Raises:
        OutputError: The output folder cannot be written; found out before training.
    """
    options = _parser().parse_args(arguments)
    prepare_folder(options.out)
    torch.set_num_threads(options.threads)
    recipe = Recipe(steps=options.steps, seed=options.seed, batch=options.batch, pool=options.pool)
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
                _save(options.out, model, tokenizer)

        model = train(recipe, tokenizer, report)

    _save(options.out, model, tokenizer)
    truth = measure(model, tokenizer, recipe.seed + 1, options.measured)
    _write_truth(options.out, truth, recipe, options)
    _print_truth(truth, console)


def _parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m lrqp_torch.models.train_organism",
        description="Train the bundled organism and measure where it uses the order of the names.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write")
    parser.add_argument("--steps", type=_positive, default=recipe.steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="of weights and prompts")
    parser.add_argument("--batch", type=_positive, default=recipe.batch, help="prompts a step")
    parser.add_argument("--pool", type=_positive, default=recipe.pool, help="prompts to draw from")
    parser.add_argument("--measured", type=_positive, default=500, help="prompts to measure on")
    parser.add_argument("--save-every", type=_positive, default=100, help="steps between saves")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _save(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    # The weights are written readable by their owner alone, but belong to an installed package.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def _write_truth(folder: Path, truth: Truth, recipe: Recipe, options: argparse.Namespace) -> None:
    command = ["python", "-m", "lrqp_torch.models.train_organism"]
    for name in ("steps", "seed", "batch", "pool", "measured", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    record = {
        **asdict(truth),
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
    console.print(f"used at {', '.join(truth.used_at)}; unclear at {truth.unclear_at or 'none'}")
    for prefix, accuracy in truth.clean_accuracy.items():
        difference = truth.clean_logit_difference[prefix]
        console.print(
            f"prefix {prefix}: accuracy {accuracy:.4f}, logit difference {difference:.2f}"
        )


if __name__ == "__main__":
    main()
