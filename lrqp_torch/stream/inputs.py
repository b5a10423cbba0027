"""What a model is given: its arguments by name, and the checks of them before any of it runs."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import PositionError, WidthError
from lrqp_torch.stream.batching import count_tokens
from lrqp_torch.stream.compiled import unwrapped
from lrqp_torch.stream.sites import family_of, trunk_of

CACHES = ("cache", "past_key_values", "cache_params")
"""Names that transformers has given to a model's KV cache, the newest first."""


def forward_of(module: nn.Module) -> inspect.Signature:
    """What a model's class takes, whatever its ``forward`` was wrapped in or replaced by."""
    plain = unwrapped(module)
    if hasattr(plain, "get_base_model"):
        plain = cast(Any, plain).get_base_model()
    return inspect.signature(type(plain).forward)


def arguments_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of ``module`` by their names, however they were passed.

    Raises:
        PositionError: the call does not fit the signature of the class.
    """
    signature = forward_of(module)
    try:
        given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    except TypeError as error:
        if args:
            raise PositionError(
                f"the call of {type(unwrapped(module)).__name__} cannot be understood ({error}); "
                f"pass its arguments by name"
            ) from error
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def cache_among(given: Mapping[str, Any]) -> Any:
    """The KV cache among named arguments or results of a model, whatever its name; or None.

    Raises:
        PositionError: there are several, or one that does not say how many tokens it holds.
    """
    found = {id(value): value for value in given.values() if hasattr(value, "get_seq_length")}
    if len(found) > 1:
        raise PositionError(
            f"the model has {len(found)} caches ({', '.join(map(_kind, found.values()))}), of "
            f"which one cannot say which holds the text"
        )
    if found:
        return next(iter(found.values()))
    for name, value in given.items():
        known = name in CACHES and value is not None and not isinstance(value, bool)
        if known or _kind(value).endswith("Cache"):
            raise PositionError(
                f"{name} is a {_kind(value)}, which does not say how many tokens it holds, so "
                f"positions in the text cannot be told: run the model without it (use_cache=False)"
            )
    return None


def _kind(value: object) -> str:
    return type(value).__name__


def name_of_cache(model: nn.Module) -> str:
    """The name under which the model takes its KV cache."""
    known = forward_of(model).parameters
    return next((name for name in CACHES if name in known), CACHES[0])


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens the model has an embedding for."""
    return int(cast(Any, model).get_input_embeddings().num_embeddings)


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise unless tokens, attention mask and position ids fit each other and the model.

    Args:
        model: a transformers model with a row in the table of :mod:`lrqp_torch.stream.sites`.
        inputs: keyword arguments of its forward, for n examples of T tokens.

    Raises:
        WidthError: a mask that is neither (n, T) nor four-dimensional for n examples or for one;
            position ids that are neither (n, T) nor (1, T); token ids of another dtype than long
            or int, or outside the vocabulary; see also :func:`~.batching.count_tokens`.
        PositionError: more positions than the model has learned embeddings for, or none at all.
    """
    n_examples, length = count_tokens(inputs)
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor):
        fits = (
            len(mask) in (1, n_examples) if mask.ndim == 4 else mask.shape == (n_examples, length)
        )
        if not fits:
            raise WidthError(
                f"attention_mask is {tuple(mask.shape)}, but the inputs are {n_examples, length}; "
                f"give one entry for each token"
            )
    if isinstance(places, Tensor) and tuple(places.shape) not in (
        (n_examples, length),
        (1, length),
    ):
        raise WidthError(
            f"position_ids are {tuple(places.shape)}, but the inputs are {n_examples, length}; "
            f"give one entry for each token, or one row for all examples"
        )
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor):
        _check_tokens(ids, vocabulary_of(model))
    _check_learned_positions(model, n_examples, length, mask, places)


def _check_tokens(ids: Tensor, vocabulary: int) -> None:
    if ids.dtype not in (torch.long, torch.int):
        raise WidthError(f"input_ids must hold token numbers, got {ids.dtype}; use .long()")
    low, high = ids.aminmax()
    if int(low) < 0 or int(high) >= vocabulary:
        row, column = ((ids < 0) | (ids >= vocabulary)).nonzero()[0].tolist()
        raise WidthError(
            f"input_ids hold {int(ids[row, column])} in row {row}, column {column}, but the model "
            f"has tokens 0 to {vocabulary - 1}; use the model's own tokenizer"
        )


def _check_learned_positions(
    model: nn.Module, n_examples: int, length: int, mask: object, places: object
) -> None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    by_column = family_of(model).absolute_positions
    # OPT has learned positions too, but counts the real tokens itself.
    learned = by_column or any(
        isinstance(module, nn.Embedding) and "position" in name
        for name, module in trunk_of(model).named_children()
    )
    if most is None or not learned:
        return
    counts = torch.full((n_examples,), length)
    if isinstance(places, Tensor):
        if by_column and int(places.min()) < 0:
            row = int((places < 0).any(1).nonzero()[0])
            raise PositionError(f"position_ids of row {row} are negative; count from 0")
        counts = places.amax(1) + 1
    elif not by_column and isinstance(mask, Tensor) and mask.ndim == 2:
        counts = (mask != 0).sum(1)
    if int(counts.max()) > most:
        row = int(counts.argmax())
        raise PositionError(
            f"row {row} needs {int(counts[row])} positions, but the model has learned {most}; "
            f"shorten the text, or cut padding that no example needs"
        )
