"""The constraints of each example in the dual: M = A Σ Aᵀ, stored no bigger than needed.

The constraints of a probe all come from K classes: with D_kl = (w_k − w_l)ᵀ Σ (w_k − w_l), the
squared distances between them, and target t,

    M_lm = (w_t − w_l)ᵀ Σ (w_t − w_m) = ½ (D_tl + D_tm − D_lm),

so that one K × K matrix serves every target and M itself is formed only where it is small. D keeps
the digits of classes that nearly coincide, which a Gram matrix of the weights loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

from lrqp_torch.errors import (
    NonFiniteError,
    all_finite,
    capturing,
    concrete,
    in_transforms,
    readable,
)
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.qp.implicit import matvec

if TYPE_CHECKING:
    from lrqp_torch.qp.distances import Distances
    from lrqp_torch.qp.table import ActiveSets

ROUNDING = 16 * torch.finfo(torch.float64).eps
GRAM_NUMBERS = 2_000_000
# Of classes nearer than this share of their size, steering holds what a difference would lose.
NEARBY = 1e-4


class Constraints(Protocol):
    """The dual problem's constants for each example of a batch, float64."""

    @property
    def gram(self) -> Tensor:
        """M, (B, m, m), symmetric positive semidefinite; differentiable."""

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of M, (B, m); not differentiated."""

    @property
    def noise(self) -> Tensor:
        """Rounding error of M's diagonal, (B, m): at or below it a constraint has no length."""

    @property
    def length(self) -> Tensor:
        """‖a_i‖, the Euclidean norm of each row of A, (B, m)."""

    @property
    def table(self) -> "tuple[ActiveSets, Tensor] | None":
        """The active sets of all problems that occur, and which of them each example is, (B,).

        None: pivots find them.
        """

    def apply(self, multipliers: Tensor, index: Tensor | None = None) -> Tensor:
        """M λ, (B, m): how much each margin grows; differentiable.

        Args:
            multipliers: λ, (B, m).
            index: outside of which λ is zero, (B, n), m standing for none; then M's own entries are
                added up, in which those of nearly equal classes differ by less than they round.
        """

    def block(self, index: Tensor) -> Tensor:
        """M between some constraints of each example, (B, n) → (B, n, n); differentiable.

        An index of m stands for none, and gives any numbers.
        """

    def moved(self, multipliers: Tensor) -> Tensor | None:
        """‖ΣAᵀλ‖², by how much λ moves each activation, in squared units of the stream, (B,)."""

    def rows(self, rows: Tensor) -> Self:
        """Those of some of the examples, (n,) integer."""


@dataclass(frozen=True)
class DenseConstraints:
    """M of each example as it is; for few constraints, or where each example has its own."""

    gram: Tensor  # M, (B, m, m)
    noise: Tensor  # see `Constraints`
    length: Tensor  # see `Constraints`
    # A Σ² Aᵀ / s², (B, m, m), and s, so that ‖ΣAᵀλ‖² = sλᵀ(AΣ²Aᵀ/s²)sλ; or None.
    steering: tuple[Tensor, Tensor] | None = None
    table: "tuple[ActiveSets, Tensor] | None" = None  # see `Constraints`

    @property
    def diagonal(self) -> Tensor:
        """See :class:`Constraints`."""
        return self.gram.detach().diagonal(dim1=-2, dim2=-1)

    def apply(self, multipliers: Tensor, index: Tensor | None = None) -> Tensor:
        """See :class:`Constraints`."""
        return matvec(self.gram, multipliers)

    def block(self, index: Tensor) -> Tensor:
        """See :class:`Constraints`."""
        m = self.gram.shape[-1]
        index = index.clamp_max(m - 1)
        rows = self.gram.gather(1, index.unsqueeze(-1).expand(*index.shape, m))
        return rows.gather(2, index.unsqueeze(1).expand(*index.shape, index.shape[-1]))

    def moved(self, multipliers: Tensor) -> Tensor | None:
        """See :class:`Constraints`."""
        if self.steering is None:
            return None
        multipliers = multipliers * self.steering[1]
        return (multipliers * matvec(self.steering[0], multipliers)).sum(-1)

    def rows(self, rows: Tensor) -> "DenseConstraints":
        """See :class:`Constraints`."""
        return DenseConstraints(
            self.gram[rows],
            self.noise[rows],
            self.length[rows],
            None if self.steering is None else (self.steering[0][rows], self.steering[1]),
            None if self.table is None else (self.table[0], self.table[1][rows]),
        )


