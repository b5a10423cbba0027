"""Offloaded, dispatched, quantised, checkpointed and otherwise unusual models and inputs."""

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import POST_MODELS, Prompts, build, hook_count, random_edit
from torch import Tensor, nn
from torch.distributed.tensor import parallel as tensor_parallel
from transformers import AutoModelForCausalLM

import lrqp_torch as lrqp
from lrqp_torch import Intervention, intervene
from lrqp_torch.errors import ModelError, UnknownFamilyError
from lrqp_torch.stream import sites
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.stream.replay import Replay, Tail

INPUTS = Prompts.random([9, 6, 12, 7]).padded("right")
REAL = INPUTS["attention_mask"].bool()
AT, TARGET = torch.tensor([3, 2, 4, 5]), torch.tensor([0, 1, 2, 1])
SITES = ("L0.pre", "L1.pre", "L1.mid", "L1.post", "L2.mid")


def unchanged(x: Tensor, context: Any) -> Tensor:
    return x


def fitted(model: nn.Module, site: str = "L1.mid") -> lrqp.LRQP:
    return random_edit(lrqp.capture(model, INPUTS, [site], REAL)[site], 3, log_odds=20.0)


@torch.no_grad()
def results(model: Any, edit: lrqp.LRQP) -> dict[str, Tensor]:
    """What reading and editing yield, with the promise checked on what the stream holds."""
    inputs = {name: values.to(input_device(model)) for name, values in INPUTS.items()}
    found = dict(lrqp.capture(model, inputs, list(SITES), AT))
    for site in SITES:
        with edit.at(model, site, positions=AT, target=TARGET) as run:
            found[f"{site} edited"] = model(**inputs).logits
            held = lrqp.capture(model, inputs, [site], AT)[site]
        odds = edit.probe.log_odds(held.cpu().double(), TARGET)
        assert bool((odds >= run.floor.cpu()).all())
    clean = model(**inputs).logits
    with intervene(model, [Intervention(site, AT, unchanged) for site in SITES]):
        assert torch.equal(model(**inputs).logits, clean)
    replay, tail = Replay(model, inputs, 2), Tail(model, inputs, 1, 2)
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        found["replayed"] = replay.run(1)
        found["tail"] = tail.run(torch.arange(4), torch.tensor([4]))
    with record_patterns(model, [0, 2], AT) as patterns:
        model(**inputs)
    return {**found, "clean": clean, "patterns": torch.stack([patterns[0], patterns[2]])}


@cache
def reference(name: str) -> tuple[lrqp.LRQP, dict[str, Tensor]]:
    model = build(name)
    edit = fitted(model)
    return edit, results(model, edit)


def spread(name: str) -> dict[str, str]:
    """A device map with a block on the disk and one in main memory that is fetched."""
    model: Any = build(name)
    trunk, blocks = ("transformer", "h") if name == "gpt2" else ("model", "layers")
    parts = [f"{trunk}.{part}" for part, _ in model.base_model.named_children() if part != blocks]
    whole = {part: "cpu" for part in [*parts, "lm_head"]}
    return {**whole, **{f"{trunk}.{blocks}.{n}": "disk" if n == 1 else "cpu" for n in range(3)}}


def to_cpu(name: str, folder: Path) -> nn.Module:
    return accelerate().cpu_offload(build(name), execution_device="cpu")


def to_disk(name: str, folder: Path) -> nn.Module:
    return accelerate().disk_offload(build(name), folder, execution_device="cpu")


def dispatched(name: str, folder: Path) -> nn.Module:
    options = {"offload_dir": folder, "main_device": "cpu", "force_hooks": True}
    return accelerate().dispatch_model(build(name), spread(name), **options)


def loaded_in_parts(name: str, folder: Path) -> nn.Module:
    build(name).save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=spread(name), offload_folder=folder / "parts"
    ).eval()


def loaded_automatically(name: str, folder: Path) -> nn.Module:
    accelerate()
    build(name).save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map="auto").eval()


def accelerate() -> Any:
    return pytest.importorskip("accelerate", reason="offloading needs accelerate")


@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize(
    "place", [to_cpu, to_disk, dispatched, loaded_in_parts, loaded_automatically]
)
def test_an_edit_lives_where_its_layer_lives(
    name: str, place: Callable[[str, Path], nn.Module], tmp_path: Path
) -> None:
    edit, wanted = reference(name)
    model = place(name, tmp_path)
    replaced = [n for n, module in model.named_modules() if "forward" in vars(module)]
    automatic = place is loaded_automatically
    assert bool(replaced) or automatic
    on_gpu = automatic and torch.cuda.is_available()
    assert input_device(model).type == ("cuda" if on_gpu else "cpu")
    # The files hold the very numbers, so all on the same device is the same bit for bit.
    apart = {"rtol": 1e-3, "atol": 1e-3} if on_gpu else {"rtol": 0.0, "atol": 0.0}
    for key, value in results(model, edit).items():
        torch.testing.assert_close(value.cpu(), wanted[key].cpu(), **apart, msg=key)
    assert hook_count(model) == 0
    assert [n for n, module in model.named_modules() if "forward" in vars(module)] == replaced


