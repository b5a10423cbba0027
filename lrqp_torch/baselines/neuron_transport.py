"""Optimal transport of each coordinate by itself."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData, check_examples, class_means
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import WidthError
from lrqp_torch.stream.intervene import EditContext


class NeuronTransport(Baseline):
    """Each coordinate's Gaussian in the source class goes to that in the target class.

        x'_i = μ_{t,i} + (σ_{t,i} / σ_{v,i}) (x_i − μ_{v,i})

    the optimal transport in one dimension, which ignores how coordinates vary together. With t = v
    nothing changes; a coordinate that is constant in the source class is only shifted.

    Source: Linear-AcT of Rodriguez et al. 2024, "Controlling Language and Diffusion Models by
    Transporting Activations", arXiv 2410.23054, with Gaussians in the place of their regression of
    sorted samples; the strength is their λ.

    Args:
        reference: see :class:`Baseline`.
        means: μ, (K, d).
        deviations: σ, (K, d), not negative.
        strength: see :class:`Baseline`.

    Raises:
        WidthError: means or deviations that do not fit the reference.
    """

    name: ClassVar[str] = "neuron_transport"
    title: ClassVar[str] = "per-neuron transport (AcT)"
    means: Tensor
    deviations: Tensor

    def __init__(
        self, reference: LRQP, means: Tensor, deviations: Tensor, *, strength: float = 1.0
    ) -> None:
        super().__init__(reference, strength=strength)
        for name, tensor in (("means", means), ("deviations", deviations)):
            if tensor.shape != (self.n_classes, self.width):
                raise WidthError(
                    f"class {name} must be ({self.n_classes}, {self.width}), got "
                    f"{tuple(tensor.shape)}"
                )
        self.register_buffer("means", means.double())
        self.register_buffer("deviations", deviations.double())

    @classmethod
    def fit(
        cls, x: Tensor, y: Tensor, *, reference: LRQP | None = None, strength: float = 1.0
    ) -> Self:
        """Mean and deviation of each coordinate of x, (n, d), within each class of y, (n,).

        Raises:
            WidthError, NonFiniteError, LabelError: bad input, named.
        """
        reference = LRQP.fit(x, y) if reference is None else reference
        x, labels = check_examples(x, y, reference)
        n_classes = reference.probe.n_classes
        means = class_means(x, labels, n_classes)
        variances = class_means((x - means[labels]).square(), labels, n_classes)
        return cls(reference, means, variances.sqrt(), strength=strength)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls.fit(data.x, data.y, reference=data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        held, wanted = self.deviations[source], self.deviations[target]
        scale = torch.where(held > 0, wanted / torch.where(held > 0, held, 1.0), 1.0)
        shift = self.means[target] - self.means[source]
        # Written as a change, so that t = v gives x itself and not x up to rounding.
        return x.double() + shift + (scale - 1) * (x.double() - self.means[source])
