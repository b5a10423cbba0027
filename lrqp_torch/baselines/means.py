"""Edits by class means: their difference in a fixed or an exact dose, and regression on them."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import check_examples, class_means
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import InfeasibleError
from lrqp_torch.qp.constraints import other_classes
from lrqp_torch.qp.reach import Attempt, Headroom, Rows, reach
from lrqp_torch.stream.intervene import EditContext


class _OfMeans(Baseline):
    """A baseline of the mean activation of each class, (K, d)."""

    means: Tensor

    def __init__(self, reference: LRQP, means: Tensor, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        self._hold("means", means, self.n_classes, self.width)

    @classmethod
    def _fit(cls, reference: LRQP, x: Tensor, y: Tensor, *, strength: float = 1.0) -> Self:
        x, labels = check_examples(x, y, reference)
        return cls(reference, class_means(x, labels, reference.n_classes), strength=strength)


class MeanDifference(_OfMeans):
    """The difference of class means at one dose for all.

        x' = x + s (μ_t − μ_v)

    t the target class, v the source class. The strength s is the method's own dose: 1 takes the
    mean of the source class to the mean of the target class. With t = v nothing changes.

    Source: activation addition (Turner et al. 2023, arXiv 2308.10248) with class means as in
    contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681).

    Args:
        means: μ, (K, d).
        strength: s.

    Raises:
        WidthError: means that do not fit the reference.
    """

    name: ClassVar[str] = "mean_difference"
    title: ClassVar[str] = "mean difference, fixed dose"

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return x.double() + (self.means[target] - self.means[source])


class ExactMeanDifference(MeanDifference):
    """The least multiple of the difference of class means at which the probe reaches the floor.

        x' = x + c (μ_t − μ_v),   c = min { c ≥ 0 : z_t(x') − z_ℓ(x') ≥ log α for all ℓ ≠ t }

    with log α by the reference's odds rule. For a control edit, t = v, the difference is taken to
    the class that the probe believes in most besides t. With K = 2 and a probe consistent with
    linear discriminant analysis, w_t − w_v ∝ Σ⁻¹(μ_t − μ_v), this is LRQP.

    As with LRQP, the odds are read back from what the stream will hold, and the dose is raised
    where rounding left them short. Arguments and ``fit`` as of :class:`MeanDifference`.
    """

    name: ClassVar[str] = "mean_difference_exact"
    title: ClassVar[str] = "mean difference, exact dose"

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`.

        Raises:
            InfeasibleError: no multiple reaches the floor, unless the reference's
                ``on_infeasible`` is "skip": then those examples are left as they are.
        """
        geometry = self.reference.geometry(x.device)
        margins = geometry.margins(x, target)
        floor = self.reference.floors(margins, target, source, sufficient=False)
        rivals = other_classes(target, self.n_classes, x.device)
        strongest = rivals.gather(-1, margins.argmin(-1, keepdim=True)).squeeze(-1)
        away = torch.where(source == target, strongest, source)
        direction = self.means[target] - self.means[away]
        change = direction @ geometry.weight.T
        rate = change.gather(-1, target.unsqueeze(-1)) - change.gather(-1, rivals)

        wide, bound = x.double(), floor.unsqueeze(-1)
        needed = (margins < bound).any(-1)

        def step(aim: Tensor, rows: Rows) -> Attempt:
            at = slice(None) if rows is None else rows
            gap = aim - margins[at]
            # A margin that does not grow along the direction asks for no dose, and stays short.
            asks = (rate[at] > 0) & (gap > 0)
            dose = torch.where(asks, gap / torch.where(asks, rate[at], 1.0), 0.0).amax(-1)
            edited = wide[at] + dose.unsqueeze(-1) * direction[at]
            return Attempt(edited, torch.ones_like(needed[at]))

        def read(stored: Tensor, rows: Rows) -> Tensor:
            return geometry.margins(stored, target if rows is None else target[rows])

        attempt, after = reach(
            bound,
            needed,
            Headroom.of(x, geometry.constraints(target).length),
            step,
            read,
            dtype=x.dtype,
            realise=context.realise,
            raised=torch.zeros_like(margins),
        )
        reached = needed & (after >= bound).all(-1)
        unreached = needed & ~reached
        if self.on_infeasible == "raise" and bool(unreached.any()):
            which = context.example[unreached].tolist()
            raise InfeasibleError(
                f"no multiple of the mean difference reaches target class "
                f"{sorted(set(target[unreached].tolist()))} for {len(which)} examples, first "
                f"{which[:10]}: the probe does not come to believe in it along that direction. "
                f"Lower log_odds, or give a reference with on_infeasible='skip' to leave them "
                f"unchanged"
            )
        return torch.where(reached.unsqueeze(-1), attempt.edited, wide)


class ConditionalMean(_OfMeans):
    """The class-linear projection becomes the target's; the rest follows by regression.

        u(x) = U x,   x' = x + E[x | u = U μ_t] − E[x | u = U x] = x + ΣUᵀ (UΣUᵀ)⁺ (U μ_t − U x)

    with U the probe's weights, centred over classes (K − 1 contrasts), and Σ the reference's
    covariance. What of x is uncorrelated with u stays. Every example of a target ends at the same
    projection, that of the class's mean, control edits included, so the belief written is the
    class's typical one and no odds are promised.

    The regression is that of a joint Gaussian.

    Args:
        reference: gives U and Σ.
        means: μ, (K, d).

    Raises:
        WidthError: means that do not fit the reference.
    """

    name: ClassVar[str] = "conditional_mean"
    title: ClassVar[str] = "Gaussian conditional mean"
    contrasts: Tensor
    regression: Tensor

    def __init__(self, reference: LRQP, means: Tensor, *, strength: float = 1.0) -> None:
        super().__init__(reference, means, strength=strength)
        weight = reference.probe.weight.detach().double()
        contrasts = weight - weight.mean(0)
        moved = reference.metric.covariance @ contrasts.T
        # The contrasts sum to zero, which leaves one eigenvalue of rounding size.
        inverse = torch.linalg.pinv(contrasts @ moved, rtol=1e-10, hermitian=True)
        self.register_buffer("contrasts", contrasts)
        self.register_buffer("regression", moved @ inverse)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        change = (self.means[target] - x.double()) @ self.contrasts.T
        return x.double() + change @ self.regression.T
