"""One codec for every way to declare data: JSON bytes in the store and on the wire, typed values in handlers.

What is written must come back. A state that is stored as something else than it was (a datetime that returns as a
string, a NaN that returns as None) corrupts a saga silently and months later, so `encode` reads its own bytes back and
compares, and refuses what changed, naming the place. Rules:

1. Untyped data (`dict`, `Mapping`, `Any`, nothing declared) is JSON: objects with string keys, arrays, strings, finite
   numbers, booleans, null. A tuple is an array and comes back as a list; nothing else changes.
2. Declared data is what its declaration says: dataclasses, TypedDicts, `msgspec.Struct` and attrs classes go through
   msgspec, pydantic models and pydantic dataclasses through a pydantic TypeAdapter. A class from pydantic can only show
   up when somebody has imported pydantic, so this module never does so by itself.
3. On the happy path the check is one decode and one comparison, both in C (a walk over the types of all parts would
   take longer). Only when these differ does a slow walk look for the place; it also forgives what `==` cannot see,
   such as classes without an equality.

What we dislike about it: the check doubles the cost of encoding. It is still far below that of one fsync.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast, overload
from uuid import UUID

import msgspec

from sagaloom.errors import DecodeError, DefinitionError, EncodeError

__all__ = ["UNTYPED", "Codec", "codec_for", "encode_any", "encode_any_and_read", "is_declared_class", "type_name"]

T = TypeVar("T")

_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder().decode
_UNTYPED: tuple[object, ...] = (
    *(None, Any, object, dict, Mapping, MutableMapping, type(None)),
    *(dict[str, Any], Mapping[str, Any], MutableMapping[str, Any], typing.Dict, typing.Mapping),  # noqa: UP006
    *(dict[str, object], Mapping[str, object], MutableMapping[str, object]),
)
_PATH = re.compile(r" - at `(.+)`$", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Codec(Protocol[T]):
    """Turns values of one declared type into JSON bytes and back.

    `encode` promises that `decode` gives an equal value, or raises `EncodeError` naming the place; `decode` raises
    `DecodeError` naming the place. Both are `SagasError`s that are not retryable.
    """

    @property
    def name(self) -> str:
        """The declared type, as errors and schemas call it."""
        ...

    def encode(self, value: T) -> bytes: ...

    def encode_and_read(self, value: T) -> tuple[bytes, T]:
        """What `encode` gives, and what `decode` would make of it: the check has read it, and nobody else has it."""
        ...

    def decode(self, data: bytes) -> T: ...

    def json_schema(self) -> Mapping[str, Any]: ...


@overload
def codec_for(declared: type[T]) -> Codec[T]: ...
@overload
def codec_for(declared: object) -> Codec[Any]: ...
def codec_for(declared: object) -> Codec[Any]:
    """The codec of a declared type; the same one for the same type. `None`, `Any`, `dict` and `Mapping` are untyped
    JSON.

    Raises `DefinitionError` for a type that cannot be turned into JSON and back.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Order:
    ...     id: str
    >>> codec_for(Order).encode(Order("o-1"))
    b'{"id":"o-1"}'
    >>> codec_for(Order).decode(b'{"id":"o-2"}')
    Order(id='o-2')
    """
    try:
        return _cached_codec(declared)
    except TypeError:  # an unhashable declaration, such as Annotated with a list in it
        return _make_codec(declared)


def encode_any(value: object) -> bytes:
    """The JSON of a value whose type nobody declared, such as a result or a command's payload: a JSON value, in which
    instances of declarable classes may stand for their own JSON. Raises `EncodeError` for anything else.

    >>> encode_any({"total": 3, "tags": ("a", "b")})
    b'{"total":3,"tags":["a","b"]}'
    """
    return encode_any_and_read(value)[0]


def encode_any_and_read(value: object) -> tuple[bytes, Any]:
    """What `encode_any` gives, and what `UNTYPED` would make of it: the check has read it, and nobody else has it. An
    instance of a class is read as one, and there is `msgspec.UNSET` instead."""
    kind: type[Any] = type(value)
    if kind is not dict and is_declared_class(kind):
        return _relabelled(codec_for(kind), value), msgspec.UNSET
    try:
        return _ANY.encode_and_read(value)
    except EncodeError:
        pass
    try:
        return _ANY.encode_and_read(_plain(value))
    except RecursionError:
        raise _too_deep(_ANY.name, "VALIDATION_ERROR") from None


def is_declared_class(declared: object) -> bool:
    """Whether `declared` is a class that says what its fields are: a dataclass, TypedDict, Struct, attrs class or
    pydantic model.

    >>> is_declared_class(dict)
    False
    """
    return isinstance(declared, type) and _declares_fields(declared)


# Asked for every message and result, and always with the same answer for one class.
@functools.lru_cache(maxsize=4096)
def _declares_fields(declared: type) -> bool:
    return (
        hasattr(declared, "__struct_fields__")
        or hasattr(declared, "__dataclass_fields__")
        or hasattr(declared, "__attrs_attrs__")
        or hasattr(declared, "__required_keys__")  # a TypedDict, of typing or of typing_extensions
        or _is_pydantic(declared)
    )


def type_name(declared: object) -> str:
    """What errors call a declared type.

    >>> type_name(list[int]), type_name(int)
    ('list[int]', 'int')
    """
    if isinstance(declared, type) and not typing.get_args(declared):
        return declared.__name__
    return str(declared).replace("typing.", "")


class _Problem(NamedTuple):
    """Where a value would be lost, and what to do about it."""

    path: str
    value: object
    way_out: str


class _Checked(ABC):
    """A codec that reads back what it writes. Subclasses bring the two raw directions and the schema."""

    __slots__ = ("_dump", "_load", "encode_code", "name")

    def __init__(
        self,
        name: str,
        *,
        dump: Callable[[Any], bytes],
        load: Callable[[bytes], Any],
        encode_code: str | None = None,
    ) -> None:
        self.name = name
        # Kept as callables and not as methods: msgspec's own are called without a Python frame between.
        self._dump = dump
        self._load = load
        self.encode_code = encode_code

    def __repr__(self) -> str:
        return f"<codec of {self.name}>"

    def encode(self, value: Any) -> bytes:
        return self.encode_and_read(value)[0]

    def encode_and_read(self, value: Any) -> tuple[bytes, Any]:
        dump, load = self._dump, self._load  # Called as if they were methods, slots are looked up the slow way.
        try:
            data = dump(value)
        except RecursionError:
            raise _too_deep(self.name, self.encode_code) from None
        except Exception as error:
            raise self._refusal(self._find(value, None), error) from error
        try:
            back = load(data)
            if back == value:
                return data, back
            problem = self._find(value, back)
        except RecursionError:
            raise _too_deep(self.name, self.encode_code) from None
        except Exception as error:
            raise self._unreadable(value, error) from error
        if problem is not None:
            raise self._refusal(problem, None)
        return data, back

    def decode(self, data: bytes) -> Any:
        load = self._load
        try:
            return load(data)
        except RecursionError:
            raise DecodeError(f"{self.name} at $: the JSON is nested too deep", data=self._facts("$")) from None
        except Exception as error:
            path, reason = _reason(error)
            raise DecodeError(f"{self.name} at {path}: {reason}", data=self._facts(path)) from error

    @abstractmethod
    def json_schema(self) -> Mapping[str, Any]: ...

    @abstractmethod
    def _find(self, value: Any, back: Any) -> _Problem | None:
        """What is lost between `value` and `back`. `back` is None when `value` could not be written at all."""

    def _facts(self, path: str) -> dict[str, object]:
        return {"type": self.name, "path": path}

    def _refusal(self, problem: _Problem | None, error: Exception | None) -> EncodeError:
        if problem is None:
            return EncodeError(
                f"{self.name} at $: cannot be written as JSON: {error}", code=self.encode_code, data=self._facts("$")
            )
        return EncodeError(
            f"{self.name} at {problem.path}: {problem.value!r:.80} ({type(problem.value).__qualname__}) does not come "
            f"back from JSON: {problem.way_out}",
            code=self.encode_code,
            data=self._facts(problem.path),
        )

    def _unreadable(self, value: object, error: Exception) -> EncodeError:
        path, reason = _reason(error)
        return EncodeError(
            f"{self.name} at {path}: the value does not fit its declaration ({reason}), so its JSON could not be read "
            f"again: store a value of the declared type, or widen the declaration; got {value!r:.200}",
            code=self.encode_code,
            data=self._facts(path),
        )


class _UntypedCodec(_Checked):
    """Plain JSON values."""

    __slots__ = ()

    def __init__(self, encode_code: str | None = None) -> None:
        super().__init__("untyped JSON", dump=_ENCODE, load=_DECODE, encode_code=encode_code)

    def json_schema(self) -> Mapping[str, Any]:
        return {}

    def _find(self, value: Any, back: Any) -> _Problem | None:
        return _not_json(value, "$")


class _MsgspecCodec(_Checked):
    """What msgspec knows: builtins, dataclasses, TypedDicts, Structs, attrs classes, and their containers."""

    __slots__ = ("_schema",)

    def __init__(self, declared: Any, name: str) -> None:
        # The schema is made first: it is what notices a field type that could be written but never read.
        self._schema: Mapping[str, Any] = msgspec.json.schema(declared)
        super().__init__(name, dump=_ENCODE, load=msgspec.json.Decoder(declared).decode)

    def json_schema(self) -> Mapping[str, Any]:
        return self._schema

    def _find(self, value: Any, back: Any) -> _Problem | None:
        return _not_writable(value, "$", _ENCODE) if back is None else _difference(value, back, "$", self.name)


class _PydanticCodec(_Checked):
    """Pydantic models and dataclasses, and containers of them, as pydantic reads and writes them (by alias)."""

    __slots__ = ("_adapter",)

    def __init__(self, declared: Any, name: str) -> None:
        super().__init__(name, dump=self._dump_json, load=self._validate_json)
        self._adapter = sys.modules["pydantic"].TypeAdapter(declared)

    def json_schema(self) -> Mapping[str, Any]:
        try:
            schema: Mapping[str, Any] = self._adapter.json_schema()
        except Exception:  # noqa: BLE001
            # Custom validators may have no schema, and work none the less.
            return {"title": self.name}
        return schema

    def _dump_json(self, value: Any) -> bytes:
        data: bytes = self._adapter.dump_json(value, by_alias=True, warnings=False)
        return data

    def _validate_json(self, data: bytes) -> Any:
        if b"NaN" in data or b"Infinity" in data:
            _DECODE(data)  # pydantic takes these words for numbers; JSON, and every other reader, does not
        return self._adapter.validate_json(data)

    def _find(self, value: Any, back: Any) -> _Problem | None:
        return None if back is None else _difference(value, back, "$", self.name)


def _make_codec(declared: object) -> Codec[Any]:
    if any(declared is known or declared == known for known in _UNTYPED):
        return UNTYPED
    name = type_name(declared)
    if _mentions_pydantic(declared):
        return _constructed(_PydanticCodec, declared, name)
    try:
        return _constructed(_MsgspecCodec, declared, name)
    except DefinitionError:
        # A dataclass or TypedDict with a pydantic model inside is beyond msgspec, and fine with pydantic.
        if "pydantic" not in sys.modules or not is_declared_class(declared) or _is_msgspec_only(declared):
            raise
        try:
            return _constructed(_PydanticCodec, declared, name)
        except DefinitionError:
            pass
        raise


_cached_codec = functools.lru_cache(maxsize=1024)(_make_codec)


def _constructed(make: type[_MsgspecCodec] | type[_PydanticCodec], declared: object, name: str) -> Codec[Any]:
    try:
        return make(declared, name)
    except Exception as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise DefinitionError(
            f"{name} cannot be turned into JSON and back: {reason}. Use fields of JSON types, dataclasses, TypedDicts, "
            "msgspec.Struct, attrs or pydantic classes that are defined at module level.",
            data={"type": name},
        ) from error


def _is_pydantic(declared: object) -> bool:
    return "pydantic" in sys.modules and hasattr(declared, "__pydantic_validator__")


def _is_msgspec_only(declared: object) -> bool:
    return hasattr(declared, "__struct_fields__") or hasattr(declared, "__attrs_attrs__")


def _mentions_pydantic(declared: object) -> bool:
    return _is_pydantic(declared) or any(_mentions_pydantic(part) for part in typing.get_args(declared))


def _relabelled(codec: Codec[Any], value: object) -> bytes:
    try:
        return codec.encode(value)
    except EncodeError as error:
        raise EncodeError(error.message, code="VALIDATION_ERROR", data=error.data) from error


def _too_deep(name: str, code: str | None) -> EncodeError:
    return EncodeError(
        f"{name} at $: the value is nested too deep, or contains itself: store a flatter one",
        code=code,
        data={"type": name, "path": "$"},
    )


def _reason(error: Exception) -> tuple[str, str]:
    """The JSON path and the reason of a decoder's error."""
    details = getattr(error, "errors", None)
    if callable(details):  # pydantic
        found = cast("list[Any]", details(include_url=False, include_context=False, include_input=False))
        paths = [functools.reduce(_at, one["loc"], "$") for one in found]
        return paths[0], "; ".join(
            one["msg"] if path == paths[0] else f"{path}: {one['msg']}"
            for path, one in zip(paths[:5], found, strict=False)
        )
    text = str(error) or type(error).__name__
    match = _PATH.search(text)
    return (match[1], text[: match.start()]) if match else ("$", text)


