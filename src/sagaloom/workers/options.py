"""How jobs are run: plain values with defaults that suit a laptop and a small server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sagaloom.errors import ConfigurationError

__all__ = ["JobOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """`concurrency` runs are under way at once at most. What another process enqueues is noticed within `poll_seconds`.
    A run is claimed for `lease_seconds` at a time, renewed while it is worked on. On the way out, runs get
    `drain_seconds` to end; the others are given back. Larger payloads and results are refused."""

    concurrency: int = 16
    poll_seconds: float = 0.5
    lease_seconds: float = 6.0
    drain_seconds: float = 2.0
    payload_bytes_max: int = 1 << 20
    result_bytes_max: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("concurrency", "payload_bytes_max", "result_bytes_max"):
            number: object = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"{name}={number!r:.80} of jobs must be an integer from 1 on")
        for name, least in (("poll_seconds", 0.01), ("lease_seconds", 0.1), ("drain_seconds", 0.0)):
            seconds: object = getattr(self, name)
            is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not is_number or not least <= seconds < math.inf:  # type: ignore[operator]
                raise ConfigurationError(
                    f"{name}={seconds!r:.80} of jobs must be a number of seconds from {least:g} on"
                )
