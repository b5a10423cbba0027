"""Covariance and Mahalanobis: streaming, shrinkage and the metric, against textbook formulas."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from lrqp_torch import LRQP, Covariance, LinearProbe, Mahalanobis
from lrqp_torch.errors import CovarianceError, NonFiniteError, WidthError

MOMENTS = ("mean", "second", "third", "fourth")


def sample(n: int, width: int, seed: int = 0) -> Tensor:
    """Correlated, skewed activations, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    base = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return (base + 0.3 * base.square()) @ mixing + 2


def ledoit_wolf_weight(x: Tensor) -> float:
    """Ledoit and Wolf 2004, lemma 3.2 to 3.4, sample by sample."""
    n, d = x.shape
    rows = (x - x.mean(0)).numpy()
    S = rows.T @ rows / n
    m = np.trace(S) / d
    d2 = ((S - m * np.eye(d)) ** 2).sum() / d
    b_bar2 = sum(((np.outer(row, row) - S) ** 2).sum() / d for row in rows) / n**2
    return float(min(b_bar2, d2) / d2)


def oas_weight(x: Tensor) -> float:
    """Chen, Wiesel, Eldar and Hero 2010, eq. 23."""
    n, p = x.shape
    S = np.cov(x.numpy().T, bias=True).reshape(p, p)
    tr_s2, tr_s = np.trace(S @ S), np.trace(S)
    rho = ((1 - 2 / p) * tr_s2 + tr_s**2) / ((n + 1 - 2 / p) * (tr_s2 - tr_s**2 / p))
    return float(min(rho, 1))


def moments(accumulator: Covariance) -> list[Tensor]:
    return [getattr(accumulator, name) for name in MOMENTS]


def assert_same_moments(a: Covariance, b: Covariance, rtol: float = 1e-11) -> None:
    assert a.n_samples == b.n_samples
    for one, other in zip(moments(a), moments(b), strict=True):
        assert torch.allclose(one, other, rtol=rtol, atol=rtol * float(one.abs().max()))


def test_moments_are_the_documented_sums() -> None:
    x = sample(50, 5)
    accumulator = Covariance(5).update(x)
    y = x - x.mean(0)
    squares = y.square().sum(-1)
    assert accumulator.n_samples == 50
    assert torch.allclose(accumulator.mean, x.mean(0))
    assert torch.allclose(accumulator.second, sum(torch.outer(row, row) for row in y))
    assert torch.allclose(accumulator.third, (squares[:, None] * y).sum(0))
    assert torch.allclose(accumulator.fourth, squares.square().sum())


@pytest.mark.parametrize(
    "sizes", [[100], [1] * 100, [1, 99], [99, 1], [0, 40, 0, 60], [7] * 14 + [2]]
)
def test_streaming_equals_one_batch(sizes: list[int]) -> None:
    x = sample(100, 6)
    accumulator = Covariance(6)
    for part in x.split(sizes):
        assert accumulator.update(part) is accumulator
    assert_same_moments(accumulator, Covariance(6).update(x))


