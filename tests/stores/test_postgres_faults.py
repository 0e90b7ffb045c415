"""What the saga store says, and keeps, when the database dies, refuses, stops answering or runs out of space.

Every server here is the test's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from sagaloom import Saga, SagaContext, SagaMessage, define_saga, saga_complete, saga_fail, schedule, send
from sagaloom.errors import BackendUnavailable, SagasError
from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.kv.postgres.schema import Step, applied, steps, take, upgrade
from sagaloom.runtime import PublishReceipt, PublishRejected, RuntimeOptions, SagaRuntime
from sagaloom.stores import SqlSagaStore
from sagaloom.targets import EffectRequest, callable_target
from sagaloom.testing import check_invariants
from tests.complaints import complaints
from tests.patience import PATIENCE_SECONDS
from tests.servers.cutting import Cutter, Where
from tests.servers.finding import own
from tests.servers.postgres import Postgres

pytestmark = pytest.mark.server("postgres")


State = dict[str, Any]


def _charged(saga: Saga[State], event: SagaMessage[Any], context: SagaContext[State]) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], event.payload["n"]]}
    return [send("service:payments", {"n": event.payload["n"], "key": context.correlation_key})]


_CHARGES = define_saga("charges").state({"seen": []}).on("Charge", _charged).build()


def _charge(key: str, n: int, **more: Any) -> SagaMessage[Any]:
    return SagaMessage("Charge", {"n": n, **more}, correlation_key=key, id=f"m-{key}-{n}")


class _Worker:
    """A runtime on a server, and what it has charged."""

    def __init__(self, url: str, **options: Any) -> None:
        self.charged: list[tuple[str, int, str]] = []
        self.database = PostgresDatabase(url=url, deadline_seconds=options.pop("deadline_seconds", 3.0))
        rows = PostgresSagaRows(self.database)
        self.store = SqlSagaStore(rows, presence=PostgresPresence(self.database, lease_seconds=1.0))
        self.runtime = SagaRuntime(
            self.store,
            definitions=[_CHARGES],
            targets=[callable_target("service", self._pay)],
            options=RuntimeOptions(lease_seconds=1.0, drain_seconds=1.0, **options),
        )

    async def _pay(self, request: EffectRequest) -> None:
        self.charged.append((request.payload["key"], request.payload["n"], request.effect_key))

    async def publish(self, key: str, n: int, **more: Any) -> PublishReceipt:
        """Publishes until it is taken, as a client does."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                receipt = await self.runtime.publish(_charge(key, n, **more), wait=5)
                if isinstance(receipt, PublishReceipt):
                    return receipt
                assert receipt.retryable, receipt
                await asyncio.sleep(0.02)

    async def seen(self, key: str) -> list[int]:
        instance = await self.runtime.get_instance("charges", key)
        assert instance is not None
        seen: list[int] = _CHARGES.state_codec.decode(instance.state)["seen"]
        return seen


@asynccontextmanager
async def _working(url: str, **options: Any) -> AsyncIterator[_Worker]:
    worker = _Worker(url, **options)
    try:
        async with worker.runtime:
            yield worker
    finally:
        await worker.store.close()


async def _until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with own(Postgres) as started:
        yield started


@pytest.mark.parametrize("pooled", ["", "?pgbouncer=true"])
async def test_a_database_that_dies_under_load_is_unavailable_and_nothing_else(server: Postgres, pooled: str) -> None:
    database = PostgresDatabase(url=server.url + pooled, deadline_seconds=2)
    answers = 0
    is_over = False
    errors: list[Exception] = []

    async def ask() -> None:
        nonlocal answers
        while not is_over:
            try:
                await database.write("SELECT $1::int + 1", 1)
                answers += 1
            except Exception as error:  # noqa: BLE001 - which kinds come is what is asked
                errors.append(error)
                await asyncio.sleep(0.01)

    async def answered_again() -> None:
        before = answers
        async with asyncio.timeout(PATIENCE_SECONDS):
            while answers < before + 50:  # noqa: ASYNC110 - nobody sets an event
                await asyncio.sleep(0.01)

    async def harm() -> None:
        nonlocal is_over
        for _ in range(2):
            await answered_again()
            await asyncio.to_thread(server.restart)
            await answered_again()
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        await answered_again()
        is_over = True

    await asyncio.gather(harm(), *(ask() for _ in range(8)))

    assert {type(error) for error in errors} == {BackendUnavailable}
    assert [row[0] for row in await database.fetch("SELECT 7")] == [7]
    await database.close()


