"""The same program through cvxpylayers: our solver plugged in, and the solvers of others."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer
from qp_reference import Problem, random_problem
from torch import Tensor

from lrqp_torch import LRQP, LinearProbe, Mahalanobis, MahalanobisQP, Status
from lrqp_torch.errors import InfeasibleError, NonFiniteError, SolverError, TargetError, WidthError
from lrqp_torch.qp import ODDS, ActiveSet, DualActiveSet, ProbeGeometry, TotalOdds
from lrqp_torch.qp.constraints import Constraints
from lrqp_torch.qp.layer import pose
from lrqp_torch.qp.solvers import Found

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

needs_moreau = pytest.mark.skipif(
    importlib.util.find_spec("moreau") is None, reason="the extra moreau is not installed"
)


def dual_data(n_classes: int, batch: int = 40) -> tuple[Tensor, Tensor]:
    """M and g of random edits."""
    problem = random_problem(n_classes, 16, batch, condition=10)
    geometry = ProbeGeometry.build(problem.weight, problem.bias, problem.covariance)
    gap = problem.floor[:, None] - geometry.margins(problem.x, problem.target)
    return geometry.constraints(problem.target).gram.clone(), gap


@pytest.mark.parametrize("n_classes", [2, 3, 5, 10])
def test_the_plugged_in_solver_equals_the_direct_route(n_classes: int) -> None:
    gram, gap = dual_data(n_classes)
    qp = MahalanobisQP(n_classes)
    outgoing = torch.randn_like(gap)
    results = []
    for route in ("layer", "direct"):
        inputs = gram.clone().requires_grad_(), gap.clone().requires_grad_()
        if route == "layer":
            (multipliers,) = qp.layer(*inputs)
        else:
            multipliers, _ = DualActiveSet().solve(*inputs)
        gradients = torch.autograd.grad(multipliers, inputs, outgoing)
        results.append((multipliers, *gradients))
    (value, gram_gradient, gap_gradient), (value2, gram_gradient2, gap_gradient2) = results
    assert (value > 0).any()
    assert torch.allclose(value, value2, rtol=1e-12, atol=1e-13)
    assert torch.allclose(gap_gradient, gap_gradient2, rtol=1e-12, atol=1e-13)
    # A PSD parameter may be read from one triangle: what counts is the symmetric part.
    symmetric = (gram_gradient + gram_gradient.transpose(1, 2)) / 2
    assert torch.allclose(symmetric, gram_gradient2, rtol=1e-10, atol=1e-12)


def test_the_plugged_in_solver_takes_a_singular_matrix() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    gram, gap = (rows @ rows.T)[None], torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64)
    (multipliers,) = MahalanobisQP(4).layer(gram, gap)
    assert torch.allclose(multipliers @ rows, torch.tensor([[1.0, 2.0]], dtype=torch.float64))


def test_the_plugged_in_solver_raises_where_there_is_no_solution() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    gram, gap = (rows @ rows.T).repeat(3, 1, 1), torch.tensor([[1.0, -2], [1, 1], [0, 0]]).double()
    with pytest.raises(InfeasibleError, match=r"\[1\]"):
        MahalanobisQP(3).layer(gram, gap)


def posed_with(
    rows: Callable[[cp.Variable, list[cp.Parameter]], list[cp.Constraint]],
    more: Callable[[cp.Variable], cp.Expression] = lambda multipliers: cp.Constant(0),
    duals: bool = False,
    **attributes: Any,
) -> Callable[..., tuple[Tensor, ...]]:
    """min ½ λᵀMλ − gᵀλ + more under bounds, as a layer with our solver: (M, g, …) → (λ, duals)."""
    multipliers = cp.Variable(3, **attributes)
    gram, gap = cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    others: list[cp.Parameter] = []
    constraints = rows(multipliers, others)
    objective = 0.5 * cp.quad_form(multipliers, gram) - gap @ multipliers + more(multipliers)
    variables = [multipliers, *(c.dual_variables[0] for c in constraints if duals)]
    return CvxpyLayer(
        cp.Problem(cp.Minimize(objective), constraints),
        parameters=[gram, gap, *others],
        variables=variables,
        solver=DualActiveSet(),
    )


def scaled_by_parameter(x: cp.Variable, others: list[cp.Parameter]) -> list[cp.Constraint]:
    others.append(cp.Parameter(3, nonneg=True))
    return [cp.multiply(others[0], x) >= 0]


def bounded_by_parameter(x: cp.Variable, others: list[cp.Parameter]) -> list[cp.Constraint]:
    others.append(cp.Parameter(3))
    return [x >= others[0]]


WAYS: dict[str, tuple[Any, Tensor]] = {
    "λ ≥ 0": (lambda x, _: [x >= 0], torch.ones(3)),
    "0 ≤ λ": (lambda x, _: [np.zeros(3) <= x], torch.ones(3)),
    "a constant 0 ≤ λ": (lambda x, _: [cp.Constant(0) <= x], torch.ones(3)),
    "0 ≥ −λ": (lambda x, _: [np.zeros(3) >= -x], torch.ones(3)),
    "λ + 1 ≥ 1": (lambda x, _: [x + 1 >= 1], torch.ones(3)),
    "λ ≥ −λ": (lambda x, _: [x >= -x], torch.full((3,), 2.0)),
    "a cone": (lambda x, _: [cp.NonNeg(x)], torch.ones(3)),
    "λ / 4 ≥ 0": (lambda x, _: [x / 4 >= 0], torch.full((3,), 0.25)),
    "−λ ≤ 0": (lambda x, _: [-x <= 0], torch.ones(3)),
    "2λ ≥ 0": (lambda x, _: [2 * x >= 0], torch.full((3,), 2.0)),
    "each its own": (lambda x, _: [np.diag([1, 4, 0.5]) @ x >= 0], torch.tensor([1, 4, 0.5])),
    "backwards": (lambda x, _: [x[::-1] >= 0], torch.ones(3)),
    "one by one": (lambda x, _: [x[2] >= 0, 3 * x[0] >= 0, x[1] >= 0], torch.tensor([3.0, 1, 1])),
    "twice": (lambda x, _: [x >= 0, 5 * x >= 0], torch.ones(3)),
    "in two parts": (lambda x, _: [x[:2] >= 0, -2 * x[2] <= 0], torch.tensor([1.0, 1, 2])),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_the_bounds_has_its_own_dual(way: str) -> None:
    bounds, scale = WAYS[way]
    gram, gap = dual_data(4, batch=30)
    multipliers, *duals = posed_with(bounds, duals=True)(gram, gap)
    expected, _ = DualActiveSet().solve(gram, gap)
    torch.testing.assert_close(multipliers, expected)
    slack = (gram @ expected.unsqueeze(-1)).squeeze(-1) - gap
    # Lagrange: Mλ − g = Σ a y over the rows that bound a variable, y ≥ 0 and y λ = 0.
    if way == "one by one":
        order = [duals[1], duals[2], duals[0]]
        found = torch.stack(order, -1)
    elif way == "backwards":
        found = duals[0].flip(-1)
    elif way == "in two parts":
        found = torch.cat([duals[0], duals[1].reshape(-1, 1)], -1)
    elif way == "twice":
        found = duals[0] + 5 * duals[1]
    else:
        found = duals[0]
    assert (found >= 0).all()
    torch.testing.assert_close(found * scale.double(), slack, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "attributes",
    [
        {"nonneg": True},
        {"bounds": [0, None]},
        {"bounds": [np.zeros(3), None]},
        {"bounds": [0, np.inf]},
        {"bounds": [0.0, np.full(3, np.inf)]},
    ],
    ids=str,
)
def test_bounds_may_be_attributes_and_the_objective_any_quadratic(attributes: Any) -> None:
    gram, gap = dual_data(4, batch=30)
    layer = posed_with(lambda x, _: [], lambda x: cp.sum_squares(x) + cp.sum(x) + 7, **attributes)
    inputs = gram.clone().requires_grad_(), gap.clone().requires_grad_()
    (multipliers,) = layer(*inputs)
    again = gram.clone().requires_grad_(), gap.clone().requires_grad_()
    twice = 2 * torch.eye(3, dtype=torch.float64)
    expected, _ = DualActiveSet().solve(again[0] + twice, again[1] - 1)
    torch.testing.assert_close(multipliers, expected)
    outgoing = torch.randn_like(gap)
    found = torch.autograd.grad(multipliers, inputs, outgoing)
    wanted = torch.autograd.grad(expected, again, outgoing)
    torch.testing.assert_close((found[0] + found[0].mT) / 2, (wanted[0] + wanted[0].mT) / 2)
    torch.testing.assert_close(found[1], wanted[1])


def test_bounds_may_be_scaled_by_a_positive_parameter_alone() -> None:
    gram, gap = dual_data(4, batch=10)
    layer = posed_with(scaled_by_parameter)
    (multipliers,) = layer(gram, gap, torch.rand(10, 3).double() + 0.1)
    torch.testing.assert_close(multipliers, DualActiveSet().solve(gram, gap)[0])
    with pytest.raises(SolverError, match="not at all"):
        layer(gram, gap, torch.zeros(10, 3, dtype=torch.float64))


OTHERS: dict[str, tuple[Any, str]] = {
    "from above": (lambda x, _: [x >= 0, x <= 0.1], "bounds other than 0"),
    "below one": (lambda x, _: [x >= 1], "bounds other than 0"),
    "below a parameter": (bounded_by_parameter, "bounds other than 0"),
    "one of three": (lambda x, _: [x[0] >= 0], "without a bound"),
    "one of three twice": (lambda x, _: [x[0] >= 0, x[0] >= 0, x[1] >= 0], "without a bound"),
    "differences": (lambda x, _: [x >= 0, cp.diff(x) >= 0], "several variables"),
    "their minimum": (lambda x, _: [cp.min(x) >= 0], "several variables"),
    "some below −1": (lambda x, _: [x >= np.array([0, -1, 0])], "bounds other than 0"),
    "both sides": (lambda x, _: [x >= 0, -x >= -3], "bounds other than 0"),
    "none": (lambda x, _: [], "no constraints"),
    "their sum": (lambda x, _: [x >= 0, cp.sum(x) >= 0], "several variables"),
    "an equation": (lambda x, _: [x >= 0, x[0] == 0], "kinds"),
    "a norm": (lambda x, _: [x >= 0, cp.norm(x) <= 1], "kinds"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_problems_are_refused_when_the_layer_is_made(other: str) -> None:
    bounds, said = OTHERS[other]
    with pytest.raises(SolverError, match=rf"and nothing else.*{said}"):
        posed_with(bounds)
    with pytest.raises(SolverError, match="and nothing else"):
        posed_with(lambda x, _: [x >= 0], cp.norm1)


def test_upper_bounds_are_refused_however_they_are_written() -> None:
    for bounds in ([0, 0.1], [-1, None], [None, 0], [np.array([0, 0, 1]), None]):
        with pytest.raises(SolverError, match="and nothing else"):
            posed_with(lambda x, _: [], bounds=bounds)(*dual_data(4, batch=2))
    with pytest.raises(SolverError, match="and nothing else"):
        posed_with(lambda x, _: [], nonpos=True)(*dual_data(4, batch=2))
    for rows in (lambda x, _: [-2 * x >= 0], lambda x, _: [x >= 0, x <= 0]):
        with pytest.raises(SolverError, match="bounded from above"):
            posed_with(rows)(*dual_data(4, batch=2))


def test_one_solver_serves_layers_of_one_form() -> None:
    solver = DualActiveSet()
    for n_constraints in (3, 3):
        pose(n_constraints, solver, {}, factored=False)
    with pytest.raises(SolverError, match="make another"):
        pose(4, solver, {}, factored=False)


def solved_with_gradients(problem: Problem, solver: str) -> tuple[Tensor, list[Tensor], Tensor]:
    names = ("x", "weight", "bias", "covariance", "floor")
    inputs = [getattr(problem, name).clone().requires_grad_() for name in names]
    x, weight, bias, covariance, floor = inputs
    qp = MahalanobisQP(len(bias), solver=solver)
    solution = qp(x, problem.target, floor, weight, bias, covariance)
    assert (solution.status <= Status.SOLVED).all()
    outgoing = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    gradients = torch.autograd.grad(solution.x_new, inputs, outgoing)
    return solution.x_new.detach(), list(gradients), solution.active


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [("DIFFCP", 5e-3), pytest.param("MOREAU", 1e-6, marks=needs_moreau)],
)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_other_solvers_agree_to_their_accuracy(
    solver: str, tolerance: float, n_classes: int
) -> None:
    problem = random_problem(n_classes, 8, 12, seed=3, condition=5)
    x_new, gradients, active = solved_with_gradients(problem, "ACTIVE_SET")
    theirs, their_gradients, their_active = solved_with_gradients(problem, solver)
    assert torch.allclose(x_new, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(active, their_active)
    for ours, other in zip(gradients, their_gradients, strict=True):
        assert float((ours - other).abs().max()) <= tolerance * (1 + float(ours.abs().max()))


@needs_moreau
def test_moreau_reads_back_the_floor_too() -> None:
    problem = random_problem(6, 24, 60, condition=100)
    problem.x = problem.x.float()
    solution = problem.solve("MOREAU")
    assert (solution.status <= Status.SOLVED).all()
    assert (solution.log_odds_after >= solution.floor).all()


@pytest.mark.skipif(
    importlib.util.find_spec("juliacall") is not None, reason="CUCLARABEL may be installed"
)
def test_a_solver_that_is_not_installed_is_named() -> None:
    with pytest.raises(SolverError, match="CUCLARABEL"):
        MahalanobisQP(3, solver="CUCLARABEL")


def test_a_solver_is_an_object_that_is_passed_in() -> None:
    """A user's own: ours, but for a doubled floor; an edit takes it as it takes a name."""

    class Doubled(ActiveSet):
        name = "DOUBLED"

        def solve(
            self, constraints: Constraints, margins: Tensor, floor: Tensor, asked: Tensor
        ) -> Found:
            return super().solve(constraints, margins, 2 * floor, asked)

    problem = random_problem(4, 8, 30)
    problem.floor = problem.floor.abs() + 1
    # It aims elsewhere, and has to say so.
    assert (problem.solve(Doubled()).status != Status.SOLVED).all()
    Doubled.least = False
    doubled = problem.solve(Doubled())
    problem.floor = 2 * problem.floor
    expected = problem.solve()
    more = (expected.status == Status.SOLVED) & (doubled.status == Status.SOLVED)
    assert more.sum() > 20
    torch.testing.assert_close(doubled.x_new[more], expected.x_new[more])
    probe = LinearProbe(8, 4, dtype=torch.float64).requires_grad_(False)
    edit = LRQP(probe, Mahalanobis(problem.covariance), solver=Doubled())
    assert isinstance(edit.qp.solver, Doubled) and edit.qp.solver_name == "DOUBLED"
    with pytest.raises(SolverError, match="when it is made"):
        MahalanobisQP(3, solver=Doubled(), solver_args={"max_iter": 3})
    with pytest.raises(SolverError, match="no solver of the dual"):
        MahalanobisQP(3, solver=TotalOdds()).layer.cpu()
    with pytest.raises(SolverError, match=r"odds='total' has a solver of its own.*'DIFFCP'"):
        ODDS["total"].program(3, solver="DIFFCP")


