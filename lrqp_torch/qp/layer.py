"""The dual posed in cvxpy, as a batched cvxpylayer, and our solver in the form that it asks of one.

This loads cvxpy and cvxpylayers; nothing else imports it until a layer is asked for.
"""

from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from cvxpylayers.interfaces.base import SolverInterface
from cvxpylayers.torch.cvxpylayer import CvxpyLayer
from torch import Tensor

from lrqp_torch.errors import InfeasibleError, SolverError
from lrqp_torch.qp.active_set import DualSolution, solve_dual
from lrqp_torch.qp.constraints import DenseConstraints


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
        known = "with pip install 'lrqp_torch[moreau]'", "as cvxpylayers' pages say"
        raise SolverError(
            f"solver {solver!r} cannot be used here ({str(error).rstrip('.')}); install it "
            f"{known[solver != 'MOREAU']}, choose another, or leave solver at its default"
        ) from error


@dataclass(frozen=True)
class _Form:
    """How cvxpy wrote a dual of ours: where its numbers stand in the canonical data."""

    size: int  # m, how many variables
    quadratic: Tensor  # row and column of each number of P, (2, n)
    variable: Tensor  # of each row of the constraints a λ_j ≥ 0, its j, (r,)
    place: Tensor  # and where its a stands among the numbers of A, (r,)
    first: Tensor  # whether the row is the first that bounds its variable, (r,) bool

    @classmethod
    def of(cls, context: Any) -> "_Form":
        """That of a layer's context; SolverError unless all it asks besides is λ ≥ 0."""
        size, dims = context.reduced_P.problem_data_index[2][0], context.cone_dims
        others = ("zero", "exp", "soc", "psd", "p3d", "pnd")
        present = [name for name in others if getattr(dims, name, None)]
        if present:
            raise SolverError(f"{_REFUSAL}, this one has constraints of kinds {present}")
        if context.reduced_A.problem_data_index is None:
            raise SolverError(f"{_REFUSAL}, this one has no constraints")
        rows, starts, shape = context.reduced_A.problem_data_index
        columns = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        if bool((columns == size).any()):
            raise SolverError(f"{_REFUSAL}, this one has bounds other than 0")
        if len(rows) != shape[0] or len(np.unique(rows)) != shape[0]:
            raise SolverError(f"{_REFUSAL}, this one has a constraint on several variables")
        if len(np.unique(columns)) != size:
            raise SolverError(f"{_REFUSAL}, this one leaves a variable without a bound")
        place = np.argsort(rows)
        variable = columns[place]
        first = np.zeros(len(variable), dtype=bool)
        first[np.unique(variable, return_index=True)[1]] = True
        own, begins, _ = context.reduced_P.problem_data_index
        quadratic = np.stack([own, np.repeat(np.arange(size), np.diff(begins))])
        return cls(
            int(size), *(torch.as_tensor(part) for part in (quadratic, variable, place, first))
        )

    def gram(self, numbers: Tensor) -> Tensor:
        """M, (B, m, m), from the numbers of P, (B, n): what ½ λᵀPλ depends on."""
        gram = numbers.new_zeros(len(numbers), self.size, self.size)
        rows, columns = self.quadratic.to(numbers.device)
        gram[:, rows, columns] = numbers
        return (gram + gram.mT) / 2


_REFUSAL = "DualActiveSet solves min ½ λᵀMλ − gᵀλ over λ ≥ 0 and nothing else"


class DualActiveSet(SolverInterface):
    """Our solver of min ½ λᵀMλ − gᵀλ over λ ≥ 0, for use in a ``CvxpyLayer``.

    λ ≥ 0 may be written in any way that bounds each variable by itself; a problem that asks
    anything else is refused when the layer is made. One of these serves one layer, or several of
    the same form.

    Raises:
        SolverError: the problem is of another form.
    """

    canon_solver = "CLARABEL"
    supports_quad_obj = True

    def __init__(self) -> None:
        self._form: _Form | None = None

    def setup(self, ctx: Any) -> None:
        """Cvxpylayers' call when a layer is made: look at what the problem asks."""
        form = _Form.of(ctx)
        known = self._form
        if known is not None and not all(
            torch.equal(torch.as_tensor(old), torch.as_tensor(new))
            for old, new in zip(vars(known).values(), vars(form).values(), strict=True)
        ):
            raise SolverError("this DualActiveSet serves a layer of another form: make another")
        self._form = form

    def solve(
        self, gram: Tensor, gap: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, DualSolution]:
        """Multipliers λ, (B, m), differentiable in M and g; and how the solve went.

        Args:
            gram: M, (B, m, m).
            gap: g, (B, m).
            noise: rounding error of M's diagonal, (B, m); default zero.
        """
        none = torch.zeros_like(gap.detach())
        constraints = DenseConstraints(gram, none if noise is None else noise, none)
        solution = solve_dual(constraints, gap)
        return solution.multipliers(constraints, gap), solution

    def solve_torch_batch(
        self,
        P: Any,
        q: Any,
        A: Any,
        dims: Any,
        solver_args: Any,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        """Cvxpylayers' entry point: (primal (B, m), dual (B, rows), state for the derivative)."""
        form = self._form
        assert form is not None
        numbers = q.new_zeros(len(q), form.quadratic.shape[1]) if P is None else P
        gram, gap = form.gram(numbers.double()), -q[:, :-1].double()
        bounds = A[:, form.place.to(A.device)].double()
        if not bool((bounds > 0).all()):
            raise SolverError(f"{_REFUSAL}, here a variable is bounded from above or not at all")
        multipliers, solution = self.solve(gram, gap)
        if not bool(solution.feasible.all()):
            failed = (~solution.feasible).nonzero().flatten().tolist()
            raise InfeasibleError(
                f"the quadratic program has no solution for examples {failed} of the batch"
            )
        # A constraint a λ_j ≥ 0 has the dual (Mλ − g)_j / a; of several on one variable, one has
        # it all.
        slack = (gram @ multipliers.unsqueeze(-1)).squeeze(-1) - gap
        slack = torch.where(multipliers > 0, 0.0, slack.clamp_min(0.0))
        first, variable = form.first.to(A.device), form.variable.to(A.device)
        dual = torch.where(first, slack[:, variable] / bounds, 0.0)
        return multipliers.to(q.dtype), dual.to(q.dtype), (numbers, gap, solution, A)

    def derivative_torch_batch(
        self, dprimal: Tensor, ddual: Tensor, state: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for (P, q, A) from the gradient of λ; λ does not depend on the bounds' scale.

        Raises:
            NotImplementedError: a gradient arrives at the constraint's dual variable.
        """
        if ddual is not None and bool((ddual != 0).any()):
            raise NotImplementedError("DualActiveSet differentiates λ, not the slack M λ − g")
        numbers, gap, solution, matrix = state
        assert self._form is not None
        with torch.enable_grad():
            numbers = numbers.detach().double().requires_grad_()
            gap = gap.detach().requires_grad_()
            none = torch.zeros_like(gap)
            constraints = DenseConstraints(self._form.gram(numbers), none, none)
            multipliers = solution.multipliers(constraints, gap)
        of_numbers, of_gap = torch.autograd.grad(multipliers, (numbers, gap), dprimal.double())
        constant = torch.zeros_like(of_gap[:, :1])
        return (
            of_numbers.to(dprimal.dtype),
            torch.cat([-of_gap, constant], -1).to(dprimal.dtype),
            torch.zeros_like(matrix),
        )
