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
    "flipping": "Sweep over sites: what a probe can read there, and which answers an edit flips.",
    "joint": "Several variables edited one by one and all together, or one of many classes: what "
    "each does, whether it adds up, and how near it comes to a patch.",
    "geometry": "Principal directions of activations, and how much of them the classes explain.",
    "probing": "Linear probes for the facts about a prompt, at every site, beside their controls.",
    "dose": "Edits at the best site over a range of odds: how much belief flips an answer.",
    "heads": "Attention heads: where they look, what they write, and their roles.",
    "circuit": "What S-inhibition heads report and where name movers look under the edit.",
    "mediation": "Whether the edit works through the attention patterns of the name movers.",
    "compare": "LRQP beside other edits of the same belief: effect, side effects, Pareto front "
    "(not among all: it trains some of them).",
    "controls": "Whether the edit works through what the model reads: controls for illusions.",
}
"""Name of each part to one line about it, in the order in which they run."""


def find_part(name: str) -> "Part[Any]":
    """The part of a name in :data:`PARTS`."""
    part: Part[Any] = import_module(f"{__name__}.{name}").PART
    return part
