"""The trace of a piece of work, as it goes from hop to hop in W3C form, whether or not anybody records it.

A message carries its trace in `traceparent` and `tracestate`. What it makes others do (effects, replies, timers,
children) inherits them in the engine, as plain values. What this module adds is the way through code that is not ours:
a job or a function of the host that publishes while it works on something goes on in that thing's trace, without
having to say so.

A span of OpenTelemetry that is current comes first: it is the closer one of the same trace.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

__all__ = ["CARRIED", "Trace", "carried_trace", "carrying", "current_trace"]


class Trace(NamedTuple):
    """A trace context, in the words of its two headers."""

    traceparent: str
    tracestate: str | None = None


CARRIED: ContextVar[Trace | None] = ContextVar("sagaloom_trace", default=None)
"""The trace of what is being worked on. Set it directly only where a context manager costs too much."""

carried_trace = CARRIED.get
"""The trace of what is being worked on here; cheap enough for every message."""


@contextmanager
def carrying(traceparent: str | None, tracestate: str | None = None) -> Generator[None]:
    """What is published inside goes on in this trace, unless it has one of its own."""
    token = CARRIED.set(Trace(traceparent, tracestate) if traceparent is not None else None)
    try:
        yield
    finally:
        CARRIED.reset(token)


def current_trace() -> Trace | None:
    """The trace that is going on here: that of the current span, else what is carried, else None."""
    # While nobody has loaded OpenTelemetry there is no span, so this need not do so either.
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.trace import get_current_span

        span = get_current_span().get_span_context()
        if span.is_valid:
            traceparent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
            return Trace(traceparent, span.trace_state.to_header() or None)
    return CARRIED.get()
