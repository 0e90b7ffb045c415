"""Handlers of a business status, of several messages together, and messages that wait for their instance."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import pytest

from sagaloom import DefinitionError, SagaMessage, define_saga, saga_complete, saga_fail, send
from sagaloom.definitions import Gathered
from sagaloom.testing import scenario


def moving(status: str, *effects: Any) -> Any:
    """A handler that leads to this status, and writes down what came."""

    def handler(saga: Any, event: Any, context: Any) -> Any:
        saga.state = {"status": status, "seen": [*saga.state["seen"], event.type]}
        return list(effects)

    return handler


def keyed(message_type: str, n: int = 1) -> SagaMessage[Any]:
    return SagaMessage(message_type, {"n": n}, correlation_key="k", id=f"{message_type}-{n}")


NEW = define_saga("order").state({"status": "new", "seen": []})
PLACED = NEW.on("Placed", moving("placed"))


def with_paid(on_unexpected: Any) -> Any:
    return (
        PLACED.during("packed", "Paid", moving("done", saga_complete()), on_unexpected=on_unexpected)
        .on("Packed", moving("packed"), starts=False)
        .compensate("Paid", moving("undone"))
        .build()
    )


# --- During a status -------------------------------------------------------------------------------------------------


def test_a_message_that_comes_too_early_is_offered_again_after_each_transition() -> None:
    story = scenario(with_paid("defer")).given(keyed("Placed"))

    story.when(keyed("Paid")).then(disposition="deferred", state={"status": "placed", "seen": ["Placed"]}, revision=1)
    assert story.reason == "'Paid' is expected during 'packed', and the status is 'placed'"
    story.when(keyed("Packed")).then(status="completed", revision=3)
    assert story.state["seen"] == ["Placed", "Packed", "Paid"]


@pytest.mark.parametrize(
    ("on_unexpected", "disposition", "status"),
    [("ignore", "ignored", "running"), ("dead_letter", "dead_lettered", "running"), ("fail", "applied", "failed")],
)
def test_a_message_that_comes_in_another_status_is(on_unexpected: str, disposition: Any, status: Any) -> None:
    story = scenario(with_paid(on_unexpected)).given(keyed("Placed"))

    story.when(keyed("Paid")).then(disposition=disposition, status=status)

    assert "'Paid' is expected during 'packed'" in (story.reason or "")


def test_a_run_that_fails_for_an_unexpected_message_compensates_like_any_other() -> None:
    story = scenario(with_paid("fail")).given(keyed("Placed")).when(keyed("Paid"))

    story.then(status="failed", state={"status": "undone", "seen": ["Placed", "Paid"]})


def test_what_was_deferred_to_a_run_that_ends_is_ignored() -> None:
    saga = (
        PLACED.during("packed", "Paid", moving("done"))
        .on("Gone", lambda saga, event, context: [saga_fail("gone")])
        .build()
    )
    story = scenario(saga).given(keyed("Placed")).when(keyed("Paid"))

    story.when(keyed("Gone")).then(status="failed", disposition="ignored")


def test_a_type_has_a_handler_for_each_of_its_statuses() -> None:
    saga = PLACED.during("placed", "Next", moving("packed")).during("packed", "Next", moving("gone")).build()

    scenario(saga).given(keyed("Placed"), keyed("Next", 1), keyed("Next", 2)).then(
        state={"status": "gone", "seen": ["Placed", "Next", "Next"]}
    )


def test_deferred_messages_come_in_the_order_in_which_they_were_accepted() -> None:
    saga = (
        PLACED.during("packed", "A", moving("a"))
        .during("a", "B", moving("b"))
        .during("b", "C", moving("c"))
        .on("Packed", moving("packed"))
        .build()
    )
    story = scenario(saga).given(keyed("Placed"))
    for name in ("C", "B", "A"):
        story.when(keyed(name)).then(disposition="deferred")

    story.when(keyed("Packed"))

    assert story.state == {"status": "c", "seen": ["Placed", "Packed", "A", "B", "C"]}


class Phase(StrEnum):
    NEW = "new"
    PAID = "paid"


@dataclass(frozen=True)
class Order:
    phase: Phase = Phase.NEW


def test_the_status_may_be_another_field_and_an_enum() -> None:
    def paid(saga: Any, event: Any, context: Any) -> Any:
        saga.state = replace(saga.state, phase=Phase.PAID)
        return []

    saga = (
        define_saga("order")
        .state(Order(), status_field="phase")
        .during(Phase.NEW, "Paid", paid, starts=True)
        .during(Phase.PAID, "Paid", lambda saga, event, context: [saga_complete()], starts=True)
        .build()
    )

    scenario(saga).given(keyed("Paid", 1)).then(state=Order(Phase.PAID)).when(keyed("Paid", 2)).then(status="completed")


# --- Waiting for an instance -----------------------------------------------------------------------------------------

WAITING = PLACED.on("Paid", moving("paid"), starts=False, on_missing="wait", patience="10m").build()


def test_a_message_waits_until_its_instance_appears() -> None:
    story = scenario(WAITING).when(keyed("Paid")).then(disposition="deferred")

    story.when(keyed("Placed"))

    assert story.state == {"status": "paid", "seen": ["Placed", "Paid"]}


def test_a_message_that_has_waited_long_enough_is_given_up() -> None:
    story = scenario(WAITING).when(keyed("Paid")).then(disposition="deferred")

    story.advance("9m").then(disposition="deferred").advance("1m").then(disposition="dead_lettered")

    assert "has no live instance 'k'" in (story.reason or "")
    assert "none has come within 0:10:00" in (story.reason or "")


# --- All of several --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paid:
    amount: int


def ready(saga: Any, event: SagaMessage[Gathered], context: Any) -> Any:
    assert isinstance(event.payload, Gathered)
    saga.state = {"status": "ready", "amount": event.payload[Paid].amount, "n": event.payload["Packed"]["n"]}
    return [send("service:courier", {"last": event.type, "all": sorted(event.payload)})]


JOINED = define_saga("order").state({"status": "new"}).when_all([Paid, "Packed"], ready).build()
PAID = SagaMessage("Paid", {"amount": 7}, correlation_key="k", id="p-1")


@pytest.mark.parametrize("first", [0, 1])
def test_a_join_runs_once_when_all_have_come_in_any_order(first: int) -> None:
    messages = [PAID, keyed("Packed", 3)]
    story = scenario(JOINED).when(messages[first]).then(state={"status": "new"}, effects=[], revision=1)

    last = messages[1 - first]
    story.when(last).then(
        state={"status": "ready", "amount": 7, "n": 3},
        effects=[send("service:courier", {"last": last.type, "all": ["Packed", "Paid"]})],
        revision=2,
    )


def test_of_two_messages_of_one_type_the_first_counts() -> None:
    story = scenario(JOINED).given(PAID)

    story.when(SagaMessage("Paid", {"amount": 9}, correlation_key="k", id="p-2")).then(disposition="ignored")
    story.when(keyed("Packed")).then(state={"status": "ready", "amount": 7, "n": 1})


def test_what_comes_after_a_join_has_run_is_ignored() -> None:
    story = scenario(JOINED).given(PAID, keyed("Packed"))

    story.when(keyed("Packed", 2)).then(disposition="ignored", reason="Packed, Paid have all come before")


def test_a_type_may_have_a_handler_of_its_own_beside_the_join() -> None:
    saga = (
        NEW.when_all(["A", "B"], moving("both")).on("A", moving("a")).on("C", lambda saga, event, context: []).build()
    )

    story = scenario(saga).given(keyed("A"), keyed("B")).then(state={"status": "both", "seen": ["A", "B"]})
    story.when(keyed("A", 2)).then(state={"status": "a", "seen": ["A", "B", "A"]})


def test_a_join_that_is_completed_by_a_type_with_a_handler_takes_two_steps() -> None:
    saga = NEW.when_all(["A", "B"], moving("both")).on("A", moving("a")).build()

    story = scenario(saga).given(keyed("B"), keyed("A"))

    assert story.state["seen"] == ["A", "A"]
    entry = story.decision.entry
    assert entry is not None
    assert [(step.phase, step.status) for step in entry.steps] == [("handle", "running"), ("handle", "running")]


def test_a_handler_that_ends_the_run_leaves_nothing_to_join() -> None:
    saga = NEW.when_all(["A", "B"], moving("both")).on("A", lambda saga, event, context: [saga_complete()]).build()

    story = scenario(saga).given(keyed("B"), keyed("A")).then(status="completed")

    assert story.instance is not None
    assert story.instance.gathered == ()


def test_a_join_that_raises_is_tried_again_with_nothing_kept() -> None:
    calls: list[int] = []

    def flaky(saga: Any, event: Any, context: Any) -> Any:
        calls.append(context.attempt)
        if context.attempt == 1:
            raise RuntimeError("not yet")
        return [saga_complete()]

    saga = NEW.when_all(["A", "B"], flaky).build()
    story = scenario(saga).given(keyed("A")).when(keyed("B")).then(disposition="pending", revision=1)

    story.advance("1m").then(status="completed")

    assert calls == [1, 2]


# --- Every order, every duplicate ------------------------------------------------------------------------------------


def orders() -> Any:
    """An order whose messages may come in any order: placing, payment, packing, and what ships it."""
    return (
        define_saga("order")
        .state({"status": "new", "seen": []})
        .on("Placed", moving("placed", send("service:payments", {"charge": 1})))
        .during("placed", "Paid", moving("paid"), on_missing="wait")
        .during("paid", "Packed", moving("packed"), on_missing="wait")
        .during("packed", "Shipped", moving("shipped", saga_complete({"ok": True})), on_missing="wait")
        .build()
    )


def joined_orders() -> Any:
    """The same, where payment and packing have no order of their own."""

    def ready_to_ship(saga: Any, event: Any, context: Any) -> Any:
        saga.state = {"status": "ready", "seen": sorted(event.payload)}
        return []

    return (
        define_saga("order")
        .state({"status": "new", "seen": []})
        .when_all(["Placed", "Paid", "Packed"], ready_to_ship)
        .during("ready", "Shipped", moving("shipped", saga_complete({"ok": True})), on_missing="wait")
        .build()
    )


STORIES = list(itertools.permutations(("Placed", "Paid", "Packed", "Shipped")))


@pytest.mark.parametrize("saga", [orders(), joined_orders()], ids=["in a row", "together"])
def test_every_permutation_and_duplication_of_an_orders_messages_ends_in_the_same_state(saga: Any) -> None:
    ends: list[Any] = []
    for story in STORIES:
        for twice in range(len(story) + 1):
            # Each message once, and one of them again, right away and at the end: a repeat has the id of the first.
            again = [story[twice - 1]] if twice else []
            played = scenario(saga)
            for name in (*story[:twice], *again, *story[twice:], *again):
                played.when(keyed(name))
            instance = played.instance
            assert instance is not None, story
            ends.append((instance.status, played.state, instance.revision, played.result))

    assert all(end == ends[0] for end in ends)
    assert ends[0][0] == "completed"
    assert ends[0][2:] == (4, {"ok": True})


# --- What cannot be said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PLACED.during("a", "Placed", moving("b")), "already has a handler for 'Placed' in every status"),
        (lambda: NEW.during("a", "A", moving("b")).on("A", moving("b")), "handlers during some statuses for 'A'"),
        (lambda: NEW.during("a", "A", moving("b")).during("a", "A", moving("c")), "for 'A' during 'a'"),
        (
            lambda: NEW.during("a", "A", moving("b")).during("b", "A", moving("c"), on_unexpected="ignore"),
            "on_unexpected of 'A' is 'ignore' during 'b' and 'defer' before",
        ),
        (lambda: NEW.during("a", "A", moving("b"), starts=True).build(), "whose status is 'new' then"),
        (lambda: define_saga("s").state({}).during("a", "A", moving("b")).build(), "initial state has None there"),
        (lambda: define_saga("s").state({}, status_field=""), "status_field must be the name of a field"),
        (lambda: NEW.on("A", moving("a"), on_missing="wait", patience=0), "patience of 'A' must be longer"),
        (lambda: NEW.on("A", moving("a"), on_missing="wait", patience="soon"), "patience of 'A'"),
        (lambda: NEW.when_all(["A", "B"], moving("a")).when_all(["B", "A"], moving("b")), "already has a .when_all"),
        (lambda: NEW.on("Paid", moving("a")).when_all([Paid, "B"], moving("b")), "'Paid' is"),
    ],
)
def test_what_contradicts_itself_is_refused_where_it_is_said(call: Any, said: str) -> None:
    with pytest.raises(DefinitionError, match=said):
        call()
