"""LRQP beside other edits: the league table of :mod:`~lrqp_torch.study.league` and what it says.

All sentences are made from the numbers alone; "clearly" means beyond a 95 % interval.
"""

from collections.abc import Sequence
from functools import partial
from textwrap import fill
from typing import Any, NamedTuple

from lrqp_torch.plot import chart
from lrqp_torch.plot.chart import (
    Band,
    Chart,
    Dash,
    Marker,
    Marks,
    Pane,
    Panel,
    Rule,
    Table,
    marks_of,
)
from lrqp_torch.study import league
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.league import (
    DIVERGENCE,
    REST,
    UNSELECTIVE,
    CompareResult,
    Curve,
    CurvePoint,
    MethodResult,
    SiteComparison,
)
from lrqp_torch.study.methods import DOSED, FITTED, LEARNED, NOTHING, OWN, RANDOM
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.showing import UNKNOWN, Reading, panel, percent, reads, said, table_of

OFTEN_SAID = 0.2
"""With more probability than this on the answers elsewhere, KL there is the effect itself."""

LEAST_SHOWN = 1e-5
"""Side effects below this are drawn at this; the axis is logarithmic."""


class Measure(NamedTuple):
    """One column of the table."""

    title: str  # with units and the task's words in braces
    path: str  # where a method's result has it
    head: str = ""  # among the dots, if it is drawn there; a control's is its measure's

    def of(self, row: MethodResult) -> Estimate | None:
        """The measure of a method; None where it was not built."""
        found: Estimate | None = reads(row, self.path)
        return found

    def known(self, row: MethodResult) -> Estimate:
        """The same, without a value where there is none."""
        return self.of(row) or UNKNOWN

    @property
    def scale(self) -> int:
        """What it is multiplied by where it is drawn."""
        return 100 if "(%)" in self.title else 1


_AT = "at LRQP's effect, relative to LRQP"
_KL = "KL {elsewhere} (nats)"
MEASURES = tuple(
    Measure(*row)
    for row in (
        ("answers flipped (%)", "counterfactual.flipped", "answers flipped (%)"),
        ("answers flipped under control (%)", "control.flipped", "answers flipped (%)"),
        ("mean {preference} ({unit})", "counterfactual.logit_difference"),
        ("mean {preference} under control ({unit})", "control.logit_difference"),
        ("Mahalanobis length", "counterfactual.distance", "Mahalanobis length"),
        ("Euclidean length", "counterfactual.euclidean"),
        ("log odds of the target, independent probe (nats)", "counterfactual.log_odds",
         "log odds, indep. probe (nats)"),
        (_KL, "counterfactual.divergence", _KL),
        ("KL {elsewhere} under control (nats)", "control.divergence", _KL),
        ("KL {elsewhere} beside {answers} (nats)", "counterfactual.rest",
         "KL beside {answers} (nats)"),
        ("KL on {texts} (nats)", "text_divergence", "KL on {texts} (nats)"),
        ("change of attention, IO less S1, of the heads watched", "counterfactual.attention"),
        ("recovered share of the interchange (%)", "counterfactual.recovered", "recovered (%)"),
        ("same answer as the interchange (%)", "counterfactual.agreement", "same answer (%)"),
        ("KL from the interchange at {end} (nats)", "counterfactual.kl_to_interchange"),
        ("completeness", "scores.completeness", "completeness"),
        ("selectivity", "scores.selectivity", "selectivity"),
        ("reliability", "scores.reliability", "reliability"),
        (f"KL {_AT}", f"relative.{DIVERGENCE}"),
        (f"KL beside {{answers}} {_AT}", f"relative.{REST}"),
        (f"1 − selectivity {_AT}", f"relative.{UNSELECTIVE}"),
    )
)  # fmt: skip
"""In the order of the table."""


COSTS = {
    DIVERGENCE: ("KL {elsewhere}", _KL),
    REST: ("the part of that KL beside {answers}", "KL {elsewhere} beside {answers} (nats)"),
    UNSELECTIVE: ("lost selectivity under the independent probes", "1 − selectivity"),
}
"""What side effects are called in a sentence, and at an axis."""