async def test_what_is_given_up_leaves_no_error_behind_and_its_connection_comes_back(server: Postgres) -> None:
    database = PostgresDatabase(url=server.url, deadline_seconds=0.5, connections_max=1)
    await database.fetch("SELECT 1")

    with complaints() as heard:
        await asyncio.to_thread(server.freeze)
        try:
            asking = asyncio.create_task(database.write("SELECT 2"))
            for _ in range(3):
                await asyncio.wait([asking], timeout=0.1)
                asking.cancel()
            await asyncio.wait([asking])
            with pytest.raises(BackendUnavailable):
                await database.write("SELECT 3")
        finally:
            await asyncio.to_thread(server.thaw)
        del asking
    database.deadline_seconds = PATIENCE_SECONDS
    answers = await database.fetch("SELECT 7")
    await database.close()

    assert ([row[0] for row in answers], heard) == ([7], [])


async def test_the_server_is_told_of_a_statement_that_was_given_up(server: Postgres) -> None:
    database = PostgresDatabase(url=server.url, deadline_seconds=1)

    with pytest.raises(BackendUnavailable, match="no answer within 1 s"):
        await database.write("SELECT pg_sleep(50) /* too long */")
    database.deadline_seconds = PATIENCE_SECONDS
    active = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND pid != pg_backend_pid() AND query LIKE "
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await database.fetch(f"{active} '%too long%'"):  # noqa: ASYNC110 - nobody tells but when asked
            await asyncio.sleep(0.02)
    await database.close()


@pytest.fixture
async def url(server: Postgres) -> AsyncIterator[str]:
    """The address of an empty database."""
    name = f"faults_{time.monotonic_ns()}"
    await asyncio.to_thread(server.sql, f"CREATE DATABASE {name}")
    yield f"{server.url.rpartition('/')[0]}/{name}"
    await asyncio.to_thread(server.sql, f"DROP DATABASE {name} WITH (FORCE)")


# -- a statement that the server refuses or ends ----------------------------------------------------------------------


async def test_a_statement_that_the_server_ends_has_changed_nothing_and_may_be_sent_again(url: str) -> None:
    async with _working(f"{url}?statement_timeout=1500") as worker:
        await worker.publish("k", 1)
        blocking = await asyncpg.connect(url)
        lock = blocking.transaction()
        await lock.start()
        await blocking.execute("LOCK TABLE saga_runtime_transition")

        refused = await worker.runtime.publish(_charge("k", 2), wait=5)

        await lock.rollback()
        await blocking.close()
        assert isinstance(refused, PublishRejected)
        assert (refused.code, refused.retryable) == ("BACKEND_UNAVAILABLE", True)
        assert "statement timeout" in refused.reason
        assert "raise statement_timeout" in refused.reason
        again = await worker.publish("k", 2)
        assert not again.duplicate
        assert await worker.seen("k") == [1, 2]
        await worker.runtime.settled()
        assert await check_invariants(worker.store) == []


async def test_a_commit_that_loses_a_deadlock_is_sent_again_and_its_publisher_sees_nothing_of_it(url: str) -> None:
    async with _working(url) as worker:
        for key in ("a", "b"):
            await worker.publish(key, 1)
        theirs = await asyncpg.connect(url)
        lock = theirs.transaction()
        await lock.start()
        # Ours is to be the one that looks for a deadlock first.
        await theirs.execute("SET LOCAL deadlock_timeout = '30s'")
        await theirs.execute("SELECT FROM saga_runtime_transition FOR UPDATE")
        await theirs.execute("LOCK TABLE saga_runtime_dedupe IN SHARE MODE")
        publishing = asyncio.create_task(worker.runtime.publish(_charge("a", 2), wait=10))
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%runtime_commit(%'"
        )
        looking = await asyncpg.connect(url)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await looking.fetchval(waiting):  # noqa: ASYNC110 - the server sets no event
                await asyncio.sleep(0.01)

        await theirs.execute("SELECT FROM saga_runtime_row WHERE tbl = 'member' FOR UPDATE", timeout=20)
        await lock.rollback()
        receipt = await publishing

        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert isinstance(receipt, PublishReceipt)
        assert receipt.outcomes[0].disposition == "applied"
        assert await worker.seen("a") == [1, 2]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await looking.fetchval(deadlocks) != 1:
                await looking.execute("SELECT pg_stat_clear_snapshot()")
                await asyncio.sleep(0.05)
        await theirs.close()
        await looking.close()


