"""What is probed, how it is scored, and the sentences made of the scores."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts_for_tests import SITES, TEST, TRAIN, Count, check_part, context, task
from torch import Tensor

from lrqp_torch import models
from lrqp_torch.study import probing
from lrqp_torch.study.estimates import wilson
from lrqp_torch.study.probing import ProbeScore, ProbingResult, VariableScores, evenly, findings
from lrqp_torch.study.variables import (
    CLAUSE_IO,
    CLAUSE_S1,
    NAME_IO,
    NAME_S,
    ORDER,
    POSITION_IO,
    POSITION_S1,
    VARIABLES,
    Variable,
    variables_of,
)

FEW = [SITES[0], SITES[2], SITES[4]]


@pytest.fixture(scope="module")
def result() -> ProbingResult:
    return probing.compute(replace(context(), sites=FEW), names=6)


def variables(name: str, **changes: int) -> dict[str, Variable]:
    options: dict[str, Any] = {"names": 6, "bins": 8} | changes
    return {v.name: v for v in variables_of(task(name), task("plain"), **options)}


def true_positions(name: str, split: str, token: str) -> Tensor:
    """Real tokens up to the token, less one: counted from the mask alone."""
    data = getattr(task(name), split)
    return torch.stack(
        [
            data.inputs["attention_mask"][row, :column].sum()
            for row, column in enumerate(data.positions[token].tolist())
        ]
    )


@pytest.mark.parametrize("name", ["plain", "prefixed"])
def test_every_variable_is_there_with_classes_numbered_from_zero(name: str) -> None:
    found = variables(name)
    assert set(found) == set(VARIABLES)
    for variable in found.values():
        k = len(variable.classes)
        assert k == len(set(variable.classes)) > 1
        assert variable.train_labels.unique().tolist() == list(range(k))
        assert torch.bincount(variable.train_labels).min() >= 2
        assert len(variable.train_rows) == len(variable.train_labels) <= TRAIN
        assert len(variable.test_rows) == len(variable.test_labels) <= TEST
        assert set(variable.test_labels.tolist()) <= set(range(k))


def test_order_is_the_data_sets_label() -> None:
    order = variables("prefixed")[ORDER]
    assert order.classes == ["BAB", "ABB"]
    assert torch.equal(order.train_labels, task("prefixed").train.labels)
    assert torch.equal(order.test_rows, torch.arange(TEST))


@pytest.mark.parametrize(("name", "token"), [(POSITION_S1, "S1"), (POSITION_IO, "IO")])
def test_positions_without_a_prefix_are_classes_of_their_own(name: str, token: str) -> None:
    variable = variables("plain", bins=30)[name]
    values = true_positions("plain", "train", token)[variable.train_rows]
    assert [variable.classes[label] for label in variable.train_labels] == [
        str(value) for value in values.tolist()
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_positions_with_a_prefix_fall_into_ranges_of_similar_size(split: str) -> None:
    variable = variables("prefixed")[POSITION_S1]
    assert 4 <= len(variable.classes) <= 8
    rows, labels = getattr(variable, f"{split}_rows"), getattr(variable, f"{split}_labels")
    assert len(rows) == {"train": TRAIN, "test": TEST}[split]
    values = true_positions("prefixed", split, "S1")[rows]
    # Ranges follow one another, and a larger position never has a lower class.
    assert bool((labels[values.argsort()].diff() >= 0).all())
    if split == "train":
        assert torch.bincount(labels).max() < 0.4 * TRAIN
        for index, words in enumerate(variable.classes):
            ends = [int(word) for word in words.split(" to ")]
            inside = values[labels == index]
            assert (ends[0], ends[-1]) == (inside.min(), inside.max())


@pytest.mark.parametrize(
    ("clause", "position", "token"),
    [(CLAUSE_S1, POSITION_S1, "S1"), (CLAUSE_IO, POSITION_IO, "IO")],
)
def test_position_in_the_clause_leaves_out_the_prefix(
    clause: str, position: str, token: str
) -> None:
    plain = variables("plain", bins=30)
    assert torch.equal(plain[clause].train_labels, plain[position].train_labels)

    variable = variables("prefixed", bins=30)[clause]
    data = task("prefixed").train
    # The organism's tokenizer splits words and punctuation, so prefixes can be counted.
    tokenizer = models.load("organism")[1]
    for row, label in list(zip(variable.train_rows, variable.train_labels, strict=True))[:40]:
        prefix = len(tokenizer(data.data.prefixes[row])["input_ids"])
        there = int(true_positions("prefixed", "train", token)[row])
        assert variable.classes[label] == str(there - prefix)


def test_without_the_plain_task_there_is_no_position_in_the_clause() -> None:
    names = {v.name for v in variables_of(task("prefixed"), None, names=6, bins=8)}
    assert names == set(VARIABLES) - {CLAUSE_S1, CLAUSE_IO}


@pytest.mark.parametrize(("name", "column"), [(NAME_S, "s_names"), (NAME_IO, "io_names")])
def test_names_are_the_most_frequent_ones_of_the_training_prompts(name: str, column: str) -> None:
    variable = variables("plain")[name]
    train = getattr(task("plain").train.data, column)
    test = getattr(task("plain").test.data, column)
    counts = {value: train.count(value) for value in set(train)}
    assert len(variable.classes) == 6
    assert min(counts[value] for value in variable.classes) >= max(
        count for value, count in counts.items() if value not in variable.classes
    )
    assert [variable.classes[i] for i in variable.train_labels] == [
        value for value in train if value in variable.classes
    ]
    assert [test[row] for row in variable.test_rows] == [
        variable.classes[i] for i in variable.test_labels
    ]


def test_baseline_is_the_share_of_the_commonest_held_out_class() -> None:
    rows = torch.arange(4)
    variable = Variable(
        "x", ["a", "b"], rows, torch.tensor([1, 1, 1, 0]), rows, torch.tensor([0, 0, 0, 1])
    )
    assert variable.baseline == 0.75


def test_evenly_keeps_both_ends() -> None:
    sites = [f"L{i}.pre" for i in range(30)]
    chosen = evenly(sites, 12)
    assert len(chosen) == len(set(chosen)) == 12
    assert (chosen[0], chosen[-1]) == (sites[0], sites[-1])
    gaps = [sites.index(b) - sites.index(a) for a, b in pairwise(chosen)]
    assert set(gaps) <= {2, 3}
    assert evenly(sites[:5], 12) == sites[:5]


def test_result_has_an_entry_for_everything(result: ProbingResult) -> None:
    keys = [(item.task, item.position, item.variable) for item in result.variables]
    assert len(keys) == len(set(keys)) == 2 * 2 * len(VARIABLES)
    for item in result.variables:
        assert [score.site for score in item.scores] == FEW
        for score in item.scores:
            right = round(score.accuracy * item.test)
            assert (score.lower, score.upper) == wilson(right, item.test)
            assert score.accuracy == pytest.approx(right / item.test)
            assert score.shuffled is not None


def scores(result: ProbingResult, *key: str) -> dict[str, ProbeScore]:
    found = result.find(*key)
    assert found is not None
    return {score.site: score for score in found.scores}


@pytest.mark.parametrize("name", ["plain", "prefixed"])
def test_organism_is_read_as_it_was_made(result: ProbingResult, name: str) -> None:
    order = scores(result, name, "S2", ORDER)
    assert order["L2.pre"].lower > 0.8
    assert order["L0.pre"].lower < 0.5
    # The embedding at S2 is the name S and nothing of IO; at END it is neither.
    assert scores(result, name, "S2", NAME_S)["L0.pre"].accuracy == 1.0
    assert scores(result, name, "S2", NAME_IO)["L0.pre"].lower < 0.3
    assert scores(result, name, "END", NAME_S)["L0.pre"].lower < 0.3
    end = result.find(name, "END", ORDER)
    assert end is not None and end.readable


def test_shuffled_labels_teach_nothing(result: ProbingResult) -> None:
    for item in result.variables:
        if item.variable == ORDER:
            for score in item.scores:
                assert score.shuffled is not None
                assert abs(score.shuffled - 0.5) < 0.22
    shuffled = [
        score.shuffled
        for item in result.variables
        if item.variable == ORDER
        for score in item.scores
        if score.shuffled is not None
    ]
    assert abs(sum(shuffled) / len(shuffled) - 0.5) < 0.1


def test_part_keeps_its_promises(result: ProbingResult, tmp_path: Path) -> None:
    check_part(probing, result, tmp_path)
    shown = {panel.name: panel for panel in probing.panels(result)}
    assert set(shown["probing-variables"].figures) == set(VARIABLES)
    assert len(shown["probing"].figures) == 4
    table = shown["probing-variables"].table
    assert table is not None
    assert len(table.rows) == 4 * len(VARIABLES) * len(FEW)
    for sentence in findings(result):
        assert sentence in shown["probing"].text


def test_progress_adds_up_and_the_seed_decides() -> None:
    one, count = replace(context("plain", None), sites=["L0.pre", "L2.pre"]), Count()
    first = probing.compute(one, names=4, advance=count)
    assert count.total == probing.work(one, names=4)
    assert probing.compute(one, names=4) == first
    assert all(item.task == "plain" for item in first.variables)
    assert findings(first)


def entry(name: str, variable: str, lower: float, baseline: float) -> VariableScores:
    score = ProbeScore("L1.pre", lower + 0.05, lower, lower + 0.1, None)
    return VariableScores(name, "S2", variable, ["a", "b"], 10, 10, baseline, [score])


def test_readable_needs_more_than_the_margin_above_guessing() -> None:
    assert entry("plain", ORDER, 0.61, 0.5).readable
    assert not entry("plain", ORDER, 0.59, 0.5).readable
    assert not entry("plain", ORDER, 0.61, 0.55).readable


def test_findings_say_what_is_readable_in_which_task() -> None:
    entries = [
        entry("plain", ORDER, 0.9, 0.5),
        entry("prefixed", ORDER, 0.9, 0.5),
        entry("plain", CLAUSE_S1, 0.7, 0.2),
        entry("prefixed", CLAUSE_S1, 0.2, 0.2),
        entry("plain", NAME_IO, 0.1, 0.1),
        entry("prefixed", NAME_IO, 0.1, 0.1),
    ]
    said = findings(ProbingResult(["L1.pre"], 20, 8, entries))
    assert said == [
        "At S2, readable without a prefix and with a prefix: order of the names (95 % without a "
        "prefix and 95 % with a prefix; guessing 50 % and 50 %).",
        "At S2, readable without a prefix but not readable with a prefix: position of S1 in its "
        "clause (75 % without a prefix and 25 % with a prefix; guessing 20 % and 20 %).",
        "At S2, not readable without a prefix or with a prefix: name of IO (15 % without a prefix "
        "and 15 % with a prefix; guessing 10 % and 10 %).",
    ]
