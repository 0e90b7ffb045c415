"""The HTTP API of jobs as one ASGI application, on port 8091 by default.

    POST /api/v1/workers/jobs/{id}/trigger     202: the run is durable
    GET  /api/v1/workers/jobs[/{id}]           what is loaded
    GET  /api/v1/workers/runs[/{id}]           what was triggered, and what became of it
    GET  /api/v1/workers/runs/subscribe        the same, as it happens
    POST /api/v1/workers/runs/{id}/cancel      ends it
    POST /api/v1/workers/runs/{id}/redrive     begins it anew

202 and not 200, because the work is still to be done when the answer is sent; a client that looks for success takes
either.

The application uses a runtime; it neither starts nor stops it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import msgspec
from fastapi import Path, Query, Request, Response
from pydantic import BeforeValidator, Field
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from sagaloom.ids import check_key
from sagaloom.ports.jobs import JobPriority, JobReplyTo, JobRunStatus
from sagaloom.web.app import create_web_app
from sagaloom.web.bodies import BodyReader, JsonBody, body_of, idempotency_key_of, trace_of
from sagaloom.web.gate import Gate
from sagaloom.web.health import HealthRoutes, LiveView, ReadyView
from sagaloom.web.limits import RateLimit, StreamLimit
from sagaloom.web.openapi import ShapeBook, make_document
from sagaloom.web.routes import Limit, Route, RouteTable, Text, Texts, WebQuery, drop_blanks, json_response, wire_time
from sagaloom.workers import shapes
from sagaloom.workers.registry import ModuleTrouble
from sagaloom.workers.streaming import RunEventView, add_run_streaming

if TYPE_CHECKING:
    from sagaloom.workers.runtime import JobHealth, JobRuntime

__all__ = ["API_PREFIX", "EXAMPLES", "create_jobs_app"]

API_PREFIX: Final = "/api/v1/workers"
_LIVE_PATHS: Final = ("/health/live", f"{API_PREFIX}/health/live")
_UNLIMITED_PATHS: Final = tuple(
    f"{prefix}/health{which}" for prefix in ("", API_PREFIX) for which in ("", "/live", "/ready")
)
_ENVELOPE_BYTES: Final = 64 << 10
_SUMMARY: Final = "Background jobs over HTTP: trigger runs, and look at what became of them."
_TAGS: Final = ("jobs", "runs", "health")
_TRIGGER_HEADERS: Final = (
    ("Idempotency-Key", "The same as `idempotencyKey` in the body."),
    ("traceparent", "W3C trace context, when the body has none."),
    ("tracestate", "Goes with `traceparent`."),
)
_end_body = JsonBody(shapes.EndBody, example='send nothing, or a JSON object such as {"reason": "not needed"}')
_body = JsonBody(shapes.TriggerBody, example='send a JSON object such as {"payload": {"userId": "u-1"}}')

_RUN_EXAMPLE: Final[Mapping[str, Any]] = {
    "runId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f",
    "jobId": "create-user-settings",
    "status": "succeeded",
    "attempt": 1,
    "priority": 50,
    "payload": {"userId": "u-1"},
    "createdAt": "2026-01-31T12:00:00.000Z",
    "dueAt": "2026-01-31T12:00:00.000Z",
    "startedAt": "2026-01-31T12:00:00.004Z",
    "endedAt": "2026-01-31T12:00:00.021Z",
    "result": {"userId": "u-1", "settingsCreated": True},
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "history": [
        {
            "attempt": 1,
            "startedAt": "2026-01-31T12:00:00.004Z",
            "endedAt": "2026-01-31T12:00:00.021Z",
            "outcome": "succeeded",
            "worker": "jobs-4711-8f14e45f",
        }
    ],
    "log": [{"at": "2026-01-31T12:00:00.010Z", "level": "info", "text": "settings created"}],
}
_JOB_EXAMPLE: Final[Mapping[str, Any]] = {
    "id": "create-user-settings",
    "payloadType": "CreateUserSettings",
    "payloadSchema": {"type": "object", "properties": {"userId": {"type": "string", "minLength": 1}}},
    "retry": {
        "maxAttempts": 5,
        "initialIntervalMs": 1000,
        "maximumIntervalMs": 60000,
        "backoffCoefficient": 2.0,
    },
    "timeoutSeconds": 300.0,
    "runIn": "loop",
}
EXAMPLES: Final[Mapping[type, Any]] = {
    shapes.TriggerBody: {"payload": {"userId": "u-1"}, "idempotencyKey": "signup-7f3a"},
    shapes.TriggerAnswer: {
        "jobId": "create-user-settings",
        "runId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f",
        "triggered": True,
        "duplicate": False,
    },
    shapes.JobView: _JOB_EXAMPLE,
    shapes.JobList: {"jobs": [_JOB_EXAMPLE], "total": 1, "problems": []},
    shapes.EndBody: {"reason": "not needed"},
    RunEventView: {
        "type": "run:succeeded",
        "timestamp": "2026-01-31T12:00:00.021Z",
        "jobId": "create-user-settings",
        "runId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f",
        "attempt": 1,
    },
    shapes.RunView: _RUN_EXAMPLE,
    shapes.RunList: {"runs": [_RUN_EXAMPLE], "limit": 50, "cursor": None},
    shapes.JobsHealthView: {
        "status": "healthy",
        "timestamp": "2026-01-31T12:00:00.000Z",
        "version": "0.1.0",
        "checks": {"store": "ok", "claimer": "ok", "lifeline": "ok"},
        "running": 0,
        "concurrency": 16,
        "problems": [],
    },
    LiveView: {"status": "ok"},
    ReadyView: {"ready": True, "checks": {"store": "ok", "claimer": "ok", "lifeline": "ok"}},
}


class RunsQuery(WebQuery):
    limit: Limit = 50
    cursor: Annotated[Text, Field(description="The `cursor` of the page before.")] = None
    job_id: Texts = Field(default_factory=list[str], description="May be repeated, as may `status`.")
    status: Annotated[list[JobRunStatus], BeforeValidator(drop_blanks)] = Field(default_factory=list[JobRunStatus])


_JobId = Annotated[str, Path(alias="id", max_length=200)]
_RunId = Annotated[str, Path(alias="id", max_length=200)]


def create_jobs_app(
    runtime: JobRuntime,
    *,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
    body_bytes_max: int | None = None,
    body_seconds_max: float = 30.0,
    requests_per_second: float | None = None,
    problems: Sequence[ModuleTrouble] = (),
    streams_max: int = 1000,
    streams_per_client_max: int = 100,
    heartbeat_seconds: float = 15.0,
) -> ASGIApp:
    """The HTTP API of `runtime`. `problems` are the modules that could not be loaded: health and the list of jobs say
    so.

    With a `token` every route but `/health/live` asks for `Authorization: Bearer <token>`. Without one, connections
    over loopback must name a loopback host or one of `allowed_hosts`, and browsers may not trigger from other sites.

    A body is at most `body_bytes_max` long (the payload limit and 64 KiB for the rest, unless given) and must arrive
    within `body_seconds_max`. More than `requests_per_second` from one address, after a burst of two seconds' worth,
    are 429; health is not counted. Raises `ConfigurationError` for an empty token or a rate that is none.
    """
    if body_bytes_max is None:
        body_bytes_max = runtime.options.payload_bytes_max + _ENVELOPE_BYTES
    rate_limit = None if requests_per_second is None else RateLimit(requests_per_second, open_paths=_UNLIMITED_PATHS)
    gate = Gate(token, allowed_hosts=allowed_hosts, open_paths=_LIVE_PATHS, rate_limit=rate_limit)
    reader = BodyReader(body_bytes_max=body_bytes_max, body_seconds_max=body_seconds_max)

    shown = [shapes.ModuleProblem(module=one.module, problem=one.error.message) for one in problems]

    def add_routes(table: RouteTable) -> None:
        _health_routes(runtime, shown).add_to(table, API_PREFIX)
        _add_jobs(table, runtime, reader, shown)
        limit = StreamLimit(streams_max, per_client_max=streams_per_client_max)
        add_run_streaming(table, runtime.feed, limit=limit, heartbeat_seconds=heartbeat_seconds)
        _add_runs(table, runtime, reader)

    def document(routes: list[BaseRoute], answers: list[Route]) -> dict[str, Any]:
        needs_token = token is not None
        shown = {route.answer for route in answers} | {route.body for route in answers if route.body is not None}
        book = ShapeBook(shown, EXAMPLES, needs_token=needs_token)
        return make_document(routes, answers, book, summary=_SUMMARY, tags=_TAGS, needs_token=needs_token)

    return create_web_app(gate, add_routes, document=document)


def _health_routes(runtime: JobRuntime, problems: Sequence[shapes.ModuleProblem]) -> HealthRoutes[JobHealth]:
    def view(health: JobHealth) -> shapes.JobsHealthView:
        return shapes.JobsHealthView(
            status="healthy" if health.ready else "unhealthy",
            timestamp=wire_time(runtime.clock.now()),
            version=version("sagaloom"),
            checks=health.checks,
            running=health.running,
            concurrency=health.concurrency,
            problems=problems,
        )

    return HealthRoutes(runtime.health, view, shape=shapes.JobsHealthView)


def _add_jobs(
    table: RouteTable, runtime: JobRuntime, reader: BodyReader, problems: Sequence[shapes.ModuleProblem]
) -> None:
    trigger_route = table.add(
        "POST",
        f"{API_PREFIX}/jobs/{{id}}/trigger",
        answer=shapes.TriggerAnswer,
        tag="jobs",
        errors=(404, 408, 413, 415, 422, 503),
        status=202,
        body=shapes.TriggerBody,
        headers=_TRIGGER_HEADERS,
    )
    # NetScript's other word: what `trigger_task` asks for. Here a task is a job.
    task_route = table.add(
        "POST",
        f"{API_PREFIX}/tasks/{{id}}/trigger",
        answer=shapes.TriggerAnswer,
        tag="jobs",
        status=202,
        body=shapes.TriggerBody,
        is_documented=False,
    )

    @task_route
    @trigger_route
    async def _trigger_job(job_id: _JobId, request: Request) -> Response:
        """Enqueues a run of a job. The answer comes once it is durable: it survives a crash and power loss from then
        on. Repeat it with the same `idempotencyKey` when no answer came."""
        headers: dict[bytes, bytes] = dict(request.scope["headers"])
        content = await reader.read(request.receive, headers)
        if content is None:
            return Response(status_code=400)  # Nobody is there to read it.
        wanted = _body.decode(content) if content.strip() else shapes.TriggerBody()
        traceparent, tracestate = trace_of(headers, wanted.traceparent, wanted.tracestate)
        receipt = await runtime.trigger(
            job_id,
            None if isinstance(wanted.payload, msgspec.UnsetType) or _is_null(wanted.payload) else wanted.payload,
            priority=cast("JobPriority | int | None", wanted.priority),  # any other text is refused there
            delay=wanted.delay,
            correlation_id=wanted.correlation_id,
            idempotency_key=idempotency_key_of(headers, wanted.idempotency_key),
            traceparent=traceparent,
            tracestate=tracestate,
            reply_to=None if wanted.reply_to is None else _asker(wanted.reply_to),
        )
        return json_response(
            shapes.TriggerAnswer(
                job_id=receipt.job_id, run_id=receipt.run_id, triggered=True, duplicate=receipt.duplicate
            ),
            202,
        )

    @table.add("GET", f"{API_PREFIX}/jobs", answer=shapes.JobList, tag="jobs")
    async def _list_jobs() -> Response:
        """The loaded jobs, by id, and what could not be loaded."""
        ticks = await runtime.next_ticks()
        views = [shapes.job_view(job, ticks.get(job.id)) for job in sorted(runtime.jobs, key=lambda job: job.id)]
        return json_response(shapes.JobList(jobs=views, total=len(views), problems=problems))

    @table.add("GET", f"{API_PREFIX}/jobs/{{id}}", answer=shapes.JobView, tag="jobs", errors=(404,))
    async def _get_job(job_id: _JobId) -> Response:
        """One loaded job: its payload, retries, deadline and schedule."""
        job = runtime.jobs[job_id]
        return json_response(shapes.job_view(job, (await runtime.next_ticks()).get(job_id)))


def _add_runs(table: RouteTable, runtime: JobRuntime, reader: BodyReader) -> None:
    @table.add("GET", f"{API_PREFIX}/runs", answer=shapes.RunList, tag="runs", errors=(422, 503))
    async def _list_runs(query: Annotated[RunsQuery, Query()]) -> Response:
        """Runs of all jobs, newest first."""
        found, cursor = await runtime.list_runs(
            job_ids=query.job_id, statuses=query.status, cursor=query.cursor, limit=query.limit
        )
        views = [shapes.run_view(run, is_whole=False) for run in found]
        return json_response(shapes.RunList(runs=views, limit=query.limit, cursor=cursor))

    @table.add("GET", f"{API_PREFIX}/runs/{{id}}", answer=shapes.RunView, tag="runs", errors=(404, 503))
    async def _get_run(run_id: _RunId) -> Response:
        """One run: what it was given, every attempt, its log, and what became of it."""
        return json_response(shapes.run_view(await runtime.get_run(run_id), is_whole=True))

    @table.add(
        "POST",
        f"{API_PREFIX}/runs/{{id}}/cancel",
        answer=shapes.RunView,
        tag="runs",
        errors=(404, 408, 413, 415, 422, 503),
        body=shapes.EndBody,
    )
    async def _cancel_run(run_id: _RunId, request: Request) -> Response:
        """Ends a run: one that waits at once; one that is under way is asked to end, and is `running` until it has. One
        that is over is left as it is. Answers with the run."""
        wanted = await body_of(request, reader, _end_body)
        return json_response(shapes.run_view(await runtime.cancel(run_id, reason=wanted.reason), is_whole=True))

    @table.add(
        "POST", f"{API_PREFIX}/runs/{{id}}/redrive", answer=shapes.RunView, tag="runs", errors=(404, 409, 422, 503)
    )
    async def _redrive_run(run_id: _RunId) -> Response:
        """Lets a run that failed or was cancelled begin anew, with a fresh count of attempts; sends a refused reply of
        one that succeeded again. Answers with the run."""
        return json_response(shapes.run_view(await runtime.redrive(run_id), is_whole=True))


def _asker(wanted: shapes.ReplyToBody) -> JobReplyTo:
    return JobReplyTo(
        wanted.saga_id,
        check_key(wanted.correlation_key, what="replyTo.correlationKey"),
        wanted.run,
        wanted.effect_key,
        wanted.hops,
    )


def _is_null(payload: msgspec.Raw) -> bool:
    return memoryview(payload).nbytes == 4 and bytes(payload) == b"null"
