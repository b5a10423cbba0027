"""Whether a model's weights are still what they were, without reading all of them."""

import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lrqp_torch.files import bytes_of
from lrqp_torch.stream.compiled import Census, inner_model
from lrqp_torch.stream.sites import Located

SAMPLES = 16
"""Values of each weight that are looked at."""

SPREAD = 64
"""Values of each weight that a fingerprint is made of."""

PRECISIONS = {str(kind)[6:]: kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
"""What a model may be held in, from the one that tells most apart; float64 is told by float32."""


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


def fingerprint(model: nn.Module, located: Located) -> dict[str, str] | None:
    """A digest of the weights that a site's stream is computed with, by precision.

    Of some values spread over each weight up to the site's block and in it, as rounded to each of
    :data:`PRECISIONS` that the model's own determines; they are the same on any device. Of adapters
    it is those that are active. Computed anew where :class:`Weights` have changed.

    Returns:
        None where there are no plain values at hand: quantised, sharded, on no device.
    """
    if torch.compiler.is_compiling():
        return None
    weights, known = _FINGERPRINTS.get(model, (None, {}))
    if weights is None or weights.changed(model):
        known = {}
        _FINGERPRINTS[model] = Weights(model), known
    name = str(located.site)
    if name not in known:
        known[name] = _digests(inner_model(model), located)
    return known[name]


_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[Weights, dict[str, dict[str, str] | None]]] = (
    WeakKeyDictionary()
)


@torch.no_grad()
def _digests(model: nn.Module, located: Located) -> dict[str, str] | None:
    end = model if located.block is None else located.block[2]
    before = located.module is end and located.side == "input"
    parts = list[Tensor]()
    _collect(model, end, before, parts)
    config: Any = getattr(model, "config", None)
    narrow = {part.dtype for part in parts} - {torch.float32, torch.float64}
    if (
        not parts
        or getattr(config, "quantization_config", None) is not None
        or not all(type(part) is nn.Parameter and part.numel() for part in parts)
        or any(part.is_meta for part in parts)
        or not (narrow <= {*PRECISIONS.values()} and len(narrow) < 2)
        or (any(part.is_cuda for part in parts) and torch.cuda.is_current_stream_capturing())
    ):
        return None
    values = torch.cat([_spread(part).float().cpu() for part in parts])
    return {
        name: hashlib.sha256(bytes_of(values.to(kind))).hexdigest()[:16]
        for name, kind in PRECISIONS.items()
        if not narrow or kind in narrow
    }


def _spread(part: Tensor) -> Tensor:
    """Some values of a weight. They are a golden section apart, round and round, since steps of
    one length would stay within a few of its columns.
    """
    count = part.numel()
    turns = torch.arange(min(count, SPREAD), device=part.device)
    return part.detach().reshape(-1)[turns * max(1, int(0.618034 * count)) % count]


def _collect(
    module: nn.Module,
    end: nn.Module,
    before: bool,
    found: list[Tensor],
    only: Sequence[str] | None = None,
) -> bool:
    """Gather what a module holds in order, up to ``end``; whether that was reached.

    ``only``: names of what is meant in it.
    """
    if module is end and before:
        return True
    held: Any = module
    active: Sequence[str] | None = None  # of a layer of peft, the adapters that it computes with
    if hasattr(held, "_disable_adapters"):
        active = () if held._disable_adapters else held.active_adapters
        active = [name for name in active if name not in held.merged_adapters]
    if "_fsdp_wrapped_module" in module._modules:  # below it are shares of weights
        found.append(torch.empty(0))
    for name, part in module._parameters.items():
        if part is not None and (only is None or name in only):
            found.append(part)
    for name, child in module._modules.items():
        if child is not None and (only is None or name in only):
            inside = None if name in ("base_layer", "original_module") else active
            if _collect(child, end, before, found, inside):
                return True
    return module is end
