"""What is true of the embedded store because it is a file: other processes, kills, bad disks, power loss."""

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest

from sagaloom.errors import BackendUnavailable, ConfigurationError, StoreCorrupt
from sagaloom.kv import checkpoints, sqlite_file
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.kv.sqlite_driver import require_sound_sqlite
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Key, Slot
from sagaloom.testing.disk import BrokenDiskVfs, FullDiskVfs, PowerLossVfs, ReadOnlyVfs
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saga.db"


@asynccontextmanager
async def opened(path: Path, **options: object) -> AsyncIterator[SqliteKeyValue]:
    store = await SqliteKeyValue.open(path, **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.close()


@contextlib.contextmanager
def full_disk() -> Iterator[FullDiskVfs]:
    vfs = FullDiskVfs()
    yield vfs
    vfs.unregister()


@contextlib.contextmanager
def broken_disk() -> Iterator[BrokenDiskVfs]:
    vfs = BrokenDiskVfs()
    yield vfs
    vfs.unregister()


async def put(store: SqliteKeyValue, *keys: Key, value: bytes = b"v") -> int:
    outcome = await store.commit(puts=[(key, value) for key in keys])
    assert isinstance(outcome, Committed)
    return outcome.versionstamp


async def keys(store: SqliteKeyValue, table: str) -> list[Key]:
    return [entry.key for entry in await store.scan((table,))]


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


# -- opening again ----------------------------------------------------------------------------------------------------


async def test_a_reopened_store_has_what_was_committed(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ("k", 1), ("other", "x"))
    async with opened(path) as store:
        assert await keys(store, "k") == [("k", 1)]
        assert await keys(store, "other") == [("other", "x")]


async def test_versionstamps_and_counters_continue_after_reopening(path: Path) -> None:
    async with opened(path) as store:
        before = await put(store, ("k", 1))
        await store.commit(reserve={"n": 3})
    async with opened(path) as store:
        outcome = await store.commit(reserve={"n": 1})

    assert isinstance(outcome, Committed)
    assert outcome.versionstamp > before
    assert outcome.bases == {"n": 4}


async def test_the_id_of_a_store_stays_and_is_its_own(path: Path, tmp_path: Path) -> None:
    async with opened(path) as store, opened(tmp_path / "other.db") as other:
        first, others = store.store_id, other.store_id
    async with opened(path) as store:
        assert store.store_id == first

    assert len(first) == 32
    assert first != others


async def test_closing_moves_the_log_into_the_file(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ("k", 1), value=bytes(100_000))

    assert [each.name for each in path.parent.iterdir()] == ["saga.db"]


def test_importing_the_package_does_not_load_sqlite() -> None:
    script = "import sagaloom.kv, sys; assert 'apsw' not in sys.modules; sagaloom.kv.SqliteKeyValue; import apsw"

    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_SECONDS)


# -- other connections ------------------------------------------------------------------------------------------------


async def test_two_connections_see_each_others_commits_and_tables(path: Path) -> None:
    async with opened(path) as one, opened(path) as other:
        await put(one, ("k", 1))
        assert await keys(other, "k") == [("k", 1)]
        await put(other, ("fresh", 1))

        assert await keys(one, "fresh") == [("fresh", 1)]


async def test_of_two_connections_with_one_check_the_second_conflicts(path: Path) -> None:
    async with opened(path) as one, opened(path) as other:
        read = await put(one, ("k", 1))
        check = Check(("k", 1), read)

        first = await one.commit(checks=[check], puts=[(("k", 1), b"one")])
        second = await other.commit(checks=[check], puts=[(("k", 1), b"other")])

        assert isinstance(first, Committed)
        assert second == Conflicted((("k", 1),))
        entry = await other.get(("k", 1))
        assert entry is not None
        assert entry.value == b"one"


async def test_two_connections_never_get_one_number_twice(path: Path) -> None:
    async with opened(path) as one, opened(path) as other:
        bases: list[int] = []
        for store in (one, other, other, one):
            outcome = await store.commit(reserve={"n": 2}, puts=[(("feed", Slot("n", 0)), b"")])
            assert isinstance(outcome, Committed)
            bases.append(outcome.bases["n"])

        assert bases == [1, 3, 5, 7]
        assert await keys(one, "feed") == [("feed", n) for n in bases]


