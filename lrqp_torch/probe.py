"""The linear probe: multinomial logistic regression, fitted to its optimum."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from lrqp_torch.errors import (
    ConvergenceError,
    LabelError,
    LRQPError,
    TargetError,
    WidthError,
)
from lrqp_torch.newton import minimise_multinomial
from lrqp_torch.qp.checks import as_classes, check_finite


@dataclass(frozen=True)
class FitReport:
    """How a probe was fitted.

    Attributes:
        loss: the penalised loss at the optimum, in nats per example.
        gradient_norm: Euclidean norm of its gradient there, before rounding to the probe's dtype.
        relative_gradient_norm: the same over the norm at W = 0, b = 0; at most ``tolerance``, and
            0 where the gradient is below its own rounding error.
        iterations: Newton steps.
        l2: the penalty that was used.
        n_samples: examples fitted.
    """

    loss: float
    gradient_norm: float
    relative_gradient_norm: float
    iterations: int
    l2: float
    n_samples: int


class LinearProbe(nn.Linear):
    """A linear probe z(x) = W x + b over K classes: an ``nn.Linear`` from d to K.

    Args:
        width: d, the width of the activations.
        n_classes: K ≥ 2.
        device: where the weights live.
        dtype: their dtype; default float32.
    """

    report: FitReport | None = None

    def __init__(
        self,
        width: int,
        n_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if n_classes < 2:
            raise LabelError(f"a probe needs at least 2 classes, got {n_classes}")
        super().__init__(width, n_classes, device=device, dtype=dtype)

    @property
    def width(self) -> int:
        """The width d of the activations that the probe reads."""
        return self.in_features

    @property
    def n_classes(self) -> int:
        """K."""
        return self.out_features

    @classmethod
    def fit(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        l2: float | None = None,
        n_classes: int | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 200,
    ) -> Self:
        """Fit to the optimum of the L2-penalised multinomial likelihood.

            minimise  (1/n) Σ_i −log softmax(W x_i + b)[y_i]  +  (l2/2) ‖W‖²_F

        The bias is not penalised. The problem is strictly convex in W, so the optimum is one
        point however the data look, separable ones and n < d included. Solved in float64 on x's
        device by a Newton–conjugate-gradient method; the weights are then stored in float32 (in
        float64 when x is), frozen: call ``requires_grad_()`` to train them further.

        Args:
            x: activations, (n, d).
            y: class of each, (n,), integers from 0, or bool.
            l2: penalty on W; default 1/n, which is the usual C = 1.
            n_classes: K; default the largest label + 1. Every class must occur.
            tolerance: bound on the gradient norm, relative to the one at zero.
            max_iterations: Newton steps before giving up.

        Raises:
            WidthError: shapes that do not fit.
            NonFiniteError: NaN or infinity in x.
            LabelError: one class only, a class without examples, fewer examples than classes.
            ConvergenceError: the gradient norm was not reached.
        """
        labels, n_classes = _check(x, y, n_classes)
        l2 = 1.0 / len(x) if l2 is None else float(l2)
        if not l2 > 0:
            raise LabelError(
                f"l2 must be positive, got {l2}: separable classes have no optimum without it"
            )
        result = minimise_multinomial(
            x.detach().double(), labels, n_classes, l2, tolerance, max_iterations
        )
        report = FitReport(l2=l2, n_samples=len(x), **result.statistics)
        if report.relative_gradient_norm > tolerance:
            raise ConvergenceError(
                f"the probe's gradient norm is {report.relative_gradient_norm:.1e} of its start "
                f"after {report.iterations} steps, above {tolerance:.0e}; raise max_iterations or "
                f"l2 (now {l2:.1e}), or standardise the activations"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        probe = cls(x.shape[1], n_classes, device=x.device, dtype=dtype)
        with torch.no_grad():
            probe.weight.copy_(result.weight)
            probe.bias.copy_(result.bias)
        probe.requires_grad_(False)
        probe.report = report
        return probe

    def forward(self, input: Tensor) -> Tensor:
        """Logits z(x), (..., K), in the probe's dtype whatever the dtype of the activations."""
        if input.shape[-1] != self.width:
            raise WidthError(
                f"the probe reads width {self.width}, the activations have {input.shape[-1]}"
            )
        return super().forward(input.to(self.weight.dtype))

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of examples whose most likely class is y."""
        if y.shape != x.shape[:-1]:
            raise TargetError(f"labels must be {tuple(x.shape[:-1])}, got {tuple(y.shape)}")
        return float((self(x).argmax(-1) == y.to(x.device)).double().mean())

    def log_odds(
        self,
        x: Tensor,
        target: Tensor | int,
        *,
        against: Literal["strongest", "rest"] = "strongest",
    ) -> Tensor:
        """Log odds of a class at each activation, (...), in nats.

        ``against="strongest"``: log P[t] / max_ℓ P[ℓ] = z_t − max_ℓ z_ℓ over ℓ ≠ t, which is what
        an edit constrains. ``against="rest"``: log P[t] / (1 − P[t]), the total odds, lower by at
        most log(K − 1). For K = 2 they are the same.

        Args:
            x: activations, (..., d).
            target: class t, a number or one per activation.
            against: which odds.

        Raises:
            WidthError: activations of another width.
            TargetError: classes out of range, or of a wrong shape or dtype.
            LRQPError: odds that do not exist.
        """
        if against not in ("strongest", "rest"):
            raise LRQPError(f"against must be 'strongest' or 'rest', got {against!r}")
        logits = self(x)
        target = torch.as_tensor(target, device=logits.device)
        if target.dtype.is_floating_point or target.dtype.is_complex:
            raise TargetError(f"target must hold integer class numbers, got {target.dtype}")
        if target.ndim and target.shape != logits.shape[:-1]:
            raise TargetError(
                f"target must be a number or {tuple(logits.shape[:-1])}, one class per "
                f"activation, got {tuple(target.shape)}"
            )
        target = target.long().expand(logits.shape[:-1])
        if bool(((target < 0) | (target >= self.n_classes)).any()):
            raise TargetError(f"target must lie in 0 to {self.n_classes - 1}")
        own = logits.gather(-1, target.unsqueeze(-1))
        rivals = logits.scatter(-1, target.unsqueeze(-1), float("-inf"))
        rival = rivals.amax(-1) if against == "strongest" else rivals.logsumexp(-1)
        result: Tensor = own.squeeze(-1) - rival
        return result


def _check(x: Tensor, y: Tensor, n_classes: int | None) -> tuple[Tensor, int]:
    if not isinstance(x, Tensor):
        raise WidthError(
            f"activations must be a tensor, got {type(x).__name__}; torch.as_tensor(x)"
        )
    y = as_classes(y, "labels")
    if x.ndim != 2 or not x.dtype.is_floating_point:
        raise WidthError(f"activations must be floating (n, d), got {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise LabelError(f"labels must be ({len(x)},), one per activation, got {tuple(y.shape)}")
    if y.dtype.is_floating_point or y.dtype.is_complex:
        raise LabelError(f"labels must be integers or bool, got {y.dtype}")
    if len(x) == 0:
        raise LabelError("no examples to fit a probe on")
    check_finite(x)
    labels = y.to(x.device).long()
    if int(labels.min()) < 0:
        raise LabelError(f"labels must be 0 or more, got {int(labels.min())}")
    n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
    if int(labels.max()) >= n_classes:
        raise LabelError(f"label {int(labels.max())} is outside the {n_classes} classes given")
    if bool((labels == labels[0]).all()):
        raise LabelError(
            f"all {len(labels)} labels are class {int(labels[0])}; a probe needs two classes"
        )
    if len(x) < n_classes:
        raise LabelError(
            f"{len(x)} examples cannot fit {n_classes} classes; give at least one each"
        )
    counts = torch.bincount(labels, minlength=n_classes)
    if bool((counts == 0).any()):
        missing = (counts == 0).nonzero().flatten()[:10].tolist()
        raise LabelError(
            f"classes {missing} have no examples; renumber the labels or give more prompts"
        )
    return labels, n_classes
