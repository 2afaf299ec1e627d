"""Frozen dataclasses to JSON and back: strict JSON, checked on the way in, written whole or not at all.

Floats that JSON does not have travel as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from qlab.errors import QlabError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings, numbers, booleans and None: what strict JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def from_plain(kind: type[T], plain: Any, where: str = "result") -> T:
    """The dataclass ``kind`` from plain data; fields that are absent take their defaults.

    Raises QlabError naming the field that is missing, unknown or of a wrong type.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(plain, dict):
        raise QlabError(f"{where}: expected an object, not {type(plain).__name__}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(plain) - {f.name for f in fields}):
        raise QlabError(f"{where}: unknown field {unknown[0]!r}; the file was written by another version of qlab")
    needed = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(plain)):
        raise QlabError(f"{where}: field {missing[0]!r} is missing")
    return kind(**{name: _value(hints[name], v, f"{where}.{name}") for name, v in plain.items()})


def _value(hint: Any, v: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if v is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), v, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, v, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(v, list):
            raise QlabError(f"{where}: expected a list, not {type(v).__name__}")
        return tuple(_value(args[0], x, f"{where}[{i}]") for i, x in enumerate(v))
    if origin is dict:
        if not isinstance(v, dict):
            raise QlabError(f"{where}: expected an object, not {type(v).__name__}")
        return {k: _value(args[1], x, f"{where}.{k}") for k, x in v.items()}
    if hint is float:
        if isinstance(v, str) and v in ("nan", "inf", "-inf"):
            return float(v)
        if isinstance(v, int | float) and not isinstance(v, bool):
            try:
                return float(v)
            except OverflowError:
                raise QlabError(f"{where}: {str(v)[:12]}... is beyond the range of floats") from None
    elif hint is Any or (type(v) is hint):
        return v
    raise QlabError(f"{where}: expected {getattr(hint, '__name__', hint)}, not {v!r}")


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass as JSON beside ``path``, then rename: the file is whole or absent. Raises QlabError naming the path."""
    text = json.dumps(to_plain(value), indent=1, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Bytes into a temporary file in ``path``'s folder, flushed, renamed over ``path``."""
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as e:
        raise QlabError(f"cannot write {path}: {e.strerror}; name a folder that exists and can be written") from None
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException as e:
        Path(beside).unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise QlabError(f"cannot write {path}: {e.strerror}") from None
        raise


def read_json(kind: type[T], path: Path, schema: str) -> T:
    """A dataclass with a ``schema`` field from a file. Raises QlabError naming the file."""
    try:
        plain = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except OSError as e:
        raise QlabError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise QlabError(f"{path} is not JSON: {e}") from None
    found = plain.get("schema") if isinstance(plain, dict) else None
    if found != schema:
        raise QlabError(f"{path} holds {found!r}, not {schema!r}")
    return from_plain(kind, plain, str(path))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has no {name}; such a float travels as a string")
