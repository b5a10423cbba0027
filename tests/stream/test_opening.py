"""What contexts remember of a model from one opening to the next, and what they leave behind."""

import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from models_for_tests import LAYERS, WIDTH, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM

import lrqp_torch as lrqp
from lrqp_torch.errors import LRQPError, SiteError
from lrqp_torch.stream import intervene as intervening
from lrqp_torch.stream import sites

PROMPTS = Prompts.random([7, 4, 9, 6])
INPUTS = PROMPTS.padded("right")
AT = torch.tensor([1, 2, 3, 0])


def plus_one(x: Tensor, context: lrqp.EditContext) -> Tensor:
    return x + 1


def item(site: str = "L1.mid") -> lrqp.Intervention:
    return lrqp.Intervention(site, AT, plus_one)


@torch.no_grad()
def edited(model: Any, site: str = "L1.mid") -> Tensor:
    with lrqp.intervene(model, item(site)):
        output = model(**INPUTS)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def own(model: nn.Module) -> list[dict[str, Any]]:
    """What modules have of their own, their tables as they are now."""
    return [
        {k: dict(v) if isinstance(v, OrderedDict | dict) else v for k, v in vars(module).items()}
        for module in model.modules()
    ]


# What is remembered of a model


def unlike(block: Any, *given: Any, **named: Any) -> Tensor:
    """The forward of a block whose attention and MLP read the same stream: it has no `mid`."""
    hidden = given[0] if given else named.pop("hidden_states")
    attended = block.attn(block.ln_1(hidden), **named)[0]
    return hidden + attended + block.mlp(block.ln_2(hidden))  # type: ignore[no-any-return]


class Unlike(nn.Module):
    forward = unlike


@pytest.mark.parametrize(
    "change", ["forward", "another forward", "class", "trunk", "modules", "block"]
)
def test_a_model_that_changed_between_two_openings_is_not_what_it_was(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build("gpt2")
    block = model.transformer.h[1]
    if change == "another forward":
        plain = type(block).forward
        block.forward = lambda *given, **named: plain(block, *given, **named)
    before = edited(model)
    assert torch.equal(edited(model), before)
    if change in ("forward", "another forward"):
        if change == "another forward":
            del block.forward  # whose place in memory the next one may take
        block.forward = lambda *given, **named: unlike(block, *given, **named)
    elif change == "class":
        block.__class__ = type("Block", (type(block),), {"forward": unlike})
    else:
        other: Any = Unlike()
        other._modules.update(block._modules)
        if change == "block":
            model.transformer.h[1] = other
        elif change == "modules":
            blocks = model.transformer.h
            blocks._modules = {**blocks._modules, "1": other}
        else:
            trunk = copy.deepcopy(model.transformer)
            trunk.h[1] = other
            model.transformer = trunk
    with pytest.raises(SiteError, match=r"L1\.mid"):
        edited(model)
    edited(model, "L0.mid")


def test_an_edit_goes_where_the_block_of_that_place_is_now() -> None:
    model: Any = build("gpt2")
    first = edited(model)
    blocks = model.transformer.h
    blocks[1], blocks[2] = blocks[2], blocks[1]
    swapped = edited(model)
    fresh: Any = build("gpt2")
    fresh.transformer.h[1], fresh.transformer.h[2] = fresh.transformer.h[2], fresh.transformer.h[1]
    assert torch.equal(swapped, edited(fresh))
    assert not torch.equal(swapped, first)
    with pytest.raises(SiteError, match="blocks"):
        edited(model, f"L{LAYERS}.pre")


def test_a_setting_that_changed_is_seen_and_nothing_else_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = build("llama")
    edited(model)
    seen: list[Any] = []
    built = sites.built
    monkeypatch.setattr(sites, "built", lambda module: seen.append(module) or built(module))
    edited(model), edited(model)
    model.double()
    model.float()
    model.eval()
    edited(model)
    assert not seen
    model.config.rms_norm_eps *= 2
    edited(model)
    assert len(seen) == 1


@torch.no_grad()
def test_what_a_block_multiplies_by_may_change() -> None:
    """Of a model that was seen with another number before."""
    config = GraniteConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=0.5,
    )
    model, seen = GraniteForCausalLM(config).eval(), dict[str, Tensor]()
    before = lrqp.capture(model, INPUTS, "L1.mid")["L1.mid"]
    block = sites.blocks_of(model)[1]
    block.residual_multiplier = 0.25
    reader = block.post_attention_layernorm
    with reader.register_forward_pre_hook(lambda _, given: seen.update(x=given[0].clone())):
        model(**INPUTS)
    found = lrqp.capture(model, INPUTS, "L1.mid")["L1.mid"]
    torch.testing.assert_close(found, seen["x"])
    assert (found - before).abs().max() > 1e-3


