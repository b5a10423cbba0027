"""``lrqp serve`` up to the moment at which vLLM takes over."""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lrqp_torch import LRQP, LinearProbe, Mahalanobis, Provenance
from lrqp_torch.cli import app, serve
from lrqp_torch.models import load
from lrqp_torch.models.load import pretrained_folder


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edits")
    model, _ = load("organism")
    edit = LRQP(LinearProbe(128, 2).requires_grad_(False), Mahalanobis(torch.eye(128)))
    edit.probe.weight.copy_(torch.randn(2, 128, generator=torch.Generator().manual_seed(0)))
    edit.provenance = Provenance.of(model, "L2.mid", model="organism")
    edit.save(root / "order")
    return root


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    """What would have been started, where vLLM is installed and finds the plugin."""
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    entry = importlib.metadata.EntryPoint(serve.PLUGIN, "x:y", serve.GROUP)
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    monkeypatch.setattr(serve, "entry_points", lambda group: [entry])
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    return calls


def lrqp(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_a_server_is_started_with_the_edits_in_its_environment(
    edits: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.chdir(edits.parent)
    result = lrqp(
        "--model", "organism", "--edits", edits.name, "--port", 8123, "--", "--dtype", "float32"
    )
    assert result.exit_code == 0, result.output
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments[1:3] == ["-m", serve.SERVER]
    given = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    assert given == {
        "--model": pretrained_folder("organism"),
        "--served-model-name": "organism",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--dtype": "float32",
    }
    assert (Path(given["--model"]) / "config.json").is_file()
    assert environment["LRQP_EDITS"] == str(edits)
    assert environment["VLLM_PLUGINS"] == "other,lrqp"
    assert "order: L2.mid, classes: order 2" in result.stdout
    assert not [w for w in recwarn if "fitted for" in str(w.message)]


def test_what_would_not_serve_is_said_in_one_line(
    edits: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        result = lrqp(*arguments)
        assert result.exit_code == 2 and not started, result.output
        assert "Traceback" not in result.output
        return result.stderr

    assert "is no folder" in refused("--model", "organism", "--edits", tmp_path / "none")
    assert "family gpt2" in refused("--model", _llama(tmp_path), "--edits", edits)
    assert "no model" in refused("--model", tmp_path, "--edits", edits)
    monkeypatch.setattr(serve, "entry_points", lambda group: [])
    assert "no entry point" in refused("--model", "organism", "--edits", edits)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    said = refused("--model", "organism", "--edits", edits)
    assert "pip install 'lrqp_torch[vllm]'" in said and len(said.splitlines()) == 1


def _llama(folder: Path) -> Path:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=128, num_hidden_layers=6).save_pretrained(folder / "llama")
    return folder / "llama"


def test_every_model_that_can_be_loaded_by_name_has_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained_folder(tmp_path) == str(tmp_path)
    assert pretrained_folder("someone/model") == "someone/model"
    model, _ = load("organism")
    folder = pretrained_folder("organism")
    again, tokenizer = load(folder)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert len(tokenizer) <= model.config.vocab_size
