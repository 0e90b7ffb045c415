"""The jobs API, on a real socket where that matters, and straight into the application where it does not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, TypedDict

import httpx2
import msgspec
import pytest

from sagaloom import RetryPolicy
from sagaloom.errors import ConfigurationError
from sagaloom.web.health import LiveView, ReadyView
from sagaloom.web.problems import Problem
from sagaloom.workers import (
    JobContext,
    JobResult,
    create_failure_result,
    create_jobs_app,
    create_success_result,
    define_job_handler,
    shapes,
)
from sagaloom.workers.app import EXAMPLES
from tests.doors.http_door import serve, speak
from tests.workers.jobs_room import Room, open_room

PREFIX = "/api/v1/workers"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Mail(TypedDict):
    to: Annotated[str, msgspec.Meta(min_length=1)]


@define_job_handler(payload=Mail, timeout="30s")
async def send_mail(ctx: JobContext[Mail]) -> JobResult[dict[str, str]]:
    return create_success_result({"sentTo": ctx.payload["to"]})


@define_job_handler(retry=RetryPolicy(maximum_attempts=2))
def fail(ctx: JobContext[dict[str, Any]]) -> JobResult[Any]:
    if ctx.payload.get("raise"):
        raise OSError("no paper")
    return create_failure_result("no such user", {"userId": "u"})


class Door:
    def __init__(self, room: Room, client: httpx2.AsyncClient) -> None:
        self.room = room
        self.client = client

    async def trigger(self, job: str = "send-mail", body: Any = None, **options: Any) -> httpx2.Response:
        content = {"payload": {"to": "me"}} if body is None else body
        return await self.client.post(f"{PREFIX}/jobs/{job}/trigger", json=content, **options)

    async def get(self, path: str, **params: Any) -> httpx2.Response:
        return await self.client.get(PREFIX + path, params=params or None)

    async def run(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Triggers a run, waits until it was settled, and gets it."""
        triggered = await self.trigger(*args, **options)
        assert triggered.status_code == 202, triggered.text
        await self.room.settled()
        found: dict[str, Any] = (await self.get(f"/runs/{triggered.json()['runId']}")).json()
        return found


@contextlib.asynccontextmanager
async def open_door(*, is_started: bool = True, **app_options: Any) -> AsyncIterator[Door]:
    async with open_room(send_mail, fail, is_started=is_started, payload_bytes_max=1000) as room:
        transport = httpx2.ASGITransport(create_jobs_app(room.runtime, **app_options))
        async with httpx2.AsyncClient(transport=transport, base_url="http://jobs") as client:
            yield Door(room, client)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


@pytest.fixture
async def guarded() -> AsyncIterator[Door]:
    async with open_door(token="a token") as opened:
        yield opened


