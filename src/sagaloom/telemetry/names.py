"""Every name that is recorded: a promise to those whose dashboards and alerts are made of them.

The reference page `docs/reference/telemetry.md` lists the same, and a test compares the two.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ATTRIBUTES", "EVENTS", "METRICS", "OUTCOMES", "RESERVED_METRICS", "SCOPE", "SPANS", "UNITS"]

SCOPE: Final = "netscript.sagas"
"""The name of the tracer and of the meter."""

# --- Spans -----------------------------------------------------------------------------------------------------------

PUBLISH: Final = "saga.publish"
HANDLE: Final = "saga.handle"
SEND: Final = "saga.cascade.send"
SCHEDULE: Final = "saga.cascade.schedule"
SPAWN: Final = "saga.cascade.spawn"
COMPENSATE: Final = "saga.cascade.compensate"
COMPLETE: Final = "saga.cascade.complete"
TRIGGER: Final = "job.trigger"
RUN: Final = "job.run"
ENQUEUE: Final = "queue.enqueue"
DEQUEUE: Final = "queue.dequeue"
SPANS: Final = (PUBLISH, HANDLE, SEND, SCHEDULE, SPAWN, COMPENSATE, COMPLETE, TRIGGER, RUN, ENQUEUE, DEQUEUE)

STATE_BEFORE: Final = "state.before"
STATE_AFTER: Final = "state.after"
EXCEPTION: Final = "exception"
EVENTS: Final = (STATE_BEFORE, STATE_AFTER, EXCEPTION)

# --- Attributes ------------------------------------------------------------------------------------------------------

SAGA_ID: Final = "netscript.saga.id"
INSTANCE_ID: Final = "netscript.saga.instance.id"
EVENT_TYPE: Final = "netscript.saga.event.type"
ATTEMPT: Final = "netscript.saga.attempt"
TIER: Final = "netscript.saga.durability_tier"
CORRELATION_KEY: Final = "netscript.saga.correlation_key"
STATUS: Final = "netscript.saga.status"
DISPOSITION: Final = "netscript.saga.disposition"
OUTCOME: Final = "netscript.outcome"
ERROR_TYPE: Final = "error.type"
MESSAGE_ID: Final = "messaging.message.id"
EFFECT_KEY: Final = "netscript.saga.effect.key"
TARGET_KIND: Final = "netscript.target.kind"
TARGET_ID: Final = "netscript.target.id"
TARGET_JOB_ID: Final = "netscript.job.target.id"
DESTINATION: Final = "messaging.destination.name"
IDEMPOTENCY_KEY: Final = "netscript.idempotency.key"
CONCURRENCY_KEY: Final = "netscript.concurrency.key"
MAX_ATTEMPTS: Final = "netscript.retry.max_attempts"
HTTP_STATUS: Final = "http.response.status_code"
SCHEDULED_FOR: Final = "netscript.saga.scheduled_for"
DELAY_MS: Final = "netscript.saga.delay_ms"
CHILD_ID: Final = "netscript.saga.child.id"
CHILD_INSTANCE_ID: Final = "netscript.saga.child.instance.id"
COMPENSATION_REASON: Final = "netscript.saga.compensation.reason"
CASCADE_SIZE: Final = "netscript.saga.compensation.cascade_size"
JOB_ID: Final = "netscript.job.id"
JOB_RUN_ID: Final = "netscript.job.run.id"
JOB_ATTEMPT: Final = "netscript.job.attempt"
QUEUE_ATTEMPT: Final = "netscript.queue.attempt"
BATCH_SIZE: Final = "messaging.batch.message_count"
CORRELATION_ID: Final = "netscript.correlation.id"
ATTRIBUTES: Final = (
    *(SAGA_ID, INSTANCE_ID, EVENT_TYPE, ATTEMPT, TIER, CORRELATION_KEY, STATUS, DISPOSITION, OUTCOME, ERROR_TYPE),
    *(MESSAGE_ID, EFFECT_KEY, TARGET_KIND, TARGET_ID, TARGET_JOB_ID, DESTINATION, IDEMPOTENCY_KEY, CONCURRENCY_KEY),
    *(MAX_ATTEMPTS, HTTP_STATUS, SCHEDULED_FOR, DELAY_MS, CHILD_ID, CHILD_INSTANCE_ID, COMPENSATION_REASON),
    *(CASCADE_SIZE, JOB_ID, JOB_RUN_ID, JOB_ATTEMPT, CORRELATION_ID, QUEUE_ATTEMPT, BATCH_SIZE),
)

SUCCESS: Final = "success"
ERROR: Final = "error"
COMPENSATED: Final = "compensated"
SKIPPED: Final = "skipped"
OUTCOMES: Final = (SUCCESS, ERROR, COMPENSATED, SKIPPED)

# --- Metrics ---------------------------------------------------------------------------------------------------------

HANDLE_DURATION: Final = "netscript.saga.handle.duration_ms"
INSTANCES_ACTIVE: Final = "netscript.saga.instances.active"
COMPENSATIONS: Final = "netscript.saga.compensations.total"
DEAD_LETTERS: Final = "netscript.saga.dlq.total"
IDEMPOTENCY_HITS: Final = "netscript.saga.idempotency_hits.total"
CONCURRENCY_THROTTLED: Final = "netscript.saga.concurrency_throttled.total"
MESSAGES: Final = "netscript.saga.messages.total"
EFFECTS: Final = "netscript.saga.effects.total"
BACKLOG: Final = "netscript.saga.backlog"
OLDEST_WAITING: Final = "netscript.saga.oldest_waiting_seconds"
OUTBOX: Final = "netscript.saga.outbox"
STALLED_LANES: Final = "netscript.saga.stalled_lanes"
PARTITIONS: Final = "netscript.saga.partitions"
JOB_DURATION: Final = "netscript.job.run.duration_ms"
QUEUE_DURATION: Final = "netscript.queue.handle.duration_ms"
QUEUE_DEAD_LETTERS: Final = "netscript.queue.dlq.total"
UNITS: Final = {
    HANDLE_DURATION: "ms",
    INSTANCES_ACTIVE: "{instance}",
    COMPENSATIONS: "{compensation}",
    DEAD_LETTERS: "{dead_letter}",
    IDEMPOTENCY_HITS: "{message}",
    CONCURRENCY_THROTTLED: "{message}",
    MESSAGES: "{message}",
    EFFECTS: "{attempt}",
    BACKLOG: "{message}",
    OLDEST_WAITING: "s",
    OUTBOX: "{effect}",
    STALLED_LANES: "{lane}",
    PARTITIONS: "{partition}",
    JOB_DURATION: "ms",
    QUEUE_DURATION: "ms",
    QUEUE_DEAD_LETTERS: "{dead_letter}",
}
METRICS: Final = tuple(UNITS)

RESERVED_METRICS: Final = ("netscript.saga.replay.duration_ms",)
"""Names that are kept for what is not there yet. Nothing is recorded under them."""
