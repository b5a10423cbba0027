"""Several variables of one token: their probes, their joint edits, and what these are held against.

See :mod:`lrqp_torch.study.parts.joint`, the part that runs them.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.baselines import DASLeast
from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import PromptError
from lrqp_torch.probes.covariance import Mahalanobis
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.qp.stacked import JointSolution
from lrqp_torch.study.ceiling import Likeness, interchange_of, likenesses
from lrqp_torch.study.context import Advance
from lrqp_torch.study.doses import asked_of
from lrqp_torch.study.estimates import Estimate, Sample
from lrqp_torch.study.league import elsewhere
from lrqp_torch.study.methods import Training, shortest, train_das
from lrqp_torch.study.part import Given
from lrqp_torch.study.prompts import ALL, PromptSet, Values
from lrqp_torch.study.results import (
    ConditionResult,
    KeptResult,
    TargetResult,
    VariableResult,
    columns_of,
    judged,
    patched,
)
from lrqp_torch.study.running import Batch, Trial, Trials, answers, batches, put, with_partners
from lrqp_torch.study.sweep import INTERCHANGE, edited_columns
from lrqp_torch.study.variables import FEWEST

COPIES = 4
"""Edits of a batch that run side by side."""
CLASS, KEPT = "class", "kept"
METHODS = {
    "lrqp": "LRQP",
    KEPT: "LRQP, others kept",
    "means": "class means, added",
    "das": "DAS",
    "das_least": "DAS's reading, least edit",
    "patch": "full patch",
}
"""Ways to write the same at the best site, by name."""
LEAST_TO_TRAIN = 8
"""Training prompts with twins that DAS needs."""
REACHED = 1e-3
"""Nats by which a reading may miss the odds asked for and still count as having reached them: what
rounding does to the activations and readings of every method."""


@dataclass(frozen=True, kw_only=True)
class MethodRow(Likeness):
    """One way to write some variables at the best site, over the held-out prompts."""

    variables: str  # what is written: a variable, or `all`
    method: str  # name, one of `METHODS`
    title: str  # in tables
    settings: str  # how it was trained; empty for methods in closed form
    flipped: Estimate  # of the answers, the share turned
    logit_difference: Estimate  # mean preference for the class that holds
    divergence: Estimate  # mean KL(clean ‖ edited) of the next token elsewhere, in nats
    distance: float | None  # mean Mahalanobis length; None as that of an interchange
    # Of the prompts, the share at which the probes of all that is written read the odds asked of
    # LRQP, log α, to within `REACHED`; and mean |log odds read − log α|, in nats, of the variable
    # that is shortest of it: what was written too little, or too much.
    reached: Estimate | None = None
    astray: Estimate | None = None


@dataclass(frozen=True)
class Additivity:
    """How the effects of variables alone add up, as shares of the effect of all together."""

    # Of the edits, sum over the variables; None where all together have no certain effect.
    edits: Estimate | None
    interchanges: Estimate | None  # of the interchanges


def sets_of(variables: tuple[str, ...]) -> list[str]:
    """What is written: each variable, and all where there are several."""
    return [*variables, ALL] if len(variables) > 1 else list(variables)


@dataclass(frozen=True)
class _Variable:
    """A variable: its classes with training prompts, and the class of each prompt, −1 for none."""

    classes: list[str]  # names
    train: Tensor  # of the training prompts, (n,)
    test: Tensor  # of the held-out prompts, (m,)
    target: Tensor  # class to write into these, (m,)
    twins: bool  # whether that is known from twins alone, so that no other class is written

    @classmethod
    def of(cls, train: PromptSet, test: PromptSet, name: str | None) -> "_Variable":
        """A variable of the prompts; None for the class."""
        known, test_known = (
            Values(data.classes, data.labels) if name is None else data.values(name)
            for data in (train, test)
        )
        names, labels = known.classes, (known.labels.cpu(), test_known.labels.cpu())
        twins = None if name is None else test.twins(name)
        target = test.other.cpu() if name is None else (labels[1] + 1) % len(names)
        if name is not None and twins is not None:
            there = twins.prompts.values(name).labels.cpu()
            target = torch.where(twins.known, there, target)
        counts = torch.bincount(labels[0], minlength=len(names))
        kept = (counts >= FEWEST).nonzero().flatten()
        new = torch.full((len(names),), -1)
        new[kept] = torch.arange(len(kept))
        classes, alone = [names[k] for k in kept.tolist()], twins is not None and twins.rows is None
        return cls(classes, new[labels[0]], new[labels[1]], new[target], alone)


@dataclass
class JointStudy:
    """The variables of a study's prompts, their edits, and what they are held against."""

    given: Given

    def __post_init__(self) -> None:
        given = self.given
        context, task = given.context, given.context.task
        names = context.variables or (CLASS,)
        self.variables = {
            name: _Variable.of(task.train, task.test, None if place == 0 else name)
            for place, name in enumerate(names)
        }
        self.sets = sets_of(names)
        every = list(self.variables.values())
        self.fitted = torch.stack([v.train >= 0 for v in every]).all(0)
        self.rows = torch.stack([(v.test >= 0) & (v.target >= 0) for v in every]).all(0)
        self.rows = self.rows.nonzero().flatten()
        if not len(self.rows):
            raise PromptError(
                f"no held-out prompt has classes of {' and '.join(names)}, its own and those to "
                f"write, that {FEWEST} prompts to fit on have; give more prompts, or fewer classes"
            )
        self.data = task.test[self.rows]
        self.source = torch.stack([v.test[self.rows] for v in every], -1)
        self.target = torch.stack([v.target[self.rows] for v in every], -1)
        known, held_out = context.clean(task, "mark", lambda _: None)
        fitted = self.fitted.to(context.device)
        self.fit = {site: x[fitted] for site, x in known.items()}
        self.x = {site: x[self.rows.to(x.device)] for site, x in held_out.items()}
        self.labels = {
            n: v.train[self.fitted].to(context.device) for n, v in self.variables.items()
        }
        self.mixed = {
            name: y[torch.randperm(len(y), generator=context.generator()).to(y.device)]
            for name, y in self.labels.items()
        }
        settings, every_y = given.settings, dict(self.labels)
        every_y |= {f"{name} shuffled": y for name, y in self.mixed.items()}
        problems = {(s, name): (x, y) for s, x in self.fit.items() for name, y in every_y.items()}
        self.probes = LinearProbe.fit_many(problems, l2=settings.l2)
        self.edits = {}
        for site, x in self.fit.items():
            metric = Mahalanobis.fit(x, settings.shrinkage)
            own = {
                name: LRQP(self.probes[site, name], metric, log_odds=settings.log_odds)
                for name in self.variables
            }
            self.edits[site] = JointLRQP(own, metric, on_infeasible="skip")
        self.twins: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
        for one in self.sets:
            first = one == next(iter(self.variables))
            found = context.twins(task, variable=None if first else one)
            if found is not None:
                at, among = found
                rows = self.rows.to(context.device)
                self.twins[one] = {s: x[rows] for s, x in at.items()}, among[self.rows]

    def choice(self, one: str, classes: Tensor, beside: int = JointLRQP.FREE) -> Tensor:
        """What is written of each variable, (n, V): classes of the set, and the others as said."""
        columns = [
            classes[:, place] if one in (name, ALL) else torch.full_like(classes[:, place], beside)
            for place, name in enumerate(self.variables)
        ]
        return torch.stack(columns, -1)

    def editing(self, batch: Batch[Any], site: str, condition: str) -> AbstractContextManager[Any]:
        """The context of the edit of all variables under ``"counterfactual"``; none for others."""
        if condition != "counterfactual":
            return nullcontext()
        one, device = self.sets[-1], batch.prompts.labels.device
        target = self.choice(one, self.target[batch.rows].to(device))
        asked = self.asked(site, one, {condition: target}, batch.rows)
        how: dict[str, Any] = {} if asked is None else {"asked": asked[condition]}
        how |= {"positions": batch.prompts.position, "source": self.source[batch.rows].to(device)}
        return self.edits[site].at(batch.model, site, target=target, **how)

    def run(self, advance: Advance) -> dict[tuple[str, str], dict[str, Tensor]]:
        """What every held-out prompt answers under each edit, by site and set of variables.

        The names are those of :func:`~lrqp_torch.study.sweep.sweep`, beside them ``SITE.kept`` for
        the edit that keeps the other variables and ``SITE.to J`` for that which writes the J-th
        class behind the prompt's own.
        """
        context, n = self.given.context, len(self.data)
        keys = [(site, one) for site in context.sites for one in self.sets]
        kept: dict[tuple[str, str], dict[str, Tensor]] = {key: {} for key in keys}
        clean: dict[str, Tensor] = {}
        for batch in batches(context.model, self.data, context.batch_size, copies=COPIES):
            own = answers(batch.prompts, batch.clean, batch.clean_rest)
            put(clean, {f"clean.{name}": v for name, v in own.items()}, batch.rows, n)
            advance(len(batch))
            for site, one in keys:
                put(kept[site, one], self._ran(batch, site, one), batch.rows, n)
                advance(COPIES * len(batch))
        beside = {"labels": self.data.labels.cpu(), **clean}
        if self.data.groups is not None:
            beside["groups"] = self.data.groups.cpu()
        for (_, one), flat in kept.items():
            flat |= beside
            if one in self.twins:
                flat["twins"] = self.twins[one][1]
        for site, one in keys:
            if one in self.twins:
                moved = self.twins[one][0][site].double() - self.x[site].double()
                length = self.edits[site].metric.distance(moved).cpu()
                kept[site, one][f"{site}.{INTERCHANGE}.distance"] = length
        return kept

    def _ran(self, batch: Batch[PromptSet], site: str, one: str) -> dict[str, Tensor]:
        """What a batch answers under the edits of one set of variables at one site, by name."""
        rows, device = batch.rows, batch.prompts.labels.device
        source = self.source[rows].to(device)
        target = self.target[rows].to(device)
        targets = {
            "control": self.choice(one, source),
            "counterfactual": self.choice(one, target),
            KEPT: self.choice(one, target, JointLRQP.KEEP),
        }
        patch = self.twins.get(one)
        beside = {} if patch is None else {INTERCHANGE: patch[0][site][rows.to(device)]}
        if patch is None:
            targets["again"] = targets[KEPT]
        edit, asked = self.edits[site], self.asked(site, one, targets, rows)
        found = edited_columns(batch, site, edit, targets, beside, source=source, asked=asked)
        found = {name: v for name, v in found.items() if not name.startswith(f"{site}.again.")}
        shifts = self._shifts(one)  # of the class, which stands first
        for start in range(0, len(shifts), COPIES):
            some, rest = shifts[start : start + COPIES], source[:, 1:]
            moved = {
                f"to {shift}": torch.cat([(source[:, :1] + shift) % self._size(one), rest], -1)
                for shift in some
            }
            # As many as there are copies.
            moved |= {f"spare {i}": moved[f"to {some[0]}"] for i in range(COPIES - len(some))}
            choices = {name: self.choice(one, to) for name, to in moved.items()}
            ran = batch.edited(site, edit, choices, source=source)
            for name in (f"to {shift}" for shift in some):
                there, edited = replace(batch.prompts, targets=moved[name][:, 0]), ran[name]
                own = answers(there, edited.logits, edited.rest) | edited.record
                found |= {f"{site}.{name}.{key}": value for key, value in own.items()}
        return found

    def _shifts(self, one: str) -> list[int]:
        """How far behind its own class another is written: 1 to K − 1; none for twins' alone.

        That of the class, whose answers are known, is what the sets are judged by.
        """
        first = next(iter(self.variables))
        variable = self.variables.get(one)
        if one != first or variable is None or len(variable.classes) < 3 or variable.twins:
            return []
        return list(range(1, len(variable.classes)))

    def asked(
        self, site: str, one: str, targets: Mapping[str, Tensor], rows: Tensor
    ) -> dict[str, dict[str, Tensor]] | None:
        """The log α of each edit by variable, where the study does not dose by nats."""
        dose = self.given.settings.dose
        if dose == "nats":
            return None
        x, found = self.x[site][rows.to(self.x[site].device)], dict[str, dict[str, Tensor]]()
        twin = self.twins.get(one)
        for name, choice in targets.items():
            there = x if name == "control" or twin is None else twin[0][site][rows.to(x.device)]
            found[name] = {}
            for place, variable in enumerate(self.variables):
                to, probe = choice[:, place].to(x.device), self.probes[site, variable]
                if int(to.min()) >= 0:
                    known = self.fit[site], self.labels[variable]
                    found[name][variable] = asked_of(dose, probe, to, there, *known)
        return found

    def summary(
        self, site: str, flats: Mapping[tuple[str, str], Mapping[str, Tensor]]
    ) -> dict[str, VariableResult]:
        """What the edits of each set of variables do at a site."""
        seed, found = self.given.context.seed, {}
        for one in self.sets:
            flat = flats[site, one]
            groups = flat.get("groups")
            read = [self.probes[site, f"{n} shuffled"](self.x[site]) for n in self.variables]
            same = torch.stack([z.argmax(-1).cpu() for z in read], -1) == self.source
            right = same[:, [one in (name, ALL) for name in self.variables]].all(-1)
            own = VariableResult.of(flat, site, Estimate.share(right, groups), seed)
            result = judged({site: own}, flat, seed)[site]
            assert isinstance(result, VariableResult)
            found[one] = replace(
                result,
                prompts=len(self.data),
                kept=self._kept(site, flat) if one != ALL and len(self.sets) > 1 else None,
                by_target=self._by_target(site, one, flat),
            )
        return found

    def _kept(self, site: str, flat: Mapping[str, Tensor]) -> KeptResult:
        seed, found = self.given.context.seed, patched(flat, site, KEPT)
        edit = ConditionResult.of(flat, f"{site}.{KEPT}", seed)
        if found is None:
            return KeptResult(edit=edit)
        clean, own, patch, twins = found
        sample = Sample(seed, flat.get("groups"), twins)
        return KeptResult(edit=edit, **likenesses(clean, {KEPT: (own, patch)}, sample)[KEPT])

    def _by_target(
        self, site: str, one: str, flat: Mapping[str, Tensor]
    ) -> dict[str, TargetResult]:
        variable = self.variables.get(one)
        if variable is None or len(variable.classes) < 3:
            return {}
        place, k = list(self.variables).index(one), len(variable.classes)
        own = self.source[:, place]
        runs = [(f"{site}.to {s}", (own + s) % k) for s in self._shifts(one)]
        runs = runs or [(f"{site}.counterfactual", self.target[:, place])]
        written = torch.cat([target for _, target in runs])
        columns = [columns_of(flat, key) for key, _ in runs]
        every = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
        answered = "clean.own_lead" in flat
        before = flat["clean.own_lead"].repeat(len(runs)) > 0 if answered else None
        found = {}
        for index, name in enumerate(variable.classes):
            rows = written == index
            if answered:  # a prompt need not have answers of every class
                rows &= every["logit_difference"].isfinite()
            if not bool(rows.any()):
                continue
            of = Sample(self.given.context.seed, rows=rows)
            found[name] = TargetResult(
                prompts=int(rows.sum()),
                flipped=None if before is None else of.among(before).share(every["other_lead"] > 0),
                logit_difference=of.mean(every["logit_difference"]) if answered else None,
                distance=float(every["distance"][rows].mean()),
            )
        return found

    def additive(
        self, site: str, flats: Mapping[tuple[str, str], Mapping[str, Tensor]]
    ) -> Additivity:
        """The sum of single effects over that of all together, of edits and of interchanges."""

        def ratio(condition: str) -> Estimate | None:
            own, name = [flats[site, one] for one in self.sets], f"{site}.{condition}"
            if not all(f"{name}.logit_difference" in flat for flat in own):
                return None
            *single, whole = (
                flat["clean.logit_difference"] - flat[f"{name}.logit_difference"] for flat in own
            )
            sample = Sample(self.given.context.seed, own[-1].get("groups"))
            certain = sample.mean(whole).certain
            return sample.ratio(torch.stack(single).sum(0), whole) if certain else None

        return Additivity(ratio("counterfactual"), ratio(INTERCHANGE))

    # ---- other ways to write the same ------------------------------------------------------------

    def compare(self, site: str, training: Training, advance: Advance) -> list[MethodRow]:
        """Every method on every set of variables at one site; those with twins and answers."""
        if self.data.answers is None or not self.twins:
            return []
        context, metric, x = self.given.context, self.edits[site].metric, self.x[site]
        trials = Trials(context, self.data, elsewhere=elsewhere(self.data)[0])
        rows, made = list[MethodRow](), dict[str, dict[str, tuple[Trial, str, Tensor]]]()
        for one, (at, known) in self.twins.items():
            moved = at[site].double() - x.double()
            floor = self._least(site, one, JointLRQP.FREE).floor
            patch = trials.add(site, moved, metric=metric)
            patch.known = known
            made[one] = {"patch": (patch, "", self._short(site, floor, moved))}
            for name, (delta, settings) in self._deltas(site, one, training).items():
                trial = trials.add(site, delta, patch, metric)
                made[one][name] = trial, settings, self._short(site, floor, delta)
        trials.run(advance)
        for one, ways in made.items():
            sample = trials.sample.among(self.twins[one][1])
            others = {name: trial for name, (trial, *_) in ways.items() if name != "patch"}
            likeness = trials.likenesses(others, ways["patch"][0])[1]
            for name in (name for name in METHODS if name in ways):
                trial, settings, short = ways[name]
                own = dict(vars(interchange_of(trials.clean.found, trial.found, sample)))
                own.pop("prompts")  # of which all rows are
                own |= {"reached": sample.share(short <= REACHED), **likeness.get(name, {})}
                own |= {"astray": sample.mean(short.abs()), "settings": settings}
                rows.append(MethodRow(variables=one, method=name, title=METHODS[name], **own))
        return rows

    def _deltas(self, site: str, one: str, training: Training) -> dict[str, tuple[Tensor, str]]:
        """What each method adds to the activations, (n, d) float64, and how it was trained."""
        x = self.x[site].double()
        device = x.device
        source, target = self.source.to(device), self.target.to(device)

        def least(beside: int) -> Tensor:
            return self._least(site, one, beside).x_new.detach().double() - x

        found = {"lrqp": (least(JointLRQP.FREE), "")}
        if one != ALL and len(self.sets) > 1:
            found[KEPT] = (least(JointLRQP.KEEP), "")
        added = torch.zeros_like(x)
        for place, name in enumerate(self.variables):
            if one in (name, ALL):
                known = self.fit[site].double()
                means = torch.stack(
                    [known[self.labels[name] == k].mean(0) for k in range(self._size(name))]
                )
                added = added + means[target[:, place]] - means[source[:, place]]
        found["means"] = (added, "")
        das = self._das(site, one, training)
        if das is not None:
            edits, settings = das
            pairs = self.twins[one][0][site]
            for name, way in edits.items():
                written = with_partners(way, pairs)(
                    x.float(), self.data.other.to(device), self.data.labels.to(device)
                )
                found[name] = (written.double() - x, settings)
        return found

    def _least(self, site: str, one: str, beside: int) -> JointSolution:
        """The least edit that writes a set of variables, with the others free or kept.

        In the dtype of the stream, as at every site: what it certifies is then what the model is
        given, and not what rounding leaves of it.
        """
        x = self.x[site]
        choice = self.choice(one, self.target.to(x.device), beside)
        asked = self.asked(site, one, {"counterfactual": choice}, torch.arange(len(x)))
        own = None if asked is None else asked["counterfactual"]
        return self.edits[site].solve(x, choice, self.source.to(x.device), asked=own)

    def _short(self, site: str, floor: Tensor, delta: Tensor) -> Tensor:
        """Nats by which floors (n, V) are missed, at most; negative where exceeded, (n,)."""
        x = self.x[site]
        there, target = (x.double() + delta).to(x.dtype), self.target.to(x.device)
        read = [
            self.probes[site, name].log_odds(there, target[:, place])
            for place, name in enumerate(self.variables)
        ]
        # What is not written has no floor.
        short = (floor - torch.stack(read, -1)).nan_to_num(nan=-torch.inf)
        return short.amax(-1).detach().cpu()

    def _size(self, name: str) -> int:
        return len(self.variables[name].classes)

    def _das(self, site: str, one: str, training: Training) -> tuple[dict[str, Any], str] | None:
        """DAS of one dimension a variable, trained on twins in these; None where there are few."""
        context, train = self.given.context, self.given.context.task.train
        variable = None if one == next(iter(self.variables)) else one
        found = train.twins(variable)
        if found is None or int(found.known.sum()) < LEAST_TO_TRAIN:
            return None
        few = shortest(train[found.known.nonzero().flatten()], training.prompts)
        with torch.enable_grad():
            rank, edit = len(self.variables) if one == ALL else 1, self.given.edit_at(site)
            how: dict[str, Any] = {"rank": rank, "variable": variable}
            das, settings = train_das(context, site, edit, few, training, **how)
        return {"das": das, "das_least": DASLeast.of(das)}, settings
