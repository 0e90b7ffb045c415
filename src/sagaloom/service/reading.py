"""The routes people and programs look through: health, sagas, instances, history, dead letters.

They are FastAPI routes for the sake of their parameters, which it checks and describes. Answers are encoded by msgspec.

A correlation key may hold `/`, percent-encoded or not, so the routes of an instance are matched on the raw path:
`/instances/orders/a%2Fhistory` is the instance `a/history`, `/instances/orders/a/history` is the history of `a`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import quote, unquote_to_bytes

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from starlette.routing import Match
from starlette.types import Scope

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.errors import DeadLetterNotFound, InstanceNotFound, MessageRejected, SagaNotFound
from sagaloom.ids import check_key
from sagaloom.ports.store import InstanceFilter
from sagaloom.service import shapes

if TYPE_CHECKING:
    from sagaloom.engine.records import Instance
    from sagaloom.runtime import SagaRuntime

__all__ = ["API_PREFIX", "Route", "RouteTable", "add_health", "add_reading", "json_response"]

API_PREFIX: Final = "/api/v1/sagas"
_OFFSET_MAX: Final = 10_000

F = TypeVar("F", bound=Callable[..., Any])


class Route(NamedTuple):
    """What the OpenAPI document says of a route beside its parameters."""

    method: str
    path: str
    answer: type
    errors: tuple[int, ...]
    status: int = 200
    refused_with_answer: int | None = None
    """A status of failure that comes with the shape of the answer, not with that of an error."""


class RouteTable:
    """Adds routes to `router` and remembers what they answer."""

    def __init__(self, router: APIRouter) -> None:
        self._router = router
        self.routes: list[Route] = []

    def add(
        self,
        method: Literal["GET", "POST"],
        path: str,
        *,
        answer: type,
        tag: str,
        errors: tuple[int, ...] = (),
        refused_with_answer: int | None = None,
        is_documented: bool = True,
        route_class: type[APIRoute] = APIRoute,
    ) -> Callable[[F], F]:
        """Serves `path` by the decorated coroutine."""

        def decorate(endpoint: F) -> F:
            name = endpoint.__name__.lstrip("_")
            self._router.add_api_route(
                path,
                endpoint,
                methods=[method],
                tags=[tag],
                response_class=Response,
                response_model=None,
                operation_id=to_camel(name),
                summary=name.replace("_", " ").capitalize(),
                include_in_schema=is_documented,
                route_class_override=route_class,
            )
            if is_documented:
                shown = path.replace(":path}", "}")
                self.routes.append(Route(method, shown, answer, errors, refused_with_answer=refused_with_answer))
            return endpoint

        return decorate


# --- Parameters ------------------------------------------------------------------------------------------------------


def _drop_blank(value: object) -> object:
    """An empty parameter, as forms send it, is one that was not given."""
    return None if value == "" else value


def _drop_blanks(values: list[str]) -> list[str]:
    return [one for one in values if one]


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("it is outside of the years 1 to 9999 in UTC") from None


_Limit = Annotated[int, Field(ge=1, le=1000)]
_Offset = Annotated[int, Field(ge=0, le=_OFFSET_MAX, description="For small steps; follow `cursor` for long ones.")]
_Text = Annotated[str | None, BeforeValidator(_drop_blank)]
_Texts = Annotated[list[str], BeforeValidator(_drop_blanks)]
_Statuses = Annotated[list[SagaInstanceStatus], BeforeValidator(_drop_blanks)]
_Time = Annotated[Annotated[AwareDatetime, AfterValidator(_in_utc)] | None, BeforeValidator(_drop_blank)]
_DeadLetterId = Annotated[str, Path(alias="id", max_length=200)]
_Run = Annotated[int | None, Field(ge=1, description="Which run; the newest one when left out.")]


class _Query(BaseModel):
    # A misspelt filter that is quietly ignored answers with everything, which looks like a result.
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=False)


class SagasQuery(_Query):
    limit: _Limit = 50
    offset: _Offset = 0
    topic: _Text = None
    enabled: bool | None = None
    tags: _Texts = []


class InstancesQuery(_Query):
    limit: _Limit = 50
    offset: _Offset = 0
    cursor: Annotated[_Text, Field(description="The `cursor` of the page before; `offset` counts from there.")] = None
    saga_name: Annotated[_Texts, Field(description="May be repeated, as may `sagaId` and `status`.")] = []
    saga_id: Annotated[_Texts, Field(description="Another spelling of `sagaName`.")] = []
    status: _Statuses = []
    topic: _Text = None
    q: Annotated[str, Field(description="What the correlation key begins with.")] = ""
    created_after: _Time = None
    created_before: _Time = None


class InstanceQuery(_Query):
    run: _Run = None


class HistoryQuery(_Query):
    run: _Run = None
    limit: _Limit = 50
    offset: Annotated[int, Field(ge=0, description="How many entries to skip.")] = 0
    after: Annotated[int, Field(ge=0, description="Continue behind this `entryNo`.")] = 0


class DeadLettersQuery(_Query):
    limit: _Limit = 50
    cursor: _Text = None
    saga_name: _Text = None
    saga_id: Annotated[_Text, Field(description="Another spelling of `sagaName`.")] = None
    correlation_id: _Text = None
    correlation_key: Annotated[_Text, Field(description="Another spelling of `correlationId`.")] = None


class _Address(NamedTuple):
    saga_id: str
    key: str


async def _address(
    saga_name: Annotated[str, Path(alias="sagaName")],
    correlation_id: Annotated[
        str,
        Path(
            alias="correlationId",
            description="The correlation key. It may hold `/`; one that ends in `/history` is sent with `%2F`.",
        ),
    ],
) -> _Address:
    try:
        saga_id, key = unquote_to_bytes(saga_name).decode(), unquote_to_bytes(correlation_id).decode()
    except UnicodeDecodeError:
        raise MessageRejected(
            f"the path {saga_name!r:.80}/{correlation_id!r:.80} is not UTF-8 once decoded: percent-encode UTF-8 bytes"
        ) from None
    return _Address(saga_id, check_key(key))


class _InstanceRoute(APIRoute):
    """Matches on the raw path, and leaves its parameters percent-encoded for `_address`."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http":
            return Match.NONE, {}
        raw_path: bytes | None = scope.get("raw_path")
        root_path: str = scope.get("root_path", "")
        whole = raw_path.decode("latin-1") if raw_path is not None else quote(scope["path"])
        path = whole.removeprefix(quote(root_path)) if root_path else whole
        match, child = super().matches({**scope, "path": path, "root_path": ""})
        if match is Match.PARTIAL and scope["method"] == "POST":
            # Commands to an instance are routes of their own; one that is not served is not found.
            return Match.NONE, {}
        return match, child


