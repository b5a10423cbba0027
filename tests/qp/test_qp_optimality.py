"""The edit is the optimum of the full problem, certified independently."""

import cvxpy as cp
import pytest
import torch
from qp_reference import Problem, objective, random_problem, reference_edit

from lrqp_torch import MahalanobisQP, Status

SIZES = [(2, 1), (2, 64), (3, 8), (3, 64), (5, 16), (10, 64), (20, 32), (50, 64)]


@pytest.mark.parametrize(("n_classes", "width"), SIZES)
def test_kkt_conditions_hold(n_classes: int, width: int) -> None:
    problem = random_problem(n_classes, width, 64)
    solution = problem.solve()
    assert set(solution.status.tolist()) <= {Status.SATISFIED, Status.SOLVED}
    assert (solution.status == Status.SOLVED).any()
    logit_size = 1 + (solution.x_new @ problem.weight.T + problem.bias).abs().amax(-1)
    for i in range(64):
        rows, right = problem.constraints(i)
        multipliers = solution.multipliers[i]
        slack = rows @ solution.x_new[i] - right
        # Primal feasibility, to the promised precision.
        assert slack.min() >= -1e-12 * logit_size[i]
        # Dual feasibility.
        assert multipliers.min() >= 0
        # Stationarity: δ = Σ Aᵀ λ.
        delta = solution.x_new[i] - problem.x[i]
        expected = problem.covariance @ rows.T @ multipliers
        assert torch.allclose(delta, expected, rtol=1e-9, atol=1e-12 * float(problem.x[i].norm()))
        # Complementary slackness, and the active set is where λ lives.
        work = float(multipliers @ (right - rows @ problem.x[i]).abs())
        assert (multipliers * slack).abs().sum() <= 1e-10 * (1 + work)
        assert torch.equal(solution.active[i], multipliers > 0)
    assert (solution.kkt_residual <= 1e-12).all()


@pytest.mark.parametrize(("n_classes", "width"), [size for size in SIZES if size[0] <= size[1]])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_no_solver_in_full_dimension_does_better(
    n_classes: int, width: int, condition: float
) -> None:
    problem = random_problem(n_classes, width, 24, seed=1, condition=condition)
    solution = problem.solve()
    for i in range(24):
        best = objective(problem, i, reference_edit(problem, i))
        ours = objective(problem, i, solution.x_new[i])
        assert ours == pytest.approx(best, rel=1e-10, abs=1e-20)
        assert float(solution.distance[i]) == pytest.approx(best**0.5, rel=1e-10, abs=1e-10)


def test_more_classes_than_dimensions() -> None:
    """M is singular of rank d: the reduced problem is degenerate, the full one is not."""
    problem = random_problem(12, 4, 200, seed=2, condition=10)
    # A common point at which every class can win: put the weights on a sphere.
    problem.weight = 3 * torch.nn.functional.normalize(problem.weight, dim=-1)
    problem.bias.zero_()
    solution = problem.solve()
    assert (solution.status <= Status.SOLVED).all()
    for i in range(200):
        best = objective(problem, i, reference_edit(problem, i))
        assert objective(problem, i, solution.x_new[i]) == pytest.approx(best, rel=1e-9, abs=1e-18)


def test_agrees_with_the_program_as_the_post_poses_it() -> None:
    problem = random_problem(5, 24, 6, seed=3, condition=100)
    solution = problem.solve()
    precision = torch.linalg.inv(problem.covariance).numpy()
    for i in range(6):
        rows, right = problem.constraints(i)
        edited = cp.Variable(24)
        delta = edited - problem.x[i].numpy()
        program = cp.Problem(
            cp.Minimize(cp.quad_form(delta, cp.psd_wrap(precision))),
            [rows.numpy() @ edited >= right.numpy()],
        )
        program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        assert torch.allclose(solution.x_new[i], torch.from_numpy(edited.value), atol=1e-6)


def test_two_classes_have_a_closed_form() -> None:
    problem = random_problem(2, 16, 100, seed=4)
    solution = problem.solve()
    for i in range(100):
        rows, right = problem.constraints(i)
        normal, gap = rows[0], (right - rows @ problem.x[i]).clamp_min(0)
        steering = problem.covariance @ normal
        expected = problem.x[i] + gap * steering / (normal @ steering)
        assert torch.allclose(solution.x_new[i], expected, rtol=1e-12, atol=1e-12)
        length = float(gap / (normal @ steering).sqrt())
        assert float(solution.distance[i]) == pytest.approx(length, rel=1e-12, abs=1e-12)


