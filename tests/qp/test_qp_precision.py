"""What is promised for activations of every dtype, read back exactly."""

import pytest
import torch
from qp_reference import objective, random_problem
from torch import Tensor

from lrqp_torch import MahalanobisQP, Status
from lrqp_torch.qp import ProbeGeometry, native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact_margins(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The strongest rival's margin z_t − max z_ℓ, in float64."""
    logits = x.double() @ weight.double().T + bias.double()
    own = logits.gather(-1, target[:, None]).squeeze(-1)
    return own - logits.scatter(-1, target[:, None], float("-inf")).amax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_classes", "width"), [(2, 8), (2, 256), (5, 64), (20, 64)])
@pytest.mark.parametrize("size", [1e-2, 1.0, 100.0])
def test_every_stored_activation_reaches_its_floor(
    dtype: torch.dtype, n_classes: int, width: int, size: float
) -> None:
    problem = random_problem(n_classes, width, 128, seed=width)
    problem.x = (problem.x * size).to(dtype)
    solution = problem.solve()
    assert solution.x_new.dtype == dtype
    assert (solution.status <= Status.SOLVED).all()
    margins = exact_margins(solution.x_new, problem.weight, problem.bias, problem.target)
    rounding = 1e-13 * (1 + (solution.x_new.double() @ problem.weight.T).abs().amax(-1))
    assert (margins >= problem.floor - rounding).all()
    assert (solution.log_odds_after >= problem.floor).all()
    assert torch.allclose(solution.log_odds_after, margins, rtol=1e-12, atol=float(rounding.max()))


@pytest.mark.parametrize(
    ("dtype", "excess"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5), (torch.float16, 0.1)]
)
def test_low_precision_costs_little_more_than_its_rounding(
    dtype: torch.dtype, excess: float
) -> None:
    """The floor is raised for rounding, but not by much more than rounding needs."""
    problem = random_problem(4, 64, 100, condition=10)
    problem.floor = problem.floor.abs() + 5
    problem.x = problem.x.to(dtype)
    solution = problem.solve()
    problem.x = problem.x.double()
    exact = problem.solve()
    edited = exact.status == Status.SOLVED
    ratio = solution.distance[edited] / exact.distance[edited]
    assert (ratio >= 1 - 1e-6).all()
    assert (ratio <= 1 + excess).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_and_metric_may_have_any_dtype(dtype: torch.dtype) -> None:
    problem = random_problem(4, 16, 50, condition=10)
    for name in ("weight", "bias", "covariance"):
        setattr(problem, name, getattr(problem, name).to(dtype))
    problem.covariance = (problem.covariance + problem.covariance.T) / 2
    problem.x = problem.x.to(dtype)
    solution = problem.solve()
    for name in ("weight", "bias", "covariance"):
        setattr(problem, name, getattr(problem, name).double())
    same = problem.solve()
    assert torch.equal(solution.x_new, same.x_new)
    assert solution.multipliers.dtype == solution.distance.dtype == torch.float64


def test_float64_gap_in_the_objective_and_violation() -> None:
    """Violation at most 1e-12 (1 + |logit|); a perturbed edit that is feasible costs more."""
    problem = random_problem(6, 24, 60)
    solution = problem.solve()
    logits = solution.x_new @ problem.weight.T + problem.bias
    margins = exact_margins(solution.x_new, problem.weight, problem.bias, problem.target)
    assert (margins - problem.floor >= -1e-12 * (1 + logits.abs().amax(-1))).all()
    factor = torch.linalg.cholesky(problem.covariance)
    for i in (solution.status == Status.SOLVED).nonzero().flatten().tolist():
        least = objective(problem, i, solution.x_new[i])
        rows, right = problem.constraints(i)
        others = solution.x_new[i] + torch.randn(500, 24, dtype=torch.float64) @ factor.T * 1e-3
        feasible = others[(others @ rows.T >= right).all(-1)]
        costs = [objective(problem, i, other) for other in feasible[:50]]
        assert all(cost >= least * (1 - 1e-10) for cost in costs)


def test_activations_of_very_different_size_share_a_batch() -> None:
    problem = random_problem(3, 16, 6)
    problem.x = problem.x * torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None]
    solution = problem.solve()
    assert (solution.status <= Status.SOLVED).all()
    margins = exact_margins(solution.x_new, problem.weight, problem.bias, problem.target)
    assert (margins >= problem.floor * (1 - 1e-9) - 1e-9).all()


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_large_common_offset_of_the_activations(offset: float) -> None:
    """Residual streams have huge mean coordinates; in float32 the promise still holds."""
    problem = random_problem(3, 32, 64, condition=10)
    problem.x[:, 5] += offset
    problem.bias = problem.bias - offset * problem.weight[:, 5]
    problem.x = problem.x.float()
    solution = problem.solve()
    assert (solution.status <= Status.SOLVED).all()
    assert (solution.log_odds_after >= problem.floor).all()


def test_float16_overflow_is_reported_not_hidden() -> None:
    """An edit that float16 cannot store ends as INACCURATE, never as SOLVED."""
    problem = random_problem(2, 4, 8, condition=1)
    problem.weight = problem.weight * 1e-6
    problem.bias.zero_()
    problem.x = problem.x.half()
    problem.floor = torch.full((8,), 10.0, dtype=torch.float64)
    solution = problem.solve()
    assert (solution.status == Status.INACCURATE).all()


def test_the_floor_holds_for_what_the_model_will_really_hold() -> None:
    """``realise``: the edit is added to the stream as a bfloat16 difference."""
    problem = random_problem(4, 32, 60, condition=10)
    stream = problem.x.bfloat16()
    geometry = ProbeGeometry.build(problem.weight, problem.bias, problem.covariance)

    def realise(edited: Tensor) -> Tensor:
        return (stream + (edited - stream.double()).bfloat16()).double()

    solution = MahalanobisQP(4).solve(
        stream, problem.target, problem.floor, geometry, realise=realise
    )
    assert (solution.status <= Status.SOLVED).all()
    held = realise(solution.x_new.double())
    edited = solution.status == Status.SOLVED
    assert torch.equal(held[~edited], stream[~edited].double())
    assert (solution.log_odds_after >= problem.floor).all()


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_an_edit_whose_square_overflows_float32_is_no_unreachable_target(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rounding can take off x' of size 1e20 is known all the same."""
    problem = random_problem(5, 16, 64, seed=0)
    problem.weight, problem.covariance = problem.weight * 1e-20, problem.covariance * 1e20
    problem.x = problem.x.bfloat16()
    if path == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    solution = problem.solve()
    assert (solution.status <= Status.SOLVED).all()
    assert solution.x_new.double().norm(dim=-1).max() > 1e19
