"""How steps are undone: which compensations run, in which order, and how a run ends by them."""

from typing import Any

import pytest

from sagaloom import ALL_STEPS, SagaMessage, define_saga, saga_compensate, saga_complete, saga_fail, send
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.limits import Limits
from tests.core.deciding import (
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
)


def steps(decision: Any) -> list[tuple[str, str, str]]:
    assert decision.entry is not None, decision
    return [(step.phase, step.type, step.status) for step in decision.entry.steps]


def targets(decision: Any) -> list[str]:
    return [effect.target_id for effect in decision.effects]


def undoing(name: str, *more: Any) -> Any:
    return returning(send(f"service:undo-{name}", {}), *more)


# --- saga_fail -------------------------------------------------------------------------------------------------------


def test_saga_fail_runs_the_compensation_of_the_current_type_first() -> None:
    seen: list[Event] = []

    def undo(saga: Slot, event: Event, context: Context) -> Effects:
        seen.append(event)
        saga.state["undone"] = True
        return [send("service:undo", {})]

    decision = gone(saga_with(returning(saga_fail("no stock")), compensation=undo), payload={"n": 1})

    assert steps(decision) == [("handle", "Go", "compensating"), ("compensate", "Go", "failed")]
    assert targets(decision) == ["undo"]
    assert decision.instance is not None
    assert (decision.instance.reason, decision.instance.state) == ("no stock", b'{"undone":true}')
    assert (seen[0].type, seen[0].payload, seen[0].id) == ("Go", {"n": 1}, "id-of-Go")


def test_saga_fail_without_a_compensation_just_ends_the_run() -> None:
    assert steps(gone(saga_with(returning(saga_fail("no"))))) == [("handle", "Go", "failed")]


def test_saga_fail_in_the_compensation_it_started_agrees_and_the_first_reason_stays() -> None:
    decision = gone(saga_with(returning(saga_fail("outer")), compensation=returning(saga_fail("inner"))))

    assert decision.instance is not None
    assert (decision.instance.status, decision.instance.reason) == ("failed", "outer")
    assert len(steps(decision)) == 2


def test_saga_fail_beside_a_compensation_of_the_same_message_undoes_it_once() -> None:
    both = returning(saga_compensate({"type": "Go"}), saga_fail("no"))

    decision = gone(saga_with(both, compensation=undoing("go")))

    assert targets(decision) == ["undo-go"]


def test_saga_complete_in_a_compensation_that_saga_fail_started_is_an_error() -> None:
    decision = gone(saga_with(returning(saga_fail("no")), compensation=returning(saga_complete())))

    assert "two terminal effects in one decision" in refusal(decision)


# --- saga_compensate(message) ----------------------------------------------------------------------------------------


def test_a_compensation_without_a_terminal_effect_leaves_the_run_compensating_and_taking_messages() -> None:
    story = Story(saga_with(returning(saga_compensate({"type": "Go"}, "why")), compensation=nothing))
    story.takes("Begin")

    first = story.takes("Go")
    then = story.takes("Begin")

    assert first.instance is not None
    assert then.instance is not None
    assert (first.instance.status, first.instance.reason) == ("compensating", "why")
    assert (then.disposition, then.instance.status, then.instance.reason) == ("applied", "compensating", "why")


def test_a_compensating_run_may_complete() -> None:
    definition = (
        define_saga("s")
        .state({})
        .on("Go", returning(saga_compensate({"type": "Go"})))
        .on("Confirmed", returning(saga_complete()))
        .compensate("Go", nothing)
        .build()
    )
    story = Story(definition)
    story.takes("Go")

    assert steps(story.takes("Confirmed")) == [("handle", "Confirmed", "completed")]


def test_compensating_a_type_without_a_compensation_is_an_error_that_names_saga_and_type() -> None:
    decision = gone(saga_with(returning(saga_compensate({"type": "Paid"})), compensation=nothing))

    assert decision.disposition == "dead_lettered"
    assert refusal(decision).startswith("saga 's', message 'Go': saga_compensate('Paid') needs .compensate('Paid'")
    assert "registered are: Go" in refusal(decision)


