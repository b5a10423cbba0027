"""Figures of your own numbers, or of a study's results, in one line.

Each function takes numbers as tensors or lists, or the results of a study as an object, or the
folder that holds them, and returns a :class:`Figure`, which shows itself in a notebook.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from lrqp_torch.errors import MissingExtraError, SettingError
from lrqp_torch.files import written_whole
from lrqp_torch.plot import chart
from lrqp_torch.plot.chart import (
    SHARES,
    Band,
    Chart,
    Heat,
    Marker,
    Marks,
    Pane,
    Rule,
    Table,
    counted,
    edges,
    ends,
    look,
    marks_of,
)
from lrqp_torch.plot.interactive import to_plotly
from lrqp_torch.plot.reading import (
    answers_of,
    best_site,
    effect_in_words,
    get,
    listed,
    model_name,
    part_of,
    read,
    results_of,
    task_in_words,
    word,
)
from lrqp_torch.plot.static import RESOLUTION, to_matplotlib, write_chart

CONDITIONS: tuple[tuple[str, Marker], ...] = (("counterfactual", "square"), ("control", "triangle"))

DIRECT = "direct effect on IO − S (logits)"
LOOKS_WITHOUT = "name movers' attention without the head"
WRITES_WITHOUT = "their direct effect without the head"
"""Scores of heads: what they write, and what the name movers do without them."""

RULES: dict[str, dict[str, Any]] = {
    "sweep": {},
    "mirror rule": {"kind": "points", "marker": "star", "size": 1.6},
    "mirror rule, control": {"kind": "points", "marker": "triangle", "filled": False, "size": 1.3},
}
"""How the edits of each rule of a dose are drawn."""

NEXT_TOKEN = "change of the next token"
"""A measure of edits."""

Curves = dict[str, tuple[Sequence[str], dict[str, Any]]]
"""Name to the paths of its numbers, and the looks of its marks."""

_BY_SITE = "Site edited, in order of computation"
_OF_CEILING = {"flipped": "flipped", "preference": "logit_difference"}
"""What a measure of an edit is called of an interchange."""


class Figure:
    """A chart that shows itself in a notebook, and can be saved.

    Attributes:
        chart: what is drawn, in no library's terms.
    """

    def __init__(self, chart: Chart) -> None:
        self.chart = chart

    def __repr__(self) -> str:
        return f"Figure({self.chart.title!r})"

    @property
    def table(self) -> Table:
        """The numbers of the chart."""
        return self.chart.table()

    def save(self, path: str | Path) -> Path:
        """Write ``.html`` (interactive), ``.png``, ``.svg`` or ``.pdf``; returns the file.

        Raises:
            SettingError: another ending.
            MissingExtraError: the library that draws it is not installed.
            OutputError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".html":
            page = import_module("plotly.io").to_html(self.to_plotly(), include_plotlyjs=True)
            with written_whole(path) as temporary:
                temporary.write_text(page, encoding="utf-8")
        elif path.suffix in (".png", ".svg", ".pdf"):
            write_chart(self.chart, path)
        else:
            raise SettingError(
                f"a figure is saved as .html, .png, .svg or .pdf, and not as {path.name!r}"
            )
        return path

    def to_plotly(self) -> Any:
        """The figure for plotly, as :class:`plotly.graph_objects.Figure`.

        Raises:
            MissingExtraError: plotly is not installed.
        """
        if find_spec("plotly") is None:
            raise MissingExtraError(
                "interactive figures need plotly: install it with `pip install "
                "'lrqp_torch[report]'`"
            )
        return import_module("plotly.graph_objects").Figure(to_plotly(self.chart))

    def to_matplotlib(self) -> Any:
        """The figure for matplotlib, as :class:`matplotlib.figure.Figure`.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return to_matplotlib(self.chart)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Interactive where plotly knows how to show itself, and a picture for where it cannot."""
        bundle: dict[str, Any] = {"text/plain": repr(self)}
        if find_spec("plotly") is not None:
            bundle |= self.to_plotly()._repr_mimebundle_() or {}
        if find_spec("matplotlib") is not None:
            picture = BytesIO()
            self.to_matplotlib().savefig(picture, format="png", dpi=RESOLUTION)
            bundle["image/png"] = b64encode(picture.getvalue()).decode()
        if len(bundle) == 1:
            raise MissingExtraError(
                "to show a figure, install plotly with `pip install 'lrqp_torch[report]'`, or "
                "matplotlib with `pip install 'lrqp_torch[plots]'`"
            )
        return bundle


