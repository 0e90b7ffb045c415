"""Providers that keep what they are told, and what tests want to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sagaloom.telemetry import TelemetryProviders

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
TRACE = f"00-{TRACE_ID}-{SPAN_ID}-01"


class Listener:
    """Listens to one runtime, or to several."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.providers = TelemetryProviders(self.tracer_provider, self.meter_provider)

    def close(self) -> None:
        self.tracer_provider.shutdown()
        self.meter_provider.shutdown()

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """The spans that have ended, in the order in which they began."""
        ended = [span for span in self._exporter.get_finished_spans() if name in (None, span.name)]
        return sorted(ended, key=lambda span: span.start_time or 0)

    def the(self, name: str, **attributes: Any) -> ReadableSpan:
        """The only span of this name with these attributes, whose dots are written as two underscores."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        (found,) = [
            span for span in self.spans(name) if all(attributes_of(span).get(key) == wanted[key] for key in wanted)
        ]
        return found

    def metric(self, name: str) -> dict[frozenset[tuple[str, Any]], float]:
        """The values of a metric by their attributes; of a histogram, how many were recorded."""
        found: dict[frozenset[tuple[str, Any]], float] = {}
        for metric in self._collected():
            if metric.name == name:
                for point in metric.data.data_points:
                    value = point.count if isinstance(point, HistogramDataPoint) else point.value
                    found[frozenset((point.attributes or {}).items())] = value
        return found

    def metric_units(self) -> dict[str, str | None]:
        """Every metric with a value, and its unit."""
        return {metric.name: metric.unit for metric in self._collected()}

    def _collected(self) -> list[Any]:
        data = self._reader.get_metrics_data()
        if not isinstance(data, MetricsData):
            return []
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return [metric for scope in scopes if scope.scope.name == "netscript.sagas" for metric in scope.metrics]


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    return span.attributes or {}


def labels(**attributes: Any) -> frozenset[tuple[str, Any]]:
    """Attributes as `Listener.metric` has them; dots are written as two underscores."""
    return frozenset((name.replace("__", "."), value) for name, value in attributes.items())


def trace_id(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}" if span.context is not None else ""


def span_id(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}" if span.context is not None else ""


def parent_id(span: ReadableSpan) -> str | None:
    return f"{span.parent.span_id:016x}" if span.parent is not None else None


def traceparent(span: ReadableSpan) -> str:
    """The context that what `span` made goes on in."""
    assert span.context is not None
    return f"00-{trace_id(span)}-{span_id(span)}-{span.context.trace_flags:02x}"


def statuses(span: ReadableSpan) -> dict[str, Any]:
    """The status in each event that has one."""
    return {
        event.name: (event.attributes or {})["netscript.saga.status"]
        for event in span.events
        if "netscript.saga.status" in (event.attributes or {})
    }
