"""Effect against side effect: curves by rising dose, their front, and what equal effect costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.errors import StatisticsError
from lrqp_torch.study.estimates import CONFIDENCE, Estimate, bca, units_of

RESAMPLES = 1000
REACHED = 0.975
"""An effect counts as reached if the curves of this share of the resamples reach it."""


class Resampling:
    """Prompts drawn with replacement, the same ones for every measure.

    A mean over a resample is a weighted mean over the prompts, so differences and ratios between
    edits are paired: both are read from the same prompts.

    Args:
        n: prompts.
        generator: of the draws.
        resamples: how many times n prompts are drawn.
        groups: the group of each prompt, (n,); groups are then drawn, each with all its prompts.

    Attributes:
        n: as given.
        weights: share of each prompt in each resample, (resamples, n).

    Raises:
        StatisticsError: no prompts.
    """

    def __init__(
        self,
        n: int,
        generator: torch.Generator,
        resamples: int = RESAMPLES,
        groups: Tensor | None = None,
    ) -> None:
        if n < 1:
            raise StatisticsError("there are no prompts to resample")
        self.n = n
        found = units_of(groups, n)
        units = torch.arange(n) if found is None else found
        count = int(units.max()) + 1
        drawn = torch.randint(count, (resamples, count), generator=generator)
        ones = torch.ones(resamples, count, dtype=torch.float64)
        times = torch.zeros_like(ones).scatter_add_(1, drawn, ones)[:, units]
        self.weights = times / times.sum(1, keepdim=True)
        # Of all prompts but those of one unit each, (units, n).
        without = (units != torch.arange(count).unsqueeze(1)).double()
        self._left_out = without / without.sum(1, keepdim=True)

    def mean(self, values: Tensor) -> Estimate:
        """The mean of values, (n,), with its BCa interval, see :func:`~.estimates.bca`.

        As with :meth:`Estimate.mean`, no value where one is infinite.
        """
        wide = values.double().cpu()
        mean = float(wide.mean())
        if bool(wide.isposinf().any()):
            return Estimate(None, None, None, self.n)
        if len(self._left_out) == 1:
            return Estimate(mean, mean, mean, self.n)
        return Estimate(mean, *bca(mean, self.weights @ wide, self._left_out @ wide), self.n)

    def means(self, values: Tensor) -> Tensor:
        """The means of columns (n, k) in each resample, (resamples, k)."""
        return self.weights @ values.double().cpu()

    def interval(self, value: float, resampled: Tensor) -> Estimate:
        """A value with the 2.5 % and 97.5 % quantiles of its resamples, (R,)."""
        tail = (1 - CONFIDENCE) / 2
        ends = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype))
        return Estimate(value, float(ends[0]), float(ends[1]), self.n)


@dataclass(frozen=True)
class CurvePoint:
    """One counterfactual edit of the prompts of the sweep.

    Attributes:
        dose: strength, or log α for the curve by odds.
        effect: mean fall of the preference for the class that holds.
        flipped: share of answers flipped; None if none was answered by the class that holds.
        costs: side effect to its mean.
        optimal: for each, whether no other point of any curve has at least this effect for at most
            this side effect.
    """

    dose: float
    effect: Estimate
    flipped: float | None
    costs: dict[str, Estimate]
    optimal: dict[str, bool]


@dataclass(frozen=True)
class Curve:
    """Effect against side effect of one method.

    Attributes:
        name: of the method.
        title: in figures.
        dose: what rises along it, ``"strength"`` or ``"log α"``.
        points: by rising dose.
    """

    name: str
    title: str
    dose: str
    points: list[CurvePoint]


@dataclass(frozen=True)
class Swept:
    """One method's edits of the prompts of the sweep, by rising dose.

    Attributes:
        name: of the method.
        title: in figures.
        dose: what rises, ``"strength"`` or ``"log α"``.
        doses: its values, m of them.
        flipped: share of answers flipped, by dose.
        fall: of the preference for the class that holds, (n, m).
        costs: side effect to its size, (n, m) each.
    """

    name: str
    title: str
    dose: str
    doses: Sequence[float]
    flipped: Sequence[float | None]
    fall: Tensor
    costs: Mapping[str, Tensor]


def draw_curves(swept: Sequence[Swept], draws: Resampling) -> list[Curve]:
    """The curves, with the points that no other one beats.

    Args:
        swept: at least one.
        draws: of the prompts of the sweep.
    """
    effects = [float(v) for item in swept for v in item.fall.mean(0)]
    optimal = {
        cost: iter(front(effects, [float(v) for item in swept for v in item.costs[cost].mean(0)]))
        for cost in swept[0].costs
    }
    return [
        Curve(
            item.name,
            item.title,
            item.dose,
            [
                CurvePoint(
                    dose=dose,
                    effect=draws.mean(item.fall[:, column]),
                    flipped=item.flipped[column],
                    costs={k: draws.mean(values[:, column]) for k, values in item.costs.items()},
                    optimal={k: next(flags) for k, flags in optimal.items()},
                )
                for column, dose in enumerate(item.doses)
            ],
        )
        for item in swept
    ]


def relative_costs(
    swept: Sequence[Swept], own: str, draws: Resampling
) -> dict[str, dict[str, Estimate | None]]:
    """By method and side effect, what one method's effect at strength 1 costs, over what it pays.

    Both curves and the effect asked for are read from the same resampled prompts.

    Args:
        swept: the curves.
        own: name of the method whose effect the others are asked for.
        draws: of the prompts of the sweep.

    Returns:
        None where a method does not reach that effect, or there is none.
    """
    mine = next(item for item in swept if item.name == own)
    column = list(mine.doses).index(1.0)
    whole = torch.full((1, len(mine.fall)), 1 / len(mine.fall), dtype=torch.float64)
    weights = torch.cat([whole, draws.weights])
    wanted = weights @ mine.fall[:, column]

    def relative(item: Swept, cost: str) -> Estimate | None:
        found = cost_at(weights @ item.fall, weights @ item.costs[cost], wanted)
        ratio = found / (weights @ mine.costs[cost][:, column])
        known = ratio[1:][ratio[1:].isfinite()]
        reached = len(known) >= REACHED * len(draws.weights) and bool(ratio[0].isfinite())
        return draws.interval(float(ratio[0]), known) if reached and float(wanted[0]) > 0 else None

    return {item.name: {cost: relative(item, cost) for cost in item.costs} for item in swept}


def front(effects: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Which points are Pareto optimal: no other has at least their effect for at most their cost.

    Of two equal points both are.

    Args:
        effects: to be large.
        costs: to be small.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -effects[i]))
    best = [False] * len(costs)
    reached, at = float("-inf"), float("-inf")
    for i in order:
        if effects[i] > reached:
            reached, at = effects[i], costs[i]
        best[i] = effects[i] == reached and costs[i] == at
    return best


def cost_at(effects: Tensor, costs: Tensor, wanted: Tensor) -> Tensor:
    """The cost at which a curve first reaches an effect, with straight lines between its points.

    Args:
        effects: of rising strengths, (..., m); the curve starts at effect 0 and cost 0.
        costs: the same.
        wanted: (...), above 0.

    Returns:
        (...); NaN where the curve does not reach the effect.
    """
    zero = torch.zeros_like(effects[..., :1])
    effects, costs = torch.cat([zero, effects], -1), torch.cat([zero, costs], -1)
    asked = wanted.unsqueeze(-1)
    crossing = (effects[..., :-1] < asked) & (effects[..., 1:] >= asked)
    first = crossing.int().argmax(-1, keepdim=True)

    def ends(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.gather(-1, first).squeeze(-1), values.gather(-1, first + 1).squeeze(-1)

    (low, high), (cheap, dear) = ends(effects), ends(costs)
    share = (wanted - low) / torch.where(high > low, high - low, 1.0)
    reached = cheap + share * (dear - cheap)
    return torch.where(crossing.any(-1), reached, torch.nan)
