"""Confidence intervals: against published values, their definitions, and their coverage."""

import math

import pytest
import torch
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, StatisticsError, WidthError
from lrqp_torch.study import estimates
from lrqp_torch.study.estimates import NORMAL_QUANTILE, bootstrap, wilson


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("successes", "n", "lower", "upper"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_values(successes: int, n: int, lower: float, upper: float) -> None:
    """R. G. Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson(successes, n) == pytest.approx((lower, upper), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 3), (7, 10), (40, 500), (499, 500)])
def test_wilsons_ends_are_where_the_score_test_just_rejects(successes: int, n: int) -> None:
    share = successes / n
    for end in wilson(successes, n):
        score = abs(share - end) / math.sqrt(end * (1 - end) / n)
        assert score == pytest.approx(NORMAL_QUANTILE, rel=1e-9)


def test_wilson_is_symmetric_and_stays_within_bounds() -> None:
    for successes in range(11):
        lower, upper = wilson(successes, 10)
        assert 0 <= lower <= successes / 10 <= upper <= 1
        assert wilson(10 - successes, 10) == pytest.approx((1 - upper, 1 - lower), abs=1e-12)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


def test_wilson_says_nothing_of_no_prompts_and_refuses_impossible_counts() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for successes, n in ((3, 2), (-1, 5)):
        with pytest.raises(StatisticsError, match="successes"):
            wilson(successes, n)


def test_bootstrap_repeats_by_seed() -> None:
    values = torch.randn(80, generator=seeded(5))
    first = bootstrap(values, seeded(1))
    assert bootstrap(values, seeded(1)) == first
    assert bootstrap(values, seeded(2)) != first
    assert bootstrap(values.float(), seeded(1)) == first


def test_bootstrap_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = torch.randn(400, generator=seeded(3), dtype=torch.float64) * 2 + 7
    lower, upper = bootstrap(values, seeded(), resamples=4000)
    expected = 2 * NORMAL_QUANTILE * values.std(correction=0) / len(values) ** 0.5
    assert upper - lower == pytest.approx(float(expected), rel=0.06)
    assert (lower + upper) / 2 == pytest.approx(float(values.mean()), abs=0.02)


def test_bootstrap_covers_the_true_mean_and_ratio_nineteen_times_in_twenty() -> None:
    generator = seeded(11)
    runs, covered_mean, covered_ratio = 400, 0, 0
    for _ in range(runs):
        x = torch.rand(60, generator=generator, dtype=torch.float64)
        y = x + 2 * torch.rand(60, generator=generator, dtype=torch.float64)
        lower, upper = bootstrap(x, generator, resamples=300)
        covered_mean += lower <= 0.5 <= upper
        lower, upper = bootstrap(x, generator, over=y, resamples=300)
        covered_ratio += lower <= 0.5 / 1.5 <= upper
    # Four standard errors of a binomial share are 0.044; the bootstrap itself is a little short.
    assert 0.895 < covered_mean / runs < 0.99
    assert 0.895 < covered_ratio / runs < 0.99


def test_ratio_resamples_the_same_prompts_for_both() -> None:
    below = torch.rand(50, generator=seeded(2), dtype=torch.float64) + 0.1
    assert bootstrap(3 * below, seeded(), over=below) == pytest.approx((3, 3), rel=1e-12)


def test_ratio_of_an_undetermined_denominator_is_unbounded() -> None:
    zeros, ones = torch.zeros(5), torch.ones(5)
    assert bootstrap(ones, seeded(), over=zeros) == (math.inf, math.inf)
    assert bootstrap(zeros, seeded(), over=zeros) == (-math.inf, math.inf)


def test_one_value_is_its_own_interval() -> None:
    assert bootstrap(torch.tensor([2.5]), seeded()) == (2.5, 2.5)


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(64, generator=seeded(4), dtype=torch.float64)
    whole = bootstrap(values, seeded(9), resamples=100)
    monkeypatch.setattr(estimates, "_MOST_DRAWS", 64 * 16)
    assert bootstrap(values, seeded(9), resamples=100) == whole


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (torch.zeros(0), StatisticsError),
        (torch.zeros(2, 2), WidthError),
        (torch.tensor([1.0, math.nan]), NonFiniteError),
        (torch.tensor([1.0, math.inf]), NonFiniteError),
    ],
)
def test_bad_values_are_named(values: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="values"):
        bootstrap(values, seeded())
    with pytest.raises(error, match="numerator"):
        bootstrap(values, seeded(), over=values)


def test_unequal_lengths_and_no_resamples_are_refused() -> None:
    with pytest.raises(WidthError, match="3 prompts and denominator 4"):
        bootstrap(torch.ones(3), seeded(), over=torch.ones(4))
    with pytest.raises(StatisticsError, match="at least 1"):
        bootstrap(torch.ones(3), seeded(), resamples=0)


def test_the_mean_of_lengths_outside_of_a_metric_has_no_value() -> None:
    found = estimates.Estimate.mean(torch.tensor([1.0, torch.inf]), torch.Generator())
    assert (found.value, found.interval, found.n) == (None, None, 2)
    with pytest.raises(NonFiniteError):
        estimates.Estimate.mean(torch.tensor([1.0, torch.nan]), torch.Generator())


def test_the_mean_of_no_prompts_has_no_value() -> None:
    found = estimates.Estimate.mean(torch.zeros(0), torch.Generator().manual_seed(0))
    assert found == estimates.Estimate(None, None, None, 0)
