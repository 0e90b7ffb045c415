"""What is counted, and that each thing is counted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sagaloom import (
    RetryPolicy,
    SagaMessage,
    SagasError,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    send,
)
from sagaloom.errors import DeliveryFailed
from sagaloom.workers import JobContext, JobResult, create_failure_result, create_success_result, define_job_handler
from tests.runtime.conftest import Bench
from tests.telemetry.listening import Listener, labels
from tests.workers.jobs_room import open_room

pytestmark = pytest.mark.anyio


def _handle(saga: Any, event: Any, context: Any) -> Sequence[Any]:
    match event.payload.get("do"):
        case "fail" if context.attempt == 1:
            raise RuntimeError("once")
        case "break":
            raise SagasError("for good", code="BROKEN", retryable=False)
        case "send":
            return [send("service:mail", {}, {"retry": RetryPolicy(maximum_attempts=2, jitter=0.0)})]
        case "lose":
            return [send("Nobody", {})]
        case "undo":
            return [saga_compensate(SagaMessage("Do", {}), "no stock"), saga_fail("no stock")]
        case "end":
            return [saga_complete()]
    return []


def a_saga() -> Any:
    return (
        define_saga("s")
        .state({})
        .on("Do", _handle)
        .compensate("Do", lambda saga, event, context: [])
        .retry(RetryPolicy(jitter=0.0))
        .reuse("new_run")
        .build()
    )


async def test_decisions_are_timed_by_saga_type_and_outcome(bench: Bench, listener: Listener) -> None:
    life = await bench.live(a_saga(), telemetry=listener.providers)

    await life.publish("Do", key="k")
    await life.publish("Do", {"do": "fail"}, key="k")
    await bench.advance("1s")

    about = {"netscript__saga__id": "s", "netscript__saga__event__type": "Do"}
    assert listener.metric("netscript.saga.handle.duration_ms") == {
        labels(**about, netscript__outcome="success"): 2,
        labels(**about, netscript__outcome="error"): 1,
    }


async def test_runs_are_active_from_their_opening_to_their_end(bench: Bench, listener: Listener) -> None:
    life = await bench.live(a_saga(), telemetry=listener.providers)
    saga = labels(netscript__saga__id="s")

    for key in "abc":
        await life.publish("Do", key=key)
    three = listener.metric("netscript.saga.instances.active")
    await life.publish("Do", {"do": "end"}, key="a")
    await life.publish("Do", {"do": "undo"}, key="b")
    await life.runtime.cancel("s", "c")
    await life.publish("Do", {"do": "end"}, key="d")
    none = listener.metric("netscript.saga.instances.active")
    await life.publish("Do", key="a")

    assert (three, none) == ({saga: 3}, {saga: 0})
    assert listener.metric("netscript.saga.instances.active") == {saga: 1}


async def test_compensations_are_counted(bench: Bench, listener: Listener) -> None:
    life = await bench.live(a_saga(), telemetry=listener.providers)

    await life.publish("Do", key="k")
    await life.publish("Do", {"do": "undo"}, key="k")

    assert listener.metric("netscript.saga.compensations.total") == {labels(netscript__saga__id="s"): 1}


async def test_dead_letters_of_messages_and_of_effects_are_counted(bench: Bench, listener: Listener) -> None:
    life = await bench.live(a_saga(), telemetry=listener.providers)
    bench.receiver.answer = lambda effect: DeliveryFailed("no mailbox", retryable=False)

    await life.publish("Do", {"do": "break"}, key="k")
    await life.publish("Do", {"do": "lose"}, key="k")
    await life.publish("Do", {"do": "send"}, key="k")
    await life.runtime.settled()

    assert listener.metric("netscript.saga.dlq.total") == {
        labels(netscript__saga__id="s", error__type="BROKEN"): 1,
        labels(netscript__saga__id="s", error__type="SAGA_NOT_FOUND"): 1,
        labels(netscript__saga__id="s", error__type="DELIVERY_FAILED"): 1,
    }
    assert len(await life.runtime.dead_letters()) == 3


async def test_repeats_are_counted(bench: Bench, listener: Listener) -> None:
    life = await bench.live(a_saga(), telemetry=listener.providers)

    for _ in range(3):
        await life.publish("Do", key="k", id="m-1")

    assert listener.metric("netscript.saga.idempotency_hits.total") == {labels(netscript__saga__id="s"): 2}


async def test_what_the_runtime_counts_anyway_is_read_off(bench: Bench, listener: Listener) -> None:
    life = await bench.live(a_saga(), telemetry=listener.providers)
    answers: list[Any] = [DeliveryFailed("busy"), ()]
    bench.receiver.answer = lambda effect: answers.pop(0)

    await life.publish("Do", {"do": "send"}, key="k")
    await life.runtime.settled()
    waiting = listener.metric("netscript.saga.outbox")
    await bench.advance("1s")

    assert waiting == {frozenset(): 1}
    assert listener.metric("netscript.saga.outbox") == {frozenset(): 0}
    assert listener.metric("netscript.saga.backlog") == {frozenset(): 0}
    assert listener.metric("netscript.saga.stalled_lanes") == {frozenset(): 0}
    assert listener.metric("netscript.saga.partitions") == {frozenset(): 64}
    assert listener.metric("netscript.saga.messages.total") == {
        labels(netscript__saga__id="s", netscript__saga__disposition="applied"): 1
    }
    assert listener.metric("netscript.saga.effects.total") == {
        labels(netscript__target__kind="service", netscript__saga__disposition="failed"): 1,
        labels(netscript__target__kind="service", netscript__saga__disposition="dispatched"): 1,
    }


async def test_counts_go_on_over_a_restart_of_the_runtime_and_levels_end_with_it(
    bench: Bench, listener: Listener
) -> None:
    life = await bench.live(a_saga(), telemetry=listener.providers)
    await life.publish("Do", key="k")
    await bench.end(life)
    between = listener.metric("netscript.saga.messages.total"), listener.metric("netscript.saga.partitions")

    life = await bench.live(a_saga(), telemetry=listener.providers)
    await life.publish("Do", key="k")

    applied = labels(netscript__saga__id="s", netscript__saga__disposition="applied")
    assert between == ({applied: 1}, {})
    assert listener.metric("netscript.saga.messages.total") == {applied: 2}
    assert listener.metric("netscript.saga.partitions") == {frozenset(): 64}


async def test_attempts_of_jobs_are_timed_by_job_and_outcome(listener: Listener) -> None:
    @define_job_handler
    async def greet(ctx: JobContext[dict[str, Any]]) -> JobResult[Any]:
        if ctx.payload:
            return create_failure_result("no such user")
        return create_success_result(None)

    async with open_room(greet, telemetry=listener.providers) as room:
        await room.run("greet", {})
        await room.run("greet", {"fail": True})
        await room.runtime.stop()

    assert listener.metric("netscript.job.run.duration_ms") == {
        labels(netscript__job__id="greet", netscript__outcome="success"): 1,
        labels(netscript__job__id="greet", netscript__outcome="error"): 1,
    }
