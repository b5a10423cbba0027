"""The least edit for total odds: P[t] / (1 − P[t]) ≥ α, exactly, as one convex constraint.

With s_ℓ = z_t − z_ℓ the margins over the m = K − 1 rivals, the log of the total odds is

    f(s) = z_t − log Σ_{ℓ≠t} exp z_ℓ = −log Σ_ℓ exp(−s_ℓ),

concave, with gradient p = softmax(−s): the rivals' shares among themselves. So the problem

    minimise ½ δᵀ Σ⁻¹ δ   subject to   f(s⁰ + A δ) ≥ log α

is convex, and its KKT conditions (Boyd and Vandenberghe 2004, §5.5.3) are δ = Σ Aᵀ λ with

    λ = μ p(s⁰ + M λ),   f(s⁰ + M λ) = log α,   μ ≥ 0,   M = A Σ Aᵀ:

every rival is held down in proportion to its probability at x'. Only M is needed, m × m.

They are solved by Newton's method. For fixed μ the condition λ = μ p(s⁰ + M λ) is that of the
convex function

    ½ λᵀMλ + μ log Σ exp(−s⁰ − Mλ),

minimised by Newton steps with a line search. There f increases with μ, so that f = log α is a
bracketed Newton iteration in one number; both are taken together once λ has settled. Any p gives by
duality the lower bound

    distance ≥ (log α − pᵀs⁰ + H(p)) / √(pᵀMp),   H the entropy,

and where that has no finite value the target is unreachable.

Of more rivals than the stream has dimensions M is held as A and AΣ (:mod:`~.normals`), and the
search begins at the solution for those few that matter most.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lrqp_torch.errors import concrete, readable
from lrqp_torch.qp.active_set import solve_dual
from lrqp_torch.qp.constraints import Constraints, DenseConstraints
from lrqp_torch.qp.normals import Normals, solve_by_few
from lrqp_torch.qp.reach import LONGER
from lrqp_torch.qp.solution import ROUNDING
from lrqp_torch.qp.solvers import ACTIVE_SET, Found, Solver
from lrqp_torch.qp.table import ActiveSets

# A step of μ beyond this factor is not trusted while no upper end of the bracket is known.
GROWTH = 30.0
# f is met within this share of the terms that it is made of. The two Newton steps of
# :func:`total_multipliers` square that twice.
MET = 1e-9
# λ = μ p is met within this share of 1 + the length of the edit; where classes are nearly equal,
# rounding of s allows no better.
BALANCED = 1e-5
# λ may move on to the next μ when its Newton decrement, a squared length, is below this share of
# 1 + the squared length of the edit.
SETTLED = 1e-6
# p ᵀ M p at or below this share of (Σ p √M_ll)² is a combination of normals that cancels.
CANCELLED = 1e-12
# Where an edit is out of reach, the shares of the least one with so much of M's diagonal beside M
# are those of normals that cancel, to the square of this; so often, at floors by the last shares.
LENT, PROOFS = 1e-10, 3
# A system that rounding makes indefinite is given this share of its diagonal more.
RIDGE = 1e-13
MAX_STEPS = 150
# Where values are not looked at after each step: halvings, steps between two looks, and steps where
# there is no look at all.
BLIND_HALVINGS, BETWEEN_LOOKS, BLIND_STEPS = 16, 8, 40
ALIGNED = 8
# From such a residual on shares are taken from the last λ, so often; and this one is enough.
FAR, SHARE_ROUNDS, MET_BY_SHARES = 1e2, 6, 1e-5
MAX_HALVINGS = 40
# From so many numbers of M on, 2 MB, a derivative forms it anew.
KEPT_NUMBERS = 250_000
# So many rivals are solved for first, so often, where M is held by its normals; the others leave
# them no less than this share of what is allowed.
FEW, FIRST_ROUNDS, LEFT = 128, 2, 0.1

Gram = Tensor | Normals
"""M, (B, m, m), or by its normals."""

Inner = Callable[..., tuple[Tensor, ...]]
"""From M, p, μ and right-hand sides r, (I + μ H M)⁻¹ r of each, see :func:`solve_inner`."""


class TotalOdds(Solver):
    """The nearest activation at which P[t] / (1 − P[t]) ≥ α: the least edit for total odds.

        minimise  (x' − x)ᵀ Σ⁻¹ (x' − x)
        subject to  z_t(x') − log Σ_{ℓ≠t} exp z_ℓ(x') ≥ log α

    Never longer than the pairwise edit at (K − 1) α, which is sufficient for the same odds, and the
    same edit for K = 2. With this solver, ``floor``, ``log_odds_before`` and ``log_odds_after`` of
    the :class:`~.solution.Solution` are logs of *total* odds, and every multiplier of an edited
    example is positive: all rivals are held, each in proportion to its probability. Derivatives in
    x, W, b, Σ and log α are exact to third order.
    """

    name = ACTIVE_SET
    # Random problems end at 1e-12. λ = μ p multiplies the rounding errors of the margins by μ,
    # which is large where a rival is nearly the target's equal: up to 1e-6 for copies one part in a
    # million off.
    tolerance = 1e-5
    one_floor = True

    def read(self, margins: Tensor) -> Tensor:
        """See :meth:`Solver.read`: the log of the total odds, (B, 1)."""
        return total_log_odds(margins).unsqueeze(-1)

    def lengths(self, constraints: Constraints) -> Tensor:
        """See :meth:`Solver.lengths`: total odds change no faster than the fastest margin."""
        return constraints.length.amax(-1, keepdim=True)

    def solve(
        self, constraints: Constraints, margins: Tensor, floor: Tensor, asked: Tensor
    ) -> Found:
        """See :meth:`Solver.solve`."""
        noise, asks = constraints.noise, torch.is_grad_enabled()
        with torch.no_grad():
            gram = constraints.gram
            start, wanted, room = without_constants(gram, margins, floor.squeeze(-1), noise)
            # A floor of −∞ is met by every activation: that example is not asked.
            question = torch.where(asked & room, wanted, -torch.inf)
            found = _solve(gram, start, question, noise)
            feasible = (room | ~asked) & found.feasible
            edited = asked & feasible

        def meet(margins: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
            own = constraints.gram if asks else gram
            start, wanted, _ = without_constants(own, margins, floor.squeeze(-1), noise)
            multipliers = total_multipliers(own, start, wanted, found, edited)
            return multipliers, (multipliers * _times(own, multipliers)).sum(-1)

        if asks and gram.numel() > KEPT_NUMBERS and concrete(start):
            # M and what is made of it are computed again when a derivative is, not kept until then.
            multipliers, squared = checkpoint(
                meet, margins, floor, use_reentrant=False, preserve_rng_state=False
            )
        else:
            multipliers, squared = meet(margins, floor)
        residual = total_residual(gram, start, wanted, multipliers.detach())
        return Found(
            multipliers,
            multipliers.detach() > 0,
            feasible,
            torch.where(edited, residual, 0.0),
            squared,
            again=found.converged | (residual <= self.tolerance),
        )


def steps(constraints: Constraints, margins: Tensor, floor: Tensor, known: Tensor) -> Tensor:
    """λ, (B, m), as known, in two differentiable steps; none is taken where none is positive."""
    start, wanted, _ = without_constants(constraints.gram, margins, floor, constraints.noise)
    weight = known.sum(-1)
    found = TotalSolution(known, weight, weight > 0, weight > 0)
    return total_multipliers(constraints.gram, start, wanted, found, weight > 0)


@dataclass(frozen=True)
class TotalSolution:
    """Result of :func:`solve_total`."""

    multipliers: Tensor  # λ, (B, m), non-negative
    weight: Tensor  # μ = Σ λ, the multiplier of the one constraint, (B,)
    feasible: Tensor  # False where no activation reaches the odds, (B,)
    converged: Tensor  # False where the steps ran out, (B,)


def total_log_odds(margins: Tensor) -> Tensor:
    """Log P[t] / (1 − P[t]) from the margins z_t − z_ℓ over the rivals, (..., m) → (...)."""
    return -(-margins).logsumexp(-1)


def without_constants(
    gram: Gram, start: Tensor, floor: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same problem without the rivals that no activation moves; differentiable.

    Where M_ℓℓ is none, s_ℓ is a constant: Σ exp(−s) ≤ 1/α leaves less for the others, so their
    floor is −log(1/α − Σ exp(−s_constant)), and s_ℓ = ∞ takes the rival out.

    Returns:
        s⁰ with ∞ in place of constants, (B, m); the floor of the others, (B,); whether the
        constants leave any room, (B,) bool.
    """
    constant = _diagonal(gram.detach()) <= noise
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
    gram: Gram,
    start: Tensor,
    floor: Tensor,
    multipliers: Tensor,
    weight: Tensor,
    inner: Inner | None = None,
) -> tuple[Tensor, Tensor]:
    """One Newton step on λ = μ p, f = log α, for (λ, μ); differentiable in everything.

    Args:
        gram: M, (B, m, m).
        start: s⁰, (B, m).
        floor: log α, (B,).
        multipliers: λ, (B, m).
        weight: μ, (B,).
        inner: solves its system; default :func:`solve_inner`.
    """
    margins = start + _times(gram, multipliers)
    share = (-margins).softmax(-1)
    residual = multipliers - weight.unsqueeze(-1) * share
    back, along = (inner or solve_inner)(gram, share, weight, residual, share)
    slope = _times(gram, share)
    missing = floor - total_log_odds(margins) + (slope * back).sum(-1)
    step = missing / (slope * along).sum(-1)
    return multipliers - back + step.unsqueeze(-1) * along, weight + step


