"""The quadratic program against other solvers, and against the matrix products it cannot avoid."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import medians, parse_arguments, report
from lrqp_torch.errors import SolverError
from lrqp_torch.qp import MahalanobisQP, ProbeGeometry

WIDTH = 768
LOG_ODDS = 10.0
# Solvers that loop over examples in Python take seconds for a thousand of them.
SLOW_EXAMPLES = 64


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    sizes = (
        [(32, 2), (1024, 2), (1024, 10)]
        if arguments.small
        else [
            (batch, n_classes)
            for batch in (1, 32, 1024, 16384)
            for n_classes in (2, 3, 5, 10, 20, 50)
        ]
    )
    rows = []
    for batch, n_classes in sizes:
        rows += measure(batch, n_classes, arguments.repeats, arguments.device)
    report(f"Least edits, d = {WIDTH}, float64, microseconds an example", rows, arguments)


def measure(batch: int, n_classes: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Time every solver on one size; the ratio is to the bare matrix products."""
    x, target, weight, bias, covariance = random_problem(batch, n_classes, device)
    geometry = ProbeGeometry.build(weight, bias, covariance)
    coefficients = torch.randn(batch, n_classes, dtype=torch.float64, device=device)

    def solve(name: str, examples: int) -> Callable[[], Tensor]:
        qp = MahalanobisQP(n_classes, solver=name).to(device)
        return lambda: qp.solve(x[:examples], target[:examples], LOG_ODDS, geometry).x_new

    def train(name: str, examples: int) -> Callable[[], None]:
        qp = MahalanobisQP(n_classes, solver=name).to(device)
        leaf = x[:examples].clone().requires_grad_()
        return lambda: qp.solve(leaf, target[:examples], LOG_ODDS, geometry).x_new.sum().backward()

    slow = min(batch, SLOW_EXAMPLES)
    runs: dict[str, tuple[int, Callable[[], Any], Callable[[], Any] | None]] = {
        "bare matrix products": (
            batch,
            lambda: (x @ weight.T, torch.addmm(x, coefficients, geometry.steering)),
            None,
        ),
        "lrqp_torch": (batch, solve("ACTIVE_SET", batch), train("ACTIVE_SET", batch)),
    }
    absent = {}
    for name, label, examples in (
        ("MOREAU", "cvxpylayers, MOREAU", batch),
        ("DIFFCP", "cvxpylayers, DIFFCP + Clarabel", slow),
    ):
        try:
            runs[label] = (examples, solve(name, examples), train(name, examples))
        except SolverError:
            absent[label] = "not installed"
    full = full_dimension(x, target, weight, bias, covariance)
    if full is not None:
        runs["quadprog in d dimensions (the post's way)"] = (min(batch, 4), full, None)
    else:
        absent["quadprog in d dimensions (the post's way)"] = "not installed"

    forward = medians({name: run for name, (_, run, _) in runs.items()}, repeats, device)
    backward = medians(
        {name: run for name, (_, _, run) in runs.items() if run is not None}, repeats, device
    )
    per_example = {name: forward[name] / runs[name][0] * 1e6 for name in runs}
    bare = per_example["bare matrix products"]
    rows = [
        {
            "solver": name,
            "B": batch,
            "K": n_classes,
            "forward": per_example[name],
            "forward + backward": backward[name] / runs[name][0] * 1e6 if name in backward else "–",
            "times bare": per_example[name] / bare,
        }
        for name in runs
    ]
    return rows + [
        {
            "solver": name,
            "B": batch,
            "K": n_classes,
            "forward": why,
            "forward + backward": "–",
            "times bare": "–",
        }
        for name, why in absent.items()
    ]


def random_problem(
    batch: int, n_classes: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Activations, targets, and a probe with logits of standard deviation 2 under Σ of cond 1e4."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    basis = torch.linalg.qr(normal(WIDTH, WIDTH)).Q
    variances = torch.logspace(0, -4, WIDTH, dtype=torch.float64)
    covariance = (basis * variances) @ basis.T
    x = (normal(batch, WIDTH) * variances.sqrt()) @ basis.T
    weight = normal(n_classes, WIDTH)
    weight *= 2 / ((weight @ covariance) * weight).sum(-1, keepdim=True).sqrt()
    target = torch.randint(n_classes, (batch,), generator=generator)
    problem = (x, target, weight, normal(n_classes), covariance)
    return tuple(tensor.to(device) for tensor in problem)  # type: ignore[return-value]


def full_dimension(
    x: Tensor, target: Tensor, weight: Tensor, bias: Tensor, covariance: Tensor
) -> Callable[[], None] | None:
    """The post's formulation: Σ⁻¹ as the quadratic form, d variables, one example at a time."""
    try:
        import quadprog
    except ImportError:
        return None
    precision = torch.linalg.inv(covariance).cpu().numpy()
    rows = []
    for index in range(min(len(x), 4)):
        other = torch.arange(len(weight), device=x.device) != target[index]
        normals = (weight[target[index]] - weight[other]).cpu().numpy()
        bound = (LOG_ODDS - (bias[target[index]] - bias[other])).cpu().numpy()
        rows.append((precision @ x[index].cpu().numpy(), normals.T.copy(), bound))

    def run() -> None:
        for linear, normals, bound in rows:
            quadprog.solve_qp(precision, linear, normals, bound)

    return run


if __name__ == "__main__":
    main()
