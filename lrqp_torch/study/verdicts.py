"""Knowable is not used: how often "used here" is right, on models of which the truth is known.

On each model, with each draw of prompts, every edit is made at every site, towards the true order
(control) and towards the other one (counterfactual). Three rules then say of an edit whether the
site is used:

* *half*: flipped(counterfactual) − flipped(control) ≥ ½, the study's rule up to version 0.3;
* *tested*: the study's rule, see :mod:`~lrqp_torch.study.ceiling`: the counterfactual edit flips
  more answers than edits of shuffled probes of the same length, by an exact paired test,
  Holm-corrected over the sites of a model;
* *guarded*: tested, and not beyond its own patch: it does not flip significantly more answers than
  the exchange of whole activations with each prompt's twin.

And by the probe's accuracy alone a site is used where that is 90 % or more on held-out prompts. The
truth is in the file beside the model's weights, ``ground_truth.json``: it was found by exchanging
whole activations between two prompts of a minimal pair, on prompts of its own. A full patch does
the same, so its row checks the truth more than it competes. Its control writes another prompt of
the same order, and with it other names, which by itself may break answers.

Sites of one model and draws of its prompts are not independent, so the intervals over both together
are narrower than those over new models would be.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lrqp_torch import models
from lrqp_torch.baselines import LeastEdit, NoEdit
from lrqp_torch.edits.provenance import package_versions
from lrqp_torch.errors import ModelError
from lrqp_torch.files import write_json, written_whole
from lrqp_torch.models.organisms import ORGANISMS
from lrqp_torch.plot.chart import Chart, Heat, Pane, Table
from lrqp_torch.plot.static import require_matplotlib, write_charts
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.stream.progress import Clock, progress_bars
from lrqp_torch.study.ceiling import (
    LEVEL,
    excess,
    null_edits,
    null_of,
    shuffled,
    turns,
    verdicts,
)
from lrqp_torch.study.context import StudyContext, no_progress
from lrqp_torch.study.estimates import Estimate, Sample, holm
from lrqp_torch.study.known import NOT_USED, UNCLEAR, USED, KnownSites, read_truth
from lrqp_torch.study.methods import (
    LEARNED,
    METHODS,
    TRAINED,
    Training,
    build_candidates,
    counterparts,
    others_alike,
)
from lrqp_torch.study.preparing import choose_device, choose_sites, named_task
from lrqp_torch.study.records import to_json
from lrqp_torch.study.running import Trial, Trials, next_class, with_partners
from lrqp_torch.study.settings import Settings, VerdictSettings
from lrqp_torch.study.showing import said
from lrqp_torch.study.store import made_folder
from lrqp_torch.study.sweep import USED_THRESHOLD, fit_edits

JSON_FILE, TABLE_FILE, FIGURE = "verdicts.json", "verdicts.csv", "verdicts"

ACCURATE = 0.9
"""Accuracy of a held-out probe from which on accuracy alone would say "used here"."""

PROBE = "probe_accuracy"
"""The rule that asks for the probe's accuracy and for nothing else."""

TESTED, GUARDED = ":tested", ":guarded"
"""What is behind the name of an edit where it is judged by these rules; nothing for *half*."""
IN_WORDS = {TESTED: ", tested", GUARDED: ", guarded"}

ALL = "all models"
"""Name of the counts over all models together."""


@dataclass(frozen=True)
class SiteScores:
    """What was measured at one site of one model, with one draw of prompts."""

    model: str  # name of the model
    seed: int  # of its prompts and of all else that is drawn
    site: str  # where
    truth: str  # `used`, `not used` or `unclear`, from the file beside the model's weights
    probe_accuracy: float  # on held-out prompts
    # Method to the share of answers that its edit towards the true order flips; None where no
    # prompt is answered IO to begin with.
    control: dict[str, float | None]
    counterfactual: dict[str, float | None]  # the same towards the other order
    # Method to the share that edits of shuffled probes flip, as long as its counterfactual edit;
    # empty where no edit was tested, as are the next two.
    null: dict[str, float | None] = field(default_factory=dict)
    # Method to the P value of flipping no more than these.
    p_adjusted: dict[str, float] = field(default_factory=dict)
    tested: dict[str, bool] = field(default_factory=dict)  # method to the verdict of that test
    # Method to whether it flips significantly more than the twin's activation does; empty where
    # that is not known.
    beyond: dict[str, bool] = field(default_factory=dict)

    @property
    def rules(self) -> list[str]:
        """The rules that can be asked here, the probe's accuracy first."""
        more = [f"{method}{TESTED}" for method in self.tested]
        more += [f"{method}{GUARDED}" for method in self.beyond]
        return [PROBE, *self.counterfactual, *more]

    def score(self, rule: str) -> float:
        """Accuracy, or flips beyond those of the control, or of the null where edits are tested."""
        method, by = _split(rule)
        if method == PROBE:
            return self.probe_accuracy
        against = self.null if by else self.control
        return (self.counterfactual[method] or 0.0) - (against[method] or 0.0)

    def says_used(self, rule: str) -> bool:
        """The verdict of a rule."""
        method, by = _split(rule)
        if by:
            return self.tested[method] and not (by == GUARDED and self.beyond[method])
        return self.score(rule) >= (ACCURATE if rule == PROBE else USED_THRESHOLD)

    def right(self, rule: str) -> bool | None:
        """Whether the verdict is right; None where the truth is unclear."""
        return None if self.truth == UNCLEAR else self.says_used(rule) == (self.truth == USED)


