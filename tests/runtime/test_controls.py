"""What an operator does while the runtime runs: order is kept, nothing is lost, and a restart changes neither."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sagaloom import (
    RetryPolicy,
    SagaMessage,
    cancel_scheduled,
    define_saga,
    saga_complete,
    schedule,
    send,
    spawn,
)
from sagaloom.errors import BackendUnavailable, InstanceNotFound, MessageRejected
from sagaloom.runtime.receipts import PublishReceipt, PublishRejected
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.testing import ManualClock, MemoryStore, check_invariants
from tests.runtime.conftest import STORES, Bench, Life

__all__ = ["STORES"]


def _note(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], event.payload.get("n", event.type)]}
    return []


def _begin(saga: Any, event: Any, context: Any) -> list[Any]:
    return [schedule(SagaMessage("Late", {}), "1m", name="late")]


def _call_off(saga: Any, event: Any, context: Any) -> list[Any]:
    return [*_note(saga, event, context), cancel_scheduled("late")]


def _settle(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_complete()]


def _saga(**handlers: Any) -> Any:
    stage = define_saga("s").state({"seen": []}).retry(RetryPolicy(jitter=0.0)).on("Add", _note)
    stage = stage.on("Begin", _begin).on("Late", _note, starts=False).on("CallOff", _call_off, starts=False)
    for name, handler in handlers.items():
        stage = stage.on(name, handler)
    return stage.build()


async def _seen(life: Life, key: str = "k", run: int | None = None) -> list[Any]:
    seen: list[Any] = json.loads((await life.instance("s", key, run)).state)["seen"]
    return seen


# ---------------------------------------------------------------- cancel


async def test_cancelling_ends_a_run_and_is_heard_after_its_commit(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")

    outcome = await life.runtime.cancel("s", "k", reason="ordered twice")

    assert (outcome.disposition, outcome.status, outcome.revision) == ("applied", "cancelled", 2)
    assert (outcome.reason, outcome.instance_id) == ("ordered twice", "s:k")
    assert (await life.instance("s", "k")).status == "cancelled"
    assert await life.runtime.store.timers() == []
    assert [entry.type for entry in await life.history("s", "k")] == ["Begin", "saga:cancel"]


async def test_cancelling_twice_is_ignored_the_second_time(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", key="k")

    first, second = [await life.runtime.cancel("s", "k") for _ in range(2)]

    assert (first.disposition, second.disposition) == ("applied", "ignored")
    assert (second.status, second.revision) == ("cancelled", 2)
    assert (await life.history("s", "k"))[-1].disposition == "ignored"


async def test_a_cancelled_run_takes_no_more_messages(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", {"n": 1}, key="k")
    await life.runtime.cancel("s", "k")

    late = await life.publish("Add", {"n": 2}, key="k")

    assert (late.disposition, late.status) == ("ignored", "cancelled")
    assert await _seen(life) == [1]


async def test_a_parent_s_run_hears_of_the_cancelled_child(bench: Bench) -> None:
    def bear(saga: Any, event: Any, context: Any) -> list[Any]:
        return [spawn("s", SagaMessage("Add", {"n": 1}, correlation_key="child"))]

    def heard(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state = {"why": event.payload["reason"]}
        return [saga_complete()]

    parent = define_saga("parent").state({}).on("Bear", bear).on("s:cancelled", heard, starts=False).build()
    life = await bench.live(_saga(), parent)
    await life.publish("Bear", key="p")
    await life.runtime.settled()

    await life.runtime.cancel("s", "child", reason="ordered twice")
    await life.runtime.settled()

    told = await life.instance("parent", "p")
    assert (told.status, json.loads(told.state)) == ("completed", {"why": "ordered twice"})


async def test_effects_that_were_committed_leave_though_their_run_was_cancelled(bench: Bench) -> None:
    def pay(saga: Any, event: Any, context: Any) -> list[Any]:
        return [send("service:bank", {"n": event.payload["n"]})]

    bench.receiver.gate = asyncio.Event()
    life = await bench.live(_saga(Pay=pay))
    await life.publish("Pay", {"n": 1}, key="k")
    await life.publish("Pay", {"n": 2}, key="k")

    await life.runtime.cancel("s", "k")
    bench.receiver.gate.set()
    await life.runtime.settled()

    assert bench.receiver.payloads == [b'{"n":1}', b'{"n":2}']


async def test_a_run_whose_definition_is_gone_can_be_cancelled(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", key="k")
    await bench.end(life)
    life = await bench.live(define_saga("other").state({"seen": []}).on("Else", _note).build())

    outcome = await life.runtime.cancel("s", "k")

    assert outcome.status == "cancelled"


async def test_one_run_of_many_can_be_named(bench: Bench) -> None:
    life = await bench.live(_saga())
    for _ in range(3):
        await life.publish("Add")
    key = "s:Add"

    await life.runtime.cancel("s", key, run=2)

    assert [(await life.instance("s", key, run)).status for run in (1, 2, 3)] == ["running", "cancelled", "running"]


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
@pytest.mark.parametrize(("key", "run"), [("nobody", None), ("k", 2), ("k", 0)])
async def test_a_control_of_nobody_is_refused_and_leaves_nothing(
    bench: Bench, verb: str, key: str, run: int | None
) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", key="k")

    with pytest.raises(InstanceNotFound, match=f"s:{key}"):
        await getattr(life.runtime, verb)("s", key, run=run)

    assert (await life.runtime.store.load([("s", "nobody")]))[0].head is None
    assert len(await life.history("s", "k")) == 1


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
async def test_a_key_whose_first_message_waits_cannot_be_controlled_yet(bench: Bench, verb: str) -> None:
    def fail(saga: Any, event: Any, context: Any) -> list[Any]:
        raise RuntimeError

    life = await bench.live(_saga(Fail=fail))
    await life.publish("Fail", key="k")

    with pytest.raises(MessageRejected, match="s:k has not begun") as refused:
        await getattr(life.runtime, verb)("s", "k")

    assert (refused.value.code, refused.value.retryable) == ("SAGA_INSTANCE_PENDING", True)
    assert (await life.instance("s", "k")).status == "pending"


async def test_no_door_takes_a_control_in(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", key="k")

    refused = await life.runtime.publish(SagaMessage("saga:cancel", {}, correlation_key="k"))

    assert isinstance(refused, PublishRejected)
    assert (refused.code, refused.retryable) == ("MESSAGE_TYPE_RESERVED", False)
    assert (await life.instance("s", "k")).status == "running"


async def test_a_runtime_that_is_not_running_takes_no_controls(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.runtime.stop()

    with pytest.raises(BackendUnavailable, match="stopped"):
        await life.runtime.cancel("s", "k")


# ---------------------------------------------------------------- pause and resume


async def test_messages_to_a_paused_run_wait_in_order_and_come_before_newer_ones(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", {"n": 0}, key="k")
    pausing = await life.runtime.pause("s", "k", reason="bank is down")

    waiting = [await life.publish("Add", {"n": n}, key="k") for n in (1, 2, 3)]
    while_paused = await _seen(life)
    count = life.runtime.health().backlog
    resuming, *newer = await asyncio.gather(
        life.runtime.resume("s", "k"), *(life.publish("Add", {"n": n}, key="k") for n in (4, 5))
    )
    await life.runtime.settled()

    assert (pausing.disposition, pausing.revision, resuming.revision) == ("applied", 2, 3)
    assert [outcome.disposition for outcome in waiting] == ["pending"] * 3
    assert (while_paused, count) == ([0], 3)
    assert all(outcome.disposition in ("pending", "applied") for outcome in newer)
    assert await _seen(life) == [0, 1, 2, 3, 4, 5]
    assert life.runtime.health().backlog == 0
    assert await check_invariants(life.runtime.store) == []


async def test_what_is_offered_in_one_batch_with_pause_and_resume_keeps_its_order(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", {"n": 0}, key="k")

    await asyncio.gather(
        life.publish("Add", {"n": 1}, key="k"),
        life.runtime.pause("s", "k"),
        life.publish("Add", {"n": 2}, key="k"),
        life.publish("Add", {"n": 3}, key="k"),
        life.runtime.resume("s", "k"),
        life.publish("Add", {"n": 4}, key="k"),
    )
    await life.runtime.settled()

    assert await _seen(life) == [0, 1, 2, 3, 4]


async def test_a_publisher_that_waits_for_a_paused_run_hears_pending_then_the_end(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", {"n": 0}, key="k")
    await life.runtime.pause("s", "k")

    early = await life.publish("Add", {"n": 1}, key="k", wait=0.01)
    patient = asyncio.create_task(life.publish("Add", {"n": 2}, key="k", wait=10.0))
    await asyncio.sleep(0)
    await life.runtime.settled()
    await life.runtime.resume("s", "k")

    assert (early.disposition, early.status) == ("pending", None)
    assert ((await patient).disposition, (await patient).state) == ("applied", {"seen": [0, 1, 2]})


async def test_a_restart_while_paused_changes_nothing(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")
    await life.runtime.pause("s", "k")
    await life.publish("Add", {"n": 1}, key="k")
    await life.publish("Add", {"n": 2}, key="k")
    await bench.die(life)

    life = await bench.live(_saga())
    await life.runtime.settled()
    still = (await _seen(life), (await life.instance("s", "k")).is_paused, life.runtime.health().backlog)
    await life.publish("Add", {"n": 3}, key="k")
    await bench.advance("2m")
    await life.runtime.resume("s", "k")
    await life.runtime.settled()

    assert still == ([], True, 2)
    assert await _seen(life) == [1, 2, 3, "Late"]
    assert await check_invariants(life.runtime.store) == []


async def test_a_timer_that_falls_due_waits_and_can_still_be_called_off(bench: Bench) -> None:
    life = await bench.live(_saga())
    for key in ("late", "off"):
        await life.publish("Begin", key=key)
        await life.runtime.pause("s", key)
    await life.publish("CallOff", key="off")
    await bench.advance("2m")

    before = [await _seen(life, "late"), await _seen(life, "off")]
    for key in ("late", "off"):
        await life.runtime.resume("s", key)
    await life.runtime.settled()

    assert before == [[], []]
    assert [await _seen(life, "late"), await _seen(life, "off")] == [["Late"], ["CallOff"]]
    assert await life.runtime.store.timers() == []
    assert await check_invariants(life.runtime.store) == []


async def test_an_answer_to_a_paused_run_waits(bench: Bench) -> None:
    def ask(saga: Any, event: Any, context: Any) -> list[Any]:
        return [send("service:bank", {})]

    bench.receiver.answer = lambda effect: [SagaMessage("Add", {"n": "answer"})]
    bench.receiver.gate = asyncio.Event()
    life = await bench.live(_saga(Ask=ask))
    await life.publish("Ask", key="k")
    await life.runtime.pause("s", "k")

    bench.receiver.gate.set()
    await life.runtime.settled()
    before = await _seen(life)
    await life.runtime.resume("s", "k")
    await life.runtime.settled()

    assert (before, await _seen(life)) == ([], ["answer"])


async def test_a_message_between_two_attempts_waits_for_the_resume(bench: Bench) -> None:
    failures = iter([RuntimeError("no luck")])

    def fail_once(saga: Any, event: Any, context: Any) -> list[Any]:
        for error in failures:
            raise error
        return _note(saga, event, context)

    life = await bench.live(_saga(Try=fail_once))
    await life.publish("Add", {"n": 0}, key="k")
    await life.publish("Try", {"n": 1}, key="k")
    await life.runtime.pause("s", "k")
    await life.publish("Add", {"n": 2}, key="k")

    await bench.advance("10s")
    before = await _seen(life)
    await life.runtime.resume("s", "k")
    await life.runtime.settled()

    assert (before, await _seen(life)) == ([0], [0, 1, 2])


async def test_a_paused_run_does_not_keep_the_other_runs_of_its_key_waiting(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin")
    await life.runtime.pause("s", "s:Begin")

    other = await life.publish("Begin")
    await bench.advance("2m")

    assert (other.disposition, other.run) == ("applied", 2)
    assert [await _seen(life, "s:Begin", run) for run in (1, 2)] == [[], ["Late"]]

    await life.runtime.resume("s", "s:Begin", run=1)
    await life.runtime.settled()

    assert await _seen(life, "s:Begin", 1) == ["Late"]


async def test_cancelling_a_paused_run_ignores_what_waited(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Begin", key="k")
    await life.runtime.pause("s", "k")
    await life.publish("Add", {"n": 1}, key="k")
    await bench.advance("2m")

    await life.runtime.cancel("s", "k")
    await life.runtime.settled()

    dispositions = [(entry.type, entry.disposition) for entry in await life.history("s", "k")]
    assert dispositions == [
        ("Begin", "applied"),
        ("saga:pause", "applied"),
        ("saga:cancel", "applied"),
        ("Add", "ignored"),
    ]
    assert (await life.runtime.store.timers(), await life.runtime.store.inbox_page(after=None, limit=9)) == ([], [])
    assert await check_invariants(life.runtime.store) == []


async def test_what_waited_for_a_cancelled_run_opens_the_next_one_in_its_order(bench: Bench) -> None:
    saga = define_saga("s").state({"seen": []}).on("Add", _note).reuse("new_run").build()
    life = await bench.live(saga)
    await life.publish("Add", {"n": 0}, key="k")
    await life.runtime.pause("s", "k")
    await life.publish("Add", {"n": 1}, key="k")

    await asyncio.gather(life.runtime.cancel("s", "k"), life.publish("Add", {"n": 2}, key="k"))
    await life.runtime.settled()

    assert [await _seen(life, "k", run) for run in (1, 2)] == [[0], [1, 2]]


async def test_pausing_and_resuming_twice_is_ignored_and_recorded(bench: Bench) -> None:
    life = await bench.live(_saga())
    await life.publish("Add", {"n": 0}, key="k")

    outcomes = [await getattr(life.runtime, verb)("s", "k") for verb in ("resume", "pause", "pause", "resume")]

    assert [(outcome.disposition, outcome.revision) for outcome in outcomes] == [
        ("ignored", 1),
        ("applied", 2),
        ("ignored", 2),
        ("applied", 3),
    ]
    assert [entry.disposition for entry in await life.history("s", "k")][1:] == [
        outcome.disposition for outcome in outcomes
    ]


class GatedStore(MemoryStore):
    """Commits when the gate is open, and fails those that it is told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.arrived = asyncio.Event()
        self.failing: list[bool] = []

    async def commit(self, units: Any, *, lease: Any) -> Any:
        self.arrived.set()
        await self.gate.wait()
        if self.failing and self.failing.pop(0):
            raise BackendUnavailable("the disk is full")
        return await super().commit(units, lease=lease)


