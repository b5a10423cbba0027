"""How much belief it takes to flip an answer: edits at one site over a range of odds.

For each log α of a sweep, the activation at S2 of every held-out prompt is replaced by the nearest
one at which the probe's odds for the other order are at least α (rule ``fixed``), and the answer is
read. Prompts whose odds suffice already stay as they are. The post's rule ``mirror``,
log α = max(z_v − z_k, 10) with true class v and target k, stands beside the sweep, for control
edits (k = v) and counterfactual ones. Probe and metric are fitted to each task's own training
prompts.

Source: the post "Intervening in the Residual Stream" (2023), for the rule and its floor of 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.probes.covariance import Mahalanobis, Shrinkage
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp import Status
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site
from lrqp_torch.study import dose_figures
from lrqp_torch.study.conditions import logit_differences
from lrqp_torch.study.context import Advance, StudyContext, Task, no_progress
from lrqp_torch.study.estimates import bootstrap_mean, wilson
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.panel import Panel
from lrqp_torch.study.running import in_batches

POSITION = "S2"
LOG_ALPHAS = (-10.0, -5.0, 0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)


@dataclass(frozen=True)
class Mean:
    """A mean over held-out prompts.

    Attributes:
        value: the mean.
        lower: lower end of its bootstrap 95 % interval.
        upper: upper end.
    """

    value: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Tensor, generator: torch.Generator) -> Self:
        """The mean of values (n,), and its interval."""
        return cls(values.double().mean().item(), *bootstrap_mean(values, generator))


@dataclass(frozen=True)
class EditSummary:
    """One edit of all held-out prompts.

    Attributes:
        log_alpha: log odds asked for; their mean where they differ between prompts.
        flipped: of the prompts answered IO in the clean run, the share answered S under the edit;
            None if none was answered IO.
        lower: lower end of its Wilson 95 % interval.
        upper: upper end.
        logit_difference: IO − S at END, in logits.
        distance: Mahalanobis length of the edit; 0 for prompts left as they were.
        euclidean: Euclidean length of the edit, in units of the stream.
        edited: share of prompts that had to be changed.
        unreached: prompts left as they were because the solver could not reach the odds.
    """

    log_alpha: float
    flipped: float | None
    lower: float
    upper: float
    logit_difference: Mean
    distance: Mean
    euclidean: Mean
    edited: float
    unreached: int

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        names = ("logit_difference", "distance", "euclidean")
        return cls(**(raw | {name: Mean(**raw[name]) for name in names}))


@dataclass(frozen=True)
class TaskDose:
    """All edits of one task.

    Attributes:
        prompts: held-out prompts.
        answered: those answered IO in the clean run, of which shares flipped are taken.
        probe_accuracy: of the probe at the site, on held-out prompts.
        clean: logit difference without an edit.
        doses: counterfactual edits by rising log α.
        control: the mirror rule towards the true order.
        counterfactual: the mirror rule towards the other order.
    """

    prompts: int
    answered: int
    probe_accuracy: float
    clean: Mean
    doses: list[EditSummary]
    control: EditSummary
    counterfactual: EditSummary

    def half_dose(self) -> float | None:
        """The least log α of the sweep at which half of the answers flip; None if none does."""
        return next((dose.log_alpha for dose in self.doses if (dose.flipped or 0) >= 0.5), None)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        nested = {
            "clean": Mean(**raw["clean"]),
            "doses": [EditSummary.from_json(dose) for dose in raw["doses"]],
            "control": EditSummary.from_json(raw["control"]),
            "counterfactual": EditSummary.from_json(raw["counterfactual"]),
        }
        return cls(**(raw | nested))


@dataclass(frozen=True)
class DoseResult:
    """The dose sweep.

    Attributes:
        site: where the edits act.
        position: at which token.
        floor: least log odds of the mirror rule.
        tasks: task name to its edits, the study's task first.
    """

    site: str
    position: str
    floor: float
    tasks: dict[str, TaskDose]


def from_json(raw: dict[str, Any]) -> DoseResult:
    """Read back what ``dataclasses.asdict`` made of a result."""
    tasks = {name: TaskDose.from_json(task) for name, task in raw["tasks"].items()}
    return DoseResult(**(raw | {"tasks": tasks}))


def work(context: StudyContext, /, *, log_alphas: Sequence[float] = LOG_ALPHAS) -> int:
    """Units that :func:`compute` advances: prompts captured, and prompts run under each edit."""
    edits = len(log_alphas) + 2
    return sum(len(task) + edits * len(task.test) for task in context.tasks)


def compute(
    context: StudyContext,
    site: str,
    *,
    log_alphas: Sequence[float] = LOG_ALPHAS,
    log_odds: float = 10.0,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    advance: Advance = no_progress,
) -> DoseResult:
    """Sweep the odds at one site, in each task.

    Args:
        context: model and prompts.
        site: where to edit, at S2.
        log_alphas: rising log odds of the sweep, in nats.
        log_odds: floor of the mirror rule.
        l2: penalty of the probe; None for its own default.
        shrinkage: of the covariance.
        advance: called with the number of prompts after each batch.

    Raises:
        SettingError: log_alphas are empty or do not rise.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    asked = list(log_alphas)
    if not asked or any(a >= b for a, b in pairwise(asked)):
        raise SettingError(f"log_alphas must be one or more rising numbers, got {asked}")
    tasks = {}
    for task in context.tasks:
        train, test = context.clean(task, POSITION, advance, [site])
        labels = task.train.labels.to(train[site].device)
        probe = LinearProbe.fit(train[site], labels, l2=l2)
        metric = Mahalanobis.fit(train[site], shrinkage)
        # Prompts that cannot be edited are counted instead of ending the study.
        edit = partial(LRQP, probe, metric, on_infeasible="skip")
        mirror = edit(log_odds=log_odds, rule="mirror")
        edits = [(edit(log_odds=odds, rule="fixed"), True) for odds in asked]
        runs = _run(context, task, site, [*edits, (mirror, False), (mirror, True)], advance)
        summaries = [_summarise(context, runs.clean, effects) for effects in runs.edits]
        tasks[task.name] = TaskDose(
            prompts=len(task.test),
            answered=int((runs.clean > 0).sum()),
            probe_accuracy=probe.accuracy(test[site], task.test.labels),
            clean=Mean.of(runs.clean, context.generator()),
            doses=summaries[:-2],
            control=summaries[-2],
            counterfactual=summaries[-1],
        )
    return DoseResult(site, POSITION, log_odds, tasks)


