"""LRQP itself behind the baselines' call, in the reference's metric or another one."""

import copy
from typing import ClassVar, Self

from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.stream.intervene import EditContext


class LeastEdit(Baseline):
    """The least edit that reaches the reference's odds, in a metric of choice.

        minimise  (x' − x)ᵀ M⁻¹ (x' − x)   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    With M = Σ, the reference's own, this is LRQP, from "Intervening in the Residual Stream", and at
    strength 1 it returns the same bits. At other strengths the odds promised do not hold.

    Args:
        reference: gives the probe and the odds rule, and the metric in which the edit is measured.
        metric: M; default the reference's.
        strength: see :class:`Baseline`.
    """

    name: ClassVar[str] = "lrqp"
    title: ClassVar[str] = "LRQP"

    def __init__(
        self, reference: LRQP, metric: Mahalanobis | None = None, *, strength: float = 1.0
    ) -> None:
        super().__init__(reference, strength=strength)
        # A copy has all of the reference's options, whichever there are.
        self.program = reference if metric is None else copy.deepcopy(reference)
        if metric is not None:
            self.program.metric = metric.to(reference.metric.covariance.device)

    @classmethod
    def fit(
        cls, x: Tensor, y: Tensor, *, reference: LRQP | None = None, strength: float = 1.0
    ) -> Self:
        """For activations x, (n, d), with classes y, (n,); they only serve to fit a reference."""
        return cls(LRQP.fit(x, y) if reference is None else reference, strength=strength)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls(data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`.

        Raises:
            InfeasibleError, SolverError: as :meth:`LRQP.solve`.
        """
        solution = self.program.solve(
            x, target, source, realise=context.realise, examples=context.example
        )
        return solution.x_new