async def test_a_connection_sees_that_another_one_has_committed_and_not_its_own_commits(path: Path) -> None:
    async with opened(path) as one, opened(path) as other:
        await put(one, ("k", 1))
        before = one.others_version()

        await put(one, ("k", 2))
        after_own = one.others_version()
        await put(other, ("k", 3))
        after_other = one.others_version()

        assert before == after_own
        assert after_own != after_other
        assert one.others_version() == after_other


async def test_looking_for_the_commits_of_others_touches_no_table(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ("k", 1))
        before = store.statements

        store.others_version()

        assert store.statements == before


async def test_a_closed_connection_sees_nobody(path: Path) -> None:
    async with opened(path) as store:
        pass

    with pytest.raises(BackendUnavailable, match="closed"):
        store.others_version()


async def test_a_lock_that_stays_is_reported_and_the_store_recovers_from_it(path: Path) -> None:
    async with opened(path, busy_timeout_seconds=0.02) as store:
        await put(store, ("k", 1))
        holder = apsw.Connection(str(path))
        holder.execute("BEGIN IMMEDIATE")

        with pytest.raises(BackendUnavailable, match=r"saga\.db stayed locked .* busy_timeout_seconds") as raised:
            await put(store, ("k", 2))
        assert raised.value.data["outcome"] == "not_written"
        assert not store.healthy
        assert await keys(store, "k") == [("k", 1)]

        holder.execute("ROLLBACK")
        holder.close()
        await put(store, ("k", 3))
        assert store.healthy
        assert await keys(store, "k") == [("k", 1), ("k", 3)]


async def test_an_exclusive_store_keeps_others_out_until_it_closes(path: Path) -> None:
    async with opened(path, exclusive=True) as store:
        await put(store, ("k", 1))
        with pytest.raises(BackendUnavailable, match="locked"):
            await SqliteKeyValue.open(path, busy_timeout_seconds=0.02)
    async with opened(path) as store:
        assert await keys(store, "k") == [("k", 1)]


_CREATE_AND_COUNT = """
import asyncio, sys
from sagaloom.kv.sqlite import SqliteKeyValue

async def main() -> None:
    store = await SqliteKeyValue.open(sys.argv[1], busy_timeout_seconds=20)
    for _ in range(25):
        await store.commit(reserve={"n": 1})
    print(store.store_id)
    await store.close()

asyncio.run(main())
"""


async def test_processes_that_create_one_file_at_once_share_one_store(path: Path) -> None:
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", _CREATE_AND_COUNT, str(path), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(3)
    ]
    outputs = [await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS) for process in processes]
    async with opened(path) as store:
        outcome = await store.commit(reserve={"n": 1})

        assert {output.decode().strip() for output, _ in outputs} == {store.store_id}
    assert isinstance(outcome, Committed)
    assert outcome.bases == {"n": 76}


# -- inside a commit --------------------------------------------------------------------------------------------------


async def test_the_steps_of_a_commit_come_in_order(path: Path) -> None:
    steps: list[str] = []
    async with opened(path, on_step=steps.append) as store:
        await put(store, ("a", 1), ("b", 1), ("b", 2))
        await store.commit(checks=[Check(("a", 1), None)], puts=[(("a", 1), b"")])

    assert steps == ["kv:checked", "kv:half_written", "kv:written", "kv:committed", "kv:checked"]


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
async def test_half_of_the_rows_are_written_at_the_step_between(path: Path, rows: int) -> None:
    changed: list[int] = []

    def count_changes(_: str) -> None:
        changed.append(store._connection.total_changes())

    async with opened(path, on_step=count_changes) as store:
        await put(store, *(("abc"[n % 3], n) for n in range(rows)))

    checked, half_written, written, _ = changed
    counters = 1  # the versionstamp
    assert half_written - checked - counters == (rows + 1) // 2
    assert written - checked - counters == rows


@pytest.mark.parametrize("failing_step", ["kv:checked", "kv:half_written", "kv:written"])
async def test_an_exception_inside_a_commit_undoes_it_and_the_next_one_is_clean(path: Path, failing_step: str) -> None:
    def fail(step: str) -> None:
        if step == failing_step and not failed:
            failed.append(step)
            raise KeyboardInterrupt

    failed: list[str] = []
    async with opened(path, on_step=fail) as store:
        with pytest.raises(KeyboardInterrupt):
            await store.commit(puts=[(("k", 1), b""), (("fresh", 1), b"")], reserve={"n": 1})
        outcome = await store.commit(puts=[(("k", 2), b""), (("fresh", 2), b"")], reserve={"n": 1})

        assert isinstance(outcome, Committed)
        assert outcome.bases == {"n": 1}
        assert await keys(store, "k") == [("k", 2)]
        assert await keys(store, "fresh") == [("fresh", 2)]


