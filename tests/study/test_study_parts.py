"""Keeping the parts of a study, and going on after a stop."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lrqp_torch.errors import NonFiniteError, OutputError, SettingError
from lrqp_torch.study.context import ALONE, Advance, StudyContext
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.part import Given, Part
from lrqp_torch.study.parts import find_part
from lrqp_torch.study.records import from_json, to_json
from lrqp_torch.study.run import run_parts
from lrqp_torch.study.settings import Settings
from lrqp_torch.study.store import Finished, PartStore

SETTINGS = {"seed": 0, "n": 60, "model": "tiny"}


@dataclass(frozen=True)
class Count:
    total: float
    parts_before: list[str]


@dataclass(frozen=True)
class Measured:
    share: Estimate
    plain: float = 0.0


class Counting(Part[Count]):
    """A part that counts its runs, and may be told to stop in the middle."""

    result = Count

    def __init__(self, name: str) -> None:
        self.name, self.title = name, f"counting {name}"
        self.runs = 0
        self.stop: BaseException | None = None

    def work(self, context: StudyContext) -> int:
        return 5

    def compute(self, given: Given, advance: Advance) -> Count:
        self.runs += 1
        advance(2)
        if self.stop is not None:
            raise self.stop
        advance(3)
        before = sum(result.total for result in given.results.values())
        return Count(before + 1 / 3, list(given.results))

    def panels(self, result: Count) -> list[Any]:
        return []

    def figures(self, result: Count) -> dict[str, Any]:
        return {}

    def says(self, result: Count) -> list[str]:
        return []


@dataclass
class Study:
    folder: Path
    parts: dict[str, Counting]
    bars: dict[str, list[int]]

    def run(self, **changes: object) -> dict[str, Any]:
        def start(title: str, total: int) -> Advance:
            self.bars[title] = [total]
            return self.bars[title].append

        # These parts never look at the model.
        context = cast(StudyContext, SimpleNamespace(ranks=ALONE))
        settings = Settings("tiny", self.folder)
        given = Given(context, settings, None, lambda site: pytest.fail(site))
        store = PartStore(self.folder, SETTINGS | changes)
        finished = run_parts(given, list(self.parts.values()), store, start)
        assert finished is not None
        return {name: part.raw for name, part in finished.items()}

    def files(self) -> dict[str, Any]:
        """Every part's file but for the time that it took."""
        found = {}
        for path in (self.folder / "parts").glob("*.json"):
            found[path.name] = json.loads(path.read_text())
            assert found[path.name].pop("seconds") >= 0
        return found


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path, {name: Counting(name) for name in ("one", "two", "three")}, {})


def test_each_part_is_kept_with_its_settings(study: Study) -> None:
    results = study.run()
    assert [round(result["total"], 6) for result in results.values()] == [
        0.333333,
        0.666667,
        1.333333,
    ]
    assert results["three"]["parts_before"] == ["one", "two"]
    assert study.files()["two.json"] == {
        "part": "two",
        "fingerprint": SETTINGS,
        "result": results["two"],
    }
    assert study.bars["counting one"] == [5, 2, 3]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), ZeroDivisionError()])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    study: Study, stop: BaseException, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = Study(tmp_path_factory.mktemp("whole"), {n: Counting(n) for n in study.parts}, {})
    expected = whole.run()
    study.parts["two"].stop = stop
    with pytest.raises(type(stop)):
        study.run()
    assert sorted(study.files()) == ["one.json"]
    study.parts["two"].stop = None
    assert study.run() == expected
    assert study.files() == whole.files()
    assert {name: part.runs for name, part in study.parts.items()} == {
        "one": 1, "two": 2, "three": 1,
    }  # fmt: skip


def test_other_settings_are_named(study: Study) -> None:
    study.run()
    with pytest.raises(SettingError) as refused:
        study.run(seed=1, l2=0.5)
    for expected in ("seed was 0 and is now 1", "l2 was None and is now 0.5", "--resume"):
        assert expected in str(refused.value)
    assert "n was 60" not in str(refused.value)
    PartStore(study.folder, SETTINGS).clear()
    study.run(seed=1)
    assert study.files()["one.json"]["fingerprint"]["seed"] == 1


def test_numbers_that_strict_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    store = PartStore(tmp_path, SETTINGS)
    with pytest.raises(NonFiniteError, match="'sums'"):
        store.save("sums", Finished(to_json(Count(float("nan"), [])), 1.0))
    assert store.load("sums") is None and store.finished() == []


def test_a_damaged_part_is_reported(study: Study) -> None:
    study.run()
    path = study.folder / "parts" / "two.json"
    whole = path.read_text()
    for text in (whole[:40], "[]", whole.replace("0.666", "1e999, 0.666")):
        path.write_text(text)
        with pytest.raises(OutputError, match=r"two\.json.*damaged"):
            study.run()
    path.write_text(whole.replace('"total"', '"sum"'))
    with pytest.raises(OutputError, match="'two' is not what this version writes"):
        study.run()


def test_numbers_that_are_none_are_named() -> None:
    """As in a report of results that somebody has changed: never an error without a name."""
    part = find_part("geometry")
    for raw in (
        {},
        {"tasks": {"own": 3}},
        {"tasks": {"own": {"sites": 1}}},
    ):
        with pytest.raises(OutputError, match="'geometry' is not what this version writes"):
            part.read(raw)
    for value in ("x", [], {}, True, 10**400):
        with pytest.raises(ValueError, match="number"):
            from_json(Measured, {"share": value})
        with pytest.raises(ValueError, match="number"):
            from_json(Measured, {"share": 0.5, "share_interval": [0.1, value], "share_n": 3})
        with pytest.raises(ValueError, match="number"):
            from_json(Measured, {"share": 0.5, "plain": value})


def test_batches_are_kept_until_the_part_is_finished(tmp_path: Path) -> None:
    store = PartStore(tmp_path, SETTINGS)
    batches = store.batches("sweep")
    assert batches.load(0) is None and batches.count() == 0
    tensors = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.arange(4)[::2]}
    batches.save(0, tensors)
    batches.save(11, {"a": torch.zeros(1)})
    kept = store.batches("sweep").load(0)
    assert kept is not None and kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)
    assert store.in_words() == "Kept: 2 batches of sweep."
    with pytest.raises(SettingError, match="n was 60 and is now 61"):
        PartStore(tmp_path, SETTINGS | {"n": 61}).batches("sweep").load(0)
    store.save("sweep", Finished(to_json(Count(1.0, [])), 0.1))
    assert batches.count() == 0 and not batches.folder.exists()
    assert store.in_words() == "Kept: sweep."


def test_a_damaged_batch_is_reported(tmp_path: Path) -> None:
    batches = PartStore(tmp_path, SETTINGS).batches("sweep")
    batches.save(3, {"a": torch.zeros(9)})
    path = next(batches.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OutputError, match="damaged"):
        batches.load(3)


def test_an_empty_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "new", SETTINGS)
    assert store.load("one") is None
    assert store.in_words() == "Nothing was finished yet."
    store.clear()
