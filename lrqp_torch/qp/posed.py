"""The edit posed in cvxpy with constraints and penalties of the user's own.

The variable is v, the displacement in an orthonormal basis of whitened coordinates: with
Σ = u² L Lᵀ and D = L Qᵀ, x' = x + D v and the Mahalanobis length of the edit is ‖v‖ / u. The unit u
is such that class differences have length 1 in L at most: then v is of the size of the log odds
that it moves, whatever the scale of Σ, and the solver meets the same numbers at each. With Q = I
that is every displacement in the range of Σ. Where the user's terms read x' only through rows
F, or only through lengths, the optimum lies in the span of Σ Aᵀ, Σ Fᵀ and x − μ (any part of the
edit outside lengthens it and changes nothing else), so that v needs K + n coordinates and not d.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from lrqp_torch.errors import ConstraintError, SolverError
from lrqp_torch.probes.keeping import orthonormal_basis
from lrqp_torch.qp.layer import make_layer
from lrqp_torch.qp.solvers import CvxpySolver

Terms = Iterable[cp.Constraint | cp.Expression]

REWRITE = (
    "Each must be affine in the parameters when x' is held, and may not multiply two parameters, "
    "or take a nonlinear function of one (https://www.cvxpy.org/tutorial/dpp): compute the product "
    "or function in torch and declare it as a parameter of its own; write quad_form(x, P) with a "
    "parameter P as sum_squares(F @ x) with P = Fᵀ F; and write p1 * (p2 * x) as p12 * x"
)


@dataclass(frozen=True)
class Reduction:
    """An orthonormal basis Q of whitened displacements; with Σ = u² L Lᵀ, δ = L Qᵀ v.

    Where displacements are reduced and the mean μ is known, one more coordinate, each activation's
    own, runs along the part of x − μ that the basis leaves out: moving x' towards the mean is all
    that can be gained there.
    """

    directions: Tensor  # D = L Qᵀ, (d, k): ‖v‖ / u is the Mahalanobis length of D v
    rows: Tensor  # Q, (k, r), r the rank of Σ
    factor: Tensor  # L, (d, r)
    # V S^{-1/2}, (d, r), of L Lᵀ = V S Vᵀ: whitened coordinates are x times this.
    whitening: Tensor
    unit: float  # u
    mean: Tensor | None  # μ, (d,), or None
    complete: bool  # whether every displacement in the range of Σ is among them, k = r

    @classmethod
    @torch.no_grad()
    def build(
        cls, covariance: Tensor, mean: Tensor | None, weight: Tensor, features: Tensor | None
    ) -> "Reduction":
        """The whole range of Σ, or the span of class differences and features alone.

        Args:
            covariance: Σ, (d, d).
            mean: μ, (d,), if it is known.
            weight: the probe's W, (K, d).
            features: rows F, (n, d), n ≥ 0; None for the whole range.
        """
        covariance, weight = (part.detach().cpu().double() for part in (covariance, weight))
        largest = covariance.abs().amax().clamp_min(torch.finfo(covariance.dtype).tiny)
        values, vectors = torch.linalg.eigh(covariance / largest)
        present = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        scale, centred = values[present].sqrt(), weight - weight.mean(0)
        length = torch.linalg.vector_norm(centred @ vectors[:, present] * scale, dim=-1).amax()
        # A power of 2, by which nothing is rounded.
        length = torch.exp2(length.log2().round()) if length > 0 else torch.ones_like(length)
        unit, scale = float(largest.sqrt() * length), scale / length
        factor, whitening = vectors[:, present] * scale, vectors[:, present] / scale
        mean = None if mean is None else mean.detach().cpu().double()
        if features is None:
            identity = torch.eye(len(scale), dtype=torch.float64)
            return cls(factor, identity, factor, whitening, unit, mean, complete=True)
        read = torch.cat([centred, features.detach().cpu().double()])
        rows = orthonormal_basis(read @ factor)
        if not len(rows):
            # Nothing of x' is read, but a program needs a variable: any one direction.
            rows = torch.eye(1, len(scale), dtype=torch.float64)
        return cls(factor @ rows.T, rows, factor, whitening, unit, mean, complete=False)

    @property
    def size(self) -> int:
        """How many coordinates v has."""
        return len(self.rows) + (not self.complete and self.mean is not None)

    def to(self, device: torch.device) -> "Reduction":
        """The same on another device."""
        return Reduction(
            self.directions.to(device),
            self.rows.to(device),
            self.factor.to(device),
            self.whitening.to(device),
            self.unit,
            None if self.mean is None else self.mean.to(device),
            self.complete,
        )

    def slopes(self, rows: Tensor) -> Tensor:
        """How rows that lie in the basis, (..., n, d), change with v: (..., n, size)."""
        slopes = rows @ self.directions
        return torch.nn.functional.pad(slopes, (0, self.size - slopes.shape[-1]))

    def centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of x − μ, (B, size), of norm u times its radius; and the own direction.

        The latter, (B, d), has Mahalanobis length 1 / u, or 0 where the basis leaves nothing out.
        """
        assert self.mean is not None
        whitened = (x - self.mean) @ self.whitening
        inside = whitened @ self.rows.T
        if self.complete:
            return inside, torch.zeros_like(x)
        rest = whitened - inside @ self.rows
        # The gradient of a norm at 0 is undefined; there nothing is left out.
        square = rest.square().sum(-1, keepdim=True)
        empty = square <= 1e-24 * (1 + whitened.detach().square().sum(-1, keepdim=True))
        outside = torch.where(empty, 1.0, square).sqrt()
        own = torch.where(empty, 0.0, rest / outside) @ self.factor.T
        return torch.cat([inside, torch.where(empty, 0.0, outside)], -1), own

    def displace(self, x: Tensor, moved: Tensor) -> Tensor:
        """The activations x' = x + D v, (B, d), own direction included."""
        size = len(self.rows)
        edited = x + moved[:, :size] @ self.directions.T
        if self.size == size:
            return edited
        return edited + moved[:, size:] * self.centred(x)[1]


