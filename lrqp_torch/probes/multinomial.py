"""The L2-penalised multinomial likelihood of many probes at once, and its minimum.

A stack of problems has S data matrices ("sites") of one shape, and L label sets for each, all with
K classes. Parameters are (S, L, C, p): a row of p numbers for each class, the last of them the
bias, read by a constant feature. Rows of classes come first because narrow products are fastest
when the long dimension is the last.

For K = 2 one row is enough, C = 1: Σ_k ∂/∂w_k = l2 Σ_k w_k = 0 at the optimum, so w_0 = −w_1, and
the row of class 1 stands for both. Otherwise C = K.

The minimum is found by a Newton–conjugate-gradient method. Each Newton step solves H s = −∇ by
conjugate gradients to a tolerance that tightens with the gradient (Nocedal and Wright 2006,
algorithm 7.1). The preconditioner is the Hessian of the
average class as it was some steps ago: its factor, by far the dearest thing here, is made, and
made anew, only for problems whose conjugate gradients have cost as much as it does. Until there is
one, the spread of each feature takes its place; where it costs little, there is one from the
start, which at W = 0 all label sets share.

Loss and gradient are in float64. In memory on a CPU the products with the Hessian and the factor,
which decide how fast and never where the search ends, are in float32, on features in units of their
spread; what does not converge so goes on in float64.

All problems of a stack move together, each with its own step length and its own end. On a GPU the
host waits for the device a few times in a Newton step, never once for every conjugate gradient.
"""

import copy
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
ENOUGH = 0.3
"""What share of the goal a Newton step leaves by its conjugate gradients."""
SHORTEST_STEP = 1e-10
LEVEL = 1e-10
"""Relative change of the loss that may be rounding."""
PATIENCE = 8
"""Products with the Hessian before a factor is renewed, where both are in float64; anything from 4
to 20 measures alike."""
FROM_THE_START = 16
"""Products that a factor may cost to be made before it is known whether it is needed."""
LONG = 2**18
"""Numbers in a matrix of features from which on reading it costs more than calling."""
CACHED = 2**22
"""Numbers in float32 that a processor's cache holds, about."""
NARROW_STEPS = 30
"""Newton steps with products in float32; most searches take 10 to 20 in all."""