# --- Routes ----------------------------------------------------------------------------------------------------------


def json_response(content: object, status: int = 200) -> Response:
    """`content` as JSON."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def add_health(table: RouteTable, runtime: SagaRuntime) -> None:
    """`/health`, `/health/live` and `/health/ready`, at the root and under the prefix."""
    _add_health_under("", table, runtime)
    _add_health_under(API_PREFIX, table, runtime)


def _add_health_under(prefix: str, table: RouteTable, runtime: SagaRuntime) -> None:
    add = partial(table.add, "GET", tag="health", is_documented=not prefix)

    @add(f"{prefix}/health", answer=shapes.HealthView, refused_with_answer=503)
    async def _get_health() -> Response:
        """How the service is, with its checks and what waits. 503 when it is not ready."""
        health = runtime.health()
        are_ok = all(check == "ok" for check in health.checks.values())
        view = shapes.HealthView(
            status=("healthy" if are_ok else "degraded") if health.ready else "unhealthy",
            timestamp=shapes.wire_time(runtime.clock.now()),
            version=version("sagaloom"),
            checks=health.checks,
            backlog=health.backlog,
            outbox=health.outbox,
            stalled_lanes=health.stalled_lanes,
            oldest_waiting_seconds=health.oldest_waiting_seconds,
        )
        return json_response(view, 200 if health.ready else 503)

    @add(f"{prefix}/health/live", answer=shapes.LiveView)
    async def _get_liveness() -> Response:
        """That the process answers. Needs no token."""
        return json_response(shapes.LiveView(status="ok"))

    @add(f"{prefix}/health/ready", answer=shapes.ReadyView, refused_with_answer=503)
    async def _get_readiness() -> Response:
        """Whether messages are taken and applied. 503 when not."""
        health = runtime.health()
        return json_response(shapes.ReadyView(ready=health.ready, checks=health.checks), 200 if health.ready else 503)


def add_reading(table: RouteTable, runtime: SagaRuntime) -> None:
    """Everything under the prefix but the health and publish routes."""
    _add_sagas(table, runtime)
    _add_instances(table, runtime)
    _add_one_instance(table, runtime)
    _add_dead_letters(table, runtime)


def _add_sagas(table: RouteTable, runtime: SagaRuntime) -> None:
    @table.add("GET", f"{API_PREFIX}/describe", answer=shapes.Description, tag="sagas")
    async def _describe_service() -> Response:
        """What this service is, with every loaded saga."""
        store = runtime.store
        return json_response(
            {
                "pluginName": "sagaloom",
                "version": version("sagaloom"),
                "contractVersions": ["v1"],
                "routeGroups": ["sagas", "instances", "history", "publish", "dead-letters"],
                "capabilities": ["saga-orchestration", "message-publishing", "instance-tracking", "dead-letters"],
                "store": shapes.StoreView(id=store.id, store_id=store.store_id, tiers=sorted(store.tiers)),
                "sagas": _saga_views(runtime),
            }
        )

    @table.add("GET", f"{API_PREFIX}/sagas", answer=shapes.SagaList, tag="sagas", errors=(422,))
    async def _list_sagas(query: Annotated[SagasQuery, Query()]) -> Response:
        """The loaded sagas, by id."""
        wanted = [
            view
            for view in _saga_views(runtime)
            if query.topic in (None, view["topic"])
            and query.enabled in (None, view["enabled"])
            and set(query.tags) <= set(view["tags"])
        ]
        page = wanted[query.offset : query.offset + query.limit]
        return json_response({"sagas": page, "total": len(wanted), "limit": query.limit, "offset": query.offset})

    @table.add("GET", f"{API_PREFIX}/sagas/{{id}}", answer=shapes.SagaView, tag="sagas", errors=(404,))
    async def _get_saga(saga_id: Annotated[str, Path(alias="id")]) -> Response:
        """One loaded saga: types, schemas, policies, graph."""
        definition = runtime.definitions.get(saga_id)
        if definition is None:
            raise SagaNotFound(f"no saga {saga_id!r:.80} is loaded here: GET {API_PREFIX}/sagas lists those that are")
        return json_response(shapes.saga_view(definition))


def _add_instances(table: RouteTable, runtime: SagaRuntime) -> None:
    @table.add("GET", f"{API_PREFIX}/instances", answer=shapes.InstanceList, tag="instances", errors=(422, 503))
    async def _list_instances(query: Annotated[InstancesQuery, Query()]) -> Response:
        """Runs of all sagas, newest first."""
        wanted = _filter_of(query, runtime)
        if wanted is None:
            found: Sequence[Instance] = ()
            cursor, total = None, 0
        else:
            found, cursor = await runtime.list_instances(
                wanted, limit=query.limit, offset=query.offset, cursor=query.cursor
            )
            total = await runtime.store.count_instances(wanted)
        return json_response(
            shapes.InstanceList(
                instances=[shapes.instance_view(one) for one in found],
                total=total,
                limit=query.limit,
                offset=query.offset,
                cursor=cursor,
            )
        )


def _add_one_instance(table: RouteTable, runtime: SagaRuntime) -> None:
    # The history comes first: routes are asked in the order in which they were added.
    async def find(address: _Address, run: int | None) -> Instance:
        instance = await runtime.get_instance(address.saga_id, address.key, run=run)
        if instance is None:
            which = "" if run is None else f" run {run} of"
            raise InstanceNotFound(
                f"there is no{which} instance {address.key!r:.80} of saga {address.saga_id!r:.80}: "
                f"GET {API_PREFIX}/instances?sagaName= lists those there are"
            )
        return instance

    @table.add(
        "GET",
        f"{API_PREFIX}/instances/{{sagaName}}/{{correlationId:path}}/history",
        answer=shapes.HistoryList,
        tag="instances",
        errors=(404, 422, 503),
        route_class=_InstanceRoute,
    )
    async def _get_history(
        address: Annotated[_Address, Depends(_address)], query: Annotated[HistoryQuery, Query()]
    ) -> Response:
        """What each message did to one run, oldest first."""
        instance = await find(address, query.run)
        after = max(query.after, query.offset)
        entries = (
            await runtime.history(address.saga_id, address.key, run=instance.run, after_entry=after, limit=query.limit)
            if instance.run
            else []
        )
        is_last = not entries or entries[-1].entry_no >= instance.entries
        return json_response(
            shapes.HistoryList(
                history=[shapes.history_entry_view(instance, entry) for entry in entries],
                total=instance.entries,
                limit=query.limit,
                cursor=None if is_last else entries[-1].entry_no,
            )
        )

    @table.add(
        "GET",
        f"{API_PREFIX}/instances/{{sagaName}}/{{correlationId:path}}",
        answer=shapes.InstanceView,
        tag="instances",
        errors=(404, 422, 503),
        route_class=_InstanceRoute,
    )
    async def _get_instance(
        address: Annotated[_Address, Depends(_address)], query: Annotated[InstanceQuery, Query()]
    ) -> Response:
        """One run: its state, status and revision."""
        return json_response(shapes.instance_view(await find(address, query.run)))


def _add_dead_letters(table: RouteTable, runtime: SagaRuntime) -> None:
    @table.add("GET", f"{API_PREFIX}/dead-letters", answer=shapes.DeadLetterList, tag="dead letters", errors=(422, 503))
    async def _list_dead_letters(query: Annotated[DeadLettersQuery, Query()]) -> Response:
        """Messages and effects that were given up, newest first."""
        saga_id = _one_of("sagaName", query.saga_name, "sagaId", query.saga_id)
        key = _one_of("correlationId", query.correlation_id, "correlationKey", query.correlation_key)
        found = await runtime.dead_letters(saga_id=saga_id, key=key, after=query.cursor, limit=query.limit)
        return json_response(
            shapes.DeadLetterList(
                dead_letters=[shapes.dead_letter_view(one, with_content=False) for one in found],
                limit=query.limit,
                cursor=found[-1].id if len(found) == query.limit else None,
            )
        )

    @table.add(
        "GET", f"{API_PREFIX}/dead-letters/{{id}}", answer=shapes.DeadLetterView, tag="dead letters", errors=(404, 503)
    )
    async def _get_dead_letter(letter_id: _DeadLetterId) -> Response:
        """One dead letter, with its payload and traceback."""
        letter = await runtime.store.dead_letter(letter_id)
        if letter is None:
            raise DeadLetterNotFound(
                f"there is no dead letter {letter_id!r:.80}: it was redriven or discarded, or never was"
            )
        return json_response(shapes.dead_letter_view(letter, with_content=True))

    @table.add(
        "POST",
        f"{API_PREFIX}/dead-letters/{{id}}/redrive",
        answer=shapes.DeadLetterView,
        tag="dead letters",
        errors=(404, 409, 503),
    )
    async def _redrive_dead_letter(letter_id: _DeadLetterId) -> Response:
        """Tries again: a message enters anew, an effect leaves and its lane goes on. Answers with what was redriven."""
        return json_response(shapes.dead_letter_view(await runtime.redrive(letter_id), with_content=True))

    @table.add(
        "POST",
        f"{API_PREFIX}/dead-letters/{{id}}/discard",
        answer=shapes.DeadLetterView,
        tag="dead letters",
        errors=(404, 409, 503),
    )
    async def _discard_dead_letter(letter_id: _DeadLetterId) -> Response:
        """Gives it up for good: a message's idempotency key is free again, an effect's lane goes on without it.
        Answers with what was discarded."""
        return json_response(shapes.dead_letter_view(await runtime.discard(letter_id), with_content=True))


def _saga_views(runtime: SagaRuntime) -> list[dict[str, Any]]:
    return [shapes.saga_view(one) for one in sorted(runtime.definitions, key=lambda one: one.id)]


def _filter_of(query: InstancesQuery, runtime: SagaRuntime) -> InstanceFilter | None:
    """What the store is asked for; None when nothing can match."""
    choices: list[set[str]] = [set(names) for names in (query.saga_name, query.saga_id) if names]
    if query.topic is not None:
        choices.append({view["id"] for view in _saga_views(runtime) if view["topic"] == query.topic})
    sagas = set[str].intersection(*choices) if choices else set[str]()
    if choices and not sagas:
        return None
    return InstanceFilter(
        saga_ids=tuple(sorted(sagas)),
        statuses=tuple(query.status),
        key_prefix=query.q,
        created_after=query.created_after,
        created_before=query.created_before,
    )


def _one_of(name: str, value: str | None, other_name: str, other: str | None) -> str | None:
    if value is not None and other is not None and value != other:
        raise MessageRejected(
            f"{name} {value!r:.80} and {other_name} {other!r:.80} are two spellings of one thing, but they differ: "
            "send one of them"
        )
    return value if value is not None else other