@pytest.mark.parametrize("times", [1, 20])
async def test_a_serialization_failure_is_tried_again_a_few_times_and_then_refused(url: str, times: int) -> None:
    async with _working(url) as worker:
        await worker.publish("k", 1)
        theirs = await asyncpg.connect(url)
        # A sequence goes on although its transaction is rolled back.
        await theirs.execute(f"""
            CREATE SEQUENCE tries;
            CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF nextval('tries') <= {times} THEN
                    RAISE EXCEPTION 'could not serialize access' USING ERRCODE = 'serialization_failure';
                END IF;
                RETURN new;
            END $$;
            CREATE TRIGGER losing BEFORE INSERT ON saga_runtime_transition FOR EACH ROW EXECUTE FUNCTION lose();
        """)
        await theirs.close()

        first = await worker.runtime.publish(_charge("k", 2), wait=5)

        await worker.publish("k", 2)
        assert isinstance(first, PublishReceipt if times == 1 else PublishRejected)
        assert isinstance(first, PublishReceipt) or first.retryable
        assert await worker.seen("k") == [1, 2]
        await worker.runtime.settled()
        assert await check_invariants(worker.store) == []


async def test_a_batch_that_is_too_much_for_the_server_is_taken_in_smaller_ones(url: str) -> None:
    """Else what waits would be sent again and again, and never go."""
    async with _working(url, works=False) as door:
        for n in range(64):
            await door.runtime.publish(_charge(f"k-{n}", 1))
    theirs = await asyncpg.connect(url)
    await theirs.execute("""
        CREATE FUNCTION dally() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.05); RETURN new; END $$;
        CREATE TRIGGER dallying BEFORE INSERT ON saga_runtime_transition FOR EACH ROW EXECUTE FUNCTION dally();
    """)
    await theirs.close()

    async with _working(url, deadline_seconds=1.0) as worker:
        await _until(lambda: len({key for key, _, _ in worker.charged}) == 64, 60)
        await worker.runtime.settled()

        assert [await worker.seen(f"k-{n}") for n in range(64)] == [[1]] * 64
        assert len({effect_key for _, _, effect_key in worker.charged}) == 64


# -- a line that is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before it arrives", "before the answer"])
async def test_a_commit_whose_answer_is_lost_is_looked_up_and_not_guessed(url: str, where: Where) -> None:
    async with Cutter.before(url) as line, _working(line.url) as worker:
        await worker.publish("k", 1)
        line.cut("cut here", where)

        receipt = await worker.publish("k", 2, note="cut here")

        await worker.publish("k", 3)
        await worker.runtime.settled()
        history = await worker.runtime.history("charges", "k")
        assert line.cuts == 1
        assert receipt.outcomes[0].disposition == "applied"
        assert await worker.seen("k") == [1, 2, 3]
        assert [(entry.revision, entry.disposition) for entry in history] == [(n, "applied") for n in (1, 2, 3)]
        assert sorted({(key, n) for key, n, _ in worker.charged}) == [("k", 1), ("k", 2), ("k", 3)]
        assert len({effect_key for _, _, effect_key in worker.charged}) == 3
        assert await check_invariants(worker.store) == []


