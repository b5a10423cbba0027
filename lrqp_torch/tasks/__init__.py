"""Tasks of your own: prompts with a marked position, a label, and the answers that go with it."""

from lrqp_torch.tasks.prompts import PromptSet
from lrqp_torch.tasks.reading import read_prompts

__all__ = ["PromptSet", "read_prompts"]
