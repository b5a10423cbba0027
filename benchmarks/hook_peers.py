"""A plain addition to the output of one block, at one column, by other libraries.

Every library gets a copy of the model of its own, because some change the model they wrap.
"""

import copy
import json
import logging
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrqp_torch.stream.sites import blocks_of, layout_of


@dataclass(frozen=True)
class Addition:
    """What is added where.

    Attributes:
        layer: the block whose output is changed.
        column: the token, the same in every example: not all libraries know others.
        direction: what is added, (d,).
    """

    layer: int
    column: int
    direction: Tensor


@contextmanager
def vector_hook(model: Any, layer: int, vector: Tensor, column: int | Tensor) -> Iterator[None]:
    """A plain hook of torch that adds a vector at one token, or at one of each example, (B,)."""
    at: tuple[Any, Any] = slice(None), column
    if isinstance(column, Tensor):
        at = torch.arange(len(column), device=vector.device), column.to(vector.device)

    def add(module: Any, given: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        changed = stream.clone()
        changed[at] += vector
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = blocks_of(model)[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        name: in the table.
        package: module that it needs.
        install: how to get it.
        prepare: takes a copy of the model, its tokenizer and the addition; returns the function
            from token ids (B, T) to logits (B, T, vocabulary) that is timed.
        attention: the attention implementation that it forces upon the model, or None.
    """

    name: str
    package: str
    install: str
    prepare: Callable[
        [PreTrainedModel, PreTrainedTokenizerBase, Addition], Callable[[Tensor], Tensor]
    ]
    attention: str | None = None


def _pyvene(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, addition: Addition
) -> Callable[[Tensor], Tensor]:
    import pyvene

    part = {
        "layer": addition.layer,
        "component": "block_output",
        "unit": "pos",
        "max_number_of_units": 1,
        "intervention_type": pyvene.AdditionIntervention,
        "source_representation": addition.direction,
    }
    wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([part]), model)

    def run(tokens: Tensor) -> Tensor:
        _, output = wrapped(base={"input_ids": tokens}, unit_locations={"base": addition.column})
        logits: Tensor = output.logits
        return logits

    return run


def _nnsight(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, addition: Addition
) -> Callable[[Tensor], Tensor]:
    from nnsight import NNsight

    wrapped = NNsight(model)
    # The library rewrites the body of the context, so its path stands in plain sight there.
    path = f"{model.base_model_prefix}.{layout_of(model).blocks}"
    blocks: Any = wrapped
    for name in path.split("."):
        blocks = getattr(blocks, name)
    block, column, direction = blocks[addition.layer], addition.column, addition.direction

    def run(tokens: Tensor) -> Tensor:
        with wrapped.trace(input_ids=tokens):
            block.output[:, column] += direction
            logits = wrapped.output.logits.save()
        found: Tensor = logits
        return found

    return run


def _transformer_lens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, addition: Addition
) -> Callable[[Tensor], Tensor]:
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    from transformer_lens import TransformerBridge

    # The name only picks the adapter; the weights and the tokenizer are those given.
    wrapped = TransformerBridge.boot_transformers(
        "gpt2" if model.config.model_type == "gpt2" else "HuggingFaceTB/SmolLM2-135M",
        hf_model=model,
        tokenizer=tokenizer,
        device=str(addition.direction.device),
    )

    def add(stream: Tensor, hook: object) -> Tensor:
        stream[:, addition.column] += addition.direction
        return stream

    name = f"blocks.{addition.layer}.hook_out"

    def run(tokens: Tensor) -> Tensor:
        logits: Tensor = wrapped.run_with_hooks(tokens, fwd_hooks=[(name, add)])
        return logits

    return run


PEERS = (
    Peer("pyvene, addition", "pyvene", "pyvene", _pyvene),
    Peer("nnsight, addition", "nnsight", "nnsight", _nnsight),
    Peer(
        "TransformerLens, addition",
        "transformer_lens",
        "transformer-lens",
        _transformer_lens,
        attention="eager",
    ),
)


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for a library to do with as it likes."""
    return copy.deepcopy(model)


def steering_vectors(
    python: Path,
    model: PreTrainedModel,
    tokens: Tensor,
    addition: Addition,
    repeats: int,
) -> dict[str, Any]:
    """Run steering-vectors in the environment of another Python, on the same weights.

    It needs transformers below 5, which cannot be installed beside ours.

    Returns:
        ``bare`` and ``addition`` in seconds, ``logits`` (B, T, vocabulary), and its versions.
    """
    script = Path(__file__).with_name("steering_vectors_peer.py")
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.pt", Path(folder) / "found.pt"
        torch.save(
            {
                "config": json.loads(model.config.to_json_string(use_diff=False)),
                "weights": {k: v.cpu() for k, v in model.state_dict().items()},
                "tokens": tokens.cpu(),
                "layer": addition.layer,
                "column": addition.column,
                "direction": addition.direction.cpu(),
                "repeats": repeats,
                "threads": torch.get_num_threads(),
                "device": str(tokens.device),
            },
            given,
        )
        subprocess.run([str(python), str(script), str(given), str(found)], check=True)
        result: dict[str, Any] = torch.load(found)
    return result
