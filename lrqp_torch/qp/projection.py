"""Products of activations with a probe in float64, without a float64 copy of the activations."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from lrqp_torch.errors import readable

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
    if is_large(x) and not weight.requires_grad:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return in_blocks(x, weight) + bias
        product: Tensor = _InBlocks.apply(x, weight)  # type: ignore[no-untyped-call]
        return product + bias
    return torch.nn.functional.linear(x.double(), weight, bias)


def is_large(x: Tensor) -> bool:
    """Whether activations are worth taking in blocks: many, on the CPU, outside transforms."""
    return (
        x.numel() >= LARGE
        and readable(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and unpack_dual(x).tangent is None
    )


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


class _InBlocks(torch.autograd.Function):
    """The product x Wᵀ for W constant; gradients in the dtype of x, as they are stored."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return in_blocks(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        # Half precision sums would lose what the conversion to it keeps.
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        return (gradient.to(dtype) @ weight.to(dtype)).to(ctx.dtype), None
