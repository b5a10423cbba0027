"""What a model is given: its arguments by name, checks of them, and batches with little padding.

Examples of one length make a batch without padding. So a padded set of n examples is cut into
batches of neighbours in length, and each batch loses the padding that none of its examples needs.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrqp_torch.errors import PositionError, WidthError
from lrqp_torch.stream.attention import NAME as PATTERNS_SHOWN
from lrqp_torch.stream.compiled import inner_model
from lrqp_torch.stream.discovery import vocabularies
from lrqp_torch.stream.passes import puts_tokens_in_front
from lrqp_torch.stream.sites import Trunk, stacks_of
from lrqp_torch.stream.text import TextInputs

BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Arguments of a model's forward that have one entry a token, (n, T) or (n, T, d)."""


_OF_DECODER = {f"decoder_{name}": name for name in BY_TOKEN}


@dataclass(frozen=True)
class TokenBatch:
    """Examples that run together, all over the same number of columns."""

    examples: Tensor  # rows of the inputs in ascending order, LongTensor (b,)
    first: Tensor  # the column of the input at which each of them begins to run, LongTensor (b,)
    width: int  # how many columns run, padding included


def as_inputs(model: nn.Module, given: Any, tokenizer: Any = None) -> Any:
    """What a model is given: named tensors as they are, or texts as its tokenizer reads them.

    Texts are padded on the tokenizer's side, without truncation. A model that counts columns is
    told the positions of the tokens, and a decoder begins with its start token.

    Raises:
        WidthError: neither.
        TokenizerError: texts without a fast tokenizer.
    """
    if isinstance(given, Mapping):
        return given
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise WidthError(
            f"inputs must be a mapping with input_ids, such as tokenizer(texts, "
            f"return_tensors='pt', padding=True), or texts, got {type(given).__name__}"
        )
    inputs = TextInputs.of(texts, tokenizer)
    trunk = Trunk.of(model, next(iter(stacks_of(model))))
    if not trunk.absolute:
        del inputs["position_ids"]
    if trunk.stack:
        start = cast(Any, inner_model(model)).config.decoder_start_token_id or 0
        inputs["decoder_input_ids"] = torch.full((len(texts), 1), start)
    return inputs


def of_stack(model: nn.Module, inputs: Mapping[str, Any], trunk: Trunk) -> Mapping[str, Any]:
    """What one stack is given, under the names that models of one stack have for it.

    A decoder that is given no tokens of its own reads the labels, or else the encoder's tokens,
    shifted by one.
    """
    if trunk.stack != "decoder":
        own = {name: value for name, value in inputs.items() if name not in _OF_DECODER}
        return inputs.like(own) if isinstance(inputs, TextInputs) else own
    own = {short: inputs[name] for name, short in _OF_DECODER.items() if name in inputs}
    labels = inputs.get("labels")
    if own.get("input_ids") is None and own.get("inputs_embeds") is None:
        own.pop("input_ids", None)
        inner: Any = inner_model(model)
        if isinstance(labels, Tensor):
            shift = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
            own["input_ids"] = labels.clamp_min(0) if shift is None else shift(labels)
        elif isinstance(inputs.get("input_ids"), Tensor):
            own["input_ids"] = inputs["input_ids"]
    return own


