"""``lrqp doctor``: what works in this installation."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lrqp_torch.cli.app import Voice, command


@command(panel="This installation")
def doctor(
    voice: Voice,
    model: Annotated[
        str | None,
        typer.Argument(help="A model, folder or Hub name, whose sites are to be shown too."),
    ] = None,
) -> None:
    """Print versions, devices, usable solvers and extras, and try capture, an edit, its replay and
    an edit in generation on a real model.

    What says no is optional, and its line says how to get it; what says NO is needed, and the
    command ends with exit code 1.
    """
    from lrqp_torch.cli.doctor_checks import examine

    examined, broken = examine(model), []
    for heading, findings in examined.items():
        kinds = {finding.required for finding in findings}
        kind = " (needed)" if kinds == {True} else " (optional)" if kinds == {False} else ""
        table = Table(title=heading + kind, title_justify="left", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column()
        table.add_column(ratio=1)
        for finding in findings:
            mark = "yes" if finding.usable else "NO" if finding.required else "no"
            spare = not (finding.usable or finding.required or kind)
            detail = f"optional: {finding.detail}" if spare else finding.detail
            table.add_row(f"  {mark}", Text(finding.name), Text(detail))
            if finding.required and not finding.usable:
                broken.append(finding.name)
        voice.console.print(table)
    voice.give(lambda: {name: [asdict(each) for each in found] for name, found in examined.items()})
    if broken:
        voice.say(f"Broken: {', '.join(broken)}.", aside=voice.json)
        raise typer.Exit(1)
    voice.say("Everything that lrqp needs works.")
