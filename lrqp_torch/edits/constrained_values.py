"""What a posed problem is given: the rows it reads, and the values of its parameters."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lrqp_torch.edits.lrqp import LRQP
from lrqp_torch.errors import (
    ConstraintError,
    LRQPError,
    NonFiniteError,
    WidthError,
    as_classes,
    check_classes,
)
from lrqp_torch.qp.geometry import ProbeGeometry, other_classes
from lrqp_torch.qp.posed import PosedProblem
from lrqp_torch.qp.reduction import Reduction

Reads = Literal["activation", "length"] | Tensor
Values = Mapping[str, Tensor | float]


def rows_read(reads: Reads, width: int) -> Tensor | None:
    """The rows F that the function reads, (n, d), none for lengths; None for all of x'."""
    if isinstance(reads, Tensor):
        if reads.ndim != 2 or reads.shape[1] != width or not reads.is_floating_point():
            raise WidthError(
                f"reads must be rows (n, {width}) of what the function uses of x', got "
                f"{reads.dtype} {tuple(reads.shape)}"
            )
        if not bool(torch.isfinite(reads).all()):
            raise NonFiniteError("reads holds NaN or infinity")
        return reads.detach().cpu().double()
    if reads == "activation":
        return None
    if reads == "length":
        return torch.zeros(0, width, dtype=torch.float64)
    raise LRQPError(f"reads must be 'activation', 'length' or a tensor (n, {width}), got {reads!r}")


def row_classes(classes: Tensor | int, x: Tensor, n_classes: int, name: str) -> Tensor:
    """A class for each row of x, (B,), checked."""
    tensor = as_classes(classes, name).to(x.device)
    tensor = tensor.expand(len(x)) if tensor.ndim == 0 else tensor
    check_classes(tensor, len(x), n_classes, name)
    return tensor.long()


def parameter_values(
    edit: LRQP,
    features: Tensor | None,
    problem: PosedProblem,
    basis: Reduction,
    geometry: ProbeGeometry,
    x: Tensor,
    target: Tensor,
    parameters: Values,
) -> list[Tensor]:
    """Values of all parameters but the gap, (B, …) each, in the order of the problem."""
    unknown, missing = (
        set(parameters) - set(problem.parameters),
        set(problem.parameters) - set(parameters),
    )
    if unknown or missing:
        raise ConstraintError(
            f"the parameters are {sorted(problem.parameters)}: "
            + (f"{sorted(unknown)} were not declared" if unknown else "")
            + (f"{sorted(missing)} have no value" if missing else "")
        )
    if torch.is_grad_enabled() and (
        edit.metric.covariance.requires_grad
        or (edit.probe.weight.requires_grad and not basis.complete)
    ):
        raise ConstraintError(
            "the metric, and with reads= other than 'activation' the probe's weights, are "
            "constants of the posed problem: detach them (requires_grad_(False))"
        )
    wide = x.double()
    other = other_classes(target, geometry.n_classes, x.device)
    normals = geometry.weight[target].unsqueeze(-2) - geometry.weight[other]
    values: dict[str, Tensor] = {"x": wide}
    if features is not None:
        values["features"] = wide @ features.to(x.device).T
    if "centred" in problem.given:
        values["centred"], _ = basis.centred(wide)
    own = [spread_parameter(problem, name, parameters[name], len(x)) for name in problem.parameters]
    return [
        basis.slopes(normals),
        *(values[name] for name in problem.given),
        *(value.to(x.device) for value in own),
    ]


def spread_parameter(problem: PosedProblem, name: str, value: Tensor | float, batch: int) -> Tensor:
    """A parameter's value for each example, (B, *shape)."""
    if name not in problem.parameters:
        raise ConstraintError(f"{name!r} was not declared; parameters={sorted(problem.parameters)}")
    shape = tuple(problem.parameters[name].shape)
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConstraintError(f"parameter {name!r} must be numbers, got {value!r}") from error
    if tensor.is_complex():
        raise ConstraintError(f"parameter {name!r} must be real, got {tensor.dtype}")
    tensor = tensor.double()
    if tensor.shape == shape:
        problem.check_value(name, tensor)
        return tensor.expand(batch, *shape)
    if tensor.shape == (batch, *shape):
        for one in tensor:
            problem.check_value(name, one)
        return tensor
    raise ConstraintError(
        f"parameter {name!r} must be {shape} or {(batch, *shape)}, got {tuple(tensor.shape)}"
    )
