"""The batched active-set solver in the form that cvxpylayers asks of a solver."""

from typing import Any

import torch
from cvxpylayers.interfaces.base import SolverInterface
from torch import Tensor

from lrqp_torch.errors import InfeasibleError
from lrqp_torch.qp.active_set import DualSolution, solve_dual
from lrqp_torch.qp.implicit import active_multipliers, adjoint_gradients
from lrqp_torch.qp.table import ActiveSets


class DualActiveSet(SolverInterface):
    """Solver of the dual LRQP problem as posed by :func:`~.external.pose_dual`.

    cvxpylayers hands over the canonical data of a batch as torch tensors: P = M flattened,
    (B, m²), q = (−g, 0), (B, m + 1). Both routes, through a ``CvxpyLayer`` and directly through
    :meth:`solve`, end in the same code; the direct one spares the layer's copies to the host.
    """

    canon_solver = "CLARABEL"
    supports_quad_obj = True

    def solve(
        self,
        gram: Tensor,
        gap: Tensor,
        noise: Tensor | None = None,
        *,
        table: tuple[ActiveSets, Tensor] | None = None,
    ) -> tuple[Tensor, DualSolution]:
        """Multipliers λ, (B, m), differentiable in M and g; and how the solve went.

        For one constraint (K = 2) this is the closed form λ = max(g, 0) / M.

        Args:
            gram: M, (B, m, m).
            gap: g, (B, m).
            noise: rounding error of M's diagonal, (B, m); default zero.
            table: active sets worked out beforehand, and which of their problems each example is,
                (B,). Default: find the active set by pivots.
        """
        if gap.shape[-1] == 1:
            return solve_single(gram, gap, noise)
        if table is not None:
            sets, case = table
            solution = sets.solve(case, gap.detach())
        else:
            solution = solve_dual(gram.detach(), gap.detach(), noise=noise)
        return active_multipliers(gram, gap, solution.inverse, solution.active), solution

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


def solve_single(
    gram: Tensor, gap: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, DualSolution]:
    """The closed form for one constraint: active when g > 0, infeasible when also M = 0.

    Args:
        gram: M, (B, 1, 1).
        gap: g, (B, 1).
        noise: rounding error of M, (B, 1); default zero.
    """
    length = gram.flatten(1)
    solvable = length.detach() > (0.0 if noise is None else noise)
    violated = gap.detach() > 0
    active = violated & solvable
    inverse = torch.where(active, torch.where(solvable, length, 1.0).reciprocal(), 0.0)
    multipliers = inverse * gap
    return multipliers, DualSolution(
        multipliers=multipliers.detach(),
        active=active,
        inverse=inverse.detach().unsqueeze(-1),
        feasible=(solvable | ~violated).squeeze(-1),
        converged=torch.ones_like(solvable).squeeze(-1),
    )
