"""The quadratic program of an edit: posed in cvxpy, held as a cvxpylayer, solved in torch."""

from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.problem import MahalanobisQP
from lrqp_torch.qp.solution import Solution, Status
from lrqp_torch.qp.solver import DualActiveSet

__all__ = ["DualActiveSet", "MahalanobisQP", "ProbeGeometry", "Solution", "Status"]
