"""What edits cost inside vLLM: time to the first token, and time per token after it.

Engines without the plugin and with edits armed answer the same random prompts in turns: without
edits (idle), with one token of each prompt edited, with every token edited. The ratios are medians
over rounds, each against the engine without the plugin in the same round; a second one without it
says how much two processes differ by themselves.

``--cache`` counts instead what goes wrong under the prefix cache where its blocks are not known by
the edits inside them.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, parse_arguments, report
from lrqp_torch import LRQP, LinearProbe, Mahalanobis, Provenance, capture
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models import load
from lrqp_torch.models.load import pretrained_folder
from lrqp_torch.serving.requests import FOLDERS_VARIABLE

BARE, AGAIN = "no plugin", "no plugin, another process"
NAME, SITE, BLOCK = "edit", "L2.mid", 32
ASKED: dict[str, Any] = {
    BARE: None,
    AGAIN: None,
    "idle": None,
    "one position": {"positions": [-1]},
    "every token": {"scope": "all"},
}
"""What each request asks for, by the row of the table; the first two are without the plugin."""


@dataclass(frozen=True)
class Round:
    """One batch to answer."""

    asked: Any
    batch: int
    prompt: int
    tokens: int
    seed: int
    alone: bool


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    if find_spec("vllm") is None:
        print("vLLM is not installed: make test-serving installs it for the CPU, then run")
        print(".venv-serving/bin/python -m benchmarks.serving; for a GPU pip install '.[vllm]'")
        return
    if arguments.cache:
        cached(arguments)
        return
    batches = [int(part) for part in arguments.batches.split(",")]
    if arguments.small:
        batches, arguments.tokens = batches[:1], 4
    alone = arguments.device == "cpu" and arguments.threads == 1
    times: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = pretrained_folder(arguments.model)
        _save_edit(arguments, source, Path(folder))
        with ExitStack() as stack:
            bare, again, armed = (
                stack.enter_context(_engine(source, edits, arguments))
                for edits in (None, None, folder)
            )
            engines = {BARE: bare, AGAIN: again}
            for number in range(arguments.repeats + 1):
                for batch in batches:
                    for name, asked in ASKED.items():
                        order = Round(
                            asked, batch, arguments.prompt, arguments.tokens, number, alone
                        )
                        engine = engines.get(name, armed)
                        engine.send(order)
                        took = engine.recv()
                        if number:  # the first round warms up
                            times.setdefault((batch, name), []).append(took)
    report(f"vLLM, {arguments.model}, {_facts(arguments)}", _rows(times), arguments)


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="as lrqp_torch.models.load takes it")
    parser.add_argument("--batches", default="1,8,32", help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--classes", type=int, default=2, help="of the probe, K")
    parser.add_argument("--site", default=None, help="default the middle block's mid")
    parser.add_argument("--dtype", default="auto", help="of the model, as vLLM takes it")
    parser.add_argument("--cache", action="store_true", help="what the prefix cache does to edits")
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.3, help="share of a GPU for an engine")


def _facts(arguments: Namespace) -> str:
    how = "eager" if arguments.eager else "compiled"
    return (
        f"{arguments.dtype}, {how}, K = {arguments.classes}, prompts of {arguments.prompt} tokens, "
        f"{arguments.tokens} generated"
    )


def _save_edit(arguments: Namespace, source: str, folder: Path) -> None:
    """An edit by a random probe, of which nothing but its cost is of interest."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    site = arguments.site or f"L{layers // 2}.mid"
    probe = LinearProbe(width, arguments.classes).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator) / width**0.5)
    edit = LRQP(probe, Mahalanobis(torch.eye(width)))
    edit.provenance = Provenance(site, config.model_type, width, layers, model=source)
    edit.save(folder / NAME)


