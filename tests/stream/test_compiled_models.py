"""Compiled models: edits are in their graphs, all else fires, and the results are eager's."""

import asyncio
import contextvars
import copy
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from models_for_tests import Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CompileConfig
from zoo_for_tests import OLDEST, build_tiny

import lrqp_torch as lrqp
from lrqp_torch import intervene
from lrqp_torch.errors import (
    CompiledModelError,
    EditNeverFiredError,
    EditOverwrittenError,
    EditOverwrittenWarning,
    NonFiniteError,
    PositionError,
)
from lrqp_torch.files import digest_model
from lrqp_torch.stream import following, traced, watch
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.compiled import CompiledModelWarning, is_compiled, run_eagerly
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.traced import may_trace

PROMPTS = Prompts.random([9, 6, 12, 7])
INPUTS = PROMPTS.padded("right")
AT, TARGET = torch.tensor([3, 2, 4, 5]), torch.tensor([0, 1, 2, 1])


class Graphs:
    """A backend that counts its graphs, and how often they run."""

    def __init__(self) -> None:
        self.runs = self.made = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.made += 1

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


def edited(model: Any, edit: lrqp.LRQP, site: str = "L1.mid", at: Tensor = AT) -> Tensor:
    with edit.at(model, site, positions=at, target=TARGET) as run:
        logits = model(**INPUTS).logits
    assert bool((run.log_odds_after >= run.floor).all()) and len(run.steps) == 1
    return logits


@torch.no_grad()
def results(
    model: Any, edit: lrqp.LRQP, sites: tuple[str, ...] = ("L1.pre", "L1.mid", "L1.post")
) -> dict[str, Tensor]:
    found = {"clean": model(**INPUTS).logits, "captured": read(model)}
    found |= {f"edited at {site}": edited(model, edit, site) for site in sites}
    replay = Replay(model, INPUTS, 2)
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        found["replayed"] = replay.run(1)
    with record_heads(model, [1], AT) as heads, record_patterns(model, [1], AT) as patterns:
        model(**INPUTS)
    found["heads"], found["patterns"] = heads[1], patterns[1]
    found["clean afterwards"] = model(**INPUTS).logits
    return found


def in_its_place(part: str, warm: bool) -> Any:
    def compiled(model: Any, backend: Any) -> nn.Module:
        if warm:
            lrqp.capture(model, INPUTS, ["L1.mid"], positions="last")
            edited(model, reference()[0])
        for block in model.transformer.h:
            (getattr(block, part) if part else block).compile(backend=backend)
        return model

    return compiled


def one_wrapped(model: Any, backend: Any) -> nn.Module:
    block = model.transformer.h[1]
    block.attn = torch.compile(block.attn, backend=backend)
    return model


def one_forward(model: Any, backend: Any) -> nn.Module:
    attention = model.transformer.h[1].attn
    attention.forward = torch.compile(attention.forward, backend=backend)
    return model


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("part", ["", "attn", "ln_1", "mlp", "wrapped", "forward"])
@torch.no_grad()
def test_a_part_that_is_compiled_alone_changes_nothing(part: str, warm: bool) -> None:
    edit, wanted = reference()
    compiled = {"wrapped": one_wrapped, "forward": one_forward}.get(part, in_its_place(part, warm))
    graphs = Graphs()
    model = compiled(build("gpt2"), graphs)
    if warm:
        model(**INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompiledModelWarning)
        found = results(model, edit)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    # Of a norm alone, whose code is torch's own, it makes no graph.
    assert (graphs.runs > 0 or part == "ln_1") and hook_count(model) == 0


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
        found = results(model, edit, ("L1.mid",))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    assert (wanted["edited at L1.mid"] - wanted["clean"]).abs().max() > 0.1
    assert hook_count(model) == 0
    before = graphs.runs
    model(**INPUTS)
    assert graphs.runs - before == warm


@torch.no_grad()
def test_a_graph_holds_the_edits_of_its_sites_whichever_context_is_open() -> None:
    edit, wanted = reference()
    graphs, plain = Graphs(), build("gpt2")
    model = torch.compile(plain, backend=graphs, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompiledModelWarning)
        assert torch.equal(edited(model, edit), wanted["edited at L1.mid"])
        assert graphs.runs == graphs.made == 1
        # What was traced within a context is not used outside of it, nor the other way round.
        assert torch.equal(model(**INPUTS).logits, wanted["clean"])
        assert torch.equal(edited(model, edit, "L1.post"), wanted["edited at L1.post"])
        assert graphs.runs == graphs.made == 3
        # Other positions, targets and kinds of edits at these sites need no other graph.
        again = edited(plain, edit, at=AT - 1)
        assert torch.equal(edited(model, edit, at=AT - 1), again)
        add = lrqp.Intervention("L1.mid", AT, lambda x, context: x + 1)
        found = []
        for each in (plain, model):
            with intervene(each, add):
                found.append(each(**INPUTS).logits)
        assert torch.equal(*found)
        assert torch.equal(model(**INPUTS).logits, wanted["clean"])
        assert graphs.made == 3 and graphs.runs == 6
    assert hook_count(plain) == 0


