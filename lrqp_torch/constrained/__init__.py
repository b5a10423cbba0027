"""LRQP with constraints and penalties of one's own, posed in cvxpy and solved as a layer."""

from lrqp_torch.constrained.edit import ConstrainedLRQP

__all__ = ["ConstrainedLRQP"]
