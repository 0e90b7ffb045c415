"""What holds of `decide` for every saga and every sequence of messages. The numbers are those of the invariants."""

from datetime import timedelta
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from sagaloom import (
    ALL_STEPS,
    CascadedMessage,
    SagaMessage,
    cancel_scheduled,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    schedule,
    send,
    spawn,
)
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.controls import CANCEL, PAUSE, RESUME, control
from sagaloom.engine.decide import DecideContext, decide
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import Decision, Envelope, Instance
from tests.core.deciding import NOW, Context, Event, Slot, envelope, head

LIMITS = Limits(bystander_rows_max=3, compensation_depth_max=4, effects_max=40, timers_per_instance_max=3)


def _interpret(saga: Slot, event: Event, context: Context) -> Any:
    """The handler of the generated saga: its message says what it does."""
    effects: list[CascadedMessage] = []
    for operation in event.payload:
        match operation:
            case "count":
                saga.state["n"] += 1
            case "send":
                effects.append(send("service:x", {"n": saga.state["n"]}))
            case "tell":
                effects.append(send("Go", {"n": saga.state["n"]}))
            case "spawn":
                effects.append(spawn("child", {}))
            case "wait":
                effects.append(schedule(SagaMessage("Go", ["count"]), "1m"))
            case "named":
                effects.append(schedule(SagaMessage("Go", ["count"]), "1m", "n"))
            case "cancel":
                effects.append(cancel_scheduled("n"))
            case "complete":
                effects.append(saga_complete({"n": saga.state["n"]}))
            case "fail":
                effects.append(saga_fail("no"))
            case "undo":
                # One level less, so that most compensations end, and some fail, complete or nest.
                effects.append(saga_compensate(SagaMessage("Go", event.payload[1:])))
            case "undo all":
                effects.append(saga_compensate(ALL_STEPS))
            case "break":
                saga.state["n"] = -1
            case "raise":
                raise ValueError("asked for")
            case _:
                return None
    return effects


OPERATIONS = ("count", "send", "tell", "spawn", "wait", "named", "cancel")
TURNS = ("complete", "fail", "undo", "undo all", "break", "raise", "nonsense")

payloads = st.lists(
    st.one_of(st.sampled_from(OPERATIONS), st.sampled_from(OPERATIONS), st.sampled_from(TURNS)), max_size=5
)


@st.composite
def sagas(draw: st.DrawFn) -> SagaDefinition[Any]:
    stage = define_saga("s").durability(draw(st.sampled_from(("t1", "t2")))).state({"n": 0})
    with_handlers = stage.on("Begin", _interpret).on(
        "Go", _interpret, starts=draw(st.booleans()), on_missing=draw(st.sampled_from(("dead_letter", "discard")))
    )
    if draw(st.booleans()):
        with_handlers = with_handlers.compensate("Go", _interpret)
    if draw(st.booleans()):
        with_handlers = with_handlers.invariant("n", lambda state: state["n"] >= 0)
    return with_handlers.reuse(draw(st.sampled_from(("reject", "new_run")))).build()


anything = st.lists(
    st.tuples(
        st.sampled_from(("Begin", "Go", "Go", "Go", "Begin", "Go", "Go", "Never")),  # `Never` has no handler.
        payloads,
        st.sampled_from(("plain", "plain", "plain", "plain", "opens", "bound", "operator")),
        st.integers(0, 4),
    ),
    max_size=12,
)
messages = st.one_of(anything, anything.map(lambda said: [("Begin", ["named"], "plain", 0), *said]))


