"""Which edit each prompt of a batch gets, and which answer the model must then give."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from benchmarks.organisms.order import OrderStatistics
from benchmarks.organisms.prompts import Prompts


class Kind(IntEnum):
    """What is put at S2."""

    TWIN = 0
    """The stream of the prompt's twin: same names, other order."""
    OTHER = 1
    """The stream of any other prompt; before the used sites, which know only the name there, a
    push in a random direction instead."""
    LINEAR = 2
    """The stream moved along the linear order direction."""


@dataclass(frozen=True)
class Plan:
    """One edit for each prompt of a batch.

    Attributes:
        sites: Index of the site, ``(batch,)``.
        kinds: :class:`Kind` of the edit, ``(batch,)``.
        values: What S2's stream becomes there, ``(batch, d)``.
        flips: Where the answer must become the repeated name, ``(batch,)``.
    """

    sites: Tensor
    kinds: Tensor
    values: Tensor
    flips: Tensor


def site_weights(n_sites: int, used: range) -> Tensor:
    """How often each site is drawn: most at the used ones, and next to their two borders."""
    weights = torch.ones(n_sites)
    weights[[0, n_sites - 2, n_sites - 1]] = 0.5
    weights[used.start - 2 : used.stop + 2] = 2.0
    weights[used.start : used.stop] = 3.0
    return weights


def draw_plan(
    prompts: Prompts,
    activations: Tensor,
    statistics: OrderStatistics,
    used: range,
    push: float,
) -> Plan:
    """Draw a site and an edit for every prompt.

    Args:
        prompts: Pairs of twins: row ``i`` and row ``i + n/2``.
        activations: The clean S2 activations, ``(sites, batch, d)``.
        statistics: For the linear edits.
        used: The sites at which the order must count; at all others nothing may change.
        push: Greatest size of a random push, in typical deviations of the activations.

    Returns:
        The plan. A fifth of the linear edits are controls, towards the order that is there.
    """
    n_sites, n, _ = activations.shape
    rows = prompts.rows
    sites = torch.multinomial(site_weights(n_sites, used), n, replacement=True)
    kinds = torch.multinomial(torch.tensor([0.3, 0.3, 0.4]), n, replacement=True)
    here = activations[sites, rows]
    others = torch.randperm(n)
    early = sites < used.start

    control = torch.rand(n) < 0.2
    target = torch.where(control, prompts.abb, 1 - prompts.abb)
    linear = statistics.edited(here, sites, target, 0.7 + 1.3 * torch.rand(n))

    centred = (activations - activations.mean(1, keepdim=True)).detach()
    mixture = torch.randn(n, n) / n**0.5
    direction = torch.einsum("nb,nbd->nd", mixture, centred[sites])
    pushed = here + push * torch.rand(n, 1) * direction

    values = torch.stack(
        [
            activations[sites, rows.roll(n // 2)],
            torch.where(early[:, None], pushed, activations[sites, others]),
            linear,
        ]
    )[kinds, rows]
    told = torch.stack(
        [1 - prompts.abb, torch.where(early, prompts.abb, prompts.abb[others]), target]
    )[kinds, rows]
    at_used = (sites >= used.start) & (sites < used.stop)
    return Plan(sites, kinds, values, at_used & (told != prompts.abb))
