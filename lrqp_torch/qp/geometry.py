"""What the edit needs to know of a probe and a metric, computed once for all activations."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, WidthError, check_classes, concrete, readable
from lrqp_torch.qp.implicit import matvec
from lrqp_torch.qp.projection import project
from lrqp_torch.qp.table import ActiveSets

if TYPE_CHECKING:
    from lrqp_torch.qp.single import SinglePulls

# Up to how many constraints all 2^m active sets are tabled: on the CPU as long as that is faster
# than pivoting, elsewhere as long as the table is small, because pivots wait for the device.
TABLE_CONSTRAINTS = {"cpu": 5}
TABLE_CONSTRAINTS_BLIND = 7


@dataclass(frozen=True)
class Constraints:
    """The dual problem's constants for each example of a batch, float64.

    Attributes:
        gram: M = A Σ Aᵀ, (B, m, m), symmetric positive semidefinite.
        noise: rounding error of M's diagonal, (B, m): at or below it a constraint has no length.
        length: ‖a_i‖, the Euclidean norm of each row of A, (B, m).
        steering: A Σ² Aᵀ, (B, m, m), so that ‖ΣAᵀλ‖² = λᵀ(AΣ²Aᵀ)λ; or None.
        table: the active sets of all problems that occur, and which of them each example is, (B,);
            or None, and pivots find them.
    """

    gram: Tensor
    noise: Tensor
    length: Tensor
    steering: Tensor | None = None
    table: tuple[ActiveSets, Tensor] | None = None

    def rows(self, rows: Tensor | None) -> "Constraints":
        """Those of some of the examples, (n,) integer; None: all."""
        if rows is None:
            return self
        return Constraints(
            self.gram[rows],
            self.noise[rows],
            self.length[rows],
            None if self.steering is None else self.steering[rows],
            None if self.table is None else (self.table[0], self.table[1][rows]),
        )

    def moved(self, multipliers: Tensor) -> Tensor:
        """‖ΣAᵀλ‖, how far λ moves each activation in the units of the stream, (B,)."""
        assert self.steering is not None
        squared = (multipliers * matvec(self.steering, multipliers)).sum(-1)
        return squared.clamp_min(0.0).sqrt()


class Geometry(Protocol):
    """All that a solve asks of the constraints A x' + c ≥ floor and of the metric Σ.

    ``choice`` says which constraints each example has: for a probe the target class, (B,); for
    other problems any integer tensor whose first dimension is the batch.
    """

    @property
    def n_constraints(self) -> int:
        """How many constraints each example has, m."""

    @property
    def width(self) -> int:
        """The width d of the activations."""

    def check(self, choice: Tensor, batch: int) -> None:
        """Raise :class:`~lrqp_torch.errors.TargetError` unless ``choice`` suits ``batch`` examples.

        Called only where values can be looked at: not inside transforms or a compiled graph.
        """

    def margins(self, x: Tensor, choice: Tensor) -> Tensor:
        """A x + c, (B, m), in float64 whatever the dtype of x, (B, d); differentiable."""

    def constraints(self, choice: Tensor) -> Constraints:
        """The dual's constants for each example; M is differentiable, the rest is not."""

    def displace(self, x: Tensor, choice: Tensor, multipliers: Tensor) -> Tensor:
        """The point x + Σ Aᵀ λ, (B, d), for λ (B, m), in float64; differentiable."""


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
        steering_gram: a_ℓᵀ Σ² a_j for every target, (K, K−1, K−1), which measures edits in the
            units of the stream.
        sets: the active sets for every target where K is small, else None.
    """

    weight: Tensor
    bias: Tensor
    steering: Tensor
    gram: Tensor
    noise: Tensor
    length: Tensor
    steering_gram: Tensor
    sets: ActiveSets | None

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
            if readable(tensor) and not bool(torch.isfinite(tensor).all()):
                owner = "metric" if name == "covariance" else "probe"
                raise NonFiniteError(f"the {owner}'s {name} holds NaN or infinity; refit it")

        weight, bias, covariance = weight.double(), bias.double(), covariance.double()
        steering = weight @ covariance
        steering_size = torch.linalg.vector_norm(steering.detach(), dim=-1)
        # A singular Σ has rounding errors of its own norm's size in its null space, and W Σ there
        # is nothing but rounding.
        spread = torch.linalg.matrix_norm(covariance.detach())
        precision = 16 * torch.finfo(torch.float64).eps
        gram, noise, length, moved = [], [], [], []
        for target in range(n_classes):
            other = other_classes(target, n_classes, weight.device)
            normals = weight[target] - weight[other]
            along = steering[target] - steering[other]
            products = normals @ along.T
            gram.append((products + products.T) / 2)
            moved.append(along.detach() @ along.detach().T)
            length.append(torch.linalg.vector_norm(normals.detach(), dim=-1))
            size = steering_size[target] + steering_size[other]
            noise.append(precision * length[-1] * torch.maximum(size, length[-1] * spread))
        grams, noises = torch.stack(gram), torch.stack(noise)
        sets = None
        if 1 < n_classes - 1 <= TABLE_CONSTRAINTS.get(weight.device.type, TABLE_CONSTRAINTS_BLIND):
            sets = ActiveSets.build(grams, noises)
        return cls(
            weight=weight,
            bias=bias,
            steering=steering,
            gram=grams,
            noise=noises,
            length=torch.stack(length),
            steering_gram=torch.stack(moved),
            sets=sets,
        )

    @property
    def n_classes(self) -> int:
        """K."""
        return self.weight.shape[0]

    @cached_property
    def single(self) -> "SinglePulls":
        """Directions of edits in float32, for large batches on the CPU."""
        from lrqp_torch.qp.single import SinglePulls

        return SinglePulls.of(self)

    @property
    def n_constraints(self) -> int:
        """One for each class other than the target, K − 1."""
        return self.n_classes - 1

    @property
    def width(self) -> int:
        """The width d of the activations that the probe reads."""
        return self.weight.shape[1]

    def check(self, target: Tensor, batch: int) -> None:
        """Raise :class:`~lrqp_torch.errors.TargetError` unless ``target`` is (B,) in [0, K)."""
        check_classes(target, batch, self.n_classes, "target")

    def constraints(self, target: Tensor) -> Constraints:
        """The dual's constants for targets (B,)."""
        if self.n_classes == 2:
            # The two targets have the same problem, up to a sign that M does not see.
            return Constraints(
                gram=self.gram[:1].expand(len(target), 1, 1),
                noise=self.noise[:1].expand(len(target), 1).detach(),
                length=self.length[:1].expand(len(target), 1).detach(),
                steering=self.steering_gram[:1].expand(len(target), 1, 1),
            )
        return Constraints(
            gram=self.gram.index_select(0, target),
            noise=self.noise.index_select(0, target).detach(),
            length=self.length.index_select(0, target).detach(),
            steering=self.steering_gram.index_select(0, target),
            table=None if self.sets is None else (self.sets, target),
        )

    def logits(self, x: Tensor) -> Tensor:
        """Probe logits x Wᵀ + b in float64, (B, K)."""
        return project(x, self.weight, self.bias)

    def margins(self, x: Tensor, target: Tensor) -> Tensor:
        """z_t − z_ℓ for the other classes ℓ in ascending order, (B, K−1), float64."""
        if self.n_classes == 2:
            between = project(x, self.weight[:1] - self.weight[1:], self.bias[:1] - self.bias[1:])
            return between * (1 - 2 * target).unsqueeze(-1)
        logits = self.logits(x)
        other = other_classes(target, self.n_classes, x.device)
        return logits.gather(-1, target.unsqueeze(-1)) - logits.gather(-1, other)

    def displace(self, x: Tensor, target: Tensor, multipliers: Tensor) -> Tensor:
        """X + Σ Aᵀ λ, as x + c (WΣ) with c_t = Σλ and c_ℓ = −λ_ℓ; float64, (B, d)."""
        if self.n_classes == 2:
            along = self.steering[:1] - self.steering[1:]
            return torch.addcmul(x.double(), multipliers * (1 - 2 * target).unsqueeze(-1), along)
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


