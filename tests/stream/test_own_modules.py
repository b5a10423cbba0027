"""Models of one's own, and models that need more than tokens: found and proven like any other."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import transformers
from models_for_tests import hook_count, random_edit
from torch import Tensor, nn

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.errors import CompiledModelError, ModelError, SiteError, UnknownFamilyError
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import PARTS, layout_of

WIDTH, HEADS, LAYERS, TOKENS, AT = 16, 2, 3, 8, torch.tensor([3, 5])
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (HEADS, -1)).mT.mT.transpose(1, 2) for t in self.qkv(x).chunk(3, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast(Tensor, self.out(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.norm, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Any:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm2(x))


class Named(Block):
    def forward(self, *, x: Tensor) -> Any:
        return super().forward(x)


class Pair(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Table(Block):
    def forward(self, x: Tensor) -> Any:
        return {"stream": super().forward(x)}


class InPlace(Block):
    def forward(self, x: Tensor) -> Any:
        x += self.attn(self.norm(x))
        x += self.mlp(self.norm2(x))
        return x


class NormsAreFunctions(Block):
    def forward(self, x: Tensor) -> Any:
        x = x + self.attn(F.rms_norm(x, (WIDTH,)))
        return x + self.mlp(F.rms_norm(x, (WIDTH,)))


class Halves(Block):
    """No place holds the sum that all that follows is computed from, but half of it."""

    def forward(self, x: Tensor) -> Any:
        x = (x + self.attn(F.rms_norm(x, (WIDTH,)))) / 2
        return x + self.mlp(F.rms_norm(x, (WIDTH,)))


class Set(Block):
    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.scale = 0.25 * (layer + 1)

    def forward(self, x: Tensor) -> Any:
        x = x + self.scale * self.attn(self.norm(x))
        return x + self.mlp(self.norm2(x))


class Told(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        x = x + scale * self.attn(self.norm(x))
        return x + self.mlp(self.norm2(x))


class Learned(Set):
    """As most do, it begins with 1."""

    def __init__(self, layer: int) -> None:
        Block.__init__(self, layer)
        self.scale = nn.Parameter(torch.ones(()))  # type: ignore[assignment]


class Model(nn.Module):
    """Without a configuration, a mask, or a name for its embeddings."""

    def __init__(self, kind: type[Block], sequence: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(40, WIDTH), nn.Embedding(TOKENS, WIDTH)
        blocks = [kind(layer) for layer in range(LAYERS)]
        self.blocks = nn.Sequential(*blocks) if sequence else nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40)
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        for layer, block in enumerate(self.blocks):
            named = {"scale": 0.25 * (layer + 1)} if isinstance(block, Told) else {}
            x = block(x=x) if isinstance(block, Named) else block(x, **named)
            x = x["stream"] if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x
        return cast(Tensor, self.head(self.norm(x)))


def ids(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(TOKENS, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def written(model: nn.Module, site: str, value: Tensor, inputs: list[Any]) -> list[Any]:
    """What is read there and behind the block, of several inputs, with one value put at a site."""
    put = Intervention(site, AT, lambda x, context: value.expand_as(x))
    found = []
    for given in inputs:
        with intervene(model, put):
            found.append(lrqp.capture(model, given, [site, site.replace("mid", "post")], AT))
    return found


def hold(model: nn.Module, layer: str, inputs: list[Any], run: Any = None) -> None:
    """``mid`` and ``pre`` are where edits are certified, and ``mid`` is a cut."""
    mid, value = f"{layer}.mid", torch.linspace(-2, 2, WIDTH)
    first, second = written(model, mid, value, inputs)
    for found in (first, second):
        torch.testing.assert_close(found[mid], value.expand(2, -1), rtol=1e-5, atol=1e-5)
    post = f"{layer}.post"
    torch.testing.assert_close(first[post], second[post], rtol=1e-4, atol=1e-4)
    output = model(**inputs[0])
    for site in (mid, f"{layer}.pre"):
        x = lrqp.capture(model, inputs[0], site)[site].flatten(0, 1)
        edit = random_edit(x, 3)
        with edit.at(model, site, positions=AT, target=torch.tensor([0, 2])) as run:
            changed = model(**inputs[0])
            held = lrqp.capture(model, inputs[0], site, AT)[site]
        scores = edit.probe(held.double())
        own = scores.gather(1, torch.tensor([[0], [2]]))
        margin = (
            own - scores.scatter(1, torch.tensor([[0], [2]]), -torch.inf).max(1).values[:, None]
        )
        torch.testing.assert_close(margin[:, 0].double(), run.log_odds_after[:2].double())
        assert (run.log_odds_after >= run.floor).all()
        with intervene(model, Intervention(site, AT, lambda x, context: x)):
            same = model(**inputs[0])
        for one, two, three in zip(*map(tensors, (output, same, changed)), strict=True):
            assert torch.equal(one, two) and not torch.equal(one, three)
    assert hook_count(model) == 0


def tensors(output: Any) -> list[Tensor]:
    """The logits or else the first tensor that a model returned."""
    if isinstance(output, Tensor):
        return [output]
    return [output["logits"] if "logits" in output else output[0]]


@torch.no_grad()
@pytest.mark.parametrize("kind", [Block, Named, Pair, Table, InPlace, NormsAreFunctions, Set, Told])
def test_blocks_of_many_styles_have_all_their_sites(kind: type[Block]) -> None:
    model = Model(kind)
    assert len(lrqp.all_sites(model, PARTS)) == 6 * LAYERS + 1
    hold(model, "L1", [{"input_ids": ids(0)}, {"input_ids": ids(1)}])
    assert lrqp.capture(model, {"input_ids": ids()}, "L1.H1.z")["L1.H1.z"].shape[-1] == WIDTH // 2
    if kind in (Set, Told):
        assert [places.cut.scale for places in layout_of(model).each] == [0.25, 0.5, 0.75]


@torch.no_grad()
def test_mid_that_no_module_reads_is_what_the_mlp_normalises() -> None:
    model, seen = Model(NormsAreFunctions), list[Tensor]()
    value = torch.linspace(-2, 2, WIDTH)
    hook = model.blocks[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with intervene(model, Intervention("L1.mid", AT, lambda x, context: value.expand_as(x))):
        model(ids())
    hook.remove()
    expected = F.rms_norm(value, (WIDTH,)).expand(2, -1)
    torch.testing.assert_close(seen[-1][[0, 1], AT], expected, rtol=1e-5, atol=1e-5)
    assert not [name for name in lrqp.all_sites(Model(Halves)) if name.endswith("mid")]


def test_what_is_of_transformers_alone_says_so() -> None:
    model, inputs = Model(Block), {"input_ids": ids()}
    with pytest.raises(ModelError, match="Model takes no use_cache"):
        Replay(model, inputs, 3)
    with (
        pytest.raises(UnknownFamilyError, match="its patterns cannot be read"),
        record_patterns(model, [1], AT),
    ):
        model(**inputs)

    class Others(Pictures):
        """Known of no other test."""

    seen = torch.compile(Others().eval(), backend="eager")
    lrqp.all_sites(seen, inputs=given(Pictures, 0))
    seen(**given(Pictures, 0))
    assert "L1.mid" in lrqp.all_sites(torch.compile(seen._orig_mod, backend="eager"))


@torch.no_grad()
def test_blocks_in_a_sequence_are_blocks() -> None:
    model = Model(Block, sequence=True)
    assert len(lrqp.all_sites(model)) == 2 * LAYERS
    hold(model, "L1", [{"input_ids": ids(0)}, {"input_ids": ids(1)}])


def test_a_number_that_a_block_learns_is_no_part_of_a_site() -> None:
    """Another model of the class, or this one some steps later, would be read by the wrong one."""
    model = Model(Learned)
    assert lrqp.all_sites(model, PARTS) == [
        *(f"L{n}.{part}" for n in range(LAYERS) for part in ("pre", "mlp_out", "post")),
        "final",
    ]
    with pytest.raises(SiteError, match=r"L1\.mid: block 1 .* by a number that it learns.* use L1"):
        lrqp.capture(model, {"input_ids": ids()}, "L1.mid")
    assert all(block.scale.item() == 1 for block in model.blocks)


class Pictures(transformers.ViTModel):  # type: ignore[misc]
    """Without tokens: positions are columns of its own stream."""

    def __init__(self) -> None:
        super().__init__(transformers.ViTConfig(**SIZES, image_size=8, patch_size=2))


def pictures(seed: int, *shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def sounds() -> nn.Module:
    sizes = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", 32))
    }
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **sizes,
            vocab_size=40,
            d_model=WIDTH,
            num_mel_bins=4,
            max_source_positions=6,
            pad_token_id=0,
        )
    )


def captions() -> nn.Module:
    return transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(
            text_config={**SIZES, "vocab_size": 40, "encoder_hidden_size": WIDTH},
            vision_config={**SIZES, "image_size": 8, "patch_size": 2},
        )
    )


def given(kind: Any, seed: int) -> dict[str, Tensor]:
    if kind is sounds:
        return {"input_features": pictures(seed, 4, 12), "decoder_input_ids": ids(seed)}
    images = {"pixel_values": pictures(seed, 3, 8, 8)}
    return images | ({"input_ids": ids(seed)} if kind is captions else {})


@torch.no_grad()
@pytest.mark.parametrize("kind", [Pictures, sounds, captions])
def test_a_model_that_needs_more_than_tokens_is_found_by_inputs_of_ones_own(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    with pytest.raises(UnknownFamilyError, match=r"all_sites\(model, inputs=\.\.\.\)"):
        lrqp.all_sites(model)
    one, two = given(kind, 0), given(kind, 1)
    stack = "decoder." if kind is sounds else ""
    sites = lrqp.all_sites(model, PARTS, inputs=one)
    assert sites == [
        *(f"{stack}L{n}.{part}" for n in range(LAYERS) for part in PARTS[:-1]),
        f"{stack}final",
    ]
    hold(model, f"{stack}L1", [one, two])
    found = lrqp.capture(model, one, sites)
    states = model(**one, output_hidden_states=True)
    if kind is not captions:  # which do not return those of the text
        states = states[f"{stack}hidden_states".replace(".", "_")]
        for n in range(LAYERS):
            torch.testing.assert_close(found[f"{stack}L{n}.pre"], states[n])
    for n in range(LAYERS if kind is not captions else 0):
        pre, attn, mid, mlp, post = (
            found[f"{stack}L{n}.{part}"] for part in ("pre", "attn_out", "mid", "mlp_out", "post")
        )
        torch.testing.assert_close(post, mid + mlp)
        if kind is Pictures:
            torch.testing.assert_close(mid, pre + attn)
    # Another model of the class and configuration is known by now.
    assert lrqp.all_sites(kind().eval(), PARTS) == sites


def test_an_example_that_tells_too_little_is_refused() -> None:
    model = Pictures().eval()
    same = given(Pictures, 0)["pixel_values"][:1].repeat(2, 1, 1, 1)
    with pytest.raises(UnknownFamilyError, match="the example needs two rows that differ"):
        lrqp.all_sites(model, inputs={"pixel_values": same})
    whole = sounds().eval()
    short = given(sounds, 0) | {"decoder_input_ids": ids()[:, :4]}
    with pytest.raises(UnknownFamilyError, match="need more than 4 tokens"):
        lrqp.all_sites(whole, inputs=short)


@torch.no_grad()
def test_tokens_by_another_name_are_columns_of_the_stream() -> None:
    class Renamed(Model):
        def forward(self, idx: Tensor) -> Tensor:
            return super().forward(idx)

    model = Renamed(Block)
    with pytest.raises(UnknownFamilyError, match="Renamed has no config"):
        lrqp.all_sites(model)
    assert len(lrqp.all_sites(model, inputs={"idx": ids()})) == 2 * LAYERS
    hold(model, "L1", [{"idx": ids(0)}, {"idx": ids(1)}])


@torch.no_grad()
def test_what_is_computed_with_tokens_before_rows_is_not_taken_for_the_stream() -> None:
    """Longformer's queries are (tokens, rows, width), which as many rows as tokens hide."""
    config = transformers.LongformerConfig(**SIZES, vocab_size=40, attention_window=[4] * LAYERS)
    torch.manual_seed(0)
    model = transformers.LongformerModel(config).eval()
    many = {"input_ids": ids(rows=TOKENS), "attention_mask": torch.ones(TOKENS, TOKENS).long()}
    with pytest.raises(UnknownFamilyError, match="not as many of them as there are texts"):
        lrqp.all_sites(model, inputs=many)
    lrqp.all_sites(model, inputs={name: item[:3] for name, item in many.items()})
    assert {places.projection for places in layout_of(model).each} == {"attention.output.dense"}
    seen = list[Tensor]()
    dense = model.encoder.layer[1].attention.output.dense
    hook = dense.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**many)
    hook.remove()
    assert torch.equal(lrqp.capture(model, many, "L1.z")["L1.z"], seen[0])


def test_what_torch_jit_and_export_have_made_is_refused_by_what_it_is() -> None:
    model = Model(Block)
    whole, part = torch.jit.trace(model, (ids(),)), Model(Block)
    part.blocks[1] = torch.jit.trace(part.blocks[1], (torch.randn(2, TOKENS, WIDTH),))
    for made in (whole, part):
        with pytest.raises(CompiledModelError, match=r"torch\.jit has made"):
            lrqp.all_sites(made)
    exported = torch.export.export(model, (), {"input_ids": ids()}, strict=False).module()
    with pytest.raises(UnknownFamilyError, match="could not be run on a few tokens"):
        lrqp.all_sites(exported)
    with pytest.raises(UnknownFamilyError, match="has no list of blocks"):
        lrqp.all_sites(exported, inputs={"input_ids": ids()})
