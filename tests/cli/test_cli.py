"""The ``lrqp`` command: what it prints, what it leaves, and how it refuses."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from report_for_tests import study_results
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

from lrqp_torch.cli import app
from lrqp_torch.cli.study import OWN
from lrqp_torch.errors import SiteError
from lrqp_torch.stream.progress import progress_bars
from lrqp_torch.study.parts import PARTS, find_part
from lrqp_torch.study.parts.heads import PART as HEADS
from lrqp_torch.study.report import print_summary
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
    assert raw["parts"].keys() == PARTS.keys() - {"flipping", "joint", "compare"}
    for part in raw["parts"]:
        assert (out / "parts" / f"{part}.json").is_file()
    figures = {name for name in written if name.endswith((".png", ".svg"))}
    assert len(figures - SWEEP_FIGURES) >= 2 * len(raw["parts"])
    assert figures | {"report.html"} == set(raw["files"])

    page = (out / "report.html").read_bytes()
    text = page.decode()
    assert "Without an edit, organism answers with IO on" in text
    for part in map(find_part, PARTS):
        if part.by_name_only or part.name == "joint":
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
    own = {f"--{name}" for name in OWN}
    for name in PARTS:
        assert options[name] == options["reproduce"] - {"--parts"} | own
    names = {"--n", "--prefixes", "--variables", "--names", "--compare-task", "--no-compare-task"}
    assert options["study"] == options["reproduce"] - names | own


def test_help_shows_how_words_are_marked() -> None:
    for command in ("fit", "study", "compare"):
        assert "[[keys]]" in lrqp(command, "--help").stdout


@pytest.mark.parametrize("arguments", ["", "study"])
def test_help_fits_into_40_columns_and_nothing_of_it_is_cut(arguments: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "lrqp_torch", *arguments.split(), "--help"],
        env=os.environ | {"COLUMNS": "40"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert max(map(len, said.splitlines())) <= 40
    assert "…" not in said and not re.search(r"\w\.\.\.", said)
    words = " ".join(said.split())
    assert ("[[keys]] to the cabinet" if arguments else "--parts all leaves it out.") in words


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


# ---- what is said, and where ---------------------------------------------------------------------

TINY = ("flipping", "--n", 20, "--sites", "L2.pre", "--no-figures", "--no-report", "--out")


def test_json_is_all_that_stands_on_standard_output(tmp_path: Path) -> None:
    result = lrqp(*TINY, tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "results.json").read_text())
    assert "Flipping the answer: " in result.stderr
    refused(lrqp(*TINY, tmp_path, "--json", "--device", "abacus"))


def test_quiet_says_nothing_and_verbose_all(tmp_path: Path) -> None:
    assert lrqp(*TINY, tmp_path, "--quiet").output == ""
    assert "--verbose" in lrqp(*TINY, tmp_path, "--quiet", "--verbose").stderr
    loud = lrqp(*TINY, tmp_path, "--verbose").stdout
    assert len(loud) >= len(lrqp(*TINY, tmp_path).stdout) > 0


def test_progress_is_plain_lines_where_nobody_looks(tmp_path: Path) -> None:
    result = lrqp(*TINY, tmp_path)
    assert "\x1b" not in result.output and "\r" not in result.output
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["loading the model", "writing prompts"]
    assert all(re.search(r"\d (s|min)$", line) for line in lines)


def test_a_bar_stays_in_its_line(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bars() as start:
        for title in ("first", "second"):
            advance = start(title, 3)
            advance(3)
    shown = capsys.readouterr().err
    assert "first" in shown and "second" in shown and "0/3" in shown
    assert "\x1b" not in shown and "\n" not in shown


@pytest.mark.parametrize("colour", [True, False])
def test_40_columns_are_enough_and_colour_can_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colour: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("lrqp_torch.study.report._says", lambda *_, **__: ["It DISAGREES."])
    print_summary(study_results(), Console(file=(said := StringIO()), force_terminal=True))
    lines = re.sub(r"\x1b\[[\d;]*m", "", said.getvalue()).splitlines()
    assert max(map(len, lines)) <= 40
    assert "more columns on a wider terminal" in " ".join(" ".join(lines).split())
    rows = [line.split() for line in lines if line.split()[:1] == ["L2.pre"]]
    assert rows[-1][1:3] == ["100.0", "100.0"]
    assert bool(re.search(r"\x1b\[[\d;]*3\dm", said.getvalue())) is colour


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("capture --sites L1.mid,L2.mid --n 20", "capture 2 sites of organism on 20 prompts"),
        ("fit --data DATA --model organism --site L2.mid,L3.mid", "fit 2 edits to 20 prompts"),
        (
            "benchmark causalgym --data DATA --model organism --sites L2.mid,L3.mid --epochs 1",
            "score the edits of causalgym at 2 sites",
        ),
        (
            "verdicts --models organism-absent --methods lrqp --sites L1.mid,L2.mid --n 24",
            "judge 2 sites of organism-absent on 3 draws of 24 prompts",
        ),
    ],
)
def test_other_long_commands_say_what_they_would_do(
    command: str, said: str, tmp_path: Path
) -> None:
    data, out = tmp_path / "own.jsonl", tmp_path / "out"
    assert lrqp("example-task", "agreement", "--n", 40, "--out", data).exit_code == 0
    words = [str(data) if word == "DATA" else word for word in command.split()]
    result = lrqp(*words, "--out", out, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["would"].startswith(said) and found["seconds"] > 0 and found["out"] == str(out)
    assert not out.exists()
    unnamed = lrqp(*words, "--dry-run")
    assert "to the folder that --out will name; nothing is written now" in unnamed.stdout
    told = lrqp(*words)
    assert told.exit_code == 2 and "--out" in told.output and "say where to write" in told.output
    wrong = [word.replace("L2.mid", "L99.mid") for word in words]
    assert "L99.mid" in refused(lrqp(*wrong, "--out", out, "--dry-run"))


def test_a_dry_run_writes_nothing_and_says_how_long(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--parts", "flipping,heads", "--n", 40, "--sites", "L1.mid,L2.pre", "--out", out)
    result = lrqp("reproduce", *options, "--dry-run")
    assert result.exit_code == 0, result.output
    assert not out.exists()
    assert "flipping: about" in result.stdout and "heads: about" in result.stdout
    assert "20 held out, at 2 sites from L1.mid to L2.pre" in result.stdout
    planned = json.loads(lrqp("reproduce", *options[:-2], "--dry-run", "--json").stdout)
    assert planned["out"] == "the folder that --out will name"
    assert list(planned["parts"]) == ["flipping", "heads"] and planned["parts"]["flipping"] > 0
    assert "L99.mid" in refused(lrqp(*TINY, out, "--dry-run", "--sites", "L99.mid"))


def test_without_the_libraries_of_pictures_the_numbers_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "plotly"):
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)
    command = ("flipping", "--n", 20, "--sites", "L2.pre", "--out", tmp_path)
    result = lrqp(*command)
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == FILES
    advice = [line for line in result.stderr.splitlines() if "pip install" in line]
    assert len(advice) == 2 and "[plots]" in advice[0] and "[report]" in advice[1]
    assert "Results are in" in result.stdout
    assert "plotly" in refused(lrqp(*command, "--report"))
    verdict = lrqp("verdicts", "--models", "organism", "--methods", "lrqp", "--sites", "L2.pre",
                   "--n", 16, "--seeds", 1, "--out", tmp_path / "verdicts")  # fmt: skip
    assert verdict.exit_code == 0, verdict.output
    assert "[plots]" in verdict.stderr


def test_every_command_that_writes_names_its_place_the_same_way() -> None:
    commands = get_command(app).commands
    options = {name: {o for p in each.params for o in p.opts} for name, each in commands.items()}
    writes_nothing = {"doctor", "serve"}
    assert {name for name in options if "--out" not in options[name]} == writes_nothing
    for name in commands:
        assert options[name] >= {"--quiet", "--verbose", "--json", "--debug"}


def test_a_report_is_asked_for_by_folder_or_option(tmp_path: Path) -> None:
    assert lrqp(*TINY, tmp_path, "--quiet").exit_code == 0
    told = json.loads(lrqp("report", "--out", tmp_path, "--json").stdout)
    assert told == {"report": str(tmp_path / "report.html")}
    assert "--out" in refused(lrqp("report"))
