"""The L2-penalised multinomial likelihood of many probes at once, and its minimum.

A stack of problems has S data matrices ("sites") of one shape, and L label sets for each, all with
K classes. Parameters are (S, L, C, p): a row of p numbers for each class, the last of them the
bias, read by a constant feature. Rows of classes come first because narrow products are fastest
when the long dimension is the last.

For K = 2 one row is enough, C = 1: Σ_k ∂/∂w_k = l2 Σ_k w_k = 0 at the optimum, so w_0 = −w_1, and
the row of class 1 stands for both. Otherwise C = K.

The minimum is found by a Newton–conjugate-gradient method. Each Newton step solves H s = −∇ by
conjugate gradients to a tolerance that tightens with the gradient (Nocedal and Wright 2006,
algorithm 7.1). Their preconditioner is the Hessian's diagonal, about: that of the average class
with the average curvature. Where classes separate this is the best there is, since most examples
have no curvature left and the penalty is most of the Hessian. Where it is not, a factor pays, of
the Hessian of the average class, or of large problems with more examples than parameters of that of
each class: it is made, and made anew, when conjugate gradients have cost as much as it does, so
that neither a factor that is not needed nor one that is missed ever doubles the cost.

Loss and gradient are in float64. Of large problems in memory on a CPU conjugate gradients and the
factor, which decide how fast and never where the search ends, are in float32; what does not
converge so goes on in float64. A step is then as long as is best along it, which costs no product
with the features: the logits change by as much of its own. Classes that nearly separate have their
optimum far out, where steps of length 1 gain a factor of e each.

On a CPU with a C compiler the whole search is compiled (newton.c), one problem after another. There
conjugate gradients end by what the quadratic model gains, which knows no units: of activations with
outsized coordinates these decide the gradient's norm.
Elsewhere all problems of a stack move together, each with its own step length and its own end. On a
GPU the host waits for the device a few times in a Newton step, never once for every conjugate
gradient.
"""

import copy
import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.files import load_compiled

ALONE: Final = Ranks()
"""A run of one process."""

MAX_CG_STEPS = 500
ARMIJO = 1e-4
ENOUGH = 0.3
"""What share of the goal a Newton step leaves by its conjugate gradients."""
SHORTEST_STEP = 1e-10
LEVEL = 1e-10
"""Relative change of the loss that may be rounding."""
LENGTHS, CLOSE = 8, 0.03
"""Lengths of a step that are tried for the best one, and how near it is near enough."""
SETTLED = 1e-9
"""Slope along a Newton step, over the loss, below which its length is 1."""
FORCING, POWER = 0.2, 0.4
"""Conjugate gradients in float32 leave this share of a gradient at most, and this power of what
share of the gradient at zero it is."""
FEW = 0.1
"""Compiled conjugate gradients end where the last gained less than this share, by the number of
them, of what all gained; or than the root of that over the loss."""
FACTORS = 4
"""Numbers in the factors of the classes, for each of the features, at most."""
PATIENCE = 8
"""Products with the Hessian before a factor is made, or made anew, at least."""
SHARED = 30
"""Products a label set that the factor at the start, which all of a site share, may cost."""
LONG = 2**18
"""Features of all examples, times the rows of parameters, from which on a product costs more than
calling it."""
STRIPS, STRIPED = 4, 256
"""In how many products a symmetric matrix is made, and from which width on."""
CACHED = 2**22
"""Numbers in float32 that a processor's cache holds, about."""
LINE = 16
"""Features of a compiled search come in multiples of this, so that vectors are full."""
CLASSES, CALLS = 64, 2**23
"""Rows of parameters up to which a search is compiled; multiplications that a call for a factor
costs it."""
HUGE = 1e30
"""Mean square of a feature from which on float32 may not hold what is made of it."""
NARROW_STEPS = 60
"""Newton steps with products in float32; most searches take 10 to 25 in all."""


