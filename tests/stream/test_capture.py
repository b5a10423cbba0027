"""Capture: the stream at sites and positions equals a forward pass written out by hand."""

from collections.abc import Mapping

import pytest
import torch
from models_for_tests import (
    ALL_MODELS,
    CONTEXT,
    LAYERS,
    POST_MODELS,
    SITES,
    VOCABULARY,
    WIDTH,
    Prompts,
    build,
    forward_by_hand,
    hook_count,
)
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import lrqp_torch as lrqp
from lrqp_torch.errors import LRQPError, PositionError, WidthError

PROMPTS = Prompts.random([7, 4, 9, 6, 5])
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.15},
}


def present(name: str) -> list[str]:
    return [site for site in SITES if name != "gpt_neox_parallel" or not site.endswith("mid")]


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_equals_the_forward_pass_by_hand(
    name: str, attention: str, dtype: torch.dtype, side: str
) -> None:
    model, inputs = build(name, dtype=dtype, attention=attention), PROMPTS.padded(side)
    real = inputs["attention_mask"].bool()
    _, streams = forward_by_hand(model, inputs)
    captured = lrqp.capture(model, inputs, present(name))
    assert list(captured) == present(name)
    for site, activations in captured.items():
        assert activations.dtype == dtype
        torch.testing.assert_close(
            activations[real], streams[site][real], **TOLERANCE[dtype], msg=lambda m, s=site: s + m
        )


@pytest.mark.parametrize("name", ALL_MODELS)
@torch.no_grad()
def test_equals_output_hidden_states_where_there_are_any(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    states = build(name)(**inputs, output_hidden_states=True).hidden_states
    captured = lrqp.capture(model, inputs, present(name))
    for layer in range(LAYERS):
        assert torch.equal(captured[f"L{layer}.pre"], states[layer])
        if layer + 1 < LAYERS:  # the last entry of hidden_states is after the final norm
            assert torch.equal(captured[f"L{layer}.post"], states[layer + 1])


@pytest.mark.parametrize("name", POST_MODELS)
def test_positions_of_every_shape_pick_their_rows(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    sites = ["L1.mid", "L0.pre", "L2.post"]
    everything = lrqp.capture(model, inputs, sites)
    one = torch.tensor([8, 5, 0, 7, 8])
    several = torch.tensor([[8, 2], [5, 7], [0, 8], [7, 3], [8, 6]])
    mask = inputs["attention_mask"].bool() & (torch.arange(9) % 3 == 2)
    rows = torch.arange(5)
    for site, whole in everything.items():
        assert whole.shape == (5, 9, WIDTH)
        picked = lrqp.capture(model, inputs, [site], one)[site]
        assert torch.equal(picked, whole[rows, one])
        picked = lrqp.capture(model, inputs, [site], several)[site]
        assert torch.equal(picked, whole[rows[:, None], several])
        picked = lrqp.capture(model, inputs, [site], mask)[site]
        assert torch.equal(picked, whole[mask])


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 100])
def test_batches_give_the_same(name: str, dtype: torch.dtype, batch_size: int) -> None:
    model, inputs = build(name, dtype=dtype), PROMPTS.padded("left")
    mask = inputs["attention_mask"].bool() & torch.tensor([1, 0, 0, 1, 1]).bool()[:, None]
    real = inputs["attention_mask"].bool()
    for positions in (torch.tensor([8, 5, 0, 7, 8]), torch.tensor([[8, 7]] * 5), mask, None):
        whole = lrqp.capture(model, inputs, SITES, positions)
        split = lrqp.capture(model, inputs, SITES, positions, batch_size=batch_size)
        for site in SITES:
            a, b = whole[site], split[site]
            a, b = (a[real], b[real]) if positions is None else (a, b)
            torch.testing.assert_close(b, a, **TOLERANCE[dtype])


class Calls:
    """Counts the calls of every module, by its name."""

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.names.append(name))


