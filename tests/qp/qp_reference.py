"""Random edit problems, and their solution in full dimension by solvers that are not ours."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from lrqp_torch import MahalanobisQP, Solution
from lrqp_torch.qp import Solver


@dataclass
class Problem:
    """A batch of edits: x (B, d), target (B,), floor (B,), W (K, d), b (K,), Σ (d, d)."""

    x: Tensor
    target: Tensor
    floor: Tensor
    weight: Tensor
    bias: Tensor
    covariance: Tensor

    def solve(self, solver: str | Solver = "ACTIVE_SET") -> Solution:
        qp = MahalanobisQP(len(self.bias), solver=solver)
        return qp(self.x, self.target, self.floor, self.weight, self.bias, self.covariance)

    def constraints(self, i: int) -> tuple[Tensor, Tensor]:
        """Rows A and right-hand side r of A x' ≥ r for example i, other classes ascending."""
        t = int(self.target[i])
        others = [k for k in range(len(self.bias)) if k != t]
        rows = torch.stack([self.weight[t] - self.weight[k] for k in others])
        offsets = torch.stack([self.bias[t] - self.bias[k] for k in others])
        return rows, self.floor[i] - offsets


def random_problem(
    n_classes: int, width: int, batch: int, seed: int = 0, condition: float = 1e4
) -> Problem:
    """Logits of about ±2, Σ of a given condition in a random basis, floors in [-2, 10]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(width, width)).Q
    scales = torch.logspace(0, -float(np.log10(condition)), width, dtype=torch.float64)
    covariance = (basis * scales) @ basis.T
    uniform = torch.rand(batch, generator=generator, dtype=torch.float64)
    return Problem(
        x=normal(batch, width),
        target=torch.randint(n_classes, (batch,), generator=generator),
        floor=12 * uniform - 2,
        weight=normal(n_classes, width) * 2 / width**0.5,
        bias=normal(n_classes),
        covariance=(covariance + covariance.T) / 2,
    )


def barely_reachable(n_classes: int, dtype: torch.dtype, total: bool = False) -> Problem:
    """A class between two on a line: its odds go up to 1, by pairs, and no further.

    Floors are in turn a little below that and above it, by less than half precision is aimed higher
    for rounding.
    """
    problem = random_problem(n_classes, 16, 48, seed=5, condition=10)
    problem.weight[1], problem.weight[2] = problem.weight[0] / 2, problem.weight[0] * 0
    problem.bias[3:] -= 200
    problem.bias[:3] = torch.tensor([0.0, 1.0, 0.0])
    problem.x, problem.target = (4 * problem.x).to(dtype), torch.ones(48, dtype=torch.long)
    most = 1 - float(np.log(2)) if total else 1.0
    problem.floor = most + 1e-3 * (2.0 * (torch.arange(48) % 2) - 1).double()
    return problem


def reference_edit(problem: Problem, i: int) -> Tensor:
    """x' of example i by quadprog (Goldfarb-Idnani with QR) on all d coordinates.

    Posed in u with δ = L u and Σ = L Lᵀ: minimise ½ ‖u‖² subject to A L u ≥ r − A x. That needs
    neither Σ⁻¹ nor the Gram matrix A Σ Aᵀ, so it keeps digits where the constraints are nearly
    parallel.
    """
    rows, right = problem.constraints(i)
    factor = torch.linalg.cholesky(problem.covariance)
    slopes = rows @ factor
    gap = right - rows @ problem.x[i]
    length = slopes.norm(dim=-1)
    # Rows without length hold already, or there is no solution.
    assert (gap[length == 0] <= 0).all()
    slopes, gap, length = slopes[length > 0], gap[length > 0], length[length > 0]
    slopes, gap = slopes / length[:, None], gap / length
    size = len(factor)
    import quadprog  # not wherever there is a GPU

    u = quadprog.solve_qp(
        np.eye(size), np.zeros(size), slopes.T.contiguous().numpy(), gap.contiguous().numpy()
    )[0]
    return problem.x[i] + factor @ torch.from_numpy(u)


def objective(problem: Problem, i: int, edited: Tensor) -> float:
    """(x' − x)ᵀ Σ⁻¹ (x' − x)."""
    delta = edited - problem.x[i]
    return float(delta @ torch.linalg.solve(problem.covariance, delta))


def reachable(rows: Tensor, right: Tensor, directions: Tensor) -> bool:
    """Whether some displacement in the span of ``directions`` (columns) meets rows · δ ≥ right.

    Phase one by HiGHS: minimise the violation s ≥ 0 of the worst row.
    """
    slopes = (rows @ directions).numpy()
    m, n = slopes.shape
    result = linprog(
        c=np.r_[np.zeros(n), 1.0],
        A_ub=np.c_[-slopes, -np.ones(m)],
        b_ub=-right.numpy(),
        bounds=[(None, None)] * n + [(0, None)],
        method="highs",
    )
    assert result.status == 0, result.message
    return bool(result.fun < 1e-7)


def _solved(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """The solution of M λ = g by elimination in fractions, from rows [M | g]; None: singular."""
    rows = [row[:] for row in rows]
    for i in range(len(rows)):
        pivot = next((k for k in range(i, len(rows)) if rows[k][i]), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for k in range(len(rows)):
            if k != i:
                rows[k] = [a - rows[k][i] * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [row[-1] for row in rows]


def exact_distance(problem: Problem, i: int) -> float | None:
    """The least distance of example i without any rounding; None where there is no solution.

    Every active set is tried in fractions: λ ≥ 0 and s ≥ 0 prove the optimum.
    """
    fractions = np.vectorize(Fraction, otypes=[object])
    weight, bias = fractions(problem.weight.numpy()), fractions(problem.bias.numpy())
    x, floor = fractions(problem.x[i].double().numpy()), Fraction(float(problem.floor[i]))
    t = int(problem.target[i])
    others = [k for k in range(len(bias)) if k != t]
    normals, offsets = weight[t] - weight[others], bias[t] - bias[others]
    gap = floor - offsets - normals.dot(x)
    gram = normals.dot(fractions(problem.covariance.numpy())).dot(normals.T)
    if all(missing <= 0 for missing in gap):
        return 0.0
    for size in range(1, len(others) + 1):
        for held in map(list, combinations(range(len(others)), size)):
            found = _solved([[*gram[k, held], gap[k]] for k in held])
            if found is None or min(found) < 0:
                continue
            if all(gram[:, held].dot(found) >= gap):
                return float(sum(a * gap[k] for a, k in zip(found, held, strict=True))) ** 0.5
    return None
