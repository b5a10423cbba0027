"""The bundled organisms by name, and swaps at S2 with hooks written here, without the package's."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models import load


def folder_of(name: str) -> Path:
    return Path(str(files("lrqp_torch.models"))) / name


@cache
def organism(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    model, tokenizer = load(name)
    assert isinstance(model, GPT2LMHeadModel)
    return model, tokenizer


@cache
def truth(name: str) -> dict[str, Any]:
    text = (folder_of(name) / "ground_truth.json").read_text(encoding="utf-8")
    record: dict[str, Any] = json.loads(text)
    return record


def all_sites(n_layers: int) -> list[str]:
    sites = [f"L{layer}.{place}" for layer in range(n_layers) for place in ("pre", "mid")]
    return [*sites, f"L{n_layers - 1}.post"]


def answer_logits(model: GPT2LMHeadModel, inputs: dict[str, Tensor], data: IOIDataset) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits[torch.arange(len(data)), data.positions["END"]]


class Swap:
    """Reads or writes one site at one token of each prompt."""

    def __init__(
        self, model: GPT2LMHeadModel, site: str, positions: Tensor, value: Tensor | None = None
    ) -> None:
        layer, place = int(site[1]), site[3:]
        block: Any = model.transformer.h[layer]
        self.rows = torch.arange(len(positions))
        self.positions = positions
        self.value = value
        self.seen = torch.empty(0)
        self.entering = torch.empty(0)
        if place == "mid":
            self.handles = [
                block.register_forward_pre_hook(self.enter),
                block.attn.register_forward_hook(self.leave_attention),
            ]
        elif place == "pre":
            self.handles = [block.register_forward_pre_hook(self.change_input)]
        else:
            self.handles = [block.register_forward_hook(self.change_output)]

    def change(self, stream: Tensor) -> Tensor:
        self.seen = stream[self.rows, self.positions].clone()
        if self.value is not None:
            stream = stream.clone()
            stream[self.rows, self.positions] = self.value
        return stream

    def change_input(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.change(inputs[0]), *inputs[1:])

    def change_output(self, _: nn.Module, __: object, output: Tensor | tuple[Tensor]) -> Tensor:
        return self.change(output if isinstance(output, Tensor) else output[0])

    def enter(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.entering = inputs[0]

    def leave_attention(self, _: nn.Module, __: object, output: tuple[Tensor, ...]) -> object:
        mid = self.change(self.entering + output[0])
        return (mid - self.entering, *output[1:])

    def __enter__(self) -> "Swap":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def with_names_exchanged(data: IOIDataset) -> dict[str, Tensor]:
    rows = torch.arange(len(data))
    first, second = data.positions["first"], data.positions["second"]
    ids = data.inputs["input_ids"].clone()
    ids[rows, first] = data.inputs["input_ids"][rows, second]
    ids[rows, second] = data.inputs["input_ids"][rows, first]
    return {**data.inputs, "input_ids": ids}


def streams(
    model: GPT2LMHeadModel, site: str, data: IOIDataset, inputs: dict[str, Tensor]
) -> Tensor:
    with Swap(model, site, data.positions["S2"]) as source:
        answer_logits(model, inputs, data)
    return source.seen


def flip_rate(model: GPT2LMHeadModel, site: str, data: IOIDataset, value: Tensor) -> float:
    """Share of prompts that favour the repeated name once ``value`` stands at S2."""
    rows = torch.arange(len(data))
    with Swap(model, site, data.positions["S2"], value):
        logits = answer_logits(model, data.inputs, data)
    difference = logits[rows, data.io_tokens] - logits[rows, data.s_tokens]
    return float((difference < 0).float().mean())


def interchange_rate(model: GPT2LMHeadModel, site: str, data: IOIDataset) -> float:
    return flip_rate(model, site, data, streams(model, site, data, with_names_exchanged(data)))


def ridge_accuracy(
    x: Tensor, labels: Tensor, x_new: Tensor, labels_new: Tensor, ridge: float = 1e-2
) -> float:
    """Held-out accuracy of least squares on the signs: a linear probe that shares no code."""
    spread = x.std(0).clamp(min=1e-6)
    design, asked = ((part - x.mean(0)).double() / spread for part in (x, x_new))
    signs = 2.0 * labels.double() - 1
    metric = design.T @ design / len(x) + ridge * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(metric, design.T @ (signs - signs.mean()) / len(x))
    said = (asked @ weight + signs.mean() > 0).long()
    return float((said == labels_new).float().mean())
