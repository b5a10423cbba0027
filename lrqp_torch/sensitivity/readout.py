"""A number read from a model's logits, as a differentiable function of activations at a site."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lrqp_torch.errors import (
    LRQPError,
    NonFiniteError,
    PositionError,
    WidthError,
)
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.stream.inputs import check_inputs
from lrqp_torch.stream.intervene import Edit, EditContext, Intervention, intervene
from lrqp_torch.stream.replay import Tail, frozen
from lrqp_torch.stream.sites import locate

Readout = Callable[[Tensor, Tensor], Tensor]
"""Logits at the column read, (B, vocabulary), and which prompts these are, (B,) → f, (B,)."""


class SiteReadout:
    """f as a function of the activations at one token a prompt, everything else as in a clean run.

    Args:
        model: in evaluation mode.
        site: whose activations are set.
        inputs: the prompts.
        positions: LongTensor (n,).
        read: LongTensor (n,).
        reading: f.
        batch_size: prompts a pass.
    """

    def __init__(
        self,
        model: nn.Module,
        site: str,
        inputs: Mapping[str, Tensor],
        positions: Tensor,
        read: Tensor,
        reading: Readout,
        *,
        batch_size: int,
    ) -> None:
        where = locate(model, site).site
        if any(module.training for module in model.modules()):
            raise LRQPError("the model is in training mode; call model.eval() first")
        check_inputs(model, inputs)
        n = len(inputs["input_ids"])
        for name, columns in (("positions", positions), ("read", read)):
            if columns.shape != (n,) or columns.dtype != torch.long:
                raise PositionError(
                    f"{name} must be LongTensor ({n},), one column a prompt, got {columns.dtype} "
                    f"{tuple(columns.shape)}"
                )
        self.device = input_device(model)
        self.model, self.site, self.reading = model, str(where), reading
        self.positions, self.read = positions.to(self.device), read.to(self.device)
        self.batch_size = batch_size
        self.tail = Tail(model, inputs, where.layer, int(positions.min()), batch_size=batch_size)

    def __len__(self) -> int:
        return len(self.read)

    def batches(self) -> list[Tensor]:
        """All rows, a batch at a time."""
        return list(torch.arange(len(self), device=self.device).split(self.batch_size))

    @torch.no_grad()
    def activations(self, rows: Tensor) -> Tensor:
        """The clean activations of some prompts, (B, d), in the stream's dtype."""
        found: list[Tensor] = []

        def keep(x: Tensor, context: EditContext) -> Tensor:
            found.append(x)
            return x

        self._run(rows, keep)
        return found[-1]

    @torch.no_grad()
    def value(self, rows: Tensor, x: Tensor) -> Tensor:
        """The reading f with the activations x, (B, d), in place: (B,), float64."""
        pieces = zip(rows.split(self.batch_size), x.split(self.batch_size), strict=True)
        return torch.cat([self._evaluate(*piece) for piece in pieces])

    def gradient(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The reading f, (B,), and its gradient at x, (B, d), both float64.

        Raises:
            LRQPError: the reading is no function of the logits that could be differentiated.
            NonFiniteError: either is NaN or infinite.
        """
        pieces = zip(rows.split(self.batch_size), x.split(self.batch_size), strict=True)
        values, gradients = zip(*(self._differentiate(*piece) for piece in pieces), strict=True)
        return torch.cat(values), torch.cat(gradients)

    def _differentiate(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with frozen(self.model), torch.enable_grad():
            leaf = x.detach().double().requires_grad_(True)
            value = self._evaluate(rows, leaf)
            if not value.requires_grad:
                raise LRQPError(
                    "the reading has no gradient: compute it from the logits that it is given, in "
                    "torch, without detach or item, and outside of torch.inference_mode"
                )
            gradient: Tensor | None
            (gradient,) = torch.autograd.grad(value.sum(), [leaf], allow_unused=True)
        # A reading that the activation cannot reach is constant in it.
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(f"the gradient at {self.site} holds NaN or infinity")
        return value.detach(), gradient.detach()

    def _evaluate(self, rows: Tensor, x: Tensor) -> Tensor:
        logits = self._run(rows, lambda old, context: x.to(old.dtype))
        value = self.reading(logits, rows)
        if not isinstance(value, Tensor) or value.shape != rows.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise WidthError(f"the reading must return ({len(rows)},), one a prompt, got {shape}")
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError("the reading of the logits holds NaN or infinity")
        return value.double()

    def _run(self, rows: Tensor, edit: Edit) -> Tensor:
        columns, slot = self.read[rows].unique(return_inverse=True)
        with intervene(self.model, Intervention(self.site, self.positions[rows], edit)):
            logits = self.tail.run(rows, columns)
        return logits[torch.arange(len(rows), device=self.device), slot]
