"""Speaking to one instance: signals, updates and queries."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, UnsetType

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import Disposition
from sagaloom.runtime.receipts import QueryResult, SignalReceipt, UpdateReceipt
from sagaloom.service.shapes.shape import Shape, if_known


class SignalBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said to an instance."""

    payload: Annotated[Raw | UnsetType, Meta(description="What the signal takes; null when left out.")] = UNSET
    id: Annotated[
        str | None, Meta(description="Makes a repeat a duplicate; the Idempotency-Key header says the same.")
    ] = None


class SignalAnswer(Shape, frozen=True, kw_only=True):
    """The signal is durable. `pending`: it waits for its turn; `duplicate`: it was sent before."""

    signal: str
    message_id: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    status: SagaInstanceStatus | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class UpdateAnswer(Shape, frozen=True, kw_only=True):
    """What an update's handler answered. `pending`: not yet; `duplicate`: it was sent before, and this was answered
    then."""

    update: str
    message_id: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    duplicate: bool
    answer: Any
    status: SagaInstanceStatus | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class QueryAnswer(Shape, frozen=True, kw_only=True):
    """What a query says, and of what run at what revision (`version`)."""

    query: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    status: SagaInstanceStatus
    version: int
    answer: Raw


def payload_of(body: SignalBody) -> Raw:
    return Raw(b"null") if isinstance(body.payload, UnsetType) else body.payload


def signal_answer(receipt: SignalReceipt) -> SignalAnswer:
    """What the sender of a signal gets."""
    return SignalAnswer(
        signal=receipt.signal,
        message_id=receipt.message_id,
        saga_name=receipt.saga_id,
        instance_id=receipt.instance_id,
        correlation_id=receipt.correlation_key,
        correlation_key=receipt.correlation_key,
        run=receipt.run,
        disposition=receipt.disposition,
        status=if_known(receipt.status),
        revision=if_known(receipt.revision),
        reason=if_known(receipt.reason),
    )


def update_answer(receipt: UpdateReceipt) -> UpdateAnswer:
    """What the sender of an update gets."""
    return UpdateAnswer(
        update=receipt.update,
        message_id=receipt.message_id,
        saga_name=receipt.saga_id,
        instance_id=receipt.instance_id,
        correlation_id=receipt.correlation_key,
        correlation_key=receipt.correlation_key,
        run=receipt.run,
        disposition=receipt.disposition,
        duplicate=receipt.duplicate,
        answer=receipt.answer,
        status=if_known(receipt.status),
        revision=if_known(receipt.revision),
        reason=if_known(receipt.reason),
    )


def query_answer(result: QueryResult) -> QueryAnswer:
    """What whoever asks gets."""
    return QueryAnswer(
        query=result.query,
        saga_name=result.saga_id,
        instance_id=result.instance_id,
        correlation_id=result.correlation_key,
        correlation_key=result.correlation_key,
        run=result.run,
        status=result.status,
        version=result.revision,
        answer=result.answer,
    )
