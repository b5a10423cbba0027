"""Attention sinks: tokens at which a model keeps what it has no use for.

A text's first token, and in some models others, carries a few coordinates of enormous size from
the early layers to the last ones. A metric and a probe fitted there are those of the sink, and an
edit of a belief is small beside it, so that what is read and flipped there says little.

Source: Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762 (massive activations).
"""

import torch

from lrqp_torch.stream.capture import capture
from lrqp_torch.study.context import StudyContext, evenly

TIMES_MEDIAN = 20.0
"""A token whose norm is more than this many medians is a sink."""

LOOKED_AT = 32
"""Prompts that are looked at."""

MOST_SITES = 12
"""Sites that are looked at, evenly spaced."""


@torch.no_grad()
def find_sink(context: StudyContext) -> str | None:
    """A warning where tokens that a study edits are sinks; None where they are not.

        |x at the edited token|  >  20 · median over all tokens of |x|

    Args:
        context: the model and its prompts, of which the first 32 to fit on are looked at.
    """
    few = context.task.train[: min(LOOKED_AT, len(context.task.train))].trimmed()
    real = few.inputs["attention_mask"].bool()
    edited = few.edited
    found = capture(
        context.model,
        few.inputs,
        evenly(context.sites, MOST_SITES),
        positions=real,
        batch_size=context.batch_size,
    )
    most, sinks, rows = 0.0, [], torch.zeros(len(few), dtype=torch.bool)
    for site, x in found.items():
        norms = torch.zeros(real.shape, dtype=torch.float64)
        norms[real] = x.double().norm(dim=-1).cpu()
        times = norms / norms[real].median()
        here = (times > TIMES_MEDIAN) & edited
        if bool(here.any()):
            sinks.append(site)
            rows |= here.any(1)
            most = max(most, float(times[here].max()))
    if not sinks:
        return None
    return (
        f"The edited token of {int(rows.sum())} of the first {len(few)} prompts is an attention "
        f"sink at {', '.join(sinks)}: its norm is up to {most:.0f} times the median token's. What "
        f"is read and flipped there says little of the class; put a token in front of the prompts "
        f"(--bos always), or mark other words."
    )
