"""GET /subscribe over real sockets: nothing is lost between two connections, and nothing stays behind a third."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from sagaloom.engine.records import FeedEvent
from sagaloom.errors import BackendUnavailable
from sagaloom.runtime import RuntimeOptions, SagaRuntime
from sagaloom.runtime.feed import cursor_of
from sagaloom.service import create_app
from sagaloom.testing import ManualClock
from tests.doors.http_door import PREFIX, FlakyStore, Payments, note_saga, order_saga, serve
from tests.doors.sse import WITHIN_SECONDS, Subscriber, Told, subscribed

OTHER_STORE = "0123456789abcdef0123456789abcdef"
_QUIET_SECONDS = 0.3
"""Between heartbeats where their number counts: much longer than anything that is to come before them."""


class FeedStore(FlakyStore):
    """A store whose feed cannot be read once it is told so."""

    feed_error: Exception | None = None

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        if self.feed_error is not None:
            raise self.feed_error
        return await super().feed(after=after, limit=limit)


class Served:
    """A runtime with the API on a port."""

    def __init__(self, runtime: SagaRuntime, store: FeedStore, clock: ManualClock, port: int) -> None:
        self.runtime = runtime
        self.store = store
        self.clock = clock
        self.port = port

    async def place(self, key: str, type: str = "OrderPlaced", **fields: Any) -> None:
        """Publishes an order; four events when it is a new one, and its effect has left."""
        message = {"type": type, "payload": {"amount": 1}, "correlationKey": key, **fields}
        receipt = await self.runtime.publish(message)
        assert receipt.published
        await self.runtime.settled()

    def cursor(self, number: int) -> int:
        return int(cursor_of(self.store.store_id, number))

    async def newest(self) -> int:
        return self.cursor((await self.store.feed_bounds())[1])

    def fill(self, count: int, *, detail: str | None = None) -> None:
        """Puts events into the feed behind the runtime's back, each in a commit of its own."""
        for n in range(len(self.store.events) + 1, len(self.store.events) + count + 1):
            event = FeedEvent(
                "saga:failed", self.clock.now(), "order", "o-1", 1, n, "failed", "Added", f"m-{n}", detail
            )
            self.store.events.append(event)
            self.store._feed_commits.append(n)


@contextlib.asynccontextmanager
async def serving(options: RuntimeOptions | None = None, **app_options: Any) -> AsyncIterator[Served]:
    store, clock = FeedStore(), ManualClock()
    runtime = SagaRuntime(
        store, definitions=(order_saga(), note_saga()), targets=[Payments()], clock=clock, options=options
    )
    async with runtime, serve(create_app(runtime, **app_options)) as port:
        yield Served(runtime, store, clock, port)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as made:
        yield made


async def refusal(port: int, **params: Any) -> tuple[int, Any]:
    """Status and body of a subscription that is refused."""
    async with subscribed(port, **params) as answer:
        assert answer.headers["content-type"] == "application/json"
        return answer.status, await answer.body()


def ids_of(told: list[Told]) -> list[int | None]:
    return [one.id for one in told]


# --- What goes over the wire -----------------------------------------------------------------------------------------


async def test_a_stream_begins_with_a_heartbeat_that_names_the_store_and_the_place(served: Served) -> None:
    await served.place("o-1")

    async with subscribed(served.port) as stream:
        told = await stream.next()

    assert told == Told(
        served.cursor(4),
        "heartbeat",
        {
            "type": "heartbeat",
            "timestamp": "2026-01-01T00:00:00.000Z",
            "data": {"connected": True, "storeId": served.store.store_id},
        },
    )
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["cache-control"] == "no-cache, no-store"
    assert stream.retry == 2000


async def test_an_event_says_what_happened_to_whom(served: Served) -> None:
    async with subscribed(served.port) as stream:
        await served.place("o/1", id="m-1")
        received, started, changed, dispatched = await stream.take(4)

    common = {
        "timestamp": "2026-01-01T00:00:00.000Z",
        "sagaName": "order",
        "sagaId": "order",
        "instanceId": "order:o/1",
        "correlationId": "o/1",
        "correlationKey": "o/1",
        "run": 1,
        "revision": 1,
        "messageId": "m-1",
    }
    assert received.data == {
        "type": "saga:message_received",
        **common,
        "status": "pending",
        "messageType": "OrderPlaced",
    }
    assert started.data == {"type": "saga:started", **common, "status": "running", "messageType": "OrderPlaced"}
    assert changed.data == {"type": "saga:state_changed", **common, "status": "running", "messageType": "OrderPlaced"}
    effect_key = dispatched.data["data"].pop("effectKey")
    assert len(effect_key) == 40
    assert dispatched.data == {"type": "saga:effect_dispatched", **common, "data": {"target": "service:payments"}}
    assert [one.event for one in (received, started, changed, dispatched)] == [
        one.data["type"] for one in (received, started, changed, dispatched)
    ]
    assert ids_of([received, started, changed, dispatched]) == [served.cursor(n) for n in range(1, 5)]


