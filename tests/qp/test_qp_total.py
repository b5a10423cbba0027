"""Total odds: the convex problem against exponential cones, its KKT conditions and gradients."""

import math
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from models_for_tests import VOCABULARY, build, random_edit
from qp_reference import Problem, random_problem
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import lrqp_torch as lrqp
from lrqp_torch import LRQP, LinearProbe, Mahalanobis, MahalanobisQP, Solution, Status
from lrqp_torch.errors import NonFiniteError, TargetError, WidthError
from lrqp_torch.qp import native, problem, total_odds
from lrqp_torch.qp.geometry import ProbeGeometry
from lrqp_torch.qp.total_odds import TotalOdds, solve_total, total_log_odds, total_residual


def geometry_of(problem: Problem) -> ProbeGeometry:
    return ProbeGeometry.build(problem.weight, problem.bias, problem.covariance)


def total_program(n_classes: int) -> MahalanobisQP:
    return MahalanobisQP(n_classes, solver=TotalOdds())


def solve(problem: Problem) -> Solution:
    return total_program(len(problem.bias)).solve(
        problem.x, problem.target, problem.floor, geometry_of(problem)
    )


def total_of(problem: Problem, x: Tensor) -> Tensor:
    """log P[t] / (1 − P[t]) from probabilities, by its definition."""
    logits = x.double() @ problem.weight.T + problem.bias
    log_p = logits.log_softmax(-1)
    rest = log_p.scatter(-1, problem.target[:, None], -torch.inf).logsumexp(-1)
    return log_p.gather(-1, problem.target[:, None]).squeeze(-1) - rest


def by_exponential_cones(problem: Problem, i: int) -> tuple[Tensor, float]:
    """x' and its distance by Clarabel on exponential cones, in all whitened coordinates."""
    rows, right = problem.constraints(i)
    factor = torch.linalg.cholesky(problem.covariance)
    u = cp.Variable(problem.x.shape[1])
    start = (rows @ problem.x[i] - right + problem.floor[i]).numpy()
    margins = start + (rows @ factor).numpy() @ u
    program = cp.Problem(
        cp.Minimize(cp.sum_squares(u)), [cp.log_sum_exp(-margins) <= -float(problem.floor[i])]
    )
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return problem.x[i] + factor @ torch.from_numpy(u.value), float(np.linalg.norm(u.value))


