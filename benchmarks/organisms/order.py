"""Running statistics of the order of the names at S2; the edit, and the penalty, they give."""

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
        metric = self._metric(self.ridge)
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

    def left(self, activations: Tensor, abb: Tensor) -> Tensor:
        """Measure how much of the order is left at S2, as a penalty that removes it.

        With Δ = x₁ - x₀ the difference of a prompt's two orders, σ² the mean variance of the
        activations and Σ_W their covariance within the orders, a site has

            mean ‖Δ‖² / (d σ²) + (mean Δ)ᵀ Σ_W⁻¹ (mean Δ) / 10.

        The first term is zero only where twins are the same to the model. The second is the
        distance of the class means as a linear probe sees it, however small beside all else; that
        it be zero is LEACE's condition for no probe to beat chance (arXiv 2306.03819).

        Args:
            activations: ``(sites, batch, d)``, row ``i`` and row ``i + batch/2`` a pair of twins.
            abb: The order of each prompt, ``(batch,)``.

        Returns:
            The mean over sites, a scalar.
        """
        half = len(abb) // 2
        sign = 2.0 * abb[:half] - 1
        change = sign[:, None] * (activations[:, :half] - activations[:, half:])
        variance = activations.detach().var(1).mean(1).clamp(min=1e-6)
        unlike = change.square().mean((1, 2)) / variance
        between = change.mean(1).unsqueeze(-1)
        # A tenth of the usual ridge: a direction of little variance hides an order just as well.
        apart = (between * torch.linalg.solve(self._metric(self.ridge / 10), between)).sum((1, 2))
        penalty: Tensor = (unlike + 0.1 * apart).mean()
        return penalty

    def _metric(self, ridge: float) -> Tensor:
        width = self.within.shape[-1]
        variance = self.within.diagonal(dim1=1, dim2=2).mean(1)
        return self.within + ridge * variance[:, None, None] * torch.eye(width)
