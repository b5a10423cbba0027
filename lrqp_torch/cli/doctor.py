"""``lrqp doctor``: what works in this installation."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrqp_torch.cli.app import app


@app.command(rich_help_panel="This installation")
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="A model, folder or Hub name, whose sites are to be shown too."),
    ] = None,
) -> None:
    """Print versions, devices, usable solvers and extras, and try capture, an edit, its replay and
    an edit in generation on a real model.

    Ends with exit code 1 if something that the package needs does not work.
    """
    from transformers.utils.logging import disable_progress_bar

    from lrqp_torch.cli.doctor_checks import examine

    disable_progress_bar()
    console = Console(highlight=False)
    broken = []
    for heading, findings in examine(model).items():
        table = Table(title=heading, title_justify="left", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for finding in findings:
            mark = "yes" if finding.usable else "NO" if finding.required else "no"
            table.add_row(f"  {mark}", finding.name, Text(finding.detail))
            if finding.required and not finding.usable:
                broken.append(finding.name)
        console.print(table)
    if broken:
        console.print(f"Broken: {', '.join(broken)}.", style="bold red")
        raise typer.Exit(1)
    console.print("Everything that lrqp needs works.")
