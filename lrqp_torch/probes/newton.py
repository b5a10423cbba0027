"""A Newton–conjugate-gradient solver for many multinomial logistic regressions at once.

Each Newton step solves H s = −∇ by conjugate gradients to a tolerance that tightens with the
gradient (Nocedal and Wright 2006, algorithm 7.1). The preconditioner is the Hessian of the average
class as it was some steps ago: its factor, by far the dearest thing here, is renewed only
for problems whose conjugate gradients have become long. At W = 0 all label sets share it.

All problems of a stack move together, each with its own step length and its own end. On a GPU the
host waits for the device a few times in a Newton step, never once for every conjugate gradient.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lrqp_torch.probes.multinomial import MultinomialLoss, Point

MAX_CG_STEPS = 500
ARMIJO = 1e-4
SHORTEST_STEP = 1e-10
PATIENCE = 8
"""Products with the Hessian before a factor is renewed; anything from 4 to 20 measures alike."""


@dataclass(frozen=True)
class Minimum:
    """Where the search ended, for each problem of a stack; the statistics are on the CPU.

    Attributes:
        parameters: (S, L, C, p), float64.
        loss: in nats per example, penalty included, (S, L).
        gradient_norm: (S, L).
        relative_gradient_norm: over the norm at zero; 0 below the rounding error, (S, L).
        iterations: Newton steps, (S, L).
    """

    parameters: Tensor
    loss: Tensor
    gradient_norm: Tensor
    relative_gradient_norm: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class _State:
    """The search of the sites that are still in the stack; every field has S rows."""

    site: Tensor
    point: Point
    start: Tensor
    rounding: Tensor
    goal: Tensor
    iterations: Tensor
    stuck: Tensor
    factor: Tensor
    spent: Tensor

    def keep(self, sites: Tensor) -> "_State":
        kept = {f.name: getattr(self, f.name)[sites] for f in fields(self) if f.name != "point"}
        return _State(point=self.point.keep(sites), **kept)

    def result(self, sites: Tensor) -> Minimum:
        size = self.point.size
        relative = torch.where(size > self.rounding, size / self.start, 0.0)
        statistics = (self.point.loss, size, relative, self.iterations)
        return Minimum(self.point.parameters[sites], *(value[sites].cpu() for value in statistics))


@torch.no_grad()
def minimise(
    problem: MultinomialLoss, zero: Tensor, tolerance: float, max_iterations: int
) -> Minimum:
    """Minimise every loss of a stack from zero.

    Args:
        problem: the losses.
        zero: parameters to start from, all zero, (S, L, C, p), float64.
        tolerance: stop when the gradient norm falls below this share of the one at zero, or below
            its own rounding error.
        max_iterations: stop after as many Newton steps.
    """
    state = _begin(problem, zero, tolerance)
    finished: list[tuple[Tensor, Minimum]] = []
    while True:
        running = (state.point.size > state.goal) & ~state.stuck
        running &= state.iterations < max_iterations
        stale = running & (state.spent > PATIENCE)
        open_sites, renew = _to_host(running.any(1), stale)
        if 2 * int(open_sites.sum()) <= len(open_sites):
            done = (~open_sites).nonzero().flatten().to(zero.device)
            finished.append((state.site[done], state.result(done)))
            if not bool(open_sites.any()):
                break
            left = open_sites.nonzero().flatten().to(zero.device)
            problem, state, running = problem.keep(left), state.keep(left), running[left]
            renew = renew[open_sites]
        state = _renew(problem, state, [(s, k) for s, k in renew.nonzero().tolist()])
        state = _advance(problem, state, running)
    order = torch.cat([sites for sites, _ in finished]).argsort()
    whole = {}
    for field in fields(Minimum):
        values = torch.cat([getattr(result, field.name) for _, result in finished])
        whole[field.name] = values[order.to(values.device)]
    return Minimum(**whole)


def _begin(problem: MultinomialLoss, zero: Tensor, tolerance: float) -> _State:
    point = problem.evaluate(zero)
    # Activations that say nothing about the labels have a gradient of rounding errors at zero,
    # which no step makes smaller; they are at their optimum there.
    rounding = problem.rounding(point)
    sites, label_sets = zero.shape[:2]
    # With all classes equally likely the curvature does not depend on the labels.
    shared = _factor(problem.average_hessian(point, [(site, 0) for site in range(sites)]))
    return _State(
        site=torch.arange(sites, device=zero.device),
        point=point,
        start=point.size,
        rounding=rounding,
        goal=torch.maximum(tolerance * point.size, rounding),
        iterations=torch.zeros_like(point.loss, dtype=torch.long),
        stuck=torch.zeros_like(point.loss, dtype=torch.bool),
        factor=shared.unsqueeze(1).repeat(1, label_sets, 1, 1),
        spent=torch.zeros_like(point.loss, dtype=torch.long),
    )


def _advance(problem: MultinomialLoss, state: _State, running: Tensor) -> _State:
    """One Newton step with a line search."""
    step, products = _newton_step(problem, state, running)
    point, moved = _line_search(problem, state.point, step, running)
    return replace(
        state,
        point=point,
        iterations=state.iterations + running,
        stuck=state.stuck | (running & ~moved),
        spent=state.spent + products,
    )


def _line_search(
    problem: MultinomialLoss, point: Point, step: Tensor, running: Tensor
) -> tuple[Point, Tensor]:
    """The point after the longest of the steps 1, ½, ¼, … that makes progress, and who found it."""
    slope = problem.slope(point, step)
    length = torch.ones_like(point.loss)
    waiting, found = running, point
    while True:
        trial = problem.evaluate(point.parameters + length[..., None, None] * step)
        # Near the optimum the decrease is below the loss's rounding; there the full step is
        # safe, and a smaller gradient is the progress that counts.
        enough = trial.loss <= point.loss + ARMIJO * length * slope
        enough |= trial.size < 0.5 * point.size
        # A problem that has finished takes a step of zero.
        short = (waiting & ~enough & (length < SHORTEST_STEP)).any()
        settled, short = _to_host((enough | ~waiting).all(), short)
        if bool(settled) and found is point:
            return trial, running
        found = trial.where(waiting & enough, found)
        waiting = waiting & ~enough
        if bool(short) or bool(settled):
            return found, running & ~waiting
        length = torch.where(waiting, length / 2, length)


def _newton_step(problem: MultinomialLoss, state: _State, running: Tensor) -> tuple[Tensor, Tensor]:
    """−H⁻¹ ∇ by preconditioned conjugate gradients, and the products that it took, (S, L)."""
    point = state.point
    target = (point.size / state.start).sqrt().clamp_max(0.1)
    residual = -point.gradient
    target = target * _norm(residual)
    step = torch.zeros_like(residual)
    solved = _precondition(state.factor, residual)
    direction, product = solved, _dot(residual, solved)
    spent = torch.zeros_like(running, dtype=torch.long)
    for number in range(MAX_CG_STEPS):
        running = running & (_norm(residual) > target)
        # Asking whether all have finished makes the host wait for a GPU, so ask it ever more
        # rarely: after 1, 2, 4, … products.
        if (number & (number - 1) == 0 or not residual.is_cuda) and not bool(running.any()):
            break
        curved = problem.hessian(point, direction)
        curvature = _dot(direction, curved)
        running = running & (curvature > 0)
        spent += running
        length = torch.where(running, product / curvature, 0.0)[..., None, None]
        step = torch.addcmul(step, length, direction)
        residual = torch.addcmul(residual, length, curved, value=-1)
        solved = _precondition(state.factor, residual)
        before, product = product, _dot(residual, solved)
        ratio = torch.where(running, product / before, 0.0)[..., None, None]
        direction = torch.addcmul(solved, ratio, direction)
    return step, spent


def _renew(problem: MultinomialLoss, state: _State, stale: list[tuple[int, int]]) -> _State:
    """Preconditioners of the stale problems from where they are now."""
    if not stale:
        return state
    where = tuple(torch.tensor(stale, device=state.spent.device).T)
    factor, spent = state.factor, state.spent.clone()
    factor[where] = _factor(problem.average_hessian(state.point, stale))
    spent[where] = 0
    return replace(state, spent=spent)


def _factor(matrices: Tensor) -> Tensor:
    """L⁻¹ of symmetric matrices L Lᵀ: two products with it cost less than two triangular solves.

    L⁻ᵀ L⁻¹ is positive definite whatever the rounding, as a preconditioner must be.
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-12 * diagonal.amax(1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(matrices)
    scale = diagonal.clamp_min(1e-300).sqrt().diag_embed()
    factor = torch.where((failed > 0)[:, None, None], scale, factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    # Triangular solves return columns in memory order; products are faster with rows.
    return inverse.contiguous()


def _precondition(factor: Tensor, rows: Tensor) -> Tensor:
    return (rows @ factor.mT) @ factor


def _dot(a: Tensor, b: Tensor) -> Tensor:
    total: Tensor = (a * b).sum((2, 3))
    return total


def _norm(a: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(a, dim=(2, 3))
    return size


def _to_host(*values: Tensor) -> list[Tensor]:
    """Flags on the CPU, all in one transfer."""
    flat = torch.cat([value.flatten() for value in values]).cpu()
    pieces = flat.split([value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]
