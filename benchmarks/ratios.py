"""What an edit costs, over what it cannot cost less than and over other libraries, against aims.

    python -m benchmarks.ratios --json results/ratios.json

The figures are medians of one run of the other benchmarks, at sizes that take some five minutes on
two cores. An aim in × is held against the ratio, one in a unit against our own figure, whatever the
machine is: the ratio beside it says how fast that is. On a GPU it prints those of
``benchmarks.device``.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, simplefilter

import torch

from benchmarks import device, end_to_end, growth, hooks, probes, qp, replay
from benchmarks.hook_peers import PEERS as PEERS_IN_MODELS
from benchmarks.measure import Row, medians, parse_arguments, report, version_of
from benchmarks.qp_peers import METHODS, OURS, Method
from benchmarks.qp_problem import LOG_ODDS, QPProblem
from lrqp_torch import LRQP, JointLRQP, LinearProbe, Mahalanobis
from lrqp_torch.errors import MissingExtraError
from lrqp_torch.study.settings import Settings

SIZES = [(k, b) for k in (2, 10, 20, 50, 100) for b in (1, 32, 1024, 16384)]
SMALL_SIZES = [(2, 8), (3, 8)]
PRODUCTS = {2: 2.0, 10: 5.0, 20: 7.0, 50: 7.0, 100: 7.0}
"""K to how many times the bare products an edit of 1,024 activations may take."""
PEERS = ("quadprog", "moreau", "qpth")
EXAMPLES = 128
"""So many are timed of solvers that take long an example."""
LENS = 1000
"""Classes of a probe for next tokens."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    if torch.cuda.is_available() and not arguments.small:
        arguments.device = "cuda"
    sections = SECTIONS if arguments.device == "cpu" else {"device": on_a_gpu}
    rows: list[Row] = []
    with catch_warnings():
        simplefilter("ignore")  # of peers, and of random labels
        for name in arguments.sections.split(",") if arguments.sections else sections:
            rows += sections[name](arguments)
    reached = [row["reached"] for row in rows if row["reached"] is not None]
    report(
        f"Ratios against aims: {reached.count('yes')} of {len(reached)} reached",
        rows,
        arguments,
        versions={
            name: version_of(name)
            for name in ("lrqp_torch", "transformers", "pyvene", "nnsight", "scikit-learn")
        },
    )


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--sections", help=f"of {', '.join(SECTIONS)}; default all")


def ratio(
    what: str,
    ours: float | None = None,
    against: str | None = None,
    other: float | None = None,
    *,
    aim: float | None = None,
    unit: str = "µs",
    over: bool = True,
) -> Row:
    """A line: our figure and the other's, both in one unit, and whether the aim is reached.

    Args:
        what: was measured.
        ours: None where it could not be.
        against: what it is held against.
        other: its figure, None where there is none.
        aim: at most so much.
        unit: of both figures.
        over: whether the aim is of the ratio; else of our figure.
    """
    share = None if ours is None or not other else ours / other
    held = share if over else ours
    return {
        "what": what,
        "ours": ours,
        "against": against,
        "other": other,
        "unit": unit,
        "ratio": share,
        "aim": None if aim is None else f"≤ {aim:g} {'×' if over else unit}",
        "reached": None if aim is None or held is None else "yes" if held <= aim else "no",
    }


def _with(arguments: Namespace, **changed: Any) -> Namespace:
    found = copy(arguments)
    vars(found).update(changed)
    return found


def _method(package: str) -> Method:
    return next(method for method in METHODS if method.packages == (package,))


def edit_of(problem: QPProblem) -> LRQP:
    """The edit that solves a problem of :mod:`benchmarks.qp_problem`."""
    count, width = problem.weight.shape
    probe = LinearProbe(width, count, dtype=torch.float64)
    with torch.no_grad():
        probe.weight.copy_(problem.weight)
        probe.bias.copy_(problem.bias)
    metric = Mahalanobis(problem.covariance)
    return LRQP(probe.requires_grad_(False), metric, rule="fixed", log_odds=LOG_ODDS)


