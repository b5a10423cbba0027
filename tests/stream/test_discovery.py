"""The sites of a model are found by running it: of every class here, by what its blocks do.

Nothing here knows a class's modules. A ``mid`` is right if and only if it is a cut: forced to one
value at a token, the block's output there tells nothing of the block's input. And it is read
rightly if what is read under that edit is the value that was forced.
"""

from typing import Any

import pytest
import torch
import transformers
from models_for_tests import hook_count
from torch import Tensor, nn
from zoo_for_tests import LAYERS, OLDEST, TWO_STACKS, WIDTH, build_tiny

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.errors import SiteError, UnknownFamilyError
from lrqp_torch.stream.discovery import discover, hold_to_proof
from lrqp_torch.stream.sites import PARTS, layout_of

HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
PER_LAYER = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "head_dim": 8,
    "global_head_dim": 8,
    "num_key_value_heads": 2,
}
# Rotations by time, height and width.
BY_PLACE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IN_SPACE = {"text": {"rope_parameters": BY_PLACE}}
LATENT = {"num_key_value_heads": 4, "head_dim": 4}

DECODERS = [
    "Afmoe",
    "Apertus",
    "Arcee",
    "AriaText",
    "BigBird",
    "BioGpt",
    "BitNet",
    "Bloom",
    "Cwm",
    "Data2VecText",
    "DiffLlama",
    "Doge",
    "Dots1",
    "Emu3",
    "Ernie4_5",
    "Ernie4_5_Moe",
    "Exaone4",
    "ExaoneMoe",
    "FlexOlmo",
    "Flint",
    "GPTBigCode",
    "GPTNeoXJapanese",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Gemma4Unified",
    "Git",
    "Glm",
    "Glm4",
    "Glm4Moe",
    "GptOss",
    "GraniteMoeSWA",
    "GraniteMoeShared",
    "GraniteSWA",
    "HYV3",
    "Helium",
    "HunYuanDenseV1",
    "HunYuanMoEV1",
    "HyperCLOVAX",
    "Jais2",
    "JetMoe",
    "Kolibri1",
    "Laguna",
    "Lfm2",
    "Lfm3",
    "Llama",
    "Llama4",
    "Mellum",
    "MiMoV2Flash",
    "MiniMax",
    "MiniMaxM2",
    "MiniMaxM3VL",
    "Ministral",
    "Ministral3",
    "Mistral",
    "Mistral4",
    "Mixtral",
    "Mllama",
    "ModernBertDecoder",
    "Moshi",
    "Mpt",
    "Nemotron",
    "OPT",
    "Olmo",
    "Olmo2",
    "Olmo3",
    "OlmoHybrid",
    "Olmoe",
    "Persimmon",
    "Phi3",
    "Phimoe",
    "Qwen2",
    "Qwen2Moe",
    "Qwen3",
    "Qwen3Moe",
    "RecurrentGemma",
    "RemBert",
    "RoCBert",
    "SeedOss",
    "SmolLM3",
    "SolarOpen",
    "StableLm",
    "Starcoder2",
    "TrOCR",
    "VaultGemma",
    "Whisper",
    "XGLM",
    "XLMRobertaXL",
]
TEXT_TOWERS = [
    "Aria",
    "Cosmos3Edge",
    "Cosmos3Omni",
    "DeepseekVL",
    "Exaone4_5_",
    "Gemma3",
    "Gemma4Unified",
    "GotOcr2",
    "GraniteDocling",
    "HyperCLOVAXVisionV2",
    "Idefics3",
    "InternVL",
    "Kosmos2_5",
    "Lfm2Vl",
    "Lfm3Vl",
    "LightOnOcr",
    "Llama4",
    "Llava",
    "LlavaNext",
    "LlavaNextVideo",
    "LlavaOnevision",
    "Mistral3",
    "Mllama",
    "MuseGlimmer",
    "Ovis2",
    "PaliGemma",
    "QianfanOCR",
    "Qwen3VL",
    "Qwen3VLMoe",
    "SmolVLM",
    "Step3p7",
    "VideoLlama3",
    "VideoLlava",
    "VipLlava",
]
ENCODERS = [
    "Bert",
    "Camembert",
    "ConvBert",
    "Deberta",
    "DebertaV2",
    "DistilBert",
    "Electra",
    "Ernie",
    "Esm",
    "EuroBert",
    "FNet",
    "Gte",
    "JinaEmbeddingsV3",
    "LayoutLM",
    "MPNet",
    "MegatronBert",
    "MobileBert",
    "ModernBert",
    "ModernVBert",
    "NomicBert",
    "Nystromformer",
    "RoFormer",
    "Roberta",
    "Tapas",
    "UltraVBert",
    "Ultrabert",
    "XLMRoberta",
    "Yoso",
]
OTHERS = [
    "BertGenerationDecoder",
    "CTRLLMHeadModel",
    "FuyuForCausalLM",
    "GPT2LMHeadModel",
    "HiggsAudioV2ForConditionalGeneration",  # each norm and MLP is given tokens of one kind alone
    "OpenAIGPTLMHeadModel",
    "T5EncoderModel",
    "VisualBertForPreTraining",
]
WITH_MID: dict[str, dict[str, Any]] = {
    **{f"{name}ForCausalLM": {} for name in DECODERS},
    **{f"{name}ForConditionalGeneration": {} for name in TEXT_TOWERS},
    **{f"{name}ForMaskedLM": {} for name in ENCODERS},
    **{name: {} for name in OTHERS},
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "FalconForCausalLM": {"parallel_attn": False, "new_decoder_architecture": False},
    "FalconH1ForCausalLM": {"ssm_out_multiplier": 0.3, "attention_out_multiplier": 0.7},
    "Gemma4ForCausalLM": {**PER_LAYER, "hidden_size_per_layer_input": 0},
    "GraniteForCausalLM": {"residual_multiplier": 0.22},
    "GraniteMoeForCausalLM": {"residual_multiplier": 0.3},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Qwen2VLForConditionalGeneration": IN_SPACE,
    "Qwen2_5_VLForConditionalGeneration": IN_SPACE,
    "Qwen3NextForCausalLM": HYBRID,
    "Qwen3_5ForCausalLM": HYBRID,
    "Qwen3_5MoeForCausalLM": HYBRID,
}
# Attention and MLP in parallel, or one mixer a block and no MLP.
WITHOUT_MID: dict[str, dict[str, Any]] = {
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8},
    "AyaVisionForConditionalGeneration": {},
    "BeamForCausalLM": {},
    "Cohere2MoeForCausalLM": {},
    "Cohere2VisionForConditionalGeneration": {},
    "GPTNeoXForCausalLM": {},
    # Its blocks read the outputs of all blocks before them.
    "Inkling2ForCausalLM": {},
    "InklingForCausalLM": {},
    "CodeGenForCausalLM": {},
    "Cohere2ForCausalLM": {},
    "CohereForCausalLM": {},
    "FalconMambaForCausalLM": {},
    "GPTJForCausalLM": {},
    "MambaForCausalLM": {},
    "PhiForCausalLM": {},
    "RwkvForCausalLM": {},
}
TOKEN = 4