def count_tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Number of examples n and of columns T of the inputs.

    Raises:
        PositionError: neither ``input_ids`` nor ``inputs_embeds``, or no token in them.
        WidthError: they are not (n, T), or (n, T, d).
    """
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            shape, form = tuple(inputs[name].shape), "(n, T, d)" if "embeds" in name else "(n, T)"
            if len(shape) != form.count(",") + 1:
                raise WidthError(f"{name} must be {form}, got {shape}; for one text use [None]")
            n_examples, length = shape[:2]
            if n_examples == 0 or length == 0:
                lacking = "example" if n_examples == 0 else "token"
                raise PositionError(
                    f"{name} holds no {lacking}, its shape is {shape}: nothing would be captured"
                )
            return n_examples, length
        if inputs.get(name) is not None:
            raise WidthError(
                f"{name} must be a tensor, got {type(inputs[name]).__name__}; ask the tokenizer "
                f"for return_tensors='pt', or use torch.as_tensor"
            )
    raise PositionError(f"inputs need input_ids or inputs_embeds, got {sorted(inputs)}")


def may_trim(model: nn.Module, inputs: Mapping[str, Any], trunk: Trunk) -> bool:
    """Whether examples may change places and lose padding without a change of what is computed.

    Not so without an attention mask (n, T) that says what padding is; when another tensor among the
    inputs has a shape of its own; when hooks on the model, such as open edits, or attention
    patterns that are shown to someone, count on rows and columns as they are; when an adapter puts
    tokens in front, from which padding keeps the text apart; when another stack reads too; when
    the rotary frequencies depend on how long the longest input is (``dynamic`` and ``longrope``);
    or when the model was seen to compute other things beside padding, as those that count columns
    and cannot be told otherwise (BART, XGLM), convolve over it, or know it by its token alone.
    """
    if trunk.stack:
        return False
    n_examples, length = count_tokens(inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    mask = tensors.get("attention_mask")
    if mask is None or mask.shape != (n_examples, length):
        return False
    for name, value in tensors.items():
        rows = (1, n_examples) if name == "position_ids" else (n_examples,)
        if name not in BY_TOKEN or value.shape[0] not in rows or value.shape[1] != length:
            return False
    padding = trunk.padding
    if padding is not None and padding.token is not None and "input_ids" in tensors:
        ids = tensors["input_ids"]
        if bool((ids[mask.to(ids.device) == 0] != padding.token).any()):
            return False
    within = is_watched(model) or puts_tokens_in_front(model) or _rotates_by_length(model)
    return not (within or (padding is not None and padding.read))


def real_spans(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First real column of each example and the columns from there to its last, each (n,).

    An example without a real token counts as one column.
    """
    real = mask != 0
    length = real.shape[1]
    first = real.byte().argmax(1)
    last = length - 1 - real.flip(1).byte().argmax(1)
    return first, torch.where(real.any(1), last - first + 1, 1)


