"""Which tokens of a forward pass an intervention edits, where its positions are fixed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.stream.positions import ForwardCall, Positions


@dataclass(frozen=True)
class Rows:
    """The positions that a forward pass reaches, and where they are in it.

    Attributes:
        fired: as ``index``, on the CPU.
        index: which of all pairs these are, (N,).
        example: row of the batch of each, (N,).
        token: column of each, counted from the beginning of the text, (N,).
        column: column of each in this call, (N,).
        request: in a scope, the request that each row of the batch belongs to, (N,).
    """

    fired: Tensor
    index: Tensor
    example: Tensor
    token: Tensor
    column: Tensor
    request: Tensor | None = None


class FixedRows:
    """Positions that are known beforehand, and which of them have run."""

    def __init__(self, positions: Positions) -> None:
        # On the host, so that a forward pass need not ask the device which of them are its own.
        self.watched = positions.to(torch.device("cpu"))
        self.fired = torch.zeros(len(positions.token), dtype=torch.bool)
        self._rows: tuple[tuple[int, int, torch.device], Rows | None] | None = None

    def rows(self, call: ForwardCall, device: torch.device) -> Rows | None:
        """The positions of a call on a device, or None; those of the last call are kept."""
        key = (call.past, call.length, device)
        if self._rows is None or self._rows[0] != key:
            example, token = self.watched.example, self.watched.token
            index = ((token >= call.past) & (token < call.past + call.length)).nonzero().squeeze(-1)
            parts = index, example[index], token[index], token[index] - call.past
            rows = Rows(index, *(part.to(device) for part in parts)) if len(index) else None
            self._rows = (key, rows)
        return self._rows[1]

    def mark(self, rows: Rows) -> None:
        """Note that an edit ran."""
        self.fired[rows.fired] = True

    def missed(self) -> str | None:
        """What to say of positions that never ran, if any."""
        if bool(self.fired.all()):
            return None
        missed, at = (~self.fired).nonzero().flatten(), self.watched
        pairs = [(int(at.example[i]), int(at.token[i])) for i in missed[:5]]
        return (
            f"never ran at {len(missed)} of {len(self.fired)} positions, the first (example, "
            f"token) are {pairs}. Run the model inside the context; with a KV cache, positions "
            f"before the cached part have passed already"
        )
