"""Figures of your own numbers, or of a study's results, in one line.

Each function takes numbers as tensors or lists, or the results of a study as an object, or the
folder that holds them, and returns a :class:`Figure`, which shows itself in a notebook.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from lrqp_torch.errors import MissingExtraError, SettingError
from lrqp_torch.files import written_whole
from lrqp_torch.plot.chart import (
    CLEAN,
    CONDITION_COLOURS,
    CONTROL,
    COUNTERFACTUAL,
    INK,
    LOOKS,
    NOTE,
    ORANGE,
    PROBE,
    PURPLE,
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
    word,
)
from lrqp_torch.plot.static import RESOLUTION, to_matplotlib, write_chart

CONDITIONS: tuple[tuple[str, Marker], ...] = (("counterfactual", "square"), ("control", "triangle"))

_BY_SITE = "Site edited, in order of computation"
_NOT_KNOWN = (None, None, None)
"""Value and ends of what was not measured."""


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
            (value, lower, upper) instead of a number gives it an interval. Numbers from 0 to 1
            are taken for shares, and drawn in per cent, unless ``y_title`` is given.
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
    curves = {name: [_ends(value) for value in listed(column)] for name, column in values.items()}
    known = [v for column in curves.values() for v, *_ in column if v is not None]
    shares = not y_title and all(0 <= value <= 1 for value in known)
    scale = 100.0 if shares else 1.0
    names = list(sites or map(str, range(max(map(len, curves.values())))))
    marks = []
    for index, (name, column) in enumerate(curves.items()):
        if len(column) != len(names):
            raise SettingError(
                f"{name!r} has {len(column)} values for {len(names)} sites; give one a site"
            )
        colour, marker = LOOKS[index % len(LOOKS)]
        marks.append(_curve(name, names, column, scale, colour=colour, marker=marker))
    pane = Pane(
        marks,
        rules=[] if chance is None else [Rule(scale * chance, name="chance")],
        bands=[Band(site, site) for site in used],
        x_title=_BY_SITE,
        y_title=y_title or ("Share (%)" if shares else ""),
        y_range=(-4, 104) if shares else None,
        names="ends",
    )
    return Figure(Chart([pane], title))


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
    looks = {name: (name, LOOKS[i % len(LOOKS)][0]) for i, name in enumerate(columns)}
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
            value, lower and upper end) a dose.
        doses: where the values stand.
        title: of the figure.
        x_title: of the doses, with their unit.
        y_title: of the values, with their unit.

    Raises:
        SettingError: results without doses, or values that are not one a dose.
        OutputError: a folder without results.
    """
    results = results_of(values)
    if results is not None:
        return Figure(_dose_of(part_of(results, "dose"), x_title))
    x, marks = listed(doses), []
    for (name, column), (colour, marker) in zip(values.items(), LOOKS, strict=False):
        marks.append(_curve(name, x, map(_ends, listed(column)), colour=colour, marker=marker))
    return Figure(Chart([Pane(marks, x_title=x_title, y_title=y_title, names="ends")], title))


