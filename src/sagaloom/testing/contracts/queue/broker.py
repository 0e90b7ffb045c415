"""What a broker does: it takes messages in, gives them out under a lease, and lets them be settled."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import msgspec
import pytest

from sagaloom.errors import MessageRejected, QueueFull
from sagaloom.ports.queue import Acked, Buried, QueueBroker, Released, Retried
from sagaloom.testing.contracts.queue.base import OpenBroker, QueueCase
from sagaloom.testing.contracts.queue.samples import (
    LEASE_SECONDS,
    PATIENCE_SECONDS,
    START,
    Consumer,
    ids,
    letter_of,
    message,
    queue_over,
    until,
)

__all__ = ["Brokers"]


class Brokers(QueueCase):
    """The port alone, without a queue around it."""

    # -- sending and taking -------------------------------------------------------------------------------------------

    async def test_it_is_a_queue_broker(self, broker: QueueBroker) -> None:
        assert isinstance(broker, QueueBroker)
        assert broker.queue == "q"
        assert "'q'" in broker.name
        assert broker.capabilities.durability

    async def test_a_message_comes_out_as_it_went_in(self, broker: QueueBroker, consumer: Consumer) -> None:
        sent = message(1, headers={"a": "ä", "traceparent": "00-1"}, enqueued_at=START.replace(microsecond=123_000))

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

        await asyncio.wait_for(consumer.arrived.wait(), PATIENCE_SECONDS)

    # -- settling -----------------------------------------------------------------------------------------------------

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

        assert time.monotonic() - began >= 0.29

    async def test_a_released_message_comes_at_once_and_its_attempt_does_not_count(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(1), 0)])
        [first] = await consumer.take(1)
        await consumer.settle(Released(first.token))

        [again] = await consumer.take(1)

        assert (again.message.id, again.attempt) == ("m1", 1)

    # -- leases -------------------------------------------------------------------------------------------------------

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
        lease_seconds = 2 * LEASE_SECONDS
        for each in (consumer, other):
            await each.begin(lease_seconds=lease_seconds)
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

        for _ in range(5):
            assert list(await taker.broker.renew([delivery.token])) == []
            assert await watcher.finds_nothing(for_seconds=lease_seconds / 4)

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

    # -- what some brokers can ----------------------------------------------------------------------------------------

    async def test_a_delayed_message_comes_when_it_is_due_and_holds_nobody_up(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        began = time.monotonic()
        await broker.send([(message("later"), 400), (message("now"), 0)])

        [first] = await consumer.take(1)
        [second] = await consumer.take(1)

        assert ids([first, second]) == ["mnow", "mlater"]
        assert time.monotonic() - began >= 0.39

    async def test_many_delayed_messages_hide_no_message_that_is_due(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(f"late{n}"), 3_600_000 + n % 3) for n in range(500)])
        await broker.send([(message("short"), 50)])

        assert ids(await consumer.take(1)) == ["mshort"]

    async def test_a_higher_priority_goes_first(self, broker: QueueBroker, consumer: Consumer) -> None:
        if not broker.capabilities.priority:
            async with queue_over(broker) as queue:
                with pytest.raises(MessageRejected, match="priority"):
                    await queue.enqueue(1, priority=3)
            return
        await broker.send(
            [(message("low", priority=0), 0), (message("b"), 0), (message("c"), 0), (message("top", priority=100), 0)]
        )

        assert ids(await consumer.take(4)) == ["mtop", "mb", "mc", "mlow"]

    async def test_a_deduplication_id_is_stored_once(self, broker: QueueBroker, consumer: Consumer) -> None:
        if not broker.capabilities.deduplication:
            async with queue_over(broker) as queue:
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
            async with queue_over(broker) as queue:
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

    # -- dead letters -------------------------------------------------------------------------------------------------

    async def test_a_buried_message_is_a_dead_letter_with_all_that_is_known(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(1, headers={"a": "b"}), 0)])
        [delivery] = await consumer.take(1)
        await consumer.settle(Buried(delivery.token, letter_of(delivery)))

        assert list(await broker.dead_letters(limit=10)) == [letter_of(delivery)]
        await until(broker, live=0, dead=1)
        assert await consumer.finds_nothing()

    async def test_dead_letters_are_listed_from_the_oldest_on_page_by_page(
        self, broker: QueueBroker, consumer: Consumer
    ) -> None:
        await broker.send([(message(n), 0) for n in range(5)])
        for delivery in await consumer.take(5):
            failed_at = START.replace(second=int(delivery.message.id[1:]))
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
