"""What methods that patch are told to write: activations at S2 of other prompts."""

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline, Paired
from lrqp_torch.stream.capture import capture
from lrqp_torch.study.context import StudyContext
from lrqp_torch.study.indirect_objects import IOIPrompts


def partners(context: StudyContext, site: str, *, control: bool) -> Tensor:
    """For each held-out prompt the activation at S2 that a patch writes, (n, d).

    Counterfactual: of the same prompt in the other order, its minimal pair. Control: of another
    held-out prompt with the same order, drawn without replacement; a minimal pair of the same
    order would be the prompt itself.
    """
    data = context.task.test
    if not control:
        return s2_activations(context, data.twins(), site)
    x = context.activations(context.task, "test", "S2", [site])[site]
    other = torch.arange(len(data))
    generator = context.generator()
    for label in (0, 1):
        rows = (data.labels.cpu() == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        other[rows] = rows.roll(1)
    return x[other.to(x.device)]


def partners_of_class(context: StudyContext, site: str, target: Tensor) -> Tensor:
    """Activations at S2 of random training prompts with the orders asked for, (len(target), d)."""
    x = context.activations(context.task, "train", "S2", [site])[site]
    labels = context.task.train.labels.cpu()
    chosen = torch.zeros(len(target), dtype=torch.long)
    generator = context.generator()
    for label in (0, 1):
        rows, wanted = (labels == label).nonzero().flatten(), target.cpu() == label
        drawn = torch.randint(len(rows), (int(wanted.sum()),), generator=generator)
        chosen[wanted] = rows[drawn]
    return x[chosen.to(x.device)]


def with_partners(edit: Baseline, activations: Tensor) -> Baseline:
    """The edit, with what it writes if it is one that needs to be told."""
    return edit.paired(activations) if isinstance(edit, Paired) else edit


def s2_activations(context: StudyContext, data: IOIPrompts, site: str) -> Tensor:
    """Clean activations at S2, (n, d), in float32."""
    found = capture(
        context.model, data.inputs, [site], data.positions["S2"], batch_size=context.batch_size
    )
    return found[site].float()
