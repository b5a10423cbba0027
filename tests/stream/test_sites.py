"""Site names, and the table of model families."""

import random
import re
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models_for_tests import (
    ALL_MODELS,
    LAYERS,
    SITES,
    WIDTH,
    Prompts,
    build,
    forward_by_hand,
    hook_count,
)
from torch import Tensor, nn
from zoo_for_tests import build_tiny

import lrqp_torch as lrqp
from lrqp_torch.errors import SiteError, UnknownFamilyError
from lrqp_torch.stream import sites
from lrqp_torch.stream.sites import (
    Family,
    Site,
    all_sites,
    has_mid,
    locate,
    register_family,
)

PROMPTS = Prompts.random([7, 4, 9])


def test_names_parse_and_print() -> None:
    for layer in (0, 7, 123):
        for part in ("pre", "mid", "post"):
            site = Site.parse(f"L{layer}.{part}")
            assert (site.layer, site.part, str(site)) == (layer, part, f"L{layer}.{part}")
            assert Site.parse(site) is site


@pytest.mark.parametrize(
    "name", ["", "6.mid", "L6", "L6.out", "L-1.pre", "l6.mid", "L6.mid ", 6, None]
)
def test_bad_names_are_named(name: object) -> None:
    with pytest.raises(SiteError, match=re.escape(repr(name))):
        Site.parse(name)  # type: ignore[arg-type]


def test_sites_sort_in_the_order_of_a_forward_pass() -> None:
    shuffled = list(SITES)
    random.Random(0).shuffle(shuffled)
    assert [str(site) for site in sorted(map(Site.parse, shuffled))] == list(SITES)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_all_sites_are_those_that_a_forward_pass_meets_in_order(name: str) -> None:
    model = build(name)
    _, streams = forward_by_hand(model, Prompts.random([4]).padded("left"))
    met = [site for site in streams if not site.endswith("mlp_input")]
    assert all_sites(model, ("post", "pre", "mid")) == met
    assert all_sites(model) == [site for site in met if not site.endswith("post")]
    assert has_mid(model) == (name != "gpt_neox_parallel")


@pytest.mark.parametrize("name", ALL_MODELS)
def test_layer_out_of_range_names_the_layers(name: str) -> None:
    with pytest.raises(SiteError, match=rf"L{LAYERS}\.pre.*L0 to L{LAYERS - 1}"):
        locate(build(name), f"L{LAYERS}.pre")


def test_parallel_family_has_no_mid_and_says_what_to_use() -> None:
    model = build("gpt_neox_parallel")
    with pytest.raises(SiteError, match=r"L1\.mid.*parallel.*L1\.pre or L1\.post"):
        locate(model, "L1.mid")
    locate(model, "L1.pre"), locate(model, "L1.post")
    locate(build("gpt_neox_serial"), "L1.mid")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sites_of_the_bare_trunk_are_those_of_the_whole_model(name: str) -> None:
    model = build(name)
    inputs = Prompts.random([5, 3]).padded("left")
    at = torch.tensor([4, 4])
    for site in SITES:
        whole = lrqp.capture(model, inputs, [site], at)[site]
        assert torch.equal(lrqp.capture(model.base_model, inputs, [site], at)[site], whole)


