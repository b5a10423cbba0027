"""How far work is, and the time that each stage took.

A bar where somebody looks: on a terminal or in the cell of a notebook, one at a time and without
codes that move the cursor elsewhere. Where standard error is a file or a pipe, plain lines.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], object]
"""Called with the number of units that were just done."""
Start = Callable[[str, int], Advance]
"""Opens a stage with a title and a total, and gives the function that moves it."""

LINE_EVERY = 15.0
"""Seconds after which a stage that still runs says so again, where there is no bar."""


def no_progress(done: int) -> None:
    """The default of every ``advance`` argument."""


def no_stages(title: str, total: int) -> Advance:
    """The default of every ``start`` argument."""
    return no_progress


@contextmanager
def progress_bars(*, enabled: bool = True, keep: bool = False) -> Iterator[Start]:
    """Shows on standard error how far each stage is while the block runs.

    Args:
        enabled: whether to show anything at all.
        keep: whether finished bars stay.
    """
    if not enabled:
        yield no_stages
        return
    make: Callable[[str, int], Any] = _Lines
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a notebook without widgets, which has text
            from tqdm.auto import tqdm

        def make(title: str, total: int) -> Any:
            style = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
            bar = {"bar_format": style, "leave": keep, "dynamic_ncols": True}
            return tqdm(total=total, desc=title, **bar)

    stages: list[Any] = []

    def start(title: str, total: int) -> Advance:
        if stages:
            stages[-1].close()
        stages.append(make(title, total))
        update: Advance = stages[-1].update
        return update

    try:
        yield start
    finally:
        if stages:
            stages[-1].close()


class _Lines:
    """A stage as lines: when it ends, and now and then until then."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._open = title, total, 0, True
        self._start = self._said = time.perf_counter()

    def update(self, done: int) -> None:
        self._done += done
        now = time.perf_counter()
        if self._done >= self._total:
            self.close()
        elif self._open and now - self._said > LINE_EVERY and self._done:
            self._said, took = now, now - self._start
            left = took * (self._total - self._done) / self._done
            self._say(f"{self._done:,} of {self._total:,}, about {in_time(left)} left")

    def close(self) -> None:
        if self._open:
            self._open = False
            count = f"{self._done:,} of {self._total:,} in " if self._total > 1 else ""
            self._say(f"{count}{in_time(time.perf_counter() - self._start)}")

    def _say(self, words: str) -> None:
        print(f"{self._title}: {words}", file=sys.stderr, flush=True)


def in_time(seconds: float) -> str:
    """A length of time in words: ``"0.4 s"``, ``"12 s"``, ``"3 min"``, ``"2.5 h"``."""
    if seconds < 90:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
