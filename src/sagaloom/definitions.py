"""What a saga is, once built: frozen data that the runtime registers, describes and runs.

`sagaloom.define_saga` is how one is written; nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, TypeAlias, TypeVar, overload

import msgspec

from sagaloom.codec import Codec
from sagaloom.errors import DefinitionError
from sagaloom.ids import instance_id
from sagaloom.messages import SagaMessage, message_type_of

if TYPE_CHECKING:
    from sagaloom.effects import CascadedMessage

__all__ = [
    "ANY_TYPE",
    "SAGA_DURABILITY_TIERS",
    "SAGA_INSTANCE_STATUSES",
    "CatchUp",
    "CompensationBinding",
    "ConcurrencyPolicy",
    "Gathered",
    "HandlerBinding",
    "Invariant",
    "JoinBinding",
    "OnMissing",
    "OnUnexpected",
    "QueryBinding",
    "QueryDefinition",
    "RetentionPolicy",
    "RetryPolicy",
    "Reuse",
    "Saga",
    "SagaAbout",
    "SagaContext",
    "SagaCorrelation",
    "SagaDefinition",
    "SagaDurabilityTier",
    "SagaHandler",
    "SagaInstanceStatus",
    "SagaState",
    "SchedulePolicy",
    "SignalDefinition",
    "TimeoutPolicy",
    "UpdateBinding",
    "define_query",
    "define_signal",
]

S = TypeVar("S")
P = TypeVar("P")

SagaDurabilityTier = Literal["t1", "t2", "t3"]
SAGA_DURABILITY_TIERS: Final = ("t1", "t2", "t3")
SagaInstanceStatus = Literal["pending", "running", "compensating", "completed", "failed", "cancelled"]
SAGA_INSTANCE_STATUSES: Final = ("pending", "running", "completed", "failed", "compensating", "cancelled")
SagaState: TypeAlias = dict[str, Any]
"""An untyped state: handlers may change it in place. Typed ones are dataclasses, TypedDicts, Structs, attrs classes or
pydantic models."""

OnMissing = Literal["dead_letter", "discard", "wait"]
OnUnexpected = Literal["defer", "ignore", "dead_letter", "fail"]
Reuse = Literal["reject", "new_run"]
CatchUp = Literal["latest", "all", "none"]
ANY_TYPE: Final = "*"


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a failed attempt is made again: after `initial_interval_ms`, then `backoff_coefficient` times longer each
    time, never above `maximum_interval_ms`, with up to `jitter` (a fraction) taken off so that herds disperse."""

    maximum_attempts: int = 5
    initial_interval_ms: int = 1_000
    maximum_interval_ms: int = 60_000
    backoff_coefficient: float = 2.0
    jitter: float = 0.2
    non_retryable_error_types: tuple[str, ...] = ()


class Saga(Generic[S]):
    """The slot a handler works on: assign `saga.state`, or change it in place."""

    __slots__ = ("state",)

    def __init__(self, state: S) -> None:
        self.state = state


class SagaContext(Generic[S]):
    """What a handler may know beside its message. `now` is the only clock it may read; `attempt` counts from 1;
    `state` is the state before this message, a copy of its own, so changing it changes nothing."""

    # Few handlers ask for the state, the instance id or the trace, so these are found when one does.
    __slots__ = ("_codec", "_state", "_state_json", "attempt", "correlation_key", "message", "now", "run", "saga_id")

    def __init__(
        self,
        saga_id: str,
        correlation_key: str,
        run: int,
        message: SagaMessage[Any],
        attempt: int,
        now: datetime,
        codec: Codec[S],
        state_json: bytes,
    ) -> None:
        self.saga_id = saga_id
        self.correlation_key = correlation_key
        self.run = run
        self.message = message
        self.attempt = attempt
        self.now = now
        self._codec = codec
        self._state_json: bytes | None = state_json

    @property
    def state(self) -> S:
        if self._state_json is not None:
            self._state = self._codec.decode(self._state_json)
            self._state_json = None
        return self._state

    @property
    def instance_id(self) -> str:
        return instance_id(self.saga_id, self.correlation_key, self.run)

    @property
    def traceparent(self) -> str | None:
        return self.message.traceparent

    @property
    def tracestate(self) -> str | None:
        return self.message.tracestate


SagaHandler: TypeAlias = Callable[[Saga[S], SagaMessage[P], SagaContext[S]], "Sequence[CascadedMessage]"]
"""A synchronous, pure function `(saga, event, context) -> effects`."""

SagaCorrelation: TypeAlias = Callable[[SagaMessage[P]], str | None]
"""Reads the correlation key off a message; None falls back to the message's own `correlation_key`."""


JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
"""What an undeclared query may answer. That it is no `Any` is what lets a type checker refuse an async query."""


