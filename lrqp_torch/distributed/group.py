"""Joining the other processes of a run, and leaving them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from lrqp_torch.distributed.ranks import Ranks, contact
from lrqp_torch.errors import RankError

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others, which may have a large model to load.

A rank that ends is noticed at once; this is for one that hangs.
"""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several, started by ``torchrun`` or in its manner.

    Read from the variables ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    Raises:
        RankError: they contradict one another.
    """
    return _launch(environment)[1] > 1


@contextmanager
def joined(device: str = "auto", *, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the other ranks of this run for the length of a block; alone, a run of one rank.

    A process group that exists already is used and left open. Otherwise one is made from
    ``torchrun``'s variables: gloo, and nccl beside it where the ranks work on CUDA devices, each
    on the one of its ``LOCAL_RANK``. If the block raises, the group is torn down at once, so that
    ranks that wait for this one fail too and do not hang.

    Args:
        device: where the ranks will work: ``cpu``, ``cuda`` or ``auto`` (CUDA where there is one).
        timeout: how long to wait for the others, at the start and in every exchange.

    Raises:
        RankError: contradicting variables, the others never came, fewer CUDA devices than ranks on
            this machine, or a device that names one for all.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    rank, size = _launch(os.environ)
    if size == 1:
        yield Ranks()
        return
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        torch.cuda.set_device(_local_rank())
    elif device.startswith("cuda"):
        raise RankError(
            f"device {device!r} would put all {size} ranks on one CUDA device; say cuda or auto, "
            "and each rank takes its own"
        )
    with contact("joining the other ranks"):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", rank=rank, world_size=size, timeout=timeout
        )
    ranks = Ranks(rank, size, owned=True)
    try:
        yield ranks
    except BaseException:
        # With nccl, leaving may wait for the others; there the end of this process tells them.
        if not on_cuda:
            with suppress(RuntimeError):
                ranks.leave()
        raise
    ranks.leave()


def _launch(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and size; (0, 1) for a process that was started alone."""
    if any(name not in environment for name in _VARIABLES):
        return 0, 1
    rank, size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if not 0 <= rank < size:
        raise RankError(
            f"RANK is {rank} and WORLD_SIZE {size}: a rank must lie from 0 to the size less one. "
            "torchrun sets both."
        )
    return rank, size


def _local_rank() -> int:
    """The CUDA device of this rank."""
    found, local = (
        torch.cuda.device_count(),
        _number({"LOCAL_RANK": "0"} | os.environ, "LOCAL_RANK"),
    )
    if local >= found:
        raise RankError(
            f"local rank {local} has no CUDA device, this machine has {found}: start as many "
            "processes as there are devices (torchrun --nproc-per-node gpu), or use device cpu"
        )
    return local


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise RankError(
            f"{name} is {environment[name]!r}, which is no number; torchrun sets it"
        ) from error
