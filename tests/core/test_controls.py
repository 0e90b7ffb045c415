"""What an operator does to a run, decided as a value: cancel, pause, resume."""

from datetime import timedelta
from typing import Any

import msgspec
import pytest

from sagaloom import SagaMessage, define_saga, saga_complete, schedule
from sagaloom.engine.controls import (
    CANCEL,
    PAUSE,
    REASON_LENGTH_MAX,
    RESUME,
    TERMINATE,
    ControlType,
    control,
    ends_pause,
)
from sagaloom.engine.decide import DecideContext, steer
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import Decision, Envelope, Instance, ParentLink
from sagaloom.errors import DefinitionError, MessageRejected
from sagaloom.testing import scenario
from tests.core.deciding import NOW, begun, decided, envelope, head, kinds, nothing, returning, saga_with, sent

LATER = NOW + timedelta(minutes=1)
PARENT = ParentLink("parent", "p-1", 2, "spawned-by")


def steered(
    instance: Instance | None, kind: ControlType, *, reason: str | None = None, run: int | None = None, **more: Any
) -> Decision:
    """What a control does to a run of a saga that does nothing."""
    said = control(kind, "s", "k", message_id=f"c-{kind}", accepted_at=NOW, run=run, reason=reason)
    return decided(saga_with(nothing), said, instance, now=LATER, **more)


def after(decision: Decision) -> Instance:
    assert decision.instance is not None, decision
    return decision.instance


def paused() -> Instance:
    return after(steered(begun(saga_with(nothing)), PAUSE))


def test_a_cancelled_run_is_terminal_and_says_why() -> None:
    instance = begun(saga_with(nothing))

    decision = steered(instance, CANCEL, reason="ordered twice")

    cancelled = after(decision)
    assert (decision.disposition, decision.reason) == ("applied", "ordered twice")
    assert (cancelled.status, cancelled.reason, cancelled.revision) == ("cancelled", "ordered twice", 2)
    assert (cancelled.ended_at, cancelled.completed_at, cancelled.updated_at) == (LATER, None, LATER)
    assert (cancelled.state, cancelled.result) == (instance.state, None)
    assert (cancelled.message_count, cancelled.last_message_type) == (2, "saga:cancel")


def test_a_cancellation_without_a_reason_has_one_to_show() -> None:
    assert after(steered(begun(saga_with(nothing)), CANCEL)).reason == "cancelled by an operator"


def test_a_control_stands_in_the_history_as_the_message_that_it_is() -> None:
    decision = steered(begun(saga_with(nothing)), CANCEL, reason="ordered twice")

    entry = decision.entry
    assert entry is not None
    assert (entry.entry_no, entry.revision, entry.disposition) == (2, 2, "applied")
    assert (entry.type, entry.origin, entry.message_id) == ("saga:cancel", "operator", "c-saga:cancel")
    assert (entry.status_before, entry.status_after, entry.steps) == ("running", "cancelled", ())
    assert msgspec.json.decode(entry.payload) == {"reason": "ordered twice"}
    assert (entry.before, entry.after) == (None, None)


def test_the_history_of_a_higher_tier_keeps_the_state_that_a_control_found() -> None:
    instance = msgspec.structs.replace(begun(saga_with(nothing)), tier="t2")

    entry = steered(instance, PAUSE).entry

    assert entry is not None
    assert (entry.before, entry.after) == (b"{}", b"{}")


def test_cancelling_ends_the_timers() -> None:
    definition = saga_with(nothing)
    waiting = begun(define_saga("s").state({}).on("Begin", returning(schedule(SagaMessage("Go", {}), "1h"))).build())
    said = control(CANCEL, "s", "k", message_id="c", accepted_at=NOW)

    decision = decided(definition, said, waiting)

    assert decision.timers_ended == waiting.timers
    assert len(waiting.timers) == 1
    assert after(decision).timers == ()


@pytest.mark.parametrize(("kind", "compensate"), [(CANCEL, False), (TERMINATE, True)])
def test_a_run_can_be_ended_without_undoing_anything(kind: ControlType, *, compensate: bool) -> None:
    definition = saga_with(nothing, compensation=returning(saga_complete()))
    instance = after(decided(definition, envelope("Go"), begun(definition)))
    assert len(instance.steps) == 1
    said = control(kind, "s", "k", message_id="c", accepted_at=NOW, compensate=compensate)

    decision = decided(definition, said, instance)

    assert after(decision).status == "cancelled"
    assert (after(decision).steps, decision.effects) == ((), ())