@pytest.mark.parametrize("where", ["before it arrives", "before the answer"])
async def test_a_message_that_is_brought_to_another_process_over_a_line_that_is_cut_comes_once(
    url: str, where: Where
) -> None:
    async with _working(url) as worker, Cutter.before(url) as line, _working(line.url, works=False) as door:
        await door.publish("k", 1)
        line.cut("cut here", where)

        await door.publish("k", 2, note="cut here")
        await door.publish("k", 3)

        await worker.runtime.settled()
        assert line.cuts == 1
        assert await worker.seen("k") == [1, 2, 3]
        assert len({effect_key for _, _, effect_key in worker.charged}) == 3
        assert await check_invariants(worker.store) == []


# -- what is large, long or odd ---------------------------------------------------------------------------------------


async def test_ten_thousand_messages_for_one_instance_are_applied_in_their_order(url: str) -> None:
    def count(saga: Saga[State], event: SagaMessage[Any], context: SagaContext[State]) -> list[Any]:
        if event.payload["n"] != saga.state["next"]:
            saga.state = {**saga.state, "wrong": saga.state["wrong"] + 1}
        saga.state = {**saga.state, "next": event.payload["n"] + 1}
        return []

    counting = define_saga("counting").state({"next": 0, "wrong": 0}).on("Counted", count).build()
    database = PostgresDatabase(url=url)
    store = SqlSagaStore(PostgresSagaRows(database))
    await store.open()
    async with SagaRuntime(store, definitions=[counting]) as runtime:
        for first in range(0, 10_000, 1_000):
            numbers = range(first, first + 1_000)
            messages = [SagaMessage("Counted", {"n": n}, correlation_key="one", id=f"m-{n}") for n in numbers]
            receipts = await runtime.publish_many(messages)
            assert all(isinstance(receipt, PublishReceipt) for receipt in receipts)
        await runtime.settled(60)
        instance = await runtime.get_instance("counting", "one")
    await store.close()

    assert instance is not None
    assert instance.revision == 10_000
    assert counting.state_codec.decode(instance.state) == {"next": 10_000, "wrong": 0}


async def test_payloads_of_a_mebibyte_are_applied_however_many_come_at_once(url: str) -> None:
    text = "x" * ((1 << 20) - len('{"text":""}'))

    def keep(saga: Saga[State], event: SagaMessage[Any], context: SagaContext[State]) -> list[Any]:
        saga.state = {"text": event.payload["text"]}
        return [send("service:archive", {"text": event.payload["text"]})]

    async def archive(request: EffectRequest) -> None:
        archived.append(len(request.payload["text"]))

    archived: list[int] = []
    keeping = define_saga("keeping").state({"text": ""}).on("Kept", keep).build()
    store = SqlSagaStore(PostgresSagaRows(PostgresDatabase(url=url)))
    targets = [callable_target("service", archive)]
    async with SagaRuntime(store, definitions=[keeping], targets=targets) as runtime:
        messages = [SagaMessage("Kept", {"text": text}, correlation_key=f"k-{n}") for n in range(48)]
        receipts = await runtime.publish_many(messages)
        refused = await runtime.publish(SagaMessage("Kept", {"text": text + "x"}, correlation_key="k"))
        await runtime.settled(60)
        instance = await runtime.get_instance("keeping", "k-47")
    await store.close()

    assert all(isinstance(receipt, PublishReceipt) for receipt in receipts)
    assert archived == [len(text)] * 48
    assert instance is not None
    assert keeping.state_codec.decode(instance.state) == {"text": text}
    assert isinstance(refused, PublishRejected)
    assert "1048577 bytes" in refused.reason


