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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.plot.chart import Chart, Marks, Pane, Panel, Rule
from lrqp_torch.qp import Status
from lrqp_torch.study.ceiling import Interchange, Likeness, interchange_of, likenesses
from lrqp_torch.study.context import Advance, StudyContext, Task
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import Words
from lrqp_torch.study.running import Twinned, answers, batches, divergences, put
from lrqp_torch.study.showing import (
    capitalised,
    grouped,
    headed,
    held_against,
    joined,
    look,
    marks_of,
    share_in_words,
    signed,
    table_of,
    task_in_words,
)
from lrqp_torch.study.sweep import fit_edits

SWEEP, FLIPPED = "sweep", "answers flipped (%)"
LOOKS: dict[str, dict[str, Any]] = {
    SWEEP: {},
    "mirror rule": {"kind": "points", "marker": "star", "size": 1.6},
    "mirror rule, control": {"kind": "points", "marker": "triangle", "filled": False, "size": 1.3},
}
"""How the edits of each rule are drawn."""

LOG_ALPHAS = (-10.0, -5.0, 0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)


@dataclass(frozen=True)
class EditSummary(Likeness):
    """One edit of all held-out prompts.

    Attributes:
        log_alpha: log odds asked for; their mean where they differ between prompts.
        flipped: of the prompts that the clean model answers with the class that holds, the share
            answered with the target under the edit; None for a task without answers.
        preference: mean score of the class that holds minus that of the next class; None likewise.
        divergence: mean KL(clean ‖ edited) of the next token, in nats.
        distance: mean Mahalanobis length of the edit; 0 for prompts left as they were.
        euclidean: mean Euclidean length of the edit, in units of the stream.
        edited: share of prompts that had to be changed.
        unreached: prompts left as they were because the solver could not reach the odds.
    """

    log_alpha: float
    flipped: Estimate | None
    preference: Estimate | None
    divergence: Estimate
    distance: Estimate
    euclidean: Estimate
    edited: float
    unreached: int


@dataclass(frozen=True)
class TaskDose:
    """All edits of one version of the task.

    Attributes:
        prompts: held-out prompts.
        answered: those that the clean model answers with the class that holds, of which shares
            flipped are taken; None for a task without answers.
        probe_accuracy: of the probe at the site, on held-out prompts.
        clean: mean preference without an edit; None for a task without answers.
        doses: counterfactual edits by rising log α.
        control: the mirror rule towards the class that holds.
        counterfactual: the mirror rule towards the next class.
        interchange: the ceiling of the counterfactual edits; None where no prompt has a twin.
    """

    prompts: int
    answered: int | None
    probe_accuracy: float
    clean: Estimate | None
    doses: list[EditSummary]
    control: EditSummary
    counterfactual: EditSummary
    interchange: Interchange | None = None

    @property
    def edits(self) -> list[tuple[str, EditSummary]]:
        """Every edit with the name of its rule, one of :data:`LOOKS`."""
        mirror, control = list(LOOKS)[1:]
        sweep = [(SWEEP, dose) for dose in self.doses]
        return [*sweep, (mirror, self.counterfactual), (control, self.control)]

    def half_dose(self) -> float | None:
        """The least log α of the sweep at which half of the answers flip; None if none does."""
        shares = ((d.log_alpha, d.flipped.value if d.flipped else None) for d in self.doses)
        return next((log_alpha for log_alpha, share in shares if (share or 0) >= 0.5), None)


@dataclass(frozen=True)
class DoseResult:
    """The dose sweep.

    Attributes:
        words: what the things of the task are called.
        site: where the edits act.
        floor: least log odds of the mirror rule.
        tasks: task name to its edits, the study's task first.
    """

    words: Words
    site: str
    floor: float
    tasks: dict[str, TaskDose]


