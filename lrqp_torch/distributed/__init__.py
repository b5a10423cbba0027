"""One run of many processes: capture, covariance and probes over ``torch.distributed``.

Every process ("rank") has the whole model and all prompts, and does its share of the work;
whatever is found is exchanged, so that every rank goes on with the same bits::

    # torchrun --standalone --nproc-per-node 4 script.py
    with distributed.joined() as ranks:                      # alone without torchrun
        acts = distributed.capture(model, inputs, ["L6.mid"], at, ranks=ranks, batch_size=64)
        probes = distributed.fit_many({"abb": (acts["L6.mid"], labels)}, ranks=ranks)
        covariance = lrqp.Covariance(768)
        for rows, found in distributed.capture_batches(model, inputs, "L6.mid", at, ranks=ranks):
            covariance.update(found["L6.mid"])
        metric = ranks.merge(covariance).finish()
        if ranks.is_main:
            lrqp.LRQP(probes["abb"], metric).save("edit")

Work is divided in whole batches, so the numbers are those of one process with the same
``batch_size``, bit for bit; only sums over ranks differ, by rounding.

``torchrun`` (or anything that sets its variables) starts the processes, on one machine or many.
They communicate by gloo on the CPU and by nccl between CUDA devices. A process that dies or raises
ends the run: the others get a :class:`~lrqp_torch.errors.RankError`, and ``torchrun`` ends them.
What is exchanged is pickled between the processes of a run, so all of them must be trusted.

A tensor-parallel model of transformers (``from_pretrained(..., tp_plan="auto")``) is another
matter: there the ranks share each forward pass, and all of them hold the whole stream. So
:func:`lrqp_torch.capture` and ``edit.at`` work as with one process, called on every rank with the
same inputs, and nothing here must be used to divide them; :func:`joined` is welcome around it, for
its end when a rank dies. Plans that divide the stream itself along the tokens are not supported.
"""

from importlib import import_module
from operator import attrgetter
from typing import Any

from lrqp_torch.distributed.group import joined, launched
from lrqp_torch.distributed.ranks import Ranks

__all__ = [
    "Ranks",
    "capture",
    "capture_batches",
    "capture_to",
    "fit_batches",
    "fit_many",
    "joined",
    "launched",
]

# What works over ranks lies on the floors above this one, which import it: so it is found by name,
# when it is asked for.
_ABOVE = {
    "capture": ("stream.capture", "capture"),
    "capture_batches": ("stream.capture", "capture_batches"),
    "capture_to": ("stream.store", "capture_to"),
    "fit_batches": ("probes.linear", "LinearProbe.fit_batches"),
    "fit_many": ("probes.linear", "LinearProbe.fit_many"),
}


def __getattr__(name: str) -> Any:
    if name not in _ABOVE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, path = _ABOVE[name]
    return attrgetter(path)(import_module(f"lrqp_torch.{module}"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
