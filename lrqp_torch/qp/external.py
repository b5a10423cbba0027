"""The dual posed in cvxpy, and solved through cvxpylayers by solvers that are not ours."""

from typing import Any

import cvxpy as cp
import torch
from cvxpylayers.torch.cvxpylayer import CvxpyLayer
from torch import Tensor

from lrqp_torch.errors import SolverError
from lrqp_torch.qp.active_set import unit_gap, unit_scale
from lrqp_torch.qp.solver import DualActiveSet

ACTIVE_SET = "ACTIVE_SET"
SOLVERS = (ACTIVE_SET, "DIFFCP", "MOREAU", "CUCLARABEL")


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


def is_factored(solver: str) -> bool:
    """Whether a solver wants a factor of M instead of M."""
    return solver == "DIFFCP"


def solver_options(solver: str, options: dict[str, Any]) -> dict[str, Any]:
    """What is passed to a cvxpylayers solver: its options, with better defaults for DIFFCP."""
    if solver != "DIFFCP" or "solve_method" in options:
        return dict(options)
    # DIFFCP's own default, SCS, is accurate to 1e-3 only.
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    return {"solve_method": "Clarabel", **tolerances, **options}


def make_layer(n_constraints: int, solver: str, options: dict[str, Any]) -> CvxpyLayer:
    """The dual as a batched cvxpylayer.

    Raises:
        SolverError: the solver is not installed.
    """
    problem, parameters, variable = pose_dual(n_constraints, factored=is_factored(solver))
    try:
        return CvxpyLayer(
            problem,
            parameters=parameters,
            variables=[variable],
            solver=DualActiveSet() if solver == ACTIVE_SET else solver,
            solver_args=options,
        )
    except (ImportError, cp.error.SolverError) as error:
        raise SolverError(
            f"solver {solver!r} cannot be used here ({error}); install it (for MOREAU: "
            f"pip install 'lrqp_torch[moreau]') or leave solver at its default"
        ) from error


def solve_external(
    layer: CvxpyLayer, solver: str, gram: Tensor, gap: Tensor, noise: Tensor
) -> Tensor:
    """Multipliers λ, (B, m), of feasible problems by the layer's solver; differentiable.

    Raises:
        SolverError: the solver failed, or cannot run on this device.
    """
    if solver == "DIFFCP" and gram.is_cuda:
        raise SolverError("DIFFCP runs on the CPU only; move the data there or use ACTIVE_SET")
    # Constraints of unit length make one tolerance of the solver fit all of them. Those without
    # length hold already, or the example would not be asked.
    scale = unit_scale(gram.detach(), noise)
    unit, _ = unit_gap(gap, scale)
    unit_gram = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    matrix = _square_root(unit_gram) if is_factored(solver) else unit_gram
    try:
        (multipliers,) = layer.to(gap.device)(matrix, unit)
    except Exception as error:
        raise SolverError(f"{solver} failed on a batch of {len(gap)}: {error}") from error
    result: Tensor = multipliers.to(gap).clamp_min(0.0) * scale
    return result


def active_by_strength(gram: Tensor, gap: Tensor, multipliers: Tensor) -> Tensor:
    """Which constraints bind at another solver's solution, (B, m) bool.

    It leaves small multipliers on constraints that do not bind; the larger of the two complementary
    numbers, in the same units, tells which of them should be zero.
    """
    slack = (gram @ multipliers.unsqueeze(-1)).squeeze(-1) - gap
    return multipliers * gram.diagonal(dim1=-2, dim2=-1) > slack.abs()


def _square_root(gram: Tensor) -> Tensor:
    """F with F Fᵀ = M: Cholesky, with the least diagonal that rounding of a singular M needs."""
    diagonal = gram.detach().diagonal(dim1=-2, dim2=-1).amax(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    singular = torch.linalg.cholesky_ex(gram.detach()).info > 0
    jitter = torch.where(singular, 1e-12 * diagonal, 0.0)
    factor: Tensor = torch.linalg.cholesky(gram + jitter[:, None, None] * identity)
    return factor
