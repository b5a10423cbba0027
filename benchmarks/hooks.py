"""The forward pass of a model with one edit in it, against the bare one and other libraries.

All additions are of one vector at one token, to the output of the same block, and must give the
same logits. LRQP edits an own token of each example there. Each library is held against the bare
forward pass of the model as it runs it; TransformerLens runs it with eager attention.
"""

import gc
import statistics
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.hook_peers import PEERS, Addition, Peer, copied, steering_vectors, vector_hook
from benchmarks.measure import Row, medians, parse_arguments, report, version_of
from lrqp_torch import (
    LRQP,
    Intervention,
    JointLRQP,
    LinearProbe,
    capture,
    intervene,
)
from lrqp_torch.errors import MissingExtraError
from lrqp_torch.models import load
from lrqp_torch.stream.sites import blocks_of

BARE, BARE_HOOK = "bare forward pass", "a bare hook, addition"
ADDITION, OURS = "lrqp_torch, addition", "lrqp_torch, LRQP"
JOINT = "lrqp_torch, JointLRQP of two variables"
CONTEXTS = (BARE_HOOK, ADDITION, OURS, JOINT)
AROUND = "opening and closing, µs"
TRAIN = 256
MODELS = ("gpt2-shape", "smollm2")
PASSES = 25
"""So many passes are timed for what hooks cost."""
MOST_FOR_PEERS = 16
"""Larger batches are timed without other libraries: their passes take long and show no more."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    names = arguments.models or ("gpt2-shape" if arguments.small else ",".join(MODELS))
    batches = arguments.batches or ("16" if arguments.small else "1,16,64")
    rows: list[Row] = []
    for name in names.split(","):
        try:
            model, tokenizer = _load(name, arguments.device)
        except MissingExtraError as error:
            rows.append(_row(f"{name}: {error}", name, 0))
            continue
        for batch in map(int, batches.split(",")):
            rows += measure(name, model, tokenizer, batch, arguments)
    report(
        f"One edit in a forward pass of {arguments.length} tokens, after the middle block",
        rows,
        arguments,
        versions={
            package: version_of(package)
            for package in ("lrqp_torch", "transformers", "pyvene", "nnsight", "transformer-lens")
        },
    )


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}, organism, tiny")
    parser.add_argument("--batches", help="B, default 1,16,64")
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--seconds", type=float, default=12.0, help="at most, for each figure")
    parser.add_argument(
        "--steering-vectors-python",
        type=Path,
        help="the Python of an environment with steering-vectors, which pins transformers < 5",
    )


def _load(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name != "tiny":
        return load(name, device=device)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=99, n_layer=2, n_embd=32, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval().to(device), load("organism")[1]


@torch.no_grad()
def measure(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    arguments: Namespace,
    peers: Sequence[Peer] = PEERS,
) -> list[Row]:
    """Time everything on one model and batch."""
    device = arguments.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.vocab_size, 5000)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    tokens = draw(vocabulary, batch, arguments.length)
    layer = (len(blocks_of(model)) - 1) // 2
    site = f"L{layer}.post"
    last = torch.full((TRAIN,), 7, device=device)
    x = capture(model, {"input_ids": draw(vocabulary, TRAIN, 8)}, site, last)[site]
    labels = torch.arange(TRAIN, device=device)
    edit = LRQP.fit(x, labels % 2)
    joint = JointLRQP({"first": edit, "second": LinearProbe.fit(x, labels // 2 % 2)})
    direction = torch.randn(x.shape[1], generator=generator).to(x)
    addition = Addition(layer, arguments.length // 2, direction)
    positions, target = draw(arguments.length, batch), draw(2, batch)
    column = torch.full((batch,), addition.column, device=device)

    def bare() -> Tensor:
        logits: Tensor = model(input_ids=tokens).logits
        return logits

    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        BARE_HOOK: lambda: vector_hook(model, layer, direction, addition.column),
        ADDITION: lambda: intervene(
            model, Intervention(site, column, lambda x, context: x + direction)
        ),
        OURS: lambda: edit.at(model, site, positions=positions, target=target),
        JOINT: lambda: joint.at(
            model, site, positions=positions, target={"first": target, "second": 1 - target}
        ),
    }

    def within(what: str) -> Tensor:
        with contexts[what]():
            return bare()

    reference = within(ADDITION)
    if torch.equal(reference, bare()):
        raise AssertionError(f"the addition at {site} changed no logit")
    runs: dict[str, Callable[[], Tensor]] = {BARE: bare}
    runs |= {what: partial(within, what) for what in contexts}
    differences: dict[str, float | None] = {
        what: float((within(what) - reference).abs().max()) for what in (BARE_HOOK, ADDITION)
    }
    rows = []
    seconds = medians(runs, arguments.repeats, device, seconds=arguments.seconds)
    stand_ins = model.base_model, blocks_of(model)[layer]
    inside = {
        what: _inside(model, context, bare, stand_ins)
        for what, context in (contexts | {BARE: nullcontext}).items()
    }
    # Without what it takes to measure it.
    nothing = inside.pop(BARE)[0]
    inside = {what: (spent - nothing, around) for what, (spent, around) in inside.items()}
    rows += [
        _row(what, name, batch, value, seconds[BARE], differences.get(what), *inside.get(what, ()))
        for what, value in seconds.items()
    ]
    if batch > MOST_FOR_PEERS or not peers:
        return rows
    # One library at a time, so that no more than one copy of the model is held; beside it the bare
    # forward pass, on the model as that library runs it.
    for peer in peers:
        if find_spec(peer.package) is None:
            rows.append(
                _row(f"{peer.name}: not installed: pip install {peer.install}", name, batch)
            )
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = peer.prepare(copied(model), tokenizer, addition)
            difference = float((run(tokens) - reference).abs().max())
        beside: Any = model
        if peer.attention is not None:
            beside = copied(model)
            beside.set_attn_implementation(peer.attention)
        pair: dict[str, Callable[[], Any]] = {
            BARE: partial(beside, input_ids=tokens),
            peer.name: partial(run, tokens),
        }
        times = medians(pair, arguments.repeats, device, seconds=arguments.seconds)
        rows.append(_row(peer.name, name, batch, times[peer.name], times[BARE], difference))
        del run, beside, pair
        gc.collect()
    rows.append(_steering_vectors(name, model, tokens, addition, reference, arguments))
    return rows


def _inside(
    model: torch.nn.Module,
    context: Callable[[], AbstractContextManager[Any]],
    one_pass: Callable[[], Tensor],
    around_which: Sequence[torch.nn.Module],
) -> tuple[float, float]:
    """Seconds of its thread that a pass spends in hooks, and that a context takes to come and go.

    Medians. Each hook begins with caches that the model's layers have filled with something else.
    What stands around the ``forward`` of some modules counts as a hook, without that itself.
    """
    spent, around = [0.0], list[float]()
    running: list[tuple[torch.nn.Module, float]] = []

    def timed(hook: Callable[..., Any], *args: Any) -> Any:
        start = time.thread_time()
        result = hook(*args)
        spent[-1] += time.thread_time() - start
        return result

    def stands_for(forward: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        running.append((module, 0.0))
        result = timed(partial(forward, **kwargs), *args)
        spent[-1] -= running.pop()[1]
        return result

    def of_its_class(module: Any, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    def itself(forward: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        result = forward(module, *args, **kwargs)
        if running and running[-1][0] is module:
            running[-1] = module, time.thread_time() - start
        return result

    for _ in range(PASSES):
        start, stack = time.thread_time(), ExitStack()
        stack.enter_context(context())
        around.append(time.thread_time() - start)
        with stack, ExitStack() as measured:
            for module in model.modules():
                kind = type(module)
                own = vars(module).get("forward") or partial(of_its_class, module)
                if module in around_which:
                    measured.enter_context(
                        patch.object(module, "forward", partial(stands_for, own, module))
                    )
                    plain = kind.forward
                    measured.enter_context(
                        patch.object(
                            kind, "forward", lambda *a, plain=plain, **k: itself(plain, *a, **k)
                        )
                    )
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    hooks.update({key: partial(timed, hook) for key, hook in hooks.items()})
            # The first two passes of a context find out what all others go by.
            for _ in range(3):
                spent.append(0.0)
                one_pass()
            measured.close()
            start = time.thread_time()
        around[-1] += time.thread_time() - start
    return statistics.median(spent[6::3]), statistics.median(around[1:])


def _steering_vectors(
    name: str,
    model: PreTrainedModel,
    tokens: Tensor,
    addition: Addition,
    reference: Tensor,
    arguments: Namespace,
) -> Row:
    what, python = "steering-vectors, addition", arguments.steering_vectors_python
    if python is None:
        why = "pins transformers < 5, give --steering-vectors-python"
        return _row(f"{what}: {why}", name, len(tokens))
    found = steering_vectors(python, model, tokens, addition, min(arguments.repeats, 3))
    difference = float((found["logits"].to(reference) - reference).abs().max())
    return _row(what, name, len(tokens), found["addition"], found["bare"], difference)


def _row(
    what: str,
    model: str,
    batch: int,
    seconds: float | None = None,
    bare: float | None = None,
    difference: float | None = None,
    inside: float | None = None,
    around: float | None = None,
) -> Row:
    return {
        "what": what,
        "model": model,
        "B": batch,
        "milliseconds": None if seconds is None else seconds * 1e3,
        "over bare, %": None if seconds is None or bare is None else 100 * (seconds / bare - 1),
        "in the hooks, µs": None if not inside else 1e6 * inside,
        AROUND: None if around is None else 1e6 * around,
        "largest logit difference": difference,
    }


if __name__ == "__main__":
    main()
