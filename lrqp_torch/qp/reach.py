"""The one loop of every exact edit: aim, solve, read back what is held, raise the floor.

What is solved in float64 is stored in the stream's dtype, and rounding moves what a probe reads. So
each edit is read back as it will be stored; where it fell short of its floor, it is solved again
for a higher one, alone, without those that are done. The last round aims by a proven bound.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrqp_torch.errors import readable

Realise = Callable[[Tensor], Tensor]
"""Maps float64 activations to the values that the model will really hold, in float64."""

Rows = Tensor | None
"""Which examples of the batch, (n,) integer; None: all of them."""

# Half an ulp in each coordinate is nothing in the finer dtypes and may be taken off in advance; in
# half precision all of it together would be a large part of the edit.
FINE = 1e-5
# Rounds of solving and reading back. Where values can be looked at, until nothing is missing: three
# or four are usual in half precision, and the bound only guards against a loop without end.
MAX_ROUNDS = 24
# The last round aims by so many times what is missing: in the finer dtypes that is the reading's
# own rounding, which is another at every x' and so small that many times it is nothing.
MANY_TIMES, SOME_TIMES = 64, 4
# By duality an edit with multipliers λ and readings r has a square that is at most λᵀ(r − floors)
# above that of the least. It counts as the least where that is below this share of its own, or
# readings above their floors are what so many times the rounding of the stream explains.
LONGER, ROOM = 1e-3, 4.0
# An aim out of reach that is no further than so many nats above its floor says that this is.
NEAR = 1e-3
# Where they cannot (a CUDA graph, a transform), always so many; the last aims by the proven bound.
BLIND_ROUNDS_FINE, BLIND_ROUNDS_COARSE = 4, 5


def advance(precision: float, width: int) -> float:
    """How far above its floor a reading is aimed at first, as a share of ‖a‖ ‖x‖ + its rise.

    Half an ulp in each coordinate moves a reading by at most ½ ε ‖a‖ ‖x'‖. In half precision that
    is far more than it does: d errors that know nothing of each other add up to some
    0.2 ε ‖a‖ ‖x'‖ / √d, and 2.5 times that leaves few to be solved again.
    """
    return 2 * precision if precision < FINE else 0.5 * precision / width**0.5


@dataclass(frozen=True)
class Headroom:
    """What rounding to a dtype can take off what is read from some activations."""

    precision: float  # ε of the dtype
    length: Tensor  # ‖a‖ of each constraint, (B, m): no reading changes faster than by ‖a‖ ‖Δx‖
    size: Tensor  # ‖x‖, (B, 1)
    width: int  # d

    @classmethod
    def of(cls, x: Tensor, length: Tensor) -> "Headroom":
        """That of activations x, (B, d), in their own dtype."""
        return cls(torch.finfo(x.dtype).eps, length.detach(), sizes(x), x.shape[-1])

    def rows(self, rows: Rows) -> "Headroom":
        """That of some of the examples."""
        if rows is None:
            return self
        return Headroom(self.precision, self.length[rows], self.size[rows], self.width)

    def in_advance(self, rise: Tensor) -> Tensor:
        """How much to aim above the floors in the first round, (B, m); see :func:`advance`.

        Args:
            rise: by how much the readings must rise, or a bound on it such as the floor, (B, m)
                or (B, 1).
        """
        share = advance(self.precision, self.width)
        return share * (self.length * self.size + rise.detach().abs())

    def after_missing(self, raised: Tensor, short: Tensor, edited: Tensor, attempt: int) -> Tensor:
        """How much to aim above them after a round that left readings ``short``, (B, m)."""
        # Less than about one coordinate's rounding error would leave the rounded x' as it was.
        size = sizes(edited)
        nudge = self.precision * self.length * torch.maximum(self.size, size) / self.width**0.5
        return raised + torch.where(short > 0, 2 * short + (attempt + 1) * nudge, 0.0)

    def proven(self, raised: Tensor, short: Tensor, edited: Tensor, held: Tensor) -> Tensor:
        """The same by a bound on the rounding of x' itself, which the next round cannot miss.

        ‖a‖ ε ‖x'‖ is twice the bound for a rounding to nearest. Where the stream holds x' as a
        sum, what it rounds by is seen in ``held``, and four times that covers each half ulp. All
        constraints of an example aim higher, because raising one moves the others; and by some
        times what is missing from any, which may be rounding of the solve and not of x'.
        """
        size = sizes(edited)
        error = torch.linalg.vector_norm(held.double() - edited, dim=-1, keepdim=True)
        enough = self.length * torch.maximum(self.precision * size, 4 * error)
        worst = short.amax(-1, keepdim=True)
        times = MANY_TIMES if self.precision < FINE else SOME_TIMES
        return torch.where(worst > 0, torch.maximum(raised + times * worst, enough), raised)


def excess(
    gap: Tensor,
    reach: Tensor,
    squared: Tensor,
    headroom: Headroom,
    x: Tensor,
    edited: Tensor,
    hold: Callable[[Tensor], Tensor],
) -> Tensor:
    """By how much more of its squared length than rounding explains an edit may be longer than the
    least, (B,): 0 where it is the least.

    Args:
        gap: λᵀ(r − floors), (B,).
        reach: how fast λᵀr changes with x' at most, Σ λ_i ‖a_i‖, (B,).
        squared: λᵀMλ, (B,).
        headroom: of the activations.
        x, edited: before, and after but not rounded, (B, d).
        hold: what is held of the edited ones, float64.
    """
    tiny = torch.finfo(torch.float64).tiny
    gap, reach = (part / squared.clamp_min(tiny) for part in (gap, reach))
    if readable(gap) and not bool((gap > LONGER).any()):
        return torch.zeros_like(gap)
    edited, x = edited.double(), x.double()
    error, size = sizes(hold(edited) - edited), sizes(edited).clamp_min(tiny)
    share = (4 * error / size).clamp_min(headroom.precision)
    # An edit that rounding made far too long does not excuse itself by its own length.
    least = headroom.size + (1 - gap).clamp_min(0.0).unsqueeze(-1) * sizes(edited - x)
    found: Tensor = gap - ROOM * reach * (share * least).squeeze(-1) - LONGER
    return found.clamp_min(0.0)


def sizes(x: Tensor) -> Tensor:
    """‖x‖ of activations, (B, 1), float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm
    size: Tensor = norm(x.detach(), dim=-1, keepdim=True, dtype=dtype).double()
    if readable(x) and not bool(torch.isfinite(size.sum())):
        # The squares overflowed.
        size = norm(x.detach().double(), dim=-1, keepdim=True)
    return size


