"""What an edit must leave alone: directions that other probes read, and the metric without them."""

import torch
from torch import Tensor, nn

from lrqp_torch.errors import CovarianceError, NonFiniteError, WidthError


def class_differences(kept: nn.Linear | Tensor, width: int) -> Tensor:
    """The directions that carry a probe's beliefs: w_k − mean of w, (K, d), float64.

    Its probabilities depend on differences of logits only, so these directions hold all of them;
    a shift common to all classes is free. A tensor of rows, (n, d) or (d,), is taken as it is.

    Raises:
        WidthError: no probe and no rows of this width.
        NonFiniteError: NaN or infinity in them.
    """
    if isinstance(kept, nn.Linear):
        weight = kept.weight.detach().double()
        # One row is a binary probe with a single logit, whose difference to 0 is its belief.
        rows = weight - weight.mean(0) if len(weight) > 1 else weight
    elif isinstance(kept, Tensor) and kept.is_floating_point():
        rows = torch.atleast_2d(kept.detach().double())
    else:
        raise WidthError(
            f"what to keep must be a linear probe or a floating tensor of rows (n, {width}), got "
            f"{type(kept).__name__}"
        )
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) == 0:
        raise WidthError(
            f"what to keep must read width {width}, got {tuple(rows.shape)}; fit both on "
            f"activations of the same site"
        )
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError("the rows to keep hold NaN or infinity; refit the probe")
    return rows


def orthonormal_basis(rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of rows (n, d), (r, d) with r their numerical rank."""
    precision = max(rows.shape) * torch.finfo(rows.dtype).eps
    length = torch.linalg.vector_norm(rows, dim=-1)
    # A row of rounding errors, such as w_k − mean of equal weights, has no direction to keep.
    present = length > precision * length.sum()
    if not bool(present.any()):
        return rows[:0]
    unit = rows[present] / length[present].unsqueeze(-1)
    values, basis = torch.linalg.svd(unit, full_matrices=False)[1:]
    kept: Tensor = basis[values > precision * values[0]]
    return kept


def conditional_covariance(covariance: Tensor, basis: Tensor) -> Tensor:
    """Σ − Σ Cᵀ (C Σ Cᵀ)⁺ C Σ: the covariance of x given C x. Differentiable in Σ.

    Computed as Q (P Σ Pᵀ) Q with P = I − Σ Cᵀ (C Σ Cᵀ)⁺ C and Q = I − Cᵀ C, which in exact
    arithmetic is the same, and in floating point is positive semidefinite and zero along C to the
    rounding error of the *result*, however long the directions were in Σ. Each factor changes r
    directions only, so all of it costs r d².

    Args:
        covariance: Σ, (d, d), float64.
        basis: C, (r, d), orthonormal rows.

    Raises:
        CovarianceError: nothing is left, as when as many directions are kept as Σ has.
    """
    width = covariance.shape[0]
    pulled = basis @ covariance
    gram = pulled @ basis.T
    tolerance = width * torch.finfo(covariance.dtype).eps
    inverse = torch.linalg.pinv((gram + gram.T) / 2, hermitian=True, rtol=tolerance)

    def taken(matrix: Tensor, along: Tensor) -> Tensor:
        """(I − along C) S (I − along C)ᵀ of a symmetric S, with ``along`` (d, r)."""
        half = torch.addmm(matrix, along, basis @ matrix, alpha=-1)
        return torch.addmm(half, half @ basis.T, along.T, alpha=-1)

    result = taken(covariance, pulled.T @ inverse)
    # Each time takes away what rounding of the product before put back.
    for _ in range(2):
        result = taken(result, basis.T)
    result = torch.add(result, result.T).mul_(0.5)
    # Without a copy, which at large widths takes longer than the search.
    largest, before = (
        max(map(abs, torch.stack(torch.aminmax(matrix.detach())).tolist()))
        for matrix in (result, covariance)
    )
    if not largest > tolerance * before:
        raise CovarianceError(
            f"keeping {len(basis)} directions leaves none of width {width} along which activations "
            f"vary; keep fewer, or allow a tolerance"
        )
    return result
