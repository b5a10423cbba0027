"""Errors that say which examples a joint edit failed on, and what was asked of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrqp_torch.edits.failures import raise_failures
from lrqp_torch.edits.joint_solution import JointSolution
from lrqp_torch.errors import InfeasibleError, check_finite
from lrqp_torch.qp import Status
from lrqp_torch.qp.stacked import FREE, KEEP


def raise_joint_failures(
    solution: JointSolution,
    x: Tensor,
    choice: Tensor,
    examples: Tensor | None,
    variables: Sequence[str],
    on_infeasible: str,
) -> None:
    """Raise the error of the examples that failed, with what was asked of them.

    Raises:
        NonFiniteError: activations hold NaN or infinity.
        InfeasibleError: no activation meets all that is asked.
        SolverError: odds read back fall short of α.
    """
    names = torch.arange(len(x), device=x.device) if examples is None else examples
    status = solution.status
    if on_infeasible == "skip":
        status = torch.where(status == Status.INVALID, status, int(Status.SATISFIED))
    check_finite(x)
    infeasible = status == Status.INFEASIBLE
    if bool(infeasible.any()):
        which = names[infeasible].tolist()
        asked = choice[infeasible][0].tolist()
        said = {FREE: "free", KEEP: "kept"}
        wishes = ", ".join(
            f"{name} {said.get(value, value)}" for name, value in zip(variables, asked, strict=True)
        )
        raise InfeasibleError(
            f"no activation meets all that is asked of {len(which)} examples, first "
            f"{which[:10]} ({wishes}): targets contradict each other, or the directions that "
            f"one needs are kept for another. Leave a variable FREE, keep it within a "
            f"tolerance (within={{name: nats}}), or pass on_infeasible='skip'"
        )
    reached = solution.log_odds_after.detach()
    raise_failures(
        status,
        names=names,
        target=choice[:, 0],
        floor=solution.floor.detach().nan_to_num(-torch.inf).amax(-1),
        reached=(solution.floor.detach() * 0 + reached).nan_to_num(torch.inf).amin(-1),
        residual=solution.kkt_residual,
        overflow=~torch.isfinite(solution.x_new.detach()).all(-1),
        dtype=x.dtype,
    )