@torch.no_grad()
def test_a_graph_of_another_model_of_the_class_is_not_taken_for_that_of_the_edited_one() -> None:
    edit, _ = reference()
    plain = build("gpt2", n_layer=2)
    wanted = edited(plain, edit)
    models = [torch.compile(copy.deepcopy(plain), backend=Graphs(), fullgraph=True) for _ in "ab"]
    clean = plain(**INPUTS).logits
    for _ in range(2):
        with edit.at(models[1], "L1.mid", positions=AT, target=TARGET):
            assert torch.equal(models[0](**INPUTS).logits, clean)
            assert torch.equal(models[1](**INPUTS).logits, wanted)
            assert torch.equal(models[0](**INPUTS).logits, clean)
        assert torch.equal(models[1](**INPUTS).logits, clean)
    assert torch._dynamo.config.skip_nnmodule_hook_guards


@torch.no_grad()
def test_contexts_within_one_another_in_a_graph() -> None:
    edit, _ = reference()
    graphs, plain = Graphs(), build("gpt2", n_layer=2)
    model = torch.compile(plain, backend=graphs, fullgraph=True)
    add = lrqp.Intervention("L1.mid", AT, lambda x, context: x + 1)
    found = []
    for each in (plain, model, model):
        with (
            edit.at(each, "L1.mid", positions=AT, target=TARGET) as run,
            intervene(each, [add, add]),
        ):
            found.append((each(**INPUTS).logits, run.distance))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))
    assert (graphs.made, graphs.runs) == (1, 2)


@torch.no_grad()
def test_a_function_compiled_around_the_model_is_edited_too() -> None:
    edit, wanted = reference()
    model, graphs = build("gpt2"), Graphs()
    step = torch.compile(lambda **inputs: model(**inputs).logits, backend=graphs)
    torch.testing.assert_close(step(**INPUTS), wanted["clean"])
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        torch.testing.assert_close(step(**INPUTS), wanted["edited at L1.mid"])
    torch.testing.assert_close(step(**INPUTS), wanted["clean"])
    assert graphs.runs == 3


@torch.no_grad()
def test_what_is_wrong_is_said_as_without_a_graph() -> None:
    edit, _ = reference()
    model = torch.compile(build("gpt2", n_layer=2), backend=Graphs(), fullgraph=True)
    with pytest.raises(PositionError, match="1 positions lie on padding"):
        edited(model, edit, at=AT + torch.tensor([0, 5, 0, 0]))
    with (
        pytest.raises(PositionError, match="positions are for 3 examples"),
        edit.at(model, "L1.mid", positions=AT[:3], target=1),
    ):
        model(**INPUTS)
    wrong = lrqp.Intervention("L1.mid", AT, lambda x, context: x / 0)
    with pytest.raises(NonFiniteError, match=r"L1\.mid"), intervene(model, wrong):
        model(**INPUTS)
    with (
        pytest.raises(EditNeverFiredError),
        edit.at(model, "L1.mid", positions=AT, target=TARGET),
    ):
        thread = threading.Thread(target=lambda: model(**INPUTS))  # not of this context
        thread.start()
        thread.join()


def test_gradients_of_an_edit_in_a_graph() -> None:
    edit, _ = reference()
    plain = build("gpt2", n_layer=2)
    model = torch.compile(plain, backend="aot_eager", fullgraph=True)
    start = plain.get_input_embeddings()(INPUTS["input_ids"]).detach()
    mask, slopes = {"attention_mask": INPUTS["attention_mask"], "use_cache": False}, []
    for each in (plain, model):
        point = start.clone().requires_grad_()
        with edit.at(each, "L1.mid", positions=AT, target=TARGET) as run:
            loss = each(inputs_embeds=point, **mask).logits[:, -1].square().mean()
            slopes.append(torch.autograd.grad(loss, point)[0])
        assert len(run.steps) == 1
    torch.testing.assert_close(*slopes)
    assert slopes[0].abs().max() > 0.1
    # What a function reaches only through others is seen in the backward pass.
    learned = {"vector": torch.ones(24, requires_grad=True)}
    with (
        pytest.raises(CompiledModelError, match="being learned"),
        intervene(model, lrqp.Intervention("L1.mid", AT, lambda x, context: x + learned["vector"])),
    ):
        model(inputs_embeds=start.requires_grad_(), **mask).logits.square().mean().backward()


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


