"""The routes by which one speaks to an instance: signals, updates, queries.

The name of a signal is the last part of its path, percent-encoded where it has to be. A body may be left out where
there is nothing to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import unquote_to_bytes

from fastapi import Depends, Path, Query, Request, Response
from pydantic import Field

from sagaloom.ids import KEY_BYTES_MAX
from sagaloom.service import shapes
from sagaloom.service.addressing import (
    INSTANCE_PATH,
    InstanceAddress,
    InstanceQuery,
    InstanceRoute,
    address_of_instance,
)
from sagaloom.service.publishing import wait_of
from sagaloom.web.bodies import BodyReader, JsonBody, body_of, idempotency_key_of, invalid
from sagaloom.web.routes import RouteTable, Text, json_response

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["add_talking"]

_said_body = JsonBody(shapes.SignalBody, example='send nothing, or a JSON object such as {"payload": {"by": "ann"}}')
_SAY_ERRORS: Final = (404, 408, 409, 413, 415, 422, 429, 503)
_ID_HEADER: Final = (("Idempotency-Key", "The same as `id` in the body."),)


class UpdateQuery(InstanceQuery):
    wait: Annotated[
        Text,
        Field(
            description="How long to wait for the answer: seconds, or a duration such as `500ms` or `5s`. As long as "
            "the server allows when left out.",
            json_schema_extra={"pattern": "^([0-9]+(\\.[0-9]+)?|[0-9]+(ms|s|m|h|d))$"},
        ),
    ] = None


async def _name_of(
    name: Annotated[
        str,
        Path(
            description="The name, percent-encoded.",
            json_schema_extra={"pattern": "^[^\\u0000-\\u001f/]+$", "maxLength": KEY_BYTES_MAX},
        ),
    ],
) -> str:
    try:
        return unquote_to_bytes(name).decode()
    except UnicodeDecodeError:
        raise invalid(f"the name {name!r:.80} is not UTF-8 once decoded", "name") from None


def add_talking(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    """The routes of signals, updates and queries. They come before those that look at instances: a route is asked in
    the order in which it was added, and an instance's own takes every path below it."""

    @table.add(
        "POST",
        f"{INSTANCE_PATH}/signals/{{name}}",
        answer=shapes.SignalAnswer,
        tag="instances",
        errors=_SAY_ERRORS,
        body=shapes.SignalBody,
        route_class=InstanceRoute,
        status=202,
        headers=_ID_HEADER,
    )
    async def _signal_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)],
        name: Annotated[str, Depends(_name_of)],
        query: Annotated[InstanceQuery, Query()],
        request: Request,
    ) -> Response:
        """Says something to an instance. The answer comes once that is durable; it is applied in its turn, once,
        however often it is sent under one `id`."""
        body = await body_of(request, reader, _said_body)
        receipt = await runtime.signal(
            address.saga_id,
            address.key,
            name,
            shapes.payload_of(body),
            id=idempotency_key_of(dict(request.scope["headers"]), body.id),
            run=query.run,
        )
        return json_response(shapes.signal_answer(receipt), 202)

    @table.add(
        "POST",
        f"{INSTANCE_PATH}/updates/{{name}}",
        answer=shapes.UpdateAnswer,
        tag="instances",
        errors=_SAY_ERRORS,
        body=shapes.SignalBody,
        route_class=InstanceRoute,
        headers=_ID_HEADER,
    )
    async def _update_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)],
        name: Annotated[str, Depends(_name_of)],
        query: Annotated[UpdateQuery, Query()],
        request: Request,
    ) -> Response:
        """Says something to an instance, and answers with what its handler has to say, when that is committed. The same
        update under the same `id` gets the same answer. `pending`: the wait was over before, and the update goes on. A
        refusal of the handler comes as an error, with the handler's own code."""
        body = await body_of(request, reader, _said_body)
        receipt = await runtime.update(
            address.saga_id,
            address.key,
            name,
            shapes.payload_of(body),
            id=idempotency_key_of(dict(request.scope["headers"]), body.id),
            run=query.run,
            wait=None if query.wait is None else wait_of(query.wait, runtime.options.wait_seconds_max),
        )
        return json_response(shapes.update_answer(receipt))

    @table.add(
        "GET",
        f"{INSTANCE_PATH}/queries/{{name}}",
        answer=shapes.QueryAnswer,
        tag="instances",
        errors=(404, 409, 422, 503),
        route_class=InstanceRoute,
    )
    async def _query_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)],
        name: Annotated[str, Depends(_name_of)],
        query: Annotated[InstanceQuery, Query()],
    ) -> Response:
        """What a query of the saga says of the newest committed state, of a run that is over too."""
        result = await runtime.query_result(address.saga_id, address.key, name, run=query.run)
        return json_response(shapes.query_answer(result))
