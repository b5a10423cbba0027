"""Every kind of chart, in each of its three forms: plotly, matplotlib, and a table."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from lrqp_torch.errors import MissingExtraError
from lrqp_torch.plot import static
from lrqp_torch.plot.cards import card
from lrqp_torch.plot.chart import (
    BLUE,
    Band,
    Chart,
    Heat,
    Marks,
    Pane,
    Rule,
    counted,
    edges,
    marks_of,
    strong,
)
from lrqp_torch.plot.interactive import to_plotly
from lrqp_torch.plot.layout import cells
from lrqp_torch.plot.static import to_matplotlib, write_charts

go = pytest.importorskip("plotly.graph_objects")

SITES = ["L0.pre", "L1.mid", "L2.pre"]
CURVE = Marks("probe", SITES, [50.0, None, 99.0], [40.0, None, 95.0], [60.0, None, 99.5])
SOME = Marks("edit", SITES[1:], [3.0, 4.0], marker="square", dash="dash", colour=BLUE)
SWEEP = Pane([SOME, CURVE], rules=[Rule(50, name="chance")], bands=[Band("L1.mid", "L2.pre")],
             places=SITES, y_title="Prompts (%)", names="ends")  # fmt: skip
POINTS = Pane(
    [Marks("a", [1.0, 2.0], [3.0, 5.0], kind="points", texts=["<b>x</b> & y", strong("who")])],
    rules=[Rule(0, "diagonal", "same"), Rule(1, "x")],
    square=True,
    names="corner",
    x_title="before",
    y_title="after",
)
BARS = Pane(
    [
        Marks("in", ["p", "q"], [1.0, 2.0], [0.5, 1.0], [1.5, 2.5], kind="bars", labels=["1", "2"]),
        Marks("out", ["p", "q"], [3.0, 4.0], kind="bars", colour=BLUE),
    ],
    horizontal=True,
    rules=[Rule(2)],
    x_title="space",
    y_title="effect",
)
MAP = Pane(
    heat=Heat([[1.0, None], [-2.0, 0.5]], ["L0", "L1"], ["H0", "H1"], "effect", diverging=True,
              texts=[["1", "–"], ["−2", "½"]], framed=[(0, 1)], crossed=[(1, 0)], gaps=[1]),
    x_title="head", y_title="layer",
)  # fmt: skip
COUNTS = Pane([counted("one", [0.0, 0.1, 1.0], edges([0.0, 1.0], 4), opacity=0.5)], names="beside")
LOGS = Pane(
    [
        Marks("front", [0.01, 0.1, 1.0], [1.0, 2.0, 3.0], kind="steps", opacity=0.1),
        Marks("c", [0.01, 1.0], [1.0, 2.0], x_lower=[0.005, 0.9], x_upper=[0.02, 1.1]),
        Marks("tick", [0.1], [1.0], kind="points", marker="tick"),
    ],
    x_log=True,
    x_range=(0.001, 10.0),
)
EVERY = {"sweep": SWEEP, "points": POINTS, "bars": BARS, "map": MAP, "counts": COUNTS, "logs": LOGS}


@pytest.mark.parametrize("name", EVERY)
def test_every_pane_is_drawn_by_both_libraries(name: str, tmp_path: Path) -> None:
    chart = Chart([EVERY[name]], "A title", "and what it is of")
    paths = write_charts({name: chart}, tmp_path)
    assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg"]
    assert all(path.stat().st_size > 1000 for path in paths)
    # plotly checks every field and value of the figure.
    figure = go.Figure(to_plotly(chart))
    assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)" and figure.layout.height > 100
    assert figure.layout.title.text == "A title"


def test_equal_charts_make_equal_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_charts({"all": Chart(list(EVERY.values()), "All", columns=3)}, folder)
    for name in ("all.png", "all.svg"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert b"<dc:date>" not in (first / "all.svg").read_bytes()


def test_places_keep_their_order_and_gaps() -> None:
    figure = to_plotly(Chart([SWEEP]), alone=False)
    edit, probe = figure["data"]
    assert figure["layout"]["xaxis"]["ticktext"] == SITES
    assert edit["x"] == [1.0, 2.0] and probe["x"] == [0.0, 1.0, 2.0]
    assert probe["y"] == [50.0, None, 99.0]
    assert probe["error_y"]["arrayminus"] == [10.0, 0.0, 4.0]
    assert probe["customdata"][0] == "L0.pre: 50.0 % (40.0 % to 60.0 %)"
    assert edit["marker"]["symbol"] == "square" and edit["line"]["dash"] == "dash"
    band = next(shape for shape in figure["layout"]["shapes"] if shape["type"] == "rect")
    assert (band["x0"], band["x1"]) == (0.5, 2.5)
    axes = to_matplotlib(Chart([SWEEP])).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == SITES
    assert {text.get_text() for text in axes.texts} >= {"chance", "probe", "edit"}


def test_many_sites_are_named_by_layer() -> None:
    many = [f"L{layer}.{kind}" for layer in range(40) for kind in ("pre", "mid")]
    chart = Chart([Pane([Marks("a", many, [0.0] * len(many))])])
    shown = to_plotly(chart)["layout"]["xaxis"]["ticktext"]
    assert len(shown) <= 16 and all(name.endswith(".pre") for name in shown)
    ticks = to_matplotlib(chart).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == shown


def test_a_horizontal_pane_is_an_upright_one_turned() -> None:
    (one, _), turned = to_plotly(Chart([BARS]))["data"], to_plotly(Chart([BARS]))
    up = to_plotly(Chart([replace(BARS, horizontal=False)]))["data"][0]
    assert (one["orientation"], up["orientation"]) == ("h", "v")
    assert (one["x"], one["y"]) == (up["y"], up["x"])
    assert one["error_x"]["array"] == up["error_y"]["array"] == [0.5, 0.5]
    assert turned["layout"]["yaxis"]["range"] == [1.6, -0.6]
    assert turned["layout"]["yaxis"]["title"]["text"] == "space"
    # The rule at a value of 2 stands upright.
    assert turned["layout"]["shapes"][0]["x0"] == turned["layout"]["shapes"][0]["x1"] == 2
    axes = to_matplotlib(Chart([BARS])).axes[0]
    assert axes.get_xlabel() == "effect" and axes.get_ylim() == (1.6, -0.6)


def test_bars_at_the_same_places_stand_side_by_side() -> None:
    (cell,) = cells(Chart([BARS]))
    (first, width), (second, _) = cell.bars().values()
    assert first == -second and second - first > width
    apart = Pane([Marks("", ["p"], [1.0], kind="bars"), Marks("", ["q"], [1.0], kind="bars")])
    assert {shift for shift, _ in cells(Chart([apart]))[0].bars().values()} == {0.0}


def test_a_histogram_counts_every_value_once() -> None:
    limits = edges([0.0, 1.0, 0.5, 2.0], 4)
    marks = counted("a", [0.0, 0.5, 1.0, 1.9, 2.0], limits)
    assert limits == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert marks.y == [1.0, 1.0, 1.0, 2.0] and marks.x == [0.25, 0.75, 1.25, 1.75]
    assert edges([3.0, 3.0], 2) == [3.0, 3.5, 4.0]


def test_no_text_is_read_as_markup() -> None:
    hostile = "<img src=x onerror=alert(1)>\nnext"
    pane = Pane(
        [replace(POINTS.marks[0], name=hostile), replace(SOME, name=hostile, x=[1.0, 2.0])],
        title=hostile, x_title=hostile, rules=[Rule(0, name=hostile)], note=hostile,
    )  # fmt: skip
    heat = replace(MAP.heat, name=hostile, rows=[hostile, "b"]) if MAP.heat else None
    figure = to_plotly(Chart([pane, Pane(heat=heat)], hostile, hostile))
    assert "<img" not in str(figure) and "&lt;img" in str(figure)
    first = figure["data"][0]
    assert first["hovertext"] == ["&lt;b&gt;x&lt;/b&gt; &amp; y", "<b>who</b>"]


def test_the_table_holds_all_numbers() -> None:
    table = Chart([SWEEP]).table()
    assert table.columns == ["place", "edit", "probe", "probe, lower 95 %", "probe, upper 95 %"]
    assert table.rows[0] == ["L0.pre", None, 50.0, 40.0, 60.0]
    assert table.rows[1] == ["L1.mid", 3.0, None, None, None]
    both = Chart([POINTS, replace(MAP, title="map")]).table()
    assert both.columns[:4] == ["pane", "curve", "before", "after"]
    assert both.rows[1][:4] == ["after", "a", 2.0, 5.0]
    assert both.rows[-1][0] == "map" and both.rows[-1][-2:] == [-2.0, 0.5]


def test_colours_are_those_asked_for_and_seen_on_any_page() -> None:
    lines = to_matplotlib(Chart([SWEEP])).axes[0].lines
    assert BLUE.lower() in {to_hex(line.get_color()) for line in lines}
    black = Chart([Pane([Marks("a", [1.0], [1.0], colour="#000000")])])
    assert "#000000" not in str(to_plotly(black)) and "#000000" in str(
        to_plotly(black, alone=False)
    )


def test_shared_axes(tmp_path: Path) -> None:
    chart = Chart([SWEEP, SWEEP, SWEEP, SWEEP], columns=2, share_x=True, share_y=True)
    layout = to_plotly(chart)["layout"]
    assert layout["xaxis3"]["matches"] == "x" and layout["yaxis4"]["matches"] == "y3"
    assert layout["xaxis"]["showticklabels"] is False and "showticklabels" not in layout["yaxis"]
    names = [trace["showlegend"] for trace in to_plotly(chart)["data"]]
    assert sum(names) == 2, "each name once"
    grid = to_matplotlib(chart).axes
    assert grid[0].get_shared_x_axes().joined(grid[0], grid[2])
    assert marks_of("a", [1.0, 2.0], [0.5, None], scale=100).y == [50.0, None]


def test_matplotlib_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = lambda name: None  # noqa: E731
    monkeypatch.setattr(static, "find_spec", missing)
    with pytest.raises(MissingExtraError, match=r"lrqp_torch\[plots\]"):
        to_matplotlib(Chart([SWEEP]))


def test_a_card_shows_numbers_and_runs_nothing() -> None:
    shown = card("<b>LRQP</b>", {"K": 2, "site": None, "a<b": "</td><script>"}, [1.0, 1.0, 3.0])
    page = Reader()
    page.feed(shown)
    assert page.tags & {"script", "b"} == set() and "a<b" in page.said
    assert "site" not in page.said and shown.count("<rect") == 2
    assert 'aria-label="lengths of 3, from 1 to 3"' in shown


class Reader(HTMLParser):
    """The tags of some HTML, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.said = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.said += data


def test_names_of_points_and_lines_keep_clear_of_what_is_drawn() -> None:
    """Two points at one place are named apart, and a line where no curve runs."""
    twins = Marks("", [0.5, 0.5], [0.5, 0.5], kind="points", labels=["L0.H0", "L0.H1"])
    ends = Marks("", [0.0, 1.0], [0.0, 1.0], kind="points")
    drawn = to_plotly(Chart([Pane([twins, ends])]))
    assert drawn["data"][0]["textposition"] == ["top right", "bottom right"]
    above = Marks("curve", [0.0, 5.0, 10.0], [52.0, 52.0, 52.0])
    rules = [Rule(50, name="chance"), Rule(53, name="ceiling")]
    chart = Chart([Pane([above], rules=rules, y_range=(0.0, 100.0))])
    sides = [(note["text"], note["yanchor"]) for note in to_plotly(chart)["layout"]["annotations"]]
    assert sides == [("chance", "top"), ("ceiling", "bottom")]
    texts = {text.get_text(): text.get_va() for text in to_matplotlib(chart).axes[0].texts}
    assert texts == {"chance": "top", "ceiling": "bottom"}
