"""Effect against side effect: which settings no other one beats, and what an equal effect costs."""

from collections.abc import Sequence

import torch
from torch import Tensor


def front(effects: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Which points are Pareto optimal: no other has at least their effect for at most their cost.

    Of two equal points both are.

    Args:
        effects: to be large.
        costs: to be small.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -effects[i]))
    best = [False] * len(costs)
    reached, at = float("-inf"), float("-inf")
    for i in order:
        if effects[i] > reached:
            reached, at = effects[i], costs[i]
        best[i] = effects[i] == reached and costs[i] == at
    return best


def cost_at(effects: Tensor, costs: Tensor, wanted: Tensor) -> Tensor:
    """The cost at which a curve first reaches an effect, with straight lines between its points.

    Args:
        effects: of rising strengths, (..., m); the curve starts at effect 0 and cost 0.
        costs: the same.
        wanted: (...), above 0.

    Returns:
        (...); NaN where the curve does not reach the effect.
    """
    zero = torch.zeros_like(effects[..., :1])
    effects, costs = torch.cat([zero, effects], -1), torch.cat([zero, costs], -1)
    asked = wanted.unsqueeze(-1)
    crossing = (effects[..., :-1] < asked) & (effects[..., 1:] >= asked)
    first = crossing.int().argmax(-1, keepdim=True)

    def ends(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.gather(-1, first).squeeze(-1), values.gather(-1, first + 1).squeeze(-1)

    (low, high), (cheap, dear) = ends(effects), ends(costs)
    share = (wanted - low) / torch.where(high > low, high - low, 1.0)
    reached = cheap + share * (dear - cheap)
    return torch.where(crossing.any(-1), reached, torch.nan)
