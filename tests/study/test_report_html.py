"""The report as a file: complete, self-contained, and safe with any text in it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from report_for_tests import (
    HOSTILE,
    SITES,
    N,
    prompt_tensors,
    sections,
    study_results,
    texts,
    write,
)
from rich.console import Console

from benchmarks.organisms.prompts import build_tokenizer
from lrqp_torch.errors import MissingExtraError, OutputError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.study import html, summary
from lrqp_torch.study.drawing import as_interval, signed
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.html import Section, write_report
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.panel import Panel, Table
from lrqp_torch.study.parts.flipping import PART as FLIPPING
from lrqp_torch.study.prompt_texts import PromptTexts
from lrqp_torch.study.report import print_summary
from lrqp_torch.study.results import GroundTruth


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def data(page: Page) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(page.scripts[0])
    return parsed


def figure(data: dict[str, Any], panel: str, choice: int) -> dict[str, Any]:
    """A figure with its shared arrays in place."""

    def expand(value: Any) -> Any:
        if isinstance(value, list):
            return [expand(item) for item in value]
        if isinstance(value, dict):
            if "$shared" in value:
                return data["shared"][value["$shared"]]
            return {key: expand(item) for key, item in value.items()}
        return value

    expanded: dict[str, Any] = expand(data["figures"][panel][choice])
    return expanded


def test_the_file_needs_nothing_else(page: Page, text: str) -> None:
    assert len(text) < 10_000_000
    for _, attributes in page.elements:
        assert "src" not in attributes
        target = attributes.get("href") or "#"
        assert target.startswith(("#", "data:"))
    assert not re.search(r"@import|url\(", text[: text.index("</style>")])
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_every_part_can_be_reached_from_the_contents(page: Page) -> None:
    names = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    targets = {str(link["href"])[1:] for link in page.all("a")}
    assert targets <= names
    assert {"flipping-the-answer", "panel-flipping-sweep", "heads", "panel-heads-table"} <= targets
    assert len(names) == len([1 for _, attributes in page.elements if "id" in attributes])


def test_figures_and_choices_have_names(page: Page) -> None:
    plots = page.all("div", role="img")
    assert [plot["aria-label"] for plot in plots] == [
        "What can be read, and what is used",
        "Every held-out prompt, before and after the edit",
        "Two panes",
    ]
    titles = {heading["id"] for heading in page.all("h3") if "id" in heading}
    assert {panel["aria-labelledby"] for panel in page.all("figure")} == titles
    select = page.all("select")[0]
    assert page.all("label") == [{"for": select["id"]}]
    assert [option["value"] for option in page.all("option")] == ["0", "1", "2"]


def test_no_text_becomes_markup(page: Page, data: dict[str, Any]) -> None:
    for tag in ("img", "b", "i", "u", "em"):
        assert not page.all(tag)
    assert len(page.scripts) == 3
    words = " ".join(page.words)
    for shown in ("<b>tiny</b>", "<i>none</i>", "<u>c</u>", "head <i>", "Second, with <em>."):
        assert shown in words
    hovers = figure(data, "flipping-answers", 0)["data"][0]["hovertext"]
    for row, hostile in enumerate(HOSTILE):
        tags = set(re.findall(r"<[^>]*>", hovers[row]))
        assert tags <= {"<br>", "<b>", "</b>"}
        plain = re.sub(r"</?b>", "", hovers[row]).replace("<br>", " ")
        escaped = hostile.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert plain.startswith(escaped)


def test_a_point_tells_its_prompt_positions_and_answers(data: dict[str, Any]) -> None:
    best = figure(data, "flipping-answers", 0)
    assert "L2.pre" in best["label"]
    control, counterfactual = best["data"]
    assert "<b>John</b>" in control["hovertext"][5] and "<b>Mary</b>" in control["hovertext"][5]
    for words in ("IO: Mary", "S: John", "tokens: IO 2, S1 4, S2 9, END 13"):
        assert words in control["hovertext"][5]
    assert "answer: Mary (IO) → Mary (IO)" in str(control["customdata"])
    assert "answer: Mary (IO) → John (S)" in str(counterfactual["customdata"])
    clean = prompt_tensors()["clean.logit_difference"]
    assert control["x"] == pytest.approx(clean.tolist(), rel=1e-5)
    assert counterfactual["y"] == pytest.approx((-clean).tolist(), rel=1e-5)


def test_axes_are_the_same_at_every_site(data: dict[str, Any]) -> None:
    layouts = [figure(data, "flipping-answers", index)["layout"] for index in range(len(SITES))]
    for axis in ("xaxis", "yaxis"):
        assert len({tuple(layout[axis]["range"]) for layout in layouts}) == 1


def test_prompts_are_stored_once(data: dict[str, Any]) -> None:
    holding = [array for array in data["shared"] if "END 13" in str(array)]
    assert len(holding) == 1 and len(holding[0]) == N


def test_many_prompts_are_not_all_drawn() -> None:
    many, tensors = texts(), prompt_tensors()
    times = 20
    more = PromptTexts(
        many.prompts * times,
        many.held * times,
        many.other * times,
        {name: column * times for name, column in many.positions.items()},
    )
    tensors = {name: column.repeat(times) for name, column in tensors.items()}
    clean = replace(study_results().clean, prompts=20 * N)
    found = replace(study_results(), clean=clean, prompts=tensors, texts=more)
    panel = FLIPPING.panels(FLIPPING.found(found))[-1]
    assert {len(marks.x) for marks in panel.charts["L1.mid"].panes[0].marks} == {500}
    assert "The first 500 prompts are drawn." in panel.text


def test_the_end_tells_how_to_make_it_again(page: Page) -> None:
    words = " ".join(page.words)
    expected = "lrqp reproduce --model organism --n 80 --prefixes '<i>none</i>' --seed 7"
    for shown in (expected, "2.x", "seed", "7", "1.5"):
        assert shown in words


def test_the_command_names_the_folder_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my runs").mkdir()
    words = Page(write(Path("my runs")).read_text(encoding="utf-8")).words
    assert any(word.endswith("--seed 7 --out 'my runs'") for word in words)
    out = summary.command(study_results(), Path("/data/run"))
    assert out.endswith("--out /data/run")


def test_the_summary_sets_published_figures_beside_the_own(page: Page) -> None:
    words = " ".join(page.words)
    for shown in ("+2.50", "+3.56", "99.3\u00a0%", "−2.50", "−0.99", "at L2.pre."):
        assert shown in words
    assert "Readable" in words and "at L1.mid to L2.pre;" in words


def test_the_summary_says_when_the_truth_is_missed() -> None:
    wrong = replace(study_results(), ground_truth=GroundTruth(["L1.mid"], [], False))
    assert any("DISAGREES" in line for line in summary.findings(wrong))
    failing = replace(wrong.sites["L2.pre"].control, infeasible=3)
    sites = wrong.sites | {"L2.pre": replace(wrong.sites["L2.pre"], control=failing)}
    assert any("3 edits" in line for line in summary.findings(replace(wrong, sites=sites)))


def test_a_study_without_a_sweep_has_a_summary_too(tmp_path: Path) -> None:
    bare = replace(study_results(), sites={}, used_sites=[], best_site=None)
    assert len(summary.key_figures(bare)) == 3
    write_report(tmp_path / "report.html", bare, [])
    assert "prompts answered IO" in (tmp_path / "report.html").read_text()


def test_tables_show_numbers_alike_and_sort_by_their_value(page: Page) -> None:
    cells = {str(cell["data-value"]) for cell in page.all("td") if "data-value" in cell}
    assert {"-3.25", "0.5", "L10.H1"} <= cells
    words = [word.strip() for word in page.words]
    assert "−3.25" in words and "0.50" in words and "–" in words
    assert html._as_text([0.001, 0.0, None]) == ["1.0e−03", "0.0e+00", "–"]
    assert html._as_text([99.95, 0.0, -1.0]) == ["100.0", "0.0", "−1.0"]
    assert html._as_text([-0.04, 30.0]) == ["0.0", "30.0"]
    assert html._as_text([12, None, "a"]) == ["12", "–", "a"]
    for heading in page.all("th", scope="col"):
        assert "aria-sort" not in heading


def test_arrays_keep_their_objects_and_their_missing_values(tmp_path: Path) -> None:
    many = go.Figure([go.Scatter(y=[1.0, None, float("nan")]) for _ in range(40)])
    for index in range(40):
        many.add_annotation(x=0, y=index, text="note", font={"color": "#222222"})
    heat = go.Figure(go.Heatmap(z=[[row + column / 7 for column in range(50)] for row in range(3)]))
    panel = Panel("odd", "Odd", "", figures={"many": many, "heat": heat}, choice="figure")
    path = tmp_path / "report.html"
    write_report(path, study_results(), [Section("Odd", "", [panel])])
    data = json.loads(Page(path.read_text()).scripts[0])
    first = figure(data, "odd", 0)
    assert len(first["data"]) == len(first["layout"]["annotations"]) == 40
    assert first["data"][39]["y"] == [1.0, None, None]
    z = figure(data, "odd", 1)["data"][0]["z"]
    assert [len(row) for row in z] == [50] * 3 and z[2][7] == 3.0


def test_plotly_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lrqp_torch\[report\]"):
        write_report(tmp_path / "report.html", study_results(), [])


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        write_report(tmp_path / "nowhere" / "report.html", study_results(), sections())


def test_a_table_may_be_empty(tmp_path: Path) -> None:
    panel = Panel("none", "None", "", table=Table(("a", "b"), ()))
    write_report(tmp_path / "report.html", study_results(), [Section("None", "", [panel])])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_tokens_of_the_prompt(tmp_path: Path, side: Any) -> None:
    tokenizer = build_tokenizer([])
    data = IOIPrompts.of(
        IOIDataset.generate(tokenizer, 20, seed=2, prefixes="bundled", padding_side=side)
    )
    found = PromptTexts.of(data)
    for row, prompt in enumerate(found.prompts):
        tokens = tokenizer(prompt).input_ids
        for name, expected in (
            ("IO", data.io_tokens),
            ("S1", data.s_tokens),
            ("S2", data.s_tokens),
        ):
            assert tokens[found.positions[name][row] - 1] == expected[row]
        assert found.positions["END"][row] == len(tokens)
    found.save(tmp_path)
    assert PromptTexts.load(tmp_path) == found
    path = tmp_path / "prompts.json"
    path.write_text(path.read_text().replace('"held"', '"names"'))
    with pytest.raises(OutputError, match="cannot read the prompts"):
        PromptTexts.load(tmp_path)


def test_the_terminal_and_the_report_write_minus_signs() -> None:
    results = study_results()
    down, flat = (
        replace(results.sites["L2.pre"].control, logit_difference=Estimate(value, value, value, N))
        for value in (-8.1, -0.001)
    )
    site = replace(results.sites["L2.pre"], counterfactual=down, control=flat)
    console = Console(width=100, record=True, file=StringIO())
    print_summary(replace(results, sites={"L2.pre": site}), console)
    printed = console.export_text()
    assert "−8.10" in printed and " +0.00 " in printed and "1e−06" in printed
    assert "-8" not in printed and "−0.00" not in printed
    assert summary.signed(-0.001) == "+0.00" == signed(-0.001)
    assert as_interval([-0.001, 0.5]) == "0.00 to 0.50"
    assert not re.search(r"\d%", " ".join(summary.findings(results)))
