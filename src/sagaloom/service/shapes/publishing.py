"""Publishing: one message, or many."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, UnsetType

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import Disposition
from sagaloom.runtime.receipts import Outcome, PublishReceipt
from sagaloom.service.shapes.shape import Shape, if_known
from sagaloom.web.problems import Problem


class PublishBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message. Unknown fields are refused: a misspelt `idempotencyKey` would otherwise make every retry a new
    message."""

    type: Annotated[str, Meta(min_length=1, description="The message type; a loaded saga must handle it.")]
    payload: Annotated[
        Raw | UnsetType, Meta(description="The business data: an object, unless the saga declares otherwise.")
    ] = UNSET
    correlation_id: Annotated[
        str | None, Meta(description="Names the instance, 1 to 1024 bytes, unless the saga has a rule of its own.")
    ] = None
    correlation_key: Annotated[
        str | None, Meta(description="Another spelling of correlationId; both together must agree.")
    ] = None
    idempotency_key: Annotated[
        str | None, Meta(description="Makes a repeat a duplicate; the Idempotency-Key header says the same.")
    ] = None
    concurrency_key: str | None = None
    message_id: Annotated[str | None, Meta(description="The message's own id; made up when left out.")] = None
    occurred_at: Annotated[
        Annotated[datetime, Meta(tz=True)] | None,
        Meta(description="When it happened, with a zone. Never used for ordering."),
    ] = None
    topic: Annotated[str | None, Meta(description="Taken for compatibility; messages are routed by type.")] = None
    traceparent: Annotated[str | None, Meta(description="W3C trace context; the traceparent header says the same.")] = (
        None
    )
    tracestate: str | None = None


class TakenBy(Shape, frozen=True, kw_only=True):
    """A run that takes the message."""

    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int


class OutcomeView(Shape, frozen=True, kw_only=True):
    """What the message did to one run. `pending`: safe, but not applied when the wait ended."""

    instance_id: str
    saga_id: str
    correlation_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    effects: Sequence[str]
    status: SagaInstanceStatus | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    state: Any = UNSET
    result: Any = UNSET
    reason: str | UnsetType = UNSET


class PublishAnswer(Shape, frozen=True, kw_only=True):
    """The message is durable. `duplicate`: it was before, and nothing changed. `outcomes` comes with `?wait=`."""

    published: bool
    message_type: str
    message_id: str
    duplicate: bool
    instances: Sequence[TakenBy]
    correlation_id: str | UnsetType = UNSET
    correlation_key: str | UnsetType = UNSET
    outcomes: Sequence[OutcomeView] | UnsetType = UNSET


def publish_answer(receipt: PublishReceipt, *, with_outcomes: bool) -> PublishAnswer:
    """What a publisher gets for its receipt."""
    key = if_known(receipt.correlation_key)
    return PublishAnswer(
        published=True,
        message_type=receipt.message_type,
        message_id=receipt.message_id,
        duplicate=receipt.duplicate,
        instances=[
            TakenBy(
                saga_name=one.saga_id,
                instance_id=one.instance_id,
                correlation_id=one.correlation_key,
                correlation_key=one.correlation_key,
                run=one.run,
            )
            for one in receipt.outcomes
        ],
        correlation_id=key,
        correlation_key=key,
        outcomes=[_outcome_view(one) for one in receipt.outcomes] if with_outcomes else UNSET,
    )


def _outcome_view(outcome: Outcome) -> OutcomeView:
    is_known = outcome.status is not None
    return OutcomeView(
        instance_id=outcome.instance_id,
        saga_id=outcome.saga_id,
        correlation_id=outcome.correlation_key,
        correlation_key=outcome.correlation_key,
        run=outcome.run,
        disposition=outcome.disposition,
        effects=outcome.effects,
        status=if_known(outcome.status),
        revision=if_known(outcome.revision),
        state=outcome.state if is_known else UNSET,
        result=if_known(outcome.result),
        reason=if_known(outcome.reason),
    )


class PublishBatchBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Many messages, which are taken in together and in this order."""

    messages: Annotated[Sequence[PublishBody], Meta(description="At most 1000.", max_length=1000)]


class BatchItem(Shape, frozen=True, kw_only=True):
    """What became of one message: a receipt with status 202, or an error with the status that it would have had
    alone."""

    status: int
    receipt: PublishAnswer | UnsetType = UNSET
    error: Problem | UnsetType = UNSET


class PublishBatchAnswer(Shape, frozen=True, kw_only=True):
    """What became of each message, in the order in which they were sent. Those that were accepted are durable,
    whatever happened to the others."""

    accepted: int
    refused: int
    results: Sequence[BatchItem]
