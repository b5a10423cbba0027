"""Large batches: taken in blocks, in parts, and in float32 with a proven promise."""

import pickle
from dataclasses import fields, replace

import pytest
import torch
from qp_reference import Problem, random_problem
from torch import Tensor

from lrqp_torch import LRQP, LinearProbe, Mahalanobis, MahalanobisQP, Solution, Status
from lrqp_torch.errors import NonFiniteError
from lrqp_torch.qp import ProbeGeometry, problem, projection

K = pytest.mark.parametrize("n_classes", [2, 3, 7, 10])


def large(n_classes: int, batch: int = 1500, width: int = 64) -> tuple[Problem, ProbeGeometry]:
    task = random_problem(n_classes, width, batch, seed=n_classes, condition=100)
    task.x = task.x.float()
    return task, ProbeGeometry.build(task.weight, task.bias, task.covariance)


def solve(task: Problem, geometry: ProbeGeometry) -> Solution:
    return MahalanobisQP(len(task.bias)).solve(task.x, task.target, task.floor, geometry)


def exactly(task: Problem, geometry: ProbeGeometry) -> Solution:
    """The same activations as float64, which are solved and read back in float64."""
    return solve(replace(task, x=task.x.double()), geometry)


@K
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_single_precision_keeps_the_promise_and_costs_little(n_classes: int, size: float) -> None:
    task, geometry = large(n_classes)
    task.x = task.x * size
    solution, exact = solve(task, geometry), exactly(task, geometry)
    assert solution.x_new.dtype == torch.float32
    assert torch.equal(solution.status, exact.status)
    held = geometry.margins(solution.x_new.double(), task.target).amin(-1)
    assert (held >= task.floor).all()
    torch.testing.assert_close(solution.log_odds_after, held, rtol=1e-12, atol=1e-12)
    # Above the floor by rounding of x and of the edit, and no more.
    weight = (task.weight[:, None] - task.weight).norm(dim=-1).amax()
    scale = task.x.double().norm(dim=-1) + exact.euclidean
    edited = exact.status == Status.SOLVED
    excess = (held - task.floor)[edited]
    assert (excess <= 30 * n_classes * 6e-8 * (weight * scale)[edited]).all()
    kept = solution.status == Status.SATISFIED
    assert kept.any() and torch.equal(solution.x_new[kept], task.x[kept])


@K
def test_single_precision_certifies_what_it_did(n_classes: int) -> None:
    task, geometry = large(n_classes)
    solution, exact = solve(task, geometry), exactly(task, geometry)
    near = {"rtol": 1e-3, "atol": 1e-3}
    for name in ("distance", "euclidean", "log_odds_after", "multipliers"):
        torch.testing.assert_close(getattr(solution, name), getattr(exact, name), **near)
    assert torch.equal(solution.floor, exact.floor)
    torch.testing.assert_close(
        solution.log_odds_before, exact.log_odds_before, rtol=1e-12, atol=1e-12
    )
    assert (solution.kkt_residual <= 1e-8).all()
    moved = (solution.x_new.double() - task.x.double()).norm(dim=-1)
    torch.testing.assert_close(solution.euclidean, moved, rtol=1e-3, atol=1e-4)


