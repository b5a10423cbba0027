"""The Euclidean least edit: LRQP with Σ = I."""

from typing import ClassVar

from lrqp_torch.baselines.least_edit import LeastEdit
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.probes.covariance import Mahalanobis


class EuclideanLeastEdit(LeastEdit):
    """The shortest edit, in the units of the stream, that reaches the reference's odds.

        minimise  ‖x' − x‖²   subject to  z_t(x') − z_ℓ(x') ≥ log α  for all ℓ ≠ t

    For K = 2 it moves along the probe's own weights: x' = x + max(0, log α − a·x − c) a / ‖a‖² with
    a = w_t − w_ℓ and c = b_t − b_ℓ. LiSeCo (Cheng and Amo Alonso 2024, arXiv 2405.15454) and MERA
    (Hedström et al. 2025, arXiv 2510.13290) make this edit, each with its own probe and threshold.

    Args:
        reference: gives the probe and the odds rule, and the metric in which the edit is measured.
        strength: see :class:`Baseline`.
    """

    name: ClassVar[str] = "euclidean"
    title: ClassVar[str] = "Euclidean least edit"

    def __init__(self, reference: LRQP, *, strength: float = 1.0) -> None:
        metric = Mahalanobis.euclidean(reference.probe.width)
        super().__init__(reference, metric, strength=strength)
