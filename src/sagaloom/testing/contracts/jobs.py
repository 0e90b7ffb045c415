"""What every store of job runs must do, as tests: subclass `JobRunStoreContract`, say how to open a store, run pytest.

    class TestMyStore(JobRunStoreContract):
        @pytest.fixture
        def open_store(self) -> OpenJobRunStore:
            async def open_store() -> JobRunStore:
                return await MyJobStore.connect("...")

            return open_store

In one test, all stores that `open_store` opens are doors to the same runs, as those of several processes would be; at
the start there are none. The tests are coroutines for anyio's pytest plugin; there is nothing to skip. Put
`pytest.register_assert_rewrite("sagaloom.testing.contracts")` into your `conftest.py` for readable failures.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from sagaloom.engine.records import ScheduleCursor
from sagaloom.errors import Fenced, IdempotencyKeyReused, JobRunNotFound, MessageRejected
from sagaloom.ports.jobs import (
    ATTEMPTS_KEPT,
    LOG_LINES_KEPT,
    REPLY_HEADSTART,
    Cancelled,
    Failed,
    JobEvent,
    JobFailure,
    JobLogLine,
    JobNote,
    JobProgress,
    JobReply,
    JobReplyTo,
    JobRun,
    JobRunStatus,
    JobRunStore,
    Released,
    Retried,
    Settlement,
    Succeeded,
)

__all__ = ["JobRunStoreContract", "OpenJobRunStore"]

OpenJobRunStore = Callable[[], Awaitable[JobRunStore]]

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=6)


def at(seconds: float) -> datetime:
    """The moment that many seconds after the start of the test."""
    return START + timedelta(seconds=seconds)


def failure(attempt: int = 1, *, seconds: float = 1) -> JobFailure:
    return JobFailure("JOB_HANDLER_FAILED", "OSError: no", attempt, at(seconds), "Traceback ...")


class _Runs:
    """Makes runs whose ids grow."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def make(self, job_id: str = "mail", **fields: Any) -> JobRun:
        run_id = f"{next(self._numbers):032x}"
        run = JobRun(run_id=run_id, job_id=job_id, payload=b'{"n":1}', created_at=START, due_at=START)
        return msgspec.structs.replace(run, **fields)


async def claim(
    store: JobRunStore, holder: str = "w1", *job_ids: str, now: float = 0, limit: int = 10
) -> tuple[JobRun, ...]:
    claimed = await store.claim(holder, job_ids or ("mail",), now=at(now), until=at(now) + LEASE, limit=limit)
    return claimed.runs


ASKS = JobReplyTo("signup", "s-1", 1, "e" * 32, 3)


async def happened(store: JobRunStore, after: int = 0) -> list[JobEvent]:
    return await store.events(after=after)


def ids(runs: Any) -> list[str]:
    return [run.run_id for run in runs]


