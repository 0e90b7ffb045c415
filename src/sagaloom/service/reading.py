"""The routes people and programs look through: health, sagas, instances, history, dead letters.

They are FastAPI routes for the sake of their parameters, which it checks and describes. Answers are encoded by msgspec.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import Depends, Path, Query, Response
from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import ChildStatus
from sagaloom.errors import DeadLetterNotFound, MessageRejected, SagaNotFound
from sagaloom.ports.store import InstanceFilter
from sagaloom.service import shapes
from sagaloom.service.addressing import (
    API_PREFIX,
    INSTANCE_PATH,
    InstanceAddress,
    InstanceQuery,
    InstanceRoute,
    RunNumber,
    address_of_instance,
    no_instance,
    one_of_two,
)
from sagaloom.web.bodies import invalid
from sagaloom.web.health import HealthRoutes
from sagaloom.web.routes import (
    Limit,
    RouteTable,
    Text,
    Texts,
    WebQuery,
    drop_blank,
    drop_blanks,
    json_response,
    wire_time,
)

if TYPE_CHECKING:
    from sagaloom.engine.records import Instance
    from sagaloom.runtime import SagaRuntime
    from sagaloom.runtime.runtime import RuntimeHealth

__all__ = ["add_health", "add_reading"]

_OFFSET_MAX: Final = 10_000
_COUNTED_MAX: Final = 10_000
_NUMBER: Final = re.compile(r"[0-9.eE+\-_ ]+")
_CHILD_CURSOR: Final = re.compile(r"([0-9]{1,15})-([0-9]{1,15})")
_DEAD_LETTER_CURSOR: Final = re.compile(r"dl[0-9a-f]{1,60}")


# --- Parameters ------------------------------------------------------------------------------------------------------


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("it is outside of the years 1 to 9999 in UTC") from None


def _no_number(value: object) -> object:
    """Lets a text through that may be a moment; a number would be read as seconds since 1970, which is a mistake."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        raise ValueError("write it as in 2026-01-31T12:00:00Z")
    return drop_blank(value)


_Offset = Annotated[int, Field(ge=0, le=_OFFSET_MAX, description="For small steps; follow `cursor` for long ones.")]
_Statuses = Annotated[list[SagaInstanceStatus], BeforeValidator(drop_blanks)]
_Time = Annotated[Annotated[AwareDatetime, AfterValidator(_in_utc)] | None, BeforeValidator(_no_number)]
_DeadLetterId = Annotated[str, Path(alias="id", max_length=200)]


class SagasQuery(WebQuery):
    limit: Limit = 50
    offset: _Offset = 0
    topic: Text = None
    enabled: bool | None = None
    tags: Texts = Field(default_factory=list)


class InstancesQuery(WebQuery):
    limit: Limit = 50
    offset: _Offset = 0
    cursor: Annotated[Text, Field(description="The `cursor` of the page before; `offset` counts from there.")] = None
    saga_name: Texts = Field(default_factory=list, description="May be repeated, as may `sagaId` and `status`.")
    saga_id: Texts = Field(default_factory=list, description="Another spelling of `sagaName`.")
    status: _Statuses = Field(default_factory=list[SagaInstanceStatus])
    topic: Text = None
    q: Annotated[str, Field(description="What the correlation key begins with.")] = ""
    created_after: _Time = None
    created_before: _Time = None


class ChildrenQuery(WebQuery):
    run: RunNumber = None
    status: ChildStatus = "live"
    limit: Limit = 50
    cursor: Text = None


class HistoryQuery(WebQuery):
    run: RunNumber = None
    limit: Limit = 50
    offset: Annotated[int, Field(ge=0, description="How many entries to skip.")] = 0
    after: Annotated[int, Field(ge=0, description="Continue behind this `entryNo`.")] = 0


class DeadLettersQuery(WebQuery):
    limit: Limit = 50
    cursor: Text = None
    saga_name: Text = None
    saga_id: Annotated[Text, Field(description="Another spelling of `sagaName`.")] = None
    correlation_id: Text = None
    correlation_key: Annotated[Text, Field(description="Another spelling of `correlationId`.")] = None


# --- Routes ----------------------------------------------------------------------------------------------------------


def add_health(table: RouteTable, runtime: SagaRuntime) -> None:
    """`/health`, `/health/live` and `/health/ready`, at the root and under the prefix."""

    def view(health: RuntimeHealth) -> shapes.HealthView:
        are_ok = all(check == "ok" for check in health.checks.values())
        return shapes.HealthView(
            status=("healthy" if are_ok else "degraded") if health.ready else "unhealthy",
            timestamp=wire_time(runtime.clock.now()),
            version=version("sagaloom"),
            checks=health.checks,
            backlog=health.backlog,
            outbox=health.outbox,
            stalled_lanes=health.stalled_lanes,
            oldest_waiting_seconds=health.oldest_waiting_seconds,
        )

    HealthRoutes(runtime.health, view, shape=shapes.HealthView).add_to(table, API_PREFIX)


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
                "routeGroups": [
                    "sagas",
                    "instances",
                    "history",
                    "signals",
                    "updates",
                    "queries",
                    "publish",
                    "subscribe",
                    "dead-letters",
                    "timers",
                    "schedules",
                ],
                "capabilities": [
                    "saga-orchestration",
                    "message-publishing",
                    "batch-publishing",
                    "instance-tracking",
                    "instance-control",
                    "signals-and-queries",
                    "sse-streaming",
                    "dead-letters",
                ],
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
            try:
                found, cursor = await runtime.list_instances(
                    wanted, limit=query.limit, offset=query.offset, cursor=query.cursor
                )
            except MessageRejected as refused:  # Its cursor is all that a listing may refuse.
                raise invalid(refused.message, "cursor") from None
            # One more than is counted exactly, to see whether there are more.
            total = await runtime.store.count_instances(wanted, limit=_COUNTED_MAX + 1)
        return json_response(
            shapes.InstanceList(
                instances=[shapes.instance_view(one) for one in found],
                total=min(total, _COUNTED_MAX),
                total_is_estimate=total > _COUNTED_MAX,
                limit=query.limit,
                offset=query.offset,
                cursor=cursor,
            )
        )


