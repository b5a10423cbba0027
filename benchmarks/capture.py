"""Reading activations: time against the bare forward pass, padding, and peak memory."""

import ctypes
import gc
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.measure import Row, parse_arguments, report, seconds_of, synchronise
from lrqp_torch import Covariance, all_sites, capture, position_ids
from lrqp_torch.errors import LRQPError
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models import load
from lrqp_torch.stream.capture import capture_batches
from lrqp_torch.stream.hooks import attach
from lrqp_torch.stream.inputs import Batch, by_length, cut, in_order, wasted_share
from lrqp_torch.stream.sites import locate
from lrqp_torch.stream.store import ActivationStore, capture_to

SHORTEST, LONGEST = 14, 68
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class _Reached(Exception):  # noqa: N818  (it ends a forward pass and is no error)
    pass


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    n_prompts = arguments.prompts or (128 if arguments.small else 10_000)
    models = arguments.models or ("gpt2-shape" if arguments.small else "gpt2-shape,smollm2")
    memory = measure_memory(arguments.small, arguments.device)
    times, padding = [], []
    for name in models.split(","):
        try:
            model, tokenizer = load(name, device=arguments.device)
        except LRQPError as error:
            times.append({"model": f"{name}: {str(error)[:60]}", **dict.fromkeys(TIMES)})
            continue
        torch.manual_seed(0)
        inputs, at = prompts(tokenizer, n_prompts, arguments.prefixes)
        padding += measure_padding(name, inputs["attention_mask"], arguments.batch)
        times.append(measure_time(name, model, inputs, at, arguments))
    what = f"{arguments.batch} prompts a pass"
    report(
        f"All pre and mid at one position a prompt, {what}",
        times,
        arguments,
        padding=padding,
        memory=memory,
    )
    arguments.json = None
    if padding:
        report(f"Padding, {what}", padding, arguments)
    report("Peak memory beyond what was held before (a tiny model)", memory, arguments)


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", help="names for load; default gpt2-shape,smollm2")
    parser.add_argument("--batch", type=int, default=64, help="prompts a pass")
    parser.add_argument("--prompts", type=int, help="default 10,000; with --small 128")
    parser.add_argument("--prefixes", help="a file of sentences, for the IOI task behind them")


def prompts(tokenizer: Any, n_prompts: int, prefixes: str | None) -> tuple[dict[str, Tensor], Any]:
    """Left-padded inputs and the last token of each: the prefixed task, or random tokens.

    Random prompts have lengths as the prefixed task has them: few are long.
    """
    if prefixes is not None:
        data = IOIDataset.generate(tokenizer, n_prompts, prefixes=prefixes, padding_side="left")
        return data.inputs, data.positions["END"]
    spread = torch.rand(n_prompts).square() * (LONGEST - SHORTEST)
    lengths = SHORTEST + spread.round().long()
    mask = (torch.arange(LONGEST) >= LONGEST - lengths[:, None]).long()
    ids = torch.randint(5000, mask.shape)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    return inputs, torch.full((n_prompts,), LONGEST - 1)


def measure_padding(name: str, mask: Tensor, batch_size: int) -> list[Row]:
    """The share of tokens that is padding, without and with batches by length."""
    every = range(len(mask))
    ways: dict[str, list[Batch]] = {
        "as given": in_order(mask.shape[1], every, batch_size, None),
        "by length": by_length(mask, every, batch_size, None),
        "by length, at most 2,048 tokens": by_length(mask, every, None, 2048),
    }
    return [
        {
            "batches": f"{name}, {way}",
            "prompts": len(mask),
            "passes": len(batches),
            "tokens run": sum(len(batch.examples) * batch.width for batch in batches),
            "share of padding": wasted_share(mask, batches),
        }
        for way, batches in ways.items()
    ]


TIMES = ("prompts", "bare s", "capture s", "capture / bare", "to disk s", "disk / bare")


