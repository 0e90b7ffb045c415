"""What goes wrong around a queue: brokers that are down, restarted, full, or will not have us; consumers that die;
clocks that jump. Servers that are stopped here are the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
import subprocess
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiormq
import pytest

from sagaloom.errors import BackendUnavailable, ConfigurationError, MessageRejected, QueueFull, SagasError
from sagaloom.kv import MemoryKeyValue
from sagaloom.kv.presence import FilePresence
from sagaloom.ports.queue import QueueDeadLetter, QueueMessage
from sagaloom.queue import Queue, QueueConnectionOptions, QueueContext, create_queue, create_typed_queue
from sagaloom.queues.kv import KvQueueBroker
from sagaloom.queues.sending import Outgoing, Sender
from tests.patience import PATIENCE_SECONDS
from tests.servers.finding import own
from tests.servers.others import Redis
from tests.servers.server import Server, free_port

pytestmark = pytest.mark.anyio


def queue_at(server: Server, *, namespace: str | None = None, **options: Any) -> Queue[Any]:
    given: dict[str, Any] = {server.name: server.url, "namespace": namespace or f"t{uuid.uuid4().hex[:12]}"}
    return create_queue("mails", provider=server.name, connection=QueueConnectionOptions(**given), **options)


@contextlib.asynccontextmanager
async def listening(queue: Queue[Any], handler: Any, **options: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.listen(handler, visibility_timeout=2.0, **options))
    try:
        yield
    finally:
        await queue.stop()
        await asyncio.wait_for(task, PATIENCE_SECONDS)


async def test_a_listener_waits_for_a_broker_that_is_down_and_enqueueing_says_so(server: Server) -> None:
    handled = asyncio.Event()

    async def handler(_: object) -> None:
        handled.set()

    await asyncio.to_thread(server.stop)
    async with queue_at(server) as queue, listening(queue, handler):
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(BackendUnavailable) as refused:
                await queue.enqueue("mail")
            while (problem := queue.problem) is None:  # noqa: ASYNC110 - the listener's own attempt may end later
                await asyncio.sleep(0.01)
        await asyncio.to_thread(server.start)
        await queue.enqueue("mail")
        await asyncio.wait_for(handled.wait(), PATIENCE_SECONDS)
        works_again = queue.problem

    assert refused.value.retryable
    assert server.name in str(refused.value)
    assert server.name in problem
    assert works_again is None


async def test_a_broker_that_dies_between_work_and_acknowledgement_costs_a_repeat_at_most(server: Server) -> None:
    attempts: list[str] = []

    async def handler(_: object, context: QueueContext) -> None:
        attempts.append(context.message_id)
        if len(attempts) == 1:
            # In one go: where the lease is the connection, the handler is cancelled meanwhile.
            await asyncio.to_thread(lambda: (server.kill(), server.start()))

    async with queue_at(server) as queue:
        receipt = await queue.enqueue("mail")
        can_count = (await queue.open()).exact_depth
        async with listening(queue, handler):
            async with asyncio.timeout(PATIENCE_SECONDS):
                # A broker that comes back and cannot tell what it has says that it has nothing.
                while not can_count and len(attempts) < 2:  # noqa: ASYNC110 - handlers tell nobody
                    await asyncio.sleep(0.05)
            await _until_empty(queue)
        depth = await queue.depth()

    assert 1 <= len(attempts) <= 2
    assert set(attempts) == {receipt.message_id}
    assert (depth.live, depth.dead) == (0, 0)


async def _until_empty(queue: Queue[Any]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            with contextlib.suppress(BackendUnavailable):
                if (await queue.depth()).live == 0:
                    return
            await asyncio.sleep(0.05)


@pytest.mark.server("rabbitmq")
async def test_a_delay_queue_that_rabbitmq_forgot_is_replaced_for_senders_and_for_retries(own_rabbitmq: Server) -> None:
    if not own_rabbitmq.is_running:
        own_rabbitmq.start()
    handled: set[object] = set()
    both = asyncio.Event()
    attempts = 0

    async def handler(payload: object) -> None:
        nonlocal attempts
        attempts += payload == "retried"
        if payload == "retried" and attempts == 1:
            raise ConnectionError("not yet")
        handled.add(payload)
        if handled >= {"delayed", "retried"}:
            both.set()

    where = f"t{uuid.uuid4().hex[:12]}"
    async with (
        queue_at(own_rabbitmq, namespace=where) as sender,
        queue_at(own_rabbitmq, namespace=where, retry_delay=500) as queue,
    ):
        # What is to be forgotten is the delay queue alone, and servers write down what they have within three seconds.
        await sender.enqueue("early")
        await asyncio.sleep(6)
        await sender.enqueue("delayed early", delay=500)
        await asyncio.to_thread(lambda: (own_rabbitmq.kill(), own_rabbitmq.start()))

        await _enqueued(sender, "delayed", delay=500)
        await _enqueued(sender, "retried")
        async with listening(queue, handler):
            await asyncio.wait_for(both.wait(), PATIENCE_SECONDS)

    assert "early" in handled


async def _enqueued(queue: Queue[Any], payload: object, **options: Any) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            with contextlib.suppress(BackendUnavailable):
                await queue.enqueue(payload, **options)
                return


@pytest.mark.server("redis")
async def test_a_redis_that_wants_another_password_is_an_error_of_the_settings() -> None:
    with own(_Guarded) as server:
        url = server.url.replace("redis://", "redis://:wrong-secret@")
        queue = create_queue("mails", provider="redis", connection=QueueConnectionOptions(redis=url))

        with pytest.raises(ConfigurationError, match="does not let us in") as refused:
            await queue.enqueue("mail")
        with pytest.raises(ConfigurationError, match="does not let us in"):
            await queue.listen(lambda _: None)

    assert "wrong-secret" not in str(refused.value)


class _Guarded(Redis):
    """Wants a password; that it says so is all that is asked of it."""

    def __init__(self) -> None:
        super().__init__(requirepass="right-secret")

    def _answers(self) -> bool:
        from tests.servers.server import talk

        return b"NOAUTH" in talk(self.port, says=b"PING\r\n", until=b"\r\n")


@pytest.mark.parametrize("provider", ["rabbitmq", "postgres"])
async def test_a_broker_that_does_not_know_us_is_an_error_of_the_settings(
    provider: str, request: pytest.FixtureRequest
) -> None:
    url: str = request.getfixturevalue(f"{provider}_url")
    host = url.rpartition("@")[2]
    strange = f"{url.partition('://')[0]}://nobody-here:wrong-secret@{host}"
    given: dict[str, Any] = {provider: strange}
    queue = create_queue("mails", provider=provider, connection=QueueConnectionOptions(**given))

    with pytest.raises(ConfigurationError, match="does not let us in") as refused:
        await queue.enqueue("mail")

    assert "wrong-secret" not in str(refused.value)


def _make_certificate(key: Path, certificate: Path) -> None:
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1")
    subprocess.run(
        [*made, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate, and is not installed")
@pytest.mark.parametrize(
    ("provider", "address"),
    [
        ("redis", "rediss://127.0.0.1:{port}/0"),
        ("rabbitmq", "amqps://guest:guest@127.0.0.1:{port}/"),
        ("postgres", "postgresql://me@127.0.0.1:{port}/db?sslmode=verify-full"),
    ],
)
async def test_a_certificate_that_nobody_vouches_for_is_refused(provider: str, address: str, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    _make_certificate(key, certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if provider == "postgres":
        # asyncpg wants a list of authorities in a file; one that this certificate is not of.
        other = tmp_path / "other.pem"
        _make_certificate(tmp_path / "k.pem", other)
        address += f"&sslrootcert={other}"

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError):
            if provider == "postgres":
                await reader.readexactly(8)
                writer.write(b"S")
                await writer.start_tls(context)
            await reader.read(1)
        writer.close()

    port = free_port()
    tls = None if provider == "postgres" else context
    async with await asyncio.start_server(greet, "127.0.0.1", port, ssl=tls):
        given: dict[str, Any] = {provider: address.format(port=port)}
        queue = create_queue("mails", provider=provider, connection=QueueConnectionOptions(**given))

        with pytest.raises(ConfigurationError, match="certificate cannot be verified"):
            await queue.enqueue("mail")


@pytest.mark.server("redis")
async def test_a_redis_whose_memory_is_full_takes_nothing_and_lets_consumers_make_room(own_redis: Server) -> None:
    from redis.asyncio import Redis as Client

    handled: list[object] = []

    async def handler(payload: object) -> None:
        handled.append(payload)

    async with queue_at(own_redis) as queue, Client.from_url(own_redis.url) as client:
        await queue.enqueue_many(range(5))
        await client.config_set("maxmemory", "1kb")
        try:
            with pytest.raises(QueueFull) as refused:
                await queue.enqueue_many(range(5, 10))
            left = await queue.depth()
            async with listening(queue, handler):
                await _until_empty(queue)
        finally:
            await client.config_set("maxmemory", "0")

    assert refused.value.retryable
    assert left.live == 5
    assert sorted(handled) == list(range(5))  # type: ignore[type-var]


async def test_a_message_that_kills_its_consumer_every_time_is_a_dead_letter_in_the_end(tmp_path: Path) -> None:
    connection = QueueConnectionOptions(kv=tmp_path / "queues.db")
    calls: list[int] = []
    async with create_queue("mails", provider="kv", connection=connection, retry_attempts=2) as queue:
        receipt = await queue.enqueue("poison")
        for _ in range(3):
            await _die_with_it(tmp_path / "queues.db")
        async with listening(queue, calls.append):
            await _until_empty(queue)
        [letter] = await queue.dead_letters()

    assert calls == []
    assert (letter.id, letter.reason, letter.error_code) == (
        receipt.message_id,
        "max_attempts_exceeded",
        "CONSUMER_DIED",
    )
    assert "handed out 3 times" in (letter.error_message or "")


_CONSUMER = """
import asyncio, os, sys
from sagaloom.queue import QueueConnectionOptions, create_queue

