"""The command-line program itself, and what all of its commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

INTERRUPTED = 130
"""Exit code of a command that the user stopped, as shells have it."""

app = typer.Typer(
    name="lrqp",
    help="Change what a model believes at one place, by the least edit that its probe accepts, "
    "and see what it answers then.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lrqp_torch.edits.provenance import package_versions

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


Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


@contextmanager
def messages(debug: bool) -> Iterator[None]:
    """Turn the package's errors into one message and exit code 2.

    Of processes that run together, the one that the error comes from tells it.
    """
    try:
        yield
    except Exception as error:
        from lrqp_torch.errors import LRQPError, ToldError

        if isinstance(error, ToldError):
            raise typer.Exit(2) from error
        if debug or not isinstance(error, LRQPError):
            raise
        Console(stderr=True).print(
            f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from error
