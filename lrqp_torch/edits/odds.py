"""The odds rule: how certain an edit must make the probe, from what the probe read before."""

import math
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["mirror", "fixed"]
Odds = Literal["pairwise", "total"]


def floors(
    margins: Tensor,
    target: Tensor,
    source: Tensor | None,
    log_odds: Tensor,
    rule: Rule,
    odds: Odds,
) -> Tensor:
    """Log α of each activation, (B,), in nats; differentiable.

    ``mirror``: max(z_v − z_t, log_odds), v the source class, by default the probe's own reading.
    ``fixed``: log_odds. ``total`` adds log(K − 1) to either.

    Args:
        margins: z_t − z_ℓ for the other classes ℓ ascending, (B, K−1).
        target: t, (B,).
        source: v, (B,), or None.
        log_odds: the least log α, ().
        rule: ``"mirror"`` or ``"fixed"``.
        odds: ``"pairwise"`` or ``"total"``.
    """
    floor = log_odds.expand(len(margins))
    if rule == "mirror":
        if source is None:
            belief = -margins.amin(-1).clamp_max(0.0)
        else:
            rival = (source - (source > target).long()).clamp_max(margins.shape[-1] - 1)
            held = -margins.gather(-1, rival.unsqueeze(-1)).squeeze(-1)
            belief = torch.where(source == target, 0.0, held)
        floor = torch.maximum(belief, floor)
    return floor + math.log(margins.shape[-1]) if odds == "total" else floor
