"""Which run takes a message, what makes it a dead letter, and what is written down."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from sagaloom import RetryPolicy, SagasError, define_saga, saga_complete, saga_fail, schedule, send
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import Instance, ParentLink
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
    kinds,
    nothing,
    raising,
    refusal,
    returning,
    saga_with,
    sent,
    state_of,
)


def count(saga: Slot, event: Event, context: Context) -> Effects:
    saga.state["n"] = saga.state.get("n", 0) + 1
    return []


def ended(definition: SagaDefinition[Any] | None = None) -> tuple[SagaDefinition[Any], Instance]:
    definition = definition or saga_with(returning(saga_complete({"total": 3})))
    instance = gone(definition).instance
    assert instance is not None
    return definition, instance


# --- Which run -------------------------------------------------------------------------------------------------------


def test_the_first_message_opens_run_one_at_revision_one() -> None:
    decision = decided(saga_with(nothing), envelope("Begin", traceparent="00-a"))

    instance = decision.instance
    assert instance is not None
    assert decision.opens_run
    assert (instance.run, instance.revision, instance.status, instance.pk) == (1, 1, "running", 7)
    assert (instance.traceparent, instance.created_at, instance.def_version) == ("00-a", NOW, 1)


def test_an_applied_message_grows_the_revision_by_one_and_writes_one_row() -> None:
    definition = saga_with(count)
    instance = begun(definition)

    decision = decided(definition, envelope("Go"), instance, now=NOW + timedelta(seconds=5))

    assert decision.instance is not None
    assert decision.entry is not None
    assert not decision.opens_run
    assert (decision.instance.revision, decision.instance.entries, decision.instance.message_count) == (2, 2, 2)
    assert (decision.entry.entry_no, decision.entry.revision, decision.entry.status_before) == (2, 2, "running")
    assert decision.instance.updated_at == NOW + timedelta(seconds=5)
    assert decision.instance.created_at == NOW


def test_a_message_without_any_key_opens_a_run_of_its_own_beside_a_live_one() -> None:
    definition = saga_with(nothing)
    live = begun(definition)

    decision = decided(definition, envelope("Begin", opens_run=True, id="m2"), live)

    assert decision.opens_run
    assert decision.instance is not None
    assert (decision.instance.run, decision.instance.revision) == (2, 1)


def test_a_terminal_run_ignores_a_message_and_records_it() -> None:
    definition, over = ended()

    decision = decided(definition, envelope("Go", id="late"), over)

    assert decision.disposition == "ignored"
    assert decision.reason == "run 1 is completed and takes no more messages"
    assert decision.entry is not None
    assert (decision.entry.disposition, decision.entry.revision, decision.entry.message_id) == ("ignored", 2, "late")
    assert decision.instance == msgspec.structs.replace(over, entries=3, bystanders=1)


def test_past_the_limit_of_rows_only_the_counter_of_bystanders_grows() -> None:
    definition, over = ended()
    full = msgspec.structs.replace(over, bystanders=2)

    decision = decided(definition, envelope("Go"), full, limits=Limits(bystander_rows_max=2))

    assert decision.entry is None
    assert decision.events == ()
    assert decision.instance == msgspec.structs.replace(full, bystanders=3)


def test_a_terminal_run_ignores_even_a_type_that_nobody_handles() -> None:
    definition, over = ended()

    assert decided(definition, envelope("Unheard"), over).disposition == "ignored"


def test_reuse_new_run_opens_the_next_run_for_a_starting_message() -> None:
    definition = define_saga("s").state({}).on("Go", returning(saga_complete())).reuse("new_run").build()
    over = decided(definition, envelope("Go")).instance

    decision = decided(definition, envelope("Go", id="again"), over)

    assert decision.opens_run
    assert decision.instance is not None
    assert (decision.instance.run, decision.instance.revision, decision.instance.entries) == (2, 1, 1)


def test_reuse_new_run_still_ignores_a_message_that_does_not_start() -> None:
    definition = (
        define_saga("s")
        .state({})
        .on("Begin", nothing)
        .on("Go", returning(saga_complete()), starts=False)
        .reuse("new_run")
        .build()
    )
    over = decided(definition, envelope("Go"), begun(definition)).instance

    assert decided(definition, envelope("Go"), over).disposition == "ignored"


@pytest.mark.parametrize("origin", ["reply", "child"])
def test_a_message_bound_to_a_run_that_is_over_is_ignored_on_the_record(origin: Any) -> None:
    definition = define_saga("s").state({}).on("Go", returning(saga_complete())).reuse("new_run").build()
    over = decided(definition, envelope("Go")).instance

    decision = decided(definition, envelope("Go", run=1, origin=origin), over)

    assert decision.disposition == "ignored"
    assert decision.entry is not None


def test_a_timer_of_a_finished_run_ends_without_a_trace() -> None:
    definition, over = ended()

    decision = decided(definition, envelope("Go", run=1, origin="timer"), over)

    assert decision.disposition == "ignored"
    assert (decision.entry, decision.instance, decision.events) == (None, None, ())


def test_a_bound_message_never_opens_a_run() -> None:
    decision = decided(saga_with(nothing), envelope("Begin", run=3, origin="reply"))

    assert decision.disposition == "ignored"
    assert decision.reason == "run 3 of s:k is gone"


# --- May it be applied -----------------------------------------------------------------------------------------------


def _not_starting(on_missing: Any) -> SagaDefinition[Any]:
    return (
        define_saga("s").state({}).on("Begin", nothing).on("Go", nothing, starts=False, on_missing=on_missing).build()
    )


def test_a_message_that_may_not_start_and_finds_no_instance_is_a_dead_letter() -> None:
    decision = decided(_not_starting("dead_letter"), envelope("Go"))

    assert decision.disposition == "dead_lettered"
    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_INSTANCE_NOT_FOUND"
    assert refusal(decision) == "saga 's' has no live instance 'k', and 'Go' does not start one (starting: Begin)"
    assert (decision.entry, decision.instance) == (None, None)


def test_on_missing_discard_ignores_it_without_any_row() -> None:
    decision = decided(_not_starting("discard"), envelope("Go"))

    assert decision.disposition == "ignored"
    assert (decision.entry, decision.instance, decision.dead_letter) == (None, None, None)


def test_a_type_whose_handler_has_vanished_is_a_dead_letter() -> None:
    definition = saga_with(nothing)
    instance = begun(definition)

    decision = decided(definition, envelope("Vanished"), instance)

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_HANDLER_MISSING"
    assert "saga 's' has no handler for 'Vanished' any more: it handles Begin, Go" in refusal(decision)


def test_the_end_of_a_child_that_the_parent_does_not_ask_about_is_ignored() -> None:
    definition = saga_with(nothing)

    decision = decided(definition, envelope("child:completed", run=1, origin="child"), begun(definition))

    assert decision.disposition == "ignored"


def test_a_cascade_that_runs_too_long_is_a_dead_letter() -> None:
    definition = saga_with(nothing)

    decision = decided(definition, envelope("Begin", hops=4), limits=Limits(hops_max=3))

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_HOPS_EXCEEDED"
    assert decided(definition, envelope("Begin", hops=3), limits=Limits(hops_max=3)).disposition == "applied"


@dataclass
class Placed:
    order_id: str
    amount: int


def test_a_payload_of_the_wrong_type_is_a_dead_letter_that_names_saga_type_and_path() -> None:
    definition = define_saga("s").state({}).on(Placed, nothing).build()

    decision = decided(definition, envelope("Placed", {"order_id": "o", "amount": "many"}))

    for part in ("saga 's'", "'Placed'", "$.amount"):
        assert part in refusal(decision)
    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "VALIDATION_ERROR"


# --- State -----------------------------------------------------------------------------------------------------------


@dataclass
class Typed:
    n: int


def _typed(handler: Any, version: int = 1, migrate: Any = None) -> SagaDefinition[Any]:
    return define_saga("s").state(Typed(0)).on("Go", handler).version(version, migrate=migrate).build()


def _stored(state: bytes, version: int = 1) -> Instance:
    instance = decided(_typed(nothing), envelope("Go")).instance
    assert instance is not None
    return msgspec.structs.replace(instance, state=state, def_version=version)


def test_a_state_that_no_longer_decodes_is_a_dead_letter_that_names_the_path() -> None:
    decision = decided(_typed(nothing), envelope("Go"), _stored(b'{"n":"three"}'))

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_STATE_UNREADABLE"
    for part in ("saga 's'", "'Go'", "'s:k'", "$.n"):
        assert part in refusal(decision)


def test_an_older_state_is_migrated_step_by_step_before_the_handler_sees_it() -> None:
    def seen(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state.n += 1
        return []

    definition = _typed(seen, 3, {1: lambda old: {"m": old["count"]}, 2: lambda old: {"n": old["m"] * 10}})

    decision = decided(definition, envelope("Go"), _stored(b'{"count":4}'))

    assert state_of(decision) == {"n": 41}
    assert decision.instance is not None
    assert decision.instance.def_version == 3


def test_a_migration_that_raises_is_a_dead_letter_with_its_traceback() -> None:
    definition = _typed(nothing, 2, {1: lambda old: {"n": old["missing"]}})

    decision = decided(definition, envelope("Go"), _stored(b'{"n":4}'))

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_MIGRATION_FAILED"
    assert "from version 1 to 2 raised KeyError: 'missing'" in refusal(decision)
    assert 'old["missing"]' in (decision.dead_letter.traceback or "")


def test_a_missing_migration_is_a_dead_letter_that_says_which() -> None:
    decision = decided(_typed(nothing, 2), envelope("Go"), _stored(b'{"n":4}'))

    assert "no migration leads from version 1 to 2" in refusal(decision)


def test_a_state_written_by_a_newer_definition_waits_for_its_worker_and_spends_no_attempt() -> None:
    definition = _typed(nothing)

    decision = decided(definition, envelope("Go", attempt=99), _stored(b'{"n":4}', version=5))

    assert decision.disposition == "pending"
    assert not decision.spends_attempt
    assert decision.retry_at is not None
    assert decision.retry_at > NOW
    assert "a worker with version 5 or newer must take it" in (decision.error or "")


def test_handlers_get_a_state_of_their_own() -> None:
    initial = {"list": [1]}
    seen: list[Any] = []

    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["list"].append(2)
        seen.append(context.state)
        return []

    definition = define_saga("s").state(initial).on("Go", handler).build()
    decided(definition, envelope("Go"))
    decision = decided(definition, envelope("Go"))

    assert state_of(decision) == {"list": [1, 2]}
    assert seen == [{"list": [1]}, {"list": [1]}]
    assert initial == {"list": [1]}


def test_a_handler_is_told_everything_about_its_message() -> None:
    seen: list[tuple[Event, Context]] = []

    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        seen.append((event, context))
        return []

    definition = define_saga("s").state({}).on(Placed, handler).build()
    decided(
        definition,
        envelope(
            "Placed",
            {"order_id": "o", "amount": 1},
            id="m1",
            correlation_key="k",
            idempotency_key="i",
            concurrency_key="c",
            occurred_at=NOW,
            traceparent="00-a",
            tracestate="v=1",
            attempt=2,
        ),
    )

    ((event, context),) = seen
    assert event == Event("Placed", Placed("o", 1), "k", "i", "c", NOW, "m1", "00-a", "v=1")
    assert (context.saga_id, context.instance_id, context.correlation_key, context.run) == ("s", "s:k", "k", 1)
    assert (context.attempt, context.now, context.message) == (3, NOW, event)
    assert (context.traceparent, context.tracestate) == ("00-a", "v=1")


@pytest.mark.parametrize(("tier", "keeps"), [("t1", False), ("t2", True), ("t3", True)])
def test_history_keeps_the_states_from_tier_t2_on(tier: Any, keeps: bool) -> None:
    definition = define_saga("s").durability(tier).state({}).on("Go", count).build()

    entry = decided(definition, envelope("Go")).entry

    assert entry is not None
    assert (entry.before, entry.after) == ((b"{}", b'{"n":1}') if keeps else (None, None))


def test_a_state_that_cannot_be_stored_is_a_dead_letter_and_changes_nothing() -> None:
    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["when"] = context.now
        return [send("service:x", {})]

    decision = gone(saga_with(handler))

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "STATE_NOT_ENCODABLE"
    assert "saga 's', message 'Go'" in refusal(decision)
    assert "$.when" in refusal(decision)
    assert decision.effects == ()
    assert state_of(decision) == {}


def test_a_state_above_the_limit_is_a_dead_letter() -> None:
    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["big"] = "x" * 100
        return []

    decision = gone(saga_with(handler), limits=Limits(state_bytes_max=100))

    assert "the state has 110 bytes, at most 100 are allowed" in refusal(decision)


# --- What a handler may return ---------------------------------------------------------------------------------------


def test_a_coroutine_is_a_dead_letter_and_is_closed() -> None:
    async def asynchronous() -> Effects:
        return []

    decision = gone(saga_with(lambda saga, event, context: asynchronous()))

    assert "its handler for 'Go' returned a coroutine: handlers are synchronous" in refusal(decision)


@pytest.mark.parametrize(
    ("returned", "came_back"),
    [
        (None, "None"),
        ({"not": "a list"}, "dict {'not': 'a list'}"),
        ("text", "str 'text'"),
        (saga_complete(), "a single effect (complete)"),
        ([send("service:x", {}), 42], "a list with int 42 in it"),
        ([saga_complete], "a list with function"),
        (iter(()), "tuple_iterator"),
    ],
)
def test_what_is_no_list_of_effects_is_a_dead_letter_that_says_what_came_back(returned: Any, came_back: str) -> None:
    decision = gone(saga_with(lambda saga, event, context: returned))

    assert decision.disposition == "dead_lettered"
    assert refusal(decision).startswith("saga 's', message 'Go': its handler for 'Go' returned ")
    assert came_back in refusal(decision)


def test_a_tuple_of_effects_is_as_good_as_a_list() -> None:
    decision = gone(saga_with(lambda saga, event, context: (saga_complete(),)))

    assert decision.disposition == "applied"


def test_two_terminal_effects_are_a_dead_letter() -> None:
    decision = gone(saga_with(returning(saga_complete(), saga_fail("no"))))

    assert "returned two terminal effects, saga_complete and saga_fail: a run ends once" in refusal(decision)


# --- The end of a run ------------------------------------------------------------------------------------------------


def test_complete_records_result_and_both_times() -> None:
    _, instance = ended()

    assert (instance.status, instance.result) == ("completed", b'{"total":3}')
    assert (instance.completed_at, instance.ended_at) == (NOW, NOW)


def test_fail_records_the_reason_and_no_completion() -> None:
    decision = gone(saga_with(returning(saga_fail(ValueError("no stock")))))

    instance = decision.instance
    assert instance is not None
    assert (instance.status, instance.reason, instance.result) == ("failed", "no stock", None)
    assert (instance.completed_at, instance.ended_at) == (None, NOW)
    assert kinds(decision)[-1] == "saga:failed"


def test_a_terminal_effect_goes_along_with_others() -> None:
    decision = gone(saga_with(returning(saga_complete(), send("service:x", {}))))

    assert decision.instance is not None
    assert decision.instance.status == "completed"
    assert [effect.position for effect in decision.effects] == [1]


def test_a_run_that_ends_takes_its_timers_along() -> None:
    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        if event.payload:
            return [schedule({"type": "Go"}, "1m", "never written"), saga_complete()]
        return [schedule({"type": "Go"}, "5m", "waiting")]

    story = Story(saga_with(handler))
    story.takes("Begin")
    (waiting,) = story.takes("Go").timers
    decision = story.takes("Go", {"end": True})

    assert decision.timers == ()
    assert [timer.id for timer in decision.timers_ended] == [waiting.id]
    assert decision.instance is not None
    assert decision.instance.timers == ()


@pytest.mark.parametrize(
    ("effect", "status", "outcome"),
    [
        (saga_complete({"paid": True}), "completed", {"result": {"paid": True}}),
        (saga_complete(), "completed", {"result": None}),
        (saga_fail("no"), "failed", {"reason": "no"}),
    ],
)
def test_the_end_of_a_child_goes_to_the_very_run_of_its_parent(effect: Any, status: str, outcome: Any) -> None:
    definition = saga_with(returning(effect), saga_id="child")
    parent = ParentLink("parent", "p", 4, "e" * 40)
    instance = begun(definition, parent=parent, origin="spawn")

    outgoing = sent(decided(definition, envelope("Go", saga_id="child", hops=2), instance))

    assert (outgoing.kind, outgoing.target, outgoing.correlation_key, outgoing.to_run) == (
        "child_end",
        "parent",
        "p",
        4,
    )
    assert outgoing.payload.type == f"child:{status}"
    facts = {"instanceId": "child:k", "sagaId": "child", "correlationKey": "k", "run": 1}
    assert msgspec.json.decode(outgoing.encoded) == facts | outcome
    assert (outgoing.hops, outgoing.causation_id) == (3, "id-of-Go")


# --- Invariants ------------------------------------------------------------------------------------------------------


async def _coroutine() -> bool:
    return True


def _guarded(predicate: Any) -> SagaDefinition[Any]:
    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        saga.state["paid"] -= 5
        return [send("service:x", {})]

    return define_saga("s").state({"paid": 3}).on("Go", handler).invariant("paid is not negative", predicate).build()


def test_a_broken_invariant_is_a_dead_letter_with_both_states() -> None:
    decision = decided(_guarded(lambda state: state["paid"] >= 0), envelope("Go"))

    assert decision.dead_letter is not None
    assert decision.dead_letter.code == "SAGA_INVARIANT_BROKEN"
    assert "saga 's', message 'Go': invariant 'paid is not negative' does not hold" in refusal(decision)
    assert (decision.dead_letter.state_before, decision.dead_letter.state_after) == (b'{"paid":3}', b'{"paid":-2}')
    assert decision.effects == ()


def test_an_invariant_that_raises_is_a_breach_that_names_the_exception() -> None:
    decision = decided(_guarded(lambda state: state["owed"] >= 0), envelope("Go"))

    assert "invariant 'paid is not negative' could not be checked: it raised KeyError: 'owed'" in refusal(decision)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (_coroutine, "it returned coroutine, which has to be awaited"),
        (lambda: None, "it returned None, and neither True nor False"),
    ],
    ids=["a coroutine", "nothing"],
)
def test_an_invariant_that_tells_nothing_is_a_breach(told: Callable[[], object], why: str) -> None:
    decision = decided(_guarded(lambda state: told()), envelope("Go"))

    assert f"invariant 'paid is not negative' could not be checked: {why}" in refusal(decision)


def test_an_invariant_cannot_change_the_state() -> None:
    decision = decided(_guarded(lambda state: state.update(paid=100) is None), envelope("Go"))

    assert state_of(decision) == {"paid": -2}


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_handler_that_raises_leaves_nothing_but_the_time_of_its_next_attempt() -> None:
    decision = gone(saga_with(raising(ValueError("try later"))))

    assert decision.disposition == "pending"
    assert decision.error == "ValueError: try later"
    assert decision.retry_at is not None
    assert timedelta(seconds=0.8) <= decision.retry_at - NOW <= timedelta(seconds=1)
    assert (decision.instance, decision.entry, decision.effects, decision.dead_letter) == (None, None, (), None)
    assert decision.spends_attempt


def test_when_the_attempts_are_spent_the_message_is_a_dead_letter_with_its_traceback() -> None:
    definition = saga_with(raising(ValueError("still")))
    instance = begun(definition)

    fourth = decided(definition, envelope("Go", attempt=3), instance)
    fifth = decided(definition, envelope("Go", attempt=4), instance)

    assert fourth.disposition == "pending"
    assert fifth.disposition == "dead_lettered"
    assert fifth.dead_letter is not None
    assert fifth.dead_letter.code == "SAGA_HANDLER_FAILED"
    assert fifth.dead_letter.attempts == 5
    assert "handling 'Go' failed (attempt 5 of 5): ValueError: still" in refusal(fifth)
    assert "in handler" in (fifth.dead_letter.traceback or "")
    assert "transition.py" not in (fifth.dead_letter.traceback or "")


def test_an_error_that_says_it_is_not_retryable_is_a_dead_letter_at_once() -> None:
    decision = gone(saga_with(raising(SagasError("never", retryable=False, code="CARD_STOLEN"))))

    assert decision.dead_letter is not None
    assert (decision.dead_letter.code, decision.dead_letter.attempts) == ("CARD_STOLEN", 1)


def test_an_error_type_that_the_policy_lists_is_a_dead_letter_at_once_and_so_is_a_subclass() -> None:
    policy = RetryPolicy(non_retryable_error_types=("LookupError",))
    definition = define_saga("s").state({}).on("Go", raising(KeyError("x"))).retry(policy).build()

    assert decided(definition, envelope("Go")).disposition == "dead_lettered"


def test_a_handler_that_tries_to_end_the_process_only_fails() -> None:
    assert gone(saga_with(raising(SystemExit(1)))).disposition == "pending"


def test_an_error_whose_text_no_store_could_hold_is_spelled_out() -> None:
    decision = gone(saga_with(raising(OSError("no file \ud83d"))))

    assert decision.error == "OSError: no file \\ud83d"


def test_a_dead_letter_of_a_live_run_is_on_record_there_and_changes_only_its_counters() -> None:
    definition = saga_with(returning(42))
    instance = begun(definition)

    decision = decided(definition, envelope("Go"), instance)

    assert decision.instance == msgspec.structs.replace(instance, entries=2, bystanders=1)
    assert decision.entry is not None
    assert (decision.entry.disposition, decision.entry.revision) == ("dead_lettered", 1)
    assert kinds(decision) == ["saga:dead_lettered"]


def test_past_the_limit_of_rows_a_dead_letter_is_still_kept_whole() -> None:
    definition = saga_with(returning(42))

    decision = decided(definition, envelope("Go"), begun(definition), limits=Limits(bystander_rows_max=0))

    assert decision.dead_letter is not None
    assert decision.entry is None
    assert kinds(decision) == ["saga:dead_lettered"]


def test_a_starter_that_becomes_a_dead_letter_leaves_an_earlier_run_alone() -> None:
    definition = define_saga("s").state({}).on("Go", returning(saga_complete())).on("Bad", returning(42)).build()
    over = decided(definition, envelope("Go")).instance

    decision = decided(definition, envelope("Bad", opens_run=True), over)

    assert decision.disposition == "dead_lettered"
    assert (decision.instance, decision.entry) == (None, None)


def test_ids_of_dead_letters_sort_by_time_and_depend_on_the_message_alone() -> None:
    definition = saga_with(returning(42))
    instance = begun(definition)

    early = decided(definition, envelope("Go"), instance).dead_letter
    again = decided(definition, envelope("Go"), instance).dead_letter
    late = decided(definition, envelope("Go"), instance, now=NOW + timedelta(seconds=1)).dead_letter

    assert early is not None
    assert late is not None
    assert early == again
    assert early.id.startswith("dl")
    assert early.id < late.id


def test_an_effect_built_by_hand_out_of_wrong_parts_is_a_dead_letter_and_not_a_crash() -> None:
    from sagaloom.effects import Send

    decision = gone(saga_with(returning(Send("nowhere", {}))))  # type: ignore[arg-type]

    assert decision.disposition == "dead_lettered"
    assert decision.dead_letter is not None
    assert "AttributeError" in (decision.dead_letter.traceback or "")
