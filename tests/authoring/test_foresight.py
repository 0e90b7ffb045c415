"""What is read off a handler's source, and what is not."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

import sagaloom
from sagaloom import (
    ALL_STEPS,
    SagaMessage,
    cancel_scheduled,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    send,
    spawn,
)
from sagaloom import schedule as later
from sagaloom.effects import Target
from sagaloom.foresight import OWN_MESSAGE, Foresight, foresee, place_of


@dataclass(frozen=True)
class Order:
    status: str = "new"
    cents: int = 0


@dataclass(frozen=True)
class Account:
    cents: int = 0


@dataclass(frozen=True)
class Reminder:
    order_id: str


PAYMENTS = "service:payments"
CHILD = define_saga("child").state({}).on("Go", lambda saga, event, context: []).build()


def _targets(seen: Foresight) -> list[tuple[str, str | None] | None]:
    return [one.target for one in seen.effects]


# --- Effects ---------------------------------------------------------------------------------------------------------


def _sends(saga: Any, event: Any, context: Any) -> list[Any]:
    target = "service:mail"
    return [
        send("Shipped", {}),
        send(PAYMENTS, {}),
        send(target, {}),
        send({"kind": "job", "id": "report"}, {}),
        sagaloom.send(Target("fax", "paper"), {}),
        send(f"service:{saga.state}", {}),
    ]


def test_a_target_is_read_in_each_of_its_forms() -> None:
    seen = foresee(_sends)

    assert _targets(seen) == [
        ("saga", "Shipped"),
        ("service", "payments"),
        ("service", "mail"),
        ("job", "report"),
        ("fax", "paper"),
        ("service", None),
    ]
    assert seen.sees_effects


def _all_kinds(saga: Any, event: Any, context: Any) -> list[Any]:
    if event.payload:
        return [saga_fail("no")]
    return [
        later(Reminder("o-1"), "1h"),
        later({"type": "Late"}, "1h"),
        later(SagaMessage("Later", {}), "1h", name="x"),
        later(event, "1h"),
        spawn(CHILD, {}),
        spawn("other", {}),
        saga_compensate(event, "why"),
        saga_compensate(ALL_STEPS),
        cancel_scheduled("x"),
        saga_complete(),
    ]


def test_every_effect_is_read_with_what_it_is_about() -> None:
    seen = foresee(_all_kinds)

    assert [(one.kind, one.message or one.child) for one in seen.effects] == [
        ("fail", None),
        ("scheduled", "Reminder"),
        ("scheduled", "Late"),
        ("scheduled", "Later"),
        ("scheduled", OWN_MESSAGE),
        ("spawn", "child"),
        ("spawn", "other"),
        ("compensate", OWN_MESSAGE),
        ("compensate", None),
        ("cancel_scheduled", None),
        ("complete", None),
    ]
    assert [one.is_all_steps for one in seen.effects if one.kind == "compensate"] == [False, True]
    assert seen.blind_spots == ()


def test_an_effect_has_the_line_that_it_stands_in() -> None:
    first = foresee(_sends).effects[0]

    assert first.place.file == __file__
    assert first.place.line == place_of(_sends).line + 3


def _goes_on(slot: Any, effects: list[Any]) -> list[Any]:
    slot.state["status"] = "helped"
    effects.append(send("Helped", {}))
    return _goes_further(slot)


def _goes_further(it: Any) -> list[Any]:
    it.state = replace(it.state, status="further")
    return _goes_on(it, [])


def _asks_others(saga: Any, event: Any, context: Any) -> list[Any]:
    return _goes_on(saga, [])


def test_functions_of_the_program_are_read_too_also_when_they_call_each_other() -> None:
    seen = foresee(_asks_others)

    assert _targets(seen) == [("saga", "Helped")]
    assert [one.status for one in seen.statuses] == ["helped", "further"]
    assert seen.blind_spots == ()


two_on_a_line = [lambda saga, event, context: [send("One", {})], lambda saga, event, context: [send("Two", {})]]


def test_lambdas_of_one_line_are_told_apart() -> None:
    assert [_targets(foresee(one)) for one in two_on_a_line] == [[("saga", "One")], [("saga", "Two")]]


class Handlers:
    def method(self, saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state["status"] = "by a method"
        return []

    def __call__(self, saga: Any, event: Any, context: Any) -> list[Any]:
        return [send("Called", {})]


def test_methods_partials_and_callable_objects_are_read() -> None:
    assert [one.status for one in foresee(Handlers().method).statuses] == ["by a method"]
    assert _targets(foresee(functools.partial(_sends)))[0] == ("saga", "Shipped")
    assert _targets(foresee(Handlers())) == [("saga", "Called")]


def _from_a_closure(target: str) -> Callable[..., list[Any]]:
    return lambda saga, event, context: [send(target, {})]


def test_what_a_closure_holds_is_known() -> None:
    assert _targets(foresee(_from_a_closure("service:held"))) == [("service", "held")]


# --- Statuses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "statuses"),
    [
        (lambda saga, event, context: setattr(saga, "x", 1) or [], []),
        (lambda saga, event, context: [saga.state.update(status="a"), saga.state.update({"status": "b"})], ["a", "b"]),
    ],
)
def test_a_status_is_read_off_an_update(handler: Any, statuses: list[str]) -> None:
    assert [one.status for one in foresee(handler).statuses] == statuses


def _sets_in_many_ways(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = replace(saga.state, status="replaced")
    saga.state = {**saga.state, "status": "spread"}
    saga.state = saga.state | {"status": "joined"}
    saga.state |= {"status": "joined in place"}
    saga.state["status"] = "an item"
    saga.state.status = "a field"
    saga.state = Order("by place", 1)
    saga.state = Order(cents=1)
    saga.state = Order(status="yes" if event.payload else "no")
    saga.state = saga.state.model_copy(update={"status": "copied"})
    return []


def test_a_status_is_read_in_each_of_the_ways_to_set_it() -> None:
    seen = foresee(_sets_in_many_ways)

    assert [one.status for one in seen.statuses] == [
        *("replaced", "spread", "joined", "joined in place", "an item", "a field", "by place", "new"),
        *("yes", "no", "copied"),
    ]
    assert seen.blind_spots == ()


class Stage(enum.Enum):
    PAYING = "paying"
    PAID = "paid"


def _sets_members(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = replace(saga.state, status=Stage.PAYING)
    saga.state["status"] = Stage.PAID.value
    return []


def test_a_status_may_be_a_member_of_an_enum() -> None:
    seen = foresee(_sets_members)

    assert [one.status for one in seen.statuses] == ["paying", "paid"]
    assert seen.blind_spots == ()


def _leaves_the_status(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = replace(saga.state, cents=1)
    saga.state = {**saga.state, "cents": 1}
    saga.state["cents"] = 2
    saga.state.cents = 3
    saga.state = Account(4)
    saga.state = saga.state
    return []


def test_what_says_nothing_of_a_status_sets_none() -> None:
    seen = foresee(_leaves_the_status)

    assert (seen.statuses, seen.blind_spots) == ((), ())


# --- Blind spots -----------------------------------------------------------------------------------------------------


def _hides(saga: Any, event: Any, context: Any) -> list[Any]:
    computed = event.payload["x"]
    saga.state = computed
    saga.state["status"] = computed
    saga.state[computed] = 1
    saga.state = {"cents": 1}
    return [send(computed, {}), later(computed, "1h"), spawn(computed, {}), *functools.reduce(computed, [])]


def test_what_is_computed_is_a_blind_spot_with_its_place() -> None:
    seen = foresee(_hides)

    assert [one.why for one in seen.blind_spots if one.hides == "effects"] == [
        "it returns what functools.reduce(...) gives",
        "the target of send(...) is computed",
        "the message of schedule(...) is computed",
        "the child of spawn(...) is computed",
    ]
    assert sum(one.hides == "status" for one in seen.blind_spots) == 4
    assert not seen.sees_effects
    assert not seen.sees_statuses
    assert all(one.place.line > place_of(_hides).line for one in seen.blind_spots)


def test_a_handler_without_source_is_one_large_blind_spot() -> None:
    made: dict[str, Any] = {}
    exec("def handler(saga, event, context):\n    return []", made)

    for handler in (made["handler"], print):
        seen = foresee(handler)

        assert (seen.sees_effects, seen.sees_statuses) == (False, False)


def _shadows(saga: Any, event: Any, context: Any, send: Any = None) -> list[Any]:
    return [send("Not ours", {})]


def test_a_name_that_is_the_handlers_own_is_not_taken_for_ours() -> None:
    seen = foresee(_shadows)

    assert seen.effects == ()
    assert not seen.sees_effects