@pytest.mark.parametrize("sizes", [[700], [1, 256, 257, 186], [255, 1, 444], [300, 400]])
def test_more_activations_than_are_added_together(sizes: list[int]) -> None:
    """By the moments' formulas; and nothing is added of a batch that ends in NaN."""
    x, accumulator = sample(700, 6), Covariance(6)
    for part in x.split(sizes):
        accumulator.update(part)
    broken = sample(700, 6)
    broken[-1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 of 700.*\[699\]"):
        accumulator.update(broken)
    y = x - x.mean(0)
    squares = y.square().sum(1)
    assert accumulator.n_samples == 700
    assert torch.allclose(accumulator.mean, x.mean(0))
    assert torch.allclose(accumulator.second, y.T @ y)
    assert torch.allclose(accumulator.third, squares @ y)
    assert torch.allclose(accumulator.fourth, squares.square().sum())


def test_merging_is_associative_and_commutative() -> None:
    a, b, c = (sample(n, 5, seed) + seed for seed, n in enumerate((30, 50, 7)))

    def new(x: Tensor) -> Covariance:
        return Covariance(5).update(x)

    left = new(a).merge(new(b)).merge(new(c))
    right = new(a).merge(new(b).merge(new(c)))
    swapped = new(c).merge(new(a)).merge(new(b))
    whole = new(torch.cat([a, b, c]))
    for other in (right, swapped, whole):
        assert_same_moments(left, other)
    before = new(b)
    other = new(b)
    new(a).merge(other)
    assert_same_moments(before, other, rtol=0)


def test_merging_with_nothing_changes_nothing() -> None:
    x = sample(20, 3)
    full = Covariance(3).update(x)
    assert_same_moments(full.merge(Covariance(3)), Covariance(3).update(x), rtol=0)
    assert_same_moments(Covariance(3).merge(Covariance(3).update(x)), full, rtol=1e-15)


@pytest.mark.parametrize("shrinkage", ["ledoit_wolf", "oas", 0.0])
def test_a_huge_mean_costs_no_accuracy(shrinkage: str | float) -> None:
    """Offset 1e6 at unit scale: the raw second moment would lose 12 of 16 digits."""
    x = sample(400, 5)
    # A multiple of a power of two keeps x + offset exact, so only the method could lose digits.
    x = (x * 2**20).round() / 2**20
    offset = torch.tensor([1e6, -1e6, 0.0, 1e6, 524288.0], dtype=torch.float64)
    near, far = Covariance(5), Covariance(5)
    for part in x.split(37):
        near.update(part)
        far.update(part + offset)
    near_metric, far_metric = near.finish(shrinkage), far.finish(shrinkage)
    assert torch.allclose(near_metric.covariance, far_metric.covariance, rtol=1e-8, atol=1e-8)
    assert far_metric.shrinkage == pytest.approx(near_metric.shrinkage, rel=1e-8)


@pytest.mark.parametrize(("n", "width"), [(10, 20), (60, 20), (1000, 8), (5, 2)])
def test_ledoit_wolf_weight_is_the_textbook_one(n: int, width: int) -> None:
    x = sample(n, width)
    metric = Mahalanobis.fit(x)
    weight = ledoit_wolf_weight(x)
    assert 0 < weight < 1
    assert metric.shrinkage == pytest.approx(weight, rel=1e-9)
    S = torch.cov(x.T, correction=0)
    target = S.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    assert torch.allclose(metric.covariance, (1 - weight) * S + weight * target)
    streamed = Covariance(width)
    for part in x.split(3):
        streamed.update(part)
    assert streamed.finish().shrinkage == pytest.approx(weight, rel=1e-8)


@pytest.mark.parametrize(("n", "width"), [(10, 20), (60, 20), (1000, 8), (5, 2)])
def test_oas_weight_is_the_textbook_one(n: int, width: int) -> None:
    x = sample(n, width)
    metric = Mahalanobis.fit(x, "oas")
    assert metric.shrinkage == pytest.approx(oas_weight(x), rel=1e-9)
    trace = float(torch.cov(x.T, correction=0).trace())
    assert float(metric.covariance.trace()) == pytest.approx(trace, rel=1e-12)


@pytest.mark.parametrize("shrinkage", [0, 0.0, 0.25, 1, 1.0])
def test_a_fixed_weight_is_used_as_given(shrinkage: float) -> None:
    x = sample(50, 4)
    metric = Mahalanobis.fit(x, shrinkage)
    S = torch.cov(x.T, correction=0)
    target = S.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    assert torch.allclose(metric.covariance, (1 - shrinkage) * S + shrinkage * target)
    assert metric.shrinkage == shrinkage
    assert metric.n_samples == 50
    assert torch.allclose(metric.mean, x.mean(0))


def test_shrinkage_makes_few_samples_regular() -> None:
    x = sample(5, 30)
    assert torch.linalg.matrix_rank(Mahalanobis.fit(x, 0.0).covariance) == 4
    for shrinkage in ("ledoit_wolf", "oas"):
        assert torch.linalg.matrix_rank(Mahalanobis.fit(x, shrinkage).covariance) == 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_activations_are_accumulated_in_float64(dtype: torch.dtype) -> None:
    # Squares of 300 overflow float16.
    x = (100 * sample(200, 6)).clamp(-3e4, 3e4).to(dtype)
    metric = Mahalanobis.fit(x)
    assert metric.covariance.dtype == torch.float64
    expected = Mahalanobis.fit(x.double())
    assert torch.equal(metric.covariance, expected.covariance)
    assert torch.isfinite(metric.covariance).all()


def test_distance_is_the_quadratic_form() -> None:
    metric = Mahalanobis.fit(sample(100, 6), 0.1)
    delta = torch.randn(3, 4, 6, dtype=torch.float64)
    inverse = torch.linalg.inv(metric.covariance)
    expected = torch.einsum("abi,ij,abj->ab", delta, inverse, delta).sqrt()
    assert torch.allclose(metric.distance(delta), expected)
    assert torch.allclose(metric.distance(delta.float()), expected, rtol=1e-5)
    assert metric.distance(torch.zeros(2, 6)).tolist() == [0, 0]
    assert metric.distance(delta[0, 0]).shape == ()


def test_distance_out_of_the_range_of_a_singular_metric_is_infinite() -> None:
    metric = Mahalanobis(torch.diag(torch.tensor([4.0, 1.0, 0.0])))
    delta = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1e-3], [2, 0, 1]])
    expected = torch.tensor([1.0, 3.0, float("inf"), float("inf")], dtype=torch.float64)
    assert torch.allclose(metric.distance(delta), expected)


