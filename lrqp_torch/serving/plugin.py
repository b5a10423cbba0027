"""The plugin of vLLM: arms a server's edits in every process, and refuses what it cannot promise.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). Where
edits are named (``LRQP_EDITS``), a few of vLLM's own functions are wrapped there:

- the front end settles what a request asks for when it comes in, so that what is wrong is refused
  before it is scheduled, and makes an error of a request that kept less than it promised;
- the engine puts the edits of a request into the hash of each block of its cache that they change,
  checks at the start that every rank armed every site, and keeps the certificates;
- a worker puts the operator in front of the norms of its model, and tells it of every step.

Nothing here acts on a server without edits, except that it refuses requests that ask for one.
"""

import functools
import hashlib
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrqp_torch.edits.failures import worst_allowed
from lrqp_torch.errors import RequestError, ServingError
from lrqp_torch.qp import Status
from lrqp_torch.qp.fused import MOST_CLASSES
from lrqp_torch.serving import operator
from lrqp_torch.serving.http import wrap_server
from lrqp_torch.serving.operator import CERTIFICATE, Scheduled, Tables
from lrqp_torch.serving.requests import (
    ARGUMENT,
    FOLDERS_VARIABLE,
    Library,
    RequestEdit,
    key_of_block,
)
from lrqp_torch.serving.sites import Blocks

TESTED_VLLM = "0.32"
"""The minor version of vLLM whose inner functions are wrapped here."""
SETTLED = "lrqp_settled"
"""What the edits of a request are called among its extra arguments once they are settled."""
CERTIFICATES = "lrqp"
"""What the certificates are called among a request's ``kv_transfer_params``, and between ranks."""
REMEMBERED = 200_000
"""So many certificates of blocks of the cache are kept for requests that find them there."""
CACHED = "CACHED"
"""Status of a token whose block an earlier request had edited alike, and whose numbers are gone."""
INSPECTION = "vllm.model_executor.models.registry"
"""What vLLM runs in a process of its own to look at a class of models."""


def register() -> None:
    """What vLLM calls in each process, perhaps more than once.

    Raises:
        ServingError: edits are named, and this version of vLLM is another than was tested.
        SavedEditError: a named folder holds no edit.
    """
    named = os.environ.get(FOLDERS_VARIABLE)
    import vllm

    if getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) == INSPECTION:
        return
    if ".".join(vllm.__version__.split(".")[:2]) != TESTED_VLLM:
        if not named:
            return
        raise ServingError(
            f"edits are served in vLLM {TESTED_VLLM}, whose inner functions they rely on; this is "
            f"{vllm.__version__}. Install vllm=={TESTED_VLLM}.*, or unset {FOLDERS_VARIABLE}"
        )
    _wrap_front_end()
    if not named:
        return
    library()
    operator.define()
    _wrap_keys()
    _wrap_engine()


@functools.cache
def _read(folders: str) -> Library:
    return Library.load(folders)


def library() -> Library | None:
    """The edits that this server was started with; None without any."""
    named = os.environ.get(FOLDERS_VARIABLE)
    return _read(named) if named else None


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around`` in place of a function of vLLM, which it is given first; once.

    Raises:
        ServingError: vLLM has no such function.
    """
    inner = vars(owner).get(name)
    if inner is None:
        raise ServingError(f"vLLM has no {owner.__name__}.{name}; edits cannot be served in it")
    if hasattr(inner, "lrqp_inner"):
        return

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    wrapped.lrqp_inner = inner  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


# The front end.


def _wrap_front_end() -> None:
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    _wrap(InputProcessor, "process_inputs", _settle)
    _wrap(OutputProcessor, "add_request", _expect)
    _wrap(RequestState, "make_request_output", _output)
    _wrap(RequestState, "_new_completion_output", _completion)
    wrap_server(_wrap)


def _settle(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Settle what a request asks for, or refuse it."""
    request = inner(*args, **kwargs)
    params = request.sampling_params or request.pooling_params
    extra = dict(getattr(params, "extra_args", None) or {})
    if SETTLED in extra:
        raise RequestError(f"{SETTLED!r} is no argument of a request; write {ARGUMENT!r}")
    if ARGUMENT not in extra:
        return request
    edits = library()
    if edits is None:
        raise RequestError(
            f"this server was started without edits; name their folders in {FOLDERS_VARIABLE}"
        )
    if request.sampling_params is None:
        raise RequestError("requests that generate nothing (pooling) cannot be edited")
    length = len(request.prompt_token_ids or request.prompt_embeds)
    found = edits.resolve(extra.pop(ARGUMENT), length, params.max_tokens)
    params.extra_args = extra | {SETTLED: [asdict(edit) for edit in found]}
    return request