def _look(colour: str, marker: Marker = "circle", dash: Dash = "solid") -> dict[str, Any]:
    return {"colour": colour, "marker": marker, "dash": dash}


GREY = "#999999"
LOOKS = {
    NOTHING: _look(GREY, "cross"),
    RANDOM: _look(GREY, "cross", "dot"),
    FITTED: _look(chart.BLACK, "star"),
    LEARNED: _look(chart.BLACK, "plus", "dash"),
    DOSED: _look(chart.BLACK, "circle", "dot"),
    "euclidean": _look(chart.BLUE),
    "inverse_metric": _look(chart.BLUE, "down", "dash"),
    "mean_difference": _look(chart.ORANGE, "square"),
    "mean_difference_exact": _look(chart.ORANGE, "diamond", "dash"),
    "conditional_mean": _look(chart.ORANGE, "triangle", "dot"),
    "optimal_transport": _look(chart.GREEN),
    "neuron_transport": _look(chart.GREEN, "square", "dash"),
    "leace": _look(chart.PURPLE),
    "alterrep": _look(chart.PURPLE, "square", "dash"),
    "das": _look(chart.VERMILION),
    "das_least": _look(chart.VERMILION, "diamond", "dot"),
    "full_patch": _look(chart.VERMILION, "square", "dash"),
}
"""How methods look in every chart: related ones share a colour, and differ by marker and dash."""


class Compare(Part[CompareResult]):
    """Every way to make the same edit, on the same flip."""

    name = "compare"
    title = "LRQP beside other edits"
    result = CompareResult
    needs = ("flipping", "heads")
    prompts = "reporting"
    by_name_only = True  # it trains edits, which takes as long as all else together
    asks = "answers"

    def missing(self, context: StudyContext, /) -> str | None:
        """Answers, or held-out prompts of a class."""
        test = context.task.test
        few = [k for k in range(len(test.classes)) if int((test.labels == k).sum()) < 2]
        found = f"class {test.classes[few[0]]!r} has fewer than 2 held-out prompts" if few else None
        return super().missing(context) or found

    def work(self, context: StudyContext, /) -> int:
        """See :func:`~lrqp_torch.study.league.work`."""
        return league.work(context)

    def compute(self, given: Given, advance: Advance, /) -> CompareResult:
        """The table at the best site."""
        edits = {given.site: given.edit_at(given.site)}
        options = league.CompareOptions(given.settings.compared)
        heads = given.results.get("heads")
        advance(league.work(given.context) - league.work(given.context, options))
        return league.compute(given.context, edits, heads, options=options, advance=advance)

    def says(self, result: CompareResult, /) -> list[str]:
        """Effect and sum, a site each."""
        sites = result.sites.values()
        return [line for s in sites for line in said(self.name, "says", **_known(result, s))]

    def figures(self, result: CompareResult, /) -> dict[str, Chart]:
        """Curves of effect against side effect, the table as dots, and costs at equal effect."""
        drawn = {}
        for name, site in result.sites.items():
            suffix = f"_{name}" if len(result.sites) > 1 else ""
            drawn[f"compare_pareto{suffix}"] = _pareto(result, site)
            drawn[f"compare_table{suffix}"] = _dots(result, site)
            drawn[f"compare_equal_effect{suffix}"] = _equal_effect(result, site)
        return drawn

    def panels(self, result: CompareResult, /) -> list[Panel]:
        """Two a site: the table with a chart a measure, and the curves with their points."""
        shown = []
        for number, site in enumerate(result.sites.values()):
            measures = [m for m in MEASURES if any(m.of(row) for row in _built(site))]
            charts = {
                _titled(result, m.title): Chart([_measured(result, site, m)]) for m in measures
            }
            planes = {
                _axis(result, cost): Chart([_plane(result, site, cost, intervals=True)])
                for cost in site.costs
            }
            every = {"charts": charts, "choice": "measure", "table": _table(result, site)}
            curves = {"charts": planes, "choice": "side effect", "table": _points(result, site)}
            known = _known(result, site)
            shown += [
                panel(self.name, f"compare-{number}", shown=every, **known),
                panel(self.name, f"compare-pareto-{number}", shown=curves, **known),
            ]
        return shown


