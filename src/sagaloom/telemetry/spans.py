"""Spans between W3C headers: which parent a piece of work has, and which trace it hands on.

Rules:

1. The trace context of the message is the parent. So retries and redeliveries are siblings, whichever process makes
   them.
2. Where a span of the same trace is current (an HTTP server's, a caller's), that one is the parent, for it is closer.
   One of another trace is linked.
3. What the work asks for goes on from the span of that work, not from the message: the span's context takes the place
   of the message's.
4. A context that cannot be read is none, and a span that cannot be recorded is left out: tracing never breaks
   anything, whatever the program has plugged into it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
from opentelemetry.context import Context, get_current
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NoOpTracerProvider,
    Span,
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
    get_current_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sagaloom.engine.records import Envelope, OutboxEffect
from sagaloom.errors import SagasError
from sagaloom.messages import SagaMessage
from sagaloom.ports.jobs import JobRun
from sagaloom.telemetry import names

__all__ = ["Attributes", "Parent", "Recorder", "closest_parent", "described", "mark_error", "parent_of", "with_trace"]

Attributes = dict[str, str | bool | int | float]
_log = logging.getLogger("sagaloom.telemetry")
_Traced = TypeVar("_Traced", SagaMessage[Any], Envelope, OutboxEffect, JobRun)
_TEXT_MAX = 4_000
_extract = TraceContextTextMapPropagator().extract


class Parent(NamedTuple):
    """Under what a span begins, and what it is linked to."""

    context: Context
    links: Sequence[Link] = ()


def parent_of(traceparent: str | None, tracestate: str | None) -> Parent:
    """The context of a message as a parent, and linked, so that it is found from either side; none, for a new trace."""
    context = _context_of(traceparent, tracestate)
    span = get_current_span(context).get_span_context()
    return Parent(context, (Link(span),) if span.is_valid else ())


class Recorder:
    """Begins and ends spans, for work that goes on whatever comes of them."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._tracer = (provider or NoOpTracerProvider()).get_tracer(names.SCOPE)
        self._has_complained = False

    def begin(
        self, name: str, parent: Parent, kind: SpanKind, attributes: Attributes, *, at: int | None = None
    ) -> Span:
        """A span that begins now, or at `at` (nanoseconds since 1970)."""
        try:
            return self._tracer.start_span(
                name, context=parent.context, kind=kind, attributes=attributes, links=parent.links, start_time=at
            )
        except Exception as error:  # noqa: BLE001 - a sampler or processor of the host's
            self._complain(error)
            return INVALID_SPAN

    def end(self, span: Span, *, at: int | None = None) -> None:
        try:
            span.end(at)
        except Exception as error:  # noqa: BLE001 - a processor or exporter of the host's
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            _log.error("spans cannot be recorded, which is said only once: %r", error, exc_info=error)


def closest_parent(traceparent: str | None, tracestate: str | None) -> Parent:
    """The same for work that is done in the middle of something, which may have a span of its own."""
    current = get_current_span().get_span_context()
    context = _context_of(traceparent, tracestate)
    given = get_current_span(context).get_span_context()
    if not given.is_valid or given.trace_id == current.trace_id:
        return Parent(get_current())
    return Parent(context, (Link(current),) if current.is_valid else ())


def with_trace(thing: _Traced, span: Span) -> _Traced:
    """`thing` as it goes on from `span`; as it is, where that is no real one."""
    context = span.get_span_context()
    if not context.is_valid:
        return thing
    traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return msgspec.structs.replace(thing, traceparent=traceparent, tracestate=context.trace_state.to_header() or None)


def described(error: BaseException) -> tuple[str, str]:
    """The type of an error, as few different ones as possible, and its text."""
    if isinstance(error, SagasError):
        return error.code, error.message
    return type(error).__name__, str(error)


def mark_error(span: Span, error_type: str, text: str, *, traceback: str | None = None, at: int | None = None) -> None:
    """Says on `span` that its work has failed, and why."""
    if not span.is_recording():
        return
    span.set_attribute(names.OUTCOME, names.ERROR)
    span.set_attribute(names.ERROR_TYPE, error_type)
    span.set_status(Status(StatusCode.ERROR, text[:_TEXT_MAX]))
    details: Attributes = {"exception.type": error_type, "exception.message": text[:_TEXT_MAX]}
    if traceback is not None:
        details["exception.stacktrace"] = traceback
    span.add_event(names.EXCEPTION, details, at)


def _context_of(traceparent: str | None, tracestate: str | None) -> Context:
    if traceparent is None:
        return Context()
    carrier = {"traceparent": traceparent}
    if tracestate is not None:
        carrier["tracestate"] = tracestate
    return _extract(carrier, Context())
