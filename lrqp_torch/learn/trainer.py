"""The training loop: minibatches, early stopping, and the checks that a step makes sense."""

import math
from collections.abc import Iterator

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from lrqp_torch.errors import LearningError
from lrqp_torch.learn.checkpoint import Checkpoint, State
from lrqp_torch.learn.objective import Objective, Weights, Workload, loss_runs, total
from lrqp_torch.learn.options import LearnOptions
from lrqp_torch.learn.parameters import TrainableEdit
from lrqp_torch.learn.result import Epoch


class Trainer:
    """Adam on the free parameters of an edit.

    Args:
        edit: what is trained.
        train: the prompts to learn from.
        validation: those that choose the best epoch, or None.
        unrelated: those on which the edit should do nothing, or None.
        objective: see :func:`~.loop.learn`.
        options: see :class:`~.options.LearnOptions`.
        bars: where progress is shown.
    """

    def __init__(
        self,
        edit: TrainableEdit,
        train: Workload,
        validation: Workload | None,
        unrelated: Workload | None,
        objective: Objective,
        options: LearnOptions,
        bars: Progress,
    ) -> None:
        self.edit, self.objective, self.options, self.bars = edit, objective, options, bars
        self.train, self.validation, self.unrelated = train, validation, unrelated
        self.optimiser = torch.optim.Adam(list(edit.free.values()), lr=options.learning_rate)
        self.has_gradient = False

    def run(self, keeper: Checkpoint | None) -> State:
        """Train from the start, or from where the checkpoint stopped, and return the last state.

        Raises:
            LearningError: see :func:`~.loop.learn`.
        """
        state = keeper.load(self.train.prompts.read.device) if keeper is not None else None
        if state is None:
            first = Epoch(0, {}, self._validate())
            state = State(self.edit.snapshot(), self.edit.snapshot(), {}, [first], 0)
        else:
            self.edit.settle(state.now)
            self._restore(state.optimiser)
        steps = math.ceil(len(self.train) / self.options.batch_size)
        bar = self.bars.add_task("learning", total=self.options.epochs * steps)
        self.bars.update(bar, completed=state.history[-1].index * steps)
        while not self._finished(state):
            index = state.history[-1].index + 1
            terms = self._epoch(index, bar)
            state.history.append(Epoch(index, terms, self._validate()))
            state.now = self.edit.snapshot()
            if self._better(state):
                state.best, state.best_epoch = self.edit.snapshot(), index
            if keeper is not None:
                state.optimiser = self._moments()
                keeper.save(state)
        return state

    def _finished(self, state: State) -> bool:
        last = state.history[-1].index
        waited = self.validation is not None and last - state.best_epoch >= self.options.patience
        return last >= self.options.epochs or waited

    def _better(self, state: State) -> bool:
        if self.validation is None:
            return True
        best = next(e for e in state.history if e.index == state.best_epoch)
        return state.history[-1].validation["loss"] < best.validation["loss"]

    def _epoch(self, index: int, bar: TaskID) -> dict[str, float]:
        # Seeded by the epoch, so that a run which goes on draws what it would have drawn.
        generator = torch.Generator().manual_seed(1_000_003 * self.options.seed + index)
        sums = _Means()
        batches = list(_shuffled(len(self.train), self.options.batch_size, generator))
        others = (
            _cycled(len(self.unrelated), self.options.batch_size, generator)
            if self.unrelated is not None
            else None
        )
        for step, rows in enumerate(batches):
            self.optimiser.zero_grad(set_to_none=True)
            found: dict[str, float] = {}
            for terms in self._terms(rows, next(others) if others is not None else None):
                loss = total(terms, self.options.weights)
                found |= {name: float(term.detach()) for name, term in terms.items()}
                if not math.isfinite(float(loss.detach())):
                    raise LearningError(
                        f"the loss is {float(loss.detach())} in epoch {index}, step {step}: "
                        f"{found}. Lower learning_rate, try the model in float32, or look for a "
                        f"division by zero in your objective"
                    )
                if "objective" in terms and not self.has_gradient:
                    self.has_gradient = self._reaches(terms["objective"])
                if loss.requires_grad:
                    loss.backward()
            self.optimiser.step()
            sums.add(found, len(rows))
            self.bars.advance(bar)
        if not self.has_gradient:
            raise LearningError(
                f"the gradient of the objective is 0 on all {len(self.train)} prompts, so there "
                f"is nothing to follow: the probe reads the target with the odds asked for already "
                f"(no activation was edited), or `read` lies before the edited token"
            )
        return sums.means(self.options.weights)

    def _terms(self, rows: Tensor, others: Tensor | None) -> Iterator[dict[str, Tensor]]:
        unrelated = None
        if self.unrelated is not None and others is not None:
            unrelated = self.unrelated, others
        return loss_runs(
            self.edit, self.train, rows, self.objective, self.options.weights, unrelated
        )

    def _reaches(self, objective: Tensor) -> bool:
        """Whether the objective's gradient reaches any free parameter."""
        if not objective.requires_grad:
            raise LearningError(
                "the objective does not depend on the edit: it has no gradient. Compute it from "
                "the logits that it is given, in torch, without detach or item"
            )
        free = list(self.edit.free.values())
        gradients = torch.autograd.grad(objective, free, retain_graph=True, allow_unused=True)
        return any(g is not None and bool((g != 0).any()) for g in gradients)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        sums, size = _Means(), self.options.batch_size
        for rows in torch.arange(len(self.validation)).split(size):
            found: dict[str, float] = {}
            for terms in loss_runs(
                self.edit, self.validation, rows, self.objective, self.options.weights
            ):
                found |= {name: float(term) for name, term in terms.items()}
            sums.add(found, len(rows))
        means = sums.means(self.options.weights)
        if not math.isfinite(means["loss"]):
            raise LearningError(f"the loss on the validation prompts is not finite: {means}")
        return means

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimiser.state
        return {
            f"{name}.{key}": value.clone()
            for name, parameter in self.edit.free.items()
            for key, value in state[parameter].items()
        }

    def _restore(self, moments: dict[str, Tensor]) -> None:
        for name, parameter in self.edit.free.items():
            self.optimiser.state[parameter] = {
                key.removeprefix(f"{name}."): value
                for key, value in moments.items()
                if key.startswith(f"{name}.")
            }


class _Means:
    """Means of terms over batches of different sizes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, terms: dict[str, float], size: int) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + size * value
        self.count += size

    def means(self, weights: Weights) -> dict[str, float]:
        """The means, and their weighted sum as ``loss``."""
        means = {name: value / self.count for name, value in self.sums.items()}
        tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in means.items()}
        return {**means, "loss": float(total(tensors, weights))}


def _shuffled(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(n, generator=generator).split(size)


def _cycled(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from _shuffled(n, size, generator)
