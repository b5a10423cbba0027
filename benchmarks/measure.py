"""Timing several alternatives side by side, and printing them as one table."""

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def parse_arguments(description: str) -> Namespace:
    """The options that every benchmark has; sets the number of threads."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="a run of seconds, for a first look")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--repeats", type=int, default=None, help="rounds to take medians of")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.repeats = arguments.repeats or (5 if arguments.small else 15)
    return arguments


def medians(
    alternatives: Mapping[str, Callable[[], Any]], repeats: int, device: str
) -> dict[str, float]:
    """Median seconds of each alternative.

    Alternatives take turns within every round, so that a busy machine slows all of them alike;
    the first round warms up and does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(repeats + 1):
        for name, run in alternatives.items():
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(title: str, rows: list[dict[str, Any]], arguments: Namespace) -> None:
    """Print rows as a table, and write them as JSON where that was asked for."""
    where = arguments.device
    if where != "cpu":
        where = torch.cuda.get_device_name()
    table = Table(title=f"{title} ({where}, torch {torch.__version__})", title_justify="left")
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=120).print(table)
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"title": title, "device": where, "rows": rows}, indent=2)
        )


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