def test_a_run_that_compensates_can_be_cancelled() -> None:
    instance = msgspec.structs.replace(begun(saga_with(nothing)), status="compensating")

    assert after(steered(instance, CANCEL)).status == "cancelled"


def test_a_parent_hears_that_its_child_was_cancelled() -> None:
    instance = msgspec.structs.replace(begun(saga_with(nothing)), parent=PARENT)

    outgoing = sent(steered(instance, CANCEL, reason="ordered twice"))

    told = {"instanceId": "s:k", "sagaId": "s", "correlationKey": "k", "run": 1, "reason": "ordered twice"}
    assert (outgoing.kind, outgoing.target, outgoing.correlation_key, outgoing.to_run) == (
        "child_end",
        "parent",
        "p-1",
        2,
    )
    assert outgoing.payload == SagaMessage("s:cancelled", told)
    assert msgspec.json.decode(outgoing.encoded) == told


@pytest.mark.parametrize("kind", [PAUSE, RESUME])
def test_a_parent_does_not_hear_of_a_pause(kind: ControlType) -> None:
    instance = msgspec.structs.replace(begun(saga_with(nothing)), parent=PARENT, is_paused=kind == RESUME)

    assert steered(instance, kind).outgoing == ()


def test_pausing_and_resuming_change_only_the_flag() -> None:
    running = begun(saga_with(nothing))

    pausing = steered(running, PAUSE, reason="bank is down")
    resuming = steered(after(pausing), RESUME)

    assert [(after(each).is_paused, after(each).revision, after(each).status) for each in (pausing, resuming)] == [
        (True, 2, "running"),
        (False, 3, "running"),
    ]
    assert pausing.entry is not None
    assert (pausing.entry.type, pausing.entry.reason) == ("saga:pause", "bank is down")
    assert after(pausing).reason is None
    assert after(resuming).state == running.state


@pytest.mark.parametrize(
    ("message", "run"),
    [("Go", None), ("Begin", None), ("Go", 1), ("Never", None)],
    ids=["a message", "one that may start", "a bound one", "one without a handler"],
)
def test_a_paused_run_defers_what_comes(message: str, run: int | None) -> None:
    decision = decided(saga_with(nothing), envelope(message, run=run), paused())

    assert decision == Decision("deferred", "run 1 of s:k is paused")


def test_a_paused_run_does_not_keep_others_of_its_key_from_opening() -> None:
    decision = decided(saga_with(nothing), envelope("Begin", opens_run=True), paused())

    assert (decision.disposition, after(decision).run) == ("applied", 2)


def test_a_resumed_run_takes_messages_again() -> None:
    resumed = after(steered(paused(), RESUME))

    assert decided(saga_with(nothing), envelope("Go"), resumed).disposition == "applied"


def test_a_paused_run_can_be_cancelled_and_is_paused_no_more() -> None:
    cancelled = after(steered(paused(), CANCEL))

    assert (cancelled.status, cancelled.is_paused) == ("cancelled", False)


@pytest.mark.parametrize(
    ("instance", "kind", "reason"),
    [
        (paused, PAUSE, "run 1 is paused already"),
        (lambda: begun(saga_with(nothing)), RESUME, "run 1 is not paused"),
        (lambda: after(steered(begun(saga_with(nothing)), CANCEL)), CANCEL, "run 1 is cancelled and takes no more"),
        (lambda: after(steered(begun(saga_with(nothing)), CANCEL)), RESUME, "run 1 is cancelled and takes no more"),
    ],
)
def test_a_control_in_vain_is_ignored_and_recorded(instance: Any, kind: ControlType, reason: str) -> None:
    before = instance()

    decision = steered(before, kind)

    assert decision.disposition == "ignored"
    assert reason in (decision.reason or "")
    assert decision.entry is not None
    assert (decision.entry.type, decision.entry.disposition) == (kind, "ignored")
    unchanged = msgspec.structs.replace(
        after(decision), entries=before.entries, bystanders=before.bystanders
    )  # only these two have grown
    assert unchanged == before