def total_multipliers(
    gram: Gram, start: Tensor, floor: Tensor, found: TotalSolution, edited: Tensor
) -> Tensor:
    """λ, (B, m), polished, and differentiable in M, s⁰ and log α to third order.

    Newton's method doubles the number of correct terms of a power series as it doubles digits: from
    a solution held constant, one differentiable step has the exact first derivative (the implicit
    function theorem), two have the first three. λ is zero where not ``edited``, and constant where
    the system of the steps is singular in floating point.
    """
    regular = edited
    for _ in range(2):
        one = regular.unsqueeze(-1)
        own = torch.where(one, start, 0.0)
        asked = torch.where(regular, floor, total_log_odds(torch.zeros_like(own)))
        multipliers = torch.where(one, found.multipliers, 0.0)
        weight = torch.where(regular, found.weight, 0.0)
        for _ in range(2):
            multipliers, weight = newton_step(
                _where(regular, gram), own, asked, multipliers, weight
            )
        finite = torch.isfinite(multipliers.detach().sum(-1))
        if readable(finite) and bool(finite.all()):
            break
        regular = edited & finite
    # The steps polish what was found, unless rounding spoils them; a share that is next to none may
    # have been rounded below it.
    multipliers = multipliers.clamp_min(0.0)
    fixed = gram.detach(), start.detach(), floor.detach()
    before, after = (
        total_residual(*fixed, part) for part in (found.multipliers, multipliers.detach())
    )
    spoilt = ((before < after) | ~regular).unsqueeze(-1)
    multipliers = torch.where(one, multipliers, 0.0)
    change = torch.where(spoilt, found.multipliers - multipliers.detach(), 0.0)
    return torch.where(edited.unsqueeze(-1), multipliers + change, 0.0)


