"""The HTTP API of sagas as one ASGI application.

The application uses a runtime; it neither starts nor stops it. Before the runtime is started, and after it is stopped,
the application answers all the same: publishing is refused as retryable, and readiness says no.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from sagaloom.service.addressing import API_PREFIX
from sagaloom.service.batching import PublishBatchRoute
from sagaloom.service.metrics import METRICS_PATH, add_metrics
from sagaloom.service.openapi import openapi_document
from sagaloom.service.operating import add_operating
from sagaloom.service.publishing import PublishRoute
from sagaloom.service.reading import add_health, add_reading
from sagaloom.service.replying import add_replying
from sagaloom.service.talking import add_talking
from sagaloom.service.timing import add_timing
from sagaloom.web.app import create_web_app
from sagaloom.web.bodies import BodyReader
from sagaloom.web.feed import add_streaming
from sagaloom.web.gate import Gate
from sagaloom.web.limits import RateLimit, StreamLimit
from sagaloom.web.routes import Route, RouteTable

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["create_app"]

_PUBLISH_PATH: Final = f"{API_PREFIX}/publish"
_BATCH_PATH: Final = f"{API_PREFIX}/publish/batch"
_LIVE_PATHS: Final = ("/health/live", f"{API_PREFIX}/health/live")
_UNLIMITED_PATHS: Final = (
    METRICS_PATH,
    *(f"{prefix}/health{which}" for prefix in ("", API_PREFIX) for which in ("", "/live", "/ready")),
)
_ENVELOPE_BYTES: Final = 64 << 10
_BATCH_BODIES: Final = 8


def create_app(
    runtime: SagaRuntime,
    *,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
    body_bytes_max: int | None = None,
    body_seconds_max: float = 30.0,
    requests_per_second: float | None = None,
    streams_max: int = 1_000,
    streams_per_client_max: int | None = None,
    heartbeat_seconds: float = 15.0,
    write_seconds_max: float = 30.0,
) -> ASGIApp:
    """The HTTP API of `runtime`.

    With a `token` every route but `/health/live` asks for `Authorization: Bearer <token>`. Without one, connections
    over loopback must name a loopback host or one of `allowed_hosts`, and browsers may not publish from other sites.

    A body is at most `body_bytes_max` long (the runtime's payload limit and 64 KiB for the rest of the message, unless
    given), that of a batch eight times as long, and must arrive within `body_seconds_max`. More than
    `requests_per_second` from one address, after a burst of two seconds' worth, are 429; health and metrics are not
    counted. Raises `ConfigurationError` for an empty token or a rate that is none.

    At most `streams_max` event streams are open at once, and `streams_per_client_max` of one address (behind a proxy
    that is everybody's, so there is no such limit unless given). A quiet one says so every `heartbeat_seconds`; a
    reader who takes nothing for `write_seconds_max` is dropped.
    """
    if body_bytes_max is None:
        body_bytes_max = runtime.options.limits.payload_bytes_max + _ENVELOPE_BYTES
    rate_limit = None if requests_per_second is None else RateLimit(requests_per_second, open_paths=_UNLIMITED_PATHS)
    gate = Gate(token, allowed_hosts=allowed_hosts, open_paths=_LIVE_PATHS, rate_limit=rate_limit)
    publish = PublishRoute(runtime, body_bytes_max=body_bytes_max, body_seconds_max=body_seconds_max)
    batch = PublishBatchRoute(runtime, body_bytes_max=_BATCH_BODIES * body_bytes_max, body_seconds_max=body_seconds_max)
    reader = BodyReader(body_bytes_max=body_bytes_max, body_seconds_max=body_seconds_max)
    streams = StreamLimit(streams_max, per_client_max=streams_per_client_max or streams_max)

    def add_routes(table: RouteTable) -> None:
        add_health(table, runtime)
        add_metrics(table, runtime)
        add_talking(table, runtime, reader)
        add_reading(table, runtime)
        add_operating(table, runtime, reader)
        add_replying(table, runtime, reader)
        add_timing(table, runtime, reader)
        add_streaming(
            table,
            runtime,
            f"{API_PREFIX}/subscribe",
            limit=streams,
            heartbeat_seconds=heartbeat_seconds,
            write_seconds_max=write_seconds_max,
        )

    def document(routes: list[BaseRoute], answers: list[Route]) -> dict[str, Any]:
        return openapi_document(routes, answers, needs_token=token is not None)

    return create_web_app(gate, add_routes, document=document, hot_posts={_PUBLISH_PATH: publish, _BATCH_PATH: batch})
