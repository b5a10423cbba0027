"""What an edit costs on the GPU at hand, and whether it is right there: checks, figures, tests.

    python -m benchmarks.device --json results/device.json

The whole takes no more than ``--minutes``, the tests of what runs on a GPU among it. ``--sections``
chooses among the parts (``layouts`` runs only where it is named), ``--small`` runs them at sizes
for a first look, also on a CPU. Each section has its time, and a process of its own where the one
before has lost its GPU or its time, so that none costs the others more than that. Models have
random weights of known shapes, so nothing is downloaded.
"""

import copy
import faulthandler
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from benchmarks.hook_peers import vector_hook
from benchmarks.measure import Row, parse_arguments, synchronise
from lrqp_torch import (
    LRQP,
    JointLRQP,
    LinearProbe,
    Mahalanobis,
    MahalanobisQP,
    Solution,
    Status,
)
from lrqp_torch.qp import ODDS, ProbeGeometry, fused
from lrqp_torch.qp.fused import Launcher, Shape, StreamRows

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CLASSES = (2, 3, 5, 8, 10, 16, 32, 50, 64)
WIDTH = 768
LAYOUTS: dict[int, tuple[Shape, ...]] = {
    2: (Shape(128, 1), Shape(128, 1, 3)),
    10: (
        Shape(32, 1),
        Shape(32, 1, 3),
        Shape(32, 1, 1, None, True),
        Shape(32, 1, 3, None, True),
        Shape(32, 1, 1, 128, True),
        Shape(64, 2, 2, 128, True),
    ),
    50: (
        Shape(64, 4),
        Shape(64, 4, 1, None, True),
        Shape(64, 4, 1, 128, True),
        Shape(32, 4, 2, 128, True),
    ),
}
"""Layouts that are tried, by K."""
TOTAL = (3, "float64"), (10, "float64"), (10, "bfloat16"), (50, "float64")
"""Numbers of classes and dtypes in which total odds are checked."""


TESTS = (
    "qp/test_kernel.py",
    "serving/test_tables.py",
    "stream/test_devices.py",
    "stream/test_compiled_models.py",
    "edits/test_tokens.py",
)
"""Those of what runs on a GPU."""
LIMITS = {"compiling": 170, "checks": 90, "models": 90, "compiled": 120, "tests": 270}
"""Seconds of a section, where not a minute."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    if arguments.compile:
        compile_one(json.loads(arguments.compile))
        return
    if torch.cuda.is_available() and not arguments.small:
        arguments.device = "cuda"
    names = arguments.sections.split(",") if arguments.sections else DEFAULT
    if arguments.until:
        run_sections(names, arguments, json.loads(arguments.json.read_text()))
        return
    with tempfile.TemporaryDirectory() as folder:
        supervise(names, arguments, arguments.json or Path(folder) / "found.json")


def supervise(names: list[str], arguments: Namespace, path: Path) -> None:
    """Run the sections in another process, and what is left in a new one where that ends."""
    until, found = time.time() + 60 * arguments.minutes, dict[str, Any]()
    own = ["--json", str(path), "--until", str(until), "--device", arguments.device]
    own += ["--small"] if arguments.small else []
    while left := [name for name in names if name not in found]:
        path.write_text(json.dumps(found, indent=1) + "\n")
        command = [sys.executable, "-m", "benchmarks.device", *own, "--sections", ",".join(left)]
        ended = subprocess.run(command, check=False).returncode
        found = json.loads(path.read_text())
        within = next((name for name in left if name not in found), None)
        if within is not None:
            found[within] = _failed(f"the process ended with {ended} within this section")
    path.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, rows in found.items() if any("error" in row for row in rows)]
    print(f"\nwith errors: {', '.join(failed) or 'none'}")


def run_sections(names: list[str], arguments: Namespace, found: dict[str, Any]) -> None:
    """Run sections until the time is over; end early where the GPU is lost, or a section hangs."""
    for name in names:
        start, most = time.time(), LIMITS.get(name, 60)
        arguments.limit = min(most, arguments.until - start)
        print(f"\n== {name}", flush=True)
        try:
            if arguments.limit < 10:
                raise TimeoutError("no time was left")
            faulthandler.dump_traceback_later(arguments.limit, exit=True)
            rows = SECTIONS[name](arguments)
            synchronise(arguments.device)
        except Exception:
            rows = _failed(traceback.format_exc()[-1500:])
        finally:
            faulthandler.cancel_dump_traceback_later()
        for row in rows:
            print("  ", ", ".join(f"{key} {_text(value)}" for key, value in row.items()))
        print(f"   {time.time() - start:.0f} s", flush=True)
        found[name] = rows
        arguments.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
        synchronise(arguments.device)


def _failed(error: str) -> list[Row]:
    return [{"what": "failed", "error": error}]


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--sections", help=f"of {', '.join(SECTIONS)}; default all but the last")
    parser.add_argument("--minutes", type=float, default=9.5, help="that all may take together")
    parser.add_argument("--compile", help="used by the script itself")
    parser.add_argument("--until", type=float, help="likewise")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- problems ------------------------------------------------------------------------------------


def problem(
    n_classes: int, batch: int, width: int, kind: str = "random", seed: int = 0
) -> tuple[Tensor, ...]:
    """x, target, floor, weight, bias, Σ on the CPU, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = normal(width, width) * torch.logspace(0, -2, width, dtype=torch.float64)
    covariance = factor @ factor.T / width + 1e-3 * torch.eye(width, dtype=torch.float64)
    weight, bias = normal(n_classes, width) * 2 / width**0.5, normal(n_classes)
    x, target = normal(batch, width), torch.randint(n_classes, (batch,), generator=generator)
    floor = 12 * torch.rand(batch, generator=generator, dtype=torch.float64) - 2
    if kind == "near":
        # So near that what differences lack in WΣ is held.
        weight[1:] = weight[0] + 1e-6 * normal(n_classes - 1, width)
        floor = floor / 1e5
    elif kind == "twins":
        weight[1], bias[1] = weight[0], bias[0] - 1
    elif kind == "rank":
        factor = normal(width, 3)
        covariance = factor @ factor.T
    elif kind == "line":
        weight = torch.arange(n_classes, dtype=torch.float64).unsqueeze(1) * weight[:1]
    elif kind == "large":
        covariance, weight = covariance * 1e12, weight * 1e-3
    elif kind == "small":
        covariance, weight = covariance * 1e-14, weight * 1e2
    return x, target, floor, weight, bias, covariance


