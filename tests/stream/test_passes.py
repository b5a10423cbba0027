"""Whose forward pass it is: of which thread, model, copy, wrapper, adapter and text."""

import asyncio
import contextvars
import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, cast
from unittest import mock

import pytest
import torch
import transformers
from launches_for_tests import Elsewhere
from models_for_tests import POST_MODELS, WIDTH, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.errors import EditNeverFiredError, ModelError, PositionError
from lrqp_torch.stream import passes, watch
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.watch import Hooks

INPUTS = Prompts.random([7, 7, 7]).padded("right")
IDS = INPUTS["input_ids"]
AT = torch.tensor([3, 4, 6])
SITE = "L1.mid"
WORDS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def turn(positions: Any = AT, site: str = SITE) -> Intervention:
    # Not a shift by one number, which layer norms would take out again.
    return Intervention(site, positions, lambda x, context: x.roll(1, -1))


def edit_of(model: nn.Module, site: str = SITE) -> lrqp.LRQP:
    x = lrqp.capture(model, INPUTS, site)[site]
    return random_edit(x.flatten(0, 1), 3, log_odds=20.0)


def steps_of(run: lrqp.EditRun) -> list[tuple[int, int, int]]:
    """Of each pass: how many tokens, the first column and the last."""
    return [(len(step), int(step.token.min()), int(step.token.max())) for step in run.steps]


def logits(model: Any, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**INPUTS, **changes}).logits


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What a thread of its own returns or raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("route", ["NumPy", ".data", "in place"])
@torch.no_grad()
def test_a_mask_that_was_written_over_is_looked_at_again(route: str) -> None:
    model, mask = build("llama"), torch.ones_like(INPUTS["input_ids"])
    given = {"input_ids": INPUTS["input_ids"], "attention_mask": mask}
    at = torch.ones(len(mask), dtype=torch.long)
    with pytest.raises(PositionError, match="padding"), intervene(model, turn(at)):
        for _ in range(3):
            model(**given)
        {"NumPy": mask.numpy(), ".data": mask.data, "in place": mask}[route][0, :3] = 0
        model(**given)


# Threads


@pytest.mark.parametrize("name", POST_MODELS)
def test_passes_of_other_threads_are_untouched(name: str) -> None:
    model = build(name)
    clean = logits(model)
    with intervene(model, turn()):
        assert not torch.equal(logits(model), clean)
        assert torch.equal(in_a_thread(lambda: logits(model)), clean)
        read = in_a_thread(lambda: lrqp.capture(model, INPUTS, SITE)[SITE])
    assert torch.equal(read, lrqp.capture(model, INPUTS, SITE)[SITE])
    with record_patterns(model, [1], AT) as patterns, record_heads(model, [1], AT) as heads:
        in_a_thread(lambda: logits(model))
        assert not patterns and not heads


def test_an_edit_that_only_another_thread_might_have_met_says_so() -> None:
    model = build("llama")
    with (
        pytest.raises(EditNeverFiredError, match=r"Other threads ran the model \(Thread-.*open it"),
        intervene(model, turn("all")),
    ):
        in_a_thread(lambda: model.generate(**INPUTS, **WORDS))


def test_contexts_of_two_threads_at_once_do_not_mix() -> None:
    model = build("llama")
    wanted = []
    for value in (2.0, 3.0):
        item = Intervention(SITE, AT, lambda x, context, value=value: x * value)
        with intervene(model, item):
            wanted.append(logits(model))
    both = threading.Barrier(2)

    def work(value: float) -> Tensor:
        with intervene(model, Intervention(SITE, AT, lambda x, context: x * value)):
            both.wait()
            found = logits(model)
            both.wait()
        return found

    other: list[Tensor] = []
    thread = threading.Thread(target=lambda: other.append(work(2.0)))
    thread.start()
    own = work(3.0)
    thread.join()
    assert torch.equal(own, wanted[1]) and torch.equal(other[0], wanted[0])
    assert hook_count(model) == 0


