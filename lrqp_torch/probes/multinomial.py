"""The L2-penalised multinomial likelihood of many probes at once, with its derivatives.

A stack of problems has S data matrices ("sites") of one shape, and L label sets for each, all with
K classes. Parameters are (S, L, C, p): a row of p numbers for each class, the last of them the
bias, read by a constant feature. Rows of classes come first because narrow products are fastest
when the long dimension is the last.

For K = 2 one row is enough, C = 1: Σ_k ∂/∂w_k = l2 Σ_k w_k = 0 at the optimum, so w_0 = −w_1, and
the row of class 1 stands for both. Otherwise C = K.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Block:
    """Some of the examples of all problems.

    Attributes:
        features: (S, m, p), float64; the last feature is 1.
        targets: 1 where an example is of a class, else 0, (S, L, C, m), float64.
    """

    features: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Point:
    """The likelihood at one setting of the parameters.

    Attributes:
        parameters: (S, L, C, p).
        loss: in nats per example, penalty included, (S, L).
        gradient: (S, L, C, p).
        size: Euclidean norm of the gradient with respect to all K rows, (S, L).
        probability: class probabilities (S, L, C, m) of each block; None where blocks are read
            anew in every pass, and probabilities with them.
    """

    parameters: Tensor
    loss: Tensor
    gradient: Tensor
    size: Tensor
    probability: list[Tensor] | None

    def keep(self, sites: Tensor) -> "Point":
        """The point of some of the sites."""
        kept = None if self.probability is None else [p[sites] for p in self.probability]
        rest = {
            name: getattr(self, name)[sites] for name in ("parameters", "loss", "gradient", "size")
        }
        return replace(self, probability=kept, **rest)

    def where(self, chosen: Tensor, other: "Point") -> "Point":
        """This point for the chosen problems, (S, L), the other one elsewhere."""

        def mix(own: Tensor, others: Tensor) -> Tensor:
            return torch.where(chosen.view(*chosen.shape, *(1,) * (own.ndim - 2)), own, others)

        kept = None
        if self.probability is not None and other.probability is not None:
            kept = [mix(*pair) for pair in zip(self.probability, other.probability, strict=True)]
        rest = {
            name: mix(getattr(self, name), getattr(other, name))
            for name in ("parameters", "loss", "gradient", "size")
        }
        return Point(probability=kept, **rest)


def rows_of(n_classes: int) -> int:
    """C, the rows of parameters that K classes need."""
    return 1 if n_classes == 2 else n_classes


def encode(labels: Tensor, n_classes: int) -> Tensor:
    """Targets (..., C, n) in float64 of labels (..., n)."""
    if n_classes == 2:
        return labels.double().unsqueeze(-2)
    return torch.nn.functional.one_hot(labels, n_classes).double().mT.contiguous()


class MultinomialLoss:
    """(1/n) Σ_i −log softmax(W x_i + b)[y_i] + (l2/2) ‖W‖², one for each problem of a stack.

    Args:
        blocks: the examples, in one block or in many; gone through in every evaluation and in
            every product with the Hessian.
        n_samples: n, in all blocks together.
        l2: the penalty.
        in_memory: the blocks stay in memory, and so may the probabilities of their examples.
    """

    def __init__(
        self, blocks: Iterable[Block], *, n_samples: int, l2: float, in_memory: bool
    ) -> None:
        self.blocks, self.n_samples, self.l2, self.in_memory = blocks, n_samples, l2, in_memory
        self._penalty: Tensor | None = None

    def keep(self, sites: Tensor) -> "MultinomialLoss":
        """The problems of some of the sites."""
        blocks = [Block(b.features[sites], b.targets[sites]) for b in self.blocks]
        return MultinomialLoss(
            blocks, n_samples=self.n_samples, l2=self.l2, in_memory=self.in_memory
        )

    def evaluate(self, parameters: Tensor) -> Point:
        """Loss and gradient, in one pass over the blocks."""
        classes = 2 if parameters.shape[2] == 1 else parameters.shape[2]
        # The row of class 1 stands for two rows, of opposite sign.
        copies = classes / parameters.shape[2]
        penalised = self._penalise(parameters)
        loss = copies * (parameters * penalised).sum((2, 3)) / 2
        gradient = penalised
        kept: list[Tensor] = []
        for block in self.blocks:
            logits = _times(parameters, block.features)
            probability = _probability(logits)
            likelihood = _negative_log_likelihood(logits, block.targets)
            loss = loss + likelihood / self.n_samples
            gradient = self._add(gradient, probability - block.targets, block.features)
            if self.in_memory:
                kept.append(probability)
        size = copies**0.5 * torch.linalg.vector_norm(gradient, dim=(2, 3))
        return Point(parameters, loss, gradient, size, kept if self.in_memory else None)

    def slope(self, point: Point, direction: Tensor) -> Tensor:
        """Derivative of the loss along a direction, (S, L)."""
        copies = 2 if direction.shape[2] == 1 else 1
        return copies * (point.gradient * direction).sum((2, 3))

    def hessian(self, point: Point, direction: Tensor) -> Tensor:
        """The Hessian times a direction, (S, L, C, p)."""
        product = self._penalise(direction)
        for block, probability in self._examples(point):
            change = _times(direction, block.features)
            if direction.shape[2] == 1:
                change = 2 * probability * (1 - probability) * change
            else:
                mean = (probability * change).sum(2, keepdim=True)
                change = probability * (change - mean)
            product = self._add(product, change, block.features)
        return product

    def average_hessian(self, point: Point, problems: list[tuple[int, int]]) -> Tensor:
        """Hessian of the average class of some problems, (len(problems), p, p).

        H̄ = (1/n) Σ_i ω_i x_i x_iᵀ + l2 I,  ω_i = Σ_k p_ik (1 − p_ik) / (K − 1)

        It is the Hessian itself for K = 2, and for any K where all classes are equally likely.
        """
        width = point.parameters.shape[3]
        total = point.parameters.new_zeros(len(problems), width, width)
        for block, probability in self._examples(point):
            for index, (site, label_set) in enumerate(problems):
                p = probability[site, label_set]
                spread = (p * (1 - p)).sum(0)
                weight = 2 * spread if len(p) == 1 else spread / (len(p) - 1)
                features = block.features[site]
                total[index] += (features * weight.unsqueeze(1)).T @ features
        total /= self.n_samples
        total.diagonal(dim1=1, dim2=2)[:, :-1].add_(self.l2)
        return total

    def rounding(self, point: Point) -> Tensor:
        """Rounding error of the gradient's norm: that of its terms, which may cancel, (S, L)."""
        terms = torch.zeros_like(point.gradient)
        for block, probability in self._examples(point):
            residual = (probability - block.targets).abs()
            terms = self._add(terms, residual, block.features.abs())
        copies = 2 if terms.shape[2] == 1 else 1
        size: Tensor = copies**0.5 * torch.linalg.vector_norm(terms, dim=(2, 3))
        return 8 * torch.finfo(terms.dtype).eps * size

    def _penalise(self, parameters: Tensor) -> Tensor:
        """Gradient of the penalty, which leaves the bias out."""
        if self._penalty is None:
            self._penalty = parameters.new_full((parameters.shape[-1],), self.l2)
            self._penalty[-1] = 0.0
        return self._penalty * parameters

    def _add(self, rows: Tensor, values: Tensor, features: Tensor) -> Tensor:
        """(S, L, C, p) plus 1/n Σ over examples of values (S, L, C, m) times their features."""
        total: Tensor = torch.baddbmm(
            rows.flatten(1, 2), values.flatten(1, 2), features, alpha=1 / self.n_samples
        )
        return total.view_as(rows)

    def _examples(self, point: Point) -> Iterator[tuple[Block, Tensor]]:
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
    if logits.shape[2] == 1:
        # log(1 + e^−m), m the margin of the true class; beyond the threshold torch returns −m.
        terms = softplus(2 * (1 - 2 * targets) * logits, threshold=40)
    else:
        terms = -targets * logits.log_softmax(2)
    total: Tensor = terms.sum((2, 3))
    return total
