"""Edits by what linear classifiers read: erased (LEACE), or mirrored (AlterRep)."""

from importlib import import_module
from typing import ClassVar, Self

import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import check_examples
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import MissingExtraError, SettingError
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.intervene import EditContext

PACKAGE = "concept_erasure"
COMMAND = "pip install 'lrqp_torch[leace]'"
NOTHING_LEFT = 1e-9


class LEACE(Baseline):
    """The least change, in mean square, after which no linear classifier finds the class.

        x' = x − L R (x − μ),   L R = W⁺ P W,   P the orthogonal projection onto the range of W Σ_xz

    with W = Σ^{−1/2} and Σ_xz the cross-covariance with the one-hot classes. Afterwards all classes
    have the same mean. The target is not read: at strength 1 the belief is erased and not flipped,
    and a control edit erases it as well. At strength 2 the part that tells classes apart is
    mirrored about the mean.

    Source: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", arXiv
    2306.03819, computed by the authors' package ``concept-erasure``.

    ``fit`` takes ``shrinkage``, whether the package shrinks its covariance.

    Args:
        left: L, (d, k).
        right: R, (k, d).
        mean: μ, (d,).

    Raises:
        WidthError: tensors that do not fit the reference.
        MissingExtraError: in ``fit``: ``concept-erasure`` is not installed.
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
        self._hold("left", left, self.width, rank)
        self._hold("right", right, rank, self.width)
        self._hold("mean", mean, self.width)

    @classmethod
    def _fit(
        cls,
        reference: LRQP,
        x: Tensor,
        y: Tensor,
        *,
        shrinkage: bool = True,
        strength: float = 1.0,
    ) -> Self:
        try:
            package = import_module(PACKAGE)
        except ImportError as error:
            raise MissingExtraError(
                f"LEACE is computed by the package concept-erasure, which is not installed: "
                f"{COMMAND}"
            ) from error
        x, labels = check_examples(x, y, reference)
        one_hot = torch.nn.functional.one_hot(labels, reference.n_classes).to(x)
        # The last class follows from the others. The package's own threshold, 0.01, would leave
        # weak classes as they are.
        eraser = package.LeaceEraser.fit(x, one_hot[:, :-1], shrinkage=shrinkage, svd_tol=1e-12)
        return cls(reference, eraser.proj_left, eraser.proj_right, eraser.bias, strength=strength)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`."""
        return x.double() - ((x.double() - self.mean) @ self.right.T) @ self.left.T


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

    ``fit`` takes ``alpha``, α; ``iterations``, m, how many classifiers in sequence (fewer where
    nothing is left to read); ``l2``, their penalty, see :meth:`LinearProbe.fit`; and ``centred``,
    False for the authors' form with c = 0.

    Args:
        rows: r for each target class, (K, m, d), orthonormal within a class; rows of zeros are
            left out.
        centres: c for each target class, (K, d).
        alpha: α, how far to the target's side.

    Raises:
        WidthError: tensors that do not fit the reference.
        SettingError: α below zero; in ``fit``, iterations outside 1 to d.
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
        if not alpha >= 0:
            raise SettingError(f"alpha must be 0 or more, got {alpha}")
        self.alpha = float(alpha)
        self._hold("directions", rows, self.n_classes, rows.shape[-2], self.width)
        self._hold("centres", centres, self.n_classes, self.width)

    @classmethod
    def _fit(
        cls,
        reference: LRQP,
        x: Tensor,
        y: Tensor,
        *,
        alpha: float = 4.0,
        iterations: int = 8,
        l2: float | None = None,
        centred: bool = True,
        strength: float = 1.0,
    ) -> Self:
        x, labels = check_examples(x, y, reference)
        if not 1 <= iterations <= x.shape[1]:
            raise SettingError(f"iterations must be 1 to {x.shape[1]}, got {iterations}")
        n_classes = reference.n_classes
        rows: list[Tensor] = []
        centres: list[Tensor] = []
        for k in range(n_classes):
            if n_classes == 2 and k == 1:  # the same classifiers, seen from the other side
                rows.append(-rows[0])
                centres.append(centres[0])
                continue
            inside = labels == k
            middle = (x[inside].mean(0) + x[~inside].mean(0)) / 2
            centres.append(middle if centred else torch.zeros_like(middle))
            rows.append(_nullspace_rows(x - centres[-1], inside, iterations, l2))
        return cls(
            reference, torch.stack(rows), torch.stack(centres), alpha=alpha, strength=strength
        )

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
        # So near to its optimum that it lies in what is left, as far as that is told from nothing.
        (probe,) = LinearProbe.fit_many({i: (left, inside)}, l2=l2, tolerance=1e-12).values()
        weight = probe.weight
        direction = weight[1] - weight[0]
        # In exact arithmetic orthogonal to the rows before already.
        direction = direction - (direction @ rows.T) @ rows
        size = torch.linalg.vector_norm(direction)
        if float(size) * scale <= NOTHING_LEFT:
            break
        rows[i] = direction / size
    return rows