@pytest.mark.parametrize(("n_classes", "width"), [(2, 6), (3, 8), (5, 16), (10, 24), (12, 6)])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_no_exponential_cone_solver_does_better(
    n_classes: int, width: int, condition: float
) -> None:
    problem = random_problem(n_classes, width, 12, seed=1, condition=condition)
    if n_classes > width:
        problem.weight = 3 * torch.nn.functional.normalize(problem.weight, dim=-1)
        problem.bias.zero_()
    solution = solve(problem)
    assert (solution.status <= Status.SOLVED).all()
    for i in range(12):
        x_new, distance = by_exponential_cones(problem, i)
        assert float(solution.distance[i]) == pytest.approx(distance, rel=1e-6, abs=1e-6)
        torch.testing.assert_close(solution.x_new[i], x_new, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_classes", "width"), [(2, 1), (3, 8), (5, 16), (10, 64), (50, 64)])
def test_kkt_conditions_hold(n_classes: int, width: int) -> None:
    problem = random_problem(n_classes, width, 128, seed=2)
    problem.floor = problem.floor + 3
    problem.floor[:16] = -30
    solution = solve(problem)
    assert set(solution.status.tolist()) == {Status.SATISFIED, Status.SOLVED}
    edited = solution.status == Status.SOLVED
    reached = total_of(problem, solution.x_new)
    size = 1 + (solution.x_new @ problem.weight.T).abs().amax(-1)
    assert (reached >= problem.floor - 1e-12 * size).all()
    # No further than asked: the one constraint binds.
    assert ((reached - problem.floor)[edited] <= 1e-10 * size[edited]).all()
    # Stationarity: δ = Σ Aᵀ λ, and λ is μ times the rivals' shares of 1 − P[t] at x'.
    probability = (solution.x_new @ problem.weight.T + problem.bias).softmax(-1)
    for i in edited.nonzero().flatten().tolist()[:32]:
        rows, _ = problem.constraints(i)
        t = int(problem.target[i])
        rivals = [k for k in range(n_classes) if k != t]
        share = probability[i, rivals] / probability[i, rivals].sum()
        multipliers = solution.multipliers[i]
        expected = multipliers.sum() * share
        torch.testing.assert_close(multipliers, expected, rtol=1e-7, atol=1e-10)
        delta = problem.covariance @ rows.T @ multipliers
        torch.testing.assert_close(solution.x_new[i] - problem.x[i], delta, rtol=1e-8, atol=1e-10)
    assert float(solution.kkt_residual.max()) <= 1e-10
    assert torch.equal(solution.x_new[~edited], problem.x[~edited])
    torch.testing.assert_close(solution.log_odds_after, reached, rtol=1e-9, atol=1e-9)


def test_two_classes_are_the_pairwise_problem() -> None:
    problem = random_problem(2, 16, 100, seed=4)
    pairwise, total = problem.solve(), solve(problem)
    torch.testing.assert_close(total.x_new, pairwise.x_new, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.multipliers, pairwise.multipliers, rtol=1e-10, atol=1e-12)
    assert torch.equal(total.status, pairwise.status)


@pytest.mark.parametrize("n_classes", [3, 10, 20])
def test_it_lies_between_what_is_necessary_and_what_is_sufficient(n_classes: int) -> None:
    problem = random_problem(n_classes, 32, 200, seed=5)
    problem.floor = problem.floor + 3
    total = solve(problem)
    qp, geometry = MahalanobisQP(n_classes), geometry_of(problem)
    necessary = qp.solve(problem.x, problem.target, problem.floor, geometry).distance
    enough = problem.floor + math.log(n_classes - 1)
    sufficient = qp.solve(problem.x, problem.target, enough, geometry).distance
    assert (total.distance >= necessary - 1e-9).all()
    assert (total.distance <= sufficient + 1e-9).all()
    edited = total.status == Status.SOLVED
    assert float((total.distance / sufficient)[edited].median()) < 0.99


def test_equal_rivals_have_a_closed_form() -> None:
    """By symmetry all m rivals fall alike, so the sufficient floor log α + log m is exact."""
    weight = torch.eye(5, dtype=torch.float64)
    problem = Problem(
        x=torch.zeros(1, 5, dtype=torch.float64),
        target=torch.zeros(1, dtype=torch.long),
        floor=torch.tensor([2.0], dtype=torch.float64),
        weight=weight,
        bias=torch.zeros(5, dtype=torch.float64),
        covariance=torch.eye(5, dtype=torch.float64),
    )
    solution = solve(problem)
    gap = 2 + math.log(4)
    # s rises equally along a = (1, −¼, −¼, −¼, −¼): |a|² = 5/4 and s = 5/4 a step.
    step = gap / 1.25
    expected = step * torch.tensor([1, -0.25, -0.25, -0.25, -0.25], dtype=torch.float64)
    torch.testing.assert_close(solution.x_new[0], expected, rtol=1e-12, atol=1e-12)


def test_duplicate_rivals_count_twice() -> None:
    """Copies of one rival raise what must be beaten by log of their number."""
    problem = random_problem(2, 6, 40, seed=6)
    problem.target.zero_()
    doubled = Problem(
        problem.x,
        problem.target,
        problem.floor,
        torch.cat([problem.weight, problem.weight[1:], problem.weight[1:]]),
        torch.cat([problem.bias, problem.bias[1:], problem.bias[1:]]),
        problem.covariance,
    )
    single = Problem(
        problem.x,
        problem.target,
        problem.floor + math.log(3),
        problem.weight,
        problem.bias,
        problem.covariance,
    )
    here, there = solve(doubled), solve(single)
    torch.testing.assert_close(here.x_new, there.x_new, rtol=1e-9, atol=1e-9)


def test_a_twin_of_the_target_bounds_the_odds() -> None:
    """A twin at a fixed margin c: total odds stay below e^c, are reached below, never above.

    Pairwise odds of (K − 1) α would be out of reach already at c − log(K − 1).
    """
    problem = random_problem(5, 12, 4, seed=7, condition=10)
    problem.target.zero_()
    problem.weight[1], problem.bias[1] = problem.weight[0], problem.bias[0] - 3.0
    problem.floor = torch.tensor([2.9, 2.999, 3.001, 5.0], dtype=torch.float64)
    solution = solve(problem)
    assert solution.status.tolist() == [
        Status.SOLVED,
        Status.SOLVED,
        Status.INFEASIBLE,
        Status.INFEASIBLE,
    ]
    assert (total_of(problem, solution.x_new)[:2] >= problem.floor[:2] - 1e-9).all()
    assert torch.equal(solution.x_new[2:], problem.x[2:])
    pairwise = MahalanobisQP(5).solve(
        problem.x, problem.target, problem.floor + math.log(4), geometry_of(problem)
    )
    assert (pairwise.status == Status.INFEASIBLE).all()


def test_rivals_on_both_sides_bound_the_odds() -> None:
    """On one axis, a target between two rivals: s = (x + c, −x + c), best at x = 0."""
    bias = torch.tensor([3.0, 0, 0], dtype=torch.float64)
    weight = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float64)
    best = 3 - math.log(2)
    floor = torch.tensor([best - 1e-3, best + 1e-3], dtype=torch.float64)
    problem = Problem(
        x=torch.full((2, 1), 2.5, dtype=torch.float64),
        target=torch.zeros(2, dtype=torch.long),
        floor=floor,
        weight=weight,
        bias=bias,
        covariance=torch.eye(1, dtype=torch.float64),
    )
    solution = solve(problem)
    assert solution.status.tolist() == [Status.SOLVED, Status.INFEASIBLE]
    # 3 − log(2 cosh x') = floor.
    expected = float(torch.acosh(torch.exp(3 - floor[0]) / 2))
    assert float(solution.x_new[0, 0]) == pytest.approx(expected, rel=1e-7)


