"""LRQP: a probe, a metric and an odds rule make an edit of activations."""

import copy
import math
import operator
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from lrqp_torch.edits.base import Edit, OnInfeasible, as_floors
from lrqp_torch.edits.failures import judged, skipped
from lrqp_torch.edits.record import EditRun, floors_of
from lrqp_torch.edits.saving import read_edit, write_edit
from lrqp_torch.errors import (
    NonFiniteError,
    WidthError,
    as_classes,
    check_activations,
    check_class_shape,
    check_option,
    in_transforms,
    place_classes,
    quoted,
    readable,
)
from lrqp_torch.probes.covariance import Mahalanobis, Shrinkage
from lrqp_torch.probes.fitting import ClassWeight
from lrqp_torch.probes.linear import LinearProbe, as_probe
from lrqp_torch.qp import (
    ODDS,
    GeometryCache,
    ProbeGeometry,
    Solution,
    Solver,
    Status,
    TotalOdds,
    fused,
    native,
)
from lrqp_torch.qp.direct import Line
from lrqp_torch.qp.fused import Laid, OddsRule, StreamRows
from lrqp_torch.qp.geometry import probe_geometry
from lrqp_torch.qp.reach import Realise
from lrqp_torch.qp.solvers import ACTIVE_SET, solver_of
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.repeats import Guards

Rule = Literal["mirror", "fixed"]
Odds = Literal["pairwise", "total"]
Classes = Tensor | int | str | Sequence[Any]
"""Class numbers, or names where the edit has :attr:`~Edit.class_names`."""


