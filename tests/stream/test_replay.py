"""Replay of the suffix equals the full forward pass with the same edits."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from models_for_tests import LAYERS, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from zoo_for_tests import build_tiny

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.errors import EditNeverFiredError, ModelError, PositionError, SiteError
from lrqp_torch.stream.replay import Replay, Tail

MODELS = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gpt_neox_serial", "gpt_neox_parallel")
PROMPTS = Prompts.random([9, 6, 12, 7])
AT = PROMPTS.columns(torch.tensor([6, 2, 11, 4]), "left")  # columns 9, 8, 11, 9
TARGET = torch.tensor([0, 2, 1, 1])
FIRST = 8


def close(replayed: Tensor, full: Tensor) -> bool:
    """To rounding: 1e-5 of the largest logit."""
    return float((replayed - full).abs().max()) <= 1e-5 * float(full.abs().max())


def sites_of(name: str) -> list[str]:
    parts = ("pre", "post") if name == "gpt_neox_parallel" else ("pre", "mid", "post")
    return [f"L{layer}.{part}" for layer in range(LAYERS) for part in parts]


def edit_of(model: nn.Module, site: str, seed: int = 0) -> lrqp.LRQP:
    inputs = PROMPTS.padded("left")
    x = lrqp.capture(model, inputs, [site], inputs["attention_mask"].bool())[site]
    return random_edit(x, 3, seed=seed, log_odds=20.0)


@torch.no_grad()
def test_inputs_that_are_written_over_later_were_copied() -> None:
    model = build("gpt2")
    inputs = {name: tensor.clone() for name, tensor in PROMPTS.padded("left").items()}
    replay = Replay(model, inputs, FIRST)
    inputs["input_ids"].fill_(7)
    assert close(replay.run(), replay.clean_logits)


def by_fused_steps(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with torch.enable_grad():
        model(**PROMPTS.padded("left")).logits.sum().backward()
    optimizer.step()


def through_data(model: nn.Module) -> None:
    """As adapters are merged; no counter of torch's sees it."""
    model.get_submodule("transformer.h.0.attn.c_attn").weight.data += 0.01  # type: ignore[operator]


CHANGES: list[tuple[Callable[[nn.Module], Any], bool]] = [
    (by_fused_steps, True),
    (through_data, True),
    (lambda model: model.load_state_dict(build("gpt2", seed=3).state_dict()), True),
    (lambda model: model.get_submodule("transformer.wte").weight[7].mul_(2), True),  # type: ignore[operator, union-attr]
    (lambda model: model.half(), True),
    (lambda model: model.requires_grad_(False), False),
    (lambda model: model.double().float(), False),
    (lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), False),
]


@pytest.mark.parametrize(("change", "changes"), CHANGES)
@torch.no_grad()
def test_a_run_of_other_weights_is_not_gone_on_with(
    change: Callable[[nn.Module], Any], changes: bool
) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    replay, tail = Replay(model, inputs, FIRST, goes_on=True), Tail(model, inputs, 1, FIRST)
    replay.run(1)
    change(model)
    rows, last, behind = torch.arange(4), torch.tensor([11]), torch.ones(4, 2, dtype=torch.long)
    for kind, run in (
        ("Replay", lambda: replay.run(1)),
        ("Replay", lambda: replay.follow(behind, rows)),
        ("Tail", lambda: tail.run(rows, last)[:, 0]),
    ):
        if changes:
            with pytest.raises(ModelError, match=f"weights of GPT2.*make another {kind}"):
                run()
        else:
            found = run()
            assert found.shape[1] == 2 or close(found, model(**inputs).logits[:, -1])


