"""Learning an edit through the quadratic program and the rest of the model."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LearningError
from lrqp_torch.learn.checkpoint import Checkpoint, digest_run
from lrqp_torch.learn.objective import Objective, Workload, counterfactual_wins
from lrqp_torch.learn.options import LearnOptions
from lrqp_torch.learn.parameters import TrainableEdit
from lrqp_torch.learn.prompts import EditPrompts
from lrqp_torch.learn.result import Learned
from lrqp_torch.learn.trainer import Trainer
from lrqp_torch.stream.inputs import check_inputs, input_device, vocabulary_of
from lrqp_torch.stream.replay import frozen
from lrqp_torch.stream.sites import locate


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
        options: see :class:`.options.LearnOptions`; default all of its defaults.
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
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        bars = stack.enter_context(
            Progress(console=Console(stderr=True), transient=True, disable=not progress)
        )

        def load(prompts: EditPrompts) -> Workload:
            return Workload(model, where, prompts.to(device), options.batch_size)

        state = Trainer(
            edit,
            load(train),
            load(validation) if validation is not None else None,
            load(unrelated) if unrelated is not None else None,
            objective,
            options,
            bars,
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