class LRQP(Edit[Classes]):
    """The least edit, in Mahalanobis distance, after which a probe reads the target class.

        minimise  (x' − x)ᵀ Σ⁻¹ (x' − x)   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    (logistic regression + quadratic programming, from "Intervening in the Residual Stream").

    The odds rule sets α for each activation. ``"mirror"``: log α = max(z_v − z_t, log_odds), v the
    source class: the new belief is at least as certain as the old one, and never below the floor.
    For a control edit, t = v, this is the floor. ``"fixed"``: log α = log_odds.

    These odds are pairwise: P[t] / P[ℓ] ≥ α for each ℓ. With K > 2 the total odds
    P[t] / (1 − P[t]) can be smaller, by a factor of at most K − 1. ``odds="total"`` asks for
    total odds of α instead, z_t − log Σ_{ℓ≠t} exp z_ℓ ≥ log α, and finds the least such edit.

    Args:
        probe: z(x) = W x + b; any other linear layer than a :class:`LinearProbe` is copied into one
            by :meth:`LinearProbe.from_linear`.
        metric: Σ; if it is on another device than the probe, a copy is taken there.
        log_odds: the floor of log α in nats; 10 is the post's.
        rule: ``"mirror"`` or ``"fixed"``.
        odds: ``"pairwise"`` or ``"total"``.
        on_infeasible: what to do when no activation reaches a target: ``"raise"``, or ``"skip"`` to
            leave those activations as they are and say so in the status.
        solver: see :class:`~lrqp_torch.qp.MahalanobisQP`.
        solver_args: passed to a cvxpylayers solver.

    Raises:
        WidthError: probe and metric of different widths.
        NonFiniteError: NaN or infinity in probe, metric or log_odds.
        SolverError: ``odds="total"`` with a solver of cvxpylayers.
        LRQPError: an option that does not exist.
    """

    log_odds: Tensor
    certified = True

    def __init__(
        self,
        probe: nn.Linear,
        metric: Mahalanobis,
        *,
        log_odds: float = 10.0,
        rule: Rule = "mirror",
        odds: Odds = "pairwise",
        on_infeasible: OnInfeasible = "raise",
        solver: str | Solver = ACTIVE_SET,
        solver_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(on_infeasible)
        probe = as_probe(probe)
        if not isinstance(metric, Mahalanobis):
            raise WidthError(
                f"metric must be a Mahalanobis, got {type(metric).__name__}: Mahalanobis.fit(x) of "
                f"activations, Mahalanobis(covariance), or Mahalanobis.euclidean({probe.width})"
            )
        if probe.width != metric.width:
            raise WidthError(
                f"the probe reads width {probe.width}, the metric has width {metric.width}; fit "
                f"both on activations of the same site"
            )
        check_option("rule", rule, ("mirror", "fixed"))
        check_option("odds", odds, tuple(ODDS))
        number = isinstance(log_odds, int | float | Tensor | np.number)
        floor = torch.as_tensor(log_odds if number else math.nan, dtype=torch.float64)
        if floor.ndim != 0 or not bool(torch.isfinite(floor)):
            raise NonFiniteError(f"log_odds must be one finite number, got {quoted(log_odds)}")
        device = probe.weight.device
        if metric.traced.device != device:
            metric = copy.deepcopy(metric).to(device)
        self.probe, self.metric = probe, metric
        self.register_buffer("log_odds", floor.to(device))
        self.rule, self.odds = rule, odds
        self.solver = solver_of(solver, solver_args)
        self.qp = ODDS[odds].program(probe.n_classes, solver=self.solver)
        self._geometry = GeometryCache(probe_geometry)
        self.geometry(device)

    @classmethod
    def fit(
        cls,
        x: Any,
        y: Any,
        *,
        l2: float | None = None,
        shrinkage: Shrinkage = "ledoit_wolf",
        n_classes: int | None = None,
        sample_weight: Any = None,
        class_weight: ClassWeight | None = None,
        held_out: float | tuple[Any, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Fit probe and metric to activations x, (n, d), with classes y, (n,).

        The covariance is that of all activations together. ``shrinkage`` is that of
        :meth:`Covariance.finish`, ``options`` are the constructor's, and all others are those of
        :meth:`LinearProbe.fit`.

        Warns:
            ProbeWarning: as :meth:`LinearProbe.fit` and :meth:`Mahalanobis.fit`.
        """
        probe = LinearProbe.fit(
            x,
            y,
            l2=l2,
            n_classes=n_classes,
            sample_weight=sample_weight,
            class_weight=class_weight,
            held_out=held_out,
        )
        return cls(probe, Mahalanobis.fit(x, shrinkage, _told=True), **options)

    def like(
        self, probe: LinearProbe, metric: Mahalanobis, log_odds: float | None = None
    ) -> "LRQP":
        """An edit with other numbers and the same options and notes; of no known provenance."""
        other = LRQP(
            probe,
            metric,
            log_odds=float(self.log_odds) if log_odds is None else log_odds,
            rule=self.rule,
            odds=self.odds,
            on_infeasible=self.on_infeasible,
            solver=self.solver,
        )
        other.notes = dict(self.notes)
        return other

    @property
    def n_classes(self) -> int:
        """K."""
        # A module asks itself for its parts by a detour of a microsecond.
        probe: Any = self._modules["probe"]
        return int(probe.n_classes)

    def solve(
        self,
        x: Tensor,
        target: Classes,
        source: Classes | None = None,
        *,
        asked: Tensor | float | None = None,
        realise: Realise | None = None,
        examples: Tensor | None = None,
    ) -> Solution:
        """Edit activations, and return the certificate with them.

        Args:
            x: activations, (B, d).
            target: class to write, (B,) or one for all, by number or name.
            source: class that holds now, for the ``mirror`` rule; default the probe's own reading.
            asked: log α of each activation in nats, (B,) or one for all, in place of the rule's:
                what the probe reads elsewhere, say, ``probe.log_odds(other, target)``.
            realise: see :meth:`MahalanobisQP.solve`.
            examples: names for the rows in error messages, (B,); default 0, 1, ….

        Raises:
            WidthError, TargetError, NonFiniteError: bad input, named.
            InfeasibleError: a target that no activation reaches, unless on_infeasible is "skip".
            SolverError: the odds read back fall short of α, unless on_infeasible is "skip".
        """
        found = self._in_one_call(x, target, source, asked, realise)
        if found is not None:
            solution, worst = found
            if worst <= Status.SOLVED:
                return solution
            solution = skipped(solution, x, self.on_infeasible)
        else:
            check_activations(x, self.probe.width)
            target, source = self.by_number(target, "target"), self.by_number(source, "source")
            geometry = self.geometry(x.device)
            solution = self._attempt(x, target, source, realise, geometry, asked=asked)
        return judged(self, solution, x, target, examples)

    def propose(
        self,
        x: Tensor,
        target: Classes,
        source: Classes | None = None,
        *,
        asked: Tensor | float | None = None,
        realise: Realise | None = None,
    ) -> Solution:
        """:meth:`solve` without a look at the outcome, which is left in the status.

        On a GPU, with K ≤ 64 and classes as tensors there, it is one launch and never waits for the
        device, so it can be captured in a CUDA graph. What is seen to be wrong without waiting
        still raises.
        """
        found = self._in_one_call(x, target, source, asked, realise)
        if found is not None:
            return skipped(found[0], x, self.on_infeasible)
        check_activations(x, self.probe.width)
        target, source = self.by_number(target, "target"), self.by_number(source, "source")
        if x.device.type == "cpu":
            geometry = self.geometry(x.device)
            return self._attempt(x, target, source, realise, geometry, asked=asked)
        live = self.probe.weight, self.probe.bias
        known = self._geometry.known(live, self.metric, x.device)
        if known is not None and self._is_on(x) and self.qp.fuses(x, known, realise):
            return self._attempt(x, target, source, realise, known, asked=asked, live=live)
        geometry, stale = self._geometry.peek(live, self.metric, x.device)
        return self._attempt(x, target, source, realise, geometry, stale, asked)

    def bind(self, run: EditRun, *, asked: Any = None, **given: Any) -> dict[str, Any]:
        """See :meth:`Edit.bind`: log α, in place of the rule's, one for all or one an example."""
        return ({} if asked is None else {"asked": asked}) | super().bind(run, **given)

    def edit_rows(
        self, x: Tensor, target: Tensor, source: Tensor | None, context: EditContext, **given: Any
    ) -> Solution:
        """See :meth:`Edit.edit_rows`; where a look would wait for the device, it comes later."""
        if "asked" in given:
            given["asked"] = floors_of(given["asked"], context)
        if readable(x):
            return super().edit_rows(x, target, source, context, **given)
        return self.propose(x, target, source, realise=context.realise, **given)

    def edit_stream(
        self,
        rows: StreamRows,
        target: Tensor,
        source: Tensor | None,
        *,
        asked: Tensor | float | None = None,
        **given: Any,
    ) -> tuple[Tensor, Laid | None] | None:
        """See :meth:`Edit.edit_stream`; where the kernel serves and no gradient is asked for."""
        stream, live = rows.stream, (self.probe.weight, self.probe.bias)
        geometry = self._geometry.known(live, self.metric, stream.device)
        if geometry is None or given or not self._is_on(stream) or not rows.fits(self.log_odds):
            return None
        if not self.qp.fuses(stream, geometry):
            return None
        floors: OddsRule | Tensor = self._odds_rule(target, source)
        if asked is not None:
            floors = floors_of(asked, rows).expand(len(rows.index))
        skip, total = self.on_infeasible == "skip", type(self.qp.solver) is TotalOdds
        return fused.edit_stream(rows, target, floors, geometry, skip=skip, live=live, total=total)

    def line(self) -> Line | None:
        """See :meth:`Edit.line`; of pairwise odds by our solver, where there is a compiler."""
        # What stands for a solve, on this object or in its class, is to be called.
        if "solve" in self.__dict__ or "edit_rows" in self.__dict__ or type(self) is not LRQP:
            return None
        if LRQP.solve is not _SOLVE or LRQP.edit_rows is not _EDIT_ROWS:
            return None
        return self._own_line()

    def made_of(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]]:
        """See :meth:`Edit.made_of`; without looking at Σ."""
        # A module asks itself for its parts by a detour of a microsecond each.
        modules: dict[str, Any] = self._modules
        numbers, qp = modules["probe"]._parameters, modules["qp"]
        # What its metric is traced by, see there.
        metric = modules["metric"]
        traced = vars(metric)["_buffers"].get("covariance")
        parts = numbers.get("weight"), numbers.get("bias"), traced, self._buffers["log_odds"]
        return parts, (self.rule, qp, qp.solver, self.on_infeasible, metric.looks)

    def note_parts(self, look: Guards) -> None:
        """See :meth:`Edit.note_parts`."""
        modules = look(self, "_modules")
        note_probe(look, self, look(modules, "probe"))
        note_metric(look, look(modules, "qp"), look(modules, "metric"))
        look(self, "on_infeasible")

    def _new_line(self, parts: tuple[Tensor | None, ...], own: tuple[object, ...]) -> Line | None:
        probe = self.probe.weight, self.probe.bias
        given = *probe, self.metric.traced, self.log_odds
        if not self.qp.is_direct or not probe[0].is_contiguous() or not probe[1].is_contiguous():
            return None
        if not all(part.is_cpu and part.dtype in native.KINDS for part in given):
            return None
        # A probe may have its numbers made anew each time that it is asked for them.
        if not all(map(operator.is_, given, parts)):
            return None
        if in_transforms() or (
            torch.is_grad_enabled() and any(part.requires_grad for part in given)
        ):
            return None
        geometry = self.geometry(probe[0].device)
        total = type(self.qp.solver) is TotalOdds
        rule, metric = self._odds_rule(probe[1], None), self._geometry.snapshot()
        return Line(geometry, probe, given[2:], metric, own, rule, total)

    def _in_one_call(
        self, x: Tensor, target: Any, source: Any, asked: Any, realise: Realise | None
    ) -> tuple[Solution, int] | None:
        """Edited activations and the worst status, where one call does it; or None."""
        if fused.interpreted():  # the kernel stands in for it
            return None
        if torch.compiler.is_compiling() or type(self) is not LRQP or in_transforms():
            return None
        line = self._own_line()
        return None if line is None else line.solve(x, target, source, asked, realise)

    def floors(
        self, margins: Tensor, target: Tensor, source: Tensor | None, *, sufficient: bool
    ) -> Tensor:
        """Log α of each activation by the odds rule, (B,), in nats; differentiable.

        ``mirror``: max(z_v − z_t, log_odds), v the source class, by default the probe's own
        reading. ``fixed``: log_odds.

        Args:
            margins: z_t − z_ℓ for the other classes ℓ ascending, (B, K−1).
            target: t, (B,).
            source: v, (B,), negative where it is the probe's own reading; None: everywhere.
            sufficient: whether these are pairwise odds that suffice for the total odds, where those
                are asked for: α (K − 1).
        """
        floor = self._odds_rule(target, source)(margins)
        return floor + ODDS[self.odds].surplus(margins.shape[-1]) if sufficient else floor

    def unreachable(self, target: Tensor, which: str) -> str:
        """See :meth:`Edit.unreachable`."""
        kept = self.metric.n_kept
        return (
            f"no activation reaches target class {sorted(set(target.tolist()))} for {which}: some "
            f"class has the same weights as the target, or the metric has no length along their "
            f"difference. Choose another target, lower log_odds, shrink the covariance, or pass "
            f"on_infeasible='skip' to leave them unchanged"
        ) + (
            f". The metric keeps {kept} directions, and what the target needs may lie among them: "
            f"keep fewer, or allow a tolerance (JointLRQP(..., within=...))"
            if kept
            else ""
        )

    def geometry(self, device: torch.device) -> ProbeGeometry:
        """What the solves share, on a device; computed anew only when probe or metric change."""
        probe = self.probe
        return self._geometry.get((probe.weight, probe.bias), self.metric, device)

    def _facts(self) -> dict[str, object]:
        return {
            "rule": self.rule,
            "odds": self.odds,
            "log_odds": f"{float(self.log_odds):g}",
            "K": self.n_classes,
            "d": self.probe.width,
            "n": self.metric.n_samples,
            "shrinkage": f"{self.metric.shrinkage:.3g}",
            "site": self.notes.get("site") if self.provenance is None else self.provenance.site,
        }

    def __repr__(self) -> str:
        known = (f"{name}={value}" for name, value in self._facts().items() if value is not None)
        return f"{type(self).__name__}({', '.join(known)})"

    def _repr_html_(self) -> str:
        from lrqp_torch.plot.cards import card

        origin = self.provenance
        accuracy = None if origin is None else origin.probe_accuracy
        model = None if origin is None else origin.model
        return card(
            type(self).__name__,
            self._facts()
            | {
                "model": model and (Path(model).name if Path(model).is_absolute() else model),
                "classes": ", ".join((origin and origin.classes) or ()) or None,
                "probe accuracy, held out": None if accuracy is None else f"{accuracy:.1%}",
            },
        )

    def _attempt(
        self,
        x: Tensor,
        target: Classes,
        source: Classes | None,
        realise: Realise | None,
        geometry: ProbeGeometry,
        stale: Tensor | None = None,
        asked: Tensor | float | None = None,
        live: tuple[Tensor, Tensor] | None = None,
    ) -> Solution:
        """Solve by the odds rule; what failed is in the status, and skipped where asked for.

        ``stale``, bool (), says whether the geometry is not that of the probe any more. Where the
        probe ``live`` is given, one launch sees that, and classes out of range, by itself.
        """
        batch, device = len(x), x.device
        wrong = [] if stale is None else [stale]

        def placed(classes: Classes, name: str) -> Tensor:
            if live is not None:
                return self._beside(classes, x, name)
            own, outside = place_classes(classes, batch, self.n_classes, device, name)
            wrong.extend([] if outside is None else [outside])
            return own

        classes = placed(target, "target")
        held = None if source is None else placed(source, "source")
        floor: OddsRule | Tensor = self._odds_rule(classes, held)
        if asked is not None:
            floor = as_floors(asked, (batch,), device)
        skip = self.on_infeasible == "skip"
        invalid = reduce(torch.logical_or, wrong).bool() if wrong else None
        solution = self.qp.solve(
            x, classes, floor, geometry, realise=realise, live=live, skip=skip, wrong=invalid
        )
        return solution if live is not None else skipped(solution, x, self.on_infeasible)

    def _beside(self, classes: Classes, x: Tensor, name: str) -> Tensor:
        """Classes as int64 where x is, (B,) or one for all, (1,), looked at if that is no wait."""
        if isinstance(classes, Tensor) and classes.device == x.device and x.is_cuda:
            classes = as_classes(classes, name)
            classes = classes.reshape(1) if classes.ndim == 0 else classes
            check_class_shape(classes, len(classes) if len(classes) == 1 else len(x), name)
            return classes.long()
        return place_classes(classes, len(x), self.n_classes, x.device, name)[0]

    def _is_on(self, x: Tensor) -> bool:
        """Whether the edit's own numbers are where x is: a kernel reads them by their address."""
        weight, bias, device = self.probe.weight, self.probe.bias, x.device
        there = weight.device == device and bias.device == device
        there = there and weight.is_contiguous() and bias.is_contiguous()
        return there and self.log_odds.device == device

    def _odds_rule(self, target: Tensor, source: Tensor | None) -> OddsRule:
        return OddsRule(self.rule == "mirror", self.log_odds, target, source)

    def _write(self, folder: Path, notes: dict[str, Any]) -> Path:
        return write_edit(self, folder, notes)

    @classmethod
    def _read(cls, folder: Path) -> Self:
        return read_edit(cls, folder)


_SOLVE, _EDIT_ROWS = LRQP.solve, LRQP.edit_rows
"""What a hook on the CPU may do in one call in place of."""


def note_probe(look: Guards, edit: LRQP, probe: nn.Module) -> None:
    """Look up what is an edit's own: its probe's numbers, its floor and rule."""
    numbers = look(probe, "_parameters")
    look(numbers, "weight"), look(numbers, "bias")
    look(look(edit, "_buffers"), "log_odds")
    look(edit, "rule"), look(edit, "odds")


def note_metric(look: Guards, qp: nn.Module, metric: nn.Module) -> None:
    """Look up what the solver is, and Σ."""
    look(qp, "solver"), look(metric, "looks")
    look(look(metric, "_buffers"), "covariance")