def total_residual(gram: Gram, start: Tensor, floor: Tensor, multipliers: Tensor) -> Tensor:
    """Largest violation of the KKT conditions λ = μ p and f = log α (μ > 0), per example.

    The first is measured in the metric and relative to the length of the edit and of one nat, the
    second to 1 + the distance of f from log α before the edit. Where λ = 0 only f ≥ log α is asked.
    What margins round by is taken off both, and by duality μ KL(λ/μ ‖ p) may be no more than a
    small share of the squared length.
    """
    tiny = torch.finfo(start.dtype).tiny
    moved = _times(gram, multipliers)
    margins = start + moved
    weight, share = multipliers.sum(-1), (-margins).softmax(-1)
    residual = multipliers - weight.unsqueeze(-1) * share
    length = (multipliers * moved).sum(-1).clamp_min(0.0).sqrt()
    nat = (share * _times(gram, share)).sum(-1).clamp_min(tiny).rsqrt()
    unbalanced = (residual * _times(gram, residual)).sum(-1).clamp_min(0.0).sqrt()
    missing = floor - total_log_odds(margins)
    missing = torch.where(weight > 0, missing.abs(), missing.clamp_min(0.0))
    root = _diagonal(gram).clamp_min(0.0).sqrt()
    terms = start.abs() + root * (multipliers * root).sum(-1, keepdim=True)
    rounds = torch.where(share > 0, ROUNDING * share * terms, 0.0)
    unbalanced = unbalanced - weight * (rounds * root).sum(-1)
    missing = (missing - rounds.sum(-1)) / (1 + (floor - total_log_odds(start)).abs())
    own = multipliers.clamp_min(0.0) / weight.clamp_min(tiny).unsqueeze(-1)
    apart = torch.special.xlogy(own, own) - torch.special.xlogy(own, share.clamp_min(tiny))
    apart = weight * apart.sum(-1) / length.square().clamp_min(tiny) - LONGER
    missing = torch.maximum(missing, apart).clamp_min(0.0)
    return torch.maximum(unbalanced / (length + nat), missing)


def solve_inner(gram: Gram, share: Tensor, weight: Tensor, *right: Tensor) -> tuple[Tensor, ...]:
    """(I + μ H M)⁻¹ r for each r, H = diag p − p pᵀ; it has no eigenvalue below 1."""
    if isinstance(gram, Normals):
        return gram.inner(share, weight, *right)
    curvature = share.unsqueeze(-1) * (gram - _times(gram, share).unsqueeze(-2))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    system = identity + weight[:, None, None] * curvature
    # Where rounding makes it singular all the same, the result is not finite.
    solved, _ = torch.linalg.solve_ex(*_aligned(system, torch.stack(right, -1)))
    return tuple(solved[:, : gram.shape[-1]].unbind(-1))


