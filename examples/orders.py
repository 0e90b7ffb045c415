"""An order with compensation: charge, pick, ship; and when there is nothing to ship, give the money back.

`python -m examples.orders` tells of three orders: one arrives, one is paid and cannot be fulfilled, and one has to be
tried twice, because its label cannot be printed at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.telling import Act, Ending, Story, Teller, tell_as_script
from sagaloom import (
    CascadedMessage,
    RetryPolicy,
    Saga,
    SagaContext,
    SagaMessage,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    send,
)
from sagaloom.targets import EffectRequest


@dataclass(frozen=True)
class Order:
    status: str = "new"
    cents: int = 0
    payment_id: str | None = None


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str
    cents: int


@dataclass(frozen=True)
class PaymentCaptured:
    order_id: str
    payment_id: str


@dataclass(frozen=True)
class Shipped:
    order_id: str


@dataclass(frozen=True)
class FulfillmentFailed:
    order_id: str
    reason: str


Effects = Sequence[CascadedMessage]
Context = SagaContext[Order]


def placed(saga: Saga[Order], event: SagaMessage[OrderPlaced], context: Context) -> Effects:
    saga.state = replace(saga.state, status="awaiting payment", cents=event.payload.cents)
    return [send("service:payments", {"charge": event.payload.cents, "order": event.payload.order_id})]


def captured(saga: Saga[Order], event: SagaMessage[PaymentCaptured], context: Context) -> Effects:
    saga.state = replace(saga.state, status="awaiting fulfillment", payment_id=event.payload.payment_id)
    return [send("service:warehouse", {"pick": event.payload.order_id})]


def shipped(saga: Saga[Order], event: SagaMessage[Shipped], context: Context) -> Effects:
    if event.payload.order_id == "o-3" and context.attempt == 1:
        raise ConnectionError("no paper")  # whatever a handler raises, nothing is written, and it is tried again
    saga.state = replace(saga.state, status="shipped")
    return [saga_complete({"paid": saga.state.cents})]


def unfulfilled(saga: Saga[Order], event: SagaMessage[FulfillmentFailed], context: Context) -> Effects:
    return [saga_compensate(event, event.payload.reason)]


def refund(saga: Saga[Order], event: SagaMessage[FulfillmentFailed], context: Context) -> Effects:
    saga.state = replace(saga.state, status="refunded")
    back = {"refund": saga.state.payment_id, "order": event.payload.order_id}
    return [send("service:payments", back), saga_fail(event.payload.reason)]


def order_id_of(message: SagaMessage[OrderPlaced | PaymentCaptured | Shipped | FulfillmentFailed]) -> str:
    return message.payload.order_id


orders = (
    define_saga("orders")
    .durability("t2")  # the history keeps the states, too
    .retry(RetryPolicy(maximum_attempts=3, initial_interval_ms=5_000))
    .state(Order())
    .correlate(order_id_of)
    .on(OrderPlaced, placed)
    .on(PaymentCaptured, captured, starts=False)
    .on(Shipped, shipped, starts=False)
    .on(FulfillmentFailed, unfulfilled, starts=False)
    .compensate(FulfillmentFailed, refund)
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


def answer(request: EffectRequest) -> object:
    """Payments capture whatever they are asked for; the warehouse has nothing for order o-2."""
    match request.payload:
        case {"charge": _, "order": order}:
            return PaymentCaptured(order, f"p-{order}")
        case {"pick": "o-2"}:
            return FulfillmentFailed("o-2", "out of stock")
        case {"pick": order}:
            return Shipped(order)
        case _:
            return None


async def place_one(teller: Teller) -> None:
    await teller.publish(OrderPlaced("o-1", 1_250))


async def place_another(teller: Teller) -> None:
    await teller.publish(OrderPlaced("o-2", 990))


async def place_one_that_is_tried_again(teller: Teller) -> None:
    await teller.publish(OrderPlaced("o-3", 1))
    await teller.let_pass("10s")


def holds(ending: Ending) -> bool:
    first, second, third = (ending.instances[f"orders:o-{number}"] for number in (1, 2, 3))
    return (
        [one["status"] for one in (first, second, third)] == ["completed", "failed", "completed"]
        and second["reason"] == "out of stock"
        and sum("charge" in asked for asked in ending.outside) == 3
        and sum("refund" in asked for asked in ending.outside) == 1
    )


story = Story(
    name="orders",
    acts=[Act(sagas=[orders], steps=[place_one, place_another, place_one_that_is_tried_again])],
    answer=answer,
    holds=holds,
)

if __name__ == "__main__":
    tell_as_script(story)
