"""Traces and metrics, over OpenTelemetry's interface.

`names` has every name that is promised to those who watch, `trace_context` carries the trace of a message from hop to
hop, also where nobody records anything, and the rest records: `sagas` for a saga runtime, `jobs` for a job runtime.

Nothing is recorded, and OpenTelemetry is not even loaded, unless the program has set a provider of its own before it
starts a runtime.
"""

from __future__ import annotations

from sagaloom.telemetry.providers import TelemetryProviders, find_providers
from sagaloom.telemetry.trace_context import Trace, carried_trace, carrying, current_trace

__all__ = [
    "TelemetryProviders",
    "Trace",
    "carried_trace",
    "carrying",
    "current_trace",
    "find_providers",
]
