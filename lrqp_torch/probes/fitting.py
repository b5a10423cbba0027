"""What probes are fitted to, in memory or read anew in every pass, checked; and the fit of many.

In memory, what shares activations or their shape is one stack of problems. Beyond memory, and over
many ranks, one problem's likelihood is a sum over batches.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from lrqp_torch.distributed.ranks import Ranks
from lrqp_torch.errors import (
    BatchError,
    ConvergenceError,
    LabelError,
    LRQPError,
    WidthError,
    all_finite,
    as_numbers,
    check_finite,
    quoted,
)
from lrqp_torch.probes.multinomial import (
    ALONE,
    FACTORS,
    Block,
    Examples,
    Minimum,
    MultinomialLoss,
    encode,
    minimise,
    minimise_alone,
    rows_of,
)

Key = TypeVar("Key", bound=Hashable)

Batches = Iterable[Sequence[Any]] | Callable[[], Iterable[Sequence[Any]]]
"""Activations (m, d), their labels (m,) and, if wanted, their weights (m,), to be gone through
again and again."""

ClassWeight = Literal["balanced"] | Mapping[Any, float] | Sequence[float] | Tensor
"""What an example of each class counts: one number a class, some by number or name, or
``"balanced"``, by which all classes count the same."""

BATCH = 4096
"""Rows of stored activations that are read at a time."""

CACHE = 2**22
"""Bytes of a stack on a CPU."""

ROUNDING = 1e-9
"""Relative size below which sums over all examples may differ between two passes."""


@dataclass(frozen=True)
class FitReport:
    """How a probe was fitted."""

    loss: float  # the penalised loss at the optimum, in nats per example
    # Euclidean norm of its gradient there, before rounding to the probe's dtype.
    gradient_norm: float
    # The same over the norm at W = 0, b = 0; at most `tolerance`, and 0 where the gradient is below
    # its own rounding error.
    relative_gradient_norm: float
    iterations: int  # Newton steps
    l2: float  # the penalty that was used
    n_samples: int  # examples fitted
    counts: tuple[float, ...] = ()  # examples of each class, by weight if they have any
    # Accuracy on examples that were not fitted; None if that was not asked for.
    held_out: float | None = None
    held_out_samples: int = 0  # how many these were

    @property
    def chance(self) -> float:
        """Accuracy of always answering the most frequent class."""
        return max(self.counts) / sum(self.counts)


Fitted = tuple[Tensor, Tensor, FitReport]
"""Weight (K, d) and bias (K,) in float64, and how they were found."""


@dataclass(frozen=True)
class Options:
    """What all problems of one call share; see :meth:`~lrqp_torch.LinearProbe.fit_many`."""

    l2: float | None
    tolerance: float
    max_iterations: int
    standardise: bool = False

    def penalty(self, total: float) -> float:
        """The penalty for examples of so much weight; default 1/n."""
        try:
            l2 = 1.0 / total if self.l2 is None else float(self.l2)
        except (TypeError, ValueError):
            l2 = math.nan
        if not 0 < l2 < math.inf:
            raise LabelError(
                f"l2 must be a positive number, got {quoted(self.l2)}: separable classes have no "
                f"optimum without it"
            )
        return l2


@dataclass(frozen=True)
class Problem:
    """Examples in memory, checked."""

    x: Tensor  # activations, (n, d)
    labels: Tensor  # their classes, (n,)
    weights: Tensor | None  # what each counts, (n,), float64; None if each counts once
    counts: Tensor  # examples of each of the K classes, by weight, (K,), on the CPU
    classes: tuple[str, ...] | None  # names of the classes, where they were given by name

    @classmethod
    def of(
        cls,
        x: Any,
        y: Any,
        weights: Any = None,
        n_classes: int | None = None,
        class_weight: ClassWeight | None = None,
    ) -> "Problem":
        """Check and convert what a user gives; raises the errors of :meth:`LinearProbe.fit`."""
        x = as_numbers(x, "activations")
        y, classes = read_labels(y)
        labels, weights = _check_examples(x, y, weights)
        if len(x) == 0:
            raise LabelError("no examples to fit a probe on")
        check_finite(x)
        # On the CPU, where looking at them makes no GPU wait.
        numbers = torch.bincount(labels).cpu()
        weighed = numbers if weights is None else torch.bincount(labels, weights).cpu()
        counts, share = weigh_classes(numbers, weighed.double(), n_classes, class_weight, classes)
        if share is not None:
            share = share.to(labels.device)[labels]
            weights = share if weights is None else share * weights
        return cls(x.detach(), labels, weights, counts, classes)

    def take(self, rows: Tensor) -> "Problem":
        """Some of the examples, chosen by a mask (n,)."""
        rows = rows.to(self.x.device)
        weights = None if self.weights is None else self.weights[rows]
        counts = torch.bincount(self.labels[rows], weights, len(self.counts)).cpu()
        return Problem(self.x[rows], self.labels[rows], weights, counts, self.classes)


def read_labels(y: Any) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as a tensor; where they are names, as their places in the sorted names, and those.

    Raises:
        LabelError: neither numbers nor texts.
    """
    if isinstance(y, Tensor):
        return y, None
    try:
        array = np.asarray(y)
    except (TypeError, ValueError):
        return as_numbers(y, "labels", LabelError), None
    if array.dtype.kind == "O" and array.size and all(isinstance(v, str) for v in array.flat):
        array = array.astype(str)
    if array.dtype.kind != "U":
        return as_numbers(y, "labels", LabelError), None
    names, places = np.unique(array, return_inverse=True)
    return torch.from_numpy(places.reshape(array.shape)), tuple(names.tolist())


