"""Learning an edit through the quadratic program and the rest of the model.

A run may keep a checkpoint on disk, so that one that was stopped goes on as if it had not been.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LearningError, quoted
from lrqp_torch.files import (
    digest_model,
    digest_values,
    from_json,
    prepare_folder,
    sole_writer,
    to_json,
    written_whole,
)
from lrqp_torch.learn.objective import (
    Objective,
    Weights,
    Workload,
    counterfactual_wins,
    loss_runs,
    total,
)
from lrqp_torch.learn.parameters import TrainableEdit
from lrqp_torch.learn.prompts import EditPrompts
from lrqp_torch.learn.result import Epoch, Learned
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.stream.inputs import check_inputs, vocabulary_of
from lrqp_torch.stream.progress import Advance, Start, progress_bars
from lrqp_torch.stream.replay import frozen
from lrqp_torch.stream.sites import locate


@dataclass(frozen=True)
class LearnOptions:
    """How an edit is learned.

    Attributes:
        probe: train W and b.
        log_odds: train log α.
        metric: train Σ: its shrinkage, and low-rank factors.
        rank: of the factors; 0 trains the shrinkage alone.
        weights: of the by-effects in the loss.
        epochs: passes through the training prompts, at most.
        batch_size: prompts a step.
        learning_rate: of Adam; each free parameter is in units of its own size.
        patience: epochs without a better validation loss after which to stop.
        seed: of the order of the prompts and the start of the factors.

    Raises:
        LearningError: an option out of its range.
    """

    probe: bool = True
    log_odds: bool = True
    metric: bool = True
    rank: int = 2
    weights: Weights = field(default_factory=Weights)
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 0.02
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 0), ("epochs", 1), ("batch_size", 1), ("patience", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise LearningError(
                    f"{name} must be an integer and at least {least}, got {quoted(value)}"
                )
        rate: Any = self.learning_rate
        if not isinstance(rate, Real) or not 0 < float(rate) < math.inf:
            raise LearningError(f"learning_rate must be a number above 0, got {quoted(rate)}")


def learn(
    model: nn.Module,
    site: str,
    start: LRQP,
    train: EditPrompts,
    *,
    validation: EditPrompts | None = None,
    unrelated: EditPrompts | None = None,
    objective: Objective = counterfactual_wins,
    options: LearnOptions | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Learned:
    """Train an edit so that the model behaves as is wanted, and else as before.

        minimise  objective + w₁ KL elsewhere + w₂ KL under control edits + w₃ KL on unrelated
                  prompts + w₄ mean δᵀ Σ₀⁻¹ δ

    over the probe, log α and the metric (see :class:`.parameters.TrainableEdit`), by Adam. At every
    step the edit is the exact solution of the program with the present numbers, and the gradient
    passes through it by the implicit function theorem. The model is frozen: its weights, modes and
    ``requires_grad`` flags are as before when this returns. Only the layers above the site run, and
    only the tokens from the first edited one on; one backward pass is held in memory at a time.

    Two calls with the same arguments on the same machine give the same numbers bit for bit; so does
    a call that goes on from a folder where another was stopped.

    Args:
        model: a transformers causal language model in evaluation mode.
        site: where to edit, ``Ln.pre``, ``Ln.mid`` or ``Ln.post``.
        start: the edit to begin with; it is not changed.
        train: prompts to learn from.
        validation: prompts by whose loss the best epoch is chosen and the learning stopped; none
            may be among ``train``. Without them the last epoch is taken.
        unrelated: prompts on which the edit should do nothing; a batch of them joins each step.
        objective: on the logits at ``read``, (B, vocabulary), and the batch of prompts.
        options: see :class:`LearnOptions`; default all of its defaults.
        folder: where to keep a checkpoint after each epoch, and to go on from.
        progress: show a progress bar on standard error.

    Raises:
        LearningError: the model is in training mode; validation prompts are among the training
            prompts; control edits are weighted but ``source`` is missing; ``wins`` or ``loses``
            are no tokens of the model; the objective has no
            gradient; the loss is NaN or infinite; the folder is of another run.
        EditNeverFiredError: the edit's positions never ran.
        SiteError, PositionError, WidthError, TargetError, SolverError: as in ``edit.at``.
    """
    options = options or LearnOptions()
    where = locate(model, site).site
    _check(model, train, validation, unrelated, options)
    device = input_device(model)
    edit = TrainableEdit(
        start,
        device,
        probe=options.probe,
        log_odds=options.log_odds,
        metric=options.metric,
        rank=options.rank,
        seed=options.seed,
    )
    keeper = None
    if folder is not None:
        settings = {**asdict(options), "site": site, "objective": _name(objective)}
        # Going on for more epochs, or with more patience, is the same run.
        for name in ("epochs", "patience"):
            settings.pop(name)
        sets = (train, validation, unrelated)
        keeper = Checkpoint(folder, digest_run(model, start.state_dict(), sets, settings))
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(sole_writer(Path(folder)))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        stage = stack.enter_context(progress_bars(enabled=progress))

        def load(prompts: EditPrompts) -> Workload:
            return Workload(model, where, prompts.to(device), options.batch_size)

        state = Trainer(
            edit,
            load(train),
            load(validation) if validation is not None else None,
            load(unrelated) if unrelated is not None else None,
            objective,
            options,
            stage,
        ).run(keeper)
    edit.settle(state.best)
    learned = edit.finish(start.probe.weight.device)
    learned.notes |= {"learned": {"site": site, "epoch": state.best_epoch, **asdict(options)}}
    return Learned(learned, start, tuple(state.history), state.best_epoch)


def _name(objective: Objective) -> str:
    return str(getattr(objective, "__qualname__", type(objective).__qualname__))


def _check(
    model: nn.Module,
    train: EditPrompts,
    validation: EditPrompts | None,
    unrelated: EditPrompts | None,
    options: LearnOptions,
) -> None:
    if any(module.training for module in model.modules()):
        raise LearningError("the model is in training mode; call model.eval() first")
    if options.weights.control > 0:
        for name, prompts in (("train", train), ("validation", validation)):
            if prompts is not None and prompts.source is None:
                raise LearningError(
                    f"{name} has no source, the class that holds now, which control edits write; "
                    f"give it, or set Weights(control=0)"
                )
    for name, prompts in (("train", train), ("validation", validation), ("unrelated", unrelated)):
        if prompts is not None:
            check_inputs(model, prompts.inputs)
            _check_tokens(name, prompts, vocabulary_of(model))
    shared = set(train.texts()) & set(validation.texts()) if validation is not None else set()
    if shared:
        raise LearningError(
            f"{len(shared)} prompts are in both train and validation, so that the validation loss "
            f"would not notice overfitting; take them out of one"
        )


def _check_tokens(name: str, prompts: EditPrompts, vocabulary: int) -> None:
    for token in ("wins", "loses"):
        ids = getattr(prompts, token)
        outside = torch.zeros(0) if ids is None else ((ids < 0) | (ids >= vocabulary)).nonzero()
        if len(outside):
            rows = outside.flatten()[:5].tolist()
            raise LearningError(
                f"{token} of {name} holds {int(ids[rows[0]])} in row {rows[0]} (rows {rows}), but "
                f"the model has tokens 0 to {vocabulary - 1}"
            )


# ---- a run on disk -------------------------------------------------------------------------------


FILE = "learning.safetensors"


@dataclass
class State:
    """Everything that the next epoch depends on."""

    now: dict[str, Tensor]  # free parameters
    best: dict[str, Tensor]  # those of the best epoch
    optimiser: dict[str, Tensor]  # moments of the optimiser, by flat names
    history: list[Epoch]  # epochs so far, 0 included
    best_epoch: int  # which is best


class Checkpoint:
    """One file in a folder, written whole after every epoch.

    Args:
        folder: made if it is missing.
        digest: of everything that a run depends on; a folder with another is refused.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, digest: str) -> None:
        self.path, self.digest = Path(folder) / FILE, digest
        prepare_folder(self.path.parent)

    def save(self, state: State) -> None:
        """Replace the file."""
        tensors = {
            f"{part}.{name}": tensor.detach().cpu().contiguous()
            for part in ("now", "best", "optimiser")
            for name, tensor in getattr(state, part).items()
        }
        facts = {
            "digest": self.digest,
            "best_epoch": str(state.best_epoch),
            "history": to_json([asdict(epoch) for epoch in state.history]),
        }
        with written_whole(self.path) as partial:
            partial.write_bytes(safetensors.torch.save(tensors, facts))

    def load(self, like: Mapping[str, Tensor]) -> State | None:
        """The state that was saved, or None if there is none.

        Args:
            like: the free parameters, whose shapes, dtype and device it must have.

        Raises:
            LearningError: the file is damaged, or of another run.
        """
        if not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found, best_epoch = facts["digest"], int(facts["best_epoch"])
            epochs = from_json(facts["history"], "its history", LearningError)
            history = [Epoch(**epoch) for epoch in epochs]
            if [epoch.index for epoch in history] != list(range(len(history))):
                raise ValueError("its epochs are not in order")
            if best_epoch not in range(len(history)):
                raise ValueError(f"it has no epoch {best_epoch}")
            parts = _by_part(tensors, like)
        except (SafetensorError, LearningError, KeyError, TypeError, ValueError) as error:
            raise LearningError(
                f"{self.path} cannot be read ({error}); delete it, or give another folder"
            ) from error
        if found != self.digest:
            raise LearningError(
                f"{self.path} is of another run: model, edit, prompts or options differ. Delete "
                f"it, or give another folder"
            )
        return State(parts["now"], parts["best"], parts["optimiser"], history, best_epoch)


