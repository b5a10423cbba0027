"""Distributed alignment search: the subspace whose interchange changes the behaviour."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Paired
from lrqp_torch.baselines.data import BaselineData, Behaviour
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LearningError, PairError, SettingError, WidthError
from lrqp_torch.stream.intervene import EditContext, Intervention, intervene
from lrqp_torch.stream.replay import frozen


@dataclass(frozen=True)
class DASReport:
    """How a subspace was trained.

    Attributes:
        start_loss: validation loss of the random subspace it started from.
        training_loss: mean loss of each epoch's batches.
        validation_loss: after each epoch.
        best_epoch: whose subspace was kept, counted from 1; 0 is the start.
        seed: of the split, the order and the start.
    """

    start_loss: float
    training_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    best_epoch: int
    seed: int


class DAS(Paired):
    """Interchange within a trained subspace: its coordinates are those of a paired prompt.

        x' = x + R Rᵀ (x_pair − x),   RᵀR = I,   R of d rows and r columns

    R minimises the loss of the edited model on training pairs (the model itself is frozen), for
    example the cross-entropy of the answer that the paired prompt's class implies. What is
    orthogonal to R stays.

    Source: Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and
    Distributed Neural Representations", arXiv 2303.02536. A low loss is no proof that the model
    uses the subspace (Makelov, Lange and Nanda 2023, arXiv 2311.17030).

    Args:
        basis: R, (d, r), orthonormal columns.

    Attributes:
        report: how it was trained, or None.

    Raises:
        WidthError: a basis of another width, or with more columns than rows.
        SettingError: columns that are not orthonormal.
    """

    name: ClassVar[str] = "das"
    title: ClassVar[str] = "DAS"
    basis: Tensor
    report: DASReport | None = None

    def __init__(self, reference: LRQP, basis: Tensor, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0] == self.width:
            raise WidthError(
                f"a basis must be ({self.width}, r) with 1 ≤ r ≤ {self.width}, got "
                f"{tuple(basis.shape)}"
            )
        basis = basis.detach().double()
        error = basis.T @ basis - torch.eye(basis.shape[1]).to(basis)
        if not float(error.abs().max()) < 1e-5:
            raise SettingError("the columns of the basis are not orthonormal; take torch.linalg.qr")
        self.register_buffer("basis", basis)

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        behaviour: Behaviour,
        paired: Tensor,
        *,
        reference: LRQP,
        strength: float = 1.0,
        **training: Any,
    ) -> Self:
        """Train R through the frozen model; ``training`` and errors as :func:`train_subspace`."""
        basis, report = train_subspace(behaviour, paired, **training)
        result = cls(reference, basis, strength=strength)
        result.report = report
        return result

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`.

        Raises:
            PairError: the data have no paired activations or no model to train through.
        """
        if data.paired is None or data.behaviour is None:
            raise PairError(
                "DAS is trained on pairs through the model: give BaselineData both paired "
                "activations and a Behaviour"
            )
        return cls.fit(data.behaviour, data.paired, reference=data.reference, seed=data.seed)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return interchange(x, self.partners(x, context), self.basis)


class DASLeast(DAS):
    """What DAS reads of a paired prompt, written by the least edit.

        x' = x + Σ R (Rᵀ Σ R)⁻¹ Rᵀ (x_pair − x)

    the nearest activation, in Mahalanobis distance, of which R reads what it reads of the pair:
    R Rᵀ (x_pair − x) is the nearest in Euclidean distance. It moves where activations vary, and so
    not along directions that R has found and that no activation takes.

    Args:
        basis: R of a trained :class:`DAS`.

    Raises:
        SettingError: the metric has no length along a direction of R.
    """

    name: ClassVar[str] = "das_least"
    title: ClassVar[str] = "DAS's reading, least edit"
    gain: Tensor

    def __init__(self, reference: LRQP, basis: Tensor, *, strength: float = 1.0) -> None:
        super().__init__(reference, basis, strength=strength)
        moved = reference.metric.covariance.to(self.basis) @ self.basis
        factor, failed = torch.linalg.cholesky_ex(self.basis.T @ moved)
        if int(failed):
            raise SettingError(
                "the metric has no length along a direction of the subspace; shrink the covariance"
            )
        self.register_buffer("gain", torch.cholesky_solve(moved.T, factor).T)

    @classmethod
    def of(cls, das: DAS) -> Self:
        """The least edit of a subspace that was trained."""
        result = cls(das.reference, das.basis, strength=das.strength)
        result.report = das.report
        return result

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        missing = self.partners(x, context) - x.double()
        return x.double() + (missing @ self.basis) @ self.gain.T


