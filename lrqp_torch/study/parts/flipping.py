"""Where the variable can be read, and where editing it flips the answer: the sweep over sites.

If the counterfactual edit flips the answer, the model *uses* the variable at that site; a probe's
accuracy tells only that it is *knowable* there. See :mod:`~lrqp_torch.study.sweep` for the edits.

Source: the post "Intervening in the Residual Stream" (2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.plot.chart import Chart, Panel, Table
from lrqp_torch.plot.figures import histogram_of, scatter_of, sweep_of
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.progress import Clock
from lrqp_torch.study.ceiling import LEVEL, PROBES, null_edits, shuffled, turns
from lrqp_torch.study.context import Advance, StudyContext, Task
from lrqp_torch.study.doses import asked_at
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import halves
from lrqp_torch.study.records import BESIDE
from lrqp_torch.study.results import (
    CleanResult,
    Refits,
    SiteResult,
    StudyResults,
    TaskFlipping,
    best_site,
    judged,
    told,
)
from lrqp_torch.study.running import Trials, displacements
from lrqp_torch.study.showing import (
    HELD_AGAINST,
    Reading,
    by_site,
    curves,
    known,
    panel,
    said,
    table_of,
    task_in_words,
)
from lrqp_torch.study.sweep import CONDITIONS, INTERCHANGE, NULL, sweep

MOST_POINTS = 500
"""Held-out prompts drawn at each site; the numbers are of all of them."""

KNOWABLE = 0.95
"""A probe that is right on this share of the held-out prompts reads the class reliably."""

OTHER_TASK = "other_task"
"""Under this name ``results.json`` has the sweep of the other version of the task."""


@dataclass(frozen=True)
class FlippingResult:
    """The sweep of each version of the task."""

    tasks: dict[str, TaskFlipping]  # name to sweep, the study's own task first
    # The finished study in which the sweep is shown.
    study: StudyResults | None = field(default=None, repr=False, compare=False, metadata=BESIDE)

    @property
    def own(self) -> TaskFlipping:
        """The sweep of the study's own task."""
        return next(iter(self.tasks.values()))

    @property
    def other(self) -> TaskFlipping | None:
        """The sweep of the other one."""
        return list(self.tasks.values())[1] if len(self.tasks) > 1 else None

    @property
    def shown_in(self) -> StudyResults:
        """The finished study."""
        assert self.study is not None, "a sweep is shown with its study's words and prompts"
        return self.study


