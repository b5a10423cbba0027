"""The quadratic program against other solvers, and against the matrix products it cannot avoid.

Methods that take long an example are timed on fewer examples (the column "timed"), and all times
are also given per example. Errors are those on the first examples against the exact optimum.
"""

import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, medians, parse_arguments, report, version_of
from benchmarks.qp_peers import METHODS, OURS, Method
from benchmarks.qp_problem import Exact, QPProblem

BATCHES, CLASSES = (1, 32, 256, 1024, 16384), (2, 3, 5, 10, 20, 50, 100)
BARE = "bare matrix products"
CHECKED = 16


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__ or "", argv, _options)
    default = ((32, 1024), (2, 10)) if arguments.small else (BATCHES, CLASSES)
    batches = _numbers(arguments.batches) or default[0]
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers warn of their own formats and tolerances
        for n_classes in _numbers(arguments.classes) or default[1]:
            for batch in batches:
                # The program in d variables takes as long an example whatever the batch is.
                slow = batch == max(size for size in batches if size <= 1024 or size == batches[0])
                rows += measure(batch, n_classes, slow, arguments)
    report(
        f"Least edits, d = {arguments.width}, float64, B activations, K classes",
        rows,
        arguments,
        versions={name: version_of(name) for name in _packages()},
    )


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--batches", default="", help=f"B, default {BATCHES}")
    parser.add_argument("--classes", default="", help=f"K, default {CLASSES}")
    parser.add_argument("--width", type=int, default=768, help="d")
    parser.add_argument("--seconds", type=float, default=0.4, help="at most, for each figure")


def measure(
    batch: int,
    n_classes: int,
    slow: bool,
    arguments: Namespace,
    methods: Sequence[Method] = METHODS,
) -> list[Row]:
    """Every method on one size, ``slow`` those in d variables too."""
    device = arguments.device
    problem = QPProblem.random(batch, n_classes, arguments.width, device)
    exact = Exact.of(problem.first(CHECKED).to("cpu"))
    forward: dict[str, Callable[[], Any]] = {BARE: bare(problem)}
    both: dict[str, Callable[[], Any]] = {BARE: bare(problem, backward=True)}
    timed, errors, absent = {BARE: batch}, {}, {}
    for method in methods:
        if method.in_full_dimension and (not slow or n_classes > method.most_classes):
            continue
        if not all(find_spec(package) for package in method.packages):
            absent[method.name] = f"not installed: pip install {method.install}"
            continue
        examples = min(batch, method.examples)
        part = problem.first(examples)
        solve = method.prepare(part.to("cpu") if method.on_cpu else part)
        x = part.x.to("cpu") if method.on_cpu else part.x
        direction = part.direction.to(x)
        forward[method.name] = _forward(solve, x)
        if method.differentiable:
            both[method.name] = _both(solve, x, direction)
        timed[method.name] = examples
        errors[method.name] = check(part, exact, solve, x, direction, method)
    times = medians(forward, arguments.repeats, device, seconds=arguments.seconds)
    full = medians(both, arguments.repeats, device, seconds=arguments.seconds)

    def row(name: str) -> Row:
        count = timed.get(name, 0)
        one = times[name] / count if name in times else None
        two = full[name] / count if name in full else None
        violation, gradient_error = errors.get(name, (None, None))
        return {
            "method": f"{name}: {absent[name]}" if name in absent else name,
            "K": n_classes,
            "B": batch,
            "timed": count,
            "forward, ms": None if one is None else one * count * 1e3,
            "both, ms": None if two is None else two * count * 1e3,
            "µs each": None if one is None else one * 1e6,
            "× bare": None if one is None else one / (times[BARE] / batch),
            "both × bare": None if two is None else two / (full[BARE] / batch),
            "× ours": None if one is None else one / (times[OURS] / batch),
            "both × ours": None if two is None else two / (full[OURS] / batch),
            "violation": violation,
            "gradient error": gradient_error,
        }

    return [row(name) for name in (*forward, *absent)]


def check(
    part: QPProblem,
    exact: Exact,
    solve: Callable[[Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    method: Method,
) -> tuple[float, float | None]:
    """Worst violation in nats, and the relative error of the gradient with respect to x."""
    leaf = x.clone().requires_grad_(method.differentiable)
    edited = solve(leaf)
    gradient = None
    if method.differentiable:
        (gradient,) = torch.autograd.grad((edited * direction).sum(), leaf)
        gradient = gradient.cpu()
    _, gradient_error = exact.errors(edited.cpu(), gradient)
    return part.violation(edited.to(part.x)), gradient_error


def bare(problem: QPProblem, *, backward: bool = False) -> Callable[[], object]:
    """The two matrix products of an edit, and with backward the two of its derivative.

    For two classes one difference of logits and one direction suffice.
    """
    columns = 1 if problem.n_classes == 2 else problem.n_classes
    weight, steering = problem.weight[:columns], problem.geometry.steering[:columns]
    coefficients = torch.randn_like(problem.x[:, :columns])
    x, direction = problem.x, problem.direction

    def run() -> object:
        forward = (x @ weight.T, torch.addmm(x, coefficients, steering))
        if not backward:
            return forward
        return (*forward, direction @ steering.T, torch.addmm(direction, coefficients, weight))

    return run


def _forward(solve: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: solve(x))


def _both(solve: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()

    def run() -> object:
        return torch.autograd.grad(solve(leaf), leaf, direction)

    return run


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _packages() -> list[str]:
    named = {package for method in METHODS for package in method.packages}
    return sorted(named | {"lrqp_torch", "cvxpy", "cvxpylayers"})


if __name__ == "__main__":
    main()