@pytest.mark.parametrize("name", POST_MODELS)
def test_stops_after_the_last_site(name: str) -> None:
    model = build(name)
    blocks, parts = (
        ("transformer.h", ("ln_1", "attn", "ln_2", "mlp"))
        if name == "gpt2"
        else ("model.layers", ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"))
    )
    # Sites are found and proven by whole passes, once.
    lrqp.capture(model, PROMPTS.padded("left"), ["L0.pre"])
    calls = Calls(model)

    def called(sites: list[str]) -> list[str]:
        calls.names.clear()
        lrqp.capture(model, PROMPTS.padded("left"), sites)
        watched = [f"{blocks}.{n}.{part}" for n in range(LAYERS) for part in parts]
        assert "lm_head" not in calls.names
        assert all(calls.names.count(name) <= 1 for name in watched)
        return [name.removeprefix(blocks + ".") for name in watched if name in calls.names]

    first = [f"0.{part}" for part in parts]
    assert called(["L0.pre"]) == []
    assert called(["L0.mid"]) == first[:2]
    assert called(["L0.post"]) == first
    assert called(["L1.mid", "L0.pre"]) == [*first, *(f"1.{part}" for part in parts[:2])]


@pytest.mark.parametrize("name", POST_MODELS)
def test_keeps_only_what_was_asked_for(name: str) -> None:
    """What is kept owns exactly its own numbers: no view of the whole stream, and no graph."""
    model, inputs = build(name), PROMPTS.padded("left")
    captured = lrqp.capture(model, inputs, ["L1.mid", "L2.pre"], torch.tensor([8] * 5))
    for activations in captured.values():
        assert activations.untyped_storage().nbytes() == 5 * WIDTH * 4
        assert not activations.requires_grad
    assert sorted(captured) == ["L1.mid", "L2.pre"]


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_leaves_the_model_as_it_was(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    clean = model(**inputs).logits
    for site in SITES:
        lrqp.capture(model, inputs, [site], torch.tensor([8] * 5), batch_size=2)
        assert hook_count(model) == 0
    assert torch.equal(model(**inputs).logits, clean)
    generated = model.generate(inputs["input_ids"][2:3], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 12)


@pytest.mark.parametrize("site", SITES)
def test_leaves_no_hooks_when_the_forward_raises(site: str) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    for module in (model.transformer.wte, model.transformer.h[0].ln_1):
        handle = module.register_forward_pre_hook(fail)
        if site != "L0.pre" or module is model.transformer.wte:
            with pytest.raises(RuntimeError, match="out of memory"):
                lrqp.capture(model, inputs, [site])
        handle.remove()
        assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_sees_the_edits_of_an_open_context(name: str) -> None:
    """Capture at and after an edited site equals the forward pass by hand with the same edit."""
    model, inputs = build(name), PROMPTS.padded("left")
    at = torch.tensor([8, 6, 3, 4, 8])
    rows, real = torch.arange(5), inputs["attention_mask"].bool()

    def double(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[rows, at] *= 2
        return stream

    for site in SITES:
        _, streams = forward_by_hand(model, inputs, {site: double})
        item = lrqp.Intervention(site, at, lambda x, context: 2 * x)
        with lrqp.intervene(model, [item]):
            captured = lrqp.capture(model, inputs, SITES)
        before = lrqp.capture(model, inputs, SITES)
        for reached in SITES:
            torch.testing.assert_close(
                captured[reached][real], streams[reached][real], rtol=1e-5, atol=1e-5
            )
            untouched = SITES.index(reached) < SITES.index(site)
            assert torch.equal(captured[reached], before[reached]) == untouched
        # The edited rows are twice the clean ones.
        expected = 2 * before[site][rows, at]
        torch.testing.assert_close(captured[site][rows, at], expected, rtol=1e-6, atol=1e-6)


def test_sites_may_repeat_and_come_in_any_order() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    captured = lrqp.capture(model, inputs, ["L2.mid", "L0.pre", "L2.mid"])
    assert sorted(captured) == ["L0.pre", "L2.mid"]
    assert torch.equal(captured["L2.mid"], lrqp.capture(model, inputs, ["L2.mid"])["L2.mid"])


def test_device_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    quiet = lrqp.capture(model, inputs, ["L1.mid"], batch_size=2)["L1.mid"]
    assert capsys.readouterr().out == ""
    shown = lrqp.capture(model, inputs, ["L1.mid"], batch_size=2, device="cpu", progress=True)[
        "L1.mid"
    ]
    assert torch.equal(quiet, shown)
    assert "capturing activations" in capsys.readouterr().err


@pytest.mark.parametrize("width", [4, 12])
def test_a_mask_of_another_width_is_refused(width: int) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    mask = torch.zeros(5, width, dtype=torch.bool)
    mask[0, 3] = True
    with pytest.raises(LRQPError, match=f"{width} columns, the inputs have 9"):
        lrqp.capture(model, inputs, ["L1.mid"], mask, batch_size=2)


@torch.no_grad()
def test_a_cache_is_refused_and_left_alone() -> None:
    model, ids = build("gpt2"), PROMPTS.tokens[2][None]
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(LRQPError, match="without a cache"):
        lrqp.capture(model, {"input_ids": ids[:, 5:], "past_key_values": cache}, ["L1.mid"])
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [5] * LAYERS


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ([], {}, "no sites"),
        (["L9.pre"], {}, r"L9\.pre"),
        (["L1"], {}, "'L1' is no site"),
        (["L1.mid"], {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(
    sites: list[str], options: Mapping[str, int], message: str
) -> None:
    model = build("gpt2")
    with pytest.raises(LRQPError, match=message):
        lrqp.capture(model, PROMPTS.padded("left"), sites, **options)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("part", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("shape", [(3, 9), (1, 9), (5, 10), (5, 8), (9,)])
def test_masks_and_position_ids_of_another_shape_are_refused(
    name: str, part: str, shape: tuple[int, ...]
) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    expected = lrqp.capture(model, inputs, "L1.mid", batch_size=2)["L1.mid"]
    inputs[part] = torch.ones(shape, dtype=torch.long)
    if part == "position_ids" and shape == (1, 9):
        shared = lrqp.capture(model, inputs, "L1.mid", batch_size=2)["L1.mid"]
        inputs[part] = inputs[part].expand(5, 9)
        assert torch.equal(shared, lrqp.capture(model, inputs, "L1.mid", batch_size=2)["L1.mid"])
        assert shared.shape == expected.shape
        return
    with pytest.raises(WidthError, match=rf"{part} .*\(5, 9\)"):
        lrqp.capture(model, inputs, "L1.mid", batch_size=2)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([[1, 2], [3, VOCABULARY]]), WidthError, "61 in row 1, column 1"),
        (torch.tensor([[1, 2], [-1, 4]]), WidthError, "-1 in row 1, column 0"),
        (torch.ones(2, 3), WidthError, "float32"),
        (torch.ones(3, dtype=torch.long), WidthError, r"\(n, T\)"),
        (torch.ones(2, 0, dtype=torch.long), PositionError, "no token"),
        (torch.ones(2, CONTEXT + 1, dtype=torch.long), PositionError, "row 0 needs 65 positions"),
    ],
)
def test_tokens_that_the_model_cannot_read_are_refused_before_it_runs(
    ids: Tensor, error: type[LRQPError], message: str
) -> None:
    model = build("gpt2")
    with pytest.raises(error, match=message):
        lrqp.capture(model, {"input_ids": ids}, "L1.mid")
    assert hook_count(model) == 0


def test_only_learned_positions_end() -> None:
    ids = torch.ones(2, CONTEXT + 1, dtype=torch.long)
    found = lrqp.capture(build("llama"), {"input_ids": ids}, "L1.mid")["L1.mid"]
    assert found.shape == (2, CONTEXT + 1, WIDTH)
    places = (torch.arange(CONTEXT + 1) - 1).clamp_min(0)[None]
    inputs = {"input_ids": ids, "position_ids": places}
    assert lrqp.capture(build("gpt2"), inputs, "L1.mid")["L1.mid"].shape == found.shape
    with pytest.raises(PositionError, match="row 0 are negative"):
        lrqp.capture(build("gpt2"), {**inputs, "position_ids": places - 1}, "L1.mid")


def test_opt_counts_the_real_tokens_itself() -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=8,
        word_embed_proj_dim=WIDTH,
    )
    model = OPTForCausalLM(config).eval()
    inputs = {"input_ids": torch.ones(2, 9, dtype=torch.long)}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[:, 0] = 0
    lrqp.capture(model, {**inputs, "attention_mask": mask}, "L0.mid")
    mask[1] = 1
    with pytest.raises(PositionError, match="row 1 needs 9 positions"):
        lrqp.capture(model, {**inputs, "attention_mask": mask}, "L0.mid")