class Flipping(Part[FlippingResult]):
    """Edits at every site, towards the class that holds and the next one."""

    name = "flipping"
    title = "Flipping the answer"
    result = FlippingResult
    shared = True
    spans = True

    def work(self, context: StudyContext, /) -> int:
        """Prompts to read, probes to fit, and runs of held-out prompts."""
        units, sites = 0, len(context.sites)
        for task in context.tasks:
            runs = len([*CONDITIONS, *_beside(context, task)])
            units += len(task) + (1 + PROBES) * sites + (1 + runs * sites) * len(task.test)
        return units

    def compute(self, given: Given, advance: Advance, /) -> FlippingResult:
        """Sweep each version of the task."""
        found, batches = {}, 0
        for task in given.context.tasks:
            found[task.name], flat = _swept(given, task, batches, advance)
            if task is given.context.task:
                given.keep_prompts(flat)
            batches += -(-len(task.test) // given.context.batch_size)
        return FlippingResult(found)

    def found(self, study: StudyResults, /) -> FlippingResult | None:
        """The sweep as results.json has it: the own task on top, the other among the parts."""
        site = study.best_site
        if site is None:
            return None
        study = replace(study, sites=told(study.sites), best=told(study.best))
        own = TaskFlipping(
            study.task, study.clean, study.sites, study.used_sites, site, {}, study.best
        )
        tasks, other = {study.task: own}, study.parts.get(OTHER_TASK)
        if other is not None:
            read: FlippingResult = self.read({"tasks": {OTHER_TASK: other}})
            tasks[read.own.task] = read.own
        return FlippingResult(tasks, study)

    def says(self, result: FlippingResult, /) -> list[str]:
        """What can be read where, what is used where, and whether the edits kept their promise."""
        study = result.shown_in
        sites, beyond = study.sites, {n: s.beyond for n, s in study.sites.items() if s.beyond}
        return said(
            self.name,
            "says",
            study=study,
            best=study.strongest,
            readable=[n for n, s in sites.items() if (s.probe_accuracy.value or 0) >= KNOWABLE],
            tested=sum(site.null is not None for site in sites.values()),
            more=[f"{name} ({why})" for name, why in beyond.items() if why.startswith("flips")],
            longer=[name for name, why in beyond.items() if not why.startswith("flips")],
            failed=sum(map(_failed, sites.values())),
            margin=min(site.worst_log_odds_margin for site in sites.values()),
            knowable=KNOWABLE,
            probes=PROBES,
            level=LEVEL,
        )

    def figures(self, result: FlippingResult, /) -> dict[str, Chart]:
        """The sweep by site and, where there are answers, those at the best site."""
        study = result.shown_in
        charts = {"sweep": sweep_of(study)}
        if study.answered is not None:
            charts |= {"histogram": histogram_of(study), "scatter": scatter_of(study)}
        return charts

    def overview(self, result: FlippingResult, /) -> list[Panel]:
        """The sweep, and the answers at the site that flips most."""
        study = result.shown_in
        shown = {"flipping-sweep": {"charts": {"": sweep_of(study)}, "table": sites_table(study)}}
        if study.answered is not None:
            shown["flipping-histogram"] = {"charts": {"": histogram_of(study)}}
        return [panel(self.name, name, shown=own, study=study) for name, own in shown.items()]

    def panels(self, result: FlippingResult, /) -> list[Panel]:
        """Every held-out prompt at each site, and the sweep beside that of the other task."""
        study = result.shown_in
        shown: dict[str, dict[str, Any]] = {}
        if study.answered is not None:
            shown["flipping-answers"] = {"charts": _answers_by_site(study), "choice": "site"}
        if result.other is not None:
            shown["flipping-tasks"] = {"charts": {"": _tasks_chart(result.own, result.other)}}
        known = {"study": study, "other": result.other, "most": MOST_POINTS}
        return [panel(self.name, name, shown=own, **known) for name, own in shown.items()]


# ---- computing -----------------------------------------------------------------------------------


def _swept(
    given: Given, task: Task, number: int, advance: Advance
) -> tuple[TaskFlipping, dict[str, Tensor]]:
    """Fit to one task's training prompts, and run its held-out ones; ``number`` is that under which
    the first batch is kept.
    """
    context, settings, ranks = given.context, given.settings, given.context.ranks
    clock = Clock()
    with clock.stage("capture"):
        found, held_out = context.clean(task, "mark", advance)
    if task.train.spans is not None:
        found = context.examples(task, context.sites)[0]
    labels = context.examples(task, [])[1]
    mixed = shuffled(labels, context.generator())
    with clock.stage("fit"), ranks.counted(advance, (1 + PROBES) * len(context.sites)) as fitted:

        def edits_at(sites: list[str]) -> dict[str, LRQP]:
            return given.fit({site: found[site] for site in sites}, labels, fitted)

        def chance_at(sites: list[str]) -> dict[str, nn.ModuleList]:
            each = list(enumerate(mixed))
            problems = {(site, i): (found[site], y) for site in sites for i, y in each}
            probes = LinearProbe.fit_many(problems, l2=settings.l2, advance=fitted)
            return {site: nn.ModuleList(probes[site, i] for i, _ in each) for site in sites}

        edits = ranks.divide(context.sites, edits_at, context.device)
        chance = ranks.divide(context.sites, chance_at, context.device)
    with clock.stage("interchange"):
        asked = asked_at(context, task, settings.dose, edits)
        beside, told = _put_beside(given, task, edits, chance, held_out, asked)
    with clock.stage("sweep"):
        how: dict[str, Any] = {"ranks": ranks, "beside": beside, "asked": asked, "advance": advance}
        how |= {"kept": given.batches, "first": number, "batch_size": context.batch_size}
        ordered = {site: edits[site] for site in context.sites}
        flat = sweep(context.model, task.test, ordered, **how)
    flat |= told
    truth = task.test.labels.to(context.device)
    groups, rows = task.test.groups, halves(task.test)

    def result(site: str, of: dict[str, Tensor], among: Tensor | None = None) -> SiteResult:
        right = (chance[site][0](held_out[site]).argmax(-1) == truth).cpu()
        every = torch.arange(len(right)) if among is None else among
        own = None if groups is None else groups.cpu()[every]
        return SiteResult.of(of, site, Estimate.share(right[every], own), context.seed)

    sites = judged({site: result(site, flat) for site in context.sites}, flat, context.seed)
    if settings.refits and ranks.is_main and task.test.answers is not None:
        with clock.stage("refits"):
            spread = _refitted(given, task, found, held_out, flat)
        for name, one in sites.items():
            spreads = spread[name] if one.recovered else Refits.of(spread[name].flipped, [])
            sites[name] = replace(one, refits=spreads)
    clean = CleanResult.of(flat, context.seed)
    first, second = ({name: values[half] for name, values in flat.items()} for half in rows)
    site = best_site(first, context.sites)
    best = judged({site: result(site, second, rows[1])}, second, context.seed)[site]
    best = replace(best, verdict=sites[site].verdict)
    seconds = {stage: s for stage, s in clock.seconds().items() if stage != "total"}
    used = [name for name, found_there in sites.items() if found_there.used]
    return TaskFlipping(task.name, clean, sites, used, site, seconds, best), flat


@torch.no_grad()
def _refitted(
    given: Given,
    task: Task,
    found: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    flat: Mapping[str, Tensor],
) -> dict[str, Refits]:
    """The counterfactual edits of each site, fitted to training prompts drawn with replacement."""
    context, labels = given.context, task.train.labels.cpu()
    y, target = (each.to(context.device) for each in (task.test.labels, task.test.other))
    generator, trials, made = context.generator(), Trials(context, task.test), []
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    for _ in range(given.settings.refits):
        draws = (torch.randint(len(own), (len(own),), generator=generator) for own in classes)
        rows = torch.cat([own[drawn] for own, drawn in zip(classes, draws, strict=True)])
        known = {site: x[rows.to(context.device)] for site, x in found.items()}
        refitted = given.fit(known, labels[rows].to(context.device))
        moved = {s: displacements(edit, held_out[s], target, y) for s, edit in refitted.items()}
        made.append({site: trials.add(site, delta) for site, delta in moved.items()})
    trials.run()
    clean, right = flat["clean.logit_difference"], flat["clean.own_lead"] > 0

    def of(site: str) -> Refits:
        ran = [one[site] for one in made]
        shares = [Estimate.share(trial["other_lead"][right] > 0).value for trial in ran]
        patch, twins = flat.get(f"{site}.{INTERCHANGE}.logit_difference"), flat.get("twins")
        recovered = []
        if patch is not None and twins is not None:
            rows = twins.bool()
            most = float((clean - patch)[rows].mean())
            falls = [float((clean - trial["logit_difference"])[rows].mean()) for trial in ran]
            recovered = [fall / most for fall in falls] if most else []
        return Refits.of([share for share in shares if share is not None], recovered)

    return {site: of(site) for site in context.sites}


def _beside(context: StudyContext, task: Task) -> list[str]:
    """What runs beside the edits: the interchange, and the null where there are answers."""
    twins = task.test.spans is None and task.test.twins() is not None
    names = [INTERCHANGE] if twins else []
    if task.test.answers is None:
        return names
    runs = len(turns(len(task.test), context.generator()))
    return [*names, *(f"{NULL}{run or ''}" for run in range(runs))]


@torch.no_grad()
def _put_beside(
    given: Given,
    task: Task,
    edits: Mapping[str, LRQP],
    chance: Mapping[str, nn.ModuleList],
    held_out: Mapping[str, Tensor],
    asked: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What runs beside the edits by site and name, (n, d), and what is known of each prompt."""
    context, names = given.context, _beside(given.context, task)
    labels, target = (each.to(context.device) for each in (task.test.labels, task.test.other))
    twins = context.twins(task) if INTERCHANGE in names else None
    drawn = turns(len(labels), context.generator())
    nulls = dict(zip([n for n in names if n.startswith(NULL)], drawn, strict=False))
    told = {} if twins is None else {"twins": twins[1].long()}
    told |= {f"{name}.probe": turn for name, turn in nulls.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for site in context.sites:
        edit, x, here = edits[site], held_out[site], dict[str, Tensor]()
        if twins is not None:
            here[INTERCHANGE] = twins[0][site]
            moved = here[INTERCHANGE].double() - x.double()
            told[f"{site}.{INTERCHANGE}.distance"] = edit.metric.distance(moved).cpu()
        if nulls:
            floors = asked.get(site, {}).get("counterfactual")
            length = edit.metric.distance(displacements(edit, x, target, labels, floors))
        for name, turn in nulls.items():
            delta = null_edits(chance[site], edit.metric, target, labels, length, turn)
            here[name] = (x.double() + delta).to(x.dtype)
        found[site] = here
    return found, told


# ---- charts --------------------------------------------------------------------------------------


def _failed(site: SiteResult) -> int:
    return site.control.failed + site.counterfactual.failed


def sites_table(study: StudyResults) -> Table:
    """Every number of the sweep by site; of ceiling, null, verdict and refits what is known."""
    sites, answered = list(told(study.sites).values()), study.answered is not None
    effect = f"{study.words.preference} ({study.words.unit})"
    columns: dict[str, Reading] = {
        "probe accuracy (%)": "probe_accuracy",
        "shuffled labels (%)": "shuffled_accuracy",
    }
    for name in reversed(CONDITIONS):
        if answered:
            columns[f"flipped, {name} (%)"] = f"{name}.flipped"
            columns[f"{name}: {effect}"] = f"{name}.logit_difference"
        columns[f"{name}: KL (nats)"] = f"{name}.divergence"
    further: dict[str, Reading] = {
        "flipped, interchange (%)": "interchange.flipped",
        f"interchange: {effect}": "interchange.logit_difference",
        "interchange length, Mahalanobis": "interchange.distance",
        "flipped, null (%)": "null.flipped",
        "shuffled probes as strong": "null.as_strong",
        "P, used": "verdict.p_adjusted",
        "used": "verdict.used",
        "prompts to tell half": "verdict.prompts_needed",
        "spread of flips over refits (%)": "refits.flipped_sd",
        "spread of recovered (%)": "refits.recovered_sd",
        **HELD_AGAINST,
    }
    columns |= known(sites, further) | {
        "edit length, Mahalanobis": "counterfactual.distance",
        "edit length, Euclidean": "counterfactual.euclidean",
        "worst log-odds margin": "worst_log_odds_margin",
        "failed edits": _failed,
    }
    return table_of(["site"], (([name], site) for name, site in told(study.sites).items()), columns)


def _tasks_chart(own: TaskFlipping, other: TaskFlipping) -> Chart:
    """Probe accuracy and answers flipped, with and without a sentence before the prompt."""
    series = {task_in_words(task.task): task.sites for task in (own, other)}
    panes = []
    for title, path in (
        ("probe accuracy", "probe_accuracy"),
        ("answers flipped by the counterfactual edit", "counterfactual.flipped"),
    ):
        solid, dashed = curves(series, path)
        panes.append(by_site([solid, replace(dashed, dash="dash")], title))
    return Chart(panes, share_x=True)


def _answers(study: StudyResults, site: str, shown: list[str]) -> Chart:
    """The preference of each prompt ``shown`` under each edit against its clean one.

    The axes are the same at every site, so that choosing another one shows what changes.
    """
    words, texts, prompts = study.words, study.texts, study.prompts
    assert texts is not None
    keys = ["clean", *(f"{name}.{condition}" for name in study.sites for condition in CONDITIONS)]
    drawn = torch.stack([prompts[f"{key}.logit_difference"][: len(shown)] for key in keys])

    def answers(key: str) -> list[str]:
        leads, found = drawn[keys.index(key)].tolist(), []
        for own, other, lead in zip(texts.held, texts.other, leads, strict=False):
            said = f"{own} ({words.held})" if lead > 0 else f"{other} ({words.other})"
            found.append(said if lead else "a tie")
        return found

    before = answers("clean")
    pairs = {name: zip(before, answers(f"{site}.{name}"), strict=True) for name in CONDITIONS}
    notes = {name: [f"answer: {was} → {now}" for was, now in own] for name, own in pairs.items()}
    limits = {"x_range": _padded(drawn[0]), "y_range": _padded(drawn)}
    return scatter_of(study, site, len(shown), texts=shown, notes=notes, **limits)


def _padded(values: Tensor) -> tuple[float, float]:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    margin = 0.05 * (high - low or 1.0)
    return low - margin, high + margin


def _answers_by_site(study: StudyResults) -> dict[str, Chart]:
    """Every held-out prompt, before and after the edit, by site, the one that flips most first."""
    best, words, texts = str(study.best_site), study.words, study.texts
    assert texts is not None
    shown = [texts.shown(i, words.held, words.other) for i in range(len(texts.held[:MOST_POINTS]))]
    return {
        f"{site} (flips most)" if site == best else site: _answers(study, site, shown)
        for site in [best, *(name for name in study.sites if name != best)]
    }


PART = Flipping()
