"""Total odds of more classes than the stream has dimensions: M is held by its normals."""

import subprocess
import sys

import pytest
import torch
from qp_reference import Problem, random_problem
from test_qp_total import by_exponential_cones, geometry_of, solve, total_of, total_program
from torch import Tensor

from lrqp_torch import Solution, Status
from lrqp_torch.qp import ProbeGeometry
from lrqp_torch.qp.active_set import solve_dual
from lrqp_torch.qp.constraints import DenseConstraints
from lrqp_torch.qp.normals import Normals, solve_by_few
from lrqp_torch.qp.total_odds import TotalOdds, solve_inner


def many(n_classes: int, width: int, batch: int, seed: int = 0) -> Problem:
    """Classes on a sphere, of which each can be reached."""
    task = random_problem(n_classes, width, batch, seed=seed, condition=100)
    task.weight = 3 * torch.nn.functional.normalize(task.weight, dim=-1)
    task.floor = task.floor - 4
    return task


def least(task: Problem, solution: Solution) -> Tensor:
    """What the squared length is at least, by duality with the shares of what was found."""
    geometry, found = geometry_of(task), solution.multipliers
    share = found / found.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    margins = geometry.margins(task.x, task.target)
    gap = task.floor - (share * margins).sum(-1) + entropy
    rows = torch.stack([task.constraints(i)[0] for i in range(len(gap))])
    along = (share.unsqueeze(1) @ rows).squeeze(1)
    return gap.square() / ((along @ task.covariance) * along).sum(-1)


def test_no_exponential_cone_solver_does_better_with_many_classes() -> None:
    task = many(90, 7, 6)
    solution = solve(task)
    assert (solution.status == Status.SOLVED).any() and (solution.status <= Status.SOLVED).all()
    for i in range(6):
        x_new, distance = by_exponential_cones(task, i)
        assert float(solution.distance[i]) == pytest.approx(distance, rel=1e-6, abs=1e-6)
        torch.testing.assert_close(solution.x_new[i], x_new, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_classes", "width"), [(65, 64), (66, 64), (300, 12), (1000, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_by_duality_no_edit_is_shorter(n_classes: int, width: int, dtype: torch.dtype) -> None:
    task = many(n_classes, width, 3, seed=1)
    task.x = task.x.to(dtype)
    solution = solve(task)
    done = solution.status == Status.SOLVED
    assert done.any() and (solution.status <= Status.SOLVED).all()
    assert (total_of(task, solution.x_new) >= task.floor - 1e-12)[done].all()
    within = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    longer = 1 - least(task, solution) / solution.squared_distance
    assert (longer <= within)[done].all()
    assert (solution.kkt_residual <= TotalOdds.tolerance)[done].all()


def test_it_is_the_same_as_with_m_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statuses too, where targets between others are out of reach."""
    task = random_problem(70, 5, 60, seed=3, condition=10)
    task.floor = task.floor - 4
    task.weight[:20] *= 3
    by_normals = solve(task)
    monkeypatch.setattr(ProbeGeometry, "by_normals", ProbeGeometry.constraints)
    itself = solve(task)
    assert torch.equal(by_normals.status, itself.status)
    counts = itself.status.bincount(minlength=4)
    assert counts[Status.SOLVED] > 5 and counts[Status.INFEASIBLE] > 5
    for name in ("x_new", "multipliers", "squared_distance", "squared_euclidean"):
        one, other = getattr(by_normals, name), getattr(itself, name)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_each_is_edited_as_alone() -> None:
    task = many(200, 9, 12, seed=4)
    together = solve(task)
    for i in range(12):
        at = slice(i, i + 1)
        own = total_program(200).solve(
            task.x[at], task.target[at], task.floor[at], geometry_of(task)
        )
        assert torch.equal(own.status, together.status[at])
        torch.testing.assert_close(own.x_new, together.x_new[at], rtol=1e-12, atol=1e-12)


def test_derivatives_are_exact_with_many_classes() -> None:
    """In activations, floors, probe and metric, against differences along a direction."""
    task = many(66, 3, 2, seed=5)
    task.floor = task.floor + 3

    def solved(x: Tensor, floor: Tensor, weight: Tensor, root: Tensor) -> Tensor:
        shape = ProbeGeometry.build(weight, task.bias, root @ root.mT)
        solution = total_program(66).solve(x, task.target, floor, shape)
        assert (solution.status == Status.SOLVED).all()
        return torch.cat([solution.x_new.sin().flatten(), solution.squared_distance])

    generator = torch.Generator().manual_seed(5)
    inputs = task.x, task.floor, task.weight, torch.linalg.cholesky(task.covariance)
    for number in range(4):
        given = [part.clone().requires_grad_() for part in inputs]
        along = torch.randn(given[number].shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(solved(*given).sum(), given[number])
        ends = []
        for sign in (1e-5, -1e-5):
            moved = [part.clone() for part in inputs]
            moved[number] += sign * along
            ends.append(solved(*moved).sum())
        slope = float(ends[0] - ends[1]) / 2e-5
        assert float((gradient * along).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_few_constraints_at_a_time_find_the_same_multipliers() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(40, 300, 6, generator=generator, dtype=torch.float64)
    rows[20:, :, 0] = rows[20:, :, 0].abs() + 1
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    normals = Normals(rows, rows @ (root @ root.mT))
    gap = torch.randn(40, 300, generator=generator, dtype=torch.float64)
    noise = torch.full_like(gap, 1e-14)
    found, feasible = solve_by_few(normals, noise, gap, 0.0)
    constraints = DenseConstraints(rows @ normals.along.mT, noise, noise)
    expected = solve_dual(constraints, gap)
    assert torch.equal(feasible, expected.feasible)
    assert feasible.any() and not feasible.all()
    wanted = expected.multipliers(constraints, gap)
    torch.testing.assert_close(found[feasible], wanted[feasible], rtol=1e-6, atol=1e-8)


def test_systems_are_solved_by_normals_as_by_m() -> None:
    """Where one rival has nearly all of the share, too."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(3, 50, 4, generator=generator, dtype=torch.float64)
    normals = Normals(rows, rows / 3)
    share = torch.randn(3, 50, generator=generator, dtype=torch.float64).softmax(-1)
    share[1] = torch.tensor([1e-12] * 49 + [1 - 49e-12], dtype=torch.float64)
    weight = torch.tensor([0.1, 1e6, 30.0], dtype=torch.float64)
    right = share - 0.02, torch.randn(3, 50, generator=generator, dtype=torch.float64)
    gram = rows @ normals.along.mT
    for one, other in zip(
        normals.inner(share, weight, *right), solve_inner(gram, share, weight, *right), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


CHILD = """
import resource, torch
from lrqp_torch import LRQP, LinearProbe, Mahalanobis
torch.manual_seed(0); torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
x = torch.randn(500, 64)
edit = LRQP(LinearProbe(64, 4000), Mahalanobis.fit(x), odds="total", log_odds=1.0)
edit.solve(x[:1, :], 1)
edit = LRQP(LinearProbe(64, 5000), Mahalanobis.fit(x), odds="total", log_odds=1.0)
before = peak()
solution = edit.solve(x[:1], 7)
print(int(solution.status), peak() - before)
"""


def test_memory_grows_with_the_number_of_classes_not_its_square() -> None:
    """One K × K matrix of 5,000 classes alone is 200 MB."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=300
    )
    status, grown = map(int, done.stdout.split())
    assert status == Status.SOLVED and grown < 100
