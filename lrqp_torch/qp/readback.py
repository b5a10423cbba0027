"""Solving, reading back what the model will hold, and solving again where it falls short."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrqp_torch.errors import readable
from lrqp_torch.qp.geometry import Constraints, Geometry
from lrqp_torch.qp.implicit import matvec
from lrqp_torch.qp.rounding import MAX_ROUNDS, Headroom
from lrqp_torch.qp.solution import Solution, statuses

Realise = Callable[[Tensor], Tensor]
"""Maps float64 activations to the values that the model will really hold, in float64."""

Solve = Callable[[Constraints, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Maps constraints and gaps g, (B, m), to λ, the active set, feasible and the KKT residual."""


def solve_and_read_back(
    x: Tensor,
    choice: Tensor,
    margins: Tensor,
    floor: Tensor,
    geometry: Geometry,
    realise: Realise | None,
    solve: Solve,
    tolerance: float,
) -> Solution:
    """The edits of a batch whose realised activations reach their floors.

    Args:
        x: activations, (B, d), any floating dtype.
        choice: which constraints each example has.
        margins: at x, (B, m), float64.
        floor: (B,), or (B, m) for one a constraint.
        geometry: constraints and metric.
        realise: what the model will hold when x' is put in place; None: x' in x's dtype.
        solve: the dual.
        tolerance: on the KKT residual.
    """
    # One floor for all constraints of an example, or one each.
    bound = floor if floor.ndim == 2 else floor.unsqueeze(-1)
    looking, wide = readable(margins), x.double()
    valid = torch.isfinite(margins.detach() - bound.detach()).all(-1)
    needed = (margins < bound).any(-1) & valid
    constraints = geometry.constraints(choice)
    size = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True)
    headroom = Headroom(torch.finfo(x.dtype).eps, constraints.length, size, x.shape[-1])

    raised = headroom.in_advance(bound.detach())
    asked, reachable = needed, torch.ones_like(needed)
    rounds = MAX_ROUNDS if looking else headroom.blind_rounds
    for attempt in range(rounds):
        gap = torch.where(asked.unsqueeze(-1), bound + raised - margins, -1.0)
        multipliers, active, feasible, residual = solve(constraints, gap)
        # An infeasible example is not asked again, and what is not asked counts as feasible.
        reachable = reachable & feasible
        edited = geometry.displace(wide, choice, multipliers)
        with torch.no_grad():
            held = edited.to(x.dtype) if realise is None else realise(edited)
            after = geometry.margins(held, choice).detach()
            asked = needed & reachable
            # An edit that exceeds what the stream's dtype can hold reads infinity or NaN.
            open_ = asked.unsqueeze(-1) & torch.isfinite(after)
            short = torch.where(open_, (bound.detach() - after).clamp_min(0.0), 0.0)
            if attempt + 1 == rounds or (looking and not bool((short > 0).any())):
                break
            raised = (
                headroom.proven(raised, short, edited.detach(), held)
                if attempt + 2 == rounds
                else headroom.after_missing(raised, short, attempt)
            )

    edit = needed & reachable
    reached = ((after >= bound) & torch.isfinite(after)).all(-1)
    status = statuses(reachable, edit, reached & (residual <= tolerance), valid)
    # The gradient of √0 is infinite; an unedited example has distance 0 and gradient 0.
    squared = (multipliers * matvec(constraints.gram, multipliers)).sum(-1)
    distance = torch.where(edit, squared, 1.0).clamp_min(0.0).sqrt() * edit
    before = margins.amin(-1)
    return Solution(
        x_new=_keep(x, edited.to(x.dtype), edit),
        multipliers=multipliers,
        active=active,
        distance=distance,
        euclidean=_euclidean(constraints, multipliers, edited, wide),
        floor=floor,
        log_odds_before=before,
        log_odds_after=torch.where(edit, after.amin(-1), before.detach()),
        kkt_residual=residual,
        status=status,
    )


def _keep(x: Tensor, edited: Tensor, edit: Tensor) -> Tensor:
    """The edited activations where there is an edit, and x bit for bit elsewhere."""
    if not readable(edit):
        return torch.where(edit.unsqueeze(-1), edited, x)
    # Selecting rows takes several times as long as copying the few that stay as they are.
    rows = (~edit).nonzero().squeeze(-1)
    return edited.index_copy(0, rows, x[rows]) if len(rows) else edited


def _euclidean(constraints: Constraints, multipliers: Tensor, edited: Tensor, x: Tensor) -> Tensor:
    """‖x' − x‖, (B,); not differentiated."""
    if constraints.steering is None:
        length: Tensor = torch.linalg.vector_norm((edited - x).detach(), dim=-1)
        return length
    return constraints.moved(multipliers.detach())
