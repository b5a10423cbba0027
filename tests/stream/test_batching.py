"""Batching: neighbours in length run together, nothing is lost, and nothing else is computed."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import POST_MODELS, SITES, Prompts, build, hook_count
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.errors import PositionError
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.capture import capture_batches
from lrqp_torch.stream.inputs import by_length, in_order, is_watched, real_spans, wasted_share
from lrqp_torch.stream.passes import LeftPaddingWarning
from lrqp_torch.stream.sites import locate

LENGTHS = [7, 3, 9, 6, 3, 8, 2, 9]
PROMPTS = Prompts.random(LENGTHS)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def ragged(side: str, extra: int = 4) -> dict[str, Tensor]:
    """The prompts with more padding than any needs; ``both``: every other row on another side."""
    left, right = (PROMPTS.padded(one) for one in ("left", "right"))
    odd = (torch.arange(len(LENGTHS)) % 2 == 1)[:, None]
    chosen = {"left": left, "right": right}.get(
        side, {name: torch.where(odd, left[name], right[name]) for name in left}
    )
    inputs = {name: torch.nn.functional.pad(value, (extra, 2)) for name, value in chosen.items()}
    inputs["position_ids"] = lrqp.position_ids(inputs["attention_mask"])
    return inputs


def positions_of(inputs: dict[str, Tensor]) -> list[Tensor]:
    """The last real token, three tokens (where there are as many), and a mask of every other."""
    mask = inputs["attention_mask"].bool()
    columns = torch.arange(mask.shape[1])
    last = torch.where(mask, columns, -1).amax(1)
    every_other = mask & (columns % 2 == 0)
    every_other[2] = False
    return [last, torch.stack([last, torch.where(mask, columns, 99).amin(1)], 1), every_other]


def per_example(model: torch.nn.Module, inputs: dict[str, Tensor], at: Tensor) -> Tensor:
    """The reference: each example alone, as given, with all its padding, and no positions."""
    rows = []
    for row in range(len(at)):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        whole = lrqp.capture(model, one, "L2.mid")["L2.mid"][0]
        rows.append(whole[at[row]])
    return torch.cat(rows) if at.dtype == torch.bool else torch.stack(rows)


@pytest.mark.parametrize("name", [*POST_MODELS, "gpt_neox_serial"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("given_ids", [True, False])
@pytest.mark.filterwarnings("ignore::lrqp_torch.stream.passes.LeftPaddingWarning")
def test_the_same_activations_as_without(name: str, side: str, given_ids: bool) -> None:
    """Also without position_ids, where GPT-2 counts the padding: trimming must not mend that."""
    model, inputs = build(name), ragged(side)
    if not given_ids:
        del inputs["position_ids"]
    for at in positions_of(inputs):
        expected = per_example(model, inputs, at)
        for limits in ({}, {"batch_size": 3}, {"batch_tokens": 14}, {"batch_size": 1}):
            found = lrqp.capture(model, inputs, ["L2.mid", "L0.pre"], at, **limits)
            torch.testing.assert_close(found["L2.mid"], expected, **TOLERANCE)


def test_padding_does_matter_to_gpt2_without_position_ids() -> None:
    """The test above would prove nothing if the derived position ids made no difference."""
    model, inputs = build("gpt2"), ragged("left")
    at = positions_of(inputs)[0]
    aware = lrqp.capture(model, inputs, "L0.pre", at)["L0.pre"]
    del inputs["position_ids"]
    with pytest.warns(LeftPaddingWarning):
        unaware = lrqp.capture(model, inputs, "L0.pre", at, batch_size=2)["L0.pre"]
    assert not torch.allclose(aware, unaware, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_and_shared_position_ids_are_cut_too(side: str) -> None:
    model, inputs = build("llama"), ragged(side)
    at = positions_of(inputs)[1]
    expected = lrqp.capture(model, inputs, SITES, at)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"].bool(),
        "position_ids": torch.arange(inputs["input_ids"].shape[1])[None],
        "use_cache": False,
    }
    found = lrqp.capture(model, embedded, SITES, at, batch_size=3)
    for site in SITES:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-4, atol=1e-4)


def shapes_run(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the token ids that the base model is given from now on."""
    shapes: list[tuple[int, ...]] = []
    locate(model, "L0.mid")  # which runs a new model on a few tokens
    forward = model.base_model.forward

    def watch(*args: object, **kwargs: object) -> object:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    model.base_model.forward = watch
    return shapes


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_only_the_padding_that_a_batch_needs_runs(side: str) -> None:
    model, inputs = build("llama"), ragged(side)
    at, shapes = positions_of(inputs)[0], shapes_run(model)
    lrqp.capture(model, inputs, "L0.mid", at, batch_size=3)
    assert shapes == [(3, 9), (3, 7), (2, 3)]
    shapes.clear()
    lrqp.capture(model, inputs, "L0.mid", at, batch_tokens=18)
    assert shapes == [(2, 9), (2, 8), (3, 6), (1, 2)]
    shapes.clear()
    lrqp.capture(model, inputs, "L0.mid", at)
    assert shapes == [(8, 9)]
    shapes.clear()
    lrqp.capture(model, inputs, "L0.mid", batch_size=5)  # without positions: all, as given
    assert shapes == [(5, 15), (3, 15)]


