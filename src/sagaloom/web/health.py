"""`/health`, `/health/live` and `/health/ready`, at the root and under a door's own prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar

from fastapi import Response
from msgspec import Struct

from sagaloom.web.routes import RouteTable, json_response

__all__ = ["Health", "HealthRoutes", "LiveView", "ReadyView"]


class Health(Protocol):
    """Whether a door does its work. `checks` has `ok` or a reason for each part."""

    @property
    def ready(self) -> bool: ...

    @property
    def checks(self) -> Mapping[str, str]: ...


class LiveView(Struct, frozen=True, kw_only=True, rename="camel"):
    """The process answers."""

    status: Literal["ok"]


class ReadyView(Struct, frozen=True, kw_only=True, rename="camel"):
    """Whether messages are taken and work is done."""

    ready: bool
    checks: Mapping[str, str]


H = TypeVar("H", bound=Health)


class HealthRoutes(Generic[H]):
    """The health routes of one door: `health` is asked at each request, `view` is what `/health` shows of it."""

    def __init__(self, health: Callable[[], H], view: Callable[[H], Struct], *, shape: type[Struct]) -> None:
        self._health = health
        self._view = view
        self._shape = shape

    def add_to(self, table: RouteTable, prefix: str) -> None:
        """Serves the routes at the root, and once more, without a word in the documentation, under `prefix`."""
        self._add_under("", table)
        self._add_under(prefix, table)

    def _add_under(self, prefix: str, table: RouteTable) -> None:
        add = partial(table.add, "GET", tag="health", is_documented=not prefix)

        @add(f"{prefix}/health", answer=self._shape, refused_with_answer=503)
        async def _get_health() -> Response:
            """How the service is, with its checks and what waits. 503 when it is not ready."""
            health = self._health()
            return json_response(self._view(health), 200 if health.ready else 503)

        @add(f"{prefix}/health/live", answer=LiveView)
        async def _get_liveness() -> Response:
            """That the process answers. Needs no token."""
            return json_response(LiveView(status="ok"))

        @add(f"{prefix}/health/ready", answer=ReadyView, refused_with_answer=503)
        async def _get_readiness() -> Response:
            """Whether messages are taken and work is done. 503 when not."""
            health = self._health()
            view = ReadyView(ready=health.ready, checks=health.checks)
            return json_response(view, 200 if health.ready else 503)
