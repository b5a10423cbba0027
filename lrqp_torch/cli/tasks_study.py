"""Prompts of your own: ``lrqp study``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrqp_torch.cli.app import Debug, app, messages
from lrqp_torch.cli.tasks_options import (
    L2,
    PANEL,
    BatchSize,
    Data,
    Device,
    Label,
    LogOdds,
    Model,
    Position,
    Seed,
    ShrinkageOf,
    TrainShare,
    console,
    encode_halves,
    load_model,
    read_halves,
)


@app.command(rich_help_panel=PANEL)
def study(
    data: Data,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for results and figures; made if needed.")],
    sites: Annotated[
        str,
        typer.Option(
            help="all (the stream before and within every block), or names such as L6.mid,L7.pre."
        ),
    ] = "all",
    label: Label = "label",
    position: Position = "mark",
    train_share: TrainShare = 0.5,
    log_odds: LogOdds = 10.0,
    l2: L2 = None,
    shrinkage: ShrinkageOf = "ledoit_wolf",
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw the figure as PNG and SVG.")
    ] = True,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write the interactive report.html.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Find where a model knows the label of your prompts, and where it uses it, by editing it.

    At every site: how well a probe reads the label on prompts held out, and how many answers flip
    when the belief is edited to another class (counterfactual) or to the true one (control). A site
    is used where the counterfactual flips half of the answers more than the control. Prompts
    without answers can be studied too: then the change of the next token is measured.

    Writes report.html, results.json, prompts.safetensors, prompts.json and the figure.
    """
    with messages(debug):
        from lrqp_torch.cli.study import parse_shrinkage
        from lrqp_torch.study.drawing import require_matplotlib
        from lrqp_torch.study.folder import made_folder
        from lrqp_torch.study.html import require_plotly
        from lrqp_torch.study.progress import progress_bars
        from lrqp_torch.tasks import figures as drawing
        from lrqp_torch.tasks import report as page
        from lrqp_torch.tasks import study as run_study
        from lrqp_torch.tasks.printing import print_results

        if figures:
            require_matplotlib()
        if report:
            require_plotly()
        shrunk = parse_shrinkage(shrinkage)
        with made_folder(out), progress_bars() as bars:
            halves = read_halves(data, label, position, train_share, seed)
            loaded, tokenizer = load_model(model, device)
            train, test = encode_halves(tokenizer, halves)

            def start(title: str, total: int) -> Any:
                stage = bars.add_task(title, total=total)
                return lambda done: bars.advance(stage, done)

            results = run_study(
                loaded, train, test, sites,
                l2=l2, shrinkage=shrunk, log_odds=log_odds, batch_size=batch_size, seed=seed,
                name=model, start=start, data=str(data), label=label, position=position,
                train_share=train_share,
            )  # fmt: skip
            results.save(out)
            if figures:
                drawing.draw(results, out)
            if report:
                page.write_report(results, out)
    print_results(results, console())
    where = f"Results are in {out}" + (f"; open {out / 'report.html'}." if report else ".")
    console().print(where, markup=False)
