"""What can be read at the marked token and at the end: the class, and what else prompts differ in.

A linear probe is fitted to the clean activations of the training prompts for each variable, and
its accuracy measured on held-out ones, with Wilson 95 % intervals. Beside it stand the accuracy of
always guessing the class that is most frequent among the held-out prompts, and that of a probe
fitted to shuffled labels. Of prompts about two names seven variables are read
(:mod:`lrqp_torch.study.variables`), of others the label.

Source: the post "Intervening in the Residual Stream" (2023), which found that the positions of S1
and IO can be read without a prefix but not with one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.plot.chart import Chart, Marks, Pane, Panel, Rule, look, marks_of
from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study import variables as known
from lrqp_torch.study.context import Advance, StudyContext, Task, evenly
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import PromptSet, Words
from lrqp_torch.study.showing import (
    Reading,
    by_site,
    capitalised,
    grouped,
    joined,
    percent,
    said,
    table_of,
    task_in_words,
)
from lrqp_torch.study.variables import MEANINGS, Variable, label_name, variables_of

MARGIN = 0.1
"""A variable counts as readable where the interval lies above the baseline by more than this."""

MOST_SITES, CONTROL_SITES, BINS = 12, 6, 8
TOLERANCE = 1e-4
"""Relative gradient norm of the probes: accuracies do not move below it, and it halves the time."""

_ACCURACY = "held-out accuracy (%)"
_SAME_WITHOUT_PREFIX = {known.POSITION_S1: known.CLAUSE_S1, known.POSITION_IO: known.CLAUSE_IO}


@dataclass(frozen=True)
class ProbeScore:
    """One probe on held-out prompts."""

    site: str  # where it reads
    accuracy: Estimate  # share of held-out prompts whose class it names
    # The same of a probe fitted to shuffled labels; None where it was not fitted.
    shuffled: Estimate | None


@dataclass(frozen=True)
class VariableScores:
    """One variable, read at one token in one version of the task."""

    task: str  # its name
    position: str  # the token, a key of ``PromptSet.positions``
    variable: str  # its name, as in :mod:`lrqp_torch.study.variables`
    classes: list[str]  # names of the classes
    train: int  # training prompts that have a class
    test: int  # held-out prompts that have one
    baseline: float  # share of the most frequent class among these held-out prompts
    scores: list[ProbeScore]  # by site, in order of computation

    @property
    def best(self) -> float:
        """The highest accuracy."""
        return max(score.accuracy.known for score in self.scores)

    @property
    def readable(self) -> bool:
        """Whether any site's interval lies above the baseline by more than :data:`MARGIN`."""
        return any((s.accuracy.lower or 0) > self.baseline + MARGIN for s in self.scores)


@dataclass(frozen=True)
class ProbingResult:
    """All probes."""

    words: Words  # what the things of the task are called
    sites: list[str]  # every site of the study; all are probed for the label, some for the rest
    names: int  # how many names were told apart at most
    bins: int  # into how many ranges positions were cut at most
    variables: list[VariableScores]  # one entry a task, position and variable


