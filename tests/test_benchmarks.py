"""Every benchmark runs at its smallest size and writes strict JSON with positive figures."""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device, end_to_end, growth, hooks, penalties, qp, ratios, replay, serving
from benchmarks.floor import BarePasses
from benchmarks.measure import medians
from benchmarks.qp_peers import OURS
from benchmarks.qp_problem import Exact, QPProblem
from lrqp_torch.qp import MahalanobisQP
from lrqp_torch.stream.sites import blocks_of

Main = Callable[[Sequence[str]], None]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a benchmark's ``main`` and read what it wrote."""

    def run_main(main: Main, *options: str) -> dict[str, Any]:
        path, threads = tmp_path / "figures.json", torch.get_num_threads()
        try:
            main([*options, "--repeats", "1", "--json", str(path)])
        finally:
            torch.set_num_threads(threads)

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not strict JSON")

        figures: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
        assert figures["title"] and figures["torch"] == torch.__version__
        assert figures["rows"]
        assert all(row.keys() == figures["rows"][0].keys() for row in figures["rows"])
        return figures

    return run_main


def positive(rows: list[dict[str, Any]], *columns: str) -> None:
    for row in rows:
        for column in columns:
            assert math.isfinite(row[column]) and row[column] > 0, (row, column)


def test_qp(run: Callable[..., dict[str, Any]]) -> None:
    options = ("--batches", "3", "--classes", "2,3", "--width", "8", "--seconds", "0")
    rows = run(qp.main, *options)["rows"]
    timed = [row for row in rows if row["forward, ms"] is not None]
    positive(timed, "forward, ms", "µs each", "× bare", "× ours")
    absent = [row for row in rows if row["forward, ms"] is None]
    assert all(": not installed: pip install " in row["method"] for row in absent)
    ours = [row for row in rows if row["method"] == OURS]
    assert {row["K"] for row in ours} == {2, 3}
    assert all(row["violation"] == 0 and row["gradient error"] < 1e-9 for row in ours)
    assert all(row["both × ours"] == 1 for row in ours)


