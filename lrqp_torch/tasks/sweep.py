"""Every edit of a study of your own, towards both targets, on held-out prompts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import PromptError
from lrqp_torch.stream.placement import input_device
from lrqp_torch.stream.replay import Replay
from lrqp_torch.study.context import Advance, no_progress
from lrqp_torch.study.flipping import CONDITIONS, in_batches
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.side_by_side import edited_side_by_side, finite
from lrqp_torch.tasks.fitting import next_class


@torch.no_grad()
def sweep(
    model: Any,
    prompts: PromptSet,
    edits: Mapping[str, LRQP],
    *,
    batch_size: int = 64,
    advance: Advance = no_progress,
) -> dict[str, Tensor]:
    """Run every edit, towards the class that holds (control) and the next one (counterfactual).

    Each batch runs clean once; each edit then reruns only what it can change.

    Args:
        model: a transformers causal language model in evaluation mode.
        prompts: held-out prompts, padded on the left.
        edits: site name to edit.
        batch_size: prompts a batch.
        advance: called with the number of runs done, ``1 + 2 · len(edits)`` a batch in all.

    Returns:
        One number a prompt, (n,), on the CPU, in the order of ``prompts``:

        - ``labels`` and ``other``: the class that holds and the counterfactual one;
        - ``clean.NAME`` with the names of :func:`read_answers`;
        - ``SITE.CONDITION.NAME`` with these names, those of
          :data:`~lrqp_torch.study.side_by_side.RECORD`, and ``divergence``,
          KL(clean ‖ edited) of the next token in nats.

    Raises:
        PromptError: prompts that do not end in the last column.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if not bool((prompts.end == prompts.inputs["input_ids"].shape[1] - 1).all()):
        raise PromptError(
            "the prompts of a study must be padded on the left: use "
            "PromptSet.encode(..., padding_side='left')"
        )
    device = input_device(model)
    labels = prompts.labels.cpu()
    flat = {"labels": labels, "other": next_class(labels, len(prompts.classes))}
    # A later position means a shorter suffix to run again.
    order = torch.argsort(prompts.position.cpu(), stable=True)
    for rows in in_batches(order, batch_size):
        for name, values in _sweep_batch(model, prompts[rows].to(device), edits, advance).items():
            flat.setdefault(name, values.new_zeros(len(prompts)))[rows] = values
    return flat


def read_answers(prompts: PromptSet, logits: Tensor, other: Tensor) -> dict[str, Tensor]:
    """What the model answers, (n,) each in float64 on the CPU; nothing for a task without answers.

    Args:
        prompts: with their classes' answers.
        logits: of the next token, (n, vocabulary).
        other: a class besides the one that holds, (n,).

    Returns:
        ``preference``, the score of the class that holds minus that of ``other``; ``own_lead`` and
        ``other_lead``, the score of each minus the highest of all other classes, positive where it
        is what the model answers.
    """
    if prompts.answers is None:
        return {}
    scores = prompts.scores(logits).cpu()
    own, other = prompts.labels.cpu()[:, None], other.cpu()[:, None]
    preference = scores.gather(-1, own) - scores.gather(-1, other)
    leads = {"own_lead": lead(scores, own), "other_lead": lead(scores, other)}
    return {"preference": preference.squeeze(-1)} | leads


def divergences(clean: Tensor, edited: Tensor) -> Tensor:
    """KL(clean ‖ edited) of the next token in nats, (n,), of logits (n, vocabulary)."""
    before, after = clean.double().log_softmax(-1), edited.double().log_softmax(-1)
    # Rounding can leave −1e-17 where nothing changed.
    return (before.exp() * (before - after)).sum(-1).clamp_min(0).cpu()


def lead(scores: Tensor, classes: Tensor) -> Tensor:
    """Score of a class minus the highest of all others, (n,), of scores (n, K), classes (n, 1)."""
    rival = scores.scatter(-1, classes, float("-inf")).amax(-1)
    return scores.gather(-1, classes).squeeze(-1) - rival


def _sweep_batch(
    model: Any, batch: PromptSet, edits: Mapping[str, LRQP], advance: Advance
) -> dict[str, Tensor]:
    labels = batch.labels
    other = next_class(labels, len(batch.classes))
    targets = dict(zip(CONDITIONS, (labels, other), strict=True))
    replay = Replay(model, batch.inputs, int(batch.position.min()), copies=len(targets))
    clean = finite(replay.clean_logits, "the clean run")
    found = {f"clean.{k}": v for k, v in read_answers(batch, clean, other).items()}
    advance(1)
    for site, conditions in edited_side_by_side(replay, edits, batch.position, labels, targets):
        for condition, edited in conditions.items():
            columns = edited.record | read_answers(batch, edited.logits, other)
            columns["divergence"] = divergences(clean, edited.logits)
            found |= {f"{site}.{condition}.{name}": values for name, values in columns.items()}
        advance(len(targets))
    return found
