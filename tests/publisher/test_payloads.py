"""Payloads on their way out: what becomes of them, and which are refused, where."""

from __future__ import annotations

import doctest
import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from types import MappingProxyType
from typing import Any, TypedDict
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest

from sagaloom.errors import MessageRejected
from sagaloom.publisher import payloads
from sagaloom.publisher.payloads import payload_json


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclass(frozen=True)
class Item:
    at: datetime
    tags: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Amount:
    value: float


class ItemStruct(msgspec.Struct, rename="camel"):
    order_id: str


class Point(msgspec.Struct, array_like=True):
    x: int
    y: int


@attrs.frozen
class ItemAttrs:
    order_id: str


class ItemModel(pydantic.BaseModel):
    order_id: str = pydantic.Field(alias="orderId")


class ItemDict(TypedDict):
    order_id: str


MOMENT = datetime(2026, 1, 31, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({}, {}),
        ({"a": None, "b": [1, "x", 2.5, True, {"c": []}]}, {"a": None, "b": [1, "x", 2.5, True, {"c": []}]}),
        (
            {"at": MOMENT, "day": date(2026, 1, 31), "t": time(1, 2)},
            {"at": "2026-01-31T12:30:00Z", "day": "2026-01-31", "t": "01:02:00"},
        ),
        ({"id": UUID(int=1), "sum": Decimal("1.10")}, {"id": str(UUID(int=1)), "sum": "1.10"}),
        ({"colour": Colour.RED, "level": Level.HIGH}, {"colour": "red", "level": 3}),
        ({"pair": (1, 2), "big": 2**70}, {"pair": [1, 2], "big": 2**70}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        ({"item": Item(MOMENT, ["x"])}, {"item": {"at": "2026-01-31T12:30:00Z", "tags": ["x"]}}),
        (Item(MOMENT), {"at": "2026-01-31T12:30:00Z", "tags": []}),
        (ItemStruct(order_id="o-1"), {"orderId": "o-1"}),
        (ItemAttrs("o-1"), {"order_id": "o-1"}),
        (ItemModel(orderId="o-1"), {"orderId": "o-1"}),
        (msgspec.Raw(b'{"a": [1]}'), {"a": [1]}),
    ],
)
def test_an_object_goes_out_as_json(payload: object, expected: object) -> None:
    assert json.loads(payload_json(payload) or b"") == expected


@pytest.mark.parametrize("payload", [3, 2.5, "text", True, [1, 2], (), Colour.RED, MOMENT])
def test_what_is_no_object_is_wrapped(payload: object) -> None:
    wrapped = json.loads(payload_json(payload) or b"")

    assert list(wrapped) == ["value"]
    assert wrapped == json.loads(payload_json({"value": payload}) or b"")


def test_none_at_the_top_is_no_payload_and_none_inside_is_kept() -> None:
    assert payload_json(None) is None
    assert payload_json({"a": None}) == b'{"a":null}'


def test_a_declared_class_is_never_wrapped_for_its_saga_expects_it_as_it_is() -> None:
    assert payload_json(Point(1, 2)) == b"[1,2]"


def test_a_declaration_beside_the_payload_is_checked() -> None:
    assert payload_json({"order_id": "o-1"}, declared=ItemDict) == b'{"order_id":"o-1"}'
    with pytest.raises(MessageRejected, match=r"^payload contains .* of ItemDict"):
        payload_json({}, declared=ItemDict)
    with pytest.raises(MessageRejected, match="ItemDict"):
        payload_json({"order_id": "o-1", "more": 1}, declared=ItemDict)


def circle() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["self"] = inner
    return inner


@pytest.mark.parametrize(
    ("payload", "place", "reason"),
    [
        ({"x": float("nan")}, "payload.x", "must contain only finite JSON numbers"),
        ({"x": {"y": [1, float("-inf")]}}, "payload.x.y[1]", "must contain only finite JSON numbers"),
        ({"x": Decimal("NaN")}, "payload.x", "must contain only finite JSON numbers"),
        (float("inf"), "payload", "must contain only finite JSON numbers"),
        ({"f": print}, "payload.f", "contains a value that cannot be serialized as JSON"),
        ({"items": [{"a": object()}]}, "payload.items[0].a", "(object)"),
        ({"s": {1, 2}}, "payload.s", "cannot be serialized as JSON"),
        ({"b": b"bytes"}, "payload.b", "cannot be serialized as JSON"),
        ({"a b": {1}}, "payload['a b']", "cannot be serialized as JSON"),
        ({1: "x"}, "payload[1]", "a key that is no string"),
        ({"x": "\ud800"}, "payload.x", "lone surrogate"),
        ({"\ud800": 1}, "payload", "lone surrogate"),
        (Amount(float("nan")), "payload.value", "cannot be serialized as JSON of Amount"),
        ({"amounts": [Amount(1.0), Amount(float("inf"))]}, "payload.amounts[1].value", "Amount"),
        (msgspec.Raw(b"{nonsense"), "payload", "is no JSON"),
        (circle(), "payload", "nested too deep"),
    ],
)
def test_what_json_cannot_carry_is_refused_naming_the_place(payload: object, place: str, reason: str) -> None:
    with pytest.raises(MessageRejected) as caught:
        payload_json(payload)

    assert caught.value.message.startswith(f"{place} ")
    assert reason in caught.value.message
    assert caught.value.data["path"] == place
    assert not caught.value.retryable


def test_a_payload_is_not_changed() -> None:
    payload: dict[str, Any] = {"at": MOMENT, "parts": [(1, 2)]}

    payload_json(payload)

    assert payload == {"at": MOMENT, "parts": [(1, 2)]}


def deep(levels: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda inner: {"a": inner}, lambda inner: [inner]])
def test_depth_has_a_limit_and_it_is_a_refusal(wrap: Callable[[Any], Any]) -> None:
    assert payload_json(deep(100, wrap))
    with pytest.raises(MessageRejected, match="nested too deep"):
        payload_json(deep(100_000, wrap))


def test_the_examples_in_the_documentation_run() -> None:
    failed, _ = doctest.testmod(payloads)

    assert failed == 0
