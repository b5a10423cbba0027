"""Products of activations with a probe in float64, without a float64 copy of the activations."""

from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import in_transforms, readable
from lrqp_torch.qp import native

# From so many numbers on, a float64 copy of the activations takes longer than the product: the
# allocator returns buffers of megabytes to the system and asks for them anew in every call.
LARGE = 65_536
# So many numbers at a time stay in a core's cache.
BLOCK_NUMBERS = 196_608


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product x Wᵀ + b in float64 whatever the dtype of x, (B, K); differentiable.

    Args:
        x: activations, (B, d).
        weight: W, (K, d), float64.
        bias: b, (K,), float64.
    """
    if weight.requires_grad or bias.requires_grad or not (readable(x) and readable(weight)):
        return torch.nn.functional.linear(x.double(), weight, bias)
    if in_transforms() or torch.autograd.forward_ad._current_level >= 0:
        return torch.nn.functional.linear(x.double(), weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        product: Tensor = _Reading.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return _read(x, weight, bias)


def _read(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.dtype in native.KINDS and native.library() is not None:
        return native.read(x, weight, bias)
    if x.numel() < LARGE:
        return torch.nn.functional.linear(x.double(), weight, bias)
    return in_blocks(x, weight) + bias


@torch.no_grad()
def in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """The product x Wᵀ in W's dtype, (B, K), a few rows of x at a time."""
    count, width = x.shape
    result = weight.new_empty(count, weight.shape[0])
    rows = max(1, BLOCK_NUMBERS // width)
    wide = weight.new_empty(min(rows, count), width)
    for part, into in zip(x.split(rows), result.split(rows), strict=True):
        block = part if x.dtype == weight.dtype else wide[: part.shape[0]].copy_(part)
        if weight.shape[0] == 1:
            torch.mv(block, weight[0], out=into.squeeze(-1))
        else:
            torch.mm(block, weight.T, out=into)
    return result


class _Reading(torch.autograd.Function):
    """The product x Wᵀ + b for W and b constant; gradients in x's dtype, as they are stored."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _read(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # Half precision sums would lose what the conversion to it keeps.
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        return (gradient.to(dtype) @ weight.to(dtype)).to(ctx.dtype), None, None
