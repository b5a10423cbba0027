"""What is edited: the held-out prompts at S2, and text that has nothing to do with the task."""

import torch
from torch import Tensor

from lrqp_torch.study.compare.editable import Editable
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.indirect_objects import IOIPrompts

LEAST_TOKENS = 6
"""Texts before the clause with fewer tokens are not used as unrelated text."""


def held_out(data: IOIPrompts) -> Editable:
    """Prompts edited at S2. Unrelated positions are the tokens between S2 and END."""
    columns = torch.arange(data.inputs["input_ids"].shape[1], device=data.io_tokens.device)
    s2, end = (data.positions[name].unsqueeze(1) for name in ("S2", "END"))
    return Editable(
        inputs=data.inputs,
        positions=data.positions["S2"],
        source=data.labels,
        elsewhere=(columns > s2) & (columns < end),
        answers=torch.stack([data.io_tokens, data.s_tokens], dim=-1),
        keys=torch.stack([data.positions["IO"], data.positions["S1"]], dim=-1),
    )


def unrelated(context: StudyContext, most: int) -> tuple[Editable, Tensor] | None:
    """What stands before the first name of held-out prompts, edited at a random token.

    That is the prefix, a sentence of other text without names, and the clause's first words; texts
    come from the study's task, or from its other one where this one has no prefix. The edited token
    is neither the first one nor the last, and is drawn with the study's seed, as is the class
    written there.

    Args:
        context: the prompts.
        most: how many texts at most, the first ones.

    Returns:
        The texts and the classes to write, (n,); None where fewer than two have
        :data:`LEAST_TOKENS` tokens.
    """
    tasks = [context.task, context.other_task]
    data = next((t.test for t in tasks if t is not None and t.name == "prefixed"), None)
    data = context.task.test if data is None else data
    first = data.positions["first"]
    mask = data.inputs["attention_mask"]
    start = (mask.cumsum(1) == 0).sum(1)
    long = (first - start >= LEAST_TOKENS).nonzero().flatten()[:most]
    if len(long) < 2:
        return None
    first, start = first[long], start[long]
    width = int((first - start).max())
    columns = first.unsqueeze(1) - width + torch.arange(width, device=first.device)
    real = columns >= start.unsqueeze(1)
    ids = data.inputs["input_ids"][long].gather(1, columns.clamp_min(0))
    generator = context.generator()
    share = torch.rand(len(long), generator=generator)
    lengths = (first - start).cpu()
    within = 1 + (share * (lengths - 2)).long()
    positions = (width - lengths + within).to(first.device)
    texts = Editable(
        inputs={
            "input_ids": ids,
            "attention_mask": real.long(),
            "position_ids": (real.long().cumsum(1) - 1).clamp_min(0),
        },
        positions=positions,
        source=None,
        elsewhere=torch.arange(width, device=first.device) > positions.unsqueeze(1),
    )
    target = torch.randint(2, (len(long),), generator=generator)
    return texts, target


def only_first(texts: Editable, n: int) -> Editable:
    """The first n texts."""
    rows = torch.arange(min(n, len(texts)))
    return texts.rows(rows, texts.positions.device)
