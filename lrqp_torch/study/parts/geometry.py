"""What the largest directions of variation at the marked token say about the class, without labels.

At each site the clean activations of the training prompts are centred and decomposed,
X − 1μᵀ = U S Vᵀ. The held-out prompts are projected on the first two rows of Vᵀ. If the classes
fall apart there, the class is among the largest things that differ between prompts at that site;
labels are used only to measure this, never to find the directions.

Source: the post "Intervening in the Residual Stream" (2023), which sees the two orders of the names
apart in GPT-2 small from L5.mid on for several layers.
"""

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from scipy.special import betaincinv
from torch import Tensor

from lrqp_torch.errors import LabelError
from lrqp_torch.plot.chart import Chart, Marks, Pane, Panel, Rule, look
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import PromptSet, Words
from lrqp_torch.study.showing import (
    Reading,
    by_site,
    curves,
    headed,
    joined,
    percent,
    said,
    table_of,
    task_in_words,
)

MOST_POINTS = 200
"""Held-out prompts drawn at each site; the numbers are of all of them."""

MOST_DIRECTIONS = 10
"""Directions searched for the one that the class explains most."""

APART = 0.9
"""Held-out accuracy of thresholds on direction 1 from which the classes count as apart."""

ETA, ACCURACY = "eta squared, direction 1 (%)", "accuracy on direction 1 (%)"
MEASURES: dict[str, Reading] = {
    ETA: "eta_squared.0",
    "eta squared, direction 2 (%)": "eta_squared.1",
    ACCURACY: "accuracy",
    "area under the curve": "auc",
    "share of all variance, direction 1 (%)": "variance.0",
    "share of all variance, direction 2 (%)": "variance.1",
}
"""What is measured at a site."""

_LONGEST_TEXT = 90


@dataclass(frozen=True)
class SiteGeometry:
    """The first directions at one site."""

    # Share of the training prompts' total variance in direction 1 and in direction 2.
    variance: list[float]
    # Share of each direction's variance between held-out prompts that the class explains: variance
    # between the classes over total variance.
    eta_squared: list[float]
    # Which of the first ten directions, counted from 1, the class explains most among the training
    # prompts.
    strongest: int
    strongest_eta_squared: float  # the same share for that direction, on held-out prompts
    # On direction 1, rising, between neighbouring classes; each is chosen for accuracy on the
    # training prompts of the two.
    thresholds: list[float]
    accuracy: Estimate  # share of held-out prompts between the right thresholds
    # Chance that of two held-out prompts of different classes the one of the class with the larger
    # training mean lies higher on direction 1, ties half; mean over pairs of classes.
    auc: float
    # Coordinates of the first held-out prompts on both directions, (points, 2).
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class TaskGeometry:
    """All sites, for one version of the task."""

    train: int  # prompts that directions and thresholds were fitted to
    test: int  # held-out prompts that everything else was measured on
    # Eta squared that a direction of normal values that has nothing to do with the class stays
    # below in 95 % of cases.
    eta_chance: float
    labels: list[int]  # classes of the prompts drawn
    prompts: list[str]  # their texts, shortened, without prefix
    sites: dict[str, SiteGeometry]  # site name to its geometry


@dataclass(frozen=True)
class GeometryResult:
    """The geometry of the clean activations."""

    classes: list[str]  # their names
    words: Words  # what the things of the task are called
    best_site: str  # site whose first direction the class explains most, in the study's task
    tasks: dict[str, TaskGeometry]  # task name to its geometry, the study's task first


