"""The active-set solver on its own: random, integer-valued and adversarial problems."""

from dataclasses import dataclass
from itertools import chain, combinations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lrqp_torch.qp import pivots
from lrqp_torch.qp.active_set import DualSolution, solve_dual
from lrqp_torch.qp.constraints import DenseConstraints
from lrqp_torch.qp.solution import kkt_residual


@dataclass(frozen=True)
class Solved:
    """What :func:`solve_dual` finds for M and g as they are."""

    multipliers: Tensor
    active: Tensor
    solution: DualSolution

    @property
    def feasible(self) -> Tensor:
        return self.solution.feasible

    @property
    def converged(self) -> Tensor:
        return self.solution.converged


def solve(gram: Tensor, gap: Tensor, max_pivots: int | None = None) -> Solved:
    none = torch.zeros_like(gap)
    constraints = DenseConstraints(gram, none, none)
    solution = solve_dual(constraints, gap, max_pivots=max_pivots)
    assert solution.index is not None or gap.shape[-1] == 1
    active = solution.held
    if solution.index is not None:
        wide = torch.zeros(len(gap), gap.shape[-1] + 1, dtype=torch.bool)
        active = wide.scatter(-1, solution.index, solution.held)[:, :-1]
    return Solved(solution.multipliers(constraints, gap), active, solution)


def residual(gram: Tensor, gap: Tensor, multipliers: Tensor) -> Tensor:
    grown = (gram @ multipliers[:, :, None]).squeeze(-1)
    none = torch.zeros_like(gap)
    return kkt_residual(gram.diagonal(dim1=-2, dim2=-1), grown, gap, multipliers, none)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).double()


def assert_optimal(gram: Tensor, gap: Tensor, solution: Solved, tolerance: float) -> None:
    """The KKT conditions, which certify a convex optimum, for every feasible problem."""
    feasible = solution.feasible
    gram, gap, multipliers = gram[feasible], gap[feasible], solution.multipliers[feasible]
    slack = (gram @ multipliers[:, :, None]).squeeze(-1) - gap
    size = 1 + gap.abs().amax(-1, keepdim=True)
    assert (multipliers >= 0).all()
    assert (slack >= -tolerance * size).all()
    assert ((multipliers * slack).abs() <= tolerance * size * (1 + multipliers)).all()
    assert (multipliers[~solution.active[feasible]] == 0).all()


def has_optimum(gram: Tensor, gap: Tensor) -> Tensor:
    """Whether each integer problem has an optimum, by trying every regular active set, (B,).

    Some optimum is supported on linearly independent constraints, and the determinant of an
    integer matrix is an integer, so regular and singular sets are told apart without doubt.
    """
    n_problems, m = gap.shape
    found = torch.zeros(n_problems, dtype=torch.bool)
    for chosen in chain.from_iterable(combinations(range(m), size) for size in range(m + 1)):
        index = torch.tensor(chosen, dtype=torch.long)
        block = gram[:, index][:, :, index]
        regular = torch.linalg.det(block) > 0.5
        safe = torch.where(regular[:, None, None], block, torch.eye(len(index)).double())
        multipliers = torch.zeros_like(gap)
        multipliers[:, index] = torch.linalg.solve(safe, gap[:, index])
        slack = (gram @ multipliers[:, :, None]).squeeze(-1) - gap
        found |= regular & (multipliers >= -1e-9).all(-1) & (slack >= -1e-9).all(-1)
    return found


@pytest.mark.parametrize(("m", "width", "size"), [(2, 2, 2), (3, 2, 1), (4, 3, 2), (5, 3, 1)])
def test_degenerate_integer_problems(m: int, width: int, size: int) -> None:
    """Ties, repeated, opposite and empty rows abound; no cycling, every verdict right."""
    batch = 20_000
    rows = integers(-size, size, batch, m, width, seed=m)
    gap = integers(-2, 2, batch, m, seed=m + 100)
    gram = rows @ rows.transpose(1, 2)
    solution = solve(gram, gap)
    assert solution.converged.all()
    expected = has_optimum(gram, gap)
    assert 0.1 < expected.double().mean() < 0.99
    assert torch.equal(solution.feasible, expected)
    assert_optimal(gram, gap, solution, 1e-11)
    assert (solution.multipliers[~expected] == 0).all()


@settings(max_examples=300)
@given(
    data=st.integers(1, 5).flatmap(
        lambda m: st.tuples(
            st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=m, max_size=m),
            st.lists(st.integers(-4, 4), min_size=m, max_size=m),
        )
    )
)
def test_any_small_integer_problem(data: tuple[list[list[int]], list[int]]) -> None:
    rows = torch.tensor(data[0], dtype=torch.float64)
    gram, gap = (rows @ rows.T)[None], torch.tensor([data[1]], dtype=torch.float64)
    solution = solve(gram, gap)
    assert solution.converged.all()
    assert torch.equal(solution.feasible, has_optimum(gram, gap))
    assert_optimal(gram, gap, solution, 1e-11)


@settings(max_examples=60)
@given(
    m=st.integers(1, 12),
    surplus=st.integers(0, 6),
    spread=st.floats(0, 4),
    common=st.floats(0, 5),
    seed=st.integers(0, 2**31),
)
def test_random_regular_problems(
    m: int, surplus: int, spread: float, common: float, seed: int
) -> None:
    """Rows of lengths over ``spread`` decades, more or less parallel to a common direction."""
    generator = torch.Generator().manual_seed(seed)
    width = m + surplus + 1
    rows = torch.randn(50, m, width, generator=generator, dtype=torch.float64)
    rows = rows + common * torch.randn(50, 1, width, generator=generator, dtype=torch.float64)
    rows = rows * 10 ** (spread * (torch.rand(50, m, 1, generator=generator).double() - 0.5))
    gap = 5 * torch.randn(50, m, generator=generator, dtype=torch.float64)
    gram = rows @ rows.transpose(1, 2)
    solution = solve(gram, gap)
    assert solution.feasible.all()
    assert solution.converged.all()
    assert (residual(gram, gap, solution.multipliers) <= 1e-9).all()


