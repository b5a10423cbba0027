"""``lrqp verdicts``: how often "used here" is right, on models of which the truth is known."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lrqp_torch.cli.app import INTERRUPTED, Debug, app, messages

if TYPE_CHECKING:
    from lrqp_torch.study.estimates import Estimate
    from lrqp_torch.study.verdicts import VerdictsResult


@app.command(
    help="Check the verdict 'used here' on models of which the truth is known.\n\n"
    "Three bundled models use the order of the names, hold it without using it, or do not hold "
    "it. At every site, count how often LRQP and every other edit, the probe's accuracy alone and "
    "a patch from a paired prompt tell rightly whether the order is used.\n\n"
    "Writes verdicts.json, verdicts.csv and the figure as PNG and SVG."
)
def verdicts(
    out: Annotated[Path, typer.Option(help="Folder for results and figure; made if needed.")],
    models: Annotated[
        str,
        typer.Option(help="Names or folders of models with a ground_truth.json, with commas."),
    ] = "organism,organism-present,organism-absent",
    methods: Annotated[
        str, typer.Option(help="all, or names of edits, with commas; all leaves out das.")
    ] = "all",
    das: Annotated[
        bool,
        typer.Option("--das", help="Train DAS at every site too, if all edits run; takes minutes."),
    ] = False,
    n: Annotated[int, typer.Option("--n", min=8, help="Prompts a draw; half are held out.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of prompts.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first draw; the others follow.")] = 0,
    prefixes: Annotated[
        str,
        typer.Option(help="Sentence before each prompt: none, bundled, openwebtext, or a file."),
    ] = "none",
    sites: Annotated[
        str, typer.Option(help="all, or names that every model has, such as L1.mid,L2.pre.")
    ] = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw the figure as PNG and SVG.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Judge and report; bad input is one message and exit code 2."""
    with messages(debug):
        from transformers.utils.logging import disable_progress_bar

        from lrqp_torch.study.verdicts import VerdictSettings, findings, judge

        disable_progress_bar()  # it would run through ours
        settings = VerdictSettings(
            out=out,
            models=models,
            methods=methods,
            das=das,
            n=n,
            seeds=seeds,
            seed=seed,
            prefixes=prefixes,
            sites=sites,
            batch_size=batch_size,
            device=device,
            figures=figures,
        )
        try:
            result = judge(settings, progress=True)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
    console = Console(highlight=False)
    for table in _tables(result):
        console.print(table)
    for line in findings(result):
        console.print(line, markup=False)
    for method, reason in result.problems.items():
        console.print(f"{method} did not run: {reason}", markup=False)
    console.print(f"Seeds {seed} to {seed + seeds - 1}. {result.command}", soft_wrap=True)
    console.print(f"Results are in {out}.", soft_wrap=True, markup=False)


def _tables(result: "VerdictsResult") -> list[Table]:
    """Counts by model, and rates over all models."""
    rules = list(dict.fromkeys(count.rule for count in result.counts))
    counts = Table(
        title="Sites by verdict: rightly used/wrongly used/rightly not/wrongly not",
        title_justify="left",
    )
    rates = Table(title="Over all models, in % with 95 % intervals", title_justify="left")
    for table in (counts, rates):
        table.add_column("verdict by", no_wrap=True)
    models = list(dict.fromkeys(count.model for count in result.counts))
    for model in models:
        kind = result.models.get(model)
        unclear = result.count(rules[0], model).unclear
        note = f"\n{unclear} unclear left out" if unclear else ""
        counts.add_column((f"{model}\norder {kind}" if kind else model) + note, justify="right")
    for heading in ("right", "wrongly used", "wrongly not"):
        rates.add_column(heading, justify="right", no_wrap=True)
    for rule in rules:
        own = [result.count(rule, model) for model in models]
        numbers = [
            f"{c.true_positives}/{c.false_positives}/{c.true_negatives}/{c.false_negatives}"
            for c in own
        ]
        counts.add_row(result.titles[rule], *numbers)
        total = result.count(rule)
        shares = (total.right, total.false_positive_rate, total.false_negative_rate)
        rates.add_row(result.titles[rule], *(_percent(share) for share in shares))
    return [counts, rates]


def _percent(rate: "Estimate") -> str:
    if rate.value is None or rate.interval is None:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.value:.0f} ({100 * low:.0f}–{100 * high:.0f})"