def weigh_classes(
    numbers: Tensor,
    weighed: Tensor,
    n_classes: int | None,
    given: Any,
    classes: Sequence[Any] | None,
) -> tuple[Tensor, Tensor | None]:
    """The examples of each class, by weight, and what each counts by its class, (K,), float64.

    Args:
        numbers: of examples in each class, up to the largest label.
        weighed: the same by weight.
        n_classes: K, if it is said.
        given: see :data:`ClassWeight`; None gives None.
        classes: names of the classes, if they have some.

    Raises:
        LabelError: a label beyond ``n_classes``, one class only, a class without examples or whose
            examples weigh nothing, fewer examples than classes; another number of class weights,
            or one of a class that does not exist.
    """
    found, total = len(numbers), int(numbers.sum())
    n_classes = found if n_classes is None else n_classes
    if found > n_classes:
        raise LabelError(f"label {found - 1} is outside the {n_classes} classes given")
    if int(numbers[-1]) == total:
        raise LabelError(f"all {total} labels are class {found - 1}; a probe needs two classes")
    if total < n_classes:
        raise LabelError(f"{total} examples cannot fit {n_classes} classes; give at least one each")
    missing = [*(numbers == 0).nonzero().flatten().tolist(), *range(found, n_classes)]
    if missing:
        raise LabelError(
            f"classes {missing[:10]} have no examples; renumber the labels or give more prompts"
        )
    share = None
    if isinstance(given, str) and given == "balanced":
        share = weighed.sum() / (len(weighed) * weighed)
    elif given is not None:
        if isinstance(given, Mapping):
            names = list(range(found)) if classes is None else list(classes)
            unknown = [name for name in given if name not in names]
            if unknown:
                raise LabelError(f"class_weight names {unknown[0]!r}; there are {names[:10]}")
            given = [given.get(name, 1.0) for name in names]
        share = _weights(given, "class_weight", weighed)
    weighed = weighed if share is None else weighed * share
    if not bool((weighed > 0).all()):
        raise LabelError(f"all examples of class {int(weighed.argmin())} have weight 0")
    return weighed, share


def _weights(given: Any, what: str, like: Tensor) -> Tensor:
    """Finite weights of 0 or more, float64, as many and where ``like`` is."""
    weights = as_numbers(given, what, LabelError).detach().to(like.device)
    if weights.shape != like.shape or not bool((weights.isfinite() & (weights >= 0)).all()):
        raise LabelError(
            f"{what} must be {len(like)} finite numbers of 0 or more, got {quoted(given)}"
        )
    return weights.double()


