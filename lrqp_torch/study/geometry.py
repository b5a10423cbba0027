"""What the largest directions of variation at S2 say about the order, without any labels.

At each site the clean activations of the training prompts at S2 are centred and decomposed,
X − 1μᵀ = U S Vᵀ. The held-out prompts are projected on the first two rows of Vᵀ. If the two orders
of the names, ABB and BAB, fall apart there, the order is among the largest things that differ
between prompts at that site; labels are used only to measure this, never to find the directions.

Source: the post "Intervening in the Residual Stream" (2023), which sees the two classes apart in
GPT-2 small from L5.mid on for several layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lrqp_torch.errors import LabelError
from lrqp_torch.study import geometry_figures, geometry_panels
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.estimates import wilson
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.panel import Panel

POSITION = "S2"
MOST_POINTS = 200
"""Held-out prompts drawn at each site; the numbers are of all of them."""

MOST_DIRECTIONS = 10
"""Directions searched for the one that the order explains most."""

_LONGEST_TEXT = 90


@dataclass(frozen=True)
class SiteGeometry:
    """The first directions at one site.

    Attributes:
        variance: share of the training prompts' total variance in direction 1 and in direction 2.
        eta_squared: share of each direction's variance between held-out prompts that the order
            explains: variance between the two classes over total variance.
        strongest: which of the first ten directions, counted from 1, the order explains most among
            the training prompts.
        strongest_eta_squared: the same share for that direction, on held-out prompts.
        threshold: on direction 1, chosen for accuracy on the training prompts; above it is ABB.
        accuracy: share of held-out prompts on the right side of the threshold.
        lower: lower end of its Wilson 95 % interval.
        upper: upper end.
        auc: chance that a held-out ABB prompt lies above a BAB prompt on direction 1, ties half.
        points: coordinates of the first held-out prompts on both directions, (points, 2).
    """

    variance: list[float]
    eta_squared: list[float]
    strongest: int
    strongest_eta_squared: float
    threshold: float
    accuracy: float
    lower: float
    upper: float
    auc: float
    points: list[list[float]]


@dataclass(frozen=True)
class TaskGeometry:
    """All sites, for one task.

    Attributes:
        train: prompts that directions and thresholds were fitted to.
        test: held-out prompts that everything else was measured on.
        eta_chance: eta squared that an unrelated direction stays below in 95 % of cases, about.
        labels: of the prompts drawn: 1 for ABB, 0 for BAB.
        prompts: their texts, shortened, without prefix.
        sites: site name to its geometry.
    """

    train: int
    test: int
    eta_chance: float
    labels: list[int]
    prompts: list[str]
    sites: dict[str, SiteGeometry]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        sites = {name: SiteGeometry(**site) for name, site in raw["sites"].items()}
        return cls(**(raw | {"sites": sites}))


@dataclass(frozen=True)
class GeometryResult:
    """The geometry of the clean activations.

    Attributes:
        position: where activations were read.
        best_site: site whose first direction the order explains most, in the study's task.
        tasks: task name to its geometry, the study's task first.
    """

    position: str
    best_site: str
    tasks: dict[str, TaskGeometry]


def from_json(raw: dict[str, Any]) -> GeometryResult:
    """Read back what ``dataclasses.asdict`` made of a result."""
    tasks = {name: TaskGeometry.from_json(task) for name, task in raw["tasks"].items()}
    return GeometryResult(**(raw | {"tasks": tasks}))


def work(context: StudyContext, /) -> int:
    """Units that :func:`compute` advances: prompts to capture, and sites of each task."""
    return sum(len(task) + len(context.sites) for task in context.tasks)


def compute(context: StudyContext, advance: Advance = no_progress) -> GeometryResult:
    """Decompose the activations at every site of the study, for each of its tasks.

    Raises:
        LabelError: the prompts of a split are all of one order.
    """
    tasks = {}
    for task in context.tasks:
        train, test = context.clean(task, POSITION, advance)
        sites = {}
        for site in context.sites:
            sites[site] = site_geometry(
                train[site], task.train.labels, test[site], task.test.labels
            )
            advance(1)
        shown = task.test[:MOST_POINTS]
        tasks[task.name] = TaskGeometry(
            train=len(task.train),
            test=len(task.test),
            # F(1, n − 2) is near its limit χ²(1), whose 95 % point is 3.84.
            eta_chance=min(1.0, 3.84 / (len(task.test) - 1)),
            labels=shown.labels.tolist(),
            prompts=_texts(shown),
            sites=sites,
        )
    own = tasks[context.task.name].sites
    best = max(own, key=lambda site: own[site].eta_squared[0])
    return GeometryResult(POSITION, best, tasks)


def site_geometry(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> SiteGeometry:
    """The first two directions of the training activations, measured on held-out ones.

    The sign of a direction is arbitrary; it is chosen so that the mean of ABB in the training
    prompts is the higher one.

    Args:
        train: activations, (n, d) with n, d ≥ 2.
        train_labels: 1 for ABB, 0 for BAB, (n,).
        test: held-out activations, (m, d).
        test_labels: (m,).

    Raises:
        LabelError: one class only in either split.
    """
    train, test = train.double(), test.double()
    y_train, y_test = train_labels.to(train.device), test_labels.to(test.device)
    for labels, split in ((y_train, "training"), (y_test, "held-out")):
        if len(labels.unique()) != 2:
            raise LabelError(f"the {split} prompts are all of one order; give more prompts")
    mean = train.mean(0)
    _, singular, directions = torch.linalg.svd(train - mean, full_matrices=False)
    total = singular.square().sum()
    # Activations that are all the same vary in no direction.
    shares = singular.square() / total if total > 0 else torch.zeros_like(singular)
    fitted, held_out = ((x - mean) @ directions[:MOST_DIRECTIONS].T for x in (train, test))
    sign = torch.where(fitted[y_train == 1].mean(0) >= fitted[y_train == 0].mean(0), 1.0, -1.0)
    fitted, held_out = fitted * sign, held_out * sign
    explained = [eta_squared(column, y_train) for column in fitted.T]
    strongest = max(range(len(explained)), key=explained.__getitem__)
    threshold = best_threshold(fitted[:, 0], y_train)
    right = int(((held_out[:, 0] > threshold).long() == y_test).sum())
    lower, upper = wilson(right, len(y_test))
    return SiteGeometry(
        variance=shares[:2].tolist(),
        eta_squared=[eta_squared(column, y_test) for column in held_out[:, :2].T],
        strongest=strongest + 1,
        strongest_eta_squared=eta_squared(held_out[:, strongest], y_test),
        threshold=threshold,
        accuracy=right / len(y_test),
        lower=lower,
        upper=upper,
        auc=area_under_curve(held_out[:, 0], y_test),
        points=[
            [float(f"{value:.4g}") for value in row] for row in held_out[:MOST_POINTS, :2].tolist()
        ],
    )


def eta_squared(values: Tensor, labels: Tensor) -> float:
    """Share of variance that classes explain: Σ_k n_k (mean_k − mean)² / Σ_i (x_i − mean)².

    Args:
        values: (n,).
        labels: class of each, (n,).

    Returns:
        A number from 0 to 1; 0 where the values do not vary.
    """
    centred = values.double() - values.double().mean()
    total = float(centred.square().sum())
    if total == 0:
        return 0.0
    between = 0.0
    for label in labels.unique():
        group = centred[labels == label]
        between += len(group) * float(group.mean()) ** 2
    return min(between / total, 1.0)


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The threshold t at which "class 1 where score > t" is right most often.

    Args:
        scores: (n,).
        labels: 0 or 1, (n,).

    Returns:
        A midpoint between neighbouring scores, or a number beyond all of them.
    """
    ordered, index = scores.sort()
    ones = labels[index].double()
    # Cut i puts the i lowest scores below the threshold.
    start = ones.new_zeros(1)
    zeros_below = torch.cat([start, (1 - ones).cumsum(0)])
    ones_above = ones.sum() - torch.cat([start, ones.cumsum(0)])
    right = zeros_below + ones_above
    tied = torch.zeros_like(right, dtype=torch.bool)
    tied[1:-1] = ordered[1:] == ordered[:-1]
    cut = int(right.masked_fill(tied, -1).argmax())
    if cut == 0:
        return float(ordered[0]) - 1.0
    if cut == len(ordered):
        return float(ordered[-1]) + 1.0
    return float((ordered[cut - 1] + ordered[cut]) / 2)


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Chance that a score of class 1 is above one of class 0, ties counted half."""
    ones, zeros = scores[labels == 1].contiguous(), scores[labels == 0].sort().values
    below = torch.searchsorted(zeros, ones) + torch.searchsorted(zeros, ones, right=True)
    return float(below.double().mean() / (2 * len(zeros)))


def draw(result: GeometryResult, folder: Path) -> list[Path]:
    """Write a grid of all sites, a large plot of the best one, and eta squared by site."""
    return geometry_figures.draw(result, folder)


def panels(result: GeometryResult) -> list[Panel]:
    """A plot of the two directions at each site, and a chart of how well they tell the order."""
    return geometry_panels.panels(result)


def _texts(data: IOIPrompts) -> list[str]:
    """Prompts without their prefixes, short enough to be shown beside a pointer."""
    texts = []
    for prompt, prefix in zip(data.prompts, data.data.prefixes, strict=True):
        text = prompt.removeprefix(prefix).strip()
        short = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
        texts.append(f"… {short}" if prefix else short)
    return texts
