"""Gradients against finite differences, of first and second order."""

from collections.abc import Callable

import pytest
import torch
from qp_reference import Problem, random_problem
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lrqp_torch import MahalanobisQP, Status
from lrqp_torch.qp import ProbeGeometry

N_CLASSES = [2, 3, 5]


def smooth_problem(n_classes: int, batch: int = 6) -> Problem:
    """A problem of which no example lies at a kink, with satisfied and edited examples.

    K = 2: one satisfied and others edited; larger K: also different sizes of active set.
    """
    problem = random_problem(n_classes, 6, 400, seed=11, condition=5)
    problem.floor = problem.floor / 2
    solution = problem.solve()
    margins = problem.floor[:, None] - ProbeGeometry.build(
        problem.weight, problem.bias, problem.covariance
    ).margins(solution.x_new, problem.target)
    distance_to_kink = torch.where(solution.active, solution.multipliers, margins.abs()).amin(-1)
    sizes = solution.active.sum(-1)
    chosen: list[int] = []
    for size in range(n_classes):
        good = ((distance_to_kink > 0.05) & (sizes == size)).nonzero().flatten()
        chosen += good[: max(1, batch // n_classes)].tolist()
    assert set(sizes[chosen].tolist()) >= {0, 1}
    problem.x, problem.target, problem.floor = (
        problem.x[chosen],
        problem.target[chosen],
        problem.floor[chosen],
    )
    return problem


def edit_of(problem: Problem, output: str = "x_new") -> Callable[..., Tensor]:
    """(x, W, b, S, log α) → a field of the solution; Σ = (S + Sᵀ) / 2."""
    qp = MahalanobisQP(len(problem.bias))

    def edit(x: Tensor, weight: Tensor, bias: Tensor, root: Tensor, floor: Tensor) -> Tensor:
        solution = qp(x, problem.target, floor, weight, bias, (root + root.T) / 2)
        result: Tensor = getattr(solution, output)
        return result

    return edit


def inputs_of(problem: Problem) -> list[Tensor]:
    tensors = (problem.x, problem.weight, problem.bias, problem.covariance, problem.floor)
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("n_classes", N_CLASSES)
@pytest.mark.parametrize("output", ["x_new", "multipliers"])
def test_gradients_of_all_inputs(n_classes: int, output: str) -> None:
    """x, W, b, Σ and log α at once; W, b and Σ are shared by the batch."""
    problem = smooth_problem(n_classes)
    assert gradcheck(edit_of(problem, output), inputs_of(problem), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_classes", N_CLASSES)
@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "bias", "covariance", "log_odds"])
def test_gradient_of_one_input_alone(n_classes: int, which: int) -> None:
    """With the others constant the graph is another one; it must give the same."""
    problem = smooth_problem(n_classes)
    everything = inputs_of(problem)
    edit = edit_of(problem)
    probe = torch.randn(problem.x.shape, dtype=torch.float64)
    together = torch.autograd.grad((edit(*everything) * probe).sum(), everything)[which]
    alone = [tensor.detach() for tensor in everything]
    alone[which].requires_grad_()
    (single,) = torch.autograd.grad((edit(*alone) * probe).sum(), alone[which])
    assert torch.allclose(single, together, rtol=1e-10, atol=1e-12)
    assert gradcheck(
        lambda tensor: edit(*alone[:which], tensor, *alone[which + 1 :]), [alone[which]], eps=1e-6
    )


@pytest.mark.parametrize("n_classes", N_CLASSES)
def test_gradient_of_the_distance(n_classes: int) -> None:
    problem = smooth_problem(n_classes)
    assert gradcheck(edit_of(problem, "distance"), inputs_of(problem), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_classes", N_CLASSES)
def test_second_derivatives(n_classes: int) -> None:
    problem = smooth_problem(n_classes, batch=3)
    assert gradgradcheck(edit_of(problem), inputs_of(problem), eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_classes", N_CLASSES)
def test_satisfied_examples_pass_gradients_through(n_classes: int) -> None:
    problem = random_problem(n_classes, 6, 40)
    problem.floor = torch.full((40,), -1e3, dtype=torch.float64)
    inputs = inputs_of(problem)
    x_new = edit_of(problem)(*inputs)
    outgoing = torch.randn_like(x_new)
    gradients = torch.autograd.grad(x_new, inputs, outgoing, allow_unused=True)
    assert torch.equal(gradients[0], outgoing)
    for gradient in gradients[1:]:
        assert gradient is None or (gradient == 0).all()


def test_gradient_in_x_is_the_projection_off_the_active_constraints() -> None:
    """∂x'/∂x = I − Σ A_Aᵀ (A_A Σ A_Aᵀ)⁻¹ A_A: what an active constraint fixes, x cannot move."""
    problem = smooth_problem(5)
    solution = problem.solve()
    x = problem.x.clone().requires_grad_()
    qp = MahalanobisQP(5)
    arguments = (problem.floor, problem.weight, problem.bias, problem.covariance)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda row, i=i: qp(
                row[None], problem.target[i : i + 1], arguments[0][i : i + 1], *arguments[1:]
            ).x_new[0],
            x[i].detach(),
        )
        active = problem.constraints(i)[0][solution.active[i]]
        pulled = problem.covariance @ active.T
        expected = torch.eye(6, dtype=torch.float64)
        if len(active):
            expected = expected - pulled @ torch.linalg.solve(active @ pulled, active)
        assert torch.allclose(jacobian, expected, atol=1e-10)


def test_infeasible_and_inaccurate_companions_leave_gradients_finite() -> None:
    problem = random_problem(4, 6, 40)
    problem.weight[3], problem.bias[3] = problem.weight[2], problem.bias[2]
    inputs = inputs_of(problem)
    qp = MahalanobisQP(4)
    x, weight, bias, root, floor = inputs
    solution = qp(x, problem.target, floor, weight, bias, root)
    assert {Status.SOLVED, Status.INFEASIBLE} <= set(solution.status.tolist())
    gradients = torch.autograd.grad(solution.x_new.sum() + solution.distance.sum(), inputs)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    lost = solution.status == Status.INFEASIBLE
    assert torch.equal(gradients[0][lost], torch.ones_like(x[lost]))


def test_low_precision_activations_receive_gradients_of_the_exact_edit() -> None:
    problem = random_problem(3, 8, 30, condition=5)
    problem.floor = problem.floor + 3
    problem.x = problem.x.float()
    x = problem.x.clone().requires_grad_()
    qp = MahalanobisQP(3)
    arguments = (problem.floor, problem.weight, problem.bias, problem.covariance)
    outgoing = torch.randn(30, 8)
    (low,) = torch.autograd.grad(qp(x, problem.target, *arguments).x_new, x, outgoing)
    exact = x.detach().double().requires_grad_()
    (high,) = torch.autograd.grad(
        qp(exact, problem.target, *arguments).x_new, exact, outgoing.double()
    )
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), high, rtol=1e-5, atol=1e-5)
