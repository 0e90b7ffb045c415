"""Logs of the doors: lines for people on a terminal, JSON everywhere else. Always on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

from sagaloom.telemetry import current_trace

__all__ = ["configure_logs"]


def _add_trace(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Names the trace in which a line was written, where there is one, so that lines and spans find each other."""
    trace = current_trace()
    parts = trace.traceparent.split("-") if trace is not None else []
    if len(parts) >= 4 and "trace_id" not in event:
        event["trace_id"], event["span_id"] = parts[1], parts[2]
    return event


def configure_logs(level: str = "info") -> None:
    """Sends every log record of this process through one formatter. Called once, by a door, never by the library."""
    import structlog

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        _add_trace,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty():
        last: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer()]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # They report every request and every reconnect; ours say what matters.
    for noisy in ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx2", "httpcore2", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
