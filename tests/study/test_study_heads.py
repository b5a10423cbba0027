"""Direct logit attribution adds up, and heads get their roles by the rules."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from contexts_for_tests import Count, check, computed, own_context, own_task
from heads_for_tests import EVERY_HEAD, HEADS, LAYERS, WIDTH, random_model, study_of
from torch import Tensor, nn
from transformers import GPT2Config

from benchmarks.organisms.prompts import build_tokenizer
from lrqp_torch import capture, intervene, models
from lrqp_torch.errors import SiteError, UnknownFamilyError, WidthError
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.sites import blocks_of
from lrqp_torch.study import attribution
from lrqp_torch.study import heads as roles
from lrqp_torch.study.attribution import Pull, attribute, final_norm, output_projection
from lrqp_torch.study.context import StudyContext, no_progress
from lrqp_torch.study.estimates import Estimate
from lrqp_torch.study.heads import HeadsResult, Role
from lrqp_torch.study.parts.heads import PART, shift_head
from lrqp_torch.study.running import answers

FAMILIES = ("gpt2", "llama", "gpt_neox")
PARTS = [f"L{layer}.pre" for layer in range(LAYERS)] + [f"L{LAYERS - 1}.post"]


def pull_of(data: Any) -> Pull:
    """IO − S."""
    weights = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(len(data), 2)
    return Pull(torch.stack([data.io_tokens, data.s_tokens], dim=-1), weights)


def frozen_logit_difference(model: Any, x: Tensor, scale_of: Tensor, data: Any) -> Tensor:
    """IO − S of streams x, with the final norm written out and its scale taken from another."""
    norm, unembedding = final_norm(model), model.get_output_embeddings()
    if isinstance(norm, nn.LayerNorm):
        scale = (scale_of.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        y = norm.weight * (x - x.mean(-1, keepdim=True)) / scale + norm.bias
    else:
        scale = (scale_of.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        y = norm.weight * x / scale
    logits = unembedding(y)
    rows = torch.arange(len(x))
    return logits[rows, data.io_tokens] - logits[rows, data.s_tokens]


@contextmanager
def mlp_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handles = [
        block.mlp.register_forward_hook(lambda m, a, output: outputs.append(output))
        for block in blocks_of(model)
    ]
    yield outputs
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_shares_of_all_parts_add_up_to_the_models_logit_difference(name: str) -> None:
    context = study_of(name)
    model, data = context.model, context.task.test
    end = data.positions["END"]
    with record_heads(model, range(LAYERS), end) as z, mlp_outputs(model) as mlps:
        logits = model(**data.inputs).logits[:, -1]
    rows = torch.arange(len(data))
    expected = logits[rows, data.io_tokens] - logits[rows, data.s_tokens]
    streams = capture(model, data.inputs, PARTS, positions=end)
    share = attribute(model, [streams[p] for p in PARTS], z, pull_of(data))
    written = torch.stack([output[:, -1] for output in mlps], dim=1)
    by_hand = torch.einsum("bnd,bd->bn", written, share.direction)
    assert share.heads.shape == (len(data), LAYERS, HEADS)
    torch.testing.assert_close(share.mlps, by_hand, rtol=1e-9, atol=1e-9)
    total = (
        share.embedding
        + share.heads.sum((1, 2))
        + share.biases.sum(1)
        + by_hand.sum(1)
        + share.constant
    )
    # Llama's norms compute in float32 whatever they are given.
    exact = {"rtol": 1e-5, "atol": 1e-5} if name == "llama" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(total, expected, **exact)
    torch.testing.assert_close(share.total, expected, **exact)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_heads_share_is_what_its_result_adds_under_the_frozen_norm(name: str) -> None:
    context = study_of(name)
    model, data = context.model, context.task.test
    end = data.positions["END"]
    with record_heads(model, range(LAYERS), end) as z:
        streams = capture(model, data.inputs, PARTS, positions=end)
    final = streams[PARTS[-1]]
    share = attribute(model, [streams[p] for p in PARTS], z, pull_of(data))
    for layer, head in ((0, 1), (2, 3)):
        projection = blocks_of(model)[layer].get_submodule(
            "attn.c_proj" if name == "gpt2" else "self_attn.o_proj"
        )
        alone = torch.zeros(len(data), HEADS, WIDTH // HEADS, dtype=final.dtype)
        alone[:, head] = z[layer][:, head]
        result = projection(alone.flatten(1)) - projection(torch.zeros_like(alone.flatten(1)))
        without = frozen_logit_difference(model, final - result, final, data)
        torch.testing.assert_close(
            share.heads[:, layer, head],
            frozen_logit_difference(model, final, final, data) - without,
        )


@torch.no_grad()
def test_attribution_refuses_what_it_does_not_understand() -> None:
    context = study_of("gpt2", n=8)
    model, data = context.model, context.task.test
    with record_heads(model, range(LAYERS), data.positions["END"]) as z:
        streams = capture(model, data.inputs, PARTS, positions=data.positions["END"])
    stack = [streams[part] for part in PARTS]
    with pytest.raises(WidthError, match="4 streams"):
        attribute(model, stack[1:], z, pull_of(data))
    with pytest.raises(WidthError, match="heads of every"):
        attribute(model, stack, {0: z[0]}, pull_of(data))

    class ShiftedNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    strange = ShiftedNorm(WIDTH).double()
    model.transformer.ln_f = strange
    with pytest.raises(UnknownFamilyError, match="miss its logit difference"):
        attribute(model, stack, z, pull_of(data))
    model.transformer.further_norm = nn.LayerNorm(WIDTH)
    with pytest.raises(UnknownFamilyError, match="2 norms"):
        final_norm(model)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_scores_are_those_of_an_ordinary_forward_pass(name: str) -> None:
    tokenizer = build_tokenizer([])
    # In float64 eager attention would be NaN on padding in some families.
    model = random_model(name, len(tokenizer), torch.float32)
    context = study_of(name, model=model, tokenizer=tokenizer)
    data = context.task.test
    context.model.set_attn_implementation("eager")
    attentions = context.model(**data.inputs, output_attentions=True).attentions
    context.model.set_attn_implementation("sdpa")
    result = computed(PART, context)
    assert [score.head for score in result.scores] == EVERY_HEAD
    rows = torch.arange(len(data))
    for score in result.scores:
        layer, head = roles.parse_head(score.head)
        for key, value in score.attention.items():
            query, to = key.split("→")
            at = attentions[layer][rows, head, data.positions[query], data.positions[to]]
            assert value == pytest.approx(float(at.mean()), abs=1e-6)
        low, high = score.attribution.interval or (0.0, 0.0)
        assert low < score.attribution.known < high
    assert sum(result.parts.values()) == pytest.approx(result.logit_difference)
    heads_and_biases = result.parts["heads"]
    biases = heads_and_biases - sum(score.attribution.known for score in result.scores)
    assert abs(biases) < 1e-9 if name == "llama" else abs(biases) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_shifting_a_head_is_changing_its_output_before_w_o(name: str) -> None:
    context = study_of(name, n=12)
    model, data = context.model, context.task.test
    end = data.positions["END"]
    shift = torch.randn(len(data), WIDTH // HEADS, dtype=torch.float64)
    with intervene(model, [shift_head(model, 1, 2, shift, end)]):
        shifted = model(**data.inputs).logits

    def change(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone().unflatten(-1, (HEADS, -1))
        z[torch.arange(len(data)), end, 2] += shift
        return (z.flatten(2),)

    path = {"gpt2": "attn.c_proj", "llama": "self_attn.o_proj", "gpt_neox": "attention.dense"}
    handle = blocks_of(model)[1].get_submodule(path[name]).register_forward_pre_hook(change)
    expected = model(**data.inputs).logits
    handle.remove()
    plain = model(**data.inputs).logits
    assert float((expected - plain)[:, -1].abs().max()) > 0.01
    torch.testing.assert_close(shifted[:, -1], expected[:, -1])


@pytest.fixture(scope="module")
def organism() -> StudyContext:
    model, tokenizer = models.load("organism")
    return study_of("", n=160, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def found(organism: StudyContext) -> HeadsResult:
    return computed(PART, organism)


def test_the_organisms_order_is_read_where_it_is_known_to_be_used(
    found: HeadsResult,
) -> None:
    assert found.published is None
    assert found.truth is not None and found.truth.agrees is True
    inhibiting = found.found[Role.S_INHIBITION]
    assert inhibiting
    for score in found.scores:
        if score.head in inhibiting:
            assert score.attention["END→S2"] >= roles.ATTENTION
            assert score.test is not None and score.test.writing.known < 0
    lowest = min(roles.parse_head(head)[0] for head in inhibiting)
    assert lowest >= found.truth.first_layer


@torch.no_grad()
def test_effect_on_movers_is_that_of_mean_ablation_by_hand(
    organism: StudyContext, found: HeadsResult
) -> None:
    """Against full forward passes in which a hook puts the mean in place of the head's output."""
    model: Any = organism.model
    data = organism.task.test
    end, rows = data.positions["END"], torch.arange(len(data))
    movers = found.members(Role.MOVER) or found.members(Role.WRITER)
    name = max(
        (score for score in found.scores if score.test is not None),
        key=lambda score: -score.test.writing.known if score.test else 0.0,
    ).head
    layer, head = roles.parse_head(name)
    above = [roles.parse_head(mover) for mover in movers if roles.parse_head(mover)[0] > layer]
    n_layers = len(blocks_of(model))
    sites = [f"L{n}.pre" for n in range(n_layers)] + [f"L{n_layers - 1}.post"]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")

    def run() -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        with record_heads(model, range(n_layers), end) as z:
            return z, model(**data.inputs, output_attentions=True).attentions

    z, patterns = run()
    streams = capture(model, data.inputs, sites, positions=end)
    direction = attribute(model, [streams[site] for site in sites], z, pull_of(data)).direction
    mean = z[layer][:, head].mean(0)

    def ablate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        heads_there = args[0].clone().unflatten(-1, (z[layer].shape[1], -1))
        heads_there[rows, end, head] = mean
        return (heads_there.flatten(2),)

    handle = blocks_of(model)[layer].attn.c_proj.register_forward_pre_hook(ablate)
    z_after, patterns_after = run()
    handle.remove()
    model.set_attn_implementation(before)

    looks = torch.zeros(len(data), dtype=torch.float64)
    writes = torch.zeros(len(data), dtype=torch.float64)
    for n, h in above:
        change = (patterns_after[n] - patterns[n])[rows, h, end].double()
        looks += change[rows, data.positions["IO"]] - change[rows, data.positions["S1"]]
        weight, _ = output_projection(model, n)
        width = weight.shape[0] // z[n].shape[1]
        result = (z_after[n] - z[n])[:, h] @ weight[h * width : (h + 1) * width]
        writes += (result.double() * direction).sum(-1)
    test = next(score.test for score in found.scores if score.head == name)
    assert test is not None and abs(test.writing.known) > 0.1
    assert test.writing.value == pytest.approx(float(writes.mean()), abs=1e-3)
    assert test.attention.value == pytest.approx(float(looks.mean()) / len(above), abs=1e-4)


