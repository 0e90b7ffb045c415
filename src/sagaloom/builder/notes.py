"""What a saga that is being written has been told so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sagaloom.codec import Codec
from sagaloom.definitions import (
    CompensationBinding,
    ConcurrencyPolicy,
    HandlerBinding,
    Invariant,
    JoinBinding,
    QueryBinding,
    RetryPolicy,
    Reuse,
    SagaCorrelation,
    SagaDurabilityTier,
    SchedulePolicy,
    TimeoutPolicy,
    UpdateBinding,
)

_Migration: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """All that has been said about a saga so far."""

    id: str
    version: int = 1
    durability: SagaDurabilityTier = "t1"
    initial_json: bytes = b""
    state_codec: Codec[Any] | None = None
    handlers: Mapping[str, HandlerBinding] = dataclasses.field(default_factory=dict[str, HandlerBinding])
    compensations: Mapping[str, CompensationBinding] = dataclasses.field(default_factory=dict[str, CompensationBinding])
    correlations: Mapping[str, SagaCorrelation[Any]] = dataclasses.field(
        default_factory=dict[str, SagaCorrelation[Any]]
    )
    concurrency: ConcurrencyPolicy | None = None
    joins: tuple[JoinBinding, ...] = ()
    status_field: str = "status"
    signals: Mapping[str, HandlerBinding] = dataclasses.field(default_factory=dict[str, HandlerBinding])
    updates: Mapping[str, UpdateBinding] = dataclasses.field(default_factory=dict[str, UpdateBinding])
    queries: Mapping[str, QueryBinding] = dataclasses.field(default_factory=dict[str, QueryBinding])
    retry: RetryPolicy = dataclasses.field(default_factory=RetryPolicy)
    reuse: Reuse = "reject"
    is_singleton: bool = False
    invariants: tuple[Invariant, ...] = ()
    migrations: Mapping[int, _Migration] = dataclasses.field(default_factory=dict[int, Callable[[Any], Any]])
    schedule: SchedulePolicy | None = None
    timeouts: tuple[TimeoutPolicy, ...] = ()
    pivots: frozenset[str] = frozenset()

    @property
    def where(self) -> str:
        return f"saga {self.id!r}"