class SignalDefinition(msgspec.Struct, Generic[P], frozen=True):
    """The name of a signal and the type of its payload."""

    name: str
    payload: type[P] | None = None


class QueryDefinition(msgspec.Struct, Generic[P], frozen=True):
    """The name of a query and the type of its answer."""

    name: str
    result: type[P] | None = None


@overload
def define_signal(name: str, payload: type[P]) -> SignalDefinition[P]: ...
@overload
def define_signal(name: str, payload: None = None) -> SignalDefinition[Any]: ...
def define_signal(name: str, payload: type[Any] | None = None) -> SignalDefinition[Any]:
    """Names a signal, and the type of its payload if it has one; raises `DefinitionError` for an empty name.

    >>> define_signal("approve").name
    'approve'
    """
    return SignalDefinition(_checked_name(name, "Signal", "define_signal('approve')"), payload)


@overload
def define_query(name: str, result: type[P]) -> QueryDefinition[P]: ...
@overload
def define_query(name: str, result: None = None) -> QueryDefinition[JsonValue]: ...
def define_query(name: str, result: type[Any] | None = None) -> QueryDefinition[Any]:
    """Names a query, and the type of its answer; without one the answer is plain JSON. Raises `DefinitionError` for an
    empty name.

    >>> define_query("progress", int).result
    <class 'int'>
    """
    return QueryDefinition(_checked_name(name, "Query", "define_query('progress')"), result)


