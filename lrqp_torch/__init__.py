"""The least edit to a model's activations that provably changes what a linear probe reads."""

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
from lrqp_torch.stream.positions import position_ids
from lrqp_torch.stream.scopes import Scope
from lrqp_torch.stream.sites import Family, all_sites, register_family
from lrqp_torch.stream.store import ActivationStore
from lrqp_torch.stream.storing import capture_to

__version__ = "0.2.0"

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
    "Solution",
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
