"""What only the key-value saga store promises, beyond the contract of all stores."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sagaloom.errors import BackendUnavailable, ConfigurationError, Fenced, StoreCorrupt
from sagaloom.kv import MemoryKeyValue
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key
from sagaloom.ports.store import InstanceFilter, Lease, RegisteredDefinition, RowRef, UnitOfWork
from sagaloom.stores import KvSagaStore, beliefs, planning, rows
from sagaloom.testing.contracts.sagastore.samples import (
    NOW,
    effect_of,
    envelope_of,
    feed_of,
    head_of,
    kinds,
    mark_of,
    next_of,
    part_of,
    start_of,
    started,
    step_of,
    write,
)


class Watched(MemoryKeyValue):
    """Counts reads and commits, and breaks when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.commits: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.poison: bytes | None = None
        self.loses_answers = False
        self.pause: asyncio.Event | None = None
        self.paused = asyncio.Event()

    async def get(self, key: Key) -> Entry | None:
        self.reads += 1
        return await super().get(key)

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        self.reads += 1
        return [await super(Watched, self).get(key) for key in keys]

    async def scan(
        self,
        prefix: Key,
        *,
        after: Key | None = None,
        before: Key | None = None,
        limit: int = 1000,
        reverse: bool = False,
    ) -> list[Entry]:
        entries = await super().scan(prefix, after=after, before=before, limit=limit, reverse=reverse)
        if self.pause is not None:
            self.paused.set()
            await self.pause.wait()
        return entries

    async def commit(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: Mapping[str, int] | None = None,
    ) -> Committed | Conflicted:
        if self.error is not None:
            raise self.error
        if self.poison is not None and any(self.poison in value for _, value in (*inserts, *puts)):
            raise ValueError("a value that this store cannot hold")
        self.commits.append(
            {"checks": checks, "inserts": inserts, "puts": puts, "deletes": deletes, "reserve": reserve}
        )
        outcome = await super().commit(checks=checks, inserts=inserts, puts=puts, deletes=deletes, reserve=reserve)
        if self.loses_answers:
            raise BackendUnavailable("the answer was lost")
        return outcome


@pytest.fixture
def kv() -> Watched:
    return Watched()


@pytest.fixture
def store(kv: Watched) -> KvSagaStore:
    return KvSagaStore(kv)


@pytest.fixture
async def lease(store: KvSagaStore) -> Lease:
    return await store.acquire("worker-1", now=NOW)


# -- the marker -------------------------------------------------------------------------------------------------------


async def test_a_store_keeps_its_id_for_life(kv: Watched, store: KvSagaStore) -> None:
    await store.open()
    other = KvSagaStore(kv)
    await other.open()

    assert other.store_id == store.store_id
    assert len(store.store_id) == 32


async def test_a_store_that_was_not_opened_has_no_id_yet(store: KvSagaStore) -> None:
    with pytest.raises(ConfigurationError, match="open"):
        _ = store.store_id


async def test_a_store_of_a_newer_schema_is_refused(kv: Watched, store: KvSagaStore) -> None:
    await store.open()
    await kv.commit(puts=[(("meta", "schema"), b"3")])

    with pytest.raises(ConfigurationError, match=r"schema 3.*upgrade sagaloom"):
        await KvSagaStore(kv).load([("orders", "o-1")])


async def test_the_feed_of_schema_1_is_read_and_an_older_program_kept_out(
    kv: Watched, store: KvSagaStore, lease: Lease
) -> None:
    instance = await started(store, lease, "o-1")
    old, new = feed_of(instance, "a", "b", "c")[0].events(), feed_of(instance, "d")
    await kv.commit(
        puts=[(rows.FEED_KEY, rows.encode((old[:2], old[2:]))), (("meta", "schema"), b"1")], reserve={"feed": 3}
    )

    store = KvSagaStore(kv)
    await write(store, await store.acquire("worker-2", now=NOW), UnitOfWork(part=0, feed=new))

    assert await store.feed(after=1, limit=9) == list(enumerate([*old[1:], *new[0].events()], 2))
    assert await store.feed_bounds() == (1, 4)
    schema = await kv.get(("meta", "schema"))
    assert schema is not None
    assert schema.value == b"2"