def sweep(
    values: Any,
    sites: Sequence[str] | None = None,
    *,
    used: Sequence[str] = (),
    chance: float | None = None,
    title: str = "",
    y_title: str = "",
) -> Figure:
    """What can be read and what is used, site by site.

        plot.sweep("runs/gpt2")
        plot.sweep({"probe accuracy": [0.5, 0.9], "flipped": flips}, sites=["L0.mid", "L1.mid"])

    Args:
        values: results of a study, the folder that holds them, or curve to one number a site;
            (value, lower, upper) instead of a number gives it an interval; or the numbers of one
            curve. Numbers from 0 to 1 are taken for shares, and drawn in per cent, unless
            ``y_title`` is given.
        sites: names of the sites, in order.
        used: sites to shade.
        chance: where to draw a line, in the units of the values.
        title: of the figure.
        y_title: of the values, with their unit.

    Raises:
        SettingError: values that are neither, or not one a site.
        OutputError: a folder without results.
    """
    results = results_of(values)
    if results is not None:
        return Figure(sweep_of(results))
    curves = _curves(values)
    known = [v for column in curves.values() for v, *_ in map(ends, column) if v is not None]
    shares = not y_title and all(0 <= value <= 1 for value in known)
    scale = 100.0 if shares else 1.0
    names = list(sites or map(str, range(max(map(len, curves.values())))))
    pane = Pane(
        _marks(curves, names, "sites; give one a site", scale),
        rules=[] if chance is None else [Rule(scale * chance, name="chance")],
        bands=[Band(site, site) for site in used],
        x_title=_BY_SITE,
        y_title=y_title or ("Share (%)" if shares else ""),
        y_range=SHARES if shares else None,
        names="ends",
    )
    return Figure(Chart([pane], title))


def _curves(values: Any) -> dict[str, list[Any]]:
    """The numbers of each curve by its name; one alone needs none."""
    named = values.items() if isinstance(values, Mapping) else [("", values)]
    for name, column in named:
        if isinstance(column, int | float | str):
            raise SettingError(
                f"{name!r} is {column!r}: give a curve's numbers as a list or tensor"
            )
    return {name: listed(column) for name, column in named}


def _marks(
    curves: Mapping[str, list[Any]], x: list[Any], where: str, scale: float = 1.0
) -> list[Marks]:
    """Curves over the same x, such as sites."""
    for name, column in curves.items():
        if len(column) != len(x):
            raise SettingError(f"{name!r} has {len(column)} values for {len(x)} {where}")
    named = enumerate(curves.items())
    return [marks_of(name, x, column, scale=scale, **look(i)) for i, (name, column) in named]


def histogram(values: Any, *, bins: int = 48, title: str = "", x_title: str = "") -> Figure:
    """How numbers are distributed, a row a kind: such as answers without and with an edit.

        plot.histogram("runs/gpt2")
        plot.histogram({"clean": clean, "edited": edited}, x_title="logit difference (logits)")

    Args:
        values: the folder of a study's results, name to (n,) numbers, or (n,) numbers.
        bins: of equal width, common to all rows.
        title: of the figure.
        x_title: of the numbers, with their unit.

    Raises:
        SettingError: no numbers.
        OutputError: a folder without results.
    """
    results = results_of(values)
    if results is not None:
        return Figure(histogram_of(results, bins))
    columns = values if isinstance(values, Mapping) else {"": values}
    looks = {name: (name, look(i)["colour"]) for i, name in enumerate(columns)}
    return Figure(Chart(_histograms(columns, looks, bins, x_title), title, share_x=True))


