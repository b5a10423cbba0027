"""A batched dual active-set solver for small non-negative quadratic programs.

Solves, for each example of a batch,

    minimise  ½ λᵀ M λ − gᵀ λ   over  λ ≥ 0,

with M symmetric positive semidefinite, m × m. This is the dual of the LRQP edit, with
m = K − 1 constraints. The method is Goldfarb and Idnani (1983), "A numerically stable dual
method for solving strictly convex quadratic programs", carried out by principal pivots of a
tableau (van de Panne and Whinston, 1969): start at λ = 0, let the most violated constraint
enter, move until it is satisfied or a multiplier falls to zero and its constraint leaves.

For the active set A the tableau holds −M_AA⁻¹ in its A, A block, M_AA⁻¹ M_AN in A, N and the
Schur complement M_NN − M_NA M_AA⁻¹ M_AN in N, N. One column of it therefore gives the step, one
rank-one update gives the next tableau, and the inverse that refinement and the backward pass
need comes for free: no LAPACK call, everything on the tensors' device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A Schur complement below this share of its diagonal entry means that the entering constraint
# depends linearly on the active ones. Well above the rounding of a pivot (1e-16), well below
# the 1e-10 at which distinct but nearly parallel constraints still solve accurately.
DEPENDENT = 1e-13
# A constraint counts as satisfied within this share of 1 + |g|, in units of √M_ii.
SATISFIED = 1e-13
# Blocking directions below this are rounding.
NO_DIRECTION = 1e-14
# Tableaus above some 16 MB are slower per example: the allocator returns such buffers each time.
CHUNK_NUMBERS = 2_000_000


@dataclass(frozen=True)
class DualSolution:
    """Result of :func:`solve_dual`.

    Attributes:
        multipliers: λ, (B, m), non-negative.
        active: constraints that hold with equality, (B, m) bool.
        inverse: M_AA⁻¹ on the active set and zero elsewhere, (B, m, m).
        feasible: False where the dual is unbounded, so no activation meets the constraints, (B,).
        converged: False where the pivots ran out, (B,).
    """

    multipliers: Tensor
    active: Tensor
    inverse: Tensor
    feasible: Tensor
    converged: Tensor


@torch.no_grad()
def solve_dual(
    gram: Tensor, gap: Tensor, *, noise: Tensor | None = None, max_pivots: int | None = None
) -> DualSolution:
    """Solve a batch of dual problems, each min ½ λᵀMλ − gᵀλ over λ ≥ 0.

    Infeasible examples (some combination of constraints with M u = 0, u ≥ 0, gᵀu > 0) are
    recognised, not approximated: they come back with ``feasible`` False and λ = 0.

    Args:
        gram: M, (B, m, m), symmetric positive semidefinite, float64.
        gap: g, (B, m): by how much each constraint is violated at λ = 0.
        noise: (B, m), the rounding error of M's diagonal; a diagonal entry at or below it
            counts as zero. Default: zero.
        max_pivots: default 20 m + 50; a random problem with m = 9 takes 4.
    """
    noise = torch.zeros_like(gap) if noise is None else noise
    max_pivots = 20 * gap.shape[-1] + 50 if max_pivots is None else max_pivots
    # Unit diagonals make one tolerance fit all constraints.
    scale = unit_scale(gram, noise)
    unit, impossible = unit_gap(gap, scale)
    unit_gram = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    multipliers, active, tableau, feasible, converged = pivot(
        unit_gram, unit, max_pivots, CHUNK_NUMBERS
    )
    both = active.unsqueeze(-1) & active.unsqueeze(-2)
    inverse = torch.where(both, -tableau, 0.0) * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return DualSolution(
        multipliers=multipliers * scale,
        active=active,
        inverse=inverse,
        feasible=feasible & ~impossible,
        converged=converged,
    )


def unit_scale(gram: Tensor, noise: Tensor) -> Tensor:
    """1/√M_ii, which gives a constraint unit length, and 0 for one without length, (..., m)."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    root = diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    return torch.where(diagonal <= noise, 0.0, root)


