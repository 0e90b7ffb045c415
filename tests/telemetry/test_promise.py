"""The page that promises names, compared with the names in the code and with what is recorded."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga, saga_compensate, saga_complete, schedule, send, spawn
from sagaloom.errors import DeliveryFailed
from sagaloom.queue import Queue, QueueConnectionOptions, QueueProvider, QueueSettings
from sagaloom.queue.providers import BrokerOptions, opener_of
from sagaloom.telemetry import names
from sagaloom.workers import JobContext, JobResult, create_success_result, define_job_handler
from tests.runtime.conftest import Bench
from tests.telemetry.listening import Listener, attributes_of
from tests.workers.jobs_room import open_room

pytestmark = pytest.mark.anyio

_PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "telemetry.md").read_text(encoding="utf-8")
_NAME = re.compile(r"`([a-z_.]+)`")


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first column has this header."""
    _, _, rest = _PAGE.partition(f"\n| {header} |")
    lines = rest.splitlines()[2:]
    table = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def first_names(header: str) -> list[str]:
    return [_NAME.findall(row[0])[0] for row in rows(header)]


def test_the_page_lists_every_span_event_and_outcome() -> None:
    assert first_names("span") == list(names.SPANS)
    assert first_names("event") == list(names.EVENTS)
    assert sorted(first_names("outcome")) == sorted(names.OUTCOMES)


def test_the_page_lists_every_metric_with_its_unit() -> None:
    listed = {_NAME.findall(row[0])[0]: row[2].strip("`") for row in rows("metric")}

    assert listed == names.UNITS
    assert tuple(listed) == names.METRICS


def test_the_page_lists_every_attribute() -> None:
    tables = [row for header in ("span", "event", "metric") for row in rows(header)]
    listed = {name for row in tables for name in _NAME.findall(row[-1])}

    everywhere = {names.OUTCOME, names.ERROR_TYPE}
    exceptions = {"exception.type", "exception.message", "exception.stacktrace"}
    assert listed - exceptions | everywhere == set(names.ATTRIBUTES)


def test_the_page_names_what_is_reserved_and_nobody_records_it() -> None:
    assert all(f"`{name}`" in _PAGE for name in names.RESERVED_METRICS)
    assert set(names.RESERVED_METRICS).isdisjoint(names.METRICS)


def _handle(saga: Any, event: Any, context: Any) -> Sequence[Any]:
    match event.payload.get("do"):
        case "ask":
            return [
                schedule(SagaMessage("Do", {"do": "end"}), "1h"),
                spawn("s", SagaMessage("Do", {}, "child")),
                send("service:p", {}),
                send("queue:q", {}, {"idempotency_key": "i", "concurrency_key": "c"}),
                send("job:j", {}),
            ]
        case "undo":
            return [saga_compensate(SagaMessage("Do", {}), "no stock")]
        case "end":
            return [saga_complete()]
        case "fail" if context.attempt == 1:
            raise ConnectionError("once")
    return []


class _Receiver:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def deliver(self, effect: Any) -> Sequence[SagaMessage[Any]]:
        return ()

    async def close(self) -> None:
        return None


async def _use_a_queue(listener: Listener) -> None:
    with tempfile.TemporaryDirectory() as directory:
        connection = QueueConnectionOptions(kv=f"{directory}/queues.db")
        queue = Queue[Any](
            "mails",
            opener_of(QueueProvider.KV, "mails", connection, BrokerOptions()),
            settings=QueueSettings(retry_attempts=0),
            telemetry=listener.providers,
        )

        async def fail(_: Any) -> None:
            raise ConnectionError("no")

        async with queue:
            await queue.enqueue("mail")
            listening = asyncio.create_task(queue.listen(fail))
            while not await queue.dead_letters():  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.01)
            await queue.stop()
            await listening


async def test_everything_that_is_recorded_is_promised_and_every_promise_is_kept(
    bench: Bench, listener: Listener
) -> None:
    saga = (
        define_saga("s").state({}).on("Do", _handle).compensate("Do", lambda saga, event, context: [send("job:j", {})])
    ).build()
    tight = define_saga("tight").state({}).on("Wait", _handle).concurrency(1).build()
    life = await bench.live(saga, tight, telemetry=listener.providers)
    for kind in ("queue", "job"):
        life.runtime.add_target(_Receiver(kind))
    bench.receiver.answer = lambda effect: DeliveryFailed("no", retryable=False, data={"status": 400})

    @define_job_handler
    async def greet(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        return create_success_result(None)

    await life.publish("Do", {"do": "ask"}, key="k", idempotency_key="i", concurrency_key="c")
    await life.publish("Do", {"do": "fail"}, key="k", id="m")
    await life.publish("Do", {"do": "fail"}, key="k", id="m")
    await life.publish("Do", {"do": "undo"}, key="k")
    await life.publish("Wait", {"do": "fail"}, key="k")
    refused = await life.runtime.publish(SagaMessage("Wait", {}, "other"))
    assert not refused.published
    await life.runtime.settled()
    await bench.advance("1h")
    async with open_room(greet, telemetry=listener.providers) as room:
        await room.run("greet", {}, correlation_id="c", idempotency_key="i")
        await room.runtime.stop()

    await _use_a_queue(listener)

    spans = listener.spans()
    recorded = {name for span in spans for name in attributes_of(span)}
    in_events = {name for span in spans for event in span.events for name in event.attributes or {}}
    assert {span.name for span in spans} == set(names.SPANS)
    assert {event.name for span in spans for event in span.events} == set(names.EVENTS)
    promised = set(names.ATTRIBUTES) - {names.MAX_ATTEMPTS}  # which only effects with a policy of their own have
    assert recorded == promised
    assert in_events - {"exception.type", "exception.message", "exception.stacktrace"} == {names.STATUS}
    assert listener.metric_units() == names.UNITS


async def test_each_span_has_no_attributes_but_those_in_its_row(bench: Bench, listener: Listener) -> None:
    await test_everything_that_is_recorded_is_promised_and_every_promise_is_kept(bench, listener)
    common = {names.OUTCOME, names.ERROR_TYPE, names.SAGA_ID, names.INSTANCE_ID, names.CORRELATION_KEY}
    promised = {_NAME.findall(row[0])[0]: set(_NAME.findall(row[-1])) | common for row in rows("span")}

    beyond = {(span.name, name) for span in listener.spans() for name in set(attributes_of(span)) - promised[span.name]}

    assert beyond == set()
