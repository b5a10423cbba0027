"""The two ends of any comparison: no edit, and the whole activation of another prompt."""

from typing import ClassVar

from torch import Tensor

from lrqp_torch.baselines.base import Baseline, Paired
from lrqp_torch.stream.intervene import EditContext


class NoEdit(Baseline):
    """x' = x, bit for bit, at every strength: what happens by itself."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "no edit"

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return x


class FullPatch(Paired):
    """x' = x_pair, the activation of another prompt at the same site.

    The upper bound of what any edit of this activation can do, and what it does besides: whatever
    else tells the two prompts apart comes along.

    Source: interchange interventions (Geiger et al. 2021, arXiv 2106.02997) and activation patching
    (Vig et al. 2020, arXiv 2004.12265).
    """

    name: ClassVar[str] = "full_patch"
    title: ClassVar[str] = "full patch"

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return self.partners(x, context)
