"""The league table: every way to make the same edit, on the same flip, sites and prompts.

Effect: answers flipped by counterfactual edits and, as a check, by control edits; the logit
difference; the attention of the name movers. Size: in both norms. Side effect: KL of the next-token
distribution at unrelated positions, and on unrelated text. Belief: odds, completeness, selectivity
and reliability under independent probes (arXiv 2408.15510). Curves of effect against side effect
come from a sweep over every method's strength, so that methods are compared at equal effect.
"""

from lrqp_torch.study.compare.computing import compute, work
from lrqp_torch.study.compare.figures import draw
from lrqp_torch.study.compare.options import DEFAULTS, CompareOptions
from lrqp_torch.study.compare.panels import panels
from lrqp_torch.study.compare.result import CompareResult, MethodResult, SiteComparison, from_json
from lrqp_torch.study.compare.trained import Training

__all__ = [
    "DEFAULTS",
    "CompareOptions",
    "CompareResult",
    "MethodResult",
    "SiteComparison",
    "Training",
    "compute",
    "draw",
    "from_json",
    "panels",
    "work",
]
