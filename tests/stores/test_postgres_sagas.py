"""The saga store on PostgreSQL: how it is opened, what people find in it, and what it does when something fails."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from sagaloom import SagaMessage, define_saga, saga_complete, schedule, send
from sagaloom.composition import create_durable_saga_runtime
from sagaloom.demo import sagas
from sagaloom.engine.records import Head, Instance, OutboxEffect
from sagaloom.errors import BackendUnavailable, ConfigurationError, DeliveryFailed, SagasError
from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.kv.postgres.schema import Step, applied, steps, take, upgrade
from sagaloom.ports.keyvalue import Check, Committed, Conflicted
from sagaloom.ports.store import Lease, UnitOfWork
from sagaloom.runtime import PublishReceipt, PublishRejected, SagaRuntime
from sagaloom.stores import SqlSagaStore
from sagaloom.stores.rows import encode, head_key
from sagaloom.testing import ManualClock, MemoryStore
from sagaloom.testing.contracts.sagastore.samples import (
    NOW,
    envelope_of,
    head_of,
    next_of,
    part_of,
    started,
    step_of,
    write,
)
from tests.patience import PATIENCE_SECONDS
from tests.schemas import Schema

ORDER = {"type": "OrderPlaced", "payload": {"orderId": "o-1", "amount": 5}}


def without_database(url: str, **parts: Any) -> str:
    head = url.rpartition("/")[0]
    return f"{head}/{parts['database']}"


async def test_a_runtime_keeps_its_sagas_in_the_database_at_an_address(schema: Schema) -> None:
    async with create_durable_saga_runtime("sql", url=schema.url, definitions=sagas) as durable:
        receipt = await durable.runtime.publish(ORDER, wait=30)
        assert receipt.published
        assert durable.store.id == "sql-saga-store"

    async with create_durable_saga_runtime(url=schema.url, definitions=sagas) as durable:
        found = await durable.runtime.get_instance(receipt.outcomes[0].saga_id, receipt.outcomes[0].correlation_key)

    assert found is not None
    assert found.revision >= 1


async def test_a_pool_is_used_and_left_open(schema: Schema) -> None:
    async with asyncpg.create_pool(schema.server_url, min_size=1, max_size=4) as pool:
        async with create_durable_saga_runtime(engine=pool, schema=schema.name, definitions=sagas) as durable:
            receipt = await durable.runtime.publish(ORDER, wait=30)

        assert receipt.published
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_database_that_does_not_exist_is_said_to_be_missing(schema: Schema) -> None:
    database = PostgresDatabase(url=without_database(schema.server_url, database="nowhere_to_be_found"))

    with pytest.raises(ConfigurationError, match=r"nowhere_to_be_found.*createdb"):
        await database.fetch("SELECT 1")


async def test_a_server_that_is_not_there_is_unavailable_within_its_deadline() -> None:
    database = PostgresDatabase(url="postgresql://postgres@127.0.0.1:9/test", deadline_seconds=1)

    with pytest.raises(BackendUnavailable, match=r"127.0.0.1:9/test"):
        await asyncio.wait_for(database.fetch("SELECT 1"), PATIENCE_SECONDS)


async def test_a_user_without_privileges_is_told_what_to_grant(schema: Schema) -> None:
    user = f"nobody_{secrets.token_hex(4)}"
    connection = await schema.connect()
    await connection.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'x'")
    try:
        address = schema.server_url.replace("postgres@", f"{user}:x@", 1)
        database = PostgresDatabase(url=address, schema=f"{user}_schema")
        with pytest.raises(ConfigurationError, match="grant the user CREATE and USAGE"):
            await upgrade(database)
        await database.close()
    finally:
        await connection.execute(f"DROP ROLE {user}")
        await connection.close()


async def test_a_statement_that_takes_too_long_is_unavailable_and_the_next_one_works(schema: Schema) -> None:
    database = PostgresDatabase(url=schema.url, deadline_seconds=0.3)

    with pytest.raises(BackendUnavailable, match=r"no answer within 0.3 s"):
        await database.write("SELECT pg_sleep(10)")
    database.deadline_seconds = PATIENCE_SECONDS
    assert [tuple(row) for row in await database.fetch("SELECT 7")] == [(7,)]

    await database.close()


async def test_many_statements_at_once_share_few_connections(schema: Schema) -> None:
    database = PostgresDatabase(url=schema.url, connections_max=3)

    rows = await asyncio.gather(*(database.fetch("SELECT pg_backend_pid(), pg_sleep(0.01)") for _ in range(30)))

    assert 1 <= len({row[0]["pg_backend_pid"] for row in rows}) <= 3
    await database.close()


async def test_a_connection_that_was_cut_while_idle_is_not_used_again(schema: Schema) -> None:
    database, other = PostgresDatabase(url=schema.url), PostgresDatabase(url=schema.url)
    pid = (await database.fetch("SELECT pg_backend_pid() AS pid"))[0]["pid"]

    await other.write("SELECT pg_terminate_backend($1, 5000)", pid)
    again = (await database.fetch("SELECT pg_backend_pid() AS pid"))[0]["pid"]

    assert again != pid
    await database.close()
    await other.close()


async def test_of_many_who_upgrade_at_once_one_takes_each_step(schema: Schema) -> None:
    name = f"{schema.name}_many"
    databases = [PostgresDatabase(url=schema.server_url, schema=name) for _ in range(6)]
    try:
        done = await asyncio.gather(*(upgrade(database) for database in databases))

        assert sorted(step.version for taken in done for step in taken) == [step.version for step in steps()]
        assert [step.version for step in await applied(databases[0])] == [step.version for step in steps()]
    finally:
        await databases[0].write(f"DROP SCHEMA {name} CASCADE")
        for database in databases:
            await database.close()


@pytest.mark.parametrize("version", [step.version for step in steps()])
async def test_work_in_flight_goes_on_after_an_upgrade_from_each_version(schema: Schema, version: int) -> None:
    name = f"{schema.name}_from_{version}"
    database = PostgresDatabase(url=schema.server_url, schema=name)
    definition = (
        define_saga("notes")
        .state({"seen": 0})
        .on("Note", lambda saga, event, context: [schedule({"type": "Ring"}, "1h"), send("service:bell", {})])
        .on("Ring", lambda saga, event, context: [saga_complete({"rang": True})])
        .build()
    )
    clock, bell = ManualClock(), Bell()
    bell.is_broken = True
    try:
        old = SagaRuntime(
            SqlSagaStore(PostgresSagaRows(schema.database())), definitions=[definition], clock=clock, targets=[bell]
        )
        await old.start()
        await old.publish({"type": "Note", "payload": {}}, correlation_key="k", wait=30)
        await old.abandon()
        await upgrade(database, to=version)
        await _move(schema.name, database)

        await upgrade(database)
        bell.is_broken = False
        new = SagaRuntime(
            SqlSagaStore(PostgresSagaRows(database)), definitions=[definition], clock=clock, targets=[bell]
        )
        async with new:
            clock.advance("2h")
            await new.settled()
            instance = await new.get_instance("notes", "k")

        assert instance is not None
        assert (instance.status, bell.rang) == ("completed", 1)
    finally:
        await database.write(f"DROP SCHEMA {name} CASCADE")
        await database.close()


async def _move(old: str, database: PostgresDatabase) -> None:
    """Brings what is stored in schema `old` into the tables of `database`, which may be of an older version: what is
    there now is there as an older program would have written it, since no step has changed a row."""
    tables = await database.fetch(
        "SELECT tablename AS name FROM pg_tables WHERE schemaname = $1 "
        "AND tablename NOT IN ('saga_runtime_meta', 'saga_runtime_schema')",
        database.schema,
    )
    for table in tables:
        name = table["name"]
        await database.write(f"DELETE FROM {database.schema}.{name}")
        await database.write(f"INSERT INTO {database.schema}.{name} OVERRIDING SYSTEM VALUE SELECT * FROM {old}.{name}")
    await database.fetch(
        "SELECT setval(format('%I.%I', $1::text, mine.sequencename)::regclass, theirs.last_value) "
        "FROM pg_sequences mine JOIN pg_sequences theirs USING (sequencename) "
        "WHERE mine.schemaname = $1 AND theirs.schemaname = $2 AND theirs.last_value IS NOT NULL",
        database.schema,
        old,
    )


class Bell:
    kind = "service"

    def __init__(self) -> None:
        self.is_broken = False
        self.rang = 0

    async def deliver(self, effect: OutboxEffect) -> Iterable[SagaMessage[Any]]:
        if self.is_broken:
            raise DeliveryFailed("no sound", retryable=True)
        self.rang += 1
        return ()

    async def close(self) -> None:
        return None


async def test_an_upgrade_that_is_interrupted_has_not_happened(schema: Schema) -> None:
    name = f"{schema.name}_cut"
    database = PostgresDatabase(url=schema.server_url, schema=name)
    broken = Step(1, "broken", steps()[0].sql + "\nSELECT 1/0;")
    try:
        with pytest.raises(ValueError, match="division by zero"):
            await take(database, broken)
        before = await applied(database)
        await upgrade(database)

        assert before == []
        assert [step.version for step in await applied(database)] == [step.version for step in steps()]
    finally:
        await database.write(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        await database.close()


async def test_people_find_in_views_what_a_saga_has_done(schema: Schema) -> None:
    def on_note(saga: Any, event: Any, context: Any) -> list[Any]:
        if event.payload.get("bad"):
            raise SagasError("not today\0", retryable=False)
        saga.state = {"text": event.payload["text"]}
        return [schedule({"type": "Ring"}, "1h", name="bell"), send("service:bell", {"n": 1})]

    definition = define_saga("notes").state({}).on("Note", on_note).on("Ring", lambda *_: []).build()
    runtime = SagaRuntime(SqlSagaStore(PostgresSagaRows(schema.database())), definitions=[definition])
    connection = await schema.connect()
    async with runtime:
        await runtime.publish({"type": "Note", "payload": {"text": "a\0b"}}, correlation_key="k/1", wait=30)
        await runtime.publish({"type": "Note", "payload": {"bad": True}}, correlation_key="k/1", wait=30)

        (instance,) = await connection.fetch("SELECT * FROM saga_instances WHERE saga_id = 'notes'")
        (same,) = await connection.fetch("SELECT * FROM saga_instance('notes', 'k/1')")
        history = await connection.fetch("SELECT * FROM saga_history ORDER BY entry_no")
        (timer,) = await connection.fetch("SELECT * FROM saga_timers")
        (effect,) = await connection.fetch("SELECT * FROM saga_outbox")
        (letter,) = await connection.fetch("SELECT * FROM saga_dead_letters WHERE message_type = 'Note'")
        kept = await runtime.get_instance("notes", "k/1")
    await connection.close()

    assert (instance["correlation_key"], instance["run"], instance["status"]) == ("k/1", 1, "running")
    assert instance == same
    assert [(row["disposition"], row["message_type"]) for row in history] == [
        ("applied", "Note"),
        ("dead_lettered", "Note"),
    ]
    assert (timer["name"], timer["message_type"]) == ("bell", "Ring")
    assert (effect["target"], effect["correlation_key"]) == ("service:bell", "k/1")
    assert "not today" in letter["reason"]
    assert kept is not None
    assert json.loads(kept.state) == {"text": "a\0b"}  # the record itself has lost nothing


async def test_a_schema_of_a_newer_version_is_refused(schema: Schema) -> None:
    connection = await schema.connect()
    newer = steps()[-1].version + 1
    await connection.execute("INSERT INTO saga_runtime_schema (version, name) VALUES ($1, 'newer')", newer)
    try:
        with pytest.raises(ConfigurationError, match=rf"schema version {newer}.*upgrade sagaloom"):
            await PostgresSagaRows(schema.database()).open()
    finally:
        await connection.execute("DELETE FROM saga_runtime_schema WHERE name = 'newer'")
        await connection.close()


async def test_two_commits_that_change_the_same_heads_in_another_order_do_not_wait_for_each_other(
    schema: Schema,
) -> None:
    stores = [PostgresSagaRows(PostgresDatabase(url=schema.url)) for _ in range(2)]
    now = datetime.now(UTC)
    rows = [
        (head_key("orders", f"o-{number}"), encode(Head("orders", f"o-{number}", number, 0, 1, now)))
        for number in range(20)
    ]
    try:
        checks = []
        for number, store in enumerate(stores):
            await store.open()
            member = ("member", f"writer-{number}")
            joined = await store.commit(puts=[(member, b"")])
            assert isinstance(joined, Committed)
            checks.append([Check(member, joined.versionstamp)])
        await stores[0].commit(checks=checks[0], inserts=rows)
        before = [store.database.statements for store in stores]

        async def change(number: int) -> None:
            for _ in range(40):
                puts = rows if number else rows[::-1]
                assert isinstance(await stores[number].commit(checks=checks[number], puts=puts), Committed)

        await asyncio.gather(change(0), change(1))

        # One that lost a deadlock would have been sent again.
        assert [store.database.statements - sent for store, sent in zip(stores, before, strict=True)] == [40, 40]
    finally:
        for store in stores:
            await store.close()


async def test_a_number_never_becomes_visible_behind_a_larger_one_of_its_partition(schema: Schema) -> None:
    """Else the holder of a partition, having read the larger one, would never look for the smaller one again."""
    holder, other = SqlSagaStore(PostgresSagaRows(schema.database())), SqlSagaStore(PostgresSagaRows(schema.database()))
    one = await holder.acquire("holder", now=NOW)
    two = await other.join("other")
    head = head_of("o-1", await holder.reserve_pks(1))
    bringing = UnitOfWork(part=head.part, inbox_add=(envelope_of("o-1", "brought"),))
    sending = UnitOfWork(part=head.part, inbox_add=(envelope_of("o-1", "sent"),))
    await write(holder, one, UnitOfWork(part=head.part, head=head))
    connection = await schema.connect()
    lock = connection.transaction()
    await lock.start()
    # As if the commit of the one who brings were held up after it had drawn its number.
    await connection.execute("SELECT FROM saga_runtime_correlation FOR UPDATE")
    await connection.execute("SELECT FROM saga_runtime_arrivals WHERE part = $1 FOR UPDATE", head.part)
    first = asyncio.create_task(other.commit([bringing], lease=two))
    second = asyncio.create_task(holder.commit([sending], lease=one))
    await asyncio.sleep(0.2)
    assert not first.done()
    assert not second.done()
    await lock.rollback()
    await connection.close()

    await asyncio.gather(first, second)
    arrived = [row.envelope.id for row in await holder.arrivals(one)]

    assert "brought" in arrived
    await other.close()
    await holder.close()


async def test_what_is_brought_while_its_holder_adds_rows_elsewhere_is_found(schema: Schema) -> None:
    """Numbers of two partitions become visible in any order: what is known of one says nothing of the other."""
    holder, other = SqlSagaStore(PostgresSagaRows(schema.database())), SqlSagaStore(PostgresSagaRows(schema.database()))
    one = await holder.acquire("holder", now=NOW)
    two = await other.join("other")
    here, there = await write_heads(holder, one, "o-1", "o-2")
    await other.commit([UnitOfWork(part=here.part, inbox_add=(envelope_of("o-1", "first"),))], lease=two)
    assert [row.envelope.id for row in await holder.arrivals(one)] == ["first"]
    connection = await schema.connect()
    lock = connection.transaction()
    await lock.start()
    # The note of a commit is its last step: by then it has its number, and is not visible yet.
    await connection.execute("SELECT FROM saga_runtime_worker WHERE holder = 'other' FOR UPDATE")
    bringing = UnitOfWork(part=here.part, inbox_add=(envelope_of("o-1", "brought"),))
    first = asyncio.create_task(other.commit([bringing], lease=two))
    await asyncio.sleep(0.2)
    await write(holder, one, UnitOfWork(part=there.part, inbox_add=(envelope_of("o-2", "sent"),)))
    assert await holder.arrivals(one) == []
    await lock.rollback()
    await connection.close()
    await first

    arrived = [row.envelope.id for row in await holder.arrivals(one)]

    assert arrived == ["brought"]
    await other.close()
    await holder.close()


async def test_one_row_tells_whoever_missed_a_nudge_that_messages_were_brought(schema: Schema) -> None:
    """A row that changes is looked at once more by every commit that waits for it: one for each partition was dear."""
    holder, other = SqlSagaStore(PostgresSagaRows(schema.database())), SqlSagaStore(PostgresSagaRows(schema.database()))
    await holder.acquire("holder", now=NOW)
    two = await other.join("other")
    keys = [f"o-{n}" for n in range(4)]
    connection = await schema.connect()
    renewed: list[int] = []
    newest = [0]
    for round_ in range(2):
        units = [UnitOfWork(part=part_of(key), inbox_add=(envelope_of(key, f"{key}-{round_}"),)) for key in keys]
        await write(other, two, *units)
        newest.append(await connection.fetchval("SELECT max(s) FROM saga_runtime_arrivals"))
        renewed.append(await connection.fetchval("SELECT count(*) FROM saga_runtime_arrivals WHERE s = $1", newest[-1]))
    await connection.close()

    assert len({part_of(key) for key in keys}) == 4
    assert newest == sorted(set(newest))
    assert renewed == [4, 1]  # The first time each of them has to say that something was ever brought there.
    await other.close()
    await holder.close()


class Counting(PostgresSagaRows):
    """The rows, and how their commits ended."""

    def __init__(self, database: PostgresDatabase) -> None:
        super().__init__(database)
        self.ends: list[Committed | Conflicted] = []

    async def commit(self, **batch: Any) -> Committed | Conflicted:
        self.ends.append(await super().commit(**batch))
        return self.ends[-1]


async def two_started(schema: Schema) -> tuple[Counting, SqlSagaStore, Lease, list[Instance], SqlSagaStore, Lease]:
    """A holder of everything with two instances in one partition, and somebody else who may bring messages."""
    rows = Counting(schema.database())
    holder, other = SqlSagaStore(rows), SqlSagaStore(PostgresSagaRows(schema.database()))
    one = await holder.acquire("holder", now=NOW)
    two = await other.join("other")
    same = [key for key in (f"o-{n}" for n in range(10_000)) if part_of(key) == part_of("o-0")][:2]
    instances = [await started(holder, one, key) for key in same]
    await holder.arrivals(one)
    rows.ends.clear()
    return rows, holder, one, instances, other, two


async def test_what_arrives_for_one_instance_is_not_in_the_way_of_another(schema: Schema) -> None:
    rows, holder, one, (met, neighbour), other, two = await two_started(schema)
    await write(other, two, UnitOfWork(part=part_of(met.key), inbox_add=(envelope_of(met.key, "m-1"),)))

    alone = await holder.commit([step_of(neighbour, neighbour := next_of(neighbour))], lease=one)
    tries_alone = len(rows.ends)
    both = await holder.commit([step_of(each, next_of(each)) for each in (met, neighbour)], lease=one)

    assert not alone.conflicts
    assert tries_alone == 1
    assert {number: conflict.kind for number, conflict in both.conflicts.items()} == {0: "behind"}
    assert [type(end) for end in rows.ends[tries_alone:]] == [Conflicted, Committed]
    await other.close()
    await holder.close()


async def test_what_is_decided_waits_for_nobody_who_brings(schema: Schema) -> None:
    _, holder, one, (instance, _), other, two = await two_started(schema)
    connection = await schema.connect()
    lock = connection.transaction()
    await lock.start()
    # As if the commit of somebody who brings a message to this partition took its time.
    await connection.execute("SELECT FROM saga_runtime_arrivals WHERE part = $1 FOR UPDATE", part_of(instance.key))
    bringing = UnitOfWork(part=part_of(instance.key), inbox_add=(envelope_of(instance.key, "m-1"),))
    brought = asyncio.create_task(other.commit([bringing], lease=two))

    async with asyncio.timeout(PATIENCE_SECONDS):
        result = await holder.commit([step_of(instance, next_of(instance))], lease=one)

    assert not result.conflicts
    assert not brought.done()
    await lock.rollback()
    await connection.close()
    await brought
    assert [row.envelope.id for row in await holder.arrivals(one)] == ["m-1"]
    await other.close()
    await holder.close()


async def test_rows_of_our_own_are_not_told_from_arrivals_without_end(
    schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagaloom.stores.tenure._OWN_MAX", 10)
    _, holder, one, (instance, _), other, _ = await two_started(schema)

    for n in range(30):
        sending = UnitOfWork(part=part_of(instance.key), inbox_add=(envelope_of(instance.key, f"m-{n}"),))
        await write(holder, one, sending)

    assert 0 < holder._tenure._own_count <= 11
    assert holder._tenure._own_count == sum(map(len, holder._tenure._own.values()))
    await other.close()
    await holder.close()


async def write_heads(store: SqlSagaStore, lease: Lease, *keys: str) -> list[Head]:
    heads = [head_of(key, await store.reserve_pks(1)) for key in keys]
    await write(store, lease, *(UnitOfWork(part=head.part, head=head) for head in heads))
    return heads


# -- a transaction of the host ----------------------------------------------------------------------------------------


def noting(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], event.payload["n"]]}
    return []


NOTES = define_saga("notes").state({"seen": []}).on("Note", noting).build()


async def seen_by(runtime: SagaRuntime, key: str, *expected: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            instance = await runtime.get_instance("notes", key)
            if instance is not None and json.loads(instance.state) == {"seen": [*expected]}:
                return
            await asyncio.sleep(0.01)


async def test_a_message_within_a_transaction_comes_with_its_commit_and_goes_with_its_rollback(schema: Schema) -> None:
    connection = await schema.connect()
    async with create_durable_saga_runtime(url=schema.url, definitions=[NOTES]) as durable:
        runtime = durable.runtime
        async with connection.transaction():
            await connection.execute("CREATE TEMP TABLE mine (n int)")
            await connection.execute("INSERT INTO mine VALUES (1)")
            kept = await runtime.publish({"type": "Note", "payload": {"n": 1}}, correlation_key="k", within=connection)
        taken_back = connection.transaction()
        await taken_back.start()
        await runtime.publish({"type": "Note", "payload": {"n": 2}}, correlation_key="k", within=connection)
        await taken_back.rollback()
        await runtime.publish({"type": "Note", "payload": {"n": 3}}, correlation_key="other", wait=30)

        await seen_by(runtime, "k", 1)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await connection.fetchval("SELECT count(*) FROM saga_runtime_left"):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
    await connection.close()

    assert isinstance(kept, PublishReceipt)
    assert [outcome.disposition for outcome in kept.outcomes] == ["pending"]


async def test_a_message_that_was_left_twice_is_applied_once(schema: Schema) -> None:
    connection = await schema.connect()
    async with create_durable_saga_runtime(url=schema.url, definitions=[NOTES]) as durable:
        for _ in range(2):
            async with connection.transaction():
                await durable.runtime.publish(
                    {"type": "Note", "payload": {"n": 1}}, correlation_key="k", idempotency_key="i", within=connection
                )
        async with connection.transaction():
            await durable.runtime.publish({"type": "Note", "payload": {"n": 2}}, correlation_key="k", within=connection)

        await seen_by(durable.runtime, "k", 1, 2)
    await connection.close()


async def test_what_was_left_while_nobody_ran_is_taken_in_at_the_start(schema: Schema) -> None:
    connection = await schema.connect()
    async with create_durable_saga_runtime(url=schema.url, definitions=[NOTES]) as durable:
        transaction = connection.transaction()
        await transaction.start()
        await durable.runtime.publish({"type": "Note", "payload": {"n": 1}}, correlation_key="k", within=connection)
    await transaction.commit()
    await connection.close()

    async with create_durable_saga_runtime(url=schema.url, definitions=[NOTES]) as durable:
        await seen_by(durable.runtime, "k", 1)


async def test_what_was_left_is_looked_for_only_when_somebody_may_have_left_something(schema: Schema) -> None:
    database = PostgresDatabase(url=schema.url)
    presence = PostgresPresence(database)
    store = SqlSagaStore(PostgresSagaRows(database), presence=presence)
    parts = frozenset(range(32))
    assert await store.left(parts, limit=10) == []
    connection = await schema.connect()
    sent = [database.statements]

    await store.left(parts, limit=10)
    sent.append(database.statements)
    await store.left(parts | {32}, limit=10)
    sent.append(database.statements)
    async with connection.transaction():
        await store.leave(connection, [envelope_of("o-1", "m-1")])
    await presence.look()
    left = await store.left(frozenset(range(64)), limit=10)
    again = await store.left(frozenset(range(64)), limit=10)

    assert [later - sent[0] for later in sent] == [0, 0, 1]
    assert [envelope.id for _, envelope in left] == ["m-1"]
    assert again == left  # as long as nobody has taken it away
    await connection.close()
    await store.close()


async def test_a_transaction_that_stays_open_holds_nobody_up(schema: Schema) -> None:
    connection = await schema.connect()
    async with create_durable_saga_runtime(url=schema.url, definitions=[NOTES]) as durable:
        transaction = connection.transaction()
        await transaction.start()
        await durable.runtime.publish(
            {"type": "Note", "payload": {"n": 1}}, correlation_key="k", idempotency_key="same", within=connection
        )

        there = await durable.runtime.publish(
            {"type": "Note", "payload": {"n": 1}}, correlation_key="k", idempotency_key="same", wait=5
        )
        await transaction.commit()
        await durable.runtime.publish({"type": "Note", "payload": {"n": 2}}, correlation_key="k", wait=30)

        await seen_by(durable.runtime, "k", 1, 2)
    await connection.close()

    assert isinstance(there, PublishReceipt)
    assert there.outcomes[0].disposition == "applied"


async def test_what_is_no_open_transaction_is_refused(schema: Schema) -> None:
    connection = await schema.connect()
    async with create_durable_saga_runtime(url=schema.url, definitions=[NOTES]) as durable:
        note = {"type": "Note", "payload": {"n": 1}, "correlationKey": "k"}

        none_open = await durable.runtime.publish(note, within=connection)
        no_connection = await durable.runtime.publish(note, within=object())
        async with connection.transaction():
            waiting = await durable.runtime.publish(note, within=connection, wait=1)
    await connection.close()
    elsewhere = SagaRuntime(MemoryStore(), definitions=[NOTES])
    async with elsewhere:
        on_memory = await elsewhere.publish(note, within=object())

    refused = [none_open, no_connection, waiting, on_memory]
    reasons = ["no transaction open", "give the asyncpg connection", "contradict each other", "no transactions to join"]
    for rejection, reason in zip(refused, reasons, strict=True):
        assert isinstance(rejection, PublishRejected)
        assert reason in rejection.reason
