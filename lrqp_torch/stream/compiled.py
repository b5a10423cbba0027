"""Models that are compiled or offloaded: running them eagerly, and where their inputs go.

``torch.compile`` does not look for hooks that were registered after it ran: it would go on with the
graph that it made without them. So compilation is off while a context of this package is open, for
every model of the process, and the graphs made before are used again once it has closed.
"""

import functools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import nn

from lrqp_torch.errors import CompiledModelError, ModelError


class CompiledModelWarning(UserWarning):
    """A compiled model runs eagerly, and so more slowly, while it is edited or read."""


class _Eager:
    """Keeps ``torch.compile`` off while at least one context is open, however they overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._stance: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._open == 0:
                self._stance = _stance()()
            self._open += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_EAGER = _Eager()


@contextmanager
def run_eagerly(model: nn.Module, modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Run what is compiled without its graphs, so that every hook on the model fires.

    Warns with :class:`CompiledModelWarning` when the model, or a part of it, is compiled. A
    function of the caller's that was compiled around the model runs eagerly too, unseen.

    Args:
        model: any module.
        modules: its modules, where they have been listed already.

    Raises:
        CompiledModelError: the context is opened inside a function that is being compiled.
    """
    compiled = is_compiled(model, modules)
    if compiled:
        _warn(model)
    with _EAGER:
        yield
    # Generation with a static cache compiles the model by itself, at its first token.
    if not compiled and _generates_compiled(model):
        _warn(model)


def is_compiled(model: nn.Module, modules: Sequence[nn.Module] = ()) -> bool:
    """Whether a model or a part of it was compiled: by ``torch.compile`` of a module or of its
    ``forward``, by ``module.compile()``, or by transformers for generation.
    """
    if _generates_compiled(model):
        return True
    for module in modules or modules_of(model):
        own = vars(module)
        if own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]:
            return True
        if "forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable"):
            return True
    return False


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, in a fraction of the time; contexts look through them when they open."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, of the one that it returned."""
    return cast(nn.Module, vars(module).get("_modules", {}).get("_orig_mod", module))


def _generates_compiled(model: nn.Module) -> bool:
    return getattr(model, "_compiled_call", None) is not None


def _warn(model: nn.Module) -> None:
    # From one place wherever contexts are opened, so that Python shows it once.
    warnings.warn(
        f"{type(unwrapped(model)).__name__} is compiled: it runs eagerly while it is edited or "
        f"read, because a compiled graph ignores hooks; afterwards it is as fast as before",
        CompiledModelWarning,
        stacklevel=1,
    )


@functools.cache
def _stance() -> Any:
    """What sets the stance; not traced, so that torch itself says whether it is compiling now."""
    return torch.compiler.disable(_force_eager, recursive=False)


def _force_eager() -> Any:
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise CompiledModelError(
            "a model cannot be edited or read inside a function that torch.compile compiles, "
            "because a compiled graph ignores hooks; open the context around that function, or "
            "mark it with torch.compiler.disable"
        ) from error


def input_device(model: nn.Module) -> torch.device:
    """The device that a model's inputs belong on.

    That of its first weights. Where those are offloaded (``cpu_offload``, ``disk_offload`` and
    ``device_map`` of accelerate), it is the device on which they will be computed with.

    Raises:
        ModelError: the weights are on the meta device and nothing will fetch them.
    """
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            where = getattr(part, "execution_device", None)
            if where is not None:
                return torch.device(where)
    raise ModelError(
        f"the weights of {type(model).__name__} are on the meta device, where there are no values; "
        f"load them, or offload them with accelerate"
    )
