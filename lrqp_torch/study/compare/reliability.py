"""How completely an edit writes its variable, and how little else it changes.

All three measures are read from oracles: probes fitted to other prompts than the edit, so that an
edit cannot score by fooling its own probe. δ(P, Q) = ½ Σ_z |P(z) − Q(z)| is the total variation
distance between distributions over a variable's classes.

Source: Canby, Davies, Rastogi and Hockenmaier 2024, "Measuring the Reliability of Causal Probing
Methods: Tradeoffs, Limitations, and the Plight of Nullifying Interventions", arXiv 2408.15510. They
are taken prompt by prompt here and then averaged: in a mean over prompts first, an edit that does
nothing would look like one that erases a balanced variable.
"""

import torch
from torch import Tensor


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """δ(P, Q) = ½ Σ |P − Q|, (n,), of distributions (n, K)."""
    return (first - second).abs().sum(-1) / 2


def completeness(after: Tensor, target: Tensor) -> Tensor:
    """C = 1 − δ(P̂, P*), with P* all on the target: P̂(target), the oracle's probability of it, (n,).

    Args:
        after: the oracle's distribution over the edited variable's classes after the edit, (n, K).
        target: the class written, (n,).
    """
    return after.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def nullified(after: Tensor) -> Tensor:
    """C = 1 − K/(K − 1) δ(P̂, U), with U uniform over K classes, (n,): for edits that erase.

    1 where the oracle cannot tell the classes apart, 0 where it is certain of one.
    """
    classes = after.shape[-1]
    uniform = torch.full_like(after, 1 / classes)
    return 1 - classes / (classes - 1) * total_variation(after, uniform)


def selectivity(before: Tensor, after: Tensor) -> Tensor:
    """S = 1 − δ(P̂, P) / m, m = max(1 − min P, max P), (n,): how little a variable was moved.

    m is the largest distance that any distribution has from P.

    Args:
        before: the oracle's distribution over the classes of a variable that the edit should leave
            alone, before the edit, (n, K).
        after: the same after it.
    """
    most = torch.maximum(1 - before.amin(-1), before.amax(-1))
    return 1 - total_variation(after, before) / most


def reliability(complete: Tensor, selective: Tensor) -> Tensor:
    """R = 2 C S / (C + S), the harmonic mean; 0 where both are 0."""
    total = complete + selective
    return torch.where(total > 0, 2 * complete * selective / total.clamp_min(1e-300), 0.0)