def test_a_context_that_another_thread_opens_in_the_midst_of_a_pass_leaves_it_as_it_is() -> None:
    model = build("llama")
    clean, opened, done = logits(model), threading.Event(), threading.Event()

    def other() -> None:
        with suppress(EditNeverFiredError), intervene(model, turn()):
            opened.set()
            done.wait()

    thread = threading.Thread(target=other)

    def begin(*_: Any) -> None:
        thread.start()
        opened.wait()

    # Behind the module that reads the block's input, and before attention.
    handle = model.model.layers[1].self_attn.register_forward_pre_hook(begin)
    found = logits(model)
    done.set()
    thread.join()
    handle.remove()
    assert torch.equal(found, clean)


def test_a_task_takes_its_context_along_and_no_other() -> None:
    model = build("llama")
    clean = logits(model)

    async def edited() -> bool:
        with intervene(model, turn()):
            await asyncio.sleep(0.01)
            moved = await asyncio.to_thread(logits, model)
            await asyncio.sleep(0.03)
        return not torch.equal(moved, clean)

    async def plain() -> bool:
        await asyncio.sleep(0.02)
        return torch.equal(logits(model), clean)

    async def both() -> list[bool]:
        return list(await asyncio.gather(edited(), plain()))

    assert asyncio.run(both()) == [True, True]


