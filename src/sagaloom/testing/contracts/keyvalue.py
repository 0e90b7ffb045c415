"""What every key-value store must do, as tests: subclass `KeyValueContract`, say how to open a store, run pytest.

    class TestMyStore(KeyValueContract):
        @pytest.fixture
        def open_store(self) -> OpenKeyValue:
            async def open_store() -> KeyValue:
                return await MyStore.connect("...")

            return open_store

Each store that `open_store` opens must be empty. The tests are coroutines for anyio's pytest plugin; there is nothing
to skip, because the port has no optional parts. Put `pytest.register_assert_rewrite("sagaloom.testing.contracts")`
into your `conftest.py` for readable failures.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from sagaloom.errors import BackendUnavailable
from sagaloom.kv.memory import MemoryKeyValue
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue, Slot

__all__ = ["KeyValueContract", "OpenKeyValue", "committed"]

OpenKeyValue = Callable[[], Awaitable[KeyValue]]

# Long enough for any commit of a test, short enough to notice that something will never happen.
_PATIENCE_SECONDS = 60


def committed(outcome: Committed | Conflicted) -> Committed:
    """`outcome` of a commit that must not conflict."""
    assert isinstance(outcome, Committed)
    return outcome


async def _put(store: KeyValue, *keys: Key, value: bytes = b"v") -> int:
    return committed(await store.commit(puts=[(key, value) for key in keys])).versionstamp


async def _keys(store: KeyValue, prefix: Key, **bounds: object) -> list[Key]:
    return [entry.key for entry in await store.scan(prefix, **bounds)]  # type: ignore[arg-type]


class KeyValueContract:
    """The tests; a subclass has a fixture `open_store`."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    async def store(self, open_store: OpenKeyValue) -> AsyncIterator[KeyValue]:
        store = await open_store()
        yield store
        await store.close()

    # -- one key --------------------------------------------------------------------------------------------------

    async def test_it_is_a_key_value_store(self, store: KeyValue) -> None:
        assert isinstance(store, KeyValue)
        assert store.name.startswith("kv:")

    async def test_an_absent_key_has_no_entry(self, store: KeyValue) -> None:
        assert await store.get(("color", "sky")) is None

    async def test_a_committed_value_comes_back_with_the_versionstamp_of_its_commit(self, store: KeyValue) -> None:
        outcome = committed(await store.commit(puts=[(("color", "sky"), b"blue")]))

        assert await store.get(("color", "sky")) == Entry(("color", "sky"), b"blue", outcome.versionstamp)

    async def test_versionstamps_grow_with_every_commit(self, store: KeyValue) -> None:
        versionstamps = [await _put(store, ("color", n % 2)) for n in range(5)]

        assert versionstamps == sorted(set(versionstamps))

    async def test_all_rows_of_a_commit_share_its_versionstamp(self, store: KeyValue) -> None:
        versionstamp = await _put(store, ("color", 1), ("color", 2), ("shape", 1))

        entries = await store.get_many([("color", 1), ("color", 2), ("shape", 1)])

        assert [entry and entry.versionstamp for entry in entries] == [versionstamp] * 3

    async def test_a_later_put_replaces_value_and_versionstamp(self, store: KeyValue) -> None:
        await _put(store, ("color", "sky"), value=b"blue")
        versionstamp = await _put(store, ("color", "sky"), value=b"grey")

        assert await store.get(("color", "sky")) == Entry(("color", "sky"), b"grey", versionstamp)

    async def test_of_two_puts_of_one_key_in_a_commit_the_later_stays(self, store: KeyValue) -> None:
        await store.commit(puts=[(("color", 1), b"first"), (("color", 0), b"other"), (("color", 1), b"second")])

        entry = await store.get(("color", 1))

        assert entry is not None
        assert entry.value == b"second"

    async def test_a_deleted_key_has_no_entry(self, store: KeyValue) -> None:
        await _put(store, ("color", 1), ("color", 2))
        await store.commit(deletes=[("color", 1)])

        assert await _keys(store, ("color",)) == [("color", 2)]

    async def test_deletes_happen_before_puts(self, store: KeyValue) -> None:
        await _put(store, ("color", 1), value=b"old")
        await store.commit(deletes=[("color", 1)], puts=[(("color", 1), b"new")])

        entry = await store.get(("color", 1))

        assert entry is not None
        assert entry.value == b"new"

    async def test_deleting_what_is_absent_is_no_error(self, store: KeyValue) -> None:
        await _put(store, ("color", 1))

        assert isinstance(await store.commit(deletes=[("color", 2), ("never_written", 1)]), Committed)
        assert await _keys(store, ("color",)) == [("color", 1)]

    @pytest.mark.parametrize("deleted", [1, 15, 16, 17, 40])
    async def test_of_many_rows_those_that_are_named_are_deleted(self, store: KeyValue, deleted: int) -> None:
        keys: list[Key] = [("k", n) for n in range(50)]
        await _put(store, *keys)
        named = keys[50 - deleted :]

        await store.commit(deletes=[*reversed(named), ("k", 99), named[0]])

        assert await _keys(store, ("k",)) == keys[: 50 - deleted]

    @pytest.mark.parametrize("size", [0, 1, 1024 * 1024])
    async def test_a_value_may_have_any_bytes(self, store: KeyValue, size: int) -> None:
        value = random.Random(size).randbytes(size)
        await _put(store, ("blob", 1), value=value)

        entry = await store.get(("blob", 1))

        assert entry is not None
        assert entry.value == value

    @pytest.mark.parametrize(
        "key",
        [
            ("k",),
            ("k", 0, -1, 2**63 - 1, -(2**63)),
            ("k", b"", b"\0", b"\xff\0\xff"),
            ("k", "", "a\0b", "\0", "naïve/🙂", "\ud800"),
            ("k", 300, b"x", "y", 65536, 2**32),
        ],
    )
    async def test_a_key_comes_back_as_it_was(self, store: KeyValue, key: Key) -> None:
        await _put(store, (*key, "last"))

        assert await _keys(store, key) == [(*key, "last")]

    async def test_an_entry_may_have_the_bare_table_as_its_key(self, store: KeyValue) -> None:
        await _put(store, ("color",))

        assert (await store.get_many([("color",)]))[0] is not None

    async def test_many_keys_are_answered_in_their_order_with_gaps_and_repeats(self, store: KeyValue) -> None:
        await _put(store, ("color", 1), ("color", 2))
        wanted: list[Key] = [("color", 2), ("never_written", 1), ("color", 9), ("color", 1), ("color", 2)]

        found = await store.get_many(wanted)

        assert [entry and entry.key for entry in found] == [("color", 2), None, None, ("color", 1), ("color", 2)]
        assert await store.get_many([]) == []

    # -- checks ---------------------------------------------------------------------------------------------------

    async def test_a_check_on_absence_holds_only_until_the_key_is_written(self, store: KeyValue) -> None:
        check = Check(("lock", "a"), None)

        first = await store.commit(checks=[check], puts=[(("lock", "a"), b"1")])
        second = await store.commit(checks=[check], puts=[(("lock", "a"), b"2")])

        assert isinstance(first, Committed)
        assert second == Conflicted((("lock", "a"),))

    async def test_a_check_holds_while_the_versionstamp_is_the_same(self, store: KeyValue) -> None:
        read = await _put(store, ("state", 1))
        await _put(store, ("state", 2))

        outcome = await store.commit(checks=[Check(("state", 1), read)], puts=[(("state", 1), b"next")])

        assert isinstance(outcome, Committed)

    async def test_a_stale_check_conflicts(self, store: KeyValue) -> None:
        read = await _put(store, ("state", 1))
        await _put(store, ("state", 1))

        assert await store.commit(checks=[Check(("state", 1), read)]) == Conflicted((("state", 1),))

    async def test_a_key_that_was_deleted_and_written_again_is_not_the_same(self, store: KeyValue) -> None:
        read = await _put(store, ("state", 1), value=b"same")
        await store.commit(deletes=[("state", 1)])
        await _put(store, ("state", 1), value=b"same")

        assert isinstance(await store.commit(checks=[Check(("state", 1), read)]), Conflicted)

    async def test_a_deleted_key_counts_as_absent(self, store: KeyValue) -> None:
        await _put(store, ("state", 1))
        await store.commit(deletes=[("state", 1)])

        assert isinstance(await store.commit(checks=[Check(("state", 1), None)]), Committed)

    async def test_a_table_that_was_never_written_is_empty_for_checks(self, store: KeyValue) -> None:
        assert isinstance(await store.commit(checks=[Check(("never_written", 1), None)]), Committed)
        assert isinstance(await store.commit(checks=[Check(("never_written", 1), 1)]), Conflicted)

    async def test_a_conflict_names_the_failed_keys_in_the_order_of_the_checks(self, store: KeyValue) -> None:
        held = await _put(store, ("state", 1), ("state", 2), ("state", 3))

        outcome = await store.commit(
            checks=[Check(("state", 3), None), Check(("state", 2), held), Check(("state", 1), held + 1)]
        )

        assert outcome == Conflicted((("state", 3), ("state", 1)))

    async def test_a_conflict_changes_nothing(self, store: KeyValue) -> None:
        before = await _put(store, ("state", 1), ("state", 2))

        await store.commit(
            checks=[Check(("state", 1), None)],
            deletes=[("state", 2)],
            puts=[(("state", 1), b"no"), (("fresh", Slot("n", 0)), b"no")],
            reserve={"n": 5},
        )

        entries = await store.scan(("state",))
        assert entries == [Entry(("state", 1), b"v", before), Entry(("state", 2), b"v", before)]
        assert await store.scan(("fresh",)) == []
        assert committed(await store.commit(reserve={"n": 1})).bases == {"n": 1}

    async def test_an_insert_writes_what_was_absent(self, store: KeyValue) -> None:
        done = committed(await store.commit(inserts=[(("a", 1), b"new")], puts=[(("a", 2), b"put")]))

        assert await store.get(("a", 1)) == Entry(("a", 1), b"new", done.versionstamp)
        assert await _keys(store, ("a",)) == [("a", 1), ("a", 2)]

    async def test_an_insert_of_what_is_there_conflicts_and_changes_nothing(self, store: KeyValue) -> None:
        await _put(store, ("a", 1), ("b", 1), value=b"old")

        outcome = await store.commit(
            checks=[Check(("a", 1), None)],
            inserts=[(("a", 2), b"new"), (("b", 1), b"new")],
            puts=[(("a", 3), b"new")],
            reserve={"n": 3},
        )
        again = await store.commit(inserts=[(("a", 2), b"new"), (("b", 1), b"new")])

        assert outcome == Conflicted((("a", 1), ("b", 1)))
        assert again == Conflicted((("b", 1),))
        assert await _keys(store, ("a",)) == [("a", 1)]
        assert committed(await store.commit(reserve={"n": 1})).bases["n"] == 1

    async def test_an_insert_comes_after_the_deletes(self, store: KeyValue) -> None:
        await _put(store, ("a", 1), value=b"old")

        committed(await store.commit(deletes=[("a", 1)], inserts=[(("a", 1), b"new")]))

        found = await store.get(("a", 1))
        assert found is not None
        assert found.value == b"new"

    async def test_a_slot_stands_for_a_reserved_number_in_the_key_of_an_insert(self, store: KeyValue) -> None:
        done = committed(
            await store.commit(inserts=[(("a", Slot("n", 0)), b""), (("a", Slot("n", 1)), b"")], reserve={"n": 2})
        )

        assert await _keys(store, ("a",)) == [("a", done.bases["n"]), ("a", done.bases["n"] + 1)]

    async def test_two_inserts_of_one_key_are_refused_and_nothing_is_written(self, store: KeyValue) -> None:
        with pytest.raises(ValueError, match="two inserts"):
            await store.commit(inserts=[(("a", 1), b"one"), (("a", 1), b"two")])

        assert await _keys(store, ("a",)) == []

    async def test_of_concurrent_commits_with_one_check_exactly_one_succeeds(self, store: KeyValue) -> None:
        read = await _put(store, ("state", 1))

        outcomes = await asyncio.gather(
            *(
                store.commit(checks=[Check(("state", 1), read)], puts=[(("state", 1), str(n).encode())])
                for n in range(8)
            )
        )

        assert sum(isinstance(outcome, Committed) for outcome in outcomes) == 1

    # -- reserved numbers -----------------------------------------------------------------------------------------

    async def test_counters_start_at_one_and_give_each_number_once(self, store: KeyValue) -> None:
        bases = [committed(await store.commit(reserve={"n": count})).bases["n"] for count in (1, 3, 0, 2)]

        assert bases == [1, 2, 5, 5]

    async def test_counters_are_independent(self, store: KeyValue) -> None:
        await store.commit(reserve={"a": 10, "versionstamp": 3})

        outcome = committed(await store.commit(reserve={"b": 1, "a": 1, "versionstamp": 1}))

        assert outcome.bases == {"a": 11, "b": 1, "versionstamp": 4}

    async def test_a_slot_stands_for_a_reserved_number_in_the_key_of_a_put(self, store: KeyValue) -> None:
        await store.commit(reserve={"feed": 2})
        await store.commit(
            reserve={"feed": 2, "inbox": 1},
            puts=[
                (("feed", Slot("feed", 1), "b"), b""),
                (("feed", Slot("feed", 0), "a"), b""),
                (("inbox", 7, Slot("inbox", 0)), b""),
            ],
        )

        assert await _keys(store, ("feed",)) == [("feed", 3, "a"), ("feed", 4, "b")]
        assert await _keys(store, ("inbox",)) == [("inbox", 7, 1)]

    async def test_a_slot_of_a_counter_that_is_not_reserved_is_refused_and_nothing_is_written(
        self, store: KeyValue
    ) -> None:
        with pytest.raises(ValueError, match="reserve"):
            await store.commit(puts=[(("feed", 1), b""), (("feed", Slot("n", 0)), b"")], reserve={"m": 1})

        assert await store.scan(("feed",)) == []
        assert committed(await store.commit(reserve={"m": 1})).bases == {"m": 1}

    async def test_a_negative_reservation_is_refused(self, store: KeyValue) -> None:
        with pytest.raises(ValueError, match="-1"):
            await store.commit(reserve={"n": -1})

    # -- what cannot be stored ------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "key", [("k", True), ("k", 1.5), ("k", None), ("k", 2**63), ("k", -(2**63) - 1), ("k", ("a",))]
    )
    async def test_a_part_that_does_not_sort_is_refused_and_nothing_is_written(self, store: KeyValue, key: Key) -> None:
        with pytest.raises((TypeError, ValueError)):
            await store.commit(puts=[(("k", "fine"), b""), (key, b"")])

        assert await store.scan(("k",)) == []

    @pytest.mark.parametrize("key", [(), (1,), ("",), ("Upper",), ("a b",), ("x; drop",), ("t1",), (b"t",)])
    async def test_a_name_that_is_no_table_is_refused(self, store: KeyValue, key: Key) -> None:
        with pytest.raises(ValueError, match="table"):
            await store.commit(puts=[(key, b"")])
        with pytest.raises(ValueError, match="table"):
            await store.get(key)
        with pytest.raises(ValueError, match="table"):
            await store.scan(key)

    async def test_a_value_that_is_not_bytes_is_refused_and_nothing_is_written(self, store: KeyValue) -> None:
        with pytest.raises(TypeError):
            await store.commit(puts=[(("k", 1), b"fine"), (("k", 2), "text")])  # type: ignore[list-item]  # the point

        assert await store.scan(("k",)) == []

    # -- scans ----------------------------------------------------------------------------------------------------

    async def test_a_scan_has_ints_by_value_then_bytes_then_text(self, store: KeyValue) -> None:
        ordered: list[Key] = [
            *(("k", n) for n in (-(2**63), -256, -1, 0, 1, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1)),
            *(("k", b) for b in (b"", b"\0", b"\0\0", b"a", b"a\0", b"a\0\xff", b"a\x01", b"b", b"\xff")),
            *(("k", t) for t in ("", "\0", "Z", "a", "a\0", "a\0b", "ab", "b", "é", "\uffff", "🙂")),
        ]
        shuffled = random.Random(7).sample(ordered, len(ordered))
        await _put(store, *shuffled)

        assert await _keys(store, ("k",)) == ordered
        assert await _keys(store, ("k",), reverse=True) == ordered[::-1]

    async def test_a_tuple_comes_before_every_longer_one_that_begins_with_it(self, store: KeyValue) -> None:
        ordered: list[Key] = [("k", "a"), ("k", "a", -1), ("k", "a", "z"), ("k", "a\0"), ("k", "ab"), ("k", "b")]
        await _put(store, *reversed(ordered))

        assert await _keys(store, ("k",)) == ordered

    async def test_a_scan_has_what_is_below_its_prefix_and_no_neighbours(self, store: KeyValue) -> None:
        await _put(
            store, ("k", "a"), ("k", "a", 1), ("k", "a", "x", 2), ("k", "a\0", 1), ("k", "ab", 1), ("kk", "a", 1)
        )

        assert await _keys(store, ("k", "a")) == [("k", "a", 1), ("k", "a", "x", 2)]

    async def test_after_and_before_are_exclusive(self, store: KeyValue) -> None:
        await _put(store, *(("k", 1, n) for n in range(6)))

        assert await _keys(store, ("k", 1), after=("k", 1, 1), before=("k", 1, 4)) == [("k", 1, 2), ("k", 1, 3)]
        assert await _keys(store, ("k", 1), after=("k", 1, 1), before=("k", 1, 4), reverse=True, limit=1) == [
            ("k", 1, 3)
        ]

    async def test_bounds_need_not_exist_nor_lie_below_the_prefix(self, store: KeyValue) -> None:
        await _put(store, ("k", 1, 5), ("k", 2, 5), ("k", 3, 5))

        assert await _keys(store, ("k", 2), after=("k", 1, 9), before=("k", 9)) == [("k", 2, 5)]
        assert await _keys(store, ("k", 2), after=("k", 2, 5)) == []
        assert await _keys(store, ("k", 2), before=("k", 2)) == []
        assert await _keys(store, ("k", 2), after=("k", 7)) == []

    async def test_a_bound_in_another_table_is_refused(self, store: KeyValue) -> None:
        await _put(store, ("k", 1))

        with pytest.raises(ValueError, match="bound"):
            await store.scan(("k",), after=("other", 1))

    async def test_pages_have_every_entry_once(self, store: KeyValue) -> None:
        ordered: list[Key] = [("k", n // 7, f"{n:03}") for n in range(100)]
        await _put(store, *ordered)

        seen: list[Key] = []
        while page := await _keys(store, ("k",), after=seen[-1] if seen else None, limit=9):
            seen += page
            assert len(seen) <= len(ordered)

        assert seen == ordered

    async def test_a_scan_stops_at_its_limit(self, store: KeyValue) -> None:
        await _put(store, *(("k", n) for n in range(5)))

        assert await _keys(store, ("k",), limit=2) == [("k", 0), ("k", 1)]
        assert await _keys(store, ("k",), limit=2, reverse=True) == [("k", 4), ("k", 3)]
        assert await _keys(store, ("k",), limit=0) == []

    async def test_a_table_that_was_never_written_is_empty_for_scans(self, store: KeyValue) -> None:
        assert await store.scan(("never_written", 1)) == []
        assert await store.count(("never_written",), limit=10) == 0

    async def test_counting_stops_at_its_limit(self, store: KeyValue) -> None:
        await _put(store, ("k",), *(("k", 1, n) for n in range(5)), ("k", 2, 1))

        counts = [await store.count(("k", 1), limit=limit) for limit in (0, 1, 5, 100)]

        assert counts == [0, 1, 5, 5]

    # -- watching -------------------------------------------------------------------------------------------------

    async def test_a_watch_wakes_after_a_commit_below_its_prefix(self, store: KeyValue) -> None:
        watch = store.watch(("inbox", 3))
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)

        versionstamp = await _put(store, ("inbox", 3, 1))

        assert await asyncio.wait_for(waiting, _PATIENCE_SECONDS) == versionstamp

    async def test_a_watch_wakes_after_a_delete(self, store: KeyValue) -> None:
        await _put(store, ("inbox", 3, 1))
        watch = store.watch(("inbox",))

        outcome = committed(await store.commit(deletes=[("inbox", 3, 1)]))

        assert await asyncio.wait_for(anext(watch), _PATIENCE_SECONDS) == outcome.versionstamp

    async def test_a_commit_between_watching_and_the_first_await_is_not_missed(self, store: KeyValue) -> None:
        watch = store.watch(("inbox",))
        versionstamp = await _put(store, ("inbox", 1))

        assert await asyncio.wait_for(anext(watch), _PATIENCE_SECONDS) == versionstamp

    async def test_a_watch_catches_up_with_the_newest_of_many_commits(self, store: KeyValue) -> None:
        watch = store.watch(("inbox",))
        newest = [await _put(store, ("inbox", n)) for n in range(20)][-1]

        seen = await asyncio.wait_for(anext(watch), _PATIENCE_SECONDS)
        while seen < newest:
            seen = await asyncio.wait_for(anext(watch), _PATIENCE_SECONDS)

        assert seen == newest

    async def test_a_watch_sleeps_through_commits_elsewhere(self, store: KeyValue) -> None:
        waiting = asyncio.ensure_future(anext(store.watch(("inbox", 3))))
        await asyncio.sleep(0)

        await _put(store, ("outbox", 3, 1), ("inbox", 4, 1), ("inbox", "3", 1))
        await store.commit(checks=[Check(("inbox", 3, 1), 99)], puts=[(("inbox", 3, 1), b"")])
        await asyncio.sleep(0)
        versionstamp = await _put(store, ("inbox", 3, 1))

        assert await asyncio.wait_for(waiting, _PATIENCE_SECONDS) == versionstamp

    async def test_closing_ends_every_watch(self, open_store: OpenKeyValue) -> None:
        store = await open_store()
        waiting = asyncio.ensure_future(_drained(store.watch(("inbox",))))
        await asyncio.sleep(0)

        await store.close()

        assert await asyncio.wait_for(waiting, _PATIENCE_SECONDS) == []

    # -- the end --------------------------------------------------------------------------------------------------

    async def test_closing_twice_is_no_error(self, open_store: OpenKeyValue) -> None:
        store = await open_store()

        await store.close()
        await store.close()

    async def test_a_closed_store_answers_nothing(self, open_store: OpenKeyValue) -> None:
        store = await open_store()
        await _put(store, ("k", 1))
        await store.close()

        with pytest.raises(BackendUnavailable, match="closed"):
            await store.get(("k", 1))
        with pytest.raises(BackendUnavailable, match="closed"):
            await store.get_many([("k", 1), ("k", 2)])
        with pytest.raises(BackendUnavailable, match="closed"):
            await store.scan(("k",))
        with pytest.raises(BackendUnavailable, match="closed"):
            await store.count(("k",), limit=1)
        with pytest.raises(BackendUnavailable, match="closed"):
            await store.commit(puts=[(("k", 1), b"")])

    # -- everything together --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(5))
    async def test_a_random_history_reads_like_the_naive_model(self, store: KeyValue, seed: int) -> None:
        rng = random.Random(seed)
        model = MemoryKeyValue()
        stamps = {0: 0}  # versionstamps of the model by those of the store, which may leave gaps
        happened: set[str] = set()

        # It ends only when each kind of step has happened, so that no seed passes by doing nothing.
        steps = 0
        while steps < 150 or happened != {"committed", "conflicted", "found", "scanned"}:
            steps += 1
            assert steps < 5000, f"only {happened} happened"
            key = _random_key(rng)
            if rng.random() < 0.6:
                checked = rng.sample([_random_key(rng) for _ in range(3)], rng.choice([0, 0, 1, 2]))
                mine = [_check(await store.get(each), each, rng) for each in checked]
                reserve = {name: rng.randrange(3) + 2 for name in ("x", "y") if rng.random() < 0.4}
                puts: list[tuple[Key, bytes]] = [
                    ((*_random_key(rng), Slot(name, rng.randrange(2))), rng.randbytes(3)) for name in reserve
                ] + [(_random_key(rng), rng.randbytes(3)) for _ in range(rng.randrange(4))]
                deletes = [_random_key(rng) for _ in range(rng.randrange(2))]
                theirs = [Check(each.key, each.versionstamp and stamps.get(each.versionstamp, -1)) for each in mine]

                actual = await store.commit(checks=mine, puts=puts, deletes=deletes, reserve=reserve)
                expected = await model.commit(checks=theirs, puts=puts, deletes=deletes, reserve=reserve)

                if isinstance(expected, Conflicted):
                    assert actual == expected
                    happened.add("conflicted")
                else:
                    assert isinstance(actual, Committed)
                    assert actual.bases == expected.bases
                    stamps[actual.versionstamp] = expected.versionstamp
                    happened.add("committed")
            else:
                prefix = key[: rng.randrange(1, len(key) + 1)]
                after = (*prefix, *_random_key(rng)[1:]) if rng.random() < 0.3 else None
                before = (prefix[0], *_random_key(rng)[1:]) if rng.random() < 0.3 else None
                limit, reverse = rng.choice([1, 3, 1000]), rng.random() < 0.5

                found = await store.scan(prefix, after=after, before=before, limit=limit, reverse=reverse)
                expected_entries = await model.scan(prefix, after=after, before=before, limit=limit, reverse=reverse)

                translated = [entry._replace(versionstamp=stamps[entry.versionstamp]) for entry in found]
                assert translated == expected_entries
                assert await store.count(prefix, limit=4) == await model.count(prefix, limit=4)
                one, naive_one = await store.get(key), await model.get(key)
                assert (one and one.value) == (naive_one and naive_one.value)
                happened |= {"scanned"} if len(found) > 1 else set()
                happened |= {"found"} if one is not None else set()


_PARTS: tuple[int | bytes | str, ...] = (0, 1, -1, 256, 2**40, b"", b"\0", b"a", "", "\0", "a", "a\0", "ab", "🙂")


def _random_key(rng: random.Random) -> Key:
    """A key out of few enough that histories meet the same ones again."""
    return (rng.choice(["k", "kk"]), *(rng.choice(_PARTS) for _ in range(rng.choice([0, 1, 1, 2]))))


def _check(entry: Entry | None, key: Key, rng: random.Random) -> Check:
    if rng.random() < 0.2:
        return Check(key, None if entry is not None else 10**9)  # one that cannot hold
    return Check(key, None if entry is None else entry.versionstamp)


async def _drained(watch: AsyncIterator[int]) -> list[int]:
    return [versionstamp async for versionstamp in watch]
