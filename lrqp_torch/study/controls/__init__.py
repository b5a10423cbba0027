"""Illusion controls of the edit at the best site: does it work through what the model reads?

After Makelov, Lange and Nanda 2023, "Is This the Subspace You Are Looking for?" (arXiv 2311.17030):
an edit along one direction may change the answer although that direction means nothing to the
model. So the edit is split into the part that later parts of the model read and the rest, each run
alone; it is moved to other sites; edits that know nothing of the variable are put beside it; and
edits from disjoint halves of the prompts are compared.
"""

from typing import Any

from lrqp_torch.study.controls.computing import compute, work
from lrqp_torch.study.controls.figures import draw
from lrqp_torch.study.controls.outcomes import ControlsResult
from lrqp_torch.study.controls.panels import panels

__all__ = ["ControlsResult", "compute", "draw", "from_json", "panels", "work"]


def from_json(raw: dict[str, Any]) -> ControlsResult:
    """Read back what ``dataclasses.asdict`` made of a result."""
    return ControlsResult.from_json(raw)
