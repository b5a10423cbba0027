"""More places than the stream between blocks: two stacks, what parts add, heads, any module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import HEADS, LAYERS, WIDTH, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from zoo_for_tests import TWO_STACKS, build_tiny
from zoo_for_tests import WIDTH as ZOO_WIDTH

import lrqp_torch as lrqp
from lrqp_torch import Intervention, Site, intervene
from lrqp_torch.errors import (
    ActivationStoreError,
    EditNeverFiredError,
    PositionError,
    ProvenanceError,
    SiteError,
    TokenizerError,
    UnknownFamilyError,
    WidthError,
)
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.replay import Replay

FEW = (
    "BartForConditionalGeneration",
    "MBartForConditionalGeneration",
    "T5ForConditionalGeneration",
)
STACKS = ("encoder", "decoder")
TOKEN = 2


def two_texts(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, own = (torch.randint(5, 60, (2, n), generator=generator) for n in (6, 4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": own}


def tiny(name: str) -> Any:
    model = build_tiny(name)
    model.generation_config.update(decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", TWO_STACKS)
def test_mid_is_a_cut_of_both_stacks_and_behind_cross_attention(name: str, stack: str) -> None:
    model, at = tiny(name), torch.full((2,), TOKEN)
    value = torch.randn(ZOO_WIDTH, generator=torch.Generator().manual_seed(3))
    for layer in range(LAYERS):
        mid, post = f"{stack}.L{layer}.mid", f"{stack}.L{layer}.post"
        found = []
        # Other texts in both stacks: what follows mid reads neither of them.
        for seed in (0, 1):
            put = Intervention(mid, at, lambda x, context: value.expand_as(x))
            with intervene(model, put):
                found.append(lrqp.capture(model, two_texts(seed), [mid, post], at))
        torch.testing.assert_close(found[0][mid], value.expand(2, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0][post], found[1][post], rtol=1e-4, atol=1e-4)
    assert hook_count(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_sites_of_a_stack_are_what_transformers_says_of_it(name: str) -> None:
    model, inputs = tiny(name), two_texts()
    output = model(**inputs, output_hidden_states=True)
    assert lrqp.all_sites(model) == [
        f"{stack}.L{n}.{part}" for stack in STACKS for n in range(LAYERS) for part in ("pre", "mid")
    ]
    for stack in STACKS:
        states = output[f"{stack}_hidden_states"]
        names = [f"{stack}.L{n}.pre" for n in range(LAYERS)] + [f"{stack}.final"]
        found = lrqp.capture(model, inputs, names)
        for site, state in zip(names, states, strict=True):
            torch.testing.assert_close(found[site], state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_positions_count_the_tokens_of_the_sites_own_stack(name: str) -> None:
    model, inputs = tiny(name), two_texts()
    sites = ["encoder.L1.mid", "decoder.L1.mid"]
    whole, last = lrqp.capture(model, inputs, sites), lrqp.capture(model, inputs, sites, "last")
    for site in sites:
        torch.testing.assert_close(last[site], whole[site][:, -1], rtol=1e-4, atol=1e-4)
    edit = random_edit(torch.randn(50, ZOO_WIDTH), 2)
    both = [edit.on(sites[0], positions=[5, 3], target=1), edit.on(sites[1], positions=3, target=0)]
    with intervene(model, both) as runs:
        changed = model(**inputs).logits
        held = lrqp.capture(model, inputs, sites, [3, 3])
    assert not torch.equal(changed, model(**inputs).logits)
    margin = edit.probe(held["decoder.L1.mid"].double()).diff(dim=1)[:, 0]
    torch.testing.assert_close(-margin, runs[1].log_odds_after[:2].double(), rtol=1e-5, atol=1e-5)
    with (
        pytest.raises(PositionError, match="position 5 of example 0 is out of range"),
        edit.at(model, sites[1], positions=[5, 3], target=1),
    ):
        model(**inputs)
    states = {"encoder_outputs": model.get_encoder()(inputs["input_ids"])}
    again = lrqp.capture(
        model, {**states, "decoder_input_ids": inputs["decoder_input_ids"]}, sites[1], batch_size=1
    )
    torch.testing.assert_close(again[sites[1]], whole[sites[1]], rtol=1e-4, atol=1e-4)
    labels = lrqp.capture(model, {**inputs, "labels": inputs["input_ids"]}, sites[1])[sites[1]]
    torch.testing.assert_close(labels, whole[sites[1]], rtol=1e-4, atol=1e-4)
    assert hook_count(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_the_encoder_is_edited_once_in_generation_and_the_decoder_token_by_token(name: str) -> None:
    model, inputs = tiny(name), two_texts()
    inputs.pop("decoder_input_ids")
    edit, options = random_edit(torch.randn(50, ZOO_WIDTH), 3), {"max_new_tokens": 5}
    with edit.at(model, "encoder.L0.mid", positions="all", target=1) as read:
        model.generate(**inputs, **options, num_beams=2)
    assert len(read.steps) == 1 and read.token.tolist() == [*range(6), *range(6)]
    texts = []
    for use_cache in (True, False):
        with edit.at(model, "decoder.L1.mid", positions="generated", target=2) as written:
            texts.append(model.generate(**inputs, **options, use_cache=use_cache))
        assert sorted(set(written.token.tolist())) == [1, 2, 3, 4]
        assert (written.log_odds_after >= written.floor).all()
    assert torch.equal(*texts)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_in_front_of_a_stack_are_not_counted(kind: str) -> None:
    peft = pytest.importorskip("peft")
    plain, inputs, seen = tiny("T5ForConditionalGeneration"), two_texts(), []
    options = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}
    model = peft.get_peft_model(plain, getattr(peft, kind)(**options)).eval()
    block = plain.encoder.block[1]
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model(**inputs)
    hook.remove()
    found = lrqp.capture(model, inputs, ["encoder.L1.pre", "decoder.L1.pre"])
    torch.testing.assert_close(found["encoder.L1.pre"], seen[0][:, -6:], rtol=1e-5, atol=1e-5)
    assert found["decoder.L1.pre"].shape == (2, 4, ZOO_WIDTH)


def test_a_stack_that_is_not_said_or_not_there_is_named() -> None:
    model, inputs = tiny("BartForConditionalGeneration"), two_texts()
    with pytest.raises(SiteError, match=r"L1\.mid: .* write 'encoder\.L1\.mid' or 'decoder\.L1\.m"):
        lrqp.capture(model, inputs, "L1.mid")
    with pytest.raises(
        SiteError, match=r"encoder\.L1\.mid: .* one stack of blocks, write 'L1\.mid"
    ):
        lrqp.capture(build("gpt2"), Prompts.random([3]).padded("left"), "encoder.L1.mid")
    with pytest.raises(UnknownFamilyError, match="replay and attention patterns, is for models of"):
        Replay(model, inputs, 1)
    with pytest.raises(SiteError, match="one stack of one language model"):
        lrqp.capture_batches(model, inputs, ["encoder.L0.pre", "decoder.L0.pre"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox_serial", "gpt_neox_parallel"])
def test_parts_add_up_to_the_stream(name: str) -> None:
    model, inputs = build(name), Prompts.random([6, 4]).padded("left")
    parts = lrqp.all_sites(model, ("pre", "attn_out", "mid", "mlp_out", "post", "final"))
    found, states = lrqp.capture(model, inputs, parts), model(**inputs, output_hidden_states=True)
    assert torch.equal(found["final"], states.hidden_states[-1])
    for n in range(LAYERS):
        pre, added = found[f"L{n}.pre"], found[f"L{n}.attn_out"]
        mid = found.get(f"L{n}.mid", pre + added)
        torch.testing.assert_close(mid, pre + added)
        torch.testing.assert_close(found[f"L{n}.post"], mid + found[f"L{n}.mlp_out"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox_serial"])
def test_an_edit_of_one_head_or_part_is_held_and_changes_nothing_else(name: str) -> None:
    model, inputs, at = build(name), Prompts.random([6, 4]).padded("left"), torch.tensor([5, 4])
    with record_heads(model, [1], at) as heads:
        clean = model(**inputs).logits
    every = lrqp.capture(model, inputs, ["L1.z", "L1.H2.z"], at)
    assert torch.equal(every["L1.z"].view(2, HEADS, -1), heads[1])
    assert torch.equal(every["L1.H2.z"], heads[1][:, 2])
    for site, width in {"L1.H2.z": WIDTH // HEADS, "L1.mlp_out": WIDTH, "final": WIDTH}.items():
        edit = random_edit(torch.randn(50, width), 3)
        with edit.at(model, site, positions=at, target=torch.tensor([2, 1])) as run:
            logits = model(**inputs).logits
            held = lrqp.capture(model, inputs, [site, "L1.z"], at)
        assert not torch.equal(logits, clean)
        scores = edit.probe(held[site].double())
        margin = scores.gather(1, torch.tensor([[2], [1]])) - scores
        margin[[0, 1], [2, 1]] = torch.inf
        assert (margin.min(1).values >= run.floor[:2] - 1e-4).all()
        others = held["L1.z"].view(2, HEADS, -1)[:, [0, 1, 3]]
        assert torch.equal(others, heads[1][:, [0, 1, 3]])


def test_the_number_that_a_model_multiplies_by_is_part_of_what_a_part_adds() -> None:
    model = build_tiny("GraniteForCausalLM", residual_multiplier=0.22)
    inputs = {"input_ids": torch.arange(5, 11)[None]}
    found = lrqp.capture(model, inputs, ["L1.pre", "L1.attn_out", "L1.mid"], "last")
    torch.testing.assert_close(found["L1.mid"], found["L1.pre"] + found["L1.attn_out"])
    value = torch.randn(ZOO_WIDTH)
    with intervene(model, Intervention("L1.attn_out", "last", lambda x, context: value[None])):
        held = lrqp.capture(model, inputs, ["L1.pre", "L1.mid"], "last")
    torch.testing.assert_close(held["L1.mid"], held["L1.pre"] + value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_was_read_stays_when_the_model_writes_over_it() -> None:
    model = build_tiny("FalconForCausalLM")  # adds attention to the MLP's output in place
    inputs = {"input_ids": torch.arange(5, 11)[None]}
    alone = lrqp.capture(model, inputs, "L0.mlp_out")["L0.mlp_out"]
    among = lrqp.capture(model, inputs, ["L0.pre", "L0.attn_out", "L0.mlp_out", "L0.post"])
    assert torch.equal(among["L0.mlp_out"], alone)
    total = among["L0.pre"] + among["L0.attn_out"] + alone
    torch.testing.assert_close(among["L0.post"], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "blocks.2.hook_resid_pre": "L2.pre",
        "blocks.2.hook_resid_mid": "L2.mid",
        "blocks.2.hook_resid_post": "L2.post",
        "blocks.0.hook_attn_out": "L0.attn_out",
        "blocks.0.hook_mlp_out": "L0.mlp_out",
        "blocks.1.attn.hook_z": "L1.z",
        "encoder.1.hook_resid_mid": "encoder.L1.mid",
        "decoder.1.hook_resid_mid_cross": "decoder.L1.mid",
    }.items(),
)
def test_names_of_transformer_lens_are_translated(theirs: str, ours: str) -> None:
    assert str(Site.parse(theirs)) == ours


def test_what_was_read_is_found_under_any_name_of_its_site(tmp_path: Path) -> None:
    model, inputs = build("gpt2"), Prompts.random([4]).padded("left")
    with pytest.raises(ActivationStoreError, match="have one width"):
        lrqp.capture_to(tmp_path / "acts", model, inputs, ["L1.mid", "L1.H1.z"], "last")
    found = lrqp.capture(model, inputs, ["blocks.1.hook_resid_mid", Site.module("transformer.h.1")])
    assert list(found) == ["L1.mid", "transformer.h.1:output"]
    assert found["blocks.1.hook_resid_mid"] is found["L1.mid"] is found[Site.parse("L1.mid")]
    with pytest.raises(KeyError):
        found["L2.mid"]
    with pytest.raises(SiteError, match="between self-attention and cross-attention"):
        Site.parse("decoder.1.hook_resid_mid")


class Net(nn.Module):
    """No language model: four layers, of which one activation runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act = nn.Linear(5, 8), nn.Linear(8, 8), nn.Tanh()
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.second(self.act(self.first(x)))))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(7, 5), (7, 4, 5)])
def test_any_module_can_be_read_and_edited(shape: tuple[int, ...]) -> None:
    net, x = Net(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    reads: list[Tensor] = []
    net.second.register_forward_hook(lambda module, args, output: reads.append(output.clone()))
    site, reader = Site.module("second", "output"), Site.module("out", "input")
    clean = net(x)
    found = lrqp.capture(net, x, [site, reader], batch_size=3)
    torch.testing.assert_close(found[site], torch.cat(reads)[: len(x)])
    torch.testing.assert_close(net.out(found[reader]), clean)
    edit = random_edit(torch.randn(50, 8), 3)
    target = torch.arange(7) % 3
    for where, told in ((reader, target), (site, target)):
        with edit.at(net, where, positions=0, target=told) as run:
            seen = lrqp.capture(net, x, where, 0)[where]
        scores = edit.probe(seen.double())
        margin = scores.gather(1, target[:, None]) - scores
        margin[torch.arange(7), target] = torch.inf
        assert (margin.min(1).values >= run.floor - 1e-5).all()
        torch.testing.assert_close(margin.min(1).values, run.log_odds_after.double())
    with edit.at(net, reader, positions="all", target=1):
        together = net(x)
        apart = torch.func.vmap(lambda one: net(one[None])[0])(x)
    torch.testing.assert_close(apart, together)
    with pytest.raises(ProvenanceError, match="Net has no config"):
        lrqp.Provenance.of(net, str(site))
    same = Intervention(site, "all", lambda x, context: x)
    with intervene(net, same):
        assert torch.equal(net(x), clean)
    for bad, error, message in (
        (Site.module("act"), PositionError, "runs more than once"),
        (Site.module("third"), SiteError, "has no module 'third'"),
    ):
        with pytest.raises(error, match=message), intervene(net, Intervention(bad, 0, same.edit)):
            net(x)
    with pytest.raises(EditNeverFiredError), intervene(net, Intervention(site, 6, same.edit)):
        pass
    with pytest.raises(SiteError, match="capture takes others too"):
        lrqp.capture_batches(net, {"x": x}, site)


@torch.no_grad()
def test_a_module_of_a_language_model_is_given_the_tokens_of_its_stack() -> None:
    model, inputs = build("llama"), Prompts.random([6, 4]).padded("left")
    at = torch.tensor([5, 4])
    norm = Site.module("model.layers.1.post_attention_layernorm", "input")
    found = lrqp.capture(model, inputs, [norm, "L1.mid"], at)
    assert torch.equal(found[norm], found["L1.mid"])
    # In generation each token is edited once, as at any other site.
    edit = random_edit(torch.randn(50, WIDTH), 2)
    with edit.at(model, Site.module("model.layers.1.mlp"), positions="generated", target=1) as run:
        model.generate(**Prompts.random([4]).padded("left"), max_new_tokens=4, pad_token_id=0)
    assert run.token.tolist() == [4, 5, 6]
    head = lrqp.capture(model, inputs, [Site.module("lm_head", "input"), "final"])
    assert torch.equal(*head.values())


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    return lrqp.models.load("organism")


TEXTS = ["When Mary and John went out , John gave", "Then John and Mary met , Mary gave"]


@torch.no_grad()
def test_texts_are_read_by_the_models_own_tokenizer_and_words_found_in_them(organism: Any) -> None:
    model, tokenizer = organism
    inputs = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))
    inputs["position_ids"] = lrqp.position_ids(inputs["attention_mask"])
    names, last = lrqp.Span(["John", "Mary"]), []
    for row, name in enumerate(["John", "Mary"]):
        words = [tokenizer.decode([token]).strip() for token in inputs["input_ids"][row].tolist()]
        last.append(max(column for column, word in enumerate(words) if word == name))
    expected = lrqp.capture(model, inputs, "L2.mid", last)["L2.mid"]
    found = lrqp.capture(model, TEXTS, "L2.mid", names, tokenizer=tokenizer)["L2.mid"]
    assert torch.equal(found, expected)
    # The same of tokens alone, by what the tokenizer makes of them.
    named = lrqp.Span(["John", "Mary"], tokenizer=tokenizer)
    assert torch.equal(lrqp.capture(model, inputs, "L2.mid", named)["L2.mid"], expected)
    assert named(inputs).tolist() == last
    edit = random_edit(torch.randn(300, model.config.n_embd), 2)
    with edit.at(
        model, "L2.mid", positions=names, target=1, texts=TEXTS, tokenizer=tokenizer
    ) as run:
        model(**run.inputs)
    assert run.positions.token.tolist() == last
    with edit.at(model, "L2.mid", positions=named, target=1) as again:
        model(**inputs)
    torch.testing.assert_close(again.log_odds_after, run.log_odds_after)


