"""Several variables edited at one site in one problem: every odds holds at the end."""

import math
import operator
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lrqp_torch.edits.base import Edit, OnInfeasible, as_floors
from lrqp_torch.edits.failures import judged, skipped
from lrqp_torch.edits.lrqp import LRQP, Classes, note_metric, note_probe
from lrqp_torch.edits.record import EditRun, floors_of
from lrqp_torch.edits.saving import read_joint, write_joint
from lrqp_torch.errors import (
    LRQPError,
    SavedEditError,
    TargetError,
    as_classes,
    capturing,
    check_activations,
    check_finite,
    concrete,
    in_transforms,
    quoted,
    readable,
)
from lrqp_torch.probes.covariance import Mahalanobis, Shrinkage
from lrqp_torch.probes.linear import LinearProbe, as_probe
from lrqp_torch.qp import ODDS, GeometryCache, MahalanobisQP, Solution, Status, fused, native
from lrqp_torch.qp.direct import Line
from lrqp_torch.qp.fused import Laid, StreamRows, VariableRules
from lrqp_torch.qp.reach import Realise
from lrqp_torch.qp.stacked import FREE, KEEP, JointSolution, StackedGeometry, StackedRule
from lrqp_torch.stream.following import Rows
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.positions import Positions
from lrqp_torch.stream.repeats import Guards

Targets = Mapping[str, Classes] | Tensor
"""Variable to class, ``"keep"`` or ``"free"`` (``KEEP``, ``FREE``); or numbers for all of them as a
tensor with V as a last axis."""
_WORDS = {"keep": KEEP, "free": FREE}


