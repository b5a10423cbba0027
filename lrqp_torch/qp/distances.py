"""How far a probe's classes are apart in a metric: of all pairs, K × K."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.errors import check_distances, readable
from lrqp_torch.qp.constraints import MetricSizes

# Distances of classes come from their differences, all at once where there are few classes; else
# from a Gram matrix, but for pairs of which it loses this share of the digits' size.
DIRECT, NEAR = 64, 1e-2
CHUNK_NUMBERS = 2_000_000
# On a CPU differences of rows that stay near the processor take a tenth of the time.
NEAR_NUMBERS = 50_000


@dataclass(frozen=True)
class Distances:
    """Those of W's rows, (K, K) each.

    Attributes:
        squared: (w_k − w_l)ᵀ Σ (w_k − w_l), from differences: nearly equal classes keep their
            digits; differentiable.
        noise: rounding error of it. At or below it two classes are equal as far as the metric can
            tell.
        length: ‖w_k − w_l‖.
        stretch: (w_k − w_l)ᵀ Σ² (w_k − w_l) / s², s the largest entry of Σ.
    """

    squared: Tensor
    noise: Tensor
    length: Tensor
    stretch: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        steering: Tensor,
        sizes: MetricSizes,
        low: Tensor | None = None,
        length: Tensor | None = None,
    ) -> "Distances":
        """From W, W̄Σ and what its differences lack, (K, d) each; ``length`` if it is known."""
        length = lengths(weight) if length is None else length
        squared = _pairwise(weight, steering, low)
        check_distances(squared)
        with torch.no_grad():
            along = steering / sizes.unit
            stretch = _pairwise(along, along, None if low is None else low / sizes.unit)
            size = sizes.norm(steering)
            if low is not None:
                size = torch.zeros_like(size)
            noise = sizes.rounding(length, size.unsqueeze(-1) + size)
        return cls(squared, noise, length, stretch)


@torch.no_grad()
def lengths(weight: Tensor) -> Tensor:
    """‖w_k − w_l‖, (K, K)."""
    return _pairwise(weight, weight).clamp_min(0.0).sqrt()


def _pairwise(left: Tensor, right: Tensor, low: Tensor | None = None) -> Tensor:
    """The products (u_k − u_l)·(v_k − v_l) of rows u of ``left`` and v of ``right``, (K, K).

    ``low`` is what to add to v, of up to :data:`DIRECT` rows, and to u where both are the same.
    """
    n_classes, width = left.shape
    rows = max(1, CHUNK_NUMBERS // width)
    if n_classes <= DIRECT or not readable(left):
        most = NEAR_NUMBERS if left.device.type == "cpu" else CHUNK_NUMBERS
        rows = max(1, most // (width * n_classes))

        def apart(side: Tensor, rest: Tensor | None, at: slice) -> Tensor:
            own = side[at].unsqueeze(1) - side
            return own if rest is None else own + (rest[at].unsqueeze(1) - rest)

        parts = [slice(start, start + rows) for start in range(0, n_classes, rows)]
        sides = (left, low if left is right else None), (right, low)
        return torch.cat([torch.mul(*(apart(*side, at) for side in sides)).sum(-1) for at in parts])
    # Centred, a Gram matrix loses least; differences themselves are exact without.
    exact = left, left if left is right else right
    left = left - left.mean(0)
    right = left if exact[1] is exact[0] else right
    # Blocks of rows from the diagonal on, small enough to stay near the processor.
    squared, own = left.new_zeros(n_classes, n_classes), (left * right).sum(-1)
    block = max(1, CHUNK_NUMBERS // n_classes)
    for begin in range(0, n_classes, block):
        mine, yours = left[begin : begin + block], right[begin:]
        products = mine @ yours.T
        if left is not right:
            products = (products + right[begin : begin + block] @ left[begin:].T) / 2
        terms = own[begin : begin + block].unsqueeze(-1) + own[begin:]
        part = terms - 2 * products
        one, two = (part.detach() <= NEAR * terms.detach()).triu().nonzero(as_tuple=True)
        one, two = one + begin, two + begin
        found = [
            torch.mul(*(own[a] - own[b] for own in exact)).sum(-1)
            for a, b in zip(one.split(rows), two.split(rows), strict=True)
        ]
        part = part.index_put((one - begin, two - begin), torch.cat(found))
        # Of the block's own square what is above the diagonal counts, and is 0 on it.
        square = part[:, : len(part)].triu(1)
        squared[begin : begin + block, begin:] = part
        squared[begin : begin + block, begin : begin + block] = square + square.mT
        squared[begin + block :, begin : begin + block] = part[:, len(part) :].mT
    return squared
