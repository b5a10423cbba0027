"""An edit in a model equals a forward pass by hand with the same change of the stream."""

import itertools
from collections.abc import Callable

import pytest
import torch
from models_for_tests import (
    ALL_MODELS,
    POST_MODELS,
    SITES,
    WIDTH,
    WITH_MID,
    Prompts,
    build,
    forward_by_hand,
    hook_count,
    random_edit,
)
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.errors import PositionError
from lrqp_torch.stream import following

PROMPTS = Prompts.random([7, 4, 9, 6])
TOKENS = torch.tensor([[0, 3], [1, 3], [2, 8], [5, 3]])
needs_compiler = pytest.mark.skipif(following.library() is None, reason="no C compiler")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
DIRECTION = torch.linspace(-2, 2, WIDTH)


def on_rows(at: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of the whole stream that changes the columns ``at``, (B, n), only."""

    def edit(stream: Tensor) -> Tensor:
        stream = stream.clone()
        rows = torch.arange(len(at))[:, None]
        stream[rows, at] = change(stream[rows, at].double()).to(stream.dtype)
        return stream

    return edit


def push(x: Tensor) -> Tensor:
    return x + DIRECTION.to(x.dtype)


def stretch(x: Tensor) -> Tensor:
    return 1.5 * x - 0.2


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_equals_the_forward_pass_by_hand(name: str, side: str) -> None:
    model, inputs = build(name), PROMPTS.padded(side)
    at, real = PROMPTS.columns(TOKENS, side), inputs["attention_mask"].bool()
    for site in SITES:
        if name == "gpt_neox_parallel" and site.endswith("mid"):
            continue
        expected, _ = forward_by_hand(model, inputs, {site: on_rows(at, push)})
        clean = model(**inputs).logits
        with intervene(model, [Intervention(site, at, lambda x, context: push(x))]):
            edited = model(**inputs).logits
        torch.testing.assert_close(edited[real], expected[real], **CLOSE)
        # Nothing before the first edited token changes; every edited token's own logits do.
        rows = torch.arange(4)[:, None]
        assert bool((edited - clean)[rows, at].abs().amax(-1).min() > 0.01)
        earlier = torch.arange(9) < at.amin(-1, keepdim=True)
        assert torch.equal(edited[earlier & real], clean[earlier & real])


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", ["L0.pre", "L1.mid", "L2.post"])
@torch.no_grad()
def test_in_bfloat16_the_stream_is_what_the_edit_returned_up_to_rounding(
    name: str, site: str
) -> None:
    model, inputs = build(name, dtype=torch.bfloat16), PROMPTS.padded("left")
    at, real = PROMPTS.columns(TOKENS, "left"), inputs["attention_mask"].bool()
    expected, streams = forward_by_hand(model, inputs, {site: on_rows(at, push)})
    with intervene(model, [Intervention(site, at, lambda x, context: push(x))]):
        edited = model(**inputs).logits
        held = lrqp.capture(model, inputs, [site], at)[site]
    torch.testing.assert_close(edited[real], expected[real], rtol=0.05, atol=0.15)
    rows = torch.arange(4)[:, None]
    torch.testing.assert_close(held, streams[site][rows, at], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("name", WITH_MID)
@torch.no_grad()
def test_a_mid_edit_reaches_the_skip_path_and_the_mlp(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    at, real = PROMPTS.columns(TOKENS, "left"), inputs["attention_mask"].bool()
    for layer in range(3):
        site, change = f"L{layer}.mid", on_rows(at, push)
        both, _ = forward_by_hand(model, inputs, {site: change})
        mlp_only, _ = forward_by_hand(model, inputs, {f"L{layer}.mlp_input": change})
        with intervene(model, [Intervention(site, at, lambda x, context: push(x))]):
            edited = model(**inputs).logits
            after = lrqp.capture(model, inputs, [f"L{layer}.post"], at)[f"L{layer}.post"]
        torch.testing.assert_close(edited[real], both[real], **CLOSE)
        assert (edited - mlp_only)[real].abs().max() > 0.1
        # Skip path and MLP, each by its own: post = mid + mlp(norm(mid)).
        clean = lrqp.capture(model, inputs, [f"L{layer}.mid", f"L{layer}.post"], at)
        skip_only = clean[f"L{layer}.post"] + DIRECTION
        assert (after - skip_only).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt_neox_serial"])
@pytest.mark.parametrize("part", ["pre", "mid", "post"])
@torch.no_grad()
def test_padding_on_either_side_and_none_agree(name: str, part: str) -> None:
    """Edited logits of each prompt's own tokens are those of the prompt run alone."""
    model, site = build(name), f"L1.{part}"
    x = lrqp.capture(model, PROMPTS.padded("right"), [site])[site].flatten(0, 1)
    edit = random_edit(x, 3, log_odds=30.0)
    target = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2]])
    logits, distances = {}, {}
    for side in ("left", "right"):
        inputs = PROMPTS.padded(side)
        at = PROMPTS.columns(TOKENS, side)
        with edit.at(model, site, positions=at, target=target) as run:
            output = model(**inputs).logits
        mask = inputs["attention_mask"].bool()
        logits[side] = [row[real] for row, real in zip(output, mask, strict=True)]
        distances[side] = run.distance
    for i in range(4):
        with edit.at(model, site, positions=TOKENS[i : i + 1], target=target[i : i + 1]) as run:
            alone = model(**PROMPTS.alone(i)).logits[0]
        assert (alone - model(**PROMPTS.alone(i)).logits[0]).abs().max() > 0.05
        for side in ("left", "right"):
            torch.testing.assert_close(logits[side][i], alone, rtol=1e-4, atol=2e-4)
            torch.testing.assert_close(distances[side][i], run.distance[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(["L1.pre", "L1.mid", "L1.post"], repeat=2))
)
@torch.no_grad()
def test_two_edits_compose_nested_and_in_one_call(name: str, first: str, second: str) -> None:
    """Edits act in the order of the forward pass; at the same site in the order given."""
    model, inputs = build(name), PROMPTS.padded("left")
    at, real = PROMPTS.columns(TOKENS, "left"), inputs["attention_mask"].bool()
    if first == second:
        by_hand = {first: on_rows(at, lambda x: stretch(push(x)))}
    else:
        by_hand = {first: on_rows(at, push), second: on_rows(at, stretch)}
    expected, _ = forward_by_hand(model, inputs, by_hand)
    one = Intervention(first, at, lambda x, context: push(x))
    two = Intervention(second, at, lambda x, context: stretch(x))
    with intervene(model, [one]):
        with intervene(model, [two]):
            nested = model(**inputs).logits
        outer_only = model(**inputs).logits
    with intervene(model, [one, two]):
        together = model(**inputs).logits
    torch.testing.assert_close(nested[real], expected[real], **CLOSE)
    assert torch.equal(together, nested)
    expected, _ = forward_by_hand(model, inputs, {first: on_rows(at, push)})
    torch.testing.assert_close(outer_only[real], expected[real], **CLOSE)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_the_same_place_by_two_names(name: str) -> None:
    """L0.post is L1.pre: the same edit at either gives the same logits, and both add up."""
    model, inputs = build(name), PROMPTS.padded("left")
    at = PROMPTS.columns(TOKENS, "left")

    def logits(*names: str) -> Tensor:
        with intervene(model, [Intervention(s, at, lambda x, context: push(x)) for s in names]):
            return model(**inputs).logits

    assert torch.equal(logits("L0.post"), logits("L1.pre"))
    assert torch.equal(logits("L0.post", "L1.pre"), logits("L1.pre", "L1.pre"))


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_several_lrqp_edits_at_once_each_reach_their_odds(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    sites = ["L2.pre", "L0.mid", "L1.post"]
    clean = lrqp.capture(model, inputs, sites, inputs["attention_mask"].bool())
    edits = {site: random_edit(clean[site], 3, seed=i) for i, site in enumerate(sites)}
    at = {site: PROMPTS.columns(TOKENS, "left")[:, i % 2] for i, site in enumerate(sites)}
    target = {site: torch.tensor([i, 2, 0, 1]) for i, site in enumerate(sites)}
    items = [edits[s].on(s, positions=at[s], target=target[s]) for s in sites]
    with intervene(model, items) as runs:
        model(**inputs)
        for site, run in zip(sites, runs, strict=True):
            held = lrqp.capture(model, inputs, [site], at[site])[site]
            odds = edits[site].probe.log_odds(held.double(), target[site])
            assert isinstance(run, lrqp.EditRun)
            assert bool((odds >= run.floor).all())
            torch.testing.assert_close(odds, run.log_odds_after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_what_an_edit_is_told(name: str) -> None:
    """The context names the rows; x holds their activations, in the order of the positions."""
    model, inputs = build(name), PROMPTS.padded("left")
    at = PROMPTS.columns(TOKENS, "left")
    for site in SITES:
        told: list[tuple[Tensor, lrqp.EditContext]] = []

        def edit(x: Tensor, context: lrqp.EditContext, told: list[object] = told) -> Tensor:
            told.append((x, context))
            torch.testing.assert_close(context.realise(x.double()), x.double(), **CLOSE)
            return x

        with intervene(model, [Intervention(site, at, edit)]):
            model(**inputs)
        ((x, context),) = told
        assert context.index.tolist() == list(range(8))
        assert context.example.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert context.token.tolist() == at.flatten().tolist()
        assert torch.equal(x, lrqp.capture(model, inputs, [site], at)[site].flatten(0, 1))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_rows_put_by_one_call_are_rows_scattered(dtype: torch.dtype, whole: bool) -> None:
    stream, index = torch.randn(3, 5, 9).to(dtype), torch.arange(15 if whole else 3)
    stream[1, 2, 4] = 0.0
    example, column = (index // 5, index % 5) if whole else (index, torch.tensor([4, 2, 0]))
    at = following.Rows(index, example, column, column, whole=whole)
    held = at.gather(stream).clone()
    assert at.put(stream, held) is stream
    assert at.put(stream, torch.where(held == 0, -held, held)) is stream
    for row, place in itertools.product((0, 1, 2), (0, 8)):
        values = held.clone()
        values[row, place] += 1
        found = at.put(stream, values)
        assert found is not None and torch.equal(found, at.scatter(stream, values))
        for broken in (torch.nan, torch.inf, -torch.inf):
            values[row, place] = broken
            assert at.put(stream, values) is None
    base = torch.randn(3, 5, 9).to(dtype)
    sums, left = at.gather(base) + held, held.clone()
    if dtype.itemsize > 2:
        assert at.put(stream, sums, base) is stream
        sums[1, 3] += 0.25
        left[1] = sums[1] - at.gather(base)[1]
        found = at.put(stream, sums, base)
        assert found is not None and torch.equal(found, at.scatter(stream, left))
        sums[2, 8] = torch.inf
    assert at.put(stream, sums, base) is None
    far = following.Rows(index, example, column + 15, column + 15)
    assert far.put(stream, held) is None
    with torch.enable_grad():
        assert at.put(stream, (held + 1).requires_grad_()) is None
        assert at.put(stream.clone().requires_grad_(), held + 1) is None


@needs_compiler
@pytest.mark.parametrize("site", ["L1.pre", "L1.post", "L1.mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_function_in_one_call_is_the_function_by_operations(
    site: str, dtype: torch.dtype
) -> None:
    """Also where it works in place, keeps some rows or all, and in passes like the first."""
    model, inputs = build("gpt2", dtype=dtype), PROMPTS.padded("right")
    at, bare = torch.tensor([3, 2, 5, 1]), model(**inputs).logits
    edits: list[Callable[[Tensor, object], Tensor]] = [
        lambda x, context: x + DIRECTION.to(dtype),
        lambda x, context: x.add_(DIRECTION),
        lambda x, context: x.index_fill(0, torch.tensor([1]), 2.0),
        lambda x, context: x.clone(),
        lambda x, context: (x + DIRECTION).double(),
        lambda x, context: x.mul_(torch.arange(len(x))[:, None] % 2),
    ]
    for number, edit in enumerate(edits):
        for positions in (at, "all"):
            found = []
            for operations in (False, True):
                with pytest.MonkeyPatch.context() as patch:
                    if operations:
                        patch.setattr(following, "library", lambda: None)
                    with intervene(model, Intervention(site, positions, edit)):
                        found += [model(**inputs).logits for _ in range(3)]
            assert all(torch.equal(found[0], one) for one in found[1:])
            assert torch.equal(found[0], bare) == (number == 3)


@torch.no_grad()
def test_passes_like_the_one_before_are_told_from_others() -> None:
    """The same objects but other tokens are one pass; what else changes is seen."""
    model, inputs = build("gpt2"), PROMPTS.padded("right")
    given = {"use_cache": False, **inputs}
    tokens, mask = given.pop("input_ids"), given["attention_mask"]
    others = [tokens.flip(0), tokens.clone(), tokens]
    at, seen = torch.tensor([3, 2, 5, 1]), []
    alone = []
    for other in others:
        with intervene(model, Intervention("L1.pre", at, lambda x, context: x + DIRECTION)):
            alone.append(model(other, **given).logits)
    with intervene(model, Intervention("L1.pre", at, lambda x, c: seen.append(x) or x + DIRECTION)):
        for _ in range(2):
            for other, logits in zip(others, alone, strict=True):
                assert torch.equal(model(other, **given).logits, logits)
                assert torch.equal(model(input_ids=other, **given).logits, logits)
        assert len(seen) == 12
        with pytest.raises(PositionError):
            model(tokens[:2], **given)
        with pytest.raises(PositionError):
            model(tokens[:2], use_cache=False)
        model(tokens, **given)
        mask[0, 3] = 0
        with pytest.raises(PositionError, match="padding"):
            model(tokens, **given)
        mask[0, 3] = 1
        assert torch.equal(model(tokens, **given).logits, alone[2])
        with torch.no_grad(), pytest.raises(PositionError):
            model(torch.cat([tokens, tokens]), **given)