@torch.no_grad()
def measure_time(
    name: str,
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    at: Tensor,
    arguments: Namespace,
) -> Row:
    """Capture against the same batches run to the same site; they take turns batch by batch.

    ``capture / bare`` is the median over batches, in which planning the batches has its share.
    ``disk / bare`` is that of two runs one after the other, so a busy machine spoils it.
    """
    sites, device, batch_size = all_sites(model), arguments.device, arguments.batch
    batches = by_length(inputs["attention_mask"], range(len(at)), batch_size, None)
    parts = [
        {key: value.to(device) for key, value in cut(model, inputs, batch).items()}
        for batch in batches
    ]
    stop = locate(model, sites[-1])

    def ends_here(stream: Tensor, residual: Tensor | None) -> Tensor:
        raise _Reached

    def bare(part: dict[str, Tensor]) -> None:
        with ExitStack() as stack:
            attach(stack, stop, ends_here)
            with suppress(_Reached):
                model(**part)

    bare(parts[0])
    capture(model, {key: value[:4] for key, value in inputs.items()}, sites, at[:4])
    synchronise(device)
    start = time.perf_counter()
    stream = capture_batches(model, inputs, sites, at, batch_size=batch_size)
    plan = (time.perf_counter() - start) / len(parts)
    seconds: dict[str, list[float]] = {"bare": [], "capture": []}
    for number, part in enumerate(parts):
        turns: dict[str, Callable[[], Any]] = {
            "bare": partial(bare, part),
            "capture": partial(next, stream),
        }
        # Each goes first in turn: what runs second finds the weights in the cache.
        for turn in list(turns)[:: 1 if number % 2 else -1]:
            seconds[turn].append(seconds_of(turns[turn], device))
    ratios = [(b + plan) / a for a, b in zip(*seconds.values(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        disk = seconds_of(
            lambda: capture_to(folder, model, inputs, sites, at, batch_size=batch_size), device
        )
        assert len(ActivationStore(folder)[sites[0]]) == len(at)
    return {
        "model": f"{name}, {len(sites)} sites",
        "prompts": len(at),
        "bare s": sum(seconds["bare"]),
        "capture s": sum(seconds["capture"]) + plan * len(parts),
        "capture / bare": statistics.median(ratios),
        "to disk s": disk,
        "disk / bare": disk / sum(seconds["bare"]),
    }


def measure_memory(small: bool, device: str) -> list[Row]:
    """Peak memory against the number of prompts and against their length."""
    torch.manual_seed(0)
    width = 64
    config = GPT2Config(
        vocab_size=99, n_layer=2, n_embd=width, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval().to(device)
    sites = all_sites(model)

    def run(way: str, n_prompts: int, length: int) -> Row:
        ids = torch.randint(99, (n_prompts, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        at = torch.full((n_prompts,), length - 1)

        def streamed() -> None:
            covariances = {site: Covariance(width, device=device) for site in sites}
            for _, found in capture_batches(model, inputs, sites, at, batch_tokens=2048):
                for site, activations in found.items():
                    covariances[site].update(activations)

        def kept() -> None:
            capture(model, inputs, sites, at, batch_tokens=2048)

        call = {"streamed covariance": streamed, "capture": kept}[way]
        # The least of three: the allocator's own mood only adds.
        peaks = [peak_memory(call, device) for _ in range(3)]
        held = len(sites) * n_prompts * width * 4 / 2**20 if way == "capture" else 0.0
        return {
            "what": way,
            "prompts": n_prompts,
            "length": length,
            "peak MiB": min(peak for peak in peaks if peak is not None) if all(peaks) else None,
            "result MiB": held,
        }

    counts = (1024, 8192) if small else (1024, 4096, 16384, 65536)
    lengths = (32, 128, 512)
    run("capture", 256, 32)  # what torch sets up once is no part of the figures
    rows = [run("streamed covariance", count, 32) for count in counts]
    rows += [run("capture", count, 32) for count in counts]
    return rows + [run("capture", 64 if small else 256, length) for length in lengths]


def peak_memory(run: Callable[[], Any], device: str) -> float | None:
    """MiB that a call needs at its peak beyond what is held before; None where that is unknown.

    On the CPU this is the process's resident memory, as Linux counts it.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    main()
