"""A mean with its interval, for results that do not hold estimates yet."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lrqp_torch.study.estimates import bootstrap_mean


@dataclass(frozen=True)
class Mean:
    """A mean over held-out prompts.

    Attributes:
        value: the mean.
        lower: lower end of its bootstrap 95 % interval.
        upper: upper end.
    """

    value: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Tensor, generator: torch.Generator) -> Self:
        """The mean of values (n,), and its interval."""
        return cls(values.double().mean().item(), *bootstrap_mean(values, generator))