@pytest.mark.parametrize("scope", ["generated", "all"])
@torch.no_grad()
def test_generation_that_compiles_itself_has_the_edit_inside(scope: str) -> None:
    edit, _ = reference()
    tokens = {"input_ids": torch.stack([PROMPTS.tokens[0], PROMPTS.tokens[2][:9]])}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model: Any = build("llama", num_hidden_layers=2)
    graphs, found = Graphs(), []
    # The configuration copies what it is given, but not functions.
    settings = CompileConfig(backend=lambda *given: graphs(*given), fullgraph=True, mode=None)
    settings._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": settings}
    for further in ({}, static, static):
        with edit.at(model, "L1.mid", positions=scope, target=1) as run:
            written = model.generate(**tokens, **options, **further)
        found.append((written, run.token, run.generation, run.status))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))
    assert graphs.made == 1 and graphs.runs == 10


@torch.no_grad()
def test_a_hook_that_changes_an_edit_in_a_graph_is_named() -> None:
    edit, _ = reference()
    plain: Any = build("gpt2", n_layer=2)
    model = torch.compile(plain, backend="aot_eager", fullgraph=True)
    attention = plain.transformer.h[1].attn
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        attention.register_forward_hook(lambda module, args, output: None)
        model(**INPUTS)
        attention.register_forward_hook(lambda module, args, output: (output[0] + 1, None))
        with pytest.raises(EditOverwrittenError, match="GPT2Attention"):
            model(**INPUTS)
    assert hook_count(plain) == 2


@torch.no_grad()
def test_a_hook_that_torchs_class_sets_is_warned_of_in_its_graph_and_then_named() -> None:
    edit, _ = reference()
    plain: Any = build("gpt2", n_layer=2)
    model, attention = torch.compile(plain, backend="eager"), plain.transformer.h[1].attn
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        handle = nn.Module.register_forward_hook(
            attention, lambda module, args, output: (output[0] + 1, None)
        )
        with pytest.warns(EditOverwrittenWarning, match="known from the next pass on"):
            model(**INPUTS)
        with pytest.raises(EditOverwrittenError, match="GPT2Attention"):
            model(**INPUTS)
        handle.remove()
        model(**INPUTS)


@torch.no_grad()
def test_what_one_edit_changes_of_another_in_a_graph_is_warned_of() -> None:
    edit, _ = reference()
    model = torch.compile(build("gpt2", n_layer=2), backend="eager", fullgraph=True)
    with (
        edit.at(model, "L1.mid", positions=AT, target=TARGET),
        pytest.warns(EditOverwrittenWarning, match=r"at L1\.attn_out changes .* that at L1\.mid"),
        edit.at(model, "L1.attn_out", positions=AT, target=TARGET),
    ):
        model(**INPUTS)


@torch.no_grad()
def test_a_hook_where_a_graph_passes_an_edited_tensor_on_is_named() -> None:
    plain: Any = build_tiny("T5ForConditionalGeneration")
    ids, site = torch.arange(5, 17).reshape(2, 6), "encoder.L1.mid"
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "decoder_input_ids": ids[:, :3]}
    layer, model = plain.encoder.block[1].layer[0], torch.compile(plain, backend="eager")
    with warnings.catch_warnings(action="ignore", category=CompiledModelWarning):
        x = lrqp.capture(model, inputs, site)[site]  # where mid is, is found without the hook
    edit = random_edit(x.flatten(0, 1), 3)
    layer.register_forward_hook(lambda module, args, output: (output[0] + 1, *output[1:]))
    with (
        edit.at(model, site, positions=torch.tensor([3, 2]), target=1),
        pytest.raises(EditOverwrittenError, match="a hook on T5LayerSelfAttention changes what"),
    ):
        model(**inputs)


