"""Fitting probes on many ranks: many probes divided among them, or one to the data of all."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.errors import WidthError
from lrqp_torch.probes.in_memory import Options, fit_passes
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.probes.multinomial import MultinomialLoss, Point
from lrqp_torch.probes.streamed import Batches, Passes

Key = TypeVar("Key", bound=Hashable)


def fit_many(
    problems: Mapping[Key, tuple[Tensor, Tensor]],
    *,
    ranks: Ranks,
    l2: float | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
) -> dict[Key, LinearProbe]:
    """:meth:`LinearProbe.fit_many`, each rank fitting some of the probes; all of them on each.

    Label sets on the same activations stay on one rank, which factorises them once.

    Args:
        problems: name of a probe to its activations (n, d) and classes (n,), the same on all ranks.
        ranks: this process among the others.
        l2: as there, like the other arguments.
        tolerance: as there.
        max_iterations: as there.

    Raises:
        WidthError, NonFiniteError, LabelError, ConvergenceError: as there, on the first rank that
            fits such a probe.
        ToldError: on the other ranks.
    """
    sites: dict[int, list[Key]] = {}
    for name, (x, _) in problems.items():
        sites.setdefault(x.data_ptr(), []).append(name)

    def fit(mine: list[list[Key]]) -> dict[Key, LinearProbe]:
        return LinearProbe.fit_many(
            {name: problems[name] for names in mine for name in names},
            l2=l2,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    probes = ranks.divide(list(sites.values()), fit, "cpu")
    return {name: probes[name].to(x.device) for name, (x, _) in problems.items()}


def fit_batches(
    batches: Batches,
    *,
    ranks: Ranks,
    l2: float | None = None,
    n_classes: int | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
    device: torch.device | str | None = None,
) -> LinearProbe:
    """:meth:`LinearProbe.fit_batches` over the batches of all ranks together.

    Each rank passes over its own batches only. Loss, gradient and products with the Hessian are
    sums over examples, which are added up over the ranks; every rank then takes the same step, and
    gets the same probe bit for bit. The ranks must compute alike, so on devices of one kind.

    Args:
        batches: this rank's pairs of activations (m, d) and classes (m,), as there; may be none.
        ranks: this process among the others.
        l2: penalty on W; default 1/n, n the examples of all ranks.
        n_classes: K; default the largest label on any rank + 1. Not every class need occur here.
        tolerance: as there.
        max_iterations: as there.
        device: as there.

    Raises:
        BatchError, WidthError, NonFiniteError, LabelError, ConvergenceError: as there.
        ToldError: one of these on another rank, in the first pass.
        RankError: another rank has ended.
    """
    data = SharedPasses(ranks, batches, n_classes, device)
    options = Options(l2, tolerance, max_iterations)
    found, dtype = fit_passes(data, options, partial(SharedLoss, ranks))
    return LinearProbe._of(found, dtype)


class SharedPasses(Passes):
    """This rank's blocks; number of examples, mean and classes are those of all ranks."""

    def __init__(
        self,
        ranks: Ranks,
        batches: Batches,
        n_classes: int | None,
        device: torch.device | str | None,
    ) -> None:
        self.ranks = ranks
        super().__init__(batches, n_classes, device)

    def _first_pass(self) -> tuple[int, Tensor, Tensor]:
        with self.ranks.together():
            n_samples, total, counts = super()._first_pass()
        found = self.ranks.gather((n_samples, self.width, self.dtype, counts.tolist()))
        present = [(width, dtype) for _, width, dtype, _ in found if width]
        if len(set(present)) > 1:
            raise WidthError(f"the ranks hold activations of different width or dtype: {present}")
        if not present:
            return 0, total, counts
        (self.width, self.dtype) = present[0]
        self.device = self.device or "cpu"
        if n_samples == 0:
            total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        whole = torch.zeros(max(len(counts) for *_, counts in found), dtype=torch.long)
        for *_, part in found:
            whole[: len(part)] += torch.tensor(part, dtype=torch.long)
        return sum(n for n, *_ in found), self.ranks.total(total), whole


class SharedLoss(MultinomialLoss):
    """The likelihood of the examples of all ranks: each sums over its own, and the sums are added.

    Args:
        ranks: this process among the others.
        blocks: this rank's examples.
        n_samples: n, on all ranks together.
        l2: the penalty.
        in_memory: as there.
    """

    def __init__(
        self, ranks: Ranks, blocks: Any, *, n_samples: int, l2: float, in_memory: bool
    ) -> None:
        # The penalty belongs into the sum once.
        own = l2 if ranks.is_main else 0.0
        super().__init__(blocks, n_samples=n_samples, l2=own, in_memory=in_memory)
        self.ranks = ranks

    def evaluate(self, parameters: Tensor) -> Point:
        """Loss and gradient, in one pass over the blocks."""
        own = super().evaluate(parameters)
        loss, gradient = self.ranks.total(own.loss), self.ranks.total(own.gradient)
        copies = 2 if parameters.shape[2] == 1 else 1
        size = copies**0.5 * torch.linalg.vector_norm(gradient, dim=(2, 3))
        return replace(own, loss=loss, gradient=gradient, size=size)

    def hessian(self, point: Point, direction: Tensor) -> Tensor:
        """The Hessian times a direction, (S, L, C, p)."""
        return self.ranks.total(super().hessian(point, direction))

    def average_hessian(self, point: Point, problems: list[tuple[int, int]]) -> Tensor:
        """Hessian of the average class of some problems, (len(problems), p, p)."""
        return self.ranks.total(super().average_hessian(point, problems))

    def rounding(self, point: Point) -> Tensor:
        """Rounding error of the gradient's norm, (S, L): at most √size times that of one rank."""
        return self.ranks.total(super().rounding(point))
