"""Whether two definitions say the same: a hash over everything that matters about one.

It covers the data (types, schemas, policies) and, for every user function, its name and what it does: bytecode,
constants, names, defaults, and the plain values it closes over, recursively. It covers no address, no path and no line
number, so building the same module again, on another machine or in another order of imports, gives the same hash.

What we dislike about it: a helper that a handler calls is seen only by name, and another minor version of Python
compiles to other bytecode. So a changed fingerprint says "look", never "broken".
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from sagaloom.definitions import SagaDefinition

__all__ = ["fingerprint_of"]


def fingerprint_of(definition: SagaDefinition[Any]) -> str:
    """The SHA-256, in hex, of the canonical description of `definition`."""
    # In the order of declaration: which starting type comes first decides what `spawn` sends.
    handlers: list[list[object]] = [
        [one.type, one.starts, one.on_missing, one.codec.name, one.codec.json_schema(), _function(one.handler)]
        for one in definition.handlers.values()
    ]
    compensations = {
        one.type: [one.codec.name, one.codec.json_schema(), _function(one.handler)]
        for one in definition.compensations.values()
    }
    for said, one in zip(handlers, definition.handlers.values(), strict=True):
        # Only where there is any: a saga without them keeps the fingerprint that it had before there could be some.
        if one.during is not None:
            said.append(["during", one.on_unexpected, _functions(one.during)])
        if one.on_missing == "wait":
            said.append(["patience", one.patience])
    concurrency = definition.concurrency
    described: dict[str, object] = {
        "id": definition.id,
        "version": definition.version,
        "durability": definition.durability,
        "state": [definition.state_codec.name, definition.state_codec.json_schema()],
        "initial": msgspec.json.decode(definition.state_codec.encode(definition.initial_state)),
        "handlers": handlers,
        "compensations": compensations,
        "correlations": _functions(definition.correlations),
        "retry": definition.retry,
        "reuse": definition.reuse,
        "singleton": definition.is_singleton,
        "invariants": {one.name: _function(one.predicate) for one in definition.invariants},
        "migrations": {str(old): _function(step) for old, step in definition.migrations.items()},
        "schedule": definition.schedule,
        "concurrency": concurrency and [concurrency.limit, concurrency.on_limit, _value(concurrency.key, ())],
    }
    if definition.timeouts:
        described["timeouts"] = definition.timeouts
    if definition.pivots:
        described["pivots"] = sorted(definition.pivots)
    # Only where there are any: a saga without them keeps the fingerprint that it had before there could be some.
    for what, bindings in (("signals", definition.signals), ("updates", definition.updates)):
        if bindings:
            described[what] = {
                one.type: [one.codec.name, one.codec.json_schema(), _function(one.handler)] for one in bindings.values()
            }
    if definition.joins:
        described["joins"] = [[one.name, _function(one.handler)] for one in definition.joins]
    if definition.status_field != "status":
        described["statusField"] = definition.status_field
    if definition.queries:
        described["queries"] = {
            one.name: [one.codec.name, one.codec.json_schema(), _function(one.handler)]
            for one in definition.queries.values()
        }
    return hashlib.sha256(msgspec.json.encode(described, order="sorted")).hexdigest()


def _functions(named: Mapping[str, Callable[..., Any]]) -> dict[str, object]:
    return {name: _function(function) for name, function in named.items()}


def _function(function: Callable[..., Any]) -> object:
    return _value(function, ())


def _value(value: object, above: tuple[int, ...]) -> object:
    """`value` as JSON that two runs of one program agree on. `above` are the ids of the values it is part of."""
    if id(value) in above:
        return ["recursion"]
    within = (*above, id(value))
    match value:
        case types.CodeType():
            return _code(value, within)
        case types.FunctionType():
            return [
                "function",
                value.__qualname__,
                _code(value.__code__, within),
                _value(value.__defaults__, within),
                _value(value.__kwdefaults__, within),
                [_cell(cell, within) for cell in value.__closure__ or ()],
            ]
        case types.MethodType():
            return ["method", type(value.__self__).__qualname__, _value(value.__func__, within)]
        case functools.partial():
            return ["partial", *(_value(part, within) for part in (value.func, value.args, value.keywords))]
        case None | bool() | int() | float() | complex() | str() | bytes() | types.EllipsisType():
            return [type(value).__qualname__, repr(value)]
        case tuple() | list():
            parts = cast("list[object]", value)
            return [type(parts).__qualname__, [_value(part, within) for part in parts]]
        case set() | frozenset():
            members = cast("frozenset[object]", value)
            return ["set", sorted(msgspec.json.encode(_value(part, within)) for part in members)]
        case dict():
            items = cast("dict[object, object]", value).items()
            pairs = ([_value(key, within), _value(part, within)] for key, part in items)
            return ["dict", sorted(map(msgspec.json.encode, pairs))]
        case type():
            return ["class", value.__qualname__]
        case _:
            # A callable object does what its class says; any other one counts by its kind alone.
            call = inspect.getattr_static(type(value), "__call__", None)
            does = _value(call, within) if isinstance(call, types.FunctionType) else None
            return ["object", getattr(value, "__qualname__", type(value).__qualname__), does]


def _code(code: types.CodeType, above: tuple[int, ...]) -> object:
    return [
        code.co_name,
        code.co_code.hex(),
        [_value(constant, above) for constant in code.co_consts],
        [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars],
        [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
        code.co_exceptiontable.hex(),
    ]


def _cell(cell: types.CellType, above: tuple[int, ...]) -> object:
    try:
        return _value(cell.cell_contents, above)
    except ValueError:  # not filled yet
        return ["empty"]
