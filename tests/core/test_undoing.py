"""A compensation that fails: what stays, what is left, who carries it on; and what an operator may do about it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest

from sagaloom import ALL_STEPS, RetryPolicy, SagaMessage, define_saga, saga_compensate, saga_complete, saga_fail, send
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.controls import CANCEL, PAUSE, SKIP, TERMINATE, ControlType, control
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import Decision, Envelope, Instance
from sagaloom.errors import DefinitionError, SagasError
from sagaloom.testing import scenario
from tests.core.deciding import NOW, Context, Effects, Event, Slot, Story, decided, kinds, nothing, refusal, returning

FOUR = RetryPolicy(maximum_attempts=4, initial_interval_ms=1_000, jitter=0.0)


class Undo:
    """A compensation that fails as long as `error` is set."""

    def __init__(self, name: str, *more: Any) -> None:
        self.name, self.more = name, more
        self.error: BaseException | None = None
        self.attempts: list[int] = []

    def __call__(self, saga: Slot, event: Event, context: Context) -> Effects:
        self.attempts.append(context.attempt)
        saga.state = {**saga.state, self.name: "undone"}
        if self.error is not None:
            raise self.error
        return [send(f"service:undo-{self.name}", {"n": event.payload.get("n")}), *self.more]


def trip(flight: Any, hotel: Any, **handlers: Any) -> SagaDefinition[Any]:
    stage = (
        define_saga("s")
        .state({})
        .retry(FOUR)
        .on("Flight", nothing)
        .on("Hotel", nothing, starts=False)
        .on("CallOff", returning(send("service:x", {}), saga_compensate(ALL_STEPS, "rain")), starts=False)
        .compensate("Flight", flight)
        .compensate("Hotel", hotel)
    )
    for name, handler in handlers.items():
        stage = stage.on(name, handler, starts=False)
    return stage.build()


def booked(definition: SagaDefinition[Any]) -> Story:
    story = Story(definition)
    story.takes("Flight", {"n": 1})
    story.takes("Hotel", {"n": 2})
    return story


def targets(decision: Decision) -> list[str]:
    return [effect.target_id for effect in decision.effects]


def instance_of(decision: Decision) -> Instance:
    assert decision.instance is not None, decision
    return decision.instance


def carrier(decision: Decision) -> Envelope:
    (message,) = decision.follow_ups
    return message


def goes_on(story: Story, message: Envelope, **more: Any) -> Decision:
    decision = decided(story.definition, message, story.instance, **more)
    if decision.instance is not None:
        story.instance = decision.instance
    return decision


def steered(story: Story, kind: ControlType, **more: Any) -> Decision:
    return goes_on(story, control(kind, "s", "k", message_id=f"c-{kind}", accepted_at=NOW, **more))


# --- what stays, and who carries it on -------------------------------------------------------------------------------


def test_a_step_that_fails_leaves_those_behind_it_undone_for_good_and_the_run_compensating() -> None:
    flight, hotel = Undo("flight"), Undo("hotel")
    flight.error = ConnectionError("down")
    story = booked(trip(flight, hotel))

    decision = story.takes("CallOff")

    instance = instance_of(decision)
    assert (decision.disposition, instance.status, instance.revision) == ("applied", "compensating", 3)
    assert targets(decision) == ["x", "undo-hotel"]
    assert instance.state == b'{"hotel":"undone"}'
    assert [step.type for step in instance.steps] == ["Flight"]
    assert instance.undoing is not None
    assert (instance.undoing.ending, instance.undoing.reason) == ("failed", "rain")
    assert instance.undoing.error == "ConnectionError: down"
    assert decision.entry is not None
    assert [(step.phase, step.type, step.status) for step in decision.entry.steps] == [
        ("handle", "CallOff", "compensating"),
        ("compensate", "Hotel", "compensating"),
    ]


def test_one_message_carries_it_on_after_a_wait_and_ends_the_run() -> None:
    flight, hotel = Undo("flight"), Undo("hotel")
    flight.error = ConnectionError("down")
    story = booked(trip(flight, hotel))
    message = carrier(story.takes("CallOff"))

    flight.error = None
    decision = goes_on(story, message)

    assert (message.type, message.origin, message.run) == ("saga:undo", "undo", 1)
    assert (message.attempt, message.due_at) == (1, NOW + timedelta(seconds=1))
    assert flight.attempts == [1, 2]
    instance = instance_of(decision)
    assert (instance.status, instance.reason, instance.undoing, instance.steps) == ("failed", "rain", None, ())
    assert targets(decision) == ["undo-flight"]
    assert kinds(decision)[-1] == "saga:failed"


def test_an_attempt_that_fails_again_writes_nothing_until_it_is_the_last() -> None:
    flight = Undo("flight")
    flight.error = ConnectionError("down")
    story = booked(trip(flight, nothing))
    message = carrier(story.takes("CallOff"))

    again = goes_on(story, message)
    last = goes_on(story, msgspec.structs.replace(message, attempt=3))

    assert (again.disposition, again.instance, again.retry_at) == ("pending", None, NOW + timedelta(seconds=2))
    assert last.disposition == "dead_lettered"
    assert last.dead_letter is not None
    assert refusal(last) == "saga 's': undoing 'Flight' failed (attempt 4 of 4): ConnectionError: down"
    instance = instance_of(last)
    assert (instance.status, instance.revision) == ("compensating", 3)
    assert instance.undoing is not None
    assert instance.undoing.dead_letter_id == last.dead_letter.id


def test_an_error_that_no_attempt_can_help_is_a_dead_letter_at_once() -> None:
    flight = Undo("flight")
    flight.error = SagasError("the airline is bankrupt", retryable=False)
    story = booked(trip(flight, nothing))

    decision = story.takes("CallOff")

    instance = instance_of(decision)
    assert (decision.disposition, instance.status, decision.follow_ups) == ("applied", "compensating", ())
    assert "the airline is bankrupt" in refusal(decision)
    assert decision.dead_letter is not None
    assert decision.dead_letter.envelope is not None
    assert instance.undoing is not None
    assert instance.undoing.token == decision.dead_letter.envelope.id
    assert kinds(decision)[-1] == "saga:dead_lettered"


def test_a_dead_letter_that_is_redriven_goes_on_with_what_is_left() -> None:
    flight = Undo("flight")
    flight.error = SagasError("no", retryable=False)
    story = booked(trip(flight, nothing))
    letter = story.takes("CallOff").dead_letter
    assert letter is not None
    assert letter.envelope is not None

    flight.error = None
    decision = goes_on(story, letter.envelope)

    assert instance_of(decision).status == "failed"


def test_what_each_attempt_undoes_is_committed_before_the_next_step_is_tried_again() -> None:
    flight, hotel = Undo("flight"), Undo("hotel")
    flight.error = hotel.error = ConnectionError("down")
    story = booked(trip(flight, hotel))
    first = carrier(story.takes("CallOff"))

    hotel.error = None
    second = goes_on(story, first)
    stale = goes_on(story, first)
    flight.error = None
    end = goes_on(story, carrier(second))

    assert (second.disposition, targets(second)) == ("applied", ["undo-hotel"])
    assert carrier(second).id != first.id
    assert (stale.disposition, stale.instance, stale.entry) == ("ignored", None, None)
    assert (targets(end), instance_of(end).status) == (["undo-flight"], "failed")


def test_a_step_that_is_too_much_for_one_decision_is_left_for_the_next_one() -> None:
    flight, hotel = Undo("flight"), Undo("hotel")
    story = booked(trip(flight, hotel))
    definition = story.definition

    limits = Limits(effects_max=3)
    message = Envelope("s", "k", "CallOff", "m", b"{}", NOW)
    decision = decided(definition, message, story.instance, limits=limits)
    story.instance = decision.instance
    end = goes_on(story, carrier(decision), limits=limits)

    assert targets(decision) == ["x", "undo-hotel"]
    assert (carrier(decision).attempt, carrier(decision).due_at) == (0, None)
    assert (targets(end), instance_of(end).status) == (["undo-flight"], "failed")


def test_an_invariant_that_a_compensation_breaks_leaves_that_step_as_it_was() -> None:
    def breaks(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["n"] = -1
        return [send("service:undo", {})]

    definition = (
        define_saga("s")
        .state({"n": 0})
        .on("Go", nothing)
        .on("CallOff", returning(saga_compensate(ALL_STEPS)), starts=False)
        .compensate("Go", breaks)
        .invariant("n", lambda state: state["n"] >= 0)
        .build()
    )
    story = Story(definition)
    story.takes("Go")

    decision = story.takes("CallOff")

    assert "invariant 'n' does not hold after 'Go' was handled" in refusal(decision)
    assert (instance_of(decision).state, decision.effects) == (b'{"n":0}', ())


# --- messages that come meanwhile ------------------------------------------------------------------------------------


def standing(**handlers: Any) -> tuple[Story, Undo]:
    flight = Undo("flight")
    flight.error = ConnectionError("down")
    story = booked(trip(flight, nothing, **handlers))
    story.takes("CallOff")
    return story, flight


def test_a_step_that_comes_while_the_run_unwinds_is_undone_with_the_rest() -> None:
    story, flight = standing()
    message = carrier(story.decisions[-1])
    story.takes("Hotel", {"n": 3})

    flight.error = None
    decision = goes_on(story, message)

    assert decision.entry is not None
    assert [step.type for step in decision.entry.steps] == ["Hotel", "Flight"]


def test_a_handler_cannot_complete_a_run_that_is_being_unwound() -> None:
    story, _ = standing(Done=returning(saga_complete()))

    decision = story.takes("Done")

    assert decision.disposition == "dead_lettered"
    assert "the run is being unwound and ends failed" in refusal(decision)


@pytest.mark.parametrize("effect", [saga_fail("late"), saga_compensate(ALL_STEPS, "late")])
def test_a_handler_that_gives_up_again_makes_it_try_at_once(effect: Any) -> None:
    story, flight = standing(Again=returning(effect))

    still = story.takes("Again")
    flight.error = None
    ended = story.takes("Again")

    assert (instance_of(still).status, still.follow_ups) == ("compensating", ())
    assert (instance_of(ended).status, instance_of(ended).reason) == ("failed", "rain")


# --- asked for by name -----------------------------------------------------------------------------------------------


def by_name(undo: Any, *more: Any, policy: RetryPolicy = FOUR) -> SagaDefinition[Any]:
    handler = returning(send("service:go", {}), saga_compensate({"type": "Go", "payload": {}}, "why"), *more)
    return define_saga("s").state({}).retry(policy).on("Go", handler).compensate("Go", undo).build()


def test_a_compensation_asked_for_by_name_is_retried_with_its_message() -> None:
    undo = Undo("go")
    undo.error = ConnectionError("down")

    decision = Story(by_name(undo)).takes("Go")

    assert (decision.disposition, decision.effects, decision.instance) == ("pending", (), None)


@pytest.mark.parametrize(
    ("ending", "status"), [((), "compensating"), ((saga_fail("no"),), "failed"), ((saga_complete(1),), "completed")]
)
def test_its_last_attempt_leaves_the_run_compensating_and_the_compensation_to_be_done(ending: Any, status: str) -> None:
    undo = Undo("go")
    undo.error = ConnectionError("down")
    story = Story(by_name(undo, *ending))

    decision = story.takes("Go", attempt=3)
    letter = decision.dead_letter
    undo.error = None
    assert letter is not None
    assert letter.envelope is not None
    after = goes_on(story, letter.envelope)

    assert (decision.disposition, targets(decision)) == ("applied", ["go"])
    assert instance_of(decision).status == "compensating"
    assert "undoing 'Go' failed" in letter.reason
    assert (targets(after), instance_of(after).status, instance_of(after).undoing) == (["undo-go"], status, None)


# --- operators -------------------------------------------------------------------------------------------------------


def test_cancel_undoes_the_steps_newest_first_and_ends_cancelled() -> None:
    story = booked(trip(Undo("flight", saga_fail("refunded")), Undo("hotel")))

    decision = steered(story, CANCEL, reason="ordered twice")

    instance = instance_of(decision)
    assert (instance.status, instance.reason, instance.revision) == ("cancelled", "ordered twice", 3)
    assert targets(decision) == ["undo-hotel", "undo-flight"]
    assert (instance.steps, instance.ended_at) == ((), NOW)
    assert kinds(decision) == [
        "saga:message_received",
        "saga:compensating",
        "saga:state_changed",
        "saga:state_changed",
        "saga:cancelled",
    ]


def test_a_cancel_whose_compensation_fails_leaves_the_run_compensating_until_it_succeeds() -> None:
    flight = Undo("flight")
    flight.error = ConnectionError("down")
    story = booked(trip(flight, Undo("hotel")))

    decision = steered(story, CANCEL)
    flight.error = None
    ended = goes_on(story, carrier(decision))

    assert (decision.disposition, instance_of(decision).status) == ("applied", "compensating")
    assert (instance_of(ended).status, instance_of(ended).reason) == ("cancelled", "cancelled by an operator")


def test_a_cancel_of_a_run_that_is_being_unwound_is_ignored_and_says_what_to_do() -> None:
    story, _ = standing()

    decision = steered(story, CANCEL)

    assert decision.disposition == "ignored"
    assert decision.reason == (
        "run 1 is being unwound already: its dead letter can be redriven, the step skipped, or the run terminated"
    )


def test_terminate_ends_a_run_that_is_being_unwound_and_gives_up_the_rest() -> None:
    story, _ = standing()
    message = carrier(story.decisions[-1])

    decision = steered(story, TERMINATE, reason="settled by hand")
    late = goes_on(story, message)

    instance = instance_of(decision)
    assert (instance.status, instance.reason, instance.undoing) == ("cancelled", "settled by hand", None)
    assert (late.disposition, late.entry) == ("ignored", None)


def test_skip_leaves_the_failing_step_out_and_goes_on_behind_it() -> None:
    flight, hotel = Undo("flight"), Undo("hotel")
    hotel.error = ConnectionError("down")
    story = booked(trip(flight, hotel))
    story.takes("CallOff")

    decision = steered(story, SKIP, reason="refunded by hand")

    assert (instance_of(decision).status, targets(decision)) == ("failed", ["undo-flight"])
    assert decision.entry is not None
    assert [(step.phase, step.type, step.status) for step in decision.entry.steps] == [
        ("skip", "Hotel", "compensating"),
        ("compensate", "Flight", "failed"),
    ]
    assert decision.entry.steps[0].effects[0].detail == "refunded by hand"


def test_skip_hands_the_next_failing_step_to_a_message_of_its_own() -> None:
    flight, hotel = Undo("flight"), Undo("hotel")
    flight.error = hotel.error = ConnectionError("down")
    story = booked(trip(flight, hotel))
    first = carrier(story.takes("CallOff"))

    decision = steered(story, SKIP)

    assert carrier(decision).id != first.id
    assert goes_on(story, first).disposition == "ignored"
    assert [step.type for step in instance_of(decision).steps] == ["Flight"]


@pytest.mark.parametrize(
    ("step", "why"),
    [(None, "has no compensation that fails"), ("Flight", "has no compensation that fails")],
)
def test_a_skip_in_vain_says_why(step: str | None, why: str) -> None:
    story = booked(trip(nothing, nothing))

    decision = steered(story, SKIP, step=step)

    assert decision.disposition == "ignored"
    assert why in (decision.reason or "")


def test_a_skip_of_another_step_than_the_next_is_ignored() -> None:
    story, _ = standing()

    decision = steered(story, SKIP, step="Hotel")

    assert decision.reason == "the next compensation of run 1 is that of 'Flight', not that of 'Hotel'"


def test_a_paused_run_does_not_go_on_undoing_by_itself_and_a_cancel_lifts_the_pause() -> None:
    story, _ = standing()
    message = carrier(story.decisions[-1])
    steered(story, PAUSE)

    assert goes_on(story, message).disposition == "deferred"

    other = booked(trip(Undo("flight"), nothing))
    steered(other, PAUSE)
    assert not instance_of(steered(other, CANCEL)).is_paused


# --- pivots ----------------------------------------------------------------------------------------------------------


def with_pivot() -> SagaDefinition[Any]:
    return (
        define_saga("s")
        .state({})
        .on("Flight", nothing)
        .on("Paid", nothing, starts=False, pivot=True)
        .on("Insured", nothing, starts=False)
        .on("CallOff", returning(saga_compensate(ALL_STEPS)), starts=False)
        .compensate("Flight", Undo("flight"))
        .compensate("Insured", Undo("insurance"))
        .build()
    )


def test_unwinding_stops_at_a_pivot() -> None:
    story = Story(with_pivot())
    for message in ("Flight", "Paid", "Insured"):
        story.takes(message)

    decision = story.takes("CallOff")

    instance = instance_of(decision)
    assert targets(decision) == ["undo-insurance"]
    assert (instance.status, instance.pivot) == ("failed", "Paid")
    assert instance.reason == "every applied step since 'Paid' was compensated"


def test_a_pivot_that_comes_while_the_run_is_compensating_saves_no_step() -> None:
    story = Story(with_pivot())
    story.takes("Flight")
    assert story.instance is not None
    story.instance = msgspec.structs.replace(story.instance, status="compensating")

    story.takes("Paid")

    assert [step.type for step in story.instance.steps] == ["Flight"]
    assert story.instance.pivot is None


def test_a_pivot_with_a_compensation_is_refused_when_the_saga_is_built() -> None:
    stage = define_saga("s").state({}).on("Paid", nothing, pivot=True).compensate("Paid", nothing)

    with pytest.raises(DefinitionError, match="'Paid' is a pivot and has a compensation"):
        stage.build()


def test_a_pivot_is_part_of_the_fingerprint_and_of_the_description() -> None:
    from sagaloom.describe import describe

    plain = define_saga("s").state({}).on("Paid", nothing).build()
    pivot = define_saga("s").state({}).on("Paid", nothing, pivot=True).build()

    assert plain.fingerprint != pivot.fingerprint
    assert (describe(plain)["pivots"], describe(pivot)["pivots"]) == ([], ["Paid"])


# --- the testing kit -------------------------------------------------------------------------------------------------


def test_a_scenario_retries_skips_and_terminates() -> None:
    flight = Undo("flight")
    flight.error = ConnectionError("down")
    story = scenario(trip(flight, nothing)).given(
        SagaMessage("Flight", {}, correlation_key="k"), SagaMessage("Hotel", {}, correlation_key="k")
    )

    story.when(SagaMessage("CallOff", {}, correlation_key="k")).then(status="compensating")
    flight.error = None
    story.advance("1s").then(status="failed", reason="rain")


def test_a_scenario_cancels_with_and_without_undoing() -> None:
    def told() -> Any:
        return scenario(trip(Undo("flight"), nothing)).given(SagaMessage("Flight", {"n": 1}, correlation_key="k"))

    told().cancel().then(status="cancelled", effects=[send("service:undo-flight", {"n": 1})])
    told().cancel(compensate=False).then(status="cancelled", effects=[])
    told().terminate("enough").then(status="cancelled", reason="enough", effects=[])
