"""Sagas that are right. Both checkers accept every line, and infer the types that are asserted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypedDict, assert_type

import attrs
import msgspec
import pydantic

from sagaloom import (
    ALL_STEPS,
    CascadedMessage,
    Gathered,
    QueryDefinition,
    RetryPolicy,
    Saga,
    SagaBuilder,
    SagaContext,
    SagaDefinition,
    SagaMessage,
    SagaState,
    SagaWithHandlers,
    SagaWithState,
    define_query,
    define_saga,
    define_signal,
    saga_compensate,
    saga_complete,
    saga_fail,
    schedule,
    send,
    spawn,
)
from sagaloom.config import define_saga_config
from sagaloom.integration.publisher import (
    SagaPublisherPort,
    SagaPublisherReceipt,
    SagaPublisherRejected,
    SagaPublisherResult,
)
from sagaloom.publisher import HttpSagaPublisher, SyncHttpSagaPublisher
from sagaloom.queue import (
    Queue,
    QueueContext,
    QueueReceipt,
    create_parallel_queue,
    create_queue,
    create_typed_queue,
)
from sagaloom.runtime import (
    HttpSagaPublisherOptions,
    SagaRuntime,
    UpdateReceipt,
    create_saga_publisher,
    create_sync_saga_publisher,
)
from sagaloom.workers import (
    JobContext,
    JobDefinition,
    JobResult,
    create_failure_result,
    create_success_result,
    define_job_handler,
)


@dataclass(frozen=True)
class Order:
    status: str = "new"
    paid: int = 0


class OrderDict(TypedDict):
    status: str


class OrderStruct(msgspec.Struct):
    status: str = "new"


@attrs.frozen
class OrderAttrs:
    status: str = "new"


class OrderModel(pydantic.BaseModel):
    status: str = "new"


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str


class PaymentCaptured(TypedDict):
    order_id: str
    payment_id: str


class Shipped(msgspec.Struct):
    order_id: str


class Cancelled(pydantic.BaseModel):
    reason: str


# Every way to declare a state is inferred.
draft = define_saga("order")
assert_type(draft.state({"status": "new"}), SagaWithState[dict[str, Any]])
assert_type(draft.state({}), SagaWithState[dict[str, Any]])
assert_type(draft.state(Order()), SagaWithState[Order])
assert_type(draft.state(OrderStruct()), SagaWithState[OrderStruct])
assert_type(draft.state(OrderAttrs()), SagaWithState[OrderAttrs])
assert_type(draft.state(OrderModel()), SagaWithState[OrderModel])
assert_type(draft.state(OrderDict(status="new")), SagaWithState[OrderDict])
assert_type(draft.state({"status": "new"}, type=OrderDict), SagaWithState[OrderDict])


# Handlers with full annotations, over a class, a wire type, and a wire type with a payload.
def placed(saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]) -> list[CascadedMessage]:
    assert_type(event.payload.order_id, str)
    saga.state = replace(saga.state, status="placed")
    return [send({"kind": "service", "id": "payments"}, {"orderId": event.payload.order_id}, {})]


def captured(
    saga: Saga[Order], event: SagaMessage[PaymentCaptured], context: SagaContext[Order]
) -> Sequence[CascadedMessage]:
    assert_type(event.payload["payment_id"], str)
    return []


def anything(saga: Saga[Order], event: SagaMessage[Any], context: SagaContext[Order]) -> tuple[CascadedMessage, ...]:
    return (saga_complete(), saga_fail("no"), saga_compensate(ALL_STEPS), saga_compensate(event, "why"))


def shipped(saga: Saga[Order], event: SagaMessage[Shipped], context: SagaContext[Order]) -> list[CascadedMessage]:
    return [schedule(Shipped(order_id="o-1"), "5m"), spawn("child", {"a": 1}, {"idempotency_key": "k"})]


def cancelled(saga: Saga[Order], event: SagaMessage[Cancelled], context: SagaContext[Order]) -> list[CascadedMessage]:
    return [saga_fail(event.payload.reason)]


def rule(message: SagaMessage[OrderPlaced]) -> str | None:
    return message.payload.order_id


def general_rule(message: SagaMessage[Any]) -> str | None:
    return message.correlation_key


def from_version_1(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "paid": 0}


class Handler:
    def __call__(
        self, saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]
    ) -> list[CascadedMessage]:
        return []


full = (
    define_saga("order")
    .durability("t2")
    .correlate(general_rule)
    .correlate(OrderPlaced, rule)
    .correlate("PaymentCaptured", lambda message: str(message.payload["order_id"]))
    .retry(RetryPolicy(maximum_attempts=3))
    .schedule("0 3 * * *", message="Anything", timezone="Europe/Berlin", catch_up="all")
    .timeout("30m", message=Cancelled(reason="late"))
    .timeout(timedelta(days=1), message=SagaMessage("Anything", None), name="day")
    .reuse("new_run")
    .singleton()
    .version(2, migrate={1: from_version_1})
    .state(Order())
    .invariant("paid is not negative", lambda state: state.paid >= 0)
    .on(OrderPlaced, placed)
    .on(PaymentCaptured, captured, starts=False, on_missing="discard")
    .on("Anything", anything)
    .on("Shipment", shipped, payload=Shipped)
    .on(Cancelled, cancelled)
    .compensate(OrderPlaced, placed)
    .compensate("Anything", anything)
    .compensate("Shipment", shipped, payload=Shipped)
)
assert_type(full, SagaWithHandlers[Order])
assert_type(full.build(), SagaDefinition[Order])
stage: SagaBuilder = full
entry = define_saga_config("order", "sagas/order.py").tags("a", "b").tags(["c"]).timeout("5m").retry(3).build()

# Lambdas and callable objects; their parameters are inferred.
draft.state(Order()).on(OrderPlaced, Handler()).build()
draft.state(Order()).on(OrderPlaced, lambda saga, event, context: [saga_complete(event.payload.order_id)]).build()
draft.state({"n": 0}).on("Tick", lambda saga, event, context: [saga_complete(saga.state["n"])]).build()


# An untyped state is changed in place.
def counted(saga: Saga[SagaState], event: SagaMessage[Any], context: SagaContext[SagaState]) -> list[CascadedMessage]:
    saga.state["n"] = 1
    return []


draft.state({"n": 0}).on("Tick", counted).build()

# Signals and queries.
approve = define_signal("approve", OrderPlaced)
progress = define_query("progress", int)
assert_type(progress, QueryDefinition[int])
with_state = draft.state(Order())


async def talking(runtime: SagaRuntime) -> None:
    assert_type(await runtime.query("order", "o-1", progress), int)
    await runtime.signal("order", "o-1", approve, OrderPlaced("o-1"))
    await runtime.signal("order", "o-1", "approve", {"order_id": "o-1"}, id="a-1", run=2)
    assert_type(await runtime.update("order", "o-1", approve, OrderPlaced("o-1"), wait=5), UpdateReceipt)


def with_signals_and_queries() -> SagaWithState[Order]:
    return (
        with_state.on_signal(approve, placed)
        .on_query(progress, lambda state: state.paid)
        .on_query(define_query("all"), lambda state: {"status": state.status, "paid": [state.paid]})
        .on_update(approve, placed)
    )


# Statuses and joins.
def gathered(saga: Saga[Order], event: SagaMessage[Gathered], context: SagaContext[Order]) -> list[CascadedMessage]:
    assert_type(event.payload[OrderPlaced], OrderPlaced)
    return []


draft.state(Order(), status_field="status").during(
    "new", OrderPlaced, placed, on_unexpected="ignore", starts=True
).build()
draft.state(Order()).during("new", "OrderPlaced", placed, payload=OrderPlaced, on_missing="wait", patience="5m").build()
draft.state(Order()).when_all([OrderPlaced, "Packed"], gathered).build()


# Publishers: of message classes, of messages as TypedDicts, of anything.
class UserSettingsCreated(TypedDict):
    type: Literal["UserSettingsCreated"]
    payload: PaymentCaptured


publisher = create_saga_publisher[OrderPlaced | PaymentCaptured](base_url="http://127.0.0.1:8092", timeout=5)
blocking = create_sync_saga_publisher[OrderPlaced](HttpSagaPublisherOptions(id="orders"), retries=0)
anyhow = create_saga_publisher()
assert_type(publisher, HttpSagaPublisher[OrderPlaced | PaymentCaptured])
assert_type(blocking, SyncHttpSagaPublisher[OrderPlaced])
assert_type(anyhow, HttpSagaPublisher[Any])


async def publishing(port: SagaPublisherPort[OrderPlaced]) -> None:
    message = SagaMessage("OrderPlaced", OrderPlaced("o-1"))
    assert_type(await publisher.publish(OrderPlaced("o-1")), SagaPublisherResult)
    await publisher.publish(OrderPlaced("o-1"), {"correlation_key": "o-1"}, wait=5)
    await publisher.publish(OrderPlaced("o-1"), correlation_key="o-1", topic="orders")
    await publisher.publish(message)
    await publisher.publish(SagaMessage("OrderPlaced", OrderPlaced("o-1")))
    await publisher.publish(PaymentCaptured, {"order_id": "o-1", "payment_id": "p-1"})
    await publisher.publish("PaymentCaptured", {"order_id": "o-1", "payment_id": "p-1"}, {"topic": "orders"})
    await publisher.publish_many([OrderPlaced("o-1"), message], mode="parallel", concurrency=4)
    await create_saga_publisher[UserSettingsCreated]().publish(
        {"type": "UserSettingsCreated", "payload": {"order_id": "o-1", "payment_id": "p-1"}}
    )
    await anyhow.publish({"type": "OrderPlaced", "payload": {"orderId": "o-1"}}, {"idempotency_key": "k-1"})
    await anyhow.publish("OrderPlaced", {"orderId": "o-1"})
    await port.publish(OrderPlaced("o-1"))
    blocking.publish(OrderPlaced("o-1")).raise_for_rejected()
    result = await port.publish(message)
    assert_type(result.reason, str | None)
    if isinstance(result, SagaPublisherRejected):
        assert_type(result.reason, str)
    else:
        assert_type(result, SagaPublisherReceipt)
    async with publisher as opened:
        narrower: SagaPublisherPort[OrderPlaced] = opened
        await publishing(narrower)


# --- Jobs ------------------------------------------------------------------------------------------------------------


@define_job_handler
def plain_job(ctx: JobContext[dict[str, Any]]) -> JobResult[str]:
    assert_type(ctx.payload, dict[str, Any])
    return create_success_result(ctx.run_id)


@define_job_handler(id="pay", payload=OrderPlaced, timeout="30s", retry=RetryPolicy(maximum_attempts=2))
async def typed_job(ctx: JobContext[OrderPlaced]) -> JobResult[int] | JobResult[None]:
    assert_type(ctx.payload.order_id, str)
    if ctx.attempt > 1:
        return create_failure_result("once was enough", retryable=False)
    return create_success_result(ctx.attempt)


async def job_function(ctx: JobContext[OrderDict]) -> JobResult[str]:
    return create_success_result(ctx.payload["status"])


assert_type(plain_job, JobDefinition[dict[str, Any]])
assert_type(typed_job, JobDefinition[OrderPlaced])
assert_type(define_job_handler(job_function, payload=OrderDict), JobDefinition[OrderDict])
assert_type(create_failure_result("no", {"a": 1}), JobResult[dict[str, int]])


# --- Queues ----------------------------------------------------------------------------------------------------------

placements = create_typed_queue("placements", OrderPlaced, provider="kv", retry_delay="5s")
in_parallel = create_parallel_queue("placements", OrderPlaced, concurrency=4)
untyped = create_queue("anything")
assert_type(placements, Queue[OrderPlaced])
assert_type(in_parallel, Queue[OrderPlaced])
assert_type(untyped, Queue[Any])


async def work_on(message: OrderPlaced, context: QueueContext) -> None:
    await context.nack(delay="1m", reason=message.order_id)


def work_without_context(message: OrderPlaced) -> int:
    return len(message.order_id)


async def queueing() -> None:
    assert_type(await placements.enqueue(OrderPlaced("o-1"), delay="5m", key="o-1"), QueueReceipt)
    await placements.enqueue_many([OrderPlaced("o-1"), OrderPlaced("o-2")], priority=90)
    await placements.listen(work_on, concurrency=2)
    await in_parallel.listen(work_without_context)
    await untyped.enqueue({"orderId": "o-1"})
