"""The whole study in one call: prompts, sweep of edits, the other parts, figures and report."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress
from torch import Tensor

from lrqp_torch import __version__, models
from lrqp_torch.distributed import Ranks
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.provenance import package_versions
from lrqp_torch.errors import SettingError
from lrqp_torch.files import digest_model
from lrqp_torch.plot.static import write_charts
from lrqp_torch.study import figures, flipping, flipping_view, html, results
from lrqp_torch.study.clock import Clock
from lrqp_torch.study.context import ALONE, Advance, StudyContext, Task
from lrqp_torch.study.drawing import require_matplotlib
from lrqp_torch.study.flipping import TaskFlipping
from lrqp_torch.study.folder import forget, made_folder
from lrqp_torch.study.html import Section
from lrqp_torch.study.panel import Panel as OldPanel
from lrqp_torch.study.panel import Table as OldTable
from lrqp_torch.study.part import Given, Part, keep_nothing
from lrqp_torch.study.parts import PARTS, find_part
from lrqp_torch.study.parts.flipping import PART as FLIPPING
from lrqp_torch.study.parts.flipping import FlippingResult
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
from lrqp_torch.study.records import from_json, to_json
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.store import Finished, PartStore, kept_or_computed
from lrqp_torch.study.truth import KnownSites, read_truth

Start = Callable[[str, int], Advance]
"""Opens a progress bar with a title and a total, and gives the function that moves it."""


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
    return cast(StudyResults, run(settings, progress=progress))


def run(settings: Settings, ranks: Ranks = ALONE, *, progress: bool = False) -> StudyResults | None:
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
        return _run(ranks, settings, _start(bars))


def _run(ranks: Ranks, settings: Settings, start: Start) -> StudyResults | None:
    clock = Clock()
    with ranks.together():
        if settings.figures:
            require_matplotlib()
        if settings.report:
            html.require_plotly()
        context = _prepare(settings, start, clock)
        names = choose(settings.parts, context)
        truth = read_truth(settings.model)
        store = PartStore(settings.out, _fingerprint(settings, context))
    ranks.agree(store.fingerprint)
    with ranks.together():
        if ranks.is_main and settings.resume:
            names = [name for name in PARTS if name in {*names, *store.finished()}]
        elif ranks.is_main:
            store.clear()
            forget(settings.out)
    parts = [find_part(name) for name in ranks.from_main(names)]
    given = Given(context, settings, None, _edits(context, settings), ranks=ranks)
    if ranks.is_main:
        PromptTexts.of(context.task.test).save(settings.out)
    finished = run_parts(given, parts, store, start)
    if finished is None:
        return None
    if "flipping" not in finished:
        _run_clean(given, start)
    study = _results(given, finished, truth, clock)
    prompts = results.load_prompts(settings.out)
    results.save(study, prompts, settings.out)
    if settings.figures:
        advance = start("drawing figures", len(parts))
        for part in parts:
            if part.name == "flipping":
                figures.draw(study, prompts, settings.out)
            else:
                write_charts(part.figures(given.results[part.name]), settings.out)
            advance(1)
    if settings.report:
        advance = start("writing the report", 1)
        rewrite_report(settings.out)
        advance(1)
    return study


def run_parts(
    given: Given, parts: Sequence[Part[Any]], store: PartStore, start: Start
) -> dict[str, Finished] | None:
    """Compute each part, or take it from the store, and keep it as soon as it is finished.

    Args:
        given: what the parts build on; their results are added to ``given.results``.
        parts: in the order in which they run, each after those that it needs, the shared first.
        store: where rank 0 keeps them; :meth:`PartStore.clear` it first to compute all anew.
        start: opens a progress bar.

    Returns:
        Part name to its finished result on rank 0, None on the others, which end after the last
        shared part.

    Raises:
        SettingError: a part in the store was made with other settings.
        LRQPError: whatever a part raises; the parts before it are kept.
    """
    ranks, shared = given.ranks, [part for part in parts if part.shared]
    with ranks.together():
        kept = [part.name for part in shared if ranks.is_main and store.load(part.name)]
    kept = ranks.from_main(kept)
    finished = {}
    for number, part in enumerate(parts):
        if number == len(shared):
            ranks.leave()
        if not ranks.is_main and (not part.shared or part.name in kept):
            continue
        given = replace(
            given,
            ranks=ranks if part.shared else ALONE,
            batches=store.batches(part.name),
            keep_prompts=partial(results.save_prompts, folder=given.settings.out)
            if ranks.is_main
            else keep_nothing,
        )

        def compute(part: Part[Any] = part, given: Given = given) -> Any:
            return part.compute(given, start(part.title, part.work(given.context)))

        if not ranks.is_main:
            compute()
            continue
        finished[part.name] = kept_or_computed(store, part.name, compute)
        # Read back also when just computed: what follows then never depends on a stop.
        given.results[part.name] = result = part.read(finished[part.name].raw)
        if isinstance(result, FlippingResult):
            given = replace(given, best_site=result.own.best_site)
    ranks.leave()
    return finished if ranks.is_main else None


def choose(names: str, context: StudyContext) -> list[str]:
    """Parts to run, in order, with those that they need.

    Args:
        names: part names separated by commas; ``all`` stands for every part that runs on these
            prompts, but for those that run only when they are named.
        context: the model and its prompts.

    Raises:
        SettingError: a name that is no part, no name at all, or a part that does not run on these
            prompts.
    """
    asked = {name.strip() for name in names.split(",") if name.strip()}
    unknown = sorted(asked - {"all", *PARTS})
    if unknown or not asked:
        found = f"unknown part {unknown[0]!r}" if unknown else "no part given"
        raise SettingError(f"{found}; choose from {', '.join(PARTS)}, or say all.")
    parts = {name: find_part(name) for name in PARTS}
    if "all" in asked:
        able = {n for n, part in parts.items() if not part.by_name_only}
        asked = (asked - {"all"}) | {n for n in able if parts[n].missing(context) is None}
    needed = {need for name in asked for need in parts[name].needs}
    # A part that can do without another on these prompts says so by not being missing itself.
    needed = {need for need in needed if parts[need].missing(context) is None}
    for name in (name for name in PARTS if name in asked | needed):
        reason = parts[name].missing(context)
        if reason is not None:
            raise SettingError(f"the part {name} cannot run on these prompts: {reason}.")
    return [name for name in PARTS if name in asked | needed]


def _run_clean(given: Given, start: Start) -> None:
    """The clean run alone, for a study without the sweep."""
    context, test = given.context, given.context.task.test
    advance = start("running the model", -(-len(test) // context.batch_size))
    swept = flipping.sweep(context.model, test, {}, batch_size=context.batch_size, advance=advance)
    labels = {"labels.abb": test.labels.cpu()}
    results.save_prompts(swept.prompts() | labels, given.settings.out)


def _results(
    given: Given, finished: Mapping[str, Finished], truth: KnownSites | None, clock: Clock
) -> StudyResults:
    context, settings = given.context, given.settings
    swept: FlippingResult | None = given.results.get("flipping")
    own = None if swept is None else swept.own
    if own is None:
        flat = results.load_prompts(settings.out)
        clean = flipping.summarise_clean(flipping.Sweep.from_prompts(flat, []).clean)
    else:
        clean = own.clean
    parts = {name: part.raw for name, part in finished.items() if name != "flipping"}
    others = {} if swept is None else {"other_task": t for t in list(swept.tasks.values())[1:]}  # noqa: B035
    stages = clock.seconds()
    total = stages.pop("total")
    stages |= {} if own is None else own.seconds
    stages |= {name: sum(task.seconds.values()) for name, task in others.items()}
    stages |= {n: part.seconds for n, part in finished.items() if n != "flipping"}
    return StudyResults(
        settings=settings.record(),
        model=describe_model(context.model, settings.model),
        data={"train": len(context.task.train), "test": len(context.task.test)},
        clean=clean,
        sites={} if own is None else own.sites,
        used_sites=[] if own is None else own.used_sites,
        best_site=None if own is None else own.best_site,
        ground_truth=None
        if truth is None or own is None
        else truth.compare(context.sites, own.used_sites),
        published=PUBLISHED,
        versions=package_versions(),
        elapsed=stages | {"total": total},
        parts={name: to_json(task) for name, task in others.items()} | parts,
    )


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
    html.write_report(path, study, _sections(study, prompts, PromptTexts.load(folder)))
    return path


def _sections(
    study: StudyResults, prompts: Mapping[str, Tensor], texts: PromptTexts
) -> list[Section]:
    """The report's chapters: one a part that the results hold."""
    chapters = []
    if study.best_site is not None:
        panels = [flipping_view.sweep_panel(study.clean, study.sites, study.used_sites)]
        raw = study.parts.get("other_task")
        if raw is not None:
            own = "plain" if study.settings["prefixes"] == "none" else "prefixed"
            other = from_json(TaskFlipping, raw)
            panels.append(flipping_view.tasks_panel(own, study.sites, other))
        panels.append(flipping_view.answers_panel(study.sites, study.best_site, prompts, texts))
        chapters.append(Section(FLIPPING.title, FLIPPING.question, panels))
    for name in PARTS:
        if name in study.parts:
            part = find_part(name)
            panels = [_shown(panel) for panel in part.panels(part.read(study.parts[name]))]
            chapters.append(Section(part.title, part.question, panels))
    return chapters


def _shown(panel: Any) -> OldPanel:
    """A panel of charts in the form of one with figures."""
    if isinstance(panel, OldPanel):
        return panel
    table = None if panel.table is None else OldTable(panel.table.columns, panel.table.rows)
    return OldPanel(panel.name, panel.title, panel.text, panel.charts, panel.choice, table)


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
