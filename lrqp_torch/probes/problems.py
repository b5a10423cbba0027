"""What a probe is fitted to: activations with their classes, checked."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import LabelError, LRQPError, WidthError, as_classes, check_finite


@dataclass(frozen=True)
class Problem:
    """Activations (n, d) with their classes (n,), checked; K classes."""

    x: Tensor
    labels: Tensor
    n_classes: int


def check_problem(x: Any, y: Any, n_classes: int | None) -> Problem:
    """Raise the errors of :meth:`~lrqp_torch.LinearProbe.fit`, or return the problem."""
    if not isinstance(x, Tensor):
        raise WidthError(
            f"activations must be a tensor, got {type(x).__name__}; torch.as_tensor(x)"
        )
    labels = check_batch(x, y)
    if len(x) == 0:
        raise LabelError("no examples to fit a probe on")
    check_finite(x)
    return Problem(x.detach(), labels, check_counts(torch.bincount(labels), n_classes))


def check_counts(counts: Tensor, n_classes: int | None) -> int:
    """K, from the number of examples in each class up to the largest label.

    Raises:
        LabelError: a label beyond ``n_classes``, one class only, a class without examples, or
            fewer examples than classes.
    """
    found, total = len(counts), int(counts.sum())
    n_classes = found if n_classes is None else n_classes
    if found > n_classes:
        raise LabelError(f"label {found - 1} is outside the {n_classes} classes given")
    if int(counts[-1]) == total:
        raise LabelError(f"all {total} labels are class {found - 1}; a probe needs two classes")
    if total < n_classes:
        raise LabelError(f"{total} examples cannot fit {n_classes} classes; give at least one each")
    missing = [*(counts == 0).nonzero().flatten().tolist(), *range(found, n_classes)]
    if missing:
        raise LabelError(
            f"classes {missing[:10]} have no examples; renumber the labels or give more prompts"
        )
    return n_classes


def named(error: LRQPError, name: Hashable) -> LRQPError:
    """The same error, saying which of many problems it is about."""
    return type(error)(f"{name}: {error}")


def check_batch(x: Tensor, y: Any) -> Tensor:
    """Labels as int64 on x's device.

    Raises:
        WidthError: activations that are not floating (n, d).
        LabelError: labels of another length, not integers, or negative.
    """
    y = as_classes(y, "labels")
    if x.ndim != 2 or not x.dtype.is_floating_point:
        raise WidthError(f"activations must be floating (n, d), got {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise LabelError(f"labels must be ({len(x)},), one per activation, got {tuple(y.shape)}")
    if y.dtype.is_floating_point or y.dtype.is_complex:
        raise LabelError(f"labels must be integers or bool, got {y.dtype}")
    labels: Tensor = y.to(x.device).long()
    if len(labels) and int(labels.min()) < 0:
        raise LabelError(f"labels must be 0 or more, got {int(labels.min())}")
    return labels