class Declared(dict[str, cp.Parameter]):
    """Parameters by name; one that was not declared is named."""

    def __missing__(self, name: str) -> cp.Parameter:
        raise ConstraintError(
            f"the function reads parameter {name!r}, the declared ones are {list(self)}: declare "
            f"it by parameters={{{name!r}: shape}}"
        )


class Point:
    """The edited activation x', as a user's function sees it: cvxpy expressions.

    Attributes:
        parameters: the declared parameters by name, to be given for each example.
    """

    def __init__(
        self,
        variable: cp.Variable,
        reduction: Reduction,
        features: Tensor | None,
        parameters: Mapping[str, cp.Parameter],
    ) -> None:
        self.parameters = Declared(parameters)
        self._variable, self._reduction, self._features = variable, reduction, features
        # Parameters that follow from x; made when first asked for, since cvxpylayers refuses one
        # that no term uses.
        self.given: dict[str, cp.Parameter] = {}

    @property
    def x(self) -> cp.Expression:
        """The edited activation x', (d,); with ``reads="activation"`` only."""
        if self._features is not None:
            raise ConstraintError(
                "the function reads x', but the problem was reduced by reads=; leave reads at "
                "'activation', or use point.features, point.distance and point.radius only"
            )
        x: cp.Expression = self._given("x", len(self._reduction.directions)) + self.displacement
        return x

    @property
    def displacement(self) -> cp.Expression:
        """The edit x' − x, (d,); with ``reads="activation"`` only."""
        if self._features is not None:
            raise ConstraintError("the function reads x' − x; leave reads at 'activation'")
        moved: cp.Expression = self._reduction.directions.numpy() @ self._variable
        return moved

    @property
    def features(self) -> cp.Expression:
        """The rows that were declared, at x': F x', (n,)."""
        if self._features is None or len(self._features) == 0:
            raise ConstraintError("no features were declared: pass reads=F, a tensor (n, d)")
        slopes = self._reduction.slopes(self._features).numpy()
        features: cp.Expression = (
            self._given("features", len(self._features)) + slopes @ self._variable
        )
        return features

    @property
    def distance(self) -> cp.Expression:
        """The Mahalanobis length √((x'−x)ᵀ Σ⁻¹ (x'−x)) of the edit, ()."""
        length: cp.Expression = cp.norm(self._variable) / self._reduction.unit
        return length

    @property
    def radius(self) -> cp.Expression:
        """The Mahalanobis distance √((x'−μ)ᵀ Σ⁻¹ (x'−μ)) of x' from the mean, ().

        Measured in the range of Σ; the metric must have its mean.
        """
        if self._reduction.mean is None:
            raise ConstraintError(
                "point.radius needs the mean of the activations: use a metric with one, such as "
                "Mahalanobis.fit(x) makes"
            )
        centred = self._given("centred", self._reduction.size)
        length: cp.Expression = cp.norm(centred + self._variable) / self._reduction.unit
        return length

    def _given(self, name: str, size: int) -> cp.Parameter:
        return self.given.setdefault(name, cp.Parameter(size, name=name))


