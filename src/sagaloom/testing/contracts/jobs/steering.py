"""What people do to runs, and what the store says of itself."""

from __future__ import annotations

import msgspec
import pytest

from sagaloom.engine.records import ScheduleCursor
from sagaloom.errors import Fenced, JobRunNotFound, MessageRejected
from sagaloom.ports.jobs import Cancelled, Failed, JobRunStore, Released, Retried, Settlement, Succeeded
from sagaloom.testing.contracts.jobs.base import JobRunStoreCase, OpenJobRunStore
from sagaloom.testing.contracts.jobs.samples import ASKS, Runs, at, claim, failure, ids

__all__ = ["Steering"]


class Steering(JobRunStoreCase):
    """Cancelling, redriving, closing."""

    # -- cancelling and redriving -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("due", [0, 60])
    async def test_a_waiting_run_is_cancelled_at_once(self, store: JobRunStore, new: Runs, due: int) -> None:
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
        self, store: JobRunStore, other: JobRunStore, new: Runs
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
        self, store: JobRunStore, new: Runs
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        await store.cancel(run.run_id, at=at(1))

        assert (await store.settle(run.claim, Succeeded(b"1", at(2)))).status == "succeeded"

    async def test_a_cancelled_run_is_not_tried_again(self, store: JobRunStore, new: Runs) -> None:
        ends: list[Settlement] = [Retried(failure(seconds=2), at(30)), Released(at(2))]
        for settlement in ends:
            await store.enqueue(new.make())
            [run] = await claim(store)
            await store.cancel(run.run_id, at=at(1))

            done = await store.settle(run.claim, settlement)

            assert (done.status, done.ended_at) == ("cancelled", at(2))
        assert await claim(store, now=1000) == ()

    async def test_whoever_takes_over_a_cancelled_run_finds_the_mark(
        self, store: JobRunStore, other: JobRunStore, new: Runs
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store, "w1")
        await store.cancel(run.run_id, at=at(1))

        [found] = await claim(other, "w2", now=10)

        assert (found.holder, found.cancelled_at) == ("w2", at(1))

    @pytest.mark.parametrize("asked_before", [0, 1])
    async def test_a_run_whose_holder_is_gone_is_cancelled_at_once(
        self, store: JobRunStore, other: JobRunStore, new: Runs, asked_before: int
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

    async def test_a_run_that_is_over_is_not_cancelled(self, store: JobRunStore, new: Runs) -> None:
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
        self, store: JobRunStore, other: JobRunStore, new: Runs, end: str
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

    async def test_a_run_that_is_not_over_or_succeeded_is_not_redriven(self, store: JobRunStore, new: Runs) -> None:
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

    # -- time ---------------------------------------------------------------------------------------------------------

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

    # -- the store itself ---------------------------------------------------------------------------------------------

    async def test_a_probe_changes_nothing(self, store: JobRunStore, new: Runs) -> None:
        run = new.make()
        await store.enqueue(run)

        await store.probe()

        assert (await store.runs())[0] == [run]

    async def test_closing_twice_is_no_error(self, open_store: OpenJobRunStore) -> None:
        store = await open_store()

        await store.close()
        await store.close()
