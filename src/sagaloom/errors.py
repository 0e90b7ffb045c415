"""Every error sagaloom raises, by whose fault it is and whether trying again can help.

`code` is for programs and goes over the wire, the message is for people: it names the value, the place and the way
out. `retryable` says whether the very same call may succeed later.

    SagasError
    ├── DefinitionError        the author's: a saga that cannot be built, registered or run as written
    ├── MessageRejected        the caller's: a message, key or request refused at the door; nothing was changed
    │   ├── SagaNotFound · InstanceNotFound · DeadLetterNotFound · JobNotFound · JobRunNotFound
    │   ├── ScheduleNotFound · TimerNotFound · SignalNotFound · QueryNotFound
    │   ├── InstanceEnded · UpdateRefused · QueueFull · ConcurrencyLimited
    │   └── IdempotencyKeyReused
    ├── EncodeError            the author's, at run time: a value that JSON cannot carry and give back
    ├── DecodeError            the sender's, or an older version's: bytes that are no value of the declared type
    ├── HandlerError           the author's, at run time: what a handler raised or returned
    │   └── QueryFailed · UpdateFailed
    ├── ConcurrencyConflict    nobody's: another writer was first; decide again
    ├── JobCancelled           nobody's: the run was asked to end; raised by a handler that notices
    ├── Fenced                 nobody's: the lease has a new holder; stop writing
    ├── BackendUnavailable     the environment's: a store, broker or service that does not answer
    ├── StoreCorrupt           the environment's: stored bytes that cannot be read
    ├── ConfigurationError     the operator's: settings that are missing or contradict each other
    └── DeliveryFailed         a target's: an effect that was refused or not confirmed
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "BackendUnavailable",
    "ConcurrencyConflict",
    "ConcurrencyLimited",
    "ConfigurationError",
    "DeadLetterNotFound",
    "DecodeError",
    "DefinitionError",
    "DeliveryFailed",
    "EncodeError",
    "Fenced",
    "HandlerError",
    "IdempotencyKeyReused",
    "InstanceEnded",
    "InstanceNotFound",
    "JobCancelled",
    "JobNotFound",
    "JobRunNotFound",
    "MessageRejected",
    "QueryFailed",
    "QueryNotFound",
    "QueueFull",
    "SagaNotFound",
    "SagasError",
    "ScheduleNotFound",
    "SignalNotFound",
    "StoreCorrupt",
    "TimerNotFound",
    "UpdateFailed",
    "UpdateRefused",
]


class SagasError(Exception):
    """The root of all errors of this package; also for handlers to raise: `SagasError("...", retryable=False)`
    sends a message straight to the dead letters."""

    default_code = "SAGA_ERROR"
    default_retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retryable: bool | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else self.default_code
        self.retryable = retryable if retryable is not None else self.default_retryable
        self.data: Mapping[str, object] = data if data is not None else {}


class DefinitionError(SagasError):
    """A saga definition that breaks a rule, at the call that broke it."""

    default_code = "SAGA_VALIDATION_FAILED"


class MessageRejected(SagasError):
    """A message or request that was refused; nothing was changed."""

    default_code = "VALIDATION_ERROR"


class SagaNotFound(MessageRejected):
    """No loaded definition has this id or handles this message type."""

    default_code = "SAGA_NOT_FOUND"


class InstanceNotFound(MessageRejected):
    """No instance has this saga, correlation key and run."""

    default_code = "SAGA_INSTANCE_NOT_FOUND"


class DeadLetterNotFound(MessageRejected):
    """No dead letter has this id."""

    default_code = "DEAD_LETTER_NOT_FOUND"


class JobNotFound(MessageRejected):
    """No loaded job has this id."""

    default_code = "JOB_NOT_FOUND"


class JobCancelled(SagasError):
    """The run was asked to end, and its handler does: `ctx.raise_if_cancelled()`."""

    default_code = "JOB_CANCELLED"


class JobRunNotFound(MessageRejected):
    """No run has this id."""

    default_code = "JOB_RUN_NOT_FOUND"


class ScheduleNotFound(MessageRejected):
    """No loaded definition of this id has a schedule."""

    default_code = "SCHEDULE_NOT_FOUND"


class TimerNotFound(MessageRejected):
    """No timer of this id waits: it has fired, was taken back, or never was."""

    default_code = "TIMER_NOT_FOUND"


class SignalNotFound(MessageRejected):
    """The saga has no signal, or no update, of this name."""

    default_code = "SIGNAL_NOT_FOUND"


class QueryNotFound(MessageRejected):
    """The saga has no query of this name."""

    default_code = "QUERY_NOT_FOUND"


class InstanceEnded(MessageRejected):
    """The run is over: it takes no more signals and updates."""

    default_code = "SAGA_INSTANCE_ENDED"


class UpdateRefused(MessageRejected):
    """What the handler of an update raises to say no, for a reason that its caller gets to hear. Nothing is changed,
    and nothing is tried again:

        raise UpdateRefused("the order has left already", code="TOO_LATE", data={"since": "2026-01-31"})
    """

    default_code = "SAGA_UPDATE_REFUSED"


class ConcurrencyLimited(MessageRejected):
    """All places that the saga has for messages of this concurrency key are taken; nothing was accepted."""

    default_code = "SAGA_CONCURRENCY_LIMITED"
    default_retryable = True


class IdempotencyKeyReused(MessageRejected):
    """An idempotency key came back with other content."""

    default_code = "IDEMPOTENCY_KEY_REUSED"


class QueueFull(MessageRejected):
    """A queue that holds as many messages as it may; nothing was stored."""

    default_code = "QUEUE_FULL"
    default_retryable = True


class EncodeError(SagasError):
    """A value that would not come back equal from its JSON; `data` has the declared `type` and the JSON `path`."""

    default_code = "STATE_NOT_ENCODABLE"


class DecodeError(SagasError):
    """JSON that is no value of the declared type; `data` has that `type` and the JSON `path`."""

    default_code = "VALIDATION_ERROR"


class HandlerError(SagasError):
    """A handler that raised, or returned what it may not."""

    default_code = "SAGA_HANDLER_FAILED"
    default_retryable = True


class QueryFailed(HandlerError):
    """A query that raised, changed the state that it was to read, or gave no answer that can be sent."""

    default_code = "SAGA_QUERY_FAILED"
    default_retryable = False


class UpdateFailed(HandlerError):
    """An update that was given up: its handler failed, and it is a dead letter now."""

    default_code = "SAGA_UPDATE_FAILED"
    default_retryable = False


class ConcurrencyConflict(SagasError):
    """Another writer changed the same instance first."""

    default_code = "SAGA_RETRYABLE"
    default_retryable = True


class Fenced(SagasError):
    """A lease that this process held has a new holder; its write was refused by the store."""

    default_code = "SAGA_FENCED"
    default_retryable = True


class BackendUnavailable(SagasError):
    """A store, broker or service that did not answer in time, or refused to write."""

    default_code = "BACKEND_UNAVAILABLE"
    default_retryable = True


class StoreCorrupt(SagasError):
    """Stored bytes that are not what was written, or a file that is no store."""

    default_code = "STORE_CORRUPT"


class ConfigurationError(SagasError):
    """Settings that are missing, malformed or contradict each other."""

    default_code = "CONFIGURATION_ERROR"


class DeliveryFailed(SagasError):
    """An effect that its target refused (`retryable=False`) or did not confirm (`retryable=True`)."""

    default_code = "DELIVERY_FAILED"
    default_retryable = True
