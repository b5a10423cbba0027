"""The whole activation of a paired prompt."""

from typing import ClassVar, Self

from torch import Tensor

from lrqp_torch.baselines.base import Paired
from lrqp_torch.baselines.data import BaselineData
from lrqp_torch.stream.intervene import EditContext


class FullPatch(Paired):
    """x' = x_pair, the activation of another prompt at the same site.

    The upper bound of what any edit of this activation can do, and what it does besides: whatever
    else tells the two prompts apart comes along. Needs no fit.

    Source: interchange interventions (Geiger et al. 2021, arXiv 2106.02997) and activation patching
    (Vig et al. 2020, arXiv 2004.12265).

    Args:
        reference: see :class:`Baseline`.
        strength: see :class:`Baseline`.
    """

    name: ClassVar[str] = "full_patch"
    title: ClassVar[str] = "full patch"

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls(data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return self.partners(x, context)
