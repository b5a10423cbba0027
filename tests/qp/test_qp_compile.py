"""The path that never looks at a value: under a guard, on the meta device, and compiled."""

from importlib import import_module
from typing import Any

import pytest
import torch
from qp_reference import Problem, barely_reachable, random_problem
from test_qp_native import KINDS, problem_of_kind
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrqp_torch import LRQP, LinearProbe, Mahalanobis, MahalanobisQP, Solution, Status, errors
from lrqp_torch.qp import (
    ProbeGeometry,
    constraints,
    direct,
    geometry,
    problem,
    reach,
    total_odds,
)
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.stream.intervene import Placement

blindly, edits = (import_module(f"lrqp_torch.{name}") for name in ("qp.blind", "edits.lrqp"))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique")


class NoLooking(TorchDispatchMode):
    """Raises on every operation for which a host has to wait for its device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert not name.startswith(LOOKS), f"{name} looks at a value"
        if name in ("index", "index_put", "index_put_"):
            where = [at for at in args[1] if at is not None]
            assert all(at.dtype != torch.bool for at in where), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no value may be looked at, and tables are made for K ≤ 8."""
    modules = errors, problem, reach, constraints, geometry, direct, total_odds, blindly, edits
    for module in modules:
        monkeypatch.setattr(module, "readable", lambda tensor: False)


def geometry_of(problem: Problem) -> ProbeGeometry:
    return ProbeGeometry.build(problem.weight, problem.bias, problem.covariance)


def same(found: Solution, expected: Solution) -> None:
    assert torch.equal(found.status, expected.status)
    assert torch.equal(found.active, expected.active)
    near = {"rtol": 1e-9, "atol": 1e-9}
    for name in ("multipliers", "distance", "euclidean", "floor", "log_odds_before"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **near)
    edited = expected.status == Status.SOLVED
    assert (found.log_odds_after >= found.floor)[edited].all()


@pytest.mark.parametrize("n_classes", range(2, 9))
def test_a_solve_looks_at_nothing_and_is_the_same(blind: None, n_classes: int) -> None:
    task = random_problem(n_classes, 16, 64, condition=10)
    # Once, whether classes are near each other.
    shape = geometry_of(task)
    with NoLooking():
        found = MahalanobisQP(n_classes).solve(task.x, task.target, task.floor, shape)
    assert shape.n_constraints == n_classes - 1
    assert {Status.SATISFIED, Status.SOLVED} == set(found.status.tolist())
    expected = seen(task)
    same(found, expected)
    torch.testing.assert_close(found.x_new, expected.x_new, rtol=1e-10, atol=1e-10)


def seen(task: Problem, realise: Placement | None = None) -> Solution:
    """The solution by pivots, with values looked at."""
    from dataclasses import replace

    with pytest.MonkeyPatch.context() as patch:
        for module in (problem, reach, blindly):
            patch.setattr(module, "readable", lambda tensor: True)
        shape = replace(geometry_of(task), sets=None)
        qp = MahalanobisQP(len(task.bias))
        return qp.solve(task.x, task.target, task.floor, shape, realise=realise)


def test_the_guard_sees_a_look() -> None:
    task = random_problem(3, 8, 5)
    shape = geometry_of(task)
    with pytest.raises(AssertionError, match="looks at a value"), NoLooking():
        MahalanobisQP(3).solve(task.x, task.target, 1.0, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placed", ["plain", "sum"])
def test_every_kind_of_problem_comes_out_as_where_values_are_seen(
    blind: None, kind: str, n_classes: int, dtype: torch.dtype, placed: str
) -> None:
    torch.manual_seed(n_classes)
    task = problem_of_kind(kind, n_classes, dtype)
    base = (3 * torch.randn(task.x.shape)).to(dtype)
    realise = None if placed == "plain" else Placement(base, 1.0, dtype)
    shape, qp = geometry_of(task), MahalanobisQP(n_classes)
    found = qp.solve(task.x, task.target, task.floor, shape, realise=realise)
    expected = seen(task, realise)
    assert torch.equal(found.status, expected.status)
    done = found.status == Status.SOLVED
    assert (found.log_odds_after >= found.floor)[done].all()
    assert (found.kkt_residual[done] <= 1e-8).all()
    coarse = max(torch.finfo(dtype).eps, 1e-9)
    # Above the floors by what rounding needs, up to a factor: shorter is no fault.
    longer = (found.distance / expected.distance)[done]
    assert (longer <= 1 + 256 * coarse).all()
    if dtype == torch.float64:
        assert (longer >= 1 - 256 * coarse).all()
    assert torch.equal(found.x_new[~done], task.x[~done]) or (found.status == 3).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 3, 8])