@torch.no_grad()
def one_at_a_time(arguments: Namespace) -> list[Row]:
    """``edit.solve`` of one activation."""
    rows = []
    for n_classes, aim in ((2, 40.0), (10, 150.0)):
        problem = QPProblem.random(1, n_classes, 768, "cpu")
        edit, x, target = edit_of(problem), problem.x.float(), problem.target
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: edit.solve(x, target),  # noqa: B023
            "an addition of torch": lambda: x + x,  # noqa: B023
        }
        what = f"edit.solve, K = {n_classes}, B = 1"
        if find_spec("quadprog"):
            solve, wide = _method("quadprog").prepare(problem), problem.x
            ways["quadprog, all told"] = lambda: solve(wide)  # noqa: B023
        else:
            rows.append(ratio(what, against="quadprog: not installed: pip install quadprog"))
        times = medians(ways, arguments.repeats, "cpu", calls=5 if arguments.small else 100)
        ours, addition, *others = (1e6 * value for value in times.values())
        rows.append(ratio(what, ours, list(ways)[1], addition, aim=aim, over=False))
        rows += [ratio(what, ours, list(ways)[2], other, aim=1) for other in others]
    # The last two problems have one Σ.
    alone = edit_of(QPProblem.random(1, 2, 768, "cpu"))
    parts: dict[str, Any] = {"first": alone, "second": edit.probe}
    joint = JointLRQP(parts)
    targets: dict[str, Any] = {"first": 1, "second": target}
    ways = {
        "both": lambda: joint.solve(x, targets),
        "alone": lambda: alone.solve(x, 1),
    }
    times = medians(ways, arguments.repeats, "cpu", calls=5 if arguments.small else 100)
    both, one = (1e6 * value for value in times.values())
    rows.append(ratio("JointLRQP of K = 2 and 10, solve, B = 1", both, "K = 2 alone", one))
    return rows


def in_a_model(arguments: Namespace) -> list[Row]:
    """Hooks, contexts and what other libraries take for an addition."""
    rows: list[Row] = []
    for name, repeats in (("tiny", 10), ("gpt2-shape", 1)):
        if arguments.small and name != "tiny":
            continue
        own = _with(arguments, length=8, seconds=8.0, steering_vectors_python=None)
        own.repeats = 2 if arguments.small else repeats * min(arguments.repeats, 7)
        # What a context adds to a pass of 150 ms is less than its noise.
        peers = PEERS_IN_MODELS if name == "tiny" else ()
        found = hooks.measure(name, *hooks._load(name, "cpu"), 4, own, peers)
        by = {row["what"]: row for row in found}
        bare, lrqp, added = by[hooks.BARE_HOOK], by[hooks.OURS], by[hooks.ADDITION]
        where, inside, around = f", {name}, 4 × 8 tokens", "in the hooks, µs", hooks.AROUND
        plain = "a bare hook that adds a vector"
        rows += [
            ratio(f"hook of JointLRQP, 2 × 2{where}", by[hooks.JOINT][inside], plain, bare[inside]),
            ratio(
                f"hook K = 2{where}", lrqp[inside], plain, bare[inside], aim=80.0, over=False
            ),
            # 30 µs more than the bare hook.
            ratio(
                f"lambda{where}", added[inside], plain, bare[inside],
                aim=round(bare[inside] + 30), over=False,
            ),
            ratio(
                f"opening and closing, lambda{where}", added[around], "setting and removing a hook",
                bare[around], aim=100.0, over=False,
            ),
            ratio(
                f"opening and closing, K = 2{where}", lrqp[around], "setting and removing a hook",
                bare[around], aim=100.0, over=False,
            ),
        ]  # fmt: skip
        ours = _over_bare(lrqp)
        for row in found[len(hooks.CONTEXTS) + 1 :]:
            peer = row["what"]
            if row["milliseconds"] is None:
                if peer.startswith(("pyvene", "nnsight")):
                    rows.append(ratio(f"context and pass, K = 2{where}", against=peer))
                continue
            for what, taken in (("K = 2", ours), ("lambda", _over_bare(added))):
                rows.append(
                    ratio(f"context and pass, {what}{where}", taken, peer, _over_bare(row), aim=1)
                )
    return rows


def _over_bare(row: Row) -> float:
    """µs that a pass takes longer with a context that is opened for it."""
    share: float = row["over bare, %"] / 100
    taken: float = 1e3 * row["milliseconds"]
    return taken * share / (1 + share)