async def test_a_reason_is_told_with_the_event(served: Served) -> None:
    await served.place("o-1")
    async with subscribed(served.port) as stream:
        await served.place("o-1", "OrderRefused")
        told = {one.event: one.data for one in await stream.take(5)}

    assert told["saga:compensating"]["data"] == {"detail": "no stock"}
    assert told["saga:failed"]["data"] == {"detail": "refunded"}
    assert told["saga:failed"]["status"] == "failed"


async def test_every_subscriber_gets_every_event(served: Served) -> None:
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(subscribed(served.port)) for _ in range(5)]
        for stream in streams:
            await stream.next()
        for n in range(10):
            await served.place(f"o-{n}")

        told = await asyncio.gather(*(stream.take(40) for stream in streams))

    assert ids_of(told[0]) == [served.cursor(n) for n in range(1, 41)]
    assert told == [told[0]] * 5


async def test_head_is_answered_without_a_stream(served: Served) -> None:
    async with subscribed(served.port, method="HEAD") as answer:
        rest = await asyncio.wait_for(answer.reader.read(1), 0.3) if answer.reader.at_eof() else b""

    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert rest == b""
    assert not served.runtime._feed.is_reading


async def test_the_document_describes_the_stream(served: Served) -> None:
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as client:
        document = (await client.get("/api/openapi.json")).json()

    operation = document["paths"][f"{PREFIX}/subscribe"]["get"]
    assert set(operation["responses"]["200"]["content"]) == {"text/event-stream"}
    assert {"422", "429", "503"} <= set(operation["responses"])
    assert {one["name"] for one in operation["parameters"]} == {
        "after",
        "sagaName",
        "sagaId",
        "correlationId",
        "correlationKey",
        "topic",
        "type",
        "streaming",
        "Last-Event-ID",
    }


# --- Coming back -----------------------------------------------------------------------------------------------------


async def test_a_reader_cut_off_fifty_times_under_load_misses_nothing_and_hears_nothing_twice() -> None:
    async with serving(heartbeat_seconds=0.05) as served:
        one, other = await be_cut_and_be_left_alone(served, cuts=50)

    assert ids_of(one) == [served.cursor(n) for n in range(1, len(served.store.events) + 1)]
    assert len(one) > 200
    assert "reset" not in {told.event for told in one}
    assert one == other


async def be_cut_and_be_left_alone(served: Served, *, cuts: int) -> tuple[list[Told], list[Told]]:
    """What a reader is told who is cut off so many times while orders are placed, and what another one is told."""
    dice = random.Random(1)
    is_enough, is_over = asyncio.Event(), asyncio.Event()

    async def place_orders() -> None:
        number = 0
        while not is_enough.is_set():
            orders = [
                {"type": "OrderPlaced", "payload": {"amount": 1}, "correlationKey": f"o-{number + n}"}
                for n in range(20)
            ]
            await asyncio.gather(*(served.runtime.publish(order) for order in orders))
            number += 20
        await served.runtime.settled()
        is_over.set()

    async def read_to_the_end(stream: Subscriber, found: list[Told]) -> list[Told]:
        while not is_over.is_set() or found[-1].id != await served.newest():
            told = await stream.next()
            assert told is not None
            if told.event != "heartbeat":
                found.append(told)
        return found

    async def be_cut() -> list[Told]:
        found: list[Told] = []
        for _ in range(cuts):
            async with subscribed(served.port, found[-1].id if found else 0) as stream:
                found += await stream.take(dice.randint(1, 60))
        is_enough.set()
        async with subscribed(served.port, found[-1].id) as stream:
            return await read_to_the_end(stream, found)

    async def be_left_alone() -> list[Told]:
        async with subscribed(served.port, after=0) as stream:
            return await read_to_the_end(stream, [])

    async with asyncio.timeout(2 * WITHIN_SECONDS):
        _, one, other = await asyncio.gather(place_orders(), be_cut(), be_left_alone())
    return one, other


