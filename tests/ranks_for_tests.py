"""Several processes that run one function together, forked from a server that has imported all."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

DEADLINE = 60.0
"""Seconds after which a run counts as hung."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lrqp_torch.cli", "lrqp_torch.distributed", "lrqp_torch.study.run", "transformers"]
)


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns or raises on each of ``size`` ranks.

    A rank that was killed gives its negative exit code; a run that hangs fails the test.
    """
    with pytest.MonkeyPatch.context() as patch:  # there may be fewer GPUs than ranks
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()
    port = _free_port()
    started = []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        job = (theirs, rank, size, port, function, arguments)
        process = _CONTEXT.Process(target=_run, args=job, daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    return [_result(process, ours) for process, ours in started]


def command(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``lrqp`` on this rank."""
    files = [folder / f"{name}{os.environ['RANK']}" for name in ("out", "err")]
    for number, path in enumerate(files, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["lrqp", *arguments]
    code = 0
    try:
        from lrqp_torch.cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (path.read_text() for path in files)
    return code, out, err


def _run(
    pipe: Connection,
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        result = function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        result = error
    # A pipe of its own would send tensors as handles, which end with this process.
    pipe.send_bytes(pickle.dumps(result))


def _result(process: Any, pipe: Connection) -> Any:
    try:
        if not pipe.poll(DEADLINE):
            raise AssertionError(f"a rank did not end within {DEADLINE:.0f} s")
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