async def die(payload):
    os._exit(7)

queue = create_queue("mails", provider="kv", connection=QueueConnectionOptions(kv=sys.argv[1]))
asyncio.run(queue.listen(die))
"""


async def _die_with_it(path: Path) -> None:
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _CONSUMER, str(path))
    assert await asyncio.wait_for(process.wait(), PATIENCE_SECONDS) == 7


@pytest.mark.parametrize("jump", [timedelta(days=400), timedelta(days=-400)])
async def test_a_clock_that_jumps_takes_no_message_from_whoever_works_on_it(jump: timedelta, tmp_path: Path) -> None:
    now = datetime(2026, 1, 31, tzinfo=UTC)
    kv = MemoryKeyValue()

    def broker() -> KvQueueBroker:
        return KvQueueBroker(
            "q",
            kv,
            presence=lambda seconds: FilePresence(tmp_path / "q", lease_seconds=seconds),
            now=lambda: now,
        )

    first, second = broker(), broker()
    for each in (first, second):
        await each.begin(lambda: None, prefetch=9, lease_seconds=5)
    await first.send([(QueueMessage(id="m", body=b"1", enqueued_at=now), 0)])
    [delivery] = (await first.exchange((), limit=1)).deliveries
    now += jump

    stolen = (await second.exchange((), limit=1)).deliveries
    lost = await first.renew([delivery.token])

    assert (list(stolen), list(lost)) == ([], [])
    for each in (first, second):
        await each.close()


@pytest.mark.parametrize("server", [pytest.param("rabbitmq", marks=pytest.mark.server("rabbitmq"))], indirect=True)
async def test_thousands_of_dead_letters_are_within_reach(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="sagaloom.queue")
    count = 3_000

    async def handler(_: object) -> None:
        raise SagasError("no", retryable=False)

    async with queue_at(server) as queue:
        for first in range(0, count, 1_000):
            await queue.enqueue_many(range(first, first + 1_000))
        async with listening(queue, handler, concurrency=256):
            await _until_empty(queue)
        listed = await queue.dead_letters(limit=count)
        redriven = await queue.redrive(*(letter.id for letter in listed[:2_000]))
        discarded = await queue.discard()
        depth = await queue.depth()

    assert (len(listed), redriven, discarded) == (count, 2_000, 1_000)
    assert (depth.waiting, depth.dead) == (2_000, 0)


@pytest.mark.parametrize("server", [pytest.param("rabbitmq", marks=pytest.mark.server("rabbitmq"))], indirect=True)
async def test_what_was_sent_twice_under_one_id_is_one_dead_letter(server: Server) -> None:
    async def handler(_: object) -> None:
        raise SagasError("no", retryable=False)

    async with queue_at(server) as queue:
        for _ in range(2):  # as after an answer that was lost; this broker keeps both
            await queue.enqueue_many(["a", "b", "c"], message_ids=["a", "b", "c"])
        async with listening(queue, handler):
            await _until_empty(queue)
        pages = [[letter.id for letter in await queue.dead_letters(limit=2)]]
        while pages[-1] and len(pages) < 9:
            pages.append([letter.id for letter in await queue.dead_letters(limit=2, after=pages[-1][-1])])
        redriven = await queue.redrive("a")
        discarded = await queue.discard()
        depth = await queue.depth()

    assert sorted(each for page in pages for each in page) == ["a", "b", "c"]
    assert (redriven, discarded) == (1, 2)
    assert (depth.waiting, depth.dead) == (1, 0)


@pytest.mark.parametrize("server", [pytest.param("rabbitmq", marks=pytest.mark.server("rabbitmq"))], indirect=True)
async def test_a_listener_outlives_its_queue(server: Server) -> None:
    taken: asyncio.Queue[object] = asyncio.Queue()
    namespace = f"t{uuid.uuid4().hex[:12]}"

    async with queue_at(server, namespace=namespace) as queue, listening(queue, taken.put):
        await queue.enqueue("before")
        first = await asyncio.wait_for(taken.get(), PATIENCE_SECONDS)
        operator = await aiormq.connect(server.url)
        await (await operator.channel()).queue_delete(f"{namespace}.mails")
        while not await _consumers(operator, f"{namespace}.mails"):  # noqa: ASYNC110 - the broker tells nobody
            await asyncio.sleep(0.05)
        await operator.close()
        await queue.enqueue("after")
        second = await asyncio.wait_for(taken.get(), PATIENCE_SECONDS)

    assert (first, second) == ("before", "after")


async def _consumers(connection: aiormq.abc.AbstractConnection, queue: str) -> int:
    with contextlib.suppress(aiormq.exceptions.ChannelNotFoundEntity):
        channel = await connection.channel()
        return (await channel.queue_declare(queue, passive=True)).consumer_count or 0
    return 0


class _Drawer:
    """A home for dead letters of the user's own, which fails at first."""

    def __init__(self) -> None:
        self.letters: dict[str, QueueDeadLetter] = {}
        self.refusals = 1

    async def append(self, letter: QueueDeadLetter) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("the drawer sticks")
        self.letters[letter.id] = letter

    async def list(self, queue: str, *, limit: int, after: str | None = None) -> Sequence[QueueDeadLetter]:
        return list(self.letters.values())[:limit]

    async def get(self, queue: str, ids: Sequence[str]) -> Sequence[QueueDeadLetter]:
        return [self.letters[each] for each in ids if each in self.letters]

    async def remove(self, queue: str, ids: Sequence[str]) -> int:
        return sum(self.letters.pop(each, None) is not None for each in ids)

    async def depth(self, queue: str) -> int:
        return len(self.letters)