def test_controls_in_vain_are_counted_past_the_limit_of_rows() -> None:
    decision = steered(paused(), PAUSE, limits=Limits(bystander_rows_max=0))

    assert decision.entry is None
    assert after(decision).bystanders == 1


def test_a_control_for_a_key_without_a_run_leaves_nothing() -> None:
    decision = steered(None, CANCEL)

    assert decision == Decision("ignored", "there is no run of s:k")


def test_a_control_is_for_the_run_that_it_names() -> None:
    assert steered(begun(saga_with(nothing)), CANCEL, run=2).instance is None
    assert after(steered(begun(saga_with(nothing)), CANCEL, run=1)).status == "cancelled"


def test_a_run_whose_saga_is_gone_can_be_cancelled() -> None:
    instance = begun(saga_with(nothing))
    said = control(CANCEL, "s", "k", message_id="c", accepted_at=NOW)

    decision = steer(instance, said, DecideContext(NOW, head(run=1)))

    assert after(decision).status == "cancelled"


def test_a_message_of_a_control_s_type_from_elsewhere_is_no_control() -> None:
    decision = decided(saga_with(nothing), envelope(CANCEL, origin="door"), begun(saga_with(nothing)))

    assert decision.disposition == "dead_lettered"
    assert after(decision).status == "running"


def test_the_feed_shows_what_an_operator_did() -> None:
    running = begun(saga_with(nothing))

    assert kinds(steered(running, CANCEL)) == ["saga:message_received", "saga:cancelled"]
    shown = steered(running, PAUSE, reason="bank is down").events[-1]
    assert (shown.type, shown.status, shown.detail) == ("saga:state_changed", "running", "paused: bank is down")
    assert steered(paused(), RESUME).events[-1].detail == "resumed"


@pytest.mark.parametrize("reason", ["x" * (REASON_LENGTH_MAX + 1), 7])
def test_a_reason_is_a_text_of_bounded_length(reason: Any) -> None:
    with pytest.raises(MessageRejected, match="reason of 'saga:pause'"):
        control(PAUSE, "s", "k", message_id="c", accepted_at=NOW, reason=reason)


def test_a_reason_that_utf8_cannot_carry_is_spelled_out() -> None:
    decision = steered(begun(saga_with(nothing)), CANCEL, reason="\ud800!")

    assert after(decision).reason == "\\ud800!"


def test_only_what_may_end_a_pause_asks_those_who_wait_again() -> None:
    def said(kind: ControlType) -> Envelope:
        return control(kind, "s", "k", message_id="c", accepted_at=NOW)

    assert [ends_pause(said(kind)) for kind in (CANCEL, PAUSE, RESUME)] == [True, False, True]
    assert not ends_pause(envelope(RESUME))


@pytest.mark.parametrize("message", ["saga:cancel", "saga:anything"])
def test_no_saga_handles_a_reserved_type(message: str) -> None:
    with pytest.raises(DefinitionError, match="belong to the engine"):
        define_saga("s").state({}).on(message, nothing)


def test_no_saga_has_the_name_of_the_reserved_types() -> None:
    with pytest.raises(DefinitionError, match="'saga' is reserved"):
        define_saga("saga")


def test_a_scenario_plays_the_operator() -> None:
    definition = (
        define_saga("orders")
        .state({"seen": []})
        .on("Begin", returning(schedule(SagaMessage("Late", {}), "1m")))
        .on("Add", _note, starts=False)
        .on("Late", _note, starts=False)
        .build()
    )
    story = scenario(definition).given(SagaMessage("Begin", {}, "o-1")).pause("bank is down")

    story.when(SagaMessage("Add", {}, "o-1")).then(disposition="deferred", revision=2)
    story.advance("2m").then(disposition="deferred", state={"seen": []})
    story.resume().then(disposition="applied", state={"seen": ["Add", "Late"]}, revision=5)
    story.cancel("ordered twice").then(status="cancelled", reason="ordered twice")
    story.when(SagaMessage("Add", {}, "o-1")).then(disposition="ignored", status="cancelled")


def _note(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state["seen"].append(event.type)
    return []
