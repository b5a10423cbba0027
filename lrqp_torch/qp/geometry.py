"""What the edit needs to know of a probe and a metric, computed once for all activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, WidthError


@dataclass(frozen=True)
class ProbeGeometry:
    """Class constraints of a linear probe in a metric; all tensors float64.

    For target t, the other classes ℓ in ascending order give the constraint normals
    a_ℓ = w_t − w_ℓ, and M_t[ℓ, j] = a_ℓᵀ Σ a_j. Differences are taken before products, so that
    nearly equal classes keep their digits. Σ⁻¹ is never formed, and Σ may be singular.

    Attributes:
        weight: W, (K, d).
        bias: b, (K,).
        steering: W Σ, (K, d): the directions that edits move along.
        gram: M_t for every target t, (K, K−1, K−1).
        noise: rounding error of the diagonal of M_t, (K, K−1). At or below it two classes are
            equal as far as the metric can tell.
        length: ‖a_ℓ‖ for every target, (K, K−1).
    """

    weight: Tensor
    bias: Tensor
    steering: Tensor
    gram: Tensor
    noise: Tensor
    length: Tensor

    @classmethod
    def build(cls, weight: Tensor, bias: Tensor, covariance: Tensor) -> "ProbeGeometry":
        """Compute the geometry; differentiable in all three arguments.

        Cost: K d² for WΣ and K³ d for the Gram matrices, once.

        Args:
            weight: probe weights, (K, d), K ≥ 2.
            bias: probe biases, (K,).
            covariance: Σ, (d, d), symmetric positive semidefinite.

        Raises:
            WidthError: the shapes do not fit together.
            NonFiniteError: NaN or infinity in any of them.
        """
        if weight.ndim != 2 or weight.shape[0] < 2 or bias.shape != weight.shape[:1]:
            raise WidthError(
                f"a probe needs weight (K, d) with K ≥ 2 and bias (K,), got weight "
                f"{tuple(weight.shape)} and bias {tuple(bias.shape)}"
            )
        n_classes, width = weight.shape
        if covariance.shape != (width, width):
            raise WidthError(
                f"the probe reads width {width} but the covariance is "
                f"{tuple(covariance.shape)}; fit both on activations of the same site"
            )
        for name, tensor in (("weight", weight), ("bias", bias), ("covariance", covariance)):
            if not bool(torch.isfinite(tensor).all()):
                owner = "metric" if name == "covariance" else "probe"
                raise NonFiniteError(f"the {owner}'s {name} holds NaN or infinity; refit it")

        weight, bias, covariance = weight.double(), bias.double(), covariance.double()
        steering = weight @ covariance
        steering_size = torch.linalg.vector_norm(steering.detach(), dim=-1)
        precision = 16 * torch.finfo(torch.float64).eps
        gram, noise, length = [], [], []
        for target in range(n_classes):
            other = other_classes(target, n_classes, weight.device)
            normals = weight[target] - weight[other]
            products = normals @ (steering[target] - steering[other]).T
            gram.append((products + products.T) / 2)
            length.append(torch.linalg.vector_norm(normals.detach(), dim=-1))
            noise.append(precision * length[-1] * (steering_size[target] + steering_size[other]))
        return cls(
            weight, bias, steering, torch.stack(gram), torch.stack(noise), torch.stack(length)
        )

    @property
    def n_classes(self) -> int:
        """K."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """The width d of the activations that the probe reads."""
        return self.weight.shape[1]

    def logits(self, x: Tensor) -> Tensor:
        """Probe logits x Wᵀ + b in float64, (B, K)."""
        return torch.nn.functional.linear(x.double(), self.weight, self.bias)

    def margins(self, x: Tensor, target: Tensor) -> Tensor:
        """z_t − z_ℓ for the other classes ℓ in ascending order, (B, K−1), float64."""
        logits = self.logits(x)
        other = other_classes(target, self.n_classes, x.device)
        return logits.gather(-1, target.unsqueeze(-1)) - logits.gather(-1, other)

    def displace(self, x: Tensor, target: Tensor, multipliers: Tensor) -> Tensor:
        """X + Σ Aᵀ λ, as x + c (WΣ) with c_t = Σλ and c_ℓ = −λ_ℓ; float64, (B, d)."""
        coefficients = multipliers.new_zeros(x.shape[0], self.n_classes)
        other = other_classes(target, self.n_classes, x.device)
        coefficients = coefficients.scatter(-1, other, -multipliers)
        coefficients = coefficients.scatter(
            -1, target.unsqueeze(-1), multipliers.sum(-1, keepdim=True)
        )
        return torch.addmm(x.double(), coefficients, self.steering)


def other_classes(target: Tensor | int, n_classes: int, device: torch.device) -> Tensor:
    """The classes other than ``target``, ascending: (K−1,) for an int, (B, K−1) for (B,)."""
    index = torch.arange(n_classes - 1, device=device)
    if isinstance(target, Tensor):
        target = target.unsqueeze(-1)
    return index + (index >= target).long()
