"""Activations on disk: the numbers of capture, resumed where they stopped, and named errors."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models_for_tests import WIDTH, Prompts, build
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.errors import ActivationStoreError, LRQPError, OutputError, SelectionError
from lrqp_torch.stream.capture import Reading
from lrqp_torch.stream.store import ActivationStore, capture_to

LENGTHS = [7, 4, 9, 6, 5, 4, 8, 9, 3, 6]
INPUTS = Prompts.random(LENGTHS).padded("left")
MASK = INPUTS["attention_mask"].bool() & (torch.arange(10) % 4 != 1)[:, None]
LAST = torch.full((10,), 8)
POSITIONS = {"one": LAST, "two": torch.stack([LAST, LAST - 1], 1), "mask": MASK, "all": None}
SITES = ["L1.mid", "L0.pre"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def store_of(folder: Path, **changes: Any) -> ActivationStore:
    """Ten prompts in shards of four; changes replace arguments."""
    arguments: dict[str, Any] = {
        "model": build("gpt2"),
        "inputs": INPUTS,
        "sites": SITES,
        "positions": LAST,
        "shard_size": 4,
        **changes,
    }
    return capture_to(folder, **arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a complete store."""
    return store_of(tmp_path / "store").folder


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_what_capture_returns(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model, at = build("gpt2", dtype=dtype), POSITIONS[kind]
    rows = [slice(0, 4), slice(4, 8), slice(8, 10)]
    parts = [
        lrqp.capture(
            model,
            {name: value[part] for name, value in INPUTS.items()},
            SITES,
            None if at is None else at[part],
            batch_size=3,
        )
        for part in rows[: 2 if kind == "mask" else 3]  # the last two have none in the mask
    ]
    if kind == "mask":
        parts.append(lrqp.capture(model, {n: v[8:] for n, v in INPUTS.items()}, SITES, at[8:]))
    store = store_of(tmp_path, model=model, positions=at, batch_size=3)
    assert list(store) == SITES and store.sites == tuple(SITES) and len(store) == 2
    for site in SITES:
        expected = torch.cat([part[site] for part in parts])
        stored = ActivationStore(tmp_path)[site]
        assert stored.shape == expected.shape and stored.dtype == dtype
        assert len(stored) == len(expected)
        if kind == "all":  # padding attends to nothing, and its numbers mean nothing
            real = INPUTS["attention_mask"].bool()
            assert torch.equal(stored.load()[real], expected[real])
        else:
            assert torch.equal(stored.load(), expected)
            whole = lrqp.capture(model, INPUTS, SITES, at)[site]
            tolerance = TOLERANCE if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.15}
            torch.testing.assert_close(stored.load(), whole, **tolerance)
    store.verify()


def test_a_shard_without_positions_is_an_empty_one(tmp_path: Path) -> None:
    mask = MASK.clone()
    mask[4:8] = False
    store = store_of(tmp_path, positions=mask)
    expected = lrqp.capture(build("gpt2"), INPUTS, SITES, mask)["L1.mid"]
    assert [shard.rows for shard in store.index.shards][1] == 0
    torch.testing.assert_close(store["L1.mid"].load(), expected, **TOLERANCE)
    assert torch.equal(store["L1.mid"][torch.arange(len(expected))], store["L1.mid"].load())


def test_is_indexed_like_a_tensor(folder: Path) -> None:
    stored = ActivationStore(folder)["L1.mid"]
    whole = stored.load()
    long = torch.tensor([9, 0, 4, 4, 3, -1])
    for index in (3, -2, slice(2, 9), slice(5, 5), slice(None), slice(-3, None), slice(0, 9, 4)):
        assert torch.equal(stored[index], whole[index])
    assert torch.equal(stored[::-3], whole.flip(0)[::3])
    assert torch.equal(stored[long], whole[long])
    assert torch.equal(stored[[1, 8]], whole[[1, 8]])
    assert torch.equal(stored[whole[:, 0] > 0], whole[whole[:, 0] > 0])
    assert stored[torch.tensor([], dtype=torch.long)].shape == (0, WIDTH)
    for bad in (10, -11, torch.tensor([3, 99]), torch.tensor([0.5]), torch.tensor([[1]])):
        with pytest.raises(SelectionError):
            stored[bad]
    assert "L1.mid, (10, 24)" in repr(stored)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 100])
def test_batches_are_those_of_split(folder: Path, rows: int) -> None:
    stored = ActivationStore(folder)["L1.mid"]
    expected = stored.load().split(rows)
    for _ in range(2):  # again and again
        batches = list(stored.batches(rows))
        assert len(batches) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
    with pytest.raises(SelectionError, match="at least 1"):
        stored.batches(0)


def test_what_is_read_is_the_readers_own(folder: Path) -> None:
    stored = ActivationStore(folder)["L1.mid"]
    before = stored.load()
    stored[2:4].add_(1)
    stored.load().zero_()
    assert torch.equal(stored.load(), before)


