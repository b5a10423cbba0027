"""Numbers with their 95 % intervals, and exact tests of paired answers.

Shares have Wilson's interval, means and ratios of means the bias-corrected and accelerated
bootstrap's (BCa). Where prompts come in groups, such as templates, groups are what is resampled:
prompts of one group are alike, and an interval that forgets it is too narrow for new groups.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from scipy.special import betainc, ndtr, ndtri
from torch import Tensor

from lrqp_torch.errors import NonFiniteError, StatisticsError, WidthError

K = TypeVar("K")

CONFIDENCE = 0.95
RESAMPLES = 1000
"""Behind each bootstrap interval."""
NORMAL_QUANTILE = 1.959963984540054
"""Two-sided 95 % point of the standard normal distribution."""
POWER_QUANTILE = 0.8416212335729143
"""80 % point of the standard normal distribution."""

FEWEST_GROUPS = 8
"""With fewer groups than this prompts are taken to be independent: so few say too little of how
groups differ."""

_MOST_DRAWS = 4_000_000
"""Indices drawn at once; keeps a bootstrap of many prompts within some tens of megabytes."""


@dataclass(frozen=True)
class Estimate:
    """A number measured on prompts, with its 95 % interval."""

    value: float | None  # the number; None where no prompt says anything about it
    lower: float | None  # lower end of the interval; None where it is not known or not finite
    upper: float | None  # upper end
    n: int  # prompts that it was measured on

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
    def share(cls, true: Tensor, groups: Tensor | None = None) -> Self:
        """The share of a BoolTensor (n,) that is true, with Wilson's interval.

        With ``groups``, (n,), it is that of n / D prompts, D the design effect: the variance of the
        share over groups by that of as many independent prompts, 1 at least.

        Source: J. N. K. Rao and A. J. Scott, 1981, Journal of the American Statistical Association
        76, for the effective number.
        """
        n, counted = len(true), int(true.sum())
        units = units_of(groups, n)
        share = counted / n if n else 0.0
        if units is None or not 0 < share < 1:
            return cls.count(counted, n)
        hits, sizes = _sums(true.double().cpu(), units), _sums(torch.ones(n).double(), units)
        spread = float((hits - share * sizes).square().sum()) * len(sizes) / (len(sizes) - 1) / n
        effect = max(1.0, spread / (share * (1 - share)))
        return cls(share, *wilson(counted / effect, n / effect), n)

    @classmethod
    def count(cls, successes: int, n: int) -> Self:
        """The share ``successes / n``, with Wilson's interval; no value where n is 0."""
        return cls(successes / n if n else None, *wilson(successes, n), n)

    @classmethod
    def mean(cls, values: Tensor, generator: torch.Generator, groups: Tensor | None = None) -> Self:
        """The mean of (n,) values, with its bootstrap interval.

        No value where n is 0, nor where one is infinite, as the length of an edit is that leaves
        the range of a singular metric.
        """
        if values.shape == (0,) or bool(values.isposinf().any()):
            return cls(None, None, None, len(values))
        ends = bootstrap(values, generator, groups=groups)
        return cls(values.double().mean().item(), *ends, len(values))

    @classmethod
    def ratio(
        cls,
        numerator: Tensor,
        denominator: Tensor,
        generator: torch.Generator,
        groups: Tensor | None = None,
    ) -> Self:
        """mean(numerator) / mean(denominator) over the same n prompts, with its bootstrap interval.

        There is no value where the denominator's mean is 0, and no end that is infinite.
        """
        below = denominator.double().mean().item()
        value = numerator.double().mean().item() / below if below else None
        ends = bootstrap(numerator, generator, over=denominator, groups=groups)
        lower, upper = (end if math.isfinite(end) else None for end in ends)
        return cls(value, lower, upper, len(numerator))