@dataclass(frozen=True)
class _Kept:
    """A geometry, and what it was computed from."""

    mark: tuple[Any, ...]
    covariance: Tensor
    weight: Tensor
    bias: Tensor
    geometry: ProbeGeometry


class GeometryCache:
    """The geometry of the probe and metric that were asked for last, on one device."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def get(
        self, weight: Tensor, bias: Tensor, covariance: Tensor, device: torch.device
    ) -> ProbeGeometry:
        """The geometry on a device. On a GPU this waits for the device; :meth:`peek` does not."""
        given = weight.to(device), bias.to(device), covariance
        if _needs_graph(weight, bias, covariance):
            return ProbeGeometry.build(*given[:2], covariance.to(device))
        kept = self._kept
        # The probe is small enough to compare by value, which sees every way of changing it:
        # .data, .double() and the like leave no trace in a tensor's version.
        same = (
            kept is not None
            and kept.covariance is covariance
            and kept.mark == _mark(covariance, device)
            and _same(kept.weight, given[0])
            and _same(kept.bias, given[1])
        )
        return kept.geometry if kept is not None and same else self._build(*given, device)

    def peek(
        self, weight: Tensor, bias: Tensor, covariance: Tensor, device: torch.device
    ) -> tuple[ProbeGeometry, Tensor]:
        """The geometry, and a bool () on the device that is true if it has become stale unseen.

        Changes that leave a trace are seen; others (``.data``) only by value, on the device.
        """
        kept = self._kept
        if (
            kept is None
            or _needs_graph(weight, bias, covariance)
            or kept.covariance is not covariance
            or kept.mark != _mark(covariance, device)
            or kept.weight.dtype != weight.dtype
            or weight.device != device
        ):
            return self.get(weight, bias, covariance, device), torch.zeros(
                (), dtype=torch.bool, device=device
            )
        return kept.geometry, (kept.weight != weight).any() | (kept.bias != bias).any()

    # What is kept may be differentiated through later, whatever the mode in which it was computed.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(
        self, weight: Tensor, bias: Tensor, covariance: Tensor, device: torch.device
    ) -> ProbeGeometry:
        weight, bias = weight.clone(), bias.clone()
        geometry = ProbeGeometry.build(weight, bias, covariance.to(device))
        self._kept = _Kept(_mark(covariance, device), covariance, weight, bias, geometry)
        return geometry


def _needs_graph(*tensors: Tensor) -> bool:
    """Whether the geometry is part of a computation that is being recorded or transformed."""
    if not all(concrete(tensor) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _mark(covariance: Tensor, device: torch.device) -> tuple[Any, ...]:
    # A tensor made in inference mode counts no versions, and cannot be changed in place.
    version = None if covariance.is_inference() else covariance._version
    return device, version, covariance.data_ptr()


def _same(old: Tensor, new: Tensor) -> bool:
    return old.dtype == new.dtype and torch.equal(old, new)
