"""Jobs in processes of a pool: what comes back, and what an end of theirs does to the others."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sagaloom import DefinitionError
from sagaloom.workers import create_success_result, define_job_handler
from tests.workers import pool_jobs as jobs
from tests.workers.jobs_room import PATIENCE_SECONDS, Room, open_room

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a socket cannot be handed over")


_POOLED = (
    *(jobs.square, jobs.square_async, jobs.talk, jobs.leave, jobs.hang, jobs.endless, jobs.endless_async),
    jobs.nothing,
)


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    async with open_room(*_POOLED, processes=2, cancel_grace_seconds=0.2, drain_seconds=0.1) as opened:
        yield opened


async def written(file: Path) -> int:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not file.exists() or not (text := file.read_text()):  # noqa: ASYNC110, ASYNC240 - another process writes it
            await asyncio.sleep(0.01)
        return int(text)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def gone(pid: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while is_alive(pid):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)


async def test_a_job_runs_in_another_process_which_is_kept(room: Room) -> None:
    first = json.loads((await room.run("square", {"n": 7})).result or b"")
    second = json.loads((await room.run("square", {"n": 8})).result or b"")

    assert (first["square"], second["square"]) == (49, 64)
    assert first["pid"] == second["pid"] != os.getpid()


async def test_an_async_job_runs_in_another_process_too(room: Room) -> None:
    assert (await room.run("square-async", {"n": 3})).result == b"9"


async def test_what_a_job_says_in_another_process_comes_back(room: Room) -> None:
    run = await room.run("talk")

    assert run.failure is not None
    assert (run.status, run.failure.message, run.failure.data) == ("failed", "no", b'{"a":[1]}')
    assert run.progress is not None
    assert (run.progress.fraction, run.progress.message) == (0.5, "half")
    assert [line.text for line in run.log] == ["attempt 1 of talk"]


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("os._exit", "JOB_PROCESS_DIED", "its process ended with status 3 in the middle of it"),
        ("abort", "JOB_PROCESS_DIED", "its process was ended by SIGABRT in the middle of it"),
        ("sys.exit", "JOB_HANDLER_FAILED", "SystemExit: 3"),
        ("interrupt", "JOB_HANDLER_FAILED", "KeyboardInterrupt"),
        ("raise", "JOB_HANDLER_FAILED", "OSError: no"),
    ],
)
async def test_a_job_that_ends_its_process_takes_nothing_else_down(room: Room, how: str, code: str, text: str) -> None:
    failed = await room.run("leave", {"how": how})
    room.clock.advance("1s")
    again = await room.settled()
    neighbour = await room.run("square", {"n": 2})

    assert failed.failure is not None
    assert (failed.status, failed.failure.code) == ("pending", code)
    assert text in failed.failure.message
    assert (again.status, again.attempt, neighbour.status) == ("succeeded", 2, "succeeded")


async def test_a_job_that_hangs_is_killed_at_its_deadline(room: Room, tmp_path: Path) -> None:
    await room.run("square", {"n": 1})  # its process has loaded everything, and has its time for the job
    run = await room.run("hang", {"file": str(tmp_path / "pid")})

    assert run.failure is not None
    assert (run.status, run.failure.code) == ("failed", "JOB_TIMED_OUT")
    await gone(await written(tmp_path / "pid"))


@pytest.mark.parametrize(
    ("job", "listens", "survives"), [("endless", True, True), ("endless-async", False, True), ("endless", False, False)]
)
async def test_a_job_in_another_process_is_asked_to_end_and_killed_when_it_does_not(
    tmp_path: Path, job: str, listens: bool, survives: bool
) -> None:
    grace_seconds = PATIENCE_SECONDS if survives else 0.2
    async with open_room(*_POOLED, processes=2, cancel_grace_seconds=grace_seconds, drain_seconds=0.1) as room:
        receipt = await room.runtime.trigger(job, {"file": str(tmp_path / "pid"), "listens": listens})
        pid = await written(tmp_path / "pid")

        await room.runtime.cancel(receipt.run_id, reason="enough")
        run = await room.settled()

        assert (run.status, run.cancel_reason) == ("cancelled", "enough")
        if not survives:
            await gone(pid)
        assert is_alive(pid) == survives


async def test_a_run_under_way_is_given_back_when_the_worker_stops(room: Room, tmp_path: Path) -> None:
    receipt = await room.runtime.trigger("endless", {"file": str(tmp_path / "pid")})
    pid = await written(tmp_path / "pid")

    await room.runtime.stop()
    run = await room.store.get(receipt.run_id)

    assert run is not None
    assert (run.status, run.attempt) == ("pending", 0)
    await gone(pid)


async def test_more_runs_than_processes_wait_for_one(room: Room) -> None:
    for number in range(6):
        await room.runtime.trigger("square", {"n": number})
    results = [json.loads((await room.settled()).result or b"") for _ in range(6)]

    assert sorted(one["square"] for one in results) == [0, 1, 4, 9, 16, 25]
    assert len({one["pid"] for one in results}) <= 2


async def test_a_result_that_is_none_is_no_result_there_either(room: Room) -> None:
    run = await room.run("nothing")

    assert run.failure is not None
    assert (run.status, run.failure.code) == ("failed", "JOB_RESULT_INVALID")


async def test_a_job_that_another_process_cannot_find_fails_and_says_where_it_was_looked_for() -> None:
    hidden = define_job_handler(jobs.square.handler, id="hidden", run_in="process")
    async with open_room(hidden, processes=1) as room:
        run = await room.run("hidden", {"n": 1})

    assert run.failure is not None
    assert run.status == "failed"
    assert "'hidden' is no global of" in run.failure.message


def test_a_function_that_no_other_process_can_import_is_refused() -> None:
    with pytest.raises(DefinitionError, match="a global of its module"):

        @define_job_handler(run_in="process")
        def local(ctx: Any) -> Any:
            return create_success_result(None)


@pytest.mark.parametrize(("place", "text"), [("loop", "stop all others"), ("cellar", "one of loop, thread, process")])
def test_a_place_that_does_not_fit_is_refused(place: Any, text: str) -> None:
    def handler(ctx: Any) -> Any:
        return create_success_result(None)

    with pytest.raises(DefinitionError, match=text):
        define_job_handler(handler, run_in=place)