# ---- in words ------------------------------------------------------------------------------------


def reading(result: CompareResult, site: SiteComparison) -> list[str]:
    """Sentences on one site: effect, belief, cost of the same effect, the front, and the sum."""
    return said("compare", "reading", **_known(result, site))


def _known(result: CompareResult, site: SiteComparison) -> dict[str, Any]:
    """What words on one site are made from."""
    fitted, rivals = site.method(FITTED), _rivals(site)
    done = {row.name: row.counterfactual for row in _built(site)}
    scored = [row for row in (fitted, *rivals) if row.scores.get("reliability") is not None]
    scored.sort(key=lambda row: -reads(row, "scores.reliability").known)
    learned = (("Learned LRQP", done.get(LEARNED)), ("DAS", done.get("das")))

    def above(rows: Sequence[MethodResult], path: str) -> list[MethodResult]:
        """Those of the rows that lie clearly above LRQP."""
        return [row for row in rows if _above(reads(row, path), reads(fitted, path))]

    def below(rows: Sequence[MethodResult], path: str) -> list[MethodResult]:
        return [row for row in rows if _above(reads(fitted, path), reads(row, path))]

    return {
        "result": result,
        "site": site,
        "rivals": rivals,
        "above": above,
        "below": below,
        "scored": scored,
        "place": 1 + scored.index(fitted) if fitted in scored else None,
        "learned": [(title, effect) for title, effect in learned if effect is not None],
        "compared": partial(_compared, site),
        "front": partial(_front, site),
        "side": lambda cost: _titled(result, COSTS[cost][0]),
        "read": [score.variable for score in site.oracles[1:] if score.readable],
        "often": OFTEN_SAID,
    }


def _titled(result: CompareResult, title: str) -> str:
    more = {"elsewhere": result.elsewhere, "texts": result.texts}
    return title.format(**vars(result.words) | more)


def _axis(result: CompareResult, cost: str) -> str:
    """A side effect at an axis."""
    return _titled(result, COSTS[cost][1])


def _built(site: SiteComparison) -> list[MethodResult]:
    return [row for row in site.methods if row.counterfactual is not None]


def _rivals(site: SiteComparison) -> list[MethodResult]:
    """Methods that write or erase the variable, other than LRQP in any form."""
    return [row for row in _built(site) if row.name not in (*OWN, NOTHING, RANDOM)]


def _above(first: Estimate, second: Estimate) -> bool:
    """Whether one estimate lies clearly above another."""
    return first.lower is not None and second.upper is not None and first.lower > second.upper


def _compared(site: SiteComparison, cost: str) -> dict[str, list[str]]:
    """Rivals that pay clearly less, clearly more, neither, or do not reach LRQP's effect."""
    found: dict[str, list[str]] = {"less": [], "more": [], "equal": [], "never": []}
    for row in _rivals(site):
        ratio = row.relative.get(cost)
        if ratio is None or ratio.lower is None or ratio.upper is None:
            found["never"].append(row.title)
        elif ratio.lower <= 1 <= ratio.upper:
            found["equal"].append(row.title)
        else:
            which = "less" if ratio.upper < 1 else "more"
            found[which].append(f"{row.title} ({ratio.known:.2f} times)")
    return found


