"""Prompts of your own: ``lrqp fit``, ``apply`` and ``example-task``."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrqp_torch.cli import options as given
from lrqp_torch.cli.app import Voice, command
from lrqp_torch.study.settings import Settings

if TYPE_CHECKING:
    from lrqp_torch.edits.lrqp import LRQP
    from lrqp_torch.study.editing import HeldOut


@command("example-task", panel=given.OWN)
def example_task(
    voice: Voice,
    name: Annotated[str, typer.Argument(help="agreement or greater-than.")],
    out: Annotated[Path, typer.Option(help="File to write, ending in .jsonl.")],
    n: Annotated[int, typer.Option("--n", min=2, help="Number of prompts.")] = 600,
    seed: given.Seed = 0,
) -> None:
    """Write prompts of an example task, to see what a file looks like and to try the commands on.

    agreement: whether the subject of a sentence is singular or plural, at the word before the verb.
    greater-than: whether the first of two years is early or late in its century, at the second.
    """
    from lrqp_torch.errors import PromptError
    from lrqp_torch.study.reading import EXAMPLES, write_prompts

    if name not in EXAMPLES:
        raise PromptError(f"no example task {name!r}; there are {', '.join(EXAMPLES)}")
    prompts = EXAMPLES[name](n, seed)
    if out.suffix != ".jsonl":
        raise PromptError(f"{str(out)!r}: the file is JSONL, so let its name end in .jsonl")
    write_prompts(prompts, out)
    voice.say(f"Wrote {n} prompts to {out}, such as: {prompts[0].text}")
    voice.give(lambda: {"out": str(out), "prompts": n})


@command(
    panel=given.OWN,
    options=given.options_of(
        (
            *("data", "model", "position", "text", "group", "pair", "bos", "strict", "train_share"),
            *("log_odds", "l2", "shrinkage", "seed", "batch_size", "device"),
        ),
        data=...,
    ),
)
def fit(
    voice: Voice,
    site: Annotated[str, typer.Option(help="Such as L6.mid; several with commas.")],
    out: Annotated[Path, typer.Option(help="Folder for the edit; made if needed.")],
    label: Annotated[str, typer.Option(help="Column of the class; several with commas.")] = "label",
    *,
    dry_run: bool,
    shrinkage: str,
    **chosen: Any,
) -> None:
    """Fit an edit to prompts of your own, and keep it in a folder.

    Fits a probe and a metric at one site, says how well the probe reads prompts held out, and
    whether edits of these reach the odds asked for. With several sites or labels, the folder is a
    library of edits, named SITE or LABEL.SITE.
    """
    from lrqp_torch.edits.library import EditLibrary
    from lrqp_torch.edits.saving import require_one_kind
    from lrqp_torch.study.editing import fit_sites
    from lrqp_torch.study.preparing import choose_sites, encode_own, read_own
    from lrqp_torch.study.prompts import OPENING, majority_share
    from lrqp_torch.study.reading import RowLog
    from lrqp_torch.study.records import to_json
    from lrqp_torch.study.report.terminal import print_fit
    from lrqp_torch.study.run import first_of_each
    from lrqp_torch.study.store import made_folder

    labels = given.split_names(label, "label")
    asked = Settings(out=out, sites=site, shrinkage=given.parse_shrinkage(shrinkage), **chosen)
    data, size = str(asked.data), asked.batch_size
    with nullcontext() if dry_run else made_folder(out):
        log = RowLog(asked.strict)
        read = {name: read_own(replace(asked, label=name), log) for name in labels}
        loaded, tokenizer = given.load_model(asked.model, asked.device)
        sites = choose_sites(loaded, asked.sites)
        several = len(sites) * len(labels) > 1
        require_one_kind(out, several)
        edits: dict[str, LRQP] = {}
        found: dict[str, HeldOut] = {}
        for name, prompts in read.items():
            train, test, fronted = encode_own(tokenizer, prompts, asked, log)
            if dry_run:
                few = first_of_each(train, size), first_of_each(test, size)
                voice.foresee(
                    f"fit {len(sites) * len(labels)} edits to {len(train)} prompts, and try them "
                    f"on {len(test)} held out",
                    sum(map(len, few)) / (len(train) + len(test)) / len(labels),
                    partial(fit_sites, loaded, few[0], sites, few[1], batch_size=size),
                    "the library of edits" if several else "the edit",
                    out,
                )
                return
            marked = "mark" if OPENING in prompts[0].text else "last"
            fitted, tried = fit_sites(
                loaded, train, sites, test,
                **asked.fitting, batch_size=size,
                task=Path(data).stem, variable=name, bos=fronted, seed=asked.seed,
                position=marked if asked.position == "auto" else asked.position,
            )  # fmt: skip
            named = {at: f"{name}.{at}" if len(labels) > 1 else at for at in fitted}
            edits |= {named[at]: edit for at, edit in fitted.items()}
            found |= {named[at]: held_out for at, held_out in tried.items()}
            majority = majority_share(train.labels.tolist(), test.labels.tolist())
            print_fit(name, train.classes, len(train), majority, tried, voice.console)
            poor = [at for at, own in tried.items() if (own.accuracy.lower or 0) <= majority]
            if poor:
                voice.say(
                    f"Note: at {', '.join(poor)} the probe does not clearly read {name} on "
                    "held-out prompts (the interval includes guessing), so an edit there says "
                    "little about it; try other sites, more prompts or another --position.",
                    aside=True,
                )
        if several:
            EditLibrary(edits).save(out)
        else:
            next(iter(edits.values())).save(out)
    voice.say(*(f"Note: {line}" for line in log.says()), aside=True)
    kept = f"the edits {', '.join(edits)}" if several else "the edit"
    voice.say(f"Kept {kept} in {out}; try: lrqp apply {out} --help")
    voice.give(lambda: {"out": str(out), "edits": to_json(found)})


@command(panel=given.OWN)
def apply(
    voice: Voice,
    folder: Annotated[str, typer.Argument(help="Folder or Hub name of an edit.")],
    model: given.Model,
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
    out: Annotated[
        Path | None, typer.Option(help="File for the results of all prompts, as JSON.")
    ] = None,
    batch_size: given.BatchSize = 64,
    device: given.Device = "auto",
) -> None:
    """Apply an edit to prompts, and see what probe and model say without and with it.

    The edit knows its site, its position and its classes. Prompts given with --prompt have no
    label; the class that holds is then what the probe reads.
    """
    from lrqp_torch.errors import PromptError
    from lrqp_torch.files import prepare_folder, write_json
    from lrqp_torch.study import editing
    from lrqp_torch.study.prompts import PromptSet
    from lrqp_torch.study.reading import read_prompts
    from lrqp_torch.study.report.terminal import print_applied

    if (data is None) == (not prompt):
        raise PromptError("give prompts either with --data or with --prompt")
    if out is not None:
        prepare_folder(out.parent)
    chosen = editing.load_one(folder, edit)
    origin = editing.origin_of(chosen)
    label, position = origin.variable or "label", origin.position or "mark"
    read = None if data is None else read_prompts(data, label=label, position=position)
    loaded, tokenizer = given.load_model(model, device)
    prompts = (
        prompt or []
        if read is None
        else PromptSet.encode(tokenizer, read, origin.classes, bos=origin.bos)
    )
    found = editing.apply(
        loaded, tokenizer, chosen, prompts, target,
        labelled=read is not None, generate=generate, batch_size=batch_size,
    )  # fmt: skip
    if out is not None:
        write_json(out, editing.applied_json(found, origin), indent=2)
    print_applied(found, origin, len(found) if voice.verbose else show, voice.console)
    voice.give(lambda: editing.applied_json(found, origin))
