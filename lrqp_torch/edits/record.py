"""What an edit did inside a model: the record of an ``edit.at`` context."""

import ctypes
import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lrqp_torch.edits.failures import raise_failures, worst_allowed
from lrqp_torch.errors import (
    EditNeverFiredError,
    LRQPError,
    capturing,
    concrete,
    in_transforms,
    outside_transforms,
    unwrapped,
)
from lrqp_torch.qp import Solution, Status, fused, native
from lrqp_torch.qp.direct import Laid, Line, numbers_of
from lrqp_torch.qp.solution import in_words, outcome
from lrqp_torch.stream import repeats
from lrqp_torch.stream.following import Rows, consecutive
from lrqp_torch.stream.intervene import EditContext
from lrqp_torch.stream.positions import Positions, Where
from lrqp_torch.stream.sites import Site

if TYPE_CHECKING:
    from lrqp_torch.edits.base import Edit

RECORDED = ("log_odds_before", "log_odds_after", "floor", "distance", "euclidean", "kkt_residual")


@dataclass(frozen=True)
class Step:
    """The tokens that one forward pass edited, n of them; numbers only, no activations.

    Odds and floor have the variables of a joint edit as a last axis, and are NaN where a method
    promises none.
    """

    # Number of the pass within the context, from 0, among those that reach the site; passes without
    # a token to edit leave a gap.
    forward_pass: int
    example: Tensor  # row of the batch of each token, (n,), as rows were in this pass
    token: Tensor  # column of each, (n,), counted from the beginning of the text
    log_odds_before: Tensor  # log odds of the target before the edit, in nats
    log_odds_after: Tensor  # the same, read back from the values that the stream holds
    floor: Tensor  # log α that was asked for
    distance: Tensor  # Mahalanobis length of each edit, (n,)
    status: Tensor  # `Status` of each, (n,)

    def __len__(self) -> int:
        return len(self.token)


