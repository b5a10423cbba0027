"""Illusion controls of an edit at one site: does it work through what the model reads?

After Makelov, Lange and Nanda 2023, "Is This the Subspace You Are Looking for?" (arXiv 2311.17030):
an edit along one direction may change the answer although that direction means nothing to the
model. So the edit is split into the part that later parts of the model read and the rest, each run
alone; it is moved to other sites; edits that know nothing of the variable are put beside it; and
edits from disjoint halves of the prompts are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import UnknownFamilyError
from lrqp_torch.probes.covariance import Shrinkage
from lrqp_torch.study.ceiling import Interchange, Likeness, interchange_of, likenesses
from lrqp_torch.study.chance import Fit, Place, by_chance, cosines, half_edits, whitened
from lrqp_torch.study.context import Advance, StudyContext, evenly, no_progress
from lrqp_torch.study.estimates import Estimate, bootstrap_mean
from lrqp_torch.study.heads import HeadsResult
from lrqp_torch.study.prompts import Words
from lrqp_torch.study.readers import (
    Along,
    Space,
    class_mean_space,
    random_space,
    reader_spaces,
    readers_of,
    split,
)
from lrqp_torch.study.running import Twinned
from lrqp_torch.study.sweep import fit_edits
from lrqp_torch.study.trials import Trial, Trials, displacements, flipped

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


@dataclass(frozen=True)
class EditOutcome:
    """What displacements of the held-out prompts did to the answers.

    Attributes:
        flipped: of the prompts answered by the class that holds in the clean run, the share then
            answered by the next one.
        logit_difference: mean preference for the class that holds; IO − S, in logits, of indirect
            object identification.
        effect: the mean change of the preference as a share of that of the study's own
            counterfactual edit; None where the interval of that edit's own change includes 0.
        recovered: the same as a share of the interchange's, see :mod:`~.ceiling`; None also where
            no prompt has a twin.
    """

    flipped: Estimate
    logit_difference: Estimate
    effect: Estimate | None
    recovered: Estimate | None = None


@dataclass(frozen=True)
class Piece:
    """One part of the edit, run alone.

    Attributes:
        share: of ‖δ‖², mean over prompts.
        mahalanobis: its Mahalanobis length as a share of the edit's, mean over prompts; parts may
            be longer than the whole.
        along: natural and edited activations along its direction; None where the part is rounding.
        outcome: of adding this part alone.
    """

    share: float
    mahalanobis: float
    along: Along | None
    outcome: EditOutcome

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
    """The edit split by one subspace.

    Attributes:
        space: its name.
        reads: whether later parts of the model read through it.
        dimensions: of the subspace.
        width: d, of the stream; a subspace in a random position would hold dimensions / width.
        rank: numerical rank of the weights that it was cut from.
        energy: share of their squared Frobenius norm that it holds.
        inside: the part in the subspace.
        outside: the rest.
    """

    space: str
    reads: bool
    dimensions: int
    width: int
    rank: int
    energy: float
    inside: Piece
    outside: Piece

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
    """The edit at another site.

    Attributes:
        site: the other site.
        probe_accuracy: of the probe fitted there, on held-out prompts.
        as_accurate: whether that is no less than at the best site, within a percentage point.
        cosine: between the displacement of the best site and that fitted here, mean over prompts.
        moved: the best site's displacement, added here.
        fitted: the edit fitted here.
    """

    site: str
    probe_accuracy: float
    as_accurate: bool
    cosine: float
    moved: EditOutcome
    fitted: EditOutcome


@dataclass(frozen=True)
class ByChance:
    """Edits of one kind that know nothing of the class, over several seeds.

    Attributes:
        kind: what they are.
        flipped: share of answers flipped, by seed; empty where no prompt was answered by the class
            that holds.
        mean_flipped: over seeds and prompts, with its bootstrap interval over prompts; None there.
        logit_difference: mean preference for the class that holds, over seeds and prompts.
        length: mean Mahalanobis length as a share of the study's edit's.
        accuracy: of the probes on the labels that they were fitted to, held out; None for
            directions without a probe.
    """

    kind: str
    flipped: list[float]
    mean_flipped: Estimate | None
    logit_difference: Estimate
    length: float
    accuracy: float | None


@dataclass(frozen=True)
class Halves:
    """Two edits whose probes and metrics were fitted to disjoint halves of the training prompts.

    Attributes:
        prompts: in each half.
        accuracy: of each probe, on held-out prompts.
        cosine: between their displacements, mean over prompts.
        cosine_mahalanobis: the same in the study's metric.
        outcomes: of each.
        same_answer: share of held-out prompts to which both edits give the same answer.
        believed: of each edit, the share of prompts in which the *other* half's probe reads the
            class written.
        log_odds: of each edit, the mean log odds of that class under the other half's probe.
    """

    prompts: list[int]
    accuracy: list[float]
    cosine: float
    cosine_mahalanobis: float
    outcomes: list[EditOutcome]
    same_answer: float
    believed: list[float]
    log_odds: list[float]


@dataclass(frozen=True)
class ControlsResult(Likeness):
    """The illusion controls of the edit at one site.

    Attributes:
        site: where it acts.
        prompts: held-out prompts.
        answered: those answered by the class that holds in the clean run, of which shares flipped
            are taken.
        seed: of all that is drawn.
        probe_accuracy: of the probe there, on held-out prompts.
        clean: mean preference for the class that holds, without an edit.
        distance: mean Mahalanobis length of the counterfactual edit.
        euclidean: mean Euclidean length.
        counterfactual: the edit towards the next class.
        control: the edit towards the class that holds.
        whole: natural and edited activations along the edit's own direction.
        splits: by subspace.
        unread: why the edit was not split by what later parts read; empty where it was.
        elsewhere: at other sites.
        chance: edits that know nothing of the class.
        halves: edits fitted to disjoint halves; None where a half has too few prompts of a class.
        words: what the things of the task are called.
        interchange: the ceiling of the edit, which ``recovered`` and the like compare it with; None
            where no prompt has a twin.
    """

    site: str
    prompts: int
    answered: int
    seed: int
    probe_accuracy: float
    clean: Estimate
    distance: float
    euclidean: float
    counterfactual: EditOutcome
    control: EditOutcome
    whole: Along | None
    splits: list[Split]
    unread: str
    elsewhere: list[Elsewhere]
    chance: list[ByChance]
    halves: Halves | None
    words: Words
    interchange: Interchange | None = None


class Measuring:
    """Turns trials into outcomes, beside the clean run and the study's own edit.

    Args:
        clean: the trial without an edit.
        own: the study's counterfactual edit.
        seed: of the bootstrap.
        groups: of the prompts.
        patch: the interchange, if there is one, and who has a twin.
    """

    def __init__(
        self,
        clean: Trial,
        own: Trial,
        seed: int,
        groups: Tensor | None = None,
        patch: tuple[Trial, Tensor] | None = None,
    ) -> None:
        self.clean, self._seed, self._groups, self._patch = clean, seed, groups, patch
        self._effect = clean["preference"] - own["preference"]
        low, high = bootstrap_mean(self._effect, self.generator(), groups=groups)
        self._has_effect = not low <= 0 <= high

    def generator(self) -> torch.Generator:
        """A fresh generator, so that all intervals come from the same resampled prompts."""
        return torch.Generator().manual_seed(self._seed)

    def mean(self, values: Tensor) -> Estimate:
        """A mean over prompts with its interval."""
        return Estimate.mean(values, self.generator(), self._groups)

    def outcome(self, trial: Trial) -> EditOutcome:
        """What a trial says."""
        change, effect = self.clean["preference"] - trial["preference"], None
        if self._has_effect:
            effect = Estimate.ratio(change, self._effect, self.generator(), self._groups)
        flips = flipped(self.clean["own_lead"], trial["other_lead"], self._groups)
        return EditOutcome(flips, self.mean(trial["preference"]), effect, self._recovered(change))

    def _recovered(self, change: Tensor) -> Estimate | None:
        """A change of the preference as a share of the interchange's, where that has one."""
        if self._patch is None:
            return None
        patch, known = self._patch
        most = (self.clean["preference"] - patch["preference"])[known]
        groups = None if self._groups is None else self._groups[known]
        if not Estimate.mean(most, self.generator(), groups).certain:
            return None
        return Estimate.ratio(change[known], most, self.generator(), groups)

    def by_chance(
        self, kind: str, trials: Sequence[Trial], *, length: float, accuracy: float | None
    ) -> ByChance:
        """What the trials of several seeds say together."""
        answered = self.clean["own_lead"] > 0
        flips = torch.stack([trial["other_lead"] > 0 for trial in trials])[:, answered].double()
        some = bool(answered.any())
        own = None if self._groups is None else self._groups.cpu()[answered]
        return ByChance(
            kind=kind,
            flipped=flips.mean(1).tolist() if some else [],
            mean_flipped=Estimate.mean(flips.mean(0), self.generator(), own) if some else None,
            logit_difference=self.mean(torch.stack([t["preference"] for t in trials]).mean(0)),
            length=length,
            accuracy=accuracy,
        )