async def test_the_header_of_a_reader_who_comes_back_wins_over_his_address(served: Served) -> None:
    for n in range(3):
        await served.place(f"o-{n}")

    async with subscribed(served.port, served.cursor(10), after=0) as stream:
        assert ids_of(await stream.take(2)) == [served.cursor(11), served.cursor(12)]


async def test_an_empty_header_is_none(served: Served) -> None:
    await served.place("o-1")

    async with subscribed(served.port, "", after=served.cursor(3)) as stream:
        assert ids_of(await stream.take(1)) == [served.cursor(4)]


async def test_a_reader_can_come_back_with_the_id_of_a_heartbeat(served: Served) -> None:
    await served.place("o-1")
    async with subscribed(served.port, sagaName="nobody") as stream:
        beat = await stream.next()
    await served.place("o-2")

    assert beat is not None
    async with subscribed(served.port, beat.id) as stream:
        assert ids_of(await stream.take(4)) == [served.cursor(n) for n in range(5, 9)]


# --- Resets ----------------------------------------------------------------------------------------------------------


async def told_after(served: Served, cursor: object) -> list[Told]:
    """The first three things told to a reader with this cursor, heartbeats included."""
    async with subscribed(served.port, cursor) as stream:
        found = [await stream.next() for _ in range(3)]
    return [told for told in found if told is not None]


@pytest.mark.parametrize("reason", ["future", "other_store", "expired"])
async def test_a_cursor_that_leads_nowhere_gets_one_reset_and_then_what_is_kept(reason: str) -> None:
    async with serving(heartbeat_seconds=_QUIET_SECONDS) as served:
        served.fill(6)
        await served.store.prune_feed(before=5, limit=10)
        cursor = {
            "future": served.cursor(7),
            "other_store": int(cursor_of(OTHER_STORE, 5)),
            "expired": served.cursor(3),
        }[reason]

        beat, reset, first = await told_after(served, cursor)

        # Whoever is cut off before he hears of the reset has to hear of it again.
        assert (beat.event, beat.id) == ("heartbeat", None)
        assert reset == Told(
            served.cursor(4),
            "reset",
            {
                "type": "reset",
                "timestamp": "2026-01-01T00:00:00.000Z",
                "data": {
                    "reason": reason,
                    "oldestId": str(served.cursor(5)),
                    "storeId": served.store.store_id,
                },
            },
        )
        assert first.id == served.cursor(5)
        async with subscribed(served.port, cursor) as stream:
            told = [await stream.next() for _ in range(6)]
        assert [one.event for one in told if one] == [
            *("heartbeat", "reset", "saga:failed", "saga:failed"),
            *("heartbeat", "heartbeat"),
        ]


async def test_a_reader_cut_off_at_the_reset_comes_back_without_another(served: Served) -> None:
    served.fill(6)
    await served.store.prune_feed(before=5, limit=10)
    _, reset, _ = await told_after(served, 1)

    async with subscribed(served.port, reset.id) as stream:
        assert [(one.event, one.id) for one in await stream.take(2)] == [
            ("saga:failed", served.cursor(5)),
            ("saga:failed", served.cursor(6)),
        ]


# --- Filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        ({"sagaName": "order"}, "ooo"),
        ({"sagaId": "note"}, "n"),
        ({"sagaName": ["order", "note"]}, "oono"),
        ({"sagaName": "order", "sagaId": "note"}, ""),
        ({"correlationId": "o-1"}, "o"),
        ({"correlationKey": "n-1"}, "n"),
        ({"correlationId": "o-1", "correlationKey": "o-1", "sagaName": "order"}, "o"),
        ({"topic": "default"}, "oono"),
        ({"topic": "nothing"}, ""),
        ({"sagaName": ""}, "oono"),
        ({"type": ""}, "oono"),
        ({"streaming": "true"}, "oono"),
    ],
)
async def test_a_filter_leaves_the_others_out(wanted: dict[str, Any], keys: str) -> None:
    async with serving(heartbeat_seconds=0.02) as served:
        async with subscribed(served.port, type="saga:started") as stream:
            await stream.next()
        params = {"type": "saga:started", **wanted, "after": 0}
        if wanted.get("type") == "":
            params["type"] = ""
        await served.place("o-1")
        await served.place("o-2")
        await served.place("n-1", "Noted")
        await served.place("o-3")

        told: list[Told] = []
        async with subscribed(served.port, **params) as stream:
            while (one := await stream.next()) is not None and one.id != await served.newest():
                if one.event != "heartbeat":
                    told.append(one)

    assert "".join(one.data["correlationId"][0] for one in told if one.event == "saga:started") == keys


