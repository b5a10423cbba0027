"""Illusion controls of an edit at one site: does it work through what the model reads?

After Makelov, Lange and Nanda 2023, "Is This the Subspace You Are Looking for?" (arXiv 2311.17030):
an edit along one direction may change the answer although that direction means nothing to the
model. So the edit is split into the part that later parts of the model read and the rest, each run
alone; it is moved to other sites; edits that know nothing of the variable are put beside it; and
edits from disjoint halves of the prompts are compared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lrqp_torch.baselines import RandomDirection
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import UnknownFamilyError
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study.ceiling import Interchange, Likeness, scaled
from lrqp_torch.study.context import Advance, StudyContext, evenly, no_progress
from lrqp_torch.study.estimates import Estimate, Sample
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.part import Given
from lrqp_torch.study.prompts import Words, rows_by_class
from lrqp_torch.study.running import Trial, Trials, displacements, next_class
from lrqp_torch.study.subspaces import (
    Along,
    Space,
    along,
    class_mean_space,
    direction_of,
    random_space,
    reader_spaces,
    readers_of,
    split,
)

SEEDS = 5
"""Draws of everything that is drawn by chance."""

MOST_SITES = 12
"""At most so many other sites, evenly spaced."""

AS_ACCURATE = 0.01
"""A probe is as accurate as the best site's if it is right in no fewer prompts than this less."""

CARRIES = 0.5
"""A part carries the effect if it brings about at least this share of the edit's own."""

SEPARATED = 1.0
"""Classes differ along a direction if their means lie at least this many standard deviations within
a class apart; a direction along which they do not is asleep."""

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

# ---- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditOutcome:
    """What displacements of the held-out prompts did to the answers."""

    # Of the prompts answered by the class that holds in the clean run, the share then answered by
    # the next one.
    flipped: Estimate
    # Mean preference for the class that holds; IO − S, in logits, of indirect object
    # identification.
    logit_difference: Estimate
    # The mean change of the preference as a share of that of the study's own counterfactual edit;
    # None where the interval of that edit's own change includes 0.
    effect: Estimate | None
    # The same as a share of the interchange's, see `ceiling`; None also where no prompt has a twin.
    recovered: Estimate | None = None


@dataclass(frozen=True)
class Piece:
    """One part of the edit, run alone."""

    share: float  # of ‖δ‖², mean over prompts
    # Its Mahalanobis length as a share of the edit's, mean over prompts; parts may be longer than
    # the whole.
    mahalanobis: float
    # Natural and edited activations along its direction; None where the part is rounding.
    along: Along | None
    outcome: EditOutcome  # of adding this part alone

    @property
    def carries(self) -> bool:
        """Whether it brings about at least :data:`CARRIES` of the effect."""
        effect = self.outcome.effect
        return effect is not None and effect.known >= CARRIES

    @property
    def asleep(self) -> bool:
        """Whether the classes hardly differ along it."""
        return self.along is not None and self.along.separation < SEPARATED


@dataclass(frozen=True)
class Split:
    """The edit split by one subspace."""

    space: str  # its name
    reads: bool  # whether later parts of the model read through it
    dimensions: int  # of the subspace
    width: int  # d, of the stream; a subspace in a random position would hold dimensions / width
    rank: int  # numerical rank of the weights that it was cut from
    energy: float  # share of their squared Frobenius norm that it holds
    inside: Piece  # the part in the subspace
    outside: Piece  # the rest

    @property
    def carrier(self) -> str:
        """``inside``, ``outside``, ``both`` (each would do) or ``neither``."""
        if self.inside.carries:
            return "both" if self.outside.carries else "inside"
        return "outside" if self.outside.carries else "neither"

    @property
    def illusory(self) -> bool:
        """Whether this looks like the illusion.

        The classes differ in the part that nothing reads, and that part does nothing, while the
        part that is read carries the effect and is asleep in the data.
        """
        awake = self.outside.along is not None and not self.outside.asleep
        return self.reads and self.carrier == "inside" and self.inside.asleep and awake