class World:
    """All runs of one key, and every Decision on the way, each checked where it is made."""

    def __init__(self, definition: SagaDefinition[Any]) -> None:
        self.definition = definition
        self.runs: list[Instance] = []
        self.history: dict[int, list[Any]] = {}
        self.decisions: list[Decision] = []

    def takes(self, message: Envelope) -> None:
        newest = self.runs[-1] if self.runs else None
        now = NOW + timedelta(seconds=len(self.decisions))
        context = DecideContext(now, head(run=len(self.runs)), LIMITS)

        decision = decide(self.definition, newest, message, context)

        assert decision == decide(self.definition, newest, message, context), "the same input twice"
        self._check(newest, message, decision)
        self.decisions.append(decision)
        instance = decision.instance
        if instance is not None and decision.opens_run:
            self.runs.append(instance)
        elif instance is not None:
            self.runs[-1] = instance
        if decision.entry is not None:
            self.history.setdefault(len(self.runs), []).append(decision.entry)

    def _check(self, newest: Instance | None, message: Envelope, decision: Decision) -> None:
        before = None if decision.opens_run else newest
        after = decision.instance
        if decision.disposition == "applied":
            assert after is not None
            assert after.revision == (before.revision if before is not None else 0) + 1, "I2"
            assert after.entries == (before.entries if before is not None else 0) + 1
            assert before is None or not is_terminal(before.status), "I1"
            assert before is None or not before.is_paused or message.origin == "operator", "a paused run"
            assert after.timers == () or not is_terminal(after.status)
            self._check_timers(before, message, decision)
            return
        assert (decision.effects, decision.outgoing, decision.timers, decision.timers_ended) == ((), (), (), ())
        if decision.disposition == "pending":
            assert (after, decision.entry, decision.dead_letter) == (None, None, None)
            assert decision.retry_at is not None
        if decision.disposition == "deferred":
            assert newest is not None
            assert newest.is_paused
            assert decision == Decision("deferred", decision.reason)
        if after is not None and before is not None:
            assert (after.revision, after.status, after.state) == (before.revision, before.status, before.state), "I1"
            assert after.bystanders == before.bystanders + 1
            assert after.entries == before.entries + (decision.entry is not None)

    def _check_timers(self, before: Instance | None, message: Envelope, decision: Decision) -> None:
        """What waited, and was neither fired nor ended, waits; so does what was added; nothing else does."""
        assert decision.instance is not None
        waited = {timer.id for timer in before.timers} if before is not None else set()
        fired = {message.id} if message.origin == "timer" else set()
        ended = {timer.id for timer in decision.timers_ended}
        added = {timer.id for timer in decision.timers}
        assert ended <= waited - fired
        assert {timer.id for timer in decision.instance.timers} == (waited - fired - ended) | added


def lived(definition: SagaDefinition[Any], said: list[Any]) -> World:
    world = World(definition)
    for number, (message_type, payload, door, attempt) in enumerate(said):
        fields: dict[str, Any] = {"id": f"m{number}", "attempt": attempt}
        if door == "opens":
            fields["opens_run"] = True
        elif door == "bound":
            fields |= {"run": max(len(world.runs), 1), "origin": "timer" if attempt % 2 else "reply"}
            waiting = world.runs[-1].timers if world.runs else ()
            if waiting and fields["origin"] == "timer":
                fields["id"] = waiting[0].id
        elif door == "operator":
            kind = (PAUSE, RESUME, CANCEL)[min(attempt, 2)]
            world.takes(control(kind, "s", "k", message_id=f"m{number}", accepted_at=NOW))
            continue
        world.takes(envelope(message_type, payload, **fields))
    return world


@given(sagas(), messages)
@settings(max_examples=150)
def test_every_decision_is_deterministic_and_keeps_the_invariants(definition: Any, said: Any) -> None:
    lived(definition, said)


@given(sagas(), messages)
@settings(max_examples=70)
def test_folding_the_history_of_a_run_gives_its_status_revision_and_entries(definition: Any, said: Any) -> None:
    world = lived(definition, said)

    for run, instance in enumerate(world.runs, start=1):
        status, revision = "pending", 0
        rows = world.history[run]
        for number, row in enumerate(rows, start=1):
            assert row.entry_no == number
            assert row.status_before == status
            revision += row.disposition == "applied"
            status = row.status_after
            assert row.revision == revision
            assert not row.steps or row.steps[-1].status == status
        assert (status, revision, len(rows)) == (instance.status, instance.revision, instance.entries)
        assert instance.revision == instance.message_count
        assert sum(row.disposition != "applied" for row in rows) == min(instance.bystanders, LIMITS.bystander_rows_max)


@given(sagas(), messages)
@settings(max_examples=70)
def test_no_two_effects_of_all_runs_have_the_same_key_and_positions_grow(definition: Any, said: Any) -> None:
    world = lived(definition, said)

    keys = [
        key
        for decision in world.decisions
        for key in (
            *(effect.effect_key for effect in decision.effects),
            *(outgoing.effect_key for outgoing in decision.outgoing),
            *(timer.id.removeprefix("tm") for timer in decision.timers),
        )
    ]
    assert len(keys) == len(set(keys))
    for decision in world.decisions:
        positions = [effect.position for effect in decision.effects]
        assert positions == sorted(set(positions))


@given(sagas(), messages)
@settings(max_examples=70)
def test_the_feed_shows_each_step_and_ends_with_the_end(definition: Any, said: Any) -> None:
    for decision in lived(definition, said).decisions:
        if decision.disposition != "applied":
            continue
        assert decision.entry is not None
        assert decision.instance is not None
        kinds = [event.type for event in decision.events]
        is_pause = decision.entry.type in (PAUSE, RESUME)
        assert kinds.count("saga:state_changed") == len(decision.entry.steps) + is_pause
        assert ("saga:started" in kinds) == decision.opens_run
        ends = ("saga:completed", "saga:failed", "saga:cancelled")
        assert (kinds[-1] in ends) == is_terminal(decision.instance.status)
        assert decision.events[-1].status == decision.instance.status
