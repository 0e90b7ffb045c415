"""Time: timers and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from sagaloom.ids import instance_id
from sagaloom.runtime.receipts import Outcome
from sagaloom.runtime.scheduler import ScheduleStatus
from sagaloom.runtime.timers import WaitingTimer
from sagaloom.service.shapes.shape import Shape, Time, if_known, wire_time_if
from sagaloom.web.routes import wire_time


class TimerView(Shape, frozen=True, kw_only=True):
    """A message that a run gets at `dueAt`. `name` is what its saga calls it, if anything."""

    id: str
    due_at: Time
    saga_name: str
    saga_id: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    message_type: str
    name: str | UnsetType = UNSET


class TimerList(Shape, frozen=True, kw_only=True):
    """A page of timers, the next one first. `cursor` asks for the next page and is null on the last one."""

    timers: Sequence[TimerView]
    limit: int
    cursor: str | None


class MoveTimerBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the timer is to fire."""

    due_at: Annotated[datetime, Meta(tz=True, description="A moment with a zone; at once when it is in the past.")]


class TimerChange(Shape, frozen=True, kw_only=True):
    """A timer that was cancelled or moved, and the run whose it is; `version` is its revision now."""

    id: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    version: int
    reason: Annotated[str, Meta(description="What was done, as the history says it.")]


def timer_view(timer: WaitingTimer) -> TimerView:
    """One timer, as the wire shows it."""
    return TimerView(
        id=timer.id,
        due_at=wire_time(timer.due_at),
        saga_name=timer.saga_id,
        saga_id=timer.saga_id,
        instance_id=instance_id(timer.saga_id, timer.key, timer.run),
        correlation_id=timer.key,
        correlation_key=timer.key,
        run=timer.run,
        message_type=timer.message_type,
        name=if_known(timer.name),
    )


def timer_change(timer_id: str, outcome: Outcome) -> TimerChange:
    """What an operator gets for a timer."""
    return TimerChange(
        id=timer_id,
        saga_name=outcome.saga_id,
        instance_id=outcome.instance_id,
        correlation_id=outcome.correlation_key,
        correlation_key=outcome.correlation_key,
        run=outcome.run,
        version=outcome.revision or 0,
        reason=outcome.reason or "",
    )


class ScheduleStatusView(Shape, frozen=True, kw_only=True):
    """A saga's schedule, and how far it has come. `lastTickAt` is the moment for which the newest tick was
    scheduled."""

    saga_name: str
    saga_id: str
    cron: str
    timezone: str
    catch_up: str
    message_type: str
    last_tick_at: Time | UnsetType = UNSET
    next_tick_at: Time | UnsetType = UNSET


class ScheduleList(Shape, frozen=True, kw_only=True):
    """The schedules of the loaded sagas, by saga id."""

    schedules: Sequence[ScheduleStatusView]


def schedule_view(status: ScheduleStatus) -> ScheduleStatusView:
    """One schedule, as the wire shows it."""
    return ScheduleStatusView(
        saga_name=status.saga_id,
        saga_id=status.saga_id,
        cron=status.cron,
        timezone=status.timezone,
        catch_up=status.catch_up,
        message_type=status.message_type,
        last_tick_at=wire_time_if(status.last_tick_at),
        next_tick_at=wire_time_if(status.next_tick_at),
    )