def test_hard_batches_converge() -> None:
    """Near copies, wide scales, far targets: every example is solved or out of reach."""
    generator = torch.Generator().manual_seed(8)
    for seed in range(6):
        problem = random_problem(8, 12, 200, seed=seed, condition=1e6)
        problem.weight[2] = problem.weight[1] + 1e-6 * torch.randn(
            12, generator=generator, dtype=torch.float64
        )
        problem.weight = problem.weight * 10.0 ** (seed - 2)
        problem.floor = problem.floor * 3 + 10
        geometry = geometry_of(problem)
        constraints = geometry.constraints(problem.target)
        found = solve_total(
            constraints.gram,
            geometry.margins(problem.x, problem.target),
            problem.floor,
            constraints.noise,
        )
        assert found.converged.all() and found.feasible.all()
        solution = solve(problem)
        assert (solution.status <= Status.SOLVED).all()


@pytest.mark.parametrize("apart", [1e-4, 1e-6, 1e-8, 1e-10])
def test_a_rival_that_is_nearly_the_target_is_held_by_nearly_all_of_the_edit(apart: float) -> None:
    """The multipliers are optimal; and the odds hold as far as float64 holds an edit that long."""
    problem = random_problem(5, 24, 16, seed=3, condition=10)
    noise = torch.randn(24, generator=torch.Generator().manual_seed(1)).double()
    problem.weight[1] = problem.weight[0] + apart * noise
    problem.bias[1] = problem.bias[0]
    problem.target, problem.floor = torch.zeros_like(problem.target), problem.floor.abs() + 1
    geometry = geometry_of(problem)
    constraints = geometry.constraints(problem.target)
    given = constraints.gram, geometry.margins(problem.x, problem.target), problem.floor
    found = solve_total(*given, constraints.noise)
    assert found.converged.all() and found.feasible.all()
    assert (total_residual(*given, found.multipliers) <= 1e-5).all()
    solution = solve(problem)
    assert torch.isfinite(solution.x_new).all()
    assert apart < 1e-8 or (solution.status == Status.SOLVED).all()