@dataclass(frozen=True)
class Sample:
    """Estimates over the same prompts, with intervals from the same resamples of them."""

    seed: int  # of the resampling
    groups: Tensor | None = None  # of all n prompts, (n,); None where they are independent
    rows: Tensor | None = None  # which of them count, BoolTensor (n,); None for all

    def among(self, rows: Tensor) -> "Sample":
        """Those for which BoolTensor ``rows`` (n,) is true, and no others."""
        return replace(self, rows=rows if self.rows is None else self.rows & rows)

    def mean(self, values: Tensor) -> Estimate:
        """See :meth:`Estimate.mean`; values (n,) are of all prompts, as below."""
        return Estimate.mean(self.of(values), self._generator(), self._groups)

    def ratio(self, above: Tensor, below: Tensor) -> Estimate:
        """See :meth:`Estimate.ratio`."""
        above, below = self.of(above), self.of(below)
        return Estimate.ratio(above, below, self._generator(), self._groups)

    def share(self, true: Tensor) -> Estimate:
        """See :meth:`Estimate.share`."""
        return Estimate.share(self.of(true), self._groups)

    def flipped(self, clean: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> Estimate:
        """Of the prompts answered by the class that holds, the share then by the other one.

        By the ``own_lead`` of the clean run and the ``other_lead`` under an edit, see
        :func:`~.running.answers`.
        """
        return self.among(clean["own_lead"] > 0).share(edited["other_lead"] > 0)

    def resampled(self, columns: Tensor) -> Tensor:
        """Means of columns (n, k) in the resamples behind :meth:`mean`, (:data:`RESAMPLES`, k).

        They are of the same prompts for every measure, so differences and ratios are paired.
        """
        values, units = self.of(columns.double().cpu()), units_of(self._groups, len(columns))
        sums = torch.cat([values, torch.ones_like(values[:, :1])], 1)
        sums = sums if units is None else _sums(sums, units)
        drawn = resampled_sums(sums, self._generator(), RESAMPLES)
        return drawn[:, :-1] / drawn[:, -1:]

    def of(self, values: Tensor) -> Tensor:
        """Those of values (n, ...) of all prompts that are of these."""
        return values if self.rows is None else values[self.rows]

    @property
    def _groups(self) -> Tensor | None:
        return None if self.groups is None else self.of(self.groups.cpu())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Both ends of Wilson's 95 % interval for a share; (0, 1) where n is 0, which says nothing.

    With p = successes / n and z the normal quantile, the interval is
    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n). Unlike the textbook p ± z·SE it stays
    within [0, 1] and does not shrink to a point at p = 0 or 1.

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
    return (0.0 if successes == 0 else max(lower, 0.0), 1.0 if successes == n else min(upper, 1.0))


def bootstrap(
    values: Tensor,
    generator: torch.Generator,
    resamples: int = RESAMPLES,
    groups: Tensor | None = None,
    over: Tensor | None = None,
) -> tuple[float, float]:
    """Both ends of the 95 % BCa interval (see :func:`bca`) of a mean, or of a ratio of two means.

    The values, (n,), are one a prompt, and n of them are drawn with replacement so many times; of
    ``groups``, (n,), whole ones. ``over`` are values of the same prompts, (n,), by whose mean that
    of the former is divided: where that changes sign between resamples the ends are wide or
    infinite, for the ratio is then not determined by the data.

    Raises:
        WidthError: not one dimension, or other prompts.
        StatisticsError: no values.
        NonFiniteError: NaN or infinity.
    """
    above = _checked(values, "values" if over is None else "numerator")
    below = torch.ones_like(above) if over is None else _checked(over, "denominator")
    if len(above) != len(below):
        raise WidthError(
            f"numerator has {len(above)} prompts and denominator {len(below)}; give one value of "
            "each for the same prompts"
        )
    units = units_of(groups, len(above))
    if units is not None:  # drawn whole; a mean is a sum over counts
        above, below = _sums(above, units), _sums(below, units)
    sums = resampled_sums(torch.stack([above, below], dim=1), generator, resamples)
    # 0 / 0 says nothing about the ratio; such resamples are left out.
    ratios = sums[:, 0] / sums[:, 1]
    known = ratios[~ratios.isnan()]
    if not len(known):
        return -math.inf, math.inf
    if len(above) == 1:
        return known[0].item(), known[0].item()
    left_out = (above.sum() - above) / (below.sum() - below)
    return bca(float(above.sum() / below.sum()), known, left_out)


