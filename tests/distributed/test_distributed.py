"""Many processes give the numbers of one, and end together when one of them ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import WIDTH, Prompts, build
from ranks_for_tests import command, on_ranks
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch import distributed
from lrqp_torch.distributed import Ranks, joined, launched
from lrqp_torch.errors import (
    ActivationStoreError,
    ConvergenceError,
    LabelError,
    LRQPError,
    RankError,
    SettingError,
    SiteError,
    ToldError,
)
from lrqp_torch.files import digest_model

SITES = ["L1.mid", "L2.pre"]
LENGTHS = [5, 9, 3, 7, 7, 6, 8, 4, 10, 5, 6]
SIZES = (2, 3)


def prompts() -> tuple[dict[str, Tensor], Tensor]:
    inputs = Prompts.random(LENGTHS).padded("left")
    return inputs, torch.full((len(LENGTHS),), max(LENGTHS) - 1)


def data(n: int = 200, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % classes
    x = torch.randn(n, 10, generator=generator, dtype=torch.float64)
    return x + torch.randn(classes, 10, generator=generator, dtype=torch.float64)[labels], labels


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_shares_cover_all_rows_once_and_differ_by_at_most_one() -> None:
    for size in (1, 2, 3, 7):
        for n in (0, 1, 5, 6, 100):
            shares = [Ranks(rank, size).share(n) for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            turns = [list(range(n))[Ranks(rank, size).turns] for rank in range(size)]
            assert sorted(row for turn in turns for row in turn) == list(range(n))


def test_one_process_needs_no_group() -> None:
    model, (inputs, at) = build("llama"), prompts()
    x, labels = data()
    with joined() as ranks:
        assert ranks == Ranks() and ranks.is_main and not launched()
        found = distributed.capture(model, inputs, SITES, at, ranks=ranks)
        covariance = ranks.merge(lrqp.Covariance(10).update(x))
        assert ranks.gather(3) == [3] and ranks.exchange({1: 2}) == {1: 2}
        with pytest.raises(LabelError), ranks.together():
            raise LabelError("here")
    assert same(found, lrqp.capture(model, inputs, SITES, at))
    assert torch.equal(covariance.finish().covariance, lrqp.Mahalanobis.fit(x).covariance)
    probe = distributed.fit_batches([(x, labels)], ranks=Ranks(), tolerance=1e-12)
    alone = lrqp.LinearProbe.fit(x, labels, tolerance=1e-12)
    assert torch.allclose(probe.weight, alone.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "two"}, "RANK is 'two'"),
        ({"RANK": "5"}, "RANK is 5 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
    ],
)
def test_variables_that_contradict_one_another(changes: dict[str, str], words: str) -> None:
    right = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert launched(right) and not launched(right | {"WORLD_SIZE": "1"}) and not launched({})
    with pytest.raises(RankError, match=words):
        launched(right | changes)


def _everything() -> dict[str, Any]:
    model, (inputs, at) = build("llama"), prompts()
    mask = inputs["attention_mask"].bool()
    x, labels = data()
    counted = [0]
    with joined("cpu") as ranks:
        found: dict[str, Any] = {
            name: distributed.capture(model, inputs, SITES, where, ranks=ranks, **options)
            for name, where, options in (
                ("positions", at, {"batch_size": 2}),
                ("tokens", at, {"batch_tokens": 20}),
                ("one batch", at, {"batch_size": 64}),
                ("no batches", at, {}),
                ("mask", mask, {"batch_size": 2}),
                ("everywhere", None, {"batch_size": 2}),
            )
        }

        def count(done: int) -> None:
            counted[0] += done

        distributed.capture(model, inputs, SITES, at, ranks=ranks, batch_size=2, progress=count)
        streamed = lrqp.Covariance(WIDTH)
        rows = []
        for here, part in distributed.capture_batches(
            model, inputs, "L1.mid", at, ranks=ranks, batch_size=2
        ):
            streamed.update(part["L1.mid"])
            rows += here.tolist()
        merged = ranks.merge(streamed)
        moments = [merged.n_samples, merged.mean, merged.second, merged.third, merged.fourth]
        problems = {"abc": (x, labels), "ab": (x, labels % 2), "half": (x[:50], labels[:50])}
        probes = distributed.fit_many(problems, ranks=ranks)
        share = ranks.share(len(x))
        own = [(x[start : start + 7], labels[start : start + 7]) for start in share[::7]]
        own[-1] = tuple(part[: share.stop - share[::7][-1]] for part in own[-1])  # type: ignore
        whole = distributed.fit_batches(own, ranks=ranks)
        # All examples of two ranks, sorted by class: no rank has every class, the last none at all.
        order = labels.argsort(stable=True)
        half = order[slice(ranks.rank * 100, (ranks.rank + 1) * 100)]
        sorted_ = distributed.fit_batches(
            [(x[half], labels[half])] if len(half) else [], ranks=ranks
        )
        few = ranks.share(2)
        gathered = ranks.gather_rows(
            torch.tensor(list(few), dtype=torch.long),
            {"a": torch.tensor([[5.0, row] for row in few], dtype=torch.bfloat16)} if few else {},
            2,
        )
        tell = ranks.from_main("main" if ranks.is_main else "other")
    return found | {
        "counted": counted[0],
        "rows": rows,
        "moments": moments,
        "probes": {name: (p.weight, p.bias, p.report) for name, p in probes.items()},
        "whole": (whole.weight, whole.report),
        "sorted": sorted_.weight,
        "gathered": gathered["a"],
        "told": tell,
    }


@pytest.fixture(scope="module", params=SIZES)
def everything(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    found = on_ranks(request.param, _everything)
    for result in found:
        assert isinstance(result, dict), result
    yield found


def test_capture_is_bit_equal_on_every_rank(everything: list[dict[str, Any]]) -> None:
    model, (inputs, at) = build("llama"), prompts()
    mask = inputs["attention_mask"].bool()
    expected = {
        "positions": lrqp.capture(model, inputs, SITES, at, batch_size=2),
        "tokens": lrqp.capture(model, inputs, SITES, at, batch_tokens=20),
        "one batch": lrqp.capture(model, inputs, SITES, at),
        "mask": lrqp.capture(model, inputs, SITES, mask, batch_size=2),
        "everywhere": lrqp.capture(model, inputs, SITES, batch_size=2),
    }
    size = len(everything)
    split = lrqp.capture(model, inputs, SITES, at, batch_size=-(-len(LENGTHS) // size))
    for result in everything:
        for name, activations in expected.items():
            assert same(result[name], activations), name
        assert same(result["no batches"], split)
    # Rank 0 alone shows progress, and it adds up.
    assert [r["counted"] for r in everything] == [len(LENGTHS)] + [0] * (size - 1)


def test_streamed_covariance_is_that_of_all_activations(everything: list[dict[str, Any]]) -> None:
    model, (inputs, at) = build("llama"), prompts()
    x = lrqp.capture(model, inputs, "L1.mid", at, batch_size=2)["L1.mid"]
    one = lrqp.Covariance(WIDTH).update(x)
    assert sorted(row for r in everything for row in r["rows"]) == list(range(len(LENGTHS)))
    for result in everything:
        n_samples, mean, second, third, fourth = result["moments"]
        assert n_samples == len(x)
        for own, other in ((mean, one.mean), (second, one.second), (third, one.third)):
            assert torch.allclose(own, other, rtol=1e-9, atol=1e-9)
        assert torch.allclose(fourth, one.fourth, rtol=1e-9)
        for own, first in zip(result["moments"][1:], everything[0]["moments"][1:], strict=True):
            assert torch.equal(own, first)


def test_probes_are_those_of_one_process(everything: list[dict[str, Any]]) -> None:
    x, labels = data()
    problems = {"abc": (x, labels), "ab": (x, labels % 2), "half": (x[:50], labels[:50])}
    expected = lrqp.LinearProbe.fit_many(problems)
    alone = lrqp.LinearProbe.fit_batches([(x, labels)])
    for result in everything:
        assert list(result["probes"]) == list(problems)
        for name, (weight, bias, report) in result["probes"].items():
            assert torch.allclose(weight, expected[name].weight, rtol=0, atol=1e-9)
            assert torch.allclose(bias, expected[name].bias, rtol=0, atol=1e-9)
            assert report.n_samples == len(problems[name][0])
            assert torch.equal(weight, everything[0]["probes"][name][0])
        weight, report = result["whole"]
        assert report.n_samples == len(x) and report.l2 == 1 / len(x)
        assert torch.allclose(weight, alone.weight, rtol=0, atol=1e-6)
        assert torch.allclose(weight, expected["abc"].weight, rtol=0, atol=1e-6)
        assert torch.allclose(result["sorted"], expected["abc"].weight, rtol=0, atol=1e-6)
        for name in ("whole", "sorted"):
            first, own = everything[0][name], result[name]
            pair = (first[0], own[0]) if name == "whole" else (first, own)
            assert torch.equal(*pair)


def test_fewer_rows_than_ranks(everything: list[dict[str, Any]]) -> None:
    for result in everything:
        expected = torch.tensor([[5.0, 0.0], [5.0, 1.0]], dtype=torch.bfloat16)
        assert torch.equal(result["gathered"], expected) and result["told"] == "main"


def _store(folder: Path, sites: list[str]) -> bool:
    model, (inputs, at) = build("llama"), prompts()
    with joined("cpu") as ranks:
        options: dict[str, Any] = {"shard_size": 4, "batch_size": 2}
        store = distributed.capture_to(folder, model, inputs, sites, at, ranks=ranks, **options)
        return (store is not None) == ranks.is_main


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_is_that_of_one_process_however_it_was_begun(tmp_path: Path) -> None:
    model, (inputs, at) = build("llama"), prompts()
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    options: dict[str, Any] = {"shard_size": 4, "batch_size": 2}

    def stop(done: int) -> None:
        if (shared / "index.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lrqp.capture_to(shared, model, inputs, SITES, at, **options, progress=stop)
    assert not (shared / "shard-00001.safetensors").exists()
    assert on_ranks(2, _store, shared, SITES) == [True, True]
    lrqp.capture_to(alone, model, inputs, SITES, at, **options)
    assert files(shared) == files(alone)
    lrqp.ActivationStore(shared).verify()
    # An error of rank 0's folder ends all ranks, and one of them tells it.
    first, second = on_ranks(2, _store, shared, SITES[:1])
    assert isinstance(first, ActivationStoreError) and isinstance(second, ToldError)
    assert "differs in sites" in str(first) and "rank 0: " in str(second)


def settings(out: Path, **changes: Any) -> Any:
    from lrqp_torch.study.settings import Settings

    base = Settings(
        model="organism",
        out=out,
        n=48,
        sites="L0.mid,L1.mid,L2.pre,L3.mid",
        prefixes="bundled",
        batch_size=7,
        parts="flipping",
        figures=False,
        report=False,
    )
    return replace(base, **changes)


def _study(wanted: Any) -> dict[str, Any] | None:
    from lrqp_torch.study.records import to_json
    from lrqp_torch.study.run import run

    with joined("cpu") as ranks:
        results = run(wanted, ranks)
        return None if results is None else to_json(results)


def numbers(folder: Path) -> dict[str, Any]:
    """All that must not depend on the number of ranks: everything but the times."""
    raw: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del raw["elapsed"]
    raw["parts"]["other_task"].pop("seconds")
    return raw


def assert_same_study(folder: Path, other: Path) -> None:
    from lrqp_torch.study.results import load_prompts

    found, expected = load_prompts(folder), load_prompts(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(found[name].double(), values.double(), rtol=1e-6, atol=1e-6), name
        if name.endswith("logit_difference"):
            assert torch.equal(found[name] > 0, values > 0)
    assert numbers(folder)["sites"].keys() == numbers(other)["sites"].keys()
    for raw in (numbers(folder), numbers(other)):
        assert raw["ground_truth"] is not None
    assert numbers(folder) == numbers(other)


def test_a_study_is_that_of_one_process_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrqp_torch.study import sweep
    from lrqp_torch.study.run import run as reproduce

    alone, shared, resumed = (tmp_path / name for name in ("alone", "shared", "resumed"))
    reproduce(settings(alone))
    first, *others = on_ranks(3, _study, settings(shared))
    assert isinstance(first, dict) and others == [None, None], others
    assert_same_study(shared, alone)
    assert {path.name for path in shared.iterdir()} == {path.name for path in alone.iterdir()}

    # Stopped in the third batch of four, alone; taken up by two ranks.
    run, calls = sweep._sweep_batch, []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(sweep, "_sweep_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        reproduce(settings(resumed))
    assert len(list((resumed / "parts" / "flipping.partial").iterdir())) == 2
    first, second = on_ranks(2, _study, settings(resumed, resume=True))
    assert isinstance(first, dict) and second is None, (first, second)
    assert_same_study(resumed, alone)
    # Settings that contradict what is kept: told once.
    first, second = on_ranks(2, _study, settings(resumed, resume=True, seed=1))
    assert isinstance(first, SettingError) and isinstance(second, ToldError)


def test_the_command_speaks_once(tmp_path: Path) -> None:
    common = ["reproduce", "--n", "40", "--sites", "L1.mid,L2.pre", "--parts", "flipping"]
    common += ["--no-figures", "--no-report", "--out", str(tmp_path / "study")]
    first, second = on_ranks(2, command, common, tmp_path)
    assert first[0] == 0 and second[0] == 0, (first, second)
    assert "Results are in" in first[1] and second[1] == "" and second[2] == ""
    for wrong, words in (
        (["--sites", "L99.mid"], "L99"),
        (["--train-share", "2"], "train_share"),
        (["--n", "2"], "greater than or equal to 4"),
    ):
        first, second = on_ranks(2, command, [*common, *wrong], tmp_path)
        assert first[0] == 2 and second[0] == 2, (first, second)
        assert words in first[2] and "Traceback" not in first[2] + second[2]
        assert second[1] == "" and second[2] == ""
    out = tmp_path / "store"
    line = ["capture", "--n", "30", "--sites", "L1.mid,L2.pre", "--shard-size", "12"]
    line += ["--batch-size", "5", "--out"]
    first, second = on_ranks(2, command, [*line, str(out)], tmp_path)
    assert first[0] == 0 and second[0] == 0, (first, second)
    assert "2 sites of 30 × 128 in float32, 3 files" in first[1] and "padding" in first[1]
    assert second[1] == ""
    alone = tmp_path / "alone"
    (only,) = on_ranks(1, command, [*line, str(alone), "--verify"], tmp_path)
    assert only[0] == 0 and files(out) == files(alone)


def _failing(how: str) -> float | str:
    """Seconds until this rank learned that rank 1 has failed, or what it was told."""
    with joined("cpu") as ranks:
        ranks.gather(None)
        began = time.perf_counter()
        if ranks.rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == 1 and how == "raised":
            raise ZeroDivisionError
        if ranks.rank == 1 and how == "fit":
            with ranks.together():
                raise ConvergenceError("no optimum")
        if how == "fit":
            with ranks.together():
                pass
        if how == "differ":
            ranks.agree({"seeds": 0, "the prompts": ranks.rank})
        try:
            ranks.total(torch.zeros(1000))
            ranks.gather(None)
        except RankError as error:
            assert "lost contact" in str(error)
            return time.perf_counter() - began
    return "not noticed"


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_rank_that_ends_ends_the_others(how: str) -> None:
    first, second, third = on_ranks(3, _failing, how)
    assert isinstance(first, float) and isinstance(third, float), (first, third)
    assert second == -signal.SIGKILL if how == "killed" else isinstance(second, ZeroDivisionError)


def test_an_error_of_one_rank_is_told_once_and_ends_all() -> None:
    first, second, third = on_ranks(3, _failing, "fit")
    assert isinstance(second, ConvergenceError)
    for other in (first, third):
        assert isinstance(other, ToldError) and "rank 1: no optimum" in str(other)
    for rank in on_ranks(2, _failing, "differ"):
        assert isinstance(rank, RankError) and not isinstance(rank, ToldError)
        assert "the prompts differ among the ranks: 0 on rank 0, 1 on rank 1" in str(rank)


def test_torchrun_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, torch
            import lrqp_torch.study.sweep as sweep
            from lrqp_torch.cli import main

            run, calls = sweep._sweep_batch, []

            def dying(*arguments, **options):
                calls.append(1)
                if os.environ["RANK"] == "1" and len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return run(*arguments, **options)

            sweep._sweep_batch = dying
            main()
        """)
    )
    out = tmp_path / "out"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += [str(script), "flipping", f"--out={out}", "--sites=L1.mid,L2.pre", "--batch-size=5"]
    ended = subprocess.run(
        [*line, "--device=cpu", "--no-figures", "--no-report"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode != 0
    assert "Signal 9" in ended.stderr or "SIGKILL" in ended.stderr, ended.stderr
    assert not (out / "results.json").exists()
    # The round before is kept.
    assert len(list((out / "parts" / "flipping.partial").iterdir())) == 2


def _tensor_parallel(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    with joined("cpu") as ranks:
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        inputs, at = prompts()
        found = lrqp.capture(model, inputs, SITES, at)
        edit = _edit()
        target = torch.ones(len(at), dtype=torch.long)
        with edit.at(model, "L1.mid", positions=at, target=target) as run, torch.no_grad():
            logits = model(**inputs).logits[:, -1]
        local = model.model.layers[0].mlp.up_proj.weight.to_local().shape
        shares = ranks.gather(tuple(local))
        digest = digest_model(model)
    odds = (run.log_odds_before, run.log_odds_after, run.floor)
    return {"found": found, "logits": logits, "odds": odds, "shares": shares, "digest": digest}


def _edit() -> lrqp.LRQP:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, WIDTH, generator=generator)
    return lrqp.LRQP.fit(x, (x[:, 0] > 0).long())


def test_edits_work_in_tensor_parallel_models(tmp_path: Path) -> None:
    # An even vocabulary: some versions of transformers divide it among the ranks.
    model, (inputs, at) = build("llama", vocab_size=62), prompts()
    model.save_pretrained(tmp_path)
    expected = lrqp.capture(model, inputs, SITES, at)
    target = torch.ones(len(at), dtype=torch.long)
    with _edit().at(model, "L1.mid", positions=at, target=target) as run, torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    first, second = on_ranks(2, _tensor_parallel, tmp_path)
    for rank in (first, second):
        assert isinstance(rank, dict), rank
        assert rank["shares"] == [(WIDTH, WIDTH)] * 2  # half of (2 · WIDTH, WIDTH): it is sharded
        assert same(rank["found"], first["found"])
        assert rank["digest"] == digest_model(model)
        for site in SITES:
            assert torch.allclose(rank["found"][site], expected[site], rtol=1e-4, atol=1e-4)
        before, after, floor = rank["odds"]
        assert bool((after >= floor).all()) and not bool((before >= floor).all())
        assert torch.allclose(after, run.log_odds_after, rtol=1e-3, atol=1e-3)
        assert torch.allclose(rank["logits"], logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(rank["logits"], first["logits"])


def test_bad_input_is_told_on_one_rank() -> None:
    first, second = on_ranks(2, _bad_site)
    assert isinstance(first, SiteError) and isinstance(second, ToldError)
    assert isinstance(second, LRQPError)


def _bad_site() -> None:
    inputs, at = prompts()
    with joined("cpu") as ranks:
        distributed.capture(build("llama"), inputs, ["L77.mid"], at, ranks=ranks)
