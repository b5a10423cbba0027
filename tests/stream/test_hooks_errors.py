"""Bad input raises the right class, says what and where, and leaves no hooks behind."""

from collections.abc import Callable

import pytest
import torch
import transformers
from models_for_tests import POST_MODELS, SITES, WIDTH, Prompts, build, hook_count, random_edit
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch import Intervention, capture, intervene
from lrqp_torch.errors import (
    EditNeverFiredError,
    LRQPError,
    NonFiniteError,
    PositionError,
    SiteError,
    TargetError,
    UnknownFamilyError,
    WidthError,
)

PROMPTS = Prompts.random([6, 4, 5])
AT = torch.tensor([5, 5, 5])
same = Intervention("L1.mid", AT, lambda x, context: x)


def edit_of(model: torch.nn.Module, n_classes: int = 3, **options: object) -> lrqp.LRQP:
    x = lrqp.capture(model, PROMPTS.padded("left"), ["L1.mid"])["L1.mid"].flatten(0, 1)
    return random_edit(x, n_classes, **options)


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: x * torch.nan, NonFiniteError, "NaN"),
        (lambda x: torch.where(torch.arange(3)[:, None] == 1, torch.inf, x), NonFiniteError, "inf"),
        (lambda x: x[:, :-1], WidthError, rf"\(3, {WIDTH - 1}\) for activations \(3, {WIDTH}\)"),
        (lambda x: x[:2], WidthError, rf"\(2, {WIDTH}\)"),
        (lambda x: None, WidthError, "NoneType"),
    ],
)
def test_what_an_edit_returns_is_checked(
    name: str,
    site: str,
    returned: Callable[[Tensor], Tensor],
    error: type[LRQPError],
    message: str,
) -> None:
    model = build(name)
    item = Intervention(site, AT, lambda x, context: returned(x))
    with (
        pytest.raises(error, match=f"{site.replace('.', chr(92) + '.')} returned.*{message}"),
        intervene(model, [same, item]),
    ):
        model(**PROMPTS.padded("left"))
    assert hook_count(model) == 0


@pytest.mark.parametrize("site", ["L1.pre", "L1.mid", "L1.post"])
def test_what_the_stream_cannot_hold_is_an_error(site: str) -> None:
    """A finite float32 that overflows float16 would otherwise become infinity in the model."""
    model = build("gpt2", dtype=torch.float16)
    item = Intervention(site, AT, lambda x, context: x.float() + 1e6)
    with pytest.raises(NonFiniteError, match=r"float16"), intervene(model, [item]):
        model(**PROMPTS.padded("left"))
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
def test_a_context_without_a_forward_pass_is_an_error(name: str) -> None:
    model = build(name)
    with (
        pytest.raises(EditNeverFiredError, match=r"L1\.mid never ran at 3 of 3.*\(0, 5\)"),
        intervene(model, [same]),
    ):
        pass
    with (
        pytest.raises(EditNeverFiredError, match=r"L1\.mid never ran"),
        edit_of(model).at(model, "L1.mid", positions=AT, target=1),
    ):
        build(name)(**PROMPTS.padded("left"))  # another model, not the edited one
    assert hook_count(model) == 0


def test_one_of_several_edits_that_never_ran_is_named() -> None:
    """A capture ends the forward pass before the later edit."""
    model = build("gpt2")
    late = Intervention("L2.post", AT, lambda x, context: x)
    with (
        pytest.raises(EditNeverFiredError, match=r"L2\.post never ran"),
        intervene(model, [same, late]),
    ):
        lrqp.capture(model, PROMPTS.padded("left"), ["L1.post"])
    assert hook_count(model) == 0


class OwnError(Exception):
    pass


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("kind", [OwnError, KeyboardInterrupt])
def test_the_bodys_own_exception_is_not_masked(name: str, kind: type[BaseException]) -> None:
    model = build(name)
    raised = kind("mine")
    with pytest.raises(kind) as caught, intervene(model, [same]), intervene(model, [same]):
        raise raised
    assert caught.value is raised
    assert hook_count(model) == 0
    with (
        pytest.raises(kind) as caught,
        edit_of(model).at(model, "L1.mid", positions=AT, target=1),
    ):
        model(**PROMPTS.padded("left"))
        raise raised
    assert caught.value is raised
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", POST_MODELS)
def test_an_exception_inside_the_forward_leaves_no_hooks(name: str) -> None:
    model, inputs = build(name), PROMPTS.padded("left")
    clean = model(**inputs).logits

    def fail(x: Tensor, context: lrqp.EditContext) -> Tensor:
        raise OwnError("in the edit")

    for site in SITES:
        with (
            pytest.raises(OwnError, match="in the edit"),
            intervene(model, [same]),
            intervene(model, [Intervention(site, AT, fail)]),
        ):
            model(**inputs)
        assert hook_count(model) == 0
    assert torch.equal(model(**inputs).logits, clean)


