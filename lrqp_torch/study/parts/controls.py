"""Is the edit an illusion? The controls of :mod:`~lrqp_torch.study.illusions` and what they say."""

from collections.abc import Sequence
from typing import Any

from lrqp_torch.plot import chart
from lrqp_torch.plot.chart import Chart, Marks, Pane, Panel, Rule, Table, marks_of
from lrqp_torch.study import illusions
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.illusions import CARRIES, KINDS, SEPARATED, ControlsResult, EditOutcome, Split
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.showing import (
    UNKNOWN,
    Reading,
    by_site,
    capitalised,
    percent,
    reads,
    signed,
    table_of,
)
from lrqp_torch.study.subspaces import ENERGY

PLACES = {
    "inside": ("part inside the space", chart.COUNTERFACTUAL),
    "outside": ("the rest", chart.CONTROL),
}


class Controls(Part[ControlsResult]):
    """The edit split, moved to other sites, and beside edits that know nothing of the class."""

    name = "controls"
    title = "Is the edit an illusion?"
    question = (
        "An edit can change an answer along a direction that means nothing to the model. Does this "
        "one act through what later parts of the model read, does it act elsewhere too, and what "
        "do edits do that know nothing of what is to be written?"
    )
    result = ControlsResult
    needs = ("flipping", "heads")
    prompts = "reporting"
    asks = "answers"

    def work(self, context: StudyContext, /) -> int:
        """Held-out prompts."""
        return len(context.task.test)

    def compute(self, given: Given, advance: Advance, /) -> ControlsResult:
        """The controls of the edit at the best site."""
        return illusions.compute(
            given.context,
            given.site,
            given.edit_at(given.site),
            given.results.get("heads"),
            l2=given.settings.l2,
            shrinkage=given.settings.shrinkage,
            advance=advance,
        )

    def says(self, result: ControlsResult, /) -> list[str]:
        """Whether the signature is there, and what chance and halves do."""
        readers = [split for split in result.splits if split.reads]
        illusion = [_signature(readers)] if readers and result.counterfactual.effect else []
        return [*illusion, *_chance_findings(result)[-1:], *_half_findings(result)]

    def figures(self, result: ControlsResult, /) -> dict[str, Chart]:
        """Splits of an edit with an effect, other sites where there are any, and chance."""
        drawn = {"controls_chance": _chance_chart(result)}
        if result.counterfactual.effect is not None:
            drawn["controls_splits"] = _split_chart(result)
        if result.elsewhere:
            drawn["controls_sites"] = _site_chart(result)
        return drawn

    def panels(self, result: ControlsResult, /) -> list[Panel]:
        """Splits, other sites, chance, and halves."""
        charts, chance = self.figures(result), [*_chance_findings(result), *_half_findings(result)]
        made = {
            "splits": ("Which part of the edit carries its effect?", _split_findings(result),
                       _split_table(result)),
            "sites": ("The same edit at other sites", _site_findings(result), _site_table(result)),
            "chance": (f"Edits that know nothing of the {result.words.value}, and edits from half "
                       "of the prompts", chance, _chance_table(result)),
        }  # fmt: skip
        return [
            Panel(
                f"controls-{name}",
                title,
                " ".join(lines),
                {"": charts[f"controls_{name}"]} if f"controls_{name}" in charts else {},
                table=table,
            )
            for name, (title, lines, table) in made.items()
            if name != "sites" or result.elsewhere
        ]


# ---- in words ------------------------------------------------------------------------------------


