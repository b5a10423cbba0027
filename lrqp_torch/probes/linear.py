"""The linear probe: multinomial logistic regression, fitted to its optimum."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from lrqp_torch.errors import LabelError, LRQPError, TargetError, WidthError, as_classes
from lrqp_torch.probes.in_memory import FitReport, Fitted, Options, fit_in_memory, fit_streamed
from lrqp_torch.probes.problems import Problem, check_problem, named
from lrqp_torch.probes.streamed import Batches

BATCH = 4096
"""Rows of stored activations that are read at a time."""

Key = TypeVar("Key", bound=Hashable)


class StoredActivations(Protocol):
    """Activations (n, d) that are read a batch at a time, such as those of an activation store."""

    def batches(self, rows: int, /) -> Iterator[Tensor]:
        """All rows in order, at most so many at a time; anew with every call."""


class LinearProbe(nn.Linear):
    """A linear probe z(x) = W x + b over K classes: an ``nn.Linear`` from d to K.

    Args:
        width: d, the width of the activations.
        n_classes: K ≥ 2.
        device: where the weights live.
        dtype: their dtype; default float32.
    """

    report: FitReport | None = None

    def __init__(
        self,
        width: int,
        n_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if n_classes < 2:
            raise LabelError(f"a probe needs at least 2 classes, got {n_classes}")
        super().__init__(width, n_classes, device=device, dtype=dtype)

    @property
    def width(self) -> int:
        """The width d of the activations that the probe reads."""
        return self.in_features

    @property
    def n_classes(self) -> int:
        """K."""
        return self.out_features

    @classmethod
    def fit(
        cls,
        x: Tensor | StoredActivations,
        y: Tensor,
        *,
        l2: float | None = None,
        n_classes: int | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 200,
    ) -> Self:
        """Fit to the optimum of the L2-penalised multinomial likelihood.

            minimise  (1/n) Σ_i −log softmax(W x_i + b)[y_i]  +  (l2/2) ‖W‖²_F

        The bias is not penalised. The problem is strictly convex in W, so the optimum is one
        point however the data look, separable ones and n < d included. Solved in float64 on x's
        device by a Newton–conjugate-gradient method; the weights are then stored in float32 (in
        float64 when x is), frozen: call ``requires_grad_()`` to train them further.

        Args:
            x: activations, (n, d); or stored ones, which are then read as by :meth:`fit_batches`.
            y: class of each, (n,), integers from 0, or bool.
            l2: penalty on W; default 1/n, which is the usual C = 1.
            n_classes: K; default the largest label + 1. Every class must occur.
            tolerance: bound on the gradient norm, relative to the one at zero.
            max_iterations: Newton steps before giving up.

        Raises:
            WidthError: shapes that do not fit.
            NonFiniteError: NaN or infinity in x.
            LabelError: one class only, a class without examples, fewer examples than classes.
            ConvergenceError: the gradient norm was not reached.
        """
        if not isinstance(x, Tensor) and hasattr(x, "batches"):
            pairs = _in_order(x, y)
            return cls.fit_batches(
                pairs,
                l2=l2,
                n_classes=n_classes,
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
        problem = check_problem(x, y, n_classes)
        (found,) = fit_in_memory({"probe": problem}, Options(l2, tolerance, max_iterations), 0)
        return cls._of(found["probe"], problem.x.dtype)

    @classmethod
    def fit_many(
        cls,
        problems: Mapping[Key, tuple[Tensor, Tensor]],
        *,
        l2: float | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 200,
        memory: int = 2**32,
        advance: Callable[[int], object] | None = None,
    ) -> dict[Key, Self]:
        """Fit many probes at once, each to the optimum that :meth:`fit` finds.

            probes = LinearProbe.fit_many({site: (x, labels) for site, x in activations.items()})

        Several label sets on the same tensor share its float64 copy and its first factorisation,
        and activations of one shape are stacked on a GPU. A probe that has reached its optimum
        leaves the stack. Widths, numbers of examples and of classes may differ.

        Args:
            problems: name of a probe to its activations (n, d) and classes (n,).
            l2: penalty on W; default 1/n, each with its own n.
            tolerance: bound on each gradient norm, relative to the one at zero.
            max_iterations: Newton steps before giving up.
            memory: bytes of float64 working copies to hold at once, never less than one tensor's.
                On a CPU one tensor is worked on at a time, whatever this says.
            advance: called with the number of probes fitted, after each stack.

        Returns:
            Name to probe, in the order given.

        Raises:
            WidthError, NonFiniteError, LabelError, ConvergenceError: as :meth:`fit`, beginning
                with the name of the probe.
        """
        checked: dict[Key, Problem] = {}
        for name, (x, y) in problems.items():
            try:
                checked[name] = check_problem(x, y, None)
            except LRQPError as error:
                raise named(error, name) from error
        found: dict[Key, Fitted] = {}
        for fitted in fit_in_memory(checked, Options(l2, tolerance, max_iterations), memory):
            found |= fitted
            if advance is not None:
                advance(len(fitted))
        return {name: cls._of(found[name], checked[name].x.dtype) for name in problems}

    @classmethod
    def fit_batches(
        cls,
        batches: Batches,
        *,
        l2: float | None = None,
        n_classes: int | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 200,
        device: torch.device | str | None = None,
    ) -> Self:
        """Fit to data beyond memory: the optimum of :meth:`fit` over all batches together.

        Not stochastic: each evaluation and each product with the Hessian is a pass over all
        batches, some 20 to 60 passes in all. Memory grows with the batch and with d², not with n.

        Args:
            batches: pairs of activations (m, d) and classes (m,) that can be gone through again
                and again: a list, a DataLoader, an object whose ``__iter__`` starts anew, or a
                function that returns a new iterator. Every pass must give the same examples; their
                order and their division into batches may change.
            l2: penalty on W; default 1/n.
            n_classes: K; default the largest label + 1.
            tolerance: bound on the gradient norm, relative to the one at zero.
            max_iterations: Newton steps before giving up.
            device: where to compute; default the device of the first batch.

        Raises:
            BatchError: an iterator that is exhausted after one pass, batches that are no pairs,
                examples or labels that changed between passes.
            WidthError: batches of different widths.
            NonFiniteError, LabelError, ConvergenceError: as :meth:`fit`.
        """
        options = Options(l2, tolerance, max_iterations)
        found, dtype = fit_streamed(batches, options, n_classes=n_classes, device=device)
        return cls._of(found, dtype)

    @classmethod
    def _of(cls, found: Fitted, activations: torch.dtype) -> Self:
        """The frozen probe of a fit to activations of that dtype."""
        n_classes, width = found.weight.shape
        dtype = torch.float64 if activations == torch.float64 else torch.float32
        probe = cls(width, n_classes, device=found.weight.device, dtype=dtype)
        with torch.no_grad():
            probe.weight.copy_(found.weight)
            probe.bias.copy_(found.bias)
        probe.requires_grad_(False)
        probe.report = found.report
        return probe

    def forward(self, input: Tensor) -> Tensor:
        """Logits z(x), (..., K), in the probe's dtype whatever the dtype of the activations."""
        if input.shape[-1] != self.width:
            raise WidthError(
                f"the probe reads width {self.width}, the activations have {input.shape[-1]}"
            )
        with torch.autocast(self.weight.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of examples whose most likely class is y."""
        if y.shape != x.shape[:-1]:
            raise TargetError(f"labels must be {tuple(x.shape[:-1])}, got {tuple(y.shape)}")
        return float((self(x).argmax(-1) == y.to(x.device)).double().mean())

    def log_odds(
        self,
        x: Tensor,
        target: Tensor | int,
        *,
        against: Literal["strongest", "rest"] = "strongest",
    ) -> Tensor:
        """Log odds of a class at each activation, (...), in nats.

        ``against="strongest"``: log P[t] / max_ℓ P[ℓ] = z_t − max_ℓ z_ℓ over ℓ ≠ t, which is what
        an edit constrains. ``against="rest"``: log P[t] / (1 − P[t]), the total odds, lower by at
        most log(K − 1). For K = 2 they are the same.

        Args:
            x: activations, (..., d).
            target: class t, a number or one per activation.
            against: which odds.

        Raises:
            WidthError: activations of another width.
            TargetError: classes out of range, or of a wrong shape or dtype.
            LRQPError: odds that do not exist.
        """
        if against not in ("strongest", "rest"):
            raise LRQPError(f"against must be 'strongest' or 'rest', got {against!r}")
        logits = self(x)
        target = torch.as_tensor(target, device=logits.device)
        if target.dtype.is_floating_point or target.dtype.is_complex:
            raise TargetError(f"target must hold integer class numbers, got {target.dtype}")
        if target.ndim and target.shape != logits.shape[:-1]:
            raise TargetError(
                f"target must be a number or {tuple(logits.shape[:-1])}, one class per "
                f"activation, got {tuple(target.shape)}"
            )
        target = target.long().expand(logits.shape[:-1])
        if bool(((target < 0) | (target >= self.n_classes)).any()):
            raise TargetError(f"target must lie in 0 to {self.n_classes - 1}")
        own = logits.gather(-1, target.unsqueeze(-1))
        rivals = logits.scatter(-1, target.unsqueeze(-1), float("-inf"))
        rival = rivals.amax(-1) if against == "strongest" else rivals.logsumexp(-1)
        result: Tensor = own.squeeze(-1) - rival
        return result


def _in_order(x: StoredActivations, y: Tensor) -> Batches:
    """Stored activations with their labels, batch by batch."""
    labels = as_classes(y, "labels")

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for part in x.batches(BATCH):
            yield part, labels[start : start + len(part)]
            start += len(part)
        if start != len(labels):
            raise LabelError(f"labels must be ({start},), one per activation, got {len(labels)}")

    return pairs
