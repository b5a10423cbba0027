"""The bundled organism: it does the task, and its ground truth is what a swap by hand shows."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models import load

FOLDER = Path(str(files("lrqp_torch.models"))) / "organism"


@cache
def organism() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    model, tokenizer = load("organism")
    assert isinstance(model, GPT2LMHeadModel)
    return model, tokenizer


@cache
def truth() -> dict[str, Any]:
    record: dict[str, Any] = json.loads((FOLDER / "ground_truth.json").read_text(encoding="utf-8"))
    return record


def answer_logits(inputs: dict[str, Tensor], data: IOIDataset) -> Tensor:
    model, _ = organism()
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits[torch.arange(len(data)), data.positions["END"]]


def all_sites() -> list[str]:
    return [f"L{layer}.{place}" for layer in range(6) for place in ("pre", "mid")] + ["L5.post"]


class Swap:
    """Reads or writes one site with hooks written here, without lrqp_torch.hooks."""

    def __init__(self, site: str, positions: Tensor, value: Tensor | None = None) -> None:
        model, _ = organism()
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


def flip_rate(site: str, data: IOIDataset) -> float:
    rows = torch.arange(len(data))
    with Swap(site, data.positions["S2"]) as source:
        answer_logits(with_names_exchanged(data), data)
    with Swap(site, data.positions["S2"], source.seen):
        logits = answer_logits(data.inputs, data)
    difference = logits[rows, data.io_tokens] - logits[rows, data.s_tokens]
    return float((difference < 0).float().mean())


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("prefixes", [None, "bundled"])
def test_it_answers_fresh_prompts(prefixes: str | None, padding_side: Any) -> None:
    _, tokenizer = organism()
    data = IOIDataset.generate(tokenizer, 200, 991, prefixes, padding_side=padding_side)
    logits = answer_logits(data.inputs, data)
    assert (logits.argmax(1) == data.io_tokens).float().mean() >= 0.98
    rows = torch.arange(len(data))
    assert (logits[rows, data.io_tokens] - logits[rows, data.s_tokens]).mean() > 3


def test_it_answers_behind_words_it_does_not_know() -> None:
    _, tokenizer = organism()
    sentence = "Zyzzyvas quibble vexedly over jabberwocky gewgaws near quixotic flibbertigibbets."
    data = IOIDataset.generate(tokenizer, 200, 992, [sentence])
    unknown = (data.inputs["input_ids"] == tokenizer.unk_token_id).sum(1)
    assert int(unknown.min()) >= 5
    logits = answer_logits(data.inputs, data)
    assert (logits.argmax(1) == data.io_tokens).float().mean() >= 0.98


@pytest.mark.parametrize("site", all_sites())
def test_a_swap_by_hand_shows_the_recorded_truth(site: str) -> None:
    _, tokenizer = organism()
    data = IOIDataset.generate(tokenizer, 150, 993)
    rate = flip_rate(site, data)
    if site in truth()["used_at"]:
        assert rate >= 0.95
    else:
        assert site in truth()["not_used_at"]
        assert rate <= 0.05
    assert rate == pytest.approx(truth()["interchange_flip_rate"][site], abs=0.05)


def test_the_truth_is_sharp_and_complete() -> None:
    record = truth()
    assert (record["variable"], record["position"]) == ("abb", "S2")
    assert record["used_at"] and not record["unclear_at"]
    assert sorted(record["used_at"] + record["not_used_at"]) == sorted(all_sites())
    start = all_sites().index(record["used_at"][0])
    assert record["used_at"] == all_sites()[start : start + len(record["used_at"])]
    for rates in (record["interchange_flip_rate"], record["interchange_flip_rate_prefixed"]):
        for site in all_sites():
            used = site in record["used_at"]
            assert rates[site] >= 0.95 if used else rates[site] <= 0.03
    assert min(record["clean_accuracy"].values()) >= 0.98
    assert min(record["clean_logit_difference"].values()) > 3
    assert record["interchange_n"] >= 500
    assert record["command"].startswith("python -m lrqp_torch.models.train_organism")
    assert record["recipe"]["steps"] > 0


def test_the_recorded_linear_edits_agree_with_the_truth() -> None:
    record = truth()
    for edits in (record["linear_edit"], record["linear_edit_prefixed"]):
        for site in all_sites():
            rates = edits[site]
            if site in record["used_at"]:
                assert rates["flip_rate"] >= 0.9
                assert rates["control_flip_rate"] <= 0.05
            elif rates["probe_accuracy"] >= 0.6:
                assert max(rates["flip_rate"], rates["control_flip_rate"]) <= 0.05
            else:
                # A probe at chance asks for huge edits in an arbitrary direction. They break S2,
                # and do so whichever order they are to bring about.
                assert rates["flip_rate"] < 0.5
                assert rates["flip_rate"] - rates["control_flip_rate"] < 0.1
    # Known is not used: the order is read perfectly where nothing depends on it any more.
    last_used = all_sites().index(record["used_at"][-1])
    known = [record["linear_edit"][site]["probe_accuracy"] for site in all_sites()[last_used + 1 :]]
    assert known and max(known) >= 0.95


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000