def test_a_random_model_has_no_circuit_and_says_so() -> None:
    tokenizer = build_tokenizer([])
    model = random_model("gpt2", len(tokenizer))
    with torch.no_grad():
        for block in model.transformer.h:  # without keys every pattern is uniform
            block.attn.c_attn.weight[:, WIDTH : 2 * WIDTH] = 0
            block.attn.c_attn.bias[WIDTH : 2 * WIDTH] = 0
    result = computed(PART, study_of("gpt2", model=model, tokenizer=tokenizer))
    for role in (
        Role.S_INHIBITION,
        Role.MOVER,
        Role.NEGATIVE,
        Role.BACKUP,
        Role.INDUCTION,
    ):
        assert result.found[role] == []
    assert all(score.test is None for score in result.scores)
    assert result.truth is None and result.published is None
    table = PART.panels(result)[-1].table
    assert table is not None
    assert ["name mover", "none found"] in [row[:2] for row in table.rows]
    check(PART, result)


def certain(value: float) -> Estimate:
    """An effect whose interval ends there, on the side of 0."""
    return Estimate(2 * value, *sorted((value, 3 * value)), 10)


def test_movers_by_rule() -> None:
    to_io = {"L5.H0": 0.6, "L5.H1": 0.5, "L4.H0": 0.2, "L6.H0": 0.2, "L5.H2": 0.9, "L5.H3": 0.05}
    to_s1 = dict.fromkeys(to_io, 0.01) | {"L5.H0": 0.3}
    values = {"L5.H0": 2.0, "L5.H1": -1.0, "L4.H0": 0.3, "L6.H0": 0.3, "L5.H2": 0.1, "L5.H3": 1.0}
    effect = {head: certain(value) for head, value in values.items()}
    found = roles.mover_roles(to_io, to_s1, effect)
    assert found[Role.MOVER] == ["L5.H0"]
    assert found[Role.NEGATIVE] == ["L5.H1"]
    assert found[Role.BACKUP] == ["L6.H0", "L5.H2"]
    assert found[Role.WRITER] == roles.writers(effect) == ["L5.H0", "L5.H3"]
    # A strong head that does not look at IO is a milder measure for those that do.
    other = roles.mover_roles(to_io, to_s1, effect | {"L5.H3": certain(15.0)})
    assert other[Role.MOVER] == ["L5.H0"] and other[Role.WRITER] == ["L5.H3"]
    much_stronger = roles.mover_roles(to_io, to_s1, effect | {"L5.H3": certain(25.0)})
    assert much_stronger[Role.MOVER] == []
    for attention in (dict.fromkeys(to_io, 0.05), to_io):
        both_names = roles.mover_roles(attention, attention, effect)
        assert not any(both_names[role] for role in (Role.MOVER, Role.BACKUP, Role.NEGATIVE))
        assert both_names[Role.WRITER] == ["L5.H0", "L5.H3"]
    # What differs from 0 by chance alone counts as nothing.
    unsure = dict.fromkeys(to_io, Estimate(5.0, -0.1, 10.1, 10))
    assert not any(roles.mover_roles(to_io, to_s1, unsure).values())


