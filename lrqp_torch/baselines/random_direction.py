"""A random direction, as far as LRQP would go."""

from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.data import BaselineData
from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.stream.intervene import EditContext


class RandomDirection(Baseline):
    """A step of LRQP's own Mahalanobis length for the same example, in a random direction.

        x' = x + r Σ^{1/2} g / ‖g‖,   g ~ N(0, I),   r = √((x* − x)ᵀ Σ⁻¹ (x* − x))

    with x* LRQP's edit of x to the same target: a uniform draw from the ellipsoid of all edits as
    large as LRQP's. Where LRQP changes nothing, neither does this. What it flips, an edit flips by
    its size alone.

    The direction depends on the seed and the row's number among the rows of one call (in a model,
    among the positions), and on nothing else.

    Args:
        reference: the LRQP.
        seed: of the directions.
        strength: see :class:`Baseline`.
    """

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random direction, LRQP's size"
    root: Tensor

    def __init__(self, reference: LRQP, *, seed: int = 0, strength: float = 1.0) -> None:
        super().__init__(reference, strength=strength)
        self.seed = seed
        values, vectors = torch.linalg.eigh(reference.metric.covariance)
        present = values > values[-1] * self.width * torch.finfo(values.dtype).eps
        # In Σ's eigenbasis without its null space, so that a singular Σ has no infinite steps.
        self.register_buffer("root", vectors[:, present] * values[present].sqrt())

    @classmethod
    def fit(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        reference: LRQP | None = None,
        seed: int = 0,
        strength: float = 1.0,
    ) -> Self:
        """For activations x, (n, d), with classes y, (n,); they only serve to fit a reference."""
        reference = LRQP.fit(x, y) if reference is None else reference
        return cls(reference, seed=seed, strength=strength)

    @classmethod
    def from_data(cls, data: BaselineData) -> Self:
        """See :meth:`Baseline.from_data`."""
        return cls(data.reference, seed=data.seed)

    def edit(self, x: Tensor, target: Tensor, source: Tensor, context: EditContext) -> Tensor:
        """See :meth:`Baseline.edit`.

        Raises:
            InfeasibleError, SolverError: as :meth:`LRQP.solve`.
        """
        solution = self.reference.solve(
            x, target, source, realise=context.realise, examples=context.example
        )
        rank = self.root.shape[1]
        draws = [
            np.random.default_rng([self.seed, row]).standard_normal(rank)
            for row in context.index.tolist()
        ]
        normal = torch.from_numpy(np.stack(draws)).to(x.device)
        direction = torch.nn.functional.normalize(normal, dim=-1) @ self.root.T
        return x.double() + solution.distance.unsqueeze(-1) * direction
