"""Several variables edited at one site in one problem: every odds holds at the end."""

from lrqp_torch.joint.edit import JointLRQP
from lrqp_torch.joint.solution import JointSolution

__all__ = ["JointLRQP", "JointSolution"]
