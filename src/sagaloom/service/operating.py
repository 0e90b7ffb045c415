"""The routes by which operators act: end, pause and resume a run, skip a compensation, repair many dead letters.

Everything they ask for goes through the inbox or the receiver, as everything does, and is answered after its commit. A
body may be left out where it says nothing that is needed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec
from fastapi import Depends, Path, Query, Request, Response
from msgspec import UNSET

from sagaloom.errors import MessageRejected, SagaNotFound
from sagaloom.service import shapes
from sagaloom.service.addressing import (
    API_PREFIX,
    INSTANCE_PATH,
    InstanceAddress,
    InstanceQuery,
    InstanceRoute,
    address_of_instance,
    no_instance,
    one_of_two,
)
from sagaloom.web.bodies import BodyReader, JsonBody, body_of, invalid
from sagaloom.web.routes import RouteTable, json_response

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime
    from sagaloom.runtime.receipts import Outcome
    from sagaloom.runtime.standings import StandingChange

__all__ = ["add_operating"]

_control_body = JsonBody(shapes.ControlBody, example='send nothing, or a JSON object such as {"reason": "a mistake"}')
_cancel_body = JsonBody(shapes.CancelBody, example='send nothing, or a JSON object such as {"compensate": false}')
_skip_body = JsonBody(shapes.SkipBody, example='send nothing, or a JSON object such as {"reason": "refunded by hand"}')
_bulk_body = JsonBody(shapes.BulkBody, example='send a JSON object such as {"sagaName": "order", "limit": 100}')
_INSTANCE_ERRORS: Final = (404, 408, 409, 413, 415, 422, 429, 503)
_migrate_body = JsonBody(shapes.MigrateBody, example='send nothing, or a JSON object such as {"limit": 100}')
_SAGA_ERRORS: Final = (404, 408, 413, 415, 422, 429, 503)
_SagaId = Annotated[str, Path(alias="id")]
_Endpoint: TypeAlias = Callable[..., Awaitable[Response]]
_Address = Annotated[InstanceAddress, Depends(address_of_instance)]
_Query = Annotated[InstanceQuery, Query()]
_BULK_ERRORS: Final = (408, 413, 415, 422, 429, 503)


def add_operating(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    """The routes that act on instances and dead letters."""
    _add_controls(table, runtime, reader)
    _add_saga_controls(table, runtime, reader)
    _add_bulk_repair(table, runtime, reader)


def _add_controls(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    async def show(address: InstanceAddress, outcome: Outcome) -> Response:
        instance = await runtime.get_instance(address.saga_id, address.key, run=outcome.run)
        if instance is None:
            raise no_instance(address, outcome.run)
        was_applied = outcome.disposition == "applied"
        control = shapes.ControlView(
            disposition=outcome.disposition, reason=UNSET if was_applied or outcome.reason is None else outcome.reason
        )
        return json_response(shapes.instance_view(instance, control=control))

    def add(verb: str, body: type[msgspec.Struct]) -> Callable[[_Endpoint], _Endpoint]:
        return table.add(
            "POST",
            f"{INSTANCE_PATH}/{verb}",
            answer=shapes.InstanceView,
            tag="instances",
            errors=_INSTANCE_ERRORS,
            body=body,
            route_class=InstanceRoute,
        )

    @add("cancel", shapes.CancelBody)
    async def _cancel_instance(address: _Address, query: _Query, request: Request) -> Response:
        """Undoes the applied steps of a run, newest first, and ends it; with `"compensate": false` it ends as it
        stands. Timers end, children are cancelled, a parent hears of it. A run that is over already is left as it is,
        and so is one that is being unwound. While a compensation fails the run is `compensating`. Answers with the
        run."""
        said = await body_of(request, reader, _cancel_body)
        outcome = await runtime.cancel(*address, run=query.run, reason=said.reason, compensate=said.compensate)
        return await show(address, outcome)

    @add("terminate", shapes.ControlBody)
    async def _terminate_instance(address: _Address, query: _Query, request: Request) -> Response:
        """Ends a run as it stands, whatever it is doing: nothing is undone, and an unwinding is given up. The last
        resort. Answers with the run."""
        said = await body_of(request, reader, _control_body)
        return await show(address, await runtime.terminate(*address, run=query.run, reason=said.reason))

    @add("pause", shapes.ControlBody)
    async def _pause_instance(address: _Address, query: _Query, request: Request) -> Response:
        """Keeps messages, replies and timers of a run waiting until it is resumed. Publishing to it goes on, and is
        answered with `pending`. Answers with the run."""
        said = await body_of(request, reader, _control_body)
        return await show(address, await runtime.pause(*address, run=query.run, reason=said.reason))

    @add("resume", shapes.ControlBody)
    async def _resume_instance(address: _Address, query: _Query, request: Request) -> Response:
        """Lets a paused run go on with what has waited for it, before anything newer. One that is not paused is left
        as it is. Answers with the run."""
        said = await body_of(request, reader, _control_body)
        return await show(address, await runtime.resume(*address, run=query.run, reason=said.reason))

    @add("skip", shapes.SkipBody)
    async def _skip_step(address: _Address, query: _Query, request: Request) -> Response:
        """Leaves out the compensation that fails, for good, and goes on with the next one; its dead letter is
        discarded. A run without one is left as it is. Answers with the run."""
        said = await body_of(request, reader, _skip_body)
        return await show(address, await runtime.skip(*address, run=query.run, reason=said.reason, step=said.step))


def _add_saga_controls(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    def show(change: StandingChange) -> Response:
        definition = runtime.definitions.get(change.standing.saga_id)
        if definition is None:
            saga_id = change.standing.saga_id
            raise SagaNotFound(f"it was done, but saga {saga_id!r} is not loaded here: there is nothing to show")
        control = shapes.ControlView(
            disposition="applied" if change.has_changed else "ignored",
            reason=UNSET if change.reason is None else change.reason,
        )
        return json_response({**shapes.saga_view(definition), "control": control})

    def add(verb: str) -> Callable[[_Endpoint], _Endpoint]:
        return table.add(
            "POST",
            f"{API_PREFIX}/sagas/{{id}}/{verb}",
            answer=shapes.SagaView,
            tag="sagas",
            errors=_SAGA_ERRORS,
            body=shapes.ControlBody,
        )

    @add("pause")
    async def _pause_saga(saga_id: _SagaId, request: Request) -> Response:
        """Has all instances of a saga wait, those that have not begun too. Messages are accepted; ticks are missed.
        Other processes on the store heed it within seconds."""
        said = await body_of(request, reader, _control_body)
        return show(await runtime.pause_saga(saga_id, reason=said.reason))

    @add("resume")
    async def _resume_saga(saga_id: _SagaId, request: Request) -> Response:
        """Lets a paused saga go on with what has waited."""
        said = await body_of(request, reader, _control_body)
        return show(await runtime.resume_saga(saga_id, reason=said.reason))

    @add("disable")
    async def _disable_saga(saga_id: _SagaId, request: Request) -> Response:
        """Has all instances of a saga wait, and refuses new messages for it with 503 `SAGA_DISABLED`."""
        said = await body_of(request, reader, _control_body)
        return show(await runtime.disable_saga(saga_id, reason=said.reason))

    @add("enable")
    async def _enable_saga(saga_id: _SagaId, request: Request) -> Response:
        """Takes new messages for a saga again, and goes on with what has waited."""
        said = await body_of(request, reader, _control_body)
        return show(await runtime.enable_saga(saga_id, reason=said.reason))

    @table.add(
        "POST",
        f"{API_PREFIX}/sagas/{{id}}/migrate",
        answer=shapes.MigrationAnswer,
        tag="sagas",
        errors=_SAGA_ERRORS,
        body=shapes.MigrateBody,
    )
    async def _migrate_saga(saga_id: _SagaId, request: Request) -> Response:
        """Brings live instances of an older version up to date, some in each request."""
        said = await body_of(request, reader, _migrate_body)
        try:
            page = await runtime.migrate_saga(saga_id, limit=said.limit, cursor=said.cursor)
        except SagaNotFound:
            raise
        except MessageRejected as refused:  # Its limit has been checked, so it is the cursor.
            raise invalid(refused.message, "cursor") from None
        return json_response(shapes.migration_answer(page))


def _add_bulk_repair(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    @table.add(
        "POST",
        f"{API_PREFIX}/dead-letters/redrive",
        answer=shapes.BulkAnswer,
        tag="dead letters",
        errors=_BULK_ERRORS,
        body=shapes.BulkBody,
        requires_body=True,
    )
    async def _redrive_dead_letters(request: Request) -> Response:
        """Tries many again, oldest first, each for itself: what cannot be redriven is among the troubles."""
        body = await body_of(request, reader, _bulk_body)
        saga_id, key = _filter_of(body)
        result = await runtime.redrive_many(ids=body.ids, saga_id=saga_id, key=key, limit=body.limit)
        return json_response(shapes.bulk_answer(result))

    @table.add(
        "POST",
        f"{API_PREFIX}/dead-letters/discard",
        answer=shapes.BulkAnswer,
        tag="dead letters",
        errors=_BULK_ERRORS,
        body=shapes.BulkBody,
        requires_body=True,
    )
    async def _discard_dead_letters(request: Request) -> Response:
        """Gives many up for good, oldest first, each for itself."""
        body = await body_of(request, reader, _bulk_body)
        saga_id, key = _filter_of(body)
        result = await runtime.discard_many(ids=body.ids, saga_id=saga_id, key=key, limit=body.limit)
        return json_response(shapes.bulk_answer(result))


def _filter_of(body: shapes.BulkBody) -> tuple[str | None, str | None]:
    """The saga and the key that a body asks for; raises unless it asks for something, and in one way."""
    saga_id = one_of_two("sagaName", body.saga_name, "sagaId", body.saga_id)
    key = one_of_two("correlationId", body.correlation_id, "correlationKey", body.correlation_key)
    has_filter = saga_id is not None or key is not None
    if body.ids is not None and (has_filter or body.all):
        raise invalid("ids: they and a filter together are ambiguous: send the ids, or a filter", "ids")
    if body.ids is None and has_filter == body.all:
        raise invalid(
            "say which dead letters: ids, sagaName, correlationId, or all on its own; an empty body does nothing"
            if not body.all
            else "all: it and a filter together are ambiguous: send one of them",
            "all",
        )
    return saga_id, key
