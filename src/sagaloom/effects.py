"""Effects: the only thing a handler can do to the world is to return some of these.

They are values. The engine writes them down in the same commit as the new state, and only then do they happen.

    saga_complete(result)      terminal success          send(target, payload)       a command that leaves, or stays
    saga_fail(reason)          terminal failure          schedule(message, delay)    a message to oneself, later
    saga_compensate(message)   run the matching undo     spawn(child, input)         a child saga
    cancel_scheduled(name)     take a named one back         answer(value)              what an update answers
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Literal, final

import msgspec

from sagaloom.definitions import RetryPolicy, SagaDefinition
from sagaloom.durations import check_delay
from sagaloom.errors import DefinitionError
from sagaloom.messages import SagaMessage, as_message

__all__ = [
    "ALL_STEPS",
    "CASCADED_MESSAGE_KINDS",
    "AllSteps",
    "Answer",
    "CancelScheduled",
    "CascadedMessage",
    "Compensate",
    "Complete",
    "Fail",
    "Scheduled",
    "Send",
    "Spawn",
    "Target",
    "answer",
    "cancel_scheduled",
    "saga_compensate",
    "saga_complete",
    "saga_fail",
    "schedule",
    "send",
    "spawn",
]

CASCADED_MESSAGE_KINDS: Final = (
    "send",
    "scheduled",
    "spawn",
    "complete",
    "fail",
    "compensate",
    "cancel_scheduled",
    "answer",
)
_TARGET_FIELDS: Final = {"kind", "id"}
_OPTIONS: Final = {
    "idempotency_key": "idempotency_key",
    "idempotencyKey": "idempotency_key",
    "concurrency_key": "concurrency_key",
    "concurrencyKey": "concurrency_key",
    "retry": "retry",
    "queue": "queue",
    "on_dead_letter": "on_dead_letter",
    "onDeadLetter": "on_dead_letter",
    "on_parent_cancel": "on_parent_cancel",
    "onParentCancel": "on_parent_cancel",
}
_OF_A_CHILD: Final = ("on_parent_cancel",)


@final
class AllSteps:
    """The type of `ALL_STEPS`."""

    def __repr__(self) -> str:
        return "ALL_STEPS"


ALL_STEPS: Final = AllSteps()
"""Given to `saga_compensate`: undo every applied step that has a compensation, newest first, and end failed."""


class Target(msgspec.Struct, frozen=True):
    """Where a command goes: a kind (`saga`, `service`, `job`, `queue`, or one the host registered) and an id."""

    kind: str
    id: str


class CascadedMessage(msgspec.Struct, frozen=True):
    """What a handler may return in its list."""

    kind: ClassVar[str]


class Complete(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "complete"
    result: Any = None


class Fail(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "fail"
    reason: str


class Compensate(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "compensate"
    message: SagaMessage[Any] | None
    """None stands for `ALL_STEPS`."""
    reason: str | None = None


class Send(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "send"
    target: Target
    payload: Any
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    retry: RetryPolicy | None = None
    queue: str | None = None
    on_dead_letter: Literal["stall", "continue"] = "stall"


class Scheduled(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "scheduled"
    message: SagaMessage[Any]
    delay: datetime | timedelta | int | float | str
    """Resolved against `context.now` when the handler's list is decided."""
    name: str | None = None


