"""The certificate of a solution: how far it is from the optimality conditions."""

import torch
from torch import Tensor

from lrqp_torch.qp.implicit import matvec


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
    slack = matvec(gram, multipliers) - gap
    slack = torch.where(present, slack / length, 0.0)
    scaled = multipliers * length
    gap_size = 1 + torch.where(present, gap / length, 0.0).abs().amax(-1)
    infeasibility = torch.maximum(-slack, -scaled).amax(-1) / gap_size
    complementarity = (scaled * slack).abs().amax(-1) / gap_size**2
    return torch.maximum(infeasibility, complementarity)