@dataclass(frozen=True)
class Block:
    """Some of the examples of all problems."""

    features: Tensor  # (S, m, p), float64; the last feature is 1
    targets: Tensor  # 1 where an example is of a class, else 0, (S, L, C, m), float64
    # Of the examples, (S, L, 1, m), float64; None if each counts once.
    weights: Tensor | None = None
    # The features for products with the Hessian, (S, p, m), float32; examples come last, which is
    # up to twice as fast.
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
    curvature: Tensor  # of the likelihood in the logits, on average, (S, L)
    # Logits and class probabilities (S, L, C, m) of each block; None where blocks are read anew in
    # every pass, and these with them.
    examples: list[tuple[Tensor, Tensor]] | None

    def each(self, change: Callable[..., Tensor], *others: "Evaluation") -> "Evaluation":
        """Every tensor changed, together with those of other points."""
        points = (self, *others)
        held = [point.examples for point in points if point.examples is not None]
        changed = {
            name: change(*(getattr(point, name) for point in points))
            for name in ("parameters", "loss", "gradient", "size", "curvature")
        }
        blocks = zip(*held, strict=True)
        kept = [(change(*z), change(*p)) for z, p in (zip(*b, strict=True) for b in blocks)]
        return Evaluation(**changed, examples=kept if held else None)

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
        # The features' mean squares, (S, 1, 1, p), and whether products with them are in float32.
        self.squares = torch.zeros(0)
        self.narrow = False

    def keep(self, sites: Tensor) -> "MultinomialLoss":
        """The problems of some of the sites."""
        kept = copy.copy(self)
        kept.blocks = [block.keep(sites) for block in self.blocks]
        kept.squares = self.squares[sites]
        return kept

    def widen(self) -> None:
        """Compute all products in float64 from now on."""
        self.blocks = [replace(block, narrow=None) for block in self.blocks]
        self.narrow = False

    def measure(self, point: Evaluation) -> Tensor:
        """The rounding error of the gradient's terms, which may cancel, (S, L).

        Over examples, by Cauchy's inequality. From here on products are in float32 where that is
        faster.
        """
        squares = point.gradient.new_zeros(point.gradient.shape[0], 1, 1, point.gradient.shape[3])
        terms = torch.zeros_like(point.loss)
        for block, probability in self._examples(point):
            ones = torch.ones_like(block.targets[:, :1, :1])
            squares = squares + ones @ block.features.square().unsqueeze(1)
            terms = terms + block.weighed(probability - block.targets).square().sum((2, 3))
        self.squares, terms = self.ranks.total(squares / self.total), self.ranks.total(terms)
        size = (_copies(point.gradient) * terms * self.squares.sum((2, 3)) / self.total).sqrt()
        narrow = self.in_memory and narrows(self.count(), point.gradient) and not squares.is_cuda
        if narrow and bool((squares < HUGE).all()):
            self.narrow = True
            self.blocks = [
                replace(block, narrow=block.features.mT.float().contiguous())
                for block in self.blocks
            ]
        return 8 * torch.finfo(size.dtype).eps * size

    def logits(self, parameters: Tensor) -> list[Tensor] | None:
        """Those of each block, (S, L, C, m); None where products are in float64."""
        if not self.narrow:
            return None
        return [_times(parameters, block.features) for block in self.blocks]

    def evaluate(self, parameters: Tensor, logits: list[Tensor] | None = None) -> Evaluation:
        """Loss and gradient, in one pass over the blocks, whose logits may be known."""
        copies = _copies(parameters)
        penalised = self._penalise(parameters)
        loss = copies * (parameters * penalised).sum((2, 3)) / 2
        gradient, curvature = penalised, torch.zeros_like(loss)
        kept: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(self.blocks):
            z = _times(parameters, block.features) if logits is None else logits[number]
            probability = _probability(z)
            likelihood = block.weighed(_negative_log_likelihood(z, block.targets))
            loss = loss + likelihood.sum((2, 3)) / self.total
            residual = block.weighed(probability - block.targets)
            gradient = self._add(gradient, residual, block.features)
            curvature = curvature + block.weighed(_curvature(probability)).sum((2, 3))
            if self.in_memory:
                kept.append((z, probability))
        curvature = curvature / (self.total * parameters.shape[2])
        loss, curvature = self.ranks.total(torch.stack([loss, curvature]))
        gradient = self.ranks.total(gradient)
        size = copies**0.5 * _norm(gradient)
        examples = kept if self.in_memory else None
        return Evaluation(parameters, loss, gradient, size, curvature, examples)

    def slope(self, point: Evaluation, direction: Tensor) -> Tensor:
        """Derivative of the loss along a direction, (S, L)."""
        return _copies(direction) * _dot(point.gradient, direction)

    def best_length(self, point: Evaluation, step: Tensor, changes: list[Tensor]) -> Tensor:
        """About what multiple of a step has the least loss, (S, L), by Newton's method from 1.

        Args:
            point: where the step starts.
            step: (S, L, C, p).
            changes: of the logits along it.
        """
        assert point.examples is not None
        penalised, length = self._penalise(step), torch.ones_like(point.loss)
        start, bend = _dot(penalised, point.parameters), _dot(penalised, step)
        # At the optimum the slope is below its rounding, and the full step the best.
        waiting = self.slope(point, step).abs() > SETTLED * point.loss
        for number in range(LENGTHS):
            first, second = start + length * bend, bend
            for block, (z, _), change in zip(self.blocks, point.examples, changes, strict=True):
                p = _probability(torch.addcmul(z, length[..., None, None], change))
                part = block.weighed(change) / self.total
                first = first + _dot(part, p - block.targets)
                second = second + _dot(part, _bend(p) * _reduced(p, change))
            longer = (-first / second).nan_to_num(0.0).clamp(-length / 2, 2 * length)
            length = torch.where(waiting, length + longer, length)
            waiting = waiting & (longer.abs() > CLOSE * length)
            if _may_ask(number, step) and not bool(waiting.any()):
                break
        return length

    def hessian(self, point: Evaluation) -> Callable[[Tensor], Tensor]:
        """What multiplies rows (S, L, C, p) by the Hessian at a point."""
        kept = None if point.examples is None else list(self.bends(point))

        def times(rows: Tensor) -> Tensor:
            product = self._penalise(rows)
            for block, features, probability, bend in kept or self.bends(point):
                change = bend * _reduced(probability, _times(rows, features))
                product = self._add(product, block.weighed(change), features)
            return self.ranks.total(product)

        return times

    def parts(self, rows: Tensor) -> int:
        """R, how many Hessians stand for that of rows (S, L, C, p).

        Each class's own, C, of large problems, and where they hold not many more numbers than the
        features; else their average.
        """
        (count, width), n = rows.shape[2:], self.count() if self.in_memory else 0
        return 1 if count * width > FACTORS * n or not is_long(n, rows) else int(count)

    def class_hessians(
        self, point: Evaluation, problems: list[tuple[int, int]], parts: int
    ) -> Tensor:
        """Hessians of the classes of some problems, (len(problems), R, p, p).

        H_k = (1/n) Σ_i ω_i c_ik x_i x_iᵀ + l2 I,  c_ik = K/(K − 1) p_ik (1 − p_ik)

        of each class, or of their average for R = 1. It is the Hessian itself for K = 2, and for
        any K where all classes are equally likely.
        """
        width = point.parameters.shape[3]
        whole: Tensor | None = None
        for block, examples, probability, _ in self.bends(point):
            bend = _curvature(probability)
            curvature = block.weighed(bend if parts > 1 else bend.mean(2, keepdim=True))
            some = _grams(examples, curvature, problems)
            whole = some if whole is None else whole.add_(some)
        if whole is None:
            whole = point.parameters.new_zeros(len(problems), parts, width, width)
        whole /= self.total
        whole.diagonal(dim1=2, dim2=3).add_(self._penalise(torch.ones_like(whole[0, 0, 0])))
        return self.ranks.total(whole)

    def diagonal(self, point: Evaluation) -> Tensor:
        """About that of the Hessian at a point, of an average class and example, (S, L, 1, p)."""
        # Of all ranks, which would else take different steps.
        penalty = self.ranks.total(self._penalise(torch.ones_like(self.squares)))
        return torch.addcmul(penalty, point.curvature[..., None, None], self.squares)

    def patience(self, rows: Tensor, parts: int, *, compiled: bool = False) -> float:
        """Products with the Hessian, of rows (S, L, C, p), that cost what R factors do."""
        if not self.in_memory:
            return PATIENCE * parts
        count, width = rows.shape[2:]
        n = self.count()
        # Narrow products wait for memory: with one row they reach a sixth of the speed of wide
        # ones, with ten a half; compiled, a half and all of it, and of many classes a factor is
        # worth half as much, since it is that of their average; beyond the cache half of that.
        speed = 2 * count / (count + 3) if compiled else (count + 1) / (count + 11)
        speed /= 2 if n * width > CACHED else 1
        cost = width * (1 + width / (2 * n)) / (2 * count) * speed
        if compiled:
            cost += CALLS / (n * width * count)
        return max(PATIENCE, parts * cost)

    def shares(self, zero: Tensor) -> bool:
        """Whether the label sets of parameters (S, L, C, p) share a factor at the start.

        With all classes equally likely the curvature does not depend on them, nor on the labels.
        """
        return zero.shape[1] > 1 and self.patience(zero, 1) <= SHARED * zero.shape[1]

    def count(self) -> int:
        """How many examples there are, in memory."""
        return sum(block.features.shape[1] for block in self.blocks)

    def bends(self, point: Evaluation) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
        """Each block, and its features, probabilities and bends as products read them."""
        for block, probability in self._examples(point):
            features = block.features if block.narrow is None else block.narrow.mT
            dtype = features.dtype
            yield block, features, probability.to(dtype), _bend(probability).to(dtype)

    def _penalise(self, parameters: Tensor) -> Tensor:
        """Gradient of the penalty, which leaves the bias out."""
        if self._penalty is None or self._penalty.dtype != parameters.dtype:
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
        if point.examples is not None:
            yield from zip(self.blocks, (p for _, p in point.examples), strict=True)
            return
        for block in self.blocks:
            yield block, _probability(_times(point.parameters, block.features))


