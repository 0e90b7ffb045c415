"""What a job runtime reports: a span around each trigger and each attempt of a run.

job.trigger ──► job.run (attempt 1), job.run (attempt 2) ──► what the job does and publishes
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from opentelemetry import context as otel_context
from opentelemetry.trace import Span, SpanKind, set_span_in_context

from sagaloom.ports.jobs import Failed, JobRun, Released, Retried, Settlement
from sagaloom.telemetry import names
from sagaloom.telemetry.instruments import instruments_of
from sagaloom.telemetry.providers import TelemetryProviders
from sagaloom.telemetry.spans import Attributes, Recorder, closest_parent, described, mark_error, parent_of, with_trace

__all__ = ["Attempting", "JobTelemetry", "Triggering"]


class _Enqueued(Protocol):
    @property
    def run(self) -> JobRun: ...
    @property
    def duplicate(self) -> bool: ...


class Triggering:
    """A trigger under way. `run` is what to enqueue: it carries the trace of the trigger."""

    def __init__(self, run: JobRun, span: Span) -> None:
        self.run = run
        self._span = span

    def took(self, enqueued: _Enqueued) -> None:
        """The run is durable."""
        self._span.set_attribute(names.OUTCOME, names.SKIPPED if enqueued.duplicate else names.SUCCESS)
        self._span.set_attribute(names.JOB_RUN_ID, enqueued.run.run_id)


class Attempting:
    """An attempt under way. `run` is what to work on: it carries the trace of the attempt."""

    def __init__(self, run: JobRun, span: Span) -> None:
        self.run = run
        self.outcome = names.SKIPPED
        self._span = span

    def came_to(self, settlement: Settlement) -> None:
        """The attempt is over."""
        match settlement:
            case Failed(failure) | Retried(failure):
                self.outcome = names.ERROR
                mark_error(self._span, failure.code, failure.message, traceback=failure.traceback)
            case Released():
                self.outcome = names.SKIPPED
            case _:
                self.outcome = names.SUCCESS


class JobTelemetry:
    """Reports one job runtime to these providers."""

    def __init__(self, providers: TelemetryProviders) -> None:
        self.makes_spans = providers.tracer_provider is not None
        """Whether runs that are triggered without a trace get one here."""
        self._spans = Recorder(providers.tracer_provider)
        self._duration = instruments_of(providers.meter_provider).job_duration

    @contextmanager
    def trigger(self, run: JobRun) -> Generator[Triggering]:
        """A span around the enqueueing of `run`."""
        parent = closest_parent(run.traceparent, run.tracestate)
        attributes: Attributes = {names.JOB_ID: run.job_id}
        if run.correlation_id is not None:
            attributes[names.CORRELATION_ID] = run.correlation_id
        if run.idempotency_key is not None:
            attributes[names.IDEMPOTENCY_KEY] = run.idempotency_key
        span = self._spans.begin(names.TRIGGER, parent, SpanKind.PRODUCER, attributes)
        token = otel_context.attach(set_span_in_context(span, parent.context))
        try:
            yield Triggering(with_trace(run, span), span)
        except BaseException as error:
            mark_error(span, *described(error))
            raise
        finally:
            otel_context.detach(token)
            self._spans.end(span)

    @contextmanager
    def attempt(self, run: JobRun) -> Generator[Attempting]:
        """A span around one attempt of a claimed run, current for its handler."""
        began = time.perf_counter()
        parent = parent_of(run.traceparent, run.tracestate)
        attributes: Attributes = {
            names.JOB_ID: run.job_id,
            names.JOB_RUN_ID: run.run_id,
            names.JOB_ATTEMPT: run.attempt,
        }
        if run.correlation_id is not None:
            attributes[names.CORRELATION_ID] = run.correlation_id
        span = self._spans.begin(names.RUN, parent, SpanKind.CONSUMER, attributes)
        context = set_span_in_context(span, parent.context)
        token = otel_context.attach(context)
        attempting = Attempting(with_trace(run, span), span)
        try:
            yield attempting
        finally:
            otel_context.detach(token)
            if attempting.outcome != names.ERROR:
                span.set_attribute(names.OUTCOME, attempting.outcome)
            self._spans.end(span)
            labels = {names.JOB_ID: run.job_id, names.OUTCOME: attempting.outcome}
            self._duration.record((time.perf_counter() - began) * 1000, labels, context)