def scatter(
    before: Any,
    after: Any = None,
    *,
    texts: Sequence[str] | None = None,
    site: str | None = None,
    title: str = "",
    x_title: str = "before",
    y_title: str = "after",
) -> Figure:
    """One number a prompt before against after an edit; on the diagonal nothing changed.

        plot.scatter("runs/gpt2")
        plot.scatter(clean, {"control": control, "counterfactual": edited}, texts=prompts)

    Args:
        before: the folder of a study's results, or (n,) numbers.
        after: (n,) numbers, or name of an edit to (n,) numbers.
        texts: what each point is, shown when one points at it.
        site: of a study's results; default the one whose edit flips most.
        title: of the figure.
        x_title: of the numbers before.
        y_title: of the numbers after.

    Raises:
        SettingError: numbers before and after that are not as many.
        OutputError: a folder without results.
    """
    results = results_of(before)
    if results is not None:
        return Figure(scatter_of(results, site, texts=texts))
    columns = after if isinstance(after, Mapping) else {"": after}
    pane = _before_after(listed(before), columns, x_title, y_title, texts=texts)
    return Figure(Chart([pane], title))


def dose(
    values: Any,
    doses: Any = None,
    *,
    title: str = "",
    x_title: str = "least log odds asked for (nats)",
    y_title: str = "",
) -> Figure:
    """What an edit does, by how much belief is asked of it.

        plot.dose("runs/gpt2")
        plot.dose({"flipped": [0.1, 0.5, 0.9]}, doses=[0.0, 5.0, 10.0])

    Args:
        values: results of a study in which ``dose`` ran, their folder, or curve to one number (or
            value, lower and upper end) a dose, or the numbers of one curve.
        doses: where the values stand.
        title: of the figure of these numbers; that of a study's results has its own words.
        x_title: of the doses, with their unit.
        y_title: of the values, with their unit.

    Raises:
        SettingError: results without doses, or values that are not one a dose.
        OutputError: a folder without results.
    """
    results = results_of(values)
    if results is not None:
        return Figure(dose_of(part_of(results, "dose")))
    marks = _marks(_curves(values), listed(doses), "doses")
    return Figure(Chart([Pane(marks, x_title=x_title, y_title=y_title, names="ends")], title))


def attention(
    values: Any, tokens: Sequence[str] | None = None, *, title: str = "", name: str = "attention"
) -> Figure:
    """Attention as a map: of layers and heads, or from token to token.

        plot.attention("runs/gpt2")
        plot.attention(weights, tokens=["The", " cat", " sat"])

    Args:
        values: results of a study in which ``heads`` ran, their folder, one matrix, or name to
            matrix. A matrix is (layers, heads), or with ``tokens`` (queries, keys).
        tokens: names of queries and keys.
        title: of the figure.
        name: of the values, with their unit.

    Raises:
        SettingError: results without heads, or no matrix.
        OutputError: a folder without results.
    """
    results = results_of(values)
    if results is not None:
        return Figure(heads_of(part_of(results, "heads")))
    panes = []
    for heading, matrix in (values if isinstance(values, Mapping) else {"": values}).items():
        rows = [listed(row) for row in listed(matrix)]
        if not rows or len({len(row) for row in rows}) != 1:
            raise SettingError("attention is drawn of a matrix, such as (layers, heads)")
        down = tokens or [f"L{i}" for i in range(len(rows))]
        right = tokens or [f"H{i}" for i in range(len(rows[0]))]
        around = any(value is not None and value < 0 for row in rows for value in row)
        limits = (None, None) if around else (0.0, 1.0)
        panes.append(Pane(heat=Heat(rows, down, right, name, around, *limits), title=heading))
    return Figure(Chart(panes, title, columns=min(4, len(panes))))


# ---- of a study's results ------------------------------------------------------------------------


