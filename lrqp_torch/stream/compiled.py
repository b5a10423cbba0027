"""Models that are compiled or offloaded: running them eagerly, and where their inputs go.

``torch.compile`` does not look for hooks that were registered after it ran: it would go on with the
graph that it made without them. Edits are traced into graphs of their own (:mod:`~.traced`). For
what graphs cannot hold, compilation is off while a context is open, for every model of the
process, and the graphs made before are used again once it has closed.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import compress, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lrqp_torch.errors import CompiledModelError, ModelError, UnknownFamilyError
from lrqp_torch.files import stood_for
from lrqp_torch.stream import repeats


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


class run_eagerly:  # noqa: N801
    """Run what is compiled without its graphs, so that every hook on the model fires.

    Warns with :class:`CompiledModelWarning` when the model, or a part of it, is compiled. A
    function of the caller's that was compiled around the model runs eagerly too, unseen.

    Raises:
        CompiledModelError: the context is opened inside a function that is being compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._compiled = model, False

    def __enter__(self) -> None:
        self._compiled = is_compiled(self._model)
        if self._compiled:
            _warn(self._model)
        _EAGER.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        _EAGER.__exit__()
        # Generation with a static cache compiles the model by itself, at its first token.
        if kind is None and not self._compiled and _generates_compiled(self._model):
            _warn(self._model)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it was compiled: by ``torch.compile`` of a module or of its
    ``forward``, by ``module.compile()``, or by transformers for generation.
    """
    if _generates_compiled(model):
        return True
    census = Census.of(model)
    if census.wraps_compiled:
        return True
    every = [vars(model), *census.attributes]
    return (
        any(map(contains, every, repeat("forward"))) and any(map(_forwards_compiled, every))
    ) or (
        any(map(contains, every, repeat("_compiled_call_impl")))
        and any(own.get("_compiled_call_impl") is not None for own in every)
    )


def _forwards_compiled(own: dict[str, Any]) -> bool:
    held = own.get("forward")
    return hasattr(stood_for(held), "_torchdynamo_orig_callable")


def compiled_apart(around: nn.Module, one: nn.Module, other: nn.Module) -> bool:
    """Whether some module within ``around`` was compiled that holds one of two modules alone."""
    return any(
        (one in held) is not (other in held)
        for held in [
            modules_of(part)
            for part in modules_of(around)
            if vars(part).get("_compiled_call_impl") is not None
            or "_orig_mod" in part._modules
            or ("forward" in vars(part) and _forwards_compiled(vars(part)))
        ]
    )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, in a fraction of the time."""
    return [model, *Census.of(model).below]


def require_module(model: Any) -> None:
    """Raise :class:`UnknownFamilyError` unless a model is a module, as no pipeline is; and
    :class:`CompiledModelError` for what torch.jit has made, :class:`ModelError` where nothing has
    values.
    """
    if not isinstance(model, nn.Module):
        raise UnknownFamilyError(
            f"the model must be an nn.Module, such as a transformers model, got "
            f"{type(model).__name__}{wrapped(model)}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CompiledModelError(
            "what torch.jit has made does not run its modules one by one; edit the model that it "
            "was made of"
        )
    if _mode(_FAKE) is not None:
        raise ModelError(
            f"within a FakeTensorMode tensors have shapes and no values, so {type(model).__name__} "
            f"can be neither edited nor read there: leave that mode first"
        )


_mode, _FAKE = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE


def wrapped(model: Any) -> str:
    """What to say of a wrapper, such as nnsight's or the bridge of TransformerLens."""
    if hasattr(type(model), "base_model_prefix"):  # a model of transformers holds another one
        return ""
    own = getattr(model, "__dict__", {})
    for name, part in {**own, **own.get("_modules", {})}.items():
        if isinstance(part, nn.Module) and hasattr(getattr(part, "config", None), "model_type"):
            return (
                f". It wraps a {type(part).__name__}: give that, .{name}; an edit of it acts "
                f"on what runs through the wrapper too"
            )
    return ""


class Census:
    """What is below a model, listed once and looked through anew only when modules have changed.

    It does not hold the model itself, which is freed as ever.

    Attributes:
        below: all its modules but itself.
        attributes: of each, those that it has itself.
        parameters: of the model and of each.
        plain: whether the last look found all of the classes that it was, in no training mode and
            without a ``forward`` of its own.
        wraps_compiled: whether the model or one of them is what ``torch.compile`` returned.
    """

    def __init__(self, model: nn.Module) -> None:
        found, seen = [model], {model}
        for module in found:
            for child in module._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
        self.below = found[1:]
        self.attributes = [vars(module) for module in self.below]
        self.parameters = [module._parameters for module in found]
        self._held = [dict(module._modules) for module in found]
        self.wraps_compiled = any("_orig_mod" in children for children in self._held)
        self.plain, self._look = False, repeats.modules(model, self.below)

    @classmethod
    def of(cls, model: nn.Module) -> "Census":
        """That of a model as it is now."""
        known = _CENSUSES.get(model) if isinstance(model, nn.Module) else None
        if known is not None:
            # One call, in the order in which they lie; by Python only where something is other.
            found = None if known._look is None else known._look(model)
            known.plain = found is False
            if found is not None or known.holds(model):
                return known
        require_module(model)
        known = _CENSUSES[model] = cls(model)
        return known

    def holds(self, model: nn.Module) -> bool:
        """Whether the model still has the same modules."""
        # Modules are compared as objects, so this takes microseconds.
        return [model._modules, *map(_children, self.below)] == self._held

    def in_training(self, model: nn.Module) -> list[nn.Module]:
        """Those of ``model.modules()`` that are in training mode."""
        if self.plain:
            return []
        own, modules = self.attributes, self.below
        if self.wraps_compiled:  # what torch.compile returned asks the module that it was given
            modules = [module for module in modules if "training" in vars(module)]
            own = [vars(module) for module in modules]
        if not model.training and not any(map(_training, own)):
            return []
        trained = list(compress(modules, map(_training, own)))
        return [model, *trained] if model.training else trained


_training, _children = itemgetter("training"), attrgetter("_modules")
_CENSUSES: WeakKeyDictionary[nn.Module, Census] = WeakKeyDictionary()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, of the one that it returned."""
    children = module.__dict__.get("_modules")
    return children.get("_orig_mod", module) if children else module


has: Callable[[Any, str], bool] = functools.cache(hasattr)
"""Whether a class has an attribute, as those of adapters do: asked at every opening."""


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, without compilation and adapters around it."""
    inner = unwrapped(model)
    # A model with adapters of peft names its tuner, and not its trunk, a base model.
    if has(type(inner), "get_base_model"):
        inner = inner.get_base_model()  # type: ignore[operator]
    return inner


def own_forward(module: nn.Module) -> Any:
    """The ``forward`` that somebody gave a module in place of its class's, if not a context."""
    return stood_for(vars(module).get("forward"))


def descend(module: nn.Module, path: str) -> nn.Module:
    """``module.get_submodule(path)``, in a fraction of the time."""
    if not path:
        return module
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return module.get_submodule(path) if found is None else found


def _generates_compiled(model: nn.Module) -> bool:
    return vars(inner_model(model)).get("_compiled_call") is not None


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