@dataclass(frozen=True)
class Elsewhere:
    """The edit at another site."""

    site: str  # the other site
    probe_accuracy: float  # of the probe fitted there, on held-out prompts
    as_accurate: bool  # whether that is no less than at the best site, within a percentage point
    # Between the displacement of the best site and that fitted here, mean over prompts.
    cosine: float
    moved: EditOutcome  # the best site's displacement, added here
    fitted: EditOutcome  # the edit fitted here


@dataclass(frozen=True)
class ByChance:
    """Edits of one kind that know nothing of the class, over several seeds."""

    kind: str  # what they are
    # Share of answers flipped, by seed; empty where no prompt was answered by the class that holds.
    flipped: list[float]
    # Over seeds and prompts, with its bootstrap interval over prompts; None there.
    mean_flipped: Estimate | None
    logit_difference: Estimate  # mean preference for the class that holds, over seeds and prompts
    length: float  # mean Mahalanobis length as a share of the study's edit's
    # Of the probes on the labels that they were fitted to, held out; None for directions without a
    # probe.
    accuracy: float | None


@dataclass(frozen=True)
class Halves:
    """Two edits whose probes and metrics were fitted to disjoint halves of the training prompts."""

    prompts: list[int]  # in each half
    accuracy: list[float]  # of each probe, on held-out prompts
    cosine: float  # between their displacements, mean over prompts
    cosine_mahalanobis: float  # the same in the study's metric
    outcomes: list[EditOutcome]  # of each
    same_answer: float  # share of held-out prompts to which both edits give the same answer
    # Of each edit, the share of prompts in which the *other* half's probe reads the class written.
    believed: list[float]
    # Of each edit, the mean log odds of that class under the other half's probe.
    log_odds: list[float]


@dataclass(frozen=True)
class ControlsResult(Likeness):
    """The illusion controls of the edit at one site."""

    site: str  # where it acts
    prompts: int  # held-out prompts
    # Those answered by the class that holds in the clean run, of which shares flipped are taken.
    answered: int
    seed: int  # of all that is drawn
    probe_accuracy: float  # of the probe there, on held-out prompts
    clean: Estimate  # mean preference for the class that holds, without an edit
    distance: float  # mean Mahalanobis length of the counterfactual edit
    euclidean: float  # mean Euclidean length
    counterfactual: EditOutcome  # the edit towards the next class
    control: EditOutcome  # the edit towards the class that holds
    whole: Along | None  # natural and edited activations along the edit's own direction
    splits: list[Split]  # by subspace
    unread: str  # why the edit was not split by what later parts read; empty where it was
    elsewhere: list[Elsewhere]  # at other sites
    chance: list[ByChance]  # edits that know nothing of the class
    # Edits fitted to disjoint halves; None where a half has too few prompts of a class.
    halves: Halves | None
    words: Words  # what the things of the task are called
    # The ceiling of the edit, which `recovered` and the like compare it with; None where no prompt
    # has a twin.
    interchange: Interchange | None = None


# ---- the controls --------------------------------------------------------------------------------


