"""Parents and children, from the spawn to the last end: seen from both sides, through cancels, refusals and kills."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sagaloom import (
    RetryPolicy,
    SagaDefinition,
    SagaMessage,
    define_saga,
    saga_complete,
    saga_fail,
    send,
    spawn,
)
from sagaloom.engine.records import Child
from sagaloom.errors import InstanceNotFound
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.testing import ManualClock, MemoryStore, check_invariants
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import Bench, Life
from tests.runtime.test_sharing import both

pytestmark = pytest.mark.anyio


def _bear(saga: Any, event: Any, context: Any) -> list[Any]:
    policy = event.payload.get("policy", "cancel")
    return [
        spawn("child", SagaMessage("Work", {"n": n}, correlation_key=f"c-{n}"), on_parent_cancel=policy)
        for n in range(event.payload["count"])
    ]


def _counted(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state["ended"] = saga.state.get("ended", 0) + 1
    saga.state["last"] = {key: event.payload.get(key) for key in ("instanceId", "result", "reason")}
    return [saga_complete()] if saga.state["ended"] == event.payload.get("of", 10**9) else []


def _parent(saga_id: str = "parent") -> SagaDefinition[Any]:
    stage = define_saga(saga_id).state({}).on("Bear", _bear)
    for end in ("completed", "failed", "cancelled"):
        stage = stage.on(f"child:{end}", _counted, starts=False)
    return stage.on("BearUnknown", lambda *_: [spawn("nobody", {})], starts=False).build()


def _child(**handlers: Any) -> SagaDefinition[Any]:
    stage = (
        define_saga("child")
        .state({})
        .retry(RetryPolicy(maximum_attempts=2, initial_interval_ms=1_000, jitter=0.0))
        .on("Work", handlers.pop("Work", lambda *_: []))
        .on("Done", lambda saga, event, context: [saga_complete({"n": event.payload["n"]})], starts=False)
        .on("Broken", lambda saga, event, context: [saga_fail("broken")], starts=False)
        .compensate("Work", lambda saga, event, context: [send("service:undo", event.payload)])
    )
    for name, handler in handlers.items():
        stage = stage.on(name, handler, starts=False)
    return stage.build()


async def _born(bench: Bench, count: int, *definitions: Any, **more: Any) -> Life:
    life = await bench.live(*(definitions or (_parent(), _child())))
    await life.publish("Bear", {"count": count, **more}, key="p")
    await life.runtime.settled()
    return life


async def _counts(life: Life) -> dict[str, int]:
    return {name: count for name, count in (await life.runtime.count_children("parent", "p")).items() if count}


async def _until_counted(life: Life, **wanted: int) -> None:
    """Waits for what two processes do together, of which neither knows when it is done."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not wanted.items() <= (await _counts(life)).items():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)


async def _state(life: Life, saga_id: str = "parent", key: str = "p") -> Any:
    return json.loads((await life.instance(saga_id, key)).state)


async def test_a_parent_and_its_children_are_seen_from_both_sides(bench: Bench) -> None:
    life = await _born(bench, 3)

    children = await life.runtime.children("parent", "p")
    child = await life.instance("child", "c-1")

    assert [(each.saga_id, each.key, each.status) for each in children] == [
        ("child", "c-0", "live"),
        ("child", "c-1", "live"),
        ("child", "c-2", "live"),
    ]
    assert child.parent is not None
    assert (child.parent.saga_id, child.parent.key, child.parent.run) == ("parent", "p", 1)
    assert child.parent.effect_key == children[1].effect_key
    assert (await life.instance("parent", "p")).children == 3


@pytest.mark.parametrize(
    ("message", "status", "told"),
    [
        ("Done", "completed", {"instanceId": "child:c-0", "result": {"n": 0}, "reason": None}),
        ("Broken", "failed", {"instanceId": "child:c-0", "result": None, "reason": "broken"}),
    ],
)
async def test_the_end_of_a_child_moves_its_row_and_reaches_the_run_of_its_parent(
    bench: Bench, message: str, status: Any, told: Any
) -> None:
    life = await _born(bench, 2)

    await life.publish(message, {"n": 0}, key="c-0")
    await life.runtime.settled()

    assert await _counts(life) == {"live": 1, status: 1}
    (ended,) = await life.runtime.children("parent", "p", status=status)
    assert (ended.key, ended.run, ended.ended_at) == ("c-0", 1, bench.clock.now())
    assert (await _state(life))["last"] == told