def _split(rule: str) -> tuple[str, str]:
    """The method of a rule, and by what it is judged."""
    method, mark, by = rule.partition(":")
    return method, mark + by


@dataclass(frozen=True)
class Count:
    """How often one rule is right, over sites and seeds."""

    rule: str  # name of the rule or of the edit
    model: str  # which model, or `ALL`
    true_positives: int  # said to be used, and used
    false_positives: int  # said to be used, and not used
    true_negatives: int  # said not to be used, and not used
    false_negatives: int  # said not to be used, and used
    unclear: int  # sites left out, of which the truth is unclear
    right: Estimate  # share of right verdicts
    false_positive_rate: Estimate  # of the sites that are not used, those said to be
    false_negative_rate: Estimate  # of the sites that are used, those said not to be

    @property
    def in_short(self) -> str:
        """The four counts, the right ones first of each pair."""
        said = (self.true_positives, self.false_positives, self.true_negatives)
        return "/".join(map(str, (*said, self.false_negatives)))

    @classmethod
    def of(cls, rule: str, model: str, scores: Sequence[SiteScores]) -> Self:
        """Count the verdicts of a rule; draws of prompts at one site are no sites of their own."""
        places = {place: number for number, place in enumerate({(s.model, s.site) for s in scores})}

        def count(truth: str, said: bool) -> int:
            return sum(item.truth == truth and item.says_used(rule) == said for item in scores)

        def rate(right: bool, *truths: str) -> Estimate:
            own = [item for item in scores if item.truth in truths]
            found = torch.tensor([item.right(rule) is right for item in own], dtype=torch.bool)
            sites = torch.tensor([places[item.model, item.site] for item in own])
            share = Estimate.share(found, sites)
            if share.value in (0, 1):  # whose spread over sites is not known
                few = len(sites.unique())
                lower, upper = Estimate.count(round(share.value) * few, few).interval or (0.0, 1.0)
                share = replace(share, lower=lower, upper=upper)
            return share

        return cls(
            rule=rule,
            model=model,
            true_positives=count(USED, True),
            false_positives=count(NOT_USED, True),
            true_negatives=count(NOT_USED, False),
            false_negatives=count(USED, False),
            unclear=sum(item.truth == UNCLEAR for item in scores),
            right=rate(True, USED, NOT_USED),
            false_positive_rate=rate(False, NOT_USED),
            false_negative_rate=rate(False, USED),
        )


