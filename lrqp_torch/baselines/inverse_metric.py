"""The least edit in the inverse metric: LRQP with Σ⁻¹ in the place of Σ."""

from typing import ClassVar

import torch

from lrqp_torch.baselines.least_edit import LeastEdit
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import CovarianceError
from lrqp_torch.probes.covariance import Mahalanobis


class InverseMetric(LeastEdit):
    """The edit that changes the activations' own projections least, and reaches the odds.

        minimise  (x' − x)ᵀ Σ (x' − x)   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    For K = 2 it moves along Σ⁻¹(w_t − w_ℓ): into the directions in which activations vary least,
    where LRQP avoids them. The direction is that of the causal inner product of Park, Choe and
    Veitch (2023, arXiv 2311.03658), who take the covariance of the unembedding in place of Σ. It
    stands here as the control that turns the metric the wrong way round.

    Args:
        reference: gives the probe and the odds rule, and the metric in which the edit is measured.
        strength: see :class:`Baseline`.

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