class JobRunStoreContract:
    """The tests; a subclass has a fixture `open_store`."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    async def store(self, open_store: OpenJobRunStore) -> AsyncIterator[JobRunStore]:
        store = await open_store()
        yield store
        await store.close()

    @pytest.fixture
    async def other(self, open_store: OpenJobRunStore, store: JobRunStore) -> AsyncIterator[JobRunStore]:
        """A second door to the same runs."""
        other = await open_store()
        yield other
        await other.close()

    @pytest.fixture
    def new(self) -> _Runs:
        return _Runs()

    # -- enqueueing -----------------------------------------------------------------------------------------------

    async def test_it_is_a_job_run_store(self, store: JobRunStore) -> None:
        assert isinstance(store, JobRunStore)
        assert store.name
        assert store.problem is None

    async def test_an_enqueued_run_is_there_as_it_was_given(self, store: JobRunStore, new: _Runs) -> None:
        run = new.make(priority=70, correlation_id="c", traceparent="00-a", tracestate="s", due_at=at(60))

        enqueued = await store.enqueue(run)

        assert (enqueued.run, enqueued.duplicate) == (run, False)
        assert await store.get(run.run_id) == run

    async def test_a_run_that_nobody_enqueued_is_not_there(self, store: JobRunStore) -> None:
        assert await store.get("f" * 32) is None

    async def test_a_run_id_cannot_be_used_twice(self, store: JobRunStore, new: _Runs) -> None:
        run = new.make()
        await store.enqueue(run)

        with pytest.raises(MessageRejected):
            await store.enqueue(msgspec.structs.replace(run, payload=b"2"))

        assert await store.get(run.run_id) == run

    async def test_an_idempotency_key_with_the_same_payload_answers_with_the_first_run(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        first = new.make(idempotency_key="k")
        await store.enqueue(first)

        again = await other.enqueue(new.make(idempotency_key="k", priority=1))

        assert (again.run, again.duplicate) == (first, True)
        assert ids((await store.runs())[0]) == [first.run_id]

    async def test_an_idempotency_key_outlives_its_run(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make(idempotency_key="k"))
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))

        again = await store.enqueue(new.make(idempotency_key="k"))

        assert (again.run, again.duplicate) == (done, True)

    async def test_an_idempotency_key_with_another_payload_is_refused(self, store: JobRunStore, new: _Runs) -> None:
        first = new.make(idempotency_key="k")
        await store.enqueue(first)

        with pytest.raises(IdempotencyKeyReused, match=first.run_id):
            await store.enqueue(new.make(idempotency_key="k", payload=b'{"n":2}'))

        assert ids((await store.runs())[0]) == [first.run_id]

    async def test_the_same_payload_may_be_written_in_another_way(self, store: JobRunStore, new: _Runs) -> None:
        first = new.make(idempotency_key="k", payload=b'{"a":1,"b":[2]}')
        await store.enqueue(first)

        again = await store.enqueue(new.make(idempotency_key="k", payload=b'{ "b": [2], "a": 1 }'))

        assert (again.run, again.duplicate) == (first, True)

    async def test_idempotency_keys_of_two_jobs_are_two_keys(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make("mail", idempotency_key="k"))

        assert not (await store.enqueue(new.make("print", idempotency_key="k", payload=b"2"))).duplicate

    async def test_of_many_who_enqueue_one_key_at_once_all_get_one_run(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        doors = itertools.cycle((store, other))

        done = await asyncio.gather(*(next(doors).enqueue(new.make(idempotency_key="k")) for _ in range(20)))

        assert len({one.run.run_id for one in done}) == 1
        assert [one.duplicate for one in done].count(False) == 1

    # -- claiming -------------------------------------------------------------------------------------------------

    async def test_a_due_run_is_claimed_and_counted(self, store: JobRunStore, new: _Runs) -> None:
        run = new.make()
        await store.enqueue(run)

        [claimed] = await claim(store, "w1", now=2)

        assert claimed == msgspec.structs.replace(
            run, status="running", holder="w1", attempt=1, epoch=1, started_at=at(2)
        )
        assert await store.get(run.run_id) == claimed

    async def test_a_claimed_run_is_not_claimed_again(self, store: JobRunStore, other: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        await claim(store, "w1")

        assert await claim(other, "w2") == ()
        assert await claim(store, "w1") == ()

    async def test_a_run_is_not_claimed_before_it_is_due_and_the_moment_is_told(
        self, store: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make(due_at=at(60)))

        early = await store.claim("w1", ["mail"], now=at(59.9), until=at(70), limit=1)

        assert (early.runs, early.next_at) == ((), at(60))
        assert len(await claim(store, now=60)) == 1

    async def test_nothing_waiting_means_no_moment(self, store: JobRunStore) -> None:
        assert (await store.claim("w1", ["mail"], now=at(0), until=at(6), limit=1)).next_at is None

    async def test_only_runs_of_the_asked_jobs_are_claimed(self, store: JobRunStore, new: _Runs) -> None:
        mail, letter = new.make("mail"), new.make("print", due_at=at(1))
        await store.enqueue(mail)
        await store.enqueue(letter)

        assert ids(await claim(store, "w1", "print", now=2)) == [letter.run_id]
        assert ids(await claim(store, "w1", "mail", "print", now=2)) == [mail.run_id]
        assert await claim(store, "w1", "sing", now=2) == ()

    async def test_no_more_than_the_limit_is_claimed(self, store: JobRunStore, new: _Runs) -> None:
        runs = [new.make() for _ in range(5)]
        for run in runs:
            await store.enqueue(run)

        batches = [ids(await claim(store, limit=2)) for _ in range(4)]

        expected = ids(runs)
        assert batches == [expected[:2], expected[2:4], expected[4:], []]

    async def test_higher_priorities_go_first_and_then_what_was_due_first(self, store: JobRunStore, new: _Runs) -> None:
        late = new.make("mail", due_at=at(30))
        early = new.make("print", due_at=at(20))
        low = new.make("mail", priority=0)
        urgent = new.make("mail", priority=100, due_at=at(40))
        for run in (late, early, low, urgent):
            await store.enqueue(run)

        order = [ids(await claim(store, "w1", "mail", "print", now=50, limit=1)) for _ in range(4)]

        assert order == [[urgent.run_id], [early.run_id], [late.run_id], [low.run_id]]

    async def test_what_becomes_due_for_another_job_is_still_found_by_it(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        run = new.make("print", due_at=at(10))
        await store.enqueue(run)
        assert await claim(other, "w2", "print", now=5) == ()
        assert await claim(store, "w1", "mail", now=11) == ()

        assert ids(await claim(other, "w2", "print", now=11)) == [run.run_id]

    async def test_what_another_door_enqueues_is_found(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        assert await claim(store) == ()
        assert await claim(store) == ()
        run = new.make()
        await other.enqueue(run)

        assert ids(await claim(store)) == [run.run_id]

    async def test_of_many_who_claim_at_once_each_gets_other_runs(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        runs = [new.make(due_at=at(number % 3)) for number in range(30)]
        for run in runs:
            await store.enqueue(run)

        batches = await asyncio.gather(
            *(claim(door, name, now=5, limit=3) for door, name in [(store, "w1"), (other, "w2")] * 10)
        )

        claimed = [run_id for batch in batches for run_id in ids(batch)]
        assert len(claimed) == len(set(claimed)) == len(runs)

    # -- leases ---------------------------------------------------------------------------------------------------

    async def test_a_run_whose_lease_is_over_is_claimed_again_under_a_greater_epoch(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        await claim(store, "w1")

        early = await other.claim("w2", ["mail"], now=at(5.9), until=at(12), limit=1)
        [again] = await claim(other, "w2", now=6)

        assert (early.runs, early.next_at) == ((), at(6))
        assert (again.holder, again.epoch, again.attempt) == ("w2", 2, 2)

    async def test_a_renewed_lease_lasts_longer(self, store: JobRunStore, other: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store, "w1")

        lost = await store.renew([run.claim], until=at(20))

        assert lost == ([], [])
        assert await claim(other, "w2", now=19.9) == ()
        assert len(await claim(other, "w2", now=20)) == 1

    async def test_a_stale_claim_is_not_renewed_and_is_named(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        await store.enqueue(new.make())
        kept, lost = await claim(store, "w1")
        await store.renew([kept.claim], until=at(60))
        [retaken] = await claim(other, "w2", now=7)

        answer = await store.renew([lost.claim, kept.claim], until=at(100))

        assert answer == ([lost.claim], [])
        assert retaken.run_id == lost.run_id
        assert await claim(store, "w3", now=14) == (await store.get(lost.run_id),)

    async def test_a_stale_claim_settles_nothing(self, store: JobRunStore, other: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [stale] = await claim(store, "w1")
        [live] = await claim(other, "w2", now=7)

        for settlement in (Succeeded(b"1", at(8)), Failed(failure()), Retried(failure(), at(9)), Released()):
            with pytest.raises(Fenced):
                await store.settle(stale.claim, settlement)
        with pytest.raises(Fenced):
            await store.note(stale.claim, JobNote(JobProgress(at(8), 0.5)))

        assert await store.get(live.run_id) == live
        assert (await other.settle(live.claim, Succeeded(b"2", at(8)))).result == b"2"

    async def test_a_claim_is_settled_once(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))

        with pytest.raises(Fenced, match="succeeded"):
            await store.settle(run.claim, Failed(failure()))

        assert await store.get(run.run_id) == done

    async def test_a_claim_on_nothing_settles_nothing(self, store: JobRunStore, new: _Runs) -> None:
        run = msgspec.structs.replace(new.make(), holder="w1", epoch=1)

        with pytest.raises(Fenced):
            await store.settle(run.claim, Succeeded(b"1", at(1)))

        assert await store.get(run.run_id) is None

    async def test_a_run_that_was_given_back_and_taken_again_is_not_settled_by_the_first_claim(
        self, store: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        [first] = await claim(store, "w1")
        await store.settle(first.claim, Released())
        [second] = await claim(store, "w1")

        with pytest.raises(Fenced):
            await store.settle(first.claim, Succeeded(b"1", at(1)))

        assert (second.attempt, second.epoch) == (1, 2)

    # -- settling -------------------------------------------------------------------------------------------------

    async def test_a_run_that_succeeded_has_its_result_and_is_over(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)

        done = await store.settle(run.claim, Succeeded(b'{"sent":true}', at(3)))

        assert (done.status, done.result, done.ended_at, done.holder) == ("succeeded", b'{"sent":true}', at(3), None)
        assert await store.get(run.run_id) == done
        assert await claim(store, now=1000) == ()

    async def test_a_run_that_failed_has_its_reason_and_is_over(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)

        done = await store.settle(run.claim, Failed(failure(seconds=3)))

        assert (done.status, done.failure, done.ended_at) == ("failed", failure(seconds=3), at(3))
        assert await store.get(run.run_id) == done
        assert await claim(store, now=1000) == ()

    async def test_a_retried_run_waits_until_it_is_due_and_keeps_its_count(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)

        waiting = await store.settle(run.claim, Retried(failure(), at(30)))
        early = await other.claim("w2", ["mail"], now=at(29), until=at(40), limit=1)
        [again] = await claim(other, "w2", now=30)

        assert (waiting.status, waiting.failure, waiting.ended_at, waiting.due_at) == (
            "pending",
            failure(),
            None,
            at(30),
        )
        assert (early.runs, early.next_at) == ((), at(30))
        assert (again.attempt, again.failure) == (2, failure())

    async def test_a_released_run_is_claimed_at_once_and_its_attempt_does_not_count(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)

        waiting = await store.settle(run.claim, Released())
        [again] = await claim(other, "w2", now=1)

        assert (waiting.status, waiting.attempt) == ("pending", 0)
        assert (again.attempt, again.epoch) == (1, 2)

    # -- reading --------------------------------------------------------------------------------------------------

    async def test_runs_are_listed_newest_first_page_by_page(self, store: JobRunStore, new: _Runs) -> None:
        runs = [new.make() for _ in range(5)]
        for run in runs:
            await store.enqueue(run)

        first, cursor = await store.runs(limit=2)
        second, cursor_2 = await store.runs(limit=2, cursor=cursor)
        third, cursor_3 = await store.runs(limit=2, cursor=cursor_2)

        newest_first = ids(reversed(runs))
        assert [ids(first), ids(second), ids(third)] == [newest_first[:2], newest_first[2:4], newest_first[4:]]
        assert cursor_3 is None

    @pytest.mark.parametrize(
        ("job_ids", "statuses", "expected"),
        [
            ((), (), [6, 5, 4, 3, 2, 1]),
            ((), ("cancelled",), []),
            (("mail",), (), [5, 3, 1]),
            ((), ("pending",), [6, 5]),
            (("print",), ("succeeded", "failed"), [2]),
            (("mail", "print"), ("running",), [4]),
            (("sing",), (), []),
        ],
    )
    async def test_runs_are_found_by_job_and_status(
        self,
        store: JobRunStore,
        new: _Runs,
        job_ids: tuple[str, ...],
        statuses: tuple[JobRunStatus, ...],
        expected: list[int],
    ) -> None:
        runs = [new.make("mail" if number % 2 else "print") for number in range(1, 7)]
        for run in runs:
            await store.enqueue(run)
        held = [(await claim(store, "w1", "mail", "print", limit=1))[0] for _ in range(4)]
        await store.settle(held[0].claim, Succeeded(b"1", at(1)))
        await store.settle(held[1].claim, Failed(failure()))
        await store.settle(held[2].claim, Succeeded(b"1", at(1)))

        found, cursor = await store.runs(job_ids=job_ids, statuses=statuses)
        pages: list[str] = []
        after: str | None = None
        while True:
            page, after = await store.runs(job_ids=job_ids, statuses=statuses, limit=1, cursor=after)
            pages += ids(page)
            if after is None:
                break

        assert ids(found) == [f"{number:032x}" for number in expected]
        assert cursor is None
        assert pages == ids(found)

    async def test_a_cursor_that_is_none_is_refused(self, store: JobRunStore) -> None:
        with pytest.raises(MessageRejected, match="no cursor"):
            await store.runs(cursor="yesterday")

    # -- what handlers say ----------------------------------------------------------------------------------------

    async def test_what_a_handler_says_is_kept_with_the_run(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        first, last = JobLogLine(at(1), "info", "begun"), JobLogLine(at(3), "warning", "nearly")

        await store.note(run.claim, JobNote(JobProgress(at(1), 0.25, "reading"), (first,)))
        noted = await store.get(run.run_id)
        done = await store.settle(run.claim, Succeeded(b"1", at(3)), note=JobNote(JobProgress(at(3), 1.0), (last,)))

        assert noted is not None
        assert (noted.progress, noted.log, noted.status) == (JobProgress(at(1), 0.25, "reading"), (first,), "running")
        assert (done.progress, done.log) == (JobProgress(at(3), 1.0), (first, last))
        assert await store.get(run.run_id) == done

    async def test_of_a_long_log_the_newest_lines_are_kept(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        lines = [JobLogLine(at(1), "info", str(number)) for number in range(LOG_LINES_KEPT + 5)]

        await store.note(run.claim, JobNote(log=tuple(lines[:50])))
        await store.note(run.claim, JobNote(log=tuple(lines[50:])))

        noted = await store.get(run.run_id)
        assert noted is not None
        assert noted.log == tuple(lines[5:])

    async def test_every_attempt_that_is_over_stands_in_the_history(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        [first] = await claim(store, "w1")
        await store.settle(first.claim, Retried(failure(seconds=2), at(3)))
        await claim(store, "w1", now=3)
        [third] = await claim(other, "w2", now=10)
        await other.settle(third.claim, Released(at(11)))
        [last] = await claim(store, "w3", now=12)

        done = await store.settle(last.claim, Succeeded(b"1", at(13)))

        assert [(one.attempt, one.outcome, one.holder, one.started_at, one.ended_at) for one in done.history] == [
            (1, "failed", "w1", at(0), at(2)),
            (2, "lost", "w1", at(3), at(10)),
            (3, "released", "w2", at(10), at(11)),
            (3, "succeeded", "w3", at(12), at(13)),
        ]
        assert (done.history[0].code, done.history[0].message) == ("JOB_HANDLER_FAILED", "OSError: no")

    async def test_of_a_long_history_the_newest_attempts_are_kept(self, store: JobRunStore, new: _Runs) -> None:
        run = new.make()
        await store.enqueue(run)
        for number in range(ATTEMPTS_KEPT + 2):
            [run] = await claim(store, now=number * 10)
            run = await store.settle(run.claim, Retried(failure(run.attempt), at(number * 10)))

        assert [one.attempt for one in run.history] == list(range(3, ATTEMPTS_KEPT + 3))

    # -- cancelling and redriving ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("due", [0, 60])
    async def test_a_waiting_run_is_cancelled_at_once(self, store: JobRunStore, new: _Runs, due: int) -> None:
        run = new.make(due_at=at(due))
        await store.enqueue(run)

        done = await store.cancel(run.run_id, at=at(1), reason="not needed")

        assert (done.status, done.ended_at, done.cancelled_at, done.cancel_reason) == (
            "cancelled",
            at(1),
            at(1),
            "not needed",
        )
        assert await store.get(run.run_id) == done
        assert await claim(store, now=1000) == ()
        assert ids((await store.runs(statuses=["cancelled"]))[0]) == [run.run_id]

    async def test_the_holder_of_a_running_run_hears_that_it_is_cancelled(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        await store.enqueue(new.make())
        kept, run = await claim(store)

        asked = await other.cancel(run.run_id, at=at(1), reason="enough")
        again = await other.cancel(run.run_id, at=at(2), reason="really")
        heard = await store.renew([kept.claim, run.claim], until=at(20))
        done = await store.settle(run.claim, Cancelled(at(3)))

        assert (asked.status, asked.cancelled_at) == ("running", at(1))
        assert again == asked
        assert heard == ([], [run.claim])
        assert (done.status, done.cancel_reason, done.ended_at) == ("cancelled", "enough", at(3))

    async def test_a_handler_that_is_done_before_it_hears_of_the_cancellation_has_succeeded(
        self, store: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        await store.cancel(run.run_id, at=at(1))

        assert (await store.settle(run.claim, Succeeded(b"1", at(2)))).status == "succeeded"

    async def test_a_cancelled_run_is_not_tried_again(self, store: JobRunStore, new: _Runs) -> None:
        ends: list[Settlement] = [Retried(failure(seconds=2), at(30)), Released(at(2))]
        for settlement in ends:
            await store.enqueue(new.make())
            [run] = await claim(store)
            await store.cancel(run.run_id, at=at(1))

            done = await store.settle(run.claim, settlement)

            assert (done.status, done.ended_at) == ("cancelled", at(2))
        assert await claim(store, now=1000) == ()

    async def test_whoever_takes_over_a_cancelled_run_finds_the_mark(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store, "w1")
        await store.cancel(run.run_id, at=at(1))

        [found] = await claim(other, "w2", now=10)

        assert (found.holder, found.cancelled_at) == ("w2", at(1))

    @pytest.mark.parametrize("asked_before", [0, 1])
    async def test_a_run_whose_holder_is_gone_is_cancelled_at_once(
        self, store: JobRunStore, other: JobRunStore, new: _Runs, asked_before: int
    ) -> None:
        # Its job may be gone, and then nobody takes it over.
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        for _ in range(asked_before):
            await other.cancel(run.run_id, at=at(1), reason="enough")

        done = await other.cancel(run.run_id, at=at(6), reason="enough")

        assert (done.status, done.ended_at, done.cancel_reason) == ("cancelled", at(6), "enough")
        assert [one.outcome for one in done.history] == ["lost"]
        assert done.reply is not None
        with pytest.raises(Fenced):
            await store.settle(run.claim, Succeeded(b"1", at(7)))
        assert await claim(store, now=1000) == ()
        assert await store.get(run.run_id) == done

    async def test_a_run_that_is_over_is_not_cancelled(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))

        assert await store.cancel(run.run_id, at=at(2)) == done

    async def test_a_run_that_is_not_there_is_neither_cancelled_nor_redriven(self, store: JobRunStore) -> None:
        with pytest.raises(JobRunNotFound):
            await store.cancel("f" * 32, at=at(1))
        with pytest.raises(JobRunNotFound):
            await store.redrive("f" * 32, at=at(1))

    @pytest.mark.parametrize("end", ["failed", "cancelled"])
    async def test_a_run_that_did_not_work_begins_anew(
        self, store: JobRunStore, other: JobRunStore, new: _Runs, end: str
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        await store.settle(run.claim, Failed(failure()) if end == "failed" else Cancelled(at(1)))
        assert await claim(other, "w2", now=2) == ()

        waiting = await store.redrive(run.run_id, at=at(5))
        [again] = await claim(other, "w2", now=5)
        done = await other.settle(again.claim, Succeeded(b"1", at(6)))

        assert (waiting.status, waiting.attempt, waiting.ended_at, waiting.due_at) == ("pending", 0, None, at(5))
        assert (again.attempt, again.epoch) == (1, 2)
        assert [one.outcome for one in done.history] == [end, "succeeded"]

    async def test_a_run_that_is_not_over_or_succeeded_is_not_redriven(self, store: JobRunStore, new: _Runs) -> None:
        run = new.make()
        await store.enqueue(run)
        refused: list[str] = []
        for step in ("pending", "running", "succeeded"):
            if step == "running":
                await claim(store)
            elif step == "succeeded":
                await store.settle(msgspec.structs.replace(run, holder="w1", epoch=1).claim, Succeeded(b"1", at(1)))
            with pytest.raises(MessageRejected, match=step) as caught:
                await store.redrive(run.run_id, at=at(2))
            refused.append(caught.value.code)

        assert refused == ["JOB_RUN_NOT_OVER"] * 3

    # -- replies --------------------------------------------------------------------------------------------------

    async def test_a_run_that_a_saga_asked_for_owes_a_reply_when_it_is_over(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        due = 1 + REPLY_HEADSTART.total_seconds()

        done = await store.settle(run.claim, Succeeded(b"1", at(1)))
        early = await other.claim_replies(now=at(due - 0.1), until=at(due + 10), limit=10)
        [found] = await other.claim_replies(now=at(due), until=at(due + 10), limit=10)
        taken = await store.claim_replies(now=at(due + 9), until=at(99), limit=10)
        [again] = await store.claim_replies(now=at(due + 10), until=at(99), limit=10)

        assert (done.reply_to, done.reply) == (ASKS, JobReply("due", at(due)))
        assert (early, taken) == ([], [])
        assert found == msgspec.structs.replace(done, reply=JobReply("due", at(due + 10)))
        assert again.run_id == done.run_id

    async def test_a_reply_that_was_delivered_is_not_owed_any_more(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Failed(failure()))

        assert await store.settle_reply(done, JobReply("delivered", at(2)))

        assert await store.claim_replies(now=at(1000), until=at(2000), limit=10) == []
        assert not await store.settle_reply(done, JobReply("refused", at(3)))
        found = await store.get(run.run_id)
        assert found is not None
        assert found.reply == JobReply("delivered", at(2))

    async def test_a_reply_may_be_tried_again_later(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Cancelled(at(1)))

        await store.settle_reply(done, JobReply("due", at(60), 1, "nobody answers"))

        assert await store.claim_replies(now=at(59), until=at(99), limit=10) == []
        [found] = await store.claim_replies(now=at(60), until=at(99), limit=10)
        assert found.reply == JobReply("due", at(99), 1, "nobody answers")

    async def test_a_redriven_run_owes_no_reply_until_it_is_over_again(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        failed = await store.settle(run.claim, Failed(failure()))
        await store.redrive(run.run_id, at=at(2))

        nothing = await store.claim_replies(now=at(1000), until=at(2000), limit=10)
        is_late = await store.settle_reply(failed, JobReply("delivered", at(3)))
        [again] = await claim(store, now=3)
        await store.settle(again.claim, Succeeded(b"1", at(4)))

        assert (nothing, is_late) == ([], False)
        assert len(await store.claim_replies(now=at(1000), until=at(2000), limit=10)) == 1

    async def test_a_refused_reply_is_sent_again_by_a_redrive(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))
        await store.settle_reply(done, JobReply("refused", at(2), 1, "no such saga"))

        again = await store.redrive(run.run_id, at=at(5))

        assert (again.status, again.reply) == ("succeeded", JobReply("due", at(5)))
        assert ids(await store.claim_replies(now=at(5), until=at(9), limit=10)) == [run.run_id]

    async def test_a_waiting_run_that_is_cancelled_owes_a_reply_too(self, store: JobRunStore, new: _Runs) -> None:
        run = new.make(reply_to=ASKS)
        await store.enqueue(run)

        await store.cancel(run.run_id, at=at(1))

        assert ids(await store.claim_replies(now=at(1000), until=at(2000), limit=10)) == [run.run_id]

    # -- what happened --------------------------------------------------------------------------------------------

    async def test_everything_that_happens_is_an_event_in_its_order(
        self, store: JobRunStore, other: JobRunStore, new: _Runs
    ) -> None:
        before = await store.event_span()
        run = new.make(correlation_id="c-1")
        await store.enqueue(run)
        [claimed] = await claim(other)
        await other.note(claimed.claim, JobNote(JobProgress(at(1), 0.5, "half")))
        await other.settle(claimed.claim, Retried(failure(seconds=2), at(2)))
        [claimed] = await claim(store, now=2)
        await store.settle(claimed.claim, Failed(failure(2, seconds=3)))
        await store.redrive(run.run_id, at=at(4))
        await store.cancel(run.run_id, at=at(5), reason="enough")

        events = await happened(store)

        assert before == (1, 0)
        assert [(one.number, one.type, one.attempt, one.at, one.detail) for one in events] == [
            (1, "run:pending", 0, at(0), None),
            (2, "run:running", 1, at(0), None),
            (3, "run:progress", 1, at(1), "half"),
            (4, "run:pending", 1, at(2), "OSError: no"),
            (5, "run:running", 2, at(2), None),
            (6, "run:failed", 2, at(3), "OSError: no"),
            (7, "run:pending", 0, at(4), None),
            (8, "run:cancelled", 0, at(5), "enough"),
        ]
        assert {(one.run_id, one.job_id, one.correlation_id) for one in events} == {(run.run_id, "mail", "c-1")}
        assert await other.events(after=6) == events[6:]
        assert await store.events(after=2, limit=3) == events[2:5]
        assert await other.event_span() == (1, 8)

    async def test_events_of_many_doors_have_no_gap(self, store: JobRunStore, other: JobRunStore, new: _Runs) -> None:
        doors = itertools.cycle((store, other))

        await asyncio.gather(*(next(doors).enqueue(new.make()) for _ in range(20)))
        await asyncio.gather(claim(store, "w1", limit=7), claim(other, "w2", limit=7))

        numbers = [one.number for one in await happened(store)]
        assert numbers == list(range(1, len(numbers) + 1))

    async def test_what_changes_nothing_is_no_event(self, store: JobRunStore, new: _Runs) -> None:
        await store.enqueue(new.make(idempotency_key="k"))
        [run] = await claim(store)
        await store.enqueue(new.make(idempotency_key="k"))
        await store.renew([run.claim], until=at(60))
        await store.note(run.claim, JobNote(log=(JobLogLine(at(1), "info", "hm"),)))

        assert [one.type for one in await happened(store)] == ["run:pending", "run:running"]

    # -- time -----------------------------------------------------------------------------------------------------

    async def test_a_schedule_is_moved_on_by_whoever_has_read_it_last(
        self, store: JobRunStore, other: JobRunStore
    ) -> None:
        first, second = ScheduleCursor("mail", "* * * * *", "UTC", at(0)), ScheduleCursor("mail", "*", "UTC", at(60))

        moved = [
            await store.put_schedule(first, replaces=second),
            await store.put_schedule(first, replaces=None),
            await other.put_schedule(second, replaces=None),
            await other.put_schedule(second, replaces=first),
        ]

        assert moved == [False, True, False, True]
        assert await store.schedules() == [second]

    # -- how much there is ----------------------------------------------------------------------------------------

    async def test_the_backlog_is_what_is_pending(self, store: JobRunStore, new: _Runs) -> None:
        for due in (0, 0, 60):
            await store.enqueue(new.make(due_at=at(due)))
        await claim(store, limit=1)

        assert [await store.backlog(limit=limit) for limit in (10, 2, 1)] == [2, 2, 1]

    async def test_runs_that_have_been_over_for_long_are_forgotten_with_their_keys(
        self, store: JobRunStore, new: _Runs
    ) -> None:
        for number in range(4):
            await store.enqueue(new.make(idempotency_key=str(number), created_at=at(number), due_at=at(number)))
        old, _running, late, owed = await claim(store, now=4)
        waiting = new.make(created_at=at(4), due_at=at(900))
        await store.enqueue(waiting)
        await store.settle(old.claim, Succeeded(b"1", at(5)))
        await store.settle(late.claim, Succeeded(b"1", at(500)))
        await store.settle(owed.claim, Failed(failure(seconds=6)))
        pruned = await store.prune_runs(before=at(100))
        again = await store.enqueue(new.make(idempotency_key="0", created_at=at(101)))

        assert pruned == (2, None)
        assert await store.get(old.run_id) is None
        assert not again.duplicate
        assert old.run_id not in ids((await store.runs(statuses=["succeeded"]))[0])
        assert len((await store.runs())[0]) == 4

    async def test_a_run_whose_saga_has_not_heard_of_its_end_is_not_forgotten(
        self, store: JobRunStore, new: _Runs
    ) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))

        owed = await store.prune_runs(before=at(1000))
        await store.settle_reply(done, JobReply("delivered", at(2)))
        free = await store.prune_runs(before=at(1000))

        assert (owed.runs, free.runs) == (0, 1)

    async def test_runs_are_forgotten_page_by_page(self, store: JobRunStore, new: _Runs) -> None:
        for _ in range(5):
            await store.enqueue(new.make())
        for run in await claim(store):
            await store.settle(run.claim, Succeeded(b"1", at(1)))

        removed, cursor, rounds = 0, None, 0
        while rounds == 0 or cursor is not None:
            page = await store.prune_runs(before=at(100), after=cursor, limit=2)
            removed, cursor, rounds = removed + page.runs, page.cursor, rounds + 1

        assert removed == 5
        assert await store.runs() == ([], None)

    async def test_old_events_are_forgotten_but_for_the_newest(self, store: JobRunStore, new: _Runs) -> None:
        for number in range(5):
            await store.enqueue(new.make(created_at=at(number)))

        removed = [await store.prune_events(before=at(moment), limit=3) for moment in (2, 1000, 1000)]

        assert removed == [2, 2, 0]
        assert await store.event_span() == (5, 5)
        assert [one.number for one in await happened(store)] == [5]

    # -- the store itself -----------------------------------------------------------------------------------------

    async def test_a_probe_changes_nothing(self, store: JobRunStore, new: _Runs) -> None:
        run = new.make()
        await store.enqueue(run)

        await store.probe()

        assert (await store.runs())[0] == [run]

    async def test_closing_twice_is_no_error(self, open_store: OpenJobRunStore) -> None:
        store = await open_store()

        await store.close()
        await store.close()
