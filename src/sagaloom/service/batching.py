"""`POST /publish/batch`: many messages in one request, each answered by itself.

The messages are taken in together and in their order, so they share commits as far as the receiver batches them; but
they are not all or nothing: one that is refused keeps no other from being accepted. The answer has one result for each,
in order, with the status that the message would have had alone:

- 202: every message is durable;
- 200: at least one was refused; the results say which, and whether trying again helps;
- anything else: the request as a whole was refused, and nothing was taken in.

What is wrong with one message is that message's error, also when it is no message at all; what is wrong with the body
around them is the request's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope

from sagaloom.errors import MessageRejected
from sagaloom.messages import SagaMessage
from sagaloom.runtime.receipts import PublishReceipt, PublishRejected
from sagaloom.service.publishing import message_of
from sagaloom.service.shapes import BatchItem, PublishBatchAnswer, publish_answer
from sagaloom.web.bodies import BodyReader, JsonBody, invalid
from sagaloom.web.problems import Answer, Problem, json_headers, status_of, trace_id_of
from sagaloom.web.raw import RawRoute

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["PublishBatchRoute"]

_EXAMPLE: Final = 'send a JSON object such as {"messages": [{"type": "OrderPlaced", "payload": {}}]}'


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    """The body, with the messages as the bytes they came as."""

    messages: list[msgspec.Raw]


_body = JsonBody(_Batch, example=_EXAMPLE)


class PublishBatchRoute(RawRoute):
    """Takes many messages in for `runtime`."""

    where = "POST /publish/batch"

    def __init__(self, runtime: SagaRuntime, *, body_bytes_max: int, body_seconds_max: float) -> None:
        self._runtime = runtime
        self._reader = BodyReader(body_bytes_max=body_bytes_max, body_seconds_max=body_seconds_max)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer, or None when the client is gone."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        _refuse_parameters(scope["query_string"], headers)
        body = await self._reader.read(receive, headers)
        if body is None:
            return None
        contents = _body.decode(body).messages
        most = self._runtime.options.limits.batch_messages_max
        if len(contents) > most:
            raise invalid(f"messages: {len(contents)} are too many for one batch, at most {most} are taken", "messages")
        telemetry = self._runtime.telemetry
        begins_trace = telemetry is None or not telemetry.makes_spans
        wanted = [_read(bytes(content), headers, begins_trace=begins_trace) for content in contents]
        taken = iter(await self._runtime.publish_many([one for one in wanted if isinstance(one, SagaMessage)]))
        trace_id = trace_id_of(scope["headers"])
        results: list[BatchItem] = []
        for one in wanted:
            results.append(_item(next(taken) if isinstance(one, SagaMessage) else one, trace_id))
        refused = sum(result.status != 202 for result in results)
        content = msgspec.json.encode(
            PublishBatchAnswer(accepted=len(results) - refused, refused=refused, results=results), enc_hook=str
        )
        return 200 if refused else 202, json_headers(content), content


def _refuse_parameters(query: bytes, headers: dict[bytes, bytes]) -> None:
    """Raises for what makes sense for one message only."""
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        raise invalid(f"query parameter {name!r:.80} is unknown: this route knows none, it answers at once", name)
    if b"idempotency-key" in headers:
        raise invalid(
            "the Idempotency-Key header cannot be that of many messages: give each its own idempotencyKey",
            "idempotencyKey",
        )


def _read(content: bytes, headers: dict[bytes, bytes], *, begins_trace: bool) -> SagaMessage[Any] | MessageRejected:
    try:
        return message_of(content, headers, begins_trace=begins_trace)
    except MessageRejected as refused:
        return refused


def _item(became: PublishReceipt | PublishRejected | MessageRejected, trace_id: str) -> BatchItem:
    if isinstance(became, PublishReceipt):
        return BatchItem(status=202, receipt=publish_answer(became, with_outcomes=False))
    if isinstance(became, PublishRejected):
        _ = became.code  # Looked at: the client hears of it, so it need not be logged.
    error = became.error if isinstance(became, PublishRejected) else became
    problem = Problem(error.code, error.message, error.retryable, trace_id, error.data)
    return BatchItem(status=status_of(error), error=problem)