def _times(gram: Gram, vector: Tensor) -> Tensor:
    """The product of each M with its vector, (B, m).

    As sums, which round each example alike in any company; batched products of LAPACK's do not, and
    where a rival is nearly the target's equal that would decide between statuses.
    """
    if isinstance(gram, Normals):
        return gram.times(vector)
    return (gram * vector.unsqueeze(-2)).sum(-1)


def _diagonal(gram: Gram) -> Tensor:
    return gram.diagonal if isinstance(gram, Normals) else gram.diagonal(dim1=-2, dim2=-1)


def _where(mine: Tensor, gram: Gram) -> Gram:
    """M where ``mine``, (B,) bool, and elsewhere one whose systems are regular."""
    if isinstance(gram, Normals):
        return gram.where(mine)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.where(mine[:, None, None], gram, identity)


def _terms(gram: Gram, multipliers: Tensor) -> Tensor:
    """What Mλ is the sum of, without signs, (B, m); by its normals a bound on that."""
    if isinstance(gram, Normals):
        root = gram.diagonal.clamp_min(0.0).sqrt()
        return root * (multipliers.abs() * root).sum(-1, keepdim=True)
    return _times(gram.abs(), multipliers.abs())


def _aligned(system: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same system with rows of 64 bytes, at which LAPACK rounds alike in any company."""
    short = -right.shape[-2] % ALIGNED
    pad = torch.nn.functional.pad
    filled = system.new_zeros(system.shape[-1] + short)
    filled[system.shape[-1] :] = 1.0
    return pad(system, (0, short, 0, short)) + filled.diag(), pad(right, (0, 0, 0, short))


def _solve_symmetric(
    gram: Gram, share: Tensor, weight: Tensor, *right: Tensor
) -> tuple[Tensor, ...]:
    """The same by a Cholesky factor, which is never singular; not differentiable at p = 0.

    With H = S Sᵀ it is r − μ S (I + μ SᵀMS)⁻¹ SᵀM r. In differences D to the rival of the largest
    share, of which the others' v = √p say how far each counts, H = D diag v (I − v vᵀ) diag v Dᵀ,
    and the root of I − v vᵀ is I − c v vᵀ, c = 1 / (1 + √p_max): no digits cancel where p_max → 1.
    """
    if isinstance(gram, Normals):
        return gram.inner(share, weight, *right)
    most = share.argmax(-1, keepdim=True)
    wide = share.sqrt().scatter(-1, most, 0.0).unsqueeze(-1)
    part = 1 / (1 + share.gather(-1, most).sqrt()).unsqueeze(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)

    def inside(columns: Tensor) -> Tensor:
        """(I − c v vᵀ) times columns, (B, m, n)."""
        return columns - wide * ((wide * columns).sum(-2, keepdim=True) * part)

    across = gram.gather(-2, most.unsqueeze(-1).expand(-1, 1, gram.shape[-1]))
    apart = gram - across.mT - (across - across.gather(-1, most.unsqueeze(-1)))
    between = inside(inside(wide * apart * wide.mT).mT)
    system = identity + weight[:, None, None] * ((between + between.mT) / 2)
    factored, failed = torch.linalg.cholesky_ex(system)
    if not readable(failed) or bool((failed > 0).any()):
        # Rounding of large terms outweighs the identity; a longer diagonal makes a shorter step.
        rounding = RIDGE * system.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
        ridge = torch.where(failed > 0, rounding, 0.0)[:, None, None] * identity
        factored, _ = torch.linalg.cholesky_ex(system + ridge)
    rises = torch.stack([_times(gram, one) for one in right], -1)
    place = most.unsqueeze(-1).expand(-1, 1, len(right))
    pulled = inside(wide * (rises - rises.gather(-2, place)))
    factored, pulled = _aligned(factored, pulled)
    inner = inside(torch.cholesky_solve(pulled, factored)[:, : gram.shape[-1]])
    along = weight[:, None, None] * wide * inner
    along = along.scatter(-2, place, -along.sum(-2, keepdim=True))
    return tuple((torch.stack(right, -1) - along).unbind(-1))


def _beyond_reach(gram: Gram, start: Tensor, floor: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Whether the lower bound of the distance at p is infinite: a gap > 0, and pᵀMp none."""
    entropy = -torch.special.xlogy(share, share).sum(-1)
    reading = torch.where(share > 0, share * start, 0.0).sum(-1)
    length = (share * _times(gram, share)).sum(-1)
    scale = _diagonal(gram).clamp_min(0.0).sqrt()
    resolved = CANCELLED * (share * scale).sum(-1).square()
    resolved = torch.maximum(resolved, (share * noise.sqrt()).sum(-1).square())
    result: Tensor = (floor - reading + entropy > 0) & (length <= resolved)
    return result


@dataclass(frozen=True)
class Tables:
    """All active sets of the pairwise problems, so that no step of theirs looks at a value.

    Attributes:
        own, lent: those of M of each target, and of M with what a proof lends it.
        target: of each example, (B,).
        unit: what M was divided by, (B,).
    """

    own: ActiveSets
    lent: ActiveSets
    target: Tensor
    unit: Tensor


def lent_to(gram: Tensor) -> Tensor:
    """M with so much of its diagonal beside it as a proof needs."""
    return gram + LENT * gram.diagonal(dim1=-2, dim2=-1).diag_embed()


def _pairwise(
    gram: Gram, noise: Tensor, gap: Tensor, tables: Tables | None, *, lent: bool = False
) -> tuple[Tensor, Tensor]:
    """λ of pairwise odds, (n, m), and whether these are in reach, (n,) bool."""
    if isinstance(gram, Normals):
        return solve_by_few(gram, noise, gap, LENT if lent else 0.0)
    constraints = DenseConstraints(lent_to(gram) if lent else gram, noise, noise)
    if tables is None:
        found = solve_dual(constraints, gap)
    else:
        found = (tables.lent if lent else tables.own).solve(tables.target, gap)
        assert found.inverse is not None
        found = replace(found, inverse=found.inverse * tables.unit[:, None, None])
    return found.multipliers(constraints, gap), found.feasible


def _cancel(
    gram: Gram, start: Tensor, floor: Tensor, noise: Tensor, *, tables: Tables | None
) -> Tensor:
    """Whether shares are found that prove a target out of reach, (n,) bool."""
    finite, lost = torch.isfinite(start), torch.zeros_like(floor, dtype=torch.bool)
    share = finite / finite.sum(-1, keepdim=True)
    for _ in range(PROOFS):
        gap = torch.where(finite, floor.unsqueeze(-1) - share.clamp_min(1e-300).log() - start, -1.0)
        found, _ = _pairwise(gram, noise, gap, tables, lent=True)
        share = found / found.sum(-1, keepdim=True).clamp_min(torch.finfo(start.dtype).tiny)
        lost = lost | _beyond_reach(gram, start, floor, noise, share)
    return lost


@torch.no_grad()
def solve_total(
    gram: Gram,
    start: Tensor,
    floor: Tensor,
    noise: Tensor,
    tables: tuple[ActiveSets, ActiveSets, Tensor] | None = None,
) -> TotalSolution:
    """Solve a batch of total-odds problems; where f(s⁰) ≥ log α already, λ = 0.

    Args:
        gram: M, symmetric positive semidefinite, float64.
        start: s⁰, the margins before the edit, (B, m).
        floor: log α, (B,).
        noise: rounding error of M's diagonal, (B, m).
        tables: as the first three of :class:`Tables`; then no value is looked at, and the steps are
            so many that most problems are solved.
    """
    # In units in which the longest normal has length 1.
    scale = _diagonal(gram).amax(-1).clamp_min(torch.finfo(start.dtype).tiny)
    unit = gram / scale[:, None, None]
    noise = noise / scale.unsqueeze(-1)
    known = None if tables is None else Tables(*tables, scale)
    search = _Search.begin(unit, start, floor, noise, known)
    if isinstance(unit, Normals):
        search.begin_at_few()
    # Where the search would begin very far off, as one rival is nearly the target's equal.
    parts = search.gram, search.start, search.floor
    far = total_residual(*parts, search.multipliers) > FAR
    if not search.looking:
        return _solved_together(search, far, scale, known)
    result, far = search.result, far.nonzero().squeeze(-1)
    if len(far):
        chosen: list[Any] = [part[far] for part in (*parts, search.noise)]
        found, met = _by_shares(*chosen, tables=None)
        at, done = search.index[far], met <= MET_BY_SHARES
        result.multipliers[at[done]] = found[done]
        result.weight[at[done]] = found[done].sum(-1)
        result.converged[at[done]] = True
        # Else it is a better place to begin at.
        search.multipliers[far], search.weight[far] = found, found.sum(-1)
        search = search.rows((~result.converged[search.index]).nonzero().squeeze(-1))
    for _ in range(MAX_STEPS):
        if not len(search.index):
            break
        search = search.step()
    result.multipliers[search.index] = search.multipliers.clamp_min(0.0)
    result.weight[search.index] = search.weight
    # Two steps polish what was found, by a system that is never singular.
    rows = (result.weight > 0).nonzero().squeeze(-1)
    # By its normals that is the system which polishes once more.
    if len(rows) and not isinstance(unit, Normals):
        own, found = (unit[rows], start[rows], floor[rows]), result.multipliers[rows]
        polished = found, result.weight[rows]
        for _ in range(2):
            polished = newton_step(*own, *polished, _solve_symmetric)
        # Unless rounding spoils them.
        better = total_residual(*own, polished[0]) <= total_residual(*own, found)
        at = rows[better]
        result.multipliers[at], result.weight[at] = (part[better] for part in polished)
    result.multipliers.div_(scale.unsqueeze(-1))
    result.weight.div_(scale)
    return result


def _solve(gram: Gram, start: Tensor, floor: Tensor, noise: Tensor) -> TotalSolution:
    """As :func:`solve_total`; where values are hidden, by :func:`search`."""
    seen = concrete(start) and concrete(floor)
    if seen and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, (start, floor))):
        return solve_total(gram, start, floor, noise)
    pair = (gram.rows, gram.along) if isinstance(gram, Normals) else (gram, None)
    return TotalSolution(*search(*pair, start, floor, noise))


