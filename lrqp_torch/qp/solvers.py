"""Solvers of the edit's dual, as objects: what floors bound, and the multipliers that meet them.

A solver is passed to :class:`~lrqp_torch.qp.MahalanobisQP`; another one is a subclass of
:class:`Solver` with a ``solve``. Strings such as ``"DIFFCP"`` are short for those of
:func:`solver_of`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lrqp_torch.errors import SolverError
from lrqp_torch.qp.active_set import solve_dual
from lrqp_torch.qp.constraints import Constraints
from lrqp_torch.qp.solution import kkt_residual, unit_scale

if TYPE_CHECKING:
    from cvxpylayers.torch.cvxpylayer import CvxpyLayer

ACTIVE_SET = "ACTIVE_SET"
SOLVERS = (ACTIVE_SET, "DIFFCP", "MOREAU", "CUCLARABEL")
"""Names that stand for a solver: ours, and those of cvxpylayers."""


@dataclass(frozen=True)
class Found:
    """What a solver found for some examples."""

    # Λ, (B, m), differentiable; zero where an example is not asked or not feasible.
    multipliers: Tensor
    active: Tensor  # constraints that bind, (B, m) bool
    feasible: Tensor  # False where no activation meets the floors, (B,) bool
    residual: Tensor  # largest scaled violation of the optimality conditions, (B,)
    squared: Tensor  # λᵀMλ, the square of the edit's length in the metric, (B,); differentiable
    # False where it is of no use to ask again for more, (B,) bool; default: everywhere of use that
    # is feasible.
    again: Tensor | None = None

    @classmethod
    def of(
        cls,
        constraints: Constraints,
        gap: Tensor,
        multipliers: Tensor,
        feasible: Tensor,
        active: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Self:
        """What some multipliers, zero outside ``index`` if it is given, come to; active by default
        where they are positive.
        """
        grown, found = constraints.apply(multipliers, index), multipliers.detach()
        residual = kkt_residual(
            constraints.diagonal, grown.detach(), gap.detach(), found, constraints.noise
        )
        active = found > 0 if active is None else active
        return cls(multipliers, active, feasible, residual, (multipliers * grown).sum(-1))


class Solver(ABC):
    """How floors are read and met; the default is one floor for each margin z_t − z_ℓ.

    Attributes:
        name: under which edits are saved.
        args: what else is saved: the options it was made with.
        tolerance: on the residual of an accurate solve.
        one_floor: whether an example has one floor, not one for each constraint.
        least: whether edits that are longer than the least for their floors are inaccurate; False
            for one that aims elsewhere on purpose.
    """

    name: str
    tolerance: float
    one_floor: bool = False
    least: bool = True

    def __init__(self) -> None:
        self.args: dict[str, Any] = {}

    def prepare(self, n_constraints: int) -> None:  # noqa: B027
        """Do what can be done before the first solve; raises :class:`SolverError` if it cannot."""

    def read(self, margins: Tensor) -> Tensor:
        """What the floors bound, from the margins A x + c, (B, m): (B, m), or (B, 1)."""
        return margins

    def lengths(self, constraints: Constraints) -> Tensor:
        """How fast each reading can change with x, (B, m) or (B, 1)."""
        return constraints.length

    @abstractmethod
    def solve(
        self, constraints: Constraints, margins: Tensor, floor: Tensor, asked: Tensor
    ) -> Found:
        """The least edits that bring readings to their floors.

        Args:
            constraints: of the examples.
            margins: at x, (B, m).
            floor: (B, 1) or (B, m), where the reading is to be.
            asked: which examples are to be edited, (B,) bool.
        """

    def layer(self, n_constraints: int) -> "CvxpyLayer":
        """The dual as a cvxpylayer, with this solver in it.

        Raises:
            SolverError: it is not a solver of that program, or is not installed.
        """
        raise SolverError(f"{self.name} is no solver of the dual as a cvxpylayer")


class ActiveSet(Solver):
    """Ours: the batched dual active set of :mod:`~.active_set`; exact, on any device."""

    name = ACTIVE_SET
    tolerance = 1e-8

    def solve(
        self, constraints: Constraints, margins: Tensor, floor: Tensor, asked: Tensor
    ) -> Found:
        """See :meth:`Solver.solve`."""
        gap = torch.where(asked.unsqueeze(-1), floor - margins, -1.0)
        if gap.shape[-1] == 1:
            return _closed_form(constraints, gap)
        found = solve_dual(constraints, gap)
        multipliers = found.multipliers(constraints, gap)
        return Found.of(constraints, gap, multipliers, found.feasible, index=found.index)

    def layer(self, n_constraints: int) -> "CvxpyLayer":
        """See :meth:`Solver.layer`."""
        from lrqp_torch.qp.layer import DualActiveSet, pose

        return pose(n_constraints, DualActiveSet(), {}, factored=False)


class CvxpySolver(Solver):
    """A solver of cvxpylayers, which is loaded when the first of these is made.

    Args:
        name: ``"DIFFCP"`` (with Clarabel, CPU only), ``"MOREAU"`` (extra ``moreau``),
            ``"CUCLARABEL"`` (needs Julia and CUDA).
        args: passed to it.
    """

    # Interior-point methods end at a small duality gap, and where the square is posed as a
    # second-order cone (DIFFCP) the solution is only as good as the root of that gap.
    tolerance = 1e-3

    def __init__(self, name: str, args: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.name, self.args = name, dict(args or {})
        if self.on_cpu and "solve_method" not in self.args:
            # DIFFCP's own default, SCS, is accurate to 1e-3 only.
            tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
            self.args = {"solve_method": "Clarabel", **tolerances, **self.args}
        # cvxpylayers holds sparse buffers, which torch can neither copy nor save.
        self._layers: dict[int, CvxpyLayer] = {}

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the CPU only; then it also wants a factor of M instead of M."""
        return self.name == "DIFFCP"

    def prepare(self, n_constraints: int) -> None:
        """Pose the dual at once, so that a solver that is not installed is named."""
        self.layer(n_constraints)

    def layer(self, n_constraints: int) -> "CvxpyLayer":
        """See :meth:`Solver.layer`."""
        if n_constraints not in self._layers:
            from lrqp_torch.qp.layer import pose

            self._layers[n_constraints] = pose(
                n_constraints, self.name, self.args, factored=self.on_cpu
            )
        return self._layers[n_constraints]

    def solve(
        self, constraints: Constraints, margins: Tensor, floor: Tensor, asked: Tensor
    ) -> Found:
        """See :meth:`Solver.solve`.

        Raises:
            SolverError: the solver failed, or cannot run on this device.
        """
        gap = torch.where(asked.unsqueeze(-1), floor - margins, -1.0)
        gram, noise = constraints.gram, constraints.noise
        # Other solvers return garbage without a status where a problem is infeasible, so which ones
        # are is ours to say, and they never see those.
        feasible = solve_dual(constraints, gap).feasible
        ask = feasible & (gap > 0).any(-1)
        multipliers = torch.zeros_like(gap)
        if bool(ask.any()):
            found = self._multipliers(gram[ask], gap[ask], noise[ask])
            multipliers = multipliers.index_put((ask.nonzero().squeeze(-1),), found)
        # It leaves small multipliers on constraints that do not bind; the larger of the two
        # complementary numbers, in the same units, tells which of them should be zero.
        fixed = multipliers.detach()
        slack = constraints.apply(fixed).detach() - gap.detach()
        active = fixed * constraints.diagonal > slack.abs()
        return Found.of(constraints, gap, multipliers, feasible, active)

    def _multipliers(self, gram: Tensor, gap: Tensor, noise: Tensor) -> Tensor:
        """λ of feasible problems, (B, m), by the layer; differentiable."""
        if self.on_cpu and gram.is_cuda:
            raise SolverError(
                f"{self.name} runs on the CPU only; move the data there or use {ACTIVE_SET}"
            )
        # Constraints of unit length, and a largest gap of 1, make one tolerance of the solver fit
        # all of them. Those without length hold already, or the example would not be asked.
        scale = unit_scale(gram.detach().diagonal(dim1=-2, dim2=-1), noise)
        largest = (gap.detach() * scale).amax(-1, keepdim=True)
        unit = torch.where(scale > 0, gap * scale / largest, -1.0)
        matrix = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        try:
            layer = self.layer(gap.shape[-1]).to(gap.device)
            (multipliers,) = layer(_square_root(matrix) if self.on_cpu else matrix, unit)
        except Exception as error:
            raise SolverError(f"{self.name} failed on a batch of {len(gap)}: {error}") from error
        result: Tensor = multipliers.to(gap).clamp_min(0.0) * scale * largest
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": {}}


