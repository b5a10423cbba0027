"""Minimal pairs: prompts that differ in the order of the names and in nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lrqp_torch import models
from lrqp_torch.errors import PromptError, TokenizerError
from lrqp_torch.ioi import (
    ABBA_TEMPLATES,
    BABA_TEMPLATES,
    IOIDataset,
    swap_identity,
    swap_order,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load("organism")[1]


@pytest.mark.parametrize("prefixes", [None, "bundled"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs_differ_in_the_order_and_share_all_else(
    tokenizer: Any, prefixes: str | None, side: Any
) -> None:
    data = IOIDataset.generate(tokenizer, 60, 5, prefixes, padding_side=side)
    pair = swap_order(data, tokenizer)
    rows = torch.arange(len(data))
    changed = data.inputs["input_ids"] != pair.inputs["input_ids"]
    assert changed.sum(1).tolist() == [2] * len(data)
    for name in ("first", "second"):
        assert changed[rows, data.positions[name]].all()
    for name in ("attention_mask", "position_ids"):
        assert torch.equal(data.inputs[name], pair.inputs[name])
    for name in ("S2", "END", "first", "second"):
        assert torch.equal(data.positions[name], pair.positions[name])
    assert torch.equal(pair.labels["abb"], 1 - data.labels["abb"])
    assert torch.equal(data.templates, pair.templates)
    assert (data.prefixes, data.io_names, data.s_names) == (
        pair.prefixes,
        pair.io_names,
        pair.s_names,
    )
    ids = pair.inputs["input_ids"]
    assert torch.equal(ids[rows, pair.positions["IO"]], data.io_tokens)
    for name in ("S1", "S2"):
        assert torch.equal(ids[rows, pair.positions[name]], data.s_tokens)
    assert torch.equal(pair.positions["S1+1"], pair.positions["S1"] + 1)


def test_texts_are_those_of_the_other_template(tokenizer: Any) -> None:
    data = IOIDataset.generate(tokenizer, 60, 6, "bundled")
    pair = swap_order(data)
    for row, text in enumerate(pair.prompts):
        templates = ABBA_TEMPLATES if int(pair.labels["abb"][row]) else BABA_TEMPLATES
        pieces = templates[int(pair.templates[row])].replace("{S}", data.s_names[row])
        pieces = pieces.replace("{IO}", data.io_names[row])
        begin = pieces.split("{")[0]
        assert text.removeprefix(data.prefixes[row]).lstrip().startswith(begin)
        assert sorted(text.split()) == sorted(data.prompts[row].split()) or "," in text
        assert len(text) == len(data.prompts[row])


def test_two_swaps_give_the_data_back(tokenizer: Any) -> None:
    data = IOIDataset.generate(tokenizer, 60, 3, "bundled", padding_side="left")
    again = swap_order(swap_order(data))
    assert again.prompts == data.prompts
    for name, columns in data.positions.items():
        assert torch.equal(again.positions[name], columns)
    assert torch.equal(again.inputs["input_ids"], data.inputs["input_ids"])
    assert torch.equal(again.labels["abb"], data.labels["abb"])


def test_data_are_left_as_they_were(tokenizer: Any) -> None:
    data = IOIDataset.generate(tokenizer, 60, 3, padding_side="left")
    before = data.inputs["input_ids"].clone()
    swap_order(data)
    assert torch.equal(data.inputs["input_ids"], before)


def test_prompts_whose_names_are_not_where_they_should_be_are_refused(tokenizer: Any) -> None:
    data = IOIDataset.generate(tokenizer, 60, 3, padding_side="left")
    positions = data.positions | {"first": data.positions["END"]}
    with pytest.raises(PromptError, match="prompt 0"):
        swap_order(replace(data, positions=positions))
    with pytest.raises(PromptError, match="does not hold"):
        swap_order(replace(data, prompts=("no names here",) * len(data)))
    # The texts say one thing and the tokens another.
    shifted = data.io_tokens.roll(1)
    ids = data.inputs["input_ids"].clone()
    ids[torch.arange(len(data)), data.positions["IO"]] = shifted
    other = replace(data, io_tokens=shifted, inputs=data.inputs | {"input_ids": ids})
    with pytest.raises(TokenizerError, match="no minimal pair"):
        swap_order(other, tokenizer)


def test_exchanged_people_keep_order_and_positions_and_both_swaps_change_s2_alone(
    tokenizer: Any,
) -> None:
    data = IOIDataset.generate(tokenizer, 60, 5, "bundled", padding_side="left")
    people = swap_identity(data)
    assert (people.s_names, people.io_names) == (data.io_names, data.s_names)
    assert torch.equal(people.labels["abb"], data.labels["abb"])
    assert all(torch.equal(people.positions[k], data.positions[k]) for k in data.positions)
    rows, ids = torch.arange(len(data)), people.inputs["input_ids"]
    for name, tokens in (("IO", people.io_tokens), ("S1", people.s_tokens)):
        assert torch.equal(ids[rows, people.positions[name]], tokens)
    both = swap_order(people, tokenizer)  # checks the texts, too
    changed = both.inputs["input_ids"] != data.inputs["input_ids"]
    assert torch.equal(changed.int().argmax(1), data.positions["S2"])
    assert changed.sum(1).tolist() == [1] * len(data)
    again = swap_identity(people)
    assert torch.equal(again.inputs["input_ids"], data.inputs["input_ids"])
    assert again.prompts == data.prompts
