"""What a saga hears of the jobs that it asks for: both services on loopback, as two processes would have them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from sagaloom import DeliveryFailed, SagaDefinition, SagaMessage, define_saga, saga_complete, send
from sagaloom.errors import MessageRejected, SagaNotFound
from sagaloom.ports.jobs import JobReplyTo
from sagaloom.runtime import SagaRuntime
from sagaloom.service import create_app
from sagaloom.targets import JobTarget
from sagaloom.testing import MemoryStore
from sagaloom.workers import (
    HttpReplies,
    JobContext,
    JobResult,
    JobRuntime,
    create_failure_result,
    create_jobs_app,
    create_success_result,
    define_job_handler,
)
from sagaloom.workers.replying import reply_of
from tests.doors.http_door import serve
from tests.workers.jobs_room import PATIENCE_SECONDS, Room, open_room
from tests.workers.test_job_control import until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACE = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
Ctx = JobContext[dict[str, Any]]


@define_job_handler
async def invoice(ctx: Ctx) -> JobResult[Any]:
    if ctx.payload["how"] == "bad":
        return create_failure_result("no such customer", {"customer": 7})
    return create_success_result({"number": 12})


def _asked(saga: Any, event: Any, context: Any) -> list[Any]:
    return [send("job:invoice", event.payload)]


def _heard(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"heard": event.type, "payload": event.payload, "trace": event.traceparent}
    return [saga_complete(event.payload.get("result"))]


orders = (
    define_saga("orders")
    .state({})
    .on("Ordered", _asked)
    .on("invoice:completed", _heard, starts=False)
    .on("invoice:failed", _heard, starts=False)
    .on("invoice:cancelled", _heard, starts=False)
    .build()
)
deaf = define_saga("deaf").state({}).on("Ordered", _asked).build()


class House:
    """A saga service and a jobs service that know each other."""

    def __init__(self, sagas: SagaRuntime, room: Room) -> None:
        self.sagas = sagas
        self.room = room
        self.jobs: JobRuntime = room.runtime

    async def order(self, how: str = "well", saga: str = "orders") -> str:
        """Starts a saga, and returns the id of the run that it asks for."""
        receipt = await self.sagas.publish(
            {"type": "Ordered", "payload": {"how": how}}, correlation_key="o/1", traceparent=TRACE
        )
        receipt.raise_for_rejected()

        async def look() -> str | None:
            runs, _ = await self.jobs.list_runs()
            return runs[0].run_id if runs else None

        return str(await until(look))

    async def ended(self) -> Any:
        async def look() -> Any:
            instance = await self.sagas.get_instance("orders", "o/1")
            return instance if instance is not None and instance.status == "completed" else None

        return await until(look)

    async def reply(self, run_id: str, state: str) -> Any:
        """The run, once its reply is in this state."""

        async def look() -> Any:
            run = await self.jobs.get_run(run_id)
            return run if run.reply is not None and run.reply.state == state else None

        return await until(look)


@contextlib.asynccontextmanager
async def open_house(
    definition: SagaDefinition[Any] = orders, *, is_working: bool = True, **options: Any
) -> AsyncIterator[House]:
    sagas = SagaRuntime(MemoryStore(), definitions=[definition])
    async with (
        serve(create_app(sagas, token="secret")) as sagas_port,
        open_room(
            invoice,
            is_started=is_working,
            replies=HttpReplies(f"http://127.0.0.1:{sagas_port}", token="secret"),
            **options,
        ) as room,
        serve(create_jobs_app(room.runtime)) as jobs_port,
    ):
        target = JobTarget(f"http://127.0.0.1:{jobs_port}")
        sagas.add_target(target)
        async with sagas:
            yield House(sagas, room)
        await target.close()


async def test_the_result_of_a_job_returns_to_the_run_that_asked_for_it() -> None:
    async with open_house() as house:
        run_id = await house.order()
        instance = await house.ended()
        run = await house.reply(run_id, "delivered")
        state = msgspec.json.decode(instance.state)

    assert state["heard"] == "invoice:completed"
    assert state["payload"] == {"jobId": "invoice", "runId": run_id, "attempts": 1, "result": {"number": 12}}
    assert TRACE_ID in state["trace"]
    assert instance.result == b'{"number":12}'
    assert (run.reply_to.saga_id, run.reply_to.key, run.reply_to.run) == ("orders", "o/1", 1)
    assert TRACE_ID in run.traceparent


async def test_the_failure_of_a_job_returns_with_its_reason() -> None:
    async with open_house() as house:
        run_id = await house.order("bad")
        state = msgspec.json.decode((await house.ended()).state)

    assert state["heard"] == "invoice:failed"
    assert state["payload"] == {
        "jobId": "invoice",
        "runId": run_id,
        "attempts": 1,
        "reason": "no such customer",
        "code": "JOB_FAILED",
        "data": {"customer": 7},
    }


async def test_a_saga_hears_that_its_job_was_cancelled() -> None:
    async with open_house(is_working=False) as house:
        run_id = await house.order()
        await house.jobs.cancel(run_id, reason="not needed")
        state = msgspec.json.decode((await house.ended()).state)

    assert (state["heard"], state["payload"]["reason"]) == ("invoice:cancelled", "not needed")


async def test_a_saga_that_does_not_listen_is_not_disturbed() -> None:
    async with open_house(deaf) as house:
        run_id = await house.order()
        run = await house.reply(run_id, "delivered")
        instance = await house.sagas.get_instance("deaf", "o/1")
        history = await house.sagas.history("deaf", "o/1")
        letters = await house.sagas.dead_letters()

    assert run.status == "succeeded"
    assert instance is not None
    assert (instance.status, len(history), letters) == ("running", 1, [])


async def test_a_reply_that_is_delivered_twice_changes_the_saga_once() -> None:
    async with open_house() as house:
        run_id = await house.order()
        await house.ended()
        run = await house.reply(run_id, "delivered")
        again = await house.sagas.reply("orders", "o/1", reply_of(run), run=1)
        history = await house.sagas.history("orders", "o/1")

    assert again.disposition == "duplicate"
    assert [entry.type for entry in history] == ["Ordered", "invoice:completed"]


async def test_a_reply_waits_for_a_saga_service_that_does_not_answer() -> None:
    class Flaky(HttpReplies):
        is_down = True

        async def reply(self, to: JobReplyTo, message: SagaMessage[Any]) -> None:
            if self.is_down:
                raise DeliveryFailed("nobody answers")
            heard.append(message.type)

    heard: list[str] = []
    replies = Flaky("http://127.0.0.1:1")
    async with open_room(invoice, replies=replies) as room:
        await room.runtime.trigger("invoice", {"how": "well"}, reply_to=JobReplyTo("orders", "o/1", 1, "e"))
        run = await room.settled()

        async def postponed() -> Any:
            found = await room.store.get(run.run_id)
            return found if found and found.reply and found.reply.attempt else None

        waiting = await until(postponed)
        replies.is_down = False
        await room.clock.advance_through("10s")

        async def delivered() -> bool:
            found = await room.store.get(run.run_id)
            return found is not None and found.reply is not None and found.reply.state == "delivered"

        assert (waiting.reply.state, waiting.reply.problem) == ("due", "nobody answers")
        assert await until(delivered)
        assert heard == ["invoice:completed"]


async def test_a_reply_that_is_refused_for_good_is_shown_and_sent_again_by_a_redrive() -> None:
    async with open_house() as house:
        receipt = await house.jobs.trigger("invoice", {"how": "well"}, reply_to=JobReplyTo("nobody", "o/1", 1, "e"))
        refused = await house.reply(receipt.run_id, "refused")
        again = await house.jobs.redrive(receipt.run_id)
        twice = await house.reply(receipt.run_id, "refused")

    assert "there is no saga 'nobody'" in refused.reply.problem
    assert again.reply is not None
    assert (again.status, again.reply.state, twice.status) == ("succeeded", "due", "succeeded")


async def test_a_worker_that_died_before_the_reply_leaves_it_to_another() -> None:
    async with open_house() as house:
        store = house.room.store
        receipt = await house.jobs.trigger("invoice", {"how": "well"}, reply_to=JobReplyTo("orders", "o/9", 1, "e"))
        await house.room.settled()
        run = await house.reply(receipt.run_id, "delivered")
        # As it was before: settled, and nothing more.
        await store._kv.commit(
            puts=[
                (("job_run", run.run_id), msgspec.msgpack.encode(msgspec.structs.replace(run, reply=_due(run)))),
                (("job_reply", int(_due(run).due_at.timestamp() * 1_000_000), run.run_id), b""),
            ]
        )
        await house.room.clock.advance_through("10s")

        assert (await house.reply(receipt.run_id, "delivered")).reply.attempt == 1


def _due(run: Any) -> Any:
    return msgspec.structs.replace(run.reply, state="due", due_at=run.ended_at, attempt=0)


# --- The door of sagas -----------------------------------------------------------------------------------------------


async def test_an_answer_to_a_run_that_is_over_or_never_was_is_ignored() -> None:
    async with SagaRuntime(MemoryStore(), definitions=[orders], targets=[_Nowhere()]) as sagas:
        await sagas.publish({"type": "Ordered", "payload": {}}, correlation_key="o-1")
        first = await sagas.reply("orders", "o-1", a_reply("r-1"), run=1)
        late = await sagas.reply("orders", "o-1", a_reply("r-2"), run=1)
        other = await sagas.reply("orders", "o-1", a_reply("r-3"), run=2)
        never = await sagas.reply("orders", "o-2", a_reply("r-4"), run=1)

    assert [one.disposition for one in (first, late, other, never)] == ["applied", "ignored", "ignored", "ignored"]


async def test_an_answer_for_nobody_or_without_an_id_is_refused() -> None:
    async with SagaRuntime(MemoryStore(), definitions=[orders]) as sagas:
        with pytest.raises(SagaNotFound, match="'shop'"):
            await sagas.reply("shop", "o-1", a_reply("r-1"), run=1)
        with pytest.raises(MessageRejected, match="has no id"):
            await sagas.reply("orders", "o-1", a_reply(None), run=1)


async def test_answers_at_once_are_applied_once() -> None:
    async with SagaRuntime(MemoryStore(), definitions=[orders], targets=[_Nowhere()]) as sagas:
        await sagas.publish({"type": "Ordered", "payload": {}}, correlation_key="o-1")
        async with asyncio.timeout(PATIENCE_SECONDS):
            answers = await asyncio.gather(*(sagas.reply("orders", "o-1", a_reply("r-1"), run=1) for _ in range(10)))

    assert sorted(one.disposition for one in answers) == ["applied"] + ["duplicate"] * 9


def a_reply(message_id: str | None) -> SagaMessage[Any]:
    return SagaMessage("invoice:completed", {"result": 1}, id=message_id, occurred_at=datetime(2026, 1, 1, tzinfo=UTC))


class _Nowhere:
    kind = "job"

    async def deliver(self, effect: object) -> list[Any]:
        return []

    async def close(self) -> None:
        return None