@torch.no_grad()
def compute(given: Given, advance: Advance, *, seeds: int = SEEDS) -> ControlsResult:
    """Run the controls of the counterfactual edit at the best site, of prompts with answers.

    Each kind of chance is drawn so many times; ``advance`` is called with the number of prompts
    after each batch.
    """
    context, site, test = given.context, given.site, given.context.task.test
    here, *there = _places(given)
    spaces, unread = _spaces(context, here, given.results.get("heads"))
    trials, edit = Trials(context, test), here.edit
    patch = trials.ceiling(site, edit.metric)
    own = trials.add(site, here.delta, patch, edit.metric)
    back = trials.add(site, displacements(edit, here.x, here.y, here.y))
    drawn = [context.seed + index for index in range(seeds)]
    # Each reads its trials once they have run.
    splits = _splits(trials, here, spaces)
    elsewhere = _elsewhere(trials, here, there)
    chance = _chance(trials, here, drawn, given.settings.l2)
    halves = _halves(trials, here, given)
    trials.run(batch_done=advance)
    interchange, likeness = trials.likenesses({site: own}, patch)
    measuring = Measuring(trials, own, patch)
    return ControlsResult(
        site=site,
        prompts=len(test),
        answered=int((trials.clean["own_lead"] > 0).sum()),
        seed=context.seed,
        probe_accuracy=here.accuracy,
        clean=trials.sample.mean(trials.clean["logit_difference"]),
        distance=float(own["distance"].mean()),
        euclidean=float(here.delta.norm(dim=-1).mean()),
        counterfactual=measuring.outcome(own),
        control=measuring.outcome(back),
        whole=here.along(here.delta),
        splits=splits(measuring),
        unread=unread,
        elsewhere=elsewhere(measuring),
        chance=chance(measuring),
        halves=halves(measuring),
        words=test.words,
        interchange=interchange,
        **likeness.get(site, {}),
    )


class Measuring:
    """Turns trials into outcomes, beside the clean run and the study's own edit."""

    def __init__(self, trials: Trials, own: Trial, patch: Trial | None) -> None:
        self.trials, self.sample = trials, trials.sample
        effect = self._change(own)
        self._effect = effect if self.sample.mean(effect).certain else None
        self._most: tuple[Sample, Tensor] | None = None
        if patch is not None and patch.known is not None:
            most, known = self._change(patch), self.sample.among(patch.known)
            self._most = (known, most) if known.mean(most).certain else None

    def _change(self, trial: Trial) -> Tensor:
        return self.trials.clean["logit_difference"] - trial["logit_difference"]

    def outcome(self, trial: Trial) -> EditOutcome:
        """What a trial says."""
        change = self._change(trial)
        return EditOutcome(
            self.sample.flipped(self.trials.clean.found, trial.found),
            self.sample.mean(trial["logit_difference"]),
            None if self._effect is None else self.sample.ratio(change, self._effect),
            None if self._most is None else self._most[0].ratio(change, self._most[1]),
        )


@dataclass(frozen=True, eq=False)
class Place:
    """An edit at one site, with what it was fitted to and what it is tried on."""

    site: str  # its name
    edit: LRQP  # to be tried
    x_train: Tensor  # activations that it was fitted to, (m, d)
    y_train: Tensor  # their classes, (m,)
    x: Tensor  # held-out activations, (n, d)
    y: Tensor  # their classes, (n,)

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


def _places(given: Given) -> list[Place]:
    """The edit's own site, then others with edits of their own."""
    context, task, site = given.context, given.context.task, given.site
    others = [name for name in evenly(context.sites, MOST_SITES) if name != site]
    wanted = [site, *others]
    train, test = context.clean(task, "mark", no_progress, wanted)
    y_train, y = (data.labels.to(context.device).long() for data in (task.train, task.test))
    edits = given.fit({name: train[name] for name in others}, y_train) if others else {}
    edits[site] = given.edit_at(site)
    return [Place(name, edits[name], train[name], y_train, test[name], y) for name in wanted]


def _spaces(
    context: StudyContext, here: Place, heads: HeadsResult | None
) -> tuple[list[Space], str]:
    """Subspaces to split by, and why those of readers are missing."""
    unread = ""
    try:
        role, names = readers_of(context, here.site, heads)
        spaces = reader_spaces(context.model, here.site, role, names)
    except UnknownFamilyError as error:
        spaces, unread = [], str(error)
    if spaces:
        spaces.append(random_space(spaces[0], context.generator()))
    return [*spaces, class_mean_space(here.x_train, here.y_train)], unread