Searched = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("lrqp_torch::total_odds", mutates_args=())
def search(
    gram: Tensor, along: Tensor | None, start: Tensor, floor: Tensor, noise: Tensor
) -> Searched:
    """:func:`solve_total` as an operator, which is not differentiable, so that transforms and
    compiled graphs see one step: of M, or of its normals A and AΣ.
    """
    found = solve_total(gram if along is None else Normals(gram, along), start, floor, noise)
    return found.multipliers, found.weight, found.feasible, found.converged


@search.register_fake
def _(gram: Tensor, along: Tensor | None, start: Tensor, floor: Tensor, noise: Tensor) -> Searched:
    each = torch.empty_like(floor), torch.empty_like(floor, dtype=torch.bool)
    return torch.empty_like(start), *each, torch.empty_like(each[1])


@search.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Searched, tuple[int, ...]]:
    """Under vmap the mapped dimension joins the batch."""
    flat = [
        None
        if tensor is None
        else (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        ).flatten(0, 1)
        for tensor, dim in zip(arguments, in_dims, strict=True)
    ]
    found = [part.unflatten(0, (info.batch_size, -1)) for part in search(*flat)]
    return tuple(found), (0,) * 4


def _solved_together(
    search: "_Search", far: Tensor, scale: Tensor, tables: Tables | None
) -> TotalSolution:
    """The same of all problems together, those that are done left as they are, with a look now and
    then or, where there are tables, none.
    """
    parts = search.gram, search.start, search.floor
    if tables is not None or bool(far.any()):
        found, met = _by_shares(*parts, search.noise, tables=tables)
        search.multipliers = torch.where(far.unsqueeze(-1), found, search.multipliers)
        search.weight = torch.where(far, found.sum(-1), search.weight)
        search.end(far & (met <= MET_BY_SHARES), torch.zeros_like(far))
    for number in range(BLIND_STEPS if tables is not None else MAX_STEPS):
        look = tables is None and number % BETWEEN_LOOKS == 0
        if look and bool(search.result.converged.all()):
            break
        search = search.step()
    result = search.result
    found = torch.where(
        result.converged.unsqueeze(-1), result.multipliers, search.multipliers.clamp_min(0.0)
    )
    weight = torch.where(result.converged, result.weight, search.weight)
    polished = found, weight
    for _ in range(2):
        polished = newton_step(*parts, *polished, _solve_symmetric)
    better = total_residual(*parts, polished[0]) <= total_residual(*parts, found)
    better = better & (weight > 0)
    return TotalSolution(
        torch.where(better.unsqueeze(-1), polished[0], found) / scale.unsqueeze(-1),
        torch.where(better, polished[1], weight) / scale,
        result.feasible,
        result.converged,
    )