def inputs_of(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(model: nn.Module, site: str, value: Tensor, read: list[str]) -> list[dict[str, Tensor]]:
    """What two different texts hold at some sites, with one value put at a site and token."""
    put = Intervention(site, torch.full((2,), TOKEN), lambda x, context: value.expand_as(x))
    found = []
    for seed in (0, 1):
        with intervene(model, put):
            found.append(lrqp.capture(model, inputs_of(seed), read, torch.full((2,), TOKEN)))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_MID)
def test_mid_is_a_cut_of_every_block_and_is_read_as_it_is_written(name: str) -> None:
    model = build_tiny(name, **WITH_MID[name])
    assert lrqp.all_sites(model) == [
        f"L{n}.{part}" for n in range(LAYERS) for part in ("pre", "mid")
    ]
    value = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    for layer in range(LAYERS):
        mid, post = f"L{layer}.mid", f"L{layer}.post"
        first, second = written(model, mid, value, [mid, post])
        for found in (first, second):
            torch.testing.assert_close(found[mid], value.expand(2, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(first[post], second[post], rtol=1e-4, atol=1e-4)
        # The input alone is no cut: attention brings other tokens in.
        before = written(model, f"L{layer}.pre", value, [post])
        assert not torch.allclose(before[0][post], before[1][post], rtol=1e-6, atol=1e-7)
    assert hook_count(model) == 0
    check_parts(model)


def check_parts(model: nn.Module) -> None:
    """What attention and MLP add is what the stream differs by, and ``final`` what is read out."""
    inputs = inputs_of(0)
    output = model(**inputs, output_hidden_states=True)
    states = output.get("hidden_states", output.get("encoder_hidden_states"))
    found = lrqp.capture(model, inputs, lrqp.all_sites(model, PARTS))
    if states is not None:
        torch.testing.assert_close(found["final"], states[-1], rtol=1e-5, atol=1e-5)
    for layer, places in enumerate(layout_of(model).each):
        pre, mid, post = (found.get(f"L{layer}.{part}") for part in ("pre", "mid", "post"))
        attention, mlp = (found.get(f"L{layer}.{part}") for part in ("attn_out", "mlp_out"))
        if places.cut is None:
            mid = None if attention is None else pre + attention
        # Blocks that normalise after adding have sums that are no site.
        elif attention is not None and places.cut.scale is not None:
            torch.testing.assert_close(mid, pre + attention, rtol=1e-4, atol=1e-5)
        if mlp is not None and (places.cut is None or places.cut.scale is not None):
            torch.testing.assert_close(post, mid + mlp, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", WITHOUT_MID)
def test_blocks_without_a_cut_have_pre_and_post_and_say_so(name: str) -> None:
    model = build_tiny(name, **WITHOUT_MID[name])
    assert lrqp.all_sites(model) == [f"L{n}.pre" for n in range(LAYERS)]
    with pytest.raises(SiteError, match=r"L1\.mid: block 1 .* may run in parallel; use L1\.pre"):
        lrqp.capture(model, inputs_of(0), "L1.mid")
    value = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    (found, _) = written(model, "L1.post", value, ["L1.post", "L2.pre"])
    check_parts(model)
    assert torch.equal(found["L1.post"], value.expand(2, -1))
    assert torch.equal(found["L2.pre"], value.expand(2, -1))


def test_a_model_without_blocks_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(UnknownFamilyError, match=r"Albert.* more than once in a pass, .* share"):
        lrqp.all_sites(build_tiny("AlbertForMaskedLM"))
    # Its blocks carry four streams, (4, B, T, d).
    with pytest.raises(UnknownFamilyError, match="Gemma3nForCausalLM has no list of blocks"):
        lrqp.all_sites(build_tiny("Gemma3nForCausalLM"))


def test_blocks_that_read_the_token_once_more_have_no_mid() -> None:
    model = build_tiny("Gemma4ForCausalLM", **PER_LAYER)  # per-layer embeddings, behind the MLP
    assert lrqp.all_sites(model) == [f"L{n}.pre" for n in range(LAYERS)]
    with pytest.raises(SiteError, match=r"L1\.mid: block 1 .* reads the text once more behind its"):
        lrqp.capture(model, inputs_of(0), "L1.mid")
    row = lrqp.Family("layers", "input_layernorm", "post_attention_layernorm", "self_attn.o_proj")
    with pytest.raises(UnknownFamilyError, match="it is no cut"):
        hold_to_proof(model, row.stack(model))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_outputs_added_side_by_side_the_sum_is_rounded_as_the_model_rounds_it(
    dtype: torch.dtype,
) -> None:
    changes = WITH_MID["FalconH1ForCausalLM"]
    model, seen = build_tiny("FalconH1ForCausalLM", initializer_range=0.2, **changes).to(dtype), {}
    reader = model.model.layers[1].pre_ff_layernorm
    hook = reader.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].clone()))
    at, inputs = torch.tensor([2, 4]), inputs_of(0)
    model(**inputs)
    clean = seen["x"]
    assert torch.equal(lrqp.capture(model, inputs, "L1.mid")["L1.mid"], clean)
    x = clean.flatten(0, 1).float()
    probe = lrqp.LinearProbe(WIDTH, 2, dtype=torch.float64).requires_grad_(False)
    edit = lrqp.LRQP(probe, lrqp.Mahalanobis.fit(x), log_odds=5.0)
    with edit.at(model, "L1.mid", positions=at, target=1) as run:
        model(**inputs)
    hook.remove()
    logits = edit.probe(seen["x"][[0, 1], at].double()).double()
    margin = logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(margin, run.log_odds_after, rtol=1e-9, atol=1e-9)
    assert (run.log_odds_after >= run.floor).all()
    others = torch.arange(clean.shape[1]) != at[:, None]
    assert torch.equal(seen["x"][others], clean[others])


