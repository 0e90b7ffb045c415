"""A saga under test, without a runtime: what comes in, what comes out, as three sentences.

    scenario(order_saga)
        .given(OrderPlaced(order_id="o-1"), PaymentCaptured(order_id="o-1"))
        .when(FulfillmentFailed(order_id="o-1", reason="no stock"))
        .then(status="failed", effects=[send("service:payments", {"refund": "p-1"}), saga_fail("no stock")])

It is a thin layer over `engine.decide`, so what it says is what the runtime does: correlation, compensations in the
same decision, retries, invariants, runs and timers included. Nothing is stored, nothing is sent, and time stands still
until `advance`. Rules:

1. `given` is the past: each message must be applied, or the test stops there.
2. `when` is the one message that the test is about. It may be refused, retried or ignored; `then` looks at that.
3. `advance` moves the time. Timers, and attempts that failed, come in when they are due, in order.
4. `then` compares only what it is given. It looks at what happened since the last `when` or `advance`, and at the
   instance as it is now; everything that differs is shown at once.
5. `cancel`, `terminate`, `pause`, `resume` and `skip` are what an operator does. What comes while the run is paused
   waits, in order, and comes in with `resume`. A compensation that fails is tried again by `advance`.
6. `signal` and `update` say something to that run, and `query` asks it.
7. Messages between sagas are effects here like any other: they are seen, not delivered. Nor does a schedule tick by
   itself: give the saga its tick.
"""

from __future__ import annotations

import difflib
import pprint
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Generic, TypeGuard, TypeVar

import msgspec

from sagaloom.codec import encode_any
from sagaloom.definitions import (
    CompensationBinding,
    HandlerBinding,
    QueryDefinition,
    Saga,
    SagaContext,
    SagaDefinition,
    SagaHandler,
    SagaInstanceStatus,
    SignalDefinition,
    UpdateBinding,
)
from sagaloom.durations import parse_duration
from sagaloom.effects import CascadedMessage, Target
from sagaloom.engine.controls import CANCEL, PAUSE, RESUME, SKIP, TERMINATE, ControlType, control, ends_pause
from sagaloom.engine.correlation import address
from sagaloom.engine.decide import DecideContext, decide
from sagaloom.engine.limits import Limits
from sagaloom.engine.queries import answer_query
from sagaloom.engine.records import Decision, Disposition, Envelope, Head, Instance, Timer
from sagaloom.engine.signals import SignalKind, refused_with, said_to
from sagaloom.ids import instance_id, key_hash, partition_of
from sagaloom.messages import SagaMessage, as_message
from sagaloom.testing.clock import ManualClock

__all__ = ["Scenario", "scenario"]

S = TypeVar("S")
P = TypeVar("P")

_DUE_MAX: Final = 10_000


class _Unset:
    def __repr__(self) -> str:
        return "..."


_UNSET: Final = _Unset()


def scenario(
    definition: SagaDefinition[S], *, now: datetime | None = None, limits: Limits | None = None
) -> Scenario[S]:
    """Starts a scenario for one definition; `now` is when it begins, 2026-01-01T00:00:00Z unless told.

    >>> from sagaloom import define_saga, saga_complete, send
    >>> def placed(saga, event, context):
    ...     saga.state = {"status": "awaiting-payment"}
    ...     return [send("service:payments", {"charge": event.payload["orderId"]})]
    >>> def paid(saga, event, context):
    ...     saga.state = {"status": "paid"}
    ...     return [saga_complete({"paid": True})]
    >>> orders = (
    ...     define_saga("orders")
    ...     .state({})
    ...     .on("OrderPlaced", placed)
    ...     .on("PaymentCaptured", paid, starts=False)
    ...     .correlate(lambda message: message.payload["orderId"])
    ...     .build()
    ... )
    >>> story = scenario(orders).given({"type": "OrderPlaced", "payload": {"orderId": "o-1"}})
    >>> story = story.when({"type": "PaymentCaptured", "payload": {"orderId": "o-1"}})
    >>> story.then(status="completed", state={"status": "paid"}, result={"paid": True}).state
    {'status': 'paid'}
    """
    clock = ManualClock() if now is None else ManualClock(now)
    return Scenario(definition, clock=clock, limits=limits if limits is not None else Limits())


