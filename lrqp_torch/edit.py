"""LRQP: a probe, a metric and an odds rule make an edit of activations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lrqp_torch.covariance import Mahalanobis, Shrinkage
from lrqp_torch.errors import (
    InfeasibleError,
    LRQPError,
    NonFiniteError,
    SavedEditError,
    SolverError,
    WidthError,
)
from lrqp_torch.intervention import Intervention, intervene
from lrqp_torch.probe import LinearProbe
from lrqp_torch.qp import MahalanobisQP, ProbeGeometry, Solution, Status
from lrqp_torch.qp.checks import as_classes, check_classes
from lrqp_torch.qp.problem import ACTIVE_SET, SOLVERS, Realise
from lrqp_torch.run import EditRun
from lrqp_torch.saving import load_edit, save_edit

Rule = Literal["mirror", "fixed"]
Odds = Literal["pairwise", "total"]


class LRQP(nn.Module):
    """The least edit, in Mahalanobis distance, after which a probe reads the target class.

        minimise  (x' − x)ᵀ Σ⁻¹ (x' − x)   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    (logistic regression + quadratic programming, from "Intervening in the Residual Stream").

    The odds rule sets α for each activation. ``"mirror"``: log α = max(z_v − z_t, log_odds), v the
    source class: the new belief is at least as certain as the old one, and never below the floor.
    For a control edit, t = v, this is the floor. ``"fixed"``: log α = log_odds.

    These odds are pairwise: P[t] / P[ℓ] ≥ α for each ℓ. With K > 2 the total odds
    P[t] / (1 − P[t]) can be smaller, by a factor of at most K − 1. ``odds="total"`` adds log(K − 1)
    to the floor, which is sufficient for total odds of α (not the least such edit).

    Args:
        probe: z(x) = W x + b.
        metric: Σ.
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
        LRQPError: an option that does not exist.
    """

    log_odds: Tensor

    def __init__(
        self,
        probe: LinearProbe,
        metric: Mahalanobis,
        *,
        log_odds: float = 10.0,
        rule: Rule = "mirror",
        odds: Odds = "pairwise",
        on_infeasible: Literal["raise", "skip"] = "raise",
        solver: str = ACTIVE_SET,
        solver_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if probe.width != metric.width:
            raise WidthError(
                f"the probe reads width {probe.width}, the metric has width {metric.width}; fit "
                f"both on activations of the same site"
            )
        _check_option("rule", rule, ("mirror", "fixed"))
        _check_option("odds", odds, ("pairwise", "total"))
        _check_option("on_infeasible", on_infeasible, ("raise", "skip"))
        floor = torch.as_tensor(log_odds, dtype=torch.float64)
        if floor.ndim != 0 or not bool(torch.isfinite(floor)):
            raise NonFiniteError(f"log_odds must be one finite number, got {log_odds}")
        self.probe, self.metric = probe, metric
        self.register_buffer("log_odds", floor)
        self.rule, self.odds, self.on_infeasible = rule, odds, on_infeasible
        self.qp = MahalanobisQP(probe.n_classes, solver=solver, solver_args=solver_args)
        self.notes: dict[str, Any] = {}
        self._geometry: _CachedGeometry | None = None
        self.geometry(probe.weight.device)

    @classmethod
    def fit(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        l2: float | None = None,
        shrinkage: Shrinkage = "ledoit_wolf",
        n_classes: int | None = None,
        **options: Any,
    ) -> Self:
        """Fit probe and metric to activations x, (n, d), with classes y, (n,).

        The covariance is that of all activations together. ``l2`` and ``n_classes`` are those of
        :meth:`LinearProbe.fit`, ``shrinkage`` that of :meth:`Covariance.finish`, and ``options``
        are the constructor's.
        """
        probe = LinearProbe.fit(x, y, l2=l2, n_classes=n_classes)
        return cls(probe, Mahalanobis.fit(x, shrinkage), **options)

    def forward(
        self, x: Tensor, target: Tensor | int, source: Tensor | int | None = None
    ) -> Tensor:
        """Edited activations, (B, d), in x's dtype; differentiable. See :meth:`solve`."""
        return self.solve(x, target, source).x_new

    def solve(
        self,
        x: Tensor,
        target: Tensor | int,
        source: Tensor | int | None = None,
        *,
        realise: Realise | None = None,
        examples: Tensor | None = None,
    ) -> Solution:
        """Edit activations, and return the certificate with them.

        Args:
            x: activations, (B, d).
            target: class to write, (B,) or one for all.
            source: class that holds now, for the ``mirror`` rule; default the probe's own reading.
            realise: see :meth:`MahalanobisQP.solve`.
            examples: names for the rows in error messages, (B,); default 0, 1, ….

        Raises:
            WidthError, TargetError, NonFiniteError: bad input, named.
            InfeasibleError: a target that no activation reaches, unless on_infeasible is "skip".
            SolverError: the odds read back fall short of α, unless on_infeasible is "skip".
        """
        geometry = self.geometry(x.device)
        if x.ndim != 2 or x.shape[1] != geometry.width:
            raise WidthError(f"activations must be (B, {geometry.width}), got {tuple(x.shape)}")
        target = self._classes(x, target, "target")
        floor = self._floor(x, target, source, geometry)
        solution = self.qp.solve(x, target, floor, geometry, realise=realise)
        return self._judge(solution, x, target, examples)

    def at(
        self,
        model: nn.Module,
        site: str,
        *,
        positions: Tensor,
        target: Tensor | int,
        source: Tensor | int | None = None,
    ) -> AbstractContextManager[EditRun]:
        """Edit ``model`` at a site in every forward pass within the context.

            with edit.at(model, "L6.mid", positions=s2, target=1 - labels) as run:
                logits = model(**inputs).logits

        Args:
            model: a transformers model; it is not changed.
            site: ``Ln.pre``, ``Ln.mid`` or ``Ln.post``.
            positions: LongTensor (B,), (B, n) or BoolTensor (B, T).
            target: class to write: one for all, (B,) one an example, or the shape of positions.
            source: class that holds now, in the same shapes; default the probe's own reading.

        Yields:
            An :class:`~lrqp_torch.run.EditRun` that records what the edit did.
        """
        return _edit_at(model, self.on(site, positions=positions, target=target, source=source))

    def on(
        self,
        site: str,
        *,
        positions: Tensor,
        target: Tensor | int,
        source: Tensor | int | None = None,
    ) -> Intervention:
        """The same edit as an item for :func:`~lrqp_torch.intervene`, to apply several at once."""
        run = EditRun(self.solve, positions, target, source)
        return Intervention(site, positions, run)

    def geometry(self, device: torch.device) -> ProbeGeometry:
        """What the solves share, on a device; computed anew only when probe or metric change."""
        tensors = (self.probe.weight, self.probe.bias, self.metric.covariance)
        moved = tuple(tensor.to(device) for tensor in tensors)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return ProbeGeometry.build(*moved)
        # The probe is small enough to compare by value, which sees every way of changing it:
        # .data, .double() and the like leave no trace in a tensor's version.
        probe, metric = moved[:2], self.metric.covariance
        # A tensor made in inference mode counts no versions, and cannot be changed in place.
        version = None if metric.is_inference() else metric._version
        mark = (device, version, metric.data_ptr())
        kept = self._geometry
        if (
            kept is None
            or kept.metric is not metric
            or kept.mark != mark
            or not all(_same(old, new) for old, new in zip(kept.probe, probe, strict=True))
        ):
            with torch.no_grad():
                copies = probe[0].clone(), probe[1].clone()
                geometry = ProbeGeometry.build(*copies, moved[2])
            self._geometry = kept = _CachedGeometry(mark, metric, copies, geometry)
        return kept.geometry

    def save(self, path: str | Path, **notes: Any) -> Path:
        """Write the edit to a folder, as ``edit.safetensors`` and ``edit.json``.

        Args:
            path: the folder; made if it is missing, its edit replaced if it has one.
            notes: anything that JSON can hold, such as ``site="L6.mid"``; read back in ``notes``.

        Raises:
            OutputError: the folder cannot be written.
        """
        options = {name: getattr(self, name) for name in ("rule", "odds", "on_infeasible")}
        options |= {"solver": self.qp.solver_name, "solver_args": self.qp.solver_args}
        return save_edit(path, self.state_dict(), options, {**self.notes, **notes}, self._facts())

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read an edit that :meth:`save` wrote. Nothing is executed.

        Raises:
            SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
            SolverError: it was saved with a solver that is not installed here.
        """
        saved = load_edit(path)
        tensors = saved.tensors
        weight = tensors["probe.weight"]
        probe = LinearProbe(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        probe.requires_grad_(False)
        probe.weight.copy_(weight)
        probe.bias.copy_(tensors["probe.bias"])
        try:
            metric = Mahalanobis(
                tensors["metric.covariance"],
                tensors.get("metric.mean"),
                shrinkage=saved.facts["shrinkage"],
                n_samples=saved.facts["n_samples"],
            )
            edit = cls(probe, metric, log_odds=float(tensors["log_odds"]), **saved.options)
        except LRQPError as error:
            if isinstance(error, SolverError) and saved.options["solver"] in SOLVERS:
                raise
            raise SavedEditError(f"{path} does not hold a valid edit: {error}") from error
        edit.notes = saved.notes
        return edit.to(device) if device is not None else edit

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A floor rounded to half precision could promise less than was asked for.
        floor = self.log_odds
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.log_odds = floor.to(self.log_odds.device)
        return self

    def _facts(self) -> dict[str, Any]:
        return {
            "n_classes": self.probe.n_classes,
            "width": self.probe.width,
            "shrinkage": self.metric.shrinkage,
            "n_samples": self.metric.n_samples,
        }

    def _classes(self, x: Tensor, classes: Tensor | int, name: str) -> Tensor:
        classes = as_classes(classes, name).to(x.device)
        if classes.ndim == 0:
            classes = classes.expand(len(x))
        check_classes(classes, len(x), self.probe.n_classes, name)
        return classes.long()

    def _floor(
        self, x: Tensor, target: Tensor, source: Tensor | int | None, geometry: ProbeGeometry
    ) -> Tensor:
        floor = self.log_odds.to(x.device).expand(len(x))
        if self.rule == "mirror":
            logits = geometry.logits(x)
            held = logits.argmax(-1) if source is None else self._classes(x, source, "source")
            belief = logits.gather(-1, torch.stack([held, target], -1))
            floor = torch.maximum(belief[:, 0] - belief[:, 1], floor)
        elif source is not None:
            self._classes(x, source, "source")
        if self.odds == "total":
            floor = floor + torch.tensor(float(self.probe.n_classes - 1), device=x.device).log()
        return floor

    def _judge(
        self, solution: Solution, x: Tensor, target: Tensor, examples: Tensor | None
    ) -> Solution:
        """Raise for examples that did not reach their target, or leave them as they were."""
        infeasible = solution.status == Status.INFEASIBLE
        inaccurate = solution.status == Status.INACCURATE
        failed = infeasible | inaccurate
        if not bool(failed.any()):
            return solution
        if self.on_infeasible == "skip":
            return solution.revert(failed, x)
        names = torch.arange(len(x), device=x.device) if examples is None else examples
        if bool(infeasible.any()):
            which = names[infeasible].tolist()
            classes = sorted(set(target[infeasible].tolist()))
            raise InfeasibleError(
                f"no activation reaches target class {classes} for {len(which)} examples, first "
                f"{which[:10]}: some class has the same weights as the target, or the metric "
                f"has no length along their difference. Choose another target, lower log_odds, "
                f"shrink the covariance, or pass on_infeasible='skip' to leave them unchanged"
            )
        which = names[inaccurate].tolist()
        if not bool(torch.isfinite(solution.x_new[inaccurate]).all()):
            raise SolverError(
                f"the edits of {len(which)} examples exceed what {x.dtype} can hold, first "
                f"{which[:10]}: log odds of up to {float(solution.floor.detach().max()):.3g} are "
                f"asked for. Lower log_odds, run the model in a wider dtype, or pass "
                f"on_infeasible='skip'"
            )
        short = float((solution.floor - solution.log_odds_after).detach()[inaccurate].max())
        residual = float(solution.kkt_residual[inaccurate].max())
        raise SolverError(
            f"{len(which)} examples could not be solved accurately, first {which[:10]}: log odds "
            f"short by up to {short:.1e}, KKT residual up to {residual:.1e}. Refit the probe "
            f"with a larger l2 or the metric with more shrinkage, or pass on_infeasible='skip'"
        )


@dataclass(frozen=True)
class _CachedGeometry:
    """A geometry, and what it was computed from."""

    mark: tuple[Any, ...]
    metric: Tensor
    probe: tuple[Tensor, Tensor]
    geometry: ProbeGeometry


def _same(old: Tensor, new: Tensor) -> bool:
    return old.dtype == new.dtype and torch.equal(old, new)


@contextmanager
def _edit_at(model: nn.Module, intervention: Intervention) -> Iterator[EditRun]:
    with intervene(model, [intervention]) as (run,):
        assert isinstance(run, EditRun)
        yield run


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LRQPError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
