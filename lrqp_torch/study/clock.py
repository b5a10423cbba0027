"""How long each stage of a study takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