def _by_shares(
    gram: Gram, start: Tensor, floor: Tensor, noise: Tensor, *, tables: Tables | None
) -> tuple[Tensor, Tensor]:
    """λ by pairwise edits, (n, m), and its residual, of problems that are far from solved.

    For any shares p of the rivals the floors log α − log p_ℓ suffice, and where λ ∝ p the edit that
    meets them is the least. So shares are those of the last λ, in turn. Where one rival is nearly
    the target's equal it holds all but a billionth of λ, the system of a Newton step is lost to
    rounding, and this is done in two or three rounds; elsewhere it may not end.
    """
    finite = torch.isfinite(start)
    share = finite / finite.sum(-1, keepdim=True)
    best, least = torch.zeros_like(start), torch.full_like(floor, torch.inf)
    for _ in range(SHARE_ROUNDS):
        gap = torch.where(finite, floor.unsqueeze(-1) - share.log() - start, -1.0)
        found, _ = _pairwise(gram, noise, gap, tables)
        met = total_residual(gram, start, floor, found)
        better = met < least
        best, least = (
            torch.where(better.unsqueeze(-1), found, best),
            torch.where(better, met, least),
        )
        loose = (floor.unsqueeze(-1) - start - _times(gram, found)).exp()
        total = found.sum(-1, keepdim=True).clamp_min(torch.finfo(start.dtype).tiny)
        share = torch.where(found > 0, found / total, loose).clamp(1e-300, 1.0)
        share = share / share.sum(-1, keepdim=True)
    return best, least