class CancelScheduled(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "cancel_scheduled"
    name: str


class Spawn(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "spawn"
    child: str
    input: Any
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    on_parent_cancel: Literal["cancel", "abandon"] = "cancel"


class Answer(CascadedMessage, frozen=True):
    kind: ClassVar[str] = "answer"
    value: Any = None


def saga_complete(result: object = None) -> CascadedMessage:
    """Ends the instance as `completed` and records `result`.

    >>> saga_complete({"orderId": "o-1"})
    Complete(result={'orderId': 'o-1'})
    """
    return Complete(result)


def saga_fail(reason: str | BaseException) -> CascadedMessage:
    """Ends the instance as `failed` and records why. In a forward handler the compensation of the current message
    type runs first, if there is one.

    >>> saga_fail("out of stock")
    Fail(reason='out of stock')
    """
    if isinstance(reason, BaseException):
        reason = str(reason) or type(reason).__name__
    if not isinstance(reason, str):
        raise DefinitionError(f"saga_fail takes a string or an exception, got {type(reason).__name__}: {reason!r:.80}")
    return Fail(reason)


def saga_compensate(message: object, reason: str | None = None) -> CascadedMessage:
    """Runs the compensation registered for the type of `message`, in the same decision. `ALL_STEPS` undoes every
    applied step that has a compensation, newest first, and ends the instance as `failed`.

    >>> saga_compensate(ALL_STEPS, "the customer changed her mind")
    Compensate(message=None, reason='the customer changed her mind')
    """
    _check_text("saga_compensate", "reason", reason)
    if isinstance(message, AllSteps):
        return Compensate(None, reason)
    if isinstance(message, CascadedMessage):
        raise DefinitionError(f"saga_compensate takes a message, got the effect {message.kind!r}: name what to undo")
    return Compensate(as_message(message), reason)


def send(
    target: Target | Mapping[str, str] | str,
    payload: object,
    options: Mapping[str, Any] | None = None,
    *,
    idempotency_key: str | None = None,
    concurrency_key: str | None = None,
    retry: RetryPolicy | None = None,
    queue: str | None = None,
    on_dead_letter: Literal["stall", "continue"] | None = None,
) -> CascadedMessage:
    """Sends a command to `target`: `{"kind": "service", "id": "payments"}`, `"service:payments"`, or a bare message
    type, which stays among the sagas of this store. Options come as a mapping or as keywords.

    >>> send("service:payments", {"charge": 100}, on_dead_letter="continue").target
    Target(kind='service', id='payments')
    """
    if type(payload) is not dict and isinstance(payload, CascadedMessage):
        raise DefinitionError(f"send takes a payload, got the effect {payload.kind!r}: return it from the handler")
    chosen = _options("send", options) if options else {}
    if idempotency_key is not None:
        chosen["idempotency_key"] = idempotency_key
    if concurrency_key is not None:
        chosen["concurrency_key"] = concurrency_key
    if retry is not None:
        chosen["retry"] = retry
    if queue is not None:
        chosen["queue"] = queue
    if on_dead_letter is not None:
        chosen["on_dead_letter"] = on_dead_letter
    if not chosen:
        return Send(_target(target), payload)
    for name in ("idempotency_key", "concurrency_key", "queue"):
        _check_text("send", name, chosen.get(name))
    if chosen.get("on_dead_letter", "stall") not in ("stall", "continue"):
        raise DefinitionError(f"send: on_dead_letter must be 'stall' or 'continue', got {chosen['on_dead_letter']!r}")
    if not isinstance(chosen.get("retry", RetryPolicy()), RetryPolicy):
        raise DefinitionError(f"send: retry must be a RetryPolicy(...), got {chosen['retry']!r:.80}")
    return Send(_target(target), payload, **chosen)


def schedule(message: object, delay: datetime | timedelta | float | str, name: str | None = None) -> CascadedMessage:
    """Delivers `message` to this run after `delay`: an aware datetime, a timedelta, milliseconds, or `"250ms"`,
    `"30s"`, `"5m"`, `"2h"`, `"1d"`. A second one under the same `name` replaces the first.

    >>> schedule({"type": "PaymentOverdue"}, "2h", name="payment").delay
    '2h'
    """
    if isinstance(message, CascadedMessage):
        raise DefinitionError(f"schedule takes a message, got the effect {message.kind!r}: return it from the handler")
    _check_text("schedule", "name", name)
    if name is not None and not name.strip():
        raise DefinitionError("schedule: name must not be empty; leave it out for a timer that nobody cancels")
    return Scheduled(as_message(message), check_delay(delay), name)


def cancel_scheduled(name: str) -> CascadedMessage:
    """Takes back the message scheduled under `name`; nothing happens when there is none.

    >>> cancel_scheduled("payment")
    CancelScheduled(name='payment')
    """
    if not isinstance(name, str) or not name.strip():
        raise DefinitionError(f"cancel_scheduled: name must be a non-empty string, got {name!r:.80}")
    return CancelScheduled(name)


def answer(value: object = None) -> CascadedMessage:
    """What the caller of an update gets to hear, as JSON; only the handler of an update may return one, and at most
    one. To refuse the update instead, raise `UpdateRefused`.

    >>> answer({"approved": True})
    Answer(value={'approved': True})
    """
    if isinstance(value, CascadedMessage):
        raise DefinitionError(f"answer takes a value, got the effect {value.kind!r}: return it beside the answer")
    return Answer(value)


def spawn(
    child: SagaDefinition[Any] | str,
    input: object,
    options: Mapping[str, Any] | None = None,
    *,
    idempotency_key: str | None = None,
    concurrency_key: str | None = None,
    on_parent_cancel: Literal["cancel", "abandon"] | None = None,
) -> CascadedMessage:
    """Starts a child saga, in the same commit. `input` is a message, or the payload of the child's first starting
    type. The child's end comes back as `<child id>:completed`, `:failed` or `:cancelled`. When this run is cancelled or
    terminated, so is the child, unless `on_parent_cancel="abandon"` lets it live.

    >>> spawn("shipment", {"orderId": "o-1"}).child
    'shipment'
    """
    if isinstance(input, CascadedMessage):
        raise DefinitionError(f"spawn takes the child's input, got the effect {input.kind!r}: return it instead")
    child_id = child.id if isinstance(child, SagaDefinition) else child
    if not isinstance(child_id, str) or not child_id.strip():
        raise DefinitionError(f"spawn takes a saga definition or its id, got {child!r:.80}")
    chosen = _options("spawn", options, only=("idempotency_key", "concurrency_key", "on_parent_cancel"))
    if idempotency_key is not None:
        chosen["idempotency_key"] = idempotency_key
    if concurrency_key is not None:
        chosen["concurrency_key"] = concurrency_key
    if on_parent_cancel is not None:
        chosen["on_parent_cancel"] = on_parent_cancel
    for name, value in chosen.items():
        _check_text("spawn", name, value)
    if chosen.get("on_parent_cancel", "cancel") not in ("cancel", "abandon"):
        given = chosen["on_parent_cancel"]
        raise DefinitionError(f"spawn: on_parent_cancel must be 'cancel' or 'abandon', got {given!r:.80}")
    return Spawn(child_id.strip(), input, **chosen)


def _check_text(what: str, name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise DefinitionError(f"{what}: {name} must be a string, got {type(value).__name__}: {value!r:.80}")


def _target(target: Target | Mapping[str, str] | str) -> Target:
    if isinstance(target, str):
        return _written_target(target)
    if isinstance(target, Target):
        return _named_target(target.kind, target.id)
    if isinstance(target, Mapping) and target.keys() == _TARGET_FIELDS:
        with contextlib.suppress(TypeError):  # an unhashable part is refused below, as what it is
            return _named_target(target["kind"], target["id"])
    raise DefinitionError(f"send target {target!r:.80} must be {{'kind': ..., 'id': ...}}, 'kind:id' or a type")


# A saga sends to the same few targets for ever.
@functools.lru_cache(maxsize=1024)
def _written_target(target: str) -> Target:
    kind, separator, identifier = target.partition(":")
    return _named_target(kind, identifier) if separator else _named_target("saga", target)


@functools.lru_cache(maxsize=1024)
def _named_target(kind: str, identifier: str) -> Target:
    if not (isinstance(kind, str) and isinstance(identifier, str) and kind.strip() and identifier.strip()):
        raise DefinitionError("Cascaded message target must not be empty.")
    # `message` is how the TypeScript system spells a bare message type.
    return Target("saga" if kind == "message" else kind.strip(), identifier.strip())


def _options(what: str, options: Mapping[str, Any] | None, *, only: tuple[str, ...] | None = None) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, value in (options or {}).items():
        known = _OPTIONS.get(name)
        if known is None or (known not in only if only is not None else known in _OF_A_CHILD):
            allowed = ", ".join(only or [each for each in dict.fromkeys(_OPTIONS.values()) if each not in _OF_A_CHILD])
            raise DefinitionError(f"{what}: unknown option {name!r}; it takes {allowed}")
        if value is not None:
            chosen[known] = value
    return chosen
