"""Every store of job runs of the package, held to the contract that users get too."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sagaloom.kv import MemoryKeyValue, SqliteKeyValue
from sagaloom.kv.postgres import PostgresKeyValue
from sagaloom.ports.jobs import JobRun, JobRunStore
from sagaloom.ports.keyvalue import KeyValue
from sagaloom.stores.kv_jobs import KvJobRunStore
from sagaloom.testing.contracts.jobs import JobRunStoreContract, OpenJobRunStore
from sagaloom.workers.opening import open_job_store
from tests.schemas import Schema

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class _StaysOpen(MemoryKeyValue):
    """A store in memory that several doors share, so that none of them may close it."""

    async def close(self) -> None:
        return None


class TestJobRunsInMemory(JobRunStoreContract):
    @pytest.fixture
    def open_store(self) -> OpenJobRunStore:
        kv = _StaysOpen()

        async def open_store() -> JobRunStore:
            return KvJobRunStore(kv)

        return open_store


class TestJobRunsInSqlite(JobRunStoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenJobRunStore:
        async def open_store() -> JobRunStore:
            return KvJobRunStore(await SqliteKeyValue.open(tmp_path / "sagas.db"))

        return open_store


class TestJobRunsInPostgres(JobRunStoreContract):
    @pytest.fixture
    def open_store(self, schema: Schema) -> OpenJobRunStore:
        async def open_store() -> JobRunStore:
            return KvJobRunStore(PostgresKeyValue(schema.database()))

        return open_store


# --- What only this store does ---------------------------------------------------------------------------------------

HOLD = """
import asyncio, sys
from datetime import UTC, datetime, timedelta
from sagaloom.workers.opening import open_job_store
from tests.schemas import Schema

async def main():
    store = await open_job_store(sys.argv[1])
    await store.join("w1")
    now = datetime(2026, 1, 1, tzinfo=UTC)
    claimed = await store.claim("w1", ["mail"], now=now, until=now + timedelta(hours=1), limit=1)
    print(len(claimed.runs), flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


@pytest.fixture
async def kv(tmp_path: Path) -> AsyncIterator[SqliteKeyValue]:
    store = await SqliteKeyValue.open(tmp_path / "sagas.db")
    yield store
    await store.close()


def a_run(number: int = 1, **fields: object) -> JobRun:
    return JobRun(run_id=f"{number:032x}", job_id="mail", payload=b"{}", created_at=NOW, due_at=NOW, **fields)  # type: ignore[arg-type]


async def _claim(store: JobRunStore, holder: str) -> tuple[JobRun, ...]:
    return (await store.claim(holder, ["mail"], now=NOW, until=NOW + timedelta(hours=1), limit=1)).runs


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
async def test_a_killed_workers_run_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    store = await open_job_store(path)
    await store.join("w2")
    await store.enqueue(a_run())
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, str(path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert worker.stdout is not None
        assert await worker.stdout.readline() == b"1\n"
        while_alive = await _claim(store, "w2")
    finally:
        worker.kill()
        await worker.communicate()

    after = await _claim(store, "w2")
    await store.close()

    assert while_alive == ()
    assert [(run.holder, run.epoch) for run in after] == [("w2", 2)]


async def test_what_a_worker_leaves_behind_is_free_at_once(tmp_path: Path) -> None:
    first, second = await open_job_store(tmp_path / "sagas.db"), await open_job_store(tmp_path / "sagas.db")
    await first.join("w1")
    await second.join("w2")
    await first.enqueue(a_run())
    await _claim(first, "w1")
    before = await _claim(second, "w2")

    await first.leave()
    await first.leave()

    assert before == ()
    assert len(await _claim(second, "w2")) == 1
    await first.close()
    await second.close()


async def test_an_idle_claim_is_one_read(kv: SqliteKeyValue) -> None:
    store = KvJobRunStore(kv)
    await store.enqueue(a_run())
    await _claim(store, "w1")
    await _claim(store, "w1")
    before = kv.statements

    for _ in range(10):
        assert await _claim(store, "w1") == ()

    assert kv.statements - before == 10


async def test_runs_and_sagas_can_share_a_file(tmp_path: Path, kv: KeyValue) -> None:
    from sagaloom.stores import KvSagaStore

    sagas = KvSagaStore(await SqliteKeyValue.open(tmp_path / "sagas.db"))
    lease = await sagas.acquire("sagas", now=NOW)
    store = KvJobRunStore(kv)

    await store.enqueue(a_run())
    await sagas.commit([], lease=lease)

    assert len(await _claim(store, "w1")) == 1
    await sagas.close()


async def test_runs_survive_the_process(tmp_path: Path) -> None:
    first = KvJobRunStore(await SqliteKeyValue.open(tmp_path / "sagas.db"))
    run = a_run(correlation_id="c", idempotency_key="k")
    await first.enqueue(run)
    await first.close()

    second = KvJobRunStore(await SqliteKeyValue.open(tmp_path / "sagas.db"))
    found = await second.get(run.run_id)
    await second.close()

    assert found == run


async def test_rows_of_a_newer_version_are_refused(kv: SqliteKeyValue) -> None:
    await kv.commit(puts=[(("job_meta", "schema"), b"99")])

    with pytest.raises(Exception, match="upgrade sagaloom"):
        await KvJobRunStore(kv).runs()