@pytest.mark.parametrize("m", [4, 9, 19])
def test_twenty_thousand_random_problems_converge(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    batch = 20_000 if m < 19 else 3_000
    rows = torch.randn(batch, m, 24, generator=generator, dtype=torch.float64)
    rows = rows + torch.randn(batch, 1, 24, generator=generator, dtype=torch.float64)
    gap = 3 * torch.randn(batch, m, generator=generator, dtype=torch.float64)
    gram = rows @ rows.transpose(1, 2)
    solution = solve(gram, gap)
    assert solution.converged.all()
    assert solution.feasible.all()
    assert_optimal(gram, gap, solution, 1e-10)


@pytest.mark.parametrize("batch", [5, 200])
def test_the_inverse_is_that_of_the_active_block(batch: int) -> None:
    rows = torch.randn(batch, 6, 10, dtype=torch.float64)
    gram, gap = rows @ rows.transpose(1, 2), torch.randn(batch, 6, dtype=torch.float64)
    solution = solve(gram, gap).solution
    for i in range(batch):
        active = solution.index[i][solution.held[i]]
        slots = solution.held[i].nonzero().squeeze(-1)
        expected = torch.zeros_like(solution.inverse[i])
        expected[slots[:, None], slots] = torch.linalg.inv(gram[i][active][:, active])
        assert torch.allclose(solution.inverse[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("degenerate", [True, False])
@pytest.mark.parametrize("few", [0, 24, 1000])
def test_chunks_and_company_change_nothing(
    degenerate: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, a few at a time, and one by one."""
    rows, gap = integers(-2, 2, 500, 4, 3), integers(-2, 2, 500, 4, seed=1)
    if not degenerate:
        rows, gap = rows + torch.randn(500, 4, 3).double(), gap + torch.randn(500, 4).double()
    gram = rows @ rows.transpose(1, 2)
    monkeypatch.setattr(pivots, "FEW", 0)
    whole = solve(gram, gap)
    monkeypatch.setattr(pivots, "FEW", few)
    monkeypatch.setattr(pivots, "CHUNK_NUMBERS", 25 * (7 if few < 500 else 500))
    parts = solve(gram, gap)
    assert torch.equal(whole.feasible, parts.feasible)
    assert whole.converged.all() and parts.converged.all()
    assert 0.1 < whole.feasible.double().mean() < 0.99
    # Of equal constraints any may be the active one; what they move is the same.
    moved = [(gram @ found.multipliers.unsqueeze(-1)).squeeze(-1) for found in (whole, parts)]
    torch.testing.assert_close(*moved, rtol=1e-9, atol=1e-9)
    if not degenerate:
        assert torch.equal(whole.active, parts.active)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_no_problems(m: int) -> None:
    solution = solve(
        torch.zeros(0, m, m, dtype=torch.float64), torch.zeros(0, m, dtype=torch.float64)
    )
    assert solution.multipliers.shape == solution.active.shape == (0, m)
    assert solution.feasible.shape == solution.converged.shape == (0,)


def test_running_out_of_pivots_is_said() -> None:
    rows = torch.randn(50, 8, 12, dtype=torch.float64)
    gram, gap = rows @ rows.transpose(1, 2), torch.ones(50, 8, dtype=torch.float64)
    assert solve(gram, gap).converged.all()
    assert not solve(gram, gap, max_pivots=1).converged.any()


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_units_do_not_matter(factor: float) -> None:
    """M → c² M gives λ → λ / c², with the same verdict: distances a million times as long."""
    rows, gap = integers(-2, 2, 300, 4, 3), integers(-2, 2, 300, 4, seed=1)
    gram = rows @ rows.transpose(1, 2)
    here = solve(gram, gap)
    there = solve(factor**2 * gram, gap)
    assert torch.equal(here.feasible, there.feasible)
    assert torch.allclose(here.multipliers, there.multipliers * factor**2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_kkt_residual_sees_every_kind_of_violation(scale: float) -> None:
    gram = torch.eye(2, dtype=torch.float64)[None] * 4 / scale
    gap = torch.tensor([[2.0, -2.0]], dtype=torch.float64)

    def of(*multipliers: float) -> float:
        scaled = scale * torch.tensor([multipliers], dtype=torch.float64)
        return float(residual(gram, gap, scaled))

    assert of(0.5, 0.0) == 0
    # In units of the length 2: g = (1, −1); a slack is over the largest gap and its own.
    assert of(0.0, 0.0) == pytest.approx(1 / 2)
    # λᵀs over λᵀMλ: half of the edit that is needed, and twice of it.
    assert of(0.25, 0.0) == pytest.approx(1)
    assert of(1.0, 0.0) == pytest.approx(2 / 4)
    # λ over the largest.
    assert of(0.5, -0.1) == pytest.approx(0.2)


def test_kkt_residual_is_not_blinded_by_a_constraint_that_does_not_matter() -> None:
    """Neither by one without length, nor by one that holds by far."""
    gap = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    wrong = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    for length in (0.0, 1e-20):
        gram = torch.diag(torch.tensor([1.0, length], dtype=torch.float64))[None]
        assert float(residual(gram, gap, wrong)) == pytest.approx(0.5)
        assert float(residual(gram, gap, wrong / 2)) == 0
