"""Every error that lrqp_torch raises, one class a cause, and the checks of tensors that raise them.

Each message says what is wrong, where, and how to mend it. All derive from
:class:`LRQPError`, and from the built-in class that a caller would expect
(``ValueError`` for a bad argument, ``RuntimeError`` for a failed run), so both
``except LRQPError`` and ``except ValueError`` work.
"""

import inspect
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor


class LRQPError(Exception):
    """Base class of all errors raised by lrqp_torch."""


class SiteError(LRQPError, ValueError):
    """A site name that does not parse, a layer out of range, or a site that the family lacks."""


class UnknownFamilyError(LRQPError, ValueError):
    """A model whose family has no row in the table of :mod:`lrqp_torch.stream.sites`."""


class PositionError(LRQPError, ValueError):
    """Token positions out of range, on padding, or of a wrong shape or dtype."""


class TargetError(LRQPError, ValueError):
    """Target or source classes out of range, or of a wrong shape or dtype."""


class WidthError(LRQPError, ValueError):
    """Tensors whose widths or batch sizes do not fit together."""


class NonFiniteError(LRQPError, ValueError):
    """NaN or infinity in activations, probe, covariance or floor."""


class CovarianceError(LRQPError, ValueError):
    """A covariance that is not symmetric positive semidefinite, or too few samples for one."""


class LabelError(LRQPError, ValueError):
    """Labels that no probe can be fitted to: one class only, a class missing, too few examples."""


class BatchError(LRQPError, ValueError):
    """Batches that cannot be gone through twice, or that differ from one pass to the next."""


class ConvergenceError(LRQPError, RuntimeError):
    """An optimiser stopped before it reached the promised gradient norm."""


class InfeasibleError(LRQPError, RuntimeError):
    """A target that no activation reaches, for example two classes with equal weights."""


class SolverError(LRQPError, RuntimeError):
    """A solver that is unknown, is not installed, or cannot run on the tensors' device."""


class EditNeverFiredError(LRQPError, RuntimeError):
    """An edit whose context closed although some of its positions never ran through the model."""


class EditOverwrittenError(LRQPError, RuntimeError):
    """A hook of one's own, on a site's module or on one that passes its tensor on, changes what an
    edit has put in place, so its odds do not hold there.
    """


class TokenizerError(LRQPError, ValueError):
    """A tokenizer under which the task cannot be built (too few single-token names, no offsets)."""


class PrefixError(LRQPError, ValueError):
    """A source of prefix sentences that is missing, empty, or filtered out entirely."""


class ModelError(LRQPError, RuntimeError):
    """A model that cannot be found or loaded under the given name."""


class MissingExtraError(LRQPError, ImportError):
    """An optional package that the requested feature needs is not installed."""


class OutputError(LRQPError, OSError):
    """An output folder or file that cannot be written."""


class SavedEditError(LRQPError, ValueError):
    """A saved edit that is missing, damaged, foreign, or of a newer format."""


class SettingError(LRQPError, ValueError):
    """A setting of a study that is out of its range, or that contradicts another."""


class PromptError(LRQPError, ValueError):
    """A request for task prompts that cannot be met, for example more than there are."""


class RowError(PromptError, TokenizerError):
    """A row of data of which no prompt can be made.

    Args:
        message: what is wrong, and in which row.
        reason: what is wrong, in words that fit all rows like it, under which they are counted.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)  # which is all that a copy is made with, as of a worker's error
        self.reason = reason


class SelectionError(LRQPError, IndexError):
    """An index into a data set that is out of range, or of a wrong shape or dtype."""


class StatisticsError(LRQPError, ValueError):
    """A share, a mean or an interval of nothing, or of counts that contradict each other."""


class LearningError(LRQPError, RuntimeError):
    """An edit that cannot be learned: no prompts, no gradient, a loss of NaN, a foreign folder."""


class PairError(LRQPError, ValueError):
    """An edit that needs activations of paired prompts and has none, or not one for each row."""


class ActivationStoreError(LRQPError, ValueError):
    """Stored activations that are missing, damaged, foreign, unfinished, or of another capture."""


class ProvenanceError(LRQPError, ValueError):
    """An edit put into a model that it was not fitted on, or a damaged record of its origin."""


class RequestError(LRQPError, ValueError):
    """What a request asks a server to edit, where that cannot be done as it is said."""


class ServingError(LRQPError, RuntimeError):
    """A server that cannot promise the edits that it was started with, and so does not start."""


class HubError(LRQPError, RuntimeError):
    """An edit that cannot be sent to or fetched from the Hugging Face Hub."""


class ConstraintError(LRQPError, ValueError):
    """A constraint or penalty of the user's own that is not convex, not DPP, or not a term."""