_COMMIT_AND_DIE = """
import asyncio, os, signal, sys
from sagaloom.kv.sqlite import SqliteKeyValue

async def main() -> None:
    def on_step(step: str) -> None:
        if step == sys.argv[2] and armed:
            os.kill(os.getpid(), signal.SIGKILL)

    armed = []
    store = await SqliteKeyValue.open(sys.argv[1], on_step=on_step)
    await store.commit(puts=[(("k", n), b"before") for n in range(10)], reserve={"n": 10})
    armed.append(True)
    await store.commit(
        puts=[(("k", n), b"after") for n in range(10)] + [(("fresh", 1), bytes(50_000))],
        deletes=[("k", 10)],
        reserve={"n": 10},
    )

asyncio.run(main())
"""


@pytest.mark.parametrize("step", ["kv:checked", "kv:half_written", "kv:written", "kv:committed"])
async def test_a_killed_process_leaves_all_of_a_commit_or_nothing(path: Path, step: str) -> None:
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", _COMMIT_AND_DIE, str(path), step)
    assert await asyncio.wait_for(killed.wait(), PATIENCE_SECONDS) == -signal.SIGKILL

    async with opened(path) as store:
        values = {entry.value for entry in await store.scan(("k",))}
        outcome = await store.commit(reserve={"n": 1})

        assert isinstance(outcome, Committed)
        if step == "kv:committed":
            assert values == {b"after"}
            assert await keys(store, "fresh") == [("fresh", 1)]
            assert outcome.bases == {"n": 21}
        else:
            assert values == {b"before"}
            assert await keys(store, "fresh") == []
            assert outcome.bases == {"n": 11}


# -- a full disk ------------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_commits_and_keeps_answering_reads(path: Path) -> None:
    with full_disk() as disk:
        async with opened(path, vfs=disk.name) as store:
            await put(store, ("k", 1))
            disk.full = True

            with pytest.raises(BackendUnavailable, match=r"no space left to write .*saga\.db") as raised:
                await put(store, ("k", 2), ("fresh", 1))

            assert raised.value.retryable
            assert not store.healthy
            assert store.problem is not None
            assert "free space" in store.problem
            assert await keys(store, "k") == [("k", 1)]
            assert await keys(store, "fresh") == []
            disk.full = False


async def test_while_the_disk_is_full_a_commit_costs_one_refused_write(path: Path) -> None:
    with full_disk() as disk:
        async with opened(path, vfs=disk.name) as store:
            await put(store, ("k", 0))
            disk.full = True
            for _ in range(3):
                with pytest.raises(BackendUnavailable):
                    await put(store, *(("k", n) for n in range(500)), value=bytes(500))
            before = store.statements, disk.refused_writes
            with pytest.raises(BackendUnavailable) as raised:
                await put(store, *(("k", n) for n in range(500)), value=bytes(500))

            assert (store.statements, disk.refused_writes) == (before[0] + 1, before[1] + 1)
            assert raised.value.data["outcome"] == "not_written"
            disk.full = False


async def test_a_store_writes_again_by_itself_when_there_is_space_again(path: Path) -> None:
    with full_disk() as disk:
        async with opened(path, vfs=disk.name) as store:
            await put(store, ("k", 1))
            disk.full = True
            with pytest.raises(BackendUnavailable):
                await store.commit(puts=[(("k", 2), b"")], reserve={"n": 1})
            disk.full = False

            outcome = await store.commit(puts=[(("k", 3), b"")], reserve={"n": 1})

            assert isinstance(outcome, Committed)
            assert outcome.bases == {"n": 1}
            assert store.healthy
            assert store.problem is None
            assert await keys(store, "k") == [("k", 1), ("k", 3)]
        async with opened(path) as store:
            assert await keys(store, "k") == [("k", 1), ("k", 3)]


