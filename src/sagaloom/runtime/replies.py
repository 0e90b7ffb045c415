"""Answers that come through a door: messages to the one run that has asked, whatever has become of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sagaloom.engine.records import Envelope
from sagaloom.errors import MessageRejected
from sagaloom.ids import check_key, instance_id
from sagaloom.messages import SagaMessage
from sagaloom.runtime.receipts import Outcome

__all__ = ["reply_envelope", "reply_unwanted"]


def reply_envelope(
    saga_id: str,
    key: str,
    message: SagaMessage[Any],
    payload: bytes,
    *,
    run: int,
    now: datetime,
    causation_id: str | None,
    hops: int,
) -> Envelope:
    """An answer on its way. Raises `MessageRejected` when it has no id: it could not be told from another one."""
    if message.id is None:
        raise MessageRejected(
            f"the reply {message.type!r:.80} has no id: give it one that is the same whenever it is sent again"
        )
    return Envelope(
        saga_id=saga_id,
        key=check_key(key),
        type=message.type,
        id=check_key(message.id, what="message id"),
        payload=payload,
        accepted_at=now,
        origin="reply",
        run=run,
        correlation_key=key,
        occurred_at=message.occurred_at,
        traceparent=message.traceparent,
        tracestate=message.tracestate,
        causation_id=causation_id,
        hops=hops,
    )


def reply_unwanted(saga_id: str, key: str, message: SagaMessage[Any], *, run: int) -> Outcome:
    """What is said of an answer that its saga has no handler for: sagas need not listen."""
    return Outcome(
        message_id=message.id or "",
        instance_id=instance_id(saga_id, key, run),
        saga_id=saga_id,
        correlation_key=key,
        run=run,
        disposition="ignored",
        reason=f"saga {saga_id!r} has no handler for {message.type!r}",
    )