@K
@pytest.mark.parametrize("batch", [8, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solution_can_be_kept_and_does_not_change(
    n_classes: int, batch: int, dtype: torch.dtype
) -> None:
    """Whatever is written over afterwards: it holds plain tensors of its own."""
    task, geometry = large(n_classes, batch)
    task.x = task.x.to(dtype)
    solution = solve(task, geometry)
    kept = pickle.loads(pickle.dumps(solution))
    assert type(kept) is Solution
    solution.x_new.zero_()
    task.x.zero_()
    task.floor.fill_(9.0)
    for name in {field.name for field in fields(Solution)} | {"distance", "euclidean"}:
        if name != "x_new":
            assert torch.equal(getattr(solution, name), getattr(kept, name)), name
    held = geometry.margins(kept.x_new, task.target).amin(-1)
    torch.testing.assert_close(kept.log_odds_after, held, rtol=1e-12, atol=1e-12)


@K
def test_single_precision_has_the_gradients_of_the_exact_edit(n_classes: int) -> None:
    task, geometry = large(n_classes)
    outgoing = torch.randn_like(task.x)
    low, high = task.x.clone().requires_grad_(), task.x.double().requires_grad_()
    floors = [task.floor.clone().requires_grad_() for _ in range(2)]
    found = solve(replace(task, x=low, floor=floors[0]), geometry)
    exact = solve(replace(task, x=high, floor=floors[1]), geometry)
    # Where rounding lets another constraint bind, the edit has another derivative.
    alike = (found.active == exact.active).all(-1)
    assert alike.double().mean() > 0.99
    found_gradients, exact_gradients = (
        torch.autograd.grad(
            (s.x_new * outgoing).sum() + s.distance.sum(), (leaf, floor), allow_unused=True
        )
        for s, leaf, floor in ((found, low, floors[0]), (exact, high, floors[1]))
    )
    for ours, theirs in zip(found_gradients, exact_gradients, strict=True):
        error = (ours.double() - theirs)[alike].abs()
        assert float(error.max()) <= 2e-4 * float(theirs.abs().max())


@K
def test_infeasible_members_of_a_large_batch(n_classes: int) -> None:
    task, _ = large(n_classes)
    task.weight[0] = task.weight[1]
    task.bias[0] = task.bias[1]
    task.floor = task.floor.abs() + 0.1
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    solution = solve(task, geometry)
    lost = task.target < 2
    assert torch.equal(solution.status == Status.INFEASIBLE, lost)
    assert torch.equal(solution.x_new[lost], task.x[lost])
    assert (solution.status[~lost] <= Status.SOLVED).all()
    assert (geometry.margins(solution.x_new, task.target).amin(-1) >= task.floor)[~lost].all()


@K
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_editing_again_does_nothing(n_classes: int, dtype: torch.dtype) -> None:
    task, geometry = large(n_classes)
    task.x = task.x.to(dtype)
    first = solve(task, geometry)
    second = solve(replace(task, x=first.x_new), geometry)
    assert (second.status == Status.SATISFIED).all()
    assert torch.equal(second.x_new, first.x_new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_parts_of_a_batch_are_put_together(
    dtype: torch.dtype, n_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, geometry = large(n_classes)
    task.x = task.x.to(dtype)
    probe = LinearProbe(64, n_classes, dtype=torch.float64).requires_grad_(False)
    probe.weight.copy_(task.weight)
    edit = LRQP(probe, Mahalanobis(task.covariance), log_odds=0.5)
    source = (task.target + 1) % n_classes
    whole, mirrored = solve(task, geometry), edit.solve(task.x, task.target, source)
    monkeypatch.setattr(problem, "CHUNK_NUMBERS", 64 * 700)
    parts = solve(task, geometry), edit.solve(task.x, task.target, source)
    for before, after in zip((whole, mirrored), parts, strict=True):
        assert torch.equal(before.status, after.status)
        for name in ("x_new", "multipliers", "floor", "distance", "log_odds_after"):
            torch.testing.assert_close(
                getattr(after, name), getattr(before, name), rtol=1e-6, atol=1e-4
            )
    assert (parts[1].log_odds_after >= parts[1].floor).all()


def test_overflow_of_float32_is_read_in_float64() -> None:
    task, _ = large(2)
    task.weight = task.weight * 1e-20
    task.covariance = task.covariance * 1e20
    task.bias.zero_()
    task.floor = task.floor.abs() + 1e20
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    assert (solve(task, geometry).status == Status.INACCURATE).all()


@K
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("batch", [5, 1500])
def test_what_is_not_finite_is_found_under_weights_of_zero(
    n_classes: int, dtype: torch.dtype, value: float, batch: int
) -> None:
    """Activations are found out by their margins: no product may skip a weight of zero."""
    task, _ = large(n_classes, batch)
    task.weight[:, 3] = 0.0
    task.x = task.x.to(dtype)
    task.x[2, 3] = value
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    with pytest.raises(NonFiniteError, match=r"\[2\]"):
        solve(task, geometry)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_in_blocks_is_the_product(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(101, 30).to(dtype)
    weight, bias = torch.randn(rows, 30).double(), torch.randn(rows).double()
    plain = projection.project(x, weight, bias)
    monkeypatch.setattr(projection, "LARGE", 1)
    monkeypatch.setattr(projection, "BLOCK_NUMBERS", 300)
    leaf = x.clone().requires_grad_()
    for blocks in (projection.project(x, weight, bias), projection.project(leaf, weight, bias)):
        torch.testing.assert_close(blocks, plain, rtol=1e-14, atol=1e-14)
    outgoing = torch.randn_like(plain)
    (found,) = torch.autograd.grad(blocks, leaf, outgoing)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (outgoing @ weight).to(dtype), rtol=1e-2, atol=1e-2)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: projection.project(x, weight, bias), leaf)
        assert torch.autograd.gradgradcheck(
            lambda x: projection.project(x, weight, bias).sin(), leaf
        )


def test_one_floor_a_constraint() -> None:
    """Floors (B, m) that differ only where they are lower cost no more."""
    task, geometry = large(4, batch=60)
    task.x = task.x.double()
    qp = MahalanobisQP(4)
    each = task.floor[:, None].expand(60, 3)
    same = qp.solve(task.x, task.target, each, geometry)
    single_floor = qp.solve(task.x, task.target, task.floor, geometry)
    assert torch.equal(same.x_new, single_floor.x_new)
    lower = each - torch.tensor([0.0, 1.0, 2.0])
    solution = qp.solve(task.x, task.target, lower, geometry)
    margins: Tensor = geometry.margins(solution.x_new, task.target)
    assert (margins >= lower).all()
    assert (solution.distance <= single_floor.distance + 1e-12).all()
    assert (solution.distance < single_floor.distance).any()