@dataclass(frozen=True)
class Attempt:
    """What one round found for some examples."""

    edited: Tensor  # x' as it was solved for, (n, d), float64 or as precise as the stream
    # False where it is of no use to ask again: the solver found no way, (n,) bool.
    open: Tensor
    # Whatever else belongs to the solution; the first dimension of each is n.
    found: tuple[Tensor, ...] = ()
    feasible: Tensor | None = None  # False where no activation reaches the aims, (n,) bool

    @property
    def reaches(self) -> Tensor:
        """Whose aims are in reach, (n,) bool."""
        return torch.ones_like(self.open) if self.feasible is None else self.feasible

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that it is made of; the first dimension of each is n."""
        own = () if self.feasible is None else (self.feasible,)
        return self.edited, self.open, *own, *self.found

    def of(self, parts: Sequence[Tensor]) -> "Attempt":
        """One made of other parts."""
        edited, opened, *found = parts
        feasible = None if self.feasible is None else found.pop(0)
        return Attempt(edited.to(self.edited.dtype), opened, tuple(found), feasible)

    def replaced(self, rows: Tensor, other: "Attempt") -> "Attempt":
        """The same with some examples from another attempt, at those alone."""
        pairs = zip(self.parts, other.parts, strict=True)
        return self.of([old.index_copy(0, rows, new.to(old.dtype)) for old, new in pairs])

    def where(self, mine: Tensor, other: "Attempt") -> "Attempt":
        """The same where ``mine``, (n,) bool, and another attempt elsewhere."""
        pairs = zip(self.parts, other.parts, strict=True)
        return self.of(
            [
                torch.where(mine.view(-1, *[1] * (own.ndim - 1)), own, rest.to(own.dtype))
                for own, rest in pairs
            ]
        )


Step = Callable[[Tensor, Rows], Attempt]
"""Solves some examples for the floors, (n, m), that are aimed at; differentiable."""

Read = Callable[[Tensor, Rows], Tensor]
"""What is read from activations of some examples, (n, d), as they are held: (n, m)."""


def reach(
    floor: Tensor,
    needed: Tensor,
    headroom: Headroom,
    step: Step,
    read: Read,
    *,
    dtype: torch.dtype,
    realise: Realise | None = None,
    raised: Tensor | None = None,
    rounds: int = MAX_ROUNDS,
) -> tuple[Attempt, Tensor]:
    """Solve until what is read from the realised activations is at its floor.

    Where values can be looked at, only the examples that fell short are solved again. Where they
    cannot, all are, in a fixed number of rounds. An example that is not ``needed`` or not open
    is never short. Where an aim is out of reach, the one before counts, at first the floor
    itself, and is raised once more by no more than what is missing.

    Args:
        floor: what is promised, (B, 1) or (B, m).
        needed: which examples are to be edited, (B,) bool.
        headroom: what rounding can take off.
        step: one solve.
        read: one reading.
        dtype: of the stream.
        realise: what the model will hold when all x' are put in place; default: x' in ``dtype``.
        raised: how far above the floors to aim first, (B, m); default ``headroom.in_advance``.
        rounds: at most, where values can be looked at.

    Returns:
        The last attempt at each example, and what was read back from it, (B, m).
    """
    looking, rows = readable(needed), None
    if not looking:
        rounds = BLIND_ROUNDS_FINE if headroom.precision < FINE else BLIND_ROUNDS_COARSE
    raised = headroom.in_advance(floor) if raised is None else raised
    total = attempt = step(floor + raised, None)
    after = torch.empty_like(raised)
    # How often an aim was out of reach.
    failed, some = torch.zeros_like(needed, dtype=torch.long), _some_fail(attempt, looking)
    if some:
        failed = torch.where(attempt.reaches, 0, 1 + (raised.amax(-1) <= NEAR).long())
    for number in range(rounds):
        with torch.no_grad():
            edited = attempt.edited.detach()
            held = edited.to(dtype) if realise is None else at(realise(total.edited), rows)
            seen = read(held, rows).detach()
            after = seen if rows is None else after.index_copy(0, rows, seen)
            if looking and rows is None and bool((seen >= floor).all()):
                break
            # An edit that exceeds what the stream's dtype can hold reads infinity or NaN.
            wanted = at(needed & (failed < 2), rows) & attempt.open
            lost = wanted & ~attempt.reaches if some else torch.zeros_like(wanted)
            wanted = (wanted & ~lost).unsqueeze(-1) & torch.isfinite(seen)
            short = torch.where(wanted, (at(floor, rows).detach() - seen).clamp_min(0.0), 0.0)
            if number + 1 == rounds:
                break
            if looking:
                behind = (short.amax(-1) + lost).nonzero().squeeze(-1)
                if not len(behind) and rows is not None:
                    # All together once more, since a product rounds by what it is computed with.
                    rows, attempt = None, total
                    continue
                if not len(behind):
                    break
                rows = behind if rows is None else rows[behind]
                short, edited, held = short[behind], edited[behind], held[behind]
                lost = lost[behind]
            room, last = headroom.rows(rows), at(raised, rows)
            if number + 2 == rounds:
                aim = room.proven(last, short, edited, held)
            else:
                aim = room.after_missing(last, short, edited, number)
            if some:
                little = (at(failed, rows) > 0).unsqueeze(-1)
                aim = torch.where(little, last + 2 * short, aim)
                last, aim = (torch.where(lost.unsqueeze(-1), 0.0, part) for part in (last, aim))
        attempt = step(at(floor, rows) + aim, rows)
        if _some_fail(attempt, looking):
            some, before = True, total
            if rows is not None:
                before = total.of([part[rows] for part in total.parts])
            beyond = at(needed, rows) & ~attempt.reaches
            failed = failed + beyond if rows is None else failed.index_add(0, rows, beyond.long())
            aim = torch.where(beyond.unsqueeze(-1), last, aim)
            attempt = attempt.where(~(beyond & before.reaches), before)
        total = attempt if rows is None else total.replaced(rows, attempt)
        raised = aim if rows is None else raised.index_copy(0, rows, aim)
    return total, after


def _some_fail(attempt: Attempt, looking: bool) -> bool:
    """Whether some aims are, or where nobody looks may be, out of reach."""
    feasible = attempt.feasible
    return feasible is not None and not (looking and bool(feasible.all()))


def at(values: Tensor, rows: Rows) -> Tensor:
    """The values of some examples."""
    return values if rows is None else values[rows]
