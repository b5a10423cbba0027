"""Scopes of model.generate: prompt, generated and all, cached and uncached, one request or many."""

from typing import Any

import pytest
import torch
import transformers
from models_for_tests import (
    POST_MODELS,
    VOCABULARY,
    WIDTH,
    Prompts,
    build,
    hook_count,
    random_edit,
)
from torch import Tensor, nn
from transformers import DynamicCache
from zoo_for_tests import build_tiny

import lrqp_torch as lrqp
from lrqp_torch.baselines import BaselineData, FullPatch, MeanDifference, NoEdit
from lrqp_torch.errors import (
    EditNeverFiredError,
    InfeasibleError,
    PairError,
    PositionError,
    TargetError,
)

PROMPTS = Prompts.random([7, 4, 9, 6])
LENGTHS, WIDE, NEW = torch.tensor([7, 4, 9, 6]), 9, 6
REGIONS = ("prompt", "generated", "all")
TARGET = torch.tensor([0, 2, 1, 1])
SITE = "L1.mid"
FIRST_OF_FIVE = pytest.mark.skipif(
    transformers.__version__ == "5.0.0", reason="transformers 5.0.0 itself fails there"
)


def generate(model: nn.Module, **options: object) -> Tensor:
    inputs = PROMPTS.padded("left")
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return model.generate(input_ids=ids, attention_mask=mask, **settings)


def alone(model: nn.Module, row: int, **options: object) -> Tensor:
    """The new tokens of one prompt, generated without padding."""
    ids = PROMPTS.alone(row)["input_ids"]
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]


def edit_of(model: nn.Module, site: str = SITE, **options: object) -> lrqp.LRQP:
    inputs = PROMPTS.padded("left")
    x = lrqp.capture(model, inputs, site, inputs["attention_mask"].bool())[site]
    return random_edit(x, 3, **{"log_odds": 30.0, **options})


def expected_pairs(region: str, new: int = NEW) -> list[tuple[int, int]]:
    """(example, token) in the order in which a cached generation reads them."""
    prompt = [(i, c) for i in range(4) for c in range(WIDE - int(LENGTHS[i]), WIDE)]
    written = [(i, c) for c in range(WIDE, WIDE + new - 1) for i in range(4)]
    return {"prompt": prompt, "generated": written, "all": prompt + written}[region]


def pairs_of(record: object) -> list[tuple[int, int]]:
    return list(zip(record.example.tolist(), record.token.tolist(), strict=True))


class Pushed:
    """An edit that pushes, and says which tokens it saw."""

    def __init__(self, size: float = 2.0) -> None:
        self.direction = size * torch.linspace(-1, 1, WIDTH)
        self.calls: list[list[tuple[int, int]]] = []
        self.requests: list[list[int]] = []

    def __call__(self, x: Tensor, context: lrqp.EditContext) -> Tensor:
        self.calls.append(pairs_of(context))
        self.requests.append(context.request.tolist())
        return x + self.direction.to(x.dtype)


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("site", ["L0.pre", SITE])
def test_cached_is_uncached_token_for_token(name: str, region: str, site: str) -> None:
    model = build(name)
    edit, clean = edit_of(model, site), generate(model)
    texts, runs = {}, {}
    for use_cache in (True, False):
        with edit.at(model, site, positions=region, target=TARGET) as run:
            texts[use_cache] = generate(model, use_cache=use_cache)
        runs[use_cache] = run
    assert torch.equal(texts[True], texts[False])
    assert not torch.equal(texts[True], clean)
    for run in runs.values():
        assert pairs_of(run) == expected_pairs(region)
        assert bool((run.log_odds_after >= run.floor).all())
    for field in ("log_odds_before", "floor", "distance", "euclidean"):
        cached, uncached = (getattr(run, field) for run in runs.values())
        torch.testing.assert_close(cached, uncached, rtol=1e-3, atol=1e-3)
    assert torch.equal(runs[True].status, runs[False].status)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("region", REGIONS)