@contextmanager
def _engine(
    source: str, edits: str | None, arguments: Namespace, **changed: Any
) -> Iterator[Connection]:
    """An engine in a process of its own, spoken to through a pipe."""
    environment = {
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "" if edits is None else "lrqp",
        "VLLM_LOGGING_LEVEL": "ERROR",
        FOLDERS_VARIABLE: edits or "",
    }
    if arguments.device == "cpu":
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    before = dict(os.environ)
    os.environ.update(environment)
    here, there = multiprocessing.Pipe()
    options: dict[str, Any] = {
        "model": source,
        "dtype": arguments.dtype,
        "enforce_eager": arguments.eager,
        "max_model_len": arguments.prompt + arguments.tokens,
        "max_num_seqs": max(map(int, arguments.batches.split(","))),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni",
    } | changed
    if arguments.device != "cpu":
        options["gpu_memory_utilization"] = arguments.memory
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(there, options), daemon=True)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    there.close()
    try:
        here.recv()
        yield here
    finally:
        here.close()
        process.join(30)
        process.kill()


def _serve(pipe: Connection, options: Mapping[str, Any]) -> None:
    """Answer rounds until the other end is closed."""
    from vllm import LLM

    engine = LLM(**options)
    pipe.send(True)
    try:
        while True:
            order = pipe.recv()
            pipe.send(
                _timed(engine.llm_engine, order) if isinstance(order, Round) else order(engine)
            )
    except (EOFError, BrokenPipeError):
        return


def _timed(engine: Any, order: Round) -> tuple[float, float]:
    """Seconds to the first token, of the mean request, and per token after it.

    One thread is timed by the time that it ran, as in :func:`benchmarks.measure.seconds_of`.
    """
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(order.seed)
    ids = torch.randint(100, 2000, (order.batch, order.prompt), generator=generator).tolist()
    extra = None
    if order.asked is not None:
        extra = {"lrqp": json.dumps({"edit": NAME, "target": 1} | order.asked)}
    first: dict[str, float] = {}
    clock = time.process_time if order.alone else time.perf_counter
    start = clock()
    for number, prompt in enumerate(ids):
        params = SamplingParams(
            max_tokens=order.tokens, temperature=0.0, ignore_eos=True, extra_args=extra
        )
        name = f"{order.seed}-{number}-{start}"
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            first.setdefault(output.request_id, clock() - start)
            reason = output.outputs[0].finish_reason
            if reason not in (None, "length"):
                raise RuntimeError(f"{reason}: {output.outputs[0].stop_reason}")
            if reason and (getattr(output.outputs[0], "lrqp", None) is None) == bool(extra):
                raise RuntimeError("edits were not made as they were asked for")
    total = clock() - start
    each = (total - max(first.values())) / (order.tokens - 1)
    return statistics.fmean(first.values()), each


def _rows(times: Mapping[tuple[int, str], list[tuple[float, float]]]) -> list[Row]:
    rows = []
    for (batch, name), took in times.items():
        bare = times[batch, BARE]
        row: Row = {"requests": f"{name}, {batch} at once"}
        for place, what in enumerate(("TTFT", "TPOT")):
            row[f"{what}, ms"] = 1e3 * statistics.median(pair[place] for pair in took)
            ratios = [a[place] / b[place] for a, b in zip(took, bare, strict=True)]
            row[f"{what}, × no plugin"] = statistics.median(ratios)
        rows.append(row)
    return rows


KEYED, UNKEYED, UNREAD = "edits in the key (here)", "tokens alone", "edited requests do not read"
"""What the cache does about edits: what this package does, nothing, and what others do."""
OFF = 0.1
"""Nats of the answer's log-probability beyond which an answer counts as wrong; right ones are
within 1e-3 of transformers."""


