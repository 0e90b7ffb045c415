"""What a `Queue` over the broker does: handlers in flight, retries, dead letters, stopping."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import pytest

from sagaloom.errors import Fenced, SagasError
from sagaloom.ports.queue import QueueBroker
from sagaloom.queues.handling import QueueContext
from sagaloom.testing.contracts.queue.base import OpenBroker, QueueCase
from sagaloom.testing.contracts.queue.samples import (
    LEASE_SECONDS,
    PATIENCE_SECONDS,
    Consumer,
    listened,
    message,
    queue_over,
    stop_soon,
    until,
)

__all__ = ["WholeQueues"]


class WholeQueues(QueueCase):
    """The queue that users have."""

    async def test_as_many_handlers_are_in_flight_as_were_asked_for_and_never_more(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            await queue.enqueue_many(range(40))
            running, most, done = 0, 0, 0
            are_all_there = asyncio.Event()

            async def handler(_: object) -> None:
                nonlocal running, most, done
                running += 1
                most = max(most, running)
                if running == 8:
                    are_all_there.set()
                await are_all_there.wait()
                await asyncio.sleep(0.02)
                running -= 1
                done += 1
                if done == 40:
                    stop_soon(queue)

            await listened(queue, handler, concurrency=8)

            assert (most, done) == (8, 40)
            assert (await queue.depth()).live == 0

    async def test_each_message_is_acknowledged_when_its_own_handler_ends(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            gate = asyncio.Event()
            handled: list[int] = []

            async def handler(payload: int) -> None:
                if payload == 0:
                    await gate.wait()
                handled.append(payload)
                if len(handled) == 10:
                    stop_soon(queue)

            await queue.enqueue_many(range(10))
            listening = asyncio.create_task(listened(queue, handler, concurrency=2))
            while len(handled) < 9 or (await queue.depth()).live > 1:  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.01)
            left = await queue.depth()
            gate.set()
            await listening

            assert left.live == 1
            assert handled[-1] == 0

    async def test_a_handler_that_raises_ends_neither_the_listener_nor_the_attempts_of_its_message(
        self, broker: QueueBroker
    ) -> None:
        attempts: Counter[str] = Counter()
        async with queue_over(broker, retry_attempts=2) as queue:

            async def handler(payload: str, context: QueueContext) -> None:
                attempts[payload] += 1
                assert context.attempt == attempts[payload]
                if payload == "never":
                    raise RuntimeError("never")
                if payload == "exit":
                    raise SystemExit(3)
                if payload == "third" and context.attempt < 3:
                    raise ConnectionError("not yet")

            await queue.enqueue_many(["never", "third", "exit", "good"])
            listening = asyncio.create_task(listened(queue, handler, concurrency=2))
            await until(queue, live=0, dead=2)
            await queue.stop()
            await listening

            letters = await queue.dead_letters()
            assert attempts == {"never": 3, "third": 3, "exit": 3, "good": 1}
            assert {letter.message.body for letter in letters} == {b'"never"', b'"exit"'}
            assert {letter.reason for letter in letters} == {"max_attempts_exceeded"}
            assert {letter.attempt for letter in letters} == {3}

    async def test_what_is_not_to_be_tried_again_is_a_dead_letter_at_once(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:

            async def handler(payload: str, context: QueueContext) -> None:
                if payload == "nack":
                    await context.nack(requeue=False, error_code="NO", error_message="never")
                    return
                raise SagasError("not like this", code="BAD", retryable=False)

            await queue.enqueue_many(["nack", "raise"])
            listening = asyncio.create_task(listened(queue, handler, concurrency=2))
            await until(queue, live=0, dead=2)
            await queue.stop()
            await listening

            letters = {letter.message.body: letter for letter in await queue.dead_letters()}
            assert {(each.reason, each.attempt) for each in letters.values()} == {("rejected", 1)}
            assert (letters[b'"nack"'].error_code, letters[b'"nack"'].error_message) == ("NO", "never")
            assert (letters[b'"raise"'].error_code, letters[b'"raise"'].error_message) == ("BAD", "not like this")

    async def test_a_poison_message_is_a_dead_letter_and_its_neighbours_are_handled(self, broker: QueueBroker) -> None:
        async with queue_over(broker, payload_type=dict[str, int]) as queue:
            handled: list[Any] = []
            await broker.send([(message("json", body=b"\xff{no json"), 0), (message("type", body=b'{"n":"x"}'), 0)])
            await queue.enqueue({"n": 1})

            async def handler(payload: dict[str, int]) -> None:
                handled.append(payload)

            listening = asyncio.create_task(listened(queue, handler, concurrency=1))
            await until(queue, live=0, dead=2)
            await queue.stop()
            await listening

            letters = await queue.dead_letters()
            assert handled == [{"n": 1}]
            assert {letter.id for letter in letters} == {"mjson", "mtype"}
            assert {(letter.reason, letter.attempt) for letter in letters} == {("validation_failed", 1)}

    async def test_a_handler_that_hangs_is_cut_off_and_its_message_comes_again(self, broker: QueueBroker) -> None:
        async with queue_over(broker, retry_attempts=1) as queue:
            attempts: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                attempts.append(context.attempt)
                if context.attempt == 1:
                    await asyncio.Event().wait()
                stop_soon(queue)

            await queue.enqueue("x")
            await listened(queue, handler, handler_timeout=0.1)

            assert attempts == [1, 2]
            assert await queue.depth() == (0, 0, 0, 0)

    async def test_a_handler_may_acknowledge_before_it_ends(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            seen: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                await context.ack()
                seen.append((await queue.depth()).live)
                stop_soon(queue)
                raise RuntimeError("too late to matter")

            await queue.enqueue("x")
            await listened(queue, handler)

            assert seen == [0]
            assert await queue.depth() == (0, 0, 0, 0)

    async def test_a_message_is_settled_once_by_its_handler(self, broker: QueueBroker) -> None:
        async with queue_over(broker, retry_attempts=0) as queue:
            refusals: list[Exception] = []

            async def handler(_: object, context: QueueContext) -> None:
                await context.nack(delay="1ms")
                try:
                    await context.ack()
                except SagasError as error:
                    refusals.append(error)
                stop_soon(queue)
                raise RuntimeError("after a nack")

            await queue.enqueue("x")
            await listened(queue, handler)

            assert len(refusals) == 1
            assert (await queue.depth()).dead == 1
            assert (await queue.depth()).live == 0

    async def test_a_plain_handler_runs_beside_the_loop(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            has_begun, goes_on = asyncio.Event(), threading.Event()
            was_let_go: list[bool] = []

            def handler(payload: str, context: QueueContext) -> None:
                queue_loop.call_soon_threadsafe(has_begun.set)
                was_let_go.append(goes_on.wait(PATIENCE_SECONDS))
                queue_loop.call_soon_threadsafe(stop_soon, queue)

            async def let_go() -> None:
                await has_begun.wait()  # which the loop can only do while the handler blocks
                goes_on.set()

            queue_loop = asyncio.get_running_loop()
            letting_go = asyncio.create_task(let_go())
            await queue.enqueue("x")
            await listened(queue, handler)
            await letting_go

            assert was_let_go == [True]
            assert (await queue.depth()).live == 0

    async def test_a_long_handler_keeps_its_message(self, broker: QueueBroker, open_client: OpenBroker) -> None:
        calls: list[str] = []
        async with queue_over(broker) as queue, queue_over(await open_client("q")) as twin:

            async def handler(_: object, context: QueueContext) -> None:
                calls.append(context.message_id)
                await asyncio.sleep(LEASE_SECONDS * 2.2)
                stop_soon(queue)
                stop_soon(twin)

            await queue.enqueue("x")
            await asyncio.gather(listened(queue, handler), listened(twin, handler))

            assert len(calls) == 1

    async def test_stopping_lets_handlers_end_and_leaves_the_rest_where_it_is(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            began, ended = 0, 0

            async def handler(_: object) -> None:
                nonlocal began, ended
                began += 1
                if began == 3:
                    stop_soon(queue)
                await asyncio.sleep(0.1)
                ended += 1

            await queue.enqueue_many(range(20))
            await listened(queue, handler, concurrency=3)

            assert began == ended
            # What a broker pushed in the last moment comes back to it when the channel has ended, a moment later.
            await until(queue, live=20 - ended, dead=0)
            assert (await queue.depth()).leased == 0

    async def test_after_the_grace_a_handler_is_cancelled_and_its_message_given_back(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            cancelled: list[int] = []
            attempts: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                attempts.append(context.attempt)
                stop_soon(queue)
                if len(attempts) == 1:
                    try:
                        await asyncio.Event().wait()
                    finally:
                        cancelled.append(context.attempt)

            await queue.enqueue("x")
            await listened(queue, handler, grace=0.1)
            await listened(queue, handler)

            assert cancelled == [1]
            assert attempts == [1, 1]

    async def test_a_listener_that_is_cancelled_gives_back_what_it_had(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            attempts: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                attempts.append(context.attempt)
                if len(attempts) == 1:
                    listening.cancel()
                    await asyncio.Event().wait()
                stop_soon(queue)

            await queue.enqueue("x")
            listening = asyncio.create_task(listened(queue, handler))
            with pytest.raises(asyncio.CancelledError):
                await listening
            await listened(queue, handler)

            assert attempts == [1, 1]

    async def test_a_queue_can_be_listened_to_again_after_a_stop(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            handled: list[int] = []

            async def handler(payload: int) -> None:
                handled.append(payload)
                stop_soon(queue)

            for n in range(3):
                await queue.enqueue(n)
                await listened(queue, handler)

            assert handled == [0, 1, 2]

    async def test_many_who_enqueue_at_once_lose_nothing(self, broker: QueueBroker) -> None:
        async with queue_over(broker) as queue:
            receipts = await asyncio.gather(*(queue.enqueue(n) for n in range(300)))

            handled: Counter[int] = Counter()

            async def handler(payload: int) -> None:
                handled[payload] += 1
                if len(handled) == 300:
                    stop_soon(queue)

            await listened(queue, handler, concurrency=32)

            assert len({receipt.message_id for receipt in receipts}) == 300
            assert handled == Counter(range(300))

    async def test_a_handler_whose_message_was_taken_from_it_is_told_so(
        self, broker: QueueBroker, open_client: OpenBroker
    ) -> None:
        if broker.capabilities.leases == "connection":
            return
        async with queue_over(broker) as queue:
            told: list[str] = []
            twin = await Consumer(await open_client("q")).begin()

            async def handler(_: object, context: QueueContext) -> None:
                # The loop stands still for longer than the lease, so nobody renews it.
                time.sleep(LEASE_SECONDS * 1.3)  # noqa: ASYNC251 - that is the point
                try:
                    await twin.take(1)
                    await context.ack()
                except (Fenced, asyncio.CancelledError) as error:
                    told.append(type(error).__name__)
                    stop_soon(queue)
                    raise

            await queue.enqueue("x")
            await listened(queue, handler)

            assert len(told) == 1
            assert (await queue.depth()).leased == 1
