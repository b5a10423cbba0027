"""No edit: the row of a table that says what happens by itself."""

from typing import ClassVar, Self

from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData
from lrqp_torch.stream.intervene import EditContext


class NoEdit(Baseline):
    """x' = x, bit for bit, at every strength. Needs no fit."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "no edit"

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls(data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return x
