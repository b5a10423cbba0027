"""The total-odds edit of a batch: solve, put in place, read back, and certify."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.errors import (
    NonFiniteError,
    WidthError,
    check_activations,
    check_finite,
    require_concrete,
)
from lrqp_torch.qp.external import ACTIVE_SET
from lrqp_torch.qp.geometry import Geometry
from lrqp_torch.qp.problem import Floor
from lrqp_torch.qp.reach import Attempt, Headroom, Rows, reach
from lrqp_torch.qp.solution import Solution, Status
from lrqp_torch.qp.total import (
    total_log_odds,
    total_multipliers,
    total_residual,
    without_constants,
)
from lrqp_torch.qp.total_solver import solve_total

# Random problems end at 1e-12. λ = μ p multiplies the rounding errors of the margins by μ, which is
# large where a rival is nearly the target's equal: up to 1e-6 for copies one part in a million off.
KKT_TOLERANCE = 1e-5


class TotalOddsProblem(nn.Module):
    """The nearest activation at which P[t] / (1 − P[t]) ≥ α: the least edit for total odds.

        minimise  (x' − x)ᵀ Σ⁻¹ (x' − x)
        subject to  z_t(x') − log Σ_{ℓ≠t} exp z_ℓ(x') ≥ log α

    Never longer than the pairwise edit at (K − 1) α, which is sufficient for the same odds, and the
    same edit for K = 2. The call is that of :meth:`MahalanobisQP.solve`; in the
    :class:`~.solution.Solution`, ``floor``, ``log_odds_before`` and ``log_odds_after`` are logs of
    *total* odds, and every multiplier of an edited example is positive: all rivals are held, each
    in proportion to its probability.

    As there, the odds are read back from the realised activations and the floor is raised by what
    rounding left short. Derivatives in x, W, b, Σ and log α are exact to third order.
    """

    solver_name = ACTIVE_SET

    def __init__(self) -> None:
        super().__init__()
        self.solver_args: dict[str, Any] = {}

    def forward(self, x: Tensor, target: Tensor, log_odds: Floor, geometry: Geometry) -> Solution:
        """The same as :meth:`solve`."""
        return self.solve(x, target, log_odds, geometry)

    def solve(
        self,
        x: Tensor,
        target: Tensor,
        log_odds: Floor,
        geometry: Geometry,
        *,
        realise: Callable[[Tensor], Tensor] | None = None,
    ) -> Solution:
        """Solve with a geometry of one probe.

        Args:
            x: activations, (B, d), any floating dtype.
            target: target classes, (B,) integer.
            log_odds: log α: a number, (B,), or a function of the margins at x, (B, K−1), and of
                the slice of the batch that these are.
            geometry: probe and metric, from :meth:`ProbeGeometry.build`.
            realise: what the model will hold when x' is put in place; default: x' in x's dtype.

        Raises:
            WidthError, TargetError, NonFiniteError: bad input, named.
            SolverError: inside a transform that hides the values, such as ``vmap``.
        """
        _check(x, target, geometry)
        target = target.long()
        margins = geometry.margins(x, target)
        floor = _floor(log_odds, margins)
        before = total_log_odds(margins.detach())
        needed = before < floor
        constraints = geometry.constraints(target)
        wide = x.double()

        def step(aim: Tensor, rows: Rows) -> Attempt:
            some = slice(None) if rows is None else rows
            here, wanted = constraints.rows(rows), needed[some]
            fixed = here.gram.detach()
            start, asked, room = without_constants(
                fixed, margins[some], aim.squeeze(-1), here.noise
            )
            # A floor of −∞ is met by every activation: that example is not asked.
            question = torch.where(wanted & room, asked.detach(), -torch.inf)
            found = solve_total(fixed, start.detach(), question, here.noise)
            reachable = (room | ~wanted) & found.feasible
            wanted = wanted & reachable
            multipliers = total_multipliers(
                here.gram, start, asked, found.multipliers, found.weight, wanted
            )
            residual = total_residual(fixed, start, asked, multipliers).detach()
            edited = geometry.displace(wide[some], target[some], multipliers)
            return Attempt(edited, reachable, (multipliers, torch.where(wanted, residual, 0.0)))

        def read(held: Tensor, rows: Rows) -> Tensor:
            here = target if rows is None else target[rows]
            return total_log_odds(geometry.margins(held, here)).unsqueeze(-1)

        # Total odds change no faster than the fastest of the margins.
        headroom = Headroom.of(x, constraints.length.amax(-1, keepdim=True))
        attempt, read_back = reach(
            floor.unsqueeze(-1), needed, headroom, step, read, dtype=x.dtype, realise=realise
        )
        edited, after = attempt.edited, read_back.squeeze(-1)
        multipliers, residual = attempt.found
        reachable, wanted = attempt.reachable, needed & attempt.reachable
        with torch.no_grad():
            accurate = (after >= floor) & torch.isfinite(after) & (residual <= KKT_TOLERANCE)
            status = torch.full_like(target, Status.SATISFIED)
            status[wanted] = Status.SOLVED
            status[wanted & ~accurate] = Status.INACCURATE
            status[~reachable] = Status.INFEASIBLE
        squared = (multipliers * (constraints.gram @ multipliers.unsqueeze(-1)).squeeze(-1)).sum(-1)
        # The gradient of √0 is infinite; an unedited example has distance 0 and gradient 0.
        distance = torch.where(wanted, squared, 1.0).clamp_min(0.0).sqrt() * wanted
        return Solution(
            x_new=torch.where(wanted.unsqueeze(-1), edited.to(x.dtype), x),
            multipliers=multipliers,
            active=multipliers.detach() > 0,
            distance=distance,
            euclidean=torch.linalg.vector_norm((edited - wide).detach(), dim=-1),
            floor=floor,
            log_odds_before=total_log_odds(margins),
            log_odds_after=torch.where(wanted, after, before),
            kkt_residual=residual,
            status=status,
        )


def _check(x: Tensor, target: Tensor, geometry: Geometry) -> None:
    check_activations(x, geometry.width)
    require_concrete("odds='total'", x, target)
    geometry.check(target, len(x))
    check_finite(x)


def _floor(log_odds: Floor, margins: Tensor) -> Tensor:
    batch = len(margins)
    if callable(log_odds):
        log_odds = log_odds(margins, slice(0, batch))
    floor = torch.as_tensor(log_odds, dtype=torch.float64, device=margins.device)
    require_concrete("odds='total'", margins, floor)
    if floor.shape not in ((), (batch,)):
        raise WidthError(
            f"total odds are one number an example: log_odds must be a number or ({batch},), got "
            f"{tuple(floor.shape)}"
        )
    if not bool(torch.isfinite(floor).all()):
        raise NonFiniteError("log_odds holds NaN or infinity")
    return floor.expand(batch)
