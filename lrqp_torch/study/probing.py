"""What can be read at S2 and at END: the order, where the names stand, and which they are.

A linear probe is fitted to the clean activations of the training prompts for each variable, and
its accuracy measured on held-out ones, with Wilson 95 % intervals. Beside it stand the accuracy of
always guessing the class that is most frequent among the held-out prompts, and that of a probe
fitted to shuffled labels.

Source: the post "Intervening in the Residual Stream" (2023), which found that the positions of S1
and IO can be read without a prefix but not with one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lrqp_torch.probes.linear import LinearProbe
from lrqp_torch.study import probing_figures, probing_panels
from lrqp_torch.study.context import Advance, StudyContext, Task, evenly, no_progress
from lrqp_torch.study.estimates import wilson
from lrqp_torch.study.panel import Panel
from lrqp_torch.study.variables import (
    CLAUSE_IO,
    CLAUSE_S1,
    ORDER,
    POSITION_IO,
    POSITION_S1,
    Variable,
    variables_of,
)

POSITIONS = ("S2", "END")
MARGIN = 0.1
"""A variable counts as readable where the interval lies above the baseline by more than this."""

MOST_SITES, CONTROL_SITES = 12, 6
TOLERANCE = 1e-4
"""Relative gradient norm of the probes: accuracies do not move below it, and it halves the time."""

_SAME_WITHOUT_PREFIX = {POSITION_S1: CLAUSE_S1, POSITION_IO: CLAUSE_IO}


@dataclass(frozen=True)
class ProbeScore:
    """One probe on held-out prompts.

    Attributes:
        site: where it reads.
        accuracy: share of held-out prompts whose class it names.
        lower: lower end of the Wilson 95 % interval.
        upper: upper end.
        shuffled: accuracy of a probe fitted to shuffled labels; None where it was not fitted.
    """

    site: str
    accuracy: float
    lower: float
    upper: float
    shuffled: float | None


@dataclass(frozen=True)
class VariableScores:
    """One variable, read at one token in one task.

    Attributes:
        task: ``"plain"`` or ``"prefixed"``.
        position: ``"S2"`` or ``"END"``.
        variable: one of :data:`lrqp_torch.study.variables.VARIABLES`.
        classes: names of the classes.
        train: training prompts that have a class.
        test: held-out prompts that have one.
        baseline: share of the most frequent class among these held-out prompts.
        scores: by site, in order of computation.
    """

    task: str
    position: str
    variable: str
    classes: list[str]
    train: int
    test: int
    baseline: float
    scores: list[ProbeScore]

    @property
    def best(self) -> ProbeScore:
        """The score with the highest accuracy, the first among equals."""
        return max(self.scores, key=lambda score: score.accuracy)

    @property
    def readable(self) -> bool:
        """Whether any site's interval lies above the baseline by more than :data:`MARGIN`."""
        return any(score.lower > self.baseline + MARGIN for score in self.scores)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Read back what ``dataclasses.asdict`` made."""
        return cls(**(raw | {"scores": [ProbeScore(**score) for score in raw["scores"]]}))


@dataclass(frozen=True)
class ProbingResult:
    """All probes.

    Attributes:
        sites: every site of the study; all are probed for the order, some for the rest.
        names: how many names were told apart at most.
        bins: into how many ranges positions were cut at most.
        variables: one entry a task, position and variable.
    """

    sites: list[str]
    names: int
    bins: int
    variables: list[VariableScores]

    def find(self, task: str, position: str, variable: str) -> VariableScores | None:
        """The entry of a task, a position and a variable; None if it was not probed."""
        wanted = (task, position, variable)
        found = (v for v in self.variables if (v.task, v.position, v.variable) == wanted)
        return next(found, None)


def from_json(raw: dict[str, Any]) -> ProbingResult:
    """Read back what ``dataclasses.asdict`` made of a result."""
    variables = [VariableScores.from_json(variable) for variable in raw["variables"]]
    return ProbingResult(**(raw | {"variables": variables}))


def work(context: StudyContext, /, *, names: int = 20, bins: int = 8) -> int:
    """Units that :func:`compute` advances: prompts to capture, and probes to fit."""
    units = 0
    for task in context.tasks:
        probed, _ = _split(task, context, names, bins)
        fits = sum(
            len(_sites(variable.name, context.sites)) + len(_control_sites(context.sites))
            for variable in probed
        )
        units += len(POSITIONS) * (len(task) + fits)
    return units


def compute(
    context: StudyContext, *, names: int = 20, bins: int = 8, advance: Advance = no_progress
) -> ProbingResult:
    """Probe every variable at S2 and END in each task.

    The order is probed at every site, the other variables at twelve sites evenly spaced, and
    shuffled labels at six.

    Args:
        context: model and prompts.
        names: how many names are told apart at most, the most frequent in the training prompts;
            prompts with others are left out of the probes of names.
        bins: into how many ranges positions are cut at most.
        advance: called after each batch captured, and with the number of probes fitted.

    Raises:
        ConvergenceError: a probe did not converge.
    """
    generator = context.generator()
    entries = []
    for task in context.tasks:
        probed, repeated = _split(task, context, names, bins)
        for position in POSITIONS:
            train, test = context.clean(task, position, advance)
            for variable in probed:
                order = torch.randperm(len(variable.train_rows), generator=generator)
                scores = _scores(variable, train, test, context.sites, order, advance)
                entry = VariableScores(
                    task=task.name,
                    position=position,
                    variable=variable.name,
                    classes=variable.classes,
                    train=len(variable.train_rows),
                    test=len(variable.test_rows),
                    baseline=variable.baseline,
                    scores=scores,
                )
                entries.append(entry)
                if variable.name in repeated:
                    entries.append(replace(entry, variable=repeated[variable.name]))
    return ProbingResult(list(context.sites), names, bins, entries)


def findings(result: ProbingResult) -> list[str]:
    """Which variables can be read where, in sentences made from the numbers."""
    return probing_panels.findings(result)


def draw(result: ProbingResult, folder: Path) -> list[Path]:
    """Write the accuracies by site, one figure a token with a pane a variable."""
    return probing_figures.draw(result, folder)


def panels(result: ProbingResult) -> list[Panel]:
    """Charts by token and task, charts by variable, and a table of all probes."""
    return probing_panels.panels(result)


def _sites(variable: str, sites: Sequence[str]) -> list[str]:
    return list(sites) if variable == ORDER else evenly(sites, MOST_SITES)


def _control_sites(sites: Sequence[str]) -> list[str]:
    return evenly(evenly(sites, MOST_SITES), CONTROL_SITES)


def _split(
    task: Task, context: StudyContext, names: int, bins: int
) -> tuple[list[Variable], dict[str, str]]:
    """Variables to probe, and which of them stand for a second one that is the same here."""
    plain = next((t for t in context.tasks if not any(t.train.data.prefixes)), None)
    made = variables_of(task, plain, names=names, bins=bins)
    if task is not plain:
        return made, {}
    # Where words differ in length, the position in the clause is that of the template; without
    # a prefix the true position is the better answer to the same question.
    probed = [v for v in made if v.name not in _SAME_WITHOUT_PREFIX.values()]
    return probed, _SAME_WITHOUT_PREFIX


def _scores(
    variable: Variable,
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    sites: Sequence[str],
    order: Tensor,
    advance: Advance,
) -> list[ProbeScore]:
    """Fit and score the probes of one variable; ``order`` shuffles the control's labels."""
    shuffled = variable.train_labels[order]
    control, problems = set(_control_sites(sites)), {}
    for site in _sites(variable.name, sites):
        x = _rows(train[site], variable.train_rows)
        problems[site, False] = x, variable.train_labels
        if site in control:
            problems[site, True] = x, shuffled
    probes = LinearProbe.fit_many(problems, tolerance=TOLERANCE, advance=advance)
    n = len(variable.test_labels)
    scores = []
    for site in _sites(variable.name, sites):
        held_out = _rows(test[site], variable.test_rows)
        right, *by_chance = (
            int((probes[site, wrong](held_out).argmax(-1).cpu() == variable.test_labels).sum())
            for wrong in (False, True)
            if (site, wrong) in probes
        )
        lower, upper = wilson(right, n)
        share = by_chance[0] / n if by_chance else None
        scores.append(ProbeScore(site, right / n, lower, upper, share))
    return scores


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the activations, without a copy where that is all of them."""
    return x if len(rows) == len(x) else x[rows.to(x.device)]
