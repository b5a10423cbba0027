"""How far a study is: progress bars with the time left, and the time that each stage took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lrqp_torch.study.context import Advance, no_progress

Start = Callable[[str, int], Advance]
"""Opens a progress bar with a title and a total, and gives the function that moves it."""


def no_stages(title: str, total: int) -> Advance:
    """The default of every ``start`` argument."""
    return no_progress


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[Start]:
    """Shows bars on standard error while its block runs, then clears them.

    Args:
        enabled: whether to show anything at all.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not enabled,
    ) as bars:

        def start(title: str, total: int) -> Advance:
            task = bars.add_task(title, total=total)
            return lambda done: bars.advance(task, done)

        yield start


class Clock:
    """Seconds spent in each stage of a study."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time that the block takes under ``name``."""
        start = time.perf_counter()
        yield
        self._stages[name] = round(time.perf_counter() - start, 3)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and ``total`` since the clock was made."""
        return self._stages | {"total": round(time.perf_counter() - self._start, 3)}
