"""Splitting displacements of the stream into their part inside a subspace and the part outside.

With B an orthonormal basis of the subspace, (r, d), P = Bᵀ B is the orthogonal projection onto it:

    δ = δ_in + δ_out,   δ_in = P δ,   δ_out = (I − P) δ,   ‖δ‖² = ‖δ_in‖² + ‖δ_out‖²

The Mahalanobis lengths of the two do not add up in squares, since P is orthogonal in the Euclidean
sense and not in that of Σ: a part can be longer than the whole.

Along a part's own direction the natural activations vary by so much, and the classes differ by so
much. An edit whose effect lies in a part along which the data hardly vary with the class, while the
part along which they do has no effect, is the illusion of Makelov, Lange and Nanda 2023
(arXiv 2311.17030): the probe reads a direction that nothing follows, and the edit works through one
that is otherwise asleep.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.errors import WidthError

NEGLIGIBLE = 1e-6
"""A part shorter than this share of the whole is rounding, and has no direction."""


@dataclass(frozen=True)
class Along:
    """How natural and edited activations lie along one direction p.

    Attributes:
        separation: |difference of the class means| along p, in standard deviations within a class.
        shift: mean |δ · p| in standard deviations of the natural activations along p.
        position: mean |x' · p − mean| in the same unit: how far out the edited activations lie.
        farthest: the same of the natural activation that lies farthest out.
    """

    separation: float
    shift: float
    position: float
    farthest: float


def split(delta: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of displacements inside and outside a subspace.

    Args:
        delta: displacements, (n, d).
        basis: orthonormal rows, (r, d).

    Returns:
        ``(inside, outside)``, (n, d) each, in float64; their sum is ``delta``.

    Raises:
        WidthError: other widths.
    """
    if delta.ndim != 2 or basis.ndim != 2 or delta.shape[1] != basis.shape[1]:
        raise WidthError(
            f"displacements (n, d) and basis (r, d) must have one width, got "
            f"{tuple(delta.shape)} and {tuple(basis.shape)}"
        )
    wide, rows = delta.double(), basis.double()
    inside = wide @ rows.T @ rows
    return inside, wide - inside


def direction_of(part: Tensor, whole: Tensor) -> Tensor | None:
    """The unit vector along which the rows of a part vary most, (d,).

    With two classes all displacements of one edit are multiples of one vector, and so are parts.

    Args:
        part: (n, d).
        whole: the displacements that it is a part of, (n, d).

    Returns:
        None where the part is rounding beside the whole.
    """
    if float(part.norm()) <= NEGLIGIBLE * float(whole.norm()):
        return None
    first: Tensor = torch.linalg.svd(part.double(), full_matrices=False)[2][0]
    return first


def along(direction: Tensor, x: Tensor, delta: Tensor, labels: Tensor) -> Along:
    """How activations lie along a direction before and after an edit.

    Args:
        direction: unit vector, (d,).
        x: natural activations, (n, d).
        delta: displacement of each, (n, d).
        labels: class of each, (n,); two or more classes.
    """
    natural, moved = x.double() @ direction, delta.double() @ direction
    mean, deviation = natural.mean(), natural.std(unbiased=False)
    classes = [natural[labels == k] for k in labels.unique()]
    means = torch.stack([values.mean() for values in classes])
    within = torch.cat([values - values.mean() for values in classes]).square().mean().sqrt()
    tiny = torch.finfo(natural.dtype).tiny
    return Along(
        separation=float((means.max() - means.min()) / within.clamp_min(tiny)),
        shift=float((moved.abs() / deviation.clamp_min(tiny)).mean()),
        position=float(((natural + moved - mean).abs() / deviation.clamp_min(tiny)).mean()),
        farthest=float((natural - mean).abs().max() / deviation.clamp_min(tiny)),
    )