class Probing(Part[ProbingResult]):
    """Probes of every variable at two tokens.

    At most ``names`` names are told apart, the most frequent in the training prompts; prompts with
    others are left out of the probes of names. Positions are cut into ``BINS`` ranges at most.
    """

    name = "probing"
    title = "What probes can read"
    result = ProbingResult

    def __init__(self, names: int = 20) -> None:
        self.names = names

    def work(self, context: StudyContext, /) -> int:
        """Prompts to capture, and probes to fit."""
        units = 0
        for task in context.tasks:
            probed, _ = self._probed(context, task)
            fits = sum(len(sites) for v in probed for sites in _sites(task, v, context.sites))
            units += len(_positions(task.train, task.test)) * (len(task) + fits)
        return units

    def compute(self, given: Given, advance: Advance, /) -> ProbingResult:
        """Probe every variable at both tokens in each version of the task.

        The label is probed at every site, other variables at twelve sites evenly spaced, and
        shuffled labels at six. Raises ConvergenceError: a probe did not converge.
        """
        context, entries = given.context, []
        generator = context.generator()
        for task in context.tasks:
            probed, repeated = self._probed(context, task)
            for position in _positions(task.train, task.test):
                train, test = context.clean(task, position, advance)
                for variable in probed:
                    order = torch.randperm(len(variable.train_rows), generator=generator)
                    sites = _sites(task, variable, context.sites)
                    entry = VariableScores(
                        task=task.name,
                        position=position,
                        variable=variable.name,
                        classes=variable.classes,
                        train=len(variable.train_rows),
                        test=len(variable.test_rows),
                        baseline=variable.baseline,
                        scores=_scores(variable, train, test, *sites, order, advance),
                    )
                    entries.append(entry)
                    if variable.name in repeated:
                        entries.append(replace(entry, variable=repeated[variable.name]))
        words = context.task.test.words
        return ProbingResult(words, list(context.sites), self.names, BINS, entries)

    def _probed(self, context: StudyContext, task: Task) -> tuple[list[Variable], dict[str, str]]:
        """Variables to probe, and which of them stand for a second one that is the same here."""
        plain = next((task for task in context.tasks if _plain(task.train)), None)
        made = variables_of(task, plain, names=self.names, bins=BINS)
        if task is not plain:
            return made, {}
        # Where words differ in length, the position in the clause is that of the template; without
        # a prefix the true position is the better answer to the same question.
        probed = [v for v in made if v.name not in _SAME_WITHOUT_PREFIX.values()]
        return probed, _SAME_WITHOUT_PREFIX

    def says(self, result: ProbingResult, /) -> list[str]:
        """Which variables can be read where."""
        tokens: dict[str, dict[str, list[str]]] = {}
        for position, here in grouped(result.variables, lambda item: item.position).items():
            verdicts = tokens.setdefault(_called(result, position), {})
            for variable, items in grouped(here, lambda item: item.variable).items():
                items.sort(key=lambda item: item.task)
                verdicts.setdefault(_verdict(items), []).append(f"{variable} ({_bests(items)})")
        return said(self.name, "says", result=result, tokens=tokens)

    def figures(self, result: ProbingResult, /) -> dict[str, Chart]:
        """The accuracies by site, one figure a token with a pane a variable."""
        charts = {}
        for position, here in grouped(result.variables, lambda item: item.position).items():
            panes = [
                _pane(result, items, capitalised(variable))
                for variable, items in grouped(here, lambda item: item.variable).items()
            ]
            charts[f"probing_{position}"] = Chart(
                panes,
                title=f"What a linear probe reads at {_called(result, position)}; dotted: most "
                "frequent class, held out; crosses: shuffled labels",
                columns=min(2, len(panes)),
            )
        return charts

    def panels(self, result: ProbingResult, /) -> list[Panel]:
        """Charts by token and task, charts by variable, and a table of all probes."""
        by_variable = grouped(result.variables, lambda item: item.variable)
        by_token = grouped(
            result.variables,
            lambda item: joined(_called(result, item.position), task_in_words(item.task)),
        )
        meanings = {
            name: MEANINGS.get(name, " or ".join(items[0].classes))
            for name, items in by_variable.items()
        }
        rows: list[tuple[list[str], dict[str, Any]]] = []
        for item in result.variables:
            names = [_called(result, item.position), task_in_words(item.task) or "–", item.variable]
            rows += [([*names, one.site], {"of": item, "score": one}) for one in item.scores]
        columns: dict[str, Reading] = {
            "accuracy (%)": "score.accuracy",
            "most frequent class, held out (%)": "of.baseline",
            "shuffled labels (%)": "score.shuffled.value",
            "classes": lambda row: len(row["of"].classes),
            "training prompts": "of.train",
            "held-out prompts": "of.test",
        }
        tokens = {key: _token(result, items) for key, items in by_token.items()}
        variables: dict[str, Any] = {
            "charts": {name: _by_token(result, items) for name, items in by_variable.items()},
            "choice": "variable",
            "table": table_of(["token", "task", "variable", "site"], rows, columns),
        }
        together = {"charts": tokens, "choice": "token and task"}
        return [
            self.panel("probing", result, shown=together, margin=MARGIN),
            self.panel("probing-variables", result, shown=variables, meanings=meanings),
        ]


def _plain(prompts: PromptSet) -> bool:
    """Whether these are prompts about two names with nothing before them."""
    return isinstance(prompts, IOIPrompts) and not any(prompts.data.prefixes)


def _positions(train: PromptSet, test: PromptSet) -> list[str]:
    """Tokens to read at: the marked one and the last, once where they are the same."""
    if isinstance(train, IOIPrompts):
        return ["S2", "END"]
    same = all(torch.equal(half.position, half.end) for half in (train, test))
    return ["end"] if same else ["mark", "end"]


