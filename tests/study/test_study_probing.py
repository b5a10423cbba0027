"""What is probed, how it is scored, and the sentences made of the scores."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from contexts_for_tests import (
    SITES,
    TEST,
    TRAIN,
    Count,
    check,
    computed,
    context,
    own_context,
    task,
)
from torch import Tensor

from lrqp_torch import models
from lrqp_torch.study.context import evenly
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.indirect_objects import WORDS
from lrqp_torch.study.parts.probing import (
    PART,
    ProbeScore,
    Probing,
    ProbingResult,
    VariableScores,
)
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
    result: ProbingResult = computed(Probing(names=6), replace(context(), sites=FEW))
    return result


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
            right = round(score.accuracy.known * item.test)
            assert score.accuracy == Estimate.count(right, item.test)
            assert score.shuffled is not None and score.shuffled.n == item.test


def find(result: ProbingResult, *key: str) -> VariableScores | None:
    return next((v for v in result.variables if (v.task, v.position, v.variable) == key), None)


def scores(result: ProbingResult, *key: str) -> dict[str, Estimate]:
    found = find(result, *key)
    assert found is not None
    return {score.site: score.accuracy for score in found.scores}


def lower(accuracy: Estimate) -> float:
    return (accuracy.interval or [0.0])[0]


@pytest.mark.parametrize("name", ["plain", "prefixed"])
def test_organism_is_read_as_it_was_made(result: ProbingResult, name: str) -> None:
    order = scores(result, name, "S2", ORDER)
    assert lower(order["L2.pre"]) > 0.8
    assert lower(order["L0.pre"]) < 0.5
    # The embedding at S2 is the name S and nothing of IO; at END it is neither.
    assert scores(result, name, "S2", NAME_S)["L0.pre"].value == 1.0
    assert lower(scores(result, name, "S2", NAME_IO)["L0.pre"]) < 0.3
    assert lower(scores(result, name, "END", NAME_S)["L0.pre"]) < 0.3
    end = find(result, name, "END", ORDER)
    assert end is not None and end.readable


def test_shuffled_labels_teach_nothing(result: ProbingResult) -> None:
    shuffled = [
        score.shuffled.known
        for item in result.variables
        if item.variable == ORDER
        for score in item.scores
        if score.shuffled is not None
    ]
    assert len(shuffled) == 4 * len(FEW)
    assert all(abs(share - 0.5) < 0.22 for share in shuffled)
    assert abs(sum(shuffled) / len(shuffled) - 0.5) < 0.1


def test_part_keeps_its_promises(result: ProbingResult) -> None:
    check(PART, result)
    by_token, by_variable = PART.panels(result)
    assert set(by_variable.charts) == set(VARIABLES)
    assert len(by_token.charts) == 4
    assert by_variable.table is not None
    assert len(by_variable.table.rows) == 4 * len(VARIABLES) * len(FEW)
    assert PART.says(result) and not any(line in by_token.text for line in PART.says(result))
    assert set(PART.figures(result)) == {"probing_S2", "probing_END"}


def test_progress_adds_up_and_the_seed_decides() -> None:
    one, count = replace(context("plain", None), sites=["L0.pre", "L2.pre"]), Count()
    part = Probing(names=4)
    first: ProbingResult = computed(part, one, advance=count)
    assert count.total == part.work(one)
    assert computed(part, one) == first
    assert all(item.task == "plain" for item in first.variables)
    assert PART.says(first)


def test_of_ones_own_prompts_the_label_is_read_at_both_tokens() -> None:
    one, count = replace(own_context(), sites=["L0.pre", "L2.pre"]), Count()
    found: ProbingResult = computed(PART, one, advance=count)
    assert count.total == PART.work(one)
    assert [(v.position, v.variable) for v in found.variables] == [
        ("mark", "the class"), ("end", "the class")
    ]  # fmt: skip
    assert found.variables[0].classes == ["ABBA", "BABA"]
    here = scores(found, "own", "mark", "the class")
    assert lower(here["L2.pre"]) > 0.8 and lower(here["L0.pre"]) < 0.5
    for item in found.variables:
        assert all(abs(s.shuffled.known - 0.5) < 0.22 for s in item.scores if s.shuffled)
    check(PART, found)
    assert set(PART.figures(found)) == {"probing_mark", "probing_end"}
    assert PART.says(found)[0].startswith("At the edited token, readable: the class (")
    assert "ABBA or BABA" in PART.panels(found)[1].text


def test_prompts_marked_at_their_end_are_read_once() -> None:
    found: ProbingResult = computed(PART, replace(own_context(3), sites=["L0.pre", "L4.pre"]))
    (item,) = found.variables
    assert (item.position, len(item.classes)) == ("end", 3)
    check(PART, found)


def entry(name: str, variable: str, lower: float, baseline: float) -> VariableScores:
    score = ProbeScore("L1.pre", Estimate(lower + 0.05, lower, lower + 0.1, 10), None)
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
    said = PART.says(ProbingResult(WORDS, ["L1.pre"], 20, 8, entries))
    said = [line.replace("\u00a0", " ") for line in said]
    assert said == [
        "At S2, readable without a prefix and with a prefix: order of the names (95 % without a "
        "prefix and 95 % with a prefix; guessing 50 % and 50 %).",
        "At S2, readable without a prefix but not readable with a prefix: position of S1 in its "
        "clause (75 % without a prefix and 25 % with a prefix; guessing 20 % and 20 %).",
        "At S2, not readable without a prefix or with a prefix: name of IO (15 % without a prefix "
        "and 15 % with a prefix; guessing 10 % and 10 %).",
    ]