def is_long(n: int, rows: Tensor) -> bool:
    """Whether a product of one problem's rows, (C, p), of n examples costs more than calling it."""
    count, width = rows.shape[2:]
    return n * count * width > LONG


def narrows(n: int, rows: Tensor) -> bool:
    """Whether products of rows (S, L, C, p) of n examples are to be in float32 on a CPU."""
    return torch.get_float32_matmul_precision() == "highest" and is_long(n, rows)


def _grams(features: Tensor, weights: Tensor, problems: list[tuple[int, int]]) -> Tensor:
    """Xᵀ diag(c) X of features (S, m, p) for each row c of weights (S, L, R, m) of some problems.

    Returns (len(problems), R, p, p). On a CPU, and from a width on, one after another, by half of
    the products; elsewhere a batch costs as many calls as one.
    """
    width = features.shape[2]
    if width >= STRIPED and not features.is_cuda:
        result = features.new_zeros(len(problems), weights.shape[2], width, width)
        for (site, label_set), matrices in zip(problems, result, strict=True):
            for matrix, row in zip(matrices, weights[site, label_set], strict=True):
                add_symmetric(matrix, features[site] * row.unsqueeze(1), features[site])
                mirror(matrix)
        return result
    sites, label_sets = torch.tensor(problems, device=features.device).T
    whole = [site for site, _ in problems] == list(range(len(features)))
    some = features if whole else features[sites]
    rows = weights[sites, label_sets].unbind(1)
    return torch.stack([(some * row.unsqueeze(2)).mT @ some for row in rows], 1)


