"""Signals, updates and queries through the runtime, on every store."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from sagaloom import (
    BackendUnavailable,
    IdempotencyKeyReused,
    InstanceEnded,
    InstanceNotFound,
    MessageRejected,
    QueryFailed,
    QueryNotFound,
    SagaNotFound,
    SagasError,
    SignalNotFound,
    UpdateFailed,
    UpdateRefused,
    answer,
    define_query,
    define_saga,
    define_signal,
    saga_complete,
)
from sagaloom.engine.queries import answer_query
from sagaloom.ports.store import SagaStore
from sagaloom.runtime import SagaRuntime
from sagaloom.testing import ManualClock, check_invariants
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench
from tests.runtime.test_sharing import keys_held_by, parts_of, until

__all__ = ["STORES"]


class Ann(Exception):
    """What goes wrong now and then."""


MOODS = {"bad": False}

NOTE = define_signal("note", str)
ADD = define_signal("add", int)
CLOSE = define_signal("close")
TOTAL = define_query("total", int)
EVERYTHING = define_query("everything")
MEDDLER = define_query("meddler")
LATER = define_query("later")


def noted(saga: Any, event: Any, context: Any) -> Any:
    saga.state["notes"].append(event.payload)
    return []


def added(saga: Any, event: Any, context: Any) -> Any:
    if MOODS["bad"]:
        raise Ann("not today")
    if event.payload < 0:
        saga.state["total"] = -1
        raise UpdateRefused("only what is more", code="NEGATIVE", data={"got": event.payload})
    if event.payload == 13:
        raise SagasError("thirteen", retryable=False)
    saga.state["total"] += event.payload
    return [answer({"total": saga.state["total"]})]


def meddling(state: Any) -> Any:
    state["total"] = 99
    return 1


async def later() -> int:
    return 1


ACCOUNT = (
    define_saga("account")
    .state({"total": 0, "notes": []})
    .on("Open", lambda saga, event, context: [])
    .on_signal(NOTE, noted)
    .on_signal(CLOSE, lambda saga, event, context: [saga_complete(saga.state["total"])])
    .on_update(ADD, added)
    .on_update(CLOSE, lambda saga, event, context: [saga_complete()])
    .on_query(TOTAL, lambda state: state["total"])
    .on_query(EVERYTHING, lambda state: state)
    .on_query(MEDDLER, meddling)
    .on_query(LATER, lambda state: later())  # type: ignore[arg-type,return-value]
    .build()
)


@pytest.fixture
async def runtime(store: SagaStore) -> AsyncIterator[SagaRuntime]:
    MOODS["bad"] = False
    async with SagaRuntime(store, definitions=[ACCOUNT], clock=ManualClock()) as running:
        await opened(running)
        yield running
        assert await check_invariants(store) == []


async def opened(runtime: SagaRuntime, key: str = "a") -> None:
    receipt = await runtime.publish({"type": "Open", "correlationKey": key}, wait=30)
    receipt.raise_for_rejected()


# --- Signals ---------------------------------------------------------------------------------------------------------


async def test_a_signal_is_applied_and_stands_in_the_history(runtime: SagaRuntime) -> None:
    receipt = await runtime.signal("account", "a", NOTE, "hello", id="n-1")

    assert (receipt.disposition, receipt.revision, receipt.signal) == ("applied", 2, "note")
    assert await runtime.query("account", "a", EVERYTHING) == {"total": 0, "notes": ["hello"]}
    entry = (await runtime.history("account", "a"))[-1]
    assert (entry.type, entry.message_id, entry.payload) == ("saga:signal:note", "n-1", b'"hello"')


async def test_a_signal_that_comes_again_under_its_id_changes_nothing(runtime: SagaRuntime) -> None:
    await runtime.signal("account", "a", NOTE, "hello", id="n-1")

    again = await runtime.signal("account", "a", NOTE, "hello", id="n-1")

    assert again.disposition == "duplicate"
    assert (await runtime.query("account", "a", EVERYTHING))["notes"] == ["hello"]  # type: ignore[index,call-overload]


async def test_an_id_that_comes_again_with_something_else_is_refused(runtime: SagaRuntime) -> None:
    await runtime.signal("account", "a", NOTE, "hello", id="n-1")

    with pytest.raises(IdempotencyKeyReused):
        await runtime.signal("account", "a", NOTE, "goodbye", id="n-1")


@pytest.mark.parametrize("talk", ["signal", "update"])
async def test_what_is_said_to_nobody_is_refused_and_leaves_nothing(runtime: SagaRuntime, talk: str) -> None:
    say = runtime.signal if talk == "signal" else runtime.update

    with pytest.raises(InstanceNotFound, match="'nobody' of saga 'account'"):
        await say("account", "nobody", CLOSE)
    with pytest.raises(InstanceNotFound, match="run 7"):
        await say("account", "a", CLOSE, run=7)

    assert await runtime.get_instance("account", "nobody") is None


@pytest.mark.parametrize("talk", ["signal", "update"])
async def test_what_is_said_to_a_run_that_is_over_is_refused_by_type(runtime: SagaRuntime, talk: str) -> None:
    await runtime.signal("account", "a", CLOSE, id="c-1")
    say = runtime.signal if talk == "signal" else runtime.update

    with pytest.raises(InstanceEnded, match="completed and takes no more") as caught:
        await say("account", "a", CLOSE, id="late")

    assert (caught.value.code, caught.value.data["messageId"]) == ("SAGA_INSTANCE_ENDED", "late")
    assert (await runtime.history("account", "a"))[-1].disposition == "ignored"


async def test_a_repeat_of_the_signal_that_ended_a_run_is_a_duplicate(runtime: SagaRuntime) -> None:
    await runtime.signal("account", "a", CLOSE, id="c-1")

    assert (await runtime.signal("account", "a", CLOSE, id="c-1")).disposition == "duplicate"


async def test_a_signal_to_a_paused_run_waits_for_its_resume(runtime: SagaRuntime) -> None:
    await runtime.pause("account", "a")

    receipt = await runtime.signal("account", "a", NOTE, "patient")
    await runtime.resume("account", "a")
    await runtime.settled()

    assert receipt.disposition == "pending"
    assert receipt.reason is not None
    assert "account:a is paused" in receipt.reason
    assert (await runtime.query("account", "a", "everything"))["notes"] == ["patient"]


async def test_signals_and_messages_keep_their_order(runtime: SagaRuntime) -> None:
    for n in range(20):
        if n % 2:
            await runtime.signal("account", "a", NOTE, str(n))
        else:
            await runtime.update("account", "a", ADD, n)

    assert [entry.payload for entry in await runtime.history("account", "a")][1:] == [
        f'"{n}"'.encode() if n % 2 else str(n).encode() for n in range(20)
    ]


@pytest.mark.parametrize(
    ("say", "error", "said"),
    [
        (lambda r: r.signal("account", "a", "hum"), SignalNotFound, "no signal 'hum': it has note, close"),
        (lambda r: r.update("account", "a", "note"), SignalNotFound, "no update 'note': it has add, close"),
        (lambda r: r.signal("acount", "a", NOTE, "x"), SagaNotFound, "no saga 'acount' is loaded here"),
        (lambda r: r.signal("account", "a", NOTE, 7), MessageRejected, "payload of signal 'note'"),
        (lambda r: r.update("account", "a", ADD, "7"), MessageRejected, "payload of update 'add'"),
        (lambda r: r.signal("account", "a", NOTE, object()), MessageRejected, "is not JSON"),
        (lambda r: r.signal("account", "a", NOTE, "x" * 2_000_000), MessageRejected, "at most"),
        (lambda r: r.signal("account", "", NOTE, "x"), MessageRejected, "is empty"),
        (lambda r: r.signal("account", "a", NOTE, "x", id="\ud800"), MessageRejected, "signal id"),
    ],
)
async def test_what_cannot_be_said_is_refused_and_changes_nothing(
    runtime: SagaRuntime, say: Any, error: type[SagasError], said: str
) -> None:
    with pytest.raises(error, match=said):
        await say(runtime)

    assert len(await runtime.history("account", "a")) == 1


async def test_no_message_can_pass_for_a_signal(runtime: SagaRuntime) -> None:
    refused = await runtime.publish({"type": "saga:signal:close", "correlationKey": "a"})

    assert not refused.published
    assert refused.code == "MESSAGE_TYPE_RESERVED"


# --- Updates ---------------------------------------------------------------------------------------------------------


async def test_an_update_is_answered_by_its_handler(runtime: SagaRuntime) -> None:
    receipt = await runtime.update("account", "a", ADD, 3)

    assert (receipt.disposition, receipt.answer, receipt.revision) == ("applied", {"total": 3}, 2)


async def test_a_repeated_update_gets_the_first_answer(runtime: SagaRuntime) -> None:
    await runtime.update("account", "a", ADD, 3, id="u-1")
    for n in range(10):
        await runtime.update("account", "a", ADD, n)

    again = await runtime.update("account", "a", ADD, 3, id="u-1")

    assert (again.duplicate, again.disposition, again.answer) == (True, "applied", {"total": 3})
    assert await runtime.query("account", "a", TOTAL) == 48


async def test_a_refusal_has_the_handlers_own_code_and_changes_nothing(runtime: SagaRuntime) -> None:
    for _ in range(2):  # A repeat is refused in the same words.
        with pytest.raises(UpdateRefused, match="only what is more") as caught:
            await runtime.update("account", "a", ADD, -5, id="u-1")
        assert (caught.value.code, caught.value.data, caught.value.retryable) == ("NEGATIVE", {"got": -5}, False)

    assert await runtime.query("account", "a", TOTAL) == 0
    assert [(entry.disposition, entry.revision) for entry in await runtime.history("account", "a")] == [
        ("applied", 1),
        ("ignored", 1),
    ]
    assert await runtime.dead_letters() == []


async def test_an_update_that_is_given_up_says_so_to_its_caller(runtime: SagaRuntime) -> None:
    for _ in range(2):
        with pytest.raises(UpdateFailed, match="thirteen"):
            await runtime.update("account", "a", ADD, 13, id="u-1")

    assert len(await runtime.dead_letters()) == 1


async def test_an_update_without_an_answer_is_answered_by_nothing(runtime: SagaRuntime) -> None:
    receipt = await runtime.update("account", "a", CLOSE)

    assert (receipt.disposition, receipt.answer, receipt.status) == ("applied", None, "completed")


async def test_a_wait_that_ends_is_pending_and_the_answer_can_be_had_later(runtime: SagaRuntime) -> None:
    await runtime.pause("account", "a")
    receipt = await runtime.update("account", "a", ADD, 3, id="u-1", wait=0.01)
    assert (receipt.disposition, receipt.duplicate) == ("pending", False)
    assert receipt.reason is not None
    assert "paused" in receipt.reason

    waiting = asyncio.create_task(runtime.update("account", "a", ADD, 3, id="u-1", wait=10))
    await asyncio.sleep(0)
    await runtime.resume("account", "a")

    assert (await waiting).answer == {"total": 3}


async def test_an_update_is_answered_after_its_handler_has_recovered(store: SagaStore) -> None:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[ACCOUNT], clock=clock) as runtime:
        await opened(runtime)
        MOODS["bad"] = True
        waiting = asyncio.create_task(runtime.update("account", "a", ADD, 3))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not runtime.health().backlog:  # noqa: ASYNC110 - the attempt that fails has no event of its own
                await asyncio.sleep(0.001)
        MOODS["bad"] = False
        clock.advance("1m")

        assert (await waiting).answer == {"total": 3}


async def test_an_answer_survives_the_process_that_gave_it(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[ACCOUNT], clock=ManualClock()) as runtime:
        await opened(runtime)
        await runtime.update("account", "a", ADD, 3, id="u-1")

    async with SagaRuntime(store, definitions=[ACCOUNT], clock=ManualClock()) as runtime:
        again = await runtime.update("account", "a", ADD, 3, id="u-1")

    assert (again.duplicate, again.answer) == (True, {"total": 3})


async def test_only_an_update_may_answer(store: SagaStore) -> None:
    chatty = define_saga("chatty").state({}).on("Talk", lambda saga, event, context: [answer(1)]).build()
    async with SagaRuntime(store, definitions=[chatty], clock=ManualClock()) as runtime:
        receipt = await runtime.publish({"type": "Talk", "correlationKey": "a"}, wait=30)

    (outcome,) = receipt.raise_for_rejected().outcomes
    assert outcome.disposition == "dead_lettered"
    assert "only the handler of an update may return one" in (outcome.reason or "")


# --- Queries ---------------------------------------------------------------------------------------------------------


async def test_a_query_works_on_a_run_that_is_over(runtime: SagaRuntime) -> None:
    await runtime.update("account", "a", ADD, 3)
    await runtime.signal("account", "a", CLOSE)

    result = await runtime.query_result("account", "a", "total")

    assert (bytes(result.answer), result.status, result.revision) == (b"3", "completed", 3)


@pytest.mark.parametrize(
    ("query", "code", "said"),
    [
        (MEDDLER, "SAGA_QUERY_MUTATED", "has changed the state"),
        (LATER, "SAGA_QUERY_ASYNC", "has to be awaited"),
    ],
)
async def test_a_query_that_does_more_than_read_is_an_error_and_changes_nothing(
    runtime: SagaRuntime, query: Any, code: str, said: str
) -> None:
    with pytest.raises(QueryFailed, match=said) as caught:
        await runtime.query("account", "a", query)

    assert (caught.value.code, caught.value.retryable) == (code, False)
    assert await runtime.query("account", "a", TOTAL) == 0


async def test_a_state_that_no_query_can_read_is_no_fault_of_the_query(runtime: SagaRuntime) -> None:
    found = await runtime.get_instance("account", "a")
    assert found is not None

    with pytest.raises(QueryFailed, match="the stored state cannot be read") as caught:
        answer_query(ACCOUNT, msgspec.structs.replace(found, state=b"{"), "total")

    assert (caught.value.code, caught.value.retryable) == ("SAGA_STATE_UNREADABLE", False)


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda r: r.query("account", "a", "mood"), QueryNotFound),
        (lambda r: r.query("account", "nobody", TOTAL), InstanceNotFound),
        (lambda r: r.query("account", "a", TOTAL, run=2), InstanceNotFound),
        (lambda r: r.query("acount", "a", TOTAL), SagaNotFound),
    ],
)
async def test_what_cannot_be_asked_is_refused(runtime: SagaRuntime, ask: Any, error: type[SagasError]) -> None:
    with pytest.raises(error):
        await ask(runtime)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (lambda state: state["nothing"], "raised KeyError"),
        (lambda state: "three", "no answer that can be sent"),
    ],
)
async def test_a_query_that_goes_wrong_says_how(store: SagaStore, query: Any, said: str) -> None:
    definition = define_saga("s").state({}).on("Go", lambda *_: []).on_query(TOTAL, query).build()
    async with SagaRuntime(store, definitions=[definition], clock=ManualClock()) as runtime:
        await runtime.publish({"type": "Go", "correlationKey": "a"}, wait=30)
        with pytest.raises(QueryFailed, match=said):
            await runtime.query("s", "a", TOTAL)


# --- Several processes -----------------------------------------------------------------------------------------------


async def test_another_process_signals_updates_and_asks_what_this_one_holds(bench: Bench) -> None:
    MOODS["bad"] = False
    one = await bench.live(ACCOUNT)
    other = await bench.live(ACCOUNT)
    await until(lambda: bool(parts_of(one)) and bool(parts_of(other)))
    (key,) = keys_held_by(one, "account", 1)
    await opened(one.runtime, key)

    signalled = await other.runtime.signal("account", key, NOTE, "from afar")
    updated = await other.runtime.update("account", key, ADD, 3, id="u-1")
    with pytest.raises(UpdateRefused, match="only what is more"):
        await other.runtime.update("account", key, ADD, -3)
    again = [await life.runtime.update("account", key, ADD, 3, id="u-1") for life in (one, other)]

    assert signalled.disposition == "pending"
    assert (updated.answer, updated.duplicate) == ({"total": 3}, False)
    assert [(each.answer, each.duplicate) for each in again] == [({"total": 3}, True)] * 2
    assert await other.runtime.query("account", key, EVERYTHING) == {"total": 3, "notes": ["from afar"]}
    await one.runtime.signal("account", key, CLOSE)
    with pytest.raises(InstanceEnded):
        await other.runtime.signal("account", key, NOTE, "too late")


async def test_a_disabled_saga_is_asked_and_not_spoken_to(runtime: SagaRuntime, store: SagaStore) -> None:
    await runtime.stop()
    disabled = dataclasses.replace(ACCOUNT, about=dataclasses.replace(ACCOUNT.about, enabled=False))
    async with SagaRuntime(store, definitions=[disabled], clock=ManualClock()) as other:
        with pytest.raises(BackendUnavailable, match="is disabled") as caught:
            await other.signal("account", "a", NOTE, "hello")

        assert (caught.value.code, caught.value.retryable) == ("SAGA_DISABLED", True)
        assert await other.query("account", "a", TOTAL) == 0