class EditRun:
    """An edit at particular positions, and the record of its last application to each.

    Every property has the shape of the positions: (B,), (B, n), or (N,) for a mask with N true
    entries; odds and floor of an edit of several variables have these as a last axis, in the order
    of ``names``, and are NaN where a variable was not written, or where a method promises no odds.
    Positions are recorded when the forward pass reaches them; reading one before all have run
    raises :class:`~lrqp_torch.errors.EditNeverFiredError`.

    In a :class:`~lrqp_torch.Scope` properties are flat, (N,), over all tokens that were edited, in
    the order in which the model first read them; ``example``, ``token`` and ``generation`` say
    which they are. ``steps`` has what every forward pass did, also for fixed positions.

    On the CPU an edit that fails raises in the forward pass. On a GPU the forward pass does not
    wait to know: it goes on, and the same error is raised when the context closes, or as soon as
    the record is read.

    A forward pass adds a row of some 80 bytes for each token that it edits (a variable more, 32
    more), in constant time, however many there are.

    Args:
        edit: what to apply.
        positions: as given to ``edit.at``.
        target: class to write: one for all, (B,), or the shape of positions. In a scope (B,) are
            requests, each of ``repeats`` rows.
        source: class that holds now, in the same shapes, or None.
        record: whether to keep the rows; without them nothing can be read but failures.

    Attributes:
        edit: what is applied.
        positions: where, parsed.
        given: what else it is given at each application.
        certified: whether what it returns need not be looked at again; see :class:`Edit`.
        inputs: the texts of ``edit.at(..., texts=...)`` as the model is given them; else None.
        checked: whether the model is known to be one that the edit is for.
    """

    inputs: Mapping[str, Tensor] | None = None
    checked = False
    _dtype = torch.float32
    _line: Line | None = None
    _laid: Laid | None = None
    _launch: "_Launch | None" = None

    def __init__(
        self,
        edit: "Edit[Any]",
        positions: Where,
        target: Any,
        source: Any = None,
        record: bool = True,
    ) -> None:
        self.edit, self.given = edit, dict[str, Any]()
        self.positions = Positions.parse(positions)
        self._target = edit.place(target, "target", self.positions)
        self._source = None if source is None else edit.place(source, "source", self.positions)
        self._rows = _Rows(record)
        self._classes: tuple[Tensor | None, Tensor, Tensor | None] = None, self._target, None
        kind = type(edit)
        self.certified = edit.certified and _answers(
            kind, kind.solve, kind.edit_rows, kind.edit_stream
        )

    @property
    def nbytes(self) -> int:
        """How much memory the record takes."""
        pairs = self.positions.example, self.positions.token, self.generation
        return self._rows.nbytes + sum(part.nbytes for part in pairs)

    @property
    def names(self) -> tuple[str, ...]:
        """The variables of an edit of several."""
        return self.edit.names

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Edit the activations of some positions; called by the hook."""
        _, target, source = self._classes_of(context, x.device)
        solution = self.edit.edit_rows(x, target, source, context, **self.given)
        if context.forward_pass >= 0:
            self._rows.append(solution, context.index, context.shown, context.forward_pass)
        self._dtype = x.dtype
        return solution.x_new

    def edit_stream(
        self, stream: Tensor, residual: Tensor | None, scale: float, at: Rows, forward_pass: int
    ) -> Tensor | None:
        """Edit some rows of the stream in one launch, where the kind of edit can; or None."""
        if not self.certified:
            return None
        launch = self._launch
        if launch is not None:
            whole = launch.again(self, stream, residual, scale, at, forward_pass)
            if whole is not None:
                return whole
        compiled = stream.is_cpu and (self._laid is not None or not fused.interpreted())
        if compiled or not fused.serves(stream, self.edit.n_classes):
            return self._in_one_call(stream, residual, scale, at, forward_pass)
        self._place(stream.device)
        count, index = at.index.shape[0], at.index
        places = at.example, at.column, index, at.request, at.shown
        with _WRITING:
            block = self._rows.room(count, stream.device, len(self.names))
            record = block.rows, block.count, forward_pass
            rows = fused.StreamRows(stream, residual, scale, *places, record, at.whole)
            found = self.edit.edit_stream(rows, self._target, self._source, **self.given)
            if found is None:
                return None
            whole, laid = found
            block.count += count
        self._dtype = whole.dtype
        self._launch = None
        # What a CUDA graph is to make is not there before it runs.
        if laid is not None and not capturing(stream):
            self._launch = _Launch.of(laid, self, block, rows, at)
        return whole

    def _in_one_call(
        self, stream: Tensor, residual: Tensor | None, scale: float, at: Rows, forward_pass: int
    ) -> Tensor | None:
        """:meth:`edit_stream` on the CPU."""
        line = self._line = self.edit.line()
        if line is None:
            return None
        laid = self._laid
        if (
            laid is None
            or laid.line is not line
            or not at.is_like(laid.at)
            or laid.dtype is not stream.dtype
            or laid.shape != stream.shape
            or not line.is_plain(stream, residual)
        ):
            given, asked = self.given, self.given.get("asked")
            if at.shown is not None or given.keys() - {"asked"}:
                return None
            if not line.takes(stream, residual):
                return None
            kept = asked is None or isinstance(asked, float | int)
            if not kept:
                # What it holds may have changed since the last pass.
                asked = self.edit.asked_at(asked, at)
                if line.differentiates(asked):
                    return None
            laid = self._lay(line, at, stream, scale, asked)
            self._laid = laid if kept else None
        table = laid.table() if self._rows.kept else None
        first = at.numbers
        first = 0 if isinstance(first, Tensor) else first
        whole = laid.edit(stream, residual, table, forward_pass, first)
        if whole is None and self.edit.line() is not line:
            # A change that left no trace was seen in the call.
            return self._in_one_call(stream, residual, scale, at, forward_pass)
        if whole is not None and table is not None:
            self._rows.wrote_in(laid, table, len(self.names))
        return whole

    def offer(
        self,
        site: repeats.Site,
        stream: Tensor,
        residual: Tensor | None,
        scale: float,
        at: Rows,
    ) -> repeats.Function | None:
        """What does :meth:`edit_stream` in passes like the last one, in one compiled call.

        Args:
            site: knows of the pass, and of the stream.
            stream: as in the last one.
            residual: likewise.
            scale: likewise.
            at: likewise.
        """
        line, laid, kept = self._line, self._laid, self._rows.kept
        if line is None or laid is None or laid.line is not line:
            return None
        if not at.is_like(laid.at) or laid.threads > 1 or not line.is_plain(stream, residual):
            return None
        site.own = len(site.held)
        if not (isinstance(line.guards, repeats.Guards) and line.guards.told(site)):
            line.guards = guards = _guards(self.edit, line.parts, line.counts)
            if not guards.told(site):
                return None
        first, parts = at.numbers, line.parts
        site.parts, site.copies, site.threads = id(parts), laid.copies, 1
        site.solve, site.shared, site.task = (
            native.edits_stream(),
            *map(ctypes.addressof, laid.owned),
        )
        site.first, site.room = 0 if isinstance(first, Tensor) else first, 1
        site.held += [parts, laid]
        if kept:
            self._rows.room_at(site, laid, len(self.names))
        return repeats.bound("edit", site)

    def keep(self, site: repeats.Site, number: int) -> bool:
        """Let go of what :meth:`offer` has told of a site, for another run to go on with: what is
        the edit's own is kept with that, under a number. Whether there is such a thing.
        """
        line, laid = self._line, self._laid
        self._rows.leave(site)
        if line is None or laid is None or laid.line is not line:
            return False
        guards, self._laid = site.held[site.own], None
        del site.held[site.own :]
        if len(line.kept) >= MOST_KEPT:
            line.kept.pop(next(iter(line.kept)), None)
        line.kept[number] = guards, laid[1:]
        return True

    def resume(self, site: repeats.Site, number: int) -> bool:
        """Go on with what another run has kept of a site; False where that is not to be had."""
        line = self.edit._line
        kept = None if line is None else line.kept.pop(number, None)
        if line is None or kept is None or self.given:
            return False
        laid = Laid(line, *kept[1])
        target, source = self._classes_at(cast(Rows, laid.at))
        if not laid.ask(target, source):
            return False
        self._line, self._laid, self._dtype = line, laid, laid.dtype
        site.held += [kept[0], line.parts, laid]
        site.used, site.room, site.record = 0, 1, None
        if self._rows.kept:
            self._rows.room_at(site, laid, len(self.names))
        return True

    def _lay(
        self, line: Line, at: Rows, stream: Tensor, scale: float, asked: Tensor | float | None
    ) -> Laid:
        """What edits rows of such streams."""
        target, source = self._classes_at(at)
        task = line.task(stream.dtype, target, source, asked)
        place, numbers = None if at.whole else at.flat(stream.shape[1]), at.numbers
        task.count, task.place, task.scale = len(target), native.address(place), scale
        if isinstance(numbers, Tensor):
            task.numbered = numbers.data_ptr()
        task.owned = task.owned, place, numbers
        self._dtype = stream.dtype
        return line.laid(at, task, stream, _width(len(self.names)))

    def _classes_at(self, at: Rows) -> tuple[Tensor, Tensor | None]:
        """Targets and sources of rows of a pass on the CPU."""
        if at.every:
            self._place(_CPU)
            return self._target, self._source
        return self._classes_of(at, _CPU)[1:]

    def _classes_of(
        self, at: Rows | EditContext, device: torch.device
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Of which rows these are the classes, their targets and their sources."""
        which = at.index if at.request is None else at.request
        # The hook gives the same rows again as long as the positions are the same.
        if self._classes[0] is not which or self._classes[1].device != device:
            self._place(device)
            source = None if self._source is None else _chosen(self._source, which)
            self._classes = which, _chosen(self._target, which), source
        return self._classes

    def _place(self, device: torch.device) -> None:
        """Keep the classes where they are wanted."""
        if self._target.device != device:
            self._target = self._target.to(device, non_blocking=True)
        if self._source is not None and self._source.device != device:
            self._source = self._source.to(device, non_blocking=True)

    def begin(self, model: nn.Module, site: str | Site) -> None:
        """Forget what a context before left, and refuse a model that the edit is not for; called on
        entering.

        Raises:
            ProvenanceError: the edit was fitted on a model of another family or size.
        """
        if not self.checked and self.edit.provenance is not None:
            self.edit.provenance.check(model, site)
        self._rows.clear()

    @property
    def steps(self) -> list[Step]:
        """A :class:`Step` for every forward pass with a token to edit since the context opened."""
        rows = self._recorded().read(self.positions)
        if not len(rows):
            return []
        numbers = rows.column("forward_pass").long()
        numbers, lengths = numbers.unique_consecutive(return_counts=True)
        positions, index = self.positions.to(rows.device), rows.column("index").long()
        names = "log_odds_before", "log_odds_after", "floor", "distance"
        columns = [positions.example[index], positions.token[index]]
        columns += [*map(rows.column, names), rows.column("status").long()]
        parts = zip(*(column.split(lengths.tolist()) for column in columns), strict=True)
        return [Step(number, *part) for number, part in zip(numbers.tolist(), parts, strict=True)]

    def summary(self) -> str:
        """A table of the steps, a line each, in medians over tokens (log odds in nats)."""
        return summarise(self.steps)

    def raise_late(self) -> None:
        """Raise for edits that failed in a forward pass that did not wait to know.

        Raises:
            InfeasibleError, SolverError, NonFiniteError: as the edit's ``solve``.
        """
        if self._rows.sound:
            return
        rows = self._rows.read(self.positions)
        if not len(rows):
            return
        failed = rows.column("status") > worst_allowed(self.edit.on_infeasible)
        if not bool(failed.any()):
            return
        # What failed stays on record, whatever passes follow; one position is named once.
        rows = rows.last(len(self.positions), failed)
        index = rows.column("index").long()
        pairs, reached = self.positions.to(index.device), rows.column("log_odds_after")
        which = index if pairs.scope is None else pairs.request[index]
        raise_failures(
            self.edit,
            rows.column("status").long(),
            names=pairs.example[index],
            target=_chosen(self._target, which),
            floor=rows.column("floor"),
            reached=reached,
            residual=rows.column("kkt_residual"),
            overflow=~torch.isfinite(reached.reshape(len(index), -1)).all(-1),
            dtype=self._dtype,
        )

    def __repr__(self) -> str:
        if not self._rows.kept:
            return "EditRun(no record)"
        rows = self._rows.read(self.positions).last(len(self.positions))
        if not len(rows) or len(rows) < len(self.positions):
            return f"EditRun({len(rows)} of {len(self.positions)} positions have run)"
        said = [self.edit.label, in_words(rows.column("status"))]
        margin = rows.column("log_odds_after") - rows.column("floor")
        if not bool(margin.isnan().all()):
            said.append(f"worst log odds margin {float(margin.nan_to_num(torch.inf).min()):.1e}")
        return f"EditRun({'; '.join(filter(None, said))})"

    def _repr_html_(self) -> str:
        from lrqp_torch.plot.cards import card

        if not self._rows.kept:
            return card(repr(self), {})
        rows = self._rows.read(self.positions).last(len(self.positions))
        if not len(rows) or len(rows) < len(self.positions):
            return card(repr(self), {})
        odds = map(rows.column, ("log_odds_before", "log_odds_after", "floor"))
        return card(
            "EditRun",
            {"edit": self.edit.label or None, "positions": len(rows)}
            | {"status": in_words(rows.column("status")), **outcome(*odds)},
            [value for value in rows.column("distance").tolist() if value == value],
        )

    @property
    def example(self) -> Tensor:
        """Row of the batch of each position."""
        return self.positions.example.reshape(self.positions.shape)

    @property
    def token(self) -> Tensor:
        """Column of each position."""
        return self.positions.token.reshape(self.positions.shape)

    @property
    def generation(self) -> Tensor:
        """In a scope, which of the context's texts each token is part of, from 0; else zeros."""
        return self.positions.generation.reshape(self.positions.shape)

    @property
    def status(self) -> Tensor:
        """:class:`~lrqp_torch.Status` of each position; of a baseline, whether it moved."""
        return self._read("status").long()

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
    def moved(self) -> Tensor:
        """Of an edit of several variables: the largest change of any log odds of each, in nats."""
        return self._read("moved")

    @property
    def n_unreached(self) -> int:
        """How many positions were left unchanged because their target could not be reached."""
        return int((self.status >= Status.INFEASIBLE).sum())

    def _read(self, name: str) -> Tensor:
        rows, count = self._recorded(), len(self.positions)
        self.raise_late()
        if not count:
            raise EditNeverFiredError(
                "no token of the scope has been edited yet; call model.generate inside the context "
                "first"
            )
        rows = rows.read(self.positions).last(count)
        if len(rows) < count:
            raise EditNeverFiredError(
                f"{count - len(rows)} of {count} positions have not run yet; call the model inside "
                f"the context first"
            )
        values = rows.column(name)
        return values.reshape(*self.positions.shape, *values.shape[1:])

    def _recorded(self) -> "_Rows":
        if not self._rows.kept:
            raise LRQPError(
                "this context was opened with record=False, which keeps nothing to be read"
            )
        return self._rows


