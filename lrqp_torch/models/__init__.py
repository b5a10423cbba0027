"""Models to run on: the bundled organisms, and a loader for them and for others."""

from lrqp_torch.models.load import load

__all__ = ["load"]
