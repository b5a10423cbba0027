"""Bad input raises the right class, says what and where, and leaves no hooks behind."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from models_for_tests import POST_MODELS, SITES, WIDTH, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lrqp_torch as lrqp
from lrqp_torch import Intervention, capture, intervene
from lrqp_torch.errors import (
    EditNeverFiredError,
    EditOverwrittenError,
    LRQPError,
    ModelError,
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


@pytest.mark.parametrize("known", [False, True])
def test_where_tensors_have_no_values_nothing_is_opened(known: bool) -> None:
    model, inputs = build("gpt2"), PROMPTS.padded("left")
    edit = random_edit(torch.randn(60, WIDTH), 3, log_odds=20.0)
    if known:
        capture(model, inputs, ["L1.mid"], AT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(ModelError, match="shapes and no values, so GPT2LMHeadModel"):
            capture(model, inputs, ["L1.mid"], AT)
        with (
            pytest.raises(ModelError, match="leave that mode first"),
            edit.at(model, "L1.mid", positions=AT, target=1),
        ):
            pass
        with pytest.raises(ModelError, match="FakeTensorMode"), intervene(model, [same]):
            pass
    assert hook_count(model) == 0
    with edit.at(model, "L1.mid", positions=AT, target=1) as run:
        model(**inputs)
    assert bool((run.log_odds_after >= run.floor).all())


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
        (torch.tensor([True, False, True]).to(torch.complex64), "integer class.*complex64"),
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


V = torch.linspace(-1, 1, WIDTH)


def adds(module: Any, args: Any, output: Any) -> Any:
    return (output[0] + V, *output[1:]) if isinstance(output, tuple) else output + V


def adds_in_place(module: Any, args: Any, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).add_(V)


def adds_before(module: Any, args: Any, kwargs: Any) -> Any:
    return ((args[0] + V, *args[1:]), kwargs) if args else (args, {"hidden_states": V})


def set_on(module: nn.Module, how: str) -> Any:
    if "before" in how:
        register = module.register_forward_pre_hook
        return register(adds_before, with_kwargs=True, prepend="first" in how)
    return module.register_forward_hook(adds_in_place if "place" in how else adds)


@pytest.mark.parametrize("when", ["earlier", "within", "after three passes"])
@pytest.mark.parametrize(
    ("site", "where", "how", "changes"),
    [
        ("L1.pre", "h.1", "before", True),
        ("L1.pre", "h.1", "before, first", False),
        ("L1.pre", "h.0", "behind", False),
        ("L1.mid", "h.1.attn", "behind", True),
        ("L1.mid", "h.1.attn", "in place", True),
        ("L1.mid", "h.1.attn.c_proj", "behind", False),
        ("L1.mid", "h.1.ln_1", "before", False),
        ("L1.mid", "h.1.ln_1", "before, first", False),
        ("L1.post", "h.1", "behind", True),
        ("L1.post", "h.1", "in place", True),
        ("L1.H2.z", "h.1.attn.c_proj", "before", True),
    ],
)
@torch.no_grad()
def test_what_is_certified_is_what_the_model_holds_or_a_later_hook_is_named(
    site: str, where: str, how: str, changes: bool, when: str
) -> None:
    """Hooks of one's own, and the stream as the module is given it that reads it next."""
    model: Any = build("gpt2")
    block, inputs, seen = model.transformer.h[1], PROMPTS.padded("left"), list[Tensor]()
    readers = {"pre": block.ln_1, "mid": block.ln_2, "post": model.transformer.h[2].ln_1}
    reader = readers.get(site[3:], block.attn.c_proj)
    edit = random_edit(lrqp.capture(model, inputs, site)[site].flatten(0, 1), 3, log_odds=20.0)
    everywhere = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if module is reader else None
    )
    hook, module = None, model.transformer.get_submodule(where)
    loud = changes and when != "earlier"
    try:
        hook = set_on(module, how) if when == "earlier" else None
        with (
            pytest.raises(EditOverwrittenError, match="was set on") if loud else nullcontext(),
            edit.at(model, site, positions=AT, target=1) as run,
        ):
            for _ in range(3 if when == "after three passes" else 0):
                model(**inputs)
            hook = hook or set_on(module, how)
            model(**inputs)
    finally:
        everywhere.remove()
        hook.remove()
    if not loud and not site.endswith("z"):
        logits = edit.probe(seen[-1][torch.arange(3), AT].double())
        margins = (logits[:, [1]] - logits[:, [0, 2]]).amin(1)
        torch.testing.assert_close(margins, run.log_odds_after[-3:], rtol=1e-4, atol=1e-4)
    assert hook_count(model) == 0 and "register_forward_hook" not in vars(module)


