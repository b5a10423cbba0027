"""Duplicate, nearly equal, degenerate, singular and infeasible problems."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from qp_reference import (
    Problem,
    exact_distance,
    objective,
    random_problem,
    reachable,
    reference_edit,
)
from torch import Tensor

from lrqp_torch import MahalanobisQP, Solution, Status
from lrqp_torch.qp import ProbeGeometry, native
from lrqp_torch.qp.constraints import Constraints
from lrqp_torch.qp.solvers import ActiveSet, Found

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal including the sign of zero."""
    assert a.dtype == b.dtype
    assert torch.equal(a, b)
    assert torch.equal(torch.signbit(a), torch.signbit(b))


def assert_margins_reached(problem: Problem, solution: Solution) -> None:
    """Read back from the stored activations: every margin is at the floor or above, exactly."""
    margins = ProbeGeometry.build(problem.weight, problem.bias, problem.covariance).margins(
        solution.x_new, problem.target
    )
    edited = solution.status <= Status.SOLVED
    assert (margins[edited] >= problem.floor[edited].unsqueeze(-1)).all()


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_satisfied_examples_come_back_bit_for_bit(n_classes: int) -> None:
    problem = random_problem(n_classes, 8, 60)
    problem.x[:, 0] = -0.0
    problem.floor = problem.floor - 8
    solution = problem.solve()
    satisfied = solution.status == Status.SATISFIED
    assert 5 < satisfied.sum() < 55
    assert_same_bits(solution.x_new[satisfied], problem.x[satisfied])
    for name in ("multipliers", "distance", "euclidean"):
        assert (getattr(solution, name)[satisfied] == 0).all()
    assert not solution.active[satisfied].any()
    assert torch.equal(solution.log_odds_after[satisfied], solution.log_odds_before[satisfied])


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_editing_an_edited_activation_does_nothing(dtype: torch.dtype, n_classes: int) -> None:
    problem = random_problem(n_classes, 32, 100)
    problem.x = problem.x.to(dtype)
    first = problem.solve()
    assert (first.status <= Status.SOLVED).all()
    problem.x = first.x_new
    second = problem.solve()
    assert (second.status == Status.SATISFIED).all()
    assert_same_bits(second.x_new, first.x_new)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_weakly_active_constraints_need_no_edit(n_classes: int) -> None:
    """Margins that equal the floor exactly: satisfied, with no multiplier."""
    weight = torch.eye(n_classes, dtype=torch.float64)
    x = torch.zeros(3, n_classes, dtype=torch.float64)
    x[:, 0] = 2.0
    problem = Problem(
        x=x,
        target=torch.zeros(3, dtype=torch.long),
        floor=torch.full((3,), 2.0, dtype=torch.float64),
        weight=weight,
        bias=torch.zeros(n_classes, dtype=torch.float64),
        covariance=torch.eye(n_classes, dtype=torch.float64),
    )
    solution = problem.solve()
    assert (solution.status == Status.SATISFIED).all()
    assert_same_bits(solution.x_new, x)


