"""What learning an edit gives: the edit, how it came about, and how far it is from its start."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP


@dataclass(frozen=True)
class Epoch:
    """One pass through the training prompts; epoch 0 is the edit that the learning began with.

    Attributes:
        index: number of the epoch.
        train: mean over the epoch of the terms of the loss, unweighted, and of their weighted sum,
            ``loss``; empty for epoch 0.
        validation: the same on the validation prompts after the epoch; empty without any.
    """

    index: int
    train: dict[str, float]
    validation: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """An edit beside the one it was learned from.

    Attributes:
        probe_angles: principal angles between the spans of w_ℓ − w_0, (K − 1,), in degrees, rising;
            for K = 2 the angle of w_1 − w_0, where 180 is the opposite direction.
        steering_angles: the same for Σ (w_ℓ − w_0), along which activations move.
        accuracy: of the probes on the given activations, before and after.
        log_odds: mean log odds of the true class against its strongest rival there, in nats, before
            and after.
        floor: log α, before and after.
        covariance_change: ‖Σ − Σ₀‖_F / ‖Σ₀‖_F.
    """

    probe_angles: Tensor
    steering_angles: Tensor
    accuracy: tuple[float, float]
    log_odds: tuple[float, float]
    floor: tuple[float, float]
    covariance_change: float


@dataclass(frozen=True)
class Learned:
    """A learned edit.

    Attributes:
        edit: the edit of the best epoch: an ordinary :class:`~lrqp_torch.LRQP`.
        start: the edit that the learning began with.
        history: epoch by epoch.
        best_epoch: the epoch of ``edit``: the least validation loss, or the last epoch without
            validation prompts.
    """

    edit: LRQP
    start: LRQP
    history: tuple[Epoch, ...]
    best_epoch: int

    @torch.no_grad()
    def compare(self, x: Tensor, y: Tensor) -> Comparison:
        """Compare with the start on activations x, (n, d), of the site, with classes y, (n,).

        Raises:
            WidthError, TargetError: x or y do not fit the probe.
        """
        pair = (self.start, self.edit)
        x = x.to(self.edit.probe.weight.device)
        before, after = (edit.metric.covariance.double() for edit in pair)
        spans = [_differences(edit.probe.weight.double()) for edit in pair]
        moves = [span @ covariance for span, covariance in zip(spans, (before, after), strict=True)]
        accuracies = [edit.probe.accuracy(x, y) for edit in pair]
        odds = [float(edit.probe.log_odds(x, y).double().mean()) for edit in pair]
        return Comparison(
            probe_angles=principal_angles(*spans),
            steering_angles=principal_angles(*moves),
            accuracy=(accuracies[0], accuracies[1]),
            log_odds=(odds[0], odds[1]),
            floor=(float(self.start.log_odds), float(self.edit.log_odds)),
            covariance_change=float((after - before).norm() / before.norm()),
        )


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between the row spans of two matrices, (m, d) → (m,), in degrees, rising.

    One row each: the angle between the vectors, 0 to 180. More: the principal angles of Björck and
    Golub 1973, "Numerical methods for computing angles between linear subspaces", 0 to 90. The sine
    is used where it is the more accurate of the two.
    """
    if len(first) == 1:
        a, b = (rows[0] / rows[0].norm() for rows in (first, second))
        return torch.atan2((a - b).norm(), (a + b).norm()).mul(2).rad2deg().reshape(1)
    a, b = (torch.linalg.qr(rows.T).Q for rows in (first, second))
    cosines = torch.linalg.svdvals(a.T @ b).clamp_max(1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp_max(1).flip(0)
    return torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos()).rad2deg()


def _differences(weight: Tensor) -> Tensor:
    return weight[1:] - weight[0]
