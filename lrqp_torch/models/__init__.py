"""Models to run on: the bundled organism, and a loader for it and for others."""

from lrqp_torch.models.load import load

__all__ = ["load"]
