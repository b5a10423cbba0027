"""Activations and labels that do not fit into memory, gone through once a pass."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import BatchError, LabelError, LRQPError, WidthError, check_finite
from lrqp_torch.probes.multinomial import Block, encode
from lrqp_torch.probes.problems import check_batch, check_counts, named

Batches = Iterable[tuple[Tensor, Tensor]] | Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Pairs of activations (m, d) and their labels (m,), to be gone through again and again."""

ROUNDING = 1e-9
"""Relative size below which sums over all examples may differ between two passes."""


class Passes:
    """The blocks of one probe's likelihood, read anew whenever they are iterated over.

    One pass at the start checks everything and finds the mean. Every later one must give the same
    examples, in whatever order and batches.

    Args:
        batches: pairs of activations and labels.
        n_classes: K; default the largest label + 1.
        device: where to compute; default the device of the first batch.

    Raises:
        BatchError: batches that can be gone through only once, or that are no pairs.
        WidthError, NonFiniteError, LabelError: as of :meth:`~lrqp_torch.LinearProbe.fit`.
    """

    def __init__(
        self,
        batches: Batches,
        n_classes: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(batches, Iterator):
            raise BatchError(
                f"batches must be gone through many times, and a {type(batches).__name__} can be "
                f"only once; give a list, a DataLoader, or a function that returns a new one"
            )
        self._batches = batches
        self.width, self.device, self.dtype = 0, device, torch.float32
        self.n_samples, total, counts = self._first_pass()
        if self.n_samples == 0:
            raise LabelError("no examples to fit a probe on")
        self.mean = total / self.n_samples
        self.n_classes = check_counts(counts, n_classes)
        self._sums: Tensor | None = None

    def _first_pass(self) -> tuple[int, Tensor, Tensor]:
        """Number of examples, their sum (d,), and how many are of each class."""
        self._own_samples = 0
        total = counts = torch.zeros(0)
        for number, (x, labels) in enumerate(self._pairs()):
            if number == 0:
                self.width, self.device, self.dtype = x.shape[1], self.device or x.device, x.dtype
                total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
                counts = torch.zeros(0, dtype=torch.long, device=labels.device)
            try:
                check_finite(x)
            except LRQPError as error:
                raise named(error, f"batch {number}") from error
            self._own_samples += len(x)
            total += x.to(total).sum(0)
            most = max(len(counts), int(labels.max()) + 1 if len(labels) else 0)
            longer = torch.bincount(labels, minlength=most)
            longer[: len(counts)] += counts.to(longer.device)
            counts = longer
        return self._own_samples, total, counts

    def __iter__(self) -> Iterator[Block]:
        sums = self.mean.new_zeros(1, self.width + 1)
        squares = self.mean.new_zeros(())
        seen = 0
        for number, (x, labels) in enumerate(self._pairs()):
            if len(labels) and int(labels.max()) >= self.n_classes:
                raise BatchError(
                    f"batch {number} holds label {int(labels.max())}, which the first pass did "
                    f"not; {_SAME}"
                )
            centred = x.to(self.mean) - self.mean
            features = torch.cat([centred, centred.new_ones(len(x), 1)], 1)
            targets = encode(labels.to(self.mean.device), self.n_classes)
            yield Block(features.unsqueeze(0), targets.unsqueeze(0).unsqueeze(0))
            seen += len(x)
            sums = sums + targets @ features
            squares = squares + features.square().sum()
        if seen != self._own_samples:
            raise BatchError(
                f"the batches gave {self._own_samples} examples on the first pass and {seen} on a "
                f"later one; {_SAME}"
            )
        # Sums of each class tell whether any activation or label changed, in whatever order.
        if self._sums is None:
            self._sums = sums
        change = torch.linalg.vector_norm(sums - self._sums)
        if bool(change > ROUNDING * (seen * squares).sqrt()):
            raise BatchError(f"the activations or the labels changed between passes; {_SAME}")

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._batches() if callable(self._batches) else self._batches
        for number, pair in enumerate(batches):
            x, labels = _unpack(pair, number)
            try:
                labels = check_batch(x, labels)
            except LRQPError as error:
                raise named(error, f"batch {number}") from error
            if self.width and x.shape[1] != self.width:
                raise WidthError(
                    f"batch {number} has width {x.shape[1]}, the ones before {self.width}"
                )
            yield x.detach(), labels


_SAME = "every pass must give the same examples, so do not sample or shuffle labels in it"


def _unpack(pair: Any, number: int) -> tuple[Tensor, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Tensor):
        raise BatchError(
            f"batch {number} must be a pair of activations (m, d) and labels (m,), both tensors, "
            f"got {type(pair).__name__}"
        )
    return pair[0], pair[1]
