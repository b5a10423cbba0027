"""A constrained edit inside a model: each example with its own parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrqp_torch.edits.constrained_values import Values, spread_parameter
from lrqp_torch.qp import Solution
from lrqp_torch.qp.posed import PosedProblem
from lrqp_torch.qp.problem import Realise
from lrqp_torch.stream.positions import Positions
from lrqp_torch.stream.scopes import Where, parse


def solve_with(
    solve: Callable[..., Solution],
    problem: PosedProblem,
    positions: Where,
    parameters: Values,
) -> Callable[..., Solution]:
    """An edit's ``solve`` with the values of its parameters, each example's own within a model."""
    parsed = parse(positions)
    batch = parsed.batch if isinstance(parsed, Positions) else 1
    spread = {
        name: spread_parameter(problem, name, value, batch) for name, value in parameters.items()
    }

    def solve_own(
        x: Tensor,
        target: Tensor,
        source: Tensor | None,
        *,
        realise: Realise,
        examples: Tensor,
    ) -> Solution:
        # In a scope, whose batch is not known beforehand, parameters are the same for all.
        rows = examples if isinstance(parsed, Positions) else torch.zeros_like(examples)
        own = {name: value.to(x.device)[rows] for name, value in spread.items()}
        return solve(x, target, source, parameters=own, realise=realise, examples=examples)

    return solve_own
