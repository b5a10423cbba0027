"""Reading and editing attention patterns: exact to eager, undone afterwards, loud on bad input."""

import pytest
import torch
from models_for_tests import HEADS, LAYERS, WIDTH, Prompts, build, hook_count
from torch import Tensor, nn

from lrqp_torch.errors import PositionError, SiteError, UnknownFamilyError, WidthError
from lrqp_torch.stream.attention import record_patterns, set_patterns, visit_patterns
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.replay import Replay
from lrqp_torch.study.attribution import output_projection

FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox_serial", "gpt_neox_parallel")
LENGTHS = [9, 5, 7]


def batch(side: str = "left") -> tuple[dict[str, Tensor], Tensor]:
    prompts = Prompts.random(LENGTHS)
    last = prompts.columns(torch.tensor(LENGTHS) - 1, side)
    return prompts.padded(side), last


def rows(attentions: tuple[Tensor, ...], layer: int, queries: Tensor) -> Tensor:
    return attentions[layer][torch.arange(len(queries)), :, queries]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_recorded_patterns_and_logits_are_eagers_bit_for_bit(name: str, side: str) -> None:
    inputs, last = batch(side)
    eager = build(name, attention="eager")(**inputs, output_attentions=True)
    model = build(name)
    with record_patterns(model, range(LAYERS), last) as patterns:
        logits = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(logits[real], eager.logits[real])
    for layer in range(LAYERS):
        assert torch.equal(patterns[layer], rows(eager.attentions, layer, last))
        assert patterns[layer].shape == (3, HEADS, max(LENGTHS))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_recording_agrees_with_the_models_own_implementation(name: str) -> None:
    inputs, last = batch()
    model = build(name)
    plain = model(**inputs).logits
    with record_patterns(model, [1], last):
        recorded = model(**inputs).logits
    torch.testing.assert_close(recorded[:, -1], plain[:, -1], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padding_stays_finite_in_double_precision(name: str) -> None:
    """Eager itself gives NaN there, in families that take the softmax in float32."""
    inputs, last = batch()
    model = build(name, dtype=torch.float64)
    plain = model(**inputs).logits[:, -1]
    with record_patterns(model, range(LAYERS), last) as patterns:
        recorded = model(**inputs).logits
    assert bool(recorded.isfinite().all())
    torch.testing.assert_close(recorded[:, -1], plain, rtol=1e-5, atol=1e-5)
    for pattern in patterns.values():
        assert bool((pattern[inputs["attention_mask"][:, None].expand_as(pattern) == 0] == 0).all())
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, HEADS, dtype=torch.float64))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_patterns_of_a_cached_suffix_cover_the_whole_input(name: str) -> None:
    inputs, last = batch()
    model = build(name)
    layers = range(LAYERS)
    with record_patterns(model, layers, last) as whole, record_heads(model, layers, last) as z:
        logits = model(**inputs).logits[:, -1]
    with record_patterns(model, layers, last) as suffix, record_heads(model, layers, last) as z_too:
        replay = Replay(model, inputs, 4)
        assert replay.first_position == 4
        torch.testing.assert_close(replay.run(0), logits, rtol=1e-5, atol=1e-5)
    for layer in layers:
        assert suffix[layer].shape == whole[layer].shape
        torch.testing.assert_close(suffix[layer], whole[layer], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(z_too[layer], z[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_setting_what_was_recorded_changes_no_bit(name: str) -> None:
    inputs, last = batch()
    model = build(name)
    with record_patterns(model, range(LAYERS), last) as patterns:
        logits = model(**inputs).logits
    every = {(n, h): patterns[n][:, h] for n in range(LAYERS) for h in range(HEADS)}
    with set_patterns(model, every, last):
        assert torch.equal(model(**inputs).logits, logits)


def values_by_hand(model: nn.Module, name: str, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """Value vectors of every query head, (B, heads, T, head width), from the model's modules."""
    stream = model(**inputs, output_hidden_states=True).hidden_states[layer]
    block = (model.transformer.h if name == "gpt2" else model.model.layers)[layer]
    width = WIDTH // HEADS
    if name == "gpt2":
        return (
            block.attn.c_attn(block.ln_1(stream))[..., -WIDTH:]
            .unflatten(-1, (HEADS, width))
            .transpose(1, 2)
        )
    flat = block.self_attn.v_proj(block.input_layernorm(stream))
    return flat.unflatten(-1, (-1, width)).transpose(1, 2).repeat_interleave(2, dim=1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_one_hot_and_uniform_patterns_give_the_head_its_values(name: str) -> None:
    inputs, last = batch()
    model = build(name, attention="eager")
    values = values_by_hand(model, name, inputs, 1)
    seen = inputs["attention_mask"].double()
    uniform = seen / seen.sum(-1, keepdim=True)
    one_hot = torch.zeros_like(seen)
    target = last - torch.tensor([3, 1, 2])
    one_hot[torch.arange(3), target] = 1
    with record_heads(model, [1], last) as untouched:
        model(**inputs)
    with (
        set_patterns(model, {(1, 0): one_hot, (1, 3): uniform}, last),
        record_heads(model, [1], last) as z,
    ):
        model(**inputs)
    torch.testing.assert_close(z[1][:, 0], values[torch.arange(3), 0, target])
    mean = (values[:, 3] * uniform[..., None].float()).sum(1)
    torch.testing.assert_close(z[1][:, 3], mean)
    assert torch.equal(z[1][:, 1:3], untouched[1][:, 1:3])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_head_outputs_times_w_o_are_the_attention_output(name: str) -> None:
    inputs, last = batch()
    model = build(name)
    blocks = {"gpt2": "transformer.h", "llama": "model.layers", "qwen3": "model.layers"}
    block = model.get_submodule(blocks.get(name, "gpt_neox.layers"))[1]
    attention = next(
        getattr(block, n) for n in ("attn", "self_attn", "attention") if hasattr(block, n)
    )
    outputs: list[Tensor] = []
    handle = attention.register_forward_hook(lambda m, a, output: outputs.append(output[0]))
    with record_heads(model, [1], last) as z:
        model(**inputs)
    handle.remove()
    weight, bias = output_projection(model, 1)
    assert z[1].shape == (3, HEADS, WIDTH // HEADS)
    expected = outputs[0][torch.arange(3), last]
    torch.testing.assert_close(z[1].flatten(1) @ weight + bias, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_set_pattern_changes_only_the_chosen_query() -> None:
    inputs, last = batch()
    model = build("llama", attention="eager")
    plain = model(**inputs).logits
    uniform = inputs["attention_mask"] / inputs["attention_mask"].sum(-1, keepdim=True)
    with set_patterns(model, {(2, 1): uniform}, last):
        edited = model(**inputs).logits
    assert torch.equal(edited[:, :-1], plain[:, :-1])
    assert bool(((edited - plain)[:, -1].abs().amax(-1) > 1e-4).all())


@torch.no_grad()
def test_inner_contexts_see_what_outer_ones_set() -> None:
    inputs, last = batch()
    model = build("gpt2")
    length = inputs["input_ids"].shape[1]
    first, second = torch.zeros(2, 3, length)
    first[:, -1], second[:, -2] = 1, 1
    with set_patterns(model, {(0, 0): first}, last), record_patterns(model, [0], last) as inside:
        model(**inputs)
        assert torch.equal(inside[0][:, 0], first)
        with set_patterns(model, {(0, 0): second}, last), record_patterns(model, [0], last) as both:
            model(**inputs)
        # The outer recorder comes before the inner setter, the inner recorder after it.
        assert torch.equal(inside[0][:, 0], first)
        assert torch.equal(both[0][:, 0], second)
        model(**inputs)
        assert torch.equal(inside[0][:, 0], first)


@torch.no_grad()
def test_recording_after_setting_leaves_what_was_set() -> None:
    inputs, last = batch()
    model = build("gpt2")
    one_hot = torch.zeros(3, inputs["input_ids"].shape[1])
    one_hot[:, -2] = 1
    with set_patterns(model, {(0, 0): one_hot}, last):
        expected = model(**inputs).logits
    with record_patterns(model, [0], last):
        plain = model(**inputs).logits
    with set_patterns(model, {(0, 0): one_hot}, last), record_patterns(model, [0], last):
        assert torch.equal(model(**inputs).logits, expected)
    assert not torch.equal(expected[:, -1], plain[:, -1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_everything_is_restored_also_after_an_exception(implementation: str) -> None:
    inputs, last = batch()
    model = build("llama", attention=implementation)
    plain = model(**inputs).logits
    with pytest.raises(RuntimeError, match="from within"), record_patterns(model, [0], last):
        raise RuntimeError("from within")
    with pytest.raises(RuntimeError, match="a visit"), visit_patterns(model, {1: fail}):
        model(**inputs)
    assert model.config._attn_implementation == implementation
    assert hook_count(model) == 0
    assert torch.equal(model(**inputs).logits, plain)


def fail(pattern: Tensor) -> Tensor:
    raise RuntimeError("a visit")


@torch.no_grad()
def test_two_models_do_not_see_each_others_visits() -> None:
    inputs, last = batch()
    one, other = build("gpt2"), build("gpt2", seed=1)
    with record_patterns(one, [0], last) as first, record_patterns(other, [0], last) as second:
        one(**inputs)
        assert list(first) == [0] and not second
        other(**inputs)
    assert not torch.equal(first[0], second[0])


@torch.no_grad()
def test_bad_input_is_named() -> None:
    inputs, last = batch()
    model = build("gpt2")
    length = inputs["input_ids"].shape[1]
    pattern = torch.full((3, length), 1 / length)
    with pytest.raises(SiteError, match="layer 3"), record_patterns(model, [LAYERS], last):
        pass
    with pytest.raises(SiteError, match="H4"), set_patterns(model, {(0, HEADS): pattern}, last):
        model(**inputs)
    short = pattern[:, 1:]
    with pytest.raises(WidthError, match=r"L0\.H0"), set_patterns(model, {(0, 0): short}, last):
        model(**inputs)
    with pytest.raises(PositionError, match="queries"), record_patterns(model, [0], last + 1):
        model(**inputs)
    with pytest.raises(PositionError, match="queries"), record_patterns(model, [0], last[:2]):
        model(**inputs)
    with (
        pytest.raises(PositionError, match="queries must be"),
        record_patterns(model, [0], torch.tensor([0, 8, 8])),
    ):
        Replay(model, inputs, 4).run(0)
    with pytest.raises(UnknownFamilyError), record_patterns(nn.Linear(2, 2), [0], last):
        pass
    assert model.config._attn_implementation == "sdpa"
