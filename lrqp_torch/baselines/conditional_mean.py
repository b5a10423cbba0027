"""Gaussian conditional mean: move what the probe reads, and the rest as it goes with it."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData, check_examples, class_means
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import WidthError
from lrqp_torch.stream.intervene import EditContext


class ConditionalMean(Baseline):
    """The class-linear projection becomes the target's; the rest follows by regression.

        u(x) = U x,   x' = x + E[x | u = U μ_t] − E[x | u = U x] = x + ΣUᵀ (UΣUᵀ)⁺ (U μ_t − U x)

    with U the probe's weights, centred over classes (K − 1 contrasts), and Σ the reference's
    covariance. What of x is uncorrelated with u stays. Every example of a target ends at the same
    projection, that of the class's mean, control edits included, so the belief written is the
    class's typical one and no odds are promised.

    This is the edit that the author of "Intervening in the Residual Stream" used before LRQP. The
    regression is that of a joint Gaussian.

    Args:
        reference: gives U and Σ.
        means: μ, (K, d).
        strength: see :class:`Baseline`.

    Raises:
        WidthError: means that do not fit the reference.
    """

    name: ClassVar[str] = "conditional_mean"
    title: ClassVar[str] = "Gaussian conditional mean"
    means: Tensor
    contrasts: Tensor
    regression: Tensor

    def __init__(self, reference: LRQP, means: Tensor, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        if means.shape != (self.n_classes, self.width):
            raise WidthError(
                f"class means must be ({self.n_classes}, {self.width}), got {tuple(means.shape)}"
            )
        weight = reference.probe.weight.detach().double()
        contrasts = weight - weight.mean(0)
        moved = reference.metric.covariance @ contrasts.T
        # The contrasts sum to zero, which leaves one eigenvalue of rounding size.
        inverse = torch.linalg.pinv(contrasts @ moved, rtol=1e-10, hermitian=True)
        self.register_buffer("means", means.double())
        self.register_buffer("contrasts", contrasts)
        self.register_buffer("regression", moved @ inverse)

    @classmethod
    def fit(
        cls, x: Tensor, y: Tensor, *, reference: LRQP | None = None, strength: float = 1.0
    ) -> Self:
        """Class means of activations x, (n, d), with classes y, (n,).

        Raises:
            WidthError, NonFiniteError, LabelError: bad input, named.
        """
        reference = LRQP.fit(x, y) if reference is None else reference
        x, labels = check_examples(x, y, reference)
        means = class_means(x, labels, reference.probe.n_classes)
        return cls(reference, means, strength=strength)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls.fit(data.x, data.y, reference=data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        change = (self.means[target] - x.double()) @ self.contrasts.T
        return x.double() + change @ self.regression.T
