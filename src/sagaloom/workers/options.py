"""How jobs are run: plain values with defaults that suit a laptop and a small server."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Final

from sagaloom.errors import ConfigurationError

__all__ = ["JobOptions"]

_LEAST: Final = {
    "poll_seconds": 0.01,
    "lease_seconds": 0.1,
    "drain_seconds": 0.0,
    "note_seconds": 0.0,
    "cancel_grace_seconds": 0.0,
    "runs_kept_days": 0.0,
    "events_kept_hours": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """`concurrency` runs are under way at once at most, `processes` of them in processes of the pool. What another
    process enqueues is noticed within `poll_seconds`. A run is claimed for `lease_seconds` at a time, renewed while it
    is worked on. What handlers say is written down every `note_seconds` at most. A handler that is asked to end has
    `cancel_grace_seconds` to do so. On the way out, runs get `drain_seconds` to end; the others are given back.

    Larger payloads and results are refused, and so are triggers while `backlog_max` runs are pending. Runs that are
    over are kept for `runs_kept_days`, what happened to them for `events_kept_hours`."""

    concurrency: int = 16
    processes: int = field(default_factory=lambda: os.cpu_count() or 1)
    poll_seconds: float = 0.5
    lease_seconds: float = 6.0
    drain_seconds: float = 2.0
    payload_bytes_max: int = 1 << 20
    result_bytes_max: int = 1 << 20
    note_seconds: float = 0.5
    cancel_grace_seconds: float = 5.0
    backlog_max: int = 100_000
    runs_kept_days: float = 7.0
    events_kept_hours: float = 24.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "processes", "payload_bytes_max", "result_bytes_max", "backlog_max"):
            number: object = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"{name}={number!r:.80} of jobs must be an integer from 1 on")
        for name, least in _LEAST.items():
            seconds: object = getattr(self, name)
            is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not is_number or not least <= seconds < math.inf:  # type: ignore[operator]
                raise ConfigurationError(
                    f"{name}={seconds!r:.80} of jobs must be a number of {name.rpartition('_')[2]} from {least:g} on"
                )
