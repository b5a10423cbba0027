"""Prompts of your own: ``lrqp fit``, ``apply``, ``study`` and ``example-task``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lrqp_torch.cli.app import Debug, app, messages
from lrqp_torch.errors import PromptError

if TYPE_CHECKING:
    from lrqp_torch.tasks.prompts import Prompt

PANEL = "Edits of your own"

Data = Annotated[
    Path,
    typer.Option(
        help="Prompts: a .csv or .jsonl file, or a data set of the Hub as NAME or NAME:SPLIT. "
        "Columns: text, with the words to edit marked as in 'The [[keys]] to the cabinet'; label; "
        "and, if there are any, answers for each class."
    ),
]
Model = Annotated[str, typer.Option(help="organism, smollm2, gpt2, or a folder or Hub name.")]
Label = Annotated[str, typer.Option(help="Column of the class.")]
Position = Annotated[
    str,
    typer.Option(
        help="Where to read and edit: mark (the last token of the marked words), last (the last "
        "token of the prompt), or a column that holds words of the prompt."
    ),
]
TrainShare = Annotated[
    float, typer.Option(help="Share of each class to fit on; the others are held out.")
]
LogOdds = Annotated[float, typer.Option(help="Least log odds that an edit asks of the probe.")]
L2 = Annotated[
    float | None, typer.Option(help="Penalty of the probe.", show_default="the probe's own")
]
ShrinkageOf = Annotated[
    str, typer.Option(help="Of the covariance: ledoit_wolf, oas, or a number from 0 to 1.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


@app.command(name="example-task", rich_help_panel=PANEL)
def example_task(
    name: Annotated[str, typer.Argument(help="agreement or greater-than.")],
    out: Annotated[Path, typer.Option(help="File to write, ending in .jsonl.")],
    n: Annotated[int, typer.Option("--n", min=2, help="Number of prompts.")] = 600,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Write prompts of an example task, to see what a file looks like and to try the commands on.

    agreement: whether the subject of a sentence is singular or plural, at the word before the verb.
    greater-than: whether the first of two years is early or late in its century, at the second.
    """
    with messages(debug):
        from lrqp_torch.tasks.examples import EXAMPLES, write_prompts

        if name not in EXAMPLES:
            raise PromptError(f"no example task {name!r}; there are {', '.join(EXAMPLES)}")
        prompts = EXAMPLES[name](n, seed)
        if out.suffix != ".jsonl":
            raise PromptError(f"{str(out)!r}: the file is JSONL, so let its name end in .jsonl")
        write_prompts(prompts, out)
    _console().print(f"Wrote {n} prompts to {out}, such as: {prompts[0].text}", markup=False)


