"""Dividing prompts into those to fit on and those held out."""

import random
from collections import Counter
from collections.abc import Sequence

from lrqp_torch.errors import PromptError, SettingError
from lrqp_torch.tasks.prompts import CLOSING, OPENING, Prompt


def split(
    prompts: Sequence[Prompt], train_share: float = 0.5, seed: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """Divide prompts so that both sides hold every class in the same shares, but for rounding.

    Prompts with the same words stay on one side, wherever their marks are: a probe must not be
    tested on what it was fitted to.

    Args:
        prompts: at least two different texts of each class.
        train_share: of each class, to fit on; strictly between 0 and 1.
        seed: of the order in which they are drawn.

    Returns:
        ``(train, test)``, each in random order.

    Raises:
        SettingError: a share that leaves a side without prompts.
        PromptError: the same prompt under two labels, or a class with too few different texts.
    """
    if not 0 < train_share < 1:
        raise SettingError(
            f"train_share is {train_share}: it must lie between 0 and 1, without either, so that "
            f"there are prompts to fit on and prompts held out"
        )
    _refuse_contradictions(prompts)
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        words = prompt.text.replace(OPENING, "").replace(CLOSING, "")
        groups.setdefault(words, []).append(prompt)
    draws = random.Random(seed)
    train: list[Prompt] = []
    test: list[Prompt] = []
    for label in sorted({prompt.label for prompt in prompts}):
        own = [group for group in groups.values() if group[0].label == label]
        if len(own) < 2:
            raise PromptError(
                f"class {label!r} has {len(own)} different texts of its own; it needs at least 2, "
                f"one to fit on and one held out"
            )
        draws.shuffle(own)
        wanted = round(train_share * sum(map(len, own)))
        cut, drawn = 1, len(own[0])
        while cut < len(own) - 1 and drawn < wanted:
            drawn += len(own[cut])
            cut += 1
        train += [prompt for group in own[:cut] for prompt in group]
        test += [prompt for group in own[cut:] for prompt in group]
    draws.shuffle(train)
    draws.shuffle(test)
    return train, test


def majority_share(train: Sequence[int], test: Sequence[int]) -> float:
    """Accuracy on ``test`` of always naming the most frequent class of ``train``."""
    most = Counter(train).most_common(1)[0][0]
    return sum(label == most for label in test) / len(test)


def _refuse_contradictions(prompts: Sequence[Prompt]) -> None:
    labels: dict[str, str] = {}
    for row, prompt in enumerate(prompts):
        if labels.setdefault(prompt.text, prompt.label) != prompt.label:
            raise PromptError(
                f"prompt {row}, {prompt.text!r}, is {prompt.label!r} here and "
                f"{labels[prompt.text]!r} elsewhere; one prompt can have one label"
            )