async def test_children_are_listed_page_by_page(bench: Bench) -> None:
    life = await _born(bench, 5)

    first = await life.runtime.children("parent", "p", limit=3)
    rest = await life.runtime.children("parent", "p", after=(first[-1].revision, first[-1].position), limit=3)

    assert [each.key for each in (*first, *rest)] == [f"c-{n}" for n in range(5)]


async def test_who_has_no_instance_has_no_children(bench: Bench) -> None:
    life = await bench.live(_parent(), _child())

    with pytest.raises(InstanceNotFound):
        await life.runtime.children("parent", "nobody")
    with pytest.raises(InstanceNotFound):
        await life.runtime.count_children("parent", "nobody")


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_cancelling_a_parent_cancels_its_children_and_undoes_their_steps(bench: Bench) -> None:
    life = await _born(bench, 3)

    await life.runtime.cancel("parent", "p", reason="ordered twice")
    await life.runtime.settled()

    child = await life.instance("child", "c-2")
    assert (child.status, child.reason) == ("cancelled", "its parent parent:p was ended: ordered twice")
    assert await _counts(life) == {"cancelled": 3}
    assert sorted(bench.receiver.payloads) == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
    assert [entry.type for entry in await life.history("parent", "p")] == ["Bear", "saga:cancel"]
    assert await check_invariants(life.runtime.store) == []


async def test_children_that_were_spawned_to_be_abandoned_live_on(bench: Bench) -> None:
    life = await _born(bench, 2, policy="abandon")

    await life.runtime.cancel("parent", "p")
    await life.runtime.settled()

    assert await _counts(life) == {"live": 2}
    assert (await life.instance("child", "c-0")).status == "running"


async def test_terminating_a_parent_terminates_its_children_as_they_stand(bench: Bench) -> None:
    life = await _born(bench, 2)

    await life.runtime.terminate("parent", "p")
    await life.runtime.settled()

    assert await _counts(life) == {"cancelled": 2}
    assert bench.receiver.payloads == []


async def test_a_cancel_reaches_grandchildren_and_paused_children(bench: Bench) -> None:
    child = _child(Work=lambda *_: [spawn("grandchild", SagaMessage("Work", {}, correlation_key="g"))])
    grandchild = define_saga("grandchild").state({}).on("Work", lambda *_: []).build()
    life = await _born(bench, 1, _parent(), child, grandchild)
    await life.runtime.pause("child", "c-0")

    await life.runtime.cancel("parent", "p")
    await life.runtime.settled()

    assert (await life.instance("child", "c-0")).status == "cancelled"
    assert (await life.instance("grandchild", "g")).status == "cancelled"


async def test_a_child_whose_first_message_is_being_retried_is_cancelled_when_it_has_begun(bench: Bench) -> None:
    def work(saga: Any, event: Any, context: Any) -> list[Any]:
        if context.attempt == 1:
            raise ConnectionError("not yet")
        return []

    life = await _born(bench, 1, _parent(), _child(Work=work))

    await life.runtime.cancel("parent", "p")
    await life.runtime.settled()
    await bench.advance("1s")

    assert (await life.instance("child", "c-0")).status == "cancelled"


async def test_cancels_of_many_children_go_on_after_a_kill(bench: Bench) -> None:
    life = await _born(bench, 2_500)
    await life.runtime.cancel("parent", "p")
    await bench.die(life)

    life = await bench.live(_parent(), _child())
    await life.runtime.settled(20)

    assert await _counts(life) == {"cancelled": 2_500}


async def test_children_that_another_process_holds_end_with_their_parent(bench: Bench) -> None:
    one, other = await both(bench, _parent(), _child())
    await one.publish("Bear", {"count": 40}, key="p")
    await one.publish("Done", {"n": 0}, key="c-0", wait=30)
    await _until_counted(one, completed=1)

    await other.runtime.cancel("parent", "p")
    await _until_counted(other, cancelled=39)

    assert await _counts(one) == {"completed": 1, "cancelled": 39}
    assert await check_invariants(one.runtime.store) == []


# --- children that never come to be ----------------------------------------------------------------------------------


