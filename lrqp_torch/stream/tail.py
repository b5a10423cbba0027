"""Rerun the layers above a site, with gradients, from a clean run that is kept for all prompts.

:class:`~.replay.Replay` keeps one batch for many edits without gradients; this keeps many
prompts for many passes with gradients, and any rows of it can be run, so that minibatches may be
drawn anew in each epoch. What an edit cannot change (layers below, tokens before) never runs again
and is never part of the graph, so a backward pass needs the memory of the layers above the site.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lrqp_torch.errors import NonFiniteError, PositionError, SiteError
from lrqp_torch.stream.hooks import record_stream, resume_at
from lrqp_torch.stream.inputs import cache_among, forward_of, name_of_cache
from lrqp_torch.stream.placement import input_device
from lrqp_torch.stream.sites import blocks_of


class Tail:
    """The clean run of n prompts, as far as reruns from a layer and a column on need it.

    Kept are the input of the block in the columns that run again, and keys and values of the
    columns before, in the layers that run again: (T − c) d + 2 c (layers above) (key width) numbers
    a prompt, on the model's device.

    Args:
        model: a transformers causal language model.
        inputs: ``input_ids`` and ``attention_mask``, (n, T), and ``position_ids`` where padded.
        layer: the lowest block that any edit touches.
        first_position: c, the smallest column that any edit touches.
        batch_size: prompts in each clean forward pass.

    Attributes:
        first_position: as given, or 0 where the model's cache cannot be cropped exactly (sliding
            windows); :meth:`run` is then the full forward pass.

    Raises:
        PositionError: first_position is not a column of the inputs, or there are no input_ids.
        SiteError: the model has no such layer.
        NonFiniteError: the clean stream holds NaN or infinity.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        layer: int,
        first_position: int,
        *,
        batch_size: int = 64,
    ) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or len(ids) == 0:
            raise PositionError(f"reruns need input_ids of at least one prompt, got {list(inputs)}")
        if not 0 <= first_position < ids.shape[1]:
            raise PositionError(
                f"first_position {first_position} is outside the {ids.shape[1]} tokens"
            )
        if not 0 <= layer < len(blocks_of(model)):
            raise SiteError(f"layer {layer}: the model has {len(blocks_of(model))} blocks")
        self.model, self.layer = model, layer
        self._device = input_device(model)
        self._inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        self._selects = "logits_to_keep" in forward_of(model).parameters
        self._cache_name = name_of_cache(model)
        self.first_position = first_position
        streams: list[Tensor] = []
        pasts: list[list[tuple[Tensor, Tensor]]] = []
        for rows in torch.arange(len(ids), device=self._device).split(batch_size):
            stream, past = self._clean(rows)
            streams.append(stream)
            pasts.append(past)
        self._stream = torch.cat(streams) if self.first_position else None
        self._past = [
            (torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts]))
            for parts in zip(*pasts, strict=True)
        ]

    def run(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits of some prompts at some columns, (len(rows), len(columns), vocabulary).

        Runs with the edits whose contexts are open, whose positions must be those of ``rows``, on
        the whole padded input as always. Differentiable.

        Args:
            rows: LongTensor (m,), which of the n prompts.
            columns: LongTensor (k,), rising, none below ``first_position``.
        """
        rows, columns = rows.to(self._device), columns.to(self._device)
        if len(columns) == 0 or int(columns.min()) < self.first_position:
            raise PositionError(f"columns must be {self.first_position} or more, got {columns}")
        arguments: dict[str, Any] = {name: tensor[rows] for name, tensor in self._inputs.items()}
        options: dict[str, Any] = {"use_cache": bool(self.first_position)}
        at = columns - self.first_position
        if self._selects:
            options["logits_to_keep"] = at
        with ExitStack() as stack:
            if self._stream is not None:
                for name in ("input_ids", "position_ids"):
                    if name in arguments:
                        arguments[name] = arguments[name][:, self.first_position :]
                # Layers below never read their part of the cache: only its length is asked for.
                below = self._stream.new_zeros(1, 1, 1, 1).expand(
                    len(rows), 1, self.first_position, 1
                )
                past = [(below, below)] * self.layer
                past += [(keys[rows], values[rows]) for keys, values in self._past]
                arguments[self._cache_name] = DynamicCache(past)
                stack.enter_context(resume_at(self.model, self.layer, self._stream[rows]))
            logits: Tensor = self.model(**arguments, **options).logits
        return logits if self._selects else logits[:, at]

    def _clean(self, rows: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The block's input and the cache of the layers above, for one batch."""
        arguments: dict[str, Any] = {name: tensor[rows] for name, tensor in self._inputs.items()}
        if self._selects:
            arguments["logits_to_keep"] = 1
        with record_stream(self.model, self.first_position) as streams:
            cache = cache_among(self.model(**arguments, use_cache=True))
        stream = streams[self.layer]
        if not bool(torch.isfinite(stream).all()):
            raise NonFiniteError(
                f"the clean stream before block {self.layer} holds NaN or infinity; try the model "
                f"in float32"
            )
        if not isinstance(cache, DynamicCache) or any(
            type(layer) is not DynamicLayer for layer in cache.layers
        ):
            self.first_position = 0
        column = self.first_position
        past = [
            (layer.keys[:, :, :column].clone(), layer.values[:, :, :column].clone())
            for layer in (cache.layers[self.layer :] if column else [])
        ]
        return stream, past


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model asks for a gradient within the context; then all as before."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