def test_each_token_is_edited_once_with_a_cache_and_in_every_pass_without(
    name: str, region: str
) -> None:
    model = build(name)
    for use_cache in (True, False):
        pushed = Pushed()
        with lrqp.intervene(model, lrqp.Intervention(SITE, region, pushed)):
            generate(model, use_cache=use_cache)
        seen = [pair for call in pushed.calls for pair in call]
        if use_cache:
            assert seen == expected_pairs(region)
        else:
            passes = {"prompt": NEW, "generated": NEW - 1, "all": NEW}[region]
            assert len(pushed.calls) == passes
            assert set(pushed.calls[-1]) == set(expected_pairs(region))
            for column in range(WIDE, WIDE + NEW - 1) if region != "prompt" else ():
                assert seen.count((0, column)) == WIDE + NEW - 1 - column


@pytest.mark.parametrize("name", POST_MODELS)
def test_generated_is_what_fixed_positions_of_the_new_columns_do(name: str) -> None:
    """An independent way to the same edit: absolute columns, known beforehand."""
    model = build(name)
    edit = edit_of(model)
    columns = torch.arange(WIDE, WIDE + NEW - 1).expand(4, -1)
    with edit.at(model, SITE, positions=columns, target=TARGET) as fixed:
        text = generate(model)
    with edit.at(model, SITE, positions="generated", target=TARGET) as run:
        assert torch.equal(generate(model), text)
    order = torch.argsort(run.example, stable=True)
    assert torch.equal(run.log_odds_after[order], fixed.log_odds_after.flatten())
    assert torch.equal(run.distance[order], fixed.distance.flatten())


