"""The L2-penalised multinomial likelihood of many probes at once, and its minimum.

A stack of problems has S data matrices ("sites") of one shape, and L label sets for each, all with
K classes. Parameters are (S, L, C, p): a row of p numbers for each class, the last of them the
bias, read by a constant feature. Rows of classes come first because narrow products are fastest
when the long dimension is the last.

For K = 2 one row is enough, C = 1: Σ_k ∂/∂w_k = l2 Σ_k w_k = 0 at the optimum, so w_0 = −w_1, and
the row of class 1 stands for both. Otherwise C = K.

The minimum is found by a Newton–conjugate-gradient method. Each Newton step solves H s = −∇ by
conjugate gradients to a tolerance that tightens with the gradient (Nocedal and Wright 2006,
algorithm 7.1). The preconditioner is the Hessian of the average class as it was some steps ago: its
factor, by far the dearest thing here, is renewed only for problems whose conjugate gradients have
become long. At W = 0 all label sets share it.

All problems of a stack move together, each with its own step length and its own end. On a GPU the
host waits for the device a few times in a Newton step, never once for every conjugate gradient.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lrqp_torch.distributed.ranks import Ranks

ALONE: Final = Ranks()
"""A run of one process."""

MAX_CG_STEPS = 500
ARMIJO = 1e-4
SHORTEST_STEP = 1e-10
PATIENCE = 8
"""Products with the Hessian before a factor is renewed; anything from 4 to 20 measures alike."""


@dataclass(frozen=True)
class Block:
    """Some of the examples of all problems."""

    features: Tensor  # (S, m, p), float64; the last feature is 1
    targets: Tensor  # 1 where an example is of a class, else 0, (S, L, C, m), float64
    # Of the examples, (S, L, 1, m), float64; None if each counts once.
    weights: Tensor | None = None

    def weighed(self, values: Tensor) -> Tensor:
        """Values of the examples, (S, L, C, m), times their weights."""
        return values if self.weights is None else values * self.weights

    def keep(self, sites: Tensor) -> "Block":
        """The examples of some of the sites."""
        weights = None if self.weights is None else self.weights[sites]
        return Block(self.features[sites], self.targets[sites], weights)


@dataclass(frozen=True)
class Evaluation:
    """The likelihood at one setting of the parameters."""

    parameters: Tensor  # (S, L, C, p)
    loss: Tensor  # in nats per example, penalty included, (S, L)
    gradient: Tensor  # (S, L, C, p)
    size: Tensor  # Euclidean norm of the gradient with respect to all K rows, (S, L)
    # Class probabilities (S, L, C, m) of each block; None where blocks are read anew in every pass,
    # and probabilities with them.
    probability: list[Tensor] | None

    def each(self, change: Callable[..., Tensor], *others: "Evaluation") -> "Evaluation":
        """Every tensor changed, together with those of other points."""
        points = (self, *others)
        held = [point.probability for point in points if point.probability is not None]
        changed = {
            name: change(*(getattr(point, name) for point in points))
            for name in ("parameters", "loss", "gradient", "size")
        }
        kept = [change(*blocks) for blocks in zip(*held, strict=True)] if held else None
        return Evaluation(**changed, probability=kept)

    def where(self, chosen: Tensor, other: "Evaluation") -> "Evaluation":
        """This point for the chosen problems, (S, L), the other one elsewhere."""

        def mix(own: Tensor, others: Tensor) -> Tensor:
            return torch.where(chosen.view(*chosen.shape, *(1,) * (own.ndim - 2)), own, others)

        return self.each(mix, other)


def rows_of(n_classes: int) -> int:
    """C, the rows of parameters that K classes need."""
    return 1 if n_classes == 2 else n_classes


def encode(labels: Tensor, n_classes: int) -> Tensor:
    """Targets (..., C, n) in float64 of labels (..., n)."""
    if n_classes == 2:
        return labels.double().unsqueeze(-2)
    return torch.nn.functional.one_hot(labels, n_classes).double().mT.contiguous()


class MultinomialLoss:
    """(1/n) Σ_i ω_i (−log softmax(W x_i + b)[y_i]) + (l2/2) ‖W‖², for each problem of a stack.

    Args:
        blocks: the examples, in one block or in many; gone through in every evaluation and in
            every product with the Hessian.
        total: n = Σ ω_i, in all blocks together; the number of examples if they have no weights.
        l2: the penalty.
        in_memory: the blocks stay in memory, and so may the probabilities of their examples.
        ranks: processes that each hold some of the blocks; sums over examples are added up over
            them, with the same bits on each.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        *,
        total: float,
        l2: float,
        in_memory: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.blocks, self.total, self.in_memory, self.ranks = blocks, total, in_memory, ranks
        # The penalty belongs into the sum over ranks once.
        self.l2 = l2 if ranks.is_main else 0.0
        self._penalty: Tensor | None = None

    def keep(self, sites: Tensor) -> "MultinomialLoss":
        """The problems of some of the sites."""
        blocks = [block.keep(sites) for block in self.blocks]
        return MultinomialLoss(
            blocks, total=self.total, l2=self.l2, in_memory=self.in_memory, ranks=self.ranks
        )

    def evaluate(self, parameters: Tensor) -> Evaluation:
        """Loss and gradient, in one pass over the blocks."""
        copies = _copies(parameters)
        penalised = self._penalise(parameters)
        loss = copies * (parameters * penalised).sum((2, 3)) / 2
        gradient = penalised
        kept: list[Tensor] = []
        for block in self.blocks:
            logits = _times(parameters, block.features)
            probability = _probability(logits)
            likelihood = block.weighed(_negative_log_likelihood(logits, block.targets))
            loss = loss + likelihood.sum((2, 3)) / self.total
            residual = block.weighed(probability - block.targets)
            gradient = self._add(gradient, residual, block.features)
            if self.in_memory:
                kept.append(probability)
        loss, gradient = self.ranks.total(loss), self.ranks.total(gradient)
        size = copies**0.5 * _norm(gradient)
        return Evaluation(parameters, loss, gradient, size, kept if self.in_memory else None)

    def slope(self, point: Evaluation, direction: Tensor) -> Tensor:
        """Derivative of the loss along a direction, (S, L)."""
        return _copies(direction) * _dot(point.gradient, direction)

    def hessian(self, point: Evaluation, direction: Tensor) -> Tensor:
        """The Hessian times a direction, (S, L, C, p)."""
        product = self._penalise(direction)
        for block, probability in self._examples(point):
            change = _times(direction, block.features)
            if direction.shape[2] == 1:
                change = 2 * probability * (1 - probability) * change
            else:
                mean = (probability * change).sum(2, keepdim=True)
                change = probability * (change - mean)
            product = self._add(product, block.weighed(change), block.features)
        return self.ranks.total(product)

    def average_hessian(self, point: Evaluation, problems: list[tuple[int, int]]) -> Tensor:
        """Hessian of the average class of some problems, (len(problems), p, p).

        H̄ = (1/n) Σ_i ω_i c_i x_i x_iᵀ + l2 I,  c_i = Σ_k p_ik (1 − p_ik) / (K − 1)

        It is the Hessian itself for K = 2, and for any K where all classes are equally likely.
        """
        width = point.parameters.shape[3]
        whole = point.parameters.new_zeros(len(problems), width, width)
        for block, probability in self._examples(point):
            for index, (site, label_set) in enumerate(problems):
                p = probability[site, label_set]
                spread = (p * (1 - p)).sum(0)
                curvature = 2 * spread if len(p) == 1 else spread / (len(p) - 1)
                if block.weights is not None:
                    curvature = curvature * block.weights[site, label_set, 0]
                features = block.features[site]
                whole[index] += (features * curvature.unsqueeze(1)).T @ features
        whole /= self.total
        whole.diagonal(dim1=1, dim2=2)[:, :-1].add_(self.l2)
        return self.ranks.total(whole)

    def rounding(self, point: Evaluation) -> Tensor:
        """Rounding error of the gradient's norm: that of its terms, which may cancel, (S, L).

        Over many ranks at most √(their number) times that of one.
        """
        terms = torch.zeros_like(point.gradient)
        for block, probability in self._examples(point):
            residual = block.weighed((probability - block.targets).abs())
            terms = self._add(terms, residual, block.features.abs())
        size = _copies(terms) ** 0.5 * _norm(terms)
        return self.ranks.total(8 * torch.finfo(terms.dtype).eps * size)

    def _penalise(self, parameters: Tensor) -> Tensor:
        """Gradient of the penalty, which leaves the bias out."""
        if self._penalty is None:
            self._penalty = parameters.new_full((parameters.shape[-1],), self.l2)
            self._penalty[-1] = 0.0
        return self._penalty * parameters

    def _add(self, rows: Tensor, values: Tensor, features: Tensor) -> Tensor:
        """(S, L, C, p) plus 1/n Σ over examples of values (S, L, C, m) times their features."""
        total: Tensor = torch.baddbmm(
            rows.flatten(1, 2), values.flatten(1, 2), features, alpha=1 / self.total
        )
        return total.view_as(rows)

    def _examples(self, point: Evaluation) -> Iterator[tuple[Block, Tensor]]:
        if point.probability is not None:
            yield from zip(self.blocks, point.probability, strict=True)
            return
        for block in self.blocks:
            yield block, _probability(_times(point.parameters, block.features))