def test_feeds_a_covariance(folder: Path) -> None:
    stored, covariance = ActivationStore(folder)["L1.mid"], lrqp.Covariance(WIDTH)
    for part in stored.batches(3):
        covariance.update(part)
    expected = lrqp.Mahalanobis.fit(stored.load()).covariance
    torch.testing.assert_close(covariance.finish().covariance, expected)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[range]:
    """Let the capture of the shard after this many fail; the list receives what was captured."""
    gather, seen = Reading.gather, []

    def failing(self: Reading, examples: range, *rest: Any) -> dict[str, Tensor]:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(examples)
        return gather(self, examples, *rest)

    monkeypatch.setattr(Reading, "gather", failing)
    return seen


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_capture_goes_on(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    half = tmp_path / "half"
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            store_of(half)
    message = f"{3 - after} of 3 shards are missing" if after else "missing; give the folder"
    with pytest.raises(ActivationStoreError, match=message):
        ActivationStore(half)
    # What a killed process may leave besides: a shard that the index does not name.
    (half / f"shard-{after:05d}.safetensors").write_bytes(b"half a shard")
    with monkeypatch.context() as patch:
        seen = interrupt(patch, 99)
        done: list[int] = []
        store = store_of(half, progress=done.append)
    assert seen == [range(0, 4), range(4, 8), range(8, 10)][after:]
    assert sum(done) == 10
    assert torch.equal(store["L1.mid"].load(), ActivationStore(folder)["L1.mid"].load())
    assert sorted(path.name for path in half.iterdir()) == [
        "index.json",
        *(f"shard-{number:05d}.safetensors" for number in range(3)),
    ]
    with monkeypatch.context() as patch:
        seen = interrupt(patch, 0)  # nothing is captured any more
        store_of(half)
    assert seen == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model": build("gpt2", seed=1)}, "model"),
        ({"inputs": {**INPUTS, "input_ids": INPUTS["input_ids"].roll(1)}}, "inputs"),
        ({"positions": LAST - 1}, "positions"),
        ({"positions": POSITIONS["two"], "sites": "L0.pre"}, "positions, sites"),
        ({"shard_size": 5}, "shard size"),
    ],
)
def test_the_capture_of_something_else_is_refused(
    folder: Path, changes: dict[str, Any], names: str
) -> None:
    before = (folder / "index.json").read_bytes()
    with pytest.raises(ActivationStoreError, match=f"which differs in {names}; choose another"):
        store_of(folder, **changes)
    assert (folder / "index.json").read_bytes() == before
    store_of(folder, batch_size=2)  # batches change nothing but rounding


