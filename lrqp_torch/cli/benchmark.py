"""Other people's benchmarks: ``lrqp benchmark``."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from lrqp_torch.cli import options as given
from lrqp_torch.cli.app import Voice, command

if TYPE_CHECKING:
    from lrqp_torch.study.benchmarks import BenchmarkResult


@command(panel=given.OWN)
def benchmark(
    voice: Voice,
    name: Annotated[str, typer.Argument(help="causalgym, ravel or mib.")],
    out: given.Out,
    model: given.Model,
    sites: Annotated[str, typer.Option(help="Such as L10.pre,L17.pre; or all.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder or file with the benchmark's published files, or a data set of the Hub. "
            "For causalgym also files of prompts in this project's form, each of which is a task.",
            show_default="the benchmark's data set on the Hub",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=8, help="Prompts of a task, half held out.")] = 400,
    task: Annotated[
        str | None,
        typer.Option(
            help="Tasks (causalgym), attributes (ravel) or kinds of counterfactual (mib), with "
            "commas.",
            show_default="all",
        ),
    ] = None,
    position: given.Position = "auto",
    bos: given.Bos = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="Of training DAS, at most.")] = 20,
    seed: given.Seed = 0,
    batch_size: given.BatchSize = 64,
    device: given.Device = "auto",
    dry_run: given.DryRun = False,
) -> None:
    """Score LRQP and other edits on a published benchmark, by the benchmark's own measures.

    causalgym: the log odds-ratio, its selectivity by a control task, and interchange accuracy.
    ravel: cause, isolate, and the disentangle score, their mean. mib: interchange accuracy. The
    files are read as they are published. Writes benchmark.json and prints a table.
    """
    from lrqp_torch.stream.progress import progress_bars
    from lrqp_torch.study.benchmarks import run_benchmark
    from lrqp_torch.study.methods import Training
    from lrqp_torch.study.preparing import choose_sites
    from lrqp_torch.study.records import to_json
    from lrqp_torch.study.report.terminal import as_rich
    from lrqp_torch.study.store import made_folder

    def run(at: str, prompts: int) -> "BenchmarkResult":
        with progress_bars(enabled=not voice.quiet) as start:
            return run_benchmark(
                name, data, loaded, tokenizer, at, n=prompts, position=position, bos=bos,
                tasks=() if task is None else given.split_names(task, "task"),
                batch_size=batch_size, seed=seed, training=Training(epochs=epochs), start=start,
            )  # fmt: skip

    with nullcontext() if dry_run else made_folder(out):
        loaded, tokenizer = given.load_model(model, device)
        if dry_run:
            every, few = choose_sites(loaded, sites), min(n, 40)
            voice.foresee(
                f"score the edits of {name} at {len(every)} sites, on {n} prompts a task at most",
                few / n / len(every),
                lambda: run(every[0], few),
                "benchmark.json",
                out,
            )
            return
        found = run(sites, n)
        path = found.save(out)
    for title, table in found.tables().items():
        voice.console.print(as_rich(table, title))
    voice.say(*found.says(), f"Results are in {path}.")
    voice.give(lambda: to_json(found))
