"""Token positions: one rule for all shapes, checked against what the model is given."""

import warnings

import pytest
import torch
from models_for_tests import POST_MODELS, Prompts, build, hook_count
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.errors import EditNeverFiredError, PositionError
from lrqp_torch.stream.passes import LeftPaddingWarning
from lrqp_torch.stream.positions import Positions

PROMPTS = Prompts.random([6, 4, 5])


def pairs(positions: Tensor) -> list[tuple[int, int]]:
    parsed = Positions.parse(positions)
    return list(zip(parsed.example.tolist(), parsed.token.tolist(), strict=True))


def test_all_shapes_read_as_pairs() -> None:
    assert pairs(torch.tensor([3, 1])) == [(0, 3), (1, 1)]
    assert pairs(torch.tensor([[3, 0], [1, 2]])) == [(0, 3), (0, 0), (1, 1), (1, 2)]
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert pairs(mask) == [(0, 1), (0, 2), (1, 0)]
    assert pairs(torch.tensor([3, 1], dtype=torch.int32)) == [(0, 3), (1, 1)]
    assert Positions.parse(torch.tensor([3, 1])).shape == (2,)
    assert Positions.parse(torch.tensor([[3, 0], [1, 2]])).shape == (2, 2)
    assert (Positions.parse(mask).shape, Positions.parse(mask).batch) == ((3,), 2)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[1], [2, 3]], "list"),
        (1.5, "float"),
        (torch.tensor(3.0), r"\(batch,\)"),
        (torch.zeros(2, 2, 2, dtype=torch.long), r"\(2, 2, 2\)"),
        (torch.tensor([1.0, 2.0]), "float32"),
        (torch.tensor([True, False]), "bool"),
        (torch.zeros(0, dtype=torch.long), "no positions"),
        (torch.zeros(3, 0, dtype=torch.long), "no positions"),
        (torch.zeros(3, 4, dtype=torch.bool), "no positions"),
        (torch.tensor([2, -1, 2]), "position -1.*count from 0"),
        (torch.tensor([[0, 1], [3, 3], [0, 1]]), r"example 1 names one token twice: \[3, 3\]"),
    ],
)
def test_bad_positions_are_refused_before_anything_runs(positions: Tensor, message: str) -> None:
    model = build("gpt2")
    with pytest.raises(PositionError, match=message):
        Positions.parse(positions)
    with pytest.raises(PositionError, match=message):
        lrqp.capture(model, PROMPTS.padded("left"), ["L0.pre"], positions)
    item = lrqp.Intervention("L0.pre", positions, lambda x, context: x)
    with (
        pytest.raises(PositionError, match=message),
        lrqp.intervene(model, [item]),
    ):
        pytest.fail("the body ran")
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (
            torch.tensor([5, 6, 5]),
            "position 6 of example 1 is out of range: the input has 6 tokens",
        ),
        (torch.tensor([5, 1, 0]), r"2 positions lie on padding.*\[\(1, 1\), \(2, 0\)\]"),
        (torch.tensor([[5, 4], [5, 0], [5, 4]]), r"1 positions lie on padding.*\[\(1, 0\)\]"),
        (torch.ones(3, 6, dtype=torch.bool), r"3 positions lie on padding.*\[\(1, 0\), \(1, 1\), "),
        (torch.tensor([5, 5]), "for 2 examples"),
    ],
)
def test_positions_that_do_not_fit_the_batch_are_refused(
    name: str, positions: Tensor, message: str
) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    with pytest.raises(PositionError, match=message):
        lrqp.capture(model, inputs, ["L1.mid"], positions)
    item = lrqp.Intervention("L1.mid", positions, lambda x, context: x + 1)
    with pytest.raises(PositionError, match=message), lrqp.intervene(model, [item]):
        model(**inputs)
    assert hook_count(model) == 0


def test_a_mask_that_is_passed_by_position_is_read_too() -> None:
    model, inputs = build("llama"), PROMPTS.padded("left")
    item = lrqp.Intervention("L1.mid", torch.tensor([5, 0, 5]), lambda x, context: x + 1)
    with pytest.raises(PositionError, match=r"\(1, 0\)"), lrqp.intervene(model, [item]):
        model(inputs["input_ids"], inputs["attention_mask"])


def test_embeddings_in_place_of_tokens() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    at = torch.tensor([5, 5, 5])
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    expected = lrqp.capture(model, inputs, ["L2.mid"], at)["L2.mid"]
    assert torch.equal(lrqp.capture(model, embedded, ["L2.mid"], at)["L2.mid"], expected)
    item = lrqp.Intervention("L2.mid", at, lambda x, context: x + 1)
    with lrqp.intervene(model, [item]):
        edited = model(**embedded).logits
        assert torch.equal(edited, model(**inputs).logits)
    assert not torch.equal(edited, model(**inputs).logits)


def test_a_model_called_without_tokens_is_named() -> None:
    model = build("gpt2")
    item = lrqp.Intervention("L1.mid", torch.tensor([1]), lambda x, context: x)
    with pytest.raises(PositionError, match="without input_ids"), lrqp.intervene(model, [item]):
        model(attention_mask=torch.ones(1, 3))
    with pytest.raises(PositionError, match=r"need input_ids.*\['attention_mask'\]"):
        lrqp.capture(model, {"attention_mask": torch.ones(1, 3)}, ["L1.mid"])
    assert hook_count(model) == 0


