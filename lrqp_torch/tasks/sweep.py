"""Every edit of a study of your own, towards both targets, on held-out prompts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.study.context import Advance, no_progress
from lrqp_torch.study.flipping import CONDITIONS
from lrqp_torch.study.prompts import PromptSet
from lrqp_torch.study.running import Batch, answers, batches, divergences, next_class, put


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
        - ``clean.NAME`` with the names of :func:`~lrqp_torch.study.running.answers`;
        - ``SITE.CONDITION.NAME`` with these names, those of
          :data:`~lrqp_torch.study.running.RECORD`, and ``divergence``,
          KL(clean ‖ edited) of the next token in nats.

    Raises:
        PromptError: prompts that do not end in the last column.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    labels = prompts.labels.cpu()
    flat = {"labels": labels, "other": next_class(labels, len(prompts.classes))}
    for batch in batches(model, prompts, batch_size, copies=len(CONDITIONS)):
        put(flat, _sweep_batch(batch, edits, advance), batch.rows, len(prompts))
    return flat


def _sweep_batch(
    batch: Batch[PromptSet], edits: Mapping[str, LRQP], advance: Advance
) -> dict[str, Tensor]:
    targets = batch.targets()
    found = {f"clean.{k}": v for k, v in answers(batch.prompts, batch.clean).items()}
    advance(1)
    for site, edit in edits.items():
        for condition, edited in batch.edited(site, edit, targets).items():
            columns = edited.record | answers(batch.prompts, edited.logits)
            columns["divergence"] = divergences(batch.clean, edited.logits)
            found |= {f"{site}.{condition}.{name}": values for name, values in columns.items()}
        advance(len(targets))
    return found
