"""The parts of the study, one file each; none knows another."""

from typing import Any

from lrqp_torch.study.part import Part
from lrqp_torch.study.parts.geometry import Geometry

PARTS: tuple[Part[Any], ...] = (Geometry(),)
"""In the order in which they run and stand in the report."""
