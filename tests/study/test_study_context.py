"""What parts share: activations of the prompts that are asked for, and warnings of sinks."""

import copy
from dataclasses import replace

import pytest
import torch
from contexts_for_tests import organism, own_context

from lrqp_torch import capture, models
from lrqp_torch.study.context import StudyContext, Task
from lrqp_torch.study.preparing import find_sink
from lrqp_torch.study.prompts import Prompt, PromptSet


def test_activations_are_those_of_the_prompts_that_are_asked_for() -> None:
    whole = own_context()
    few = replace(whole, task=replace(whole.task, train=whole.task.train[5:25]))
    own = Task(whole.task.name, whole.task.train[:7], whole.task.test)
    first = whole.activations(whole.task, "train", "mark", ["L1.mid"])["L1.mid"]
    asked = ((few, few.task), (whole, own), (few, own), (whole, whole.task))
    for context, task in asked:
        found = context.activations(task, "train", "mark", ["L1.mid"])["L1.mid"]
        expected = capture(organism(), task.train.inputs, "L1.mid", positions=task.train.position)[
            "L1.mid"
        ]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert whole.activations(whole.task, "train", "mark", ["L1.mid"])["L1.mid"] is first


@pytest.mark.parametrize("mark", ["Mary", "John"])
def test_an_edited_token_of_enormous_norm_is_called_a_sink(mark: str) -> None:
    model, tokenizer = copy.deepcopy(organism()), models.load("organism")[1]
    token = tokenizer(" Mary")["input_ids"][0]
    with torch.no_grad():
        model.transformer.wte.weight[token] *= 1000
    texts = [f"Then, Mary and John went to the {place}" for place in ("park", "school", "garden")]
    prompts = [
        Prompt(text.replace(mark, f"[[{mark}]]"), label) for text in texts for label in ("a", "b")
    ]
    encoded = PromptSet.encode(tokenizer, prompts)
    task = Task("own", encoded, encoded)
    sites = ["L0.pre", "L1.mid"]
    context = StudyContext(model, task, None, sites, 8, 0, torch.device("cpu"))
    found = find_sink(context)
    if mark == "John":
        assert found is None
    else:
        assert found is not None and "is an attention sink at L0.pre" in found
        assert "6 of the first 6 prompts" in found and "--bos always" in found


def test_a_context_made_from_another_begins_without_its_activations() -> None:
    whole = own_context()
    whole.activations(whole.task, "test", "end", ["L0.pre"])
    assert isinstance(whole, StudyContext) and replace(whole)._activations == {}