def _at(path: str, key: object) -> str:
    if isinstance(key, str) and _IDENTIFIER.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}[{key!r:.60}]"


_WAYS_OUT: tuple[tuple[type, str], ...] = (
    (Enum, "declare its type (a dataclass, say), or store value.value"),
    (datetime, "declare its type (a dataclass, say), or store value.isoformat()"),
    (date, "declare its type (a dataclass, say), or store value.isoformat()"),
    (time, "declare its type (a dataclass, say), or store value.isoformat()"),
    (timedelta, "declare its type (a dataclass, say), or store value.total_seconds()"),
    (UUID, "declare its type (a dataclass, say), or store str(value)"),
    (Decimal, "declare its type (a dataclass, say), or store str(value)"),
    (bytes, "declare its type (a dataclass, say), or store base64.b64encode(value).decode()"),
    (bytearray, "declare its type (a dataclass, say), or store base64.b64encode(value).decode()"),
    (set, "declare its type (a dataclass, say), or store sorted(value)"),
    (frozenset, "declare its type (a dataclass, say), or store sorted(value)"),
    (str, "store str(value)"),
    (int, "store int(value)"),
    (float, "store float(value)"),
    (Mapping, "store dict(value)"),
)


def _way_out(value: object) -> str:
    if is_declared_class(type(value)):
        return f"declare a type with a field of type {type(value).__name__}, or store a dict of its fields"
    for kind, way_out in _WAYS_OUT:
        if isinstance(value, kind):
            return way_out
    return "declare its type (a dataclass, say), or store its parts as JSON values"


