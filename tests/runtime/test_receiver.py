"""What the receiver promises: order, once-only, retries, held keys, and nothing lost between two lives."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sagaloom import (
    RetryPolicy,
    SagaMessage,
    SagasError,
    define_saga,
    saga_complete,
    saga_fail,
    schedule,
    send,
    spawn,
)
from sagaloom.errors import BackendUnavailable
from sagaloom.runtime.receipts import PublishReceipt, PublishRejected
from sagaloom.runtime.weighing import Scales
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench

__all__ = ["STORES"]


def _note(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], event.payload.get("n", event.type)]}
    return []


def _counter(**extra: Any) -> Any:
    return define_saga("counter").state({"seen": []}).on("Add", _note)


async def test_messages_of_one_instance_are_applied_in_the_order_of_their_offer(bench: Bench) -> None:
    life = await bench.live(_counter().build())

    await asyncio.gather(*(life.publish("Add", {"n": n}, key="k") for n in range(50)))

    instance = await life.instance("counter", "k")
    assert json.loads(instance.state) == {"seen": list(range(50))}
    assert instance.revision == 50


async def test_a_repeat_of_a_message_id_is_a_duplicate_with_the_first_facts(bench: Bench) -> None:
    life = await bench.live(_counter().build())
    first = await life.publish("Add", {"n": 1}, key="k", id="m-1")

    second = await life.publish("Add", {"n": 1}, key="k", id="m-1")

    assert (first.disposition, second.disposition) == ("applied", "duplicate")
    assert second.message_id == "m-1"
    assert (await life.instance("counter", "k")).revision == 1


async def test_repeats_in_one_batch_change_the_instance_once(bench: Bench) -> None:
    life = await bench.live(_counter().build())

    outcomes = await asyncio.gather(*(life.publish("Add", {"n": 1}, key="k", id="m-1") for _ in range(10)))

    assert sorted(outcome.disposition for outcome in outcomes) == ["applied"] + ["duplicate"] * 9
    assert (await life.instance("counter", "k")).revision == 1


async def test_a_repeat_after_a_restart_is_a_duplicate(bench: Bench) -> None:
    life = await bench.live(_counter().build())
    await life.publish("Add", {"n": 1}, key="k", idempotency_key="pay-1")
    await bench.die(life)
    life = await bench.live(_counter().build())

    again = await life.publish("Add", {"n": 1}, key="k", idempotency_key="pay-1")

    assert again.disposition == "duplicate"
    assert (await life.instance("counter", "k")).revision == 1


@pytest.mark.parametrize("restarts", [False, True])
async def test_an_idempotency_key_with_other_content_is_refused(bench: Bench, restarts: bool) -> None:
    life = await bench.live(_counter().build())
    await life.publish("Add", {"n": 1}, key="k", idempotency_key="pay-1")
    if restarts:
        await bench.die(life)
        life = await bench.live(_counter().build())

    refused = await life.runtime.publish(SagaMessage("Add", {"n": 2}, correlation_key="k", idempotency_key="pay-1"))

    assert isinstance(refused, PublishRejected)
    assert refused.code == "IDEMPOTENCY_KEY_REUSED"
    assert not refused.retryable
    assert (await life.instance("counter", "k")).revision == 1


async def test_one_idempotency_key_serves_two_instances(bench: Bench) -> None:
    life = await bench.live(_counter().build())

    one = await life.publish("Add", {"n": 1}, key="a", idempotency_key="same")
    two = await life.publish("Add", {"n": 1}, key="b", idempotency_key="same")

    assert (one.disposition, two.disposition) == ("applied", "applied")


async def test_two_messages_without_any_key_make_two_runs(bench: Bench) -> None:
    def settle(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete({"user": event.payload["userId"]})]

    life = await bench.live(define_saga("settings").state({}).on("Created", settle).build())

    one, two = await asyncio.gather(
        life.publish("Created", {"userId": "u-1"}), life.publish("Created", {"userId": "u-2"})
    )

    assert {one.run, two.run} == {1, 2}
    results = [(await life.instance("settings", "settings:Created", run)).result for run in (1, 2)]
    assert results == [b'{"user":"u-1"}', b'{"user":"u-2"}']


class Flaky:
    """A handler that fails as often as it was told to, and then notes the message."""

    def __init__(self, *failing: int, error: type[Exception] = RuntimeError) -> None:
        self.left = dict.fromkeys(failing, 1)
        self.attempts: list[int] = []
        self.error = error

    def __call__(self, saga: Any, event: Any, context: Any) -> list[Any]:
        n = event.payload["n"]
        if self.left.get(n, 0) > 0:
            self.left[n] -= 1
            self.attempts.append(context.attempt)
            raise self.error(f"no luck with {n}")
        return _note(saga, event, context)


def _flaky(handler: Flaky, attempts: int = 5) -> Any:
    return (
        define_saga("flaky")
        .state({"seen": []})
        .on("Add", handler)
        .retry(RetryPolicy(maximum_attempts=attempts, jitter=0.0))
        .build()
    )


async def test_a_failed_message_steps_aside_and_is_tried_again_when_due(bench: Bench) -> None:
    handler = Flaky(2)
    handler.left[2] = 2
    life = await bench.live(_flaky(handler))
    await life.publish("Add", {"n": 1}, key="k")

    failed = await life.publish("Add", {"n": 2}, key="k")
    assert failed.disposition == "pending"
    assert failed.reason is not None
    assert "no luck with 2" in failed.reason
    await bench.advance("1s")
    assert (await life.instance("flaky", "k")).revision == 1
    await bench.advance("2s")

    assert json.loads((await life.instance("flaky", "k")).state) == {"seen": [1, 2]}
    assert handler.attempts == [1, 2]


async def test_younger_messages_overtake_a_failed_one_which_is_offered_after_each(bench: Bench) -> None:
    handler = Flaky(2)
    handler.left[2] = 2  # its own attempt, and the offer after message 3
    life = await bench.live(_flaky(handler))
    await life.publish("Add", {"n": 1}, key="k")
    await life.publish("Add", {"n": 2}, key="k")

    await life.publish("Add", {"n": 3}, key="k")
    await life.runtime.settled()
    await life.publish("Add", {"n": 4}, key="k")
    await life.runtime.settled()

    assert json.loads((await life.instance("flaky", "k")).state) == {"seen": [1, 3, 4, 2]}


async def test_a_failing_starter_holds_its_key_in_order(bench: Bench) -> None:
    life = await bench.live(_flaky(Flaky(1)))

    outcomes = await asyncio.gather(*(life.publish("Add", {"n": n}, key="k") for n in (1, 2, 3)))
    late = await life.publish("Add", {"n": 4}, key="k")
    pending = await life.instance("flaky", "k")
    await bench.advance("1s")

    assert [outcome.disposition for outcome in (*outcomes, late)] == ["pending"] * 4
    assert (pending.status, pending.run) == ("pending", 0)
    assert json.loads((await life.instance("flaky", "k")).state) == {"seen": [1, 2, 3, 4]}


async def test_a_held_key_survives_a_restart_in_order(bench: Bench) -> None:
    life = await bench.live(_flaky(Flaky(1)))
    await asyncio.gather(*(life.publish("Add", {"n": n}, key="k") for n in (1, 2, 3)))
    await bench.die(life)
    life = await bench.live(_flaky(Flaky()))

    await life.publish("Add", {"n": 4}, key="k")
    assert (await life.instance("flaky", "k")).status == "pending"
    await bench.advance("1s")

    assert json.loads((await life.instance("flaky", "k")).state) == {"seen": [1, 2, 3, 4]}


async def test_a_starter_that_is_given_up_frees_its_key(bench: Bench) -> None:
    handler = Flaky(1)
    handler.left[1] = 2
    life = await bench.live(_flaky(handler, attempts=2))
    await life.publish("Add", {"n": 1}, key="k")
    await life.publish("Add", {"n": 2}, key="k")

    await bench.advance("1s")

    (letter,) = await life.runtime.dead_letters()
    assert (letter.attempts, letter.type) == (2, "Add")
    assert letter.traceback is not None
    assert "no luck with 1" in letter.traceback
    assert json.loads((await life.instance("flaky", "k")).state) == {"seen": [2]}


async def test_a_waiting_publisher_hears_of_the_attempt_that_worked(bench: Bench) -> None:
    life = await bench.live(_flaky(Flaky(1)))

    waiting = asyncio.create_task(life.publish("Add", {"n": 1}, key="k", wait=30))
    await asyncio.sleep(0)
    await life.runtime.settled()
    await bench.advance("1s")

    outcome = await waiting
    assert (outcome.disposition, outcome.revision) == ("applied", 1)
    assert outcome.state == {"seen": [1]}


async def test_a_wait_that_ends_early_is_pending(bench: Bench) -> None:
    life = await bench.live(_flaky(Flaky(1)))

    outcome = await life.publish("Add", {"n": 1}, key="k", wait=0.01)

    assert outcome.disposition == "pending"


async def test_a_dead_letter_that_is_redriven_is_applied(bench: Bench) -> None:
    handler = Flaky(1, error=ZeroDivisionError)
    life = await bench.live(_flaky(handler, attempts=1))
    dead = await life.publish("Add", {"n": 1}, key="k", id="m-1")
    (letter,) = await life.runtime.dead_letters()

    await life.runtime.redrive(letter.id)
    await life.runtime.settled()

    assert dead.disposition == "dead_lettered"
    assert (await life.instance("flaky", "k")).revision == 1
    assert await life.runtime.dead_letters() == []
    assert (await life.publish("Add", {"n": 1}, key="k", id="m-1")).disposition == "duplicate"


async def test_a_dead_letter_counts_as_seen_until_it_is_discarded(bench: Bench) -> None:
    life = await bench.live(_flaky(Flaky(1), attempts=1))
    await life.publish("Add", {"n": 1}, key="k", id="m-1")
    seen = await life.publish("Add", {"n": 1}, key="k", id="m-1")
    (letter,) = await life.runtime.dead_letters()

    await life.runtime.discard(letter.id)
    free = await life.publish("Add", {"n": 1}, key="k", id="m-1")

    assert (seen.disposition, free.disposition) == ("duplicate", "applied")


async def test_redriving_twice_at_once_applies_once(bench: Bench) -> None:
    life = await bench.live(_flaky(Flaky(1), attempts=1))
    await life.publish("Add", {"n": 1}, key="k", id="m-1")
    (letter,) = await life.runtime.dead_letters()

    answers = await asyncio.gather(*(life.runtime.redrive(letter.id) for _ in range(3)), return_exceptions=True)
    await life.runtime.settled()

    assert sum(isinstance(answer, SagasError) for answer in answers) == 2
    assert (await life.instance("flaky", "k")).revision == 1


async def test_an_unknown_type_is_refused_by_name(bench: Bench) -> None:
    life = await bench.live(_counter().build())

    refused = await life.runtime.publish({"type": "Nope", "payload": {}})

    assert isinstance(refused, PublishRejected)
    assert refused.code == "SAGA_NOT_FOUND"
    assert "'Nope'" in refused.reason
    assert "Add" in refused.reason


async def test_a_type_that_only_the_registry_knows_is_refused_for_now(bench: Bench) -> None:
    life = await bench.live(_counter().build())
    await bench.end(life)
    life = await bench.live(define_saga("other").state({"seen": []}).on("Else", _note).build())

    refused = await life.runtime.publish({"type": "Add", "payload": {}})

    assert isinstance(refused, PublishRejected)
    assert refused.code == "SAGA_NOT_LOADED"
    assert refused.retryable


async def test_one_message_reaches_every_saga_that_handles_its_type(bench: Bench) -> None:
    other = define_saga("other").state({"seen": []}).on("Add", _note).build()
    life = await bench.live(_counter().build(), other)

    receipt = await life.runtime.publish(SagaMessage("Add", {"n": 1}, correlation_key="k"), wait=1.0)

    assert isinstance(receipt, PublishReceipt)
    assert [(outcome.saga_id, outcome.disposition) for outcome in receipt.outcomes] == [
        ("counter", "applied"),
        ("other", "applied"),
    ]


async def test_a_handler_that_changes_its_payload_changes_it_for_itself(bench: Bench) -> None:
    def taking(saga: Any, event: Any, context: Any) -> list[Any]:
        event.payload["lines"].append("seen")
        saga.state = {"lines": event.payload["lines"]}
        return []

    sagas = [define_saga(name).state({"lines": []}).on("Add", taking).build() for name in ("one", "two")]
    life = await bench.live(*sagas)
    message = SagaMessage("Add", {"lines": ["paper"]}, correlation_key="k")

    await life.runtime.publish(message)
    await life.runtime.publish(message)

    instances = [await life.instance(name, "k") for name in ("one", "two")]
    assert [(each.revision, json.loads(each.state)) for each in instances] == [(2, {"lines": ["paper", "seen"]})] * 2
    assert message.payload == {"lines": ["paper"]}


async def test_a_handler_that_changed_its_payload_and_failed_gets_it_as_it_came(bench: Bench) -> None:
    def failing_once(saga: Any, event: Any, context: Any) -> list[Any]:
        event.payload["lines"].append(context.attempt)
        if context.attempt == 1:
            raise ValueError("not yet")
        saga.state = {"lines": event.payload["lines"]}
        return []

    life = await bench.live(define_saga("one").state({"lines": []}).on("Add", failing_once).build())
    await life.publish("Add", {"lines": []}, key="k")

    await bench.advance("5s")

    assert json.loads((await life.instance("one", "k")).state) == {"lines": [2]}


async def test_a_send_to_a_saga_arrives_once_even_when_the_process_ends_behind_its_commit(bench: Bench) -> None:
    def pass_on(saga: Any, event: Any, context: Any) -> list[Any]:
        return [send("Add", {"n": event.payload["n"]})]

    starter = define_saga("starter").state({}).on("Begin", pass_on).build()
    cut = asyncio.Event()
    life = await bench.live(
        starter, _counter().build(), on_step=lambda step: cut.set() if step == "committed" else None
    )
    await life.publish("Begin", {"n": 7}, key="k")
    await bench.die(life)
    life = await bench.live(starter, _counter().build())
    await life.runtime.settled()

    instance = await life.instance("counter", "k")
    assert json.loads(instance.state) == {"seen": [7]}
    (entry,) = await life.history("counter", "k")
    assert entry.causation_id == (await life.history("starter", "k"))[0].message_id


async def test_a_send_that_nobody_handles_is_a_dead_letter_of_the_sender(bench: Bench) -> None:
    def shout(saga: Any, event: Any, context: Any) -> list[Any]:
        return [send("Nobody", {})]

    life = await bench.live(define_saga("shouter").state({}).on("Go", shout).build())
    await life.publish("Go", key="k")

    (letter,) = await life.runtime.dead_letters()

    assert (letter.saga_id, letter.key, letter.type) == ("shouter", "k", "Nobody")
    assert (await life.instance("shouter", "k")).revision == 1


async def test_a_ring_of_sagas_ends_at_the_hop_limit(bench: Bench) -> None:
    def ping(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state = {"hits": saga.state["hits"] + 1}
        return [send("Ping", {})]

    life = await bench.live(define_saga("ring").state({"hits": 0}).on("Ping", ping).build())
    await life.publish("Ping", key="k")
    await life.runtime.settled()

    (letter,) = await life.runtime.dead_letters()
    assert letter.code == "SAGA_HOPS_EXCEEDED"
    assert json.loads((await life.instance("ring", "k")).state)["hits"] == 101


async def test_a_child_is_started_and_its_end_comes_back(bench: Bench) -> None:
    def begin(saga: Any, event: Any, context: Any) -> list[Any]:
        return [spawn("child", {"n": 1})]

    def ended(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete(event.payload["result"])]

    def work(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete({"done": event.payload["n"]})]

    parent = define_saga("parent").state({}).on("Begin", begin).on("child:completed", ended, starts=False).build()
    child = define_saga("child").state({}).on("Work", work).build()
    life = await bench.live(parent, child)

    await life.publish("Begin", key="p")
    await life.runtime.settled()

    done = await life.instance("parent", "p")
    assert (done.status, done.result) == ("completed", b'{"done":1}')


async def test_a_timer_fires_once_and_survives_a_restart(bench: Bench) -> None:
    def begin(saga: Any, event: Any, context: Any) -> list[Any]:
        return [schedule({"type": "Add", "payload": {"n": 9}}, "5m")]

    definition = _counter().on("Begin", begin).build()
    life = await bench.live(definition)
    await life.publish("Begin", key="k")
    await bench.advance("4m")
    assert (await life.instance("counter", "k")).revision == 1
    await bench.die(life)
    life = await bench.live(definition)

    await bench.advance("1m")
    await bench.advance("1h")

    assert json.loads((await life.instance("counter", "k")).state) == {"seen": [9]}
    assert (await life.instance("counter", "k")).timers == ()


async def test_a_timer_whose_time_came_while_nobody_ran_fires_late(bench: Bench) -> None:
    def begin(saga: Any, event: Any, context: Any) -> list[Any]:
        return [schedule({"type": "Add", "payload": {"n": 9}}, "5m")]

    definition = _counter().on("Begin", begin).build()
    life = await bench.live(definition)
    await life.publish("Begin", key="k")
    await bench.die(life)
    bench.clock.advance("2h")

    life = await bench.live(definition)
    await life.runtime.settled()

    assert json.loads((await life.instance("counter", "k")).state) == {"seen": [9]}


async def test_a_timer_of_a_failing_handler_is_tried_again(bench: Bench) -> None:
    handler = Flaky(9)

    def begin(saga: Any, event: Any, context: Any) -> list[Any]:
        return [schedule({"type": "Add", "payload": {"n": 9}}, "5m")]

    definition = (
        define_saga("flaky")
        .state({"seen": []})
        .on("Begin", begin)
        .on("Add", handler)
        .retry(RetryPolicy(jitter=0.0))
        .build()
    )
    life = await bench.live(definition)
    await life.publish("Begin", key="k")

    await bench.advance("5m")
    assert (await life.instance("flaky", "k")).revision == 1
    await bench.die(life)
    life = await bench.live(definition)
    await bench.advance("1s")

    assert json.loads((await life.instance("flaky", "k")).state) == {"seen": [9]}


async def test_a_timer_of_a_finished_run_ends_quietly(bench: Bench) -> None:
    def begin(saga: Any, event: Any, context: Any) -> list[Any]:
        return [schedule({"type": "Add", "payload": {"n": 9}}, "5m")]

    def finish(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete()]

    life = await bench.live(_counter().on("Begin", begin).on("Finish", finish).build())
    await life.publish("Begin", key="k")
    await life.publish("Finish", key="k")

    await bench.advance("1h")

    assert len(await life.history("counter", "k")) == 2
    assert await life.runtime.store.timers() == []
    assert await life.runtime.dead_letters() == []


async def test_a_terminal_instance_takes_no_more_and_says_so(bench: Bench) -> None:
    def finish(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_fail("enough")]

    life = await bench.live(_counter().on("Finish", finish).build())
    await life.publish("Finish", key="k")

    late = await life.publish("Add", {"n": 1}, key="k")

    assert late.disposition == "ignored"
    assert (await life.instance("counter", "k")).revision == 1
    assert [entry.disposition for entry in await life.history("counter", "k")] == ["applied", "ignored"]


async def test_a_saga_that_reuses_its_key_opens_a_second_run(bench: Bench) -> None:
    def finish(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete()]

    life = await bench.live(_counter().on("Finish", finish).reuse("new_run").build())
    await life.publish("Finish", key="k")

    again = await life.publish("Add", {"n": 1}, key="k")

    assert (again.disposition, again.run, again.instance_id) == ("applied", 2, "counter~2:k")
    assert (await life.instance("counter", "k", 1)).status == "completed"
    assert (await life.instance("counter", "k")).run == 2


async def test_a_stopped_runtime_refuses_and_says_why(bench: Bench) -> None:
    life = await bench.live(_counter().build())
    await life.runtime.stop()

    refused = await life.runtime.publish({"type": "Add", "payload": {"n": 1}})

    assert isinstance(refused, PublishRejected)
    assert (refused.code, refused.retryable) == ("SAGA_NOT_STARTED", True)


async def test_a_backlog_that_is_full_refuses_for_now(bench: Bench) -> None:
    life = await bench.live(_flaky(Flaky(*range(20))), backlog_max=3)
    for n in range(3):
        await life.publish("Add", {"n": n}, key=f"k-{n}")

    refused = await life.runtime.publish(SagaMessage("Add", {"n": 9}, correlation_key="k-9"))

    assert isinstance(refused, PublishRejected)
    assert (refused.code, refused.retryable) == ("SAGA_OVERLOADED", True)


async def test_a_backlog_that_is_too_heavy_refuses_for_now(bench: Bench) -> None:
    handler = Flaky(*range(20))
    life = await bench.live(_flaky(handler), backlog_bytes_max=3 << 20)
    heavy = "x" * 1_000_000
    for n in range(3):
        await life.publish("Add", {"n": n, "text": heavy}, key=f"k-{n}")

    refused = await life.runtime.publish(SagaMessage("Add", {"n": 3, "text": heavy}, correlation_key="k-3"))
    light = await life.publish("Add", {"n": 4}, key="k-4")
    await bench.advance("1s")
    taken = await life.publish("Add", {"n": 5, "text": heavy}, key="k-5")

    assert isinstance(refused, PublishRejected)
    assert (refused.code, refused.retryable) == ("SAGA_OVERLOADED", True)
    assert "3 messages of 3000051 bytes are waiting already, and 1000017 more do not fit" in refused.reason
    assert (light.disposition, taken.disposition) == ("pending", "pending")


async def test_what_waits_is_weighed_once_for_many_that_come() -> None:
    weighed: list[int] = []

    def weigh() -> int:
        weighed.append(1)
        return 5_000

    scales = Scales(weigh, bytes_max=10_000, each_bytes_max=100)
    have_room = [scales.have_room(8_000, 50) for _ in range(101)]

    assert scales.few == 99
    assert have_room == [True] * 100 + [False]
    assert len(weighed) == 1


async def test_many_at_once_are_each_applied_once(bench: Bench) -> None:
    life = await bench.live(_counter().build())

    outcomes = await asyncio.gather(
        *(life.publish("Add", {"n": n}, key=f"k-{n % 100}", id=f"m-{n}") for n in range(2_000))
    )

    assert {outcome.disposition for outcome in outcomes} == {"applied"}
    revisions = [(await life.instance("counter", f"k-{n}")).revision for n in range(100)]
    assert revisions == [20] * 100


async def test_ignored_messages_are_recorded_a_hundred_times_and_then_counted(bench: Bench) -> None:
    def finish(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete()]

    life = await bench.live(_counter().on("Finish", finish).build())
    await life.publish("Finish", key="k")

    outcomes = await asyncio.gather(*(life.publish("Add", {"n": n}, key="k") for n in range(150)))

    assert {outcome.disposition for outcome in outcomes} == {"ignored"}
    instance = await life.instance("counter", "k")
    assert (instance.revision, instance.entries, instance.bystanders) == (1, 101, 150)
    assert len(await life.runtime.history("counter", "k", limit=1000)) == 101


async def test_a_store_that_comes_back_is_used_again_without_being_asked(bench: Bench) -> None:
    life = await bench.live(_counter().build())
    works = life.kv.commit

    async def fails(**_: Any) -> Any:
        raise BackendUnavailable("the disk is full")

    life.kv.commit = fails  # type: ignore[method-assign]
    refused = await life.runtime.publish(SagaMessage("Add", {"n": 1}, correlation_key="k", id="m-1"))
    still = await life.runtime.publish(SagaMessage("Add", {"n": 1}, correlation_key="k", id="m-1"))
    assert isinstance(refused, PublishRejected)
    assert (refused.reason, refused.retryable) == ("the disk is full", True)
    assert isinstance(still, PublishRejected)
    assert still.retryable
    assert not life.runtime.health().ready

    life.kv.commit = works  # type: ignore[method-assign]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not life.runtime.health().ready:  # noqa: ASYNC110 - nobody tells, and that is what is tested
            await asyncio.sleep(0.001)

    assert (await life.publish("Add", {"n": 1}, key="k", id="m-1")).disposition == "applied"


async def test_an_instance_that_cannot_be_read_costs_its_message_and_nobody_elses(bench: Bench) -> None:
    life = await bench.live(_counter().build())
    await asyncio.gather(life.publish("Add", {"n": 1}, key="broken"), life.publish("Add", {"n": 1}, key="well"))
    pk = (await life.instance("counter", "broken")).pk
    await bench.die(life)
    await bench.damage(pk, 1)
    life = await bench.live(_counter().build())

    broken, well = await asyncio.gather(
        life.publish("Add", {"n": 2}, key="broken"), life.publish("Add", {"n": 2}, key="well")
    )

    assert (broken.disposition, well.disposition) == ("dead_lettered", "applied")
    (letter,) = await life.runtime.dead_letters()
    assert letter.code == "STORE_CORRUPT"
