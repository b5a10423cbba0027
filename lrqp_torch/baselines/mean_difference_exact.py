"""The difference of class means, in the dose that each example needs."""

from typing import ClassVar

import torch
from torch import Tensor

from lrqp_torch.baselines.mean_difference import MeanDifference
from lrqp_torch.errors import InfeasibleError
from lrqp_torch.qp.geometry import other_classes
from lrqp_torch.stream.intervene import EditContext

MAX_ROUNDS = 24


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
        floor = self.reference.solve(x, target, source, examples=context.example).floor
        margins = geometry.margins(x, target)
        rivals = other_classes(target, self.n_classes, x.device)
        strongest = rivals.gather(-1, margins.argmin(-1, keepdim=True)).squeeze(-1)
        away = torch.where(source == target, strongest, source)
        direction = self.means[target] - self.means[away]
        change = direction @ geometry.weight.T
        rate = change.gather(-1, target.unsqueeze(-1)) - change.gather(-1, rivals)

        gap = floor.unsqueeze(-1) - margins
        needed = (gap > 0).any(-1)
        # As in MahalanobisQP: a smaller rise than this may round to the same numbers again.
        precision = torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(x.detach().double(), dim=-1, keepdim=True)
        nudge = precision * geometry.length[target] * size / self.width**0.5
        raised = torch.zeros_like(gap)
        for attempt in range(MAX_ROUNDS):
            # A margin that does not grow along the direction asks for no dose, and stays short.
            asks = (rate > 0) & (gap + raised > 0)
            dose = torch.where(asks, (gap + raised) / torch.where(asks, rate, 1.0), 0.0).amax(-1)
            edited = x.double() + dose.unsqueeze(-1) * direction
            with torch.no_grad():
                after = geometry.margins(context.realise(edited), target)
                short = (floor.unsqueeze(-1) - after).clamp_min(0.0)
                short = torch.where(needed.unsqueeze(-1), short, 0.0)
            if not bool((short > 0).any()):
                break
            raised = raised + torch.where(short > 0, 2 * short + (attempt + 1) * nudge, 0.0)
        reached = needed & ~(short > 0).any(-1)
        self._refuse(needed & ~reached, target, context)
        return torch.where(reached.unsqueeze(-1), edited, x.double())

    def _refuse(self, unreached: Tensor, target: Tensor, context: EditContext) -> None:
        if self.reference.on_infeasible == "skip" or not bool(unreached.any()):
            return
        which = context.example[unreached].tolist()
        raise InfeasibleError(
            f"no multiple of the mean difference reaches target class "
            f"{sorted(set(target[unreached].tolist()))} for {len(which)} examples, first "
            f"{which[:10]}: the probe does not come to believe in it along that direction. Lower "
            f"log_odds, or give a reference with on_infeasible='skip' to leave them unchanged"
        )
