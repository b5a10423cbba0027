"""The study of indirect object identification: ``lrqp reproduce`` and a command for each part."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lrqp_torch.cli.app import INTERRUPTED, Debug, app, messages
from lrqp_torch.study.parts import PARTS

if TYPE_CHECKING:
    from lrqp_torch.probes.covariance import Shrinkage


@app.command(
    help="Find where a model uses the order of two names, by editing it: the whole study.\n\n"
    'For prompts such as "When Mary and John went to the store, John gave a drink to", fit a probe '
    'for the order of the names at the second "John", at every site of the residual stream. Then '
    "edit the activation there until the probe believes the other order, on held-out prompts, and "
    "count the answers that flip. The other parts ask what else can be read there, how much belief "
    "it takes, and which attention heads carry the change.\n\n"
    f"Parts of the study: {', '.join(PARTS)}.\n\n"
    "Writes report.html, results.json, prompts.safetensors, prompts.json and the figures as PNG "
    "and SVG, and prints a summary beside the figures published for GPT-2 small."
)
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for results and figures; made if needed.")],
    model: Annotated[
        str,
        typer.Option(
            help="organism, organism-present or organism-absent (bundled, ready in seconds), "
            "smollm2, gpt2, or a folder or Hub name."
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
    parts: Annotated[
        str,
        typer.Option(
            help="all (without compare), or some of those named above, with commas; what they "
            "need runs too."
        ),
    ] = "all",
    compare_task: Annotated[
        bool | None,
        typer.Option(
            "--compare-task/--no-compare-task",
            help="Run the task with and without prefixes, side by side.",
            show_default="where there are prefixes",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with what a stopped run left in the folder."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
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
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write the interactive report.html.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Run the study and report on it; bad input is one message and exit code 2."""
    with messages(debug):
        from transformers.utils.logging import disable_progress_bar

        from lrqp_torch.distributed import joined
        from lrqp_torch.study.report import print_summary
        from lrqp_torch.study.run import run
        from lrqp_torch.study.settings import Settings

        disable_progress_bar()  # it would run through ours
        with joined(device) as ranks:
            with ranks.together():
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
                    shrinkage=parse_shrinkage(shrinkage),
                    figures=figures,
                    report=report,
                    parts=parts,
                    compare_task=compare_task,
                    resume=resume,
                )
            try:
                results = run(settings, ranks, progress=True)
            except KeyboardInterrupt:
                if ranks.is_main:
                    _say_what_is_kept(out)
                raise typer.Exit(INTERRUPTED) from None
    if results is None:  # rank 0 tells
        return
    console = Console()
    print_summary(results, console)
    where = f"Results are in {out}" + (f"; open {out / 'report.html'}." if report else ".")
    console.print(where, highlight=False, soft_wrap=True, markup=False)


@app.command(name="report", help="Write report.html anew from the results in a folder.")
def report_again(
    folder: Annotated[Path, typer.Argument(help="Output folder of a finished study.")],
    debug: Debug = False,
) -> None:
    """Rewrite the report; bad input is one message and exit code 2."""
    with messages(debug):
        from lrqp_torch.study.run import rewrite_report

        path = rewrite_report(folder)
    typer.echo(f"Wrote {path}.")


def _command_of(part: str) -> Callable[..., None]:
    """The command that runs one part: ``reproduce`` without the option for parts."""

    def run(**options: Any) -> None:
        reproduce(parts=part, **options)

    signature = inspect.signature(reproduce)
    options = [p for name, p in signature.parameters.items() if name != "parts"]
    run.__annotations__ = {p.name: p.annotation for p in options}
    # Typer reads a command's options from here.
    run.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return run


for _part, _help in PARTS.items():
    app.command(name=_part, help=f"{_help}\n\nRuns this part of the study, and those it needs.")(
        _command_of(_part)
    )


def _say_what_is_kept(out: Path) -> None:
    from lrqp_torch.study.store import Kept, PartStore

    kept = Kept.of(PartStore(out, {}))
    Console(stderr=True).print(
        f"Stopped. {kept.in_words()} Go on with the same command and --resume.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


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
