"""`POST .../instances/{sagaName}/{correlationId}/replies`: answers to what a run of a saga has asked for.

The jobs service brings the ends of jobs here. It is not for messages in general: those are correlated, this is
addressed.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import msgspec
from fastapi import Depends, Query, Request, Response
from msgspec import UNSET, Meta, Raw, UnsetType

from sagaloom.engine.records import Disposition
from sagaloom.messages import SagaMessage
from sagaloom.service.addressing import INSTANCE_PATH, InstanceAddress, InstanceRoute, address_of_instance
from sagaloom.web.bodies import BodyReader, JsonBody, body_of, in_utc, invalid, trace_of
from sagaloom.web.routes import RouteTable, WebQuery, json_response

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["ReplyAnswer", "ReplyBody", "add_replying"]


class ReplyBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """An answer. `id` is the same whenever it is sent again, and makes that a duplicate."""

    type: Annotated[str, Meta(min_length=1, description="The message type, such as `send-invoice:completed`.")]
    id: Annotated[str, Meta(min_length=1)]
    payload: Raw | UnsetType = UNSET
    occurred_at: Annotated[datetime, Meta(tz=True)] | None = None
    causation_id: Annotated[str | None, Meta(description="The key of the effect that is answered.")] = None
    hops: Annotated[int, Meta(ge=0, le=1_000_000, description="How far into a cascade the effect was.")] = 0
    traceparent: str | None = None
    tracestate: str | None = None


class ReplyAnswer(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The answer is durable, or nobody wants it: `ignored` has the reason."""

    message_type: str
    message_id: str
    instance_id: str
    run: int
    disposition: Disposition
    reason: str | UnsetType = UNSET


class ReplyQuery(WebQuery):
    run: Annotated[int, Query(ge=1, le=2**53, description="The run that has asked.")]


_body = JsonBody(ReplyBody, example='send a JSON object such as {"type": "send-invoice:completed", "id": "r-1"}')


def add_replying(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    """The route by which answers come."""

    @table.add(
        "POST",
        f"{INSTANCE_PATH}/replies",
        answer=ReplyAnswer,
        tag="instances",
        errors=(404, 408, 413, 415, 422, 429, 503),
        status=202,
        body=ReplyBody,
        requires_body=True,
        route_class=InstanceRoute,
    )
    async def _reply_to_instance(
        address: Annotated[InstanceAddress, Depends(address_of_instance)],
        query: Annotated[ReplyQuery, Query()],
        request: Request,
    ) -> Response:
        """Hands the very run that has asked for it an answer, such as the end of a job. What the saga has no handler
        for is ignored, and so is an answer to a run that is over."""
        said = await body_of(request, reader, _body)
        headers: dict[bytes, bytes] = dict(request.scope["headers"])
        traceparent, tracestate = trace_of(headers, said.traceparent, said.tracestate)
        if said.type.startswith("saga:"):
            raise invalid(f"type: {said.type!r:.80} belongs to the engine", "type")
        message: SagaMessage[Raw] = SagaMessage(
            said.type,
            Raw(b"{}") if isinstance(said.payload, UnsetType) else said.payload,
            occurred_at=None if said.occurred_at is None else in_utc(said.occurred_at, "occurredAt"),
            id=said.id,
            traceparent=traceparent,
            tracestate=tracestate,
        )
        outcome = await runtime.reply(
            address.saga_id,
            address.key,
            message,
            run=query.run,
            causation_id=said.causation_id,
            hops=said.hops,
        )
        return json_response(
            ReplyAnswer(
                message_type=said.type,
                message_id=outcome.message_id,
                instance_id=outcome.instance_id,
                run=outcome.run,
                disposition=outcome.disposition,
                reason=UNSET if outcome.reason is None else outcome.reason,
            ),
            202,
        )
