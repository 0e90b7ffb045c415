"""The saga of the seed page: an order that is charged, cannot be fulfilled, and is refunded."""

from typing import Any

import pytest

from sagaloom import CascadedMessage, define_saga, saga_compensate, saga_fail, send
from sagaloom.ids import effect_key
from tests.core.deciding import Context, Event, Slot, Story, kinds, state_of


def _placed(saga: Slot, event: Event, context: Context) -> list[CascadedMessage]:
    saga.state = {**saga.state, "orderId": event.payload["orderId"]}
    return [send({"kind": "service", "id": "payments"}, {"orderId": event.payload["orderId"]}, {})]


def _captured(saga: Slot, event: Event, context: Context) -> list[CascadedMessage]:
    saga.state = {**saga.state, "status": "awaiting-fulfillment", "paymentId": event.payload["paymentId"]}
    return []


def _unfulfilled(saga: Slot, event: Event, context: Context) -> list[CascadedMessage]:
    return [saga_compensate({"type": "FulfillmentFailed", "payload": event.payload}, event.payload["reason"])]


def _refund(saga: Slot, event: Event, context: Context) -> list[CascadedMessage]:
    saga.state = {**saga.state, "status": "refunded"}
    return [
        send({"kind": "service", "id": "payments"}, {"refund": saga.state["paymentId"]}, {}),
        saga_fail(f"order {event.payload['orderId']} unfulfilled: {event.payload['reason']}"),
    ]


@pytest.fixture
def story() -> Story:
    definition: Any = (
        define_saga("order-saga")
        .durability("t1")
        .state({"status": "awaiting-payment"})
        .on("OrderPlaced", _placed)
        .on("PaymentCaptured", _captured)
        .on("FulfillmentFailed", _unfulfilled)
        .compensate("FulfillmentFailed", _refund)
        .build()
    )
    story = Story(definition, "o-1")
    story.takes("OrderPlaced", {"orderId": "o-1"})
    story.takes("PaymentCaptured", {"orderId": "o-1", "paymentId": "p-1"})
    story.takes("FulfillmentFailed", {"orderId": "o-1", "reason": "out of stock"})
    return story


def test_the_order_ends_failed_and_refunded(story: Story) -> None:
    last = story.decisions[-1]

    assert last.instance is not None
    assert last.instance.status == "failed"
    assert last.instance.reason == "order o-1 unfulfilled: out of stock"
    assert state_of(last) == {"status": "refunded", "orderId": "o-1", "paymentId": "p-1"}


def test_the_charge_and_the_refund_leave_under_different_keys_in_one_lane(story: Story) -> None:
    charge, refund = (effect for decision in story.decisions for effect in decision.effects)

    assert charge.effect_key == effect_key("order-saga", "o-1", 1, 1, 0)
    assert refund.effect_key == effect_key("order-saga", "o-1", 1, 3, 1)
    assert charge.lane == refund.lane
    assert (charge.payload, refund.payload) == (b'{"orderId":"o-1"}', b'{"refund":"p-1"}')


def test_the_compensation_is_a_second_step_of_the_same_revision(story: Story) -> None:
    entry = story.decisions[-1].entry

    assert entry is not None
    assert entry.revision == 3
    assert [(step.phase, step.type, step.status) for step in entry.steps] == [
        ("handle", "FulfillmentFailed", "compensating"),
        ("compensate", "FulfillmentFailed", "failed"),
    ]


def test_the_feed_tells_the_whole_story(story: Story) -> None:
    assert [kinds(decision) for decision in story.decisions] == [
        ["saga:message_received", "saga:started", "saga:state_changed"],
        ["saga:message_received", "saga:state_changed"],
        [
            "saga:message_received",
            "saga:state_changed",
            "saga:compensating",
            "saga:state_changed",
            "saga:failed",
        ],
    ]
