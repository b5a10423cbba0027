"""LEACE: erase what any linear classifier could read."""

from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData, check_examples
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import MissingExtraError, WidthError
from lrqp_torch.stream.intervene import EditContext

PACKAGE = "concept_erasure"
COMMAND = "pip install 'lrqp_torch[leace]'"


class LEACE(Baseline):
    """The least change, in mean square, after which no linear classifier finds the class.

        x' = x − L R (x − μ),   L R = W⁺ P W,   P the orthogonal projection onto the range of W Σ_xz

    with W = Σ^{−1/2} and Σ_xz the cross-covariance with the one-hot classes. Afterwards all classes
    have the same mean. The target is not read: at strength 1 the belief is erased and not flipped,
    and a control edit erases it as well. At strength 2 the part that tells classes apart is
    mirrored about the mean.

    Source: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", arXiv
    2306.03819, computed by the authors' package ``concept-erasure``.

    Args:
        reference: see :class:`Baseline`.
        left: L, (d, k).
        right: R, (k, d).
        mean: μ, (d,).
        strength: see :class:`Baseline`.

    Raises:
        WidthError: tensors that do not fit the reference.
    """

    name: ClassVar[str] = "leace"
    title: ClassVar[str] = "LEACE"
    left: Tensor
    right: Tensor
    mean: Tensor

    def __init__(
        self, reference: LRQP, left: Tensor, right: Tensor, mean: Tensor, *, strength: float = 1.0
    ) -> None:
        super().__init__(reference, strength=strength)
        rank = left.shape[-1]
        shapes = tuple(left.shape), tuple(right.shape), tuple(mean.shape)
        if shapes != ((self.width, rank), (rank, self.width), (self.width,)):
            raise WidthError(
                f"an eraser of width {self.width} has tensors (d, k), (k, d) and (d,), got "
                f"{', '.join(map(str, shapes))}"
            )
        for name, tensor in (("left", left), ("right", right), ("mean", mean)):
            self.register_buffer(name, tensor.double())

    @classmethod
    def fit(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        reference: LRQP | None = None,
        shrinkage: bool = True,
        strength: float = 1.0,
    ) -> Self:
        """Fit the eraser to activations x, (n, d), with classes y, (n,).

        Args:
            x: activations.
            y: their classes.
            reference: default an LRQP fitted to the same activations.
            shrinkage: whether the package shrinks its covariance.
            strength: see :class:`Baseline`.

        Raises:
            MissingExtraError: ``concept-erasure`` is not installed.
            WidthError, NonFiniteError, LabelError: bad input, named.
        """
        package = _package()
        reference = LRQP.fit(x, y) if reference is None else reference
        x, labels = check_examples(x, y, reference)
        one_hot = torch.nn.functional.one_hot(labels, reference.probe.n_classes).to(x)
        # The last class follows from the others. The package's own threshold, 0.01, would leave
        # weak classes as they are.
        eraser = package.LeaceEraser.fit(x, one_hot[:, :-1], shrinkage=shrinkage, svd_tol=1e-12)
        return cls(reference, eraser.proj_left, eraser.proj_right, eraser.bias, strength=strength)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls.fit(data.x, data.y, reference=data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return x.double() - ((x.double() - self.mean) @ self.right.T) @ self.left.T


def _package() -> Any:
    try:
        return import_module(PACKAGE)
    except ImportError as error:
        raise MissingExtraError(
            f"LEACE is computed by the package concept-erasure, which is not installed: {COMMAND}"
        ) from error