def smooth_problem(n_classes: int) -> Problem:
    problem = random_problem(n_classes, 4, 4, seed=11, condition=5)
    problem.floor = problem.floor / 2 + 1
    problem.floor[0] = -20
    solution = solve(problem)
    far = (solution.log_odds_before - problem.floor).abs() > 0.05
    assert far.all() and set(solution.status.tolist()) == {Status.SATISFIED, Status.SOLVED}
    return problem


@pytest.mark.parametrize(
    ("n_classes", "output"),
    [(2, "x_new"), (3, "x_new"), (4, "x_new"), (4, "multipliers"), (3, "distance")],
)
def test_gradients_of_all_inputs(n_classes: int, output: str) -> None:
    problem = smooth_problem(n_classes)

    def edit(x: Tensor, weight: Tensor, bias: Tensor, root: Tensor, floor: Tensor) -> Tensor:
        geometry = ProbeGeometry.build(weight, bias, (root + root.T) / 2)
        result: Tensor = getattr(
            total_program(n_classes).solve(x, problem.target, floor, geometry),
            output,
        )
        return result

    inputs = (problem.x, problem.weight, problem.bias, problem.covariance, problem.floor)
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    assert gradcheck(edit, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_the_same_with_a_compiler_and_without(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    problem = random_problem(5, 12, 24, seed=3)
    problem.weight[4], problem.bias[4] = problem.weight[3], problem.bias[3] - 2
    x, found = problem.x.to(dtype).requires_grad_(), []
    floor = problem.floor.clone().requires_grad_()
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "library", lambda: None)
        solution = total_program(5).solve(x, problem.target, floor, geometry_of(problem))
        numbers = solution.x_new.double().sum() + solution.distance.sum()
        numbers = numbers + solution.log_odds_before.sum() + solution.floor.sum()
        first = torch.autograd.grad(numbers, (x, floor), create_graph=True)
        second = torch.autograd.grad(first[1].sum(), (x, floor))
        found.append((solution.status, *first, *second))
    assert set(found[0][0].tolist()) >= {Status.SOLVED, Status.INFEASIBLE}
    coarse = 1e-9 if dtype == torch.float64 else 1e-4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=coarse, atol=coarse)


