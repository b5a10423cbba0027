"""What name movers do without a head: the test for S-inhibition."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.hooks import record_heads
from lrqp_torch.stream.intervene import EditContext, Intervention, intervene
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import has_mid
from lrqp_torch.study.attribution import head_shares, output_projection
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.head_scores import CleanHeads, attention_to
from lrqp_torch.study.indirect_objects import IOIPrompts
from lrqp_torch.study.roles import ATTENTION, parse_head
from lrqp_torch.study.running import in_batches

MOST_TESTED = 24
"""At most this many heads are tested for S-inhibition, those that attend most to S2."""


@dataclass(frozen=True)
class MoverEffect:
    """What name movers do without a head, less what they do with it; one number a prompt, (n,).

    Attributes:
        attention: change of their mean attention END→IO less END→S1.
        writing: change of their summed direct effect on IO − S, in logits, with the final norm's
            scale and the answer's direction as they were.
    """

    attention: Tensor
    writing: Tensor


def effects_on_movers(
    context: StudyContext,
    clean: CleanHeads,
    attention: dict[str, dict[str, float]],
    movers: list[str],
    advance: Advance,
) -> dict[str, MoverEffect]:
    """What the name movers do without each head that attends from END to S2.

    "Without" means that the head's output at END is its mean over the held-out prompts.

    Args:
        context: the model and its prompts.
        clean: the heads' scores on the same prompts.
        attention: head to mean attention by the keys of :data:`~.head_scores.ATTENTIONS`.
        movers: the name movers; a head's effect is measured on those in layers above it.
        advance: called with the number of prompts after each batch.

    Returns:
        Head to effect, for heads that attend from END to S2 below the highest name mover.
    """
    model, data = context.model, context.task.test
    top = max((parse_head(name)[0] for name in movers), default=0)
    tested = [
        name
        for name in sorted(attention, key=lambda name: -attention[name]["END→S2"])
        if attention[name]["END→S2"] >= ATTENTION and parse_head(name)[0] < top
    ][:MOST_TESTED]
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in tested}
    layers = sorted({parse_head(name)[0] for name in movers})
    mean = clean.z.mean(0)
    for rows in in_batches(torch.arange(len(data)), context.batch_size):
        batch = data[rows].to(context.device)
        if tested:
            end, direction = batch.positions["END"], clean.direction[rows].to(context.device)
            with (
                record_patterns(model, layers, end) as before,
                record_heads(model, layers, end) as z,
            ):
                replay = Replay(model, batch.inputs, int(end.min()))
            for name in tested:
                layer, head = parse_head(name)
                shift = (mean[layer, head] - clean.z[rows, layer, head]).to(context.device)
                above = [mover for mover in movers if parse_head(mover)[0] > layer]
                reached = sorted({parse_head(mover)[0] for mover in above})
                with (
                    record_patterns(model, reached, end) as after,
                    record_heads(model, reached, end) as z_after,
                    intervene(model, [shift_head(model, layer, head, shift, end)]),
                ):
                    replay.run(layer)
                looks = _preference(after, above, batch) - _preference(before, above, batch)
                writes = _writing(model, z_after, above, direction) - _writing(
                    model, z, above, direction
                )
                changes[name].append((looks.double().cpu(), writes.cpu()))
        advance(len(batch))
    return {
        name: MoverEffect(*(torch.cat(column) for column in zip(*pieces, strict=True)))
        for name, pieces in changes.items()
    }


def shift_head(model: nn.Module, layer: int, head: int, shift: Tensor, end: Tensor) -> Intervention:
    """An intervention that adds ``shift``, (B, head width), to a head's output before W_O.

    What W_O makes of the shift is added to the stream after attention, which is the same thing.
    Where attention and MLP run in parallel, that place is the end of the block.

    Args:
        model: a transformers model.
        layer: the head's layer.
        head: its number.
        shift: what to add, (B, head width).
        end: the token of each example, (B,).
    """
    weight, _ = output_projection(model, layer)
    width = shift.shape[-1]
    added = shift.to(weight) @ weight[head * width : (head + 1) * width]

    def add(x: Tensor, context: EditContext) -> Tensor:
        return x + added[context.example]

    site = f"L{layer}.mid" if has_mid(model) else f"L{layer}.post"
    return Intervention(site, end, add)


def _preference(patterns: dict[int, Tensor], heads: list[str], batch: IOIPrompts) -> Tensor:
    """Mean over heads of attention END→IO less END→S1, (B,)."""
    columns = []
    for name in heads:
        layer, head = parse_head(name)
        to_io = attention_to(patterns[layer], batch.positions["IO"])[:, head]
        columns.append(to_io - attention_to(patterns[layer], batch.positions["S1"])[:, head])
    return torch.stack(columns).mean(0)


def _writing(model: nn.Module, z: dict[int, Tensor], heads: list[str], direction: Tensor) -> Tensor:
    """Summed direct effect of heads, (B,)."""
    shares = {layer: head_shares(model, layer, values, direction) for layer, values in z.items()}
    return torch.stack([shares[layer][:, head] for layer, head in map(parse_head, heads)]).sum(0)
