"""What the crash run tells: orders, each on one of several courses, and how each of them has to end.

Every order gets three messages, one after the other; of a raced one the second and the third are offered at once, and
which of them was accepted first decides what is charged. The course decides which messages, and what else happens: an
effect that leaves, an answer that comes back, a timer, a message to another saga, a child, a handler that fails at
first, a message that no attempt can save. Handlers are pure and depend on nothing but state, message and attempt, so
the end of an order does not depend on how often anybody was killed on the way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final

from sagaloom import (
    CascadedMessage,
    SagaContext,
    SagaMessage,
    SagasError,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    schedule,
    send,
    spawn,
)
from sagaloom.definitions import RetryPolicy, Saga, SagaDefinition

__all__ = ["ACCOUNTS", "COURSES", "Course", "Order", "definitions", "orders", "tip_of"]

ACCOUNTS: Final = 10
_RETRY: Final = RetryPolicy(maximum_attempts=5, initial_interval_ms=20, maximum_interval_ms=100)
_TIMER_MS_MIN, _TIMER_MS_MAX = 20, 400


@dataclass(frozen=True)
class Course:
    """How orders of one kind go. `races`: its second and third message are offered at once."""

    name: str
    third: str = "OrderShipped"
    races: bool = False
    dead_letters: tuple[str, ...] = ()


COURSES: Final = (
    Course("plain"),
    Course("refund", third="FulfillmentFailed"),
    Course("raced", third="FulfillmentFailed", races=True),
    Course("timed"),
    Course("ledger"),
    Course("flaky-start"),
    Course("flaky-middle"),
    Course("confirmed"),
    Course("parcel"),
    Course("hopeless", dead_letters=("PaymentCaptured",)),
)


@dataclass(frozen=True)
class Order:
    """One order: its id, its course, and the messages that are to be published for it, in this order."""

    id: str
    course: Course
    number: int

    @property
    def account(self) -> str:
        return f"account-{self.number % ACCOUNTS}"

    @property
    def amount(self) -> int:
        return 100 + 10 * (self.number % 90)

    def messages(self) -> list[dict[str, Any]]:
        """The three messages; `sequence` in the payload is the order in which they are offered. Those that race have
        the same."""
        types = ("OrderPlaced", "PaymentCaptured", self.course.third)
        return [
            {
                "type": message_type,
                "id": f"{self.id}-{sequence}",
                "payload": {
                    "orderId": self.id,
                    "course": self.course.name,
                    "account": self.account,
                    "amount": self.amount,
                    "sequence": min(sequence, 2) if self.course.races else sequence,
                },
            }
            for sequence, message_type in enumerate(types, start=1)
        ]


def orders(messages: int, rng: random.Random, *, prefix: str = "o") -> list[Order]:
    """Enough orders for `messages` messages; every course is among the first ones."""
    count = max(len(COURSES), -(-messages // 3))
    return [
        Order(f"{prefix}{number}", COURSES[number] if number < len(COURSES) else rng.choice(COURSES), number)
        for number in range(count)
    ]


def tip_of(amount: int) -> int:
    """What is charged beside `amount` when the payment of a raced order comes before its failure."""
    return amount // 10


# ---------------------------------------------------------------------- the sagas


@dataclass
class OrderState:
    course: str = ""
    order_id: str = ""
    account: str = ""
    amount: int = 0
    is_paid: bool = False
    is_shipped: bool = False
    is_confirmed: bool = False
    is_refunded: bool = False
    messages: list[str] = field(default_factory=list)


Event = SagaMessage[dict[str, Any]]
Effects = list[CascadedMessage]


def _payments(state: OrderState, step: str, amount: int) -> CascadedMessage:
    return send("service:payments", {"orderId": state.order_id, "step": step, "amount": amount})


def _placed(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    state, payload = saga.state, event.payload
    state.course, state.order_id, state.account = payload["course"], payload["orderId"], payload["account"]
    state.amount = payload["amount"]
    state.messages.append(event.type)
    if state.course == "flaky-start" and context.attempt == 1:
        raise ConnectionError("the first attempt of a starter fails")
    return [_payments(state, "charge", state.amount)]


def _paid(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    state = saga.state
    state.is_paid = True
    state.messages.append(event.type)
    if state.course == "flaky-middle" and context.attempt == 1:
        raise ConnectionError("the first attempt fails, and younger messages may go first")
    if state.course == "hopeless":
        raise SagasError("no attempt can save this one", retryable=False)
    if state.course == "raced":
        return [_payments(state, "tip", tip_of(state.amount))]
    return _finish_if_ready(state)


def _confirmed(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    saga.state.is_confirmed = True
    saga.state.messages.append(event.type)
    return _finish_if_ready(saga.state)


def _shipped(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    state = saga.state
    state.is_shipped = True
    state.messages.append(event.type)
    match state.course:
        case "timed":
            # Spread, so that some fire before the next kill and some after it.
            delay_ms = _TIMER_MS_MIN + sum(state.order_id.encode()) * 37 % (_TIMER_MS_MAX - _TIMER_MS_MIN)
            return [schedule(SagaMessage("ReceiptDue", {"orderId": state.order_id}), delay_ms)]
        case "parcel":
            label = SagaMessage("ParcelRequested", {"orderId": state.order_id}, correlation_key=state.order_id)
            return [spawn("parcel", label)]
        case _:
            return _finish_if_ready(state)


def _finish_if_ready(state: OrderState) -> Effects:
    if not state.is_shipped:
        return []
    match state.course:
        case "flaky-middle" if not state.is_paid:
            return []
        case "confirmed" if not state.is_confirmed:
            return []
        case "timed" | "parcel":
            return []
        case "ledger":
            entry = SagaMessage("LedgerEntry", {"account": state.account, "orderId": state.order_id})
            return [send("saga:ledger", entry), saga_complete({"orderId": state.order_id})]
        case _:
            return [saga_complete({"orderId": state.order_id})]


def _receipt_due(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    saga.state.messages.append(event.type)
    receipt = send("service:mail", {"orderId": saga.state.order_id, "step": "receipt"})
    return [receipt, saga_complete({"orderId": saga.state.order_id})]


def _parcel_done(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    saga.state.messages.append(event.type)
    return [saga_complete({"orderId": saga.state.order_id})]


def _fulfillment_failed(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    saga.state.messages.append(event.type)
    return [saga_compensate(event, "no stock")]


def _refund(saga: Saga[OrderState], event: Event, context: SagaContext[OrderState]) -> Effects:
    saga.state.is_refunded = True
    return [_payments(saga.state, "refund", saga.state.amount), saga_fail(f"order {saga.state.order_id} unfulfilled")]


@dataclass
class LedgerState:
    orders: list[str] = field(default_factory=list)


def _entered(saga: Saga[LedgerState], event: Event, context: SagaContext[LedgerState]) -> Effects:
    saga.state.orders.append(event.payload["orderId"])
    return []


@dataclass
class ParcelState:
    order_id: str = ""


def _parcel_requested(saga: Saga[ParcelState], event: Event, context: SagaContext[ParcelState]) -> Effects:
    saga.state.order_id = event.payload["orderId"]
    return [send("service:carrier", {"orderId": saga.state.order_id, "step": "label"})]


def _label_printed(saga: Saga[ParcelState], event: Event, context: SagaContext[ParcelState]) -> Effects:
    return [saga_complete({"orderId": saga.state.order_id})]


def definitions() -> list[SagaDefinition[Any]]:
    """The sagas of the story."""
    order = (
        define_saga("order")
        .state(OrderState())
        .on("OrderPlaced", _placed)
        .on("PaymentCaptured", _paid, starts=False)
        .on("OrderShipped", _shipped, starts=False)
        .on("FulfillmentFailed", _fulfillment_failed, starts=False)
        .on("ChargeConfirmed", _confirmed, starts=False)
        .on("ReceiptDue", _receipt_due, starts=False)
        .on("parcel:completed", _parcel_done, starts=False)
        .compensate("FulfillmentFailed", _refund)
        .correlate(lambda message: message.payload.get("orderId"))
        .retry(_RETRY)
        .build()
    )
    ledger = (
        define_saga("ledger")
        .state(LedgerState())
        .on("LedgerEntry", _entered)
        .correlate(lambda message: message.payload["account"])
        .build()
    )
    parcel = (
        define_saga("parcel")
        .state(ParcelState())
        .on("ParcelRequested", _parcel_requested)
        .on("LabelPrinted", _label_printed, starts=False)
        .correlate(lambda message: message.payload.get("orderId"))
        .build()
    )
    return [order, ledger, parcel]
