"""The report as a file: complete, self-contained, and safe with any text in it."""

import gzip
import hashlib
import json
import re
from base64 import b64decode, b64encode
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_for_tests import (
    HOSTILE,
    SITES,
    N,
    number,
    prompt_tensors,
    study_results,
    sweep_panels,
    texts,
    write,
)
from rich.console import Console

from benchmarks.organisms.prompts import build_tokenizer
from lrqp_torch.errors import MissingExtraError, OutputError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.plot.chart import Chart, Heat, Marks, Pane, Panel, Table
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.parts import find_part
from lrqp_torch.study.parts.flipping import sites_table
from lrqp_torch.study.report import page as report_page
from lrqp_torch.study.report import print_summary, terminal, write_report
from lrqp_torch.study.report.page import Chapter, as_text, lead
from lrqp_torch.study.results import GroundTruth, PromptTexts, StudyResults
from lrqp_torch.study.showing import signed


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


def said(results: StudyResults) -> list[str]:
    flipping = find_part("flipping")
    return [*flipping.says(flipping.found(results))]


def unpacked(script: str) -> str:
    return gzip.decompress(b64decode(script)).decode()


@pytest.fixture(scope="module")
def data(page: Page) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(unpacked(page.scripts[0]))
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
    assert len(text) < 2_500_000
    for _, attributes in page.elements:
        assert "src" not in attributes
        target = attributes.get("href") or "#"
        assert target.startswith(("#", "data:"))
    assert not re.search(r"@import|url\(", text[: text.index("</style>")])
    assert "plotly.js v" in unpacked(page.scripts[1])