def _not_json(value: object, path: str) -> _Problem | None:
    """The first place in `value` that is no JSON. Slow; runs only when something is wrong, or a tuple is around."""
    if value is None or isinstance(value, bool):
        return None
    if type(value) is str:
        return _Problem(path, value, "it holds a lone surrogate, which is no text; remove it") if _torn(value) else None
    if type(value) is int:
        return None
    if type(value) is float:
        way_out = "JSON has neither NaN nor infinity; store None or a string"
        return None if math.isfinite(value) else _Problem(path, value, way_out)
    if isinstance(value, dict):
        for key, part in cast("dict[object, object]", value).items():
            if not isinstance(key, str):
                return _Problem(_at(path, key), key, "keys of an untyped dict must be strings; store str(key)")
            if _torn(key):
                return _Problem(_at(path, key), key, "the key holds a lone surrogate, which is no text; remove it")
            if (problem := _not_json(part, _at(path, key))) is not None:
                return problem
        return None
    if _is_array(value):
        for position, part in _numbered(cast("list[Any]", value)):
            if (problem := _not_json(part, _at(path, position))) is not None:
                return problem
        return None
    if isinstance(value, Enum) and isinstance(value, (str, int)):
        return None  # equal to the plain value that comes back
    return _Problem(path, value, _way_out(value))


