"""Derivatives of the dual solution, by the implicit function theorem on the active set.

On the active set A the multipliers solve M_AA λ_A = g_A, and λ is zero elsewhere. Given M_AA⁻¹,
that is a linear solve whose derivative is again a linear solve with the same matrix, so
derivatives of every order are exact and cost matrix-vector products only:

    u = M_AA⁻¹ v,   ∂/∂g = u,   ∂/∂M = −u λᵀ        for an incoming gradient v.

Where a constraint is exactly weakly active (λ_i = 0 with zero slack) the solution has a kink; the
result is then one element of the generalised Jacobian, the one of the reported active set.
"""

from typing import Any

import torch
from torch import Tensor


class _ActiveSolve(torch.autograd.Function):
    """λ = M_AA⁻¹ r_A, zero outside A, with one step of iterative refinement."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor, right: Tensor, inverse: Tensor, active: Tensor) -> Tensor:
        solution = matvec(inverse, right)
        residual = torch.where(active, right - matvec(gram, solution), 0.0)
        return solution + matvec(inverse, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        gram, _, inverse, active = inputs
        ctx.save_for_backward(gram, inverse, active, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gram, inverse, active, solution = ctx.saved_tensors
        return *adjoint_gradients(gram, solution, inverse, active, gradient), None, None


class _ForwardActiveSolve(_ActiveSolve):
    """The same with a derivative in forward mode, which graph compilers do not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        gram, _, inverse, active = inputs
        ctx.save_for_backward(gram, inverse, active, output)
        ctx.save_for_forward(gram, inverse, active, output)

    @staticmethod
    def jvp(ctx: Any, gram_tangent: Tensor, tangent: Tensor, *_: None) -> Tensor:
        gram, inverse, active, solution = ctx.saved_tensors
        return active_multipliers(gram, tangent - matvec(gram_tangent, solution), inverse, active)


def active_multipliers(gram: Tensor, gap: Tensor, inverse: Tensor, active: Tensor) -> Tensor:
    """λ with M_AA λ_A = g_A and λ = 0 elsewhere, differentiable in M and g to every order.

    Args:
        gram: M, (B, m, m), symmetric.
        gap: g, (B, m).
        inverse: M_AA⁻¹ padded with zeros, (B, m, m), from :func:`~.active_set.solve_dual`.
        active: A, (B, m) bool.
    """
    solve = _ActiveSolve if torch.compiler.is_compiling() else _ForwardActiveSolve
    result: Tensor = solve.apply(gram, gap, inverse, active)  # type: ignore[no-untyped-call]
    return result


def adjoint_gradients(
    gram: Tensor, multipliers: Tensor, inverse: Tensor, active: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients for M, (B, m, m) symmetric, and g, (B, m), from the gradient of λ, (B, m)."""
    adjoint = active_multipliers(gram, gradient, inverse, active)
    outer = -(adjoint.unsqueeze(-1) * multipliers.unsqueeze(-2))
    return (outer + outer.transpose(-1, -2)) / 2, adjoint


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of each matrix (..., m, m) with its vector (..., m)."""
    if matrix.shape[-1] == 1:
        return matrix.squeeze(-1) * vector
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
