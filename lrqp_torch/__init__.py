"""The least edit to a model's activations that provably changes what a linear probe reads."""

from lrqp_torch import errors, sites
from lrqp_torch.activation_store.store import ActivationStore
from lrqp_torch.activation_store.storing import capture_to
from lrqp_torch.activations import capture, capture_batches
from lrqp_torch.constrained import ConstrainedLRQP
from lrqp_torch.covariance import Covariance, Mahalanobis
from lrqp_torch.edit import LRQP
from lrqp_torch.generation import Scope
from lrqp_torch.intervention import EditContext, Intervention, intervene
from lrqp_torch.joint import JointLRQP
from lrqp_torch.positions import position_ids
from lrqp_torch.probe import LinearProbe
from lrqp_torch.qp import MahalanobisQP, Solution, Status
from lrqp_torch.run import EditRun
from lrqp_torch.sharing.library import EditLibrary
from lrqp_torch.sharing.provenance import Provenance
from lrqp_torch.sites import Family, all_sites, register_family

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
