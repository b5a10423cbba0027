"""AlterRep: mirror what a sequence of linear classifiers reads to the target's side."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData, check_examples
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError, WidthError
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.intervene import EditContext

NOTHING_LEFT = 1e-9


class AlterRep(Baseline):
    """Remove the part that classifiers read, and put it back on the target's side.

        x' = c + P_N (x − c) + α Σ_i |r_i·(x − c)| r_i,    P_N = I − Σ_i r_i r_iᵀ

    The unit rows r_i point to the target class. They come from iterative nullspace projection
    (Ravfogel et al. 2020, arXiv 2004.07667): each is the direction of a classifier for the class
    against the rest, fitted after the rows before it have been projected out. c, the midpoint of
    the means of the class and of the rest, stands in for the classifiers' biases, which the
    published formula leaves out; activations of the residual stream are far from centred. A control
    edit is pushed to the side of its own class.

    Source: Ravfogel et al. 2021, "Counterfactual Interventions Reveal the Causal Effect of Relative
    Clause Representations on Agreement Prediction", arXiv 2105.06965.

    Args:
        reference: see :class:`Baseline`.
        rows: r for each target class, (K, m, d), orthonormal within a class; rows of zeros are
            left out.
        centres: c for each target class, (K, d).
        alpha: α, how far to the target's side.
        strength: see :class:`Baseline`; α is the method's own dose.

    Raises:
        WidthError: tensors that do not fit the reference.
        SettingError: α below zero.
    """

    name: ClassVar[str] = "alterrep"
    title: ClassVar[str] = "AlterRep"
    directions: Tensor
    centres: Tensor

    def __init__(
        self,
        reference: LRQP,
        rows: Tensor,
        centres: Tensor,
        *,
        alpha: float = 4.0,
        strength: float = 1.0,
    ) -> None:
        super().__init__(reference, strength=strength)
        shape = (self.n_classes, rows.shape[1] if rows.ndim == 3 else 0, self.width)
        if tuple(rows.shape) != shape or centres.shape != (self.n_classes, self.width):
            raise WidthError(
                f"rows must be ({self.n_classes}, m, {self.width}) and centres "
                f"({self.n_classes}, {self.width}), got {tuple(rows.shape)} and "
                f"{tuple(centres.shape)}"
            )
        if not alpha >= 0:
            raise SettingError(f"alpha must be 0 or more, got {alpha}")
        self.alpha = float(alpha)
        self.register_buffer("directions", rows.double())
        self.register_buffer("centres", centres.double())

    @classmethod
    def fit(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        reference: LRQP | None = None,
        alpha: float = 4.0,
        iterations: int = 8,
        l2: float | None = None,
        strength: float = 1.0,
    ) -> Self:
        """Fit the classifiers to activations x, (n, d), with classes y, (n,).

        Args:
            x: activations.
            y: their classes.
            reference: default an LRQP fitted to the same activations.
            alpha: α.
            iterations: m, how many classifiers in sequence; fewer where nothing is left to read.
            l2: their penalty, see :meth:`LinearProbe.fit`.
            strength: see :class:`Baseline`.

        Raises:
            WidthError, NonFiniteError, LabelError: bad input, named.
            SettingError: α below zero, or iterations outside 1 to d.
        """
        reference = LRQP.fit(x, y) if reference is None else reference
        x, labels = check_examples(x, y, reference)
        if not 1 <= iterations <= x.shape[1]:
            raise SettingError(f"iterations must be 1 to {x.shape[1]}, got {iterations}")
        n_classes = reference.probe.n_classes
        rows: list[Tensor] = []
        centres: list[Tensor] = []
        for k in range(n_classes):
            if n_classes == 2 and k == 1:  # the same classifiers, seen from the other side
                rows.append(-rows[0])
                centres.append(centres[0])
                continue
            inside = labels == k
            centres.append((x[inside].mean(0) + x[~inside].mean(0)) / 2)
            rows.append(_nullspace_rows(x - centres[-1], inside, iterations, l2))
        return cls(
            reference, torch.stack(rows), torch.stack(centres), alpha=alpha, strength=strength
        )

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls.fit(data.x, data.y, reference=data.reference)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        rows = self.directions[target]
        centred = (x.double() - self.centres[target]).unsqueeze(-1)
        reading = (rows @ centred).squeeze(-1)
        change = self.alpha * reading.abs() - reading
        return x.double() + (change.unsqueeze(-2) @ rows).squeeze(-2)


def _nullspace_rows(x: Tensor, inside: Tensor, iterations: int, l2: float | None) -> Tensor:
    """Orthonormal rows of classifiers in sequence, (iterations, d), pointing inside."""
    rows = x.new_zeros(iterations, x.shape[1])
    scale = float(torch.linalg.vector_norm(x, dim=-1).mean())
    for i in range(iterations):
        left = x - (x @ rows.T) @ rows
        if float(torch.linalg.vector_norm(left, dim=-1).mean()) <= NOTHING_LEFT * scale:
            break
        weight = LinearProbe.fit(left, inside, l2=l2, n_classes=2).weight
        direction = weight[1] - weight[0]
        # In exact arithmetic orthogonal to the rows before already.
        direction = direction - (direction @ rows.T) @ rows
        size = torch.linalg.vector_norm(direction)
        if float(size) * scale <= NOTHING_LEFT:
            break
        rows[i] = direction / size
    return rows
