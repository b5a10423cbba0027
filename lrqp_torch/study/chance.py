"""Edits that know nothing of the variable, and edits that know it from half of the prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrqp_torch.baselines import RandomDirection
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.ceiling import scaled
from lrqp_torch.study.readers import Along, along, direction_of
from lrqp_torch.study.running import next_class
from lrqp_torch.study.trials import displacements

Fit = Callable[[Mapping[str, Tensor], Tensor], Mapping[str, LRQP]]
"""Fits edits by name to activations by name, (n, d) each, and their classes, (n,)."""


@dataclass(frozen=True, eq=False)
class Place:
    """An edit at one site, with what it was fitted to and what it is tried on.

    Attributes:
        site: its name.
        edit: to be tried.
        x_train: activations that it was fitted to, (m, d).
        y_train: their classes, (m,).
        x: held-out activations, (n, d).
        y: their classes, (n,).
    """

    site: str
    edit: LRQP
    x_train: Tensor
    y_train: Tensor
    x: Tensor
    y: Tensor

    @property
    def target(self) -> Tensor:
        """The next class of each held-out prompt, (n,)."""
        return next_class(self.y, self.edit.probe.n_classes)

    @cached_property
    def delta(self) -> Tensor:
        """Displacements of the held-out activations towards the next class, (n, d)."""
        return self.displaced(self.edit)

    def displaced(self, edit: LRQP) -> Tensor:
        """The same of another edit."""
        return displacements(edit, self.x, self.target, self.y)

    @property
    def accuracy(self) -> float:
        """Of the probe, on held-out prompts."""
        return self.edit.probe.accuracy(self.x, self.y)

    def length(self, delta: Tensor) -> float:
        """Mean Mahalanobis length as a share of the edit's own."""
        metric, own = self.edit.metric, self.edit.metric.distance(self.delta).mean()
        return float(metric.distance(delta).mean() / own) if own > 0 else 0.0

    def along(self, delta: Tensor) -> Along | None:
        """Natural and edited activations along a part of the edit; None where it is rounding."""
        direction = direction_of(delta, self.delta)
        return None if direction is None else along(direction, self.x, delta, self.y)


@dataclass(frozen=True)
class Chance:
    """Displacements of one kind for one seed.

    Attributes:
        delta: of the held-out activations, (n, d).
        accuracy: of the probe on held-out labels of the kind that it was fitted to; None without.
    """

    delta: Tensor
    accuracy: float | None


RANDOM = "random direction, same length"
SHUFFLED = "probe of shuffled labels"
SHUFFLED_SCALED = "probe of shuffled labels, same length"
FEATURE = "probe of a random feature"
KINDS = {
    RANDOM: "a direction drawn uniformly in the metric, as long as the edit of the same prompt",
    SHUFFLED: "the same edit with a probe fitted to the training labels in random order",
    SHUFFLED_SCALED: "that edit, made as long as the study's own of the same prompt",
    FEATURE: "the same edit with a probe fitted to whether g · Σ^(-1/2) x exceeds its median, g "
    "drawn from a standard normal distribution: true of the activations, and without a meaning",
}
"""Kinds of edits that know nothing of the class, with what they are."""


def by_chance(here: Place, seeds: list[int], l2: float | None) -> dict[str, list[Chance]]:
    """Displacements of every kind of :data:`KINDS`, one for each seed.

    Args:
        here: the study's edit, whose metric and odds rule are used for all.
        seeds: of what is drawn.
        l2: penalty of the probes.
    """
    edit, x_train, x = here.edit, here.x_train.double(), here.x.double()
    roots = _inverse_root(edit.metric.covariance.to(x.device))
    problems: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    held_out: dict[tuple[str, int], Tensor] = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        mixed, held_out[SHUFFLED, seed] = (
            y[torch.randperm(len(y), generator=generator).to(y.device)]
            for y in (here.y_train, here.y)
        )
        normal = torch.randn(x.shape[1], dtype=torch.float64, generator=generator)
        feature = roots @ normal.to(x.device)
        cut = (x_train @ feature).median()
        held_out[FEATURE, seed] = (x @ feature > cut).long()
        problems[SHUFFLED, seed] = here.x_train, mixed
        problems[FEATURE, seed] = here.x_train, (x_train @ feature > cut).long()
    probes = LinearProbe.fit_many(problems, l2=l2)
    length = edit.metric.distance(here.delta)
    found: dict[str, list[Chance]] = {kind: [] for kind in KINDS}
    for seed in seeds:
        random = RandomDirection(edit, seed=seed)(x, here.target, here.y)
        found[RANDOM].append(Chance(random - x, None))
        shuffled, feature_probe = probes[SHUFFLED, seed], probes[FEATURE, seed]
        moved = here.displaced(_with_probe(edit, shuffled))
        accuracy = shuffled.accuracy(here.x, held_out[SHUFFLED, seed])
        found[SHUFFLED].append(Chance(moved, accuracy))
        found[SHUFFLED_SCALED].append(Chance(scaled(edit.metric, moved, length), accuracy))
        read = feature_probe(here.x).argmax(-1)
        moved = displacements(_with_probe(edit, feature_probe), here.x, 1 - read, read)
        accuracy = feature_probe.accuracy(here.x, held_out[FEATURE, seed])
        found[FEATURE].append(Chance(moved, accuracy))
    return found


def half_edits(x: Tensor, y: Tensor, fit: Fit, seed: int) -> list[tuple[int, LRQP]]:
    """Number of prompts and edit of two disjoint halves, each with its own probe and metric.

    Both halves hold as many prompts of a class, within one. Empty where a half would have fewer
    than two of a class.

    Args:
        x: activations to be halved, (n, d).
        y: their classes, (n,).
        fit: fits the edits.
        seed: of the halving.
    """
    generator = torch.Generator().manual_seed(seed)
    halves: list[list[Tensor]] = [[], []]
    for label in y.unique().tolist():
        rows = (y.cpu() == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for half, own in zip(halves, (rows[::2], rows[1::2]), strict=True):
            half.append(own)
    if min(len(rows) for half in halves for rows in half) < 2:
        return []
    chosen = [torch.cat(half).to(x.device) for half in halves]
    return [(len(rows), fit({"half": x[rows]}, y[rows])["half"]) for rows in chosen]


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine between the rows of two sets of displacements, (n,); 0 where one of them is 0."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)


def whitened(edit: LRQP, delta: Tensor) -> Tensor:
    """Σ^(-1/2) δ, whose Euclidean geometry is the metric's, (n, d)."""
    return delta.double() @ _inverse_root(edit.metric.covariance.to(delta.device))


def _with_probe(edit: LRQP, probe: LinearProbe) -> LRQP:
    return LRQP(
        probe,
        edit.metric,
        log_odds=float(edit.log_odds),
        rule="mirror" if edit.rule == "mirror" else "fixed",
        on_infeasible="skip",
    )


def _inverse_root(covariance: Tensor) -> Tensor:
    """Σ^(-1/2), without the null space of Σ."""
    values, vectors = torch.linalg.eigh(covariance)
    present = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = (vectors[:, present] / values[present].sqrt()) @ vectors[:, present].T
    return root
