"""Is the edit an illusion? The controls of :mod:`~lrqp_torch.study.illusions` and what they say."""

from typing import Any

from lrqp_torch.plot import chart
from lrqp_torch.plot.chart import Chart, Marks, Pane, Panel, Rule, Table, marks_of
from lrqp_torch.study import illusions
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.illusions import CARRIES, KINDS, SEPARATED, ControlsResult, EditOutcome
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.showing import (
    UNKNOWN,
    Reading,
    by_site,
    panel,
    percent,
    reads,
    said,
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
    result = ControlsResult
    needs = ("flipping", "heads")
    prompts = "reporting"
    asks = "answers"

    def work(self, context: StudyContext, /) -> int:
        """Held-out prompts."""
        return len(context.task.test)

    def compute(self, given: Given, advance: Advance, /) -> ControlsResult:
        """The controls of the edit at the best site."""
        return illusions.compute(given, advance)

    def says(self, result: ControlsResult, /) -> list[str]:
        """Whether the signature is there, and what chance and halves do."""
        return said(self.name, "says", **_known(result))

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
        charts, known = self.figures(result), _known(result)
        tables = {"splits": _split_table, "sites": _site_table, "chance": _chance_table}
        panels = []
        for name, table in tables.items():
            chart = charts.get(f"controls_{name}")
            shown = {"charts": {} if chart is None else {"": chart}, "table": table(result)}
            if name != "sites" or result.elsewhere:
                panels.append(panel(self.name, f"controls-{name}", shown=shown, **known))
        return panels


def _known(result: ControlsResult) -> dict[str, Any]:
    """What words are made from, beside the result."""
    accurate = [item for item in result.elsewhere if item.as_accurate]
    still = [item.site for item in accurate if (item.fitted.flipped.value or 0.0) >= CARRIES]
    known = [(item, item.mean_flipped.known) for item in result.chance if item.mean_flipped]
    parts = [part for split in result.splits for part in (split.inside, split.outside)]
    return {
        "result": result,
        "readers": [split for split in result.splits if split.reads],
        "longest": max((part.mahalanobis for part in parts), default=0.0),
        "accurate": [item.site for item in accurate],
        "still": still,
        "idle": [item.site for item in accurate if item.site not in still],
        "known": [item for item, _ in sorted(known, key=lambda pair: -pair[1])],
        "kinds": KINDS,
        "separated": SEPARATED,
        "energy": ENERGY,
    }


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