def test_a_failed_forward_may_be_tried_again_inside_the_context() -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    push = Intervention("L1.mid", AT, lambda x, context: x + 1)
    with intervene(model, [push]):
        expected = model(**inputs).logits
    with intervene(model, [push]):
        with pytest.raises(PositionError):
            model(input_ids=inputs["input_ids"][:2])
        with pytest.raises(IndexError):
            model(input_ids=inputs["input_ids"] + 1000)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("name", "site", "error", "message"),
    [
        ("gpt2", "L3.pre", SiteError, r"L3\.pre: the model has 3 blocks, L0 to L2"),
        ("llama", "L1.out", SiteError, r"'L1\.out' is no site"),
        ("gpt_neox_parallel", "L1.mid", SiteError, "parallel"),
    ],
)
def test_a_bad_site_is_refused_on_entering(
    name: str, site: str, error: type[LRQPError], message: str
) -> None:
    model = build(name)
    ok = Intervention("L0.pre", AT, lambda x, context: x)
    with (
        pytest.raises(error, match=message),
        intervene(model, [ok, Intervention(site, AT, lambda x, context: x)]),
    ):
        pytest.fail("the body ran")
    assert hook_count(model) == 0


def test_a_model_whose_blocks_are_not_found_is_refused_on_entering() -> None:
    # One block runs three times, so that no place in it is one place of the model.
    config = transformers.AlbertConfig(
        vocab_size=61,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.AlbertForMaskedLM(config).eval()
    with pytest.raises(UnknownFamilyError, match="share their weights"), intervene(model, [same]):
        pytest.fail("the body ran")
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, "target holds 3.*classes 0 to 2"),
        (torch.tensor([0, -1, 1]), "target holds -1.*classes 0 to 2"),
        (torch.tensor([0.0, 1.0, 1.0]), "integer class.*float32"),
        (torch.tensor([True, False, True]), "integer class.*bool"),
        (torch.tensor([0, 1]), r"target has shape \(2,\).*\(3,\)"),
        (torch.zeros(3, 2, dtype=torch.long), r"target has shape \(3, 2\)"),
    ],
)
def test_bad_targets_are_named(target: Tensor | int, message: str) -> None:
    model = build("gpt2")
    edit = edit_of(model)
    with (
        pytest.raises(TargetError, match=message),
        edit.at(model, "L1.mid", positions=AT, target=target),
    ):
        model(**PROMPTS.padded("left"))
    with (
        pytest.raises(TargetError, match=message.replace("target", "source")),
        edit.at(model, "L1.mid", positions=AT, target=0, source=target),
    ):
        model(**PROMPTS.padded("left"))
    assert hook_count(model) == 0


def test_an_edit_of_another_width_is_refused() -> None:
    model = build("gpt2")
    narrow = random_edit(torch.randn(50, WIDTH // 2), 3)
    with (
        pytest.raises(WidthError, match=rf"\(B, {WIDTH // 2}\), got \(3, {WIDTH}\)"),
        narrow.at(model, "L1.mid", positions=AT, target=1),
    ):
        model(**PROMPTS.padded("left"))
    assert hook_count(model) == 0


def test_overflow_upstream_of_the_site_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[PROMPTS.tokens[1][-1]] = torch.nan
    edit = edit_of(build("llama"))
    with (
        pytest.raises(NonFiniteError, match=r"examples hold NaN.*first are \[.*1"),
        edit.at(model, "L1.mid", positions=AT, target=1),
    ):
        model(**PROMPTS.padded("left"))
    assert hook_count(model) == 0


def test_things_that_are_no_interventions_are_refused_by_name() -> None:
    model = build("gpt2")
    for wrong in ([object()], ["L1.mid"]):
        with (
            pytest.raises(SiteError, match="takes a list of Intervention"),
            intervene(model, wrong),  # type: ignore[arg-type]
        ):
            pass
    assert hook_count(model) == 0


def test_one_intervention_and_one_site_need_no_list() -> None:
    model = build("gpt2")
    inputs = {"input_ids": torch.arange(8).reshape(2, 4)}
    at = torch.tensor([1, 2])
    with intervene(model, Intervention("L1.mid", at, lambda x, context: x + 1)):
        edited = capture(model, inputs, "L1.mid", at)["L1.mid"]
    torch.testing.assert_close(edited, capture(model, inputs, ["L1.mid"], at)["L1.mid"] + 1)
    with pytest.raises(WidthError, match="must be a mapping"):
        capture(model, inputs["input_ids"], "L1.mid")  # type: ignore[arg-type]