async def test_types_may_be_repeated_and_parted_by_commas(served: Served) -> None:
    await served.place("o-1")
    await served.place("o-1", "OrderPaid")

    async with subscribed(
        served.port, after=0, type=["saga:started,saga:completed", "saga:effect_dispatched", "heartbeat"]
    ) as stream:
        told = await stream.take(3)

    assert [one.event for one in told] == ["saga:started", "saga:effect_dispatched", "saga:completed"]


async def test_a_reader_who_asks_for_heartbeats_gets_nothing_else() -> None:
    async with serving(heartbeat_seconds=_QUIET_SECONDS) as served:
        await served.place("o-1")
        async with subscribed(served.port, after=0, type="heartbeat") as stream:
            told = [await stream.next() for _ in range(3)]

    assert [one and one.event for one in told] == ["heartbeat"] * 3
    assert [one and one.id for one in told] == [served.cursor(0), served.cursor(4), served.cursor(4)]


# --- Heartbeats ------------------------------------------------------------------------------------------------------


async def test_a_quiet_stream_says_that_it_is_there_and_where() -> None:
    async with serving(heartbeat_seconds=0.02) as served, subscribed(served.port) as stream:
        first, second = await stream.next(), await stream.next()
        await served.place("o-1")
        events = await stream.take(4)
        last = await stream.next()

    assert first is not None
    assert second is not None
    assert last is not None
    assert (first.event, second.event, last.event) == ("heartbeat",) * 3
    assert (first.id, second.id, last.id) == (served.cursor(0), served.cursor(0), served.cursor(4))
    assert ids_of(events) == [served.cursor(n) for n in range(1, 5)]


async def test_the_heartbeats_of_a_filtered_stream_move_on_with_what_is_left_out() -> None:
    async with serving(heartbeat_seconds=0.02) as served, subscribed(served.port, correlationId="nobody's") as stream:
        await stream.next()
        await served.place("o-1")
        place = 0
        while place != await served.newest():
            beat = await stream.next()
            assert beat is not None
            assert beat.event == "heartbeat"
            assert beat.id is not None
            place = beat.id


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"after": "yesterday"}, "after"),
        ({"after": "-1"}, "after"),
        ({"last_event_id": "1.5"}, "after"),
        ({"type": "saga:finished"}, "type"),
        ({"type": "saga:started,saga:finished"}, "type"),
        ({"saganame": "order"}, "saganame"),
        ({"correlationId": "a", "correlationKey": "b"}, "correlationKey"),
        ({"streaming": "maybe"}, "streaming"),
    ],
)
async def test_what_makes_no_sense_is_refused_before_the_stream_begins(
    served: Served, params: dict[str, Any], field: str
) -> None:
    status, problem = await refusal(served.port, **params)

    assert (status, problem["code"]) == (422, "VALIDATION_ERROR")
    assert list(problem["data"]["fieldErrors"]) == [field]


async def test_a_stream_asks_for_the_token_like_any_other_route() -> None:
    async with serving(token="secret") as served:
        status, problem = await refusal(served.port)
        async with subscribed(served.port, token="secret") as stream:
            first = await stream.next()

    assert (status, problem["code"]) == (401, "UNAUTHORIZED")
    assert first is not None
    assert first.event == "heartbeat"


async def test_a_runtime_that_has_stopped_streams_nothing(served: Served) -> None:
    await served.runtime.stop()

    status, problem = await refusal(served.port)

    assert (status, problem["code"], problem["retryable"]) == (503, "SAGA_NOT_STARTED", True)


async def test_one_stream_too_many_is_told_to_come_back_later() -> None:
    async with serving(streams_max=2) as served, subscribed(served.port) as one, subscribed(served.port) as other:
        await one.next()
        await other.next()
        async with subscribed(served.port) as third:
            problem = await third.body()
            answer = third.status, third.headers["retry-after"], problem["code"], problem["retryable"]

    assert answer == (429, "1", "RATE_LIMITED", True)


