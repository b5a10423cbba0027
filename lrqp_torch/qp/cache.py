"""A geometry that is computed anew only when the probe or the metric has changed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.errors import concrete
from lrqp_torch.qp.geometry import ProbeGeometry


@dataclass(frozen=True)
class _Kept:
    """A geometry, and what it was computed from."""

    mark: tuple[Any, ...]
    covariance: Tensor
    weight: Tensor
    bias: Tensor
    geometry: ProbeGeometry


class GeometryCache:
    """The geometry of the probe and metric that were asked for last, on one device."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def get(
        self, weight: Tensor, bias: Tensor, covariance: Tensor, device: torch.device
    ) -> ProbeGeometry:
        """The geometry on a device. On a GPU this waits for the device; :meth:`peek` does not."""
        given = weight.to(device), bias.to(device), covariance
        if _needs_graph(weight, bias, covariance):
            return ProbeGeometry.build(*given[:2], covariance.to(device))
        kept = self._kept
        # The probe is small enough to compare by value, which sees every way of changing it:
        # .data, .double() and the like leave no trace in a tensor's version.
        same = (
            kept is not None
            and kept.covariance is covariance
            and kept.mark == _mark(covariance, device)
            and _same(kept.weight, given[0])
            and _same(kept.bias, given[1])
        )
        return kept.geometry if kept is not None and same else self._build(*given, device)

    def peek(
        self, weight: Tensor, bias: Tensor, covariance: Tensor, device: torch.device
    ) -> tuple[ProbeGeometry, Tensor]:
        """The geometry, and a bool () on the device that is true if it has become stale unseen.

        Changes that leave a trace are seen; others (``.data``) only by value, on the device.
        """
        kept = self._kept
        if (
            kept is None
            or _needs_graph(weight, bias, covariance)
            or kept.covariance is not covariance
            or kept.mark != _mark(covariance, device)
            or kept.weight.dtype != weight.dtype
            or weight.device != device
        ):
            return self.get(weight, bias, covariance, device), torch.zeros(
                (), dtype=torch.bool, device=device
            )
        return kept.geometry, (kept.weight != weight).any() | (kept.bias != bias).any()

    @torch.no_grad()
    def _build(
        self, weight: Tensor, bias: Tensor, covariance: Tensor, device: torch.device
    ) -> ProbeGeometry:
        weight, bias = weight.clone(), bias.clone()
        geometry = ProbeGeometry.build(weight, bias, covariance.to(device))
        self._kept = _Kept(_mark(covariance, device), covariance, weight, bias, geometry)
        return geometry


def _needs_graph(*tensors: Tensor) -> bool:
    """Whether the geometry is part of a computation that is being recorded or transformed."""
    if not all(concrete(tensor) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _mark(covariance: Tensor, device: torch.device) -> tuple[Any, ...]:
    # A tensor made in inference mode counts no versions, and cannot be changed in place.
    version = None if covariance.is_inference() else covariance._version
    return device, version, covariance.data_ptr()


def _same(old: Tensor, new: Tensor) -> bool:
    return old.dtype == new.dtype and torch.equal(old, new)