def _add_one_instance(table: RouteTable, runtime: SagaRuntime) -> None:
    # The history comes first: routes are asked in the order in which they were added.
    async def find(address: InstanceAddress, run: int | None) -> Instance:
        instance = await runtime.get_instance(address.saga_id, address.key, run=run)
        if instance is None:
            gone = await runtime.why_no_instance(address.saga_id, address.key, run)
            raise gone if gone.data.get("removed") else no_instance(address, run)
        return instance

    @table.add(
        "GET",
        f"{INSTANCE_PATH}/history",
        answer=shapes.HistoryList,
        tag="instances",
        errors=(404, 422, 503),
        route_class=InstanceRoute,
    )
    async def _get_history(
        address: Annotated[InstanceAddress, Depends(address_of_instance)], query: Annotated[HistoryQuery, Query()]
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
        f"{INSTANCE_PATH}/children",
        answer=shapes.ChildList,
        tag="instances",
        errors=(404, 422, 503),
        route_class=InstanceRoute,
    )
    async def _list_children(
        address: Annotated[InstanceAddress, Depends(address_of_instance)], query: Annotated[ChildrenQuery, Query()]
    ) -> Response:
        """The runs that one run has spawned: those that are live, or those that ended in one way."""
        instance = await find(address, query.run)
        found = await runtime.store.children(
            instance.pk, instance.run, status=query.status, after=_place_of(query.cursor), limit=query.limit
        )
        # What ended says so in its row; of the others the newest run of their key is looked at.
        are_live = query.status == "live"
        loaded = await runtime.store.load([(each.saga_id, each.key) for each in found]) if are_live and found else []
        instances = [each.instance for each in loaded] or [None] * len(found)
        return json_response(
            shapes.ChildList(
                children=[shapes.child_view(*pair) for pair in zip(found, instances, strict=True)],
                counts=shapes.child_counts(await runtime.store.count_children(instance.pk, instance.run)),
                limit=query.limit,
                cursor=f"{found[-1].revision}-{found[-1].position}" if len(found) == query.limit else None,
            )
        )

    @table.add(
        "GET",
        INSTANCE_PATH,
        answer=shapes.InstanceView,
        tag="instances",
        errors=(404, 422, 503),
        route_class=InstanceRoute,
    )
    async def _get_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)], query: Annotated[InstanceQuery, Query()]
    ) -> Response:
        """One run: its state, status and revision, the run that spawned it, and how many it has spawned."""
        instance = await find(address, query.run)
        children = await runtime.store.count_children(instance.pk, instance.run) if instance.children else None
        return json_response(shapes.instance_view(instance, children=children))


def _add_dead_letters(table: RouteTable, runtime: SagaRuntime) -> None:
    @table.add("GET", f"{API_PREFIX}/dead-letters", answer=shapes.DeadLetterList, tag="dead letters", errors=(422, 503))
    async def _list_dead_letters(query: Annotated[DeadLettersQuery, Query()]) -> Response:
        """Messages and effects that were given up, newest first."""
        saga_id = one_of_two("sagaName", query.saga_name, "sagaId", query.saga_id)
        key = one_of_two("correlationId", query.correlation_id, "correlationKey", query.correlation_key)
        if query.cursor is not None and not _DEAD_LETTER_CURSOR.fullmatch(query.cursor):
            raise invalid(f"{query.cursor!r:.80} is no cursor of this listing", "cursor")
        found = await runtime.dead_letters(saga_id=saga_id, key=key, after=query.cursor, limit=query.limit)
        return json_response(
            shapes.DeadLetterList(
                dead_letters=[shapes.dead_letter_view(one, with_content=False) for one in found],
                limit=query.limit,
                cursor=found[-1].id if len(found) == query.limit else None,
            )
        )

    @table.add(
        "GET",
        f"{API_PREFIX}/dead-letters/{{id}}",
        answer=shapes.DeadLetterView,
        tag="dead letters",
        errors=(404, 422, 503),
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
        errors=(404, 409, 422, 503),
    )
    async def _redrive_dead_letter(letter_id: _DeadLetterId) -> Response:
        """Tries again: a message enters anew, an effect leaves and its lane goes on. Answers with what was redriven."""
        return json_response(shapes.dead_letter_view(await runtime.redrive(letter_id), with_content=True))

    @table.add(
        "POST",
        f"{API_PREFIX}/dead-letters/{{id}}/discard",
        answer=shapes.DeadLetterView,
        tag="dead letters",
        errors=(404, 409, 422, 503),
    )
    async def _discard_dead_letter(letter_id: _DeadLetterId) -> Response:
        """Gives it up for good: a message's idempotency key is free again, an effect's lane goes on without it.
        Answers with what was discarded."""
        return json_response(shapes.dead_letter_view(await runtime.discard(letter_id), with_content=True))


def _place_of(cursor: str | None) -> tuple[int, int] | None:
    if cursor is None:
        return None
    found = _CHILD_CURSOR.fullmatch(cursor)
    if found is None:
        raise invalid(f"{cursor!r:.80} is no cursor of this listing", "cursor")
    return int(found[1]), int(found[2])


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
