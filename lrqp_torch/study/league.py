"""The league table: every way to make the same edit, on the same flip, sites and prompts.

Effect: answers flipped by counterfactual edits and, as a check, by control edits; the preference
for the class that holds; the attention of the name movers where the prompts have names. Size: in
both norms. Side effect: KL of the next-token distribution at other tokens, and on unrelated text.
Belief: odds, completeness, selectivity and reliability under independent probes. Curves of effect
against side effect come from a sweep over every method's strength, so that methods are compared at
equal effect.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline, Paired
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.study import methods
from lrqp_torch.study.ceiling import Interchange, Likeness
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.estimates import CONFIDENCE, RESAMPLES, Estimate, Sample
from lrqp_torch.study.heads import HeadsResult, Role
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.methods import DOSED, ERASING, FITTED, NOTHING, DosedLRQP, Training
from lrqp_torch.study.oracles import Oracles, OracleScore, completeness, nullified, reliability
from lrqp_torch.study.prompts import PromptSet, Words
from lrqp_torch.study.running import Trial, Trials, with_partners

DIVERGENCE, REST, UNSELECTIVE = "divergence", "rest", "unselective"
"""Side effects of the curves: KL elsewhere, its part beside the answers, and lost selectivity; the
last is left out where the independent probes read no variable but the class."""

LEAST_TOKENS = 6
"""Beginnings of prompts with fewer tokens are not used as unrelated text."""

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
LOG_ALPHAS = (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)

REACHED = 0.975
"""An effect counts as reached if the curves of this share of the resamples reach it."""


@dataclass(frozen=True)
class CompareOptions:
    """What the table runs."""

    # Names; None for all. No edit, and LRQP as fitted, always run.
    methods: tuple[str, ...] | None = None
    strengths: tuple[float, ...] = STRENGTHS  # of the curves; 1 must be among them
    log_alphas: tuple[float, ...] = LOG_ALPHAS  # odds of LRQP's curve by its own dose, in nats
    sweep_prompts: int = 128  # held-out prompts of the curves, the first ones; 2 or more
    texts: int = 64  # unrelated texts, at most; 2 or more
    # Of methods that are trained through the model.
    training: Training = field(default_factory=Training)

    @property
    def names(self) -> list[str]:
        """Methods in the order of the table."""
        return methods.check_names(self.methods)


DEFAULTS = CompareOptions()


@dataclass(frozen=True)
class Effect(Likeness):
    """One method under one condition, over the held-out prompts."""

    # Of the prompts answered by the class that holds in the clean run, the share answered by the
    # next one under the edit.
    flipped: Estimate
    # Preference for the class that holds; of indirect object identification IO − S at END, in
    # logits.
    logit_difference: Estimate
    distance: Estimate  # length of the edit in the study's Mahalanobis metric
    euclidean: Estimate  # its Euclidean length, in units of the stream
    # Of the target against all other classes under the independent probe, in nats.
    log_odds: Estimate
    divergence: Estimate  # KL(clean ‖ edited) of the next token at other tokens, in nats
    rest: Estimate  # the part of it that is not about the answers: P(none) KL(· | none of them)
    # Change of the watched heads' attention END→IO less END→S1; None without heads.
    attention: Estimate | None


@dataclass(frozen=True)
class CurvePoint:
    """One counterfactual edit of the prompts of the sweep."""

    dose: float  # strength, or log α for the curve by odds
    effect: Estimate  # mean fall of the preference for the class that holds
    # Share of answers flipped; None if none was answered by the class that holds.
    flipped: float | None
    costs: dict[str, Estimate]  # side effect to its mean
    # For each, whether no other point of any curve has at least this effect for at most this side
    # effect.
    optimal: dict[str, bool]


@dataclass(frozen=True)
class Curve:
    """Effect against side effect of one method."""

    name: str  # of the method
    title: str  # in figures
    dose: str  # what rises along it, `"strength"` or `"log α"`
    points: list[CurvePoint]  # by rising dose


@dataclass(frozen=True)
class MethodResult:
    """One row of the table."""

    name: str  # of the method in files
    title: str  # of the method in tables
    settings: str = ""  # how it was trained; empty for methods in closed form
    problem: str = ""  # why it could not be built; all figures are then None
    control: Effect | None = None  # written towards the class that holds
    counterfactual: Effect | None = None  # written towards the next class
    # KL(clean ‖ edited) behind an edited token of unrelated text, in nats; None where there is no
    # such text.
    text_divergence: Estimate | None = None
    # Completeness, selectivity and reliability of the counterfactual edit, see `oracles`; the
    # latter two are None where the independent probes read no variable but the class.
    scores: dict[str, Estimate | None] = field(default_factory=dict)
    seconds: float | None = None  # of the edit alone, a prompt
    # By side effect, what the method has of it at the effect of LRQP, divided by what LRQP has;
    # below 1 it changes less for the same effect. None where no strength of the sweep has LRQP's
    # effect.
    relative: dict[str, Estimate | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteComparison:
    """All methods at one site."""

    site: str  # where they edit
    prompts: int  # held-out prompts
    answered: int  # of them, answered by the class that holds in the clean run
    clean: Estimate  # their mean preference for it without an edit
    # Probability that the clean model gives to any answer at the other tokens; where it is large,
    # KL there is the effect itself more than a side effect.
    said_elsewhere: float
    sweep_prompts: int  # the first held-out prompts, on which curves were run
    texts: int  # unrelated texts
    watched: list[str]  # heads whose attention was recorded
    role: str  # the role for which they were chosen; empty without heads
    # What the independent probes read from clean activations, the class first.
    oracles: list[OracleScore]
    methods: list[MethodResult]  # rows of the table
    curves: list[Curve]  # effect against side effect
    # The ceiling of the counterfactual edits, which say how they compare with it; None where no
    # prompt has a twin.
    interchange: Interchange | None = None

    def method(self, name: str) -> MethodResult:
        """The row of a method."""
        return next(row for row in self.methods if row.name == name)

    @property
    def costs(self) -> list[str]:
        """The side effects of the curves."""
        return list(self.curves[0].points[0].costs)


@dataclass(frozen=True)
class CompareResult:
    """The league table."""

    sites: dict[str, SiteComparison]  # by site, the best one of the sweep first
    position: str  # at which token the prompts are edited
    seed: int  # of everything drawn at random
    resamples: int  # behind each bootstrap interval
    words: Words  # what the things of the task are called
    elsewhere: str  # the tokens at which nothing should change, such as "between S2 and END"
    texts: str  # what the unrelated texts are


def work(context: StudyContext, /, options: CompareOptions = DEFAULTS) -> int:
    """Units that :func:`compute` advances a site: texts under each edit, and methods built."""
    methods = len(options.names)
    few = min(len(context.task.test), options.sweep_prompts)
    found = unrelated(context, options.texts)
    each = 2 * len(context.task.test) + (0 if found is None else len(found[0]))
    strengths = (methods - 1) * (len(options.strengths) - 1)
    patched = len(context.task.test) if context.task.test.twins() is not None else 0
    return patched + methods * (1 + each) + few * (len(options.log_alphas) + strengths)


def compute(
    context: StudyContext,
    edits: Mapping[str, LRQP],
    heads: HeadsResult | None = None,
    *,
    options: CompareOptions = DEFAULTS,
    advance: Advance = no_progress,
) -> CompareResult:
    """Put all methods to the same test: write the next class at the marked token, held out.

    All are fitted to the training prompts, which have answers; what they did is read on the
    held-out ones by the model, and by probes that share no prompt with any of them. ``edits`` are
    the study's LRQP by site; without ``heads`` the attention of the name movers is left out;
    ``advance`` is called with units of :func:`work`.

    Raises:
        SettingError: no site.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if not edits:
        raise SettingError("no site to compare edits at")
    words, data, how = context.task.test.words, context.task.test, (heads, options, advance)
    sites = {site: _Site(context, site, edit, *how).compared() for site, edit in edits.items()}
    named = isinstance(data, IOIPrompts)
    texts = "unrelated text" if named else f"the text before {words.position}"
    known = (words.position, context.seed, RESAMPLES, words)
    return CompareResult(sites, *known, elsewhere(data)[1], texts)