@dataclass(frozen=True)
class Asks:
    """Prompts to answer with one token each, some of them edited; called within the engine."""

    policy: str
    prompts: tuple[tuple[int, ...], ...]
    asked: tuple[Any, ...]

    def __call__(self, engine: Any) -> tuple[list[tuple[int, float]], int]:
        """Tokens and their log-probabilities; how many of the prompts' came from the cache."""
        from vllm import SamplingParams

        from lrqp_torch.serving import plugin

        if self.policy != KEYED:
            plugin.key_of_block = lambda edits, start, end: None
        params = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprobs=1,
                extra_args=None if one is None else {"lrqp": json.dumps(one)},
                skip_reading_prefix_cache=self.policy == UNREAD and one is not None,
            )
            for one in self.asked
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in self.prompts]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        firsts = [(o.outputs[0].token_ids[0], o.outputs[0].logprobs[0]) for o in outputs]
        found = [(token, steps[token].logprob) for token, steps in firsts]
        return found, sum(output.num_cached_tokens for output in outputs)


def cached(arguments: Namespace) -> None:
    """Wrong answers of 64 requests in a row of batches, in which roles are exchanged."""
    model, tokenizer = load("organism")
    train = IOIDataset.generate(tokenizer, n=500, seed=0)
    states = capture(model, train.inputs, SITE, positions=train.positions["S2"], batch_size=100)
    edit = LRQP.fit(states[SITE], train.labels["abb"])
    edit.provenance = Provenance.of(model, SITE)
    count = 16 if arguments.small else 64
    test = IOIDataset.generate(tokenizer, n=count, seed=1, prefixes="bundled")
    kept = test.inputs["attention_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(test.inputs["input_ids"], kept, strict=True)]
    # All begin alike for one block, and are edited at the last but one token of the third.
    common = [token for row in ids for token in row]
    edited = 3 * BLOCK - 2
    starts = [edited - place for place in test.positions["S2"].tolist()]
    prompts = tuple(tuple(common[:n] + row) for n, row in zip(starts, ids, strict=True))

    def roles(turn: int) -> tuple[Any, ...]:
        return tuple(
            {"edit": NAME, "positions": [edited], "target": 1 - label}
            if (number + turn) % 3 == 0
            else None
            for number, label in enumerate(test.labels["abb"].tolist())
        )

    batches = [roles(turn) for turn in (0, 0, 1, 2)]
    rights = [_expected(model, edit, prompts, asked) for asked in batches]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        edit.save(Path(folder) / NAME)
        options = {
            "dtype": "float32",
            "max_model_len": 192,
            "max_num_seqs": 8,
            "enable_prefix_caching": True,
            "enforce_eager": True,
            "block_size": BLOCK,
        }
        for policy in (KEYED, UNKEYED, UNREAD):
            with _engine(pretrained_folder("organism"), folder, arguments, **options) as engine:
                row: Row = {"known by": policy}
                for number, (asked, right) in enumerate(zip(batches, rights, strict=True), 1):
                    engine.send(Asks(policy, prompts, asked))
                    found, hits = engine.recv()
                    wrong = [
                        token != said or abs(value - expected) > OFF
                        for (token, value), (said, expected) in zip(found, right, strict=True)
                    ]
                    own = sum(w for w, one in zip(wrong, asked, strict=True) if one is not None)
                    row[f"batch {number}"] = f"{own} + {sum(wrong) - own}; {hits}"
                rows.append(row)
    title = f"Wrong of {count} answers, edited + unedited; tokens from the cache"
    report(f"{title}; organism", rows, arguments)


def _expected(
    model: Any, edit: LRQP, prompts: Sequence[Sequence[int]], asked: Sequence[Any]
) -> list[tuple[int, float]]:
    """What transformers answers, one prompt at a time, and with what log-probability."""
    found = []
    for ids, one in zip(prompts, asked, strict=True):
        with ExitStack() as stack, torch.no_grad():
            if one is not None:
                where = torch.tensor(one["positions"])
                stack.enter_context(edit.at(model, SITE, positions=where, target=one["target"]))
            said = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            found.append((int(said.argmax()), float(said.max())))
    return found


if __name__ == "__main__":
    main()
