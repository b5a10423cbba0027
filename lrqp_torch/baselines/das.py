"""Distributed alignment search: the subspace whose interchange changes the behaviour."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Paired
from lrqp_torch.baselines.das_training import DASReport, interchange, train_subspace
from lrqp_torch.baselines.data import BaselineData, Behaviour
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import PairError, SettingError, WidthError
from lrqp_torch.stream.intervene import EditContext


class DAS(Paired):
    """Interchange within a trained subspace: its coordinates are those of a paired prompt.

        x' = x + R Rᵀ (x_pair − x),   RᵀR = I,   R of d rows and r columns

    R minimises the loss of the edited model on training pairs (the model itself is frozen), for
    example the cross-entropy of the answer that the paired prompt's class implies. What is
    orthogonal to R stays.

    Source: Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and
    Distributed Neural Representations", arXiv 2303.02536. A low loss is no proof that the model
    uses the subspace (Makelov, Lange and Nanda 2023, arXiv 2311.17030).

    Args:
        reference: see :class:`Baseline`.
        basis: R, (d, r), orthonormal columns.
        strength: see :class:`Baseline`.

    Attributes:
        report: how it was trained, or None.

    Raises:
        WidthError: a basis of another width, or with more columns than rows.
        SettingError: columns that are not orthonormal.
    """

    name: ClassVar[str] = "das"
    title: ClassVar[str] = "DAS"
    basis: Tensor
    report: DASReport | None = None

    def __init__(self, reference: LRQP, basis: Tensor, *, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0] == self.width:
            raise WidthError(
                f"a basis must be ({self.width}, r) with 1 ≤ r ≤ {self.width}, got "
                f"{tuple(basis.shape)}"
            )
        basis = basis.detach().double()
        error = basis.T @ basis - torch.eye(basis.shape[1]).to(basis)
        if not float(error.abs().max()) < 1e-5:
            raise SettingError("the columns of the basis are not orthonormal; take torch.linalg.qr")
        self.register_buffer("basis", basis)

    @classmethod
    def fit(
        cls,
        behaviour: Behaviour,
        paired: Tensor,
        *,
        reference: LRQP,
        rank: int = 1,
        epochs: int = 20,
        learning_rate: float = 0.03,
        validation: float = 0.2,
        patience: int = 3,
        seed: int = 0,
        strength: float = 1.0,
    ) -> Self:
        """Train R through the frozen model. See :func:`train_subspace` for the arguments.

        Raises:
            PairError: paired activations that do not fit the prompts.
            SettingError: a rank, a share or a number of epochs out of range.
            LearningError: too few prompts, or a loss that is not finite.
        """
        basis, report = train_subspace(
            behaviour,
            paired,
            rank=rank,
            epochs=epochs,
            learning_rate=learning_rate,
            validation=validation,
            patience=patience,
            seed=seed,
        )
        result = cls(reference, basis, strength=strength)
        result.report = report
        return result

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`.

        Raises:
            PairError: the data have no paired activations or no model to train through.
        """
        if data.paired is None or data.behaviour is None:
            raise PairError(
                "DAS is trained on pairs through the model: give BaselineData both paired "
                "activations and a Behaviour"
            )
        return cls.fit(data.behaviour, data.paired, reference=data.reference, seed=data.seed)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return interchange(x, self.partners(x, context), self.basis)