def train_subspace(
    behaviour: Behaviour,
    paired: Tensor,
    *,
    rank: int = 1,
    epochs: int = 20,
    learning_rate: float = 0.03,
    validation: float = 0.2,
    patience: int = 3,
    seed: int = 0,
) -> tuple[Tensor, DASReport]:
    """The orthonormal basis R, (d, r) float64, that minimises the edited model's mean loss.

    R is the Q of a free matrix's QR decomposition and is moved by Adam. Since the model's
    parameters need no gradient, the backward pass goes through the layers above the site only.

    Args:
        behaviour: model, prompts and loss.
        paired: activation of each prompt's pair, (n, d).
        rank: r.
        epochs: passes over the training prompts, at most.
        learning_rate: Adam's; the free matrix has entries of size 1.
        validation: share of the prompts held out to decide when to stop and what to keep.
        patience: epochs without a better validation loss after which to stop.
        seed: of the split, the order of prompts and the start.

    Raises:
        PairError: paired activations that do not fit the prompts.
        SettingError: a rank, a share or a number of epochs out of range.
        LearningError: too few prompts, a loss that is not finite, or one that no edit can change.
    """
    positions = behaviour.positions
    if positions.ndim != 1 or paired.ndim != 2 or len(paired) != len(positions):
        raise PairError(
            f"DAS is trained on one position and one paired activation for each prompt, got "
            f"positions {tuple(positions.shape)} and pairs {tuple(paired.shape)}"
        )
    if not 1 <= rank <= paired.shape[1]:
        raise SettingError(f"rank must be 1 to {paired.shape[1]}, got {rank}")
    if epochs < 1 or patience < 1 or not 0 < validation < 1 or not learning_rate > 0:
        raise SettingError(
            f"epochs and patience must be at least 1, validation within (0, 1) and learning_rate "
            f"positive, got {epochs}, {patience}, {validation} and {learning_rate}"
        )
    held_out = max(1, round(validation * len(paired)))
    if held_out >= len(paired):
        raise LearningError(f"{len(paired)} prompts are too few to train on some and validate")

    # Drawn on the CPU, so that the same seed gives the same start on any device.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(paired), generator=generator)
    check, train = order[:held_out], order[held_out:]
    start = torch.randn(paired.shape[1], rank, generator=generator, dtype=torch.float64)
    free = start.to(paired.device).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=learning_rate)

    trained: list[float] = []
    checked: list[float] = []
    # Whoever compares edits will be in no_grad.
    with torch.enable_grad(), frozen(behaviour.model):
        best = start_loss = _mean_loss(behaviour, paired, _basis(free), check)
        kept, best_epoch = _basis(free).detach(), 0
        for epoch in range(1, epochs + 1):
            shuffled = train[torch.randperm(len(train), generator=generator)]
            total = 0.0
            for rows in shuffled.split(behaviour.batch_size):
                loss = _losses(behaviour, paired, _basis(free), rows).mean()
                if loss.requires_grad:
                    (free.grad,) = torch.autograd.grad(loss, [free])
                if not trained and (free.grad is None or not bool(free.grad.any())):
                    raise LearningError(
                        f"what the loss reads does not depend on the stream at {behaviour.site} at "
                        f"these positions, so there is nothing to train"
                    )
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            trained.append(total / len(train))
            checked.append(_mean_loss(behaviour, paired, _basis(free), check))
            if checked[-1] < best:
                best, best_epoch, kept = checked[-1], epoch, _basis(free).detach()
            elif epoch - best_epoch >= patience:
                break
    return kept, DASReport(start_loss, tuple(trained), tuple(checked), best_epoch, seed)


def interchange(x: Tensor, partner: Tensor, basis: Tensor) -> Tensor:
    """Rows x + R Rᵀ (x_pair − x), (N, d) in float64, for R (d, r)."""
    return x.double() + ((partner.double() - x.double()) @ basis) @ basis.T


def _basis(free: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(free).Q
    return basis


@torch.no_grad()
def _mean_loss(behaviour: Behaviour, paired: Tensor, basis: Tensor, rows: Tensor) -> float:
    losses = [_losses(behaviour, paired, basis, part) for part in rows.split(behaviour.batch_size)]
    return float(torch.cat(losses).mean())


def _losses(behaviour: Behaviour, paired: Tensor, basis: Tensor, rows: Tensor) -> Tensor:
    """Loss of each prompt of a batch with the interchange in place, (b,)."""
    partner = paired[rows.to(paired.device)].detach()

    def edit(x: Tensor, context: EditContext) -> Tensor:
        pair = partner.to(x.device)[context.index]
        return interchange(x, pair, basis.to(x.device)).to(x.dtype)

    positions = behaviour.positions[rows.to(behaviour.positions.device)]
    with intervene(behaviour.model, Intervention(behaviour.site, positions, edit)):
        if behaviour.rerun is not None:
            logits = behaviour.rerun(rows)
        else:
            logits = behaviour.model(**_batch(behaviour, rows), use_cache=False).logits
    losses = behaviour.loss(logits, rows)
    if losses.shape != rows.shape or not bool(torch.isfinite(losses).all()):
        raise LearningError(
            f"the loss must return one finite number for each of {len(rows)} prompts, got "
            f"{tuple(losses.shape)}, {int((~torch.isfinite(losses)).sum())} not finite"
        )
    return losses


def _batch(behaviour: Behaviour, rows: Tensor) -> dict[str, Any]:
    device = next(behaviour.model.parameters()).device
    return {
        name: value[rows.to(value.device)].to(device) if isinstance(value, Tensor) else value
        for name, value in behaviour.inputs.items()
    }
