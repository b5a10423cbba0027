"""What a learned edit is trained for: the answer that is wanted, and nothing else changed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lrqp_torch.errors import LearningError
from lrqp_torch.learn.parameters import Applied, TrainableEdit
from lrqp_torch.learn.prompts import EditPrompts
from lrqp_torch.stream.intervene import EditContext, Intervention, intervene
from lrqp_torch.stream.replay import Tail
from lrqp_torch.stream.sites import Site

Objective = Callable[[Tensor, EditPrompts], Tensor]
"""Logits at ``read``, (B, vocabulary), and the batch's prompts → a number to minimise."""


def counterfactual_wins(logits: Tensor, prompts: EditPrompts) -> Tensor:
    """Mean of softplus(z_loses − z_wins) at the column where the answer is read, in nats.

    The negative log likelihood of ``wins`` against ``loses`` alone.

    Raises:
        LearningError: the prompts do not say which token should win.
    """
    return nn.functional.softplus(-answer_difference(logits, prompts)).mean()


def answer_difference(logits: Tensor, prompts: EditPrompts) -> Tensor:
    """z_wins − z_loses, (B,), in float64: positive where the answer is the wanted one.

    Raises:
        LearningError: the prompts do not say which token should win.
    """
    if prompts.wins is None or prompts.loses is None:
        raise LearningError(
            "the prompts do not say which token should win; give wins and loses, or your own "
            "objective"
        )
    rows = torch.arange(len(logits), device=logits.device)
    wide = logits.double()
    return wide[rows, prompts.wins] - wide[rows, prompts.loses]


@dataclass(frozen=True)
class Weights:
    """What one nat of each by-effect costs, against one of the objective.

    Attributes:
        elsewhere: KL(clean ‖ edited) of the next-token distribution, mean over the columns of
            ``EditPrompts.kept``.
        control: the same under control edits, which write the class that holds already, at
            ``read`` and at those columns.
        unrelated: the same on unrelated prompts, at their ``kept`` columns and ``read``.
        size: mean squared Mahalanobis length of the edits, in the metric that the learning began
            with, so that a longer ruler does not make them shorter.

    Raises:
        LearningError: a weight that is negative or not finite.
    """

    elsewhere: float = 1.0
    control: float = 1.0
    unrelated: float = 1.0
    size: float = 0.01

    def __post_init__(self) -> None:
        for field in fields(self):
            value = float(getattr(self, field.name))
            if not 0 <= value < float("inf"):
                raise LearningError(f"weight {field.name} must be 0 or more, got {value}")


class Workload:
    """A set of prompts, the clean run of their tails, and the loss of an edit on rows of it.

    Args:
        model: frozen, in evaluation mode.
        site: where the edit acts.
        prompts: on the model's device.
        batch_size: prompts in each clean forward pass.
    """

    def __init__(self, model: nn.Module, site: Site, prompts: EditPrompts, batch_size: int) -> None:
        self.model, self.site, self.prompts = model, str(site), prompts
        self.tail = Tail(
            model, prompts.inputs, site.layer, prompts.first_position, batch_size=batch_size
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def edited(
        self, edit: TrainableEdit, rows: Tensor, *, control: bool = False, everywhere: bool = True
    ) -> "Outcome":
        """Run the edit on some rows, and read the logits that the loss needs.

        Args:
            edit: what to apply.
            rows: LongTensor (B,).
            control: write the class that holds already.
            everywhere: read all ``kept`` columns too, not only ``read``.
        """
        prompts = self.prompts[rows]
        columns = self._columns(prompts, everywhere)
        writing = prompts.control() if control else prompts
        made: list[Applied] = []

        def act(x: Tensor, context: EditContext) -> Tensor:
            made.append(edit.apply(x, writing, context))
            return made[-1].solution.x_new

        with intervene(self.model, Intervention(self.site, prompts.positions, act)):
            logits = self.tail.run(rows, columns)
        return Outcome(logits, columns, prompts, made[-1])

    @torch.no_grad()
    def clean(self, rows: Tensor, *, everywhere: bool = True) -> Tensor:
        """The logits of the same columns without an edit."""
        return self.tail.run(rows, self._columns(self.prompts[rows], everywhere))

    def _columns(self, prompts: EditPrompts, everywhere: bool) -> Tensor:
        wanted = torch.zeros_like(prompts.kept)
        wanted[torch.arange(len(prompts), device=wanted.device), prompts.read] = True
        return (wanted | prompts.kept if everywhere else wanted).any(0).nonzero().flatten()


@dataclass(frozen=True)
class Outcome:
    """Logits of a batch at the columns that the loss reads."""

    logits: Tensor  # (B, k, vocabulary)
    columns: Tensor  # (k,), rising
    prompts: EditPrompts  # the batch
    applied: Applied  # what the edit did

    def at_read(self, logits: Tensor | None = None) -> Tensor:
        """Logits at ``read``, (B, vocabulary), of this run or of another at the same columns."""
        logits = self.logits if logits is None else logits
        column = torch.searchsorted(self.columns, self.prompts.read)
        return logits[torch.arange(len(logits), device=logits.device), column]

    def divergence(self, clean: Tensor, *, read: bool) -> Tensor:
        """Mean KL(clean ‖ edited) over the ``kept`` columns, and ``read`` too if asked; nats."""
        where = self.prompts.kept.clone()
        rows = torch.arange(len(where), device=where.device)
        where[rows, self.prompts.read] = read
        where = where[:, self.columns]
        if not bool(where.any()):
            return self.logits.new_zeros(())
        before, after = (t[where].log_softmax(-1) for t in (clean, self.logits))
        return (before.exp() * (before - after)).sum(-1).mean()


def loss_runs(
    edit: TrainableEdit,
    workload: Workload,
    rows: Tensor,
    objective: Objective,
    weights: Weights,
    unrelated: tuple[Workload, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The terms of the loss on some rows, unweighted, by their names in :class:`Weights`.

    ``objective`` is the one that was given, with weight 1. Terms of weight 0 are left out. They
    come run by run of the model, so that a caller which takes the gradient of each before asking
    for the next never holds the graph of more than one run.
    """
    outcome = workload.edited(edit, rows, everywhere=weights.elsewhere > 0)
    asked = objective(outcome.at_read(), outcome.prompts)
    if not isinstance(asked, Tensor) or asked.ndim != 0:
        raise LearningError("the objective must return one number, as a tensor of no dimension")
    terms = {"objective": asked}
    terms["size"] = outcome.applied.squared.mean()
    clean = workload.clean(rows) if weights.elsewhere > 0 or weights.control > 0 else None
    if weights.elsewhere > 0 and clean is not None:
        terms["elsewhere"] = outcome.divergence(clean, read=False)
    yield terms
    del outcome, terms
    if weights.control > 0 and clean is not None:
        outcome = workload.edited(edit, rows, control=True)
        yield {"control": outcome.divergence(clean, read=True)}
        del outcome
    if unrelated is not None and weights.unrelated > 0:
        others, chosen = unrelated
        outcome = others.edited(edit, chosen)
        yield {"unrelated": outcome.divergence(others.clean(chosen), read=True)}


def total(terms: dict[str, Tensor], weights: Weights) -> Tensor:
    """The weighted sum of some terms of :func:`loss_runs`."""
    weighted = [
        term.double() * (1.0 if name == "objective" else getattr(weights, name))
        for name, term in terms.items()
    ]
    return torch.stack(weighted).sum()