def _split_findings(result: ControlsResult) -> list[str]:
    own, words = result.counterfactual, result.words
    lines = [
        f"The counterfactual edit δ at {result.site}, of mean Mahalanobis length "
        f"{result.distance:.2f}, changes the mean of {words.preference} from "
        f"{signed(result.clean.known)} to {signed(own.logit_difference.known)} {words.unit} and "
        f"flips {percent(own.flipped.value, 0)} of the answers "
        f"(control edit: {percent(result.control.flipped.value, 0)})."
    ]
    if result.interchange is not None and result.recovered is not None:
        lines.append(
            f"That is {percent(result.recovered.value, 0)} of what its interchange, the activation "
            "of a twin, does to the preference."
        )
    if result.beyond:
        lines.append(f"It is beyond its own patch: it {result.beyond}.")
    if result.whole is not None:
        lines.append(
            f"Along its own direction the classes lie {result.whole.separation:.1f} standard "
            f"deviations within a class apart; the edited activations lie "
            f"{result.whole.position:.1f} standard deviations from the mean, the farthest natural "
            f"one {result.whole.farthest:.1f}."
        )
    if result.unread:
        lines.append(f"It was not split by what later parts read: {result.unread}.")
    if own.effect is None:
        lines.append(
            "The 95 % interval of its mean effect includes 0, so there is none of which a part "
            "could carry a share."
        )
        return lines
    readers = [split for split in result.splits if split.reads]
    if readers:
        lines.append(
            "Heads and MLP read the stream through weights that span nearly all of it; a space "
            f"here is that of their leading directions with {100 * ENERGY:.0f} % of the weights' "
            "squared Frobenius norm, norm folded in."
        )
    lines += [_carrier(split) for split in result.splits]
    longest = max(max(s.inside.mahalanobis, s.outside.mahalanobis) for s in result.splits)
    if longest > 1:
        lines.append(
            f"In the metric a part alone is up to {longest:.1f} times as long as the edit: cut in "
            "two, it leaves the paths along which natural activations vary, so its run tells what "
            "is read of the edit and not what the model would meet by itself."
        )
    return [*lines, _signature(readers)] if readers else lines


def _signature(readers: Sequence[Split]) -> str:
    suspect = [split.space for split in readers if split.illusory]
    if suspect:
        return (
            "The illusion's signature is there: the part read carries the effect though the "
            f"classes hardly differ along it (less than {SEPARATED:g} standard deviation), and "
            f"they differ in the part that is not read. Space: {', '.join(suspect)}."
        )
    return (
        "The illusion's signature, a part that carries the effect though the classes hardly differ "
        f"along it (less than {SEPARATED:g} standard deviation) beside one that is not read though "
        "they do, is not there."
    )


def _carrier(split: Split) -> str:
    who = {
        "inside": "the part inside carries the effect",
        "outside": "the rest carries the effect",
        "both": "either part alone would do",
        "neither": "neither part alone carries the effect",
    }[split.carrier]
    inside, outside = (piece.outcome.effect for piece in (split.inside, split.outside))
    assert inside is not None and outside is not None
    return (
        f"{capitalised(split.space)} ({split.dimensions} of {split.width} dimensions, "
        f"{percent(split.inside.share, 0)} of ‖δ‖²): alone, the part inside brings about "
        f"{percent(inside.value, 0)} of the effect and the rest {percent(outside.value, 0)}, so "
        f"{who}."
    )


def _site_findings(result: ControlsResult) -> list[str]:
    accurate = [item for item in result.elsewhere if item.as_accurate]
    lines = [
        f"The displacement of {result.site} was added at {result.words.position} at other sites, "
        f"and beside it the edit that was fitted there. At {result.site} the probe is right in "
        f"{percent(result.probe_accuracy, 0)} of the held-out prompts, and "
        f"{percent(result.counterfactual.flipped.value, 0)} of the answers flip. A displacement "
        "added below that site is carried up to it by the stream, unless later layers change it."
    ]
    if not accurate:
        return [*lines, "At no other site is the probe as accurate."]
    still = [item.site for item in accurate if (item.fitted.flipped.value or 0.0) >= CARRIES]
    idle = [item.site for item in accurate if item.site not in still]
    lines.append(
        f"At {_listed([item.site for item in accurate])} the probe is as accurate, within a "
        "percentage point."
    )
    if idle:
        lines.append(
            f"Of these, the edit fitted at {_listed(idle)} flips less than half of the answers: as "
            "good a probe, and by the study's rule no use there of what it reads."
        )
    if still:
        lines.append(f"The edit fitted at {_listed(still)} flips half or more as well.")
    return lines


