"""Misuses, each of which both checkers refuse at the line that says `expect: error`, and at no other.

The comments before that say how each checker calls it, and keep `make check` quiet; `test_typing.py` reads the file
without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_query, define_saga, define_signal
from sagaloom.integration.publisher import SagaPublisherPort
from sagaloom.queue import create_typed_queue
from sagaloom.runtime import create_saga_publisher, create_sync_saga_publisher
from sagaloom.workers import (
    JobContext,
    JobResult,
    create_failure_result,
    create_success_result,
    define_job_handler,
)


@dataclass(frozen=True)
class Order:
    status: str = "new"


@dataclass(frozen=True)
class Invoice:
    total: int = 0


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str


@dataclass(frozen=True)
class InvoiceSent:
    invoice_id: str


class Receipt(TypedDict):
    number: str


def placed(saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]) -> list[CascadedMessage]:
    return []


def sent(saga: Saga[Order], event: SagaMessage[InvoiceSent], context: SagaContext[Order]) -> list[CascadedMessage]:
    return []


def billed(
    saga: Saga[Invoice], event: SagaMessage[OrderPlaced], context: SagaContext[Invoice]
) -> list[CascadedMessage]:
    return []


async def asynchronous(
    saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]
) -> list[CascadedMessage]:
    return []


def returns_nothing(saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]) -> None: ...


def returns_text(saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]) -> list[str]:
    return []


def takes_two(saga: Saga[Order], event: SagaMessage[OrderPlaced]) -> list[CascadedMessage]:
    return []


def invoice_rule(message: SagaMessage[InvoiceSent]) -> str | None:
    return message.payload.invoice_id


async def asynchronous_rule(message: SagaMessage[Any]) -> str | None:
    return None


async def asynchronous_query(state: Order) -> int:
    return 1


def text_query(state: Order) -> str:
    return state.status


def invoice_is_paid(state: Invoice) -> bool:
    return True


def job(ctx: JobContext[OrderPlaced]) -> JobResult[str]:
    return create_success_result(ctx.payload.order_id)


def job_without_result(ctx: JobContext[OrderPlaced]) -> None: ...


async def work_on_invoice(message: InvoiceSent) -> None: ...


draft = define_saga("order")
ready = draft.state(Order())
untyped = draft.state({"status": "new"})
built = ready.on(OrderPlaced, placed)
publisher = create_saga_publisher[OrderPlaced | Receipt]()
blocking = create_sync_saga_publisher[OrderPlaced | Receipt]()
placements = create_typed_queue("placements", OrderPlaced)

# A handler before the state.
draft.on(OrderPlaced, placed)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # expect: error
draft.compensate(OrderPlaced, placed)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # expect: error
draft.invariant("always", lambda state: True)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownLambdaType, reportUnknownMemberType]  # expect: error

# Build without a handler, or without anything.
ready.build()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # expect: error
draft.build()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # expect: error
ready.compensate(OrderPlaced, placed).build()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # expect: error

# The state twice.
ready.state(Order())  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # expect: error
built.state(Order())  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # expect: error

# The wrong payload type.
ready.on(OrderPlaced, sent)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.on("OrderPlaced", sent, payload=OrderPlaced)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.on(Receipt, placed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.compensate(OrderPlaced, sent)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.correlate(OrderPlaced, invoice_rule)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.on_signal(define_signal("approve", OrderPlaced), sent)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.on_update(define_signal("approve", OrderPlaced), sent)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.during("new", OrderPlaced, sent)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.when_all([OrderPlaced, InvoiceSent], placed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.on(OrderPlaced, lambda saga, event, context: [event.payload.invoice_id])  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownLambdaType, reportUnknownMemberType]  # expect: error

# The wrong state type.
ready.on(OrderPlaced, billed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.on("OrderPlaced", billed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.compensate(OrderPlaced, billed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
untyped.on(OrderPlaced, placed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.invariant("paid", invoice_is_paid)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error

# An async handler, rule or query.
ready.on(OrderPlaced, asynchronous)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.on("OrderPlaced", asynchronous)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.during("new", OrderPlaced, asynchronous)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.compensate(OrderPlaced, asynchronous)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.correlate(asynchronous_rule)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.on_query(define_query("progress", int), asynchronous_query)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.on_query(define_query("progress"), asynchronous_query)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.on_query(define_query("progress", int), text_query)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error

# A handler that returns what is no list of effects, or takes something else.
ready.on(OrderPlaced, returns_nothing)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.on(OrderPlaced, returns_text)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
ready.on(OrderPlaced, takes_two)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error

# Settings that do not exist.
draft.durability("t4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
draft.schedule("0 3 * * *", catch_up="some")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
draft.schedule(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
draft.timeout("5m")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # expect: error
draft.reuse("always")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
ready.on(OrderPlaced, placed, on_missing="drop")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error

# A publisher and a message that is none of its classes. (Its handler is refused above: the wrong payload type.)
blocking.publish(InvoiceSent("i-1"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]  # expect: error
blocking.publish(SagaMessage("OrderPlaced", InvoiceSent("i-1")))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
blocking.publish(InvoiceSent, InvoiceSent("i-1"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
blocking.publish("OrderPlaced", InvoiceSent("i-1"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
blocking.publish("OrderPlaced", {"order_id": 1})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
blocking.publish(Receipt, {"nummer": "r-1"})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
blocking.publish({"type": "OrderPlaced", "payload": {}})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]  # expect: error
blocking.publish_many([OrderPlaced("o-1"), InvoiceSent("i-1")])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # expect: error
answer = publisher.publish(InvoiceSent("i-1"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]  # expect: error
answers = publisher.publish_many([InvoiceSent("i-1")])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # expect: error
port: SagaPublisherPort[InvoiceSent] = publisher  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # expect: error

# A publisher and options that do not exist.
blocking.publish(OrderPlaced("o-1"), {"correlationKey": "o-1"})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]  # expect: error
blocking.publish(OrderPlaced("o-1"), corelation_key="o-1")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]  # expect: error
blocking.publish_many([OrderPlaced("o-1")], mode="both")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
blocking.publish_many([OrderPlaced("o-1")], idempotency_key="k-1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # expect: error
create_saga_publisher[OrderPlaced](url="http://127.0.0.1:8092")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # expect: error

# A job of another payload, without a result, or with options that do not exist.
define_job_handler(job, payload=InvoiceSent)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]  # expect: error
define_job_handler(job)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]  # expect: error
define_job_handler(job_without_result, payload=OrderPlaced)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]  # expect: error
define_job_handler(job, payload=OrderPlaced, retries=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]  # expect: error
define_job_handler(id="pay", payload=InvoiceSent)(job)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
create_failure_result(404)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]  # expect: error

# A queue of another payload, and options that do not exist.
sending = placements.enqueue({"order_id": "o-1"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
sending_many = placements.enqueue_many([InvoiceSent("i-1")])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # expect: error
listening = placements.listen(work_on_invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # expect: error
create_typed_queue("placements", OrderPlaced, retries=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # expect: error
create_typed_queue("placements")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # expect: error