def test_second_derivatives() -> None:
    problem = smooth_problem(3)
    geometry = geometry_of(problem)

    def edit(x: Tensor, floor: Tensor) -> Tensor:
        return (
            MahalanobisQP(len(problem.bias), solver=TotalOdds())
            .solve(x, problem.target, floor, geometry)
            .x_new
        )

    inputs = (problem.x.requires_grad_(), problem.floor.clone().requires_grad_())
    assert gradgradcheck(edit, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_unreachable_companions_leave_gradients_finite() -> None:
    problem = random_problem(4, 6, 40)
    problem.weight[3], problem.bias[3] = problem.weight[2], problem.bias[2]
    x = problem.x.clone().requires_grad_()
    geometry = geometry_of(problem)
    solution = total_program(len(problem.bias)).solve(x, problem.target, problem.floor, geometry)
    assert {Status.SOLVED, Status.INFEASIBLE} <= set(solution.status.tolist())
    (gradient,) = torch.autograd.grad(solution.x_new.sum() + solution.distance.sum(), x)
    assert torch.isfinite(gradient).all()
    lost = solution.status == Status.INFEASIBLE
    assert torch.equal(gradient[lost], torch.ones_like(x[lost]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odds_hold_for_the_stored_numbers(dtype: torch.dtype) -> None:
    problem = random_problem(6, 32, 200, seed=9, condition=100)
    problem.floor = problem.floor + 4
    problem.x = problem.x.to(dtype)
    solution = solve(problem)
    assert (solution.status <= Status.SOLVED).all()
    assert solution.x_new.dtype == dtype
    assert (total_of(problem, solution.x_new) >= problem.floor - 1e-12).all()


def test_floors_may_be_a_function_of_the_margins() -> None:
    problem = random_problem(4, 8, 20, seed=10)
    geometry = geometry_of(problem)

    def floor(margins: Tensor, rows: slice) -> Tensor:
        assert margins.shape == (20, 3) and rows == slice(0, 20)
        return problem.floor

    solution = total_program(len(problem.bias)).solve(problem.x, problem.target, floor, geometry)
    assert torch.equal(solution.x_new, solve(problem).x_new)


def test_bad_input_is_named() -> None:
    problem = random_problem(3, 6, 4)
    geometry, solver = geometry_of(problem), total_program(3)
    with pytest.raises(WidthError):
        solver.solve(problem.x[:, :5], problem.target, 1.0, geometry)
    with pytest.raises(TargetError):
        solver.solve(problem.x, problem.target + 3, 1.0, geometry)
    with pytest.raises(WidthError, match="one number an example"):
        solver.solve(problem.x, problem.target, torch.zeros(4, 2), geometry)
    with pytest.raises(NonFiniteError):
        solver.solve(problem.x, problem.target, float("inf"), geometry)
    with pytest.raises(NonFiniteError):
        solver.solve(problem.x / 0, problem.target, 1.0, geometry)


@torch.no_grad()
def test_inside_a_model_the_total_odds_are_reached() -> None:
    model = build("gpt2", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(VOCABULARY, (48, 7), generator=generator)}
    at, site = torch.full((48,), 4), "L1.mid"
    x = lrqp.capture(model, inputs, [site], at)[site]
    edit = random_edit(x, 4)
    geometry = edit.geometry(x.device)
    target = torch.ones(48, dtype=torch.long)
    problem = total_program(4)

    def write(x: Tensor, context: lrqp.EditContext) -> Tensor:
        return problem.solve(
            x, target[context.example], 6.0, geometry, realise=context.realise
        ).x_new

    with lrqp.intervene(model, [lrqp.Intervention(site, at, write)]):
        model(**inputs)
        held = lrqp.capture(model, inputs, [site], at)[site]
    odds = edit.probe.log_odds(held.double(), target, against="rest")
    assert (odds >= 6).all()
    assert float(odds.median()) < 6.5
    assert total_log_odds(geometry.margins(held, target)).tolist() == pytest.approx(odds.tolist())


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [1.0, 1e-3, 0.0])
@pytest.mark.parametrize("n_classes", [3, 9, 20])
def test_the_compiled_call_gives_the_edit_of_the_operations(
    n_classes: int, gap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(n_classes)
    probe = LinearProbe(16, n_classes, dtype=torch.float64).requires_grad_(False)
    probe.weight.normal_(generator=generator), probe.bias.normal_(generator=generator)
    apart = torch.randn(n_classes // 2, 16, generator=generator, dtype=torch.float64)
    probe.weight[1::2] = probe.weight[::2][: n_classes // 2] + gap * apart
    x = torch.randn(30, 16, generator=generator).to(dtype)
    target = torch.arange(30) % n_classes
    edit = LRQP(probe, Mahalanobis.euclidean(16), log_odds=2.0, odds="total", on_infeasible="skip")
    found = edit.solve(x, target)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        other = edit.solve(x, target)
    coarse = max(torch.finfo(dtype).eps, 1e-9)
    assert torch.equal(found.status, other.status)
    size = 1 + other.x_new.double().norm(dim=-1)
    off = (found.x_new.double() - other.x_new.double()).norm(dim=-1) / size
    assert bool((off <= 64 * coarse + 1e-8).all())
    for name in ("floor", "log_odds_before", "distance", "euclidean"):
        near = {"rtol": 256 * coarse, "atol": 64 * coarse}
        torch.testing.assert_close(getattr(found, name), getattr(other, name), **near)
    assert (found.log_odds_after >= found.floor)[found.status == Status.SOLVED].all()
    alone = [edit.solve(x[[row]], target[[row]]).x_new for row in (0, 29)]
    assert torch.equal(torch.cat(alone), found.x_new[[0, 29]])


@torch.no_grad()
@pytest.mark.parametrize("compiled", [True, False])
def test_rivals_one_part_in_a_billion_off_are_solved(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    generator = torch.Generator().manual_seed(0)
    probe = LinearProbe(16, 10, dtype=torch.float64).requires_grad_(False)
    probe.weight.normal_(generator=generator)
    apart = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    probe.weight[1::2] = probe.weight[::2] + 1e-9 * apart
    edit = LRQP(probe, Mahalanobis.euclidean(16), log_odds=2.0, odds="total", on_infeasible="skip")
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    solution = edit.solve(x, torch.arange(64) % 10)
    assert (solution.status <= Status.SOLVED).all()


def test_many_classes_are_taken_few_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example holds its normals several times; parts give what the whole batch gives."""
    torch.manual_seed(0)
    probe = lrqp.LinearProbe(24, 70, dtype=torch.float64).requires_grad_(False)
    edit = lrqp.LRQP(probe, lrqp.Mahalanobis.euclidean(24), log_odds=1.0, odds="total")
    x, target, seen = torch.randn(9, 24), torch.arange(9), []
    whole = edit.solve(x, target)
    solve = TotalOdds.solve

    def counted(solver: TotalOdds, constraints: Any, margins: Tensor, *others: Any) -> Any:
        seen.append(len(margins))
        return solve(solver, constraints, margins, *others)

    monkeypatch.setattr(TotalOdds, "solve", counted)
    monkeypatch.setattr(problem, "CHUNK_NUMBERS", 4 * 69 * 24)
    parts = edit.solve(x, target)
    assert max(seen) == 4
    torch.testing.assert_close(parts.x_new, whole.x_new)
    assert torch.equal(parts.status, whole.status)


def test_a_learned_probe_of_many_classes_holds_no_matrices_until_the_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each example's M and what is made of it are formed anew; derivatives are what they were."""
    monkeypatch.setattr(native, "library", lambda: None)
    task = random_problem(12, 16, 24, seed=3)
    found, held = [], []
    for kept in (10**9, 1000):
        monkeypatch.setattr(total_odds, "KEPT_NUMBERS", kept)
        inputs = [part.clone().requires_grad_() for part in (task.x, task.weight, task.floor)]
        x, weight, floor = inputs
        saved: list[int] = []

        def save(part: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(part.numel())
            return part

        geometry = ProbeGeometry.build(weight, task.bias, task.covariance)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda part: part):
            solution = total_program(12).solve(x, task.target, floor, geometry)
        assert (solution.status == Status.SOLVED).any()
        value = solution.x_new.square().sum() + solution.squared_distance.sum()
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), inputs)
        found.append((*first, *second))
        held.append(sum(saved))
    assert held[1] < held[0] / 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("seed", [8, 36])
def test_no_rounding_hides_that_an_edit_is_too_long(
    seed: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By duality, with the multipliers as they are: edits a thousand times as long as the least,
    aimed so far that bfloat16's rounding took off what they were too long by, were SOLVED.
    """
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    task = random_problem(4, 4, 200, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, 4).double()[torch.randperm(4, generator=generator)]
    task.weight = task.weight * sizes.unsqueeze(-1)
    basis = torch.linalg.qr(torch.randn(4, 3, generator=generator, dtype=torch.float64)).Q
    task.covariance, task.x = basis @ basis.T, task.x.bfloat16()
    task.floor = task.floor + 14
    geometry, solution = geometry_of(task), solve(task)
    margins, found = geometry.margins(task.x, task.target), solution.multipliers
    weight, squared = found.sum(-1), solution.squared_distance
    share = found / weight.unsqueeze(-1)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    longer = 1 - weight * (task.floor - (share * margins).sum(-1) + entropy) / squared
    reach = (found * geometry.constraints(task.target).length).sum(-1) / squared
    size = task.x.double().norm(dim=-1) + (1 - longer).clamp_min(0.0) * solution.euclidean
    rounds = 16 * torch.finfo(torch.bfloat16).eps / 2 * reach * size
    done = solution.status == Status.SOLVED
    assert done.any() and (longer <= 2e-3 + 2 * rounds)[done].all()
