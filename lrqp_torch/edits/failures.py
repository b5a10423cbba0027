"""Edits that did not reach their target, said as errors that name the examples."""

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lrqp_torch.errors import (
    InfeasibleError,
    NonFiniteError,
    SolverError,
    check_finite,
    concrete,
)
from lrqp_torch.qp import Solution, Status

if TYPE_CHECKING:
    from lrqp_torch.edits.base import Edit

Found = TypeVar("Found", bound=Solution)


def worst_allowed(on_infeasible: str) -> int:
    """The worst status that is no error; what is to be skipped is skipped already."""
    # A number, as compiled graphs cannot compare tensors with members of an enumeration.
    return int(Status.INACCURATE if on_infeasible == "skip" else Status.SOLVED)


def visible(solution: Solution, on_infeasible: str) -> Tensor:
    """The edited activations, with NaN in the rows that would have raised, had they been seen.

    Inside a transform or a compiled graph a row that failed could not be told from one that needed
    no edit by its activation alone.
    """
    if concrete(solution.status):
        return solution.x_new
    failed = solution.status > worst_allowed(on_infeasible)
    return torch.where(failed.unsqueeze(-1), torch.nan, solution.x_new)


def skipped(solution: Found, x: Tensor, on_infeasible: str) -> Found:
    """The solution with what failed left as it was in x, where that is what is asked for."""
    if on_infeasible != "skip":
        return solution
    status = solution.status  # in a compiled graph a tensor is never equal to a member of Status
    failed = (status == int(Status.INFEASIBLE)) | (status == int(Status.INACCURATE))
    # A look costs less than the selection where it costs no waiting.
    if concrete(failed) and failed.is_cpu and not bool(failed.any()):
        return solution
    return solution.revert(failed, x)


def judged(
    edit: "Edit[Any]", solution: Found, x: Tensor, target: Any, examples: Tensor | None
) -> Found:
    """The solution, unless examples did not reach their target and are not to be skipped.

    Inside a transform or a compiled graph nothing can be seen, and nothing is raised.

    Args:
        edit: what was applied.
        solution: what came of it.
        x: activations, (B, d).
        target: what was asked for, (B,) or (B, V), or one for all.
        examples: what the rows are called in messages, (B,); default 0, 1, ….

    Raises:
        NonFiniteError, InfeasibleError, SolverError: as :func:`raise_failures`.
    """
    status = solution.status
    if not concrete(status):
        return solution
    if not status.numel() or int(status.max()) <= worst_allowed(edit.on_infeasible):
        return solution
    asked = torch.as_tensor(target, device=x.device)
    asked = asked.expand(len(x)) if asked.ndim == 0 else asked
    check_finite(x)
    raise_failures(
        edit,
        status,
        names=torch.arange(len(x), device=x.device) if examples is None else examples,
        target=asked,
        floor=solution.floor.detach(),
        reached=solution.log_odds_after.detach(),
        residual=solution.kkt_residual.detach(),
        overflow=~torch.isfinite(solution.x_new.detach()).all(-1),
        dtype=x.dtype,
    )
    return solution


def raise_failures(
    edit: "Edit[Any]",
    status: Tensor,
    *,
    names: Tensor,
    target: Tensor,
    floor: Tensor,
    reached: Tensor,
    residual: Tensor,
    overflow: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise for the first kind of failure among N edits.

    Args:
        edit: what was applied; it says what to do about a target that nothing reaches.
        status: :class:`~lrqp_torch.Status` of each, (N,).
        names: what the examples are called in messages, (N,).
        target: class that was asked for, (N,), or (N, V) of V variables.
        floor: log α that was asked for, likewise; NaN where nothing was.
        reached: log odds that were reached, likewise.
        residual: KKT residuals, (N,).
        overflow: whether the edit exceeds what the dtype can hold, (N,) bool.
        dtype: of the activations.

    Raises:
        NonFiniteError: NaN, infinity or a class out of range went in.
        InfeasibleError: no activation reaches the target.
        SolverError: the odds fall short of α.
    """

    def those(failed: Tensor) -> str:
        which = names[failed].tolist()
        return f"{len(which)} examples, first {which[:10]}"

    # What is to be skipped is no failure, also beside something that is.
    status = torch.where(status <= worst_allowed(edit.on_infeasible), int(Status.SOLVED), status)
    invalid, infeasible, inaccurate = (
        status == kind for kind in (Status.INVALID, Status.INFEASIBLE, Status.INACCURATE)
    )
    if bool(invalid.any()):
        raise NonFiniteError(
            f"could not edit {those(invalid)}: their activations or floors hold NaN or infinity "
            f"(look for overflow upstream of the site), their classes are out of range, or the "
            f"probe was changed through .data while a model ran"
        )
    if bool(infeasible.any()):
        raise InfeasibleError(edit.unreachable(target[infeasible], those(infeasible)))
    if not bool(inaccurate.any()):
        return
    if bool((overflow & inaccurate).any()):
        asked = float(floor.nan_to_num(-torch.inf).max())
        raise SolverError(
            f"the edits exceed what {dtype} can hold for {those(inaccurate)}: log odds of up to "
            f"{asked:.3g} are asked for. Lower log_odds, run the model in a wider dtype, or pass "
            f"on_infeasible='skip'"
        )
    short = float((floor - reached)[inaccurate].nan_to_num(0.0).max())
    raise SolverError(
        f"could not solve accurately for {those(inaccurate)}: log odds short by up to {short:.1e}, "
        f"KKT residual up to {float(residual[inaccurate].max()):.1e}. Refit the probe with a "
        f"larger l2 or the metric with more shrinkage, or pass on_infeasible='skip'"
    )
