"""Every family of the table, on a tiny model of its real class."""

import pytest
import torch
import transformers
from families_for_tests import (
    FAMILIES_BUILT,
    WITH_MID,
    WITHOUT_MID,
    build_family,
    record_input,
    record_output,
)
from models_for_tests import LAYERS, Prompts, hook_count, random_edit
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.errors import SiteError, UnknownFamilyError
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site, blocks_of, locate

LENGTHS = [7, 4, 6]
TOKENS = torch.tensor([5, 2, 3])


def batch(side: str = "left") -> tuple[dict[str, Tensor], Tensor]:
    prompts = Prompts.random(LENGTHS)
    return prompts.padded(side), prompts.columns(TOKENS, side)


def forward(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", FAMILIES_BUILT)
def test_capture_is_what_plain_hooks_see(name: str) -> None:
    model, recipe = build_family(name), FAMILIES_BUILT[name]
    inputs, at = batch()
    rows = torch.arange(3)
    for layer, block in enumerate(blocks_of(model)):
        pre, mid, post = [], [], []
        hooks = [record_input(block, pre), record_output(block, post)]
        if recipe.has_mid:
            hooks.append(record_input(block.get_submodule(recipe.second_reader), mid))
        forward(model, inputs)
        for hook in hooks:
            hook.remove()
        seen = {"pre": pre, "mid": mid, "post": post}
        for part, tensors in seen.items():
            if tensors:
                site = f"L{layer}.{part}"
                # OPT's second norm reads all tokens of the batch in one row.
                expected = tensors[0].reshape(3, max(LENGTHS), -1)[rows, at]
                torch.testing.assert_close(
                    lrqp.capture(model, inputs, site, at)[site], expected, rtol=1e-6, atol=1e-6
                )
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", FAMILIES_BUILT)
def test_identity_edits_change_no_bit(name: str) -> None:
    model = build_family(name)
    inputs, at = batch()
    clean = forward(model, inputs)
    for site in lrqp.all_sites(model, ("pre", "mid", "post")):
        same = lrqp.Intervention(site, at, lambda x, context: x)
        with lrqp.intervene(model, same):
            assert torch.equal(forward(model, inputs), clean), site


@pytest.mark.parametrize("name", WITH_MID)
@torch.no_grad()
def test_an_edit_at_mid_reaches_the_skip_path_and_the_mlp(name: str) -> None:
    model, recipe = build_family(name), FAMILIES_BUILT[name]
    inputs, at = batch()
    rows = torch.arange(3)
    block = blocks_of(model)[1]
    read, out = [], []
    hooks = [
        record_input(block.get_submodule(recipe.second_reader), read),
        record_output(block, out),
    ]
    forward(model, inputs)
    mid = read[0].clone().reshape(3, max(LENGTHS), -1)
    wanted = mid[rows, at] + torch.linspace(-2, 2, mid.shape[-1])
    edit = lrqp.Intervention("L1.mid", at, lambda x, context: wanted)
    with lrqp.intervene(model, edit):
        forward(model, inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(read[0].reshape(mid.shape)[rows, at], wanted, rtol=1e-5, atol=1e-5)
    mid[rows, at] = wanted
    expected = recipe.half(block, mid)
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_MID)
def test_families_without_mid_say_what_they_lack(name: str) -> None:
    model = build_family(name)
    with pytest.raises(SiteError, match=r"L1\.mid.*parallel.*use L1\.pre or L1\.post"):
        locate(model, "L1.mid")
    assert all(Site.parse(site).part != "mid" for site in lrqp.all_sites(model))


def test_opt_that_normalises_its_stream_has_mid_behind_the_norm() -> None:
    model = build_family("opt", do_layer_norm_before=False)
    inputs, at = batch()
    rows, mid = torch.arange(3), []
    hook = record_output(blocks_of(model)[1].self_attn_layer_norm, mid)
    forward(model, inputs)
    hook.remove()
    assert torch.equal(lrqp.capture(model, inputs, "L1.mid", at)["L1.mid"], mid[0][rows, at])


@pytest.mark.parametrize("name", FAMILIES_BUILT)
def test_an_lrqp_edit_reaches_its_odds(name: str) -> None:
    model = build_family(name)
    inputs, at = batch()
    site = "L1.mid" if FAMILIES_BUILT[name].has_mid else "L1.post"
    x = lrqp.capture(model, inputs, site)[site].flatten(0, 1)
    edit = random_edit(x, 3)
    with edit.at(model, site, positions=at, target=torch.tensor([0, 1, 2])) as run:
        changed = forward(model, inputs)
    assert (run.log_odds_after >= run.floor).all()
    assert not torch.equal(changed[:, -1], forward(model, inputs)[:, -1])
    after = edit.probe.log_odds(x, 0)
    assert torch.isfinite(after).all()


@pytest.mark.parametrize("name", FAMILIES_BUILT)
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model = build_family(name)
    prompts = Prompts.random(LENGTHS)
    for site in (f"L{LAYERS - 1}.pre", f"L{LAYERS - 1}.post"):
        captured = [
            lrqp.capture(
                model,
                prompts.padded(side),
                site,
                prompts.columns(TOKENS, side),
            )[site]
            for side in ("left", "right")
        ]
        alone = torch.cat(
            [lrqp.capture(model, prompts.alone(i), site, TOKENS[i : i + 1])[site] for i in range(3)]
        )
        torch.testing.assert_close(captured[0], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(captured[1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES_BUILT)
def test_replay_is_the_full_forward(name: str) -> None:
    model = build_family(name)
    inputs, at = batch()
    shift = lrqp.Intervention("L1.post", at, lambda x, context: x + 1.0)
    replay = Replay(model, inputs, int(at.min()))
    with lrqp.intervene(model, shift):
        full = forward(model, inputs)[:, -1]
        replayed = replay.run(1)
    torch.testing.assert_close(replayed, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES_BUILT)
@torch.no_grad()
def test_attention_patterns_are_eagers_or_the_family_says_that_it_has_none(name: str) -> None:
    model = build_family(name)
    inputs, at = batch()
    try:
        with record_patterns(model, [1], at) as patterns:
            logits = model(**inputs).logits
    except UnknownFamilyError as error:  # a newer transformers may show those of more families
        assert "patterns cannot be read" in str(error) and not FAMILIES_BUILT[name].patterns
        return
    eager = model(**inputs, output_attentions=True)
    real = inputs["attention_mask"].bool()
    assert torch.equal(logits[real], eager.logits[real])
    assert torch.equal(patterns[1], eager.attentions[1][torch.arange(3), :, at])


@torch.no_grad()
def test_a_model_that_also_sees_is_edited_in_its_text_part() -> None:
    config = transformers.Gemma3Config(
        text_config=build_family("gemma3_text").config.to_dict(),
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    inputs, at = batch()
    clean = model(**inputs).logits
    captured = lrqp.capture(model, inputs, "L1.mid", at)["L1.mid"]
    edit = random_edit(torch.randn(50, 24) * captured.std(), 2)
    with edit.at(model, "L1.mid", positions=at, target=1) as run:
        changed = model(**inputs).logits
    assert (run.log_odds_after >= run.floor).all()
    assert not torch.equal(changed, clean)
    with record_heads(model, [1], at) as heads:
        model(**inputs)
    assert heads[1].shape == (3, 4, 6)
