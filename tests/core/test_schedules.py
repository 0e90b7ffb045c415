"""Which ticks are due, by the rules that `engine/schedules.py` opens with."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sagaloom import SagaMessage, define_saga
from sagaloom.cron import parse_cron
from sagaloom.definitions import CatchUp, SchedulePolicy
from sagaloom.engine.records import ScheduleCursor
from sagaloom.engine.schedules import (
    MISSED_AFTER,
    TICKS_PER_ROUND_MAX,
    after_tick,
    begin,
    due,
    is_current,
    next_tick,
    retire,
    tick_message,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SECOND = timedelta(seconds=1)


def hourly(catch_up: CatchUp = "latest", cron: str = "0 * * * *", zone: str = "UTC") -> SchedulePolicy:
    return SchedulePolicy(cron, "report:tick", zone, catch_up)


def begun(at: datetime = NOON, schedule: SchedulePolicy | None = None) -> ScheduleCursor:
    return begin("report", schedule or hourly(), at)


@pytest.mark.parametrize("catch_up", ["latest", "all", "none"])
def test_nothing_is_due_at_the_beginning(catch_up: CatchUp) -> None:
    planned = due(hourly(catch_up), begun(), NOON)

    assert (planned.ticks, planned.cursor, planned.next_at) == ((), begun(), NOON + HOUR)


@pytest.mark.parametrize("catch_up", ["latest", "all", "none"])
@pytest.mark.parametrize("late", [timedelta(), SECOND, MISSED_AFTER])
def test_a_tick_that_is_not_missed_fires_whatever_the_policy(catch_up: CatchUp, late: timedelta) -> None:
    planned = due(hourly(catch_up), begun(), NOON + HOUR + late)

    assert planned.ticks == (NOON + HOUR,)
    assert (planned.cursor.handled_until, planned.cursor.last_tick_at) == (NOON + HOUR, NOON + HOUR)
    assert planned.next_at == NOON + 2 * HOUR


@pytest.mark.parametrize(
    ("catch_up", "hours", "last"), [("latest", [4], 4), ("all", [1, 2, 3, 4], 4), ("none", [], None)]
)
def test_of_missed_ticks_fire_the_newest_or_all_or_none(catch_up: CatchUp, hours: list[int], last: int | None) -> None:
    planned = due(hourly(catch_up), begun(), NOON + 4 * HOUR + MISSED_AFTER + timedelta(microseconds=1))

    assert planned.ticks == tuple(NOON + hour * HOUR for hour in hours)
    assert planned.cursor.handled_until == NOON + 4 * HOUR
    assert planned.cursor.last_tick_at == (None if last is None else NOON + last * HOUR)
    assert planned.next_at == NOON + 5 * HOUR


@pytest.mark.parametrize(("catch_up", "hours"), [("latest", [3, 4]), ("all", [1, 2, 3, 4]), ("none", [4])])
def test_the_policy_governs_missed_ticks_and_the_one_that_is_on_time_fires_beside_them(
    catch_up: CatchUp, hours: list[int]
) -> None:
    planned = due(hourly(catch_up), begun(), NOON + 4 * HOUR)

    assert planned.ticks == tuple(NOON + hour * HOUR for hour in hours)


def test_a_round_is_bounded_and_the_next_one_goes_on_behind_it() -> None:
    schedule, now = hourly("all", "* * * * *"), NOON + DAY
    rounds = [due(schedule, begun(schedule=schedule), now)]
    while (next_at := rounds[-1].next_at) is not None and next_at <= now:
        rounds.append(due(schedule, rounds[-1].cursor, now))

    assert [len(each.ticks) for each in rounds] == [256, 256, 256, 256, 256, 160]
    assert [tick for each in rounds for tick in each.ticks] == [NOON + n * MINUTE for n in range(1, 1441)]
    assert TICKS_PER_ROUND_MAX == 256


def test_a_year_that_was_missed_costs_no_search_through_it() -> None:
    schedule, now = hourly("latest", "* * * * *"), NOON + 3650 * DAY

    planned = due(schedule, begun(schedule=schedule), now)

    assert planned.ticks == (now - 2 * MINUTE, now - MINUTE, now)


def test_a_clock_that_is_set_back_finds_nothing_due_until_it_is_past_the_cursor() -> None:
    cursor = after_tick(begun(), NOON + 2 * HOUR)

    planned = due(hourly("all"), cursor, NOON + HOUR)

    assert (planned.ticks, planned.cursor, planned.next_at) == ((), cursor, NOON + 3 * HOUR)
    assert due(hourly("all"), cursor, NOON + 2 * HOUR).ticks == ()
    assert due(hourly("all"), cursor, NOON + 3 * HOUR).ticks == (NOON + 3 * HOUR,)


def test_a_cursor_belongs_to_its_expression_and_zone() -> None:
    cursor = begun()

    assert is_current(cursor, hourly())
    assert is_current(cursor, hourly("all"))
    assert not is_current(cursor, hourly(cron="1 * * * *"))
    assert not is_current(cursor, hourly(zone="Europe/Berlin"))
    assert not is_current(cursor, None)


def test_a_retired_cursor_belongs_to_no_schedule_and_remembers_the_last_tick() -> None:
    retired = retire(after_tick(begun(), NOON + HOUR), NOON + 5 * HOUR)

    assert is_current(retired, None)
    assert not is_current(retired, hourly())
    assert (retired.handled_until, retired.last_tick_at) == (NOON + 5 * HOUR, NOON + HOUR)


def test_the_next_tick_is_the_next_regular_one() -> None:
    behind, ahead = begun(NOON - DAY), after_tick(begun(), NOON + 3 * HOUR)

    assert next_tick(hourly(), behind, NOON + MINUTE) == NOON + HOUR
    assert next_tick(hourly(), ahead, NOON) == NOON + 4 * HOUR
    assert next_tick(hourly(), None, NOON) == NOON + HOUR
    assert next_tick(hourly(), begun(schedule=hourly(cron="1 1 * * *")), NOON) == NOON + HOUR


def _nothing(saga: Any, event: Any, context: Any) -> list[Any]:
    return []


def _tick(message: object, **more: Any) -> SagaMessage[Any]:
    saga = define_saga("report").schedule("0 * * * *", message=message).state({})
    return tick_message(saga.on("report:tick", _nothing).on("Night", _nothing).build(), NOON, **more)


def test_a_tick_is_the_same_message_whenever_it_is_made() -> None:
    one, two = _tick(None), _tick(None)

    assert (one.id, one.idempotency_key) == (two.id, two.idempotency_key) == (one.id, "tick:2026-01-01T12:00:00Z")
    assert bytes(one.payload) == bytes(two.payload) == b'{"scheduledFor":"2026-01-01T12:00:00Z"}'
    assert (one.type, one.occurred_at, one.correlation_key) == ("report:tick", NOON, None)


def test_a_tick_of_another_type_keeps_the_payload_and_the_key_of_its_message() -> None:
    message = SagaMessage("Night", {"full": True, "scheduledFor": "?"}, correlation_key="k", concurrency_key="c")

    tick = _tick(message)

    assert (tick.type, tick.correlation_key, tick.concurrency_key) == ("Night", "k", "c")
    assert json.loads(bytes(tick.payload)) == {"full": True, "scheduledFor": "2026-01-01T12:00:00Z"}


@pytest.mark.parametrize("payload", [[1, 2], "text", 7, None])
def test_a_payload_that_is_no_object_stays_as_it_is(payload: object) -> None:
    assert json.loads(bytes(_tick(SagaMessage("Night", payload)).payload)) == payload


def test_a_tick_by_hand_says_so_and_has_a_key_of_its_own() -> None:
    tick = _tick(None, by_hand="m-1")

    assert (tick.id, tick.idempotency_key) == ("m-1", "tick:m-1")
    assert json.loads(bytes(tick.payload)) == {"scheduledFor": "2026-01-01T12:00:00Z", "manual": True}


# -- over any course of events ----------------------------------------------------------------------------------------

CRONS = st.sampled_from(["* * * * *", "*/20 * * * *", "0 * * * *", "30 2 * * *", "0,30 1-3 * * *"])
JUMPS = st.one_of(
    st.timedeltas(timedelta(), 3 * MINUTE),
    st.timedeltas(timedelta(), 9 * HOUR),
    st.timedeltas(-2 * HOUR, timedelta()),
)
CUTS = st.sampled_from(["none", "before", "within", "between"])


class Course:
    """One store and the lives on it: what is kept, and what was seen."""

    def __init__(self, schedule: SchedulePolicy, now: datetime) -> None:
        self.schedule = schedule
        self.now = self.latest_now = now
        self.cursor = begin("report", schedule, now)
        self.applied: list[datetime] = []
        self.on_time: set[datetime] = set()
        self.newest: set[datetime] = set()

    def live(self, cut: str, where: int) -> None:
        """Does what is due, in as many rounds as it takes; a cut ends the first of them somewhere."""
        before = self.cursor
        self.latest_now = max(self.latest_now, self.now)
        while True:
            planned = due(self.schedule, self.cursor, self.now, limit=7)
            ticks = planned.ticks
            if cut == "before":
                return
            if cut == "within":
                ticks = ticks[: where % (len(ticks) + 1)]
            for tick in ticks:
                if tick not in self.applied:  # the mark under its idempotency key
                    self.applied.append(tick)
            if cut != "none":
                return
            assert planned.cursor.handled_until >= self.cursor.handled_until
            self.cursor = planned.cursor
            if planned.next_at is None or planned.next_at > self.now:
                break
        newest = parse_cron(self.schedule.cron, self.schedule.timezone).latest(self.now)
        if newest is not None and newest > before.handled_until:
            self.newest.add(newest)
            if self.now - newest <= MISSED_AFTER:
                self.on_time.add(newest)


@settings(max_examples=150)
@given(
    cron=CRONS,
    zone=st.sampled_from(["UTC", "Europe/Berlin"]),
    catch_up=st.sampled_from(["all", "latest", "none"]),
    start=st.sampled_from([datetime(2026, 3, 28, 20, tzinfo=UTC), datetime(2026, 10, 24, 20, tzinfo=UTC)]),
    steps=st.lists(st.tuples(JUMPS, CUTS, st.integers(0, 9)), min_size=1, max_size=15),
)
def test_each_tick_fires_once_over_any_restarts_and_jumps(
    cron: str, zone: str, catch_up: CatchUp, start: datetime, steps: list[tuple[timedelta, str, int]]
) -> None:
    course = Course(hourly(catch_up, cron, zone), start)

    for jump, cut, where in steps:
        course.now += jump
        course.live(cut, where)
    course.now = course.latest_now
    course.live("none", 0)

    every = list(takewhile(lambda tick: tick <= course.latest_now, parse_cron(cron, zone).after(start)))
    assert len(set(course.applied)) == len(course.applied)
    assert set(course.applied) <= set(every)
    if catch_up == "all":
        assert course.applied == every
    elif catch_up == "latest":
        assert course.newest <= set(course.applied)
    assert course.on_time <= set(course.applied)