class RankError(LRQPError, RuntimeError):
    """Processes of one run that were launched wrongly, disagree, or lost one of them."""


class ToldError(RankError):
    """An error of another process of the same run, which has told it already."""


class ProbeWarning(UserWarning):
    """A probe or metric fitted to data of which it means less than it seems to."""


class VocabularyWarning(UserWarning):
    """Words of a prompt that the tokenizer does not know, so that the model reads another there."""


class RevisionWarning(UserWarning):
    """An edit is used in another revision, name or site of its model than it was fitted on."""


class EditOverwrittenWarning(UserWarning):
    """An edit writes where another one, of the same context or around it, has promised odds."""


def warn(category: type[Warning], message: str) -> None:
    """Warn of something, at the line outside this package that led to it."""
    package = os.path.dirname(__file__)
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class CompiledModelError(LRQPError, RuntimeError):
    """A model edited or read inside a function that ``torch.compile`` compiles."""


def check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise :class:`LRQPError` unless an option has one of its values."""
    if value not in allowed:
        raise LRQPError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {quoted(value)}"
        )


QUOTED = 200
"""So many characters of what a user gave stand in a message, at most."""


def quoted(given: object) -> str:
    """What a user gave, as it may stand in a message: its repr, cut where it is long."""
    try:
        text = repr(given)
    except ValueError:  # an integer of thousands of digits
        text = type(given).__name__
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def concrete(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own: not in a graph that is being compiled, and not
    inside a transform of :mod:`torch.func`, where it stands for many.
    """
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    while _is_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def unwrapped(tensor: Tensor) -> Tensor:
    """The values of a concrete tensor, out of the transforms that it is wrapped in."""
    while _is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def in_transforms() -> bool:
    """Whether a transform of :mod:`torch.func` is under way."""
    return _under_way() is not None


_under_way = torch._C._functorch.peek_interpreter_stack


def outside_transforms() -> AbstractContextManager[object]:
    """Within this, what no transform of :mod:`torch.func` may see change is written as it is."""
    if not in_transforms():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting: concrete, and on the CPU."""
    return tensor.is_cpu and concrete(tensor)


def capturing(tensor: Tensor) -> bool:
    """Whether what is done with a tensor is recorded as a CUDA graph, to be done again."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor; where it was made under ``torch.inference_mode``, a copy of it that was not,
    through which gradients can flow.
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def trace(tensor: Tensor) -> tuple[int, int | None]:
    """Where a tensor's numbers are, and how often they were written to: what changes with most ways
    of changing it. What is written through ``.data`` or NumPy does not count; of a tensor that was
    made in inference mode nothing does, and the count is None.
    """
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def require_concrete(what: str, *inputs: Any) -> None:
    """Raise :class:`SolverError` where an input is inside a transform that hides its values.

    A graph that is being compiled is left to break there, and goes on with values.
    """
    tensors = [item for item in inputs if isinstance(item, Tensor)]
    if not torch.compiler.is_compiling() and not all(concrete(tensor) for tensor in tensors):
        raise SolverError(
            f"{what} looks at values while it solves, which vmap and the meta device hide: call "
            f"it on the whole batch, or use LRQP or JointLRQP, which all transforms support"
        )


