"""Where every attention head looks and what it adds to the answer, prompt by prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.capture import capture
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.sites import blocks_of
from lrqp_torch.study.attribution import attribute
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.roles import head_name
from lrqp_torch.study.running import in_batches

ATTENTIONS = {
    "END→IO": ("END", "IO"),
    "END→S1": ("END", "S1"),
    "END→S2": ("END", "S2"),
    "S2→S1": ("S2", "S1"),
    "S2→S1+1": ("S2", "S1+1"),
    "S1+1→S1": ("S1+1", "S1"),
}
"""Name of an attention to the positions of its query and key."""


@dataclass(frozen=True)
class CleanHeads:
    """Scores of the clean held-out prompts, on the CPU; H counts the heads of all layers.

    Attributes:
        names: of the heads, in order of computation.
        heads: direct effect on the logit difference, (n, H).
        attention: attention by the keys of :data:`ATTENTIONS`, (n, H) each.
        parts: shares of the logit difference by part of the model, (n,) each.
        logit_difference: IO − S at END, (n,).
        z: the heads' outputs before W_O at END, (n, layers, heads, head width).
        direction: along which a write at END raises IO − S, (n, d); see :mod:`~.attribution`.
    """

    names: list[str]
    heads: Tensor
    attention: dict[str, Tensor]
    parts: dict[str, Tensor]
    logit_difference: Tensor
    z: Tensor
    direction: Tensor


def score_clean(context: StudyContext, advance: Advance) -> CleanHeads:
    """Run the clean held-out prompts once, and score every head on each.

    Args:
        context: the model and its prompts.
        advance: called with the number of prompts after each batch.
    """
    model, data = context.model, context.task.test
    layers = range(len(blocks_of(model)))
    sites = [f"L{layer}.pre" for layer in layers] + [f"L{layers[-1]}.post"]
    kept: dict[str, list[Tensor]] = {}
    for rows in in_batches(torch.arange(len(data)), context.batch_size):
        batch = data[rows].to(context.device)
        at = batch.positions
        with (
            record_patterns(model, layers, at["END"]) as end,
            record_patterns(model, layers, at["S2"]) as s2,
            record_patterns(model, layers, at["S1+1"]) as after_s1,
            record_heads(model, layers, at["END"]) as z,
        ):
            streams = capture(model, batch.inputs, sites, positions=at["END"])
        share = attribute(
            model, [streams[site] for site in sites], z, batch.io_tokens, batch.s_tokens
        )
        here = {
            "heads": share.heads.flatten(1),
            "part embedding": share.embedding,
            "part heads": share.heads.flatten(1).sum(1) + share.biases.sum(1),
            "part MLPs": share.mlps.sum(1),
            "part constant": share.constant,
            "logit_difference": share.logit_difference,
            "direction": share.direction,
            "z": torch.stack([z[layer] for layer in layers], dim=1),
        }
        queries = {"END": end, "S2": s2, "S1+1": after_s1}
        for name, (query, key) in ATTENTIONS.items():
            columns = [attention_to(queries[query][layer], at[key]) for layer in layers]
            here[f"attention {name}"] = torch.cat(columns, dim=1)
        for name, values in here.items():
            kept.setdefault(name, []).append(values.cpu())
        advance(len(batch))
    whole = {name: torch.cat(pieces) for name, pieces in kept.items()}

    def group(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}

    n_heads = whole["z"].shape[2]
    return CleanHeads(
        names=[head_name(layer, head) for layer in layers for head in range(n_heads)],
        heads=whole["heads"],
        attention=group("attention "),
        parts=group("part "),
        logit_difference=whole["logit_difference"],
        z=whole["z"],
        direction=whole["direction"],
    )


def attention_to(rows: Tensor, keys: Tensor) -> Tensor:
    """Attention of all heads to one key an example: (B, heads) from (B, heads, T)."""
    return rows[torch.arange(len(rows), device=rows.device), :, keys.to(rows.device)]