def in_order(
    length: int, examples: range, batch_size: int | None, batch_tokens: int | None
) -> list[TokenBatch]:
    """Batches of the examples as they stand, over all columns."""
    size = len(examples) if batch_size is None else batch_size
    if batch_tokens is not None:
        size = min(size, max(batch_tokens // length, 1))
    rows = torch.arange(examples.start, examples.stop)
    return [TokenBatch(part, torch.zeros_like(part), length) for part in rows.split(size)]


def by_length(
    mask: Tensor, examples: range, batch_size: int | None, batch_tokens: int | None
) -> list[TokenBatch]:
    """Batches of neighbours in length, the longest first, without the padding that none needs.

    Longest first, so that a batch too large for the memory fails at once. An example that is
    longer than ``batch_tokens`` runs alone.

    Args:
        mask: attention mask of all examples, (n, T), padded on either side.
        examples: the rows to run.
        batch_size: the most examples a batch; None for no limit.
        batch_tokens: the most tokens a batch, padding included; None for no limit.
    """
    first, spans = (part.cpu() for part in real_spans(mask[examples.start : examples.stop]))
    order = spans.argsort(descending=True, stable=True)
    widths = spans[order].tolist()
    batches, start = [], 0
    while start < len(order):
        size = len(order) if batch_size is None else batch_size
        if batch_tokens is not None:
            size = min(size, max(batch_tokens // widths[start], 1))
        rows = order[start : start + size].sort().values
        # A row that is too short for its first real token to lead ends with the input instead.
        begin = first[rows].clamp_max(mask.shape[1] - widths[start])
        batches.append(TokenBatch(rows + examples.start, begin, widths[start]))
        start += size
    return batches


def take(inputs: Any, batch: TokenBatch, n_examples: int) -> Any:
    """A batch's rows of the inputs as they stand, of each tensor that has one an example."""
    rows = slice(int(batch.examples[0]), int(batch.examples[-1]) + 1)
    if isinstance(inputs, Tensor):
        return inputs[rows] if inputs.ndim and len(inputs) == n_examples else inputs
    if isinstance(inputs, Mapping):
        parts = {name: take(value, batch, n_examples) for name, value in inputs.items()}
        # What an encoder returned comes as an object that is a mapping too.
        return parts if type(inputs) in (dict, TextInputs) else type(inputs)(**parts)
    if isinstance(inputs, tuple):
        return tuple(take(value, batch, n_examples) for value in inputs)
    return inputs


def cut(inputs: Mapping[str, Any], batch: TokenBatch, trunk: Trunk) -> dict[str, Any]:
    """A batch's rows and columns of inputs that :func:`may_trim` allows, for ``model(**part)``.

    A model that counts columns where it is given no ``position_ids`` (learned positions) is told
    the columns of the whole input, so that it computes what it would have computed there.
    """
    n_examples, _ = count_tokens(inputs)
    columns = batch.first[:, None] + torch.arange(batch.width)

    def pick(value: Tensor) -> Tensor:
        every = value.expand(n_examples, *value.shape[1:])
        return every[batch.examples.to(value.device)[:, None], columns.to(value.device)]

    part = {
        name: pick(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    moved = bool((batch.first > 0).any())
    if moved and trunk.absolute and inputs.get("position_ids") is None:
        part["position_ids"] = columns
    return part


def wasted_share(mask: Tensor, batches: list[TokenBatch]) -> float:
    """The share of all tokens that run in the batches which are padding."""
    run = sum(len(batch.examples) * batch.width for batch in batches)
    real = sum(int((mask[batch.examples.to(mask.device)] != 0).sum()) for batch in batches)
    return 1 - real / run


def is_watched(model: nn.Module) -> bool:
    """Whether hooks, or visitors of attention patterns, see the model's forward passes.

    Not so the hooks of transformers' own, which ``output_hidden_states=True`` leaves on the blocks
    for good, and which only read.
    """
    shown = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return shown == PATTERNS_SHOWN or any(
        not _is_transformers_own(hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _is_transformers_own(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _rotates_by_length(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def vocabulary_of(model: nn.Module, trunk: Trunk | None = None) -> int:
    """How many tokens the model, or one of its stacks, has an embedding for, or at most has."""
    whole = inner_model(model)
    part = trunk.module if trunk is not None and trunk.stack else whole
    return max(vocabularies(part, whole), default=sys.maxsize)


def check_inputs(model: nn.Module, inputs: Mapping[str, Any], trunk: Trunk | None = None) -> None:
    """Raise unless tokens, attention mask and position ids fit each other and the model.

    Args:
        model: a transformers model.
        inputs: keyword arguments of its forward, for n examples of T tokens.
        trunk: which of its stacks they are of; by default the only one.

    Raises:
        WidthError: a mask that is neither (n, T) nor four-dimensional for n examples or for one;
            position ids that are neither (n, T) nor (1, T); token ids of another dtype than long
            or int, or outside the vocabulary; see also :func:`~.inputs.count_tokens`.
        PositionError: more positions than the model has learned embeddings for, or none at all.
    """
    trunk = trunk or Trunk.of(model)
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
        _check_tokens(ids, vocabulary_of(model, trunk))
    _check_learned_positions(model, trunk, n_examples, length, mask, places)


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
    model: nn.Module, trunk: Trunk, n_examples: int, length: int, mask: object, places: object
) -> None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    by_column = trunk.absolute
    # OPT has learned positions too, but counts the real tokens itself.
    learned = by_column or any(
        isinstance(module, nn.Embedding) and "position" in name
        for name, module in trunk.module.named_children()
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
