"""Adding the difference of two class means: the steering vector."""

from typing import ClassVar, Self

from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData, check_examples, class_means
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import WidthError
from lrqp_torch.stream.intervene import EditContext


class MeanDifference(Baseline):
    """The difference of class means at one dose for all.

        x' = x + s (μ_t − μ_v)

    t the target class, v the source class. The strength s is the method's own dose: 1 takes the
    mean of the source class to the mean of the target class. With t = v nothing changes.

    Source: activation addition (Turner et al. 2023, arXiv 2308.10248) with class means as in
    contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681).

    Args:
        reference: see :class:`Baseline`.
        means: μ, (K, d).
        strength: s.

    Raises:
        WidthError: means that do not fit the reference.
    """

    name: ClassVar[str] = "mean_difference"
    title: ClassVar[str] = "mean difference, fixed dose"
    means: Tensor

    def __init__(self, reference: LRQP, means: Tensor, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        if means.shape != (self.n_classes, self.width):
            raise WidthError(
                f"class means must be ({self.n_classes}, {self.width}), got {tuple(means.shape)}"
            )
        self.register_buffer("means", means.double())

    @classmethod
    def fit(
        cls, x: Tensor, y: Tensor, *, reference: LRQP | None = None, strength: float = 1.0
    ) -> Self:
        """Class means of activations x, (n, d), with classes y, (n,).

        Args:
            x: activations.
            y: their classes.
            reference: default an LRQP fitted to the same activations.
            strength: s.

        Raises:
            WidthError, NonFiniteError, LabelError: bad input, named.
        """
        reference = LRQP.fit(x, y) if reference is None else reference
        x, labels = check_examples(x, y, reference)
        means = class_means(x, labels, reference.probe.n_classes)
        return cls(reference, means, strength=strength)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls.fit(data.x, data.y, reference=data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return x.double() + (self.means[target] - self.means[source])
