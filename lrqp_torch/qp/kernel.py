"""The whole edit as one program an example, in Triton: read, solve, round, read back, write.

Imported by :mod:`~.fused` alone, and only where Triton is. Nothing here looks at a value on the
host, so that an edit can be captured in a CUDA graph.

The dual is solved by the steps of :mod:`~.pivots` on a dense tableau T in registers, which holds
−M_AA⁻¹ in the active block A, M_NA M_AA⁻¹ beside it and the Schur complement elsewhere,
M_NN − M_NA M_AA⁻¹ M_AN: the column of an entering constraint holds the rates at which active
multipliers fall, its curvature, and those at which slacks rise. A constraint that joins or leaves
is a principal pivot. Classes other than the target are the constraints, numbered as classes;
problems are in units, as there. Total odds begin with such solves and go on by the steps of
:mod:`~.total_odds`.
"""

import triton
import triton.language as tl

from lrqp_torch.qp import pivots, reach, total_odds
from lrqp_torch.qp.solution import Status
from lrqp_torch.qp.solvers import ActiveSet

DEPENDENT = tl.constexpr(pivots.DEPENDENT)
SUSPECT = tl.constexpr(pivots.SUSPECT)
SATISFIED = tl.constexpr(pivots.SATISFIED)
NO_DIRECTION = tl.constexpr(pivots.NO_DIRECTION)
PROVEN = tl.constexpr(pivots.PROVEN / pivots.SATISFIED)
EPSILON = tl.constexpr(pivots.EPSILON)
NOISE = tl.constexpr(pivots.NOISE)
MAX_ROUNDS = tl.constexpr(reach.MAX_ROUNDS)
LONGER = tl.constexpr(reach.LONGER)
ROOM = tl.constexpr(reach.ROOM)
TOLERANCE = tl.constexpr(ActiveSet.tolerance)
SOLVED = tl.constexpr(int(Status.SOLVED))
SATISFIED_STATUS = tl.constexpr(int(Status.SATISFIED))
INFEASIBLE = tl.constexpr(int(Status.INFEASIBLE))
INACCURATE = tl.constexpr(int(Status.INACCURATE))
INVALID = tl.constexpr(int(Status.INVALID))
TINY = tl.constexpr(2.2250738585072014e-308)
INFINITY = tl.constexpr(float("inf"))
# How often what was solved is held against M itself, and gone on with.
POLISHES = tl.constexpr(3)
MANY_TIMES, SOME_TIMES = tl.constexpr(reach.MANY_TIMES), tl.constexpr(reach.SOME_TIMES)
FINE = tl.constexpr(reach.FINE)
NEAR = tl.constexpr(reach.NEAR)
# Of total odds.
TOTAL_TOLERANCE = tl.constexpr(total_odds.TotalOdds.tolerance)
GROWTH, MET = tl.constexpr(total_odds.GROWTH), tl.constexpr(total_odds.MET)
BALANCED, SETTLED = tl.constexpr(total_odds.BALANCED), tl.constexpr(total_odds.SETTLED)
CANCELLED, RIDGE = tl.constexpr(total_odds.CANCELLED), tl.constexpr(total_odds.RIDGE)
MAX_STEPS, MAX_HALVINGS = tl.constexpr(total_odds.MAX_STEPS), tl.constexpr(total_odds.MAX_HALVINGS)
FAR, SHARE_ROUNDS = tl.constexpr(total_odds.FAR), tl.constexpr(total_odds.SHARE_ROUNDS)
MET_BY_SHARES = tl.constexpr(total_odds.MET_BY_SHARES)
LENT, PROOFS = tl.constexpr(total_odds.LENT), tl.constexpr(total_odds.PROOFS)


@triton.jit
def trial_kernel(into):
    """What is launched to see whether anything can be."""
    tl.store(into, 1.0)


@triton.jit
def wide(values):
    """Numbers of any dtype in float64; bfloat16 by way of float32, which is exact."""
    if values.dtype != tl.float64:
        values = values.to(tl.float32).to(tl.float64)
    return values


@triton.jit
def narrowed(values, dtype: tl.constexpr):
    """Float64 numbers in a dtype, rounded as torch rounds them: to half precision by float32."""
    if dtype != tl.float64:
        values = values.to(tl.float32)
    if dtype == tl.bfloat16:
        # To the nearest, ties to even, which Triton's interpreter would not do by itself.
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, near.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """What a dtype holds of float64 numbers, in float64."""
    return wide(narrowed(values, dtype))


@triton.jit
def scaled(values, scale: tl.constexpr, narrow_scale: tl.constexpr, dtype: tl.constexpr):
    """Numbers of a dtype times a scale, rounded to it; products are exact in float64 before."""
    if scale != 1:
        if dtype != tl.float64:
            scale = narrow_scale
        values = rounded(values * scale, dtype)
    return values


@triton.jit
def unit_gram(matrix, target, scale, N: tl.constexpr, NP: tl.constexpr, CLASSES: tl.constexpr):
    """M of constraints of unit length, (NP, NP); from distances of classes or M itself, (N, N)."""
    k = tl.arange(0, NP)
    inside = k < N
    both = inside[:, None] & inside[None, :]
    gram = tl.load(matrix + k[:, None] * N + k[None, :], mask=both, other=0.0)
    if CLASSES:
        own = tl.load(matrix + target * N + k, mask=inside, other=0.0)
        gram = (own[:, None] + own[None, :] - gram) * 0.5
    gram = gram * (scale[:, None] * scale[None, :])
    one = tl.where(scale > 0.0, 1.0, 0.0).to(tl.float64)
    return tl.where(k[:, None] == k[None, :], one[:, None], gram)


@triton.jit
def times(matrix, vector):
    """The product of a matrix (NP, NP) with a vector."""
    return tl.sum(matrix * vector[None, :], 1)