# ---- effect against side effect ------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """One method's edits of the prompts of the sweep, by rising dose."""

    name: str  # of the method
    title: str  # in figures
    dose: str  # what rises, `"strength"` or `"log α"`
    doses: Sequence[float]  # its values, m of them
    flipped: Sequence[float | None]  # share of answers flipped, by dose
    fall: Tensor  # of the preference for the class that holds, (n, m)
    costs: Mapping[str, Tensor]  # side effect to its size, (n, m) each


def draw_curves(swept: Sequence[Swept], draws: Sample) -> list[Curve]:
    """The curves, with the points that no other one beats."""
    effects = [float(v) for item in swept for v in item.fall.mean(0)]
    optimal = {
        cost: iter(front(effects, [float(v) for item in swept for v in item.costs[cost].mean(0)]))
        for cost in swept[0].costs
    }

    def point(item: Swept, column: int) -> CurvePoint:
        return CurvePoint(
            dose=item.doses[column],
            effect=draws.mean(item.fall[:, column]),
            flipped=item.flipped[column],
            costs={k: draws.mean(values[:, column]) for k, values in item.costs.items()},
            optimal={k: next(flags) for k, flags in optimal.items()},
        )

    return [
        Curve(one.name, one.title, one.dose, [point(one, i) for i in range(len(one.doses))])
        for one in swept
    ]


