"""The floors of a joint problem: the odds that each variable asks, by its own rule."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.edits.odds import floors
from lrqp_torch.qp.stacked import KEEP, StackedGeometry


def slot_floors(
    edits: Mapping[str, LRQP],
    within: Mapping[str, float],
    geometry: StackedGeometry,
    margins: Tensor,
    choice: Tensor,
    held: Tensor,
) -> Tensor:
    """The floor of every slot: log α, the margin at x less τ, or what always holds; (b, m)."""
    columns = []
    for place, (name, edit) in enumerate(edits.items()):
        own = margins[:, geometry.variable == place]
        log_odds = asked_log_odds(edit, own, choice[:, place], held[:, place])
        written, kept = choice[:, place] >= 0, choice[:, place] == KEEP
        slot = torch.arange(own.shape[-1], device=own.device)
        inside = written.unsqueeze(-1) & (slot < edit.probe.n_classes - 1)
        floor = torch.where(inside, log_odds.unsqueeze(-1), -1.0)
        if name in within:
            floor = torch.where(kept.unsqueeze(-1), own - within[name], floor)
        columns.append(floor)
    return torch.cat(columns, -1)


def asked_log_odds(edit: LRQP, margins: Tensor, target: Tensor, held: Tensor) -> Tensor:
    """Log α of a variable by its own rule, (b,); any number where it is not written."""
    n_rivals = edit.probe.n_classes - 1
    margins, target = margins[:, :n_rivals], target.clamp_min(0)
    floor = edit.log_odds.to(margins.device)
    read = floors(margins, target, None, floor, edit.rule, "pairwise")
    given = floors(margins, target, held.clamp_min(0), floor, edit.rule, "pairwise")
    result = torch.where(held >= 0, given, read)
    # Sufficient for total odds of α; their exact form is not linear.
    return result + math.log(n_rivals) if edit.odds == "total" else result
