"""``lrqp verdicts``: how often "used here" is right, on models of which the truth is known."""

from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from lrqp_torch.cli import options as given
from lrqp_torch.cli.app import INTERRUPTED, Voice, command
from lrqp_torch.study.settings import VerdictSettings

if TYPE_CHECKING:
    from lrqp_torch.study.estimates import Estimate
    from lrqp_torch.study.verdicts import VerdictsResult


@command(
    text="Check the verdict 'used here' on models of which the truth is known.\n\n"
    "Bundled models use the order of the names, hold it without using it, or do not hold it; "
    "others use it in part, in two places, or could be driven by it along a direction that no "
    "prompt has. At every site, count how often LRQP and every other edit, the probe's accuracy "
    "alone and a patch from a paired prompt tell rightly whether the order is used.\n\n"
    "Writes verdicts.json, verdicts.csv and the figure as PNG and SVG.",
    options=given.options_of((each.name for each in fields(VerdictSettings)), VerdictSettings),
)
def verdicts(voice: Voice, *, dry_run: bool, figures: bool | None, **chosen: Any) -> None:
    """Judge and report; bad input is one message and exit code 2."""
    from lrqp_torch.study.preparing import choose_sites
    from lrqp_torch.study.records import to_json
    from lrqp_torch.study.verdicts import findings, judge

    drawn = given.able(figures, "The figure is", "matplotlib", "plots", voice)
    settings = VerdictSettings(figures=drawn, **chosen)
    n, seed, seeds, out = settings.n, settings.seed, settings.seeds, settings.out
    if dry_run:
        named = settings.model_names()
        model, _ = given.load_model(named[0], settings.device)
        which = choose_sites(model, settings.sites)
        with TemporaryDirectory() as folder:
            few = replace(
                settings, out=Path(folder), models=named[0], seeds=1, sites=which[0], figures=False
            )
            voice.foresee(
                f"judge {len(which)} sites of {', '.join(named)} on {seeds} draws of {n} prompts",
                1 / (len(named) * len(which) * seeds),
                lambda: judge(few),
                "verdicts.json, verdicts.csv" + ", the figure as PNG and SVG" * settings.figures,
                out,
            )
        return
    try:
        result = judge(settings, progress=not voice.quiet)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    for table in _tables(result):
        voice.console.print(table)
    voice.say(
        *findings(result),
        *(f"{method} did not run: {reason}" for method, reason in result.problems.items()),
        f"Seeds {seed} to {seed + seeds - 1}. {result.command}",
        f"Results are in {out}.",
    )
    voice.give(lambda: to_json(result))


def _tables(result: "VerdictsResult") -> list[Table]:
    """Counts by model, and rates over all models, of each way to judge."""
    from lrqp_torch.study.verdicts import IN_WORDS

    tables = []
    for by in ("", *IN_WORDS):
        rules = result.judged_by(by)
        if rules:
            tables += _tables_of(result, rules, IN_WORDS.get(by, ""))
    return tables


def _tables_of(result: "VerdictsResult", rules: list[str], how: str) -> list[Table]:
    counts = Table(
        title=f"Sites by verdict{how}: rightly used/wrongly used/rightly not/wrongly not",
        title_justify="left",
    )
    rates = Table(title=f"Over all models{how}, in % with 95 % intervals", title_justify="left")
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
        title = result.titles[rule].removesuffix(how)
        counts.add_row(title, *numbers)
        total = result.count(rule)
        shares = (total.right, total.false_positive_rate, total.false_negative_rate)
        rates.add_row(title, *(_percent(share) for share in shares))
    return [counts, rates]


def _percent(rate: "Estimate") -> str:
    if rate.value is None or rate.interval is None:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.value:.0f} ({100 * low:.0f}–{100 * high:.0f})"
