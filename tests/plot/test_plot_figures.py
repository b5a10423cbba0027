"""Figures in one line: of numbers, of results, and of a folder; shown, saved and refused."""

import json
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lrqp_torch import plot
from lrqp_torch.errors import MissingExtraError, OutputError, SettingError
from lrqp_torch.plot import figures
from lrqp_torch.plot.chart import Chart
from lrqp_torch.study.indirect_objects import WORDS

SITES = ("L0.mid", "L1.mid")
CONDITIONS = ("control", "counterfactual")


def raw() -> dict[str, Any]:
    """Results as results.json has them, with an interval beside one number."""

    def condition(flipped: float) -> dict[str, Any]:
        return {"flipped": flipped, "flipped_interval": [flipped / 2, 1.0], "logit_difference": 1.0}

    def dose(log_alpha: float) -> dict[str, Any]:
        number = {"value": log_alpha, "lower": 0.0, "upper": 9.0}
        return {"log_alpha": log_alpha, "flipped": 0.5, "preference": number,
                "distance": number, "euclidean": number}  # fmt: skip

    task = {"doses": [dose(1.0), dose(2.0)], "control": dose(1.0), "counterfactual": dose(2.0)}
    scores = [{"head": f"L{i // 2}.H{i % 2}", "attribution": i - 2.0,
               "attention": {"END→IO": i / 4}} for i in range(4)]  # fmt: skip
    return {
        "settings": {},
        "model": {"name": "tiny"},
        "words": vars(WORDS),
        "majority": 0.5,
        "clean": {"logit_difference": 2.0, "io_probability": 0.9},
        "sites": {site: {"probe_accuracy": 0.9, **{c: condition(0.5) for c in CONDITIONS}}
                  for site in SITES},
        "used_sites": ["L1.mid"],
        "best_site": "L1.mid",
        "parts": {"dose": {"words": vars(WORDS), "site": "L1.mid", "tasks": {"plain": task}},
                  "heads": {"scores": scores}},
    }  # fmt: skip


