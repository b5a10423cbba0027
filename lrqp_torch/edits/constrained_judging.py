"""Errors that say which examples a constrained edit failed on."""

import torch
from torch import Tensor

from lrqp_torch.edits.failures import raise_failures
from lrqp_torch.errors import InfeasibleError
from lrqp_torch.qp import Solution, Status


def judge_solution(
    solution: Solution,
    x: Tensor,
    target: Tensor,
    examples: Tensor | None,
    on_infeasible: str,
) -> Solution:
    """The solution, with failed examples left unedited where they are to be skipped.

    Raises:
        InfeasibleError: no activation meets the odds and the constraints together.
        SolverError: an example was not solved to tolerance, or its odds fall short.
    """
    failed = solution.status >= Status.INFEASIBLE
    if not bool(failed.any()):
        return solution
    if on_infeasible == "skip":
        return solution.revert(failed, x)
    names = torch.arange(len(x), device=x.device) if examples is None else examples
    infeasible = solution.status == Status.INFEASIBLE
    if bool(infeasible.any()):
        which = names[infeasible].tolist()
        raise InfeasibleError(
            f"no activation meets the odds and your constraints together for {len(which)} "
            f"examples, first {which[:10]}: loosen a constraint, turn it into a penalty, lower "
            f"log_odds, or pass on_infeasible='skip' to leave them unchanged"
        )
    raise_failures(
        solution.status,
        names=names,
        target=target,
        floor=solution.floor.detach(),
        reached=solution.log_odds_after.detach(),
        residual=solution.kkt_residual,
        overflow=~torch.isfinite(solution.x_new.detach()).all(-1),
        dtype=x.dtype,
    )
    return solution
