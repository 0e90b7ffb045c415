"""An unwinding that fails on the way: retried, given up, redriven, skipped; a restart changes nothing of it."""

from __future__ import annotations

from typing import Any

import pytest

from sagaloom import ALL_STEPS, RetryPolicy, define_saga, saga_compensate, send
from sagaloom.testing import check_invariants
from tests.runtime.conftest import Bench, Life

pytestmark = pytest.mark.anyio


class Airline:
    """Takes cancellations, when it is open."""

    def __init__(self) -> None:
        self.is_open = False

    def undo(self, saga: Any, event: Any, context: Any) -> list[Any]:
        if not self.is_open:
            raise ConnectionError("the airline is closed")
        return [send("service:flights", {"cancel": event.payload["n"]})]


def _trip(airline: Airline) -> Any:
    return (
        define_saga("trip")
        .state({})
        .retry(RetryPolicy(maximum_attempts=3, initial_interval_ms=1_000, jitter=0.0))
        .on("Flight", lambda saga, event, context: [])
        .on("Hotel", lambda saga, event, context: [], starts=False)
        .on("CallOff", lambda saga, event, context: [saga_compensate(ALL_STEPS, "rain")], starts=False)
        .compensate("Flight", airline.undo)
        .compensate("Hotel", lambda saga, event, context: [send("service:hotels", {"cancel": event.payload["n"]})])
        .build()
    )


async def _called_off(bench: Bench, airline: Airline) -> Life:
    life = await bench.live(_trip(airline))
    for number, message in enumerate(("Flight", "Hotel", "CallOff")):
        await life.publish(message, {"n": number}, key="k")
    await life.runtime.settled()
    return life


async def test_the_rest_is_undone_when_the_failing_step_succeeds(bench: Bench) -> None:
    airline = Airline()
    life = await _called_off(bench, airline)
    before = await life.instance("trip", "k")

    airline.is_open = True
    await bench.advance("1s")

    after = await life.instance("trip", "k")
    assert (before.status, after.status, after.reason) == ("compensating", "failed", "rain")
    assert bench.receiver.payloads == [b'{"cancel":1}', b'{"cancel":0}']
    assert await check_invariants(life.runtime.store) == []


async def test_an_unwinding_goes_on_after_a_kill_in_the_middle(bench: Bench) -> None:
    airline = Airline()
    await bench.die(await _called_off(bench, airline))

    airline.is_open = True
    life = await bench.live(_trip(airline))
    await bench.advance("1s")

    assert (await life.instance("trip", "k")).status == "failed"
    assert bench.receiver.payloads == [b'{"cancel":1}', b'{"cancel":0}']
    assert await check_invariants(life.runtime.store) == []


async def _given_up(bench: Bench, airline: Airline) -> Life:
    life = await _called_off(bench, airline)
    await bench.advance("1s")
    await bench.advance("2s")
    return life


async def test_a_step_that_keeps_failing_is_a_dead_letter_that_can_be_redriven(bench: Bench) -> None:
    airline = Airline()
    life = await _given_up(bench, airline)
    standing = await life.instance("trip", "k")
    (letter,) = await life.runtime.dead_letters()

    airline.is_open = True
    await life.runtime.redrive(letter.id)
    await life.runtime.settled()

    assert (standing.status, letter.attempts, letter.type) == ("compensating", 3, "saga:undo")
    assert standing.undoing is not None
    assert standing.undoing.dead_letter_id == letter.id
    assert (await life.instance("trip", "k")).status == "failed"
    assert await life.runtime.dead_letters() == []


async def test_a_redriven_step_that_fails_again_has_its_attempts_anew(bench: Bench) -> None:
    airline = Airline()
    life = await _given_up(bench, airline)
    (letter,) = await life.runtime.dead_letters()

    await life.runtime.redrive(letter.id)
    await bench.advance("1s")
    none = await life.runtime.dead_letters()
    await bench.advance("2s")

    assert none == []
    assert [each.type for each in await life.runtime.dead_letters()] == ["saga:undo"]


async def test_skipping_a_step_ends_the_run_and_takes_its_dead_letter_away(bench: Bench) -> None:
    life = await _given_up(bench, Airline())

    outcome = await life.runtime.skip("trip", "k", reason="refunded by hand")

    assert (outcome.disposition, outcome.status) == ("applied", "failed")
    assert await life.runtime.dead_letters() == []
    assert bench.receiver.payloads == [b'{"cancel":1}']
    assert await check_invariants(life.runtime.store) == []


async def test_commands_that_find_nothing_to_do_say_so(bench: Bench) -> None:
    life = await _given_up(bench, Airline())

    skipped = await life.runtime.skip("trip", "k", step="Hotel")
    resumed = await life.runtime.resume("trip", "k")
    cancelled = await life.runtime.cancel("trip", "k")
    ended = await life.runtime.terminate("trip", "k")
    twice = await life.runtime.terminate("trip", "k")

    assert [each.disposition for each in (skipped, resumed, cancelled, ended, twice)] == [
        "ignored",
        "ignored",
        "ignored",
        "applied",
        "ignored",
    ]
    assert "not that of 'Hotel'" in (skipped.reason or "")
    assert resumed.reason == "run 1 is not paused"
    assert "is being unwound already" in (cancelled.reason or "")
    assert ended.status == "cancelled"


async def test_a_cancel_is_answered_while_its_compensation_fails_and_ends_the_run_later(bench: Bench) -> None:
    airline = Airline()
    life = await bench.live(_trip(airline))
    await life.publish("Flight", {"n": 0}, key="k")

    outcome = await life.runtime.cancel("trip", "k", reason="ordered twice")
    airline.is_open = True
    await bench.advance("1s")

    after = await life.instance("trip", "k")
    assert (outcome.disposition, outcome.status) == ("applied", "compensating")
    assert (after.status, after.reason) == ("cancelled", "ordered twice")


async def test_a_run_whose_saga_is_gone_is_not_cancelled_but_can_be_terminated(bench: Bench) -> None:
    life = await bench.live(_trip(Airline()))
    await life.publish("Flight", {"n": 0}, key="k")
    await bench.end(life)
    other = define_saga("other").state({}).on("Other", lambda saga, event, context: []).build()
    life = await bench.live(other)

    refused = await life.runtime.cancel("trip", "k")
    plainly = await life.runtime.cancel("trip", "k", compensate=False)

    assert refused.disposition == "ignored"
    assert "saga 'trip' is not loaded here: load its module, or terminate the run" in (refused.reason or "")
    assert plainly.status == "cancelled"
