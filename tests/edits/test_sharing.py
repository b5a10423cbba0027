"""Passing edits on: provenance, model cards, libraries, the Hub; and refusing what is not one."""

import json
import shutil
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from models_for_tests import Prompts, build, random_edit
from safetensors.torch import load_file
from torch import Tensor

from lrqp_torch import LRQP, EditLibrary, JointLRQP, Provenance, intervene
from lrqp_torch.baselines import EuclideanLeastEdit, NoEdit
from lrqp_torch.edits import saving
from lrqp_torch.edits.saving import COVARIANCE_FILE, TENSORS_FILE
from lrqp_torch.errors import (
    HubError,
    LRQPError,
    OutputError,
    ProvenanceError,
    RevisionWarning,
    SavedEditError,
)

WIDTH = 24


@pytest.fixture
def edit() -> LRQP:
    """An edit for the tiny GPT-2 of these tests, with its origin."""
    made = random_edit(torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(0)), 2)
    made.provenance = Provenance.of(
        build("gpt2"),
        "L1.mid",
        model="someone/tiny",
        revision="abc",
        position="S2",
        task="ioi",
        variable="abb",
        classes=("BABA", "ABBA"),
        probe_accuracy=0.97,
        probe_samples=60,
        seed=3,
    )
    return made


def run(edit: LRQP, model: Any, site: str = "L1.mid") -> Tensor:
    inputs = Prompts.random([5, 4]).padded("left")
    with edit.at(model, site, positions=torch.tensor([4, 4]), target=1):
        return model(**inputs).logits


def test_the_origin_survives_a_round_trip(edit: LRQP, tmp_path: Path) -> None:
    loaded = LRQP.load(edit.save(tmp_path / "edit"))
    assert loaded.provenance == edit.provenance
    assert loaded.provenance.classes == ("BABA", "ABBA")
    # A build for a device says so behind a plus, which its package may leave out.
    kept, own = loaded.provenance.versions["torch"], torch.__version__
    assert kept.split("+")[0] == own.split("+")[0]
    edit.provenance = None
    assert LRQP.load(edit.save(tmp_path / "without")).provenance is None


def test_an_edit_works_in_its_own_model_without_a_word(edit: LRQP, tmp_path: Path) -> None:
    model = build("gpt2")
    model.config._name_or_path, model.config._commit_hash = "someone/tiny", "abc"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = run(LRQP.load(edit.save(tmp_path)), model)
    assert not torch.equal(changed[:, -1], model(**Prompts.random([5, 4]).padded("left")).logits)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("llama", {}, "family gpt2.*family llama"),
        ("gpt2", {"n_embd": 32}, "width 24.*width 32"),
        ("gpt2", {"n_layer": 2}, "blocks 3.*blocks 2"),
    ],
)
def test_another_model_is_refused(edit: LRQP, name: str, options: dict, what: str) -> None:
    model = build(name, **options)
    with pytest.raises(ProvenanceError, match=what):
        run(edit, model)
    item = edit.on("L1.mid", positions="all", target=1)
    with pytest.raises(ProvenanceError, match=what), intervene(model, [item]):
        pass


def test_another_model_is_refused_as_such_where_it_has_no_such_site(edit: LRQP) -> None:
    with pytest.raises(ProvenanceError, match=r"blocks 3.*blocks 1"):
        run(edit, build("gpt2", n_layer=1))


@pytest.mark.parametrize(
    ("attribute", "value", "what"),
    [
        ("_commit_hash", "def", "revision 'abc' and is used for 'def'"),
        ("_name_or_path", "someone/other", "model 'someone/tiny' and is used for 'someone/other'"),
    ],
)
def test_another_revision_is_warned_of(edit: LRQP, attribute: str, value: str, what: str) -> None:
    model = build("gpt2")
    setattr(model.config, attribute, value)
    with pytest.warns(RevisionWarning, match=what):
        run(edit, model)


def test_another_site_is_warned_of(edit: LRQP) -> None:
    with pytest.warns(RevisionWarning, match=r"site 'L1\.mid' and is used for 'L2\.pre'"):
        run(edit, build("gpt2"), "L2.pre")


@pytest.mark.parametrize(
    "change",
    [
        {"width": "24"},
        {"site": None},
        {"shoe_size": 3},
        {"classes": "AB"},
        {"probe_accuracy": "high"},
    ],
)
def test_a_damaged_origin_is_named(edit: LRQP, tmp_path: Path, change: dict) -> None:
    folder = edit.save(tmp_path)
    content = json.loads((folder / "edit.json").read_text())
    content["provenance"] |= change
    (folder / "edit.json").write_text(json.dumps(content))
    with pytest.raises(SavedEditError, match=next(iter(change))):
        LRQP.load(folder)
    with pytest.raises(ProvenanceError, match=next(iter(change))):
        Provenance.of(build("gpt2"), "L1.mid", **change)