def relative_costs(
    swept: Sequence[Swept], own: str, draws: Sample
) -> dict[str, dict[str, Estimate | None]]:
    """By method and side effect, what one method's effect at strength 1 costs, over what it pays.

    Both curves and the effect of the method ``own`` are read from the same resampled prompts. None
    where a method does not reach that effect, or there is none.
    """
    mine = next(item for item in swept if item.name == own)
    column = list(mine.doses).index(1.0)

    def means(values: Tensor) -> Tensor:
        """Of all prompts, and of each resample."""
        return torch.cat([values.mean(0, keepdim=True), draws.resampled(values)])

    effects = {item.name: means(item.fall) for item in swept}
    wanted = effects[own][:, column]

    def relative(item: Swept, cost: str) -> Estimate | None:
        found = cost_at(effects[item.name], means(item.costs[cost]), wanted)
        ratio = found / means(mine.costs[cost])[:, column]
        known = ratio[1:][ratio[1:].isfinite()]
        reached = len(known) >= REACHED * RESAMPLES and bool(ratio[0].isfinite())
        some = reached and float(wanted[0]) > 0
        return _between_quantiles(float(ratio[0]), known, len(mine.fall)) if some else None

    return {item.name: {cost: relative(item, cost) for cost in item.costs} for item in swept}


def _between_quantiles(value: float, resampled: Tensor, n: int) -> Estimate:
    """A value of n prompts with the 2.5 % and 97.5 % quantiles of its resamples, (R,)."""
    tail = (1 - CONFIDENCE) / 2
    lower, upper = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype))
    return Estimate(value, float(lower), float(upper), n)