def draw(result: DoseResult, folder: Path) -> list[Path]:
    """Write the dose curves: answers flipped, logit difference, and size of the edit."""
    return dose_figures.draw(result, folder)


def panels(result: DoseResult) -> list[Panel]:
    """The dose curves, with a table."""
    return dose_figures.panels(result)


@dataclass(frozen=True)
class _Runs:
    """Per held-out prompt: the clean logit difference, and a dict of columns for each edit."""

    clean: Tensor
    edits: list[dict[str, Tensor]]


_RECORDED = ("floor", "distance", "euclidean", "status")


@torch.no_grad()
def _run(
    context: StudyContext,
    task: Task,
    site: str,
    edits: Sequence[tuple[LRQP, bool]],
    advance: Advance,
) -> _Runs:
    """Run every edit, each towards the other order where its flag is set and else the true one."""
    data: IOIPrompts = task.test
    clean = torch.zeros(len(data), dtype=torch.float64)
    effects = [
        {name: torch.zeros(len(data), dtype=torch.float64) for name in ("logits", *_RECORDED)}
        for _ in edits
    ]
    # Left padding puts END in the last column, so a later S2 means a shorter suffix.
    order = torch.argsort(data.positions[POSITION].cpu(), stable=True)
    for rows in in_batches(order, context.batch_size):
        batch = data[rows].to(context.device)
        at, labels = batch.positions[POSITION], batch.labels
        replay = Replay(context.model, batch.inputs, int(at.min()))
        clean[rows] = logit_differences(replay.clean_logits, batch)
        for (edit, counterfactual), columns in zip(edits, effects, strict=True):
            target = 1 - labels if counterfactual else labels
            with edit.at(context.model, site, positions=at, target=target, source=labels) as run:
                logits = replay.run(Site.parse(site).layer)
            columns["logits"][rows] = logit_differences(logits, batch)
            for name in _RECORDED:
                columns[name][rows] = getattr(run, name).to("cpu", torch.float64)
            advance(len(batch))
    return _Runs(clean, effects)


def _summarise(context: StudyContext, clean: Tensor, effects: dict[str, Tensor]) -> EditSummary:
    answered = clean > 0
    n, flips = int(answered.sum()), int((effects["logits"][answered] < 0).sum())
    lower, upper = wilson(flips, n)
    return EditSummary(
        log_alpha=effects["floor"].mean().item(),
        flipped=flips / n if n else None,
        lower=lower,
        upper=upper,
        logit_difference=Mean.of(effects["logits"], context.generator()),
        distance=Mean.of(effects["distance"], context.generator()),
        euclidean=Mean.of(effects["euclidean"], context.generator()),
        edited=(effects["status"] == Status.SOLVED).double().mean().item(),
        unreached=int((effects["status"] >= Status.INFEASIBLE).sum()),
    )
