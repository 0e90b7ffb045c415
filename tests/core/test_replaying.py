"""Deciding a history once more, with other code: what would be different, and where."""

from __future__ import annotations

from typing import Any

import pytest

from sagaloom import ALL_STEPS, SagaDefinition, define_saga, saga_compensate, saga_complete, saga_fail, schedule, send
from sagaloom.engine.controls import PAUSE, RESUME, control
from sagaloom.engine.records import HistoryEntry, Instance
from sagaloom.engine.replaying import Replayed, ReplayRefused, replay
from tests.core.deciding import NOW, Story, decided, nothing, returning


def _orders(*, price: Any = None, done: Any = None, tier: Any = "t2", version: int = 1, migrate: Any = None) -> Any:
    def placed(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state = {"status": "placed", "amount": event.payload.get("amount", 1), "at": context.now.isoformat()}
        return [send("service:payments", {}), schedule({"type": "Late"}, "1h", name="late")]

    def priced(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state["amount"] *= 2
        return []

    stage = (
        define_saga("s")
        .durability(tier)
        .state({})
        .on("Placed", placed)
        .on("Priced", price or priced, starts=False)
        .on("Late", nothing, starts=False)
        .on("Done", done or returning(saga_complete({"ok": True})), starts=False)
        .on("CallOff", returning(saga_compensate(ALL_STEPS, "rain")), starts=False)
        .compensate("Placed", returning(send("service:payments", {"refund": True})))
    )
    return (stage if version == 1 else stage.version(version, migrate=migrate)).build()


def _told(definition: SagaDefinition[Any], *messages: str) -> tuple[Instance, list[HistoryEntry]]:
    story = Story(definition)
    for message in messages:
        if message in (PAUSE, RESUME):
            said = control(message, "s", "k", message_id=message, accepted_at=NOW)  # type: ignore[arg-type]
            decision = decided(definition, said, story.instance)
            story.decisions.append(decision)
            story.instance = decision.instance
        else:
            story.takes(message, {"amount": 3})
    assert story.instance is not None
    return story.instance, [each.entry for each in story.decisions if each.entry is not None]


def _replayed(then: Any, now: Any, *messages: str) -> list[Replayed]:
    return list(replay(now, *_told(then, *messages)))


@pytest.mark.parametrize(
    "messages",
    [
        ("Placed", "Priced", "Done"),
        ("Placed", "Priced", "CallOff"),
        ("Placed", PAUSE, RESUME, "Priced"),
        ("Placed", "Done", "Priced"),
    ],
)
def test_the_same_code_decides_the_same(messages: tuple[str, ...]) -> None:
    replayed = _replayed(_orders(), _orders(), *messages)

    assert [each.differences for each in replayed] == [()] * len(replayed)
    assert [each.entry.entry_no for each in replayed] == list(range(1, len(replayed) + 1))


def test_an_entry_that_is_decided_differently_shows_both_states_and_drags_no_other_behind_it() -> None:
    def tripled(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state["amount"] *= 3
        return [send("service:mail", {})]

    first, second, third = _replayed(_orders(), _orders(price=tripled), "Placed", "Priced", "Done")

    assert (first.differences, third.differences) == ((), ())
    assert second.before["amount"] == 3
    state, effects = second.differences
    assert (state.what, state.recorded["amount"], state.decided["amount"]) == ("state", 6, 9)
    assert (effects.what, effects.recorded, effects.decided) == ("effects", [], ["send service:mail"])


def test_an_end_that_is_another_one_shows_status_effects_and_reason() -> None:
    *_, last = _replayed(_orders(), _orders(done=returning(saga_fail("no"))), "Placed", "Done")

    assert {each.what: (each.recorded, each.decided) for each in last.differences} == {
        "status": ("completed", "failed"),
        "effects": (["complete"], ["fail: no"]),
        "reason": (None, "no"),
    }


def test_a_handler_that_raises_now_is_a_difference() -> None:
    def raises(saga: Any, event: Any, context: Any) -> list[Any]:
        raise KeyError("currency")

    *_, last = _replayed(_orders(), _orders(price=raises), "Placed", "Priced")

    (difference,) = last.differences
    assert (difference.what, difference.recorded) == ("disposition", "applied")
    assert "KeyError: 'currency'" in difference.decided


def test_states_of_an_older_version_are_migrated_first() -> None:
    newer = _orders(version=2, migrate={1: lambda state: {**state, "currency": "EUR"}})

    first, second = _replayed(_orders(), newer, "Placed", "Priced")

    assert first.differences == ()
    (difference,) = second.differences
    assert difference.decided == {**difference.recorded, "currency": "EUR"}


def test_a_history_without_states_cannot_be_replayed() -> None:
    with pytest.raises(ReplayRefused, match="history keeps them from"):
        _replayed(_orders(tier="t1"), _orders(tier="t1"), "Placed")