async def test_a_pause_that_could_not_be_written_keeps_nobody_waiting() -> None:
    def pass_on(saga: Any, event: Any, context: Any) -> list[Any]:
        return [send("Add", event.payload)]

    store = GatedStore()
    store.gate.set()
    sender = define_saga("sender").state({}).on("Pass", pass_on).build()
    runtime = SagaRuntime(store, definitions=[_saga(), sender], clock=ManualClock())
    async with runtime:
        await _published(runtime, SagaMessage("Add", {"n": 0}, correlation_key="k"))
        store.gate.clear()
        store.arrived.clear()
        passing = asyncio.create_task(_published(runtime, SagaMessage("Pass", {"n": 1}, correlation_key="k")))
        await store.arrived.wait()
        # Offered while that commit is under way: the message that it leaves in the inbox comes right behind the pause,
        # and in one batch with it.
        pausing = asyncio.create_task(runtime.pause("s", "k"))
        await asyncio.sleep(0)
        store.failing = [False, True]
        store.gate.set()
        await passing

        with pytest.raises(BackendUnavailable, match="the disk is full"):
            await pausing
        await runtime.settled()

        instance = await runtime.get_instance("s", "k")
        assert instance is not None
        assert (instance.is_paused, json.loads(instance.state)) == (False, {"seen": [0, 1]})
        assert runtime.health().backlog == 0


