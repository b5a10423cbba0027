"""The study: ``lrqp reproduce``, ``study`` and a command for each part; and ``lrqp report``."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lrqp_torch.cli import options as given
from lrqp_torch.cli.app import INTERRUPTED, Voice, command
from lrqp_torch.study.parts import PARTS
from lrqp_torch.study.settings import NAMES, OWN, Settings

WRITES = (
    "Writes report.html, results.json, prompts.safetensors, prompts.json and the figures as PNG "
    "and SVG, and prints a summary."
)


def _command(
    name: str, text: str, without: Collection[str], panel: str | None = None, **changed: Any
) -> None:
    """Add a command that runs a study.

    ``without`` are settings that are no options of it; ``changed`` defaults that differ, also of
    these.
    """
    every = ["out", *(each.name for each in fields(Settings) if each.name != "out")]
    changed = {"model": "organism", **changed}
    shown = given.options_of((each for each in every if each not in without), **changed)

    def study(voice: Voice, **chosen: Any) -> None:
        _run(voice, **{k: value for k, value in changed.items() if k in without}, **chosen)

    command(name, panel=panel, text=text, options=shown)(study)


def _run(voice: Voice, *, dry_run: bool, **chosen: Any) -> None:
    """Run a study and report on it, or say what would run."""
    from lrqp_torch.distributed import joined
    from lrqp_torch.study.records import to_json
    from lrqp_torch.study.report import print_summary
    from lrqp_torch.study.run import plan, run
    from lrqp_torch.study.store import PartStore

    figures = given.able(chosen["figures"], "Figures are", "matplotlib", "plots", voice)
    report = given.able(chosen["report"], "The report is", "plotly", "report", voice)
    chosen |= {"figures": figures, "report": report}

    def settled() -> Settings:
        return Settings(**chosen | {"shrinkage": given.parse_shrinkage(chosen["shrinkage"])})

    if dry_run:
        planned = plan(settled(), progress=not voice.quiet)
        voice.say(*planned.in_words())
        voice.give(lambda: to_json(planned))
        return
    with joined(chosen["device"]) as ranks:
        with ranks.together():
            settings = settled()
        try:
            results = run(settings, ranks, progress=not voice.quiet)
        except KeyboardInterrupt:
            if ranks.is_main:
                kept = PartStore(settings.out, {}).in_words()
                line = f"Stopped. {kept} Go on with the same command and --resume."
                voice.say(line, aside=True)
            raise typer.Exit(INTERRUPTED) from None
    if results is None:  # rank 0 tells
        return
    print_summary(results, voice.console, whole=voice.verbose)
    page = f"; open {settings.out / 'report.html'}" if settings.report else ""
    voice.say(f"Results are in {settings.out}{page}.")
    voice.give(lambda: to_json(results))


_command(
    "reproduce",
    "Find where a model uses the order of two names, by editing it: the whole study.\n\n"
    'For prompts such as "When Mary and John went to the store, John gave a drink to", fit a probe '
    'for the order of the names at the second "John", at every site of the residual stream. Then '
    "edit the activation there until the probe believes the other order, on held-out prompts, and "
    "count the answers that flip. The other parts ask what else can be read there, how much belief "
    "it takes, and which attention heads carry the change. Figures published for GPT-2 small stand "
    f"beside those found.\n\nParts of the study: {', '.join(PARTS)}.\n\n{WRITES}",
    OWN,
)


@command("report", text="Write report.html anew from the results in a folder.")
def report_again(
    voice: Voice,
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of a finished study.", show_default="--out")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The same, as the study was given it.", show_default=False)
    ] = None,
) -> None:
    """Rewrite the report."""
    from lrqp_torch.errors import SettingError
    from lrqp_torch.study.run import rewrite_report

    named = [each for each in (folder, out) if each is not None]
    if len(named) != 1:
        raise SettingError("give the folder of the study once: lrqp report --out FOLDER")
    path = rewrite_report(named[0])
    voice.say(f"Wrote {path}.")
    voice.give(lambda: {"report": str(path)})


for _part, _help in PARTS.items():
    _command(
        _part,
        f"{_help}\n\nRuns this part of the study, and those that it needs: on prompts about two "
        f"names, or with --data on prompts of your own.",
        ("parts",),
        panel="One part of the study",
        parts=_part,
        **({"variables": "order,identity"} if _part == "joint" else {}),
    )

_command(
    "study",
    "Find where a model knows the label of your prompts, and where it uses it, by editing it.\n\n"
    "At every site: how well a probe reads the label on prompts held out, and how many answers "
    "flip when the belief is edited to another class (counterfactual) or to the true one "
    "(control). A site is used where the counterfactual flips more answers than edits as long of "
    "probes of shuffled labels, by an exact paired test. Where a prompt has a twin, of its pair or "
    "the same but for the marked words, the twin's activation is the ceiling. Prompts without "
    "answers can be studied too: then the change of the next token is "
    f"measured. Other parts of the study run with --parts.\n\n{WRITES}",
    NAMES,
    parts="flipping",
    data=...,
    model=...,
)
