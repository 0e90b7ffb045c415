"""Jobs as a target of sagas, and the triggers for the code around them: against a real jobs service on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypedDict

import httpx2
import msgspec
import pytest

from sagaloom import DeliveryFailed, MessageRejected, define_saga, send
from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import ConfigurationError
from sagaloom.integration.workers import (
    HttpWorkersClient,
    WorkersClientPort,
    WorkerTriggerReceipt,
    create_worker_triggers,
    trigger_job,
    trigger_task,
)
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime import SagaRuntime
from sagaloom.targets import JobTarget
from sagaloom.testing import MemoryStore
from sagaloom.workers import JobContext, JobResult, create_jobs_app, create_success_result, define_job_handler
from tests.doors.http_door import serve
from tests.workers.jobs_room import PATIENCE_SECONDS, Room, open_room

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class User(TypedDict):
    userId: Annotated[str, msgspec.Meta(min_length=1)]


@define_job_handler(payload=User)
async def create_user_settings(ctx: JobContext[User]) -> JobResult[str]:
    return create_success_result(ctx.payload["userId"])


class Service:
    def __init__(self, room: Room, url: str) -> None:
        self.room = room
        self.url = url


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with (
        open_room(create_user_settings) as room,
        serve(create_jobs_app(room.runtime, token="secret")) as port,
    ):
        yield Service(room, f"http://127.0.0.1:{port}")


def an_effect(payload: object = None, **changes: Any) -> OutboxEffect:
    effect = OutboxEffect(
        effect_key="e" * 40,
        lane="order-saga:o-1/1/job:create-user-settings",
        target_kind="job",
        target_id="create-user-settings",
        payload=msgspec.json.encode({"userId": "u-1"} if payload is None else payload),
        saga_id="order-saga",
        key="o/1",
        run=1,
        revision=1,
        position=0,
        message_id="m-1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    return msgspec.structs.replace(effect, **changes)


# --- The target ------------------------------------------------------------------------------------------------------


async def test_an_effect_triggers_one_run_however_often_it_is_sent(service: Service) -> None:
    target = JobTarget(service.url, token="secret")
    assert isinstance(target, EffectTarget)

    for _ in range(2):
        assert await target.deliver(an_effect(traceparent=TRACE, tracestate="a=b")) == ()
    run = await service.room.settled()
    runs, _ = await service.room.runtime.list_runs()
    await target.close()

    assert runs == [run]
    assert (run.payload, run.result) == (b'{"userId":"u-1"}', b'"u-1"')
    assert (run.idempotency_key, run.correlation_id) == ("e" * 40, "o/1")
    assert (run.traceparent, run.tracestate) == (TRACE, "a=b")


async def test_the_effects_own_idempotency_key_comes_first(service: Service) -> None:
    target = JobTarget(service.url, token="secret")

    await target.deliver(an_effect(idempotency_key="k"))
    await target.deliver(an_effect(idempotency_key="k", effect_key="f" * 40))
    await target.close()

    assert [run.idempotency_key for run in (await service.room.runtime.list_runs())[0]] == ["k"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target_id": "print"}, "answered 404.*loaded are: create-user-settings"),
        ({"payload": b'{"userId":""}'}, "answered 422"),
    ],
)
async def test_what_the_service_will_never_accept_is_final(
    service: Service, changes: dict[str, Any], text: str
) -> None:
    target = JobTarget(service.url, token="secret")

    with pytest.raises(DeliveryFailed, match=text) as caught:
        await target.deliver(an_effect(**changes))

    assert not caught.value.retryable
    await target.close()


async def test_a_wrong_token_is_final_and_never_shown(service: Service) -> None:
    target = JobTarget(service.url, token="guessed")

    with pytest.raises(DeliveryFailed, match="answered 401") as caught:
        await target.deliver(an_effect())

    assert "guessed" not in caught.value.message
    await target.close()


async def test_a_service_that_is_away_may_be_tried_again(service: Service) -> None:
    service.room.store.trouble = "the disk is gone"
    target = JobTarget(service.url, token="secret")

    with pytest.raises(DeliveryFailed, match="answered 503") as caught:
        await target.deliver(an_effect())

    assert caught.value.retryable
    assert caught.value.data["retryAfterSeconds"] == 1
    await target.close()


@pytest.mark.parametrize(
    "variable",
    [
        "services__workers-api__https__0",
        "services__workers-api__http__0",
        "WORKERS_API_URL",
        "NETSCRIPT_WORKERS_URL",
    ],
)
async def test_the_address_is_read_from_the_environment_for_every_effect(service: Service, variable: str) -> None:
    env: dict[str, str] = {}
    target = JobTarget(token="secret", read_env=env.get)

    with pytest.raises(DeliveryFailed, match="WORKERS_API_URL") as caught:
        await target.deliver(an_effect())
    env[variable] = service.url + "/"
    await target.deliver(an_effect())
    await target.close()

    assert caught.value.retryable
    assert len((await service.room.runtime.list_runs())[0]) == 1


async def test_the_last_resort_is_for_developers_only() -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(202)

    target = JobTarget(read_env={"SAGALOOM_DEV": "1"}.get, transport=httpx2.MockTransport(answer))

    await target.deliver(an_effect())
    await target.close()

    assert asked == ["http://127.0.0.1:8091/api/v1/workers/jobs/create-user-settings/trigger"]


@pytest.mark.parametrize("url", ["workers:8091", "ftp://x", "http://x?y=1", ""])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="workers API"):
        JobTarget(url)


def test_a_token_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="token"):
        JobTarget("http://x", token=" ")


async def test_a_saga_sends_to_a_job(service: Service) -> None:
    saga = (
        define_saga("signup")
        .state({})
        .on(
            "SignedUp",
            lambda saga, event, context: [send({"kind": "job", "id": "create-user-settings"}, event.payload)],
        )
        .build()
    )
    target = JobTarget(service.url, token="secret")
    async with SagaRuntime(MemoryStore(), definitions=[saga], targets=[target]) as runtime:
        await runtime.publish(
            {"type": "SignedUp", "payload": {"userId": "u-7"}, "correlationId": "s-1", "traceparent": TRACE}
        )
        run = await service.room.settled()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await runtime.settled()
    await target.close()

    assert (run.status, run.result, run.correlation_id, run.traceparent) == ("succeeded", b'"u-7"', "s-1", TRACE)


# --- Triggers --------------------------------------------------------------------------------------------------------


async def test_a_job_is_triggered_over_http(service: Service) -> None:
    async with create_worker_triggers(base_url=service.url, token="secret") as triggers:
        receipt = await triggers.trigger_job(
            "create-user-settings", {"userId": "u"}, priority="high", idempotency_key="k", correlation_id="c"
        )
        again = await triggers.trigger_job("create-user-settings", {"userId": "u"}, idempotency_key="k")
    run = await service.room.settled()

    assert receipt.run_id == again.run_id == run.run_id
    assert (receipt.id, receipt.duplicate, again.duplicate) == ("create-user-settings", False, True)
    assert (run.priority, run.correlation_id) == (75, "c")


async def test_a_trigger_may_wait_for_a_delay_or_a_moment(service: Service) -> None:
    client = HttpWorkersClient(service.url, token="secret", clock=service.room.clock)
    moment = service.room.clock.now() + timedelta(hours=1)

    await trigger_job(client, "create-user-settings", {"userId": "u"}, delay_ms=1500)
    await trigger_job(client, "create-user-settings", {"userId": "u"}, scheduled_for=moment)
    await client.close()
    runs, _ = await service.room.runtime.list_runs()

    assert {run.due_at - run.created_at for run in runs} == {timedelta(seconds=1.5), timedelta(hours=1)}


async def test_a_task_is_asked_for_under_its_own_address(service: Service) -> None:
    async with create_worker_triggers(base_url=service.url, token="secret") as triggers:
        with pytest.raises(DeliveryFailed, match="/api/v1/workers/tasks/resize/trigger"):
            await triggers.trigger_task("resize")


class Recorder:
    """A client of the host's own."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, object, dict[str, Any]]] = []

    async def trigger_job(self, job_id: str, payload: object = None, /, **options: Any) -> WorkerTriggerReceipt:
        return self._take("job", job_id, payload, options)

    async def trigger_task(self, task_id: str, payload: object = None, /, **options: Any) -> WorkerTriggerReceipt:
        return self._take("task", task_id, payload, options)

    def _take(self, kind: str, target_id: str, payload: object, options: dict[str, Any]) -> WorkerTriggerReceipt:
        self.seen.append((kind, target_id, payload, options))
        return WorkerTriggerReceipt(id=target_id, run_id=None, accepted_at=datetime(2026, 1, 1, tzinfo=UTC))