async def _published(runtime: SagaRuntime, message: SagaMessage[Any]) -> None:
    receipt = await runtime.publish(message)
    assert isinstance(receipt, PublishReceipt), receipt


# ---------------------------------------------------------------- any story


verbs = st.lists(
    st.tuples(st.sampled_from(("publish", "publish", "publish", "pause", "resume", "cancel", "time")), st.booleans()),
    min_size=1,
    max_size=25,
)


@given(verbs, st.booleans())
@settings(max_examples=60)
def test_no_order_of_controls_breaks_an_invariant(said: list[tuple[str, bool]], reuses: bool) -> None:
    asyncio.run(_tell(said, reuses))


async def _tell(said: list[tuple[str, bool]], reuses: bool) -> None:
    """Tells a story, in batches: each verb waits for the ones before it, or goes in together with them. Every message
    is applied or ignored in the end, in the order of its number."""
    saga = define_saga("s").state({"seen": []}).on("Add", _timed).on("Late", _note, starts=False)
    definition = saga.reuse("new_run" if reuses else "reject").build()
    clock, store = ManualClock(), MemoryStore()
    async with SagaRuntime(store, definitions=[definition], clock=clock) as runtime:
        under_way: list[asyncio.Task[Any]] = []
        for number, (verb, waits) in enumerate(said, start=1):
            if verb == "publish":
                message = SagaMessage("Add", {"n": number, "sequence": number}, "k", id=f"m-{number}")
                under_way.append(asyncio.create_task(_published(runtime, message)))
            elif verb == "time":
                clock.advance("40s")
            else:
                under_way.append(asyncio.create_task(_asked(runtime, verb)))
            await asyncio.sleep(0)  # so that they are offered in this order
            if waits:
                await asyncio.gather(*under_way)
                await runtime.settled()
        await asyncio.gather(*under_way)
        await runtime.settled()
        breaches_at_rest = await check_invariants(store)
        await _asked(runtime, "resume")
        await runtime.settled()

        history = [entry for entries in store.entries.values() for entry in entries]
        numbers = [json.loads(entry.payload)["n"] for entry in history if entry.type == "Add"]
        assert numbers == [number for number, (verb, _) in enumerate(said, start=1) if verb == "publish"]
        assert breaches_at_rest == []
        assert await check_invariants(store) == []
        assert store.inbox == {}


def _timed(saga: Any, event: Any, context: Any) -> list[Any]:
    return [*_note(saga, event, context), schedule(SagaMessage("Late", {}), "1m", name="late")]


async def _asked(runtime: SagaRuntime, verb: str) -> None:
    with contextlib.suppress(InstanceNotFound):
        await getattr(runtime, verb)("s", "k")
