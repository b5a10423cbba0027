"""The ``lrqp`` command."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lrqp_torch.errors import LRQPError, SettingError

if TYPE_CHECKING:
    from lrqp_torch.covariance import Shrinkage

app = typer.Typer(
    name="lrqp",
    help="Change what a model believes at one place, by the least edit that its probe accepts, "
    "and see what it answers then.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lrqp_torch.study.results import package_versions

        versions = package_versions()
        others = ", ".join(
            f"{name} {text}" for name, text in versions.items() if name[:4] != "lrqp"
        )
        typer.echo(f"lrqp {versions['lrqp_torch']} ({others})")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print versions and exit."
        ),
    ] = False,
) -> None:
    """Options of every command."""


@app.command(
    help="Find where a model uses the order of two names, by editing it.\n\n"
    'For prompts such as "When Mary and John went to the store, John gave a drink to", fit a probe '
    'for the order of the names at the second "John", at every site of the residual stream. Then '
    "edit the activation there until the probe believes the other order, on held-out prompts, and "
    "count the answers that flip.\n\n"
    "Writes results.json, prompts.safetensors and the figures sweep, histogram and scatter, and "
    "prints a summary beside the figures published for GPT-2 small."
)
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for results and figures; made if needed.")],
    model: Annotated[
        str,
        typer.Option(
            help="organism (bundled, ready in seconds), smollm2, gpt2, or a folder or Hub name."
        ),
    ] = "organism",
    n: Annotated[int, typer.Option("--n", min=4, help="Prompts, fitted and held out.")] = 1000,
    prefixes: Annotated[
        str,
        typer.Option(
            help="Sentence before each prompt: none, bundled, openwebtext, or a text file with a "
            "sentence per line."
        ),
    ] = "none",
    sites: Annotated[
        str,
        typer.Option(
            help="all (the stream before and within every block), or names such as L6.mid,L7.pre."
        ),
    ] = "all",
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    train_share: Annotated[
        float, typer.Option(help="Share of the prompts to fit on; the others are held out.")
    ] = 0.5,
    log_odds: Annotated[
        float, typer.Option(help="Least log odds that an edit asks of the probe.")
    ] = 10.0,
    l2: Annotated[
        float | None, typer.Option(help="Penalty of the probe.", show_default="the probe's own")
    ] = None,
    shrinkage: Annotated[
        str, typer.Option(help="Of the covariance: ledoit_wolf, oas, or a number from 0 to 1.")
    ] = "ledoit_wolf",
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw PNG and SVG figures.")
    ] = True,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error.")
    ] = False,
) -> None:
    """Run the study and report on it; bad input is one message and exit code 2."""
    errors = Console(stderr=True)
    try:
        from transformers.utils.logging import disable_progress_bar

        from lrqp_torch.study.report import print_summary
        from lrqp_torch.study.reproduce import reproduce as run_study
        from lrqp_torch.study.settings import Settings

        disable_progress_bar()  # it would run through ours
        settings = Settings(
            model=model,
            out=out,
            n=n,
            prefixes=prefixes,
            sites=sites,
            seed=seed,
            batch_size=batch_size,
            device=device,
            train_share=train_share,
            log_odds=log_odds,
            l2=l2,
            shrinkage=_shrinkage(shrinkage),
            figures=figures,
        )
        results = run_study(settings, progress=True)
    except LRQPError as error:
        if debug:
            raise
        errors.print(
            f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from error
    console = Console()
    print_summary(results, console)
    console.print(f"Results are in {out}.", highlight=False, soft_wrap=True)


def _shrinkage(text: str) -> "Shrinkage":
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


def main() -> None:
    """Run the ``lrqp`` command."""
    app()