GPT2_ROW = Family("h", "ln_1", "attn", "attn.c_proj", absolute_positions=True)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test registers are forgotten after it."""
    monkeypatch.setattr("lrqp_torch.stream.sites.FAMILIES", {})


@pytest.mark.usefixtures("rows")
def test_a_row_stands_in_for_what_is_found() -> None:
    model, inputs = build("gpt2"), Prompts.random([3]).padded("left")
    found = locate(model, "L1.mid")
    register_family("gpt2", replace(GPT2_ROW, attention_output="attn.c_proj"))
    located = locate(model, "L1.mid")
    assert located.module is not found.module
    captured = lrqp.capture(model, inputs, ["L1.mid"])["L1.mid"]
    torch.testing.assert_close(captured, forward_by_hand(model, inputs)[1]["L1.mid"])


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_output": "mlp"}, "no cut: .* still changes .*'attn'"),
        ({"scale": 0.5}, r"plus 0\.5 times the output of 'attn', but it is no cut"),
        ({"scale": None}, "the output of 'attn' itself, but it is no cut"),
        ({"first_reader": "ln_2"}, "'ln_2' reads the block's input, and it reads something else"),
        ({"attention_output": "self_attn"}, "block 0 .* has no module 'self_attn'"),
        ({"blocks": "layers"}, "names blocks that it does not have"),
        ({"output_projection": "mlp.c_fc"}, "'mlp.c_fc' maps the heads' outputs .* it does not"),
        ({"output_projection": "mlp.c_proj"}, "'mlp.c_proj' maps the heads' outputs"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    model = build("gpt2")
    register_family("gpt2", replace(GPT2_ROW, **change))
    with pytest.raises(UnknownFamilyError, match=message):
        lrqp.capture(model, Prompts.random([3]).padded("left"), ["L1.mid"])
    assert hook_count(model) == 0


@pytest.mark.usefixtures("rows")
def test_a_sum_that_is_normalised_before_it_is_read_is_no_site() -> None:
    row = Family("transformer.layer", "attention", "attention", "attention.out_lin")
    register_family("distilbert", row)
    with pytest.raises(UnknownFamilyError, match=r"normalised before .* output of 'sa_layer_norm'"):
        lrqp.all_sites(build_tiny("DistilBertForMaskedLM"))


@pytest.mark.usefixtures("rows")
def test_registering_twice_is_fine_only_with_the_same_row() -> None:
    for _ in range(2):
        register_family("gpt2", GPT2_ROW)
    with pytest.raises(UnknownFamilyError, match="'gpt2' has a row already"):
        register_family("gpt2", replace(GPT2_ROW, blocks="layers"))


def test_a_module_that_is_no_transformers_model_is_named() -> None:
    turn = lrqp.Intervention("L0.pre", 0, lambda x, context: x)
    wrapper = nn.Sequential(build("gpt2"))
    with pytest.raises(UnknownFamilyError, match=r"It wraps a GPT2LMHeadModel: give that, \.0;"):
        lrqp.capture(wrapper, {"input_ids": torch.zeros(1, 1)}, ["L0.pre"])
    pipeline = SimpleNamespace(model=build("gpt2"))  # and what wraps it without being a module
    for given, said in ((pipeline, "got SimpleNamespace. It wraps a GPT2LM"), ("gpt2", "got str")):
        for use in (lrqp.all_sites, lambda model: lrqp.intervene(model, [turn]).__enter__()):
            with pytest.raises(UnknownFamilyError, match=said):
                use(given)
    with pytest.raises(UnknownFamilyError, match="Linear has no config"):
        lrqp.capture(nn.Linear(WIDTH, 2), {"input_ids": torch.zeros(1, 1)}, ["L0.pre"])


# Models that are not what their class says


class Parallel(nn.Module):
    """A block whose attention and MLP read the same stream: it has no `mid`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name in ("ln_1", "attn", "ln_2", "mlp"):
            setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        own: Any = self
        attended = own.attn(own.ln_1(hidden_states), **given)[0]
        return hidden_states + attended + own.mlp(own.ln_2(hidden_states))  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", ["a block", "a forward", "the class's forward"])
@pytest.mark.parametrize("known", [False, True])
def test_a_block_that_was_put_in_is_proven_by_itself(
    change: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a class that was seen before, and of a model that was itself."""
    first = build("gpt2")
    lrqp.capture(first, PROMPTS.padded("right"), "L1.mid")
    model: Any = first if known else build("gpt2")
    blocks = model.transformer.h
    block = blocks[1]
    if change == "a block":
        blocks[1] = Parallel(block)
    else:

        def forward(*given: Any, **named: Any) -> Tensor:
            return Parallel.forward(block, *given[change != "a forward" :], **named)

        monkeypatch.setattr(block if change == "a forward" else type(block), "forward", forward)
    with pytest.raises(SiteError, match=r"L1\.mid"):
        lrqp.capture(model, PROMPTS.padded("right"), "L1.mid")
    lrqp.capture(model, PROMPTS.padded("right"), "L1.post")


def test_blocks_that_were_taken_out_are_no_sites() -> None:
    model: Any = build("gpt2")
    lrqp.capture(model, PROMPTS.padded("right"), "L2.mid")
    model.transformer.h = model.transformer.h[:2]
    with pytest.raises(SiteError, match="2 blocks"):
        lrqp.capture(model, PROMPTS.padded("right"), "L2.mid")


def test_a_model_is_found_while_other_threads_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_LAYOUTS", {})
    model, given = build("llama"), PROMPTS.padded("right")
    with torch.no_grad():
        clean = model(**given).logits
    seen: list[bool] = []
    found: list[Any] = []
    begin = threading.Barrier(4)

    def run() -> None:
        begin.wait()
        with torch.no_grad():
            while len(found) < 2:
                seen.append(torch.equal(model(**given).logits, clean))

    def use() -> None:
        begin.wait()
        try:
            found.append(lrqp.capture(model, given, "L1.mid"))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=work) for work in (run, run, use, use)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen and all(seen)
    assert torch.equal(found[0]["L1.mid"], found[1]["L1.mid"])