@pytest.mark.skipif(OLDEST, reason="no such caches, or not in a graph")
@pytest.mark.parametrize("first_says", [0, None])
@torch.no_grad()
def test_a_cache_whose_first_layer_does_not_say_what_it_holds_goes_on_in_a_graph(
    first_says: int | None,
) -> None:
    """MiniMax has a first block of linear attention; of Mamba no block says how much it holds."""
    if first_says is None:
        plain, name = build_tiny("MambaForCausalLM", num_hidden_layers=2), "cache_params"
    else:
        kinds, name = ["linear_attention", "full_attention"], "past_key_values"
        plain = build_tiny(
            "MiniMaxForCausalLM", num_hidden_layers=2, layer_types=kinds, block_size=8
        )
    ids, compiled = torch.arange(4, 16).reshape(2, 6), torch.compile(plain, backend="eager")
    logits, columns = list[Tensor](), list[list[int]]()

    def keep(x: Tensor, context: Any) -> Tensor:
        columns.append(context.token.tolist())
        return x.roll(1, -1)

    for model in (plain, compiled):
        with intervene(model, lrqp.Intervention("L1.pre", "generated", keep)):
            given: dict[str, Any] = {"input_ids": ids}
            for _ in range(4):
                out = model(**given, use_cache=True)
                given = {"input_ids": out.logits[:, -1:].argmax(-1), name: out[name]}
                logits.append(out.logits[:, -1])
    torch.testing.assert_close(logits[4:], logits[:4])
    assert columns == [[6, 6], [7, 7], [8, 8]] * 2
    # A text that began before the context is not taken for one that begins in it.
    with (
        pytest.raises(PositionError, match="before"),
        intervene(model, lrqp.Intervention("L1.pre", "generated", keep)),
    ):
        model(**given, use_cache=True)


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


@torch.no_grad()
def test_what_a_graph_writes_over_afterwards_is_not_needed_any_more() -> None:
    edit, _ = reference()
    model: Any = build("gpt2")
    key, tokens, mask = (
        traced.key_of(model.transformer),
        *(INPUTS[name].clone() for name in ("input_ids", "attention_mask")),
    )
    stream = model.get_input_embeddings()(tokens)
    with edit.at(model, "L1.pre", positions="all", target=1) as run:
        operators = torch.ops.lrqp_torch
        ticket = operators.enter(tokens, mask, None, 0, key, False, True, False, False)
        tokens.zero_(), mask.zero_()
        operators.visit(stream, None, ticket, 1.0, f"{key}/L1.pre#0")
    assert len(run.token) == int(INPUTS["attention_mask"].sum()) == len(run.distance)