def _sites(task: Task, variable: Variable, sites: list[str]) -> tuple[list[str], list[str]]:
    """Where a variable is probed, and where its shuffled labels are too."""
    few = evenly(sites, MOST_SITES)
    return sites if variable.name == label_name(task.train) else few, evenly(few, CONTROL_SITES)


def _scores(
    variable: Variable,
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    sites: Sequence[str],
    control: Sequence[str],
    order: Tensor,
    advance: Advance,
) -> list[ProbeScore]:
    """Fit and score the probes of one variable; ``order`` shuffles the control's labels."""
    problems = {}
    for site in sites:
        x = _rows(train[site], variable.train_rows)
        problems[site, False] = x, variable.train_labels
        if site in control:
            problems[site, True] = x, variable.train_labels[order]
    probes = LinearProbe.fit_many(problems, tolerance=TOLERANCE, advance=advance)
    shares = {}
    for (site, shuffled), probe in probes.items():
        said = probe(_rows(test[site], variable.test_rows)).argmax(-1).cpu()
        shares[site, shuffled] = Estimate.share(said == variable.test_labels)
    return [ProbeScore(site, shares[site, False], shares.get((site, True))) for site in sites]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the activations, without a copy where that is all of them."""
    return x if len(rows) == len(x) else x[rows.to(x.device)]


def _called(result: ProbingResult, position: str) -> str:
    """A token in words."""
    words = result.words
    return {"mark": words.position, "end": words.end}.get(position, position)


def _verdict(items: list[VariableScores]) -> str:
    """In which versions of the task a variable is readable."""
    yes, no = (
        [task_in_words(item.task) for item in items if item.readable is wanted]
        for wanted in (True, False)
    )
    parts = [f"readable {' and '.join(yes)}"] if yes else []
    parts += [f"not readable {' or '.join(no)}"] if no else []
    return " but ".join(part.strip() for part in parts)


def _bests(items: list[VariableScores]) -> str:
    best = " and ".join(
        f"{percent(item.best, 0)} {task_in_words(item.task)}".strip() for item in items
    )
    return f"{best}; guessing {' and '.join(percent(item.baseline, 0) for item in items)}"


def _token(result: ProbingResult, items: list[VariableScores]) -> Chart:
    """All variables at one token in one version of the task."""
    order, in_clause, marks = list(MEANINGS), _SAME_WITHOUT_PREFIX.values(), []
    for item in items:
        looks = look(order.index(item.variable) if item.variable in order else 0)
        looks |= {"dash": "dash" if item.variable in in_clause else "solid", "scale": 100}
        sites, accuracies = zip(*((one.site, one.accuracy) for one in item.scores), strict=True)
        marks.append(marks_of(item.variable, sites, accuracies, **looks))
    return Chart([by_site(marks, y_title=_ACCURACY, places=result.sites)])


def _by_token(result: ProbingResult, items: list[VariableScores]) -> Chart:
    """One variable beside its controls, a pane a token."""
    panes = [
        _pane(result, here, f"at {_called(result, position)}")
        for position, here in grouped(items, lambda item: item.position).items()
    ]
    return Chart(panes, columns=len(panes))


def _pane(result: ProbingResult, items: list[VariableScores], title: str) -> Pane:
    """One variable at one token, a curve a version of the task, with its controls."""
    tasks = list(dict.fromkeys(item.task for item in result.variables))
    marks: list[Marks] = []
    rules = []
    for item in items:
        task, colours = task_in_words(item.task), look(tasks.index(item.task))
        sites = [score.site for score in item.scores]
        about = f"{len(item.classes)} classes, guessing {percent(item.baseline)}"
        accuracies = [score.accuracy for score in item.scores]
        notes = [f"{about}, {item.test} prompts"] * len(sites)
        own, crosses = {**colours, "notes": notes}, colours | {"marker": "cross", "kind": "points"}
        marks.append(marks_of(task or "probe", sites, accuracies, scale=100, **own))
        shuffled = {s.site: s.shuffled.value for s in item.scores if s.shuffled is not None}
        label, places = joined("shuffled labels", task), list(shuffled)
        marks.append(marks_of(label, places, shuffled.values(), scale=100, **crosses))
        rules.append(Rule(100 * item.baseline, colour=colours["colour"]))
    return by_site(marks, title, rules=rules, y_title=_ACCURACY, places=result.sites)


PART = Probing()
