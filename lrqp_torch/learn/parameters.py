"""The trainable numbers of an edit, in coordinates in which one step suits all of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LearningError
from lrqp_torch.learn.prompts import EditPrompts
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp import Solution
from lrqp_torch.stream.intervene import EditContext

INITIAL_SHRINKAGE = 1e-3
INITIAL_FACTOR = 1e-2
# Eigenvalues of Σ₀ below this share of their mean count as this: where the activations hardly vary,
# neither a step nor the size of an edit is measured in units of next to nothing.
EIGENVALUE_FLOOR = 1e-6


@dataclass(frozen=True)
class Applied:
    """One batch of edits.

    Attributes:
        solution: the certificate of each, rows as the model reached them.
        squared: δᵀ Σ₀⁻¹ δ under the metric that the edit started from, (N,), differentiable.
    """

    solution: Solution
    squared: Tensor


class TrainableEdit:
    """An LRQP whose probe, odds and metric are functions of free parameters.

        W = W₀ + c D Σ₀^(−1/2)      b = b₀ + c √d e      log α = log α₀ exp θ
        Σ = (1 − ρ) Σ₀ + ρ s I + U Uᵀ,    U = Σ₀^(1/2) V / √d,  ρ = sigmoid r,  s = tr Σ₀ / d

    D is the change of the probe in coordinates in which the activations are white, in units of its
    own root mean square c; so an optimiser's step is a share of the probe, in every direction of
    the stream alike. D, e and θ start at 0, ρ at 0.001, and V, (d, rank), at small random numbers
    (at 0 its gradient would vanish). Σ is positive semidefinite and log α positive by construction.

    Args:
        start: the edit to begin with; it is not changed.
        device: where to train.
        probe: whether W and b are trained.
        log_odds: whether log α is.
        metric: whether Σ is.
        rank: columns of U; 0 trains the shrinkage alone.
        seed: of V.

    Attributes:
        free: the free parameters by name, float64 leaves.

    Raises:
        LearningError: nothing is to be trained; or log α is, and does not start above 0; or Σ is,
            and keeps the readings of other probes.
    """

    def __init__(
        self,
        start: LRQP,
        device: torch.device,
        *,
        probe: bool,
        log_odds: bool,
        metric: bool,
        rank: int,
        seed: int,
    ) -> None:
        if not (probe or log_odds or metric):
            raise LearningError("nothing to train: set probe, log_odds or metric")
        if log_odds and not float(start.log_odds) > 0:
            raise LearningError(
                f"log α is trained as a multiple of its start, {float(start.log_odds)}, which must "
                f"be above 0; give the edit another log_odds, or set log_odds=False"
            )
        if metric and getattr(start.metric, "kept", None) is not None:
            raise LearningError(
                "the metric keeps other probes' readings, which a trained one would not; set "
                "metric=False"
            )
        self._edit = _copy(start).to(device)
        self._start = {name: t.double() for name, t in self._edit.state_dict().items()}
        weight, covariance = self._start["probe.weight"], self._start["metric.covariance"]
        values, vectors = torch.linalg.eigh(covariance)
        self._scale = values.mean()
        values = values.clamp_min(EIGENVALUE_FLOOR * float(self._scale))
        self._colour = (vectors * values.sqrt()) @ vectors.T
        self._whiten = (vectors * values.rsqrt()) @ vectors.T
        self._unit = (weight @ self._colour).square().mean().sqrt()

        free: dict[str, Tensor] = {}
        if probe:
            free["weight"] = torch.zeros_like(weight)
            free["bias"] = torch.zeros_like(self._start["probe.bias"])
        if log_odds:
            free["log_odds"] = torch.zeros_like(self._start["log_odds"])
        if metric:
            noise = torch.randn(
                len(covariance), rank, generator=torch.Generator().manual_seed(seed)
            )
            free["shrinkage"] = torch.logit(torch.full_like(self._scale, INITIAL_SHRINKAGE))
            free["factors"] = INITIAL_FACTOR * noise.to(covariance)
        self.free = {name: tensor.requires_grad_(True) for name, tensor in free.items()}

    def tensors(self) -> dict[str, Tensor]:
        """W, b, Σ and log α as they are now, float64, by their names in the edit's state."""
        now, free, width = dict(self._start), self.free, len(self._colour)
        if "weight" in free:
            now["probe.weight"] = now["probe.weight"] + self._unit * free["weight"] @ self._whiten
            now["probe.bias"] = now["probe.bias"] + self._unit * width**0.5 * free["bias"]
        if "log_odds" in free:
            now["log_odds"] = now["log_odds"] * free["log_odds"].exp()
        if "shrinkage" in free:
            share, factors = (
                free["shrinkage"].sigmoid(),
                self._colour @ free["factors"] / width**0.5,
            )
            identity = torch.eye(width, dtype=share.dtype, device=share.device)
            now["metric.covariance"] = (
                (1 - share) * now["metric.covariance"]
                + share * self._scale * identity
                + factors @ factors.T
            )
        return now

    def apply(self, x: Tensor, prompts: EditPrompts, context: EditContext) -> Applied:
        """Solve for the activations x, (N, d), of a batch of prompts."""
        at = context.example
        source = None if prompts.source is None else prompts.source[at]
        applied: Applied = torch.func.functional_call(
            _Solve(self._edit, self._whiten),
            {f"edit.{name}": tensor for name, tensor in self.tensors().items()},
            (x, prompts.target[at], source, context),
        )
        return applied

    @torch.no_grad()
    def settle(self, values: Mapping[str, Tensor]) -> None:
        """Set the free parameters to those of :meth:`snapshot`."""
        for name, tensor in self.free.items():
            tensor.copy_(values[name])

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the free parameters by name."""
        return {name: tensor.detach().clone() for name, tensor in self.free.items()}

    @torch.no_grad()
    def finish(self, device: torch.device) -> LRQP:
        """An ordinary edit with the present numbers, on a device."""
        made, tensors = _copy(self._edit), self.tensors()
        made.probe.weight.copy_(tensors["probe.weight"])
        made.probe.bias.copy_(tensors["probe.bias"])
        metric = made.metric
        if "shrinkage" in self.free:
            share = float(self.free["shrinkage"].sigmoid())
            metric = Mahalanobis(
                tensors["metric.covariance"],
                metric.mean,
                shrinkage=1 - (1 - share) * (1 - metric.shrinkage),
                n_samples=metric.n_samples,
            )
        return made.like(made.probe, metric, float(tensors["log_odds"])).to(device)


class _Solve(nn.Module):
    """The edit's solve as a module's forward, which ``functional_call`` can give other tensors."""

    def __init__(self, edit: LRQP, whiten: Tensor) -> None:
        super().__init__()
        self.edit, self._whiten = edit, whiten

    def forward(
        self, x: Tensor, target: Tensor, source: Tensor | None, context: EditContext
    ) -> Applied:
        solution = self.edit.solve(
            x, target, source, realise=context.realise, examples=context.example
        )
        # From the multipliers, so that the stream's rounding does not count as a displacement.
        geometry = self.edit.geometry(x.device)
        moved = geometry.displace(torch.zeros_like(x), target, solution.multipliers)
        return Applied(solution, (moved @ self._whiten).square().sum(-1))


def _copy(edit: LRQP) -> LRQP:
    """A frozen copy, so that nothing reaches the edit that was given."""
    weight = edit.probe.weight
    probe = LinearProbe(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    probe.load_state_dict(edit.probe.state_dict())
    metric = copy.deepcopy(edit.metric).requires_grad_(False)
    return edit.like(probe.requires_grad_(False), metric)