@dataclass(frozen=True)
class ClassConstraints:
    """Those of a probe with many classes: D for all, and each example's target."""

    classes: "Distances"  # D, the same in Σ² / s², and what D rounds by, (K, K)
    unit: Tensor  # s, ()
    target: Tensor  # t, (B,)
    other: Tensor  # the classes other than the target, ascending, (B, m)
    probe: tuple[Tensor, Tensor]  # W and WΣ, (K, d), up to one row that all share
    table: None = None

    @property
    def noise(self) -> Tensor:
        """See :class:`Constraints`."""
        return self._of(self.classes.noise)

    @property
    def length(self) -> Tensor:
        """See :class:`Constraints`."""
        return self._of(self.classes.length)

    @property
    def gram(self) -> Tensor:
        """See :class:`Constraints`; from differences, once for each target that occurs."""
        targets, which = occurring(self.target)
        other = other_classes(targets, len(self.classes.length), targets.device)
        length = self.classes.length.index_select(0, targets).gather(-1, other)
        return class_grams(targets, *self.probe, length).index_select(0, which)

    @property
    def diagonal(self) -> Tensor:
        """See :class:`Constraints`."""
        return self._of(self.classes.squared.detach())

    def apply(self, multipliers: Tensor, index: Tensor | None = None) -> Tensor:
        """See :class:`Constraints`."""
        squared = self.classes.squared
        if index is None:
            return self._apply(squared, multipliers)
        chosen = self.other.gather(-1, index.clamp_max(self.other.shape[-1] - 1))
        weights = torch.nn.functional.pad(multipliers, (0, 1)).gather(-1, index)
        own = squared[self.target]
        entries = own.unsqueeze(1) + (own.gather(-1, chosen).unsqueeze(-1) - squared[chosen])
        grown = (weights.unsqueeze(1) @ entries).squeeze(1)
        return grown.gather(-1, self.other) / 2

    def block(self, index: Tensor) -> Tensor:
        """See :class:`Constraints`."""
        chosen = self.other.gather(-1, index.clamp_max(self.other.shape[-1] - 1))
        target, rows, columns = self.target[:, None, None], chosen[:, :, None], chosen[:, None]
        squared = self.classes.squared
        return (squared[target, rows] + squared[target, columns] - squared[rows, columns]) / 2

    def moved(self, multipliers: Tensor) -> Tensor:
        """See :class:`Constraints`."""
        multipliers = multipliers * self.unit
        return (multipliers * self._apply(self.classes.stretch, multipliers)).sum(-1)

    def rows(self, rows: Tensor) -> "ClassConstraints":
        """See :class:`Constraints`."""
        return replace(self, target=self.target[rows], other=self.other[rows])

    def _of(self, pairs: Tensor) -> Tensor:
        """Of pairs of classes, (K, K), those of each example's target with the others, (B, m)."""
        return pairs.index_select(0, self.target).gather(-1, self.other)

    def _apply(self, squared: Tensor, multipliers: Tensor) -> Tensor:
        every = multipliers.new_zeros(len(multipliers), len(squared))
        towards = every.scatter(-1, self.other, multipliers) @ squared
        total = multipliers.sum(-1, keepdim=True)
        grown = squared[self.target] * total - towards
        grown = grown + towards.gather(-1, self.target.unsqueeze(-1))
        return grown.gather(-1, self.other) / 2


class MetricSizes:
    """Norms of what Σ makes, in units of its largest entry, of which no square overflows.

    Args:
        unit: the largest entry of Σ, ().
        spread: ‖Σ‖_F, ().
    """

    def __init__(self, unit: Tensor, spread: Tensor) -> None:
        self.unit, self.spread = unit, spread

    @classmethod
    def of(cls, covariance: Tensor) -> "MetricSizes":
        """Those of Σ."""
        covariance = covariance.detach()
        unit = covariance.abs().amax().clamp_min(torch.finfo(covariance.dtype).tiny)
        return cls(unit, unit * torch.linalg.matrix_norm(covariance / unit))

    def norm(self, steering: Tensor) -> Tensor:
        """‖Σw‖ of some Σw, (..., d) → (...)."""
        size: Tensor = self.unit * torch.linalg.vector_norm(steering.detach() / self.unit, dim=-1)
        return size

    def rounding(self, length: Tensor, terms: Tensor) -> Tensor:
        """The rounding error of aᵀΣa for a = w − v, from ‖a‖ and ‖Σw‖ + ‖Σv‖, shaped alike.

        Differences of steering directions round by their terms. A singular Σ has rounding errors of
        its own norm's size in its null space, and WΣ there is nothing but rounding.
        """
        return ROUNDING * length * torch.maximum(terms, length * self.spread)


def steered(
    metric: Tensor | Mahalanobis, weights: Sequence[Tensor]
) -> tuple[list[Tensor], MetricSizes]:
    """W̄ Σ of some probes, (K, d) each, with W̄ their weights less the mean, and the sizes of Σ.

    Differentiable. Where a metric that was saved has kept them, its Σ is not looked at.

    Args:
        metric: it, or Σ, (d, d).
        weights: W of each probe, (K, d), float64.

    Raises:
        NonFiniteError: Σ holds NaN or infinity.
    """
    if isinstance(metric, Mahalanobis):
        saved = metric.saved(weights)
        if saved is not None:
            return saved[0], MetricSizes(*saved[1].to(weights[0].device).clone().unbind())
        metric = metric.own()
    if readable(metric) and not all_finite(metric):
        raise NonFiniteError("the metric's covariance holds NaN or infinity; refit it")
    covariance = metric.to(weights[0].device).double()
    found = [(weight - weight.mean(0)) @ covariance for weight in weights]
    return found, MetricSizes.of(covariance)


