"""What the table says of LRQP, for it or against it, in words made from the figures alone."""

from collections.abc import Sequence

from lrqp_torch.study.compare.methods import FITTED, LEARNED, NOTHING
from lrqp_torch.study.compare.result import (
    DIVERGENCE,
    REST,
    UNSELECTIVE,
    MethodResult,
    SiteComparison,
)
from lrqp_torch.study.compare.variants import DosedLRQP
from lrqp_torch.study.drawing import signed

OWN = (FITTED, LEARNED, DosedLRQP.name)
SIDES = {
    DIVERGENCE: "KL at the tokens between S2 and END",
    REST: "the part of that KL beside the two names",
    UNSELECTIVE: "lost selectivity under the independent probes",
}
OFTEN_SAID = 0.2
"""With more probability than this on the two names elsewhere, KL there is the effect itself."""


def reading(site: SiteComparison) -> list[str]:
    """Sentences on one site: effect, belief, cost of the same effect, the front, and the sum."""
    lines = [_effects(site), _reliability(site), _learned(site)]
    lines += [_costs(site, cost) for cost in site.curves[0].points[0].costs]
    lines += [_front(site), _verdict(site), *_cautions(site)]
    return [line for line in lines if line]


def _rivals(site: SiteComparison) -> list[MethodResult]:
    """Methods that write or erase the variable, other than LRQP in any form."""
    names = (*OWN, NOTHING, "random")
    return [row for row in site.methods if row.counterfactual is not None and row.name not in names]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _effects(site: SiteComparison) -> str:
    own = site.method(FITTED)
    assert own.counterfactual is not None and own.control is not None
    mine, idle = own.counterfactual.flipped, own.control.flipped
    if mine is None or idle is None:
        return "The model answers no held-out prompt with IO, so no answer can flip."
    found = [(r, r.counterfactual.flipped) for r in _rivals(site) if r.counterfactual]
    more = [r.title for r, f in found if f is not None and f.lower > mine.upper]
    fewer = [r.title for r, f in found if f is not None and f.upper < mine.lower]
    accidents = [
        f"{r.title} {100 * r.control.flipped.value:.0f} %"
        for r in _rivals(site)
        if r.control and r.control.flipped and r.control.flipped.lower > idle.upper
    ]
    return (
        f"Effect at {site.site}: LRQP flips {100 * mine.value:.1f} % of {site.answered} answers "
        f"({100 * mine.lower:.0f} to {100 * mine.upper:.0f}), and {100 * idle.value:.1f} % under "
        f"control. At their own dose these flip clearly more: {_listed(more)}; clearly fewer: "
        f"{_listed(fewer)}; more by accident under control: {_listed(accidents)}."
    )


def _reliability(site: SiteComparison) -> str:
    scored = [(row, row.scores.get("reliability")) for row in [site.method(FITTED), *_rivals(site)]]
    known = sorted(
        ((row, score) for row, score in scored if score is not None),
        key=lambda pair: -pair[1].value,
    )
    if not known:
        return (
            "Reliability: the independent probes read no variable but the order, so none is given."
        )
    own = next(score for row, score in known if row.name == FITTED)
    place = 1 + next(i for i, (row, _) in enumerate(known) if row.name == FITTED)
    clear = [row.title for row, score in known if score.lower > own.upper]
    best, top = known[0]
    return (
        f"Reliability under independent probes: LRQP is number {place} of {len(known)} with "
        f"{own.value:.3f} ({own.lower:.3f} to {own.upper:.3f}); the highest is {best.title} with "
        f"{top.value:.3f}. Clearly above LRQP: {_listed(clear)}."
    )


