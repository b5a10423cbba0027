"""The study: where a model knows a variable, and where it uses it.

Its names are imported when they are first used, since they bring the rest of the package with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrqp_torch.study.applying import Applied, apply
    from lrqp_torch.study.fitting import fit
    from lrqp_torch.study.prompts import Prompt, PromptSet, split
    from lrqp_torch.study.reading import read_prompts
    from lrqp_torch.study.results import StudyResults
    from lrqp_torch.study.run import study
    from lrqp_torch.study.settings import Settings

# The module of each name, as in the imports above, which type checkers read.
_HOMES = {
    "Applied": "applying",
    "Prompt": "prompts",
    "PromptSet": "prompts",
    "Settings": "settings",
    "StudyResults": "results",
    "apply": "applying",
    "fit": "fitting",
    "read_prompts": "reading",
    "split": "prompts",
    "study": "run",
}

__all__ = [
    "Applied",
    "Prompt",
    "PromptSet",
    "Settings",
    "StudyResults",
    "apply",
    "fit",
    "read_prompts",
    "split",
    "study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
