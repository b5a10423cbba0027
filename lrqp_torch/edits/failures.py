"""Edits that did not reach their target, said as errors that name the examples."""

import torch
from torch import Tensor

from lrqp_torch.errors import InfeasibleError, NonFiniteError, SolverError
from lrqp_torch.qp import Status


def raise_failures(
    status: Tensor,
    *,
    names: Tensor,
    target: Tensor,
    floor: Tensor,
    reached: Tensor,
    residual: Tensor,
    overflow: Tensor,
    dtype: torch.dtype,
    n_kept: int = 0,
) -> None:
    """Raise for the first kind of failure among some edits, all arguments (N,).

    Args:
        status: :class:`~lrqp_torch.Status` of each.
        names: what the examples are called in messages.
        target: class that was asked for.
        floor: log α that was asked for.
        reached: log odds that were reached.
        residual: KKT residuals.
        overflow: whether the edit exceeds what the dtype can hold, bool.
        dtype: of the activations.
        n_kept: directions that the metric keeps, along which nothing moves.

    Raises:
        NonFiniteError: NaN, infinity or a class out of range went in.
        InfeasibleError: no activation reaches the target.
        SolverError: the odds fall short of α.
    """
    invalid = status == Status.INVALID
    if bool(invalid.any()):
        which = names[invalid].tolist()
        raise NonFiniteError(
            f"{len(which)} examples could not be edited, first {which[:10]}: their activations or "
            f"floors hold NaN or infinity (look for overflow upstream of the site), their classes "
            f"are out of range, or the probe was changed through .data while a model ran"
        )
    infeasible = status == Status.INFEASIBLE
    if bool(infeasible.any()):
        which = names[infeasible].tolist()
        classes = sorted(set(target[infeasible].tolist()))
        kept = (
            f". The metric keeps {n_kept} directions, and what the target needs may lie among "
            f"them: keep fewer, or allow a tolerance (JointLRQP(..., within=...))"
        )
        raise InfeasibleError(
            f"no activation reaches target class {classes} for {len(which)} examples, first "
            f"{which[:10]}: some class has the same weights as the target, or the metric "
            f"has no length along their difference. Choose another target, lower log_odds, "
            f"shrink the covariance, or pass on_infeasible='skip' to leave them unchanged"
            f"{kept if n_kept else ''}"
        )
    inaccurate = status == Status.INACCURATE
    if not bool(inaccurate.any()):
        return
    which = names[inaccurate].tolist()
    if bool((overflow & inaccurate).any()):
        raise SolverError(
            f"the edits of {len(which)} examples exceed what {dtype} can hold, first "
            f"{which[:10]}: log odds of up to {float(floor.max()):.3g} are "
            f"asked for. Lower log_odds, run the model in a wider dtype, or pass "
            f"on_infeasible='skip'"
        )
    short = float((floor - reached)[inaccurate].max())
    raise SolverError(
        f"{len(which)} examples could not be solved accurately, first {which[:10]}: log odds "
        f"short by up to {short:.1e}, KKT residual up to {float(residual[inaccurate].max()):.1e}. "
        f"Refit the probe with a larger l2 or the metric with more shrinkage, or pass "
        f"on_infeasible='skip'"
    )
