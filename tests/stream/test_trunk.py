"""A pass of a model is noted around its trunk's ``forward``, whoever calls or wraps that."""

import functools
import inspect
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from models_for_tests import WIDTH, Prompts, build, hook_count, random_edit
from torch import Tensor, nn

from lrqp_torch.errors import EditNeverFiredError, PositionError
from lrqp_torch.files import digest_model
from lrqp_torch.stream.compiled import own_forward

INPUTS = Prompts.random([7, 7, 7, 7]).padded("right")
IDS = INPUTS["input_ids"]
AT = torch.tensor([1, 2, 3, 0])
SITES = ["L0.pre", "L1.mid", "L2.post"]
EDIT = random_edit(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)), 2)
PASSES = 4
"""The third pass of a context is the first that compiled code knows."""


def opened(model: Any, site: str = "L1.mid", at: Any = AT) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = EDIT.at(model, site, positions=at, target=1)
    return context


def logits(model: Any) -> Tensor:
    found: Tensor = model(**INPUTS).logits
    return found


def directly(model: Any) -> Tensor:
    found: Tensor = model.lm_head(model.transformer.forward(**INPUTS).last_hidden_state)
    return found


def by_place(model: Any) -> Tensor:
    found = model.transformer(IDS, None, INPUTS["attention_mask"], return_dict=False)[0]
    return model.lm_head(found)  # type: ignore[no-any-return]


def functionally(model: Any) -> Tensor:
    output = torch.func.functional_call(model, dict(model.named_parameters()), (), INPUTS)
    return output.logits  # type: ignore[no-any-return]


def checkpointed(model: Any) -> Tensor:
    found = torch.utils.checkpoint.checkpoint(logits, model, use_reentrant=False)
    return found  # type: ignore[no-any-return]


def wrapped(model: nn.Module) -> nn.Module:
    """A trunk with a function of one's own around its forward."""
    trunk: Any = model.transformer
    plain = trunk.forward
    trunk.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    return model


def aligned(model: nn.Module) -> nn.Module:
    hooks: Any = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.transformer, hooks.AlignDevicesHook("cpu"))
    return model


def hooked(model: nn.Module) -> nn.Module:
    """A trunk whose own hooks look at all that comes and goes."""
    trunk: Any = model.transformer
    trunk.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs}), with_kwargs=True)
    trunk.register_forward_hook(lambda _, args, kwargs, output: output, with_kwargs=True)
    return model


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("run", [logits, directly, by_place, functionally, checkpointed])
@torch.no_grad()
def test_however_a_pass_is_begun_it_is_edited_and_recorded(
    run: Callable[[Any], Tensor], site: str
) -> None:
    model: Any = build("gpt2")
    with opened(model, site) as expected:
        wanted = logits(model)
    with opened(model, site) as found:
        assert all(torch.equal(run(model), wanted) for _ in range(PASSES))
    assert [step.forward_pass for step in found.steps] == [*range(PASSES)]
    assert torch.equal(found.log_odds_after, expected.log_odds_after)
    assert hook_count(model) == 0 and "forward" not in vars(model.transformer)


@pytest.mark.parametrize("when", ["before", "within", "between"])
@pytest.mark.parametrize("change", [wrapped, aligned, hooked])
@torch.no_grad()
def test_what_is_put_around_a_forward_hides_no_pass_and_counts_none_twice(
    change: Callable[[nn.Module], nn.Module], when: str
) -> None:
    """Whenever it is put there: before a context, within it, or between it and one within that."""
    model: Any = build("gpt2")
    with opened(model), opened(model, "L2.post"):
        wanted = logits(model)
    if when == "before":
        change(model)
    before = vars(model.transformer).get("forward")
    first, second = opened(model), opened(model, "L2.post")
    with first as outer:
        if when == "between":
            change(model)
        with second as inner:
            if when == "within":
                change(model)
            assert all(torch.equal(logits(model), wanted) for _ in range(PASSES))
        logits(model)
    for run, passes in ((outer, PASSES + 1), (inner, PASSES)):
        assert [step.forward_pass for step in run.steps] == [*range(passes)]
    if when == "before":
        assert vars(model.transformer).get("forward") is before
    with opened(model), opened(model, "L2.post"):
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), logits(build("gpt2")))