def _learned(site: SiteComparison) -> str:
    row = next((r for r in site.methods if r.name == LEARNED and r.counterfactual), None)
    das = next((r for r in site.methods if r.name == "das" and r.counterfactual), None)
    if row is None or row.counterfactual is None or row.counterfactual.flipped is None:
        return ""
    words = (
        f"Learned LRQP flips {100 * row.counterfactual.flipped.value:.1f} % with KL "
        f"{row.counterfactual.divergence.value:.3f} between S2 and END"
    )
    if (
        das is not None
        and das.counterfactual is not None
        and das.counterfactual.flipped is not None
    ):
        words += (
            f"; DAS flips {100 * das.counterfactual.flipped.value:.1f} % with KL "
            f"{das.counterfactual.divergence.value:.3f}"
        )
    return words + "."


def _compared(site: SiteComparison, cost: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """Rivals that pay clearly less, clearly more, neither, or do not reach LRQP's effect."""
    less, more, equal, never = [], [], [], []
    for row in _rivals(site):
        ratio = row.relative.get(cost)
        if ratio is None:
            never.append(row.title)
        elif ratio.upper < 1:
            less.append(f"{row.title} ({ratio.value:.2f} times)")
        elif ratio.lower > 1:
            more.append(f"{row.title} ({ratio.value:.2f} times)")
        else:
            equal.append(row.title)
    return less, more, equal, never


def _costs(site: SiteComparison, cost: str) -> str:
    less, more, equal, never = _compared(site, cost)
    return (
        f"At the same effect as LRQP, {SIDES[cost]}: clearly less than LRQP: {_listed(less)}; "
        f"clearly more: {_listed(more)}; not told apart: {_listed(equal)}"
        + (f"; never reach its effect: {_listed(never)}." if never else ".")
    )


def _front(site: SiteComparison) -> str:
    words = []
    for cost in site.curves[0].points[0].costs:
        best = [c for c in site.curves if any(point.optimal[cost] for point in c.points)]
        own = next(curve for curve in site.curves if curve.name == FITTED)
        held = sum(point.optimal[cost] for point in own.points)
        at_one = next(point for point in own.points if point.dose == 1)
        beaten = [
            f"{curve.title} ({curve.dose} {point.dose:g})"
            for curve in site.curves
            if curve.name not in OWN
            for point in curve.points
            if point.effect.value >= at_one.effect.value
            and point.costs[cost].value < at_one.costs[cost].value
        ]
        words.append(
            f"by {SIDES[cost]}, {held} of {len(own.points)} strengths of LRQP are on the front, "
            f"which {len(best)} of {len(site.curves)} curves touch, and LRQP at strength 1 is "
            f"beaten in both by {_listed(beaten)}"
        )
    return f"Pareto front: {'; '.join(words)}."


def _verdict(site: SiteComparison) -> str:
    parts = []
    for cost in site.curves[0].points[0].costs:
        less, more, equal, never = map(len, _compared(site, cost))
        if less == more == 0:
            word = "neither for nor against LRQP"
        elif less == 0:
            word = "in LRQP's favour"
        elif more == 0:
            word = "not in LRQP's favour"
        elif less < more:
            word = "more for LRQP than against it"
        else:
            word = "not more for LRQP than against it"
        parts.append(
            f"{SIDES[cost]}: {word} ({less} clearly better, {more} clearly worse, {equal} not told "
            f"apart, {never} without LRQP's effect)"
        )
    return (
        f"In sum, of {len(_rivals(site))} other methods at the same effect as LRQP, by "
        f"{'; by '.join(parts)}."
    )


def _cautions(site: SiteComparison) -> list[str]:
    lines = []
    if site.said_elsewhere > OFTEN_SAID:
        lines.append(
            f"Caution: between S2 and END the clean model already gives "
            f"{100 * site.said_elsewhere:.0f} % of its probability to the two names, so KL there "
            "is mostly the effect itself and not a side effect; its part beside the names is the "
            "fairer measure here."
        )
    missing = [f"{row.title} ({row.problem})" for row in site.methods if row.problem]
    if missing:
        lines.append(f"Not built: {'; '.join(missing)}.")
    order = site.oracles[0]
    lines.append(
        f"The independent probe reads the order from clean activations with accuracy "
        f"{order.accuracy:.3f}; without an edit the logit difference is {signed(site.clean.value)}."
    )
    return lines