@app.command(rich_help_panel=PANEL)
def fit(
    data: Data,
    model: Model,
    site: Annotated[str, typer.Option(help="Such as L6.mid; several with commas.")],
    out: Annotated[Path, typer.Option(help="Folder for the edit; made if needed.")],
    label: Annotated[str, typer.Option(help="Column of the class; several with commas.")] = "label",
    position: Position = "mark",
    train_share: TrainShare = 0.5,
    log_odds: LogOdds = 10.0,
    l2: L2 = None,
    shrinkage: ShrinkageOf = "ledoit_wolf",
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Fit an edit to prompts of your own, and keep it in a folder.

    Fits a probe and a metric at one site, says how well the probe reads prompts held out, and
    whether edits of these reach the odds asked for. With several sites or labels, the folder is a
    library of edits, named SITE or LABEL.SITE.
    """
    with messages(debug):
        from lrqp_torch.cli.study import parse_shrinkage
        from lrqp_torch.sharing.library import EditLibrary
        from lrqp_torch.study.preparing import choose_sites
        from lrqp_torch.tasks.fitting import fit_sites, try_sites, with_origin
        from lrqp_torch.tasks.printing import print_fit
        from lrqp_torch.tasks.splitting import majority_share

        shrunk = parse_shrinkage(shrinkage)
        labels = _names(label)
        read = {name: _halves(data, name, position, train_share, seed) for name in labels}
        loaded, tokenizer = _load(model, device)
        sites = choose_sites(loaded, site)
        several = len(sites) * len(labels) > 1
        edits = {}
        for name, halves in read.items():
            train, test = _encode(tokenizer, halves)
            fitted = fit_sites(
                loaded, train, sites,
                l2=l2, shrinkage=shrunk, log_odds=log_odds, batch_size=batch_size,
            )  # fmt: skip
            tried = try_sites(loaded, test, fitted, batch_size=batch_size)
            origin = {"task": data.stem, "variable": name, "position": position, "seed": seed}
            for at, edit in with_origin(loaded, train, fitted, tried, **origin).items():
                edits[f"{name}.{at}" if len(labels) > 1 else at] = edit
            majority = majority_share(train.labels.tolist(), test.labels.tolist())
            print_fit(name, train.classes, len(train), majority, tried, _console())
        if several:
            EditLibrary(edits).save(out)
        else:
            next(iter(edits.values())).save(out)
    kept = f"the edits {', '.join(edits)}" if several else "the edit"
    _console().print(f"Kept {kept} in {out}; try: lrqp apply {out} --help", markup=False)


@app.command(rich_help_panel=PANEL)
def apply(
    folder: Annotated[str, typer.Argument(help="Folder or Hub name of an edit.")],
    model: Model,
    target: Annotated[
        str,
        typer.Option(
            help="Class to write: its name; other (the next class, the other one of two); or own "
            "(the class that holds already, as a control)."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Prompts with labels, in a file as for lrqp fit.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt, with the words to edit marked; may be given several times."),
    ] = None,
    edit: Annotated[
        str | None, typer.Option(help="Which edit, where the folder holds several.")
    ] = None,
    generate: Annotated[
        int, typer.Option(min=0, help="Tokens by which to continue each prompt, greedily.")
    ] = 0,
    show: Annotated[int, typer.Option(min=0, help="Prompts to print.")] = 10,
    json: Annotated[Path | None, typer.Option(help="File for the results of all prompts.")] = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Apply an edit to prompts, and see what probe and model say without and with it.

    The edit knows its site, its position and its classes. Prompts given with --prompt have no
    label; the class that holds is then what the probe reads.
    """
    with messages(debug):
        from lrqp_torch.tasks.applying import apply as apply_edit
        from lrqp_torch.tasks.applying import typed_prompts
        from lrqp_torch.tasks.origin import origin_of
        from lrqp_torch.tasks.printing import print_applied, write_applied
        from lrqp_torch.tasks.prompts import PromptSet
        from lrqp_torch.tasks.reading import read_prompts
        from lrqp_torch.tasks.saved import load_one

        if (data is None) == (not prompt):
            raise PromptError("give prompts either with --data or with --prompt")
        chosen = load_one(folder, edit)
        origin = origin_of(chosen)
        given = None
        if data is not None:
            given = read_prompts(
                data, label=origin.variable or "label", position=origin.position or "mark"
            )
        loaded, tokenizer = _load(model, device)
        prompts = (
            typed_prompts(tokenizer, prompt or [], chosen)
            if given is None
            else PromptSet.encode(tokenizer, given, origin.classes)
        )
        found = apply_edit(
            loaded, tokenizer, chosen, prompts, target,
            labelled=given is not None, generate=generate, batch_size=batch_size,
        )  # fmt: skip
        if json is not None:
            write_applied(found, origin, json)
    print_applied(found, origin, show, _console())


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
            halves = _halves(data, label, position, train_share, seed)
            loaded, tokenizer = _load(model, device)
            train, test = _encode(tokenizer, halves)

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
    print_results(results, _console())
    where = f"Results are in {out}" + (f"; open {out / 'report.html'}." if report else ".")
    _console().print(where, markup=False)


def _halves(
    data: Path, label: str, position: str, train_share: float, seed: int
) -> "tuple[list[Prompt], list[Prompt]]":
    from lrqp_torch.tasks.reading import read_prompts
    from lrqp_torch.tasks.splitting import split

    prompts = read_prompts(data, label=label, position=position)
    return split(prompts, train_share, seed)


def _encode(tokenizer: Any, halves: "tuple[list[Prompt], list[Prompt]]") -> Any:
    from lrqp_torch.tasks.prompts import PromptSet

    classes = sorted({prompt.label for half in halves for prompt in half})
    return tuple(PromptSet.encode(tokenizer, half, classes) for half in halves)


def _load(model: str, device: str) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from lrqp_torch.models import load
    from lrqp_torch.study.preparing import choose_device

    disable_progress_bar()  # it would run through ours
    return load(model, device=choose_device(device))


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise PromptError("no label given; name the column of the class")
    return names


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
