"""Several variables of one token: each alone, each with the others kept, and all together.

What a token tells the rest of the model may be more than one variable. At each site a probe is
fitted for every one of them, and :class:`~lrqp_torch.edits.joint.JointLRQP` writes any set of them
in one least edit. Each set is held against its own interchange: the activation of a twin prompt
that differs in these variables alone. Where the effects of single edits add up to that of all, the
variables are read apart; where together they do what the whole activation of the twin does, nothing
else that the token tells is read.

At the best site the same is written in other ways: by class means, added; by a full patch; by DAS,
a subspace trained on the answers to be exchanged with the twin's; and by what that subspace reads
of the twin, written by the least edit.

A variable of K > 2 classes is written to each of the K − 1 others in turn.

Sources: interchange interventions, Geiger et al. 2021, arXiv 2106.02997; edits beyond their own
patch, Makelov et al. 2023, arXiv 2311.17030.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lrqp_torch.plot.chart import Chart, Pane, Panel, Table
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.joint import (
    CLASS,
    COPIES,
    METHODS,
    Additivity,
    JointStudy,
    MethodRow,
    sets_of,
)
from lrqp_torch.study.league import elsewhere
from lrqp_torch.study.methods import Training
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.prompts import Words
from lrqp_torch.study.results import StudyResults, VariableResult, told
from lrqp_torch.study.showing import Reading, between, by_site, curves, reads, table_of


@dataclass(frozen=True)
class JointResult:
    """Several variables, or one of many classes, at every site."""

    words: Words  # what the things of the task are called
    variables: dict[str, list[str]]  # name to its classes, the class first
    prompts: int  # held-out prompts; those of which a class is known that has training prompts
    left_out: int  # the others
    site: str  # where :attr:`methods` are compared
    elsewhere: str  # the tokens at which nothing should change
    additive: dict[str, Additivity]  # by site; empty for one variable
    methods: list[MethodRow]  # rows of the table; empty for prompts without answers or twins
    # Site to variable, and ``all``, to what its edits do.
    sites: dict[str, dict[str, VariableResult]] = field(default_factory=dict)

    def row(self, variables: str, method: str) -> MethodRow | None:
        """A row of the table."""
        found = (r for r in self.methods if (r.variables, r.method) == (variables, method))
        return next(found, None)


class Joint(Part[JointResult]):
    """Edits of every set of variables at every site.

    Args:
        training: of the edits that are trained.
    """

    name = "joint"
    title = "Several variables at once"
    result = JointResult
    needs = ("flipping",)

    def __init__(self, training: Training | None = None) -> None:
        self.training = training or Training(prompts=128, epochs=12)

    def missing(self, context: StudyContext, /) -> str | None:
        """Whether there is more than what the sweep does."""
        if len(context.variables) > 1 or len(context.task.test.classes) > 2:
            return None
        return (
            "they have one variable of two classes, which the sweep edits; name several with "
            "--variables order,identity, or of your own prompts with --label COLUMN,COLUMN"
        )

    def work(self, context: StudyContext, /) -> int:
        """Runs of the held-out prompts, and methods."""
        sets = len(sets_of(context.variables or (CLASS,)))
        runs = 1 + COPIES * sets * len(context.sites) + len(METHODS) * sets
        return runs * len(context.task.test)

    @torch.no_grad()
    def compute(self, given: Given, advance: Advance, /) -> JointResult:
        """Write every set of variables at every site, and at the best one in other ways.

        Raises:
            PromptError: a variable of which no two classes have training prompts.
        """
        done, total = 0, self.work(given.context)

        def counted(count: int) -> None:
            nonlocal done
            count = min(count, total - done)
            done += count
            advance(count)

        study = JointStudy(given)
        flats = study.run(counted)
        sites = {site: study.summary(site, flats) for site in given.context.sites}
        rows = study.compare(given.site, self.training, counted)
        advance(total - done)
        return JointResult(
            words=given.context.task.test.words,
            variables={name: v.classes for name, v in study.variables.items()},
            prompts=len(study.data),
            left_out=len(given.context.task.test) - len(study.data),
            site=given.site,
            elsewhere=elsewhere(study.data)[1],
            additive={site: study.additive(site, flats) for site in sites if len(study.sets) > 1},
            methods=rows,
            sites=sites,
        )

    def found(self, study: StudyResults, /) -> JointResult | None:
        """See :meth:`Part.found`; what is known of each site is with the sites."""
        if self.name not in study.parts:
            return None
        result: JointResult = self.read(study.parts[self.name])
        sites = {name: told(site.variables) for name, site in study.sites.items()}
        here = sites.get(result.site, {})
        rows = [told(r, r.variables not in here or here[r.variables].clearly_flips)
                for r in result.methods]  # fmt: skip
        return replace(result, sites=sites, methods=rows)

    def figures(self, result: JointResult, /) -> dict[str, Chart]:
        """What flips at each site."""
        title = f"What each variable at {result.words.position} does, and all together"
        return {"joint": Chart(_panes(result), title)} if _panes(result) else {}

    def panels(self, result: JointResult, /) -> list[Panel]:
        """Edits and interchanges by site, the table of methods, and results by target."""
        if not result.sites:
            return []
        charts = {"": Chart(_panes(result), share_x=True)} if _panes(result) else {}
        shown: dict[str, dict[str, Any]] = {
            "joint": {"charts": charts, "table": _sites_table(result)}
        }
        if result.methods:
            columns: dict[str, Reading] = {
                "flipped (%)": "flipped",
                result.words.preference: "logit_difference",
                "recovered (%)": "recovered",
                "same answer as the patch (%)": "agreement",
                f"KL to the patch at {result.words.end} (nats)": "kl_to_interchange",
                f"KL {result.elsewhere} (nats)": "divergence",
                "length, sd": "distance",
                "odds asked for reached (%)": "reached",
                "off these odds (nats)": "astray",
                "beyond its own patch": lambda row: row.beyond or "",
                "trained": "settings",
            }
            rows = (((row.variables, row.title), row) for row in result.methods)
            shown["joint-methods"] = {"table": table_of(["written", "by"], rows, columns)}
        targets = [
            ((site, name, target), one)
            for (site, name), found in _by_variable(result)
            for target, one in found.by_target.items()
        ]
        if targets:
            columns = {
                "prompts": "prompts",
                "flipped (%)": "flipped",
                result.words.preference: "logit_difference",
                "length, sd": "distance",
            }
            table = table_of(["site", "variable", "written"], targets, columns)
            shown["joint-targets"] = {"table": table}
        return [self.panel(name, result, shown=own) for name, own in shown.items()]


def _panes(result: JointResult) -> list[Pane]:
    first = next(iter(result.sites.values()), {})
    if not first or any(v.counterfactual.flipped is None for v in first.values()):
        return []

    def pane(title: str, path: str) -> Pane:
        series = {n: {site: v[n] for site, v in result.sites.items()} for n in first}
        shown = [m for m in curves(series, path) if any(y is not None for y in m.y)]
        return by_site(shown, title, y_range=None)

    flips = pane("answers flipped", "counterfactual.flipped")
    return [flips, pane("recovered of its interchange", "recovered")]


def _by_variable(result: JointResult) -> Iterable[tuple[tuple[str, str], VariableResult]]:
    for site, variables in result.sites.items():
        yield from (((site, name), found) for name, found in variables.items())


def _sites_table(result: JointResult) -> Table:
    rows = [(keys, {"added": result.additive.get(keys[0]), **vars(found)})
            for keys, found in _by_variable(result)]  # fmt: skip
    columns: dict[str, Reading] = {"probe accuracy (%)": "probe_accuracy"}
    if any(reads(found, "counterfactual.flipped") for _, found in rows):
        columns |= {
            "flipped (%)": "counterfactual.flipped",
            "flipped, others kept (%)": "kept.edit.flipped",
            "flipped by the twin (%)": "interchange.flipped",
            "recovered (%)": "recovered",
            "recovered, others kept (%)": "kept.recovered",
        }
    columns |= {
        "KL to the twin (nats)": "kl_to_interchange",
        "KL to the twin, others kept (nats)": "kept.kl_to_interchange",
        "length, sd": "counterfactual.distance",
        "length of the twin's, sd": "interchange.distance",
        "sum of single effects over that of all": lambda found: (
            between(found["added"].edits) if reads(found, "added.edits") else ""
        ),
    }
    return table_of(["site", "written"], rows, columns)


PART = Joint()