class Dose(Part[DoseResult]):
    """Edits of rising odds at the best site.

    Args:
        log_alphas: rising log odds of the sweep, in nats.

    Raises:
        SettingError: log_alphas are empty or do not rise.
    """

    name = "dose"
    title = "How much belief it takes"
    question = (
        "An edit can ask its probe for any odds. From which odds on does the answer turn, and does "
        "asking for more change more?"
    )
    result = DoseResult
    needs = ("flipping",)
    prompts = "reporting"

    def __init__(self, log_alphas: Sequence[float] = LOG_ALPHAS) -> None:
        self.log_alphas = list(log_alphas)
        if not self.log_alphas or any(a >= b for a, b in pairwise(self.log_alphas)):
            raise SettingError(
                f"log_alphas must be one or more rising numbers, got {self.log_alphas}"
            )

    def work(self, context: StudyContext, /) -> int:
        """Prompts captured, and prompts run under each edit."""
        edits = len(self.log_alphas) + 2
        return sum(len(task) + edits * len(task.test) for task in context.tasks)

    def compute(self, given: Given, advance: Advance, /) -> DoseResult:
        """Sweep the odds at one site, in each version of the task.

        Raises:
            NonFiniteError: the model's logits are NaN or infinite.
        """
        tasks = {task.name: self._task(given, task, advance) for task in given.context.tasks}
        words = given.context.task.test.words
        return DoseResult(words, given.site, given.settings.log_odds, tasks)

    @torch.no_grad()
    def _task(self, given: Given, task: Task, advance: Advance) -> TaskDose:
        context, settings, site = given.context, given.settings, given.site
        train, test = context.clean(task, "mark", advance, [site])
        mirror = fit_edits(
            train,
            task.train.labels.to(train[site].device),
            l2=settings.l2,
            shrinkage=settings.shrinkage,
            log_odds=settings.log_odds,
        )[site]
        probe = mirror.probe
        # Prompts that cannot be edited are counted instead of ending the study.
        fixed = partial(LRQP, probe, mirror.metric, rule="fixed", on_infeasible="skip")
        edits = [(fixed(log_odds=odds), "counterfactual") for odds in self.log_alphas]
        edits += [(mirror, "control"), (mirror, "counterfactual")]
        twinned = Twinned.of(context, task, site, mirror.metric.distance)
        clean: dict[str, Tensor] = {}
        patch: dict[str, Tensor] = {}
        found: list[dict[str, Tensor]] = [{} for _ in edits]
        n = len(task.test)
        for batch in batches(context.model, task.test, context.batch_size):
            put(clean, answers(batch.prompts, batch.clean, batch.clean_rest), batch.rows, n)
            if twinned is not None:
                put_there = twinned.under(batch)
                here = answers(batch.prompts, put_there.logits, put_there.rest)
                here["divergence"] = divergences(batch.clean, put_there.logits)
                put(patch, here, batch.rows, n)
            for (one, condition), columns in zip(edits, found, strict=True):
                target = {condition: batch.targets()[condition]}
                edited = batch.edited(site, one, target)[condition]
                here = edited.record | answers(batch.prompts, edited.logits, edited.rest)
                here["divergence"] = divergences(batch.clean, edited.logits)
                if twinned is not None:
                    away = divergences(put_there.logits, edited.logits)
                    here["kl_to_interchange"] = away
                put(columns, here, batch.rows, n)
                advance(len(batch))
        right = clean["own_lead"] > 0 if clean else None

        groups = task.test.groups
        among = None if right is None or groups is None else groups.cpu()[right]
        likeness: dict[int, dict[str, Any]] = {}
        interchange = None
        if twinned is not None:
            how = (twinned.known, context.seed, groups)
            patch["distance"] = twinned.distance
            # A control edit is not to do what the interchange does.
            own = {i: (c, patch) for i, c in enumerate(found) if edits[i][1] != "control"}
            likeness = likenesses(clean, own, *how)
            interchange = interchange_of(clean, patch, *how)

        def mean(values: Tensor) -> Estimate:
            return Estimate.mean(values, context.generator(), groups)

        *doses, control, counterfactual = (
            EditSummary(
                log_alpha=columns["floor"].mean().item(),
                flipped=None
                if right is None
                else Estimate.share(columns["other_lead"][right] > 0, among),
                preference=None if right is None else mean(columns["preference"]),
                divergence=mean(columns["divergence"]),
                distance=mean(columns["distance"]),
                euclidean=mean(columns["euclidean"]),
                edited=(columns["status"] == Status.SOLVED).double().mean().item(),
                unreached=int((columns["status"] >= Status.INFEASIBLE).sum()),
                **likeness.get(index, {}),
            )
            for index, columns in enumerate(found)
        )
        return TaskDose(
            prompts=n,
            answered=None if right is None else int(right.sum()),
            probe_accuracy=probe.accuracy(test[site], task.test.labels),
            clean=mean(clean["preference"]) if clean else None,
            doses=doses,
            control=control,
            counterfactual=counterfactual,
            interchange=interchange,
        )

    def says(self, result: DoseResult, /) -> list[str]:
        """From which odds on answers flip, and what the mirror rule does."""
        return [_finding(result, name) for name in result.tasks]

    def figures(self, result: DoseResult, /) -> dict[str, Chart]:
        """The dose curves: answers flipped, preference, and size of the edit."""
        panes = [_pane(result, *measure) for measure in _measures(result).values()]
        shown = panes[:2] + panes[-2:] if len(panes) > 3 else panes
        where = f"edits at {result.site}, {result.words.position}"
        title = f"How much belief it takes to flip an answer: {where}"
        return {"dose": Chart(shown, title, columns=2, share_x=True)}

    def panels(self, result: DoseResult, /) -> list[Panel]:
        """The dose curves, with a table."""
        words, measures = result.words, _measures(result)
        charts = {key: Chart([_pane(result, *measure)]) for key, measure in measures.items()}
        shares = ""
        if FLIPPED in measures:
            pane = _pane(result, *measures[FLIPPED], against="distance")
            charts["flips by size"] = Chart([pane])
            shares = (
                f" Shares are of the prompts answered {words.held} without an edit, with Wilson "
                "95 % intervals."
            )
        every = [
            (task_in_words(name) or "–", rule, edit)
            for name, task in result.tasks.items()
            for rule, edit in task.edits
        ]
        return [
            Panel(
                name="dose",
                title=f"How much belief it takes: odds against answers at {result.site}",
                text=f"Each point of a curve is a counterfactual edit at {words.position} after "
                f"which the probe's odds for the other {words.value} are at least α on every "
                "held-out prompt; prompts whose odds suffice already stay as they are. Stars are "
                f"the mirror rule towards the other {words.value}, at its mean log α, and open "
                f"triangles the same towards the true {words.value}.{shares} Means have bootstrap "
                "95 % intervals.",
                charts=charts,
                choice="measure",
                table=table_of(
                    {
                        "task": [task for task, _, _ in every],
                        "rule": [rule for _, rule, _ in every],
                        "log α (mean)": [edit.log_alpha for *_, edit in every],
                        **{
                            key: [getattr(edit, field) for *_, edit in every]
                            for key, (field, _) in measures.items()
                        },
                        "prompts changed (%)": [edit.edited for *_, edit in every],
                        **held_against([edit for *_, edit in every]),
                    }
                ),
            )
        ]


