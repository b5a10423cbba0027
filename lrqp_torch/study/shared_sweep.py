"""The sweep of held-out prompts on many processes, each running some of its batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from lrqp_torch.distributed import Ranks
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LRQPError, RankError
from lrqp_torch.study import flipping
from lrqp_torch.study.context import Advance, no_progress
from lrqp_torch.study.indirect_objects import IOIPrompts


def sweep(
    ranks: Ranks,
    model: Any,
    data: IOIPrompts,
    edits: Mapping[str, LRQP],
    *,
    batch_size: int = 64,
    batches: flipping.Batches,
    advance: Advance = no_progress,
) -> flipping.Sweep:
    """:func:`flipping.sweep` on many processes: the whole result on each, the bits of one process.

    The batches that are not done yet are run in rounds, one a rank. Rank 0 keeps those of a round
    as soon as it ends, so a stopped sweep goes on with any number of ranks.

    Args:
        ranks: this process among the others.
        model: the same on every rank, as are the data and the edits.
        data: held-out prompts, as in :func:`flipping.sweep`.
        edits: site name to edit.
        batch_size: prompts per batch.
        batches: keeps batches; read and written by rank 0 alone.
        advance: as in :func:`flipping.sweep`; counts on every rank what all of them ran.

    Raises:
        NonFiniteError: as in :func:`flipping.sweep`, on the first rank where it happens.
        ToldError: on the others.
        RankError: another rank has ended.
    """
    if ranks.size == 1:
        return flipping.sweep(
            model, data, edits, batch_size=batch_size, batches=batches, advance=advance
        )
    numbers = range(-(-len(data) // batch_size))
    kept: dict[int, dict[str, Tensor]] = {}
    with ranks.together():
        for number in numbers if ranks.is_main else ():
            found = batches.load(number)
            if found is not None:
                kept[number] = found
    done = ranks.from_main(kept)
    pending = [number for number in numbers if number not in done]
    runs = flipping.sweep_runs(len(edits))
    advance(len(done) * runs)

    def finish(found: Mapping[int, dict[str, Tensor]]) -> None:
        if ranks.is_main:
            for number, tensors in found.items():
                batches.save(number, tensors)
        done.update(found)
        advance(len(found) * runs)

    rounds = _Rounds(ranks, pending, finish)
    if rounds.mine:
        try:
            flipping.sweep(model, data, edits, batch_size=batch_size, batches=rounds)
        except RankError:
            raise
        except LRQPError as error:
            rounds.fail(error)
    rounds.wait()
    return flipping.sweep(model, data, edits, batch_size=batch_size, batches=_Done(done))


class _Rounds:
    """This rank's batches, exchanged with those of the others as soon as each is run."""

    def __init__(
        self,
        ranks: Ranks,
        pending: Sequence[int],
        finish: Callable[[Mapping[int, dict[str, Tensor]]], None],
    ) -> None:
        self.ranks, self.finish = ranks, finish
        self.mine = set(pending[ranks.turns])
        self.left = -(-len(pending) // ranks.size)

    def load(self, index: int) -> dict[str, Tensor] | None:
        """None for a batch that this rank has to run; of the others nothing is needed here."""
        return None if index in self.mine else {}

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """End a round."""
        self._exchange({index: dict(tensors)})

    def wait(self) -> None:
        """Take part in the rounds in which this rank has no batch."""
        while self.left:
            self._exchange({})

    def fail(self, error: LRQPError) -> NoReturn:
        """Tell the others, where they still listen, and raise."""
        if self.left:
            self._exchange({}, error)
        raise error

    def _exchange(
        self, found: Mapping[int, dict[str, Tensor]], error: LRQPError | None = None
    ) -> None:
        self.left -= 1
        self.finish(self.ranks.exchange(found, error))


class _Done:
    """Batches that are all done."""

    def __init__(self, found: Mapping[int, dict[str, Tensor]]) -> None:
        self.found = found

    def load(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of a batch."""
        return self.found[index]

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is left to be kept."""