def as_numbers(values: Any, what: str, error: type[LRQPError] = WidthError) -> Tensor:
    """A tensor as it is; a number, a list, an array or a data frame as a tensor on the CPU.

    Raises:
        LRQPError: of the given class, where it holds no numbers, or a tensor is sparse.
    """
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_meta:
            raise error(
                f"{what} must be a dense tensor with values, got {values.layout} on "
                f"{values.device}; use .to_dense(), and a device that holds them"
            )
        return values
    if isinstance(values, Mapping):
        raise error(
            f"{what} must be one tensor or array, got {type(values).__name__} of "
            f"{quoted([*values])}: take one of these"
        )
    try:
        array = np.asarray(values)
        # torch takes no other machine's byte order, and warns of an array that it must not write.
        array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
        return torch.from_numpy(np.asarray(array, order="C"))
    except (TypeError, ValueError, RuntimeError) as caught:
        raise error(
            f"{what} must be numbers, in a tensor or an array, got {type(values).__name__} "
            f"{quoted(values)}; use torch.as_tensor or torch.stack"
        ) from caught


ACTIVATIONS = torch.float32, torch.float64, torch.bfloat16, torch.float16
"""Dtypes that activations may have."""


def check_activations(x: Any, width: int) -> None:
    """Raise :class:`WidthError` unless ``x`` is a floating tensor (B, width)."""
    if not isinstance(x, Tensor):
        raise WidthError(
            f"activations must be a tensor (B, {width}), got {type(x).__name__}; use torch.stack "
            f"or torch.as_tensor"
        )
    if x.ndim != 2 or x.shape[1] != width:
        raise WidthError(f"activations must be (B, {width}), got {tuple(x.shape)}")
    if x.dtype not in ACTIVATIONS or x.layout != torch.strided:
        raise WidthError(
            f"activations must be dense and floating point, of 16 bits at least, got {x.dtype} "
            f"{x.layout}; use .float() and .to_dense()"
        )


def as_classes(classes: Any, name: str) -> Tensor:
    """Classes as a tensor, whether given as a number, a list, an array or a tensor; True is 1.

    Raises:
        TargetError: not numbers at all.
    """
    try:
        tensor = torch.as_tensor(classes)
        return tensor.long() if tensor.dtype == torch.bool else tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"{name} must be class numbers, one for all or one per activation, got "
            f"{quoted(classes)}"
        ) from error


def by_number(
    classes: Any, names: Sequence[str], what: str, words: Mapping[str, int] | None = None
) -> Any:
    """Classes with names, one or in lists or arrays, as numbers; without names, as they are.

    Args:
        classes: what was given.
        names: of the classes, in order; empty where they have none.
        what: they are, in messages.
        words: that mean a number beside the names.

    Raises:
        TargetError: a name of no class.
    """
    if not isinstance(classes, str | list | tuple | np.ndarray):
        return classes
    table = np.asarray(classes, dtype=object)
    if not any(isinstance(one, str) for one in table.flat):
        return classes
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    numbers = dict(words or {}) | numbers
    unknown = [one for one in table.flat if isinstance(one, str) and one not in numbers]
    if unknown:
        known = ", ".join(map(repr, names)) or "numbers only, as their labels were numbers"
        raise TargetError(f"{what} names the class {quoted(unknown[0])}; the classes are {known}")
    found = [numbers[one] if isinstance(one, str) else one for one in table.flat]
    return as_classes(found, what).reshape(table.shape)


def check_class_shape(classes: Tensor, batch: int, name: str) -> None:
    """Raise :class:`TargetError` unless ``classes`` is (batch,) integer."""
    dtype = classes.dtype
    if dtype != torch.int64 and (
        dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
    ):
        raise TargetError(
            f"{name} must hold integer class numbers, got {classes.dtype}; use .long()"
        )
    if classes.shape != (batch,):
        raise TargetError(
            f"{name} must be ({batch},), one class per activation, got {tuple(classes.shape)}"
        )


FEW = 64
"""So few numbers are looked at faster as a list."""


