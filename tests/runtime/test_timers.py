"""Timers while the runtime runs: timeouts of runs, and timers that operators list, move and take back."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sagaloom import SagaMessage, cancel_scheduled, define_saga, saga_complete, saga_fail, schedule
from sagaloom.errors import MessageRejected, TimerNotFound
from sagaloom.runtime.timers import WaitingTimer
from sagaloom.testing import check_invariants
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench, Life

__all__ = ["STORES"]


NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def _begin(saga: Any, event: Any, context: Any) -> list[Any]:
    return [schedule(SagaMessage("Late", {"n": 1}), event.payload.get("in", "1h"), name="late")]


def _note(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], f"{event.type} {(context.now - NEW_YEAR) / HOUR:g}"]}
    return []


def _end(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_complete()]


def _saga(saga_id: str = "s") -> Any:
    stage = define_saga(saga_id).state({"seen": []}).on("Begin", _begin).on("Late", _note, starts=False)
    return stage.on("Add", _note, starts=False).on("End", _end, starts=False).build()


async def _seen(life: Life, key: str = "k") -> list[str]:
    seen: list[str] = json.loads((await life.instance("s", key)).state)["seen"]
    return seen


async def _timer(life: Life, key: str = "k") -> WaitingTimer:
    (timer,) = await life.runtime.timers("s", key)
    return timer


# -- timeouts ---------------------------------------------------------------------------------------------------------


def _give_up(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_fail("nobody paid")]


def _call_off(saga: Any, event: Any, context: Any) -> list[Any]:
    return [cancel_scheduled("timeout")]


def _order() -> Any:
    stage = define_saga("order").timeout("30m", message="PaymentOverdue").state({"seen": []}).on("Placed", _note)
    stage = stage.on("PaymentOverdue", _give_up, starts=False).on("Paid", _end, starts=False)
    return stage.on("Promised", _call_off, starts=False).build()


async def test_a_run_that_is_still_live_after_its_delay_times_out(bench: Bench) -> None:
    life = await bench.live(_order())
    await life.publish("Placed", key="k")

    await bench.advance("29m")
    before = await life.instance("order", "k")
    await bench.advance("1m")
    after = await life.instance("order", "k")

    assert (before.status, after.status, after.reason) == ("running", "failed", "nobody paid")


async def test_a_timeout_survives_the_process_that_set_it(bench: Bench) -> None:
    first = await bench.live(_order())
    await first.publish("Placed", key="k")
    await bench.die(first)
    bench.clock.advance("2h")

    life = await bench.live(_order())
    await life.runtime.settled()

    assert (await life.instance("order", "k")).status == "failed"


@pytest.mark.parametrize(("message", "status"), [("Paid", "completed"), ("Promised", "running")])
async def test_a_run_that_ended_or_called_it_off_does_not_time_out(bench: Bench, message: str, status: str) -> None:
    life = await bench.live(_order())
    await life.publish("Placed", key="k")
    await life.publish(message, key="k")

    await bench.advance("1h")

    assert (await life.instance("order", "k")).status == status
    assert await life.runtime.timers() == []
    assert await check_invariants(life.runtime.store) == []


# -- listing ----------------------------------------------------------------------------------------------------------


async def test_waiting_timers_are_listed_by_due_time_and_tell_whom_they_are_for(bench: Bench) -> None:
    life = await bench.live(_saga(), _order())
    await life.publish("Begin", key="k")
    await life.publish("Placed", key="o")

    first, second = await life.runtime.timers()

    assert (first.saga_id, first.key, first.name, first.message_type) == ("order", "o", "timeout", "PaymentOverdue")
    assert (second.saga_id, second.key, second.name, second.message_type) == ("s", "k", "late", "Late")
    assert (second.run, second.due_at) == (1, NEW_YEAR + HOUR)
    assert second.id == (await life.instance("s", "k")).timers[0].id


async def test_timers_are_listed_by_saga_and_key_and_page_by_page(bench: Bench) -> None:
    life = await bench.live(_saga(), _saga("t"))
    for number in range(5):
        await life.runtime.publish(SagaMessage("Begin", {"in": f"{number + 1}h"}, correlation_key=f"k{number}"))

    everything = await life.runtime.timers()
    pages = [await life.runtime.timers("s", limit=2)]
    while len(pages[-1]) == 2:
        pages.append(await life.runtime.timers("s", limit=2, after=pages[-1][-1].cursor))

    assert len(everything) == 10
    assert [timer.key for page in pages for timer in page] == ["k0", "k1", "k2", "k3", "k4"]
    assert {timer.saga_id for timer in await life.runtime.timers(key="k3")} == {"s", "t"}
    assert await life.runtime.timers("s", "nobody") == []


@pytest.mark.parametrize("after", ["", "x", "12", "-tm", "x-tm", f"{10**30}-tm"])
async def test_what_is_no_cursor_is_refused(bench: Bench, after: str) -> None:
    life = await bench.live(_saga())

    with pytest.raises(MessageRejected, match="no cursor of this listing"):
        await life.runtime.timers(after=after)


async def test_a_page_of_nothing_is_refused(bench: Bench) -> None:
    life = await bench.live(_saga())

    with pytest.raises(MessageRejected, match="from 1 on"):
        await life.runtime.timers(limit=0)


# -- moving and taking back -------------------------------------------------------------------------------------------


async def test_a_timer_that_was_cancelled_does_not_fire(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")

    outcome = await life.runtime.cancel_timer((await _timer(life)).id)
    await bench.advance("2h")

    assert (outcome.disposition, outcome.revision, outcome.instance_id) == ("applied", 2, "s:k")
    assert await _seen(life) == []
    assert [entry.type for entry in await life.history("s", "k")] == ["Begin", "saga:cancel_timer"]
    assert await check_invariants(life.runtime.store) == []


async def test_a_timer_that_was_moved_fires_at_its_new_time_once(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")
    before = await _timer(life)

    await life.runtime.move_timer(before.id, NEW_YEAR + 3 * HOUR)
    moved = await _timer(life)
    await bench.advance("1h")
    at_the_old_time = await _seen(life)
    await bench.advance("2h")
    await bench.advance("10h")

    assert (moved.id, moved.due_at) == (before.id, NEW_YEAR + 3 * HOUR)
    assert at_the_old_time == []
    assert await _seen(life) == ["Late 3"]
    assert await check_invariants(life.runtime.store) == []


async def test_a_timer_may_be_moved_forward(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")

    await life.runtime.move_timer((await _timer(life)).id, NEW_YEAR + timedelta(minutes=30))
    await bench.advance("30m")

    assert await _seen(life) == ["Late 0.5"]


async def test_a_timer_that_is_moved_into_the_past_fires_at_once(bench: Bench) -> None:
    life = await bench.live(_saga())
    await bench.advance("1h")
    await life.publish("Begin", key="k")

    await life.runtime.move_timer((await _timer(life)).id, NEW_YEAR)
    await life.runtime.settled()

    assert await _seen(life) == ["Late 1"]
    assert await life.runtime.timers() == []


async def test_a_timer_may_be_moved_again_and_then_taken_back(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")
    timer = await _timer(life)

    for hours in (5, 2, 9):
        await life.runtime.move_timer(timer.id, NEW_YEAR + hours * HOUR)
    await life.runtime.cancel_timer(timer.id)
    await bench.advance("10h")

    assert await _seen(life) == []
    assert (await life.instance("s", "k")).revision == 5


async def test_a_moved_timer_survives_the_process(bench: Bench) -> None:
    first = await bench.live(_saga())
    await first.publish("Begin", key="k")
    await first.runtime.move_timer((await _timer(first)).id, NEW_YEAR + 3 * HOUR)
    await bench.die(first)
    bench.clock.advance("2h")

    life = await bench.live(_saga())
    await life.runtime.settled()
    before = await _seen(life)
    await bench.advance("1h")

    assert before == []
    assert await _seen(life) == ["Late 3"]


async def test_a_timer_of_a_saga_that_nobody_loads_can_be_taken_back(bench: Bench) -> None:
    first = await bench.live(_saga())
    await first.publish("Begin", key="k")
    await bench.end(first)

    life = await bench.live()
    await life.runtime.cancel_timer((await _timer(life)).id)

    assert await life.runtime.timers() == []


async def test_a_timer_of_an_earlier_run_is_its_own(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin")
    await life.publish("Begin")
    first, _ = await life.runtime.timers()

    outcome = await life.runtime.cancel_timer(first.id)

    assert outcome.run == first.run
    (left,) = await life.runtime.timers()
    assert {first.run, left.run} == {1, 2}


async def test_what_a_paused_run_was_reminded_of_can_still_be_taken_back_or_moved(bench: Bench) -> None:
    life = await bench.live(_saga())
    for key in ("taken", "moved", "left"):
        await life.publish("Begin", key=key)
        await life.runtime.pause("s", key)
    await bench.advance("2h")
    await life.publish("Add", key="moved")

    await life.runtime.cancel_timer((await _timer(life, "taken")).id)
    await life.runtime.move_timer((await _timer(life, "moved")).id, NEW_YEAR + 3 * HOUR)
    for key in ("taken", "moved", "left"):
        await life.runtime.resume("s", key)
    await life.runtime.settled()
    at_resume = [await _seen(life, key) for key in ("taken", "moved", "left")]
    await bench.advance("1h")

    assert at_resume == [[], ["Add 2"], ["Late 2"]]
    assert await _seen(life, "moved") == ["Add 2", "Late 3"]
    assert await check_invariants(life.runtime.store) == []


async def test_a_timer_that_fires_while_it_is_taken_back_does_one_of_the_two(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")
    timer = await _timer(life)

    bench.clock.advance("1h")
    answers = await asyncio.gather(
        life.runtime.cancel_timer(timer.id), life.runtime.cancel_timer(timer.id), return_exceptions=True
    )
    await life.runtime.settled()

    fired = await _seen(life) == ["Late 1"]
    refused = [answer for answer in answers if isinstance(answer, TimerNotFound)]
    assert len(refused) == (2 if fired else 1)
    assert await life.runtime.timers() == []
    assert await check_invariants(life.runtime.store) == []


@pytest.mark.parametrize("how", ["never was", "fired", "taken back"])
async def test_a_timer_that_does_not_wait_is_not_found(bench: Bench, how: str) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")
    timer_id = "tm-nobody" if how == "never was" else (await _timer(life)).id
    if how == "fired":
        await bench.advance("1h")
    elif how == "taken back":
        await life.runtime.cancel_timer(timer_id)
    revision = (await life.instance("s", "k")).revision

    for asked in (life.runtime.cancel_timer(timer_id), life.runtime.move_timer(timer_id, NEW_YEAR)):
        with pytest.raises(TimerNotFound, match=f"no timer '{timer_id}' waits") as caught:
            await asked
        assert caught.value.code == "TIMER_NOT_FOUND"

    assert (await life.instance("s", "k")).revision == revision


async def test_a_moment_without_a_time_zone_changes_nothing(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")
    timer = await _timer(life)

    with pytest.raises(MessageRejected, match="with a time zone"):
        await life.runtime.move_timer(timer.id, datetime(2026, 1, 1))  # noqa: DTZ001

    assert await _timer(life) == timer


async def test_no_door_takes_in_a_message_about_a_timer(bench: Bench) -> None:
    life = await bench.live(_saga())

    for message_type in ("saga:cancel_timer", "saga:move_timer"):
        refused = await life.runtime.publish(SagaMessage(message_type, {"timerId": "tm"}, correlation_key="k"))
        with pytest.raises(MessageRejected, match="belongs to the engine"):
            refused.raise_for_rejected()


async def test_a_timer_of_another_process_is_moved_there(bench: Bench) -> None:
    one = await bench.live(_saga(), lease_seconds=1.0)
    two = await bench.live(_saga(), lease_seconds=1.0)
    for number in range(8):
        await one.publish("Begin", key=f"k{number}", wait=30)

    for number, timer in enumerate(await one.runtime.timers(limit=8)):
        life = (one, two)[number % 2]
        if number < 4:
            await life.runtime.cancel_timer(timer.id)
        else:
            await life.runtime.move_timer(timer.id, NEW_YEAR - HOUR)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await one.runtime.timers():  # noqa: ASYNC110 - either process may be the one that fires them
            await asyncio.sleep(0.001)
    await one.runtime.settled()
    await two.runtime.settled()

    seen = sorted([await _seen(one, f"k{number}") for number in range(8)])
    assert seen == [[]] * 4 + [["Late 0"]] * 4