class Scenario(Generic[S]):
    """One definition, and what has happened to its instances so far. Made by `scenario`; every verb returns it."""

    def __init__(self, definition: SagaDefinition[S], *, clock: ManualClock, limits: Limits) -> None:
        self._returned: list[CascadedMessage] = []
        self._definition = replace(
            definition,
            handlers={name: self._watched_throughout(binding) for name, binding in definition.handlers.items()},
            compensations={name: self._watched(binding) for name, binding in definition.compensations.items()},
            signals={name: self._watched(binding) for name, binding in definition.signals.items()},
            updates={name: self._watched(binding) for name, binding in definition.updates.items()},
        )
        self._clock = clock
        self._limits = limits
        self._heads: dict[str, Head] = {}
        self._runs: dict[tuple[str, int], Instance] = {}
        self._seen: set[tuple[str, str]] = set()
        self._messages = 0
        self._waiting: list[Envelope] = []
        self._timers: dict[str, Timer] = {}
        self._deferred: list[Envelope] = []
        self._aside: list[tuple[Envelope, datetime | None]] = []
        self._places: dict[str, int] = {}
        self._addressed: tuple[str, int] | None = None
        self._decision: Decision | None = None
        self._effects: list[CascadedMessage] = []
        self._story: list[str] = []

    # ------------------------------------------------------------------ what comes in

    def given(self, *messages: object) -> Scenario[S]:
        """The past: messages that must all be applied. Anything else is an `AssertionError` that says why."""
        for message in messages:
            self._deliver(message, "given")
            decision = self.decision
            if decision.disposition != "applied":
                why = decision.error or decision.reason or "no reason recorded"
                raise AssertionError(
                    f"{self._told()}\n  was {decision.disposition}, not applied: {why}\n  use when() for a message "
                    "that may be refused"
                )
        return self

    def when(self, message: object) -> Scenario[S]:
        """The message that the test is about. Raises `MessageRejected` when the door would refuse it."""
        self._deliver(message, "when")
        return self

    def advance(self, by: timedelta | float | str) -> Scenario[S]:
        """Moves the time by a timedelta, milliseconds or `"5m"`. What falls due on the way comes in at its moment."""
        end = self._clock.now() + parse_duration(by)
        self._effects = []
        self._story.append(f"advance {parse_duration(by)}")
        for _ in range(_DUE_MAX):
            envelope = self._next_due(end)
            if envelope is None:
                self._clock.advance_to(end)
                return self
            self._clock.advance_to(max(envelope.due_at or envelope.accepted_at, self._clock.now()))
            self._story.append(f"due {envelope.type}")
            self._decide(envelope)
        raise AssertionError(
            f"{self._told()}\n  more than {_DUE_MAX} messages fell due: a saga that schedules itself in a loop? "
            "advance by less"
        )

    def cancel(self, reason: str | None = None, *, compensate: bool = True) -> Scenario[S]:
        """Cancels the run that the last message was for, as an operator does; `compensate` undoes its steps first."""
        return self._control(CANCEL, reason, compensate=compensate)

    def terminate(self, reason: str | None = None) -> Scenario[S]:
        """Ends that run as it stands."""
        return self._control(TERMINATE, reason)

    def skip(self, reason: str | None = None, *, step: str | None = None) -> Scenario[S]:
        """Leaves out the compensation that fails, and goes on behind it; with `step` only if that comes next."""
        return self._control(SKIP, reason, step=step)

    def pause(self, reason: str | None = None) -> Scenario[S]:
        """Pauses the run that the last message was for: what comes now is `deferred`."""
        return self._control(PAUSE, reason)

    def resume(self, reason: str | None = None) -> Scenario[S]:
        """Lets that run go on, with what has waited for it: `then` looks at the last of those."""
        return self._control(RESUME, reason)

    def signal(
        self, signal: SignalDefinition[Any] | str, payload: object = None, *, id: str | None = None
    ) -> Scenario[S]:
        """Says something to the run that the last message was for. Raises what the runtime would refuse it with when
        there is no such signal, or its handler cannot take the payload."""
        return self._say("signal", signal, payload, id)

    def update(
        self, update: SignalDefinition[Any] | str, payload: object = None, *, id: str | None = None
    ) -> Scenario[S]:
        """Like `signal`, for an update: `then(answer=...)` looks at what its caller gets to hear, `then(refused=...)`
        at the code of a refusal."""
        return self._say("update", update, payload, id)

    def query(self, query: QueryDefinition[P] | str) -> P:
        """What a query says of the run that the last message was for. Raises `QueryFailed` like the runtime."""
        instance = self.instance
        if instance is None:
            raise AssertionError(f"{self._told()}\n  there is no instance to ask")
        value: P = answer_query(self._definition, instance, query if isinstance(query, str) else query.name)[0]
        return value

    # ------------------------------------------------------------------ what came out

    def then(
        self,
        *,
        status: SagaInstanceStatus | _Unset = _UNSET,
        state: object = _UNSET,
        effects: Sequence[CascadedMessage] | _Unset = _UNSET,
        result: object = _UNSET,
        reason: str | _Unset | None = _UNSET,
        disposition: Disposition | _Unset = _UNSET,
        revision: int | _Unset = _UNSET,
        run: int | _Unset = _UNSET,
        answer: object = _UNSET,
        refused: str | _Unset | None = _UNSET,
    ) -> Scenario[S]:
        """Compares what is given, and raises one `AssertionError` with every difference.

        `state` is a value of the saga's state type, or its JSON as a dict; `result` likewise. `effects` are all that
        the handlers returned since the last `when` or `advance`, compensations included, in order; none unless the
        message was applied. Payloads compare as JSON, and of messages in effects only the fields that are given: so
        `saga_compensate(FulfillmentFailed(...))` matches one that passes the event on, whatever id it has. `reason`
        is the instance's, or that of a message that was not applied. `answer` is that of an update, as JSON, `refused`
        the code of the error that its handler refused it with, None for none.
        """
        decision = self.decision
        instance = self.instance
        differences: list[str] = []
        if not isinstance(disposition, _Unset) and disposition != decision.disposition:
            differences.append(_line("disposition", disposition, decision.disposition))
        if not isinstance(status, _Unset):
            actual = instance.status if instance is not None else None
            if status != actual:
                differences.append(_line("status", status, actual if actual is not None else "no instance"))
        if not isinstance(revision, _Unset):
            at = instance.revision if instance is not None else 0
            if revision != at:
                differences.append(_line("revision", revision, at))
        if not isinstance(run, _Unset):
            newest = instance.run if instance is not None else 0
            if run != newest:
                differences.append(_line("run", run, newest))
        if not isinstance(reason, _Unset) and reason != self.reason:
            differences.append(_line("reason", reason, self.reason))
        if not isinstance(state, _Unset):
            differences += self._compare_state(state, instance)
        if not isinstance(result, _Unset) and not _same_json(result, self.result):
            differences.append(_diff("result", result, self.result))
        if not isinstance(answer, _Unset) and not _same_json(answer, self.answer):
            differences.append(_diff("answer", answer, self.answer))
        if not isinstance(refused, _Unset) and refused != self._refusal:
            differences.append(_line("refused", refused, self._refusal))
        if not isinstance(effects, _Unset):
            differences += _compare_effects(effects, self._effects)
        if differences:
            hint = decision.error or (decision.dead_letter.reason if decision.dead_letter is not None else None)
            if hint is not None and decision.disposition != "applied":
                differences.append(f"  the last message was {decision.disposition}: {hint}")
            raise AssertionError("\n".join([self._told(), *differences]))
        return self

    @property
    def decision(self) -> Decision:
        """What the engine decided about the last message."""
        if self._decision is None:
            raise AssertionError("nothing has happened yet: call given() or when() first")
        return self._decision

    @property
    def instance(self) -> Instance | None:
        """The run that the last message was for, as it is now; None when there is none."""
        return None if self._addressed is None else self._runs.get(self._addressed)

    @property
    def state(self) -> S:
        """The state of that run, decoded."""
        instance = self.instance
        if instance is None:
            raise AssertionError(f"{self._told()}\n  there is no instance, so it has no state")
        return self._definition.state_codec.decode(instance.state)

    @property
    def result(self) -> Any:
        """The result of that run as plain JSON values, None while there is none."""
        instance = self.instance
        return None if instance is None or instance.result is None else msgspec.json.decode(instance.result)

    @property
    def answer(self) -> Any:
        """What the last update answered, as plain JSON values; None when it did not."""
        entry = self.decision.entry
        said = entry.answer if entry is not None else None
        return None if said is None or said.is_refused else msgspec.json.decode(said.content)

    @property
    def _refusal(self) -> str | None:
        entry = self.decision.entry
        said = entry.answer if entry is not None else None
        return refused_with(said).code if said is not None and said.is_refused else None

    @property
    def reason(self) -> str | None:
        """Why the last message was not applied, else why that run ended."""
        decision, instance = self.decision, self.instance
        if decision.disposition != "applied":
            return decision.error or decision.reason
        return instance.reason if instance is not None else None

    @property
    def effects(self) -> list[CascadedMessage]:
        """What the handlers returned since the last `when` or `advance`."""
        return list(self._effects)

    @property
    def now(self) -> datetime:
        return self._clock.now()

    # ------------------------------------------------------------------ the little runtime

    def _deliver(self, message: object, verb: str) -> None:
        said = as_message(message)
        self._messages += 1
        self._story.append(f"{verb} {said.type}")
        self._effects = []
        envelope, _ = address(
            self._definition,
            said,
            payload_json=encode_any(said.payload),
            accepted_at=self._clock.now(),
            message_id=said.id or f"m{self._messages}",
        )
        if (envelope.key, envelope.dedupe_key) in self._seen:
            head = self._heads.get(envelope.key)
            self._addressed = (envelope.key, head.run if head is not None else 0)
            self._decision = Decision("duplicate", reason=f"{envelope.dedupe_key!r} came before")
            return
        self._seen.add((envelope.key, envelope.dedupe_key))
        self._decide(envelope)

    def _control(
        self, kind: ControlType, reason: str | None, *, compensate: bool = True, step: str | None = None
    ) -> Scenario[S]:
        if self._addressed is None:
            raise AssertionError(f"{kind}: nothing has happened yet: call given() or when() first")
        key, run = self._addressed
        self._messages += 1
        self._story.append(kind)
        self._effects = []
        envelope = control(
            kind,
            self._definition.id,
            key,
            message_id=f"m{self._messages}",
            accepted_at=self._clock.now(),
            run=run,
            reason=reason,
            compensate=compensate,
            step=step,
        )
        self._decide(envelope)
        if ends_pause(envelope):
            deferred, self._deferred = self._deferred, []
            for waiting in deferred:
                # One of them may have cancelled the timer that another one is.
                if waiting.origin != "timer" or self._waits_for(waiting):
                    self._decide(waiting)
        return self

    def _say(self, kind: SignalKind, said: SignalDefinition[Any] | str, payload: object, id: str | None) -> Scenario[S]:
        if self._addressed is None:
            raise AssertionError(f"{kind}: nothing has happened yet: call given() or when() first")
        key, run = self._addressed
        name = said if isinstance(said, str) else said.name
        self._messages += 1
        self._story.append(f"{kind} {name}")
        self._effects = []
        envelope = said_to(
            self._definition,
            kind,
            name,
            key=key,
            payload_json=encode_any(payload),
            message_id=id if id is not None else f"m{self._messages}",
            accepted_at=self._clock.now(),
            run=run or None,
        )
        if (key, envelope.dedupe_key) in self._seen:
            self._decision = Decision("duplicate", reason=f"{envelope.dedupe_key!r} came before")
            return self
        self._seen.add((key, envelope.dedupe_key))
        self._decide(envelope)
        return self

    def _waits_for(self, timer: Envelope) -> bool:
        instance = self._runs.get((timer.key, timer.run or 0))
        return instance is not None and any(pending.id == timer.id for pending in instance.timers)

    def _decide(self, envelope: Envelope) -> None:
        has_moved = self._decide_once(envelope).disposition == "applied"
        while has_moved:
            has_moved = self._offer_deferred(envelope.key)

    def _decide_once(self, envelope: Envelope) -> Decision:
        head = self._heads.get(envelope.key) or self._new_head(envelope.key)
        run = envelope.run if envelope.run is not None else head.run
        before = self._runs.get((envelope.key, run))
        self._returned.clear()
        decision = decide(self._definition, before, envelope, DecideContext(self._clock.now(), head, self._limits))
        self._decision = decision
        if decision.disposition == "applied":
            self._effects += self._returned
        elif decision.stands_aside:
            self._aside.append((envelope, decision.retry_at))
            self._aside.sort(key=lambda each: self._places.setdefault(each[0].id, len(self._places)))
        elif decision.disposition == "deferred":
            self._deferred.append(envelope)
        elif decision.disposition == "pending":
            self._waiting.append(
                msgspec.structs.replace(
                    envelope,
                    attempt=envelope.attempt + decision.spends_attempt,
                    due_at=decision.retry_at,
                    last_error=decision.error,
                )
            )
        self._waiting += decision.follow_ups
        if decision.instance is not None:
            run = decision.instance.run
            self._runs[envelope.key, run] = decision.instance
            head = msgspec.structs.replace(head, run=max(head.run, run))
        self._heads[envelope.key] = head
        self._addressed = (envelope.key, run)
        for ended in decision.timers_ended:
            self._timers.pop(ended.id, None)
        for timer in decision.timers:
            self._timers[timer.id] = timer
        return decision

    def _offer_deferred(self, key: str) -> bool:
        """Gives the messages that wait for this key to move their turn, oldest first; whether one of them moved it."""
        for envelope in [each for each, _ in self._aside if each.key == key]:
            shown = self._decision, self._addressed
            self._aside = [each for each in self._aside if each[0] is not envelope]
            decision = self._decide_once(envelope)
            if decision.disposition == "applied":
                return True
            if decision.stands_aside:
                self._decision, self._addressed = shown
        return False

    def _new_head(self, key: str) -> Head:
        part = partition_of(key_hash(self._definition.id, key))
        return Head(self._definition.id, key, len(self._heads) + 1, part, 0, self._clock.now())

    def _next_due(self, end: datetime) -> Envelope | None:
        """Takes what is due first, at `end` or before: an attempt before a timer of the same moment."""
        retries = [(envelope.due_at or end, 0, at) for at, envelope in enumerate(self._waiting)]
        timers = [(timer.due_at, 1, timer.id) for timer in self._timers.values()]
        patient = [until for _, until in self._aside if until is not None]
        first = min((*(moment for moment, _, _ in (*retries, *timers)), *patient), default=None)
        if first is None or first > end:
            return None
        if first in patient:
            envelope = next(each for each, until in self._aside if until == first)
            self._aside = [each for each in self._aside if each[0] is not envelope]
            self._clock.advance_to(first)
            return envelope
        for moment, _, at in retries:
            if moment == first:
                return self._waiting.pop(at)
        identifier = min(identifier for moment, _, identifier in timers if moment == first)
        return self._timers.pop(identifier).envelope

    def _watched(self, binding: _B) -> _B:
        return replace(binding, handler=self._watching(binding.handler))

    def _watched_throughout(self, binding: HandlerBinding) -> HandlerBinding:
        """The binding with all of its handlers watched, those of statuses and joins too."""
        during = binding.during
        if during is not None:
            during = {status: self._watching(handler) for status, handler in during.items()}
        joins = tuple(replace(join, handler=self._watching(join.handler)) for join in binding.joins)
        return replace(self._watched(binding), during=during, joins=joins)

    def _watching(self, handler: SagaHandler[Any, Any]) -> SagaHandler[Any, Any]:
        def watched(saga: Saga[Any], event: SagaMessage[Any], context: SagaContext[Any]) -> Sequence[CascadedMessage]:
            returned = handler(saga, event, context)
            if isinstance(returned, (list, tuple)):  # anything else is an error that decide() reports
                self._returned += returned
            return returned

        return watched

    # ------------------------------------------------------------------ telling

    def _compare_state(self, expected: object, instance: Instance | None) -> list[str]:
        if instance is None:
            return [_line("state", expected, "no instance")]
        actual: object = self._definition.state_codec.decode(instance.state)
        if expected != actual and _is_json_object(expected):
            actual = msgspec.json.decode(instance.state)
        return [] if expected == actual else [_diff("state", expected, actual)]

    def _told(self) -> str:
        shown = self._story[-8:]
        left_out = len(self._story) - len(shown)
        told = (f"... ({left_out} more), " if left_out else "") + ", ".join(shown)
        if self._addressed is None:
            return f"saga {self._definition.id!r}: {told}"
        key, run = self._addressed
        return f"{instance_id(self._definition.id, key, max(run, 1))}: {told}"


