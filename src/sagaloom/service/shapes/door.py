"""The service itself: what it is, and how it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from msgspec import Meta

from sagaloom.service.shapes.sagas import SagaView
from sagaloom.service.shapes.shape import Shape, Time


class StoreView(Shape, frozen=True, kw_only=True):
    """The store behind this service, and the durability tiers it can promise."""

    id: str
    store_id: str
    tiers: Sequence[str]


class Description(Shape, frozen=True, kw_only=True):
    """What this service is, and what it can do."""

    plugin_name: str
    version: str
    contract_versions: Sequence[str]
    route_groups: Sequence[str]
    capabilities: Sequence[str]
    store: StoreView
    sagas: Sequence[SagaView]


class HealthView(Shape, frozen=True, kw_only=True):
    """How the service is. A check says `ok`, or what is wrong. `degraded`: ready, with a check that is not ok."""

    status: Literal["healthy", "degraded", "unhealthy"]
    timestamp: Time
    version: str
    checks: Mapping[str, str]
    backlog: Annotated[int, Meta(description="Messages waiting to be applied.")]
    outbox: Annotated[int, Meta(description="Effects waiting to leave.")]
    stalled_lanes: Annotated[int, Meta(description="Lanes that stand still behind a dead letter.")]
    oldest_waiting_seconds: float
