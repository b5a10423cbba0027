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

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lrqp_torch.errors import ModelError, NonFiniteError, PositionError, SiteError
from lrqp_torch.stream.compiled import input_device
from lrqp_torch.stream.hooks import record_stream, resume_at
from lrqp_torch.stream.passes import cache_among, forward_of, name_of_cache
from lrqp_torch.stream.sites import blocks_of
from lrqp_torch.stream.watch import opened
from lrqp_torch.stream.weights import Weights

TOKEN_INPUTS = ("input_ids", "position_ids")
"""Inputs with one entry a token that runs; the attention mask also covers the prefix."""

_MOST_BRANCHES = 256
"""Rows that follow a run in one forward pass; keeps their copies of its cache within bounds."""


class _Rerun:
    """A clean run of a model that is kept, and passes that go on from it.

    Attributes:
        model: the model.
        first_position: the first column that runs again; 0, so that all run, where the cache cannot
            be cropped exactly (sliding windows, recurrent states) or an adapter puts tokens in
            front.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], layer: int, first_position: int
    ) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or len(ids) == 0:
            raise PositionError(
                f"reruns need at least one prompt in input_ids, got {sorted(inputs)}"
            )
        if not 0 <= first_position < ids.shape[1]:
            raise PositionError(
                f"first_position {first_position} is outside the {ids.shape[1]} tokens"
            )
        self.model, self.first_position = model, first_position
        self._weights = Weights(model)
        self._within = [
            ref(opening)
            for opening in opened()
            if opening.watch.edits and opening.watch.model is model
        ]
        taken = forward_of(model).parameters
        if "use_cache" not in taken and all(p.kind is not p.VAR_KEYWORD for p in taken.values()):
            raise ModelError(
                f"{type(model).__name__} takes no use_cache, so there is no cache of a clean run "
                f"to go on from: run it as a whole, within the edit's context"
            )
        self._selects = "logits_to_keep" in taken
        self._cache_name = name_of_cache(model)
        self._goes_on = False
        self._check_layer(layer, "layer")

    def _check_layer(self, layer: int, name: str) -> None:
        if not 0 <= layer < len(blocks_of(self.model)):
            raise SiteError(f"{name} {layer}: the model has {len(blocks_of(self.model))} blocks")

    def _clean(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Any]]:
        """Logits of the last column, every block's input, and the cache of every layer."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        options = {"logits_to_keep": 1} if self._selects else {}
        with record_stream(self.model, self.first_position) as (streams, watch):
            output = self.model(**inputs, **options, use_cache=True)
        found = cache_among(output)
        # Kinds of their own, such as MiniMax's, hold what cannot be cropped beside their layers.
        plain = type(found) is DynamicCache and all(
            type(layer) is DynamicLayer and layer.is_initialized for layer in found.layers
        )
        self._cache, self._fronted = found, bool(watch.texts.front)
        if watch.texts.front or not plain:
            self.first_position = 0
        return output.logits[:, -1], streams, found.layers if self.first_position else []

    def _check_model(self) -> None:
        """Raise if what is kept is not what the model would give now.

        Raises:
            ModelError: its weights, the adapter in use, or what edits it are others.
        """
        if not all(opening() in opened() for opening in self._within):
            raise ModelError(
                f"this {type(self).__name__} was made within an edit whose context has closed, so "
                f"what it kept is edited and what goes on from there is not: make it outside"
            )
        if self._weights.changed(self.model):
            raise ModelError(
                f"the weights of {type(self.model).__name__} have changed since its clean run was "
                f"kept, so what goes on from there would be of two models: make another "
                f"{type(self).__name__}"
            )

    def _columns(self, columns: Tensor) -> Tensor:
        """Columns of the input as columns of what runs again."""
        if len(columns) == 0 or int(columns.min()) < self.first_position:
            raise PositionError(f"columns must be {self.first_position} or more, got {columns}")
        return columns - self.first_position

    def _go_on(
        self,
        inputs: Mapping[str, Tensor],
        layers: list[Any],
        layer: int,
        stream: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        """Logits, at the last column or at chosen ones of those that run."""
        from transformers import DynamicCache

        self._check_model()
        arguments: dict[str, Any] = dict(inputs)
        if self._selects:
            arguments["logits_to_keep"] = 1 if columns is None else columns
        with ExitStack() as stack:
            if layers:
                arguments[self._cache_name] = past = DynamicCache()
                past.layers.extend(layers)
            if stream is not None:
                stack.enter_context(resume_at(self.model, layer, stream))
            output = self.model(**arguments, use_cache=bool(layers) or self._goes_on)
        logits: Tensor = output.logits
        if self._goes_on:
            self._cache = cache_among(output)
        if columns is None:
            return logits[:, -1]
        return logits if self._selects else logits[:, columns]


class Replay(_Rerun):
    """A clean run of one batch, kept so that edits of its suffix can be tried cheaply.

    Args:
        model: a transformers causal language model.
        inputs: ``input_ids`` and ``attention_mask``, (B, T), and ``position_ids`` where the batch
            is padded; already on the model's device.
        first_position: the smallest column that any edit will touch; columns before it are not
            run again.
        copies: how many edits of each example :meth:`run` takes side by side: its batch has
            copies · B rows, and row c · B + i is copy c of example i.
        goes_on: whether :meth:`follow` will be asked what comes behind a run.

    Attributes:
        clean_logits: logits of the last column in the clean run, (B, vocabulary).
        first_position: as given, or 0 where the model's cache cannot be cropped exactly (sliding
            windows, recurrent states) or an adapter puts tokens in front, so that :meth:`run` is
            then the full forward pass.
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
        goes_on: bool = False,
    ) -> None:
        if copies < 1:
            raise PositionError(f"copies must be at least 1, got {copies}")
        super().__init__(model, inputs, 0, first_position)
        self.copies = copies
        self.clean_logits, self._stream, layers = self._clean(inputs)
        self._goes_on, self._ran = goes_on, len(blocks_of(model))
        self._whole = self._clean_whole = self._cache if goes_on else None
        self._inputs = {
            name: self._side_by_side(
                # A copy, as the clean run will not follow what is written to the caller's tensors.
                (tensor[:, self.first_position :] if name in TOKEN_INPUTS else tensor).clone()
            )
            for name, tensor in inputs.items()
        }
        self._past = [
            _prefix_layer()(
                self._side_by_side(layer.keys),
                self._side_by_side(layer.values),
                self.first_position,
            )
            for layer in layers
        ]
        first = self.first_position
        self._clean_ends = [
            tuple(self._side_by_side(each[:, :, first:].clone()) for each in (p.keys, p.values))
            for p in (layers if goes_on else [])
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
            ModelError: the model's weights have changed since.
        """
        self._check_layer(first_layer, "first_layer")
        at = None if columns is None else self._columns(columns)
        resumes = self.first_position and first_layer
        stream = self._side_by_side(self._stream[first_layer]) if resumes else None
        logits = self._go_on(self._inputs, self._past, first_layer, stream, at)
        self._ran, self._whole = first_layer, self._cache if self._goes_on else None
        return logits

    @torch.no_grad()
    def follow(self, tokens: Tensor, rows: Tensor, *, clean: bool = False) -> Tensor:
        """Log probability of tokens behind the first ones, after a run, and how far they lie back.

            Σ_{j ≥ 2} log P(token j | prompt as it ran, tokens 1 … j − 1)
            min_{j ≥ 2} log P(token j | …) − max log P(any token | …)

        The keys and values of the run, edits included, are the prefix of all of them; so close the
        edits' contexts before.

        Args:
            tokens: that come behind some examples, (m, k), −1 where there are fewer than k.
            rows: behind which of the copies · B rows of the last run, (m,).
            clean: behind the clean run instead, whose B rows these then are.

        Returns:
            Both, (m, 2) float64; the second is 0 where a greedy model would write these tokens.

        Raises:
            PositionError: the replay was not made with ``goes_on``, or an adapter puts tokens in
                front of every text.
        """
        if self._whole is None or self._fronted:
            raise PositionError(
                "no tokens can follow this run: make Replay(..., goes_on=True), for a model "
                "without an adapter that puts tokens in front"
            )
        self._check_model()
        past = self._ended(clean)
        found = []
        for few in torch.arange(len(rows), device=rows.device).split(_MOST_BRANCHES):
            behind, at = tokens[few], rows[few]
            cache = copy.copy(past)
            cache.layers = [copy.deepcopy(layer) for layer in past.layers]
            cache.reorder_cache(at)
            fed, real = behind[:, :-1].clamp_min(0), behind[:, :-1] >= 0
            arguments: dict[str, Any] = {"input_ids": fed, self._cache_name: cache}
            mask = self._inputs.get("attention_mask")
            if mask is not None:
                arguments["attention_mask"] = torch.cat([mask[at], real.to(mask)], dim=1)
            places = self._inputs.get("position_ids")
            if places is not None:
                arguments["position_ids"] = places[at, -1:] + real.cumsum(1)
            logits: Tensor = self.model(**arguments, use_cache=True).logits
            wanted = behind[:, 1:]
            said = logits.gather(-1, wanted.clamp_min(0).unsqueeze(-1)).squeeze(-1).double()
            log_p, back = said - logits.logsumexp(-1).double(), said - logits.amax(-1).double()
            each = torch.stack([log_p, back], -1).masked_fill((wanted < 0).unsqueeze(-1), 0.0)
            found.append(torch.stack([each[..., 0].sum(-1), each[..., 1].amin(-1)], -1))
        return torch.cat(found)

    def _ended(self, clean: bool) -> Any:
        """The cache of all columns after the last run, or after the clean one."""
        if not self._past:
            return self._clean_whole if clean else self._whole
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache, start = DynamicCache(), self.first_position
        for number, (layer, ends) in enumerate(zip(self._past, self._clean_ends, strict=True)):
            kept = DynamicLayer()
            whole = layer.whole
            if clean or number < self._ran:  # a run from a higher layer leaves what ran before it
                whole = tuple(
                    torch.cat([each[:, :, :start], end], dim=2)
                    for each, end in zip(whole, ends, strict=True)
                )
            kept.keys, kept.values = whole
            kept.dtype, kept.device, kept.is_initialized = kept.keys.dtype, kept.keys.device, True
            cache.layers.append(kept)
        return cache

    def _side_by_side(self, tensor: Tensor) -> Tensor:
        """The copies of a batch, (B, ...) → (copies · B, ...)."""
        return tensor if self.copies == 1 else torch.cat([tensor] * self.copies)


@cache
def _prefix_layer() -> type[Any]:
    """The class of a block's cache in a replay; made when a model is there, as its base is."""
    from transformers.cache_utils import DynamicLayer

    class Prefix(DynamicLayer):
        """A block's keys and values in one buffer: those of a prefix, then those of any suffix.

        The model's own cache would copy the prefix at every run, to put the suffix behind it. Here
        the suffix is written into its place, and the next run writes over it.

        Args:
            keys: (B, heads, T, head width).
            values: the same.
            length: columns that are kept.
        """

        def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.whole, self._length = (keys, values), length
            self.keys, self.values = keys[:, :, :length], values[:, :, :length]
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Put the suffix behind the prefix, and return both together."""
            keys, values = self.whole
            keys[:, :, self._length :] = key_states
            values[:, :, self._length :] = value_states
            return keys, values

    return Prefix


class Tail(_Rerun):
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
            windows, recurrent states) or an adapter puts tokens in front; :meth:`run` is then the
            full forward pass.

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
        super().__init__(model, inputs, layer, first_position)
        self.layer, self._device = layer, input_device(model)
        self._inputs = {name: t.to(self._device, copy=True) for name, t in inputs.items()}
        streams: list[Tensor] = []
        pasts: list[list[tuple[Tensor, Tensor]]] = []
        for rows in torch.arange(len(inputs["input_ids"]), device=self._device).split(batch_size):
            _, before, layers = self._clean({name: t[rows] for name, t in self._inputs.items()})
            if not bool(torch.isfinite(before[layer]).all()):
                raise NonFiniteError(
                    f"the clean stream before block {layer} holds NaN or infinity; try the model "
                    f"in float32"
                )
            streams.append(before[layer])
            kept = slice(self.first_position)
            pasts.append(
                [(p.keys[:, :, kept].clone(), p.values[:, :, kept].clone()) for p in layers[layer:]]
            )
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

        Raises:
            ModelError: the model's weights have changed since.
        """
        rows, at = rows.to(self._device), self._columns(columns.to(self._device))
        inputs = {name: tensor[rows] for name, tensor in self._inputs.items()}
        if self._stream is None:
            return self._go_on(inputs, [], 0, None, at)
        from transformers import DynamicCache

        for name in TOKEN_INPUTS:
            if name in inputs:
                inputs[name] = inputs[name][:, self.first_position :]
        # Layers below never read their part of the cache: only its length is asked for.
        below = self._stream.new_zeros(1, 1, 1, 1).expand(len(rows), 1, self.first_position, 1)
        past = [(below, below)] * self.layer
        past += [(keys[rows], values[rows]) for keys, values in self._past]
        layers = DynamicCache(past).layers
        return self._go_on(inputs, layers, self.layer, self._stream[rows], at)


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