_B = TypeVar("_B", HandlerBinding, UpdateBinding, CompensationBinding)


def _line(what: str, expected: object, actual: object) -> str:
    return f"  {what}: expected {expected!r}, got {actual!r}"


def _diff(what: str, expected: object, actual: object) -> str:
    return _diff_of_lines(what, _lines(expected), _lines(actual))


def _diff_of_lines(what: str, expected: list[str], actual: list[str]) -> str:
    lines = difflib.ndiff(expected, actual)
    return "\n".join([f"  {what}: (- expected, + got)", *(f"    {line}" for line in lines if line[0] != "?")])


def _lines(value: object) -> list[str]:
    return pprint.pformat(value, width=100).splitlines()


def _compare_effects(expected: Sequence[CascadedMessage], actual: Sequence[CascadedMessage]) -> list[str]:
    patterns = [*expected, *(None for _ in actual)]
    wanted = [_told_effect(effect, effect) for effect in expected]
    got = [_told_effect(effect, pattern) for effect, pattern in zip(actual, patterns, strict=False)]
    if wanted == got:
        return []
    # One effect a line, or more when it is long: so that a missing one shows as one missing line.
    nothing = ["(nothing)"]
    return [
        _diff_of_lines(
            "effects",
            [line for told in wanted for line in _wrapped(told)] or nothing,
            [line for told in got for line in _wrapped(told)] or nothing,
        )
    ]


