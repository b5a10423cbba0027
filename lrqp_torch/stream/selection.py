"""What may stand in the brackets of a data set."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrqp_torch.errors import SelectionError


def row_numbers(index: int | slice | Sequence[int] | Tensor, n: int) -> Tensor:
    """An index into ``n`` rows, as a LongTensor of row numbers from 0, on the CPU.

    Args:
        index: an int, a slice, a sequence of ints, an integer tensor () or (m,), or a BoolTensor
            (n,). Negative numbers count from the end.
        n: number of rows.

    Raises:
        SelectionError: an index is out of range, or of a wrong shape or dtype.
    """
    if isinstance(index, slice):
        return torch.tensor(range(n)[index], dtype=torch.long)
    if isinstance(index, Tensor):
        rows = index.detach().cpu()
    else:
        numbers = [index] if isinstance(index, int) else index
        if not isinstance(numbers, Sequence) or not all(
            isinstance(number, int) and not isinstance(number, bool) for number in numbers
        ):
            raise SelectionError(
                f"a data set cannot be indexed with {index!r}: use an int, a slice, a list of "
                f"ints, a LongTensor, or a BoolTensor (a list of bools is not a mask)"
            )
        rows = torch.tensor(list(numbers), dtype=torch.long)
    if rows.dtype == torch.bool:
        if rows.shape != (n,):
            raise SelectionError(
                f"a boolean mask of shape {tuple(rows.shape)} does not fit {n} prompts: it must "
                f"be of shape ({n},)"
            )
        return rows.nonzero().squeeze(1)
    if rows.is_floating_point() or rows.is_complex() or rows.dim() > 1:
        raise SelectionError(
            f"a data set cannot be indexed with a tensor of dtype {rows.dtype} and shape "
            f"{tuple(rows.shape)}: it must hold integers, or bools, in one dimension"
        )
    rows = rows.long().reshape(-1)
    outside = rows[(rows < -n) | (rows >= n)]
    if outside.numel():
        raise SelectionError(f"index {outside[0].item()} is out of range for {n} prompts")
    return rows.remainder(n) if n else rows
