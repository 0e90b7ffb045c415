"""What the feed shows of a message that was decided: its moments, for those who watch a run.

Each applied message shows `saga:message_received`, `saga:started` if it opened a run, `saga:state_changed` for each
step, `saga:compensating` when a step leads there, and `saga:completed`, `saga:failed` or `saga:cancelled` at the end.
One that is ignored and stands in the history shows `saga:message_received` with the reason. What is given up shows
`saga:dead_lettered`, and so does an effect; one that has left shows `saga:effect_dispatched`, which the dispatcher
writes. A control shows `saga:message_received`, then `saga:cancelled` or what has changed (`controls.py`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import DecideContext, Envelope, FeedKind, FeedMoment, FeedRecord, Instance, StepRecord
from sagaloom.engine.retrying import storable
from sagaloom.engine.transition import Transition

__all__ = ["DETAIL_MAX", "moments_of", "shown_bystander"]

DETAIL_MAX: Final = 2_000  # The feed is kept in memory by those who watch. History has the whole of it.


def moments_of(transition: Transition, steps: tuple[StepRecord, ...], reason: str | None) -> tuple[FeedMoment, ...]:
    """What the feed shows of a message that was applied."""
    before, status = transition.status_before, transition.status
    if len(steps) == 1 and reason is None:
        return _moments_of_one_step(before, status)
    undo_reason = None if transition.undo_reason is None else storable(transition.undo_reason)
    return _moments(before, status, steps, reason, undo_reason)


# Nearly every message takes one step, and what that shows depends on so little that it is made once.
@lru_cache(maxsize=256)
def _moments_of_one_step(before: SagaInstanceStatus, status: SagaInstanceStatus) -> tuple[FeedMoment, ...]:
    return _moments(before, status, (StepRecord("handle", "", status),), None, None)


def _moments(
    before: SagaInstanceStatus,
    status: SagaInstanceStatus,
    steps: tuple[StepRecord, ...],
    reason: str | None,
    undo_reason: str | None,
) -> tuple[FeedMoment, ...]:
    moments = [FeedMoment(FeedKind.MESSAGE_RECEIVED, before)]
    if before == "pending":
        moments.append(FeedMoment(FeedKind.STARTED, "running"))
    was_compensating = before == "compensating"
    for step in steps:
        if step.phase == "handle":
            moments.append(FeedMoment(FeedKind.STATE_CHANGED, step.status))
            continue
        if step.phase == "skip":
            moments.append(FeedMoment(FeedKind.STATE_CHANGED, step.status, f"skipped the compensation of {step.type}"))
            continue
        if not was_compensating:
            was_compensating = True
            moments.append(FeedMoment(FeedKind.COMPENSATING, "compensating", undo_reason and undo_reason[:DETAIL_MAX]))
        moments.append(FeedMoment(FeedKind.STATE_CHANGED, step.status, f"compensated {step.type}"))
    if is_terminal(status):
        moments.append(FeedMoment(_END[status], status, reason and reason[:DETAIL_MAX]))
    return tuple(moments)


_END: Final = {"completed": FeedKind.COMPLETED, "failed": FeedKind.FAILED, "cancelled": FeedKind.CANCELLED}


def shown_bystander(
    kind: FeedKind, instance: Instance | None, message: Envelope, context: DecideContext, detail: str
) -> FeedRecord:
    """What the feed shows of a message that changed nothing."""
    return FeedRecord(
        at=context.now,
        saga_id=message.saga_id,
        key=message.key,
        run=instance.run if instance is not None else 0,
        revision=instance.revision if instance is not None else 0,
        message_type=message.type,
        message_id=message.id,
        moments=(FeedMoment(kind, instance.status if instance is not None else "pending", detail[:DETAIL_MAX]),),
    )
