"""Checks of a program's input, and the certificate of its output."""

from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, TargetError


def kkt_residual(
    gram: Tensor, gap: Tensor, multipliers: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Largest violation of the KKT conditions of min ½ λᵀMλ − gᵀλ over λ ≥ 0, per example.

    The conditions are λ ≥ 0, s = Mλ − g ≥ 0 and λ s = 0. Constraints are measured in units of
    their length √M_ii; violations are relative to 1 + max |g|, and λ s to its square. Constraints
    without length do not depend on the activation and are left out.

    Args:
        gram: M, (B, m, m).
        gap: g, (B, m).
        multipliers: λ, (B, m).
        noise: rounding error of M's diagonal, (B, m): a length at or below it is none.
            Default: zero.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    present = diagonal > (0.0 if noise is None else noise)
    length = torch.where(present, diagonal, 1.0).sqrt()
    slack = (gram @ multipliers.unsqueeze(-1)).squeeze(-1) - gap
    slack = torch.where(present, slack / length, 0.0)
    scaled = multipliers * length
    gap_size = 1 + torch.where(present, gap / length, 0.0).abs().amax(-1)
    infeasibility = torch.maximum(-slack, -scaled).amax(-1) / gap_size
    complementarity = (scaled * slack).abs().amax(-1) / gap_size**2
    return torch.maximum(infeasibility, complementarity)


def as_classes(classes: Any, name: str) -> Tensor:
    """Classes as a tensor, whether given as a number, a list, an array or a tensor.

    Raises:
        TargetError: not numbers at all.
    """
    try:
        return torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"{name} must be class numbers, one for all or one per activation, got {classes!r}"
        ) from error


def check_classes(classes: Tensor, batch: int, n_classes: int, name: str) -> None:
    """Raise :class:`TargetError` unless ``classes`` is (batch,) integer within [0, K)."""
    if classes.dtype.is_floating_point or classes.dtype.is_complex or classes.dtype == torch.bool:
        raise TargetError(
            f"{name} must hold integer class numbers, got {classes.dtype}; use .long()"
        )
    if classes.shape != (batch,):
        raise TargetError(
            f"{name} must be ({batch},), one class per activation, got {tuple(classes.shape)}"
        )
    outside = (classes < 0) | (classes >= n_classes)
    if bool(outside.any()):
        where = outside.nonzero().flatten()[:5].tolist()
        raise TargetError(
            f"{name} holds {classes[outside][0].item()} at example {where[0]}, but the probe has "
            f"classes 0 to {n_classes - 1} (examples {where})"
        )


def check_finite(x: Tensor) -> None:
    """Raise :class:`NonFiniteError` naming the activations that hold NaN or infinity."""
    # A finite sum has finite terms, and costs a fraction of looking at each of them.
    if bool(torch.isfinite(x.detach().sum())):
        return
    finite = torch.isfinite(x).all(-1)
    if not bool(finite.all()):
        where = (~finite).nonzero().flatten()
        raise NonFiniteError(
            f"activations of {len(where)} of {len(x)} examples hold NaN or infinity, the first "
            f"are {where[:5].tolist()}; look for overflow in the model's dtype upstream of the site"
        )
