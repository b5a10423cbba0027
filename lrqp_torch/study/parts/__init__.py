"""The parts of the study, one file each, in the order in which they run; none knows another.

A part is registered by a row of :data:`PARTS` and by the instance ``PART`` of its class in the file
of that name. The rows say what the part's command does, so that ``lrqp --help`` imports none of
them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrqp_torch.study.part import Part

PARTS = {
    "flipping": "At every site: what a probe can read, and how many answers an edit of it flips.",
    "joint": "Edit several variables, each alone and all together: do the effects add up, and do "
    "they match those of patching?",
    "geometry": "Principal components of activations, and how much of them the classes explain.",
    "probing": "Which facts about a prompt can be read at every site, beside shuffled labels.",
    "dose": "Edit at the best site over a range of odds: how much belief flips an answer?",
    "heads": "Where attention heads look, what they write, and which roles they play.",
    "circuit": "What S-inhibition heads report and where name movers look under the edit.",
    "mediation": "How much of the edit's effect goes through the name movers' attention.",
    "compare": "Compare LRQP with steering, LEACE, DAS, patching and others: effect, side effects. "
    "Trains some of them, so --parts all leaves it out.",
    "controls": "Is the effect an interpretability illusion? Splits the edit by what later layers "
    "read.",
}
"""Name of each part to one line about it, in the order in which they run."""


def find_part(name: str) -> "Part[Any]":
    """The part of a name in :data:`PARTS`."""
    part: Part[Any] = import_module(f"{__name__}.{name}").PART
    return part
