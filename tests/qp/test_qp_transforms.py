"""Transforms of torch.func through the edit: against plain loops and autograd's own Jacobians."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from qp_reference import Problem, random_problem
from torch import Tensor
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lrqp_torch import LRQP, LinearProbe, Mahalanobis, MahalanobisQP, Status
from lrqp_torch.edits.constrained import ConstrainedLRQP
from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.errors import InfeasibleError, SolverError
from lrqp_torch.qp import ProbeGeometry

Edit = Callable[[Tensor, Tensor], Tensor]
# How the active set is found: the closed form, the table, the pivots.
ROUTES = [(2, True), (3, True), (3, False), (5, True), (5, False)]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

each_route = pytest.mark.parametrize(("n_classes", "table"), ROUTES)


def geometry_of(problem: Problem, table: bool) -> ProbeGeometry:
    geometry = ProbeGeometry.build(problem.weight, problem.bias, problem.covariance)
    assert (geometry.sets is None) == (len(problem.bias) == 2)
    return geometry if table else replace(geometry, sets=None)


def solve_of(n_classes: int, table: bool, output: str = "x_new") -> tuple[Problem, Edit]:
    """A problem with satisfied and edited examples; (x, target) → a field of its solution."""
    problem = random_problem(n_classes, 5, 7, seed=n_classes, condition=5)
    problem.floor = torch.full((7,), -1.5, dtype=torch.float64)
    geometry, qp = geometry_of(problem, table), MahalanobisQP(n_classes)
    status = qp.solve(problem.x, problem.target, -1.5, geometry).status
    assert set(status.tolist()) == {Status.SATISFIED, Status.SOLVED}

    def edit(x: Tensor, target: Tensor) -> Tensor:
        result: Tensor = getattr(qp.solve(x, target, -1.5, geometry), output)
        return result

    return problem, edit


def one(edit: Edit) -> Edit:
    """The edit of a single activation, (d,)."""
    return lambda x, target: edit(x[None], target[None])[0]


@each_route
@pytest.mark.parametrize("output", ["x_new", "distance", "log_odds_after", "status", "active"])
def test_vmap_is_a_loop(n_classes: int, table: bool, output: str) -> None:
    problem, edit = solve_of(n_classes, table, output)
    loop = [one(edit)(x, t) for x, t in zip(problem.x, problem.target, strict=True)]
    mapped = vmap(one(edit))(problem.x, problem.target)
    torch.testing.assert_close(mapped, torch.stack(loop), **CLOSE)
    # Mapped over a second dimension of x and of nothing else, in the middle.
    several = vmap(edit, in_dims=(1, None), out_dims=0)(
        torch.stack([problem.x, 2 * problem.x], 1), problem.target
    )
    torch.testing.assert_close(several[0], edit(problem.x, problem.target), **CLOSE)
    torch.testing.assert_close(several[1], edit(2 * problem.x, problem.target), **CLOSE)


@each_route
def test_first_derivatives(n_classes: int, table: bool) -> None:
    problem, edit = solve_of(n_classes, table)
    x, target = problem.x, problem.target
    expected = plain_jacobian(lambda x: edit(x, target), x)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(edit)(x, target), expected, **CLOSE)
    own = expected[range(7), :, range(7)]
    torch.testing.assert_close(vmap(jacrev(one(edit)))(x, target), own, **CLOSE)
    torch.testing.assert_close(vmap(jacfwd(one(edit)))(x, target), own, **CLOSE)
    direction = torch.randn_like(x)
    _, pushed = jvp(lambda x: edit(x, target), (x,), (direction,))
    torch.testing.assert_close(pushed, (own @ direction[:, :, None])[..., 0], **CLOSE)
    _, pull = vjp(lambda x: edit(x, target), x)
    torch.testing.assert_close(
        pull(direction)[0], (own.mT @ direction[:, :, None])[..., 0], **CLOSE
    )
    # And the numbers themselves, by central differences.
    step = 1e-6 * direction
    numbers = (edit(x + step, target) - edit(x - step, target)) / 2e-6
    torch.testing.assert_close(pushed, numbers, rtol=1e-6, atol=1e-7)


@each_route
def test_second_derivatives_of_the_distance(n_classes: int, table: bool) -> None:
    """The distance is √ of a quadratic function: its Hessian is neither constant nor zero."""
    problem, edit = solve_of(n_classes, table, "distance")
    x, target = problem.x, problem.target

    def total(x: Tensor) -> Tensor:
        return edit(x, target).square().sum() + edit(x, target).sum()

    expected = plain_hessian(total, x)
    assert expected.abs().max() > 0.01
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(transform(total)(x), expected, **CLOSE)
    single = vmap(hessian(lambda x, t: one(edit)(x, t).square() + one(edit)(x, t)))(x, target)
    torch.testing.assert_close(single, expected[range(7), :, range(7)], **CLOSE)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_derivatives_in_probe_and_metric(n_classes: int) -> None:
    """Geometries are built inside the transform; K = 10 pivots."""
    problem = random_problem(n_classes, 4, 6, seed=1, condition=5)
    qp = MahalanobisQP(n_classes)

    def edit(weight: Tensor, bias: Tensor, root: Tensor) -> Tensor:
        covariance = (root + root.T) / 2
        return qp(problem.x, problem.target, problem.floor, weight, bias, covariance).x_new

    inputs = problem.weight, problem.bias, problem.covariance
    expected = plain_jacobian(edit, inputs)
    for transform in (jacrev, jacfwd):
        found = transform(edit, argnums=(0, 1, 2))(*inputs)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    # A batch of probes, each with its own geometry.
    weights = torch.stack([problem.weight, 1.5 * problem.weight])
    mapped = vmap(edit, in_dims=(0, None, None))(weights, *inputs[1:])
    for ours, weight in zip(mapped, weights, strict=True):
        torch.testing.assert_close(ours, edit(weight, *inputs[1:]), **CLOSE)


@pytest.fixture
def fitted() -> tuple[LRQP, Tensor, Tensor]:
    x = torch.randn(60, 6, dtype=torch.float64)
    y = torch.arange(60) % 3
    return LRQP.fit(x + torch.eye(6).double()[y], y, log_odds=2.0), x[:5], y[:5]


def test_lrqp_as_a_user_calls_it(fitted: tuple[LRQP, Tensor, Tensor]) -> None:
    """The mirror rule is part of what is differentiated."""
    edit, x, target = fitted
    expected = torch.stack([edit(row[None], t[None])[0] for row, t in zip(x, target, strict=True)])
    mapped = vmap(lambda row, t: edit(row[None], t[None])[0])(x, target)
    torch.testing.assert_close(mapped, expected, **CLOSE)
    jacobian = plain_jacobian(lambda x: edit(x, target), x)
    torch.testing.assert_close(jacrev(lambda x: edit(x, target))(x), jacobian, **CLOSE)
    _, pushed = jvp(lambda x: edit(x, 1), (x,), (torch.ones_like(x),))
    step = torch.full_like(x, 1e-6)
    numbers = (edit(x + step, 1) - edit(x - step, 1)) / 2e-6
    torch.testing.assert_close(pushed, numbers, rtol=1e-6, atol=1e-7)
    gradient = grad(lambda x: edit.solve(x, target).distance.square().sum())(x)
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(edit.solve(leaf, target).distance.square().sum(), leaf)
    torch.testing.assert_close(gradient, plain, **CLOSE)


def test_the_probe_may_be_swapped_by_functional_call(fitted: tuple[LRQP, Tensor, Tensor]) -> None:
    edit, x, target = fitted
    weight = edit.probe.weight.detach()

    def size(weight: Tensor) -> Tensor:
        return functional_call(edit, {"probe.weight": weight}, (x, target)).square().sum()

    found = grad(size)(weight)
    edit.probe.requires_grad_()
    (expected,) = torch.autograd.grad(edit(x, target).square().sum(), edit.probe.weight)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_classes_under_vmap_are_brought_into_range_and_marked() -> None:
    """No value can be looked at there, so a class that does not exist cannot raise."""
    probe = LinearProbe(4, 3, dtype=torch.float64).requires_grad_(False)
    edit = LRQP(probe, Mahalanobis.euclidean(4), log_odds=1.0)
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 7, 1])

    def status(x: Tensor, target: Tensor) -> Tensor:
        return edit.solve(x[None], target[None]).status[0]

    assert vmap(status)(x, target)[1] == Status.INVALID
    x[2, 1] = torch.nan
    assert vmap(status)(x, target)[2] == Status.INVALID
    kept = vmap(lambda x, t: edit.solve(x[None], t[None]).x_new[0])(x, target)
    assert torch.equal(kept[1], x[1])


def edit_with_equal_rows(**options: Any) -> LRQP:
    """Classes 0 and 1 have the same weights, so that neither can be written."""
    probe = LinearProbe(4, 3, dtype=torch.float64).requires_grad_(False)
    weight = random_problem(3, 4, 1, seed=0).weight
    probe.weight.copy_(torch.stack([weight[0], weight[0], weight[2]]))
    return LRQP(probe, Mahalanobis.euclidean(4), **options)


def test_rows_that_would_have_raised_are_nan_under_vmap() -> None:
    edit = edit_with_equal_rows()
    x = random_problem(3, 4, 4, seed=1).x
    target = torch.tensor([2, 7, -1, 1])
    expected = edit(x[:1], 2)

    def check(edited: Tensor) -> None:
        torch.testing.assert_close(edited[:1], expected, **CLOSE)
        assert edited[1:].isnan().all()

    check(vmap(one(edit))(x, target))
    joint = JointLRQP({"a": edit, "b": edit})
    # A class that does not exist, and one that contradicts the other variable's.
    choice = torch.tensor([2, 9, -7, 0])
    check(vmap(lambda x, t: joint(x[None], {"a": 2, "b": t[None]})[0])(x, choice))
    skipping = edit_with_equal_rows(on_infeasible="skip")
    edited = vmap(one(skipping))(x, target)
    assert torch.equal(edited[3], x[3])
    assert edited[1].isnan().all()


@pytest.mark.parametrize("n_classes", [3, 12, 70])
def test_total_odds_map_as_a_batch(n_classes: int) -> None:
    """M from a table, as it is, and by its normals; one row that is out of reach among them."""
    task = random_problem(n_classes, 16, 5, seed=2, condition=10)
    task.weight[1], task.bias[1] = task.weight[0], task.bias[0]
    task.target[:2] = torch.tensor([0, 2])
    probe, metric = LinearProbe.from_weights(task.weight, task.bias), Mahalanobis(task.covariance)
    edit = LRQP(probe, metric, odds="total", on_infeasible="skip", log_odds=6.0)
    expected = edit.solve(task.x, task.target)
    assert {Status.SOLVED, Status.INFEASIBLE} <= set(expected.status.tolist())

    def solved(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        solution = edit.solve(x[None], target[None])
        return solution.x_new[0], solution.status[0]

    edited, status = vmap(solved)(task.x, task.target)
    assert torch.equal(status, expected.status)
    torch.testing.assert_close(edited, expected.x_new, rtol=1e-9, atol=1e-9)
    sources = torch.arange(2)
    each = vmap(lambda source: edit.solve(task.x, task.target, source.expand(5)).x_new)(sources)
    for source, found in zip(sources, each, strict=True):
        alone = edit.solve(task.x, task.target, source.expand(5)).x_new
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)


def test_what_looks_at_values_refuses_vmap_by_name() -> None:
    total = edit_with_equal_rows(odds="total")
    x, classes = random_problem(3, 4, 2, seed=1).x, torch.tensor([2, 2])
    own = ConstrainedLRQP(total.probe, total.metric, lambda point: [point.distance <= 50])
    with pytest.raises(SolverError, match=r"ConstrainedLRQP looks at values .* vmap"):
        vmap(one(own))(x, classes)


def test_an_edit_made_inside_a_transform_raises_as_outside() -> None:
    made = edit_with_equal_rows()
    x = random_problem(3, 4, 2, seed=1).x
    with pytest.raises(InfeasibleError, match="target class"):
        jacrev(lambda x: LRQP(made.probe, made.metric)(x, 1))(x)
    inside = jacrev(lambda x: LRQP(made.probe, made.metric)(x, 2))(x)
    torch.testing.assert_close(inside, jacrev(lambda x: made(x, 2))(x), **CLOSE)
