"""Timing several alternatives side by side, and printing them as one table."""

import ctypes
import json
import os
import platform
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def parse_arguments(
    description: str,
    argv: Sequence[str] | None = None,
    more: Callable[[ArgumentParser], object] | None = None,
) -> Namespace:
    """The options that every benchmark has; sets the number of threads and keeps memory.

    Args:
        description: of the script.
        argv: arguments instead of the command line's.
        more: adds the script's own options to the parser.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="a run of seconds, for a first look")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--repeats", type=int, default=None, help="rounds to take medians of")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    if more is not None:
        more(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_memory()
    arguments.repeats = arguments.repeats or (5 if arguments.small else 15)
    return arguments


def keep_memory() -> None:
    """Have the C library keep what is freed instead of returning it to the system.

    A buffer of some megabytes comes from the system page by page, or from what an earlier call
    left: which of the two is decided by whatever else lies on the heap, not by what is timed, and
    6 MB of pages take several times as long as a product that fills them. Only glibc is told.
    """
    most_mapped, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    if hasattr(os, "confstr") and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        library = ctypes.CDLL(None)
        library.mallopt(most_mapped, 0)
        library.mallopt(trim_threshold, -1)


def medians(
    alternatives: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str,
    *,
    seconds: float = float("inf"),
    calls: int = 1,
) -> dict[str, float]:
    """Median seconds of each alternative.

    Alternatives take turns within every round, so that a busy machine slows all of them alike;
    the first round warms up and does not count.

    Args:
        alternatives: what to time, by name.
        repeats: rounds that count.
        device: where they run; a GPU is waited for.
        seconds: an alternative that has taken this long in all sits out the remaining rounds. The
            first round then counts where there is no other.
        calls: in a row that are timed as one, for what takes microseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(repeats + 1):
        for name, run in alternatives.items():
            if not times[name] or sum(times[name]) < seconds:
                times[name].append(seconds_of(run, device, calls))
    return {name: statistics.median(values[1:] or values) for name, values in times.items()}


def seconds_of(run: Callable[[], Any], device: str, calls: int = 1) -> float:
    """How long one call takes, of so many; a GPU is waited for.

    One thread is timed by the time that it ran, which others on a busy machine do not take from it.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronise(device)
    start = clock()
    for _ in range(calls):
        run()
    synchronise(device)
    return (clock() - start) / calls


def report(title: str, rows: list[Row], arguments: Namespace, **facts: Any) -> None:
    """Print rows as a table, and write them as JSON where that was asked for.

    Args:
        title: of the table.
        rows: one dictionary a line, all with the same keys.
        arguments: of :func:`parse_arguments`.
        facts: further figures for the JSON file.
    """
    table = Table(title=f"{title} ({hardware(arguments)})", title_justify="left")
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=170).print(table)
    if arguments.json is not None:
        content = {
            "title": title,
            "device": arguments.device,
            "hardware": hardware(arguments),
            "threads": arguments.threads,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "repeats": arguments.repeats,
            "rows": rows,
            **facts,
        }
        arguments.json.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def hardware(arguments: Namespace) -> str:
    """What the figures of a run were made on."""
    names = Path("/proc/cpuinfo")
    found = [
        line.partition(":")[2].strip()
        for line in (names.read_text() if names.is_file() else "").splitlines()
        if line.startswith("model name")
    ]
    named = found[0] if found else platform.processor() or platform.machine()
    threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
    parts = [f"{named}, {os.cpu_count()} cores", threads, f"torch {torch.__version__}"]
    if arguments.device != "cpu":
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