def refused(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an error, checked for what every error has."""
    body: dict[str, Any] = response.json()
    assert (status, code) == (response.status_code, body["code"]), body
    assert body.keys() - {"data"} == {"code", "message", "retryable", "traceId"}
    assert len(body["traceId"]) == 32
    return body


# --- Triggering ------------------------------------------------------------------------------------------------------


async def test_a_trigger_is_answered_with_202_and_its_run(door: Door) -> None:
    response = await door.trigger()
    run = await door.room.settled()

    assert response.status_code == 202
    assert response.json() == {"jobId": "send-mail", "runId": run.run_id, "triggered": True, "duplicate": False}


async def test_a_run_shows_what_became_of_it(door: Door) -> None:
    run = await door.run(
        body={
            "payload": {"to": "me"},
            "priority": "high",
            "correlationId": "c-1",
            "idempotencyKey": "k",
            "traceparent": TRACE,
            "tracestate": "a=b",
        }
    )

    moment = "2026-01-01T00:00:00.000Z"
    assert run == {
        "runId": run["runId"],
        "jobId": "send-mail",
        "status": "succeeded",
        "attempt": 1,
        "priority": 75,
        "payload": {"to": "me"},
        "createdAt": moment,
        "dueAt": moment,
        "startedAt": moment,
        "endedAt": moment,
        "result": {"sentTo": "me"},
        "correlationId": "c-1",
        "idempotencyKey": "k",
        "traceparent": TRACE,
        "tracestate": "a=b",
        "history": [
            {
                "attempt": 1,
                "startedAt": moment,
                "endedAt": moment,
                "outcome": "succeeded",
                "worker": door.room.runtime.holder,
            }
        ],
        "log": [],
    }


async def test_a_run_that_failed_shows_why(door: Door) -> None:
    run = await door.run("fail", {})

    assert run["status"] == "failed"
    assert run["failure"] == {
        "code": "JOB_FAILED",
        "message": "no such user",
        "attempt": 1,
        "at": "2026-01-01T00:00:00.000Z",
        "data": {"userId": "u"},
    }


async def test_a_run_that_will_be_tried_again_shows_when_and_why(door: Door) -> None:
    run = await door.run("fail", {"payload": {"raise": True}})
    listed = (await door.get("/runs")).json()["runs"][0]

    assert (run["status"], run["attempt"], run["failure"]["message"]) == ("pending", 1, "OSError: no paper")
    assert run["dueAt"] > run["createdAt"]
    assert "raise OSError" in run["failure"]["traceback"]
    assert "traceback" not in listed["failure"]


async def test_a_body_may_be_left_out(door: Door) -> None:
    response = await door.client.post(f"{PREFIX}/jobs/fail/trigger")

    assert response.status_code == 202
    assert (await door.room.settled()).payload == b"{}"


async def test_the_header_names_the_idempotency_key_too(door: Door) -> None:
    first = await door.trigger(headers={"Idempotency-Key": '"k"'})
    again = await door.trigger(body={"payload": {"to": "me"}, "idempotencyKey": "k"})

    assert (again.json()["runId"], again.json()["duplicate"]) == (first.json()["runId"], True)


async def test_the_trace_may_come_in_headers(door: Door) -> None:
    assert (await door.run(headers={"traceparent": TRACE, "tracestate": "a=b"}))["traceparent"] == TRACE


async def test_a_trace_that_is_none_is_replaced(door: Door) -> None:
    run = await door.run(body={"payload": {"to": "me"}, "traceparent": "rubbish", "tracestate": "a=b"})

    assert run["traceparent"].startswith("00-")
    assert "tracestate" not in run


async def test_a_delayed_run_waits(door: Door) -> None:
    response = await door.trigger(body={"payload": {"to": "me"}, "delay": "5m"})
    run = (await door.get(f"/runs/{response.json()['runId']}")).json()

    assert (run["status"], run["dueAt"]) == ("pending", "2026-01-01T00:05:00.000Z")


async def test_a_delay_may_be_milliseconds(door: Door) -> None:
    response = await door.trigger(body={"payload": {"to": "me"}, "delay": 1500})

    assert (await door.get(f"/runs/{response.json()['runId']}")).json()["dueAt"] == "2026-01-01T00:00:01.500Z"


# --- Refusing --------------------------------------------------------------------------------------------------------


async def test_an_unknown_job_is_404_and_names_those_that_are_known(door: Door) -> None:
    body = refused(await door.trigger("print"), 404, "JOB_NOT_FOUND")

    assert "fail, send-mail" in body["message"]
    assert body["data"] == {"jobs": ["fail", "send-mail"]}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"payload": {"to": ""}}, "length >= 1"),
        ({"payload": {"to": 3}}, "Expected `str`"),
        ({"payload": {}}, "missing required field `to`"),
        ({}, "missing required field `to`"),
        ({"payload": None}, "missing required field `to`"),
        ({"payload": [1]}, "payload of job 'send-mail'"),
        ({"payload": {"to": "me"}, "idempotencykey": "k"}, "unknown field"),
        ({"payload": {"to": "me"}, "priority": 101}, "priority must be 0 to 100"),
        ({"payload": {"to": "me"}, "priority": "urgent"}, "or one of low, normal, high, critical, got 'urgent'"),
        ({"payload": {"to": "me"}, "delay": "soon"}, "suffix"),
        ({"payload": {"to": "me"}, "delay": -5}, "non-negative"),
        ({"payload": {"to": "me"}, "idempotencyKey": ""}, "is empty"),
        ([], "expected `object`"),
    ],
)
async def test_what_does_not_fit_is_422_and_nothing_is_enqueued(door: Door, body: Any, text: str) -> None:
    problem = refused(await door.trigger(body=body), 422, "VALIDATION_ERROR")

    assert text in problem["message"]
    assert not problem["retryable"]
    assert (await door.get("/runs")).json()["runs"] == []


async def test_the_field_of_a_payload_that_does_not_fit_is_named(door: Door) -> None:
    problem = refused(await door.trigger(body={"payload": {"to": ""}}), 422, "VALIDATION_ERROR")

    assert list(problem["data"]["fieldErrors"]) == ["payload.to"]


async def test_malformed_json_is_422_with_its_position(door: Door) -> None:
    response = await door.client.post(f"{PREFIX}/jobs/send-mail/trigger", content=b'{"payload": }')

    assert refused(response, 422, "VALIDATION_ERROR")["data"]["position"] == 12


async def test_a_key_that_comes_back_with_another_payload_is_refused(door: Door) -> None:
    await door.trigger(body={"payload": {"to": "me"}, "idempotencyKey": "k"})
    response = await door.trigger(body={"payload": {"to": "you"}, "idempotencyKey": "k"})

    refused(response, 422, "IDEMPOTENCY_KEY_REUSED")


async def test_a_large_payload_is_413(door: Door) -> None:
    refused(await door.trigger(body={"payload": {"to": "x" * 1001}}), 413, "PAYLOAD_TOO_LARGE")


async def test_a_large_body_is_413_before_it_is_read() -> None:
    async with open_room(send_mail) as room:
        async with serve(create_jobs_app(room.runtime, body_bytes_max=100)) as port:
            head = f"POST {PREFIX}/jobs/send-mail/trigger HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 101\r\n\r\n"
            status, body = await speak(port, head.encode(), is_ending=False)

        assert (status, json.loads(body)["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_another_content_type_is_415(door: Door) -> None:
    response = await door.client.post(
        f"{PREFIX}/jobs/send-mail/trigger", content=b"to=me", headers={"content-type": "text/plain"}
    )

    refused(response, 415, "UNSUPPORTED_MEDIA_TYPE")


async def test_a_store_that_is_away_is_503_and_to_be_tried_again(door: Door) -> None:
    door.room.store.trouble = "the disk is gone"
    triggered = await door.trigger()
    await door.room.clock.advance_through("1s")
    ready = await door.client.get("/health/ready")

    assert refused(triggered, 503, "BACKEND_UNAVAILABLE")["retryable"]
    assert triggered.headers["retry-after"] == "1"
    assert ready.status_code == 503
    assert ready.json()["checks"]["claimer"] == "the disk is gone"


# --- Looking ---------------------------------------------------------------------------------------------------------


async def test_jobs_are_listed_by_id_with_what_they_take(door: Door) -> None:
    listed = (await door.get("/jobs")).json()
    one = (await door.get("/jobs/send-mail")).json()

    assert [job["id"] for job in listed["jobs"]] == ["fail", "send-mail"]
    assert listed["total"] == 2
    assert listed["jobs"][1] == one
    assert (one["payloadType"], one["timeoutSeconds"], one["retry"]["maxAttempts"]) == ("Mail", 30, 5)
    assert "minLength" in json.dumps(one["payloadSchema"])


async def test_an_unknown_job_or_run_is_not_found(door: Door) -> None:
    refused(await door.get("/jobs/print"), 404, "JOB_NOT_FOUND")
    refused(await door.get("/runs/nothing"), 404, "JOB_RUN_NOT_FOUND")


async def test_runs_are_found_by_job_and_status_page_by_page(door: Door) -> None:
    for job in ("send-mail", "fail", "send-mail"):
        await door.run(job, {"payload": {"to": "me"}})
        door.room.clock.advance(1)

    async def ids(**params: Any) -> list[str]:
        return [run["jobId"] for run in (await door.get("/runs", **params)).json()["runs"]]

    first = (await door.get("/runs", limit=2)).json()
    second = (await door.get("/runs", limit=2, cursor=first["cursor"])).json()
    assert await ids() == ["send-mail", "fail", "send-mail"]
    assert await ids(jobId="fail") == ["fail"]
    assert await ids(status="succeeded") == ["send-mail", "send-mail"]
    assert await ids(status=["failed", "pending"]) == ["fail"]
    assert await ids(jobId="fail", status="succeeded") == []
    assert [len(first["runs"]), len(second["runs"]), second["cursor"]] == [2, 1, None]


@pytest.mark.parametrize("query", ["?status=done", "?limit=0", "?jobID=x", "?cursor=x"])
async def test_a_misspelt_filter_is_refused_and_not_ignored(door: Door, query: str) -> None:
    refused(await door.client.get(f"{PREFIX}/runs{query}"), 422, "VALIDATION_ERROR")


@pytest.mark.parametrize("prefix", ["", PREFIX])
async def test_a_running_service_is_healthy_live_and_ready(door: Door, prefix: str) -> None:
    health, live, ready = [await door.client.get(prefix + "/health" + name) for name in ("", "/live", "/ready")]

    assert [one.status_code for one in (health, live, ready)] == [200, 200, 200]
    roles = ("store", "lifeline", "scribe", "claimer", "replier", "pruner")
    assert health.json()["checks"] == dict.fromkeys(roles, "ok")
    assert (live.json(), ready.json()["ready"]) == ({"status": "ok"}, True)


async def test_a_runtime_that_is_not_started_is_not_ready_and_takes_triggers_all_the_same() -> None:
    async with open_door(is_started=False) as door:
        ready = await door.client.get("/health/ready")
        triggered = await door.trigger()
        await door.room.runtime.start()

        assert (ready.status_code, triggered.status_code) == (503, 202)
        assert (await door.room.settled()).status == "succeeded"


# --- Who may come in -------------------------------------------------------------------------------------------------


async def test_with_a_token_every_route_but_liveness_asks_for_it(guarded: Door) -> None:
    refused(await guarded.trigger(), 401, "UNAUTHORIZED")
    refused(await guarded.get("/runs"), 401, "UNAUTHORIZED")
    assert (await guarded.client.get("/health/live")).status_code == 200
    assert (await guarded.trigger(headers={"Authorization": "Bearer a token"})).status_code == 202


async def test_a_web_page_of_another_site_may_not_trigger(door: Door) -> None:
    refused(await door.trigger(headers={"Origin": "http://evil.example"}), 403, "FORBIDDEN")


async def test_on_loopback_a_foreign_host_name_is_refused() -> None:
    async with open_room(send_mail) as room, serve(create_jobs_app(room.runtime)) as port:
        status, body = await speak(port, b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")

        assert (status, json.loads(body)["code"]) == (403, "FORBIDDEN")


async def test_an_empty_token_is_refused() -> None:
    async with open_room(send_mail) as room:
        with pytest.raises(ConfigurationError):
            create_jobs_app(room.runtime, token=" ")


async def test_more_requests_than_the_rate_allows_are_429() -> None:
    async with open_door(requests_per_second=1) as door:
        statuses = [(await door.get("/jobs")).status_code for _ in range(4)]

        assert statuses == [200, 200, 429, 429]
        assert (await door.client.get("/health")).status_code == 200


# --- Documents -------------------------------------------------------------------------------------------------------


async def test_the_document_describes_the_trigger(door: Door) -> None:
    document = (await door.client.get("/api/openapi.json")).json()
    trigger = document["paths"][f"{PREFIX}/jobs/{{id}}/trigger"]["post"]

    assert document["openapi"] == "3.1.0"
    assert "202" in trigger["responses"]
    assert trigger["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("TriggerBody")
    assert {one["name"] for one in trigger["parameters"]} == {"id", "Idempotency-Key", "traceparent", "tracestate"}
    assert b"create-user-settings" in (await door.client.get("/api/docs")).content


async def test_the_answers_have_the_shapes_that_the_document_promises(door: Door) -> None:
    run = await door.run()
    for path, shape in (
        ("/jobs", shapes.JobList),
        ("/jobs/fail", shapes.JobView),
        ("/runs", shapes.RunList),
        (f"/runs/{run['runId']}", shapes.RunView),
        ("/health", shapes.JobsHealthView),
        ("/health/ready", ReadyView),
        ("/health/live", LiveView),
    ):
        msgspec.json.decode((await door.get(path)).content, type=shape)
    msgspec.json.decode((await door.trigger("nothing")).content, type=Problem)


@pytest.mark.parametrize("shape", list(EXAMPLES), ids=lambda shape: shape.__name__)
def test_the_examples_are_what_they_are_examples_of(shape: type) -> None:
    msgspec.json.decode(json.dumps(EXAMPLES[shape]), type=shape)