@functools.cache
def _answers(kind: type, *methods: Any) -> bool:
    """Whether a kind of edit answers for its own methods, not for what replaces them."""
    names = "solve", "edit_rows", "edit_stream"
    owners = [next(one for one in kind.__mro__ if name in vars(one)) for name in names]
    return all("certified" in vars(one) for one in owners)


def _guards(
    edit: "Edit[Any]", parts: tuple[Tensor, ...], counts: Callable[[Tensor], bool]
) -> repeats.Guards:
    """That an edit is what it was, and its parts too, of which some must not be written to."""
    guards = repeats.Guards(edit)
    guards.kind(edit)
    for name in ("solve", "edit_rows"):
        # What stands for a solve, on an edit or in its class, is to be called.
        guards(edit, name)
        guards.named(type(edit), name)
    edit.note_parts(guards)
    for part in parts:
        guards.part(part, counts(part))
    return guards


def _like(
    edit: "Edit[Any]", parts: tuple[Tensor, ...], stream: Tensor, residual: Tensor | None
) -> repeats.Function | None:
    """What tells in one compiled call that streams, and what edits them, are like these; or None,
    where there is no compiler, or nothing that notes all of the parts.
    """
    kinds = [
        next(kind for kind in type(edit).__mro__ if name in vars(kind))
        for name in ("made_of", "note_parts")
    ]
    if kinds[0] is not kinds[1]:
        return None
    if residual is not None and _kind(stream, None, 1)[1:] != _kind(residual, None, 1)[1:]:
        return None
    site = repeats.Site(parts=id(parts))
    site.held = [parts]
    guards = _guards(edit, parts, lambda part: True)
    if not repeats.see(stream, site.stream) or not guards.told(site):
        return None
    return repeats.bound("like", site)