def test_the_card_says_where_the_edit_belongs(edit: LRQP, tmp_path: Path) -> None:
    card = ModelCard((edit.save(tmp_path) / "README.md").read_text())
    assert card.data.library_name == "lrqp_torch"
    assert card.data.base_model == "someone/tiny"
    for text in ("L1.mid", "S2", "0.97", "abb", "ABBA", "torch 2.", "shrinkage", "from_pretrained"):
        assert text in card.text, text
    edit.provenance = Provenance.of(build("gpt2"), "L1.mid", model="/a/folder/of/mine")
    card = ModelCard((edit.save(tmp_path) / "README.md").read_text())
    assert card.data.base_model is None


def test_an_oversized_header_or_file_is_refused_before_it_is_read(
    edit: LRQP, tmp_path: Path
) -> None:
    file = edit.save(tmp_path) / "edit.safetensors"
    original = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**40) + original[8:])
    with pytest.raises(SavedEditError, match=r"edit\.safetensors.*header"):
        LRQP.load(tmp_path)
    with file.open("wb") as handle:
        handle.truncate(2**33)  # a sparse file: eight gigabytes of nothing
    with pytest.raises(SavedEditError, match="larger than"):
        LRQP.load(tmp_path)


@pytest.fixture
def library(edit: LRQP) -> EditLibrary:
    x = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1))
    return EditLibrary({"order.L1.mid": edit, "name.L2.pre": random_edit(x, 4, seed=5)})


def test_a_library_loads_in_one_call(library: EditLibrary, tmp_path: Path) -> None:
    loaded = EditLibrary.from_pretrained(library.save(tmp_path / "edits"))
    assert list(loaded) == list(library) and len(loaded) == 2
    x = torch.randn(7, WIDTH)
    for name in library:
        assert torch.equal(loaded[name](x, 1), library[name](x, 1))
    with pytest.raises(KeyError, match=r"no edit 'other'.*order"):
        loaded["other"]


@pytest.mark.parametrize(
    "name", ["../order", "a/b", "/tmp/x", "", "..", ".hidden", "a..b", "x" * 200, 3]
)
def test_names_that_lead_elsewhere_are_refused(
    library: EditLibrary, tmp_path: Path, name: object
) -> None:
    folder = library.save(tmp_path / "edits")
    index = json.loads((folder / "library.json").read_text()) | {"edits": [name]}
    (folder / "library.json").write_text(json.dumps(index))
    with pytest.raises(SavedEditError, match="cannot be the name"):
        EditLibrary.load(folder)
    with pytest.raises(SavedEditError, match="cannot be the name"):
        EditLibrary({name: library["order.L1.mid"]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "does not describe"),
        ({"edits": "order"}, "missing edits"),
    ],
)
def test_damaged_libraries_are_named(
    library: EditLibrary, tmp_path: Path, change: dict, what: str
) -> None:
    folder = library.save(tmp_path)
    index = json.loads((folder / "library.json").read_text()) | change
    (folder / "library.json").write_text(json.dumps(index))
    with pytest.raises(SavedEditError, match=what):
        EditLibrary.load(folder)
    (folder / "library.json").write_text("{")
    with pytest.raises(SavedEditError, match="not valid JSON"):
        EditLibrary.load(folder)
    (folder / "library.json").unlink()
    with pytest.raises(SavedEditError, match="missing"):
        EditLibrary.load(folder)
    shutil.rmtree(library.save(folder) / "name.L2.pre")
    with pytest.raises(SavedEditError, match=r"no edit in .*name\.L2\.pre"):
        EditLibrary.load(folder)
    with pytest.raises(SavedEditError, match="not an LRQP"):
        EditLibrary({"a": 3})  # type: ignore[dict-item]


def test_a_link_out_of_a_library_is_not_followed(library: EditLibrary, tmp_path: Path) -> None:
    folder = library.save(tmp_path / "edits")
    (folder / "name.L2.pre").rename(tmp_path / "elsewhere")
    (folder / "name.L2.pre").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SavedEditError, match="leads out of"):
        EditLibrary.load(folder)
    (folder / "name.L2.pre").unlink()
    (folder / "name.L2.pre").mkdir()
    for file in (tmp_path / "elsewhere").iterdir():
        (folder / "name.L2.pre" / file.name).symlink_to(file)
    with pytest.raises(SavedEditError, match="leads out of"):
        EditLibrary.load(folder)


