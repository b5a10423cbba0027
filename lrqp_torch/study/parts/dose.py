"""How much belief it takes to flip an answer: edits at one site over a range of odds.

For each log α of a sweep, the activation at the marked token of every held-out prompt is replaced
by the nearest one at which the probe's odds for the next class, the other one of two, are at least
α (rule ``fixed``), and the answer is read. Prompts whose odds suffice already stay as they are. The
post's rule ``mirror``, log α = max(z_v − z_k, 10) with true class v and target k, stands beside the
sweep, for control edits (k = v) and counterfactual ones. Probe and metric are fitted to each
version of the task by itself, on its training prompts.

Source: the post "Intervening in the Residual Stream" (2023), for the rule and its floor of 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.plot.chart import Chart, Panel
from lrqp_torch.plot.figures import dose_measures, dose_of, dose_panes, dosed
from lrqp_torch.qp import Status
from lrqp_torch.study.ceiling import Interchange, Likeness, held_against
from lrqp_torch.study.context import Advance, StudyContext, Task
from lrqp_torch.study.estimates import Estimate, Sample
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import Words
from lrqp_torch.study.running import Twinned, answers, batches, put
from lrqp_torch.study.showing import HELD_AGAINST, Reading, known, table_of, task_in_words
from lrqp_torch.study.sweep import columns

LOG_ALPHAS = (-10.0, -5.0, 0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)


@dataclass(frozen=True)
class EditSummary(Likeness):
    """One edit of all held-out prompts."""

    log_alpha: float  # log odds asked for; their mean where they differ between prompts
    # Of the prompts that the clean model answers with the class that holds, the share answered with
    # the target under the edit; None for a task without answers.
    flipped: Estimate | None
    # Mean score of the class that holds minus that of the next class; None likewise.
    preference: Estimate | None
    divergence: Estimate  # mean KL(clean ‖ edited) of the next token, in nats
    distance: Estimate  # mean Mahalanobis length of the edit; 0 for prompts left as they were
    euclidean: Estimate  # mean Euclidean length of the edit, in units of the stream
    edited: float  # share of prompts that had to be changed
    unreached: int  # prompts left as they were because the solver could not reach the odds


@dataclass(frozen=True)
class TaskDose:
    """All edits of one version of the task."""

    prompts: int  # held-out prompts
    # Those that the clean model answers with the class that holds, of which shares flipped are
    # taken; None for a task without answers.
    answered: int | None
    probe_accuracy: float  # of the probe at the site, on held-out prompts
    clean: Estimate | None  # mean preference without an edit; None for a task without answers
    doses: list[EditSummary]  # counterfactual edits by rising log α
    control: EditSummary  # the mirror rule towards the class that holds
    counterfactual: EditSummary  # the mirror rule towards the next class
    # The ceiling of the counterfactual edits; None where no prompt has a twin.
    interchange: Interchange | None = None

    def half_dose(self) -> float | None:
        """The least log α of the sweep at which half of the answers flip; None if none does."""
        shares = ((d.log_alpha, d.flipped.value if d.flipped else None) for d in self.doses)
        return next((log_alpha for log_alpha, share in shares if (share or 0) >= 0.5), None)


@dataclass(frozen=True)
class DoseResult:
    """The dose sweep."""

    words: Words  # what the things of the task are called
    site: str  # where the edits act
    floor: float  # least log odds of the mirror rule
    tasks: dict[str, TaskDose]  # task name to its edits, the study's task first


class Dose(Part[DoseResult]):
    """Edits of rising log odds, in nats, at the best site."""

    name = "dose"
    title = "How much belief it takes"
    result = DoseResult
    needs = ("flipping",)
    prompts = "reporting"

    def __init__(self, log_alphas: Sequence[float] = LOG_ALPHAS) -> None:
        self.log_alphas = list(log_alphas)

    def work(self, context: StudyContext, /) -> int:
        """Prompts captured, and prompts run under each edit."""
        edits = len(self.log_alphas) + 2
        return sum(len(task) + edits * len(task.test) for task in context.tasks)

    def compute(self, given: Given, advance: Advance, /) -> DoseResult:
        """Sweep the odds at one site, in each version of the task."""
        tasks = {task.name: self._task(given, task, advance) for task in given.context.tasks}
        words = given.context.task.test.words
        return DoseResult(words, given.site, given.settings.log_odds, tasks)

    @torch.no_grad()
    def _task(self, given: Given, task: Task, advance: Advance) -> TaskDose:
        context, site, n = given.context, given.site, len(task.test)
        train, test = context.clean(task, "mark", advance, [site])
        mirror = given.fit(train, task.train.labels.to(train[site].device))[site]
        # Prompts that cannot be edited are counted instead of ending the study.
        fixed = partial(LRQP, mirror.probe, mirror.metric, rule="fixed", on_infeasible="skip")
        edits = [(fixed(log_odds=odds), "counterfactual") for odds in self.log_alphas]
        edits += [(mirror, "control"), (mirror, "counterfactual")]
        twinned = Twinned.of(context, task, site, mirror.metric.distance)
        clean, patch = dict[str, Tensor](), dict[str, Tensor]()
        found: list[dict[str, Tensor]] = [{} for _ in edits]
        for batch in batches(context.model, task.test, context.batch_size):
            put(clean, answers(batch.prompts, batch.clean, batch.clean_rest), batch.rows, n)
            there = None if twinned is None else twinned.under(batch)
            if there is not None:
                put(patch, columns(batch, there), batch.rows, n)
            for (one, condition), kept in zip(edits, found, strict=True):
                target = {condition: batch.targets()[condition]}
                edited = batch.edited(site, one, target)[condition]
                put(kept, columns(batch, edited, there), batch.rows, n)
                advance(len(batch))
        sample = Sample(context.seed, task.test.groups)
        likeness, interchange = dict[int, dict[str, Any]](), None
        if twinned is not None:
            patch["distance"] = twinned.distance
            # A control edit is not to do what the interchange does.
            own = {i: kept for i, kept in enumerate(found) if edits[i][1] != "control"}
            twins = sample.among(twinned.known)
            interchange, likeness = held_against(clean, own, patch, twins)
        *doses, control, counterfactual = (
            EditSummary(
                log_alpha=kept["floor"].mean().item(),
                flipped=sample.flipped(clean, kept) if clean else None,
                preference=sample.mean(kept["logit_difference"]) if clean else None,
                divergence=sample.mean(kept["divergence"]),
                distance=sample.mean(kept["distance"]),
                euclidean=sample.mean(kept["euclidean"]),
                edited=(kept["status"] == Status.SOLVED).double().mean().item(),
                unreached=int((kept["status"] >= Status.INFEASIBLE).sum()),
                **likeness.get(index, {}),
            )
            for index, kept in enumerate(found)
        )
        return TaskDose(
            prompts=n,
            answered=int((clean["own_lead"] > 0).sum()) if clean else None,
            probe_accuracy=mirror.probe.accuracy(test[site], task.test.labels),
            clean=sample.mean(clean["logit_difference"]) if clean else None,
            doses=doses,
            control=control,
            counterfactual=counterfactual,
            interchange=interchange,
        )

    def figures(self, result: DoseResult, /) -> dict[str, Chart]:
        """The dose curves: answers flipped, preference, and size of the edit."""
        return {"dose": dose_of(result)}

    def panels(self, result: DoseResult, /) -> list[Panel]:
        """The dose curves, with a table."""
        measures = dose_measures(result)
        charts = {name: Chart([pane]) for name, pane in dose_panes(result).items()}
        flips = next(iter(measures))
        shares = measures[flips][0] == "flipped"
        if shares:
            charts["flips by size"] = Chart([dose_panes(result, "distance")[flips]])
        rows = [
            ((task_in_words(name) or "–", rule), edit)
            for name, task in result.tasks.items()
            for rule, edit in dosed(task)
        ]
        quantities: dict[str, Reading] = {
            "log α (mean)": "log_alpha",
            **{name: field for name, (field, _) in measures.items()},
            "prompts changed (%)": "edited",
            **known([edit for _, edit in rows], HELD_AGAINST),
        }
        table = table_of(["task", "rule"], rows, quantities)
        shown = {"charts": charts, "choice": "measure", "table": table}
        return [self.panel("dose", result, shown=shown, shares=shares)]


PART = Dose()
