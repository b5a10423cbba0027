"""The LRQP quadratic program: the nearest activation at which a probe reads the target."""

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import torch
from cvxpylayers.torch.cvxpylayer import CvxpyLayer
from torch import Tensor, nn

from lrqp_torch.errors import NonFiniteError, SolverError, WidthError
from lrqp_torch.qp.checks import check_classes, check_finite, kkt_residual
from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.solution import Solution, Status
from lrqp_torch.qp.solver import DualActiveSet

Realise = Callable[[Tensor], Tensor]
"""Maps float64 activations to the values that the model will really hold, in float64."""

ACTIVE_SET = "ACTIVE_SET"
SOLVERS = (ACTIVE_SET, "DIFFCP", "MOREAU", "CUCLARABEL")

# A solve counts as accurate when its scaled KKT residual is below these. Our own solver reaches
# 1e-12. Interior-point methods end at a small duality gap, and where the square is posed as a
# second-order cone (DIFFCP) the solution is only as good as the root of that gap.
KKT_TOLERANCE = 1e-8
EXTERNAL_KKT_TOLERANCE = 1e-3
# In half precision each round of reading back and raising the floor leaves a fresh rounding
# error; three or four rounds are usual, and the bound only guards against a loop without end.
MAX_ROUNDS = 24


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


