"""Whether a model's weights are still what they were, without reading all of them."""

import torch
from torch import Tensor, nn

from lrqp_torch.stream.compiled import Census

SAMPLES = 16
"""Values of each weight that are looked at."""


class Weights:
    """The weights of a model as they are now.

    A weight is told by its object, where it lies and how often it was written to. That does not see
    what is written through ``.data`` or by fused optimizers: so on the CPU a few values of each are
    looked at too, spread over it, as such changes are of nearly all.

    Args:
        model: whose weights these are; not kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._noted = [(part, *_trace(part)) for part in _weights(model)]
        self._adapters = _adapters(model)
        views = [view for part, *_ in self._noted if part.is_cpu for view in _sampled(part)]
        # What is looked at together, by kind; views are of the memory that the weights have now.
        kinds = {view.dtype for view in views}
        self._views = [[view for view in views if view.dtype is kind] for kind in kinds]
        self._values = [torch.cat(views) for views in self._views]

    @torch.no_grad()
    def changed(self, model: nn.Module) -> bool:
        """Whether the model has others now."""
        parts = _weights(model)
        if len(parts) != len(self._noted) or _adapters(model) != self._adapters:
            return True
        moved = False
        for part, (held, place, version) in zip(parts, self._noted, strict=True):
            if part is held and part.data_ptr() == place:
                if _trace(part)[1] != version:
                    return True
            else:
                moved = True
        if moved:
            # As a wrapper does that gathers and frees them, or one that puts the same ones back.
            here = Weights(model)
            same = [*map(len, self._values)] == [*map(len, here._values)]
            if not same or any(map(_differ, self._values, here._values)):
                return True
            vars(self).update(vars(here))
            return False
        return any(
            [
                _differ(torch.cat(views), was)
                for views, was in zip(self._views, self._values, strict=True)
            ]
        )


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.dtype is not other.dtype or not torch.equal(one, other)


def _weights(model: nn.Module) -> list[Tensor]:
    return [
        part
        for own in Census.of(model).parameters
        for part in own.values()
        # Those on no device are fetched when they are needed, and others are told in other ways.
        if part is not None and type(part) is nn.Parameter and not part.is_meta
    ]


def _trace(part: Tensor) -> tuple[int, int]:
    return part.data_ptr(), -1 if part.is_inference() else part._version


def _sampled(part: Tensor) -> list[Tensor]:
    count = part.numel()
    if not count or not part.is_contiguous():
        return []
    with torch.inference_mode(False), torch.no_grad():
        return [part.detach().view(-1)[:: max(1, -(-count // SAMPLES))]]


_ADAPTERS = ("_disable_adapters", "_active_adapter")


def _adapters(model: nn.Module) -> list[object]:
    """Which adapters of peft the model's layers compute with."""
    found = [own.get(name) for own in Census.of(model).attributes for name in _ADAPTERS]
    return [[*each] if isinstance(each, list) else each for each in found if each is not None]
