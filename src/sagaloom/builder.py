"""The fluent way to write a saga, in three frozen stages that each offer only what is legal.

    define_saga(id) -> SagaDraft            settings, .state
                       SagaWithState[S]     settings, handlers
                       SagaWithHandlers[S]  settings, handlers, .build

Every call returns a new stage and leaves the old one as it was, so that a common beginning can be shared. A rule that
is broken is broken at the call that breaks it, with a `DefinitionError` that names the value, the saga and the way out;
a type checker sees the same rules, because the methods that would be illegal are not there.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Self, TypeAlias, TypeVar, cast, get_args, overload

from sagaloom.codec import Codec, codec_for, encode_any, is_declared_class, type_name
from sagaloom.cron import parse_cron
from sagaloom.definitions import (
    ANY_TYPE,
    SAGA_DURABILITY_TIERS,
    CatchUp,
    CompensationBinding,
    ConcurrencyPolicy,
    Gathered,
    HandlerBinding,
    Invariant,
    JoinBinding,
    OnMissing,
    OnUnexpected,
    QueryBinding,
    QueryDefinition,
    RetryPolicy,
    Reuse,
    SagaCorrelation,
    SagaDefinition,
    SagaDurabilityTier,
    SagaHandler,
    SchedulePolicy,
    SignalDefinition,
    TimeoutPolicy,
    UpdateBinding,
)
from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError, SagasError
from sagaloom.fingerprint import fingerprint_of
from sagaloom.ids import check_key, check_saga_id
from sagaloom.messages import RESERVED_PREFIX, SagaMessage, as_message, message_type_of

__all__ = ["SagaBuilder", "SagaDraft", "SagaWithHandlers", "SagaWithState", "define_saga"]

S = TypeVar("S")
P = TypeVar("P")

OnLimit = Literal["reject", "wait"]

_Migration: TypeAlias = Callable[[Any], Any]
_HANDLER = "a handler takes (saga, event, context)"
_OF_A_TICK = ("correlation_key", "concurrency_key")
_A_MOMENT = datetime(2000, 1, 1, tzinfo=UTC)
_NEEDS_STATE = frozenset(
    ("on", "compensate", "during", "when_all", "on_signal", "on_query", "on_update", "invariant", "build")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """All that has been said about a saga so far."""

    id: str
    version: int = 1
    durability: SagaDurabilityTier = "t1"
    initial_json: bytes = b""
    state_codec: Codec[Any] | None = None
    handlers: Mapping[str, HandlerBinding] = dataclasses.field(default_factory=dict[str, HandlerBinding])
    compensations: Mapping[str, CompensationBinding] = dataclasses.field(default_factory=dict[str, CompensationBinding])
    correlations: Mapping[str, SagaCorrelation[Any]] = dataclasses.field(
        default_factory=dict[str, SagaCorrelation[Any]]
    )
    concurrency: ConcurrencyPolicy | None = None
    joins: tuple[JoinBinding, ...] = ()
    status_field: str = "status"
    signals: Mapping[str, HandlerBinding] = dataclasses.field(default_factory=dict[str, HandlerBinding])
    updates: Mapping[str, UpdateBinding] = dataclasses.field(default_factory=dict[str, UpdateBinding])
    queries: Mapping[str, QueryBinding] = dataclasses.field(default_factory=dict[str, QueryBinding])
    retry: RetryPolicy = dataclasses.field(default_factory=RetryPolicy)
    reuse: Reuse = "reject"
    is_singleton: bool = False
    invariants: tuple[Invariant, ...] = ()
    migrations: Mapping[int, _Migration] = dataclasses.field(default_factory=dict[int, Callable[[Any], Any]])
    schedule: SchedulePolicy | None = None
    timeouts: tuple[TimeoutPolicy, ...] = ()
    pivots: frozenset[str] = frozenset()

    @property
    def where(self) -> str:
        return f"saga {self.id!r}"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Stage:
    """The settings that every stage offers."""

    _data: _Data

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._data.id!r}, handles {list(self._data.handlers)}>"

    def _with(self, **changes: Any) -> Self:
        return type(self)(dataclasses.replace(self._data, **changes))

    def durability(self, tier: SagaDurabilityTier) -> Self:
        """Sets what a store must promise for this saga's state: `"t1"` (the default), `"t2"` or `"t3"`.

        >>> define_saga("order").durability("t2")
        <SagaDraft 'order', handles []>
        """
        return self._with(durability=_one_of(tier, SAGA_DURABILITY_TIERS, f"{self._data.where}: durability tier"))

    @overload
    def correlate(self, rule: SagaCorrelation[Any], /) -> Self: ...
    @overload
    def correlate(self, message: type[P], rule: SagaCorrelation[P], /) -> Self: ...
    @overload
    def correlate(self, message: str, rule: SagaCorrelation[Any], /) -> Self: ...
    def correlate(self, message: Any, rule: Any = None, /) -> Self:
        """Says how to read the correlation key off a message, for all types or for one (its class or wire type). The
        rule of a type goes before the general one; a rule that returns None leaves it to the message's own key.

        >>> define_saga("order").correlate(lambda message: message.payload["orderId"])
        <SagaDraft 'order', handles []>
        """
        data = self._data
        if rule is None and (isinstance(message, (type, str))):
            raise DefinitionError(
                f"{data.where}: .correlate({_shown(message)}) has no rule: write .correlate({_shown(message)}, rule), "
                "where rule takes the message and returns its key"
            )
        name, rule = (ANY_TYPE, message) if rule is None else (_wire_type(data, message, "correlation"), rule)
        _check_function(rule, 1, f"{data.where}: the correlation rule", "a rule takes (message) and returns its key")
        if name in data.correlations:
            what = "a general correlation rule" if name == ANY_TYPE else f"a correlation rule for {name!r}"
            raise DefinitionError(f"{data.where} already has {what}: put both into one rule")
        return self._with(correlations={**data.correlations, name: rule})

    def retry(self, policy: RetryPolicy) -> Self:
        """Sets when a failed attempt is made again. The default is five attempts, 1 s apart, doubling, up to 60 s.

        >>> from sagaloom.definitions import RetryPolicy
        >>> define_saga("order").retry(RetryPolicy(maximum_attempts=3))
        <SagaDraft 'order', handles []>
        """
        check_retry(self._data.where, policy)
        return self._with(retry=policy)

    def reuse(self, policy: Reuse) -> Self:
        """Says what a message does whose instance has ended: `"reject"` (the default) ignores it, on the record;
        `"new_run"` opens the next run.

        >>> define_saga("order").reuse("new_run")
        <SagaDraft 'order', handles []>
        """
        return self._with(reuse=_one_of(policy, get_args(Reuse), f"{self._data.where}: reuse"))

    def singleton(self) -> Self:
        """Lets all messages that carry no key share one instance.

        >>> define_saga("order").singleton()
        <SagaDraft 'order', handles []>
        """
        return self._with(is_singleton=True)

    def version(
        self, number: int, *, migrate: Mapping[int, Callable[[Mapping[str, Any]], object]] | None = None
    ) -> Self:
        """Sets the version of the stored state. `migrate` maps an old version to the function that makes its state, as
        plain JSON, one version newer; the steps must lead up to `number` without a gap.

        >>> define_saga("order").version(2, migrate={1: lambda state: {**state, "currency": "EUR"}})
        <SagaDraft 'order', handles []>
        """
        where = self._data.where
        if not _is_int(number) or number < 1:
            raise DefinitionError(f"{where}: version must be an integer from 1 on, got {number!r:.80}")
        steps = dict(migrate or {})
        for old, step in steps.items():
            if not _is_int(old) or not 1 <= old < number:
                raise DefinitionError(
                    f"{where}: migrate has a step from version {old!r:.80}: with .version({number}) steps start at 1 "
                    f"to {number - 1}"
                )
            _check_function(step, 1, f"{where}: the migration from version {old}", "a migration takes (state)")
        missing = [old for old in range(min(steps, default=number), number) if old not in steps]
        if missing:
            raise DefinitionError(
                f"{where}: .version({number}) has migrations from {_listed(sorted(steps))}, but none from "
                f"{_listed(missing)}: every version between the oldest one and {number} needs its step"
            )
        return self._with(version=number, migrations=steps)

    def concurrency(
        self,
        limit: int,
        key: Callable[[SagaMessage[Any]], str] | None = None,
        *,
        on_limit: OnLimit = "reject",
    ) -> Self:
        """Bounds how many messages of the saga are under way at once, over all processes: from their acceptance until
        they are settled, retries included.

        `key` is asked for the concurrency key of a message that has none of its own; each key has its own `limit`, and
        messages without any share one. `on_limit`: a publish that finds no place is refused, 409 and retryable
        (`"reject"`), or is accepted and waits (`"wait"`). Messages from sagas, targets and timers always wait.

        >>> define_saga("order").concurrency(3, lambda message: message.payload["customer"], on_limit="wait")
        <SagaDraft 'order', handles []>
        """
        where = self._data.where
        if not _is_int(limit) or limit < 1:
            raise DefinitionError(f"Saga concurrency limit must be a positive integer. {where}: got {limit!r:.80}.")
        if key is not None:
            _check_function(key, 1, f"{where}: the concurrency key", "it takes (message) and returns a string")
        _one_of(on_limit, get_args(OnLimit), f"{where}: concurrency on_limit")
        return self._with(concurrency=ConcurrencyPolicy(limit, key, on_limit))

    def schedule(
        self, cron: str, *, message: object = None, timezone: str = "UTC", catch_up: CatchUp = "latest"
    ) -> Self:
        """Ticks the saga by a five-field cron expression in a named zone: each tick is a message `<saga id>:tick` with
        the payload `{"scheduledFor": "2026-01-31T03:00:00Z"}`, delivered once over any number of processes.

        `message` names another type (its class or wire type), or is a message whose payload, when it is an object, gets
        `scheduledFor` beside its own fields. Only this saga gets it. `catch_up` says what becomes of ticks that were
        missed, which is more than a minute late: the newest one fires (`"latest"`), or `"all"`, or `"none"`.

        >>> define_saga("report").schedule("0 3 * * *", timezone="Europe/Berlin", catch_up="all")
        <SagaDraft 'report', handles []>
        """
        data = self._data
        where = data.where
        if not isinstance(cron, str) or not cron.strip():
            raise DefinitionError(f"Saga schedule must not be empty. {where}: write for example '0 3 * * *'.")
        if not isinstance(timezone, str) or not timezone.strip():
            raise DefinitionError(f"{where}: schedule timezone {timezone!r:.80} must be a zone name, such as 'UTC'")
        if data.schedule is not None:
            raise DefinitionError(
                f"{where} has the schedule {data.schedule.cron!r} already: a saga has one, so put both into one "
                "expression, or let two sagas send to this one"
            )
        _one_of(catch_up, get_args(CatchUp), f"{where}: schedule catch_up")
        try:
            read = parse_cron(cron, timezone.strip())
        except DefinitionError as error:
            raise DefinitionError(f"{where}: schedule: {error.message}") from error
        said = _said(data, "schedule", f"{data.id}:tick" if message is None else message, _OF_A_TICK)
        policy = SchedulePolicy(
            read.expression,
            said.type,
            read.timezone,
            catch_up,
            said.payload,
            said.correlation_key,
            said.concurrency_key,
        )
        return self._with(schedule=policy)

    def timeout(self, delay: timedelta | float | str, *, message: object, name: str = "timeout") -> Self:
        """Sends `message` (a type, or a message with a payload) to every run that is still live `delay` after it was
        opened. The timer is set in the commit that opens the run, under `name`, by which a handler takes it back:
        `cancel_scheduled("timeout")`. A second timeout needs a name of its own.

        >>> define_saga("order").timeout("30m", message="PaymentOverdue")
        <SagaDraft 'order', handles []>
        """
        data = self._data
        where = data.where
        try:
            length = parse_duration(delay)
        except DefinitionError as error:
            raise DefinitionError(f"{where}: timeout: {error.message}") from error
        if not length:
            raise DefinitionError(f"{where}: timeout must be longer than nothing, got {delay!r:.80}")
        if not isinstance(name, str) or not name.strip():
            raise DefinitionError(f"{where}: timeout name must be a non-empty string, got {name!r:.80}")
        if any(one.name == name for one in data.timeouts):
            raise DefinitionError(
                f"{where} already has a timeout called {name!r:.80}: give this one a name, as in "
                ".timeout(..., name='reminder')"
            )
        _checked_key(where, "timeout name", name)
        said = _said(data, "timeout", message, ())
        return self._with(timeouts=(*data.timeouts, TimeoutPolicy(length, said.type, name, said.payload)))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SagaDraft(_Stage):
    """A saga that has no state yet: `.state(...)` comes before any handler."""

    @overload
    def state(self, initial: dict[str, Any], *, status_field: str = "status") -> SagaWithState[dict[str, Any]]: ...
    @overload
    def state(self, initial: S, *, status_field: str = "status") -> SagaWithState[S]: ...
    @overload
    def state(self, initial: object, *, type: type[S], status_field: str = "status") -> SagaWithState[S]: ...
    def state(self, initial: Any, *, type: Any = None, status_field: str = "status") -> SagaWithState[Any]:
        """Declares the state that a new instance starts with, and with it the type of the state.

        A dict is untyped JSON. An instance of a dataclass, `msgspec.Struct`, attrs class or pydantic model is typed by
        its class. A TypedDict is a plain dict when the program runs, so its type has to be named to be checked there.
        The value is encoded now, and every instance gets one of its own. `status_field` names the field that `.during`
        goes by.

        >>> from typing import TypedDict
        >>> class OrderState(TypedDict):
        ...     status: str
        >>> define_saga("order").state({"status": "new"})
        <SagaWithState 'order', handles []>
        >>> define_saga("order").state({"status": "new"}, type=OrderState)
        <SagaWithState 'order', handles []>
        """
        data = self._data
        declared = type
        if declared is None:
            if not isinstance(initial, dict) and not is_declared_class(initial.__class__):
                hint = "give an instance of it" if isinstance(initial, _TYPE) else "give a dict or an instance of one"
                raise DefinitionError(
                    f"Saga initial state is missing. {data.where}: {_shown(initial)} is no state: a state is a dict, "
                    f"dataclass, TypedDict, msgspec.Struct, attrs class or pydantic model; {hint}"
                )
            declared = None if isinstance(initial, dict) else initial.__class__
        try:
            codec = codec_for(declared)
            encoded = codec.encode(initial)
        except SagasError as error:
            raise DefinitionError(
                f"{data.where}: initial state: {error.message}", code=error.code, data=error.data
            ) from error
        if not isinstance(status_field, str) or not status_field.strip():
            raise DefinitionError(f"{data.where}: status_field must be the name of a field, got {status_field!r:.80}")
        return SagaWithState(
            dataclasses.replace(data, initial_json=encoded, state_codec=codec, status_field=status_field)
        )

    if not TYPE_CHECKING:  # for a type checker these methods are not there, which is the point of a stage

        def __getattr__(self, name: str) -> NoReturn:
            if name in _NEEDS_STATE:
                raise DefinitionError(
                    f"{self._data.where}: .{name}(...) comes too early: call .state(initial) first, so that handlers "
                    "have a state to work on"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SagaWithState(_Stage, Generic[S]):
    """A saga that knows its state, and takes handlers."""

    @overload
    def on(
        self,
        message: type[P],
        handler: SagaHandler[S, P],
        *,
        starts: bool = True,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
        pivot: bool = False,
    ) -> SagaWithHandlers[S]: ...
    @overload
    def on(
        self,
        message: str,
        handler: SagaHandler[S, P],
        *,
        payload: type[P],
        starts: bool = True,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
        pivot: bool = False,
    ) -> SagaWithHandlers[S]: ...
    @overload
    def on(
        self,
        message: str,
        handler: SagaHandler[S, Any],
        *,
        starts: bool = True,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
        pivot: bool = False,
    ) -> SagaWithHandlers[S]: ...
    def on(
        self,
        message: Any,
        handler: Any,
        *,
        payload: Any = None,
        starts: bool = True,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
        pivot: bool = False,
    ) -> SagaWithHandlers[S]:
        """Registers the handler of a message type, given as a message class or as the wire type.

        With a class the payload is an instance of it; with a wire type it is plain JSON, or what `payload=` says.
        `starts`: the message may open an instance. `on_missing`: what becomes of it when it may not, and none is live:
        with `"wait"` it waits for one, for as long as its `patience` (a timedelta, milliseconds, or `"1h"`) lasts.
        `pivot`: it is a point of no return. Once it has been applied, the steps before it are not undone any more by
        `ALL_STEPS` or a cancel.

        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class OrderPlaced:
        ...     order_id: str
        >>> define_saga("order").state({}).on(OrderPlaced, lambda saga, event, context: [])
        <SagaWithHandlers 'order', handles ['OrderPlaced']>
        """
        data = self._data
        name = _wire_type(data, message, "event")
        codec = _payload_codec(data, name, message, payload)
        _check_function(handler, 3, f"{data.where}: the handler of {name!r}", _HANDLER)
        missing = _checked_missing(data, name, starts, on_missing, patience)
        if not isinstance(pivot, bool):
            raise DefinitionError(f"{data.where}: pivot of {name!r} must be True or False, got {pivot!r:.80}")
        known = data.handlers.get(name)
        if known is not None and not known.is_gathered_only:
            how = "a handler" if known.during is None else "handlers during some statuses"
            raise DefinitionError(
                f"{data.where} already has {how} for {name!r}: put both into one, or give the message another type"
            )
        joins = known.joins if known is not None else ()
        _check_codecs(data, name, codec, joins)
        binding = HandlerBinding(name, handler, codec, starts, on_missing, missing, joins=joins)
        pivots = data.pivots | {name} if pivot else data.pivots
        return SagaWithHandlers(dataclasses.replace(data, handlers={**data.handlers, name: binding}, pivots=pivots))

    @overload
    def compensate(self, message: type[P], handler: SagaHandler[S, P]) -> Self: ...
    @overload
    def compensate(self, message: str, handler: SagaHandler[S, P], *, payload: type[P]) -> Self: ...
    @overload
    def compensate(self, message: str, handler: SagaHandler[S, Any]) -> Self: ...
    def compensate(self, message: Any, handler: Any, *, payload: Any = None) -> Self:
        """Registers what undoes a step: the handler that runs when another one returns `saga_compensate(message)` for a
        message of this type, or fails while handling one.

        >>> define_saga("order").state({}).compensate("OrderPlaced", lambda saga, event, context: [])
        <SagaWithState 'order', handles []>
        """
        data = self._data
        name = _wire_type(data, message, "compensation event")
        codec = _payload_codec(data, name, message, payload)
        _check_function(handler, 3, f"{data.where}: the compensation of {name!r}", _HANDLER)
        if name in data.compensations:
            raise DefinitionError(f"{data.where} already has a compensation for {name!r}: put both into one")
        binding = CompensationBinding(name, handler, codec)
        return self._with(compensations={**data.compensations, name: binding})

    def invariant(self, name: str, predicate: Callable[[S], bool]) -> Self:
        """Names something that must be true of the state after every transition; one that breaks it is refused.

        >>> define_saga("order").state({"paid": 0}).invariant("paid is not negative", lambda state: state["paid"] >= 0)
        <SagaWithState 'order', handles []>
        """
        data = self._data
        if not isinstance(name, str) or not name.strip():
            raise DefinitionError(f"{data.where}: invariant name must not be empty, got {name!r:.80}: say what holds")
        if any(one.name == name.strip() for one in data.invariants):
            raise DefinitionError(f"{data.where} already has an invariant {name.strip()!r}: give this one another name")
        _check_function(predicate, 1, f"{data.where}: the invariant {name!r}", "a predicate takes (state)")
        return self._with(invariants=(*data.invariants, Invariant(name.strip(), predicate)))

    @overload
    def during(
        self,
        status: str,
        message: type[P],
        handler: SagaHandler[S, P],
        *,
        on_unexpected: OnUnexpected = "defer",
        starts: bool = False,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
    ) -> SagaWithHandlers[S]: ...
    @overload
    def during(
        self,
        status: str,
        message: str,
        handler: SagaHandler[S, P],
        *,
        payload: type[P],
        on_unexpected: OnUnexpected = "defer",
        starts: bool = False,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
    ) -> SagaWithHandlers[S]: ...
    @overload
    def during(
        self,
        status: str,
        message: str,
        handler: SagaHandler[S, Any],
        *,
        on_unexpected: OnUnexpected = "defer",
        starts: bool = False,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
    ) -> SagaWithHandlers[S]: ...
    def during(
        self,
        status: str,
        message: Any,
        handler: Any,
        *,
        payload: Any = None,
        on_unexpected: OnUnexpected = "defer",
        starts: bool = False,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
    ) -> SagaWithHandlers[S]:
        """Registers the handler of a type for when the state has this business status: the value of its field
        `status`, or of the one that `.state(..., status_field=...)` names.

        In a status that none of the type's handlers is for, the message is unexpected. `on_unexpected` says what then:
        it waits until a transition leads to such a status, and comes before anything newer (`"defer"`), is ignored on
        the record (`"ignore"`), is given up (`"dead_letter"`), or makes the run fail (`"fail"`). What is said of a type
        is said once for all of its statuses. `starts`, `on_missing` and `patience` are those of `.on`; a message starts
        an instance when one of its statuses is that of the initial state.

        >>> draft = define_saga("order").state({"status": "new"})
        >>> draft.during("new", "Placed", lambda saga, event, context: [], starts=True)
        <SagaWithHandlers 'order', handles ['Placed']>
        """
        data = self._data
        where = data.where
        if not isinstance(status, str) or not status.strip():
            raise DefinitionError(f"{where}: status of .during(...) must not be empty, got {status!r:.80}")
        name = _wire_type(data, message, "event")
        codec = _payload_codec(data, name, message, payload)
        _check_function(handler, 3, f"{where}: the handler of {name!r} during {status!r}", _HANDLER)
        _one_of(on_unexpected, get_args(OnUnexpected), f"{where}: on_unexpected of {name!r}")
        missing = _checked_missing(data, name, starts, on_missing, patience)
        status = str(status.value) if isinstance(status, Enum) else status
        said = HandlerBinding(name, handler, codec, starts, on_missing, missing, {status: handler}, on_unexpected)
        known = data.handlers.get(name)
        if known is not None and not known.is_gathered_only:
            said = _with_status(data, known, said, status)
        elif known is not None:
            _check_codecs(data, name, codec, known.joins)
            said = dataclasses.replace(said, joins=known.joins)
        return SagaWithHandlers(dataclasses.replace(data, handlers={**data.handlers, name: said}))

    def when_all(
        self,
        messages: Sequence[type[Any] | str],
        handler: SagaHandler[S, Gathered],
        *,
        starts: bool = True,
        on_missing: OnMissing = "dead_letter",
        patience: timedelta | float | str = "1h",
    ) -> SagaWithHandlers[S]:
        """Runs the handler once, when a message of each of these types has come, in whatever order. The payload of its
        event has them all: `event.payload[PaymentCaptured]`, by class or by wire type; the rest of the event is that of
        the last one.

        Each arrival is applied, and kept with the run; of two of one type the first counts. A type may have a handler
        of its own, which runs first. `starts`, `on_missing` and `patience` are those of `.on`, for types without one.

        >>> define_saga("order").state({}).when_all(["Paid", "Packed"], lambda saga, event, context: [])
        <SagaWithHandlers 'order', handles ['Paid', 'Packed']>
        """
        data = self._data
        where = data.where
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise DefinitionError(f"{where}: .when_all(...) takes a list of types, got {_shown(messages)}")
        names = [_wire_type(data, message, "event") for message in messages]
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise DefinitionError(f"{where}: .when_all({names}) needs two or more different types; one takes .on(...)")
        _check_function(handler, 3, f"{where}: the handler of {_listed(names)}", _HANDLER)
        codecs = {
            name: _payload_codec(data, name, message, None) for name, message in zip(names, messages, strict=True)
        }
        join = JoinBinding(", ".join(sorted(names)), handler, MappingProxyType(codecs))
        if any(one.name == join.name for one in data.joins):
            raise DefinitionError(f"{where} already has a .when_all for {_listed(names)}: put both into one")
        handlers = dict(data.handlers)
        for name, codec in codecs.items():
            missing = _checked_missing(data, name, starts, on_missing, patience)
            known = handlers.get(name)
            if known is None:
                only = HandlerBinding(name, _nothing_yet, codec, starts, on_missing, missing, is_gathered_only=True)
                handlers[name] = dataclasses.replace(only, joins=(join,))
            else:
                _check_codecs(data, name, known.codec, (join,))
                handlers[name] = dataclasses.replace(known, joins=(*known.joins, join))
        return SagaWithHandlers(dataclasses.replace(data, handlers=handlers, joins=(*data.joins, join)))

    def on_signal(self, signal: SignalDefinition[P], handler: SagaHandler[S, P]) -> Self:
        """Registers the handler of a signal: of a message that somebody addresses to one instance by name. It is
        applied in its turn, once, like every message, and starts no instance. The event's type is the signal's name.

        >>> from sagaloom import define_signal
        >>> hurry = define_signal("hurry")
        >>> define_saga("order").state({}).on_signal(hurry, lambda saga, event, context: [])
        <SagaWithState 'order', handles []>
        """
        data = self._data
        name, codec = self._check_signal("on_signal", signal, handler)
        if name in data.signals:
            raise DefinitionError(f"{data.where} already has a handler for the signal {name!r}: put both into one")
        return self._with(signals={**data.signals, name: HandlerBinding(name, handler, codec, starts=False)})

    def on_update(self, signal: SignalDefinition[P], handler: SagaHandler[S, P]) -> Self:
        """Registers the handler of a signal whose caller waits: the handler returns `answer(value)` beside its effects,
        or raises `UpdateRefused`. The caller gets the one or the other, and gets it again under the same id.

        >>> from sagaloom import answer, define_signal
        >>> approve = define_signal("approve")
        >>> define_saga("order").state({}).on_update(approve, lambda saga, event, context: [answer("approved")])
        <SagaWithState 'order', handles []>
        """
        data = self._data
        name, codec = self._check_signal("on_update", signal, handler)
        if name in data.updates:
            raise DefinitionError(f"{data.where} already has a handler for the update {name!r}: put both into one")
        return self._with(updates={**data.updates, name: UpdateBinding(name, handler, codec, starts=False)})

    def on_query(self, query: QueryDefinition[P], handler: Callable[[S], P]) -> Self:
        """Registers a read of the state: a plain function that takes it, changes nothing, and returns the answer. It is
        given the newest committed state, of a run that has ended too.

        >>> from sagaloom import define_query
        >>> define_saga("order").state({"paid": 0}).on_query(define_query("paid", int), lambda state: state["paid"])
        <SagaWithState 'order', handles []>
        """
        data = self._data
        if not isinstance(query, QueryDefinition):
            raise DefinitionError(f"{data.where}: .on_query(...) takes define_query(name), got {_shown(query)}")
        name = query.name.strip() if isinstance(query.name, str) else ""
        if not name:
            raise DefinitionError(f"Saga query name must not be empty. {data.where}: use define_query('progress').")
        _check_function(handler, 1, f"{data.where}: the query {name!r}", "a query takes (state)")
        if name in data.queries:
            raise DefinitionError(f"{data.where} already has a query {name!r}: give this one another name")
        codec = _said_codec(data, f"the answer of query {name!r}", query.result)
        return self._with(queries={**data.queries, name: QueryBinding(name, handler, codec)})

    def _check_signal(self, method: str, signal: SignalDefinition[Any], handler: object) -> tuple[str, Codec[Any]]:
        """The name of a signal, and the codec of its payload."""
        where = self._data.where
        if not isinstance(signal, SignalDefinition):
            raise DefinitionError(f"{where}: .{method}(...) takes define_signal(name), got {_shown(signal)}")
        name = signal.name.strip() if isinstance(signal.name, str) else ""
        if not name:
            raise DefinitionError(f"Saga signal name must not be empty. {where}: use define_signal('approve').")
        _checked_key(where, f"signal name {name!r:.80}", name)
        what = method.removeprefix("on_")
        _check_function(handler, 3, f"{where}: the handler of {what} {name!r}", _HANDLER)
        return name, _said_codec(self._data, f"the payload of {what} {name!r}", signal.payload)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name == "state":
                raise DefinitionError(f"{self._data.where} already has a state: call .state(initial) once")
            if name == "build":
                raise DefinitionError(
                    f"{self._data.where}: .build() comes too early: a saga needs a handler, so call .on(type, handler) "
                    "first"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SagaWithHandlers(SagaWithState[S]):
    """A saga that can be built."""

    def build(self) -> SagaDefinition[S]:
        """The finished, frozen definition, with a fingerprint of all that matters about it.

        >>> saga = define_saga("order").state({}).on("OrderPlaced", lambda saga, event, context: []).build()
        >>> saga.handled_message_types, saga.starting_types
        (('OrderPlaced',), ('OrderPlaced',))
        """
        data = self._data
        codec = data.state_codec
        if codec is None or not data.handlers:
            raise DefinitionError(f"{data.where}: build needs .state(initial) and .on(type, handler)")
        unknown = [name for name in data.correlations if name != ANY_TYPE and name not in data.handlers]
        if unknown:
            raise DefinitionError(
                f"{data.where} has a correlation rule for {_listed(unknown)}, which no handler takes: it handles "
                f"{_listed(list(data.handlers))}"
            )
        undone = sorted(data.pivots & data.compensations.keys())
        if undone:
            raise DefinitionError(
                f"{data.where}: {_listed(undone)} is a pivot and has a compensation, but behind a point of no return "
                "nothing is undone: take pivot=True away, or .compensate(...)"
            )
        _check_what_it_sends(data)
        _check_statuses(data, codec)
        caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # the documented way to a caller's line
        definition: SagaDefinition[S] = SagaDefinition(
            id=data.id,
            version=data.version,
            durability=data.durability,
            initial_state=codec.decode(data.initial_json),
            initial_json=data.initial_json,
            state_codec=codec,
            handlers=MappingProxyType(dict(data.handlers)),
            compensations=MappingProxyType(dict(data.compensations)),
            correlations=MappingProxyType(dict(data.correlations)),
            signals=MappingProxyType(dict(data.signals)),
            updates=MappingProxyType(dict(data.updates)),
            queries=MappingProxyType(dict(data.queries)),
            joins=data.joins,
            concurrency=data.concurrency,
            status_field=data.status_field,
            retry=data.retry,
            reuse=data.reuse,
            is_singleton=data.is_singleton,
            invariants=data.invariants,
            migrations=MappingProxyType(dict(data.migrations)),
            schedule=data.schedule,
            timeouts=data.timeouts,
            pivots=data.pivots,
            source=f"{caller.f_code.co_filename}:{caller.f_lineno}",
        )
        return dataclasses.replace(definition, fingerprint=fingerprint_of(definition))


SagaBuilder: TypeAlias = SagaDraft | SagaWithState[Any] | SagaWithHandlers[Any]
"""Any stage of a saga that is being written."""


def define_saga(id: str) -> SagaDraft:
    """Begins a saga. Its id names it in the store and in every instance id, so it stays the same for life.

    >>> from sagaloom import define_saga, saga_complete
    >>> def placed(saga, event, context):
    ...     saga.state = {**saga.state, "status": "done"}
    ...     return [saga_complete({"orderId": event.payload["orderId"]})]
    >>> order = define_saga("order").state({"status": "new"}).on("OrderPlaced", placed).build()
    >>> order.id, order.durability
    ('order', 't1')
    """
    checked = check_saga_id(id)
    if f"{checked}:" == RESERVED_PREFIX:
        # Its end would reach a parent as `saga:completed`, which no saga may handle.
        raise DefinitionError(f"saga id {checked!r} is reserved for the engine's own messages: use another name")
    return SagaDraft(_Data(id=checked))


_TYPE = type  # `.state` has a parameter called type


def _wire_type(data: _Data, message: object, what: str) -> str:
    """The wire type that a message class or a string stands for."""
    if isinstance(message, type):
        if not is_declared_class(message):
            raise DefinitionError(
                f"{data.where}: {message.__qualname__} is no message class: use a dataclass, TypedDict, "
                "msgspec.Struct, attrs class or pydantic model, or give the wire type as a string"
            )
        try:
            message = message_type_of(message)
        except SagasError as error:
            raise DefinitionError(f"{data.where}: {error.message}") from error
    if not isinstance(message, str) or not message.strip():
        raise DefinitionError(
            f"Saga {what} type must not be empty. {data.where}: give the message class or its wire type, such as "
            f"'OrderPlaced'; got {message!r:.80}."
        )
    if message != message.strip() or not message.isprintable():
        raise DefinitionError(
            f"{data.where}: {what} type {message!r:.80} has blanks around it or unprintable characters in it, so no "
            "message would match: remove them"
        )
    if message == ANY_TYPE and what != "correlation":
        raise DefinitionError(f"{data.where}: {what} type '*' is reserved: register a handler for each type")
    if message.startswith(RESERVED_PREFIX):
        raise DefinitionError(
            f"{data.where}: {what} type {message!r:.80} is reserved: types that begin with {RESERVED_PREFIX!r} belong "
            "to the engine; use another name"
        )
    return message


def _payload_codec(data: _Data, name: str, message: object, payload: object) -> Codec[Any]:
    if isinstance(message, type):
        if payload is not None:
            raise DefinitionError(
                f"{data.where}: {message.__qualname__} is itself the payload of {name!r}: leave out payload=, or give "
                "the wire type as a string"
            )
        payload = message
    elif isinstance(payload, (str, bytes, int, float)):
        raise DefinitionError(f"{data.where}: payload of {name!r} must be a type, got {payload!r:.80}")
    try:
        return codec_for(payload)
    except DefinitionError as error:
        raise DefinitionError(f"{data.where}: payload of {name!r}: {error.message}", data=error.data) from error


def _nothing_yet(saga: object, event: object, context: object) -> list[Any]:
    """What is done with a message that is only gathered."""
    return []


def _checked_missing(data: _Data, name: str, starts: object, on_missing: object, patience: Any) -> timedelta:
    """The patience of a type, once all that is said about its missing instance was found to be in order."""
    if not isinstance(starts, bool):
        raise DefinitionError(f"{data.where}: starts of {name!r} must be True or False, got {starts!r:.80}")
    _one_of(on_missing, get_args(OnMissing), f"{data.where}: on_missing of {name!r}")
    try:
        length = parse_duration(patience)
    except DefinitionError as error:
        raise DefinitionError(f"{data.where}: patience of {name!r}: {error.message}") from error
    if not length:
        raise DefinitionError(f"{data.where}: patience of {name!r} must be longer than nothing, got {patience!r:.80}")
    return length


def _check_codecs(data: _Data, name: str, codec: Codec[Any], joins: Sequence[JoinBinding]) -> None:
    for join in joins:
        if join.codecs[name].name != codec.name:
            raise DefinitionError(
                f"{data.where}: {name!r} is {codec.name} for its handler and {join.codecs[name].name} for the "
                f".when_all of {join.name}: give both the same class, or both the wire type"
            )


def _with_status(data: _Data, known: HandlerBinding, said: HandlerBinding, status: str) -> HandlerBinding:
    """`known`, which has handlers during other statuses, with one for `status` too."""
    if known.during is None:
        raise DefinitionError(
            f"{data.where} already has a handler for {said.type!r} in every status: use .on(...) or .during(...) for a "
            "type, not both"
        )
    if status in known.during:
        raise DefinitionError(
            f"{data.where} already has a handler for {said.type!r} during {status!r}: put both into one"
        )
    for what in ("on_unexpected", "starts", "on_missing", "patience"):
        if getattr(known, what) != getattr(said, what):
            raise DefinitionError(
                f"{data.where}: {what} of {said.type!r} is {getattr(said, what)!r} during {status!r} and "
                f"{getattr(known, what)!r} before: say the same for every status"
            )
    if known.codec.name != said.codec.name:
        raise DefinitionError(
            f"{data.where}: {said.type!r} is {said.codec.name} during {status!r} and {known.codec.name} before: "
            "say the same for every status"
        )
    return dataclasses.replace(known, during={**known.during, status: said.handler})


def _said_codec(data: _Data, what: str, declared: object) -> Codec[Any]:
    try:
        return codec_for(declared)
    except DefinitionError as error:
        raise DefinitionError(f"{data.where}: {what}: {error.message}", data=error.data) from error


def _check_function(function: object, arity: int, what: str, shape: str) -> None:
    """Raises unless `function` is synchronous and can be called with `arity` positional arguments."""
    if not callable(function) or isinstance(function, type):
        raise DefinitionError(f"{what} is {_shown(function)}, which is no function: {shape}")
    plain: object = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    for one in (plain, inspect.getattr_static(type(plain), "__call__", None)):
        if inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one):
            raise DefinitionError(
                f"{what}, {_shown(function)}, is async: it must be a plain function without I/O; return "
                "send(...) for work that waits, and handle its answer as a message"
            )
        if inspect.isgeneratorfunction(one):
            raise DefinitionError(f"{what}, {_shown(function)}, is a generator: return a list instead of yielding")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*(None,) * arity)
    except TypeError as error:
        raise DefinitionError(
            f"{what}, {_shown(function)}, has the signature {signature}: {shape} ({error})"
        ) from error


def check_retry(where: str, policy: object) -> None:
    if not isinstance(policy, RetryPolicy):
        raise DefinitionError(f"{where}: retry takes a RetryPolicy(...), got {_shown(policy)}")
    low, high = policy.initial_interval_ms, policy.maximum_interval_ms
    rules = (
        ("maximum_attempts", policy.maximum_attempts, 1, math.inf, "an integer from 1 on"),
        ("initial_interval_ms", low, 0, math.inf, "an integer from 0 on"),
        ("maximum_interval_ms", high, low, math.inf, f"an integer from initial_interval_ms ({low!r:.80}) on"),
    )
    for name, value, least, most, wanted in rules:
        if not _is_int(value) or not least <= value <= most:
            raise DefinitionError(f"{where}: retry {name} must be {wanted}, got {value!r:.80}")
    fractions = (
        ("backoff_coefficient", policy.backoff_coefficient, 1, math.inf, "a finite number from 1 on"),
        ("jitter", policy.jitter, 0, 1, "a fraction between 0 and 1"),
    )
    for name, number, least, most, wanted in fractions:
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
            raise DefinitionError(f"{where}: retry {name} must be {wanted}, got {number!r:.80}")
        if not least <= number <= most:
            raise DefinitionError(f"{where}: retry {name} must be {wanted}, got {number!r:.80}")
    names: object = policy.non_retryable_error_types
    if not isinstance(names, (tuple, list)) or not all(isinstance(one, str) for one in cast("list[object]", names)):
        raise DefinitionError(f"{where}: retry non_retryable_error_types must be a tuple of class names, got {names!r}")


def _said(data: _Data, method: str, message: object, keeps: Sequence[str]) -> SagaMessage[bytes]:
    """The message that a saga sends to itself, its payload as JSON. It has its type, its payload and what it `keeps`:
    the rest differs from one time to the next."""
    where = f"{data.where}: {method} message"
    if isinstance(message, (str, type)):
        message = {"type": _wire_type(data, message, f"{method} message")}
    try:
        said = as_message(message)
        payload = encode_any(said.payload)
    except SagasError as error:
        raise DefinitionError(f"{where}: {error.message}") from error
    for field in SagaMessage.__struct_fields__:
        value = getattr(said, field)
        if value is None or field in ("type", "payload"):
            continue
        if field not in keeps:
            raise DefinitionError(f"{where} has {field}={value!r:.80}: leave it out, every one gets its own")
        _checked_key(where, field, value)
    return SagaMessage(
        _wire_type(data, said.type, f"{method} message"),
        payload,
        correlation_key=said.correlation_key,
        concurrency_key=said.concurrency_key,
    )


def _checked_key(where: str, what: str, value: str) -> None:
    try:
        check_key(value, what=what)
    except SagasError as error:
        raise DefinitionError(f"{where}: {error.message}") from error


def _check_what_it_sends(data: _Data) -> None:
    """Raises unless the saga handles its own tick and timeouts, as they will come."""
    schedule = data.schedule
    if schedule is not None:
        _check_taken(data, f"schedule {schedule.cron!r}", schedule.message_type, schedule.payload_at(_A_MOMENT))
        has_key = (
            schedule.correlation_key is not None
            or data.is_singleton
            or not data.correlations.keys().isdisjoint((ANY_TYPE, schedule.message_type))
        )
        if not has_key and not data.handlers[schedule.message_type].starts:
            raise DefinitionError(
                f"{data.where}: its tick {schedule.message_type!r} starts no instance and names none: let it start one "
                "(starts=True), make the saga a .singleton(), or give the tick a correlation_key"
            )
    for timeout in data.timeouts:
        _check_taken(data, f"timeout {timeout.name!r}", timeout.message_type, timeout.payload)


def _check_statuses(data: _Data, codec: Codec[Any]) -> None:
    """Raises unless the state has the status that handlers are bound to, and one of its own to start with."""
    bound = [binding for binding in data.handlers.values() if binding.during is not None]
    if not bound:
        return
    initial: object = codec.decode(data.initial_json)
    if isinstance(initial, Mapping):
        status = cast("Mapping[str, object]", initial).get(data.status_field)
    else:
        status = getattr(initial, data.status_field, None)
    status = status.value if isinstance(status, Enum) else status
    if not isinstance(status, str):
        raise DefinitionError(
            f"{data.where}: .during({next(iter(bound[0].during or ()))!r}, {bound[0].type!r}) goes by the state's "
            f"field {data.status_field!r}, and the initial state has {status!r:.80} there: give it a string, or name "
            "another field with .state(initial, status_field=...)"
        )
    for binding in bound:
        during = list(binding.during or ())
        if binding.starts and status not in during:
            raise DefinitionError(
                f"{data.where}: {binding.type!r} is to start an instance, whose {data.status_field} is {status!r} "
                f"then, and has handlers during {_listed(during)} only: add one for {status!r}"
            )


def _check_taken(data: _Data, what: str, message_type: str, payload: bytes) -> None:
    binding = data.handlers.get(message_type)
    if binding is None:
        raise DefinitionError(
            f"{data.where}: {what} sends {message_type!r}, which no handler takes: add .on({message_type!r}, handler), "
            f"or name another message (it handles {_listed(list(data.handlers))})"
        )
    try:
        binding.codec.decode(payload)
    except SagasError as error:
        raise DefinitionError(
            f"{data.where}: {what} sends {message_type!r} with {payload.decode()!r:.200}, which its handler cannot "
            f"take: {error.message}"
        ) from error


def _one_of(value: Any, allowed: Sequence[str], what: str) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise DefinitionError(f"{what} {value!r:.80} is unknown: use {_listed(allowed, 'or')}")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(values: Sequence[object], word: str = "and") -> str:
    shown = [repr(value) for value in values]
    return f" {word} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _shown(value: object) -> str:
    if isinstance(value, (str, bytes, int, float, type(None))):
        return f"{value!r:.80}"
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else f"{type_name(type(value))} {value!r:.80}"
