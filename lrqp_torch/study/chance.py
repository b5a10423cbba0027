"""Edits that know nothing of the variable, and edits that know it from half of the prompts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.baselines import RandomDirection
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.running import next_class
from lrqp_torch.study.sweep import fit_edits
from lrqp_torch.study.trials import displacements


@dataclass(frozen=True)
class Examples:
    """Activations at one site with the class of each.

    Attributes:
        x: (n, d).
        y: (n,), from 0 to K − 1.
        classes: K.
    """

    x: Tensor
    y: Tensor
    classes: int

    @property
    def target(self) -> Tensor:
        """The next class of each, (n,)."""
        return next_class(self.y, self.classes)


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


def by_chance(
    edit: LRQP,
    train: Examples,
    test: Examples,
    delta: Tensor,
    *,
    seeds: list[int],
    l2: float | None,
) -> dict[str, list[Chance]]:
    """Displacements of every kind of :data:`KINDS`, one for each seed.

    Args:
        edit: the study's edit; its metric and odds rule are used for all.
        train: to fit probes to.
        test: to edit, each towards the next class.
        delta: the study's own displacements of ``test``, (n, d).
        seeds: of what is drawn.
        l2: penalty of the probes.
    """
    wide = train.x.double()
    roots = _inverse_root(edit.metric.covariance.to(wide.device))
    problems: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    held_out: dict[tuple[str, int], Tensor] = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(part.y), generator=generator) for part in (train, test)]
        shuffled = [p.y[o.to(p.y.device)] for p, o in zip((train, test), orders, strict=True)]
        problems[SHUFFLED, seed], held_out[SHUFFLED, seed] = (train.x, shuffled[0]), shuffled[1]
        normal = torch.randn(wide.shape[1], dtype=torch.float64, generator=generator)
        feature = roots @ normal.to(wide.device)
        cut = (wide @ feature).median()
        problems[FEATURE, seed] = train.x, (wide @ feature > cut).long()
        held_out[FEATURE, seed] = (test.x.double() @ feature > cut).long()
    probes = LinearProbe.fit_many(problems, l2=l2)
    length = edit.metric.distance(delta)
    found: dict[str, list[Chance]] = {kind: [] for kind in KINDS}
    for seed in seeds:
        random = RandomDirection(edit, seed=seed)
        wide_test = test.x.double()
        found[RANDOM].append(Chance(random(wide_test, test.target, test.y) - wide_test, None))
        probe = probes[SHUFFLED, seed]
        accuracy = probe.accuracy(test.x, held_out[SHUFFLED, seed])
        moved = displacements(_with_probe(edit, probe), test.x, test.target, test.y)
        found[SHUFFLED].append(Chance(moved, accuracy))
        found[SHUFFLED_SCALED].append(Chance(_as_long(edit, moved, length), accuracy))
        probe = probes[FEATURE, seed]
        read = probe(test.x).argmax(-1)
        moved = displacements(_with_probe(edit, probe), test.x, 1 - read, read)
        found[FEATURE].append(Chance(moved, probe.accuracy(test.x, held_out[FEATURE, seed])))
    return found


def half_edits(
    edit: LRQP,
    train: Examples,
    *,
    seed: int,
    l2: float | None,
    shrinkage: Shrinkage = "ledoit_wolf",
) -> list[tuple[int, LRQP]]:
    """Number of prompts and edit of two disjoint halves, each with its own probe and metric.

    Both halves hold as many prompts of a class, within one. Empty where a half would have fewer
    than two of a class.

    Args:
        edit: the study's edit, whose odds rule is used.
        train: to be halved.
        seed: of the halving.
        l2: penalty of the probes.
        shrinkage: of the covariances.
    """
    generator = torch.Generator().manual_seed(seed)
    halves: list[list[Tensor]] = [[], []]
    for label in range(train.classes):
        rows = (train.y.cpu() == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for half, own in zip(halves, (rows[::2], rows[1::2]), strict=True):
            half.append(own)
    if min(len(rows) for half in halves for rows in half) < 2:
        return []
    edits = []
    for half in halves:
        rows = torch.cat(half).to(train.x.device)
        fitted = fit_edits(
            {"half": train.x[rows]},
            train.y[rows],
            l2=l2,
            shrinkage=shrinkage,
            log_odds=float(edit.log_odds),
        )
        edits.append((len(rows), fitted["half"]))
    return edits


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


def _as_long(edit: LRQP, delta: Tensor, length: Tensor) -> Tensor:
    own = edit.metric.distance(delta)
    scale = torch.where(own > 0, length / own.clamp_min(torch.finfo(own.dtype).tiny), 0.0)
    return delta * scale.unsqueeze(-1)


def _inverse_root(covariance: Tensor) -> Tensor:
    """Σ^(-1/2), without the null space of Σ."""
    values, vectors = torch.linalg.eigh(covariance)
    present = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = (vectors[:, present] / values[present].sqrt()) @ vectors[:, present].T
    return root