class MahalanobisQP(nn.Module):
    """The nearest activation in Mahalanobis distance at which a probe reads the target.

        minimise  (x' − x)ᵀ Σ⁻¹ (x' − x)
        subject to  z_t(x') − z_ℓ(x') ≥ log α   for every class ℓ ≠ t,   z(x) = W x + b

    from "Intervening in the Residual Stream". It is solved exactly in its dual, which has K − 1
    variables and needs Σ only: with A the rows w_t − w_ℓ, M = A Σ Aᵀ and g the gaps to log α,
    λ = argmin ½ λᵀMλ − gᵀλ over λ ≥ 0 and x' = x + Σ Aᵀ λ. The dual is posed in cvxpy and held as
    the batched :class:`cvxpylayers.torch.CvxpyLayer` ``layer``; its solver is by default our own
    :class:`~.solver.DualActiveSet`, called directly, without the layer's copies to the host.

    After the solve the margins are read back from the realised activations, in the dtype in which
    the model will hold them. Where rounding left one short of log α, its floor is raised by the
    shortfall and the problem solved again, so that the promise holds for the stored numbers.

    Args:
        n_classes: K ≥ 2.
        solver: ``"ACTIVE_SET"`` (ours: any device, exact), or a solver of cvxpylayers:
            ``"DIFFCP"`` (with Clarabel, CPU only), ``"MOREAU"`` (extra ``moreau``),
            ``"CUCLARABEL"`` (needs Julia and CUDA).
        solver_args: passed to the cvxpylayers solver.

    Raises:
        SolverError: the solver is unknown or not installed.
    """

    def __init__(
        self, n_classes: int, *, solver: str = ACTIVE_SET, solver_args: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if n_classes < 2:
            raise WidthError(f"a probe needs at least 2 classes, got {n_classes}")
        if solver not in SOLVERS:
            raise SolverError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
        self.n_classes = n_classes
        self.solver_name = solver
        self.solver_args = dict(solver_args or {})
        self.active_set = DualActiveSet()
        if solver == "DIFFCP" and "solve_method" not in self.solver_args:
            # DIFFCP's own default, SCS, is accurate to 1e-3 only.
            clarabel = {"solve_method": "Clarabel"}
            tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
            self.solver_args = {**clarabel, **tolerances, **self.solver_args}
        self.factored = solver == "DIFFCP"
        # Not a submodule: the layer's buffers are constants in a sparse format that can be neither
        # copied nor saved, and they follow from the fields above.
        self._layers: list[CvxpyLayer] = [self._pose()]

    @property
    def layer(self) -> CvxpyLayer:
        """The dual problem as a cvxpylayer: (M, g) or, for DIFFCP, (F, g) → (λ,), batched."""
        if not self._layers:
            self._layers.append(self._pose())
        return self._layers[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": []}

    def _pose(self) -> CvxpyLayer:
        problem, parameters, variable = pose_dual(self.n_classes - 1, factored=self.factored)
        solver = self.solver_name
        try:
            return CvxpyLayer(
                problem,
                parameters=parameters,
                variables=[variable],
                solver=self.active_set if solver == ACTIVE_SET else solver,
                solver_args=self.solver_args,
            )
        except (ImportError, cp.error.SolverError) as error:
            raise SolverError(
                f"solver {solver!r} cannot be used here ({error}); install it (for MOREAU: "
                f"pip install 'lrqp_torch[moreau]') or leave solver at its default"
            ) from error

    def forward(
        self,
        x: Tensor,
        target: Tensor,
        log_odds: Tensor | float,
        weight: Tensor,
        bias: Tensor,
        covariance: Tensor,
    ) -> Solution:
        """Solve for given probe and metric; differentiable in x, W, b, Σ and log α.

        Args:
            x: activations, (B, d).
            target: target classes, (B,) integer.
            log_odds: log α, a number or (B,).
            weight: W, (K, d).
            bias: b, (K,).
            covariance: Σ, (d, d), symmetric positive semidefinite.
        """
        return self.solve(x, target, log_odds, ProbeGeometry.build(weight, bias, covariance))

    def solve(
        self,
        x: Tensor,
        target: Tensor,
        log_odds: Tensor | float,
        geometry: ProbeGeometry,
        *,
        realise: Realise | None = None,
    ) -> Solution:
        """Solve with a geometry computed before.

        Nothing is raised for an unreachable target here: its example comes back unchanged with
        ``Status.INFEASIBLE``. An example whose probe odds already reach α comes back bit for bit.

        Args:
            x: activations, (B, d), any floating dtype.
            target: target classes, (B,) integer.
            log_odds: log α, a number or (B,).
            geometry: probe and metric, from :meth:`ProbeGeometry.build`.
            realise: what the model will hold when x' is put in place; default: x' in x's dtype.

        Raises:
            WidthError, TargetError, NonFiniteError: bad input, named.
            SolverError: an external solver failed or cannot run on this device.
        """
        floor = self._check(x, target, log_odds, geometry)
        target = target.long()
        realise = realise or (lambda values: values.to(x.dtype).double())
        margins = geometry.margins(x, target)
        needed = (margins < floor.unsqueeze(-1)).any(-1)
        gram, noise = geometry.gram[target], geometry.noise[target].detach()

        # Half an ulp in each coordinate moves a margin by at most ½ ε ‖a‖ ‖x‖. In float32 and
        # float64 that is nothing, and saves a second round; in half precision it would be a large
        # part of the edit, so there the floor is raised only by what turns out to be missing.
        precision = torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(x.detach().double(), dim=-1, keepdim=True)
        raised = (
            2 * precision * (geometry.length[target] * size + floor.detach().abs().unsqueeze(-1))
            if precision < 1e-5
            else torch.zeros_like(margins.detach())
        )

        # Less than about one coordinate's rounding error would leave the rounded x' as it was.
        nudge = precision * geometry.length[target] * size / x.shape[-1] ** 0.5

        wanted, reachable = needed, torch.ones_like(needed)
        for attempt in range(MAX_ROUNDS):
            gap = floor.unsqueeze(-1) + raised - margins
            gap = torch.where(wanted.unsqueeze(-1), gap, -1.0)
            multipliers, active, feasible, residual = self._multipliers(gram, gap, noise)
            # An infeasible example is not asked again, and what is not asked counts as feasible.
            reachable = reachable & feasible
            edited = geometry.displace(x, target, multipliers)
            with torch.no_grad():
                after = geometry.margins(realise(edited), target)
                short = (floor.unsqueeze(-1) - after).clamp_min(0.0)
                short = torch.where((needed & reachable).unsqueeze(-1), short, 0.0)
                if not bool((short > 0).any()):
                    break
                raised = raised + torch.where(short > 0, 2 * short + (attempt + 1) * nudge, 0.0)
                wanted = needed & reachable

        edit = needed & reachable
        with torch.no_grad():
            # An edit that exceeds what the stream's dtype can hold has margins of infinity or NaN.
            reached = ((after >= floor.unsqueeze(-1)) & torch.isfinite(after)).all(-1)
            tolerance = KKT_TOLERANCE if self.solver_name == ACTIVE_SET else EXTERNAL_KKT_TOLERANCE
            accurate = reached & (residual <= tolerance)
            status = torch.full_like(target, Status.SATISFIED)
            status[edit] = Status.SOLVED
            status[edit & ~accurate] = Status.INACCURATE
            status[~reachable] = Status.INFEASIBLE
        squared = (multipliers * (gram @ multipliers.unsqueeze(-1)).squeeze(-1)).sum(-1)
        # The gradient of √0 is infinite; an unedited example has distance 0 and gradient 0.
        distance = torch.where(edit, squared, 1.0).clamp_min(0.0).sqrt() * edit
        return Solution(
            x_new=torch.where(edit.unsqueeze(-1), edited.to(x.dtype), x),
            multipliers=multipliers,
            active=active,
            distance=distance,
            euclidean=torch.linalg.vector_norm((edited - x.double()).detach(), dim=-1),
            floor=floor,
            log_odds_before=margins.amin(-1),
            log_odds_after=torch.where(edit, after.amin(-1), margins.detach().amin(-1)),
            kkt_residual=residual,
            status=status,
        )

    def _multipliers(
        self, gram: Tensor, gap: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """λ (B, m), active (B, m), feasible (B,), KKT residual (B,), by the chosen solver."""
        multipliers, own = self.active_set.solve(gram, gap, noise)
        active = multipliers.detach() > 0
        if self.solver_name != ACTIVE_SET:
            # Other solvers return garbage without a status where a problem is infeasible, so
            # which ones are is ours to say, and they never see those.
            ask = own.feasible & (gap > 0).any(-1)
            multipliers = torch.zeros_like(multipliers)
            if bool(ask.any()):
                multipliers = multipliers.index_put(
                    (ask.nonzero().squeeze(-1),), self._external(gram[ask], gap[ask], noise[ask])
                )
            # They leave small multipliers on constraints that do not bind; the larger of the two
            # complementary numbers, in the same units, tells which of them should be zero.
            found, matrix = multipliers.detach(), gram.detach()
            slack = (matrix @ found.unsqueeze(-1)).squeeze(-1) - gap.detach()
            active = found * matrix.diagonal(dim1=-2, dim2=-1) > slack.abs()
        residual = kkt_residual(gram.detach(), gap.detach(), multipliers.detach(), noise)
        return multipliers, active, own.feasible, residual

    def _external(self, gram: Tensor, gap: Tensor, noise: Tensor) -> Tensor:
        if self.solver_name == "DIFFCP" and gram.is_cuda:
            raise SolverError("DIFFCP runs on the CPU only; move the data there or use ACTIVE_SET")
        # Constraints of unit length make one tolerance of the solver fit all of them. Those without
        # length hold already, or the example would not be asked.
        diagonal = gram.detach().diagonal(dim1=-2, dim2=-1)
        empty = diagonal <= noise
        scale = torch.where(empty, 0.0, torch.where(empty, 1.0, diagonal).rsqrt())
        unit_gap = torch.where(empty, -1.0, gap * scale)
        unit_gram = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        matrix = _square_root(unit_gram) if self.factored else unit_gram
        try:
            (multipliers,) = self.layer.to(gap.device)(matrix, unit_gap)
        except Exception as error:
            raise SolverError(
                f"{self.solver_name} failed on a batch of {len(gap)}: {error}"
            ) from error
        result: Tensor = multipliers.to(gap).clamp_min(0.0) * scale
        return result

    def _check(
        self, x: Tensor, target: Tensor, log_odds: Tensor | float, geometry: ProbeGeometry
    ) -> Tensor:
        if geometry.n_classes != self.n_classes:
            raise WidthError(
                f"the problem is posed for {self.n_classes} classes, the probe has "
                f"{geometry.n_classes}"
            )
        if x.ndim != 2 or x.shape[1] != geometry.width:
            raise WidthError(
                f"activations must be (batch, {geometry.width}) as the probe reads, got "
                f"{tuple(x.shape)}"
            )
        check_classes(target, len(x), self.n_classes, "target")
        if not x.dtype.is_floating_point:
            raise WidthError(f"activations must be floating point, got {x.dtype}; use .float()")
        check_finite(x)
        floor = torch.as_tensor(log_odds, dtype=torch.float64, device=x.device)
        if floor.ndim > 1 or (floor.ndim == 1 and len(floor) != len(x)):
            raise WidthError(f"log_odds must be a number or ({len(x)},), got {tuple(floor.shape)}")
        if not bool(torch.isfinite(floor).all()):
            raise NonFiniteError("log_odds holds NaN or infinity")
        return floor.expand(len(x))


def _square_root(gram: Tensor) -> Tensor:
    """F with F Fᵀ = M: Cholesky, with the least diagonal that rounding of a singular M needs."""
    diagonal = gram.detach().diagonal(dim1=-2, dim2=-1).amax(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    singular = torch.linalg.cholesky_ex(gram.detach()).info > 0
    jitter = torch.where(singular, 1e-12 * diagonal, 0.0)
    factor: Tensor = torch.linalg.cholesky(gram + jitter[:, None, None] * identity)
    return factor
