"""A batched dual active-set solver for small non-negative quadratic programs.

Solves, for each example of a batch,

    minimise  ½ λᵀ M λ − gᵀ λ   over  λ ≥ 0,

with M symmetric positive semidefinite, m × m. This is the dual of the LRQP edit, with
m = K − 1 constraints. The method is Goldfarb and Idnani (1983), "A numerically stable dual
method for solving strictly convex quadratic programs": start at λ = 0, let the most violated
constraint enter, move until it is satisfied or a multiplier falls to zero and its constraint
leaves.

Only the inverse of the active block of M is held, which few constraints share even where there are
hundreds, and M itself may be the distances of K classes (see :mod:`~.constraints`). Everything is
measured in units that no scale of M or g changes: constraints of unit length, and gaps of which the
largest is 1. Where m is small all 2^m active sets are tabled beforehand, and no value is looked at.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import concrete
from lrqp_torch.qp import fused, native
from lrqp_torch.qp.constraints import ClassConstraints, Constraints
from lrqp_torch.qp.implicit import ActiveBlock
from lrqp_torch.qp.pivots import find_active_sets


@dataclass(frozen=True)
class DualSolution(ActiveBlock):
    """The active set of each problem, and what was found with it."""

    # False where the dual is unbounded, so no activation meets the constraints, (B,).
    feasible: Tensor
    converged: Tensor  # False where the pivots ran out, (B,)


@torch.no_grad()
def solve_dual(
    constraints: Constraints, gap: Tensor, *, max_pivots: int | None = None
) -> DualSolution:
    """The active sets of a batch of dual problems, each min ½ λᵀMλ − gᵀλ over λ ≥ 0.

    Infeasible examples (some combination of constraints with M u = 0, u ≥ 0, gᵀu > 0) are
    recognised by that u, not approximated: they come back with ``feasible`` False and nothing held.

    Args:
        constraints: M and the rounding error of its diagonal.
        gap: g, (B, m): by how much each constraint is violated at λ = 0.
        max_pivots: default 20 m + 50; a random problem with m = 9 takes 4.
    """
    gap = gap.detach()
    if constraints.table is not None and not torch.compiler.is_compiling():
        sets, case = constraints.table
        tabled: DualSolution = sets.solve(case, gap)
        return tabled
    if isinstance(constraints, ClassConstraints):
        matrix, noise = constraints.classes.squared.detach(), constraints.classes.noise
        target = constraints.target
    else:
        matrix, noise = constraints.gram.detach(), constraints.noise
        target = torch.zeros_like(gap[:, 0], dtype=torch.long)
    max_pivots = 20 * gap.shape[-1] + 50 if max_pivots is None else max_pivots
    tensors = matrix, noise, target, gap
    if concrete(gap) and not torch._C._functorch.is_functorch_wrapped_tensor(gap):
        found = _find(*tensors, 0, max_pivots)
    else:
        # An operator of its own, so that transforms and compiled graphs see one step instead of a
        # loop whose length depends on the numbers.
        found = pivot(*tensors, gap.shape[-1], max_pivots)
    index, inverse, feasible, converged = found
    return DualSolution(index, index < gap.shape[-1], inverse, feasible, converged)


Pivoted = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("lrqp_torch::pivot", mutates_args=())
def pivot(
    matrix: Tensor, noise: Tensor, target: Tensor, gap: Tensor, slots: int, max_pivots: int
) -> Pivoted:
    """:func:`~.pivots.find_active_sets` as an operator, which is not differentiable."""
    return _find(matrix, noise, target, gap, slots, max_pivots)


def _find(
    matrix: Tensor, noise: Tensor, target: Tensor, gap: Tensor, slots: int, max_pivots: int
) -> Pivoted:
    launched = fused.serves(gap, gap.shape[1] + 1)
    compiled = gap.is_cpu and not launched and native.library() is not None
    find = native.find_active_sets if compiled else find_active_sets
    return find(matrix, noise, target, gap, slots, max_pivots)


@pivot.register_fake
def _(matrix: Tensor, noise: Tensor, target: Tensor, gap: Tensor, slots: int, *_: int) -> Pivoted:
    batch = gap.shape[0]
    index = gap.new_empty(batch, slots, dtype=torch.long)
    verdicts = gap.new_empty(2, batch, dtype=torch.bool)
    return index, gap.new_empty(batch, slots, slots), verdicts[0].clone(), verdicts[1].clone()


@pivot.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Under vmap the mapped dimension joins the batch; unless each has classes of its own."""
    tensors = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(arguments[:4], in_dims[:4], strict=True)
    ]
    shared = tensors[0].ndim == 3
    if shared and not in_dims[0] is in_dims[1] is None:
        each = [pivot(*own, *arguments[4:]) for own in zip(*tensors, strict=True)]
        return tuple(torch.stack(part) for part in zip(*each, strict=True)), (0,) * 4
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    outputs = pivot(*(arguments[:2] if shared else flat[:2]), *flat[2:], *arguments[4:])
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0,) * 4
