"""The whole study in one call: prompts, sweep of edits, the other parts, figures and report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.progress import Progress
from torch import Tensor

from lrqp_torch import __version__, models
from lrqp_torch.digests import digest_model
from lrqp_torch.edit import LRQP
from lrqp_torch.study import chapters, figures, flipping, html, results
from lrqp_torch.study.clock import Clock
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.drawing import require_matplotlib
from lrqp_torch.study.folder import forget, made_folder
from lrqp_torch.study.parts import Finished, Given, PartStore, Start, kept_or_computed, run_parts
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
from lrqp_torch.versions import package_versions


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
    with made_folder(settings.out):
        return _reproduce(settings, progress=progress)


def _reproduce(settings: Settings, *, progress: bool) -> StudyResults:
    if settings.figures:
        require_matplotlib()
    if settings.report:
        html.require_plotly()
    names = chapters.choose(settings.parts)
    clock = Clock()

    with progress_bars(enabled=progress) as bars:
        start = _start(bars)
        with clock.stage("model"):
            advance = start("loading the model", 1)
            device = choose_device(settings.device)
            model, tokenizer = models.load(settings.model, device=device)
            advance(1)
        truth = read_truth(settings.model)
        sites = choose_sites(model, settings.sites)
        with clock.stage("prompts"):
            advance = start("writing prompts", 1)
            versions = [settings, settings.other()] if settings.compares else [settings]
            tasks = [Task(name_task(s), *make_prompts(tokenizer, s)) for s in versions]
            advance(1)
        context = StudyContext(
            model=model,
            task=tasks[0],
            other_task=tasks[1] if settings.compares else None,
            sites=sites,
            batch_size=settings.batch_size,
            seed=settings.seed,
            device=device,
        )
        store = PartStore(settings.out, _fingerprint(settings, context))
        if settings.resume:
            names = [name for name in chapters.NAMES if name in {*names, *store.finished()}]
        else:
            store.clear()
            forget(settings.out)
        swept = _sweep(context, settings, store, start, wanted=chapters.FLIPPING in names)
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
            model=describe_model(model, settings.model),
            data={"train": len(context.task.train), "test": len(context.task.test)},
            clean=swept.clean,
            sites={} if swept.own is None else swept.own.sites,
            used_sites=[] if swept.own is None else swept.own.used_sites,
            best_site=given.best_site,
            ground_truth=None
            if truth is None or swept.own is None
            else truth.compare(sites, swept.own.used_sites),
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
    context: StudyContext, settings: Settings, store: PartStore, start: Start, *, wanted: bool
) -> _Swept:
    PromptTexts.of(context.task.test).save(settings.out)
    labels = {"labels.abb": context.task.test.labels["abb"].cpu()}
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
            swept, seconds = _sweep_task(context, task, settings, store, name, start)
            if task is context.task:
                results.save_prompts(swept.prompts() | labels, settings.out)
            return flipping.TaskFlipping.of(task.name, swept, seconds)

        return flipping.TaskFlipping.from_json(kept_or_computed(store, name, compute).raw)

    own = run(context.task, chapters.FLIPPING)
    task = context.other_task
    other = None if task is None else run(task, chapters.OTHER_TASK)
    return _Swept(own.clean, results.load_prompts(settings.out), own, other)


def _sweep_task(
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
        activations = context.activations(task, "train", "S2", advance=advance)
    with clock.stage("fit"):
        edits = flipping.fit_edits(
            activations,
            task.train.labels["abb"].to(context.device),
            l2=settings.l2,
            shrinkage=settings.shrinkage,
            log_odds=settings.log_odds,
            advance=start(f"fitting probes{what}", len(context.sites)),
        )
    with clock.stage("sweep"):
        batches = -(-len(task.test) // context.batch_size)
        swept = flipping.sweep(
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
            context.task.train.labels["abb"].to(context.device),
            l2=settings.l2,
            shrinkage=settings.shrinkage,
            log_odds=settings.log_odds,
        )
        return fitted[site]

    return edit_at


def _fingerprint(settings: Settings, context: StudyContext) -> dict[str, object]:
    tasks = [context.task] if context.other_task is None else [context.task, context.other_task]
    return settings.deciding() | {
        "sites": ",".join(context.sites),
        "device": context.device.type,
        "weights": digest_model(context.model),
        "prompts": digest_prompts(tasks),
        "lrqp_torch": __version__,
    }


def _start(bars: Progress) -> Start:
    def start(title: str, total: int) -> Callable[[int], object]:
        task = bars.add_task(title, total=total)
        return lambda done: bars.advance(task, done)

    return start
