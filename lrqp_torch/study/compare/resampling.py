"""Bootstrap intervals of many measures over the same resampled prompts."""

import torch
from torch import Tensor

from lrqp_torch.errors import StatisticsError
from lrqp_torch.study.dose import Mean

RESAMPLES = 1000


class Resampling:
    """Prompts drawn with replacement, the same ones for every measure.

    A mean over a resample is a weighted mean over the prompts, so differences and ratios between
    edits are paired: both are read from the same prompts.

    Args:
        n: prompts.
        generator: of the draws.
        resamples: how many times n prompts are drawn.

    Attributes:
        weights: share of each prompt in each resample, (resamples, n).

    Raises:
        StatisticsError: no prompts.
    """

    def __init__(self, n: int, generator: torch.Generator, resamples: int = RESAMPLES) -> None:
        if n < 1:
            raise StatisticsError("there are no prompts to resample")
        drawn = torch.randint(n, (resamples, n), generator=generator)
        ones = torch.ones(resamples, n, dtype=torch.float64)
        self.weights = torch.zeros_like(ones).scatter_add_(1, drawn, ones) / n

    def mean(self, values: Tensor) -> Mean:
        """The mean of values, (n,), with its percentile interval."""
        wide = values.double().cpu()
        return interval(float(wide.mean()), self.weights @ wide)

    def means(self, values: Tensor) -> Tensor:
        """The means of columns (n, k) in each resample, (resamples, k)."""
        return self.weights @ values.double().cpu()


def interval(value: float, resampled: Tensor) -> Mean:
    """A value with the 2.5 % and 97.5 % quantiles of its resamples, (R,)."""
    ends = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype))
    return Mean(value, float(ends[0]), float(ends[1]))