@torch.no_grad()
def test_later_hooks_that_leave_the_edited_rows_alone_may_read_and_change_others() -> None:
    model: Any = build("gpt2")
    edit, inputs, seen = edit_of(model, log_odds=20.0), PROMPTS.padded("left"), list[Tensor]()
    others = torch.arange(6) != AT[0]

    def elsewhere(module: Any, args: Any, output: Any) -> Any:
        return (torch.where(others[:, None], 2 * output[0], output[0]), *output[1:])

    attention, other = model.transformer.h[1].attn, lrqp.Intervention("L1.mid", AT, lambda x, c: x)
    with edit.at(model, "L1.mid", positions=AT, target=1) as run:
        attention.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        handle = attention.register_forward_hook(elsewhere)
        copied = copy.deepcopy(attention)
        with intervene(model, other):
            for _ in range(3):
                model(**inputs)
        handle.remove()
        model(**inputs)
    assert len(seen) == len(run.steps) == 4 and hook_count(model) == 1
    assert len(copied._forward_hooks) == 2 and "register_forward_hook" not in vars(copied)
    assert torch.equal(seen[0][:, AT[0]], seen[3][:, AT[0]])
    # What no promise is made of may be changed.
    with intervene(model, other):
        attention.register_forward_hook(adds)
        model(**inputs)


def test_a_module_that_was_replaced_within_a_context_is_missed() -> None:
    model: Any = build("gpt2")
    attention = model.transformer.h[1].attn
    edit = random_edit(capture(model, PROMPTS.padded("left"), "L1.z")["L1.z"].flatten(0, 1), 3)
    with (
        pytest.raises(EditNeverFiredError, match=r"Conv1D that L1\.z names was replaced"),
        edit.at(model, "L1.z", positions=AT, target=1),
    ):
        model(**PROMPTS.padded("left"))
        attention.c_proj = nn.Sequential(attention.c_proj)


@pytest.mark.parametrize("path", ["transformer.h.1", "transformer.h", "transformer"])
@pytest.mark.parametrize("wraps", [False, True])
@torch.no_grad()
def test_a_module_around_that_was_replaced_is_missed_too_unless_it_was_wrapped(
    path: str, wraps: bool
) -> None:
    """What was edited is looked for at its own place, not only in what has held it."""
    model: Any = build("gpt2")
    inputs, module, parent = PROMPTS.padded("left"), model.get_submodule(path), path.rpartition(".")
    if wraps and isinstance(module, nn.ModuleList):
        pytest.skip("a list is not run")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.within = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.within(*args, **kwargs)

    edit = random_edit(capture(model, inputs, "L1.mid")["L1.mid"].flatten(0, 1), 3)
    missed = pytest.raises(EditNeverFiredError, match="a module around it was")
    with nullcontext() if wraps else missed, edit.at(model, "L1.mid", positions=AT, target=1):
        before = model(**inputs).logits
        made = Wrapper() if wraps else copy.deepcopy(module)
        setattr(model.get_submodule(parent[0]), parent[2], made)
        assert torch.equal(model(**inputs).logits, before) is wraps


@torch.no_grad()
def test_a_module_of_a_plain_model_that_was_replaced_is_missed() -> None:
    model, x = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU()), torch.randn(20, 5)
    edit, site = random_edit(model[0](x), 2), lrqp.Site.module("0", "output")
    with (
        pytest.raises(EditNeverFiredError, match="was replaced"),
        edit.at(model, site, positions="all", target=1),
    ):
        model(x)
        model[0] = copy.deepcopy(model[0])
        model(x)


@torch.no_grad()
def test_a_model_that_is_put_into_training_mode_within_a_context_is_warned_of() -> None:
    model = build("gpt2")
    with pytest.warns(UserWarning, match="drops out activations"), intervene(model, same):
        model(**PROMPTS.padded("left"))
        model.train()