class PosedProblem:
    """Minimise ½‖v‖² / u² + penalties subject to R v ≥ g and the user's constraints, as a layer.

    Args:
        function: maps a :class:`Point` to constraints and scalar convex penalties.
        reduction: the displacements to seek among.
        n_rivals: K − 1.
        features: F, (n, d) with n ≥ 0, or None for the whole activation.
        declared: name to the shape of a parameter, or to a ``cp.Parameter``.
        solver: a solver of cvxpylayers.
        solver_args: passed to it.

    Raises:
        ConstraintError: what the function returns is not convex, not DPP, or not terms at all.
        SolverError: the solver is not installed.
    """

    def __init__(
        self,
        function: Callable[[Point], Any],
        reduction: Reduction,
        n_rivals: int,
        features: Tensor | None,
        declared: Mapping[str, Any],
        solver: str,
        solver_args: dict[str, Any],
    ) -> None:
        size = reduction.size
        self.variable = cp.Variable(size, name="displacement")
        self.rows = cp.Parameter((n_rivals, size), name="rows")
        self.gap = cp.Parameter(n_rivals, name="gap")
        self.parameters = {name: _declare(name, shape) for name, shape in declared.items()}
        point = Point(self.variable, reduction, features, self.parameters)
        own, penalties = _sort(_call(function, point))
        self.own, self.penalties, self.given = own, penalties, point.given
        objective = cp.sum_squares(self.variable) / 2
        if penalties:
            objective = objective / reduction.unit**2 + sum(penalties)
        reached = self.rows @ self.variable >= self.gap
        self.problem = cp.Problem(cp.Minimize(objective), [reached, *own])
        self._check_atoms()
        used = {parameter.id for parameter in self.problem.parameters()}
        unused = [name for name, item in self.parameters.items() if item.id not in used]
        if unused:
            raise ConstraintError(f"parameters {unused} were declared, but no term uses them")
        self.order = [self.rows, self.gap, *self.given.values(), *self.parameters.values()]
        self.solver = CvxpySolver(solver, solver_args)
        self.layer = make_layer(
            self.problem, self.order, self.variable, self.solver.name, self.solver.args
        )

    def solve(self, values: list[Tensor], rows: Tensor) -> Tensor:
        """V of the examples in ``rows``, (n,) integer; differentiable. Values are (B, …).

        Raises:
            SolverError: the solver refused the whole batch.
        """
        device = values[0].device
        chosen = [value[rows] for value in values]
        if self.solver.on_cpu:
            chosen = [value.cpu() for value in chosen]
        try:
            (result,) = self.layer(*chosen)
        except Exception as error:
            raise SolverError(
                f"{self.solver.name} failed on a batch of {len(rows)}: {error}"
            ) from error
        moved: Tensor = result.to(device)
        return moved

    def check_value(self, name: str, value: Tensor) -> None:
        """Raise :class:`ConstraintError` unless a declared parameter can have this value."""
        parameter = self.parameters[name]
        try:
            parameter.value = value.detach().cpu().numpy()
        except ValueError as error:
            raise ConstraintError(
                f"parameter {name!r} cannot be {value.tolist()}: {error}"
            ) from error
        if not bool(value.isfinite().all()):
            raise ConstraintError(f"parameter {name!r} holds NaN or infinity: {value.tolist()}")

    def violation(self, values: list[Tensor], example: int, displacement: Tensor) -> float:
        """The largest violation of the user's constraints at v, relative to 1 + its terms."""
        self._fill(values, example)
        self.variable.value = displacement.detach().cpu().numpy()
        worst = 0.0
        for constraint in self.own:
            broken = float(np.max(constraint.violation(), initial=0.0))
            sizes = [float(np.max(np.abs(term.value), initial=0.0)) for term in constraint.args]
            worst = max(worst, broken / (1 + max(sizes, default=0.0)))
        return worst

    def verdict(self, values: list[Tensor], example: int) -> str:
        """What cvxpy says of one example, solved alone: ``"optimal"``, ``"infeasible"``, …."""
        self._fill(values, example)
        try:
            self.problem.solve(solver=cp.CLARABEL)
        except cp.error.SolverError:
            return "solver_error"
        return str(self.problem.status)

    def _check_atoms(self) -> None:
        """Raise for variables and parameters of elsewhere, and constants that are not finite."""
        known = {self.variable.id, self.rows.id, self.gap.id}
        known |= {item.id for item in (*self.given.values(), *self.parameters.values())}
        atoms = [*self.problem.variables(), *self.problem.parameters()]
        foreign = [f"{type(item).__name__} {item}" for item in atoms if item.id not in known]
        if foreign:
            raise ConstraintError(
                f"the terms use {', '.join(foreign)}, made outside: write them with point.x, "
                f"point.displacement, point.features, point.distance or point.radius, and declare "
                f"parameters by parameters={{name: shape}}"
            )
        # A finite sum has finite terms, and sparse constants have one too.
        if not all(np.isfinite(constant.value.sum()) for constant in self.problem.constants()):
            raise ConstraintError("a constant in the terms holds NaN or infinity")

    def _fill(self, values: list[Tensor], example: int) -> None:
        for parameter, value in zip(self.order, values, strict=True):
            parameter.value = value[example].detach().cpu().numpy()


