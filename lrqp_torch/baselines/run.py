"""What a baseline did inside a model."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrqp_torch.edits.record import EditRun
from lrqp_torch.qp import Status
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.scopes import Where

if TYPE_CHECKING:
    from lrqp_torch.baselines.base import Baseline


class BaselineRun(EditRun):
    """A baseline at particular positions, and the record of its last application to each.

    The record is an :class:`~lrqp_torch.EditRun`, read with the reference's probe and metric, from
    the values that the stream holds. ``floor`` and ``kkt_residual`` are NaN: a baseline promises no
    odds. ``status`` is SATISFIED where the activation was left as it was, and otherwise SOLVED.
    """

    def __init__(
        self,
        baseline: "Baseline",
        positions: Where,
        target: Tensor | int,
        source: Tensor | int | None,
    ) -> None:
        super().__init__(baseline.reference.solve, positions, target, source)
        self._baseline = baseline

    @property
    def n_positions(self) -> int:
        """How many activations are edited."""
        return len(self._target)

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Edit the activations of some positions; called by the hook."""
        at = context.index.cpu()
        target = self._target[at].to(x.device)
        source = None if self._source is None else self._source[at].to(x.device)
        edited = self._baseline.edit_rows(x, target, source, context)
        with torch.no_grad():
            self._keep(x, edited, target, context)
        return edited

    def _keep(self, x: Tensor, edited: Tensor, target: Tensor, context: EditContext) -> None:
        moved = (edited != x).any(-1)
        held = torch.where(moved.unsqueeze(-1), context.realise(edited), x.double())
        delta = held - x.double()
        reference = self._baseline.reference
        geometry = reference.geometry(x.device)
        values = {
            "log_odds_before": geometry.margins(x, target).amin(-1),
            "log_odds_after": geometry.margins(held, target).amin(-1),
            "distance": self._baseline.length(delta),
            "euclidean": torch.linalg.vector_norm(delta, dim=-1),
        }
        for name, column in values.items():
            self._record[name] = self._record[name].to(x.device)
            self._record[name][context.index] = column
        self._status = self._status.to(x.device)
        self._status[context.index] = torch.where(moved, int(Status.SOLVED), int(Status.SATISFIED))

    def __repr__(self) -> str:
        fired = self._status >= 0
        name = self._baseline.name
        if not bool(fired.all()):
            return f"BaselineRun({name}, {int(fired.sum())} of {len(fired)} positions have run)"
        edited = int((self._status == Status.SOLVED).sum())
        return f"BaselineRun({name}, {edited} of {len(fired)} positions edited)"
