"""``lrqp fit``, ``apply``, ``study`` and ``example-task``: what they print, leave and refuse."""

import json
from pathlib import Path

import pytest
from prompts_for_tests import names_task
from typer.testing import CliRunner, Result

from lrqp_torch import LRQP, EditLibrary
from lrqp_torch.cli import app
from lrqp_torch.study.reading import agreement, write_prompts
from lrqp_torch.tasks import read_prompts


def lrqp(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The message of a run that must have been refused: one message, no traceback."""
    result = lrqp(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(names_task(160), tmp_path_factory.mktemp("data") / "names.jsonl")


@pytest.fixture(scope="module")
def fitted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("edit") / "order"
    return out, lrqp("fit", "--data", data, "--model", "organism", "--site", "L2.mid", "--out", out)


def test_help_lists_the_commands_in_a_panel_of_their_own() -> None:
    text = lrqp("--help").stdout
    assert "Edits of your own" in text
    for command in ("fit", "apply", "study", "example-task", "benchmark"):
        assert command in text
        assert lrqp(command, "--help").exit_code == 0


def test_example_tasks_are_written_as_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.jsonl"
    result = lrqp("example-task", "agreement", "--n", 20, "--seed", 3, "--out", file)
    assert result.exit_code == 0 and str(file) in result.stdout
    assert [p.text for p in read_prompts(file)] == [p.text for p in agreement(20, 3)]
    assert "agreement, greater-than" in refused("example-task", "nothing", "--out", file)
    assert ".jsonl" in refused("example-task", "agreement", "--out", tmp_path / "a.csv")
    assert "ask for 2 to" in refused("example-task", "agreement", "--n", 10**7, "--out", file)


def test_a_fit_is_kept_with_its_origin(fitted: tuple[Path, Result], data: Path) -> None:
    out, result = fitted
    assert result.exit_code == 0, result.output
    assert "80 of 80" in result.stdout and "ABBA, BABA" in result.stdout
    origin = LRQP.load(out).provenance
    assert origin is not None and origin.site == "L2.mid" and origin.task == "names"
    assert origin.position == "mark" and origin.probe_accuracy > 0.9
    assert f"{100 * origin.probe_accuracy:.1f}" in result.stdout


def test_several_sites_and_labels_make_a_library(tmp_path: Path, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for index, row in enumerate(rows):
        del row["answers"]
        row["half"] = ("left", "right")[index % 2]
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(map(json.dumps, rows)))
    common = ("--data", both, "--model", "organism", "--site", "L1.mid,L2.mid")
    result = lrqp("fit", *common, "--label", "label,half", "--out", tmp_path / "edits")
    assert "at L1.mid, L2.mid the probe does not clearly read half" in result.stderr
    assert "clearly read label" not in result.stderr
    assert result.exit_code == 0, result.output
    library = EditLibrary.load(tmp_path / "edits")
    assert set(library) == {f"{x}.{s}" for x in ("label", "half") for s in ("L1.mid", "L2.mid")}
    assert library["half.L1.mid"].provenance.classes == ("left", "right")
    assert library["half.L1.mid"].provenance.variable == "half"
    marked = ("--prompt", names_task(1)[0].text)
    use = ("apply", tmp_path / "edits", "--model", "organism", *marked, "--target")
    assert "--edit" in refused(*use, "left")
    assert "called 'x'" in refused(*use, "left", "--edit", "x")
    result = lrqp(*use, "left", "--edit", "half.L1.mid")
    assert result.exit_code == 0 and "belief in left" in result.stdout


def test_apply_shows_before_and_after(
    fitted: tuple[Path, Result], data: Path, tmp_path: Path
) -> None:
    use = ("apply", fitted[0], "--model", "organism")
    kept = tmp_path / "found.json"
    result = lrqp(*use, "--data", data, "--target", "other", "--show", 3, "--out", kept)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("belief in") == 3 and "157 more prompts" in result.stdout
    raw = json.loads(kept.read_text())
    assert len(raw["prompts"]) == 160 and raw["edit"]["site"] == "L2.mid"
    turned = sum(item["lead_after"] > 0 > item["lead_before"] for item in raw["prompts"])
    assert turned > 140 and f"answers with the target on {turned}" in result.stdout

    typed = names_task(2, 9)
    result = lrqp(
        *use, "--target", "other", "--generate", 2,
        "--prompt", typed[0].text, "--prompt", typed[1].text,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.count("goes on:") == 2 and "next token changes on 2" in result.stdout


def test_a_study_end_to_end(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = lrqp(
        "study", "--data", data, "--model", "organism", "--sites", "L0.mid,L2.mid,L3.mid",
        "--out", out, "--seed", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    raw = json.loads((out / "results.json").read_text())
    assert raw["used_sites"] == ["L2.mid"] and raw["settings"]["seed"] == 2
    said = " ".join(result.stdout.split())
    assert "Used, of 3 sites tried: L2.mid. A site" in said
    assert "P, used: P value of" in said and "ceiling:" not in said  # no prompt has a twin
    assert "What can be read, and what is used" in (out / "report.html").read_text("utf-8")
    assert {path.name for path in out.iterdir()} == {
        "results.json", "prompts.safetensors", "prompts.json", "report.html", "parts",
        *(f"{name}.{end}" for name in ("sweep", "histogram", "scatter") for end in ("png", "svg")),
    }  # fmt: skip
    assert raw["classes"] == ["ABBA", "BABA"] and 0.9 < raw["answered"] <= 1
    command = f"lrqp study --model organism --data {data}"
    assert command in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([{"text": "[[Mary]]", "label": "a"}] * 3, "class 'a' has 1 different texts"),
        ([{"text": "[[Mary]]"}], "has no 'label'"),
        ([{"text": "Mary", "label": "a"}], "marks no words"),
        ([{"text": f"[[{name}]]", "label": "a"} for name in ("Mary", "Tom", "John")], "two diff"),
        ([], "holds no prompts"),
    ],
)
def test_data_that_cannot_be_fitted_leave_nothing(lines: list[dict], what: str, tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    common = ("--data", file, "--model", "organism", "--out", out)
    assert what in refused("study", *common)
    assert what in refused("fit", *common, "--site", "L2.mid")
    assert not out.exists()


def test_requests_that_do_not_fit_are_refused(
    fitted: tuple[Path, Result], data: Path, tmp_path: Path
) -> None:
    edit = fitted[0]
    common = ("--data", data, "--model", "organism", "--out", tmp_path / "out")
    assert "L99.mid" in refused("fit", *common, "--site", "L99.mid")
    assert "train_share" in refused("study", *common, "--train-share", 1)
    assert "shrinkage" in refused("study", *common, "--shrinkage", "much")
    assert "no label given" in refused("fit", *common, "--site", "L2.mid", "--label", ",")
    use = ("apply", edit, "--model", "organism", "--target")
    assert "--data or" in refused(*use, "other")
    assert "no class 'x'" in refused(*use, "x", "--data", data)
    assert "marks no words" in refused(*use, "other", "--prompt", "Mary and John")
    assert "holds one edit" in refused(*use, "other", "--data", data, "--edit", "x")
    other = ("apply", edit, "--model", "gpt2-shape", "--target", "other", "--data", data)
    assert "would mean nothing there" in refused(*other)


def test_a_folder_holds_one_edit_or_a_library(
    fitted: tuple[Path, Result], data: Path, tmp_path: Path
) -> None:
    edit = LRQP.load(fitted[0])
    one, several = edit.save(tmp_path / "one"), EditLibrary({"a": edit}).save(tmp_path / "several")
    before = [sorted(tmp_path.rglob("*")), (one / "edit.json").read_bytes()]
    common = ("fit", "--data", data, "--model", "organism", "--site")
    assert "choose another folder" in refused(*common, "L1.mid", "--out", several)
    assert "choose another folder" in refused(*common, "L1.mid,L2.mid", "--out", one)
    assert before == [sorted(tmp_path.rglob("*")), (one / "edit.json").read_bytes()]
    (one / "library.json").write_bytes((several / "library.json").read_bytes())
    use = ("apply", one, "--model", "organism", "--data", data, "--target", "other")
    assert "beside an edit" in refused(*use)


def test_a_fit_refuses_its_folder_before_any_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*given: object) -> None:
        pytest.fail("data were read for a folder that cannot be written")

    monkeypatch.setattr("lrqp_torch.study.preparing.read_own", work)
    file = tmp_path / "file"
    file.write_text("")
    common = ("fit", "--data", data, "--model", "organism", "--site", "L2.mid")
    assert "cannot write to" in refused(*common, "--out", file / "edit")


def test_rows_that_cannot_be_used_are_told_and_strict_stops(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    lines = data.read_text().splitlines()
    file.write_text("\n".join([*lines[:60], '{"text": "no label [[here]]"}', *lines[60:80]]))
    common = ("--data", file, "--model", "organism", "--sites", "L2.mid", "--no-report")
    assert "prompt 60 has no 'label'" in refused("study", *common, "--strict", "--out", tmp_path)
    out = tmp_path / "out"
    result = lrqp("study", *common, "--no-figures", "--out", out)
    assert result.exit_code == 0 and "1 row was left out: no label" in " ".join(
        result.output.split()
    )
    raw = json.loads((out / "results.json").read_text())
    assert raw["left_out"] == {"no label": 1} and sum(raw["data"].values()) == 80
    assert "always, never" in refused("study", *common, "--bos", "maybe", "--out", out)


def test_few_groups_and_rows_that_stand_twice_are_told(data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    both = tmp_path / "both.jsonl"
    grouped = [row | {"place": f"p{number % 4}"} for number, row in enumerate(rows)]
    both.write_text("\n".join(map(json.dumps, [*grouped, *grouped[:3]])))
    common = (
        "study",
        "--data",
        both,
        "--model",
        "organism",
        "--sites",
        "L2.pre",
        "--group",
        "place",
    )
    result = lrqp(*common, "--no-figures", "--no-report", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["left_out"] == {"a row that stands there twice": 3}
    assert "are of 2 groups; fewer than 8 are too few" in " ".join(found["notes"])


def test_a_benchmark_prints_its_table_and_keeps_its_numbers(tmp_path: Path) -> None:
    rows = [
        {"text": p.text, "label": p.label, "answers": p.answers} for p in names_task(60, seed=4)
    ]
    (tmp_path / "names.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ("--data", tmp_path, "--model", "organism", "--sites", "L2.mid")
    out = tmp_path / "out"
    result = lrqp("benchmark", "causalgym", *common, "--n", 60, "--epochs", 1, "--out", out)
    assert result.exit_code == 0, result.output
    for heading in ("log odds-ratio", "selectivity", "interchange accuracy", "full patch"):
        assert heading in result.output
    raw = json.loads((out / "benchmark.json").read_text())
    assert raw["benchmark"] == "causalgym" and len(raw["tasks"]) == 1
    assert "no benchmark 'glue'" in refused("benchmark", "glue", *common, "--out", out)


def test_a_warning_of_the_package_is_a_note_and_not_a_line_of_code(tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    assert lrqp("example-task", "agreement", "--n", 24, "--out", data).exit_code == 0
    command = ("fit", "--data", data, "--model", "organism", "--site", "L2.mid", "--out")
    result = lrqp(*command, tmp_path / "edit")
    assert result.exit_code == 0, result.output
    assert "Note: the tokenizer does not know a word" in result.stderr
    assert "VocabularyWarning" not in result.stderr
    assert lrqp(*command, tmp_path / "quiet", "--quiet").stderr == ""
