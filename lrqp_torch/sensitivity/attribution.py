"""Which constraints and which directions of an edit carry its effect on the model's output.

Along the straight path from an activation x to the edited x' = x + δ, the change of a number f that
is read from the logits is the integral of its gradient (integrated gradients: Sundararajan, Taly
and Yan 2017, arXiv 1703.01365):

    f(x') − f(x) = ∫₀¹ ∇f(x + sδ) ds · δ = g · δ

The edit is a sum over the classes' constraints, δ = Σ_ℓ λ_ℓ Σ a_ℓ with a_ℓ = w_t − w_ℓ, over the
stream's dimensions, and over any orthonormal directions that span it; so is its effect.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import LRQPError
from lrqp_torch.qp import Status
from lrqp_torch.qp.constraints import other_classes
from lrqp_torch.sensitivity.readout import Readout, SiteReadout

NODES = 4
MOST_HALVINGS = 12


@dataclass(frozen=True)
class Attribution:
    """The effect of an edit on f, in parts; n prompts, K classes, width d, all float64.

    Attributes:
        before: f without the edit, (n,).
        after: f with it, (n,).
        constraints: effect through each class's constraint, (n, K): column ℓ holds g · λ_ℓ Σ a_ℓ,
            and 0 at the target itself.
        multipliers: λ in the same columns, (n, K).
        dimensions: effect through each dimension of the stream, (n, d): g_j δ_j.
        directions: right singular vectors of all edits together, (r, d), by falling singular value.
        singular_values: of the edits, (r,), in the units of the stream.
        through_directions: effect through each of them, (n, r): (g · v)(δ · v).
    """

    before: Tensor
    after: Tensor
    constraints: Tensor
    multipliers: Tensor
    dimensions: Tensor
    directions: Tensor
    singular_values: Tensor
    through_directions: Tensor

    @property
    def effect(self) -> Tensor:
        """What the edit adds to f, (n,)."""
        return self.after - self.before

    @property
    def unexplained(self) -> Tensor:
        """Effect minus the sum of its parts, (n,): the error of the integral."""
        return self.effect - self.dimensions.sum(-1)


def attribute(
    model: nn.Module,
    site: str,
    edit: LRQP,
    inputs: Mapping[str, Tensor],
    positions: Tensor,
    target: Tensor | int,
    read: Tensor,
    reading: Readout,
    *,
    source: Tensor | int | None = None,
    tolerance: float = 0.01,
    batch_size: int = 32,
) -> Attribution:
    """Split the effect of an edit at one token a prompt into its parts.

    A model may turn from one answer to the other within a small part of the path. So the integral
    is taken by Gauss and Legendre's rule on pieces of it, and since the change of f over a piece is
    known, so is the error on each: pieces that are not good enough are halved.

    Args:
        model: a transformers causal language model in evaluation mode; it is not changed.
        site: where to edit.
        edit: what to apply.
        inputs: ``input_ids`` and ``attention_mask``, (n, T), and ``position_ids`` where padded.
        positions: column to edit, LongTensor (n,).
        target: class to write, one for all or (n,).
        read: column whose logits ``reading`` is given, LongTensor (n,).
        reading: f; must be differentiable, and each row depend on its own prompt alone.
        source: class that holds now, one for all or (n,), for the ``mirror`` rule.
        tolerance: bound of ``Attribution.unexplained``, in the units of f. Where rounding in the
            model's dtype forbids it, the halving ends at 1/4096 of the path.
        batch_size: prompts a pass.

    Raises:
        LRQPError: tolerance not above 0, batch_size below 1, or a model in training mode.
        NonFiniteError: f or its gradient is NaN or infinite.
        SiteError, PositionError, WidthError, TargetError: bad input, named.
    """
    if batch_size < 1 or not tolerance > 0:
        raise LRQPError(
            f"batch_size must be at least 1 and tolerance above 0, got {batch_size}, {tolerance}"
        )
    run = SiteReadout(model, site, inputs, positions, read, reading, batch_size=batch_size)
    target = edit.row_classes(target, run.read, "target")
    source = None if source is None else edit.row_classes(source, run.read, "source")
    parts: list[tuple[Tensor, ...]] = []
    for rows in run.batches():
        x = run.activations(rows)
        with torch.no_grad():
            held = None if source is None else source[rows]
            solution = edit.solve(x, target[rows], held, examples=rows)
        # A row that came back as it was has no part in anything, whatever its multipliers say.
        multipliers = solution.multipliers * (solution.status == Status.SOLVED).unsqueeze(-1)
        normals = _constraint_edits(edit, x, target[rows])
        by_class = _by_class(multipliers, target[rows])
        moved = (by_class.unsqueeze(-1) * normals).sum(1)
        before, after, gradient = integrate_gradient(run, rows, x.double(), moved, tolerance)
        through = by_class * (normals * gradient.unsqueeze(1)).sum(-1)
        parts.append((before, after, through, by_class, moved, gradient))
    before, after, constraints, by_class, moved, gradient = (
        torch.cat(items) for items in zip(*parts, strict=True)
    )
    _, values, directions = torch.linalg.svd(moved, full_matrices=False)
    present = values > values[:1] * max(moved.shape) * torch.finfo(values.dtype).eps
    directions = directions[present]
    return Attribution(
        before,
        after,
        constraints,
        by_class,
        moved * gradient,
        directions,
        values[present],
        (gradient @ directions.T) * (moved @ directions.T),
    )


def integrate_gradient(
    run: SiteReadout, rows: Tensor, x: Tensor, moved: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), f(x + δ) and ∫₀¹ ∇f(x + sδ) ds of some prompts: (B,), (B,) and (B, d), float64.

    A piece from a to b is accepted where its integral agrees with the change of f over it to within
    ``tolerance`` (b − a), so that the errors of all pieces sum to less than ``tolerance``.
    """
    # On (0, 1); numpy's are for (−1, 1).
    nodes, weights = ((np.array([[1], [0]]) + np.polynomial.legendre.leggauss(NODES)) / 2).tolist()
    total = torch.zeros_like(moved)
    item = torch.arange(len(rows), device=rows.device)
    begin = torch.zeros(len(rows), dtype=moved.dtype, device=rows.device)
    width = 1.0
    before, after = run.value(rows, x), run.value(rows, x + moved)
    first, last = before, after
    for halvings in range(MOST_HALVINGS + 1):
        gradient = torch.zeros_like(moved[item])
        for node, weight in zip(nodes, weights, strict=True):
            at = (begin + node * width).unsqueeze(-1)
            gradient += width * weight * run.gradient(rows[item], x[item] + at * moved[item])[1]
        error = ((gradient * moved[item]).sum(-1) - (last - first)).abs()
        good = error <= tolerance * width
        if halvings == MOST_HALVINGS:
            good = torch.ones_like(good)
        total.index_add_(0, item[good], gradient[good])
        item, begin, first, last = (t[~good] for t in (item, begin, first, last))
        if len(item) == 0:
            break
        width /= 2
        middle = begin + width
        value = run.value(rows[item], x[item] + middle.unsqueeze(-1) * moved[item])
        item = torch.cat([item, item])
        begin = torch.cat([begin, middle])
        first, last = torch.cat([first, value]), torch.cat([value, last])
    return before, after, total


def _by_class(multipliers: Tensor, target: Tensor) -> Tensor:
    """λ, (B, K−1) for the other classes ascending, as (B, K) with 0 at the target."""
    n_classes = multipliers.shape[1] + 1
    other = other_classes(target, n_classes, target.device)
    return multipliers.new_zeros(len(target), n_classes).scatter(-1, other, multipliers.detach())


@torch.no_grad()
def _constraint_edits(edit: LRQP, x: Tensor, target: Tensor) -> Tensor:
    """Σ (w_t − w_ℓ) for every class ℓ, (B, K, d): what a unit multiplier moves."""
    steering = edit.geometry(x.device).steering
    return steering[target].unsqueeze(1) - steering
