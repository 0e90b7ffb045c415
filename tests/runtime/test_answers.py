"""Effects that are answered with one message: the commit that decides about the answer settles the effect, and nothing
that stands in the way of the one or the other loses the answer, applies it twice, or hands the effect over again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from sagaloom import RetryPolicy, SagaMessage, define_saga, saga_complete, send
from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import BackendUnavailable
from sagaloom.ports.store import CommitResult, Conflict, Lease, UnitOfWork
from tests.runtime.conftest import STORES, Bench, Life
from tests.runtime.test_sharing import PARTITIONS, both, both_but_untold, keys_held_by, parts_of, until

__all__ = ["STORES"]

_Commit = Callable[[Sequence[UnitOfWork]], Awaitable[CommitResult]]


def go(saga: Any, event: Any, context: Any) -> list[Any]:
    return [send(target, {"n": event.payload["n"]}) for target in event.payload.get("to", ["service:a"])]


def noting(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {**saga.state, "seen": [*saga.state["seen"], event.payload["n"]]}
    return []


def asking(answer: Any = noting, *, saga_id: str = "asking", attempts: int = 5) -> Any:
    """A saga that asks outside for every `Go`, and takes `Answer`."""
    return (
        define_saga(saga_id)
        .state({"seen": []})
        .on("Go", go)
        .on("Note", noting, starts=False)
        .on("Answer", answer, starts=False)
        .on("End", lambda saga, event, context: [saga_complete()], starts=False)
        .retry(RetryPolicy(maximum_attempts=attempts, jitter=0))
    )


ASKING = asking().build()


class FailingOnce:
    """A handler whose first call raises."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, saga: Any, event: Any, context: Any) -> list[Any]:
        self.calls += 1
        if self.calls == 1:
            raise ConnectionError("not yet")
        return noting(saga, event, context)


def echo(effect: OutboxEffect) -> list[SagaMessage[Any]]:
    return [SagaMessage("Answer", json.loads(effect.payload))]


async def seen(life: Life, key: str = "k", saga_id: str = "asking") -> list[int]:
    found: list[int] = json.loads((await life.instance(saga_id, key)).state)["seen"]
    return found


async def assert_nothing_waits(life: Life) -> None:
    store = life.runtime.store
    assert await store.outbox_page(after=None, limit=10) == []
    assert await store.inbox_page(after=None, limit=10) == []
    health = life.runtime.health()
    assert (health.outbox, health.backlog) == (0, 0)
    assert life.runtime._dispatcher.is_idle


