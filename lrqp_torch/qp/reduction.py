"""The displacements among which a constrained edit is sought, in as few dimensions as can be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.probes.keeping import orthonormal_basis


@dataclass(frozen=True)
class Reduction:
    """An orthonormal basis Q of whitened displacements; with Σ = L Lᵀ, δ = L Qᵀ v.

    Where displacements are reduced and the mean μ is known, one more coordinate, each activation's
    own, runs along the part of x − μ that the basis leaves out: moving x' towards the mean is all
    that can be gained there.

    Attributes:
        directions: D = L Qᵀ, (d, k): ‖v‖ is the Mahalanobis length of D v.
        rows: Q, (k, r), r the rank of Σ.
        factor: L, (d, r).
        whitening: V S^{-1/2}, (d, r), of Σ = V S Vᵀ: whitened coordinates are x times this.
        mean: μ, (d,), or None.
        complete: whether every displacement in the range of Σ is among them, k = r.
    """

    directions: Tensor
    rows: Tensor
    factor: Tensor
    whitening: Tensor
    mean: Tensor | None
    complete: bool

    @classmethod
    @torch.no_grad()
    def build(
        cls, covariance: Tensor, mean: Tensor | None, weight: Tensor, features: Tensor | None
    ) -> "Reduction":
        """The whole range of Σ, or the span of class differences and features alone.

        Args:
            covariance: Σ, (d, d).
            mean: μ, (d,), if it is known.
            weight: the probe's W, (K, d).
            features: rows F, (n, d), n ≥ 0; None for the whole range.
        """
        covariance = covariance.detach().cpu().double()
        values, vectors = torch.linalg.eigh(covariance)
        present = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        scale = values[present].sqrt()
        factor, whitening = vectors[:, present] * scale, vectors[:, present] / scale
        mean = None if mean is None else mean.detach().cpu().double()
        if features is None:
            identity = torch.eye(len(scale), dtype=torch.float64)
            return cls(factor, identity, factor, whitening, mean, complete=True)
        weight = weight.detach().cpu().double()
        read = torch.cat([weight - weight.mean(0), features.detach().cpu().double()])
        rows = orthonormal_basis(read @ factor)
        return cls(factor @ rows.T, rows, factor, whitening, mean, complete=False)

    @property
    def size(self) -> int:
        """How many coordinates v has."""
        return len(self.rows) + (not self.complete and self.mean is not None)

    def to(self, device: torch.device) -> "Reduction":
        """The same on another device."""
        return Reduction(
            self.directions.to(device),
            self.rows.to(device),
            self.factor.to(device),
            self.whitening.to(device),
            None if self.mean is None else self.mean.to(device),
            self.complete,
        )

    def slopes(self, rows: Tensor) -> Tensor:
        """How rows that lie in the basis, (..., n, d), change with v: (..., n, size)."""
        slopes = rows @ self.directions
        return torch.nn.functional.pad(slopes, (0, self.size - slopes.shape[-1]))

    def centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of x − μ, (B, size), whose norm is its radius; and the own direction.

        The latter, (B, d), has Mahalanobis length 1, or 0 where the basis leaves nothing out.
        """
        assert self.mean is not None
        whitened = (x - self.mean) @ self.whitening
        inside = whitened @ self.rows.T
        if self.complete:
            return inside, torch.zeros_like(x)
        rest = whitened - inside @ self.rows
        # The gradient of a norm at 0 is undefined; there nothing is left out.
        square = rest.square().sum(-1, keepdim=True)
        empty = square <= 1e-24 * (1 + whitened.detach().square().sum(-1, keepdim=True))
        outside = torch.where(empty, 1.0, square).sqrt()
        own = torch.where(empty, 0.0, rest / outside) @ self.factor.T
        return torch.cat([inside, torch.where(empty, 0.0, outside)], -1), own

    def displace(self, x: Tensor, moved: Tensor) -> Tensor:
        """The activations x' = x + D v, (B, d), own direction included."""
        size = len(self.rows)
        edited = x + moved[:, :size] @ self.directions.T
        if self.size == size:
            return edited
        return edited + moved[:, size:] * self.centred(x)[1]