async def test_a_marker_that_is_none_is_refused(kv: Watched, store: KvSagaStore) -> None:
    await store.open()
    await kv.commit(puts=[(("meta", "schema"), b"soon")])

    with pytest.raises(StoreCorrupt, match="marker"):
        await KvSagaStore(kv).acquire("worker-1", now=NOW)


async def test_a_row_that_cannot_be_read_is_named(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    instance = await started(store, lease, "o-1")
    await kv.commit(puts=[(("state", instance.pk, 1), b"\xc1not a record")])

    with pytest.raises(StoreCorrupt, match=rf"kv:memory: row \('state', {instance.pk}, 1\)"):
        await store.load([("orders", "o-1")])


# -- several owners ---------------------------------------------------------------------------------------------------


async def test_the_later_of_two_stores_on_one_file_wins(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    instance = await started(store, lease, "o-1")
    other = KvSagaStore(kv)
    later = await other.acquire("worker-2", now=NOW)

    with pytest.raises(Fenced, match=r"'worker-1'.*is over"):
        await store.commit([step_of(instance, next_of(instance))], lease=lease)

    await write(other, later, step_of(instance, next_of(instance)))


async def test_a_store_that_comes_back_forgets_what_it_knew(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    instance = await started(store, lease, "o-1")
    accepted = await write(store, lease, UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),)))
    ref = RowRef(part_of("o-1"), accepted.inbox_base)
    other = KvSagaStore(kv)
    interim = await other.acquire("worker-2", now=NOW)
    await write(other, interim, step_of(instance, next_of(instance), inbox_done=ref))
    await other.release(interim)

    again = await store.acquire("worker-1", now=NOW)
    late = await store.commit([step_of(instance, next_of(instance)), UnitOfWork(part=0, inbox_done=ref)], lease=again)

    assert kinds(late) == {0: "revision", 1: "gone"}


async def test_a_conflict_is_never_told_from_memory_alone(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    one = await started(store, lease, "o-1")
    two = next_of(one)
    await write(KvSagaStore(kv), lease, step_of(one, two))  # What an object that is used up may still have done.

    await write(store, lease, step_of(two, next_of(two)))

    assert await store.load_run("orders", "o-1", 1) == next_of(two)


async def test_a_writer_that_missed_a_step_under_its_own_lease_finds_the_history_row(
    kv: Watched, store: KvSagaStore, lease: Lease
) -> None:
    one = await started(store, lease, "o-1")
    await write(KvSagaStore(kv), lease, step_of(one, next_of(one)))

    late = await store.commit([step_of(one, next_of(one, state=b'"late"'))], lease=lease)

    assert kinds(late) == {0: "revision"}
    assert await store.load_run("orders", "o-1", 1) == next_of(one)


async def test_a_page_that_was_read_beside_a_commit_brings_nothing_back(
    kv: Watched, store: KvSagaStore, lease: Lease
) -> None:
    accepted = await write(store, lease, UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),)))
    done = UnitOfWork(part=0, inbox_done=RowRef(part_of("o-1"), accepted.inbox_base))
    kv.pause = asyncio.Event()
    reading = asyncio.create_task(store.inbox_page(after=None, limit=10))
    await kv.paused.wait()

    await write(store, lease, done)
    kv.pause.set()

    assert len(await reading) == 1  # It was there when it was read.
    assert kinds(await store.commit([done], lease=lease)) == {0: "gone"}


async def test_after_a_lost_answer_the_store_looks_for_itself(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    instance = await started(store, lease, "o-1")
    accepted = await write(store, lease, UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),)))
    ref = RowRef(part_of("o-1"), accepted.inbox_base)
    batch = [step_of(instance, next_of(instance), mark=mark_of("m-1")), UnitOfWork(part=0, inbox_done=ref)]
    kv.loses_answers = True
    with pytest.raises(BackendUnavailable):
        await store.commit(batch, lease=lease)

    kv.loses_answers = False

    assert kinds(await store.commit(batch, lease=lease)) == {0: "revision", 1: "gone"}


# -- what a commit costs ----------------------------------------------------------------------------------------------