class JointLRQP(Edit[Targets]):
    """The least edit, in Mahalanobis distance, after which several probes read their targets.

        minimise  (x' − x)ᵀ Σ⁻¹ (x' − x)
        subject to  z^v_t(x') − z^v_ℓ(x') ≥ log α_v   for each variable v to write, all ℓ ≠ t_v,
                    C_v (x' − x) = 0                  for each variable v to keep

    One quadratic program with the constraints of all probes stacked, so that all odds hold at the
    end. Edited one after another, the next edit mostly takes back part of the last; where such a
    sequence does meet all odds, the joint edit is never longer. For each example a variable may be
    written, kept (``"keep"``, or ``KEEP`` among numbers) or left free (``"free"``, ``FREE``):

        joint = JointLRQP({"order": edit_a, "name": edit_b, "tense": probe_c})
        x_new = joint(x, {"order": 1, "name": "keep"})

    A variable is kept when no probability of its probe changes: its logits may only shift together.
    With a tolerance τ in ``within`` no log odds z_j − z_k of it changes by more than τ, which is
    shorter and may be feasible where exact keeping is not. The odds are promised for the numbers
    that the model holds; a kept log odds aᵀx moves by the rounding of x', at most ε ‖a‖ ‖x'‖ in a
    stream of machine precision ε, and a tolerance includes that. (In float64 the solve itself
    rounds more: 1e-12 of ‖a‖ ‖x'‖, up to 1e-8 where rows that are kept nearly depend on others.)

    Args:
        edits: name to :class:`LRQP`, whose probe, log_odds, rule and odds are used; or name to
            :class:`LinearProbe` or ``nn.Linear``, a variable that is kept unless a target is given
            for it, and then written by the defaults of :class:`LRQP`. A sequence is named "0", "1",
            ….
        metric: Σ; default that of the edits, which must then share one.
        within: name to τ > 0 in nats, for variables to keep within a tolerance.
        on_infeasible: ``"raise"`` or ``"skip"``, as in :class:`LRQP`.

    Raises:
        WidthError: probes and metric of different widths.
        LRQPError: no variable, different metrics, or an option that does not exist.
    """

    FREE = FREE
    KEEP = KEEP
    certified = True

    def __init__(
        self,
        edits: Mapping[str, LRQP | LinearProbe] | Sequence[LRQP | LinearProbe],
        metric: Mahalanobis | None = None,
        *,
        within: Mapping[str, float] | None = None,
        on_infeasible: OnInfeasible = "raise",
    ) -> None:
        super().__init__(on_infeasible)
        edits = _name_edits(edits, metric)
        self.metric = _common_metric(edits) if metric is None else metric
        self.names = tuple(edits)
        self.kept_by_default = tuple(
            name for name, edit in edits.items() if not isinstance(edit, LRQP)
        )
        self.edits = nn.ModuleList(_with_metric(edit, self.metric) for edit in edits.values())
        self.within = _check_within(within or {}, self.names)
        origins = [edit.provenance for edit in edits.values() if isinstance(edit, LRQP)]
        self.provenance = next(filter(None, origins), None)
        tolerant = [name in self.within for name in self.names]
        self._geometry = GeometryCache(partial(StackedGeometry.of_probes, tolerant))
        geometry = self.geometry(self.metric.traced.device)
        self.qp = MahalanobisQP(geometry.n_constraints + 1)

    @classmethod
    def fit(
        cls,
        x: Any,
        y: Mapping[str, Any],
        *,
        keep: Sequence[str] = (),
        l2: float | None = None,
        shrinkage: Shrinkage = "ledoit_wolf",
        within: Mapping[str, float] | None = None,
        on_infeasible: OnInfeasible = "raise",
        **options: Any,
    ) -> Self:
        """Fit a probe for each variable, and one metric, to activations x, (n, d).

            joint = JointLRQP.fit(x, {"order": order, "name": name})
            x_new = joint(x, {"order": 1, "name": "keep"})

        Args:
            x: activations, (n, d).
            y: name of a variable to its classes, (n,) each, as :meth:`LinearProbe.fit` takes them.
            keep: variables that are kept unless a target is given for them.
            l2: penalty of every probe; see :meth:`LinearProbe.fit`.
            shrinkage: of the covariance, that of all activations together.
            within: see :class:`JointLRQP`, as ``on_infeasible``.
            options: of the :class:`LRQP` of every variable, such as ``log_odds``.

        Raises:
            LRQPError: no variable, or one to keep that is none.
            WidthError, NonFiniteError, LabelError, ConvergenceError: as :meth:`LinearProbe.fit`,
                beginning with the name of the variable.

        Warns:
            ProbeWarning: as :meth:`Mahalanobis.fit`.
        """
        if not isinstance(y, Mapping) or not y:
            raise LRQPError(
                f"give classes by the name of their variable, such as {{'order': y1, 'name': y2}}, "
                f"got {type(y).__name__}"
            )
        unknown = sorted(set(keep) - set(y), key=repr)
        if unknown:
            raise LRQPError(f"keep names {unknown}, the variables are {list(y)}")
        probes = LinearProbe.fit_many({name: (x, labels) for name, labels in y.items()}, l2=l2)
        metric = Mahalanobis.fit(x, shrinkage)
        edits = {
            name: probe if name in keep else LRQP(probe, metric, **options)
            for name, probe in probes.items()
        }
        return cls(edits, metric, within=within, on_infeasible=on_infeasible)

    @property
    def class_names(self) -> tuple[str, ...]:
        """None in common: those of each variable are its own."""
        return ()

    @property
    def n_classes(self) -> int:
        """The most classes that any variable has."""
        return max(edit.n_classes for edit in self._edits().values())

    def solve(
        self,
        x: Tensor,
        target: Targets,
        source: Targets | None = None,
        *,
        asked: Mapping[str, Tensor | float] | None = None,
        realise: Realise | None = None,
        examples: Tensor | None = None,
    ) -> JointSolution:
        """Edit activations, and return the certificate with them.

        Args:
            x: activations, (B, d).
            target: variable to class, by number or name, ``"keep"`` or ``"free"``, each (B,) or one
                for all; or numbers for all of them, a tensor (B, V) in the order of ``names``.
            source: classes that hold now, for the ``mirror`` rule, in the same forms; a name that
                is left out, or a negative number, means the probe's own reading.
            asked: name to log α of each activation in nats, (B,) or one for all, in place of the
                variable's own rule; those that are left out, and NaN, keep it.
            realise: see :meth:`MahalanobisQP.solve`.
            examples: names for the rows in error messages, (B,); default 0, 1, ….

        Raises:
            WidthError, TargetError, NonFiniteError: bad input, named.
            InfeasibleError: no activation meets all that is asked, unless on_infeasible is "skip".
            SolverError: odds read back fall short of α, unless on_infeasible is "skip".
        """
        check_activations(x, self.metric.width)
        # Where nothing is written no constraint reads x, and none would tell.
        if concrete(x):
            check_finite(x)
        found = self._in_one_call(x, target, source, asked, realise)
        if found is not None:
            joint, choice, worst = found
            if worst <= Status.SOLVED:
                return joint
            joint = skipped(joint, x, self.on_infeasible)
        else:
            geometry = self.geometry(x.device)
            joint, choice = self._attempt(x, target, source, asked or {}, realise, geometry)
        return judged(self, joint, x, choice, examples)

    def propose(
        self,
        x: Tensor,
        target: Targets,
        source: Targets | None = None,
        *,
        asked: Mapping[str, Tensor | float] | None = None,
        realise: Realise | None = None,
    ) -> JointSolution:
        """:meth:`solve` without a look at the outcome, which is left in the status."""
        check_activations(x, self.metric.width)
        solved = self._in_one_call(x, target, source, asked, realise)
        if solved is not None:
            return skipped(solved[0], x, self.on_infeasible)
        found = self._peeked(x)
        known = (self.geometry(x.device),) if found is None else found
        return self._attempt(x, target, source, asked or {}, realise, *known)[0]

    def _attempt(
        self,
        x: Tensor,
        target: Targets,
        source: Targets | None,
        asked: Mapping[str, Tensor | float],
        realise: Realise | None,
        geometry: StackedGeometry,
        stale: Tensor | None = None,
    ) -> tuple[JointSolution, Tensor]:
        """Solve; what failed is in the status, and skipped where asked for. Also the choices.

        ``stale``, bool (), says whether the geometry is not that of the probes any more; where it
        is given, nothing that lies on a device is looked at.
        """
        looks, batch = stale is None, len(x)
        choice, sound = self._choice(target, batch, geometry, "target", looks)
        held = sound_source = None
        if source is not None:
            held, sound_source = self._choice(source, batch, geometry, "source", looks)
        wanted = self._wanted(asked, batch, x.device) if asked else None
        rule = self.rule(geometry, choice, held, wanted)
        solution = self.qp.solve(x, choice, rule, geometry, realise=realise)
        doubts = [~part for part in (sound, sound_source) if part is not None]
        if stale is not None:
            doubts += [stale, ~torch.isfinite(x.sum(-1))]
        if doubts:
            solution = solution.invalidate(reduce(torch.logical_or, doubts), x)
        solution = skipped(solution, x, self.on_infeasible)
        return rule.completed(solution, x, realise), choice

    def bind(
        self, run: EditRun, *, asked: Mapping[str, Any] | None = None, **given: Any
    ) -> dict[str, Any]:
        """See :meth:`Edit.bind`: log α of variables, one for all or one an example."""
        return ({} if asked is None else {"asked": asked}) | super().bind(run, **given)

    def edit_rows(
        self, x: Tensor, target: Tensor, source: Tensor | None, context: EditContext, **given: Any
    ) -> Solution:
        """See :meth:`Edit.edit_rows`; where a look would wait for the device, it comes later."""
        if "asked" in given:
            own = {name: floors_of(value, context) for name, value in given["asked"].items()}
            given["asked"] = own
        found = self._peeked(x)
        if found is None:
            return super().edit_rows(x, target, source, context, **given)
        wanted = given.get("asked", {})
        return self._attempt(x, target, source, wanted, context.realise, *found)[0]

    def edit_stream(
        self,
        rows: StreamRows,
        target: Tensor,
        source: Tensor | None,
        *,
        asked: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> tuple[Tensor, Laid | None] | None:
        """See :meth:`Edit.edit_stream`; where the kernel serves and no gradient is asked for."""
        floors, stream = self._floors(), rows.stream
        traced, own = self.metric.traced, self._tensors()
        there = all(part.device == stream.device for part in (traced, *own, *floors))
        alike = len({part.dtype for part in own}) == 1
        if given or not there or not alike or not rows.fits(*floors, *own):
            return None
        geometry = self._geometry.known(own, self.metric, stream.device)
        if geometry is None and capturing(stream):
            return None
        geometry = self.geometry(stream.device) if geometry is None else geometry
        if max(len(geometry.weight), geometry.n_constraints) > fused.MOST_CLASSES:
            return None
        wanted = None
        if asked:
            wanted = self.asked_at(asked, rows)
        stacks = partial(geometry.live, own[: len(floors)], own[len(floors) :], floors)
        *live, least = stacks()
        whole, laid = fused.edit_stream(
            rows,
            target,
            least,
            geometry,
            skip=self.on_infeasible == "skip",
            live=(live[0], live[1]),
            variables=(self._rules(), geometry.prepared(target, source), wanted),
        )
        laid.before = stacks
        return whole, laid

    def asked_at(self, asked: Mapping[str, Any], rows: EditContext | Rows | StreamRows) -> Tensor:
        """See :meth:`Edit.asked_at`: (N, V), NaN where a variable keeps its own rule."""
        wishes = {name: floors_of(value, rows) for name, value in asked.items()}
        return self._wanted(wishes, len(rows.example), rows.example.device)

    def line(self) -> Line | None:
        """See :meth:`Edit.line`; by our solver, where there is a compiler."""
        kind = type(self)
        # What stands for a solve, on this object or in its class, is to be called.
        if vars(self).keys() & {"solve", "edit_rows"} or (kind.solve, kind.edit_rows) != _SOLVES:
            return None
        return self._own_line() if kind is JointLRQP else None

    def made_of(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]]:
        """See :meth:`Edit.made_of`; without looking at Σ."""
        # A module asks itself for its parts by a detour of a microsecond each.
        modules: dict[str, Any] = self._modules
        weights, biases, floors, own = [], [], [], []
        for edit in modules["edits"]._modules.values():
            probe = edit._modules["probe"]._parameters
            weights.append(probe.get("weight"))
            biases.append(probe.get("bias"))
            floors.append(edit._buffers["log_odds"])
            own += [edit.rule, edit.odds]
        qp, metric = modules["qp"], modules["metric"]
        traced = vars(metric)["_buffers"].get("covariance")
        own += [*self.within.items(), qp, qp.solver, self.on_infeasible, metric.looks]
        return (*weights, *biases, traced, *floors), tuple(own)

    def note_parts(self, look: Guards) -> None:
        """See :meth:`Edit.note_parts`."""
        modules, within = look(self, "_modules"), look(self, "within")
        edits = look(look(modules, "edits"), "_modules")
        for name in [*edits]:
            edit = look(edits, name)
            note_probe(look, edit, look(look(edit, "_modules"), "probe"))
        for name in self.names:
            look(within, name)
        note_metric(look, look(modules, "qp"), look(modules, "metric"))

    def _new_line(self, parts: tuple[Tensor | None, ...], own: tuple[object, ...]) -> Line | None:
        probes, traced = tuple(self._tensors()), (self.metric.traced, *self._floors())
        given = *probes, *traced
        if not self.qp.is_direct or not all(part.is_contiguous() for part in probes):
            return None
        if not all(part.is_cpu and part.dtype in native.KINDS for part in given):
            return None
        # A probe may have its numbers made anew each time that it is asked for them.
        if in_transforms() or not all(map(operator.is_, given, parts)):
            return None
        if torch.is_grad_enabled() and any(part.requires_grad for part in given):
            return None
        geometry = self.geometry(probes[0].device)
        metric, rule = self._geometry.snapshot(), self.rule(geometry, geometry.plus)
        return Line(geometry, probes, traced, metric, own, rule)

    def _in_one_call(
        self, x: Tensor, target: Targets, source: Any, asked: Any, realise: Realise | None
    ) -> tuple[JointSolution, Tensor, int] | None:
        """Edited activations, choices and the worst status, where one call does it; or None."""
        if fused.interpreted():  # the kernel stands in for it
            return None
        if torch.compiler.is_compiling() or type(self) is not JointLRQP or in_transforms():
            return None
        line = self._own_line()
        if line is None or type(x) is not Tensor or not x.is_cpu or x.ndim != 2:
            return None
        geometry, batch = cast(StackedGeometry, line.geometry), len(x)
        choice = self._whole(target, batch)
        if choice is None:
            choice = self._choice(target, batch, geometry, "target")[0]
        held = None if source is None else self._choice(source, batch, geometry, "source")[0]
        wanted = self._wanted(asked, batch, x.device) if asked else None
        found = line.solve(x, choice, held, wanted, realise)
        return None if found is None else (cast(JointSolution, found[0]), choice, found[1])

    def _whole(self, targets: Targets, batch: int) -> Tensor | None:
        """Choices of numbers for all, (B, V); None where they are others."""
        if type(targets) is not dict or targets.keys() != set(self.names):
            return None
        row = [targets[name] for name in self.names]
        if not all(type(part) is int for part in row):
            return None
        return torch.tensor([row]).expand(batch, -1)

    def rule(
        self,
        geometry: StackedGeometry,
        choice: Tensor,
        source: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> StackedRule:
        """The floors of choices (B, V), with what else each variable's own odds rule reads."""
        return StackedRule(geometry, self._rules(), self._floors(), choice, source, asked)

    def place(self, classes: Targets, what: str, positions: Positions) -> Tensor:
        """See :meth:`Edit.place`; ranges are checked where it is solved."""
        parts = self._parts(classes, what)
        placed = [positions.classes(part, f"{what} of {n!r}") for n, part in parts.items()]
        return torch.stack(torch.broadcast_tensors(*placed), -1)

    def unreachable(self, target: Tensor, which: str) -> str:
        """See :meth:`Edit.unreachable`."""
        said = {FREE: "free", KEEP: "kept"}
        wishes = ", ".join(
            f"{name} {said.get(value, value)}"
            for name, value in zip(self.names, target[0].tolist(), strict=True)
        )
        return (
            f"no activation meets all that is asked of {which} ({wishes}): targets contradict each "
            f"other, or the directions that one needs are kept for another. Leave a variable FREE, "
            f"keep it within a tolerance (within={{name: nats}}), or pass on_infeasible='skip'"
        )

    def geometry(self, device: torch.device) -> StackedGeometry:
        """What the solves share, on a device; computed anew only when probes or metric change."""
        return self._geometry.get(self._tensors(), self.metric, device)

    def _floors(self) -> list[Tensor]:
        """The least log α of each variable."""
        return [edit.log_odds for edit in self._edits().values()]

    def _rules(self) -> VariableRules:
        """How floors of each variable come about. For total odds a sufficient number is added:
        their exact form is not linear.
        """
        return tuple(
            (
                float(edit.rule == "mirror"),
                ODDS[edit.odds].surplus(edit.n_classes - 1),
                self.within.get(name, 0.0),
            )
            for name, edit in self._edits().items()
        )

    def _peeked(self, x: Tensor) -> tuple[StackedGeometry, Tensor] | None:
        """The geometry and whether it is stale; None where that is to be looked at, or is new."""
        given = self._tensors(), self.metric, x.device
        new = readable(x) or self._geometry.known(*given) is None
        return None if new else self._geometry.peek(*given)

    def _tensors(self) -> list[Tensor]:
        """The weights of all probes, then their biases."""
        probes = [edit.probe for edit in self._edits().values()]
        return [*(probe.weight for probe in probes), *(probe.bias for probe in probes)]

    def _write(self, folder: Path, notes: dict[str, Any]) -> Path:
        content = {
            "names": list(self.names),
            "kept_by_default": list(self.kept_by_default),
            "within": self.within,
            "on_infeasible": self.on_infeasible,
            "notes": notes,
        }
        return write_joint(folder, list(self._edits().values()), content)

    @classmethod
    def _read(cls, folder: Path) -> Self:
        content, saved = read_joint(folder, LRQP.load)
        bare = content["kept_by_default"]
        edits = {
            name: edit.probe if name in bare else edit
            for name, edit in zip(content["names"], saved, strict=True)
        }
        try:
            joint = cls(
                edits,
                saved[0].metric,
                within=content["within"],
                on_infeasible=content["on_infeasible"],
            )
        except LRQPError as error:
            raise SavedEditError(f"{folder} does not hold valid edits: {error}") from error
        joint.notes = content["notes"]
        return joint

    def _edits(self) -> dict[str, LRQP]:
        named = zip(self.names, self.edits, strict=True)
        return {name: edit for name, edit in named if isinstance(edit, LRQP)}

    def _parts(self, targets: Targets, what: str) -> dict[str, Tensor | int]:
        """One entry a variable, in order; from a mapping, or from a tensor with V as last axis."""
        if not isinstance(targets, Mapping):
            tensor = as_classes(targets, what)
            if tensor.ndim == 0 or tensor.shape[-1] != len(self.names):
                raise TargetError(
                    f"{what} must be a mapping from {list(self.names)}, or a tensor with these "
                    f"{len(self.names)} as last axis, got {tuple(tensor.shape)}"
                )
            return dict(zip(self.names, tensor.unbind(-1), strict=True))
        unknown = set(targets) - set(self.names)
        if unknown:
            raise TargetError(
                f"{what} names {sorted(unknown, key=repr)}, the variables are {list(self.names)}"
            )
        parts = dict(targets)
        for name in self.names:
            if what == "target" and name not in parts and name not in self.kept_by_default:
                raise TargetError(
                    f"no target for {name!r}: give a class, 'keep' to hold its beliefs where they "
                    f"are, or 'free' to let them move"
                )
            parts.setdefault(name, KEEP if what == "target" else FREE)
        words = _WORDS if what == "target" else None
        return {
            name: edit.by_number(parts[name], f"{what} of {name!r}", words)
            for name, edit in self._edits().items()
        }

    def _wanted(
        self, asked: Mapping[str, Tensor | float], batch: int, device: torch.device
    ) -> Tensor:
        """The log α that are given, (B, V), NaN where they are not."""
        unknown = sorted(set(asked) - set(self.names), key=repr)
        if unknown:
            raise TargetError(f"asked names {unknown}, the variables are {list(self.names)}")
        floors = [as_floors(asked.get(name, math.nan), (batch,), device) for name in self.names]
        return torch.stack(floors, -1)

    def _choice(
        self,
        targets: Targets,
        batch: int,
        geometry: StackedGeometry,
        what: str,
        looks: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """The choices, (B, V), and which rows are in range, (B,); None: all, or else they raise."""
        device = geometry.weight.device
        shape, whole = (batch, len(self.names)), torch.int64
        if isinstance(targets, Tensor) and (targets.shape, targets.dtype) == (shape, whole):
            given = targets.to(device)
        else:
            parts = self._parts(targets, what).items()
            columns = [_column(part, batch, device, f"{what} of {name!r}") for name, part in parts]
            given = torch.stack(columns, -1)
        if looks and concrete(given):
            geometry.check(given, batch, what, self.names)
            return given, None
        inside = geometry.in_range(given)
        return torch.where(inside, given, FREE), inside.all(-1)


def _column(part: Tensor | int, batch: int, device: torch.device, what: str) -> Tensor:
    """The choices of one variable, (B,) int64."""
    if isinstance(part, int) and not isinstance(part, bool):
        # A fill needs no copy from the host, for which a GPU would stop.
        return torch.full((batch,), part, device=device)
    column = as_classes(part, what).to(device)
    if column.dtype.is_floating_point or column.dtype.is_complex:
        raise TargetError(f"{what} must hold integers, got {column.dtype}")
    if column.ndim and column.shape != (batch,):
        raise TargetError(f"{what} must be one number or ({batch},), got {tuple(column.shape)}")
    return column.long().expand(batch)


def _name_edits(edits: Any, metric: Any) -> dict[str, LRQP | LinearProbe]:
    """Edits and probes by name; those of a sequence by their place."""
    if not isinstance(edits, Mapping):
        if not isinstance(edits, Sequence) or isinstance(edits, str):
            raise LRQPError(
                f"edits must be a mapping from names to LRQP or LinearProbe, or a sequence of "
                f"them, got {type(edits).__name__}"
            )
        edits = {str(place): edit for place, edit in enumerate(edits)}
    edits = {name: as_probe(e) if isinstance(e, nn.Linear) else e for name, e in edits.items()}
    for name, edit in edits.items():
        if not isinstance(name, str):
            raise LRQPError(f"variables must have names, got {quoted(name)}")
        if not isinstance(edit, LRQP | LinearProbe):
            raise LRQPError(
                f"variable {name!r} must be an LRQP or a LinearProbe, got {type(edit).__name__}"
            )
    if metric is not None and not isinstance(metric, Mahalanobis):
        raise LRQPError(
            f"metric must be a Mahalanobis, got {type(metric).__name__}; wrap a covariance as "
            f"Mahalanobis(covariance)"
        )
    return dict(edits)


def _common_metric(edits: Mapping[str, LRQP | LinearProbe]) -> Mahalanobis:
    """The metric that all edits share."""
    metrics = {name: edit.metric for name, edit in edits.items() if isinstance(edit, LRQP)}
    if not metrics:
        raise LRQPError("give at least one LRQP, or probes and a metric")
    first_name, first = next(iter(metrics.items()))
    for name, metric in metrics.items():
        if not metric.is_same(first):
            raise LRQPError(
                f"{first_name!r} and {name!r} have different metrics, and one problem has one: "
                f"pass metric=, for example that of the edit fitted on more activations"
            )
    return first


def _with_metric(edit: LRQP | LinearProbe, metric: Mahalanobis) -> LRQP:
    """The edit in another metric; a probe with the defaults of :class:`LRQP`."""
    if not isinstance(edit, LRQP):
        return LRQP(edit, metric)
    return edit if edit.metric is metric else edit.like(edit.probe, metric)


def _check_within(within: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The tolerances as numbers."""
    if not isinstance(within, Mapping):
        raise LRQPError(f"within must map names among {list(names)} to nats, got {quoted(within)}")
    checked = {}
    for name, value in within.items():
        try:
            checked[name] = number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if name not in names or not (math.isfinite(number) and number > 0):
            raise LRQPError(
                f"within must map names among {list(names)} to positive numbers, got "
                f"{name!r}: {quoted(value)}; for exact keeping leave it out"
            )
    return checked


_SOLVES = JointLRQP.solve, JointLRQP.edit_rows
"""What a hook on the CPU may do in one call in place of."""
