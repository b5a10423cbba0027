"""Where the variable can be read, and where editing it flips the answer: the sweep over sites."""

from dataclasses import dataclass

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.study import flipping, shared_sweep
from lrqp_torch.study.clock import Clock
from lrqp_torch.study.context import Advance, StudyContext, Task
from lrqp_torch.study.flipping import TaskFlipping
from lrqp_torch.study.part import Batches, Given, Part


@dataclass(frozen=True)
class FlippingResult:
    """The sweep of each task.

    Attributes:
        tasks: name to sweep, the study's own task first.
    """

    tasks: dict[str, TaskFlipping]

    @property
    def own(self) -> TaskFlipping:
        """The sweep of the study's own task."""
        return next(iter(self.tasks.values()))


class Flipping(Part[FlippingResult]):
    """Edits at every site, towards the class that holds and the other one."""

    name = "flipping"
    title = "Flipping the answer"
    question = (
        "At each site a probe for the order is fitted to the activations at S2 of the training "
        "prompts. On held-out prompts the activation there is replaced by the nearest one at which "
        "the probe believes the order that is true (control) or the other one (counterfactual), "
        "and the model goes on from there. If the counterfactual edit turns the answer, the model "
        "uses the order at that site; what the probe reads shows only that it could."
    )
    result = FlippingResult
    shared = True

    def work(self, context: StudyContext) -> int:
        """Prompts read to fit on, and runs over held-out prompts."""
        runs = flipping.sweep_runs(len(context.sites))
        return sum(len(task.train) + runs * len(task.test) for task in context.tasks)

    def compute(self, given: Given, advance: Advance) -> FlippingResult:
        """Sweep each task."""
        context = given.context
        found, done = {}, 0
        for task in context.tasks:
            batches = None if given.batches is None else _From(given.batches, done)
            swept, seconds = _sweep(given, task, batches, advance)
            if task is context.task:
                labels = {"labels.abb": task.test.labels.cpu()}
                given.keep_prompts(swept.prompts() | labels)
            found[task.name] = TaskFlipping.of(task.name, swept, seconds)
            done += -(-len(task.test) // context.batch_size)
        return FlippingResult(found)

    def panels(self, result: FlippingResult) -> list:  # type: ignore[type-arg]
        """Made in :mod:`~lrqp_torch.study.run`, of the numbers of each prompt."""
        return []

    def figures(self, result: FlippingResult) -> dict:  # type: ignore[type-arg]
        """As the panels."""
        return {}

    def says(self, result: FlippingResult) -> list[str]:
        """See :mod:`~lrqp_torch.study.summary`."""
        return []


class _From:
    """The batches from a number on."""

    def __init__(self, batches: Batches, start: int) -> None:
        self.batches, self.start = batches, start

    def load(self, index: int) -> dict | None:  # type: ignore[type-arg]
        return self.batches.load(self.start + index)

    def save(self, index: int, tensors) -> None:  # type: ignore[no-untyped-def]
        self.batches.save(self.start + index, tensors)


def _sweep(
    given: Given, task: Task, batches: Batches | None, advance: Advance
) -> tuple[flipping.Sweep, dict[str, float]]:
    clock = Clock()
    context, settings, ranks = given.context, given.settings, given.ranks
    with clock.stage("capture"):
        activations = context.activations(task, "train", "S2", advance=advance, ranks=ranks)
    with clock.stage("fit"):
        labels = task.train.labels.to(context.device)

        def fit(sites: list[str]) -> dict[str, LRQP]:
            return flipping.fit_edits(
                {site: activations[site] for site in sites},
                labels,
                l2=settings.l2,
                shrinkage=settings.shrinkage,
                log_odds=settings.log_odds,
            )

        fitted = ranks.divide(context.sites, fit, context.device)
        edits = {site: fitted[site] for site in context.sites}
    with clock.stage("sweep"):
        swept = shared_sweep.sweep(
            ranks,
            context.model,
            task.test,
            edits,
            batch_size=context.batch_size,
            batches=batches or shared_sweep._Done({}),
            advance=lambda done: advance(done * context.batch_size),
        )
    return swept, {stage: s for stage, s in clock.seconds().items() if stage != "total"}


PART = Flipping()