def test_closing_while_a_thread_of_the_context_runs_the_model_is_an_error() -> None:
    model = build("llama", max_position_embeddings=4096)
    stop = threading.Event()
    with (
        pytest.raises(EditNeverFiredError, match="closed while another thread was running"),
        intervene(model, turn("all")),
    ):
        begun = threading.Event()

        def criteria(ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
            begun.set()
            return torch.full((len(ids),), stop.is_set())

        work = contextvars.copy_context()
        many = {**WORDS, "max_new_tokens": 4000, "stopping_criteria": [criteria]}
        thread = threading.Thread(target=work.run, args=(lambda: model.generate(**INPUTS, **many),))
        thread.start()
        begun.wait(10)
    stop.set()
    thread.join()


def test_batches_that_are_read_after_the_context_are_refused() -> None:
    model = build("llama")
    with intervene(model, turn()):
        logits(model)
        batches = lrqp.capture_batches(model, INPUTS, "L2.mid", AT)
    with pytest.raises(EditNeverFiredError, match="the context in which this was begun has closed"):
        next(batches)


def test_what_inherits_a_closed_context_is_not_of_the_next_one_with_the_same_edit() -> None:
    model = build("llama")
    clean, edit = logits(model), edit_of(model, "L2.mid")
    for _ in range(4):
        with edit.at(model, "L2.mid", positions=AT, target=1):
            logits(model)
            inherited = contextvars.copy_context()
    with edit.at(model, "L2.mid", positions=AT, target=1) as run:
        edited = logits(model)
        other = in_a_thread(lambda: inherited.run(logits, model))
        later = inherited.run(logits, model)
    assert torch.equal(other, clean) and torch.equal(later, clean)
    assert not torch.equal(edited, clean) and len(run.steps) == 1


def test_a_context_that_another_thread_closes_is_over_in_its_own() -> None:
    model = build("llama")
    clean, context = logits(model), intervene(model, turn())
    context.__enter__()
    logits(model)
    in_a_thread(lambda: context.__exit__(None, None, None))
    assert torch.equal(logits(model), clean)
    assert lrqp.capture(model, INPUTS, "L2.mid", AT)["L2.mid"].shape == (3, WIDTH)


def test_a_rerun_of_one_thread_is_not_taken_for_a_pass_of_another() -> None:
    model = build("llama")
    replay = Replay(model, INPUTS, 2)
    caught: list[Any] = []

    def meanwhile(x: Tensor, context: Any) -> Tensor:
        caught.append(in_a_thread(lambda: logits(model)))
        return x

    with intervene(model, Intervention("L2.mid", AT, meanwhile)):
        replay.run(2)
    assert isinstance(caught[0], ModelError) and "another thread is rerunning" in str(caught[0])


def test_what_runs_outside_of_a_pass_is_refused() -> None:
    model: Any = build("llama")
    stream = model.model.embed_tokens(IDS)
    places = model.model.rotary_emb(stream, torch.arange(7)[None])
    with pytest.raises(PositionError, match="outside of a forward pass"), intervene(model, turn()):
        model.model.layers[1](stream, position_embeddings=places)
    assert hook_count(model) == 0


# Copies


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", ["L0.pre", "L1.mid", "L2.post"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_made_inside_a_context_are_plain(
    name: str, site: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    model = build(name)
    clean = logits(model)
    model.get_submodule("lm_head").register_forward_hook(Keep())
    with intervene(model, turn(site=site)), intervene(model, turn(site="L1.post")):
        assert not torch.equal(logits(model), clean)
        double = duplicate(model)
        assert torch.equal(logits(double), clean) and hook_count(double) == 1
    assert torch.equal(logits(double), clean)
    assert "__reduce_ex__" not in {key for part in double.modules() for key in vars(part)}


class Keep:
    """A hook of the user's, which copies take along."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        return None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_made_while_patterns_are_shown_attend_as_before(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    model = build("llama")
    clean = logits(model)
    with record_patterns(model, [1], AT):
        double = duplicate(model)
    assert torch.equal(logits(double), clean)
    assert double.config._attn_implementation == "sdpa" and hook_count(double) == 0
    assert copy.deepcopy(model).config._attn_implementation == "sdpa"


# Wrappers and adapters


@pytest.mark.parametrize("name", POST_MODELS)
def test_a_function_in_place_of_forward_changes_nothing(name: str) -> None:
    model, wrapped = build(name), build(name)
    for module in list(wrapped.modules()):
        plain = module.forward
        module.forward = lambda *args, plain=plain, **kwargs: plain(*args, **kwargs)
    for positions in (AT, "all", "generated", "last"):
        found = []
        for one in (model, wrapped):
            with edit_of(model).at(one, SITE, positions=positions, target=1) as run:
                found.append((one.generate(**INPUTS, **WORDS), run))
        assert torch.equal(found[0][0], found[1][0])
        assert steps_of(found[0][1]) == steps_of(found[1][1])
    assert torch.equal(lrqp.capture(wrapped, INPUTS, SITE, AT)[SITE], read(model, SITE, AT))


def read(model: nn.Module, site: str, at: Tensor) -> Tensor:
    return lrqp.capture(model, INPUTS, site, at)[site]


class SoftPrompt(nn.Module):
    """Learned embeddings in front of every text (or behind it), as adapters put them there."""

    def __init__(self, inner: Any, behind: bool = False) -> None:
        super().__init__()
        self.inner, self.behind = inner, behind
        self.prompt = nn.Parameter(torch.randn(4, WIDTH), requires_grad=False)

    @property
    def config(self) -> Any:
        return self.inner.config

    def get_base_model(self) -> nn.Module:
        return self.inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        text = self.inner.get_input_embeddings()(input_ids)
        prompt = self.prompt.expand(len(text), -1, -1)
        parts = [text, prompt] if self.behind else [prompt, text]
        mask = torch.cat([torch.ones(len(text), 4, dtype=torch.long), attention_mask], 1)
        return self.inner(inputs_embeds=torch.cat(parts, 1), attention_mask=mask)


@pytest.mark.parametrize("name", POST_MODELS)
def test_columns_are_those_of_the_text_behind_virtual_tokens(name: str) -> None:
    inner = build(name)
    model = SoftPrompt(inner).eval()
    inputs = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    streams: list[Tensor] = []
    block = inner.base_model.get_submodule("h" if name == "gpt2" else "layers")[1]
    keep = block.register_forward_hook(lambda m, a, o: streams.append(first(o).clone()))
    model(**inputs)
    keep.remove()
    own = streams[0][:, 4:]
    found = lrqp.capture(model, inputs, "L1.post")["L1.post"]
    torch.testing.assert_close(found, own)
    for positions in (AT, 3, "last", slice(2, 4)):
        part = lrqp.capture(model, inputs, "L1.post", positions)["L1.post"]
        with intervene(model, turn(positions, "L1.post")):
            moved = lrqp.capture(model, inputs, "L1.post")["L1.post"]
            model(**inputs)
        changed = (moved - found).abs().amax(-1) > 1e-3
        torch.testing.assert_close(found[changed], part.reshape(-1, WIDTH))
    with pytest.raises(PositionError, match="not only in front of them"):
        lrqp.capture(SoftPrompt(inner, behind=True), inputs, "L1.post", AT)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_adapters_of_peft_keep_the_columns_of_the_text(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    model = peft.get_peft_model(build("llama"), getattr(peft, kind)(**options)).eval()
    inputs = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    whole = lrqp.capture(model, inputs, "L1.post")["L1.post"]
    assert whole.shape == (3, 7, WIDTH)
    torch.testing.assert_close(
        lrqp.capture(model, inputs, "L1.post", AT)["L1.post"], whole[torch.arange(3), AT]
    )
    edit = edit_of(build("llama"), "L1.post")
    for region, steps in (("prompt", [(21, 0, 6)]), ("generated", [(3, 7, 7), (3, 8, 8)])):
        with edit.at(model, "L1.post", positions=region, target=1) as run:
            model.generate(**inputs, **{**WORDS, "max_new_tokens": 3})
        assert steps_of(run) == steps
    with model.disable_adapter():
        plain = lrqp.capture(model, inputs, "L1.post", AT)["L1.post"]
    torch.testing.assert_close(plain, read(build("llama"), "L1.post", AT))


def test_a_method_under_watch_takes_arguments_by_name() -> None:
    class Adapter(nn.Module):
        def get_prompt(self, batch_size: int, *, max_cache_len: int | None = None) -> object:
            return batch_size, max_cache_len

    owner = Adapter()
    hooks = Hooks()
    hooks.replace(owner, "get_prompt", lambda owner, method: method)
    assert owner.get_prompt(batch_size=3, max_cache_len=4) == (3, 4)
    hooks.remove()
    assert "get_prompt" not in vars(owner)


# Texts


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("region", ["prompt", "generated", "all"])
def test_the_two_texts_of_guidance_take_turns(region: str, cached: bool) -> None:
    model = build("llama")
    edit = edit_of(model)
    options = {**WORDS, "guidance_scale": 1.5, "use_cache": cached}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with edit.at(model, SITE, positions=region, target=1) as run:
        model.generate(**inputs, **options, negative_prompt_ids=IDS[:, :3])
    long, short = (set(run.token[run.generation == text].tolist()) for text in (0, 1))
    wanted = {"prompt": (0, 7, 0, 3), "generated": (7, 10, 3, 6), "all": (0, 10, 0, 6)}[region]
    assert (long, short) == (set(range(*wanted[:2])), set(range(*wanted[2:])))
    scope = lrqp.Scope("prompt", prompt_length=7)
    with (
        pytest.raises(PositionError, match=r"second prompt of guidance.*leave prompt_length out"),
        edit.at(model, SITE, positions=scope, target=1),
    ):
        model.generate(**inputs, **options, negative_prompt_ids=IDS[:, :3])
    with (
        pytest.raises(PositionError, match="position 6 is in the prompt of one, and new in the"),
        edit.at(model, SITE, positions=AT, target=1),
    ):
        model.generate(**inputs, **{**WORDS, "max_new_tokens": 8}, guidance_scale=1.5,
                       negative_prompt_ids=IDS[:, :3])  # fmt: skip


@torch.no_grad()
def test_choices_of_an_encoder_are_rows_too_whose_real_tokens_are_its_own() -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    model = transformers.BertForMultipleChoice(config).eval()
    ids = torch.stack([IDS, IDS.flip(1)], 1)  # 3 examples of 2 choices
    mask = torch.ones_like(ids)
    mask[1, 1, 5:] = 0
    flat = {"input_ids": ids.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
    last = torch.tensor([6, 6, 6, 4, 6, 6])
    edit = random_edit(torch.randn(50, WIDTH), 3)
    with edit.at(model, SITE, positions="last", target=1) as run:
        model(input_ids=ids, attention_mask=mask)
    assert run.token.tolist() == last.tolist() and (run.log_odds_after >= run.floor).all()
    with edit.at(model.bert, SITE, positions=last, target=1) as alone:
        model.bert(**flat)
    torch.testing.assert_close(run.distance, alone.distance)


def test_choices_are_rows_of_their_own() -> None:
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=32, eos_token_id=None
    )
    model = transformers.GPT2DoubleHeadsModel(config).eval()
    ids = torch.stack([IDS, IDS.flip(1)], 1)  # 3 examples of 2 choices
    clean = model(input_ids=ids).logits
    with (
        pytest.raises(PositionError, match=r"for 3 examples, the model was given 6.*choices"),
        intervene(model, turn()),
    ):
        model(input_ids=ids)
    with intervene(model, turn(AT.repeat_interleave(2))):
        moved = model(input_ids=ids).logits
    first_changed = ((moved - clean).abs().amax(-1) > 1e-4).long().argmax(-1)
    assert torch.equal(first_changed, AT[:, None].expand(3, 2))


@pytest.mark.parametrize("cached", [True, False])
def test_texts_that_grow_are_not_taken_for_one_that_is_written(cached: bool) -> None:
    model = build("llama")
    edit = edit_of(model)

    def scores(positions: Any) -> lrqp.EditRun:
        with torch.no_grad(), edit.at(model, SITE, positions=positions, target=1) as run:
            for length in (4, 5, 6):
                model(input_ids=IDS[:, :length], use_cache=cached)
        return run

    assert steps_of(scores("all")) == [(12, 0, 3), (15, 0, 4), (18, 0, 5)]
    assert steps_of(scores("last")) == [(3, 3, 3), (3, 4, 4), (3, 5, 5)]
    assert scores("all").generation.unique().tolist() == [0, 1, 2]
    if cached:  # each has a cache of its own
        assert steps_of(scores("prompt")) == [(12, 0, 3), (15, 0, 4), (18, 0, 5)]
        return
    with pytest.raises(PositionError, match=r"one token more.*Scope\('prompt', prompt_length="):
        scores("prompt")
    assert steps_of(scores(lrqp.Scope("prompt", prompt_length=4))) == [(12, 0, 3)] * 3


@pytest.mark.parametrize("cached", [True, False])
def test_recurrent_caches_are_counted_along(cached: bool) -> None:
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=WIDTH, num_hidden_layers=3, state_size=4, eos_token_id=None
    )
    model = transformers.MambaForCausalLM(config).eval()
    edit = edit_of(model, "L1.post")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    expected = {"prompt": {*range(7)}, "generated": {7, 8, 9}, "last": {6}, "all": {*range(10)}}
    for region, columns in expected.items():
        with edit.at(model, "L1.post", positions=region, target=1) as run:
            model.generate(**inputs, **WORDS, use_cache=cached)
        assert set(run.token.tolist()) == columns
        assert len(run.token) == 3 * len(columns)


def test_a_recurrent_cache_that_was_begun_before_is_refused() -> None:
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=WIDTH, num_hidden_layers=3, state_size=4, eos_token_id=None
    )
    model = transformers.MambaForCausalLM(config).eval()
    output = model(IDS, use_cache=True)
    name = next(name for name in ("cache", "cache_params", "past_key_values") if name in output)
    with (
        pytest.raises(PositionError, match=r"does not say how many tokens it holds.*before the"),
        intervene(model, turn("all", "L1.post")),
    ):
        model(IDS[:, :1], use_cache=True, **{name: output[name]})


# Transforms, and passes that run again


def test_transforms_go_through_an_edited_model() -> None:
    model: Any = build("llama", attention="eager")
    edit = edit_of(model)
    stream = model.get_input_embeddings()(IDS).detach()
    tangent = torch.randn(stream.shape, generator=torch.Generator().manual_seed(0))
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings).logits[:, -1].square().mean()

    def of_one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],)).logits[:, -1].square().mean()

    for positions in (torch.full((3,), 4), "all", "last", 4, slice(2, 4)):
        point = stream.clone().requires_grad_()
        one = positions[:1] if isinstance(positions, Tensor) else positions
        with edit.at(model, SITE, positions=positions, target=1):
            (wanted,) = torch.autograd.grad(loss(point), point)
            found = grad(loss)(stream)
            _, along = jvp(loss, (stream,), (tangent,))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(along, (wanted * tangent).sum(), rtol=1e-3, atol=1e-6)
        with edit.at(model, SITE, positions=one, target=1):
            each = vmap(grad(of_one), (None, 0))(weights, IDS)
        name = "model.layers.0.mlp.up_proj.weight"
        for row, ids in enumerate(IDS):
            with edit.at(model, SITE, positions=one, target=1):
                (alone,) = torch.autograd.grad(of_one({}, ids), model.get_parameter(name))
            torch.testing.assert_close(each[name][row], alone, rtol=1e-3, atol=1e-6)
    # Masks that vmap hides say nothing of padding, whatever their shape.
    mask, causal = torch.ones_like(IDS), torch.ones(IDS.shape[1], IDS.shape[1]).tril().bool()
    for positions, one in ((AT[:1].expand(3), AT[:1]), (4, 4), (slice(2, 4), slice(2, 4))):
        with edit.at(model, SITE, positions=positions, target=1):
            together = model(IDS).logits.detach()
        for square in (False, True):

            def masked(row: Tensor, shown: Tensor, square: bool = square) -> Tensor:
                hidden = torch.where(causal & shown.bool(), 0.0, -1e9)
                mask = hidden[None, None] if square else shown[None]
                return model(row[None], attention_mask=mask, use_cache=False).logits[0]

            with edit.at(model, SITE, positions=one, target=1):
                torch.testing.assert_close(vmap(masked)(IDS, mask).detach(), together)
            with (
                pytest.raises(PositionError, match="vmap hides the attention mask"),
                edit.at(model, SITE, positions="last", target=1),
            ):
                vmap(masked)(IDS, mask)
    with (
        pytest.raises(PositionError, match="vmap hides the tokens"),
        edit.at(model, SITE, positions=lambda given: given["input_ids"] > 9, target=1),
    ):
        vmap(lambda row: model(row[None]).logits)(IDS)


@pytest.mark.filterwarnings("ignore:gradient checkpointing runs")
@pytest.mark.parametrize("site", ["L0.pre", "L1.mid", "L2.post"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_that_runs_again_is_that_of_its_own_pass(site: str, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = build("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        texts = [IDS[:, :5], IDS]
        points = [model.get_input_embeddings()(ids).detach().requires_grad_() for ids in texts]
        scale = Intervention(site, "last", lambda x, context: 1.5 * x)
        with intervene(model, scale):
            losses = [
                model(inputs_embeds=point, use_cache=False).logits.square().mean()
                for point in points
            ]
            for loss in losses:
                loss.backward()
        found.append([point.grad for point in points])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("where", [AT, "last", "all"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_pass_that_runs_again_in_a_backward_pass_is_recorded_once(
    where: Any, use_reentrant: bool
) -> None:
    edit, found = edit_of(build("llama")), []
    for whole in (False, True):
        model: Any = build("llama")
        points = [model.get_input_embeddings()(ids).detach() for ids in (IDS, IDS.flip(0))]

        def run_model(point: Tensor, model: Any = model) -> Tensor:
            return model(inputs_embeds=point, use_cache=False).logits

        with edit.at(model, SITE, positions=where, target=1) as run:
            for point in map(Tensor.requires_grad_, points):
                once = functools.partial(checkpoint, run_model, use_reentrant=use_reentrant)
                result = (once if whole else run_model)(point)
                result.square().mean().backward()
        found.append((*(point.grad for point in points), run.log_odds_after))
        assert [step.forward_pass for step in run.steps] == [0, 1]
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("where", ["last", "all"])
def test_however_many_passes_wait_for_a_backward_pass_each_is_known_in_it(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "KEPT", 4)
    model: Any = build("llama", num_hidden_layers=2)
    edit, found = edit_of(model), []
    batches = [IDS[:, : 5 + n % 3].roll(n, 1) for n in range(14)]
    start = torch.zeros((), requires_grad=True)

    def run_model(ids: Tensor, start: Tensor) -> Tensor:
        return (start + model.get_input_embeddings()(ids)).sum() + model(ids).logits.exp().mean()

    for once in (run_model, functools.partial(checkpoint, run_model, use_reentrant=True)):
        model.zero_grad()
        with edit.at(model, "L1.mid", positions=where, target=1) as run:
            sum(once(ids, start) for ids in batches).backward()
        found.append((run.token, run.generation, run.log_odds_after, model.lm_head.weight.grad))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)

    def embedded(ids: Tensor, start: Tensor) -> Tensor:
        return model(inputs_embeds=start + model.get_input_embeddings()(ids)).logits.mean()

    # What is made anew when it runs again is known where it was the only one of its shape.
    for count in (1, 2):
        with (
            pytest.raises(PositionError, match="2 passes had such") if count > 1 else nullcontext(),
            edit.at(model, "L1.mid", positions=where, target=1) as run,
        ):
            once = functools.partial(checkpoint, embedded, use_reentrant=True)
            sum(once(ids[:, :5], start) for ids in batches[:count]).backward()
        assert len(run.steps) == count


@pytest.mark.filterwarnings("ignore:gradient checkpointing runs")
def test_blocks_that_run_again_for_another_thread_are_left_alone() -> None:
    edit, model = edit_of(build("llama")), cast(Any, build("llama").train())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    embedded = model.get_input_embeddings()(IDS).detach()

    def slope() -> Tensor:
        point = embedded.clone().requires_grad_()
        model(inputs_embeds=point, use_cache=False).logits.square().mean().backward()
        return point.grad

    plain = slope()
    with edit.at(model, SITE, positions=AT, target=1) as run:
        edited = slope()
        assert torch.equal(in_a_thread(slope), plain)
    assert not torch.equal(edited, plain)
    assert len(run.steps) == 1


@torch.no_grad()
def test_a_pass_like_the_one_before_is_held_to_the_same() -> None:
    """What was refused once is refused again; a mask that was written to is looked at again."""
    model, inputs = build("gpt2"), Prompts.random([9, 6, 12, 7]).padded("right")
    mask = inputs["attention_mask"]
    at = mask.sum(1) - 1
    with intervene(model, lrqp.Intervention("L1.pre", at, lambda x, context: x + 1)):
        first = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, first)
        mask[1, at[1]] = 0
        for _ in range(3):
            with pytest.raises(PositionError, match="1 positions lie on padding"):
                model(**inputs)
        mask[1, at[1]] = 1
        assert torch.equal(model(**inputs).logits, first)
        with pytest.raises(PositionError, match="positions are for"):
            model(**{name: value[:2] for name, value in inputs.items()})
        assert torch.equal(model(**inputs).logits, first)


@torch.no_grad()
def test_hooks_that_others_have_removed_are_missed() -> None:
    """As pyvene does at each call: what runs after that is not edited."""
    edit, model = edit_of(build("llama")), build("llama")
    with (
        pytest.raises(EditNeverFiredError, match="has removed all hooks of LlamaForCausalLM"),
        edit.at(model, SITE, positions=AT, target=1),
    ):
        model(**INPUTS)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    assert hook_count(model) == 0
    with edit.at(model, SITE, positions=AT, target=1):
        model(**INPUTS)


@pytest.mark.parametrize("captured", [False, True])
def test_a_static_cache_is_checked_at_the_end_but_for_what_a_graph_repeats(captured: bool) -> None:
    """Each replay of a CUDA graph reads a further token, which its own comparison knows not."""
    held = torch.tensor(0)
    cache = mock.Mock(get_seq_length=lambda: held.as_subclass(Elsewhere))
    texts = passes.Texts(False, False, compares=True)
    with mock.patch.object(passes, "capturing", lambda _: captured):
        for columns in (3, 1, 1):
            ids = torch.zeros(2, columns, dtype=torch.long)
            call = texts.read({"input_ids": ids, "past_key_values": cache, "use_cache": True})
            texts.note(call, ids)
            held.fill_(3)
    assert call.past == 4
    with nullcontext() if captured else pytest.raises(PositionError, match="static cache"):
        texts.finish()
