"""From what every edit did to every prompt to the rows and curves of the table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.study.compare.editable import Effects
from lrqp_torch.study.compare.methods import ERASING, FITTED
from lrqp_torch.study.compare.oracles import Oracles
from lrqp_torch.study.compare.pareto import cost_at, front
from lrqp_torch.study.compare.reliability import (
    completeness,
    nullified,
    reliability,
    selectivity,
)
from lrqp_torch.study.compare.resampling import Resampling, interval
from lrqp_torch.study.compare.result import (
    DIVERGENCE,
    REST,
    UNSELECTIVE,
    Curve,
    Effect,
    Point,
)
from lrqp_torch.study.dose import Mean
from lrqp_torch.study.estimates import wilson
from lrqp_torch.study.variables import ORDER

REACHED = 0.975
"""An effect counts as reached if the curves of this share of the resamples reach it."""


def share_flipped(clean: Tensor, edited: Tensor) -> Mean | None:
    """Of the prompts with a clean logit difference above 0 the share below 0 after the edit."""
    answered = clean > 0
    n, flips = int(answered.sum()), int((edited[answered] < 0).sum())
    return Mean(flips / n, *wilson(flips, n)) if n else None


def summarise(
    clean: Effects, edited: Effects, oracles: Oracles, target: Tensor, draws: Resampling
) -> Effect:
    """The means of one method under one condition."""
    columns = edited.columns
    read = oracles.logits(ORDER, edited.activations)
    toward = read.gather(-1, target.unsqueeze(-1)) - read.gather(-1, 1 - target.unsqueeze(-1))
    return Effect(
        flipped=share_flipped(clean.columns["logit_difference"], columns["logit_difference"]),
        logit_difference=draws.mean(columns["logit_difference"]),
        distance=draws.mean(columns["distance"]),
        euclidean=draws.mean(columns["euclidean"]),
        log_odds=draws.mean(toward.squeeze(-1)),
        divergence=draws.mean(columns["divergence"]),
        rest=draws.mean(columns["rest"]),
        attention=draws.mean(columns["attention"]) if "attention" in columns else None,
    )


def score(
    name: str, x: Tensor, after: Tensor, oracles: Oracles, target: Tensor, draws: Resampling
) -> dict[str, Mean | None]:
    """Completeness, selectivity and reliability of a counterfactual edit.

    Args:
        name: of the method, which says whether it writes or erases.
        x: clean activations, (n, d).
        after: the same after the edit.
        oracles: independent probes.
        target: class to write, (n,).
        draws: of the prompts.
    """
    read = oracles.logits(ORDER, after).softmax(-1)
    complete = nullified(read) if name in ERASING else completeness(read, target)
    selective = selected(x, after, oracles)
    scores: dict[str, Mean | None] = {"completeness": draws.mean(complete)}
    if selective is None:
        return scores | {"selectivity": None, "reliability": None}
    both = torch.stack([complete, selective], dim=-1)
    value = reliability(*both.mean(0))
    return scores | {
        "selectivity": draws.mean(selective),
        "reliability": interval(float(value), reliability(*draws.means(both).unbind(-1))),
    }


def selected(x: Tensor, after: Tensor, oracles: Oracles) -> Tensor | None:
    """Selectivity, (n,), mean over readable variables other than the order; None without any.

    Rows of x and of ``after``, (n, d), are the first held-out prompts.
    """
    kept = [
        selectivity(oracles.logits(v, x).softmax(-1), oracles.logits(v, after).softmax(-1))
        for v in oracles.others
    ]
    return torch.stack(kept).mean(0) if kept else None


@dataclass(frozen=True)
class Swept:
    """One method's edits of the prompts of the sweep, by rising dose.

    Attributes:
        name: of the method.
        title: in figures.
        dose: what rises, ``"strength"`` or ``"log α"``.
        doses: its values, m of them.
        fall: of the logit difference, (n, m).
        costs: side effect to its size, (n, m) each.
    """

    name: str
    title: str
    dose: str
    doses: Sequence[float]
    fall: Tensor
    costs: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        name: str,
        title: str,
        dose: str,
        runs: Mapping[float, Effects],
        clean: Effects,
        oracles: Oracles,
        n: int,
    ) -> "Swept":
        """From runs by dose, of the first n held-out prompts."""
        doses = sorted(runs)
        before = clean.columns["logit_difference"][:n]
        columns: dict[str, list[Tensor]] = {}
        for item in doses:
            found = {k: v[:n] for k, v in runs[item].columns.items()}
            kept = selected(clean.activations[:n], runs[item].activations[:n], oracles)
            costs = {DIVERGENCE: found["divergence"], REST: found["rest"]}
            costs |= {} if kept is None else {UNSELECTIVE: 1 - kept}
            for key, values in {"fall": before - found["logit_difference"], **costs}.items():
                columns.setdefault(key, []).append(values)
        stacked = {key: torch.stack(values, dim=-1) for key, values in columns.items()}
        return cls(name, title, dose, doses, stacked.pop("fall"), stacked)


def draw_curves(swept: Sequence[Swept], clean: Tensor, draws: Resampling) -> list[Curve]:
    """The curves, with the points that no other one beats.

    Args:
        swept: at least one.
        clean: logit differences of the prompts of the sweep, (n,).
        draws: of those prompts.
    """
    effects = [float(v) for item in swept for v in item.fall.mean(0)]
    optimal = {
        cost: iter(front(effects, [float(v) for item in swept for v in item.costs[cost].mean(0)]))
        for cost in swept[0].costs
    }
    curves = []
    for item in swept:
        points = []
        for column, dose in enumerate(item.doses):
            fall = item.fall[:, column]
            flipped = share_flipped(clean, clean - fall)
            points.append(
                Point(
                    dose=dose,
                    effect=draws.mean(fall),
                    flipped=None if flipped is None else flipped.value,
                    costs={k: draws.mean(values[:, column]) for k, values in item.costs.items()},
                    optimal={k: next(flags) for k, flags in optimal.items()},
                )
            )
        curves.append(Curve(item.name, item.title, item.dose, points))
    return curves


def relative_costs(swept: Sequence[Swept], draws: Resampling) -> dict[str, dict[str, Mean | None]]:
    """By method and side effect, what LRQP's effect at strength 1 costs, over what LRQP pays.

    Both curves and the effect asked for are read from the same resampled prompts. None where a
    method does not reach that effect, or LRQP has none.
    """
    own = next(item for item in swept if item.name == FITTED)
    column = list(own.doses).index(1.0)
    whole = torch.full((1, len(own.fall)), 1 / len(own.fall), dtype=torch.float64)
    weights = torch.cat([whole, draws.weights])
    wanted = weights @ own.fall[:, column]

    def relative(item: Swept, cost: str) -> Mean | None:
        found = cost_at(weights @ item.fall, weights @ item.costs[cost], wanted)
        ratio = found / (weights @ own.costs[cost][:, column])
        known = ratio[1:][ratio[1:].isfinite()]
        reached = len(known) >= REACHED * len(draws.weights) and bool(ratio[0].isfinite())
        return interval(float(ratio[0]), known) if reached and float(wanted[0]) > 0 else None

    return {item.name: {cost: relative(item, cost) for cost in item.costs} for item in swept}