def prompts() -> dict[str, torch.Tensor]:
    clean = torch.linspace(-1, 3, 9)
    edited = {f"L1.mid.{c}.logit_difference": clean * s for c, s in zip(CONDITIONS, (1, -1))}  # noqa: B905
    return {"clean.logit_difference": clean, **edited}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(raw()))
    save_file(prompts(), tmp_path / "prompts.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["sweep", "histogram", "scatter", "dose", "attention"])
def test_a_folder_and_an_object_give_the_same_figure(name: str, folder: Path) -> None:
    draw = getattr(plot, name)
    figure = draw(folder)
    assert figure.chart == draw(str(folder)).chart
    held = json.loads(json.dumps(raw()), object_hook=lambda d: d) | {"prompts": prompts()}
    assert figure.chart == draw(SimpleNamespace(**held)).chart
    assert figure.save(folder / "a.png").stat().st_size > 1000
    assert figure.to_plotly().data and figure.table.rows


def test_the_sweep_of_a_study(folder: Path) -> None:
    chart = plot.sweep(folder).chart
    shares, effects = chart.panes
    flipped = next(m for m in shares.marks if "counterfactual" in m.name)
    assert (
        flipped.y == [50.0, 50.0] and flipped.lower == [25.0, 25.0] and flipped.upper == [100, 100]
    )
    assert [band.start for band in shares.bands] == ["L1.mid"]
    assert any(rule.at == 2.0 and rule.name == "no edit" for rule in effects.rules)
    assert "IO − S (logits)" in effects.y_title and "order" in chart.title


def test_the_answers_of_a_study(folder: Path) -> None:
    panes = plot.histogram(folder, bins=4).chart.panes
    assert [sum(pane.marks[0].y) for pane in panes] == [9, 9, 9]
    assert panes[2].marks[0].name == "counterfactual edit\nmean −1.00\n22.2 % answer IO"
    points = plot.scatter(folder).chart.panes[0]
    assert points.square and [marks.y[0] for marks in points.marks] == [-1.0, 1.0]
    assert points.marks[1].name == "counterfactual edit: 50.0 % flipped"


def test_the_doses_of_a_study(folder: Path) -> None:
    flips, answers, *_ = plot.dose(folder).chart.panes
    assert [marks.y for marks in flips.marks] == [[50.0, 50.0], [50.0], [50.0]]
    assert answers.marks[0].y == [1.0, 2.0] and answers.marks[0].upper == [9.0, 9.0]


def test_own_numbers(tmp_path: Path) -> None:
    shares = plot.sweep({"probe": torch.tensor([0.5, 1.0]), "flips": [0.0, (0.5, 0.4, 0.6)]}, SITES)
    probe, flips = shares.chart.panes[0].marks
    assert probe.y == [50.0, 100.0] and flips.lower == [None, 40.0] and probe.colour != flips.colour
    assert shares.chart.panes[0].y_title == "Share (%)"
    logits = plot.sweep({"difference": [0.5, 1.0]}, SITES, y_title="difference (logits)")
    assert logits.chart.panes[0].marks[0].y == [0.5, 1.0]
    rows = plot.histogram({"a": torch.zeros(3), "b": [1.0]}).chart.panes
    assert [sum(pane.marks[0].y) for pane in rows] == [3, 1]
    assert plot.histogram(torch.rand(5)).chart.panes[0].marks[0].name == ""
    points = plot.scatter([1.0, 2.0], torch.tensor([2.0, 1.0]), texts=["p", "q"]).chart.panes[0]
    assert points.marks[0].y == [2.0, 1.0] and points.marks[0].texts == ["p", "q"]
    assert plot.dose({"flipped": [0.1, 0.9]}, [0.0, 10.0]).chart.panes[0].marks[0].x == [0.0, 10.0]
    heat = plot.attention(torch.rand(2, 3)).chart.panes[0].heat
    assert heat is not None and heat.rows == ["L0", "L1"] and heat.columns == ["H0", "H1", "H2"]
    assert heat.limits == (0.0, 1.0)
    tokens = plot.attention(torch.eye(2) - 0.5, tokens=["a", "b"]).chart.panes[0].heat
    assert tokens is not None and tokens.rows == ["a", "b"] and tokens.diverging


def test_a_figure_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plot.scatter([1.0], [2.0], title="Mine")
    assert repr(figure) == "Figure('Mine')"
    monkeypatch.setattr("plotly.io.renderers.default", "plotly_mimetype")
    shown = figure._repr_mimebundle_()["application/vnd.plotly.v1+json"]
    assert list(shown["data"][0]["x"]) == [1.0]
    monkeypatch.setattr(figures, "find_spec", lambda name: None if name == "plotly" else name)
    picture = figure._repr_mimebundle_()["image/png"]
    assert b64decode(picture).startswith(b"\x89PNG")
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lrqp_torch\[plots\]"):
        figure._repr_mimebundle_()
    with pytest.raises(MissingExtraError, match=r"lrqp_torch\[report\]"):
        figure.to_plotly()


def test_figures_are_saved_by_their_ending(tmp_path: Path) -> None:
    figure = plot.Figure(Chart(plot.scatter([1.0], [2.0]).chart.panes, "Mine"))
    for name in ("a.png", "a.svg", "a.pdf", "a.html"):
        assert figure.save(tmp_path / name).exists()
    page = (tmp_path / "a.html").read_text()
    assert "Mine" in page and "<script src" not in page
    with pytest.raises(SettingError, match=r"a\.jpg"):
        figure.save(tmp_path / "a.jpg")
    with pytest.raises(OutputError, match="nowhere"):
        figure.save(tmp_path / "nowhere" / "a.png")


def test_what_cannot_be_drawn_is_refused(folder: Path) -> None:
    with pytest.raises(OutputError, match="lrqp reproduce"):
        plot.sweep(folder / "nothing")
    with pytest.raises(SettingError, match="3 values for 2 sites"):
        plot.sweep({"a": [1.0, 2.0, 3.0]}, SITES)
    with pytest.raises(SettingError, match="2 numbers before and 1 after"):
        plot.scatter([1.0, 2.0], [1.0])
    with pytest.raises(SettingError, match="no numbers"):
        plot.histogram({})
    with pytest.raises(SettingError, match="matrix"):
        plot.attention([[1.0], [1.0, 2.0]])
    with pytest.raises(SettingError, match="missing"):
        plot.dose({"a": [1.0]})
    bare = raw() | {"best_site": None, "parts": {}, "sites": {}}
    for draw in (plot.sweep, plot.histogram, plot.scatter, plot.dose, plot.attention):
        with pytest.raises(SettingError, match="run"):
            draw(bare)
    with pytest.raises(SettingError, match="give the folder"):
        plot.histogram(raw())


def test_one_curve_needs_no_name_and_a_number_is_none() -> None:
    values = torch.tensor([0.1, 0.9])
    assert plot.sweep(values).table.rows == plot.sweep({"": values}).table.rows
    assert plot.dose(values, [1, 2]).table.rows == plot.dose({"": values}, [1, 2]).table.rows
    for wrong in (lambda: plot.sweep({"a": 0.5}), lambda: plot.dose(values, [1.0])):
        with pytest.raises(SettingError, match=r"numbers|2 values for 1 doses"):
            wrong()
