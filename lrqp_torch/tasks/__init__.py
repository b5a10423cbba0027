"""Tasks of your own: prompts with a marked position, a label, and the answers that go with it.

The names of the study that are for prompts of one's own. They are imported when they are first
used, since they bring the rest of the package with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrqp_torch.study.editing import Applied, apply, fit
    from lrqp_torch.study.prompts import Prompt, PromptSet, split
    from lrqp_torch.study.reading import read_prompts
    from lrqp_torch.study.results import StudyResults
    from lrqp_torch.study.results import StudyResults as TaskResults
    from lrqp_torch.study.run import study

__all__ = [
    "Applied",
    "Prompt",
    "PromptSet",
    "StudyResults",
    "TaskResults",
    "apply",
    "fit",
    "read_prompts",
    "split",
    "study",
]

# The module of each name, as in the imports above, which type checkers read.
_HOMES = {
    "editing": ["Applied", "apply", "fit"],
    "prompts": ["Prompt", "PromptSet", "split"],
    "reading": ["read_prompts"],
    "results": ["StudyResults", "TaskResults"],
    "run": ["study"],
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            home = import_module(f"lrqp_torch.study.{module}")
            return getattr(home, "StudyResults" if name == "TaskResults" else name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
