"""Timeouts that every run begins with, and what an operator does to a timer, decided as values."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from sagaloom import SagaMessage, cancel_scheduled, define_saga, saga_complete, saga_fail, schedule, send
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import Decision, EffectSummary, Instance, PendingTimer, Timer
from sagaloom.engine.timer_controls import CANCEL_TIMER, MOVE_TIMER, timer_control
from sagaloom.errors import MessageRejected
from sagaloom.ids import effect_key
from sagaloom.testing import scenario
from tests.core.deciding import NOW, begun, decided, envelope, kinds, nothing, raising, returning, saga_with

MINUTE = timedelta(minutes=1)
LATER = NOW + MINUTE


def after(decision: Decision) -> Instance:
    assert decision.instance is not None, decision
    return decision.instance


# -- timeouts ---------------------------------------------------------------------------------------------------------


def timed(begin: Any = nothing, late: Any = None, **more: Any) -> SagaDefinition[Any]:
    stage = define_saga("s").timeout("30m", message={"type": "Late", "payload": {"n": 1}}, **more).state({})
    return stage.on("Begin", begin).on("Go", nothing).on("Late", late or returning(saga_fail("too late"))).build()


def test_a_run_begins_with_its_timeout_in_the_decision_that_opens_it() -> None:
    decision = decided(timed(), envelope("Begin", traceparent="00-t", correlation_key="k"))

    (timer,) = decision.timers
    assert (timer.name, timer.due_at) == ("timeout", NOW + 30 * MINUTE)
    assert after(decision).timers == (PendingTimer(timer.id, timer.due_at, "timeout"),)
    message = timer.envelope
    assert (message.type, message.payload, message.origin) == ("Late", b'{"n":1}', "timer")
    assert (message.saga_id, message.key, message.run, message.id) == ("s", "k", 1, timer.id)
    assert (message.causation_id, message.traceparent, message.hops) == ("id-of-Begin", "00-t", 0)


def test_the_delay_counts_from_the_decision_and_not_from_when_the_message_came() -> None:
    decision = decided(timed(), envelope("Begin"), now=NOW + timedelta(hours=5))

    assert decision.timers[0].due_at == NOW + timedelta(hours=5, minutes=30)


def test_a_timeout_stands_in_the_history_of_the_step_that_opened_the_run() -> None:
    decision = decided(timed(returning(send("service:x", {}))), envelope("Begin"))

    assert decision.entry is not None
    (step,) = decision.entry.steps
    key = effect_key("s", "k", 1, 1, -1)
    assert step.effects[0] == EffectSummary("scheduled", "Late", key, "timeout")
    assert [effect.kind for effect in step.effects] == ["scheduled", "send"]


def test_a_timeout_renumbers_no_effect() -> None:
    handler = returning(send("service:x", {}), schedule(SagaMessage("Go", {}), "1m"))
    plain = define_saga("s").state({}).on("Begin", handler).on("Go", nothing).build()

    without, timed_out = (decided(saga, envelope("Begin")) for saga in (plain, timed(handler)))

    assert [effect.effect_key for effect in without.effects] == [effect.effect_key for effect in timed_out.effects]
    assert [timer.id for timer in without.timers] == [timer.id for timer in timed_out.timers][1:]


def test_only_the_message_that_opens_a_run_sets_its_timeouts() -> None:
    decision = decided(timed(), envelope("Go"), begun(timed()))

    assert decision.timers == ()
    assert len(after(decision).timers) == 1


def test_every_run_of_a_key_has_a_timeout_of_its_own() -> None:
    saga = timed(returning(saga_complete()))
    first, second = (decided(timed(), envelope("Begin", opens_run=True), run=run) for run in (0, 1))

    assert first.timers[0].id != second.timers[0].id
    assert [decision.timers[0].envelope.run for decision in (first, second)] == [1, 2]
    assert decided(saga, envelope("Begin")).timers == ()


def test_a_run_that_is_over_at_once_never_had_a_timeout() -> None:
    decision = decided(timed(returning(saga_complete())), envelope("Begin"))

    assert (decision.timers, decision.timers_ended, after(decision).timers) == ((), (), ())


def test_a_handler_takes_a_timeout_back_by_its_name_even_in_the_first_decision() -> None:
    at_once = decided(timed(returning(cancel_scheduled("timeout"))), envelope("Begin"))
    waiting = begun(timed())
    later = decided(saga_with(returning(cancel_scheduled("timeout"))), envelope("Go"), waiting)

    assert (at_once.timers, after(at_once).timers) == ((), ())
    assert later.timers_ended == waiting.timers


def test_a_handler_replaces_a_timeout_by_a_timer_of_its_name() -> None:
    handler = returning(schedule(SagaMessage("Late", {}), "1d", name="timeout"))

    decision = decided(timed(handler), envelope("Begin"))

    assert [timer.due_at for timer in decision.timers] == [NOW + timedelta(days=1)]


def test_a_message_that_fails_to_open_a_run_sets_nothing() -> None:
    decision = decided(timed(raising(RuntimeError("no"))), envelope("Begin"))

    assert (decision.disposition, decision.timers) == ("pending", ())


def test_timeouts_count_as_timers_of_the_run() -> None:
    handler = returning(schedule(SagaMessage("Go", {}), "1m"))

    decision = decided(timed(handler), envelope("Begin"), limits=Limits(timers_per_instance_max=1))

    assert decision.disposition == "dead_lettered"


def test_each_timeout_of_a_saga_has_its_time_and_its_name() -> None:
    stage = define_saga("s").timeout("1m", message="Remind", name="remind").timeout("5m", message="Late").state({})
    saga = stage.on("Begin", nothing).on("Remind", nothing).on("Late", returning(saga_fail("late"))).build()

    story = scenario(saga).given({"type": "Begin"}).advance("2m")
    reminded = story.instance
    story.advance("4m").then(status="failed", reason="late")

    assert reminded is not None
    assert [timer.name for timer in reminded.timers] == ["timeout"]
    assert reminded.last_message_type == "Remind"


# -- what an operator does --------------------------------------------------------------------------------------------


def waiting_for(name: str | None = "late") -> tuple[Instance, Timer]:
    """A run with two timers, and the first of them."""
    handler = returning(schedule(SagaMessage("Go", {"n": 1}), "1h", name), schedule(SagaMessage("Go", {}), "2h"))
    stage = define_saga("s").durability("t2").state({"a": 1}).on("Begin", handler).on("Go", nothing)
    decision = decided(stage.build(), envelope("Begin"))
    return after(decision), decision.timers[0]


def steered(instance: Instance, timer: Timer, due_at: datetime | None = None, **more: Any) -> Decision:
    said = timer_control(timer, message_id="c-1", accepted_at=NOW, due_at=due_at)
    return decided(saga_with(nothing), said, instance, now=LATER, **more)


def test_a_timer_that_was_cancelled_is_gone_and_the_others_stay() -> None:
    instance, timer = waiting_for()

    decision = steered(instance, timer)

    assert (decision.disposition, decision.timers) == ("applied", ())
    assert decision.timers_ended == instance.timers[:1]
    assert after(decision).timers == instance.timers[1:]


def test_a_timer_that_was_moved_is_the_same_at_another_time() -> None:
    instance, timer = waiting_for()
    due_at = NOW + timedelta(days=1)

    decision = steered(instance, timer, due_at.astimezone(timezone(timedelta(hours=2))))

    (moved,) = decision.timers
    assert decision.timers_ended == instance.timers[:1]
    assert (moved.id, moved.due_at, moved.name) == (timer.id, due_at, "late")
    assert moved.envelope == msgspec.structs.replace(timer.envelope, accepted_at=due_at)
    assert after(decision).timers == (PendingTimer(timer.id, due_at, "late"), instance.timers[1])


def test_a_timer_that_is_moved_into_the_past_is_due_now() -> None:
    instance, timer = waiting_for()

    assert steered(instance, timer, NOW - timedelta(days=1)).timers[0].due_at == LATER


@pytest.mark.parametrize(
    ("due_at", "kind", "told"),
    [
        (None, CANCEL_TIMER, "timer late was cancelled"),
        (NOW + timedelta(days=1), MOVE_TIMER, "timer late was moved to 2026-03-02T12:00:00Z"),
    ],
)
def test_what_was_done_to_a_timer_is_one_revision_in_the_history_and_the_feed(
    due_at: datetime | None, kind: str, told: str
) -> None:
    instance, timer = waiting_for()

    decision = steered(instance, timer, due_at)

    run, entry = after(decision), decision.entry
    assert entry is not None
    assert (run.revision, run.entries, run.message_count, run.last_message_type) == (2, 2, 2, kind)
    assert (run.state, run.status, run.updated_at) == (instance.state, "running", LATER)
    assert (entry.revision, entry.type, entry.origin, entry.reason, entry.steps) == (2, kind, "operator", told, ())
    assert (entry.before, entry.after) == (instance.state, instance.state)
    asked = msgspec.json.decode(entry.payload)
    assert (asked["timerId"], asked["name"], asked["messageType"]) == (timer.id, "late", "Go")
    assert asked.keys() - {"dueAt"} == {"timerId", "name", "messageType"}
    assert kinds(decision) == ["saga:message_received", "saga:state_changed"]
    assert decision.events[1].detail == told


def test_a_timer_without_a_name_is_told_by_its_id() -> None:
    instance, timer = waiting_for(None)

    assert steered(instance, timer).reason == f"timer {timer.id} was cancelled"


@pytest.mark.parametrize("due_at", [None, NOW + timedelta(days=1)])
def test_a_timer_that_is_gone_makes_the_control_one_that_is_ignored(due_at: datetime | None) -> None:
    instance, timer = waiting_for()
    without = msgspec.structs.replace(instance, timers=instance.timers[1:])

    decision = steered(without, timer, due_at)

    assert (decision.disposition, decision.timers, decision.timers_ended) == ("ignored", (), ())
    assert decision.reason == f"run 1 waits for no timer {timer.id}: it has fired, or was taken back"
    assert (after(decision).revision, after(decision).timers) == (1, without.timers)
    assert decision.entry is not None
    assert b"row" not in decision.entry.payload


def test_a_run_that_is_over_keeps_the_row_of_a_move_out_of_its_history() -> None:
    instance, timer = waiting_for()
    over = msgspec.structs.replace(instance, status="completed", timers=())

    decision = steered(over, timer, NOW + timedelta(days=1))

    assert (decision.disposition, decision.reason) == ("ignored", "run 1 is completed and takes no more messages")
    assert decision.entry is not None
    assert b"row" not in decision.entry.payload


def test_a_paused_run_keeps_waiting_when_its_timer_is_moved() -> None:
    instance, timer = waiting_for()
    paused = msgspec.structs.replace(instance, is_paused=True)

    decision = steered(paused, timer, NOW + timedelta(days=1))

    assert (decision.disposition, after(decision).is_paused) == ("applied", True)


@pytest.mark.parametrize("due_at", [datetime(2026, 3, 2), "1d", 7])  # noqa: DTZ001
def test_a_moment_without_a_time_zone_is_refused(due_at: Any) -> None:
    _, timer = waiting_for()

    with pytest.raises(MessageRejected, match=f"timer {timer.id} cannot be moved to .*with a time zone"):
        timer_control(timer, message_id="c-1", accepted_at=NOW, due_at=due_at)