def test_the_links_of_the_hubs_cache_are_followed(library: EditLibrary, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--edits"
    saved, snapshot = library.save(tmp_path / "saved"), repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in saved.rglob("*") if path.is_file()):
        blob, link = repository / "blobs" / str(number), snapshot / file.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(blob)
    assert list(EditLibrary.load(snapshot)) == list(library)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ((), "at least one edit"),
        (("order", "Order"), "'order' and 'Order'"),
        (("library.json",), "that of a file"),
        (("Edit.json",), "that of a file"),
    ],
)
def test_names_that_clash_are_refused(
    library: EditLibrary, tmp_path: Path, names: tuple[str, ...], what: str
) -> None:
    with pytest.raises(SavedEditError, match=what):
        EditLibrary(dict.fromkeys(names, library["order.L1.mid"]))
    folder = library.save(tmp_path / "edits")
    index = json.loads((folder / "library.json").read_text()) | {"edits": list(names)}
    (folder / "library.json").write_text(json.dumps(index))
    with pytest.raises(SavedEditError, match=what):
        EditLibrary.load(folder)


def test_an_edit_and_a_library_do_not_share_a_folder(library: EditLibrary, tmp_path: Path) -> None:
    edit = library["order.L1.mid"]
    for name, first, second in (("one", edit, library), ("several", library, edit)):
        folder = first.save(tmp_path / name)
        before = sorted(folder.rglob("*"))
        with pytest.raises(OutputError, match="choose another folder"):
            second.save(folder)
        assert sorted(folder.rglob("*")) == before
        first.save(folder)


