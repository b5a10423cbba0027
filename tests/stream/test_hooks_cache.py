"""With a KV cache positions are absolute: cached and uncached runs agree, token for token."""

import pytest
import torch
from models_for_tests import (
    ALL_MODELS,
    POST_MODELS,
    WIDTH,
    Prompts,
    build,
    hook_count,
    random_edit,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

import lrqp_torch as lrqp
from lrqp_torch.errors import EditNeverFiredError, PositionError

PROMPTS = Prompts.random([7, 4, 9, 6])
AT = PROMPTS.columns(torch.tensor([3, 2, 8, 0]), "left")
TARGET = torch.tensor([0, 2, 1, 1])
NEW = 6


class Counted:
    """An edit that pushes, and counts how often it ran and where."""

    def __init__(self, size: float = 2.0) -> None:
        self.direction = size * torch.linspace(-1, 1, WIDTH)
        self.calls: list[list[tuple[int, int]]] = []

    def __call__(self, x: Tensor, context: lrqp.EditContext) -> Tensor:
        pairs = zip(context.example.tolist(), context.token.tolist(), strict=True)
        self.calls.append(list(pairs))
        return x + self.direction.to(x.dtype)


def generate(model: torch.nn.Module, use_cache: bool) -> Tensor:
    inputs = PROMPTS.padded("left")
    return model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", ["L0.pre", "L1.mid", "L2.post"])
def test_generation_is_the_same_cached_and_uncached(name: str, site: str) -> None:
    model = build(name)
    inputs = PROMPTS.padded("left")
    x = lrqp.capture(model, inputs, [site], inputs["attention_mask"].bool())[site]
    edit = random_edit(x, 3, log_odds=30.0)
    last = torch.full((4,), 8)
    clean = generate(model, use_cache=True)
    texts, records = {}, {}
    for use_cache in (True, False):
        with edit.at(model, site, positions=last, target=TARGET) as run:
            texts[use_cache] = generate(model, use_cache)
        records[use_cache] = run
    assert texts[True].shape == (4, 9 + NEW)
    assert torch.equal(texts[True], texts[False])
    assert not torch.equal(texts[True], clean)
    x = lrqp.capture(model, inputs, [site], last)[site]
    solution = edit.solve(x, TARGET)
    for run in records.values():
        expected = solution.log_odds_before
        torch.testing.assert_close(run.log_odds_before, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.distance, solution.distance, rtol=1e-4, atol=1e-4)
        assert bool((run.log_odds_after >= run.floor).all())
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
def test_an_edit_runs_once_with_a_cache_and_every_step_without(name: str) -> None:
    model = build(name)
    expected = list(zip(range(4), AT.tolist(), strict=True))
    for use_cache, calls in ((True, 1), (False, NEW)):
        edit = Counted()
        with lrqp.intervene(model, [lrqp.Intervention("L1.mid", AT, edit)]):
            generate(model, use_cache)
        assert edit.calls == [expected] * calls


@pytest.mark.parametrize("name", POST_MODELS)
def test_positions_in_the_generated_text_are_reached(name: str) -> None:
    """Position 9 is the first generated token; 12 and 13 come later."""
    model, edit = build(name), Counted()
    at = torch.tensor([9, 9, 12, 13])
    with lrqp.intervene(model, [lrqp.Intervention("L1.mid", at, edit)]):
        text = generate(model, use_cache=True)
    assert edit.calls == [[(0, 9), (1, 9)], [(2, 12)], [(3, 13)]]
    clean = generate(model, use_cache=True)
    assert torch.equal(text[:, :10], clean[:, :10])
    assert not torch.equal(text, clean)
    # The last generated token is never fed back, so an edit there could not have any effect.
    beyond = lrqp.Intervention("L1.mid", torch.tensor([9, 9, 9, 9 + NEW - 1]), Counted())
    with (
        pytest.raises(EditNeverFiredError, match=r"\[\(3, 14\)\]"),
        lrqp.intervene(model, [beyond]),
    ):
        generate(model, use_cache=True)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("chunks", [[9], [3, 6], [1, 4, 4], [8, 1]])
@torch.no_grad()
def test_a_prompt_fed_in_chunks_is_the_prompt_fed_at_once(name: str, chunks: list[int]) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    at = PROMPTS.columns(torch.tensor([[0, 6], [1, 3], [2, 8], [5, 4]]), "left")
    site = "L1.post" if name == "gpt_neox_parallel" else "L1.mid"
    real = inputs["attention_mask"].bool()
    edit = random_edit(lrqp.capture(model, inputs, [site], real)[site], 3, log_odds=15.0)
    target = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 2]])
    with edit.at(model, site, positions=at, target=target) as whole_run:
        whole = model(**inputs).logits
    pieces, cache, start = [], DynamicCache(config=model.config), 0
    with edit.at(model, site, positions=at, target=target) as run:
        for size in chunks:
            columns = slice(start, start + size)
            output = model(
                input_ids=inputs["input_ids"][:, columns],
                attention_mask=inputs["attention_mask"][:, : start + size],
                position_ids=inputs["position_ids"][:, columns],
                past_key_values=cache,
                use_cache=True,
            )
            pieces.append(output.logits)
            start += size
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-4, atol=1e-4)
    assert run.distance.shape == (4, 2)
    torch.testing.assert_close(run.distance, whole_run.distance, rtol=1e-4, atol=1e-4)
    assert torch.equal(run.status, whole_run.status)