def unit_gap(gap: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gaps of constraints of unit length, (B, m); and which examples can never be solved, (B,).

    A constraint without length does not depend on the activation: it holds already, or never will.
    """
    empty = scale == 0
    impossible = (empty & (gap > 0)).any(-1)
    return torch.where(empty | impossible.unsqueeze(-1), -1.0, gap * scale), impossible


@torch.library.custom_op("lrqp_torch::pivot", mutates_args=())
def pivot(
    gram: Tensor, gap: Tensor, max_pivots: int, chunk_numbers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Multipliers, active set, tableau, feasible and converged of unit-diagonal problems.

    An operator of its own, so that transforms and compiled graphs see one step instead of a loop
    whose length depends on the numbers. It is not differentiable; see :mod:`~.implicit`.
    """
    chunk = max(1, chunk_numbers // max(1, gap.shape[-1] ** 2))
    parts = [
        _pivot(gram[start : start + chunk], gap[start : start + chunk], max_pivots)
        for start in range(0, max(1, len(gap)), chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    multipliers, active, tableau, feasible, converged = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    return multipliers, active, tableau, feasible, converged


@pivot.register_fake
def _(
    gram: Tensor, gap: Tensor, max_pivots: int, chunk_numbers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    yes_or_no = gap.new_empty(gap.shape[0], dtype=torch.bool)
    return (
        torch.empty_like(gap),
        torch.empty_like(gap, dtype=torch.bool),
        torch.empty_like(gram),
        yes_or_no,
        torch.empty_like(yes_or_no),
    )


@pivot.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], gram: Tensor, gap: Tensor, max_pivots: int, chunk: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Under vmap the mapped dimension joins the batch."""

    def flat(tensor: Tensor, mapped: int | None) -> Tensor:
        if mapped is None:
            tensor, mapped = tensor.expand(info.batch_size, *tensor.shape), 0
        return tensor.movedim(mapped, 0).flatten(0, 1)

    outputs = pivot(flat(gram, in_dims[0]), flat(gap, in_dims[1]), max_pivots, chunk)
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0,) * 5


def _pivot(
    gram: Tensor, gap: Tensor, max_pivots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The pivoting loop on unit-diagonal problems; batch-last inside, batch-first outside."""
    n_problems, m = gap.shape
    device, infinity = gap.device, float("inf")
    out_multipliers = gap.new_zeros(m, n_problems)
    out_active = torch.zeros(m, n_problems, dtype=torch.bool, device=device)
    out_tableau = gram.new_zeros(m, m, n_problems)
    feasible = torch.ones(n_problems, dtype=torch.bool, device=device)
    converged = torch.zeros(n_problems, dtype=torch.bool, device=device)

    # The problems still being solved, and which ones they are.
    index = torch.arange(n_problems, device=device)
    tableau = gram.permute(1, 2, 0).contiguous()
    slack = -gap.T.contiguous()
    tolerance = SATISFIED * (1 + gap.abs().T)
    multipliers = torch.zeros_like(slack)
    active = torch.zeros_like(slack, dtype=torch.bool)
    entering = torch.zeros_like(index)
    mid_step = torch.zeros_like(index, dtype=torch.bool)

    for _ in range(max_pivots + 1 if n_problems else 0):
        # 1. The entering constraint: the most violated one, or the one whose step was blocked.
        violation = torch.where(active, infinity, slack + tolerance)
        worst, worst_index = violation.min(0)
        entering = torch.where(mid_step, entering, worst_index)
        done = ~mid_step & (worst >= 0)

        # 2. How far it can move: t_full satisfies it, t_block brings a multiplier to zero.
        row = entering.unsqueeze(0)
        column = tableau.gather(1, row.unsqueeze(0).expand(m, 1, -1)).squeeze(1)
        curvature = column.gather(0, row).squeeze(0)
        t_full = torch.where(
            curvature > DEPENDENT, -slack.gather(0, row).squeeze(0) / curvature, infinity
        )
        blocks = active & (column > NO_DIRECTION)
        t_block, leaving = torch.where(blocks, multipliers / column, infinity).min(0)
        step = torch.minimum(t_full, t_block).clamp_min(0.0)
        unbounded = ~done & torch.isinf(step)
        finished = done | unbounded

        # 3. Put finished problems away, and go on with the rest.
        if bool(finished.any()):
            at = index[finished]
            out_multipliers[:, at] = torch.where(unbounded[finished], 0.0, multipliers[:, finished])
            out_active[:, at] = active[:, finished] & done[finished]
            out_tableau[:, :, at] = tableau[:, :, finished]
            feasible[at] = done[finished]
            converged[at] = True
            keep = ~finished
            index = index[keep]
            if index.numel() == 0:
                break
            tableau, slack, tolerance = tableau[:, :, keep], slack[:, keep], tolerance[:, keep]
            multipliers, active, column = multipliers[:, keep], active[:, keep], column[:, keep]
            entering, leaving, step = entering[keep], leaving[keep], step[keep]
            t_full, t_block = t_full[keep], t_block[keep]

        # 4. Move: active multipliers fall along the column, inactive slacks rise along it.
        is_entering = torch.zeros_like(active).scatter_(0, entering.unsqueeze(0), True)
        move = step * column
        multipliers = torch.where(active, multipliers - move, multipliers) + step * is_entering
        slack = torch.where(active, 0.0, slack + move)

        # 5. Pivot on the constraint that joins the active set, or on the one that leaves it.
        joins = t_full <= t_block
        pivot = torch.where(joins, entering, leaving).unsqueeze(0)
        is_pivot = torch.zeros_like(active).scatter_(0, pivot, True)
        multipliers = torch.where(is_pivot & ~joins, 0.0, multipliers.clamp_min(0.0))
        slack = torch.where(is_pivot, 0.0, slack)
        active = active ^ is_pivot
        mid_step = ~joins
        tableau = principal_pivot(tableau, pivot, is_pivot, joins)
    else:
        out_multipliers[:, index], out_active[:, index] = multipliers, active
        out_tableau[:, :, index] = tableau

    return (
        out_multipliers.T.contiguous(),
        out_active.T.contiguous(),
        out_tableau.permute(2, 0, 1).contiguous(),
        feasible,
        converged,
    )


def principal_pivot(
    tableau: Tensor, pivot: Tensor, is_pivot: Tensor, joins: Tensor | None = None
) -> Tensor:
    """Exchange one constraint between the active and the inactive set in every tableau.

    With d = T_qq: T_ij ← T_ij − T_iq T_qj / d, T_iq ← ± T_iq / d (plus when q joins, minus when
    it leaves), T_qq ← −1 / d.

    Args:
        tableau: T, (m, m, B).
        pivot: q, (1, B).
        is_pivot: which row is q, (m, B) bool.
        joins: whether q joins the active set, (B,) bool; default: always.
    """
    m = tableau.shape[0]
    column = tableau.gather(1, pivot.unsqueeze(0).expand(m, 1, -1)).squeeze(1)
    diagonal = column.gather(0, pivot)
    scaled = column / diagonal
    others = scaled if joins is None else torch.where(joins, scaled, -scaled)
    edge = torch.where(is_pivot, -1.0 / diagonal, others)
    updated = tableau - column.unsqueeze(1) * scaled.unsqueeze(0)
    updated = torch.where(is_pivot.unsqueeze(0), edge.unsqueeze(1), updated)
    return torch.where(is_pivot.unsqueeze(1), edge.unsqueeze(0), updated)