def edit_of(n_classes: int, width: int, device: str, seed: int = 0, **options: Any) -> LRQP:
    _, _, _, weight, bias, covariance = problem(n_classes, 1, width, seed=seed)
    probe = LinearProbe(width, n_classes)
    with torch.no_grad():
        probe.weight.copy_(weight)
        probe.bias.copy_(bias)
    probe = probe.requires_grad_(False).to(device)
    return LRQP(probe, Mahalanobis(covariance.to(device)), **options)


@contextmanager
def operations_only() -> Iterator[None]:
    """Without the kernel."""
    with mock.patch.object(fused, "serves", lambda *_: False):
        yield


# --- compiling beforehand, a process each --------------------------------------------------------


def compile_one(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        if job["layout"]:
            fused.SHAPES[job["K"]] = Shape(*job["layout"])
        run_once(job)
        fused.SHAPES.clear()


def run_once(job: dict[str, Any]) -> None:
    """One tiny launch of a flavour that the sections use."""
    n_classes, width, flavour = job["K"], job.get("width", WIDTH), job["flavour"]
    odds, kind = job.get("odds", "pairwise"), job.get("kind", "random")
    dtype, rows = DTYPES[job["dtype"]], torch.arange(16, device="cuda")
    x, target, floor, *parts = (part.cuda() for part in problem(n_classes, 16, width, kind))
    x = x.to(dtype)
    if flavour == "given":
        ODDS[odds].program(n_classes).solve(x, target, floor, ProbeGeometry.build(*parts))
    elif flavour == "propose":
        edit_of(n_classes, width, "cuda", odds=odds).propose(x, target)
    else:
        site, whole = flavour.removeprefix("every "), flavour.startswith("every ")
        stream = x.unsqueeze(1).repeat(1, 1 if whole else 2, 1)
        residual = None if site == "post" else stream.clone()
        edit: Any = edit_of(n_classes, width, "cuda", odds=odds)
        record = torch.empty(16, 9, dtype=torch.float64, device="cuda"), 0, 0
        if job.get("joint"):
            edit = three_variables(width, "cuda")
            target = torch.tensor([[*WANTED.values()]], device="cuda")
            record = torch.empty(16, 18, dtype=torch.float64, device="cuda"), 0, 0
        places = rows, torch.zeros_like(rows), rows, rows, None
        with torch.no_grad():
            given = StreamRows(stream, residual, 1.0, *places, record, whole)
            edit.edit_stream(given, target.expand(16, -1) if job.get("joint") else target, None)
    torch.cuda.synchronize()


def compiling(arguments: Namespace) -> list[Row]:
    """Fill Triton's cache with what the other sections run, on all cores."""
    if arguments.device != "cuda":
        return []
    asked = arguments.sections.split(",") if arguments.sections else DEFAULT
    jobs: list[dict[str, Any]] = []

    def add(n_classes: int, name: str, flavour: str, **more: Any) -> None:
        jobs.append({"K": n_classes, "dtype": name, "flavour": flavour, "layout": None} | more)

    if "checks" in asked or "promises" in asked:
        for k in CLASSES:
            for name in DTYPES:
                if name in ("float64", "bfloat16") or k in (2, 10, 50):
                    add(k, name, "given")
        for k in (3, 10, 64):
            add(k, "float64", "given", kind="near")
        for k, name in TOTAL:
            add(k, name, "given", odds="total")
            if name == "float64":
                add(k, name, "given", odds="total", kind="near")
    for k in (10, 50):
        add(k, "float32", "propose", odds="total")
    for k, layouts in LAYOUTS.items():
        for name in ("float32", "bfloat16"):
            add(k, name, "propose")
            for layout in layouts if "layouts" in asked else ():
                add(k, name, "propose", layout=astuple(layout))
    for k in (2, 10):
        for site in ("post", "mid") if "models" in asked else ():
            add(k, "float32", site)
            add(k, "bfloat16", site, width=4096)
        for site in ("every post", "every mid") if "generating" in asked else ():
            add(k, "float32", site)
    if "generating" in asked:
        add(10, "float32", "every post", joint=True)
    if "no waiting" in asked:
        add(10, "float32", "mid", joint=True)
        add(10, "float32", "mid", odds="total")
        add(50, "float32", "mid")
    # What takes longest first.
    jobs.sort(key=lambda job: -job["K"] * (3 if "odds" in job else 1))
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.device", "--compile", json.dumps(jobs[i::workers])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(workers)
    ]
    rows: list[Row] = []
    end = time.time() + arguments.limit - 5
    for number, process in enumerate(processes):
        try:
            said, _ = process.communicate(timeout=max(1, end - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = "took too long"
        if process.returncode:
            rows.append({"worker": number, "jobs": jobs[number::workers], "said": said[-1500:]})
    return [{"jobs": len(jobs), "workers": workers}, *rows]


# --- checks --------------------------------------------------------------------------------------


def checks(arguments: Namespace) -> list[Row]:
    """The kernel against operations of torch in float64, and the promise in what it writes."""
    rows: list[Row] = []
    small = arguments.device != "cuda"
    for n_classes in (2, 3) if small else CLASSES:
        for name, dtype in DTYPES.items():
            if not small and name not in ("float64", "bfloat16") and n_classes not in (2, 10, 50):
                continue
            rows.append(
                compared(n_classes, dtype, "random", 8 if small else 1024, arguments.device)
            )
        if n_classes in (2, 3, 10, 64):
            for kind in ("near", "twins", "rank", "line", "large", "small"):
                rows.append(
                    compared(n_classes, torch.float64, kind, 8 if small else 256, arguments.device)
                )
    for n_classes, name in ((3, "float64"),) if small else TOTAL:
        kinds = ("random", "near", "twins", "rank", "line") if name == "float64" else ("random",)
        for kind in kinds:
            given = n_classes, DTYPES[name], kind, 4 if small else 256, arguments.device
            rows.append(compared(*given, odds="total"))
    return rows


def compared(
    n_classes: int,
    dtype: torch.dtype,
    kind: str,
    batch: int,
    device: str,
    odds: str = "pairwise",
) -> Row:
    width = WIDTH if device == "cuda" else 24
    x, target, floor, weight, bias, covariance = (
        part.to(device) for part in problem(n_classes, batch, width, kind)
    )
    geometry, qp, x = (
        ProbeGeometry.build(weight, bias, covariance),
        ODDS[odds].program(n_classes),
        x.to(dtype),
    )
    start = time.perf_counter()
    ours = qp.solve(x, target, floor, geometry)
    synchronise(device)
    took = time.perf_counter() - start
    cpu = [part.cpu() for part in (x, target, floor, weight, bias, covariance)]
    with operations_only():
        other = qp.solve(*cpu[:3], ProbeGeometry.build(*cpu[3:]))
    both = (ours.status.cpu() == Status.SOLVED) & (other.status == Status.SOLVED)
    distance = (ours.distance.cpu() / other.distance - 1).abs()[both]
    done = ours.status == Status.SOLVED
    read = qp.solver.read(geometry.margins(ours.x_new, target)).amin(-1)
    other_status = (ours.status.cpu() != other.status).sum()
    return {
        "K": n_classes,
        "odds": odds,
        "dtype": str(dtype).removeprefix("torch."),
        "kind": kind,
        "solved": int(done.sum()),
        "other status": int(other_status),
        "pairs": str(
            sorted(
                {
                    (int(a), int(b))
                    for a, b in zip(ours.status.tolist(), other.status.tolist(), strict=True)
                    if a != b
                }
            )
        ),
        "broken": int((ours.log_odds_after < ours.floor)[done].sum()),
        "read back less": float((floor - read)[done].clamp_min(0).max())
        if int(done.sum())
        else 0.0,
        "distance off": float(distance.max()) if len(distance) else 0.0,
        "residual": float(ours.kkt_residual[done].max()) if int(done.sum()) else 0.0,
        "s": took,
    }


def promises(arguments: Namespace) -> list[Row]:
    """Many rows: no certificate below its floor."""
    rows: list[Row] = []
    for n_classes, name in ((2, "bfloat16"), (10, "bfloat16"), (10, "float32"), (50, "bfloat16")):
        batch, width = (100_000, WIDTH) if arguments.device == "cuda" else (16, 24)
        x, target, floor, weight, bias, covariance = (
            part.to(arguments.device) for part in problem(n_classes, batch, width, seed=1)
        )
        geometry = ProbeGeometry.build(weight, bias, covariance)
        solution = MahalanobisQP(n_classes).solve(x.to(DTYPES[name]), target, floor, geometry)
        done = solution.status == Status.SOLVED
        read = geometry.margins(solution.x_new, target).amin(-1)
        counts = solution.status.bincount(minlength=5).tolist()
        rows.append(
            {
                "K": n_classes,
                "dtype": name,
                "rows": batch,
                "statuses": counts,
                "broken": int((solution.log_odds_after < solution.floor)[done].sum()),
                "read back less": float((floor - read)[done].max()),
            }
        )
    return rows


def no_waiting(arguments: Namespace) -> list[Row]:
    """Nothing in an edit waits for the device, and it can be captured in a CUDA graph."""
    if arguments.device != "cuda":
        return []
    rows: list[Row] = []
    for n_classes, odds in ((2, "pairwise"), (10, "pairwise"), (50, "pairwise"), (10, "total")):
        edit = edit_of(n_classes, WIDTH, "cuda", odds=odds)
        x, target, *_ = (part.cuda() for part in problem(n_classes, 64, WIDTH))
        x = x.float()
        model, ids = gpt2("cuda"), torch.randint(1000, (8, 16), device="cuda")
        row: Row = {"K": n_classes, "odds": odds}
        edit.propose(x, target)
        row["propose"] = tried(lambda: edit.propose(x, target))  # noqa: B023
        positions = torch.full((8,), 3)

        def passed() -> None:
            with edit.at(model, "L6.mid", positions=positions, target=1), torch.no_grad():  # noqa: B023
                model(ids)  # noqa: B023
                synced(lambda: model(ids))  # noqa: B023

        row["pass in an open context"] = tried(passed, quiet=False)
        row["captured"] = tried(lambda: captured(lambda: edit.propose(x, target))(), quiet=False)  # noqa: B023
        rows.append(row)
    return [*rows, joint_edit(gpt2("cuda"))]


def joint_edit(model: Any) -> Row:
    """The same of an edit of several variables, and what it adds to a pass."""
    joint = three_variables(WIDTH, "cuda")
    ids, other = torch.randint(1000, (16, 64), device="cuda"), twin(model)
    row: Row = {"variables": 3}
    where: dict[str, Any] = {"positions": torch.full((16,), 3)}
    with joint.at(other, "L6.mid", target=WANTED, **where), torch.no_grad():
        other(ids)
        row["pass in an open context"] = tried(lambda: other(ids))
        row["added µs"], row["of"] = added(lambda: model(ids), lambda: other(ids), 20, "cuda")
    return row


def three_variables(width: int, device: str) -> JointLRQP:
    """An edit of variables of 2, 3 and 5 classes."""
    metric = edit_of(2, width, device).metric
    edits = {str(k): LRQP(edit_of(k, width, device, k).probe, metric) for k in (2, 3, 5)}
    return JointLRQP(edits, within={"3": 0.5}, on_infeasible="skip")


WANTED = {"2": 1, "3": JointLRQP.KEEP, "5": 2}
"""What is written of them, and kept."""


def synced(run: Callable[[], Any]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tried(run: Callable[[], Any], quiet: bool = True) -> str:
    try:
        synced(run) if quiet else run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "yes"


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The same as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- times ---------------------------------------------------------------------------------------


def microseconds(run: Callable[[], Any], repeats: int = 20, inner: int = 5) -> float:
    """Median time of a call on the GPU by events, or on the host's clock on a CPU."""
    run()
    if not torch.cuda.is_available():
        return 1e6 * median(seconds(run, 1) for _ in range(3))
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / inner)
    return median(times)


def seconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def hosted(run: Callable[[], Any], times: int = 200) -> float:
    """Microseconds of the host for a call that is not waited for."""
    run()
    values = []
    for _ in range(5):
        synchronise("cuda" if torch.cuda.is_available() else "cpu")
        values.append(seconds(run, times))
    return 1e6 * median(values)


def proposing(arguments: Namespace) -> list[Row]:
    """``propose`` in a CUDA graph, eagerly, and its bare products."""
    rows: list[Row] = []
    gpu = arguments.device == "cuda"
    for n_classes in (2, 10, 50) if gpu else (2, 3):
        for batch in (16, 1024, 16384) if gpu else (4,):
            for name in ("float32", "bfloat16"):
                width = WIDTH if gpu else 24
                edit = edit_of(n_classes, width, arguments.device)
                x, target, *_ = (
                    part.to(arguments.device) for part in problem(n_classes, batch, width)
                )
                x = x.to(DTYPES[name])
                products = bare_products(x, edit.geometry(x.device))
                row = {"K": n_classes, "B": batch, "dtype": name}
                row["eager µs"] = microseconds(lambda: edit.propose(x, target))  # noqa: B023
                if gpu:
                    row["graph µs"] = microseconds(
                        captured(lambda: edit.propose(x, target))  # noqa: B023
                    )
                    row["products in a graph µs"] = microseconds(captured(products))
                    row["host µs"] = hosted(lambda: edit.propose(x, target), 50)  # noqa: B023
                rows.append(row)
    for n_classes, batch in ((10, 16), (10, 1024), (50, 1024)) if gpu else ():
        edit = edit_of(n_classes, WIDTH, "cuda", odds="total")
        x, target, *_ = (part.cuda() for part in problem(n_classes, batch, WIDTH))
        x = x.float()
        row = {"K": n_classes, "odds": "total", "B": batch, "dtype": "float32"}
        row["graph µs"] = microseconds(captured(lambda: edit.propose(x, target)))  # noqa: B023
        rows.append(row)
    return rows


def bare_products(x: Tensor, geometry: ProbeGeometry) -> Callable[[], Tensor]:
    """(B, d)(d, K) and back, in the dtype of x."""
    weight, steering = geometry.weight.to(x.dtype), geometry.steering.to(x.dtype)
    return lambda: x + (x @ weight.T) @ steering


def layouts(arguments: Namespace) -> list[Row]:
    """The kernel in several layouts, in a CUDA graph."""
    if arguments.device != "cuda":
        return []
    rows: list[Row] = []
    for n_classes, tried_ones in LAYOUTS.items():
        x, target, *_ = (part.cuda() for part in problem(n_classes, 16384, WIDTH))
        first: dict[str, Solution] = {}
        for layout in tried_ones:
            fused.SHAPES[n_classes] = layout
            row: Row = {"K": n_classes, "layout": str(astuple(layout))}
            try:
                for name, batches in (("float32", (16, 1024, 16384)), ("bfloat16", (16, 1024))):
                    edit, inputs = edit_of(n_classes, WIDTH, "cuda"), x.to(DTYPES[name])
                    for batch in batches:
                        some, classes = inputs[:batch], target[:batch]
                        row[f"{name} B={batch} µs"] = microseconds(
                            captured(lambda: edit.propose(some, classes)),  # noqa: B023
                            repeats=10,
                            inner=3,
                        )
                    solution = edit.propose(inputs[:1024], target[:1024])
                    first.setdefault(name, solution)
                    row[f"{name} as the first"] = bool(
                        torch.equal(solution.status, first[name].status)
                        and torch.allclose(solution.distance, first[name].distance, rtol=1e-3)
                        and (solution.log_odds_after >= solution.floor).all()
                    )
            except Exception as error:
                row["error"] = str(error)[:200]
            print("  ", row, flush=True)
            rows.append(row)
            fused.SHAPES.clear()
    return rows


def only_launcher(edit: LRQP) -> Launcher:
    geometry = edit.geometry(edit.probe.weight.device)
    (found,) = vars(geometry)["launchers"].values()
    return found


def launching(arguments: Namespace) -> list[Row]:
    """What a launch costs the host: prepared, by Triton, as an operator; and its surroundings."""
    if arguments.device != "cuda":
        return []
    edit = edit_of(2, WIDTH, "cuda")
    x, target, *_ = (part.cuda() for part in problem(2, 1, WIDTH))
    x = x.float()
    out, geometry = torch.empty_like(x), edit.geometry(x.device)
    live = edit.probe.weight, edit.probe.bias
    launch = fused.launcher(geometry, "mirror", False, live)

    def direct() -> None:
        launch(x, out, target, count=1, floors=edit.log_odds, copy=True)

    direct()
    run, function, metadata, fixed, constants = next(iter(launch.compiled.values()))
    held: list[Any] = []
    with (
        mock.patch.object(launch, "_first", lambda *given: held.append(given)),
        mock.patch.object(launch, "compiled", {}),
    ):
        direct()
    tensors, numbers = held[0][:2]
    stream = torch.cuda.current_stream().cuda_stream
    pointers = [tensor.data_ptr() for tensor in tensors]
    own = fused.BEFORE_CONSTANTS
    given = (*pointers[:own], *fixed, *pointers[own:], *numbers, *constants)

    def bare() -> None:
        run(1, 1, 1, stream, function, metadata, None, None, None, *given)

    @torch.library.custom_op("lrqp_bench::direct", mutates_args=("out",))
    def custom(x: Tensor, out: Tensor) -> None:
        direct()

    scratch = torch.empty(8, device="cuda")
    return [
        {"what": name, "host µs": hosted(run)}
        for name, run in {
            "the compiled kernel itself": bare,
            "prepared launcher, with certificate": direct,
            "as a custom operator": lambda: custom(x, out),
            "propose": lambda: edit.propose(x, target),
            "an operation of torch": lambda: scratch.add_(1),
            "an empty tensor": lambda: torch.empty_like(x),
        }.items()
    ]


# --- models --------------------------------------------------------------------------------------


def gpt2(device: str, layers: int = 12, width: int = WIDTH) -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64 or 1)
    with torch.device(device):
        return GPT2LMHeadModel(config).eval().requires_grad_(False)


def llama(device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def in_turns(
    alternatives: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    times = turns(alternatives, rounds, device)
    return {name: median(values) for name, values in times.items()}


def turns(
    alternatives: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each in every round but the first three."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 3):
            for name, run in alternatives.items():
                synchronise(device)
                start = time.perf_counter()
                run()
                synchronise(device)
                if number >= 3:
                    times[name].append(1e3 * (time.perf_counter() - start))
    finally:
        gc.enable()
    return times


def added(
    bare: Callable[[], Any], other: Callable[[], Any], rounds: int, device: str
) -> tuple[float, str]:
    """The median of what the other takes longer, pair by pair, in µs, and its quartiles."""
    times = turns({"bare": bare, "other": other}, rounds, device)
    differences = [1e3 * (b - a) for a, b in zip(times["bare"], times["other"], strict=True)]
    low, middle, high = quantiles(differences, n=4)
    return middle, f"{low:.0f} to {high:.0f}"


def twin(model: Any) -> Any:
    """The same model once more, with the same weights, for hooks of its own."""
    kept = [*model.parameters(), *model.buffers()]
    made = copy.deepcopy(model, {id(part): part for part in kept})
    # What transformers compiled for generation is the first model's own, also in its copy.
    vars(made).pop("_compiled_call", None)
    return made


def model_passes(arguments: Namespace) -> list[Row]:
    gpu = arguments.device == "cuda"
    rows = passes_of(
        "GPT-2 small" if gpu else "GPT-2 tiny",
        gpt2(arguments.device) if gpu else gpt2("cpu", 2, 64),
        (16, 64) if gpu else (2, 8),
        arguments,
        100 if gpu else 3,
    )
    if gpu:
        rows += passes_of("Llama-8B's shape, bf16", llama("cuda"), (16, 64), arguments, 20)
        torch.cuda.empty_cache()
    return rows


def passes_of(
    name: str, model: Any, shape: tuple[int, int], arguments: Namespace, rounds: int
) -> list[Row]:
    """A pass with one edit at the middle block, against a bare pass beside it."""
    device, other = arguments.device, twin(model)
    width, layer = model.config.hidden_size, model.config.num_hidden_layers // 2
    batch, length = shape
    ids = torch.randint(1000, (batch, length), device=device)
    positions = torch.full((batch,), length // 2)
    bare: Callable[[], Any] = torch.no_grad()(lambda: model(ids, use_cache=False))
    edited: Callable[[], Any] = torch.no_grad()(lambda: other(ids, use_cache=False))

    def row(what: str, n_classes: int | None = None) -> Row:
        middle, quartiles = added(bare, edited, rounds, device)
        return {"model": name, "what": what, "K": n_classes, "added µs": middle, "of": quartiles}

    rows: list[Row] = [
        {"model": name, "what": "bare, ms", "ms": in_turns({"bare": bare}, rounds, device)["bare"]},
        row("the twin itself"),
    ]
    vector = torch.randn(width, device=device, dtype=model.dtype)
    with vector_hook(other, layer, vector, positions):
        rows.append(row("a hook that adds a vector"))
    for n_classes in (2, 10):
        edit = edit_of(n_classes, width, device)
        where = {"positions": positions, "target": torch.zeros(batch, dtype=torch.long).to(device)}
        for site in (f"L{layer}.post", f"L{layer}.mid"):
            with edit.at(other, site, **where):
                rows.append(row(f"in an open context, {site}", n_classes))
                if device == "cuda":
                    rows.append(replayed(name, bare, edited, site, n_classes))

        def whole() -> None:
            with edit.at(other, site, **where):  # noqa: B023
                edited()

        middle, quartiles = added(bare, whole, rounds, device)
        rows.append(
            {
                "model": name,
                "what": "context and pass, mid",
                "K": n_classes,
                "added µs": middle,
                "of": quartiles,
            }
        )
    return rows


def replayed(
    name: str, bare: Callable[[], Any], edited: Callable[[], Any], site: str, n_classes: int
) -> Row:
    """Both passes as CUDA graphs: what the edit takes of the GPU."""
    row: Row = {"model": name, "what": f"pass as a graph, {site}", "K": n_classes}
    try:
        alone, together = captured(bare), captured(edited)
        alone_took, took = microseconds(alone), microseconds(together)
        return row | {"bare µs": alone_took, "added µs": took - alone_took}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:200]}"}


@torch.no_grad()
def generating(arguments: Namespace) -> list[Row]:
    """What an edit of every generated token adds to a token, 8 requests, token by token in turns
    with a bare model's.
    """
    gpu, device = arguments.device == "cuda", arguments.device
    model = gpt2(device) if gpu else gpt2("cpu", 2, 64)
    rounds, width, layer = 150 if gpu else 4, model.config.hidden_size, model.config.n_layer // 2
    prompt = torch.randint(1000, (8, 16), device=device)
    new, other = prompt[:, -1:], twin(model)
    assert 2 * (len(prompt[0]) + rounds) < model.config.n_positions

    def decoder(one: Any) -> Callable[[], Any]:
        """Reads one token more each time, behind a prompt that it has read."""
        cache = DynamicCache(config=one.config)
        one(prompt, past_key_values=cache, use_cache=True)
        return lambda: one(new, past_key_values=cache, use_cache=True)

    def fixed(one: Any) -> Callable[[], Any]:
        """The same of one shape, for a CUDA graph: each replay reads a further token."""
        cache = StaticCache(config=one.config, max_cache_len=512)
        one(prompt, past_key_values=cache, use_cache=True)
        return lambda: one(new, past_key_values=cache, use_cache=True)

    def row(what: str, **more: Any) -> Row:
        middle, quartiles = added(decoder(model), decoder(other), rounds, device)
        return {"what": f"added a token, {what}", **more, "µs": middle, "of": quartiles}

    bare = in_turns({"bare": decoder(model)}, rounds, device)["bare"]
    rows: list[Row] = [{"what": "bare, ms a token", "ms": bare}]
    with vector_hook(other, layer, torch.randn(width, device=device), 0):
        rows.append(row("a hook that adds a vector"))
    for n_classes in (2, 10):
        edit = edit_of(n_classes, width, device)
        for site in (f"L{layer}.post", f"L{layer}.mid"):
            with edit.at(other, site, positions="generated", target=1):
                rows.append(row(site, K=n_classes))
            if gpu:
                with edit.at(other, site, positions="generated", target=1):
                    tokens = fixed(model), fixed(other)
                    rows.append(replayed("a token, static cache", *tokens, site, n_classes))
    with three_variables(width, device).at(
        other, f"L{layer}.post", positions="generated", target=WANTED
    ):
        rows.append(row(f"L{layer}.post", variables=len(WANTED)))
    return rows


@torch.no_grad()
def compiled(arguments: Namespace) -> list[Row]:
    """What an edit adds to a pass of a compiled model, in whose graph it is, and whether it is the
    same as without compilation; likewise of generation that compiles itself.
    """
    gpu, rows = arguments.device == "cuda", list[Row]()
    model: Any = gpt2(arguments.device, 4, WIDTH) if gpu else gpt2("cpu", 2, 64)
    batch, length, site = (16, 64, "L2.mid") if gpu else (2, 8, "L1.mid")
    ids = torch.randint(1000, (batch, length), device=arguments.device)
    edit = edit_of(2, model.config.hidden_size, arguments.device)
    where: dict[str, Any] = {"positions": torch.full((batch,), length // 2), "target": 1}
    with edit.at(model, site, **where) as run:
        wanted, distance = model(ids, use_cache=False).logits, run.distance
    modes = (None, "reduce-overhead") if gpu else (None,)
    for mode in modes:
        torch.compiler.reset()
        row: Row = {"what": f"mode {mode or 'default'}"}
        rows.append(row)
        plain: Any = torch.compile(twin(model), mode=mode, fullgraph=True)
        other: Any = torch.compile(twin(model), mode=mode, fullgraph=True)

        def bare() -> Any:
            return plain(ids, use_cache=False)  # noqa: B023

        def edited() -> Any:
            return other(ids, use_cache=False)  # noqa: B023

        try:
            with edit.at(other, site, **where) as run:
                for _ in range(3):
                    found = edited().logits
                row["largest logit difference"] = float((found - wanted).abs().max())
                row["largest distance difference"] = float((run.distance - distance).abs().max())
                before = dict(torch._dynamo.utils.counters["stats"])
                rounds = 50 if gpu else 2
                row["added µs"], row["of"] = added(bare, edited, rounds, arguments.device)
                row["bare ms"] = in_turns({"bare": bare}, rounds, arguments.device)["bare"]
            with edit.at(other, site, **where):
                edited()
            after = torch._dynamo.utils.counters["stats"]
            # The bare model makes its one graph meanwhile, the edited one none for a new context.
            row["graphs for a new context"] = (
                after["unique_graphs"] - before.get("unique_graphs", 0) - 1
            )
            row["unedited outside"] = bool(
                # A graph's output is written over by the next run.
                (edited().logits.clone() - bare().logits).abs().max() < 1e-3 * wanted.abs().max()
            )
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    if not gpu:
        return rows
    row = {"what": "generation with a static cache"}
    rows.append(row)
    torch.compiler.reset()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    options: dict[str, Any] = {
        "max_new_tokens": 32,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    try:
        with edit.at(model, site, positions="generated", target=1) as run:
            wanted, distance = model.generate(ids, **options), run.distance
        static = {**options, "cache_implementation": "static"}
        with edit.at(model, site, positions="generated", target=1) as run:
            found = model.generate(ids, **static)
            row["same tokens"] = float((found == wanted).double().mean())
            row["every token edited"] = len(run.distance) == len(distance)
            other = twin(model)
            model.generate(ids, **static)

            def generate() -> Any:
                return model.generate(ids, **static)

            def generate_bare() -> Any:
                return other.generate(ids, **static)

            generate_bare()
            middle, row["of"] = added(generate_bare, generate, 5, arguments.device)
            row["added µs a token"] = middle / 32
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return rows


def probe_fits(arguments: Namespace) -> list[Row]:
    """24 probes together and one by one."""
    gpu = arguments.device == "cuda"
    n, d = (1000, WIDTH) if gpu else (60, 8)
    xs = torch.randn(24 if gpu else 3, n, d, device=arguments.device)
    noise = torch.randn(xs.shape[:2], device=arguments.device)
    problems = {i: (x, (x[:, 0] + noise[i] > 0).long()) for i, x in enumerate(xs)}
    times = in_turns(
        {
            "together": lambda: LinearProbe.fit_many(problems, l2=1.0),
            "one by one": lambda: [LinearProbe.fit(*one, l2=1.0) for one in problems.values()],
        },
        2,
        arguments.device,
    )
    return [{**times, "ratio": times["one by one"] / times["together"]}]


def tests(arguments: Namespace) -> list[Row]:
    """The tests of what runs on a GPU, several at a time."""
    folder = Path(__file__).parents[1] / "tests"
    command = [sys.executable, "-m", "pytest", *(str(folder / name) for name in TESTS)]
    command += ["-v", "--tb=line", "--durations=5"]
    if importlib.util.find_spec("xdist") is not None:
        workers = max(1, min(12, (os.cpu_count() or 2) - 1))
        command += ["--numprocesses", str(workers), "--dist", "worksteal"]
    process = subprocess.Popen(
        [*command, *(["--collect-only"] if arguments.small else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder.parent,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=arguments.limit - 8)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0] + "\ntook too long"
    lines = said.splitlines()
    failed = [line for line in lines if "FAILED" in line or "ERROR" in line]
    row: Row = {"what": "tests", "said": "\n".join(lines[-20:])}
    return [row | ({"error": "\n".join(failed[:100])} if process.returncode else {})]


Section = Callable[[Namespace], list[Row]]
SECTIONS: dict[str, Section] = {
    "compiling": compiling,
    "checks": checks,
    "promises": promises,
    "no waiting": no_waiting,
    "launching": launching,
    "proposing": proposing,
    "models": model_passes,
    "generating": generating,
    "probe fits": probe_fits,
    "tests": tests,
    "compiled": compiled,
    "layouts": layouts,
}
DEFAULT = [name for name in SECTIONS if name != "layouts"]

if __name__ == "__main__":
    main()