async def test_a_step_of_a_run_that_is_known_reads_nothing_first(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    instance = await started(store, lease, "o-1")
    sent = await write(store, lease, UnitOfWork(part=part_of("o-1"), outbox_add=(effect_of(instance),)))
    ref = RowRef(part_of("o-1"), sent.outbox_base)
    kv.reads = 0

    await write(
        store,
        lease,
        step_of(instance, next_of(instance), mark=mark_of("m-2"), outbox_add=(effect_of(next_of(instance)),)),
        UnitOfWork(part=ref.part, outbox_done=(ref,)),
    )
    await write(store, lease, step_of(next_of(instance), next_of(next_of(instance))))

    assert kv.reads == 0


async def test_a_page_that_was_read_is_known(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    await write(store, lease, UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),)))
    again = KvSagaStore(kv)
    ((ref, _),) = await again.inbox_page(after=None, limit=10)
    # The first commit under a lease that this object did not acquire looks at it, and believes nothing older.
    await again.commit([], lease=lease)
    await again.inbox_page(after=None, limit=10)
    kv.reads = 0

    await write(again, lease, UnitOfWork(part=0, inbox_done=ref))

    assert kv.reads == 0


async def test_a_batch_is_one_commit_with_one_feed_row_and_one_check_of_its_lease(
    kv: Watched, store: KvSagaStore, lease: Lease
) -> None:
    first = await store.reserve_pks(3)
    kv.commits.clear()
    units = []
    for n in range(3):
        head = head_of(f"o-{n}", first + n)
        units.append(step_of(None, start_of(head), head=head, feed=feed_of(start_of(head), "a", "b")))

    await write(store, lease, *units)

    (commit,) = kv.commits
    assert [key for key, _ in commit["inserts"] if key[0] == "feed"] == [rows.FEED_KEY]
    assert [check.key[0] for check in commit["checks"]] == ["member"]
    assert commit["reserve"] == {"feed": 6}


async def test_only_the_last_state_of_a_run_in_a_batch_is_put(kv: Watched, store: KvSagaStore, lease: Lease) -> None:
    one = await started(store, lease, "o-1")
    two, three = next_of(one), next_of(next_of(one))
    kv.commits.clear()

    await write(store, lease, step_of(one, two), step_of(two, three))

    assert [key[0] for key, _ in kv.commits[0]["puts"]] == ["state"]
    assert [key[0] for key, _ in kv.commits[0]["inserts"]] == ["transition", "transition"]


async def test_a_stray_row_of_the_index_keeps_no_run_from_its_status(
    kv: Watched, store: KvSagaStore, lease: Lease
) -> None:
    running = start_of(head_of("o-1", await store.reserve_pks(1)))
    created = rows.micros(running.created_at)
    await kv.commit(puts=[(("instance_index", running.saga_id, "running", created, running.pk, running.run), b"")])

    result = await write(store, lease, step_of(None, running, head=head_of("o-1", running.pk)))

    assert not result.conflicts
    assert await store.instances(InstanceFilter(statuses=("running",)), limit=10) == ([running], None)


async def test_what_is_remembered_has_a_bound(
    store: KvSagaStore, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_RUNS_KNOWN_MAX", "_HEADS_KNOWN_MAX", "_ROWS_KNOWN_MAX"):
        monkeypatch.setattr(beliefs, name, 8)

    for n in range(40):
        await started(
            store,
            lease,
            f"o-{n}",
        )
        await write(store, lease, UnitOfWork(part=0, inbox_add=(envelope_of("o-1", f"m-{n}"),)))

    assert max(len(store._beliefs.runs), len(store._beliefs.heads), len(store._beliefs.rows)) <= 8


# -- trouble ----------------------------------------------------------------------------------------------------------


async def test_a_row_that_is_too_large_is_the_fault_of_its_own_unit(
    store: KvSagaStore, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "ROW_BYTES_MAX", 2_000)
    instances = [await started(store, lease, f"o-{n}") for n in range(5)]
    steps = [step_of(run, next_of(run), feed=feed_of(run, "a")) for run in instances]
    huge = next_of(instances[3], state=b"x" * 2_001)
    steps[3] = step_of(instances[3], huge, feed=feed_of(huge, "a"))

    result = await store.commit([*steps, step_of(huge, next_of(huge))], lease=lease)

    assert kinds(result) == {3: "refused", 5: "revision"}
    assert "2001" not in result.conflicts[5].what
    assert [number for number, _ in await store.feed(after=0, limit=10)] == [1, 2, 3, 4]
    assert result.feed_base == 1


async def test_the_numbers_of_a_batch_stay_consecutive_when_it_is_split(
    kv: Watched, store: KvSagaStore, lease: Lease
) -> None:
    kv.poison = b"poison"
    batch = [UnitOfWork(part=0, inbox_add=(envelope_of("o-1", f"m-{n}"),)) for n in range(7)]
    batch[4] = UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "poison"), envelope_of("o-1", "m-4")))

    result = await store.commit(batch, lease=lease)

    assert kinds(result) == {4: "refused"}
    rows = await store.inbox_page(after=None, limit=10)
    assert [row.envelope.id for row in rows] == ["m-0", "m-1", "m-2", "m-3", "m-5", "m-6"]
    assert [row.ref.seq for row in rows] == list(range(result.inbox_base, result.inbox_base + 6))