def test_a_model_without_values_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_LAYOUTS", {})  # as where no such model was seen before
    with pytest.raises(ModelError, match="GPT2LMHeadModel are on the meta device"):
        lrqp.capture(build("gpt2").to("meta"), INPUTS, ["L1.mid"], AT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@torch.no_grad()
def test_blocks_probe_and_positions_on_different_devices() -> None:
    edit, wanted = reference("llama")
    places = {**dict.fromkeys(spread("llama"), "cpu"), "model.layers.1": 0, "model.layers.2": 0}
    model = accelerate().dispatch_model(build("llama"), places, main_device="cpu")
    for site in SITES:
        with edit.at(model, site, positions=AT.cuda(), target=TARGET) as run:
            edited = model(**INPUTS).logits
        assert bool((run.log_odds_after >= run.floor).all())
        torch.testing.assert_close(edited.cpu(), wanted[f"{site} edited"], rtol=1e-3, atol=1e-3)


def test_a_wrapper_that_is_no_transformers_model_is_named() -> None:
    with pytest.raises(UnknownFamilyError, match=r"DataParallel has no config\.model_type"):
        lrqp.capture(nn.DataParallel(build("gpt2")), INPUTS, ["L1.mid"], AT)


@torch.no_grad()
def test_what_ranks_hold_parts_of_is_left_out_of_the_search() -> None:
    """A model that torch's own ``parallelize_module`` has changed: its sites are of the stream."""
    plain: Any = build("llama", num_hidden_layers=2)
    edit, plan = fitted(plain), {"self_attn.o_proj": tensor_parallel.RowwiseParallel()}
    plan |= {f"self_attn.{name}_proj": tensor_parallel.ColwiseParallel() for name in "qkv"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = build("llama", num_hidden_layers=2)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            tensor_parallel.parallelize_module(block, mesh, plan)
        found = []
        for each in (plain, model):
            with edit.at(each, "L1.mid", positions=AT, target=TARGET) as run:
                found.append((each(**INPUTS).logits, run.log_odds_after))
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_model_with_adapters_is_edited_with_them() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(**options)).eval()
    edit = fitted(model)
    found = results(model, edit)
    assert (found["clean"] - reference("llama")[1]["clean"]).abs().max() > 1e-3
    merged = results(model.merge_and_unload(), edit)
    for key, value in found.items():
        torch.testing.assert_close(value, merged[key], rtol=1e-3, atol=1e-3, msg=key)


def torchao_weights(model: nn.Module) -> None:
    quantisation = importlib.import_module("torchao.quantization")
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())


def torchao_dynamic(model: nn.Module) -> None:
    quantisation = importlib.import_module("torchao.quantization")
    quantisation.quantize_(model, quantisation.Int8DynamicActivationInt8WeightConfig())


def quanto_weights(model: nn.Module) -> None:
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def bitsandbytes_8bit(model: nn.Module) -> None:
    linear = importlib.import_module("bitsandbytes").nn.Linear8bitLt
    _replace(model, lambda old: linear(*_shape(old), has_fp16_weights=False))


def bitsandbytes_4bit(model: nn.Module) -> None:
    linear = importlib.import_module("bitsandbytes").nn.Linear4bit
    _replace(model, lambda old: linear(*_shape(old), compute_dtype=old.weight.dtype))


