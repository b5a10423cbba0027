"""Mahalanobis lengths of many displacements, with the covariance factored once."""

import torch
from torch import Tensor

from lrqp_torch.probes.covariance import Mahalanobis


class MahalanobisLength:
    """√(δᵀ Σ⁻¹ δ), as :meth:`Mahalanobis.distance`, for use in every forward pass of a model.

    Σ = L Lᵀ is kept for as long as the metric stays what it is, and the length is ‖L⁻¹δ‖. Where Σ
    is singular to rounding, ``distance`` itself is called, which knows of displacements that leave
    Σ's range.

    Args:
        metric: Σ.
    """

    def __init__(self, metric: Mahalanobis) -> None:
        self.metric = metric
        self._mark: tuple[object, ...] | None = None
        self._factor: Tensor | None = None

    @torch.no_grad()
    def __call__(self, delta: Tensor) -> Tensor:
        """Lengths of displacements, (N, d) → (N,), float64."""
        covariance = self.metric.covariance
        version = None if covariance.is_inference() else covariance._version
        mark = (covariance.data_ptr(), version, covariance.device)
        if mark != self._mark:
            self._mark, self._factor = mark, _factor(covariance)
        if self._factor is None:
            return self.metric.distance(delta)
        solved = torch.linalg.solve_triangular(self._factor, delta.to(covariance).T, upper=False)
        length: Tensor = torch.linalg.vector_norm(solved, dim=0)
        return length


def _factor(covariance: Tensor) -> Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    pivots = factor.diagonal().square()
    precision = 1e3 * len(covariance) * torch.finfo(covariance.dtype).eps
    singular = bool(failed) or bool(pivots.min() <= precision * covariance.diagonal().max())
    return None if singular else factor
