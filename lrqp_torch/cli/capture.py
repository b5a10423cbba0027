"""``lrqp capture``: the activations of a model at some sites, kept in a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrqp_torch.cli import options as given
from lrqp_torch.cli.app import Voice, command

if TYPE_CHECKING:
    from torch import Tensor

    from lrqp_torch.stream.store import ActivationStore

LABELS_FILE = "labels.json"
EVERY_TOKEN = "all"


@command(panel=given.OWN)
def capture(
    voice: Voice,
    out: Annotated[Path, typer.Option(help="Folder for the activations; made if needed.")],
    sites: Annotated[
        str,
        typer.Option(
            help="Names such as L6.mid,L7.pre, or all (the stream before and within every block)."
        ),
    ],
    model: given.Model = "organism",
    data: Annotated[
        str | None,
        typer.Option(
            help="Prompts of your own: a .csv, .tsv, .jsonl or .parquet file, or a data set of the "
            "Hub as NAME or NAME:SPLIT, with the columns text and label.",
            show_default="prompts about two names, as in lrqp reproduce",
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Where to read each prompt: a named token such as S2 or END; with --data mark "
            "(the last token of the words in [[ ]]), last, or a column that holds words of the "
            "prompt; all for every token.",
            show_default="S2; with --data mark",
        ),
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the class, with --data.")] = "label",
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts, without --data.")] = 1000,
    prefixes: given.Prefixes = "none",
    seed: given.Seed = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="Prompts per file.")] = 4096,
    batch_size: given.BatchSize = 64,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="The most tokens per forward pass, padding included.", show_default="any"
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the files back and compare their checksums.")
    ] = False,
    device: given.Device = "auto",
    dry_run: given.DryRun = False,
) -> None:
    """Write the activations of a model at some sites to a folder, to fit probes on later.

    Nothing but the part of the model below the last site is run, prompts of similar length
    together. A capture that was stopped goes on with the same command. In Python,
    lrqp_torch.ActivationStore(FOLDER) reads the activations, and labels.json beside them holds the
    class of each prompt.

    Many processes share the work: torchrun --nproc-per-node 4 -m -- lrqp_torch capture ...
    """
    from lrqp_torch.distributed import capture_to, joined
    from lrqp_torch.files import prepare_folder, write_json
    from lrqp_torch.stream.capture import capture as read
    from lrqp_torch.study.preparing import choose_sites

    with joined(device) as ranks:
        with ranks.together():
            if ranks.is_main and not dry_run:
                prepare_folder(out)
            loaded, tokenizer = given.load_model(model, device)
            chosen = choose_sites(loaded, sites)
            inputs, at, labels = (
                _names(tokenizer, n, seed, prefixes, positions)
                if data is None
                else _own(tokenizer, data, label, positions)
            )
            if dry_run:
                if ranks.is_main:
                    size = min(batch_size, len(at))
                    few = {name: rows[:size] for name, rows in inputs.items()}
                    voice.foresee(
                        f"capture {len(chosen)} sites of {model} on {len(at)} prompts",
                        size / len(at) * ranks.size,
                        lambda: read(loaded, few, chosen, at[:size], batch_tokens=batch_tokens),
                        f"{-(-len(at) // shard_size)} files of activations and {LABELS_FILE}",
                        out,
                    )
                return
        sizes: dict[str, Any] = {
            "shard_size": shard_size, "batch_size": batch_size, "batch_tokens": batch_tokens
        }  # fmt: skip
        shown = {"ranks": ranks, "progress": not voice.quiet}
        store = capture_to(out, loaded, inputs, chosen, at, **shown, **sizes)
    if store is None:  # rank 0 tells
        return
    write_json(out / LABELS_FILE, labels, indent=None)
    if verify:
        store.verify()
    found = _summary(store, _padding(inputs["attention_mask"], **sizes))
    voice.say(
        f"{len(store)} {'site' if len(store) == 1 else 'sites'} of "
        f"{' × '.join(map(str, found['shape']))} in {found['dtype']}, {found['files']} files, "
        f"{found['bytes']:,} bytes; {found['padding']:.1%} of the tokens that ran were padding.",
        f"Activations are in {store.folder}.",
    )
    voice.give(lambda: found)


def _names(
    tokenizer: Any, n: int, seed: int, prefixes: str, positions: str | None
) -> "tuple[dict[str, Tensor], Tensor, dict[str, Any]]":
    """Inputs, positions and labels of prompts about two names."""
    from lrqp_torch.errors import PositionError
    from lrqp_torch.ioi import IOIDataset

    before = None if prefixes == "none" else prefixes
    found = IOIDataset.generate(tokenizer, n, seed=seed, prefixes=before, padding_side="left")
    name = "S2" if positions is None else positions
    places = found.positions | {EVERY_TOKEN: found.inputs["attention_mask"].bool()}
    if name not in places:
        raise PositionError(f"no position {name!r}; there are {', '.join(places)}")
    labels = {"variable": "abb", "classes": ["BABA", "ABBA"]}
    return found.inputs, places[name], _rows(labels, name, found.labels["abb"], found.inputs)


def _own(
    tokenizer: Any, data: str, label: str, positions: str | None
) -> "tuple[dict[str, Tensor], Tensor, dict[str, Any]]":
    """The same of the user's own prompts."""
    from lrqp_torch.study.prompts import PromptSet
    from lrqp_torch.study.reading import read_prompts

    name = "mark" if positions is None else positions
    read = read_prompts(data, label=label, position="last" if name == EVERY_TOKEN else name)
    prompts = PromptSet.encode(tokenizer, read)
    labels = {"variable": label, "classes": list(prompts.classes)}
    mask = prompts.inputs["attention_mask"].bool()
    at = mask if name == EVERY_TOKEN else prompts.position
    return prompts.inputs, at, _rows(labels, name, prompts.labels, prompts.inputs)


def _rows(
    labels: dict[str, Any], position: str, classes: "Tensor", inputs: "dict[str, Tensor]"
) -> dict[str, Any]:
    """What labels.json says: the class of each prompt, and how many rows it has in the store."""
    every = inputs["attention_mask"].sum(1)
    rows = every if position == EVERY_TOKEN else classes.new_ones(len(classes))
    return labels | {"position": position, "labels": classes.tolist(), "rows": rows.tolist()}


def _padding(mask: "Tensor", shard_size: int, batch_size: int, batch_tokens: int | None) -> float:
    """Share of the tokens that ran which was padding."""
    from lrqp_torch.stream.inputs import by_length, wasted_share

    shards = range(0, len(mask), shard_size)
    spans = [range(start, min(start + shard_size, len(mask))) for start in shards]
    batches = [batch for span in spans for batch in by_length(mask, span, batch_size, batch_tokens)]
    return wasted_share(mask, batches)


def _summary(store: "ActivationStore", padding: float) -> dict[str, Any]:
    first = store[store.sites[0]]
    return {
        "out": str(store.folder),
        "sites": list(map(str, store.sites)),
        "shape": list(first.shape),
        "dtype": str(first.dtype).removeprefix("torch."),
        "files": len(store.index.shards),
        "bytes": sum(shard.size for shard in store.index.shards),
        "padding": padding,
    }
