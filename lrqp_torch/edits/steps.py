"""What an edit did in each forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.qp import Status


@dataclass(frozen=True)
class Step:
    """The tokens that one forward pass edited, n of them; numbers only, no activations.

    Odds and floor have the variables of a joint edit as a last axis, and are NaN where a method
    promises none.

    Attributes:
        forward_pass: number of the pass within the context, from 0, among those that reach the
            site; passes without a token to edit leave a gap.
        example: row of the batch of each token, (n,), as rows were in this pass.
        token: column of each, (n,), counted from the beginning of the text.
        log_odds_before: log odds of the target before the edit, in nats.
        log_odds_after: the same, read back from the values that the stream holds.
        floor: log α that was asked for.
        distance: Mahalanobis length of each edit, (n,).
        status: :class:`~lrqp_torch.Status` of each, (n,).
    """

    forward_pass: int
    example: Tensor
    token: Tensor
    log_odds_before: Tensor
    log_odds_after: Tensor
    floor: Tensor
    distance: Tensor
    status: Tensor

    def __len__(self) -> int:
        return len(self.token)


_COLUMNS = ("pass", "tokens", "columns", "edited", "log odds before", "after", "distance")


def summarise(steps: Sequence[Step]) -> str:
    """A table of steps, one line each, in medians over tokens (log odds in nats)."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for step in steps:
        first, last = int(step.token.min()), int(step.token.max())
        cells = (
            str(step.forward_pass),
            str(len(step)),
            str(first) if first == last else f"{first}-{last}",
            str(int((step.status == Status.SOLVED).sum())),
            f"{_median(step.log_odds_before):.2f}",
            f"{_median(step.log_odds_after):.2f}",
            f"{_median(step.distance):.3f}",
        )
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _median(values: Tensor) -> float:
    return float(torch.nanmedian(values))
