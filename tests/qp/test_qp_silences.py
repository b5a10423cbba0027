"""What an edit must not depend on: the scale of Σ, its company, how a class is stored, how many."""

import resource
import time
from dataclasses import replace

import pytest
import torch
from qp_reference import Problem, objective, random_problem, reference_edit
from torch import Tensor

from lrqp_torch import (
    LRQP,
    JointLRQP,
    LinearProbe,
    Mahalanobis,
    MahalanobisQP,
    Solution,
    Status,
)
from lrqp_torch.errors import SolverError
from lrqp_torch.qp import ProbeGeometry, Solver, TotalOdds, native
from lrqp_torch.qp.active_set import solve_dual
from lrqp_torch.qp.constraints import DenseConstraints
from lrqp_torch.qp.total_odds import total_residual

CLASSES = pytest.mark.parametrize("n_classes", [2, 3, 8, 10, 20])


def geometry_of(problem: Problem) -> ProbeGeometry:
    return ProbeGeometry.build(problem.weight, problem.bias, problem.covariance)


def solve(problem: Problem, solver: str | Solver = "ACTIVE_SET") -> Solution:
    qp = MahalanobisQP(len(problem.bias), solver=solver)
    return qp.solve(problem.x, problem.target, problem.floor, geometry_of(problem))


