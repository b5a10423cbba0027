"""Optimal transport between class Gaussians, jointly or coordinate by coordinate."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import check_examples, class_means
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import WidthError
from lrqp_torch.probes.covariance import Mahalanobis, Shrinkage
from lrqp_torch.stream.intervene import EditContext


class OptimalTransport(Baseline):
    """The affine map that takes the Gaussian of the source class to that of the target class.

        x' = μ_t + A (x − μ_v),   A = Σ_v^{−1/2} (Σ_v^{1/2} Σ_t Σ_v^{1/2})^{1/2} Σ_v^{−1/2}

    with A the Monge map of quadratic cost: of all maps that match the target's mean and covariance,
    the one that moves activations least in mean square. With t = v nothing changes.

    Source: MiMiC of Singh et al. 2024, "Representation Surgery: Theory and Practice of Affine
    Steering", arXiv 2402.09631.

    ``fit`` takes the ``shrinkage`` of each class covariance, see :meth:`Covariance.finish`. With 0
    and fewer examples than dimensions, the map acts within the span of the source class only.

    Args:
        classes: mean and covariance of each class; each must have a mean.

    Raises:
        WidthError: not one for each class, of another width, or without a mean.
        CovarianceError: in ``fit``: activations of a class that are all the same, or no such
            shrinkage.
    """

    name: ClassVar[str] = "optimal_transport"
    title: ClassVar[str] = "optimal transport (MiMiC)"
    means: Tensor
    covariances: Tensor

    def __init__(
        self, reference: LRQP, classes: list[Mahalanobis], *, strength: float = 1.0
    ) -> None:
        super().__init__(reference, strength=strength)
        means = [item.mean for item in classes if item.mean is not None]
        widths = {item.width for item in classes}
        if len(means) != self.n_classes or len(classes) != len(means) or widths != {self.width}:
            raise WidthError(
                f"give a mean and a covariance of width {self.width} for each of the "
                f"{self.n_classes} classes, got {len(classes)} of widths {sorted(widths)}, "
                f"{len(means)} with a mean"
            )
        self.register_buffer("means", torch.stack(means))
        self.register_buffer("covariances", torch.stack([item.covariance for item in classes]))
        # Of K (K − 1) maps most tasks need a few, and each costs two eigendecompositions.
        self._maps: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def _fit(
        cls,
        reference: LRQP,
        x: Tensor,
        y: Tensor,
        *,
        shrinkage: Shrinkage = "ledoit_wolf",
        strength: float = 1.0,
    ) -> Self:
        x, labels = check_examples(x, y, reference)
        classes = [Mahalanobis.fit(x[labels == k], shrinkage) for k in range(reference.n_classes)]
        return cls(reference, classes, strength=strength)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        edited = x.double()
        pairs = torch.stack([source, target], -1)
        for pair in pairs[source != target].unique(dim=0):
            held, wanted = (int(k) for k in pair)
            rows = (pairs == pair).all(-1).nonzero().squeeze(-1)
            centred = x[rows].double() - self.means[held]
            moved = self.means[wanted] + centred @ self._map(held, wanted).to(x.device).T
            edited = edited.index_put((rows,), moved)
        return edited

    def _map(self, held: int, wanted: int) -> Tensor:
        if (held, wanted) not in self._maps:
            self._maps[held, wanted] = monge_map(self.covariances[held], self.covariances[wanted])
        return self._maps[held, wanted]


@torch.inference_mode(False)
@torch.no_grad()
def monge_map(source: Tensor, target: Tensor) -> Tensor:
    """The symmetric A with A Σ_v A = Σ_t on the range of Σ_v; (d, d) each."""
    values, vectors = torch.linalg.eigh(source)
    present = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    basis, scale = vectors[:, present], values[present].sqrt()
    # In the eigenbasis of Σ_v its roots are diagonal, and its null space is left out.
    middle = scale.unsqueeze(-1) * (basis.T @ target @ basis) * scale
    squared, axes = torch.linalg.eigh(middle)
    root = (axes * squared.clamp_min(0.0).sqrt()) @ axes.T
    transport: Tensor = basis @ (root / scale / scale.unsqueeze(-1)) @ basis.T
    return transport


class NeuronTransport(Baseline):
    """Each coordinate's Gaussian in the source class goes to that in the target class.

        x'_i = μ_{t,i} + (σ_{t,i} / σ_{v,i}) (x_i − μ_{v,i})

    the optimal transport in one dimension, which ignores how coordinates vary together. With t = v
    nothing changes; a coordinate that is constant in the source class is only shifted.

    Source: Linear-AcT of Rodriguez et al. 2024, "Controlling Language and Diffusion Models by
    Transporting Activations", arXiv 2410.23054, with Gaussians in the place of their regression of
    sorted samples; the strength is their λ.

    Args:
        means: μ, (K, d).
        deviations: σ, (K, d), not negative.

    Raises:
        WidthError: means or deviations that do not fit the reference.
    """

    name: ClassVar[str] = "neuron_transport"
    title: ClassVar[str] = "per-neuron transport (Gaussian AcT)"
    means: Tensor
    deviations: Tensor

    def __init__(
        self, reference: LRQP, means: Tensor, deviations: Tensor, *, strength: float = 1.0
    ) -> None:
        super().__init__(reference, strength=strength)
        self._hold("means", means, self.n_classes, self.width)
        self._hold("deviations", deviations, self.n_classes, self.width)

    @classmethod
    def _fit(cls, reference: LRQP, x: Tensor, y: Tensor, *, strength: float = 1.0) -> Self:
        x, labels = check_examples(x, y, reference)
        means = class_means(x, labels, reference.n_classes)
        variances = class_means((x - means[labels]).square(), labels, reference.n_classes)
        return cls(reference, means, variances.sqrt(), strength=strength)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        held, wanted = self.deviations[source], self.deviations[target]
        scale = torch.where(held > 0, wanted / torch.where(held > 0, held, 1.0), 1.0)
        shift = self.means[target] - self.means[source]
        # Written as a change, so that t = v gives x itself and not x up to rounding.
        return x.double() + shift + (scale - 1) * (x.double() - self.means[source])
