"""Tasks of your own: prompts with a marked position, a label, and the answers that go with it.

The names of :mod:`lrqp_torch.study` that are for prompts of one's own, under the name that they
have had since version 0.1.
"""

from typing import TYPE_CHECKING, Any

from lrqp_torch import study as _study

if TYPE_CHECKING:
    from lrqp_torch.study.applying import Applied, apply
    from lrqp_torch.study.fitting import fit
    from lrqp_torch.study.prompts import Prompt, PromptSet, split
    from lrqp_torch.study.reading import read_prompts
    from lrqp_torch.study.results import StudyResults as TaskResults
    from lrqp_torch.study.run import study

__all__ = [
    "Applied",
    "Prompt",
    "PromptSet",
    "TaskResults",
    "apply",
    "fit",
    "read_prompts",
    "split",
    "study",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_study, "StudyResults" if name == "TaskResults" else name)