async def test_a_probe_finds_space_again_without_a_commit(path: Path) -> None:
    with full_disk() as disk:
        async with opened(path, vfs=disk.name) as store:
            await store.probe()
            disk.full = True
            with pytest.raises(BackendUnavailable):
                await put(store, ("k", 1))
            with pytest.raises(BackendUnavailable):
                await store.probe()
            disk.full = False

            await store.probe()

            assert store.healthy


async def test_a_store_on_a_full_disk_can_be_closed_without_losing_a_commit(path: Path) -> None:
    with full_disk() as disk:
        async with opened(path, vfs=disk.name) as store:
            await put(store, ("k", 1))
            disk.full = True
        async with opened(path) as store:
            assert await keys(store, "k") == [("k", 1)]


async def test_a_store_cannot_be_created_on_a_full_disk(path: Path) -> None:
    with full_disk() as disk:
        disk.full = True

        with pytest.raises(BackendUnavailable, match="no space left"):
            await SqliteKeyValue.open(path, vfs=disk.name)


# -- a broken disk ----------------------------------------------------------------------------------------------------


async def test_a_failed_write_is_reported_and_the_next_commit_is_clean(path: Path) -> None:
    with broken_disk() as disk:
        async with opened(path, vfs=disk.name) as store:
            await put(store, ("k", 1))
            disk.broken_writes = True
            with pytest.raises(BackendUnavailable, match="look at the disk"):
                await put(store, ("k", 2))
            assert not store.healthy
            disk.broken_writes = False

            await put(store, ("k", 3))

            assert await keys(store, "k") == [("k", 1), ("k", 3)]


async def test_a_commit_whose_sync_failed_says_that_its_outcome_is_unknown_and_the_next_one_settles_it(
    path: Path,
) -> None:
    with broken_disk() as disk:
        async with opened(path, vfs=disk.name) as store:
            await put(store, ("k", 1))
            disk.broken_syncs = True
            with pytest.raises(BackendUnavailable) as raised:
                await put(store, ("k", 2))
            assert raised.value.data["outcome"] == "unknown"
            disk.broken_syncs = False

            await put(store, ("k", 3))

            assert await keys(store, "k") == [("k", 1), ("k", 3)]
        async with opened(path) as store:
            assert await keys(store, "k") == [("k", 1), ("k", 3)]


async def test_a_damaged_file_is_reported_and_no_longer_written(path: Path) -> None:
    async with opened(path) as store:
        await put(store, *(("k", n) for n in range(200)), value=bytes(500))
    content = content_of(path)
    overwrite(path, content[: 3 * 4096] + b"\xee" * (len(content) - 3 * 4096))

    async with opened(path) as store:
        with pytest.raises(StoreCorrupt, match=r"saga\.db is damaged .* restore it from a backup"):
            await store.scan(("k",))
        with pytest.raises(StoreCorrupt, match="restore it"):
            await put(store, ("fresh", 1))
        assert not store.healthy


# -- files that are no store ------------------------------------------------------------------------------------------


async def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    overwrite(path, b"dear diary, " * 1000)

    with pytest.raises(StoreCorrupt, match=r"saga\.db is damaged or no SQLite file"):
        await SqliteKeyValue.open(path)
    assert content_of(path) == b"dear diary, " * 1000


async def test_the_database_of_another_application_is_refused_and_left_alone(path: Path) -> None:
    foreign = apsw.Connection(str(path))
    foreign.execute("CREATE TABLE customers (name TEXT)")
    foreign.close()
    before = content_of(path)

    with pytest.raises(ConfigurationError, match="another application"):
        await SqliteKeyValue.open(path)
    assert content_of(path) == before


async def test_another_format_is_refused(path: Path) -> None:
    async with opened(path):
        pass
    later = apsw.Connection(str(path))
    later.execute("UPDATE kv_meta SET value = 99 WHERE name = 'format'")
    later.close()

    with pytest.raises(ConfigurationError, match="store format 99, this version reads format 1"):
        await SqliteKeyValue.open(path)


async def test_a_store_without_its_meta_table_is_refused(path: Path) -> None:
    async with opened(path):
        pass
    robbed = apsw.Connection(str(path))
    robbed.execute("DROP TABLE kv_meta")
    robbed.close()

    with pytest.raises(StoreCorrupt, match="has lost its table kv_meta"):
        await SqliteKeyValue.open(path)


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"create the directory .*missing first"):
        await SqliteKeyValue.open(tmp_path / "missing" / "saga.db")