@torch.no_grad()
def compute(
    context: StudyContext,
    site: str,
    edit: LRQP,
    heads: HeadsResult | None,
    *,
    l2: float | None = None,
    shrinkage: Shrinkage = "ledoit_wolf",
    seeds: int = SEEDS,
    advance: Advance = no_progress,
) -> ControlsResult:
    """Run the controls of the counterfactual edit at one site.

    Args:
        context: the model and its prompts, which have answers.
        site: where the edit acts, at the marked token.
        edit: fitted to the training prompts at that site, as by :func:`~.sweep.fit_edits`.
        heads: the heads and their roles; None where the prompts have none, see
            :func:`~.readers.readers_of`.
        l2: penalty of the probes that are fitted here.
        shrinkage: of the covariances that are estimated here.
        seeds: how often each kind of chance is drawn; at least 1.
        advance: called with the number of prompts after each batch.
    """
    test = context.task.test
    others = [name for name in evenly(context.sites, MOST_SITES) if name != site]
    fit = partial(fit_edits, l2=l2, shrinkage=shrinkage, log_odds=float(edit.log_odds))
    here, *there = _places(context, site, edit, others, fit)
    spaces, unread = _spaces(context, here, heads)
    trials = Trials(context, test)
    twinned = Twinned.of(context, context.task, site, edit.metric.distance)
    patch = None if twinned is None else trials.interchange(twinned)
    own = trials.add(site, here.delta)
    back = trials.add(site, displacements(edit, here.x, here.y, here.y))
    # Each reads its trials once they have run.
    splits = _splits(trials, here, spaces)
    elsewhere = _elsewhere(trials, here, there)
    chance = _chance(trials, here, [context.seed + index for index in range(seeds)], l2)
    halves = _halves(trials, here, fit, context.seed)
    trials.run(batch_done=advance)

    groups, likeness = test.groups, dict[str, Any]()
    if patch is not None and twinned is not None:
        patch.found["divergence"] = patch["kl_at_end"]
        moved = own.found | {"distance": edit.metric.distance(here.delta).cpu()}
        how = (twinned.known, context.seed, groups)
        likeness = likenesses(trials.clean.found, {site: (moved, patch.found)}, *how)[site]
        likeness["interchange"] = interchange_of(trials.clean.found, patch.found, *how)
    ceiling = None if patch is None or twinned is None else (patch, twinned.known)
    measuring = Measuring(trials.clean, own, context.seed, groups, ceiling)
    return ControlsResult(
        site=site,
        prompts=len(test),
        answered=int((trials.clean["own_lead"] > 0).sum()),
        seed=context.seed,
        probe_accuracy=here.accuracy,
        clean=measuring.mean(trials.clean["preference"]),
        distance=float(edit.metric.distance(here.delta).mean()),
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
        **likeness,
    )