@torch.no_grad()
def low_parts(
    weight: Tensor, steering: Tensor, covariance: Tensor | Mahalanobis, length: Tensor
) -> Tensor | None:
    """What to add to WΣ, (K, d), so that differences of its rows are those of W times Σ, to as many
    digits as these have; None where no two classes are near each other.

    Along a tree of nearest neighbours: each class gets what its difference to the one before lacks.
    Whether any are near is looked at, on every device, once a geometry; where that cannot be (a
    transform, a graph that is compiled or captured) it is None.
    """
    if not concrete(weight) or in_transforms() or capturing(weight):
        return None
    size = torch.linalg.vector_norm(weight, dim=-1)
    apart = length + torch.diag(torch.full_like(size, torch.inf))
    if not bool((apart < NEARBY * torch.maximum(size, size.unsqueeze(-1))).any()):
        return None
    tree = nearest_neighbours(length)
    covariance = covariance if isinstance(covariance, Tensor) else covariance.own()
    old, new = torch.tensor(tree, device=weight.device).unbind(-1)
    lacking = (weight[new] - weight[old]) @ covariance.to(weight) - (steering[new] - steering[old])
    low = torch.zeros_like(steering)
    for (before, after), own in zip(tree, lacking, strict=True):
        low[after] = low[before] + own
    return low


def nearest_neighbours(length: Tensor) -> list[tuple[int, int]]:
    """The shortest tree between classes at distances (K, K), from the first on (Prim 1957): K − 1
    edges (before, after).
    """
    apart = length.detach().cpu() + torch.diag(torch.full((len(length),), torch.inf))
    nearest, tree = apart[0].clone(), []
    parent = torch.zeros(len(apart), dtype=torch.long)
    for _ in range(len(apart) - 1):
        at = int(nearest.argmin())
        tree.append((int(parent[at]), at))
        closer = (apart[at] < nearest) & (nearest < torch.inf)
        nearest, parent = torch.where(closer, apart[at], nearest), torch.where(closer, at, parent)
        nearest[at] = torch.inf
    return tree


def class_grams(
    target: Tensor,
    weight: Tensor,
    steering: Tensor,
    length: Tensor,
    low: Tensor | None = None,
    *,
    unit: Tensor | None = None,
) -> Tensor:
    """M of some targets, (n, m, m): a_l · Σ a_m for a_l = w_t − w_l; differentiable.

    Σ a is a difference of rows of WΣ, which rounds by their size, and a is exact where it is short.
    So a product is taken with Σ a of the longer of the two, and keeps its digits where the target
    and another class are nearly equal.

    Args:
        target: t, (n,).
        weight: W, (K, d).
        steering: WΣ, (K, d), up to one row that all share.
        length: ‖w_t − w_l‖, (n, m).
        low: what to add to ``steering``, (K, d), so that its differences keep their digits.
        unit: s, for the products Σa_l · Σa_m / s² instead, not differentiable.
    """
    grams = []
    # Normals, (m, d) each, are many numbers where there are many classes.
    at_once = max(1, GRAM_NUMBERS // weight.numel())
    for targets, own in zip(target.split(at_once), length.split(at_once), strict=True):
        normals, along = class_normals(targets, weight, steering, low)
        if unit is not None:
            along = along.detach() / unit
            grams.append(along @ along.mT)
            continue
        products = normals @ along.mT
        share = ((own.unsqueeze(-2) - own.unsqueeze(-1)).sign() + 1) / 2
        grams.append(products * share + products.mT * (1 - share))
    return grams[0] if len(grams) == 1 else torch.cat(grams)


def class_normals(
    target: Tensor, weight: Tensor, steering: Tensor, low: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A and AΣ of some targets, (n, m, d) each; arguments as those of :func:`class_grams`."""
    other = other_classes(target, len(weight), target.device)
    along = steering[target].unsqueeze(1) - steering[other]
    if low is not None:
        along = along + (low[target].unsqueeze(1) - low[other])
    return weight[target].unsqueeze(1) - weight[other], along


def occurring(target: Tensor) -> tuple[Tensor, Tensor]:
    """The targets that occur, (n,), and which of these each is, (B,); where values are hidden those
    that are given.
    """
    if concrete(target):
        targets, which = target.unique(return_inverse=True)
        return targets, which
    return target, torch.arange(len(target), device=target.device)


def other_classes(target: Tensor | int, n_classes: int, device: torch.device) -> Tensor:
    """The classes other than ``target``, ascending: (K−1,) for an int, (B, K−1) for (B,)."""
    index = torch.arange(n_classes - 1, device=device)
    if isinstance(target, Tensor):
        target = target.unsqueeze(-1)
    return index + (index >= target).long()