def site_geometry(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> SiteGeometry:
    """The first two directions of the training activations, (n, d), measured on held-out ones, (m,
    d).

    The sign of a direction is arbitrary; it is chosen so that in the training prompts the mean of
    the last class is above that of the first. n and d are 2 or more. Raises LabelError: one class
    only in either split.
    """
    y_train, y_test = train_labels.cpu(), test_labels.cpu()
    for labels, split in ((y_train, "training"), (y_test, "held-out")):
        if len(labels.unique()) < 2:
            raise LabelError(f"the {split} prompts are all of one class; give more prompts")
    mean = train.double().mean(0)
    _, singular, directions = torch.linalg.svd(train.double() - mean, full_matrices=False)
    total = singular.square().sum()
    # Activations that are all the same vary in no direction.
    shares = singular.square() / total if total > 0 else torch.zeros_like(singular)
    along = directions[:MOST_DIRECTIONS].T
    fitted, held_out = (((x.double() - mean) @ along).cpu() for x in (train, test))
    first, last = (fitted[y_train == label].mean(0) for label in (y_train.min(), y_train.max()))
    sign = torch.where(last >= first, 1.0, -1.0)
    fitted, held_out = fitted * sign, held_out * sign
    explained = [eta_squared(column, y_train) for column in fitted.T]
    strongest = max(range(len(explained)), key=explained.__getitem__)
    order, thresholds = neighbours(fitted[:, 0], y_train)
    cuts = torch.tensor(thresholds, dtype=torch.float64)
    said = torch.tensor(order)[torch.bucketize(held_out[:, 0].contiguous(), cuts)]
    shown = held_out[:MOST_POINTS, :2].tolist()
    return SiteGeometry(
        variance=shares[:2].tolist(),
        eta_squared=[eta_squared(column, y_test) for column in held_out[:, :2].T],
        strongest=strongest + 1,
        strongest_eta_squared=eta_squared(held_out[:, strongest], y_test),
        thresholds=thresholds,
        accuracy=Estimate.share(said == y_test),
        auc=area_under_curve(held_out[:, 0], y_test, order),
        points=[(float(f"{one:.4g}"), float(f"{two:.4g}")) for one, two in shown],
    )


def eta_squared(values: Tensor, labels: Tensor) -> float:
    """Share of the variance of (n,) values that their classes explain; 0 where they do not vary.

    Σ_k n_k (mean_k − mean)² / Σ_i (x_i − mean)².
    """
    centred = values.double() - values.double().mean()
    total = float(centred.square().sum())
    groups = [centred[labels == label] for label in labels.unique()]
    between = sum(len(group) * float(group.mean()) ** 2 for group in groups)
    return min(between / total, 1.0) if total else 0.0


def neighbours(scores: Tensor, labels: Tensor) -> tuple[list[int], list[float]]:
    """The classes by rising mean of (n,) scores, and the thresholds between each and the next."""
    means = {int(label): float(scores[labels == label].mean()) for label in labels.unique()}
    order = sorted(means, key=lambda label: means[label])
    cuts: list[float] = []
    for lower, upper in pairwise(order):
        rows = (labels == lower) | (labels == upper)
        cut = best_threshold(scores[rows], (labels[rows] == upper).long())
        cuts.append(max(cut, *cuts[-1:]) if cuts else cut)
    return order, cuts


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The threshold t at which "class 1 where score > t" is right most often, of (n,) scores.

    It is a midpoint between neighbouring scores, or a number beyond all of them.
    """
    ordered, index = scores.double().sort()
    # Cut i puts the i lowest scores below the threshold: right are the zeros there, and the ones
    # above it, whose number falls by one with every one below.
    gains = 1 - 2 * labels[index].double()
    right = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    tied = torch.zeros_like(right, dtype=torch.bool)
    tied[1:-1] = ordered[1:] == ordered[:-1]
    cut = int(right.masked_fill(tied, -torch.inf).argmax())
    beyond = torch.cat([ordered[:1] - 2, ordered, ordered[-1:] + 2])
    return float((beyond[cut] + beyond[cut + 1]) / 2)


def area_under_curve(scores: Tensor, labels: Tensor, order: list[int]) -> float:
    """Chance that a score of a later class is above one of an earlier class, ties counted half.

    The mean over pairs of classes that occur, of (n,) scores; ``order`` has the classes with higher
    scores later.
    """
    groups = [scores[labels == label].sort().values.contiguous() for label in order]
    areas = []
    for lower, upper in combinations([group for group in groups if len(group)], 2):
        below = torch.searchsorted(lower, upper) + torch.searchsorted(lower, upper, right=True)
        areas.append(float(below.double().mean() / (2 * len(lower))))
    return sum(areas) / len(areas)


def _texts(prompts: PromptSet) -> list[str]:
    """Prompts without their prefixes, short enough to be shown beside a pointer."""
    prefixes = prompts.data.prefixes if isinstance(prompts, IOIPrompts) else [""] * len(prompts)
    texts = []
    for prompt, prefix in zip(prompts.prompts, prefixes, strict=True):
        text = prompt.removeprefix(prefix).strip()
        short = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
        texts.append(f"… {short}" if prefix else short)
    return texts


class GeometryPart(Part[GeometryResult]):
    """Principal directions of the clean activations, and how much of them is the class."""

    name = "geometry"
    title = "Geometry without labels"
    result = GeometryResult

    def work(self, context: StudyContext, /) -> int:
        """Prompts to capture, and sites of each version of the task."""
        return sum(len(task) + len(context.sites) for task in context.tasks)

    def compute(self, given: Given, advance: Advance, /) -> GeometryResult:
        """Decompose the activations at every site, for each version of the task.

        Raises:
            LabelError: the prompts of a split are all of one class.
        """
        context, tasks = given.context, {}
        for task in context.tasks:
            train, test = context.clean(task, "mark", advance)
            sites = {}
            for site in context.sites:
                sites[site] = site_geometry(
                    train[site], task.train.labels, test[site], task.test.labels
                )
                advance(1)
            shown, n, k = task.test[:MOST_POINTS], len(task.test), len(task.test.classes)
            tasks[task.name] = TaskGeometry(
                train=len(task.train),
                test=n,
                # Of normal values that no class moves, eta squared has this Beta distribution.
                eta_chance=float(betaincinv((k - 1) / 2, (n - k) / 2, 0.95)) if n > k else 1.0,
                labels=shown.labels.tolist(),
                prompts=_texts(shown),
                sites=sites,
            )
        own, prompts = tasks[context.task.name].sites, context.task.test
        best = max(own, key=lambda site: own[site].eta_squared[0])
        return GeometryResult(list(prompts.classes), prompts.words, best, tasks)

    def says(self, result: GeometryResult, /) -> list[str]:
        """Where the classes lie apart, for each version of the task."""
        tasks = [_found(name, task) for name, task in result.tasks.items()]
        return said(self.name, "says", result=result, tasks=tasks, apart=APART)

    def figures(self, result: GeometryResult, /) -> dict[str, Chart]:
        """A grid of all sites for each task, a large plot of the best one, and curves by site."""
        grids = {}
        for name, task in result.tasks.items():
            panes = [
                _plane(result, name, site, f"{site}   η² {percent(item.eta_squared[0], 0)}", False)
                for site, item in task.sites.items()
            ]
            title = f"Directions 1 and 2 of the activations at {result.words.position}"
            title = joined(title, task_in_words(name))
            grids[f"geometry_sites_{name}"] = Chart(panes, title, columns=6)
        cuts = "one threshold" if len(result.classes) == 2 else "thresholds"
        curves = [
            _by_site(result, ETA, "η²: share of direction 1's variance (%)"),
            _by_site(result, ACCURACY, f"Accuracy of {cuts} on direction 1 (%)"),
        ]
        title = f"How much of the largest direction is {result.words.variable}"
        return {
            **grids,
            "geometry_best": _best(result, result.best_site),
            "geometry_by_site": Chart(curves, title, share_x=True),
        }

    def panels(self, result: GeometryResult, /) -> list[Panel]:
        """A plot of the two directions at each site, and curves of how well they tell classes."""
        rows = [
            ((task_in_words(name) or "–", site), item)
            for name, task in result.tasks.items()
            for site, item in task.sites.items()
        ]
        columns = MEASURES | {
            "strongest of the first ten": "strongest",
            "its eta squared (%)": "strongest_eta_squared",
        }
        first = next(iter(result.tasks.values()))
        sites = dict.fromkeys([result.best_site, *first.sites])
        planes = {"charts": {site: _best(result, site) for site in sites}, "choice": "site"}
        curves: dict[str, Any] = {
            "charts": {key: Chart([_by_site(result, key, key)]) for key in MEASURES},
            "choice": "measure",
            "table": table_of(["task", "site"], rows, columns),
        }
        return [
            self.panel("geometry-directions", result, shown=planes),
            self.panel("geometry-by-site", result, shown=curves, chance=first.eta_chance),
        ]


def _found(name: str, task: TaskGeometry) -> dict[str, Any]:
    """What was seen in one version of the task, for words."""
    best, item = max(task.sites.items(), key=lambda pair: pair[1].eta_squared[0])
    apart = [site for site, item in task.sites.items() if (item.accuracy.value or 0) >= APART]
    lower = {
        site: item
        for site, item in task.sites.items()
        if item.strongest > 1
        and item.strongest_eta_squared > max(0.5, item.eta_squared[0], task.eta_chance)
    }
    found = {"name": name, "task": task, "best": best, "item": item}
    return found | {"apart": apart, "lower": lower}


def _best(result: GeometryResult, site: str) -> Chart:
    """Both directions at one site, a pane a task."""
    panes = []
    for name, task in result.tasks.items():
        item = task.sites[site]
        about = (
            f"{result.words.value} explains {percent(item.eta_squared[0])} of direction 1\n"
            f"accuracy {percent(item.accuracy.value)}"
        )
        panes.append(_plane(result, name, site, headed(name, about, "\n")))
    title = f"Held-out prompts at {site}, {result.words.position}; directions found without labels"
    return Chart(panes, title=title, columns=len(panes))


def _plane(result: GeometryResult, name: str, site: str, title: str, large: bool = True) -> Pane:
    """Held-out prompts on both directions at one site."""
    task, item = result.tasks[name], result.tasks[name].sites[site]
    marks = []
    for index, label in reversed(list(enumerate(result.classes))):
        rows = [row for row, value in enumerate(task.labels) if value == index]
        x, y = ([item.points[row][axis] for row in rows] for axis in (0, 1))
        texts, size = [task.prompts[row] for row in rows], 1.0 if large else 0.5
        style = look(index) | {"kind": "points", "size": size, "opacity": 0.6}
        marks.append(Marks(label, x, y, texts=texts, **style))
    x_title, y_title = (
        f"direction {number} ({percent(share)} of all variance)" if large else ""
        for number, share in enumerate(item.variance, start=1)
    )
    rules = [Rule(cut, axis="x") for cut in item.thresholds]
    return Pane(marks, rules=rules, title=title, x_title=x_title, y_title=y_title, ticks=large)


def _by_site(result: GeometryResult, measure: str, title: str) -> Pane:
    """One measure by site, a curve a task."""
    scale = 100 if "(%)" in measure else 1
    series = {
        task_in_words(name) or result.words.variable: task.sites
        for name, task in result.tasks.items()
    }
    marks = curves(series, MEASURES[measure], scale=scale)
    rules = [Rule(scale / len(result.classes))] if measure == ACCURACY else []
    limits = (-0.04 * scale, 1.04 * scale)
    return by_site(marks, rules=rules, y_title=title, y_range=limits)


PART = GeometryPart()
