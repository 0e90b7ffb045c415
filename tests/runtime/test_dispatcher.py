"""What the dispatcher promises: lanes in order, attempts that are counted, dead letters that hold their lane."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sagaloom import RetryPolicy, SagaMessage, define_saga, send
from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import DeliveryFailed
from sagaloom.ports.store import UnitOfWork
from sagaloom.runtime import dispatcher as dispatcher_module
from tests.runtime.conftest import STORES, Bench

__all__ = ["STORES"]


def _sender(targets: tuple[str, ...] = ("service:payments",), **options: Any) -> Any:
    """A saga that sends the payload of every `Go` to each target, and notes every `Answer`."""

    def go(saga: Any, event: Any, context: Any) -> list[Any]:
        return [send(target, event.payload, **options) for target in targets]

    def answer(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state = {"answers": [*saga.state["answers"], event.payload]}
        return []

    return define_saga("sender").state({"answers": []}).on("Go", go).on("Answer", answer, starts=False).build()


def _numbers(bench: Bench) -> list[int]:
    return [json.loads(payload)["n"] for payload in bench.receiver.payloads]


async def test_the_effects_of_a_lane_leave_in_order(bench: Bench) -> None:
    life = await bench.live(_sender())

    for n in range(20):
        await life.publish("Go", {"n": n}, key="k")
    await life.runtime.settled()

    assert _numbers(bench) == list(range(20))
    assert len({effect.effect_key for effect in bench.receiver.got}) == 20


async def test_a_slow_lane_does_not_stop_another_one(bench: Bench) -> None:
    life = await bench.live(_sender())
    stuck = asyncio.Event()

    async def deliver(effect: OutboxEffect) -> list[Any]:
        if effect.key == "slow":
            await stuck.wait()
        bench.receiver.got.append(effect)
        return []

    bench.receiver.deliver = deliver  # type: ignore[method-assign]
    await life.publish("Go", {"n": 1}, key="slow")
    await life.publish("Go", {"n": 2}, key="fast")
    while not bench.receiver.got:  # noqa: ASYNC110 - a list has no event
        await asyncio.sleep(0)

    assert _numbers(bench) == [2]
    stuck.set()
    await life.runtime.settled()
    assert _numbers(bench) == [2, 1]


async def test_the_head_of_a_lane_blocks_it_until_its_retries_succeed(bench: Bench) -> None:
    life = await bench.live(_sender(retry=RetryPolicy(jitter=0.0)))
    failures = iter([DeliveryFailed("503"), DeliveryFailed("503")])
    bench.receiver.answer = lambda effect: next(failures, ())

    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Go", {"n": 2}, key="k")
    await life.runtime.settled()
    assert _numbers(bench) == [1]
    await bench.advance("1s")
    assert _numbers(bench) == [1, 1]
    await bench.advance("2s")

    assert _numbers(bench) == [1, 1, 1, 2]
    assert [effect.attempt for effect in bench.receiver.got] == [0, 1, 2, 0]
    assert len({effect.effect_key for effect in bench.receiver.got[:3]}) == 1


async def test_attempts_are_counted_across_a_restart(bench: Bench) -> None:
    definition = _sender(retry=RetryPolicy(jitter=0.0))
    life = await bench.live(definition)
    bench.receiver.answer = lambda effect: DeliveryFailed("503")
    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()
    await bench.die(life)
    life = await bench.live(definition)
    await life.runtime.settled()
    assert len(bench.receiver.got) == 1

    await bench.advance("1s")

    assert [effect.attempt for effect in bench.receiver.got] == [0, 1]


async def test_an_effect_that_was_not_settled_leaves_again_under_its_key(bench: Bench) -> None:
    life = await bench.live(_sender())
    bench.receiver.gate = asyncio.Event()
    await life.publish("Go", {"n": 1}, key="k")
    await bench.die(life)
    bench.receiver.gate = None

    life = await bench.live(_sender())
    await life.runtime.settled()

    assert _numbers(bench) == [1]
    assert (await life.history("sender", "k"))[0].steps[0].effects[0].effect_key == bench.receiver.got[0].effect_key


async def test_a_dead_letter_holds_its_lane_also_after_a_restart(bench: Bench) -> None:
    definition = _sender()
    life = await bench.live(definition)
    bench.receiver.answer = lambda effect: DeliveryFailed("declined", retryable=False)
    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Go", {"n": 2}, key="k")
    await life.runtime.settled()
    await bench.die(life)
    bench.receiver.answer = lambda effect: ()
    life = await bench.live(definition)
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert (letter.type, letter.reason, letter.attempts) == ("service:payments", "declined", 1)
    assert _numbers(bench) == [1]
    assert life.runtime.health().stalled_lanes == 1


async def test_a_redriven_effect_goes_first_and_under_its_old_key(bench: Bench) -> None:
    life = await bench.live(_sender())
    bench.receiver.answer = lambda effect: DeliveryFailed("declined", retryable=False)
    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Go", {"n": 2}, key="k")
    await life.runtime.settled()
    (letter,) = await life.runtime.dead_letters()
    bench.receiver.answer = lambda effect: ()

    await life.runtime.redrive(letter.id)
    await life.runtime.settled()

    assert _numbers(bench) == [1, 1, 2]
    assert bench.receiver.got[0].effect_key == bench.receiver.got[1].effect_key
    assert await life.runtime.dead_letters() == []


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_discarded_effect_lets_the_next_one_go(bench: Bench, restarts: bool) -> None:
    life = await bench.live(_sender())
    bench.receiver.answer = lambda effect: DeliveryFailed("declined", retryable=False)
    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Go", {"n": 2}, key="k")
    await life.runtime.settled()
    bench.receiver.answer = lambda effect: ()
    if restarts:
        await bench.die(life)
        life = await bench.live(_sender())
    (letter,) = await life.runtime.dead_letters()

    await life.runtime.discard(letter.id)
    await life.runtime.settled()

    assert _numbers(bench) == [1, 2]
    assert life.runtime.health().stalled_lanes == 0


async def test_a_lane_may_go_on_after_a_dead_letter(bench: Bench) -> None:
    life = await bench.live(_sender(on_dead_letter="continue"))
    bench.receiver.answer = lambda effect: (
        DeliveryFailed("declined", retryable=False) if json.loads(effect.payload)["n"] == 1 else ()
    )
    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Go", {"n": 2}, key="k")
    await life.runtime.settled()
    assert _numbers(bench) == [1, 2]
    (letter,) = await life.runtime.dead_letters()
    bench.receiver.answer = lambda effect: ()

    await life.runtime.redrive(letter.id)
    await life.runtime.settled()

    assert _numbers(bench) == [1, 2, 1]


async def test_attempts_that_are_spent_make_a_dead_letter(bench: Bench) -> None:
    life = await bench.live(_sender(retry=RetryPolicy(maximum_attempts=2, jitter=0.0)))
    bench.receiver.answer = lambda effect: RuntimeError("boom")
    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    await bench.advance("1s")

    (letter,) = await life.runtime.dead_letters()
    assert (letter.attempts, letter.reason) == (2, "RuntimeError: boom")
    assert letter.traceback is not None
    assert "boom" in letter.traceback


async def test_answers_come_back_to_the_run_that_asked(bench: Bench) -> None:
    life = await bench.live(_sender())
    bench.receiver.answer = lambda effect: [SagaMessage("Answer", {"ok": True})]

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    instance = await life.instance("sender", "k")
    assert json.loads(instance.state) == {"answers": [{"ok": True}]}
    entry = (await life.history("sender", "k"))[1]
    assert (entry.origin, entry.causation_id) == ("reply", bench.receiver.got[0].effect_key)


async def test_an_answer_that_is_no_message_fails_the_attempt(bench: Bench) -> None:
    life = await bench.live(_sender(retry=RetryPolicy(maximum_attempts=1)))
    bench.receiver.answer = lambda effect: [42]

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert "42 is no message" in letter.reason


async def test_a_target_that_nobody_registered_is_named(bench: Bench) -> None:
    life = await bench.live(_sender(("pigeon:north",)))

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert "no target of kind 'pigeon'" in letter.reason


async def test_a_target_that_hangs_is_cut_off(bench: Bench) -> None:
    life = await bench.live(_sender(retry=RetryPolicy(maximum_attempts=1)), dispatch_timeout_seconds=0.01)
    bench.receiver.gate = asyncio.Event()

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert letter.reason == "no answer within 0.01 s"


async def test_more_effects_than_memory_keeps_are_read_when_their_turn_comes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "_BODIES_RESIDENT_MAX", 3)
    life = await bench.live(_sender(("service:a", "service:b")))
    bench.receiver.gate = asyncio.Event()
    for n in range(10):
        await life.publish("Go", {"n": n}, key="k")

    bench.receiver.gate.set()
    await life.runtime.settled()

    assert sorted(_numbers(bench)) == sorted([*range(10), *range(10)])
    for target in ("a", "b"):
        sent = [json.loads(e.payload)["n"] for e in bench.receiver.got if e.target_id == target]
        assert sent == list(range(10))
    assert life.runtime.health().outbox == 0


async def test_the_store_is_empty_of_effects_once_they_are_settled(bench: Bench) -> None:
    life = await bench.live(_sender(("service:a", "service:b")))

    await asyncio.gather(*(life.publish("Go", {"n": n}, key=f"k-{n}") for n in range(100)))
    await life.runtime.settled()

    assert await life.runtime.store.outbox_page(after=None, limit=10) == []
    assert await life.runtime.store.inbox_page(after=None, limit=10) == []
    assert len(bench.receiver.got) == 200


async def test_an_effect_that_somebody_else_has_settled_stands_in_the_way_of_no_other(bench: Bench) -> None:
    life = await bench.live(_sender())
    bench.receiver.gate = asyncio.Event()
    for n in range(3):
        await life.publish("Go", {"n": n}, key=f"k-{n}")
    store, lease = life.runtime.store, life.runtime._receiver.share.lease
    assert lease is not None
    rows = await store.outbox_page(after=None, limit=10)
    await store.commit([UnitOfWork(part=rows[1].ref.part, outbox_done=(rows[1].ref,))], lease=lease)

    bench.receiver.gate.set()
    await life.runtime.settled()

    assert len(rows) == 3
    assert sorted(_numbers(bench)) == [0, 1, 2]
    assert await store.outbox_page(after=None, limit=10) == []
    assert life.runtime.health().outbox == 0
