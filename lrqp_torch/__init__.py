"""The least edit to a model's activations that provably changes what a linear probe reads.

Names are imported when they are first used: ``import lrqp_torch`` alone loads nothing, torch
neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrqp_torch import errors
    from lrqp_torch.edits.constrained import ConstrainedLRQP
    from lrqp_torch.edits.joint import JointLRQP
    from lrqp_torch.edits.library import EditLibrary
    from lrqp_torch.edits.lrqp import LRQP
    from lrqp_torch.edits.provenance import Provenance
    from lrqp_torch.edits.record import EditRun
    from lrqp_torch.probes.covariance import Covariance, Mahalanobis
    from lrqp_torch.probes.linear import LinearProbe
    from lrqp_torch.qp import MahalanobisQP, Solution, Status
    from lrqp_torch.stream import sites
    from lrqp_torch.stream.capture import capture, capture_batches
    from lrqp_torch.stream.intervene import EditContext, Intervention, intervene
    from lrqp_torch.stream.positions import Scope, position_ids
    from lrqp_torch.stream.sites import Family, Site, all_sites, register_family
    from lrqp_torch.stream.store import ActivationStore, capture_to
    from lrqp_torch.stream.text import Span

__version__ = "0.12.0"

__all__ = [
    "LRQP",
    "ActivationStore",
    "ConstrainedLRQP",
    "Covariance",
    "EditContext",
    "EditLibrary",
    "EditRun",
    "Family",
    "Intervention",
    "JointLRQP",
    "LinearProbe",
    "Mahalanobis",
    "MahalanobisQP",
    "Provenance",
    "Scope",
    "Site",
    "Solution",
    "Span",
    "Status",
    "all_sites",
    "capture",
    "capture_batches",
    "capture_to",
    "errors",
    "intervene",
    "position_ids",
    "register_family",
    "sites",
]

# The module of each name, as in the imports above, which type checkers read.
_MODULES = {
    "edits.constrained": ["ConstrainedLRQP"],
    "edits.joint": ["JointLRQP"],
    "edits.library": ["EditLibrary"],
    "edits.lrqp": ["LRQP"],
    "edits.provenance": ["Provenance"],
    "edits.record": ["EditRun"],
    "probes.covariance": ["Covariance", "Mahalanobis"],
    "probes.linear": ["LinearProbe"],
    "qp": ["MahalanobisQP", "Solution", "Status"],
    "stream.capture": ["capture", "capture_batches"],
    "stream.intervene": ["EditContext", "Intervention", "intervene"],
    "stream.positions": ["Scope", "position_ids"],
    "stream.sites": ["Family", "Site", "all_sites", "register_family"],
    "stream.store": ["ActivationStore", "capture_to"],
    "stream.text": ["Span"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
# Modules and packages that are public names themselves.
_ROOMS = {"sites": "stream.sites", "errors": "errors", "baselines": "baselines", "ioi": "ioi"} | {
    name: name for name in ("distributed", "learn", "models", "plot", "sensitivity", "tasks")
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{_ROOMS[name]}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