def sweep_of(results: Any) -> Chart:
    """What :func:`sweep` draws of a study's results."""
    sites = get(results, "sites")
    if not sites:
        raise SettingError("these results hold no sweep over sites; run the part flipping")
    names, found = list(sites), list(sites.values())
    used = get(results, "used_sites")
    effects = ("logit_difference", "divergence")
    ceiling: dict[str, Any] = {"colour": chart.ORANGE, "marker": "diamond", "dash": "dash"}
    edits: dict[str, dict[str, Any]] = {
        condition: {"colour": chart.CONDITION_COLOURS[condition], "marker": marker}
        for condition, marker in CONDITIONS
    }

    def drawn(scale: float, curves: Curves) -> Iterator[Marks]:
        """Marks by name, of the paths and the looks of each; without those that nothing has."""
        for name, (paths, looks) in curves.items():
            values = [read(site, *paths) for site in found]
            if "recovered" in paths:  # elsewhere it is a share of next to no effect
                pairs = zip(names, values, strict=True)
                values = [v if site in used else ends(None) for site, v in pairs]
            if any(value is not None for value, *_ in values):
                yield marks_of(name, names, values, scale=scale, **looks)

    shares: Curves = {
        "probe accuracy": (("probe_accuracy",), {"colour": chart.PROBE}),
        "shuffled labels": (
            ("shuffled_accuracy",), {"colour": chart.NOTE, "marker": "cross", "stroke": 0.5}
        ),
        **{f"flipped, {name}": ((f"{name}.flipped",), own) for name, own in edits.items()},
        "flipped, interchange": (("interchange.flipped",), ceiling),
        "recovered share": (
            ("recovered",), {"colour": chart.PURPLE, "marker": "star", "kind": "points"}
        ),
    }  # fmt: skip
    changes: Curves = {
        f"{name} edit": ([f"{name}.{effect}" for effect in effects], own)
        for name, own in edits.items()
    } | {"interchange (ceiling)": ([f"interchange.{effect}" for effect in effects], ceiling)}
    guess, (clean, *_) = get(results, "majority"), read(results, "clean.logit_difference")
    by_site: dict[str, Any] = {
        "bands": [Band(name, name) for name in used], "x_title": _BY_SITE, "names": "ends"
    }  # fmt: skip
    chance = [Rule(100 * guess, name="chance" if guess == 0.5 else "most frequent class")]
    shares_of = {"y_title": "Held-out prompts (%)", "y_range": SHARES, "rules": chance}
    rules, effect = [Rule(0, dash="solid")], effect_in_words(results, "Mean ")
    rules += [] if clean is None else [Rule(clean, "y", "no edit", chart.CLEAN, "dash")]
    judged = any(get(site, "verdict", None) is not None for site in found)
    how = (
        "by a paired test against edits as long of shuffled probes."
        if judged
        else "half of the answers flip, beyond the control."
    )
    where = f"One site edited at a time, at {word(results, 'position')}"
    return Chart(
        [
            Pane([*drawn(100.0, shares)], **by_site | shares_of),
            Pane([*drawn(1.0, changes)], rules=rules, y_title=effect, **by_site),
        ],
        title=f"Where {word(results, 'variable')} is knowable, and where it is used",
        subtitle=f"Model: {model_name(results)}. {where}. Shaded: used, {how}",
        share_x=True,
        heights=(3, 2),
    )


def histogram_of(results: Any, bins: int = 48) -> Chart:
    """What :func:`histogram` draws of a study's results."""
    site = best_site(results)
    looks = {
        "clean": ("no edit", chart.CLEAN),
        f"{site}.control": ("control edit", chart.CONTROL),
        f"{site}.counterfactual": ("counterfactual edit", chart.COUNTERFACTUAL),
    }
    columns = {key: answers_of(results, key) for key in looks}
    for key, (name, colour) in looks.items():
        values = columns[key]
        mean, share = sum(values) / len(values), sum(v > 0 for v in values) / len(values)
        said = f"mean {mean:+z.2f}\n{100 * share:.1f} % answer {word(results, 'held')}"
        looks[key] = (f"{name}\n{said}".replace("-", "−"), colour)
    return Chart(
        _histograms(columns, looks, bins, f"Answer: {effect_in_words(results)}; dashed: mean"),
        title=f"Answers under edits of the belief at {site}",
        subtitle=f"Model: {model_name(results)}, {len(columns['clean'])} held-out prompts. Left "
        f"of 0 it answers {word(results, 'other')}.",
        share_x=True,
        share_y=True,
    )