@torch.no_grad()
def test_a_run_within_an_edit_is_gone_on_with_within_it_alone() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    early = Intervention("L0.post", AT - 1, lambda x, context: x + 1)
    late = Intervention("L2.pre", AT, lambda x, context: x + 1)
    with intervene(model, early):
        replay = Replay(model, inputs, FIRST)
        with intervene(model, late):
            expected = model(**inputs).logits[:, -1]
            assert close(replay.run(2), expected)
    with (
        pytest.raises(ModelError, match="made within an edit whose context has closed"),
        intervene(model, late),
    ):
        replay.run(2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_position", [0, 1, 5, FIRST])
@torch.no_grad()
def test_equals_the_full_forward_pass_at_every_site(name: str, first_position: int) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    replay = Replay(model, inputs, first_position)
    assert replay.first_position == first_position
    clean = model(**inputs).logits[:, -1]
    assert torch.equal(replay.clean_logits, clean)
    for site in sites_of(name):
        edit = edit_of(model, site)
        with edit.at(model, site, positions=AT, target=TARGET) as full_run:
            full = model(**inputs).logits[:, -1]
        assert (full - clean).abs().max() > 0.05
        for first_layer in {0, int(site[1])}:
            with edit.at(model, site, positions=AT, target=TARGET) as run:
                replayed = replay.run(first_layer)
            assert close(replayed, full), (site, first_layer)
            torch.testing.assert_close(run.distance, full_run.distance, rtol=1e-4, atol=1e-4)
            assert bool((run.log_odds_after >= run.floor).all())
            assert torch.equal(run.status, full_run.status)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_runs_do_not_contaminate_one_another(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    replay = Replay(model, inputs, FIRST)
    first_logits = {}
    sites = sites_of(name)
    for site in (*sites, *reversed(sites)):
        with intervene(model, [Intervention(site, AT, lambda x, context: 1.5 * x + 0.3)]):
            logits = replay.run(int(site[1]))
        assert torch.equal(logits, first_logits.setdefault(site, logits))
        assert close(replay.run(), replay.clean_logits)
        assert close(replay.run(LAYERS - 1), replay.clean_logits)
    assert close(model(**inputs).logits[:, -1], replay.clean_logits)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_several_edits_at_several_positions(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    replay = Replay(model, inputs, FIRST)
    several = torch.tensor([[9, 11], [10, 8], [8, 11], [11, 10]])
    target = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]])
    mask = torch.arange(12)[None] > torch.tensor([10, 9, 8, 7])[:, None]

    def apply(stack: ExitStack) -> None:
        for site, positions, wanted in (
            ("L1.mid", several, target),
            ("L0.post", AT, TARGET),
            ("L2.pre", mask, 1),
        ):
            edit = edit_of(model, site)
            stack.enter_context(edit.at(model, site, positions=positions, target=wanted))

    with ExitStack() as stack:
        apply(stack)
        full = model(**inputs).logits[:, -1]
    with ExitStack() as stack:
        apply(stack)
        replayed = replay.run()
    assert close(replayed, full)
    assert not close(replayed, replay.clean_logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_position", [0, FIRST])
@torch.no_grad()
def test_copies_side_by_side_equal_runs_of_their_own(name: str, first_position: int) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    alone, twice = Replay(model, inputs, first_position), Replay(model, inputs, FIRST, copies=2)
    targets = (TARGET, (TARGET + 1) % 3)
    for site in sites_of(name)[1:]:
        edit, layer, separate = edit_of(model, site), int(site[1]), []
        for target in targets:
            with edit.at(model, site, positions=AT, target=target):
                separate.append(alone.run(layer))
        with edit.at(model, site, positions=AT.repeat(2), target=torch.cat(targets)) as run:
            together = twice.run(layer)
        assert close(together, torch.cat(separate))
        assert not close(separate[0], separate[1])
        assert run.distance.shape == (2 * len(AT),)
    assert torch.equal(twice.clean_logits, alone.clean_logits)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_columns_are_those_of_the_full_forward_pass(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    replay, columns = Replay(model, inputs, FIRST), torch.tensor([FIRST, 9, 11])
    edit = edit_of(model, "L1.pre")
    with edit.at(model, "L1.pre", positions=AT, target=TARGET):
        full = model(**inputs).logits
        found = replay.run(1, columns)
    real = inputs["attention_mask"].bool()
    assert close(found[real[:, columns]], full[:, columns][real[:, columns]])
    with pytest.raises(PositionError, match=f"columns must be {FIRST} or more"):
        replay.run(1, columns - 1)


@torch.no_grad()
def test_copies_without_a_cache_that_can_be_cropped() -> None:
    model, inputs = build("mistral", sliding_window=4), PROMPTS.padded("left")
    replay = Replay(model, inputs, FIRST, copies=3)
    assert replay.first_position == 0
    assert close(replay.run(), replay.clean_logits.repeat(3, 1))


def test_a_replay_made_in_inference_mode_runs_outside_it() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    with torch.inference_mode():
        replay = Replay(model, inputs, FIRST)
        inside = replay.run(1)
    assert torch.equal(replay.run(1), inside)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_runs_only_the_suffix_and_the_layers_above(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    replay = Replay(model, inputs, FIRST)
    blocks = model.base_model.h if name == "gpt2" else model.base_model.layers
    seen: list[tuple[int, int]] = []
    for layer, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.append((layer, args[0].shape[1]))
        )
    replay.run()
    assert seen == [(0, 4), (1, 4), (2, 4)]
    seen.clear()
    replay.run(first_layer=2)
    assert seen == [(2, 4)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_unpadded_without_mask_or_position_ids(name: str) -> None:
    model, inputs = build(name), PROMPTS.alone(2)
    at = torch.tensor([10])
    replay = Replay(model, inputs, 9)
    item = Intervention("L1.mid", at, lambda x, context: 2 * x)
    with intervene(model, [item]):
        full = model(**inputs).logits[:, -1]
        assert close(replay.run(), full)
        assert close(replay.run(1), full)


@torch.no_grad()
def test_bfloat16() -> None:
    model, inputs = build("llama", dtype=torch.bfloat16), PROMPTS.padded("left")
    replay = Replay(model, inputs, FIRST)
    edit = edit_of(model, "L1.mid")
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        full = model(**inputs).logits[:, -1]
    with edit.at(model, "L1.mid", positions=AT, target=TARGET) as run:
        replayed = replay.run(1)
    torch.testing.assert_close(replayed, full, rtol=0.1, atol=0.15)
    assert bool((run.log_odds_after >= run.floor).all())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 100}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
@torch.no_grad()
def test_sliding_windows_fall_back_to_the_full_forward_pass(
    name: str, changes: dict[str, object]
) -> None:
    model, inputs = build(name, **changes), PROMPTS.padded("left")
    replay = Replay(model, inputs, FIRST)
    assert replay.first_position == 0
    item = Intervention("L1.mid", AT, lambda x, context: 2 * x)
    with intervene(model, [item]):
        full = model(**inputs).logits[:, -1]
        assert torch.equal(replay.run(), full)
        assert torch.equal(replay.run(first_layer=1), full)
    assert not close(full, replay.clean_logits)


@torch.no_grad()
def test_edits_outside_what_is_rerun_are_missed_aloud() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    replay = Replay(model, inputs, FIRST + 1)
    item = Intervention("L1.mid", AT, lambda x, context: 2 * x)
    with (
        pytest.raises(EditNeverFiredError, match=r"1 of 4 positions.*\[\(1, 8\)\]"),
        intervene(model, [item]),
    ):
        replay.run()
    replay = Replay(model, inputs, FIRST)
    with (
        pytest.raises(EditNeverFiredError, match=r"L1\.mid never ran at 4 of 4"),
        intervene(model, [item]),
    ):
        replay.run(first_layer=2)


@torch.no_grad()
def test_a_failed_run_leaves_the_model_whole() -> None:
    model, inputs = build("llama"), PROMPTS.padded("left")
    replay = Replay(model, inputs, FIRST)
    blocks = list(model.base_model.layers)

    def fail(x: Tensor, context: lrqp.EditContext) -> Tensor:
        raise RuntimeError("out of memory")

    with (
        pytest.raises(RuntimeError, match="out of memory"),
        intervene(model, [Intervention("L2.mid", AT, fail)]),
    ):
        replay.run(first_layer=1)
    assert list(model.base_model.layers) == blocks
    assert hook_count(model) == 0
    assert close(replay.run(), replay.clean_logits)


@pytest.mark.parametrize("first_position", [-1, 12, 100])
def test_first_position_must_be_a_column(first_position: int) -> None:
    model = build("gpt2")
    with pytest.raises(PositionError, match=f"first_position {first_position} .* 12 tokens"):
        Replay(model, PROMPTS.padded("left"), first_position)
    assert hook_count(model) == 0


@pytest.mark.parametrize("first_layer", [-1, LAYERS])
def test_first_layer_must_be_a_layer(first_layer: int) -> None:
    replay = Replay(build("gpt2"), PROMPTS.padded("left"), FIRST)
    with pytest.raises(SiteError, match=f"first_layer {first_layer}: .* 3 blocks"):
        replay.run(first_layer)


def test_there_is_at_least_one_copy() -> None:
    with pytest.raises(PositionError, match="copies must be at least 1, got 0"):
        Replay(build("gpt2"), PROMPTS.padded("left"), FIRST, copies=0)


def test_tokens_are_needed() -> None:
    with pytest.raises(PositionError, match=r"input_ids, got \['attention_mask'\]"):
        Replay(build("gpt2"), {"attention_mask": torch.ones(1, 3)}, 1)


@torch.no_grad()
def test_a_cache_that_holds_more_than_keys_falls_back_to_the_full_forward_pass() -> None:
    """MiniMax: blocks of linear attention have states beside a layer of keys that stays empty."""
    model = build_tiny("MiniMaxForCausalLM")
    ids = torch.arange(4, 24).reshape(2, 10)
    inputs, at = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor([7, 6])
    replay = Replay(model, inputs, 5)
    assert replay.first_position == 0
    with intervene(model, Intervention("L1.pre", at, lambda x, context: x.roll(1, -1))):
        assert close(replay.run(1), model(**inputs).logits[:, -1])