def test_published_heads_are_those_of_gpt2_small_alone() -> None:
    config = GPT2Config()
    assert roles.published_heads(config) is None
    config._name_or_path = "openai-community/gpt2"
    published = roles.published_heads(config)
    assert published is not None
    assert published["name mover"] == ["L9.H9", "L9.H6", "L10.H0"]
    assert published["S-inhibition"] == ["L7.H3", "L7.H9", "L8.H6", "L8.H10"]
    assert sum(map(len, published.values())) == 2 + 3 + 4 + 4 + 3 + 2 + 8
    other = GPT2Config(n_layer=24)
    other._name_or_path = "gpt2"
    assert roles.published_heads(other) is None
    assert roles.overlap(["L9.H9", "L3.H1"], published["name mover"]) == "1 of 3, 1 more"


def test_gpt2_uses_the_published_heads_and_shows_the_overlap(found: HeadsResult) -> None:
    known = {role: ["L9.H9"] for role in Role if role != Role.WRITER}
    result = replace(found, published=known)
    assert result.members(Role.MOVER) == ["L9.H9"]
    assert result.members(Role.WRITER) == found.found[Role.WRITER]
    table = PART.panels(result)[-1].table
    assert table is not None and "published ones found" in table.columns
    row = next(row for row in table.rows if row[0] == Role.S_INHIBITION)
    assert row[3] == f"0 of 1, {len(found.found[Role.S_INHIBITION])} more"


