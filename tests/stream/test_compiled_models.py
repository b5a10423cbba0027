"""Compiled models: every hook fires, the results are eager's, and the graphs are used again."""

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from models_for_tests import Prompts, build, hook_count, random_edit
from torch import Tensor, nn

import lrqp_torch as lrqp
from lrqp_torch.errors import CompiledModelError
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.compiled import CompiledModelWarning, is_compiled, run_eagerly
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.replay import Replay

PROMPTS = Prompts.random([9, 6, 12, 7])
INPUTS = PROMPTS.padded("right")
AT, TARGET = torch.tensor([3, 2, 4, 5]), torch.tensor([0, 1, 2, 1])


class Graphs:
    """A backend that counts how often its graphs run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def whole(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def its_forward(model: nn.Module, backend: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def its_trunk(model: Any, backend: Any) -> nn.Module:
    model.transformer = torch.compile(model.transformer, backend=backend)
    return model


def its_blocks(model: Any, backend: Any) -> nn.Module:
    for n, block in enumerate(model.transformer.h):
        model.transformer.h[n] = torch.compile(block, backend=backend)
    return model


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@cache
def reference() -> tuple[lrqp.LRQP, dict[str, Tensor]]:
    """An edit, and what it and every reading yield on a model that was never compiled."""
    model = build("gpt2")
    edit = random_edit(read(model), 3, log_odds=20.0)
    return edit, results(model, edit)


def read(model: nn.Module) -> Tensor:
    return lrqp.capture(model, INPUTS, ["L1.mid"], INPUTS["attention_mask"].bool())["L1.mid"]


@torch.no_grad()
def results(model: Any, edit: lrqp.LRQP) -> dict[str, Tensor]:
    found = {"clean": model(**INPUTS).logits, "captured": read(model)}
    for site in ("L1.pre", "L1.mid", "L1.post"):
        with edit.at(model, site, positions=AT, target=TARGET) as run:
            found[f"edited at {site}"] = model(**INPUTS).logits
        assert bool((run.log_odds_after >= run.floor).all())
    replay = Replay(model, INPUTS, 2)
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        found["replayed"] = replay.run(1)
    with record_heads(model, [1], AT) as heads, record_patterns(model, [1], AT) as patterns:
        model(**INPUTS)
    found["heads"], found["patterns"] = heads[1], patterns[1]
    found["clean afterwards"] = model(**INPUTS).logits
    return found


@pytest.mark.parametrize("compiled", [whole, in_place, its_forward, its_trunk, its_blocks])
@torch.no_grad()
def test_results_are_eagers_and_the_graphs_are_used_again(compiled: Any) -> None:
    edit, wanted = reference()
    graphs = Graphs()
    model = compiled(build("gpt2"), graphs)
    model(**INPUTS)
    assert is_compiled(model)
    warm = graphs.runs
    assert warm > 0
    with pytest.warns(CompiledModelWarning, match="GPT2LMHeadModel is compiled"):
        found = results(model, edit)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert (wanted["edited at L1.mid"] - wanted["clean"]).abs().max() > 0.1
    assert hook_count(model) == 0
    before = graphs.runs
    model(**INPUTS)
    assert graphs.runs - before == warm


@torch.no_grad()
def test_a_model_first_called_within_a_context_keeps_no_trace_of_its_hooks() -> None:
    edit, wanted = reference()
    graphs = Graphs()
    model = whole(build("gpt2"), graphs)
    with (
        pytest.warns(CompiledModelWarning),
        edit.at(model, "L1.mid", positions=AT, target=TARGET),
    ):
        edited = model(**INPUTS).logits
        assert graphs.runs == 0
    torch.testing.assert_close(edited, wanted["edited at L1.mid"])
    torch.testing.assert_close(model(**INPUTS).logits, wanted["clean"])
    assert graphs.runs > 0


@torch.no_grad()
def test_a_function_compiled_around_the_model_is_edited_too() -> None:
    edit, wanted = reference()
    model = build("gpt2")
    step = torch.compile(lambda **inputs: model(**inputs).logits, backend=Graphs())
    torch.testing.assert_close(step(**INPUTS), wanted["clean"])
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        torch.testing.assert_close(step(**INPUTS), wanted["edited at L1.mid"])
    torch.testing.assert_close(step(**INPUTS), wanted["clean"])


@torch.no_grad()
def test_a_context_inside_a_compiled_function_is_refused() -> None:
    edit, wanted = reference()
    model = build("gpt2")

    def step() -> Tensor:
        with edit.at(model, "L1.mid", positions=AT, target=TARGET):
            return model(**INPUTS).logits

    with pytest.raises(CompiledModelError, match="open the context around that function"):
        torch.compile(step, backend="eager")()
    assert hook_count(model) == 0
    torch.testing.assert_close(step(), wanted["edited at L1.mid"])


@torch.no_grad()
def test_generation_with_a_static_cache_equals_generation_without_compilation() -> None:
    edit, _ = reference()
    tokens = {"input_ids": PROMPTS.tokens[0][None], "attention_mask": torch.ones(1, 9).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def generate(model: Any, **further: Any) -> Tensor:
        with edit.at(model, "L1.mid", positions=AT[:1], target=TARGET[:1]):
            return model.generate(**tokens, **options, **further)

    wanted = generate(build("gpt2"))
    model = build("gpt2")
    assert torch.equal(generate(model, cache_implementation="static"), wanted)
    compiled = whole(build("gpt2"), Graphs())
    with pytest.warns(CompiledModelWarning):
        assert torch.equal(generate(compiled, cache_implementation="static"), wanted)


def test_a_model_that_transformers_compiles_within_a_context_is_named() -> None:
    model: Any = build("gpt2")
    with pytest.warns(CompiledModelWarning), run_eagerly(model):
        model._compiled_call = object()  # what generate does at its first compiled token


def test_an_uncompiled_model_is_not_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(build("gpt2"))


def test_compilation_is_off_until_the_last_context_closes_in_whatever_order() -> None:
    model, graphs = build("gpt2"), Graphs()
    double = torch.compile(lambda x: 2 * x, backend=graphs)

    def runs() -> int:
        before = graphs.runs
        double(torch.ones(3))
        return graphs.runs - before

    first, second = run_eagerly(model), run_eagerly(model)
    first.__enter__()
    opened = threading.Thread(target=second.__enter__)
    opened.start()
    opened.join()
    first.__exit__(None, None, None)
    assert runs() == 0
    second.__exit__(None, None, None)
    assert runs() == 1
    with pytest.raises(KeyError), run_eagerly(model):
        raise KeyError
    assert runs() == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::lrqp_torch.stream.compiled.CompiledModelWarning")
@torch.no_grad()
def test_the_default_compiler() -> None:
    edit, _ = reference()
    model = torch.compile(build("gpt2", n_layer=1))
    eager = build("gpt2", n_layer=1)
    torch.testing.assert_close(model(**INPUTS).logits, eager(**INPUTS).logits, rtol=1e-4, atol=1e-4)
    found = []
    for each in (model, eager):
        with edit.at(each, "L0.mid", positions=AT, target=TARGET) as run:
            found.append(each(**INPUTS).logits)
        assert bool((run.log_odds_after >= run.floor).all())
    assert torch.equal(*found)
    torch.testing.assert_close(model(**INPUTS).logits, eager(**INPUTS).logits, rtol=1e-4, atol=1e-4)