def _front(site: SiteComparison, cost: str) -> dict[str, Any]:
    """How many curves are on the Pareto front of a side effect, and what beats LRQP in both."""
    own = next(curve for curve in site.curves if curve.name == FITTED)
    at_one = next(point for point in own.points if point.dose == 1)

    def beats(point: CurvePoint) -> bool:
        cheaper = point.costs[cost].known < at_one.costs[cost].known
        return cheaper and point.effect.known >= at_one.effect.known

    others = [(c, point) for c in site.curves if c.name not in OWN for point in c.points]
    return {
        "held": sum(point.optimal[cost] for point in own.points),
        "strengths": len(own.points),
        "touch": sum(any(point.optimal[cost] for point in c.points) for c in site.curves),
        "beaten": [f"{c.title} ({c.dose} {point.dose:g})" for c, point in others if beats(point)],
    }


# ---- tables --------------------------------------------------------------------------------------


def _table(result: CompareResult, site: SiteComparison) -> Table:
    columns: dict[str, Reading] = {_titled(result, m.title): m.known for m in MEASURES}
    columns |= {
        "time a prompt (µs)": lambda row: None if row.seconds is None else 1e6 * row.seconds,
        "notes": lambda row: row.problem or row.settings or None,
    }
    return table_of(["method"], (([row.title], row) for row in site.methods), columns)


def _points(result: CompareResult, site: SiteComparison) -> Table:
    rows = [
        ((curve.title, f"{curve.dose} {point.dose:g}"), point)
        for curve in site.curves
        for point in curve.points
    ]
    effect = _titled(result, "fall of {preference} ({unit})")
    columns: dict[str, Reading] = {effect: "effect", "flipped (%)": "flipped"}
    for cost in site.costs:
        title = _axis(result, cost)
        columns[title] = f"costs.{cost}"
        columns[f"on the front of {title.removesuffix(' (nats)')}"] = f"optimal.{cost}"
    return table_of(["method", "dose"], rows, columns)


# ---- charts --------------------------------------------------------------------------------------


def _pareto(result: CompareResult, site: SiteComparison) -> Chart:
    return Chart(
        [_plane(result, site, cost) for cost in site.costs],
        f"Effect against side effect at {site.site}, {result.position}",
        "Each method at rising strength (large: strength 1); shaded: beaten by the Pareto front",
        columns=len(site.costs),
        share_y=True,
    )


def _plane(
    result: CompareResult, site: SiteComparison, cost: str, *, intervals: bool = False
) -> Pane:
    def x(point: CurvePoint) -> float:
        return max(point.costs[cost].known, LEAST_SHOWN)

    def marks(curve: Curve, points: Sequence[CurvePoint], **looks: Any) -> Marks:
        flips = ["" if p.flipped is None else f", {percent(p.flipped, 0)} flipped" for p in points]
        across = [p.costs[cost] for p in points] if intervals else []
        return marks_of(
            curve.title,
            [x(p) for p in points],
            [p.effect if intervals else p.effect.value for p in points],
            x_lower=[max(c.lower or 0.0, LEAST_SHOWN) for c in across] or None,
            x_upper=[c.upper for c in across] or None,
            texts=[f"{curve.dose} {p.dose:g}{f}" for p, f in zip(points, flips, strict=True)],
            **LOOKS.get(curve.name, _look(GREY)),
            **looks,
        )

    every = [point for curve in site.curves for point in curve.points]
    best = sorted((x(p), p.effect.known) for p in every if p.optimal[cost])
    # A random direction has next to no effect, and would take most of a logarithmic axis.
    moving = [p for c in site.curves if c.name != RANDOM for p in c.points] or every
    right, most = 1.3 * max(x(p) for p in every), max(p.effect.known for p in every)
    steps = [*best, (right, best[-1][1])]
    looks: dict[str, Any] = {"kind": "steps", "colour": chart.NOTE, "opacity": 0.12}
    places, effects = zip(*steps, strict=True)
    drawn = [Marks("beaten", places, effects, legend=False, **looks)]
    for curve in site.curves:
        drawn.append(marks(curve, curve.points, stroke=1.8 if curve.name == FITTED else 1.0))
    for curve in (curve for curve in site.curves if curve.dose == "strength"):
        plain = [point for point in curve.points if point.dose == 1]
        size = 2.4 if curve.name == FITTED else 1.8
        drawn += [marks(curve, [p], kind="points", size=size, legend=False) for p in plain]
    return Pane(
        drawn,
        x_title=f"side effect: {_axis(result, cost)}",
        y_title=_titled(result, "effect: mean fall of {preference} ({unit})"),
        x_range=(0.7 * min(map(x, moving)), right),
        y_range=(-0.03 * most, 1.05 * most),
        x_log=True,
    )