@dataclass
class _Search:
    """The problems still being solved, and the results of all.

    gram, start, floor, noise: of each.
    multipliers, weight: λ and μ so far.
    low, high: the bracket of μ.
    """

    result: TotalSolution  # where finished problems are put
    index: Tensor  # which they are, (n,)
    gram: Gram
    start: Tensor
    floor: Tensor
    noise: Tensor
    multipliers: Tensor
    weight: Tensor
    low: Tensor
    high: Tensor

    @property
    def looking(self) -> bool:
        """Whether problems leave as soon as they are done."""
        return readable(self.start)

    @classmethod
    def begin(
        cls, gram: Gram, start: Tensor, floor: Tensor, noise: Tensor, tables: Tables | None
    ) -> "_Search":
        """Start at the edit that pairwise odds of (K − 1) α need, which is sufficient."""
        needed = total_log_odds(start) < floor
        least = floor.unsqueeze(-1) - start
        asked = needed.unsqueeze(-1) & torch.isfinite(start)
        gap = torch.where(asked, least + math.log(start.shape[-1]), -1.0)
        multipliers, sufficient = _pairwise(gram, noise, gap, tables)
        # Pairwise odds of α are necessary: where they are out of reach, so are total odds.
        unsure = asked & ~sufficient.unsqueeze(-1)
        _, reachable = _pairwise(gram, noise, torch.where(unsure, least, -1.0), tables)
        doubtful = unsure.any(-1) & reachable
        if tables is not None:
            reachable = reachable & ~(doubtful & _cancel(gram, start, floor, noise, tables=tables))
        elif bool(doubtful.any()):
            rows = doubtful.nonzero().squeeze(-1)
            own: list[Any] = [part[rows] for part in (gram, start, floor, noise)]
            lost = _cancel(*own, tables=None)
            reachable = reachable.index_copy(0, rows, ~lost)
        # Where that is out of reach, the slope of f at μ = 0 says how far to begin.
        share = (-start).softmax(-1)
        slope = (share * _times(gram, share)).sum(-1)
        lowest = torch.finfo(start.dtype).tiny
        guess = (floor - total_log_odds(start)) / slope.clamp_min(lowest)
        weight = torch.where(sufficient, multipliers.sum(-1), guess.clamp(0.0, 1e12))
        result = TotalSolution(
            torch.zeros_like(start),
            torch.zeros_like(floor),
            reachable,
            ~(needed & reachable),
        )
        low, high = torch.zeros_like(floor), torch.full_like(floor, torch.inf)
        parts = (gram, start, floor, noise, multipliers, weight, low, high)
        if not readable(start):
            return cls(result, torch.arange(len(start), device=start.device), *parts)
        index = (needed & reachable).nonzero().squeeze(-1)
        some: list[Any] = [part[index] for part in parts]
        return cls(result, index, *some)

    def begin_at_few(self) -> None:
        """Go on from the solution for those rivals whose shares are largest, the others' held as
        they are.
        """
        gram, start, floor = self.gram, self.start, self.floor
        assert isinstance(gram, Normals)
        few = min(FEW, start.shape[-1])
        for _ in range(FIRST_ROUNDS if len(start) else 0):
            margins = start + gram.times(self.multipliers)
            index = margins.topk(few, largest=False).indices
            others = total_log_odds(margins.scatter(-1, index, torch.inf))
            left = (-torch.expm1(floor - others)).clamp_min(LEFT).log()
            own, rest = start.gather(-1, index), floor - left
            found = solve_total(gram.block(index), own, rest, self.noise.gather(-1, index))
            better = found.feasible & (found.weight > 0)
            spread = torch.zeros_like(start).scatter(-1, index, found.multipliers)
            self.multipliers = torch.where(better.unsqueeze(-1), spread, self.multipliers)
            self.weight = torch.where(better, found.weight, self.weight)

    def end(self, done: Tensor, lost: Tensor) -> None:
        """Put those that are done, or lost, into the result, where all are searched together."""
        ends, old = (done | lost) & ~self.result.converged, self.result
        found = torch.where(lost.unsqueeze(-1), 0.0, self.multipliers.clamp_min(0.0))
        self.result = TotalSolution(
            torch.where(ends.unsqueeze(-1), found, old.multipliers),
            torch.where(ends, torch.where(lost, 0.0, self.weight), old.weight),
            old.feasible & ~(ends & lost),
            old.converged | ends,
        )

    def rows(self, rows: Tensor) -> "_Search":
        """The search for some of its problems."""
        names = [field.name for field in fields(_Search)[1:]]
        return _Search(self.result, *(getattr(self, name)[rows] for name in names))

    def step(self) -> "_Search":
        """One Newton step of each problem: for λ while it is off, else for μ."""
        gram, weight = self.gram, self.weight
        moved = _times(gram, self.multipliers)
        margins = self.start + moved
        share = (-margins).softmax(-1)
        residual = self.multipliers - weight.unsqueeze(-1) * share
        back, along = _solve_symmetric(gram, share, weight, residual, share)
        pulled, slope = _times(gram, back), _times(gram, share)
        decrement = (residual * pulled).sum(-1).clamp_min(0.0)
        distance = (self.multipliers * moved).sum(-1).clamp_min(0.0)

        # Where λ has settled at its μ, f tells on which side of the bracket μ lies. Settled means
        # that what λ still has to go cannot change f by enough to change sides.
        missing = self.floor - total_log_odds(margins)
        terms = self.start.abs() + _terms(gram, self.multipliers)
        size = 1 + self.floor.abs() + torch.where(share > 0, share * terms, 0.0).sum(-1)
        pending = (slope * back).sum(-1).abs()
        settled = decrement <= SETTLED * (1 + distance)
        settled &= pending <= torch.maximum(missing.abs() / 10, 1e-13 * size)
        unbalanced = (residual * _times(gram, residual)).sum(-1).clamp_min(0.0)
        done = settled & (missing.abs() <= MET * size)
        done &= unbalanced <= BALANCED**2 * (1 + distance)
        # Any p is a proof, settled or not.
        lost = ~done & _beyond_reach(gram, self.start, self.floor, self.noise, share)
        low = torch.where(settled & (missing > 0), weight, self.low)
        high = torch.where(settled & (missing <= 0), weight, self.high)
        rate = (slope * along).sum(-1).clamp_min(torch.finfo(weight.dtype).tiny)
        proposed = weight + (missing + (slope * back).sum(-1)) / rate
        bounded = torch.isfinite(high)
        limit = torch.where(bounded, high, GROWTH * weight)
        middle = torch.where(
            bounded, torch.where(low > 0, (low * high).sqrt(), high / GROWTH), limit
        )
        inside = (proposed > low) & (proposed < limit)
        chosen = torch.where(inside, proposed, middle)
        change = torch.where(settled, chosen - weight, 0.0)

        # Elsewhere, a Newton step for λ, halved until the function falls as it should.
        stride = self._line_search(margins, moved, back, pulled, decrement)
        next_multipliers = torch.where(
            settled.unsqueeze(-1),
            self.multipliers - back + change.unsqueeze(-1) * along,
            self.multipliers - stride.unsqueeze(-1) * back,
        )
        if not self.looking:
            self.end(done, lost)
            moving = (next_multipliers, weight + change, low, high)
            constant = (self.index, gram, self.start, self.floor, self.noise)
            return _Search(self.result, *constant, *moving)
        finished = done | lost
        if bool(finished.any()):
            at = self.index[finished]
            found = torch.where(lost.unsqueeze(-1), 0.0, self.multipliers.clamp_min(0.0))
            self.result.multipliers[at] = found[finished]
            self.result.weight[at] = torch.where(lost, 0.0, weight)[finished]
            self.result.feasible[at] = ~lost[finished]
            self.result.converged[at] = True
        keep = (~finished).nonzero().squeeze(-1)
        constant = (self.index, gram, self.start, self.floor, self.noise)
        moving = (next_multipliers, weight + change, low, high)
        kept: list[Any] = [part[keep] for part in (*constant, *moving)]
        return _Search(self.result, *kept)

    def _line_search(
        self, margins: Tensor, moved: Tensor, back: Tensor, pulled: Tensor, decrement: Tensor
    ) -> Tensor:
        """The first of 1, ½, ¼, … at which ½ λᵀMλ + μ log Σ exp(−s) falls by 10⁻⁴ of its slope."""
        linear, square = (moved * back).sum(-1), (back * pulled).sum(-1)
        before = (-margins).logsumexp(-1)

        def falls(stride: Tensor) -> Tensor:
            after = (stride.unsqueeze(-1) * pulled - margins).logsumexp(-1)
            fall = stride * linear - stride.square() * square / 2 - self.weight * (after - before)
            # What rounding of the two terms leaves cannot be asked of a step that is that small.
            rounding = 1e-14 * (1 + (stride * linear).abs() + self.weight * (1 + before.abs()))
            return fall >= 1e-4 * stride * decrement - rounding

        stride = torch.ones_like(decrement)
        if not self.looking:
            halved = 0.5 ** torch.arange(BLIND_HALVINGS, device=stride.device)
            strides = halved.to(stride).unsqueeze(-1) * stride
            some, first = falls(strides).max(0)
            return torch.where(some, halved.to(stride)[first], halved[-1].to(stride))
        for _ in range(MAX_HALVINGS):
            enough = falls(stride)
            if bool(enough.all()):
                break
            stride = torch.where(enough, stride, stride / 2)
        return stride
