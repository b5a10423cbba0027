"""The command-line program itself, and what all of its commands share."""

import copy
import inspect
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

INTERRUPTED = 130
"""Exit code of a command that the user stopped, as shells have it."""

UNNAMED = Path("the folder that --out will name")
"""Where a dry run says that it would write, unless it is told."""

WIDE_ENOUGH = 60
"""Columns from which options are shown as tables; their cells would be cut on fewer."""

_columns = shutil.get_terminal_size().columns
_narrow = _columns < WIDE_ENOUGH

app = typer.Typer(
    name="lrqp",
    help="Find out whether a model uses what a linear probe reads from it: move the activation to "
    "the nearest one at which the probe reads another class, and see whether the answer changes."
    "\n\nBegin with `lrqp reproduce --out results/organism` (a bundled model, minutes), or with "
    "prompts of your own: `lrqp study --data FILE --model NAME --out DIR`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Brackets are what they are in Markdown, and line breaks of a docstring none.
    rich_markup_mode=None if _narrow else "markdown",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "terminal_width": _columns if _narrow else None,
    },
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


_TELLING = {
    "quiet": (("--quiet", "-q"), "Print nothing but errors."),
    "verbose": (("--verbose", "-v"), "Print all rows and sentences, and what libraries say."),
    "as_json": (
        ("--json",), "Print the results as JSON on standard output, and nothing else there."
    ),
    "debug": (("--debug",), "Show the whole traceback of an error."),
}  # fmt: skip
"""The options of all commands, with their help."""


@dataclass(frozen=True)
class Voice:
    """What a command says, and where.

    Results go to standard output; progress, advice and errors to standard error.
    """

    quiet: bool = False  # only errors are said
    verbose: bool = False  # nothing is left out
    json: bool = False  # standard output is for the results as JSON alone

    @property
    def console(self) -> Console:
        """Where summaries are printed, which is nowhere if they are not wanted."""
        return Console(highlight=False, quiet=self.quiet or self.json)

    def say(self, *lines: str, aside: bool = False) -> None:
        """Print lines as they are, however long; ``aside`` for advice, which goes to standard
        error.
        """
        console = Console(stderr=True, highlight=False, quiet=self.quiet) if aside else self.console
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)

    def foresee(
        self, what: str, share: float, trial: Callable[[], Any], files: str, out: Path
    ) -> None:
        """Say what a command would do, and how long it would take as scaled from a trial of it.

        ``trial`` runs a ``share`` of the whole and writes nothing; ``files`` would be written to
        ``out``.
        """
        from lrqp_torch.stream.progress import in_time

        trial()  # what happens once is not counted
        began = perf_counter()
        trial()
        seconds = round((perf_counter() - began) / share, 3)
        self.say(
            f"Would {what}.",
            f"In all about {in_time(seconds)}, as scaled from a trial of {share:.2g} of it.",
            f"Would write {files} to {out}; nothing is written now.",
        )
        self.give(lambda: {"would": what, "seconds": seconds, "files": files, "out": str(out)})

    def give(self, results: Callable[[], Any]) -> None:
        """With ``--json``, print the results, which are plain JSON values."""
        if self.json:
            from lrqp_torch.files import to_json

            sys.stdout.write(f"{to_json(results(), indent=2)}\n")


def command(
    name: str | None = None,
    *,
    panel: str | None = None,
    text: str | None = None,
    options: Sequence[inspect.Parameter] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command to the program, with the options that all commands have.

    What is decorated gets its :class:`Voice` as first argument; of its errors, those of the package
    become one message and exit code 2.

    Args:
        name: default that of the function.
        panel: heading under which it is listed.
        text: its help; default the docstring.
        options: further ones, which what is decorated gets by keyword.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*, quiet: bool, verbose: bool, as_json: bool, debug: bool, **given: Any) -> None:
            if quiet and verbose:
                raise typer.BadParameter("choose one of --quiet and --verbose")
            if given.get("out", UNNAMED) is None and "dry_run" in given:
                if not given["dry_run"]:
                    raise typer.BadParameter("say where to write", param_hint="'--out'")
                given["out"] = UNNAMED
            if not verbose:  # bars of libraries would run through ours
                os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            voice = Voice(quiet, verbose, as_json)
            with messages(debug), warnings_of(voice):
                function(voice, **given)

        _, *own = inspect.signature(function).parameters.values()
        further = {p.name for p in options}
        own = [p for p in own if p.kind != p.VAR_KEYWORD and p.name not in further]
        keyword = inspect.Parameter.KEYWORD_ONLY
        every = [p.replace(kind=keyword) for p in (*own, *options)]
        if any(p.name == "dry_run" for p in every):
            every = [_unless_dry(p) if p.name == "out" else p for p in every]
        for key, (flags, meaning) in _TELLING.items():
            shown = typer.Option(*flags, help=meaning, rich_help_panel="How much it tells")
            annotation = Annotated[bool, shown]
            every.append(inspect.Parameter(key, keyword, default=False, annotation=annotation))
        run.__annotations__ = {p.name: p.annotation for p in every}
        # Typer reads a command's options from here.
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        told = inspect.cleandoc(text or function.__doc__ or "")
        brief = " ".join(told.split("\n\n")[0].split())  # whole, however narrow the terminal
        add_command: Callable[..., Any] = app.command(
            name, help=text, short_help=brief, rich_help_panel=panel
        )
        add_command(run)
        return run

    return add


def _unless_dry(out: inspect.Parameter) -> inspect.Parameter:
    """The option of where to write, which must be given where something is written."""
    kind, shown = get_args(out.annotation)
    shown = copy.copy(shown)
    shown.show_default = "required, but with --dry-run"
    return out.replace(default=None, annotation=Annotated[kind | None, shown])


@contextmanager
def warnings_of(voice: Voice) -> Iterator[None]:
    """Say the package's warnings as advice, without the line of code that gave them."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if category.__module__.startswith("lrqp_torch"):
            voice.say(f"Note: {message}", aside=True)
        else:
            shown(message, category, *where)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown


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