def _by_part(
    tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Parameters now and at best, and the optimiser's moments of them, each by name.

    Raises:
        KeyError: a parameter that is missing.
        ValueError: another shape or dtype, or numbers that are not finite.
    """
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimiser": {}}
    for key, tensor in tensors.items():
        part, name = key.split(".", 1)
        owner = like[name.rpartition(".")[0] if part == "optimiser" else name]
        right = name.endswith(".step") or (tensor.shape, tensor.dtype) == (owner.shape, owner.dtype)
        if not right or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, or not finite")
        parts[part][name] = tensor if name.endswith(".step") else tensor.to(owner)
    if not parts["now"].keys() == parts["best"].keys() == like.keys():
        raise KeyError(f"parameters {sorted(like)}")
    return parts


def digest_run(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prompts: Sequence[EditPrompts | None],
    settings: Mapping[str, Any],
) -> str:
    """A digest of what a learning run depends on."""
    values: dict[str, Any] = {**tensors, "model": digest_model(model)}
    values["settings"] = json.dumps(settings, sort_keys=True, default=str)
    for place, item in enumerate(prompts):
        for name, value in vars(item).items() if item is not None else ():
            parts = value.items() if isinstance(value, Mapping) else [("", value)]
            values |= {f"prompts.{place}.{name}.{key}": part for key, part in parts}
    return digest_values(values)


# ---- the loop ------------------------------------------------------------------------------------


class Trainer:
    """Adam on the free parameters of an edit.

    Args:
        edit: what is trained.
        train: the prompts to learn from.
        validation: those that choose the best epoch, or None.
        unrelated: those on which the edit should do nothing, or None.
        objective: see :func:`learn`.
        options: see :class:`LearnOptions`.
        stage: opens a progress bar.
    """

    def __init__(
        self,
        edit: TrainableEdit,
        train: Workload,
        validation: Workload | None,
        unrelated: Workload | None,
        objective: Objective,
        options: LearnOptions,
        stage: Start,
    ) -> None:
        self.edit, self.objective, self.options, self.stage = edit, objective, options, stage
        self.train, self.validation, self.unrelated = train, validation, unrelated
        self.optimiser = torch.optim.Adam(list(edit.free.values()), lr=options.learning_rate)
        self.has_gradient = False

    def run(self, keeper: Checkpoint | None) -> State:
        """Train from the start, or from where the checkpoint stopped, and return the last state.

        Raises:
            LearningError: see :func:`learn`.
        """
        state = keeper.load(self.edit.snapshot()) if keeper is not None else None
        if state is None:
            first = Epoch(0, {}, self._validate())
            state = State(self.edit.snapshot(), self.edit.snapshot(), {}, [first], 0)
        else:
            self.edit.settle(state.now)
            self._restore(state.optimiser)
        steps = math.ceil(len(self.train) / self.options.batch_size)
        advance = self.stage("learning", self.options.epochs * steps)
        advance(state.history[-1].index * steps)
        while not self._finished(state):
            index = state.history[-1].index + 1
            terms = self._epoch(index, advance)
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

    def _epoch(self, index: int, advance: Advance) -> dict[str, float]:
        # Seeded by the epoch, so that a run which goes on draws what it would have drawn.
        generator = torch.Generator().manual_seed(1_000_003 * self.options.seed + index)
        size, seen = self.options.batch_size, []
        batches = _shuffled(len(self.train), size, generator)
        others = None if self.unrelated is None else _cycled(len(self.unrelated), size, generator)
        for step, rows in enumerate(batches):
            self.optimiser.zero_grad(set_to_none=True)
            found: dict[str, float] = {}
            unrelated = None
            if self.unrelated is not None and others is not None:
                unrelated = self.unrelated, next(others)
            for terms in self._runs(self.train, rows, unrelated):
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
            seen.append((found, len(rows)))
            advance(1)
        if not self.has_gradient:
            raise LearningError(
                f"the gradient of the objective is 0 on all {len(self.train)} prompts, so there "
                f"is nothing to follow: the probe reads the target with the odds asked for already "
                f"(no activation was edited), or `read` lies before the edited token"
            )
        return _means(seen, self.options.weights)

    def _runs(
        self, prompts: Workload, rows: Tensor, unrelated: tuple[Workload, Tensor] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        weights = self.options.weights
        return loss_runs(self.edit, prompts, rows, self.objective, weights, unrelated)

    def _reaches(self, objective: Tensor) -> bool:
        """Whether the objective's gradient reaches any free parameter."""
        if not objective.requires_grad:
            raise LearningError(
                "the objective does not depend on the edit: it has no gradient. Compute it from "
                "the logits that it is given, in torch, without detach or item, and outside of "
                "torch.inference_mode"
            )
        free = list(self.edit.free.values())
        gradients = torch.autograd.grad(objective, free, retain_graph=True, allow_unused=True)
        return any(g is not None and bool((g != 0).any()) for g in gradients)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        seen = []
        for rows in torch.arange(len(self.validation)).split(self.options.batch_size):
            found: dict[str, float] = {}
            for terms in self._runs(self.validation, rows):
                found |= {name: float(term) for name, term in terms.items()}
            seen.append((found, len(rows)))
        means = _means(seen, self.options.weights)
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


def _means(seen: list[tuple[dict[str, float], int]], weights: Weights) -> dict[str, float]:
    """Means of terms over batches of different sizes, and their weighted sum as ``loss``."""
    sums: dict[str, float] = {}
    for terms, size in seen:
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + size * value
    means = {name: value / sum(size for _, size in seen) for name, value in sums.items()}
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in means.items()}
    return {**means, "loss": float(total(tensors, weights))}


def _shuffled(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.randperm(n, generator=generator).split(size)
    return parts


def _cycled(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from _shuffled(n, size, generator)
