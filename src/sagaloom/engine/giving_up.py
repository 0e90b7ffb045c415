"""What comes of a message that failed: another attempt, or a dead letter.

What user code raises is retried by the saga's policy (`retrying.py`), until its attempts are used up. What the engine
refuses (a handler that returned a coroutine, a state that cannot be encoded, a broken invariant) would be refused for
ever, and is given up at once. A message for state that a newer definition wrote waits, and spends no attempt.

    user code raised       ──► pending, at a later moment ──► ... ──► attempts used up ──► dead_lettered
    the engine refused     ──► dead_lettered
    made by something newer ─► pending, no attempt spent

A dead letter keeps the whole message, so that an operator can redrive it, with what is known of why: the code, the
reason, the traceback of user code, and of a state that was refused the one before and the one after. Of the run only
the counters change (`bystanders.py`).

What we dislike about it: traceback texts read the source files of the frames they show, which is the one look at the
world in the core.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from sagaloom.definitions import SagaDefinition
from sagaloom.engine.bystanders import bystander
from sagaloom.engine.compensation import UNDO
from sagaloom.engine.correlation import dead_letter_id
from sagaloom.engine.ledger import Refused
from sagaloom.engine.migrating import initial_state
from sagaloom.engine.moments import shown_bystander
from sagaloom.engine.records import DeadLetter, DecideContext, Decision, Envelope, FeedKind, Instance
from sagaloom.engine.retrying import backoff, describe, is_retryable, traceback_text
from sagaloom.errors import HandlerError, InstanceNotFound, SagasError

__all__ = ["after_error", "give_up", "letter_of", "wait_for_newer"]


def after_error(
    definition: SagaDefinition[Any],
    instance: Instance | None,
    message: Envelope,
    context: DecideContext,
    error: BaseException,
) -> Decision:
    """What comes of an exception of user code: another attempt, or none."""
    attempt, policy = message.attempt + 1, definition.retry
    if attempt >= policy.maximum_attempts or not is_retryable(error, policy):
        return give_up(definition, instance, message, context, error)
    retry_at = context.now + backoff(policy, attempt=attempt, message_id=message.id)
    return Decision("pending", retry_at=retry_at, error=describe(error))


def wait_for_newer(definition: SagaDefinition[Any], message: Envelope, context: DecideContext, why: str) -> Decision:
    # No attempt is spent: during a deployment, time alone would turn good messages into dead letters.
    retry_at = context.now + backoff(definition.retry, attempt=message.attempt + 1, message_id=message.id)
    return Decision("pending", retry_at=retry_at, error=why, spends_attempt=False)


def give_up(
    definition: SagaDefinition[Any],
    instance: Instance | None,
    message: Envelope,
    context: DecideContext,
    error: BaseException,
) -> Decision:
    """The message is a dead letter; of the run it only changes the counters."""
    letter = letter_of(definition, instance, message, context.now, error)
    reason = letter.reason
    entry = counted = None
    if instance is not None:
        entry, counted = bystander(instance, message, context, "dead_lettered", reason)
        if message.origin == "undo" and counted.undoing is not None:
            standing = msgspec.structs.replace(counted.undoing, error=describe(error), dead_letter_id=letter.id)
            counted = msgspec.structs.replace(counted, undoing=standing)
    feed = shown_bystander(FeedKind.DEAD_LETTERED, instance, message, context, reason)
    return Decision("dead_lettered", reason, counted, entry=entry, dead_letter=letter, feed=feed, error=reason)


def letter_of(
    definition: SagaDefinition[Any],
    instance: Instance | None,
    message: Envelope,
    now: datetime,
    error: BaseException,
) -> DeadLetter:
    """What is kept of a message that is given up for `error`."""
    attempts, state_before, state_after = message.attempt + 1, None, None
    if isinstance(error, Refused):
        code, reason, shown = error.code, error.message, error.traceback
        if error.state_after is not None:
            state_after = error.state_after
            state_before = instance.state if instance is not None else initial_state(definition)
    elif isinstance(error, InstanceNotFound):
        code, reason, shown = error.code, error.message, None
    else:
        code = error.code if isinstance(error, SagasError) else HandlerError.default_code
        tried = "" if attempts == 1 else f" (attempt {attempts} of {definition.retry.maximum_attempts})"
        reason = f"saga {definition.id!r}: {_doing(message)} failed{tried}: {describe(error)}"
        shown = traceback_text(error)
    return DeadLetter(
        id=dead_letter_id(now, message.saga_id, message.key, message.id, message.attempt),
        at=now,
        saga_id=message.saga_id,
        key=message.key,
        type=message.type,
        code=code,
        reason=reason,
        attempts=attempts,
        traceback=shown,
        envelope=message,
        state_before=state_before,
        state_after=state_after,
    )


def _doing(message: Envelope) -> str:
    if message.type != UNDO:
        return f"handling {message.type!r}"
    step = msgspec.json.decode(message.payload, type=_UndoSaid).step
    return f"undoing {step!r}"


class _UndoSaid(msgspec.Struct):
    """The payload of a message that carries on what is left to undo: which step it was about at first."""

    step: str | None = None
