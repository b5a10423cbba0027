"""Passes that are like the one before, recognised and edited in calls of compiled code.

A pass of a loop is mostly like the last one: the same arguments but for the tokens, the same
shapes, the same edit. The functions of ``rows.c`` that :func:`bound` gives look at all that may
have changed, and give None where anything has: then, and wherever there is no compiler, what Python
does for any pass is done. They are functions of the interpreter's own kind, as a call through
ctypes costs a microsecond an argument.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lrqp_torch.files import load_compiled

_number, _address = ctypes.c_int64, ctypes.c_void_p
AXES = 4

Function = Callable[..., Any]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of rows.c, or None where there is no compiler."""
    loaded = load_compiled(Path(__file__).with_name("rows.c"))
    if loaded is not None:
        put: Any = loaded.lrqp_put_rows
        put.restype, put.argtypes = _number, (*[_address] * 5, *[_number] * 5)
    return loaded


@functools.cache
def _python() -> ctypes.PyDLL | None:
    """Those that know of Python's objects; None where torch does not tell C of its tensors."""
    loaded = library()
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if loaded is None or exchange is None:
        return None
    # What is looked at must not change meanwhile: that is what the interpreter's lock is for.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = _address, (ctypes.py_object, ctypes.c_char_p)
    begin = pointer(exchange, b"dlpack_exchange_api")
    # Two numbers of the version, an older table, and functions, of which the fourth is wanted.
    version, *_, look, _ = (_address * 7).from_address(begin)
    if (version or 0) & 0xFFFFFFFF != 1 or not look:
        return None
    python = ctypes.PyDLL(loaded._name)
    python.lrqp_bound.restype = ctypes.py_object
    python.lrqp_bound.argtypes = _number, ctypes.py_object
    python.lrqp_see.restype = python.lrqp_holds.restype = _number
    python.lrqp_see.argtypes, python.lrqp_holds.argtypes = (
        (ctypes.py_object, _address),
        (_address, _number),
    )
    python.lrqp_know((_address * (1 + len(_KNOWN)))(look, *map(id, _KNOWN)))
    return python


_KNOWN = (
    *(None, False, -1, Tensor, tuple, torch._C._get_tracing_state),
    *(torch._C._current_graph_task_id, torch.is_grad_enabled, torch.empty_like, torch.clone),
    *("requires_grad", "_version", "hidden_states", True, "_modules", "training", "forward"),
)
"""What rows.c asks of any pass, in its order."""


class Seen(ctypes.Structure):
    """What a tensor was: ``Seen`` of rows.c."""

    _fields_ = (
        *(("data", _address), ("device", _number), ("kind", _number), ("axes", _number)),
        *(("shape", _number * AXES), ("strides", _number * AXES)),
    )


class Begin(ctypes.Structure):
    """What a trunk was given: ``Begin`` of rows.c."""

    _fields_ = (
        *((name, _address) for name in ("open", "opening", "calls", "call", "names", "values")),
        *((name, _address) for name in ("latest", "mask", "copy")),
        *(
            (name, _number)
            for name in ("bytes", "version", "thread", "place", "masked_at", "count")
        ),
        *(("tokens", Seen), ("masked", Seen)),
    )


class Site(ctypes.Structure):
    """A site in a pass, and what is done there: ``Site`` of rows.c."""

    held: list[Any]
    """What it says the addresses of; from :attr:`own` on what is the edit's."""
    own = 0

    _fields_ = (
        ("thread", _number),
        *((name, _address) for name in ("calls", "call", "residuals", "key", "parts", "guards")),
        *(("n_guards", _number), ("stream", Seen), ("copies", _number), ("passes", _address)),
        ("done", _number),
        *((name, _address) for name in ("solve", "shared", "task")),
        *(("threads", _number), ("first", _number), ("record", _address)),
        *((name, _number) for name in ("numbers", "row_of", "used", "room")),
        *(("rows", _address), ("row", Seen), ("place", _address)),
        *((name, _number) for name in ("count", "all", "width", "kind")),
    )


class _Guard(ctypes.Structure):
    _fields_ = (
        *((name, _address) for name in ("of", "key", "is_")),
        *(("kind", _number), ("version", _number), ("seen", Seen)),
    )


class _Module(ctypes.Structure):
    _fields_ = (
        *((name, _address) for name in ("module", "kind", "own", "below")),
        *((name, _number) for name in ("first", "count")),
    )


class _Modules(ctypes.Structure):
    _fields_ = (
        *((name, _address) for name in ("all", "names", "children")),
        ("count", _number),
    )