def _told_effect(effect: CascadedMessage, pattern: CascadedMessage | None) -> tuple[str, dict[str, object]]:
    """The kind of `effect` and what it says, without defaults, and of messages only the fields that `pattern` has."""
    said: dict[str, object] = {}
    for field in msgspec.structs.fields(effect):
        value: object = getattr(effect, field.name)
        if _is_message(value):
            shown: object = getattr(pattern, field.name, None) if type(pattern) is type(effect) else None
            said[field.name] = _told_message(value, shown if _is_message(shown) else SagaMessage("", None))
        elif isinstance(value, Target):
            said[field.name] = f"{value.kind}:{value.id}"
        elif field.name in ("payload", "input", "result"):
            if value is not None:
                said[field.name] = _as_json(value)
        elif value != field.default:
            said[field.name] = value
    return effect.kind, said


def _told_message(message: SagaMessage[Any], pattern: SagaMessage[Any]) -> dict[str, object]:
    told: dict[str, object] = {"type": message.type, "payload": _as_json(message.payload)}
    for name in _METADATA:
        if getattr(pattern, name) is not None:
            told[name] = getattr(message, name)
    return told


_METADATA: Final = tuple(name for name in SagaMessage.__struct_fields__ if name not in ("type", "payload"))


def _wrapped(told: tuple[str, dict[str, object]]) -> list[str]:
    kind, said = told
    lines = f"{kind}({', '.join(f'{name}={value!r}' for name, value in said.items())})"
    return [lines] if len(lines) <= 110 else [f"{kind}", *(f"    {name}={value!r}" for name, value in said.items())]


def _as_json(value: object) -> object:
    if _is_message(value):
        return {"type": value.type, "payload": _as_json(value.payload)}
    return msgspec.json.decode(encode_any(value))


def _is_message(value: object) -> TypeGuard[SagaMessage[Any]]:
    return isinstance(value, SagaMessage)


def _is_json_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _same_json(expected: object, actual: object) -> bool:
    return expected == actual or encode_any(expected) == encode_any(actual)
