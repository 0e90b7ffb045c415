"""The saga that the four web applications beside this file have: an order that is placed, and then paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_saga, saga_complete

__all__ = ["Order", "OrderPaid", "OrderPlaced", "orders"]


@dataclass(frozen=True)
class Order:
    status: str = "new"
    cents: int = 0


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str
    cents: int


@dataclass(frozen=True)
class OrderPaid:
    order_id: str


def placed(
    saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]
) -> Sequence[CascadedMessage]:
    saga.state = replace(saga.state, status="placed", cents=event.payload.cents)
    return []


def paid(saga: Saga[Order], event: SagaMessage[OrderPaid], context: SagaContext[Order]) -> Sequence[CascadedMessage]:
    saga.state = replace(saga.state, status="paid")
    return [saga_complete({"cents": saga.state.cents})]


def order_id_of(message: SagaMessage[OrderPlaced] | SagaMessage[OrderPaid]) -> str:
    return message.payload.order_id


orders = (
    define_saga("orders")
    .state(Order())
    .correlate(order_id_of)
    .on(OrderPlaced, placed)
    .on(OrderPaid, paid, starts=False)
    .build()
)
