"""Rerun only what an edit can change.

An edit at layer L and token p changes layers from L and tokens from p on, and nothing before. So
the keys and values of the tokens before the first edited one are taken from a clean run, blocks
below L are left out, and only the suffix is fed to the rest of the model again: in a prompt of 60
tokens with an edit near its end, some 10 of them. The result equals the full intervened forward
pass to rounding.

:class:`Replay` keeps one batch for many edits without gradients. Edits of the same prompts can run
side by side, as copies in one batch: each weight is then read once for all of them, which matters
where the suffix is short. :class:`Tail` keeps many prompts for many passes with gradients, and any
rows of it can be run, so that minibatches may be drawn anew in each epoch. What an edit cannot
change never runs again and is never part of the graph, so a backward pass needs the memory of the
layers above the site.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lrqp_torch.errors import NonFiniteError, PositionError, SiteError
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.stream.hooks import record_stream, resume_at
from lrqp_torch.stream.passes import cache_among, forward_of, name_of_cache
from lrqp_torch.stream.sites import blocks_of

TOKEN_INPUTS = ("input_ids", "position_ids")
"""Inputs with one entry a token that runs; the attention mask also covers the prefix."""


class Replay:
    """A clean run of one batch, kept so that edits of its suffix can be tried cheaply.

    Args:
        model: a transformers causal language model.
        inputs: ``input_ids`` and ``attention_mask``, (B, T), and ``position_ids`` where the batch
            is padded; already on the model's device.
        first_position: the smallest column that any edit will touch; columns before it are not
            run again.
        copies: how many edits of each example :meth:`run` takes side by side: its batch has
            copies · B rows, and row c · B + i is copy c of example i.

    Attributes:
        clean_logits: logits of the last column in the clean run, (B, vocabulary).
        first_position: as given, or 0 where the model's cache cannot be cropped exactly (sliding
            windows), so that :meth:`run` is then the full forward pass.
        copies: as given.

    Raises:
        PositionError: first_position is not a column of the inputs, there are no input_ids, or
            copies is below 1.
    """

    # In inference mode the cache could not be written to outside it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        first_position: int,
        *,
        copies: int = 1,
    ) -> None:
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise PositionError(f"replay needs input_ids, got {sorted(inputs)}")
        length = inputs["input_ids"].shape[1]
        if not 0 <= first_position < length:
            raise PositionError(f"first_position {first_position} is outside the {length} tokens")
        if copies < 1:
            raise PositionError(f"copies must be at least 1, got {copies}")
        self.model, self.copies = model, copies
        self._cache_name = name_of_cache(model)
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in forward_of(model).parameters:
            self._options["logits_to_keep"] = 1
        with record_stream(model, first_position) as self._stream:
            output = model(**inputs, **self._options)
        self.clean_logits: Tensor = output.logits[:, -1]
        cache = cache_among(output)
        plain = isinstance(cache, DynamicCache) and all(
            type(layer) is DynamicLayer for layer in cache.layers
        )
        self.first_position = first_position if plain else 0
        self._inputs = {
            name: self._side_by_side(
                tensor[:, self.first_position :] if name in TOKEN_INPUTS else tensor
            )
            for name, tensor in inputs.items()
        }
        self._past = [
            _Prefix(
                self._side_by_side(layer.keys),
                self._side_by_side(layer.values),
                self.first_position,
            )
            for layer in (cache.layers if self.first_position else [])
        ]

    @torch.no_grad()
    def run(self, first_layer: int = 0, columns: Tensor | None = None) -> Tensor:
        """Logits of the last column or of chosen ones, with the edits whose contexts are open.

        Positions of those edits are columns of the whole input, as always, a row for each copy of
        each example.

        Args:
            first_layer: the lowest layer that any open edit touches; blocks below do not run
                again. An edit at one of them would never fire, which its context reports.
            columns: LongTensor (k,), rising, columns of the whole input that run again.

        Returns:
            (copies · B, vocabulary), or (copies · B, k, vocabulary) of columns.

        Raises:
            SiteError: the model has no such layer.
            PositionError: a column that does not run again.
        """
        if not 0 <= first_layer < len(blocks_of(self.model)):
            raise SiteError(
                f"first_layer {first_layer}: the model has {len(blocks_of(self.model))} blocks"
            )
        arguments: dict[str, Any] = dict(self._inputs)
        options = dict(self._options)
        if columns is not None:
            if len(columns) == 0 or int(columns.min()) < self.first_position:
                raise PositionError(f"columns must be {self.first_position} or more, got {columns}")
            columns = columns - self.first_position
            if "logits_to_keep" in options:
                options["logits_to_keep"] = columns
        with ExitStack() as stack:
            if self.first_position:
                cache = DynamicCache()
                cache.layers.extend(self._past)
                arguments[self._cache_name] = cache
                if first_layer:
                    stream = self._side_by_side(self._stream[first_layer])
                    stack.enter_context(resume_at(self.model, first_layer, stream))
            logits: Tensor = self.model(**arguments, **options).logits
        if columns is None:
            return logits[:, -1]
        return logits if "logits_to_keep" in options else logits[:, columns]

    def _side_by_side(self, tensor: Tensor) -> Tensor:
        """The copies of a batch, (B, ...) → (copies · B, ...)."""
        return tensor if self.copies == 1 else torch.cat([tensor] * self.copies)


class _Prefix(DynamicLayer):
    """A block's keys and values in one buffer: those of a prefix, then those of any suffix.

    The model's own cache would copy the prefix at every run, to put the suffix behind it. Here the
    suffix is written into its place, and the next run writes over it.

    Args:
        keys: (B, heads, T, head width).
        values: the same.
        length: columns that are kept.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._whole, self._length = (keys, values), length
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the suffix behind the prefix, and return both together."""
        keys, values = self._whole
        keys[:, :, self._length :] = key_states
        values[:, :, self._length :] = value_states
        return keys, values


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
