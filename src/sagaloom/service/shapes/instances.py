"""Instances: their runs, their children, and what operators ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from msgspec import UNSET, Meta, Raw, UnsetType

from sagaloom.definitions import SagaDurabilityTier, SagaInstanceStatus
from sagaloom.engine.records import AppliedStep, Child, ChildStatus, Instance, OnParentCancel, Undoing
from sagaloom.ids import instance_id
from sagaloom.service.shapes.shape import ControlView, Reason, Shape, Time, if_known, json_if, json_of, wire_time_if
from sagaloom.web.routes import wire_time


class ParentView(Shape, frozen=True, kw_only=True):
    """The run that spawned this one."""

    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int


class UndoingView(Shape, frozen=True, kw_only=True):
    """What is left to undo of a run one of whose compensations has failed. While there is no `deadLetterId` it is being
    tried again by itself."""

    next_step: Annotated[str | None, Meta(description="The message type whose compensation comes next.")]
    steps_left: int
    ends_as: Annotated[SagaInstanceStatus | None, Meta(description="How the run ends then; null: it goes on.")]
    error: str | None
    dead_letter_id: str | None


class ChildCounts(Shape, frozen=True, kw_only=True):
    """How many children of each status a run has spawned."""

    live: int
    completed: int
    failed: int
    cancelled: int


class InstanceView(Shape, frozen=True, kw_only=True):
    """One run of a saga. `version` is its revision. `completedAt` is there when it completed, `endedAt` when it ended
    in whatever way. `pending` with run 0: its first message is accepted and not applied yet."""

    saga_name: str
    saga_id: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    status: SagaInstanceStatus
    state: Annotated[Raw, Meta(description="The business state, exactly as the saga keeps it.")]
    version: int
    message_count: int
    durability_tier: SagaDurabilityTier
    is_paused: bool
    created_at: Time
    updated_at: Time
    completed_at: Time | UnsetType = UNSET
    ended_at: Time | UnsetType = UNSET
    result: Annotated[Raw | UnsetType, Meta(description="What the saga completed with.")] = UNSET
    reason: str | UnsetType = UNSET
    last_message_type: str | UnsetType = UNSET
    traceparent: Annotated[
        str | UnsetType, Meta(description="W3C trace context of the message that started the run.")
    ] = UNSET
    parent: ParentView | UnsetType = UNSET
    pivot: Annotated[
        str | UnsetType, Meta(description="The message type of its last point of no return, if it has passed one.")
    ] = UNSET
    undoing: UndoingView | UnsetType = UNSET
    children: Annotated[
        ChildCounts | UnsetType, Meta(description="There for a single run that has ever spawned any.")
    ] = UNSET
    control: Annotated[ControlView | UnsetType, Meta(description="There in answers to commands.")] = UNSET


class InstanceList(Shape, frozen=True, kw_only=True):
    """A page of runs, newest first. `cursor` asks for the next page and is null on the last one."""

    instances: Sequence[InstanceView]
    total: Annotated[int, Meta(description="Exact up to 10000; there are at least so many when it is an estimate.")]
    total_is_estimate: bool
    limit: int
    offset: int
    cursor: str | None


def instance_view(
    instance: Instance,
    *,
    control: ControlView | UnsetType = UNSET,
    children: Mapping[ChildStatus, int] | None = None,
) -> InstanceView:
    """One run, as the wire shows it."""
    parent, undoing = instance.parent, instance.undoing
    return InstanceView(
        saga_name=instance.saga_id,
        saga_id=instance.saga_id,
        instance_id=instance_id(instance.saga_id, instance.key, instance.run),
        correlation_id=instance.key,
        correlation_key=instance.key,
        run=instance.run,
        status=instance.status,
        state=json_of(instance.state),
        version=instance.revision,
        message_count=instance.message_count,
        durability_tier=instance.tier,
        is_paused=instance.is_paused,
        created_at=wire_time(instance.created_at),
        updated_at=wire_time(instance.updated_at),
        completed_at=wire_time_if(instance.completed_at),
        ended_at=wire_time_if(instance.ended_at),
        result=json_if(instance.result),
        reason=if_known(instance.reason),
        last_message_type=if_known(instance.last_message_type),
        traceparent=if_known(instance.traceparent),
        parent=UNSET
        if parent is None
        else ParentView(
            saga_name=parent.saga_id,
            instance_id=instance_id(parent.saga_id, parent.key, parent.run),
            correlation_id=parent.key,
            correlation_key=parent.key,
            run=parent.run,
        ),
        pivot=if_known(instance.pivot),
        undoing=UNSET if undoing is None else _undoing_view(undoing, instance.steps),
        children=UNSET if children is None else child_counts(children),
        control=control,
    )


def child_counts(counts: Mapping[ChildStatus, int]) -> ChildCounts:
    return ChildCounts(
        live=counts["live"],
        completed=counts["completed"],
        failed=counts["failed"],
        cancelled=counts["cancelled"],
    )


class ChildView(Shape, frozen=True, kw_only=True):
    """A run that another one has spawned. `status` is that of its instance, `pending` until its first message has been
    applied. It has no `instanceId` while that message is a dead letter that names none."""

    saga_name: str
    instance_id: str | UnsetType = UNSET
    correlation_id: str | UnsetType = UNSET
    correlation_key: str | UnsetType = UNSET
    run: int | UnsetType = UNSET
    status: SagaInstanceStatus
    on_parent_cancel: OnParentCancel
    effect_key: str
    spawned_at: Time
    ended_at: Time | UnsetType = UNSET


class ChildList(Shape, frozen=True, kw_only=True):
    """A page of the children of one run, in the order of their spawning. `cursor` asks for the next page and is null on
    the last one."""

    children: Sequence[ChildView]
    counts: ChildCounts
    limit: int
    cursor: str | None


def child_view(child: Child, instance: Instance | None) -> ChildView:
    """One child, with what is known of its run if that is live."""
    live = instance if instance is not None and _is_of(child, instance) else None
    status: SagaInstanceStatus = child.status if child.status != "live" else "pending" if live is None else live.status
    run = child.run or (live.run if live is not None else 0)
    has_key = bool(child.key)
    return ChildView(
        saga_name=child.saga_id,
        instance_id=instance_id(child.saga_id, child.key, run) if has_key else UNSET,
        correlation_id=child.key if has_key else UNSET,
        correlation_key=child.key if has_key else UNSET,
        run=run or UNSET,
        status=status,
        on_parent_cancel=child.on_parent_cancel,
        effect_key=child.effect_key,
        spawned_at=wire_time(child.spawned_at),
        ended_at=wire_time_if(child.ended_at),
    )


def _is_of(child: Child, instance: Instance) -> bool:
    return instance.parent is not None and instance.parent.effect_key == child.effect_key


def _undoing_view(undoing: Undoing, applied: Sequence[AppliedStep]) -> UndoingView:
    step = undoing.next_of(tuple(applied))
    return UndoingView(
        next_step=None if step is None else step.type,
        steps_left=len(undoing.asked) + (len(applied) if undoing.is_unwinding else 0),
        ends_as=undoing.ending,
        error=undoing.error,
        dead_letter_id=undoing.dead_letter_id,
    )


class CancelBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a run is cancelled, and whether its steps are undone first."""

    reason: Reason | None = None
    compensate: bool = True


class SkipBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a compensation is left out. With `step`, a message type, only if that one comes next."""

    reason: Reason | None = None
    step: Annotated[str, Meta(max_length=1024)] | None = None
