"""What a saga runtime reports: a span around each publish, decision and delivery, and the metrics that go with them.

    saga.publish ──► saga.handle ──┬──► saga.cascade.send ──► the receiver's own spans ──► saga.handle of its answer
                                   └──► saga.handle of what it sent, spawned or scheduled

The receiver decides many messages and commits them at once. The span of a decision begins with it and ends with that
commit, so it covers what its message had to wait for; a decision that was not written down says so, and the one that
takes its place has a span of its own. What a decision asks for (`saga.cascade.*`, but for deliveries) is noted beside
it once it is committed.

Everything here runs on the loop of the runtime, and none of it runs where nobody listens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Protocol

import msgspec
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, get_current_span, set_span_in_context

from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import Decision, Envelope, HistoryEntry, Instance, OutboxEffect, StepRecord
from sagaloom.errors import SagasError
from sagaloom.ids import instance_id
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import UnitOfWork
from sagaloom.telemetry import names
from sagaloom.telemetry.instruments import CountsView, HealthView, Observed, instruments_of
from sagaloom.telemetry.providers import TelemetryProviders
from sagaloom.telemetry.spans import (
    Attributes,
    Parent,
    Recorder,
    closest_parent,
    described,
    mark_error,
    parent_of,
    with_trace,
)

__all__ = ["Publishing", "SagaTelemetry", "Sending"]

_CLIENTS: Final = frozenset(("service", "job"))
_NEWER: Final = "SAGA_VERSION_NEWER"
_FAILED: Final = "SAGA_FAILED"
_ALL_STEPS: Final = "ALL_STEPS"
_is_served: ContextVar[bool] = ContextVar("sagaloom_served", default=False)


class _Delivery(Protocol):
    @property
    def envelope(self) -> Envelope: ...


class _Planned(Protocol):
    """A message and the unit that was offered to the store for it."""

    @property
    def delivery(self) -> _Delivery: ...
    @property
    def unit(self) -> UnitOfWork: ...


class _Work(Protocol):
    @property
    def unit(self) -> UnitOfWork: ...


class _Receipt(Protocol):
    @property
    def message_id(self) -> str: ...
    @property
    def correlation_key(self) -> str | None: ...
    @property
    def duplicate(self) -> bool: ...


class _Handling(msgspec.Struct, eq=False):
    """A decision that is not committed yet. `began` is by the clock that only goes forward; the other times are
    nanoseconds since 1970, as spans have them."""

    delivery: _Delivery
    span: Span
    context: Context
    addressed: Instance | None
    tier: str | None
    decision: Decision
    began: float
    began_at: int
    decided_at: int


class Publishing:
    """A publish under way, current until its `end`. `message` is what to take in: it carries the trace of the
    publish."""

    def __init__(self, message: SagaMessage[Any], parent: Parent, spans: Recorder) -> None:
        is_server = _is_served.get() and not get_current_span().get_span_context().is_valid
        attributes: Attributes = {names.EVENT_TYPE: message.type}
        if message.correlation_key is not None:
            attributes[names.CORRELATION_KEY] = message.correlation_key
        if message.idempotency_key is not None:
            attributes[names.IDEMPOTENCY_KEY] = message.idempotency_key
        if message.concurrency_key is not None:
            attributes[names.CONCURRENCY_KEY] = message.concurrency_key
        kind = SpanKind.SERVER if is_server else SpanKind.PRODUCER
        self._spans = spans
        self._span = spans.begin(names.PUBLISH, parent, kind, attributes)
        self.message = with_trace(message, self._span)
        self._token = otel_context.attach(set_span_in_context(self._span, parent.context))

    def took(self, receipt: _Receipt) -> None:
        """The message is durable."""
        span = self._span
        span.set_attribute(names.OUTCOME, names.SKIPPED if receipt.duplicate else names.SUCCESS)
        span.set_attribute(names.MESSAGE_ID, receipt.message_id)
        if receipt.correlation_key is not None:
            span.set_attribute(names.CORRELATION_KEY, receipt.correlation_key)

    def failed(self, error: Exception) -> None:
        mark_error(self._span, *described(error))

    def end(self) -> None:
        otel_context.detach(self._token)
        self._spans.end(self._span)


class Sending:
    """An attempt to deliver an effect, current until its `end`. `effect` is what goes out: it carries the trace of the
    attempt."""

    def __init__(self, effect: OutboxEffect, spans: Recorder) -> None:
        parent = parent_of(effect.traceparent, effect.tracestate)
        kind = SpanKind.CLIENT if effect.target_kind in _CLIENTS else SpanKind.PRODUCER
        self._spans = spans
        self._span = spans.begin(names.SEND, parent, kind, _about_effect(effect))
        self.effect = with_trace(effect, self._span)
        self._token = otel_context.attach(set_span_in_context(self._span, parent.context))

    def succeeded(self) -> None:
        self._span.set_attribute(names.OUTCOME, names.SUCCESS)

    def failed(self, error: Exception) -> None:
        mark_error(self._span, *described(error))
        status = error.data.get("status") if isinstance(error, SagasError) else None
        if isinstance(status, int):
            self._span.set_attribute(names.HTTP_STATUS, status)

    def end(self) -> None:
        otel_context.detach(self._token)
        self._spans.end(self._span)


class SagaTelemetry:
    """Reports one runtime to these providers. `counts`, `health` and `partitions` are what it is asked for when
    somebody collects metrics."""

    def __init__(
        self,
        providers: TelemetryProviders,
        *,
        counts: CountsView,
        health: Callable[[], HealthView],
        partitions: Callable[[], int],
    ) -> None:
        self.makes_spans = providers.tracer_provider is not None
        """Whether messages that come without a trace get one here."""
        self._spans = Recorder(providers.tracer_provider)
        self._instruments = instruments_of(providers.meter_provider)
        self._observed = Observed(counts, health, partitions)
        self._open: dict[int, _Handling] = {}
        self._instruments.begin(self._observed)

    def close(self) -> None:
        """The runtime has stopped. Closing twice is no error."""
        self._open.clear()
        self._instruments.end(self._observed)

    # ---------------------------------------------------------------- publishing

    @contextmanager
    def serving(self) -> Generator[None]:
        """What is published inside came over the network, and nobody else has a span for that."""
        token = _is_served.set(True)
        try:
            yield
        finally:
            _is_served.reset(token)

    def publish(self, message: SagaMessage[Any]) -> Publishing:
        """Begins a publish."""
        return Publishing(message, closest_parent(message.traceparent, message.tracestate), self._spans)

    def publish_tick(self, tick: SagaMessage[Any]) -> Publishing:
        """Begins the publish of a tick, the first span of its trace whatever is going on around it."""
        return Publishing(tick, Parent(Context()), self._spans)

    # ---------------------------------------------------------------- deciding

    def decide(
        self,
        delivery: _Delivery,
        addressed: Instance | None,
        tier: str | None,
        run: Callable[[Envelope], Decision],
    ) -> Decision:
        """Has `run` decide the message of `delivery`, as it is, but in the trace of the span around it. `tier` is that
        of its definition, if it has one. `committed` or `not_committed` ends the span."""
        envelope = delivery.envelope
        began = time.perf_counter()
        parent = parent_of(envelope.traceparent, envelope.tracestate)
        attributes: Attributes = {
            names.SAGA_ID: envelope.saga_id,
            names.EVENT_TYPE: envelope.type,
            names.CORRELATION_KEY: envelope.key,
            names.ATTEMPT: envelope.attempt + 1,
            names.MESSAGE_ID: envelope.id,
        }
        if tier is not None:
            attributes[names.TIER] = tier
        span = self._spans.begin(names.HANDLE, parent, SpanKind.INTERNAL, attributes)
        began_at = time.time_ns()
        context = set_span_in_context(span, parent.context)
        token = otel_context.attach(context)
        try:
            decision = run(with_trace(envelope, span))
        finally:
            otel_context.detach(token)
        handling = _Handling(delivery, span, context, addressed, tier, decision, began, began_at, time.time_ns())
        self._open[id(delivery)] = handling
        return decision

    def committed(self, planned: Sequence[_Planned], works: Sequence[_Work], conflicts: Mapping[int, Any]) -> None:
        """Ends the spans of what was written, and of what the store has refused. A decision that asked for nothing to
        be written (a message that was tried out of its turn, and has to go on waiting) leaves none."""
        now, ended = time.time_ns(), time.perf_counter()
        open_, self._open = self._open, {}
        written: list[UnitOfWork] = []
        for number, each in enumerate(planned):
            handling = open_.get(id(each.delivery))
            if number not in conflicts:
                written.append(each.unit)
                if handling is not None:
                    self._end(handling, each.unit, now, ended)
            elif handling is not None:
                handling.span.set_attribute(names.DISPOSITION, "conflict")
                handling.span.set_attribute(names.OUTCOME, names.SKIPPED)
                self._spans.end(handling.span, at=now)
        written.extend(work.unit for number, work in enumerate(works, len(planned)) if number not in conflicts)
        self._count(written)

    def not_committed(self, error: SagasError) -> None:
        """Ends the spans of decisions that were not, or may not have been, written."""
        open_, self._open = self._open, {}
        for handling in open_.values():
            mark_error(handling.span, *described(error))
            self._spans.end(handling.span)

    def _end(self, handling: _Handling, unit: UnitOfWork, now: int, ended: float) -> None:
        span, decision, envelope = handling.span, handling.decision, handling.delivery.envelope
        outcome = _outcome(decision)
        if span.is_recording():
            instance = decision.instance or handling.addressed
            run = instance.run if instance is not None else envelope.run or 1
            span.set_attribute(names.INSTANCE_ID, instance_id(envelope.saga_id, envelope.key, run))
            span.set_attribute(names.DISPOSITION, decision.disposition)
            span.set_attribute(names.OUTCOME, outcome)
            if handling.tier is None and instance is not None:
                span.set_attribute(names.TIER, instance.tier)
            before, after = _statuses(handling)
            span.add_event(names.STATE_BEFORE, {names.STATUS: before}, handling.began_at)
            span.add_event(names.STATE_AFTER, {names.STATUS: after}, now)
            if outcome == names.ERROR:
                error_type, text, traceback = _error(decision)
                mark_error(span, error_type, text, traceback=traceback, at=handling.decided_at)
            if decision.disposition == "applied":
                self._note_cascade(handling, unit, now)
        self._spans.end(span, at=now)
        labels = {names.SAGA_ID: envelope.saga_id, names.EVENT_TYPE: envelope.type, names.OUTCOME: outcome}
        self._instruments.handle_duration.record((ended - handling.began) * 1000, labels, handling.context)

    def _note_cascade(self, handling: _Handling, unit: UnitOfWork, now: int) -> None:
        """Short spans for what the decision asked for and carried out by being written."""
        decision, entry = handling.decision, handling.decision.entry
        if entry is None or decision.instance is None:
            return
        about: Attributes = {
            names.SAGA_ID: decision.instance.saga_id,
            names.INSTANCE_ID: instance_id(decision.instance.saga_id, decision.instance.key, decision.instance.run),
            names.CORRELATION_KEY: decision.instance.key,
        }
        leaving = {effect.effect_key for effect in unit.outbox_add}
        reasons = _reasons(entry)
        for step in entry.steps:
            if step.phase == "compensate":
                reason = reasons.get(step.type) or reasons.get(_ALL_STEPS) or entry.reason
                self._note(names.COMPENSATE, handling, now, {**about, **_compensation(step, reason)})
            for effect in step.effects:
                key = effect.effect_key or ""
                if effect.kind == "scheduled":
                    self._note(names.SCHEDULE, handling, now, {**about, **_timer(unit, key)})
                elif effect.kind == "spawn":
                    self._note(names.SPAWN, handling, now, {**about, **_child(unit, effect.target or "", key)})
                elif effect.kind == "send" and key not in leaving:
                    kind, _, identifier = (effect.target or "").partition(":")
                    target: Attributes = {
                        names.TARGET_KIND: kind,
                        names.TARGET_ID: identifier,
                        names.EFFECT_KEY: key,
                        names.OUTCOME: names.SUCCESS,
                    }
                    self._note(names.SEND, handling, now, {**about, **target}, kind=SpanKind.PRODUCER)
                elif effect.kind == "complete":
                    self._note(names.COMPLETE, handling, now, {**about, names.STATUS: decision.instance.status})

    def _note(
        self, name: str, handling: _Handling, now: int, attributes: Attributes, *, kind: SpanKind = SpanKind.INTERNAL
    ) -> None:
        span = self._spans.begin(name, Parent(handling.context), kind, attributes, at=handling.decided_at)
        self._spans.end(span, at=now)

    def _count(self, written: Sequence[UnitOfWork]) -> None:
        active: Counter[str] = Counter()
        compensated: Counter[str] = Counter()
        given_up: Counter[tuple[str, str]] = Counter()
        for unit in written:
            instance = unit.instance
            if instance is not None:
                was_live = unit.status_before is not None and not is_terminal(unit.status_before)
                active[instance.saga_id] += (not is_terminal(instance.status)) - was_live
                if unit.entry is not None:
                    ran = sum(step.phase == "compensate" for step in unit.entry.steps)
                    compensated[instance.saga_id] += ran
            for letter in unit.dead_letters_add:
                given_up[letter.saga_id, letter.code] += 1
        for saga_id, change in active.items():
            if change:
                self._instruments.instances_active.add(change, {names.SAGA_ID: saga_id})
        for saga_id, count in compensated.items():
            if count:
                self._instruments.compensations.add(count, {names.SAGA_ID: saga_id})
        for (saga_id, code), count in given_up.items():
            self._instruments.dead_letters.add(count, {names.SAGA_ID: saga_id, names.ERROR_TYPE: code})

    # ---------------------------------------------------------------- delivering

    def send(self, effect: OutboxEffect) -> Sending:
        """Begins one attempt to deliver `effect`."""
        return Sending(effect, self._spans)


def _outcome(decision: Decision) -> str:
    match decision.disposition:
        case "applied":
            status = decision.instance.status if decision.instance is not None else None
            if status == "failed":
                return names.ERROR
            return names.COMPENSATED if status == "compensating" else names.SUCCESS
        case "pending" | "dead_lettered":
            return names.ERROR
        case _:
            return names.SKIPPED


def _error(decision: Decision) -> tuple[str, str, str | None]:
    """What went wrong: its type, its text, and where."""
    letter = decision.dead_letter
    if letter is not None:
        return letter.code, letter.reason, letter.traceback
    if decision.disposition == "applied":
        return _FAILED, decision.reason or "the saga has failed", None
    text = decision.error or ""
    # An error is described with its class first, unless it was never in a handler.
    return text.partition(":")[0] if decision.spends_attempt else _NEWER, text, None


def _statuses(handling: _Handling) -> tuple[str, str]:
    entry = handling.decision.entry
    if entry is not None:
        return entry.status_before, entry.status_after
    status = handling.addressed.status if handling.addressed is not None else "pending"
    return status, status


def _reasons(entry: HistoryEntry) -> dict[str, str]:
    """Why each compensation was asked for, where somebody said so."""
    asked = (effect for step in entry.steps for effect in step.effects if effect.kind == "compensate")
    return {effect.target: effect.detail for effect in asked if effect.target is not None and effect.detail is not None}


def _compensation(step: StepRecord, reason: str | None) -> Attributes:
    found: Attributes = {names.EVENT_TYPE: step.type, names.CASCADE_SIZE: len(step.effects), names.STATUS: step.status}
    if reason is not None:
        found[names.COMPENSATION_REASON] = reason
    return found


def _timer(unit: UnitOfWork, effect_key: str) -> Attributes:
    for timer in unit.timers_add:
        if timer.id == f"tm{effect_key}":
            delay = timer.due_at - unit.entry.at if unit.entry is not None else None
            found: Attributes = {
                names.EVENT_TYPE: timer.envelope.type,
                names.SCHEDULED_FOR: timer.due_at.isoformat(),
                names.EFFECT_KEY: effect_key,
            }
            if delay is not None:
                found[names.DELAY_MS] = round(delay.total_seconds() * 1000)
            return found
    return {names.EFFECT_KEY: effect_key}  # Asked for and taken back in one decision.


def _child(unit: UnitOfWork, child: str, effect_key: str) -> Attributes:
    found: Attributes = {names.CHILD_ID: child, names.EFFECT_KEY: effect_key}
    for envelope in unit.inbox_add:
        if envelope.parent is not None and envelope.parent.effect_key == effect_key:
            found[names.CHILD_INSTANCE_ID] = instance_id(envelope.saga_id, envelope.key, 1)
    return found


def _about_effect(effect: OutboxEffect) -> Attributes:
    found: Attributes = {
        names.SAGA_ID: effect.saga_id,
        names.INSTANCE_ID: instance_id(effect.saga_id, effect.key, effect.run),
        names.CORRELATION_KEY: effect.key,
        names.ATTEMPT: effect.attempt + 1,
        names.EFFECT_KEY: effect.effect_key,
        names.TARGET_KIND: effect.target_kind,
        names.TARGET_ID: effect.target_id,
    }
    if effect.target_kind == "job":
        found[names.TARGET_JOB_ID] = effect.target_id
    destination = effect.queue or (effect.target_id if effect.target_kind == "queue" else None)
    if destination is not None:
        found[names.DESTINATION] = destination
    if effect.idempotency_key is not None:
        found[names.IDEMPOTENCY_KEY] = effect.idempotency_key
    if effect.concurrency_key is not None:
        found[names.CONCURRENCY_KEY] = effect.concurrency_key
    if effect.retry is not None:
        found[names.MAX_ATTEMPTS] = effect.retry.maximum_attempts
    return found