@CLASSES
@pytest.mark.parametrize("exponent", [-200, -60, -30, 24, 30, 60, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scale_of_the_covariance_does_not_matter(
    n_classes: int, exponent: int, dtype: torch.dtype
) -> None:
    problem = random_problem(n_classes, 12, 100, seed=n_classes, condition=100)
    problem.x = problem.x.to(dtype)
    scaled = replace(problem, covariance=problem.covariance * 10.0**exponent)
    here, there = solve(problem), solve(scaled)
    assert torch.equal(here.status, there.status) and (here.status <= Status.SOLVED).all()
    assert torch.equal(here.active, there.active)
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(there.x_new, here.x_new, **close)
    torch.testing.assert_close(there.euclidean, here.euclidean, rtol=1e-6, atol=1e-12)
    in_units = there.distance * 10.0 ** (exponent / 2)
    torch.testing.assert_close(in_units, here.distance, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("exponent", [-24, 24])
def test_other_solvers_do_not_see_the_scale_either(exponent: int) -> None:
    problem = random_problem(4, 8, 12, seed=1, condition=5)
    scaled = replace(problem, covariance=problem.covariance * 10.0**exponent)
    here, there = solve(problem, "DIFFCP"), solve(scaled, "DIFFCP")
    assert torch.equal(here.status, there.status)
    torch.testing.assert_close(there.x_new, here.x_new, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("n_classes", [3, 8, 12])
def test_a_constraint_that_holds_by_far_hides_nothing(n_classes: int, far: float) -> None:
    """One class is out of the question; the others are solved for, or not, as without it."""
    problem = random_problem(n_classes, 4, 200, seed=3, condition=10)
    problem.target = problem.target % (n_classes - 1)
    problem.weight[-1] = problem.weight[-2]
    problem.bias[-1] = -far
    without = replace(problem, weight=problem.weight[:-1], bias=problem.bias[:-1])
    here, there = solve(problem), solve(without)
    assert torch.equal(here.status, there.status)
    torch.testing.assert_close(here.x_new, there.x_new, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("n_classes", [2, 4, 10, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_edit_is_the_same_alone_and_in_company(
    n_classes: int, apart: float, dtype: torch.dtype
) -> None:
    """Two classes nearly equal, so that the edit is long and its terms longer."""
    problem = random_problem(n_classes, 64, 2048, seed=n_classes, condition=10)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1)).double()
    problem.weight[1] = problem.weight[0] + apart * noise
    problem.bias[1] = problem.bias[0]
    problem.target = problem.target % 2
    problem.floor = problem.floor.abs() + 1
    problem.x = problem.x.to(dtype)
    among = solve(problem)
    few = torch.arange(0, 2048, 256)
    alone = [
        solve(replace(problem, x=problem.x[i], target=problem.target[i], floor=problem.floor[i]))
        for i in few.unsqueeze(-1)
    ]

    def parts(name: str) -> Tensor:
        return torch.cat([getattr(solution, name) for solution in alone])

    assert torch.equal(parts("status"), among.status[few])
    assert (among.status <= Status.SOLVED).all() and (among.kkt_residual <= 1e-8).all()
    assert (among.status == Status.SOLVED).double().mean() > 0.9
    close = {"rtol": 1e-6, "atol": 0.0}
    if dtype != torch.bfloat16:
        torch.testing.assert_close(parts("distance"), among.distance[few], **close)
        torch.testing.assert_close(parts("euclidean"), among.euclidean[few], **close)
    size = among.x_new[few].double().norm(dim=-1, keepdim=True)
    off = (parts("x_new").double() - among.x_new[few].double()).abs() / size
    assert float(off.max()) <= 8 * torch.finfo(dtype).eps + 1e-9
    if dtype == torch.float32 and apart >= 1e-1:
        exact = solve(replace(problem, x=problem.x.double()))
        torch.testing.assert_close(among.distance, exact.distance, rtol=1e-5, atol=1e-5)


KINDS = ["plain", "copies", "nearly equal", "low rank", "far apart"]


def problem_of_kind(kind: str, n_classes: int, seed: int) -> Problem:
    problem = random_problem(n_classes, 16, 120, seed=seed, condition=100)
    generator = torch.Generator().manual_seed(seed)
    if kind == "copies":
        problem.weight[1::2] = problem.weight[: len(problem.weight[1::2])]
    if kind == "nearly equal":
        noise = torch.randn(problem.weight[1::2].shape, generator=generator).double()
        problem.weight[1::2] = problem.weight[0::2][: len(noise)] + 1e-6 * noise
    if kind == "low rank":
        basis = torch.linalg.qr(torch.randn(16, 3, generator=generator).double()).Q
        problem.covariance = basis @ basis.T
    if kind == "far apart":
        sizes = torch.logspace(-2, 2, n_classes, dtype=torch.float64)
        problem.weight = (
            problem.weight * sizes[torch.randperm(n_classes, generator=generator), None]
        )
    return problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [3, 5, 9, 12, 30])
def test_every_path_to_the_active_set_gives_the_same(kind: str, n_classes: int) -> None:
    """Distances of classes, M of each example as it is, and the table of all active sets."""
    problem = problem_of_kind(kind, n_classes, seed=n_classes)
    geometry = geometry_of(problem)
    gap = problem.floor.unsqueeze(-1) - geometry.margins(problem.x, problem.target)
    constraints = geometry.constraints(problem.target)
    rows = [problem.constraints(i)[0] for i in range(len(problem.x))]
    gram = torch.stack([own @ problem.covariance @ own.T for own in rows])
    dense = DenseConstraints(gram, constraints.noise, constraints.length)
    found, expected = (solve_dual(each, gap) for each in (constraints, dense))
    assert torch.equal(found.feasible, expected.feasible)
    ours, theirs = (s.multipliers(c, gap) for s, c in ((found, constraints), (expected, dense)))
    # Of constraints that are nearly one the multipliers may be split in any way: what they do to
    # the margins, in units of the longest, is the same.
    grown = [(gram @ each.unsqueeze(-1)).squeeze(-1) for each in (ours, theirs)]
    size = 1 + grown[1].abs().amax(-1, keepdim=True)
    error = (grown[0] - grown[1]).abs() / size
    assert float(error.max()) <= (1e-9 if kind != "nearly equal" else 1e-4)


def test_many_classes_are_solved_in_memory_for_their_distances() -> None:
    """Neither K matrices of K², nor K² directions: what is kept is K × K and K × d."""
    n_classes, width = 400, 32
    problem = random_problem(n_classes, width, 2, seed=0, condition=10)
    problem.weight = 6 * torch.nn.functional.normalize(problem.weight, dim=-1)
    problem.bias.zero_()
    problem.target = torch.tensor([7, 31])
    problem.floor = torch.ones(2, dtype=torch.float64)
    geometry = geometry_of(problem)
    tensors = [part for part in vars(geometry).values() if isinstance(part, Tensor)]
    assert sum(part.numel() for part in tensors) <= 6 * n_classes**2
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    solution = MahalanobisQP(n_classes).solve(problem.x, problem.target, problem.floor, geometry)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert time.process_time() - start < 2 and grown < 100_000
    assert (solution.status == Status.SOLVED).all()
    assert solution.active.sum(-1).min() >= 2 and solution.active.sum(-1).max() < 30
    for i in range(2):
        best = objective(problem, i, reference_edit(problem, i))
        assert float(solution.distance[i]) == pytest.approx(best**0.5, rel=1e-9)


def test_more_classes_than_memory_would_hold_are_named() -> None:
    metric = Mahalanobis.euclidean(4)
    with pytest.raises(SolverError, match="50000 classes has more than the 10,000"):
        LRQP(LinearProbe(4, 50_000), metric)
    with pytest.raises(SolverError, match="of 600, 300 classes have 449,100 ordered pairs"):
        JointLRQP({"a": LinearProbe(4, 600), "b": LinearProbe(4, 300)}, metric)


def test_distances_of_many_classes_keep_the_digits_of_near_ones() -> None:
    """Above the number of classes at which a Gram matrix is quicker than differences."""
    problem = random_problem(150, 24, 40, seed=2, condition=10)
    noise = torch.randn(24, generator=torch.Generator().manual_seed(3)).double()
    problem.weight[1] = problem.weight[0] + 1e-7 * noise
    geometry = geometry_of(problem)
    difference = problem.weight[0] - problem.weight[1]
    exact = float(difference @ problem.covariance @ difference)
    assert float(geometry.distances.squared[0, 1]) == pytest.approx(exact, rel=1e-6)
    assert float(geometry.distances.length[0, 1]) == pytest.approx(
        float(difference.norm()), rel=1e-9
    )
    pairs = problem.weight[:5, None] - problem.weight
    squared = ((pairs @ problem.covariance) * pairs).sum(-1)
    torch.testing.assert_close(geometry.distances.squared[:5], squared, rtol=1e-6, atol=1e-15)


def test_total_odds_end_with_a_status_for_every_row() -> None:
    """Copies of classes, a metric of low rank, weights of many sizes, at every scale of Σ."""
    start, seen = time.process_time(), set()
    for seed in range(12):
        kind = ("nearly equal", "low rank", "far apart")[seed % 3]
        problem = problem_of_kind(kind, 3 + seed, seed=seed)
        if seed % 2:
            problem.covariance = problem.covariance * 10.0 ** (5 * seed)
            basis = torch.linalg.qr(torch.randn(16, 3).double()).Q
            problem.covariance = basis @ basis.T @ problem.covariance @ basis @ basis.T
        problem.x = problem.x.float()
        solution = solve(problem, TotalOdds())
        seen |= set(solution.status.tolist())
        done = solution.status == Status.SOLVED
        assert (solution.log_odds_after >= solution.floor)[done].all()
        assert torch.isfinite(solution.x_new[solution.status <= Status.INFEASIBLE]).all()
    assert seen >= {Status.SATISFIED, Status.SOLVED, Status.INFEASIBLE}
    assert time.process_time() - start < 20


def groups_of_near_equals(n_classes: int, size: int, apart: float, width: int) -> Problem:
    """Classes in groups that are ``apart``, in a metric of rank 3."""
    problem = random_problem(n_classes, width, 64, seed=2)
    first = torch.arange(n_classes) // size * size
    problem.weight = problem.weight[first] + apart * problem.weight * (
        torch.arange(n_classes) % size > 0
    ).unsqueeze(-1)
    basis = torch.linalg.qr(torch.randn(width, 3, generator=torch.manual_seed(4)).double()).Q
    problem.covariance = basis @ basis.T
    problem.floor = torch.zeros_like(problem.floor)
    return problem


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_total_odds_of_near_equal_triples_do_not_depend_on_company(dtype: torch.dtype) -> None:
    """20 classes in triples, 1e-6 apart: the status is decided, and the edit the same, in any."""
    problem = groups_of_near_equals(20, 3, 1e-6, 16)
    problem.x = problem.x.to(dtype)
    together = solve(problem, TotalOdds())
    assert (together.status != Status.INACCURATE).all()
    assert set(together.status.tolist()) >= {Status.SOLVED, Status.INFEASIBLE}
    for rows in (*torch.arange(0, 64, 3).split(1), torch.arange(5, 42)):
        own = replace(problem)
        for name in ("x", "target", "floor"):
            setattr(own, name, getattr(problem, name)[rows])
        alone = solve(own, TotalOdds())
        assert torch.equal(alone.status, together.status[rows])
        close = 1e-7 if dtype == torch.float64 else 1e-4
        for name in ("multipliers", "x_new"):
            found, expected = getattr(alone, name), getattr(together, name)[rows]
            torch.testing.assert_close(found, expected, rtol=close, atol=close)


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
def test_total_odds_of_near_equal_triples_end_alike_on_every_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The residual is above its bound where the solve is wrong, and not where margins round."""
    for n_classes, width in ((10, 3), (5, 8)):
        problem = random_problem(n_classes, width, 24, seed=21)
        first = torch.arange(n_classes) // 3 * 3
        noise = torch.randn(n_classes, width, generator=torch.Generator().manual_seed(21)).double()
        near = (torch.arange(n_classes) % 3 > 0).unsqueeze(-1)
        problem.weight = problem.weight[first] + 1e-7 * noise * near
        problem.floor = problem.floor.abs()
        found = solve(problem, TotalOdds())
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            other = solve(problem, TotalOdds())
            few = torch.arange(0, 24, 15)
            alone = [
                solve(
                    replace(
                        problem, x=problem.x[i], target=problem.target[i], floor=problem.floor[i]
                    ),
                    TotalOdds(),
                )
                for i in few.unsqueeze(-1)
            ]
        assert torch.equal(found.status, other.status)
        assert (found.status != Status.INACCURATE).all()
        assert torch.equal(torch.cat([each.status for each in alone]), other.status[few])
        torch.testing.assert_close(found.distance, other.distance, rtol=1e-4, atol=1e-9)


def test_total_odds_as_near_as_float64_tells_classes_apart() -> None:
    """An edit along classes δ apart rounds others' margins by ε log α / δ²: 0.1 nats at 1e-7.

    So far every row is decided. At 1e-9 that is a thousand nats, and no number of float64 holds
    what is asked: rows end as INACCURATE, in bounded time, and none is SOLVED that is not.
    """
    for apart, decided in ((1e-6, True), (1e-7, True), (1e-9, False)):
        problem = groups_of_near_equals(10, 2, apart, 8)
        start = time.process_time()
        solution = solve(problem, TotalOdds())
        assert time.process_time() - start < 10
        done = solution.status == Status.SOLVED
        assert (solution.log_odds_after >= solution.floor)[done].all()
        assert (solution.kkt_residual[done] <= TotalOdds.tolerance).all()
        assert not decided or (solution.status != Status.INACCURATE).all()


@pytest.mark.parametrize("exponent", [-30, 30])
def test_total_odds_do_not_see_the_scale_of_the_covariance(exponent: int) -> None:
    problem = random_problem(6, 12, 60, seed=2, condition=100)
    scaled = replace(problem, covariance=problem.covariance * 10.0**exponent)
    here, there = solve(problem, TotalOdds()), solve(scaled, TotalOdds())
    assert torch.equal(here.status, there.status) and (here.status <= Status.SOLVED).all()
    torch.testing.assert_close(there.x_new, here.x_new, rtol=1e-8, atol=1e-9)
    # A wrong answer is seen at every scale.
    wrong = here.multipliers * 1.01
    for problem_, factor in ((problem, 1.0), (scaled, 10.0**-exponent)):
        geometry = geometry_of(problem_)
        margins = geometry.margins(problem_.x, problem_.target)
        gram = geometry.constraints(problem_.target).gram
        residual = total_residual(gram, margins, problem_.floor, wrong * factor)
        assert (residual[here.status == Status.SOLVED] > 1e-4).all()
