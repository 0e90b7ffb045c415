"""Commits that are asked for at once go as one, and each stands or falls alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sagaloom.errors import BackendUnavailable
from sagaloom.kv import MemoryKeyValue
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Key
from sagaloom.stores.job_commits import JobCommits


class CountingRows(MemoryKeyValue):
    def __init__(self) -> None:
        super().__init__()
        self.commits = 0
        self.trouble: Exception | None = None

    async def commit(self, **asked: Any) -> Committed | Conflicted:
        self.commits += 1
        if self.trouble is not None:
            raise self.trouble
        return await super().commit(**asked)


def key(number: int) -> Key:
    return "row", number


async def test_what_is_asked_for_at_once_is_one_commit() -> None:
    rows = CountingRows()
    commits = JobCommits(rows)

    done = await asyncio.gather(*(commits.commit(inserts=[(key(number), b"x")]) for number in range(64)))

    assert rows.commits == 1
    assert all(isinstance(one, Committed) for one in done)
    assert len(await rows.scan(("row",))) == 64


async def test_a_conflict_is_told_to_the_one_whose_it_is_and_the_others_are_written() -> None:
    rows = CountingRows()
    commits = JobCommits(rows)
    await rows.commit(puts=[(key(1), b"mine")])

    done = await asyncio.gather(*(commits.commit(inserts=[(key(number), b"x")]) for number in range(3)))
    stale = await asyncio.gather(
        commits.commit(checks=[Check(key(0), 4711)], puts=[(key(0), b"y")]), commits.commit(puts=[(key(9), b"x")])
    )

    assert [type(one) for one in done] == [Committed, Conflicted, Committed]
    assert done[1] == Conflicted((key(1),))
    assert [type(one) for one in stale] == [Conflicted, Committed]
    found = {row.key[1]: row.value for row in await rows.scan(("row",))}
    assert found == {0: b"x", 1: b"mine", 2: b"x", 9: b"x"}


async def test_of_two_that_touch_one_row_the_second_sees_what_the_first_has_done() -> None:
    rows = CountingRows()
    commits = JobCommits(rows)
    await rows.commit(puts=[(key(1), b"0")])
    row = await rows.get(key(1))
    assert row is not None
    check = Check(key(1), row.versionstamp)

    first, second, other = await asyncio.gather(
        commits.commit(checks=[check], puts=[(key(1), b"1")]),
        commits.commit(checks=[check], puts=[(key(1), b"2")]),
        commits.commit(inserts=[(key(2), b"x")]),
    )

    assert [type(one) for one in (first, second, other)] == [Committed, Conflicted, Committed]
    found = await rows.get(key(1))
    assert found is not None
    assert found.value == b"1"


async def test_a_store_that_does_not_answer_is_told_to_all_and_the_next_may_go() -> None:
    rows = CountingRows()
    commits = JobCommits(rows)
    rows.trouble = BackendUnavailable("not now")

    answers = await asyncio.gather(
        *(commits.commit(inserts=[(key(number), b"x")]) for number in range(3)), return_exceptions=True
    )
    rows.trouble = None
    after = await commits.commit(inserts=[(key(1), b"x")])

    assert [str(one) for one in answers] == ["not now"] * 3
    assert isinstance(after, Committed)


async def test_one_who_waits_no_more_holds_nobody_up() -> None:
    commits = JobCommits(CountingRows())
    gone = asyncio.create_task(commits.commit(inserts=[(key(1), b"x")]))
    stays = asyncio.create_task(commits.commit(inserts=[(key(2), b"x")]))
    await asyncio.sleep(0)
    gone.cancel()

    assert isinstance(await stays, Committed)
    with pytest.raises(asyncio.CancelledError):
        await gone
