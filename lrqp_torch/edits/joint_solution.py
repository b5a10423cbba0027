"""What one problem did to several variables, with the odds of each read back."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lrqp_torch.edits.joint_floors import asked_log_odds
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.qp import Solution
from lrqp_torch.qp.problem import Realise
from lrqp_torch.qp.stacked import StackedGeometry


@dataclass(frozen=True, repr=False)
class JointSolution(Solution):
    """What one problem did to several variables: a :class:`Solution` with V columns of odds.

    ``floor``, ``log_odds_before`` and ``log_odds_after`` are (B, V), NaN where a variable was not
    written; ``multipliers`` and ``active`` are those of all constraints together, (B, m).

    Attributes:
        moved: the largest change of any log odds z_j − z_k of a variable, read back, (B, V): for a
            kept variable what rounding or its tolerance let through.
    """

    moved: Tensor


def read_odds(
    edits: Mapping[str, LRQP],
    geometry: StackedGeometry,
    solution: Solution,
    x: Tensor,
    choice: Tensor,
    held: Tensor,
    realise: Realise | None,
) -> JointSolution:
    """The solution with the odds of each variable, read back from what the stream holds."""
    with torch.no_grad():
        edited = solution.x_new.detach().double()
        stored = edited if realise is None else realise(edited)
        unchanged = (solution.x_new == x).all(-1, keepdim=True)
        stored = torch.where(unchanged, x.double(), stored)
        logits_after = geometry.logits(stored)
    logits_before = geometry.logits(x)
    before: list[Tensor] = []
    after: list[Tensor] = []
    floor: list[Tensor] = []
    moved: list[Tensor] = []
    start = 0
    for place, edit in enumerate(edits.values()):
        target = choice[:, place]
        columns = slice(start, start + edit.probe.n_classes)
        start = columns.stop
        written = target >= 0
        margins = _margins(logits_before[:, columns], target)
        odds = asked_log_odds(edit, margins, target, held[:, place])
        for values, into in (
            (margins.amin(-1), before),
            (_margins(logits_after[:, columns], target).amin(-1), after),
            (odds, floor),
        ):
            into.append(torch.where(written, values, torch.nan))
        change = logits_after[:, columns] - logits_before[:, columns].detach()
        moved.append(change.amax(-1) - change.amin(-1))
    parts = {field.name: getattr(solution, field.name) for field in fields(Solution)}
    parts |= {
        "log_odds_before": torch.stack(before, -1),
        "log_odds_after": torch.stack(after, -1),
        "floor": torch.stack(floor, -1),
    }
    return JointSolution(**parts, moved=torch.stack(moved, -1))


def _margins(logits: Tensor, target: Tensor) -> Tensor:
    """z_t − z_ℓ over the other classes ascending, (B, K−1); t = 0 where there is no target."""
    target = target.clamp_min(0).unsqueeze(-1)
    index = torch.arange(logits.shape[-1] - 1, device=logits.device)
    other = index + (index >= target).long()
    return logits.gather(-1, target) - logits.gather(-1, other)
