"""The same edit by other quadratic programming solvers: each takes a problem and gives x'.

In K − 1 variables ("reduced") they solve the dual, min ½ λᵀMλ − gᵀλ over λ ≥ 0, and
x' = x + ΣAᵀλ; in d variables they solve the program as it is written in the post. Those that give
no derivative themselves get the one of the optimality conditions on the active set they found.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.qp_problem import LOG_ODDS, QPProblem
from lrqp_torch.qp import MahalanobisQP

Solve = Callable[[Tensor], Tensor]
"""Activations x, (B, d), to edited ones."""


@dataclass(frozen=True)
class Method:
    """One way of computing the edit.

    Attributes:
        name: in the table.
        packages: modules that it needs.
        install: how to get them.
        prepare: what is done once for a problem; returns the solve that is timed.
        examples: at most so many are timed, because each takes long.
        differentiable: whether a backward pass is timed too.
        on_cpu: runs on the CPU only.
        in_full_dimension: has d variables, so that its time does not depend on the batch.
        most_classes: with more it is not tried, because preparing it takes minutes.
    """

    name: str
    packages: tuple[str, ...]
    install: str
    prepare: Callable[[QPProblem], Solve]
    examples: int = 16384
    differentiable: bool = True
    on_cpu: bool = False
    in_full_dimension: bool = False
    most_classes: int = 1000


def _ours(solver: str) -> Callable[[QPProblem], Solve]:
    def prepare(problem: QPProblem) -> Solve:
        qp = MahalanobisQP(problem.n_classes, solver=solver).to(problem.x.device)

        def run(x: Tensor) -> Tensor:
            target = problem.target[: len(x)]
            return qp.solve(x, target, LOG_ODDS, problem.geometry).x_new

        return run

    return prepare


def _reduced(solve: Callable[[Tensor, Tensor], Tensor]) -> Callable[[QPProblem], Solve]:
    """From a differentiable solver of the dual, (M, g) → λ."""

    def prepare(problem: QPProblem) -> Solve:
        def run(x: Tensor) -> Tensor:
            first = problem.first(len(x))
            multipliers = solve(problem.geometry.constraints(first.target).gram, first.gap(x))
            return problem.geometry.displace(x, first.target, multipliers)

        return run

    return prepare


def _quadprog_loop(gram: Tensor, gap: Tensor) -> Tensor:
    import numpy
    import quadprog

    count, m = gap.shape
    matrices, gaps = gram.numpy(), gap.detach().numpy()
    identity, zero = numpy.eye(m), numpy.zeros(m)
    active = torch.zeros(count, m, dtype=torch.bool)
    for row in range(count):
        solution = quadprog.solve_qp(matrices[row], gaps[row], identity, zero)[0]
        active[row] = torch.from_numpy(solution * matrices[row].diagonal() > 1e-9)
    # The multipliers again as a differentiable function: the linear system of the active set.
    both = active.unsqueeze(-1) & active.unsqueeze(-2)
    system = torch.where(both, gram, torch.eye(m, dtype=gram.dtype))
    multipliers: Tensor = torch.linalg.solve(system, torch.where(active, gap, 0.0))
    return multipliers


def _qpth(gram: Tensor, gap: Tensor) -> Tensor:
    from qpth.qp import QPFunction

    identity = torch.eye(gap.shape[-1], dtype=gap.dtype, device=gap.device)
    empty = torch.empty(0, dtype=gap.dtype, device=gap.device)
    solved: Tensor = QPFunction(verbose=-1)(
        gram, -gap, -identity, torch.zeros_like(gap[0]), empty, empty
    )
    return solved


def _qpsolvers(solver: str) -> Callable[[QPProblem], Solve]:
    """The post's way: x' itself is the variable, and Σ⁻¹ the quadratic form."""

    def prepare(problem: QPProblem) -> Solve:
        import numpy
        from qpsolvers import solve_qp
        from scipy.sparse import csc_matrix

        matrix = 2 * torch.linalg.inv(problem.covariance).numpy()
        sparse = solver == "osqp"
        quadratic = csc_matrix(matrix) if sparse else matrix
        normals, bounds = [], []
        for target in problem.target.tolist():
            others = [label for label in range(problem.n_classes) if label != target]
            rows = -(problem.weight[target] - problem.weight[others]).numpy()
            normals.append(csc_matrix(rows) if sparse else rows)
            bounds.append((problem.bias[target] - problem.bias[others] - LOG_ODDS).numpy())

        def run(x: Tensor) -> Tensor:
            found = [
                solve_qp(quadratic, -matrix @ row, normal, bound, solver=solver)
                for row, normal, bound in zip(x.detach().numpy(), normals, bounds, strict=False)
            ]
            return torch.from_numpy(numpy.stack(found))

        return run

    return prepare


def _whitened(problem: QPProblem) -> Solve:
    """Minimise ½‖u‖² with x' = x + Lu and Σ = LLᵀ: d variables, a parametrised cvxpylayer."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    m, width = problem.n_classes - 1, problem.x.shape[1]
    variable, gap = cp.Variable(width), cp.Parameter(m)
    normals = cp.Parameter((m, width))
    layer = CvxpyLayer(
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(variable)), [normals @ variable >= gap]),
        parameters=[normals, gap],
        variables=[variable],
        solver_args={"solve_method": "Clarabel"},
    )
    factor = torch.linalg.cholesky(problem.covariance)
    whitened = []
    for target in problem.target.tolist():
        others = [label for label in range(problem.n_classes) if label != target]
        whitened.append((problem.weight[target] - problem.weight[others]) @ factor)
    stacked = torch.stack(whitened)

    def run(x: Tensor) -> Tensor:
        (found,) = layer(stacked[: len(x)], problem.first(len(x)).gap(x))
        edited: Tensor = x + found.to(x) @ factor.T
        return edited

    return run


OURS = "lrqp_torch"
METHODS: tuple[Method, ...] = (
    Method(OURS, (), "", _ours("ACTIVE_SET")),
    Method("cvxpylayers, MOREAU, reduced", ("moreau",), "moreau", _ours("MOREAU"), examples=1024),
    Method(
        "cvxpylayers, DIFFCP + Clarabel, reduced",
        ("diffcp", "clarabel"),
        "diffcp clarabel",
        _ours("DIFFCP"),
        examples=64,
        on_cpu=True,
    ),
    Method(
        "quadprog, a Python loop, reduced",
        ("quadprog",),
        "quadprog",
        _reduced(_quadprog_loop),
        examples=1024,
        on_cpu=True,
    ),
    # Its source archive is older than what setuptools now accepts.
    Method(
        "qpth, reduced",
        ("qpth",),
        "'setuptools<66' wheel && pip install --no-build-isolation --no-deps qpth",
        _reduced(_qpth),
        examples=256,
    ),
    Method(
        "qpsolvers + osqp, d variables (the post's way)",
        ("qpsolvers", "osqp"),
        "qpsolvers osqp",
        _qpsolvers("osqp"),
        examples=2,
        differentiable=False,
        on_cpu=True,
        in_full_dimension=True,
    ),
    Method(
        "qpsolvers + proxqp, d variables",
        ("qpsolvers", "proxsuite"),
        "qpsolvers proxsuite",
        _qpsolvers("proxqp"),
        examples=4,
        differentiable=False,
        on_cpu=True,
        in_full_dimension=True,
    ),
    Method(
        "cvxpylayers, DIFFCP + Clarabel, whitened, d variables",
        ("diffcp", "clarabel"),
        "diffcp clarabel",
        _whitened,
        examples=4,
        on_cpu=True,
        in_full_dimension=True,
        most_classes=10,
    ),
)