def _check_examples(x: Tensor, y: Any, weights: Any = None) -> tuple[Tensor, Tensor | None]:
    """Labels as int64 and weights as float64 on x's device.

    Raises:
        WidthError: activations that are not floating (n, d).
        LabelError: labels or weights of another length, not integers, or negative.
    """
    y, classes = read_labels(y)
    if classes is not None:
        raise LabelError("labels of batches must be numbers, since no batch knows all the names")
    if x.ndim != 2 or not x.dtype.is_floating_point or not x.shape[1]:
        raise WidthError(f"activations must be floating (n, d), got {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise LabelError(f"labels must be ({len(x)},), one per activation, got {tuple(y.shape)}")
    if y.dtype.is_floating_point or y.dtype.is_complex:
        raise LabelError(f"labels must be integers or bool, got {y.dtype}")
    labels: Tensor = y.to(x.device).long()
    if len(labels) and int(labels.min()) < 0:
        raise LabelError(f"labels must be 0 or more, got {int(labels.min())}")
    return labels, None if weights is None else _weights(weights, "sample_weight", labels)


def named(error: LRQPError, name: Hashable) -> LRQPError:
    """The same error, saying which of many problems it is about."""
    return type(error)(f"{name}: {error}")


def fit_in_memory(
    problems: Mapping[Key, Problem], options: Options, memory: int
) -> Iterator[dict[Key, Fitted]]:
    """Fit probes, a stack at a time.

    Problems on the same activations tensor share its first preconditioner. Activations of equal
    shape are stacked, as many as ``memory`` bytes hold; on a CPU, only those so small that calling
    costs more than computing. The narrow products of larger ones are bound by memory there, and
    BLAS does them several times faster one matrix at a time.
    """
    for group in _groups(problems):
        first = problems[group[0][0]]
        n, size = first.x.shape
        # Factors of each class, where there may be some.
        wide = rows_of(len(first.counts)) * (size + 1)
        per_site = 8 * size * (3 * n + 3 * (wide if wide <= FACTORS * n else size) * len(group[0]))
        limit = memory if first.x.is_cuda else min(memory, CACHE)
        sites = max(1, limit // per_site)
        for start in range(0, len(group), sites):
            yield _fit_stack(problems, group[start : start + sites], options)


def _groups(problems: Mapping[Key, Problem]) -> list[list[list[Key]]]:
    """Keys as groups of sites of label sets: [group][site][label set], in the order given."""
    sites: dict[tuple[Any, ...], list[Key]] = {}
    for key, problem in problems.items():
        x = problem.x
        view = (x.device, x.data_ptr(), x.shape, x.stride(), x.dtype)
        # Weights change what n is, by which all losses of a stack are divided.
        own = None if problem.weights is None else key
        sites.setdefault((view, len(problem.counts), own), []).append(key)
    groups: dict[tuple[Any, ...], list[list[Key]]] = {}
    for ((device, _, shape, *_), n_classes, own), keys in sites.items():
        groups.setdefault((device, shape, n_classes, len(keys), own), []).append(keys)
    return list(groups.values())


def _fit_stack(
    problems: Mapping[Key, Problem], group: Sequence[Sequence[Key]], options: Options
) -> dict[Key, Fitted]:
    """Fit the label sets of some sites of one shape, all with the same number of classes."""
    first = problems[group[0][0]]
    n, n_classes = len(first.x), len(first.counts)
    labels = torch.stack([torch.stack([problems[k].labels for k in keys]) for keys in group])
    weights = None if first.weights is None else first.weights.view(1, 1, 1, n)
    total = float(n if weights is None else weights.sum())
    l2 = options.penalty(total)
    x, scale = [problems[keys[0]].x for keys in group], None
    if options.standardise:
        x = [own.double() for own in x]
    mean = torch.stack([_centre(own) for own in x])
    if options.standardise:
        x = [own - about for own, about in zip(x, mean, strict=True)]
        spread = torch.stack([torch.linalg.vector_norm(own, dim=0) / n**0.5 for own in x])
        # A coordinate that varies by rounding alone is not blown up.
        scale = torch.where(spread > ROUNDING * mean.abs(), spread, 1.0)
        x = [own.div_(size) for own, size in zip(x, scale, strict=True)]
    about = mean if scale is None else torch.zeros_like(mean)
    minimum = _minimise(x, about, encode(labels, n_classes), weights, total, l2, options)
    rows = [[(problems[key].counts, n) for key in keys] for keys in group]
    fitted = _unpack(minimum, mean, scale, l2, rows)
    found = {
        key: one
        for keys, some in zip(group, fitted, strict=True)
        for key, one in zip(keys, some, strict=True)
    }
    _check_convergence(found, options.tolerance)
    return found


def _centre(x: Tensor) -> Tensor:
    """The mean of activations (n, d) to about the digits that they have, (d,), float64.

    The bias takes up what is missing.
    """
    # No product of matrices: autocast would round its factors.
    mean = x.mean(0, dtype=torch.promote_types(x.dtype, torch.float32)).double()
    return mean if all_finite(mean) else x.double().mean(0)


def _minimise(
    x: Sequence[Tensor],
    mean: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    total: float,
    l2: float,
    options: Options,
) -> Minimum:
    """The minima of all label sets, targets (S, L, C, n), of features (x − mean, 1) of S sites."""
    end = options.tolerance, options.max_iterations
    alone = [
        minimise_alone(Examples(own, about, sets, weights, total, l2), *end)
        for own, about, sets in zip(x, mean, targets, strict=True)
    ]
    found = [one for one in alone if one is not None]
    if len(found) == len(alone):
        return Minimum(*(torch.cat([getattr(o, f.name) for o in found]) for f in fields(Minimum)))
    sites, width = mean.shape
    features = mean.new_ones(sites, targets.shape[3], width + 1)
    for part, own, about in zip(features, x, mean, strict=True):
        torch.sub(own, about, out=part[:, :width])
    loss = MultinomialLoss([Block(features, targets, weights)], total=total, l2=l2, in_memory=True)
    return minimise(loss, mean.new_zeros(*targets.shape[:3], width + 1), *end)


def _unpack(
    minimum: Minimum,
    mean: Tensor,
    scale: Tensor | None,
    l2: float,
    data: Sequence[Sequence[tuple[Tensor, int]]],
) -> list[list[Fitted]]:
    """Probes in the coordinates of their activations, by site and label set.

    Args:
        minimum: what was found, of features less their mean and over their scale.
        mean, scale: (S, d).
        l2: the penalty.
        data: examples of each class, and the number of all, of each.
    """
    parameters = minimum.parameters
    if parameters.shape[2] == 1:
        parameters = torch.cat([-parameters, parameters], 2)
    weight, bias = parameters[..., :-1], parameters[..., -1]
    weight = weight if scale is None else weight / scale[:, None, None]
    # The softmax ignores a shift of all biases; take the one with mean zero.
    bias = bias - bias.mean(2, keepdim=True) - (weight * mean[:, None, None]).sum(3)
    names = "loss", "gradient_norm", "relative_gradient_norm", "iterations"
    columns = {name: getattr(minimum, name).tolist() for name in names}

    def report(site: int, label_set: int) -> FitReport:
        counts, n_samples = data[site][label_set]
        found = {name: values[site][label_set] for name, values in columns.items()}
        return FitReport(**found, l2=l2, n_samples=n_samples, counts=tuple(counts.tolist()))

    return [
        [(weight[s, k], bias[s, k], report(s, k)) for k in range(len(row))]
        for s, row in enumerate(data)
    ]


def _check_convergence(found: Mapping[Key, Fitted], tolerance: float) -> None:
    reports = {name: report for name, (*_, report) in found.items()}
    failed = [k for k, report in reports.items() if not report.relative_gradient_norm <= tolerance]
    if not failed:
        return
    report = reports[failed[0]]
    others = f" (and of {len(failed) - 1} others)" if len(failed) > 1 else ""
    raise ConvergenceError(
        f"{failed[0]}: the gradient norm{others} is {report.relative_gradient_norm:.1e} of its "
        f"start after {report.iterations} steps, above {tolerance:.0e}; raise max_iterations or "
        f"l2 (now {report.l2:.1e}), or fit to standardised activations (standardise=True)"
        + ("" if math.isfinite(report.relative_gradient_norm) else "; their squares overflow")
    )


def fit_passes(data: "Passes", options: Options) -> Fitted:
    """Fit one probe to data read anew in every pass, on every rank."""
    l2 = options.penalty(data.total)
    loss = MultinomialLoss(data, total=data.total, l2=l2, in_memory=False, ranks=data.ranks)
    zero = data.mean.new_zeros(1, 1, rows_of(len(data.counts)), data.width + 1)
    minimum = minimise(loss, zero, options.tolerance, options.max_iterations)
    ((found,),) = _unpack(
        minimum, data.mean.unsqueeze(0), None, l2, [[(data.counts, data.n_samples)]]
    )
    _check_convergence({"streamed probe": found}, options.tolerance)
    return found


class Passes:
    """The blocks of one probe's likelihood, read anew whenever they are iterated over.

    One pass at the start checks everything and finds the mean. Every later one must give the same
    examples, in whatever order and batches. Over many ranks the blocks are this rank's own; number
    of examples, mean and classes are those of all.

    Args:
        batches: activations, labels and maybe weights.
        n_classes: K; default the largest label + 1.
        class_weight: see :data:`ClassWeight`.
        device: where to compute; default the device of the first batch.
        ranks: this process among the others.
        classes: names of the classes, where they have some.

    Raises:
        BatchError: batches that can be gone through only once, or that are no pairs.
        WidthError, NonFiniteError, LabelError: as of :meth:`~lrqp_torch.LinearProbe.fit`.
        ToldError: one of these on another rank.
    """

    def __init__(
        self,
        batches: Batches,
        n_classes: int | None = None,
        class_weight: ClassWeight | None = None,
        device: torch.device | str | None = None,
        ranks: Ranks = ALONE,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        if isinstance(batches, Iterator):
            raise BatchError(
                f"batches must be gone through many times, and a {type(batches).__name__} can be "
                f"only once; give a list, a DataLoader, or a function that returns a new one"
            )
        self._batches, self.ranks, self.classes = batches, ranks, classes
        self.width, self.device, self.dtype = 0, device, torch.float32
        self._own_samples = 0
        self._sums: Tensor | None = None
        with ranks.together():
            total, counts = self._first_pass()
        total, counts = self._of_all(total, counts)
        self.n_samples = int(counts[0].sum())
        if self.n_samples == 0:
            raise LabelError("no examples to fit a probe on")
        self.mean = total / self.n_samples
        self.counts, self._share = weigh_classes(
            counts[0], counts[1], n_classes, class_weight, classes
        )
        self.total = float(self.counts.sum())

    def _first_pass(self) -> tuple[Tensor, Tensor]:
        """Sum of this rank's activations, (d,), and their classes' numbers and weights, (2, K)."""
        total = torch.zeros(0)
        counts = torch.zeros(2, 0, dtype=torch.float64)
        for number, (x, labels, weights) in enumerate(self._read()):
            if number == 0:
                self.width, self.device, self.dtype = x.shape[1], self.device or x.device, x.dtype
                total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
            try:
                check_finite(x)
            except LRQPError as error:
                raise named(error, f"batch {number}") from error
            self._own_samples += len(x)
            total += x.to(total).sum(0)
            most = max(counts.shape[1], int(labels.max()) + 1 if len(labels) else 0)
            rows = [torch.bincount(labels, given, most).double() for given in (None, weights)]
            longer = torch.stack(rows).cpu()
            longer[:, : counts.shape[1]] += counts
            counts = longer
        return total, counts

    def _of_all(self, total: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the examples of all ranks; width and dtype are then the same on each."""
        if self.ranks.size == 1:
            return total, counts
        found = self.ranks.gather((self.width, self.dtype, counts.tolist()))
        present = [(width, dtype) for width, dtype, _ in found if width]
        if len(set(present)) > 1:
            raise WidthError(f"the ranks hold activations of different width or dtype: {present}")
        if not present:
            return total, counts
        (self.width, self.dtype) = present[0]
        self.device = self.device or "cpu"
        if not self._own_samples:
            total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        whole = torch.zeros(2, max(len(part[0]) for *_, part in found), dtype=torch.float64)
        for *_, part in found:
            whole[:, : len(part[0])] += torch.tensor(part, dtype=torch.float64)
        return self.ranks.total(total), whole

    def __iter__(self) -> Iterator[Block]:
        n_classes = len(self.counts)
        sums = self.mean.new_zeros(1, self.width + 1)
        squares = self.mean.new_zeros(())
        seen = 0
        for number, (x, labels, weights) in enumerate(self._read()):
            if len(labels) and int(labels.max()) >= n_classes:
                raise BatchError(
                    f"batch {number} holds label {int(labels.max())}, which the first pass did "
                    f"not; {_SAME}"
                )
            centred = x.to(self.mean) - self.mean
            features = torch.cat([centred, centred.new_ones(len(x), 1)], 1)
            labels = labels.to(self.mean.device)
            targets = encode(labels, n_classes)
            if self._share is not None:
                share = self._share.to(labels.device)[labels]
                weights = share if weights is None else share * weights.to(share)
            weights = None if weights is None else weights.to(features).view(1, 1, 1, -1)
            block = Block(features.unsqueeze(0), targets.unsqueeze(0).unsqueeze(0), weights)
            yield block
            seen += len(x)
            sums = sums + block.weighed(block.targets)[0, 0] @ features
            squares = squares + block.weighed(features.norm(dim=1)).square().sum()
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

    def _read(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        batches = self._batches() if callable(self._batches) else self._batches
        for number, given in enumerate(batches):
            if not isinstance(given, tuple | list) or len(given) not in (2, 3):
                raise BatchError(
                    f"batch {number} must be a pair of activations (m, d) and labels (m,), or "
                    f"these and weights (m,), got {type(given).__name__}"
                )
            try:
                x = as_numbers(given[0], "activations")
                labels, weights = _check_examples(x, given[1], *given[2:])
            except LRQPError as error:
                raise named(error, f"batch {number}") from error
            if self.width and x.shape[1] != self.width:
                raise WidthError(
                    f"batch {number} has width {x.shape[1]}, the ones before {self.width}"
                )
            yield x.detach(), labels, weights


_SAME = "every pass must give the same examples, so do not sample or shuffle labels in it"