@pytest.mark.parametrize("name", POST_MODELS)
def test_sampling_is_the_same_cached_and_uncached_under_a_seed(name: str) -> None:
    model = build(name)
    edit, texts = edit_of(model), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        with edit.at(model, SITE, positions="all", target=TARGET):
            texts.append(generate(model, use_cache=use_cache, do_sample=True, top_k=0))
    assert torch.equal(*texts)
    torch.manual_seed(6)
    with edit.at(model, SITE, positions="all", target=TARGET):
        assert not torch.equal(generate(model, do_sample=True, top_k=0), texts[0])


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_that_changes_nothing_changes_no_bit(
    name: str, use_cache: bool, dtype: torch.dtype
) -> None:
    model = build(name, dtype=dtype)
    options = {"use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
    clean = generate(model, **options)
    items = [lrqp.Intervention(site, "all", lambda x, c: x) for site in ("L0.pre", SITE, "L2.post")]
    with lrqp.intervene(model, items):
        same = generate(model, **options)
    assert torch.equal(same.sequences, clean.sequences)
    assert all(torch.equal(a, b) for a, b in zip(same.logits, clean.logits, strict=True))


@pytest.mark.parametrize("name", POST_MODELS)
def test_requests_in_one_batch_have_their_own_targets(name: str) -> None:
    """Each row is what it would be with its target for all rows, and sources set the floor."""
    model = build(name)
    edit = edit_of(model, log_odds=2.0)
    each = {}
    for target in range(3):
        with edit.at(model, SITE, positions="all", target=target):
            each[target] = generate(model)
    source = torch.tensor([1, 0, 2, 0])
    with edit.at(model, SITE, positions="all", target=TARGET):
        text = generate(model)
    for row, target in enumerate(TARGET.tolist()):
        assert torch.equal(text[row], each[target][row])
    assert not torch.equal(text, each[0])
    with edit.at(model, SITE, positions="prompt", target=TARGET, source=source) as run:
        generate(model)
    inputs = PROMPTS.padded("left")
    x = lrqp.capture(model, inputs, SITE)[SITE][run.example, run.token]
    expected = edit.solve(x, TARGET[run.example], source[run.example])
    torch.testing.assert_close(run.floor, expected.floor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("way", ["num_beams", "num_return_sequences"])
def test_repeats_give_every_row_of_a_request_its_target(use_cache: bool, way: str) -> None:
    model = build("llama")
    beams = way == "num_beams"
    options = {way: 3, "do_sample": not beams, "use_cache": use_cache}
    pushed = Pushed()
    scope = lrqp.Scope("generated", repeats=3)
    torch.manual_seed(0)
    with lrqp.intervene(model, lrqp.Intervention(SITE, scope, pushed)):
        first = generate(model, **options)
    for call, requests in zip(pushed.calls, pushed.requests, strict=True):
        assert requests == [example // 3 for example, _ in call]
    assert {example for example, _ in pushed.calls[0]} == set(range(12))
    torch.manual_seed(0)
    with lrqp.intervene(model, lrqp.Intervention(SITE, scope, Pushed())):
        again = generate(model, **{**options, "use_cache": not use_cache})
    assert torch.equal(first, again)
    edit = edit_of(model)
    with edit.at(model, SITE, positions=scope, target=TARGET) as run:
        generate(model, **options)
    written = run.example // 3
    held = torch.tensor([bool((run.floor[written == i] == 30).all()) for i in range(4)])
    assert held.any()
    assert bool((run.log_odds_after >= run.floor).all())
    with (
        pytest.raises(PositionError, match=r"targets are for 4 examples, .* given 12.*repeats=k"),
        edit.at(model, SITE, positions="generated", target=TARGET),
    ):
        generate(model, **options)
    with (
        pytest.raises(PositionError, match="12 rows is no multiple of the scope's repeats, 5"),
        edit.at(model, SITE, positions=lrqp.Scope("all", repeats=5), target=0),
    ):
        generate(model, **options)
    assert hook_count(model) == 0


def test_beams_of_a_request_with_its_target_are_those_of_the_request_alone() -> None:
    model = build("llama")
    edit = edit_of(model)
    with edit.at(model, SITE, positions=lrqp.Scope("all", repeats=2), target=TARGET):
        together = generate(model, num_beams=2)
    for row in range(4):
        scope = lrqp.Scope("all", repeats=2)
        with edit.at(model, SITE, positions=scope, target=TARGET[row : row + 1]):
            text = alone(model, row, num_beams=2)
        assert torch.equal(together[row, WIDE:], text)


@pytest.mark.parametrize("use_cache", [True, False])
def test_steps_say_what_each_pass_edited(use_cache: bool) -> None:
    model = build("gpt2")
    edit = edit_of(model)
    with edit.at(model, SITE, positions="generated", target=TARGET) as run:
        generate(model, use_cache=use_cache)
    assert [step.forward_pass for step in run.steps] == list(range(1, NEW))
    for number, step in enumerate(run.steps):
        columns = {WIDE + number} if use_cache else set(range(WIDE, WIDE + number + 1))
        assert set(step.token.tolist()) == columns
        assert len(step) == 4 * len(columns)
        for field in ("log_odds_before", "log_odds_after", "floor", "distance", "status"):
            assert getattr(step, field).shape == (len(step),)
            assert not getattr(step, field).requires_grad
        assert bool((step.log_odds_after >= step.floor).all())
    if use_cache:
        assert torch.equal(torch.cat([step.distance for step in run.steps]), run.distance)
    lines = run.summary().splitlines()
    assert len(lines) == 1 + len(run.steps)
    assert lines[1].split()[:3] == ["1", "4", "9"]
    assert repr(run).startswith(f"EditRun({4 * (NEW - 1)} solved")


@torch.no_grad()
def test_fixed_positions_have_steps_too() -> None:
    model, edit = build("gpt2"), edit_of(build("gpt2"))
    at = PROMPTS.columns(torch.tensor([[0, 3], [1, 3], [2, 8], [5, 3]]), "left")
    item = edit.on(SITE, positions=at, target=1)
    for _ in range(2):  # a second context begins anew
        with lrqp.intervene(model, item) as (run,):
            model(**PROMPTS.padded("left"))
            model(**PROMPTS.padded("left"))
    assert [step.forward_pass for step in run.steps] == [0, 1]
    assert torch.equal(run.steps[1].log_odds_after, run.log_odds_after.flatten())
    assert pairs_of(run.steps[0]) == list(
        zip(run.example.flatten().tolist(), run.token.flatten().tolist(), strict=True)
    )
    assert torch.equal(run.token, at)
    assert not run.generation.any()


def test_an_item_used_again_begins_anew() -> None:
    model = build("llama")
    item = edit_of(model).on(SITE, positions="generated", target=TARGET)
    for _ in range(2):
        with lrqp.intervene(model, item) as (run,):
            with pytest.raises(EditNeverFiredError, match="no token of the scope"):
                run.distance  # noqa: B018
            generate(model)
        assert pairs_of(run) == expected_pairs("generated")


def test_several_texts_in_one_context_are_told_apart() -> None:
    """Also a text that goes on where the one before ended, and one of another length."""
    model = build("llama")
    edit = edit_of(model)
    with edit.at(model, SITE, positions="generated", target=1) as run:
        first = generate(model)
        mask = PROMPTS.padded("left")["attention_mask"]
        more = torch.cat([first, torch.ones(4, 1, dtype=torch.long)], 1)
        wide = torch.cat([mask, torch.ones(4, NEW + 1, dtype=torch.long)], 1)
        model.generate(more, attention_mask=wide, max_new_tokens=3, pad_token_id=0)
        model.generate(PROMPTS.tokens[1][None], max_new_tokens=2, pad_token_id=0)
    assert run.generation.tolist() == [0] * 20 + [1] * 8 + [2]
    assert run.token[20:28].tolist() == [16] * 4 + [17] * 4
    assert (int(run.example[28]), int(run.token[28])) == (0, 4)


@torch.no_grad()
def test_a_known_prompt_length_reads_a_whole_text_as_prompt_and_continuation() -> None:
    """The edited stream of a finished text, read at once, is that of its generation."""
    model = build("llama")
    edit = edit_of(model)
    inputs = PROMPTS.padded("left")
    scope = lrqp.Scope("generated", prompt_length=WIDE)
    with edit.at(model, SITE, positions=scope, target=TARGET) as run:
        text = generate(model)
        generated = run.log_odds_before.clone()
        mask = torch.cat([inputs["attention_mask"], torch.ones(4, NEW, dtype=torch.long)], 1)
        whole = {
            "input_ids": text,
            "attention_mask": mask,
            "position_ids": lrqp.position_ids(mask),
        }
        at = torch.arange(WIDE, WIDE + NEW - 1).expand(4, -1)
        held = lrqp.capture(model, whole, SITE, at)[SITE]
    z = edit.probe.log_odds(held.double().flatten(0, 1), TARGET.repeat_interleave(NEW - 1))
    assert bool((z.reshape(4, -1) >= 29.99).all())
    again = run.log_odds_before[run.generation == 1].reshape(4, NEW)[:, : NEW - 1]
    torch.testing.assert_close(again.T.flatten(), generated, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_capture_sees_the_edited_prompt() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    edit, real = edit_of(model), inputs["attention_mask"].bool()
    with edit.at(model, SITE, positions="prompt", target=TARGET):
        held = lrqp.capture(model, inputs, SITE, real)[SITE]
    example = real.nonzero(as_tuple=True)[0]
    assert torch.equal(edit.probe(held.double()).argmax(-1), TARGET[example])


@pytest.mark.parametrize("use_cache", [True, False])
def test_edits_at_two_sites_nested_and_beside_fixed_positions(use_cache: bool) -> None:
    model = build("llama")
    first, second = edit_of(model, "L0.post"), edit_of(model, "L2.pre")
    last = torch.full((4,), WIDE - 1)
    items = [
        first.on("L0.post", positions="generated", target=TARGET),
        second.on("L2.pre", positions="all", target=0),
        first.on("L0.post", positions=last, target=2),
    ]
    with lrqp.intervene(model, items) as runs:
        together = generate(model, use_cache=use_cache)
    assert pairs_of(runs[0]) == expected_pairs("generated")
    assert pairs_of(runs[1]) == expected_pairs("all")
    assert runs[2].distance.shape == (4,)
    with (
        first.at(model, "L0.post", positions="generated", target=TARGET),
        second.at(model, "L2.pre", positions="all", target=0),
        first.at(model, "L0.post", positions=last, target=2),
    ):
        nested = generate(model, use_cache=use_cache)
    assert torch.equal(together, nested)


@pytest.mark.parametrize("region", REGIONS)
def test_joint_edits_and_baselines_take_scopes(region: str) -> None:
    model = build("llama")
    one = edit_of(model, log_odds=4.0)
    other = lrqp.LRQP(
        random_edit(torch.randn(50, WIDTH), 2, seed=3).probe, one.metric, log_odds=4.0
    )
    joint = lrqp.JointLRQP({"one": one, "other": other})
    target = {"one": TARGET, "other": 1}
    runs = []
    for use_cache in (True, False):
        with joint.at(model, SITE, positions=region, target=target) as run:
            text = generate(model, use_cache=use_cache)
        runs.append((text, run))
    assert torch.equal(runs[0][0], runs[1][0])
    run = runs[0][1]
    count = len(expected_pairs(region))
    assert run.log_odds_after.shape == run.moved.shape == (count, 2)
    assert bool((run.log_odds_after >= run.floor).all())
    assert pairs_of(run) == expected_pairs(region)
    assert len(run.summary().splitlines()) == 1 + len(run.steps)
    identity = NoEdit(one)
    with identity.at(model, SITE, positions=region, target=TARGET) as run:
        assert torch.equal(generate(model), generate(model))
    assert run.distance.shape == (2 * count,) and not run.distance.any()
    with pytest.raises(PairError, match="pair for each position"):
        FullPatch(one).on(SITE, positions=region, target=TARGET)


def test_a_constrained_edit_takes_a_scope_and_its_parameters() -> None:
    model = build("llama")
    edit = edit_of(model, log_odds=4.0)
    bounded = lrqp.ConstrainedLRQP(
        edit.probe,
        edit.metric,
        lambda point: [point.radius <= point.parameters["most"]],
        parameters={"most": ()},
        reads="length",
        log_odds=4.0,
    )
    given = {"most": torch.tensor(1e3)}
    with bounded.at(model, SITE, positions="generated", target=0, parameters=given) as run:
        model.generate(PROMPTS.tokens[0][None], max_new_tokens=3, pad_token_id=0)
    assert run.distance.shape == (2,)
    assert bool((run.log_odds_after >= run.floor - 1e-3).all())


def test_padding_behind_an_ended_sequence_is_edited_without_effect_on_any_text() -> None:
    """generate shows padding that it appends; the text of every row is that of the row alone."""
    model = build("llama")
    free = generate(model)
    ends = int(free[1, WIDE + 1])  # row 1 ends at its second new token
    edit = edit_of(model, log_odds=3.0)
    with edit.at(model, SITE, positions="generated", target=1) as run:
        text = generate(model, eos_token_id=ends)
    for row in range(4):
        with edit.at(model, SITE, positions="generated", target=1):
            new = alone(model, row, eos_token_id=ends)
        assert torch.equal(text[row, WIDE : WIDE + len(new)], new)
        assert not text[row, WIDE + len(new) :].any()
    read = text.shape[1] - WIDE - 1
    assert pairs_of(run) == expected_pairs("generated", read + 1)


@torch.no_grad()
def test_tokens_that_the_mask_hides_are_left_alone_also_behind_the_prompt() -> None:
    """A loop of one's own that hides what follows the end of a sequence."""
    model, inputs = build("llama"), PROMPTS.padded("left")
    cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
    pushed = Pushed()
    with lrqp.intervene(model, lrqp.Intervention(SITE, "all", pushed)):
        model(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache)
        for _ in range(2):
            mask = torch.cat([mask, torch.tensor([[1], [0], [1], [1]])], 1)
            ids = torch.ones(4, 1, dtype=torch.long)
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert pushed.calls[1:] == [[(i, column) for i in (0, 2, 3)] for column in (9, 10)]


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("region", REGIONS)
def test_a_static_cache_gives_the_same_text(name: str, region: str) -> None:
    model = build(name)
    edit = edit_of(model)
    with edit.at(model, SITE, positions=region, target=TARGET):
        expected = generate(model)
    with edit.at(model, SITE, positions=region, target=TARGET) as run:
        assert torch.equal(generate(model, cache_implementation="static"), expected)
    assert pairs_of(run) == expected_pairs(region)


def test_a_static_cache_with_a_window_is_refused_where_padding_cannot_be_told() -> None:
    model = build("mistral", sliding_window=4)
    edit = edit_of(model)
    with edit.at(model, SITE, positions="generated", target=TARGET):
        expected = generate(model)
    with edit.at(model, SITE, positions="generated", target=TARGET):
        assert torch.equal(generate(model, use_cache=False), expected)
    with (
        pytest.raises(PositionError, match=r"4 columns, the text 10.*sliding window"),
        edit.at(model, SITE, positions="generated", target=TARGET),
    ):
        generate(model, cache_implementation="static")


@pytest.mark.parametrize("region", REGIONS)
def test_a_cache_is_known_by_what_it_is_also_behind_a_wrapper(region: str) -> None:
    model = build("llama")
    edit = edit_of(model)
    with edit.at(model, SITE, positions=region, target=TARGET) as run:
        expected = generate(model)
    trunk = model.model
    plain = trunk.forward
    trunk.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with edit.at(model, SITE, positions=region, target=TARGET) as again:
        assert torch.equal(generate(model), expected)
    assert pairs_of(again) == pairs_of(run) == expected_pairs(region)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "state"])
def test_a_cache_that_does_not_say_what_it_holds_is_refused(name: str) -> None:
    class RecurrentCache:
        pass

    model = build("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    with (
        pytest.raises(PositionError, match=r"given a RecurrentCache, .*use_cache=False"),
        edit_of(model).at(model, SITE, positions="all", target=1),
    ):
        model.model(ids, **{name: RecurrentCache()})


def test_a_call_that_does_not_fit_the_model_is_refused() -> None:
    model = build("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    with (
        pytest.raises(PositionError, match="call of LlamaModel cannot be understood"),
        edit_of(model).at(model, SITE, positions="all", target=1),
    ):
        model.model(ids, input_ids=ids)


@FIRST_OF_FIVE
@pytest.mark.parametrize("region", REGIONS)
def test_a_prompt_in_chunks_needs_its_length(region: str) -> None:
    model = build("llama")
    edit = edit_of(model)
    with edit.at(model, SITE, positions=region, target=TARGET):
        expected = generate(model)
    for chunk in (1, 4, 8):
        scope = lrqp.Scope(region, prompt_length=WIDE)
        with edit.at(model, SITE, positions=scope, target=TARGET) as run:
            assert torch.equal(generate(model, prefill_chunk_size=chunk), expected)
        assert set(pairs_of(run)) == set(expected_pairs(region))
    with (
        pytest.raises(PositionError, match=r"4 tokens after 4 .*Scope\('.*', prompt_length="),
        edit.at(model, SITE, positions=region, target=TARGET),
    ):
        generate(model, prefill_chunk_size=4)


@FIRST_OF_FIVE
def test_assisted_decoding_needs_the_length_of_the_prompt() -> None:
    model = build("llama")
    edit, ids = edit_of(model), torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    lookup = {**options, "prompt_lookup_num_tokens": 3}
    scope = lrqp.Scope("generated", prompt_length=10)
    with edit.at(model, SITE, positions=scope, target=1):
        expected = model.generate(ids, **options)
    with edit.at(model, SITE, positions=scope, target=1) as run:
        assert torch.equal(model.generate(ids, **lookup), expected)
    assert set(range(10, 17)) <= set(run.token.tolist())
    with (
        pytest.raises(PositionError, match="assisted decoding"),
        edit.at(model, SITE, positions="generated", target=1),
    ):
        model.generate(ids, **lookup)


@torch.no_grad()
def test_what_was_read_before_the_context_opened_is_missed_aloud() -> None:
    model, ids = build("llama"), PROMPTS.tokens[2][None]
    for scope in ("all", "prompt", "generated", lrqp.Scope("generated", prompt_length=3)):
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        with (
            pytest.raises(PositionError, match="goes on from 5 tokens in the cache"),
            lrqp.intervene(model, lrqp.Intervention(SITE, scope, Pushed())),
        ):
            model(input_ids=ids[:, 5:], past_key_values=cache)
    pushed, scope = Pushed(), lrqp.Scope("generated", prompt_length=7)
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    with lrqp.intervene(model, lrqp.Intervention(SITE, scope, pushed)):
        model(input_ids=ids[:, 5:], past_key_values=cache)
    assert pushed.calls == [[(0, 7), (0, 8)]]


def test_a_scope_without_a_token_raises_and_says_why() -> None:
    model = build("gpt2")
    edit = edit_of(model)
    with (
        pytest.raises(EditNeverFiredError, match=r"L1\.mid.*prompt of 9.*max_new_tokens"),
        edit.at(model, SITE, positions="generated", target=TARGET) as run,
    ):
        generate(model, max_new_tokens=1)
    with pytest.raises(EditNeverFiredError, match="no token of the scope"):
        run.distance  # noqa: B018
    for region in REGIONS:
        with (
            pytest.raises(EditNeverFiredError, match="run the model inside the context"),
            edit.at(model, SITE, positions=region, target=TARGET),
        ):
            pass
    with (
        pytest.raises(EditNeverFiredError, match="attention mask"),
        torch.no_grad(),
        edit.at(model, SITE, positions="prompt", target=1),
    ):
        model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.zeros(1, 3).long())


def test_wrong_scopes_and_targets_are_named() -> None:
    model = build("gpt2")
    edit = edit_of(model)
    for wrong in ("generate", "", "tokens"):
        with pytest.raises(PositionError, match="'prompt', 'generated', 'all'"):
            edit.on(SITE, positions=wrong, target=0)
    for options in ({"repeats": 0}, {"repeats": 1.5}, {"repeats": True}, {"prompt_length": 0}):
        with pytest.raises(PositionError, match="integer from 1"):
            lrqp.Scope("all", **options)
    with pytest.raises(TargetError, match=r"shape \(4, 2\).*'all'.*one class a request"):
        edit.on(SITE, positions="all", target=torch.zeros(4, 2).long())
    with pytest.raises(TargetError, match=r"source has shape \(3,\).*\(4,\)"):
        edit.on(SITE, positions="all", target=TARGET, source=torch.zeros(3).long())
    with pytest.raises(TargetError, match="classes 0 to 2"):
        edit.on(SITE, positions="all", target=torch.tensor([0, 1, 3, 0]))
    with pytest.raises(PositionError, match="nothing is generated"):
        lrqp.capture(model, PROMPTS.padded("left"), SITE, "generated")
    with (
        pytest.raises(PositionError, match="targets are for 3 examples, the model was given 4"),
        edit.at(model, SITE, positions="generated", target=TARGET[:3]),
    ):
        generate(model)
    assert hook_count(model) == 0


def test_an_edit_of_what_is_generated_turns_the_text() -> None:
    """A probe for two halves of the vocabulary at the last site: the text stays in one half.

    The classes are what the model itself would say, so its own unembedding is the probe.
    """
    model = build("gpt2", tie_word_embeddings=False)
    half = VOCABULARY // 2
    ids = torch.arange(VOCABULARY).reshape(-1, 1)
    with torch.no_grad():
        x = lrqp.capture(model, {"input_ids": ids}, "L2.post")["L2.post"][:, 0]
        model.lm_head.weight[:half, 0] += 40.0
        model.lm_head.weight[half:, 0] -= 40.0
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.ln_f.bias.zero_()
    probe = lrqp.LinearProbe(WIDTH, 2, dtype=torch.float64).requires_grad_(False)
    probe.weight.zero_()
    probe.bias.zero_()
    # Above the mean of the stream along its first axis: the first half of the vocabulary.
    probe.weight[0] = torch.eye(WIDTH)[0].double() - 1 / WIDTH
    edit = lrqp.LRQP(probe, lrqp.Mahalanobis.fit(x.double(), shrinkage=0.3), log_odds=6.0)
    target = torch.tensor([0, 1, 0, 1])
    with edit.at(model, "L2.post", positions="generated", target=target) as run:
        text = generate(model)
    new = text[:, WIDE + 1 :]  # the first new token was chosen before any edit
    assert torch.equal((new >= half).long(), target[:, None].expand(-1, NEW - 1))
    assert not torch.equal(text, generate(model))
    assert bool((run.log_odds_after >= 6.0).all())
    assert len(run.steps) == NEW - 1


@torch.no_grad()
def test_a_failure_that_was_not_waited_for_is_raised_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: a forward pass does not wait to know, also not in a scope."""
    model = build("llama")
    edit = edit_of(model)
    edit.probe.weight[2], edit.probe.bias[2] = edit.probe.weight[1], edit.probe.bias[1] - 1000
    with (
        pytest.raises(InfeasibleError, match=r"class \[2\] for 1 examples, first \[1\]"),
        edit.at(model, SITE, positions="generated", target=TARGET),
    ):
        generate(model, max_new_tokens=2)
    for module in (lrqp.edits.lrqp, lrqp.stream.intervene):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    finished = []
    with (
        pytest.raises(InfeasibleError, match=r"class \[2\] for 5 examples, first \[1, 1"),
        edit.at(model, SITE, positions="generated", target=TARGET),
    ):
        generate(model)
        finished.append(True)
    assert finished
    skipping = lrqp.LRQP(edit.probe, edit.metric, on_infeasible="skip")
    with skipping.at(model, SITE, positions="generated", target=TARGET) as run:
        generate(model)
    assert run.n_unreached == NEW - 1
    assert set(run.example[run.status >= lrqp.Status.INFEASIBLE].tolist()) == {1}


def test_baselines_steer_too() -> None:
    model = build("llama")
    inputs = PROMPTS.padded("left")
    edit = edit_of(model)
    x = lrqp.capture(model, inputs, SITE, inputs["attention_mask"].bool())[SITE]
    y = edit.probe(x.double()).argmax(-1)
    mean = MeanDifference.from_data(BaselineData(x, y, edit)).at_strength(5.0)
    texts = []
    for use_cache in (True, False):
        with mean.at(model, SITE, positions="all", target=TARGET) as run:
            texts.append(generate(model, use_cache=use_cache))
        assert pairs_of(run) == expected_pairs("all")
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_cache_whose_first_layer_holds_no_keys_goes_on_all_the_same() -> None:
    """MiniMax: blocks of linear attention, the first of all one of them."""
    model: Any = build_tiny(
        "MiniMaxForCausalLM",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        block_size=8,
    )
    ids = torch.arange(4, 24).reshape(2, 10)
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    seen = list[list[int]]()

    def keep(x: Tensor, context: Any) -> Tensor:
        seen.append(context.token.tolist())
        return x.roll(1, -1)

    with lrqp.intervene(model, lrqp.Intervention("L1.pre", "generated", keep)):
        model.generate(ids, **generate)
    assert seen == [[column] * 2 for column in (10, 11, 12)]
    seen.clear()
    with lrqp.intervene(model, lrqp.Intervention("L1.pre", torch.tensor([0, 3]), keep)):
        model.generate(ids, **generate)
    assert seen == [[0, 3]]
