"""What a queue reports: a span around each enqueueing and around each attempt at a message.

queue.enqueue ──► queue.dequeue (attempt 1), queue.dequeue (attempt 2) ──► what the handler does and publishes
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
from opentelemetry import context as otel_context
from opentelemetry.trace import Span, SpanKind, set_span_in_context

from sagaloom.ports.queue import Buried, Delivery, QueueMessage, Retried, Settlement
from sagaloom.telemetry import names
from sagaloom.telemetry.instruments import instruments_of
from sagaloom.telemetry.providers import TelemetryProviders
from sagaloom.telemetry.spans import Attributes, Recorder, closest_parent, described, mark_error, parent_of

__all__ = ["Dequeueing", "Enqueueing", "QueueTelemetry"]

_TRACEPARENT = "traceparent"
_TRACESTATE = "tracestate"


class Enqueueing:
    """An enqueueing under way. `messages` are what to send: they carry the trace of the span."""

    def __init__(self, messages: Sequence[QueueMessage], span: Span) -> None:
        self.messages = messages
        self._span = span

    def took(self, duplicates: int) -> None:
        """The broker has them; so many of them it had before."""
        is_new = duplicates < len(self.messages)
        self._span.set_attribute(names.OUTCOME, names.SUCCESS if is_new else names.SKIPPED)


class Dequeueing:
    """An attempt at a message under way."""

    def __init__(self, span: Span) -> None:
        self.outcome = names.SKIPPED
        self.died_of: str | None = None
        self._span = span

    def came_to(self, settlement: Settlement | None) -> None:
        """The attempt is over; None: its handler has settled it by itself."""
        match settlement:
            case Buried(_, letter):
                self.outcome, self.died_of = names.ERROR, letter.error_code or letter.reason
                mark_error(self._span, self.died_of, letter.error_message or "", traceback=letter.traceback)
            case Retried():
                self.outcome = names.ERROR
                mark_error(self._span, "RETRIED", "the attempt failed, and the message comes again")
            case _:
                self.outcome = names.SUCCESS


class QueueTelemetry:
    """Reports one queue to these providers."""

    def __init__(self, providers: TelemetryProviders) -> None:
        self._spans = Recorder(providers.tracer_provider)
        instruments = instruments_of(providers.meter_provider)
        self._duration = instruments.queue_duration
        self._dead_letters = instruments.queue_dead_letters

    @contextmanager
    def enqueue(self, queue: str, messages: Sequence[QueueMessage]) -> Generator[Enqueueing]:
        """A span around the enqueueing of `messages`, at least one."""
        headers = messages[0].headers
        parent = closest_parent(headers.get(_TRACEPARENT), headers.get(_TRACESTATE))
        attributes: Attributes = {names.DESTINATION: queue, names.BATCH_SIZE: len(messages)}
        if len(messages) == 1:
            attributes[names.MESSAGE_ID] = messages[0].id
        span = self._spans.begin(names.ENQUEUE, parent, SpanKind.PRODUCER, attributes)
        token = otel_context.attach(set_span_in_context(span, parent.context))
        try:
            yield Enqueueing([_with_trace(message, span) for message in messages], span)
        except BaseException as error:
            mark_error(span, *described(error))
            raise
        finally:
            otel_context.detach(token)
            self._spans.end(span)

    @contextmanager
    def dequeue(self, queue: str, delivery: Delivery) -> Generator[Dequeueing]:
        """A span around one attempt at a message, current for its handler."""
        began = time.perf_counter()
        headers = delivery.message.headers
        parent = parent_of(headers.get(_TRACEPARENT), headers.get(_TRACESTATE))
        attributes: Attributes = {
            names.DESTINATION: queue,
            names.MESSAGE_ID: delivery.message.id,
            names.QUEUE_ATTEMPT: delivery.attempt,
        }
        span = self._spans.begin(names.DEQUEUE, parent, SpanKind.CONSUMER, attributes)
        context = set_span_in_context(span, parent.context)
        token = otel_context.attach(context)
        dequeueing = Dequeueing(span)
        try:
            yield dequeueing
        finally:
            otel_context.detach(token)
            if dequeueing.outcome != names.ERROR:
                span.set_attribute(names.OUTCOME, dequeueing.outcome)
            self._spans.end(span)
            labels = {names.DESTINATION: queue, names.OUTCOME: dequeueing.outcome}
            self._duration.record((time.perf_counter() - began) * 1000, labels, context)
            if dequeueing.died_of is not None:
                died = {names.DESTINATION: queue, names.ERROR_TYPE: dequeueing.died_of}
                self._dead_letters.add(1, died, context)


def _with_trace(message: QueueMessage, span: Span) -> QueueMessage:
    context = span.get_span_context()
    if not context.is_valid:
        return message
    headers: Mapping[str, str] = {
        **message.headers,
        _TRACEPARENT: f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}",
        _TRACESTATE: context.trace_state.to_header(),
    }
    return msgspec.structs.replace(message, headers={name: value for name, value in headers.items() if value})