def test_with_identity_covariance_the_edit_is_euclidean_projection() -> None:
    problem = random_problem(4, 10, 50, seed=5)
    problem.covariance = torch.eye(10, dtype=torch.float64)
    solution = problem.solve()
    assert torch.allclose(solution.distance, solution.euclidean, rtol=1e-12, atol=1e-12)
    for i in range(50):
        rows, right = problem.constraints(i)
        # The projection p of x onto a convex set C: (x − p)·(c − p) ≤ 0 for every c in C.
        inside = solution.x_new[i] + torch.randn(2000, 10, dtype=torch.float64)
        inside = inside[(inside @ rows.T >= right).all(-1)]
        assert len(inside) > 0
        obtuse = (inside - solution.x_new[i]) @ (problem.x[i] - solution.x_new[i])
        assert (obtuse <= 1e-9).all()


def test_probe_consistent_with_lda_steers_along_the_mean_difference() -> None:
    problem = random_problem(2, 20, 30, seed=6, condition=100)
    means = torch.randn(2, 20, dtype=torch.float64)
    problem.weight = torch.linalg.solve(problem.covariance, means.T).T
    problem.floor = torch.full((30,), 1e3, dtype=torch.float64)
    delta = problem.solve().x_new - problem.x
    difference = means[1] - means[0]
    sign = (2 * problem.target - 1).double()[:, None]
    cosine = torch.nn.functional.cosine_similarity(delta, sign * difference, dim=-1)
    assert torch.allclose(cosine, torch.ones(30, dtype=torch.float64), atol=1e-10)


def test_distance_and_euclidean_are_what_they_say() -> None:
    problem = random_problem(6, 12, 80, seed=7)
    solution = problem.solve()
    delta = solution.x_new - problem.x
    squared = (delta * torch.linalg.solve(problem.covariance, delta.T).T).sum(-1)
    assert torch.allclose(solution.distance, squared.sqrt(), rtol=1e-9, atol=1e-9)
    assert torch.allclose(solution.euclidean, delta.norm(dim=-1), rtol=1e-9, atol=1e-12)
    margins = solution.x_new @ problem.weight.T + problem.bias
    rival = margins.scatter(-1, problem.target[:, None], float("-inf")).amax(-1)
    after = margins.gather(-1, problem.target[:, None]).squeeze(-1) - rival
    assert torch.allclose(solution.log_odds_after, after, rtol=1e-12, atol=1e-10)
    assert torch.equal(solution.floor, problem.floor)


def test_scaling_the_covariance_changes_the_distance_only() -> None:
    problem = random_problem(5, 12, 40, seed=8)
    before = problem.solve()
    problem.covariance = 9 * problem.covariance
    after = problem.solve()
    assert torch.allclose(before.x_new, after.x_new, rtol=1e-10, atol=1e-12)
    assert torch.allclose(before.distance, 3 * after.distance, rtol=1e-10)


def test_a_change_of_basis_changes_nothing() -> None:
    """x → T x, W → W T⁻¹, Σ → T Σ Tᵀ: the edit is equivariant under every linear map."""
    problem = random_problem(5, 12, 40, seed=9, condition=10)
    basis = torch.randn(12, 12, dtype=torch.float64) + 4 * torch.eye(12, dtype=torch.float64)
    moved = Problem(
        x=problem.x @ basis.T,
        target=problem.target,
        floor=problem.floor,
        weight=torch.linalg.solve(basis.T, problem.weight.T).T,
        bias=problem.bias,
        covariance=basis @ problem.covariance @ basis.T,
    )
    here, there = problem.solve(), moved.solve()
    assert torch.allclose(here.x_new @ basis.T, there.x_new, rtol=1e-9, atol=1e-9)
    assert torch.allclose(here.distance, there.distance, rtol=1e-9, atol=1e-9)


def test_a_higher_floor_is_never_nearer() -> None:
    problem = random_problem(5, 12, 40, seed=10)
    qp = MahalanobisQP(5)
    arguments = (problem.weight, problem.bias, problem.covariance)
    distances = torch.stack(
        [qp(problem.x, problem.target, float(a), *arguments).distance for a in range(-5, 15)]
    )
    assert (distances.diff(dim=0) >= -1e-12).all()
    # Distance is convex in the floor.
    assert (distances.diff(n=2, dim=0) >= -1e-10).all()
