"""A study that was stopped and resumed gives the numbers of one that was not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrqp_torch.errors import SettingError, SiteError
from lrqp_torch.study import sweep
from lrqp_torch.study.parts.circuit import PART as CIRCUIT
from lrqp_torch.study.parts.geometry import PART as GEOMETRY
from lrqp_torch.study.parts.heads import PART as HEADS
from lrqp_torch.study.records import to_json
from lrqp_torch.study.results import StudyResults
from lrqp_torch.study.run import run as reproduce
from lrqp_torch.study.store import forget

PARTS = "flipping,geometry,heads,circuit"


def settings(out: Path, **changes: Any) -> Any:
    from lrqp_torch.study.settings import Settings

    return replace(
        Settings(
            model="organism",
            out=out,
            n=48,
            sites="L1.mid,L2.pre",
            prefixes="bundled",
            batch_size=8,
            parts=PARTS,
            figures=False,
            report=False,
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    reproduce(settings(out))
    return out


def numbers(results: StudyResults) -> dict[str, Any]:
    """All that must not depend on a stop: everything but the times."""
    raw = to_json(results)
    del raw["elapsed"]
    raw["parts"]["other_task"].pop("seconds")
    return raw


def assert_same(resumed: Path, whole: Path) -> None:
    a, b = StudyResults.load(resumed), StudyResults.load(whole)
    assert numbers(a) == numbers(b)
    assert a.prompts.keys() == b.prompts.keys()
    assert all(torch.equal(a.prompts[key], b.prompts[key]) for key in a.prompts)
    assert (resumed / "prompts.json").read_text() == (whole / "prompts.json").read_text()
    names = sorted(path.name for path in (resumed / "parts").iterdir())
    assert names == sorted(path.name for path in (whole / "parts").iterdir())


class Stopping:
    """Calls a function, and is stopped by the reader at the call of that number."""

    def __init__(self, function: Any, at: int) -> None:
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.function(*arguments, **options)


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        (sweep, "_sweep_batch", 3),  # within the sweep: 24 prompts are 3 batches a task
        (sweep, "_sweep_batch", 5),  # within the sweep of the other task
        (GEOMETRY, "compute", 1),
        (HEADS, "compute", 1),
        (CIRCUIT, "compute", 1),
    ],
)
def test_a_stop_changes_no_number(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: int
) -> None:
    original = getattr(module, name)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, Stopping(original, at))
        with pytest.raises(KeyboardInterrupt):
            reproduce(settings(tmp_path))
    assert not (tmp_path / "results.json").exists()
    again = Stopping(original, at=-1)
    monkeypatch.setattr(module, name, again)
    reproduce(settings(tmp_path, resume=True))
    # What was done before the stop is not done again.
    assert again.calls == (6 if name == "_sweep_batch" else 1) - (at - 1)
    assert_same(tmp_path, whole)


def test_a_finished_study_is_only_read_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce(settings(tmp_path))
    for module, name in ((sweep, "_sweep_batch"), (GEOMETRY, "compute"), (HEADS, "compute")):
        monkeypatch.setattr(module, name, Stopping(None, 1))
    results = reproduce(settings(tmp_path, resume=True))
    assert_same(tmp_path, whole)
    assert StudyResults.load(tmp_path) == results


def test_without_resume_everything_is_new(whole: Path, tmp_path: Path) -> None:
    reproduce(settings(tmp_path, parts="geometry,heads", seed=1))
    reproduce(settings(tmp_path, parts="geometry", n=40))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["geometry.json"]
    kept = json.loads((tmp_path / "parts" / "geometry.json").read_text())
    assert kept["fingerprint"]["seed"] == 0 and kept["fingerprint"]["n"] == 40
    assert list(StudyResults.load(tmp_path).parts) == ["geometry"]


def test_a_new_run_leaves_no_file_of_the_old_one(tmp_path: Path) -> None:
    others = {"notes.png", "mine.svg", "report.txt"}
    for name in others:
        (tmp_path / name).write_text("of the user")
    reproduce(settings(tmp_path, n=40, figures=True, report=True))
    drawn = {path.name for path in tmp_path.iterdir()} - others
    assert {"sweep.png", "heads.svg", "report.html"} <= drawn
    with pytest.raises(SiteError):
        reproduce(settings(tmp_path, sites="L9.mid"))
    assert {path.name for path in tmp_path.iterdir()} == drawn | others
    reproduce(settings(tmp_path, n=40, parts="geometry", figures=True, compare_task=False))
    figures = {f"geometry_{name}" for name in ("sites_prefixed", "best", "by_site")}
    assert {path.name for path in tmp_path.iterdir()} == others | {
        "results.json",
        "prompts.json",
        "prompts.safetensors",
        "parts",
        *(f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")),
    }


def test_only_names_of_the_folder_itself_are_forgotten(tmp_path: Path) -> None:
    out, beside = tmp_path / "out", tmp_path / "beside.png"
    out.mkdir()
    for path in (beside, out / "mine.png", out / "sweep.png"):
        path.write_text("kept?")
    named = ["../beside.png", str(beside), "..", "sweep.png", 3, "not there.svg"]
    (out / "results.json").write_text(json.dumps({"files": named}))
    forget(out)
    assert [path.name for path in out.iterdir()] == ["mine.png"] and beside.exists()
    (out / "results.json").write_text("[]")
    forget(out)
    assert [path.name for path in out.iterdir()] == ["mine.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed was 0 and is now 5"),
        ({"compare_task": False}, "compare_task was True and is now False"),
        ({"sites": "L2.pre"}, "sites was 'L1.mid,L2.pre' and is now 'L2.pre'"),
        ({"log_odds": 3.0}, "log_odds was 10.0 and is now 3.0"),
    ],
)
def test_changed_settings_are_refused(whole: Path, change: dict[str, Any], message: str) -> None:
    before = (whole / "results.json").read_bytes()
    with pytest.raises(SettingError, match="cannot resume") as refused:
        reproduce(settings(whole, resume=True, **change))
    assert message in str(refused.value)
    assert (whole / "results.json").read_bytes() == before