def test_a_word_may_be_a_span_of_tokens_or_of_characters(organism: Any) -> None:
    _, tokenizer = organism
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    words = {"which": 0, "tokens": "all", "tokenizer": tokenizer}
    begin = TEXTS[0].index("Mary and")
    several = lrqp.Span("Mary and John", **words)(inputs)
    assert several.sum() == 3
    assert torch.equal(lrqp.Span((begin, begin + 13), **words)(inputs), several)
    assert lrqp.Span("John", which=0, tokenizer=tokenizer)(inputs) == several[0].nonzero()[-1]


def test_texts_without_a_tokenizer_and_words_that_are_missing_are_named(organism: Any) -> None:
    model, tokenizer = organism
    with pytest.raises(TokenizerError, match="pass tokenizer="):
        lrqp.capture(model, TEXTS, "L2.mid")
    with pytest.raises(PositionError, match=r"text 0, .* does not contain 'Tom'"):
        lrqp.capture(model, TEXTS, "L2.mid", lrqp.Span("Tom"), tokenizer=tokenizer)
    with pytest.raises(PositionError, match=r"contains 'John' only \d times, not at which=7"):
        lrqp.capture(model, TEXTS, "L2.mid", lrqp.Span("John", which=7), tokenizer=tokenizer)
    with pytest.raises(PositionError, match="3 words for 2 texts"):
        lrqp.capture(model, TEXTS, "L2.mid", lrqp.Span(["a", "b", "c"]), tokenizer=tokenizer)
    with pytest.raises(PositionError, match="say which tokenizer"):
        lrqp.capture(model, tokenizer(TEXTS[0], return_tensors="pt"), "L2.mid", lrqp.Span("John"))
    with pytest.raises(WidthError, match="or texts, got"):
        lrqp.capture(model, [1, 2], "L2.mid")  # type: ignore[list-item]
