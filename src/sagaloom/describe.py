"""A definition as people and programs look at it: plain JSON in the wire's camelCase."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec

from sagaloom.codec import Codec
from sagaloom.definitions import HandlerBinding, RetryPolicy, SagaDefinition, SchedulePolicy
from sagaloom.graph import graph_of

__all__ = ["describe"]


def describe(definition: SagaDefinition[Any]) -> dict[str, Any]:
    """What `GET /sagas/{id}` answers: everything about `definition` that is data, as JSON values.

    The graph has a node for `start`, for `instance`, for every handled type and for every compensation; an edge leads
    from `start` or `instance` to a type, and from a type to its compensation. A schedule and each timeout have a node
    too, and an edge to the type that they send. What handlers may do beside that (`sagaloom.graph`) is there as far as
    it can be read off their source.

    >>> import sagaloom
    >>> saga = sagaloom.define_saga("order").state({}).on("OrderPlaced", lambda saga, event, context: []).build()
    >>> describe(saga)["graph"]["edges"]
    [{'from': 'start', 'to': 'OrderPlaced', 'kind': 'starts'}]
    """
    handlers, compensations = definition.handlers.values(), definition.compensations.values()
    about = definition.about
    concurrency = definition.concurrency
    graph = graph_of(definition)
    return {
        "id": definition.id,
        "name": about.name or definition.id,
        "description": about.description or definition.id,
        "topic": about.topic,
        "enabled": about.enabled,
        "paused": about.paused,
        "entrypoint": about.entrypoint,
        "tags": list(about.tags),
        "metadata": dict(about.metadata),
        "retention": {"completedDays": about.retention.completed_days, "activeDays": about.retention.active_days},
        "version": definition.version,
        "durabilityTier": definition.durability,
        "handledMessageTypes": [
            {
                "type": one.type,
                "starts": one.starts,
                "onMissing": one.on_missing,
                "schema": _schema(one.codec),
                **_conditions(one),
            }
            for one in handlers
        ],
        "compensations": [{"type": one.type, "schema": _schema(one.codec)} for one in compensations],
        "pivots": sorted(definition.pivots),
        "correlations": list(definition.correlations),
        "signals": [{"name": one.type, "schema": _schema(one.codec)} for one in definition.signals.values()],
        "updates": [{"name": one.type, "schema": _schema(one.codec)} for one in definition.updates.values()],
        "queries": [{"name": one.name, "schema": _schema(one.codec)} for one in definition.queries.values()],
        "joins": [list(one.codecs) for one in definition.joins],
        "statusField": definition.status_field,
        "retry": _retry(definition.retry),
        "concurrency": concurrency and {"limit": concurrency.limit, "onLimit": concurrency.on_limit},
        "schedule": _schedule(definition.schedule),
        "timeouts": [
            {"name": one.name, "delay": _milliseconds(one.delay), "messageType": one.message_type}
            for one in definition.timeouts
        ],
        "reuse": definition.reuse,
        "singleton": definition.is_singleton,
        "invariants": [one.name for one in definition.invariants],
        "migratesFrom": sorted(definition.migrations),
        "stateSchema": _schema(definition.state_codec),
        "initialState": msgspec.json.decode(definition.state_codec.encode(definition.initial_state)),
        "fingerprint": definition.fingerprint,
        "graph": {
            "nodes": [{"id": node.id, "kind": node.kind, "label": node.label} for node in graph.nodes],
            "edges": [{"from": edge.source, "to": edge.target, "kind": edge.kind} for edge in graph.edges],
        },
    }


def _schema(codec: Codec[Any]) -> dict[str, Any]:
    return dict(codec.json_schema())


def _conditions(binding: HandlerBinding) -> dict[str, Any]:
    """When a type is handled, for one that is not always."""
    conditions: dict[str, Any] = {}
    if binding.during is not None:
        conditions |= {"during": list(binding.during), "onUnexpected": binding.on_unexpected}
    if binding.on_missing == "wait":
        conditions["patience"] = _milliseconds(binding.patience)
    return conditions


def _schedule(policy: SchedulePolicy | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    return {
        "cron": policy.cron,
        "timezone": policy.timezone,
        "catchUp": policy.catch_up,
        "messageType": policy.message_type,
    }


def _milliseconds(length: timedelta) -> int:
    return length // timedelta(milliseconds=1)


def _retry(policy: RetryPolicy) -> dict[str, Any]:
    return {
        "maxAttempts": policy.maximum_attempts,
        "initialDelay": policy.initial_interval_ms,
        "maxDelay": policy.maximum_interval_ms,
        "backoffMultiplier": policy.backoff_coefficient,
        "jitter": policy.jitter,
        "nonRetryableErrorTypes": list(policy.non_retryable_error_types),
    }
