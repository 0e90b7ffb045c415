"""Partitions that change hands, and messages that others bring, on the key-value store with several objects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sagaloom.engine.records import Head
from sagaloom.errors import BackendUnavailable, Fenced
from sagaloom.ids import key_hash, partition_of
from sagaloom.kv.postgres import PostgresSagaRows
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.keyvalue import Entry
from sagaloom.ports.store import Lease, RowRef, UnitOfWork
from sagaloom.stores import KvSagaStore, SqlSagaStore
from sagaloom.testing.contracts.sagastore.samples import (
    dead_letter_of,
    envelope_of,
    head_of,
    next_of,
    part_of,
    started,
    step_of,
    write,
)
from tests.schemas import Schema

ALL = frozenset(range(64))


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Hall:
    """Makes stores on one file, or one schema, all of them by one clock."""

    def __init__(self, path: Path, schema: Schema | None) -> None:
        self.path = path
        self.schema = schema
        self.clock = Clock()
        self.stores: list[KvSagaStore] = []

    async def store(self) -> KvSagaStore:
        presence = FilePresence(self.path, lease_seconds=6.0, monotonic=self.clock)
        store: KvSagaStore
        if self.schema is None:
            store = KvSagaStore(await SqliteKeyValue.open(self.path, synchronous="OFF"), presence=presence)
        else:
            store = SqlSagaStore(PostgresSagaRows(self.schema.database()), presence=presence)
        self.stores.append(store)
        return store


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.server("postgres"))])
def hall_schema(request: pytest.FixtureRequest) -> Schema | None:
    found: Schema | None = request.getfixturevalue("schema") if request.param == "postgres" else None
    return found


@pytest.fixture
async def hall(tmp_path: Path, hall_schema: Schema | None) -> AsyncIterator[Hall]:
    made = Hall(tmp_path / "saga.db", hall_schema)
    yield made
    for store in made.stores:
        await store.close()


async def worker(hall: Hall, name: str) -> tuple[KvSagaStore, Lease]:
    store = await hall.store()
    return store, await store.join(name)


async def shared(hall: Hall, *, all_to_first: bool = False) -> tuple[KvSagaStore, Lease, KvSagaStore, Lease]:
    """Two workers that hold half of the partitions each; or the first all, and the second none so far."""
    first, one = await worker(hall, "one")
    await first.tend(one)
    second, two = await worker(hall, "two")
    holding = await first.tend(one)
    if all_to_first:
        return first, one, second, two
    await first.tend(one, give_up=sorted(holding.parts)[-holding.excess :])
    await second.tend(two)
    return first, one, second, two


def key_in(parts: frozenset[int], not_in: frozenset[int] = frozenset()) -> str:
    """A correlation key of saga `orders` whose partition is one of `parts`."""
    return next(f"o-{n}" for n in range(10_000) if partition_of(key_hash("orders", f"o-{n}")) in parts - not_in)


def brought(head: Head, message_id: str) -> UnitOfWork:
    return UnitOfWork(part=head.part, inbox_add=(envelope_of(head.key, message_id),))


async def test_who_is_alone_gets_everything(hall: Hall) -> None:
    store, lease = await worker(hall, "one")

    holding = await store.tend(lease)

    assert holding.parts == holding.gained == ALL
    assert not holding.is_shared
    assert store.stands()


async def test_a_second_one_waits_until_the_first_gives_its_half_up(hall: Hall) -> None:
    first, one = await worker(hall, "one")
    await first.tend(one)
    second, two = await worker(hall, "two")

    nothing = await second.tend(two)
    told = await first.tend(one)
    kept = await first.tend(one, give_up=sorted(told.parts)[-told.excess :])
    taken = await second.tend(two)

    assert nothing.parts == frozenset()
    assert told.excess == 32
    assert told.is_shared
    assert kept.parts | taken.parts == ALL
    assert not kept.parts & taken.parts
    assert first.stands()
    assert second.stands()


async def test_what_is_not_held_cannot_be_changed_and_says_so(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    mine = (await first.tend(one)).parts
    instance = await started(first, one, key_in(mine))

    result = await second.commit([step_of(instance, next_of(instance))], lease=two)

    assert [conflict.kind for conflict in result.conflicts.values()] == ["moved"]
    assert (await first.load([("orders", instance.key)]))[0].instance == instance


async def test_a_dead_ones_partitions_are_free_at_once_and_its_writes_are_refused(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    mine = (await first.tend(one)).parts
    instance = await started(first, one, key_in(mine))
    first._tenure._presence.leave()  # type: ignore[union-attr]  # as if it were dead, though it can still be asked

    stood = second.stands()
    holding = await second.tend(two)
    with pytest.raises(Fenced):
        await first.commit([step_of(instance, next_of(instance))], lease=one)

    assert not stood
    assert holding.parts == ALL
    assert not holding.is_shared


async def test_one_who_slept_past_its_lease_is_fenced_and_may_join_again(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    hall.clock.now += 3.0
    assert second.stands()
    hall.clock.now += 3.1
    assert not second.stands()

    taken = await second.tend(two)
    woke_in_time = first.stands()
    with pytest.raises(Fenced):
        await first.tend(one)
    again = await first.join("one")

    assert taken.parts == ALL
    assert not woke_in_time
    assert again.epoch > two.epoch
    assert (await first.tend(again)).parts == frozenset()
    assert (await second.tend(two)).excess == 32


async def test_whoever_leaves_frees_what_it_held(hall: Hall) -> None:
    first, one, second, two = await shared(hall)

    await first.release(one)

    assert not second.stands()
    assert (await second.tend(two)).parts == ALL
    with pytest.raises(Fenced):
        await first.commit([], lease=one)


async def test_everybody_may_bring_messages_and_the_holder_finds_them_in_order(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    mine = (await first.tend(one)).parts
    assert await first.arrivals(one) == []
    instance = await started(first, one, key_in(mine))
    head = (await first.load([("orders", instance.key)]))[0].head
    assert head is not None

    await write(second, two, brought(head, "m-1"), brought(head, "m-2"))
    await write(first, one, brought(head, "m-own"))
    await write(second, two, brought(head, "m-3"))

    assert [row.envelope.id for row in await first.arrivals(one)] == ["m-1", "m-2", "m-3"]
    assert await first.arrivals(one) == []
    assert await second.arrivals(two) == []


async def test_what_is_decided_without_knowing_of_an_arrival_conflicts_and_its_neighbours_do_not(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    mine = (await first.tend(one)).parts
    await first.arrivals(one)
    key = key_in(mine)
    instance = await started(first, one, key)
    neighbour = await started(first, one, key_in(mine, frozenset({partition_of(key_hash("orders", key))})))
    head = (await first.load([("orders", key)]))[0].head
    assert head is not None
    await write(second, two, brought(head, "m-1"))

    result = await first.commit(
        [step_of(instance, next_of(instance)), step_of(neighbour, next_of(neighbour))], lease=one
    )
    arrived = await first.arrivals(one)
    again = await first.commit([step_of(instance, next_of(instance))], lease=one)

    assert {number: conflict.kind for number, conflict in result.conflicts.items()} == {0: "behind"}
    assert [row.envelope.id for row in arrived] == ["m-1"]
    assert not again.conflicts


async def test_one_who_was_alone_knows_of_the_first_message_that_a_newcomer_brings(hall: Hall) -> None:
    first, one = await worker(hall, "one")
    await first.tend(one)
    await first.arrivals(one)
    instance = await started(first, one, "o-1")
    own = await first.commit([brought(head_of("o-1", instance.pk), "m-own")], lease=one)
    door = await hall.store()
    outside = await door.join("door", works=False)
    await write(door, outside, brought(head_of("o-1", instance.pk), "m-1"))

    result = await first.commit([step_of(instance, next_of(instance))], lease=one)

    assert own.inbox_base
    assert [conflict.kind for conflict in result.conflicts.values()] == ["behind"]
    assert [row.envelope.id for row in await first.arrivals(one)] == ["m-1"]


async def test_a_partition_that_comes_to_us_comes_with_everything_that_waits_there(hall: Hall) -> None:
    first, one = await worker(hall, "one")
    await first.tend(one)
    await first.arrivals(one)
    instance = await started(first, one, "o-1")
    await write(first, one, *(brought(head_of("o-1", instance.pk), f"m-{n}") for n in range(7)))
    await first.release(one)

    second, two = await worker(hall, "two")
    await second.tend(two)
    found = []
    while rows := await second.arrivals(two, limit=3):
        found += [row.envelope.id for row in rows]

    assert found == [f"m-{n}" for n in range(7)]


async def test_one_who_is_alone_again_stops_minding_arrivals_when_it_has_read_them(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    instance = await started(first, one, key_in((await first.tend(one)).parts))
    await write(second, two, brought(head_of(instance.key, instance.pk), "m-1"))
    await second.release(two)

    holding = await first.tend(one)
    arrived = await first.arrivals(one)

    assert not holding.is_shared
    assert [row.envelope.id for row in arrived] == ["m-1"]
    assert not first._tenure.is_shared


async def test_a_dead_letter_is_consumed_once_whoever_tries(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    letter = dead_letter_of("dl-1")
    await write(first, one, UnitOfWork(part=0, dead_letters_add=(letter,)))
    redrive = UnitOfWork(part=0, dead_letter_done="dl-1", inbox_add=(envelope_of("o-1", "m-1"),))

    results = [await store.commit([redrive], lease=lease) for store, lease in ((first, one), (second, two))]

    assert [[conflict.kind for conflict in result.conflicts.values()] for result in results] == [[], ["gone"]]


async def test_no_statement_touches_a_table_while_nothing_changes(hall: Hall) -> None:
    first, one, second, two = await shared(hall)
    await first.tend(one)
    await second.tend(two)
    before = [store._kv.statements for store in (first, second)]  # type: ignore[attr-defined]

    for _ in range(600):
        hall.clock.now += 0.1
        assert first.stands()
        assert second.stands()
        first.has_news()

    assert [store._kv.statements for store in (first, second)] == before  # type: ignore[attr-defined]


# -- what a strict reader doubts --------------------------------------------------------------------------------------


def keys_in_one_part() -> tuple[str, str]:
    """Two correlation keys whose messages have one partition."""
    first = "o-0"
    part = partition_of(key_hash("orders", first))
    return first, next(f"o-{n}" for n in range(1, 10_000) if partition_of(key_hash("orders", f"o-{n}")) == part)


def about(head: Head, **more: object) -> UnitOfWork:
    """A message that was given up or dropped, because its instance is not there."""
    return replace(UnitOfWork(part=head.part, about=("orders", head.key)), **more)


async def test_arrivals_are_minded_as_long_as_a_newcomer_is_there(hall: Hall) -> None:
    first, one = await worker(hall, "one")
    await first.tend(one)
    await first.arrivals(one)
    instance = await started(first, one, "o-1")
    await first.tend(one)  # as one does who sees a newcomer that has not joined yet
    await first.arrivals(one)
    door = await hall.store()
    outside = await door.join("door", works=False)
    await write(door, outside, brought(head_of("o-1", instance.pk), "m-1"))
    await first.commit([step_of(instance, next_of(instance))], lease=one)
    await first.arrivals(one)  # nobody has tended since the newcomer came
    await write(door, outside, brought(head_of("o-1", instance.pk), "m-2"))

    result = await first.commit([step_of(instance, next_of(instance))], lease=one)

    assert [conflict.kind for conflict in result.conflicts.values()] == ["behind"]
    assert not first.stands()


async def test_an_arrival_that_a_commit_has_met_is_minded_until_it_is_handed_out(hall: Hall) -> None:
    first, one, second, two = await shared(hall, all_to_first=True)
    key, neighbour_key = keys_in_one_part()
    await first.arrivals(one)
    instance, neighbour = await started(first, one, key), await started(first, one, neighbour_key)
    await write(second, two, brought(head_of(key, instance.pk), "m-1"))

    meeting = await first.commit([step_of(neighbour, next_of(neighbour))], lease=one)
    result = await first.commit([step_of(instance, next_of(instance))], lease=one)

    assert not meeting.conflicts
    assert [conflict.kind for conflict in result.conflicts.values()] == ["behind"]


async def test_a_message_without_an_instance_is_not_given_up_before_what_has_arrived(hall: Hall) -> None:
    first, one, second, two = await shared(hall, all_to_first=True)
    await first.arrivals(one)
    head = head_of("o-1", await second.reserve_pks(1), run=0, awaits_start=True)
    await write(second, two, replace(brought(head, "m-1"), head=head))
    letter = dead_letter_of("dl-1", "o-1")

    results = [
        await first.commit([unit], lease=one)
        for unit in (about(head, dead_letters_add=(letter,)), about(head), brought(head, "m-2"))
    ]

    assert [[conflict.kind for conflict in result.conflicts.values()] for result in results] == [
        ["behind"],
        ["behind"],
        [],
    ]
    assert await first.dead_letter("dl-1") is None


async def test_a_row_is_not_behind_what_has_arrived_after_it(hall: Hall) -> None:
    first, one, second, two = await shared(hall, all_to_first=True)
    await first.arrivals(one)
    instance = await started(first, one, "o-1")
    head = head_of("o-1", instance.pk)
    await write(second, two, brought(head, "m-1"))
    (known,) = await first.arrivals(one)
    own = await write(first, one, brought(head, "m-own"))
    await write(second, two, brought(head, "m-2"))

    second_revision = next_of(instance)
    of_the_known = await first.commit([step_of(instance, second_revision, inbox_done=known.ref)], lease=one)
    of_our_own = await first.commit(
        [step_of(second_revision, next_of(second_revision), inbox_done=RowRef(head.part, own.inbox_base))], lease=one
    )
    of_a_door = await first.commit([step_of(second_revision, next_of(second_revision))], lease=one)

    assert not of_the_known.conflicts
    assert not of_our_own.conflicts
    assert [conflict.kind for conflict in of_a_door.conflicts.values()] == ["behind"]


async def test_what_would_write_nothing_is_not_ignored_before_what_has_arrived(hall: Hall) -> None:
    first, one, second, two = await shared(hall, all_to_first=True)
    await first.arrivals(one)
    head = head_of("o-1", await second.reserve_pks(1), run=0, awaits_start=True)
    await write(second, two, replace(brought(head, "m-1"), head=head))

    result = await first.commit([about(head)], lease=one)

    assert [conflict.kind for conflict in result.conflicts.values()] == ["behind"]


async def test_a_row_of_our_own_is_no_arrival(hall: Hall) -> None:
    first, one, _, _ = await shared(hall, all_to_first=True)
    await first.arrivals(one)
    instance = await started(first, one, "o-1")
    await write(first, one, brought(head_of("o-1", instance.pk), "m-own"))

    result = await first.commit([step_of(instance, next_of(instance))], lease=one)

    assert not result.conflicts


async def test_our_own_row_is_behind_what_arrived_before_it(hall: Hall) -> None:
    first, one, second, two = await shared(hall, all_to_first=True)
    await first.arrivals(one)
    instance = await started(first, one, "o-1")
    head = head_of("o-1", instance.pk)
    await write(second, two, brought(head, "m-1"))
    own = await write(first, one, brought(head, "m-own"))

    result = await first.commit(
        [step_of(instance, next_of(instance), inbox_done=RowRef(head.part, own.inbox_base))], lease=one
    )

    assert [conflict.kind for conflict in result.conflicts.values()] == ["behind"]
    assert [row.envelope.id for row in await first.arrivals(one)] == ["m-1"]


async def test_messages_of_one_who_came_and_went_between_two_looks_are_found(hall: Hall) -> None:
    found = []
    for goes_in_order in (True, False):
        first, one = await worker(hall, "one")
        await first.tend(one)
        await first.arrivals(one)
        instance = await started(first, one, f"o-{goes_in_order}")
        door = await hall.store()
        outside = await door.join("door", works=False)
        await write(door, outside, brought(head_of(instance.key, instance.pk), f"m-{goes_in_order}"))
        if goes_in_order:
            await door.release(outside)
        else:
            door._tenure._presence.leave()  # type: ignore[union-attr]

        holding = await first.tend(one)
        found += [row.envelope.id for row in await first.arrivals(one)]
        assert not holding.is_shared
        await first.release(one)

    assert found == ["m-True", "m-False"]


async def test_two_who_join_at_the_same_moment_know_of_each_other(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = await hall.store(), await hall.store()
    leases: list[Lease] = []
    scan = second._tenure._members

    async def scan_and_be_late() -> object:
        found = await scan()
        if not leases:
            leases.append(await first.join("one"))
            await first.tend(leases[0])
            await first.arrivals(leases[0])
        return found

    monkeypatch.setattr(second._tenure, "_members", scan_and_be_late)
    two = await second.join("two")
    (one,) = leases
    instance = await started(first, one, "o-1")
    await write(second, two, brought(head_of("o-1", instance.pk), "m-1"))

    result = await first.commit([step_of(instance, next_of(instance))], lease=one)

    assert [conflict.kind for conflict in result.conflicts.values()] == ["behind"]


async def test_one_who_joins_while_another_tends_is_not_taken_for_dead(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, one = await worker(hall, "one")
    second = await hall.store()
    leases: list[Lease] = []
    scan = first._tenure._members

    async def scan_late() -> object:
        if not leases:
            leases.append(await second.join("two"))
        return await scan()

    monkeypatch.setattr(first._tenure, "_members", scan_late)
    holding = await first.tend(one)

    assert len(holding.parts) == 32
    assert len((await second.tend(leases[0])).parts) == 32


async def test_one_who_is_alive_and_about_to_join_is_not_forgotten(hall: Hall) -> None:
    first, one = await worker(hall, "one")
    second = await hall.store()
    second._tenure._presence.enter("two")  # type: ignore[union-attr]
    await first.tend(one)

    stands = first.stands()
    await second.join("two")

    assert not stands
    assert (await first.tend(one)).excess == 32
    assert first.stands()


async def test_three_share_all_partitions_out_and_then_stand_still(hall: Hall) -> None:
    workers = [await worker(hall, f"worker-{n}") for n in range(3)]
    for _ in range(6):
        for store, lease in workers:
            holding = await store.tend(lease)
            if holding.excess:
                await store.tend(lease, give_up=sorted(holding.parts)[-holding.excess :])

    holdings = [await store.tend(lease) for store, lease in workers]

    assert sorted(len(holding.parts) for holding in holdings) == [21, 21, 22]
    assert all(store.stands() for store, _ in workers)


async def test_what_is_remembered_of_our_own_rows_goes_with_them(hall: Hall) -> None:
    first, one, _, _ = await shared(hall, all_to_first=True)
    await first.arrivals(one)
    instance = await started(first, one, "o-1")
    for n in range(50):
        own = await write(first, one, brought(head_of("o-1", instance.pk), f"m-{n}"))
        after = next_of(instance)
        await write(first, one, step_of(instance, after, inbox_done=RowRef(part_of("o-1"), own.inbox_base)))
        instance = after

    assert sum(map(len, first._tenure._own.values())) <= 1


async def test_arrivals_that_were_read_before_the_store_failed_are_not_lost(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, one, second, two = await shared(hall, all_to_first=True)
    await first.arrivals(one)
    heads = [head_of(f"o-{n}", await second.reserve_pks(1)) for n in range(20)]
    await write(second, two, *(brought(head, f"m-{head.key}") for head in heads))
    reading, left = ("scan", 5) if hall.schema is None else ("inbox_above", 1)
    read = getattr(first._kv, reading)

    async def read_a_few(*wanted: Any, **bounds: Any) -> list[Entry]:
        nonlocal left
        left -= 1
        if left == 0:
            raise BackendUnavailable("the disk has hiccups")
        found: list[Entry] = await read(*wanted, **bounds)
        return found

    monkeypatch.setattr(first._kv, reading, read_a_few)
    with pytest.raises(BackendUnavailable):
        await first.arrivals(one)
    arrived = await first.arrivals(one)

    assert sorted(row.envelope.id for row in arrived) == sorted(f"m-o-{n}" for n in range(20))


async def test_what_is_left_of_an_earlier_lease_is_free_for_everybody(hall: Hall) -> None:
    first, one = await worker(hall, "one")
    await first.tend(one)
    again = await first.join("one")
    second, two = await worker(hall, "two")

    taken = await second.tend(two)
    kept = await first.tend(again)

    assert len(taken.parts) == len(kept.parts) == 32
    assert not taken.parts & kept.parts
