"""Whole files by one writer, strict JSON, and digests that see all that a model computes with."""

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import FAMILIES_BUILT, build_family
from torch import nn
from transformers import AutoModelForCausalLM

from lrqp_torch.errors import NonFiniteError, OutputError, SavedEditError
from lrqp_torch.files import (
    LOCK_FILE,
    digest_model,
    from_json,
    read_json,
    sole_writer,
    to_json,
    write_json,
)

HOLD = """
import sys, time
from pathlib import Path
from lrqp_torch.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    process = holder(folder)
    try:
        said = pytest.raises(OutputError, match=f"process {process.pid} on .* writes to")
        with said, sole_writer(folder):
            pytest.fail("two writers")
        with sole_writer(tmp_path / "another"):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # What a dead process held is free, and no file stays behind.
    assert (folder / LOCK_FILE).is_file()
    with sole_writer(folder):
        assert str(os.getpid()) in (folder / LOCK_FILE).read_text()
        assert "on" in (folder / LOCK_FILE).read_text()
    assert list(folder.iterdir()) == []


def test_one_process_is_one_writer_too(tmp_path: Path) -> None:
    refused = pytest.raises(OutputError, match=f"process {os.getpid()}")
    with sole_writer(tmp_path), refused, sole_writer(tmp_path):
        pytest.fail("two writers")
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_lent_is_for_what_saves_within_it_alone(tmp_path: Path) -> None:
    refused: list[OutputError] = []

    def other() -> None:
        try:
            with sole_writer(tmp_path):
                pytest.fail("two writers")
        except OutputError as error:
            refused.append(error)

    with sole_writer(tmp_path, lends=True):
        with sole_writer(tmp_path):
            assert (tmp_path / LOCK_FILE).is_file()
        assert (tmp_path / LOCK_FILE).is_file()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(OutputError), sole_writer(tmp_path, lends=True):
            pytest.fail("two runs")
    assert len(refused) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_writers_that_wait_for_each_other_never_overlap(tmp_path: Path) -> None:
    inside, most, done = [0], [0], [0]

    def write() -> None:
        while done[0] < 200:
            try:
                with sole_writer(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    done[0] += 1
                    inside[0] -= 1
            except OutputError:
                pass

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and done[0] >= 200


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    value = {"ö": [1, 2.5, None, True, "x"], "deep": {"er": [[], {}]}, "big": 10**30}
    path = tmp_path / "value.json"
    write_json(path, value)
    assert read_json(path, SavedEditError) == value
    assert "ö" in path.read_text(encoding="utf-8")
    assert from_json(to_json(value), "it", SavedEditError) == value
    with pytest.raises(SavedEditError, match="larger than any"):
        read_json(path, SavedEditError, most=10)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_are_named_and_leave_the_file(
    tmp_path: Path, number: float
) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(NonFiniteError, match=r"sites\.L0\.mid\.2 is NaN or infinite"):
        write_json(path, {"sites": {"L0.mid": [1.0, (2.0,), number]}, "other": math.nan})
    with pytest.raises(NonFiniteError, match="the value is NaN"):
        write_json(path, number)
    assert read_json(path, SavedEditError) == 1 and list(tmp_path.iterdir()) == [path]


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in ({1, 2}, object(), loop, {(1, 2): 3}):
        with pytest.raises(OutputError, match="JSON"):
            write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[1, Infinity]",
        "-Infinity",
        "1e999",
        '{"a": 1, "a": 2}',
        '{"a": -1e400}',
        "[" * 10**5,
        "1" * 5000,
    ],
)
def test_damaged_json_raises_the_error_asked_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(SavedEditError, match=r"bad\.json is not valid JSON"):
        read_json(path, SavedEditError)


def test_files_that_cannot_be_read_raise_the_error_asked_for(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('"é"'.encode("latin-1"))
    with pytest.raises(SavedEditError, match="not valid JSON"):
        read_json(tmp_path / "latin.json", SavedEditError)
    for name in ("missing.json", ""):
        with pytest.raises(SavedEditError, match="cannot read"):
            read_json(tmp_path / name, SavedEditError)


def ablate(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[-1].attn.c_proj.weight[-1, -1] += 1e-3


def set_data(model: Any) -> None:
    model.transformer.wte.weight.data[-1, -1] = 0.5


def change_buffer(model: Any) -> None:
    model.transformer.register_buffer("mask", torch.zeros(3), persistent=False)


def change_config(model: Any) -> None:
    model.config.layer_norm_epsilon = 1e-3


def change_module(model: Any) -> None:
    model.transformer.h[1].ln_2.eps = 1e-3


def change_activation(model: Any) -> None:
    model.transformer.h[1].mlp.act = nn.ReLU()


def change_dtype(model: Any) -> None:
    model.transformer.h[1].double()


@pytest.mark.parametrize(
    "change",
    [
        ablate,
        set_data,
        change_buffer,
        change_config,
        change_module,
        change_activation,
        change_dtype,
    ],
)
def test_a_model_that_computes_something_else_is_another(change: Callable[[Any], None]) -> None:
    model = build_family("gpt2")
    before = digest_model(model)
    assert digest_model(model) == before
    change(model)
    assert digest_model(model) != before


def test_a_function_in_place_of_forward_counts_by_what_it_does() -> None:
    def given(forward: Any) -> str:
        layer = nn.Linear(4, 4)
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.forward = forward if forward else layer.forward
        return digest_model(layer)

    def times(scale: Any) -> Any:
        return lambda x: x * scale

    one, two = torch.ones(2), torch.zeros(2)
    named = partial(torch.add, other=1), partial(torch.add, other=2)
    ways = [None, lambda x: x, lambda x: x + 1, times(2), times(3), times(one), times(two), *named]
    assert len({given(way) for way in ways}) == len(ways)
    assert given(times(2)) == given(times(2)) and given(times(one)) == given(times(one + 0))


def test_buffers_and_plain_modules_count() -> None:
    def plain(p: float = 0.1, mean: float = 0.0) -> nn.Module:
        norm = nn.BatchNorm1d(4)
        norm.running_mean.fill_(mean)  # type: ignore[union-attr]
        return nn.Sequential(norm, nn.Dropout(p), nn.LeakyReLU(0.1))

    torch.manual_seed(0)
    assert digest_model(plain()) == digest_model(plain())
    assert len({digest_model(m) for m in (plain(), plain(0.2), plain(mean=1.0))}) == 3


@pytest.mark.parametrize("family", sorted(FAMILIES_BUILT)[:12])
def test_running_a_model_does_not_make_it_another(family: str, tmp_path: Path) -> None:
    model = build_family(family)
    before = digest_model(model)
    ids = torch.randint(3, 20, (2, 9))
    with torch.no_grad():
        model(input_ids=ids)
    model.train().eval()
    assert digest_model(model) == before


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_model_is_the_same_wherever_it_is_loaded_from(family: str, tmp_path: Path) -> None:
    model = build_family(family)
    before = digest_model(model)
    model.save_pretrained(tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert digest_model(model) == digest_model(again.eval()) == before


def test_where_a_module_computes_is_not_what() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build_family("gpt2")
    before = digest_model(model)
    block = model.transformer.h[0]
    hooks.add_hook_to_module(block, hooks.AlignDevicesHook("cpu"))
    assert "forward" in vars(block) and digest_model(model) == before
    hooks.remove_hook_from_module(block)
    block.forward = lambda *args, **kwargs: args[0]
    changed = digest_model(model)
    hooks.add_hook_to_module(block, hooks.AlignDevicesHook("cpu"))
    assert changed != before and digest_model(model) == changed
