"""The operator that edits vLLM's residual stream: what each row is asked, and what came of it.

Between two steps the tables of a rank are told which rows of the next batch are to be edited: the
step says which tokens of which requests are in it, and the device says at which position each row
is, since with asynchronous scheduling and speculation only the device knows. Within the step one
operator a site, ``lrqp::edit_``, edits the rows that the tables name, in place. It has static
shapes and asks the host nothing on a GPU, so it lives in compiled graphs and in CUDA graphs; it
takes no part in communication, since all ranks of a tensor parallel group hold the same stream and
are told the same. After the step the tables have a certificate for each edited row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrqp_torch.edits.joint import JointLRQP
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import ServingError, capturing
from lrqp_torch.qp import Solution, Status
from lrqp_torch.qp.fused import MOST_CLASSES
from lrqp_torch.qp.stacked import FREE
from lrqp_torch.serving.requests import NamedEdit, RequestEdit
from lrqp_torch.stream.sites import Site

OWN = FREE
"""A source class that is the probe's own reading."""
# Columns of what is asked of a row: number of the request in the step, edit, place of the request
# in the batch, its position or −1, which of the request's rows in the step, and the scope's bounds.
ASKED = 7
# Columns of what came of it: number of the request, edit, position; then of the certificate.
CAME, CERTIFICATE = 3, 2


@dataclass(frozen=True)
class Scheduled:
    """Tokens of a request with edits that a step runs."""

    request: str  # its name
    edits: tuple[RequestEdit, ...]  # what it asks for
    start: int  # the first of the tokens, or later, as far as the host knows
    count: int  # how many they are, at most


