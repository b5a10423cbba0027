"""Bare forward passes of the shapes that a study cannot avoid: what its own time is held against.

A sweep over sites and conditions needs one clean pass a batch, and for each site and condition the
tokens from the edited one on, through the blocks from the edited one on, with the keys and values
of the tokens before them. These are plain calls of the model, without hooks or edits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lrqp_torch.stream.sites import layout_of, trunk_of


class BarePasses:
    """Forward passes of one batch without edits.

    Args:
        model: a transformers causal language model.
        inputs: ``input_ids``, ``attention_mask`` and ``position_ids``, (B, T).
        first_position: the first column of the suffix.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], first_position: int) -> None:
        self.model, self.inputs, self.first_position = model, dict(inputs), first_position
        cache = self.clean().past_key_values
        self._cache: DynamicCache = cache
        self._length = inputs["input_ids"].shape[1] - first_position
        self._crop()

    @torch.no_grad()
    def clean(self) -> Any:
        """The whole prompt through the whole model; logits of the last column only."""
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def suffix(self, first_layer: int) -> Tensor:
        """The suffix through the blocks from ``first_layer`` on; logits of the last column."""
        suffix: dict[str, Tensor] = {
            name: self.inputs[name][:, self.first_position :]
            for name in ("input_ids", "position_ids")
            if name in self.inputs
        }
        arguments: dict[str, Any] = {**self.inputs, **suffix}
        with only_blocks(self.model, first_layer):
            logits: Tensor = self.model(
                **arguments,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._crop()
        return logits

    def _crop(self) -> None:
        """Forget the suffix again; views only, nothing is copied."""
        layers: list[Any] = list(self._cache.layers)
        for layer in layers:
            layer.keys = layer.keys[:, :, : self.first_position]
            layer.values = layer.values[:, :, : self.first_position]


@contextmanager
def only_blocks(model: nn.Module, first: int = 0, end: int | None = None) -> Iterator[None]:
    """Take the other blocks out of the model for as long as the context lasts."""
    parent, _, name = layout_of(model).blocks.rpartition(".")
    owner = trunk_of(model).get_submodule(parent)
    blocks = getattr(owner, name)
    setattr(owner, name, blocks[first:end])
    try:
        yield
    finally:
        setattr(owner, name, blocks)
