"""Effects, timers and messages between sagas, as a decision writes them down."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from sagaloom import RetryPolicy, SagaMessage, cancel_scheduled, define_saga, schedule, send, spawn
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import EffectSummary, OutboxEffect, ParentLink, PendingTimer
from sagaloom.ids import effect_key
from tests.core.deciding import (
    NOW,
    Context,
    Effects,
    Event,
    Slot,
    Story,
    begun,
    decided,
    envelope,
    gone,
    nothing,
    raising,
    refusal,
    returning,
    saga_with,
    sent,
)

# --- What leaves -----------------------------------------------------------------------------------------------------


def test_a_send_becomes_an_outbox_effect_with_everything_that_goes_along() -> None:
    policy = RetryPolicy(maximum_attempts=2)
    effect = send(
        {"kind": "service", "id": "payments"},
        {"amount": 3},
        {"idempotencyKey": "i", "concurrencyKey": "c", "queue": "q", "retry": policy, "onDeadLetter": "continue"},
    )
    definition = saga_with(returning(effect))
    message = envelope("Go", id="m1", hops=4, traceparent="00-a", tracestate="v=1")

    decision = decided(definition, message, begun(definition))

    key = effect_key("s", "k", 1, 2, 0)
    assert decision.effects == (
        OutboxEffect(
            effect_key=key,
            lane="s\0k\0001\0service:payments",
            target_kind="service",
            target_id="payments",
            payload=b'{"amount":3}',
            saga_id="s",
            key="k",
            run=1,
            revision=2,
            position=0,
            message_id="m1",
            created_at=NOW,
            hops=5,
            idempotency_key="i",
            concurrency_key="c",
            queue="q",
            retry=policy,
            continues_after_dead_letter=True,
            traceparent="00-a",
            tracestate="v=1",
        ),
    )
    assert decision.entry is not None
    assert decision.entry.steps[0].effects == (EffectSummary("send", "service:payments", key),)


def test_effects_keep_their_order_and_each_has_a_key_of_its_own() -> None:
    decision = gone(saga_with(returning(*(send("service:x", {"n": n}) for n in range(3)))))

    assert [effect.position for effect in decision.effects] == [0, 1, 2]
    assert [msgspec.json.decode(effect.payload)["n"] for effect in decision.effects] == [0, 1, 2]
    assert len({effect.effect_key for effect in decision.effects}) == 3


def test_a_redelivery_sends_under_the_same_key_and_the_next_revision_under_another() -> None:
    definition = saga_with(returning(send("service:x", {})))
    instance = begun(definition)

    first = decided(definition, envelope("Go"), instance)
    again = decided(definition, envelope("Go", attempt=3, id="other"), instance, now=NOW + timedelta(days=1))
    after = decided(definition, envelope("Go"), first.instance)

    assert first.effects[0].effect_key == again.effects[0].effect_key
    assert first.effects[0].effect_key != after.effects[0].effect_key


def test_too_many_effects_are_a_dead_letter() -> None:
    handler = returning(*[send("service:x", {})] * 4)

    assert gone(saga_with(handler), limits=Limits(effects_max=4)).disposition == "applied"
    decision = gone(saga_with(handler), limits=Limits(effects_max=3))
    assert "saga 's', message 'Go': more than 3 effects in one decision" in refusal(decision)


@pytest.mark.parametrize("kind", ["service", "saga"])
def test_effects_that_are_too_large_together_are_a_dead_letter(kind: str) -> None:
    handler = returning(*[send({"kind": kind, "id": "x"}, "y" * 50)] * 4)

    decision = gone(saga_with(handler), limits=Limits(effects_bytes_max=150))

    assert "the effects of one decision have more than 150 bytes" in refusal(decision)


def test_a_payload_that_cannot_be_written_is_a_dead_letter() -> None:
    decision = gone(saga_with(returning(send("service:x", {"when": {1, 2}}))))

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_HANDLER_RESULT"
    assert "$.when" in refusal(decision)


def test_a_text_that_no_store_could_hold_is_a_dead_letter() -> None:
    decision = gone(saga_with(returning(send("service:x", {}, idempotency_key="\ud83d"))))

    assert "idempotency_key" in refusal(decision)
    assert "lone surrogate" in refusal(decision)


# --- What stays ------------------------------------------------------------------------------------------------------


def test_a_send_to_a_saga_stays_in_the_store_with_the_sender_s_key() -> None:
    definition = saga_with(returning(send("PaymentDue", {"n": 1}, idempotency_key="i")))

    decision = decided(definition, envelope("Go", id="m1", hops=4, traceparent="00-a"), begun(definition))

    outgoing = sent(decision)
    assert decision.effects == ()
    assert (outgoing.kind, outgoing.target, outgoing.correlation_key) == ("send", "PaymentDue", "k")
    assert (outgoing.effect_key, outgoing.sender) == (effect_key("s", "k", 1, 2, 0), ("s", "k", 1))
    assert (outgoing.payload, outgoing.encoded, outgoing.idempotency_key) == ({"n": 1}, b'{"n":1}', "i")
    assert (outgoing.causation_id, outgoing.hops, outgoing.traceparent) == ("m1", 5, "00-a")


def test_a_run_of_the_default_key_passes_on_its_instance_id_and_so_never_merges_its_partners() -> None:
    definition = saga_with(returning(send("saga:other", {})))

    decision = decided(definition, envelope("Go", key="s:Go", opens_run=True), run=4)

    assert sent(decision).correlation_key == "s~5:s:Go"


@pytest.mark.parametrize("payload", [SagaMessage("T", {"n": 1}), {"type": "T", "payload": {"n": 1}}])
def test_a_send_of_a_message_carries_the_payload_of_that_message(payload: Any) -> None:
    outgoing = sent(gone(saga_with(returning(send("saga:other", payload)))))

    assert outgoing.payload == SagaMessage("T", {"n": 1})
    assert outgoing.encoded == b'{"n":1}'


def test_a_spawn_carries_the_link_to_its_parent() -> None:
    outgoing = sent(gone(saga_with(returning(spawn("child", {"n": 1}, concurrency_key="c")))))

    assert (outgoing.kind, outgoing.target, outgoing.correlation_key) == ("spawn", "child", None)
    assert outgoing.parent == ParentLink("s", "k", 1, outgoing.effect_key, pk=7, revision=2, position=0)
    assert (outgoing.encoded, outgoing.concurrency_key) == (b'{"n":1}', "c")


# --- Timers ----------------------------------------------------------------------------------------------------------


@dataclass
class Overdue:
    order: str


def test_a_scheduled_message_becomes_a_timer_bound_to_this_run() -> None:
    definition = saga_with(returning(schedule(Overdue("o-1"), "5m", "deadline")))

    decision = decided(definition, envelope("Go", id="m1", correlation_key="k", hops=9), begun(definition))

    (timer,) = decision.timers
    due_at = NOW + timedelta(minutes=5)
    assert (timer.id, timer.due_at, timer.name) == (f"tm{effect_key('s', 'k', 1, 2, 0)}", due_at, "deadline")
    assert (timer.envelope.saga_id, timer.envelope.key, timer.envelope.run) == ("s", "k", 1)
    assert (timer.envelope.type, timer.envelope.payload) == ("Overdue", b'{"order":"o-1"}')
    assert (timer.envelope.origin, timer.envelope.id, timer.envelope.dedupe_key) == ("timer", timer.id, timer.id)
    assert (timer.envelope.causation_id, timer.envelope.accepted_at) == ("m1", due_at)
    assert decision.instance is not None
    assert decision.instance.timers == (PendingTimer(timer.id, due_at, "deadline"),)


def test_waiting_starts_a_new_cascade_and_not_waiting_goes_on_with_the_old_one() -> None:
    definition = saga_with(returning(schedule({"type": "Go"}, 1), schedule({"type": "Go"}, 0)))

    later, now = decided(definition, envelope("Go", hops=9), begun(definition)).timers

    assert (later.envelope.hops, now.envelope.hops) == (0, 10)


def _scheduling() -> SagaDefinition[Any]:
    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        if "cancel" in event.payload:
            return [cancel_scheduled(event.payload["cancel"])]
        return [schedule({"type": "Ring"}, event.payload["delay"], event.payload.get("name"))]

    return define_saga("s").state({}).on("Go", handler).on("Ring", nothing, starts=False).build()


def test_a_timer_of_the_same_name_replaces_the_one_before() -> None:
    story = Story(_scheduling())
    (first,) = story.takes("Go", {"delay": "1m", "name": "n"}).timers
    decision = story.takes("Go", {"delay": "2m", "name": "n"})

    assert decision.timers_ended == (PendingTimer(first.id, first.due_at, "n"),)
    assert decision.instance is not None
    assert [timer.id for timer in decision.instance.timers] == [decision.timers[0].id]


def test_a_timer_replaced_in_the_same_decision_was_never_there() -> None:
    decision = gone(saga_with(returning(schedule({"type": "A"}, 1, "n"), schedule({"type": "B"}, 2, "n"))))

    assert [timer.envelope.type for timer in decision.timers] == ["B"]
    assert decision.timers_ended == ()


def test_cancel_scheduled_takes_a_timer_back_and_nothing_happens_when_there_is_none() -> None:
    story = Story(_scheduling())
    (first,) = story.takes("Go", {"delay": "1m", "name": "n"}).timers

    cancelled = story.takes("Go", {"cancel": "n"})
    again = story.takes("Go", {"cancel": "n"})

    assert [timer.id for timer in cancelled.timers_ended] == [first.id]
    assert (again.timers_ended, again.disposition) == ((), "applied")
    assert again.instance is not None
    assert again.instance.timers == ()


def test_a_fired_timer_is_gone_and_not_listed_as_ended() -> None:
    story = Story(_scheduling())
    (first,) = story.takes("Go", {"delay": "1m", "name": "n"}).timers
    (other,) = story.takes("Go", {"delay": "2m"}).timers

    decision = decided(story.definition, first.envelope, story.instance, now=first.due_at)

    assert decision.disposition == "applied"
    assert decision.timers_ended == ()
    assert decision.instance is not None
    assert [timer.id for timer in decision.instance.timers] == [other.id]


def test_a_fired_timer_may_schedule_its_own_name_again() -> None:
    definition = define_saga("s").state({}).on("Ring", returning(schedule({"type": "Ring"}, "1m", "tick"))).build()
    story = Story(definition)
    (first,) = story.takes("Ring").timers

    decision = decided(definition, first.envelope, story.instance, now=first.due_at)

    assert decision.timers_ended == ()
    assert [timer.id for timer in decision.timers] != [first.id]
    assert decision.instance is not None
    assert len(decision.instance.timers) == 1


def test_a_fired_timer_that_becomes_a_dead_letter_is_gone_too() -> None:
    story = Story(_scheduling())
    (first,) = story.takes("Go", {"delay": "1m"}).timers
    broken = saga_with(nothing)

    decision = decided(broken, first.envelope, story.instance)

    assert decision.disposition == "dead_lettered"
    assert decision.instance is not None
    assert decision.instance.timers == ()


def test_a_timer_that_is_retried_still_waits() -> None:
    definition = define_saga("s").state({}).on("Begin", nothing).on("Ring", raising(ValueError("x"))).build()
    instance = msgspec.structs.replace(begun(definition), timers=(PendingTimer("tm1", NOW, None),))

    assert decided(definition, envelope("Ring", id="tm1", run=1, origin="timer"), instance).instance is None


def test_too_many_timers_are_a_dead_letter_but_names_replace() -> None:
    limits = Limits(timers_per_instance_max=2)
    many = returning(*(schedule({"type": "Go"}, "1m") for _ in range(3)))
    named = returning(*(schedule({"type": "Go"}, "1m", "n") for _ in range(3)))

    assert "the run has 2 timers already, and at most 2 may wait" in refusal(gone(saga_with(many), limits=limits))
    assert gone(saga_with(named), limits=limits).disposition == "applied"


def test_a_moment_in_the_past_is_now() -> None:
    (timer,) = gone(saga_with(returning(schedule({"type": "Go"}, NOW - timedelta(days=1))))).timers

    assert timer.due_at == NOW