@dataclass(eq=False)
class Tables:
    """What is asked of each row of a batch, by edit, and what came of it; never moved in memory."""

    edits: Mapping[str, NamedEdit]  # by name; the number of an edit is its place here
    rows: int  # the most that a batch has
    device: torch.device  # of the model
    slack: int = 0  # by how many tokens the device may be behind what the host knows of a request
    # Numbers of the edits at each site that this rank has, by its name.
    local: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = list(self.edits.values())
        self.applied = [item.edit.to(self.device) for item in self.named]
        # No edit of a server changes, so what a look would find is found once.
        self.geometries = [edit.geometry(self.device) for edit in self.applied]
        # Edits that look at values while they solve cannot be recorded as a CUDA graph.
        self.looking = [
            isinstance(edit, LRQP) and edit.n_classes > MOST_CLASSES for edit in self.applied
        ]
        self.number = {item.name: place for place, item in enumerate(self.named)}
        self.variables = max(len(item.parts) for item in self.named)
        here = len(self.named), self.rows + 1  # the last row takes what is for none
        self.shown = torch.zeros(here, dtype=torch.bool, device=self.device)
        self.target = torch.full((*here, self.variables), FREE, device=self.device)
        self.source = torch.full((*here, self.variables), OWN, device=self.device)
        width = CERTIFICATE + 3 * self.variables
        self.certificate = torch.zeros(*here, width, dtype=torch.float64, device=self.device)
        self.busy = False
        self.asked: tuple[Tensor, Tensor, Tensor] | None = None

    def arm(self, sites: Iterable[Site]) -> None:
        """Say which sites this rank has, by the names of :attr:`NamedEdit.stream`."""
        self.local = {
            str(site): [n for n, item in enumerate(self.named) if item.stream == site]
            for site in sites
        }

    def place(
        self,
        step: Sequence[Scheduled],
        batch: Sequence[str],
        starts: Tensor,
        positions: Tensor,
    ) -> None:
        """Tell the rows of the next batch what is asked of them.

        Args:
            step: the requests with edits that are in it.
            batch: names of all requests, in the order of their rows.
            starts: the first row of each, and behind the last, (B + 1,), on the device.
            positions: of each row in its request, (N,), on the device.
        """
        self.clear()
        where = {request: place for place, request in enumerate(batch)}
        here = {number for numbers in self.local.values() for number in numbers}
        items = [
            self._items(number, where[item.request], item, edit)
            for number, item in enumerate(step)
            for edit in item.edits
            if self.number[edit.edit] in here and item.request in where
        ]
        items = [part for part in items if len(part)]
        if not items:
            return
        table = torch.from_numpy(np.concatenate(items))
        if self.device.type != "cpu":
            table = table.pin_memory().to(self.device, non_blocking=True)
        edit, place, at, offset, lo, hi = table[:, 1:ASKED].unbind(1)
        first = starts.long()[place]
        behind = starts.long()[place + 1]
        start = positions.long()[first.clamp(max=len(positions) - 1)]
        at = torch.where(at >= 0, at, start + offset)
        row = first + at - start
        valid = (at >= lo) & (at < hi) & (row >= first) & (row < behind)
        row = torch.where(valid, row, self.rows)
        classes = table[:, ASKED:].view(len(table), 2, self.variables)
        self.shown[edit, row] = valid
        self.target[edit, row] = classes[:, 0]
        self.source[edit, row] = classes[:, 1]
        self.asked = torch.stack([table[:, 0], edit, at], 1), row, valid
        self.busy = True

    def _items(self, number: int, place: int, item: Scheduled, edit: RequestEdit) -> np.ndarray:
        """What an edit asks of a request's rows in a step, one a row, (n, ASKED + 2 V)."""
        end = item.start + item.count
        if edit.positions is None:
            offsets = np.arange(item.count)
            offsets = (
                offsets if edit.lo < end and edit.hi > item.start - self.slack else offsets[:0]
            )
            at, which = np.full(len(offsets), -1), [0] * len(offsets)
        else:
            which = [n for n, p in enumerate(edit.positions) if item.start - self.slack <= p < end]
            at = np.array([edit.positions[n] for n in which], dtype=np.int64)
            offsets = np.zeros(len(which), dtype=np.int64)
        table = np.full((len(at), ASKED + 2 * self.variables), FREE, dtype=np.int64)
        if not len(at):
            return table
        table[:, 0], table[:, 1], table[:, 2] = number, self.number[edit.edit], place
        table[:, 3], table[:, 4], table[:, 5], table[:, 6] = at, offsets, edit.lo, edit.hi
        for kind, values in enumerate((edit.targets, edit.sources)):
            columns = np.asarray(values, dtype=np.int64).reshape(-1, edit.variables)
            first = ASKED + kind * self.variables
            table[:, first : first + edit.variables] = columns[which]
        return table

    def collect(self) -> Tensor | None:
        """What came of the rows that were asked, (n, 3 + …) float64; None if none was.

        Columns are the number of the request in the step, the edit, the position, and the
        certificate: status, distance, and of each variable log odds before, after, and asked for.
        """
        if self.asked is None:
            return None
        (which, row, valid), self.asked = self.asked, None
        came = self.certificate[which[:, 1], row]
        # What was for no row is left to whoever reads this: its position is −1.
        which = torch.where(valid.unsqueeze(1), which, -1)
        found = torch.cat([which.double(), came], 1)
        self.clear()
        return found

    def clear(self) -> None:
        """Ask nothing of any row."""
        if self.busy:
            self.shown.fill_(False)
            self.target.fill_(FREE)
            self.source.fill_(OWN)
            self.busy, self.asked = False, None

    def apply(self, x: Tensor, residual: Tensor | None, site: str) -> None:
        """Edit the rows that are asked for at a site, in place; the stream is x, or x + residual.

        Where it is a sum, x' becomes the residual and x becomes 0: so the sum is x' exactly.
        """
        on_host = x.device.type == "cpu"
        if not self.busy and (on_host or not capturing(x)):
            return
        if len(x) > self.rows:
            raise ServingError(f"a batch of {len(x)} rows, and edits were armed for {self.rows}")
        for number in self.local[site]:
            if on_host or self.looking[number]:
                self.gathered(number, x, residual)
            else:
                self.everywhere(number, x, residual)

    def rehearse(self, dtype: torch.dtype) -> None:
        """Edit once where nothing is compiled later, as a CUDA graph is recorded, that could be."""
        for number, item in enumerate(self.named):
            x = torch.zeros(16, item.edit.metric.width, dtype=dtype, device=self.device)
            if x.is_cuda and not self.looking[number]:
                self.everywhere(number, x, torch.zeros_like(x))
            else:
                self.gathered(number, x, None)

    def gathered(self, number: int, x: Tensor, residual: Tensor | None) -> None:
        """Edit rows after a look at which they are."""
        rows = self.shown[number, : len(x)].nonzero().squeeze(-1)
        if not len(rows):
            return
        stream = x[rows] if residual is None else x[rows] + residual[rows]
        asked = self.target[number, rows], self.source[number, rows]
        edited, certificate = _solved(self.applied[number], stream, *asked)
        self.certificate[number, rows] = certificate
        changed = (edited != stream).any(-1)
        rows, edited = rows[changed], edited[changed]
        (x if residual is None else residual).index_copy_(0, rows, edited)
        if residual is not None:
            x.index_fill_(0, rows, 0)

    def everywhere(self, number: int, x: Tensor, residual: Tensor | None) -> None:
        """Edit all rows, and keep those that are asked for: the same operations in every step."""
        shown = self.shown[number, : len(x)]
        stream = x if residual is None else x + residual
        asked = self.target[number, : len(x)], self.source[number, : len(x)]
        edit, geometry = self.applied[number], self.geometries[number]
        edited, certificate = _proposed(edit, geometry, stream, *asked, shown)
        self.certificate[number, : len(x)] = certificate
        changed = ((edited != stream).any(-1) & shown).unsqueeze(-1)
        if residual is None:
            x.copy_(torch.where(changed, edited, x))
        else:
            residual.copy_(torch.where(changed, edited, residual))
            x.copy_(torch.where(changed, 0, x))