@torch.no_grad()
def test_a_search_that_meets_its_own_reader_again_ends() -> None:
    """Zamba2: one block of attention is shared, and given the embeddings beside the stream."""
    config = transformers.Zamba2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=16,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        chunk_size=8,
        adapter_rank=4,
    )
    model = transformers.Zamba2ForCausalLM(config).eval()
    assert lrqp.all_sites(model) == ["L0.pre", "L1.pre", "L2.pre", "L3.pre"]


def test_what_earlier_blocks_hand_on_beside_the_stream_is_part_of_the_cut_test() -> None:
    model = build_tiny("ZayaForCausalLM", num_experts_per_tok=1)  # the states of its router
    assert lrqp.all_sites(model) == ["L0.pre", "L0.mid", "L1.pre", "L2.pre"]


def test_a_last_norm_that_runs_more_than_once_is_no_place() -> None:
    model = build_tiny("NanoChatForCausalLM")  # on the embeddings as well
    assert "final" not in lrqp.all_sites(model, PARTS)
    with pytest.raises(SiteError, match=r"final: .* runs more than once in a pass.* use L2\.post"):
        lrqp.capture(model, inputs_of(0), "final")


def test_the_number_that_a_model_multiplies_by_is_exact() -> None:
    model = build_tiny("GraniteForCausalLM", residual_multiplier=0.22)
    assert [places.cut.scale for places in layout_of(model).each] == [0.22] * LAYERS
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    edit = lrqp.LRQP.fit(x, (x[:, 0] > 0).long(), log_odds=5.0)
    at = torch.tensor([2, 4])
    with edit.at(model, "L1.mid", positions=at, target=torch.tensor([0, 1])) as run:
        held = lrqp.capture(model, inputs_of(0), "L1.mid", at)["L1.mid"]
    logits = edit.probe(held.double())
    margin = logits.gather(1, torch.tensor([[0], [1]])) - logits.gather(1, torch.tensor([[1], [0]]))
    assert (run.log_odds_after >= run.floor).all()
    torch.testing.assert_close(margin[:, 0].double(), run.log_odds_after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "BertForMaskedLM",
        "BloomForCausalLM",
        "FalconH1ForCausalLM",
        "JetMoeForCausalLM",
        "LlamaForCausalLM",
        "Qwen3NextForCausalLM",
    ],
)
def test_half_precision_finds_the_same_places(name: str, dtype: torch.dtype) -> None:
    model = build_tiny(name, **WITH_MID[name])
    found = layout_of(model).each
    assert [stack.each for stack in discover(model.to(dtype))] == [found]