def add_symmetric(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, (p, p), which is symmetric, from the diagonal on; see :func:`mirror`."""
    for begin, end in _strips(len(total)):
        total[begin:end, begin:].addmm_(left[:, begin:end].T, right[:, begin:])


def mirror(total: Tensor) -> None:
    """Put what :func:`add_symmetric` left out in its place."""
    for begin, end in _strips(len(total)):
        total[end:, begin:end] = total[begin:end, end:].T


def _strips(width: int) -> Iterator[tuple[int, int]]:
    """Rows of a matrix, of which each strip is a product from the diagonal on."""
    parts = STRIPS if width >= STRIPED else 1
    return pairwise([width * part // parts // 8 * 8 for part in range(parts)] + [width])


def _times(rows: Tensor, features: Tensor) -> Tensor:
    """(S, L, C, p) times the features of each example: (S, L, C, m)."""
    product: Tensor = rows.flatten(1, 2) @ features.mT
    return product.view(*rows.shape[:3], -1)


def _probability(logits: Tensor) -> Tensor:
    # With one row, z_1 − z_0 is twice that of class 1.
    return torch.sigmoid(2 * logits) if logits.shape[2] == 1 else logits.softmax(2)


def _bend(probability: Tensor) -> Tensor:
    """What a change of the logits, reduced, is multiplied by to give that of the probabilities."""
    return 2 * probability * (1 - probability) if probability.shape[2] == 1 else probability


def _curvature(probability: Tensor) -> Tensor:
    """Of each class's likelihood in its logit, K/(K − 1) p (1 − p)."""
    rows = probability.shape[2]
    return (2 if rows == 1 else rows / (rows - 1)) * probability * (1 - probability)


def _reduced(probability: Tensor, change: Tensor) -> Tensor:
    """A change of the logits less its mean over the classes, by their probability."""
    if change.shape[2] == 1:
        return change
    return change - (probability * change).sum(2, keepdim=True)


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
    spent: Tensor
    # Of the Hessians of the classes, (S, L, R, p, p), see _factor, of the problems that have one.
    factor: Tensor
    made: Tensor

    def keep(self, sites: Tensor) -> "_State":
        kept = {f.name: getattr(self, f.name)[sites] for f in fields(self) if f.name != "point"}
        return _State(point=self.point.each(lambda values: values[sites]), **kept)

    def result(self, sites: Tensor) -> Minimum:
        size = self.point.size
        # Of squares that overflow nothing is known.
        told = (size > self.rounding) | ~self.rounding.isfinite()
        relative = torch.where(told, size / self.start, 0.0)
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
    state, parts = _begin(loss, zero, tolerance), loss.parts(zero)
    patience = loss.patience(zero, parts)
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
        state = _renew(loss, state, [(s, k) for s, k in renew.nonzero().tolist()], parts)
        state = _advance(loss, state, running)
        slow = state.stuck | (state.iterations == NARROW_STEPS)
        if loss.narrow and bool(slow.any()):
            loss.widen()
            state = replace(
                state, stuck=torch.zeros_like(state.stuck), factor=state.factor.double()
            )
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
    rounding = loss.measure(point)
    sites, label_sets = zero.shape[:2]
    shared, factor = loss.shares(zero), zero.new_zeros(sites, label_sets, 0)
    if shared:
        made = _factor(loss.class_hessians(point, [(site, 0) for site in range(sites)], parts=1))
        factor = made.unsqueeze(1).expand(-1, label_sets, loss.parts(zero), -1, -1)
    return _State(
        site=torch.arange(sites, device=zero.device),
        point=point,
        start=point.size,
        rounding=rounding,
        goal=torch.maximum(tolerance * point.size, rounding),
        iterations=torch.zeros_like(point.loss, dtype=torch.long),
        stuck=torch.zeros_like(point.loss, dtype=torch.bool),
        spent=torch.zeros_like(point.loss, dtype=torch.long),
        factor=factor,
        made=torch.full_like(point.loss, shared, dtype=torch.bool),
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
    """The point after a step that makes progress, and who found it.

    Of the lengths 1, ½, ¼, … it has the longest that does; in float32, with the best in place of 1.
    """
    slope = loss.slope(point, step)
    length = torch.ones_like(point.loss)
    changes = loss.logits(step)
    if changes is not None:
        length = loss.best_length(point, step, changes)
    waiting, found = running, point
    while True:
        scale = length[..., None, None]
        logits = None
        if changes is not None and point.examples is not None:
            pairs = zip(point.examples, changes, strict=True)
            logits = [torch.addcmul(z, scale, change) for (z, _), change in pairs]
        trial = loss.evaluate(torch.addcmul(point.parameters, scale, step), logits)
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
    point, dtype = state.point, torch.float32 if loss.narrow else torch.float64
    target, left = point.size / state.start, ENOUGH * state.goal / point.size
    # In float32 what the goal does not ask for would be computed in vain.
    target = (
        torch.maximum(target.pow(POWER).clamp_max(FORCING), left)
        if loss.narrow
        else target.sqrt().clamp_max(0.1)
    )
    target = target * _norm(point.gradient)
    residual, diagonal = _centred(-point.gradient.to(dtype)), loss.diagonal(point).to(dtype)
    step, times = torch.zeros_like(residual), loss.hessian(point)
    precondition = _preconditioner(state, diagonal)
    direction = solved = precondition(residual)
    product, spent = _dot(residual, solved), torch.zeros_like(state.spent)
    for number in range(MAX_CG_STEPS):
        running = running & (_norm(residual) > target)
        if _may_ask(number, residual) and not bool(running.any()):
            break
        curved = _centred(times(direction))
        curvature = _dot(direction, curved)
        running = running & (curvature > 0)
        spent += running
        # A problem that has finished stays where it is.
        length = torch.where(running, product / curvature, 0.0)[..., None, None]
        step = torch.addcmul(step, length, direction)
        residual = torch.addcmul(residual, length, curved, value=-1)
        solved = precondition(residual)
        before, product = product, _dot(residual, solved)
        ratio = torch.where(running, product / before, 0.0)[..., None, None]
        direction = torch.addcmul(solved, ratio, direction)
    return step.double(), spent


class _Data(ctypes.Structure):
    """What newton.c is given, and what it finds."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("given", "mean", "features", "targets", "weights")),
        *((name, ctypes.c_void_p) for name in ("parameters", "probability", "factor")),
        *((name, ctypes.c_int64) for name in ("n", "p", "rows", "factors", "most_steps")),
        *((name, ctypes.c_int64) for name in ("most_products", "narrow_steps")),
        *((name, ctypes.c_int64) for name in ("width", "stride", "threads")),
        *((name, ctypes.c_int64) for name in ("given_narrow", "kept_narrow", "kept", "spent")),
        *((name, ctypes.c_double) for name in ("total", "l2", "tolerance", "patience")),
        *((name, ctypes.c_double) for name in ("loss", "size", "start", "rounding")),
        *((name, ctypes.c_int64) for name in ("steps", "is_narrow")),
    ]


_RENEW: Final = ctypes.CFUNCTYPE(ctypes.c_int)


class Examples(NamedTuple):
    """What :func:`minimise_alone` fits to: of the features (x − mean, 1)."""

    x: Tensor  # activations, (n, d)
    mean: Tensor  # (d,), float64
    targets: Tensor  # of each label set, (L, C, n)
    weights: Tensor | None  # of the examples, (1, 1, 1, n)
    total: float  # as `l2`, of :class:`MultinomialLoss`
    l2: float


class _Search:
    """The search for one minimum by newton.c.

    Args:
        of: activations in float32 or float64, and the targets of one label set, (C, n).

    Attributes:
        shared: the factor at the start, which the label sets of a site share, once it is made; None
            if there is none.
    """

    def __init__(self, of: Examples) -> None:
        x, mean, targets, weights, total, l2 = of
        x = x if x.stride(1) == 1 else x.contiguous()
        (n, width), rows = x.shape, len(targets)
        p = -(-(width + 1) // LINE) * LINE
        self.x, self.mean, self.shared = x, mean, cast(list[Tensor] | None, None)
        self.parameters = mean.new_zeros(1, 1, rows, p)
        self.probability = mean.new_empty(n, rows)
        dtype = torch.float32 if narrows(n, self.parameters) else torch.float64
        block = Block(mean.new_empty(1, n, p, dtype=dtype), targets[None, None], weights)
        self.loss = MultinomialLoss([block], total=total, l2=l2, in_memory=True)
        self.block, self.parts = block, self.loss.parts(self.parameters)
        self.factor, self.error = mean.new_empty(0), cast(BaseException | None, None)
        self.data = _Data(n=n, p=p, rows=rows, width=width, stride=x.stride(0))
        self.data.threads, self.data.total, self.data.l2 = torch.get_num_threads(), total, l2
        self.data.given_narrow = x.dtype == torch.float32
        self.data.kept_narrow = block.features.dtype == torch.float32
        self.data.patience = self.loss.patience(self.parameters, self.parts, compiled=True)
        tensors = {
            "given": x,
            "mean": mean,
            "features": block.features,
            "targets": targets,
            "weights": weights,
            "parameters": self.parameters,
            "probability": self.probability,
        }
        for name, tensor in tensors.items():
            setattr(self.data, name, None if tensor is None else tensor.data_ptr())

    def run(self, search: Callable[..., int], tolerance: float, max_iterations: int) -> None:
        """Find it; what is found is in ``parameters`` and ``data``."""
        self.data.tolerance, self.data.most_steps = tolerance, max_iterations
        self.data.most_products, self.data.narrow_steps = MAX_CG_STEPS, NARROW_STEPS
        self.data.spent = 0 if self.shared is None else int(self.data.patience) + 1
        if search(ctypes.byref(self.data), _RENEW(self._renew)):
            raise self.error or MemoryError("no memory to fit a probe in")

    def _renew(self) -> int:
        """Make factors of the Hessian where the search is; 1 where that fails, else 0."""
        shared = None if self.data.steps else self.shared
        if self.data.kept_narrow and not self.data.is_narrow:
            self.loss.blocks = [replace(self.block, features=self._wide())]
        examples = [(self.probability, self.probability.T[None, None])]
        any_ = self.parameters
        point = Evaluation(any_, any_, any_, any_, any_, examples)
        try:
            # With all classes equally likely the Hessian does not depend on the labels.
            if shared:
                (self.factor,) = shared
            else:
                parts = self.parts if shared is None else 1
                hessians = self.loss.class_hessians(point, [(0, 0)], parts)
                self.factor = _factor(hessians)[0].contiguous()
                if shared is not None:
                    shared.append(self.factor)
        except BaseException as error:
            self.error = error
            return 1
        self.data.factor, self.data.factors = self.factor.data_ptr(), len(self.factor)
        return 0

    def _wide(self) -> Tensor:
        """The features in float64."""
        features = self.mean.new_zeros(self.block.features.shape)
        features[..., : len(self.mean)] = self.x - self.mean
        features[..., -1] = 1.0
        return features


@functools.cache
def _compiled() -> Callable[..., int] | None:
    """The search of newton.c; None where there is no compiler."""
    names = (
        "ARMIJO", "LEVEL", "ENOUGH", "SHORTEST_STEP", "LENGTHS", "CLOSE", "SETTLED", "FEW",
        "HUGE",
    )  # fmt: skip
    loaded = load_compiled(
        Path(__file__).with_name("newton.c"), lambda: {name: globals()[name] for name in names}
    )
    return None if loaded is None else loaded.lrqp_minimise


@torch.no_grad()
def minimise_alone(of: Examples, tolerance: float, max_iterations: int) -> Minimum | None:
    """What :func:`minimise` finds, of one site; None where that is not compiled."""
    search, x, mean = _compiled(), of.x, of.mean
    # For many classes the BLAS is faster.
    if search is None or x.device.type != "cpu" or of.targets.shape[1] > CLASSES:
        return None
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    weights = None if of.weights is None else of.weights.contiguous()
    of = of._replace(x=x, mean=mean.contiguous(), weights=weights)
    parameters, found, shared = [], [], cast(list[Tensor], [])
    for own in of.targets:
        one = _Search(of._replace(targets=own.contiguous()))
        if one.loss.shares(one.parameters.expand(-1, len(of.targets), -1, -1)):
            one.shared = shared
        one.run(search, tolerance, max_iterations)
        data = one.data
        told = data.size > data.rounding or not math.isfinite(data.rounding)
        found.append((data.loss, data.size, data.size / data.start if told else 0.0, data.steps))
        parameters.append(one.parameters[..., [*range(x.shape[1]), -1]])
    least, size, relative, steps = mean.new_tensor(found).unsqueeze(0).unbind(2)
    return Minimum(torch.cat(parameters, 1), least, size, relative, steps.long())


def _centred(rows: Tensor) -> Tensor:
    """Rows (S, L, C, p) less their mean over the classes, which is nothing but rounding.

    Left where it is it grows, and is never below what conjugate gradients are to leave.
    """
    return rows if rows.shape[2] == 1 else rows - rows.mean(2, keepdim=True)


def _preconditioner(state: _State, diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies rows (S, L, C, p) by about the inverse of the Hessian.

    Args:
        state: with factors of the problems that have some.
        diagonal: of all Hessians, (S, L, 1, p), for the others.
    """
    inverse, factor = (
        diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).reciprocal(),
        state.factor,
    )

    def times(rows: Tensor) -> Tensor:
        if factor.ndim < 5:
            return _centred(inverse * rows)
        parts = rows.unflatten(2, (factor.shape[2], -1))
        solved = (parts @ factor.mT) @ factor
        return _centred(
            torch.where(state.made[..., None, None], solved.flatten(2, 3), inverse * rows)
        )

    return times


def _renew(
    loss: MultinomialLoss, state: _State, stale: list[tuple[int, int]], parts: int
) -> _State:
    """Factors of the stale problems from where they are now."""
    if not stale:
        return state
    where = tuple(torch.tensor(stale, device=state.spent.device).T)
    made = _factor(loss.class_hessians(state.point, stale, parts))
    factor, spent, known = state.factor, state.spent.clone(), state.made.clone()
    if factor.ndim < 5:
        identity = torch.eye(made.shape[-1], dtype=made.dtype, device=made.device)
        factor = identity.repeat(*spent.shape, parts, 1, 1)
    factor = factor.contiguous()
    factor[where] = made.to(factor.dtype)
    spent[where], known[where] = 0, True
    return replace(state, factor=factor, spent=spent, made=known)


def _factor(matrices: Tensor) -> Tensor:
    """L⁻¹ of symmetric matrices L Lᵀ: two products with it cost less than two triangular solves.

    L⁻ᵀ L⁻¹ is positive definite whatever the rounding, as a preconditioner must be.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.clamp_min(torch.finfo(matrices.dtype).tiny).rsqrt()
    matrices *= scale.unsqueeze(-1)
    matrices *= scale.unsqueeze(-2)
    diagonal.add_(1e-12 if matrices.dtype == torch.float64 else 1e-6)
    found, failed = torch.linalg.cholesky_ex(matrices)
    identity = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device)
    inverse = _inverse(torch.where((failed > 0)[..., None, None], identity, found))
    return inverse * scale.unsqueeze(-2)


def _inverse(factor: Tensor) -> Tensor:
    """L⁻¹ of triangular matrices (..., p, p), by halves: products are faster than solves."""
    width = factor.shape[-1]
    if width < 2 * STRIPED:
        identity = torch.eye(width, dtype=factor.dtype, device=factor.device)
        identity = identity.expand_as(factor)
        solved: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        # Triangular solves return columns in memory order; products are faster with rows.
        return solved.contiguous()
    half = width // 2
    inverse = torch.zeros_like(factor)
    first, second = _inverse(factor[..., :half, :half]), _inverse(factor[..., half:, half:])
    inverse[..., :half, :half], inverse[..., half:, half:] = first, second
    inverse[..., half:, :half] = second @ (factor[..., half:, :half] @ first).neg_()
    return inverse


def _dot(a: Tensor, b: Tensor) -> Tensor:
    total: Tensor = (a * b).sum((2, 3))
    return total


def _norm(a: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(a, dim=(2, 3))
    return size


def _may_ask(number: int, values: Tensor) -> bool:
    """Whether to ask, after so many steps, if all have finished.

    It makes the host wait for a GPU, which is asked ever more rarely: after 1, 2, 4, … steps.
    """
    return not values.is_cuda or number & (number - 1) == 0


def _to_host(*values: Tensor) -> list[Tensor]:
    """Flags on the CPU, all in one transfer."""
    flat = torch.cat([value.flatten() for value in values]).cpu()
    pieces = flat.split([value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]
