"""Derivatives of the dual solution, by the implicit function theorem on the active set.

On the active set A the multipliers solve M_AA λ_A = g_A, and λ is zero elsewhere. Given M_AA⁻¹,
that is a linear solve whose derivative is again a linear solve with the same matrix, so
derivatives of every order are exact and cost matrix-vector products only:

    u = M_AA⁻¹ v,   ∂/∂g = u,   ∂/∂M = −u λᵀ        for an incoming gradient v.

Where a constraint is exactly weakly active (λ_i = 0 with zero slack) the solution has a kink; the
result is then one element of the generalised Jacobian, the one of the reported active set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrqp_torch.errors import in_transforms

if TYPE_CHECKING:
    from lrqp_torch.qp.constraints import Constraints


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
        adjoint = active_multipliers(gram, gradient, inverse, active)
        outer = None
        if ctx.needs_input_grad[0]:
            outer = -(adjoint.unsqueeze(-1) * solution.unsqueeze(-2))
            outer = (outer + outer.transpose(-1, -2)) / 2
        return outer, adjoint, None, None


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


@torch.no_grad()
def inverse_of(block: Tensor, held: Tensor) -> Tensor:
    """M_AA⁻¹ of the constraints that are held, zero elsewhere; a pseudo-inverse if it has none.

    Args:
        block: M between the constraints in some slots, (B, n, n); any numbers where none is held.
        held: which slots hold one, (B, n) bool.
    """
    both = held.unsqueeze(-1) & held.unsqueeze(-2)
    scale = torch.where(held, block.diagonal(dim1=-2, dim2=-1), 1.0).rsqrt()
    unit = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    apart = torch.where(both, block * unit, torch.eye(held.shape[-1]).to(block))
    inverse, failed = torch.linalg.inv_ex(apart)
    if not in_transforms() and bool(failed.any()):
        rows = failed.nonzero().squeeze(-1)
        inverse = inverse.index_copy(0, rows, torch.linalg.pinv(apart[rows], hermitian=True))
    return torch.where(both, inverse * unit, 0.0)


@dataclass(frozen=True)
class ActiveBlock:
    """The active set of each problem."""

    # Which constraint each slot holds, (B, n), m where it is empty; None: slot i holds constraint
    # i.
    index: Tensor | None
    held: Tensor  # which slots hold an active constraint, (B, n) bool
    # M_AA⁻¹ of the slots' constraints and zero elsewhere, (B, n, n); None: from M when asked.
    inverse: Tensor | None

    def multipliers(self, constraints: "Constraints", gap: Tensor) -> Tensor:
        """λ of these active sets, (B, m), differentiable in M and g; zero elsewhere."""
        # One that is 0 may come out as rounding below it.
        m = gap.shape[-1]
        if m == 1:
            gram = constraints.gram.squeeze(-1)
            held = self.held & (self.index == 0) if self.index is not None else self.held
            return torch.where(held, gap / torch.where(held, gram, 1.0), 0.0)
        if self.index is None:
            assert self.inverse is not None
            found = active_multipliers(constraints.gram, gap, self.inverse, self.held)
            return found.clamp_min(0.0)
        right = gap.gather(-1, self.index.clamp_max(m - 1))
        block = constraints.block(self.index)
        inverse = inverse_of(block, self.held) if self.inverse is None else self.inverse
        found = active_multipliers(block, right, inverse, self.held).clamp_min(0.0)
        return gap.new_zeros(len(gap), m + 1).scatter(-1, self.index, found)[:, :m]


@dataclass(frozen=True)
class Ended(ActiveBlock):
    """Where the solves of some activations ended."""

    aims: Tensor  # floors of the last solve, raised for rounding, (B, m)


class _Displaced(torch.autograd.Function):
    """The point x + c P where it is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, rows: Tensor, known: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, rows)
        return known.view_as(known)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        coefficients, rows = ctx.saved_tensors
        wide = gradient.to(rows.dtype)
        of_rows = coefficients.mT @ wide if ctx.needs_input_grad[2] else None
        return gradient, wide @ rows.mT, of_rows, None


def displaced(x: Tensor, coefficients: Tensor, rows: Tensor, known: Tensor) -> Tensor:
    """``known``, (B, d) in x's dtype, with the derivatives of x + c P to every order."""
    result: Tensor = _Displaced.apply(x, coefficients, rows, known)  # type: ignore[no-untyped-call]
    return result


Derivative = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Tensor]
"""From activations, multipliers and floors of some edits, and the gradients of what was found of
them, of which some may be None, to the gradient of the activations."""


class _Known(torch.autograd.Function):
    """What was found of some edits, as functions of their activations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        found: tuple[Tensor, ...],
        fixed: bool,
        derivative: Derivative,
        operations: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        _, multipliers, _, floors, _ = found
        if fixed:
            ctx.mark_non_differentiable(floors)
        ctx.save_for_backward(x, multipliers, floors)
        ctx.derivative, ctx.operations = derivative, operations
        return found

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        known = ctx.saved_tensors
        if all(part is None for part in gradients):
            return None, None, None, None, None
        if not (torch.is_grad_enabled() or in_transforms()):
            return ctx.derivative(known, gradients), None, None, None, None
        # Derivatives of the derivative, or many at once.
        with torch.enable_grad():
            x = known[0] if known[0].requires_grad else known[0].detach().requires_grad_()
            computed = zip(ctx.operations(x), gradients, strict=True)
            pairs = [
                (one, part) for one, part in computed if part is not None and one.requires_grad
            ]
            outputs, parts = zip(*pairs, strict=True)
            (found,) = torch.autograd.grad(outputs, x, parts, create_graph=True)
        return found, None, None, None, None


def known(
    x: Tensor,
    found: tuple[Tensor, ...],
    derivative: Derivative,
    operations: Callable[[Tensor], tuple[Tensor, ...]],
    *,
    fixed: bool,
) -> tuple[Tensor, ...]:
    """What was found of some edits with its derivatives in their activations, to every order.

    Args:
        x: activations, (B, d).
        found: x', multipliers, squared distance, floors and log odds before.
        derivative: what first derivatives are computed by.
        operations: what computes all of ``found`` from x, for further ones.
        fixed: whether floors do not depend on x.
    """
    result: tuple[Tensor, ...] = _Known.apply(x, found, fixed, derivative, operations)  # type: ignore[no-untyped-call]
    return result


class _Valued(torch.autograd.Function):
    """Numbers that are known, with the derivatives of what computes them."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, known: Tensor) -> Tensor:
        return known.view_as(known)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def valued(computed: Tensor, known: Tensor) -> Tensor:
    """``known``, with the derivatives of what was computed."""
    result: Tensor = _Valued.apply(computed, known)  # type: ignore[no-untyped-call]
    return result


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of each matrix (..., m, m) with its vector (..., m)."""
    if matrix.shape[-1] == 1:
        return matrix.squeeze(-1) * vector
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
