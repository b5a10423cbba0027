"""What an edit did inside a model: the record of an ``edit.at`` context."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrqp_torch.errors import EditNeverFiredError, TargetError
from lrqp_torch.intervention import EditContext
from lrqp_torch.positions import Positions
from lrqp_torch.qp import Solution, Status
from lrqp_torch.qp.checks import as_classes

RECORDED = ("log_odds_before", "log_odds_after", "floor", "distance", "euclidean", "kkt_residual")


class EditRun:
    """An LRQP edit at particular positions, and the record of its last application to each.

    Every property has the shape of the positions: (B,), (B, n), or (N,) for a mask with N true
    entries. Positions are recorded when the forward pass reaches them; reading one before all have
    run raises :class:`~lrqp_torch.errors.EditNeverFiredError`.

    Args:
        solve: :meth:`LRQP.solve`.
        positions: as given to ``edit.at``.
        target: class to write: one for all, (B,), or the shape of positions.
        source: class that holds now, in the same shapes, or None.
    """

    def __init__(
        self,
        solve: Callable[..., Solution],
        positions: Tensor,
        target: Tensor | int,
        source: Tensor | int | None,
    ) -> None:
        self._solve = solve
        self._positions = Positions.parse(positions)
        self._target = _per_position(target, positions, self._positions, "target")
        self._source = (
            None if source is None else _per_position(source, positions, self._positions, "source")
        )
        count = len(self._positions.token)
        self._record = {
            name: torch.full((count,), torch.nan, dtype=torch.float64) for name in RECORDED
        }
        self._status = torch.full((count,), -1)

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Edit the activations of some positions; called by the hook."""
        at = context.index.cpu()
        solution = self._solve(
            x,
            self._target[at].to(x.device),
            None if self._source is None else self._source[at].to(x.device),
            realise=context.realise,
            examples=context.example,
        )
        for name, values in self._record.items():
            self._record[name] = values.to(x.device).index_put(
                (context.index,), getattr(solution, name).detach()
            )
        self._status = self._status.to(x.device).index_put((context.index,), solution.status)
        return solution.x_new

    def __repr__(self) -> str:
        fired = self._status >= 0
        if not bool(fired.all()):
            return f"EditRun({int(fired.sum())} of {len(fired)} positions have run)"
        counts = {kind.name.lower(): int((self._status == kind).sum()) for kind in Status}
        kinds = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        worst = float((self.log_odds_after - self.floor).min())
        return f"EditRun({kinds}; worst log odds margin {worst:.1e})"

    @property
    def status(self) -> Tensor:
        """:class:`~lrqp_torch.Status` of each position."""
        self._require_fired()
        return self._status.reshape(self._positions.shape)

    @property
    def log_odds_before(self) -> Tensor:
        """Log odds of the target against its strongest rival before the edit, in nats."""
        return self._read("log_odds_before")

    @property
    def log_odds_after(self) -> Tensor:
        """The same, read back from the values that the stream holds after the edit."""
        return self._read("log_odds_after")

    @property
    def odds_before(self) -> Tensor:
        """Odds P[target] / max P[other] before the edit; infinite above e^709."""
        return self.log_odds_before.exp()

    @property
    def odds_after(self) -> Tensor:
        """The same after the edit."""
        return self.log_odds_after.exp()

    @property
    def floor(self) -> Tensor:
        """Log α that was asked for."""
        return self._read("floor")

    @property
    def distance(self) -> Tensor:
        """Mahalanobis length of each edit; 0 where none was needed."""
        return self._read("distance")

    @property
    def euclidean(self) -> Tensor:
        """Euclidean length of each edit, in the units of the stream."""
        return self._read("euclidean")

    @property
    def kkt_residual(self) -> Tensor:
        """Scaled violation of the optimality conditions of each quadratic program."""
        return self._read("kkt_residual")

    @property
    def n_unreached(self) -> int:
        """How many positions were left unchanged because their target could not be reached."""
        return int((self.status >= Status.INFEASIBLE).sum())

    def _read(self, name: str) -> Tensor:
        self._require_fired()
        return self._record[name].reshape(self._positions.shape)

    def _require_fired(self) -> None:
        missing = int((self._status < 0).sum())
        if missing:
            raise EditNeverFiredError(
                f"{missing} of {len(self._status)} positions have not run yet; call the model "
                f"inside the context first"
            )


def _per_position(classes: Tensor | int, positions: Tensor, parsed: Positions, name: str) -> Tensor:
    """One class for each (example, token) pair, (N,), on the CPU."""
    classes = as_classes(classes, name).cpu()
    if classes.dtype.is_floating_point or classes.dtype == torch.bool:
        raise TargetError(f"{name} must hold integer classes, got {classes.dtype}; use .long()")
    example, slot = parsed.example.cpu(), parsed.slot.cpu()
    if classes.ndim == 0:
        return classes.expand(len(example)).clone()
    if classes.shape == (parsed.batch,):
        return classes[example]
    if classes.shape == positions.shape:
        return classes[example, slot]
    raise TargetError(
        f"{name} has shape {tuple(classes.shape)}; give one number, ({parsed.batch},) for one "
        f"class an example, or {tuple(positions.shape)} for one a position"
    )