def _measures(result: DoseResult) -> dict[str, tuple[str, str]]:
    """What is drawn, by its name: the field of :class:`EditSummary`, and the title of the axis."""
    words = result.words
    measures = {
        FLIPPED: ("flipped", FLIPPED),
        words.preference: ("preference", f"mean {words.preference} at {words.end} ({words.unit})"),
        "change of the next token": ("divergence", "mean KL from the clean run (nats)"),
        "Mahalanobis size": ("distance", "mean Mahalanobis length of the edit"),
        "Euclidean size": ("euclidean", "mean Euclidean length (units of the stream)"),
    }
    if any(task.answered is not None for task in result.tasks.values()):
        return measures
    return dict(list(measures.items())[2:])


def _finding(result: DoseResult, name: str) -> str:
    task, words = result.tasks[name], result.words
    start, mirror, control = f"at {result.site}, ", task.counterfactual, task.control
    asked = (
        f"the mirror rule, which asks for log α = {mirror.log_alpha:z.1f} on average, "
        f"edits by a mean Mahalanobis length of {mirror.distance.known:.2f}"
    )
    if mirror.flipped is None or mirror.preference is None or task.clean is None:
        change = f"{mirror.divergence.known:.2f} nats of the next token (KL) towards the other"
        said = f"{asked} and moves {change} {words.value}, {control.divergence.known:.2f} towards"
        return headed(name, f"{start}{said} the true one.")
    if not task.answered:
        said = f"the model answers no held-out prompt with {words.held}, so no answer can flip."
        return headed(name, start + said)
    half, last = task.half_dose(), task.doses[-1]
    reached = (
        "no dose of the sweep flips half of the answers"
        if half is None
        else f"half of the answers flip from log α = {half:g} on"
    )
    flips = [share_in_words(edit.flipped) for edit in (last, mirror, control) if edit.flipped]
    unreached = sum(edit.unreached for _, edit in task.edits)
    ceiling = ""
    if task.interchange is not None and task.interchange.flipped is not None:
        ceiling = (
            f" The ceiling, a twin's activation, flips {share_in_words(task.interchange.flipped)}"
        )
        past = [f"{dose.log_alpha:g}" for dose in task.doses if dose.beyond]
        ceiling += f"; beyond their own patch go log α = {', '.join(past)}." if past else "."
    return headed(
        name,
        f"{start}{reached}; at log α = {last.log_alpha:g}, {flips[0]} of {task.answered} do. "
        f"{capitalised(asked)}; it flips {flips[1]} towards the other {words.value} (mean "
        f"{words.preference} {signed(task.clean.known)} before, "
        f"{signed(mirror.preference.known)} after), and {flips[2]} towards the true one."
        + ceiling
        + (f" {unreached} edits could not be solved." if unreached else ""),
    )