def check_classes(classes: Tensor, batch: int, n_classes: int, name: str) -> None:
    """Raise :class:`TargetError` unless ``classes`` is (batch,) integer within [0, K)."""
    check_class_shape(classes, batch, name)
    if not batch:
        return
    if batch <= FEW:
        numbers = classes.tolist()
        least, most = min(numbers), max(numbers)
    else:
        least, most = int(classes.min()), int(classes.max())
    if least >= 0 and most < n_classes:
        return
    outside = (classes < 0) | (classes >= n_classes)
    where = outside.nonzero().flatten()[:5].tolist()
    raise TargetError(
        f"{name} holds {classes[outside][0].item()} at example {where[0]}, but the probe has "
        f"classes 0 to {n_classes - 1} (examples {where})"
    )


def row_classes(classes: Any, x: Tensor, n_classes: int, name: str) -> Tensor:
    """A class within [0, K) for each row of x, (B,) int64 on its device, from one each or for all.

    Raises:
        TargetError: another shape or dtype, or out of range.
    """
    tensor = as_classes(classes, name).to(x.device)
    tensor = tensor.expand(len(x)) if tensor.ndim == 0 else tensor
    check_classes(tensor, len(x), n_classes, name)
    return tensor.long()


def place_classes(
    classes: Any, batch: int, n_classes: int, device: torch.device, name: str
) -> tuple[Tensor, Tensor | None]:
    """Classes as (batch,) int64 on a device, and which are out of range, (batch,) bool or None.

    Where they can be looked at without waiting for a device, they are checked at once, and None
    says that all are in range. Others are brought into range, so that no lookup goes astray.

    Raises:
        TargetError: they are not (batch,) integers or one, or are seen to be out of range.
    """
    single = isinstance(classes, int) and not isinstance(classes, bool)
    if single and 0 <= classes < n_classes:
        # A fill needs no copy from the host, for which a GPU would stop.
        return torch.full((batch,), classes, device=device), None
    tensor = as_classes(classes, name)
    if tensor.ndim == 0:
        tensor = tensor.expand(batch)
    if readable(tensor):
        check_classes(tensor, batch, n_classes, name)
        return tensor.to(device).long(), None
    check_class_shape(tensor, batch, name)
    inside = tensor.clamp(0, n_classes - 1)
    return inside.to(device).long(), (inside != tensor).to(device)


def all_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # A finite sum has finite terms, and costs a fraction of looking at each of them.
    finite = math.isfinite(values.detach().sum().item())
    return finite or bool(torch.isfinite(values).all())


def check_distances(squared: Tensor) -> None:
    """Raise :class:`NonFiniteError` where distances of classes in a metric overflow."""
    if readable(squared) and not all_finite(squared):
        raise NonFiniteError(
            "distances of the probe's classes in the metric overflow float64; divide Σ by a "
            "number: the edit is the same for every scale of Σ"
        )


def check_finite(x: Tensor) -> None:
    """Raise :class:`NonFiniteError` naming the activations that hold NaN or infinity."""
    if all_finite(x):
        return
    finite = torch.isfinite(x).all(-1)
    if not bool(finite.all()):
        where = (~finite).nonzero().flatten()
        raise NonFiniteError(
            f"activations of {len(where)} of {len(x)} examples hold NaN or infinity, the first "
            f"are {where[:5].tolist()}; look for overflow in the model's dtype upstream of the site"
        )


def check_values(x: Tensor, margins: Tensor, floor: Tensor) -> None:
    """Raise :class:`NonFiniteError` for NaN and infinity in activations or floors.

    Args:
        x: activations, (B, d).
        margins: A x + c, (B, m).
        floor: (B,) or (B, m).
    """
    # NaN and infinity in x go through the product into the margins, whatever the weights, and a
    # finite sum has finite terms; so it costs a sum over (B, m) to know that there are none.
    if bool(torch.isfinite(margins.detach().sum() + floor.detach().sum())):
        return
    check_finite(x)
    if not bool(torch.isfinite(floor).all()):
        raise NonFiniteError("log_odds holds NaN or infinity")
