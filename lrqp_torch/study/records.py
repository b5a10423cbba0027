"""Results as dataclasses on one side and strict JSON on the other: one writer, one reader.

A dataclass becomes an object with its fields as keys. A field that holds an :class:`Estimate`
becomes three: ``KEY`` is the value, ``KEY_interval`` its ``[lower, upper]`` (null where unknown)
and ``KEY_n`` the number of prompts. In lists and dictionaries an estimate is an object of its own.
Fields marked :data:`BESIDE` are kept in files of their own.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lrqp_torch.errors import quoted
from lrqp_torch.study.estimates import Estimate

T = TypeVar("T")

BESIDE = {"beside": True}
"""Metadata of a dataclass's field that JSON leaves out; it must have a default."""


def to_json(value: Any) -> Any:
    """Plain JSON values of a dataclass, or of what one may hold."""
    if isinstance(value, Estimate):
        return {"value": value.value, "interval": value.interval, "n": value.n}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        raw: dict[str, Any] = {}
        for field in _fields(value):
            item = getattr(value, field.name)
            if isinstance(item, Estimate):  # beside its key, where readers of plain numbers look
                raw[field.name] = item.value
                raw[f"{field.name}_interval"] = item.interval
                raw[f"{field.name}_n"] = item.n
            else:
                raw[field.name] = to_json(item)
        return raw
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], raw: Any) -> T:
    """Read back what :func:`to_json` made of a dataclass, or of what a field of one may hold.

    Raises:
        ValueError: a key is missing or unknown, or a value is not what its annotation says; the
            message names the place.
    """
    return cast(T, _read(kind, raw, ""))


def _read(kind: Any, raw: Any, where: str) -> Any:
    if kind is Any or kind is object or kind is type(raw):
        return raw
    if kind is Estimate:
        _require(raw, dict, where)
        return _estimate(raw.get("value"), raw.get("interval"), raw.get("n"), where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, raw, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if raw is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return _read(options[0], raw, where)
        return raw
    if origin is Literal:
        if raw not in arguments:
            raise ValueError(f"{where}: {raw!r} is none of {', '.join(map(repr, arguments))}")
        return raw
    if origin is dict:
        _require(raw, dict, where)
        return {
            int(key) if arguments[0] is int else key: _read(arguments[1], item, f"{where}.{key}")
            for key, item in raw.items()
        }
    if origin in (list, tuple):
        _require(raw, list, where)
        each = (
            list(arguments)
            if origin is tuple and arguments[-1] is not Ellipsis
            else [arguments[0]] * len(raw)
        )
        if len(each) != len(raw):
            raise ValueError(f"{where}: {len(each)} values wanted, {len(raw)} found")
        items = [_read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(each, raw))]  # noqa: B905
        return tuple(items) if origin is tuple else items
    if kind is float:
        return _number(raw, where)
    if isinstance(kind, type):
        if kind is int and isinstance(raw, bool):
            raise ValueError(f"{where}: a number wanted, {raw} found")
        _require(raw, kind, where)
    return raw


def _read_dataclass(kind: Any, raw: Any, where: str) -> Any:
    _require(raw, dict, where)
    left, values = dict(raw), dict[str, Any]()
    for field, hint in _annotated(kind):
        here = f"{where}.{field.name}" if where else field.name
        if field.name not in left:
            if (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                raise ValueError(f"{here} is missing")
            continue
        item = left.pop(field.name)
        if _holds_estimate(hint):
            interval = left.pop(f"{field.name}_interval", None)
            n = left.pop(f"{field.name}_n", None)
            absent = n is None and item is None and hint is not Estimate
            values[field.name] = None if absent else _estimate(item, interval, n, here)
        else:
            values[field.name] = _read(hint, item, here)
    if left:
        raise ValueError(f"{where or kind.__name__} holds the unknown key {next(iter(left))!r}")
    return kind(**values)


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if not field.metadata.get("beside")]


@functools.cache
def _annotated(kind: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in _fields(kind)]


def _holds_estimate(hint: Any) -> bool:
    """Whether a field is an estimate, or one that may be None."""
    return hint is Estimate or (
        get_origin(hint) in (Union, types.UnionType) and Estimate in get_args(hint)
    )


def _estimate(value: Any, interval: Any, n: Any, where: str) -> Estimate:
    lower, upper = (None, None) if interval is None else interval
    value, lower, upper = (
        None if item is None else _number(item, where) for item in (value, lower, upper)
    )
    return Estimate(value, lower, upper, int(n or 0))


def _number(raw: Any, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError(f"{where}: a number wanted, {quoted(raw)} found")
    try:
        return float(raw)
    except OverflowError as error:
        raise ValueError(f"{where}: a number that float64 cannot hold") from error


def _require(raw: Any, kind: type, where: str) -> None:
    if not isinstance(raw, kind):
        raise ValueError(f"{where}: {kind.__name__} wanted, {type(raw).__name__} found")
