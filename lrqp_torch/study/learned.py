"""Learned edits of the IOI task: the same prompts, in the form that :mod:`lrqp_torch.learn` reads.

The counterfactual edit at S2 writes the other order of the two names; S should then win over IO.
"""

from pathlib import Path
from typing import Any

import torch

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.learn import EditPrompts, Learned, LearnOptions, learn
from lrqp_torch.study.indirect_objects import IOIPrompts


def counterfactual_prompts(data: IOIPrompts) -> EditPrompts:
    """IOI prompts whose edit at S2 writes the other order, so that S wins over IO at END."""
    labels = data.labels
    return EditPrompts(
        inputs=data.inputs,
        positions=data.positions["S2"],
        target=1 - labels,
        source=labels,
        read=data.positions["END"],
        wins=data.s_tokens,
        loses=data.io_tokens,
    )


def fit_learned(
    model: Any,
    site: str,
    start: LRQP,
    train: IOIPrompts,
    *,
    held_back: float = 0.25,
    options: LearnOptions | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Learned:
    """Learn an edit from the prompts that probes and other edits are fitted to, and no others.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        site: where to edit, at S2.
        start: the edit as fitted to the same prompts.
        train: those prompts.
        held_back: share of them, the last, by whose loss the best epoch is chosen.
        options: of the learning.
        folder: where to keep checkpoints.
        progress: show a progress bar.

    Raises:
        SettingError: held_back leaves no prompts on one side.
        LearningError: see :func:`lrqp_torch.learn.learn`.
    """
    count = round(held_back * len(train))
    if not 0 < count < len(train):
        raise SettingError(
            f"held_back {held_back} of {len(train)} prompts leaves none to learn from or to choose "
            f"the epoch by"
        )
    rows = torch.arange(len(train))
    prompts = counterfactual_prompts(train)
    return learn(
        model,
        site,
        start,
        prompts[rows[:-count]],
        validation=prompts[rows[-count:]],
        options=options,
        folder=folder,
        progress=progress,
    )
