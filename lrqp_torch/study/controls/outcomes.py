"""The numbers of the illusion controls, as they are kept and reported."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lrqp_torch.study.controls.splitting import Along
from lrqp_torch.study.dose import Mean
from lrqp_torch.study.estimates import bootstrap_mean, bootstrap_ratio, wilson

CARRIES = 0.5
"""A part carries the effect if it brings about at least this share of the edit's own."""

SEPARATED = 1.0
"""Classes differ along a direction if their means lie at least this many standard deviations within
a class apart; a direction along which they do not is asleep."""


@dataclass(frozen=True)
class Outcome:
    """What displacements of the held-out prompts did to the answers.

    Attributes:
        flipped: of the prompts answered IO in the clean run, the share answered S; None for none.
        flipped_interval: Wilson's 95 % interval.
        logit_difference: mean IO − S, in logits.
        effect: the mean change of IO − S as a share of that of the study's own counterfactual edit;
            None where the interval of that edit's own change includes 0.
        effect_interval: its bootstrap 95 % interval; None with ``effect``, or where it is infinite.
    """

    flipped: float | None
    flipped_interval: list[float]
    logit_difference: Mean
    effect: float | None
    effect_interval: list[float] | None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(**(raw | {"logit_difference": Mean(**raw["logit_difference"])}))