def _shape(old: nn.Linear) -> tuple[int, int, bool]:
    return old.in_features, old.out_features, old.bias is not None


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Linear]) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            new = make(module)
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new.to("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("library", "quantise"),
    [
        ("torchao", torchao_weights),
        ("torchao", torchao_dynamic),
        ("optimum.quanto", quanto_weights),
        ("bitsandbytes", bitsandbytes_8bit),
        ("bitsandbytes", bitsandbytes_4bit),
    ],
)
@torch.no_grad()
def test_a_quantised_model_is_edited_like_any_other(
    library: str, quantise: Callable[[nn.Module], None], dtype: torch.dtype
) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    model = build("llama", dtype=dtype, hidden_size=64, intermediate_size=128)
    exact = model(**INPUTS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantise(model)
    assert not torch.equal(model(**INPUTS).logits, exact)
    edit = fitted(model)
    found = results(model, edit)
    assert all(found[site].dtype == dtype for site in SITES)
    for site in SITES:
        assert (found[f"{site} edited"] - found["clean"]).abs().max() > 0.1
    last = found["L1.mid edited"][:, -1]
    torch.testing.assert_close(found["replayed"], last, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("name", POST_MODELS)
def test_deterministic_algorithms_give_the_same_bits_again(name: str) -> None:
    def once() -> list[Tensor]:
        model = build(name)
        x = lrqp.capture(model, INPUTS, ["L1.mid"], REAL, batch_size=2)["L1.mid"]
        edit = lrqp.LRQP.fit(x, torch.arange(len(x)) % 3, log_odds=5.0)
        found = list(results(model, edit).values())
        start = x[:4].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(edit(start, TARGET).square().sum(), start)
        return [x, edit.probe.weight, edit.metric.covariance, gradient, *found]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = once(), once()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", POST_MODELS)
def test_batch_size_changes_no_more_than_rounding(name: str) -> None:
    model, edits = build(name), []
    for size in (1, 3, 4):
        x = lrqp.capture(model, INPUTS, ["L1.mid"], REAL, batch_size=size)["L1.mid"]
        edits.append(lrqp.LRQP.fit(x, torch.arange(len(x)) % 3))
    for edit in edits[1:]:
        for one, other in (
            (edit.probe.weight, edits[0].probe.weight),
            (edit.metric.covariance, edits[0].metric.covariance),
        ):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", POST_MODELS)
@torch.no_grad()
def test_inputs_that_share_memory_or_are_not_contiguous(name: str) -> None:
    model: Any = build(name)
    edit = fitted(model)
    turned = {key: value.t().contiguous().t() for key, value in INPUTS.items()}
    assert not turned["input_ids"].is_contiguous()
    wanted = lrqp.capture(model, INPUTS, ["L1.mid"], AT)["L1.mid"]
    assert torch.equal(lrqp.capture(model, turned, ["L1.mid"], AT)["L1.mid"], wanted)
    # One prompt seen four times: an edit of one view must not reach the others.
    stream = model.get_input_embeddings()(INPUTS["input_ids"][:1]).expand(4, -1, -1)
    clean = model(inputs_embeds=stream.clone()).logits
    columns = torch.tensor([1, 2, 3, 4])
    with edit.at(model, "L0.pre", positions=columns, target=torch.tensor(1).expand(4)) as run:
        edited = model(inputs_embeds=stream).logits
    assert bool((run.status == lrqp.Status.SOLVED).all())
    for row, column in enumerate(columns.tolist()):
        torch.testing.assert_close(edited[row, :column], clean[row, :column])
        assert (edited[row, column] - clean[row, column]).abs().max() > 1e-3


@pytest.mark.parametrize("name", POST_MODELS)
def test_inference_mode_equals_no_grad(name: str) -> None:
    edit, wanted = reference(name)
    with torch.inference_mode():
        found = results(build(name), edit)
        x = lrqp.capture(build(name), INPUTS, ["L1.mid"], REAL)["L1.mid"]
        inside = lrqp.LRQP.fit(x, torch.arange(len(x)) % 3)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5, msg=key)
    outside = lrqp.LRQP.fit(x.clone(), torch.arange(len(x)) % 3)
    assert torch.equal(inside.probe.weight, outside.probe.weight)
    # What is fitted there is as usable as anything else, gradients included.
    assert not any(value.is_inference() for value in inside.state_dict().values())
    start = x.clone().requires_grad_()
    slopes = [torch.autograd.grad(edit(start, 0).sum(), start)[0] for edit in (inside, outside)]
    assert torch.equal(*slopes)


def trained(name: str, **checkpointing: Any) -> Any:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    model: Any = build(name, **still).train()
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(checkpointing)
    return model


@pytest.mark.filterwarnings("ignore:gradient checkpointing runs")
@pytest.mark.parametrize("name", POST_MODELS)
@pytest.mark.parametrize("site", ["L0.pre", "L1.mid", "L2.post"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_runs_edits_twice_and_changes_nothing(
    name: str, site: str, use_reentrant: bool
) -> None:
    edit, _ = reference(name)
    found = []
    for checkpointing in ({}, {"use_reentrant": use_reentrant}):
        model, calls = trained(name, **checkpointing), []

        def count(x: Tensor, context: Any, calls: list[int] = calls) -> Tensor:
            calls.append(len(x))
            return x

        embeddings = model.get_input_embeddings()(INPUTS["input_ids"])
        rest = {"attention_mask": INPUTS["attention_mask"], "use_cache": False}
        edits = [edit.on(site, positions=AT, target=TARGET), Intervention(site, AT, count)]
        with intervene(model, edits) as (run, _):
            logits = model(inputs_embeds=embeddings, **rest).logits
            logits.square().mean().backward()
        record = run.log_odds_before, run.log_odds_after, run.distance, run.status
        assert len(run.steps) == 1
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append((logits.detach(), record, gradients, calls))
    (logits, record, gradients, once), (again, record_again, gradients_again, twice) = found
    assert once == [4]
    # What is run again is the inside of a block, with or without the hooks at its ends.
    assert twice == [4, 4] or (twice == [4] and site != "L1.mid")
    assert torch.equal(logits, again)
    for one, other in zip((*record, *gradients), (*record_again, *gradients_again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", POST_MODELS)
def test_a_backward_pass_after_the_context_is_refused_or_warned_of(name: str) -> None:
    edit, _ = reference(name)
    model = trained(name, use_reentrant=False)
    with edit.at(model, "L1.mid", positions=AT, target=TARGET):
        logits = model(**INPUTS, use_cache=False).logits
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different number of tensors"):
        logits.square().mean().backward()
    model = trained(name, use_reentrant=True)
    message = "call backward before the context closes"
    with pytest.warns(UserWarning, match=message):
        edit.at(model, "L1.mid", positions=AT, target=TARGET).__enter__()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{message}")
        edit.at(model, "L1.mid", positions=AT, target=TARGET).__enter__()
