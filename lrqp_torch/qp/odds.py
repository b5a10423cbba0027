"""Kinds of odds that an edit can promise, a row each: what is bounded, and who solves it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lrqp_torch.errors import SolverError
from lrqp_torch.qp.problem import MahalanobisQP
from lrqp_torch.qp.solvers import ACTIVE_SET, ActiveSet, Solver, solver_of
from lrqp_torch.qp.total_odds import TotalOdds


@dataclass(frozen=True)
class Odds:
    """A kind of odds.

    Attributes:
        name: as users write it.
        surplus: of K − 1 rivals, how far above log α pairwise floors suffice for odds of α, where
            only pairwise floors can be posed.
        own_solver: makes its solver; None where any solver of pairwise floors serves.
    """

    name: str
    surplus: Callable[[int], float]
    own_solver: Callable[[], Solver] | None = None

    def program(
        self,
        n_classes: int,
        *,
        solver: str | Solver = ACTIVE_SET,
        solver_args: dict[str, Any] | None = None,
    ) -> MahalanobisQP:
        """The program whose floors are the logs of such odds; for two classes all kinds are one.

        Raises:
            SolverError: the solver is unknown, not installed, or cannot solve for such odds.
        """
        asked = solver_of(solver, solver_args)
        if self.own_solver is not None and n_classes > 2:
            if not isinstance(asked, ActiveSet):
                raise SolverError(
                    f"odds={self.name!r} has a solver of its own; leave {asked.name!r} out"
                )
            asked = self.own_solver()
        return MahalanobisQP(n_classes, solver=asked)


PAIRWISE = Odds("pairwise", surplus=lambda n_rivals: 0.0)
"""P[t] / P[ℓ] ≥ α for every other class ℓ."""
TOTAL = Odds("total", surplus=math.log, own_solver=TotalOdds)
"""P[t] / (1 − P[t]) ≥ α."""

ODDS = {kind.name: kind for kind in (PAIRWISE, TOTAL)}
