"""The whole study in one call: prompts, sweep of edits, the other parts, figures and report."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from rich.progress import Progress
from torch import Tensor

from lrqp_torch import __version__, models
from lrqp_torch.distributed import Ranks
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import package_versions
from lrqp_torch.files import digest_model
from lrqp_torch.study import chapters, figures, flipping, html, results, shared_sweep
from lrqp_torch.study.clock import Clock
from lrqp_torch.study.context import ALONE, StudyContext, Task
from lrqp_torch.study.drawing import require_matplotlib
from lrqp_torch.study.folder import forget, made_folder
from lrqp_torch.study.part_store import (
    Finished,
    Given,
    PartStore,
    Start,
    kept_or_computed,
    run_parts,
)
from lrqp_torch.study.preparing import (
    choose_device,
    choose_sites,
    describe_model,
    digest_prompts,
    make_prompts,
    name_task,
)
from lrqp_torch.study.progress import progress_bars
from lrqp_torch.study.prompt_texts import PromptTexts
from lrqp_torch.study.published import PUBLISHED
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.truth import read_truth


def reproduce(settings: Settings, *, progress: bool = False) -> StudyResults:
    """Run the study and write its results, figures and report into ``settings.out``.

    Each part is kept as soon as it is finished. A run that was stopped goes on from there with
    ``settings.resume``, and gives the same numbers as one that was not.

    Args:
        settings: what to run.
        progress: whether to show progress bars on standard error.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        LRQPError: any bad input; the message says what, where, and how to mend it. The output
            folder is checked before any work; one that was made for a run that is refused is
            removed again.
    """
    # Rank 0 always has results, and one process is rank 0.
    return cast(StudyResults, reproduce_on(ALONE, settings, progress=progress))


def reproduce_on(
    ranks: Ranks, settings: Settings, *, progress: bool = False
) -> StudyResults | None:
    """The study of :func:`reproduce` on many processes, all of which make this call.

    The sweep is shared: its captures and held-out prompts batch by batch, its probes and
    covariances site by site. The numbers are those of one process. The other parts, figures and
    report are made by rank 0 alone, after ``ranks.leave()``; it alone reads and writes
    ``settings.out``. The others return as soon as the sweep is done.

    Args:
        ranks: this process among the others, from :func:`lrqp_torch.distributed.joined`.
        settings: what to run, the same on every rank.
        progress: whether rank 0 shows progress bars on standard error.

    Returns:
        The results on rank 0, None on the others.

    Raises:
        LRQPError: as :func:`reproduce`, on the first rank where it happens.
        ToldError: on the others.
        RankError: another rank has ended, or has other prompts or weights.
    """
    with ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(made_folder(settings.out))
        bars = stack.enter_context(progress_bars(enabled=progress and ranks.is_main))
        return _reproduce(ranks, settings, _start(bars))


def _reproduce(ranks: Ranks, settings: Settings, start: Start) -> StudyResults | None:
    clock = Clock()
    with ranks.together():
        if settings.figures:
            require_matplotlib()
        if settings.report:
            html.require_plotly()
        names = chapters.choose(settings.parts)
        context = _prepare(settings, start, clock)
        truth = read_truth(settings.model)
        store = PartStore(settings.out, _fingerprint(settings, context))
    ranks.agree(store.fingerprint)
    with ranks.together():
        if ranks.is_main and settings.resume:
            names = [name for name in chapters.NAMES if name in {*names, *store.finished()}]
        elif ranks.is_main:
            store.clear()
            forget(settings.out)
        sweeps = [chapters.FLIPPING, chapters.OTHER_TASK] if chapters.FLIPPING in names else []
        tasks = dict(zip(sweeps, context.tasks, strict=False))
        missing = [name for name in tasks if ranks.is_main and store.load(name) is None]
    missing = ranks.from_main(missing)
    if not ranks.is_main:
        for name in missing:
            _sweep_task(ranks, context, tasks[name], settings, store, name, start)
        return None
    swept = _sweep(ranks, context, settings, store, start, wanted=chapters.FLIPPING in names)
    ranks.leave()
    given = Given(
        context,
        settings,
        None if swept.own is None else swept.own.best_site,
        _edits(context, settings),
    )
    chosen = [part for part in chapters.PARTS if part.name in names]
    finished = run_parts(given, chosen, store, start)
    other = None if swept.other is None else store.load(chapters.OTHER_TASK)
    parts = finished if other is None else {chapters.OTHER_TASK: other} | finished
    study = StudyResults(
        settings=settings.record(),
        model=describe_model(context.model, settings.model),
        data={"train": len(context.task.train), "test": len(context.task.test)},
        clean=swept.clean,
        sites={} if swept.own is None else swept.own.sites,
        used_sites=[] if swept.own is None else swept.own.used_sites,
        best_site=given.best_site,
        ground_truth=None
        if truth is None or swept.own is None
        else truth.compare(context.sites, swept.own.used_sites),
        published=PUBLISHED,
        versions=package_versions(),
        elapsed=_elapsed(clock, swept, parts),
        parts={name: part.raw for name, part in parts.items()},
    )
    results.save(study, swept.prompts, settings.out)
    if settings.figures:
        advance = start("drawing figures", 1 + len(chosen))
        if swept.own is not None:
            figures.draw(study, swept.prompts, settings.out)
        advance(1)
        for part in chosen:
            part.module.draw(given.results[part.name], settings.out)
            advance(1)
    if settings.report:
        advance = start("writing the report", 1)
        rewrite_report(settings.out)
        advance(1)
    return study


def _prepare(settings: Settings, start: Start, clock: Clock) -> StudyContext:
    """The model, its sites, and the prompts."""
    with clock.stage("model"):
        advance = start("loading the model", 1)
        device = choose_device(settings.device)
        model, tokenizer = models.load(settings.model, device=device)
        advance(1)
    sites = choose_sites(model, settings.sites)
    with clock.stage("prompts"):
        advance = start("writing prompts", 1)
        versions = [settings, settings.other()] if settings.compares else [settings]
        tasks = [Task(name_task(s), *make_prompts(tokenizer, s)) for s in versions]
        advance(1)
    return StudyContext(
        model=model,
        task=tasks[0],
        other_task=tasks[1] if settings.compares else None,
        sites=sites,
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=device,
    )


def rewrite_report(folder: Path) -> Path:
    """Write ``report.html`` from the results that a folder holds.

    Returns:
        The file.

    Raises:
        OutputError: the results are missing or unreadable, or the report cannot be written.
        MissingExtraError: plotly is not installed.
    """
    study, prompts = results.load(folder)
    path = folder / html.REPORT_FILE
    html.write_report(path, study, chapters.sections(study, prompts, PromptTexts.load(folder)))
    return path


@dataclass(frozen=True)
class _Swept:
    """The clean run, and the sweep of each task that was asked for."""

    clean: results.CleanResult
    prompts: dict[str, Tensor]
    own: flipping.TaskFlipping | None
    other: flipping.TaskFlipping | None


def _sweep(
    ranks: Ranks,
    context: StudyContext,
    settings: Settings,
    store: PartStore,
    start: Start,
    *,
    wanted: bool,
) -> _Swept:
    PromptTexts.of(context.task.test).save(settings.out)
    labels = {"labels.abb": context.task.test.labels.cpu()}
    if not wanted:
        swept = flipping.sweep(
            context.model,
            context.task.test,
            {},
            batch_size=context.batch_size,
            advance=start("running the model", -(-len(context.task.test) // context.batch_size)),
        )
        return _Swept(
            flipping.summarise_clean(swept.clean), swept.prompts() | labels, own=None, other=None
        )

    def run(task: Task, name: str) -> flipping.TaskFlipping:
        def compute() -> flipping.TaskFlipping:
            swept, seconds = _sweep_task(ranks, context, task, settings, store, name, start)
            if task is context.task:
                results.save_prompts(swept.prompts() | labels, settings.out)
            return flipping.TaskFlipping.of(task.name, swept, seconds)

        return flipping.TaskFlipping.from_json(kept_or_computed(store, name, compute).raw)

    own = run(context.task, chapters.FLIPPING)
    task = context.other_task
    other = None if task is None else run(task, chapters.OTHER_TASK)
    return _Swept(own.clean, results.load_prompts(settings.out), own, other)


def _sweep_task(
    ranks: Ranks,
    context: StudyContext,
    task: Task,
    settings: Settings,
    store: PartStore,
    name: str,
    start: Start,
) -> tuple[flipping.Sweep, dict[str, float]]:
    clock = Clock()
    what = "" if task is context.task else ", other task"
    with clock.stage("capture"):
        advance = start(f"reading activations{what}", len(task.train))
        activations = context.activations(task, "train", "S2", advance=advance, ranks=ranks)
    with (
        clock.stage("fit"),
        ranks.counted(
            start(f"fitting probes{what}", len(context.sites)), len(context.sites)
        ) as advance,
    ):
        labels = task.train.labels.to(context.device)

        def fit(sites: list[str]) -> dict[str, LRQP]:
            return flipping.fit_edits(
                {site: activations[site] for site in sites},
                labels,
                l2=settings.l2,
                shrinkage=settings.shrinkage,
                log_odds=settings.log_odds,
                advance=advance,
            )

        fitted = ranks.divide(context.sites, fit, context.device)
        edits = {site: fitted[site] for site in context.sites}
    with clock.stage("sweep"):
        batches = -(-len(task.test) // context.batch_size)
        swept = shared_sweep.sweep(
            ranks,
            context.model,
            task.test,
            edits,
            batch_size=context.batch_size,
            batches=store.batches(name),
            advance=start(f"editing{what}", batches * flipping.sweep_runs(len(edits))),
        )
    return swept, {stage: s for stage, s in clock.seconds().items() if stage != "total"}


def _elapsed(clock: Clock, swept: _Swept, parts: Mapping[str, Finished]) -> dict[str, float]:
    """Seconds of every stage in order; of a part that was kept, those it took when it ran."""
    stages = clock.seconds()
    total = stages.pop("total")
    stages |= {} if swept.own is None else swept.own.seconds
    return stages | {name: part.seconds for name, part in parts.items()} | {"total": total}


def _edits(context: StudyContext, settings: Settings) -> Callable[[str], LRQP]:
    """The study's edit at a site, fitted when it is first asked for."""

    @cache
    def edit_at(site: str) -> LRQP:
        fitted = flipping.fit_edits(
            context.activations(context.task, "train", "S2", [site]),
            context.task.train.labels.to(context.device),
            l2=settings.l2,
            shrinkage=settings.shrinkage,
            log_odds=settings.log_odds,
        )
        return fitted[site]

    return edit_at


def _fingerprint(settings: Settings, context: StudyContext) -> dict[str, object]:
    return settings.deciding() | {
        "sites": ",".join(context.sites),
        "device": context.device.type,
        "weights": digest_model(context.model),
        "prompts": digest_prompts(context.tasks),
        "lrqp_torch": __version__,
    }


def _start(bars: Progress) -> Start:
    def start(title: str, total: int) -> Callable[[int], object]:
        task = bars.add_task(title, total=total)
        return lambda done: bars.advance(task, done)

    return start
