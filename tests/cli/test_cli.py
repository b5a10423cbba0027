"""The ``lrqp`` command: what it prints, what it leaves, and how it refuses."""

import json
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from lrqp_torch.cli import app
from lrqp_torch.errors import SiteError
from lrqp_torch.study.parts import PARTS, find_part
from lrqp_torch.study.parts.heads import PART as HEADS
from lrqp_torch.study.report.page import Chapter


def lrqp(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """The message of a run that must have been refused: one message, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def test_version_names_the_packages() -> None:
    result = lrqp("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("lrqp ")
    for package in ("python", "torch", "transformers", "cvxpy", "cvxpylayers"):
        assert f"{package} " in result.stdout


def test_help_says_what_can_be_asked_for() -> None:
    assert "reproduce" in lrqp("--help").stdout
    text = lrqp("reproduce", "--help").stdout
    for option in ("--model", "--n", "--prefixes", "--sites", "--out", "--seed", "--no-figures"):
        assert option in text
    for part in PARTS:
        assert part in text


FILES = {"results.json", "prompts.safetensors", "prompts.json", "parts"}
SWEEP_FIGURES = {
    f"{name}.{kind}" for name in ("sweep", "histogram", "scatter") for kind in ("png", "svg")
}


def test_a_study_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = lrqp(
        "reproduce", "--model", "organism", "--n", 60, "--prefixes", "none",
        "--sites", "L0.mid,L2.pre", "--out", out, "--seed", 5,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    raw = json.loads((out / "results.json").read_text())
    assert raw["settings"]["seed"] == 5 and raw["settings"]["prefixes"] == "none"
    assert list(raw["sites"]) == ["L0.mid", "L2.pre"]
    assert raw["ground_truth"]["agrees"] is True
    clean = f"{raw['clean']['logit_difference']:.2f}"
    for expected in (clean, "3.56", "−0.99", "L2.pre", str(out / "report.html")):
        assert expected in result.stdout
    written = {path.name for path in out.iterdir()}
    assert written >= FILES | SWEEP_FIGURES | {"report.html"}
    assert raw["parts"].keys() == PARTS.keys() - {"flipping", "compare"}
    for part in raw["parts"]:
        assert (out / "parts" / f"{part}.json").is_file()
    figures = {name for name in written if name.endswith((".png", ".svg"))}
    assert len(figures - SWEEP_FIGURES) >= 2 * len(raw["parts"])
    assert figures | {"report.html"} == set(raw["files"])

    page = (out / "report.html").read_bytes()
    text = page.decode()
    assert "Without an edit, organism answers with IO on" in text
    for part in map(find_part, PARTS):
        if part.by_name_only:
            continue
        assert f'<a href="#{Chapter(part.title, "", [], []).name}">' in text
    (out / "report.html").unlink()
    again = lrqp("report", out)
    assert again.exit_code == 0 and str(out / "report.html") in again.stdout
    assert (out / "report.html").read_bytes() == page


def test_one_part_alone(tmp_path: Path) -> None:
    common = ("--n", 40, "--sites", "L1.mid,L2.pre", "--out", tmp_path, "--no-figures")
    result = lrqp("geometry", *common)
    assert result.exit_code == 0, result.output
    raw = json.loads((tmp_path / "results.json").read_text())
    assert list(raw["parts"]) == ["geometry"]
    assert raw["sites"] == {} and raw["best_site"] is None
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"report.html"}

    # Another part beside it, in the same folder.
    result = lrqp("flipping", *common, "--no-report", "--resume")
    assert result.exit_code == 0, result.output
    both = json.loads((tmp_path / "results.json").read_text())
    assert both["parts"] == raw["parts"] and list(both["sites"]) == ["L1.mid", "L2.pre"]


def test_parts_bring_the_parts_that_they_need(tmp_path: Path) -> None:
    result = lrqp(
        "circuit", "--n", 40, "--sites", "L2.pre", "--out", tmp_path, "--no-figures", "--no-report"
    )
    assert result.exit_code == 0, result.output
    raw = json.loads((tmp_path / "results.json").read_text())
    assert list(raw["parts"]) == ["heads", "circuit"] and list(raw["sites"]) == ["L2.pre"]


def test_every_part_is_a_command_with_the_same_options() -> None:
    commands = get_command(app).commands
    options = {
        name: {option for p in commands[name].params for option in (*p.opts, *p.secondary_opts)}
        for name in ("reproduce", "study", *PARTS)
    }
    own = {"--data", "--label", "--position"}
    for name in PARTS:
        assert options[name] == options["reproduce"] - {"--parts"} | own
    names = {"--n", "--prefixes", "--compare-task", "--no-compare-task"}
    assert options["study"] == options["reproduce"] - names | own


def test_help_shows_how_words_are_marked() -> None:
    for command in ("fit", "study", "compare"):
        assert "[[keys]]" in lrqp(command, "--help").stdout


def test_a_part_that_is_unknown(tmp_path: Path) -> None:
    message = refused(lrqp("reproduce", "--parts", "geometry,origami", "--out", tmp_path))
    assert "'origami'" in message and "mediation" in message


def test_no_figures(tmp_path: Path) -> None:
    result = lrqp(
        "flipping", "--n", 20, "--sites", "L2.pre", "--out", tmp_path, "--no-figures", "--no-report"
    )
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == FILES


def test_an_interrupted_study_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "reproduce", "--parts", "flipping,heads", "--n", 40, "--sites", "L2.pre",
        "--out", tmp_path, "--no-figures", "--no-report",
    )  # fmt: skip

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HEADS, "compute", interrupt)
        stopped = lrqp(*command)
    assert stopped.exit_code == 130
    assert "Kept: flipping." in stopped.stderr and "--resume" in stopped.stderr
    assert not (tmp_path / "results.json").exists()
    refusal = refused(lrqp("report", tmp_path))
    assert "--resume" in refusal
    changed = refused(lrqp(*command, "--resume", "--seed", 1))
    assert "seed was 0 and is now 1" in changed
    resumed = lrqp(*command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert list(json.loads((tmp_path / "results.json").read_text())["parts"]) == ["heads"]


def test_a_site_that_the_model_lacks(tmp_path: Path) -> None:
    message = refused(lrqp("reproduce", "--sites", "L99.mid", "--out", tmp_path))
    assert "Error:" in message and "L99.mid" in message


def test_debug_shows_the_error_itself(tmp_path: Path) -> None:
    result = lrqp("reproduce", "--sites", "L99.mid", "--out", tmp_path, "--debug")
    assert isinstance(result.exception, SiteError)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    message = refused(lrqp("reproduce", "--out", blocked / "below"))
    assert str(blocked / "below") in message and "--out" in message


def test_a_prefix_file_that_is_missing(tmp_path: Path) -> None:
    missing = tmp_path / "prefixes.txt"
    message = refused(lrqp("reproduce", "--prefixes", missing, "--out", tmp_path / "out"))
    assert str(missing) in message


def test_a_model_that_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(lrqp("reproduce", "--model", tmp_path / "empty", "--out", tmp_path / "out"))
    assert str(tmp_path / "empty") in message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--shrinkage", "some", "shrinkage"),
        ("--shrinkage", "1.5", "shrinkage"),
        ("--train-share", "1", "train_share"),
        ("--device", "abacus", "abacus"),
        ("--n", "0", "--n"),
        ("--batch-size", "0", "--batch-size"),
    ],
)
def test_values_out_of_range(tmp_path: Path, option: str, value: str, expected: str) -> None:
    assert expected in refused(lrqp("reproduce", option, value, "--out", tmp_path))


def test_the_folder_must_be_given() -> None:
    assert "--out" in refused(lrqp("reproduce"))
