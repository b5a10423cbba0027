"""Tasks of your own: prompts with a marked position, a label, and the answers that go with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lrqp_torch.tasks.prompts import Prompt, PromptSet
from lrqp_torch.tasks.reading import read_prompts
from lrqp_torch.tasks.splitting import split

if TYPE_CHECKING:
    from lrqp_torch.tasks.applying import Applied, apply
    from lrqp_torch.tasks.fitting import fit
    from lrqp_torch.tasks.results import TaskResults
    from lrqp_torch.tasks.studying import study

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

# These import the study, which itself reads prompts with the modules here.
_LATER = {
    "Applied": "applying",
    "TaskResults": "results",
    "apply": "applying",
    "fit": "fitting",
    "study": "studying",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
