"""Sagas: their definitions, and the migration of their instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sagaloom.definitions import SagaDefinition, SagaDurabilityTier
from sagaloom.describe import describe
from sagaloom.runtime.evolution import MigrationPage
from sagaloom.service.shapes.shape import ControlView, Shape, TroubleView, trouble_view


class HandledTypeView(Shape, frozen=True, kw_only=True):
    """A message type with a handler. `starts`: it may open an instance."""

    type: str
    starts: bool
    on_missing: str
    schema: Mapping[str, Any]
    during: Annotated[
        Sequence[str] | UnsetType, Meta(description="The business statuses it is handled in, when not in all.")
    ] = UNSET
    on_unexpected: Annotated[str | UnsetType, Meta(description="What becomes of it in any other status.")] = UNSET
    patience: Annotated[
        int | UnsetType, Meta(description="How long it waits for its instance, in milliseconds, with onMissing `wait`.")
    ] = UNSET


class CompensationView(Shape, frozen=True, kw_only=True):
    """A message type with an undo handler."""

    type: str
    schema: Mapping[str, Any]


class SignalView(Shape, frozen=True, kw_only=True):
    """A signal, or an update, and the schema of its payload."""

    name: str
    schema: Mapping[str, Any]


class QueryView(Shape, frozen=True, kw_only=True):
    """A query, and the schema of its answer."""

    name: str
    schema: Mapping[str, Any]


class RetryView(Shape, frozen=True, kw_only=True):
    """When a failed attempt is made again. Delays are milliseconds."""

    max_attempts: int
    initial_delay: int
    max_delay: int
    backoff_multiplier: float
    jitter: float
    non_retryable_error_types: Sequence[str]


class ConcurrencyView(Shape, frozen=True, kw_only=True):
    """How many messages run at once, per key."""

    limit: int
    on_limit: str


class ScheduleView(Shape, frozen=True, kw_only=True):
    """When a saga ticks, in which time zone, what becomes of ticks that were missed, and the type of a tick."""

    cron: str
    timezone: str
    catch_up: Literal["latest", "all", "none"]
    message_type: str


class TimeoutView(Shape, frozen=True, kw_only=True):
    """A message that a run gets when it is still live `delay` milliseconds after it was opened."""

    name: str
    delay: int
    message_type: str


class GraphNode(Shape, frozen=True, kw_only=True):
    """A node: `start`, `instance`, a message type, signal or update, a compensation, a schedule or a timeout; and what
    was read off the handlers: a status, a target, a child, an end."""

    id: str
    kind: str
    label: str


class GraphEdge(Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """An edge of the graph: which types start an instance, which continue one, which compensations undo them, which a
    schedule or a timeout sends; and what handlers may send, schedule, spawn, set or end."""

    from_: str
    to: str
    kind: str


class SagaGraph(Shape, frozen=True, kw_only=True):
    """What can be known of a saga's course without running it."""

    nodes: Sequence[GraphNode]
    edges: Sequence[GraphEdge]


class RetentionView(Shape, frozen=True, kw_only=True):
    """For how many days finished runs are kept, and live ones are nothing to wonder about; null: without an end."""

    completed_days: float | None
    active_days: float | None


class SagaView(Shape, frozen=True, kw_only=True):
    """A loaded saga definition, with what its configuration says of it."""

    id: str
    name: str
    description: str
    topic: str
    enabled: Annotated[bool, Meta(description="Neither its configuration nor an operator has disabled it.")]
    paused: Annotated[bool, Meta(description="An operator has all its instances wait.")]
    entrypoint: str
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    retention: RetentionView
    version: int
    durability_tier: SagaDurabilityTier
    handled_message_types: Sequence[HandledTypeView]
    compensations: Sequence[CompensationView]
    pivots: Annotated[Sequence[str], Meta(description="Message types that are points of no return.")]
    correlations: Sequence[str]
    signals: Sequence[SignalView]
    updates: Sequence[SignalView]
    queries: Sequence[QueryView]
    joins: Annotated[Sequence[Sequence[str]], Meta(description="Message types that one handler waits for together.")]
    status_field: Annotated[str, Meta(description="The field of the state that holds the business status.")]
    retry: RetryView
    concurrency: ConcurrencyView | None
    schedule: ScheduleView | None
    timeouts: Sequence[TimeoutView]
    reuse: str
    singleton: bool
    invariants: Sequence[str]
    migrates_from: Sequence[int]
    state_schema: Mapping[str, Any]
    initial_state: Any
    fingerprint: str
    graph: SagaGraph
    control: Annotated[ControlView | UnsetType, Meta(description="There in answers to commands.")] = UNSET


class MigrateBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many instances to migrate in this request, and where to go on."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    cursor: str | None = None


class MigrationAnswer(Shape, frozen=True, kw_only=True):
    """What became of some instances of an older version. `left` counts the live ones that are still older, exactly up
    to 10000. `cursor` is for the next request and null at the end."""

    migrated: int
    failed: int
    left: int
    cursor: str | None
    troubles: Sequence[TroubleView]


class SagaList(Shape, frozen=True, kw_only=True):
    """A page of the loaded sagas, by id."""

    sagas: Sequence[SagaView]
    total: int
    limit: int
    offset: int


def saga_view(definition: SagaDefinition[Any]) -> dict[str, Any]:
    """A definition as a document of the shape `SagaView`. What a saga's configuration would say beside its definition
    (topic, tags and the like) has the value it has for a saga without one."""
    return describe(definition)


def migration_answer(page: MigrationPage) -> MigrationAnswer:
    return MigrationAnswer(
        migrated=page.migrated,
        failed=len(page.troubles),
        left=page.left,
        cursor=page.cursor,
        troubles=[trouble_view(one) for one in page.troubles],
    )