async def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="name a file in it"):
        await SqliteKeyValue.open(tmp_path)


async def test_a_read_only_file_is_refused(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ("k", 1))
    vfs = ReadOnlyVfs()

    with pytest.raises(ConfigurationError, match=r"saga\.db is read-only .* make the file and its directory writable"):
        await SqliteKeyValue.open(path, vfs=vfs.name)
    vfs.unregister()


async def test_a_store_needs_a_real_file() -> None:
    with pytest.raises(ConfigurationError, match="MemoryKeyValue"):
        await SqliteKeyValue.open(":memory:")


async def test_an_unknown_way_to_sync_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'SOMETIMES' is not one of"):
        await SqliteKeyValue.open(path, synchronous="SOMETIMES")  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize("version", ["3.40.1", "3.51.2", "3.7", "2.99.99"])
def test_a_sqlite_library_with_the_log_corruption_is_refused(version: str) -> None:
    with pytest.raises(ConfigurationError, match=r"before 3\.51\.3 .* install a newer apsw"):
        require_sound_sqlite(version)


@pytest.mark.parametrize("version", ["3.51.3", "3.51.3.1", "3.52.0", "3.54", "4.0.0"])
def test_a_sound_sqlite_library_is_accepted(version: str) -> None:
    require_sound_sqlite(version)


# -- power loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_full_sync_keeps_every_commit_through_a_power_loss(path: Path, exclusive: bool) -> None:
    disk = PowerLossVfs()
    async with opened(path, vfs=disk.name, exclusive=exclusive) as store:
        for n in range(20):
            await put(store, ("k", n))
        disk.lose_power()
    disk.unregister()

    async with opened(path) as store:
        assert await keys(store, "k") == [("k", n) for n in range(20)]


async def test_without_syncs_a_power_loss_takes_commits_which_shows_that_the_shim_bites(path: Path) -> None:
    disk = PowerLossVfs()
    async with opened(path, vfs=disk.name, synchronous="OFF") as store:
        await put(store, ("k", 1))
        assert await keys(store, "k") == [("k", 1)]
        disk.lose_power()
    disk.unregister()

    async with opened(path) as store:
        assert await keys(store, "k") == []


async def test_a_disk_without_power_takes_no_more_writes(path: Path) -> None:
    disk = PowerLossVfs()
    async with opened(path, vfs=disk.name) as store:
        await put(store, ("k", 1))
        disk.lose_power()
        with pytest.raises(BackendUnavailable):
            await put(store, ("k", 2))
    disk.unregister()

    async with opened(path) as store:
        assert await keys(store, "k") == [("k", 1)]


