"""The loop that every exact edit goes through: aim, solve, read back, raise the floor."""

import pytest
import torch
from qp_reference import random_problem
from torch import Tensor

from lrqp_torch import MahalanobisQP, Status
from lrqp_torch.qp import ODDS, ProbeGeometry
from lrqp_torch.qp.reach import MAX_ROUNDS, Attempt, Headroom, Rows, reach


def coarse(values: Tensor) -> Tensor:
    """A stream that truncates to a grid of an eighth: what is stored falls short, often by much."""
    return (values * 8).floor() / 8


def first_coordinate(held: Tensor, rows: Rows) -> Tensor:
    return held[:, :1]


def test_only_what_fell_short_is_solved_again() -> None:
    asked: list[list[int]] = []

    def step(aim: Tensor, rows: Rows) -> Attempt:
        asked.append(list(range(4)) if rows is None else rows.tolist())
        return Attempt(aim.expand(-1, 3).clone(), torch.ones(len(aim), dtype=torch.bool), (aim,))

    floor = torch.tensor([[1.0], [1.01], [2.0], [1.3]], dtype=torch.float64)
    needed = torch.tensor([True, True, True, False])
    headroom = Headroom(1e-6, torch.ones(4, 1).double(), torch.ones(4, 1).double(), 3)
    raised = torch.zeros(4, 1, dtype=torch.float64)
    attempt, after = reach(
        floor,
        needed,
        headroom,
        step,
        first_coordinate,
        dtype=torch.float64,
        realise=coarse,
        raised=raised,
    )
    assert asked[0] == [0, 1, 2, 3] and all(again == [1] for again in asked[1:])
    assert (after >= floor)[needed].all()
    # What was read belongs to what is returned, for those that were solved again and the others.
    assert torch.equal(after, coarse(attempt.edited)[:, :1])
    assert torch.equal(attempt.found[0][[0, 2, 3]], floor[[0, 2, 3]])


@pytest.mark.parametrize("rounds", [2, 5, MAX_ROUNDS])
def test_the_last_round_aims_by_what_rounding_takes(rounds: int) -> None:
    """A stream that loses a hundred times what its dtype would is reached in the last round."""
    lost, counted = 0.03, 0

    def step(aim: Tensor, rows: Rows) -> Attempt:
        nonlocal counted
        counted += 1
        # The solve takes away what it was raised by, but for the last time.
        kept = aim if counted == rounds else torch.ones_like(aim)
        return Attempt(kept.clone(), torch.ones(len(aim), dtype=torch.bool))

    one = torch.ones(1, 1, dtype=torch.float64)
    headroom = Headroom(1e-6, one, one, 1)
    _, after = reach(
        one,
        torch.tensor([True]),
        headroom,
        step,
        first_coordinate,
        dtype=torch.float64,
        realise=lambda values: values - lost,
        rounds=rounds,
    )
    assert counted == rounds and float(after) >= 1


def test_nothing_is_read_of_what_cannot_be_reached() -> None:
    def step(aim: Tensor, rows: Rows) -> Attempt:
        assert rows is None, "nobody is to be asked again"
        return Attempt(torch.zeros_like(aim), torch.zeros(len(aim), dtype=torch.bool))

    floor = torch.ones(3, 1, dtype=torch.float64)
    attempt, _ = reach(
        floor,
        torch.ones(3, dtype=torch.bool),
        Headroom(1e-6, floor, floor, 1),
        step,
        first_coordinate,
        dtype=torch.float64,
    )
    assert not attempt.open.any()


@pytest.mark.parametrize("odds", ["pairwise", "total"])
def test_a_stream_coarser_than_its_dtype_is_reached(odds: str) -> None:
    task = random_problem(4, 12, 100, seed=3, condition=10)
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    solution = (
        ODDS[odds].program(4).solve(task.x, task.target, task.floor, geometry, realise=coarse)
    )
    assert (solution.status <= Status.SOLVED).all()
    assert (solution.log_odds_after >= solution.floor).all()


def test_gradients_flow_through_the_rows_that_were_solved_again() -> None:
    task = random_problem(3, 8, 40, seed=5, condition=10)
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    floor = task.floor.clone().requires_grad_()
    x = task.x.bfloat16().double().requires_grad_()
    solution = MahalanobisQP(3).solve(
        x, task.target, floor, geometry, realise=lambda values: values.bfloat16().double()
    )
    outgoing = torch.randn_like(task.x)
    found = torch.autograd.grad(solution.x_new, (x, floor), outgoing)
    again = x.detach().requires_grad_(), task.floor.clone().requires_grad_()
    exact = MahalanobisQP(3).solve(again[0], task.target, again[1], geometry)
    alike = (exact.active == solution.active).all(-1)
    assert alike.double().mean() > 0.9
    expected = torch.autograd.grad(exact.x_new, again, outgoing)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[alike], theirs[alike], rtol=1e-9, atol=1e-9)
