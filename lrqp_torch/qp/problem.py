"""The LRQP quadratic program: the nearest activation at which a probe reads the target."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrqp_torch.errors import (
    WidthError,
    check_activations,
    check_class_shape,
    check_values,
    concrete,
    readable,
)
from lrqp_torch.qp import blind, direct, fused, native
from lrqp_torch.qp.distances import DIRECT
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.geometry import Geometry, ProbeGeometry
from lrqp_torch.qp.implicit import displaced, known, valued
from lrqp_torch.qp.reach import Attempt, Headroom, Realise, Rows, at, excess, reach
from lrqp_torch.qp.solution import Solution, join, statuses
from lrqp_torch.qp.solvers import ACTIVE_SET, ActiveSet, Solver, solver_of
from lrqp_torch.qp.stacked import StackedGeometry, StackedRule
from lrqp_torch.qp.total_odds import TotalOdds, steps

if TYPE_CHECKING:
    from cvxpylayers.torch.cvxpylayer import CvxpyLayer

Floor = Tensor | float | Callable[[Tensor, slice], Tensor]
"""Log α: a number, (B,), (B, m), or a function of the margins (b, m) of a slice of the batch."""

# Buffers above 32 MB are slow on the CPU, where the allocator returns them to the system each
# time; so many numbers of float64 activations, 12 MB, are taken at once.
CHUNK_NUMBERS = 1_572_864


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

    With the default solver, transforms of :mod:`torch.func` and derivatives of every order work
    through ``forward`` and :meth:`solve`. On a GPU :meth:`solve` never waits for the device for
    K ≤ 64, where it is one launch of a kernel (:mod:`~.fused`; for K ≤ 8 also without Triton, in
    more), so it can be captured in a CUDA graph; with a geometry made before it can be compiled
    (``torch.compile(fullgraph=True)``). There, and under ``vmap``, no value can be looked at: bad
    activations and floors end as :attr:`Status.INVALID` instead of an error, and classes
    must lie in range.

    Args:
        n_classes: K ≥ 2.
        solver: a :class:`~.solvers.Solver`, or the name of one: ``"ACTIVE_SET"`` (ours: any device,
            exact); ``"DIFFCP"`` (with Clarabel, CPU only), ``"MOREAU"`` (extra ``moreau``) or
            ``"CUCLARABEL"`` (needs Julia and CUDA) of cvxpylayers.
        solver_args: passed to the cvxpylayers solver.

    Raises:
        SolverError: the solver is unknown or not installed.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        solver: str | Solver = ACTIVE_SET,
        solver_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if n_classes < 2:
            raise WidthError(f"a probe needs at least 2 classes, got {n_classes}")
        self.n_classes = n_classes
        self.solver = solver_of(solver, solver_args)
        self.solver.prepare(n_classes - 1)

    @property
    def solver_name(self) -> str:
        """What the solver is called where edits are saved."""
        return self.solver.name

    @property
    def solver_args(self) -> dict[str, Any]:
        """The options that the solver was made with."""
        return self.solver.args

    @property
    def layer(self) -> "CvxpyLayer":
        """The dual problem as a cvxpylayer: (M, g) or, for DIFFCP, (F, g) → (λ,), batched."""
        return self.solver.layer(self.n_classes - 1)

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
        log_odds: Floor,
        geometry: Geometry,
        *,
        realise: Realise | None = None,
        live: tuple[Tensor, Tensor] | None = None,
        skip: bool = False,
        wrong: Tensor | None = None,
    ) -> Solution:
        """Solve with a geometry computed before.

        Nothing is raised for an unreachable target here: its example comes back unchanged with
        ``Status.INFEASIBLE``. An example whose probe odds already reach α comes back bit for bit.

        Args:
            x: activations, (B, d), any floating dtype.
            target: target classes, (B,) integer; or what else the geometry calls its choice.
            log_odds: log α: a number, (B,), (B, m) for one a constraint, or a function of the
                margins at x, (b, m), and of the slice of the batch that these are.
            geometry: probe and metric, from :meth:`ProbeGeometry.build`.
            realise: what the model will hold when x' is put in place; default: x' in x's dtype.
            live: of what :meth:`fuses`, where ``target`` may be one for all, (1,), and out of
                range: see :func:`.fused.solve`.
            skip: likewise.
            wrong: examples that are INVALID whatever they are, bool, (B,) or ().

        Raises:
            WidthError, TargetError, NonFiniteError: bad input, named.
            SolverError: an external solver failed or cannot run on this device.
        """
        floor = self._check(x, None if live else target, log_odds, geometry)
        chunk = max(1, CHUNK_NUMBERS // geometry.width) if x.device.type == "cpu" else len(x)
        target, batch = target.long(), len(x)
        whole = realise is not None
        route = self._route(x, floor, geometry, realise)
        repeats = alone = total = False
        if route is not None:
            assert isinstance(geometry, ProbeGeometry | StackedGeometry)
            given = floor.log_odds if isinstance(floor, OddsRule | StackedRule) else floor
            tensors = *geometry.rows, *(given if isinstance(given, Sequence) else (given,))
            others = any(isinstance(part, Tensor) and part.requires_grad for part in tensors)
            repeats = torch.is_grad_enabled() and (others or x.requires_grad)
            total = type(self.solver) is TotalOdds
            alone = repeats and not others and route is direct.solve and not total
            alone = alone and isinstance(geometry, ProbeGeometry)
            alone = alone and isinstance(floor, Tensor | OddsRule)
            whole = whole or alone or not repeats
        if route is fused.solve:
            route = partial(route, live=live, skip=skip, total=total)
        elif route is blind.solve and isinstance(geometry, ProbeGeometry):
            chunk = blind.at_once(geometry, total)
            whole = realise is not None or batch <= chunk
            route = partial(route, total=total)
            if whole:
                route, wrong = partial(route, wrong=wrong), None
        elif total:
            route = partial(direct.solve, total=True)
        elif route is None and type(self.solver) is TotalOdds and x.device.type == "cpu":
            # It holds several M, or the normals, of every example at once.
            many = geometry.n_constraints >= DIRECT
            numbers = geometry.n_constraints * (geometry.width if many else geometry.n_constraints)
            chunk = max(1, min(chunk, CHUNK_NUMBERS // numbers))

        def solve(x: Tensor, at: slice) -> Solution:
            own = target if len(x) == batch else target[at]
            if route is None:
                return self._solve(x, own, floor, geometry, realise, at)
            assert isinstance(geometry, ProbeGeometry | StackedGeometry)
            return self._routed(route, x, own, floor, geometry, realise, at, repeats, alone)

        # Autocast would take float32 products of edits in half precision.
        kind = x.device.type
        off = kind == "meta" or not torch.is_autocast_enabled(kind)
        with nullcontext() if off else torch.autocast(kind, enabled=False):
            if whole or batch <= chunk:
                solution = solve(x, slice(0, batch))
            else:
                # Split, not sliced: the gradient of a slice is as large as all of x.
                starts = range(0, batch, chunk)
                parts = zip(x.split(chunk), starts, strict=True)
                solution = join([solve(p, slice(start, start + len(p))) for p, start in parts])
        return solution if wrong is None else solution.invalidate(wrong.expand(batch), x)

    def fuses(self, x: Tensor, geometry: Geometry, realise: Realise | None = None) -> bool:
        """Whether the whole solve is one launch of a kernel; see :mod:`~.fused`."""
        return (
            type(self.solver) in (ActiveSet, TotalOdds)
            and isinstance(geometry, ProbeGeometry)
            and fused.serves(x, geometry.n_classes)
            and geometry.weight.device == x.device
            and (realise is None or fused.places(realise))
        )

    @property
    def is_direct(self) -> bool:
        """Whether our solver solves it, in one call where there is a compiler."""
        solver = type(self.solver)
        own = solver is ActiveSet or (solver is TotalOdds and self.n_classes <= DIRECT)
        return type(self) is MahalanobisQP and own and native.library() is not None

    def _route(
        self,
        x: Tensor,
        floor: Tensor | Callable[[Tensor, slice], Tensor],
        geometry: Geometry,
        realise: Realise | None,
    ) -> Any:
        """What solves a whole edit in one call, :mod:`~.fused` or :mod:`~.direct`; or None."""
        own = type(self.solver)
        if own not in (ActiveSet, TotalOdds):
            return None
        if isinstance(geometry, StackedGeometry):
            # The kernel takes several variables in a model only.
            if not isinstance(floor, StackedRule) or fused.serves(x, 2):
                return None
            return direct.solve if direct.serves(x, floor, geometry, realise) else None
        if not isinstance(geometry, ProbeGeometry):
            return None
        if self.fuses(x, geometry, realise):
            return fused.solve
        if own is TotalOdds and geometry.n_classes > DIRECT:
            return None
        given = floor if isinstance(floor, Tensor | OddsRule) else None
        if direct.serves(x, given, geometry, realise):
            return direct.solve
        return blind.solve if blind.serves(x, geometry) else None

    def _routed(
        self,
        route: Any,
        x: Tensor,
        target: Tensor,
        log_odds: Tensor | Callable[[Tensor, slice], Tensor],
        geometry: ProbeGeometry | StackedGeometry,
        realise: Realise | None,
        rows: slice,
        repeats: bool,
        alone: bool,
    ) -> Solution:
        """Solve by a route, and repeat the last solve in a few operations if it is differentiated.

        These begin at the active sets and floors that the route ended with, so that derivatives are
        as exact as those of :meth:`_solve`, to every order, and numbers those of the route. Where
        it is differentiated in x ``alone``, first derivatives are one call.
        """
        floor: Tensor | OddsRule | StackedRule
        if isinstance(log_odds, OddsRule | StackedRule):
            whole = log_odds.target if isinstance(log_odds, OddsRule) else log_odds.choice
            floor = log_odds.of(rows) if len(whole) > len(target) else log_odds
        elif isinstance(log_odds, Tensor):
            floor = log_odds if len(log_odds) == len(x) else log_odds[rows]
        else:
            if readable(target):
                geometry.check(target, len(x))
            margins = geometry.margins(x, target)
            floor = log_odds(margins, rows)
            if readable(margins):
                check_values(x, margins, floor)
        solution: Solution
        solution, ended = route(x, target, floor, geometry, realise, repeats=repeats)
        if not repeats:
            return solution
        if isinstance(geometry, ProbeGeometry):
            target = target.clamp(0, geometry.n_classes - 1).expand(len(x))
        rule = replace(floor, target=target) if isinstance(floor, OddsRule) else floor
        edit = solution.active.any(-1, keepdim=True)

        total = type(self.solver) is TotalOdds

        def operations(x: Tensor) -> tuple[Tensor, ...]:
            margins = geometry.margins(x, target)
            floors = rule if isinstance(rule, Tensor) else rule(margins)
            shown = floors, self.solver.read(margins).amin(-1) if total else margins.amin(-1)
            if isinstance(rule, StackedRule):
                shown = rule.floors(margins), rule.least(margins)
            bound = floors if floors.ndim == 2 else floors.unsqueeze(-1)
            # How much rounding had the floors raised is no function of anything.
            aims = bound + (ended.aims - bound.detach())
            constraints = geometry.constraints(target)
            if total:
                found = steps(constraints, margins, aims[:, 0], solution.multipliers)
            else:
                gap = torch.where(edit, aims - margins, -1.0)
                found = ended.multipliers(constraints, gap)
            squared = (found * constraints.apply(found)).sum(-1)
            moved = geometry.coefficients(target, found)
            edited = displaced(x, moved, geometry.rows[2], x.detach())
            return edited, found, squared, *shown

        names = "x_new", "multipliers", "squared_distance", "floor", "log_odds_before"
        values = tuple(getattr(solution, name) for name in names)
        if alone and isinstance(geometry, ProbeGeometry) and not isinstance(floor, StackedRule):
            derivative = direct.derivative(ended, x, target, floor, geometry)
            fixed = not (isinstance(floor, OddsRule) and floor.mirror)
            values = known(x, values, derivative, operations, fixed=fixed)
        else:
            values = tuple(map(valued, operations(x), values))
        return replace(solution, **dict(zip(names, values, strict=True)))

    def _solve(
        self,
        x: Tensor,
        choice: Tensor,
        log_odds: Tensor | Callable[[Tensor, slice], Tensor],
        geometry: Geometry,
        realise: Realise | None,
        rows: slice,
    ) -> Solution:
        if readable(choice):
            geometry.check(choice, len(x))
        margins = geometry.margins(x, choice)
        floor = log_odds[rows] if isinstance(log_odds, Tensor) else log_odds(margins, rows)
        if readable(margins) and concrete(floor):
            check_values(x, margins, floor)
        # One floor for all constraints of an example, or one each.
        bound = floor if floor.ndim == 2 else floor.unsqueeze(-1)
        reading = self.solver.read(margins)
        # Sums and minima over numbers take a tenth of the time of those over truth values; a finite
        # sum has finite terms.
        missing = (bound - reading).detach()
        valid = torch.isfinite(missing.sum(-1))
        needed = (missing.amax(-1) > 0) & valid
        if self.solver.one_floor and isinstance(geometry, ProbeGeometry):
            constraints = geometry.by_normals(choice)
        else:
            constraints = geometry.constraints(choice)

        def step(aim: Tensor, rows: Rows) -> Attempt:
            here = constraints if rows is None else constraints.rows(rows)
            found = self.solver.solve(here, at(margins, rows), aim, at(needed, rows))
            moved = here.moved(found.multipliers.detach())
            own = at(x, rows)
            edited = geometry.displace(own, at(choice, rows), found.multipliers, moved)
            if moved is None:
                moved = (edited - own).detach().square().sum(-1)
            again = torch.ones_like(found.feasible) if found.again is None else found.again
            parts = (found.multipliers, found.active, found.residual, found.squared, aim.detach())
            return Attempt(edited, again, (*parts, moved), found.feasible)

        def read(held: Tensor, rows: Rows) -> Tensor:
            return self.solver.read(geometry.margins(held, at(choice, rows)))

        headroom = Headroom.of(x, self.solver.lengths(constraints))
        attempt, after = reach(
            bound,
            needed,
            headroom,
            step,
            read,
            dtype=x.dtype,
            realise=realise,
            raised=headroom.in_advance(missing.clamp_min(0.0)),
        )
        multipliers, active, residual, squared, aimed, moved = attempt.found
        feasible = attempt.reaches
        edit = needed & feasible
        least = (after - bound.detach()).amin(-1)
        reached = (least >= 0) & torch.isfinite(after.sum(-1))
        if multipliers.shape[-1] > 1 and self.solver.least:
            held = realise or (lambda edited: edited.to(x.dtype).double())
            # What was aimed at counts, too: rounding may take off what an edit is too long by.
            surplus = (torch.maximum(after, aimed) - bound.detach()).clamp_min(0.0)
            weight = multipliers.detach()
            # Total odds are one reading, of which all multipliers are parts.
            gap = torch.where(edit & reached, (weight * surplus).sum(-1), 0.0)
            bounds = gap, (weight * constraints.length).sum(-1), squared.detach()
            edited = attempt.edited.detach()
            longer = excess(*bounds, headroom, x.detach(), edited, held)
            residual = torch.maximum(residual, longer)
        accurate = reached & (residual <= self.solver.tolerance)
        before = reading.amin(-1)
        return Solution(
            x_new=_keep(x, attempt.edited.to(x.dtype), edit),
            multipliers=multipliers,
            active=active,
            squared_distance=torch.where(edit, squared, 0.0),
            squared_euclidean=moved,
            floor=floor,
            log_odds_before=before,
            log_odds_after=torch.where(edit, after.amin(-1), before.detach()),
            kkt_residual=residual,
            status=statuses(feasible, edit, accurate, valid),
        )

    def _check(
        self, x: Tensor, choice: Tensor | None, log_odds: Floor, geometry: Geometry
    ) -> Tensor | Callable[[Tensor, slice], Tensor]:
        """Raise for what shapes and dtypes tell; give the floors, (B,) or (B, m)."""
        if geometry.n_constraints != self.n_classes - 1:
            raise WidthError(
                f"the problem is posed for {self.n_classes} classes, the probe has "
                f"{geometry.n_constraints + 1}"
            )
        check_activations(x, geometry.width)
        if isinstance(geometry, ProbeGeometry) and choice is not None:
            check_class_shape(choice, len(x), "target")
        if callable(log_odds):
            return log_odds
        if not isinstance(log_odds, Tensor):
            return torch.full((len(x),), log_odds, dtype=torch.float64, device=x.device)
        floor = log_odds.to(x.device, torch.float64)
        each = (len(x), geometry.n_constraints)
        if self.solver.one_floor and floor.ndim == 2:
            raise WidthError(
                f"total odds are one number an example: log_odds must be a number or ({len(x)},), "
                f"got {tuple(floor.shape)}"
            )
        if floor.shape not in ((), each[:1], each):
            raise WidthError(
                f"log_odds must be a number, ({len(x)},) or {each}, got {tuple(floor.shape)}"
            )
        # A copy, so that the solution does not change with the tensor that was given.
        return (floor.expand(len(x)) if floor.ndim < 2 else floor).clone()


def _keep(x: Tensor, edited: Tensor, edit: Tensor) -> Tensor:
    """The edited activations where there is an edit, and x bit for bit elsewhere."""
    if not readable(edit):
        return torch.where(edit.unsqueeze(-1), edited, x)
    # Selecting rows takes several times as long as copying the few that stay as they are.
    rows = (~edit).nonzero().squeeze(-1)
    return edited.index_copy(0, rows, x[rows]) if len(rows) else edited
