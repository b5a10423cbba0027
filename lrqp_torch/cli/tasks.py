"""Prompts of your own: ``lrqp fit``, ``apply`` and ``example-task``."""

from pathlib import Path
from typing import Annotated

import typer

from lrqp_torch.cli.app import Debug, app, messages
from lrqp_torch.cli.tasks_options import (
    L2,
    PANEL,
    BatchSize,
    Data,
    Device,
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
    split_names,
)


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
        from lrqp_torch.errors import PromptError
        from lrqp_torch.tasks.examples import EXAMPLES, write_prompts

        if name not in EXAMPLES:
            raise PromptError(f"no example task {name!r}; there are {', '.join(EXAMPLES)}")
        prompts = EXAMPLES[name](n, seed)
        if out.suffix != ".jsonl":
            raise PromptError(f"{str(out)!r}: the file is JSONL, so let its name end in .jsonl")
        write_prompts(prompts, out)
    console().print(f"Wrote {n} prompts to {out}, such as: {prompts[0].text}", markup=False)


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
        from lrqp_torch.edits.library import EditLibrary
        from lrqp_torch.edits.saving import require_one_kind
        from lrqp_torch.study.folder import made_folder
        from lrqp_torch.study.preparing import choose_sites
        from lrqp_torch.tasks.fitting import fit_sites, try_sites, with_origin
        from lrqp_torch.tasks.printing import print_fit
        from lrqp_torch.tasks.splitting import majority_share

        shrunk = parse_shrinkage(shrinkage)
        labels = split_names(label)
        with made_folder(out):
            read = {name: read_halves(data, name, position, train_share, seed) for name in labels}
            loaded, tokenizer = load_model(model, device)
            sites = choose_sites(loaded, site)
            several = len(sites) * len(labels) > 1
            require_one_kind(out, several)
            edits = {}
            for name, halves in read.items():
                train, test = encode_halves(tokenizer, halves)
                fitted = fit_sites(
                    loaded, train, sites,
                    l2=l2, shrinkage=shrunk, log_odds=log_odds, batch_size=batch_size,
                )  # fmt: skip
                tried = try_sites(loaded, test, fitted, batch_size=batch_size)
                origin = {"task": data.stem, "variable": name, "position": position, "seed": seed}
                for at, edit in with_origin(loaded, train, fitted, tried, **origin).items():
                    edits[f"{name}.{at}" if len(labels) > 1 else at] = edit
                majority = majority_share(train.labels.tolist(), test.labels.tolist())
                print_fit(name, train.classes, len(train), majority, tried, console())
            if several:
                EditLibrary(edits).save(out)
            else:
                next(iter(edits.values())).save(out)
    kept = f"the edits {', '.join(edits)}" if several else "the edit"
    console().print(f"Kept {kept} in {out}; try: lrqp apply {out} --help", markup=False)


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
        from lrqp_torch.errors import PromptError
        from lrqp_torch.study.prompts import PromptSet
        from lrqp_torch.tasks.applying import apply as apply_edit
        from lrqp_torch.tasks.applying import typed_prompts
        from lrqp_torch.tasks.origin import origin_of
        from lrqp_torch.tasks.printing import print_applied, write_applied
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
        loaded, tokenizer = load_model(model, device)
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
    print_applied(found, origin, show, console())