def _checked_name(name: object, what: str, example: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise DefinitionError(f"{what} name must not be empty. Got {name!r:.80}; write for example {example}.")
    return name.strip()


class Gathered(Mapping[str, Any]):
    """The payloads of the messages that a join has waited for, by message class or by wire type.

    def ready(saga, event, context):
        amount = event.payload[PaymentCaptured].amount
    """

    __slots__ = ("_payloads",)

    def __init__(self, payloads: Mapping[str, Any]) -> None:
        self._payloads = payloads

    @overload
    def __getitem__(self, key: type[P], /) -> P: ...
    @overload
    def __getitem__(self, key: str, /) -> Any: ...
    def __getitem__(self, key: type[Any] | str, /) -> Any:
        return self._payloads[key if isinstance(key, str) else message_type_of(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._payloads)

    def __len__(self) -> int:
        return len(self._payloads)

    def __repr__(self) -> str:
        return f"Gathered({dict(self._payloads)!r})"


@dataclass(frozen=True, slots=True)
class JoinBinding:
    """A handler that runs once all of its types have come, and the codecs of their payloads. `name` names the join in
    the store: its types in the order of the alphabet."""

    name: str
    handler: SagaHandler[Any, Gathered]
    codecs: Mapping[str, Codec[Any]]


@dataclass(frozen=True, slots=True)
class HandlerBinding:
    """A forward handler, the codec of its payload, and what happens when no instance is there."""

    type: str
    handler: SagaHandler[Any, Any]
    codec: Codec[Any]
    starts: bool = True
    on_missing: OnMissing = "dead_letter"
    patience: timedelta = timedelta(hours=1)
    """How long the message waits for an instance to appear, with `on_missing="wait"`."""
    during: Mapping[str, SagaHandler[Any, Any]] | None = None
    """The handlers of a type that is bound to statuses, by status; then `handler` is that of any of them."""
    on_unexpected: OnUnexpected = "defer"
    """What becomes of a message that comes in another status."""
    joins: tuple[JoinBinding, ...] = ()
    """Those that wait for a message of this type."""
    is_gathered_only: bool = False
    """Whether the type has no handler but theirs."""

    answers: ClassVar[bool] = False
    """Whether somebody waits for what the handler has to say."""


@dataclass(frozen=True, slots=True)
class UpdateBinding(HandlerBinding):
    """The handler of an update: of a signal whose caller waits for the answer."""

    answers: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class QueryBinding:
    """A read of the state, and the codec of its answer."""

    name: str
    handler: Callable[[Any], Any]
    codec: Codec[Any]


@dataclass(frozen=True, slots=True)
class CompensationBinding:
    """An undo handler and the codec of its payload."""

    type: str
    handler: SagaHandler[Any, Any]
    codec: Codec[Any]


@dataclass(frozen=True, slots=True)
class Invariant:
    """A named predicate over the state that every transition must keep true."""

    name: str
    predicate: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class ConcurrencyPolicy:
    """How many messages run at once, per derived key."""

    limit: int
    key: Callable[[SagaMessage[Any]], str] | None = None
    on_limit: Literal["reject", "wait"] = "reject"


@dataclass(frozen=True, slots=True)
class SchedulePolicy:
    """When a saga ticks, and the message of a tick: `payload` is JSON, to which each tick adds `scheduledFor`."""

    cron: str
    message_type: str
    timezone: str = "UTC"
    catch_up: CatchUp = "latest"
    payload: bytes = b"{}"
    correlation_key: str | None = None
    concurrency_key: str | None = None

    def payload_at(self, scheduled_for: datetime, *, is_manual: bool = False) -> bytes:
        """The payload of one tick. A JSON object gets `scheduledFor`, in place of one of its own, and `manual` when
        somebody asked for the tick; anything else has no place for them and stays as it is.

        >>> from datetime import UTC
        >>> nightly = SchedulePolicy("0 0 * * *", "Nightly", payload=b'{"full":true}')
        >>> nightly.payload_at(datetime(2026, 1, 31, tzinfo=UTC))
        b'{"full":true,"scheduledFor":"2026-01-31T00:00:00Z"}'
        """
        if not self.payload.startswith(b"{"):
            return self.payload
        # Raw: numbers that only JSON can carry stay as they were written.
        fields: dict[str, Any] = msgspec.json.decode(self.payload, type=dict[str, msgspec.Raw])
        fields["scheduledFor"] = scheduled_for
        if is_manual:
            fields["manual"] = True
        return msgspec.json.encode(fields)


@dataclass(frozen=True, slots=True)
class TimeoutPolicy:
    """A message that every run gets when it is still live after `delay`, by a timer called `name`. `payload` is
    JSON."""

    delay: timedelta
    message_type: str
    name: str = "timeout"
    payload: bytes = b"{}"


_NOTHING: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """How many days a finished run is kept, and after how many a live one is worth a look. None: for ever, never."""

    completed_days: float | None = None
    active_days: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaAbout:
    """What a project's configuration says of a saga beside its definition (`sagaloom.config`): for people and tools,
    except for `enabled` and `retention`. A disabled saga takes nothing in, and what was accepted for it waits. In a
    running process `enabled` and `paused` are also what operators have said, and `said` is the reason they gave."""

    name: str | None = None
    description: str | None = None
    topic: str = "default"
    enabled: bool = True
    entrypoint: str = ""
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    paused: bool = False
    said: str | None = None

    @property
    def stands_still(self) -> bool:
        """Whether messages are to wait."""
        return self.paused or not self.enabled


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SagaDefinition(Generic[S]):
    """The frozen saga that `build()` returns.

    `correlations` maps a message type, or `"*"`, to its rule. `migrations` maps an old version to the function that
    makes its state one version newer. `fingerprint` changes whenever anything that matters does.
    """

    id: str
    version: int = 1
    durability: SagaDurabilityTier = "t1"
    initial_state: S
    state_codec: Codec[S]
    handlers: Mapping[str, HandlerBinding]
    compensations: Mapping[str, CompensationBinding] = field(default_factory=lambda: _NOTHING)
    correlations: Mapping[str, SagaCorrelation[Any]] = field(default_factory=lambda: _NOTHING)
    signals: Mapping[str, HandlerBinding] = field(default_factory=lambda: _NOTHING)
    updates: Mapping[str, UpdateBinding] = field(default_factory=lambda: _NOTHING)
    queries: Mapping[str, QueryBinding] = field(default_factory=lambda: _NOTHING)
    joins: tuple[JoinBinding, ...] = ()
    status_field: str = "status"
    """The field of the state that `.during` goes by."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    reuse: Reuse = "reject"
    is_singleton: bool = False
    invariants: tuple[Invariant, ...] = ()
    migrations: Mapping[int, Callable[[Any], Any]] = field(default_factory=lambda: _NOTHING)
    concurrency: ConcurrencyPolicy | None = None
    schedule: SchedulePolicy | None = None
    timeouts: tuple[TimeoutPolicy, ...] = ()
    pivots: frozenset[str] = frozenset()
    """The types whose messages are points of no return."""
    fingerprint: str = ""
    source: str = ""
    """Where the definition was built, as `file:line`, for errors; no part of the fingerprint."""
    about: SagaAbout = field(default_factory=SagaAbout)
    """What its configuration says of it; no part of the fingerprint."""
    initial_json: bytes = b""
    """The initial state as JSON, from which every instance gets a state of its own."""

    @property
    def handled_message_types(self) -> tuple[str, ...]:
        """The types with a forward handler, in the order of their declaration."""
        return tuple(self.handlers)

    @property
    def starting_types(self) -> tuple[str, ...]:
        """The types that may open a new instance."""
        return tuple(name for name, binding in self.handlers.items() if binding.starts)

    def fresh_state(self) -> S:
        """A state for a new instance, shared with nobody."""
        return self.state_codec.decode(self.initial_json or self.state_codec.encode(self.initial_state))