def test_euclidean_is_the_identity() -> None:
    metric = Mahalanobis.euclidean(5)
    assert torch.equal(metric.covariance, torch.eye(5, dtype=torch.float64))
    delta = torch.randn(10, 5, dtype=torch.float64)
    assert torch.allclose(metric.distance(delta), delta.norm(dim=-1))
    assert metric.mean is None


def test_the_distance_follows_a_metric_that_changes() -> None:
    """Its eigenbasis is kept, and made anew where Σ is written over, replaced or copied."""
    delta = torch.randn(5, 6, dtype=torch.float64)
    root = torch.randn(6, 6, dtype=torch.float64)
    metric = Mahalanobis(root @ root.T + torch.eye(6))
    twin, first = copy.deepcopy(metric), metric.distance(delta)
    assert torch.equal(metric.distance(delta), first)
    metric.covariance.copy_(torch.eye(6))
    assert torch.allclose(metric.distance(delta), delta.norm(dim=-1))
    metric.covariance = 4 * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(metric.distance(delta), delta.norm(dim=-1) / 2)
    assert torch.equal(twin.distance(delta), first)
    assert torch.equal(copy.deepcopy(twin).distance(delta), first)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "to_half", "to_bfloat16"])
def test_the_metric_stays_float64_whatever_its_owner_becomes(convert: str) -> None:
    x = sample(100, 6)
    edit = LRQP.fit(x, torch.arange(100) % 2)
    covariance, mean = edit.metric.covariance.clone(), edit.metric.mean.clone()
    conversions = {
        "half": lambda: edit.half(),
        "bfloat16": lambda: edit.bfloat16(),
        "float": lambda: edit.float(),
        "to_half": lambda: edit.to(torch.float16),
        "to_bfloat16": lambda: torch.nn.Sequential(edit).to(dtype=torch.bfloat16),
    }
    conversions[convert]()
    assert torch.equal(edit.metric.covariance, covariance)
    assert torch.equal(edit.metric.mean, mean)
    assert edit.metric.covariance.dtype == edit.metric.mean.dtype == torch.float64
    assert edit.probe.weight.dtype != torch.float64
    assert edit.log_odds.dtype == torch.float64


def test_moving_the_metric_moves_it() -> None:
    metric = Mahalanobis.fit(sample(20, 3)).to("meta")
    assert metric.covariance.device.type == metric.mean.device.type == "meta"
    assert metric.covariance.dtype == torch.float64


def test_metric_state_round_trip() -> None:
    one, other = Mahalanobis.fit(sample(20, 3)), Mahalanobis.fit(sample(30, 3, seed=1))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.covariance, other.covariance)
    assert torch.equal(one.mean, other.mean)


def test_one_dimension_and_constant_coordinates() -> None:
    x = torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.float64)
    for shrinkage in ("ledoit_wolf", "oas", 0.5):
        assert float(Mahalanobis.fit(x, shrinkage).covariance) == pytest.approx(8 / 3)
    with_constant = torch.cat([sample(50, 3), torch.full((50, 1), 3.0).double()], 1)
    metric = Mahalanobis.fit(with_constant, 0.0)
    assert metric.covariance[3].abs().max() == 0