@pytest.mark.parametrize("change", ["no mask", "four-dimensional mask", "token of another shape"])
def test_inputs_that_cannot_be_cut_run_as_given(change: str) -> None:
    model, inputs = build("llama"), ragged("right", extra=0)
    at, shapes = positions_of(inputs)[0], shapes_run(model)
    expected = lrqp.capture(model, inputs, "L1.mid", at)["L1.mid"]
    if change == "no mask":
        del inputs["attention_mask"]
    elif change == "four-dimensional mask":
        inputs["attention_mask"] = torch.ones(8, 1, 11, 11).tril().bool()
    else:
        inputs["labels"] = torch.zeros(8, dtype=torch.long)
    shapes.clear()
    found = lrqp.capture(model, inputs, "L1.mid", at, batch_size=4)["L1.mid"]
    assert shapes == [(4, 11), (4, 11)]
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("watch", ["edit", "patterns"])
def test_under_an_open_context_rows_and_columns_stay(watch: str) -> None:
    model, inputs = build("gpt2"), ragged("left")
    at = positions_of(inputs)[0]
    if watch == "edit":
        item = lrqp.Intervention("L1.mid", at, lambda x, context: 2 * x)
        plain = lrqp.capture(model, inputs, "L1.mid", at)["L1.mid"]
        with lrqp.intervene(model, item):
            edited = lrqp.capture(model, inputs, "L1.mid", at)["L1.mid"]
        torch.testing.assert_close(edited, 2 * plain, **TOLERANCE)
    else:
        with record_patterns(model, [0], at) as patterns:
            lrqp.capture(model, inputs, "L1.mid", at)
        assert patterns[0].shape == (8, 4, 15)


def test_rotary_frequencies_that_depend_on_the_length_forbid_it() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = build("llama", rope_parameters=rope, max_position_embeddings=8)
    inputs = ragged("right")
    at = positions_of(inputs)[0]
    del inputs["position_ids"]
    expected = lrqp.capture(model, inputs, "L2.mid", at)["L2.mid"]
    found = lrqp.capture(model, inputs, "L2.mid", at, batch_size=2)["L2.mid"]
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("limits", [{}, {"batch_size": 3}, {"batch_tokens": 20}])
def test_streaming_yields_every_row_once(limits: dict[str, int]) -> None:
    model, inputs = build("gpt2"), ragged("left")
    for at in positions_of(inputs):
        expected = lrqp.capture(model, inputs, ["L1.mid"], at)["L1.mid"]
        seen = []
        for rows, found in capture_batches(model, inputs, ["L1.mid"], at, **limits):
            assert rows.tolist() == sorted(rows.tolist())
            torch.testing.assert_close(found["L1.mid"], expected[rows], **TOLERANCE)
            seen += rows.tolist()
        assert sorted(seen) == list(range(len(expected)))