@pytest.mark.parametrize("seed", range(6))
async def test_a_power_loss_that_keeps_any_unsynced_writes_leaves_whole_commits(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    disk = PowerLossVfs()
    acknowledged = 0
    async with opened(path, vfs=disk.name, synchronous="NORMAL" if seed % 2 else "FULL") as store:
        # More than one checkpoint, so that the loss also finds pages of the file itself half moved.
        for n in range(rng.randrange(40, 90)):
            await put(store, ("k", n, "a"), ("k", n, "b"), value=rng.randbytes(150_000))
            acknowledged += 1
        disk.lose_power(survives=lambda: rng.random() < 0.5)
    disk.unregister()

    async with opened(path) as store:
        found = await keys(store, "k")
        whole = len(found) // 2
        assert found == [("k", n, name) for n in range(whole) for name in ("a", "b")]
        assert whole == acknowledged or seed % 2 == 1
        await put(store, ("k", "next"))


_COMMIT_UNTIL_THE_POWER_FAILS = """
import asyncio, sys
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.testing.disk import PowerLossVfs

from tests.patience import PATIENCE_SECONDS

async def main() -> None:
    disk = PowerLossVfs(kill_at_sync=int(sys.argv[2]))
    store = await SqliteKeyValue.open(sys.argv[1], vfs=disk.name)
    for n in range(100):
        await store.commit(puts=[(("k", n, "a"), b""), (("k", n, "b"), b"")])
        print(n, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("sync", [1, 2, 3, 4, 5, 6, 12])
async def test_a_power_loss_at_any_sync_leaves_exactly_the_acknowledged_commits(path: Path, sync: int) -> None:
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _COMMIT_UNTIL_THE_POWER_FAILS, str(path), str(sync), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(killed.communicate(), PATIENCE_SECONDS)
    assert killed.returncode == -signal.SIGKILL

    async with opened(path) as store:
        assert await keys(store, "k") == [("k", int(n), name) for n in output.split() for name in ("a", "b")]


# -- size and cost ----------------------------------------------------------------------------------------------------


async def test_a_large_table_is_read_completely_in_pages(path: Path) -> None:
    async with opened(path, synchronous="OFF") as store:
        for start in range(0, 20_000, 2_000):
            await put(store, *(("k", start + n) for n in range(2_000)), value=bytes(50))

        seen: list[Key] = []
        while page := await store.scan(("k",), after=seen[-1] if seen else None):
            seen += [entry.key for entry in page]

        assert seen == [("k", n) for n in range(20_000)]
        assert await store.count(("k",), limit=15_000) == 15_000


async def test_the_log_does_not_grow_without_end(path: Path) -> None:
    async with opened(path, synchronous="OFF") as store:
        for n in range(100):
            await put(store, ("k", n % 3), value=bytes(1024 * 1024))

        assert path.with_name("saga.db-wal").stat().st_size < 36 * 1024 * 1024


async def test_what_the_log_holds_is_moved_into_the_file_by_a_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_by: list[str] = []
    moves_all = checkpoints._moves_all

    def noted(connection: checkpoints.MovesPages) -> bool:
        moved_by.append(threading.current_thread().name)
        return moves_all(connection)

    monkeypatch.setattr(checkpoints, "_moves_all", noted)
    async with opened(path) as store:
        for n in range(60):
            await put(store, ("k", n), value=bytes(1024 * 1024))
            await asyncio.sleep(0.001)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(content_of(path)) <= 16 * 1024 * 1024:  # noqa: ASYNC110 - the thread has its own time
                await asyncio.sleep(0.01)

        assert moved_by[0] == "sagaloom-checkpoints"
    assert moved_by[0] not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("seed", range(8))
async def test_a_power_loss_while_a_thread_moves_pages_takes_no_commit(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(sqlite_file, "_CHECKPOINT_PAGES", 40)
    disk = PowerLossVfs()
    moves_all = checkpoints._moves_all
    loses_at = rng.randrange(1, 12)  # in the middle of this round of the thread, or of the commits after it
    rounds = 0
    lost = threading.Event()

    def counted(connection: checkpoints.MovesPages) -> bool:
        nonlocal rounds
        rounds += 1
        if rounds == loses_at:
            threading.Timer(rng.random() / 200, lose).start()
        return moves_all(connection)

    def lose() -> None:
        disk.lose_power(survives=lambda: rng.random() < 0.5)
        lost.set()

    monkeypatch.setattr(checkpoints, "_moves_all", counted)
    acknowledged = 0
    async with opened(path, vfs=disk.name) as store:
        with contextlib.suppress(BackendUnavailable):
            while acknowledged < 100_000:
                await put(store, ("k", acknowledged, "a"), ("k", acknowledged, "b"), value=rng.randbytes(3_000))
                acknowledged += 1
        assert lost.wait(PATIENCE_SECONDS)
    disk.unregister()

    async with opened(path) as store:
        found: list[Key] = []
        while page := await store.scan(("k",), after=found[-1] if found else None):
            found += [entry.key for entry in page]
        # The last one may be there, too: the power went before anybody heard of it.
        assert len(found) in (2 * acknowledged, 2 * acknowledged + 2)
        assert found == [("k", n, name) for n in range(len(found) // 2) for name in ("a", "b")]
        assert rounds >= loses_at


async def test_statements_are_counted(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ("k", 1), ("k", 2))
        before = store.statements
        await store.get(("k", 1))
        await store.scan(("k",))
        await store.count(("k",), limit=1)
        reads = store.statements - before
        before = store.statements
        await store.commit(
            checks=[Check(("k", 9), None)],
            puts=[(("k", 3), b""), (("k", 4), b"")],
            deletes=[("k", 1)],
            reserve={"n": 1},
        )
        writes = store.statements - before

    assert reads == 3
    assert writes == 1 + 2 + 2 + 2 + 1  # check, versionstamp, counter, puts, delete