def test_a_constraint_that_becomes_weakly_active_at_the_optimum() -> None:
    """Constraints δ₀ ≥ 1 and δ₀ + δ₁ ≥ 1: at the optimum (1, 0) both hold with equality."""
    problem = Problem(
        x=torch.zeros(1, 2, dtype=torch.float64),
        target=torch.zeros(1, dtype=torch.long),
        floor=torch.ones(1, dtype=torch.float64),
        weight=torch.tensor([[0.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]], dtype=torch.float64),
        bias=torch.zeros(3, dtype=torch.float64),
        covariance=torch.eye(2, dtype=torch.float64),
    )
    solution = problem.solve()
    assert solution.status.tolist() == [Status.SOLVED]
    assert torch.allclose(solution.x_new, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(
        solution.multipliers, torch.tensor([[1.0, 0.0]], dtype=torch.float64), atol=1e-12
    )


@pytest.mark.parametrize("solver", ["ACTIVE_SET", "DIFFCP"])
def test_duplicates_are_reachable_only_if_biases_suffice(solver: str) -> None:
    problem = random_problem(4, 8, 120)
    problem.weight[3] = problem.weight[2]
    problem.bias[3] = problem.bias[2] + 3
    problem.floor = torch.full((120,), 2.0, dtype=torch.float64)
    solution = problem.solve(solver)
    # Class 3 beats its duplicate 2 by the biases alone; class 2 never beats 3.
    assert (solution.status[problem.target == 2] == Status.INFEASIBLE).all()
    # DIFFCP's cone form loses digits where M is singular, and then the status says so.
    allowed = Status.SOLVED if solver == "ACTIVE_SET" else Status.INACCURATE
    others = solution.status[problem.target != 2]
    assert ((others <= allowed) & (others != Status.INFEASIBLE)).all()
    assert (others <= Status.SOLVED).double().mean() > 0.9
    unreached = problem.target == 2
    assert_same_bits(solution.x_new[unreached], problem.x[unreached])
    assert (solution.distance[unreached] == 0).all()
    assert_margins_reached(problem, solution)
    tolerance = 1e-9 if solver == "ACTIVE_SET" else 1e-3
    for i in (~unreached).nonzero().flatten().tolist():
        best = objective(problem, i, reference_edit(problem, i))
        ours = objective(problem, i, solution.x_new[i])
        assert ours == pytest.approx(best, rel=tolerance, abs=tolerance**2)


def test_duplicate_rivals_count_as_one() -> None:
    """Two equal rivals of the target give one constraint twice."""
    problem = random_problem(4, 8, 100)
    problem.weight[3], problem.bias[3] = problem.weight[2], problem.bias[2]
    problem.target = problem.target % 2
    single = replace(problem)
    single.weight, single.bias = problem.weight[:3], problem.bias[:3]
    four, three = problem.solve(), single.solve()
    assert torch.equal(four.status, three.status)
    assert torch.allclose(four.x_new, three.x_new, rtol=1e-10, atol=1e-10)
    assert torch.allclose(four.distance, three.distance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("n_classes", [3, 5])
def test_nearly_equal_rivals(n_classes: int, relative: float) -> None:
    problem = random_problem(n_classes, 16, 100, condition=10)
    noise = torch.randn(16, dtype=torch.float64) * problem.weight[-1].norm() / 4
    problem.weight[-2] = problem.weight[-1] + relative * noise
    problem.bias[-2] = problem.bias[-1] * (1 + relative)
    problem.target = problem.target % (n_classes - 2)
    solution = problem.solve()
    assert (solution.status <= Status.SOLVED).all()
    assert_margins_reached(problem, solution)
    for i in range(100):
        best = objective(problem, i, reference_edit(problem, i))
        ours = objective(problem, i, solution.x_new[i])
        assert ours == pytest.approx(best, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("tilt", [1e-1, 1e-3, 1e-5])
def test_nearly_parallel_constraints_that_both_bind(tilt: float) -> None:
    """Rows (1, 0) and (1, ε) with gaps 1 and 1 + ε²/2: λ = (½, ½) and δ = (1, ε/2)."""
    problem = Problem(
        x=torch.zeros(1, 2, dtype=torch.float64),
        target=torch.zeros(1, dtype=torch.long),
        floor=torch.ones(1, dtype=torch.float64),
        weight=torch.tensor([[0, 0], [-1, 0], [-1, -tilt]], dtype=torch.float64),
        bias=torch.tensor([0, 0, tilt**2 / 2], dtype=torch.float64),
        covariance=torch.eye(2, dtype=torch.float64),
    )
    solution = problem.solve()
    assert solution.status.tolist() == [Status.SOLVED]
    assert solution.active.all()
    # cond(M) ≈ 4 / ε², and λ loses as many digits.
    lost = 1e-14 / tilt**2
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert torch.allclose(solution.multipliers, half, atol=lost + 1e-12)
    expected = torch.tensor([[1, tilt / 2]], dtype=torch.float64)
    assert torch.allclose(solution.x_new, expected, rtol=0, atol=lost * tilt + 1e-12)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(10))
def test_a_length_that_is_only_rounding_counts_as_none(n_classes: int, seed: int) -> None:
    """Σ annihilates w₀ − w₁ up to rounding: neither class can be told from the other."""
    problem = random_problem(n_classes, 16, 40, seed=seed)
    difference = torch.nn.functional.normalize(problem.weight[0] - problem.weight[1], dim=0)
    projection = torch.eye(16, dtype=torch.float64) - torch.outer(difference, difference)
    covariance = projection @ problem.covariance @ projection
    problem.covariance = (covariance + covariance.T) / 2
    logits = problem.x @ problem.weight.T + problem.bias
    between = logits[:, 0] - logits[:, 1]
    between = torch.where(problem.target == 0, between, -between)
    solution = problem.solve()
    lost = (problem.target < 2) & (between < problem.floor)
    assert 0 < lost.sum() < 40
    assert torch.equal(solution.status == Status.INFEASIBLE, lost)
    assert (solution.status != Status.INACCURATE).all()


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_target_nearly_equal_to_a_rival(n_classes: int, relative: float) -> None:
    """The edit is huge (∝ 1 / relative), and still reaches the floor at the least distance."""
    problem = random_problem(n_classes, 16, 60, condition=10)
    noise = torch.randn(16, dtype=torch.float64) * problem.weight[0].norm() / 4
    problem.weight[1] = problem.weight[0] + relative * noise
    problem.bias[1] = problem.bias[0]
    problem.target = problem.target % 2
    problem.floor = problem.floor.abs() + 0.1
    solution = problem.solve()
    assert (solution.status == Status.SOLVED).all()
    assert_margins_reached(problem, solution)
    assert solution.distance.median() > 0.1 / relative
    for i in range(60):
        best = objective(problem, i, reference_edit(problem, i))
        assert objective(problem, i, solution.x_new[i]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("apart", [1e-7, 1e-9, 1e-11])
@pytest.mark.parametrize("compiled", [True, False])
def test_lengths_of_near_equal_classes_are_exact(
    apart: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pairs: the target's own rival, and two rivals of another; fractions are the judge.

    Products of differences keep their digits; logits that are subtracted round by their size.
    """
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    for n_classes in (4, 9):
        problem = random_problem(n_classes, 5, 8, condition=10)
        near = torch.randn(2, 5, generator=torch.Generator().manual_seed(3)).double()
        problem.weight[1:4:2] = problem.weight[0:3:2] + apart * near
        problem.bias[1:4:2] = problem.bias[0:3:2]
        # Those that are far away change nothing, and leave few active sets to try.
        problem.bias[4:] = -1e30
        problem.target, problem.floor = problem.target % 4, problem.floor.abs() + 1
        own = replace(problem, weight=problem.weight[:4], bias=problem.bias[:4])
        solution = problem.solve()
        assert (solution.status == Status.SOLVED).all()
        for i, ours in enumerate(solution.distance.tolist()):
            assert ours == pytest.approx(exact_distance(own, i), rel=1e-15 / apart + 1e-9)


@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_solved_is_the_least_where_readings_only_round(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of an edit along classes 1e-14 apart round by nats; aims rise, and edits with them."""
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    problem = random_problem(5, 5, 64, condition=10)
    near = torch.randn(2, 5, generator=torch.Generator().manual_seed(3)).double()
    problem.weight[1::2] = problem.weight[:4:2] + 1e-14 * near
    problem.bias[1::2] = problem.bias[:4:2]
    problem.floor = problem.floor.abs() + 0.1
    solution = problem.solve()
    solved = solution.status == Status.SOLVED
    assert 10 < solved.sum() < 60
    for i in solved.nonzero().squeeze(-1).tolist():
        best = exact_distance(problem, i)
        assert best is not None and float(solution.distance[i]) <= 1.01 * best


class TooFar(ActiveSet):
    """Multipliers of another support, with floors reached and a residual that says it is right."""

    def solve(self, constraints: Constraints, *given: Tensor) -> Found:
        found = super().solve(constraints, *given)
        other = 2 * found.multipliers + found.multipliers.roll(1, -1)
        squared = (other * constraints.apply(other)).sum(-1)
        return replace(found, multipliers=other, squared=squared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_that_reaches_its_floors_but_is_not_the_least_is_not_solved(
    dtype: torch.dtype,
) -> None:
    problem = random_problem(6, 16, 100, condition=10)
    problem.x, problem.floor = problem.x.to(dtype), problem.floor.abs() + 20
    assert (problem.solve().status == Status.SOLVED).all()
    solution = problem.solve(TooFar())
    reached = solution.log_odds_after >= solution.floor
    assert reached.sum() > 50 and (solution.status == Status.INACCURATE)[reached].all()


@pytest.mark.parametrize("n_classes", [2, 3, 5, 10])
def test_singular_covariance_edits_inside_its_range(n_classes: int) -> None:
    problem = random_problem(n_classes, 24, 60)
    basis = torch.linalg.qr(torch.randn(24, 12, dtype=torch.float64)).Q
    problem.covariance = (
        basis @ torch.diag(torch.logspace(0, -2, 12, dtype=torch.float64)) @ basis.T
    )
    solution = problem.solve()
    assert (solution.status <= Status.SOLVED).all()
    assert_margins_reached(problem, solution)
    delta = solution.x_new - problem.x
    outside = delta - (delta @ basis) @ basis.T
    assert outside.abs().max() <= 1e-10 * delta.abs().max()
    # In coordinates of the range the problem is regular; solve it there independently.
    inside = Problem(
        x=problem.x @ basis,
        target=problem.target,
        floor=problem.floor,
        weight=problem.weight @ basis,
        bias=problem.bias,
        covariance=basis.T @ problem.covariance @ basis,
    )
    constant = problem.x @ problem.weight.T - inside.x @ inside.weight.T
    for i in range(60):
        inside.bias = problem.bias + constant[i]
        best = objective(inside, i, reference_edit(inside, i))
        assert float(solution.distance[i]) == pytest.approx(best**0.5, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(("n_classes", "rank"), [(2, 0), (3, 1), (5, 2), (10, 2), (20, 3), (50, 4)])
def test_infeasible_is_said_exactly_when_no_displacement_exists(n_classes: int, rank: int) -> None:
    """Low-rank covariances leave some targets out of reach; HiGHS decides which."""
    problem = random_problem(n_classes, 16, 100, seed=rank)
    basis = torch.linalg.qr(torch.randn(16, max(rank, 1), dtype=torch.float64)).Q
    if rank == 0:
        # The only direction in Σ's range is one along which the classes do not differ.
        difference = torch.nn.functional.normalize(problem.weight[0] - problem.weight[1], dim=0)
        basis = basis - difference[:, None] * (difference @ basis)
        basis = basis / basis.norm()
    problem.covariance = basis @ basis.T
    solution = problem.solve()
    seen = set()
    for i in range(100):
        rows, right = problem.constraints(i)
        expected = reachable(rows, right - rows @ problem.x[i], basis)
        assert (solution.status[i] != Status.INFEASIBLE) == expected, i
        seen.add(expected)
    assert seen == {True, False}
    assert (solution.status != Status.INACCURATE).all()
    assert_margins_reached(problem, solution)
    unreached = solution.status == Status.INFEASIBLE
    assert_same_bits(solution.x_new[unreached], problem.x[unreached])


def test_more_classes_than_dimensions_can_be_infeasible() -> None:
    """With full-rank Σ but W of low rank, some classes win nowhere."""
    problem = random_problem(8, 2, 200, seed=1, condition=1)
    solution = problem.solve()
    identity = torch.eye(2, dtype=torch.float64)
    expected = []
    for i in range(200):
        rows, right = problem.constraints(i)
        expected.append(reachable(rows, right - rows @ problem.x[i], identity))
    assert (solution.status != Status.INFEASIBLE).tolist() == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize(
    ("dtype", "solver"),
    [
        (torch.float64, "ACTIVE_SET"),
        (torch.float32, "ACTIVE_SET"),
        (torch.bfloat16, "ACTIVE_SET"),
        (torch.float16, "ACTIVE_SET"),
        (torch.float64, "DIFFCP"),
    ],
)
def test_infeasible_members_leave_the_rest_of_a_batch_alone(
    dtype: torch.dtype, solver: str
) -> None:
    problem = random_problem(4, 16, 40)
    problem.weight[3], problem.bias[3] = problem.weight[2], problem.bias[2]
    problem.floor = problem.floor.abs() + 0.1
    problem.x = problem.x.to(dtype)
    solution = problem.solve(solver)
    lost = problem.target >= 2
    assert torch.equal(solution.status == Status.INFEASIBLE, lost)
    assert_same_bits(solution.x_new[lost], problem.x[lost])
    assert_margins_reached(problem, solution)
    alone = replace(problem)
    alone.x, alone.target, alone.floor = (
        problem.x[~lost],
        problem.target[~lost],
        problem.floor[~lost],
    )
    separately = alone.solve(solver)
    assert torch.equal(solution.status[~lost], separately.status)
    if solver == "ACTIVE_SET":
        assert (separately.status <= Status.SOLVED).all()
        assert torch.allclose(solution.x_new[~lost], separately.x_new)
    else:
        assert torch.allclose(solution.x_new[~lost], separately.x_new, atol=1e-2)


def test_infeasible_stays_infeasible_when_another_example_cannot_be_read_back() -> None:
    """Rounds of read-back that never end must not relabel the members that were left out."""
    problem = random_problem(3, 8, 4)
    problem.weight[2], problem.bias[2] = problem.weight[1], problem.bias[1]
    problem.target = torch.tensor([0, 1, 2, 0])
    problem.floor = torch.full((4,), 20.0, dtype=torch.float64)
    geometry = ProbeGeometry.build(problem.weight, problem.bias, problem.covariance)
    solution = MahalanobisQP(3).solve(
        problem.x,
        problem.target,
        problem.floor,
        geometry,
        realise=lambda edited: torch.zeros_like(edited),
    )
    assert solution.status.tolist() == [
        Status.INACCURATE,
        Status.INFEASIBLE,
        Status.INFEASIBLE,
        Status.INACCURATE,
    ]
    assert_same_bits(solution.x_new[1:3], problem.x[1:3])


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_an_empty_batch_gives_an_empty_solution(n_classes: int) -> None:
    problem = random_problem(n_classes, 6, 0)
    solution = problem.solve()
    assert solution.x_new.shape == (0, 6)
    assert solution.multipliers.shape == solution.active.shape == (0, n_classes - 1)
    for name in ("distance", "euclidean", "floor", "log_odds_before", "log_odds_after", "status"):
        assert getattr(solution, name).shape == (0,)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_order_and_company_in_the_batch_do_not_matter(n_classes: int) -> None:
    problem = random_problem(n_classes, 16, 64)
    whole = problem.solve()
    order = torch.randperm(64)
    shuffled = replace(problem)
    shuffled.x, shuffled.target, shuffled.floor = (
        problem.x[order],
        problem.target[order],
        problem.floor[order],
    )
    permuted = shuffled.solve()
    assert torch.equal(permuted.status, whole.status[order])
    assert torch.equal(permuted.active, whole.active[order])
    assert torch.allclose(permuted.x_new, whole.x_new[order], rtol=1e-13, atol=1e-13)
    for i in range(0, 64, 7):
        one = replace(problem)
        one.x, one.target, one.floor = (
            problem.x[i : i + 1],
            problem.target[i : i + 1],
            problem.floor[i : i + 1],
        )
        assert torch.allclose(one.solve().x_new[0], whole.x_new[i], rtol=1e-13, atol=1e-13)


def test_one_target_and_floor_for_all_or_one_each() -> None:
    problem = random_problem(4, 8, 30)
    qp = MahalanobisQP(4)
    arguments = (problem.weight, problem.bias, problem.covariance)
    together = qp(problem.x, problem.target, 3.0, *arguments)
    each = qp(problem.x, problem.target, torch.full((30,), 3.0), *arguments)
    narrow = qp(problem.x, problem.target.to(torch.uint8), 3, *arguments)
    assert torch.equal(together.x_new, each.x_new)
    assert torch.equal(together.x_new, narrow.x_new)


def test_a_batch_beyond_one_chunk_is_solved_as_its_parts() -> None:
    """49 constraints: 832 problems a chunk."""
    problem = random_problem(50, 64, 1000)
    halves = []
    for part in (slice(0, 500), slice(500, 1000)):
        half = replace(
            problem, x=problem.x[part], target=problem.target[part], floor=problem.floor[part]
        )
        halves.append(half.solve())
    whole = problem.solve()
    assert torch.equal(whole.status, torch.cat([half.status for half in halves]))
    together = torch.cat([half.x_new for half in halves])
    assert torch.allclose(whole.x_new, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    n_classes=st.integers(2, 6),
    width=st.integers(1, 4),
    rank=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_integer_probe_gets_the_right_verdict(
    dtype: torch.dtype, n_classes: int, width: int, rank: int, seed: int
) -> None:
    """Equal, opposite and collinear classes and metrics without length: HiGHS is the judge."""
    generator = torch.Generator().manual_seed(seed)

    def integers(size: int, *shape: int) -> Tensor:
        return torch.randint(-size, size + 1, shape, generator=generator).double()

    root = integers(1, width, rank)
    problem = Problem(
        x=integers(3, 5, width).to(dtype),
        target=torch.randint(n_classes, (5,), generator=generator),
        # Off the integers, so that no problem is feasible in one point only.
        floor=integers(3, 5) + 0.3,
        weight=integers(2, n_classes, width),
        bias=integers(2, n_classes),
        covariance=root @ root.T,
    )
    solution = problem.solve()
    for i in range(5):
        rows, right = problem.constraints(i)
        expected = reachable(rows, right - rows @ problem.x[i].double(), root)
        assert (solution.status[i] != Status.INFEASIBLE) == expected
    assert (solution.status != Status.INACCURATE).all()
    assert_margins_reached(problem, solution)
