"""Several variables edited at one site in one problem: every odds holds at the end."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lrqp_torch.edits.attempt import visible
from lrqp_torch.edits.joint_failing import raise_joint_failures
from lrqp_torch.edits.joint_floors import slot_floors
from lrqp_torch.edits.joint_run import JointRun
from lrqp_torch.edits.joint_saving import load_joint, save_joint
from lrqp_torch.edits.joint_solution import JointSolution, read_odds
from lrqp_torch.edits.joint_targets import Targets, name_targets, stack_targets
from lrqp_torch.edits.joint_variables import (
    build_geometry,
    check_within,
    common_metric,
    name_edits,
    with_metric,
)
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LRQPError, SavedEditError, check_activations, check_finite, concrete
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp import MahalanobisQP, Status
from lrqp_torch.qp.problem import Realise
from lrqp_torch.qp.stacked import FREE, KEEP, StackedGeometry
from lrqp_torch.stream.intervene import Intervention, intervene_once
from lrqp_torch.stream.scopes import Where


class JointLRQP(nn.Module):
    """The least edit, in Mahalanobis distance, after which several probes read their targets.

        minimise  (x' − x)ᵀ Σ⁻¹ (x' − x)
        subject to  z^v_t(x') − z^v_ℓ(x') ≥ log α_v   for each variable v to write, all ℓ ≠ t_v,
                    C_v (x' − x) = 0                  for each variable v to keep

    One quadratic program with the constraints of all probes stacked, so that all odds hold at the
    end. Edited one after another, the next edit mostly takes back part of the last; where such a
    sequence does meet all odds, the joint edit is never longer. For each example a variable may be
    written, kept (``KEEP``) or left free (``FREE``):

        joint = JointLRQP({"order": edit_a, "name": edit_b, "tense": probe_c})
        x_new = joint(x, {"order": 1, "name": joint.KEEP})

    A variable is kept when no probability of its probe changes: its logits may only shift together.
    With a tolerance τ in ``within`` no log odds z_j − z_k of it changes by more than τ, which is
    shorter and may be feasible where exact keeping is not. The odds are promised for the numbers
    that the model holds; a kept log odds aᵀx moves by the rounding of x', at most ε ‖a‖ ‖x'‖ in a
    stream of machine precision ε, and a tolerance includes that.

    Args:
        edits: name to :class:`LRQP`, whose probe, log_odds, rule and odds are used; or name to
            :class:`LinearProbe`, a variable that is kept unless a target is given for it, and then
            written by the defaults of :class:`LRQP`. A sequence is named "0", "1", ….
        metric: Σ; default that of the edits, which must then share one.
        within: name to τ > 0 in nats, for variables to keep within a tolerance.
        on_infeasible: ``"raise"`` or ``"skip"``, as in :class:`LRQP`.

    Raises:
        WidthError: probes and metric of different widths.
        LRQPError: no variable, different metrics, or an option that does not exist.
    """

    FREE = FREE
    KEEP = KEEP

    def __init__(
        self,
        edits: Mapping[str, LRQP | LinearProbe] | Sequence[LRQP | LinearProbe],
        metric: Mahalanobis | None = None,
        *,
        within: Mapping[str, float] | None = None,
        on_infeasible: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        edits = name_edits(edits, metric)
        if on_infeasible not in ("raise", "skip"):
            raise LRQPError(f"on_infeasible must be 'raise' or 'skip', got {on_infeasible!r}")
        self.metric = common_metric(edits) if metric is None else metric
        self.names = tuple(edits)
        self.kept_by_default = tuple(
            name for name, edit in edits.items() if not isinstance(edit, LRQP)
        )
        self.edits = nn.ModuleList(with_metric(edit, self.metric) for edit in edits.values())
        self.within = check_within(within or {}, self.names)
        self.on_infeasible = on_infeasible
        self.notes: dict[str, Any] = {}
        geometry = self._build(self.metric.covariance.device)
        self.qp = MahalanobisQP(geometry.n_constraints + 1)
        self._kept: tuple[list[Tensor], StackedGeometry] | None = None

    def forward(self, x: Tensor, target: Targets, source: Targets | None = None) -> Tensor:
        """Edited activations, (B, d), in x's dtype; differentiable. See :meth:`solve`.

        Under ``vmap`` a row that would have raised is NaN, as in :meth:`LRQP.forward`.
        """
        return visible(self.solve(x, target, source), self.on_infeasible)

    def solve(
        self,
        x: Tensor,
        target: Targets,
        source: Targets | None = None,
        *,
        realise: Realise | None = None,
        examples: Tensor | None = None,
    ) -> JointSolution:
        """Edit activations, and return the certificate with them.

        Args:
            x: activations, (B, d).
            target: name to class, ``KEEP`` or ``FREE``, each (B,) or one for all; or all of them
                as a tensor (B, V) in the order of ``names``.
            source: classes that hold now, for the ``mirror`` rule, in the same forms; a name that
                is left out, or a negative number, means the probe's own reading.
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
        geometry = self.geometry(x.device)
        choice, sound = self._choice(target, len(x), geometry, "target")
        held, sound_source = self._choice(
            {} if source is None else source, len(x), geometry, "source"
        )

        def floor(margins: Tensor, rows: slice) -> Tensor:
            return slot_floors(
                self._edits(), self.within, geometry, margins, choice[rows], held[rows]
            )

        solution = self.qp.solve(x, choice, floor, geometry, realise=realise)
        if not concrete(choice) or not concrete(held):
            solution = solution.invalidate(~(sound & sound_source), x)
        failed = solution.status >= Status.INFEASIBLE
        if self.on_infeasible == "skip":
            solution = solution.revert(failed & (solution.status != Status.INVALID), x)
        joint = read_odds(self._edits(), geometry, solution, x, choice, held, realise)
        if concrete(failed) and bool(failed.any()):
            raise_joint_failures(joint, x, choice, examples, self.names, self.on_infeasible)
        return joint

    def at(
        self,
        model: nn.Module,
        site: str,
        *,
        positions: Where,
        target: Targets,
        source: Targets | None = None,
    ) -> AbstractContextManager[JointRun]:
        """Edit ``model`` at a site in every forward pass within the context.

            with joint.at(model, "L6.mid", positions=s2, target={"order": 1, "name": 0}) as run:
                logits = model(**inputs).logits
            run.log_odds_after                    # (B, V), in the order of joint.names

        Args:
            model: a transformers model; it is not changed.
            site: ``Ln.pre``, ``Ln.mid`` or ``Ln.post``.
            positions: LongTensor (B,), (B, n) or BoolTensor (B, T).
            target: name to class, ``KEEP`` or ``FREE``, each one for all, (B,) one an example, or
                the shape of positions; or a tensor of one of these shapes with V as a last axis.
            source: classes that hold now, in the same forms.

        Yields:
            A :class:`~lrqp_torch.edits.joint_run.JointRun` that records what the edit did.
        """
        item = self.on(site, positions=positions, target=target, source=source)
        return intervene_once(model, item, JointRun)

    def on(
        self, site: str, *, positions: Where, target: Targets, source: Targets | None = None
    ) -> Intervention:
        """The same edit as an item for :func:`~lrqp_torch.intervene`, to apply several at once."""
        parts = self._parts(target, "target"), self._parts(source or {}, "source")
        return Intervention(site, positions, JointRun(self.solve, positions, *parts))

    def geometry(self, device: torch.device) -> StackedGeometry:
        """What the solves share, on a device; computed anew only when probes or metric change."""
        probes = [edit.probe for edit in self._edits().values()]
        tensors = [self.metric.covariance, *(p.weight for p in probes), *(p.bias for p in probes)]
        if not all(concrete(tensor) for tensor in tensors) or (
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        ):
            return self._build(device)
        kept = self._kept
        if (
            kept is None
            or kept[1].weight.device != device
            or not all(torch.equal(old, new) for old, new in zip(kept[0], tensors, strict=True))
        ):
            with torch.no_grad():
                copies = [tensor.clone() for tensor in tensors]
                self._kept = kept = copies, self._build(device)
        return kept[1]

    def save(self, path: str | Path, **notes: Any) -> Path:
        """Write all edits to a folder: ``joint.json``, and a saved edit in a folder each.

        Raises:
            OutputError: the folder cannot be written, or the notes are not JSON.
        """
        content = {
            "names": list(self.names),
            "kept_by_default": list(self.kept_by_default),
            "within": self.within,
            "on_infeasible": self.on_infeasible,
            "notes": {**self.notes, **notes},
        }
        return save_joint(path, list(self._edits().values()), content)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read edits that :meth:`save` wrote. Nothing is executed.

        Raises:
            SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
        """
        content, edits, metric = load_joint(path)
        try:
            joint = cls(
                edits,
                metric,
                within=content["within"],
                on_infeasible=content["on_infeasible"],
            )
        except LRQPError as error:
            raise SavedEditError(f"{path} does not hold valid edits: {error}") from error
        joint.notes = content["notes"]
        return joint.to(device) if device is not None else joint

    def _build(self, device: torch.device) -> StackedGeometry:
        return build_geometry(self._edits(), self.metric, self.within, device)

    def _edits(self) -> dict[str, LRQP]:
        named = zip(self.names, self.edits, strict=True)
        return {name: edit for name, edit in named if isinstance(edit, LRQP)}

    def _parts(self, targets: Targets, what: str) -> dict[str, Tensor | int]:
        return name_targets(targets, what, self.names, self.kept_by_default)

    def _choice(
        self, targets: Targets, batch: int, geometry: StackedGeometry, what: str
    ) -> tuple[Tensor, Tensor]:
        """The choices, (B, V), and which rows are in range, (B,); seen out of range, they raise."""
        parts = self._parts(targets, what)
        choice = stack_targets(parts, batch, geometry.weight.device, what)
        if concrete(choice):
            geometry.check(choice, batch, what, self.names)
        inside = geometry.in_range(choice)
        return torch.where(inside, choice, FREE), inside.all(-1)