def batches(arguments: Namespace) -> list[Row]:
    """The quadratic program at all sizes: bare products, derivatives, other solvers."""
    peers = [_method(package) for package in PEERS]
    methods = [_method_ours(), *(replace(p, examples=min(p.examples, EXAMPLES)) for p in peers)]
    own = _with(arguments, width=24 if arguments.small else 768, seconds=0.03)
    own.repeats = 2 if arguments.small else 3
    found: list[Row] = []
    for n_classes, batch in SMALL_SIZES if arguments.small else SIZES:
        found += qp.measure(batch, n_classes, False, own, methods)
    sizes = list(dict.fromkeys((row["K"], row["B"]) for row in found))

    def row_of(name: str, size: tuple[int, int]) -> Row:
        (row,) = (r for r in found if r["method"] == name and (r["K"], r["B"]) == size)
        return row

    rows = []
    for size in sizes:
        if size[1] == 1024 or arguments.small:
            ours = row_of(OURS, size)
            rows.append(
                ratio(
                    f"B = {size[1]:,}, float64, K = {size[0]}", ours["µs each"], "bare products",
                    row_of(qp.BARE, size)["µs each"], aim=PRODUCTS.get(size[0], 7.0),
                )
            )  # fmt: skip
    backward = []
    for size in sizes:
        ours = row_of(OURS, size)
        alone = ours["forward, ms"]
        backward.append((1e3 * (ours["both, ms"] - alone), 1e3 * alone, size))
    for batch in dict.fromkeys(size[1] for size in sizes):
        mine, alone, size = max((each for each in backward if each[2][1] == batch), key=_quotient)
        where = f"B = {batch:,}, slowest K = {size[0]}"
        rows.append(ratio(f"backward, {where}", mine, "forward", alone, aim=2.5))
    for method in peers:
        if not all(find_spec(package) for package in method.packages):
            missing = f"{method.name}: not installed: pip install {method.install}"
            rows.append(ratio("any K and B", against=missing))
            continue
        for kind, key in (("forward", "forward, ms"), ("with its gradient", "both, ms")):
            each = []
            for size in sizes:
                other, ours = row_of(method.name, size), row_of(OURS, size)
                count = size[1]
                each.append((1e3 * ours[key] / count, 1e3 * other[key] / other["timed"], size))
            mine, theirs, size = max(each, key=_quotient)
            where = f"worst of {len(each)} sizes, K = {size[0]}, B = {size[1]:,}"
            rows.append(ratio(f"{kind}, {where}", mine, method.name, theirs, aim=1))
    return rows


def _method_ours() -> Method:
    return next(method for method in METHODS if method.name == OURS)


def _quotient(each: tuple[float, float, Any]) -> float:
    return each[0] / each[1]


@torch.no_grad()
def narrow(arguments: Namespace) -> list[Row]:
    """Half precision over float32."""
    rows = []
    for n_classes in (2, 10, 50):
        problem = QPProblem.random(32 if arguments.small else 1024, n_classes, 768, "cpu")
        edit, target = edit_of(problem), problem.target
        inputs = {kind: problem.x.to(kind) for kind in (torch.float32, torch.bfloat16, torch.half)}
        ways = {str(kind)[6:]: _solving(edit, x, target) for kind, x in inputs.items()}
        times = medians(ways, arguments.repeats, "cpu", seconds=1.0)
        wide, *others = (1e6 * value for value in times.values())
        rows += [
            ratio(f"{name}, K = {n_classes}, B = {len(target):,}", other, "float32", wide, aim=2)
            for name, other in zip(list(ways)[1:], others, strict=True)
        ]
    return rows