class FakeHub:
    """A Hub that is a folder: what is pushed can be fetched."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def create_repo(self, repo_id: str, **options: Any) -> None:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> Any:
        for pattern in allow_patterns:
            for file in Path(folder_path).rglob(pattern):
                target = self.folder / repo_id / file.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return type("Commit", (), {"commit_url": f"hub/{repo_id}/commit/1"})

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        if not (self.folder / repo_id).is_dir():
            raise LocalEntryNotFoundError("nothing of that name")
        return str(self.folder / repo_id)


def test_what_is_pushed_can_be_fetched(
    edit: LRQP, library: EditLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(tmp_path, monkeypatch)
    assert edit.push_to_hub("me/edit") == "hub/me/edit/commit/1"
    x = torch.randn(5, WIDTH)
    fetched = LRQP.from_pretrained("me/edit")
    assert torch.equal(fetched(x, 0), edit(x, 0)) and fetched.provenance == edit.provenance
    assert (tmp_path / "me/edit/README.md").is_file()
    library.push_to_hub("me/edits")
    assert list(EditLibrary.from_pretrained("me/edits")) == list(library)


@pytest.mark.parametrize("damage", [COVARIANCE_FILE, TENSORS_FILE])
def test_both_files_of_numbers_are_pushed(
    edit: LRQP, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(tmp_path, monkeypatch)
    JointLRQP({"order": edit}).push_to_hub("me/joint")
    edit.push_to_hub("me/edit")
    # Σ is read when it is looked at, as that of a wide edit always is.
    monkeypatch.setattr(saving, "READ_AT_ONCE", 0)
    saved = edit.save(tmp_path / "saved")
    for name in (TENSORS_FILE, COVARIANCE_FILE):
        sent, own = (load_file(folder / name) for folder in (tmp_path / "me/edit", saved))
        assert sent.keys() == own.keys() and own
        assert all(torch.equal(sent[key], own[key]) for key in own)
        assert (tmp_path / "me/joint/0" / name).is_file()
    fetched = LRQP.from_pretrained("me/edit")
    assert torch.equal(fetched.metric.covariance, edit.metric.covariance)
    (tmp_path / "me/edit" / damage).unlink()
    with pytest.raises(SavedEditError, match=damage):
        LRQP.from_pretrained("me/edit").metric.covariance  # noqa: B018


def test_an_edit_of_several_variables_is_shared_and_refuses_other_models_too(
    edit: LRQP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(tmp_path, monkeypatch)
    other = random_edit(torch.randn(60, WIDTH), 3, seed=4).probe
    joint = JointLRQP({"order": edit, "name": other})
    joint.push_to_hub("me/joint")
    fetched = JointLRQP.from_pretrained("me/joint")
    x = torch.randn(5, WIDTH)
    assert torch.equal(fetched(x, {"order": 1}), joint(x, {"order": 1}))
    for each in (joint, fetched):
        with pytest.raises(ProvenanceError, match=r"family gpt2.*family llama"):
            each.at(build("llama"), "L1.mid", positions=torch.tensor([4, 4]), target={"order": 1})


def test_what_cannot_be_saved_says_so(edit: LRQP, tmp_path: Path) -> None:
    for kind in (NoEdit, EuclideanLeastEdit):
        with pytest.raises(SavedEditError, match=f"{kind.__name__} cannot be saved"):
            kind(edit).save(tmp_path / "baseline")
        with pytest.raises(SavedEditError, match=kind.__name__):
            kind.load(tmp_path)


def test_a_hub_out_of_reach_is_named(
    edit: LRQP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(tmp_path, monkeypatch)
    with pytest.raises(HubError, match=r"'me/nothing' is no local folder and cannot be fetched"):
        LRQP.from_pretrained("me/nothing")
    with pytest.raises(HubError, match="no revisions"):
        LRQP.from_pretrained(edit.save(tmp_path / "here"), revision="main")

    def refuse(*given: Any, **options: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(HubError, match=r"nothing was sent to 'me/edit'.*no network"):
        edit.push_to_hub("me/edit")
    assert issubclass(HubError, LRQPError)


def found(model: Any, site: str = "L1.mid") -> dict[str, str] | None:
    return Provenance.of(model, site).weights


def nudge(part: Tensor) -> None:
    with torch.no_grad():
        part += 1e-4


def test_other_weights_in_front_of_the_site_are_warned_of(edit: LRQP, tmp_path: Path) -> None:
    loaded, model = LRQP.load(edit.save(tmp_path)), build("gpt2")
    loaded.provenance = replace(loaded.provenance, model=None, revision=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(loaded, model)
        nudge(model.transformer.h[2].mlp.c_fc.weight)  # behind the site
        run(loaded, model)
    for _ in range(2):
        nudge(model.transformer.h[1].attn.c_proj.weight)
        with pytest.warns(RevisionWarning, match=r"weights in front of L1\.mid are not those"):
            run(loaded, model)
    item = loaded.on("L1.mid", positions="all", target=1)
    with pytest.warns(RevisionWarning, match="weights in front"), intervene(model, [item]):
        model(**Prompts.random([5]).padded("left"))
    model.load_state_dict(build("gpt2").state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(loaded, model)
        loaded.provenance = replace(loaded.provenance, weights=None)  # as older files are
        nudge(model.transformer.wte.weight)
        run(LRQP.load(loaded.save(tmp_path / "old")), model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_fingerprint_is_of_the_weights_alone(name: str, tmp_path: Path) -> None:
    model, sites = build(name), ("L0.pre", "L1.mid", "L1.post", "final")
    whole = [found(model, site) for site in sites]
    assert len({made["float32"] for made in whole}) == 3 and whole[1] == whole[2]
    assert found(model, "L2.pre") == found(model, "L1.post")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert [found(again, site) for site in sites] == whole
    assert found(torch.compile(build(name))) == found(model)
    assert found(build(name).double()) == found(model)
    # Of a model in half precision it is that of the same weights, rounded.
    for kind in (torch.bfloat16, torch.float16):
        precision = str(kind)[6:]
        half = type(model).from_pretrained(tmp_path, dtype=kind)
        assert found(half) == {precision: found(model)[precision]}
        assert found(half.float())[precision] == found(model)[precision]
        assert found(half)["float32"] != found(model)["float32"]
    assert found(build(name).half())["float16"] != found(build(name, seed=1))["float16"]


def test_where_weights_are_no_plain_values_there_is_no_fingerprint(edit: LRQP) -> None:
    model = build("gpt2")
    matrix = model.transformer.h[0].mlp.c_fc
    matrix.weight = torch.nn.Parameter(matrix.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert found(model) is None
    model = build("gpt2")
    model.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(torch.empty(0))  # as of ZeRO-3
    assert found(model) is None
    model = build("gpt2")
    model.config.quantization_config = {"bits": 4}
    assert found(model) is None
    model = build("gpt2")
    model.transformer.h[0].to("meta")
    edit.provenance.check(model, "L1.mid")
    assert found(model) is None


def test_of_adapters_those_in_use_count(edit: LRQP) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain = found(build("gpt2"))
    options = {"target_modules": ["c_attn"], "init_lora_weights": False, "fan_in_fan_out": True}
    model = peft.get_peft_model(build("gpt2"), peft.LoraConfig(**options)).eval()
    with model.disable_adapter():
        assert found(model) == plain
    made = found(model)
    assert made != plain
    model.add_adapter("other", peft.LoraConfig(**options))
    assert found(model) == made
    model.set_adapter("other")
    assert found(model) not in (made, plain)
    model.set_adapter("default")
    assert found(model) == made
    model.merge_adapter()
    assert found(model) not in (made, plain)
    model.unmerge_adapter()
    assert found(model.unload()).keys() == plain.keys()
