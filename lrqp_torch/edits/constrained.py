"""LRQP with constraints and penalties of one's own, posed in cvxpy and solved as a layer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn

from lrqp_torch.edits.base import Edit, OnInfeasible
from lrqp_torch.edits.failures import judged, skipped
from lrqp_torch.edits.lrqp import LRQP, Classes, Odds, Rule
from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import (
    ConstraintError,
    LRQPError,
    NonFiniteError,
    SavedEditError,
    SolverError,
    WidthError,
    check_activations,
    check_finite,
    in_transforms,
    ordinary,
    quoted,
    require_concrete,
)
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp import Solution, Status
from lrqp_torch.qp.constraints import other_classes
from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.posed import Point, PosedProblem, Reduction
from lrqp_torch.qp.reach import Attempt, Headroom, Realise, Rows, reach
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.positions import Positions

Reads = Literal["activation", "length"] | Tensor
Values = Mapping[str, Tensor | float]

# Constraints count as met within this share of 1 + their terms. Clarabel ends at 1e-9 or better.
MET = 1e-6
# The floors are aimed at by this much more, so that what the solver leaves does not cost a round.
AIM = 1e-8
# An edit shorter than this, in units of the problem, of an activation that meets its floor is none:
# solvers that pose a square as a cone know a length only to the root of their duality gap.
NO_EDIT = 1e-5
MAX_ROUNDS = 8


class ConstrainedLRQP(Edit[Classes]):
    """The least edit that a probe reads as the target, under constraints of one's own.

        minimise  ½ (x' − x)ᵀ Σ⁻¹ (x' − x) + penalties(x')
        subject to  z_t(x') − z_ℓ(x') ≥ log α for all ℓ ≠ t,  and constraints(x')

    ``constraints`` receives a :class:`~lrqp_torch.qp.posed.Point`, whose ``x``, ``displacement``,
    ``features``, ``distance`` and ``radius`` are cvxpy expressions and whose ``parameters`` are
    those declared; it returns cvxpy constraints, and scalar convex expressions as penalties:

        def cap(point):
            return [point.radius <= point.parameters["cap"]]

        edit = ConstrainedLRQP(probe, metric, cap, parameters={"cap": ()}, reads="length")
        x_new = edit(x, target, parameters={"cap": 30.0})

    All is posed as one disciplined parametrised program (Agrawal et al. 2019, "Differentiable
    convex optimization layers") and solved through cvxpylayers. Gradients flow to x, the
    parameters, the probe's bias, and, with ``reads="activation"``, its weights; the metric is
    constant. The odds are promised for the stored numbers, as in :class:`LRQP`; own constraints
    hold to 1e-6 of their terms and the rounding of the stream. Terms apply to every activation, so
    one whose odds are right already moves if it breaks a constraint or a penalty pulls it.

    Cost: a solver run an example, in a thread pool. With ``reads="length"`` or n features the
    problem has K + n variables, some 5 ms an example at any d. With ``"activation"`` it has d, and
    d² numbers: 7 ms at d = 64, 20 ms at d = 256, 60 ms at d = 768 (one CPU core, K = 3). By
    default x' is exact to about 1e-5 of the edit's length, since DIFFCP takes the square as a cone;
    ``solver="MOREAU"`` (extra ``moreau``) takes it as it is and reaches 1e-8.

    Args:
        probe: z(x) = W x + b; see :class:`LRQP`.
        metric: Σ, with the mean if ``point.radius`` is used.
        constraints: the function.
        parameters: name to shape, or to a ``cp.Parameter`` (with ``nonneg=True``, say); values are
            given with each call, one for all or one an activation.
        reads: what of x' the function uses: ``"activation"``, all of it; a tensor F (n, d), only
            ``point.features`` = F x' and lengths; ``"length"``, only lengths.
        log_odds: as in :class:`LRQP`.
        rule: likewise.
        odds: likewise.
        on_infeasible: likewise.
        solver: ``"DIFFCP"`` (with Clarabel), ``"MOREAU"``, ``"CUCLARABEL"``, …, as far as the
            solver has the cones that the terms need.
        solver_args: passed to it.

    Raises:
        ConstraintError: terms that are not convex or not DPP, with what to change.
        SolverError: the solver is not installed.
        WidthError, NonFiniteError, LRQPError: as in :class:`LRQP`.
    """

    def __init__(
        self,
        probe: nn.Linear,
        metric: Mahalanobis,
        constraints: Callable[[Point], Any],
        *,
        parameters: Mapping[str, Any] | None = None,
        reads: Reads = "activation",
        log_odds: float = 10.0,
        rule: Rule = "mirror",
        odds: Odds = "pairwise",
        on_infeasible: OnInfeasible = "raise",
        solver: str = "DIFFCP",
        solver_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(on_infeasible)
        self.edit = LRQP(
            probe, metric, log_odds=log_odds, rule=rule, odds=odds, on_infeasible=on_infeasible
        )
        self.constraints = constraints
        self.declared = dict(parameters or {})
        self.features = _rows_read(reads, self.probe.width)
        self.solver, self.solver_args = solver, dict(solver_args or {})
        # Not a submodule: what is posed can be neither copied nor saved, and follows from the rest.
        self._posed: list[tuple[object, list[Tensor], Reduction, PosedProblem]] = []
        self._pose()

    @property
    def probe(self) -> LinearProbe:
        """The probe whose odds are written."""
        return self.edit.probe

    @property
    def metric(self) -> Mahalanobis:
        """The metric in which edits are least."""
        return self.edit.metric

    @property
    def n_classes(self) -> int:
        """K."""
        return self.edit.n_classes

    def solve(
        self,
        x: Tensor,
        target: Classes,
        source: Classes | None = None,
        *,
        parameters: Values | None = None,
        realise: Realise | None = None,
        examples: Tensor | None = None,
    ) -> Solution:
        """Edit activations, and return the certificate with them.

        In the :class:`Solution`, ``multipliers`` are zero (the solver's are not asked for),
        ``active`` says which floors bind, and ``kkt_residual`` is the largest violation of any
        constraint, relative to 1 + its terms; that the edit is the least is the solver's word.

        Args:
            x: activations, (B, d).
            target: class to write, (B,) or one for all.
            source: class that holds now, for the ``mirror`` rule; default the probe's reading.
            parameters: values of the declared parameters, of their shape or (B, *shape).
            realise: see :meth:`MahalanobisQP.solve`.
            examples: names for the rows in error messages, (B,); default 0, 1, ….

        Raises:
            InfeasibleError: no activation meets all constraints, unless on_infeasible is "skip".
            SolverError: the solver failed, unless on_infeasible is "skip"; or in torch.func.
            ConstraintError: parameters that were not declared, or not given, or of another shape,
                sign or kind; or an objective without a lower bound.
            WidthError, TargetError, NonFiniteError: bad input, named.
        """
        given = dict(parameters or {})
        check_activations(x, self.probe.width)
        require_concrete("ConstrainedLRQP", x, target, source, self.probe.weight, *given.values())
        if in_transforms():
            raise SolverError(
                "ConstrainedLRQP is solved by cvxpylayers, whose derivatives torch.func (grad, "
                "jvp, vmap) cannot ask for: use torch.autograd, or LRQP or JointLRQP"
            )
        geometry = self.edit.geometry(x.device)
        basis, problem = self._pose()
        basis = basis.to(x.device)
        check_finite(x)

        classes = self.row_classes(target, x, "target")
        held = None if source is None else self.row_classes(source, x, "source")
        margins = geometry.margins(x, classes)
        floor = self.edit.floors(margins, classes, held, sufficient=True)
        values = self._values(problem, basis, geometry, x, classes, given)
        solution = _solve_posed(
            problem, x, classes, floor, margins, geometry, basis, values, realise
        )
        return judged(self, skipped(solution, x, self.on_infeasible), x, classes, examples)

    def bind(
        self, run: EditRun, *, parameters: Values | None = None, **given: Any
    ) -> dict[str, Any]:
        """See :meth:`Edit.bind`: the parameters, one value for all, one an example or one a
        position; in a scope one for all or one a request.
        """
        problem, asked = self._pose()[1], dict(parameters or {})
        _check_names(problem, asked)
        placed = {n: _placed(problem, n, value, run.positions) for n, value in asked.items()}
        return {"parameters": placed, **super().bind(run, **given)}

    def edit_rows(
        self, x: Tensor, target: Tensor, source: Tensor | None, context: EditContext, **given: Any
    ) -> Solution:
        """See :meth:`Edit.edit_rows`: each position with its own parameters."""
        rows = context.index if context.request is None else context.request
        own = {
            name: value.to(x.device)[rows if len(value) > 1 else torch.zeros_like(rows)]
            for name, value in given["parameters"].items()
        }
        return super().edit_rows(x, target, source, context, parameters=own)

    def unreachable(self, target: Tensor, which: str) -> str:
        """See :meth:`Edit.unreachable`."""
        return (
            f"no activation meets the odds and your constraints together for {which}: loosen a "
            f"constraint, turn it into a penalty, lower log_odds, or pass on_infeasible='skip' to "
            f"leave them unchanged"
        )

    def _write(self, folder: Path, notes: dict[str, Any]) -> NoReturn:
        raise SavedEditError(
            "an edit with constraints of your own cannot be saved: the function is code, and "
            "reading a saved edit executes nothing. Save edit.edit, which has the probe, the "
            "metric and the odds, and pass the function again: ConstrainedLRQP(saved.probe, "
            "saved.metric, function)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_posed": []}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _pose(self) -> tuple[Reduction, PosedProblem]:
        """The basis and the problem in it; posed anew only when what it is made of changes."""
        metric, weight = self.metric, self.probe.weight
        tensors = [metric.own(), weight, metric.mean, self.features]
        given = [tensor for tensor in tensors if tensor is not None]
        told = (
            [tensor is None for tensor in tensors],
            self.constraints,
            dict(self.declared),
            self.solver,
            dict(self.solver_args),
        )
        if self._posed:
            before, copies, basis, problem = self._posed[0]
            pairs = zip(copies, given, strict=False)
            if before == told and all(torch.equal(old, new.cpu()) for old, new in pairs):
                return basis, problem
        basis = Reduction.build(metric.own(), metric.mean, weight, self.features)
        problem = PosedProblem(
            self.constraints,
            basis,
            self.probe.n_classes - 1,
            self.features,
            self.declared,
            self.solver,
            self.solver_args,
        )
        copies = [tensor.detach().cpu().clone() for tensor in given]
        self._posed = [(told, copies, basis, problem)]
        return basis, problem

    def _values(
        self,
        problem: PosedProblem,
        basis: Reduction,
        geometry: ProbeGeometry,
        x: Tensor,
        target: Tensor,
        parameters: Values,
    ) -> list[Tensor]:
        """Values of all parameters but the gap, (B, …) each, in the order of the problem."""
        _check_names(problem, parameters)
        if torch.is_grad_enabled() and (
            self.metric.own().requires_grad
            or (self.probe.weight.requires_grad and not basis.complete)
        ):
            raise ConstraintError(
                "the metric, and with reads= other than 'activation' the probe's weights, are "
                "constants of the posed problem: detach them (requires_grad_(False))"
            )
        wide = x.double()
        other = other_classes(target, geometry.n_classes, x.device)
        normals = geometry.weight[target].unsqueeze(-2) - geometry.weight[other]
        values: dict[str, Tensor] = {"x": wide}
        if self.features is not None:
            values["features"] = wide @ self.features.to(x.device).T
        if "centred" in problem.given:
            values["centred"], _ = basis.centred(wide)
        own = [_spread(problem, name, parameters[name], len(x)) for name in problem.parameters]
        return [
            basis.slopes(normals),
            *(values[name] for name in problem.given),
            *(value.to(x.device) for value in own),
        ]


def _rows_read(reads: Reads, width: int) -> Tensor | None:
    """The rows F that the function reads, (n, d), none for lengths; None for all of x'."""
    if isinstance(reads, Tensor):
        if reads.ndim != 2 or reads.shape[1] != width or not reads.is_floating_point():
            raise WidthError(
                f"reads must be rows (n, {width}) of what the function uses of x', got "
                f"{reads.dtype} {tuple(reads.shape)}"
            )
        if not bool(torch.isfinite(reads).all()):
            raise NonFiniteError("reads holds NaN or infinity")
        return ordinary(reads.detach().cpu().double())
    if reads == "activation":
        return None
    if reads == "length":
        return ordinary(torch.zeros(0, width, dtype=torch.float64))
    raise LRQPError(
        f"reads must be 'activation', 'length' or a tensor (n, {width}), got {quoted(reads)}"
    )


def _check_names(problem: PosedProblem, parameters: Values) -> None:
    """Raise :class:`ConstraintError` unless all declared parameters are given, and no others."""
    declared = set(problem.parameters)
    unknown, missing = set(parameters) - declared, declared - set(parameters)
    wrong = [f"{sorted(unknown)} were not declared"] if unknown else []
    wrong += [f"{sorted(missing)} have no value"] if missing else []
    if wrong:
        raise ConstraintError(f"the parameters are {sorted(declared)}: {', '.join(wrong)}")


def _given(
    problem: PosedProblem, name: str, value: Tensor | float, *leads: tuple[int, ...]
) -> Tensor:
    """A parameter's values, of its shape behind nothing or one of some leading shapes, checked."""
    shape = tuple(problem.parameters[name].shape)
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConstraintError(f"parameter {name!r} must be numbers, got {quoted(value)}") from error
    if tensor.is_complex():
        raise ConstraintError(f"parameter {name!r} must be real, got {tensor.dtype}")
    if tensor.shape not in (shape, *((*lead, *shape) for lead in leads)):
        known = " or ".join(str((*lead, *shape)) for lead in ((), *leads))
        raise ConstraintError(f"parameter {name!r} must be {known}, got {tuple(tensor.shape)}")
    tensor = tensor.double()
    for one in tensor.reshape(-1, *shape):
        problem.check_value(name, one)
    return tensor


def _spread(problem: PosedProblem, name: str, value: Tensor | float, batch: int) -> Tensor:
    """A parameter's value for each example, (B, *shape)."""
    return _given(problem, name, value, (batch,)).expand(batch, *problem.parameters[name].shape)


def _placed(
    problem: PosedProblem, name: str, value: Tensor | float, positions: Positions
) -> Tensor:
    """A copy of a parameter's value for each position, or request of a scope; or (1, …) for all."""
    axes = len(problem.parameters[name].shape)
    if positions.scope is not None:
        count = positions.requests
        if count is None and getattr(value, "ndim", axes) > axes:
            count = len(cast(Tensor, value))
        found = _given(problem, name, value, *(() if count is None else ((count,),)))
        if found.ndim > axes:
            positions.requests = count
    else:
        batch, grid = cast(int, positions.batch), positions.grid
        found = _given(problem, name, value, (batch,), *((grid,) if len(grid) > 1 else ()))
        if found.ndim > axes + 1:
            at = positions.example, positions.token
            found = found[at] if positions.is_mask else found.flatten(0, 1)
        elif found.ndim > axes:
            found = found[positions.example]
    return (found if found.ndim > axes else found[None]).clone()


def _solve_posed(
    problem: PosedProblem,
    x: Tensor,
    target: Tensor,
    floor: Tensor,
    margins: Tensor,
    geometry: ProbeGeometry,
    basis: Reduction,
    values: list[Tensor],
    realise: Realise | None,
) -> Solution:
    """Solve for the stored numbers: floors that rounding misses are raised, and solved again."""
    wide, bound = x.double(), floor.unsqueeze(-1)
    headroom = Headroom.of(x, geometry.constraints(target).length)
    raised = headroom.in_advance(bound) + AIM * (1 + bound.detach().abs())
    held = (margins >= bound).all(-1)
    status, violation = _first_look(problem, values, bound - margins, raised, held)
    solved = status == Status.SOLVED

    def step(aim: Tensor, rows: Rows) -> Attempt:
        everyone = torch.arange(len(x), device=x.device)
        asked = everyone[solved] if rows is None else rows[solved[rows]]
        gap = aim - margins if rows is None else margins.index_copy(0, rows, aim - margins[rows])
        moved = wide.new_zeros(len(x), basis.size)
        if len(asked):
            found = problem.solve([values[0], gap, *values[1:]], asked)
            moved = moved.index_put((asked,), found)
        rows = everyone if rows is None else rows
        moved = moved[rows]
        return Attempt(basis.displace(wide[rows], moved), solved[rows], (moved,))

    def read(stored: Tensor, rows: Rows) -> Tensor:
        return geometry.margins(stored, target if rows is None else target[rows])

    attempt, after = reach(
        bound,
        solved,
        headroom,
        step,
        read,
        dtype=x.dtype,
        realise=realise,
        raised=raised,
        rounds=MAX_ROUNDS,
    )
    edited, (moved,) = attempt.edited, attempt.found
    with torch.no_grad():
        still = solved & held & (torch.linalg.vector_norm(moved, dim=-1) <= NO_EDIT)
        reached = ((after >= bound) & torch.isfinite(after)).all(-1)
        status = torch.where(solved & ~reached, int(Status.INACCURATE), status)
        status = torch.where(still, int(Status.SATISFIED), status)
        edit = (status == Status.SOLVED) | (status == Status.INACCURATE)
        before = margins.amin(-1)
    return Solution(
        x_new=torch.where(edit.unsqueeze(-1), edited.to(x.dtype), x),
        multipliers=torch.zeros_like(after),
        active=edit.unsqueeze(-1) & (after <= bound + MET * (1 + bound.abs())),
        squared_distance=(moved / basis.unit).square().sum(-1) * edit,
        squared_euclidean=(edited - wide).detach().square().sum(-1) * edit,
        floor=floor,
        log_odds_before=before,
        log_odds_after=torch.where(edit, after.amin(-1), before),
        kkt_residual=violation,
        status=status,
    )


@torch.no_grad()
def _first_look(
    problem: PosedProblem, values: list[Tensor], asked: Tensor, raised: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """Which examples can be solved, (B,) status, and how far each is from its constraints.

    Where the floors hold and nothing else pulls or is broken, no edit is the least one.
    Solvers return garbage for infeasible examples, or refuse the whole batch. So what they
    return is held against the constraints, and what fails is solved alone for a verdict; only
    sound examples go through the layer that gradients flow through. Infeasible is one whose gaps
    are as they were ``asked``, not ``raised``.
    """
    gap = asked + raised
    everything = [values[0], gap, *values[1:]]
    batch, device = len(gap), gap.device
    if not batch:
        return gap.new_zeros(0, dtype=torch.long), gap.new_zeros(0)
    nowhere = values[0].new_zeros(values[0].shape[-1])
    idle = [
        not problem.penalties and problem.violation(everything, i, nowhere) == 0
        for i in range(batch)
    ]
    satisfied = held & torch.tensor(idle, dtype=torch.bool, device=device)
    try:
        found = problem.solve(everything, torch.arange(batch, device=device))
    except SolverError:
        found = gap.new_full((batch, values[0].shape[-1]), torch.nan)
    reached = (values[0] @ found.unsqueeze(-1)).squeeze(-1)
    short = ((gap - reached) / (1 + gap.abs())).amax(-1).clamp_min(0.0)
    refused = found.isnan().any(-1).tolist()
    own = [
        torch.nan if refused[i] else problem.violation(everything, i, found[i])
        for i in range(batch)
    ]
    violation = torch.maximum(short, torch.tensor(own, dtype=gap.dtype, device=device))
    violation = torch.where(satisfied, 0.0, violation)
    status = torch.where(satisfied, int(Status.SATISFIED), int(Status.SOLVED))
    for i in (~(violation <= MET)).nonzero().squeeze(-1).tolist():
        verdict = problem.verdict(everything, i)
        if verdict.startswith("unbounded"):
            raise ConstraintError(
                f"the objective of example {i} has no lower bound that a solver finds: a penalty "
                f"falls without end, or by too large a factor; bound it or scale it down"
            )
        infeasible = verdict.startswith("infeasible")
        if infeasible:
            verdict = problem.verdict([values[0], asked, *values[1:]], i)
            infeasible = verdict.startswith("infeasible")
        status[i] = int(Status.INFEASIBLE if infeasible else Status.INACCURATE)
        if verdict == "optimal" and refused[i]:
            # Only its company was refused.
            status[i], violation[i] = int(Status.SOLVED), 0.0
    return status, violation.nan_to_num(torch.inf)
