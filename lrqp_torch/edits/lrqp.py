"""LRQP: a probe, a metric and an odds rule make an edit of activations."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lrqp_torch.edits.attempt import attempt, judge, visible
from lrqp_torch.edits.edit_files import read_edit, write_edit
from lrqp_torch.edits.hub import fetched_folder, pushed
from lrqp_torch.edits.odds import Odds, Rule
from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import LRQPError, NonFiniteError, SolverError, WidthError, check_activations
from lrqp_torch.probes.covariance import Mahalanobis, Shrinkage
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp import MahalanobisQP, ProbeGeometry, Solution
from lrqp_torch.qp.cache import GeometryCache
from lrqp_torch.qp.external import ACTIVE_SET
from lrqp_torch.qp.problem import Realise
from lrqp_torch.qp.total_odds import TotalOddsProblem
from lrqp_torch.stream.intervene import Intervention, intervene_once
from lrqp_torch.stream.scopes import Where


class LRQP(nn.Module):
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
        SolverError: ``odds="total"`` with a solver of cvxpylayers.
        LRQPError: an option that does not exist.

    Attributes:
        provenance: what the edit was fitted on, saved with it and checked by :meth:`at`; None
            where that is not known.
        notes: what was given to :meth:`save`.
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
        self.qp: MahalanobisQP | TotalOddsProblem
        if odds == "total" and probe.n_classes > 2:
            if solver != ACTIVE_SET:
                raise SolverError(f"odds='total' has a solver of its own; leave {solver!r} out")
            self.qp = TotalOddsProblem()
        else:
            self.qp = MahalanobisQP(probe.n_classes, solver=solver, solver_args=solver_args)
        self.notes: dict[str, Any] = {}
        self.provenance: Provenance | None = None
        self._geometry = GeometryCache()
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
        """Edited activations, (B, d), in x's dtype; differentiable. See :meth:`solve`.

        Under ``vmap`` and in a compiled graph, where nothing can raise, a row that would have
        raised is NaN; the status of :meth:`solve` says why.
        """
        return visible(self.solve(x, target, source), self.on_infeasible)

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
        check_activations(x, self.probe.width)
        geometry = self.geometry(x.device)
        solution = attempt(self, x, target, source, realise, geometry)
        return judge(self, solution, x, target, examples)

    def propose(
        self,
        x: Tensor,
        target: Tensor | int,
        source: Tensor | int | None = None,
        *,
        realise: Realise | None = None,
    ) -> Solution:
        """:meth:`solve` without a look at the outcome, which is left in the status.

        On a GPU, with K ≤ 8 and classes as tensors there, it never waits for the device, so it can
        be captured in a CUDA graph. What is seen to be wrong without waiting still raises.
        """
        check_activations(x, self.probe.width)
        tensors = self.probe.weight, self.probe.bias, self.metric.covariance
        if x.device.type == "cpu":
            return attempt(self, x, target, source, realise, self.geometry(x.device))
        geometry, stale = self._geometry.peek(*tensors, x.device)
        return attempt(self, x, target, source, realise, geometry, stale)

    def at(
        self,
        model: nn.Module,
        site: str,
        *,
        positions: Where,
        target: Tensor | int,
        source: Tensor | int | None = None,
    ) -> AbstractContextManager[EditRun]:
        """Edit ``model`` at a site in every forward pass within the context.

            with edit.at(model, "L6.mid", positions=s2, target=1 - labels) as run:
                logits = model(**inputs).logits

        Args:
            model: a transformers model; it is not changed.
            site: ``Ln.pre``, ``Ln.mid`` or ``Ln.post``.
            positions: LongTensor (B,), (B, n) or BoolTensor (B, T); or, around ``model.generate``,
                ``"prompt"``, ``"generated"``, ``"all"`` or a :class:`~lrqp_torch.Scope`.
            target: class to write: one for all, (B,) one an example, or the shape of positions.
            source: class that holds now, in the same shapes; default the probe's own reading.

        Yields:
            An :class:`~lrqp_torch.edits.record.EditRun` that records what the edit did.

        Raises:
            ProvenanceError: the edit was fitted on a model of another family or size.
        """
        if self.provenance is not None:
            self.provenance.check(model, site)
        item = self.on(site, positions=positions, target=target, source=source)
        return intervene_once(model, item, EditRun)

    def on(
        self,
        site: str,
        *,
        positions: Where,
        target: Tensor | int,
        source: Tensor | int | None = None,
    ) -> Intervention:
        """The same edit as an item for :func:`~lrqp_torch.intervene`, to apply several at once."""
        run = EditRun(self.solve, positions, target, source, edit=self)
        return Intervention(site, positions, run)

    def geometry(self, device: torch.device) -> ProbeGeometry:
        """What the solves share, on a device; computed anew only when probe or metric change."""
        return self._geometry.get(
            self.probe.weight, self.probe.bias, self.metric.covariance, device
        )

    def save(self, path: str | Path, **notes: Any) -> Path:
        """Write the edit to a folder: ``edit.safetensors``, ``edit.json`` and a model card.

        Args:
            path: the folder; made if it is missing, its edit replaced if it has one.
            notes: anything that JSON can hold, such as ``site="L6.mid"``; read back in ``notes``.

        Raises:
            OutputError: the folder cannot be written.
        """
        return write_edit(self, path, notes)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read an edit that :meth:`save` wrote. Nothing is executed.

        Raises:
            SavedEditError: missing, damaged, foreign, of a newer format, or holding NaN.
            SolverError: it was saved with a solver that is not installed here.
        """
        edit = read_edit(cls, path)
        return edit.to(device) if device is not None else edit

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load from a folder, or from the Hugging Face Hub.

        Raises:
            HubError: no such folder, and the Hub has none or cannot be reached.
            SavedEditError: as :meth:`load`.
        """
        return cls.load(fetched_folder(name_or_path, revision=revision, token=token), device)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Send the edit to the Hub; ``options`` are those of :func:`~.sharing.hub.pushed`."""
        return pushed(self.save, repo_id, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A floor rounded to half precision could promise less than was asked for.
        floor = self.log_odds
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.log_odds = floor.to(self.log_odds.device)
        return self


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LRQPError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
