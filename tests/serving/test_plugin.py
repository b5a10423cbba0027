"""Edits inside vLLM are those of ``edit.at`` in transformers, request by request."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.errors import MissingExtraError, RequestError, ServingError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models.load import load, pretrained_folder
from lrqp_torch.serving import operator, plugin
from lrqp_torch.serving.requests import FOLDERS_VARIABLE, Library

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see make test-serving", allow_module_level=True)

from engines_for_tests import BLOCK, answers, reference, serving, worst

# Of log-probabilities in float32; unedited, transformers and vLLM differ by 1e-5.
CLOSE = 2e-4
FITTED = 500


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    return load("organism")


@pytest.fixture(scope="module")
def folder(organism: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edits of the organism: of two classes at four sites, of five, total odds, and joint ones."""
    model, tokenizer = organism
    root = tmp_path_factory.mktemp("edits")
    data = IOIDataset.generate(tokenizer, n=FITTED, seed=0)
    sites = ["L2.pre", "L2.mid", "L3.post", "L5.post", "L3.pre"]
    states = lrqp.capture(model, data.inputs, sites, positions=data.positions["S2"], batch_size=100)
    order, names = data.labels["abb"], torch.as_tensor(data.io_tokens) % 5

    def save(edit: Any, name: str, site: str) -> None:
        for part in getattr(edit, "edits", [edit]):
            part.provenance = lrqp.Provenance.of(model, site)
        edit.save(root / name)

    for name, site in zip(("pre", "mid", "post", "last"), sites, strict=False):
        save(lrqp.LRQP.fit(states[site], order), name, site)
    save(lrqp.LRQP.fit(states["L3.pre"], names), "five", "L3.pre")
    save(lrqp.LRQP.fit(states["L3.pre"], names, odds="total", rule="fixed"), "total", "L3.pre")
    save(lrqp.JointLRQP.fit(states["L2.mid"], {"order": order, "name": names}), "joint", "L2.mid")
    return root


@pytest.fixture(scope="module")
def edits(folder: Path) -> Library:
    return Library.load(folder)


@pytest.fixture(scope="module")
def place() -> str:
    return pretrained_folder("organism")


@pytest.fixture(scope="module")
def engine(place: str, folder: Path) -> Iterator[Any]:
    """Cuts prompts into chunks of 7 tokens, and keeps blocks of 32."""
    with serving(place, folder, long_prefill_token_threshold=7) as found:
        yield found


