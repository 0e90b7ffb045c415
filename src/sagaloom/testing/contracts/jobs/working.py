"""How a run is worked on: enqueued once, claimed under a lease, settled by its holder alone."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest

from sagaloom.errors import Fenced, IdempotencyKeyReused, MessageRejected
from sagaloom.ports.jobs import Failed, JobNote, JobProgress, JobRunStore, Released, Retried, Succeeded
from sagaloom.testing.contracts.jobs.base import JobRunStoreCase
from sagaloom.testing.contracts.jobs.samples import Runs, at, claim, failure, ids

__all__ = ["Working"]


class Working(JobRunStoreCase):
    """From the queue to the end of a run."""

    # -- enqueueing ---------------------------------------------------------------------------------------------------

    async def test_it_is_a_job_run_store(self, store: JobRunStore) -> None:
        assert isinstance(store, JobRunStore)
        assert store.name
        assert store.problem is None

    async def test_an_enqueued_run_is_there_as_it_was_given(self, store: JobRunStore, new: Runs) -> None:
        run = new.make(priority=70, correlation_id="c", traceparent="00-a", tracestate="s", due_at=at(60))

        enqueued = await store.enqueue(run)

        assert (enqueued.run, enqueued.duplicate) == (run, False)
        assert await store.get(run.run_id) == run

    async def test_a_run_that_nobody_enqueued_is_not_there(self, store: JobRunStore) -> None:
        assert await store.get("f" * 32) is None

    async def test_a_run_id_cannot_be_used_twice(self, store: JobRunStore, new: Runs) -> None:
        run = new.make()
        await store.enqueue(run)

        with pytest.raises(MessageRejected):
            await store.enqueue(msgspec.structs.replace(run, payload=b"2"))

        assert await store.get(run.run_id) == run

    async def test_an_idempotency_key_with_the_same_payload_answers_with_the_first_run(
        self, store: JobRunStore, other: JobRunStore, new: Runs
    ) -> None:
        first = new.make(idempotency_key="k")
        await store.enqueue(first)

        again = await other.enqueue(new.make(idempotency_key="k", priority=1))

        assert (again.run, again.duplicate) == (first, True)
        assert ids((await store.runs())[0]) == [first.run_id]

    async def test_an_idempotency_key_outlives_its_run(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make(idempotency_key="k"))
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))

        again = await store.enqueue(new.make(idempotency_key="k"))

        assert (again.run, again.duplicate) == (done, True)

    async def test_an_idempotency_key_with_another_payload_is_refused(self, store: JobRunStore, new: Runs) -> None:
        first = new.make(idempotency_key="k")
        await store.enqueue(first)

        with pytest.raises(IdempotencyKeyReused, match=first.run_id):
            await store.enqueue(new.make(idempotency_key="k", payload=b'{"n":2}'))

        assert ids((await store.runs())[0]) == [first.run_id]

    async def test_the_same_payload_may_be_written_in_another_way(self, store: JobRunStore, new: Runs) -> None:
        first = new.make(idempotency_key="k", payload=b'{"a":1,"b":[2]}')
        await store.enqueue(first)

        again = await store.enqueue(new.make(idempotency_key="k", payload=b'{ "b": [2], "a": 1 }'))

        assert (again.run, again.duplicate) == (first, True)

    async def test_idempotency_keys_of_two_jobs_are_two_keys(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make("mail", idempotency_key="k"))

        assert not (await store.enqueue(new.make("print", idempotency_key="k", payload=b"2"))).duplicate

    async def test_of_many_who_enqueue_one_key_at_once_all_get_one_run(
        self, store: JobRunStore, other: JobRunStore, new: Runs
    ) -> None:
        doors = itertools.cycle((store, other))

        done = await asyncio.gather(*(next(doors).enqueue(new.make(idempotency_key="k")) for _ in range(20)))

        assert len({one.run.run_id for one in done}) == 1
        assert [one.duplicate for one in done].count(False) == 1

    # -- claiming -----------------------------------------------------------------------------------------------------

    async def test_a_due_run_is_claimed_and_counted(self, store: JobRunStore, new: Runs) -> None:
        run = new.make()
        await store.enqueue(run)

        [claimed] = await claim(store, "w1", now=2)

        assert claimed == msgspec.structs.replace(
            run, status="running", holder="w1", attempt=1, epoch=1, started_at=at(2)
        )
        assert await store.get(run.run_id) == claimed

    async def test_a_claimed_run_is_not_claimed_again(self, store: JobRunStore, other: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make())
        await claim(store, "w1")

        assert await claim(other, "w2") == ()
        assert await claim(store, "w1") == ()

    async def test_a_run_is_not_claimed_before_it_is_due_and_the_moment_is_told(
        self, store: JobRunStore, new: Runs
    ) -> None:
        await store.enqueue(new.make(due_at=at(60)))

        early = await store.claim("w1", ["mail"], now=at(59.9), until=at(70), limit=1)

        assert (early.runs, early.next_at) == ((), at(60))
        assert len(await claim(store, now=60)) == 1

    async def test_nothing_waiting_means_no_moment(self, store: JobRunStore) -> None:
        assert (await store.claim("w1", ["mail"], now=at(0), until=at(6), limit=1)).next_at is None

    async def test_only_runs_of_the_asked_jobs_are_claimed(self, store: JobRunStore, new: Runs) -> None:
        mail, letter = new.make("mail"), new.make("print", due_at=at(1))
        await store.enqueue(mail)
        await store.enqueue(letter)

        assert ids(await claim(store, "w1", "print", now=2)) == [letter.run_id]
        assert ids(await claim(store, "w1", "mail", "print", now=2)) == [mail.run_id]
        assert await claim(store, "w1", "sing", now=2) == ()

    async def test_no_more_than_the_limit_is_claimed(self, store: JobRunStore, new: Runs) -> None:
        runs = [new.make() for _ in range(5)]
        for run in runs:
            await store.enqueue(run)

        batches = [ids(await claim(store, limit=2)) for _ in range(4)]

        expected = ids(runs)
        assert batches == [expected[:2], expected[2:4], expected[4:], []]

    async def test_higher_priorities_go_first_and_then_what_was_due_first(self, store: JobRunStore, new: Runs) -> None:
        late = new.make("mail", due_at=at(30))
        early = new.make("print", due_at=at(20))
        low = new.make("mail", priority=0)
        urgent = new.make("mail", priority=100, due_at=at(40))
        for run in (late, early, low, urgent):
            await store.enqueue(run)

        order = [ids(await claim(store, "w1", "mail", "print", now=50, limit=1)) for _ in range(4)]

        assert order == [[urgent.run_id], [early.run_id], [late.run_id], [low.run_id]]

    async def test_what_becomes_due_for_another_job_is_still_found_by_it(
        self, store: JobRunStore, other: JobRunStore, new: Runs
    ) -> None:
        run = new.make("print", due_at=at(10))
        await store.enqueue(run)
        assert await claim(other, "w2", "print", now=5) == ()
        assert await claim(store, "w1", "mail", now=11) == ()

        assert ids(await claim(other, "w2", "print", now=11)) == [run.run_id]

    async def test_what_another_door_enqueues_is_found(self, store: JobRunStore, other: JobRunStore, new: Runs) -> None:
        assert await claim(store) == ()
        assert await claim(store) == ()
        run = new.make()
        await other.enqueue(run)

        assert ids(await claim(store)) == [run.run_id]

    async def test_of_many_who_claim_at_once_each_gets_other_runs(
        self, store: JobRunStore, other: JobRunStore, new: Runs
    ) -> None:
        runs = [new.make(due_at=at(number % 3)) for number in range(30)]
        for run in runs:
            await store.enqueue(run)

        batches = await asyncio.gather(
            *(claim(door, name, now=5, limit=3) for door, name in [(store, "w1"), (other, "w2")] * 10)
        )

        claimed = [run_id for batch in batches for run_id in ids(batch)]
        assert len(claimed) == len(set(claimed)) == len(runs)

    # -- leases -------------------------------------------------------------------------------------------------------

    async def test_a_run_whose_lease_is_over_is_claimed_again_under_a_greater_epoch(
        self, store: JobRunStore, other: JobRunStore, new: Runs
    ) -> None:
        await store.enqueue(new.make())
        await claim(store, "w1")

        early = await other.claim("w2", ["mail"], now=at(5.9), until=at(12), limit=1)
        [again] = await claim(other, "w2", now=6)

        assert (early.runs, early.next_at) == ((), at(6))
        assert (again.holder, again.epoch, again.attempt) == ("w2", 2, 2)

    async def test_a_renewed_lease_lasts_longer(self, store: JobRunStore, other: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store, "w1")

        lost = await store.renew([run.claim], until=at(20))

        assert lost == ([], [])
        assert await claim(other, "w2", now=19.9) == ()
        assert len(await claim(other, "w2", now=20)) == 1

    async def test_a_stale_claim_is_not_renewed_and_is_named(
        self, store: JobRunStore, other: JobRunStore, new: Runs
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

    async def test_a_stale_claim_settles_nothing(self, store: JobRunStore, other: JobRunStore, new: Runs) -> None:
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

    async def test_a_claim_is_settled_once(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)
        done = await store.settle(run.claim, Succeeded(b"1", at(1)))

        with pytest.raises(Fenced, match="succeeded"):
            await store.settle(run.claim, Failed(failure()))

        assert await store.get(run.run_id) == done

    async def test_a_claim_on_nothing_settles_nothing(self, store: JobRunStore, new: Runs) -> None:
        run = msgspec.structs.replace(new.make(), holder="w1", epoch=1)

        with pytest.raises(Fenced):
            await store.settle(run.claim, Succeeded(b"1", at(1)))

        assert await store.get(run.run_id) is None

    async def test_a_run_that_was_given_back_and_taken_again_is_not_settled_by_the_first_claim(
        self, store: JobRunStore, new: Runs
    ) -> None:
        await store.enqueue(new.make())
        [first] = await claim(store, "w1")
        await store.settle(first.claim, Released())
        [second] = await claim(store, "w1")

        with pytest.raises(Fenced):
            await store.settle(first.claim, Succeeded(b"1", at(1)))

        assert (second.attempt, second.epoch) == (1, 2)

    # -- settling -----------------------------------------------------------------------------------------------------

    async def test_a_run_that_succeeded_has_its_result_and_is_over(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)

        done = await store.settle(run.claim, Succeeded(b'{"sent":true}', at(3)))

        assert (done.status, done.result, done.ended_at, done.holder) == ("succeeded", b'{"sent":true}', at(3), None)
        assert await store.get(run.run_id) == done
        assert await claim(store, now=1000) == ()

    async def test_a_run_that_failed_has_its_reason_and_is_over(self, store: JobRunStore, new: Runs) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)

        done = await store.settle(run.claim, Failed(failure(seconds=3)))

        assert (done.status, done.failure, done.ended_at) == ("failed", failure(seconds=3), at(3))
        assert await store.get(run.run_id) == done
        assert await claim(store, now=1000) == ()

    async def test_a_retried_run_waits_until_it_is_due_and_keeps_its_count(
        self, store: JobRunStore, other: JobRunStore, new: Runs
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
        self, store: JobRunStore, other: JobRunStore, new: Runs
    ) -> None:
        await store.enqueue(new.make())
        [run] = await claim(store)

        waiting = await store.settle(run.claim, Released())
        [again] = await claim(other, "w2", now=1)

        assert (waiting.status, waiting.attempt) == ("pending", 0)
        assert (again.attempt, again.epoch) == (1, 2)
