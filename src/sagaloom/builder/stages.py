"""The three stages of a saga that is being written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, get_args, overload

from sagaloom.builder.bindings import check_codecs, checked_missing, payload_codec, said_codec, wire_type, with_status
from sagaloom.builder.rules import check_function, checked_key, listed, one_of, shown
from sagaloom.builder.settings import Stage
from sagaloom.builder.whole import check_statuses, check_what_it_sends
from sagaloom.codec import Codec, codec_for, is_declared_class
from sagaloom.definitions import (
    ANY_TYPE,
    CompensationBinding,
    Gathered,
    HandlerBinding,
    Invariant,
    JoinBinding,
    OnMissing,
    OnUnexpected,
    QueryBinding,
    QueryDefinition,
    SagaDefinition,
    SagaHandler,
    SignalDefinition,
    UpdateBinding,
)
from sagaloom.errors import DefinitionError, SagasError
from sagaloom.fingerprint import fingerprint_of

S = TypeVar("S")
P = TypeVar("P")

_HANDLER = "a handler takes (saga, event, context)"
_NEEDS_STATE = frozenset(
    ("on", "compensate", "during", "when_all", "on_signal", "on_query", "on_update", "invariant", "build")
)
_TYPE = type  # `.state` has a parameter called type


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SagaDraft(Stage):
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
        notes = self._notes
        declared = type
        if declared is None:
            if not isinstance(initial, dict) and not is_declared_class(initial.__class__):
                hint = "give an instance of it" if isinstance(initial, _TYPE) else "give a dict or an instance of one"
                raise DefinitionError(
                    f"Saga initial state is missing. {notes.where}: {shown(initial)} is no state: a state is a dict, "
                    f"dataclass, TypedDict, msgspec.Struct, attrs class or pydantic model; {hint}"
                )
            declared = None if isinstance(initial, dict) else initial.__class__
        try:
            codec = codec_for(declared)
            encoded = codec.encode(initial)
        except SagasError as error:
            raise DefinitionError(
                f"{notes.where}: initial state: {error.message}", code=error.code, data=error.data
            ) from error
        if not isinstance(status_field, str) or not status_field.strip():
            raise DefinitionError(f"{notes.where}: status_field must be the name of a field, got {status_field!r:.80}")
        return SagaWithState(
            dataclasses.replace(notes, initial_json=encoded, state_codec=codec, status_field=status_field)
        )

    if not TYPE_CHECKING:  # for a type checker these methods are not there, which is the point of a stage

        def __getattr__(self, name: str) -> NoReturn:
            if name in _NEEDS_STATE:
                raise DefinitionError(
                    f"{self._notes.where}: .{name}(...) comes too early: call .state(initial) first, so that handlers "
                    "have a state to work on"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SagaWithState(Stage, Generic[S]):
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
        notes = self._notes
        name = wire_type(notes, message, "event")
        codec = payload_codec(notes, name, message, payload)
        check_function(handler, 3, f"{notes.where}: the handler of {name!r}", _HANDLER)
        missing = checked_missing(notes, name, starts, on_missing, patience)
        if not isinstance(pivot, bool):
            raise DefinitionError(f"{notes.where}: pivot of {name!r} must be True or False, got {pivot!r:.80}")
        known = notes.handlers.get(name)
        if known is not None and not known.is_gathered_only:
            how = "a handler" if known.during is None else "handlers during some statuses"
            raise DefinitionError(
                f"{notes.where} already has {how} for {name!r}: put both into one, or give the message another type"
            )
        joins = known.joins if known is not None else ()
        check_codecs(notes, name, codec, joins)
        binding = HandlerBinding(name, handler, codec, starts, on_missing, missing, joins=joins)
        pivots = notes.pivots | {name} if pivot else notes.pivots
        return SagaWithHandlers(dataclasses.replace(notes, handlers={**notes.handlers, name: binding}, pivots=pivots))

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
        notes = self._notes
        name = wire_type(notes, message, "compensation event")
        codec = payload_codec(notes, name, message, payload)
        check_function(handler, 3, f"{notes.where}: the compensation of {name!r}", _HANDLER)
        if name in notes.compensations:
            raise DefinitionError(f"{notes.where} already has a compensation for {name!r}: put both into one")
        binding = CompensationBinding(name, handler, codec)
        return self._with(compensations={**notes.compensations, name: binding})

    def invariant(self, name: str, predicate: Callable[[S], bool]) -> Self:
        """Names something that must be true of the state after every transition; one that breaks it is refused.

        >>> define_saga("order").state({"paid": 0}).invariant("paid is not negative", lambda state: state["paid"] >= 0)
        <SagaWithState 'order', handles []>
        """
        notes = self._notes
        if not isinstance(name, str) or not name.strip():
            raise DefinitionError(f"{notes.where}: invariant name must not be empty, got {name!r:.80}: say what holds")
        if any(one.name == name.strip() for one in notes.invariants):
            raise DefinitionError(
                f"{notes.where} already has an invariant {name.strip()!r}: give this one another name"
            )
        check_function(predicate, 1, f"{notes.where}: the invariant {name!r}", "a predicate takes (state)")
        return self._with(invariants=(*notes.invariants, Invariant(name.strip(), predicate)))

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
        notes = self._notes
        where = notes.where
        if not isinstance(status, str) or not status.strip():
            raise DefinitionError(f"{where}: status of .during(...) must not be empty, got {status!r:.80}")
        name = wire_type(notes, message, "event")
        codec = payload_codec(notes, name, message, payload)
        check_function(handler, 3, f"{where}: the handler of {name!r} during {status!r}", _HANDLER)
        one_of(on_unexpected, get_args(OnUnexpected), f"{where}: on_unexpected of {name!r}")
        missing = checked_missing(notes, name, starts, on_missing, patience)
        status = str(status.value) if isinstance(status, Enum) else status
        said = HandlerBinding(name, handler, codec, starts, on_missing, missing, {status: handler}, on_unexpected)
        known = notes.handlers.get(name)
        if known is not None and not known.is_gathered_only:
            said = with_status(notes, known, said, status)
        elif known is not None:
            check_codecs(notes, name, codec, known.joins)
            said = dataclasses.replace(said, joins=known.joins)
        return SagaWithHandlers(dataclasses.replace(notes, handlers={**notes.handlers, name: said}))

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
        notes = self._notes
        where = notes.where
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise DefinitionError(f"{where}: .when_all(...) takes a list of types, got {shown(messages)}")
        names = [wire_type(notes, message, "event") for message in messages]
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise DefinitionError(f"{where}: .when_all({names}) needs two or more different types; one takes .on(...)")
        check_function(handler, 3, f"{where}: the handler of {listed(names)}", _HANDLER)
        codecs = {
            name: payload_codec(notes, name, message, None) for name, message in zip(names, messages, strict=True)
        }
        join = JoinBinding(", ".join(sorted(names)), handler, MappingProxyType(codecs))
        if any(one.name == join.name for one in notes.joins):
            raise DefinitionError(f"{where} already has a .when_all for {listed(names)}: put both into one")
        handlers = dict(notes.handlers)
        for name, codec in codecs.items():
            missing = checked_missing(notes, name, starts, on_missing, patience)
            known = handlers.get(name)
            if known is None:
                only = HandlerBinding(name, _nothing_yet, codec, starts, on_missing, missing, is_gathered_only=True)
                handlers[name] = dataclasses.replace(only, joins=(join,))
            else:
                check_codecs(notes, name, known.codec, (join,))
                handlers[name] = dataclasses.replace(known, joins=(*known.joins, join))
        return SagaWithHandlers(dataclasses.replace(notes, handlers=handlers, joins=(*notes.joins, join)))

    def on_signal(self, signal: SignalDefinition[P], handler: SagaHandler[S, P]) -> Self:
        """Registers the handler of a signal: of a message that somebody addresses to one instance by name. It is
        applied in its turn, once, like every message, and starts no instance. The event's type is the signal's name.

        >>> from sagaloom import define_signal
        >>> hurry = define_signal("hurry")
        >>> define_saga("order").state({}).on_signal(hurry, lambda saga, event, context: [])
        <SagaWithState 'order', handles []>
        """
        notes = self._notes
        name, codec = self._check_signal("on_signal", signal, handler)
        if name in notes.signals:
            raise DefinitionError(f"{notes.where} already has a handler for the signal {name!r}: put both into one")
        return self._with(signals={**notes.signals, name: HandlerBinding(name, handler, codec, starts=False)})

    def on_update(self, signal: SignalDefinition[P], handler: SagaHandler[S, P]) -> Self:
        """Registers the handler of a signal whose caller waits: the handler returns `answer(value)` beside its effects,
        or raises `UpdateRefused`. The caller gets the one or the other, and gets it again under the same id.

        >>> from sagaloom import answer, define_signal
        >>> approve = define_signal("approve")
        >>> define_saga("order").state({}).on_update(approve, lambda saga, event, context: [answer("approved")])
        <SagaWithState 'order', handles []>
        """
        notes = self._notes
        name, codec = self._check_signal("on_update", signal, handler)
        if name in notes.updates:
            raise DefinitionError(f"{notes.where} already has a handler for the update {name!r}: put both into one")
        return self._with(updates={**notes.updates, name: UpdateBinding(name, handler, codec, starts=False)})

    def on_query(self, query: QueryDefinition[P], handler: Callable[[S], P]) -> Self:
        """Registers a read of the state: a plain function that takes it, changes nothing, and returns the answer. It is
        given the newest committed state, of a run that has ended too.

        >>> from sagaloom import define_query
        >>> define_saga("order").state({"paid": 0}).on_query(define_query("paid", int), lambda state: state["paid"])
        <SagaWithState 'order', handles []>
        """
        notes = self._notes
        if not isinstance(query, QueryDefinition):
            raise DefinitionError(f"{notes.where}: .on_query(...) takes define_query(name), got {shown(query)}")
        name = query.name.strip() if isinstance(query.name, str) else ""
        if not name:
            raise DefinitionError(f"Saga query name must not be empty. {notes.where}: use define_query('progress').")
        check_function(handler, 1, f"{notes.where}: the query {name!r}", "a query takes (state)")
        if name in notes.queries:
            raise DefinitionError(f"{notes.where} already has a query {name!r}: give this one another name")
        codec = said_codec(notes, f"the answer of query {name!r}", query.result)
        return self._with(queries={**notes.queries, name: QueryBinding(name, handler, codec)})

    def _check_signal(self, method: str, signal: SignalDefinition[Any], handler: object) -> tuple[str, Codec[Any]]:
        """The name of a signal, and the codec of its payload."""
        where = self._notes.where
        if not isinstance(signal, SignalDefinition):
            raise DefinitionError(f"{where}: .{method}(...) takes define_signal(name), got {shown(signal)}")
        name = signal.name.strip() if isinstance(signal.name, str) else ""
        if not name:
            raise DefinitionError(f"Saga signal name must not be empty. {where}: use define_signal('approve').")
        checked_key(where, f"signal name {name!r:.80}", name)
        what = method.removeprefix("on_")
        check_function(handler, 3, f"{where}: the handler of {what} {name!r}", _HANDLER)
        return name, said_codec(self._notes, f"the payload of {what} {name!r}", signal.payload)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name == "state":
                raise DefinitionError(f"{self._notes.where} already has a state: call .state(initial) once")
            if name == "build":
                raise DefinitionError(
                    f"{self._notes.where}: .build() comes too early: a saga needs a handler, so call .on(type, "
                    "handler) first"
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
        notes = self._notes
        codec = notes.state_codec
        if codec is None or not notes.handlers:
            raise DefinitionError(f"{notes.where}: build needs .state(initial) and .on(type, handler)")
        unknown = [name for name in notes.correlations if name != ANY_TYPE and name not in notes.handlers]
        if unknown:
            raise DefinitionError(
                f"{notes.where} has a correlation rule for {listed(unknown)}, which no handler takes: it handles "
                f"{listed(list(notes.handlers))}"
            )
        undone = sorted(notes.pivots & notes.compensations.keys())
        if undone:
            raise DefinitionError(
                f"{notes.where}: {listed(undone)} is a pivot and has a compensation, but behind a point of no return "
                "nothing is undone: take pivot=True away, or .compensate(...)"
            )
        check_what_it_sends(notes)
        check_statuses(notes, codec)
        caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # the documented way to a caller's line
        definition: SagaDefinition[S] = SagaDefinition(
            id=notes.id,
            version=notes.version,
            durability=notes.durability,
            initial_state=codec.decode(notes.initial_json),
            initial_json=notes.initial_json,
            state_codec=codec,
            handlers=MappingProxyType(dict(notes.handlers)),
            compensations=MappingProxyType(dict(notes.compensations)),
            correlations=MappingProxyType(dict(notes.correlations)),
            signals=MappingProxyType(dict(notes.signals)),
            updates=MappingProxyType(dict(notes.updates)),
            queries=MappingProxyType(dict(notes.queries)),
            joins=notes.joins,
            concurrency=notes.concurrency,
            status_field=notes.status_field,
            retry=notes.retry,
            reuse=notes.reuse,
            is_singleton=notes.is_singleton,
            invariants=notes.invariants,
            migrations=MappingProxyType(dict(notes.migrations)),
            schedule=notes.schedule,
            timeouts=notes.timeouts,
            pivots=notes.pivots,
            source=f"{caller.f_code.co_filename}:{caller.f_lineno}",
        )
        return dataclasses.replace(definition, fingerprint=fingerprint_of(definition))


def _nothing_yet(saga: object, event: object, context: object) -> list[Any]:
    """What is done with a message that is only gathered."""
    return []
