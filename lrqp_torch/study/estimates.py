"""Numbers with their 95 % intervals: Wilson's for shares, the bootstrap's for means and ratios."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, StatisticsError, WidthError

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054
"""Two-sided 95 % point of the standard normal distribution."""

_MOST_DRAWS = 4_000_000
"""Indices drawn at once; keeps a bootstrap of many prompts within some tens of megabytes."""


@dataclass(frozen=True)
class Estimate:
    """A number measured on prompts, with its 95 % interval.

    Attributes:
        value: the number; None where no prompt says anything about it.
        lower: lower end of the interval; None where it is not known or not finite.
        upper: upper end.
        n: prompts that it was measured on.
    """

    value: float | None
    lower: float | None
    upper: float | None
    n: int

    @property
    def interval(self) -> list[float] | None:
        """Both ends, or None where one is not known."""
        return None if self.lower is None or self.upper is None else [self.lower, self.upper]

    @property
    def known(self) -> float:
        """The value where it must be there.

        Raises:
            StatisticsError: no prompt says anything about it.
        """
        if self.value is None:
            raise StatisticsError("this number was measured on no prompt, so it has no value")
        return self.value

    @property
    def certain(self) -> float:
        """The end of the interval that is nearer to 0; 0 where it includes 0 or is not known."""
        lower, upper = self.interval or [0.0, 0.0]
        return 0.0 if lower <= 0 <= upper else min(lower, upper, key=abs)

    @classmethod
    def share(cls, true: Tensor) -> Self:
        """The share of a BoolTensor (n,) that is true, with Wilson's interval."""
        return cls.count(int(true.sum()), len(true))

    @classmethod
    def count(cls, successes: int, n: int) -> Self:
        """The share ``successes / n``, with Wilson's interval; no value where n is 0."""
        return cls(successes / n if n else None, *wilson(successes, n), n)

    @classmethod
    def mean(cls, values: Tensor, generator: torch.Generator) -> Self:
        """The mean of (n,) values, with its bootstrap interval."""
        return cls(values.double().mean().item(), *bootstrap_mean(values, generator), len(values))

    @classmethod
    def ratio(cls, numerator: Tensor, denominator: Tensor, generator: torch.Generator) -> Self:
        """mean(numerator) / mean(denominator) over the same n prompts, with its bootstrap interval.

        There is no value where the denominator's mean is 0, and no end that is infinite.
        """
        below = denominator.double().mean().item()
        value = numerator.double().mean().item() / below if below else None
        ends = bootstrap_ratio(numerator, denominator, generator)
        lower, upper = (end if math.isfinite(end) else None for end in ends)
        return cls(value, lower, upper, len(numerator))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval for a share.

    With p = successes / n and z the normal quantile, the interval is
    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n). Unlike the textbook p ± z·SE it stays
    within [0, 1] and does not shrink to a point at p = 0 or 1.

    Args:
        successes: prompts counted.
        n: prompts in all.

    Returns:
        Lower and upper end of the 95 % interval; (0, 1) where n is 0, which says nothing.

    Raises:
        StatisticsError: not 0 <= successes <= n.

    Source: E. B. Wilson, 1927, Journal of the American Statistical Association 22.
    """
    if not 0 <= successes <= n:
        raise StatisticsError(f"a share needs 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    z2 = NORMAL_QUANTILE**2
    share = successes / n
    centre = share + z2 / (2 * n)
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    lower, upper = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    # The ends are exactly 0 and 1 there; rounding would leave 1e-17.
    return (
        0.0 if successes == 0 else max(lower, 0.0),
        1.0 if successes == n else min(upper, 1.0),
    )


def bootstrap_mean(
    values: Tensor, generator: torch.Generator, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: (n,), one a prompt.
        generator: of the resampling; the same seed gives the same interval.
        resamples: how many times n prompts are drawn with replacement.

    Returns:
        The 2.5 % and 97.5 % quantiles of the resampled means.

    Raises:
        WidthError: not one dimension.
        StatisticsError: no values.
        NonFiniteError: NaN or infinity.

    Source: B. Efron, 1979, Annals of Statistics 7.
    """
    means = _resampled_means(_checked(values, "values")[:, None], generator, resamples)
    return _percentiles(means[:, 0])


def bootstrap_ratio(
    numerator: Tensor, denominator: Tensor, generator: torch.Generator, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a ratio of means, over the same resampled prompts.

    Args:
        numerator: (n,), one a prompt.
        denominator: (n,), of the same prompts.
        generator: of the resampling; the same seed gives the same interval.
        resamples: how many times n prompts are drawn with replacement.

    Returns:
        The 2.5 % and 97.5 % quantiles of mean(numerator) / mean(denominator). Where the
        denominator's mean changes sign between resamples the ends are wide or infinite: the ratio
        is then not determined by the data.

    Raises:
        WidthError: not one dimension, or of different lengths.
        StatisticsError: no values.
        NonFiniteError: NaN or infinity.
    """
    above, below = _checked(numerator, "numerator"), _checked(denominator, "denominator")
    if len(above) != len(below):
        raise WidthError(
            f"numerator has {len(above)} prompts and denominator {len(below)}; give one value of "
            "each for the same prompts"
        )
    means = _resampled_means(torch.stack([above, below], dim=1), generator, resamples)
    # 0 / 0 says nothing about the ratio; such resamples are left out.
    ratios = means[:, 0] / means[:, 1]
    known = ratios[~ratios.isnan()]
    return _percentiles(known) if len(known) else (-math.inf, math.inf)


def _checked(values: Tensor, name: str) -> Tensor:
    """The values in float64 on the CPU, where the generator is."""
    if values.ndim != 1:
        raise WidthError(f"{name} must be (n,), got {tuple(values.shape)}")
    if len(values) == 0:
        raise StatisticsError(f"{name} is empty: there is nothing to resample")
    wide = values.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError(f"{name} holds NaN or infinity; leave those prompts out and say so")
    return wide


def _resampled_means(columns: Tensor, generator: torch.Generator, resamples: int) -> Tensor:
    """Means of each column over resampled rows, (resamples, columns)."""
    if resamples < 1:
        raise StatisticsError(f"the bootstrap needs at least 1 resample, got {resamples}")
    n = len(columns)
    chunk = max(1, _MOST_DRAWS // n)
    means = []
    for start in range(0, resamples, chunk):
        draws = torch.randint(n, (min(chunk, resamples - start), n), generator=generator)
        means.append(torch.stack([column[draws].mean(1) for column in columns.T], dim=1))
    return torch.cat(means)


def _percentiles(samples: Tensor) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    ordered = samples.sort().values
    # Order statistics, without interpolation, so that infinite samples do not turn into NaN.
    last = len(ordered) - 1
    return (
        ordered[math.floor(tail * last)].item(),
        ordered[math.ceil((1 - tail) * last)].item(),
    )