def _solving(edit: LRQP, x: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
    return lambda: edit.solve(x, target)


def many_classes(arguments: Namespace) -> list[Row]:
    """A probe of many classes: set up, and one activation solved."""
    size = growth.Size(classes=50 if arguments.small else LENS, width=768)
    seconds, peak = growth.apart(lambda place: growth._set_up(size, place), arguments)
    what = f"set up and one activation, K = {size.classes}"
    return [
        ratio(f"{what}, time", seconds, aim=1, unit="s", over=False),
        ratio(f"{what}, memory", peak, aim=200, unit="MiB", over=False),
    ]


def metrics(arguments: Namespace) -> list[Row]:
    """Covariances and saved edits."""
    rows = []
    own = _with(arguments, repeats=min(arguments.repeats, 5))
    for width in (64,) if arguments.small else (576, 2048):
        for batch in (1, 64, 1024):
            row = probes.accumulating(batch, width, own)
            rows.append(
                ratio(
                    f"Covariance.update of {batch:,}, d = {width:,}", row["update, ms"], "addmm_",
                    row["addmm_, ms"], aim=1.5, unit="ms",
                )
            )  # fmt: skip
    width = 64 if arguments.small else 4096
    row = probes.loading(width, own)
    for name, key, aim in (
        ("loading", "load, ms", 100),
        ("loading and a solve", "load and solve, ms", 100),
        ("keeping", "keeping, ms", 1000),
    ):
        rows.append(ratio(f"{name}, d = {width:,}", row[key], aim=aim, unit="ms", over=False))
    return rows


def fits(arguments: Namespace) -> list[Row]:
    """A probe's fit over scikit-learn's fastest that reaches the same loss."""
    n, width = (60, 8) if arguments.small else (1000, 576)
    found, labels = probes.activations(2, n, width, "cpu")
    own = _with(arguments, all=False, repeats=min(arguments.repeats, 5))
    ours, *others = probes.beside_peers(found["L1.mid"], labels, own)
    what = f"LinearProbe.fit, K = 2, n = {n:,}, d = {width}"
    if not find_spec("sklearn"):
        return [ratio(what, against="scikit-learn: not installed: pip install scikit-learn")]
    equal = [row for row in others if row["loss above ours"] <= probes.EQUAL]
    best = min(equal, key=lambda row: float(row["ms"]), default={"fitted": "none of its solvers"})
    return [ratio(what, ours["ms"], best["fitted"], best.get("ms"), aim=1, unit="ms")]


def replaying(arguments: Namespace) -> list[Row]:
    """A replayed edit over the passes that no program could avoid."""
    name = "tiny" if arguments.small else "gpt2-small"
    own = _with(arguments, batch=4, length=60, suffix=8, small=True)
    own.repeats = min(arguments.repeats, 5)
    torch.manual_seed(0)
    model = replay.SHAPES[name]().eval()
    data = replay.prompts(model, own)
    rows = replay.measure_replay(name, model, data, replay.fit_edits(model, data), own)
    _, mine, floor = (row["milliseconds"] for row in rows)
    what = f"a replayed edit, {name}, 8 of 60 tokens"
    return [ratio(what, mine, "its forward pass, bare", floor, aim=1.3, unit="ms")]


def whole_commands(arguments: Namespace) -> list[Row]:
    """The study of a model of known size, and that of ``make demo``, by their stages."""
    flipping: dict[str, Any] = {
        "model": "smollm2", "n": 200, "sites": "L10.mid,L14.mid,L18.mid", "parts": "flipping",
    }  # fmt: skip
    demo: dict[str, Any] = {"model": "organism", "n": 1000, "prefixes": "bundled"}
    rows = []
    for chosen in (flipping, demo):
        if arguments.small:
            chosen |= {"model": "organism", "n": 24, "parts": "flipping", "sites": "all"}
        what = f"lrqp reproduce {' '.join(f'--{k} {v}' for k, v in chosen.items())}"
        with TemporaryDirectory() as folder:
            settings = Settings(**chosen | {"out": Path(folder), "device": "cpu"})
            try:
                stages, passes, total = end_to_end.run(settings, "cpu")
            except MissingExtraError as error:
                rows.append(ratio(what, against=str(error)))
                continue
        aim = None if chosen is demo else 2.0
        rows.append(ratio(what, total, "its forward passes", passes, aim=aim, unit="s"))
        if chosen is demo:
            part = sum(stages.get(name, 0.0) for name in ("probing", "figures", "report"))
            said = "of it probing, figures and report"
            rows.append(ratio(said, part, "the whole", total, aim=0.5, unit="s"))
    return rows


def on_a_gpu(arguments: Namespace) -> list[Row]:
    """The lines of ``benchmarks.device`` that have aims."""

    def found(name: str) -> Iterator[Row]:
        yield from (row for row in device.SECTIONS[name](arguments) if "error" not in row)

    rows = []
    for row in found("models"):
        gpt, what = row["model"].startswith("GPT-2"), row["what"]
        if "bare" in what and "ms" in row:
            bare = 1e3 * row["ms"]
        elif "in an open context" in what:
            aim = {2: 150.0, 10: 250.0}[row["K"]] if gpt else 0.01 * bare
            rows.append(
                ratio(
                    f"added to a pass of {row['model']}, {what}, K = {row['K']}", row["added µs"],
                    "bare pass", bare, aim=round(aim), over=False,
                )
            )  # fmt: skip
    for row in found("generating"):
        if "K" in row:
            what = f"{row['what']}, K = {row['K']}"
            rows.append(ratio(what, row["µs"], aim=150 if row["K"] == 2 else None, over=False))
    graph, products = "graph µs", "products in a graph µs"
    proposed = [row for row in found("proposing") if graph in row]
    for row in proposed:
        what = f"propose in a graph, K = {row['K']}, B = {row['B']:,}, {row['dtype']}"
        wide = next(
            r[graph]
            for r in proposed
            if (r["K"], r["B"], r["dtype"]) == (row["K"], row["B"], "float32")
        )
        if row["dtype"] != "float32":
            rows.append(ratio(what, row[graph], "float32", wide, aim=1.5))
        elif row["B"] == 1024:
            aim = {2: 25.0, 10: 150.0, 50: 700.0}[row["K"]]
            rows.append(ratio(what, row[graph], "products", row[products], aim=aim, over=False))
        elif row["B"] == 16384:
            aim = 3.0 if row["K"] == 2 else None
            rows.append(ratio(what, row[graph], "products", row[products], aim=aim))
    rows += [
        ratio(
            "24 probe fits together", row["together"], "one by one", row["one by one"], aim=0.1,
            unit="ms",
        )
        for row in found("probe fits")
    ]  # fmt: skip
    return rows


SECTIONS: dict[str, Callable[[Namespace], list[Row]]] = {
    # Its processes are forked before anything has run on threads.
    "many classes": many_classes,
    "one at a time": one_at_a_time,
    "models": in_a_model,
    "batches": batches,
    "half precision": narrow,
    "metrics": metrics,
    "fits": fits,
    "replay": replaying,
    "whole commands": whole_commands,
}

if __name__ == "__main__":
    main()