@dataclass(frozen=True)
class VerdictsResult:
    """All verdicts."""

    settings: dict[str, Any]  # what was asked for, as plain JSON values
    command: str  # the command that gives the same numbers
    models: dict[str, str]  # names of the models to what the variable is there, such as `present`
    titles: dict[str, str]  # rule to its name in tables
    problems: dict[str, str]  # methods that could not be built, with the reason
    scores: list[SiteScores]  # by model, seed and site
    counts: list[Count] = field(default_factory=list)  # by rule, for each model and for `ALL`
    # Of the packages that decide the numbers.
    versions: dict[str, str] = field(default_factory=dict)
    elapsed: dict[str, float] = field(default_factory=dict)  # seconds by model, and in all

    @property
    def rules(self) -> list[str]:
        """The rules that were asked, in their order."""
        return list(dict.fromkeys(count.rule for count in self.counts))

    def judged_by(self, by: str) -> list[str]:
        """The rules that judge by half (``""``), :data:`TESTED` or :data:`GUARDED`."""
        return [rule for rule in self.rules if _split(rule)[1] == by]

    def count(self, rule: str, model: str = ALL) -> Count:
        """The counts of one rule."""
        return next(c for c in self.counts if (c.rule, c.model) == (rule, model))

    def tables(self) -> dict[str, Table]:
        """Counts by model, and rates over all models, of each way to judge, by title."""
        found, models = {}, list(dict.fromkeys(count.model for count in self.counts))
        for by, rules in ((by, self.judged_by(by)) for by in ("", *IN_WORDS)):
            if not rules:
                continue
            how, head, counts, rates = IN_WORDS.get(by, ""), ["verdict by"], [], []
            for model in models:
                kind, unclear = self.models.get(model), self.count(rules[0], model).unclear
                note = f"\n{unclear} unclear left out" if unclear else ""
                head.append((f"{model}\norder {kind}" if kind else model) + note)
            for rule in rules:
                title, total = self.titles[rule].removesuffix(how), self.count(rule)
                counts.append([title, *(self.count(rule, model).in_short for model in models)])
                shares = (total.right, total.false_positive_rate, total.false_negative_rate)
                rates.append([title, *map(_percent, shares)])
            legend = "rightly used/wrongly used/rightly not/wrongly not"
            found[f"Sites by verdict{how}: {legend}"] = Table(head, counts)
            found[f"Over all models{how}, in % with 95 % intervals"] = Table(
                ["verdict by", "right", "wrongly used", "wrongly not"], rates
            )
        return found


def _percent(rate: Estimate) -> str:
    if rate.value is None or rate.interval is None:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.value:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def judge(settings: VerdictSettings, *, progress: bool = False) -> VerdictsResult:
    """Give every rule's verdict on every site, compare with the truth, and write the results.

    Writes ``verdicts.json``, ``verdicts.csv`` and the figure ``verdicts`` as PNG and SVG.

    Raises:
        ModelError: a model cannot be loaded, or nothing is known of where it uses the order.
        LRQPError: any other bad input.
    """
    if settings.figures:
        require_matplotlib()
    with made_folder(settings.out):
        truths = {name: _truth(name) for name in settings.model_names()}
        clock, scores, problems = Clock(), list[SiteScores](), dict[str, str]()
        device, seeds = choose_device(settings.device), range(settings.seeds)
        with progress_bars(enabled=progress) as start:
            for name, truth in truths.items():
                label = Path(name).name
                with clock.stage(label):
                    model, tokenizer = models.load(name, device=device)
                    advance = start(f"judging {label}", len(seeds))
                    for seed in (settings.seed + number for number in seeds):
                        context = _drawn(settings, name, seed, model, tokenizer)
                        found, missing = score_sites(context, truth, settings.method_names(), label)
                        scores += found
                        problems |= missing
                        advance(1)
        result = VerdictsResult(
            settings={k: v for k, v in asdict(settings).items() if k not in ("out", "figures")},
            command=settings.command(),
            models={Path(name).name: ORGANISMS.get(name, "") for name in truths},
            titles=titles(settings.method_names()),
            problems=problems,
            scores=scores,
            counts=count_all(scores),
            versions=package_versions(),
            elapsed=clock.seconds(),
        )
        _write(result, settings.out)
        if settings.figures:
            write_charts({FIGURE: chart(result)}, settings.out)
    return result


def titles(methods: Sequence[str]) -> dict[str, str]:
    """Rule to its name in tables, of the probe's accuracy and of these methods."""
    named = {method: METHODS[method].title for method in methods}
    tested = {f"{m}{by}": f"{title}{IN_WORDS[by]}" for by in IN_WORDS for m, title in named.items()}
    return {PROBE: "probe accuracy alone"} | named | tested


def _truth(name: str) -> KnownSites:
    truth = read_truth(name)
    if truth is None:
        raise ModelError(
            f"nothing is known of where {name!r} uses the order: give bundled organisms "
            f"({', '.join(ORGANISMS)}), or folders with a ground_truth.json"
        )
    return truth


def _drawn(
    settings: VerdictSettings, name: str, seed: int, model: Any, tokenizer: Any
) -> StudyContext:
    """A model with one draw of prompts."""
    study = Settings(name, settings.out, n=settings.n, prefixes=settings.prefixes, seed=seed)
    task = named_task(tokenizer, study)
    sites, device = choose_sites(model, settings.sites), next(model.parameters()).device
    return StudyContext(model, task, None, sites, settings.batch_size, seed, device)


