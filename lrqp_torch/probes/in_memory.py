"""Fitting many probes at once: what shares activations or their shape is one stack of problems."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrqp_torch.errors import ConvergenceError, LabelError
from lrqp_torch.probes.multinomial import Block, MultinomialLoss, encode, rows_of
from lrqp_torch.probes.newton import Minimum, minimise
from lrqp_torch.probes.problems import Problem
from lrqp_torch.probes.streamed import Batches, Passes

Key = TypeVar("Key", bound=Hashable)


CACHE = 2**22
"""Bytes of a stack on a CPU."""


@dataclass(frozen=True)
class FitReport:
    """How a probe was fitted.

    Attributes:
        loss: the penalised loss at the optimum, in nats per example.
        gradient_norm: Euclidean norm of its gradient there, before rounding to the probe's dtype.
        relative_gradient_norm: the same over the norm at W = 0, b = 0; at most ``tolerance``, and
            0 where the gradient is below its own rounding error.
        iterations: Newton steps.
        l2: the penalty that was used.
        n_samples: examples fitted.
    """

    loss: float
    gradient_norm: float
    relative_gradient_norm: float
    iterations: int
    l2: float
    n_samples: int


@dataclass(frozen=True)
class Fitted:
    """Weight (K, d) and bias (K,) in float64, and how they were found."""

    weight: Tensor
    bias: Tensor
    report: FitReport


@dataclass(frozen=True)
class Options:
    """What all problems of one call share; see :meth:`~lrqp_torch.LinearProbe.fit_many`."""

    l2: float | None
    tolerance: float
    max_iterations: int

    def penalty(self, n_samples: int) -> float:
        """The penalty for so many examples; default 1/n."""
        l2 = 1.0 / n_samples if self.l2 is None else float(self.l2)
        if not l2 > 0:
            raise LabelError(
                f"l2 must be positive, got {l2}: separable classes have no optimum without it"
            )
        return l2


def fit_in_memory(
    problems: Mapping[Key, Problem], options: Options, memory: int
) -> Iterator[dict[Key, Fitted]]:
    """Fit probes, a stack at a time.

    Problems on the same activations tensor share its float64 copy and its first preconditioner.
    Activations of equal shape are stacked, as many as ``memory`` bytes hold; on a CPU, only those
    so small that calling costs more than computing. The narrow products of larger ones are bound
    by memory there, and BLAS does them several times faster one matrix at a time.
    """
    for group in _groups(problems):
        first = problems[group[0][0]]
        n, size = len(first.x), _size(first.x)
        per_site = 8 * size * (3 * n + 3 * size * len(group[0]))
        limit = memory if first.x.is_cuda else min(memory, CACHE)
        sites = max(1, limit // per_site)
        for start in range(0, len(group), sites):
            yield _fit_stack(problems, group[start : start + sites], options)


def fit_streamed(
    batches: Batches,
    options: Options,
    *,
    n_classes: int | None,
    device: torch.device | str | None,
) -> tuple[Fitted, torch.dtype]:
    """Fit one probe to data read anew in every pass; also the dtype of the activations."""
    return fit_passes(Passes(batches, n_classes, device), options, MultinomialLoss)


def fit_passes(
    data: Passes, options: Options, likelihood: Callable[..., MultinomialLoss]
) -> tuple[Fitted, torch.dtype]:
    """The same for passes that were made before, with a likelihood that sums over them."""
    l2 = options.penalty(data.n_samples)
    loss = likelihood(data, n_samples=data.n_samples, l2=l2, in_memory=False)
    zero = data.mean.new_zeros(1, 1, rows_of(data.n_classes), data.width + 1)
    minimum = minimise(loss, zero, options.tolerance, options.max_iterations)
    found = _unpack(minimum, 0, 0, data.mean, None, l2, data.n_samples)
    _check_convergence({"streamed probe": found}, options.tolerance)
    return found, data.dtype


def _groups(problems: Mapping[Key, Problem]) -> list[list[list[Key]]]:
    """Keys as groups of sites of label sets: [group][site][label set], in the order given."""
    sites: dict[tuple[Any, ...], list[Key]] = {}
    for key, problem in problems.items():
        x = problem.x
        view = (x.device, x.data_ptr(), x.shape, x.stride(), x.dtype)
        sites.setdefault((view, problem.n_classes), []).append(key)
    groups: dict[tuple[Any, ...], list[list[Key]]] = {}
    for ((device, _, shape, *_), n_classes), keys in sites.items():
        groups.setdefault((device, shape, n_classes, len(keys)), []).append(keys)
    return list(groups.values())


def _fit_stack(
    problems: Mapping[Key, Problem], group: Sequence[Sequence[Key]], options: Options
) -> dict[Key, Fitted]:
    """Fit the label sets of some sites of one shape, all with the same number of classes."""
    first = problems[group[0][0]]
    n, size = len(first.x), _size(first.x)
    means, bases = [], []
    features = torch.empty(len(group), n, size + 1, dtype=torch.float64, device=first.x.device)
    for site, keys in enumerate(group):
        x = problems[keys[0]].x.double()
        mean = x.mean(0)
        centred = x - mean
        basis = torch.linalg.qr(centred.T).Q if size < x.shape[1] else None
        features[site, :, :size] = centred if basis is None else centred @ basis
        means.append(mean)
        bases.append(basis)
    features[..., -1] = 1.0
    labels = torch.stack([torch.stack([problems[k].labels for k in keys]) for keys in group])
    targets = encode(labels, first.n_classes)
    l2 = options.penalty(n)
    loss = MultinomialLoss([Block(features, targets)], n_samples=n, l2=l2, in_memory=True)
    zero = features.new_zeros(*labels.shape[:2], rows_of(first.n_classes), size + 1)
    minimum = minimise(loss, zero, options.tolerance, options.max_iterations)
    found = {
        key: _unpack(minimum, site, label_set, means[site], bases[site], l2, n)
        for site, keys in enumerate(group)
        for label_set, key in enumerate(keys)
    }
    _check_convergence(found, options.tolerance)
    return found


def _size(x: Tensor) -> int:
    """Dimensions to solve in.

    By the representer theorem W lies in the span of the centred activations. With few examples an
    orthonormal basis of it costs less than it saves.
    """
    n, width = x.shape
    return n if 2 * n <= width else width


def _unpack(
    minimum: Minimum,
    site: int,
    label_set: int,
    mean: Tensor,
    basis: Tensor | None,
    l2: float,
    n_samples: int,
) -> Fitted:
    """One probe in the coordinates of its activations."""
    parameters = minimum.parameters[site, label_set]
    if len(parameters) == 1:
        parameters = torch.cat([-parameters, parameters])
    weight, bias = parameters[:, :-1], parameters[:, -1]
    weight = weight.clone() if basis is None else weight @ basis.T
    # The softmax ignores a shift of all biases; take the one with mean zero.
    bias = bias - bias.mean() - weight @ mean
    statistics = (minimum.loss, minimum.gradient_norm, minimum.relative_gradient_norm)
    loss, size, relative = (float(value[site, label_set]) for value in statistics)
    steps = int(minimum.iterations[site, label_set])
    return Fitted(weight, bias, FitReport(loss, size, relative, steps, l2, n_samples))


def _check_convergence(found: Mapping[Key, Fitted], tolerance: float) -> None:
    failed = [k for k, f in found.items() if not f.report.relative_gradient_norm <= tolerance]
    if not failed:
        return
    report = found[failed[0]].report
    others = f" (and of {len(failed) - 1} others)" if len(failed) > 1 else ""
    raise ConvergenceError(
        f"{failed[0]}: the gradient norm{others} is {report.relative_gradient_norm:.1e} of its "
        f"start after {report.iterations} steps, above {tolerance:.0e}; raise max_iterations or "
        f"l2 (now {report.l2:.1e}), or standardise the activations"
    )