def _pane(result: DoseResult, field: str, title: str, against: str = "log_alpha") -> Pane:
    """A measure of the edits against their log α or their size, by version of the task."""
    marks: list[Marks] = []
    rules = [] if field == "flipped" else [Rule(0.0, dash="solid")]
    for index, (name, task) in enumerate(result.tasks.items()):
        words, style = task_in_words(name), look(index)
        for rule, edits in grouped(task.edits, lambda item: item[0]).items():
            x = [getattr(edit, against) for _, edit in edits]
            places = [item.known if isinstance(item, Estimate) else item for item in x]
            values = [getattr(edit, field) for _, edit in edits]
            label = joined("" if rule == SWEEP and words else rule, words)
            scale = 100 if field == "flipped" else 1
            marks.append(marks_of(label, places, values, scale=scale, **style | LOOKS[rule]))
        if field == "preference" and task.clean is not None:
            rules.append(Rule(task.clean.known, colour=style["colour"]))
        names = {"flipped": "flipped", "preference": "logit_difference"}
        ceiling = getattr(task.interchange, names.get(field, ""), None)
        if ceiling is not None and ceiling.value is not None:
            label = joined("interchange", words)
            at = 100 * ceiling.value if field == "flipped" else ceiling.value
            rules.append(Rule(at, name=label, colour=style["colour"], dash="dash"))
    return Pane(
        marks,
        rules=rules,
        x_title=f"log α: least log odds of the other {result.words.value} (nats)"
        if against == "log_alpha"
        else "mean Mahalanobis length of the edit",
        y_title=title,
        y_range=(-4.0, 104.0) if field == "flipped" else None,
    )


PART = Dose()