def _torn(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _not_writable(value: object, path: str, dump: Callable[[Any], bytes]) -> _Problem | None:
    """The innermost place in a typed value that cannot even be written."""
    parts = _parts(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = _numbered(cast("list[Any]", value))
    for key, part in parts:
        if not _can(dump, part):
            return _not_writable(part, _at(path, key), dump)
        if isinstance(value, dict) and not _can(dump, {key: None}):
            return _Problem(_at(path, key), key, "keys must be strings or numbers")
    if isinstance(value, str):
        return _Problem(path, value, "it holds a lone surrogate, which is no text; remove it")
    return _Problem(path, value, "store a value of the declared type")


def _can(dump: Callable[[Any], bytes], value: object) -> bool:
    try:
        dump(value)
    except Exception:  # noqa: BLE001  # whatever it is, the caller reports the place
        return False
    return True


def _difference(before: Any, after: Any, path: str, name: str) -> _Problem | None:
    """The first place where what came back is not what was written, forgiving classes without an equality."""
    if before == after:
        return None
    kind, other_kind = _class_of(before), _class_of(after)
    if _is_array(before) and _is_array(after):
        if len(before) != len(after):
            return _Problem(path, before, f"it comes back as {after!r:.80}")
        parts, others = _numbered(before), dict(_numbered(after))
    elif kind is not other_kind:
        return _Problem(
            path,
            before,
            f"it comes back as {after!r:.80} ({other_kind.__qualname__}); declare the field with its own type, or "
            f"store what {name} declares",
        )
    else:
        parts, others = _parts(before), dict(_parts(after))
        for key, lost in parts:
            if key not in others:
                return _Problem(_at(path, key), lost, f"{name} does not declare this key; declare it or leave it out")
        if len(others) > len(parts):
            return _Problem(path, before, f"it comes back as {after!r:.80}")
        if not parts:
            # Without fields and without an equality of its own there is nothing to compare.
            is_blind = kind.__eq__ is object.__eq__
            return None if is_blind else _Problem(path, before, f"it comes back as {after!r:.80}")
    for key, part in parts:
        if (problem := _difference(part, others[key], _at(path, key), name)) is not None:
            return problem
    return None


def _class_of(value: object) -> Any:
    return type(value)


def _is_array(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _numbered(values: typing.Iterable[Any]) -> list[tuple[Any, Any]]:
    return list(enumerate(values))


def _parts(value: object) -> list[tuple[Any, object]]:
    """Keys or field names of a compound value, with what they hold."""
    if isinstance(value, dict):
        return list(cast("dict[Any, object]", value).items())
    names: typing.Iterable[str] = ()
    kind = _class_of(value)
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
    elif dataclasses.is_dataclass(value):
        names = [one.name for one in dataclasses.fields(value)]
    elif hasattr(kind, "__attrs_attrs__"):
        names = [one.name for one in kind.__attrs_attrs__]
    elif _is_pydantic(kind):
        names = [*kind.model_fields, *(getattr(value, "__pydantic_extra__", None) or ())]
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _plain(value: object) -> object:
    """`value` with every instance of a declarable class replaced by its JSON value."""
    if is_declared_class(type(value)):
        return _DECODE(_relabelled(codec_for(type(value)), value))
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in cast("dict[Any, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in cast("list[object]", value)]
    return value


UNTYPED: Final[Codec[Any]] = _UntypedCodec()
"""The codec of whatever is declared as untyped JSON."""
# Results and payloads are refused at a door or in a decision; "state" would name the wrong thing.
_ANY = _UntypedCodec("VALIDATION_ERROR")
