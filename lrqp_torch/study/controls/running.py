"""Adding given displacements to the stream at S2, and what the model then answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import WidthError
from lrqp_torch.stream.intervene import Edit, EditContext, Intervention, intervene
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.running import answers, batches


@dataclass(frozen=True)
class Trial:
    """A displacement of every held-out prompt.

    Attributes:
        site: where it is added, at S2.
        delta: one a prompt, (n, d).
    """

    site: str
    delta: Tensor


@torch.no_grad()
def run_trials(
    context: StudyContext, trials: Sequence[Trial], advance: Advance = no_progress
) -> tuple[Tensor, list[Tensor]]:
    """Logit differences IO − S of the held-out prompts, clean and with each trial's displacements.

    Each batch runs clean once; each trial then reruns only what it can change.

    Args:
        context: the model and its prompts.
        trials: what to add, and where.
        advance: called with the number of prompts after each batch.

    Returns:
        The clean logit differences, (n,), and those of each trial, (n,) each; float64, on the CPU.

    Raises:
        WidthError: a trial without one displacement for each held-out prompt.
        NonFiniteError: a displacement or the model's logits hold NaN or infinity.
    """
    data = context.task.test
    for trial in trials:
        if trial.delta.ndim != 2 or len(trial.delta) != len(data):
            raise WidthError(
                f"a trial at {trial.site} has displacements {tuple(trial.delta.shape)}; give one "
                f"for each of the {len(data)} held-out prompts"
            )
    clean = torch.zeros(len(data), dtype=torch.float64)
    found = [torch.zeros_like(clean) for _ in trials]
    for batch in batches(context.model, data, context.batch_size):
        rows, at = batch.rows, batch.prompts.position
        clean[rows] = answers(batch.prompts, batch.clean)["preference"]
        for trial, values in zip(trials, found, strict=True):
            delta = trial.delta[rows.to(trial.delta.device)].to(context.device)
            with intervene(context.model, Intervention(trial.site, at, _adding(delta))):
                logits = batch.run(Site.parse(trial.site).layer, f"a trial at {trial.site}")
            values[rows] = answers(batch.prompts, logits)["preference"]
        advance(len(batch))
    return clean, found


def displacements(edit: LRQP, x: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """What an edit adds to activations (n, d), in float64; 0 where it cannot reach the target."""
    wide = x.double()
    return edit.solve(wide, target, source).x_new.detach() - wide


def _adding(delta: Tensor) -> Edit:
    def add(x: Tensor, context: EditContext) -> Tensor:
        return (x.double() + delta[context.index]).to(x.dtype)

    return add
