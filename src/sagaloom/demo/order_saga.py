"""The order saga: charge first, and give the money back when the order cannot be fulfilled.

OrderPlaced         awaiting-payment                         send payments {orderId}
PaymentCaptured     awaiting-fulfillment
FulfillmentFailed   refunded, and the instance has failed    send payments {refund}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

from sagaloom import (
    CascadedMessage,
    SagaContext,
    SagaMessage,
    define_saga,
    saga_compensate,
    saga_fail,
    send,
)
from sagaloom.definitions import Saga

__all__ = ["FulfillmentFailed", "OrderPlaced", "OrderState", "PaymentCaptured", "order_saga"]


class OrderState(TypedDict):
    """The source of truth that survives across messages and crashes."""

    status: Literal["awaiting-payment", "awaiting-fulfillment", "completed", "refunded"]
    orderId: NotRequired[str]
    paymentId: NotRequired[str]


class OrderPlaced(TypedDict):
    orderId: str


class PaymentCaptured(TypedDict):
    orderId: str
    paymentId: str


class FulfillmentFailed(TypedDict):
    orderId: str
    reason: str


AnyOrderMessage = SagaMessage[OrderPlaced] | SagaMessage[PaymentCaptured] | SagaMessage[FulfillmentFailed]


def order_id_of(message: AnyOrderMessage) -> str:
    """All messages of one order meet in one instance; a publisher that names the instance itself is believed."""
    return message.correlation_key or message.payload["orderId"]


def on_order_placed(
    saga: Saga[OrderState], event: SagaMessage[OrderPlaced], context: SagaContext[OrderState]
) -> Sequence[CascadedMessage]:
    """An order was placed: record it and ask the payments service to charge."""
    saga.state = OrderState(status="awaiting-payment", orderId=event.payload["orderId"])
    # An effect, not a call: it leaves after the new state has been committed, and then as often as it takes.
    return [send({"kind": "service", "id": "payments"}, {"orderId": event.payload["orderId"]})]


def on_payment_captured(
    saga: Saga[OrderState], event: SagaMessage[PaymentCaptured], context: SagaContext[OrderState]
) -> Sequence[CascadedMessage]:
    """The payment is in: on to fulfillment."""
    saga.state = saga.state | {"status": "awaiting-fulfillment", "paymentId": event.payload["paymentId"]}
    return []


def on_fulfillment_failed(
    saga: Saga[OrderState], event: SagaMessage[FulfillmentFailed], context: SagaContext[OrderState]
) -> Sequence[CascadedMessage]:
    """Fulfillment failed after we charged: ask for the compensation."""
    return [saga_compensate({"type": "FulfillmentFailed", "payload": event.payload}, event.payload["reason"])]


def undo_payment(
    saga: Saga[OrderState], event: SagaMessage[FulfillmentFailed], context: SagaContext[OrderState]
) -> Sequence[CascadedMessage]:
    """Undo the payment that was applied, then fail the instance."""
    saga.state = saga.state | {"status": "refunded"}
    return [
        send({"kind": "service", "id": "payments"}, {"refund": saga.state.get("paymentId")}),
        saga_fail(f"order {event.payload['orderId']} unfulfilled: {event.payload['reason']}"),
    ]


initial_state: OrderState = {"status": "awaiting-payment"}

order_saga = (
    define_saga("order-saga")
    .durability("t1")
    .state(initial_state)
    .correlate(order_id_of)
    .on("OrderPlaced", on_order_placed)
    .on("PaymentCaptured", on_payment_captured, starts=False)
    .on("FulfillmentFailed", on_fulfillment_failed, starts=False)
    .compensate("FulfillmentFailed", undo_payment)
    .build()
)
