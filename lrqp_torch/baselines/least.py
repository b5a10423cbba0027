"""Least edits: LRQP itself behind the baselines' call, in other metrics, and of its size."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import CovarianceError
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.stream.intervene import EditContext


class LeastEdit(Baseline):
    """The least edit that reaches the reference's odds, in a metric of choice.

        minimise  (x' − x)ᵀ M⁻¹ (x' − x)   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    With M = Σ, the reference's own, this is LRQP, from "Intervening in the Residual Stream", and at
    strength 1 it returns the same bits. At other strengths the odds promised do not hold.

    Args:
        reference: gives the probe and the odds rule, and the metric in which the edit is measured.
        metric: M; default the reference's.
    """

    name: ClassVar[str] = "lrqp"
    title: ClassVar[str] = "LRQP"

    def __init__(
        self, reference: LRQP, metric: Mahalanobis | None = None, *, strength: float = 1.0
    ) -> None:
        super().__init__(reference, strength=strength)
        self.program = reference if metric is None else reference.like(reference.probe, metric)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`.

        Raises:
            InfeasibleError, SolverError: as :meth:`LRQP.solve`.
        """
        solution = self.program.solve(
            x, target, source, realise=context.realise, examples=context.example
        )
        return solution.x_new


class EuclideanLeastEdit(LeastEdit):
    """The shortest edit, in the units of the stream, that reaches the reference's odds.

        minimise  ‖x' − x‖²   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    For K = 2 it moves along the probe's own weights: x' = x + max(0, log α − a·x − c) a / ‖a‖² with
    a = w_t − w_ℓ and c = b_t − b_ℓ. LiSeCo (Cheng and Amo Alonso 2024, arXiv 2405.15454) and MERA
    (Hedström et al. 2025, arXiv 2510.13290) make this edit, each with its own probe and threshold.

    Args:
        reference: gives the probe and the odds rule, and the metric in which the edit is measured.
    """

    name: ClassVar[str] = "euclidean"
    title: ClassVar[str] = "Euclidean least edit"

    def __init__(self, reference: LRQP, *, strength: float = 1.0) -> None:
        metric = Mahalanobis.euclidean(reference.probe.width)
        super().__init__(reference, metric, strength=strength)


class InverseMetric(LeastEdit):
    """The edit that changes the activations' own projections least, and reaches the odds.

        minimise  (x' − x)ᵀ Σ (x' − x)   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    For K = 2 it moves along Σ⁻¹(w_t − w_ℓ): into the directions in which activations vary least,
    where LRQP avoids them. The direction is that of the causal inner product of Park, Choe and
    Veitch (2023, arXiv 2311.03658), who take the covariance of the unembedding in place of Σ. It
    stands here as the control that turns the metric the wrong way round.

    Args:
        reference: gives the probe and the odds rule, and the metric in which the edit is measured.

    Raises:
        CovarianceError: Σ has no inverse to working precision.
    """

    name: ClassVar[str] = "inverse_metric"
    title: ClassVar[str] = "inverse metric"

    def __init__(self, reference: LRQP, *, strength: float = 1.0) -> None:
        values, vectors = torch.linalg.eigh(reference.metric.covariance)
        if float(values[0]) <= 1e-12 * float(values[-1]):
            raise CovarianceError(
                f"the covariance has eigenvalues from {float(values[0]):.1e} to "
                f"{float(values[-1]):.1e} and cannot be inverted; fit the metric with shrinkage"
            )
        inverse = (vectors / values) @ vectors.T
        # The size of a metric does not matter to its least edit; the mean eigenvalue is made 1.
        inverse = inverse * len(inverse) / inverse.diagonal().sum()
        metric = Mahalanobis((inverse + inverse.T) / 2)
        super().__init__(reference, metric, strength=strength)


TURNS = 3.0
"""Standard deviation, in turns, of the phases that a random direction is made of, over activations
that vary as Σ says: of those that are a tenth as far apart, directions are hardly alike."""


class RandomDirection(Baseline):
    """A step of LRQP's own Mahalanobis length for the same example, in a random direction.

        x' = x + r Σ^{1/2} g / ‖g‖,   g ~ N(0, I),   r = √((x* − x)ᵀ Σ⁻¹ (x* − x))

    with x* LRQP's edit of x to the same target: a uniform draw from the ellipsoid of all edits as
    large as LRQP's. Where LRQP changes nothing, neither does this. What it flips, an edit flips by
    its size alone.

    The direction depends on the seed and the activation, and on nothing else: not on the batch that
    it comes in, nor, beyond rounding, on what rounding that made of it. So g is made of phases
    φ = Ωx of random frequencies Ω, as independent from one activation to another as those are
    apart; a pair of them makes two normal numbers (Box and Muller 1958).

    Args:
        reference: the LRQP.
        seed: of the directions.
    """

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random direction, LRQP's size"
    root: Tensor
    frequencies: Tensor

    def __init__(self, reference: LRQP, *, seed: int = 0, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        self.seed = seed
        values, vectors = torch.linalg.eigh(reference.metric.covariance)
        present = values > values[-1] * self.width * torch.finfo(values.dtype).eps
        # In Σ's eigenbasis without its null space, so that a singular Σ has no infinite steps.
        values, vectors = values[present], vectors[:, present]
        self.register_buffer("root", vectors * values.sqrt())
        rank = len(values)
        drawn = torch.randn(
            rank + rank % 2,
            rank,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(seed),
        )
        drawn = drawn.to(values.device) * (TURNS / rank**0.5)
        self.register_buffer("frequencies", drawn @ (vectors / values.sqrt()).T)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls(data.reference, seed=data.seed)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`.

        Raises:
            InfeasibleError, SolverError: as :meth:`LRQP.solve`.
        """
        solution = self.reference.solve(
            x, target, source, realise=context.realise, examples=context.example
        )
        phases = (x.double() @ self.frequencies.T) % 1
        uniform, turn = phases.unflatten(-1, (-1, 2)).unbind(-1)
        # Up and down again, without a step where a phase begins anew.
        radius = (-2 * (2 * uniform - 1).abs().clamp_min(1e-300).log()).sqrt()
        both = torch.stack([torch.cos(2 * torch.pi * turn), torch.sin(2 * torch.pi * turn)], dim=-1)
        normal = (radius.unsqueeze(-1) * both).flatten(-2)[:, : self.root.shape[1]]
        direction = torch.nn.functional.normalize(normal, dim=-1) @ self.root.T
        return x.double() + solution.distance.unsqueeze(-1) * direction