def modules(model: Any, below: Sequence[Any]) -> Function | None:
    """A function of a model: False where all below it is what it is now, of the same classes, in
    no training mode and without a ``forward`` of its own; True where some is in training mode; None
    where something is other. It holds all but the model.
    """
    every, held = [model, *below], list[Any]()
    # Those of torch.jit keep their children in something else.
    if not available() or not all(isinstance(module._modules, dict) for module in every):
        return None
    all_, names, children = (_Module * len(every))(), list[str](), list[Any]()
    for module, one in zip(every, all_, strict=True):
        own, kept = vars(module), module._modules
        one.module = None if module is model else id(module)
        one.kind, one.own, one.below = id(type(module)), id(own), id(kept)
        one.first, one.count = len(names), len(kept)
        names += kept
        children += kept.values()
        held += [type(module), kept] if module is model else [module, own, type(module), kept]
    return _of_table("modules", names, children, len(every), all_, held)


def same(table: Mapping[str, Any]) -> Function | None:
    """A function of a dictionary: True where it has these entries, as objects and in this order;
    else None.
    """
    return _of_table("same", [*table], [*table.values()], len(table)) if available() else None


def _of_table(
    name: str, names: list[str], values: list[Any], count: int, every: Any = None, *held: Any
) -> Function:
    pointers = _address * len(names)
    laid = pointers(*map(id, names)), pointers(*map(id, values))
    places = (None if one is None else ctypes.addressof(one) for one in (every, *laid))
    return bound(name, _Modules(*places, count), every, *laid, *held, names, values)


_ITEM, _OWN, _NAMED, _KIND, _PART = range(5)
_ABSENT = object()


def bound(name: str, own: "Begin | Site | _Modules", *held: Any) -> Function:
    """A function of rows.c for what a structure says; it keeps that, and what is given besides."""
    python = _python()
    assert python is not None
    which = ("begin", "edit", "gather", "put", "modules", "same", "like").index(name)
    function: Function = python.lrqp_bound(which, (ctypes.addressof(own), own, *held))
    return function


def available() -> bool:
    """Whether there are such functions."""
    return _python() is not None


def see(tensor: Tensor, into: Seen) -> bool:
    """Note what a tensor is, with up to :data:`AXES` axes; whether that can be told."""
    python = _python()
    return python is not None and bool(python.lrqp_see(tensor, ctypes.addressof(into)))


def part_of(owner: Any, name: str) -> Any:
    """What a dictionary, or the attributes of an object or a class by themselves, have by a name;
    or None. What an edit is made of is found by this, or by :class:`Guards` in its place.
    """
    return _own(owner).get(name)


def _own(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, Mapping) else vars(owner)


class Guards:
    """That parts are where they were, each found by a name: for a compiled call to look.

    Args:
        whole: what has the parts. It is not held once this is asked, as it may hold this, and must
            outlive all calls.
    """

    def __init__(self, whole: Any = None) -> None:
        self._noted: list[tuple[Any, ...]] = []
        self._laid: Any = None
        self._whole = whole
        self(vars(forward_ad), "_current_level")

    def __call__(self, owner: Any, name: str) -> Any:
        """As :func:`part_of`, and note it."""
        found = _own(owner).get(name, _ABSENT)
        if isinstance(owner, type):
            self.named(owner, name)
        else:
            kind = _ITEM if isinstance(owner, dict) else _OWN
            self._noted.append((kind, owner, name, found, -1))
        return None if found is _ABSENT else found

    def named(self, owner: Any, name: str) -> None:
        """That an attribute is this object."""
        self._noted.append((_NAMED, owner, name, getattr(owner, name), -1))

    def kind(self, owner: Any) -> None:
        """That an object is of this class."""
        self._noted.append((_KIND, owner, "", type(owner), -1))

    def part(self, tensor: Tensor, counts: bool) -> None:
        """That a tensor is of the same memory, and, if it ``counts``, was not written to."""
        version = tensor._version if counts and not tensor.is_inference() else -1
        self._noted.append((_PART, tensor, "", None, version))

    def told(self, site: Site) -> bool:
        """Let a site ask this; False where it does not hold, or cannot be asked.

        What is asked is kept with the site.
        """
        python, noted = _python(), self._noted
        if python is None:
            return False
        if self._laid is None:
            laid = (_Guard * len(noted))()
            for guard, (kind, owner, name, found, version) in zip(laid, noted, strict=True):
                guard.of, guard.key, guard.kind, guard.version = id(owner), id(name), kind, version
                guard.is_ = None if found is _ABSENT else id(found)
                if kind == _PART and not see(owner, guard.seen):
                    return False
            whole, self._whole, self._laid = self._whole, None, laid
            self._noted = [(one, None if o is whole else o, *rest) for one, o, *rest in noted]
        site.guards, site.n_guards = ctypes.addressof(self._laid), len(self._laid)
        site.held.append(self)
        return bool(python.lrqp_holds(site.guards, site.n_guards))
