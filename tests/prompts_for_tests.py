"""Prompts about two names as a task of one's own, for the bundled organism."""

import random
from functools import cache

from lrqp_torch import models
from lrqp_torch.ioi import NAMES
from lrqp_torch.ioi.prompts import draw, single_token_names
from lrqp_torch.tasks import Prompt


@cache
def organism():
    """Model and tokenizer, loaded once."""
    return models.load("organism")


def names_task(n: int, seed: int = 0, answers: bool = True) -> list[Prompt]:
    """Prompts with S2 marked, labelled with the order of the names, ABBA or BABA."""
    names = tuple(single_token_names(organism()[1], NAMES))
    prompts = []
    for drawn in draw(n, names, ("",), random.Random(seed)):
        at, name = drawn.starts[2], drawn.s_name
        text = f"{drawn.text[:at]}[[{name}]]{drawn.text[at + len(name) :]}"
        own, other = ("ABBA", "BABA") if drawn.abb else ("BABA", "ABBA")
        said = {own: (f" {drawn.io_name}",), other: (f" {name}",)}
        prompts.append(Prompt(text, own, said if answers else None))
    return prompts