@triton.jit
def pivoted(
    tableau,
    values,
    active,
    gap,
    scale,
    error,
    matrix,
    target,
    fresh,
    steps,
    N: tl.constexpr,
    NP: tl.constexpr,
    CLASSES: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    """The steps of :mod:`~.pivots` until nothing is violated.

    Args:
        tableau: T, (NP, NP), symmetric.
        values: multipliers of the active constraints, slacks of the others, (NP,).
        active: 1 or 0.
        gap: in units, −∞ for a constraint that holds whatever is done.
        scale: 1/√M_ii or 0.
        error: scale times the rounding error of M_ii.
        matrix: pointer to M or distances.
        target: its row in the distances.
        fresh: 1 to begin at λ = 0 whatever the other arguments are.
        steps: taken so far.

    Returns:
        tableau, values, active, gap, steps; whether there is a solution, 0 or 1.
    """
    k = tl.arange(0, NP)
    feasible = tl.full([], 1, tl.int32)
    running = tl.full([], 1, tl.int32)
    blocked = tl.full([], 0, tl.int32)
    doubt = tl.full([], 0, tl.int32)
    entering = tl.full([], 0, tl.int32)
    share = tl.full([], 0.0, tl.float64)
    while running == 1:
        if fresh == 1:
            tableau = unit_gram(matrix, target, scale, N, NP, CLASSES)
            values = -gap
            active = tl.zeros([NP], dtype=tl.int32)
            blocked = blocked * 0
            doubt = doubt * 0
            share = share * 0.0
        fresh = fresh * 0
        tolerance = SATISFIED * (1.0 + tl.abs(gap))
        over = tl.where(active == 1, INFINITY, values + tolerance)
        worst = tl.min(over, 0)
        entering = tl.where(blocked == 1, entering, tl.argmin(over, 0))
        steps += 1
        if ((blocked == 0) & (worst >= 0.0)) | (steps > MAX_STEPS):
            running = running * 0
        else:
            here = k == entering
            column = tl.sum(tl.where(here[None, :], tableau, 0.0), 1)
            curvature = tl.sum(tl.where(here, column, 0.0), 0)
            if (curvature < SUSPECT) | (doubt == 1):
                # Rates without the tableau's rounding, and ‖a_q − Σ r_i a_i‖² from M itself, which
                # is exact to the second order in what is still wrong with them.
                gram = unit_gram(matrix, target, scale, N, NP, CLASSES)
                ray = tl.where(here, 1.0, tl.where(active == 1, -column, 0.0))
                wrong = tl.where(active == 1, times(gram, ray), 0.0)
                ray = tl.where(active == 1, ray + times(tableau, wrong), ray)
                along = times(gram, ray)
                exact = tl.sum(ray * along, 0)
                size = tl.abs(ray)
                total = tl.sum(size, 0)
                rounding = EPSILON * total * total
                rounding += NOISE * tl.sum(size * scale, 0) * tl.sum(size * error, 0)
                curvature = tl.where(exact > rounding, exact, 0.0)
                column = tl.where(here, curvature, tl.where(active == 1, -ray, along))
            rates = tl.where(active == 1, column, 0.0)
            behind = tl.sum(tl.where(here, values, 0.0), 0)
            solvable = curvature > DEPENDENT
            t_full = tl.where(solvable, -behind / tl.where(solvable, curvature, 1.0), INFINITY)
            least = NO_DIRECTION * (1.0 + tl.max(tl.abs(rates), 0))
            blocking = rates > least
            ends = tl.where(blocking, values / tl.where(blocking, rates, 1.0), INFINITY)
            t_block = tl.min(ends, 0)
            step = tl.maximum(tl.minimum(t_full, t_block), 0.0)
            if step == INFINITY:
                # No end to the step: a ray of the dual, unless what it gains is rounding. Then the
                # constraint is left to whoever reads back, and the problem begins anew.
                sizes = tl.sum(tl.where(active == 1, tl.abs(rates) * tolerance, 0.0), 0)
                sizes += tl.sum(tl.where(here, tolerance, 0.0), 0)
                proven = -behind > PROVEN * sizes
                feasible = tl.where(proven, 0, feasible)
                running = tl.where(proven, 0, running)
                gap = tl.where(here, -INFINITY, gap)
                fresh = fresh + 1
            else:
                values = tl.where(
                    active == 1, tl.maximum(values - step * column, 0.0), values + step * column
                )
                share += step
                joins = t_full <= t_block
                doubt = tl.where(joins & (curvature < SUSPECT), 1, doubt)
                gone = tl.where(joins, entering, tl.argmin(ends, 0))
                pivot = k == gone
                sign = tl.where(joins, 1.0, -1.0).to(tl.float64)
                if t_full > t_block:
                    column = tl.sum(tl.where(pivot[None, :], tableau, 0.0), 1)
                inverse = 1.0 / tl.sum(tl.where(pivot, column, 0.0), 0)
                beside = column * (inverse * sign)
                tableau = tableau - (column[:, None] * column[None, :]) * inverse
                tableau = tl.where(pivot[None, :], beside[:, None], tableau)
                tableau = tl.where(pivot[:, None], beside[None, :], tableau)
                tableau = tl.where(pivot[:, None] & pivot[None, :], -inverse, tableau)
                active = tl.where(pivot, 1 - active, active)
                values = tl.where(pivot, tl.where(joins, share, 0.0), values)
                blocked = tl.where(joins, 0, 1)
                share = tl.where(joins, 0.0, share)
    # Triton 3.6 cannot compile a loop of which a result is not used: so all are, also where it is
    # known what they say.
    sound = (running == 0) & (blocked == 0) & (share == 0.0) & (entering >= 0) & (fresh >= 0)
    steps = tl.where(sound | (feasible == 0), steps, MAX_STEPS + 1)
    return tableau, values, active, gap, steps, feasible


@triton.jit
def solved(
    tableau,
    active,
    gap,
    scale,
    error,
    matrix,
    target,
    fresh,
    N: tl.constexpr,
    NP: tl.constexpr,
    CLASSES: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    """λ of one problem, from the active set that the tableau stands at unless that is in vain.

    Returns:
        tableau, active; λ and Mλ in units; whether there is a solution, and whether it was found.
    """
    steps = tl.full([], 0, tl.int32)
    again = tl.full([], 0, tl.int32)
    more = tl.full([], 1, tl.int32)
    feasible = tl.full([], 1, tl.int32)
    found = tl.zeros([NP], dtype=tl.float64)
    grown = tl.zeros([NP], dtype=tl.float64)
    aim = gap
    right = tl.where(active == 1, gap, 0.0)
    towards = times(tableau, right)
    values = tl.where(active == 1, -towards, towards - gap)
    fresh = tl.where(tl.min(tl.where(active == 1, values, 0.0), 0) < 0.0, 1, fresh)
    while more == 1:
        tableau, values, active, aim, steps, feasible = pivoted(
            tableau, values, active, aim, scale, error, matrix, target, fresh, steps,
            N, NP, CLASSES, MAX_STEPS,
        )  # fmt: skip
        fresh = fresh * 0
        # One step of refinement by M itself, against which slacks are held once more.
        gram = unit_gram(matrix, target, scale, N, NP, CLASSES)
        found = tl.where(active == 1, values, 0.0)
        wrong = tl.where(active == 1, aim - times(gram, found), 0.0)
        found = tl.where(active == 1, tl.maximum(found - times(tableau, wrong), 0.0), 0.0)
        grown = times(gram, found)
        values = tl.where(active == 1, found, grown - aim)
        tolerance = SATISFIED * (1.0 + tl.abs(aim))
        worst = tl.min(tl.where(active == 1, INFINITY, values + tolerance), 0)
        again += 1
        more = tl.where((worst < 0.0) & (again < POLISHES) & (feasible == 1), 1, 0)
    sound = (more <= 0) & (again > 0) & (fresh == 0) & (tl.min(aim, 0) <= tl.max(aim, 0))
    sound = sound & (tl.min(values, 0) <= tl.max(values, 0))
    converged = tl.where(sound & (steps <= MAX_STEPS), 1, 0)
    return tableau, active, found, grown, feasible, converged


@triton.jit
def rivalry(margins):
    """The log of Σ exp(−s), s ∞ where there is no rival, and the shares in it."""
    least = tl.min(margins, 0)
    parts = tl.exp(tl.where(margins == INFINITY, -INFINITY, least - margins))
    total = tl.sum(parts, 0)
    return tl.where(least < INFINITY, tl.log(total) - least, -least), parts / total


@triton.jit
def no_less(value):
    """A number, or 0 where it is less; NaN stays."""
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def gram_of(matrix, unit, N: tl.constexpr, NP: tl.constexpr):
    """M, (NP, NP), in such units."""
    k = tl.arange(0, NP)
    both = (k < N)[:, None] & (k < N)[None, :]
    return tl.load(matrix + k[:, None] * N + k[None, :], mask=both, other=0.0) / unit


@triton.jit
def residual_at(gram, multipliers, moved, share, missing, before, start, own):
    """As :func:`~.total_odds.total_residual`, from Mλ, shares and log α − f there and at first."""
    weight = tl.sum(multipliers, 0)
    residual = multipliers - weight * share
    square = no_less(tl.sum(multipliers * moved, 0))
    spread = tl.maximum(tl.sum(share * times(gram, share), 0), TINY)
    unbalanced = tl.sqrt(no_less(tl.sum(residual * times(gram, residual), 0)))
    missing = tl.where(weight > 0.0, tl.abs(missing), no_less(missing))
    root = tl.sqrt(no_less(own))
    terms = tl.abs(start) + root * tl.sum(multipliers * root, 0)
    rounds = tl.where(share > 0.0, EPSILON * share * terms, 0.0)
    unbalanced = unbalanced - weight * tl.sum(rounds * root, 0)
    unbalanced = unbalanced / (tl.sqrt(square) + 1.0 / tl.sqrt(spread))
    missing = (missing - tl.sum(rounds, 0)) / (1.0 + tl.abs(before))
    part = multipliers / tl.maximum(weight, TINY)
    logs = tl.log(tl.where(part > 0.0, part, 1.0)) - tl.log(tl.maximum(share, TINY))
    apart = weight * tl.sum(tl.where(part > 0.0, part * logs, 0.0), 0)
    missing = tl.maximum(missing, apart / tl.maximum(square, TINY) - LONGER)
    missing = no_less(missing)
    return tl.where((unbalanced > missing) | (unbalanced != unbalanced), unbalanced, missing)


@triton.jit
def cancels(gram, share, own, noise):
    """Whether normals cancel at shares p, pᵀMp none; see :func:`~.total_odds._beyond_reach`."""
    lengths = tl.sum(share * tl.sqrt(no_less(own)), 0)
    noises = tl.sum(share * tl.sqrt(noise), 0)
    resolved = tl.maximum(CANCELLED * lengths * lengths, noises * noises)
    return tl.sum(share * times(gram, share), 0) <= resolved


@triton.jit
def newton_directions(gram, share, weight, left, right, steps, NP: tl.constexpr):
    """(I + μ H M)⁻¹ times two vectors, as :func:`~.total_odds._solve_symmetric`, in N steps.

    Returns:
        both, and whether rounding allowed it, 0 or 1.
    """
    k = tl.arange(0, NP)
    most = k == tl.argmax(share, 0)
    top = tl.sum(tl.where(most, share, 0.0), 0)
    root = tl.where(most, 0.0, tl.sqrt(share))
    part = 1.0 / (1.0 + tl.sqrt(top))
    across = tl.sum(tl.where(most[:, None], gram, 0.0), 0)
    own = tl.sum(tl.where(most, across, 0.0), 0)
    apart = (gram - across[:, None]) - (across[None, :] - own)
    apart = 0.5 * (apart + ((gram - across[None, :]) - (across[:, None] - own)))
    system = (root[:, None] * apart) * root[None, :]
    along = times(system, root)
    twice = part * along - (0.5 * part * part * tl.sum(root * along, 0)) * root
    system = system - (twice[:, None] * root[None, :] + root[:, None] * twice[None, :])
    same = k[:, None] == k[None, :]
    system = weight * system + tl.where(same, 1.0, 0.0)
    largest = tl.max(tl.where(same, tl.abs(system), 0.0), 1)
    first, second = times(gram, left), times(gram, right)
    first = root * (first - tl.sum(tl.where(most, first, 0.0), 0))
    second = root * (second - tl.sum(tl.where(most, second, 0.0), 0))
    first -= root * (tl.sum(root * first, 0) * part)
    second -= root * (tl.sum(root * second, 0) * part)
    one, other, pivots = first, second, share
    ridge = tl.full([], 0.0, tl.float64)
    tries = tl.full([], 0, tl.int32)
    sound = tl.full([], 0, tl.int32)
    while (sound == 0) & (tries < 2):
        # By Gauss and Jordan: a symmetric system with no eigenvalue below 1 needs no order.
        rest = system + tl.where(same, ridge, 0.0)
        one, other = first, second
        pivot = tl.full([], 0, tl.int32)
        while pivot < steps:
            here = k == pivot
            column = tl.sum(tl.where(here[None, :], rest, 0.0), 1)
            rates = column / tl.sum(tl.where(here, column, 0.0), 0)
            rates = tl.where(here, 0.0, rates)
            rest = rest - rates[:, None] * tl.where(k > pivot, column, 0.0)[None, :]
            one = one - rates * tl.sum(tl.where(here, one, 0.0), 0)
            other = other - rates * tl.sum(tl.where(here, other, 0.0), 0)
            pivot += 1
        pivots = tl.sum(tl.where(same, rest, 0.0), 1)
        sound = tl.where(pivot >= steps, tl.min(tl.where(pivots > 0.0, 1, 0), 0), 0)
        # Rounding of large terms outweighs the identity; a longer diagonal makes a shorter step.
        ridge = RIDGE * tl.max(largest, 0)
        tries += 1
    sound = tl.where((tries > 0) & (ridge == ridge), sound, 0)
    one, other = one / pivots, other / pivots
    one = weight * root * (one - root * (tl.sum(root * one, 0) * part))
    other = weight * root * (other - root * (tl.sum(root * other, 0) * part))
    back = (left - one) + tl.where(most, tl.sum(one, 0), 0.0)
    forth = (right - other) + tl.where(most, tl.sum(other, 0), 0.0)
    return back, forth, sound


@triton.jit
def totalled(
    margin,
    rival,
    floor,
    diagonal,
    noise,
    scale,
    error,
    matrix,
    target,
    N: tl.constexpr,
    NP: tl.constexpr,
    MAX_PIVOTS: tl.constexpr,
):
    """λ of one problem of total odds, by the steps of :mod:`~.total_odds`.

    Args:
        margin: s⁰, (NP,).
        rival: which of the classes are any.
        floor: log α.
        diagonal, noise: M_ii and its rounding error.
        scale, error, matrix, target: see :func:`pivoted`; the matrix is M itself.

    Returns:
        λ and Mλ; the residual; whether there is a solution, and whether it was found.
    """
    # Rivals that nothing moves leave less for the others, whose floor rises.
    moving = rival & (scale > 0.0)
    still = rival & (scale == 0.0)
    some = tl.max(tl.where(still, 1, 0), 0) == 1
    spent = floor + rivalry(tl.where(still, margin, INFINITY))[0]
    room = (spent < 0.0) & (tl.max(tl.where(moving, 1, 0), 0) == 1)
    feasible = tl.where(some & (room == 0), 0, 1)
    spent = tl.where(some & room, spent, -1.0)
    power = tl.exp(spent)
    # 1 − exp where it is small.
    left = tl.where(power == 1.0, -spent, (1.0 - power) * spent / tl.log(power))
    floor = tl.where(some, floor - tl.log(left), floor)
    start = tl.where(moving, margin, INFINITY)
    unit = tl.maximum(tl.max(diagonal, 0), TINY)
    gram = gram_of(matrix, unit, N, NP)
    own, noise = diagonal / unit, noise / unit
    first_most, first_share = rivalry(start)
    away = floor + first_most

    # Begin at the edit that pairwise odds of (K − 1) α need, which is sufficient: phase 0. Where
    # those of α are out of reach (1), so are total odds; shares of normals that cancel prove it too
    # (from −1 down). Far off (from 2 up) shares are those of the last λ, in turn.
    count = tl.sum(tl.where(moving, 1.0, 0.0), 0)
    logs = tl.full([NP], 0.0, tl.float64) - tl.log(tl.sum(tl.where(rival, 1.0, 0.0), 0))
    weight = tl.full([], 0.0, tl.float64)
    found = tl.zeros([NP], dtype=tl.float64)
    best = tl.zeros([NP], dtype=tl.float64)
    least = tl.full([], INFINITY, tl.float64)
    whole = tl.full([], 0.0, tl.float64)
    phase = tl.full([], 0, tl.int32)
    seeking = tl.where(feasible == 1, 1, 0)
    while seeking == 1:
        # A proof lends M some of its diagonal.
        thin = tl.where(phase < 0, 1.0 / tl.sqrt(tl.full([], 1.0 + LENT, tl.float64)), 1.0)
        gap = tl.where(moving, (floor - logs - start) * (scale * thin), -INFINITY)
        largest = tl.max(gap, 0)
        largest = tl.where(largest > 0.0, largest, 1.0)
        tableau = tl.zeros([NP, NP], dtype=tl.float64)
        active = tl.zeros([NP], dtype=tl.int32)
        fresh = tl.full([], 1, tl.int32)
        tableau, active, pushed, pulled, possible, ran = solved(
            tableau, active, gap / largest, scale * thin, error * thin, matrix, target, fresh,
            N, NP, False, MAX_PIVOTS,
        )  # fmt: skip
        # Triton wants all of these used; where one is no number neither is what is found.
        whole += tl.sum(tl.sum(tableau, 1), 0) + tl.sum(pulled, 0)
        whole += tl.sum(active, 0).to(tl.float64) + ran.to(tl.float64)
        pushed = pushed * (scale * thin) * (largest * unit)
        moved = times(gram, pushed)
        most, share = rivalry(start + moved)
        met = residual_at(gram, pushed, moved, share, floor + most, away, start, own)
        sum_of = tl.sum(pushed, 0)
        begun, missed = (phase == 0) & (possible == 1), (phase == 0) & (possible == 0)
        far, proving = begun & (met > FAR), phase < 0
        found = tl.where(begun, pushed, found)
        weight = tl.where(begun, sum_of, weight)
        better = (met < least) & (phase > 1)
        best = tl.where(better, pushed, best)
        least = tl.where(better, met, least)
        part = pushed / tl.maximum(sum_of, TINY)
        held = tl.where(pushed > 0.0, part, share * tl.exp(tl.minimum(floor + most, 700.0)))
        held = tl.minimum(tl.maximum(tl.where(proving, part, held), 1e-300), 1.0)
        logs = tl.log(tl.where(proving, held, held / tl.sum(held, 0)))
        behind = tl.where(part > 0.0, part * (start + logs), 0.0)
        lost = (floor - tl.sum(behind, 0) > 0.0) & cancels(gram, part, own, noise) & proving
        lost = lost | ((phase == 1) & (possible == 0))
        feasible = tl.where(lost, 0, feasible)
        logs = tl.where(far | (phase == 1), -tl.log(count), tl.where(missed, 0.0, logs))
        seeking = tl.where(phase == 0, far | missed, (phase > -PROOFS) & (phase < 1 + SHARE_ROUNDS))
        seeking = tl.where(lost, 0, seeking.to(tl.int32))
        next_of = tl.where(far, 2, tl.where(missed, 1, tl.where(phase == 1, -1, phase)))
        phase = tl.where((phase == 0) | (phase == 1), next_of, phase + tl.where(proving, -1, 1))
    by_shares = phase > 1
    found = tl.where(by_shares, best, found)
    weight = tl.where(by_shares, tl.sum(best, 0), weight)
    converged = tl.where(by_shares & (least <= MET_BY_SHARES), 1, 0)
    # Where the sufficient edit is out of reach, the slope of f at μ = 0 says how far to begin.
    slope_of = tl.maximum(tl.sum(first_share * times(gram, first_share), 0), TINY)
    weight = tl.where(phase < 0, tl.minimum(no_less(away / slope_of), 1e12), weight)

    # Newton's steps for λ while it is off, else for μ in a bracket; then two for both.
    low = tl.full([], 0.0, tl.float64)
    high = tl.full([], INFINITY, tl.float64)
    number = tl.full([], 0, tl.int32)
    stage = converged
    found = tl.where(stage == 1, no_less(found), found)
    first, kept = found, tl.full([], INFINITY, tl.float64)
    polished, grown = kept, found
    running = feasible
    while running == 1:
        grown = times(gram, found)
        margins = start + grown
        most, share = rivalry(margins)
        missing = floor + most
        polished = residual_at(gram, found, grown, share, missing, away, start, own)
        kept = tl.where(stage == 1, polished, kept)
        residual = found - weight * share
        steps = tl.where(stage < 3, N, 0)
        back, forth, sound = newton_directions(gram, share, weight, residual, share, steps, NP)
        slope, pulled = times(gram, share), times(gram, back)
        decrement = no_less(tl.sum(residual * pulled, 0))
        distance = no_less(tl.sum(found * grown, 0))
        terms = tl.abs(start) + times(tl.abs(gram), tl.abs(found))
        size = 1.0 + tl.abs(floor) + tl.sum(tl.where(share > 0.0, share * terms, 0.0), 0)
        pending, rate = tl.sum(slope * back, 0), tl.sum(slope * forth, 0)
        settled = decrement <= SETTLED * (1.0 + distance)
        settled = settled & (tl.abs(pending) <= tl.maximum(tl.abs(missing) * 0.1, 1e-13 * size))
        unbalanced = no_less(tl.sum(residual * times(gram, residual), 0))
        searching = stage == 0
        met = settled & (tl.abs(missing) <= MET * size) & searching & (sound == 1)
        met = met & (unbalanced <= BALANCED * BALANCED * (1.0 + distance))
        # Whether the lower bound of the distance at these shares, which any p gives, is infinite.
        # H(p) − pᵀs⁰ = pᵀMλ + log Σ exp(−s), as p = exp(−s) / Σ exp(−s).
        gap = missing + tl.sum(share * grown, 0)
        lost = (gap > 0.0) & cancels(gram, share, own, noise)
        lost = lost & searching & (met == 0) & (sound == 1)
        ends = met | lost | (sound == 0)

        low = tl.where(searching & settled & (missing > 0.0), weight, low)
        high = tl.where(searching & settled & (missing <= 0.0), weight, high)
        bounded = high < INFINITY
        proposed = weight + (missing + pending) / tl.maximum(rate, TINY)
        limit = tl.where(bounded, high, GROWTH * weight)
        middle = tl.where(low > 0.0, tl.sqrt(low * tl.where(bounded, high, 1.0)), high / GROWTH)
        middle = tl.where(bounded, middle, limit)
        proposed = tl.where((proposed > low) & (proposed < limit), proposed, middle)
        change = tl.where(settled, proposed - weight, 0.0)
        change = tl.where(searching, change, (missing + pending) / rate)
        # A step for λ is halved until the function falls as it should.
        stride = tl.full([], 1.0, tl.float64)
        halvings = tl.where(searching & (settled == 0) & (ends == 0), 0, MAX_HALVINGS)
        linear, square = tl.sum(grown * back, 0), tl.sum(back * pulled, 0)
        while halvings < MAX_HALVINGS:
            rise = rivalry(margins - stride * pulled)[0] - most
            fall = stride * linear - stride * stride * square * 0.5 - weight * rise
            slack = 1e-14 * (1.0 + tl.abs(stride * linear) + weight * (1.0 + tl.abs(most)))
            enough = fall >= 1e-4 * stride * decrement - slack
            stride = tl.where(enough, stride, stride * 0.5)
            halvings = tl.where(enough, MAX_HALVINGS, halvings + 1)
        stride = tl.where(halvings >= MAX_HALVINGS, stride, 0.0)
        ends = ends | (stage == 3)
        found = tl.where(ends, found, found + (change * forth - stride * back))
        weight = tl.where(ends, weight, weight + change)
        number += 1
        converged = tl.where(met, 1, converged)
        feasible = tl.where(lost, 0, feasible)
        last = searching & (ends | (number >= MAX_STEPS))
        found = tl.where(last, no_less(found), found)
        first = tl.where(last, found, first)
        # Two steps for both, and a look at where they end.
        running = tl.where(lost | (ends & (searching == 0)), 0, 1)
        stage = tl.where(last | (searching == 0), stage + 1, stage)
    # The steps polish what was found, unless rounding spoils them.
    found = tl.where(polished <= kept, found, first) / unit
    moved = tl.where(polished <= kept, grown, times(gram, first))
    residual = tl.where(polished <= kept, polished, kept)
    residual = tl.where(feasible == 1, residual, 0.0)
    # Triton wants all that a loop ends with used.
    used = (whole == whole) & (low == low) & (high == high) & (weight == weight)
    used = used & (number >= 0) & (stage >= 0) & (tl.min(logs, 0) <= 0.0) & (seeking == 0)
    converged = tl.where((used | (running == 0)) & (residual <= TOTAL_TOLERANCE), 1, converged)
    return found, moved, residual, feasible, converged


@triton.jit
def dual_kernel(
    matrix,
    scale,
    error,
    gap,
    held,
    inverse,
    verdict,
    N: tl.constexpr,
    NP: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    """The active set of one problem in units; see :func:`~.fused.active_sets`."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, NP)
    inside = k < N
    at = i * N + k
    scales = tl.load(scale + at, mask=inside, other=0.0)
    errors = tl.load(error + at, mask=inside, other=0.0)
    gaps = tl.load(gap + at, mask=inside, other=float("-inf"))
    tableau = tl.zeros([NP, NP], dtype=tl.float64)
    active = tl.zeros([NP], dtype=tl.int32)
    fresh = tl.full([], 1, tl.int32)
    none = tl.full([], 0, tl.int64)
    mine = matrix + i * (N * N)
    tableau, active, found, grown, feasible, converged = solved(
        tableau, active, gaps, scales, errors, mine, none, fresh, N, NP, False, MAX_STEPS
    )
    active = tl.where(feasible == 1, active, 0)
    # λ and Mλ are worked out once more where they are differentiated, and here to be used.
    sound = tl.sum(found, 0) + tl.sum(grown, 0)
    converged = tl.where((sound - sound) == 0.0, converged, 0)
    tl.store(held + at, active.to(tl.int8), mask=inside)
    block = tl.where((active == 1)[:, None], tl.where((active == 1)[None, :], -tableau, 0.0), 0.0)
    places = i * (N * N) + k[:, None] * N + k[None, :]
    tl.store(inverse + places, block, mask=inside[:, None] & inside[None, :])
    tl.store(verdict + 2 * i, feasible.to(tl.int8))
    tl.store(verdict + 2 * i + 1, converged.to(tl.int8))


@triton.jit(
    # A launch is prepared once for all of these.
    do_not_specialize=[
        "class_step", "source_step", "row_step", "number_step", "first", "forward_pass",
    ],
    do_not_specialize_on_alignment=[
        "rows", "columns", "which", "shown", "index", "target", "source", "floors", "slots",
        "numbers", "matrices", "asked", "multipliers", "active_out", "aims", "inverse_out",
        "certificate", "statuses",
    ],
)  # fmt: skip
def edit_kernel(
    stream,
    base,
    out,
    rows,
    columns,
    which,
    shown,
    index,
    target,
    source,
    floors,
    slots,
    numbers,
    matrices,
    asked,
    weight,
    bias,
    live,
    live_bias,
    known,
    known_bias,
    steering,
    low,
    distances,
    noise,
    length,
    rules,
    variables,
    multipliers,
    active_out,
    aims,
    inverse_out,
    certificate,
    statuses,
    stream_row,
    stream_column,
    base_row,
    base_column,
    out_row,
    out_column,
    class_step,
    source_step,
    row_step,
    number_step,
    first,
    forward_pass,
    K: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    V: tl.constexpr,
    TWO: tl.constexpr,
    GRAMS: tl.constexpr,
    TOTAL: tl.constexpr,
    ASKED: tl.constexpr,
    LOW: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    EPS: tl.constexpr,
    NUDGE: tl.constexpr,
    ADVANCE: tl.constexpr,
    BASE: tl.constexpr,
    SCALE: tl.constexpr,
    NARROW_SCALE: tl.constexpr,
    AT: tl.constexpr,
    WHICH: tl.constexpr,
    RULE: tl.constexpr,
    SOURCE: tl.constexpr,
    LIVE: tl.constexpr,
    NARROW: tl.constexpr,
    SKIP: tl.constexpr,
    COPY: tl.constexpr,
    SHOWN: tl.constexpr,
    SOLUTION: tl.constexpr,
    REPEATS: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One example of the fused edit; see :func:`~.fused.edit` for what the arguments are.

    TWO classes have one row to read by and one to move along, w_0 − w_1, and a dual in closed form.
    Where NARROW the probe's own weights are read by, of which ``weight`` is the same in float64.
    Of a probe the constraints are its classes but the target: M from distances, or where GRAMS
    M of each target with an empty row for it. TOTAL odds are one constraint, of which the reading
    stands for every rival's. Of V variables they are N slots with
    a pair of classes each, prepared by :class:`~.stacked.Prepared`, and what is kept is eliminated
    from their M. Where LOW, edits move along differences of ``steering``, and of what it lacks.
    """
    i = tl.program_id(0).to(tl.int64)
    own, mine, put = stream + i * stream_row, base, out + i * out_row
    if BASE:
        mine = base + i * base_row
    if AT:
        row, column = tl.load(rows + i), tl.load(columns + i)
        own = stream + row * stream_row + column * stream_column
        put = out + row * out_row + column * out_column
        if BASE:
            mine = base + row * base_row + column * base_column
    chosen = i
    if WHICH:
        chosen = tl.load(which + i)
    t = chosen * 0
    if V == 0:
        t = tl.load(target + chosen * class_step)
    invalid = (t < 0) | (t >= K)
    t = tl.minimum(tl.maximum(t, 0), K - 1)
    v = t
    if SOURCE:
        v = tl.load(source + chosen * source_step)
        invalid = invalid | (v < 0) | (v >= K)
        v = tl.minimum(tl.maximum(v, 0), K - 1)

    R: tl.constexpr = 1 if TWO else K
    TIMES: tl.constexpr = MANY_TIMES if EPS < FINE else SOME_TIMES
    ACCURATE: tl.constexpr = TOTAL_TOLERANCE if TOTAL else TOLERANCE
    k = tl.arange(0, KP)
    inside = k < R
    d = tl.arange(0, BD)
    # 1. Read the activation.
    read = tl.zeros([KP, BD], dtype=tl.float64)
    square = tl.zeros([BD], dtype=tl.float64)
    other = tl.zeros([BD], dtype=tl.int32)
    for start in tl.range(0, D, BD, num_stages=STAGES):
        at = start + d
        here = at < D
        x = wide(tl.load(own + at, mask=here, other=0.0))
        if AT & BASE:
            x = scaled(x, SCALE, NARROW_SCALE, stream.dtype.element_ty)
            x = rounded(wide(tl.load(mine + at, mask=here, other=0.0)) + x, DTYPE)
        both = inside[:, None] & here[None, :]
        if not NARROW:
            w = tl.load(weight + k[:, None] * D + at[None, :], mask=both, other=0.0)
        if LIVE:
            # Two classes have two weights and one row to read by.
            for part in tl.static_range(2 if TWO else 1):
                places = part * D + k[:, None] * D + at[None, :]
                now = tl.load(live + places, mask=both, other=0.0)
                then = tl.load(known + places, mask=both, other=0.0)
                other += tl.sum(tl.where(now == then, 0, 1), 0)
                if NARROW:
                    w = wide(now)
        read = tl.fma(w, tl.broadcast_to(x[None, :], (KP, BD)), read)
        square = tl.fma(x, x, square)
    offset = tl.load(bias + k, mask=inside, other=0.0)
    z = tl.sum(read, 1) + offset
    size = tl.sqrt(tl.sum(square, 0))
    if LIVE:
        classes = tl.arange(0, 2 if TWO else KP)
        now = tl.load(live_bias + classes, mask=classes < K, other=0.0)
        then = tl.load(known_bias + classes, mask=classes < K, other=0.0)
        stale = tl.sum(other, 0) + tl.sum(tl.where(now == then, 0, 1), 0)
        invalid = invalid | (stale > 0)

    # 2. Margins and the floor by the odds rule.
    j = tl.arange(0, NP)
    matrix = distances
    sign = tl.full([], 1.0, tl.float64)
    if V > 0:
        chosen = chosen * class_step
        spread = tl.sum(square, 0)
        filled = j < N
        told = slots + chosen * (3 * N) + j
        plus = tl.load(told, mask=filled, other=0)
        minus = tl.load(told + N, mask=filled, other=0)
        kind = tl.load(told + 2 * N, mask=filled, other=0)
        variable = tl.load(variables + j, mask=filled, other=-1)
        invalid = invalid | (tl.min(kind, 0) < 0) | ((spread - spread) != 0.0)
        rival = (kind == 1) | (kind == 2)
        pick = tl.where(k[None, :] == plus[:, None], 1.0, 0.0)
        pick -= tl.where(k[None, :] == minus[:, None], 1.0, 0.0)
        pick = tl.where((kind > 0)[:, None], pick, 0.0).to(tl.float64)
        margin = tl.where(rival, times(pick, z), 0.0)
        matrix = matrices + chosen * (2 * N * N)
        diagonal = tl.load(matrix + j * (N + 1), mask=rival, other=0.0)
        rounding = tl.load(numbers + chosen * (2 * N) + j, mask=rival, other=0.0)
        reach_of = tl.load(numbers + chosen * (2 * N) + N + j, mask=rival, other=0.0)
        slot = j
    elif TWO:
        rival = inside
        sign = tl.where(t == 0, 1.0, -1.0).to(tl.float64)
        margin = z * sign
        diagonal = tl.load(distances + 1 + k, mask=rival, other=0.0)
        rounding = tl.load(noise + 1 + k, mask=rival, other=0.0)
        reach_of = tl.load(length + 1 + k, mask=rival, other=0.0)
        slot = k
    else:
        rival = inside & (k != t)
        margin = tl.where(rival, tl.sum(tl.where(k == t, z, 0.0), 0) - z, 0.0)
        if GRAMS:
            matrix = distances + t * (K * K)
            diagonal = tl.load(matrix + k * (K + 1), mask=rival, other=0.0)
        else:
            diagonal = tl.load(distances + t * K + k, mask=rival, other=0.0)
        rounding = tl.load(noise + t * K + k, mask=rival, other=0.0)
        reach_of = tl.load(length + t * K + k, mask=rival, other=0.0)
        slot = k - (k > t).to(tl.int32)
    before = tl.min(tl.where(rival, margin, INFINITY), 0)
    bound = tl.zeros([NP], dtype=tl.float64)
    if V > 0:
        # What holds always, where nothing is asked.
        bound -= 1.0
        for one in tl.static_range(V):
            mine_is = (variable == one) & (kind == 1)
            held_class = tl.load(source + chosen * V + one)
            begins = tl.load(variables + N + one)
            belief = tl.maximum(-tl.min(tl.where(mine_is, margin, INFINITY), 0), 0.0)
            named = mine_is & (minus == begins + held_class)
            given = -tl.sum(tl.where(named, margin, 0.0), 0)
            belief = tl.where(held_class >= 0, given, belief)
            floor = tl.load(floors + one)
            mirrors = tl.load(rules + 3 * one) > 0.0
            floor = tl.where(mirrors, tl.maximum(belief, floor), floor)
            floor += tl.load(rules + 3 * one + 1)
            if ASKED:
                wish = tl.load(asked + i * V + one)
                floor = tl.where(wish == wish, wish, floor)
            bound = tl.where(mine_is, floor, bound)
            within = tl.load(rules + 3 * one + 2)
            bound = tl.where((variable == one) & (kind == 2), margin - within, bound)
    elif RULE == "each":
        bound = tl.load(floors + i * (K - 1) + slot, mask=rival, other=0.0)
    elif RULE == "given":
        bound += tl.load(floors + i)
    else:
        floor = tl.load(floors)
        if RULE == "mirror":
            if SOURCE:
                if TWO:
                    belief = tl.where(v == t, 0.0, -tl.sum(margin, 0))
                else:
                    belief = -tl.sum(tl.where(k == v, margin, 0.0), 0)
            else:
                belief = tl.maximum(-before, 0.0)
            floor = tl.maximum(belief, floor)
        bound += floor
    reading, lengths = margin, reach_of
    if TOTAL:
        # One reading, that of every rival.
        reading = tl.where(rival, -rivalry(tl.where(rival, margin, INFINITY))[0], 0.0)
        before = tl.min(tl.where(rival, reading, INFINITY), 0)
        reach_of = tl.where(rival, tl.max(reach_of, 0), 0.0)
    missing = tl.where(rival, bound - reading, 0.0)
    total = tl.sum(missing, 0)
    finite = (total - total) == 0.0
    total = tl.sum(reading, 0)
    before = tl.where((total - total) == 0.0, before, total)
    needed = finite & (tl.max(tl.where(rival, missing, -INFINITY), 0) > 0.0)
    invalid = invalid | (finite == 0)
    if SHOWN:
        hidden = tl.load(shown + i) == 0
        needed = needed & (hidden == 0)
        invalid = invalid & (hidden == 0)

    # 3. Solve, round, read back; raise floors that rounding missed; again.
    room = reach_of * size
    raised = ADVANCE * (room + tl.maximum(missing, 0.0))
    long = rival & (diagonal > rounding)
    scale = tl.where(long, 1.0 / tl.sqrt(tl.maximum(diagonal, TINY)), 0.0)
    error = scale * rounding
    tableau = tl.zeros([NP, NP], dtype=tl.float64)
    active = tl.zeros([NP], dtype=tl.int32)
    lam = tl.zeros([NP], dtype=tl.float64)
    moved = tl.full([], 0.0, tl.float64)
    if V > 0:
        seen_last = margin
        logits_last = z
    after = before
    feasible = tl.full([], 1, tl.int32)
    # How far above the floors is known to be in reach, and how often an aim was not.
    safe = tl.zeros([NP], dtype=tl.float64)
    failed = tl.full([], 0, tl.int32)
    residual = tl.full([], 0.0, tl.float64)
    distance = tl.full([], 0.0, tl.float64)
    reached = tl.full([], 0, tl.int32)
    changed = tl.full([], 0, tl.int32)
    written = tl.full([], 0, tl.int32)
    number = tl.full([], 0, tl.int32)
    go = tl.where(needed & (invalid == 0), 1, 0)
    fresh = tl.full([], 1, tl.int32)
    while go == 1:
        gap = bound + raised - margin
        if TWO:
            feasible = tl.where(tl.sum(tl.where(long, 1, 0), 0) > 0, 1, 0)
            length_of = tl.where(long, diagonal, 1.0)
            lam = tl.where(long, gap / length_of, 0.0)
            active = tl.where(long, 1, 0)
            grown = lam * diagonal
            residual = tl.sum(tl.where(long, tl.abs(grown - gap) / gap, 0.0), 0)
            distance = tl.sum(lam * grown, 0)
            share = lam * sign
        elif TOTAL:
            lam, grown, residual, feasible, converged = totalled(
                margin, rival, tl.max(tl.where(rival, bound + raised, -INFINITY), 0), diagonal,
                rounding, scale, error, matrix, t, N, NP, 20 * N + 50,
            )  # fmt: skip
            active = tl.where(lam > 0.0, 1, 0)
            distance = tl.abs(tl.sum(lam * grown, 0))
            share = tl.where(k == t, tl.sum(lam, 0), -lam)
        else:
            impossible = tl.max(tl.where(rival & (scale == 0.0) & (gap > 0.0), 1, 0), 0)
            unit = tl.where(long, gap * scale, -INFINITY)
            largest = tl.max(unit, 0)
            largest = tl.where(largest > 0.0, largest, 1.0)
            unit = unit * (1.0 / largest)
            aim = unit
            if impossible == 1:
                aim = tl.where(j >= 0, -INFINITY, aim)
                fresh = fresh * 0 + 1
            tableau, active, found, grown, feasible, converged = solved(
                tableau, active, aim, scale, error, matrix, t, fresh,
                N, NP, (V == 0) & (not GRAMS), 20 * N + 50,
            )  # fmt: skip
            feasible = tl.where(impossible == 1, 0, feasible)
            found = tl.where(feasible == 1, found, 0.0)
            grown = tl.where(feasible == 1, grown, 0.0)
            # As kkt_residual, in units.
            rises = tl.where(long, unit, 0.0)
            slack = tl.where(long, grown - rises, 0.0)
            rounds = EPSILON * tl.sum(found, 0)
            short = tl.where(long, (-slack - rounds) / (1.0 + tl.abs(rises)), 0.0)
            longest = tl.abs(tl.sum(found * grown, 0))
            unbalanced = tl.abs(tl.sum(found * slack, 0)) - rounds * rounds / EPSILON
            unbalanced = unbalanced / tl.where(longest > 0.0, longest, 1.0)
            residual = tl.maximum(tl.maximum(tl.max(short, 0), unbalanced), 0.0)
            sum_of = tl.sum(found, 0) + unbalanced
            whole = ((sum_of - sum_of) == 0.0) & (converged == 1)
            residual = tl.where(whole, residual, INFINITY)
            distance = longest * largest * largest
            lam = found * scale * largest
            if V > 0:
                # Multipliers of what is kept follow from those of the others.
                combined = tl.load(
                    matrix + N * N + j[:, None] * N + j[None, :],
                    mask=filled[:, None] & filled[None, :],
                    other=0.0,
                )
                slot_share = tl.sum(combined * lam[:, None], 0)
                pushes = filled & (slot_share != 0.0)
                share = tl.sum(pick * slot_share[:, None], 0)
            else:
                share = tl.where(k == t, tl.sum(lam, 0), -lam)
        fresh = fresh * 0
        go = go * 0
        if feasible == 1:
            reread = tl.zeros([KP, BD], dtype=tl.float64)
            edited_square = tl.zeros([BD], dtype=tl.float64)
            apart = tl.zeros([BD], dtype=tl.float64)
            stretch = tl.zeros([BD], dtype=tl.float64)
            moved_by = tl.zeros([BD], dtype=tl.int32)
            # Few classes move it: the others' rows are not fetched.
            moves = inside & (share != 0.0)
            for start in tl.range(0, D, BD, num_stages=STAGES):
                at = start + d
                here = at < D
                x = wide(tl.load(own + at, mask=here, other=0.0))
                if BASE:
                    beside = wide(tl.load(mine + at, mask=here, other=0.0))
                if AT & BASE:
                    x = scaled(x, SCALE, NARROW_SCALE, stream.dtype.element_ty)
                    x = rounded(beside + x, DTYPE)
                both = inside[:, None] & here[None, :]
                places = k[:, None] * D + at[None, :]
                if LOW and V > 0:
                    # Along the difference of each slot's pair.
                    some = pushes[:, None] & here[None, :]
                    first_of, other_of = (
                        plus[:, None] * D + at[None, :],
                        minus[:, None] * D + at[None, :],
                    )
                    p = tl.load(steering + first_of, mask=some, other=0.0)
                    p -= tl.load(steering + other_of, mask=some, other=0.0)
                    rest = tl.load(low + first_of, mask=some, other=0.0)
                    p += rest - tl.load(low + other_of, mask=some, other=0.0)
                    step = tl.sum(p * slot_share[:, None], 0)
                else:
                    p = tl.load(steering + places, mask=both & moves[:, None], other=0.0)
                    if LOW:
                        # Coefficients add up to 0: along differences to the target.
                        p -= tl.load(steering + t * D + at, mask=here, other=0.0)[None, :]
                        rest = tl.load(low + places, mask=both & moves[:, None], other=0.0)
                        p += rest - tl.load(low + t * D + at, mask=here, other=0.0)[None, :]
                    step = tl.sum(p * share[:, None], 0)
                edited = x + step
                kept = rounded(edited, DTYPE)
                place = kept
                if BASE:
                    place = kept - beside
                    if SCALE != 1:
                        place = place / SCALE
                    place = rounded(place, DTYPE)
                held = place
                if BASE:
                    held = scaled(place, SCALE, NARROW_SCALE, DTYPE)
                    held = rounded(beside + held, DTYPE)
                if AT:
                    tl.store(put + at, narrowed(place, DTYPE), mask=here)
                else:
                    tl.store(put + at, narrowed(kept, DTYPE), mask=here)
                if NARROW:
                    w = wide(tl.load(live + places, mask=both, other=0.0))
                else:
                    w = tl.load(weight + places, mask=both, other=0.0)
                reread = tl.fma(w, tl.broadcast_to(held[None, :], (KP, BD)), reread)
                edited_square = tl.fma(edited, edited, edited_square)
                apart = tl.fma(held - edited, held - edited, apart)
                stretch = tl.fma(step, step, stretch)
                moved_by += tl.where(here & (kept != x), 1, 0)
            logits = tl.sum(reread, 1) + offset
            moved = tl.sum(stretch, 0)
            if V > 0:
                seen = tl.where(rival, times(pick, logits), 0.0)
                seen_last = seen
                logits_last = logits
            elif TWO:
                seen = logits * sign
            else:
                seen = tl.where(rival, tl.sum(tl.where(k == t, logits, 0.0), 0) - logits, 0.0)
                if TOTAL:
                    seen = tl.where(rival, -rivalry(tl.where(rival, seen, INFINITY))[0], 0.0)
            after = tl.min(tl.where(rival, seen, INFINITY), 0)
            sum_of = tl.sum(seen, 0)
            whole = (sum_of - sum_of) == 0.0
            after = tl.where(whole, after, sum_of)
            behind = tl.max(tl.where(rival, bound - seen, -INFINITY), 0)
            reached = tl.where(whole & (behind <= 0.0), 1, 0)
            if not TWO:
                # As reach.excess.
                squared = tl.maximum(distance, TINY)
                surplus = tl.maximum(seen - bound, raised)
                surplus = tl.sum(tl.where(rival, lam * surplus, 0.0), 0) / squared
                by_room = ROOM * tl.sum(tl.where(rival, lam * lengths, 0.0), 0) / squared
                edited_size = tl.maximum(tl.sqrt(tl.sum(edited_square, 0)), TINY)
                by_room *= tl.maximum(4.0 * tl.sqrt(tl.sum(apart, 0)) / edited_size, EPS)
                by_room *= size + tl.maximum(1.0 - surplus, 0.0) * tl.sqrt(moved)
                longer = tl.where(reached == 1, surplus - by_room - LONGER, 0.0)
                residual = tl.maximum(residual, longer)
            changed = tl.where(tl.sum(moved_by, 0) > 0, 1, 0)
            written = written * 0 + 1
            short = tl.where(rival & ((seen - seen) == 0.0), tl.maximum(bound - seen, 0.0), 0.0)
            worst = tl.max(short, 0)
            number += 1
            if TOTAL:
                # Where the steps ran out, asking again is of no use.
                worst = tl.where(converged == 1, worst, 0.0)
            safe = raised
            if (reached == 0) & (worst > 0.0) & (number < MAX_ROUNDS) & (failed < 2):
                # As Headroom: what is missing twice over, at last a bound that cannot be missed.
                edited_size = tl.sqrt(tl.sum(edited_square, 0))
                if (number + 1 < MAX_ROUNDS) | (failed > 0):
                    nudge = number.to(tl.float64) * NUDGE * tl.maximum(size, edited_size)
                    nudge = tl.where(failed > 0, 0.0, nudge)
                    raised += tl.where(short > 0.0, 2.0 * short + nudge * reach_of, 0.0)
                else:
                    beyond = 4.0 * tl.sqrt(tl.sum(apart, 0))
                    beyond = tl.maximum(EPS * edited_size, beyond)
                    raised = tl.maximum(raised + TIMES * worst, reach_of * beyond)
                go = go + 1
        else:
            # Aims out of reach: those before count, at first the floors themselves.
            highest = tl.max(tl.where(rival, raised, 0.0), 0)
            again = (number > 0) | ((failed == 0) & (highest > NEAR))
            go = tl.where(again & (failed < 2), 1, 0)
            failed += 1
            raised = safe
            fresh = fresh + 1

    sound = (go == 0) & (failed >= 0) & (fresh >= 0) & (number <= MAX_ROUNDS)
    if not TWO and not TOTAL:
        total = tl.sum(tl.sum(tableau, 1), 0)
        sound = sound & ((total - total) == 0.0)

    # 4. The verdict; put the activation back where there is no edit.
    edited = needed & (feasible == 1) & (invalid == 0)
    accurate = sound & (reached == 1) & (residual <= ACCURATE) & (feasible == 1)
    status = tl.where(accurate, SOLVED, INACCURATE)
    status = tl.where(needed, status, SATISFIED_STATUS)
    status = tl.where((feasible == 1) | (number > 0), status, INFEASIBLE)
    status = tl.where(invalid, INVALID, status)
    if SKIP:
        edited = edited & (status != INACCURATE)
    restored = (edited == 0) | (changed == 0)
    if not COPY:
        restored = restored & (written == 1)
    if restored:
        for start in tl.range(0, D, BD, num_stages=STAGES):
            at = start + d
            here = at < D
            x = tl.load(own + at, mask=here, other=0.0)
            tl.store(put + at, narrowed(wide(x), DTYPE), mask=here)
    lam = tl.where(edited, lam, 0.0)
    moved = tl.where(edited, moved, 0.0)
    distance = tl.where(edited, distance, 0.0)
    after = tl.where(edited, after, before)
    top = tl.max(tl.where(rival, bound, -INFINITY), 0)
    if SOLUTION:
        places = i * (N if V > 0 else K - 1) + slot
        tl.store(multipliers + places, lam, mask=rival)
        tl.store(active_out + places, ((lam > 0.0) & (active == 1)).to(tl.int8), mask=rival)
    if REPEATS:
        tl.store(aims + places, bound + raised, mask=rival)
        if not TWO and not TOTAL:
            # In the numbering of constraints, where a gradient will use it.
            units_of = tl.where(active == 1, scale, 0.0)
            units_of = tl.where(edited, units_of, 0.0)
            both = rival[:, None] & rival[None, :]
            block = -tableau * (units_of[:, None] * units_of[None, :])
            places = i * (K - 1) * (K - 1) + slot[:, None] * (K - 1) + slot[None, :]
            tl.store(inverse_out + places, block, mask=both)
    into = certificate + (first + i) * row_step
    if RECORD:
        distance, moved = tl.sqrt(tl.maximum(distance, 0.0)), tl.sqrt(moved)
        number = tl.load(index + i)
        if SHOWN:
            status = tl.where(hidden, SATISFIED_STATUS, status)
            number = tl.where(hidden, -1, number)
        # Of variables: odds and floor of each, three numbers, how far each moved, three numbers.
        late = into + (6 + (4 * V - 3 if V > 0 else 0)) * number_step
        tl.store(late, status.to(tl.float64))
        tl.store(late + number_step, number.to(tl.float64))
        tl.store(late + 2 * number_step, tl.cast(forward_pass, tl.float64))
    else:
        tl.store(statuses + i, status.to(tl.int64))
    if V > 0:
        for one in tl.static_range(V):
            mine_is = (variable == one) & (kind == 1)
            writes = tl.max(tl.where(mine_is, 1, 0), 0) == 1
            was = tl.min(tl.where(mine_is, margin, INFINITY), 0)
            seen_is = tl.min(tl.where(mine_is, seen_last, INFINITY), 0)
            asked_is = tl.max(tl.where(mine_is, bound, -INFINITY), 0)
            begins = tl.load(variables + N + one)
            ends = tl.load(variables + N + one + 1)
            own_classes = (k >= begins) & (k < ends)
            change = logits_last - z
            most = tl.max(tl.where(own_classes, change, -INFINITY), 0)
            most -= tl.min(tl.where(own_classes, change, INFINITY), 0)
            tl.store(into + one * number_step, tl.where(writes, was, float("nan")))
            seen_is = tl.where(edited, seen_is, was)
            tl.store(into + (V + one) * number_step, tl.where(writes, seen_is, float("nan")))
            tl.store(into + (2 * V + one) * number_step, tl.where(writes, asked_is, float("nan")))
            tl.store(into + (3 * V + 3 + one) * number_step, tl.where(edited, most, 0.0))
        into += (3 * V - 3) * number_step
    else:
        tl.store(into, before)
        tl.store(into + number_step, after)
        tl.store(into + 2 * number_step, top)
    tl.store(into + 3 * number_step, distance)
    tl.store(into + 4 * number_step, moved)
    tl.store(into + 5 * number_step, residual)