def _places(
    context: StudyContext, site: str, edit: LRQP, others: list[str], fit: Fit
) -> list[Place]:
    """The edit's own site, then the others with edits of their own."""
    task, wanted = context.task, [site, *others]
    train, test = (context.activations(task, half, "mark", wanted) for half in ("train", "test"))
    y_train, y = (data.labels.to(context.device).long() for data in (task.train, task.test))
    edits = dict(fit({name: train[name] for name in others}, y_train)) if others else {}
    edits[site] = edit
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
            cosine=float(cosines(here.delta, site.delta).mean()),
            moved=measuring.outcome(moved),
            fitted=measuring.outcome(fitted),
        )
        for site, moved, fitted in added
    ]


def _chance(
    trials: Trials, here: Place, seeds: list[int], l2: float | None
) -> Callable[[Measuring], list[ByChance]]:
    drawn = by_chance(here, seeds, l2)
    added = {
        kind: [(item, trials.add(here.site, item.delta)) for item in draws]
        for kind, draws in drawn.items()
    }

    def found(measuring: Measuring, kind: str) -> ByChance:
        draws, trials_of = zip(*added[kind], strict=True)
        known = [item.accuracy for item in draws if item.accuracy is not None]
        return measuring.by_chance(
            kind,
            trials_of,
            length=here.length(torch.cat([item.delta for item in draws])),
            accuracy=sum(known) / len(known) if known else None,
        )

    return lambda measuring: [found(measuring, kind) for kind in added]


def _halves(
    trials: Trials, here: Place, fit: Fit, seed: int
) -> Callable[[Measuring], Halves | None]:
    halves = half_edits(here.x_train, here.y_train, fit, seed)
    if not halves:
        return lambda measuring: None
    x, y, target = here.x, here.y, here.target
    deltas = [here.displaced(half) for _, half in halves]
    first, second = (trials.add(here.site, delta) for delta in deltas)
    crossed = [
        other.probe.log_odds(x.double() + delta, target)
        for (_, other), delta in zip(halves[::-1], deltas, strict=True)
    ]
    return lambda measuring: Halves(
        prompts=[count for count, _ in halves],
        accuracy=[half.probe.accuracy(x, y) for _, half in halves],
        cosine=float(cosines(*deltas).mean()),
        cosine_mahalanobis=float(cosines(*(whitened(here.edit, d) for d in deltas)).mean()),
        outcomes=[measuring.outcome(first), measuring.outcome(second)],
        same_answer=float(
            ((first["preference"] > 0) == (second["preference"] > 0)).double().mean()
        ),
        believed=[float((odds > 0).double().mean()) for odds in crossed],
        log_odds=[float(odds.double().mean()) for odds in crossed],
    )