async def test_triggers_go_through_the_client_that_was_given() -> None:
    recorder = Recorder()
    assert isinstance(recorder, WorkersClientPort)
    triggers = create_worker_triggers(recorder)

    await triggers.trigger_job("mail", {"to": "me"}, delay_ms=5)
    await trigger_task(recorder, "resize", priority=3)

    assert recorder.seen == [("job", "mail", {"to": "me"}, {"delay_ms": 5}), ("task", "resize", None, {"priority": 3})]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"delay_ms": -1}, "Worker trigger delayMs must be a non-negative number"),
        ({"delay_ms": float("nan")}, "Worker trigger delayMs must be a non-negative number"),
        ({"delay_ms": "5"}, "Worker trigger delayMs must be a non-negative number"),
        ({"scheduled_for": datetime(2026, 1, 1)}, "Worker trigger scheduledFor must be a valid Date"),  # noqa: DTZ001
        ({"scheduled_for": "tomorrow"}, "Worker trigger scheduledFor must be a valid Date"),
        ({"delay_ms": 1, "scheduled_for": datetime(2026, 1, 1, tzinfo=UTC)}, "not both"),
        ({"priority": "urgent"}, "critical"),
        ({"priority": 101}, "0 to 100"),
        ({"idempotency_key": ""}, "idempotencyKey is empty"),
        ({"correlation_id": 3}, "correlationId must be a string"),
        ({"delay": 5}, "option 'delay' is unknown"),
    ],
)
async def test_options_that_make_no_sense_never_leave(options: dict[str, Any], text: str) -> None:
    recorder = Recorder()

    with pytest.raises(MessageRejected, match=text):
        await trigger_job(recorder, "mail", **options)

    assert recorder.seen == []


async def test_a_trigger_needs_an_id() -> None:
    with pytest.raises(MessageRejected, match="id of a job"):
        await trigger_job(Recorder(), " ")


async def test_a_payload_that_is_no_json_never_leaves(service: Service) -> None:
    async with create_worker_triggers(base_url=service.url, token="secret") as triggers:
        with pytest.raises(MessageRejected, match="Worker trigger payload"):
            await triggers.trigger_job("create-user-settings", {"at": object()})


def test_a_client_and_an_address_are_one_too_many() -> None:
    with pytest.raises(MessageRejected, match="base_url"):
        create_worker_triggers(Recorder(), base_url="http://x")
