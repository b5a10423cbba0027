"""Fitting probes to a model's activations, beside scikit-learn; the probes of many sites: together,
one after another, and with torch.optim.LBFGS; and what else is made of activations.

With --sentences FILE, lines of text, SmolLM2's activations are what a probe is fitted to: whether a
token begins a word (K = 2), and how many characters it has (K = 10). Each of scikit-learn's solvers
has the loosest tolerance with which its loss is at most one part in a million above ours.

With --grid so are probes of made-up activations of many sizes, float32 and float64: of classes that
overlap, that separate, and of which all but one have one example in a thousand each.

Elsewhere activations have the falling spectrum and the one outsized dimension of a residual stream;
at one third of the sites the classes overlap, at one third they nearly separate, at one third they
do.
Then :meth:`Covariance.update` against the product that it cannot avoid, by batch and width, and
loading a saved edit by width.
"""

import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, medians, parse_arguments, report, seconds_of
from lrqp_torch import LRQP, Covariance, LinearProbe, Mahalanobis
from lrqp_torch.models import load

LBFGS_STEPS, PEER_SITES = 500, 2
SOLVERS, TOLERANCES = ("lbfgs", "newton-cg", "newton-cholesky"), (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
# Relative difference of losses that counts as none; seconds after which no stricter tolerance is
# tried.
EQUAL, LONG = 1e-6, 60.0
APART = {"overlapping": 0.1, "separable": 2.0, "1 in 1,000": 0.5}
GRID: tuple[tuple[Any, ...], ...] = (
    (200, 1000, 20_000), (64, 576, 768), (2, 10), tuple(APART), (torch.float32, torch.float64),
)  # fmt: skip
TOKENS, TOKENS_A_SENTENCE, BLOCK = 20_000, 48, 18


@torch.no_grad()
def of_model(sentences: Path) -> tuple[Tensor, dict[int, Tensor]]:
    """SmolLM2's stream behind block 18 at 20,000 tokens, in random order; and labels by K."""
    model, tokenizer = load("smollm2")
    tokenizer.padding_side = "right"
    lines, rows, tokens = sentences.read_text().splitlines(), [], []
    for start in range(0, len(lines), 32):
        batch = tokenizer(
            lines[start : start + 32],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=TOKENS_A_SENTENCE,
        )
        kept = batch["attention_mask"].bool()
        kept[:, 0] = False  # an attention sink
        rows.append(model(**batch, output_hidden_states=True).hidden_states[BLOCK][kept])
        tokens.append(batch["input_ids"][kept])
        if sum(map(len, rows)) >= TOKENS:
            break
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    texts = [tokenizer.decode([token]) for token in torch.cat(tokens)[:TOKENS][order].tolist()]
    labels = {
        2: torch.tensor([text.startswith(" ") for text in texts]).long(),
        10: torch.tensor([min(len(text.strip()), 9) for text in texts]),
    }
    return torch.cat(rows)[:TOKENS][order], labels


def beside_peers(x: Tensor, labels: Tensor, arguments: Namespace) -> list[Row]:
    """A fit, and scikit-learn's solvers, to activations (n, d)."""
    n, n_classes, l2 = len(x), int(labels.max()) + 1, 1 / len(x)
    wide = x.double()
    results: dict[str, tuple[float, float]] = {}
    numbers, targets = x.numpy(), labels.numpy()

    def loss(weight: Tensor, bias: Tensor) -> float:
        weight, bias = weight.double(), bias.double()
        likelihood = torch.nn.functional.cross_entropy(wide @ weight.T + bias, labels)
        return float(likelihood + l2 / 2 * weight.square().sum())

    def ours(values: list[float]) -> None:
        probe = LinearProbe.fit(x, labels)
        values.append(loss(probe.weight.detach(), probe.bias.detach()))

    def peer(solver: str, tolerance: float, values: list[float]) -> None:
        from sklearn.linear_model import LogisticRegression

        # Of two classes it penalises the difference of the rows, which is twice as long as each.
        scale = 2.0 if n_classes == 2 else 1.0
        found = LogisticRegression(C=scale, solver=solver, tol=tolerance, max_iter=3000)
        found.fit(numbers, targets)
        weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
        if n_classes == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        values.append(loss(weight, bias))

    own: list[float] = []
    ways: dict[str, Callable[[], Any]] = {"LinearProbe.fit": partial(ours, own)}
    ours(own)
    best = own[0]
    results["LinearProbe.fit"] = (0.0, best)
    for solver in SOLVERS if find_spec("sklearn") else ():
        if solver == "newton-cholesky" and n_classes > 2 and not arguments.all:
            continue
        for tolerance in TOLERANCES:
            values: list[float] = []
            run = partial(peer, solver, tolerance, values)
            taken, name = seconds_of(run, "cpu"), f"scikit-learn {solver}, tol = {tolerance:.0e}"
            if values[0] <= (1 + EQUAL) * best:
                ways[name] = run
            if name in ways or taken > LONG or tolerance == TOLERANCES[-1]:
                results[name] = (taken, values[0])
                break
    seconds = medians(ways, 1 if n > 1000 else arguments.repeats, "cpu", seconds=LONG)
    return [
        {
            "n": n,
            "K": n_classes,
            "fitted": name,
            "ms": 1e3 * seconds.get(name, taken),
            "loss above ours": value / best - 1,
            "time over ours": seconds.get(name, taken) / seconds["LinearProbe.fit"],
        }
        for name, (taken, value) in results.items()
    ]


def made_up(kind: str, n: int, width: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Normal activations (n, d), float64, around the means of their classes; and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    if kind == "1 in 1,000":
        rare = torch.rand(n, generator=generator) < 1e-3 * n_classes
        labels = torch.where(rare | (torch.arange(n) < n_classes), labels, 0)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    means = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    return x + APART[kind] * means[labels], labels


def beside_the_fastest(
    n: int, width: int, n_classes: int, kind: str, dtype: torch.dtype, arguments: Namespace
) -> Row:
    """A fit beside the fastest of scikit-learn's whose loss is as low."""
    x, labels = made_up(kind, n, width, n_classes)
    ours, *others = beside_peers(x.to(dtype), labels, arguments)
    equal = [row for row in others if row["loss above ours"] <= EQUAL]
    best = min(equal, key=lambda row: float(row["ms"]), default={"fitted": "none"})
    return {
        "n": n,
        "d": width,
        "K": n_classes,
        "classes": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": ours["ms"],
        "scikit-learn's fastest": best["fitted"],
        "its ms": best.get("ms"),
        "ours over it": ours["ms"] / best["ms"] if equal else None,
    }


def activations(sites: int, n: int, width: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Two classes at each site, float64, so that probes are stored as exactly as they are found."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    scale = 10 * torch.arange(1, width + 1).pow(-0.7)
    found = {}
    for site in range(sites):
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        apart = torch.zeros(width)
        apart[width // 40 : width // 12] = (0.1, 0.4, 0.8)[site % 3]
        x = torch.randn(n, width, generator=generator)
        x = ((x + (2 * labels - 1)[:, None] * apart) * scale) @ rotation
        x[:, 3] *= 50
        found[f"L{site}.mid"] = x.double().to(device)
    return found, labels.to(device)


def lbfgs(x: Tensor, labels: Tensor) -> torch.nn.Linear:
    """The same objective in float64 with torch's own optimiser, on standardised activations."""
    x = x.double()
    mean, scale = x.mean(0), x.std(0)
    x = (x - mean) / scale
    probe = torch.nn.Linear(x.shape[1], 2, device=x.device, dtype=torch.float64)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimiser = torch.optim.LBFGS(
        probe.parameters(),
        max_iter=LBFGS_STEPS,
        max_eval=2 * LBFGS_STEPS,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(probe(x), labels)
        loss = loss + (probe.weight / scale).square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        probe.weight /= scale
        probe.bias -= probe.weight @ mean
    return probe


def relative_gradient(probe: torch.nn.Linear, x: Tensor, labels: Tensor) -> float:
    """Norm of the gradient over that at zero, in float64, of the weights as they are stored."""
    x, targets = x.double(), torch.nn.functional.one_hot(labels).double()

    def norm(weight: Tensor, bias: Tensor) -> float:
        residual = ((x @ weight.T + bias).softmax(1) - targets) / len(x)
        gradient = residual.T @ x + weight / len(x)
        return float((gradient.square().sum() + residual.sum(0).square().sum()).sqrt())

    weight, bias = probe.weight.detach().double(), probe.bias.detach().double()
    return norm(weight, bias) / norm(torch.zeros_like(weight), torch.zeros_like(bias))


def measure(count: int, n: int, width: int, arguments: Namespace) -> list[Row]:
    """Every way on so many sites; the peer on the first two of them at most."""
    found, labels = activations(count, n, width, arguments.device)
    few = dict(list(found.items())[:PEER_SITES])
    probes: dict[str, dict[str, torch.nn.Linear]] = {}

    def together() -> None:
        probes["together"] = {**LinearProbe.fit_many({s: (x, labels) for s, x in found.items()})}

    def in_turn() -> None:
        probes["one after another"] = {s: LinearProbe.fit(x, labels) for s, x in found.items()}

    def peer() -> None:
        probes["torch.optim.LBFGS"] = {s: lbfgs(x, labels) for s, x in few.items()}

    ways = {"together": together, "one after another": in_turn, "torch.optim.LBFGS": peer}
    seconds = medians(ways, 1 if arguments.small else min(arguments.repeats, 3), arguments.device)
    return [
        {
            "sites": count,
            "fitted": name,
            "timed": len(probes[name]),
            "seconds a site": taken / len(probes[name]),
            "worst relative gradient": max(
                relative_gradient(probe, found[site], labels)
                for site, probe in probes[name].items()
            ),
            "time over together": taken / len(probes[name]) / (seconds["together"] / count),
        }
        for name, taken in seconds.items()
    ]


def accumulating(batch: int, width: int, arguments: Namespace) -> Row:
    """Adding float32 activations in batches, and the bare products of these in float64."""
    x = torch.randn(max(batch, 1024), width, device=arguments.device)
    parts, second = x.split(batch), x.new_zeros(width, width, dtype=torch.float64)
    wide = x.double().split(batch)
    found = Covariance(width, x.device).update(x)

    def bare() -> None:
        for part in wide:
            second.addmm_(part.T, part)

    def update() -> None:
        for part in parts:
            found.update(part)

    ways = {"bare": bare, "update": update}
    seconds = medians(ways, arguments.repeats, arguments.device, seconds=1.0)
    return {
        "width": width,
        "batch": batch,
        "addmm_, ms": 1e3 * seconds["bare"] / len(parts),
        "update, ms": 1e3 * seconds["update"] / len(parts),
        "update over addmm_": seconds["update"] / seconds["bare"],
    }


def loading(width: int, arguments: Namespace) -> Row:
    """Loading a saved edit and its first solve; reading Σ, which nothing of that needs; keeping."""
    factor = torch.randn(width, 64, dtype=torch.float64) / 8
    metric = Mahalanobis(factor @ factor.T + torch.eye(width, dtype=torch.float64))
    x, other = torch.randn(1, width), torch.nn.Linear(width, 2)
    with TemporaryDirectory() as folder:
        LRQP(torch.nn.Linear(width, 2), metric).save(folder)
        ways = {
            "load": lambda: LRQP.load(folder),
            "solve": lambda: LRQP.load(folder).solve(x, 1),
            "look": lambda: LRQP.load(folder).metric.covariance,
            "keeping": lambda: metric.keeping(other),
        }
        seconds = medians(ways, min(arguments.repeats, 3), "cpu")
    return {
        "width": width,
        "load, ms": 1e3 * seconds["load"],
        "load and solve, ms": 1e3 * seconds["solve"],
        "load and look at Σ, ms": 1e3 * seconds["look"],
        "keeping, ms": 1e3 * seconds["keeping"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    def more(parser: ArgumentParser) -> None:
        parser.add_argument("--sentences", type=Path, help="lines of text for SmolLM2")
        parser.add_argument("--grid", action="store_true", help="made-up activations of many sizes")
        parser.add_argument("--all", action="store_true", help="also newton-cholesky for K = 10")

    arguments = parse_arguments(__doc__ or "", argv, more)
    warnings.filterwarnings("ignore", module="lrqp_torch|sklearn")
    if arguments.sentences is not None:
        x, labels = of_model(arguments.sentences)
        rows = [
            row
            for n in ((200,) if arguments.small else (1000, TOKENS))
            for classes in labels.values()
            for row in beside_peers(x[:n].double(), classes[:n], arguments)
        ]
        report(f"Fitting a probe to SmolLM2's activations, d = {x.shape[1]}", rows, arguments)
    if arguments.grid:
        sizes = product(*((part[:1] if arguments.small else part) for part in GRID))
        rows = [beside_the_fastest(*size, arguments) for size in sizes]
        report("Fitting probes to made-up activations", rows, arguments)
    counts, n, width = ((1, 4), 500, 128) if arguments.small else ((1, 8, 24), 3000, 768)
    rows = [row for count in counts for row in measure(count, n, width, arguments)]
    report(f"Fitting probes to {n} x {width}, K = 2", rows, arguments)
    widths = (576,) if arguments.small else (256, 576, 1024, 2048, 4096)
    batches = (1, 4, 16, 64, 256, 1024, 4096)
    rows = [accumulating(batch, width, arguments) for width in widths for batch in batches]
    report("Adding activations to a covariance", rows, arguments)
    rows = [loading(width, arguments) for width in widths[-3:]]
    report("Loading a saved edit, K = 2", rows, arguments)


if __name__ == "__main__":
    main()