def score_sites(
    context: StudyContext, truth: KnownSites, methods: Sequence[str], name: str
) -> tuple[list[SiteScores], dict[str, str]]:
    """Scores of one model (``name``) on one draw of prompts.

    A score for each site in order, and the methods that could not be built with the reason.
    """
    train, test = context.task.train, context.task.test
    y, labels = (data.labels.to(context.device).long() for data in (train, test))
    x_train, x_test = context.clean(context.task, "mark", no_progress)
    pairs = counterparts(context, test, context.sites)
    alike = others_alike(labels, context.generator()).to(context.device)
    target = next_class(labels, len(test.classes))
    edits = fit_edits(x_train, y)
    trials = Trials(context, test)
    made: dict[str, dict[str, _Made]] = {}
    patches = {site: trials.add(site, pairs[site] - x_test[site]) for site in context.sites}
    problems: dict[str, str] = {}
    mixed, turn = shuffled(y, context.generator()), turns(len(test), context.generator())
    mixed_at = LinearProbe.fit_many(
        {(site, i): (x, order) for site, x in x_train.items() for i, order in enumerate(mixed)}
    )
    for site in context.sites:
        x, metric = x_test[site], edits[site].metric
        chance = [mixed_at[site, i] for i in range(len(mixed))]
        for item in build_candidates(context, site, edits[site], methods, Training()):
            edit = item.edit
            if edit is None and item.name in TRAINED:
                # Where no edit can change the answer there is nothing to learn from.
                untrained = LeastEdit if item.name == LEARNED else NoEdit
                edit = untrained(edits[site])
            if edit is None:
                problems[item.name] = item.problem
                continue
            with torch.no_grad():
                back, moved = (
                    with_partners(edit, partners)(x, wanted, labels).double() - x.double()
                    for wanted, partners in ((labels, x[alike]), (target, pairs[site]))
                )
            # Methods that do the same whatever the target need no second run.
            control, length = trials.add(site, back), metric.distance(moved)
            nulls = [null_edits(chance, metric, target, labels, length, run) for run in turn]
            made.setdefault(item.name, {})[site] = (
                control if torch.equal(back, moved) else trials.add(site, moved),
                control,
                [trials.add(site, null) for null in nulls],
            )
    trials.run()
    by_method = {
        method: _judge(made[method], trials.clean, turn, patches)
        for method in methods
        if method not in problems
    }
    return [
        SiteScores(
            model=name,
            seed=context.seed,
            site=site,
            truth=truth.at(site),
            probe_accuracy=edits[site].probe.accuracy(x_test[site], labels),
            **{what: {m: own[site][what] for m, own in by_method.items()} for what in JUDGED},
        )
        for site in context.sites
    ], problems


_Made = tuple[Trial, Trial, list[Trial]]
"""What was run of one edit at one site: towards the other order, towards the true one, null."""

JUDGED = ("control", "counterfactual", "null", "p_adjusted", "tested", "beyond")
"""What :class:`SiteScores` has of each method."""


def _judge(
    made: Mapping[str, _Made], clean: Trial, turn: Sequence[Tensor], patches: Mapping[str, Trial]
) -> dict[str, dict[str, Any]]:
    """What is known of one edit at each site of a model."""
    before = {name: clean[name] for name in ("logit_difference", "own_lead", "other_lead")}
    nulls, p_values, excesses = {}, {}, {}
    for site, (moved, _, runs) in made.items():
        met = [
            {name: run[name] for name in before} | {"probe": probe}
            for run, probe in zip(runs, turn, strict=True)
        ]
        nulls[site] = null_of(before, moved.found, met, 0)
        p_values[site] = excess(before, moved.found, met[0], Sample(0))
        excesses[site] = excess(before, moved.found, patches[site].found, Sample(0))
    said, beyond = verdicts(p_values, nulls, dict.fromkeys(made)), holm(excesses)
    found = {}
    for site, one in said.items():
        moved, control, _ = made[site]
        flips = [Sample(0).flipped(before, trial.found).value for trial in (control, moved)]
        known = (nulls[site].flipped.value, one.p_adjusted, one.used, beyond[site] < LEVEL)
        found[site] = dict(zip(JUDGED, (*flips, *known), strict=True))
    return found


def count_all(scores: Sequence[SiteScores]) -> list[Count]:
    """Counts of every rule, for each model and for all together."""
    models = list(dict.fromkeys(item.model for item in scores))
    return [
        Count.of(rule, model, [item for item in scores if model in (item.model, ALL)])
        for rule in (scores[0].rules if scores else [])
        for model in (*models, ALL)
    ]


