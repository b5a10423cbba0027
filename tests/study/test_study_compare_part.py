"""The league table end to end on the organism: computed, drawn, put into words, resumed."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from compare_for_tests import FEW, SITE, SMALL, few, reference
from contexts_for_tests import Count, check, given, own_context
from prompts_for_tests import names_task
from typer.testing import CliRunner

from lrqp_torch.baselines import BaselineData, build
from lrqp_torch.cli import app
from lrqp_torch.errors import MissingExtraError, SettingError
from lrqp_torch.study import league, methods
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.league import CompareOptions, CompareResult
from lrqp_torch.study.parts.compare import LOOKS, PART, reading
from lrqp_torch.study.parts.heads import PART as HEADS
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.run import run as reproduce
from lrqp_torch.study.settings import Settings

# ---- the part ------------------------------------------------------------------------------------


@cache
def result() -> CompareResult:
    one, count = few(), Count()
    found = league.compute(one, {SITE: reference()}, roles(), options=SMALL, advance=count)
    assert count.total == league.work(one, SMALL)
    return found


@cache
def roles() -> Any:
    return HEADS.compute(given(few()), Count())


def test_methods_that_never_reach_the_effect_of_lrqp_have_their_chart() -> None:
    site = result().sites[SITE]
    never = [
        row if row.relative is None else replace(row, relative=dict.fromkeys(row.relative))
        for row in site.methods
    ]
    found = replace(result(), sites={SITE: replace(site, methods=never)})
    chart = PART.figures(found)["compare_equal_effect"]
    assert all(pane.y_range == (0.5, 2.0) for pane in chart.panes)


def without_times(found: CompareResult) -> dict[str, Any]:
    raw = asdict(found)
    for site in raw["sites"].values():
        for row in site["methods"]:
            row["seconds"] = None
    return raw


def test_the_part_end_to_end() -> None:
    check(PART, result())
    assert list(PART.figures(result())) == [
        "compare_pareto",
        "compare_table",
        "compare_equal_effect",
    ]
    site = result().sites[SITE]
    assert [row.name for row in site.methods] == SMALL.names
    assert {"none", "lrqp"} <= set(SMALL.names)
    nothing, own = site.method("none"), site.method("lrqp")
    assert nothing.counterfactual is not None and own.counterfactual is not None
    assert nothing.counterfactual.divergence.upper == 0
    assert nothing.counterfactual.logit_difference == site.clean
    assert nothing.scores["selectivity"] is None or nothing.scores["selectivity"].value == 1
    assert own.counterfactual.flipped.known > 0.5
    assert own.counterfactual.log_odds.known > 0 > nothing.counterfactual.log_odds.known
    patch = site.method("full_patch")
    assert patch.scores["completeness"] is not None
    assert patch.scores["completeness"].known > 0.9
    for row in site.methods:
        assert not row.problem
        for name in ("control", "counterfactual"):
            effect = getattr(row, name)
            for mean in vars(effect).values():
                if not isinstance(mean, Estimate):
                    continue
                low, high = mean.interval
                assert low - 1e-9 <= mean.known <= high + 1e-9
    assert site.interchange is not None and site.interchange.prompts == site.prompts
    # A full patch of the prompt's own twin is the interchange.
    whole = patch.counterfactual
    assert whole.recovered.value == pytest.approx(1, abs=1e-4) and whole.agreement.value == 1
    assert whole.kl_to_interchange.value < 1e-6 and whole.beyond is None
    assert nothing.counterfactual.recovered.value == 0
    assert own.counterfactual.kl_to_interchange.value > 0
    assert "1 epochs" in site.method("das").settings
    assert site.watched and own.counterfactual.attention is not None
    assert own.relative["divergence"] is not None
    assert own.relative["divergence"].value == pytest.approx(1)
    assert [curve.name for curve in site.curves] == [*SMALL.names[1:], "lrqp_dose"]
    for curve in site.curves:
        wanted = SMALL.log_alphas if curve.name == "lrqp_dose" else SMALL.strengths
        assert tuple(point.dose for point in curve.points) == wanted


def test_the_same_seed_gives_the_same_table() -> None:
    one = few()
    again = league.compute(one, {SITE: reference()}, roles(), options=SMALL)
    assert without_times(again) == without_times(result())


def test_strength_1_of_a_curve_is_the_row_of_the_table() -> None:
    one = replace(few(), batch_size=50)
    options = replace(SMALL, methods=("euclidean",), sweep_prompts=FEW)
    site = league.compute(one, {SITE: reference()}, options=options).sites[SITE]
    assert site.watched == [] and site.role == ""
    for name in ("lrqp", "euclidean"):
        curve = next(curve for curve in site.curves if curve.name == name)
        point = next(point for point in curve.points if point.dose == 1)
        effect = site.method(name).counterfactual
        assert effect is not None and effect.attention is None
        fall = site.clean.known - effect.logit_difference.known
        assert point.effect.value == pytest.approx(fall)
        assert point.costs["divergence"].value == pytest.approx(effect.divergence.value)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_prompts_of_one_s_own_are_compared_in_their_own_words(n_classes: int) -> None:
    one, count = own_context(n_classes), Count()
    assert PART.missing(one) is None
    small = replace(one, task=replace(one.task, test=one.task.test[:40]))
    edit = given(one, on_infeasible="skip").edit_at(SITE)
    found = league.compute(small, {SITE: edit}, options=SMALL, advance=count)
    assert count.total == league.work(small, SMALL)
    check(PART, found)
    site = found.sites[SITE]
    assert not any(row.problem for row in site.methods) and not site.watched
    wanted = (
        "between the edited token and the last token" if n_classes == 2 else "at the last token"
    )
    assert found.elsewhere == wanted
    own = site.method("lrqp").counterfactual
    assert own is not None and own.log_odds.known > 0
    shown = " ".join(panel.text for panel in PART.panels(found))
    for word in ("S2", "END", "order", "names", "IO"):
        assert word not in shown.split()
    without = own_context(n_classes, answers=False)
    assert "no answers" in (PART.missing(without) or "")


def test_a_method_that_cannot_be_built_is_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str, data: BaselineData) -> Any:
        if name == "leace":
            raise MissingExtraError("LEACE needs a package: install it")
        return build(name, data)

    monkeypatch.setattr(methods, "build", missing)
    one, count = few(), Count()
    options = replace(SMALL, methods=("leace", "euclidean"))
    found = league.compute(one, {SITE: reference()}, options=options, advance=count)
    assert count.total == league.work(one, options)
    row = found.sites[SITE].method("leace")
    assert "install it" in row.problem and row.counterfactual is None
    (table,) = (p.table for p in PART.panels(found) if p.name == "compare-0")
    assert table is not None
    assert next(r for r in table.rows if r[0] == row.title)[1:-1] == (None,) * (
        len(table.columns) - 2
    )
    assert any("LEACE needs a package" in line for line in reading(found, found.sites[SITE]))


def test_words_follow_the_figures() -> None:
    site = result().sites[SITE]
    own = site.method("lrqp")

    def with_rivals(lower: float, upper: float) -> str:
        rows = []
        for row in site.methods:
            if row.name not in ("none", "lrqp", "lrqp_learned"):
                mean = Estimate(upper, lower, upper, FEW)
                row = replace(row, relative=dict.fromkeys(own.relative, mean))
            rows.append(row)
        return " ".join(reading(result(), replace(site, methods=rows)))

    assert "not in LRQP's favour (4 clearly better" in with_rivals(0.4, 0.5)
    assert ": in LRQP's favour (0 clearly better, 4 clearly worse" in with_rivals(1.5, 2.0)
    assert "neither for nor against LRQP" in with_rivals(0.9, 1.1)


def test_a_table_needs_a_site() -> None:
    with pytest.raises(SettingError, match="no site"):
        league.compute(few(), {})


# ---- in the study --------------------------------------------------------------------------------

TINY = replace(SMALL, methods=("mean_difference", "full_patch"), sweep_prompts=8, texts=4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def options(names: tuple[str, ...] | None) -> CompareOptions:
        return replace(TINY, methods=names or TINY.methods)

    monkeypatch.setattr(league, "CompareOptions", options)


def settings(out: Path, **changes: Any) -> Settings:
    whole: dict[str, Any] = {"n": 48, "sites": "L1.mid,L2.pre", "prefixes": "bundled"}
    whole |= {"batch_size": 16, "compare_task": False, "figures": False, "report": False}
    return Settings(model="organism", out=out, parts="compare", **(whole | changes))


def test_a_stopped_study_goes_on_with_the_same_table(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reproduce(settings(tmp_path / "whole"))
    assert set(whole.parts) == {"heads", "compare"}

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(league, "compute", stop)
        with pytest.raises(KeyboardInterrupt):
            reproduce(settings(out))
    assert {path.stem for path in (out / "parts").glob("*.json")} == {"flipping", "heads"}
    resumed = reproduce(settings(out, resume=True))
    tables = [without_times(PART.read(study.parts["compare"])) for study in (whole, resumed)]
    assert tables[0] == tables[1]
    # A finished table is only read again.
    monkeypatch.setattr(league, "compute", stop)
    assert reproduce(settings(out, resume=True)).parts == StudyResults.load(out).parts


def test_the_command_writes_table_figures_and_report(tiny: None, tmp_path: Path) -> None:
    arguments = "compare --n 48 --prefixes bundled --sites L1.mid,L2.pre --batch-size 16"
    arguments += " --methods mean_difference --no-compare-task --out"
    answer = CliRunner().invoke(app, [*arguments.split(), str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["parts"]["compare"]["sites"][results["best_site"]]["methods"]
    assert [row["name"] for row in rows] == ["none", "lrqp", "mean_difference"]
    assert results["settings"]["methods"] == "mean_difference"
    refused = CliRunner().invoke(app, ["compare", "--methods", "magic", "--out", str(tmp_path)])
    assert refused.exit_code and "unknown method 'magic'" in refused.output
    names = {path.name for path in tmp_path.iterdir()}
    for stem in ("compare_pareto", "compare_table", "compare_equal_effect"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "LRQP beside other edits" in page and "At the same effect as LRQP" in page
    assert (tmp_path / "parts" / "compare.json").exists()


def test_the_command_compares_on_prompts_of_one_s_own(tiny: None, tmp_path: Path) -> None:
    lines = [
        {"text": prompt.text, "label": prompt.label, "answers": prompt.answers}
        for prompt in names_task(48)
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "results"
    arguments = ["compare", "--data", str(data), "--sites", "L2.pre", "--batch-size", "16"]
    answer = CliRunner().invoke(app, [*arguments, "--no-figures", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    study = StudyResults.load(out)
    assert list(study.parts) == ["compare"]  # the heads' roles need names
    found = PART.read(study.parts["compare"])
    assert found.words.value == "class" and found.sites["L2.pre"].method("lrqp").counterfactual
    assert "LRQP beside other edits" in (out / "report.html").read_text(encoding="utf-8")


def test_every_method_has_a_look_of_its_own() -> None:
    looks = [tuple(look.values()) for look in LOOKS.values()]
    assert set(methods.check_names(None)) <= set(LOOKS) and len(looks) == len(set(looks))
