"""The variables of a joint edit: edits in one metric, and the tolerances of those kept."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LRQPError
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp.stacked import StackedGeometry


def name_edits(edits: Any, metric: Any) -> dict[str, LRQP | LinearProbe]:
    """Edits and probes by name; those of a sequence by their place.

    Raises:
        LRQPError: neither edit nor probe, a metric that is none, or a name that is no string.
    """
    if not isinstance(edits, Mapping):
        if not isinstance(edits, Sequence) or isinstance(edits, str):
            raise LRQPError(
                f"edits must be a mapping from names to LRQP or LinearProbe, or a sequence of "
                f"them, got {type(edits).__name__}"
            )
        edits = {str(place): edit for place, edit in enumerate(edits)}
    for name, edit in edits.items():
        if not isinstance(name, str):
            raise LRQPError(f"variables must have names, got {name!r}")
        if not isinstance(edit, LRQP | LinearProbe):
            raise LRQPError(
                f"variable {name!r} must be an LRQP or a LinearProbe, got {type(edit).__name__}"
            )
    if metric is not None and not isinstance(metric, Mahalanobis):
        raise LRQPError(
            f"metric must be a Mahalanobis, got {type(metric).__name__}; wrap a covariance as "
            f"Mahalanobis(covariance)"
        )
    return dict(edits)


def common_metric(edits: Mapping[str, LRQP | LinearProbe]) -> Mahalanobis:
    """The metric that all edits share.

    Raises:
        LRQPError: no edit, or different metrics.
    """
    metrics = {name: edit.metric for name, edit in edits.items() if isinstance(edit, LRQP)}
    if not metrics:
        raise LRQPError("give at least one LRQP, or probes and a metric")
    first_name, first = next(iter(metrics.items()))
    for name, metric in metrics.items():
        if metric is not first and not torch.equal(metric.covariance, first.covariance):
            raise LRQPError(
                f"{first_name!r} and {name!r} have different metrics, and one problem has one: "
                f"pass metric=, for example that of the edit fitted on more activations"
            )
    return first


def with_metric(edit: LRQP | LinearProbe, metric: Mahalanobis) -> LRQP:
    """The edit in another metric; a probe with the defaults of :class:`LRQP`."""
    if not isinstance(edit, LRQP):
        return LRQP(edit, metric)
    if edit.metric is metric:
        return edit
    return LRQP(
        edit.probe,
        metric,
        log_odds=float(edit.log_odds),
        rule=edit.rule,
        odds=edit.odds,
    )


def check_within(within: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The tolerances as numbers.

    Raises:
        LRQPError: a name that is no variable, or a tolerance that is not positive.
    """
    if not isinstance(within, Mapping):
        raise LRQPError(f"within must map names among {list(names)} to nats, got {within!r}")
    checked = {}
    for name, value in within.items():
        try:
            checked[name] = number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if name not in names or not (math.isfinite(number) and number > 0):
            raise LRQPError(
                f"within must map names among {list(names)} to positive numbers, got "
                f"{name!r}: {str(value)[:50]}; for exact keeping leave it out"
            )
    return checked


def build_geometry(
    edits: Mapping[str, LRQP],
    metric: Mahalanobis,
    within: Mapping[str, float],
    device: torch.device,
) -> StackedGeometry:
    """The constraints of all probes stacked, on a device."""
    probes = [edit.probe for edit in edits.values()]
    return StackedGeometry.build(
        [probe.weight.to(device) for probe in probes],
        [probe.bias.to(device) for probe in probes],
        metric.covariance.to(device),
        [name in within for name in edits],
    )
