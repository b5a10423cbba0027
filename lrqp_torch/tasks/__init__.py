"""Tasks of your own: prompts with a marked position, a label, and the answers that go with it."""

from lrqp_torch.study.prompts import Prompt, PromptSet
from lrqp_torch.tasks.applying import Applied, apply
from lrqp_torch.tasks.fitting import fit
from lrqp_torch.tasks.reading import read_prompts
from lrqp_torch.tasks.results import TaskResults
from lrqp_torch.tasks.splitting import split
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