async def test_a_spawn_of_an_unknown_saga_is_a_dead_letter_that_says_so(bench: Bench) -> None:
    life = await _born(bench, 0)

    await life.publish("BearUnknown", key="p")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert (letter.saga_id, letter.key, letter.code) == ("parent", "p", "SAGA_NOT_FOUND")
    assert "no loaded definition is a child saga of that name" in letter.reason
    assert await _counts(life) == {"live": 1}


async def test_discarding_the_first_message_of_a_child_tells_its_parent(bench: Bench) -> None:
    def work(saga: Any, event: Any, context: Any) -> list[Any]:
        raise ConnectionError("never")

    life = await _born(bench, 1, _parent(), _child(Work=work))
    await bench.advance("1s")
    (letter,) = await life.runtime.dead_letters()

    await life.runtime.discard(letter.id)
    await life.runtime.settled()

    told = (await _state(life))["last"]
    assert told["reason"].startswith("its first message was given up and discarded: ")
    assert await _counts(life) == {"failed": 1}


async def test_a_dead_spawn_that_is_redriven_becomes_the_child_that_it_was_to_be(bench: Bench) -> None:
    life = await _born(bench, 0)
    await life.publish("BearUnknown", key="p")
    await life.runtime.settled()
    (letter,) = await life.runtime.dead_letters()
    nobody = define_saga("nobody").state({}).on("nobody", lambda *_: []).build()
    life.runtime.register(nobody)

    await life.runtime.redrive(letter.id)
    await life.runtime.settled()

    (child,) = await life.runtime.children("parent", "p")
    assert (await life.instance("nobody", child.key)).parent is not None


async def test_a_child_whose_key_is_taken_is_refused_and_its_parent_hears_so(bench: Bench) -> None:
    life = await bench.live(_parent(), _child())
    await life.publish("Work", {"n": "a stranger"}, key="c-0")
    await life.publish("Bear", {"count": 2}, key="p")
    await life.runtime.settled()

    told = (await _state(life))["last"]
    assert told["reason"] == "child:c-0 is there already, and is not this child: spawn it under a key of its own"
    assert await _counts(life) == {"live": 1, "failed": 1}
    assert (await life.instance("child", "c-0")).parent is None


async def test_sagas_that_spawn_each_other_in_a_circle_meet_the_limit_of_hops(bench: Bench) -> None:
    ping = define_saga("ping").state({}).on("Go", lambda *_: [spawn("pong", {})]).build()
    pong = define_saga("pong").state({}).on("Back", lambda *_: [spawn("ping", {})]).build()
    life = await bench.live(ping, pong)

    await life.publish("Go", key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert letter.code == "SAGA_HOPS_EXCEEDED"
    assert "sagas that send to each other in a circle?" in letter.reason


async def test_the_end_of_a_child_is_kept_for_a_parent_whose_saga_is_not_loaded(bench: Bench) -> None:
    life = await _born(bench, 1)
    await bench.end(life)
    life = await bench.live(_child())
    await life.publish("Done", {"n": 0}, key="c-0")
    await life.runtime.settled()
    letters = await life.runtime.dead_letters()

    assert [(each.saga_id, each.key, each.type) for each in letters] == [("parent", "p", "child:completed")]


# --- many ------------------------------------------------------------------------------------------------------------


async def test_a_join_over_many_children_costs_each_the_same(bench: Bench) -> None:
    """The row of the parent is as large with a thousand children as with ten."""
    sizes: list[int] = []
    for count in (10, 1_000):
        store = MemoryStore()
        async with SagaRuntime(store, definitions=[_parent(), _child()], clock=ManualClock()) as runtime:
            await runtime.publish(SagaMessage("Bear", {"count": count}, correlation_key="p"))
            await runtime.settled(30)
            for n in range(count):
                await runtime.publish(SagaMessage("Done", {"n": 7}, correlation_key=f"c-{n}"))
            await runtime.settled(30)
            (loaded,) = await store.load([("parent", "p")])
            assert loaded.instance is not None
            assert json.loads(loaded.instance.state)["ended"] == count
            assert (await runtime.count_children("parent", "p"))["completed"] == count
            sizes.append(len(loaded.instance.state) + len(loaded.instance.steps) + len(loaded.instance.timers))

    assert sizes[1] - sizes[0] < 20


async def test_ten_thousand_children_can_be_spawned_by_one_message(bench: Bench) -> None:
    life = await _born(bench, 10_000)

    assert await _counts(life) == {"live": 10_000}
    assert isinstance((await life.runtime.children("parent", "p", limit=1))[0], Child)