def _chance_findings(result: ControlsResult) -> list[str]:
    known = [(item, item.mean_flipped) for item in result.chance if item.mean_flipped is not None]
    if not known:
        return [f"No held-out prompt is answered with {result.words.held}, so none can be flipped."]
    lines = [f"{capitalised(kind)}: {text}." for kind, text in KINDS.items()]
    top, mean = max(known, key=lambda pair: pair[1].known)
    assert mean.lower is not None and mean.upper is not None
    lines.append(
        f"Of these the {top.kind} flips most: {percent(mean.value)} of the answers over "
        f"{len(top.flipped)} seeds (95 % interval {100 * mean.lower:.1f} to "
        f"{100 * mean.upper:.1f}; single seeds {100 * min(top.flipped):.1f} to "
        f"{100 * max(top.flipped):.1f}), beside {percent(result.counterfactual.flipped.value, 0)} "
        "for the study's edit."
    )
    return lines


def _half_findings(result: ControlsResult) -> list[str]:
    halves, value = result.halves, result.words.value
    if halves is None:
        return [f"A half of the training prompts has too few of one {value} to fit an edit to."]

    def both(shares: Sequence[float | None]) -> str:
        return " and ".join(percent(share, 0) for share in shares)

    return [
        f"Two edits fitted to disjoint halves ({halves.prompts[0]} and {halves.prompts[1]} "
        f"prompts; probes right in {both(halves.accuracy)}) have a cosine of {halves.cosine:.2f} "
        f"({halves.cosine_mahalanobis:.2f} in the metric), flip "
        f"{both([outcome.flipped.value for outcome in halves.outcomes])} of the answers and give "
        f"the same answer to {percent(halves.same_answer, 0)} of the prompts. The other half's "
        f"probe reads the {value} written after {both(halves.believed)} of them."
    ]