def bca(value: float, resampled: Tensor, left_out: Tensor) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % interval of an estimate.

    The ends are the quantiles Φ(z₀ + (z₀ ± z) / (1 − a (z₀ ± z))) of the resamples (R,), z₀ = Φ⁻¹
    of the share of them below the value, and a = Σ u³ / 6 (Σ u²)^1.5, u the deviations of the
    jackknife ``left_out`` (the estimate of all units but one each, (n,)) from their mean. Both are
    order statistics, without interpolation, so that infinite samples do not turn into NaN.

    Source: B. Efron, 1987, Journal of the American Statistical Association 82.
    """
    ordered = resampled.sort().values
    # Resamples that equal the value count half on either side.
    below = float((ordered < value).double().mean() + (ordered <= value).double().mean()) / 2
    bias = float(ndtri(below))
    deviations = left_out.mean() - left_out
    norm = float(deviations.square().sum()) ** 1.5
    skew = float(deviations.pow(3).sum()) / (6 * norm) if norm and math.isfinite(norm) else 0.0
    shares = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    if math.isfinite(bias):
        moved = [bias + float(ndtri(share)) for share in shares]
        # Past its pole the formula has no meaning; a sample so skewed has no upper end to speak of.
        shares = [
            float(ndtr(bias + z / (1 - skew * z))) if skew * z < 1 else float(z > 0) for z in moved
        ]
    last = len(ordered) - 1
    return ordered[math.floor(shares[0] * last)].item(), ordered[math.ceil(shares[1] * last)].item()


# ---- exact tests ---------------------------------------------------------------------------------


def sign_test(first: Tensor, second: Tensor) -> float:
    """P of so many more of ``first`` than of ``second``, if either were as likely: one-sided.

    Of the pairs (BoolTensors (n,) of the same prompts) that differ, the number in which ``first``
    is true follows Binomial(m, ½): the exact form of McNemar's test.

    Source: Q. McNemar, 1947, Psychometrika 12.
    """
    more, less = int((first & ~second).sum()), int((~first & second).sum())
    # P(X ≥ more); scipy.stats, which has it by name, takes a second to import.
    return float(betainc(more, less + 1, 0.5)) if more else 1.0


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """P values adjusted for their number: those below α may all be believed at once at level α.

    The i-th smallest of m becomes the largest of (m − j + 1) p_(j), j ≤ i, and 1 at most.

    Source: S. Holm, 1979, Scandinavian Journal of Statistics 6.
    """
    found, reached = dict(p_values), 0.0
    ordered = sorted(found, key=lambda key: p_values[key])
    for tested, key in enumerate(ordered):
        reached = max(reached, min(1.0, (len(ordered) - tested) * p_values[key]))
        found[key] = reached
    return found


def prompts_to_tell(numerator: Tensor, denominator: Tensor) -> int | None:
    """How many prompts it takes to tell a ratio of means from one that is ½ apart.

    n = (z₀.₉₇₅ + z₀.₈)² Var(u − r v) / (mean(v) / 2)², u the numerator and v the denominator of
    each prompt, (n,): a two-sided test at 5 % then finds the difference in 80 % of samples. None
    where the mean of v is 0, or there are fewer than two prompts.
    """
    u, v = numerator.double(), denominator.double()
    if len(u) < 2 or not float(v.mean()):
        return None
    left = u - u.mean() / v.mean() * v
    needed = (NORMAL_QUANTILE + POWER_QUANTILE) ** 2 * left.var() / (v.mean() * 0.5).square()
    return max(2, math.ceil(float(needed))) if math.isfinite(float(needed)) else None


# ---- resampling ----------------------------------------------------------------------------------


def units_of(groups: Tensor | None, n: int) -> Tensor | None:
    """Groups numbered from 0, (n,); None where they are none, too few, or a prompt each."""
    if groups is None or len(groups) != n:
        if groups is not None:
            raise WidthError(f"{len(groups)} groups were given for {n} prompts; give one for each")
        return None
    found, units = groups.cpu().unique(return_inverse=True)
    return units if FEWEST_GROUPS <= len(found) < n else None


def _sums(values: Tensor, units: Tensor) -> Tensor:
    """Sums of values (n, ...) by group, (groups, ...)."""
    return values.new_zeros(int(units.max()) + 1, *values.shape[1:]).index_add_(0, units, values)


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


def resampled_sums(columns: Tensor, generator: torch.Generator, resamples: int) -> Tensor:
    """Sums of each column over resampled rows, (resamples, columns)."""
    if resamples < 1:
        raise StatisticsError(f"the bootstrap needs at least 1 resample, got {resamples}")
    n = len(columns)
    chunk = max(1, _MOST_DRAWS // n)
    sums = []
    for start in range(0, resamples, chunk):
        draws = torch.randint(n, (min(chunk, resamples - start), n), generator=generator)
        sums.append(torch.stack([column[draws].sum(1) for column in columns.T], dim=1))
    return torch.cat(sums)
