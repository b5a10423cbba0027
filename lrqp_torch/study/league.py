"""The league table: every way to make the same edit, on the same flip, sites and prompts.

Effect: answers flipped by counterfactual edits and, as a check, by control edits; the preference
for the class that holds; the attention of the name movers where the prompts have names. Size: in
both norms. Side effect: KL of the next-token distribution at other tokens, and on unrelated text.
Belief: odds, completeness, selectivity and reliability under independent probes. Curves of effect
against side effect come from a sweep over every method's strength, so that methods are compared at
equal effect.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline, Paired
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import SettingError
from lrqp_torch.study.ceiling import Interchange, Likeness, interchange_of, likenesses
from lrqp_torch.study.context import Advance, StudyContext, no_progress
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.heads import HeadsResult, Role
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.methods import (
    DOSED,
    ERASING,
    FITTED,
    NOTHING,
    Candidate,
    DosedLRQP,
    Training,
    build_candidates,
    check_names,
    counterparts,
    drawn,
    others_alike,
)
from lrqp_torch.study.oracles import Oracles, OracleScore, completeness, nullified, reliability
from lrqp_torch.study.prompts import PromptSet, Words
from lrqp_torch.study.running import Twinned
from lrqp_torch.study.tradeoffs import (
    RESAMPLES,
    Curve,
    Resampling,
    Swept,
    draw_curves,
    relative_costs,
)
from lrqp_torch.study.trials import Trial, Trials, flipped, with_partners

DIVERGENCE, REST, UNSELECTIVE = "divergence", "rest", "unselective"
"""Side effects of the curves: KL elsewhere, its part beside the answers, and lost selectivity; the
last is left out where the independent probes read no variable but the class."""

LEAST_TOKENS = 6
"""Beginnings of prompts with fewer tokens are not used as unrelated text."""

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
LOG_ALPHAS = (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)


@dataclass(frozen=True)
class CompareOptions:
    """What the table runs.

    Attributes:
        methods: names; None for all. No edit, and LRQP as fitted, always run.
        strengths: of the curves; 1 must be among them.
        log_alphas: odds of LRQP's curve by its own dose, in nats.
        sweep_prompts: held-out prompts of the curves, the first ones.
        texts: unrelated texts, at most.
        training: of methods that are trained through the model.

    Raises:
        SettingError: a method that does not exist, strengths without 1 or not above 0, or fewer
            than two prompts or texts.
    """

    methods: tuple[str, ...] | None = None
    strengths: tuple[float, ...] = STRENGTHS
    log_alphas: tuple[float, ...] = LOG_ALPHAS
    sweep_prompts: int = 128
    texts: int = 64
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_names(self.methods)
        if 1.0 not in self.strengths or min(self.strengths) <= 0:
            raise SettingError(
                f"strengths must be above 0, and 1 among them, got {list(self.strengths)}"
            )
        if min(self.sweep_prompts, self.texts) < 2:
            raise SettingError(
                f"sweep_prompts and texts must be at least 2, got {self.sweep_prompts} and "
                f"{self.texts}"
            )

    @property
    def names(self) -> list[str]:
        """Methods in the order of the table."""
        return check_names(self.methods)


DEFAULTS = CompareOptions()


@dataclass(frozen=True)
class Effect(Likeness):
    """One method under one condition, over the held-out prompts.

    Attributes:
        flipped: of the prompts answered by the class that holds in the clean run, the share
            answered by the next one under the edit.
        logit_difference: preference for the class that holds; of indirect object identification
            IO − S at END, in logits.
        distance: length of the edit in the study's Mahalanobis metric.
        euclidean: its Euclidean length, in units of the stream.
        log_odds: of the target against all other classes under the independent probe, in nats.
        divergence: KL(clean ‖ edited) of the next token at other tokens, in nats.
        rest: the part of it that is not about the answers: P(none) KL(· | none of them).
        attention: change of the watched heads' attention END→IO less END→S1; None without heads.
    """

    flipped: Estimate
    logit_difference: Estimate
    distance: Estimate
    euclidean: Estimate
    log_odds: Estimate
    divergence: Estimate
    rest: Estimate
    attention: Estimate | None


@dataclass(frozen=True)
class MethodResult:
    """One row of the table.

    Attributes:
        name: of the method in files.
        title: of the method in tables.
        settings: how it was trained; empty for methods in closed form.
        problem: why it could not be built; all figures are then None.
        control: written towards the class that holds.
        counterfactual: written towards the next class.
        text_divergence: KL(clean ‖ edited) behind an edited token of unrelated text, in nats; None
            where there is no such text.
        scores: completeness, selectivity and reliability of the counterfactual edit, see
            :mod:`.oracles`; the latter two are None where the independent probes read no variable
            but the class.
        seconds: of the edit alone, a prompt.
        relative: by side effect, what the method has of it at the effect of LRQP, divided by what
            LRQP has; below 1 it changes less for the same effect. None where no strength of the
            sweep has LRQP's effect.
    """

    name: str
    title: str
    settings: str = ""
    problem: str = ""
    control: Effect | None = None
    counterfactual: Effect | None = None
    text_divergence: Estimate | None = None
    scores: dict[str, Estimate | None] = field(default_factory=dict)
    seconds: float | None = None
    relative: dict[str, Estimate | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteComparison:
    """All methods at one site.

    Attributes:
        site: where they edit.
        prompts: held-out prompts.
        answered: of them, answered by the class that holds in the clean run.
        clean: their mean preference for it without an edit.
        said_elsewhere: probability that the clean model gives to any answer at the other tokens;
            where it is large, KL there is the effect itself more than a side effect.
        sweep_prompts: the first held-out prompts, on which curves were run.
        texts: unrelated texts.
        watched: heads whose attention was recorded.
        role: the role for which they were chosen; empty without heads.
        oracles: what the independent probes read from clean activations, the class first.
        methods: rows of the table.
        curves: effect against side effect.
        interchange: the ceiling of the counterfactual edits, which say how they compare with it;
            None where no prompt has a twin.
    """

    site: str
    prompts: int
    answered: int
    clean: Estimate
    said_elsewhere: float
    sweep_prompts: int
    texts: int
    watched: list[str]
    role: str
    oracles: list[OracleScore]
    methods: list[MethodResult]
    curves: list[Curve]
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
    """The league table.

    Attributes:
        sites: by site, the best one of the sweep first.
        position: at which token the prompts are edited.
        seed: of everything drawn at random.
        resamples: behind each bootstrap interval.
        words: what the things of the task are called.
        elsewhere: the tokens at which nothing should change, such as "between S2 and END".
        texts: what the unrelated texts are.
    """

    sites: dict[str, SiteComparison]
    position: str
    seed: int
    resamples: int
    words: Words
    elsewhere: str
    texts: str


def work(context: StudyContext, /, options: CompareOptions = DEFAULTS, sites: int = 1) -> int:
    """Units that :func:`compute` advances: texts run under each edit, and methods built."""
    methods = len(options.names)
    few = min(len(context.task.test), options.sweep_prompts)
    found = unrelated(context, options.texts)
    each = 2 * len(context.task.test) + (0 if found is None else len(found[0]))
    strengths = (methods - 1) * (len(options.strengths) - 1)
    patched = len(context.task.test) if context.task.test.twins() is not None else 0
    return sites * (patched + methods * (1 + each) + few * (len(options.log_alphas) + strengths))


def compute(
    context: StudyContext,
    edits: Mapping[str, LRQP],
    heads: HeadsResult | None = None,
    *,
    options: CompareOptions = DEFAULTS,
    advance: Advance = no_progress,
) -> CompareResult:
    """Put all methods to the same test: write the next class at the marked token, held out.

    All are fitted to the training prompts; what they did is read on the held-out ones by the model,
    and by probes that share no prompt with any of them.

    Args:
        context: the model and its prompts, which have answers.
        edits: site to the study's LRQP there.
        heads: the heads and their roles, for the attention of the name movers; None leaves it out.
        options: what to run.
        advance: called with units of :func:`work`.

    Raises:
        SettingError: no site.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if not edits:
        raise SettingError("no site to compare edits at")
    words = context.task.test.words
    return CompareResult(
        sites={
            site: _Site(context, site, edit, heads, options, advance).compared()
            for site, edit in edits.items()
        },
        position=words.position,
        seed=context.seed,
        resamples=RESAMPLES,
        words=words,
        elsewhere=elsewhere(context.task.test)[1],
        texts=_texts_are(context.task.test),
    )


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
        self.labels = self.data.labels.cpu()
        self.target = self.data.other.cpu()
        self.beside, _ = elsewhere(self.data)
        self.role, self.watched = _watched(heads)
        self.candidates = build_candidates(
            context, site, reference, options.names, options.training
        )
        self.edits = {item.name: item.edit for item in self.candidates if item.edit is not None}
        advance(len(self.candidates))

    def compared(self) -> SiteComparison:
        """All methods."""
        context, data, n = self.context, self.data, len(self.data)
        x = context.activations(context.task, "test", "mark", [self.site])[self.site]
        patched = any(isinstance(edit, Paired) for edit in self.edits.values())
        alike = others_alike(data.labels, context.generator()).to(x.device)
        pairs = counterparts(context, data, [self.site])[self.site] if patched else x
        trials = Trials(
            context,
            data,
            elsewhere=self.beside,
            watched=self.watched,
            keys=_keys(data),
            activations=True,
        )
        metric = self.reference.metric
        twinned = Twinned.of(context, context.task, self.site, metric.distance)
        patch = None if twinned is None else trials.interchange(twinned)
        control, counterfactual = (
            {
                name: trials.write(self.site, edit, target, self.labels, partners)
                for name, edit in self.edits.items()
            }
            for target, partners in ((self.labels, x[alike]), (self.target, pairs))
        )
        trials.run(self.advance)
        # No edit leaves every bit of the clean activations.
        self.clean, self.x = trials.clean, control[NOTHING]["activations"]
        self.oracles = Oracles(self.x, data, context.generator())
        few = min(n, self.options.sweep_prompts)
        swept = self._swept(few, counterfactual, pairs)
        by_text, texts = self._unrelated()
        unbuilt = len(self.candidates) - len(self.edits)
        self.advance(unbuilt * (2 * n + texts + few * (len(self.options.strengths) - 1)))

        groups = data.groups
        draws = Resampling(n, context.generator(), groups=groups)
        of_swept = Resampling(
            few, context.generator(), groups=None if groups is None else groups[:few]
        )
        likeness: dict[str, dict[str, Any]] = {}
        interchange = None
        if patch is not None and twinned is not None:
            patch.found["divergence"] = patch["kl_at_end"]
            how = (twinned.known, context.seed, groups)
            interchange = interchange_of(self.clean.found, patch.found, *how)
            for done in counterfactual.values():
                moved = done["activations"].double() - self.x.double()
                done.found["distance"] = metric.distance(moved.to(context.device)).cpu()
            held = {name: (done.found, patch.found) for name, done in counterfactual.items()}
            likeness = likenesses(self.clean.found, held, *how)
        of_texts = Resampling(texts, context.generator()) if texts else None
        relative = relative_costs(swept, FITTED, of_swept)

        def row(item: Candidate) -> MethodResult:
            unfilled = MethodResult(item.name, item.title, item.settings, item.problem)
            if item.edit is None:
                return unfilled
            done = counterfactual[item.name]
            return replace(
                unfilled,
                control=self._effect(control[item.name], self.labels, draws),
                counterfactual=self._effect(
                    done, self.target, draws, **likeness.get(item.name, {})
                ),
                text_divergence=None if of_texts is None else of_texts.mean(by_text[item.name]),
                scores=self._scores(item.name, done, draws),
                seconds=self._seconds(item.edit, pairs),
                relative=relative.get(item.name, {}),
            )

        return SiteComparison(
            site=self.site,
            prompts=n,
            answered=int((self.clean["own_lead"] > 0).sum()),
            clean=draws.mean(self.clean["preference"]),
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
        before, lead = self.clean["preference"][:few], self.clean["own_lead"][:few]
        swept = []
        for name, by_dose in curves.items():
            doses = sorted(by_dose)
            done = [by_dose[dose] for dose in doses]
            kept = [
                self.oracles.selectivity(self.x[:few], trial["activations"][:few]) for trial in done
            ]
            costs = {
                cost: torch.stack([trial[cost][:few] for trial in done], dim=-1)
                for cost in (DIVERGENCE, REST)
            }
            if self.oracles.others:
                lost = [1 - item for item in kept if item is not None]
                costs[UNSELECTIVE] = torch.stack(lost, dim=-1)
            swept.append(
                Swept(
                    name,
                    titles[name],
                    "log α" if name == DOSED else "strength",
                    doses,
                    [flipped(lead, trial["other_lead"][:few]).value for trial in done],
                    torch.stack([before - trial["preference"][:few] for trial in done], dim=-1),
                    costs,
                )
            )
        return swept

    def _unrelated(self) -> tuple[dict[str, Tensor], int]:
        """KL behind an edited token of unrelated text, by method, and how many texts there are."""
        found = unrelated(self.context, self.options.texts)
        if found is None:
            return {}, 0
        texts, behind, target = found
        written = drawn(self.context, [self.site], target)[self.site]
        trials = Trials(self.context, texts, elsewhere=behind)
        done = {
            name: trials.write(self.site, edit, target, partners=written)
            for name, edit in self.edits.items()
        }
        trials.run(self.advance)
        return {name: trial["divergence"] for name, trial in done.items()}, len(texts)

    def _effect(self, trial: Trial, target: Tensor, draws: Resampling, **likeness: Any) -> Effect:
        read = self.oracles.read_class(trial["activations"])
        chosen = target.unsqueeze(-1)
        rival = read.scatter(-1, chosen, float("-inf")).amax(-1)
        delta = trial["activations"].double() - self.x.double()
        attention = trial.found.get("attention")
        return Effect(
            flipped=flipped(self.clean["own_lead"], trial["other_lead"], self.data.groups),
            logit_difference=draws.mean(trial["preference"]),
            distance=draws.mean(self.reference.metric.distance(delta.to(self.context.device))),
            euclidean=draws.mean(delta.norm(dim=-1)),
            log_odds=draws.mean(read.gather(-1, chosen).squeeze(-1) - rival),
            divergence=draws.mean(trial[DIVERGENCE]),
            rest=draws.mean(trial[REST]),
            attention=None if attention is None else draws.mean(attention),
            **likeness,
        )

    def _scores(self, name: str, trial: Trial, draws: Resampling) -> dict[str, Estimate | None]:
        """Completeness, selectivity and reliability of a counterfactual edit."""
        read = self.oracles.read_class(trial["activations"]).softmax(-1)
        complete = nullified(read) if name in ERASING else completeness(read, self.target)
        selective = self.oracles.selectivity(self.x, trial["activations"])
        scores: dict[str, Estimate | None] = {"completeness": draws.mean(complete)}
        if selective is None:
            return scores | {"selectivity": None, "reliability": None}
        both = torch.stack([complete, selective], dim=-1)
        value = reliability(*both.mean(0))
        resampled = reliability(*draws.means(both).unbind(-1))
        return scores | {
            "selectivity": draws.mean(selective),
            "reliability": draws.interval(float(value), resampled),
        }

    def _seconds(self, edit: Baseline, pairs: Tensor) -> float:
        x, target, source = (
            values.to(self.context.device) for values in (self.x, self.target, self.labels)
        )
        return seconds_per_text(with_partners(edit, pairs), x, target, source)


def seconds_per_text(
    edit: Baseline, x: Tensor, target: Tensor, source: Tensor, repeats: int = 3
) -> float:
    """Time of the edit alone, outside the model, a text: the median of some passes over all.

    Args:
        edit: with its partners where it needs any.
        x: activations, (n, d).
        target: (n,).
        source: (n,).
        repeats: passes, after one that is not counted.
    """
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        edit(x, target, source)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[repeats // 2] / len(x)


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
    """Beginnings of held-out prompts, edited at a random token.

    Of indirect object identification it is what stands before the first name: the prefix, a
    sentence of other text without names, and the clause's first words. Those texts come from the
    study's task, or from its other one where this one has no prefix. Of other tasks it is what
    stands before the marked token. The edited token is neither the first one nor the last, and is
    drawn with the study's seed, as is the class written there.

    Args:
        context: the prompts.
        most: how many texts at most, the first ones.

    Returns:
        The texts; the columns behind the edited one, BoolTensor (n, T); and the classes to write,
        (n,). None where fewer than two texts have :data:`LEAST_TOKENS` tokens.
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
    texts = PromptSet(
        inputs={
            "input_ids": data.inputs["input_ids"][long].gather(1, columns.clamp_min(0)),
            "attention_mask": real.long(),
            "position_ids": (real.long().cumsum(1) - 1).clamp_min(0),
        },
        position=positions,
        end=torch.full_like(positions, width - 1),
        labels=torch.zeros_like(positions),
        classes=data.classes,
        answers=None,
        prompts=tuple(data.prompts[row] for row in long.tolist()),
    )
    behind = torch.arange(width, device=until.device) > positions.unsqueeze(1)
    target = torch.randint(len(data.classes), (len(long),), generator=generator)
    return texts, behind, target


def _texts_are(data: PromptSet) -> str:
    if isinstance(data, IOIPrompts):
        return "unrelated text"
    return f"the text before {data.words.position}"


def _keys(data: PromptSet) -> Tensor | None:
    """The tokens IO and S1, to which attention is read, (n, 2)."""
    if not isinstance(data, IOIPrompts):
        return None
    return torch.stack([data.positions["IO"], data.positions["S1"]], dim=-1)


def _watched(heads: HeadsResult | None) -> tuple[str, list[str]]:
    """Name movers; answer writers where there are none."""
    if heads is None:
        return "", []
    roles = heads.attending()
    role = Role.MOVER if roles[Role.MOVER] else Role.WRITER
    return (role, roles[role]) if roles[role] else ("", [])