def scatter_of(
    results: Any, site: str | None = None, most: int | None = None, **texts: Any
) -> Chart:
    """What :func:`scatter` draws of a study's results: ``most`` prompts, at the best site by
    default.

    ``texts`` are the ``texts`` and ``notes`` of the marks, and limits of the pane.
    """
    site = site or best_site(results)
    columns, names = {}, {}
    for condition, _ in reversed(CONDITIONS):
        columns[condition] = answers_of(results, f"{site}.{condition}")[:most]
        share, *_ = read(get(results, "sites")[site], f"{condition}.flipped")
        said = "no answer could flip" if share is None else f"{100 * share:.1f} % flipped"
        names[condition] = f"{condition} edit: {said}"
    x_title = f"Without an edit: {effect_in_words(results)}"
    x = answers_of(results, "clean")[:most]
    return Chart(
        [_before_after(x, columns, x_title, "Under the edit", names, **texts)],
        title=f"Every held-out prompt before and after the edit at {site}",
        subtitle=f"Model: {model_name(results)}. Below 0 the edited model answers "
        f"{word(results, 'other')}.",
    )


def dose_of(result: Any) -> Chart:
    """What :func:`dose` draws of the part's result: four of its :func:`dose_panes`."""
    panes = dose_panes(result)
    if len(panes) > 3:
        panes.pop(NEXT_TOKEN, None)
    where = f"edits at {get(result, 'site')}, {word(result, 'position')}"
    title = f"How much belief it takes to flip an answer: {where}"
    return Chart([*panes.values()], title, columns=2, share_x=True)


def dose_measures(result: Any) -> dict[str, tuple[str, str]]:
    """What is known of doses, by its name: the field of an edit, and the title of its axis."""
    preference, unit = word(result, "preference"), word(result, "unit")
    measures = {
        "answers flipped (%)": ("flipped", "answers flipped (%)"),
        preference: ("preference", f"mean {preference} at {word(result, 'end')} ({unit})"),
        NEXT_TOKEN: ("divergence", "mean KL from the clean run (nats)"),
        "Mahalanobis size": ("distance", "mean Mahalanobis length of the edit"),
        "Euclidean size": ("euclidean", "mean Euclidean length (units of the stream)"),
    }
    edits = [edit for task in get(result, "tasks").values() for _, edit in dosed(task)]
    return {
        name: (field, title)
        for name, (field, title) in measures.items()
        if any(get(edit, field, None) is not None for edit in edits)
    }


def dosed(task: Any) -> list[tuple[str, Any]]:
    """Every edit of a version of the task with the name of its rule, one of :data:`RULES`."""
    sweep, mirror, control = RULES
    doses = [(sweep, edit) for edit in get(task, "doses")]
    return [*doses, (mirror, get(task, "counterfactual")), (control, get(task, "control"))]


def dose_panes(result: Any, against: str = "log_alpha") -> dict[str, Pane]:
    """Every measure of the edits against their log α, or their ``"distance"``, by its name."""
    x_title = (
        f"log α: least log odds of the other {word(result, 'value')} (nats)"
        if against == "log_alpha"
        else "mean Mahalanobis length of the edit"
    )
    panes = {}
    for name, (field, title) in dose_measures(result).items():
        scale = 100.0 if field == "flipped" else 1.0
        marks, rules = [], [] if field == "flipped" else [Rule(0.0, dash="solid")]
        for index, (version, task) in enumerate(get(result, "tasks").items()):
            words, looks = task_in_words(version), look(index)
            for rule, own in RULES.items():
                edits = [edit for kind, edit in dosed(task) if kind == rule]
                label = ", ".join(filter(None, ("" if rule == "sweep" and words else rule, words)))
                x = [read(edit, against)[0] for edit in edits]
                values = [read(edit, field) for edit in edits]
                marks.append(marks_of(label, x, values, scale=scale, **looks | own))
            clean, *_ = read(task, "clean")
            if field == "preference" and clean is not None:
                rules.append(Rule(clean, colour=looks["colour"]))
            most, *_ = read(task, f"interchange.{_OF_CEILING.get(field, '')}")
            if most is not None:
                label = ", ".join(filter(None, ("interchange", words)))
                rules.append(Rule(scale * most, "y", label, looks["colour"], "dash"))
        limits = SHARES if field == "flipped" else None
        panes[name] = Pane(marks, rules=rules, x_title=x_title, y_title=title, y_range=limits)
    return panes


