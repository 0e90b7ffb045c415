"""What `sagaloom check` finds, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sagaloom import ALL_STEPS, define_saga, saga_compensate, saga_complete, saga_fail, schedule, send, spawn
from sagaloom.checks import Finding, check_sagas
from sagaloom.definitions import SagaDefinition
from tests.examples.stories import STORIES


def _nothing(saga: Any, event: Any, context: Any) -> list[Any]:
    return []


def _done(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_complete()]


def _saga(id: str = "s") -> Any:
    return define_saga(id).correlate(lambda message: "k").state({"status": "new"})


def found(*definitions: SagaDefinition[Any], **options: Any) -> list[tuple[str, str]]:
    """Level and code of everything but the notes."""
    return [(one.level, one.code) for one in check_sagas(definitions, **options) if one.level != "note"]


def notes(*definitions: SagaDefinition[Any]) -> list[str]:
    return [one.code for one in check_sagas(definitions) if one.level == "note"]


def the(code: str, findings: Sequence[Finding]) -> Finding:
    (one,) = [each for each in findings if each.code == code]
    return one


# --- Sends -----------------------------------------------------------------------------------------------------------


def _sends_to_nobody(saga: Any, event: Any, context: Any) -> list[Any]:
    return [send("Nobody", {}), saga_complete()]


def test_a_message_that_no_saga_handles_is_an_error_with_its_place_and_remedy() -> None:
    finding = the("unhandled-send", check_sagas([_saga().on("A", _sends_to_nobody).build()]))

    assert finding.level == "error"
    assert (finding.place.file, finding.saga) == (__file__, "s")
    assert finding.message.startswith("the handler of 'A' sends 'Nobody', which no saga that is loaded here handles")
    assert "add .on('Nobody', handler)" in finding.remedy


def test_another_saga_may_handle_it_or_be_named_itself() -> None:
    by_id = _saga("other").on("B", lambda saga, event, context: [send("saga:Nobody", {}), saga_complete()]).build()
    takes = _saga("takes").on("Nobody", _done).build()

    assert found(_saga().on("A", _sends_to_nobody).build(), by_id, takes) == []


def _sends_a_fax(saga: Any, event: Any, context: Any) -> list[Any]:
    return [send("fax:paper", {}), saga_complete()]


def test_a_kind_of_target_that_is_not_there_is_an_error() -> None:
    saga = _saga().on("A", _sends_a_fax).build()

    assert found(saga) == [("error", "unknown-target")]
    assert found(saga, target_kinds=["fax"]) == []


def _schedules(saga: Any, event: Any, context: Any) -> list[Any]:
    return [schedule({"type": "Late"}, "1h")]


def test_a_timer_comes_back_to_the_saga_that_set_it() -> None:
    other = _saga("other").on("Late", _done).build()

    assert found(_saga().on("A", _schedules).build(), other) == [
        ("error", "unhandled-schedule"),
        ("warning", "dead-end-status"),
    ]
    assert found(_saga().on("A", _schedules).on("Late", _done, starts=False).build()) == []


def _spawns(saga: Any, event: Any, context: Any) -> list[Any]:
    return [spawn("child", {}), saga_complete()]


def test_a_child_must_be_loaded_and_have_a_beginning() -> None:
    parent = _saga("parent").on("A", _spawns).build()
    child = _saga("child").on("Go", _done).build()
    stillborn = _saga("child").on("Go", _done, starts=False).build()

    assert found(parent) == [("error", "unknown-child")]
    assert found(parent, stillborn) == [("error", "nothing-starts"), ("error", "unknown-child")]
    assert found(parent, child) == []
    assert "unheard-child" in notes(parent, child)


# --- Starting --------------------------------------------------------------------------------------------------------


def test_a_saga_that_nothing_starts_is_an_error() -> None:
    assert found(_saga().on("A", _done, starts=False).build()) == [("error", "nothing-starts")]


def test_several_starters_without_a_key_are_a_warning() -> None:
    bare = define_saga("s").state({})

    assert found(bare.on("A", _done).on("B", _done).build()) == [("warning", "starters-without-key")]
    assert found(bare.on("A", _done).on("B", _done, starts=False).build()) == [("warning", "no-correlation")]
    assert found(bare.singleton().on("A", _done).on("B", _done).build()) == []
    assert found(bare.on("A", _done).build()) == []


def test_several_starters_with_a_key_are_a_note() -> None:
    assert notes(_saga().on("A", _done).on("B", _done).build()) == ["several-starters"]
    assert notes(_saga().on("A", _done).on("B", _done, starts=False).build()) == []


# --- Compensations ---------------------------------------------------------------------------------------------------


def _compensates(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_compensate(event)]


def _charges(saga: Any, event: Any, context: Any) -> list[Any]:
    return [send("service:payments", {})]


def _unwinds(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_compensate(ALL_STEPS)]


def _fails(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_fail("no")]


def test_a_compensation_that_is_asked_for_must_be_there() -> None:
    assert found(_saga().on("A", _compensates).build()) == [("error", "missing-compensation")]
    assert found(_saga().on("A", _compensates).compensate("A", _fails).build()) == []


def test_a_compensation_that_nothing_asks_for_is_a_warning() -> None:
    assert found(_saga().on("A", _done).compensate("Other", _fails).build()) == [
        ("warning", "unreachable-compensation")
    ]


def test_a_step_that_unwinding_would_leave_is_a_warning() -> None:
    saga = _saga().on("A", _charges).on("Stop", _unwinds, starts=False)

    assert found(saga.build()) == [("warning", "step-without-compensation")]
    assert found(saga.compensate("A", _nothing).build()) == []


def _releases(saga: Any, event: Any, context: Any) -> list[Any]:
    return [send("service:stock", {})]


def _refunds_and_releases(saga: Any, event: Any, context: Any) -> list[Any]:
    return [send("service:payments", {}), *_releases(saga, event, context)]


def test_a_step_whose_compensation_speaks_only_to_others_is_a_note() -> None:
    saga = _saga().on("A", _charges).on("Stop", _unwinds, starts=False)

    finding = the("undone-elsewhere", check_sagas([saga.compensate("A", _releases).build()]))

    assert finding.level == "note"
    assert finding.message.startswith("the handler of 'A' asks service:payments for something, and the compensation of")
    assert notes(saga.compensate("A", _refunds_and_releases).build()) == []


def test_without_unwinding_a_step_that_is_not_undone_is_a_note() -> None:
    saga = _saga().on("A", _charges).on("B", _compensates, starts=False).compensate("B", _fails).build()

    assert (found(saga), notes(saga)) == ([], ["step-without-compensation"])


# --- Going on --------------------------------------------------------------------------------------------------------


def _waits(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state["status"] = "waiting"
    return []


def _resumes(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state["status"] = "going on"
    return []


def test_a_status_that_no_message_leaves_is_a_warning_at_the_line_that_sets_it() -> None:
    finding = the("dead-end-status", check_sagas([_saga().on("A", _waits).build()]))

    assert finding.level == "warning"
    assert finding.message.startswith("no message leads out of the status 'waiting'")
    assert finding.place.file == __file__


def test_a_status_is_left_by_another_one_or_by_an_end() -> None:
    assert found(_saga().on("A", _waits).on("B", _done, starts=False).build()) == []
    assert found(_saga().on("A", _waits).on("B", _resumes, starts=False).build()) == []


def test_a_handler_of_another_status_leads_out_of_none_but_its_own() -> None:
    begun = _saga().during("new", "A", _waits, starts=True)

    assert found(begun.during("new", "B", _done).build()) == [("warning", "dead-end-status")]
    assert found(begun.during("waiting", "B", _done).build()) == []


def test_a_handler_of_a_status_that_nothing_sets_is_a_warning() -> None:
    saga = _saga().during("new", "A", _done, starts=True).during("paid", "B", _done).build()

    assert found(saga) == [("warning", "unreachable-handler")]


def test_what_all_of_several_types_lead_to_counts() -> None:
    gathering = define_saga("s").correlate(lambda message: "k").state({"status": "new"})

    assert found(gathering.when_all(["A", "B"], _done).build()) == []
    assert found(gathering.when_all(["A", "B"], _sends_to_nobody).build()) == [("error", "unhandled-send")]


def test_a_status_may_stand_in_another_field() -> None:
    def waits(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state["phase"] = "waiting"
        return []

    saga = define_saga("s").correlate(lambda message: "k").state({"phase": "new"}, status_field="phase")

    assert found(saga.on("A", waits).build()) == [("warning", "dead-end-status")]


def test_the_status_of_the_beginning_counts_where_a_starter_sets_none() -> None:
    assert found(_saga().on("A", _nothing).build()) == [("warning", "dead-end-status")]


def test_a_saga_that_never_ends_is_a_note_unless_it_is_meant_to_stay() -> None:
    plain = define_saga("s").correlate(lambda message: "k").state({})

    assert notes(plain.on("A", _nothing).build()) == ["never-ends"]
    assert notes(plain.singleton().on("A", _nothing).build()) == []


def _hides(saga: Any, event: Any, context: Any) -> list[Any]:
    return eval("[]")  # type: ignore[no-any-return]


def test_nothing_is_concluded_from_what_was_not_seen() -> None:
    saga = _saga().on("A", _waits).on("B", _hides, starts=False).build()

    assert (found(saga), notes(saga)) == ([], ["not-seen"])


@pytest.mark.parametrize("module", STORIES)
def test_our_examples_have_nothing_that_is_worse_than_a_note(module: str) -> None:
    import importlib

    acts = importlib.import_module(f"examples.{module}").story.acts

    assert [found(*act.sagas) for act in acts] == [[]] * len(acts)