def _solved(
    edit: LRQP | JointLRQP, x: Tensor, target: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    """Edited rows and their certificates, where values can be looked at; nothing raises.

    Args:
        edit: what to apply.
        x: activations, (n, d).
        target, source: classes, (n, V).
    """
    finite = torch.isfinite(x).all(-1)
    if not bool(finite.all()):
        edited = x.clone()
        certificate = x.new_full((len(x), CERTIFICATE + 3 * target.shape[1]), torch.nan).double()
        certificate[:, 0] = int(Status.INVALID)
        if bool(finite.any()):
            found = _solved(edit, x[finite], target[finite], source[finite])
            edited[finite], certificate[finite] = found
        return edited, certificate
    if isinstance(edit, JointLRQP):
        wide = len(edit.names)
        solution: Solution = edit.propose(x, target[:, :wide], source[:, :wide])
        return solution.x_new, _certificate(solution, target.shape[1])
    own = source[:, 0] < 0
    if bool(own.any()) and not bool(own.all()):
        edited, parts = torch.empty_like(x), []
        for rows in (own, ~own):
            edited[rows], part = _solved(edit, x[rows], target[rows], source[rows])
            parts.append((rows, part))
        certificate = parts[0][1].new_empty(len(x), parts[0][1].shape[1])
        for rows, part in parts:
            certificate[rows] = part
        return edited, certificate
    solution = edit.propose(x, target[:, 0], None if bool(own.all()) else source[:, 0])
    return solution.x_new, _certificate(solution, target.shape[1])


def _proposed(
    edit: LRQP | JointLRQP,
    geometry: Any,
    x: Tensor,
    target: Tensor,
    source: Tensor,
    shown: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same of all rows, of which those ``shown`` count, without a look at any value."""
    if isinstance(edit, JointLRQP):
        wide = len(edit.names)
        solution: Solution = edit.propose(x, target[:, :wide], source[:, :wide])
        return solution.x_new, _certificate(solution, target.shape[1])
    classes = torch.where(shown, target[:, 0], 0)
    asked = None
    if edit.rule == "mirror":
        # Some rows have a source and others their own reading, which no class stands for.
        margins = geometry.margins(x, classes)
        asked = edit.floors(margins, classes, source[:, 0], sufficient=False)
    if x.is_cuda:
        # The kernel leaves a row alone whose class is out of range.
        classes = torch.where(shown, classes, -1)
    solution = edit.propose(x, classes, asked=asked)
    return solution.x_new, _certificate(solution, target.shape[1])


def _certificate(solution: Solution, variables: int) -> Tensor:
    """Status, distance, and of each variable log odds before, after and asked for, float64."""
    odds = solution.log_odds_before, solution.log_odds_after, solution.floor
    columns = [solution.status.double().unsqueeze(-1), solution.distance.double().unsqueeze(-1)]
    for values in odds:
        values = values.double().reshape(len(values), -1)
        missing = variables - values.shape[1]
        columns.append(torch.nn.functional.pad(values, (0, missing), value=torch.nan))
    return torch.cat(columns, 1)


ACTIVE: list[Tables] = []
"""The tables of the engine whose step is under way in this process, if there is one."""


def activate(tables: Tables) -> None:
    """Let the operator act by these tables."""
    ACTIVE[:] = [tables]


def _edit(x: Tensor, residual: Tensor | None, site: str) -> None:
    ACTIVE[0].apply(x, residual, site)


def _nothing(x: Tensor, residual: Tensor | None, site: str) -> None:
    """What a graph is told of it: no output."""


def define() -> None:
    """Make the operator known to torch, once."""
    if LIBRARY:
        return
    library = torch.library.Library("lrqp", "DEF")
    library.define("edit_(Tensor(a!) x, Tensor(b!)? residual, str site) -> ()")
    library.impl("edit_", _edit, "CompositeExplicitAutograd")
    library._register_fake("edit_", _nothing)
    LIBRARY.append(library)


LIBRARY: list[torch.library.Library] = []