def test_a_part_that_is_put_into_training_mode_later_is_warned_of() -> None:
    model: Any = build("llama", attention_dropout=0.1)
    edited(model)
    model.model.layers[0].self_attn.train()
    with pytest.warns(UserWarning, match="drops out"):
        edited(model)


@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_is_edited_for_itself_and_a_model_is_freed(whole: bool) -> None:
    """Also where the model is the stack of blocks itself, which what is known must not hold."""
    model: Any = build("gpt2") if whole else build("gpt2").transformer
    wanted = edited(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    found = edited(other)
    assert not torch.equal(found, wanted)
    assert torch.equal(edited(model), wanted)
    edit = random_edit(torch.randn(40, WIDTH), 2)
    with torch.no_grad(), edit.at(model, "L1.post", positions=AT, target=1):
        model(**INPUTS)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert torch.equal(edited(other), found)


# What a context leaves behind


@pytest.mark.parametrize("site", ["L1.pre", "L1.mid", "L1.post", "final"])
@pytest.mark.parametrize("patched", [False, True])
def test_modules_are_as_they_were_in_whatever_order_contexts_close(
    site: str, patched: bool
) -> None:
    model: Any = build("gpt2")
    block = model.transformer.h[1]
    if patched:
        plain = type(block).forward
        block.forward = lambda *given, **named: plain(block, *given, **named)
    edited(model, site)
    before = own(model)
    first, second = (lrqp.intervene(model, item(site)) for _ in range(2))
    first.__enter__()
    once = own(model)
    second.__enter__()
    with torch.no_grad():
        model(**INPUTS)
    first.__exit__(None, None, None)
    assert hook_count(model) > 0
    second.__exit__(None, None, None)
    assert own(model) == before
    assert once != before


def test_what_is_done_to_a_module_within_a_context_stays() -> None:
    model: Any = build("gpt2")
    block, seen = model.transformer.h[1], list[str]()
    clean = edited(model, "L1.post")
    with torch.no_grad(), lrqp.intervene(model, item("L1.post")):
        model(**INPUTS)
        handle = block.register_forward_hook(lambda *given: seen.append("hook"))
        plain = block.forward

        def forward(*given: Any, **named: Any) -> Any:
            seen.append("forward")
            return plain(*given, **named)

        block.forward = forward
        assert torch.equal(model(**INPUTS).logits, clean)
    assert seen == ["forward", "hook"]
    assert block.forward is forward
    with torch.no_grad():
        model(**INPUTS)
    assert seen == ["forward", "hook"] * 2
    handle.remove()
    del block.forward
    assert hook_count(model) == 0
    assert torch.equal(edited(model, "L1.post"), clean)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_hooked_modules_have_nothing_of_the_context(copied: Any) -> None:
    model: Any = build("gpt2")
    edited(model)
    names = [set(vars(module)) for module in model.modules()]
    with lrqp.intervene(model, [item("L1.mid"), item("L1.post")]):
        other = copied(model)
        with torch.no_grad():
            model(**INPUTS)
    assert hook_count(other) == 0
    assert [set(vars(module)) for module in other.modules()] == names
    assert torch.equal(edited(other), edited(model))


def test_a_context_that_cannot_open_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("gpt2")
    edited(model)
    before, attach = own(model), intervening.attach

    def failing(watch: Any, located: Any, *visit: Any) -> Any:
        made = attach(watch, located, *visit)
        if str(located.site) == "L1.post":
            raise KeyError
        return made

    monkeypatch.setattr(intervening, "attach", failing)
    context = lrqp.intervene(model, [item("L1.mid"), item("L1.post")])
    with pytest.raises(KeyError), context:
        pytest.fail("the body ran")
    assert own(model) == before
    assert not lrqp.stream.watch.opened()
    monkeypatch.undo()
    with torch.no_grad(), context:
        model(**INPUTS)


@torch.no_grad()
def test_a_context_that_is_dropped_open_closes() -> None:
    model: Any = build("gpt2")
    edit, plain = random_edit(torch.randn(40, WIDTH), 2), edited(model)
    before, open_already = own(model), lrqp.stream.watch.opened()
    edit.at(model, "L1.mid", positions=AT, target=1).__enter__()
    gc.collect()
    assert own(model) == before
    assert lrqp.stream.watch.opened() == open_already
    assert torch.equal(edited(model), plain)


@pytest.mark.parametrize("kind", ["edit", "function"])
@torch.no_grad()
def test_what_a_context_was_made_of_is_freed_without_a_collector_of_garbage(kind: str) -> None:
    """What refers to itself is taken apart as it closes; what is kept for the next, with it."""
    model: Any = build("gpt2")
    edit = random_edit(torch.randn(40, WIDTH), 2)
    block = weakref.ref(model.transformer.h[1])

    def once(model: Any) -> list[weakref.ref[Any]]:
        inputs, here = {name: value.clone() for name, value in INPUTS.items()}, item("L1.post")
        if kind == "edit":
            here = edit.on("L1.post", positions=AT, target=1)
        with lrqp.intervene(model, here):
            model(**inputs)
            given = (here, here.edit) if kind == "edit" else (here,)
            return [*map(weakref.ref, (*given, *inputs.values()))]

    once(model)
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            assert not any(found() for found in once(model))
        (plan,) = sites.known_of(model).passes.values()  # type: ignore[union-attr]
        kept, alive = weakref.ref(plan.watch), weakref.ref(model)
        del plan, model
        assert [alive(), block(), kept()] == [None, None, None]
    finally:
        gc.enable()


# The context itself


@torch.no_grad()
def test_a_context_may_be_opened_again_but_not_within_itself() -> None:
    model: Any = build("gpt2")
    wanted, context = edited(model), lrqp.intervene(model, item())
    for _ in range(2):
        with context:
            assert torch.equal(model(**INPUTS).logits, wanted)
            with pytest.raises(LRQPError, match="open already"):
                context.__enter__()
    assert hook_count(model) == 0

    @lrqp.intervene(model, item())
    def decorated() -> Tensor:
        return model(**INPUTS).logits  # type: ignore[no-any-return]

    assert torch.equal(decorated(), wanted)
    assert torch.equal(decorated(), wanted)


@torch.no_grad()
def test_two_threads_open_and_close_contexts_on_one_model() -> None:
    model: Any = build("gpt2")
    edits = {site: edited(model, site) for site in ("L1.mid", "L1.post")}
    clean, before, wrong = model(**INPUTS).logits, own(model), list[str]()

    def work(site: str) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(edited(model, site), edits[site]):
                    wrong.append(site)
                if not torch.equal(model(**INPUTS).logits, clean):
                    wrong.append("clean")

    threads = [threading.Thread(target=work, args=(site,)) for site in edits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert own(model) == before


@pytest.mark.parametrize("positions", [AT, AT[:, None], AT[:, None] + torch.tensor([0, 1]), "all"])
@torch.no_grad()
def test_positions_and_classes_that_are_written_over_later_were_copied(positions: Any) -> None:
    model: Any = build("gpt2")
    edit = random_edit(torch.randn(40, WIDTH), 3)
    shape = (4,) if isinstance(positions, str) else positions.shape
    given = positions if isinstance(positions, str) else positions.clone()
    target, source = torch.ones(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    found = []
    for written in (False, True):
        with edit.at(model, "L1.post", positions=given, target=target, source=source) as run:
            if written:
                target.fill_(2)
                source.fill_(2)
                if isinstance(given, Tensor):
                    given += 2
            logits = model(**INPUTS).logits
        found.append((logits, run.token, run.example, run.status, run.distance))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