def _splits(trials: Trials, here: Place, spaces: list[Space]) -> Callable[[Measuring], list[Split]]:
    pieces = [
        (space, [(delta, trials.add(here.site, delta)) for delta in split(here.delta, space.rows)])
        for space in spaces
    ]

    def piece(measuring: Measuring, delta: Tensor, trial: Trial) -> Piece:
        whole = here.delta.square().sum(-1)
        some = whole > 0
        return Piece(
            share=float((delta.square().sum(-1)[some] / whole[some]).mean()) if some.any() else 0.0,
            mahalanobis=here.length(delta),
            along=here.along(delta),
            outcome=measuring.outcome(trial),
        )

    return lambda measuring: [
        Split(
            space=space.name,
            reads=space.reads,
            dimensions=len(space.rows),
            width=space.rows.shape[1],
            rank=space.rank,
            energy=space.energy,
            inside=piece(measuring, *inside),
            outside=piece(measuring, *outside),
        )
        for space, (inside, outside) in pieces
    ]


def _elsewhere(
    trials: Trials, here: Place, there: list[Place]
) -> Callable[[Measuring], list[Elsewhere]]:
    added = [(s, trials.add(s.site, here.delta), trials.add(s.site, s.delta)) for s in there]
    return lambda measuring: [
        Elsewhere(
            site=site.site,
            probe_accuracy=site.accuracy,
            as_accurate=site.accuracy >= here.accuracy - AS_ACCURATE,
            cosine=_cosine(here.delta, site.delta),
            moved=measuring.outcome(moved),
            fitted=measuring.outcome(fitted),
        )
        for site, moved, fitted in added
    ]


# ---- edits that know nothing of the variable -----------------------------------------------------


Chance = tuple[Tensor, float | None]
"""Displacements of held-out activations, (n, d), by one kind of chance and one seed; and how often
its probe, where it has one, is right on held-out labels of the kind that it was fitted to."""


def _chance(
    trials: Trials, here: Place, seeds: list[int], l2: float | None
) -> Callable[[Measuring], list[ByChance]]:
    drawn = by_chance(here, seeds, l2)
    added = {k: [trials.add(here.site, delta) for delta, _ in draws] for k, draws in drawn.items()}

    def found(measuring: Measuring, kind: str) -> ByChance:
        deltas, accuracies = zip(*drawn[kind], strict=True)
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        sample, answered = measuring.sample, measuring.trials.clean["own_lead"] > 0
        flips, leads = (
            torch.stack([trial[name] for trial in added[kind]])
            for name in ("other_lead", "logit_difference")
        )
        flips, some = (flips > 0).double(), answered.any()
        return ByChance(
            kind=kind,
            flipped=flips[:, answered].mean(1).tolist() if some else [],
            mean_flipped=sample.among(answered).mean(flips.mean(0)) if some else None,
            logit_difference=sample.mean(leads.mean(0)),
            length=here.length(torch.cat(deltas)),
            accuracy=sum(known) / len(known) if known else None,
        )

    return lambda measuring: [found(measuring, kind) for kind in added]