async def test_a_failing_store_has_a_problem_until_it_works_again(
    kv: Watched, store: KvSagaStore, lease: Lease
) -> None:
    kv.error = BackendUnavailable("no space left")
    with pytest.raises(BackendUnavailable):
        await store.commit([UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),))], lease=lease)
    with pytest.raises(BackendUnavailable):
        await store.probe()
    assert store.problem == "no space left"

    kv.error = None
    await store.probe()

    assert store.problem is None


# -- for everybody ----------------------------------------------------------------------------------------------------


async def test_the_registry_is_a_json_document_that_others_can_read(kv: Watched, store: KvSagaStore) -> None:
    await store.put_definitions([RegisteredDefinition("orders", 1, "f1", {"types": ["OrderPlaced"]}, NOW)])

    entry = await kv.get(("saga", "registry", "orders"))

    assert entry is not None
    assert json.loads(entry.value) == {"types": ["OrderPlaced"]}


async def test_times_keep_their_microseconds(store: KvSagaStore, lease: Lease) -> None:
    moments = [
        datetime(year, 7, 1, 23, 59, 59, micros, tzinfo=UTC) for year in (1969, 2024, 2200) for micros in (1, 999_999)
    ]

    for n, moment in enumerate(moments):
        await started(store, lease, f"o-{n}", created_at=moment)

    found, _ = await store.instances(InstanceFilter(), limit=10)
    assert [run.created_at for run in found] == moments[::-1]
    assert [rows.micros(moment) % 1_000_000 for moment in moments] == [1, 999_999] * 3


def test_the_stores_can_be_named_without_loading_a_driver() -> None:
    code = "import sys, sagaloom.stores; from sagaloom.stores import KvSagaStore; sys.exit('apsw' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the feed ---------------------------------------------------------------------------------------------------------


async def test_a_page_of_the_feed_reads_only_rows_that_have_part_in_it(kv: Watched, store: KvSagaStore) -> None:
    lease = await store.acquire("worker-1", now=NOW)
    instance = await started(store, lease, "o-1")
    for _ in range(40):
        await write(store, lease, UnitOfWork(part=0, feed=feed_of(instance, *["x"] * 10)))
    entries: list[Entry] = []
    scan = kv.scan

    async def counted(*args: Any, **named: Any) -> list[Entry]:
        found = await scan(*args, **named)
        entries.extend(found)
        return found

    kv.scan = counted  # type: ignore[method-assign]

    found = await store.feed(after=95, limit=10)

    assert [number for number, _ in found] == list(range(96, 106))
    assert [entry.key for entry in entries] == [("feed", 91), ("feed", 101)]


async def test_the_store_asks_its_keys_for_the_commits_of_others(tmp_path: Path) -> None:
    path = tmp_path / "saga.db"
    one = KvSagaStore(await SqliteKeyValue.open(path))
    other = KvSagaStore(await SqliteKeyValue.open(path))
    await one.open()
    before = one.others_version()

    await one.put_definitions([])
    after_own = one.others_version()
    await other.put_definitions([RegisteredDefinition("orders", 1, "f1", {}, NOW)])

    assert before == after_own
    assert one.others_version() != after_own
    await one.close()
    await other.close()