def test_finding_changes_nothing_and_happens_once() -> None:
    model = build_tiny("LlamaForCausalLM", attention_dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, passes = torch.get_rng_state(), []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    layout = layout_of(model)
    count = len(passes)
    assert layout_of(build_tiny("LlamaForCausalLM", attention_dropout=0.5)) is layout
    hook.remove()
    assert count > 0 and len(passes) == count
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hook_count(model) == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "BartForCausalLM",
        "CTRLLMHeadModel",
        "ConvBertForMaskedLM",
        "MPNetForMaskedLM",
        "XGLMForCausalLM",
    ],
)
def test_padding_that_a_model_reads_is_not_left_out(name: str) -> None:
    model, at = build_tiny(name), torch.tensor([5, 6, 7])
    ids = torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) >= torch.tensor([[3], [5], [1]])).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    whole = lrqp.capture(model, inputs, "L1.pre")["L1.pre"][torch.arange(3), at]
    found = lrqp.capture(model, inputs, "L1.pre", at, batch_size=1)["L1.pre"]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


class Adapter(nn.Module):
    """As adapters of peft stand around a matrix."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.more = base, nn.Linear(WIDTH, WIDTH, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class Adds(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.more(x)


class TurnsFirst(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(self.more(x))


class Weighs(Adapter):
    """It runs what it adds on a matrix too, to know how long each row of the sum is."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.more(torch.eye(WIDTH)[:, None].expand(-1, 5, -1))[:, 0].mT + self.weight
        return (self.base_layer(x) + self.more(x)) / rows.norm(dim=1)


