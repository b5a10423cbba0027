"""Which class each variable is to have, or whether it is kept or free."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrqp_torch.errors import TargetError, as_classes
from lrqp_torch.qp.stacked import FREE, KEEP

Targets = Mapping[str, Tensor | int] | Tensor


def name_targets(
    targets: Targets, what: str, names: Sequence[str], kept_by_default: Sequence[str]
) -> dict[str, Tensor | int]:
    """One entry a variable, in order; from a mapping, or from a tensor with V as last axis."""
    if isinstance(targets, Mapping):
        unknown = set(targets) - set(names)
        if unknown:
            raise TargetError(
                f"{what} names {sorted(unknown, key=repr)}, the variables are {list(names)}"
            )
        parts = dict(targets)
        for name in names:
            if name in parts:
                continue
            if what == "target" and name not in kept_by_default:
                raise TargetError(
                    f"no target for {name!r}: give a class, KEEP to hold its beliefs where "
                    f"they are, or FREE to let them move"
                )
            parts[name] = KEEP if what == "target" else FREE
        return {name: parts[name] for name in names}
    tensor = as_classes(targets, what)
    if tensor.ndim == 0 or tensor.shape[-1] != len(names):
        raise TargetError(
            f"{what} must be a mapping from {list(names)}, or a tensor with these "
            f"{len(names)} as last axis, got {tuple(tensor.shape)}"
        )
    return dict(zip(names, tensor.unbind(-1), strict=True))


def stack_targets(
    parts: Mapping[str, Tensor | int], batch: int, device: torch.device, what: str
) -> Tensor:
    """The choice of each variable for each example, (B, V)."""
    columns = []
    for name, part in parts.items():
        column = as_classes(part, f"{what} of {name!r}").to(device)
        if column.dtype.is_floating_point or column.dtype == torch.bool:
            raise TargetError(f"{what} of {name!r} must hold integers, got {column.dtype}")
        if column.ndim and column.shape != (batch,):
            raise TargetError(
                f"{what} of {name!r} must be one number or ({batch},), got {tuple(column.shape)}"
            )
        columns.append(column.long().expand(batch))
    return torch.stack(columns, -1)
