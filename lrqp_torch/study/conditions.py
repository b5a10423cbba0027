"""The held-out prompts in three conditions: clean, and with the belief at S2 edited either way."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import NonFiniteError
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.head_scores import attention_to
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.roles import parse_head
from lrqp_torch.study.running import in_batches

CONDITIONS = ("clean", "control", "counterfactual")
KEYS = ("IO", "S1")


@dataclass(frozen=True)
class Conditions:
    """What was recorded at END, by condition; rows are held-out prompts in their order, on the CPU.

    Attributes:
        logit_difference: IO − S, (n,), float64.
        attention: (head, key) to the attention that the head pays to ``IO`` or ``S1``, (n,).
        moved: head to the attention that lies elsewhere than in the clean run,
            ½ Σ |p − p_clean| over tokens, (n,).
        outputs: outputs z of the heads asked for, side by side, (n, heads, head width).
    """

    logit_difference: dict[str, Tensor]
    attention: dict[str, dict[tuple[str, str], Tensor]]
    moved: dict[str, dict[str, Tensor]]
    outputs: dict[str, Tensor]


def ordered_batches(context: StudyContext) -> list[Tensor]:
    """Rows of the held-out prompts in batches, by the distance from S2 to END.

    Left padding puts END in the last column, so a later S2 means a shorter suffix to run again.
    """
    order = torch.argsort(context.task.test.positions["S2"].cpu(), stable=True)
    return list(in_batches(order, context.batch_size))


def editing(
    context: StudyContext, site: str, edit: LRQP, batch: IOIPrompts, condition: str
) -> AbstractContextManager[object]:
    """The context in which a batch runs under a condition."""
    if condition == "clean":
        return nullcontext()
    labels = batch.labels
    target = labels if condition == "control" else 1 - labels
    return edit.at(
        context.model, site, positions=batch.positions["S2"], target=target, source=labels
    )


def logit_differences(logits: Tensor, batch: IOIPrompts) -> Tensor:
    """IO − S, (B,), in float64 on the CPU.

    Raises:
        NonFiniteError: they are NaN or infinite.
    """
    rows = torch.arange(len(logits), device=logits.device)
    difference = (logits[rows, batch.io_tokens] - logits[rows, batch.s_tokens]).double().cpu()
    if not bool(torch.isfinite(difference).all()):
        raise NonFiniteError(
            "the model's logits at END contain NaN or infinity. Try the model in float32."
        )
    return difference


@torch.no_grad()
def run_conditions(
    context: StudyContext,
    site: str,
    edit: LRQP,
    attending: list[str],
    writing: list[str],
    advance: Advance,
) -> Conditions:
    """Run the held-out prompts in all conditions, and record heads at END.

    Args:
        context: the model and its prompts.
        site: where the edit acts, at S2.
        edit: fitted at that site.
        attending: heads whose attention to record.
        writing: heads whose outputs to record.
        advance: called with the number of prompts after each batch.
    """
    data, model = context.task.test, context.model
    layers = sorted({parse_head(name)[0] for name in (*attending, *writing)})
    first = Site.parse(site).layer
    kept: dict[tuple[str, ...], Tensor] = {}

    def keep(rows: Tensor, values: Tensor, *name: str) -> None:
        if name not in kept:
            kept[name] = torch.zeros(len(data), *values.shape[1:], dtype=values.dtype)
        kept[name][rows] = values.cpu()

    for rows in ordered_batches(context):
        batch = data[rows].to(context.device)
        end = batch.positions["END"]
        with (
            record_patterns(model, layers, end) as all_clean,
            record_heads(model, layers, end) as z,
        ):
            replay = Replay(model, batch.inputs, int(batch.positions["S2"].min()))
        above = [layer for layer in layers if layer >= first]
        for condition in CONDITIONS:
            with (
                record_patterns(model, above, end) as patterns,
                record_heads(model, above, end) as outputs,
                editing(context, site, edit, batch, condition),
            ):
                logits = replay.run(first)
            # Below the site nothing changes.
            patterns, outputs = all_clean | patterns, z | outputs
            if condition == "clean":
                clean = patterns
            keep(rows, logit_differences(logits, batch), "logits", condition)
            for name in attending:
                layer, head = parse_head(name)
                for key in KEYS:
                    to_key = attention_to(patterns[layer], batch.positions[key])[:, head]
                    keep(rows, to_key, "attention", condition, name, key)
                moved = (patterns[layer][:, head] - clean[layer][:, head]).abs().sum(-1) / 2
                keep(rows, moved, "moved", condition, name)
            if writing:
                columns = [outputs[layer][:, head] for layer, head in map(parse_head, writing)]
                keep(rows, torch.stack(columns, dim=1).float(), "outputs", condition)
        advance(len(batch))
    return Conditions(
        logit_difference={name: kept["logits", name] for name in CONDITIONS},
        attention={
            condition: {
                (name, key): kept["attention", condition, name, key]
                for name in attending
                for key in KEYS
            }
            for condition in CONDITIONS
        },
        moved={
            condition: {name: kept["moved", condition, name] for name in attending}
            for condition in CONDITIONS
        },
        outputs={name: kept["outputs", name] for name in CONDITIONS if writing},
    )