class Packs(nn.Module):
    """A quantised matrix, which has no weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("packed", base.weight.mT.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.packed


@torch.no_grad()
@pytest.mark.parametrize("adapter", [Adds, TurnsFirst, Weighs, Packs])
def test_what_is_put_around_a_matrix_is_where_heads_are_read_and_written(
    adapter: type[Adapter | Packs],
) -> None:
    model = build_tiny("LlamaForCausalLM")
    for block in model.model.layers:
        block.self_attn.o_proj = adapter(block.self_attn.o_proj)
    model.config.adapted = True
    assert {places.projection for places in layout_of(model).each} == {"self_attn.o_proj"}
    assert lrqp.capture(model, inputs_of(0), "L1.H1.z")["L1.H1.z"].shape[-1] == WIDTH // 4
    check_parts(model)


def test_a_projection_that_runs_more_than_once_is_no_place_for_heads() -> None:
    class Twice(nn.Module):
        """Attention beside what it adds of its own, both mapped to the stream by one matrix."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, hidden_states: Tensor, **given: Any) -> Any:
            output, *rest = self.model(hidden_states, **given)
            return output + self.model.o_proj(hidden_states.cumsum(1)), *rest

    model = build_tiny("LlamaForCausalLM")
    for block in model.model.layers:
        block.self_attn = Twice(block.self_attn)
    assert "L1.mid" in lrqp.all_sites(model)
    assert "L1.z" not in lrqp.all_sites(model, PARTS)
    with pytest.raises(UnknownFamilyError, match="its heads cannot be told apart"):
        lrqp.capture(model, inputs_of(0), "L1.z")
    without = build_tiny("FNetForMaskedLM")  # the MLP's last matrix is not taken for one
    assert {places.projection for places in layout_of(without).each} == {None}


@torch.no_grad()
@pytest.mark.parametrize("name", ["BertLMHeadModel", "GPT2LMHeadModel", "WhisperForCausalLM"])
def test_mid_is_refused_where_cross_attention_comes_behind_it(name: str) -> None:
    whisper = name.startswith("Whisper")  # it has cross-attention anyway
    model = build_tiny(
        name, **({} if whisper else {"is_decoder": True, "add_cross_attention": True})
    )
    states = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    crossed = {"encoder_outputs": (states,)} if whisper else {"encoder_hidden_states": states}
    assert lrqp.capture(model, inputs_of(0), "L1.mid")["L1.mid"].shape == states.shape
    edit = Intervention("L1.mid", torch.full((2,), TOKEN), lambda x, context: x + 1)
    with intervene(model, edit):
        model(**inputs_of(0))
        with pytest.raises(SiteError, match=r"L1\.mid was found .* with no encoder_hidden_states"):
            model(**inputs_of(0), **crossed)
        with pytest.raises(SiteError, match="no encoder_hidden_states"):
            torch.compile(model, backend="eager")(**inputs_of(0), **crossed)
    with pytest.raises(SiteError, match="Use pre or post"):
        lrqp.capture(model, {**inputs_of(0), **crossed}, "L1.mid")
    found = lrqp.capture(model, {**inputs_of(0), **crossed}, ["L1.post", "L2.pre"])
    assert torch.equal(found["L1.post"], found["L2.pre"])


def test_every_class_of_the_list_is_one_of_transformers() -> None:
    names = {*WITH_MID, *WITHOUT_MID, *TWO_STACKS}
    assert OLDEST or not [name for name in names if not hasattr(transformers, name)]
    print(f"{len(names)} classes are held to the cut test, {len(WITHOUT_MID)} of them without mid")
