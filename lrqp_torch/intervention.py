"""Editing the residual stream within a context: any function, at any sites and positions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lrqp_torch.errors import (
    EditNeverFiredError,
    NonFiniteError,
    PositionError,
    SiteError,
    WidthError,
)
from lrqp_torch.hooks import attach, warn_of_dropout, watch_calls
from lrqp_torch.positions import ForwardCall, Positions
from lrqp_torch.sites import Located, locate


@dataclass(frozen=True)
class EditContext:
    """Where the activations that an edit receives come from.

    Attributes:
        index: which of the intervention's (example, token) pairs these rows are, (N,).
        example: row of the batch of each, (N,).
        token: column of each, (N,).
        realise: maps float64 activations (N, d) to the values that the stream will really hold
            when they are put in place, in float64. At ``mid`` that is attention output + block
            input, rounded as the model rounds it.
    """

    index: Tensor
    example: Tensor
    token: Tensor
    realise: Callable[[Tensor], Tensor]


class Edit(Protocol):
    """Anything that maps activations (N, d) at some positions to edited activations (N, d)."""

    def __call__(self, x: Tensor, context: EditContext) -> Tensor:
        """Return the edited activations; rows that equal x are left untouched, bit for bit."""


@dataclass(frozen=True)
class Intervention:
    """One edit at one site: ``edit`` receives the activations at ``positions``.

    Attributes:
        site: such as ``"L6.mid"``.
        positions: LongTensor (B,), LongTensor (B, n) or BoolTensor (B, T).
        edit: for example ``lambda x, context: x + direction``.
    """

    site: str
    positions: Tensor
    edit: Edit


@contextmanager
def intervene(
    model: nn.Module, interventions: Intervention | Sequence[Intervention]
) -> Iterator[list[Edit]]:
    """Apply edits to every forward pass of ``model`` within the context.

    Edits at one site run in the order given. The model itself is not changed: when the context
    closes, also by an exception, all hooks are gone. With a KV cache, positions are absolute, and
    an edit runs in the call whose tokens it names.

    To read the edited stream, use :func:`capture` within the context: transformers' own
    ``output_hidden_states`` may record a block's output before an edit of it.

    Args:
        model: a transformers model with a row in :data:`lrqp_torch.sites.FAMILIES`.
        interventions: one, or a list of at least one.

    Yields:
        The edits, in the order given, as a convenience for reading what they recorded.

    Raises:
        SiteError, UnknownFamilyError, PositionError: on entering, before anything runs.
        PositionError: in the forward pass, when positions do not fit the batch or are padding.
        NonFiniteError, WidthError: in the forward pass, when an edit returns NaN, infinity or
            another shape.
        EditNeverFiredError: on closing, when positions never ran through the model.
    """
    if isinstance(interventions, Intervention):
        interventions = [interventions]
    wrong = [item for item in interventions if not isinstance(item, Intervention)]
    if wrong:
        raise SiteError(
            f"intervene takes a list of Intervention, such as [edit.on(site, ...)], got "
            f"{type(wrong[0]).__name__}"
        )
    applied = [
        _Applied(item, Positions.parse(item.positions), locate(model, item.site))
        for item in interventions
    ]
    if not applied:
        raise PositionError("no interventions were given: nothing would be edited")
    warn_of_dropout(model)
    with ExitStack() as stack:
        calls = watch_calls(model, stack, [item.positions for item in applied])
        for item in sorted(applied, key=lambda item: item.located.site):
            item.attach(stack, calls)
        yield [item.edit for item in interventions]
    # Reached only when the body did not raise: its own error says more than this one would.
    for item in applied:
        item.raise_unless_fired()


class _Applied:
    """An intervention on a particular model, and which of its positions have run."""

    def __init__(self, item: Intervention, positions: Positions, located: Located) -> None:
        self.item, self.positions, self.located = item, positions, located
        self.fired = torch.zeros(len(positions.token), dtype=torch.bool)

    def attach(self, stack: ExitStack, calls: list[ForwardCall]) -> None:
        def edit(stream: Tensor, residual: Tensor | None) -> Tensor:
            return self.apply(stream, residual, calls[-1])

        attach(stack, self.located, edit)

    def apply(self, stream: Tensor, residual: Tensor | None, call: ForwardCall) -> Tensor:
        """The module's tensor with the edited rows in place.

        ``residual`` is the block input at ``mid``, where ``stream`` is the attention output and
        the activation is their sum; elsewhere None.
        """
        positions = self.positions = self.positions.to(stream.device)
        present = (positions.token >= call.past) & (positions.token < call.past + call.length)
        index = present.nonzero().squeeze(-1)
        if len(index) == 0:
            return stream
        rows, columns = positions.example[index], positions.token[index] - call.past
        written = stream[rows, columns]
        base = None if residual is None else residual[rows, columns]
        x = written if base is None else written + base

        def place(values: Tensor) -> Tensor:
            """What to write so that the stream holds ``values``, as nearly as its dtype can."""
            wide = values.double()
            return (wide if base is None else wide - base.double()).to(stream.dtype)

        def realise(values: Tensor) -> Tensor:
            placed = place(values.to(stream.dtype))  # edits return the stream's dtype
            return (placed if base is None else placed + base).double()

        # A copy, so that an edit which works in place is seen to have changed something.
        edited = self.item.edit(x.clone(), EditContext(index, rows, columns + call.past, realise))
        self._check(x, edited, stream.dtype)
        changed = (edited != x).any(-1, keepdim=True)
        self.fired[index.cpu()] = True
        return stream.index_put((rows, columns), torch.where(changed, place(edited), written))

    def _check(self, x: Tensor, edited: Tensor, dtype: torch.dtype) -> None:
        site = self.located.site
        if not isinstance(edited, Tensor) or edited.shape != x.shape:
            shape = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise WidthError(
                f"the edit at {site} returned {shape} for activations {tuple(x.shape)}"
            )
        if not bool(torch.isfinite(edited.to(dtype)).all()):
            raise NonFiniteError(
                f"the edit at {site} returned NaN, infinity, or more than {dtype} can hold"
            )

    def raise_unless_fired(self) -> None:
        if bool(self.fired.all()):
            return
        missed = (~self.fired).nonzero().flatten()
        pairs = [(int(self.positions.example[i]), int(self.positions.token[i])) for i in missed[:5]]
        raise EditNeverFiredError(
            f"the edit at {self.located.site} never ran at {len(missed)} of {len(self.fired)} "
            f"positions, the first (example, token) are {pairs}. Run the model inside the context; "
            f"with a KV cache, positions before the cached part have passed already"
        )