@dataclass(frozen=True)
class Part:
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
    outcome: Outcome

    @property
    def carries(self) -> bool:
        """Whether it brings about at least :data:`CARRIES` of the effect."""
        return self.outcome.effect is not None and self.outcome.effect >= CARRIES

    @property
    def asleep(self) -> bool:
        """Whether the classes hardly differ along it."""
        return self.along is not None and self.along.separation < SEPARATED

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        nested = {
            "along": None if raw["along"] is None else Along(**raw["along"]),
            "outcome": Outcome.from_json(raw["outcome"]),
        }
        return cls(**(raw | nested))


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
    inside: Part
    outside: Part

    @property
    def carrier(self) -> str:
        """``inside``, ``outside``, ``both`` (each would do) or ``neither``."""
        return {
            (True, True): "both",
            (True, False): "inside",
            (False, True): "outside",
            (False, False): "neither",
        }[self.inside.carries, self.outside.carries]

    @property
    def illusory(self) -> bool:
        """Whether this looks like the illusion.

        The classes differ in the part that nothing reads, and that part does nothing, while the
        part that is read carries the effect and is asleep in the data.
        """
        outside = self.outside.along
        return (
            self.reads
            and self.carrier == "inside"
            and self.inside.asleep
            and outside is not None
            and not self.outside.asleep
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        nested = {name: Part.from_json(raw[name]) for name in ("inside", "outside")}
        return cls(**(raw | nested))


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
    moved: Outcome
    fitted: Outcome

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(**(raw | {name: Outcome.from_json(raw[name]) for name in ("moved", "fitted")}))


@dataclass(frozen=True)
class ByChance:
    """Edits of one kind that know nothing of the order, over several seeds.

    Attributes:
        kind: what they are.
        flipped: share of answers flipped, by seed; empty where no prompt was answered IO.
        mean_flipped: over seeds and prompts, with its bootstrap interval over prompts; None there.
        logit_difference: mean IO − S over seeds and prompts.
        length: mean Mahalanobis length as a share of the study's edit's.
        accuracy: of the probes on the labels that they were fitted to, held out; None for
            directions without a probe.
    """

    kind: str
    flipped: list[float]
    mean_flipped: Mean | None
    logit_difference: Mean
    length: float
    accuracy: float | None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        flipped = raw["mean_flipped"]
        nested = {
            "mean_flipped": None if flipped is None else Mean(**flipped),
            "logit_difference": Mean(**raw["logit_difference"]),
        }
        return cls(**(raw | nested))


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
    outcomes: list[Outcome]
    same_answer: float
    believed: list[float]
    log_odds: list[float]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(**(raw | {"outcomes": [Outcome.from_json(item) for item in raw["outcomes"]]}))


@dataclass(frozen=True)
class ControlsResult:
    """The illusion controls of the edit at one site.

    Attributes:
        site: where it acts, at S2.
        prompts: held-out prompts.
        answered: those answered IO in the clean run, of which shares flipped are taken.
        seed: of all that is drawn.
        probe_accuracy: of the probe there, on held-out prompts.
        clean: mean IO − S without an edit, in logits.
        distance: mean Mahalanobis length of the counterfactual edit.
        euclidean: mean Euclidean length.
        counterfactual: the edit towards the other order.
        control: the edit towards the true order.
        whole: natural and edited activations along the edit's own direction.
        splits: by subspace.
        unread: why the edit was not split by what later parts read; empty where it was.
        elsewhere: at other sites.
        chance: edits that know nothing of the order.
        halves: edits fitted to disjoint halves; None where a half has too few prompts of a class.
    """

    site: str
    prompts: int
    answered: int
    seed: int
    probe_accuracy: float
    clean: Mean
    distance: float
    euclidean: float
    counterfactual: Outcome
    control: Outcome
    whole: Along | None
    splits: list[Split]
    unread: str
    elsewhere: list[Elsewhere]
    chance: list[ByChance]
    halves: Halves | None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        nested = {
            "clean": Mean(**raw["clean"]),
            "counterfactual": Outcome.from_json(raw["counterfactual"]),
            "control": Outcome.from_json(raw["control"]),
            "whole": None if raw["whole"] is None else Along(**raw["whole"]),
            "splits": [Split.from_json(item) for item in raw["splits"]],
            "elsewhere": [Elsewhere.from_json(item) for item in raw["elsewhere"]],
            "chance": [ByChance.from_json(item) for item in raw["chance"]],
            "halves": None if raw["halves"] is None else Halves.from_json(raw["halves"]),
        }
        return cls(**(raw | nested))


class Measuring:
    """Turns logit differences into outcomes, beside the clean run and the study's own edit.

    Args:
        clean: IO − S without an edit, (n,).
        edited: IO − S under the study's counterfactual edit, (n,).
        seed: of the bootstrap.
    """

    def __init__(self, clean: Tensor, edited: Tensor, seed: int) -> None:
        self.clean, self._effect, self._seed = clean, clean - edited, seed
        low, high = bootstrap_mean(self._effect, self.generator())
        self._has_effect = not low <= 0 <= high

    def generator(self) -> torch.Generator:
        """A fresh generator, so that all intervals come from the same resampled prompts."""
        return torch.Generator().manual_seed(self._seed)

    def mean(self, values: Tensor) -> Mean:
        """A mean over prompts with its interval."""
        return Mean.of(values, self.generator())

    def outcome(self, edited: Tensor) -> Outcome:
        """What logit differences (n,) say."""
        answered = self.clean > 0
        n, flips = int(answered.sum()), int((edited[answered] < 0).sum())
        effect = interval = None
        if self._has_effect:
            change = self.clean - edited
            effect = float(change.mean() / self._effect.mean())
            ends = list(bootstrap_ratio(change, self._effect, self.generator()))
            interval = ends if all(map(math.isfinite, ends)) else None
        return Outcome(
            flipped=flips / n if n else None,
            flipped_interval=list(wilson(flips, n)),
            logit_difference=self.mean(edited),
            effect=effect,
            effect_interval=interval,
        )

    def by_chance(
        self, kind: str, runs: list[Tensor], *, length: float, accuracy: float | None
    ) -> ByChance:
        """What the logit differences (n,) of several seeds say together."""
        answered, stacked = self.clean > 0, torch.stack(runs)
        flips = (stacked[:, answered] < 0).double()
        some = bool(answered.any())
        return ByChance(
            kind=kind,
            flipped=flips.mean(1).tolist() if some else [],
            mean_flipped=self.mean(flips.mean(0)) if some else None,
            logit_difference=self.mean(stacked.mean(0)),
            length=length,
            accuracy=accuracy,
        )
