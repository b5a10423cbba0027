"""What an edit did inside a model: the record of an ``edit.at`` context."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrqp_torch.edits.failures import raise_failures
from lrqp_torch.edits.steps import Step, summarise
from lrqp_torch.errors import EditNeverFiredError, TargetError, as_classes, check_classes, readable
from lrqp_torch.qp import Solution, Status
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.positions import Positions
from lrqp_torch.stream.scopes import Scope, ScopePairs, Where, parse

if TYPE_CHECKING:
    from lrqp_torch.edits.lrqp import LRQP

RECORDED = ("log_odds_before", "log_odds_after", "floor", "distance", "euclidean", "kkt_residual")


class EditRun:
    """An LRQP edit at particular positions, and the record of its last application to each.

    Every property has the shape of the positions: (B,), (B, n), or (N,) for a mask with N true
    entries. Positions are recorded when the forward pass reaches them; reading one before all have
    run raises :class:`~lrqp_torch.errors.EditNeverFiredError`.

    In a :class:`~lrqp_torch.Scope` properties are flat, (N,), over all tokens that were edited, in
    the order in which the model first read them; ``example``, ``token`` and ``generation`` say
    which they are. ``steps`` has what every forward pass did, also for fixed positions.

    On the CPU an edit that fails raises in the forward pass. On a GPU the forward pass does not
    wait to know: it goes on, and the same error is raised when the context closes, or as soon as
    the record is read.

    Args:
        solve: :meth:`LRQP.solve`.
        positions: as given to ``edit.at``.
        target: class to write: one for all, (B,), or the shape of positions. In a scope (B,) are
            requests, each of ``repeats`` rows.
        source: class that holds now, in the same shapes, or None.
        edit: the edit whose failures may be raised late; without one, ``solve`` raises at once.

    Attributes:
        steps: a :class:`~.steps.Step` for every forward pass with a token to edit since
            the context opened; a few numbers a token.
    """

    def __init__(
        self,
        solve: Callable[..., Solution],
        positions: Where,
        target: Tensor | int,
        source: Tensor | int | None,
        edit: "LRQP | None" = None,
    ) -> None:
        self._solve, self._edit = solve, edit
        parsed = parse(positions)
        self._positions = ScopePairs(parsed) if isinstance(parsed, Scope) else parsed
        self._target = _per_position(target, positions, self._positions, "target")
        self._source = (
            None if source is None else _per_position(source, positions, self._positions, "source")
        )
        if edit is not None:
            for name, classes in (("target", self._target), ("source", self._source)):
                if classes is not None:
                    check_classes(classes, len(classes), edit.probe.n_classes, name)
        count = len(self._positions.token)
        self.steps: list[Step] = []
        self._per_request: tuple[Tensor, Tensor | None] | None = None
        self._record = {
            name: torch.full((count,), torch.nan, dtype=torch.float64) for name in RECORDED
        }
        self._status = torch.full((count,), -1)
        self._dtype, self._late = torch.float32, False

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Edit the activations of some positions; called by the hook."""
        self._to(x.device)
        index = context.index
        target = self._target[index]
        source = None if self._source is None else self._source[index]
        if self._edit is None or readable(x):
            solution = self._solve(
                x, target, source, realise=context.realise, examples=context.example
            )
            kept = torch.zeros_like(index, dtype=torch.bool)
        else:
            solution = self._edit.propose(x, target, source, realise=context.realise)
            # What failed stays on record until it is raised, whatever passes follow.
            kept = self._failed()[index]
            self._dtype, self._late = x.dtype, True
        for name, values in self._record.items():
            new = torch.where(kept, values[index], getattr(solution, name).detach())
            self._record[name] = values.index_put((index,), new)
        status = torch.where(kept, self._status[index], solution.status)
        self._status = self._status.index_put((index,), status)
        return solution.x_new

    @property
    def requests(self) -> int | None:
        """B, if targets in a scope were given one a request; else None."""
        return self._positions.requests if isinstance(self._positions, ScopePairs) else None

    def begin(self) -> None:
        """Forget the steps, and a scope's tokens, of a context before; called on entering."""
        self.steps.clear()
        if not isinstance(self._positions, ScopePairs):
            return
        self._positions.take(ScopePairs(self._positions.scope))
        if self._per_request is None:
            self._per_request = self._target, self._source
        self._target = self._target[:0]
        self._source = None if self._source is None else self._source[:0]
        self._record = {name: values[:0] for name, values in self._record.items()}
        self._status = self._status[:0]

    def grow(self, pairs: ScopePairs) -> None:
        """Make room for tokens that a scope has reached; called before they are edited."""
        held, new = len(self._status), len(pairs.token) - len(self._status)
        if not new:
            return
        assert isinstance(self._positions, ScopePairs) and self._per_request is not None
        self._positions.take(pairs)
        request = pairs.request[held:]
        target, source = self._per_request

        def extend(classes: Tensor, given: Tensor) -> Tensor:
            rows = given[request] if len(given) > 1 else given.expand(new, *given.shape[1:])
            return torch.cat([classes, rows.to(classes.device)])

        self._target = extend(self._target, target)
        if self._source is not None and source is not None:
            self._source = extend(self._source, source)
        self._record = {
            name: torch.cat([values, values.new_full((new, *values.shape[1:]), torch.nan)])
            for name, values in self._record.items()
        }
        self._status = torch.cat([self._status, self._status.new_full((new,), -1)])

    def end_step(self, context: EditContext, forward_pass: int) -> None:
        """Keep what the record says of the rows just edited; called after the edit."""
        names = "log_odds_before", "log_odds_after", "floor", "distance"
        values = {name: self._record[name][context.index] for name in names}
        status = self._status[context.index]
        self.steps.append(
            Step(forward_pass, context.example, context.token, **values, status=status)
        )

    def summary(self) -> str:
        """A table of the steps, a line each, in medians over tokens."""
        return summarise(self.steps)

    def raise_late(self) -> None:
        """Raise for edits that failed in a forward pass that did not wait to know.

        Raises:
            InfeasibleError, SolverError, NonFiniteError: as :meth:`LRQP.solve`.
        """
        if not self._late:
            return
        failed = self._failed()
        if not bool(failed.any()):
            return
        raise_failures(
            torch.where(failed, self._status, int(Status.SATISFIED)),
            names=self._positions.example.to(failed.device),
            target=self._target,
            floor=self._record["floor"],
            reached=self._record["log_odds_after"],
            residual=self._record["kkt_residual"],
            overflow=~torch.isfinite(self._record["log_odds_after"]),
            dtype=self._dtype,
            n_kept=0 if self._edit is None else self._edit.metric.n_kept,
        )

    def _failed(self) -> Tensor:
        """Which positions have failed in a way that is an error, (N,) bool."""
        allowed = self._edit is not None and self._edit.on_infeasible == "skip"
        return self._status > int(Status.INACCURATE if allowed else Status.SOLVED)

    def _to(self, device: torch.device) -> None:
        if self._status.device == device:
            return
        self._status, self._target = self._status.to(device), self._target.to(device)
        self._source = None if self._source is None else self._source.to(device)
        self._record = {name: values.to(device) for name, values in self._record.items()}

    def __repr__(self) -> str:
        fired = self._status >= 0
        if not len(fired) or not bool(fired.all()):
            return f"EditRun({int(fired.sum())} of {len(fired)} positions have run)"
        counts = {kind.name.lower(): int((self._status == kind).sum()) for kind in Status}
        kinds = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        worst = float((self.log_odds_after - self.floor).min())
        return f"EditRun({kinds}; worst log odds margin {worst:.1e})"

    @property
    def example(self) -> Tensor:
        """Row of the batch of each position."""
        return self._positions.example.reshape(self._positions.shape)

    @property
    def token(self) -> Tensor:
        """Column of each position."""
        return self._positions.token.reshape(self._positions.shape)

    @property
    def generation(self) -> Tensor:
        """In a scope, which of the context's texts each token is part of, from 0; else zeros."""
        if isinstance(self._positions, ScopePairs):
            return self._positions.generation
        return torch.zeros(self._positions.shape, dtype=torch.long)

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
        self.raise_late()
        if not len(self._status):
            raise EditNeverFiredError(
                "no token of the scope has been edited yet; call model.generate inside the context "
                "first"
            )
        missing = int((self._status < 0).sum())
        if missing:
            raise EditNeverFiredError(
                f"{missing} of {len(self._status)} positions have not run yet; call the model "
                f"inside the context first"
            )


def _per_position(
    classes: Tensor | int, positions: Where, parsed: Positions | ScopePairs, name: str
) -> Tensor:
    """One class for each (example, token) pair, (N,), in a scope each request; on the CPU."""
    classes = as_classes(classes, name).cpu()
    if classes.dtype.is_floating_point or classes.dtype == torch.bool:
        raise TargetError(f"{name} must hold integer classes, got {classes.dtype}; use .long()")
    if isinstance(parsed, ScopePairs):
        return parsed.per_request(classes, name)
    assert isinstance(positions, Tensor)
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
