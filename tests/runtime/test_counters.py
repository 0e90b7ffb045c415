"""What the runtime counts, and that it counts each thing once."""

from __future__ import annotations

from typing import Any

import pytest

from sagaloom import RetryPolicy, SagasError, define_saga, saga_complete, send
from tests.runtime.conftest import Bench

pytestmark = pytest.mark.anyio


def _handle(saga: Any, event: Any, context: Any) -> list[Any]:
    match event.payload.get("do"):
        case "fail" if context.attempt == 1:
            raise RuntimeError("once")
        case "break":
            raise SagasError("for good", retryable=False)
        case "send":
            return [send("service:mail", {}, {"retry": RetryPolicy(maximum_attempts=2, jitter=0.0)})]
        case "end":
            return [saga_complete()]
    return []


def _saga() -> Any:
    return define_saga("s").state({}).on("Do", _handle).retry(RetryPolicy(jitter=0.0)).build()


async def test_messages_are_counted_by_what_became_of_them(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Do", {}, key="k", id="m-1")
    await life.publish("Do", {}, key="k", id="m-1")
    await life.publish("Do", {"do": "fail"}, key="k")
    await bench.advance("1s")
    await life.publish("Do", {"do": "break"}, key="k")
    await life.publish("Do", {"do": "end"}, key="k")
    await life.publish("Do", {}, key="k")

    counters = life.runtime.counters

    assert counters.accepted == {"s": 5}
    assert counters.decided == {
        ("s", "applied"): 3,
        ("s", "duplicate"): 1,
        ("s", "pending"): 1,
        ("s", "dead_lettered"): 1,
        ("s", "ignored"): 1,
    }
    assert counters.commits > 0
    assert (counters.commits_failed, counters.conflicts) == (0, 0)


async def test_deliveries_are_counted_by_what_came_of_them(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Do", {"do": "send"}, key="a")
    await life.runtime.settled()
    bench.receiver.answer = lambda effect: SagasError("no mailbox", retryable=True)
    await life.publish("Do", {"do": "send"}, key="b")
    await life.runtime.settled()
    await bench.advance("1s")

    assert life.runtime.counters.effects == {
        ("service", "dispatched"): 1,
        ("service", "failed"): 1,
        ("service", "dead_lettered"): 1,
    }
