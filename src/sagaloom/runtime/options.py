"""How a runtime is set up: plain values with defaults that suit a laptop and a small server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sagaloom.definitions import RetryPolicy
from sagaloom.engine.limits import Limits

__all__ = ["RuntimeOptions", "no_step"]


def no_step(name: str) -> None:
    """The default of `RuntimeOptions.on_step`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """`batch_max` messages are committed together at most; `dispatch_concurrency` effects are under way at once, each
    for at most `dispatch_timeout_seconds`. `effect_retry` is for effects that bring no policy of their own. More than
    `backlog_max` messages waiting in memory, or payloads of more than `backlog_bytes_max`, refuse further ones
    (`SAGA_OVERLOADED`, retryable).

    The feed keeps `feed_retention_events` events, and none for longer than `feed_retention_hours`. A message that comes
    again within `idempotency_days` is a duplicate; later it is taken for a new one.
    `works=False` takes messages in and leaves them to other processes on the same store. A process that neither dies
    nor runs (stopped, or starved) loses what it holds to others after `lease_seconds`; one that dies, at once.

    `on_step` is called with the name of every step of the walk a process can be cut at:
    `accepted claimed decided committed compensated dispatched settled timer_due pruned`; tests stop the process there.
    """

    batch_max: int = 256
    dispatch_concurrency: int = 64
    dispatch_timeout_seconds: float = 30.0
    drain_seconds: float = 2.0
    backlog_max: int = 100_000
    backlog_bytes_max: int = 256 << 20
    cache_bytes_max: int = 64 << 20
    works: bool = True
    lease_seconds: float = 6.0
    wait_seconds_max: float = 30.0
    feed_retention_hours: float = 24.0
    feed_retention_events: int = 1_000_000
    idempotency_days: float = 7.0
    limits: Limits = field(default_factory=Limits)
    effect_retry: RetryPolicy = field(default_factory=lambda: RetryPolicy(maximum_attempts=10))
    on_step: Callable[[str], None] = no_step