def test_only_its_own_scripts_may_run(page: Page) -> None:
    policy = str(page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"])
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    rule = next(rule for rule in policy.split("; ") if rule.startswith("script-src"))
    for code in (page.scripts[2], unpacked(page.scripts[1])):
        digest = b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rule
    assert "unsafe-inline" not in rule


def test_every_part_can_be_reached_from_the_contents(page: Page) -> None:
    names = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    targets = {str(link["href"])[1:] for link in page.all("a")}
    assert targets <= names
    assert {"flipping-the-answer", "panel-flipping-answers", "panel-heads-table"} <= targets
    assert len(names) == len([1 for _, attributes in page.elements if "id" in attributes])


def test_plots_have_names_choices_and_numbers(page: Page) -> None:
    plots = page.all("div", role="img")
    assert [plot["aria-label"] for plot in plots] == [
        "What can be read, and what is used",
        "The answers under the edit at L2.pre",
        "Every held-out prompt, before and after the edit",
        "Two panes",
    ]
    titles = {heading["id"] for heading in page.all("h3") if "id" in heading}
    assert {panel["aria-labelledby"] for panel in page.all("figure")} == titles
    assert len(page.all("figcaption")) == len(page.all("figure"))
    numbers = [box["data-panel"] for box in page.all("details", class_="numbers")]
    assert numbers == [plot["data-panel"] for plot in plots]
    select = page.all("select")[0]
    assert page.all("label") == [{"for": select["id"]}]
    assert [option["value"] for option in page.all("option")] == ["0", "1", "2"]


def test_what_is_not_asked_for_is_folded(page: Page) -> None:
    panels = page.all("details", class_="panel")
    assert ["open" in panel for panel in panels] == [True, False, False]
    # A table is open where nothing else is shown.
    assert ["open" in table for table in page.all("details", class_="table")] == [False, True]
    assert "L0.H0, L0.H1, L0.H2 and 33 more" in " ".join(page.words)
    shown, rest = lead("First. Second one. " + "Third is long. " * 20)
    assert shown.startswith("First. Second one.") and len(shown) <= 240 and "Third" in rest
    assert lead("Short.") == ("Short.", "")
    assert lead("One; two; three.", most=10) == ("One; two …", "Three.")


def test_no_text_becomes_markup(page: Page, data: dict[str, Any]) -> None:
    for tag in ("img", "b", "i", "u", "em", "q"):
        assert not page.all(tag)
    assert len(page.scripts) == 3
    found = " ".join(page.words)
    for shown in ("<b>tiny</b>", "<i>none</i>", "<u>c</u>", "head <i>", "with <em>.", "<q>"):
        assert shown in found
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
    for part in ("IO: Mary", "S: John", "tokens: IO 2, S1 4, S2 9, END 13"):
        assert part in control["hovertext"][5]
    assert set(control["customdata"]) == {"answer: Mary (IO) → Mary (IO)"}
    assert set(counterfactual["customdata"]) == {"answer: Mary (IO) → John (S)"}
    assert "counterfactual edit" in counterfactual["hovertemplate"]
    clean = prompt_tensors()["clean.logit_difference"]
    assert control["x"] == pytest.approx(clean.tolist(), rel=1e-5)
    assert counterfactual["y"] == pytest.approx((-clean).tolist(), rel=1e-5)


def test_every_plot_has_its_numbers_as_a_table(data: dict[str, Any]) -> None:
    sweep = figure(data, "flipping-sweep", 0)["table"]
    assert sweep["head"][:2] == ["pane", "Site edited, in order of computation"]
    assert sweep["columns"][1][:3] == list(SITES) and len(sweep["columns"][0]) == 6
    points = figure(data, "flipping-answers", 1)["table"]
    assert points["head"][0] == "curve" and len(points["columns"][1]) == 2 * N


def test_axes_are_the_same_at_every_site(data: dict[str, Any]) -> None:
    layouts = [figure(data, "flipping-answers", index)["layout"] for index in range(len(SITES))]
    for axis in ("xaxis", "yaxis"):
        assert len({tuple(layout[axis]["range"]) for layout in layouts}) == 1


def test_prompts_are_stored_once(data: dict[str, Any]) -> None:
    holding = [array for array in data["shared"] if "END 13" in str(array)]
    assert len(holding) == 1 and len(holding[0]) == N


def test_many_prompts_are_not_all_drawn() -> None:
    many, times = texts(), 20
    more = PromptTexts(
        many.prompts * times,
        many.held * times,
        many.other * times,
        {name: column * times for name, column in many.positions.items()},
    )
    study = study_results()
    tensors = {name: column.repeat(times) for name, column in study.prompts.items()}
    clean = replace(study.clean, prompts=N * times)
    panel = sweep_panels(replace(study, prompts=tensors, texts=more, clean=clean))[0]
    assert {len(marks.x) for marks in panel.charts["L1.mid"].panes[0].marks} == {500}
    assert "The first 500 prompts are drawn." in panel.text


def test_the_end_tells_how_to_make_it_again(page: Page) -> None:
    found = " ".join(page.words)
    expected = "lrqp reproduce --model organism --n 80 --prefixes '<i>none</i>' --seed 7"
    for shown in (expected, "2.x", "seed", "7", "1.5"):
        assert shown in found


def test_the_command_names_the_folder_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my runs").mkdir()
    found = Page(write(Path("my runs")).read_text(encoding="utf-8")).words
    assert any(word.endswith("--seed 7 --out 'my runs'") for word in found)
    out = terminal.command(study_results(), Path("/data/run"))
    assert out.endswith("--out /data/run")


def test_the_summary_sets_published_figures_beside_the_own(page: Page) -> None:
    found = " ".join(page.words)
    for shown in ("+2.50", "+3.56", "99.3\u00a0%", "−2.50", "−0.99", "40 of 40"):
        assert shown in found
    assert "Readable" in found and "L1.mid to L2.pre" in found and "flips 100.0" in found


def test_the_summary_says_when_the_truth_is_missed() -> None:
    wrong = replace(study_results(), ground_truth=GroundTruth(["L1.mid"], [], False))
    assert any("DISAGREES" in line for line in said(wrong))
    failing = replace(wrong.sites["L2.pre"].control, infeasible=3)
    sites = wrong.sites | {"L2.pre": replace(wrong.sites["L2.pre"], control=failing)}
    assert any("3 edits" in line for line in said(replace(wrong, sites=sites)))
    assert sites_table(replace(wrong, sites=sites)).rows[2][-1] == 3


def test_a_study_without_a_sweep_has_a_summary_too(tmp_path: Path) -> None:
    bare = replace(study_results(), sites={}, used_sites=[], best_site=None)
    assert len(terminal.key_figures(bare)) == 3
    write_report(tmp_path / "report.html", bare)
    page = Page((tmp_path / "report.html").read_text())
    assert "+2.50" in page.words and not page.all("div", role="img")


def test_a_study_makes_its_own_chapters(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", study_results())
    page = Page((tmp_path / "report.html").read_text())
    panels = [plot["data-panel"] for plot in page.all("div", role="img")]
    assert panels == ["flipping-sweep", "flipping-histogram", "flipping-answers"]
    assert " ".join(page.words).count("Readable: ") == 1


def test_tables_show_numbers_alike_and_sort_by_their_value(page: Page) -> None:
    cells = {str(cell["data-value"]) for cell in page.all("td") if "data-value" in cell}
    assert {"-3.25", "0.5", "L10.H1"} <= cells
    found = [word.strip() for word in page.words]
    assert "−3.25" in found and "0.50" in found and "–" in found
    assert as_text([0.001, 0.0, None]) == ["1.0e−03", "0.0e+00", "–"]
    assert as_text([99.95, 0.0, -1.0]) == ["100.0", "0.0", "−1.0"]
    assert as_text([-0.04, 30.0]) == ["0.0", "30.0"]
    assert as_text([12, None, "a"]) == ["12", "–", "a"]
    assert as_text([1.0, 2.26], "flipped (%)") == ["1.0", "2.3"]
    for heading in page.all("th", scope="col"):
        assert "aria-sort" not in heading


def test_arrays_keep_their_objects_and_their_missing_values(tmp_path: Path) -> None:
    curves = [Marks(f"{i}", [1.0, 2.0, 3.0], [1.0, None, float("nan")]) for i in range(40)]
    grid = [[row + column / 7 for column in range(50)] for row in range(3)]
    heat = Heat(grid, ["a", "b", "c"], [f"{i}" for i in range(50)], "value")
    charts = {"many": Chart([Pane(curves)]), "heat": Chart([Pane(heat=heat)])}
    panel = Panel("odd", "Odd", "", charts, choice="figure")
    path = write(tmp_path, Chapter("Odd", "", [], [panel]))
    data = json.loads(unpacked(Page(path.read_text()).scripts[0]))
    first = figure(data, "odd", 0)
    assert len(first["data"]) == 40 and first["data"][39]["y"] == [1.0, None, None]
    z = figure(data, "odd", 1)["data"][0]["z"]
    assert [len(row) for row in z] == [50] * 3 and z[2][7] == 3.0


def test_plotly_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lrqp_torch\[report\]"):
        write_report(tmp_path / "report.html", study_results())


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        write(tmp_path / "nowhere")


def test_a_table_may_be_empty(tmp_path: Path) -> None:
    panel = Panel("none", "None", "", table=Table(("a", "b"), ()))
    write(tmp_path, Chapter("None", "", [], [panel]))


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
    down = replace(results.sites["L2.pre"].counterfactual, logit_difference=number(-8.1))
    flat = replace(results.sites["L2.pre"].control, logit_difference=number(-0.001))
    site = replace(results.sites["L2.pre"], counterfactual=down, control=flat)
    console = Console(width=100, record=True, file=StringIO())
    print_summary(replace(results, sites=results.sites | {"L2.pre": site}), console)
    printed = console.export_text()
    assert "−8.10" in printed and " 0.00 " in printed and "1.0e−06" in printed
    assert "-8" not in printed and "−0.00" not in printed
    assert signed(-0.001) == "+0.00"
    assert not re.search(r"\d%", " ".join(said(results)))
