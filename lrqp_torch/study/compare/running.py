"""Running many edits of the same prompts, and what each did to every prompt."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lrqp_torch.baselines import Baseline
from lrqp_torch.stream.attention import record_patterns
from lrqp_torch.stream.replay import Tail
from lrqp_torch.stream.sites import Site
from lrqp_torch.study.compare.batch import Batch
from lrqp_torch.study.compare.editable import Editable, Effects, Run
from lrqp_torch.study.context import Advance, StudyContext
from lrqp_torch.study.heads import parse_head
from lrqp_torch.study.running import in_batches


@torch.no_grad()
def run_edits(
    context: StudyContext,
    site: str,
    texts: Editable,
    runs: Sequence[Run],
    watched: Sequence[str],
    advance: Advance,
) -> tuple[Effects, list[Effects]]:
    """Run texts clean and under every edit; layers below the site and tokens before it run once.

    Args:
        context: the model.
        site: where all edits act.
        texts: what to run.
        runs: which edits.
        watched: heads whose attention from the last column to ``texts.keys`` is recorded.
        advance: called with the number of texts after each run of a batch.

    Returns:
        The clean run, whose columns other than ``logit_difference`` are 0, and the edits.

    Raises:
        NonFiniteError: logits are NaN or infinite.
    """
    first = Site.parse(site).layer
    clean, effects = _Collected(len(texts)), [_Collected(len(texts)) for _ in runs]
    heads = [head for head in map(parse_head, watched) if head[0] >= first]
    layers = sorted({layer for layer, _ in heads})
    # Texts that are edited late leave little to run again.
    order = torch.argsort(texts.positions.cpu(), stable=True)
    for rows in in_batches(order, context.batch_size):
        batch = texts.rows(rows, context.device)
        tail = Tail(
            context.model,
            batch.inputs,
            first,
            int(batch.positions.min()),
            batch_size=context.batch_size,
        )
        last = torch.full_like(batch.positions, batch.inputs["input_ids"].shape[1] - 1)
        shown: AbstractContextManager[dict[int, Tensor]] = (
            record_patterns(context.model, layers, last) if layers else nullcontext({})
        )
        with shown as patterns:
            reading = Batch(tail, batch, patterns, heads, len(watched))
            clean.keep(rows, reading.clean)
            for run, collected in zip(runs, effects, strict=True):
                collected.keep(rows, reading.edited(context.model, site, run, rows))
                advance(len(rows))
    return clean.effects(), [collected.effects() for collected in effects]


class _Collected:
    """Tensors of batches, put back in the order of the texts."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._kept: dict[str, Tensor] = {}

    def keep(self, rows: Tensor, found: Mapping[str, Tensor]) -> None:
        for name, values in found.items():
            dtype = torch.float32 if name == "activations" else torch.float64
            if name not in self._kept:
                self._kept[name] = torch.zeros(self._n, *values.shape[1:], dtype=dtype)
            self._kept[name][rows] = values.to("cpu", dtype)

    def effects(self) -> Effects:
        columns = dict(self._kept)
        activations = columns.pop("activations", torch.zeros(self._n, 0))
        return Effects(columns, activations)


def seconds_per_text(
    edit: Baseline, x: Tensor, target: Tensor, source: Tensor, repeats: int = 3
) -> float:
    """Time of the edit alone, outside the model, a text: the median of some passes over all.

    Args:
        edit: with its partners where it needs any.
        x: activations, (n, d).
        target: (n,).
        source: (n,).
        repeats: passes, after one that is not counted.
    """
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        edit(x, target, source)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[repeats // 2] / len(x)