@torch.no_grad()
def test_what_a_mask_on_a_gpu_shows_is_one_entry_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel reads them one after another; a view of a mask of queries and keys is no such."""
    monkeypatch.setattr(following, "readable", lambda tensor: False)
    seen: list[Tensor] = []

    def keep(x: Tensor, context: Any) -> Tensor:
        seen.append(context.shown)
        return x + 1

    model: Any = build("llama")
    ids = torch.stack([PROMPTS.tokens[0], PROMPTS.tokens[2][:9]])
    with intervene(model, lrqp.Intervention("L1.mid", "all", keep)):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
    assert [len(shown) for shown in seen] == [18, 2, 2, 2]
    assert [int(shown.sum()) for shown in seen] == [16, 2, 2, 2]
    assert [shown.is_contiguous() for shown in seen] == [True] * 4


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_the_default_compiler() -> None:
    edit, _ = reference()
    eager = build("gpt2", n_layer=1)
    model = torch.compile(eager, fullgraph=True)
    for _ in range(2):
        found = [edited(each, edit, "L0.mid") for each in (model, eager)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**INPUTS).logits, eager(**INPUTS).logits, rtol=1e-4, atol=1e-4)


def test_so_many_sites_that_torch_would_make_no_further_graph_run_eagerly() -> None:
    model = build("gpt2")
    trunk = model.transformer
    assert may_trace(trunk, ["L0.pre"])
    seen = traced._MADE.setdefault(traced.key_of(trunk), set())
    limit = torch._dynamo.config.recompile_limit
    seen |= {f"{traced.key_of(trunk)}/L{layer}.mid#0" for layer in range(limit)}
    assert not may_trace(trunk, ["L0.pre"]) and may_trace(trunk, ["L3.mid"])


@pytest.mark.parametrize("compiled", [whole, its_forward, its_blocks])
@torch.no_grad()
def test_threads_of_a_context_run_no_graph_that_was_made_before_it(compiled: Any) -> None:
    """Threads that inherit the context edit as it does, those that do not edit nothing."""
    edit, wanted = reference()
    model = compiled(build("gpt2"), "eager")

    @torch.no_grad()
    def run() -> Tensor:
        return model(**INPUTS).logits

    clean = run()
    for _ in range(2):
        with edit.at(model, "L1.mid", positions=AT, target=TARGET) as record:
            found = [asyncio.run(asyncio.to_thread(run))]
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(contextvars.copy_context().run, run).result())
                alone = pool.submit(run).result()
            found.append(run())
        assert len(record.steps) == 3
        for one in found:
            torch.testing.assert_close(one, wanted["edited at L1.mid"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone, clean)
        torch.testing.assert_close(run(), clean)


@torch.no_grad()
def test_generation_that_compiled_itself_before_is_edited_in_a_thread() -> None:
    edit, _ = reference()
    ids = torch.stack([PROMPTS.tokens[0], PROMPTS.tokens[2][:9]])
    model: Any = build("llama", num_hidden_layers=2)
    settings = CompileConfig(backend=lambda graph, inputs: graph, fullgraph=True, mode=None)
    settings._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    static = {"cache_implementation": "static", "compile_config": settings}
    with edit.at(model, "L1.mid", positions="all", target=1) as wanted:
        model.generate(ids, **options)
    generate = torch.no_grad()(lambda: model.generate(ids, **options, **static))
    generate()
    with edit.at(model, "L1.mid", positions="all", target=1) as run:
        asyncio.run(asyncio.to_thread(generate))
        generate()  # the same static cache once more
    assert torch.equal(run.token, wanted.token.repeat(2))
    assert torch.equal(run.generation, torch.arange(2).repeat_interleave(len(wanted.token)))
    torch.testing.assert_close(run.distance, wanted.distance.repeat(2), rtol=1e-5, atol=1e-6)


def replica_of(model: nn.Module) -> nn.Module:
    """What DataParallel runs on another device."""
    made = {part: part._replicate_for_data_parallel() for part in model.modules()}
    for part, copied in made.items():
        for name, child in part._modules.items():
            setattr(copied, name, None if child is None else made[child])
        for name, value in {**part._parameters, **part._buffers}.items():
            setattr(copied, name, None if value is None else value + 1)
    return made[model]


@torch.no_grad()
def test_replicas_of_data_parallel_run_their_own_weights() -> None:
    edit, _ = reference()
    model = build("gpt2", n_layer=2)
    alone = copy.deepcopy(model)
    for value in (*alone.parameters(), *alone.buffers()):
        value += 1
    wanted, clean, digest = edited(alone, edit), alone(**INPUTS).logits, digest_model(model)
    with edit.at(model, "L1.mid", positions=AT, target=TARGET) as run:
        assert digest_model(model) == digest
        replica = replica_of(model)
        assert torch.equal(replica(**INPUTS).logits, wanted)
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(replica(**INPUTS).logits.detach()))
        thread.start()
        thread.join()
    assert len(run.steps) == 1 and not any("forward" in vars(part) for part in model.modules())
    torch.testing.assert_close(found[0], clean)


@torch.no_grad()
def test_graphs_that_cannot_be_edited_are_named() -> None:
    edit, wanted = reference()
    model, where = build("gpt2"), {"positions": AT, "target": TARGET}

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    plain, ids = Logits().eval(), INPUTS["input_ids"]
    clean = plain(ids)
    with edit.at(model, "L1.mid", **where):
        changed = plain(ids)
        with pytest.raises(CompiledModelError, match="the one example that they see"):
            torch.jit.trace(plain, (ids,), check_trace=False)
        with pytest.raises(CompiledModelError, match="the one example that they see"):
            make_fx(plain)(ids)
        with (
            pytest.raises(CompiledModelError, match="FakeTensorMode has no values"),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            plain(ids)
        # An exported program holds the place of the edit, as a compiled graph does.
        exported = torch.export.export(plain, (ids,)).module()
        torch.testing.assert_close(exported(ids), changed)
    torch.testing.assert_close(exported(ids), clean)
    script = torch.jit.trace(plain, (ids,), check_trace=False)
    with pytest.raises(CompiledModelError, match="does not run its modules one by one"):
        edit.at(script, lrqp.Site.module("model.transformer.h.1"), **where).__enter__()
    model.forward = lambda **inputs: wanted["clean"]  # as of torch.cuda.make_graphed_callables
    with (
        pytest.raises(CompiledModelError, match="does not run its GPT2Model"),
        edit.at(model, "L1.mid", **where),
    ):
        model.transformer(**INPUTS)
        model(**INPUTS)


def test_cuda_graphs_of_elsewhere_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def capture_begin(self) -> None:
            pass

        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    watch._watch_cuda_graphs.__wrapped__()
    model, before, within = build("gpt2", n_layer=2), Graph(), Graph()
    before.capture_begin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before.replay()
        with record_heads(model, [1], AT):
            within.capture_begin()
            within.replay()
            with pytest.raises(CompiledModelWarning, match="captured before this context"):
                before.replay()
