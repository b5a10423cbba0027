"""What an edit of several variables did inside a model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrqp_torch.edits.record import EditRun, _per_position
from lrqp_torch.qp import Status
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.scopes import Where

PER_VARIABLE = ("log_odds_before", "log_odds_after", "floor", "moved")


class JointRun(EditRun):
    """A joint edit at particular positions, and the record of its last application to each.

    As :class:`~lrqp_torch.EditRun`; properties of a variable have V as a last axis, in the
    order of ``names``: (B, V), (B, n, V) or (N, V). They are NaN where it was not written.

    Args:
        solve: :meth:`JointLRQP.solve`.
        positions: as given to ``joint.at``.
        target: name to class, each one for all, (B,), or the shape of positions.
        source: the same for the classes that hold now.
    """

    def __init__(
        self,
        solve: Callable[..., Any],
        positions: Where,
        target: Mapping[str, Tensor | int],
        source: Mapping[str, Tensor | int],
    ) -> None:
        super().__init__(solve, positions, 0, None)
        self.names = tuple(target)

        def stack(classes: Mapping[str, Tensor | int], what: str) -> Tensor:
            parts = [
                _per_position(part, positions, self._positions, f"{what} of {name!r}")
                for name, part in classes.items()
            ]
            return torch.stack(torch.broadcast_tensors(*parts), -1)

        self._target = stack(target, "target")
        self._source = stack(source, "source")
        empty = torch.full(self._target.shape, torch.nan, dtype=torch.float64)
        self._record |= dict.fromkeys(PER_VARIABLE, empty)

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Edit the activations of some positions; called by the hook."""
        self._to(x.device)
        index = context.index
        assert self._source is not None
        solution = self._solve(
            x,
            self._target[index],
            self._source[index],
            realise=context.realise,
            examples=context.example,
        )
        for name, values in self._record.items():
            self._record[name] = values.index_put((index,), getattr(solution, name).detach())
        self._status = self._status.index_put((index,), solution.status)
        return solution.x_new

    def __repr__(self) -> str:
        fired = self._status >= 0
        if not bool(fired.all()):
            return f"JointRun({int(fired.sum())} of {len(fired)} positions have run)"
        counts = {kind.name.lower(): int((self._status == kind).sum()) for kind in Status}
        kinds = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"JointRun({kinds}; {', '.join(self.names)})"

    @property
    def moved(self) -> Tensor:
        """The largest change of any log odds of each variable, read back, in nats."""
        return self._read("moved")

    def _read(self, name: str) -> Tensor:
        self._require_fired()
        values = self._record[name]
        return values.reshape(*self._positions.shape, *values.shape[1:])
