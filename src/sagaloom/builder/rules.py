"""The rules for a value that any method of the builder may be given."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

from sagaloom.codec import type_name
from sagaloom.definitions import RetryPolicy
from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError, SagasError
from sagaloom.ids import check_key


def check_function(function: object, arity: int, what: str, shape: str) -> None:
    """Raises unless `function` is synchronous and can be called with `arity` positional arguments."""
    if not callable(function) or isinstance(function, type):
        raise DefinitionError(f"{what} is {shown(function)}, which is no function: {shape}")
    is_handler = arity == 3
    plain: object = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    for one in (plain, inspect.getattr_static(type(plain), "__call__", None)):
        if inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one):
            raise DefinitionError(
                f"{what}, {shown(function)}, is async: it must be a plain function without I/O"
                + ("; return send(...) for work that waits, and handle its answer as a message" if is_handler else "")
            )
        if inspect.isgeneratorfunction(one):
            instead = "return a list" if is_handler else "return what it says"
            raise DefinitionError(f"{what}, {shown(function)}, is a generator: {instead} instead of yielding")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*(None,) * arity)
    except TypeError as error:
        raise DefinitionError(f"{what}, {shown(function)}, has the signature {signature}: {shape} ({error})") from error


def check_retry(where: str, policy: object) -> None:
    if not isinstance(policy, RetryPolicy):
        raise DefinitionError(f"{where}: retry takes a RetryPolicy(...), got {shown(policy)}")
    low, high = policy.initial_interval_ms, policy.maximum_interval_ms
    rules = (
        ("maximum_attempts", policy.maximum_attempts, 1, math.inf, "an integer from 1 on"),
        ("initial_interval_ms", low, 0, math.inf, "an integer from 0 on"),
        ("maximum_interval_ms", high, low, math.inf, f"an integer from initial_interval_ms ({low!r:.80}) on"),
    )
    for name, value, least, most, wanted in rules:
        if not is_int(value) or not least <= value <= most:
            raise DefinitionError(f"{where}: retry {name} must be {wanted}, got {value!r:.80}")
    fractions = (
        ("backoff_coefficient", policy.backoff_coefficient, 1, math.inf, "a finite number from 1 on"),
        ("jitter", policy.jitter, 0, 1, "a fraction between 0 and 1"),
    )
    for name, number, least, most, wanted in fractions:
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
            raise DefinitionError(f"{where}: retry {name} must be {wanted}, got {number!r:.80}")
        if not least <= number <= most:
            raise DefinitionError(f"{where}: retry {name} must be {wanted}, got {number!r:.80}")
    names: object = policy.non_retryable_error_types
    if not isinstance(names, (tuple, list)) or not all(isinstance(one, str) for one in cast("list[object]", names)):
        raise DefinitionError(f"{where}: retry non_retryable_error_types must be a tuple of class names, got {names!r}")


def checked_length(where: str, delay: Any) -> timedelta:
    """How long `delay` is, which is not nothing."""
    try:
        length = parse_duration(delay)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: {error.message}") from error
    if not length:
        raise DefinitionError(f"{where} must be longer than nothing, got {delay!r:.80}")
    return length


def checked_key(where: str, what: str, value: str) -> None:
    try:
        check_key(value, what=what)
    except SagasError as error:
        raise DefinitionError(f"{where}: {error.message}") from error


def one_of(value: Any, allowed: Sequence[str], what: str) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise DefinitionError(f"{what} {value!r:.80} is unknown: use {listed(allowed, 'or')}")
    return value


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def listed(values: Sequence[object], word: str = "and") -> str:
    shown = [repr(value) for value in values]
    return f" {word} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def shown(value: object) -> str:
    if isinstance(value, (str, bytes, int, float, type(None))):
        return f"{value!r:.80}"
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else f"{type_name(type(value))} {value!r:.80}"
