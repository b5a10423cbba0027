"""The quadratic program of an edit: its geometry, the solvers as objects, and the one loop.

cvxpy and cvxpylayers are loaded only when a layer of theirs is asked for.
"""

from typing import TYPE_CHECKING, Any

from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.geometry import GeometryCache, ProbeGeometry
from lrqp_torch.qp.odds import ODDS, Odds
from lrqp_torch.qp.problem import Floor, MahalanobisQP
from lrqp_torch.qp.reach import Realise
from lrqp_torch.qp.solution import Solution, Status
from lrqp_torch.qp.solvers import ActiveSet, CvxpySolver, Solver
from lrqp_torch.qp.total_odds import TotalOdds

if TYPE_CHECKING:
    from lrqp_torch.qp.layer import DualActiveSet

__all__ = [
    "ODDS",
    "ActiveSet",
    "CvxpySolver",
    "DualActiveSet",
    "Floor",
    "GeometryCache",
    "MahalanobisQP",
    "Odds",
    "OddsRule",
    "ProbeGeometry",
    "Realise",
    "Solution",
    "Solver",
    "Status",
    "TotalOdds",
]


def __getattr__(name: str) -> Any:
    if name == "DualActiveSet":
        from lrqp_torch.qp.layer import DualActiveSet

        return DualActiveSet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