def by_chance(here: Place, seeds: list[int], l2: float | None) -> dict[str, list[Chance]]:
    """Displacements of every kind of :data:`KINDS`, one for each seed.

    The metric and odds rule of the edit ``here`` are used for all.
    """
    edit, x_train, x = here.edit, here.x_train.double(), here.x.double()
    root = _inverse_root(edit.metric.covariance.to(x.device))
    problems: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    held_out: dict[tuple[str, int], Tensor] = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        mixed, held_out[SHUFFLED, seed] = (
            y[torch.randperm(len(y), generator=generator).to(y.device)]
            for y in (here.y_train, here.y)
        )
        normal = torch.randn(x.shape[1], dtype=torch.float64, generator=generator)
        direction = root @ normal.to(x.device)
        along_train, along_test = x_train @ direction, x @ direction
        cut = along_train.median()
        held_out[FEATURE, seed] = (along_test > cut).long()
        problems[SHUFFLED, seed] = here.x_train, mixed
        problems[FEATURE, seed] = here.x_train, (along_train > cut).long()
    probes = LinearProbe.fit_many(problems, l2=l2)
    length = edit.metric.distance(here.delta)
    found: dict[str, list[Chance]] = {kind: [] for kind in KINDS}
    for seed in seeds:
        random = RandomDirection(edit, seed=seed)(x, here.target, here.y)
        found[RANDOM].append((random - x, None))
        probe, feature = probes[SHUFFLED, seed], probes[FEATURE, seed]
        moved = here.displaced(_with_probe(edit, probe))
        accuracy = probe.accuracy(here.x, held_out[SHUFFLED, seed])
        found[SHUFFLED].append((moved, accuracy))
        found[SHUFFLED_SCALED].append((scaled(edit.metric, moved, length), accuracy))
        read = feature(here.x).argmax(-1)
        moved = displacements(_with_probe(edit, feature), here.x, 1 - read, read)
        found[FEATURE].append((moved, feature.accuracy(here.x, held_out[FEATURE, seed])))
    return found


def _with_probe(edit: LRQP, probe: LinearProbe) -> LRQP:
    how: dict[str, Any] = {"log_odds": float(edit.log_odds), "rule": edit.rule}
    return LRQP(probe, edit.metric, on_infeasible="skip", **how)


# ---- edits from half of the prompts --------------------------------------------------------------


def _halves(trials: Trials, here: Place, given: Given) -> Callable[[Measuring], Halves | None]:
    halves = half_edits(here.x_train, here.y_train, given)
    if not halves:
        return lambda measuring: None
    x, y, target = here.x, here.y, here.target
    deltas = [here.displaced(half) for _, half in halves]
    first, second = (trials.add(here.site, delta) for delta in deltas)
    crossed = [
        other.probe.log_odds(x.double() + delta, target)
        for (_, other), delta in zip(halves[::-1], deltas, strict=True)
    ]
    # Its Euclidean geometry is the metric's.
    white = _inverse_root(here.edit.metric.covariance.to(x.device))
    return lambda measuring: Halves(
        prompts=[count for count, _ in halves],
        accuracy=[half.probe.accuracy(x, y) for _, half in halves],
        cosine=_cosine(*deltas),
        cosine_mahalanobis=_cosine(*(delta.double() @ white for delta in deltas)),
        outcomes=[measuring.outcome(first), measuring.outcome(second)],
        same_answer=float(
            ((first["logit_difference"] > 0) == (second["logit_difference"] > 0)).double().mean()
        ),
        believed=[float((odds > 0).double().mean()) for odds in crossed],
        log_odds=[float(odds.double().mean()) for odds in crossed],
    )


def half_edits(x: Tensor, y: Tensor, given: Given) -> list[tuple[int, LRQP]]:
    """Number of prompts and edit of two disjoint halves, each with its own probe and metric.

    Both halves of the activations x, (n, d), hold as many of each of the classes y, (n,), within
    one. Empty where a half would have fewer than two of a class.
    """
    generator, halves = given.context.generator(), list[list[Tensor]](([], []))
    for rows in rows_by_class(y, generator):
        for half, own in zip(halves, (rows[::2], rows[1::2]), strict=True):
            half.append(own)
    if min(len(rows) for half in halves for rows in half) < 2:
        return []
    chosen = [torch.cat(half).to(x.device) for half in halves]
    return [(len(rows), given.fit({"half": x[rows]}, y[rows])["half"]) for rows in chosen]


def _cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine between the rows of two sets of displacements; 0 where one of them is 0."""
    return float(cosine_similarity(first.double(), second.double(), dim=-1).mean())


def _inverse_root(covariance: Tensor) -> Tensor:
    """Σ^(-1/2), without the null space of Σ."""
    values, vectors = torch.linalg.eigh(covariance)
    present = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = (vectors[:, present] / values[present].sqrt()) @ vectors[:, present].T
    return root
