"""Dividing prompts into those to fit on and those held out."""

import random
from collections import Counter
from collections.abc import Sequence

from lrqp_torch.errors import PromptError, SettingError
from lrqp_torch.study.prompts import CLOSING, OPENING, Prompt


def split(
    prompts: Sequence[Prompt], train_share: float = 0.5, seed: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """Divide prompts so that both sides hold every class in the same shares, but for rounding.

    Prompts with the same words stay on one side, wherever their marks are: a probe must not be
    tested on what it was fitted to. Where such prompts have several labels, texts with the same
    labels are divided among themselves; one that is alone with its labels goes to the side that
    lacks them more.

    Args:
        prompts: at least two different texts of each class.
        train_share: of each class, to fit on; strictly between 0 and 1.
        seed: of the order in which they are drawn.

    Returns:
        ``(train, test)``, each in random order.

    Raises:
        SettingError: a share that leaves a side without prompts.
        PromptError: no prompts, the same prompt under two labels, or a class with too few different
            texts to be on both sides.
    """
    if not 0 < train_share < 1:
        raise SettingError(
            f"train_share is {train_share}: it must lie between 0 and 1, without either, so that "
            f"there are prompts to fit on and prompts held out"
        )
    if not prompts:
        raise PromptError("no prompts were given")
    _refuse_contradictions(prompts)
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        words = prompt.text.replace(OPENING, "").replace(CLOSING, "")
        groups.setdefault(words, []).append(prompt)
    by_labels: dict[tuple[str, ...], list[list[Prompt]]] = {}
    for group in groups.values():
        by_labels.setdefault(tuple(sorted(_labels(group))), []).append(group)
    for label in sorted(_labels(prompts)):
        texts = sum(len(own) for labels, own in by_labels.items() if label in labels)
        if texts < 2:
            raise PromptError(
                f"class {label!r} has {texts} different texts (marks aside); it needs at least 2, "
                f"one to fit on and one held out"
            )
    draws = random.Random(seed)
    train: list[Prompt] = []
    test: list[Prompt] = []
    alone = []
    for _, own in sorted(by_labels.items()):
        if len(own) < 2:
            alone += own
            continue
        draws.shuffle(own)
        wanted = round(train_share * sum(map(len, own)))
        cut, drawn = 1, len(own[0])
        while cut < len(own) - 1 and drawn < wanted:
            drawn += len(own[cut])
            cut += 1
        train += [prompt for group in own[:cut] for prompt in group]
        test += [prompt for group in own[cut:] for prompt in group]
    total = _labels(prompts)
    for group in alone:
        fitted, held = _labels(train), _labels(test)
        # What each side has of the labels, in parts of what it is to have.
        fuller = sum(
            (fitted[label] / train_share - held[label] / (1 - train_share)) / total[label]
            for label in _labels(group)
        )
        (test if fuller > 0 else train).extend(group)
    for label in sorted(total):
        if not (_labels(train)[label] and _labels(test)[label]):
            raise PromptError(
                f"class {label!r} is on one side only: it shares its few texts with other classes; "
                f"give it more texts"
            )
    draws.shuffle(train)
    draws.shuffle(test)
    return train, test


def majority_share(train: Sequence[int], test: Sequence[int]) -> float:
    """Accuracy on ``test`` of always naming the most frequent class of ``train``."""
    most = Counter(train).most_common(1)[0][0]
    return sum(label == most for label in test) / len(test)


def _labels(prompts: Sequence[Prompt]) -> Counter[str]:
    return Counter(prompt.label for prompt in prompts)


def _refuse_contradictions(prompts: Sequence[Prompt]) -> None:
    labels: dict[str, str] = {}
    for row, prompt in enumerate(prompts):
        if labels.setdefault(prompt.text, prompt.label) != prompt.label:
            raise PromptError(
                f"prompt {row}, {prompt.text!r}, is {prompt.label!r} here and "
                f"{labels[prompt.text]!r} elsewhere; one prompt can have one label"
            )
