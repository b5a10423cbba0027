"""Running statistics of the order of the names at S2, and the linear edit they give."""

import torch
from torch import Tensor

LEAST_LOG_ODDS = 10.0


class OrderStatistics:
    """Class means and within-class covariance of the S2 activations at every site.

    They follow the model while it learns: every update keeps ``memory`` of what was there.

    Args:
        n_sites: Number of sites.
        width: Width d of the residual stream.
        memory: Share of the old statistics that an update keeps.
        ridge: Added to the covariance's diagonal, as a share of its mean.
    """

    def __init__(self, n_sites: int, width: int, memory: float = 0.95, ridge: float = 0.01) -> None:
        self.means = torch.zeros(n_sites, 2, width)
        self.within = torch.zeros(n_sites, width, width)
        self.memory = memory
        self.ridge = ridge
        self._updates = 0

    def update(self, activations: Tensor, abb: Tensor) -> None:
        """Take in one batch.

        Args:
            activations: ``(sites, batch, d)``.
            abb: The order of each prompt, ``(batch,)``; both orders must occur.
        """
        # The first updates count in full, as in Adam's correction of its moments.
        self._updates += 1
        share = (1 - self.memory) / (1 - self.memory**self._updates)
        means = torch.stack([activations[:, abb == order].mean(1) for order in (0, 1)], dim=1)
        centred = activations - means[:, abb]
        within = centred.transpose(1, 2) @ centred / len(abb)
        self.means = torch.lerp(self.means, means, share)
        self.within = torch.lerp(self.within, within, share)

    def edited(self, activations: Tensor, sites: Tensor, target: Tensor, excess: Tensor) -> Tensor:
        """Move activations along Σw until a linear discriminant's log-odds favour ``target``.

        The discriminant is w = Σ_W⁻¹(μ₁ − μ₀) with log-odds z(x) = w·(x − (μ₀ + μ₁)/2), Σ the
        total covariance. This is the least edit in Mahalanobis distance; the log-odds asked for
        are ``excess · max(|z(x)|, 10)``.

        Args:
            activations: ``(batch, d)``.
            sites: The site of each, ``(batch,)``.
            target: The order to move to, ``(batch,)``.
            excess: ``(batch,)``, 1 for the dose of the ``mirror`` rule.

        Returns:
            ``(batch, d)``; gradients pass as through an addition of constants.
        """
        width = self.within.shape[-1]
        variance = self.within.diagonal(dim1=1, dim2=2).mean(1)
        metric = self.within + self.ridge * variance[:, None, None] * torch.eye(width)
        between = self.means[:, 1] - self.means[:, 0]
        weight = torch.linalg.solve(metric, between.unsqueeze(-1)).squeeze(-1)
        gain = (weight * between).sum(1)
        # (Σ_W + ΔΔᵀ/4)w with w = Σ_W⁻¹Δ is Δ(1 + Δᵀw/4).
        direction = between * (1 + gain / 4)[:, None]
        middle = (weight * self.means.mean(1)).sum(1)
        score = (weight[sites] * activations.detach()).sum(1) - middle[sites]
        sign = 2.0 * target - 1
        goal = excess * score.abs().clamp(min=LEAST_LOG_ODDS)
        missing = (goal - sign * score).clamp(min=0) * sign
        slope = (weight[sites] * direction[sites]).sum(1).clamp(min=1e-6)
        edited: Tensor = activations + (missing / slope)[:, None] * direction[sites]
        return edited
