"""Engines of vLLM in this process, and what transformers says of the same requests."""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lrqp_torch as lrqp
from lrqp_torch.serving.requests import FOLDERS_VARIABLE, Library

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SECOND = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
"""Whether vLLM's second model runner is meant, whose kernels are in Triton, and with it
asynchronous scheduling: what vLLM does by default on a GPU, and can be led to on a CPU."""
if SECOND:
    # There is a backend of Triton for CPUs, which no package has; its interpreter stands in for it.
    from types import SimpleNamespace

    from triton.backends import backends

    assert os.environ.get("TRITON_INTERPRET") == "1", "the second runner needs it on a CPU"
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

    from vllm.platforms.cpu import CpuPlatform

    _configure = CpuPlatform.check_and_update_config.__func__

    def _ahead(cls: Any, config: Any) -> None:
        _configure(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(_ahead)

BLOCK = 32
Asked = dict[str, Any] | list[dict[str, Any]] | None


@contextmanager
def serving(model: str | Path, edits: str | Path | None, **options: Any) -> Iterator[Any]:
    """An engine that serves a model with edits; small, in this process, and gone afterwards."""
    from vllm import LLM

    before = os.environ.pop(FOLDERS_VARIABLE, None)
    if edits is not None:
        os.environ[FOLDERS_VARIABLE] = str(edits)
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "block_size": BLOCK,
        "max_model_len": 160,
        "num_gpu_blocks_override": 200,
        "seed": 0,
        "disable_log_stats": True,
    } | options
    # What is left of an engine that did not start would end vLLM's groups of processes later.
    gc.collect()
    try:
        engine = LLM(str(model), **options)
        core = engine.llm_engine.engine_core.engine_core
        assert core.async_scheduling == SECOND, "not as it was meant"
        try:
            yield engine
        finally:
            del engine
            gc.collect()
    finally:
        os.environ.pop(FOLDERS_VARIABLE, None)
        if before is not None:
            os.environ[FOLDERS_VARIABLE] = before


def answers(
    engine: Any, prompts: Sequence[list[int]], asked: Sequence[Asked], **params: Any
) -> Any:
    """What an engine makes of prompts, each with the edits asked for, or none."""
    from vllm import SamplingParams

    settings = {"max_tokens": 1, "temperature": 0.0, "logprobs": 20, "ignore_eos": True} | params
    each = [
        SamplingParams(extra_args=None if one is None else {"lrqp": json.dumps(one)}, **settings)
        for one in asked
    ]
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], each, use_tqdm=False)


def reference(
    model: torch.nn.Module, ids: list[int], asked: Asked, edits: Library, tokens: int = 1
) -> tuple[Tensor, list[int], list[lrqp.EditRun]]:
    """What transformers makes of a prompt: log-probabilities of each token, tokens, and records."""
    items = [] if asked is None else asked if isinstance(asked, list) else [asked]
    runs: list[lrqp.EditRun] = []
    with ExitStack() as stack, torch.no_grad():
        for item in items:
            named = edits[item["edit"]]
            where = item.get("scope")
            if where is None:
                where = torch.tensor([[p % len(ids) if p < 0 else p for p in item["positions"]]])
            given = {key: _classes(item[key]) for key in ("target", "source") if key in item}
            runs.append(
                stack.enter_context(named.edit.at(model, named.site, positions=where, **given))
            )
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.stack([step[0] for step in made.logits])
    return logits.log_softmax(-1), made.sequences[0, len(ids) :].tolist(), runs


def _classes(given: Any) -> Any:
    if isinstance(given, dict):
        return {name: _classes(value) for name, value in given.items()}
    return torch.tensor([given]) if isinstance(given, list) else given


def worst(output: Any, expected: Tensor) -> float:
    """The largest difference of any log-probability of an output from those expected."""
    steps = output.outputs[0].logprobs
    return max(
        abs(float(row[token]) - said.logprob)
        for row, step in zip(expected, steps, strict=True)
        for token, said in step.items()
    )