def test_penalties(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    penalties.main(["--n", "60", "--sites", "L3.pre", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 2 * len(penalties.PENALTIES)
    twins = [row for row in rows if row["dose"] == "twin"]
    # Dosed by the twin, the penalty does not matter, and the edit does what the twin does.
    assert all(row["recovered"][0] > 0.9 and row["kl"][0] < 0.1 for row in twins)
    lengths = [row["length"] for row in twins]
    assert max(lengths) < 1.1 * min(lengths)


def test_a_missing_solver_is_a_row_that_says_so(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qp, "find_spec", lambda name: None)
    options = ("--batches", "2", "--classes", "2", "--width", "8", "--seconds", "0")
    names = [row["method"] for row in run(qp.main, *options)["rows"]]
    assert names[:2] == [qp.BARE, OURS]
    assert any("quadprog" in name and name.endswith("pip install quadprog") for name in names[2:])


def test_the_exact_answer_agrees_with_autograd_through_our_solver() -> None:
    problem = QPProblem.random(6, 5, 12, "cpu")
    exact = Exact.of(problem)
    leaf = problem.x.clone().requires_grad_()
    found = MahalanobisQP(5).solve(leaf, problem.target, 10.0, problem.geometry).x_new
    (gradient,) = torch.autograd.grad((found * problem.direction).sum(), leaf)
    assert max(exact.errors(found, gradient)) < 1e-9  # type: ignore[type-var]
    assert problem.violation(exact.x_new) < 1e-9
    assert problem.violation(problem.x) > 1
    wrong = exact.errors(exact.x_new + 1, exact.gradient * 1.1)
    assert wrong[0] > 0.01 and wrong[1] == pytest.approx(0.1)


def test_hooks(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "find_spec", lambda name: None)
    rows = run(hooks.main, "--models", "tiny", "--batches", "2", "--length", "12")["rows"]
    positive([row for row in rows if row["milliseconds"] is not None], "milliseconds")
    names = [row["what"] for row in rows]
    assert names[:5] == [hooks.BARE, *hooks.CONTEXTS]
    positive(rows[1:5], "in the hooks, µs", hooks.AROUND)
    assert rows[1]["largest logit difference"] == 0  # both additions do the same
    assert sum("not installed: pip install" in name for name in names) == 3
    assert "--steering-vectors-python" in names[-1]


def test_replay(run: Callable[..., dict[str, Any]]) -> None:
    options = ("--models", "tiny", "--batch", "3", "--length", "14", "--suffix", "5")
    figures = run(replay.main, *options)
    positive(figures["rows"], "milliseconds", "times faster than full")
    positive(figures["sweeps"], "sweep, seconds", "floor, seconds", "sweep over floor")
    (replayed,) = [row for row in figures["rows"] if "replayed" in row["run"]]
    assert replayed["largest relative logit difference"] <= 1e-5
    assert figures["sweeps"][0]["sites"] == 8


@torch.no_grad()
def test_bare_passes_give_the_clean_logits_and_leave_the_model_whole() -> None:
    torch.manual_seed(0)
    model = replay.tiny().eval()
    blocks = list(blocks_of(model))
    inputs = {"input_ids": torch.randint(99, (3, 9)), "attention_mask": torch.ones(3, 9)}
    bare = BarePasses(model, inputs, 5)
    clean = bare.clean().logits[:, -1]
    for _ in range(2):
        assert torch.allclose(bare.suffix(0)[:, -1], clean, atol=1e-5)
    assert not torch.allclose(bare.suffix(3)[:, -1], clean, atol=1e-3)
    assert list(blocks_of(model)) == blocks


def test_end_to_end(run: Callable[..., dict[str, Any]]) -> None:
    rows = run(end_to_end.main, "--model", "organism", "--n", "12")["rows"]
    stages = {row["stage"]: row for row in rows}
    positive(
        [stages[name] for name in ("capture", "sweep", "total")],
        "seconds",
        "unavoidable passes, seconds",
        "over unavoidable",
    )
    positive(
        [stages[name] for name in ("probe fits", "covariance", "figures", "report")], "seconds"
    )
    total, passes = (stages.pop(name)["seconds"] for name in list(stages)[-2:])
    assert 0 < passes < total
    assert sum(row["seconds"] for row in stages.values()) == pytest.approx(total, rel=0.02)


def test_growth(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "growth.png"
    rows = run(growth.main, "--tiny", "--plot", str(path))["rows"]
    positive(rows, "milliseconds", "value")
    assert {row["axis"] for row in rows} == {"prompts", "classes", "tokens"}
    assert {row["step"] for row in rows} == set(growth.STEPS)
    assert all(row["peak memory, MiB"] >= 0 for row in rows)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_knees_are_where_time_begins_to_grow_faster() -> None:
    values = (10, 100, 1000, 10_000)
    flat_then_steep = [(seconds, 1.0) for seconds in (1.0, 1.0, 1.0, 10.0)]
    (line,) = growth.knees(growth._curve("prompts", "solve", values, flat_then_steep))
    assert "steeper from 0.00 to 1.00 at 10000" in line
    straight = [(float(value), 1.0) for value in values]
    (line,) = growth.knees(growth._curve("prompts", "solve", values, straight))
    assert "prompts^1.00" in line and "steeper" not in line


def test_ratios(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "find_spec", lambda name: None)
    sections = "one at a time,models,half precision,metrics,fits,whole commands"
    figures = run(ratios.main, "--small", "--sections", sections)
    rows = {row["what"]: row for row in figures["rows"]}
    assert figures["hardware"].endswith(f"1 thread, torch {torch.__version__}")
    solve = rows["edit.solve, K = 2, B = 1"]
    assert solve["aim"] == "≤ 1 ×" and solve["reached"] in ("yes", "no")
    for row in rows.values():
        if row["ours"] is None:
            assert ": not installed: pip install " in row["against"] and row["reached"] is None
        elif row["other"] is not None:
            assert row["ratio"] == pytest.approx(row["ours"] / row["other"])


def test_a_ratio_is_held_against_its_aim_and_a_figure_against_its_own() -> None:
    def reached(**given: Any) -> Any:
        return ratios.ratio("what", 3.0, "other", 2.0, **given)["reached"]

    assert reached(aim=1.5) == "yes" and reached(aim=1.4) == "no" and reached() is None
    assert reached(aim=3, over=False) == "yes" and reached(aim=2.9, over=False) == "no"


def test_on_a_gpu_ratios_are_those_of_the_device_benchmark(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[dict[str, Any]]] = {
        "models": [
            {"model": "GPT-2 small", "what": "bare, ms", "ms": 10.0},
            {
                "model": "GPT-2 small",
                "what": "in an open context, L6.mid",
                "K": 10,
                "added µs": 251,
            },
            {"model": "GPT-2 small", "what": "pass as a graph, L6.mid", "K": 10, "error": "no"},
            {"model": "Llama-8B's shape", "what": "bare, ms", "ms": 38.0},
            {"model": "Llama-8B's shape", "what": "in an open context", "K": 2, "added µs": 379},
        ],
        "generating": [{"what": "bare, ms a token", "ms": 9.0}, {"what": "added", "K": 2, "µs": 9}],
        "proposing": [
            {"K": 2, "B": b, "dtype": kind, "graph µs": 20.0 + n, "products in a graph µs": 7.0}
            for b in (16, 1024, 16384)
            for n, kind in enumerate(("float32", "bfloat16"))
        ],
        "probe fits": [{"together": 1.0, "one by one": 9.0, "ratio": 9.0}],
    }
    sections = {name: lambda arguments, rows=rows: rows for name, rows in found.items()}
    monkeypatch.setattr(ratios.device, "SECTIONS", sections)
    rows = ratios.on_a_gpu(Namespace(device="cuda"))
    aims = [(row["aim"], row["reached"]) for row in rows]
    assert aims[:3] == [("≤ 250 µs", "no"), ("≤ 380 µs", "yes"), ("≤ 150 µs", "yes")]
    assert aims[3:] == [
        ("≤ 1.5 ×", "yes"), ("≤ 25 µs", "yes"), ("≤ 1.5 ×", "yes"), ("≤ 3 ×", "yes"),
        ("≤ 1.5 ×", "yes"), ("≤ 0.1 ×", "no"),
    ]  # fmt: skip


def test_sections_on_a_gpu_cost_each_other_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails, one that ends its process, and one for which there is no time."""
    started: list[list[str]] = []

    def run(command: Sequence[str], check: bool) -> Namespace:
        started.append(command[command.index("--sections") + 1].split(","))
        try:
            device.main(command[3:])
        except SystemExit as ended:
            return Namespace(returncode=ended.code)
        return Namespace(returncode=0)

    def section(arguments: Namespace) -> list[dict[str, Any]]:
        assert arguments.small and 0 < arguments.limit <= 60
        return [{"what": "found", "limit": arguments.limit}]

    def ends(arguments: Namespace) -> Any:
        raise SystemExit(1)

    sections: dict[str, Any] = {"a": section, "fails": lambda _: 1 / 0, "ends": ends, "b": section}
    monkeypatch.setattr(device, "SECTIONS", sections)
    monkeypatch.setattr(device, "DEFAULT", [*sections])
    monkeypatch.setattr(device.subprocess, "run", run)
    path = tmp_path / "found.json"
    device.main(["--small", "--json", str(path)])
    found = json.loads(path.read_text())
    assert started == [["a", "fails", "ends", "b"], ["b"]] and [*found] == [*sections]
    assert found["a"][0]["what"] == found["b"][0]["what"] == "found"
    assert "ZeroDivisionError" in found["fails"][0]["error"]
    assert "ended with 1 within" in found["ends"][0]["error"]
    device.main(["--small", "--json", str(path), "--sections", "a,b", "--minutes", "0.1"])
    left = json.loads(path.read_text())
    assert all("no time was left" in rows[0]["error"] for rows in left.values())


def test_alternatives_take_turns_and_slow_ones_sit_out() -> None:
    calls: list[str] = []
    alternatives = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert all(value > 0 for value in medians(alternatives, 2, "cpu").values())
    assert calls == ["a", "b"] * 3
    calls.clear()
    medians(alternatives, 5, "cpu", seconds=1e-12)
    assert calls == ["a", "b"]
    calls.clear()
    medians(alternatives, 1, "cpu", calls=2)
    assert calls == ["a", "a", "b", "b"] * 2


def test_serving_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    serving.main(["--small"])
    assert "make test-serving" in capsys.readouterr().out