def _expect(
    inner: Callable[..., Any], processor: Any, request: Any, *args: Any, **kwargs: Any
) -> None:
    """Note at the front end that certificates of a request must come back."""
    inner(processor, request, *args, **kwargs)
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    if SETTLED in extra:
        processor.request_states[request.request_id].lrqp_expected = True


def _output(
    inner: Callable[..., Any],
    state: Any,
    new_token_ids: list[int],
    pooling_output: Any,
    finish_reason: Any,
    stop_reason: Any,
    kv_transfer_params: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """An output with its certificates, which is an error where one is broken or none came."""
    if kv_transfer_params and CERTIFICATES in kv_transfer_params:
        state.lrqp = kv_transfer_params[CERTIFICATES]
        if finish_reason is None:
            rest = {k: v for k, v in kv_transfer_params.items() if k != CERTIFICATES}
            kv_transfer_params = rest or None
    if finish_reason is not None and getattr(state, "lrqp_expected", False):
        from vllm.v1.engine import FinishReason

        if getattr(state, "lrqp", None) is None:
            state.lrqp = {"edits": [], "error": "no certificate came back from the engine"}
        if finish_reason != FinishReason.ABORT and state.lrqp["error"] is not None:
            finish_reason, stop_reason = FinishReason.ERROR, state.lrqp["error"]
    given = new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params
    return inner(state, *given, *args, **kwargs)


def _completion(inner: Callable[..., Any], state: Any, *args: Any, **kwargs: Any) -> Any:
    """One of several outputs of a request, each with its own certificates."""
    output = inner(state, *args, **kwargs)
    if getattr(state, "lrqp", None) is not None and output.finish_reason is not None:
        output.lrqp = state.lrqp
    return output


def certificates(output: Any) -> list[dict[str, Any]]:
    """What the edits of a finished request did, one record an edit, as its output holds them.

    Each says the ``edit``, its ``site``, the ``positions`` that it edited, and of each of these
    ``log_odds_before``, ``log_odds_after`` and ``log_odds_asked`` in nats, ``distance`` and
    ``status``; of several ``variables``, the odds are lists in their order.

    Args:
        output: of vLLM, a ``RequestOutput`` or one of its ``outputs``.
    """
    report = getattr(output, "lrqp", None)
    if report is None:
        report = (getattr(output, "kv_transfer_params", None) or {}).get(CERTIFICATES)
    return [] if report is None else list(report["edits"])


# The engine.


def edits_of(request: Any) -> tuple[RequestEdit, ...]:
    """What a request of vLLM's asks for, as its front end settled it."""
    known = getattr(request, "lrqp_edits", None)
    if known is None:
        known = _settled(request.sampling_params)
        request.lrqp_edits = known
    found: tuple[RequestEdit, ...] = known
    return found


def _settled(params: Any) -> tuple[RequestEdit, ...]:
    found = []
    for edit in (getattr(params, "extra_args", None) or {}).get(SETTLED, ()):
        values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in edit.items()}
        found.append(RequestEdit(**values))
    return tuple(found)


def _wrap_keys() -> None:
    """Let the hash of a block contain the edits that it was computed with."""
    from vllm.config import VllmConfig
    from vllm.v1.core import kv_cache_utils

    name = "generate_block_hash_extra_keys"
    before = vars(kv_cache_utils)[name]
    _wrap(kv_cache_utils, name, _extra_keys)
    # Whoever has imported it by its name would call the other.
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is before:
            setattr(module, name, vars(kv_cache_utils)[name])
    _wrap(VllmConfig, "compute_hash", _config_hash)


def _extra_keys(
    inner: Callable[..., Any], request: Any, start: int, end: int, *args: Any, **kwargs: Any
) -> Any:
    keys, place = inner(request, start, end, *args, **kwargs)
    edits = edits_of(request)
    key = key_of_block(edits, start, end) if edits else None
    return (keys if key is None else (*(keys or ()), (ARGUMENT, key))), place


