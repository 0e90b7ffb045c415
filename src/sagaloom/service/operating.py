"""The routes by which operators act: cancel, pause and resume a run, redrive and discard many dead letters.

Everything they ask for goes through the inbox or the receiver, as everything does, and is answered after its commit. A
body may be left out where it says nothing that is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from fastapi import Depends, Query, Request, Response

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

__all__ = ["add_operating"]

_control_body = JsonBody(shapes.ControlBody, example='send nothing, or a JSON object such as {"reason": "a mistake"}')
_bulk_body = JsonBody(shapes.BulkBody, example='send a JSON object such as {"sagaName": "order", "limit": 100}')
_INSTANCE_ERRORS: Final = (404, 408, 409, 413, 415, 422, 429, 503)
_BULK_ERRORS: Final = (408, 413, 415, 422, 429, 503)


def add_operating(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    """The routes that act on instances and dead letters."""
    _add_controls(table, runtime, reader)
    _add_bulk_repair(table, runtime, reader)


def _add_controls(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    async def show(address: InstanceAddress, outcome: Outcome) -> Response:
        instance = await runtime.get_instance(address.saga_id, address.key, run=outcome.run)
        if instance is None:
            raise no_instance(address, outcome.run)
        return json_response(shapes.instance_view(instance))

    @table.add(
        "POST",
        f"{INSTANCE_PATH}/cancel",
        answer=shapes.InstanceView,
        tag="instances",
        errors=_INSTANCE_ERRORS,
        body=shapes.ControlBody,
        route_class=InstanceRoute,
    )
    async def _cancel_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)],
        query: Annotated[InstanceQuery, Query()],
        request: Request,
    ) -> Response:
        """Ends a run as it stands: no compensation runs, timers end, a parent hears of it. A run that is over already
        is left as it is. Answers with the run."""
        body = await body_of(request, reader, _control_body)
        return await show(
            address, await runtime.cancel(address.saga_id, address.key, run=query.run, reason=body.reason)
        )

    @table.add(
        "POST",
        f"{INSTANCE_PATH}/pause",
        answer=shapes.InstanceView,
        tag="instances",
        errors=_INSTANCE_ERRORS,
        body=shapes.ControlBody,
        route_class=InstanceRoute,
    )
    async def _pause_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)],
        query: Annotated[InstanceQuery, Query()],
        request: Request,
    ) -> Response:
        """Keeps messages, replies and timers of a run waiting until it is resumed. Publishing to it goes on, and is
        answered with `pending`. Answers with the run."""
        body = await body_of(request, reader, _control_body)
        return await show(address, await runtime.pause(address.saga_id, address.key, run=query.run, reason=body.reason))

    @table.add(
        "POST",
        f"{INSTANCE_PATH}/resume",
        answer=shapes.InstanceView,
        tag="instances",
        errors=_INSTANCE_ERRORS,
        body=shapes.ControlBody,
        route_class=InstanceRoute,
    )
    async def _resume_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)],
        query: Annotated[InstanceQuery, Query()],
        request: Request,
    ) -> Response:
        """Lets a paused run go on with what has waited for it, before anything newer. Answers with the run."""
        body = await body_of(request, reader, _control_body)
        return await show(
            address, await runtime.resume(address.saga_id, address.key, run=query.run, reason=body.reason)
        )


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