def heads_of(result: Any) -> Chart:
    """What :func:`attention` draws of the part's result: all but what tests of heads gave."""
    tests = (LOOKS_WITHOUT, WRITES_WITHOUT)
    panes = [pane for name, pane in head_panes(result).items() if name not in tests]
    title = "What every attention head does, mean over "
    return Chart(panes, f"{title}{get(result, 'prompts', 'the')} clean held-out prompts",
                 columns=-(-len(panes) // 2))  # fmt: skip


def head_panes(result: Any) -> dict[str, Pane]:
    """Every score of the heads by its name, as a map with rows of layers and columns of heads."""
    scores = get(result, "scores")
    width = 1 + max(int(get(score, "head").split(".H")[1]) for score in scores)
    paths = {DIRECT: "attribution"}
    paths |= {f"attention {key}": f"attention.{key}" for key in get(scores[0], "attention")}
    paths |= {LOOKS_WITHOUT: "test.attention", WRITES_WITHOUT: "test.writing"}
    panes = {}
    for name, path in paths.items():
        values = [read(score, path)[0] for score in scores]
        rows = [values[start : start + width] for start in range(0, len(values), width)]
        around = not path.startswith("attention.")
        most = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
        names = [str(layer) for layer in range(len(rows))], [str(head) for head in range(width)]
        heat = Heat(rows, *names, name, around, *((-most, most) if around else (0.0, 1.0)))
        title = "direct effect (logits)" if name == DIRECT else name
        panes[name] = Pane(heat=heat, title=title, x_title="head", y_title="layer")
    return panes


# ---- panes ---------------------------------------------------------------------------------------


def _histograms(
    columns: Mapping[str, Any], looks: Mapping[str, tuple[str, str]], bins: int, x_title: str
) -> list[Pane]:
    lists = {key: listed(column) for key, column in columns.items()}
    every = [value for values in lists.values() for value in values]
    if not every:
        raise SettingError("there are no numbers to draw a histogram of")
    limits = edges([*every, 0.0], bins)
    panes = []
    for key, values in lists.items():
        mean = sum(values) / len(values)
        rules = [
            Rule(0, "x", colour=chart.INK, dash="solid"),
            Rule(mean, "x", colour=chart.INK, dash="dash"),
        ]
        bars = counted(looks[key][0], values, limits, colour=looks[key][1])
        panes.append(
            Pane([bars], rules=rules, x_title=x_title, y_title="Held-out prompts", names="beside")
        )
    return panes


def _before_after(
    x: list[float],
    columns: Mapping[str, Any],
    x_title: str,
    y_title: str,
    names: Mapping[str, str] | None = None,
    texts: Sequence[str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    **limits: Any,
) -> Pane:
    marks = []
    for index, (key, column) in enumerate(columns.items()):
        y = listed(column)
        if len(y) != len(x):
            raise SettingError(f"{len(x)} numbers before and {len(y)} after; give one a prompt")
        looks = look(index) | {"kind": "points", "size": 0.8, "opacity": 0.55}
        looks |= {"texts": texts, "notes": (notes or {}).get(key)}
        marks.append(Marks(key if names is None else names[key], x, y, **looks))
    zero = [Rule(0, "y", dash="solid"), Rule(0, "x", dash="solid")]
    rules = [*zero, Rule(0, "diagonal", "unchanged", dash="dash")]
    return Pane(
        marks, rules=rules, x_title=x_title, y_title=y_title, square=True, names="corner", **limits
    )