def _config_hash(inner: Callable[..., str], config: Any, *args: Any, **kwargs: Any) -> str:
    """Keep graphs with the operator apart from those without it."""
    from lrqp_torch import __version__

    found, edits = inner(config, *args, **kwargs), library()
    if edits is None:
        return found
    armed = sorted({str(item.stream) for item in edits.values()})
    return hashlib.sha256(repr((found, __version__, armed)).encode()).hexdigest()[: len(found)]


def _wrap_engine() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    # A process that runs no model does without the model runners.
    _wrap(WorkerWrapperBase, "init_device", _wrap_workers)
    # An engine in a process of its own calls this plugin from within its constructor, so what is
    # wrapped are functions that it calls later.
    _wrap(EngineCore, "_initialize_kv_caches", _start)
    _wrap(Scheduler, "__init__", _schedule)
    _wrap(Scheduler, "add_request", _add)
    _wrap(Scheduler, "update_from_output", _update)


def _start(inner: Callable[..., Any], engine: Any, config: Any) -> Any:
    """Start an engine, unless a rank has not armed what it should have."""
    edits = library()
    if edits is not None:
        from vllm.v1.core.sched.scheduler import Scheduler

        scheduler = config.scheduler_config.get_scheduler_cls()
        if not issubclass(scheduler, Scheduler):
            raise ServingError(
                f"edits are not served with the scheduler {scheduler.__name__}, which would keep "
                f"no certificates"
            )
        check_ranks(engine.model_executor.collective_rpc(armed_of), edits)
    return inner(engine, config)