_NO_ROWS = torch.zeros(0, 0, dtype=torch.float64)
_WRITING = threading.RLock()
"""Of threads that share a context one writes, or makes rows, at a time."""

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _alone(method: _Method) -> _Method:
    @functools.wraps(method)
    def call(*given: Any) -> Any:
        with _WRITING:
            return method(*given)

    return cast(_Method, call)


class _Rows:
    """A row of numbers for each application of an edit to a token, in the order of application.

    A pass only keeps what its solution stores; rows are made of many passes at once, or when they
    are read. Rows of one pass stand together, whatever threads share the context.

    Args:
        kept: whether to keep them; of rows that are not kept only the worst is, for its error.
        places: the columns of each quantity, one column or V.
        held: the rows so far.
    """

    def __init__(
        self,
        kept: bool = True,
        places: dict[str, slice | int] | None = None,
        held: Tensor | None = None,
    ) -> None:
        self.kept, self._places = kept, places or {}
        self._buffer, self._count = (_NO_ROWS, 0) if held is None else (held, len(held))
        self._passes: list[_Pass | _Block] = []
        self._waiting = 0
        # Whether all were written by compiled code on the CPU, which records no failure.
        self.sound = True

    def __len__(self) -> int:
        return self._count

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._buffer.device

    @property
    def nbytes(self) -> int:
        """What they take, with the room for more."""
        self._settle()
        return self._buffer.nbytes

    @_alone
    def clear(self) -> None:
        """Forget all rows; those that were given away stay as they are."""
        if not self._passes and not self._count:
            return
        self._close(self._passes)
        self._buffer, self._count = _NO_ROWS, 0
        self._passes, self._waiting, self.sound = [], 0, True

    @_alone
    def append(
        self, solution: Solution, index: Tensor, shown: Tensor | None, forward_pass: int
    ) -> None:
        """Add a row for each activation of a solution; none under ``vmap``, which hides them."""
        if not concrete(solution.status):
            return
        # The same solution without the activations, which would be the most of it.
        bare = object.__new__(type(solution))
        stored = vars(bare)
        stored.update(vars(solution), x_new=solution.status)
        if torch.is_grad_enabled() or in_transforms():
            for name, value in stored.items():
                if isinstance(value, Tensor):
                    stored[name] = unwrapped(value).detach()
        self.sound = False
        self._close(self._passes[-1:])
        self._passes.append(_Pass(bare, index, shown, forward_pass))
        self._waiting += len(index)
        if len(self._passes) >= WAITING or self._waiting >= WAITING_ROWS:
            self._settle()

    @_alone
    def room(self, count: int, device: torch.device, variables: int = 0) -> "_Block":
        """A block in which the next rows may be written, of a solution of so many variables: its
        ``count`` is to say so.
        """
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        last = self._passes[-1] if self._passes else None
        if type(last) is _Block and not captured and last.takes(count) and last.device == device:
            return last
        if not captured and (len(self._passes) >= WAITING or self._waiting >= WAITING_ROWS):
            self._settle()
        with torch.inference_mode(False):
            size = count if captured else max(BLOCK_ROWS, count)
            held = torch.empty(size, _width(variables), dtype=torch.float64, device=device)
            block = _Block(held, captured, 0 if captured else size, variables=variables)
        self._close(self._passes[-1:])
        self._passes.append(block)
        self._waiting += size
        self.sound = False
        return block

    @_alone
    def wrote_in(self, laid: Laid, table: Any, variables: int) -> None:
        """Note what one compiled call has written of a pass."""
        last = self._passes[-1] if self._passes else None
        if type(last) is not _Block or last.laid is not laid or last.site is not None:
            self._close(self._passes[-1:])
            last = _Block([], variables=variables, laid=laid)
            self._passes.append(last)
        last.rows.append(table)
        last.count += 1
        self._waiting += laid.n_rows
        if max(len(last.rows), len(self._passes)) >= WAITING or self._waiting >= WAITING_ROWS:
            self._settle()

    @_alone
    def room_at(self, site: repeats.Site, laid: Laid, variables: int) -> None:
        """Let compiled code write the rows of the next passes, which are like one before."""
        self._close(self._passes[-1:])
        passes, width = max(WAITING_ROWS // laid.n_rows, 1), _width(variables)
        site.room, site.row_of = min(passes, WAITING), width
        site.numbers = laid.n_rows * width
        rows = numbers_of(site.room * site.numbers)()
        site.record = ctypes.addressof(rows)
        site.held.append(rows)
        self._passes.append(_Block([rows], variables=variables, laid=laid, site=site))

    @_alone
    def leave(self, site: repeats.Site) -> None:
        """Let compiled code write no more at a site, which others will use."""
        for one in self._passes:
            if type(one) is _Block and one.site is site:
                one.count, one.site = site.used, None

    def __getstate__(self) -> dict[str, Any]:
        self._settle()  # memory that compiled code writes to is no copy's
        return dict(vars(self))

    @_alone
    def _settle(self) -> None:
        """Make rows of the passes that have none, up to one that a CUDA graph may yet repeat."""
        stays = next((i for i, one in enumerate(self._passes) if one.captured), len(self._passes))
        passes, self._passes = self._passes[:stays], self._passes[stays:]
        self._close(passes)
        self._waiting = 0
        if passes:
            self._append(self._made(passes))

    @staticmethod
    def _close(passes: "Sequence[_Pass | _Block]") -> None:
        """Let nothing more be written to passes that are settled, forgotten, or not the last."""
        for one in passes:
            if type(one) is _Block:
                one.size = 0
                if one.site is not None:
                    one.site.room = 0

    def _made(self, passes: "Sequence[_Pass | _Block]") -> Tensor:
        """The rows of some passes, (n, columns)."""
        # Rows may be added within inference mode, and read or added to outside of it.
        with outside_transforms(), torch.inference_mode(False), torch.no_grad():
            columns, device = [], passes[-1].device
            for kind, group in groupby(passes, type):
                if kind is _Block:
                    blocks = cast(list[_Block], list(group))
                    self._places = self._places or blocks[0].places
                    columns += [block.written.to(device) for block in blocks]
                    continue
                values, start = _values(cast(list[_Pass], list(group)), device), 0
                for name, value in values.items():
                    width = 1 if value.ndim == 1 else value.shape[1]
                    self._places[name] = start if value.ndim == 1 else slice(start, start + width)
                    start += width
                parts = [v if v.ndim == 2 else v.unsqueeze(1) for v in values.values()]
                columns.append(torch.cat(parts, 1))
            return torch.cat(columns)

    def _append(self, new: Tensor) -> None:
        with outside_transforms(), torch.inference_mode(False), torch.no_grad():
            if new.device != self.device or new.shape[1] != self._buffer.shape[1]:
                self._buffer, self._count = new.new_empty(0, new.shape[1]), 0
            if not self.kept:
                rows = torch.cat([self._buffer[: self._count], new])
                worst = rows[:, self._places["status"]].argmax(0, keepdim=True)
                new, self._count = rows.index_select(0, worst), 0
            end = self._count + len(new)
            if end > len(self._buffer):
                # By half of what is there, so that a pass costs the same however many came before.
                room = new.new_full((end + self._count // 2, new.shape[1]), -1.0)
                room[: self._count] = self._buffer[: self._count]
                self._buffer = room
            self._buffer[self._count : end] = new
            self._count = end

    @_alone
    def read(self, positions: Positions) -> "_Rows":
        """The rows of pairs that count, numbered as the positions are."""
        self._settle()
        held = self._buffer[: self._count]
        if self._passes:
            new = self._made(self._passes)
            held = torch.cat([held.reshape(-1, new.shape[1]).to(new.device), new])
        rows = _Rows(self.kept, self._places, held)
        if len(rows):
            index = rows.column("index").long()
            number = torch.where(index < 0, -1, positions.numbered(index.clamp_min(0)))
            if bool(((number != index) | (number < 0)).any()):
                held = held.clone()
                held[:, self._places["index"]] = number.to(held.dtype)
                rows = _Rows(self.kept, self._places, held[number >= 0])
        return rows

    def column(self, name: str) -> Tensor:
        """A quantity of all rows, (N,) or (N, V), float64."""
        if name not in self._places:
            raise LRQPError(f"this kind of edit records no {name!r}; it has {list(self._places)}")
        return self._buffer[: self._count, self._places[name]]

    def last(self, count: int, among: Tensor | None = None) -> "_Rows":
        """The last row of each of ``count`` positions that has one, among some of the rows."""
        if not self._count:
            return _Rows(True, self._places, self._buffer[:0])
        number = torch.arange(self._count, device=self.device)
        number = number if among is None else torch.where(among, number, -1)
        last = torch.full((count,), -1, device=self.device)
        last = last.scatter_reduce(0, self.column("index").long(), number, "amax")
        return _Rows(True, self._places, self._buffer[last[last >= 0]])


@dataclass
class _Pass:
    """What an edit stored in one pass, which no row has been made of yet."""

    solution: Solution  # as it was returned, without the activations
    index: Tensor  # which pairs its rows are, (n,)
    shown: Tensor | None  # which of them count, (n,) bool, or None
    number: int  # of the pass
    # Whether it is part of a CUDA graph, each replay of which writes it anew.
    captured: bool = False

    def __post_init__(self) -> None:
        self.captured = capturing(self.index)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.index.device


def _values(passes: Sequence[_Pass], device: torch.device) -> dict[str, Tensor]:
    """The columns of the rows of some passes: what they stored is put together before any of it is
    computed with, so that a pass costs a small part of an operation.
    """
    stored, kind = [vars(one.solution) for one in passes], type(passes[0].solution)
    solution = object.__new__(kind)
    for name, first in stored[0].items():
        parts = [own[name].to(device) for own in stored] if isinstance(first, Tensor) else None
        vars(solution)[name] = first if parts is None else torch.cat(parts)
    own = [field.name for field in fields(kind)[len(fields(Solution)) :]]
    status, index = solution.status, torch.cat([one.index.to(device) for one in passes])
    if any(one.shown is not None for one in passes):
        every = [
            torch.ones_like(one.index, dtype=torch.bool) if one.shown is None else one.shown
            for one in passes
        ]
        shown = torch.cat([part.to(device) for part in every])
        status = torch.where(shown, status, int(Status.SATISFIED))
        index = torch.where(shown, index, -1)
    numbers = torch.tensor([one.number for one in passes for _ in range(len(one.index))])
    return {
        **{name: getattr(solution, name) for name in (*RECORDED, *own)},
        "status": status,
        "index": index,
        "forward_pass": numbers.to(device, non_blocking=True),
    }


class _Launch:
    """A launch on a GPU, and all that has to be as it was when it is to be done again.

    Args:
        laid: the launch.
        parts, own: what the edit is made of; see :meth:`Edit.made_of`.
        at: the rows that it was of.
        kind: of the streams; see :func:`_kind`.
        block: where it was recorded.
        like: tells that these are still so, in one call; see :func:`_like`.
    """

    def __init__(
        self,
        laid: fused.Laid,
        parts: tuple[Tensor, ...],
        own: tuple[object, ...],
        at: Rows,
        kind: tuple[object, ...],
        block: "_Block",
        like: repeats.Function | None,
    ) -> None:
        self.like, self.alone, self.scale = like, len(kind) == _ALONE, kind[_ALONE - 1]
        self.laid, self.parts, self.own, self.at, self.kind = laid, parts, own, at, kind
        # A tensor that was made in inference mode does not count how often it was written to.
        self.block, self.counted = block, [part for part in parts if not part.is_inference()]
        self.marks = [*map(_PLACE, parts), *map(_COUNT, self.counted)]
        # Where numbers lie of which those of other rows are some.
        self.numbers = consecutive(1, at.example.device)
        self.begin, self.most = self.numbers.data_ptr(), len(self.numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a run launches by itself.
        return type(None), ()

    @staticmethod
    def of(
        laid: fused.Laid, run: EditRun, block: "_Block", rows: fused.StreamRows, at: Rows
    ) -> "_Launch | None":
        """That of an edit, or None where it is not to be done again."""
        made, index, shown = run.edit.made_of(), rows.index, at.shown
        asked = run.given.get("asked", 0.0)
        wishes = asked.values() if isinstance(asked, Mapping) else [asked]
        # What tensors hold may be something else for the next pass.
        numbers = all(isinstance(wish, float | int) for wish in wishes)
        if made is None or run.given.keys() - {"asked"} or not numbers:
            return None
        parts = tuple(part for part in made[0] if part is not None)
        plain = all(type(one) is Tensor for one in (rows.stream, rows.residual) if one is not None)
        simple = index.dtype == torch.int64 and index.is_contiguous()
        simple = simple and (shown is None or (shown.dtype == torch.bool and shown.is_contiguous()))
        if len(parts) < len(made[0]) or not plain or not simple:
            return None
        kind = _kind(rows.stream, rows.residual, rows.scale)
        like = _like(run.edit, parts, rows.stream, rows.residual)
        return _Launch(laid, parts, made[1], at, kind, block, like)

    def again(
        self,
        run: EditRun,
        stream: Tensor,
        residual: Tensor | None,
        scale: float,
        at: Rows,
        forward_pass: int,
    ) -> Tensor | None:
        """:meth:`EditRun.edit_stream` by the same launch; None where that does not do."""
        if not at.is_like(self.at) or _transforms() is not None:
            return None
        if self.like is None:
            if not self._is_like(run.edit, stream, residual, scale):
                return None
        elif (
            scale != self.scale
            or (residual is None) != self.alone
            or self.like(stream, residual) is None
        ):
            return None
        block, first, index = self.block, at.numbers, None
        count = self.laid.count
        if not isinstance(first, Tensor):
            if first + count > self.most:
                return None
            index = self.begin + 8 * first
        with _WRITING:
            if not block.takes(count) or capturing(stream):
                block = self.block = run._rows.room(count, stream.device, len(run.names))
            record = block.rows, block.count, forward_pass
            whole = self.laid.again(stream, residual, index, at.shown, record)
            if whole is None:
                return None
            block.count += count
        run._dtype = whole.dtype
        return whole

    def _is_like(
        self, edit: "Edit[Any]", stream: Tensor, residual: Tensor | None, scale: float
    ) -> bool:
        """What :attr:`like` tells, where that is not to be had."""
        parts, own = edit.made_of() or ((), ())
        if own != self.own or not all(map(operator.is_, parts, self.parts)):
            return False
        if [*map(_PLACE, self.parts), *map(_COUNT, self.counted)] != self.marks:
            return False
        if _kind(stream, residual, scale) != self.kind or forward_ad._current_level >= 0:
            return False
        given = (stream, *self.parts) if residual is None else (stream, residual, *self.parts)
        return not (torch.is_grad_enabled() and any(part.requires_grad for part in given))


# Functions of C, which a list of tensors goes through without a frame of Python.
_transforms = torch._C._functorch.peek_interpreter_stack
_ALONE = 6
"""So many entries has :func:`_kind` of one stream; the last is its scale."""
_PLACE, _COUNT = Tensor.data_ptr, operator.attrgetter("_version")


def _kind(stream: Tensor, residual: Tensor | None, scale: float) -> tuple[object, ...]:
    """What streams have in common that one launch serves."""
    own = type(stream), stream.dtype, stream.shape, stream.stride(), stream.get_device(), scale
    if residual is None:
        return own
    given = type(residual), residual.dtype, residual.shape, residual.stride()
    return *own, *given, residual.get_device()


@dataclass
class _Block:
    """Rows that a kernel writes by itself, those of one pass after another."""

    rows: Any  # (n, 9); or memory of compiled code for those of each pass
    captured: bool = False  # as of a `_Pass`
    size: int = 0  # how many may be written, of a tensor
    count: int = 0  # how many are; of memory of compiled code how many passes
    variables: int = 0  # how many variables odds are of, 0 for one edit's own
    laid: Laid | None = None  # what compiled code was told
    site: repeats.Site | None = None  # what writes them pass by pass, and says how many

    @property
    def places(self) -> dict[str, slice | int]:
        """The columns of each quantity, as :func:`_values` orders them."""
        if not self.variables:
            return {name: i for i, name in enumerate(_WRITTEN)}
        places: dict[str, slice | int] = {}
        start = 0
        for name in (*RECORDED, "moved", *_WRITTEN[len(RECORDED) :]):
            wide = name in (*RECORDED[:3], "moved")
            places[name] = slice(start, start + self.variables) if wide else start
            start += self.variables if wide else 1
        return places

    @property
    def written(self) -> Tensor:
        """Those that are written."""
        if isinstance(self.rows, Tensor):
            return self.rows[: self.count]
        assert self.laid is not None
        rows = torch.cat([torch.frombuffer(one, dtype=torch.float64) for one in self.rows])
        rows = rows.reshape(-1, _width(self.variables))
        return rows[: (self.count if self.site is None else self.site.used) * self.laid.n_rows]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.rows.device if isinstance(self.rows, Tensor) else _CPU

    def takes(self, more: int) -> bool:
        """Whether so many more have room in it."""
        return self.count + more <= self.size


_WRITTEN = (*RECORDED, "status", "index", "forward_pass")
_CPU = torch.device("cpu")


def _width(variables: int) -> int:
    """How many numbers a row has."""
    return 4 * variables + 6 if variables else len(_WRITTEN)


BLOCK_ROWS = 512
"""So many rows a block has room for, or those of one pass."""
MOST_KEPT = 64
"""So many sites are kept of one edit for contexts that may follow."""
WAITING, WAITING_ROWS = 64, 4096
"""So many passes, or rows, wait at most until rows are made of them together."""

_COLUMNS = ("pass", "tokens", "columns", "edited", "log odds before", "after", "distance")


def summarise(steps: Sequence[Step]) -> str:
    """A table of steps, one line each, in medians over tokens (log odds in nats)."""

    def median(values: Tensor) -> float:
        return float(torch.nanmedian(values))

    rows: list[tuple[str, ...]] = [_COLUMNS]
    for step in steps:
        first, last = int(step.token.min()), int(step.token.max())
        cells = (
            str(step.forward_pass),
            str(len(step)),
            str(first) if first == last else f"{first}-{last}",
            str(int((step.status == Status.SOLVED).sum())),
            f"{median(step.log_odds_before):.2f}",
            f"{median(step.log_odds_after):.2f}",
            f"{median(step.distance):.3f}",
        )
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def floors_of(asked: Any, rows: EditContext | Rows | fused.StreamRows) -> Tensor:
    """The log α of the rows that an edit is given in a model, of one for all or one an example."""
    floors = torch.as_tensor(asked, device=rows.example.device).double()
    which = rows.example if rows.request is None else rows.request
    return floors[which] if floors.ndim else floors


def _chosen(classes: Tensor, which: Tensor) -> Tensor:
    """The classes of some rows; one of a scope may stand for all."""
    return classes[which] if len(classes) != 1 else classes.expand(len(which), *classes.shape[1:])
