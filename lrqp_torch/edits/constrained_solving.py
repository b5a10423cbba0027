"""Posed problems solved so that the odds hold for the numbers that the stream stores."""

import torch
from torch import Tensor

from lrqp_torch.errors import ConstraintError, SolverError
from lrqp_torch.qp import Solution, Status
from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.posed import PosedProblem
from lrqp_torch.qp.reach import Attempt, Headroom, Realise, Rows, reach
from lrqp_torch.qp.reduction import Reduction

# Constraints count as met within this share of 1 + their terms. Clarabel ends at 1e-9 or better.
MET = 1e-6
# The floors are aimed at by this much more, so that what the solver leaves does not cost a round.
AIM = 1e-8
# An edit shorter than this, in standard deviations, of an activation that meets its floor is none:
# solvers that pose a square as a cone know a length only to the root of their duality gap.
NO_EDIT = 1e-5
MAX_ROUNDS = 8


def solve_posed(
    problem: PosedProblem,
    x: Tensor,
    target: Tensor,
    floor: Tensor,
    margins: Tensor,
    geometry: ProbeGeometry,
    basis: Reduction,
    values: list[Tensor],
    realise: Realise | None,
) -> Solution:
    """Solve for the stored numbers: floors that rounding misses are raised, and solved again."""
    wide, bound = x.double(), floor.unsqueeze(-1)
    headroom = Headroom.of(x, geometry.constraints(target).length)
    raised = headroom.in_advance(bound) + AIM * (1 + bound.detach().abs())
    held = (margins >= bound).all(-1)
    status, violation = _first_look(problem, values, bound + raised - margins, held)
    solved = status == Status.SOLVED

    def step(aim: Tensor, rows: Rows) -> Attempt:
        everyone = torch.arange(len(x), device=x.device)
        asked = everyone[solved] if rows is None else rows[solved[rows]]
        gap = aim - margins if rows is None else margins.index_copy(0, rows, aim - margins[rows])
        moved = wide.new_zeros(len(x), basis.size)
        if len(asked):
            found = problem.solve([values[0], gap, *values[1:]], asked)
            moved = moved.index_put((asked,), found)
        rows = everyone if rows is None else rows
        moved = moved[rows]
        return Attempt(basis.displace(wide[rows], moved), solved[rows], (moved,))

    def read(stored: Tensor, rows: Rows) -> Tensor:
        return geometry.margins(stored, target if rows is None else target[rows])

    attempt, after = reach(
        bound,
        solved,
        headroom,
        step,
        read,
        dtype=x.dtype,
        realise=realise,
        raised=raised,
        rounds=MAX_ROUNDS,
    )
    edited, (moved,) = attempt.edited, attempt.found
    with torch.no_grad():
        distance = torch.linalg.vector_norm(moved, dim=-1)
        still = solved & held & (distance <= NO_EDIT)
        reached = ((after >= bound) & torch.isfinite(after)).all(-1)
        status = torch.where(solved & ~reached, int(Status.INACCURATE), status)
        status = torch.where(still, int(Status.SATISFIED), status)
        edit = (status == Status.SOLVED) | (status == Status.INACCURATE)
        before = margins.amin(-1)
    # The gradient of √0 is infinite; an unedited example has distance 0 and gradient 0.
    squared = torch.where(edit, moved.square().sum(-1), 1.0)
    return Solution(
        x_new=torch.where(edit.unsqueeze(-1), edited.to(x.dtype), x),
        multipliers=torch.zeros_like(after),
        active=edit.unsqueeze(-1) & (after <= bound + MET * (1 + bound.abs())),
        distance=squared.sqrt() * edit,
        euclidean=torch.linalg.vector_norm((edited - wide).detach(), dim=-1) * edit,
        floor=floor,
        log_odds_before=before,
        log_odds_after=torch.where(edit, after.amin(-1), before),
        kkt_residual=violation,
        status=status,
    )


@torch.no_grad()
def _first_look(
    problem: PosedProblem, values: list[Tensor], gap: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """Which examples can be solved, (B,) status, and how far each is from its constraints.

    Where the floors hold and nothing else pulls or is broken, no edit is the least one.
    Solvers return garbage for infeasible examples, or refuse the whole batch. So what they
    return is held against the constraints, and what fails is solved alone for a verdict; only
    sound examples go through the layer that gradients flow through.
    """
    everything = [values[0], gap, *values[1:]]
    batch, device = len(gap), gap.device
    if not batch:
        return gap.new_zeros(0, dtype=torch.long), gap.new_zeros(0)
    nowhere = values[0].new_zeros(values[0].shape[-1])
    idle = [
        not problem.penalties and problem.violation(everything, i, nowhere) == 0
        for i in range(batch)
    ]
    satisfied = held & torch.tensor(idle, dtype=torch.bool, device=device)
    try:
        found = problem.solve(everything, torch.arange(batch, device=device))
    except SolverError:
        found = gap.new_full((batch, values[0].shape[-1]), torch.nan)
    reached = (values[0] @ found.unsqueeze(-1)).squeeze(-1)
    short = ((gap - reached) / (1 + gap.abs())).amax(-1).clamp_min(0.0)
    refused = found.isnan().any(-1).tolist()
    own = [
        torch.nan if refused[i] else problem.violation(everything, i, found[i])
        for i in range(batch)
    ]
    violation = torch.maximum(short, torch.tensor(own, dtype=gap.dtype, device=device))
    violation = torch.where(satisfied, 0.0, violation)
    status = torch.where(satisfied, int(Status.SATISFIED), int(Status.SOLVED))
    for i in (~(violation <= MET)).nonzero().squeeze(-1).tolist():
        verdict = problem.verdict(everything, i)
        if verdict.startswith("unbounded"):
            raise ConstraintError(
                f"the objective of example {i} has no lower bound that a solver finds: a penalty "
                f"falls without end, or by too large a factor; bound it or scale it down"
            )
        infeasible = verdict.startswith("infeasible")
        status[i] = int(Status.INFEASIBLE if infeasible else Status.INACCURATE)
        if verdict == "optimal" and refused[i]:
            # Only its company was refused.
            status[i], violation[i] = int(Status.SOLVED), 0.0
    return status, violation.nan_to_num(torch.inf)
