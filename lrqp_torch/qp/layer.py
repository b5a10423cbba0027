"""The dual posed in cvxpy, as a batched cvxpylayer, and our solver in the form that it asks of one.

This loads cvxpy and cvxpylayers; nothing else imports it until a layer is asked for.
"""

from typing import Any

import cvxpy as cp
import torch
from cvxpylayers.interfaces.base import SolverInterface
from cvxpylayers.torch.cvxpylayer import CvxpyLayer
from torch import Tensor

from lrqp_torch.errors import InfeasibleError, SolverError
from lrqp_torch.qp.active_set import DualSolution
from lrqp_torch.qp.implicit import adjoint_gradients
from lrqp_torch.qp.solvers import solve_gram


def pose_dual(
    n_constraints: int, *, factored: bool
) -> tuple[cp.Problem, list[cp.Parameter], cp.Variable]:
    """The dual of the edit in cvxpy: minimise ½ λᵀMλ − gᵀλ over λ ≥ 0.

    The bound is written 2λ ≥ 0, a general row, because some solver interfaces drop direct bounds.

    Args:
        n_constraints: m = K − 1.
        factored: pose ½‖Fᵀλ‖² with M = F Fᵀ as the parameter, for solvers without quadratic
            objectives; else the parameter is M itself, and a singular M needs no factor.
    """
    multipliers = cp.Variable(n_constraints, name="multipliers")
    gap = cp.Parameter(n_constraints, name="gap")
    if factored:
        matrix = cp.Parameter((n_constraints, n_constraints), name="factor")
        quadratic = cp.sum_squares(matrix.T @ multipliers)
    else:
        matrix = cp.Parameter((n_constraints, n_constraints), PSD=True, name="gram")
        quadratic = cp.quad_form(multipliers, matrix)
    problem = cp.Problem(cp.Minimize(0.5 * quadratic - gap @ multipliers), [2 * multipliers >= 0])
    return problem, [matrix, gap], multipliers


def pose(
    n_constraints: int, solver: str | SolverInterface, args: dict[str, Any], *, factored: bool
) -> CvxpyLayer:
    """The dual as a batched layer, (M, g) or (F, g) → (λ,).

    Raises:
        SolverError: the solver is not installed.
    """
    problem, parameters, variable = pose_dual(n_constraints, factored=factored)
    return make_layer(problem, parameters, variable, solver, args)


def make_layer(
    problem: cp.Problem,
    parameters: list[cp.Parameter],
    variable: cp.Variable,
    solver: str | SolverInterface,
    args: dict[str, Any],
) -> CvxpyLayer:
    """A cvxpylayer of a problem, or :class:`SolverError` where its solver cannot take it."""
    try:
        return CvxpyLayer(
            problem,
            parameters=parameters,
            variables=[variable],
            solver=solver,
            solver_args=args,
        )
    except (ImportError, cp.error.SolverError) as error:
        raise SolverError(
            f"solver {solver!r} cannot be used here ({error}); install it (for MOREAU: "
            f"pip install 'lrqp_torch[moreau]'), choose another, or leave solver at its default"
        ) from error


class DualActiveSet(SolverInterface):
    """Our solver of the dual as :func:`pose_dual` poses it, for use in a ``CvxpyLayer``.

    cvxpylayers hands over the canonical data of a batch as torch tensors: P = M flattened,
    (B, m²), q = (−g, 0), (B, m + 1). Both routes, through a layer and directly, end in the same
    code; the direct one spares the layer's copies to the host.
    """

    canon_solver = "CLARABEL"
    supports_quad_obj = True

    def solve(
        self, gram: Tensor, gap: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, DualSolution]:
        """Multipliers λ, (B, m), differentiable in M and g; and how the solve went.

        Args:
            gram: M, (B, m, m).
            gap: g, (B, m).
            noise: rounding error of M's diagonal, (B, m); default zero.
        """
        return solve_gram(gram, gap, noise)

    def solve_torch_batch(
        self,
        P: Any,
        q: Any,
        A: Any,
        dims: Any,
        solver_args: Any,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        """Cvxpylayers' entry point: (primal (B, m), dual (B, m), state for the derivative)."""
        n_constraints = q.shape[-1] - 1
        gram = P.reshape(-1, n_constraints, n_constraints).double()
        gap = -q[:, :-1].double()
        multipliers, solution = self.solve(gram, gap)
        if not bool(solution.feasible.all()):
            failed = (~solution.feasible).nonzero().flatten().tolist()
            raise InfeasibleError(
                f"the quadratic program has no solution for examples {failed} of the batch"
            )
        # The constraint is written 2 λ ≥ 0, so its dual is half the slack M λ − g.
        slack = (gram @ multipliers.unsqueeze(-1)).squeeze(-1) - gap
        dual = torch.where(solution.active, 0.0, slack / 2)
        return multipliers.to(q.dtype), dual.to(q.dtype), (gram, multipliers, solution, A)

    def derivative_torch_batch(
        self, dprimal: Tensor, ddual: Tensor, state: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for (P, q, A) from the gradient of λ; A is constant and receives zero.

        Raises:
            NotImplementedError: a gradient arrives at the constraint's dual variable.
        """
        if ddual is not None and bool((ddual != 0).any()):
            raise NotImplementedError("DualActiveSet differentiates λ, not the slack M λ − g")
        gram, multipliers, solution, matrix = state
        gram_gradient, adjoint = adjoint_gradients(
            gram, multipliers, solution.inverse, solution.active, dprimal.double()
        )
        constant = torch.zeros_like(adjoint[:, :1])
        return (
            gram_gradient.flatten(1).to(dprimal.dtype),
            torch.cat([-adjoint, constant], -1).to(dprimal.dtype),
            torch.zeros_like(matrix),
        )
