"""``lrqp verdicts``: how often "used here" is right, on models of which the truth is known."""

from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from lrqp_torch.cli import options as given
from lrqp_torch.cli.app import INTERRUPTED, Voice, command
from lrqp_torch.study.settings import VerdictSettings


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
    from lrqp_torch.study.report.terminal import as_rich
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
    for title, table in result.tables().items():
        voice.console.print(as_rich(table, title))
    voice.say(
        *findings(result),
        *(f"{method} did not run: {reason}" for method, reason in result.problems.items()),
        f"Seeds {seed} to {seed + seeds - 1}. {result.command}",
        f"Results are in {out}.",
    )
    voice.give(lambda: to_json(result))
