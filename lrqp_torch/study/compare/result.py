"""What the league table holds, as plain JSON values."""

from dataclasses import dataclass, field
from typing import Any, Self

from lrqp_torch.study.compare.oracles import OracleScore
from lrqp_torch.study.dose import Mean

DIVERGENCE, REST, UNSELECTIVE = "divergence", "rest", "unselective"
SIDE_EFFECTS = {
    DIVERGENCE: "KL between S2 and END (nats)",
    REST: "KL between S2 and END beside the two names (nats)",
    UNSELECTIVE: "1 − selectivity",
}
"""Side effects of the curves, with their axis titles. The last one is left out where the
independent probes read no variable but the order."""


def _mean(raw: dict[str, Any] | None) -> Mean | None:
    return None if raw is None else Mean(**raw)


@dataclass(frozen=True)
class Effect:
    """One method under one condition, over the held-out prompts.

    Attributes:
        flipped: of the prompts answered IO in the clean run, the share answered S under the edit,
            with its Wilson interval; None if none was answered IO.
        logit_difference: IO − S at END, in logits.
        distance: length of the edit in the study's Mahalanobis metric.
        euclidean: its Euclidean length, in units of the stream.
        log_odds: of the target under the independent probe, in nats.
        divergence: KL(clean ‖ edited) of the next token at the tokens between S2 and END, in nats.
        rest: the part of it that is not about the two names: P(neither) KL(· | neither name).
        attention: change of the watched heads' attention END→IO less END→S1; None without heads.
    """

    flipped: Mean | None
    logit_difference: Mean
    distance: Mean
    euclidean: Mean
    log_odds: Mean
    divergence: Mean
    rest: Mean
    attention: Mean | None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(**{name: _mean(value) for name, value in raw.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class MethodResult:
    """One row of the table.

    Attributes:
        name: of the method in files.
        title: of the method in tables.
        settings: how it was trained; empty for methods in closed form.
        problem: why it could not be built; all figures are then None.
        control: written towards the true order.
        counterfactual: written towards the other order.
        text_divergence: KL(clean ‖ edited) behind an edited token of unrelated text, in nats; None
            where there is no such text.
        scores: completeness, selectivity and reliability of the counterfactual edit, see
            :mod:`.reliability`; the latter two are None where the independent probes read no
            variable but the order.
        seconds: of the edit alone, a prompt.
        relative: by side effect of :data:`SIDE_EFFECTS`, what the method has of it at the effect of
            LRQP, divided by what LRQP has; below 1 it changes less for the same effect. None where
            no strength of the sweep has LRQP's effect.
    """

    name: str
    title: str
    settings: str = ""
    problem: str = ""
    control: Effect | None = None
    counterfactual: Effect | None = None
    text_divergence: Mean | None = None
    scores: dict[str, Mean | None] = field(default_factory=dict)
    seconds: float | None = None
    relative: dict[str, Mean | None] = field(default_factory=dict)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        nested: dict[str, Any] = {
            name: None if raw[name] is None else Effect.from_json(raw[name])
            for name in ("control", "counterfactual")
        }
        for name in ("scores", "relative"):
            nested[name] = {key: _mean(value) for key, value in raw[name].items()}
        nested["text_divergence"] = _mean(raw["text_divergence"])
        return cls(**(raw | nested))


@dataclass(frozen=True)
class Point:
    """One counterfactual edit of the prompts of the sweep.

    Attributes:
        dose: strength, or log α for the curve by odds.
        effect: mean fall of the logit difference IO − S, in logits.
        flipped: share of answers flipped; None if none was answered IO.
        costs: side effect of :data:`SIDE_EFFECTS` to its mean.
        optimal: for each, whether no other point of any curve has at least this effect for at most
            this side effect.
    """

    dose: float
    effect: Mean
    flipped: float | None
    costs: dict[str, Mean]
    optimal: dict[str, bool]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        costs = {name: Mean(**cost) for name, cost in raw["costs"].items()}
        return cls(**(raw | {"effect": Mean(**raw["effect"]), "costs": costs}))


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
    points: list[Point]


@dataclass(frozen=True)
class SiteComparison:
    """All methods at one site.

    Attributes:
        site: where they edit.
        prompts: held-out prompts.
        answered: of them, answered IO in the clean run.
        clean: their mean logit difference without an edit.
        said_elsewhere: probability that the clean model gives to either name at the tokens between
            S2 and END; where it is large, KL there is the effect itself more than a side effect.
        sweep_prompts: the first held-out prompts, on which curves were run.
        texts: unrelated texts.
        watched: heads whose attention was recorded.
        role: the role for which they were chosen; empty without heads.
        oracles: what the independent probes read from clean activations, the order first.
        methods: rows of the table.
        curves: see :class:`Curve`.
    """

    site: str
    prompts: int
    answered: int
    clean: Mean
    said_elsewhere: float
    sweep_prompts: int
    texts: int
    watched: list[str]
    role: str
    oracles: list[OracleScore]
    methods: list[MethodResult]
    curves: list[Curve]

    def method(self, name: str) -> MethodResult:
        """The row of a method."""
        return next(row for row in self.methods if row.name == name)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        nested = {
            "clean": Mean(**raw["clean"]),
            "oracles": [OracleScore(**item) for item in raw["oracles"]],
            "methods": [MethodResult.from_json(item) for item in raw["methods"]],
            "curves": [
                Curve(**(item | {"points": [Point.from_json(p) for p in item["points"]]}))
                for item in raw["curves"]
            ],
        }
        return cls(**(raw | nested))


@dataclass(frozen=True)
class CompareResult:
    """The league table.

    Attributes:
        sites: by site, the best one of the sweep first.
        position: at which token the prompts are edited.
        seed: of everything drawn at random.
        resamples: behind each bootstrap interval.
    """

    sites: dict[str, SiteComparison]
    position: str
    seed: int
    resamples: int


def from_json(raw: dict[str, Any]) -> CompareResult:
    """Read back what ``dataclasses.asdict`` made of a result."""
    sites = {name: SiteComparison.from_json(site) for name, site in raw["sites"].items()}
    return CompareResult(**(raw | {"sites": sites}))
