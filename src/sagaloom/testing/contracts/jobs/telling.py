"""What is told of a run: by its handler, to those who wait for it, to those who watch."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest

from sagaloom.errors import MessageRejected
from sagaloom.ports.jobs import (
    ATTEMPTS_KEPT,
    LOG_LINES_KEPT,
    REPLY_HEADSTART,
    Cancelled,
    Failed,
    JobLogLine,
    JobNote,
    JobProgress,
    JobReply,
    JobRunStatus,
    JobRunStore,
    Released,
    Retried,
    Succeeded,
)
from sagaloom.testing.contracts.jobs.base import JobRunStoreCase
from sagaloom.testing.contracts.jobs.samples import ASKS, Runs, at, claim, failure, happened, ids

__all__ = ["Telling"]


class Telling(JobRunStoreCase):
    """Progress, logs, replies, events, lists, depths."""

    # -- what handlers say --------------------------------------------------------------------------------------------

    async def test_what_a_handler_says_is_kept_with_the_run(self, store: JobRunStore, new: Runs) -> None:
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

    async def test_of_a_long_log_the_newest_lines_are_kept(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        lines = [JobLogLine(at(1), "info", str(number)) for number in range(LOG_LINES_KEPT + 5)]

        await store.note(run.claim, JobNote(log=tuple(lines[:50])))
        await store.note(run.claim, JobNote(log=tuple(lines[50:])))

        noted = await store.get(run.run_id)
        assert noted is not None
        assert noted.log == tuple(lines[5:])

    async def test_every_attempt_that_is_over_stands_in_the_history(
        self, store: JobRunStore, other: JobRunStore, new: Runs
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

    async def test_of_a_long_history_the_newest_attempts_are_kept(self, store: JobRunStore, new: Runs) -> None:
        run = new.make()
        await store.enqueue(run)
        for number in range(ATTEMPTS_KEPT + 2):
            [run] = await claim(store, now=number * 10)
            run = await store.settle(run.claim, Retried(failure(run.attempt), at(number * 10)))

        assert [one.attempt for one in run.history] == list(range(3, ATTEMPTS_KEPT + 3))

    # -- replies ------------------------------------------------------------------------------------------------------

    async def test_a_run_that_a_saga_asked_for_owes_a_reply_when_it_is_over(
        self, store: JobRunStore, other: JobRunStore, new: Runs
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

    async def test_a_reply_that_was_delivered_is_not_owed_any_more(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Failed(failure()))

        assert await store.settle_reply(done, JobReply("delivered", at(2)))

        assert await store.claim_replies(now=at(1000), until=at(2000), limit=10) == []
        assert not await store.settle_reply(done, JobReply("refused", at(3)))
        found = await store.get(run.run_id)
        assert found is not None
        assert found.reply == JobReply("delivered", at(2))

    async def test_a_reply_may_be_tried_again_later(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Cancelled(at(1)))

        await store.settle_reply(done, JobReply("due", at(60), 1, "nobody answers"))

        assert await store.claim_replies(now=at(59), until=at(99), limit=10) == []
        [found] = await store.claim_replies(now=at(60), until=at(99), limit=10)
        assert found.reply == JobReply("due", at(99), 1, "nobody answers")

    async def test_a_redriven_run_owes_no_reply_until_it_is_over_again(self, store: JobRunStore, new: Runs) -> None:
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

    async def test_a_refused_reply_is_sent_again_by_a_redrive(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))
        await store.settle_reply(done, JobReply("refused", at(2), 1, "no such saga"))

        again = await store.redrive(run.run_id, at=at(5))

        assert (again.status, again.reply) == ("succeeded", JobReply("due", at(5)))
        assert ids(await store.claim_replies(now=at(5), until=at(9), limit=10)) == [run.run_id]

    async def test_a_waiting_run_that_is_cancelled_owes_a_reply_too(self, store: JobRunStore, new: Runs) -> None:
        run = new.make(reply_to=ASKS)
        await store.enqueue(run)

        await store.cancel(run.run_id, at=at(1))

        assert ids(await store.claim_replies(now=at(1000), until=at(2000), limit=10)) == [run.run_id]

    # -- what happened ------------------------------------------------------------------------------------------------

    async def test_everything_that_happens_is_an_event_in_its_order(
        self, store: JobRunStore, other: JobRunStore, new: Runs
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

    async def test_events_of_many_doors_have_no_gap(self, store: JobRunStore, other: JobRunStore, new: Runs) -> None:
        doors = itertools.cycle((store, other))

        await asyncio.gather(*(next(doors).enqueue(new.make()) for _ in range(20)))
        await asyncio.gather(claim(store, "w1", limit=7), claim(other, "w2", limit=7))

        numbers = [one.number for one in await happened(store)]
        assert numbers == list(range(1, len(numbers) + 1))

    async def test_what_changes_nothing_is_no_event(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make(idempotency_key="k"))
        [run] = await claim(store)
        await store.enqueue(new.make(idempotency_key="k"))
        await store.renew([run.claim], until=at(60))
        await store.note(run.claim, JobNote(log=(JobLogLine(at(1), "info", "hm"),)))

        assert [one.type for one in await happened(store)] == ["run:pending", "run:running"]

    # -- reading ------------------------------------------------------------------------------------------------------

    async def test_runs_are_listed_newest_first_page_by_page(self, store: JobRunStore, new: Runs) -> None:
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
        new: Runs,
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

    # -- how much there is --------------------------------------------------------------------------------------------

    async def test_the_backlog_is_what_is_pending(self, store: JobRunStore, new: Runs) -> None:
        for due in (0, 0, 60):
            await store.enqueue(new.make(due_at=at(due)))
        await claim(store, limit=1)

        assert [await store.backlog(limit=limit) for limit in (10, 2, 1)] == [2, 2, 1]

    async def test_runs_that_have_been_over_for_long_are_forgotten_with_their_keys(
        self, store: JobRunStore, new: Runs
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
        self, store: JobRunStore, new: Runs
    ) -> None:
        await store.enqueue(new.make(reply_to=ASKS))
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))

        owed = await store.prune_runs(before=at(1000))
        await store.settle_reply(done, JobReply("delivered", at(2)))
        free = await store.prune_runs(before=at(1000))

        assert (owed.runs, free.runs) == (0, 1)

    async def test_runs_are_forgotten_page_by_page(self, store: JobRunStore, new: Runs) -> None:
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

    async def test_old_events_are_forgotten_but_for_the_newest(self, store: JobRunStore, new: Runs) -> None:
        for number in range(5):
            await store.enqueue(new.make(created_at=at(number)))

        removed = [await store.prune_events(before=at(moment), limit=3) for moment in (2, 1000, 1000)]

        assert removed == [2, 2, 0]
        assert await store.event_span() == (5, 5)
        assert [one.number for one in await happened(store)] == [5]