def test_bad_batches_are_named_and_leave_the_accumulator_as_it_was() -> None:
    accumulator = Covariance(3).update(sample(10, 3))
    before = [moment.clone() for moment in moments(accumulator)]
    broken = sample(5, 3)
    broken[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 of 5.*\[3\]"):
        accumulator.update(broken)
    with pytest.raises(WidthError, match=r"\(n, 3\)"):
        accumulator.update(sample(5, 4))
    with pytest.raises(WidthError, match=r"\(n, 3\)"):
        accumulator.update(torch.zeros(3))
    with pytest.raises(WidthError, match="3 and 4"):
        accumulator.merge(Covariance(4))
    assert accumulator.n_samples == 10
    assert all(torch.equal(a, b) for a, b in zip(before, moments(accumulator), strict=True))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples(n: int) -> None:
    with pytest.raises(CovarianceError, match=f"at least 2 activations, got {n}"):
        Covariance(3).update(sample(n, 3)).finish()
    with pytest.raises(CovarianceError, match="at least 2"):
        Mahalanobis.fit(sample(n, 3))


@pytest.mark.parametrize("shrinkage", ["lw", -0.1, 1.1, float("nan"), None])
def test_unknown_shrinkage(shrinkage: object) -> None:
    with pytest.raises(CovarianceError, match="shrinkage must be"):
        Mahalanobis.fit(sample(10, 3), shrinkage)


def test_identical_activations_have_no_metric() -> None:
    with pytest.raises(CovarianceError, match="zero"):
        Mahalanobis.fit(torch.ones(10, 3))


BAD_METRICS = {
    "not square": (torch.zeros(3, 4), WidthError, "square"),
    "empty": (torch.zeros(0, 0), WidthError, "square"),
    "not a matrix": (torch.zeros(3), WidthError, "square"),
    "NaN": (torch.full((2, 2), float("nan")), NonFiniteError, "NaN"),
    "infinity": (torch.full((2, 2), float("inf")), NonFiniteError, "infinity"),
    "not symmetric": (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), CovarianceError, "symmetric"),
    "negative eigenvalue": (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), CovarianceError, "negative"),
    "slightly negative": (torch.diag(torch.tensor([1.0, -1e-3])), CovarianceError, "negative"),
    "zero": (torch.zeros(2, 2), CovarianceError, "zero"),
}


@pytest.mark.parametrize("name", BAD_METRICS)
def test_a_matrix_that_is_no_covariance_is_refused(name: str) -> None:
    matrix, error, message = BAD_METRICS[name]
    with pytest.raises(error, match=message):
        Mahalanobis(matrix)


def test_bad_means_and_displacements_are_named() -> None:
    with pytest.raises(WidthError, match="mean"):
        Mahalanobis(torch.eye(3), torch.zeros(2))
    with pytest.raises(NonFiniteError, match="mean"):
        Mahalanobis(torch.eye(3), torch.full((3,), float("nan")))
    with pytest.raises(WidthError, match="width 3"):
        Mahalanobis.euclidean(3).distance(torch.zeros(5, 4))
    with pytest.raises(WidthError, match=r"\(n, d\)"):
        Mahalanobis.fit(torch.zeros(5))
    with pytest.raises(WidthError, match="metric has width 3"):
        LRQP(LinearProbe(4, 2), Mahalanobis.euclidean(3))


def test_infinities_that_cancel_are_found_and_large_finite_numbers_are_not_mistaken() -> None:
    x = torch.randn(6, 3)
    x[2, 0], x[4, 0] = float("inf"), float("-inf")
    with pytest.raises(NonFiniteError, match=r"2 of 6.*\[2, 4\]"):
        Covariance(3).update(x)
    half = torch.full((50, 4), 6e4, dtype=torch.float16)  # its sum overflows float16
    half[::2] /= 2
    assert Covariance(4).update(half).n_samples == 50


def test_finishing_takes_two_and_a_half_matrices() -> None:
    """Of memory, moments included, at widths where rows that wait are no more than a quarter."""
    width, held, most = 1024, 0, 0
    x = torch.randn(8, width)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as run:
        Covariance(width).update(x).finish(0.1)
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert 2 * 8 * width**2 <= most <= 2.5 * 8 * width**2


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_squares_that_do_not_fit_are_refused(scale: float) -> None:
    """Of them a shrinkage of 0 was made."""
    x = scale * torch.randn(40, 5, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="do not fit"):
        Mahalanobis.fit(x)


def test_what_is_no_activation_is_refused() -> None:
    x = torch.randn(40, 5)
    for given in (x > 0, x.to(torch.complex64)):
        with pytest.raises(WidthError, match="expected activations"):
            Covariance(5).update(given)