def _dots(result: CompareResult, site: SiteComparison) -> Chart:
    rows = _built(site)
    conditions = (("counterfactual edit", chart.COUNTERFACTUAL), ("control edit", chart.CONTROL))

    def marks(index: int, measure: Measure) -> Marks:
        name, colour = conditions[index]
        looks: dict[str, Any] = {"colour": colour, "filled": not index, "shift": 0.2 * index}
        names, values = [row.title for row in rows], map(measure.of, rows)
        return marks_of(name, names, values, scale=measure.scale, kind="points", **looks)

    heads = [m.head for m in MEASURES if m.head and any(map(m.of, rows))]
    panes = []
    for head in dict.fromkeys(heads):
        drawn = [marks(*both) for both in enumerate(m for m in MEASURES if m.head == head)]
        zero, title = [Rule(0.0, colour=chart.INK, dash="solid")], fill(_titled(result, head), 16)
        panes.append(_by_method(site, drawn, title=title, rules=zero))
    title = f"The same flip by every method, at {site.site}, {result.position}"
    on = f"on {site.prompts} held-out prompts"
    return Chart(panes, f"{title}, {on}", columns=len(panes), share_y=True)


def _measured(result: CompareResult, site: SiteComparison, measure: Measure) -> Pane:
    own, scale = measure.of(site.method(FITTED)), measure.scale
    looks: dict[str, Any] = {"kind": "points", "legend": False, "scale": scale}
    marks = [
        marks_of(row.title, [row.title], [value], **looks, **LOOKS[row.name])
        for row in _built(site)
        if (value := measure.of(row))
    ]
    rules = [Rule(scale * own.known)] if own and own.value is not None else []
    return _by_method(site, marks, y_title=_titled(result, measure.title), rules=rules)


def _equal_effect(result: CompareResult, site: SiteComparison) -> Chart:
    def marks(row: MethodResult, ratio: Estimate | None) -> Marks:
        looks: dict[str, Any] = {"kind": "points", "colour": LOOKS[row.name]["colour"]}
        looks |= {"marker": "circle", "labels": [""]} if ratio else {
            "marker": "none", "labels": ["does not reach it"]
        }  # fmt: skip
        return marks_of(row.title, [row.title], [ratio or 1.0], legend=False, **looks)

    panes = []
    for cost in site.costs:
        found = [(r, r.relative[cost]) for r in site.methods if r.relative and r.name != FITTED]
        known = [end for _, ratio in found if ratio for end in ratio.interval or ()]
        # Differences of a few per cent should look like that.
        low = min([0.5, *(0.95 * end for end in known)])
        high = max([2.0, *(1.05 * end for end in known)])
        panes.append(
            _by_method(
                site,
                [marks(*pair) for pair in found],
                title=fill(_axis(result, cost).removesuffix(" (nats)"), 30),
                y_title="times LRQP's",
                y_range=(low, high),
                y_log=True,
                rules=[Rule(1.0, colour=chart.INK, dash="solid")],
            )
        )
    title = f"Side effect at the same effect as LRQP, at {site.site}, {result.position}"
    less = "(left of 1: less than LRQP)"
    return Chart(panes, f"{title} {less}", columns=len(panes), share_y=True)


def _by_method(site: SiteComparison, marks: Sequence[Marks], **pane: Any) -> Pane:
    """Methods down the side, LRQP's row shaded."""
    own = site.method(FITTED).title
    here = any(own in mark.x for mark in marks)
    return Pane(marks, bands=[Band(own, own, chart.NOTE)] if here else (), horizontal=True, **pane)


PART = Compare()
