"""Edits towards several targets, run side by side in one batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import NonFiniteError
from lrqp_torch.stream.replay import Replay
from lrqp_torch.stream.sites import Site

RECORD = ("log_odds_before", "log_odds_after", "floor", "distance", "euclidean", "status")
"""What is kept of each edit's :class:`~lrqp_torch.edits.record.EditRun`, one number a prompt."""


@dataclass(frozen=True)
class Edited:
    """One edit of a batch of prompts.

    Attributes:
        logits: of the last column, (B, vocabulary), on the model's device.
        record: each of :data:`RECORD`, (B,), on the CPU; float64, the status int64.
    """

    logits: Tensor
    record: dict[str, Tensor]


def edited_side_by_side(
    replay: Replay,
    edits: Mapping[str, LRQP],
    positions: Tensor,
    labels: Tensor,
    targets: Mapping[str, Tensor],
) -> Iterator[tuple[str, dict[str, Edited]]]:
    """Run each edit towards all targets at once.

    Args:
        replay: the clean run of the batch, with one copy a target.
        edits: site name to edit.
        positions: column to edit in each prompt, (B,).
        labels: class that holds, (B,).
        targets: name of a condition to the class to write, (B,).

    Yields:
        A site, and what each condition did there.

    Raises:
        NonFiniteError: the model's logits under an edit are NaN or infinite.
    """
    at, source = positions.repeat(len(targets)), labels.repeat(len(targets))
    target = torch.cat(list(targets.values()))
    for site, edit in edits.items():
        with edit.at(replay.model, site, positions=at, target=target, source=source) as run:
            logits = finite(replay.run(Site.parse(site).layer), f"the edits at {site}")
        record = {name: getattr(run, name).to("cpu", torch.float64) for name in RECORD}
        record["status"] = record["status"].to(torch.int64)
        found = {}
        for index, condition in enumerate(targets):
            rows = slice(index * len(labels), (index + 1) * len(labels))
            own = {name: values[rows].clone() for name, values in record.items()}
            found[condition] = Edited(logits[rows], own)
        yield site, found


def finite(logits: Tensor, where: str) -> Tensor:
    """The same logits.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            f"the model's logits contain NaN or infinity in {where}. Try the model in float32."
        )
    return logits
