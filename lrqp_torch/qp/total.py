"""The least edit for total odds: P[t] / (1 − P[t]) ≥ α, exactly, as one convex constraint.

With s_ℓ = z_t − z_ℓ the margins over the m = K − 1 rivals, the log of the total odds is

    f(s) = z_t − log Σ_{ℓ≠t} exp z_ℓ = −log Σ_ℓ exp(−s_ℓ),

concave, with gradient p = softmax(−s): the rivals' shares among themselves. So the problem

    minimise ½ δᵀ Σ⁻¹ δ   subject to   f(s⁰ + A δ) ≥ log α

is convex, and its KKT conditions (Boyd and Vandenberghe 2004, §5.5.3) are δ = Σ Aᵀ λ with

    λ = μ p(s⁰ + M λ),   f(s⁰ + M λ) = log α,   μ ≥ 0,   M = A Σ Aᵀ:

every rival is held down in proportion to its probability at x'. Only M is needed, m × m.

This file has the conditions and their derivatives; :mod:`~.total_solver` finds the solution.
"""

import torch
from torch import Tensor

from lrqp_torch.qp.implicit import matvec


def total_log_odds(margins: Tensor) -> Tensor:
    """Log P[t] / (1 − P[t]) from the margins z_t − z_ℓ over the rivals, (..., m) → (...)."""
    return -(-margins).logsumexp(-1)


def without_constants(
    gram: Tensor, start: Tensor, floor: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same problem without the rivals that no activation moves; differentiable.

    Where M_ℓℓ is none, s_ℓ is a constant: Σ exp(−s) ≤ 1/α leaves less for the others, so their
    floor is −log(1/α − Σ exp(−s_constant)), and s_ℓ = ∞ takes the rival out.

    Returns:
        s⁰ with ∞ in place of constants, (B, m); the floor of the others, (B,); whether the
        constants leave any room, (B,) bool.
    """
    constant = gram.detach().diagonal(dim1=-2, dim2=-1) <= noise
    some = constant.any(-1)
    # Log of the constants' share of what is allowed. Where there are none, any number will do.
    held = torch.where(constant, start, torch.where(some.unsqueeze(-1), torch.inf, 0.0))
    share = floor - total_log_odds(held)
    room = ~some | ((share < 0) & ~constant.all(-1))
    spent = some & room
    rest = floor - (-torch.expm1(torch.where(spent, share, -1.0))).log()
    return (
        torch.where(constant, torch.inf, start),
        torch.where(spent, rest, floor),
        room,
    )


def newton_step(
    gram: Tensor, start: Tensor, floor: Tensor, multipliers: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """One Newton step on λ = μ p, f = log α, for (λ, μ); differentiable in everything.

    Args:
        gram: M, (B, m, m).
        start: s⁰, (B, m).
        floor: log α, (B,).
        multipliers: λ, (B, m).
        weight: μ, (B,).
    """
    margins = start + matvec(gram, multipliers)
    share = (-margins).softmax(-1)
    residual = multipliers - weight.unsqueeze(-1) * share
    back, along = solve_inner(gram, share, weight, residual, share)
    slope = matvec(gram, share)
    missing = floor - total_log_odds(margins) + (slope * back).sum(-1)
    step = missing / (slope * along).sum(-1)
    return multipliers - back + step.unsqueeze(-1) * along, weight + step


def total_multipliers(
    gram: Tensor,
    start: Tensor,
    floor: Tensor,
    multipliers: Tensor,
    weight: Tensor,
    edited: Tensor,
) -> Tensor:
    """λ, (B, m), differentiable in M, s⁰ and log α to third order; zero where not ``edited``.

    Newton's method doubles the number of correct terms of a power series as it doubles digits: from
    a solution held constant, one differentiable step has the exact first derivative (the implicit
    function theorem), two have the first three.
    """
    one, other = edited.unsqueeze(-1), edited[:, None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = torch.where(other, gram, identity)
    start = torch.where(one, start, 0.0)
    floor = torch.where(edited, floor, total_log_odds(torch.zeros_like(start)))
    multipliers = torch.where(one, multipliers, 0.0)
    weight = torch.where(edited, weight, 0.0)
    for _ in range(2):
        multipliers, weight = newton_step(gram, start, floor, multipliers, weight)
    return torch.where(one, multipliers, 0.0)


def total_residual(gram: Tensor, start: Tensor, floor: Tensor, multipliers: Tensor) -> Tensor:
    """Largest violation of the KKT conditions λ = μ p and f = log α (μ > 0), per example.

    The first is measured in the metric and relative to 1 + the length of the edit, the second to
    1 + the distance of f from log α before the edit. Where λ = 0 only f ≥ log α is asked.
    """
    moved = matvec(gram, multipliers)
    margins = start + moved
    weight = multipliers.sum(-1)
    residual = multipliers - weight.unsqueeze(-1) * (-margins).softmax(-1)
    length = (multipliers * moved).sum(-1).clamp_min(0.0).sqrt()
    unbalanced = (residual * matvec(gram, residual)).sum(-1).clamp_min(0.0).sqrt() / (1 + length)
    missing = floor - total_log_odds(margins)
    missing = torch.where(weight > 0, missing.abs(), missing.clamp_min(0.0))
    return torch.maximum(unbalanced, missing / (1 + (floor - total_log_odds(start)).abs()))


def solve_inner(gram: Tensor, share: Tensor, weight: Tensor, *right: Tensor) -> tuple[Tensor, ...]:
    """(I + μ H M)⁻¹ r for each r, H = diag p − p pᵀ; it has no eigenvalue below 1."""
    curvature = share.unsqueeze(-1) * (gram - matvec(gram, share).unsqueeze(-2))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    system = identity + weight[:, None, None] * curvature
    return tuple(torch.linalg.solve(system, torch.stack(right, -1)).unbind(-1))