def _call(function: Any, point: Point) -> Any:
    if not callable(function):
        raise ConstraintError(f"constraints must be a function of a point, got {function!r}")
    try:
        inspect.signature(function).bind(point)
    except (TypeError, ValueError) as error:
        raise ConstraintError(
            f"constraints must be a function of one argument, the point: {error}"
        ) from error
    try:
        return function(point)
    except TypeError as error:
        if Point.__name__ not in str(error):
            raise
        raise ConstraintError(
            f"the function used its point as if it were x': that is point.x ({error})"
        ) from error


def _declare(name: str, shape: Any) -> cp.Parameter:
    if isinstance(shape, cp.Parameter):
        return shape
    if isinstance(shape, int):
        return cp.Parameter(shape, name=name)
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
        return cp.Parameter(shape, name=name)
    raise ConstraintError(
        f"parameter {name!r} must be declared by a shape, such as () or (5,), or as a "
        f"cp.Parameter, got {shape!r}"
    )


def _sort(terms: Any) -> tuple[list[cp.Constraint], list[cp.Expression]]:
    """Constraints and penalties apart, each checked to be convex and DPP."""
    if isinstance(terms, cp.Constraint | cp.Expression):
        terms = [terms]
    if not isinstance(terms, Iterable) or isinstance(terms, str):
        raise ConstraintError(
            f"the function must return cvxpy constraints and scalar penalties, got {terms!r}"
        )
    constraints: list[cp.Constraint] = []
    penalties: list[cp.Expression] = []
    for place, term in enumerate(terms):
        if isinstance(term, cp.Constraint):
            constraints.append(term)
        elif isinstance(term, cp.Expression) and term.size == 1:
            penalties.append(cp.reshape(term, (), order="C") if term.shape else term)
        else:
            shape = f" of shape {term.shape}" if isinstance(term, cp.Expression) else ""
            raise ConstraintError(
                f"term {place} is {type(term).__name__}{shape}: a term is a cvxpy constraint, or a "
                f"scalar convex expression to add to the objective"
            )
        if isinstance(term, cp.Constraint):
            convex, ready = term.is_dcp(), term.is_dcp(dpp=True)
        else:
            convex, ready = term.is_convex(), term.is_dpp() and term.is_convex()
        if not convex:
            raise ConstraintError(
                f"term {place} is not convex by cvxpy's rules: {term}. Write convex ≤ concave (a "
                f"cap on a norm, say, not a floor), affine == affine, and convex penalties"
            )
        if not ready:
            raise ConstraintError(
                f"term {place} is convex, but not in a form that can be differentiated in its "
                f"parameters (not DPP): {term}. {REWRITE}"
            )
    if not constraints and not penalties:
        raise ConstraintError("the function returned no terms: use LRQP, which is exact and faster")
    return constraints, penalties
