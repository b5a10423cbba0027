"""The report in a browser: points tell their prompts, choices work, nothing is loaded."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from report_for_tests import HOSTILE, chapters, two_panes, write

from lrqp_torch.plot.chart import Panel
from lrqp_torch.study.report.page import Chapter

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Reader:
    """An open report, with what the browser logged and asked for."""

    page: Any
    logged: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def plot(self, panel: str) -> Any:
        """A figure, unfolded, scrolled to and drawn."""
        self.page.evaluate("name => (document.getElementById(name).open = true)", f"panel-{panel}")
        plot = self.page.locator(f'.plot[data-panel="{panel}"]')
        plot.scroll_into_view_if_needed()
        self.page.wait_for_selector(f'.plot[data-panel="{panel}"][data-state="ready"]')
        return plot

    def point_at(self, panel: str, trace: int, point: int) -> str:
        """Move the pointer to a point of a figure; gives the hover text."""
        plot = self.plot(panel)
        x, y = plot.evaluate(
            """(plot, [trace, point]) => {
                const { xaxis, yaxis } = plot._fullLayout;
                const { x, y } = plot.data[trace];
                const box = plot.getBoundingClientRect();
                const at = (axis, value) => axis._offset + axis.d2p(value);
                return [box.left + at(xaxis, x[point]), box.top + at(yaxis, y[point])];
            }""",
            [trace, point],
        )
        self.page.mouse.move(x - 40, y - 40)
        self.page.mouse.move(x, y, steps=4)
        # On its way the pointer may have passed other points, whose label comes first.
        self.page.wait_for_function(
            """([panel, trace, point]) => {
                const plot = document.querySelector(`.plot[data-panel="${panel}"]`);
                const [found] = plot._hoverdata ?? [];
                return found?.curveNumber === trace && found.pointNumber === point;
            }""",
            arg=[panel, trace, point],
        )
        text: str = plot.locator(".hoverlayer .hovertext").first.text_content()
        return text

    def width(self) -> int:
        """Width of the page in pixels, what must be scrolled sideways included."""
        width: int = self.page.evaluate("document.documentElement.scrollWidth")
        return width


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("report"))


@pytest.fixture
def read(browser: Any, report: Path) -> Iterator[Any]:
    """Opens the report; at the end, nothing may have gone wrong or been asked for."""
    readers = []

    def open_report(width: int = 1280, height: int = 900, **options: Any) -> Reader:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        reader = Reader(context.new_page())
        reader.page.on("console", lambda message: reader.logged.append(message.text))
        reader.page.on("pageerror", lambda error: reader.logged.append(str(error)))
        reader.page.on("request", lambda request: reader.requests.append(request.url))
        reader.page.goto(report.as_uri())
        readers.append(reader)
        return reader

    yield open_report
    for reader in readers:
        reader.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        reader.page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every(plot => plot.dataset.state === 'ready')"
        )
        assert reader.logged == []
        assert reader.requests == [report.as_uri()]
        assert reader.page.evaluate("window.broken") is None
        reader.page.context.close()


def test_a_point_tells_its_prompt(read: Any) -> None:
    reader = read()
    text = reader.point_at("flipping-answers", trace=1, point=20)
    for words in (
        "John went out 20",
        "IO: Mary",
        "IO 2, S1 4, S2 9, END 13",
        "Mary (IO) → John (S)",
    ):
        assert words in text
    assert "counterfactual edit: 100.0 % flipped" in text


def test_a_hostile_prompt_is_shown_as_it_is(read: Any) -> None:
    reader = read()
    shown = reader.point_at("flipping-answers", trace=1, point=0)
    assert HOSTILE[0].replace(" ", "") in shown.replace(" ", "")
    assert reader.page.locator(".hoverlayer script, .hoverlayer img").count() == 0


def test_a_site_of_the_sweep_tells_its_numbers(read: Any) -> None:
    reader = read()
    assert "L1.mid: 99.0 %" in reader.point_at("flipping-sweep", trace=0, point=1)


def test_choosing_a_site_changes_the_figure_by_mouse_or_keyboard(read: Any) -> None:
    reader = read()
    plot = reader.plot("flipping-answers")
    heights = "plot => plot.data[1].y.slice(0, 3)"
    first = plot.evaluate(heights)
    select = reader.page.get_by_label("Site", exact=True)
    select.select_option(label="L0.pre")
    reader.page.wait_for_selector('.plot[data-panel="flipping-answers"][data-state="ready"]')
    second = plot.evaluate(heights)
    assert second == [-y for y in first] != first
    assert "L0.pre" in plot.get_attribute("aria-label")
    select.focus()
    reader.page.keyboard.press("ArrowDown")
    reader.page.wait_for_function(
        "document.querySelectorAll('.plot')[2].data[1].y.slice(0, 3).every(y => y === 0)"
    )
    assert "L1.mid" in plot.get_attribute("aria-label")


def test_tables_sort_both_ways_with_missing_values_last(read: Any) -> None:
    reader = read()
    panel = reader.page.locator("#panel-heads-table")
    panel.locator("summary").first.click()
    button = panel.get_by_role("button", name="score")

    def column() -> list[str]:
        cells: list[str] = panel.locator("tbody tr td:nth-child(2)").all_inner_texts()
        return cells

    button.focus()
    reader.page.keyboard.press("Enter")
    assert column() == ["−3.25", "0.50", "–"]
    assert panel.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    button.click()
    assert column() == ["0.50", "−3.25", "–"]
    assert panel.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    panel.get_by_role("button", name="head").click()
    assert panel.locator("tbody td:first-child").all_inner_texts() == ["L1.H2", "L2.H0", "L10.H1"]
    assert panel.locator("th[aria-sort]").count() == 1


def test_the_numbers_of_a_plot_are_those_chosen(read: Any) -> None:
    reader = read()
    reader.plot("flipping-answers")
    numbers = reader.page.locator('details.numbers[data-panel="flipping-answers"]')
    assert numbers.locator("table").count() == 0
    numbers.locator("summary").click()
    numbers.locator("table").wait_for()
    heads = numbers.locator("th").all_inner_texts()
    assert heads[0] == "curve" and "logit difference" in heads[1]
    rows = numbers.locator("tbody tr")
    assert rows.count() == 80
    best = numbers.locator("tbody tr").last.inner_text()
    reader.page.get_by_label("Site", exact=True).select_option(label="L1.mid")
    reader.page.wait_for_function(
        """last => {
            const rows = document.querySelectorAll('[data-panel="flipping-answers"] tbody tr');
            return rows[rows.length - 1]?.innerText !== last;
        }""",
        arg=best,
    )
    assert rows.count() == 80


def test_the_first_screen_answers_and_the_rest_is_folded(browser: Any, tmp_path: Path) -> None:
    """Sweep, histogram and the first answers on one screen, and ten screens with nine chapters."""
    says = ["It was found so, at these sites and at no other one, as the control edits show."] * 3
    more = [
        Chapter(f"Part {index}", "What is asked here? " * 8, says, [
            Panel(f"p{index}-{n}", f"Plot {n}", "Seen. " * 60, {"": two_panes()}) for n in range(3)
        ])
        for index in range(9)
    ]  # fmt: skip
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(write(tmp_path, chapters()[0], *more).as_uri())
    for panel in ("flipping-sweep", "flipping-histogram"):
        page.wait_for_selector(f'.plot[data-panel="{panel}"][data-state="ready"]')
        box = page.locator(f'.plot[data-panel="{panel}"]').bounding_box()
        assert box["y"] + box["height"] < 800
    assert page.locator("#summary .findings li").first.bounding_box()["y"] < 800
    assert page.evaluate("document.querySelectorAll('details.panel[open]').length") == 1
    assert page.evaluate("document.documentElement.scrollHeight") <= 10 * 800
    page.close()


def test_every_plot_has_a_caption_and_its_numbers_in_words(read: Any) -> None:
    page = read().page
    captions = page.locator("figcaption .number").all_text_contents()
    plots = page.locator(".plot")
    assert captions == [f"Figure {n}." for n in range(1, plots.count() + 1)] != []
    for plot in plots.all():
        numbers = page.locator(f"#{plot.get_attribute('aria-details')}")
        assert numbers.count() == 1 and plot.get_attribute("aria-label")


def test_a_link_unfolds_its_panel(read: Any) -> None:
    reader = read()
    panel = reader.page.locator("#panel-heads-panes")
    assert panel.get_attribute("open") is None
    reader.page.get_by_role("link", name="Two panes").click()
    reader.page.wait_for_selector('.plot[data-panel="heads-panes"][data-state="ready"]')
    assert panel.get_attribute("open") is not None


def test_paper_has_every_plot_and_the_headings_of_tables(read: Any) -> None:
    reader = read(color_scheme="dark")
    reader.plot("flipping-sweep")
    reader.page.emulate_media(media="print")
    reader.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    reader.page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(plot => plot.dataset.state === 'ready')"
    )
    for panel in ("flipping-sweep", "flipping-answers", "heads-panes"):
        plot = reader.page.locator(f'.plot[data-panel="{panel}"]')
        assert plot.is_visible() and plot.evaluate("plot => plot._fullLayout.width") == 680
    assert not reader.page.locator("select").first.is_visible()
    head = reader.page.locator("#panel-heads-table thead")
    # A button would not be painted where the heading is repeated on the next page.
    assert head.locator("button:visible").count() == 0
    assert head.locator(".paper:visible").all_inner_texts() == ["head <i>", "score", "note"]
    chosen = reader.page.locator("#panel-flipping-answers .chosen")
    assert chosen.inner_text().startswith("Site: L2.pre (flips most); on a screen there are 2")
    assert head.evaluate("e => getComputedStyle(e).display") == "table-header-group"
    assert luminance(reader.page.evaluate("getComputedStyle(document.body).color")) < 0.2
    reader.page.emulate_media(media="screen")
    reader.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert reader.page.locator("#panel-heads-panes").get_attribute("open") is None


def test_a_phone_needs_no_sideways_scrolling(read: Any) -> None:
    reader = read(width=390, height=844, has_touch=True, is_mobile=True)
    for panel in ("flipping-sweep", "flipping-answers"):
        plot = reader.plot(panel)
        box = plot.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert plot.evaluate("plot => plot._fullLayout.width") == pytest.approx(box["width"], abs=1)
        # A figure that took the finger's movement would trap the page.
        assert plot.evaluate("plot => plot._fullLayout.dragmode") is False
    histogram = reader.plot("flipping-histogram")
    edge = histogram.bounding_box()["x"] + histogram.bounding_box()["width"]
    names = [name.bounding_box() for name in histogram.locator(".annotation-text").all()]
    assert len(names) == 3 and all(name["x"] + name["width"] <= edge for name in names)
    assert reader.width() == 390
    assert "John went out" in reader.point_at("flipping-answers", trace=1, point=20)


BOXES = """plot => ["x", "x2"].map((name, index) => {
    const box = plot.querySelectorAll(".plotly .subplot .gridlayer")[index].getBoundingClientRect();
    return [box.left, box.right, box.top, box.bottom];
})"""


def test_panes_stand_side_by_side_where_there_is_room(read: Any) -> None:
    wide = read().plot("heads-panes").evaluate(BOXES)
    assert wide[0][1] < wide[1][0] and wide[0][2] == pytest.approx(wide[1][2], abs=2)
    narrow = read(width=390, height=844).plot("heads-panes").evaluate(BOXES)
    assert narrow[0][3] < narrow[1][2] and narrow[0][0] == pytest.approx(narrow[1][0], abs=2)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("panel", ["flipping-sweep", "flipping-answers", "heads-panes"])
def test_legends_lie_within_their_figure(read: Any, width: int, panel: str) -> None:
    plot = read(width=width).plot(panel)
    outer, legend = plot.bounding_box(), plot.locator(".legend").bounding_box()
    for start, size in (("x", "width"), ("y", "height")):
        assert legend[start] >= outer[start] - 1
        assert legend[start] + legend[size] <= outer[start] + outer[size] + 1


def test_a_narrower_window_is_followed(read: Any) -> None:
    reader = read()
    plot = reader.plot("flipping-answers")
    assert plot.get_attribute("data-narrow") == "false"
    reader.page.set_viewport_size({"width": 390, "height": 844})
    reader.page.wait_for_selector('.plot[data-panel="flipping-answers"][data-narrow="true"]')
    reader.page.wait_for_selector('.plot[data-panel="flipping-answers"][data-state="ready"]')
    assert reader.width() == 390


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` as WCAG 2 defines it."""
    channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(reader: Reader) -> dict[str, float]:
    """Contrast of texts to the surface that they stand on; WCAG asks for 4.5."""
    surface = reader.page.locator(".panel").first.evaluate(
        "e => getComputedStyle(e).backgroundColor"
    )
    behind = luminance(surface)
    found = {}
    for selector, css in (
        (".panel p", "color"),
        (".panel th", "color"),
        (".plot .ytick text", "fill"),
        (".plot .legendtext", "fill"),
    ):
        colour = reader.page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{css}")
        one, two = sorted((luminance(colour), behind))
        found[selector] = (two + 0.05) / (one + 0.05)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read_and_exchanged(read: Any, scheme: str) -> None:
    reader = read(color_scheme=scheme)
    reader.plot("flipping-sweep")
    background = "getComputedStyle(document.body).backgroundColor"
    before = reader.page.evaluate(background)
    assert (luminance(before) < 0.2) is (scheme == "dark")
    assert min(contrast(reader).values()) > 4.5
    toggle = reader.page.locator("#theme")
    assert toggle.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    toggle.click()
    reader.page.wait_for_selector('.plot[data-panel="flipping-sweep"][data-state="ready"]')
    assert (luminance(reader.page.evaluate(background)) < 0.2) is (scheme == "light")
    assert min(contrast(reader).values()) > 4.5
    reader.page.reload()
    # On a busy machine what was chosen may be there a moment after the page.
    reader.page.wait_for_function(f"{background} !== {before!r}")
    reader.requests.pop()
