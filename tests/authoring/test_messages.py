"""The three ways to write a message, and what is none."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec
import pytest

from sagaloom import MessageRejected, SagaMessage
from sagaloom.messages import as_message, message_type_of


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str


class Renamed(msgspec.Struct):
    __message_type__: ClassVar[str] = "order.placed"

    order_id: str


class Child(Renamed):
    pass


def test_an_instance_of_a_message_class_is_a_message() -> None:
    placed = OrderPlaced("o-1")

    assert as_message(placed) == SagaMessage("OrderPlaced", placed)


def test_a_message_class_may_name_its_type() -> None:
    assert as_message(Renamed("o-1")).type == "order.placed"


def test_a_subclass_is_a_type_of_its_own() -> None:
    assert message_type_of(Child) == "Child"


def test_a_mapping_may_use_the_names_of_the_wire() -> None:
    wire = {
        "type": "OrderPlaced",
        "payload": {"a": 1},
        "correlationId": "o-1",
        "messageId": "m-1",
        "idempotencyKey": "i-1",
        "concurrencyKey": "c-1",
        "occurredAt": "2026-01-31T12:00:00Z",
        "traceparent": None,
    }

    expected = SagaMessage(
        *("OrderPlaced", {"a": 1}, "o-1", "i-1", "c-1"), occurred_at=datetime(2026, 1, 31, 12, tzinfo=UTC), id="m-1"
    )
    assert expected == as_message(wire)


def test_a_mapping_without_a_payload_has_an_empty_one() -> None:
    assert as_message({"type": "Tick"}).payload == {}


def test_a_payload_may_be_null() -> None:
    assert as_message({"type": "Tick", "payload": None}).payload is None


def test_two_spellings_of_one_key_may_agree() -> None:
    assert as_message({"type": "Tick", "correlationId": "a", "correlationKey": "a"}).correlation_key == "a"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"type": "Tick", "correlationId": "a", "correlationKey": "b"}, "twice and differently"),
        ({"payload": {}}, "without a type"),
        ({"type": ""}, "without a type"),
        ({"type": 3}, "without a type"),
        ({"type": "Tick", "orderId": 1}, "unknown field 'orderId'"),
        ({"type": "Tick", 1: 1}, "unknown field 1"),
        ({"type": "Tick", "correlationKey": 1}, "correlation_key must be a string"),
        ({"type": "Tick", "occurredAt": "yesterday"}, "occurred_at must be a moment with a time zone"),
        ({"type": "Tick", "occurredAt": "2026-01-31T12:00:00"}, "occurred_at must be a moment with a time zone"),
        (SagaMessage("Tick", {}, occurred_at=datetime(2026, 1, 31)), "with a time zone"),  # noqa: DTZ001
        (SagaMessage("Tick", {}, id=3), "id must be a string"),  # type: ignore[arg-type]
        (SagaMessage(None, {}), "without a type"),  # type: ignore[arg-type]
        ("Tick", "is no message"),
        (None, "is no message"),
        (OrderPlaced, "is no message"),
        (object(), "is no message"),
        (datetime(2026, 1, 31, tzinfo=UTC), "is no message"),
    ],
)
def test_what_is_no_message_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(MessageRejected, match=reason):
        as_message(value)