def test_head_names_and_readers() -> None:
    assert roles.parse_head(roles.head_name(9, 10)) == (9, 10)
    for name in ("L9", "9.10", "L9.H", "L9.H1 "):
        with pytest.raises(SiteError, match="is no head"):
            roles.parse_head(name)
    assert [roles.first_reader(f"L3.{part}") for part in ("pre", "mid", "post")] == [3, 4, 4]


def test_the_part_keeps_its_promises(organism: StudyContext, found: HeadsResult) -> None:
    check(PART, found)
    count = Count()
    assert computed(PART, organism, advance=count) == found
    assert count.total == PART.work(organism)
    assert set(PART.figures(found)) == {"heads"}
    maps, scatter, _ = PART.panels(found)
    assert maps.choice and len(maps.charts) == 9
    for chart in maps.charts.values():
        heat = chart.panes[0].heat
        assert heat is not None and sum(map(len, heat.values)) == len(found.scores)
    (chart,) = scatter.charts.values()
    assert sum(len(marks.x) for marks in chart.panes[0].marks) == len(found.scores)


def test_prompts_without_names_are_refused() -> None:
    reason = PART.missing(own_context())
    assert reason is not None and "two names" in reason


@pytest.mark.parametrize("n_classes", [2, 3])
@torch.no_grad()
def test_of_own_answers_the_preference_is_attributed(n_classes: int) -> None:
    context = own_context(n_classes)
    prompts = own_task(n_classes).train
    found = attribution.score(context, prompts, {}, no_progress)
    logits = context.model(**prompts.inputs).logits[:, -1]
    torch.testing.assert_close(
        found.total, answers(prompts, logits)["logit_difference"], rtol=1e-4, atol=1e-4
    )
    total = sum(found.parts.values())
    torch.testing.assert_close(total, found.total)


def test_several_answers_of_a_class_count_by_their_shares() -> None:
    """The pull is the gradient of the preference with respect to the logits."""
    tokens = torch.tensor([[[0, 1], [2, -1], [3, 4]]]).repeat(2, 1, 1)
    prompts = own_task(3).train[:2]
    prompts = replace(prompts, answers=tokens, labels=torch.tensor([0, 1]))
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    scores = prompts.scores(logits)
    rows = torch.arange(2)
    preference = scores[rows, prompts.labels] - scores[rows, prompts.labels + 1]
    (gradient,) = torch.autograd.grad(preference.sum(), logits)
    pull = Pull.of(prompts, logits.detach())
    spread = torch.zeros(2, 6, dtype=torch.float64).scatter_add(1, pull.tokens, pull.weights)
    torch.testing.assert_close(spread, gradient)