async def test_dead_letters_may_have_a_home_of_their_own(tmp_path: Path) -> None:
    drawer = _Drawer()
    connection = QueueConnectionOptions(kv=tmp_path / "queues.db")
    is_mended = False

    async def handler(_: object) -> None:
        if not is_mended:
            raise RuntimeError("broken")

    async with create_queue(
        "mails", provider="kv", connection=connection, retry_attempts=0, dead_letter_store=drawer
    ) as queue:
        receipt = await queue.enqueue("mail", deduplication_id="d")
        async with listening(queue, handler):
            await _until_empty(queue)
        dead = await queue.depth()
        is_mended = True
        redriven = await queue.redrive(receipt.message_id)
        waiting = await queue.depth()
        async with listening(queue, handler):
            await _until_empty(queue)

    assert (dead.dead, redriven, waiting.waiting, drawer.letters) == (1, 1, 1, {})


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"priority": 101}, "priority 101 .* is no whole number from 0 to 100"),
        ({"delay": -1}, "delay of a message for queue 'mails'"),
        ({"delay": "soon"}, "delay of a message for queue 'mails'"),
        ({"key": ""}, "the order key is empty"),
        ({"deduplication_id": "x" * 2000}, "deduplication_ids"),
        ({"headers": {"a": 1}}, "header 'a' of a message for queue 'mails' is 1: no text"),
        ({"headers": {"": "a"}}, "has no name"),
        ({"headers": {"a" * 129: "a"}}, "or one of more than 128 bytes"),
        ({"headers": {"a": "\udcff"}}, "holds a lone surrogate"),
        ({"headers": {"sagaloom-attempts": "1"}}, "a name that brokers use themselves"),
        ({"headers": {"x-death": "1"}}, "a name that brokers use themselves"),
        ({"headers": {"CC": "mails"}}, "a name that brokers use themselves"),
        ({"headers": {"a": "x" * 20_000}}, "at most 64 of 16384 in all"),
        ({"message_id": "a\nb"}, "control character"),
    ],
)
async def test_what_no_broker_could_carry_is_refused_before_it_is_asked(
    how: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    connection = QueueConnectionOptions(kv=tmp_path / "queues.db")
    async with create_queue("mails", provider="kv", connection=connection) as queue:
        with pytest.raises(MessageRejected, match=complaint):
            await queue.enqueue("mail", **how)

    assert not os.path.exists(connection.kv or "")  # noqa: ASYNC240, PTH110 - the loop is ours alone


async def test_what_is_no_id_of_a_dead_letter_is_refused_before_a_broker_is_asked(tmp_path: Path) -> None:
    connection = QueueConnectionOptions(kv=tmp_path / "queues.db")
    async with create_queue("mails", provider="kv", connection=connection) as queue:
        for asked in (queue.redrive("a\0b"), queue.discard(""), queue.dead_letters(after="a\0b")):
            with pytest.raises(MessageRejected, match="the id of a dead letter of queue 'mails'"):
                await asked


async def test_a_message_that_its_broker_refuses_takes_no_other_along() -> None:
    sent: list[str] = []

    async def send(outgoing: Sequence[Outgoing]) -> Sequence[bool]:
        if any(delay_ms > 1_000 for _, delay_ms in outgoing):
            raise MessageRejected("too late")
        sent.extend(message.id for message, _ in outgoing)
        return [True] * len(outgoing)

    sender = Sender(send)
    made = [QueueMessage(id=f"m{n}", body=b"1", enqueued_at=datetime.now(UTC)) for n in range(4)]
    delays = [0, 0, 2_000, 0]  # The first one is under way while the others come together.
    outcomes = await asyncio.gather(
        *(sender.send([(message, delay)]) for message, delay in zip(made, delays, strict=True)),
        return_exceptions=True,
    )

    assert sent == ["m0", "m1", "m3"]
    assert [isinstance(outcome, MessageRejected) for outcome in outcomes] == [False, False, True, False]


async def test_a_payload_that_is_too_large_or_of_another_type_is_refused(tmp_path: Path) -> None:
    connection = QueueConnectionOptions(kv=tmp_path / "queues.db")
    async with create_typed_queue("mails", dict[str, int], provider="kv", connection=connection) as queue:
        with pytest.raises(MessageRejected, match="message 0 for queue 'mails' cannot be sent"):
            await queue.enqueue({"n": "x"})  # type: ignore[dict-item]
    async with create_queue("mails", provider="kv", connection=connection, max_message_bytes=100) as queue:
        with pytest.raises(MessageRejected, match="has 202 bytes of JSON, at most 100 are allowed") as refused:
            await queue.enqueue("x" * 200)

    assert refused.value.code == "PAYLOAD_TOO_LARGE"