def test_positions_that_a_cached_text_never_reaches_are_found_at_the_end() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    item = lrqp.Intervention("L1.mid", torch.tensor([5, 9, 5]), lambda x, context: x)
    with (
        pytest.raises(EditNeverFiredError, match=r"never ran at 1 of 3.*\[\(1, 9\)\]"),
        lrqp.intervene(model, [item]),
    ):
        model(**inputs, use_cache=True)


def test_position_ids_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]
    assert lrqp.position_ids(mask).tolist() == expected
    assert torch.equal(lrqp.position_ids(mask.bool()), lrqp.position_ids(mask))


def _warnings(name: str, side: str, *, with_position_ids: bool) -> list[warnings.WarningMessage]:
    model, inputs = build(name), PROMPTS.padded(side)
    if not with_position_ids:
        del inputs["position_ids"]
    at = PROMPTS.columns(torch.tensor([3, 3, 3]), side)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lrqp.capture(model, inputs, ["L1.mid"], at)
        item = lrqp.Intervention("L1.mid", at, lambda x, context: x)
        with lrqp.intervene(model, [item]):
            model(**inputs)
    return [item for item in caught if item.category is LeftPaddingWarning]


def test_left_padding_without_position_ids_warns_where_it_is_wrong() -> None:
    caught = _warnings("gpt2", "left", with_position_ids=False)
    assert len(caught) == 2
    assert "lrqp_torch.position_ids(attention_mask)" in str(caught[0].message)
    assert not _warnings("gpt2", "left", with_position_ids=True)
    assert not _warnings("gpt2", "right", with_position_ids=False)
    assert not _warnings("llama", "left", with_position_ids=False)


def found(positions: object, side: str = "right") -> list[tuple[int, int]]:
    """The pairs that are edited, which must be those that are captured."""
    model, inputs = build("llama"), PROMPTS.padded(side)
    clean = lrqp.capture(model, inputs, "L1.mid")["L1.mid"]
    read = lrqp.capture(model, inputs, "L1.mid", positions)["L1.mid"]
    item = lrqp.Intervention("L1.mid", positions, lambda x, context: 2 * x)
    with lrqp.intervene(model, item):
        edited = lrqp.capture(model, inputs, "L1.mid")["L1.mid"]
        model(**inputs)
    changed = (edited != clean).any(-1)
    torch.testing.assert_close(read.reshape(-1, clean.shape[-1]), clean[changed])
    return [(int(row), int(column)) for row, column in changed.nonzero()]


REAL = [(0, c) for c in range(6)] + [(1, c) for c in range(4)] + [(2, c) for c in range(5)]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([5, 3, 0], [(0, 5), (1, 3), (2, 0)]),
        ([[0, 2], [1, 3], [2, 4]], [(0, 0), (0, 2), (1, 1), (1, 3), (2, 2), (2, 4)]),
        (torch.tensor([5, 3, 0]).numpy(), [(0, 5), (1, 3), (2, 0)]),
        ([[c < 2 for c in range(6)]] * 3, [(row, c) for row in range(3) for c in range(2)]),
        (2, [(0, 2), (1, 2), (2, 2)]),
        (-4, [(0, 2), (1, 2), (2, 2)]),
        (torch.tensor(2), [(0, 2), (1, 2), (2, 2)]),
        (torch.tensor(-4).numpy()[()], [(0, 2), (1, 2), (2, 2)]),
        (slice(1, 3), [(row, c) for row in range(3) for c in (1, 2)]),
        (slice(None, -3, 2), [(row, c) for row in range(3) for c in (0, 2)]),
        ("last", [(0, 5), (1, 3), (2, 4)]),
        ("prompt", REAL),
        ("all", REAL),
        (lambda given: given["attention_mask"].sum(1) - 1, [(0, 5), (1, 3), (2, 4)]),
        (lambda given: given["attention_mask"].bool(), REAL),
        (lambda given: [0] * len(given["input_ids"]), [(0, 0), (1, 0), (2, 0)]),
    ],
)
def test_every_way_to_say_positions(positions: object, expected: list[tuple[int, int]]) -> None:
    assert found(positions) == expected


def test_columns_are_those_of_the_padded_input() -> None:
    assert found(-1, "left") == found("last", "left") == [(0, 5), (1, 5), (2, 5)]
    for positions in (-1, slice(3, None), 5, lambda given: slice(3, None)):
        with pytest.raises(PositionError, match="lie on padding"):
            found(positions, "right")
    for positions in (6, -7):
        with pytest.raises(PositionError, match=f"position {positions} .*is out of range"):
            found(positions)
    with pytest.raises(PositionError, match="no positions"):
        found(slice(4, 4))


def test_records_have_the_shape_in_which_positions_were_said() -> None:
    model, inputs = build("llama"), PROMPTS.padded("left")
    x = lrqp.capture(model, inputs, "L1.mid", "all")["L1.mid"]
    edit = lrqp.LRQP.fit(x, torch.arange(len(x)) % 2)
    shapes = {(3,): 5, (3, 2): torch.tensor([[4, 5]] * 3), (6,): slice(4, 6), (15,): "all"}
    for shape, positions in shapes.items():
        with edit.at(model, "L1.mid", positions=positions, target=torch.tensor([0, 1, 0])) as run:
            model(**inputs)
        assert run.distance.shape == shape
        assert bool((run.log_odds_after >= run.floor).all())
    assert lrqp.capture(model, inputs, "L1.mid", slice(4, 6))["L1.mid"].shape[:2] == (3, 2)