async def test_what_the_columns_cannot_hold_is_kept_by_the_record(url: str) -> None:
    """NUL goes through JSON, and PostgreSQL's text cannot hold it. Lone surrogates are no text at all: a message with
    one is refused, a handler that makes one is at fault."""

    def note(saga: Saga[State], event: SagaMessage[Any], context: SagaContext[State]) -> list[Any]:
        match event.payload["do"]:
            case "keep":
                saga.state = {"text": event.payload["text"]}
                return [send("service:x", {"text": "a\0b"}), schedule({"type": "Note", "payload": event.payload}, "1h")]
            case "raise":
                raise SagasError("no\0 \ud800", retryable=False)
            case "surrogate":
                saga.state = {"text": "\ud800"}
                return []
            case "fail":
                return [saga_fail("fail\0ed \ud800")]
            case _:
                return [saga_complete({"text": "do\0ne"})]

    async def deliver(request: EffectRequest) -> None:
        delivered.append(request.payload["text"])

    delivered: list[str] = []
    notes = define_saga("notes").state({"text": ""}).on("Note", note).build()
    store = SqlSagaStore(PostgresSagaRows(PostgresDatabase(url=url)))
    async with SagaRuntime(store, definitions=[notes], targets=[callable_target("service", deliver)]) as runtime:

        async def publish(key: str, do: str, **more: str) -> Any:
            message = SagaMessage("Note", {"do": do, "text": "a\0b"}, correlation_key=key, **more)
            return await runtime.publish(message, wait=10)

        kept = await publish("k", "keep", id="m-1")
        again = await publish("k", "keep", id="m-1")
        raised, odd = await publish("k", "raise"), await publish("k", "surrogate")
        failed, done = await publish("f", "fail"), await publish("k", "end")
        refused = await runtime.publish(SagaMessage("Note", {"do": "\ud800"}, correlation_key="k"))
        no_key = await publish("k\0", "keep")
        await runtime.settled()
        letters = await runtime.dead_letters()
        connection = await asyncpg.connect(url)
        shown = await connection.fetch("SELECT * FROM saga_instances")
        await connection.close()
        breaches = await check_invariants(runtime.store)
    await store.close()

    assert kept.outcomes[0].state == {"text": "a\0b"}
    assert again.duplicate
    assert delivered == ["a\0b"]
    assert [each.outcomes[0].disposition for each in (raised, odd)] == ["dead_lettered"] * 2
    assert failed.outcomes[0].status == "failed"
    assert done.outcomes[0].result == {"text": "do\0ne"}
    assert [isinstance(each, PublishRejected) for each in (refused, no_key)] == [True, True]
    assert len(letters) == 2
    assert len(shown) == 2
    assert breaches == []


async def test_a_transaction_that_stays_open_for_long_is_in_nobodys_way(url: str) -> None:
    """It keeps a snapshot, so that deleted rows stay, has left a message, and locks rows of its own."""
    theirs = await asyncpg.connect(url)
    async with _working(url) as worker:
        dying = _Worker(url)
        await dying.runtime.start()
        transaction = theirs.transaction(isolation="repeatable_read")
        await transaction.start()
        await worker.runtime.publish(_charge("theirs", 1), within=theirs)
        await theirs.fetch("SELECT * FROM saga_instances")
        for n in range(5):
            await asyncio.gather(*((worker, dying)[each % 2].publish(f"k-{each}", n) for each in range(40)))
        await dying.runtime.abandon()
        await dying.store.close()
        for n in range(5, 10):
            await asyncio.gather(*(worker.publish(f"k-{each}", n) for each in range(40)))
        await worker.runtime.settled()
        seen = [await worker.seen(f"k-{each}") for each in range(40)]
        feed = [number for number, _ in await worker.store.feed(after=0, limit=10_000)]

        await transaction.commit()

        await _until(lambda: ("theirs", 1) in {(key, n) for key, n, _ in worker.charged})
        await worker.runtime.settled()
        assert seen == [list(range(10))] * 40
        assert feed == list(range(1, len(feed) + 1))
        assert await check_invariants(worker.store) == []
    await theirs.close()


async def test_an_upgrade_during_which_the_server_is_killed_has_not_happened(server: Postgres, url: str) -> None:
    database = PostgresDatabase(url=url)
    slow = Step(1, "slow", steps()[0].sql + "\nSELECT pg_sleep(60);")
    upgrading = asyncio.create_task(take(database, slow))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    while await asyncio.to_thread(server.sql, waiting) != "1":  # noqa: ASYNC110 - the server sets no event
        await asyncio.sleep(0.01)

    await asyncio.to_thread(server.kill)
    with pytest.raises(BackendUnavailable):
        await upgrading
    await asyncio.to_thread(server.start)
    before = await applied(database)
    await upgrade(database)

    assert before == []
    assert [step.version for step in await applied(database)] == [step.version for step in steps()]
    await database.close()