def attention(
    values: Any,
    tokens: Sequence[str] | None = None,
    *,
    title: str = "",
    name: str = "attention",
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
        return Figure(_heads_of(part_of(results, "heads")))
    panes = []
    for heading, matrix in (values if isinstance(values, Mapping) else {"": values}).items():
        rows = [listed(row) for row in listed(matrix)]
        if not rows or len({len(row) for row in rows}) != 1:
            raise SettingError("attention is drawn of a matrix, such as (layers, heads)")
        down, right = ("L", "H") if tokens is None else ("", "")
        names = tokens if tokens is not None else None
        panes.append(
            _map(rows, heading, name, names or [f"{down}{i}" for i in range(len(rows))],
                 names or [f"{right}{i}" for i in range(len(rows[0]))])
        )  # fmt: skip
    return Figure(Chart(panes, title, columns=min(4, len(panes))))


# ---- of a study's results ------------------------------------------------------------------------


def sweep_of(results: Any) -> Chart:
    """What :func:`sweep` draws of a study's results."""
    sites = get(results, "sites")
    if not sites:
        raise SettingError("these results hold no sweep over sites; run the part flipping")
    names, found = list(sites), list(sites.values())
    bands = [Band(name, name) for name in get(results, "used_sites", ())]
    classes = get(results, "classes", ())
    guess = get(results, "majority", 1 / len(classes) if classes else 0.5)
    upper = [
        _curve("probe accuracy", names, [read(s, "probe_accuracy", "probe")
               for s in found], 100.0, colour=PROBE)
    ]  # fmt: skip
    rules = [Rule(100 * guess, name="chance" if guess == 0.5 else "most frequent class")]
    shuffled = [read(site, "shuffled_accuracy", "shuffled") for site in found]
    if any(value is not None for value, *_ in shuffled):
        upper.append(_curve("shuffled labels", names, shuffled, 100.0, colour=NOTE,
                            marker="cross", stroke=0.5))  # fmt: skip
    lower = []
    effects = ("logit_difference", "preference", "divergence")
    for condition, marker in CONDITIONS:
        edits = [get(site, condition) for site in found]
        look: dict[str, Any] = {"colour": CONDITION_COLOURS[condition], "marker": marker}
        flips = [read(edit, "flipped") for edit in edits]
        if any(value is not None for value, *_ in flips):
            upper.append(_curve(f"flipped, {condition}", names, flips, 100.0,
                                **look))  # fmt: skip
        lower.append(_curve(f"{condition} edit", names, [read(edit, *effects) for edit in edits],
                            **look))  # fmt: skip
    ceilings = [get(site, "interchange", None) for site in found]
    if any(ceiling is not None for ceiling in ceilings):
        look = {"colour": ORANGE, "marker": "diamond", "dash": "dash"}
        # A series is left out where there is nothing of it, as without answers.
        series = (
            (upper, "flipped, interchange", ceilings, ("flipped",), 100.0, look),
            (upper, "recovered share", found, ("recovered",), 100.0,
             {"colour": PURPLE, "marker": "star", "kind": "points"}),
            (lower, "interchange (ceiling)", ceilings, effects, 1.0, look),
        )  # fmt: skip
        for curves, label, records, keys, scale, own in series:
            ends = [_NOT_KNOWN if one is None else read(one, *keys) for one in records]
            if keys == ("recovered",):
                # Elsewhere it is a share of next to no effect.
                used = get(results, "used_sites", ())
                pairs = zip(names, ends, strict=True)
                ends = [end if name in used else _NOT_KNOWN for name, end in pairs]
            if any(value is not None for value, *_ in ends):
                curves.append(_curve(label, names, ends, scale, **own))
    below = [Rule(0, dash="solid")]
    clean, *_ = read(get(results, "clean", results), "logit_difference", "preference")
    if clean is not None:
        below.append(Rule(clean, name="no edit", colour=CLEAN, dash="dash"))
    return Chart(
        [
            Pane(upper, rules=rules, bands=bands, x_title=_BY_SITE, y_range=(-4, 104),
                 y_title="Held-out prompts (%)", names="ends"),
            Pane(lower, rules=below, bands=bands, x_title=_BY_SITE,
                 y_title=effect_in_words(results, "Mean "), names="ends"),
        ],
        title=f"Where {word(results, 'variable')} is knowable, and where it is used",
        subtitle=f"Model: {model_name(results)}. One site edited at a time, at "
        f"{word(results, 'position')}. Shaded: used, "
        + (
            "by a paired test against edits as long of shuffled probes."
            if any(get(site, "verdict", None) is not None for site in found)
            else "half of the answers flip, beyond the control."
        ),
        share_x=True,
        heights=(3, 2),
    )  # fmt: skip


def histogram_of(results: Any, bins: int = 48) -> Chart:
    """What :func:`histogram` draws of a study's results."""
    site = best_site(results)
    looks = {"clean": ("no edit", CLEAN), f"{site}.control": ("control edit", CONTROL),
             f"{site}.counterfactual": ("counterfactual edit", COUNTERFACTUAL)}  # fmt: skip
    columns = {key: answers_of(results, key) for key in looks}
    held, other = word(results, "held"), word(results, "other")
    for key, (name, colour) in looks.items():
        values = columns[key]
        mean, share = sum(values) / len(values), sum(v > 0 for v in values) / len(values)
        said = f"{name}\nmean {mean:+z.2f}\n{100 * share:.1f} % answer {held}".replace("-", "−")
        looks[key] = (said, colour)
    return Chart(
        _histograms(columns, looks, bins, f"Answer: {effect_in_words(results)}; dashed: mean"),
        title=f"Answers under edits of the belief at {site}",
        subtitle=f"Model: {model_name(results)}, {len(columns['clean'])} held-out prompts. Left "
        f"of 0 it answers {other}.",
        share_x=True,
        share_y=True,
    )


def scatter_of(
    results: Any, site: str | None = None, most: int | None = None, **texts: Any
) -> Chart:
    """What :func:`scatter` draws of a study's results.

    Args:
        results: of the study.
        site: which; default the best one.
        most: prompts that are drawn; default all.
        texts: ``texts`` and ``notes`` of the marks, and limits of the pane.
    """
    site = site or best_site(results)
    record = get(get(results, "sites"), site)
    columns, names = {}, {}
    for condition, _ in reversed(CONDITIONS):
        columns[condition] = answers_of(results, f"{site}.{condition}")[:most]
        share, *_ = read(get(record, condition), "flipped")
        said = "no answer could flip" if share is None else f"{100 * share:.1f} % flipped"
        names[condition] = f"{condition} edit: {said}"
    x = answers_of(results, "clean")[:most]
    return Chart(
        [_before_after(x, columns, f"Without an edit: {effect_in_words(results)}", "Under the edit",
                       names, **texts)],
        title=f"Every held-out prompt before and after the edit at {site}",
        subtitle=f"Model: {model_name(results)}. Below 0 the edited model answers "
        f"{word(results, 'other')}.",
    )  # fmt: skip


def _dose_of(result: Any, x_title: str) -> Chart:
    panes = []
    for keys, y_title, scale in (
        (("flipped",), "Answers flipped (%)", 100.0),
        (("logit_difference", "preference"), "Mean difference of answers", 1.0),
        (("distance",), "Mean Mahalanobis length", 1.0),
        (("euclidean",), "Mean Euclidean length", 1.0),
    ):
        marks, rules = [], [] if scale == 100 else [Rule(0, dash="solid")]
        tasks = get(result, "tasks").items()
        for (name, task), (colour, marker) in zip(tasks, LOOKS, strict=False):
            kinds: list[tuple[str, Any, Marker]] = [
                (name, get(task, "doses"), marker),
                (f"mirror rule, {name}", [get(task, "counterfactual")], "star"),
                (f"mirror rule, {name}, control", [get(task, "control")], "triangle"),
            ]
            for label, edits, shape in kinds:
                x = [get(edit, "log_alpha") for edit in edits]
                marks.append(_curve(label, x, [read(edit, *keys) for edit in edits], scale,
                                    colour=colour, marker=shape, filled=shape != "triangle",
                                    size=1.0 if len(x) > 1 else 1.5))  # fmt: skip
            clean = read(task, "clean")[0]
            if "preference" in keys and clean is not None:
                rules.append(Rule(clean, colour=colour))
        limits = (-4.0, 104.0) if scale == 100 else None
        if any(value is not None for kind in marks for value in kind.y):
            panes.append(Pane(marks, rules=rules, x_title=x_title, y_title=y_title, y_range=limits))
    title = f"How much belief it takes to flip an answer: edits at {get(result, 'site')}"
    return Chart(panes, title, columns=2, share_x=True)


def _heads_of(result: Any) -> Chart:
    scores = get(result, "scores")
    heads = 1 + max(int(get(score, "head").split(".H")[1]) for score in scores)
    columns = {"direct effect (logits)": [read(score, "attribution")[0] for score in scores]}
    for key in get(scores[0], "attention"):
        columns[f"attention {key}"] = [read(get(s, "attention"), key)[0] for s in scores]
    panes = []
    for name, values in columns.items():
        rows = [values[start : start + heads] for start in range(0, len(values), heads)]
        names = [f"L{i}" for i in range(len(rows))], [f"H{i}" for i in range(heads)]
        panes.append(_map(rows, name, name, *names, attention=name.startswith("attention")))
    return Chart(panes, "What every attention head does, on clean held-out prompts", columns=4)


# ---- panes ---------------------------------------------------------------------------------------


def _curve(name: str, x: Any, column: Any, scale: float = 1.0, **look: Any) -> Marks:
    y, lower, upper = (
        [None if value is None else scale * value for value in values]
        for values in zip(*column, strict=True)
    )
    ends = None if all(end is None for end in lower) else lower
    return Marks(name, list(x), y, ends, None if ends is None else upper, **look)


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
        name, colour = looks[key]
        mean = sum(values) / len(values)
        rules = [Rule(0, "x", colour=INK, dash="solid"), Rule(mean, "x", colour=INK, dash="dash")]
        bars = counted(name, values, limits, colour=colour)
        panes.append(
            Pane([bars], rules=rules, x_title=x_title, y_title="Held-out prompts", names="beside")
        )
    return panes


def _before_after(
    x: list[float], columns: Mapping[str, Any], x_title: str, y_title: str,
    names: Mapping[str, str] | None = None, texts: Sequence[str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None, **limits: Any,
) -> Pane:  # fmt: skip
    marks = []
    for index, (key, column) in enumerate(columns.items()):
        y = listed(column)
        if len(y) != len(x):
            raise SettingError(f"{len(x)} numbers before and {len(y)} after; give one a prompt")
        colour, marker = LOOKS[index % len(LOOKS)]
        name = key if names is None else names[key]
        marks.append(Marks(name, x, y, kind="points", colour=colour, marker=marker, size=0.8,
                           opacity=0.55, texts=texts, notes=(notes or {}).get(key)))  # fmt: skip
    rules = [Rule(0, "y", dash="solid"), Rule(0, "x", dash="solid"),
             Rule(0, "diagonal", "unchanged", dash="dash")]  # fmt: skip
    return Pane(
        marks, rules=rules, x_title=x_title, y_title=y_title, square=True, names="corner", **limits
    )


def _map(
    rows: list[list[Any]], title: str, name: str, down: Sequence[str], right: Sequence[str],
    attention: bool = True,
) -> Pane:  # fmt: skip
    low, high = (0.0, 1.0) if attention else (None, None)
    signed = not attention or any(value is not None and value < 0 for row in rows for value in row)
    heat = Heat(rows, down, right, name, diverging=signed, low=None if signed else low,
                high=None if signed else high)  # fmt: skip
    return Pane(heat=heat, title=title)


def _ends(value: Any) -> tuple[float | None, float | None, float | None]:
    if value is None or isinstance(value, int | float):
        return value, None, None
    value, lower, upper = value
    return value, lower, upper