@torch.no_grad()
def test_the_first_chunk_may_start_its_own_cache() -> None:
    model, ids = build("gpt2"), PROMPTS.tokens[2][None]
    item = lrqp.Intervention("L1.mid", torch.tensor([[1, 7]]), Counted())
    with lrqp.intervene(model, [item]):
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_static_cache_counts_its_tokens_too() -> None:
    model, ids = build("llama"), PROMPTS.tokens[2][None]
    edit = Counted()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with lrqp.intervene(model, [lrqp.Intervention("L1.mid", torch.tensor([[1, 7]]), edit)]):
        pieces = [
            model(input_ids=ids[:, columns], past_key_values=cache, use_cache=True).logits
            for columns in (slice(0, 5), slice(5, 9))
        ]
        whole = model(input_ids=ids).logits
    assert edit.calls == [[(0, 1)], [(0, 7)], [(0, 1), (0, 7)]]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_edit_in_the_cached_part_is_missed_aloud() -> None:
    model, ids = build("gpt2"), PROMPTS.tokens[2][None]
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    item = lrqp.Intervention("L1.mid", torch.tensor([[1, 7]]), Counted())
    with (
        pytest.raises(EditNeverFiredError, match=r"L1\.mid never ran at 1 of 2.*\[\(0, 1\)\].*KV"),
        lrqp.intervene(model, [item]),
    ):
        model(input_ids=ids[:, 5:], past_key_values=cache)


def test_padding_in_the_prompt_is_refused_in_generation() -> None:
    model = build("llama")
    item = lrqp.Intervention("L1.mid", torch.tensor([8, 2, 8, 8]), Counted())
    with (
        pytest.raises(PositionError, match=r"padding.*\[\(1, 2\)\]"),
        lrqp.intervene(model, [item]),
    ):
        generate(model, use_cache=True)
    assert hook_count(model) == 0


def test_beams_multiply_the_batch_aloud() -> None:
    model, ids = build("gpt2"), PROMPTS.tokens[2][None]
    item = lrqp.Intervention("L1.mid", torch.tensor([8]), Counted())
    with (
        pytest.raises(PositionError, match="for 1 examples, the model was given 2"),
        lrqp.intervene(model, [item]),
    ):
        model.generate(ids, num_beams=2, max_new_tokens=2, pad_token_id=0)
