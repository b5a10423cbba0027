"""This process among the others of a run: its share of the work, and exchange of what it found."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrqp_torch.errors import LRQPError, RankError, ToldError

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)
Module = TypeVar("Module", bound=nn.Module)
Summed = TypeVar("Summed", covariant=True)


class Mergeable(Protocol[Summed]):
    """What can be summed over the ranks, such as a :class:`~lrqp_torch.Covariance`."""

    def over(self, ranks: "Ranks", /) -> Summed:
        """The sum over all ranks, merged in rank order, on every rank."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ``size`` of a run; by default a run of one process.

    All ranks must call the same methods in the same order; with one rank each returns at once, so
    callers need no branches.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        owned: whether :meth:`leave` ends the process group.
    """

    rank: int = 0
    size: int = 1
    owned: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and speaks."""
        return self.rank == 0

    @property
    def turns(self) -> slice:
        """This rank's items of any sequence, dealt out in turn: rank, rank + size, …"""
        return slice(self.rank, None, self.size)

    def share(self, n: int) -> range:
        """This rank's rows of n: consecutive, in rank order; the lengths differ by at most one."""
        least, longer = divmod(n, self.size)
        start = self.rank * least + min(self.rank, longer)
        return range(start, start + least + (self.rank < longer))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on every rank. They are pickled.

        Raises:
            RankError: another rank has gone.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with contact("gathering"):
            dist.all_gather_object(found, value)
        return found

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank. It is pickled."""
        if self.size == 1:
            return value
        found = [value if self.is_main else None]
        with contact("waiting for rank 0"):
            dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def exchange(self, found: Mapping[Key, T], error: LRQPError | None = None) -> dict[Key, T]:
        """What all ranks found, merged in rank order, on every rank.

        Args:
            found: what this rank found.
            error: why it found nothing.

        Raises:
            LRQPError: the error given, if this is the first rank that gave one.
            ToldError: the first rank that gave an error is another one.
        """
        gathered = self.gather((dict(found), None if error is None else str(error)))
        failed = [rank for rank, (_, message) in enumerate(gathered) if message is not None]
        if failed and error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise ToldError(f"rank {failed[0]}: {gathered[failed[0]][1]}")
        return {key: value for part, _ in gathered for key, value in part.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without exchanges that fails on every rank if it fails on one.

        Raises:
            LRQPError: what the block raised, on the first rank where it did.
            ToldError: on the others.
        """
        error = None
        try:
            yield
        except LRQPError as caught:
            error = caught
        self.exchange({}, error)

    def agree(self, values: Mapping[str, object]) -> None:
        """Check that named values are the same on every rank, as prompts and weights must be.

        Raises:
            RankError: the first that is not.
        """
        for name, value in values.items():
            found = self.gather(value)
            for rank, other in enumerate(found):
                if other != found[0]:
                    raise RankError(
                        f"{name} differ among the ranks: {found[0]!r} on rank 0, {other!r} on rank "
                        f"{rank}; give every rank the same files, versions and settings"
                    )

    def divide(
        self,
        work: Sequence[T],
        make: Callable[[list[T]], Mapping[Key, Module]],
        device: torch.device | str,
    ) -> dict[Key, Module]:
        """Let each rank make some modules, such as probes; all of them on every rank.

        Args:
            work: what there is to do, the same on every rank; dealt out in turn.
            make: does some of it and gives its modules by name; not called without any.
            device: where the modules are to be.

        Raises:
            LRQPError: what ``make`` raised, on the first rank where it did.
            ToldError: on the others.
        """
        mine = list(work)[self.turns]
        if self.size == 1:
            return dict(make(mine))
        made: dict[Key, Module] = {}
        error = None
        try:
            # A module of this rank's device would be unpickled there.
            made = {key: module.cpu() for key, module in make(mine).items()} if mine else {}
        except LRQPError as caught:
            error = caught
        return {key: module.to(device) for key, module in self.exchange(made, error).items()}

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, with the same bits on every rank."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous().clone()
        with contact("summing"):
            # An all-reduce need not give every rank the same bits.
            dist.reduce(tensor, dst=0)
            dist.broadcast(tensor, src=0)
        return tensor

    def gather_rows(self, rows: Tensor, tensors: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """Whole tensors from the rows that each rank has, on every rank.

        Args:
            rows: which rows of the whole this rank has, LongTensor (m,); m may be 0. Each of the n
                rows must be on one rank.
            tensors: name to those rows, (m, ...); may be empty if m is 0.
            n: rows of the whole.

        Returns:
            Name to tensor, (n, ...), on the device of the rows or else the default one of its type.

        Raises:
            RankError: the ranks do not have each of the n rows once, or their tensors differ in
                shape or dtype.
        """
        described = {
            name: (tuple(part.shape[1:]), part.dtype, part.device.type)
            for name, part in tensors.items()
        }
        counts, forms = zip(*self.gather((len(rows), described)), strict=True)
        present = [form for count, form in zip(counts, forms, strict=True) if count]
        if sum(counts) != n or any(form != present[0] for form in present):
            raise RankError(
                f"the ranks hold {counts} of {n} rows, as {present}; all rows must be there once, "
                "in tensors of one shape and dtype"
            )
        if not present:
            return dict(tensors)
        own = tensors if len(rows) else {}
        places = torch.cat(self.gather(rows.cpu()))
        if not torch.equal(places.sort().values, torch.arange(n)):
            raise RankError(f"the ranks do not hold each of the {n} rows once")
        whole = {}
        for name, (shape, dtype, kind) in present[0].items():
            device = own[name].device if own else torch.device(kind)
            result = torch.empty(n, *shape, dtype=dtype, device=device)
            starts = torch.tensor([0, *counts]).cumsum(0).tolist()
            for rank, count in enumerate(counts):
                if count:
                    part = own[name] if rank == self.rank else result.new_empty(count, *shape)
                    here = places[starts[rank] : starts[rank] + count].to(device)
                    result[here] = self.send(part, rank)
            whole[name] = result
        return whole

    def merge(self, covariance: Mergeable[Summed]) -> Summed:
        """The moments of all ranks, merged in rank order, with the same bits on every rank.

        Raises:
            RankError: covariances of different widths.
        """
        return covariance.over(self)

    @contextmanager
    def counted(
        self, advance: Callable[[int], object], total: int
    ) -> Iterator[Callable[[int], object]]:
        """Progress of shared work, of which this rank sees only its own: taken times the ranks.

        Args:
            advance: moves a progress bar.
            total: what it moves by in all, reached when the block ends.
        """
        left = total

        def own(done: int) -> None:
            nonlocal left
            step = min(done * self.size, left)
            left -= step
            advance(step)

        yield own
        advance(left)

    def leave(self) -> None:
        """End the exchange before its block ends: every rank then goes on alone, or ends."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()

    def send(self, tensor: Tensor, source: int) -> Tensor:
        """A tensor of the source rank, on every rank."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with contact("exchanging activations"):
            # As bytes, since not every backend knows every dtype.
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=source)
        return tensor


@contextmanager
def contact(what: str) -> Iterator[None]:
    """Turn errors of the connection into one that says what has happened.

    Raises:
        RankError: another rank has ended, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise RankError(
            f"lost contact with the other ranks while {what}: one of them has ended or hangs, and "
            f"its own message says why ({reason})"
        ) from error
