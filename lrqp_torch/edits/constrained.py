"""LRQP with constraints and penalties of one's own, posed in cvxpy and solved as a layer."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from lrqp_torch.edits.constrained_judging import judge_solution
from lrqp_torch.edits.constrained_placing import solve_with
from lrqp_torch.edits.constrained_solving import solve_posed
from lrqp_torch.edits.constrained_values import (
    Reads,
    Values,
    parameter_values,
    row_classes,
    rows_read,
)
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.odds import Odds, Rule, floors
from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import SavedEditError, check_activations, check_finite, require_concrete
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp import Solution
from lrqp_torch.qp.posed import Point, PosedProblem
from lrqp_torch.qp.problem import Realise
from lrqp_torch.qp.reduction import Reduction
from lrqp_torch.stream.intervene import Intervention, intervene_once
from lrqp_torch.stream.scopes import Where


class ConstrainedLRQP(nn.Module):
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
        probe: z(x) = W x + b.
        metric: Σ, with the mean if ``point.radius`` is used.
        constraints: the function.
        parameters: name to shape, or to a ``cp.Parameter`` (with ``nonneg=True``, say); values are
            given with each call, one for all or one an activation.
        reads: what of x' the function uses: ``"activation"``, all of it; a tensor F (n, d), only
            ``point.features`` = F x' and lengths; ``"length"``, only lengths.
        log_odds, rule, odds, on_infeasible: as in :class:`LRQP`.
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
        probe: LinearProbe,
        metric: Mahalanobis,
        constraints: Callable[[Point], Any],
        *,
        parameters: Mapping[str, Any] | None = None,
        reads: Reads = "activation",
        log_odds: float = 10.0,
        rule: Rule = "mirror",
        odds: Odds = "pairwise",
        on_infeasible: Literal["raise", "skip"] = "raise",
        solver: str = "DIFFCP",
        solver_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.edit = LRQP(
            probe, metric, log_odds=log_odds, rule=rule, odds=odds, on_infeasible=on_infeasible
        )
        self.constraints = constraints
        self.declared = dict(parameters or {})
        self.features = rows_read(reads, probe.width)
        self.solver, self.solver_args = solver, dict(solver_args or {})
        # Not a submodule: what is posed can be neither copied nor saved, and follows from the rest.
        self._posed: list[tuple[list[Tensor], Reduction, PosedProblem]] = []
        self._pose()

    @property
    def probe(self) -> LinearProbe:
        """The probe whose odds are written."""
        return self.edit.probe

    @property
    def metric(self) -> Mahalanobis:
        """The metric in which edits are least."""
        return self.edit.metric

    def forward(
        self,
        x: Tensor,
        target: Tensor | int,
        source: Tensor | int | None = None,
        *,
        parameters: Values | None = None,
    ) -> Tensor:
        """Edited activations, (B, d), in x's dtype; differentiable. See :meth:`solve`."""
        return self.solve(x, target, source, parameters=parameters).x_new

    def solve(
        self,
        x: Tensor,
        target: Tensor | int,
        source: Tensor | int | None = None,
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
            SolverError: the solver failed, unless on_infeasible is "skip"; or under ``vmap``.
            ConstraintError: parameters that were not declared, or not given, or of another shape,
                sign or kind; or an objective without a lower bound.
            WidthError, TargetError, NonFiniteError: bad input, named.
        """
        check_activations(x, self.probe.width)
        require_concrete(
            "ConstrainedLRQP", x, target, source, self.probe.weight, *(parameters or {}).values()
        )
        geometry = self.edit.geometry(x.device)
        basis, problem = self._pose()
        basis = basis.to(x.device)
        check_finite(x)
        n_classes = self.probe.n_classes
        classes = row_classes(target, x, n_classes, "target")
        held = None if source is None else row_classes(source, x, n_classes, "source")
        margins = geometry.margins(x, classes)
        log_odds = self.edit.log_odds.to(x.device)
        floor = floors(margins, classes, held, log_odds, self.edit.rule, self.edit.odds)
        values = parameter_values(
            self.edit, self.features, problem, basis, geometry, x, classes, parameters or {}
        )
        solution = solve_posed(
            problem, x, classes, floor, margins, geometry, basis, values, realise
        )
        return judge_solution(solution, x, classes, examples, self.edit.on_infeasible)

    def at(
        self,
        model: nn.Module,
        site: str,
        *,
        positions: Where,
        target: Tensor | int,
        source: Tensor | int | None = None,
        parameters: Values | None = None,
    ) -> AbstractContextManager[EditRun]:
        """Edit ``model`` at a site within the context, as :meth:`LRQP.at`.

        Args:
            model: a transformers model; it is not changed.
            site: ``Ln.pre``, ``Ln.mid`` or ``Ln.post``.
            positions: LongTensor (B,), (B, n) or BoolTensor (B, T).
            target: class to write: one for all, (B,) one an example, or the shape of positions.
            source: class that holds now, in the same shapes; default the probe's own reading.
            parameters: of their declared shape for all, or (B, *shape), one an example; in a scope
                for all.
        """
        item = self.on(
            site, positions=positions, target=target, source=source, parameters=parameters
        )
        return intervene_once(model, item, EditRun)

    def on(
        self,
        site: str,
        *,
        positions: Where,
        target: Tensor | int,
        source: Tensor | int | None = None,
        parameters: Values | None = None,
    ) -> Intervention:
        """The same edit as an item for :func:`~lrqp_torch.intervene`, to apply several at once."""
        solve = solve_with(self.solve, self._pose()[1], positions, parameters or {})
        return Intervention(site, positions, EditRun(solve, positions, target, source))

    def save(self, path: str | Path, **notes: Any) -> NoReturn:
        """Refuse: a function is not data.

        Raises:
            SavedEditError: always.
        """
        raise SavedEditError(
            "an edit with constraints of your own cannot be saved: the function is code, and "
            "reading a saved edit executes nothing. Save edit.edit, which has the probe, the "
            "metric and the odds, and pass the function again: ConstrainedLRQP(saved.probe, "
            "saved.metric, function)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_posed": []}

    def _pose(self) -> tuple[Reduction, PosedProblem]:
        """The basis and the problem in it; posed anew only when probe or metric change."""
        metric, weight = self.metric, self.probe.weight
        tensors = [metric.covariance, metric.mean, weight]
        given = [tensor for tensor in tensors if tensor is not None]
        if self._posed:
            copies, basis, problem = self._posed[0]
            if all(torch.equal(old, new.cpu()) for old, new in zip(copies, given, strict=True)):
                return basis, problem
        basis = Reduction.build(metric.covariance, metric.mean, weight, self.features)
        problem = PosedProblem(
            self.constraints,
            basis,
            self.probe.n_classes - 1,
            self.features,
            self.declared,
            self.solver,
            self.solver_args,
        )
        self._posed = [([tensor.detach().cpu().clone() for tensor in given], basis, problem)]
        return basis, problem