def test_the_compensation_sees_the_state_that_the_handler_left_and_no_object_of_it() -> None:
    kept: list[Any] = []

    def forward(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["list"] = [1]
        kept.append(saga.state)
        return [saga_compensate({"type": "Go"})]

    def undo(saga: Slot, event: Event, context: Context) -> Effects:
        kept.append(saga.state)
        assert context.state == {"list": [1]}
        return []

    gone(saga_with(forward, compensation=undo))

    assert kept[0] == kept[1]
    assert kept[0] is not kept[1]
    assert kept[0]["list"] is not kept[1]["list"]


def test_what_the_message_of_a_compensation_lacks_comes_from_the_message_that_set_it_off() -> None:
    seen: list[Event] = []

    def undo(saga: Slot, event: Event, context: Context) -> Effects:
        seen.append(event)
        return []

    definition = (
        define_saga("s")
        .state({})
        .on("Go", returning(saga_compensate(SagaMessage("Paid", {"n": 1}))))
        .compensate("Paid", undo, payload=dict[str, int])
        .build()
    )
    decided(definition, envelope("Go", id="m1", correlation_key="k", traceparent="00-a", tracestate="v=1"))

    assert seen == [SagaMessage("Paid", {"n": 1}, "k", None, None, None, "m1", "00-a", "v=1")]


def test_a_payload_that_the_compensation_cannot_take_is_a_dead_letter_that_names_the_path() -> None:
    definition = (
        define_saga("s")
        .state({})
        .on("Go", returning(saga_compensate(SagaMessage("Paid", {"n": "one"}))))
        .compensate("Paid", nothing, payload=dict[str, int])
        .build()
    )

    decision = decided(definition, envelope("Go"))

    assert "the compensation for 'Paid' cannot take its payload" in refusal(decision)
    assert "$[...]" in refusal(decision) or "$.n" in refusal(decision)


def test_a_compensation_that_raises_is_retried_with_its_handler() -> None:
    handler = returning(send("service:x", {}), saga_compensate({"type": "Go"}))

    decision = gone(saga_with(handler, compensation=raising(ConnectionError("down"))))

    assert decision.disposition == "pending"
    assert decision.effects == ()


def test_a_compensation_that_returns_none_is_an_error_that_calls_it_a_compensation() -> None:
    handler = returning(saga_compensate({"type": "Go"}))

    decision = gone(saga_with(handler, compensation=lambda saga, event, context: None))

    assert "its compensation for 'Go' returned None" in refusal(decision)


def test_nested_compensations_run_depth_first_and_positions_count_over_all_of_them() -> None:
    definition = (
        define_saga("s")
        .state({})
        .on("Go", returning(saga_compensate({"type": "A"}), saga_compensate({"type": "B"}), send("service:go", {})))
        .compensate("A", undoing("a", saga_compensate({"type": "C"})))
        .compensate("B", undoing("b"))
        .compensate("C", undoing("c"))
        .build()
    )

    decision = decided(definition, envelope("Go"))

    assert [(effect.target_id, effect.position) for effect in decision.effects] == [
        ("go", 2),
        ("undo-a", 3),
        ("undo-c", 5),
        ("undo-b", 6),
    ]
    assert [step[1] for step in steps(decision)] == ["Go", "A", "C", "B"]


def test_a_cycle_of_compensations_is_a_dead_letter_and_not_a_hang() -> None:
    definition = (
        define_saga("s")
        .state({})
        .on("Go", returning(saga_compensate({"type": "A"})))
        .compensate("A", returning(saga_compensate({"type": "B"})))
        .compensate("B", returning(saga_compensate({"type": "A"})))
        .build()
    )

    decision = decided(definition, envelope("Go"), limits=Limits(compensation_depth_max=4))

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_LIMIT_EXCEEDED"
    assert "nested more than 4 deep (A -> B -> A -> B -> A -> ...)" in refusal(decision)


def test_compensations_that_fan_out_without_end_stop_at_the_limit_of_effects() -> None:
    twice = returning(saga_compensate({"type": "Go"}), saga_compensate({"type": "Go"}))

    decision = gone(saga_with(twice, compensation=twice), limits=Limits(effects_max=50))

    assert "more than 50 effects in one decision" in refusal(decision)


def test_two_compensations_that_both_fail_the_run_agree() -> None:
    definition = (
        define_saga("s")
        .state({})
        .on("Go", returning(saga_compensate({"type": "A"}), saga_compensate({"type": "B"})))
        .compensate("A", undoing("a", saga_fail("first")))
        .compensate("B", undoing("b", saga_fail("second")))
        .build()
    )

    decision = decided(definition, envelope("Go"))

    assert targets(decision) == ["undo-a", "undo-b"]
    assert decision.instance is not None
    assert (decision.instance.status, decision.instance.reason) == ("failed", "first")


def test_a_handler_cannot_complete_what_its_compensation_failed() -> None:
    handler = returning(saga_compensate({"type": "Go"}), saga_complete())

    decision = gone(saga_with(handler, compensation=returning(saga_fail("no"))))

    assert "it was failed already when the handler for 'Go' returned saga_complete" in refusal(decision)


# --- ALL_STEPS -------------------------------------------------------------------------------------------------------


def travel(*, cancel: Any, hotel: Any = None, flight: Any = None) -> SagaDefinition[Any]:
    """Books a flight and a hotel; `Noted` has nothing to undo."""
    return (
        define_saga("s")
        .state({})
        .on("Flight", nothing)
        .on("Hotel", nothing)
        .on("Noted", nothing)
        .on("Cancel", cancel)
        .compensate("Flight", flight or undoing("flight"))
        .compensate("Hotel", hotel or undoing("hotel"))
        .build()
    )


def booked(definition: SagaDefinition[Any]) -> Story:
    story = Story(definition)
    story.takes("Flight", {"seat": "1A"})
    story.takes("Noted")
    story.takes("Hotel", {"room": 7})
    return story


def test_applied_messages_are_remembered_as_steps_only_if_they_have_a_compensation() -> None:
    story = booked(travel(cancel=nothing))

    assert story.instance is not None
    assert [(step.type, step.payload, step.revision) for step in story.instance.steps] == [
        ("Flight", b'{"seat":"1A"}', 1),
        ("Hotel", b'{"room":7}', 3),
    ]


def test_all_steps_undoes_every_applied_step_newest_first_and_ends_failed() -> None:
    seen: list[tuple[str, Any, str | None]] = []

    def undo(saga: Slot, event: Event, context: Context) -> Effects:
        seen.append((event.type, event.payload, event.id))
        return []

    definition = travel(cancel=returning(saga_compensate(ALL_STEPS, "rain")), hotel=undo, flight=undo)

    decision = booked(definition).takes("Cancel")

    assert seen == [("Hotel", {"room": 7}, "m3"), ("Flight", {"seat": "1A"}, "m1")]
    assert steps(decision) == [
        ("handle", "Cancel", "compensating"),
        ("compensate", "Hotel", "compensating"),
        ("compensate", "Flight", "failed"),
    ]
    assert decision.instance is not None
    assert (decision.instance.reason, decision.instance.steps) == ("rain", ())


def test_the_current_message_is_not_one_of_all_steps() -> None:
    story = Story(travel(cancel=nothing))
    story.takes("Flight")
    decision = Story(saga_with(returning(saga_compensate(ALL_STEPS)), compensation=undoing("go"))).takes("Go")

    assert targets(decision) == []
    assert decision.instance is not None
    assert (decision.instance.status, decision.instance.reason) == ("failed", "every applied step was compensated")


def test_saga_fail_in_a_step_gives_the_reason_if_there_is_none_and_stops_nothing() -> None:
    definition = travel(
        cancel=returning(saga_compensate(ALL_STEPS)), hotel=undoing("hotel", saga_fail("hotel is gone"))
    )

    decision = booked(definition).takes("Cancel")

    assert targets(decision) == ["undo-hotel", "undo-flight"]
    assert decision.instance is not None
    assert decision.instance.reason == "hotel is gone"


def test_the_reason_given_goes_before_that_of_a_step() -> None:
    cancel = returning(saga_compensate(ALL_STEPS, "rain"))

    decision = booked(travel(cancel=cancel, hotel=undoing("hotel", saga_fail("gone")))).takes("Cancel")

    assert decision.instance is not None
    assert decision.instance.reason == "rain"


@pytest.mark.parametrize("step", ["hotel", "flight"])
def test_saga_complete_in_a_step_is_an_error(step: str) -> None:
    other: dict[str, Any] = {step: returning(saga_complete())}

    decision = booked(travel(cancel=returning(saga_compensate(ALL_STEPS)), **other)).takes("Cancel")

    assert "two terminal effects in one decision" in refusal(decision)


@pytest.mark.parametrize("other", [saga_complete(), saga_fail("no"), saga_compensate(ALL_STEPS)])
def test_all_steps_beside_another_terminal_effect_is_an_error(other: Any) -> None:
    decision = booked(travel(cancel=returning(saga_compensate(ALL_STEPS), other))).takes("Cancel")

    assert "returned two terminal effects, saga_compensate(ALL_STEPS) and" in refusal(decision)


def test_a_step_that_was_compensated_by_name_is_not_undone_again() -> None:
    def cancel(saga: Slot, event: Event, context: Context) -> Effects:
        return [saga_compensate(ALL_STEPS)] if event.payload else [saga_compensate({"type": "Hotel", "payload": {}})]

    story = booked(travel(cancel=cancel))

    assert targets(story.takes("Cancel")) == ["undo-hotel"]
    assert targets(story.takes("Cancel", {"all": True})) == ["undo-flight"]


def test_a_message_that_compensates_itself_is_no_step_afterwards() -> None:
    story = Story(saga_with(returning(saga_compensate({"type": "Go"})), compensation=nothing))
    story.takes("Go")

    assert story.instance is not None
    assert story.instance.steps == ()


def test_a_step_whose_compensation_has_vanished_is_a_dead_letter_and_the_steps_after_it_are_undone() -> None:
    story = booked(travel(cancel=nothing))
    reduced = (
        define_saga("s")
        .state({})
        .on("Cancel", returning(saga_compensate(ALL_STEPS)))
        .compensate("Hotel", undoing("hotel"))
        .build()
    )
    story.definition = reduced

    decision = story.takes("Cancel")

    assert "saga_compensate('Flight') needs .compensate('Flight', ...)" in refusal(decision)
    assert targets(decision) == ["undo-hotel"]
    assert story.instance is not None
    assert [step.type for step in story.instance.steps] == ["Flight"]


def test_steps_count_against_the_limit_of_the_state() -> None:
    definition = travel(cancel=nothing)
    instance = begun(saga_with(nothing))

    decision = decided(
        definition, envelope("Flight", {"note": "x" * 100}), instance, limits=Limits(state_bytes_max=100)
    )

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_LIMIT_EXCEEDED"
    assert "the state and the 1 applied steps that may have to be compensated have" in refusal(decision)


def test_an_invariant_is_checked_after_each_step_and_not_only_at_the_end() -> None:
    def dips(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["n"] = -1
        return [saga_compensate({"type": "Go"})]

    def recovers(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["n"] = 1
        return []

    definition = (
        define_saga("s")
        .state({"n": 0})
        .on("Go", dips)
        .compensate("Go", recovers)
        .invariant("n", lambda state: state["n"] >= 0)
        .build()
    )

    assert "invariant 'n' does not hold after 'Go' was handled" in refusal(decided(definition, envelope("Go")))