def findings(result: VerdictsResult) -> list[str]:
    """What the counts say, in sentences made from the numbers."""
    if not result.counts:
        return []
    totals = {rule: result.count(rule) for rule in result.rules}
    best = []
    for rules in filter(None, map(result.judged_by, ("", *IN_WORDS))):
        right = {result.titles[rule]: totals[rule].right.value or 0.0 for rule in rules}
        most = max(right.values())
        best.append((most, [title for title, share in right.items() if share == most]))
    silent = [
        result.titles[rule]
        for rule, count in totals.items()
        if count.true_positives + count.false_positives == 0 and not _split(rule)[1]
    ]
    told = ["lrqp", PROBE, *(f"lrqp{by}" for by in IN_WORDS)]
    known: dict[str, Any] = {"totals": totals, "told": told, "best": best, "silent": silent}
    return said("verdicts", "says", result=result, **known)


def chart(result: VerdictsResult) -> Chart:
    """Maps of sites by rules, one for each model, with the truth on top."""
    panes = [_pane(result, model, kind) for model, kind in result.models.items()]
    # In inches: a cell is as wide as its number, and a pane as its title.
    widths = [max(0.45 * len(pane.heat.columns), 2.2) for pane in panes if pane.heat is not None]
    seeds = int(result.settings["seeds"])
    return Chart(
        panes,
        "Where is the order used?",
        "Answers flipped beyond the control edit, or probe accuracy (%)"
        + (f", mean of {seeds} seeds. " if seeds > 1 else ". ")
        + "Framed: says “used”. Orange cross: wrong in most seeds.",
        columns=len(panes),
        share_y=True,
        widths=widths,
        size=(3.2 + sum(widths), 2.6 + 0.34 * len(result.rules)),
    )


def _pane(result: VerdictsResult, model: str, kind: str) -> Pane:
    scores = [score for score in result.scores if score.model == model]
    sites = list(dict.fromkeys(score.site for score in scores))
    here = [[score for score in scores if score.site == site] for site in sites]
    truths = [own[0].truth for own in here]
    means = [
        [sum(score.score(rule) for score in own) / len(own) for own in here]
        for rule in result.rules
    ]
    cells = [(i, j) for i in range(len(result.rules)) for j in range(len(sites))]

    def most(i: int, j: int, says: Callable[[SiteScores, str], bool]) -> bool:
        return 2 * sum(says(score, result.rules[i]) for score in here[j]) > len(here[j])

    texts = [[f"{100 * mean:z.0f}".replace("-", "−") for mean in row] for row in means]

    def wrong(score: SiteScores, rule: str) -> bool:
        return score.right(rule) is False

    first = [{USED: "used", UNCLEAR: "?"}.get(truth, "–") for truth in truths]
    values = [[float(truth == USED) for truth in truths]]
    heat = Heat(
        values + [[max(mean, 0.0) for mean in row] for row in means],
        ["truth", *(result.titles[rule] for rule in result.rules)],
        sites,
        "flipped beyond control, or accuracy",
        low=0.0,
        high=1.0,
        texts=[first, *texts],
        framed=[(i + 1, j) for i, j in cells if most(i, j, SiteScores.says_used)],
        crossed=[(i + 1, j) for i, j in cells if most(i, j, wrong)],
        gaps=[1, 2],
        bar=False,
    )
    return Pane(heat=heat, title=f"{model}\norder {kind}" if kind else model)


def _write(result: VerdictsResult, folder: Path) -> None:
    write_json(folder / JSON_FILE, to_json(result))
    with written_whole(folder / TABLE_FILE) as path, path.open("w", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(_table(result))


def _table(result: VerdictsResult) -> Iterator[list[Any]]:
    """A line for each rule and model, with the heading first."""
    rates = ("right", "false_positive_rate", "false_negative_rate")
    numbers = ("true_positives", "false_positives", "true_negatives", "false_negatives", "unclear")
    ends = [f"{rate}_{end}" for rate in rates for end in ("share", "lower", "upper")]
    yield ["rule", "model", *numbers, *ends]
    for count in result.counts:
        shares = [getattr(count, rate) for rate in rates]
        values = [end for share in shares for end in (share.value, share.lower, share.upper)]
        yield [count.rule, count.model, *(getattr(count, name) for name in numbers), *values]