def _schedule(inner: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """A scheduler with a ledger."""
    inner(scheduler, *args, **kwargs)
    edits = library()
    if edits is not None:
        scheduler.lrqp = Ledger(edits, getattr(scheduler, "hash_block_size", 0))


def _add(inner: Callable[..., Any], scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Take a request, and note what it asks for."""
    ledger: Ledger | None = getattr(scheduler, "lrqp", None)
    if ledger is not None:
        ledger.add(request)
    return inner(scheduler, request, *args, **kwargs)


def _update(
    inner: Callable[..., Any], scheduler: Any, step: Any, output: Any, *args: Any, **kwargs: Any
) -> Any:
    """Take what a step did, and report it of the requests that are done."""
    ledger: Ledger | None = getattr(scheduler, "lrqp", None)
    if ledger is None:
        return inner(scheduler, step, output, *args, **kwargs)
    ledger.take(getattr(output, "lrqp", None) or {})
    found = inner(scheduler, step, output, *args, **kwargs)
    ledger.report(found)
    return found


def armed_of(worker: Any) -> dict[str, Any]:
    """What a worker has armed, said by itself."""
    armed = getattr(worker.model_runner, "lrqp", None)
    if armed is None:
        return {"rank": worker.rank, "edits": None, "sites": []}
    return {"rank": worker.rank, "edits": armed.digest, "sites": sorted(armed.tables.local)}


def check_ranks(said: Sequence[Mapping[str, Any]], edits: Library) -> None:
    """Refuse to start where a rank has other edits, or no rank has a site.

    Raises:
        ServingError: which rank, or which site.
    """
    for rank in said:
        if rank["edits"] != edits.digest:
            what = "has other edits" if rank["edits"] else "has armed nothing"
            raise ServingError(
                f"rank {rank['rank']} {what}: all processes must read the same folders of "
                f"{FOLDERS_VARIABLE}, and run the same lrqp_torch"
            )
    armed = {site for rank in said for site in rank["sites"]}
    missing = sorted({str(item.stream) for item in edits.values()} - armed)
    if missing:
        raise ServingError(f"no rank has armed {', '.join(missing)}")


@dataclass(eq=False)
class Entry:
    """What is known of a request with edits: by edit and position its certificate."""

    request: Any  # of vLLM's scheduler
    edits: tuple[RequestEdit, ...]  # what it asks for
    rows: dict[tuple[str, int], Sequence[float]] = field(default_factory=dict)  # certificates
    # Those that are not yet remembered with their blocks.
    fresh: list[tuple[str, int]] = field(default_factory=list)
    cached: int = 0  # so many of its first tokens were found in the cache


class Ledger:
    """The certificates of the requests of an engine.

    What an earlier request had computed is in the cache, and its certificate is remembered with the
    hash of the block, so that a request which finds the block finds it too.

    Args:
        edits: of the server.
        block: tokens of a block.
    """

    def __init__(self, edits: Library, block: int) -> None:
        self.edits, self.block = edits, block
        self.names = list(edits)
        self.entries: dict[str, Entry] = {}
        self.blocks: OrderedDict[Any, dict[tuple[str, int], Sequence[float]]] = OrderedDict()
        self.remembered = 0

    def add(self, request: Any) -> None:
        """A request comes in."""
        edits = edits_of(request)
        if edits:
            self.entries[request.request_id] = Entry(request, edits)

    def take(self, came: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """What a step did: by request rows of edit, position and certificate."""
        for name, rows in came.items():
            entry = self.entries.get(name)
            if entry is None:  # done, or not yet told that it is
                continue
            for edit, position, *certificate in rows:
                place = self.names[int(edit)], int(position)
                entry.rows[place] = certificate
                entry.fresh.append(place)

    def report(self, outputs: Any) -> None:
        """Put certificates into the outputs of requests that are done.

        A stop string is seen by the front end alone, so there every output could be the last.
        """
        for kept in self.entries.values():
            self._remember(kept)
        for output in [one for part in outputs.values() for one in part.outputs]:
            entry = self.entries.get(output.request_id)
            if entry is None:
                continue
            if output.prefill_stats is not None:
                entry.cached = output.prefill_stats.num_cached_tokens
            done = output.finish_reason is not None
            if done or entry.request.sampling_params.stop:
                report = {CERTIFICATES: self.report_of(entry)}
                output.kv_transfer_params = (output.kv_transfer_params or {}) | report
            if done:
                del self.entries[output.request_id]
        gone = [name for name, kept in self.entries.items() if kept.request.is_finished()]
        for name in gone:
            del self.entries[name]

    def report_of(self, entry: Entry) -> dict[str, Any]:
        """The certificates of a request, and what is wrong with them, if anything is."""
        request, wrong, records = entry.request, [], []
        # The last token was generated and not read.
        read = request.num_tokens - 1
        for edit in entry.edits:
            named = self.edits[edit.edit]
            if edit.positions is None:
                positions = list(range(edit.lo, min(edit.hi, read)))
                missed = [edit.lo] if not positions else []
            else:
                positions = [p for p in edit.positions if p < read]
                missed = [p for p in edit.positions if p >= read]
            rows = [self._row(entry, edit.edit, position) for position in positions]
            missed += [p for p, row in zip(positions, rows, strict=True) if row is None]
            if missed:
                wrong.append(
                    f"{edit.edit!r} never fired at {_listed(sorted(missed))}: the model read "
                    f"{read} tokens of this request"
                )
            worst = worst_allowed(named.edit.on_infeasible)
            failed = {
                place: Status(int(row[0])).name
                for place, row in zip(positions, rows, strict=True)
                if row and row[0] > worst
            }
            if failed:
                kinds = ", ".join(sorted(set(failed.values())))
                wrong.append(f"{edit.edit!r} failed at {_listed(sorted(failed))}: {kinds}")
            records.append(_record(named.name, str(named.site), named.parts, positions, rows))
        error = "; ".join(wrong) if wrong else None
        return {"edits": records, "error": error}

    def _row(self, entry: Entry, edit: str, position: int) -> Sequence[float] | None:
        """The certificate of a token, from this request or from who computed its block.

        Empty where the block was edited by another request, of which nothing more is known.
        """
        row = entry.rows.get((edit, position))
        if row is None and self.block:
            hashes, place = entry.request.block_hashes, position // self.block
            if place < len(hashes):
                row = self.blocks.get(hashes[place], {}).get((edit, position))
        return () if row is None and position < entry.cached else row

    def _remember(self, entry: Entry) -> None:
        """Keep the certificates of full blocks with their hashes."""
        if not entry.fresh or not self.block:
            entry.fresh.clear()
            return
        hashes, later = entry.request.block_hashes, []
        for edit, position in entry.fresh:
            place = position // self.block
            if place >= len(hashes):
                later.append((edit, position))
                continue
            kept = self.blocks.setdefault(hashes[place], {})
            self.remembered += (edit, position) not in kept
            kept[edit, position] = entry.rows[edit, position]
            self.blocks.move_to_end(hashes[place])
        entry.fresh = later
        while self.remembered > REMEMBERED:
            self.remembered -= len(self.blocks.popitem(last=False)[1])


def _listed(positions: Sequence[int]) -> str:
    few = ", ".join(map(str, positions[:5]))
    return f"position{'s' * (len(positions) > 1)} {few}{', …' if len(positions) > 5 else ''}"


def _record(
    name: str,
    site: str,
    variables: Iterable[str],
    positions: Sequence[int],
    rows: Sequence[Sequence[float] | None],
) -> dict[str, Any]:
    """The certificates of an edit, as JSON holds them."""
    variables = list(variables)
    known = [(p, row) for p, row in zip(positions, rows, strict=True) if row is not None]
    wide = max(((len(row) - CERTIFICATE) // 3 for _, row in known), default=0)

    def odds(place: int) -> list[Any]:
        first = CERTIFICATE + place * wide
        parts = [
            [_number(v) for v in row[first : first + len(variables)]] or [None] * len(variables)
            for _, row in known
        ]
        return [part[0] for part in parts] if len(variables) == 1 else parts

    found = {
        "edit": name,
        "site": site,
        "positions": [position for position, _ in known],
        "log_odds_before": odds(0),
        "log_odds_after": odds(1),
        "log_odds_asked": odds(2),
        "distance": [_number(row[1]) if row else None for _, row in known],
        "status": [Status(int(row[0])).name if row else CACHED for _, row in known],
    }
    return found if len(variables) == 1 else found | {"variables": variables}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# The workers.


def _wrap_workers(inner: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the model runners of this process edit, before the first of them is made."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runners: list[Any] = [GPUModelRunner]
    _wrap(GPUModelRunner, "load_model", _load)
    _wrap(GPUModelRunner, "_prepare_inputs", _prepare_first)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        _wrap(CPUModelRunner, "load_model", _load)
    if HAS_TRITON:
        if current_platform.is_cpu():
            # It makes torch's functions for GPUs do nothing, which the runner relies on.
            import vllm.v1.worker.cpu  # noqa: F401
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner

        _wrap(SecondRunner, "load_model", _load)
        _wrap(SecondRunner, "prepare_inputs", _prepare_second)
        runners.append(SecondRunner)
    for runner in runners:
        _wrap(runner, "execute_model", _execute)
        _wrap(runner, "sample_tokens", _sample)
    return inner(worker, *args, **kwargs)


@dataclass(eq=False)
class Armed:
    """What a worker keeps of its edits."""

    tables: Tables  # of the operator
    digest: str  # of the server's edits
    # What each running request asks for, those without edits left out.
    requests: dict[str, tuple[RequestEdit, ...]] = field(default_factory=dict)
    # The tokens of such requests in the step under way.
    step: list[Scheduled] = field(default_factory=list)
    # What came of it, and of the steps of other ranks, by rank of the pipeline.
    came: Tensor | None = None


def _load(inner: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> None:
    """Load a model, and put the operator where its edits are."""
    inner(runner, *args, **kwargs)
    edits, config = library(), runner.vllm_config
    if edits is None:
        return
    model_config, parallel = config.model_config, config.parallel_config
    served = model_config.served_model_name or []
    named = [model_config.model, *([served] if isinstance(served, str) else served)]
    edits.check_model(model_config.hf_config, named)
    split, gone = "rows of the stream are split", "what the operator reads would be discarded"
    refused = (
        ("micro-batches (--enable-dbo, --ubatch-size)", parallel.use_ubatching, split),
        ("prefill context parallelism", parallel.prefill_context_parallel_size > 1, split),
        ("--enable-sleep-mode", model_config.enable_sleep_mode, gone),
    )
    for what, asked, why in refused:
        if asked:
            raise ServingError(f"edits are not served with {what}: {why}")
    model = runner.get_model()
    name = ", ".join(getattr(model_config.hf_config, "architectures", None) or [])
    here = Blocks.of(model, name).here({item.stream for item in edits.values()})
    sizes = config.compilation_config.cudagraph_capture_sizes or ()
    speculative = config.speculative_config
    slack = 0 if speculative is None else 2 * (speculative.num_speculative_tokens + 1)
    tables = Tables(edits, max(runner.max_num_tokens, *sizes, 1), runner.device, slack)
    tables.arm(here)
    looking = [item.name for n, item in enumerate(tables.named) if tables.looking[n]]
    if looking and runner.device.type != "cpu" and not model_config.enforce_eager:
        raise ServingError(
            f"edits {', '.join(map(repr, looking))} of more than {MOST_CLASSES} classes look at "
            f"values while they solve, which a CUDA graph cannot: start with --enforce-eager, or "
            f"leave out classes that no edit is for"
        )
    for site, norm in here.items():
        norm.register_forward_pre_hook(_hook(str(site)))
    operator.activate(tables)
    tables.rehearse(model_config.dtype)
    runner.lrqp = Armed(tables, edits.digest)


def _hook(site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before(norm: nn.Module, args: tuple[Any, ...]) -> None:
        torch.ops.lrqp.edit_(args[0], args[1] if len(args) > 1 else None, site)

    return before


def _execute(
    inner: Callable[..., Any],
    runner: Any,
    step: Any,
    received: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a step, with what it asks for, and pass on what came of it."""
    armed: Armed | None = getattr(runner, "lrqp", None)
    if armed is None or kwargs.get("dummy_run"):
        return inner(runner, step, received, *args, **kwargs)
    armed.step = _scheduled(armed, step)
    before = None
    if received is not None and CERTIFICATES in received.tensors:
        before = received.tensors.pop(CERTIFICATES)
    output = inner(runner, step, received, *args, **kwargs)
    came = [part for part in (before, armed.tables.collect()) if part is not None]
    armed.came = torch.cat(came) if came else None
    if armed.came is not None and hasattr(output, "tensors"):
        output.tensors[CERTIFICATES], armed.came = armed.came, None
    return output


def _scheduled(armed: Armed, step: Any) -> list[Scheduled]:
    """The tokens of requests with edits in a step of vLLM's scheduler."""
    for name in step.finished_req_ids:
        armed.requests.pop(name, None)
    computed = {}
    for new in step.scheduled_new_reqs:
        edits = _settled(new.sampling_params)
        if edits:
            armed.requests[new.req_id] = edits
            computed[new.req_id] = new.num_computed_tokens
    if not armed.requests:
        return []
    cached = step.scheduled_cached_reqs
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return [
        Scheduled(name, armed.requests[name], computed[name], count)
        for name, count in step.num_scheduled_tokens.items()
        if name in armed.requests
    ]


def _prepare_first(inner: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell the tables of a batch of the first model runner."""
    found = inner(runner, *args, **kwargs)
    armed: Armed | None = getattr(runner, "lrqp", None)
    if armed is not None:
        batch = runner.input_batch
        rows = runner.query_start_loc.gpu[: batch.num_reqs + 1]
        _place(armed, batch.req_ids, rows, runner.positions)
    return found


def _prepare_second(inner: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell the tables of a batch of the second model runner."""
    batch = inner(runner, *args, **kwargs)
    armed: Armed | None = getattr(runner, "lrqp", None)
    if armed is not None:
        rows = batch.query_start_loc[: batch.num_reqs + 1]
        _place(armed, batch.req_ids, rows, batch.positions)
    return batch


def _place(armed: Armed, batch: Sequence[str], starts: Tensor, positions: Tensor) -> None:
    operator.activate(armed.tables)
    armed.tables.place(armed.step, batch, starts, positions)


def _sample(inner: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Put what came of a step beside the tokens that it sampled."""
    output = inner(runner, *args, **kwargs)
    armed: Armed | None = getattr(runner, "lrqp", None)
    if armed is None or armed.came is None:
        return output
    names = [item.request for item in armed.step]
    came, armed.came = armed.came, None
    if not hasattr(output, "get_output"):
        output.lrqp = _by_request(names, came)
        return output
    # The numbers follow the tokens to the host, and are awaited with them.
    get, done = output.get_output, None
    if came.is_cuda:
        held = torch.empty(came.shape, dtype=came.dtype, pin_memory=True)
        came, done = held.copy_(came, non_blocking=True), torch.cuda.Event()
        done.record()

    def get_output() -> Any:
        found = get()
        if done is not None:
            done.synchronize()
        found.lrqp = _by_request(names, came)
        return found

    output.get_output = get_output
    return output


def _by_request(names: Sequence[str], came: Tensor) -> dict[str, list[list[float]]]:
    """Rows of edit, position and certificate, by request; those of no row of the batch left out."""
    found: dict[str, list[list[float]]] = {}
    for request, *row in came.tolist():
        if request >= 0:
            found.setdefault(names[int(request)], []).append(row)
    return found