@pytest.mark.parametrize("when", ["before", "within"])
@torch.no_grad()
def test_a_pass_is_what_the_forward_is_given_whatever_hooks_made_of_it(when: str) -> None:
    """Here a token less: positions are those of what the model reads."""
    model, shorter = build("gpt2"), {name: value[:, 1:] for name, value in INPUTS.items()}

    def cut(module: Any, args: Any, kwargs: Any) -> Any:
        rest = {name: kwargs[name][:, 1:] for name in INPUTS if name in kwargs}
        return tuple(value[:, 1:] for value in args), kwargs | rest

    with opened(model, at="all") as expected:
        wanted = model(**shorter).logits
    trunk: Any = model.transformer
    if when == "before":
        handle = trunk.register_forward_pre_hook(cut, with_kwargs=True)
    with opened(model, at="all") as run:
        if when == "within":
            handle = trunk.register_forward_pre_hook(cut, with_kwargs=True)
        assert all(torch.equal(logits(model), wanted) for _ in range(PASSES))
    assert torch.equal(run.steps[-1].token, expected.steps[0].token)
    handle.remove()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@torch.no_grad()
def test_a_pass_that_breaks_off_is_over(kind: type[BaseException]) -> None:
    model: Any = build("gpt2")
    block = model.transformer.h[1]

    def stop(*_: Any) -> None:
        raise kind("here")

    with opened(model, "L2.post") as run:
        wanted = logits(model)
        for _ in range(PASSES):
            handle = block.register_forward_pre_hook(stop)
            with pytest.raises(kind, match="here"):
                logits(model)
            handle.remove()
            # What runs on its own now belongs to no pass.
            with pytest.raises(PositionError, match="outside of a forward pass"):
                model.transformer.h[2](torch.zeros(4, 7, WIDTH))
            assert torch.equal(logits(model), wanted)
    assert len(run.steps) == 1 + PASSES


@torch.no_grad()
def test_a_forward_that_replaces_the_noted_one_is_said() -> None:
    """Nothing is edited at a place that one cannot tell, or passed over."""
    model: Any = build("gpt2")
    trunk = model.transformer
    with (
        pytest.raises(PositionError, match="its forward was replaced"),
        opened(model),
    ):
        trunk.forward = lambda *args, **kwargs: type(trunk).forward(trunk, *args, **kwargs)
        logits(model)


@torch.no_grad()
def test_a_forward_put_back_within_a_context_is_noted_again() -> None:
    """As of who wrapped it, where another context has opened meanwhile."""
    model: Any = build("gpt2")
    trunk = model.transformer
    with opened(model) as expected:
        wanted = logits(model)
    with opened(model) as run:
        noted = trunk.forward
        wrapped(model)
        with opened(model, "L2.post"):
            logits(model)
        trunk.forward = noted
        assert all(torch.equal(logits(model), wanted) for _ in range(PASSES))
    assert len(run.steps) == 1 + PASSES
    assert torch.equal(run.steps[-1].log_odds_after, expected.log_odds_after)
    clean = logits(model)
    assert torch.equal(clean, logits(build("gpt2")))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), clean)


@torch.no_grad()
def test_a_replica_runs_as_it_is_and_is_named_where_it_was_missed() -> None:
    """As of ``DataParallel``, which runs replicas in threads of its own."""
    model: Any = build("gpt2")
    clean, found = logits(model), list[Any]()

    def work() -> None:
        with torch.no_grad():
            replica = model.transformer._replicate_for_data_parallel()
            for name, child in model.transformer._modules.items():
                replica._modules[name] = child
            found.append(replica(**INPUTS).last_hidden_state)

    with pytest.raises(EditNeverFiredError, match="Other threads ran the model"), opened(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert torch.equal(model.lm_head(found[0]), clean)


def test_a_forward_within_a_context_takes_what_it_took() -> None:
    """Generation looks at what a stack takes, and gives it that."""
    trunk: Any = build("gpt2").transformer
    before = inspect.signature(trunk.forward)
    with opened(trunk, "L1.post"):
        assert "forward" in vars(trunk) and inspect.signature(trunk.forward) == before
        trunk(**INPUTS)


@torch.no_grad()
def test_a_wrapper_that_has_a_contexts_attributes_is_none_of_a_context() -> None:
    """``functools.wraps`` copies them; what it wraps is looked at as any other replacement is."""
    model: Any = build("gpt2")
    for module in (model.transformer.h[1], model.transformer):
        before = digest_model(model)
        with opened(model):
            noted = module.forward
            module.forward = functools.wraps(noted)(lambda *args, **given: noted(*args, **given))  # noqa: B023
            expected = logits(model)
            assert own_forward(module) is vars(module)["forward"]
        assert own_forward(module) is vars(module)["forward"] and digest_model(model) != before
        with opened(model):
            assert torch.equal(logits(model), expected)
        del module.forward
        assert digest_model(model) == before