def test_a_streamed_covariance_is_that_of_all_activations() -> None:
    model, inputs = build("gpt2"), ragged("left")
    mask = inputs["attention_mask"].bool()
    covariance = lrqp.Covariance(24)
    for _, found in capture_batches(model, inputs, "L1.mid", mask, batch_size=2):
        covariance.update(found["L1.mid"])
    whole = lrqp.Mahalanobis.fit(lrqp.capture(model, inputs, "L1.mid", mask)["L1.mid"])
    streamed = covariance.finish()
    assert streamed.n_samples == sum(LENGTHS)
    torch.testing.assert_close(streamed.covariance, whole.covariance, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named_at_the_call_with_the_examples_own_number() -> None:
    model, inputs = build("gpt2"), ragged("left")
    at = positions_of(inputs)[0]
    with pytest.raises(PositionError, match="batch_tokens must be at least 1"):
        capture_batches(model, inputs, "L1.mid", at, batch_tokens=0)
    at[6] = 3
    with pytest.raises(PositionError, match=r"on padding.*\(6, 3\)"):
        capture_batches(model, inputs, "L1.mid", at, batch_size=2)
    empty = {name: value[:0] for name, value in inputs.items()}
    with pytest.raises(PositionError, match="no example"):
        capture_batches(model, empty, "L1.mid", at[:0])


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    left=st.booleans(),
    batch_size=st.one_of(st.none(), st.integers(1, 8)),
    batch_tokens=st.one_of(st.none(), st.integers(1, 60)),
    begin=st.integers(0, 5),
)
def test_batches_cover_every_real_token(
    lengths: list[int],
    before: int,
    after: int,
    left: bool,
    batch_size: int | None,
    batch_tokens: int | None,
    begin: int,
) -> None:
    """Every example once, every real token inside, limits kept, and no wider than the longest."""
    width = max([1, *lengths])
    mask = torch.zeros(len(lengths), before + width + after)
    for row, length in enumerate(lengths):
        start = before + (width - length if left else 0)
        mask[row, start : start + length] = 1
    examples = range(min(begin, len(lengths) - 1), len(lengths))
    batches = by_length(mask, examples, batch_size, batch_tokens)
    assert sorted(itertools.chain(*(b.examples.tolist() for b in batches))) == list(examples)
    for batch in batches:
        assert batch.width == max(1, *(lengths[row] for row in batch.examples), 0)
        assert batch_size is None or len(batch.examples) <= batch_size
        assert (
            batch_tokens is None
            or len(batch.examples) == 1
            or len(batch.examples) * batch.width <= batch_tokens
        )
        for row, first in zip(batch.examples.tolist(), batch.first.tolist(), strict=True):
            assert 0 <= first <= mask.shape[1] - batch.width
            assert int(mask[row, first : first + batch.width].sum()) == lengths[row]
    _, spans = real_spans(mask)
    assert spans.tolist() == [max(length, 1) for length in lengths]


def test_waste_is_small_where_lengths_vary() -> None:
    """Sentence-like lengths, 14 to 60 tokens: from a third of all tokens to under 5 %."""
    generator = torch.Generator().manual_seed(0)
    lengths = (14 + 46 * torch.rand(2000, generator=generator).square()).long()
    mask = (torch.arange(60) < lengths[:, None]).long()
    before = in_order(60, range(2000), 64, None)
    after = by_length(mask, range(2000), 64, None)
    assert math.isclose(wasted_share(mask, before), 1 - int(lengths.sum()) / 120_000)
    assert wasted_share(mask, before) > 0.3
    assert wasted_share(mask, after) < 0.05


@torch.no_grad()
def test_the_hooks_that_transformers_leaves_are_not_of_anyone() -> None:
    model, inputs = build("llama"), ragged("left")
    at = positions_of(inputs)[0]
    plain = lrqp.capture(model, inputs, "L1.mid", at, batch_size=3)["L1.mid"]
    model(**inputs, output_hidden_states=True)
    if hook_count(model) == 0:
        pytest.skip("this transformers leaves no hooks")
    assert not is_watched(model)
    shapes = shapes_run(model)
    found = lrqp.capture(model, inputs, "L1.mid", at, batch_size=3)["L1.mid"]
    assert shapes == [(3, 9), (3, 7), (2, 3)] and torch.equal(found, plain)
    handle = model.register_forward_hook(functools.partial(lambda *_: None))
    assert is_watched(model)
    handle.remove()
