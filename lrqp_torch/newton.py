"""A Newton–conjugate-gradient solver for L2-penalised multinomial logistic regression.

Each Newton step solves H s = −∇ by conjugate gradients to a tolerance that tightens with the
gradient (Nocedal and Wright 2006, algorithm 7.1), preconditioned by the Hessian of the average
class, one d × d Cholesky factor a step. Products with H cost two matrix products with the data.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_CG_STEPS = 500
ARMIJO = 1e-4


@dataclass(frozen=True)
class MultinomialFit:
    """Minimiser of the penalised loss, in float64, with the statistics of the search."""

    weight: Tensor
    bias: Tensor
    statistics: dict[str, Any]


@torch.no_grad()
def minimise_multinomial(
    x: Tensor, labels: Tensor, n_classes: int, l2: float, tolerance: float, max_iterations: int
) -> MultinomialFit:
    """Minimise (1/n) Σ −log softmax(W x + b)[y] + (l2/2) ‖W‖² from W = 0, b = 0.

    By the representer theorem W lies in the span of the centred activations, so with n < d the
    problem is solved in n dimensions, in an orthonormal basis of that span.

    Args:
        x: activations, (n, d), float64.
        labels: (n,), long.
        n_classes: K.
        l2: penalty, > 0.
        tolerance: stop when the gradient norm falls below this share of the one at zero, or below
            its own rounding error.
        max_iterations: stop after as many Newton steps.
    """
    mean = x.mean(0)
    centred = x - mean
    basis = torch.linalg.qr(centred.T).Q if len(x) < x.shape[1] else None
    features = centred if basis is None else centred @ basis
    # The last row of the parameters is the bias, read by a constant feature.
    features = torch.cat([features, features.new_ones(len(x), 1)], 1)
    problem = _Problem(features, labels, n_classes, l2)

    parameters = features.new_zeros(features.shape[1], n_classes)
    loss, gradient, probability = problem.evaluate(parameters)
    # Activations that say nothing about the labels have a gradient of rounding errors at zero,
    # which no step makes smaller; they are at their optimum there.
    start, rounding = gradient.norm(), problem.rounding(probability)
    goal = torch.maximum(tolerance * start, rounding)
    iterations = 0
    while gradient.norm() > goal and iterations < max_iterations:
        step = problem.newton_step(gradient, probability, float(gradient.norm() / start))
        length, slope = 1.0, float((gradient * step).sum())
        while True:
            trial = problem.evaluate(parameters + length * step)
            # Near the optimum the decrease is below the loss's rounding; there the full step is
            # safe, and a smaller gradient is the progress that counts.
            enough = float(trial[0]) <= float(loss) + ARMIJO * length * slope
            if enough or float(trial[1].norm()) < 0.5 * float(gradient.norm()) or length < 1e-10:
                break
            length /= 2
        iterations += 1
        if length < 1e-10:
            break
        parameters = parameters + length * step
        loss, gradient, probability = trial

    weight = parameters[:-1] if basis is None else basis @ parameters[:-1]
    weight = weight.T.contiguous()
    # The softmax ignores a shift of all biases; take the one with mean zero.
    bias = parameters[-1] - parameters[-1].mean() - weight @ mean
    return MultinomialFit(
        weight=weight,
        bias=bias,
        statistics={
            "loss": float(loss),
            "gradient_norm": float(gradient.norm()),
            "relative_gradient_norm": (
                float(gradient.norm() / start) if gradient.norm() > rounding else 0.0
            ),
            "iterations": iterations,
        },
    )


class _Problem:
    """The loss with its derivatives, for parameters (features, K) with the bias in the last row."""

    def __init__(self, features: Tensor, labels: Tensor, n_classes: int, l2: float) -> None:
        self.features = features
        self.one_hot = torch.nn.functional.one_hot(labels, n_classes).to(features)
        self.penalty = features.new_full((features.shape[1], 1), l2)
        self.penalty[-1] = 0.0

    def evaluate(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient, and class probabilities (n, K)."""
        log_probability = (self.features @ parameters).log_softmax(-1)
        n_samples = len(self.features)
        loss = -(self.one_hot * log_probability).sum() / n_samples
        loss = loss + (self.penalty * parameters.square()).sum() / 2
        probability = log_probability.exp()
        gradient = self.features.T @ (probability - self.one_hot) / n_samples
        return loss, gradient + self.penalty * parameters, probability

    def rounding(self, probability: Tensor) -> Tensor:
        """Size of the rounding error of the gradient: that of its terms, which may cancel."""
        terms = self.features.abs().T @ (probability - self.one_hot).abs() / len(self.features)
        size: Tensor = 8 * torch.finfo(terms.dtype).eps * torch.linalg.vector_norm(terms)
        return size

    def newton_step(self, gradient: Tensor, probability: Tensor, progress: float) -> Tensor:
        """−H⁻¹ ∇ by preconditioned conjugate gradients."""
        n_samples = len(self.features)
        n_classes = probability.shape[1]
        weights = (probability * (1 - probability)).sum(-1, keepdim=True) / n_classes
        average = self.features.T @ (weights * self.features) / n_samples
        average.diagonal().add_(self.penalty.squeeze(-1))
        average.diagonal().add_(1e-12 * average.diagonal().max())
        factor, failed = torch.linalg.cholesky_ex(average)
        if bool(failed):
            factor = average.diagonal().clamp_min(1e-300).sqrt().diag()

        def hessian(direction: Tensor) -> Tensor:
            change = self.features @ direction
            change = probability * (change - (probability * change).sum(-1, keepdim=True))
            return self.features.T @ change / n_samples + self.penalty * direction

        step = torch.zeros_like(gradient)
        residual = -gradient
        solved = torch.cholesky_solve(residual, factor)
        direction, product = solved, (residual * solved).sum()
        target = min(0.1, progress**0.5) * float(gradient.norm())
        for _ in range(MAX_CG_STEPS):
            if float(residual.norm()) <= target:
                break
            curved = hessian(direction)
            curvature = (direction * curved).sum()
            if float(curvature) <= 0:
                break
            length = product / curvature
            step = step + length * direction
            residual = residual - length * curved
            solved = torch.cholesky_solve(residual, factor)
            previous, product = product, (residual * solved).sum()
            direction = solved + (product / previous) * direction
        return step