async def until_let_in(port: int) -> Told | None:
    """The first event of a stream, once there is room for it."""
    async with asyncio.timeout(WITHIN_SECONDS):
        while True:
            async with subscribed(port) as stream:
                if stream.status == 200:
                    return await stream.next()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("leaves", ["cut", "politely"])
async def test_a_reader_who_leaves_makes_room_for_another(leaves: str) -> None:
    async with serving(streams_max=1) as served:
        async with subscribed(served.port) as stream:
            await stream.next()
            if leaves == "politely":
                stream.writer.close()
                await stream.writer.wait_closed()

        assert await until_let_in(served.port) is not None


# --- The end of a stream ---------------------------------------------------------------------------------------------


async def test_a_reader_who_stops_reading_is_dropped_and_holds_nothing() -> None:
    async with serving(streams_max=1, write_seconds_max=0.2) as served:
        served.fill(20_000, detail="x" * 2_000)
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", served.port))
        await loop.sock_sendall(slow, f"GET {PREFIX}/subscribe?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert (await refusal_of_a_second(served.port))["code"] == "RATE_LIMITED"

        assert await until_let_in(served.port) is not None
        # What the system had taken still comes. What the process had was thrown away, not kept until he reads it.
        size = 0
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(WITHIN_SECONDS):
                while part := await loop.sock_recv(slow, 1 << 20):
                    size += len(part)
        assert size < 20_000 * 2_000 / 4
        slow.close()


async def refusal_of_a_second(port: int) -> Any:
    """What a second reader hears, once the first one's stream is open."""
    async with asyncio.timeout(WITHIN_SECONDS):
        while True:
            async with subscribed(port) as stream:
                if stream.status != 200:
                    return await stream.body()


async def test_a_slow_reader_gets_everything_in_his_own_time(served: Served) -> None:
    served.fill(3_000, detail="x" * 2_000)

    async with subscribed(served.port, after=0) as stream:
        told: list[Told] = []
        while len(told) < 3_000:
            told += await stream.take(100)
            await asyncio.sleep(0)

    assert ids_of(told) == [served.cursor(n) for n in range(1, 3_001)]


async def test_a_server_that_stops_ends_its_streams_at_once_and_cleanly() -> None:
    store, clock = FeedStore(), ManualClock()
    runtime = SagaRuntime(store, definitions=[order_saga()], targets=[Payments()], clock=clock)
    async with runtime, contextlib.AsyncExitStack() as stack:
        async with serve(create_app(runtime)) as port:
            streams = [await stack.enter_async_context(subscribed(port)) for _ in range(20)]
            for stream in streams:
                await stream.next()
            began = time.monotonic()
        assert time.monotonic() - began < WITHIN_SECONDS

        assert [await stream.next() for stream in streams] == [None] * 20


async def test_a_runtime_that_stops_ends_the_streams_of_its_server(served: Served) -> None:
    async with subscribed(served.port) as stream:
        await stream.next()
        await served.runtime.stop()

        assert await stream.next() is None


async def test_a_store_that_fails_ends_the_stream_with_a_word_and_the_reader_can_come_back(served: Served) -> None:
    await served.place("o-1")
    async with subscribed(served.port, after=0) as stream:
        told = await stream.take(4)
        served.store.feed_error = BackendUnavailable("the disk is gone")
        served.runtime._feed.committed()

        assert await stream.next() is None
        assert stream.comments == ["BACKEND_UNAVAILABLE: the disk is gone"]

    served.store.feed_error = None
    await served.place("o-2")
    async with subscribed(served.port, told[-1].id) as stream:
        assert ids_of(await stream.take(4)) == [served.cursor(n) for n in range(5, 9)]


# --- Many ------------------------------------------------------------------------------------------------------------


async def test_five_hundred_streams_all_get_the_same_events(served: Served) -> None:
    async with contextlib.AsyncExitStack() as stack:
        streams: list[Subscriber] = []
        for _ in range(10):
            entering = [stack.enter_async_context(subscribed(served.port)) for _ in range(50)]
            streams += await asyncio.gather(*entering)
        firsts = await asyncio.gather(*(stream.next() for stream in streams))
        reading = [asyncio.ensure_future(stream.take(40)) for stream in streams]

        for n in range(10):
            await served.place(f"o-{n}")
        told = await asyncio.gather(*reading)

    assert len(streams) == 500
    assert {first and first.event for first in firsts} == {"heartbeat"}
    assert ids_of(told[0]) == [served.cursor(n) for n in range(1, 41)]
    assert all(one == told[0] for one in told)
