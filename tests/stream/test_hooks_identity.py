"""An edit that changes nothing changes nothing: the same logits, bit for bit."""

import pytest
import torch
from models_for_tests import (
    POST_MODELS,
    SITES,
    WITH_MID,
    Prompts,
    build,
    hook_count,
    random_edit,
)
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.errors import LRQPError

PROMPTS = Prompts.random([7, 4, 9, 6])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def negative_zero_safe_equal(a: Tensor, b: Tensor) -> bool:
    """Equality of the stored bits, which torch.equal is not for zeros of different sign."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_an_edit_that_returns_its_input_leaves_every_bit(
    name: str, attention: str, dtype: torch.dtype, side: str
) -> None:
    model, inputs = build(name, dtype=dtype, attention=attention), PROMPTS.padded(side)
    clean = model(**inputs).logits
    at = PROMPTS.columns(torch.tensor([[0, 3], [1, 3], [2, 8], [5, 3]]), side)
    real = inputs["attention_mask"].bool()
    for site in SITES:
        for positions in (at[:, 0], at, real):
            seen = []

            def same(x: Tensor, context: lrqp.EditContext, seen: list[int] = seen) -> Tensor:
                seen.append(len(x))
                return x

            with lrqp.intervene(model, [lrqp.Intervention(site, positions, same)]):
                edited = model(**inputs).logits
            assert seen == [len(lrqp.stream.positions.Positions.parse(positions).token)]
            assert negative_zero_safe_equal(edited, clean), site


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_satisfied_target_leaves_every_bit(name: str, attention: str, dtype: torch.dtype) -> None:
    model, inputs = build(name, dtype=dtype, attention=attention), PROMPTS.padded("left")
    clean = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    at = PROMPTS.columns(torch.tensor([2, 3, 8, 0]), "left")
    for site in SITES:
        everywhere = lrqp.capture(model, inputs, [site], real)[site]
        edit = random_edit(everywhere, 3, rule="fixed", log_odds=1e-9)
        x = lrqp.capture(model, inputs, [site], at)[site]
        held = edit.probe(x.double()).argmax(-1)
        with edit.at(model, site, positions=at, target=held) as run:
            edited = model(**inputs).logits
        assert run.status.tolist() == [lrqp.Status.SATISFIED] * 4
        assert negative_zero_safe_equal(edited, clean), site
        with edit.at(model, site, positions=at, target=(held + 1) % 3):
            assert not torch.equal(model(**inputs).logits, clean)


@pytest.mark.parametrize("name", WITH_MID)
@torch.no_grad()
def test_only_the_edited_rows_change_at_the_site(name: str) -> None:
    """Rows that an edit leaves alone keep their bits, also next to rows that it changes."""
    model, inputs = build(name, dtype=torch.bfloat16), PROMPTS.padded("left")
    at = PROMPTS.columns(torch.tensor([2, 3, 5, 4]), "left")

    def some(x: Tensor, context: lrqp.EditContext) -> Tensor:
        return torch.where((context.example % 2 == 0)[:, None], x + 1, x)

    for site in SITES:
        before = lrqp.capture(model, inputs, [site])[site]
        with lrqp.intervene(model, [lrqp.Intervention(site, at, some)]):
            after = lrqp.capture(model, inputs, [site])[site]
        changed = (before != after).any(-1).nonzero().tolist()
        assert changed == [[0, int(at[0])], [2, int(at[2])]]


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_bits_of_the_model_are_its_own_again_after_the_context(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    clean = model(**inputs).logits
    item = lrqp.Intervention("L1.mid", torch.tensor([8, 8, 8, 8]), lambda x, context: 3 * x)
    with lrqp.intervene(model, [item]):
        assert not torch.equal(model(**inputs).logits, clean)
    assert torch.equal(model(**inputs).logits, clean)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert hook_count(model) == 0


@pytest.mark.parametrize("site", ["L1.pre", "L1.mid", "L1.post"])
@torch.no_grad()
def test_an_edit_that_works_in_place_counts(site: str) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    at = torch.tensor([8, 8, 8, 8])
    results = []
    for edit in (lambda x, context: x + 1, lambda x, context: x.add_(1)):
        with lrqp.intervene(model, [lrqp.Intervention(site, at, edit)]):
            results.append(model(**inputs).logits)
    assert torch.equal(*results)
    assert not torch.equal(results[0], model(**inputs).logits)


def test_training_mode_with_dropout_warns() -> None:
    inputs = Prompts.random([4]).padded("left")
    item = lrqp.Intervention("L1.mid", torch.tensor([2]), lambda x, context: x)
    for name, changes in (("gpt2", {}), ("llama", {"attention_dropout": 0.1})):
        model = build(name, **changes).train()
        with pytest.warns(UserWarning, match=r"drops out.*model\.eval"):
            lrqp.capture(model, inputs, ["L1.mid"])
        with (
            pytest.warns(UserWarning, match=r"drops out.*model\.eval"),
            lrqp.intervene(model, [item]),
        ):
            model(**inputs)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "train"), [("gpt2", False), ("llama", True), ("llama", False)])
def test_no_warning_where_nothing_is_dropped(name: str, train: bool) -> None:
    model = build(name).train(train)
    lrqp.capture(model, Prompts.random([4]).padded("left"), ["L1.mid"])


def test_no_interventions_is_an_error() -> None:
    with pytest.raises(LRQPError, match="no interventions"), lrqp.intervene(build("gpt2"), []):
        pytest.fail("the body ran")
