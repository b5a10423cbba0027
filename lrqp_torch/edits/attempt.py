"""One application of an LRQP edit: the solve, and the judgement of how it went."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrqp_torch.edits.failures import raise_failures
from lrqp_torch.edits.odds import floors
from lrqp_torch.errors import check_finite, concrete, place_classes, readable
from lrqp_torch.qp import ProbeGeometry, Solution, Status
from lrqp_torch.qp.problem import Realise

if TYPE_CHECKING:
    from lrqp_torch.edits.lrqp import LRQP


def attempt(
    edit: "LRQP",
    x: Tensor,
    target: Tensor | int,
    source: Tensor | int | None,
    realise: Realise | None,
    geometry: ProbeGeometry,
    stale: Tensor | None = None,
) -> Solution:
    """Solve by the edit's odds rule; what failed is in the status, and skipped where asked for.

    Args:
        edit: probe, metric and odds rule.
        x: activations, (B, d).
        target: class to write, (B,) or one for all.
        source: class that holds now, or None for the probe's own reading.
        realise: see :meth:`MahalanobisQP.solve`.
        geometry: of the edit's probe and metric.
        stale: bool (): whether the geometry is not that of the probe any more.

    Raises:
        TargetError, NonFiniteError: bad input that is seen without waiting.
    """
    batch, n_classes, device = len(x), edit.probe.n_classes, x.device
    classes, valid = place_classes(target, batch, n_classes, device, "target")
    held, valid_source = (
        place_classes(source, batch, n_classes, device, "source")
        if source is not None
        else (None, None)
    )
    log_odds = edit.log_odds.to(device)

    def floor(margins: Tensor, rows: slice) -> Tensor:
        v = None if held is None else held[rows]
        return floors(margins, classes[rows], v, log_odds, edit.rule, "pairwise")

    solution = edit.qp.solve(x, classes, floor, geometry, realise=realise)
    for sound in (valid, valid_source, None if stale is None else ~stale.expand(batch)):
        solution = solution if sound is None else solution.invalidate(~sound, x)
    if edit.on_infeasible == "skip":
        failed = (solution.status == Status.INFEASIBLE) | (solution.status == Status.INACCURATE)
        # A look costs less than the selection where it costs no waiting.
        if not readable(failed) or bool(failed.any()):
            solution = solution.revert(failed, x)
    return solution


def judge(
    edit: "LRQP", solution: Solution, x: Tensor, target: Tensor | int, examples: Tensor | None
) -> Solution:
    """The solution, unless examples did not reach their target and are not to be skipped.

    Inside a transform or a compiled graph nothing can be seen, and nothing is raised.

    Raises:
        NonFiniteError, InfeasibleError, SolverError: as :meth:`LRQP.solve`.
    """
    status = solution.status
    if not concrete(status):
        return solution
    allowed = _allowed(edit.on_infeasible)
    if bool((status <= allowed).all()):
        return solution
    check_finite(x)
    raise_failures(
        # What is to be skipped is no failure, also beside something that is.
        torch.where(status <= allowed, int(Status.SOLVED), status),
        names=torch.arange(len(x), device=x.device) if examples is None else examples,
        target=torch.as_tensor(target, device=x.device).expand(len(x)),
        floor=solution.floor.detach(),
        reached=solution.log_odds_after.detach(),
        residual=solution.kkt_residual,
        overflow=~torch.isfinite(solution.x_new.detach()).all(-1),
        dtype=x.dtype,
        n_kept=edit.metric.n_kept,
    )
    return solution


def visible(solution: Solution, on_infeasible: str) -> Tensor:
    """The edited activations, with NaN in the rows that would have raised, had they been seen.

    Inside a transform or a compiled graph a row that failed could not be told from one that needed
    no edit by its activation alone.
    """
    if concrete(solution.status):
        return solution.x_new
    failed = solution.status > _allowed(on_infeasible)
    return torch.where(failed.unsqueeze(-1), torch.nan, solution.x_new)


def _allowed(on_infeasible: str) -> Status:
    """The worst status that raises nothing; what is to be skipped is skipped already."""
    return Status.INACCURATE if on_infeasible == "skip" else Status.SOLVED