def _times(rows: Tensor, features: Tensor) -> Tensor:
    """(S, L, C, p) times the features of each example: (S, L, C, m)."""
    product: Tensor = rows.flatten(1, 2) @ features.mT
    return product.view(*rows.shape[:3], -1)


def _probability(logits: Tensor) -> Tensor:
    # With one row, z_1 − z_0 is twice that of class 1.
    return torch.sigmoid(2 * logits) if logits.shape[2] == 1 else logits.softmax(2)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each example, (S, L, C, m); those of all C rows add up to it."""
    if logits.shape[2] == 1:
        # log(1 + e^−m), m the margin of the true class; beyond the threshold torch returns −m.
        return softplus(2 * (1 - 2 * targets) * logits, threshold=40)
    return -targets * logits.log_softmax(2)


def _copies(rows: Tensor) -> int:
    """How many rows of the K one row of (S, L, C, p) stands for: for K = 2 two, of other sign."""
    return 2 if rows.shape[2] == 1 else 1


@dataclass(frozen=True)
class Minimum:
    """Where the search ended, for each problem of a stack; the statistics are on the CPU."""

    parameters: Tensor  # (S, L, C, p), float64
    loss: Tensor  # in nats per example, penalty included, (S, L)
    gradient_norm: Tensor  # (S, L)
    relative_gradient_norm: Tensor  # over the norm at zero; 0 below the rounding error, (S, L)
    iterations: Tensor  # Newton steps, (S, L)


@dataclass(frozen=True)
class _State:
    """The search of the sites that are still in the stack; every field has S rows."""

    site: Tensor
    point: Evaluation
    start: Tensor
    rounding: Tensor
    goal: Tensor
    iterations: Tensor
    stuck: Tensor
    factor: Tensor
    spent: Tensor

    def keep(self, sites: Tensor) -> "_State":
        kept = {f.name: getattr(self, f.name)[sites] for f in fields(self) if f.name != "point"}
        return _State(point=self.point.each(lambda values: values[sites]), **kept)

    def result(self, sites: Tensor) -> Minimum:
        size = self.point.size
        relative = torch.where(size > self.rounding, size / self.start, 0.0)
        statistics = (self.point.loss, size, relative, self.iterations)
        return Minimum(self.point.parameters[sites], *(value[sites].cpu() for value in statistics))


@torch.no_grad()
def minimise(loss: MultinomialLoss, zero: Tensor, tolerance: float, max_iterations: int) -> Minimum:
    """Minimise every loss of a stack from zero.

    Args:
        loss: the losses.
        zero: parameters to start from, all zero, (S, L, C, p), float64.
        tolerance: stop when the gradient norm falls below this share of the one at zero, or below
            its own rounding error.
        max_iterations: stop after as many Newton steps.
    """
    state = _begin(loss, zero, tolerance)
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
            loss, state, running = loss.keep(left), state.keep(left), running[left]
            renew = renew[open_sites]
        state = _renew(loss, state, [(s, k) for s, k in renew.nonzero().tolist()])
        state = _advance(loss, state, running)
    order = torch.cat([sites for sites, _ in finished]).argsort()
    whole = {}
    for field in fields(Minimum):
        values = torch.cat([getattr(result, field.name) for _, result in finished])
        whole[field.name] = values[order.to(values.device)]
    return Minimum(**whole)


def _begin(loss: MultinomialLoss, zero: Tensor, tolerance: float) -> _State:
    point = loss.evaluate(zero)
    # Activations that say nothing about the labels have a gradient of rounding errors at zero,
    # which no step makes smaller; they are at their optimum there.
    rounding = loss.rounding(point)
    sites, label_sets = zero.shape[:2]
    # With all classes equally likely the curvature does not depend on the labels.
    shared = _factor(loss.average_hessian(point, [(site, 0) for site in range(sites)]))
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


def _advance(loss: MultinomialLoss, state: _State, running: Tensor) -> _State:
    """One Newton step with a line search."""
    step, products = _newton_step(loss, state, running)
    point, moved = _line_search(loss, state.point, step, running)
    return replace(
        state,
        point=point,
        iterations=state.iterations + running,
        stuck=state.stuck | (running & ~moved),
        spent=state.spent + products,
    )


def _line_search(
    loss: MultinomialLoss, point: Evaluation, step: Tensor, running: Tensor
) -> tuple[Evaluation, Tensor]:
    """The point after the longest of the steps 1, ½, ¼, … that makes progress, and who found it."""
    slope = loss.slope(point, step)
    length = torch.ones_like(point.loss)
    waiting, found = running, point
    while True:
        trial = loss.evaluate(point.parameters + length[..., None, None] * step)
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


def _newton_step(loss: MultinomialLoss, state: _State, running: Tensor) -> tuple[Tensor, Tensor]:
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
        curved = loss.hessian(point, direction)
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


def _renew(loss: MultinomialLoss, state: _State, stale: list[tuple[int, int]]) -> _State:
    """Preconditioners of the stale problems from where they are now."""
    if not stale:
        return state
    where = tuple(torch.tensor(stale, device=state.spent.device).T)
    factor, spent = state.factor, state.spent.clone()
    factor[where] = _factor(loss.average_hessian(state.point, stale))
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
