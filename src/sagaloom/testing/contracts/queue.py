"""What every queue broker must do, as tests: subclass `QueueContract`, say how to open a broker, run pytest.

    class TestMyBroker(QueueContract):
        @pytest.fixture
        def open_broker(self) -> OpenBroker:
            async def open_broker(queue: str, max_length: int | None = None) -> QueueBroker:
                return await MyBroker.connect(queue, ...)

            return open_broker

Brokers that `open_broker` opens in one test share what they stand on, which must be empty when the test begins; two
with one name are two clients of one queue. A test of something that a broker has not among its `capabilities` checks
that it is refused. The tests are coroutines for anyio's pytest plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, cast

import msgspec
import pytest

from sagaloom.errors import Fenced, MessageRejected, QueueFull, SagasError
from sagaloom.ports.queue import (
    Acked,
    Buried,
    Delivery,
    QueueBroker,
    QueueDeadLetter,
    QueueMessage,
    Released,
    Retried,
    Settlement,
)
from sagaloom.queues.handling import QueueContext
from sagaloom.queues.queue import Queue, QueueSettings

__all__ = ["OpenBroker", "QueueContract"]

_START = datetime(2026, 1, 31, 12, tzinfo=UTC)
# Long enough for any answer, short enough to notice that it will never come.
_PATIENCE_SECONDS = 15.0
_LEASE_SECONDS = 1.0


class OpenBroker(Protocol):
    """Opens a client of a queue."""

    def __call__(self, queue: str, max_length: int | None = None) -> Awaitable[QueueBroker]: ...


def message(number: int | str, **fields: Any) -> QueueMessage:
    """A message with an id and a body that say which one it is."""
    made = QueueMessage(id=f"m{number}", body=f'{{"n":"{number}"}}'.encode(), enqueued_at=_START)
    return msgspec.structs.replace(made, **fields)


def letter_of(delivery: Delivery, queue: str = "q") -> QueueDeadLetter:
    return QueueDeadLetter(
        message=delivery.message,
        queue=queue,
        attempt=delivery.attempt,
        reason="rejected",
        failed_at=_START,
        error_code="CODE",
        error_message="text",
        traceback="trace",
    )


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.id for delivery in deliveries]


class Consumer:
    """A client that has begun to consume, and takes until there is what a test waits for."""

    def __init__(self, broker: QueueBroker) -> None:
        self.broker = broker
        self.arrived = asyncio.Event()

    async def begin(self, *, prefetch: int = 100, lease_seconds: float = _LEASE_SECONDS) -> Consumer:
        await self.broker.begin(self.arrived.set, prefetch=prefetch, lease_seconds=lease_seconds)
        return self

    async def take(self, count: int, *, within: float = _PATIENCE_SECONDS) -> list[Delivery]:
        """`count` messages, however often they have to be asked for."""
        taken: list[Delivery] = []
        deadline = time.monotonic() + within
        while len(taken) < count:
            self.arrived.clear()
            exchange = await self.broker.exchange((), limit=count - len(taken))
            taken += exchange.deliveries
            if time.monotonic() > deadline:
                raise AssertionError(f"{count} messages were to come, there are {ids(taken)}")
            if len(taken) < count:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.arrived.wait(), 0.05)
        return taken

    async def finds_nothing(self, *, for_seconds: float = 0.15) -> bool:
        deadline = time.monotonic() + for_seconds
        while time.monotonic() < deadline:
            if (await self.broker.exchange((), limit=10)).deliveries:
                return False
            await asyncio.sleep(0.02)
        return True

    async def settle(self, *settlements: Settlement) -> list[Any]:
        """Settles, and returns what was stale."""
        return list((await self.broker.exchange(settlements, limit=0)).stale)


class QueueContract:
    """The tests; a subclass has a fixture `open_broker`."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    async def open_client(self, open_broker: OpenBroker) -> AsyncIterator[OpenBroker]:
        """Opens clients that are closed in the end."""
        opened: list[QueueBroker] = []

        async def open_client(queue: str, max_length: int | None = None) -> QueueBroker:
            opened.append(await open_broker(queue, max_length))
            return opened[-1]

        yield open_client
        for broker in opened:
            await broker.close()

    @pytest.fixture
    async def broker(self, open_client: OpenBroker) -> QueueBroker:
        return await open_client("q")

    @pytest.fixture
    async def consumer(self, open_client: OpenBroker) -> Consumer:
        return await Consumer(await open_client("q")).begin()

    @pytest.fixture
    async def other(self, open_client: OpenBroker) -> Consumer:
        """A second consumer of the same queue, as another process would be; it has to `begin`."""
        return Consumer(await open_client("q"))

    # -- sending and taking ---------------------------------------------------------------------------------------

    async def test_it_is_a_queue_broker(self, broker: QueueBroker) -> None:
        assert isinstance(broker, QueueBroker)
        assert broker.queue == "q"
        assert "'q'" in broker.name
        assert broker.capabilities.durability

    async def test_a_message_comes_out_as_it_went_in(self, broker: QueueBroker, consumer: Consumer) -> None:
        sent = message(1, headers={"a": "ä", "traceparent": "00-1"}, enqueued_at=_START.replace(microsecond=123_000))

        assert list(await broker.send([(sent, 0)])) == [True]
        [delivery] = await consumer.take(1)

        assert (delivery.message, delivery.attempt) == (sent, 1)

    async def test_an_id_and_headers_may_be_as_long_as_a_queue_lets_them_be(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        headers = {"x-channel": "sms", "n" * 128: "", "long": "\N{GRINNING FACE}" * 16_000}
        sent = message(1, id="\N{GREEK SMALL LETTER PI}" * 512, headers=headers)

        await broker.send([(sent, 0)])
        [first] = await consumer.take(1)
        await consumer.settle(Retried(first.token, 0))
        [second] = await consumer.take(1)
        await consumer.settle(Buried(second.token, letter_of(second)))
        letters = list(await broker.dead_letters(limit=10))
        await broker.redrive([sent.id])
        [third] = await consumer.take(1)

        assert [first.message, second.message, *(letter.message for letter in letters), third.message] == [sent] * 4

    async def test_a_body_may_be_a_mebibyte(self, broker: QueueBroker, consumer: Consumer) -> None:
        sent = message(1, body=b'"' + b"x" * (1024 * 1024) + b'"')
        await broker.send([(sent, 0)])

        [delivery] = await consumer.take(1)

        assert delivery.message.body == sent.body

    async def test_messages_come_in_the_order_in_which_they_were_sent(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(n), 0) for n in range(20)])
        await broker.send([(message(n), 0) for n in range(20, 25)])

        assert ids(await consumer.take(25)) == [f"m{n}" for n in range(25)]

    async def test_no_more_are_taken_than_asked_for(self, broker: QueueBroker, consumer: Consumer) -> None:
        await broker.send([(message(n), 0) for n in range(5)])
        await consumer.take(1)

        exchange = await consumer.broker.exchange((), limit=2)

        assert len(exchange.deliveries) <= 2

    async def test_a_message_is_with_one_consumer_at_a_time(
        self, broker: QueueBroker, consumer: Consumer, other: Consumer
    ) -> None:
        await other.begin(prefetch=5)
        await broker.send([(message(n), 0) for n in range(10)])

        taken = [*await consumer.take(5), *await other.take(5)]

        assert sorted(ids(taken)) == [f"m{n}" for n in range(10)]
        assert await consumer.finds_nothing()

    async def test_queues_of_two_names_are_two_queues(self, broker: QueueBroker, open_client: OpenBroker) -> None:
        elsewhere = await Consumer(await open_client("q.2")).begin()
        await broker.send([(message(1), 0)])

        assert await elsewhere.finds_nothing()

    async def test_whoever_consumes_is_called_when_something_arrives(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        assert await consumer.finds_nothing()
        consumer.arrived.clear()

        await broker.send([(message(1), 0)])

        await asyncio.wait_for(consumer.arrived.wait(), _PATIENCE_SECONDS)

    # -- settling -------------------------------------------------------------------------------------------------

    async def test_an_acknowledged_message_is_gone(self, broker: QueueBroker, consumer: Consumer) -> None:
        await broker.send([(message(1), 0)])
        [delivery] = await consumer.take(1)

        assert await consumer.settle(Acked(delivery.token)) == []

        assert await consumer.finds_nothing()
        assert (await broker.depth()).live == 0

    async def test_settling_and_taking_is_one_exchange(self, broker: QueueBroker, consumer: Consumer) -> None:
        await broker.send([(message(n), 0) for n in range(3)])
        first = await consumer.take(2)

        exchange = await consumer.broker.exchange([Acked(each.token) for each in first], limit=2)

        deliveries = [*exchange.deliveries] or await consumer.take(1)
        assert ids(deliveries) == ["m2"]

    async def test_a_settlement_counts_once(self, broker: QueueBroker, consumer: Consumer) -> None:
        await broker.send([(message(1), 0)])
        [delivery] = await consumer.take(1)
        await consumer.settle(Acked(delivery.token))

        assert await consumer.settle(Retried(delivery.token, 0)) == [delivery.token]

        assert await consumer.finds_nothing()

    async def test_a_retried_message_comes_again_with_its_id_and_a_greater_attempt(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        sent = message(1, headers={"a": "b"})
        await broker.send([(sent, 0)])
        [first] = await consumer.take(1)
        await consumer.settle(Retried(first.token, 0))

        [second] = await consumer.take(1)
        await consumer.settle(Retried(second.token, 0))
        [third] = await consumer.take(1)

        assert (second.message, second.attempt) == (sent, 2)
        assert (third.message, third.attempt) == (sent, 3)

    async def test_a_retried_message_comes_not_before_its_delay(self, broker: QueueBroker, consumer: Consumer) -> None:
        await broker.send([(message(1), 0)])
        [delivery] = await consumer.take(1)
        began = time.monotonic()
        await consumer.settle(Retried(delivery.token, 300))

        await consumer.take(1)

        assert 0.29 <= time.monotonic() - began < 5

    async def test_a_released_message_comes_at_once_and_its_attempt_does_not_count(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(1), 0)])
        [first] = await consumer.take(1)
        await consumer.settle(Released(first.token))

        [again] = await consumer.take(1)

        assert (again.message.id, again.attempt) == ("m1", 1)

    # -- leases ---------------------------------------------------------------------------------------------------

    async def test_what_a_consumer_leaves_behind_is_taken_by_another(
        self, broker: QueueBroker, consumer: Consumer, other: Consumer
    ) -> None:
        await broker.send([(message(n), 0) for n in range(3)])
        taken = await consumer.take(3)
        await consumer.settle(Acked(taken[0].token))
        await consumer.broker.end()
        await other.begin()

        again = await other.take(2)

        assert sorted((each.message.id, each.attempt) for each in again) == [("m1", 2), ("m2", 2)]

    async def test_a_late_settlement_changes_nothing(
        self, broker: QueueBroker, consumer: Consumer, other: Consumer
    ) -> None:
        await broker.send([(message(1), 0)])
        [stale] = await consumer.take(1)
        await consumer.broker.end()
        await other.begin()
        [current] = await other.take(1)
        await consumer.begin()

        for late in (Acked(stale.token), Retried(stale.token, 0), Buried(stale.token, letter_of(stale))):
            assert await consumer.settle(late) == [stale.token]

        assert (await broker.depth()).dead == 0
        assert await other.settle(Acked(current.token)) == []

    async def test_a_lease_lasts_as_long_as_it_is_renewed(
        self, broker: QueueBroker, consumer: Consumer, other: Consumer
    ) -> None:
        await other.begin()
        await broker.send([(message(1), 0)])
        taker, watcher = consumer, other
        exchange = await consumer.broker.exchange((), limit=1)
        if not exchange.deliveries:  # A broker that pushes may have given it to the other one.
            await asyncio.sleep(0.1)
            exchange = await consumer.broker.exchange((), limit=1)
        if exchange.deliveries:
            [delivery] = exchange.deliveries
        else:
            taker, watcher = other, consumer
            [delivery] = await other.take(1)

        for _ in range(8):
            assert list(await taker.broker.renew([delivery.token])) == []
            assert await watcher.finds_nothing(for_seconds=_LEASE_SECONDS / 4)

        assert await taker.settle(Acked(delivery.token)) == []

    async def test_a_consumer_that_shows_no_sign_of_life_loses_its_messages(
        self, broker: QueueBroker, consumer: Consumer, other: Consumer
    ) -> None:
        if broker.capabilities.leases == "connection":
            # Nothing but the end of its connection says so; see the tests with processes that are killed.
            return
        await broker.send([(message(1), 0)])
        [delivery] = await consumer.take(1)
        await other.begin()

        [again] = await other.take(1)

        assert (again.message.id, again.attempt) == ("m1", 2)
        assert list(await consumer.broker.renew([delivery.token])) == [delivery.token]

    # -- what some brokers can ------------------------------------------------------------------------------------

    async def test_a_delayed_message_comes_when_it_is_due_and_holds_nobody_up(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        began = time.monotonic()
        await broker.send([(message("later"), 400), (message("now"), 0)])

        [first] = await consumer.take(1)
        [second] = await consumer.take(1)

        assert ids([first, second]) == ["mnow", "mlater"]
        assert 0.39 <= time.monotonic() - began < 5

    async def test_many_delayed_messages_hide_no_message_that_is_due(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(f"late{n}"), 3_600_000 + n % 3) for n in range(500)])
        await broker.send([(message("short"), 50)])

        assert ids(await consumer.take(1)) == ["mshort"]

    async def test_a_higher_priority_goes_first(self, broker: QueueBroker, consumer: Consumer) -> None:
        if not broker.capabilities.priority:
            async with _queue_over(broker) as queue:
                with pytest.raises(MessageRejected, match="priority"):
                    await queue.enqueue(1, priority=3)
            return
        await broker.send(
            [(message("low", priority=0), 0), (message("b"), 0), (message("c"), 0), (message("top", priority=100), 0)]
        )

        assert ids(await consumer.take(4)) == ["mtop", "mb", "mc", "mlow"]

    async def test_a_deduplication_id_is_stored_once(self, broker: QueueBroker, consumer: Consumer) -> None:
        if not broker.capabilities.deduplication:
            async with _queue_over(broker) as queue:
                with pytest.raises(MessageRejected, match="deduplication"):
                    await queue.enqueue(1, deduplication_id="d")
            return
        first = await broker.send([(message(n, deduplication_id=f"d{n % 2}"), 0) for n in range(4)])
        [delivery] = await consumer.take(1)
        await consumer.settle(Acked(delivery.token))

        again = await broker.send([(message(9, deduplication_id="d0"), 0), (message(8, deduplication_id="d8"), 0)])

        assert (list(first), list(again)) == ([True, True, False, False], [False, True])
        assert ids(await consumer.take(2)) == ["m1", "m8"]

    async def test_of_many_who_send_one_deduplication_id_at_once_one_is_stored(
        self, broker: QueueBroker, open_client: OpenBroker
    ) -> None:
        if not broker.capabilities.deduplication:
            return
        doors = [broker, *[await open_client("q") for _ in range(3)]]

        stored = await asyncio.gather(*(doors[n % 4].send([(message(n, deduplication_id="d"), 0)]) for n in range(20)))

        assert Counter(each[0] for each in stored) == {True: 1, False: 19}

    async def test_messages_of_one_key_are_handed_out_one_at_a_time_in_their_order(
        self, broker: QueueBroker, consumer: Consumer, other: Consumer
    ) -> None:
        if not broker.capabilities.order_by_key:
            async with _queue_over(broker) as queue:
                with pytest.raises(MessageRejected, match="key"):
                    await queue.enqueue(1, key="k")
            return
        await other.begin()
        await broker.send([(message(f"{key}{n}", key=key), 0) for n in range(3) for key in "ab"])

        seen: list[str] = []
        for _ in range(3):
            pair = await consumer.take(2)
            assert await other.finds_nothing(for_seconds=0.06)
            seen += ids(pair)
            await consumer.settle(*(Acked(each.token) for each in pair))

        assert [each for each in seen if each[1] == "a"] == ["ma0", "ma1", "ma2"]
        assert [each for each in seen if each[1] == "b"] == ["mb0", "mb1", "mb2"]
        assert (await broker.depth()).live == 0

    async def test_a_retried_message_holds_back_those_behind_it_and_a_dead_one_does_not(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        if not broker.capabilities.order_by_key:
            return
        await broker.send([(message(n, key="k"), 0) for n in range(3)])
        [first] = await consumer.take(1)
        await consumer.settle(Retried(first.token, 150))
        assert await consumer.finds_nothing(for_seconds=0.1)

        [again] = await consumer.take(1)
        await consumer.settle(Buried(again.token, letter_of(again)))
        [second] = await consumer.take(1)
        await consumer.settle(Released(second.token))
        [second_again] = await consumer.take(1)
        await consumer.settle(Acked(second_again.token))
        [third] = await consumer.take(1)

        assert ids([again, second, second_again, third]) == ["m0", "m1", "m1", "m2"]

    async def test_a_key_that_was_done_with_may_come_again(self, broker: QueueBroker, consumer: Consumer) -> None:
        if not broker.capabilities.order_by_key:
            return
        for n in range(3):
            await broker.send([(message(n, key="k"), 0)])
            [delivery] = await consumer.take(1)
            await consumer.settle(Acked(delivery.token))

        assert (await broker.depth()).live == 0

    async def test_a_full_queue_refuses_and_stores_nothing_of_what_does_not_fit(self, open_client: OpenBroker) -> None:
        broker = await open_client("q", max_length=3)
        await broker.send([(message(n), 0) for n in range(3)])

        with pytest.raises(QueueFull, match="max_length=3") as refused:
            await broker.send([(message(3), 0)])

        assert refused.value.retryable
        consumer = await Consumer(broker).begin()
        taken = await consumer.take(3)
        assert ids(taken) == ["m0", "m1", "m2"]
        await consumer.settle(*(Acked(each.token) for each in taken))
        await broker.send([(message(4), 0)])
        assert ids(await consumer.take(1)) == ["m4"]

    # -- dead letters ---------------------------------------------------------------------------------------------

    async def test_a_buried_message_is_a_dead_letter_with_all_that_is_known(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(1, headers={"a": "b"}), 0)])
        [delivery] = await consumer.take(1)
        await consumer.settle(Buried(delivery.token, letter_of(delivery)))

        assert list(await broker.dead_letters(limit=10)) == [letter_of(delivery)]
        await _until(broker, live=0, dead=1)
        assert await consumer.finds_nothing()

    async def test_dead_letters_are_listed_from_the_oldest_on_page_by_page(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(n), 0) for n in range(5)])
        for delivery in await consumer.take(5):
            failed_at = _START.replace(second=int(delivery.message.id[1:]))
            letter = msgspec.structs.replace(letter_of(delivery), failed_at=failed_at)
            await consumer.settle(Buried(delivery.token, letter))

        first = await broker.dead_letters(limit=3)
        rest = await broker.dead_letters(limit=3, after=first[-1].id)

        assert [letter.id for letter in (*first, *rest)] == [f"m{n}" for n in range(5)]

    async def test_a_redriven_message_waits_again_with_all_of_its_attempts(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(n, headers={"h": str(n)}), 0) for n in range(3)])
        for delivery in await consumer.take(3):
            await consumer.settle(Buried(delivery.token, letter_of(delivery)))

        assert await broker.redrive(["m1", "m9"]) == 1

        [again] = await consumer.take(1)
        assert (again.message, again.attempt) == (message(1, headers={"h": "1"}), 1)
        assert sorted(letter.id for letter in await broker.dead_letters(limit=10)) == ["m0", "m2"]

    async def test_many_dead_letters_are_redriven_or_discarded_at_once(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(n), 0) for n in range(3)])
        for delivery in await consumer.take(3):
            await consumer.settle(Buried(delivery.token, letter_of(delivery)))
        unknown = [f"x{n}" for n in range(9_000)]

        discarded = await broker.discard(["m0", *unknown, "m1"])
        redriven = await broker.redrive([*unknown, "m2"])

        assert (discarded, redriven) == (2, 1)
        assert ids(await consumer.take(1)) == ["m2"]
        assert list(await broker.dead_letters(limit=10)) == []

    async def test_a_redriven_message_is_no_duplicate_of_itself(self, broker: QueueBroker, consumer: Consumer) -> None:
        if not broker.capabilities.deduplication:
            return
        await broker.send([(message(1, deduplication_id="d"), 0)])
        [delivery] = await consumer.take(1)
        await consumer.settle(Buried(delivery.token, letter_of(delivery)))

        await broker.redrive(["m1"])

        assert ids(await consumer.take(1)) == ["m1"]

    async def test_a_discarded_message_is_gone(self, broker: QueueBroker, consumer: Consumer) -> None:
        await broker.send([(message(n), 0) for n in range(2)])
        for delivery in await consumer.take(2):
            await consumer.settle(Buried(delivery.token, letter_of(delivery)))

        assert await broker.discard(["m0", "m9"]) == 1
        assert await broker.discard(["m0"]) == 0

        assert [letter.id for letter in await broker.dead_letters(limit=10)] == ["m1"]
        assert await consumer.finds_nothing()

    # -- the whole queue ------------------------------------------------------------------------------------------

    async def test_as_many_handlers_are_in_flight_as_were_asked_for_and_never_more(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            await queue.enqueue_many(range(40))
            running, most, done = 0, 0, 0

            async def handler(_: object) -> None:
                nonlocal running, most, done
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.02)
                running -= 1
                done += 1
                if done == 40:
                    _stop_soon(queue)

            await _listened(queue, handler, concurrency=8)

            assert (most, done) == (8, 40)
            assert (await queue.depth()).live == 0

    async def test_each_message_is_acknowledged_when_its_own_handler_ends(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            gate = asyncio.Event()
            handled: list[int] = []

            async def handler(payload: int) -> None:
                if payload == 0:
                    await gate.wait()
                handled.append(payload)
                if len(handled) == 10:
                    _stop_soon(queue)

            await queue.enqueue_many(range(10))
            listening = asyncio.create_task(_listened(queue, handler, concurrency=2))
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
        async with _queue_over(broker, retry_attempts=2) as queue:

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
            listening = asyncio.create_task(_listened(queue, handler, concurrency=2))
            await _until(queue, live=0, dead=2)
            await queue.stop()
            await listening

            letters = await queue.dead_letters()
            assert attempts == {"never": 3, "third": 3, "exit": 3, "good": 1}
            assert {letter.message.body for letter in letters} == {b'"never"', b'"exit"'}
            assert {letter.reason for letter in letters} == {"max_attempts_exceeded"}
            assert {letter.attempt for letter in letters} == {3}

    async def test_what_is_not_to_be_tried_again_is_a_dead_letter_at_once(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:

            async def handler(payload: str, context: QueueContext) -> None:
                if payload == "nack":
                    await context.nack(requeue=False, error_code="NO", error_message="never")
                    return
                raise SagasError("not like this", code="BAD", retryable=False)

            await queue.enqueue_many(["nack", "raise"])
            listening = asyncio.create_task(_listened(queue, handler, concurrency=2))
            await _until(queue, live=0, dead=2)
            await queue.stop()
            await listening

            letters = {letter.message.body: letter for letter in await queue.dead_letters()}
            assert {(each.reason, each.attempt) for each in letters.values()} == {("rejected", 1)}
            assert (letters[b'"nack"'].error_code, letters[b'"nack"'].error_message) == ("NO", "never")
            assert (letters[b'"raise"'].error_code, letters[b'"raise"'].error_message) == ("BAD", "not like this")

    async def test_a_poison_message_is_a_dead_letter_and_its_neighbours_are_handled(self, broker: QueueBroker) -> None:
        async with _queue_over(broker, payload_type=dict[str, int]) as queue:
            handled: list[Any] = []
            await broker.send([(message("json", body=b"\xff{no json"), 0), (message("type", body=b'{"n":"x"}'), 0)])
            await queue.enqueue({"n": 1})

            async def handler(payload: dict[str, int]) -> None:
                handled.append(payload)

            listening = asyncio.create_task(_listened(queue, handler, concurrency=1))
            await _until(queue, live=0, dead=2)
            await queue.stop()
            await listening

            letters = await queue.dead_letters()
            assert handled == [{"n": 1}]
            assert {letter.id for letter in letters} == {"mjson", "mtype"}
            assert {(letter.reason, letter.attempt) for letter in letters} == {("validation_failed", 1)}

    async def test_a_handler_that_hangs_is_cut_off_and_its_message_comes_again(self, broker: QueueBroker) -> None:
        async with _queue_over(broker, retry_attempts=1) as queue:
            attempts: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                attempts.append(context.attempt)
                if context.attempt == 1:
                    await asyncio.Event().wait()
                _stop_soon(queue)

            await queue.enqueue("x")
            await _listened(queue, handler, handler_timeout=0.1)

            assert attempts == [1, 2]
            assert await queue.depth() == (0, 0, 0, 0)

    async def test_a_handler_may_acknowledge_before_it_ends(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            seen: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                await context.ack()
                seen.append((await queue.depth()).live)
                _stop_soon(queue)
                raise RuntimeError("too late to matter")

            await queue.enqueue("x")
            await _listened(queue, handler)

            assert seen == [0]
            assert await queue.depth() == (0, 0, 0, 0)

    async def test_a_message_is_settled_once_by_its_handler(self, broker: QueueBroker) -> None:
        async with _queue_over(broker, retry_attempts=0) as queue:
            refusals: list[Exception] = []

            async def handler(_: object, context: QueueContext) -> None:
                await context.nack(delay="1ms")
                try:
                    await context.ack()
                except SagasError as error:
                    refusals.append(error)
                _stop_soon(queue)
                raise RuntimeError("after a nack")

            await queue.enqueue("x")
            await _listened(queue, handler)

            assert len(refusals) == 1
            assert (await queue.depth()).dead == 1
            assert (await queue.depth()).live == 0

    async def test_a_plain_handler_runs_beside_the_loop(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            ticks, blocked = 0, 0.0

            def handler(payload: str, context: QueueContext) -> None:
                nonlocal blocked
                began = time.monotonic()
                time.sleep(0.2)
                blocked = time.monotonic() - began
                queue_loop.call_soon_threadsafe(_stop_soon, queue)

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.01)
                    ticks += 1

            queue_loop = asyncio.get_running_loop()
            ticking = asyncio.create_task(tick())
            await queue.enqueue("x")
            await _listened(queue, handler)
            ticking.cancel()

            assert blocked >= 0.2
            assert ticks >= 5
            assert (await queue.depth()).live == 0

    async def test_a_long_handler_keeps_its_message(self, broker: QueueBroker, open_client: OpenBroker) -> None:
        calls: list[str] = []
        async with _queue_over(broker) as queue, _queue_over(await open_client("q")) as twin:

            async def handler(_: object, context: QueueContext) -> None:
                calls.append(context.message_id)
                await asyncio.sleep(_LEASE_SECONDS * 2.2)
                _stop_soon(queue)
                _stop_soon(twin)

            await queue.enqueue("x")
            await asyncio.gather(_listened(queue, handler), _listened(twin, handler))

            assert len(calls) == 1

    async def test_stopping_lets_handlers_end_and_leaves_the_rest_where_it_is(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            began, ended = 0, 0

            async def handler(_: object) -> None:
                nonlocal began, ended
                began += 1
                if began == 3:
                    _stop_soon(queue)
                await asyncio.sleep(0.1)
                ended += 1

            await queue.enqueue_many(range(20))
            await _listened(queue, handler, concurrency=3)

            assert began == ended
            # What a broker pushed in the last moment comes back to it when the channel has ended, a moment later.
            await _until(queue, live=20 - ended, dead=0)
            assert (await queue.depth()).leased == 0

    async def test_after_the_grace_a_handler_is_cancelled_and_its_message_given_back(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            cancelled: list[int] = []
            attempts: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                attempts.append(context.attempt)
                _stop_soon(queue)
                if len(attempts) == 1:
                    try:
                        await asyncio.Event().wait()
                    finally:
                        cancelled.append(context.attempt)

            await queue.enqueue("x")
            await _listened(queue, handler, grace=0.1)
            await _listened(queue, handler)

            assert cancelled == [1]
            assert attempts == [1, 1]

    async def test_a_listener_that_is_cancelled_gives_back_what_it_had(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            attempts: list[int] = []

            async def handler(_: object, context: QueueContext) -> None:
                attempts.append(context.attempt)
                if len(attempts) == 1:
                    listening.cancel()
                    await asyncio.Event().wait()
                _stop_soon(queue)

            await queue.enqueue("x")
            listening = asyncio.create_task(_listened(queue, handler))
            with pytest.raises(asyncio.CancelledError):
                await listening
            await _listened(queue, handler)

            assert attempts == [1, 1]

    async def test_a_queue_can_be_listened_to_again_after_a_stop(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            handled: list[int] = []

            async def handler(payload: int) -> None:
                handled.append(payload)
                _stop_soon(queue)

            for n in range(3):
                await queue.enqueue(n)
                await _listened(queue, handler)

            assert handled == [0, 1, 2]

    async def test_many_who_enqueue_at_once_lose_nothing(self, broker: QueueBroker) -> None:
        async with _queue_over(broker) as queue:
            receipts = await asyncio.gather(*(queue.enqueue(n) for n in range(300)))

            handled: Counter[int] = Counter()

            async def handler(payload: int) -> None:
                handled[payload] += 1
                if len(handled) == 300:
                    _stop_soon(queue)

            await _listened(queue, handler, concurrency=32)

            assert len({receipt.message_id for receipt in receipts}) == 300
            assert handled == Counter(range(300))

    async def test_a_handler_whose_message_was_taken_from_it_is_told_so(
        self, broker: QueueBroker, open_client: OpenBroker
    ) -> None:
        if broker.capabilities.leases == "connection":
            return
        async with _queue_over(broker) as queue:
            told: list[str] = []
            twin = await Consumer(await open_client("q")).begin()

            async def handler(_: object, context: QueueContext) -> None:
                # The loop stands still for longer than the lease, so nobody renews it.
                time.sleep(_LEASE_SECONDS * 1.3)  # noqa: ASYNC251 - that is the point
                try:
                    await twin.take(1)
                    await context.ack()
                except (Fenced, asyncio.CancelledError) as error:
                    told.append(type(error).__name__)
                    _stop_soon(queue)
                    raise

            await queue.enqueue("x")
            await _listened(queue, handler)

            assert len(told) == 1
            assert (await queue.depth()).leased == 1


def _queue_over(broker: QueueBroker, *, payload_type: Any = None, retry_attempts: int = 3) -> Queue[Any]:
    """A queue that does not own its broker: closing it would close the test's."""

    async def opened() -> QueueBroker:
        return cast("QueueBroker", _NotClosed(broker))

    settings = QueueSettings(retry_attempts=retry_attempts, retry_delay_ms=20)
    return Queue(broker.queue, opened, payload_type=payload_type, settings=settings)


class _NotClosed:
    def __init__(self, broker: QueueBroker) -> None:
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def close(self) -> None:
        await self._broker.end()


async def _listened(queue: Queue[Any], handler: Callable[..., Any], **options: Any) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS * 2):
        await queue.listen(handler, visibility_timeout=_LEASE_SECONDS, **options)


_stopping: set[asyncio.Task[None]] = set()


def _stop_soon(queue: Queue[Any]) -> None:
    task = asyncio.ensure_future(queue.stop())
    _stopping.add(task)
    task.add_done_callback(_stopping.discard)


async def _until(queue: Queue[Any] | QueueBroker, *, live: int, dead: int) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while ((depth := await queue.depth()).live, depth.dead) != (live, dead):
        assert time.monotonic() < deadline, f"{depth} is not live={live} dead={dead}"
        await asyncio.sleep(0.02)