def test_cvxpy_is_loaded_when_a_layer_is_asked_for() -> None:
    code = """
import sys, torch, lrqp_torch as lrqp
x = torch.randn(60, 4)
edit = lrqp.LRQP.fit(x, torch.arange(60) % 3, log_odds=1.0, odds="total")
edit(x, 1)
assert not {"cvxpy", "cvxpylayers"} & set(sys.modules)
from lrqp_torch.qp import DualActiveSet
assert {"cvxpy", "cvxpylayers"} <= set(sys.modules) and DualActiveSet.canon_solver
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_an_unknown_solver_is_named_with_the_choice() -> None:
    with pytest.raises(SolverError, match=r"'SIMPLEX'.*ACTIVE_SET.*DIFFCP"):
        MahalanobisQP(3, solver="SIMPLEX")


def test_a_failing_external_solver_raises_a_solver_error() -> None:
    problem = random_problem(3, 4, 5)
    qp = MahalanobisQP(3, solver="DIFFCP", solver_args={"solve_method": "NONSENSE"})
    problem.floor = problem.floor + 10
    with pytest.raises(SolverError, match="DIFFCP failed"):
        qp(
            problem.x,
            problem.target,
            problem.floor,
            problem.weight,
            problem.bias,
            problem.covariance,
        )


@pytest.mark.parametrize("solver", ["ACTIVE_SET", "DIFFCP"])
def test_programs_hold_no_state_and_can_be_copied(solver: str) -> None:
    """cvxpylayers keeps sparse buffers, which torch can neither copy nor save."""
    problem = random_problem(3, 4, 8)
    qp = MahalanobisQP(3, solver=solver, solver_args={})
    assert not qp.state_dict()
    arguments = (problem.x, problem.target, 3.0, problem.weight, problem.bias, problem.covariance)
    x_new = qp(*arguments).x_new
    for twin in (copy.deepcopy(qp), pickle.loads(pickle.dumps(qp)), copy.deepcopy(qp).half()):
        assert twin.solver_name == solver
        assert torch.equal(twin(*arguments).x_new, x_new)
        assert twin.layer is not qp.layer


def test_gradient_of_the_slack_is_refused_not_wrong() -> None:
    solver = DualActiveSet()
    with pytest.raises(NotImplementedError):
        solver.derivative_torch_batch(torch.ones(1, 2), torch.ones(1, 2), None)


BAD_CALLS = {
    "width of x": ({"x": torch.zeros(5, 7).double()}, WidthError, "4"),
    "x not a matrix": ({"x": torch.zeros(4).double()}, WidthError, "B, 4"),
    "integer x": ({"x": torch.zeros(5, 4).long()}, WidthError, "int64"),
    "NaN in x": ({"x": torch.full((5, 4), float("nan")).double()}, NonFiniteError, "5 of 5"),
    "infinite x": ({"x": torch.full((5, 4), float("inf"))}, NonFiniteError, "NaN or infinity"),
    "target too large": ({"target": torch.full((5,), 3)}, TargetError, "classes 0 to 2"),
    "target negative": ({"target": torch.full((5,), -1)}, TargetError, "holds -1"),
    "target floating": ({"target": torch.zeros(5)}, TargetError, "float32"),
    "target bool": ({"target": torch.zeros(5).bool()}, TargetError, "bool"),
    "target shape": ({"target": torch.zeros(4).long()}, TargetError, r"\(5,\)"),
    "floor shape": ({"floor": torch.zeros(4)}, WidthError, "log_odds"),
    "floor matrix": ({"floor": torch.zeros(5, 1)}, WidthError, "log_odds"),
    "NaN floor": ({"floor": float("nan")}, NonFiniteError, "log_odds"),
    "infinite floor": ({"floor": float("inf")}, NonFiniteError, "log_odds"),
    "covariance width": ({"covariance": torch.eye(5).double()}, WidthError, "covariance"),
    "bias shape": ({"bias": torch.zeros(2)}, WidthError, "bias"),
    "one class": ({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)}, WidthError, "K ≥ 2"),
    "other K": ({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)}, WidthError, "3 classes"),
    "NaN weight": ({"weight": torch.full((3, 4), float("nan"))}, NonFiniteError, "weight"),
    "NaN bias": ({"bias": torch.full((3,), float("nan"))}, NonFiniteError, "bias"),
    "NaN metric": ({"covariance": torch.full((4, 4), float("nan"))}, NonFiniteError, "metric"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(name: str) -> None:
    changes, error, message = BAD_CALLS[name]
    problem = random_problem(3, 4, 5)
    for key, value in changes.items():
        setattr(problem, key, value)
    qp = MahalanobisQP(3)
    with pytest.raises(error, match=message):
        qp(
            problem.x,
            problem.target,
            problem.floor,
            problem.weight,
            problem.bias,
            problem.covariance,
        )


def test_fewer_than_two_classes_are_refused() -> None:
    with pytest.raises(WidthError, match="at least 2"):
        MahalanobisQP(1)