@pytest.mark.parametrize("sourced", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_an_edit_takes_few_operations(
    blind: None, n_classes: int, dtype: torch.dtype, sourced: bool, scale: float | None
) -> None:
    """Read-back, certificate and views among them; classes as tensors on the device, and the probe
    held to what it was. At ``mid`` too; where a model scales what it adds there, without views.
    """

    class Counting(TorchDispatchMode):
        count = views = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            self.views += function.is_view
            return function(*args, **(kwargs or {}))

    task = random_problem(n_classes, 16, 20)
    probe = LinearProbe.from_weights(task.weight, task.bias).requires_grad_(False)
    edit = LRQP(probe, Mahalanobis(task.covariance))
    x, source = task.x.to(dtype), (task.target + 1) % n_classes if sourced else None
    live = edit.probe.weight, edit.probe.bias
    assert edit.geometry(x.device).blind is not None
    realise = None if scale is None else Placement(x.roll(1, 0), scale, dtype)
    with Counting() as counting:
        shape, stale = edit._geometry.peek(live, edit.metric.covariance, x.device)
        solution = edit._attempt(x, task.target, source, realise, shape, stale)
    # Views are no work of the device; they do not count where the sum itself takes more.
    summed = scale == 0.3 or (scale == 1.0 and n_classes > 2)
    count = counting.count - (counting.views if summed else 0)
    assert count <= (60 if n_classes == 2 else 120)
    assert scale == 0.3 or counting.count <= (60 if n_classes == 2 else 130)
    assert (solution.status <= Status.SOLVED).all()


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3, 8])
def test_a_negative_source_is_the_probe_s_own_reading(
    blind: None, n_classes: int, total: bool
) -> None:
    task = random_problem(n_classes, 16, 40)
    source = torch.arange(40) % (n_classes + 1) - 1
    least = torch.tensor(0.5, dtype=torch.float64)
    rule, shape = OddsRule(True, least, task.target, source), geometry_of(task)
    solver = total_odds.TotalOdds() if total and n_classes > 2 else "ACTIVE_SET"
    found = MahalanobisQP(n_classes, solver=solver).solve(task.x, task.target, rule, shape)
    expected = rule(shape.margins(task.x, task.target))
    torch.testing.assert_close(found.floor, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_classes", [3, 10])
def test_what_total_odds_do_beside_the_kernel_looks_at_nothing(blind: None, n_classes: int) -> None:
    """What it reads of a geometry, and the steps from which derivatives come."""
    task = random_problem(n_classes, 16, 8, seed=2)
    solver = total_odds.TotalOdds()
    found = MahalanobisQP(n_classes, solver=solver).solve(
        task.x, task.target, task.floor, geometry_of(task)
    )
    x = task.x.clone().requires_grad_()
    shape = geometry_of(task)
    with NoLooking():
        grams = shape.total_grams
        margins, parts = shape.margins(x, task.target), shape.constraints(task.target)
        again = total_odds.steps(parts, margins, task.floor, found.multipliers)
        (first,) = torch.autograd.grad(again.sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)
    edited = found.status == Status.SOLVED
    assert edited.any() and torch.isfinite(first).all()
    torch.testing.assert_close(again[edited], found.multipliers[edited], rtol=1e-6, atol=1e-8)
    own = task.target[:, None], constraints.other_classes(task.target, n_classes, x.device)
    wanted = parts.gram.detach().diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(grams[own[0], own[1], own[1]], wanted, rtol=1e-9, atol=0.0)
    assert not grams.diagonal(dim1=0, dim2=1).any()


@pytest.mark.parametrize(("n_classes", "dtype"), [(3, DTYPES[0]), (5, DTYPES[2]), (8, DTYPES[1])])
@pytest.mark.parametrize("kind", ["plain", "copies", "low rank", "weakly active"])
def test_total_odds_look_at_nothing_and_are_the_same(
    blind: None, kind: str, n_classes: int, dtype: torch.dtype
) -> None:
    """In so many steps as most problems need; where more were needed the status says so."""
    torch.manual_seed(n_classes)
    task = problem_of_kind(kind, n_classes, dtype, 16)
    base = (3 * torch.randn(task.x.shape)).to(dtype)
    realise = Placement(base, 1.0, dtype) if n_classes == 5 else None
    shape, qp = geometry_of(task), MahalanobisQP(n_classes, solver=total_odds.TotalOdds())
    assert shape.lent_sets is not None
    given = task.x, task.target, task.floor, shape
    with NoLooking():
        found = qp.solve(*given, realise=realise)
    with pytest.MonkeyPatch.context() as patch:
        for module in (problem, reach, blindly, total_odds, geometry):
            patch.setattr(module, "readable", lambda tensor: True)
        expected = qp.solve(*given, realise=realise)
    assert torch.equal(found.status, expected.status)
    done = found.status == Status.SOLVED
    assert done.any() and (found.log_odds_after >= found.floor)[done].all()
    longer = (found.distance / expected.distance)[done]
    coarse = max(torch.finfo(dtype).eps, 1e-9)
    assert (longer <= 1 + 256 * coarse).all()
    assert dtype != torch.float64 or (longer >= 1 - 256 * coarse).all()


def test_total_odds_of_many_classes_look_now_and_then(blind: None) -> None:
    task = random_problem(12, 16, 12, seed=3)
    qp, shape = MahalanobisQP(12, solver=total_odds.TotalOdds()), geometry_of(task)
    found = qp.solve(task.x, task.target, task.floor, shape)
    with pytest.MonkeyPatch.context() as patch:
        for module in (problem, reach, total_odds, geometry):
            patch.setattr(module, "readable", lambda tensor: True)
        expected = qp.solve(task.x, task.target, task.floor, shape)
    assert torch.equal(found.status, expected.status)
    torch.testing.assert_close(found.distance, expected.distance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("each", [False, True])
def test_derivatives_are_exact_to_the_second_order(blind: None, n_classes: int, each: bool) -> None:
    """In activations, probe, metric and floors, of which each constraint may have its own."""
    task = random_problem(n_classes, 5, 3, seed=4)
    extra = torch.linspace(0, 1, n_classes - 1, dtype=torch.float64)
    floor = task.floor.unsqueeze(-1) + extra if each else task.floor

    def solved(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, floor, weight, bias, root = inputs
        shape = ProbeGeometry.build(weight, bias, root @ root.mT)
        solution = MahalanobisQP(n_classes).solve(x, task.target, floor, shape)
        assert (solution.status == Status.SOLVED).any()
        return solution.x_new, solution.squared_distance

    root = torch.linalg.cholesky(task.covariance)
    inputs = [one.clone().requires_grad_() for one in (task.x, floor, task.weight, task.bias, root)]
    torch.autograd.gradcheck(solved, inputs)
    torch.autograd.gradgradcheck(solved, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 4, 8])
@pytest.mark.parametrize("size", [1e-2, 1.0, 100.0])
def test_a_fixed_number_of_rounds_reaches_every_floor(
    blind: None, dtype: torch.dtype, n_classes: int, size: float
) -> None:
    task = random_problem(n_classes, 64, 200, seed=n_classes)
    task.x = (task.x * size).to(dtype)
    solution = MahalanobisQP(n_classes).solve(task.x, task.target, task.floor, geometry_of(task))
    assert (solution.status <= Status.SOLVED).all()
    margins = geometry_of(task).margins(solution.x_new, task.target).amin(-1)
    assert (margins >= task.floor).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_half_precision_is_reached_blindly(blind: None, dtype: torch.dtype) -> None:
    """At ``mid`` the stream holds attention output + block input, each of half precision."""
    task = random_problem(3, 64, 300, condition=10)
    base = (3 * torch.randn(300, 64, dtype=torch.float64)).to(dtype)
    stream = (base + task.x.to(dtype)).to(dtype)

    def realise(edited: Tensor) -> Tensor:
        return (base + (edited.to(dtype).double() - base.double()).to(dtype)).double()

    solution = MahalanobisQP(3).solve(
        stream, task.target, task.floor, geometry_of(task), realise=realise
    )
    assert (solution.status <= Status.SOLVED).all()
    assert (solution.log_odds_after >= solution.floor).all()


@pytest.mark.parametrize("n_classes", [2, 4])
def test_bad_input_ends_as_a_status_where_it_cannot_raise(blind: None, n_classes: int) -> None:
    task = random_problem(n_classes, 8, 6)
    task.x[1, 2], task.x[4, 0] = torch.nan, torch.inf
    task.floor[2] = torch.nan
    solution = MahalanobisQP(n_classes).solve(task.x, task.target, task.floor, geometry_of(task))
    assert (solution.status == Status.INVALID).tolist() == [False, True, True, False, True, False]
    assert torch.equal(solution.x_new[2], task.x[2])
    assert torch.equal(solution.x_new[4], task.x[4])


def test_unreachable_targets_are_told_from_reachable_ones_by_the_table(blind: None) -> None:
    task = random_problem(4, 8, 120)
    task.weight[3], task.bias[3] = task.weight[2], task.bias[2] + 3
    task.floor = torch.full((120,), 2.0, dtype=torch.float64)
    solution = MahalanobisQP(4).solve(task.x, task.target, task.floor, geometry_of(task))
    assert torch.equal(solution.status == Status.INFEASIBLE, task.target == 2)
    assert (solution.status[task.target != 2] <= Status.SOLVED).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [3, 12])
def test_aims_out_of_reach_do_not_make_floors_unreachable(
    blind: None, n_classes: int, dtype: torch.dtype
) -> None:
    task = barely_reachable(n_classes, dtype)
    found = MahalanobisQP(n_classes).solve(task.x, task.target, task.floor, geometry_of(task))
    assert torch.equal(found.status == Status.INFEASIBLE, task.floor > 1)
    assert (found.log_odds_after >= found.floor)[found.status == Status.SOLVED].all()


@pytest.mark.parametrize("n_classes", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_edit_runs_without_values(n_classes: int, dtype: torch.dtype) -> None:
    """Tensors of the meta device have none, so whatever depends on one raises."""
    probe = LinearProbe(16, n_classes, dtype=torch.float64).requires_grad_(False)
    edit = LRQP(probe, Mahalanobis.euclidean(16)).to("meta")
    x = torch.zeros(10, 16, dtype=dtype, device="meta", requires_grad=True)
    target = torch.zeros(10, dtype=torch.long, device="meta")
    solution = edit.propose(x, target, target)
    assert solution.x_new.shape == (10, 16) and solution.x_new.dtype == dtype
    assert solution.status.shape == (10,)
    (gradient,) = torch.autograd.grad(solution.x_new, x, torch.zeros_like(solution.x_new))
    assert gradient.shape == x.shape


def test_a_kept_geometry_is_compared_on_the_device(blind: None) -> None:
    """A change that leaves no trace cannot be seen without waiting; it is told afterwards."""
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    metric = torch.eye(4, dtype=torch.float64)
    kept, probe = geometry.GeometryCache(geometry.probe_geometry), (weight, bias)
    first = kept.get(probe, metric, weight.device)
    with NoLooking():
        again, stale = kept.peek(probe, metric, weight.device)
    assert again is first and not stale
    weight.data.mul_(2)
    with NoLooking():
        _, stale = kept.peek(probe, metric, weight.device)
    assert stale
    second = kept.get(probe, metric, weight.device)
    assert second is not first
    metric.data[0, 3] = metric.data[3, 0] = 0.5
    with NoLooking():
        again, stale = kept.peek(probe, metric, weight.device)
    assert again is second and stale
    assert kept.get(probe, metric, weight.device) is not second


@pytest.mark.parametrize("n_classes", [2, 5, 10])
def test_one_class_for_all_is_held_to_the_probe_as_it_is_now(blind: None, n_classes: int) -> None:
    """What compares it on the device is a number and no truth value."""
    probe = LinearProbe(16, n_classes, dtype=torch.float64).requires_grad_(False)
    edit, x = LRQP(probe, Mahalanobis.euclidean(16), log_odds=2.0), torch.randn(10, 16)
    for worst in (Status.SOLVED, Status.INVALID):
        parts = (probe.weight, probe.bias), edit.metric, x.device
        solution = edit._attempt(x, 1, None, None, *edit._geometry.peek(*parts))
        assert solution.status.amax() == worst
        probe.weight.data.mul_(1.5)
    assert torch.equal(solution.x_new, x)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_compiled_in_one_graph(n_classes: int) -> None:
    """The whole solve and its gradient, with the same numbers; K = 10 pivots in one operator."""
    torch.compiler.reset()
    task = random_problem(n_classes, 16, 40, condition=10)
    x, shape, qp = task.x.float(), geometry_of(task), MahalanobisQP(n_classes)

    def solve(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        solution = qp.solve(x, target, 3.0, shape)
        return solution.x_new, solution.status

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [run(leaf, task.target) for run, leaf in zip((compiled, solve), inputs, strict=True)]
    (found, status), (expected, expected_status) = results
    assert torch.equal(status, expected_status)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (shape.margins(found, task.target) >= 3.0).all()
    outgoing = torch.randn_like(x)
    gradients = [
        torch.autograd.grad(r[0], i, outgoing)[0] for r, i in zip(results, inputs, strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_classes", "backend"), [(3, "aot_eager"), (12, "eager"), (70, "eager")])
def test_total_odds_compile_into_one_graph(n_classes: int, backend: str) -> None:
    """As an edit, with its gradient: the search is one operator of it."""
    task = random_problem(n_classes, 16, 6, seed=2, condition=10)
    probe, metric = LinearProbe.from_weights(task.weight, task.bias), Mahalanobis(task.covariance)
    edit = LRQP(probe, metric, odds="total", on_infeasible="skip", log_odds=1.0)
    expected = edit.solve(task.x, task.target)
    assert (expected.status == Status.SOLVED).sum() > 2
    x = task.x.clone().requires_grad_()
    compiled = torch.compile(edit, fullgraph=True, backend=backend)
    found = compiled(x, task.target)
    torch.testing.assert_close(found, expected.x_new, rtol=1e-9, atol=1e-9)
    outgoing = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(found, x, outgoing)
    (wanted,) = torch.autograd.grad(edit(x, task.target), x, outgoing)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-8)
