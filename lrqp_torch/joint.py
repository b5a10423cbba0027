"""Several variables edited at one site in one problem: every odds holds at the end."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lrqp_torch.covariance import Mahalanobis
from lrqp_torch.edit import LRQP
from lrqp_torch.errors import InfeasibleError, LRQPError, SavedEditError, TargetError, WidthError
from lrqp_torch.failures import raise_failures
from lrqp_torch.intervention import Intervention, intervene
from lrqp_torch.joint_run import JointRun
from lrqp_torch.joint_saving import load_joint, save_joint
from lrqp_torch.odds import floors
from lrqp_torch.probe import LinearProbe
from lrqp_torch.qp import MahalanobisQP, Solution, Status
from lrqp_torch.qp.checks import as_classes, check_finite, concrete
from lrqp_torch.qp.problem import Realise
from lrqp_torch.qp.stacked import FREE, KEEP, StackedGeometry

Targets = Mapping[str, Tensor | int] | Tensor


@dataclass(frozen=True, repr=False)
class JointSolution(Solution):
    """What one problem did to several variables: a :class:`Solution` with V columns of odds.

    ``floor``, ``log_odds_before`` and ``log_odds_after`` are (B, V), NaN where a variable was not
    written; ``multipliers`` and ``active`` are those of all constraints together, (B, m).

    Attributes:
        moved: the largest change of any log odds z_j − z_k of a variable, read back, (B, V): for a
            kept variable what rounding or its tolerance let through.
    """

    moved: Tensor


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
        if not isinstance(edits, Mapping):
            edits = {str(place): edit for place, edit in enumerate(edits)}
        if on_infeasible not in ("raise", "skip"):
            raise LRQPError(f"on_infeasible must be 'raise' or 'skip', got {on_infeasible!r}")
        self.metric = _common_metric(edits) if metric is None else metric
        self.names = tuple(edits)
        self.kept_by_default = tuple(
            name for name, edit in edits.items() if not isinstance(edit, LRQP)
        )
        self.edits = nn.ModuleList(_with_metric(edit, self.metric) for edit in edits.values())
        self.within = {name: float(value) for name, value in (within or {}).items()}
        for name, value in self.within.items():
            if name not in self.names or not (math.isfinite(value) and value > 0):
                raise LRQPError(
                    f"within must map names among {list(self.names)} to positive numbers, got "
                    f"{name!r}: {value}; for exact keeping leave it out"
                )
        self.on_infeasible = on_infeasible
        self.notes: dict[str, Any] = {}
        geometry = self._build(self.metric.covariance.device)
        self.qp = MahalanobisQP(geometry.n_constraints + 1)
        self._kept: tuple[list[Tensor], StackedGeometry] | None = None

    def forward(self, x: Tensor, target: Targets, source: Targets | None = None) -> Tensor:
        """Edited activations, (B, d), in x's dtype; differentiable. See :meth:`solve`."""
        return self.solve(x, target, source).x_new

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
        geometry = self.geometry(x.device)
        if x.ndim != 2 or x.shape[1] != geometry.width:
            raise WidthError(f"activations must be (B, {geometry.width}), got {tuple(x.shape)}")
        choice = self._choice(target, len(x), x.device, "target")
        held = (
            torch.full_like(choice, FREE)
            if source is None
            else self._choice(source, len(x), x.device, "source")
        )

        def floor(margins: Tensor, rows: slice) -> Tensor:
            return self._floors(geometry, margins, choice[rows], held[rows])

        solution = self.qp.solve(x, choice, floor, geometry, realise=realise)
        failed = solution.status >= Status.INFEASIBLE
        if self.on_infeasible == "skip":
            solution = solution.revert(failed & (solution.status != Status.INVALID), x)
        joint = self._read(geometry, solution, x, choice, held, realise)
        if concrete(failed) and bool(failed.any()):
            self._raise(joint, x, choice, examples)
        return joint

    def at(
        self,
        model: nn.Module,
        site: str,
        *,
        positions: Tensor,
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
            A :class:`~lrqp_torch.joint_run.JointRun` that records what the edit did.
        """
        return _edit_at(model, self.on(site, positions=positions, target=target, source=source))

    def on(
        self, site: str, *, positions: Tensor, target: Targets, source: Targets | None = None
    ) -> Intervention:
        """The same edit as an item for :func:`~lrqp_torch.intervene`, to apply several at once."""
        parts = self._parts(target, "target"), self._parts(source or {}, "source")
        return Intervention(site, positions, JointRun(self.solve, positions, *parts))

    def geometry(self, device: torch.device) -> StackedGeometry:
        """What the solves share, on a device; computed anew only when probes or metric change."""
        tensors = [self.metric.covariance, *self._weights(), *self._biases()]
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
        return save_joint(path, self._edits(), content)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read edits that :meth:`save` wrote. Nothing is executed.

        Raises:
            SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
        """
        content, saved = load_joint(path)
        names, bare = content["names"], content["kept_by_default"]
        try:
            joint = cls(
                {
                    name: edit.probe if name in bare else edit
                    for name, edit in zip(names, saved, strict=True)
                },
                saved[0].metric,
                within=content["within"],
                on_infeasible=content["on_infeasible"],
            )
        except LRQPError as error:
            raise SavedEditError(f"{path} does not hold valid edits: {error}") from error
        joint.notes = content["notes"]
        return joint.to(device) if device is not None else joint

    def _build(self, device: torch.device) -> StackedGeometry:
        return StackedGeometry.build(
            [weight.to(device) for weight in self._weights()],
            [bias.to(device) for bias in self._biases()],
            self.metric.covariance.to(device),
            [name in self.within for name in self.names],
        )

    def _weights(self) -> list[Tensor]:
        return [edit.probe.weight for edit in self._edits()]

    def _biases(self) -> list[Tensor]:
        return [edit.probe.bias for edit in self._edits()]

    def _edits(self) -> list[LRQP]:
        return [edit for edit in self.edits if isinstance(edit, LRQP)]

    def _parts(self, targets: Targets, what: str) -> dict[str, Tensor | int]:
        """One entry a variable, in order; from a mapping, or from a tensor with V as last axis."""
        if isinstance(targets, Mapping):
            unknown = set(targets) - set(self.names)
            if unknown:
                raise TargetError(
                    f"{what} names {sorted(unknown)}, the variables are {list(self.names)}"
                )
            parts = dict(targets)
            for name in self.names:
                if name in parts:
                    continue
                if what == "target" and name not in self.kept_by_default:
                    raise TargetError(
                        f"no target for {name!r}: give a class, KEEP to hold its beliefs where "
                        f"they are, or FREE to let them move"
                    )
                parts[name] = KEEP if what == "target" else FREE
            return {name: parts[name] for name in self.names}
        tensor = as_classes(targets, what)
        if tensor.ndim == 0 or tensor.shape[-1] != len(self.names):
            raise TargetError(
                f"{what} must be a mapping from {list(self.names)}, or a tensor with these "
                f"{len(self.names)} as last axis, got {tuple(tensor.shape)}"
            )
        return dict(zip(self.names, tensor.unbind(-1), strict=True))

    def _choice(self, targets: Targets, batch: int, device: torch.device, what: str) -> Tensor:
        columns = []
        for name, part in self._parts(targets, what).items():
            column = as_classes(part, f"{what} of {name!r}").to(device)
            if column.dtype.is_floating_point or column.dtype == torch.bool:
                raise TargetError(f"{what} of {name!r} must hold integers, got {column.dtype}")
            if column.ndim and column.shape != (batch,):
                raise TargetError(
                    f"{what} of {name!r} must be one number or ({batch},), got "
                    f"{tuple(column.shape)}"
                )
            columns.append(column.long().expand(batch))
        choice = torch.stack(columns, -1)
        if concrete(choice):
            self.geometry(device).check(choice, batch)
        return choice

    def _floors(
        self, geometry: StackedGeometry, margins: Tensor, choice: Tensor, held: Tensor
    ) -> Tensor:
        """The floor of every slot: log α, the margin at x less τ, or what always holds; (b, m)."""
        columns = []
        for place, (name, edit) in enumerate(zip(self.names, self._edits(), strict=True)):
            own = margins[:, geometry.variable == place]
            log_odds = self._log_odds(edit, own, choice[:, place], held[:, place])
            written, kept = choice[:, place] >= 0, choice[:, place] == KEEP
            slot = torch.arange(own.shape[-1], device=own.device)
            inside = written.unsqueeze(-1) & (slot < edit.probe.n_classes - 1)
            floor = torch.where(inside, log_odds.unsqueeze(-1), -1.0)
            if name in self.within:
                floor = torch.where(kept.unsqueeze(-1), own - self.within[name], floor)
            columns.append(floor)
        return torch.cat(columns, -1)

    @staticmethod
    def _log_odds(edit: LRQP, margins: Tensor, target: Tensor, held: Tensor) -> Tensor:
        """Log α of a variable by its own rule, (b,); any number where it is not written."""
        n_rivals = edit.probe.n_classes - 1
        margins, target = margins[:, :n_rivals], target.clamp_min(0)
        floor = edit.log_odds.to(margins.device)
        read = floors(margins, target, None, floor, edit.rule, "pairwise")
        given = floors(margins, target, held.clamp_min(0), floor, edit.rule, "pairwise")
        result = torch.where(held >= 0, given, read)
        # Sufficient for total odds of α; their exact form is not linear.
        return result + math.log(n_rivals) if edit.odds == "total" else result

    def _read(
        self,
        geometry: StackedGeometry,
        solution: Solution,
        x: Tensor,
        choice: Tensor,
        held: Tensor,
        realise: Realise | None,
    ) -> JointSolution:
        """The solution with the odds of each variable, read back from what the stream holds."""
        with torch.no_grad():
            edited = solution.x_new.detach().double()
            stored = edited if realise is None else realise(edited)
            unchanged = (solution.x_new == x).all(-1, keepdim=True)
            stored = torch.where(unchanged, x.double(), stored)
            logits_after = geometry.logits(stored)
        logits_before = geometry.logits(x)
        before: list[Tensor] = []
        after: list[Tensor] = []
        floor: list[Tensor] = []
        moved: list[Tensor] = []
        start = 0
        for place, edit in enumerate(self._edits()):
            target = choice[:, place]
            columns = slice(start, start + edit.probe.n_classes)
            start = columns.stop
            written = target >= 0
            margins = _margins(logits_before[:, columns], target)
            odds = self._log_odds(edit, margins, target, held[:, place])
            for values, into in (
                (margins.amin(-1), before),
                (_margins(logits_after[:, columns], target).amin(-1), after),
                (odds, floor),
            ):
                into.append(torch.where(written, values, torch.nan))
            change = logits_after[:, columns] - logits_before[:, columns].detach()
            moved.append(change.amax(-1) - change.amin(-1))
        parts = {field.name: getattr(solution, field.name) for field in fields(Solution)}
        parts |= {
            "log_odds_before": torch.stack(before, -1),
            "log_odds_after": torch.stack(after, -1),
            "floor": torch.stack(floor, -1),
        }
        return JointSolution(**parts, moved=torch.stack(moved, -1))

    def _raise(
        self, solution: JointSolution, x: Tensor, choice: Tensor, examples: Tensor | None
    ) -> None:
        names = torch.arange(len(x), device=x.device) if examples is None else examples
        status = solution.status
        if self.on_infeasible == "skip":
            status = torch.where(status == Status.INVALID, status, int(Status.SATISFIED))
        check_finite(x)
        infeasible = status == Status.INFEASIBLE
        if bool(infeasible.any()):
            which = names[infeasible].tolist()
            asked = choice[infeasible][0].tolist()
            said = {FREE: "free", KEEP: "kept"}
            wishes = ", ".join(
                f"{name} {said.get(value, value)}"
                for name, value in zip(self.names, asked, strict=True)
            )
            raise InfeasibleError(
                f"no activation meets all that is asked of {len(which)} examples, first "
                f"{which[:10]} ({wishes}): targets contradict each other, or the directions that "
                f"one needs are kept for another. Leave a variable FREE, keep it within a "
                f"tolerance (within={{name: nats}}), or pass on_infeasible='skip'"
            )
        reached = solution.log_odds_after.detach()
        raise_failures(
            status,
            names=names,
            target=choice[:, 0],
            floor=solution.floor.detach().nan_to_num(-torch.inf).amax(-1),
            reached=(solution.floor.detach() * 0 + reached).nan_to_num(torch.inf).amin(-1),
            residual=solution.kkt_residual,
            overflow=~torch.isfinite(solution.x_new.detach()).all(-1),
            dtype=x.dtype,
        )


def _margins(logits: Tensor, target: Tensor) -> Tensor:
    """z_t − z_ℓ over the other classes ascending, (B, K−1); t = 0 where there is no target."""
    target = target.clamp_min(0).unsqueeze(-1)
    index = torch.arange(logits.shape[-1] - 1, device=logits.device)
    other = index + (index >= target).long()
    return logits.gather(-1, target) - logits.gather(-1, other)


def _common_metric(edits: Mapping[str, LRQP | LinearProbe]) -> Mahalanobis:
    metrics = {name: edit.metric for name, edit in edits.items() if isinstance(edit, LRQP)}
    if not metrics:
        raise LRQPError("give at least one LRQP, or probes and a metric")
    first_name, first = next(iter(metrics.items()))
    for name, metric in metrics.items():
        if metric is not first and not torch.equal(metric.covariance, first.covariance):
            raise LRQPError(
                f"{first_name!r} and {name!r} have different metrics, and one problem has one: "
                f"pass metric=, for example that of the edit fitted on more activations"
            )
    return first


def _with_metric(edit: LRQP | LinearProbe, metric: Mahalanobis) -> LRQP:
    if not isinstance(edit, LRQP):
        return LRQP(edit, metric)
    if edit.metric is metric:
        return edit
    return LRQP(
        edit.probe,
        metric,
        log_odds=float(edit.log_odds),
        rule=edit.rule,
        odds=edit.odds,
    )


@contextmanager
def _edit_at(model: nn.Module, intervention: Intervention) -> Iterator[JointRun]:
    with intervene(model, [intervention]) as (run,):
        assert isinstance(run, JointRun)
        yield run