@dataclass(frozen=True)
class Block:
    """Some of the examples of all problems."""

    features: Tensor  # (S, m, p), float64; the last feature is 1
    targets: Tensor  # 1 where an example is of a class, else 0, (S, L, C, m), float64
    # Of the examples, (S, L, 1, m), float64; None if each counts once.
    weights: Tensor | None = None
    # The features over their spread, for products with the Hessian, (S, m, p), float32.
    narrow: Tensor | None = None

    def weighed(self, values: Tensor) -> Tensor:
        """Values of the examples, (S, L, C, m), times their weights."""
        return values if self.weights is None else values * self.weights.to(values.dtype)

    def keep(self, sites: Tensor) -> "Block":
        """The examples of some of the sites."""
        optional = (part if part is None else part[sites] for part in (self.weights, self.narrow))
        return Block(self.features[sites], self.targets[sites], *optional)


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
        self._spread: Tensor | None = None
        self.narrow = False

    def keep(self, sites: Tensor) -> "MultinomialLoss":
        """The problems of some of the sites."""
        kept = copy.copy(self)
        kept.blocks = [block.keep(sites) for block in self.blocks]
        kept._spread = None if self._spread is None else self._spread[sites]
        return kept

    def widen(self) -> None:
        """Compute all products in float64 from now on."""
        self.blocks = [replace(block, narrow=None) for block in self.blocks]
        self.narrow = False

    def measure(self, point: Evaluation) -> tuple[Tensor, Tensor]:
        """Mean squares of the features, (S, 1, 1, p), and the rounding error of the gradient.

        The latter is that of its terms, which may cancel, (S, L): over examples, by Cauchy's
        inequality. From here on products are in float32 where that is faster.
        """
        squares = point.gradient.new_zeros(point.gradient.shape[0], 1, 1, point.gradient.shape[3])
        terms = torch.zeros_like(point.loss)
        for block, probability in self._examples(point):
            ones = torch.ones_like(block.targets[:, :1, :1])
            squares = squares + ones @ block.features.square().unsqueeze(1)
            terms = terms + block.weighed(probability - block.targets).square().sum((2, 3))
        squares, terms = self.ranks.total(squares / self.total), self.ranks.total(terms)
        size = (_copies(point.gradient) * terms * squares.sum((2, 3)) / self.total).sqrt()
        highest = torch.get_float32_matmul_precision() == "highest"
        long = point.gradient.shape[3] * self.total > LONG
        if self.in_memory and highest and long and not squares.is_cuda:
            self._spread = torch.where(squares > 0, squares, 1.0).sqrt()
            unit = self._spread.squeeze(1)
            self.blocks = [
                replace(block, narrow=(block.features / unit).float()) for block in self.blocks
            ]
            self.narrow = True
        return squares, 8 * torch.finfo(size.dtype).eps * size

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
        penalised = product = self._penalise(direction)
        spread = self._spread if self.narrow else None
        if spread is not None:
            direction = (direction * spread).float()
            product = torch.zeros_like(direction)
        for block, probability in self._examples(point):
            features, probability = self._read(block, probability)
            change = _times(direction, features)
            if direction.shape[2] == 1:
                change = 2 * probability * (1 - probability) * change
            else:
                mean = (probability * change).sum(2, keepdim=True)
                change = probability * (change - mean)
            product = self._add(product, block.weighed(change), features)
        if spread is not None:
            product = penalised + product.double() * spread
        return self.ranks.total(product)

    def average_hessian(self, point: Evaluation, problems: list[tuple[int, int]]) -> Tensor:
        """Hessian of the average class of some problems, (len(problems), p, p).

        H̄ = (1/n) Σ_i ω_i c_i x_i x_iᵀ + l2 I,  c_i = Σ_k p_ik (1 − p_ik) / (K − 1)

        in units of the features' spread where products are in float32.

        It is the Hessian itself for K = 2, and for any K where all classes are equally likely.
        """
        width = point.parameters.shape[3]
        dtype = torch.float32 if self.narrow else torch.float64
        whole = point.parameters.new_zeros(len(problems), width, width, dtype=dtype)
        for block, probability in self._examples(point):
            examples, probability = self._read(block, probability)
            for index, (site, label_set) in enumerate(problems):
                p = probability[site, label_set]
                spread = (p * (1 - p)).sum(0)
                curvature = 2 * spread if len(p) == 1 else spread / (len(p) - 1)
                if block.weights is not None:
                    curvature = curvature * block.weights[site, label_set, 0].to(dtype)
                features = examples[site]
                whole[index] += (features * curvature.unsqueeze(1)).T @ features
        whole /= self.total
        if self._spread is None:
            whole.diagonal(dim1=1, dim2=2)[:, :-1].add_(self.l2)
            return self.ranks.total(whole)
        unit = self._spread[[site for site, _ in problems], 0, 0]
        if not self.narrow:
            whole /= unit.unsqueeze(2) * unit.unsqueeze(1)
        whole.diagonal(dim1=1, dim2=2)[:, :-1].add_(self.l2 / unit[:, :-1].square())
        return whole

    def precondition(self, factor: Tensor, rows: Tensor) -> Tensor:
        """Rows (S, L, C, p) times the inverse of :meth:`average_hessian`, by its factor.

        Args:
            factor: L⁻¹ of it, (S, L, p, p), or a diagonal inverse, (S, L, 1, p).
            rows: of a gradient.
        """
        if factor.shape[2] == 1:
            return rows * factor
        if self._spread is None:
            return (rows @ factor.mT) @ factor
        scaled = (rows / self._spread).to(factor.dtype)
        return ((scaled @ factor.mT) @ factor).double() / self._spread

    def curvature(self, squares: Tensor) -> Tensor:
        """A diagonal Hessian, of whose likelihood these are the entries, (S, 1, 1, p)."""
        return squares + self._penalise(torch.ones_like(squares))

    def as_factor(self, inverse: Tensor) -> Tensor:
        """A diagonal inverse, (S, L, 1, p), in the form of a factor."""
        assert self._spread is not None
        return (inverse.sqrt() * self._spread).float().squeeze(2).diag_embed()

    def patience(self, rows: Tensor) -> float:
        """Products with the Hessian, of rows (S, L, C, p), that cost what a factor does."""
        if not self.narrow:
            return PATIENCE
        count, width = rows.shape[2:]
        n = sum(block.features.shape[1] for block in self.blocks)
        # Narrow products wait for memory: with one row they reach a sixth of the speed of wide
        # ones, with ten a half; beyond the processor's cache, half of that.
        speed = (count + 1) / (count + 11) / (2 if n * width > CACHED else 1)
        return width * (1 + width / (2 * n)) / (2 * count) * speed

    def _read(self, block: Block, probability: Tensor) -> tuple[Tensor, Tensor]:
        """Features and probabilities as products with the Hessian read them."""
        if block.narrow is None:
            return block.features, probability
        return block.narrow, probability.float()

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
    patience = loss.patience(zero)
    finished: list[tuple[Tensor, Minimum]] = []
    while True:
        running = (state.point.size > state.goal) & ~state.stuck
        running &= state.iterations < max_iterations
        stale = running & (state.spent > patience)
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
        if loss.narrow and bool((state.stuck | (state.iterations == NARROW_STEPS)).any()):
            loss.widen()
            state = replace(state, stuck=torch.zeros_like(state.stuck))
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
    squares, rounding = loss.measure(point)
    sites, label_sets, rows = zero.shape[:3]
    # With all classes equally likely the curvature does not depend on the labels.
    if loss.patience(zero) > FROM_THE_START:
        factor = 1 / loss.curvature(squares / max(2, rows))
    else:
        every = [(site, 0) for site in range(sites)]
        factor = _factor(loss.average_hessian(point, every)).unsqueeze(1)
    return _State(
        site=torch.arange(sites, device=zero.device),
        point=point,
        start=point.size,
        rounding=rounding,
        goal=torch.maximum(tolerance * point.size, rounding),
        iterations=torch.zeros_like(point.loss, dtype=torch.long),
        stuck=torch.zeros_like(point.loss, dtype=torch.bool),
        factor=factor.repeat(1, label_sets, 1, 1),
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
        # safe, and a smaller gradient is the progress that counts. Elsewhere it is none: far out
        # gradients are bounded, and may be smaller where the loss is a thousand times as large.
        enough = trial.loss <= point.loss + ARMIJO * length * slope
        level = trial.loss <= (1 + LEVEL) * point.loss
        enough |= level & (trial.size < 0.5 * point.size)
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
    if loss.narrow:
        # What the goal does not ask for would be computed in vain.
        target = torch.maximum(target, ENOUGH * state.goal / point.size)
    residual = -point.gradient
    target = target * _norm(residual)
    step = torch.zeros_like(residual)
    solved = loss.precondition(state.factor, residual)
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
        solved = loss.precondition(state.factor, residual)
        before, product = product, _dot(residual, solved)
        ratio = torch.where(running, product / before, 0.0)[..., None, None]
        direction = torch.addcmul(solved, ratio, direction)
    if loss.narrow and step.shape[2] > 1:
        # A shift of all classes is nothing but rounding.
        step = step - step.mean(2, keepdim=True)
    return step, spent


def _renew(loss: MultinomialLoss, state: _State, stale: list[tuple[int, int]]) -> _State:
    """Preconditioners of the stale problems from where they are now."""
    if not stale:
        return state
    where = tuple(torch.tensor(stale, device=state.spent.device).T)
    factor, spent = state.factor, state.spent.clone()
    if factor.shape[2] == 1:
        factor = loss.as_factor(factor)
    factor[where] = _factor(loss.average_hessian(state.point, stale)).to(factor.dtype)
    spent[where] = 0
    return replace(state, factor=factor, spent=spent)


def _factor(matrices: Tensor) -> Tensor:
    """L⁻¹ of symmetric matrices L Lᵀ: two products with it cost less than two triangular solves.

    L⁻ᵀ L⁻¹ is positive definite whatever the rounding, as a preconditioner must be.
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    ridge = 1e-12 if matrices.dtype == torch.float64 else 1e-6
    diagonal.add_(ridge * diagonal.amax(1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(matrices)
    scale = diagonal.clamp_min(1e-300).sqrt().diag_embed()
    factor = torch.where((failed > 0)[:, None, None], scale, factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    # Triangular solves return columns in memory order; products are faster with rows.
    return inverse.contiguous()


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