def _listed(sites: list[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{', '.join(sites[:-1])} and {sites[-1]}"


# ---- tables --------------------------------------------------------------------------------------


def _outcome(result: ControlsResult, path: str, what: str = "") -> dict[str, Reading]:
    """Columns of what an edit does, which a record has under a path."""
    words = result.words
    return {
        f"{what}answers flipped (%)": f"{path}.flipped",
        f"{what}{words.preference} ({words.unit})": f"{path}.logit_difference",
        f"{what}recovered of the interchange (%)": f"{path}.recovered",
    }


def _split_table(result: ControlsResult) -> Table:
    """A row for each part of each split."""
    rows = [
        ((split.space, place), {"split": split, "part": getattr(split, place)})
        for split in result.splits
        for place in PLACES
    ]
    columns: dict[str, Reading] = {
        **_outcome(result, "part.outcome"),
        "share of effect (%)": lambda row: row["part"].outcome.effect or UNKNOWN,
        "share of ‖δ‖² (%)": "part.share",
        "Mahalanobis length / edit's": "part.mahalanobis",
        "class means apart (SD within class)": "part.along.separation",
        "edit moves (SD)": "part.along.shift",
        "edited lie at (SD from mean)": "part.along.position",
        "farthest natural (SD)": "part.along.farthest",
        "dimensions": "split.dimensions",
        "rank of the weights": "split.rank",
        "share of the weights' norm held (%)": "split.energy",
    }
    return table_of(["space", "part"], rows, columns)


def _site_table(result: ControlsResult) -> Table:
    columns: dict[str, Reading] = {
        "probe accuracy (%)": "probe_accuracy",
        f"as accurate as at {result.site}": "as_accurate",
        "cosine of the two edits": "cosine",
        **_outcome(result, "moved", "moved edit: "),
        **_outcome(result, "fitted", "edit fitted there: "),
    }
    return table_of(["site"], (([item.site], item) for item in result.elsewhere), columns)


def _chance_table(result: ControlsResult) -> Table:
    """A row for each edit: the study's, those from halves, and those by chance."""
    rows: list[tuple[list[str], dict[str, Any]]] = [
        ([label], {"accuracy": accuracy, "outcome": outcome})
        for label, outcome, accuracy, _ in _own_edits(result)
    ]
    for item in result.chance:
        flips = item.mean_flipped or UNKNOWN
        seeds = ", ".join(f"{100 * share:.1f} %" for share in item.flipped)
        outcome = {"flipped": flips, "logit_difference": item.logit_difference}
        rows.append(([item.kind], {**vars(item), "outcome": outcome, "seeds": seeds}))
    columns: dict[str, Reading] = {
        **_outcome(result, "outcome"),
        "flipped by seed": "seeds",
        "Mahalanobis length / edit's": "length",
        "accuracy of its probe on its own labels (%)": "accuracy",
    }
    return table_of(["edit"], rows, columns)


def _own_edits(result: ControlsResult) -> list[tuple[str, EditOutcome, float, str]]:
    """Edits that know the class: label, outcome, accuracy of the probe, and colour."""
    halves = result.halves
    both = [] if halves is None else zip(halves.outcomes, halves.accuracy, strict=True)
    return [
        ("the study's edit", result.counterfactual, result.probe_accuracy, chart.COUNTERFACTUAL),
        *(
            (f"edit from one half of the prompts, {number}", *half, chart.COUNTERFACTUAL)
            for number, half in enumerate(both, 1)
        ),
        ("control edit", result.control, result.probe_accuracy, chart.CONTROL),
    ]


# ---- charts --------------------------------------------------------------------------------------


def _split_chart(result: ControlsResult) -> Chart:
    names = [
        f"{split.space}\n{split.dimensions} of {split.width} dimensions, "
        f"{percent(split.inside.share, 0)} of |δ|²"
        for split in result.splits
    ]
    marks = [
        marks_of(
            f"{label}, alone", names, [reads(s, f"{place}.outcome.effect") for s in result.splits],
            scale=100, kind="bars", colour=colour,
        )
        for place, (label, colour) in PLACES.items()
    ]  # fmt: skip
    pane = Pane(
        marks,
        rules=[Rule(0.0, dash="solid"), Rule(100.0)],
        y_title=f"share of the edit's effect on {result.words.preference} (%)",
        horizontal=True,
    )
    return Chart([pane], f"Which part of the edit at {result.site} carries its effect")


def _site_chart(result: ControlsResult) -> Chart:
    moved = f"flipped by the edit of {result.site}, moved"
    curves: dict[str, tuple[str, dict[str, Any]]] = {
        "probe accuracy there": ("probe_accuracy", {"colour": chart.PROBE}),
        moved: ("moved.flipped", {"colour": chart.COUNTERFACTUAL, "marker": "square"}),
        "flipped by the edit fitted there": (
            "fitted.flipped", {"colour": chart.CONTROL, "marker": "triangle"}
        ),
    }  # fmt: skip
    names = [item.site for item in result.elsewhere]
    marks = [
        marks_of(label, names, [reads(i, path) for i in result.elsewhere], scale=100, **looks)
        for label, (path, looks) in curves.items()
    ]
    flips = result.counterfactual.flipped.value
    here = f"flipped at {result.site}"
    rules = [] if flips is None else [Rule(100 * flips, "y", here, chart.CLEAN, "dash")]
    pane = by_site(marks, rules=rules, y_title="held-out prompts (%)")
    return Chart([pane], f"The edit of {result.site} at other sites")


def _chance_chart(result: ControlsResult) -> Chart:
    known: list[tuple[str, Estimate, str, list[float]]] = [
        (label, outcome.flipped, colour, []) for label, outcome, _, colour in _own_edits(result)
    ]
    known += [
        (item.kind, item.mean_flipped, chart.NOTE, item.flipped)
        for item in result.chance
        if item.mean_flipped is not None
    ]
    marks: list[Marks] = []
    for label, share, colour, seeds in known:
        bar: dict[str, Any] = {"kind": "bars", "colour": colour, "opacity": 0.8, "legend": False}
        number = [percent(share.value, 0)]
        marks.append(marks_of(label, [label], [share], scale=100, labels=number, **bar))
        if seeds:
            tick: dict[str, Any] = {"kind": "points", "marker": "tick", "colour": chart.CLEAN}
            at = [label] * len(seeds)
            marks.append(marks_of("seeds", at, seeds, scale=100, legend=False, **tick))
    pane = Pane(
        marks, y_title="answers flipped (%); ticks: seeds", y_range=(0.0, 110.0), horizontal=True
    )
    value = result.words.value
    return Chart([pane], f"Edits at {result.site} that know the {value}, and edits that do not")


PART = Controls()