def _closed_form(constraints: Constraints, gap: Tensor) -> Found:
    """One constraint (K = 2): λ = max(g, 0) / M; infeasible where g > 0 and M = 0."""
    length, violated = constraints.gram.flatten(1), gap > 0
    solvable = length.detach() > constraints.noise
    held = violated & solvable
    multipliers = torch.where(held, gap / torch.where(held, length, 1.0), 0.0)
    grown = multipliers * length
    residual = torch.where(held, (grown - gap).detach().abs() / gap.detach(), 0.0)
    return Found(
        multipliers,
        held,
        (solvable | ~violated).squeeze(-1),
        residual.squeeze(-1),
        (multipliers * grown).squeeze(-1),
    )


def solver_of(solver: str | Solver, args: Mapping[str, Any] | None = None) -> Solver:
    """The solver that is meant; the one place where a name stands for one.

    Raises:
        SolverError: the name is unknown, or options are given to a solver that has its own.
    """
    if isinstance(solver, Solver):
        if args:
            raise SolverError(f"give the options {args} to {type(solver).__name__} when it is made")
        return solver
    if solver not in SOLVERS:
        raise SolverError(
            f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}, or pass a Solver"
        )
    if solver != ACTIVE_SET:
        return CvxpySolver(solver, args)
    ours = ActiveSet()
    ours.args = dict(args or {})
    return ours


def _square_root(gram: Tensor) -> Tensor:
    """F with F Fᵀ = M: Cholesky, with the least diagonal that rounding of a singular M needs."""
    diagonal = gram.detach().diagonal(dim1=-2, dim2=-1).amax(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    singular = torch.linalg.cholesky_ex(gram.detach()).info > 0
    jitter = torch.where(singular, 1e-12 * diagonal, 0.0)
    factor: Tensor = torch.linalg.cholesky(gram + jitter[:, None, None] * identity)
    return factor
