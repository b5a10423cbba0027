"""Rerun only what an edit can change.

An edit at layer L and token p changes layers from L and tokens from p on, and nothing before. So
the keys and values of the tokens before the first edited one are taken from a clean run, blocks
below L are left out, and only the suffix is fed to the rest of the model again: in a prompt of 60
tokens with an edit near its end, some 10 of them. The result equals the full intervened forward
pass to rounding.
"""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lrqp_torch.errors import PositionError, SiteError
from lrqp_torch.hooks import record_stream, resume_at
from lrqp_torch.sites import blocks_of


class Replay:
    """A clean run of one batch, kept so that edits of its suffix can be tried cheaply.

    Args:
        model: a transformers causal language model.
        inputs: ``input_ids`` and ``attention_mask``, (B, T), and ``position_ids`` where the batch
            is padded; already on the model's device.
        first_position: the smallest column that any edit will touch; columns before it are not
            run again.

    Attributes:
        clean_logits: logits of the last column in the clean run, (B, vocabulary).
        first_position: as given, or 0 where the model's cache cannot be cropped exactly (sliding
            windows), so that :meth:`run` is then the full forward pass.

    Raises:
        PositionError: first_position is not a column of the inputs, or there are no input_ids.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], first_position: int) -> None:
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise PositionError(f"replay needs input_ids, got {sorted(inputs)}")
        length = inputs["input_ids"].shape[1]
        if not 0 <= first_position < length:
            raise PositionError(f"first_position {first_position} is outside the {length} tokens")
        self.model, self.inputs = model, dict(inputs)
        accepted = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._options["logits_to_keep"] = 1
        with record_stream(model, first_position) as self._stream:
            output = model(**self.inputs, **self._options)
        self.clean_logits: Tensor = output.logits[:, -1]
        cache = output.past_key_values
        plain = isinstance(cache, DynamicCache) and all(
            type(layer) is DynamicLayer for layer in cache.layers
        )
        self.first_position = first_position if plain else 0
        self._past = [
            (layer.keys[:, :, : self.first_position], layer.values[:, :, : self.first_position])
            for layer in (cache.layers if self.first_position else [])
        ]

    @torch.no_grad()
    def run(self, first_layer: int = 0) -> Tensor:
        """Logits of the last column, (B, vocabulary), with the edits whose contexts are open.

        Positions of those edits are columns of the whole input, as always.

        Args:
            first_layer: the lowest layer that any open edit touches; blocks below do not run
                again. An edit at one of them would never fire, which its context reports.

        Raises:
            SiteError: the model has no such layer.
        """
        if not 0 <= first_layer < len(blocks_of(self.model)):
            raise SiteError(
                f"first_layer {first_layer}: the model has {len(blocks_of(self.model))} blocks"
            )
        arguments: dict[str, Any] = dict(self.inputs)
        with ExitStack() as stack:
            if self.first_position:
                for name in ("input_ids", "position_ids"):
                    if name in arguments:
                        arguments[name] = arguments[name][:, self.first_position :]
                arguments["past_key_values"] = DynamicCache(self._past)
                if first_layer:
                    stack.enter_context(
                        resume_at(self.model, first_layer, self._stream[first_layer])
                    )
            logits: Tensor = self.model(**arguments, **self._options).logits
        return logits[:, -1]
