"""Random problems for the quadratic program, and the exact answer that every solver is held to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.qp import MahalanobisQP, ProbeGeometry

LOG_ODDS = 10.0


@dataclass(frozen=True)
class QPProblem:
    """Activations to edit, a probe and a metric, all float64.

    Attributes:
        x: activations, (B, d).
        target: classes to write, (B,).
        weight: W, (K, d).
        bias: b, (K,).
        covariance: Σ, (d, d).
        direction: the gradient that a backward pass starts from, (B, d).
        geometry: of probe and metric.
    """

    x: Tensor
    target: Tensor
    weight: Tensor
    bias: Tensor
    covariance: Tensor
    direction: Tensor
    geometry: ProbeGeometry

    @classmethod
    def random(cls, batch: int, n_classes: int, width: int, device: str) -> "QPProblem":
        """A probe with logits of standard deviation 2 under a Σ of condition number 1e4."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        basis = torch.linalg.qr(normal(width, width)).Q
        variances = torch.logspace(0, -4, width, dtype=torch.float64)
        covariance = (basis * variances) @ basis.T
        x = (normal(batch, width) * variances.sqrt()) @ basis.T
        weight = normal(n_classes, width)
        weight *= 2 / ((weight @ covariance) * weight).sum(-1, keepdim=True).sqrt()
        bias, direction = normal(n_classes), normal(batch, width)
        target = torch.randint(n_classes, (batch,), generator=generator)
        geometry = ProbeGeometry.build(weight, bias, covariance)
        return cls(x, target, weight, bias, covariance, direction, geometry).to(device)

    @property
    def n_classes(self) -> int:
        """K."""
        return len(self.weight)

    def first(self, examples: int) -> "QPProblem":
        """The problem of the first few activations."""
        return QPProblem(
            self.x[:examples],
            self.target[:examples],
            self.weight,
            self.bias,
            self.covariance,
            self.direction[:examples],
            self.geometry,
        )

    def to(self, device: str) -> "QPProblem":
        """The same problem on another device."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        covariance = self.covariance.to(device)
        return QPProblem(
            self.x.to(device),
            self.target.to(device),
            weight,
            bias,
            covariance,
            self.direction.to(device),
            ProbeGeometry.build(weight, bias, covariance),
        )

    def gap(self, x: Tensor) -> Tensor:
        """What each constraint is short of, g = log α − (z_t − z_ℓ), (B, K−1)."""
        return LOG_ODDS - self.geometry.margins(x, self.target)

    def violation(self, x_new: Tensor) -> float:
        """The largest shortfall of any constraint at given activations, in nats."""
        return float(self.gap(x_new).detach().clamp_min(0).max())


@dataclass(frozen=True)
class Exact:
    """The optimum and its derivative, proved by the optimality conditions.

    Attributes:
        x_new: (B, d).
        gradient: of ⟨direction, x'⟩ with respect to x, (B, d).
    """

    x_new: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, problem: QPProblem) -> "Exact":
        """Take the active set from our solver, and the rest from dense linear algebra.

            x' = x + Σ A_Aᵀ λ_A,   λ_A = M_AA⁻¹ g_A,   gradient = c − A_Aᵀ M_AA⁻¹ A_A Σ c

        A solution is optimal exactly where λ_A ≥ 0 and every constraint holds, which is checked,
        so it does not matter where the active set came from.

        Raises:
            AssertionError: the active set was not that of the optimum.
        """
        solution = MahalanobisQP(problem.n_classes).solve(
            problem.x, problem.target, LOG_ODDS, problem.geometry
        )
        edited, gradients = problem.x.clone(), problem.direction.clone()
        gaps, covariance = problem.gap(problem.x), problem.covariance
        for row, target in enumerate(problem.target.tolist()):
            others = [label for label in range(problem.n_classes) if label != target]
            normals = problem.weight[target] - problem.weight[others]
            active = solution.active[row]
            rows = normals[active]
            steps = rows @ covariance
            matrix = steps @ rows.T
            multipliers = torch.linalg.solve(matrix, gaps[row, active])
            assert bool((multipliers >= 0).all()), "a multiplier is negative"
            edited[row] += multipliers @ steps
            gradients[row] -= torch.linalg.solve(matrix, steps @ problem.direction[row]) @ rows
        assert problem.violation(edited) < 1e-9, "a constraint is violated"
        return cls(edited, gradients)

    def errors(self, x_new: Tensor, gradient: Tensor | None) -> tuple[float, float | None]:
        """Largest errors, relative to the largest entry: of the edit, and of the gradient."""
        count = min(len(self.x_new), len(x_new))

        def error(found: Tensor, true: Tensor) -> float:
            found, true = found[:count].detach().to(true), true[:count]
            return float((found - true).abs().max() / true.abs().max())

        return (
            error(x_new, self.x_new),
            None if gradient is None else error(gradient, self.gradient),
        )