def test_another_mode_is_another_capture(folder: Path) -> None:
    with (
        pytest.raises(ActivationStoreError, match="differs in mode"),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        store_of(folder)
    model = build("gpt2").train()
    with pytest.raises(ActivationStoreError, match="differs in mode"), pytest.warns(UserWarning):
        store_of(folder, model=model)
    store_of(folder, model=model.eval())


def test_open_edits_are_refused(tmp_path: Path) -> None:
    model = build("gpt2")
    item = lrqp.Intervention("L0.mid", LAST, lambda x, context: x + 1)
    with (
        pytest.raises(ActivationStoreError, match="hooks or open edits"),
        lrqp.intervene(model, item),
    ):
        store_of(tmp_path, model=model)


@torch.no_grad()
def test_a_model_whose_hidden_states_were_asked_for_is_stored_as_before(folder: Path) -> None:
    model = build("gpt2")
    model(**INPUTS, output_hidden_states=True)
    assert torch.equal(
        store_of(folder, model=model)["L1.mid"][:], ActivationStore(folder)["L1.mid"][:]
    )


def change_index(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "index.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "index.json").write_text(json.dumps(content))


def change_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Another first shard, with an index that gives its true size."""
    file = folder / "shard-00000.safetensors"
    safetensors.torch.save_file(tensors, file)
    shards = json.loads((folder / "index.json").read_text())["shards"]
    shards[0]["size"] = file.stat().st_size
    change_index(folder, shards=shards)


def overwrite(folder: Path, blob: bytes) -> None:
    """Other bytes in the first shard, as many as before."""
    file = folder / "shard-00000.safetensors"
    file.write_bytes(blob.ljust(file.stat().st_size, b"\0")[: file.stat().st_size])


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


PAIR = {"L1.mid": torch.zeros(4, WIDTH), "L0.pre": torch.zeros(4, WIDTH)}
ONE_SHARD = {"rows": 4, "size": 1, "sha256": ""}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "index.json").unlink(), "index.json is missing"),
    "no JSON": (lambda f: (f / "index.json").write_text("{"), "not valid JSON"),
    "nested JSON": (lambda f: (f / "index.json").write_text("[" * 10**5), "not valid JSON"),
    "pickled index": (
        lambda f: (f / "index.json").write_bytes(pickle.dumps(Trap())),
        "not valid JSON",
    ),
    "huge index": (lambda f: (f / "index.json").write_text(" " * 10_000_001), "larger than any"),
    "foreign": (lambda f: change_index(f, format="other"), "not an index of lrqp_torch"),
    "newer": (lambda f: change_index(f, version=2), "format version 2.*update"),
    "a field missing": (lambda f: change_index(f, dtype=...), "damaged.*dtype"),
    "a field too many": (lambda f: change_index(f, path="/etc"), "damaged.*path"),
    "a shard elsewhere": (
        lambda f: change_index(f, shards=[{**ONE_SHARD, "file": "../../other.safetensors"}]),
        "damaged.*file",
    ),
    "a site with separators": (lambda f: change_index(f, sites=["../L0.pre"]), "damaged.*no site"),
    "a site twice": (lambda f: change_index(f, sites=["L0.pre"] * 2), "contradict"),
    "no site": (lambda f: change_index(f, sites=[]), "contradict"),
    "an unknown dtype": (lambda f: change_index(f, dtype="I64"), "contradict"),
    "a dtype that is no word": (lambda f: change_index(f, dtype=["F32"]), "contradict"),
    "an infinite size": (
        lambda f: (f / "index.json").write_text('{"format": 1e999}'),
        "no finite number",
    ),
    "a negative size": (lambda f: change_index(f, shape=[-24]), "contradict"),
    "shards too many": (lambda f: change_index(f, n_shards=2), "contradict"),
    "shards that are none": (lambda f: change_index(f, shards=3), "damaged"),
    "interrupted": (lambda f: change_index(f, n_shards=4), "interrupted: 1 of 4 shards"),
    "a shard missing": (lambda f: (f / "shard-00001.safetensors").unlink(), "00001.*is missing"),
    "a shard cut off": (
        lambda f: (f / "shard-00002.safetensors").write_bytes(b"abc"),
        "00002.*has 3 bytes",
    ),
    "a damaged header": (lambda f: overwrite(f, b"\xff" * 64), "cannot be read as safetensors"),
    "a pickled shard": (
        lambda f: overwrite(f, pickle.dumps(Trap())),
        "cannot be read as safetensors",
    ),
    "another width": (
        lambda f: change_shard(f, PAIR | {"L1.mid": torch.zeros(4, 8)}),
        r"L1.mid is \[4, 8\] F32, the index says \[4, 24\] F32",
    ),
    "another number of rows": (
        lambda f: change_shard(f, PAIR | {"L1.mid": torch.zeros(3, WIDTH)}),
        r"L1.mid is \[3, 24\]",
    ),
    "another dtype": (
        lambda f: change_shard(f, {name: x.double() for name, x in PAIR.items()}),
        "F64, the index says",
    ),
    "a site missing": (lambda f: change_shard(f, {"L1.mid": PAIR["L1.mid"]}), r"holds \['L1.mid'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(ActivationStoreError, match=message):
        ActivationStore(folder)
    if damage not in ("no index", "interrupted"):  # nor does a capture go on over it
        with pytest.raises(ActivationStoreError):
            store_of(folder)


@pytest.mark.parametrize("opened", ["before", "after"])
def test_numbers_that_changed_on_disk_are_found(folder: Path, opened: str) -> None:
    file = folder / "shard-00001.safetensors"
    blob = bytearray(file.read_bytes())
    store = ActivationStore(folder)
    first = store["L1.mid"].load()[0]
    blob[-5] ^= 1
    file.write_bytes(blob)
    if opened == "after":
        store = ActivationStore(folder)  # sizes and headers are as they were
    assert torch.equal(store["L1.mid"][0], first)
    for read in (store.verify, store["L1.mid"].load):
        with pytest.raises(ActivationStoreError, match=r"does not match its checksum"):
            read()


def test_two_captures_never_write_one_folder(tmp_path: Path) -> None:
    def capture_again(done: int) -> None:
        with pytest.raises(OutputError, match="writes to"):
            store_of(tmp_path / "new")

    store = store_of(tmp_path / "new", progress=capture_again)
    store.verify()
    assert {path.suffix for path in store.folder.iterdir()} == {".json", ".safetensors"}


def test_a_shard_that_vanishes_later_is_named(folder: Path) -> None:
    stored = ActivationStore(folder)["L1.mid"]
    shutil.rmtree(folder)
    with pytest.raises(ActivationStoreError, match="cannot be read"):
        stored[0]


def test_bad_arguments_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LRQPError, match=r"'L2.mid' is not stored"):
        ActivationStore(folder)["L2.mid"]
    assert "L2.mid" not in ActivationStore(folder)
    with pytest.raises(LRQPError, match="shard_size must be at least 1"):
        store_of(tmp_path / "other", shard_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        store_of(tmp_path / "file")