def intercept(life: Life, commit: Callable[[_Commit, Sequence[UnitOfWork]], Awaitable[CommitResult]]) -> None:
    """Has `commit` called in the place of the store's own, which it gets."""
    original = life.runtime.store.commit

    async def instead(units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        return await commit(lambda some: original(some, lease=lease), units)

    life.runtime.store.commit = instead  # type: ignore[method-assign]


# ---------------------------------------------------------------- one commit


async def test_a_step_that_is_answered_at_once_is_one_commit(bench: Bench) -> None:
    def next_step(saga: Any, event: Any, context: Any) -> list[Any]:
        done = event.payload["n"]
        return [saga_complete()] if done == 3 else [send("service:a", {"n": done + 1})]

    life = await bench.live(asking(next_step).on("Begin", next_step).build())
    bench.receiver.answer = echo
    before = life.runtime.counters.commits

    await life.publish("Begin", {"n": 0}, key="k")
    await life.runtime.settled()

    assert (await life.instance("asking", "k")).status == "completed"
    assert life.runtime.counters.commits - before == 4
    await assert_nothing_waits(life)


async def test_the_feed_shows_that_an_effect_has_left_before_what_its_answer_causes(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    events = [event for _, event in await life.runtime.store.feed(after=0, limit=100)]
    kinds = [(event.type, event.message_type) for event in events]
    left = kinds.index(("saga:effect_dispatched", "service:a"))
    assert [kind for kind, type_ in kinds[left + 1 :] if type_ == "Answer"] != []
    assert [kind for kind, type_ in kinds[:left] if type_ == "Answer"] == []


async def test_many_steps_at_once_are_each_applied_once(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo

    await asyncio.gather(*(life.publish("Go", {"n": n}, key=f"k-{n % 10}") for n in range(100)))
    await life.runtime.settled()

    assert [sorted(await seen(life, f"k-{n}")) for n in range(10)] == [list(range(n, 100, 10)) for n in range(10)]
    assert len(bench.receiver.got) == 100
    await assert_nothing_waits(life)


async def test_the_next_effect_of_a_lane_leaves_when_the_answer_to_the_one_before_is_committed(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo
    open_, gate = asyncio.Event(), asyncio.Event()

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        if any(unit.outbox_done for unit in units) and not open_.is_set():
            open_.set()
            await gate.wait()
        return await original(units)

    intercept(life, commit)
    await life.publish("Go", {"n": 1, "to": ["service:a", "service:a"]}, key="k")
    await open_.wait()
    for _ in range(20):
        await asyncio.sleep(0)

    assert len(bench.receiver.got) == 1
    gate.set()
    await life.runtime.settled()
    assert len(bench.receiver.got) == 2
    assert await seen(life) == [1, 1]


async def test_several_answers_are_applied_in_their_order(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = lambda effect: [SagaMessage("Answer", {"n": n}) for n in range(3)]

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    assert await seen(life) == [0, 1, 2]
    assert len(bench.receiver.got) == 1
    await assert_nothing_waits(life)


# ---------------------------------------------------------------- what is decided about the answer


async def test_an_answer_whose_handler_fails_is_tried_again_and_its_effect_is_not(bench: Bench) -> None:
    life = await bench.live(asking(FailingOnce()).build())
    bench.receiver.answer = echo

    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Go", {"n": 2}, key="k")  # The same lane: it goes on, though the first answer waits.
    await life.runtime.settled()
    waiting = [row.envelope.attempt for row in await life.runtime.store.inbox_page(after=None, limit=10)]
    after_first = len(bench.receiver.got), await life.runtime.store.outbox_page(after=None, limit=10)
    await bench.advance("10s")

    # What is offered again when its instance has moved may not have to wait for its time.
    assert waiting in ([1], [])
    assert after_first == (2, [])
    assert sorted(await seen(life)) == [1, 2]
    assert len(bench.receiver.got) == 2
    await assert_nothing_waits(life)


async def test_an_answer_that_waits_for_its_next_attempt_survives_a_kill(bench: Bench) -> None:
    definition = asking(FailingOnce()).build()
    life = await bench.live(definition)
    bench.receiver.answer = echo
    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()
    await bench.die(life)

    life = await bench.live(definition)
    await bench.advance("10s")

    assert await seen(life) == [1]
    assert len(bench.receiver.got) == 1
    await assert_nothing_waits(life)


async def test_an_answer_that_is_given_up_is_a_dead_letter_and_its_lane_goes_on(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = lambda effect: [SagaMessage("Nonsense", {"n": 1})]

    await life.publish("Go", {"n": 1, "to": ["service:a", "service:a"]}, key="k")
    await life.runtime.settled()

    letters = await life.runtime.dead_letters()
    assert [(letter.type, letter.effect) for letter in letters] == [("Nonsense", None)] * 2
    assert len(bench.receiver.got) == 2
    await assert_nothing_waits(life)


async def test_an_answer_to_a_run_that_is_over_is_noted_there(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("End", {}, key="k")

    bench.receiver.gate.set()
    await life.runtime.settled()

    entry = (await life.history("asking", "k"))[-1]
    assert (entry.type, entry.disposition) == ("Answer", "ignored")
    assert (await life.instance("asking", "k")).status == "completed"
    await assert_nothing_waits(life)


async def test_an_answer_to_a_paused_run_waits_in_the_inbox_and_its_lane_goes_on(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    await life.publish("Go", {"n": 1, "to": ["service:a", "service:a"]}, key="k")
    await life.runtime.pause("asking", "k")
    bench.receiver.gate.set()
    await life.runtime.settled()
    waiting = [row.envelope.type for row in await life.runtime.store.inbox_page(after=None, limit=10)]
    await bench.die(life)

    life = await bench.live(ASKING)
    await life.runtime.resume("asking", "k")
    await life.runtime.settled()

    assert waiting == ["Answer", "Answer"]
    assert len(bench.receiver.got) == 2
    assert await seen(life) == [1, 1]
    await assert_nothing_waits(life)


async def test_an_answer_that_comes_too_early_is_deferred_and_applied_before_younger_ones(bench: Bench) -> None:
    def ready(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state = {**saga.state, "status": "ready"}
        return []

    definition = (
        define_saga("asking")
        .state({"seen": [], "status": "new"})
        .on("Go", go)
        .on("Ready", ready, starts=False)
        .during("ready", "Answer", noting)
        .during("ready", "Note", noting)
        .build()
    )
    life = await bench.live(definition)
    bench.receiver.answer = echo
    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()
    effects = await life.runtime.store.outbox_page(after=None, limit=10)

    await asyncio.gather(life.publish("Ready", {}, key="k"), life.publish("Note", {"n": 2}, key="k"))
    await life.runtime.settled()

    assert effects == []
    assert await seen(life) == [1, 2]
    assert len(bench.receiver.got) == 1
    await assert_nothing_waits(life)


async def test_an_answer_behind_a_starter_that_holds_its_key_waits_there(bench: Bench) -> None:
    starter = FailingOnce()

    def begin(saga: Any, event: Any, context: Any) -> list[Any]:
        return starter(saga, event, context) if event.payload["n"] == 2 else go(saga, event, context)

    definition = (
        define_saga("asking")
        .state({"seen": []})
        .on("Go", begin)
        .on("Answer", noting, starts=False)
        .on("End", lambda saga, event, context: [saga_complete()], starts=False)
        .reuse("new_run")
        .build()
    )
    life = await bench.live(definition)
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("End", {}, key="k")
    await life.publish("Go", {"n": 2}, key="k")

    bench.receiver.gate.set()
    await life.runtime.settled()
    waiting = [row.envelope.type for row in await life.runtime.store.inbox_page(after=None, limit=10)]
    effects = await life.runtime.store.outbox_page(after=None, limit=10)
    await bench.advance("10s")

    assert (waiting, effects) == (["Go", "Answer"], [])
    assert (await life.history("asking", "k", run=1))[-1].type == "Answer"
    assert await seen(life) == [2]
    await assert_nothing_waits(life)


async def test_an_answer_that_finds_no_slot_waits_for_one_and_its_effect_is_settled(bench: Bench) -> None:
    busy = [True]

    def work(saga: Any, event: Any, context: Any) -> list[Any]:
        if busy:
            raise ConnectionError("not now")
        return []

    life = await bench.live(asking().on("Work", work).concurrency(1).build())
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Work", {}, key="other")  # Its retries hold the only slot.

    bench.receiver.gate.set()
    await life.runtime.settled()
    waiting = [row.envelope.type for row in await life.runtime.store.inbox_page(after=None, limit=10)]
    effects = await life.runtime.store.outbox_page(after=None, limit=10)
    busy.clear()
    await bench.advance("1m")
    await bench.advance("1m")

    assert (sorted(waiting), effects) == (["Answer", "Work"], [])
    assert await seen(life) == [1]
    assert len(bench.receiver.got) == 1
    assert await life.runtime.store.slots("asking") == []
    await assert_nothing_waits(life)


async def test_an_answer_to_a_run_that_cannot_be_read_is_a_dead_letter(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo
    bench.receiver.gate = asyncio.Event()
    await life.publish("Go", {"n": 1}, key="k")
    instance = await life.instance("asking", "k")
    await bench.damage(instance.pk, 1)
    life.runtime._receiver._memory.clear()

    bench.receiver.gate.set()
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert (letter.type, letter.code) == ("Answer", "STORE_CORRUPT")
    assert len(bench.receiver.got) == 1
    await assert_nothing_waits(life)


# ---------------------------------------------------------------- what stands against the commit


async def test_an_answer_to_an_effect_that_somebody_else_has_settled_changes_nothing(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    await life.publish("Go", {"n": 1, "to": ["service:a", "service:a"]}, key="k")
    store, lease = life.runtime.store, life.runtime._receiver.share.lease
    assert lease is not None
    first, _ = await store.outbox_page(after=None, limit=10)
    await store.commit([UnitOfWork(part=first.ref.part, outbox_done=(first.ref,))], lease=lease)

    bench.receiver.gate.set()
    await life.runtime.settled()

    assert len(bench.receiver.got) == 2
    assert await seen(life) == [1]
    await assert_nothing_waits(life)


@pytest.mark.parametrize("kind", ["revision", "behind"])
async def test_an_answer_whose_unit_conflicts_is_decided_again_and_its_effect_leaves_once(
    kind: Any, bench: Bench
) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo
    refused: list[UnitOfWork] = []

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        number = next((number for number, unit in enumerate(units) if unit.outbox_done), None)
        if number is None or refused:
            return await original(units)
        refused.append(units[number])
        result = await original([*units[:number], UnitOfWork(part=units[number].part), *units[number + 1 :]])
        return CommitResult({number: Conflict(kind, "as the test says")}, *result.__reduce__()[1][1:])

    intercept(life, commit)
    await life.publish("Go", {"n": 1, "to": ["service:a", "service:a"]}, key="k")
    await life.runtime.settled()

    assert len(refused) == 1
    assert len(bench.receiver.got) == 2
    assert await seen(life) == [1, 1]
    await assert_nothing_waits(life)


async def test_while_the_store_does_not_answer_an_answer_waits_and_its_effect_does_not_leave_again(
    bench: Bench,
) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo
    failures: list[UnitOfWork] = []

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        if len(failures) < 3 and any(unit.outbox_done for unit in units):
            failures.extend(units)
            raise BackendUnavailable("the disk is gone")
        return await original(units)

    intercept(life, commit)
    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    assert len(failures) == 3
    assert len(bench.receiver.got) == 1
    assert await seen(life) == [1]
    await assert_nothing_waits(life)


async def test_an_answer_that_was_written_though_the_store_did_not_say_so_is_applied_once(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo
    unknown: list[UnitOfWork] = []

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        result = await original(units)
        if not unknown and any(unit.outbox_done for unit in units):
            unknown.extend(units)
            raise BackendUnavailable("the connection broke")
        return result

    intercept(life, commit)
    await life.publish("Go", {"n": 1, "to": ["service:a", "service:a"]}, key="k")
    await life.runtime.settled()

    assert len(unknown) == 1
    assert len(bench.receiver.got) == 2
    assert await seen(life) == [1, 1]
    await assert_nothing_waits(life)


async def test_an_answer_that_no_store_can_write_fails_its_effect(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = lambda effect: [SagaMessage("Answer", {"n": 1}, id="\ud800")]

    await life.publish("Go", {"n": 1}, key="k")
    await life.publish("Note", {"n": 2}, key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert letter.type == "service:a"
    assert "its answer cannot be stored" in letter.reason
    assert await seen(life) == [2]
    assert len(bench.receiver.got) == 1
    assert life.runtime._dispatcher.stalled_lanes == 1


def refusing(life: Life, refuses: Callable[[UnitOfWork], bool]) -> None:
    """Has the store refuse some units that bring answers."""

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        if not any(unit.outbox_done and refuses(unit) for unit in units):
            return await original(units)
        assert len(units) == 1
        return CommitResult({0: Conflict("refused", "as the test says")}, 0, 0, 0)

    intercept(life, commit)


async def test_an_answer_whose_decision_the_store_refuses_is_a_dead_letter_of_its_own(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo
    refusing(life, lambda unit: unit.instance is not None and not unit.dead_letters_add)

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert (letter.type, letter.code) == ("Answer", "SAGA_NOT_STORABLE")
    assert len(bench.receiver.got) == 1
    await assert_nothing_waits(life)


async def test_an_answer_that_the_store_refuses_by_itself_fails_its_effect(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo
    refusing(life, lambda unit: True)

    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert (letter.type, letter.reason) == ("service:a", "its answer cannot be stored: as the test says")
    assert len(bench.receiver.got) == 1
    assert await seen(life) == []
    assert life.runtime._dispatcher.stalled_lanes == 1


async def test_an_answer_that_could_not_be_committed_before_the_end_has_its_effect_leave_again(bench: Bench) -> None:
    life = await bench.live(ASKING, drain_seconds=0.05)
    bench.receiver.answer = echo

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        if any(unit.outbox_done for unit in units):
            raise BackendUnavailable("the disk is gone")
        return await original(units)

    intercept(life, commit)
    await life.publish("Go", {"n": 1}, key="k")
    await until(lambda: len(bench.receiver.got) == 1)
    await bench.end(life)

    life = await bench.live(ASKING)
    await life.runtime.settled()

    assert await seen(life) == [1]
    first, second = bench.receiver.got
    assert first.effect_key == second.effect_key
    await assert_nothing_waits(life)


async def test_a_stop_waits_for_the_answer_to_what_is_under_way(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    await life.publish("Go", {"n": 1}, key="k")
    ending = asyncio.ensure_future(bench.end(life))
    await asyncio.sleep(0)

    bench.receiver.gate.set()
    await ending
    life = await bench.live(ASKING)
    await life.runtime.settled()

    assert await seen(life) == [1]
    assert len(bench.receiver.got) == 1


# ---------------------------------------------------------------- several processes


async def test_what_another_process_took_in_comes_before_an_answer_that_came_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, other = await both_but_untold(bench, monkeypatch, ASKING)
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    keys = keys_held_by(holder, "asking", 20)
    for key in keys:
        await holder.publish("Go", {"n": 2}, key=key)
        await other.publish("Note", {"n": 1}, key=key)

    bench.receiver.gate.set()
    await holder.runtime.settled()

    assert [await seen(holder, key) for key in keys] == [[1, 2]] * 20
    assert len(bench.receiver.got) == 20
    await assert_nothing_waits(holder)


async def test_an_answer_that_comes_when_another_process_holds_its_instance_is_left_to_that_one(bench: Bench) -> None:
    sleeper, other = await both(bench, ASKING, lease_seconds=0.3)
    gates: dict[int, asyncio.Event] = {}
    taken: list[OutboxEffect] = []

    async def deliver(effect: OutboxEffect) -> list[SagaMessage[Any]]:
        taken.append(effect)
        if len(taken) <= 5:
            await gates.setdefault(len(taken), asyncio.Event()).wait()
        return echo(effect)

    bench.receiver.deliver = deliver  # type: ignore[method-assign]
    keys = keys_held_by(sleeper, "asking", 5)
    for n, key in enumerate(keys):
        await sleeper.publish("Go", {"n": n}, key=key)
    await until(lambda: len(taken) == 5)

    # The loop of the sleeper stands still: its lease runs out, while its effects are under way.
    sleeper.runtime.store._tenure._presence.renew = lambda: True  # type: ignore[attr-defined]
    await until(lambda: len(parts_of(other)) == PARTITIONS)
    await until(lambda: len(taken) == 10)
    del sleeper.runtime.store._tenure._presence.renew  # type: ignore[attr-defined]
    for gate in gates.values():
        gate.set()
    await until(lambda: len(parts_of(sleeper)) == PARTITIONS // 2)
    for life in (sleeper, other):
        await life.runtime.settled()
        await assert_nothing_waits(life)

    assert [await seen(other, key) for key in keys] == [[n] for n in range(5)]
    assert len({effect.effect_key for effect in taken}) == 5


async def test_answers_that_wait_while_their_partitions_are_given_away_are_not_applied_here(bench: Bench) -> None:
    life = await bench.live(ASKING)
    bench.receiver.gate, bench.receiver.answer = asyncio.Event(), echo
    gate = asyncio.Event()

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        if any(unit.outbox_done for unit in units) and not gate.is_set():
            raise BackendUnavailable("the disk is gone")
        return await original(units)

    intercept(life, commit)
    for n in range(10):
        await life.publish("Go", {"n": n}, key=f"k-{n}")
    bench.receiver.gate.set()
    await until(lambda: len(bench.receiver.got) == 10)
    second = await bench.live(ASKING)
    await until(lambda: len(parts_of(second)) == len(parts_of(life)) == PARTITIONS // 2)
    gate.set()
    for each in (life, second):
        await each.runtime.settled()
        await assert_nothing_waits(each)

    assert [await seen(life, f"k-{n}") for n in range(10)] == [[n] for n in range(10)]
    assert len({effect.effect_key for effect in bench.receiver.got}) == 10


async def test_an_answer_that_comes_when_its_partition_was_given_away_is_left_to_the_new_holder(bench: Bench) -> None:
    first = await bench.live(ASKING)
    slow, taken = asyncio.Event(), list[OutboxEffect]()

    async def deliver(effect: OutboxEffect) -> list[SagaMessage[Any]]:
        taken.append(effect)
        if len(taken) <= 10:
            await slow.wait()
        return echo(effect)

    bench.receiver.deliver = deliver  # type: ignore[method-assign]
    for n in range(10):
        await first.publish("Go", {"n": n}, key=f"k-{n}")
    await until(lambda: len(taken) == 10)

    # Its partitions are waited for only so long.
    second = await bench.live(ASKING)
    await until(lambda: len(parts_of(second)) == len(parts_of(first)) == PARTITIONS // 2)
    await second.runtime.settled()
    slow.set()
    await first.runtime.settled()
    await assert_nothing_waits(first)

    assert [await seen(first, f"k-{n}") for n in range(10)] == [[n] for n in range(10)]
    assert len({effect.effect_key for effect in taken}) == 10
    assert len(taken) > 10


async def test_when_the_store_says_that_a_partition_has_moved_the_answer_is_dropped_and_its_effect_stays(
    bench: Bench,
) -> None:
    life = await bench.live(ASKING)
    bench.receiver.answer = echo

    async def commit(original: _Commit, units: Sequence[UnitOfWork]) -> CommitResult:
        if not any(unit.outbox_done for unit in units):
            return await original(units)
        return CommitResult({number: Conflict("moved", "as the test says") for number in range(len(units))}, 0, 0, 0)

    intercept(life, commit)
    await life.publish("Go", {"n": 1}, key="k")
    await life.runtime.settled()
    before = await seen(life), len(bench.receiver.got)
    await bench.die(life)
    life = await bench.live(ASKING)
    await life.runtime.settled()

    assert before == ([], 1)
    assert await seen(life) == [1]
    first, second = bench.receiver.got
    assert first.effect_key == second.effect_key
