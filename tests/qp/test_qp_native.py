"""The compiled solver and the one in torch are one algorithm."""

import copy
import ctypes
import os
import shutil
from unittest import mock

import pytest
import torch
from qp_reference import Problem, barely_reachable, random_problem

from lrqp_torch import LRQP, LinearProbe, Mahalanobis, MahalanobisQP, Solution, Status, files
from lrqp_torch.qp import ProbeGeometry, TotalOdds, native
from lrqp_torch.qp.fused import OddsRule
from lrqp_torch.qp.pivots import find_active_sets
from lrqp_torch.stream.intervene import Placement

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")
KINDS = ["plain", "copies", "nearly equal", "low rank", "far apart", "weakly active"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.skipif(
    os.name != "posix" or os.environ.get(files.SWITCH) == "0" or shutil.which("cc") is None,
    reason="no C compiler",
)
def test_where_there_is_a_compiler_the_source_compiles() -> None:
    """Else all would go by torch's operations, and the tests of the compiled call be skipped."""
    assert native.library() is not None


def problem_of_kind(kind: str, n_classes: int, dtype: torch.dtype, batch: int = 40) -> Problem:
    width = 48 if kind == "far apart" else 12
    task = random_problem(n_classes, width, batch, seed=n_classes, condition=100)
    odd = task.weight[1::2]
    if kind == "copies":
        task.weight[1::2] = task.weight[: len(odd)]
    if kind == "nearly equal":
        task.weight[1::2] = task.weight[0::2][: len(odd)] + 1e-6 * torch.randn_like(odd)
    if kind == "low rank":
        basis = torch.linalg.qr(torch.randn(12, 3).double()).Q
        task.covariance = basis @ basis.T
    if kind == "far apart":
        task.weight = task.weight * torch.logspace(-2, 2, n_classes).double()[:, None]
        task.covariance = task.covariance * 1e20
    if kind == "weakly active":
        task.weight, task.bias = task.weight.round(), task.bias.round()
        task.x, task.floor = task.x.round(), task.floor.round()
    task.x = task.x.to(dtype)
    return task


def solve(task: Problem, path: str, monkeypatch: pytest.MonkeyPatch, **given: object) -> Solution:
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    with monkeypatch.context() as patch:
        if path != "compiled":
            patch.setattr(native, "library", lambda: None)
        qp = MahalanobisQP(len(task.bias))
        return qp.solve(task.x, task.target, task.floor, geometry, **given)  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 3, 8, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_gives_the_same_edit_and_the_same_verdict(
    kind: str, n_classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = problem_of_kind(kind, n_classes, dtype)
    found, other = (solve(task, p, monkeypatch) for p in ("compiled", "torch"))
    # Each aims a little above the floor, and once more where rounding leaves it short.
    coarse = max(torch.finfo(dtype).eps, 1e-9)
    done = found.status == Status.SOLVED
    assert torch.equal(found.status, other.status)
    size = 1 + found.x_new.double().norm(dim=-1) + task.x.double().norm(dim=-1)
    off = (found.x_new.double() - other.x_new.double()).norm(dim=-1) / size
    assert bool((off <= 64 * coarse + 1e-8)[done].all())
    for name in ("floor", "log_odds_before", "distance", "euclidean"):
        ours, theirs = getattr(found, name)[done], getattr(other, name)[done]
        torch.testing.assert_close(ours, theirs, rtol=256 * coarse, atol=64 * coarse)
    assert (found.log_odds_after >= found.floor)[done].all()
    kept = (found.status == Status.SATISFIED) | (found.status == Status.INFEASIBLE)
    assert torch.equal(found.x_new[kept], task.x[kept])


@needs_compiler
def test_many_classes_are_solved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_problem(1000, 32, 3, seed=0, condition=10)
    task.weight = 6 * torch.nn.functional.normalize(task.weight, dim=-1)
    task.bias.zero_()
    found, other = (solve(task, path, monkeypatch) for path in ("compiled", "torch"))
    assert torch.equal(found.status, other.status) and torch.equal(found.active, other.active)
    torch.testing.assert_close(found.x_new, other.x_new, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_promise_holds_for_what_is_placed(
    path: str, dtype: torch.dtype, scale: float, n_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = problem_of_kind("plain", n_classes, dtype)
    for base in (None, (3 * torch.randn(task.x.shape)).to(dtype)):
        placing = Placement(base, scale, dtype)
        solution = solve(task, path, monkeypatch, realise=placing)
        assert (solution.status <= Status.SOLVED).all()
        geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
        held = placing(solution.x_new.double())
        moved = solution.status == Status.SOLVED
        after = geometry.margins(held, task.target).amin(-1)
        assert (after >= solution.floor - 1e-11)[moved].all()
        torch.testing.assert_close(solution.log_odds_after[moved], after[moved])


@needs_compiler
@pytest.mark.parametrize("n_classes", [2, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_company_and_threads_change_no_bit(n_classes: int, dtype: torch.dtype) -> None:
    task = random_problem(n_classes, 333, 400, seed=1, condition=10)
    task.x = task.x.to(dtype)
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    qp, threads = MahalanobisQP(n_classes), torch.get_num_threads()
    whole = qp.solve(task.x, task.target, task.floor, geometry)
    try:
        torch.set_num_threads(3)
        again = qp.solve(task.x, task.target, task.floor, geometry)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.x_new, again.x_new)
    for i in (0, 1, 399):
        rows = slice(i, i + 1)
        alone = qp.solve(task.x[rows], task.target[rows], task.floor[rows], geometry)
        assert torch.equal(alone.x_new, whole.x_new[rows])
        assert torch.equal(alone.log_odds_after, whole.log_odds_after[rows])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_read_as_they_lie(dtype: torch.dtype) -> None:
    """Any stride, subnormal numbers, infinity and NaN of the dtype."""
    x = torch.randn(9, 2 * 21).to(dtype)[:, ::2]
    x[0, :4] = torch.tensor([0.0, -0.0, 6e-8, 3e-41]).to(dtype)
    weight, bias = torch.randn(3, 21).double(), torch.randn(3).double()
    expected = torch.nn.functional.linear(x.double(), weight, bias)
    torch.testing.assert_close(native.read(x, weight, bias), expected, rtol=1e-12, atol=1e-12)
    x[1, 0], x[2, 0] = torch.inf, torch.nan
    read = native.read(x, weight, bias)
    assert not torch.isfinite(read[1:3]).any() and torch.isfinite(read[3:]).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    """δ is a whole number along e_0, from a coordinate that holds any number: where the promise
    already has slack, what is stored is what torch would store, ties and subnormals among them.
    """
    start = torch.logspace(-9, 4, 997, dtype=torch.float64) * (-1.0) ** torch.arange(997)
    x = torch.stack([start, torch.zeros(997)], -1).to(dtype)
    weight = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double()
    covariance = torch.ones(2, 2).double() + torch.eye(2).double()
    geometry = ProbeGeometry.build(weight, torch.zeros(2).double(), covariance)
    target = torch.zeros(997, dtype=torch.long)
    solution = MahalanobisQP(2).solve(x, target, 3.0, geometry)
    exact = x.double() + solution.multipliers * geometry.rows[2]
    assert torch.equal(solution.x_new, exact.to(dtype))
    assert (solution.status == Status.SOLVED).all()


@pytest.mark.parametrize("seed", range(12))
def test_no_promise_is_broken(seed: int) -> None:
    """Of problems of all kinds, sizes and dtypes: whatever is no success has a status."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(8):
        kind, n_classes = KINDS[number(0, len(KINDS))], (2, 3, 5, 9, 30)[number(0, 5)]
        task = problem_of_kind(kind, n_classes, DTYPES[number(0, 4)], batch=500)
        geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
        solution = MahalanobisQP(n_classes).solve(task.x, task.target, task.floor, geometry)
        held = geometry.margins(solution.x_new, task.target).amin(-1)
        good = solution.status <= Status.SOLVED
        assert (held >= task.floor)[good].all() and (solution.kkt_residual <= 1e-8)[good].all()
        kept = (solution.status == Status.SATISFIED) | (solution.status == Status.INFEASIBLE)
        assert torch.equal(solution.x_new[kept], task.x[kept])


def test_without_a_compiler_it_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    fresh = native.library.__wrapped__
    monkeypatch.setenv("CC", "no-such-compiler")
    assert fresh() is None
    monkeypatch.setenv("CC", "false")
    assert fresh() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv(files.SWITCH, "0")
    assert fresh() is None


@needs_compiler
def test_it_is_compiled_once_into_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = files.compiled(native.SOURCE, native.constants())
    stamp = first.stat().st_mtime_ns
    assert (
        files.compiled(native.SOURCE, native.constants()) == first
        and first.stat().st_mtime_ns == stamp
    )
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert ctypes.CDLL(str(first)).lrqp_solve


@needs_compiler
def test_a_copy_has_memory_of_its_own() -> None:
    edit = LRQP(LinearProbe(6, 3, dtype=torch.float64), Mahalanobis.euclidean(6))
    x = torch.randn(4, 6)
    before = edit.solve(x, 1)
    other = copy.deepcopy(edit)
    own, theirs = (e.geometry(x.device).shared for e in (edit, other))
    assert own.matrix != theirs.matrix
    assert torch.equal(other.solve(x, 1).x_new, before.x_new)


@needs_compiler
@pytest.mark.parametrize("mirror", [None, False, True])
@pytest.mark.parametrize("n_classes", [2, 5, 40])
@pytest.mark.parametrize("kind", ["plain", "copies"])
def test_one_call_gives_the_derivatives_of_the_operations(
    kind: str, n_classes: int, mirror: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = problem_of_kind(kind, n_classes, torch.float64)
    source = torch.arange(len(task.x)) % (n_classes + 1) - 1
    least = torch.tensor(2.0, dtype=torch.float64)
    rule = None if mirror is None else OddsRule(mirror, least, task.target, source)
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    qp, x = MahalanobisQP(n_classes), task.x.clone().requires_grad_()
    calls = mock.Mock(side_effect=native.gradient)
    monkeypatch.setattr(native, "gradient", calls)
    solution = qp.solve(x, task.target, task.floor if rule is None else rule, geometry)
    names = ["x_new", "multipliers", "squared_distance", "floor", "log_odds_before"]
    outputs = [getattr(solution, name) for name in names if getattr(solution, name).requires_grad]
    assert len(outputs) == (5 if mirror else 4)
    for chosen in (outputs, *([one] for one in outputs)):
        weights = [torch.randn_like(one) for one in chosen]
        (found,) = torch.autograd.grad(chosen, x, weights, retain_graph=True)
        before = calls.call_count
        (other,) = torch.autograd.grad(chosen, x, weights, create_graph=True)
        assert before and calls.call_count == before
        torch.testing.assert_close(found, other.detach(), rtol=1e-9, atol=1e-9)


@needs_compiler
def test_many_active_constraints_are_solved_for_once_with_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = random_problem(60, 64, 24, seed=3, condition=3)
    task.x, task.bias, task.floor = task.x / 9, task.bias / 9, task.floor + 8
    geometry = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    qp, calls = MahalanobisQP(60), mock.Mock(side_effect=native.solve)
    monkeypatch.setattr(native, "solve", calls)
    along = torch.randn(2, 64, dtype=torch.float64) / 100
    rows = torch.arange(24)

    def edit(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Sums, as products of matrices round by how many rows they have.
        x = task.x[rows] + (part.unsqueeze(-1) * along).sum(-2)
        found = qp.solve(x, task.target[rows], task.floor[rows], geometry)
        read = (found.x_new.unsqueeze(-2) * along).sum(-1)
        return read, found.multipliers, found.squared_distance

    part = torch.zeros(24, 2, dtype=torch.float64, requires_grad=True)
    plain, (_, multipliers, _) = edit(part.detach()), edit(part)
    assert calls.call_count == 2
    counts = (multipliers > 0).sum(-1)
    assert counts.max() > 16 and all(map(torch.equal, plain[1:], edit(part)[1:]))
    rows = counts.topk(2).indices
    part = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(edit, part) and torch.autograd.gradgradcheck(edit, part)
    # Alone and in company the derivative has the same bits, and none is kept of other examples.
    (own,) = torch.autograd.grad(edit(part)[0].sum(), part)
    rows, whole = torch.arange(24), torch.zeros(24, 2, dtype=torch.float64, requires_grad=True)
    (every,) = torch.autograd.grad(edit(whole)[0].sum(), whole)
    assert torch.equal(own, every[counts.topk(2).indices])


@needs_compiler
@pytest.mark.parametrize("n_classes", [9, 20, 33])
@pytest.mark.parametrize("apart", [1e-6, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pairs_of_near_equals_end_alike(
    n_classes: int, apart: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residuals are measured with M as it was solved with: then rounding of it decides nothing."""
    task = random_problem(n_classes, 17, 256, seed=n_classes, condition=100)
    generator = torch.Generator().manual_seed(n_classes)
    odd = task.weight[1::2]
    noise = torch.randn(odd.shape, generator=generator, dtype=torch.float64)
    task.weight[1::2] = task.weight[::2][: len(odd)] + apart * noise
    task.x = task.x.to(dtype)
    found, other = (solve(task, path, monkeypatch) for path in ("compiled", "torch"))
    # A residual may still lie at the tolerance itself.
    assert (found.status != other.status).sum() <= 2
    assert (found.status == Status.SOLVED).sum() > 100


def test_a_table_tells_dependent_constraints_as_pivots_do() -> None:
    """In three dimensions any four constraints are dependent; what is out of reach has a proof."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(1118 + 28 * seed)
        task = random_problem(8, 12, 200, seed=seed, condition=100)
        normal = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(normal).Q
        geometry = ProbeGeometry.build(task.weight, task.bias, basis @ basis.T)
        assert geometry.sets is not None
        constraints = geometry.constraints(task.target)
        gap = task.floor.unsqueeze(-1) - geometry.margins(task.x, task.target)
        tabled = geometry.sets.solve(task.target, gap)
        matrix, noise = constraints.gram, constraints.noise
        _, _, feasible, _ = find_active_sets(matrix, noise, task.target, gap, 0, 200)
        assert torch.equal(tabled.feasible, feasible)


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_classes", [3, 5, 12])
@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_infeasible_is_what_was_asked_and_not_what_was_aimed_at(
    path: str, n_classes: int, dtype: torch.dtype, total: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision aims higher for its rounding; the floors themselves may be in reach."""
    task = barely_reachable(n_classes, dtype, total)
    if path != "compiled":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler")
    qp = MahalanobisQP(n_classes, **({"solver": TotalOdds()} if total else {}))
    shape = ProbeGeometry.build(task.weight, task.bias, task.covariance)
    found = qp.solve(task.x, task.target, task.floor, shape)
    unreachable = task.floor == task.floor.max()
    assert torch.equal(found.status == Status.INFEASIBLE, unreachable)
    done = found.status == Status.SOLVED
    assert (found.log_odds_after >= found.floor)[done].all()
    assert dtype != torch.float32 or torch.equal(done, ~unreachable)
    assert torch.equal(found.x_new[unreachable], task.x[unreachable])


@needs_compiler
def test_an_edit_that_takes_a_large_activation_away_keeps_its_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Near 0 half precision is finer than float32 is at x."""
    task = random_problem(8, 3, 128, seed=2, condition=10)
    task.weight = 1e6 * torch.randn(8, 3, generator=torch.Generator().manual_seed(2)).double()
    task.x, task.floor = task.x * torch.tensor([6e4, 10.0, 10.0]), task.floor.abs() / 10 - 5
    task.x = task.x.bfloat16()
    ours, other = (solve(task, path, monkeypatch) for path in ("compiled", "torch"))
    assert torch.equal(ours.status, other.status)
    assert (ours.status == Status.SOLVED).double().mean() > 0.5