@pytest.fixture(scope="module")
def prompts(organism: tuple[Any, Any]) -> tuple[list[list[int]], list[int]]:
    """24 prompts of 35 to 60 tokens, and where in each the repeated name is."""
    _, tokenizer = organism
    data = IOIDataset.generate(tokenizer, n=24, seed=1, prefixes="bundled")
    kept = data.inputs["attention_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(data.inputs["input_ids"], kept, strict=True)]
    return ids, data.positions["S2"].tolist()


def asked_of(number: int, where: int, turn: int = 0) -> Any:
    """Of each four prompts three are edited, each at another site, the fourth is not."""
    name = (None, "mid", "pre", "post")[(number + turn) % 4]
    return name and {"edit": name, "positions": [where], "target": number % 2}


def check(outputs: Any, expected: Any, close: float = CLOSE) -> None:
    for output, (said, tokens, runs) in zip(outputs, expected, strict=True):
        assert list(output.outputs[0].token_ids) == tokens
        assert worst(output, said) < close
        records = plugin.certificates(output)
        assert len(records) == len(runs)
        for record, run in zip(records, runs, strict=True):
            odds = [row if isinstance(row, list) else [row] for row in record["log_odds_after"]]
            flat = [torch.nan if odd is None else odd for row in odds for odd in row]
            found = torch.tensor(flat, dtype=torch.float64)
            want = run.log_odds_after.flatten()
            torch.testing.assert_close(found, want, atol=1e-2, rtol=1e-3, equal_nan=True)


def test_a_mixed_batch_is_edited_as_in_transformers_cached_or_not_and_with_roles_exchanged(
    engine: Any, organism: Any, edits: Library, prompts: Any
) -> None:
    (model, _), (ids, where) = organism, prompts
    for turn in (0, 0, 1, 2):
        asked = [asked_of(number, s2, turn) for number, s2 in enumerate(where)]
        expected = [reference(model, *pair, edits) for pair in zip(ids, asked, strict=True)]
        check(answers(engine, ids, asked), expected)


def test_the_form_of_the_operator_for_gpus_edits_the_same_inside_vllm(
    engine: Any, organism: Any, edits: Library, prompts: Any, monkeypatch: Any
) -> None:
    (model, _), (ids, where) = organism, prompts
    monkeypatch.setattr(operator.Tables, "gathered", operator.Tables.everywhere)
    asked = [asked_of(number, s2) for number, s2 in enumerate(where[:9])]
    asked[4] = [
        {"edit": "five", "positions": [3, -2], "target": [4, 0], "source": 1},
        {"edit": "joint", "positions": [3], "target": {"order": 1, "name": "keep"}},
    ]
    asked[8] = {"edit": "last", "scope": "all", "target": 1}
    expected = [
        reference(model, *pair, edits, tokens=3)
        for pair in zip(ids, [one if one is None else swapped(one) for one in asked], strict=False)
    ]
    check(answers(engine, ids[:9], asked, max_tokens=3), expected)


def swapped(asked: Any) -> Any:
    """The same for ``edit.at``, which has a number for what is kept."""
    if isinstance(asked, list):
        return [swapped(one) for one in asked]
    target = asked["target"]
    if isinstance(target, dict):
        words = {"keep": lrqp.JointLRQP.KEEP}
        target = {name: words.get(value, value) for name, value in target.items()}
    return asked | {"target": target}


def test_every_token_may_be_edited_also_the_first_and_the_last_of_a_chunk(
    engine: Any, organism: Any, edits: Library, prompts: Any
) -> None:
    (model, _), ids = organism, prompts[0][0]
    places = [*range(0, len(ids), 3), 6, 7, 13, 14, len(ids) - 1]
    asked = [{"edit": "mid", "positions": [p], "target": p % 2} for p in places]
    expected = [reference(model, ids, one, edits) for one in asked]
    check(answers(engine, [ids] * len(asked), asked), expected)


def test_scopes_edit_while_a_text_is_generated(
    engine: Any, organism: Any, edits: Library, prompts: Any
) -> None:
    (model, _), ids = organism, prompts[0][:9]
    scopes = "generated", "prompt", "all"
    asked = [
        {"edit": ("mid", "post", "last")[n // 3], "scope": scopes[n % 3], "target": n % 2}
        for n in range(9)
    ]
    expected = [reference(model, *pair, edits, tokens=12) for pair in zip(ids, asked, strict=True)]
    outputs = answers(engine, ids, asked, max_tokens=12)
    check(outputs, expected)
    generated = plugin.certificates(outputs[0])[0]["positions"]
    assert generated == list(range(len(ids[0]), len(ids[0]) + 11))


def test_a_request_may_ask_for_several_edits_also_of_one_token(
    engine: Any, organism: Any, edits: Library, prompts: Any
) -> None:
    (model, _), (ids, where) = organism, prompts
    asked = [
        [
            {"edit": "pre", "positions": [s2], "target": 1},
            {"edit": "mid", "positions": [s2, 3, -1], "target": [0, 1, 0]},
            {"edit": "five", "positions": [s2 - 1], "target": 4, "source": 2},
            {"edit": "post", "scope": "generated", "target": 1},
        ]
        for s2 in where[:4]
    ]
    expected = [reference(model, *pair, edits, tokens=4) for pair in zip(ids, asked, strict=False)]
    check(answers(engine, ids[:4], asked, max_tokens=4), expected)


@pytest.mark.parametrize("name", ["five", "total", "joint"])
def test_five_classes_total_odds_and_several_variables(
    engine: Any, organism: Any, edits: Library, prompts: Any, name: str
) -> None:
    (model, _), (ids, where) = organism, prompts
    asked = []
    for number, s2 in enumerate(where[:10]):
        target: Any = number % 5
        if name == "joint":
            target = {"order": number % 2, "name": target}
        one = {"edit": name, "positions": [s2], "target": target}
        if name == "five" and number % 2:
            one["source"] = (target + 1) % 5
        asked.append(one)
    expected = [reference(model, *pair, edits) for pair in zip(ids, asked, strict=False)]
    outputs = answers(engine, ids[:10], asked)
    check(outputs, expected)
    for output in outputs:
        (record,) = plugin.certificates(output)
        odds = zip(record["log_odds_after"], record["log_odds_asked"], strict=True)
        assert all(bool((numbers(a) >= numbers(b)).all()) for a, b in odds)
        assert set(record["status"]) <= {"SOLVED", "SATISFIED"}


def numbers(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def test_a_certificate_is_found_with_the_block_that_an_earlier_request_computed(
    engine: Any, prompts: Any, monkeypatch: Any
) -> None:
    ids = prompts[0][3][:3] + prompts[0][3]
    asked = {"edit": "mid", "positions": [5, 20], "target": 1}
    first, second = (answers(engine, [ids], [asked])[0] for _ in range(2))
    assert second.num_cached_tokens == BLOCK
    assert plugin.certificates(first) == plugin.certificates(second)
    assert plugin.certificates(first)[0]["positions"] == [5, 20]
    # Only so many are remembered; the block is as edited as before.
    monkeypatch.setattr(plugin, "REMEMBERED", 0)
    answers(engine, [ids[4:] + ids], [asked])
    (third,) = answers(engine, [ids], [asked])
    assert third.num_cached_tokens == BLOCK and third.outputs[0].finish_reason == "length"
    (record,) = plugin.certificates(third)
    assert record["status"] == ["CACHED"] * 2 and record["distance"] == [None] * 2


def test_stop_strings_and_several_samples_keep_their_certificates(
    engine: Any, organism: Any, prompts: Any
) -> None:
    ids, (_, tokenizer) = prompts[0][0], organism
    asked = {"edit": "mid", "scope": "all", "target": 1}
    (whole,) = answers(engine, [ids], [asked], max_tokens=6)
    stop = tokenizer.decode(whole.outputs[0].token_ids[2])
    (short,) = answers(engine, [ids], [asked], max_tokens=6, stop=[stop.strip()])
    made = len(short.outputs[0].token_ids)
    assert short.outputs[0].finish_reason == "stop" and made <= 3
    (record,) = plugin.certificates(short)
    assert record["positions"] == list(range(len(ids) + made - 1))
    (both,) = answers(engine, [ids], [asked], max_tokens=3, n=2, temperature=1.0)
    for one in both.outputs:
        (record,) = plugin.certificates(one)
        assert record["positions"] == list(range(len(ids) + 2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('{"edit": "nope", "positions": [0], "target": 0}', "no edit 'nope'"),
        ('{"edit": "mid", "positions": [99], "target": 0}', "out of reach"),
        ('{"edit": "mid", "positions": [0], "target": 7}', "classes 0 to 1"),
        ("{", "lrqp"),
        ("[]", "empty list"),
    ],
)
def test_a_wrong_request_is_refused_before_it_is_scheduled(
    engine: Any, prompts: Any, given: str, said: str
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, extra_args={"lrqp": given})
    with pytest.raises(ValueError, match=said):
        engine.generate([{"prompt_token_ids": prompts[0][0]}], params, use_tqdm=False)
    settled = SamplingParams(max_tokens=1, extra_args={plugin.SETTLED: []})
    with pytest.raises(RequestError, match="no argument"):
        engine.generate([{"prompt_token_ids": prompts[0][0]}], settled, use_tqdm=False)


def test_a_position_that_is_never_read_makes_the_request_an_error(
    engine: Any, prompts: Any
) -> None:
    ids = prompts[0][0]
    (whole,) = answers(engine, [ids], [None], max_tokens=3)
    asked = {"edit": "mid", "positions": [3, len(ids) + 5], "target": 0}
    stops = {"stop_token_ids": list(whole.outputs[0].token_ids), "max_tokens": 9}
    (output,) = answers(engine, [ids], [asked], **stops)
    assert output.outputs[0].finish_reason == "error"
    assert f"'mid' never fired at position {len(ids) + 5}" in output.outputs[0].stop_reason
    assert plugin.certificates(output)[0]["positions"] == [3]


# Each from here on has an engine of its own, whose end may take vLLM's groups of processes along.


def test_blocks_before_the_first_edit_are_shared_and_those_from_it_on_are_not(
    place: str, folder: Path, organism: Any, edits: Library
) -> None:
    model, _ = organism
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(5, 3000, (70,), generator=generator).tolist()
    ids = [start + [number + 5] * 40 for number in range(4)]
    at = {"edit": "mid", "positions": [75], "target": 1}
    other = at | {"target": 0}
    early = {"edit": "mid", "positions": [40], "target": 1}
    # Whose blocks of 32 tokens are found: all before the edit, of 110 tokens 64; an equal request's
    # 96; of one whose edit is in the second block 32.
    turns: list[tuple[Any, int, int]] = [
        (at, 0, 0), (None, 0, 64), (other, 0, 64), (at, 0, 96), (None, 0, 96),
        (at, 1, 64), (early, 1, 32), (None, 1, 64), (early, 1, 96), (early, 2, 64), (None, 2, 64),
        (None, 3, 64), (at, 3, 64), (None, 3, 96),
    ]  # fmt: skip
    with serving(place, folder) as found:
        for asked, number, cached in turns:
            expected = reference(model, ids[number], asked, edits)
            outputs = answers(found, [ids[number]], [asked])
            check(outputs, [expected])
            assert outputs[0].num_cached_tokens == cached, (asked, number)
        # What was generated under an edit is no answer for a prompt with the same tokens.
        asked = {"edit": "last", "scope": "generated", "target": 1}
        (text,) = answers(found, [ids[3][:60]], [asked], max_tokens=70)
        longer = ids[3][:60] + list(text.outputs[0].token_ids)
        outputs = answers(found, [longer], [None])
        check(outputs, [reference(model, longer, None, edits)])
        assert outputs[0].num_cached_tokens == 32


def test_preempted_requests_are_edited_anew(
    place: str, folder: Path, organism: Any, edits: Library, prompts: Any
) -> None:
    (model, _), (ids, where) = organism, prompts
    asked = [asked_of(number, s2) for number, s2 in enumerate(where[:8])]
    asked[3] = {"edit": "last", "scope": "all", "target": 1}
    expected = [reference(model, *p, edits, tokens=30) for p in zip(ids, asked, strict=False)]
    preempted = []
    with serving(place, folder, num_gpu_blocks_override=10) as found:
        scheduler = found.llm_engine.engine_core.engine_core.scheduler
        inner = scheduler._preempt_request

        def preempt(*args: Any, **kwargs: Any) -> Any:
            preempted.append(args)
            return inner(*args, **kwargs)

        scheduler._preempt_request = preempt
        check(answers(found, ids[:8], asked, max_tokens=30), expected)
    assert preempted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_promise_holds_for_the_rows_that_the_stream_holds(
    place: str, folder: Path, edits: Library, prompts: Any, dtype: str, monkeypatch: Any
) -> None:
    held: list[tuple[str, Tensor, Tensor]] = []

    def gathered(tables: Any, number: int, x: Tensor, residual: Any, inner: Any = None) -> None:
        rows = tables.shown[number, : len(x)].nonzero().squeeze(-1)
        inside(tables, number, x, residual)
        stream = x if residual is None else x + residual
        held.append((tables.named[number].name, stream[rows], tables.target[number, rows, 0]))

    inside = operator.Tables.gathered
    monkeypatch.setattr(operator.Tables, "gathered", gathered)
    ids = prompts[0][:6]
    names = "pre", "mid", "post", "last", "five", "five"
    asked = [{"edit": n, "scope": "all", "target": k % 2} for k, n in enumerate(names)]
    with serving(place, folder, dtype=dtype) as found:
        held.clear()
        outputs = answers(found, ids, asked, max_tokens=8)
    least: dict[str, float] = {}
    for name, stream, target in held:
        assert stream.dtype == getattr(torch, dtype)
        if len(stream):
            geometry = edits[name].edit.geometry(stream.device)
            odds = geometry.margins(stream, target).amin(-1)  # type: ignore[arg-type]
            least[name] = min(least.get(name, torch.inf), float(odds.min()))
    assert least.keys() == set(names)
    assert min(least.values()) >= 10
    for output, name in zip(outputs, names, strict=True):
        (record,) = plugin.certificates(output)
        assert min(record["log_odds_after"]) > least[name] - 1e-9


def test_compiled_graphs_hold_the_operator(
    place: str, folder: Path, organism: Any, edits: Library, prompts: Any
) -> None:
    (model, _), (ids, where) = organism, prompts
    asked = [asked_of(number, s2) for number, s2 in enumerate(where[:12])]
    asked[0] = {"edit": "last", "scope": "all", "target": 1}
    expected = [reference(model, *p, edits, tokens=6) for p in zip(ids, asked, strict=False)]
    with serving(place, folder, enforce_eager=False) as found:
        check(answers(found, ids[:12], asked, max_tokens=6), expected)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32,
    },
}  # fmt: skip


SHAPE = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_served_is_edited_at_every_site_as_in_transformers(
    family: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    sites = ["L0.pre", "L0.mid", "L1.pre", "L1.mid", "L1.post", "L2.mid", "L2.post"]
    data = torch.randint(3, 200, (60, 8))
    states = lrqp.capture(model, {"input_ids": data}, sites, positions=torch.full((60,), 5))
    for site in sites:
        edit = lrqp.LRQP.fit(states[site], torch.arange(60) % 2, l2=0.1)
        edit.provenance = lrqp.Provenance.of(model, site)
        edit.save(tmp_path / "edits" / site)
    edits = Library.load(tmp_path / "edits")
    ids = [torch.randint(3, 200, (20,)).tolist() for _ in range(len(sites) + 1)]
    asked: list[Any] = [
        {"edit": site, "positions": [4, 11, -1], "target": [n % 2, 0, 1]}
        for n, site in enumerate(sites)
    ]
    asked.append(None)
    expected = [reference(model, *p, edits, tokens=3) for p in zip(ids, asked, strict=True)]
    with serving(tmp_path / "model", tmp_path / "edits", skip_tokenizer_init=True) as found:
        check(answers(found, ids, asked, max_tokens=3, detokenize=False), expected)


def test_a_family_that_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).eval()
    model.save_pretrained(tmp_path / "model")
    edit = lrqp.LRQP(lrqp.LinearProbe(64, 2), lrqp.Mahalanobis(torch.eye(64)))
    edit.save(tmp_path / "edit", site="L1.pre")
    with (
        pytest.raises(ServingError, match="not served in GPTNeoXForCausalLM"),
        serving(tmp_path / "model", tmp_path / "edit", skip_tokenizer_init=True),
    ):
        pass


@pytest.mark.parametrize("ways", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_two_processes_hold_the_same_edits(
    place: str, folder: Path, organism: Any, edits: Library, prompts: Any, ways: dict[str, int]
) -> None:
    (model, _), (ids, where) = organism, prompts
    asked = [asked_of(number, s2) for number, s2 in enumerate(where[:12])]
    asked[0] = [
        {"edit": "pre", "scope": "all", "target": 1},
        {"edit": "last", "scope": "generated", "target": 0},
        {"edit": "joint", "positions": [3], "target": {"order": 1, "name": 2}},
    ]
    expected = [reference(model, *p, edits, tokens=6) for p in zip(ids, asked, strict=False)]
    # Without compilation vLLM 0.32 on a CPU has no room for what one rank sends the next.
    options = ways | {"enforce_eager": "pipeline_parallel_size" not in ways}
    with serving(place, folder, distributed_executor_backend="mp", **options) as found:
        check(answers(found, ids[:12], asked, max_tokens=6), expected)
        again = answers(found, ids[:12], asked, max_tokens=6)
        check(again, expected)


def test_smollm2_is_edited_as_in_transformers(tmp_path: Path) -> None:
    try:
        model, tokenizer = load("smollm2")
    except MissingExtraError as error:
        pytest.skip(str(error))
    model.save_pretrained(tmp_path / "model")
    data = IOIDataset.generate(tokenizer, n=64, seed=0)
    site, kept = "L18.mid", data.inputs["attention_mask"].bool()
    states = lrqp.capture(model, data.inputs, [site], positions=data.positions["S2"])
    edit = lrqp.LRQP.fit(states[site], data.labels["abb"])
    edit.provenance = lrqp.Provenance.of(model, site)
    edit.save(tmp_path / "edits" / "order")
    edits = Library.load(tmp_path / "edits")
    rows = zip(data.inputs["input_ids"], kept, strict=True)
    ids = [row[mask].tolist() for row, mask in rows][:9]
    asked = [
        n % 3 and {"edit": "order", "positions": [s2], "target": n % 2}
        for n, s2 in enumerate(data.positions["S2"].tolist()[:9])
    ]
    asked = [one or None for one in asked]
    asked[8] = {"edit": "order", "scope": "generated", "target": 1}
    expected = [reference(model, *p, edits, tokens=4) for p in zip(ids, asked, strict=True)]
    options = {"skip_tokenizer_init": True, "max_model_len": 64, "num_gpu_blocks_override": 40}
    with serving(tmp_path / "model", tmp_path / "edits", **options) as found:
        check(answers(found, ids, asked, max_tokens=4, detokenize=False), expected, close=5e-4)


def test_an_edit_that_fails_makes_its_request_alone_an_error(
    place: str, organism: Any, edits: Library, prompts: Any, tmp_path: Path
) -> None:
    (model, _), (ids, _) = organism, prompts
    probe = lrqp.LinearProbe(128, 3).requires_grad_(False)
    probe.weight.zero_()
    probe.weight[0] = 1.0
    for name, option in (("flat", "raise"), ("skipped", "skip")):
        edit = lrqp.LRQP(probe, lrqp.Mahalanobis(torch.eye(128)), on_infeasible=option)
        edit.provenance = lrqp.Provenance.of(model, "L2.mid")
        edit.save(tmp_path / name)
    with serving(place, tmp_path) as found:
        asked = [{"edit": n, "positions": [4], "target": 1} for n in ("flat", "skipped")]
        failed, skipped, free = answers(found, ids[:3], [*asked, None])
    assert failed.outputs[0].finish_reason == "error"
    assert "'flat' failed at position 4: INFEASIBLE" in failed.outputs[0].stop_reason
    assert skipped.outputs[0].finish_reason == "length"
    assert plugin.certificates(skipped)[0]["status"] == ["INFEASIBLE"]
    check([free], [reference(model, ids[2], None, edits)])
    assert worst(skipped, reference(model, ids[1], None, edits)[0]) < CLOSE


def test_a_server_without_edits_refuses_requests_that_ask_for_one(place: str, prompts: Any) -> None:
    with serving(place, None) as found, pytest.raises(RequestError, match="without edits"):
        asked = {"edit": "mid", "positions": [0], "target": 0}
        answers(found, prompts[0][:1], [asked])


def test_a_server_does_not_start_with_what_it_cannot_promise(
    place: str, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import vllm

    edit = lrqp.LRQP(lrqp.LinearProbe(128, 2), lrqp.Mahalanobis(torch.eye(128)))
    edit.save(tmp_path / "z", site="L2.z")
    with pytest.raises(ServingError, match=r"L2\.z is not served"), serving(place, tmp_path):
        pass
    monkeypatch.setattr(plugin, "_load", lambda inner, runner, *args, **kwargs: None)
    monkeypatch.setattr(plugin.Blocks, "here", lambda self, sites: {})
    with pytest.raises(ServingError, match="no rank has armed"), serving(place, folder):
        pass
    monkeypatch.setenv(FOLDERS_VARIABLE, str(folder))
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(ServingError, match=r"this is 0\.33\.0"):
        plugin.register()
    monkeypatch.delenv(FOLDERS_VARIABLE)
    plugin.register()


def test_a_rank_that_is_armed_otherwise_is_named(edits: Library) -> None:
    armed = {"rank": 0, "edits": edits.digest, "sites": ["L2.pre", "L2.mid", "L3.pre", "L4.pre"]}
    last = {"rank": 1, "edits": edits.digest, "sites": ["L6.pre"]}
    plugin.check_ranks([armed, last], edits)
    for wrong, said in (
        ([armed], "no rank has armed L6.pre"),
        ([armed, last | {"edits": "other"}], "rank 1 has other edits"),
        ([armed | {"edits": None}, last], "rank 0 has armed nothing"),
    ):
        with pytest.raises(ServingError, match=said):
            plugin.check_ranks(wrong, edits)


# The last of the file: the drafts are found by numba, after whose import vLLM 0.32 starts no other
# engine in the same process.
def test_speculation_edits_drafts_and_what_replaces_those_that_are_rejected(
    place: str, folder: Path, organism: Any, edits: Library, prompts: Any
) -> None:
    (model, _), (ids, where) = organism, prompts
    asked = [asked_of(number, s2) for number, s2 in enumerate(where[:8])]
    asked[:3] = [{"edit": n, "scope": "all", "target": 1} for n in ("mid", "last", "post")]
    asked[4] = {"edit": "last", "scope": "generated", "target": 0}
    expected = [reference(model, *p, edits, tokens=24) for p in zip(ids, asked, strict=False)]
    drafts = {
        "method": "ngram", "num_speculative_tokens": 3,
        "prompt_lookup_max": 2, "prompt_lookup_min": 1,
    }  # fmt: skip
    with serving(place, folder, speculative_config=drafts) as found:
        check(answers(found, ids[:8], asked, max_tokens=24), expected)