def front(effects: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Which points are Pareto optimal: no other has at least their effect for at most their cost.

    Of two equal points both are.
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

    Effects and costs are those of rising strengths, (..., m); the curve starts at 0 and 0. NaN
    where it does not reach what is ``wanted``, (...), above 0.
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


# ---- the table -----------------------------------------------------------------------------------


class _Site:
    """The runs of the model that the table needs at one site, and what they say."""

    def __init__(
        self,
        context: StudyContext,
        site: str,
        reference: LRQP,
        heads: HeadsResult | None,
        options: CompareOptions,
        advance: Advance,
    ) -> None:
        self.context, self.site, self.reference = context, site, reference
        self.options, self.advance = options, advance
        self.data = context.task.test
        self.labels, self.target = self.data.labels.cpu(), self.data.other.cpu()
        self.beside, _ = elsewhere(self.data)
        self.role, self.watched = _watched(heads)
        self.candidates = methods.build_candidates(
            context, site, reference, options.names, options.training
        )
        self.edits = {item.name: item.edit for item in self.candidates if item.edit is not None}
        advance(len(self.candidates))

    def compared(self) -> SiteComparison:
        """All methods."""
        context, data, n = self.context, self.data, len(self.data)
        x = context.activations(context.task, "test", "mark", [self.site])[self.site]
        patched = any(isinstance(edit, Paired) for edit in self.edits.values())
        alike = methods.others_alike(data.labels, context.generator()).to(x.device)
        pairs = methods.counterparts(context, data, [self.site])[self.site] if patched else x
        keys = None
        if isinstance(data, IOIPrompts):  # the tokens to which attention is read
            keys = torch.stack([data.positions["IO"], data.positions["S1"]], dim=-1)
        trials = Trials(
            context, data, elsewhere=self.beside, watched=self.watched, keys=keys, activations=True
        )
        patch = trials.ceiling(self.site, self.reference.metric)

        def written(target: Tensor, partners: Tensor) -> dict[str, Trial]:
            how = target, self.labels, partners, patch
            return {n: trials.write(self.site, edit, *how) for n, edit in self.edits.items()}

        control, counterfactual = written(self.labels, x[alike]), written(self.target, pairs)
        trials.run(self.advance)
        # No edit leaves every bit of the clean activations.
        self.clean, self.x = trials.clean, control[NOTHING]["activations"]
        self.oracles = Oracles(self.x, data, context.generator())
        few = min(n, self.options.sweep_prompts)
        swept = self._swept(few, counterfactual, pairs)
        by_text, texts = self._unrelated()
        unbuilt = len(self.candidates) - len(self.edits)
        self.advance(unbuilt * (2 * n + texts + few * (len(self.options.strengths) - 1)))

        groups = None if data.groups is None else data.groups[:few]
        draws, of_swept = trials.sample, Sample(context.seed, groups)
        for done in (*control.values(), *counterfactual.values()):
            moved = done["activations"].double() - self.x.double()
            done.found["euclidean"] = moved.norm(dim=-1)
            distance = self.reference.metric.distance(moved.to(context.device))
            done.found["distance"] = distance.cpu()
        interchange, likeness = trials.likenesses(counterfactual, patch)
        relative = relative_costs(swept, FITTED, of_swept)

        def row(item: methods.Candidate) -> MethodResult:
            name = item.name
            unfilled = MethodResult(name, item.title, item.settings, item.problem)
            if item.edit is None:
                return unfilled
            done, like = counterfactual[name], likeness.get(name, {})
            return replace(
                unfilled,
                control=self._effect(control[name], self.labels, draws),
                counterfactual=self._effect(done, self.target, draws, **like),
                text_divergence=Sample(context.seed).mean(by_text[name]) if texts else None,
                scores=self._scores(name, done, draws),
                seconds=self._seconds(with_partners(item.edit, pairs)),
                relative=relative.get(name, {}),
            )

        return SiteComparison(
            site=self.site,
            prompts=n,
            answered=int((self.clean["own_lead"] > 0).sum()),
            clean=draws.mean(self.clean["logit_difference"]),
            said_elsewhere=float(self.clean["said_elsewhere"].mean()),
            sweep_prompts=few,
            texts=texts,
            watched=self.watched,
            role=self.role,
            oracles=self.oracles.scores,
            methods=[row(item) for item in self.candidates],
            curves=draw_curves(swept, of_swept),
            interchange=interchange,
        )

    def _swept(self, few: int, counterfactual: Mapping[str, Trial], pairs: Tensor) -> list[Swept]:
        """Every method by rising strength, and LRQP by its own odds, on the first prompts."""
        trials = Trials(
            self.context, self.data[:few], elsewhere=self.beside[:few], activations=True
        )

        def add(edit: Baseline) -> Trial:
            return trials.write(self.site, edit, self.target[:few], self.labels[:few], pairs[:few])

        curves = {
            name: {s: add(edit.at_strength(s)) for s in self.options.strengths if s != 1}
            | {1.0: counterfactual[name]}
            for name, edit in self.edits.items()
            if name != NOTHING
        }
        if self.options.log_alphas:
            curves[DOSED] = {a: add(DosedLRQP(self.reference, a)) for a in self.options.log_alphas}
        trials.run(self.advance)
        titles = {item.name: item.title for item in self.candidates} | {DOSED: DosedLRQP.title}
        before, right = self.clean["logit_difference"][:few], self.clean["own_lead"][:few] > 0
        swept = []
        for name, by_dose in curves.items():
            doses, dose = sorted(by_dose), "log α" if name == DOSED else "strength"
            done = [by_dose[dose] for dose in doses]

            def side_by_side(key: str, done: list[Trial] = done) -> Tensor:
                return torch.stack([trial[key][:few] for trial in done], dim=-1)

            fall = before.unsqueeze(-1) - side_by_side("logit_difference")
            flips = [Estimate.share(t["other_lead"][:few][right] > 0).value for t in done]
            costs = {cost: side_by_side(cost) for cost in (DIVERGENCE, REST)}
            kept = [self.oracles.selectivity(self.x[:few], t["activations"][:few]) for t in done]
            if self.oracles.others:
                lost = [1 - item for item in kept if item is not None]
                costs[UNSELECTIVE] = torch.stack(lost, dim=-1)
            swept.append(Swept(name, titles[name], dose, doses, flips, fall, costs))
        return swept

    def _unrelated(self) -> tuple[dict[str, Tensor], int]:
        """KL behind an edited token of unrelated text, by method, and how many texts there are."""
        found = unrelated(self.context, self.options.texts)
        if found is None:
            return {}, 0
        texts, behind, target = found
        written = methods.drawn(self.context, [self.site], target)[self.site]
        trials = Trials(self.context, texts, elsewhere=behind)
        done = {
            name: trials.write(self.site, edit, target, partners=written)
            for name, edit in self.edits.items()
        }
        trials.run(self.advance)
        return {name: trial["divergence"] for name, trial in done.items()}, len(texts)

    def _effect(self, trial: Trial, target: Tensor, draws: Sample, **likeness: Any) -> Effect:
        read, chosen = self.oracles.read_class(trial["activations"]), target.unsqueeze(-1)
        rival = read.scatter(-1, chosen, float("-inf")).amax(-1)
        means = {"log_odds": read.gather(-1, chosen).squeeze(-1) - rival}
        means |= {"logit_difference": trial["logit_difference"]}
        means |= {name: trial[name] for name in ("distance", "euclidean", DIVERGENCE, REST)}
        attention = trial.found.get("attention")
        found: dict[str, Any] = {name: draws.mean(values) for name, values in means.items()}
        return Effect(
            flipped=draws.flipped(self.clean.found, trial.found),
            attention=None if attention is None else draws.mean(attention),
            **found | likeness,
        )

    def _scores(self, name: str, trial: Trial, draws: Sample) -> dict[str, Estimate | None]:
        """Completeness, selectivity and reliability of a counterfactual edit."""
        read = self.oracles.read_class(trial["activations"]).softmax(-1)
        complete = nullified(read) if name in ERASING else completeness(read, self.target)
        selective = self.oracles.selectivity(self.x, trial["activations"])
        scores: dict[str, Estimate | None] = {"completeness": draws.mean(complete)}
        if selective is None:
            return scores | {"selectivity": None, "reliability": None}
        both = torch.stack([complete, selective], dim=-1)
        value = reliability(*both.mean(0))
        resampled = reliability(*draws.resampled(both).unbind(-1))
        return scores | {
            "selectivity": draws.mean(selective),
            "reliability": _between_quantiles(float(value), resampled, len(both)),
        }

    def _seconds(self, edit: Baseline) -> float:
        """Time of an edit alone, outside the model, a prompt: the median of three passes over all.

        A pass more comes first and is not counted.
        """
        given = [each.to(self.context.device) for each in (self.x, self.target, self.labels)]
        taken = []
        for _ in range(4):
            began = time.perf_counter()
            edit(*given)
            if given[0].is_cuda:
                torch.cuda.synchronize(given[0].device)
            taken.append(time.perf_counter() - began)
        return median(taken[1:]) / len(self.x)


def elsewhere(data: PromptSet) -> tuple[Tensor, str]:
    """The tokens at which an edit should change nothing, BoolTensor (n, T), and what they are.

    They lie between the marked token and the last one, where the answer is read. Where a prompt has
    none, it is the last one in all: of what is said there, a part is not about the answers.
    """
    columns = torch.arange(data.inputs["input_ids"].shape[1], device=data.end.device)
    mark, end = data.position.unsqueeze(1), data.end.unsqueeze(1)
    between = (columns > mark) & (columns < end)
    if bool(between.any(1).all()):
        return between, f"between {data.words.position} and {data.words.end}"
    return columns == end, f"at {data.words.end}"


def unrelated(context: StudyContext, most: int) -> tuple[PromptSet, Tensor, Tensor] | None:
    """Beginnings of held-out prompts, ``most`` at the most, edited at a random token.

    Of indirect object identification it is what stands before the first name: the prefix, a
    sentence of other text without names, and the clause's first words. Those texts come from the
    study's task, or from its other one where this one has no prefix. Of other tasks it is what
    stands before the marked token. The edited token is neither the first one nor the last, and is
    drawn with the study's seed, as is the class written there.

    The texts; the columns behind the edited one, BoolTensor (n, T); and the classes to write, (n,).
    None where fewer than two texts have :data:`LEAST_TOKENS` tokens.
    """
    data = next((t.test for t in context.tasks if t.name == "prefixed"), context.task.test)
    until = data.positions["first"] if isinstance(data, IOIPrompts) else data.position
    start = (data.inputs["attention_mask"].cumsum(1) == 0).sum(1)
    long = (until - start >= LEAST_TOKENS).nonzero().flatten()[:most]
    if len(long) < 2:
        return None
    until, start = until[long], start[long]
    width = int((until - start).max())
    columns = until.unsqueeze(1) - width + torch.arange(width, device=until.device)
    real = columns >= start.unsqueeze(1)
    generator = context.generator()
    share = torch.rand(len(long), generator=generator)
    lengths = (until - start).cpu()
    within = 1 + (share * (lengths - 2)).long()
    positions = (width - lengths + within).to(until.device)
    inputs = {
        "input_ids": data.inputs["input_ids"][long].gather(1, columns.clamp_min(0)),
        "attention_mask": real.long(),
        "position_ids": (real.long().cumsum(1) - 1).clamp_min(0),
    }
    end, none = torch.full_like(positions, width - 1), torch.zeros_like(positions)
    words = tuple(data.prompts[row] for row in long.tolist())
    texts = PromptSet(inputs, positions, end, none, data.classes, None, words)
    behind = torch.arange(width, device=until.device) > positions.unsqueeze(1)
    target = torch.randint(len(data.classes), (len(long),), generator=generator)
    return texts, behind, target


def _watched(heads: HeadsResult | None) -> tuple[str, list[str]]:
    """Name movers; answer writers where there are none."""
    if heads is None:
        return "", []
    roles = heads.attending()
    role = Role.MOVER if roles[Role.MOVER] else Role.WRITER
    return (role, roles[role]) if roles[role] else ("", [])
